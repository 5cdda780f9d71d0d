"""Threads that compute with the caller, and how long they wait for the next call."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator

import pytest
import torch

import pipo_ray.compiled.crew_code as module
from pipo_ray.compiled import steps
from pipo_ray.compiled.crew import CALLED_AT, Crew, add_on_threads, run_on_threads, run_steps
from pipo_ray.compiled.ir import Function
from pipo_ray.compiled.machine import MachineCode, context_of
from pipo_ray.compiled.support import obstacle

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))

FIELDS = ("next", "count", "output", "starts", "spin")


def counting() -> str:
    """Adds 1 to a byte for each task, and to `starts` for each thread; `spin` steps for each task."""
    function = Function("counting", FIELDS)
    function.value(f"atomicrmw add ptr {function.place_of('starts')}, i64 1 monotonic")
    with function.tasks(function.place_of("next"), function.field("count")) as number:
        place = function.at(function.field("output", "ptr"), number)
        with function.loop(function.field("spin")):
            function.value(f"atomicrmw add ptr {place}, i8 0 monotonic")
        function.store("i8", function.value(f"add i8 {function.load('i8', place)}, 1"), place)
    return function.text()


@pytest.fixture(scope="module")
def code() -> MachineCode:
    return MachineCode(counting())


@pytest.fixture
def crew() -> Iterator[Crew]:
    made = Crew(2)
    yield made
    made.dismiss()


class Job:
    """`tasks` tasks, to be done once each."""

    def __init__(self, code: MachineCode, tasks: int = 500, spin: int = 0) -> None:
        self.output = torch.zeros(tasks, dtype=torch.uint8)
        self._words = context_of([0, tasks, self.output.data_ptr(), 0, spin])
        self.function, self.context = code.address("counting"), ctypes.addressof(self._words)

    def check(self) -> int:
        """How many threads took part."""
        assert self.output.eq(1).all()
        return int(self._words[FIELDS.index("starts")])


def test_every_task_is_done_once_by_as_many_threads_as_come(code: MachineCode, crew: Crew) -> None:
    taking_part = []
    for number in range(300):
        job = Job(code, spin=number % 3 * 100)
        crew.call(job.function, job.context, number % 3)
        taking_part.append(job.check())
        assert taking_part[-1] <= 1 + number % 3
    assert max(taking_part) > 1


def test_it_has_as_many_threads_as_torch(code: MachineCode) -> None:
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 3, 2):
            torch.set_num_threads(num_threads)
            for _ in range(20):
                job = Job(code, spin=2000)
                run_on_threads(job.function, job.context)
                assert job.check() <= num_threads
    finally:
        torch.set_num_threads(before)


def test_who_calls_while_another_call_runs_is_alone(code: MachineCode, crew: Crew) -> None:
    with crew._busy:
        job = Job(code, spin=2000)
        crew.call(job.function, job.context, 2)
        assert job.check() == 1


def test_a_forked_process_and_one_without_threads_compute_alone(code: MachineCode) -> None:
    crew = Crew(2)
    job = Job(code)
    crew.call(job.function, job.context, 2)
    child = os.fork()
    if not child:
        job = Job(code)
        crew.call(job.function, job.context, 2)
        os._exit(0 if job.check() == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    crew.dismiss()
    job = Job(code)
    crew.call(job.function, job.context, 2)
    assert job.check() == 1


def test_threads_sleep_when_nobody_calls(code: MachineCode, crew: Crew) -> None:
    job = Job(code)
    crew.call(job.function, job.context, 2, True)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.05


def test_a_crowd_that_comes_again_at_once_is_given_way_for_longer_each_time(crew: Crew, code: MachineCode) -> None:
    words = crew._words
    number, until, disturbance = map(module.HEADER.index, ("number", "crowded_until", "disturbance"))

    def crowded_calls(calls_between: int) -> int:
        """For how many calls a crowd is given way that comes so many calls behind the last one."""
        words[number] = words[until] + calls_between
        words[disturbance] = module.CROWDED + (1 << 10)  # more than a call that nobody disturbs takes away
        crew.call((job := Job(code)).function, job.context, 2)
        job.check()
        return words[until] - words[number]

    assert crowded_calls(1000) == 64
    assert [crowded_calls(1) for _ in range(5)] == [128, 256, 512, 512, 512]
    assert crowded_calls(100) == 64


def test_what_disturbs_now_and_then_is_forgotten(crew: Crew, code: MachineCode) -> None:
    disturbance, until = map(module.HEADER.index, ("disturbance", "crowded_until"))
    crew._words[disturbance] = module.CROWDED // 2
    for _ in range(1000):
        crew.call((job := Job(code)).function, job.context, 0)
    assert crew._words[disturbance] < module.CROWDED // 64
    assert not crew._words[until]


def test_a_list_of_steps_runs_in_order_on_all_threads(code: MachineCode) -> None:
    before = torch.get_num_threads()
    runner = MachineCode(steps.module())
    counter = FIELDS.index("next")
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            jobs = [Job(code, spin=200) for _ in range(5)]
            many = steps.Steps()
            called = []
            for job in jobs:
                called.append(add_on_threads(many, job.function, job._words, counter, None, job.output))
            context = many.context()
            for repeat in range(1, 4):
                run_steps(runner.address(steps.RUN), ctypes.addressof(context))
                assert all(job.output.eq(repeat).all() for job in jobs)
            assert [others for _, others in called] == [num_threads - 1] * 5
            starts = [job._words[FIELDS.index("starts")] for job in jobs]
            for words, _ in called:
                words[CALLED_AT] = 0
            run_steps(runner.address(steps.RUN), ctypes.addressof(context))
            assert [job._words[FIELDS.index("starts")] for job in jobs] == [number + 1 for number in starts]
    finally:
        torch.set_num_threads(before)
