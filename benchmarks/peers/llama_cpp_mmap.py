"""Runner of llama.cpp: a GGUF in bf16, mapped into memory; what stays there is up to the kernel's page cache."""

from __future__ import annotations

from typing import Any

import llama_cpp
import numpy as np
from protocol import Generate, OnToken, serve


def start(options: dict[str, Any]) -> tuple[Generate, list[str]]:
    """`options`: gguf, threads, repack."""
    if not options["repack"]:
        _leave_weights_where_they_are()
    llama = llama_cpp.Llama(
        options["gguf"], n_ctx=1024, n_batch=512, n_ubatch=512, n_threads=options["threads"],
        n_threads_batch=options["threads"], use_mmap=True, use_mlock=False, logits_all=False, verbose=True,
    )  # fmt: skip

    def generate(prompts: list[list[int]], tokens: int, on_token: OnToken) -> None:
        (prompt,) = prompts
        llama.reset()
        following = prompt
        for _ in range(tokens):
            llama.eval(following)
            token = int(np.argmax(_last_logits(llama)))
            on_token(0, token)
            following = [token]

    repacked = "weights repacked if that is faster" if options["repack"] else "weights not repacked"
    return generate, [llama_cpp.llama_print_system_info().decode(), repacked]


def _leave_weights_where_they_are() -> None:
    """The constructor has no parameter for it (llama.cpp's own --no-repack): its defaults are what it takes."""
    original = llama_cpp.llama_model_default_params

    def defaults() -> Any:
        parameters = original()
        parameters.use_extra_bufts = False
        return parameters

    llama_cpp.llama_cpp.llama_model_default_params = llama_cpp.llama_model_default_params = defaults


def _last_logits(llama: llama_cpp.Llama) -> Any:
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llama.ctx, -1), shape=(llama.n_vocab(),))


if __name__ == "__main__":
    serve(start, ("llama-cpp-python",))
