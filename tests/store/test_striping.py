"""A store over several folders: evenly spread, the same weights, and as safe as one in a single folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from store.store_helpers import in_child, pack_folder, reference_bytes, save_random

from pipo_ray.errors import BudgetError, CheckpointError, InputError, StoreError
from pipo_ray.model.blocks import BlockKind, BlockSpec, TensorSpec
from pipo_ray.plan.pieces import cut_pieces, largest_uncut_bytes
from pipo_ray.store import pack as packing
from pipo_ray.store import stripe_folder
from pipo_ray.store.checkpoint import Checkpoint
from pipo_ray.store.dtypes import num_bytes
from pipo_ray.store.manifest import Manifest
from pipo_ray.store.rows import RowReader
from pipo_ray.store.stripe_folder import STRIPE_NAME, stripe_folders
from pipo_ray.store.striping import distribute, split_blocks
from pipo_ray.store.verify import find_problems, verify

PART_BYTES = 6000
SMALL = {"file_bytes": 40_000, "part_bytes": PART_BYTES}
KINDS: list[BlockKind] = ["embedding", "attention", "mlp", "rest", "head"]


@st.composite
def block_lists(draw: st.DrawFn) -> tuple[BlockSpec, ...]:
    blocks = []
    for number in range(draw(st.integers(1, 12))):
        tensors = tuple(
            TensorSpec(f"b{number}.t{index}", (draw(st.integers(1, 40)), draw(st.integers(1, 9))), "F32", None, cut)
            for index, cut in enumerate(draw(st.lists(st.sampled_from(["rows", "none"]), min_size=1, max_size=4)))
        )
        blocks.append(BlockSpec(f"b{number}", draw(st.sampled_from(KINDS)), None, tensors))
    return tuple(blocks)


def size(block: BlockSpec) -> int:
    return sum(num_bytes(tensor.dtype, tensor.shape) for tensor in block.tensors)


# --- what lies where --------------------------------------------------------------------------------------------------


@given(block_lists(), st.integers(40, 800))
def test_parts_are_the_blocks_in_order(blocks: tuple[BlockSpec, ...], part_bytes: int) -> None:
    parts = split_blocks(blocks, part_bytes)
    assert len({part.name for part in parts}) == len(parts)
    rows: dict[str, int] = {}
    whole = {tensor.name: tensor for block in blocks for tensor in block.tensors}
    for part in parts:
        for tensor in part.tensors:
            assert (tensor.first_row or 0) == rows.get(tensor.name, 0)
            rows[tensor.name] = rows.get(tensor.name, 0) + tensor.shape[0]
            assert tensor.shape[1:] == whole[tensor.name].shape[1:]
            assert tensor.cut == "rows" or tensor.first_row is None
        if part.kind in ("embedding", "rest"):
            assert part in blocks
        elif size(part) > part_bytes:  # nothing of it could be cut
            (tensor,) = part.tensors
            assert tensor.cut == "none" or tensor.shape[0] == 1
    assert rows == {name: tensor.shape[0] for name, tensor in whole.items()}
    assert [t.name for p in parts for t in p.tensors if not t.first_row] == list(whole)


@given(block_lists(), st.integers(1, 4), st.integers(40, 800), st.data())
def test_any_window_is_spread_evenly(
    blocks: tuple[BlockSpec, ...], num_folders: int, part_bytes: int, data: st.DataObject
) -> None:
    parts = split_blocks(blocks, part_bytes)
    chosen = distribute(parts, num_folders)
    streaming = [one for one in zip(parts, chosen, strict=True) if one[0].kind not in ("embedding", "rest")]
    assert all(folder == 0 for part, folder in zip(parts, chosen, strict=True) if part.kind in ("embedding", "rest"))
    if not streaming:
        return
    most = max(size(part) for part, _ in streaming)
    start = data.draw(st.integers(0, len(streaming)))
    stop = data.draw(st.integers(start, len(streaming)))
    for begin, limit in ((0, most), (start, 2 * most)):
        filled = [0] * num_folders
        for part, folder in streaming[begin:stop]:
            filled[folder] += size(part)
        assert max(filled) - min(filled) <= limit


def test_equal_parts_take_turns() -> None:
    blocks = [BlockSpec(f"b{n}", "mlp", n, (TensorSpec(f"t{n}", (4, 4), "F32"),)) for n in range(7)]
    assert distribute(blocks, 3) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("second", ["store", "store/inside", ".", "stripe"])
def test_folders_must_be_apart(second: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--stripe .*: it is .*, contains it or lies in it"):
        stripe_folders(tmp_path / "store", [tmp_path / "stripe", tmp_path / second])


# --- a striped store --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("checkpoint") / "llama", "llama", tie_word_embeddings=True)


def stripe(llama: Path, folder: Path, **options: object) -> Manifest:
    return pack_folder(llama, folder / "store", stripes=[folder / "a" / "stripe", folder / "b"], **(SMALL | options))


@pytest.fixture
def store(llama: Path, tmp_path: Path) -> Path:
    stripe(llama, tmp_path)
    return tmp_path / "store"


def everything(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".json"
    }


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_it_has_the_same_weights(model_type: str, tmp_path: Path) -> None:
    checkpoint = save_random(tmp_path / "checkpoint", model_type)
    manifest = stripe(checkpoint, tmp_path)
    assert Manifest.load(tmp_path / "store") == manifest
    reference = reference_bytes(checkpoint, torch.bfloat16)
    names = {tensor.name for block in manifest.blocks for tensor in block.tensors}
    assert names | set(manifest.aliases) == set(reference)
    num_parts = 0
    for name, expert in {(t.name, t.expert) for block in manifest.blocks for t in block.tensors}:
        parts = manifest.find_parts(name, expert)
        num_parts += len(parts) - 1
        found = b"".join(
            manifest.path(tmp_path / "store", block).read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
            for block, tensor in parts
        )
        wanted = reference[name] if expert is None else reference[name][expert]
        assert found == wanted.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), name
    assert num_parts > 3
    assert find_problems(tmp_path / "store") == []
    filled = [0, 0, 0]
    for block in manifest.blocks:
        filled[block.folder] += block.nbytes if block.kind == "layer" else 0
    assert max(filled) - min(filled) <= 2 * max(block.nbytes for block in manifest.blocks)
    pieces = cut_pieces(manifest.blocks, largest_uncut_bytes(manifest.blocks))
    assert {piece.drive for piece in pieces} == {0, 1, 2}


def test_packing_again_does_nothing(llama: Path, store: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in store.parent.rglob("*")}
    stripe(llama, store.parent)
    assert {path: path.stat().st_mtime_ns for path in store.parent.rglob("*")} == before


def test_without_stripes_nothing_is_cut(llama: Path, tmp_path: Path) -> None:
    manifest = pack_folder(llama, tmp_path / "store", part_bytes=PART_BYTES)
    assert manifest.stripes == ()
    assert all(tensor.first_row is None for block in manifest.blocks for tensor in block.tensors)
    raw = json.loads((tmp_path / "store" / "manifest.json").read_text())
    del raw["stripes"]  # as older stores have it
    for block in raw["blocks"]:
        del block["folder"]
        for tensor in block["tensors"]:
            del tensor["first_row"]
    (tmp_path / "store" / "manifest.json").write_text(json.dumps(raw))
    assert Manifest.load(tmp_path / "store") == manifest


def test_rows_of_a_matrix_in_parts(tmp_path: Path) -> None:
    checkpoint = save_random(tmp_path / "checkpoint", "llama", tie_word_embeddings=False)
    manifest = stripe(checkpoint, tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    assert len(manifest.find_parts(name)) > 1
    matrix = reference_bytes(checkpoint, torch.bfloat16)[name].view(torch.int16).numpy()
    rows = np.random.default_rng(1).integers(0, len(matrix), 60)
    for cache_bytes in (0, 4 << 20):
        with RowReader(tmp_path / "store", manifest, name, cache_bytes=cache_bytes) as reader:
            for asked in (rows, np.arange(len(matrix)), rows[:1]):
                assert np.array_equal(reader.read(asked).view(np.int16), matrix[asked])


# --- as safe as one folder --------------------------------------------------------------------------------------------


def kill_at(number: int, work: Callable[[], object]) -> int:
    """Run in a child that kills itself at the `number`-th file that it syncs."""

    def counting() -> None:
        left = [number]
        real = os.fsync

        def counted(descriptor: int) -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            real(descriptor)

        os.fsync = counted  # type: ignore[assignment]
        work()

    return in_child(counting)


def test_killed_anywhere_it_goes_on(llama: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    expected = everything(store.parent)
    folder = tmp_path_factory.mktemp("killed")
    kills = 0
    for number in (0, 1, 2, 3, 5, 9, 14, 20, 30, 40):
        if kill_at(number, lambda: stripe(llama, folder)) == 0:
            break
        kills += 1
        assert not (folder / "store").exists(), "visible before it is complete"
        with pytest.raises(StoreError):
            Manifest.load(folder / "b")
    assert kills > 4
    stripe(llama, folder)
    assert everything(folder) == expected
    assert verify(folder / "store") == Manifest.load(folder / "store")
    assert {path.name for path in folder.iterdir()} == {"store", "a", "b"}


class Breaking:
    """A source of zeros that finds something wrong after some reads."""

    def __init__(self, sound_reads: int) -> None:
        self.left = sound_reads

    def require(self, blocks: object) -> None: ...

    def reads_apart(self, spec: TensorSpec) -> bool:
        return True

    def read(self, spec: TensorSpec, row_start: int, row_stop: int) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise CheckpointError("not a number")
        return torch.zeros((row_stop - row_start, *spec.shape[1:]), dtype=torch.bfloat16)


def test_a_checkpoint_that_must_change_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    blocks = [BlockSpec(f"b{n}", "mlp", n, (TensorSpec(f"t{n}", (300, 20), "BF16", cut="rows"),)) for n in range(12)]
    source = Breaking(15)  # in the stripe's first file
    with Checkpoint.open(llama) as opened, pytest.raises(CheckpointError, match="not a number"):
        packing.pack(
            blocks, source, tmp_path / "store", checkpoint=opened, aliases={}, architecture="", model_type="",
            precision="bfloat16", slot_bytes=1 << 20, stripes=[tmp_path / "new" / "stripe"], **SMALL,
        )  # fmt: skip
    assert source.left < 0
    assert not list(tmp_path.iterdir())


def test_a_stripe_that_is_missing_foreign_or_damaged(store: Path) -> None:
    folder = store.parent / "b"
    away = folder.with_name("away")
    folder.rename(away)
    with pytest.raises(StoreError, match=rf"its stripe {folder} is missing; mount its drive there, or pack"):
        Manifest.load(store)
    folder.mkdir()  # a mount point without its drive
    with pytest.raises(StoreError, match=rf"its stripe {folder} has no {STRIPE_NAME}, so it is something else; mount"):
        Manifest.load(store)
    shutil.copy(store.parent / "a" / "stripe" / STRIPE_NAME, folder)
    with pytest.raises(
        StoreError, match=rf"its stripe {folder} belongs to another store or place .*, stripe 1\); mount"
    ):
        Manifest.load(store)
    shutil.rmtree(folder)
    away.rename(folder)
    assert verify(store)
    victim = next(folder.glob("*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[-5000] ^= 1
    victim.write_bytes(data)
    with pytest.raises(StoreError, match=rf"block .* in {victim.name}: checksum"):
        verify(store)
    os.truncate(victim, 4096)
    with pytest.raises(StoreError, match=rf"{victim} has 4096 bytes, block .*truncated"):
        Manifest.load(store)
    victim.unlink()
    with pytest.raises(StoreError, match=rf"{victim} with block .* cannot be read: No such file"):
        Manifest.load(store)


def test_a_stripe_by_itself_is_no_store(store: Path) -> None:
    folder = store.parent / "b"
    with pytest.raises(StoreError, match=rf"{folder} is a stripe of the block store {store}; give that folder instead"):
        Manifest.load(folder)


def test_folders_that_are_something_else(llama: Path, store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("dear")
    for stripes, message in (
        ([tmp_path / "letters"], "exists and is no stripe of a block store; choose another"),
        ([tmp_path / "new", tmp_path / "b"], f"b is a stripe of the block store {store}; choose another folder"),
    ):
        with pytest.raises(StoreError, match=message):
            pack_folder(llama, other, stripes=stripes, **SMALL)
    assert (tmp_path / "letters" / "letter.txt").exists()
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob("other*"))
    assert verify(store)


def test_each_drive_must_have_room(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = packing._free_bytes
    monkeypatch.setattr(packing, "_free_bytes", lambda folder: 100 if folder.name == "b" else real(folder))
    monkeypatch.setattr(packing, "_device", lambda folder: hash(folder.name))
    with pytest.raises(BudgetError, match=rf"packing to {tmp_path / 'b'} needs .* of disk, 100 B are free"):
        stripe(llama, tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_packers_do_not_share_a_stripe(llama: Path, tmp_path: Path) -> None:
    with (
        stripe_folder.held_stripes([tmp_path / "b"], tmp_path / "elsewhere", "x"),
        pytest.raises(StoreError, match=r"another process is packing into .*b; wait until it is done"),
    ):
        stripe(llama, tmp_path)
    assert not list(tmp_path.iterdir())
