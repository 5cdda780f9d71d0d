"""Prompts from files and options: a bad one is named with file and line, before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipo_ray.cli.prompts import collect_prompts, parse_ids, read_prompts
from pipo_ray.errors import InputError


def test_all_sources_make_one_batch_in_a_fixed_order(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("third\n\n  fourth \r\n")
    found = collect_prompts(["first"], ["1, 2,3"], [str(tmp_path / "more.txt")])
    assert found == ["first", [1, 2, 3], "third", "  fourth "]


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.txt"])
def test_json_lines_are_known_by_name_or_by_the_first_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('\ufeff{"prompt": "a\\nb"}\n{"prompt_token_ids": [5, 6]}\n', encoding="utf-8")
    assert read_prompts(str(tmp_path / name)) == ["a\nb", [5, 6]]


def test_a_text_that_begins_with_a_brace_is_text(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text('{"a": 1}\n{x\n')
    assert read_prompts(str(tmp_path / "prompts.txt")) == ['{"a": 1}', "{x"]


@pytest.mark.parametrize(
    "line, what",
    [
        (b'{"prompt": ', "not JSON"),
        (b'{"promt": "x"}', "is no prompt"),
        (b'{"prompt": "x", "prompt_token_ids": [1]}', "is no prompt"),
        (b"[1, 2]", "is no prompt"),
        (b'{"prompt": 5}', "its prompt is a int"),
        (b'{"prompt": ""}', "empty"),
        (b'{"prompt": "\\ud800"}', "not valid Unicode"),
        (b'{"prompt_token_ids": []}', "empty"),
        (b'{"prompt_token_ids": [1, -1]}', "whole numbers"),
        (b'{"prompt_token_ids": [true]}', "whole numbers"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_line_is_named_with_file_and_number(tmp_path: Path, line: bytes, what: str) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "good"}\n\n' + line + b"\n")
    with pytest.raises(InputError, match=what) as caught:
        read_prompts(str(tmp_path / "p.jsonl"))
    assert f"{tmp_path}/p.jsonl, line 3" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", " , ", "1,x", "-1", "1.5", "²"])
def test_bad_token_ids_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--prompt-ids"):
        parse_ids(text)


def test_no_prompt_and_empty_prompts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n \n")
    for arguments, what in [
        (([], [], []), "no prompt was given"),
        (([""], [], []), "-p: the prompt is empty"),
        ((["\udcff"], [], []), "not valid Unicode"),
        (([], [], [str(tmp_path / "empty")]), "holds no prompt"),
        (([], [], [str(tmp_path / "none")]), "No such file"),
        (([], [], [str(tmp_path)]), "Is a directory"),
    ]:
        with pytest.raises(InputError, match=what):
            collect_prompts(*arguments)
