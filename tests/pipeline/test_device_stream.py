"""The GPU's stream with the CPU in the part of the device: copies are done late, on a thread of their own, in order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import BY_SLUG
from fake_device import FakeDevice
from harness import CPU, Pipeline, pack_checkpoint, random_prompts
from pipeline.pages_on_disk import pages_on_disk

from pipo_ray.pipeline.device_ops import Event

PROMPTS = (5, 17)


class LateEvent:
    """Happens when its work has been done."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def synchronize(self) -> None:
        assert self.done.wait(30)


class LateCopies:
    """A copy engine with a queue. What is asked for is done `delay_s` later; a target is poisoned in between."""

    def __init__(self, delay_s: float) -> None:
        self.device = CPU
        self._delay_s = delay_s
        self._queue: list[Callable[[], None]] = []
        self._condition = threading.Condition()
        self._pending = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8)

    def copy(self, source: torch.Tensor, target: torch.Tensor, after: Event | None, stream: str = "") -> Event:
        event = LateEvent()

        def work() -> None:
            if after is not None:
                after.synchronize()
            target.fill_(0xFF)
            time.sleep(self._delay_s)
            target.copy_(source)
            event.done.set()

        with self._condition:
            self._queue.append(work)
            self._pending += 1
            self._condition.notify_all()
        return event

    def compute_waits_for(self, event: Event) -> None:
        event.synchronize()

    def look_at_clocks(self) -> None:
        pass

    def stalled_s(self) -> float:
        return 0.0

    def record_on_compute(self) -> Event:
        event = LateEvent()
        event.done.set()
        return event

    def synchronize(self) -> None:
        with self._condition:
            while self._pending:
                self._condition.wait(30)

    def close(self) -> None:
        """End the thread: one that is left behind may be in the way when the interpreter ends."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._queue and not self._closed:
                    self._condition.wait()
                if not self._queue:
                    return
                work = self._queue.pop(0)
            work()
            with self._condition:
                self._pending -= 1
                self._condition.notify_all()


@pytest.fixture(
    scope="module",
    params=[
        ("llama", 0),
        ("gpt-oss", 0),
        ("qwen3-next", 0),
        ("llama", 2),
        pytest.param(("gpt-oss", 1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> object:
    """A model, and over how many further drives it is striped."""
    slug, num_stripes = request.param
    folder = tmp_path_factory.mktemp(slug)
    BY_SLUG[slug].save(folder / "checkpoint")
    return pack_checkpoint(folder / "checkpoint", folder / "store", torch.float32, num_stripes=num_stripes)


@pytest.fixture(scope="module")
def of_the_host_stream(packed: object) -> list[list[int]]:
    """The text of PROMPTS."""
    with Pipeline(packed) as pipeline:  # type: ignore[arg-type]
        return pipeline.greedy(random_prompts(packed.facts.vocab_size, PROMPTS), 4)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("gpu_resident_pieces", "one_slot"), [(0, False), (4, False), (4, True)])
@pytest.mark.parametrize("delay_s", [pytest.param(0.0, marks=pytest.mark.slow), 0.001])
def test_text_is_that_of_the_host_stream(
    packed: object, of_the_host_stream: list[list[int]], gpu_resident_pieces: int, one_slot: bool, delay_s: float
) -> None:
    """`one_slot`: in RAM, as memory-saver has; otherwise as many as must be held at once."""
    prompts, wanted = random_prompts(packed.facts.vocab_size, PROMPTS), of_the_host_stream  # type: ignore[attr-defined]
    num_slots = 1 if one_slot else None
    with Pipeline(
        packed, ops=LateCopies(delay_s), gpu_resident_pieces=gpu_resident_pieces, num_slots=num_slots,  # type: ignore[arg-type]
    ) as pipeline:  # fmt: skip
        assert pipeline.num_slots == (1 if one_slot else pipeline.plan.max_held)
        assert pipeline.greedy(prompts, 4) == wanted
        streamed = pipeline.stream.times.streamed_bytes
        assert streamed >= 4 * sum(p.read_bytes for p in pipeline.pieces if p.index not in pipeline.gpu_residents)


@pytest.mark.parametrize("kv_bits", [None, (8, 8, 8)])
def test_a_model_that_is_whole_on_the_device(kv_bits: tuple[int, ...] | None, tmp_path: Path) -> None:
    packed = pack_checkpoint(BY_SLUG["llama"].save(tmp_path / "checkpoint"), tmp_path / "store", torch.float32)
    prompts = random_prompts(packed.facts.vocab_size, (220, 17))
    with Pipeline(packed, kv_bits=kv_bits) as pipeline:
        wanted = pipeline.greedy(prompts, 4)
    with Pipeline(packed, ops=LateCopies(0.0), gpu_resident_pieces=None, kv_bits=kv_bits) as pipeline:
        assert pipeline.greedy(prompts, 4) == wanted
        assert pipeline.greedy(prompts, 4) == wanted
        assert pipeline.stream.all_stay
        assert not pipeline.stream.times.streamed_bytes


def test_a_sweep_given_up_in_the_middle_is_begun_anew(packed: object) -> None:
    prompts = random_prompts(packed.facts.vocab_size, (5, 9))  # type: ignore[attr-defined]
    with Pipeline(packed, ops=LateCopies(0.0005), gpu_resident_pieces=3) as pipeline:  # type: ignore[arg-type]
        wanted = pipeline.greedy(prompts, 4)
        layers = [name for name, _ in pipeline.model.named_modules() if name.endswith(".1")]
        for name in layers[:1]:
            handle = pipeline.model.get_submodule(name).register_forward_pre_hook(_fail)
            with pytest.raises(RuntimeError, match="on purpose"):
                pipeline.greedy(prompts, 2)
            handle.remove()
            assert pipeline.greedy(prompts, 4) == wanted


@pytest.mark.parametrize("seed", [0, 1])
def test_text_with_a_kv_cache_larger_than_the_device(seed: int, tmp_path: Path) -> None:
    """Three layers of five pages need 15: of 12 none can stay. Weights and KV pages are watched for races."""
    BY_SLUG["llama"].save(tmp_path / "checkpoint")
    packed = pack_checkpoint(tmp_path / "checkpoint", tmp_path / "store", torch.float32)
    prompts = random_prompts(packed.facts.vocab_size, (150, 70))
    with Pipeline(packed, slot_bytes=1 << 20, chunk=64) as pipeline:
        wanted = pipeline.greedy(prompts, 6)
    device = FakeDevice(seed)
    with Pipeline(packed, slot_bytes=1 << 20, chunk=64, ops=device, kv_pages=(12, 15)) as pipeline, device.watching():
        for _ in range(2):
            assert pipeline.greedy(prompts, 6) == wanted
        layer = pipeline.model.get_submodule("model.layers.1.mlp")
        handle = layer.register_forward_pre_hook(_fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            pipeline.greedy(prompts, 2)
        handle.remove()
        assert pipeline.greedy(prompts, 6) == wanted
        assert pipeline.kv_tiers is not None
        assert pipeline.kv_tiers.loaded_bytes > 10 * pipeline.kv_tiers.unit_bytes
    assert {stream for stream, _ in device.copied} == {"weight copy", "KV load", "KV save"}


@pytest.mark.slow
def test_text_with_kv_pages_on_the_drive(tmp_path: Path) -> None:
    """Three layers of six pages, 15 in RAM of which six are on their way: weights and pages are watched for races."""
    BY_SLUG["llama"].save(tmp_path / "checkpoint")
    packed = pack_checkpoint(tmp_path / "checkpoint", tmp_path / "store", torch.float32)
    prompts = random_prompts(packed.facts.vocab_size, (900, 300))
    with Pipeline(packed, slot_bytes=1 << 20, chunk=200) as pipeline:
        wanted = pipeline.greedy(prompts, 4)
    device = FakeDevice(3)
    with (
        pages_on_disk(packed.facts, tmp_path, 15) as kv_store,
        Pipeline(packed, slot_bytes=1 << 20, chunk=200, ops=device, kv_store=kv_store) as pipeline,
        device.watching(),
    ):
        assert pipeline.greedy(prompts, 4) == wanted
        assert pipeline.runner._kv_store.loaded_pages > 10
    assert {stream for stream, _ in device.copied} == {"weight copy", "KV load", "KV save"}


def _fail(*_: object) -> None:
    raise RuntimeError("on purpose")
