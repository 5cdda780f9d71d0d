"""`pipo quality`: what fewer bits cost in accuracy, and what they are worth in bytes."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipo_ray.cli.options import add_model_options, engine_arguments, find_folder, open_llm, writable
from pipo_ray.cli.terminal import Output, counting_bar, progress_bar, say
from pipo_ray.errors import InputError
from pipo_ray.quant.calibration_text import CalibrationText, can_calibrate
from pipo_ray.quant.policy import Precision
from pipo_ray.quant.target import AUTO, Target
from pipo_ray.report.labels import spread_labels
from pipo_ray.session.memory import format_size

if TYPE_CHECKING:
    from pipo_ray.llm import LLM
    from pipo_ray.report.quality import LogitsFile, Quality

ORIGINAL = "16bit"
_DEFAULT = "int8,int4-g32,int4"
_WINDOW = 1024
_PICTURES = (".png", ".svg")
_LABEL_POINTS = 8
_TEXT = Path(__file__).parents[1] / "bundled" / "heldout.txt"


@dataclass(frozen=True)
class Row:
    """A precision's line: `nbytes` of the packed model, and its quality against the original."""

    precision: str
    nbytes: int
    quality: Quality

    def figures(self, original: Row) -> dict[str, Any]:
        """As JSON has them."""
        return {
            "precision": self.precision,
            "bytes": self.nbytes,
            "perplexity": self.quality.perplexity,
            "perplexity_increase": self.quality.perplexity / original.quality.perplexity - 1,
            "kl_divergence": self.quality.kl,
            "same_token": self.quality.same_token,
            "tokens": self.quality.count,
        }


def add_command(commands: Any) -> None:
    """Declare `pipo quality`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "quality",
        help="measure what fewer bits cost in accuracy",
        description="Run a text through MODEL as it is and at fewer bits, within the memory budget, and compare: "
        "perplexity, Kullback-Leibler divergence and agreement of the most probable token. With --calibrate, int4 is "
        "measured both ways: rounded to nearest, and calibrated.",
        allow_abbrev=False,
    )
    add_model_options(parser)
    parser.set_defaults(precision=_DEFAULT)  # and --calibrate adds a row for each that has int4 weights
    parser.add_argument("--text", metavar="FILE", type=Path, default=_TEXT, help="default: the bundled model's")
    parser.add_argument("--tokens", metavar="N", type=int, default=8192, help="of the text; default: %(default)s")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="size against loss (.png or .svg)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout instead of the table")
    parser.set_defaults(command=quality)


def quality(options: argparse.Namespace) -> int:
    """Do it. Returns the exit status."""
    if options.picture is not None:
        _require_plotting(options.picture)
    _require_tokens(options.tokens)
    precisions = [one for one in options.precision.split(",") if one and one != ORIGINAL]
    if not precisions:
        raise InputError("--precision names nothing to compare with; give for instance --precision int8,int4")
    text = _read(options.text)
    auto = {name: value for name in ("max_loss", "max_size") if (value := getattr(options, name)) is not None}
    Target.parse(AUTO if AUTO in precisions else None, options.max_loss, options.max_size)
    variants = _variants(precisions, auto, options.calibrate)
    options.calibrate = False
    options.precision = options.max_loss = options.max_size = None
    arguments = engine_arguments(options)
    folder = find_folder(options.model)
    if not (folder.is_file() or (folder / "config.json").is_file()) or (folder / "manifest.json").is_file():
        raise InputError(f"{options.model} is not a checkpoint: quality needs the weights as they were")
    _check(folder, arguments["dtype"], variants, options.text, text)
    output = Output()
    with output.reserved(), contextlib.ExitStack() as stack:
        rows = _measure(stack, str(folder), arguments, text, variants, options.tokens)
    if options.json:
        output.write(json.dumps([row.figures(rows[0]) for row in rows], indent=1) + "\n")
    else:
        _print(rows)
    if options.picture is not None:
        _draw(rows, options.picture)
    return 0


def _variants(precisions: list[str], auto: dict[str, str], calibrate: bool | str) -> dict[str, dict[str, Any]]:
    """What is compared with the original, by the name of its row: the engine's arguments."""
    variants: dict[str, dict[str, Any]] = {}
    for precision in precisions:
        variants[precision] = {"precision": precision, **(auto if precision == AUTO else {})}
        if precision == AUTO:
            continue
        policy = Precision.parse(precision)
        if calibrate is not False and can_calibrate(policy):
            variants[f"{precision} calibrated"] = {"precision": precision, "calibrate": calibrate}
    if calibrate is not False:
        CalibrationText.load(None if calibrate is True else calibrate)  # what is wrong with it is known at once
        if len(variants) == len(precisions):
            raise InputError("--calibrate: no precision that is compared has int4 weights, which alone gain by it")
    return variants


def _measure(
    stack: contextlib.ExitStack,
    model: str,
    arguments: dict[str, Any],
    text: str,
    variants: dict[str, dict[str, Any]],
    most_tokens: int,
) -> list[Row]:
    from pipo_ray.prepare import cache_folder
    from pipo_ray.report.quality import LogitsFile, Quality, windows_of

    _prepare(model, arguments, variants)
    with open_llm(model, {**arguments, "precision": ORIGINAL}) as llm:
        ids, whole = llm.encode(text, add_special_tokens=False), llm.encode(text)
        prefix = whole[: whole.index(ids[0])] if ids and ids[0] in whole else []  # what begins a text
        windows = windows_of(ids, prefix, min(_WINDOW, llm.max_model_len), most_tokens)
        kept = LogitsFile(cache_folder() / "scratch", windows, llm.vocab_size)
        stack.callback(kept.close)
        first = Quality()
        for number, logits in _logits(llm, windows, ORIGINAL):
            kept.write(number, logits)
            first.add(windows[number], logits, logits)
        rows = [Row(ORIGINAL, llm.report()["model_bytes"], first)]
    for label, variant in variants.items():
        with open_llm(model, {**arguments, **variant}) as llm:
            rows.append(_compare(llm, windows, kept, label))
    return rows


def _require_tokens(most_tokens: int) -> None:
    from pipo_ray.report.quality import LEAST_TOKENS

    if most_tokens < LEAST_TOKENS:
        raise InputError(
            f"--tokens {most_tokens} is below {LEAST_TOKENS}, which are needed to tell models apart; give "
            f"--tokens {LEAST_TOKENS} or more"
        )


def _check(folder: Path, dtype: str, variants: dict[str, dict[str, Any]], file: Path, text: str) -> None:
    """What is wrong with a text or a policy for this model is known before the first store, the largest, is packed."""
    from pipo_ray.model.tokenizer import has_tokenizer
    from pipo_ray.prepare import check_before_packing
    from pipo_ray.report.quality import LEAST_TOKENS, too_short

    if folder.is_dir() and not has_tokenizer(folder):
        raise InputError(
            f"--text {file} cannot be compared with: the checkpoint {folder} has no tokenizer; add its files"
        )
    if not text:
        raise InputError(_another(too_short(f"--text {file}", 0)))
    # A word is a token at least: only of few words, or of a script without spaces, they have to be counted.
    has_few_words = len(text.split(maxsplit=LEAST_TOKENS)) < LEAST_TOKENS
    precisions = dict.fromkeys(one["precision"] for one in variants.values() if one["precision"] != AUTO)
    with progress_bar() as progress:
        num_tokens = check_before_packing(
            folder, list(precisions), dtype=dtype, text=file if has_few_words else None, on_progress=progress
        )
    if has_few_words and num_tokens is not None and num_tokens < LEAST_TOKENS:
        raise InputError(_another(too_short(f"--text {file}", num_tokens)))


def _another(message: str) -> str:
    return f"{message}, or leave --text out for the bundled one"


def _prepare(model: str, arguments: dict[str, Any], variants: dict[str, dict[str, Any]]) -> None:
    """Pack what is compared before anything is measured, and first what may still be refused: for want of memory."""
    from pipo_ray.budgets import memory_budget
    from pipo_ray.prepare import prepare_store

    memory, _ = memory_budget(arguments.get("memory"))
    risky = [one for one in variants.values() if one["precision"] == AUTO or "calibrate" in one]
    others = [one for one in variants.values() if one not in risky]
    for variant in (*risky, *others, {"precision": ORIGINAL}):
        target = Target.parse(variant["precision"], variant.get("max_loss"), variant.get("max_size"))
        with progress_bar() as progress:
            prepare_store(
                model, dtype=arguments["dtype"], precision=variant["precision"], target=target, on_progress=progress,
                calibrate=variant.get("calibrate", False), memory=memory,
            )  # fmt: skip


def _compare(llm: LLM, windows: list[list[int]], kept: LogitsFile, precision: str) -> Row:
    from pipo_ray.report.quality import Quality

    result = Quality()
    for number, logits in _logits(llm, windows, precision):
        result.add(windows[number], logits, kept.read(number))
    return Row(precision, llm.report()["model_bytes"], result)


def _logits(llm: LLM, windows: list[list[int]], precision: str) -> Iterator[tuple[int, Any]]:
    """Each window's number and logits, one after the other, so that no more than one is in memory."""
    done = 0
    with counting_bar(f"tokens with {precision}", sum(len(window) for window in windows)) as report:
        for number, window in enumerate(windows):
            (logits,) = llm.score([{"prompt_token_ids": window}])
            yield number, logits
            done += len(window)
            report(done)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--text {path} cannot be read: {error.strerror}; give a text file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--text {path} is not UTF-8 (byte {error.start}); convert it") from error


def _can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _require_plotting(picture: Path) -> None:
    if not _can_plot():
        raise InputError("--picture needs matplotlib: pip install matplotlib, or leave --picture out")
    if picture.suffix.lower() not in _PICTURES:
        raise InputError(f"--picture {picture}: its name must end in {' or '.join(_PICTURES)}, which can be drawn")
    writable(picture, "--picture")


def _print(rows: list[Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.ROUNDED)
    table.add_column("weights")
    for name in ("size", "perplexity", "more", "KL, nats", "same token"):
        table.add_column(name, justify="right")
    for row in rows:
        figures = row.figures(rows[0])
        table.add_row(
            row.precision,
            format_size(row.nbytes),
            f"{figures['perplexity']:.3f}",
            f"{figures['perplexity_increase']:+.2%}",
            f"{figures['kl_divergence']:.5f}",
            f"{figures['same_token']:.2%}",
        )
    Console(markup=False, highlight=False).print(table)
    say(f"{rows[0].quality.count} tokens; without the embedding table, which is looked up by rows")


def _draw(rows: list[Row], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
    unit, unit_bytes = ("GiB", 2**30) if rows[0].nbytes >= 2**30 else ("MiB", 2**20)
    at = [(row.nbytes / unit_bytes, 100 * row.figures(rows[0])["perplexity_increase"]) for row in rows]
    for x, y in at:
        panel.plot(x, y, "o")
    panel.set_xlabel(f"weights, {unit}")
    panel.set_ylabel("perplexity, % more")
    panel.set_xlim(left=0)
    panel.margins(y=0.1)
    panel.grid(alpha=0.3)
    figure.draw_without_rendering()  # only now it is known where everything is
    figure.set_layout_engine("none")
    _label(panel, at, [row.precision for row in rows])
    try:
        figure.savefig(picture)
    except (OSError, ValueError) as error:
        raise InputError(f"--picture {picture} cannot be written: {error}; choose another name") from error
    finally:
        pyplot.close(figure)


def _label(panel: Any, at: list[tuple[float, float]], texts: list[str]) -> None:
    """A label near each point of a panel whose place in its figure is settled, with a line to it."""
    figure = panel.figure
    scale = 72 / figure.dpi
    frame = panel.get_window_extent()
    points = [(x * scale, y * scale) for x, y in panel.transData.transform(at).tolist()]
    sizes = []
    for text in texts:
        label = figure.text(0, 0, text, fontsize=_LABEL_POINTS, va="bottom")
        box = label.get_window_extent()
        sizes.append((box.width * scale, box.height * scale))
        label.remove()
    corners = spread_labels(points, sizes, ((frame.x0 * scale, frame.y0 * scale), (frame.x1 * scale, frame.y1 * scale)))
    line = {"arrowstyle": "-", "linewidth": 0.5, "alpha": 0.5, "shrinkA": 0, "shrinkB": 3}
    for text, point, corner in zip(texts, at, corners, strict=True):
        panel.annotate(
            text, point, corner, textcoords="figure points", fontsize=_LABEL_POINTS, va="bottom", arrowprops=line
        )
