"""How `small_pc.py` talks with the process of a peer: one JSON line each way. Imports nothing that is not Python's.

A runner reads its options from the command line as JSON, starts, says what it is, and then answers requests:

    -> {"ready_s": 12.3, "versions": {"torch": "2.13.0"}, "notes": ["what is resident"]}
    <- {"prompts": [[3, 5, 8]], "tokens": 4}
    -> {"seconds": [[4.9, 9.8, 14.7, 19.6]], "token_ids": [[17, 4, 90, 11]]}

`seconds` are counted from the request to each token, for every prompt of it; every peer decodes greedily and goes on
after an end-of-sequence token. The end of its input ends the runner. What the peer itself prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

OnToken = Callable[[int, int], None]
"""Called with the number of the prompt in its request and the token, as soon as the token is known."""

Generate = Callable[[list[list[int]], int, OnToken], None]
"""Generates so many tokens for each of the prompts."""


def serve(start: Callable[[dict[str, Any]], tuple[Generate, list[str]]], packages: tuple[str, ...]) -> None:
    """Start the peer with the options of the command line and answer requests until there are none."""
    begin = time.perf_counter()
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever prints, prints to stderr
    generate, notes = start(json.loads(sys.argv[1]))
    versions = {name: metadata.version(name) for name in packages}
    print(json.dumps({"ready_s": time.perf_counter() - begin, "versions": versions, "notes": notes}), file=replies)
    for line in sys.stdin:
        request = json.loads(line)
        prompts = request["prompts"]
        seconds: list[list[float]] = [[] for _ in prompts]
        token_ids: list[list[int]] = [[] for _ in prompts]
        clock = _Clock(seconds, token_ids)
        generate(prompts, request["tokens"], clock.on_token)
        print(json.dumps({"seconds": seconds, "token_ids": token_ids}), file=replies)


class _Clock:
    def __init__(self, seconds: list[list[float]], token_ids: list[list[int]]) -> None:
        self._seconds, self._token_ids = seconds, token_ids
        self._begin = time.perf_counter()

    def on_token(self, prompt: int, token: int) -> None:
        self._seconds[prompt].append(time.perf_counter() - self._begin)
        self._token_ids[prompt].append(int(token))
