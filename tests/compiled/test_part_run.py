"""Products with parts that a loader brings meanwhile: taken when they are there, released when they are used up."""

from __future__ import annotations

import ctypes
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from bf16_matrices import matrix
from emulated_tiles import matrix_unit

from pipo_ray.compiled import outer_rows, part_run
from pipo_ray.compiled.amx_products import CompiledAmx
from pipo_ray.compiled.bf16_products import CompiledBf16
from pipo_ray.compiled.float_inputs import PaddedInputs
from pipo_ray.compiled.float_products import CompiledFloats
from pipo_ray.compiled.ir import Function
from pipo_ray.compiled.machine import MachineCode, context_of
from pipo_ray.compiled.part_run import PartRun, PartRunner, Parts, RowsProduct, Step
from pipo_ray.compiled.support import floats_obstacle, obstacle
from pipo_ray.pipeline.slots import RESIDENT, PieceUnreadableError, SlotState, SlotTable, StoppedError

pytestmark = pytest.mark.skipif(floats_obstacle() is not None, reason=str(floats_obstacle()))


@pytest.fixture(scope="module")
def runner() -> PartRunner:
    return PartRunner()


@pytest.fixture(scope="module")
def amx() -> Iterator[CompiledAmx]:
    with matrix_unit():
        yield CompiledAmx()


@pytest.fixture(scope="module")
def bf16() -> CompiledBf16 | None:
    return None if obstacle() else CompiledBf16()


@pytest.fixture(scope="module")
def floats() -> CompiledFloats:
    return CompiledFloats(torch.bfloat16)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@dataclass
class Matrix:
    """A weight in parts, `residents` of which stay; the others pass through `num_slots` slots of a table."""

    weight: torch.Tensor
    cuts: list[int]
    residents: tuple[int, ...] = ()
    num_slots: int = 2
    first_load: int = 0
    loads: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        streamed = [n for n in range(len(self.cuts) - 1) if n not in self.residents]
        self.loads = {part: self.first_load + load for load, part in enumerate(streamed)}
        nbytes = SlotTable.nbytes(self.num_slots, len(self.residents))
        self.table = SlotTable(np.zeros(nbytes, np.uint8), self.num_slots, len(self.residents))
        most = max(self.rows(part).stop - self.rows(part).start for part in range(len(self.cuts) - 1))
        self.slots = [torch.full((most, self.weight.shape[1]), 9.0).bfloat16() for _ in range(self.num_slots)]
        self.stay = {part: torch.zeros_like(self.weight[self.rows(part)]) for part in self.residents}

    def rows(self, part: int) -> slice:
        return slice(self.cuts[part], self.cuts[part + 1])

    def slot(self, part: int) -> int:
        return self.loads[part] % self.num_slots

    def address(self, part: int) -> int:
        """Of the part's row in the table."""
        if part in self.loads:
            return self.table.slot_address(self.slot(part))
        return self.table.resident_address(self.residents.index(part))

    def bring(self, part: int, *, failed: bool = False) -> None:
        """What a loader does."""
        rows = self.rows(part)
        if part not in self.loads:
            self.stay[part].copy_(self.weight[rows])
            self.table.finish_resident(self.residents.index(part), failed=failed)
            return
        load, slot = self.loads[part], self.slot(part)
        before = load - self.num_slots
        self.table.wait_free(slot, self.table.epoch, before if before >= self.first_load else None)
        self.table.begin_fill(slot, load)
        self.slots[slot][: rows.stop - rows.start] = self.weight[rows]
        self.table.finish_fill(slot, load, failed=failed)

    def wait(self, part: int, stopped: Callable[[], bool] = lambda: False) -> None:
        """As the compute worker does."""
        if part in self.loads:
            self.table.wait_ready(self.slot(part), self.loads[part], stopped)
        else:
            self.table.wait_resident(self.residents.index(part), stopped)

    def run(self, runner: PartRunner, product: RowsProduct) -> PartRun:
        numbers = range(len(self.cuts) - 1)
        memories = [self.slots[self.slot(part)] if part in self.loads else self.stay[part] for part in numbers]
        parts = Parts(
            np.array([self.address(part) for part in numbers]),
            np.array([self.loads.get(part, RESIDENT) for part in numbers]),
            np.array(self.cuts[:-1]), np.diff(self.cuts),
            np.array(product.looks_at if isinstance(product, Probe) else [memory.data_ptr() for memory in memories]),
        )  # fmt: skip
        return PartRun(runner, self.table.header_address, parts, product, 2 * self.weight.shape[1])


def finish(run: PartRun, matrix: Matrix) -> int:
    """Run to the end; how often a part was waited for."""
    waits = 0
    while run.done < len(matrix.cuts) - 1:
        run.run()
        if run.done < len(matrix.cuts) - 1:
            matrix.wait(run.done)
            waits += 1
    return waits


class Probe:
    """A product that only notes what the slot table says meanwhile: one thread of those that come."""

    FIELDS = ("row", "header", "seen", "next")

    def __init__(self, parts: Matrix) -> None:
        f = Function("probe", self.FIELDS)
        row, seen = f.field("row", "ptr"), f.field("seen", "ptr")
        with f.tasks(f.place_of("next"), "1"):
            f.store("i32", f.load("i32", row), seen)
            f.store("i64", f.load("i64", f.at(row, 24)), f.at(seen, 8))
            f.store("i64", f.load("i64", f.at(f.field("header", "ptr"), 8)), f.at(seen, 16))
        self._code, self._parts = MachineCode(f.text()), parts
        self._memory = context_of([99] * 3 * len(parts.cuts))
        self.looks_at = [parts.address(part) for part in range(len(parts.cuts) - 1)]

    def steps(self, rows: int, row_bytes: int) -> list[Step]:
        words = (0, self._parts.table.header_address, ctypes.addressof(self._memory), 0)
        return [Step(self._code.address("probe"), words, 0, {2: 24 // rows})]

    def saw(self, part: int) -> tuple[int, int, int]:
        """State, the slot's last released load plus 1, and the table's."""
        state, released, consumed = self._memory[3 * part : 3 * part + 3]
        return state & 0xFFFFFFFF, released, consumed


class Counting:
    """A product that reads a part's first number again and again, for a tenth of a millisecond, in each of 4 tasks."""

    FIELDS = ("weight", "sums", "next")
    TASKS, TIMES = 4, 20_000

    def __init__(self, parts: Matrix) -> None:
        f = Function("count", self.FIELDS)
        weight, sums = f.field("weight", "ptr"), f.field("sums", "ptr")
        with f.tasks(f.place_of("next"), str(self.TASKS)) as task, f.loop(self.TIMES):
            number = f.value(f"zext i16 {f.value(f'load volatile i16, ptr {weight}')} to i64")
            place = f.at(sums, f.multiply(task, 8))
            f.store("i64", f.add(f.load("i64", place), number), place)
        self._code, self._parts = MachineCode(f.text()), parts
        self.sums = np.zeros((len(parts.cuts), self.TASKS), np.int64)

    def steps(self, rows: int, row_bytes: int) -> list[Step]:
        return [Step(self._code.address("count"), (0, self.sums.ctypes.data, 0), 0, {1: 8 * self.TASKS})]


def test_a_slot_stays_until_the_last_thread_has_left_it(runner: PartRunner, threads: int) -> None:
    cuts = list(range(121))
    weight = torch.arange(1, 121, dtype=torch.int16)[:, None].expand(-1, 4).contiguous().view(torch.bfloat16)
    parts = Matrix(weight, cuts, residents=(7, 8, 40))
    counting = Counting(parts)
    run = parts.run(runner, counting)
    loader = threading.Thread(target=lambda: [parts.bring(part) for part in range(120)])
    loader.start()
    finish(run, parts)
    loader.join()
    for part in range(120):
        assert list(counting.sums[part]) == [(part + 1) * Counting.TIMES] * Counting.TASKS


def test_a_slot_is_released_behind_its_product_and_not_before(runner: PartRunner, threads: int) -> None:
    parts = Matrix(torch.zeros(6, 2).bfloat16(), [0, 2, 4, 6], residents=(1,), first_load=10)
    probe = Probe(parts)
    run = parts.run(runner, probe)
    for part in range(3):
        parts.bring(part)
    run.run()
    assert run.done == 3
    assert [probe.saw(part) for part in range(3)] == [
        (SlotState.READY, 0, 0), (SlotState.READY, 0, 11), (SlotState.READY, 0, 11),
    ]  # fmt: skip
    assert parts.table.consumed == 12
    parts.table.stop()  # who waited would raise
    assert parts.table.wait_free(1, 0, 11) == 0
    assert parts.table.resident_ready(0)


def test_only_the_load_that_is_wanted_is_taken(runner: PartRunner) -> None:
    parts = Matrix(torch.zeros(4, 2).bfloat16(), [0, 2, 4], first_load=4)
    run = parts.run(runner, Probe(parts))
    for load in (3, 5, 2):  # of other sweeps
        parts.table.begin_fill(0, load)
        run.run()
        parts.table.finish_fill(0, load)
        run.run()
        assert run.done == 0
        assert parts.table.is_loaded(0, load)
    parts.table.begin_fill(0, 4)
    run.run()
    assert run.done == 0
    parts.table.finish_fill(0, 4)
    run.run()
    assert run.done == 1
    parts.bring(1)
    run.run()
    assert (run.done, parts.table.consumed) == (2, 6)
    run.run()
    assert (run.done, parts.table.consumed) == (2, 6)


def test_what_has_been_released_is_never_taken_back(runner: PartRunner) -> None:
    parts = Matrix(torch.zeros(2, 2).bfloat16(), [0, 2], first_load=4)
    parts.table.release(0, 8)
    run = parts.run(runner, Probe(parts))
    parts.table.begin_fill(0, 4)
    parts.table.finish_fill(0, 4)
    run.run()
    assert run.done == 1
    assert parts.table.consumed == 9
    parts.table.stop()  # who waited would raise
    assert parts.table.wait_free(0, 0, 8) == 0


@pytest.mark.parametrize("resident", [False, True])
def test_a_part_that_cannot_be_read_and_one_that_nobody_brings_end_the_run(runner: PartRunner, resident: bool) -> None:
    for failed, error in ((True, PieceUnreadableError), (False, StoppedError)):
        parts = Matrix(torch.zeros(6, 2).bfloat16(), [0, 2, 4, 6], residents=(1,) if resident else ())
        run = parts.run(runner, Probe(parts))
        parts.bring(0)
        if failed:
            parts.bring(1, failed=True)
        else:
            parts.table.stop()
        with pytest.raises(error):
            finish(run, parts)
        assert run.done == 1
        assert parts.table.consumed == 1


def test_threads_sleep_until_a_part_is_there(runner: PartRunner, threads: int) -> None:
    """However often one is late: Python is not asked, and knows how long it was."""
    cuts = list(range(13))
    weight = torch.arange(1, 13, dtype=torch.int16)[:, None].expand(-1, 4).contiguous().view(torch.bfloat16)
    parts = Matrix(weight, cuts, residents=(7,))
    counting = Counting(parts)
    run = parts.run(runner, counting)
    late: list[float] = []

    def load() -> None:
        for part in range(12):
            if part % 4 == 3:
                while run._words[part_run.FIELDS.index("done")] < part:
                    pass
                begin = time.perf_counter()
                time.sleep(0.03)
                late.append(time.perf_counter() - begin)
            parts.bring(part)

    loader = threading.Thread(target=load, daemon=True)  # it waits for ever if the run ends too early
    begin = time.perf_counter()
    loader.start()
    run.run()
    took = time.perf_counter() - begin
    assert run.done == 12
    loader.join()
    assert 0.05 < run.waited_s < took
    assert sum(late) < took
    for part in range(12):
        assert list(counting.sums[part]) == [(part + 1) * Counting.TIMES] * Counting.TASKS


def test_what_does_not_come_is_left_to_python(runner: PartRunner, threads: int) -> None:
    parts = Matrix(torch.zeros(4, 2).bfloat16(), [0, 2, 4])
    run = parts.run(runner, Probe(parts))
    parts.bring(0)
    for calls in (1, 2):
        begin = time.perf_counter()
        run.run()
        assert run.done == 1
        assert 0.1 * calls <= run.waited_s
        assert time.perf_counter() - begin >= 0.1
    parts.bring(1)
    run.run()
    assert run.done == 2


def test_a_failure_wakes_who_sleeps(runner: PartRunner, threads: int) -> None:
    parts = Matrix(torch.zeros(4, 2).bfloat16(), [0, 2, 4])
    run = parts.run(runner, Probe(parts))
    running = threading.Thread(target=run.run)
    running.start()
    while running.is_alive() and not _sleeps(running):
        pass
    parts.bring(0, failed=True)
    running.join()
    assert run.done == 0
    with pytest.raises(PieceUnreadableError):
        parts.wait(0)


def test_whoever_waits_for_a_slot_is_woken(runner: PartRunner) -> None:
    parts = Matrix(torch.zeros(2, 2).bfloat16(), [0, 2], num_slots=1)
    run = parts.run(runner, Probe(parts))
    parts.bring(0)
    waited: list[float] = []
    waiting = threading.Thread(target=lambda: waited.append(parts.table.wait_free(0, 0, 0)))
    waiting.start()
    while not _sleeps(waiting):
        pass
    run.run()
    waiting.join()
    assert 0 < waited[0] < 0.4  # it looks by itself every 0.5 s


CUTS = [0, 64, 128, 192, 193, 256, 320, 384, 448, 511]


@pytest.mark.parametrize("inputs", [1, 40, 600])
@pytest.mark.parametrize("columns", [96, 77])
@pytest.mark.parametrize("biased", [False, True])
def test_the_bits_are_those_of_one_product_for_each_part(
    runner: PartRunner, amx: CompiledAmx, bf16: CompiledBf16 | None, floats: CompiledFloats, threads: int,
    inputs: int, columns: int, biased: bool,
) -> None:  # fmt: skip
    weight, x, bias = matrix(CUTS[-1], columns), matrix(inputs, columns), matrix(CUTS[-1], 1)[:, 0] if biased else None
    parts_of = [(slice(a, b), weight[a:b], None if bias is None else bias[a:b]) for a, b in itertools.pairwise(CUTS)]
    kinds: list[tuple[RowsProduct, torch.Tensor, torch.Tensor]] = []
    wanted, got = (torch.full((inputs, CUTS[-1] + 5), 7.0).bfloat16() for _ in range(2))
    packed = amx.pack(x)
    for rows, part, added in parts_of:
        amx.linear_into(packed, part, added, wanted[:, rows])
    kinds.append((amx.rows_product(packed, columns, bias, got[:, :-5]), got, wanted))
    wanted, got = (torch.full((inputs, CUTS[-1] + 5), 7.0).bfloat16() for _ in range(2))
    grouped = floats.group(x)
    for rows, part, added in parts_of:
        floats.outer_into(grouped, part, added, wanted[:, rows])
    kinds.append((floats.rows_product(grouped, bias, got[:, :-5]), got, wanted))
    if inputs == 1 and columns % 8 == 0:
        wanted, got = (torch.full((1, CUTS[-1] + 5), 7.0).bfloat16() for _ in range(2))
        for rows, part, added in parts_of:
            floats.dots_into(PaddedInputs.of(x), part, added, wanted[:, rows])
        kinds.append((floats.row_product(x[0], bias, got[0, :-5]), got, wanted))
    if inputs == 1 and bf16 is not None:
        wanted = torch.cat([bf16.linear(x, part, added) for _, part, added in parts_of], 1)
        got = torch.zeros_like(wanted)
        kinds.append((bf16.rows_product(x[0], bias, got[0]), got, wanted))
    for product, got, wanted in kinds:
        parts = Matrix(weight, CUTS, residents=(2, 5), first_load=30)
        loader = threading.Thread(target=lambda parts=parts: [parts.bring(n) for n in range(9)])
        run = parts.run(runner, product)
        loader.start()
        finish(run, parts)
        loader.join()
        assert torch.equal(got, wanted)
        assert parts.table.consumed == 37
        assert all(parts.table.view(slot).state == SlotState.FREE for slot in range(2))
        assert all(parts.table.resident_ready(index) for index in range(2))


@pytest.mark.parametrize("num_slots", [2, 5])
def test_threads_that_are_in_several_parts_at_a_time(
    runner: PartRunner, floats: CompiledFloats, threads: int, num_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However late each of them comes, and the loader with it: every row once, every slot released once, in order."""
    monkeypatch.setattr(outer_rows, "shares", lambda *_: (8, 1))
    cuts, chance = [*range(0, 40 * 150, 40)], random.Random(num_slots)
    weight, x = matrix(cuts[-1], 16), matrix(60, 16)
    wanted = torch.empty(60, cuts[-1], dtype=torch.bfloat16)
    grouped = floats.group(x)
    floats.outer_into(grouped, weight, None, wanted)
    got = torch.zeros_like(wanted)
    for first_load in (0, 1000, 2000):
        residents = tuple(sorted(chance.sample(range(149), 20)))
        parts = Matrix(weight, cuts, residents, num_slots, first_load)

        def load(parts: Matrix = parts) -> None:
            for part in range(149):
                if chance.random() < 0.3:
                    time.sleep(chance.random() * 0.002)
                parts.bring(part)

        loader = threading.Thread(target=load)
        run = parts.run(runner, floats.rows_product(grouped, None, got.zero_()))
        loader.start()
        finish(run, parts)
        loader.join()
        assert torch.equal(got, wanted)
        assert parts.table.consumed == first_load + 129
        assert all(parts.table.view(slot).state == SlotState.FREE for slot in range(num_slots))


def _sleeps(thread: threading.Thread) -> bool:
    with open(f"/proc/self/task/{thread.native_id}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "S"


def test_the_number_is_read_before_the_state() -> None:
    """As `SlotTable.wait_ready` does: the slot may be handed on between the two, which no test can bring about here."""
    look = part_run.module().partition("@is_there(")[2].partition("\n}")[0]
    assert 0 < look.index("load atomic i64, ptr %number_at acquire") < look.index("load atomic i32, ptr %row acquire")
