"""Runner of AirLLM on the CPU: one layer at a time from its own shards, the next one prefetched by a thread.

With `"split": true` it only splits the checkpoint into shards and ends.
"""

from __future__ import annotations

from typing import Any

import torch
from airllm import AutoModel
from hugging_face import greedy
from protocol import Generate, serve


def start(options: dict[str, Any]) -> tuple[Generate, list[str]]:
    """`options`: model, shards (the folder), threads, split."""
    torch.set_num_threads(options["threads"])
    model = AutoModel.from_pretrained(
        options["model"], device="cpu", dtype=torch.bfloat16, layer_shards_saving_path=options["shards"],
        prefetching=True, max_seq_len=1024,
    )  # fmt: skip
    if options["split"]:
        raise SystemExit(0)
    return greedy(model), ["nothing stays in RAM", f"prefetching: {model.prefetching}"]


if __name__ == "__main__":
    serve(start, ("airllm", "transformers", "torch", "accelerate", "safetensors"))
