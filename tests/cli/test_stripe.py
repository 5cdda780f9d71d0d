"""`pipo pack --stripe`: what a user sees of a store on several drives, and of one that is not whole."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipo_ray.cli import main
from pipo_ray.store.manifest import Manifest

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("Qwen2Config")


def error_of(arguments: list[str | Path], capsys: Capture) -> str:
    """The one line of a command that fails because of what it was given."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("pipo: error: ")
    return line.removeprefix("pipo: error: ")


@pytest.mark.usefixtures("packed_in_this_process")
def test_pack_verify_and_what_is_missing(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    store, stripe = tmp_path / "store", tmp_path / "second" / "stripe"
    assert main(["pack", str(checkpoint), str(store), "--stripe", str(stripe)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[-3].startswith(f"  {store}: ")
    assert lines[-2].startswith(f"  {stripe}: ")
    assert lines[-1] == f"{store} and {stripe} are on the same drive: it is not read faster for being asked twice"
    assert main(["verify", str(store)]) == 0
    assert "all checksums match" in capsys.readouterr().err

    manifest = Manifest.load(store)
    block = next(block for block in manifest.blocks if block.folder)
    with open(stripe / block.file, "r+b") as file:
        file.seek(block.offset)
        byte = file.read(1)[0]
        file.seek(block.offset)
        file.write(bytes([byte ^ 1]))
    assert f"block {block.name!r} in {block.file}: checksum" in error_of(["verify", store], capsys)

    for command in (["verify", store], ["run", store, "--prompt-ids", "1,2"]):
        os.rename(stripe, tmp_path / "away")
        assert f"its stripe {stripe} is missing; mount its drive there" in error_of(command, capsys)
        os.rename(tmp_path / "away", stripe)
    for command in (["verify", stripe], ["run", stripe, "--prompt-ids", "1,2"], ["pack", stripe, tmp_path / "other"]):
        line = error_of(command, capsys)
        assert line == f"{stripe} is a stripe of the block store {store}; give that folder instead"
    line = error_of(["pack", checkpoint, tmp_path / "other", "--stripe", stripe], capsys)
    assert line.startswith(f"--stripe {stripe} is a stripe of the block store {store}; choose another folder")
    assert not list(tmp_path.glob("other*"))


@pytest.mark.parametrize("stripe", ["store", "store/inside", "."])
def test_folders_that_are_not_apart(
    stripe: str, checkpoint: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known before a process is started."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a child process was started"))
    line = error_of(["pack", checkpoint, tmp_path / "store", "--stripe", tmp_path / stripe], capsys)
    assert line.endswith("the folders of a store must be apart: choose a folder on another drive")
    assert not list(tmp_path.iterdir())
