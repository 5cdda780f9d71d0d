"""Rules of a policy that would hold for nothing: misspelt, or behind one that takes all. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase

from pipo_ray.errors import InputError
from pipo_ray.quant.policy import Precision

_CLOSE = 0.6
_MOST_MATCHES = 3


def require_effect(precision: Precision, names: Collection[str], aliases: Mapping[str, str] | None = None) -> None:
    """Raise InputError, with the policy's file, the rule and what it may have meant, if a rule of `precision` matches
    none of `names`, a model's stored tensors, or only those that rules before it have taken.

    `aliases` maps names of tensors that are not stored, because they are tied to one that is, to that one's.
    """
    free = set(names)
    for number, rule in enumerate(precision.rules):
        matched = [name for name in names if fnmatchcase(name, rule.pattern)]
        if not matched:
            raise InputError(
                f"{precision}: rule {rule} matches no tensor of the model; {_meant(rule.pattern, names, aliases or {})}"
            )
        if free.isdisjoint(matched):
            earlier = next(one for one in precision.rules[:number] if fnmatchcase(matched[0], one.pattern))
            raise InputError(
                f"{precision}: rule {rule} holds for nothing, because rule {earlier} before it has "
                f"taken {matched[0]}, and what else it matches; put it in front, or delete it"
            )
        free.difference_update(matched)


def close_patterns(pattern: str, names: Collection[str]) -> list[str]:
    """Names, and patterns for modules in which they are, that are written nearly as `pattern` is; the closest first."""
    known: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        known[name] = known[f"*.{parts[-1]}"] = None
        for end in range(1, len(parts)):
            known[".".join(parts[:end]) + ".*"] = None
            if end > 1 and not parts[end - 1].isdigit():
                known[f"*.{parts[end - 1]}.*"] = None
    return get_close_matches(pattern, known, _MOST_MATCHES, _CLOSE)


def _meant(pattern: str, names: Collection[str], aliases: Mapping[str, str]) -> str:
    tied = next((name for name in aliases if fnmatchcase(name, pattern)), None)
    if tied is not None:
        return f"{tied} is tied to {aliases[tied]} and not stored; name that one, or delete the rule"
    if close := close_patterns(pattern, names):
        return f"close to it are {', '.join(close)}; correct it, or delete the rule"
    some = [name for name in names if name.endswith(".weight")] or list(names)
    return f"names are like {', '.join(some[:: max(1, len(some) // _MOST_MATCHES)][:_MOST_MATCHES])}; correct it"
