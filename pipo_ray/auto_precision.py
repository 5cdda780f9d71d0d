"""`--precision auto` from outside the packing process, and what a planner needs for choices of its own."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from pipo_ray.errors import InputError
from pipo_ray.json_file import write_json
from pipo_ray.model.registry import require_supported
from pipo_ray.packing_process import run_job
from pipo_ray.quant.calibration_text import CalibrationText
from pipo_ray.quant.foreign.detect import source_format
from pipo_ray.quant.knapsack import choose
from pipo_ray.quant.sensitivity import Measured, choice_key
from pipo_ray.quant.target import Chosen, Target
from pipo_ray.store.checkpoint import Checkpoint
from pipo_ray.store.gguf_file import open_checkpoint
from pipo_ray.store.manifest import is_store

__all__ = ["choose", "choose_precision", "measure_precision"]

Progress = Callable[[str, int, int], None]


def choose_precision(
    folder: Path,
    target: Target,
    *,
    cache: Path,
    dtype: str = "auto",
    text: str | os.PathLike[str] | None = None,
    on_progress: Progress | None = None,
    memory: int | None = None,
) -> Chosen:
    """The policy for the checkpoint in `folder` that reaches `target`, measured on the calibration text in the file
    `text`, or on the bundled one; in a child process. The second time it is known: `cache` is where packed models go
    (`cache_folder()`). `on_progress` hears of the phase "sensitivity" in bytes of the checkpoint, which is passed once
    per block. Measuring takes at most `memory` bytes.

    Raises InputError: a target that is impossible, a text that is too short, a store, a checkpoint that is quantized;
    BudgetError for too little memory, before anything is measured; and as `prepare_store`.
    """
    if dtype not in ("auto", "bfloat16"):
        raise InputError(
            f"--dtype {dtype} with --precision auto: a model with low-bit weights is computed in bfloat16; leave "
            "--dtype out"
        )
    calibration = CalibrationText.load(text)
    with _opened(folder) as checkpoint:
        file = _policies(cache) / f"{choice_key(checkpoint, calibration, target)}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return Chosen.from_json(json.loads(file.read_text(encoding="utf-8")))
    job = ["choose", str(folder), str(_policies(cache)), f"--text={calibration.file.absolute()}"]
    if memory is not None:
        job.append(f"--memory={memory}")
    raw = run_job([*job, f"--target={json.dumps(target.to_json())}"], on_progress)["chosen"]
    with contextlib.suppress(OSError):  # without a cache it is measured anew every time
        write_json(file, raw)
    return Chosen.from_json(raw)


def measure_precision(
    folder: Path,
    *,
    cache: Path,
    text: str | os.PathLike[str] | None = None,
    on_progress: Progress | None = None,
    memory: int | None = None,
) -> Measured:
    """What a choice rests on: bytes and loss of every weight of the checkpoint in `folder` in every format.

    With it a planner chooses for itself, `cost` being what its speed model says:

        measured = measure_precision(folder, cache=cache_folder())
        choice = choose(measured.items, max_bytes=budget - measured.fixed_bytes, max_loss=0.01, cost=seconds)
        measured.policy(choice.formats).save(Path("policy.json"))

    What is measured is shared with `choose_precision`. Arguments and errors as there.
    """
    calibration = CalibrationText.load(text)
    with _opened(folder):
        pass
    job = ["measure", str(folder), str(_policies(cache)), f"--text={calibration.file.absolute()}"]
    if memory is not None:
        job.append(f"--memory={memory}")
    return Measured.from_json(run_job(job, on_progress)["measured"])


def _policies(cache: Path) -> Path:
    return cache / "policies"


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[Checkpoint]:
    """What is wrong with it is known at once, and torch takes seconds to import."""
    if is_store(folder):
        raise InputError(
            f"--precision auto: {folder} is packed already, and what its weights were is not known; give the checkpoint"
        )
    with open_checkpoint(folder) as checkpoint:
        require_supported(checkpoint.config, folder / "config.json")
        if (source := source_format(checkpoint.config, folder)) is not None:
            raise InputError(
                f"--precision auto: {folder} is quantized already ({source.label}) and would be rounded a second time; "
                "leave --precision out, or give the checkpoint that it was made from"
            )
        yield checkpoint
