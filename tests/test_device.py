"""What is asked of a GPU before a run, as far as that can be seen without one."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipo_ray import LLM, device, llm, planner
from pipo_ray.device import Device, choose_device
from pipo_ray.errors import ResourceError
from pipo_ray.gpu_probe import GpuAnswer, Rates

MIB = 1 << 20


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an NVIDIA device."""
    monkeypatch.setattr(device, "Path", lambda path: SimpleNamespace(exists=lambda: path.startswith("/dev/nvidia")))


@pytest.mark.usefixtures("present")
def test_the_device_is_what_the_child_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    answer = GpuAnswer(1024 * MIB, 400 * MIB, Rates(55e9, 90e9))

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command[3:])
        return SimpleNamespace(stdout=f"a warning\n{json.dumps(asdict(answer))}\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert choose_device("auto", tmp_path) == Device("cuda", 1024 * MIB, 472 * MIB, 55e9, 90e9)
    choose_device("cuda")
    assert commands == [[str(tmp_path)], []]


@pytest.mark.usefixtures("present")
def test_a_child_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one: torch sees no device."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device("auto") == Device("cpu")
    with pytest.raises(ResourceError, match="torch cannot use the GPU"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("options", "asks"),
    [
        ({"max_kv_tokens": 800}, True),
        ({}, False),
        ({"max_kv_tokens": 800, "kv_on_cpu": True}, False),
        ({"max_kv_tokens": 800, "kv_on_cpu": False}, False),
        ({"max_kv_tokens": 800, "kv_in_ram": True}, False),
        ({"max_kv_tokens": 800, "kv_on_disk": "1GiB"}, False),
    ],
)
def test_rates_are_asked_for_where_the_place_of_the_kv_cache_is_open(
    options: dict[str, Any], asks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seen(Exception):
        pass

    def choose(wanted: str, rates_folder: Path | None) -> Device:
        raise Seen(wanted, rates_folder)

    monkeypatch.setattr(llm, "choose_device", choose)
    monkeypatch.setattr(planner, "instruction_set", lambda: "avx2")
    monkeypatch.setenv("PIPO_CACHE", str(tmp_path))
    with pytest.raises(Seen) as seen:
        LLM("a model", device="cuda", **options)
    assert seen.value.args == ("cuda", tmp_path / "profiles" if asks else None)
    monkeypatch.setattr(planner, "instruction_set", lambda: None)
    with pytest.raises(Seen) as seen:
        LLM("a model", device="cuda", **options)
    assert seen.value.args == ("cuda", None)
