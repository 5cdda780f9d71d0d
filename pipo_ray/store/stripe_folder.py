"""Further folders of a block store, on other drives: the mark by which they are known, and what may be done with them.

A stripe is a folder of safetensors files with `stripe.json`. What is in them stands in the manifest of the store that
they belong to; so nothing of them is visible before that store is. Needs no torch and no numpy.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pipo_ray.errors import InputError, StoreError

STRIPE_NAME = "stripe.json"


@dataclass(frozen=True)
class StripeMark:
    """`store` is the block store's folder (absolute), `number` counts its stripes from 1, `fingerprint` is that of the
    store's manifest.
    """

    store: str
    number: int
    fingerprint: str


def read_mark(folder: Path) -> StripeMark | None:
    """The mark in `folder`; None if it has none. Raises OSError if it cannot be read."""
    try:
        raw = json.loads((folder / STRIPE_NAME).read_bytes())
        return StripeMark(str(raw["store"]), int(raw["number"]), str(raw["fingerprint"]))
    except (FileNotFoundError, NotADirectoryError):  # a GGUF file is no folder
        return None
    except (ValueError, KeyError, TypeError):  # cut off by a kill
        return StripeMark("", 0, "")


def check_stripes(store: Path, stripes: Sequence[str], fingerprint: str) -> None:
    """Raise StoreError, naming the folder, if one of `stripes` is not there or is not that of the store `store`."""
    for number, stripe in enumerate(stripes, 1):
        what = f"block store {store}: its stripe {stripe}"
        try:
            there = os.path.isdir(stripe)
            mark = read_mark(Path(stripe)) if there else None
        except OSError as error:
            raise StoreError(f"{what} cannot be read: {error.strerror}; check drive and rights") from error
        if not there:
            raise StoreError(f"{what} is missing; mount its drive there, or pack the checkpoint again")
        if mark is None:
            raise StoreError(
                f"{what} has no {STRIPE_NAME}, so it is something else; mount the right drive there, or pack the "
                "checkpoint again"
            )
        if (mark.number, mark.fingerprint) != (number, fingerprint):
            raise StoreError(
                f"{what} belongs to another store or place ({mark.store or 'unknown'}, stripe {mark.number}); mount "
                "the right drive there, or pack the checkpoint again"
            )


def refuse_stripe(folder: Path) -> None:
    """Raise StoreError if `folder` is a stripe, which is no store by itself."""
    if (mark := read_mark(folder)) is not None:
        raise StoreError(f"{folder} is a stripe of the block store {mark.store or '?'}; give that folder instead")


def stripe_folders(destination: Path, stripes: Sequence[str | os.PathLike[str]]) -> tuple[Path, ...]:
    """The folders to stripe the store at `destination` over, absolute. Raises InputError if two of them are one, or one
    lies in another.
    """
    folders = tuple(Path(stripe).absolute() for stripe in stripes)
    places = [Path(os.path.realpath(folder)) for folder in (destination, *folders)]
    for number, place in enumerate(places):
        for other in places[:number]:
            if place == other or place in other.parents or other in place.parents:
                raise InputError(
                    f"--stripe {folders[number - 1]}: it is {other}, contains it or lies in it; the folders of a store "
                    "must be apart: choose a folder on another drive"
                )
    return folders


@contextmanager
def held_stripes(folders: Sequence[Path], store: Path, fingerprint: str) -> Iterator[None]:
    """Make the stripes of `store` (its final folder) and hold them alone. What an earlier run for the same store and
    `fingerprint` left in them stays; what another plan for this store left is removed. Folders in which nothing was
    finished are removed at the end.

    Raises StoreError if a folder is something else, or another process packs into it.
    """
    with ExitStack() as stack:
        for number, folder in enumerate(folders, 1):
            stack.enter_context(_held(folder, StripeMark(str(store), number, fingerprint)))
        yield


@contextmanager
def _held(folder: Path, wanted: StripeMark) -> Iterator[None]:
    missing = [parent for parent in folder.parents if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"another process is packing into {folder}; wait until it is done, or choose another folder"
            ) from error
        _require_ours(folder, wanted)
        if read_mark(folder) != wanted:
            discard_stripe(folder)
            _write_mark(folder, wanted, descriptor)
        yield
    finally:
        with suppress(OSError):
            if os.listdir(folder) == [STRIPE_NAME] and read_mark(folder) == wanted:
                discard_stripe(folder)
            folder.rmdir()  # only if it is empty
            for parent in missing:
                parent.rmdir()
        os.close(descriptor)


def discard_stripe(folder: Path) -> None:
    """Remove what packing has put into the stripe `folder`, its mark last."""
    for path in [*folder.glob("*.safetensors"), folder / STRIPE_NAME]:
        path.unlink(missing_ok=True)


def _require_ours(folder: Path, wanted: StripeMark) -> None:
    if not os.listdir(folder):
        return
    mark = read_mark(folder)
    if mark is None:
        raise StoreError(f"--stripe {folder} exists and is no stripe of a block store; choose another, or move it away")
    if mark.store not in ("", wanted.store):
        raise StoreError(
            f"--stripe {folder} is a stripe of the block store {mark.store}; choose another folder, or remove both"
        )


def _write_mark(folder: Path, mark: StripeMark, descriptor: int) -> None:
    with open(folder / STRIPE_NAME, "w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(mark)))
        file.flush()
        os.fsync(file.fileno())
    os.fsync(descriptor)
