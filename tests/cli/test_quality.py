"""`pipo quality`: what is refused before anything starts. What it measures is in `tests/e2e/test_low_bit.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from cli.conftest import pack_here
from cli.fake_llm import FakeLLM
from pipo_ray import prepare
from pipo_ray.cli.main import main
from pipo_ray.cli.quality import Row, _draw, _variants
from pipo_ray.errors import InputError
from pipo_ray.quant.target import Target
from pipo_ray.report.quality import Quality


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--text", "missing.txt"], "--text missing.txt cannot be read: No such file or directory; give a text file"),
        (["--tokens", "0"], "--tokens 0 is below 64"),
        (
            ["--tokens", "63"],
            "--tokens 63 is below 64, which are needed to tell models apart; give --tokens 64 or more",
        ),
        (["--precision", "16bit"], "--precision names nothing to compare with"),
        (["--picture", "nowhere/p.png"], "--picture nowhere/p.png: there is no folder"),
        (["--picture", "p.txt"], "--picture p.txt: its name must end in .png or .svg"),
        (["--picture", "p"], "--picture p: its name must end in .png or .svg"),
        (["--picture", "/proc/p.png"], "--picture /proc/p.png cannot be written: "),
        (["--precision", "int8,bogus"], "precision 'bogus' is not known; known are 16bit, "),
        (["--precision", "int4-g48"], "groups of 48 columns, supported are 32, 64, 128"),
        (["--precision", "int8,nowhere.json"], "precision policy nowhere.json cannot be read"),
        (["--precision", "int8,auto"], "--precision auto wants one target"),
        (["--max-loss", "1%"], "--max-loss is a target of --precision auto"),
        (["--calibrate", "/nowhere.txt", "--tokens", "64"], "calibration text /nowhere.txt cannot be read"),
        (["--precision", "int8", "--calibrate"], "--calibrate: no precision that is compared has int4 weights"),
        (["--tokens", "64"], "heldout.txt cannot be compared with: the checkpoint "),  # it has no tokenizer
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


@pytest.mark.usefixtures("packed_in_this_process", "nothing_is_packed")
@pytest.mark.parametrize(
    "text, says",
    [
        ("", "has 0 tokens, at least 64 are needed to tell models apart; give a longer one, or leave --text out for"),
        ("a", "has 1 token, at least 64 are needed to tell models apart; give a longer one, or leave --text out for"),
        ("\u732b" * 21, "has 63 tokens, at least 64 are needed"),  # every byte is a token
        ("word " * 12, "has 60 tokens, at least 64 are needed"),
    ],
)
def test_a_text_that_is_too_short_is_refused_before_anything_is_packed(
    text: str, says: str, fake_llm: type[FakeLLM], chat_checkpoint: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    assert main(["quality", str(chat_checkpoint), "--precision", "int8", "--text", str(file)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"pipo: error: --text {file} {says}")
    assert not fake_llm.made


@pytest.mark.usefixtures("packed_in_this_process")
@pytest.mark.parametrize("text", ["\u732b" * 21 + "a", "a " * 64])
def test_a_text_of_the_least_tokens_is_enough(
    text: str, fake_llm: type[FakeLLM], chat_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("pipo_ray.prepare.prepare_store", Mock(side_effect=InputError("packing begins")))
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    assert main(["quality", str(chat_checkpoint), "--precision", "int8", "--text", str(file)]) == 2
    assert "packing begins" in capsys.readouterr().err


OTHER = {"architecture": "LlamaForCausalLM", "layers": 7, "tensors": "abc"}


@pytest.mark.usefixtures("packed_in_this_process", "nothing_is_packed")
@pytest.mark.parametrize(
    "policy, says",
    [
        ({"model": OTHER, "rules": [["*", "int4"]]}, "was made for LlamaForCausalLM with 7 layers (tensors abc), and "),
        ({"rules": [["*q_proj*", "int4-g128"]]}, 'rule ["*q_proj*", "int4-g128"]: model.layers.0.'),
        ({"rules": [["nonsense.*", "int4"]]}, "matches no tensor of the model"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused_before_the_first_store_is_packed(
    policy: dict[str, object], says: str, fake_llm: type[FakeLLM], chat_checkpoint: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Also behind one that fits: the original alone is 140 GB of a model with 70 billion weights."""
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(policy))
    assert main(["quality", str(chat_checkpoint), "--precision", f"int8,{file}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"pipo: error: precision policy {file}")
    assert says in error
    assert not fake_llm.made


@pytest.fixture
def nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipo_ray.prepare.prepare_store", lambda *_, **__: pytest.fail("something is packed"))


def test_what_is_packed_is_not_looked_at_again(
    chat_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack_here(monkeypatch)
    assert prepare.check_before_packing(chat_checkpoint, ["int8"], cache=tmp_path) is None
    prepare.prepare_store(chat_checkpoint, precision="int8", cache=tmp_path)
    monkeypatch.setattr(prepare, "run_job", lambda *_: pytest.fail("a child process was started"))
    assert prepare.check_before_packing(chat_checkpoint, ["int8"], cache=tmp_path) is None


def test_all_is_packed_before_the_original_is_run_and_first_what_may_be_refused(
    fake_llm: type[FakeLLM], chat_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []

    def prepare_store(model: str, **arguments: object) -> None:
        asked.append(arguments)
        if arguments["precision"] == "16bit":
            raise InputError("this one cannot be")

    monkeypatch.setattr(prepare, "prepare_store", prepare_store)
    monkeypatch.setattr(prepare, "run_job", lambda *_: {"num_tokens": None})
    more = ["--precision", "int4,auto,int4-g32", "--max-loss", "1%", "--calibrate", "--memory", "1GiB"]
    assert main(["quality", str(chat_checkpoint), *more]) == 2
    assert "this one cannot be" in capsys.readouterr().err
    assert not fake_llm.made
    assert [(one["precision"], one["calibrate"]) for one in asked] == [
        ("int4", True), ("auto", False), ("int4-g32", True), ("int4", False), ("int4-g32", False), ("16bit", False),
    ]  # fmt: skip
    assert asked[1]["target"] == Target(max_loss=0.01)
    assert {one["memory"] for one in asked} == {1 << 30}


@pytest.mark.parametrize("name", ["p.png", "p.svg"])
def test_labels_of_a_picture_can_be_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of points that lie together, as drawn: none covers another, or leaves the picture."""
    pytest.importorskip("matplotlib")
    from matplotlib import text

    labels = ["int4-g32", "int4-g32 calibrated", "int4-g32-sym", "int4", "int8", "16bit"]
    rows = [Row(one, 5000 + 3 * n, Quality(4.0 + n / 50, 0.1, 50, 100)) for n, one in enumerate(labels)]
    boxes = {}
    monkeypatch.setattr(text.Annotation, "draw", lambda self, renderer: boxes.update(
        {self.get_text(): (text.Text.get_window_extent(self, renderer), self.figure.bbox)}
    ))  # fmt: skip
    _draw(rows, tmp_path / name)
    assert list(boxes) == labels
    for label, (box, figure) in boxes.items():
        assert not [other for other, (there, _) in boxes.items() if other != label and box.overlaps(there)]
        assert figure.x0 <= box.x0 < box.x1 <= figure.x1
        assert figure.y0 <= box.y0 < box.y1 <= figure.y1


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
