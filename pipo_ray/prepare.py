"""From what the user names (a folder, a store, a hub id) to a packed block store, without importing torch.

What needs torch runs in a child process (`packing.py`), so the driver stays small. A checkpoint is packed once into
the cache folder:

    $PIPO_CACHE, else $XDG_CACHE_HOME/pipo, else ~/.cache/pipo
        stores/<name>-<dtype>-<key>/    the block store; the key changes with checkpoint, dtype and format; with low-bit
                                        weights <precision> for <dtype>, and the key changes with policy and processor
        policies/<key>.json             what --precision auto chose for a target, and measured of a checkpoint
        facts/<key>.json                facts of a store found anew for the installed transformers
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipo_ray.auto_precision import choose_precision
from pipo_ray.errors import BudgetError, CheckpointError, InputError, ResourceError, StoreError
from pipo_ray.json_file import write_json
from pipo_ray.model.facts import FACTS_KEY, ModelFacts, installed_transformers
from pipo_ray.model.registry import require_supported
from pipo_ray.packing import (
    GENERATION_CONFIG_KEY,
    PRECISIONS,
    chosen_precision,
    generation_config_checksum,
    packed_dtype,
)
from pipo_ray.packing_process import run_job
from pipo_ray.quant.calibration_text import (
    METHOD,
    CalibrationText,
    calibration_text,
    can_calibrate,
    stored_calibration,
)
from pipo_ray.quant.panels import machine_layout
from pipo_ray.quant.policy import POLICY_KEY, Precision
from pipo_ray.quant.summary import describe_precision
from pipo_ray.quant.target import Chosen, Target
from pipo_ray.store.checkpoint import Checkpoint
from pipo_ray.store.gguf_file import find_gguf, open_checkpoint
from pipo_ray.store.manifest import JOURNAL_NAME, MANIFEST_NAME, PLAIN_VERSION, Manifest, is_store, require_free_place
from pipo_ray.store.stripe_folder import refuse_stripe, stripe_folders

DTYPES = ("auto", *PRECISIONS)
Progress = Callable[[str, int, int], None]

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")  # the hub's oldest models have one part: gpt2
_WANTED = "give a checkpoint folder, a GGUF file, a block store, or a hub id such as org/name"
_SIXTEEN = Precision().to_json()


@dataclass(frozen=True)
class PreparedStore:
    """A block store that is ready to run. `packed_now`: it was packed by this call. `chosen`: by --precision auto."""

    folder: Path
    manifest: Manifest
    facts: ModelFacts
    packed_now: bool
    chosen: Chosen | None = None

    def describe(self, layouts: Sequence[str] = (), obstacle: str | None = None) -> list[str]:
        """Lines for the user: its precision, where that is not plain; the arguments are `describe_precision`'s."""
        chosen = [] if self.chosen is None else [str(self.chosen)]
        return [*chosen, *describe_precision(self.manifest, layouts, obstacle)]


def prepare_store(
    model: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    precision: str | None = None,
    target: Target | None = None,
    on_progress: Progress | None = None,
    cache: str | os.PathLike[str] | None = None,
    calibrate: bool | str | os.PathLike[str] = False,
    memory: int | None = None,
) -> PreparedStore:
    """The block store of `model`: a checkpoint folder, a block store, or a hub id such as "org/name".

    `dtype` is one of DTYPES, `precision` what `Precision.parse` takes, or None for what the store or a
    quantized checkpoint has, else 16 bits. With a `target` it is chosen (`choose_precision`).
    `on_progress` gets (phase, done, total) with the phases "download" and "pack" in bytes and
    "inspect"; a total of 0 is unknown. `cache` is used in place of `cache_folder()`. With `calibrate`, int4 weights are
    rounded with the bundled text, or a text file (phase "calibrate"). Neither that nor measuring for a `target` takes
    more than `memory` bytes.

    Raises InputError and its children, all with one line; what the child process found wrong comes as the class that it
    raised there.
    """
    check_dtype(dtype)
    root = Path(cache) if cache is not None else cache_folder()
    if target is not None:
        text = calibration_text(calibrate, None)
        folder = find_model(model, on_progress)
        chosen = choose_precision(folder, target, cache=root, dtype=dtype, on_progress=on_progress, memory=memory)
        if not can_calibrate(chosen.policy):
            text = None
        prepared = _prepare_checkpoint(folder, dtype, chosen.policy, root, on_progress, text, memory)
        return replace(prepared, chosen=chosen)
    policy = None if precision is None else Precision.parse(precision)
    folder = find_model(model, on_progress)
    refuse_stripe(folder)
    if (folder / MANIFEST_NAME).exists() or (folder / JOURNAL_NAME).exists():
        manifest = Manifest.load(folder)
        if dtype not in ("auto", manifest.precision):
            raise InputError(
                f"--dtype {dtype}: the block store {folder} holds {manifest.precision}; leave --dtype out, or pack the "
                f"checkpoint again with `pipo pack --dtype {dtype}`"
            )
        if policy is not None and policy != (stored := Precision.from_json(manifest.extra.get(POLICY_KEY, _SIXTEEN))):
            raise InputError(
                f"--precision {precision}: the block store {folder} holds {stored.label}; leave --precision out, or "
                f"pack the checkpoint again with `pipo pack --precision {precision}`"
            )
        text = calibration_text(calibrate, None)
        if text is not None and stored_calibration(manifest.extra) != text.to_json():
            raise InputError(
                f"--calibrate: the block store {folder} was not calibrated on {text.file}; leave --calibrate out, or "
                "pack the checkpoint again with `pipo pack --calibrate`"
            )
        if not (folder / "config.json").is_file():
            raise StoreError(f"block store {folder} has no config.json; pack the checkpoint again")
        return PreparedStore(folder, manifest, _facts(folder, manifest, root, on_progress), packed_now=False)
    text = calibration_text(calibrate, policy or Precision())
    return _prepare_checkpoint(folder, dtype, policy, root, on_progress, text, memory)


def check_before_packing(
    folder: Path,
    precisions: Sequence[str],
    *,
    dtype: str = "auto",
    text: Path | None = None,
    on_progress: Progress | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> int | None:
    """Raise what is wrong with any of `precisions` for the checkpoint `folder` before the first of them is packed: a
    policy for another model, a format that does not fit. The other arguments are those of `prepare_store`; what is
    packed already is not looked at again.

    Returns how many tokens the UTF-8 file `text` has, without what begins a text; None if there is no `text`, or the
    checkpoint has no tokenizer.
    """
    check_dtype(dtype)
    root = Path(cache) if cache is not None else cache_folder()
    job = ["check", str(folder)] + ([] if text is None else [f"--text={text.absolute()}"])
    with open_checkpoint(folder) as checkpoint:
        require_supported(checkpoint.config, folder / "config.json")
        unpacked = []
        for policy in map(Precision.parse, precisions):
            policy.require_model(checkpoint)
            own = packed_dtype(dtype, policy, checkpoint.config)
            if _cached(root / "stores" / _store_name(checkpoint, own, policy, None)) is None:
                file = None if policy.file is None else str(policy.file)
                unpacked.append(f"--policy={json.dumps([policy.to_json(), file, own])}")
    if text is None and not unpacked:
        return None
    found: int | None = run_job([*job, *unpacked], on_progress)["num_tokens"]
    return found


def pack_store(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    precision: str | Precision | None = None,
    on_progress: Progress | None = None,
    stripes: Sequence[str | os.PathLike[str]] = (),
    calibrate: bool | str | os.PathLike[str] = False,
    memory: int | None = None,
) -> Manifest:
    """Pack `source`, a checkpoint folder or a hub id, to `destination`, in a child process. `precision` as for
    `prepare_store`, or a policy; `calibrate` and `memory`, too. `stripes` are further folders, on other drives, that
    share the weights with `destination`.

    Raises as `prepare_store` does.
    """
    check_dtype(dtype)
    asked = Precision.parse(precision) if isinstance(precision, str) else precision
    text = calibration_text(calibrate, asked or Precision())
    folder = find_model(source, on_progress)
    refuse_stripe(folder)
    # What is wrong with it is known at once, and torch takes seconds to import.
    with open_checkpoint(folder) as checkpoint:
        require_supported(checkpoint.config, folder / "config.json")
        policy = chosen_precision(asked, checkpoint.config, folder)
        policy.require_model(checkpoint)
        dtype = packed_dtype(dtype, policy, checkpoint.config)
    require_free_place(Path(destination).absolute())
    others = [f"--stripe={stripe}" for stripe in stripe_folders(Path(destination).absolute(), stripes)]
    job = _pack_job(folder, Path(destination).absolute(), dtype, policy, text, memory)
    run_job([*job, *others], on_progress)
    return Manifest.load(destination)


def check_dtype(dtype: str) -> None:
    """Raise InputError for a dtype that is not one of DTYPES."""
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype!r} is not known; give one of {', '.join(DTYPES)}")


def profile_folder() -> Path:
    """Where it is kept what was measured, or read, once for this machine."""
    return cache_folder() / "profiles"


def code_folder() -> Path:
    """Where machine code is kept that was compiled for this processor."""
    return cache_folder() / "machine-code"


def cache_folder() -> Path:
    """Where checkpoints are packed to; see the head of this file."""
    if named := os.environ.get("PIPO_CACHE"):
        return Path(named).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and ignored.
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "pipo"
    except RuntimeError as error:
        raise ResourceError("there is no home folder for the cache; set PIPO_CACHE to a folder") from error


def find_model(model: str | os.PathLike[str], on_progress: Progress | None = None) -> Path:
    """The folder or GGUF file that `model` names, absolute; a hub id is downloaded.

    Raises InputError if it is neither, ResourceError if the hub cannot be reached.
    """
    text = os.fspath(model)
    if not text or "\0" in text:
        raise InputError(f"MODEL is {text!r}; {_WANTED}")
    path = Path(text).expanduser() if text.startswith("~") else Path(text)
    try:
        if (file := find_gguf(path)) is not None:
            return file.absolute()
        if path.is_dir():
            return path.absolute()
        exists = os.path.lexists(path)
    except OSError as error:
        raise CheckpointError(f"{text[:200]} cannot be read: {error.strerror}; check the path") from error
    if exists:
        what = "a link to nothing" if path.is_symlink() and not path.exists() else "a file, not a folder"
        raise CheckpointError(f"{text} is {what}; give the folder that has the model's config.json")
    if _is_hub_id(text):
        return Path(run_job(["download", text], on_progress)["folder"])
    raise CheckpointError(f"no such folder: {text}; {_WANTED}")


def _is_hub_id(text: str) -> bool:
    """Whether it is meant for the hub: `org/name` or `name`, and the first part is no folder here."""
    return bool(_HUB_ID.fullmatch(text)) and not os.path.lexists(text.partition("/")[0])


# --- a checkpoint, packed once ---------------------------------------------------------------------------------------


def _pack_job(
    folder: Path, destination: Path, dtype: str, policy: Precision, text: CalibrationText | None, memory: int | None
) -> list[str]:
    job = ["pack", str(folder), str(destination), "--dtype", dtype, "--precision", json.dumps(policy.to_json())]
    if policy.file is not None:
        job.append(f"--policy-file={policy.file}")
    if text is not None:
        job += [f"--calibrate={text.file.absolute()}"] + ([] if memory is None else ["--memory", str(memory)])
    return job


def _prepare_checkpoint(
    folder: Path,
    dtype: str,
    asked: Precision | None,
    root: Path,
    on_progress: Progress | None,
    text: CalibrationText | None,
    memory: int | None,
) -> PreparedStore:
    with open_checkpoint(folder) as checkpoint:
        require_supported(checkpoint.config, folder / "config.json")
        policy = chosen_precision(asked, checkpoint.config, folder)
        policy.require_model(checkpoint)
        dtype = packed_dtype(dtype, policy, checkpoint.config)
        store = root / "stores" / _store_name(checkpoint, dtype, policy, text)
        if (manifest := _cached(store)) is not None:
            _refresh_side_files(checkpoint, store)
            with contextlib.suppress(StoreError):  # packed for another transformers: packed again below
                return PreparedStore(store, manifest, _facts(store, manifest, root, on_progress), packed_now=False)
        _remove(store)
    try:
        run_job([*_pack_job(folder, store, dtype, policy, text, memory), "--wait"], on_progress)
    except BudgetError as error:
        if "disk" not in str(error):  # it is the memory for calibration
            raise
        raise BudgetError(f"{error} (packed models go to {root}; PIPO_CACHE sets another folder)") from error
    manifest = Manifest.load(store)
    return PreparedStore(store, manifest, _facts(store, manifest, root, on_progress), packed_now=True)


def _store_name(checkpoint: Checkpoint, dtype: str, policy: Precision, text: CalibrationText | None) -> str:
    import xxhash

    parts = [checkpoint.fingerprint(), dtype, PLAIN_VERSION]
    if policy.is_low_bit:
        parts += [replace(policy, model=None).to_json(), machine_layout()]
    if text is not None:
        parts.append(text.to_json())
    key = xxhash.xxh3_128(json.dumps(parts).encode()).hexdigest()
    what = policy.label if policy.is_low_bit else dtype
    if text is not None:
        what += f"-{METHOD}"
    name = checkpoint.folder.name
    for parent in checkpoint.folder.parents:
        if parent.name.startswith("models--"):  # a snapshot in the hub's cache is named by its commit
            name = parent.name.removeprefix("models--")
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', name).strip('-.')[:60] or 'model'}-{what}-{key[:16]}"


def _cached(store: Path) -> Manifest | None:
    """The manifest of a sound store in the cache."""
    if not is_store(store):
        return None
    try:
        return Manifest.load(store)
    except StoreError:
        return None


def _remove(store: Path) -> None:
    """Make room for a store in our own cache: what lies there is damaged or of no use with this transformers."""
    try:
        if store.exists():
            shutil.rmtree(store)
    except OSError as error:
        raise ResourceError(f"{store} cannot be removed: {error.strerror}; remove it, or set PIPO_CACHE") from error


def _refresh_side_files(checkpoint: Checkpoint, store: Path) -> None:
    """Carry over what changed in the checkpoint's tokenizer or chat template since it was packed.

    A cache that cannot be written is used as it is.
    """
    with contextlib.suppress(OSError):
        for path in checkpoint.side_files:
            source, target = checkpoint.folder / path, store / path
            if target.is_file() and filecmp.cmp(source, target, shallow=False):
                continue
            target.parent.mkdir(exist_ok=True)
            scratch = target.with_name(f".{target.name}.{os.getpid()}")
            shutil.copyfile(source, scratch)
            os.replace(scratch, target)


# --- facts -----------------------------------------------------------------------------------------------------------


def _facts(folder: Path, manifest: Manifest, root: Path, on_progress: Progress | None) -> ModelFacts:
    """The manifest's facts if they hold for what is installed; else found anew in a child process, and cached."""
    generation = generation_config_checksum(folder)
    if manifest.extra.get(GENERATION_CONFIG_KEY, generation) == generation:
        facts = _parse_facts(manifest.extra.get(FACTS_KEY))
        if facts is not None and facts.transformers_version == installed_transformers():
            return facts
    path = root / "facts" / f"{_facts_key(folder, generation)}.json"
    with contextlib.suppress(OSError, ValueError):
        if (facts := _parse_facts(json.loads(path.read_text(encoding="utf-8")))) is not None:
            return facts
    raw = run_job(["facts", str(folder)], on_progress)["facts"]
    with contextlib.suppress(OSError):  # without a cache they are found anew every time
        write_json(path, raw)
    return ModelFacts.from_json(raw)


def _facts_key(folder: Path, generation: str) -> str:
    import xxhash

    digest = xxhash.xxh3_128((folder / MANIFEST_NAME).read_bytes())
    with contextlib.suppress(OSError):
        digest.update((folder / "config.json").read_bytes())
    digest.update(f"{generation} {installed_transformers()}".encode())
    return digest.hexdigest()


def _parse_facts(raw: object) -> ModelFacts | None:
    """None for something else: facts of another version of pipo_ray, or damaged."""
    try:
        return ModelFacts.from_json(raw) if isinstance(raw, dict) else None
    except (KeyError, TypeError, ValueError):
        return None
