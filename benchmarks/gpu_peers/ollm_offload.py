"""oLLM with its layers on the GPU, in RAM or on disk, on a GPU with a budget.

How to run (the first line makes an environment of pinned versions, transformers 4.57 among them; flash-attn and kvikio
are optional and not in it, `--kvikio` reads the disk through the latter):

    PYTHON=$(python benchmarks/peers/environments.py ollm ENVIRONMENTS)
    $PYTHON benchmarks/gpu_peers/ollm_offload.py --checkpoint FOLDER --gpu-memory BYTES --out FILE.json [--from disk]

oLLM's own Llama class with its own loader: as many layers as fit are kept on the GPU (the loader's
`offload_dict_to_gpu_cpu(gpu=True)`), the others in RAM, as `offload_layers_to_cpu` keeps them, or on disk; the
key-value cache is on the GPU, as its manual says for short contexts. `--pinned` pins what is kept in RAM, which oLLM
does not. It wants a checkpoint with an index of its files. Its Llama takes one sequence at a time, so that the
compute-bound prompt is one long sequence; what a batch ends with is in its row. It has no OPT.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from measurement import Case, Options, Rows, Shape, arguments, cases, limit_gpu, parse, run


class OllmOffload:
    """oLLM's model and its loader."""

    def __init__(self, options: Options, *, pinned: bool, kvikio: bool) -> None:
        from ollm import AutoInference, Inference, gds_loader, llama

        device = "cuda:0" if options.device == "cuda" else "cpu"
        if json.loads((options.checkpoint / "config.json").read_text())["model_type"] != "llama":
            sys.modules.setdefault("peft", _without_adapters())
            AutoInference(str(options.checkpoint), device=device, logging=False)  # says that it has no such model
        gds_loader.kvikio_available = kvikio
        if kvikio:
            _allocate_in_torch()
        self._options, self._pinned = options, pinned
        self._shape = Shape.of(options.checkpoint)
        self.in_flight_bytes = 2 * self._shape.layer_bytes  # a layer, and the one before it
        inference = Inference("llama3-8B-chat", device=device, logging=False)
        inference.tokenizer = None
        inference.load_model(str(options.checkpoint))
        self.model: Any = inference.model
        self._loader: Any = llama.loader
        self._how = f"{'on disk' if options.from_disk else 'in RAM'}{', pinned' if pinned else ''}"
        self._how += ", read through kvikio" if kvikio else ""

    def place(self, resident_bytes: int) -> str:
        """Keep the first layers on the GPU, the others in RAM unless they come from disk."""
        layers = self._shape.layers
        for layer in self.model.model.layers:  # what a sweep that ran out of memory has left behind
            layer._unload_layer_weights()
        self.model.model.embed_tokens.to(self._loader.device)
        self.model.lm_head.to(self._loader.device)
        # Embeddings and head come back to the GPU behind the last layer, to where the layers in flight were.
        fitting = resident_bytes - max(0, self._shape.outside_bytes - self.in_flight_bytes)
        resident = max(0, min(layers, fitting // self._shape.layer_bytes))
        for number in range(layers):
            base = f"model.layers.{number}."
            on_gpu, was = number < resident, self._loader.offloaded_map.get(base)
            wanted = self._options.device if on_gpu else "cpu"
            if not on_gpu and self._options.from_disk:
                self._loader.offloaded_map.pop(base, None)
            elif was is None or next(iter(was.values())).device.type != wanted:
                self._loader.preload_layer_safetensors(base)
                self._loader.offload_dict_to_gpu_cpu(base, gpu=on_gpu)
                if self._pinned and wanted == "cpu" and self._options.device == "cuda":
                    kept = self._loader.offloaded_map[base]
                    self._loader.offloaded_map[base] = {name: weight.pin_memory() for name, weight in kept.items()}
        return f"{resident} of {layers} layers on the GPU, the others {self._how}; embeddings and head come and go"


def _without_adapters() -> ModuleType:
    """What AutoInference imports from peft even when there is no adapter."""
    peft = ModuleType("peft")
    for name in ("PeftModel", "LoraConfig", "get_peft_model"):
        setattr(peft, name, None)
    return peft


def _allocate_in_torch() -> None:
    """Let CuPy, and so kvikio, allocate where the budget is enforced."""
    import cupy

    cupy.cuda.set_allocator(
        cupy.cuda.PythonFunctionAllocator(
            lambda size, device: torch.cuda.caching_allocator_alloc(size, device),
            lambda pointer, device: torch.cuda.caching_allocator_delete(pointer),
        ).malloc
    )


def _one_sequence(case: Case) -> Case:
    """The compute-bound prompt as one sequence."""
    return replace(case, batch=1, length=case.batch * case.length) if case.kind == "prompt" else case


def main() -> None:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--pinned", action="store_true", help="pin what oLLM keeps in RAM")
    parser.add_argument("--kvikio", action="store_true", help="read the disk through kvikio")
    options = parse(parser)
    allowed = limit_gpu(options)
    packages = ("ollm", "transformers", "torch", "accelerate", *(("kvikio-cu13",) if options.extra.kvikio else ()))
    rows = Rows(options, "ollm", packages)
    given = options.extra
    groups = [[_one_sequence(case)] for case in cases(options)]
    run(
        options, rows, lambda: OllmOffload(options, pinned=given.pinned, kvikio=given.kvikio),
        groups=groups, allowed=allowed,
    )  # fmt: skip


if __name__ == "__main__":
    main()
