"""`pipo chat`, with a stand-in for LLM."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from cli.fake_llm import FakeLLM
from pipo_ray.cli import main
from pipo_ray.errors import InputError

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return tmp_path


def say(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))


def test_the_conversation_is_remembered(
    fake_llm: type[FakeLLM], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    say(monkeypatch, "hi", "", "you there", "/reset", "again", "/exit", "never said")
    assert main(["chat", str(folder), "--system", "be brief"]) == 0
    assert capsys.readouterr().out == "HI\nYOU THERE\nAGAIN\n"
    (llm,) = fake_llm.made
    system = {"role": "system", "content": "be brief"}
    assert llm.conversations == [
        [system, {"role": "user", "content": "hi"}],
        [
            system,
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "HI"},
            {"role": "user", "content": "you there"},
        ],
        [system, {"role": "user", "content": "again"}],
    ]
    assert llm.closed


def test_ctrl_c_stops_the_answer_and_not_the_program(
    fake_llm: type[FakeLLM], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    stream = fake_llm.stream

    def interrupted(self: FakeLLM, prompts: list[str], params: object):  # type: ignore[no-untyped-def]
        self.fail_at = (3, KeyboardInterrupt()) if prompts == ["a long answer"] else None
        return stream(self, prompts, params)

    monkeypatch.setattr(fake_llm, "stream", interrupted)
    say(monkeypatch, "a long answer", "next")
    assert main(["chat", str(folder)]) == 0
    assert capsys.readouterr().out == "A L\nNEXT\n"
    assert fake_llm.made[0].conversations[1][1] == {"role": "assistant", "content": "A L"}


def test_an_error_in_a_script_ends_it(
    fake_llm: type[FakeLLM], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    fake_llm.fail_at = (0, InputError("the prompt has 9 tokens, the context is 8"))
    say(monkeypatch, "too long")
    assert main(["chat", str(folder)]) == 2
    assert capsys.readouterr().err.endswith("pipo: error: the prompt has 9 tokens, the context is 8\n")


def test_a_line_that_is_no_text_is_named(
    fake_llm: type[FakeLLM], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    say(monkeypatch, "caf\udce9", "never said")
    assert main(["chat", str(folder)]) == 2
    assert capsys.readouterr().err.endswith("error: the line is not valid Unicode at character 3; give UTF-8\n")
    assert fake_llm.made[0].conversations == []


@pytest.mark.parametrize("config", [None, {}, {"chat_template": None}])
def test_without_a_chat_template_nothing_is_started(
    fake_llm: type[FakeLLM], folder: Path, capsys: Capture, config: dict[str, None] | None
) -> None:
    (folder / "tokenizer_config.json").unlink()
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert main(["chat", str(folder)]) == 2
    assert capsys.readouterr().err == (
        f"pipo: error: {folder} has no chat template: it is no chat model; use `pipo run`, or choose a chat model\n"
    )
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert main(["chat", str(folder), "--max-tokens", "0"]) == 2
    assert fake_llm.made == []
