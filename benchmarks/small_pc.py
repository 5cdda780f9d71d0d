"""A small PC against a model twice its memory: pipo beside Accelerate, llama.cpp and AirLLM, and the disk's limit.

How to run (root, memory controller of cgroup v1, fio, 40 GB of free disk; a quarter of an hour, and as much again the
first time, when the peers are installed and llama.cpp is compiled):

    python benchmarks/small_pc.py [--peers-folder FOLDER] [--peers accelerate,llama.cpp,airllm] [--json FILE]
    python benchmarks/small_pc.py --precision int4 [--memory 2GiB]     # four bits, beside llama.cpp's Q4_0
    python benchmarks/small_pc.py --precision int4 --in-turns --rounds 12 --tokens 12      # in memory
    python benchmarks/small_pc.py --quick        # a small model, to see whether everything works

The PC is a memory control group of --memory (4 GiB) and two cores; page cache and shared memory count in it. The model
has 16 layers of Llama-3-8B's dimensions, a vocabulary of 32,000 and random weights in bf16: 3.75 billion parameters,
7.5 GB. It is made in --peers-folder, as are the block store, the GGUF and AirLLM's shards (deleted at the end), all
outside of what is measured. Every contestant gets a fresh process in a fresh group and a cold page cache, its own
libraries included, and then does the same: --rounds times a prompt of 32 tokens and --tokens more, greedy, batch 1;
three prompts of 512; pipo also 16 prompts of 32 together. With --in-turns all are there at the same time, each in its
group, and each round is asked of one after the other: for models that fit, where the speed of the machine's memory,
which changes within minutes, decides; `/ pipo` is the median of the rounds' ratios then.

    first token     seconds from the request to the first token: the median of the rounds, of 512 of three
    s/token         median over the tokens behind each first one
    disk limit      (weights without the input embedding - (memory - 1.5 GiB)) / fio: no sweep can be faster
    x limit         median over the rounds of s/token by the limit of the moment, fio having run just before the round

The peers, each in what was fastest for it here: Accelerate keeps as many layers in RAM as the group allows and offloads
the rest to disk; llama.cpp maps the GGUF; AirLLM prefetches. Two threads each. Versions: `peers/environments.py`.
With four bits both quantize the same matrices, the head too; llama.cpp also the input embedding. Its Q4_0 has 4.5 bits
a weight, as our int4 has.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import random
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fio
from cgroup import drop_from_page_cache, require_controller
from peers.environments import interpreter
from peers.process import PeerError, PeerProcess, run_alone
from random_llama import LLAMA_3_8B, LlamaShape, make_checkpoint

from pipo_ray.prepare import pack_store
from pipo_ray.session.memory import format_size, parse_size
from pipo_ray.store.manifest import Manifest

CONTESTANTS = ("pipo", "accelerate", "llama.cpp", "airllm")
RUNNERS = Path(__file__).parent / "peers"
CORES = 2
SHORT, LONG, BATCH = 32, 512, 16
LONG_PROMPTS = 3
NOT_FOR_WEIGHTS = 3 << 29
"""Bytes of the memory that the disk limit leaves for everything that is not weights."""
ACCELERATE_OTHER = 768 << 20
"""Of the group's memory, what Accelerate is not told to use: Python, torch, activations, the page cache."""
ANSWER_S = 900.0
REPACK_SHARE = 0.6
"""llama.cpp repacks a quantized file that is smaller than this share of the memory; at its size it was killed."""


@dataclass(frozen=True)
class Setting:
    """What all contestants share: sizes in bytes, `folder` for everything that is made once."""

    folder: Path
    shape: LlamaShape
    memory: int
    rounds: int
    tokens: int
    long: int
    fio_s: float
    accelerate_memory: int
    accelerate_variant: str
    precision: str = "16bit"

    @property
    def checkpoint(self) -> Path:
        """In Hugging Face's format."""
        return self.folder / f"llama-{self.shape.layers}-layers"

    @property
    def store(self) -> Path:
        """pipo's, packed from the checkpoint."""
        return self.folder / f"store-{self.shape.layers}-layers{self._suffix}"

    @property
    def gguf(self) -> Path:
        """llama.cpp's file."""
        return self.folder / f"llama-{self.shape.layers}-layers{self._suffix}.gguf"

    @property
    def _suffix(self) -> str:
        return "" if self.precision == "16bit" else f"-{self.precision}"

    @property
    def shards(self) -> Path:
        """AirLLM's."""
        return self.folder / f"airllm-{self.shape.layers}-layers"

    @property
    def offload(self) -> Path:
        """Accelerate's offload folder."""
        return self.folder / f"accelerate-{self.shape.layers}-layers"

    def limit_s(self, bytes_per_s: float) -> float:
        """The seconds that a sweep takes at least with a disk of this speed."""
        streamable = sum(block.nbytes for block in Manifest.load(self.store).blocks if block.kind != "embedding")
        return max(0, streamable - max(0, self.memory - NOT_FOR_WEIGHTS)) / bytes_per_s


# --- what is made once ------------------------------------------------------------------------------------------------


def make_once(path: Path, make: Callable[[Path], object]) -> None:
    """Let `make` write `path` unless it is there; under another name first, so that it is whole or not there at all."""
    if path.exists():
        return
    begin = time.perf_counter()
    print(f"making {path}", end="", flush=True)
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.unlink(missing_ok=True)
    make(partial)
    partial.rename(path)
    print(f": {time.perf_counter() - begin:.0f} s", flush=True)


def prepare(setting: Setting, contestant: str) -> tuple[list[str], dict[str, Any], list[Path]]:
    """Install the contestant and make its files: its command, its options, and what to drop from the page cache.

    Raises PeerError or RuntimeError with the reason.
    """
    log = setting.folder / f"{contestant}-preparation.log"
    if contestant == "pipo":
        options: dict[str, Any] = {"model": str(setting.store), "memory": setting.memory}
        return [sys.executable, str(RUNNERS / "pipo.py")], options, [setting.store, Path(sys.prefix)]
    python = interpreter(contestant, setting.folder)
    environment = python.parents[1]
    options = {"model": str(setting.checkpoint), "threads": CORES}
    if contestant == "accelerate":
        options |= {
            "cpu_memory": setting.accelerate_memory, "variant": setting.accelerate_variant,
            "offload_folder": str(setting.offload),
        }  # fmt: skip
        return [str(python), str(RUNNERS / "accelerate_disk.py")], options, [setting.checkpoint, environment]
    if contestant == "airllm":
        command = [str(python), str(RUNNERS / "airllm_layers.py")]
        make_once(
            setting.shards,
            lambda path: run_alone(command, json.dumps(options | {"shards": str(path), "split": True}), log=log),
        )
        return command, options | {"shards": str(setting.shards), "split": False}, [setting.shards, environment]
    writer = [str(python), str(RUNNERS / "write_gguf.py")]
    kind = "BF16" if setting.precision == "16bit" else "Q4_0"
    make_once(setting.gguf, lambda path: run_alone(writer, str(setting.checkpoint), str(path), kind, log=log))
    # Weights repacked for the processor's widest instructions are faster, and a copy that the group must have room for.
    repack = setting.gguf.stat().st_size < setting.memory * REPACK_SHARE
    options = {"gguf": str(setting.gguf), "threads": CORES, "repack": repack}
    return [str(python), str(RUNNERS / "llama_cpp_mmap.py")], options, [setting.gguf, environment]


# --- the measurement --------------------------------------------------------------------------------------------------


def prompt(seed: int, length: int, vocabulary: int) -> list[int]:
    """Random tokens, the same for all contestants; another seed gives another prompt, so that no cache helps."""
    numbers = random.Random(seed)
    return [numbers.randrange(300, vocabulary) for _ in range(length)]


def measure(setting: Setting, contestant: str, disk: fio.Reading) -> dict[str, Any]:
    """Everything about one contestant. `failed` is the reason if it did not come to the end."""
    result = _begun(contestant)
    try:
        with _opened(setting, contestant) as process:
            try:
                _start(process, result)
                for number in range(setting.rounds):
                    _ask(setting, process, result, number, _disk_now(setting, disk))
                _ask_more(setting, process, result)
            finally:
                result |= process.usage()
    except (PeerError, RuntimeError) as error:
        result["failed"] = str(error)
        print(f"{contestant}: {error}", flush=True)
    return result | _figures(setting, result)


def measure_in_turns(setting: Setting, contestants: Sequence[str], disk: fio.Reading) -> list[dict[str, Any]]:
    """The same for all, who are there at the same time. Raises what the first to fail raises."""
    results = {contestant: _begun(contestant) for contestant in contestants}
    for contestant in contestants:  # all at first: what makes one's file reads another's into the page cache
        prepare(setting, contestant)
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(_opened(setting, name)) for name in contestants}
        for name, process in processes.items():
            _start(process, results[name])
        for number in range(setting.rounds):
            bytes_per_s = _disk_now(setting, disk)
            for name, process in processes.items():
                _ask(setting, process, results[name], number, bytes_per_s)
        for name, process in processes.items():
            _ask_more(setting, process, results[name])
            results[name] |= process.usage()
    listed = [result | _figures(setting, result) for result in results.values()]
    for one in listed:
        if "round_s" in one and "round_s" in listed[0]:
            ratios = [theirs / ours for theirs, ours in zip(one["round_s"], listed[0]["round_s"], strict=True)]
            one["decode_ratio"], one["decode_ratio_spread"] = statistics.median(ratios), _spread(ratios)
    return listed


def _begun(contestant: str) -> dict[str, Any]:
    return {"contestant": contestant, "load_average": os.getloadavg()[0], "rounds": []}


def _opened(setting: Setting, contestant: str) -> PeerProcess:
    command, options, files = prepare(setting, contestant)
    drop_from_page_cache(*files)
    log = setting.folder / f"{contestant}.log"
    return PeerProcess(command, options, limit=setting.memory, cores=CORES, log=log, answer_s=ANSWER_S)


def _start(process: PeerProcess, result: dict[str, Any]) -> None:
    result |= process.start()
    notes = "; ".join(result["notes"])
    print(f"{result['contestant']}: ready in {result['ready_s']:.1f} s; {notes}", flush=True)


def _disk_now(setting: Setting, disk: fio.Reading) -> float:
    return fio.read(_store_files(setting), disk.block_mib, disk.depth, setting.fio_s).bytes_per_s


def _ask(setting: Setting, process: PeerProcess, result: dict[str, Any], number: int, bytes_per_s: float) -> None:
    answer = process.ask([prompt(number, SHORT, setting.shape.vocabulary)], 1 + setting.tokens)
    result["rounds"].append({"fio_bytes_per_s": bytes_per_s, **answer})
    times = answer["seconds"][0]
    print(f"{result['contestant']}: prompt {SHORT} {times[0]:.2f} s, then {_listed(_gaps(times))}", flush=True)


def _ask_more(setting: Setting, process: PeerProcess, result: dict[str, Any]) -> None:
    contestant, vocabulary = result["contestant"], setting.shape.vocabulary
    result["long"] = []
    for number in range(LONG_PROMPTS):
        result["long"].append(process.ask([prompt(100 + number, setting.long, vocabulary)], 1))
        print(f"{contestant}: prompt {setting.long} {result['long'][-1]['seconds'][0][0]:.2f} s", flush=True)
    if contestant == "pipo":
        prompts = [prompt(200 + number, SHORT, vocabulary) for number in range(BATCH)]
        result["batch"] = process.ask(prompts, 1 + max(5, setting.tokens))
        print(f"{contestant}: batch {BATCH} {_listed(_gaps(_together(result['batch'])))}", flush=True)


def _store_files(setting: Setting) -> list[Path]:
    return [setting.store / name for name in Manifest.load(setting.store).files]


def _gaps(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def _together(answer: dict[str, Any]) -> list[float]:
    """When every one of the prompts had its first token, its second, ..."""
    return [max(times) for times in zip(*answer["seconds"], strict=True)]


def _listed(seconds: list[float]) -> str:
    return " ".join(_digits(value) for value in seconds) + " s/token"


def _digits(value: float) -> str:
    return f"{value:.3f}" if value < 0.2 else f"{value:.2f}"


def _figures(setting: Setting, result: dict[str, Any]) -> dict[str, Any]:
    """What the table shows; seconds."""
    figures: dict[str, Any] = {}
    rounds = [(one["fio_bytes_per_s"], one["seconds"][0]) for one in result["rounds"]]
    if rounds:
        decoded = [statistics.median(_gaps(times)) for _, times in rounds]
        limits = [setting.limit_s(bytes_per_s) for bytes_per_s, _ in rounds]
        figures["round_s"] = decoded
        figures["first_token_s"] = statistics.median(times[0] for _, times in rounds)
        figures["first_token_cold_s"] = rounds[0][1][0]
        figures["decode_s"] = statistics.median(gap for _, times in rounds for gap in _gaps(times))
        figures["decode_spread_s"] = _spread([gap for _, times in rounds for gap in _gaps(times)])
        figures["limit_s"] = statistics.median(limits)
        if min(limits) > 0:  # else nothing has to stream
            ratios = [seconds / limit for seconds, limit in zip(decoded, limits, strict=True)]
            figures["times_limit"], figures["times_limit_spread"] = statistics.median(ratios), _spread(ratios)
    if result.get("long"):
        took = [answer["seconds"][0][0] for answer in result["long"]]
        figures["long_first_token_s"], figures["long_spread_s"] = statistics.median(took), _spread(took)
    if "batch" in result:
        sweep = statistics.median(_gaps(_together(result["batch"])))
        figures |= {"batch_sweep_s": sweep, "batch_tokens_per_s": BATCH / sweep}
        figures["batch_gain"] = BATCH / sweep * figures["decode_s"]
    return figures


def _spread(values: list[float]) -> list[float]:
    return [min(values), max(values)]


def _same_tokens(one: dict[str, Any], other: dict[str, Any]) -> str:
    """How many of the rounds' first tokens are the same: that the weights are. In bf16, texts part sooner or later."""
    pairs = list(zip(one["rounds"], other["rounds"], strict=False))
    same = sum(a["token_ids"][0][0] == b["token_ids"][0][0] for a, b in pairs)
    return f"{same} of {len(pairs)}"


# --- the table --------------------------------------------------------------------------------------------------------


def show(report: dict[str, Any]) -> None:
    """Print the result as a person reads it."""
    ours = next((one for one in report["results"] if one["contestant"] == "pipo" and "decode_s" in one), None)
    short, long = report["prompt_tokens"]
    print(f"\n{report['model']}; {report['pc']}; {report['machine']}\ndisk: {report['disk']} ({report['fio']})\n")
    print(
        f"{'':<12}{f'prompt {short}':>11}{f'prompt {long}':>12}{'s/token':>9}{'spread':>14}{'x limit':>9}{'/ pipo':>8}"
        f"{f'{long} / pipo':>12}{'peak GiB':>10}{'oom_kill':>10}{'first tokens':>14}"
    )
    for one in report["results"]:
        row = f"{one['contestant']:<12}"
        row += _cell(one, "first_token_s", 11) + _cell(one, "long_first_token_s", 12) + _cell(one, "decode_s", 9)
        spread = one.get("decode_spread_s")
        row += f"{_digits(spread[0]):>7} -{_digits(spread[1]):>5}" if spread else f"{'-':>14}"
        row += _cell(one, "times_limit", 9)
        row += f"{one['decode_ratio']:>8.2f}" if "decode_ratio" in one else _by_ours(one, ours, "decode_s", 8)
        row += _by_ours(one, ours, "long_first_token_s", 12)
        row += f"{one['max_usage_in_bytes'] / 2**30:>10.2f}{one['oom_kill']:>10}" if "oom_kill" in one else f"{'-':>20}"
        row += f"{_same_tokens(one, ours) if ours else '-':>14}"
        print(row)
    limits = [one["limit_s"] for one in report["results"] if "limit_s" in one]
    if limits:
        low, high = _spread(limits)
        print(f"{'disk limit':<12}{'':>23}{statistics.median(limits):>9.2f}{low:>8.2f} -{high:>4.2f}")
    for one in report["results"]:
        if "batch_sweep_s" in one:
            print(
                f"\n{one['contestant']}, batch {BATCH}: {one['batch_sweep_s']:.2f} s a sweep, "
                f"{one['batch_tokens_per_s']:.2f} tokens/s, {one['batch_gain']:.1f}x those of batch 1"
            )
        versions = ", ".join(f"{name} {version}" for name, version in one.get("versions", {}).items())
        print(f"{one['contestant']}: {one.get('failed') or versions}")
        for name, what in (("times_limit_spread", "x limit"), ("decode_ratio_spread", "s/token / pipo's")):
            if name in one:
                low, high = one[name]
                print(f"{'':<12}{what}: {low:.2f} - {high:.2f} from round to round")


def _cell(one: dict[str, Any], name: str, width: int) -> str:
    return f"{_digits(one[name]):>{width}}" if name in one else f"{'failed' if 'failed' in one else '-':>{width}}"


def _by_ours(one: dict[str, Any], ours: dict[str, Any] | None, name: str, width: int) -> str:
    return f"{one[name] / ours[name]:>{width}.2f}" if ours and name in one and name in ours else f"{'-':>{width}}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peers-folder", type=Path, default=Path.home() / ".cache" / "pipo-peers",
        help="the peers' environments and all models are made here and used again (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--peers", default=",".join(CONTESTANTS[1:]), help="who is measured beside pipo")
    parser.add_argument("--only", help="who is measured, pipo or not, with commas between")
    parser.add_argument("--memory", default="4GiB", help="the limit of the group, and pipo's budget")
    parser.add_argument("--layers", type=int, default=LLAMA_3_8B.layers, help="of the model")
    parser.add_argument("--precision", choices=("16bit", "int4"), default="16bit", help="int4: beside llama.cpp alone")
    parser.add_argument("--tokens", type=int, default=3, help="tokens behind the first one in each round")
    parser.add_argument("--rounds", type=int, default=5, help="prompts of 32 tokens")
    parser.add_argument("--in-turns", action="store_true", help="all at the same time, round by round in turns")
    parser.add_argument("--accelerate-memory", help="Accelerate's max_memory for the CPU (default: what was fastest)")
    parser.add_argument("--accelerate-variant", choices=("mapped", "copied", "dat"), default="copied")
    parser.add_argument("--keep", action="store_true", help="keep AirLLM's shards and Accelerate's files")
    parser.add_argument("--quick", action="store_true", help="2 layers in 1.5 GiB, a round of 2 tokens, a prompt of 64")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.layers, arguments.memory, arguments.rounds, arguments.tokens = 2, "1536MiB", 1, 2
    peers = arguments.peers if arguments.precision == "16bit" else "llama.cpp"
    wanted = (arguments.only or f"pipo,{peers}").split(",")
    if unknown := [name for name in wanted if name not in CONTESTANTS]:
        parser.error(f"{','.join(unknown)}: choose from {','.join(CONTESTANTS)}")
    require_controller()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the contestant and its group go with us
    try:
        report = run(arguments, wanted)
    except PeerError as error:
        parser.exit(1, f"{error}\n")
    show(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))
    return 0 if all("failed" not in one for one in report["results"]) else 1


def run(arguments: argparse.Namespace, wanted: list[str]) -> dict[str, Any]:
    """The whole experiment; what is printed, as a dictionary."""
    memory = parse_size(arguments.memory, "--memory")
    given = arguments.accelerate_memory
    setting = Setting(
        folder=arguments.peers_folder.absolute(), shape=LLAMA_3_8B.of_layers(arguments.layers), memory=memory,
        rounds=arguments.rounds, tokens=arguments.tokens, long=64 if arguments.quick else LONG,
        fio_s=0.2 if arguments.quick else 2.0,
        accelerate_memory=parse_size(given, "--accelerate-memory") if given else memory - ACCELERATE_OTHER,
        accelerate_variant=arguments.accelerate_variant, precision=arguments.precision,
    )  # fmt: skip
    name = fio.version()
    setting.folder.mkdir(parents=True, exist_ok=True)
    make_once(setting.checkpoint, lambda path: make_checkpoint(path, setting.shape))
    precision = None if setting.precision == "16bit" else setting.precision
    make_once(setting.store, lambda path: pack_store(setting.checkpoint, path, precision=precision))
    disk = fio.sweep(_store_files(setting), setting.fio_s)[0]
    print(f"disk: {disk}", flush=True)
    try:
        if arguments.in_turns:
            results = measure_in_turns(setting, wanted, disk)
        else:
            results = [measure(setting, contestant, disk) for contestant in wanted]
    finally:
        if not arguments.keep:
            shutil.rmtree(setting.shards, ignore_errors=True)
            shutil.rmtree(setting.offload, ignore_errors=True)
    return {
        "model": f"Llama, {setting.shape.layers} layers, {setting.shape.num_parameters / 1e9:.2f} billion parameters, "
        f"{setting.precision}, {Manifest.load(setting.store).total_bytes / 1e9:.2f} GB",
        "pc": f"memory control group of {format_size(memory)}, {CORES} cores",
        "machine": f"{_processor()}, {os.cpu_count()} cores, Linux {platform.release()}, {time.strftime('%Y-%m-%d')}",
        "disk": str(disk),
        "fio": name,
        "memory": memory,
        "prompt_tokens": [SHORT, setting.long],
        "results": results,
    }


if __name__ == "__main__":
    sys.exit(main())
