"""The peers' virtual environments: one each, pinned, made with pip in a cache folder and used again.

`small_pc.py` asks for those that it needs. By hand, for the scripts of `gpu_peers/`, this installs one and prints its
interpreter; which build of torch that version is, for CUDA or not, is the package index's matter (PIP_INDEX_URL):

    python benchmarks/peers/environments.py accelerate|deepspeed|ollm FOLDER [--torch 2.11.0]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Environment:
    """What one peer runs in. `steps` are pip's arguments, one installation after the other."""

    steps: tuple[tuple[str, ...], ...]
    build: dict[str, str] = field(default_factory=dict)
    """Environment variables for pip, for what is compiled."""


TORCH = "2.13.0"


def _without_amx() -> str:
    """For CMake, where the processor has a matrix unit: llama.cpp (in llama-cpp-python 0.3.36) ends with SIGILL when it
    repacks weights for one (Xeon, Sapphire Rapids); without the unit it repacks for AVX-512.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists() or "amx_int8" not in cpuinfo.read_text():
        return ""
    flags = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    return f' "-DCMAKE_C_FLAGS={flags}" "-DCMAKE_CXX_FLAGS={flags}"'


# torch first and alone: whatever asks for "torch" afterwards finds it there, and pip fetches no other build.
_TORCH = (f"torch=={TORCH}",)
_TRANSFORMERS = ("transformers==5.23.0", "accelerate==1.15.0", "safetensors==0.8.0", "numpy==2.4.6")

ENVIRONMENTS = {
    "accelerate": Environment((_TORCH, _TRANSFORMERS)),
    "airllm": Environment((_TORCH, (*_TRANSFORMERS, "airllm==4.0.0"))),
    # Compiled here, for the instructions that this processor has; vision models and examples are left out.
    "llama.cpp": Environment(
        (("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy==2.4.6"),),
        {
            "CMAKE_ARGS": f"-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DCMAKE_BUILD_TYPE=Release{_without_amx()}",
            "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1),
        },
    ),
    # Without its own requirements, of which the torch is newer than the library's; these are what it imports.
    "gptqmodel": Environment(
        (
            _TORCH,
            (
                *_TRANSFORMERS,
                "datasets==5.2.0",
                "defuser==0.0.28",
                "device-smi==0.5.7",
                "dill==0.4.1",
                "jinja2==3.1.6",
                "logbar==0.4.15",
                "ninja==1.13.2",
                "packaging==26.3",
                "pillow==13.0.0",
                "protobuf==7.36.2",
                "pyarrow==26.0.1",
                "pypcre==0.6.4",
                "requests==2.34.2",
                "threadpoolctl==3.8.0",
                "tokenicer==0.0.14",
                "torchao==0.18.0",
            ),
            ("--no-deps", "gptqmodel==7.7.0"),
        )
    ),
    # A source distribution, built with the torch that is there; its operators are compiled when they are first used.
    "deepspeed": Environment(
        (
            _TORCH,
            (
                *_TRANSFORMERS,
                "einops==0.8.2",
                "hjson==3.1.0",
                "msgpack==1.2.4",
                "ninja==1.13.2",
                "packaging==26.3",
                "psutil==7.2.2",
                "py-cpuinfo==9.0.0",
                "pydantic==2.14.4",
                "tqdm==4.70.1",
                "wheel==0.47.0",
            ),
            ("--no-deps", "--no-build-isolation", "deepspeed==0.19.8"),
        ),
        {"DS_BUILD_OPS": "0"},
    ),
    # Without its own requirements: flash-attn, which it can do without, is compiled for hours. Its Llama needs an older
    # transformers: with 5.17 it ends in "create_causal_mask() got an unexpected keyword argument 'input_embeds'".
    "ollm": Environment(
        (
            _TORCH,
            ("transformers==4.57.6", "accelerate==1.15.0", "safetensors==0.8.0", "numpy==2.4.6"),
            ("--no-deps", "ollm==1.0.3"),
        )
    ),
}


def interpreter(peer: str, folder: Path, torch: str = TORCH) -> Path:
    """The interpreter of `peer`'s environment under `folder`, installed now if it is missing or its pins have changed.

    `torch` is another version of torch. Compiling llama.cpp takes minutes. Raises RuntimeError with pip's last lines
    when something does not install.
    """
    environment = ENVIRONMENTS[peer]
    steps = [(f"torch=={torch}",) if step == _TORCH else step for step in environment.steps]
    place = folder / f"environment-{peer}"
    python = place / "bin" / "python"
    pins = json.dumps([steps, environment.build, sys.version_info[:2]])
    mark = place / f"installed-{hashlib.sha256(pins.encode()).hexdigest()[:12]}"
    if mark.exists():
        return python
    print(f"{peer}: installing {' '.join(' '.join(step) for step in steps)} into {place}", flush=True)
    commands = [[sys.executable, "-m", "venv", "--clear", str(place)]]
    # pip would take what it compiled before, for other instructions.
    fresh = ["--no-cache-dir"] if environment.build else []
    commands += [[str(python), "-m", "pip", "install", "--quiet", *fresh, *step] for step in steps]
    for command in commands:
        done = subprocess.run(command, env=os.environ | environment.build, text=True, capture_output=True, check=False)
        if done.returncode:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            raise RuntimeError(f"does not install: {' | '.join(lines[-3:])[:500]}")
    mark.touch()
    return python


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=sorted(ENVIRONMENTS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--torch", default=TORCH, help="its version (default: %(default)s)")
    options = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        python = interpreter(options.peer, options.folder.resolve(), options.torch)
    print(python)


if __name__ == "__main__":
    main()
