"""What a machine measured of its kernels holds for every run there, until something changes that it depends on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipo_ray.model import cpu_kernels, cpu_linear, kept_profiles
from pipo_ray.model.cpu_kernels import OwnKernels
from pipo_ray.model.cpu_linear import CpuProducts
from pipo_ray.model.kept_profiles import Costs, Measurable, ProfilePlaces, kept_profile, processor_name
from pipo_ray.model.kernel_profile import Cost, KernelProfile, Layout

WANTED: dict[Layout, Measurable] = {"matmul": Measurable(("native", "wide"))}


class Clock:
    """Measures every time something else, as clocks do; counts how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[Layout] = []

    def __call__(self, layouts: Collection[Layout]) -> dict[Layout, Costs]:
        self.asked += layouts
        rate = 1e-9 * len(self.asked)
        return {
            layout: {"native": Cost(rate, (1, 2), (rate, rate)), "wide": Cost(0.0, (1,), (rate,))} for layout in layouts
        }


def run(
    folder: Path, clock: Callable[..., Any], wanted: Any = WANTED, dtype: torch.dtype = torch.bfloat16
) -> KernelProfile:
    """A session's profile."""
    return kept_profile(ProfilePlaces(None, folder), dtype, wanted, clock)


def kept_in(folder: Path) -> Path:
    """The one file in `folder`."""
    (file,) = folder.iterdir()
    return file


def test_the_next_run_has_the_same_profile(tmp_path: Path) -> None:
    clock = Clock()
    first = run(tmp_path / "profiles", clock)
    assert run(tmp_path / "profiles", clock) == first
    assert clock.asked == ["matmul"]
    assert json.loads(kept_in(tmp_path / "profiles").read_text())["facts"]["threads"] == torch.get_num_threads()


def test_a_restarted_worker_needs_no_machine_folder(tmp_path: Path) -> None:
    clock = Clock()
    places = ProfilePlaces(tmp_path / "kernels.json")
    first = kept_profile(places, torch.bfloat16, WANTED, clock)
    assert kept_profile(places, torch.bfloat16, WANTED, clock) == first
    assert clock.asked == ["matmul"]


def test_the_session_has_a_copy_of_what_the_machine_kept(tmp_path: Path) -> None:
    """What becomes of the cache folder meanwhile does not change a run that has begun."""
    clock = Clock()
    run(tmp_path / "profiles", clock)
    places = ProfilePlaces(tmp_path / "kernels.json", tmp_path / "profiles")
    first = kept_profile(places, torch.bfloat16, WANTED, clock)
    kept_in(tmp_path / "profiles").unlink()
    assert kept_profile(places, torch.bfloat16, WANTED, clock) == first
    assert clock.asked == ["matmul"]


def test_what_is_missing_is_added(tmp_path: Path) -> None:
    clock = Clock()
    first = run(tmp_path, clock)
    both: dict[Layout, Measurable] = {**WANTED, "int4": Measurable(("native", "wide"))}
    second = run(tmp_path, clock, both)
    assert clock.asked == ["matmul", "int4"]
    assert second.costs["matmul"] == first.costs["matmul"]
    assert run(tmp_path, clock, both) == second
    assert clock.asked == ["matmul", "int4"]


@pytest.mark.parametrize(
    "changed",
    ["dtype", "threads", "processor", "torch", "code", "kernels", "device"],
)
def test_what_a_cost_depends_on_is_part_of_the_key(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, dtype, wanted = Clock(), torch.bfloat16, dict(WANTED)
    first = run(tmp_path, clock)
    facts = kept_profiles.machine_facts()
    if changed == "dtype":
        dtype = torch.float16
    elif changed == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    elif changed == "kernels":
        wanted["matmul"] = Measurable(("native",))
    elif changed == "device":
        wanted["matmul"] = Measurable(("native", "wide"), {"device": "another"})
    else:
        assert changed in facts
        monkeypatch.setattr(kept_profiles, "machine_facts", lambda: facts | {changed: "another"})
    assert run(tmp_path, clock, wanted, dtype) != first
    assert clock.asked == ["matmul", "matmul"]
    monkeypatch.undo()
    assert run(tmp_path, clock) == first  # still there


def broken_files() -> Iterator[tuple[str, Callable[[dict[str, Any]], object]]]:
    """By name, from a sound file's content to what stands in a broken one."""

    def edited(edit: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], str]:
        def make(raw: dict[str, Any]) -> str:
            edit(raw["costs"])
            return json.dumps(raw)

        return make

    yield "torn", lambda raw: json.dumps(raw)[:-9]
    yield "empty", lambda raw: ""
    yield "a list", lambda raw: "[1]"
    yield "costs are a list", lambda raw: json.dumps({"costs": [1]})
    yield "a kernel lost", edited(lambda costs: costs.pop("wide"))
    yield "a kernel more", edited(lambda costs: costs.update(compiled=costs["wide"]))
    yield "a field lost", edited(lambda costs: costs["wide"].pop("rows"))
    yield "no number", edited(lambda costs: costs["wide"].update(fixed_s=float("nan")))
    yield "text", edited(lambda costs: costs["wide"].update(fixed_s="1"))
    yield "negative", edited(lambda costs: costs["wide"].update(per_element_s=[-1.0]))
    yield "of unequal length", edited(lambda costs: costs["wide"].update(rows=[1, 2]))
    yield "not rising", edited(lambda costs: costs["native"].update(rows=[2, 2]))
    yield "nothing measured", edited(lambda costs: costs["native"].update(rows=[], per_element_s=[]))


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in broken_files()])
def test_a_broken_file_is_measured_again_and_replaced(make: Callable[[Any], str], tmp_path: Path) -> None:
    clock = Clock()
    first = run(tmp_path, clock)
    file = kept_in(tmp_path)
    file.write_text(make(json.loads(file.read_text())))
    second = run(tmp_path, clock)
    assert second != first
    assert run(tmp_path, clock) == second
    assert clock.asked == ["matmul", "matmul"]


def test_without_a_folder_to_write_to_it_is_measured_every_time(tmp_path: Path) -> None:
    (tmp_path / "profiles").write_text("a file where the folder would be")
    clock = Clock()
    assert run(tmp_path / "profiles", clock) != run(tmp_path / "profiles", clock)
    assert clock.asked == ["matmul", "matmul"]


def test_what_can_neither_be_read_nor_replaced_is_measured_every_time(tmp_path: Path) -> None:
    """As another user's file in his folder; a folder in its place is one for root, too."""
    clock = Clock()
    run(tmp_path, clock)
    file = kept_in(tmp_path)
    file.unlink()
    file.mkdir()
    assert run(tmp_path, clock) != run(tmp_path, clock)
    assert clock.asked == ["matmul", "matmul", "matmul"]


def test_of_two_runs_that_measure_at_the_same_time_both_take_what_the_first_has_kept(tmp_path: Path) -> None:
    clock = Clock()
    first: list[KernelProfile] = []

    def measure(layouts: Collection[Layout]) -> dict[Layout, Costs]:
        mine = clock(layouts)
        first.append(run(tmp_path, clock))  # another run begins and ends meanwhile
        return mine

    second = run(tmp_path, measure)
    assert clock.asked == ["matmul", "matmul"]
    assert first == [second] == [run(tmp_path, clock)]
    assert len(list(tmp_path.iterdir())) == 1


def test_where_files_have_no_second_name_it_is_kept_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    clock = Clock()
    first = run(tmp_path, clock)
    assert run(tmp_path, clock) == first
    assert clock.asked == ["matmul"]
    assert len(list(tmp_path.iterdir())) == 1


def test_products_of_the_next_session_are_made_by_the_same_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((1.0, 0.0))  # the first time "wide" is fast, the second time "native"

    def measured(layouts: Collection[Layout], dtype: torch.dtype, *_: object) -> dict[Layout, Costs]:
        seconds = {"native": next(clock), "wide": 0.5, "tall": 0.7}
        return {
            layout: {kernel: Cost(seconds[kernel], (1,), (0.0,)) for kernel in OwnKernels().of_layout(layout)}
            for layout in layouts
        }

    monkeypatch.setattr(cpu_linear, "measure_costs", measured)
    for name in ("obstacle", "amx_obstacle", "floats_obstacle"):
        monkeypatch.setattr(cpu_kernels, name, lambda: "no compiler")
    weight, inputs = torch.randn(300, 700).bfloat16(), torch.randn(5, 700).bfloat16()
    folder = tmp_path / "profiles"
    results = []
    for session in ("one", "two"):
        places = ProfilePlaces(tmp_path / session, folder)
        with torch.inference_mode():
            results.append(CpuProducts.for_run(torch.bfloat16, places).linear(inputs, weight))
    assert torch.equal(*results)
    assert next(clock) == 0.0


def test_a_processor_is_told_by_its_name_and_stepping(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC 9R14\n"
        "stepping\t: 1\ncpu MHz\t\t: 3699.9\n\nprocessor\t: 1\nmodel name\t: another\n"
    )
    assert processor_name(tmp_path / "cpuinfo") == "25, 17, AMD EPYC 9R14, 1"
    assert processor_name(tmp_path / "nothing") == ""
