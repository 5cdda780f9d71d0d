"""How seconds per sweep grow with layers, batch, prompt length and resident share of the weights, as a picture.

How to run (two minutes; --quick: one; needs the extra `bench` for the picture):

    python benchmarks/scaling.py [--layers 32] [--picture docs/scaling.svg] [--quick] [--json FILE]

Random Llamas in bf16 (hidden size 1024, 30 MiB in a layer) of up to --layers layers on the CPU. One thing is varied at
a time; the others stay at: all layers, a prompt of 3 tokens, a quarter of the weights as weight memory. A sweep's time
is the median of the sweeps of a run of decoding; that of a prompt is the time to its first token, all in one sweep.
Beside each point the least that the bytes allow: what is streamed at the rate of the fastest point ("drive").
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from random_llama import LlamaShape, make_checkpoint

from pipo_ray import LLM, SamplingParams
from pipo_ray.session.memory import format_size

SHAPE = LlamaShape(1, hidden=1024, intermediate=4096, heads=8, kv_heads=2, vocabulary=4096)
BATCHES = (1, 2, 4, 8, 16, 32)
PROMPTS = (16, 64, 256, 512, 1024)
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
LABELS = {
    "layers": "layers",
    "batch": "prompts at once",
    "prompt": "prompt length, tokens",
    "resident": "weight memory / model",
}


def open_llm(model: Path, share: float) -> LLM:
    """A run with `share` of the model as weight memory. Prompts are computed as a whole, each time anew."""
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return LLM(
        model, weight_memory=int(size * share), device="cpu", ray_address="local", max_batch_tokens=max(PROMPTS),
        prefix_cache=False,
    )  # fmt: skip


def decode(llm: LLM, batch: int, sweeps: int) -> dict[str, float]:
    """The median seconds of a sweep that decodes `batch` sequences, and the bytes that it streams."""
    params = SamplingParams(temperature=0.0, max_tokens=sweeps + 2, ignore_eos=True)
    prompts = [[3 + i, 5, 8] for i in range(batch)]
    times: dict[int, float] = {}
    for output in llm.stream(prompts, params):
        times[len(output.outputs[0].token_ids)] = time.perf_counter()
    moments = [times[number] for number in sorted(times) if number > 1]
    took = [(b - a) for a, b in itertools.pairwise(moments)]
    return {"seconds": statistics.median(took), "bytes": llm.report()["streamed_bytes_per_sweep"]}


def prefill(llm: LLM, tokens: int) -> dict[str, float]:
    """Seconds to the first token of a prompt of `tokens` tokens; the better of two."""
    params = SamplingParams(temperature=0.0, max_tokens=1)
    prompt = [3 + i % 4000 for i in range(tokens)]
    took = []
    for _ in range(2):
        begin = time.perf_counter()
        llm.generate([prompt], params)
        took.append(time.perf_counter() - begin)
    return {"seconds": min(took), "bytes": llm.report()["streamed_bytes_per_sweep"]}


def measure(folder: Path, layers: int, sweeps: int, quick: bool) -> dict[str, dict[float, dict[str, float]]]:
    """Per axis and value the figures of a sweep."""
    depths = sorted({max(2, layers // part) for part in ((4, 1) if quick else (8, 4, 2, 1))})
    for depth in depths:
        make_checkpoint(folder / str(depth), SHAPE.of_layers(depth))
    full = folder / str(layers)
    result: dict[str, dict[float, dict[str, float]]] = {axis: {} for axis in LABELS}
    for depth in depths:
        with open_llm(folder / str(depth), 0.25) as llm:
            result["layers"][depth] = decode(llm, 1, sweeps)
            if depth == layers:
                for batch in BATCHES[:: 3 if quick else 1]:
                    result["batch"][batch] = decode(llm, batch, sweeps)
                for tokens in PROMPTS[:: 3 if quick else 1]:
                    result["prompt"][tokens] = prefill(llm, tokens)
    for share in SHARES[:: 2 if quick else 1]:
        with open_llm(full, share if share < 1 else 1.2) as llm:
            result["resident"][share] = decode(llm, 1, sweeps)
    return result


def draw(result: dict[str, dict[float, dict[str, float]]], path: Path) -> None:
    """Four panels; the dashed line is the streamed bytes at the best rate seen."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "pipo"
    from matplotlib import pyplot

    rate = best_rate(result)
    figure, panels = pyplot.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
    for panel, (axis, label) in zip(panels, LABELS.items(), strict=True):
        values = sorted(result[axis])
        panel.plot(values, [result[axis][value]["seconds"] for value in values], "o-", label="measured")
        panel.plot(values, [result[axis][value]["bytes"] / rate for value in values], "--", label="drive")
        if axis in ("batch", "prompt"):
            panel.set_xscale("log", base=2)
        panel.set_xlabel(label)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("seconds per sweep")
    panels[0].legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def best_rate(result: dict[str, dict[float, dict[str, float]]]) -> float:
    """Bytes per second of the point that streamed fastest."""
    return max(row["bytes"] / row["seconds"] for by in result.values() for row in by.values())


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--sweeps", type=int, default=5, help="sweeps of decoding at each point")
    parser.add_argument("--picture", type=Path, help="write the picture here (.svg or .png)")
    parser.add_argument("--quick", action="store_true", help="fewer points, 16 layers at most")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    layers = min(arguments.layers, 16) if arguments.quick else arguments.layers
    folder = Path(tempfile.mkdtemp(prefix="pipo-bench-scaling-"))
    os.environ["PIPO_CACHE"] = str(folder / "cache")
    try:
        result = measure(folder, layers, arguments.sweeps, arguments.quick)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rate = best_rate(result)
    print(f"{'axis':<12}{'value':>8}{'s per sweep':>14}{'streamed':>12}{'drive, s':>10}")
    for axis, by in result.items():
        for value, row in by.items():
            drive = row["bytes"] / rate
            print(f"{axis:<12}{value:>8}{row['seconds']:14.3f}{format_size(int(row['bytes'])):>12}{drive:10.3f}")
    if arguments.picture:
        draw(result, arguments.picture)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
