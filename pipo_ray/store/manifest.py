"""`manifest.json`: what a block store holds and where. Needs no torch and no numpy: every actor can read it."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

from pipo_ray.errors import InputError, StoreError
from pipo_ray.model.blocks import BlockKind, Cut
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.quant.panels import BLOCK_ROWS, INT4_LAYOUTS, INT8_LAYOUT, Panels
from pipo_ray.store.dtypes import DTYPE_BITS, num_bytes
from pipo_ray.store.stripe_folder import check_stripes, refuse_stripe

FORMAT_VERSION = 2
"""2 has low-bit weights; a store without them is written as version 1, which readers of both understand."""
PLAIN_VERSION = 1
MANIFEST_NAME = "manifest.json"
JOURNAL_NAME = "packing.journal"
"""Present only while a store is being packed: a folder that has it is not a store."""

_Type = TypeVar("_Type")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a block: `offset` is absolute in the block's file, in bytes. See TensorSpec for the other fields.

    What older stores do not have is left out of `repr`, by which a store is told from another (`plan_fingerprint`).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    expert: int | None
    cut: Cut
    offset: int
    nbytes: int
    panels: Panels | None = None
    first_row: int | None = field(default=None, repr=False)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape that the module graph knows: that of the weight where panels are stored."""
        return self.shape if self.panels is None else (self.panels.rows, self.panels.columns)

    @property
    def key(self) -> str:
        """The tensor's name in its safetensors file."""
        return stored_key(self.name, self.expert, self.first_row)


@dataclass(frozen=True)
class StoredBlock:
    """A contiguous byte range of one file: the tensors of a block in the order of use, padding included.

    `offset` and `nbytes` are multiples of 4096, so that a block can be read with O_DIRECT as it is. `checksum` is the
    xxh3_128 of the range in hex. `folder` is 0 for the store's own folder, n for the n-th stripe.
    """

    name: str
    kind: BlockKind
    layer: int | None
    file: str
    offset: int
    nbytes: int
    checksum: str
    tensors: tuple[StoredTensor, ...]
    folder: int = field(default=0, repr=False)


@dataclass(frozen=True)
class Manifest:
    """All of a block store's table of contents.

    `source` is where it was packed from, `precision` a torch dtype such as "bfloat16", `aliases` maps a tied tensor
    to the stored one, `total_bytes` is the sum of the blocks' `nbytes`, `fingerprint` identifies checkpoint and
    layout (see `store/pack.py`), `extra` is JSON of the caller's. `stripes` are further folders that have files of the
    store, on other drives; absolute paths. `blocks` are in the order of use, wherever they lie.
    """

    format_version: int
    source: str
    architecture: str
    model_type: str
    precision: str
    aliases: dict[str, str]
    blocks: tuple[StoredBlock, ...]
    total_bytes: int
    fingerprint: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    stripes: tuple[str, ...] = ()

    def folders(self, store: str | os.PathLike[str]) -> tuple[Path, ...]:
        """All folders of the store at `store`, by `StoredBlock.folder`."""
        return (Path(store), *map(Path, self.stripes))

    def path(self, store: str | os.PathLike[str], block: StoredBlock) -> Path:
        """The file that has `block` of the store at `store`."""
        return self.folders(store)[block.folder] / block.file

    @property
    def files(self) -> dict[str, int]:
        """Size in bytes of each file, in order of first use: a file ends with its last block."""
        sizes: dict[str, int] = {}
        for block in self.blocks:
            sizes[block.file] = max(sizes.get(block.file, 0), block.offset + block.nbytes)
        return sizes

    def find(self, name: str, expert: int | None = None) -> tuple[StoredBlock, StoredTensor]:
        """The stored tensor of this name, through `aliases`, and its block; the first part of one that was split.
        Raises KeyError.
        """
        return self.find_parts(name, expert)[0]

    def find_parts(self, name: str, expert: int | None = None) -> list[tuple[StoredBlock, StoredTensor]]:
        """All of the tensor, in the order of its rows, if it was split; see `find`."""
        name = self.aliases.get(name, name)
        found = [
            (block, tensor)
            for block in self.blocks
            for tensor in block.tensors
            if tensor.name == name and tensor.expert == expert
        ]
        if not found:
            raise KeyError(stored_key(name, expert))
        return sorted(found, key=lambda one: one[1].first_row or 0)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `manifest.json` into `folder`: whole or not at all, and on the disk when this returns."""
        folder = Path(folder)
        scratch = folder / (MANIFEST_NAME + ".new")
        with open(scratch, "w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self), ensure_ascii=False))
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, folder / MANIFEST_NAME)
        sync_folder(folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Manifest:
        """Read the manifest of the store in `folder`, and check all that a reader will rely on, but for the checksums.

        Raises StoreError: no such folder, a checkpoint or another folder that is not a store, a store half packed or
        of a newer format, a file missing or truncated, an entry that contradicts itself or lies outside its file, a
        stripe's folder that is not there or another store's.
        """
        folder = Path(folder)
        return _Reader(folder, _read_json(folder)).manifest()


def stored_key(name: str, expert: int | None, first_row: int | None = None) -> str:
    """The name under which a tensor, an expert's slice of one, or a part of its rows, is kept in a safetensors file."""
    key = name if expert is None else f"{name}.expert.{expert}"
    return key if first_row is None else f"{key}.rows.{first_row}"


def is_store(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` looks like a finished block store; `Manifest.load` tells whether it is a sound one."""
    return (Path(folder) / MANIFEST_NAME).is_file() and not (Path(folder) / JOURNAL_NAME).exists()


def require_free_place(destination: Path) -> None:
    """Raise StoreError if a store cannot be made at `destination` because something else is there."""
    if destination.is_dir():
        if is_store(destination) or not any(destination.iterdir()):
            return
    elif not os.path.lexists(destination):
        return
    raise StoreError(f"destination {destination} exists and is no block store; choose another, or move it away")


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """fsync a folder, so that a rename or a new file in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_json(folder: Path) -> Any:
    path = folder / MANIFEST_NAME
    try:
        if not folder.is_dir():
            raise StoreError(f"block store {folder} is not a folder; check the path")
        if (folder / JOURNAL_NAME).exists():
            raise StoreError(f"block store {folder} is half packed; run `pipo pack` again, it goes on where it stopped")
        if not path.exists() and (folder / "config.json").exists():
            raise StoreError(
                f"{folder} is a checkpoint, not a block store (it has no {MANIFEST_NAME}); pack it with `pipo pack`"
            )
        refuse_stripe(folder)
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise StoreError(f"{folder} is not a block store: it has no {MANIFEST_NAME}; check the path") from error
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}; check path and rights") from error
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is not JSON ({str(error)[:100]}); pack the checkpoint again") from error


class _Reader:
    """Turns JSON into a Manifest, checking every field. All errors name the manifest and the entry."""

    def __init__(self, folder: Path, raw: Any) -> None:
        self.folder, self.raw = folder, raw

    def fail(self, what: str) -> StoreError:
        return StoreError(f"{self.folder / MANIFEST_NAME}: {what}; pack the checkpoint again")

    def get(self, entry: Any, name: str, kind: type[_Type], where: str) -> _Type:
        value = entry.get(name) if isinstance(entry, dict) else None
        # `type(x) is`, because JSON's true is an int to isinstance.
        if type(value) is not kind:
            raise self.fail(f"{where} has {name} {str(value)[:60]!r}, which is no {kind.__name__}")
        return value

    def size(self, entry: Any, name: str, where: str) -> int:
        value = self.get(entry, name, int, where)
        if value < 0:
            raise self.fail(f"{where} has {name} {value}, below 0")
        return value

    def optional_size(self, entry: Any, name: str, where: str) -> int | None:
        return None if isinstance(entry, dict) and entry.get(name) is None else self.size(entry, name, where)

    def choice(self, entry: Any, name: str, choices: tuple[str, ...], where: str) -> Any:
        value = self.get(entry, name, str, where)
        if value not in choices:
            raise self.fail(f"{where} has {name} {value!r}; known are {', '.join(choices)}")
        return value

    def manifest(self) -> Manifest:
        raw, top = self.raw, "the manifest"
        version = self.get(raw, "format_version", int, top)
        if version > FORMAT_VERSION:
            raise StoreError(
                f"block store {self.folder} has format version {version}, this pipo_ray reads up to {FORMAT_VERSION}; "
                "update pipo_ray or pack the checkpoint again"
            )
        if version < 1:
            raise self.fail(f"format version {version} does not exist")
        blocks = tuple(self.block(entry) for entry in self.get(raw, "blocks", list, top))
        manifest = Manifest(
            format_version=version,
            source=self.get(raw, "source", str, top),
            architecture=self.get(raw, "architecture", str, top),
            model_type=self.get(raw, "model_type", str, top),
            precision=self.get(raw, "precision", str, top),
            aliases=self.get(raw, "aliases", dict, top),
            blocks=blocks,
            total_bytes=self.size(raw, "total_bytes", top),
            fingerprint=self.get(raw, "fingerprint", str, top),
            extra=self.get(raw, "extra", dict, top),
            stripes=self.stripes(raw, top),
        )
        self.check_names(manifest)
        check_stripes(self.folder, manifest.stripes, manifest.fingerprint)
        self.check_files(manifest)
        if manifest.total_bytes != (total := sum(block.nbytes for block in blocks)):
            raise self.fail(f"total_bytes is {manifest.total_bytes}, its blocks have {total}")
        return manifest

    def stripes(self, raw: Any, top: str) -> tuple[str, ...]:
        stripes = tuple(self.get(raw, "stripes", list, top)) if "stripes" in raw else ()
        if not all(isinstance(one, str) and os.path.isabs(one) for one in stripes):
            raise self.fail(f"{top} has stripes {str(stripes)[:60]}, which are no absolute paths")
        return stripes

    def block(self, entry: Any) -> StoredBlock:
        name = self.get(entry, "name", str, "a block")
        where = f"block {name!r}"
        file = self.get(entry, "file", str, where)
        if not file.endswith(".safetensors") or file != os.path.basename(file):
            raise self.fail(f"{where} is in file {file!r}, which is no name of a safetensors file in the folder")
        checksum = self.get(entry, "checksum", str, where)
        if not re.fullmatch("[0-9a-f]{32}", checksum):
            raise self.fail(f"{where} has checksum {checksum[:60]!r}, which is no xxh3_128")
        offset, nbytes = self.size(entry, "offset", where), self.size(entry, "nbytes", where)
        tensors = tuple(self.tensor(tensor, where) for tensor in self.get(entry, "tensors", list, where))
        end = offset
        for tensor in tensors:
            if tensor.offset < end or tensor.offset + tensor.nbytes > offset + nbytes:
                raise self.fail(
                    f"tensor {tensor.key!r} at bytes {tensor.offset} to {tensor.offset + tensor.nbytes} overlaps "
                    "another or "
                    f"leaves {where} at {offset} to {offset + nbytes}"
                )
            end = tensor.offset + tensor.nbytes
        kind = self.choice(entry, "kind", get_args(BlockKind), where)
        folder = self.optional_size(entry, "folder", where) or 0
        return StoredBlock(
            name, kind, self.optional_size(entry, "layer", where), file, offset, nbytes, checksum, tensors, folder
        )

    def tensor(self, entry: Any, where: str) -> StoredTensor:
        name = self.get(entry, "name", str, f"a tensor of {where}")
        where = f"tensor {name!r} of {where}"
        shape = tuple(self.get(entry, "shape", list, where))
        if any(type(item) is not int or item < 0 for item in shape):
            raise self.fail(f"{where} has shape {str(shape)[:60]}; sizes are integers from 0 up")
        dtype = self.choice(entry, "dtype", tuple(DTYPE_BITS), where)
        nbytes = self.size(entry, "nbytes", where)
        if nbytes * 8 != DTYPE_BITS[dtype] * math.prod(shape):
            raise self.fail(
                f"{where} has {nbytes} bytes, {dtype} of shape {list(shape)} takes {num_bytes(dtype, shape)}"
            )
        expert, offset = self.optional_size(entry, "expert", where), self.size(entry, "offset", where)
        cut = self.choice(entry, "cut", get_args(Cut), where)
        panels = self.panels(entry, where)
        first_row = self.optional_size(entry, "first_row", where)
        wanted = None if panels is None else panels.shape if first_row is None else (*shape[:1], *panels.shape[1:])
        if wanted is not None and (dtype, shape) != ("U8", wanted):
            raise self.fail(f"{where} is {dtype} of shape {list(shape)}, its panels are U8 of {list(wanted)}")
        if first_row is not None and (cut != "rows" or len(shape) < 1):
            raise self.fail(f"{where} begins at row {first_row}, but cannot be split by rows")
        return StoredTensor(name, dtype, shape, expert, cut, offset, nbytes, panels, first_row)

    def panels(self, entry: Any, where: str) -> Panels | None:
        if entry.get("panels") is None:
            return None
        raw = self.get(entry, "panels", dict, where)
        where = f"the panels of {where}"
        rows, columns, panel_rows = (self.size(raw, name, where) for name in ("rows", "columns", "panel_rows"))
        try:
            low_bit = LowBitFormat.parse(self.get(raw, "format", str, where))
        except InputError as error:
            raise self.fail(f"{where}: {error}") from error
        layouts = tuple(INT4_LAYOUTS) if low_bit.bits == 4 else (INT8_LAYOUT,)
        layout = self.choice(raw, "layout", layouts, where)
        if not rows or not columns or columns % low_bit.columns_multiple or not panel_rows or panel_rows % BLOCK_ROWS:
            raise self.fail(f"{where} have {rows} rows, {columns} columns and {panel_rows} rows each")
        return Panels(low_bit.name, layout, rows, columns, panel_rows)

    def check_names(self, manifest: Manifest) -> None:
        names: set[str] = set()
        keys: set[tuple[str, int | None, int | None]] = set()
        for block in manifest.blocks:
            if block.name in names:
                raise self.fail(f"block {block.name!r} comes twice")
            names.add(block.name)
            for tensor in block.tensors:
                key = tensor.name, tensor.expert, tensor.first_row
                if key in keys:
                    raise self.fail(f"tensor {tensor.key!r} comes twice")
                keys.add(key)
        self.check_parts(manifest)
        stored = {name for name, _, _ in keys}
        for alias, name in manifest.aliases.items():
            if not isinstance(name, str) or name not in stored or alias in stored:
                raise self.fail(f"alias {alias!r} names {name!r}, which is not stored, or is stored itself")

    def check_parts(self, manifest: Manifest) -> None:
        parts: dict[tuple[str, int | None], list[StoredTensor]] = {}
        for block in manifest.blocks:
            for tensor in block.tensors:
                parts.setdefault((tensor.name, tensor.expert), []).append(tensor)
        for tensors in parts.values():
            if tensors[0].first_row is None and len(tensors) == 1:
                continue
            row = 0
            for tensor in tensors:
                if tensor.first_row != row:
                    raise self.fail(f"part {tensor.key!r} of a tensor does not begin at row {row}, as it should")
                row += tensor.shape[0]

    def check_files(self, manifest: Manifest) -> None:
        ends: dict[str, tuple[int, str]] = {}
        folders: dict[str, int] = {}
        for block in manifest.blocks:
            if block.folder > len(manifest.stripes) or folders.setdefault(block.file, block.folder) != block.folder:
                raise self.fail(f"block {block.name!r} is in folder {block.folder}, where its file is not")
            if block.folder and block.kind == "embedding":
                raise self.fail(f"block {block.name!r} is looked up by row and must be in the store's own folder")
        for block in sorted(manifest.blocks, key=lambda block: (block.file, block.offset, block.nbytes)):
            end, before = ends.get(block.file, (0, ""))
            if block.offset < end:
                raise self.fail(f"blocks {before!r} and {block.name!r} overlap in {block.file}")
            ends[block.file] = block.offset + block.nbytes, block.name
        for file, (end, name) in ends.items():
            path = manifest.folders(self.folder)[folders[file]] / file
            try:
                size = path.stat().st_size
            except OSError as error:
                raise StoreError(
                    f"block store {self.folder}: {path if folders[file] else file} with block {name!r} cannot be read: "
                    f"{error.strerror}; "
                    "pack the checkpoint again"
                ) from error
            if size < end:
                raise StoreError(
                    f"block store {self.folder}: {path if folders[file] else file} has {size} bytes, block {name!r} "
                    f"ends at {end}; it is "
                    "truncated: "
                    "pack the checkpoint again"
                )
