"""A policy's way through `pipo pack`: written, edited, given again, with the bundled model really packed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from pipo_ray import prepare
from pipo_ray.cli import main
from pipo_ray.quant.policy import PolicyModel, Precision, Rule
from pipo_ray.store.checkpoint import Checkpoint
from pipo_ray.store.manifest import Manifest

MODEL = Path(prepare.__file__).parent / "bundled"
LAYERS, LINEAR = 8, 7
Capture = pytest.CaptureFixture[str]

pytestmark = pytest.mark.usefixtures("packed_in_this_process")


def pack(store: Path, precision: str | Path, *more: str) -> int:
    return main(["pack", str(MODEL), str(store), "--precision", str(precision), *more])


def formats(store: Path) -> Counter[str]:
    tensors = [tensor for block in Manifest.load(store).blocks for tensor in block.tensors]
    return Counter(tensor.panels.format for tensor in tensors if tensor.panels is not None)


def test_a_policy_is_saved_edited_and_given_again(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "policy.json"
    with Checkpoint.open(MODEL) as checkpoint:
        Precision((Rule("*.mlp.*", "int8"), Rule("*", "int4-g64")), PolicyModel.of(checkpoint)).save(file)
    assert pack(tmp_path / "first", file, "--save-policy", str(tmp_path / "saved.json")) == 0
    assert formats(tmp_path / "first") == {"int8": 3 * LAYERS, "int4-g64": 4 * LAYERS + 1}

    saved = (tmp_path / "saved.json").read_text()
    assert saved == file.read_text()
    edited = saved.replace('["*.mlp.*", "int8"]', '["lm_head.*", "16bit"],\n  ["*.layers.[0-2].*", "int4-g32"]')
    (tmp_path / "saved.json").write_text(edited)
    assert pack(tmp_path / "second", tmp_path / "saved.json", "--save-policy", str(tmp_path / "again.json")) == 0
    assert formats(tmp_path / "second") == {"int4-g32": 3 * LINEAR, "int4-g64": 5 * LINEAR}
    assert (tmp_path / "again.json").read_text() == edited
    assert "pipo: error" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "rules, said",
    [
        ([["self_atn.*", "16bit"], ["*", "int4"]], "matches no tensor of the model; close to it are *.self_attn.*;"),
        ([["model.layer.1.*", "int8"], ["*", "int4"]], "close to it are model.layers.1.*, "),
        ([["lm_heads.*", "int4"]], "close to it are lm_head.*, "),
        ([["*", "int4"], ["lm_head.*", "int8"]], 'holds for nothing, because rule ["*", "int4"] before it'),
        ([["*.down_proj.*", "int4-g128"], ["*", "int4"]], "it has 448; write int4-g64 or int4-g32 or int8 in this"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_policy_is_refused_by_file_and_rule(
    rules: list[list[str]], said: str, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"rules": rules}))
    assert pack(tmp_path / "store", file) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"pipo: error: precision policy {file}: rule ")
    assert any(f'["{pattern}", "{format}"]' in error for pattern, format in rules)
    assert said in error
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]
