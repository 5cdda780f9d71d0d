"""Sampling parameters, in the names and conventions of vLLM. Imports neither torch nor transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, NoReturn

from pipo_ray.errors import InputError

GREEDY_BELOW = 1e-5  # a smaller temperature is greedy, as in vLLM: dividing by it would overflow float32


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen and when it ends. Every bad value raises InputError.

    Numbers of another type that mean the same (1 for 1.0, NumPy's) are accepted and stored as Python's; lists are
    stored as tuples, so that an instance is immutable, hashable and small to pickle.
    """

    n: int = 1
    """Samples per prompt; 1 if greedy."""
    temperature: float = 1.0
    """Logits are divided by it; 0 means greedy: the most probable token, the lowest id among equals."""
    top_p: float = 1.0
    """Keep the most probable tokens until their probabilities add up to this, in (0, 1]."""
    top_k: int = 0
    """Keep this many of the most probable tokens; 0 or -1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less probable than this fraction of the most probable one, in [0, 1]."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or the text; above 0, 1 is off."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of a generated token, in [-2, 2] (OpenAI's formula)."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a generated token as often as it was generated, in [-2, 2]."""
    seed: int | None = None
    """Makes the random numbers repeatable; None (or -1): a fresh one for every request."""
    stop: str | Sequence[str] | None = None
    """Strings that end the text where they begin."""
    stop_token_ids: Sequence[int] | None = None
    """Token ids that end the text, besides the model's end-of-sequence ids."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence id."""
    max_tokens: int | None = 16
    """The most tokens to generate; None: up to the model's context."""
    min_tokens: int = 0
    """No end-of-sequence id, stop id or stop string before so many tokens."""
    logprobs: int | None = None
    """Report the log probability of the chosen token and of so many most probable ones; None: no report."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    include_stop_str_in_output: bool = False
    """Keep the stop string, or the stop token's text, in the text."""
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    """Added to the logits of these token ids, each in [-100, 100]."""

    def __post_init__(self) -> None:
        self._integer("n", 1)
        self._number("temperature", 0.0, math.inf, "a finite number, 0 or above")
        self._number("top_p", 0.0, 1.0, "above 0 and at most 1", open_low=True)
        self._integer("top_k", -1, wanted="a whole number, 1 or above, or 0 or -1 to switch it off")
        self._number("min_p", 0.0, 1.0, "from 0 to 1")
        self._number("repetition_penalty", 0.0, math.inf, "a finite number above 0", open_low=True)
        self._number("presence_penalty", -2.0, 2.0, "from -2 to 2")
        self._number("frequency_penalty", -2.0, 2.0, "from -2 to 2")
        if self.seed is not None:
            self._integer("seed", -(2**63), 2**64 - 1, "a whole number from -2^63 to 2^64 - 1")
            if self.seed == -1:
                self._set("seed", None)
        if self.max_tokens is not None:
            self._integer("max_tokens", 1)
        self._integer("min_tokens", 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            self._refuse("min_tokens", f"at most max_tokens, which is {self.max_tokens}")
        if self.logprobs is not None:
            self._integer("logprobs", 0)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "True or False")
        self._set_stop()
        self._set_logit_bias()
        if self.greedy and self.n > 1:
            self._refuse(
                "n", "1 where temperature is 0 (greedy), or raise temperature: greedy samples are all the same"
            )

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken and no random number is used."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalizes(self) -> bool:
        """Whether a token's logit depends on the tokens in front of it."""
        return bool(self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, empty where there is none."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def check_vocab_size(self, vocab_size: int) -> None:
        """Raise InputError where a token id of `stop_token_ids` or `logit_bias` is not below `vocab_size`."""
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            for token_id in ids or ():
                if token_id >= vocab_size:
                    _refuse_value(name, token_id, f"token ids from 0 to {vocab_size - 1}, the model's vocabulary")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _refuse(self, name: str, wanted: str) -> NoReturn:
        _refuse_value(name, getattr(self, name), wanted)

    def _integer(self, name: str, low: int, high: float = math.inf, wanted: str = "") -> None:
        value = getattr(self, name)
        if not _is_integer(value) or not low <= value <= high:
            self._refuse(name, wanted or f"a whole number, {low} or above")
        self._set(name, int(value))

    def _number(self, name: str, low: float, high: float, wanted: str, *, open_low: bool = False) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            self._refuse(name, wanted)
        number = float(value)
        if not low <= number <= high or (open_low and number == low):
            self._refuse(name, wanted)
        self._set(name, number)

    def _set_stop(self) -> None:
        strings: Any = (self.stop,) if isinstance(self.stop, str) else (() if self.stop is None else self.stop)
        if not _is_collection(strings) or not all(isinstance(string, str) and string for string in strings):
            self._refuse("stop", "a string or a list of strings, none of them empty")
        self._set("stop", tuple(strings))
        ids: Any = () if self.stop_token_ids is None else self.stop_token_ids
        if not _is_collection(ids) or not all(_is_integer(token_id) and token_id >= 0 for token_id in ids):
            self._refuse("stop_token_ids", "a list of token ids, each a whole number, 0 or above")
        self._set("stop_token_ids", tuple(int(token_id) for token_id in ids))

    def _set_logit_bias(self) -> None:
        if self.logit_bias is None:
            return
        wanted = "a mapping of token ids (whole numbers, 0 or above) to numbers from -100 to 100"
        if not isinstance(self.logit_bias, Mapping):
            self._refuse("logit_bias", wanted)
        for token_id, bias in self.logit_bias.items():
            good = _is_integer(token_id) and token_id >= 0 and isinstance(bias, Real) and not isinstance(bias, bool)
            if not good or not -100 <= bias <= 100:
                _refuse_value("logit_bias", {token_id: bias}, wanted)
        # A copy: the caller's mapping may change after it was checked.
        self._set("logit_bias", {int(token_id): float(bias) for token_id, bias in self.logit_bias.items()})


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_collection(value: object) -> bool:
    return isinstance(value, (list, tuple, set, frozenset))


def _refuse_value(name: str, value: object, wanted: str) -> NoReturn:
    shown = repr(value)
    shown = shown if len(shown) <= 100 else shown[:97] + "..."
    raise InputError(f"sampling parameter {name}={shown}: give {wanted}")
