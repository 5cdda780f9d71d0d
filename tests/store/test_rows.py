"""Row lookup gives what indexing the matrix gives, with few and small reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.errors import InputError, StoreError
from pipo_ray.store.manifest import FORMAT_VERSION, Manifest, StoredBlock, StoredTensor
from pipo_ray.store.rows import RowReader
from pipo_ray.store.safetensors_file import encode_header

ROWS, COLUMNS = 300, 24
MATRIX = np.random.default_rng(0).integers(0, 2**16, (ROWS, COLUMNS), np.uint16)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("rows")
    header = encode_header([("embed", "BF16", MATRIX.shape), ("norm", "BF16", (COLUMNS,))])
    (folder / "x.safetensors").write_bytes(header + MATRIX.tobytes() + bytes(COLUMNS * 2))
    tensors = (
        StoredTensor("embed", "BF16", MATRIX.shape, None, "rows", 4096, MATRIX.nbytes),
        StoredTensor("norm", "BF16", (COLUMNS,), None, "rows", 4096 + MATRIX.nbytes, COLUMNS * 2),
    )
    block = StoredBlock("a", "embedding", None, "x.safetensors", 4096, MATRIX.nbytes + 48, "0" * 32, tensors)
    return folder, Manifest(FORMAT_VERSION, "", "", "", "bfloat16", {"head": "embed"}, (block,), block.nbytes)


@pytest.fixture(scope="module", params=[0, 7, ROWS])
def reader(request: pytest.FixtureRequest, store: tuple[Path, Manifest]) -> Iterator[RowReader]:
    with RowReader(*store, "embed", cache_bytes=request.param * COLUMNS * 2) as reader:
        yield reader


@given(rows=st.lists(st.integers(0, ROWS - 1), max_size=40))
def test_as_indexing(reader: RowReader, rows: list[int]) -> None:
    """Whatever the cache, which lives on from example to example."""
    read = reader.read(np.array(rows, np.int64))
    assert read.shape == (len(rows), COLUMNS * 2)
    assert np.array_equal(read.view(np.uint16), MATRIX[rows])


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(first row, number of rows) of every read, as if nothing were in the page cache."""
    seen: list[tuple[int, int]] = []
    original = os.preadv

    def count(descriptor: int, buffers: list[Any], offset: int, flags: int = 0) -> int:
        if flags:
            raise BlockingIOError
        seen.append(((offset - 4096) // 48, len(memoryview(buffers[0])) // 48))
        return original(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", count)
    return seen


def test_rows_are_read_once(store: tuple[Path, Manifest], reads: list[tuple[int, int]]) -> None:
    reader = RowReader(*store, "embed", cache_bytes=10 * 48)
    reader.read(np.array([5, 5, 5]))
    reader.read(np.array([5]))
    assert reads == [(5, 1)]
    reader.read(np.arange(100, 110))  # as many as are kept: pushes row 5 out
    reader.read(np.array([5]))
    assert reads == [(5, 1), (100, 10), (5, 1)]


def test_neighbours_are_read_together(
    store: tuple[Path, Manifest], reads: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipo_ray.store.rows._COALESCE_BYTES", 4 * 48)
    monkeypatch.setattr("pipo_ray.store.rows._RUN_BYTES", 100 * 48)
    RowReader(*store, "embed").read(np.array([7, 3, 8, 60, 90]))
    assert reads == [(3, 6), (60, 1), (90, 1)]
    reads.clear()
    RowReader(*store, "embed").read(np.arange(ROWS))
    assert reads == [(0, 100), (100, 100), (200, 100)]


def test_each_row_in_the_page_cache_is_read_alone(
    store: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some are, some are read in part, some are not."""
    calls: list[tuple[int, int]] = []
    original = os.preadv

    def some(descriptor: int, buffers: list[Any], offset: int, flags: int = 0) -> int:
        row = (offset - 4096) // 48
        calls.append((row, len(memoryview(buffers[0])) // 48 * (-1 if flags else 1)))
        if flags and row % 3 == 1:
            raise BlockingIOError
        if flags and row % 3 == 2:
            return 7
        return original(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", some)
    monkeypatch.setattr("pipo_ray.store.rows._COALESCE_BYTES", 0)
    wanted = np.array([31, 9, 6, 7, 9, 31, 200, 6])
    read = RowReader(*store, "embed", cache_bytes=2 * 48).read(wanted)
    assert np.array_equal(read.view(np.uint16), MATRIX[wanted])
    assert calls == [(6, -1), (7, -1), (9, -1), (31, -1), (200, -1), (7, 1), (31, 1), (200, 1)]


def test_a_long_prompt_leaves_the_cache_alone(store: tuple[Path, Manifest], reads: list[tuple[int, int]]) -> None:
    reader = RowReader(*store, "embed", cache_bytes=4 * 48)
    reader.read(np.array([5]))
    reader.read(np.arange(100, 110))
    reader.read(np.array([5]))
    assert reads == [(5, 1), (100, 10)]


def test_all_rows_are_kept(
    store: tuple[Path, Manifest], reads: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipo_ray.store.rows._RUN_BYTES", 100 * 48)
    with RowReader(*store, "embed", keep_all=True) as reader:
        assert reader._loading is not None
        reader._loading.join()
        assert reads == [(0, 100), (100, 100), (200, 100)]
        assert reader.whole is not None
        assert np.array_equal(reader.whole.view(np.uint16), MATRIX)
        assert np.array_equal(reader.read(np.array([7, 3, 7])).view(np.uint16), MATRIX[[7, 3, 7]])
        with pytest.raises(InputError, match="out of range"):
            reader.read(np.array([ROWS]))
    assert len(reads) == 3


def test_what_cannot_be_kept_is_told_when_it_is_wanted(store: tuple[Path, Manifest], tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes((store[0] / "x.safetensors").read_bytes()[: 4096 + 100 * 48])
    with RowReader(tmp_path, store[1], "embed", keep_all=True) as reader:
        assert reader._loading is not None
        reader._loading.join()
        assert reader.whole is None
        assert np.array_equal(reader.read(np.array([99])).view(np.uint16), MATRIX[[99]])
        with pytest.raises(StoreError, match=r"x\.safetensors ends at byte"):
            reader.read(np.array([200]))


def test_asking_for_what_is_not_in_memory_ends(store: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0
    original = os.preadv

    def cold(descriptor: int, buffers: list[Any], offset: int, flags: int = 0) -> int:
        nonlocal asked
        if flags:
            asked += 1
            raise BlockingIOError
        return original(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", cold)
    monkeypatch.setattr("pipo_ray.store.rows._MOST_NOT_AT_HAND", 3)
    read = RowReader(*store, "embed").read(np.arange(0, 100, 2))
    assert np.array_equal(read.view(np.uint16), MATRIX[0:100:2])
    assert asked == 3


@pytest.mark.parametrize("row", [-1, ROWS, 2**40])
def test_ids_out_of_range(reader: RowReader, row: int) -> None:
    with pytest.raises(InputError, match=rf"id {row} .* 0 to {ROWS - 1}; check that prompt and tokenizer"):
        reader.read(np.array([0, row]))


def test_an_alias_is_looked_up(store: tuple[Path, Manifest]) -> None:
    assert np.array_equal(RowReader(*store, "head").read(np.array([9])).view(np.uint16), MATRIX[[9]])


def test_what_cannot_be_looked_up(store: tuple[Path, Manifest], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no tensor 'other'"):
        RowReader(*store, "other")
    with pytest.raises(StoreError, match=r"'norm' has shape \[24\]"):
        RowReader(*store, "norm")
    with pytest.raises(StoreError, match="No such file"):
        RowReader(tmp_path, store[1], "embed")
    (tmp_path / "x.safetensors").write_bytes(bytes(5000))
    with pytest.raises(StoreError, match=r"x\.safetensors ends at byte"):
        RowReader(tmp_path, store[1], "embed").read(np.array([200]))


def test_needs_no_torch(store: tuple[Path, Manifest]) -> None:
    import subprocess
    import sys

    code = "import sys, pipo_ray.store.rows, pipo_ray.store.verify; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
