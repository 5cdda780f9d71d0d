"""HF Accelerate with offload to RAM or to disk, on a GPU with a budget.

How to run (in any environment with accelerate and transformers 5, such as the first line makes, of pinned versions):

    PYTHON=$(python benchmarks/peers/environments.py accelerate ENVIRONMENTS)
    $PYTHON benchmarks/gpu_peers/accelerate_offload.py --checkpoint FOLDER --gpu-memory BYTES --out FILE.json
                                                       [--from disk] [--pageable]          (--help for everything)

A device map puts embeddings, norms and head on the GPU, as many layers as fit beside them, and the others on "cpu" or
"disk". This is "auto" but for the room that it keeps free for the largest module, the head, which stays here. From RAM,
the weights are pinned before `dispatch_model` gets them, which Accelerate does not do by itself; `--pageable` leaves
them as `from_pretrained` makes them. From disk, `from_pretrained` gets the map and an offload folder: the weights come
out of the checkpoint's own safetensors files, straight onto the GPU.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from accelerate import dispatch_model, init_empty_weights
from accelerate.hooks import remove_hook_from_submodules
from measurement import Options, Rows, Shape, arguments, cases, limit_gpu, parse, run
from transformers import AutoConfig, AutoModelForCausalLM

Places = dict[str, int | str]


class AccelerateOffload:
    """The model, and from RAM its weights under their names."""

    def __init__(self, options: Options, *, pinned: bool) -> None:
        self._options = options
        self._shape = Shape.of(options.checkpoint)
        self.in_flight_bytes = 2 * 2 * self._shape.hidden * self._shape.intermediate  # a matrix, and the one before it
        self._weights: dict[str, torch.Tensor] = {}
        if options.from_disk:
            self._how = "on disk"
            with init_empty_weights():
                self.model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.checkpoint))
        else:
            self._how = "in pinned RAM" if pinned else "in pageable RAM"
            self.model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=torch.bfloat16).eval()
            for name, parameter in self.model.named_parameters():
                if pinned and options.device == "cuda":
                    parameter.data = parameter.data.pin_memory()
                self._weights[name] = parameter.data
        self._layers = _layers(self.model, self._shape.layers)
        self._others = _others(self.model, self._layers)

    def place(self, resident_bytes: int) -> str:
        """Dispatch the model anew."""
        fitting = (resident_bytes - self._shape.outside_bytes) // self._shape.layer_bytes
        resident = max(0, min(self._shape.layers, fitting))
        device: int | str = 0 if self._options.device == "cuda" else "cpu"
        places: Places = dict.fromkeys(self._others, device)
        places |= dict.fromkeys(self._layers[:resident], device)
        places |= dict.fromkeys(self._layers[resident:], "disk" if self._options.from_disk else "cpu")
        if self._options.from_disk:
            self._dispatch_from_disk(places)
        else:
            self._dispatch_from_ram(places, device)
        return f"{resident} of {len(self._layers)} layers, embeddings and head on the GPU, the others {self._how}"

    def _dispatch_from_disk(self, places: Places) -> None:
        self.model = None
        with tempfile.TemporaryDirectory() as folder:  # stays empty: the checkpoint's files are used
            self.model = AutoModelForCausalLM.from_pretrained(
                self._options.checkpoint, dtype=torch.bfloat16, device_map=places, offload_folder=folder
            ).eval()

    def _dispatch_from_ram(self, places: Places, device: int | str) -> None:
        remove_hook_from_submodules(self.model)
        for name, weight in self._weights.items():
            module, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(module), leaf, torch.nn.Parameter(weight, requires_grad=False))
        self.model.tie_weights()
        dispatch_model(self.model, places, main_device=device, skip_keys=self.model._skip_keys_device_placement)


def _layers(model: Any, count: int) -> list[str]:
    """The names of the decoder layers."""
    (layers,) = (
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and name.endswith("layers")
    )
    return [f"{layers}.{number}" for number in range(count)]


def _others(model: Any, layers: list[str]) -> list[str]:
    """The names of the modules outside of the layers that have none inside."""
    inside = tuple(f"{layer}." for layer in layers)
    leaves = (name for name, module in model.named_modules() if not any(True for _ in module.children()))
    return [name for name in leaves if name not in layers and not name.startswith(inside)]


def main() -> None:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--pageable", action="store_true", help="do not pin the weights in RAM")
    options = parse(parser)
    allowed = limit_gpu(options)
    rows = Rows(options, "accelerate", ("accelerate", "transformers", "torch", "safetensors"))
    groups = [[case] for case in cases(options)]
    pinned = not options.extra.pageable
    run(options, rows, lambda: AccelerateOffload(options, pinned=pinned), groups=groups, allowed=allowed)


if __name__ == "__main__":
    main()
