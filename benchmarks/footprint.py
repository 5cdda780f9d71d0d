"""What a run takes besides weights, slots, KV cache and activations, by process; and how soon the first token comes.

How to run (half a minute; --quick: 15 s):

    python benchmarks/footprint.py [--model FOLDER] [--starts 3] [--against OTHER_PIPO] [--device cuda] [--quick]
                                   [--tokens 64] [--json FILE]

The bundled model runs with a weight budget smaller than itself, so that all four actors work. For every process of the
session: private memory, mapped files, and PSS without the buffers in /dev/shm, idle (everything is loaded, nothing
was generated) and after a run. The sum is the footprint. The KV cache of such a small model is a few hundred KB and
counts as footprint. With --device cuda the GPU computes (a GPU budget of 2 GiB), and the time to the first token is not
taken.

PSS divides a file's pages among all who map it: another pipo on the machine makes it look smaller. "Alone" is the upper
bound that nobody can change: private memory, and every mapped file once and in full.

Then `pipo run` is started --starts times, and the time from there to the first byte of text is taken, file cache warm.
With --against another pipo (of another revision) takes turns with it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pipo_ray import LLM, SamplingParams

BUNDLED = Path(__file__).parents[1] / "pipo_ray" / "bundled"
PROMPT = "It was a fine morning, and Mrs. Bennet"
MIB = 1 << 20
NAMES = {
    "idle_agent.py": "stand-in", "watch.py": "watcher", "lean_worker.py": "fork server", "gcs_server": "gcs_server",
    "raylet": "raylet",
}  # fmt: skip


def look(pids: list[int]) -> dict[str, Any]:
    """Bytes per process, and the sums."""
    rows: list[dict[str, Any]] = []
    files: dict[tuple[str, str], int] = {}
    for pid in pids:
        row = {"name": name_of(pid), "private": 0, "files": 0, "pss": 0}
        try:
            lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
        except OSError:
            continue
        part, shared, rss, pss = ("", ""), False, 0, 0
        for line in lines:
            key, _, rest = line.partition(" ")
            if not key.endswith(":"):
                fields = line.split(None, 5)
                part = (fields[5] if len(fields) > 5 else "", fields[2])
                shared = part[0].startswith(("/dev/shm/", "/memfd"))
                continue
            if shared or key not in ("Pss:", "Rss:", "Anonymous:"):
                continue
            value = int(rest.split()[0]) << 10
            if key == "Pss:":
                pss = value
                row["pss"] += value
            elif key == "Rss:":
                rss = value
            elif part[0].startswith("/"):
                row["private"] += value
                files[part] = max(files.get(part, 0), rss - value)
            else:
                row["private"] += pss  # forked processes share what neither has changed
        row["files"] = row["pss"] - row["private"]
        rows.append(row)
    return {
        "processes": rows,
        "footprint": sum(row["pss"] for row in rows),
        "alone": sum(row["private"] for row in rows) + sum(files.values()),
    }


def name_of(pid: int) -> str:
    """What a person calls the process."""
    if pid == os.getpid():
        return "driver"
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "?"
    if words[0].startswith("ray::"):
        return words[0].removeprefix("ray::").strip()
    return next((name for key, name in NAMES.items() if any(word.endswith(key) for word in words)), words[0][-30:])


def measure_memory(model: Path, device: str, tokens: int) -> dict[str, Any]:
    """Idle, and after a run of so many tokens."""
    options: dict[str, Any] = {"memory": "1536MiB", "weight_memory": "3MiB"}
    if device == "cuda":
        options = {"memory": "8GiB", "gpu_memory": "2GiB"}
    with LLM(model, device=device, ray_address="local", **options) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=tokens)
        idle = look(llm._session.pids())
        llm.generate([PROMPT if (model / "tokenizer.json").is_file() else list(range(3, 13))], params)
        return {"idle": idle, "after a run": look(llm._session.pids())}


def first_byte_s(pipo: str, model: Path) -> float:
    """Seconds from the start of `pipo run` to the first byte of its text."""
    command = [pipo, "run", str(model), "--weight-memory", "3MiB", "-p", PROMPT, "--max-tokens", "4"]
    begin = time.perf_counter()
    child = subprocess.Popen(
        [*command, "--ray-address", "local"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    assert child.stdout is not None
    byte = child.stdout.read(1)
    took = time.perf_counter() - begin
    _, errors = child.communicate()
    if not byte or child.returncode:
        raise SystemExit(f"{pipo} failed: {errors.decode(errors='replace')}")
    return took


def measure_starts(pipos: list[str], model: Path, starts: int) -> dict[str, list[float]]:
    """Seconds to the first token, the programs taking turns; one start of each, not counted, warms the file cache."""
    for pipo in pipos:
        first_byte_s(pipo, model)
    took: dict[str, list[float]] = {pipo: [] for pipo in pipos}
    for _ in range(starts):
        for pipo in pipos:
            took[pipo].append(first_byte_s(pipo, model))
    return took


def show(result: dict[str, Any]) -> None:
    """Print the result as a person reads it."""
    for when in ("idle", "after a run"):
        seen = result[when]
        print(f"{when + ', MiB':<24}{'private':>10}{'files':>10}{'PSS':>10}")
        for row in seen["processes"]:
            print(f"{row['name']:<24}" + "".join(f"{row[key] / MIB:10.1f}" for key in ("private", "files", "pss")))
        print(
            f"footprint {seen['footprint'] / 1e9:.3f} GB ({seen['footprint'] / MIB:.0f} MiB), "
            f"alone {seen['alone'] / 1e9:.3f} GB ({seen['alone'] / MIB:.0f} MiB); goal 1.0 GB\n"
        )
    for pipo, took in result["first_token_s"].items():
        spread = f"{min(took):.1f} to {max(took):.1f}"
        print(f"first token after {statistics.median(took):.1f} s ({spread}, {len(took)} starts); goal 12 s  {pipo}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--starts", type=int, default=3, help="starts of `pipo run`")
    parser.add_argument("--against", help="another pipo program, started in turns with this one")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what computes (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of the run; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="one start")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    result = measure_memory(arguments.model, arguments.device, arguments.tokens)
    pipos = [str(Path(sys.executable).with_name("pipo")), *([arguments.against] if arguments.against else [])]
    starts = 0 if arguments.device == "cuda" else 1 if arguments.quick else arguments.starts
    result["first_token_s"] = measure_starts(pipos, arguments.model, starts) if starts else {}
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
