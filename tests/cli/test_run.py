"""`pipo run`, with a stand-in for LLM: what goes to stdout and stderr, what is refused, how it ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.fake_llm import REPORT, FakeLLM
from pipo_ray.cli import main
from pipo_ray.cli.result import JSON_KEYS
from pipo_ray.cli.terminal import OutputClosed, stderr_console
from pipo_ray.errors import ActorFailedError, InputError
from pipo_ray.plan.kv_disk import KVOnDisk

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MODEL is ".": the stand-in does not look into it."""
    monkeypatch.chdir(tmp_path)


def test_one_prompt_is_plain_text_on_stdout_and_a_table_on_stderr(fake_llm: type[FakeLLM], capsys: Capture) -> None:
    assert main(["run", ".", "-p", "hello world", "--memory", "2GiB"]) == 0
    out, err = capsys.readouterr()
    assert out == "HELLO WORLD\n"
    assert err.startswith("memory budget 2.0 GiB as asked for\n")
    for wanted in (
        "11 generated, 11 in 1 prompt ", "0.50 s", "2.00", "4.0 GiB in 4 sweeps, 1.0 GiB each",
        "96 tokens not computed again", "2.0 GiB, peak 1.5 GiB (75 %)",
        "1.0 GiB, 512.0 MiB of 5.0 GiB resident", "busy 75 %, waiting 25 %, starved 0 %",
    ):  # fmt: skip
        assert wanted in err
    (llm,) = fake_llm.made
    assert llm.closed
    assert llm.params.greedy
    assert llm.params.max_tokens == 128
    assert llm.arguments["memory"] == 2 << 30
    assert "weight_memory" not in llm.arguments


def test_the_table_says_how_long_it_gave_way_if_it_did(
    fake_llm: type[FakeLLM], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["run", ".", "-p", "hello"]) == 0
    assert "gave way" not in capsys.readouterr().err
    loader = {"stage": "NvmeLoader", "busy": 0.1, "waiting": 0.2, "starved": 0.1, "paused": 0.6}
    monkeypatch.setitem(REPORT, "stages", [loader])
    lowered: list[list[int]] = []  # this process cannot raise its priority again
    monkeypatch.setattr("pipo_ray.cli.options.give_way", lowered.append)
    assert main(["run", ".", "-p", "hello", "--background"]) == 0
    assert lowered == [[os.getpid()]]
    assert "busy 10 %, waiting 20 %, starved 10 %, gave way 60 %" in capsys.readouterr().err


def test_several_prompts_are_printed_as_they_finish(fake_llm: type[FakeLLM], capsys: Capture) -> None:
    assert main(["run", ".", "-p", "a longer one", "-p", "short", "-p", "short", "--prompt-ids", "104,105"]) == 0
    out, _ = capsys.readouterr()
    assert out.splitlines() == [
        "== 4 of 4: 104 105", "HI", "== 2 of 4: short", "SHORT", "== 3 of 4: short", "SHORT", "== 1 of 4: a longer one",
        "A LONGER ONE",
    ]  # fmt: skip


def test_samples_of_one_prompt_are_told_apart(fake_llm: type[FakeLLM], capsys: Capture) -> None:
    assert main(["run", ".", "-p", "abc", "--n", "2", "--temperature", "1"]) == 0
    assert capsys.readouterr().out == "== 1 of 1, sample 1: abc\nABC\n== 1 of 1, sample 2: abc\nABC\n"


def test_json_is_one_document_with_the_documented_keys(fake_llm: type[FakeLLM], capsys: Capture) -> None:
    assert main(["run", ".", "-p", "hé", "--json", "--logprobs", "1"]) == 0
    out, err = capsys.readouterr()
    assert "a library that prints" in err  # and not on stdout
    document = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert document["model"] == "."
    assert document["text"] == document["results"][0]["text"] == "HÉ"
    assert document["token_ids"] == [72, 201]
    assert document["logprobs"][0] == [
        {"token_id": 72, "logprob": -0.5, "rank": 1, "decoded_token": "H"},
        {"token_id": 0, "logprob": None, "rank": 2, "decoded_token": None},
    ]
    assert document["sweeps"] == 4
    assert document["bytes_streamed"] == 4 << 30
    assert document["results"][0]["bytes_streamed"] == 1 << 20
    required = {
        "text", "token_ids", "num_prompt_tokens", "num_generated_tokens", "ttft_s", "tokens_per_s", "sweeps",
        "bytes_streamed", "peak_memory_bytes",
    }  # fmt: skip
    assert required <= document.keys()
    for key in document.keys() | document["results"][0].keys():
        assert re.search(rf"\b{key}\b", JSON_KEYS), f"{key} is not documented"


def test_json_of_several_prompts_keeps_their_order(fake_llm: type[FakeLLM], capsys: Capture) -> None:
    assert main(["run", ".", "-p", "long prompt", "-p", "s", "--json", "--n", "2", "--temperature", "1"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert "text" not in document
    assert [result["text"] for result in document["results"]] == ["LONG PROMPT", "S"]
    assert [sample["index"] for sample in document["results"][1]["samples"]] == [0, 1]


def test_a_target_of_auto_arrives_or_is_refused(fake_llm: type[FakeLLM], capsys: Capture) -> None:
    assert main(["run", ".", "-p", "x", "--precision", "auto", "--max-loss", "1%"]) == 0
    (llm,) = fake_llm.made
    assert (llm.arguments["precision"], llm.arguments["max_loss"]) == ("auto", "1%")
    capsys.readouterr()
    assert main(["run", ".", "-p", "x", "--precision", "auto"]) == 2
    assert "--precision auto wants one target" in capsys.readouterr().err
    assert len(fake_llm.made) == 1


def test_every_option_arrives(fake_llm: type[FakeLLM], tmp_path: Path) -> None:
    arguments = [
        "--max-tokens", "7", "--weight-memory", "300MB", "--gpu-memory", "1.5G", "--device", "cuda",
        "--dtype", "float16", "--temperature", "0.5", "--top-p", "0.9", "--top-k", "5", "--min-p", "0.1",
        "--repetition-penalty", "1.2", "--presence-penalty", "0.3", "--frequency-penalty", "-0.4", "--seed",
        "3", "--stop", "a", "--stop", "b", "--logprobs", "2", "--n", "2", "--ignore-eos", "--ray-address",
        "local", "--dashboard", "--max-model-len", "64", "--max-batch-tokens", "32", "--stop-token-ids", "7,8",
        "--stop-token-ids", "9", "--no-verify", "--no-prefix-cache", "--mode", "memory-saver", "--precision", "int8",
        "--kv-on-disk", "2GiB", "--kv-folder", "/data", "--no-kv-encryption", "--kv-precision", "4",
    ]  # fmt: skip
    assert main(["run", ".", "-p", "x", "--trace", str(tmp_path / "t.json"), *arguments]) == 0
    (llm,) = fake_llm.made
    assert {k: v for k, v in llm.arguments.items() if k not in ("on_progress", "before_start")} == {
        "weight_memory": 300 * 10**6, "gpu_memory": 3 << 29, "device": "cuda", "dtype": "float16", "dashboard": True,
        "ray_address": "local", "trace": tmp_path / "t.json", "max_model_len": 64, "max_batch_tokens": 32,
        "verify_checksums": False, "prefix_cache": False, "mode": "memory-saver", "precision": "int8",
        "max_kv_tokens": 2 * (8 + 4 + 7), "kv_on_disk": KVOnDisk(2 << 30, "/data", encrypted=False),
        "max_kv_sequences": 2, "kv_precision": "4",
    }  # fmt: skip
    wanted: dict[str, Any] = {
        "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2,
        "presence_penalty": 0.3, "frequency_penalty": -0.4, "seed": 3, "stop": ("a", "b"), "logprobs": 2, "n": 2,
        "ignore_eos": True, "stop_token_ids": (7, 8, 9),
    }  # fmt: skip
    assert {name: getattr(llm.params, name) for name in wanted} == wanted
    assert not (tmp_path / "t.json").exists()


@pytest.mark.parametrize(
    "arguments, what",
    [
        ([], "no prompt was given"),
        (["-p", ""], "empty"),
        (["-p", "x", "--top-p", "0"], "top_p=0.0"),
        (["-p", "x", "--temperature", "nan"], "temperature=nan"),
        (["-p", "x", "--temperature", "hot"], "--temperature: invalid float value: 'hot'"),
        (["-p", "x", "--max-tokens", "0"], "max_tokens=0"),
        (["-p", "x", "--n", "2"], "n=2"),
        (["-p", "x", "--stop-token-ids", "7,a"], "--stop-token-ids: 'a' is no token id"),
        (["-p", "x", "--memory", "lots"], "--memory: 'lots'"),
        (["-p", "x", "--memory", "16"], "--memory 16: a number without a unit counts bytes; write 16GiB or 16MiB"),
        (["-p", "x", "--gpu-memory", "1GiB", "--device", "cpu"], "--gpu-memory means nothing"),
        (["-p", "x", "--kv-on-disk", "much"], "--kv-on-disk: 'much'"),
        (["-p", "x", "--kv-folder", "/data"], "mean nothing without --kv-on-disk"),
        (["-p", "x", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["-p", "x", "--dtype", "int3"], "invalid choice: 'int3'"),
        (["-p", "x", "--max-model-len", "0"], "--max-model-len 0"),
        (["-p", "x", "--trace", "/nowhere/t.json"], "there is no folder /nowhere"),
        (["-p", "x", "--trace", "/"], "is a folder"),
        (["-p", "x", "--mem", "1GiB"], "unrecognized arguments: --mem"),
        (["--prompts", "/nowhere/p.txt"], "No such file"),
    ],
)
def test_bad_options_are_one_line_and_start_nothing(
    fake_llm: type[FakeLLM], capsys: Capture, arguments: list[str], what: str
) -> None:
    assert main(["run", ".", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pipo: error: ")
    assert err.count("\n") == 1
    assert what in err
    assert fake_llm.made == []


@pytest.mark.parametrize(
    "error, status, line",
    [
        (ActorFailedError("ComputeWorker died\nthree times"), 1, "pipo: error: ComputeWorker died three times"),
        (InputError("too long"), 2, "pipo: error: too long"),
        (RuntimeError("a bug"), 1, "pipo: error: RuntimeError: a bug (PIPO_DEBUG=1 shows where it came from)"),
    ],
)
def test_an_error_on_the_way_keeps_the_text_and_ends_in_one_line(
    fake_llm: type[FakeLLM], capsys: Capture, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, line: str
) -> None:
    monkeypatch.delenv("PIPO_DEBUG", raising=False)
    fake_llm.fail_at = (3, error)
    assert main(["run", ".", "-p", "hello"]) == status
    out, err = capsys.readouterr()
    assert out == "HEL\n"
    assert err.splitlines()[-1] == line
    assert "Traceback" not in err
    assert fake_llm.made[0].closed
    monkeypatch.setenv("PIPO_DEBUG", "1")
    assert main(["run", ".", "-p", "hello"]) == status
    assert "Traceback" in capsys.readouterr().err


def test_text_without_a_tokenizer_starts_nothing(fake_llm: type[FakeLLM], capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["run", ".", "--prompt-ids", "1", "-p", "x"]) == 2
    assert capsys.readouterr().err.startswith("pipo: error: . has no tokenizer: give prompts as token ids")
    assert main(["run", ".", "--prompt-ids", "72,105"]) == 0
    assert capsys.readouterr().out == "HI\n"


def test_ctrl_c_closes_and_says_nothing(fake_llm: type[FakeLLM], capsys: Capture) -> None:
    fake_llm.fail_at = (3, KeyboardInterrupt())
    assert main(["run", ".", "-p", "hello"]) == 130
    out, err = capsys.readouterr()
    assert out == "HEL\n"
    assert err == "memory budget 2.0 GiB as asked for\n"
    assert fake_llm.made[0].closed


def test_answers_that_fill_the_context_are_told(
    fake_llm: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(fake_llm, "max_model_len", 12)
    assert main(["run", ".", "-p", "six so", "--max-tokens", "7"]) == 0
    line = "the answer ends before --max-tokens 7: prompt and answer together fill the context of 12 tokens\n"
    assert capsys.readouterr().err.endswith(line)
    assert main(["run", ".", "-p", "six so", "-p", "five5", "-p", "seven77", "--max-tokens", "8"]) == 0
    assert "2 answers end before --max-tokens 8" in capsys.readouterr().err
    for arguments in (["six so", "--max-tokens", "6"], ["five5", "--max-tokens", "7"]):
        assert main(["run", ".", "-p", *arguments]) == 0
        assert "context" not in capsys.readouterr().err


DRIVER = """
import sys, types
sys.path.insert(0, {tests!r})
from fake_llm import FakeLLM
module = types.ModuleType("pipo_ray.llm")
module.LLM = type("LLM", (FakeLLM,), {{"made": []}})
sys.modules["pipo_ray.llm"] = module
from pipo_ray.cli import main
status = main(sys.argv[1:])
assert all(llm.closed for llm in module.LLM.made)
assert not {{"torch", "transformers", "ray"}} & sys.modules.keys()
sys.exit(status)
"""


def driver(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    code = DRIVER.format(tests=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable, "-c", code, *arguments], **{"stderr": subprocess.PIPE, **options})


def test_a_closed_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = driver("run", ".", "-p", "hello" * 1000, stdout=writer)
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 141
    assert err == b"memory budget 2.0 GiB as asked for\n"


def test_a_closed_pipe_under_stderr_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = driver("run", ".", "-p", "hello", stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 141
    assert out == b""


def test_a_table_that_nobody_reads_ends_the_run_as_a_line_does(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with pytest.raises(OutputClosed):
            stderr_console().print("a table")
        os.dup2(devnull := os.open(os.devnull, os.O_WRONLY), writer)  # what is still in it must go somewhere
        os.close(devnull)


def test_closed_streams_lead_nowhere_and_no_file_takes_their_number(tmp_path: Path) -> None:
    """`pipo run ... >&-`; with all three closed, an opened file was stdout to whoever prints."""
    process = driver("run", ".", "-p", "hello", stdout=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == b""
    code = """
import os, sys
from pipo_ray.cli.terminal import open_what_is_closed
open_what_is_closed()
with open(sys.argv[1], "w") as file:
    file.write(f"{file.fileno() > 2} {[os.get_inheritable(number) for number in range(3)]}")
    print("text")
    print("more", file=sys.stderr)
    assert sys.stdin.read() == ""
    os.system("echo from a child")
"""
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "file")], preexec_fn=lambda: os.closerange(0, 3), check=True
    )
    assert (tmp_path / "file").read_text() == "True [True, True, True]"


def test_a_full_disk_under_stdout_is_one_line() -> None:
    with open("/dev/full", "wb") as full:
        process = driver("run", ".", "-p", "hello", "--json", stdout=full)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines()[-1].startswith(b"pipo: error: stdout cannot be written: No space left on device")


def test_a_terminal_gets_no_escape_sequences_of_the_model(
    fake_llm: type[FakeLLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    assert main(["run", ".", "-p", "a\x1b]0;title\x07\tb\n"]) == 0
    assert sys.stdout.getvalue() == "A\ufffd]0;TITLE\ufffd\tB\n"  # type: ignore[attr-defined]
