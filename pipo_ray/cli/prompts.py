"""Prompts from the command line and from files, checked before anything is started."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipo_ray.errors import InputError
from pipo_ray.params import SamplingParams

Prompt = str | list[int]
_BYTES_PER_TOKEN = 2
_SPECIAL_TOKENS = 8


def collect_prompts(texts: Sequence[str], ids: Sequence[str], files: Sequence[str]) -> list[Prompt]:
    """The prompts of `-p`, `--prompt-ids` and `--prompts`, in this order.

    Raises InputError for a bad one, and for none.
    """
    prompts: list[Prompt] = [_text(text, "-p") for text in texts]
    prompts += [parse_ids(text) for text in ids]
    for file in files:
        prompts += read_prompts(file)
    if not prompts:
        raise InputError("no prompt was given; give -p TEXT, --prompt-ids IDS or --prompts FILE")
    return prompts


def most_tokens(prompts: Sequence[Prompt], params: SamplingParams) -> int:
    """Tokens that all prompts and their answers together will have: room for the longest in any case, a token of text
    being a byte or more but for a few special ones; for all together two bytes a token are enough, and if they are not,
    requests wait for each other.
    """
    answer = params.max_tokens or 0
    most = [len(one.encode()) + _SPECIAL_TOKENS if isinstance(one, str) else len(one) for one in prompts]
    likely = [
        _SPECIAL_TOKENS + length // _BYTES_PER_TOKEN if isinstance(one, str) else length
        for one, length in zip(prompts, most, strict=True)
    ]
    return max(max(most) + answer, sum(params.n * (length + answer) for length in likely))


def parse_ids(text: str, option: str = "--prompt-ids") -> list[int]:
    """Token ids from "1,2,3", which `option` was given. Raises InputError."""
    parts = text.replace(",", " ").split()
    if not parts:
        raise InputError(f"{option} is empty; give token ids like 1,2,3")
    for part in parts:
        if not (part.isascii() and part.isdigit()):
            raise InputError(f"{option}: {part[:40]!r} is no token id; give whole numbers like 1,2,3")
    return [int(part) for part in parts]


def read_prompts(file: str) -> list[Prompt]:
    """The prompts in a file ("-" is stdin): one per line, or JSON Lines. Empty lines are left out.

    It is JSON Lines if its name ends in .jsonl, or if its first line is an object with "prompt" or "prompt_token_ids".
    Raises InputError naming file and line.
    """
    name = "stdin" if file == "-" else file
    try:
        raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise InputError(f"--prompts {file} cannot be read: {error.strerror}; check path and rights") from error
    lines = list(_lines(raw, name))
    if not lines:
        raise InputError(f"--prompts {name} holds no prompt; write one per line")
    if file.endswith(".jsonl") or _is_prompt_object(lines[0][1]):
        return [_object(line, f"{name}, line {number}") for number, line in lines]
    return [_text(line, f"{name}, line {number}") for number, line in lines]


def _lines(raw: bytes, name: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = line.decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name}, line {number}: not UTF-8 at byte {error.start}; save the file as UTF-8"
            ) from error
        if text.strip():
            yield number, text


def _is_prompt_object(line: str) -> bool:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and not value.keys().isdisjoint(("prompt", "prompt_token_ids"))


def _object(line: str, where: str) -> Prompt:
    wanted = 'write {"prompt": "..."} or {"prompt_token_ids": [1, 2, 3]}'
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); {wanted}") from error
    if not isinstance(value, dict) or len(value) != 1 or not value.keys() <= {"prompt", "prompt_token_ids"}:
        raise InputError(f"{where}: {line[:60]!r} is no prompt; {wanted}")
    ((key, content),) = value.items()
    if key == "prompt":
        if not isinstance(content, str):
            raise InputError(f"{where}: its prompt is a {type(content).__name__}, not a string; {wanted}")
        return _text(content, where)
    if not isinstance(content, list) or any(type(item) is not int or item < 0 for item in content):
        raise InputError(f"{where}: its prompt_token_ids are not whole numbers from 0 up; {wanted}")
    if not content:
        raise InputError(f"{where}: the prompt is empty; give at least one token id")
    return content


def _text(text: str, where: str) -> str:
    if not text:
        raise InputError(f"{where}: the prompt is empty; give at least one character")
    require_unicode(text, f"{where}: the prompt")
    return text


def require_unicode(text: str, what: str) -> None:
    """Raise InputError for text with bytes in it that Python could not decode; `what` names it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is not valid Unicode at character {error.start}; give UTF-8") from error
