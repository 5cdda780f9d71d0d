"""The peers' virtual environments: one each, pinned, made with pip in a cache folder and used again."""

from __future__ import annotations

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


# torch first and alone: whatever asks for "torch" afterwards finds it there, and pip fetches no other build.
_TORCH = ("torch==2.13.0",)
_TRANSFORMERS = ("transformers==5.23.0", "accelerate==1.15.0", "safetensors==0.8.0", "numpy==2.4.6")

ENVIRONMENTS = {
    "accelerate": Environment((_TORCH, _TRANSFORMERS)),
    "airllm": Environment((_TORCH, (*_TRANSFORMERS, "airllm==4.0.0"))),
    # Compiled here, for the instructions that this processor has; vision models and examples are left out.
    "llama.cpp": Environment(
        (("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy==2.4.6"),),
        {
            "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DCMAKE_BUILD_TYPE=Release",
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
}


def interpreter(peer: str, folder: Path) -> Path:
    """The interpreter of `peer`'s environment under `folder`, installed now if it is missing or its pins have changed.

    Compiling llama.cpp takes minutes. Raises RuntimeError with pip's last lines when something does not install.
    """
    environment = ENVIRONMENTS[peer]
    place = folder / f"environment-{peer}"
    python = place / "bin" / "python"
    pins = json.dumps([environment.steps, environment.build, sys.version_info[:2]])
    mark = place / f"installed-{hashlib.sha256(pins.encode()).hexdigest()[:12]}"
    if mark.exists():
        return python
    print(f"{peer}: installing {' '.join(' '.join(step) for step in environment.steps)} into {place}", flush=True)
    commands = [[sys.executable, "-m", "venv", "--clear", str(place)]]
    commands += [[str(python), "-m", "pip", "install", "--quiet", *step] for step in environment.steps]
    for command in commands:
        done = subprocess.run(command, env=os.environ | environment.build, text=True, capture_output=True, check=False)
        if done.returncode:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            raise RuntimeError(f"does not install: {' | '.join(lines[-3:])[:500]}")
    mark.touch()
    return python
