"""Runner of HF Accelerate: what fits `cpu_memory` stays in RAM, the rest is offloaded to disk.

`from_pretrained` with a device map, as its documentation says: the layers on "disk" are read from the checkpoint's own
safetensors files in every forward pass. With `"variant"`

    "mapped"  it is left at that: the layers in RAM are mapped safetensors files, which the kernel drops like any others
    "copied"  the layers in RAM are copied after loading, so that they stay there
    "dat"     as "copied", and the layers on disk are in Accelerate's own format, a file for each tensor in
              `offload_folder`, as `accelerate.disk_offload` writes it
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from hugging_face import greedy
from protocol import Generate, serve
from transformers import AutoConfig, AutoModelForCausalLM


def start(options: dict[str, Any]) -> tuple[Generate, list[str]]:
    """`options`: model, cpu_memory (bytes), variant, offload_folder, threads."""
    torch.set_num_threads(options["threads"])
    placement = {"device_map": "auto", "max_memory": {"cpu": options["cpu_memory"]}}
    if options["variant"] == "dat":
        config = AutoConfig.from_pretrained(options["model"])
        with init_empty_weights():
            empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model = load_checkpoint_and_dispatch(
            empty, options["model"], offload_folder=options["offload_folder"], dtype=torch.bfloat16,
            no_split_module_classes=empty._no_split_modules, **placement,
        )  # fmt: skip
    else:
        model = AutoModelForCausalLM.from_pretrained(
            options["model"], dtype=torch.bfloat16, offload_folder=options["offload_folder"], **placement
        )
    model.eval()
    places = getattr(model, "hf_device_map", {"": "cpu"})  # there is none when everything fits
    in_ram = [parameter for parameter in model.parameters() if parameter.device.type != "meta"]
    if options["variant"] != "mapped":
        for parameter in in_ram:
            parameter.data = parameter.data.clone()
    kept = sum(parameter.nbytes for parameter in in_ram)
    on_disk = [name for name, place in places.items() if place == "disk"]
    return greedy(model), [
        f"{options['variant']}: {kept / 2**30:.2f} GiB in RAM, on disk: {len(on_disk)} of {len(places)} modules"
    ]


if __name__ == "__main__":
    serve(start, ("accelerate", "transformers", "torch", "safetensors"))
