"""`benchmarks/gpu_peers`: what a peer's run prints and writes, with a peer that takes no time, on the CPU; and what is
installed for it.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from scripts import load_script

CONFIG = {
    "model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 32,
    "num_hidden_layers": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def table() -> ModuleType:
    return load_script("gpu_peers/table.py")


@pytest.fixture(scope="module")
def measurement(table: ModuleType) -> ModuleType:
    return load_script("gpu_peers/measurement.py")


def report(**row: Any) -> dict[str, Any]:
    return {
        "peer": "accelerate", "versions": {"accelerate": "1.15.0", "torch": "2.11.0"}, "device": "a GPU", "from": "ram",
        "checkpoint": "/models/llama", "gpu_memory": 6_440_000_000, "rows": [row],
    }  # fmt: skip


MEASURED = {
    "kind": "decode", "batch": 32, "length": 32, "seconds": 0.354, "all_seconds": [0.36, 0.354, 0.351],
    "kv_cache": "on the GPU", "placement": "9 of 32 layers on the GPU", "gpu_max_reserved_bytes": 5_500_000_000,
    "gpu_context_bytes": 500_000_000, "within_budget": True,
}  # fmt: skip


def test_a_row_has_name_version_seconds_with_spread_and_memory(table: ModuleType) -> None:
    heads, _ = table.HEADER.split("  what")
    line = table.line(report(), MEASURED)
    assert line.split("  ")[-1] == "9 of 32 layers on the GPU; KV on the GPU"
    assert line.split()[:10] == ["accelerate", "1.15.0", "batch", "32", "0.354", "0.351", "-", "0.360", "6.00", "6.44"]
    for title, figure in {"row": "batch 32", "s/sweep": "0.354", "spread": "0.360", "GPU GB": "6.00"}.items():
        assert line[: heads.index(title) + len(title)].endswith(figure), title


def test_more_than_the_budget_is_marked(table: ModuleType) -> None:
    assert "6.00   6.44!" in table.line(report(), {**MEASURED, "within_budget": False})
    assert "!" not in table.line(report(), MEASURED)


def test_a_prompt_and_a_row_that_failed(table: ModuleType) -> None:
    prompt = {**MEASURED, "kind": "prompt", "batch": 8, "length": 2048}
    assert "prompt 8x2048" in table.line(report(), prompt)
    failed = {"kind": "prompt", "batch": 8, "length": 2048, "failed": "OutOfMemoryError: 3 GB\nmore of it"}
    assert table.line(report(), failed).endswith("prompt 8x2048  failed: OutOfMemoryError: 3 GB")


class Peer:
    """Its tokens are there at once, of batch 4 never."""

    in_flight_bytes = 0

    def __init__(self) -> None:
        self.model = SimpleNamespace(generate=self._generate)

    def place(self, resident_bytes: int) -> str:
        return "everything in RAM"

    def _generate(self, *, input_ids: torch.Tensor, streamer: Any, max_new_tokens: int, **_: Any) -> None:
        if len(input_ids) == 4:
            raise ValueError("takes no batch of 4")
        streamer.put(input_ids)
        for token in range(max_new_tokens):
            streamer.put(torch.full((len(input_ids),), token))
        streamer.end()


def test_a_run_prints_its_rows_and_writes_them(
    measurement: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    out = tmp_path / "rows.json"
    arguments = ["--checkpoint", str(tmp_path), "--gpu-memory", "1000000", "--batch", "1,4", "--out", str(out)]
    arguments += ["--device", "cpu", "--prompt-tokens-total", "0"]
    monkeypatch.setattr("sys.argv", ["peer.py", *arguments])
    options = measurement.parse(measurement.arguments("a peer"))
    rows = measurement.Rows(options, "torch", ("torch",))
    groups = [[case] for case in measurement.cases(options)]
    measurement.run(options, rows, Peer, groups=groups, allowed=measurement.limit_gpu(options))

    first, second = json.loads(out.read_text())["rows"]
    assert (first["batch"], first["token_ids"], len(first["all_seconds"])) == (1, [0, 1, 2, 3, 4], 3)
    assert second["failed"] == "ValueError: takes no batch of 4"
    printed, shown = capsys.readouterr().out.split("\n\n")
    for text in (printed, shown):  # as they come, and all of them at the end
        assert text.count(f"torch {torch.__version__}") >= 3
        assert "everything in RAM; KV on the GPU" in text
        assert "failed: ValueError: takes no batch of 4" in text
    assert shown.rstrip().endswith(str(out))


def test_an_environment_is_installed_once_with_the_torch_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environments = load_script("peers/environments.py")
    commands: list[list[str]] = []

    def install(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        (tmp_path / "environment-ollm").mkdir(exist_ok=True)
        return SimpleNamespace(returncode=0)

    def ask(*arguments: str) -> list[list[str]]:
        commands.clear()
        monkeypatch.setattr("sys.argv", ["environments.py", "ollm", str(tmp_path), *arguments])
        environments.main()
        assert capsys.readouterr().out == f"{tmp_path}/environment-ollm/bin/python\n"
        return [command[5:] for command in commands[1:]]  # behind: python -m pip install --quiet

    monkeypatch.setattr(environments.subprocess, "run", install)
    first, *_, last = ask()
    assert (first, last) == (["torch==2.13.0"], ["--no-deps", "ollm==1.0.3"])
    assert ask() == []
    assert ask("--torch", "2.11.0")[0] == ["torch==2.11.0"]
