"""Packing with a calibration text: more accurate than rounding to nearest, resumable, and told from other stores."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import pipo_ray.quant.calibrated as module
import pipo_ray.store.pack as pack_module
from pipo_ray.errors import BudgetError, InputError
from pipo_ray.model.blocks import TensorSpec
from pipo_ray.model.graph import load_config
from pipo_ray.model.inspect import find_facts
from pipo_ray.model.tokenizer import load_tokenizer
from pipo_ray.packing import pack_checkpoint
from pipo_ray.prepare import pack_store, prepare_store
from pipo_ray.quant.calibrated import CalibratedSource
from pipo_ray.quant.calibration import CalibrationModel
from pipo_ray.quant.calibration_text import BUNDLED_TEXT, CALIBRATION_KEY, CalibrationText
from pipo_ray.quant.codec import read_rows, views_of
from pipo_ray.quant.policy import Precision
from pipo_ray.quant.rounding import round_to_nearest, values_of
from pipo_ray.quant.source import QuantizedSource
from pipo_ray.quant.summary import describe_precision
from pipo_ray.store.checkpoint import Checkpoint
from pipo_ray.store.layout import plan_files
from pipo_ray.store.manifest import Manifest

BUNDLED = BUNDLED_TEXT.parent
INT4 = Precision.parse("int4-g32")
TEXT = "The quick brown fox jumps over the lazy dog, and the database server closes the connection. "


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny models are fastest on one, and the machine may be shared."""
    for where in ("calibration.usable_threads", "calibrated.num_threads"):
        monkeypatch.setattr(f"pipo_ray.quant.{where}", lambda: 1)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def calibration_model(folder: Path) -> Iterator[CalibrationModel]:
    config = load_config(folder)
    _, _, facts = find_facts(config, torch.bfloat16, folder)
    with Checkpoint.open(folder) as checkpoint, CalibrationModel(checkpoint, config, facts) as model:
        yield model


def perplexity(model: CalibrationModel, windows: Sequence[Sequence[int]], change: Any = None) -> float:
    loss, count = 0.0, 0
    for window, logits in zip(windows, model.logits(windows, change), strict=True):
        logs = torch.log_softmax(logits[:-1], -1)
        loss -= float(logs.gather(1, torch.tensor(window[1:])[:, None]).sum())
        count += len(window) - 1
    return math.exp(loss / count)


def stored_values(store: Path, manifest: Manifest, name: str, expert: int | None = None) -> torch.Tensor:
    """A low-bit weight as it lies in the store."""
    block, tensor = manifest.find(name, expert)
    assert tensor.panels is not None
    with safe_open(store / block.file, "pt") as file:
        panels = file.get_tensor(tensor.key)
    parts = [values_of(read_rows(views_of(p, tensor.panels), tensor.panels), tensor.panels.low_bit) for p in panels]
    return torch.cat(parts)[: tensor.panels.rows]


@pytest.mark.parametrize(
    "precision, tokens, most",
    [
        ("int4-g32", 4096, 0.7),
        pytest.param("int4-g32", 32768, 0.6, marks=pytest.mark.slow),
        pytest.param("int4", 32768, 0.6, marks=pytest.mark.slow),
    ],
)
def test_the_bundled_model_loses_less(
    precision: str, tokens: int, most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = CalibrationText.load()
    calibration = text.windows(load_tokenizer(BUNDLED), 512, tokens)
    monkeypatch.setattr(CalibrationText, "windows", lambda *_: calibration)
    policy = Precision.parse(precision)
    manifest = pack_checkpoint(BUNDLED, tmp_path / "store", quantization=policy, calibration=text)
    assert manifest.extra[CALIBRATION_KEY]["nearest"] == 0
    assert any("calibrated: 57 int4 matrices" in line for line in describe_precision(manifest))
    heldout = CalibrationText.load(BUNDLED / "heldout.txt").text
    ids = load_tokenizer(BUNDLED)(heldout, add_special_tokens=False)["input_ids"][:tokens]  # type: ignore[misc]
    windows = [[0, *ids[at : at + 511]] for at in range(0, len(ids), 511)]

    def calibrated(spec: TensorSpec, weight: torch.Tensor) -> torch.Tensor:
        return stored_values(tmp_path / "store", manifest, spec.name)

    def nearest(spec: TensorSpec, weight: torch.Tensor) -> torch.Tensor:
        low_bit = manifest.find(spec.name)[1].panels.low_bit  # type: ignore[union-attr]
        return values_of(round_to_nearest(weight.float(), low_bit), low_bit)

    with calibration_model(BUNDLED) as model:
        original, ours, theirs = (perplexity(model, windows, change) for change in (None, calibrated, nearest))
    assert original < ours < theirs
    assert ours - original < most * (theirs - original)


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Path:
    """A tiny one with a tokenizer."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("LlamaConfig", dtype="bfloat16", vocab_size=4096, num_hidden_layers=2), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> CalibrationText:
    (tmp_path / "text.txt").write_text(TEXT * 60)
    return CalibrationText.load(tmp_path / "text.txt")


class StoppedError(Exception):
    """Packing is interrupted."""


@pytest.mark.parametrize("same", [pytest.param(True, marks=pytest.mark.slow), False])
def test_it_goes_on_with_the_same_weights_or_begins_anew(
    same: bool, checkpoint: Path, text: CalibrationText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_module, "plan_files", lambda blocks, _: plan_files(blocks, 200_000))

    def pack(destination: str, **options: Any) -> Manifest:
        return pack_checkpoint(checkpoint, tmp_path / destination, quantization=INT4, calibration=text, **options)

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "pack" and done > 0.9 * total:
            raise StoppedError

    with pytest.raises(StoppedError):
        pack("resumed", progress=stop)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "resumed.partial").glob("*.safetensors")}
    assert finished
    if not same:  # another processor, another number of threads
        monkeypatch.setattr(module, "_values", lambda weight, *_: 1.01 * weight)
    whole, resumed = pack("whole"), pack("resumed")
    kept = [(tmp_path / "resumed" / path.name).stat().st_mtime_ns == when for path, when in finished.items()]
    assert kept == [same] * len(finished)
    assert resumed == whole
    for name in whole.files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()
    assert not list(tmp_path.glob("*.partial"))
    monkeypatch.setattr(CalibrationModel, "run", None)  # a store that is there is not calibrated again
    assert pack("whole").fingerprint == whole.fingerprint


def test_stores_are_told_apart_by_text(checkpoint: Path, text: CalibrationText, tmp_path: Path) -> None:
    plain = pack_checkpoint(checkpoint, tmp_path / "plain", quantization=INT4)
    for file, said in ((text.file, "was not calibrated on"), (True, "was not calibrated on")):
        with pytest.raises(InputError, match=said):
            prepare_store(tmp_path / "plain", calibrate=file)
    options: dict[str, Any] = {"precision": "int4-g32", "calibrate": text.file, "cache": tmp_path / "cache"}
    phases: set[str] = set()
    first = prepare_store(checkpoint, on_progress=lambda phase, *_: phases.add(phase), **options)
    assert first.packed_now
    assert {"calibrate", "pack"} <= phases
    assert "int4-g32-gptq" in first.folder.name
    assert not prepare_store(checkpoint, **options).packed_now
    assert prepare_store(first.folder, calibrate=text.file).folder == first.folder
    assert first.manifest.fingerprint != plain.fingerprint
    text.file.write_text(TEXT * 61)
    with pytest.raises(InputError, match="was not calibrated on"):
        prepare_store(first.folder, calibrate=text.file)


def test_what_is_refused(checkpoint: Path, text: CalibrationText, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--precision int8: a text helps int4 weights only"):
        pack_store(checkpoint, tmp_path / "store", precision="int8", calibrate=text.file)
    with pytest.raises(InputError, match="--precision 16bit"):
        prepare_store(checkpoint, calibrate=True)
    with pytest.raises(BudgetError, match=r"\d+ tokens of calibration text needs .* raise --memory to") as refused:
        pack_checkpoint(checkpoint, tmp_path / "store", quantization=INT4, calibration=text, memory=100 << 20)
    assert "PIPO_CACHE" not in str(refused.value)
    text.file.write_text("too short")
    with pytest.raises(InputError, match="has 3 tokens, at least 1024"):
        pack_checkpoint(checkpoint, tmp_path / "store", quantization=INT4, calibration=CalibrationText.load(text.file))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "text.txt"}


def test_experts_with_few_tokens_are_rounded_to_nearest(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> None:
    from pipo_ray.model.layout import block_layout
    from pipo_ray.quant.assign import assign
    from pipo_ray.store.source import TensorSource

    folder = tiny_checkpoint("Qwen3MoeConfig", dtype="bfloat16", num_hidden_layers=1, num_experts=8)
    config = load_config(folder)
    graph, trace, facts = find_facts(config, torch.bfloat16, folder)
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, 256, (4, 62), generator=generator).tolist()
    routed: dict[tuple[str, int | None], int] = {}
    with Checkpoint.open(folder) as opened, CalibrationModel(opened, config, facts) as model:
        model.run(windows, lambda spec, parts, _: routed.update({(spec.name, spec.expert): sum(map(len, parts))}))
        tensors = TensorSource(graph, opened, torch.bfloat16)
        blocks = block_layout(graph, trace, tensors.aliases)
        blocks = assign(blocks, INT4, looked_up=("model.embed_tokens.weight",), layout="avx512", linear_experts=True)
        specs = [tensor for block in blocks for tensor in block.tensors if tensor.panels is not None]
        with QuantizedSource(tensors, 1) as nearest, CalibratedSource(nearest, blocks, tmp_path) as source:
            source.calibrate(model, windows)
            changed = {
                (spec.name, spec.expert)
                for spec in specs
                if not torch.equal(
                    source.read(spec, 0, spec.panels.num_panels),  # type: ignore[union-attr]
                    nearest.read(spec, 0, spec.panels.num_panels),  # type: ignore[union-attr]
                )
            }
    enough = {key for key, tokens in routed.items() if tokens >= module.LEAST_INPUTS} & {
        (spec.name, spec.expert) for spec in specs
    }
    assert changed == enough
    few = len(specs) - len(enough)
    assert 0 < few < 16
    assert (source.num_calibrated, source.num_nearest) == (len(enough), few)
    assert not list(tmp_path.iterdir())
