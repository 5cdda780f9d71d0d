"""Mixed precision against uniform precision at the same bytes: KL divergence of the output from the original's.

How to run (twelve minutes of processor time for the bundled model; --quick: a tenth of the text, few sizes):

    python benchmarks/mixed_precision.py [--quick] [--model FOLDER] [--text FILE] [--tokens N] [--bits B,B,...]
        [--json FILE]
    python benchmarks/mixed_precision.py --check        # weight by weight: do the estimates hold that choices rest on?

The formats are chosen as `pipo pack --precision auto` does, from what it measures on the calibration text that comes
with the package, and judged on another text, by default the bundled model's held-out one: float32 products with the
rounded weights, windows of 512 tokens. Sizes are bytes of the matrices that can be quantized, scales, zeros and padding
included, given as bits per weight. All are tested at which a mix exists: those of the uniform formats, and others
from the smallest format to 16 bits (--bits: only these; a format's name is its own size). At each stand:

    mix         what the knapsack chooses with so many bytes or fewer
    uniform     one format for all, where one has that size
    by order    the next smaller uniform format, and the first layers in the next larger as far as the bytes go
    random      the same with the weights in random order: mean and best of three (--quick: two)
    next        where the mix is the uniform format itself: the best mix of fewer bytes, if any has fewer

The bundled model's widths are no multiples of 128, so its smallest format is int4-g64. For int4-g128 a wider one is
trained (six minutes on a GPU, or --minutes; `train_bundled_model.py corpus` first; the held-out text is the same):

    python benchmarks/train_bundled_model.py train --data .train --out out/wide --hidden 256 --intermediate 512
    python benchmarks/mixed_precision.py --model out/wide

Ends with 1 if at a size where the mix is no uniform format something beside it has as little divergence.

--check measures every weight alone in every format, and compares with what a pass per block estimates: the rank
correlation over weights, and how far single estimates are off.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipo_ray.quant.auto import MEASURED_TOKENS, WINDOW_TOKENS, Subject, windows_with
from pipo_ray.quant.calibration import CalibrationModel
from pipo_ray.quant.calibration_text import CalibrationText
from pipo_ray.quant.formats import SIXTEEN_BITS
from pipo_ray.quant.knapsack import Item, choose
from pipo_ray.quant.measure import Measurement, measure_sensitivity
from pipo_ray.quant.sensitivity import FORMATS, Candidates, Sensitivity

BUNDLED = Path(__file__).parents[1] / "pipo_ray" / "bundled"
BITS = (4.3, 4.4, 4.6, 4.75, 4.9, 5.25, 5.5, 6.0, 6.5, 7.0, 7.5, 9.0, 10.0, 12.0)
QUICK_BITS = (4.4, 4.75, 6.0, 7.0, 10.0)
RANDOM_ORDERS = 3
QUICK_TOKENS = 4096
ALL = (*FORMATS, SIXTEEN_BITS)

Formats = Mapping[str, str]


@dataclass(frozen=True)
class Bench:
    """A model under measurement: on the calibration text, and on the one it is judged by."""

    subject: Subject
    measured: Measurement
    num_windows: int
    judged: Measurement
    sensitivity: Sensitivity
    seconds: float

    @property
    def candidates(self) -> Candidates:
        """The weights that can be quantized."""
        return self.subject.candidates

    @property
    def items(self) -> list[Item]:
        """For the knapsack."""
        return self.sensitivity.items(self.candidates)

    def kl(self, formats: Formats) -> float:
        """On the text that it is judged by, nats per token."""
        return self.judged.compare(formats).kl


@contextmanager
def opened(model: Path, text: Path, most_tokens: int) -> Iterator[Bench]:
    """Measure `model`'s sensitivity."""
    with Subject.open(model) as subject, tempfile.TemporaryDirectory() as folder:
        calibration = subject.windows(CalibrationText.load(), WINDOW_TOKENS, MEASURED_TOKENS)
        judged = subject.windows(CalibrationText.load(text), WINDOW_TOKENS, most_tokens)
        with CalibrationModel(subject.checkpoint, subject.config, subject.facts) as passes:

            def measurement(windows: Sequence[Sequence[int]]) -> Any:
                vocabulary = subject.facts.vocab_size
                return closing(Measurement(passes, windows, vocabulary, Path(folder), lambda *_: None))

            with measurement(calibration) as measured, measurement(judged) as held:
                number = windows_with(calibration, MEASURED_TOKENS)
                known = Sensitivity(sum(map(len, calibration[:number])))
                started = time.process_time()
                measure_sensitivity(measured, subject.candidates, known, number, lambda: None)
                yield Bench(subject, measured, number, held, known, time.process_time() - started)


def uniform(candidates: Candidates, format: str) -> dict[str, str]:
    """Every weight in `format`, or in the next finer one that it can have."""
    allowed = ALL[ALL.index(format) :]
    return {one.name: next(name for name in allowed if name in one.sizes) for one in candidates.weights}


def size_of(candidates: Candidates, formats: Formats) -> int:
    """Bytes."""
    return sum(one.sizes[formats[one.name]] for one in candidates.weights)


def filled(candidates: Candidates, low: Formats, high: Formats, max_bytes: float, order: Sequence[str]) -> Formats:
    """`low`, and `high` for the first weights in `order` that fit."""
    sizes = {one.name: one.sizes for one in candidates.weights}
    result, used = dict(low), size_of(candidates, low)
    for name in order:
        more = sizes[name][high[name]] - sizes[name][low[name]]
        if used + more <= max_bytes:
            result[name], used = high[name], used + more
    return result


@dataclass(frozen=True)
class Scale:
    """The formats that a model's weights can have, the coarsest first, and the sizes of one for all."""

    weights: int
    uniforms: dict[str, Formats]
    bits: dict[str, float]

    @classmethod
    def of(cls, candidates: Candidates) -> Scale:
        """Those of `candidates`."""
        weights = sum(one.sizes[SIXTEEN_BITS] for one in candidates.weights) // 2
        present = [name for name in ALL if any(name in one.sizes for one in candidates.weights)]
        uniforms = {name: uniform(candidates, name) for name in present}
        bits = {name: 8 * size_of(candidates, some) / weights for name, some in uniforms.items()}
        return cls(weights, uniforms, bits)

    def sizes(self, wanted: Sequence[str] | None, usual: Sequence[float]) -> list[float]:
        """In bits per weight, growing: those `wanted`, or those of all formats and the `usual` ones between them."""
        least, most = self.bits[min(self.bits, key=self.bits.__getitem__)], self.bits[SIXTEEN_BITS]
        if wanted is None:
            return sorted({*(size for size in usual if least < size < most), *list(self.bits.values())[:-1]})
        sizes = [self.bits[one] if one in self.bits else float(one) for one in wanted]
        for size in sizes:
            if not least <= size < most:
                raise SystemExit(f"--bits {size:g}: this model's formats have {least:.2f} to {most:.2f} bits a weight")
        return sorted(set(sizes))


def compare(bench: Bench, scale: Scale, sizes: Sequence[float], orders: int) -> Iterator[dict[str, Any]]:
    """A row for each size in bits per weight."""
    candidates, bits, uniforms = bench.candidates, scale.bits, scale.uniforms
    present = list(bits)
    names = [one.name for one in candidates.weights]
    shuffled = [random.Random(seed).sample(names, len(names)) for seed in range(orders)]
    for size in sizes:
        low = max((name for name in present if bits[name] <= size + 1e-9), key=lambda name: bits[name])
        high = present[present.index(low) + 1]
        limit = size * scale.weights / 8 + 0.5
        mix = choose(bench.items, max_bytes=limit)
        row: dict[str, Any] = {"bits": size, "mix": bench.kl(mix.formats), "predicted": mix.loss}
        row["mix_bits"] = 8 * mix.nbytes / scale.weights
        row["formats"] = dict(Counter(mix.formats.values()))
        if abs(bits[low] - size) < 1e-9:
            others = {"uniform_kl": bench.kl(uniforms[low])}
            row |= {"uniform": low, **others}
            if mix.formats == uniforms[low]:
                row["next"] = next_best(bench, mix.nbytes)
        else:
            some = [filled(candidates, uniforms[low], uniforms[high], limit, order) for order in (names, *shuffled)]
            in_order, *drawn = (bench.kl(one) for one in some)
            others = {"by_order": in_order, "random_best": min(drawn)}
            row |= {**others, "random_mean": float(np.mean(drawn))}
        row["less"] = 1 - row["mix"] / min(others.values())
        yield row


def next_best(bench: Bench, nbytes: int) -> dict[str, float] | None:
    """The best mix of less than `nbytes`: KL divergence, as measured and predicted. None: nothing is smaller."""
    if nbytes == sum(min(one.sizes.values()) for one in bench.candidates.weights):
        return None
    mix = choose(bench.items, max_bytes=nbytes - 1)
    return {"kl": bench.kl(mix.formats), "predicted": mix.loss}


def check(bench: Bench) -> Iterator[dict[str, Any]]:
    """Every weight alone in every format: the KL divergence measured, and estimated."""
    for item in bench.items:
        for option in item.options:
            if option.format != SIXTEEN_BITS:
                kl = bench.measured.compare({item.name: option.format}, bench.num_windows).kl
                yield {"weight": item.name, "format": option.format, "measured": kl, "estimated": option.loss}


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, of numbers of which hardly any are equal."""
    ranks = [np.argsort(np.argsort(one)) for one in (first, second)]
    return float(np.asarray(np.corrcoef(np.array(ranks)))[0, 1])


def show(row: dict[str, Any]) -> None:
    """Print a row of the comparison."""
    if "uniform" in row:
        other = f"{row['uniform']:10} {row['uniform_kl']:.6f}"
        if "next" in row:
            found = row["next"]
            other += f"   next {found['kl']:.6f} ({found['predicted']:.6f})" if found else "   nothing is smaller"
    else:
        other = f"by order   {row['by_order']:.6f}   random {row['random_mean']:.6f}, best {row['random_best']:.6f}"
    formats = ", ".join(f"{count} {name}" for name, count in sorted(row["formats"].items()))
    mix = f"{row['mix']:.6f} ({row['predicted']:.6f})"
    print(f"{row['bits']:5.2f}  {mix}  {row['less']:+7.1%}   {other:62} {formats}", flush=True)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--text", type=Path, default=BUNDLED / "heldout.txt")
    parser.add_argument("--tokens", type=int, help="of the text; default: all of it")
    parser.add_argument("--bits", metavar="B,B,...", help="only these sizes: numbers, and formats' names for theirs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    tokens, fewer = options.tokens or (QUICK_TOKENS if options.quick else sys.maxsize), True
    with opened(options.model, options.text, tokens) as bench:
        blocks, tokens = len(bench.sensitivity.divergences), bench.sensitivity.tokens
        print(
            f"{len(bench.items)} weights in {blocks} blocks measured with {blocks + 1} passes over {tokens} tokens, "
            f"{bench.seconds:.0f} s of processor time; judged on {bench.judged.original.count} tokens, original "
            f"perplexity {bench.judged.original.perplexity:.3f}"
        )
        if options.check:
            rows = list(check(bench))
            for format in dict.fromkeys(row["format"] for row in rows):
                some = [row for row in rows if row["format"] == format]
                measured, estimated = ([row[which] for row in some] for which in ("measured", "estimated"))
                off = np.abs(np.log(np.array(estimated) / np.array(measured)))
                print(
                    f"{format:10} rank correlation {rank_correlation(measured, estimated):.3f}, estimates off by a "
                    f"factor of {np.exp(np.median(off)):.2f} (median), {np.exp(off.max()):.2f} (most); sums "
                    f"{sum(measured):.5f} measured one by one, {sum(estimated):.5f} estimated"
                )
        else:
            scale = Scale.of(bench.candidates)
            sizes = scale.sizes(options.bits and options.bits.split(","), QUICK_BITS if options.quick else BITS)
            print(" bits  KL of the mix (predicted)  less than the best beside it")
            for row in compare(bench, scale, sizes, 2 if options.quick else RANDOM_ORDERS):
                show(row)
                rows.append(row)
            tested = [row for row in rows if "next" not in row]
            print(
                f"less than all beside it in {sum(row['less'] > 0 for row in tested)} of {len(tested)} sizes at which "
                f"the mix is no uniform format"
            )
            fewer = all(row["less"] > 0 for row in tested)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0 if fewer else 1


if __name__ == "__main__":
    sys.exit(main())
