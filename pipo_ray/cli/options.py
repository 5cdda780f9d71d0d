"""Options that `run` and `chat` share, and what they become: arguments of LLM, and SamplingParams."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from pipo_ray.cli.prompts import parse_ids
from pipo_ray.cli.terminal import progress_bar, say
from pipo_ray.errors import InputError
from pipo_ray.params import SamplingParams
from pipo_ray.plan.kv_disk import KVOnDisk
from pipo_ray.plan.transfer import Mode
from pipo_ray.quant.kv_policy import KVPrecision
from pipo_ray.quant.target import Target
from pipo_ray.session.background import give_way
from pipo_ray.session.memory import parse_size

if TYPE_CHECKING:
    from pipo_ray.llm import LLM

DTYPES = ("auto", "bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")
_LEAST_BYTES = 4096
"""A budget of fewer bytes was meant in another unit: no matrix has less."""
MODEL_HELP = "checkpoint folder, GGUF file, packed block store, or hub id (org/name)"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """MODEL, the budgets, and where it runs."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    group = parser.add_argument_group("memory and machine", "sizes are written like 3GiB, 512MB, 1.5G")
    group.add_argument("--memory", metavar="SIZE", help="all that may be taken from RAM; default: available RAM minus "
                       "the larger of 2 GiB and 25 %%")  # fmt: skip
    group.add_argument("--weight-memory", metavar="SIZE", help="of it, for weights: slots and resident blocks")
    group.add_argument("--gpu-memory", metavar="SIZE", help="all that may be taken from the GPU's memory")
    group.add_argument("--device", choices=DEVICES, default="auto", help="where to compute; default: %(default)s")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="what is computed in; default: the model's own")
    add_precision_option(group, "default: what the block store or a quantized checkpoint has, else 16bit")
    add_calibrate_option(group)
    group.add_argument("--max-model-len", metavar="N", type=int, help="context: prompt and answer, in tokens")
    group.add_argument("--max-batch-tokens", metavar="N", type=int, help="tokens that one sweep computes at most")
    group.add_argument("--mode", choices=get_args(Mode), default="performance", help="memory-saver: a quarter of the "
                       "memory for weights on their way, somewhat slower; default: %(default)s")  # fmt: skip
    group.add_argument("--kv-precision", metavar="P", help="bits of the KV cache: 16, 8 or 4, or a file with bits per "
                       'layer like {"layers": [["0-1", 16], ["*", 4]]}; default: 16')  # fmt: skip
    group.add_argument("--kv-in-ram", action="store_true", help="keep in RAM what the GPU has no room for of the KV "
                       "cache")  # fmt: skip
    group.add_argument("--kv-on-cpu", action=argparse.BooleanOptionalAction, help="keep all of a GPU's KV cache in RAM "
                       "and let the processor attend; default: where the KV of all prompts would take so much of the "
                       "GPU from the weights that this is faster")  # fmt: skip
    group.add_argument("--kv-on-disk", metavar="SIZE", help="keep on the drive what RAM has no room for of the KV "
                       "cache: so much, or auto: what the prompts can need")  # fmt: skip
    group.add_argument("--kv-folder", metavar="FOLDER", help="where that is, in a file without a name; default: the "
                       "cache folder")  # fmt: skip
    group.add_argument("--no-kv-encryption", action="store_true", help="write it as it is; default: encrypted with a "
                       "key that only memory has")  # fmt: skip
    group.add_argument("--no-prefix-cache", action="store_true", help="compute every prompt from its first token, also "
                       "what an earlier one began with")  # fmt: skip
    group.add_argument("--trace", metavar="FILE", help="write a trace that ui.perfetto.dev and chrome://tracing open")
    group.add_argument("--no-verify", action="store_true", help="skip the checksum of each block's first read")
    group.add_argument("--ray-address", metavar="ADDRESS", help="local: a private Ray, even where another one runs; "
                       "auto or HOST:PORT: join that one")  # fmt: skip
    group.add_argument("--background", action="store_true", help="give way to whatever else the PC does")
    group.add_argument("--dashboard", action="store_true", help="start Ray's dashboard, too")


def add_precision_option(parser: argparse._ActionsContainer, default: str) -> None:
    """--precision: bits of the weights."""
    parser.add_argument(
        "--precision", metavar="P", help="bits of the weights: int4 (groups of 64 columns), int4-g32, int4-g128, "
        "int4-g64-sym, int8, 16bit, source (what a quantized checkpoint has), a policy file, or auto: chosen tensor by "
        f"tensor from what is measured, for one of the two targets below; {default}",
    )  # fmt: skip
    parser.add_argument("--max-loss", metavar="X%", help="for --precision auto: so much more perplexity at most, "
                        "and at most ln(1 + X/100) nats of KL divergence a token, on the text that is measured on; the "
                        "fewest bytes with that")  # fmt: skip
    parser.add_argument("--max-size", metavar="SIZE", help="for --precision auto: the packed model without its "
                        "embedding table, and the least loss")  # fmt: skip


def add_calibrate_option(parser: argparse._ActionsContainer) -> None:
    """--calibrate: a text for int4 weights."""
    parser.add_argument(
        "--calibrate", metavar="FILE", nargs="?", const=True, default=False, help="round int4 weights for what a text "
        "makes of their inputs: more accurate at the same size, and packing takes far longer. Without FILE, text that "
        "comes with pipo_ray",
    )  # fmt: skip


def add_sampling_options(parser: argparse.ArgumentParser, *, temperature: float, max_tokens: int) -> None:
    """How tokens are chosen and where an answer ends."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", metavar="N", type=int, default=max_tokens, help="default: %(default)s")
    group.add_argument("--temperature", metavar="X", type=float, default=temperature,
                       help="0 takes the most probable token; default: %(default)s")  # fmt: skip
    group.add_argument(
        "--top-p", metavar="X", type=float, default=1.0, help="keep the most probable tokens up to this sum"
    )
    group.add_argument("--top-k", metavar="N", type=int, default=0, help="keep so many of the most probable tokens")
    group.add_argument(
        "--min-p", metavar="X", type=float, default=0.0, help="drop tokens below this share of the first"
    )
    group.add_argument("--repetition-penalty", metavar="X", type=float, default=1.0, help="above 1: repeat less")
    group.add_argument("--presence-penalty", metavar="X", type=float, default=0.0, help="from -2 to 2")
    group.add_argument("--frequency-penalty", metavar="X", type=float, default=0.0, help="from -2 to 2")
    group.add_argument("--seed", metavar="N", type=int, help="makes the random numbers repeatable")
    group.add_argument("--stop", metavar="TEXT", action="append", help="end where this text begins; may be repeated")
    group.add_argument(
        "--stop-token-ids", metavar="IDS", action="append", default=[], help="end at one of these tokens: 1,2,3"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-sequence token")


def sampling_params(options: argparse.Namespace, **more: Any) -> SamplingParams:
    """Of what `add_sampling_options` parsed, and `more`. Raises InputError."""
    names = (
        "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
        "frequency_penalty", "seed", "stop", "ignore_eos",
    )  # fmt: skip
    stop_ids = [one for text in options.stop_token_ids for one in parse_ids(text, "--stop-token-ids")]
    return SamplingParams(**{name: getattr(options, name) for name in names}, stop_token_ids=stop_ids or None, **more)


def engine_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """LLM's keyword arguments of what `add_model_options` parsed; what was not given is left out. Raises InputError."""
    arguments: dict[str, Any] = {"device": options.device, "dtype": options.dtype, "dashboard": options.dashboard}
    if options.background:
        arguments["background"] = True
    for name in ("memory", "weight_memory", "gpu_memory"):
        if (size := getattr(options, name)) is not None:
            arguments[name] = _budget(size, "--" + name.replace("_", "-"))
    for name in ("max_model_len", "max_batch_tokens"):
        if (number := getattr(options, name)) is not None:
            if number < 1:
                raise InputError(f"--{name.replace('_', '-')} {number} is too low; give a whole number above 0")
            arguments[name] = number
    if "gpu_memory" in arguments and options.device == "cpu":
        raise InputError("--gpu-memory means nothing with --device cpu; leave one of them out")
    Target.parse(options.precision, options.max_loss, options.max_size)
    for name in ("precision", "max_loss", "max_size"):
        if (value := getattr(options, name)) is not None:
            arguments[name] = value
    if options.calibrate is not False:
        arguments["calibrate"] = options.calibrate
    if options.mode != "performance":
        arguments["mode"] = options.mode
    if options.kv_precision is not None:
        KVPrecision.parse(options.kv_precision)  # what is wrong with it is said before a model is downloaded
        arguments["kv_precision"] = options.kv_precision
    if options.kv_in_ram:
        arguments["kv_in_ram"] = True
    if options.kv_on_cpu is not None:
        arguments["kv_on_cpu"] = options.kv_on_cpu
    if options.kv_on_disk is not None:
        arguments["kv_on_disk"] = _kv_on_disk(options)
    elif options.kv_folder is not None or options.no_kv_encryption:
        raise InputError(
            "--kv-folder and --no-kv-encryption mean nothing without --kv-on-disk; add it, or leave them out"
        )
    if options.no_prefix_cache:
        arguments["prefix_cache"] = False
    if options.no_verify:
        arguments["verify_checksums"] = False
    if options.ray_address is not None:
        arguments["ray_address"] = options.ray_address
    if options.trace is not None:
        arguments["trace"] = writable(Path(options.trace), "--trace")
    return arguments


def _budget(size: str, name: str) -> int:
    """Bytes. Raises InputError for a number that somebody meant in another unit."""
    nbytes = parse_size(size, name)
    if size.isdecimal() and nbytes < _LEAST_BYTES:
        raise InputError(f"{name} {size}: a number without a unit counts bytes; write {size}GiB or {size}MiB")
    return nbytes


def _kv_on_disk(options: argparse.Namespace) -> KVOnDisk:
    size = None if options.kv_on_disk == "auto" else parse_size(options.kv_on_disk, "--kv-on-disk")
    return KVOnDisk(size, options.kv_folder, not options.no_kv_encryption)


def writable(path: Path, option: str) -> Path:
    """`path`, or InputError where no file can be written there: an hour later would be the wrong time to find out."""
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder; give the name of a file")
    if not path.absolute().parent.is_dir():
        raise InputError(
            f"{option} {path}: there is no folder {path.absolute().parent}; make it, or choose another file"
        )
    existed = path.exists()
    try:
        with open(path, "ab"):
            pass
    except OSError as error:
        raise InputError(f"{option} {path} cannot be written: {error.strerror}; choose another file") from error
    if not existed:
        path.unlink()
    return path


def find_folder(model: str) -> Path:
    """The model's folder; a hub id is downloaded. Raises InputError."""
    from pipo_ray.prepare import find_model

    with progress_bar() as progress:
        return find_model(model, progress)


@contextmanager
def open_llm(model: str, arguments: dict[str, Any], before_start: Callable[[LLM], None] | None = None) -> Iterator[LLM]:
    """A running LLM; says how it uses the memory. `before_start` may refuse what it is to be asked."""
    from pipo_ray.llm import LLM

    if arguments.get("background"):
        give_way([os.getpid()])  # packing, which comes first, included

    with progress_bar() as progress:
        llm = LLM(model, on_progress=progress, before_start=before_start, **arguments)
    with llm:
        for line in llm.describe():
            say(line)
        yield llm
