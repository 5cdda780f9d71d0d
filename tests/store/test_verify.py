"""Every byte of every block is checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store.store_helpers import pack_folder, save_random

from pipo_ray.errors import StoreError
from pipo_ray.store.manifest import Manifest
from pipo_ray.store.verify import find_problems, verify


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    save_random(folder / "checkpoint", "qwen3_moe")
    pack_folder(folder / "checkpoint", folder / "store", file_bytes=100_000)
    return folder / "store"


def test_a_sound_store(store: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert find_problems(store, lambda *now: seen.append(now)) == []
    total = Manifest.load(store).total_bytes
    assert seen[-1] == (total, total)
    assert verify(store) == Manifest.load(store)


@given(data=st.data())
def test_any_flipped_bit_is_found(store: Path, data: st.DataObject) -> None:
    block = data.draw(st.sampled_from(Manifest.load(store).blocks))
    position = block.offset + data.draw(st.integers(0, block.nbytes - 1))
    bit = 1 << data.draw(st.integers(0, 7))

    def flip() -> None:
        with open(store / block.file, "r+b") as file:
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ bit]))

    flip()
    try:
        (problem,) = find_problems(store)
        assert (problem.block, problem.file) == (block.name, block.file)
        with pytest.raises(StoreError) as caught:
            verify(store)
        assert all(
            word in str(caught.value) for word in [repr(block.name), block.file, "checksum", "pack the checkpoint"]
        )
    finally:
        flip()


def test_headers_are_checked_too(store: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store, tmp_path / "store"))
    block = Manifest.load(copy).blocks[0]
    with open(copy / block.file, "r+b") as file:
        header = file.read(4096)
        file.seek(0)
        file.write(header.replace(b"BF16", b"I16 ", 1).replace(b'I16 "', b'I16" ', 1))
    assert "something else in the file's header" in find_problems(copy)[0].message
    with open(copy / block.file, "r+b") as file:
        file.write(b"\xff" * 8)
    assert {problem.block for problem in find_problems(copy)} == {
        other.name for other in Manifest.load(copy).blocks if other.file == block.file
    }
    with pytest.raises(StoreError, match=r"more blocks are damaged"):
        verify(copy)


def test_a_manifest_that_belongs_to_another_store(store: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store, tmp_path / "store"))
    raw = json.loads((copy / "manifest.json").read_text())
    raw["blocks"][0]["checksum"], raw["blocks"][1]["checksum"] = (raw["blocks"][i]["checksum"] for i in (1, 0))
    (copy / "manifest.json").write_text(json.dumps(raw))
    assert [problem.block for problem in find_problems(copy)] == [block["name"] for block in raw["blocks"][:2]]
