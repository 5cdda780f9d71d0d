"""Rules of the project that are cheap to check."""

from __future__ import annotations

import ast
import html
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from safetensors import safe_open
from scripts import load_script

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 500
# Written in two parts, so that this file does not break the rule it checks.
REGISTRY_HOSTS = [
    f"{name}.{end}"
    for name, end in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("download.pytorch", "org"),
        ("pypi.nvidia", "com"),
        ("anaconda", "org"),
        ("npmjs", "org"),
        ("crates", "io"),
        ("deb.debian", "org"),
    )
]


def _project_files() -> list[Path]:
    """Files under version control, and new ones that are not ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def _names(paths: list[Path]) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def _make_variable(name: str) -> str:
    printed = subprocess.run(
        ["make", "-s", "-f", "Makefile", "-f", "-", "print"],
        input=f"print:\n\t@echo '$({name})'\n",
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    return printed.stdout.strip()


def test_benchmarks_say_how_to_run_them() -> None:
    scripts = [path for path in (ROOT / "benchmarks").glob("*.py") if path.name != "__init__.py"]
    silent = [path for path in scripts if path.name not in (ast.get_docstring(ast.parse(path.read_text())) or "")]
    assert not silent, f"no docstring with the command that runs it: {_names(silent)}"


def test_make_bench_names_scripts_that_exist() -> None:
    names = _make_variable("BENCHMARKS").split()
    assert names, "make bench would run nothing"
    assert not [name for name in names if not (ROOT / name).is_file()]
    slow = [name for name in names if "--quick" not in (ast.get_docstring(ast.parse((ROOT / name).read_text())) or "")]
    assert not slow, f"make bench calls them with --quick, which they do not have: {slow}"


def test_make_bench_goes_on_behind_a_script_that_fails_and_names_it(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "ran $*"\ntest "$1" != second.py\n')
    python.chmod(0o755)
    installed = f"{tmp_path}/venv/installed"
    done = subprocess.run(
        ["make", "-s", "-o", installed, "bench", "BENCHMARKS=first.py second.py third.py", f"BIN={tmp_path}",
         f"VENV={tmp_path}/venv"],
        cwd=ROOT, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True,
    )  # fmt: skip
    ran = [line for line in done.stdout.splitlines() if line.startswith("ran")]
    assert ran == ["ran first.py --quick", "ran second.py --quick", "ran third.py --quick"]
    assert done.returncode != 0
    assert "failed: second.py" in done.stderr


def test_readme_names_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "make demo" in readme
    assert "make test" in readme


def _demo_commands() -> list[list[str]]:
    commands: list[list[str]] = load_script("demo_picture.py").demo_commands()
    return commands


def _bundled_bytes(bits: float) -> float:
    """Of the bundled model's matrices without the embedding table, which is looked up."""
    with safe_open(ROOT / "pipo_ray" / "bundled" / "model.safetensors", "np") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys() if "embed" not in name]  # noqa: SIM118
    return sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2) * bits / 8


def test_readme_names_benchmarks_that_exist_with_flags_that_they_have() -> None:
    """A figure is worth as much as the command that brings it back. And none is by hand."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "by hand" not in readme
    shared = (ROOT / "benchmarks/streaming.py").read_text()
    commands = re.findall(r"`(?:python )?(?:benchmarks/)?(\w+\.py)( [^`]*)?`", readme)
    assert len(commands) > 20
    wrong = []
    for name, arguments in commands:
        script = ROOT / "benchmarks" / name
        text = script.read_text() if script.is_file() else ""
        text += shared if "from streaming import" in text else ""
        flags = re.findall(r"--[a-z-]+", arguments)
        wrong += [f"{name} {flag}" for flag in flags if f'"{flag}"' not in text] + ([] if text else [name])
    assert not wrong


def test_demo_streams() -> None:
    """`make demo` runs one model and prompt at 16 bits and at 4, each with less weight memory than its weights take."""
    plain, four = ([words for words in command if words] for command in _demo_commands())
    budgets = []
    for command, bits in ((plain, 16.0), (four, 4.5)):
        place = command.index("--weight-memory")
        number, unit = re.fullmatch(r"(\d+)\s*([KM]iB)", command[place + 1]).groups()  # type: ignore[union-attr]
        budgets.append(int(number) << {"KiB": 10, "MiB": 20}[unit])
        assert budgets[-1] < _bundled_bytes(bits)
        del command[place : place + 2]
    assert budgets[1] < budgets[0]
    place = four.index("--precision")
    assert four[place : place + 2] == ["--precision", "int4"]
    del four[place : place + 2]
    assert plain == four
    assert plain[:3] == ["pipo", "run", "pipo_ray/bundled"]


def test_the_picture_of_the_demo_has_both_runs() -> None:
    """docs/demo.svg is made by benchmarks/demo_picture.py; a terminal's lines are broken in it."""
    picture = html.unescape(re.sub(r"<[^>]*>", "", (ROOT / "docs" / "demo.svg").read_text())).replace("\xa0", " ")
    written = "".join(picture.split())
    for command in _demo_commands():
        assert "".join(shlex.join(command).split()) in written


def test_files_stay_small_enough_to_hold_in_the_head() -> None:
    sources = [*(ROOT / "pipo_ray").rglob("*.py"), *(ROOT / "actors").rglob("*.py")]
    long = [path for path in sources if len(path.read_text().splitlines()) > MAX_LINES]
    assert not long, f"more than {MAX_LINES} lines: {_names(long)}"


def test_no_package_registry_is_named() -> None:
    named = [path for path in _project_files() if any(host.encode() in path.read_bytes() for host in REGISTRY_HOSTS)]
    assert not named, f"names a package registry's host: {_names(named)}"


def test_changelog_has_the_version() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert f"## [{version[1]}]" in (ROOT / "CHANGELOG.md").read_text()


def test_pins_lie_in_the_declared_ranges() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {}
    for pin in (Requirement(line) for line in lines if line and not line.startswith("#")):
        (specifier,) = pin.specifier
        pins[canonicalize_name(pin.name)] = specifier.version
    declared = re.findall(r'"([a-zA-Z_\[\]-]+>=[0-9.]+)"', (ROOT / "pyproject.toml").read_text())
    assert len(declared) > 10
    for requirement in map(Requirement, declared):
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_tests_that_start_ray_clusters_of_others_are_never_side_by_side() -> None:
    pytest.importorskip("xdist")
    from side_by_side import RAY_CLUSTERS

    starts_one = re.compile(r"(foreign|two_node)_cluster\.py")
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    assert _names([path for path in files if starts_one.search(path.read_text())]) == sorted(RAY_CLUSTERS)
