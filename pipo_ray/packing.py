"""Everything that needs torch before a run begins: download, look at the model, pack. Runs in a process of its own.

`packing_process.py` starts it (`main`), so that the memory that torch and transformers take is given back when the
store is there. It writes one JSON object per line to stdout:

    {"type": "progress", "phase": "pack", "done": BYTES, "total": BYTES}
    {"type": "result", ...}                                             the last line of a job that succeeded
    {"type": "error", "class": NAME, "message": ONE LINE}               the last line of one that did not

Its stdin is a pipe that nobody writes to: when it closes, the parent wants no more of it or is gone, and it ends.
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from pipo_ray.compiled.support import machine_panel_bytes
from pipo_ray.errors import InputError, PipoError
from pipo_ray.packing_plan import PackingPlan, check_precisions, count_tokens, opened
from pipo_ray.quant.calibration_text import CalibrationText
from pipo_ray.quant.foreign.detect import SOURCE_KEY, source_format
from pipo_ray.quant.formats import AS_SOURCE
from pipo_ray.quant.panels import Panels, machine_layout
from pipo_ray.quant.policy import POLICY_KEY, Precision
from pipo_ray.quant.target import Target

if TYPE_CHECKING:
    from pipo_ray.compiled.quantizer import CompiledRounding
    from pipo_ray.model.blocks import BlockSpec
    from pipo_ray.quant.ahead import PanelsAhead
    from pipo_ray.store.checkpoint import Checkpoint
    from pipo_ray.store.manifest import Manifest
    from pipo_ray.store.source import TensorSource

PRECISIONS = ("bfloat16", "float16", "float32")
PACKING_SLOT_BYTES = 64 << 20
"""What packing may take for its buffers. Larger ones were not faster: it is the disk that packing waits for."""

GENERATION_CONFIG_KEY = "generation_config"
"""In the manifest's `extra`: checksum of the generation_config.json that the facts were found with."""

Progress = Callable[[str, int, int], None]

_PROGRESS_INTERVAL_S = 0.1
_STOP_DEADLINE_S = 5.0
_STOP_AGAIN_S = 0.005
_NETWORK_STALL_S = 120.0


# --- the work --------------------------------------------------------------------------------------------------------


def own_precision(config: Mapping[str, Any]) -> str:
    """What `--dtype auto` means for a checkpoint with this config.json: its own dtype, else float32."""
    text = config.get("text_config")
    for fields in (config, text if isinstance(text, Mapping) else {}):
        for name in ("dtype", "torch_dtype"):
            if isinstance(own := fields.get(name), str) and own:
                own = own.removeprefix("torch.")
                return own if own in PRECISIONS else "float32"
    return "float32"


def chosen_precision(policy: Precision | None, config: Mapping[str, Any], where: object) -> Precision:
    """What holds for the checkpoint `where` with this config.json: `policy`; without one, 16 bits, or what a quantized
    checkpoint has.
    """
    if policy is not None:
        return policy
    return Precision() if source_format(config, where) is None else Precision.parse(AS_SOURCE)


def packed_dtype(dtype: str, policy: Precision, config: Mapping[str, Any]) -> str:
    """The dtype of a store: what `dtype` means, and bfloat16 with low-bit weights, whose kernels take no other.

    Raises InputError for another dtype with low-bit weights.
    """
    source = source_format(config, "config.json")
    if not policy.asks_for_few_bits and not (policy.is_low_bit and source is not None and source.has_codes):
        return own_precision(config) if dtype == "auto" else dtype
    if dtype not in ("auto", "bfloat16"):
        raise InputError(
            f"--dtype {dtype} with --precision {policy.label}: a model with low-bit weights is computed in bfloat16; "
            f"leave --dtype out{'' if policy.asks_for_few_bits else ', or add --precision 16bit'}"
        )
    return "bfloat16"


def generation_config_checksum(folder: str | os.PathLike[str]) -> str:
    """Checksum of the folder's generation_config.json (hex), empty if it has none."""
    import xxhash

    try:
        return xxhash.xxh3_128(Path(folder, "generation_config.json").read_bytes()).hexdigest()
    except OSError:
        return ""


def pack_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    quantization: Precision | None = None,
    slot_bytes: int = PACKING_SLOT_BYTES,
    progress: Progress | None = None,
    wait: bool = False,
    stripes: Sequence[str] = (),
    calibration: CalibrationText | None = None,
    memory: int | None = None,
    own_process: bool = False,
) -> Manifest:
    """Pack the checkpoint folder or GGUF file `source` into a block store at `destination`, with the model's facts in
    its manifest.

    `dtype` is "auto" (the checkpoint's own) or one of PRECISIONS; with low-bit weights, as `quantization` chooses them,
    it must be "auto" or bfloat16. Without `quantization` weights have 16 bits, or what a quantized checkpoint has.
    `progress` gets (phase, done, total): "inspect" with a total of 0, then "pack" in bytes. `wait` for another process
    that packs to the same place, or raise. `stripes` are further folders, on other drives. With `calibration`, int4
    weights are rounded with that text (phase "calibrate", in bytes), in at most `memory` bytes. Imports torch and
    transformers into this process; `prepare_store` does it in another: with `own_process` only the parts of
    transformers that are needed are imported, and the first weights are read meanwhile.

    Raises what cannot be packed before anything is written: CheckpointError, UnsupportedModelError, BudgetError for the
    disk, and for `memory`; see `pack` in `store/pack.py` for the rest.
    """
    report: Progress = progress or (lambda phase, done, total: None)
    report("inspect", 0, 0)
    with opened(Path(source)) as checkpoint, contextlib.ExitStack() as stack:
        policy = chosen_precision(quantization, checkpoint.config, checkpoint.origin)
        precision = packed_dtype(dtype, policy, checkpoint.config)
        rounding = _rounding() if policy.is_low_bit else None
        ahead = None
        if own_process:
            if calibration is None and not _is_begun(Path(destination)):
                ahead = _panels_ahead(checkpoint, policy, rounding, stack)
            _import_torch()
        from pipo_ray.quant.source import QuantizedSource
        from pipo_ray.store.pack import BlockSource, pack

        plan = PackingPlan.of(checkpoint, precision)
        tensors, codes, facts = plan.tensors, plan.codes, plan.facts
        blocks = plan.assigned(policy)
        extra = {"facts": facts.to_json(), GENERATION_CONFIG_KEY: generation_config_checksum(source)}
        if codes is not None:
            extra[SOURCE_KEY] = codes.describe(blocks)
        if policy.is_low_bit:
            extra[POLICY_KEY] = policy.to_json()
        if ahead is not None:
            ahead.settle(_bf16_panels(tensors, blocks))
        reader: BlockSource = tensors
        prepare = None
        if policy.is_low_bit:
            reader = quantized = stack.enter_context(QuantizedSource(tensors, None, codes, rounding, ahead))
        if calibration is not None:
            from pipo_ray.quant.calibrated import CalibratedSource, calibrate

            folder = Path(destination).absolute().parent
            nbytes = sum(tensor.nbytes for tensor in plan.model.state_dict().values())
            reader = calibrated = stack.enter_context(CalibratedSource(quantized, blocks, folder))
            prepare = calibrate(
                calibrated, calibration, plan.plain, plan.config, facts, memory=memory, extra=extra,
                progress=lambda done, total: report("calibrate", done * nbytes // total, nbytes),
            )  # fmt: skip
        return pack(
            blocks,
            reader,
            destination,
            checkpoint=plan.plain,
            aliases=tensors.aliases,
            architecture=checkpoint.architecture,
            model_type=checkpoint.model_type,
            precision=tensors.precision,
            slot_bytes=slot_bytes,
            progress=lambda done, total: report("pack", done, total),
            extra=extra,
            wait=wait,
            stripes=stripes,
            content="" if calibration is None else json.dumps(calibration.to_json()),
            prepare=prepare,
        )


def _import_torch() -> None:
    """Torch and transformers, for ever: looking for garbage among a million new objects, again and again, takes a fifth
    of the time.
    """
    gc.disable()
    try:
        from pipo_ray.model.lean_transformers import import_transformers
        from pipo_ray.prepare import profile_folder

        import_transformers(profile_folder())
    finally:
        gc.freeze()
        gc.enable()


def _is_begun(destination: Path) -> bool:
    """Whether there may be nothing, or little, to be packed."""
    return destination.exists() or destination.with_name(f"{destination.name}.partial").exists()


def _panels_ahead(
    checkpoint: Checkpoint, policy: Precision, rounding: CompiledRounding | None, stack: contextlib.ExitStack
) -> PanelsAhead | None:
    """What reads and rounds weights from when torch is imported on, entered into `stack`."""
    if rounding is None or checkpoint.origin.is_file() or source_format(checkpoint.config, checkpoint.origin):
        return None
    from pipo_ray.quant.ahead import PanelsAhead, guessed_panels, read_ahead_bytes

    guesses = guessed_panels(checkpoint, policy, machine_layout(), machine_panel_bytes())
    return stack.enter_context(PanelsAhead(checkpoint, guesses, rounding, read_ahead_bytes()))


def _bf16_panels(tensors: TensorSource, blocks: Sequence[BlockSpec]) -> dict[str, Panels]:
    """By the checkpoint's names, what becomes panels of tensors that lie there in bf16."""
    wanted = [spec for block in blocks for spec in block.tensors if spec.panels is not None]
    return {key: spec.panels for spec in wanted if spec.panels and (key := tensors.bf16_key(spec)) is not None}


def _rounding() -> CompiledRounding | None:
    """The compiled kernel, where it can be had; without it torch rounds, to the same bits."""
    from pipo_ray.compiled.quantizer import CompiledRounding
    from pipo_ray.prepare import code_folder

    try:
        return CompiledRounding(code_folder())
    except ImportError:
        return None


# --- the process -----------------------------------------------------------------------------------------------------


class _Stopped(BaseException):
    """The parent is gone, or wants no more."""


class _Channel:
    """The parent's end of our stdout. Thread-safe: progress comes from the writing thread, too."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._sent: tuple[str, float] = ("", 0.0)
        self.last_progress = time.monotonic()

    def send(self, **message: Any) -> None:
        with self._lock, contextlib.suppress(BrokenPipeError):
            self._stream.write(json.dumps(message) + "\n")
            self._stream.flush()

    def progress(self, phase: str, done: int, total: int) -> None:
        """As often as a person can see, and always the first and the last of a phase."""
        now = self.last_progress = time.monotonic()
        before, when = self._sent
        if phase != before or done >= total or now - when >= _PROGRESS_INTERVAL_S:
            self._sent = (phase, now)
            self.send(type="progress", phase=phase, done=done, total=total)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one job. Returns the exit status."""
    _obey_parent()
    # Whatever a library prints belongs to stderr: stdout is the protocol's.
    channel = _Channel(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    try:
        channel.send(type="result", **_job(_arguments(arguments), channel))
        return 0
    except _Stopped:
        return 130
    except PipoError as error:
        traceback.print_exc()
        channel.send(**{"type": "error", "class": type(error).__name__, "message": _one_line(error)})
        return error.exit_status
    except MemoryError:
        message = "packing ran out of memory; close other programs or raise the memory limit, and run it again"
        channel.send(**{"type": "error", "class": "ResourceError", "message": message})
        return 2
    except Exception as error:
        traceback.print_exc()
        message = f"preparing the model failed: {type(error).__name__}: {_one_line(error)}"
        channel.send(**{"type": "error", "class": "PipoError", "message": message})
        return 1


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pipo_ray.packing")
    jobs = parser.add_subparsers(dest="job", required=True)
    packing = jobs.add_parser("pack")
    packing.add_argument("source")
    packing.add_argument("destination")
    packing.add_argument("--dtype", default="auto")
    packing.add_argument("--precision", type=lambda text: Precision.from_json(json.loads(text)))
    packing.add_argument("--policy-file", type=Path)
    packing.add_argument("--slot-bytes", type=int, default=PACKING_SLOT_BYTES)
    packing.add_argument("--wait", action="store_true")
    packing.add_argument("--stripe", action="append", default=[])
    packing.add_argument("--calibrate", type=CalibrationText.load)
    packing.add_argument("--memory", type=int)
    for name in ("choose", "measure"):
        choosing = jobs.add_parser(name)
        choosing.add_argument("source")
        choosing.add_argument("cache", type=Path)
        choosing.add_argument("--text", type=CalibrationText.load)
        choosing.add_argument("--memory", type=int)
        choosing.add_argument("--target", type=lambda text: Target(**json.loads(text)))
    checking = jobs.add_parser("check")
    checking.add_argument("source", type=Path)
    checking.add_argument("--policy", action="append", default=[], type=_policy_and_dtype)
    checking.add_argument("--text", type=Path)
    jobs.add_parser("facts").add_argument("store")
    jobs.add_parser("download").add_argument("model_id")
    return parser.parse_args(arguments)


def _policy_and_dtype(text: str) -> tuple[Precision, str]:
    raw, file, dtype = json.loads(text)
    return replace(Precision.from_json(raw), file=file and Path(file)), dtype


def _job(options: argparse.Namespace, channel: _Channel) -> dict[str, Any]:
    if options.job == "pack":
        manifest = pack_checkpoint(
            options.source,
            options.destination,
            dtype=options.dtype,
            quantization=options.precision and replace(options.precision, file=options.policy_file),
            slot_bytes=options.slot_bytes,
            progress=channel.progress,
            wait=options.wait,
            stripes=options.stripe,
            calibration=options.calibrate,
            memory=options.memory,
            own_process=True,
        )
        return {"total_bytes": manifest.total_bytes}
    if options.job in ("choose", "measure"):
        from pipo_ray.quant.auto import choose_policy, measure_model

        common = {
            "cache": options.cache, "text": options.text, "progress": channel.progress, "memory": options.memory,
        }  # fmt: skip
        if options.job == "measure":
            return {"measured": measure_model(options.source, **common).to_json()}
        return {"chosen": choose_policy(options.source, options.target, **common).to_json()}
    if options.job == "check":
        channel.progress("inspect", 0, 0)
        _import_torch()
        num_tokens = None
        if options.text is not None:
            num_tokens = count_tokens(options.source, options.text.read_text(encoding="utf-8"))
        if options.policy:
            check_precisions(options.source, options.policy)
        return {"num_tokens": num_tokens}
    if options.job == "facts":
        channel.progress("inspect", 0, 0)
        from pipo_ray.model.inspect import facts_of_store
        from pipo_ray.store.manifest import Manifest

        return {"facts": facts_of_store(options.store, Manifest.load(options.store)).to_json()}
    threading.Thread(target=_watch_network, args=(options.model_id, channel), daemon=True).start()
    from pipo_ray.download import download

    return {"folder": str(download(options.model_id, channel.progress))}


def _obey_parent() -> None:
    """End when stdin closes. The terminal's Ctrl-C reaches us, too, but the parent is the one to act on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    sys.unraisablehook = _stop_again
    threading.Thread(target=_watch_parent, daemon=True).start()


def _watch_parent() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    _thread.interrupt_main(signal.SIGTERM)
    time.sleep(_STOP_DEADLINE_S)
    os._exit(130)


def _watch_network(model_id: str, channel: _Channel) -> None:
    """A server that accepts and then says nothing must not hold us for ever."""
    while time.monotonic() - channel.last_progress < _NETWORK_STALL_S:
        time.sleep(1)
    message = (
        f"downloading the hub model {model_id}: nothing came for {_NETWORK_STALL_S:.0f} s; check the network and run "
        "it again, it goes on where it stopped"
    )
    channel.send(**{"type": "error", "class": "ResourceError", "message": message})
    os._exit(2)


def _stop(*_: Any) -> NoReturn:
    raise _Stopped


def _stop_again(unraisable: sys.UnraisableHookArgs) -> None:
    """Python drops what is raised while it finalizes an object, as happens behind every chunk that was read: the order
    to stop, too.
    """
    if not issubclass(unraisable.exc_type, _Stopped):
        sys.__unraisablehook__(unraisable)
        return
    # Later, and from another thread: in here it would be dropped again.
    again = threading.Timer(_STOP_AGAIN_S, _thread.interrupt_main, [signal.SIGTERM])
    again.daemon = True
    again.start()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
