"""What `--precision auto` is to reach, and what it chose. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from pipo_ray.errors import InputError
from pipo_ray.quant.policy import Precision
from pipo_ray.session.memory import format_size, parse_size

AUTO = "auto"
"""The value of --precision that measures and chooses."""


@dataclass(frozen=True)
class Target:
    """One of the two: `max_loss`, a fraction x (0.01 is 1 %): on the calibration text at most ln(1 + x) nats per token
    of KL divergence from the original, and perplexity at most 1 + x times the original's, with the fewest bytes; or
    `max_bytes` of the packed model without its embedding table, with the least loss.
    """

    max_loss: float | None = None
    max_bytes: int | None = None

    @classmethod
    def parse(cls, precision: str | None, max_loss: str | float | None, max_size: str | int | None) -> Target | None:
        """Of --precision, --max-loss ("1%", or 0.01) and --max-size ("2.5GiB", or bytes); None if it is not "auto".

        Raises InputError: a target without "auto", "auto" without exactly one, a value that is none.
        """
        if precision != AUTO:
            if max_loss is not None or max_size is not None:
                name = "--max-size" if max_loss is None else "--max-loss"
                raise InputError(f"{name} is a target of --precision auto; give that, too, or leave {name} out")
            return None
        if (max_loss is None) == (max_size is None):
            both = "both are given" if max_loss is not None else "there is none"
            raise InputError(
                "--precision auto wants one target: --max-loss 1% (more perplexity at most) or --max-size 2.5GiB; "
                f"{both}"
            )
        if max_size is not None:
            return cls(max_bytes=parse_size(max_size, "--max-size"))
        assert max_loss is not None
        return cls(max_loss=_fraction(max_loss))

    def to_json(self) -> dict[str, Any]:
        """For the key of what was chosen."""
        return {"max_loss": self.max_loss, "max_bytes": self.max_bytes}


@dataclass(frozen=True)
class LeastRounding:
    """The weight `name` alone in `format`, and the KL divergence in nats per token that is expected of it."""

    name: str
    format: str
    kl: float

    def __str__(self) -> str:
        """For people."""
        return (
            f"the least that rounding loses, {self.name} alone in {self.format}, is about {self.kl:.2g} nats, "
            f"--max-loss {100 * math.expm1(self.kl):.2g}%"
        )


@dataclass(frozen=True)
class Chosen:
    """A policy, what it takes of bytes (as `Target.max_bytes` counts them), and how good it is on `tokens` tokens of
    the calibration text: KL divergence from the original in nats per token, and the perplexity's increase. Where a
    target of loss leaves no weight that may be rounded, `least` is the rounding that loses least.
    """

    policy: Precision
    nbytes: int
    kl: float
    perplexity_increase: float
    tokens: int
    least: LeastRounding | None = None

    @classmethod
    def from_json(cls, raw: Any) -> Chosen:
        """What `to_json` gave. Raises KeyError, TypeError or ValueError for something else."""
        kl, increase = float(raw["kl"]), float(raw["perplexity_increase"])
        least = None if raw["least"] is None else LeastRounding(**raw["least"])
        return cls(Precision.from_json(raw["policy"]), int(raw["nbytes"]), kl, increase, int(raw["tokens"]), least)

    def to_json(self) -> dict[str, Any]:
        """For the parent process, and for the cache."""
        return {
            "policy": self.policy.to_json(), "nbytes": self.nbytes, "kl": self.kl,
            "perplexity_increase": self.perplexity_increase, "tokens": self.tokens,
            "least": None if self.least is None else asdict(self.least),
        }  # fmt: skip

    def __str__(self) -> str:
        """A line for the user."""
        least = "" if self.least is None else f"; no weight was rounded, because none may be: {self.least}"
        return (
            f"precision auto: {format_size(self.nbytes)} without the embedding table; on {self.tokens} tokens of the "
            f"calibration text perplexity {self.perplexity_increase:+.2%}, KL divergence {self.kl:.5f} nats{least}"
        )


def _fraction(value: str | float) -> float:
    text = str(value).strip()
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise InputError(
            f"--max-loss {text[:40]!r} is no increase of perplexity above 0; give for instance 1%, or 0.01"
        )
    return number
