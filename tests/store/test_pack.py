"""Packing: the same bytes as transformers, streaming, resumable after any kill, and visible only when complete."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from store.store_helpers import assert_same_as_transformers, in_child, pack_folder, save_random
from transformers import AutoConfig

from pipo_ray.errors import BudgetError, CheckpointError, StoreError
from pipo_ray.store.manifest import JOURNAL_NAME, Manifest, is_store
from pipo_ray.store.safetensors_file import PAD_PREFIX
from pipo_ray.store.verify import find_problems

SMALL_FILES = {"file_bytes": 50_000}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("checkpoint") / "llama", "llama")


@pytest.fixture(scope="module")
def packed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What packing `llama` in small files gives when nothing disturbs it."""
    destination = tmp_path_factory.mktemp("packed") / "store"
    pack_folder(llama, destination, **SMALL_FILES)
    return destination


# --- what comes out ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_llama_in_every_precision(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    save_random(tmp_path / "checkpoint", "llama", stored)
    pack_folder(tmp_path / "checkpoint", tmp_path / "store", dtype)
    assert_same_as_transformers(tmp_path / "checkpoint", tmp_path / "store", dtype)


@pytest.mark.parametrize(
    "model_type, options",
    [
        ("llama", {"tie_word_embeddings": True}),
        ("mixtral", {}),
        ("qwen3_moe", {}),
        ("gpt_oss", {}),
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 1}),
    ],
)
@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_bit_for_bit_what_from_pretrained_makes(
    tmp_path: Path, model_type: str, options: dict[str, Any], shard: str
) -> None:
    save_random(tmp_path / "checkpoint", model_type, torch.float32, shard, **options)
    assert (len(list((tmp_path / "checkpoint").glob("*.safetensors"))) > 1) == (shard == "60KB")
    manifest = pack_folder(tmp_path / "checkpoint", tmp_path / "store", **SMALL_FILES)
    assert len(manifest.files) > 1
    assert Manifest.load(tmp_path / "store") == manifest
    assert_same_as_transformers(tmp_path / "checkpoint", tmp_path / "store", torch.bfloat16)
    assert find_problems(tmp_path / "store") == []


def test_the_safetensors_library_reads_a_store(packed: Path) -> None:
    manifest = Manifest.load(packed)
    for block in manifest.blocks:
        with safetensors.safe_open(packed / block.file, "pt") as library:
            names = [name for name in library.keys() if not name.startswith(PAD_PREFIX)]  # noqa: SIM118
            assert set(names) >= {tensor.key for tensor in block.tensors}
            for tensor in block.tensors:
                raw = (packed / block.file).read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
                assert library.get_tensor(tensor.key).view(torch.uint8).numpy().tobytes() == raw


def test_a_store_has_what_transformers_needs_but_the_weights(llama: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(llama, tmp_path / "checkpoint"))
    (checkpoint / "tokenizer.json").write_text("{}")
    (checkpoint / "pytorch_model.bin").write_text("pickle")
    pack_folder(checkpoint, tmp_path / "store", extra={"probe": {"ragged": True}})
    assert AutoConfig.from_pretrained(tmp_path / "store").hidden_size == 64
    assert {path.name for path in (tmp_path / "store").iterdir()} == {
        "blocks-00001-of-00001.safetensors", "config.json", "generation_config.json", "manifest.json", "tokenizer.json",
    }  # fmt: skip
    assert Manifest.load(tmp_path / "store").extra == {"probe": {"ragged": True}}
    assert [path.name for path in tmp_path.iterdir() if "store" in path.name] == ["store"]


def test_progress_ends_at_all_of_it(llama: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    manifest = pack_folder(llama, tmp_path / "store", progress=lambda *now: seen.append(now), **SMALL_FILES)
    assert seen == sorted(seen)
    assert seen[-1] == (sum(manifest.files.values()), sum(manifest.files.values()))


def test_memory_is_a_slot_and_a_constant(tmp_path: Path) -> None:
    """A checkpoint of 150 MB in float32, through a slot of 4 MiB: in pages taken at the worst moment."""
    save_random(
        tmp_path / "big", "llama", torch.float32, "40MB", vocab_size=40_000, hidden_size=512, num_hidden_layers=3
    )

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) >> 10 for line in lines if line.startswith(name))

    def work() -> None:
        pack_folder(tmp_path / "big", tmp_path / "warm-up", **SMALL_FILES)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = status("VmRSS")
        pack_folder(tmp_path / "big", tmp_path / "store", slot_bytes=4 << 20)
        used = status("VmHWM") - before
        os._exit(used if used < 100 else 100)

    # The constant is mostly what malloc keeps for each of four reading threads.
    assert in_child(work) < 4 + 24


# --- again, and elsewhere ---


def test_packing_again_does_nothing(llama: Path, packed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in packed.iterdir()}
    assert pack_folder(llama, packed, **SMALL_FILES) == Manifest.load(packed)
    assert {path: path.stat().st_mtime_ns for path in packed.iterdir()} == before


def test_an_empty_folder_is_a_fine_destination(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    pack_folder(llama, tmp_path / "store")
    assert is_store(tmp_path / "store")


def test_destinations_that_are_something_else(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(StoreError, match=r"mine exists and is no block store; choose another"):
        pack_folder(llama, tmp_path / "mine")
    pack_folder(llama, tmp_path / "store")
    with pytest.raises(StoreError, match=r"another checkpoint, version or precision .*remove it or choose"):
        pack_folder(llama, tmp_path / "store", torch.float32)
    next((tmp_path / "store").glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(StoreError, match=r"damaged .*truncated.* remove it first"):
        pack_folder(llama, tmp_path / "store")
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "letter.txt").write_text("dear")
    shutil.rmtree(tmp_path / "mine")
    with pytest.raises(StoreError, match=r"mine\.partial exists and is no half-packed store"):
        pack_folder(llama, tmp_path / "mine")
    assert (tmp_path / "mine.partial" / "letter.txt").exists()


def test_a_second_packer_is_told_or_waits(llama: Path, packed: Path, tmp_path: Path) -> None:
    """Two more come while the first is in the middle: one that does not wait and one that does."""
    destination = tmp_path / "store"
    context = multiprocessing.get_context("fork")
    middle, told = context.Event(), context.Event()

    def impatient() -> None:
        middle.wait(30)
        with pytest.raises(StoreError, match=r"another process is packing into .*; wait until it is done"):
            pack_folder(llama, destination, **SMALL_FILES)
        told.set()

    def patient() -> None:
        middle.wait(30)
        pack_folder(llama, destination, wait=True, **SMALL_FILES)

    others = [context.Process(target=target) for target in (impatient, patient)]
    for other in others:
        other.start()

    def in_the_middle(done: int, total: int) -> None:
        middle.set()
        assert told.wait(30)

    pack_folder(llama, destination, progress=in_the_middle, **SMALL_FILES)
    for other in others:
        other.join(30)
    assert [other.exitcode for other in others] == [0, 0]
    assert contents(destination) == contents(packed)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


# --- when it is killed ---


def test_a_kill_at_any_step(llama: Path, tmp_path: Path) -> None:
    """Killed before its first, second, ... last system call that changes something on the disk.

    What is there then is never taken for a store unless it is one, and the next run ends with the same bytes.
    """

    def work(destination: Path, kill_at: int) -> None:
        steps = 0

        def deadly(original: Callable[..., Any]) -> Callable[..., Any]:
            def step(*arguments: Any, **options: Any) -> Any:
                nonlocal steps
                steps += 1
                if steps == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **options)

            return step

        for name in ("fsync", "rename", "replace", "unlink", "mkdir", "pwrite"):
            setattr(os, name, deadly(getattr(os, name)))
        pack_folder(llama, destination, file_bytes=100_000)

    for kill_at in itertools.count(1):
        destination = tmp_path / str(kill_at) / "store"
        destination.parent.mkdir()
        status = in_child(lambda to=destination, at=kill_at: work(to, at))
        if status == 0:
            break
        assert status == -signal.SIGKILL
        for folder in destination.parent.iterdir():
            if is_store(folder):
                assert find_problems(folder) == []
            else:
                with pytest.raises(StoreError):
                    Manifest.load(folder)
        pack_folder(llama, destination, file_bytes=100_000)
        assert [path.name for path in destination.parent.iterdir()] == ["store"]
        assert find_problems(destination) == []
        reference = contents(tmp_path / "1" / "store")
        assert contents(destination) == reference
    assert kill_at > 20


def killed_half_way(checkpoint: Path, destination: Path, share: float = 0.6) -> Path:
    """The partial folder that a packer leaves which is killed while it writes."""

    def deadly(done: int, total: int) -> None:
        if done > share * total:
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(lambda: pack_folder(checkpoint, destination, progress=deadly, **SMALL_FILES)) == -signal.SIGKILL
    assert not destination.exists()
    return destination.with_name(destination.name + ".partial")


def test_what_is_finished_is_not_written_again(llama: Path, packed: Path, tmp_path: Path) -> None:
    partial = killed_half_way(llama, tmp_path / "store")
    finished = (partial / JOURNAL_NAME).read_text().count("checksums")
    assert finished >= 2
    with pytest.raises(StoreError, match="half packed"):
        Manifest.load(partial)
    first = partial / sorted(path.name for path in partial.glob("*.safetensors"))[0]
    inode = first.stat().st_ino, first.stat().st_mtime_ns
    pack_folder(llama, tmp_path / "store", **SMALL_FILES)
    stat = (tmp_path / "store" / first.name).stat()
    assert (stat.st_ino, stat.st_mtime_ns) == inode
    assert contents(tmp_path / "store") == contents(packed)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "journal"])
def test_finished_files_are_not_believed_unseen(llama: Path, packed: Path, tmp_path: Path, damage: str) -> None:
    partial = killed_half_way(llama, tmp_path / "store")
    first = sorted(partial.glob("*.safetensors"))[0]
    if damage == "flip":
        with open(first, "r+b") as file:
            file.seek(6000)
            file.write(b"\xff\x00\xff")
    elif damage == "truncate":
        os.truncate(first, 5000)
    elif damage == "remove":
        first.unlink()
    else:
        journal = partial / JOURNAL_NAME
        journal.write_text(journal.read_text()[:-20])
    pack_folder(llama, tmp_path / "store", **SMALL_FILES)
    assert contents(tmp_path / "store") == contents(packed)


def test_the_rest_of_another_checkpoint_is_not_used(llama: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(llama, tmp_path / "checkpoint"))
    killed_half_way(checkpoint, tmp_path / "store")
    weights = load_file(checkpoint / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, checkpoint / "model.safetensors")
    pack_folder(checkpoint, tmp_path / "store", **SMALL_FILES)
    assert_same_as_transformers(checkpoint, tmp_path / "store", torch.bfloat16)


# --- when the disk is full, and when the checkpoint is bad ---


def test_disk_space_is_checked_first(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = os.statvfs_result((4096, 4096, 1000, 3000, 2000, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: free)
    with pytest.raises(BudgetError) as caught:
        pack_folder(llama, tmp_path / "deep" / "store")
    words = [str(tmp_path / "deep"), "needs 8.", "MiB of disk", "7.812 MiB are free", "another disk"]
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_an_earlier_run_wrote_counts_as_free(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = killed_half_way(llama, tmp_path / "store")
    (partial / "blocks-00009-of-00009.safetensors").write_bytes(bytes(2 << 20))
    free = os.statvfs_result((4096, 4096, 0, 0, (8 << 20) // 4096, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: free)
    pack_folder(llama, tmp_path / "store", **SMALL_FILES)


def test_disk_full_in_the_middle(llama: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, original = 0, os.pwrite

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > 120_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(BudgetError) as caught:
            pack_folder(llama, tmp_path / "store", **SMALL_FILES)
    words = ["disk full", str(tmp_path / "store.partial"), "No space left", "KiB", "run it again", "are kept"]
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "checksums" in (tmp_path / "store.partial" / JOURNAL_NAME).read_text()
    pack_folder(llama, tmp_path / "store", **SMALL_FILES)
    assert contents(tmp_path / "store") == contents(packed)


def test_the_kernel_refuses_to_write_more(llama: Path, tmp_path: Path) -> None:
    """A real error from the kernel in the writing thread, by a limit on the size of files."""

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(BudgetError, match="File too large"):
            pack_folder(llama, tmp_path / "store")

    assert in_child(work) == 0
    assert not list(tmp_path.glob("store.partial/*.safetensors"))


def test_a_folder_that_cannot_be_written(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot be used: Not a directory; check"):
        pack_folder(llama, tmp_path / "file" / "store")


def test_a_bad_checkpoint_leaves_nothing_behind(llama: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(llama, tmp_path / "checkpoint"))
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"][5] = torch.nan
    save_file(weights, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' .*NaN"):
        pack_folder(checkpoint, tmp_path / "store", **SMALL_FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_checkpoint_on_a_failing_disk_can_be_packed_on(
    llama: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, original = 0, os.preadv

    def failing(*arguments: Any) -> int:
        nonlocal reads
        reads += 1
        if reads == 15:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        with pytest.raises(CheckpointError, match=r"Input/output error; check the disk"):
            pack_folder(llama, tmp_path / "store", **SMALL_FILES)
    assert (tmp_path / "store.partial" / JOURNAL_NAME).exists()
    pack_folder(llama, tmp_path / "store", **SMALL_FILES)
    assert contents(tmp_path / "store") == contents(packed)


def test_a_file_system_without_direct_io(
    llama: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.open

    def refusing(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return original(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", refusing)
    pack_folder(llama, tmp_path / "store", **SMALL_FILES)
    assert contents(tmp_path / "store") == contents(packed)
