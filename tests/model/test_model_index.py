"""transformers' index of its models, kept: the same as it makes itself, and made anew when a file changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipo_ray.model.model_index import ModelIndex, Structure, files_key

MADE: Structure = {frozenset(): {"llama.b": {"Two", "One"}, "a": {"One"}}, frozenset({"torch", "jax"}): {"c": {"X"}}}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "transformers" / "models"
    (folder / "llama" / "__pycache__").mkdir(parents=True)
    for name in ("__init__.py", "a.py", "llama/b.py"):
        (folder / name).write_text("x")
    return folder


class Maker:
    """transformers' function, which counts how often it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, path: object, prefix: str | None = None) -> Structure:
        self.asked.append(str(path))
        return MADE


def in_process(models: Path, tmp_path: Path) -> tuple[ModelIndex, Maker]:
    """As another process has it."""
    maker = Maker()
    return ModelIndex(maker, models, tmp_path / "cache"), maker


def test_it_is_made_once_and_found_by_others(models: Path, tmp_path: Path) -> None:
    index, maker = in_process(models, tmp_path)
    assert index(models) == index(models / "__init__.py") == MADE
    assert maker.asked == [str(models)]
    other, maker = in_process(models, tmp_path)
    assert other(models) == MADE
    assert [list(part) for part in other(models).values()] == [["llama.b", "a"], ["c"]], "the later one counts"
    assert other(models, prefix="models")[frozenset()].keys() == {"models.llama.b", "models.a"}
    other(models)[frozenset()]["a"].add("changed by who asked")
    assert other(models) == MADE
    assert maker.asked == []


def test_about_another_folder_transformers_is_asked(models: Path, tmp_path: Path) -> None:
    index, maker = in_process(models, tmp_path)
    for path in (models / "llama" / "__init__.py", models / "llama", str(models / "llama" / "b.py")):
        index(path)
        assert maker.asked.pop() == str(path)


@pytest.mark.parametrize("damage", ["", "[", "[[1]]", "5", '[[["torch"], "a", 7]]'])
def test_what_is_damaged_is_made_anew(damage: str, models: Path, tmp_path: Path) -> None:
    in_process(models, tmp_path)[0](models)
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_text()
    file.write_text(damage)
    index, maker = in_process(models, tmp_path)
    assert index(models) == MADE
    assert maker.asked
    assert json.loads(file.read_text()) == json.loads(whole)


def test_where_nothing_can_be_kept_it_is_made_every_time(models: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    for _ in range(2):
        index, maker = in_process(models, tmp_path)
        assert index(models) == MADE
        assert maker.asked


def test_the_key_changes_with_every_file(models: Path) -> None:
    keys = [files_key(models)]
    (models / "llama" / "__pycache__" / "b.pyc").write_text("x")
    assert files_key(models) == keys[0]
    (models / "llama" / "c.py").write_text("x")
    keys.append(files_key(models))
    (models / "llama" / "c.py").rename(models / "llama" / "d.py")
    keys.append(files_key(models))
    (models / "llama" / "b.py").write_text("xx")
    keys.append(files_key(models))
    status = (models / "a.py").stat()
    os.utime(models / "a.py", ns=(status.st_atime_ns, status.st_mtime_ns + 1000))
    keys.append(files_key(models))
    assert len(set(keys)) == len(keys) == 5


PROGRAM = """
import sys
from pathlib import Path
read = []

def watch(event, args):
    if event == "open" and "transformers/models/" in str(args[0]):
        read.append(str(args[0]))

sys.addaudithook(watch)
from pipo_ray.model.lean_transformers import import_transformers
import_transformers(Path(sys.argv[1]))
sources = sum(path.endswith(".py") for path in read)
from transformers.utils import import_utils
from transformers import LlamaConfig, models
assert type(import_utils.define_import_structure).__name__ == "ModelIndex"
assert import_utils.__spec__.loader is import_utils.__loader__
assert import_utils.__loader__.get_source(import_utils.__name__)
assert models.LlamaConfig is LlamaConfig and models.llama.modeling_llama.LlamaModel.__name__ == "LlamaModel"
index = import_utils.define_import_structure
assert sys.argv[2] == "first" or index(index._models, "models") == index._define(index._models, "models")
print(sources)
"""


def test_transformers_reads_its_models_source_once_for_all_processes(tmp_path: Path) -> None:
    read = []
    for which in ("first", "second"):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), which]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        read.append(int(done.stdout))
    assert read[0] > 1000, "transformers does not read them any more: the index is not needed"
    assert read[1] < 100, "only of what is imported, where it is not compiled yet"
