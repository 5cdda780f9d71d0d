"""Programs forked from one process are as good as processes of their own."""

from __future__ import annotations

from pathlib import Path

from forked import Forked


def test_programs_share_the_prelude_and_nothing_else(tmp_path: Path) -> None:
    with Forked("import sys, os, textwrap; sys.known = os.getpid()", tmp_path) as forked:
        first = forked.run("import sys, csv; sys.mark = 5; print(sys.known, sys.stdin.read()); sys.exit(3)")
        second = forked.run("import sys; print(sys.known, {'csv', 'textwrap'} & {*sys.modules}, hasattr(sys, 'mark'))")
        third = forked.run("print('said'); 1 / 0")
    assert first.returncode == 3
    assert second.returncode == 0
    assert second.stdout == f"{int(first.stdout)} {{'textwrap'}} False\n"
    assert third.returncode == 1
    assert third.stdout == "said\n"
    assert third.stderr.endswith("ZeroDivisionError: division by zero\n")
