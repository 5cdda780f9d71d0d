"""A format for every tensor, written as few rules that people can read. Imports no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from pipo_ray.quant.policy import EVERYTHING, Rule

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def rules_for(formats: Mapping[str, str], others: Collection[str] = ()) -> tuple[Rule, ...]:
    """Rules that give each tensor of `formats` (name to format) its own, and name none of `others`, matrices that
    cannot be quantized, but by "*".

    The most frequent format is the last rule, for "*". Where all of a module's tensors have the same, it is named in
    their stead; modules that differ by a number of one dot only are named together.
    """
    if not formats:
        return ()
    (common, _), *_ = Counter(formats.values()).most_common(1)
    rules = [rule for rule in _modules(formats, others) if rule.format != common]
    return (*_merge_numbers(rules), Rule(EVERYTHING, common))


def _modules(formats: Mapping[str, str], others: Collection[str]) -> list[Rule]:
    """A rule for each of the largest modules within which all formats are the same, in the order of `formats`."""
    inside: dict[str, set[str | None]] = {}
    for name in (*formats, *others):
        for module in _modules_of(name):
            inside.setdefault(module, set()).add(formats.get(name))
    rules: dict[Rule, None] = {}
    for name, format in formats.items():
        whole = next((module for module in _modules_of(name) if inside[module] == {format}), None)
        rules[Rule(name if whole is None else f"{whole}.*", format)] = None
    return list(rules)


def _modules_of(name: str) -> list[str]:
    """Of "a.0.b.weight": "a", "a.0", "a.0.b", but none that ends before a number ("a"): it is no module but a list."""
    parts = name.split(".")
    ends = [end for end in range(1, len(parts)) if not parts[end].isdigit()]
    return [".".join(parts[:end]) for end in ends]


def _merge_numbers(rules: Iterable[Rule]) -> list[Rule]:
    """Rules that differ by the last digit of one number are written as one: "layers.1[0-26].mlp.*"."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for rule in rules:
        if (number := _NUMBER.search(rule.pattern)) is None:
            groups[rule.pattern, "", rule.format] = []
            continue
        last = number.end() - 1
        key = rule.pattern[:last], rule.pattern[number.end() :], rule.format
        groups.setdefault(key, []).append(int(rule.pattern[last]))
    return [Rule(f"{start}{_digits(digits)}{end}", format) for (start, end, format), digits in groups.items()]


def _digits(digits: list[int]) -> str:
    """One digit as itself, several as a class of wildcards: [0-35]."""
    if len(digits) < 2:
        return "".join(map(str, digits))
    runs: list[list[int]] = []
    for digit in sorted(digits):
        if runs and digit == runs[-1][-1] + 1:
            runs[-1].append(digit)
        else:
            runs.append([digit])
    return "[" + "".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else "".join(map(str, run)) for run in runs) + "]"
