"""A model three times the size of --memory, in a memory control group of exactly that size: it generates to the end.

How to run (root, memory controller of cgroup v1, six times --memory of free disk; a few minutes):

    python benchmarks/cgroup_budget.py [--memory 1536MiB] [--factor 3] [--tokens 8] [--prompt-tokens 700] [--json FILE]

A random Llama in bf16 is written to a temporary folder. A child process enters the group, so that everything that it
starts is in it, packing included: packing, Ray, the four actors. No process of ours is outside but this one, which only
looks. A short prompt is continued by --tokens tokens, then a prompt of --prompt-tokens by one.

Printed for each phase: the highest use of the group; what cannot be dropped (anonymous, shared and kernel memory); the
mapped files, each counted once and in full, as if nobody else on the machine had them open; and the sum of PSS. At the
end `max_usage_in_bytes`, `failcnt`, `oom_kill`, and what PROCESS_BYTES in pipo_ray/plan/budget.py has to be: the
highest use with the short prompt less weights and KV cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from cgroup import Group, require_controller
from random_llama import LlamaShape, make_checkpoint

from pipo_ray.session.memory import MIB, format_size, parse_size

SAMPLE_S = 0.3
SHAPE = LlamaShape(layers=1)
SMALL = LlamaShape(layers=1, hidden=1024, intermediate=4096, vocabulary=4096)


# --- the group --------------------------------------------------------------------------------------------------------


class Watch(threading.Thread):
    """Looks at the group from outside, phase by phase. All figures are bytes."""

    def __init__(self, group: Group) -> None:
        super().__init__(daemon=True)
        self.phase = "packing"
        self.peaks: dict[str, dict[str, int]] = {}
        self._group = group
        self._ending = threading.Event()

    def end(self) -> None:
        """Stop looking."""
        self._ending.set()
        self.join()

    def run(self) -> None:
        while not self._ending.wait(SAMPLE_S):
            phase = self.phase
            kept = self.peaks.setdefault(phase, {})
            for name, value in self._look().items():
                kept[name] = max(kept.get(name, 0), value)

    def _look(self) -> dict[str, int]:
        stat = self._group.table("stat")
        kernel = self._group.number("kmem.usage_in_bytes")
        seen = {
            "use": self._group.number("usage_in_bytes"),
            "kept": stat["total_rss"] + stat["total_shmem"] + kernel,
            "anonymous": stat["total_rss"],
            "shared": stat["total_shmem"],
            "kernel": kernel,
            "pss": 0,
        }
        files: dict[tuple[str, str], int] = {}
        for pid in self._group.pids():
            seen["pss"] += _add_mappings(pid, files)
        seen["files"] = sum(files.values())
        seen["kept and files"] = seen["kept"] + seen["files"]
        return seen


def _add_mappings(pid: int, files: dict[tuple[str, str], int]) -> int:
    """The PSS of a process. `files`: per mapped part of a file the most bytes of it that a process has in memory."""
    try:
        lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    except OSError:
        return 0
    pss = rss = 0
    part = None
    for line in lines:
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            fields = line.split(None, 5)
            path = fields[5] if len(fields) > 5 else ""
            part = (path, fields[2]) if path.startswith("/") and not path.startswith(("/dev/", "/memfd")) else None
        elif name == "Pss:":
            pss += int(rest.split()[0]) << 10
        elif name == "Rss:":
            rss = int(rest.split()[0]) << 10
        elif name == "Anonymous:" and part is not None:  # pages of a private mapping that were written to: no file's
            files[part] = max(files.get(part, 0), rss - (int(rest.split()[0]) << 10))
    return pss


# --- the child --------------------------------------------------------------------------------------------------------


def child(arguments: argparse.Namespace) -> None:
    """Runs in the group. Writes JSON lines: the phases, what the plan is, and what came out."""
    from pipo_ray import LLM, SamplingParams
    from pipo_ray.plan import budget

    def say(**fields: Any) -> None:
        print(json.dumps(fields), flush=True)

    def on_progress(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("pack", total):
            say(phase="starting")

    if arguments.process_bytes:
        budget.PROCESS_BYTES = parse_size(arguments.process_bytes, "--process-bytes")
    begin = time.perf_counter()
    say(phase="packing")
    with LLM(
        arguments.model, memory=arguments.memory, device="cpu", ray_address="local", on_progress=on_progress,
        max_batch_tokens=arguments.max_batch_tokens,
    ) as llm:  # fmt: skip
        plan = llm._plan
        say(
            phase="short prompt", lines=llm.describe(), started_s=time.perf_counter() - begin,
            weights=plan.weight_bytes, kv=plan.kv_bytes, activations=plan.activation_bytes, model=plan.model_bytes,
        )  # fmt: skip
        params = SamplingParams(temperature=0.0, max_tokens=arguments.tokens, ignore_eos=True)
        begin = time.perf_counter()
        (output,) = llm.generate([[3, 5, 8]], params)
        say(
            phase="long prompt", token_ids=output.outputs[0].token_ids, generated_s=time.perf_counter() - begin,
            cached=_cache_bytes(llm),
        )  # fmt: skip
        long = min(arguments.prompt_tokens, plan.kv_tokens - 1)
        llm.generate([[3 + i * 7 % 1000 for i in range(long)]], replace(params, max_tokens=1))
        report = llm.report()
        say(
            phase="closing", peak_memory_bytes=report["peak_memory_bytes"], bytes_streamed=report["bytes_streamed"],
            cached_of_long=_cache_bytes(llm),
        )  # fmt: skip
    say(phase="closed")


def _cache_bytes(llm: Any) -> int:
    return int(next(stage["cache_bytes"] for stage in llm.report()["stages"] if stage["stage"] == "ComputeWorker"))


# --- the experiment ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def workspace(needed: int, base: str | None) -> Iterator[Path]:
    """A temporary folder on a disk that has room."""
    folder = Path(tempfile.mkdtemp(prefix="pipo-bench-cgroup-", dir=base))
    try:
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise SystemExit(f"{folder.parent}: {format_size(needed)} are needed, {format_size(free)} are free")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole experiment; what is printed, as a dictionary."""
    budget = parse_size(arguments.memory, "--memory")
    model_bytes = int(budget * arguments.factor)
    with workspace(2 * model_bytes + (2 << 30), arguments.folder) as folder:
        begin = time.perf_counter()
        shape = (SMALL if arguments.small else SHAPE).of_at_least(model_bytes)
        make_checkpoint(folder / "model", shape)
        print(f"checkpoint of {format_size(shape.num_bytes)} made in {time.perf_counter() - begin:.0f} s", flush=True)
        with Group(budget) as group:
            return {"memory": budget, "checkpoint": shape.num_bytes, **_measure(arguments, folder, group)}


def _measure(arguments: argparse.Namespace, folder: Path, group: Group) -> dict[str, Any]:
    said: dict[str, Any] = {}
    watch = Watch(group)
    begin = time.perf_counter()
    options = {
        name: getattr(arguments, name)
        for name in ("memory", "tokens", "prompt_tokens", "max_batch_tokens", "process_bytes")
    }
    process = subprocess.Popen(
        [
            sys.executable, __file__, "--child", str(folder / "model"),
            *(text for name, value in options.items() if value for text in (f"--{name.replace('_', '-')}", str(value))),
        ],
        stdout=subprocess.PIPE, text=True, preexec_fn=group.enter,
        env=os.environ | {"PIPO_CACHE": str(folder / "cache")},
    )  # fmt: skip
    watch.start()
    phases: dict[str, float] = {}
    try:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                fields = json.loads(line)
                phases[fields["phase"]] = time.perf_counter() - begin
                watch.phase = fields.pop("phase")
                said |= fields
                print(f"{time.perf_counter() - begin:7.1f} s  {watch.phase}", flush=True)
        status = process.wait()
    finally:
        process.kill()
        process.wait()
        watch.end()
    return {
        "status": status,
        "max_usage_in_bytes": group.number("max_usage_in_bytes"),
        "failcnt": group.number("failcnt"),
        "oom_kill": group.table("oom_control")["oom_kill"],
        "phases_s": phases,
        "peaks": watch.peaks,
        **said,
        "measured": _process_bytes(watch.peaks, said),
    }


def _process_bytes(peaks: dict[str, dict[str, int]], said: dict[str, Any]) -> dict[str, int]:
    """What driver, Ray and actors take besides weights and KV cache, and what a full sweep's activations take.

    `least` counts what the kernel cannot drop. `whole` counts the mapped code as well: without it in memory every
    sweep reads it from the disk again.
    """
    short, long = peaks.get("short prompt", {}), peaks.get("long prompt", {})
    weights, cached = said.get("weights", 0), said.get("cached", 0)
    activations = long.get("anonymous", 0) - short.get("anonymous", 0) - said.get("cached_of_long", 0) + cached
    return {
        "PROCESS_BYTES, least": short.get("kept", 0) - weights - cached,
        "PROCESS_BYTES, whole": short.get("kept and files", 0) - weights - cached,
        "activations": activations,
    }


def show(result: dict[str, Any]) -> None:
    """Print the result as a person reads it."""
    print("\n".join(result.get("lines", [])))
    names = ["use", "kept", "anonymous", "shared", "kernel", "files", "kept and files", "pss"]
    print("\nhighest in MiB   " + "".join(f"{name:>15}" for name in names))
    for phase, peaks in result["peaks"].items():
        print(f"{phase:<17}" + "".join(f"{peaks.get(name, 0) / MIB:15.0f}" for name in names))
    rows = {
        "limit": result["memory"], "max_usage_in_bytes": result["max_usage_in_bytes"],
        "our own peak_memory_bytes": result.get("peak_memory_bytes", 0), "weights in memory": result.get("weights", 0),
        "KV cache planned": result.get("kv", 0), "KV cache used": result.get("cached_of_long", 0),
        "activations planned": result.get("activations", 0), "model": result["checkpoint"],
        "streamed": result.get("bytes_streamed", 0),
    }  # fmt: skip
    print()
    for name, value in rows.items():
        print(f"{name:<32}{value / MIB:10.0f} MiB")
    for name, value in result["measured"].items():
        print(f"{'measured ' + name:<32}{value / MIB:10.0f} MiB")
    print(f"{'tokens':<32}{len(result.get('token_ids', [])):10} in {result.get('generated_s', 0):.1f} s")
    print(f"{'failcnt':<32}{result['failcnt']:10}\n{'oom_kill':<32}{result['oom_kill']:10}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="1536MiB", help="the limit of the group, and the budget")
    parser.add_argument("--factor", type=float, default=3.0, help="the model is so many times as large")
    parser.add_argument("--tokens", type=int, default=8, help="tokens to generate")
    parser.add_argument("--prompt-tokens", type=int, default=700, help="tokens of the long prompt")
    parser.add_argument("--max-batch-tokens", type=int, default=512, help="tokens computed in one sweep")
    parser.add_argument("--process-bytes", help="plan with this in place of PROCESS_BYTES")
    parser.add_argument("--small", action="store_true", help="narrower layers")
    parser.add_argument("--folder", help="where the model is made (default: the temporary folder)")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--child", dest="model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.model:
        child(arguments)
        return 0
    require_controller()
    result = run(arguments)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    good = result["status"] == 0 and result["oom_kill"] == 0 and len(result.get("token_ids", [])) == arguments.tokens
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
