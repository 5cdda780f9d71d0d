"""A GPU's memory and rates, as far as they can be asked for without one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipo_ray import gpu_probe
from pipo_ray.gpu_probe import GpuAnswer, Rates, kept_rates

MIB = 1 << 20
FACTS = {"processor": "AMD EPYC", "device": "NVIDIA H200", "driver": "570.1"}


class Clock:
    """Measures something else every time."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self) -> Rates:
        self.asked += 1
        return Rates(55e9 + self.asked, 90e9)


# --- rates -----------------------------------------------------------------------------------------------------------


def test_rates_are_measured_once_for_a_machine(tmp_path: Path) -> None:
    clock = Clock()
    first = kept_rates(tmp_path / "profiles", FACTS, clock)
    assert kept_rates(tmp_path / "profiles", FACTS, clock) == first
    assert clock.asked == 1
    for name in FACTS:
        assert kept_rates(tmp_path / "profiles", FACTS | {name: "another"}, clock) != first
    assert clock.asked == 1 + len(FACTS)


@pytest.mark.parametrize(
    "damage",
    [
        "", "{", "[]", '{"rates": {"link": 1.0}}', '{"rates": {"link": 0.0, "ram": 1.0}}',
        '{"rates": {"link": "1", "ram": 1.0}}', '{"rates": {"link": NaN, "ram": 1.0}}',
    ],
)  # fmt: skip
def test_a_damaged_file_is_replaced(damage: str, tmp_path: Path) -> None:
    clock = Clock()
    kept_rates(tmp_path, FACTS, clock)
    (file,) = tmp_path.iterdir()
    file.write_text(damage)
    second = kept_rates(tmp_path, FACTS, clock)
    assert clock.asked == 2
    assert kept_rates(tmp_path, FACTS, clock) == second


def test_of_two_runs_at_the_same_time_both_take_what_the_first_has_kept(tmp_path: Path) -> None:
    clock = Clock()
    others: list[Rates] = []

    def measure() -> Rates:
        mine = clock()
        others.append(kept_rates(tmp_path, FACTS, clock))
        return mine

    assert kept_rates(tmp_path, FACTS, measure) == others[0] == Rates(55e9 + 2, 90e9)


def test_what_could_not_be_measured_is_not_kept(tmp_path: Path) -> None:
    assert kept_rates(tmp_path, FACTS, lambda: Rates(0.0, 90e9)) == Rates(0.0, 90e9)
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_to_write_to_they_are_measured_every_time(tmp_path: Path) -> None:
    (tmp_path / "profiles").write_text("a file where the folder would be")
    clock = Clock()
    for number in (1, 2):
        assert kept_rates(tmp_path / "profiles", FACTS, clock) == Rates(55e9 + number, 90e9)


# --- the child process -----------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CUDA as torch shows it, and which rates were measured."""
    measured: list[str] = []

    def rate(name: str, bytes_per_s: float) -> float:
        measured.append(name)
        return bytes_per_s

    properties = SimpleNamespace(name="NVIDIA H200", total_memory=1 << 37, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000 * MIB, 2000 * MIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 24 * MIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(gpu_probe, "_load_kernels", lambda device: None)
    monkeypatch.setattr(gpu_probe, "_free_by_driver", lambda: 1500 * MIB)
    monkeypatch.setattr(gpu_probe, "_link_rate", lambda: rate("link", 55e9))
    monkeypatch.setattr(gpu_probe, "_ram_rate", lambda: rate("ram", 90e9))
    return measured


def said(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """What the child process prints."""
    monkeypatch.setattr(sys, "argv", ["gpu_probe", *arguments])
    gpu_probe.main()
    return json.loads(capsys.readouterr().out)


def test_no_rate_is_measured_where_nobody_asks(
    gpu: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = GpuAnswer.from_json(said([], monkeypatch, capsys))
    assert answer == GpuAnswer(1024 * MIB, 476 * MIB, Rates())
    assert gpu == []


def test_rates_are_measured_where_they_are_asked_for_and_once(
    gpu: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        answer = GpuAnswer.from_json(said([str(tmp_path)], monkeypatch, capsys))
        assert answer == GpuAnswer(1024 * MIB, 476 * MIB, Rates(55e9, 90e9))
    assert gpu == ["link", "ram"]


def test_the_processor_reads_ram_at_some_rate() -> None:
    assert 1e8 < gpu_probe._ram_rate() < 1e13
