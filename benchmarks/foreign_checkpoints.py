"""Checkpoints that GPTQModel quantizes and writes (GPTQ and AWQ), against what becomes of them here.

How to run (no GPU; the first run makes GPTQModel an environment of its own in the folder, 1.5 GB and two minutes, for
which PCRE2's headers must be there, Debian's libpcre2-dev; then ten seconds a checkpoint, two with --quick, and those
that are in the folder already are taken from there):

    python benchmarks/foreign_checkpoints.py [--cases PATTERN,...] [--quick] [--folder DIR] [--json FILE] [--save FILE]

A small random Llama, quantized by GPTQModel on the CPU in every case and saved by its writer: 4 bits in groups of 32,
64 and 128, symmetric and not, act-order (`desc_act`) or not, zero points as of version 1 (`gptq`, stored less one) and
of version 2 (`gptq_v2`); 8, 3 and 2 bits; AWQ. Some rows have one sign, so that zero points reach from the least code
to the greatest. GPTQModel then loads its checkpoint with its plain torch kernel. Compared are, in every matrix of it:

    values    as the kernel multiplies with them, float16: ours, rounded to float16, are the same bits
    codes     of the packed store, with GPTQModel's unpacking: the same, and scales and zeros are its scales s and
              (8 - zero point) s rounded to bf16; what is dequantized is (code - zero point) s, rounded once
    logits    of a prompt, through actors in bf16 (2 and 3 bits: float16), with its forward pass in float16: the root
              mean square of the differences is within 3 % of theirs; not with --quick

Exit status 1 if anything differs. `--save` writes one matrix of each of a few cases, as it is in the checkpoint, and
its values, for the tests (`tests/quant/foreign/gptqmodel.safetensors`).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peers.environments import interpreter
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pipo_ray import LLM
from pipo_ray.packing import pack_checkpoint
from pipo_ray.quant.codec import read_rows, views_of
from pipo_ray.quant.foreign.checkpoint import open_foreign
from pipo_ray.quant.foreign.detect import SOURCE_KEY
from pipo_ray.quant.rounding import Rounded
from pipo_ray.store.checkpoint import Checkpoint
from pipo_ray.store.manifest import Manifest

RUNNER = Path(__file__).resolve().parent / "peers" / "write_gptqmodel.py"
LOGITS_BOUND = 0.03
SAVED_MATRIX = "model.layers.1.self_attn.k_proj"
SAVED_CASES = (
    "gptq-int4-g32", "gptq-int4-g128-v2", "gptq-int4-g64-sym", "gptq-int4-g32-act", "gptq-int4-g64-sym-act-v2",
    "gptq-int8-g32", "gptq-int8-row-sym", "gptq-int8-g32-act-v2", "gptq-int3-g32", "gptq-int2-g32",
    "awq-int4-g32", "awq-int4-g128-sym",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Of one case: matrices by what became of them, numbers compared, and how many of them differ."""

    repacked: int
    dequantized: int
    weights: int
    least_points: int
    other_values: int
    other_stored: int
    logits_error: float | None

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        near = self.logits_error is None or self.logits_error <= LOGITS_BOUND
        return self.weights > 0 and not (self.other_values or self.other_stored) and near


def all_cases() -> dict[str, dict[str, Any]]:
    """What makes GPTQModel's QuantizeConfig, by name."""
    grids: list[tuple[int, int]] = [(4, 32), (4, 64), (4, 128), (8, -1), (8, 32), (3, 32), (2, 32)]
    cases: dict[str, dict[str, Any]] = {}
    for (bits, group), symmetric, ordered, layout in product(grids, (False, True), (False, True), ("gptq", "gptq_v2")):
        if bits < 4 and symmetric:
            continue
        cases[_name("gptq", bits, group, symmetric, ordered, layout)] = {
            "method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": ordered,
            "act_group_aware": not ordered and group > 0, "format": layout,
        }  # fmt: skip
    for group, symmetric in product((32, 64, 128), (False, True)):
        settings = {"method": "awq", "bits": 4, "group_size": group, "sym": symmetric, "format": "gemm"}
        cases[_name("awq", 4, group, symmetric, False, "gemm")] = settings
    return cases


def _name(method: str, bits: int, group: int, symmetric: bool, ordered: bool, layout: str) -> str:
    parts = [method, f"int{bits}", "row" if group == -1 else f"g{group}"]
    parts += ["sym"] * symmetric + ["act"] * ordered + ["v2"] * (layout == "gptq_v2")
    return "-".join(parts)


def compare(checkpoint: Path, truth: dict[str, torch.Tensor], logits: bool) -> Row:
    """Read and pack `checkpoint`, and count what is not as `truth` says (`write_gptqmodel.py`); with `logits` also
    compute some.
    """
    modules = [name.removesuffix(".codes") for name in truth if name.endswith(".codes")]
    with tempfile.TemporaryDirectory(prefix="foreign-") as scratch:
        store = Path(scratch) / "store"
        manifest = pack_checkpoint(checkpoint, store)
        source = manifest.extra[SOURCE_KEY]
        stored = _stored(store, manifest)
        error = _logits_error(store, truth) if logits else None
    foreign = open_foreign(Checkpoint.open(checkpoint))
    assert foreign is not None
    assert {f"{module}.weight" for module in modules} == set(foreign.weights)
    other_values = other_stored = 0
    for module in modules:
        codes, points, scales, group_of, values = (
            truth[f"{module}.{part}"] for part in ("codes", "points", "scales", "group_of", "values")
        )
        ours = foreign.weights[f"{module}.weight"].rows(0, len(codes)).values()
        other_values += int((ours.half().view(torch.int16) != values.view(torch.int16)).sum())
        kept = stored[f"{module}.weight"]
        if isinstance(kept, Rounded):
            other_stored += _other_panels(kept, codes, points, scales)
        else:
            order = group_of.long()
            exact = (codes.float() - points.float()[:, order]) * scales.float()[:, order]
            other_stored += int((kept != exact.to(kept.dtype)).sum())
    points = torch.cat([truth[f"{module}.points"].flatten() for module in modules])
    weights = sum(truth[f"{module}.codes"].numel() for module in modules)
    return Row(
        source["repacked"], source["dequantized"], weights, int((points == 0).sum()), other_values, other_stored, error
    )


def _logits_error(store: Path, truth: dict[str, torch.Tensor]) -> float:
    with LLM(store, memory="3GiB", ray_address="local") as llm:
        (ours,) = llm.score([{"prompt_token_ids": truth["tokens"].tolist()}])
    theirs = truth["logits"]
    return float((torch.from_numpy(ours) - theirs).square().mean().sqrt() / theirs.square().mean().sqrt())


def _other_panels(kept: Rounded, codes: torch.Tensor, points: torch.Tensor, scales: torch.Tensor) -> int:
    """How many codes, scales and zeros of panels are not those of the checkpoint."""
    if kept.codes.dtype == torch.int8:
        return int(
            (kept.codes.short() + 128 != codes).sum() + (kept.scales.flatten() != scales.bfloat16().flatten()).sum()
        )
    repeats = kept.scales.shape[1] // scales.shape[1]
    zeros = ((8 - points.float()) * scales.float()).bfloat16().repeat_interleave(repeats, 1)
    ours = scales.bfloat16().repeat_interleave(repeats, 1)
    return int((kept.codes != codes).sum() + (kept.scales != ours).sum() + (kept.zeros != zeros).sum())


def _stored(folder: Path, manifest: Manifest) -> dict[str, torch.Tensor | Rounded]:
    """A store's tensors; of panels codes, scales and zeros."""
    result: dict[str, torch.Tensor | Rounded] = {}
    for block in manifest.blocks:
        with safe_open(folder / block.file, "pt") as file:
            for tensor in block.tensors:
                data = file.get_tensor(tensor.key)
                if (panels := tensor.panels) is None:
                    result[tensor.name] = data
                else:
                    parts = [read_rows(views_of(panel, panels), panels) for panel in data]
                    result[tensor.name] = Rounded(
                        *(torch.cat(part)[: panels.rows] for part in zip(*parts, strict=True))
                    )
    return result


def save(folder: Path, versions: dict[str, str], file: Path) -> None:
    """One matrix of each of SAVED_CASES, as it is in the checkpoint, and its values; settings in the metadata."""
    tensors: dict[str, torch.Tensor] = {}
    settings: dict[str, Any] = {}
    for name in SAVED_CASES:
        settings[name] = json.loads((folder / name / "config.json").read_text())["quantization_config"]
        parts = load_file(folder / name / "model.safetensors")
        tensors |= {
            key.replace(SAVED_MATRIX, name): part for key, part in parts.items() if key.startswith(f"{SAVED_MATRIX}.")
        }
        tensors[f"{name}.values"] = load_file(folder / f"{name}.safetensors")[f"{SAVED_MATRIX}.values"]
    save_file(tensors, file, metadata={"settings": json.dumps(settings), "versions": json.dumps(versions)})


def main() -> int:
    """Write the checkpoints, compare, print a table. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="*", metavar="PATTERN,...", help="only cases whose name matches one of them")
    parser.add_argument("--quick", action="store_true", help="no logits: two minutes instead of ten")
    parser.add_argument("--folder", type=Path, help="for the environment and the checkpoints, kept and used again")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--save", type=Path, metavar="FILE", help="what the tests compare with")
    options = parser.parse_args()
    wanted = options.cases.split(",")
    cases = {name: case for name, case in all_cases().items() if any(fnmatch.fnmatch(name, one) for one in wanted)}
    if not cases:
        parser.error(f"no case matches {options.cases!r}; there are {', '.join(all_cases())}")
    if options.save and not set(SAVED_CASES) <= set(cases):
        parser.error(f"--save takes matrices of {', '.join(SAVED_CASES)}: --cases must let them through")
    folder = options.folder.resolve() if options.folder else Path(tempfile.mkdtemp(prefix="foreign-checkpoints-"))
    try:
        return run(folder, cases, options)
    finally:
        if options.folder is None:
            shutil.rmtree(folder)


def run(folder: Path, cases: dict[str, dict[str, Any]], options: argparse.Namespace) -> int:
    """As `main`."""
    folder.mkdir(parents=True, exist_ok=True)
    python = interpreter("gptqmodel", folder)
    log = folder / "gptqmodel.log"
    request = json.dumps({"folder": str(folder), "cases": cases})
    print(f"GPTQModel quantizes {len(cases)} times, see {log}", flush=True)
    # It keeps what it compiles under the home folder, and writes logs where it is.
    environment = os.environ | {"HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    with open(log, "w") as output:
        command = [str(python), str(RUNNER), request]
        done = subprocess.run(command, stdout=output, stderr=output, env=environment, cwd=folder, check=False)
    if done.returncode:
        print(f"GPTQModel ended with status {done.returncode}: see {log}", file=sys.stderr)
        return 1
    with safe_open(folder / f"{next(iter(cases))}.safetensors", "pt") as file:
        versions = json.loads(file.metadata()["versions"])
    print(
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"; here torch {torch.__version__}",
        sep="",
    )
    print(f"{'case':28}repacked  dequantized  weights  points of 0  other values  other stored  logits off")
    rows = {}
    for name in cases:
        rows[name] = row = compare(folder / name, load_file(folder / f"{name}.safetensors"), not options.quick)
        logits = "not asked" if row.logits_error is None else f"{row.logits_error:.2%}"
        print(
            f"{name:28}{row.repacked:8}  {row.dequantized:11}  {row.weights:7}  {row.least_points:11}  "
            f"{row.other_values:12}  {row.other_stored:12}  {logits:>10}{'' if row.same else '  DIFFERS'}",
            flush=True,
        )
    different = [name for name, row in rows.items() if not row.same]
    print(f"{len(rows)} checkpoints, {len(different)} differ" + (f": {', '.join(different)}" if different else ""))
    if options.save:
        save(folder, versions, options.save)
    if options.json:
        table = {name: asdict(row) for name, row in rows.items()}
        options.json.write_text(json.dumps({"versions": versions, "rows": table}, indent=1))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
