"""`pipo quality`: what is refused before anything starts. What it measures is in `tests/e2e/test_low_bit.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cli.fake_llm import FakeLLM
from pipo_ray.cli.main import main
from pipo_ray.cli.quality import _variants


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--text", "missing.txt"], "--text missing.txt cannot be read: No such file or directory; give a text file"),
        (["--tokens", "0"], "--tokens 0 is below 1"),
        (["--precision", "16bit"], "--precision names nothing to compare with"),
        (["--picture", "nowhere/p.png"], "--picture nowhere/p.png: there is no folder"),
        (["--precision", "int8,auto"], "--precision auto wants one target"),
        (["--max-loss", "1%"], "--max-loss is a target of --precision auto"),
        (["--calibrate", "/nowhere.txt", "--tokens", "9"], "calibration text /nowhere.txt cannot be read"),
        (["--precision", "int8", "--calibrate"], "--calibrate: no precision that is compared has int4 weights"),
        (["--gpu-memory", "1G", "--device", "cpu"], "--gpu-memory means nothing with --device cpu"),
    ],
)
def test_what_is_wrong_is_said_at_once(
    arguments: list[str], says: str, fake_llm: type[FakeLLM], tiny_checkpoint: Callable[..., Path],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("pipo_ray.cli.quality._can_plot", lambda: True)  # matplotlib is an extra
    model = str(tiny_checkpoint("LlamaConfig"))
    capsys.readouterr()
    assert main(["quality", model, *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not fake_llm.made


def test_a_text_that_is_none(fake_llm: type[FakeLLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text"
    file.write_bytes(b"caf\xe9")
    assert main(["quality", ".", "--text", str(file)]) == 2
    assert "is not UTF-8 (byte 3); convert it" in capsys.readouterr().err


def test_a_picture_without_what_draws_it(
    fake_llm: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipo_ray.cli.quality._can_plot", lambda: False)
    assert main(["quality", ".", "--picture", "p.png"]) == 2
    assert "--picture needs matplotlib: pip install matplotlib" in capsys.readouterr().err


def test_a_packed_store_is_no_original(
    fake_llm: type[FakeLLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "manifest.json"):
        (tmp_path / name).write_text("{}")
    assert main(["quality", str(tmp_path)]) == 2
    assert "is not a checkpoint: quality needs the weights as they were" in capsys.readouterr().err


def test_calibrate_adds_a_row_for_each_precision_with_int4() -> None:
    rows = _variants(["int8", "int4-g32", "auto"], {"max_loss": "1%"}, True)
    assert rows == {
        "int8": {"precision": "int8"},
        "int4-g32": {"precision": "int4-g32"},
        "int4-g32 calibrated": {"precision": "int4-g32", "calibrate": True},
        "auto": {"precision": "auto", "max_loss": "1%"},
    }
    assert list(_variants(["int4"], {}, False)) == ["int4"]
