"""The header: what we write the safetensors library reads, what it writes we read, and lies are refused by name."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from pipo_ray.errors import CheckpointError
from pipo_ray.store.dtypes import num_bytes
from pipo_ray.store.safetensors_file import encode_header, read_header

DTYPES = {"U8": np.uint8, "I16": np.int16, "F16": np.float16, "F32": np.float32, "I64": np.int64, "BOOL": np.bool_}
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TENSORS = st.lists(st.tuples(NAMES, st.sampled_from(sorted(DTYPES)), SHAPES), max_size=6, unique_by=lambda t: t[0])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("header") / "x.safetensors"


@given(tensors=TENSORS, alignment=st.sampled_from([8, 64, 4096]))
def test_the_library_reads_what_we_write(
    path: Path, tensors: list[tuple[str, str, tuple[int, ...]]], alignment: int
) -> None:
    header = encode_header(tensors, alignment=alignment)
    assert len(header) % alignment == 0
    data = bytes(range(256)) * 20
    path.write_bytes(header + data[: sum(num_bytes(dtype, shape) for _, dtype, shape in tensors)])
    file = read_header(path)
    assert [(t.name, t.dtype, t.shape) for t in file.tensors.values()] == tensors or not all(
        t.nbytes for t in file.tensors.values()
    )
    with safetensors.safe_open(path, "numpy") as library:
        assert set(library.keys()) == {name for name, _, _ in tensors}
        for name, _, shape in tensors:
            entry = file.tensors[name]
            ours = path.read_bytes()[entry.offset : entry.offset + entry.nbytes]
            assert library.get_slice(name).get_shape() == list(shape)
            if all(shape):
                assert library.get_tensor(name).tobytes() == ours


@given(tensors=TENSORS)
def test_we_read_what_the_library_writes(path: Path, tensors: list[tuple[str, str, tuple[int, ...]]]) -> None:
    arrays = {name: np.ones(shape, DTYPES[dtype]) for name, dtype, shape in tensors}
    safetensors.numpy.save_file(arrays, path, metadata={"format": "np"})
    file = read_header(path)
    assert {name: (t.dtype, t.shape, t.nbytes) for name, t in file.tensors.items()} == {
        name: (dtype, shape, arrays[name].nbytes) for name, dtype, shape in tensors
    }
    assert file.metadata == {"format": "np"}


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(begin: object, end: object, shape: object, dtype: object = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header, data, length, words",
    [
        ({}, b"", 100_000_001, ["100000001", "100000000"]),
        ({}, b"", 2**63, [str(2**63), "100000000"]),
        ({}, b"", 4000, ["4000", "truncated"]),
        (b"\x80nothing", b"", None, ["not JSON"]),
        (b"[1, 2]", b"", None, ["list", "not an object"]),
        (b"[" * 90_000, b"", None, ["not JSON"]),
        (b'{"a": {}, "a": {}}', b"", None, ["'a' comes twice"]),
        ({"a": 3}, b"", None, ["'a'", "not an object"]),
        ({"a": entry(0, 4, [4], "Q9")}, b"1234", None, ["'a'", "'Q9'", "BF16"]),
        ({"a": entry(0, 4, [4], None)}, b"1234", None, ["'a'", "unknown dtype None"]),
        ({"a": entry(0, 4, [-4])}, b"1234", None, ["'a'", "[-4]"]),
        ({"a": entry(0, 4, [True, 4])}, b"1234", None, ["'a'", "[True, 4]"]),
        ({"a": entry(0, 4, "4")}, b"1234", None, ["'a'", "shape 4"]),
        ({"a": entry(0, 1.5, [4])}, b"1234", None, ["'a'", "1.5"]),
        ({"a": entry(-4, 0, [4])}, b"1234", None, ["'a'", "-4 to 0", "negative"]),
        ({"a": entry(4, 0, [4])}, b"1234", None, ["'a'", "4 to 0", "negative"]),
        ({"a": entry(0, 8, [8])}, b"1234", None, ["'a'", "0 to 8", "4 bytes of data", "truncated"]),
        ({"a": entry(0, 4, [3])}, b"1234", None, ["'a'", "4 bytes", "takes 3"]),
        ({"a": entry(0, 4, [2**70])}, b"1234", None, ["'a'", "takes"]),
        ({"a": entry(0, 4, [9], "F4")}, b"1234", None, ["'a'", "F4"]),
        ({"a": entry(0, 4, [4]), "b": entry(3, 7, [4])}, b"1234567", None, ["'b'", "overlapping 'a'", "1 bytes"]),
        ({"a": entry(0, 2, [2]), "b": entry(4, 6, [2])}, b"123456", None, ["hole of 2", "'b'"]),
        ({"a": entry(2, 4, [2])}, b"1234", None, ["hole of 2", "'a'"]),
        ({"a": entry(0, 4, [4])}, b"123456", None, ["2 bytes behind", "'a'"]),
        ({"__metadata__": {"a": 1}}, b"", None, ["__metadata__"]),
    ],
)
def test_lies(tmp_path: Path, header: object, data: bytes, length: int | None, words: list[str]) -> None:
    path = write(tmp_path / "liar.safetensors", header, data, length)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert all(word in message for word in [str(path), "again", *words])
    assert "\n" not in message


@given(cut=st.integers(0, 400))
def test_every_truncation_is_noticed(path: Path, cut: int) -> None:
    safetensors.numpy.save_file({"a": np.ones((8, 4), np.float32), "b": np.ones(3, np.int64)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: min(cut, len(whole) - 1)])
    with pytest.raises(CheckpointError, match=r"x\.safetensors .*download"):
        read_header(path)


@given(junk=st.binary(max_size=200))
def test_junk_never_crashes_the_reader(path: Path, junk: bytes) -> None:
    path.write_bytes(junk)
    with contextlib.suppress(CheckpointError):
        read_header(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"No such file.*check path"):
        read_header(tmp_path / "gone.safetensors")


def test_a_name_twice_is_not_written() -> None:
    with pytest.raises(ValueError, match="comes twice"):
        encode_header([("a", "U8", (1,)), ("a", "U8", (1,))])
