"""The command itself: fast, light, and every error in one line."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import pipo_ray
from pipo_ray.cli import main


@pytest.mark.alone  # a bound on time
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["run", "--help"]])
def test_help_needs_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom pipo_ray.cli import main\nstatus = main(sys.argv[1:])\n"
        "assert not {'torch', 'transformers', 'ray', 'numpy', 'rich'} & sys.modules.keys()\nsys.exit(status)"
    )
    fastest = 9.0
    for _ in range(3):
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        fastest = min(fastest, time.monotonic() - start)
        if fastest < 0.5:
            break
    assert fastest < 0.5
    assert pipo_ray.__version__ in done.stdout or "usage: pipo" in done.stdout
    assert done.stderr == ""


def test_the_json_keys_are_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    assert "tokens_per_s" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["fly"], ["run"], ["pack", "x"], ["verify"], ["--frobnicate"]])
def test_a_wrong_command_line_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pipo: error: ")
    assert err.count("\n") == 1
    assert "--help`" in err
