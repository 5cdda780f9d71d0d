"""Everything that passes between driver and actors. Frozen dataclasses; units in the names. Imports neither torch nor
Ray.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pipo_ray.errors import PipoError
from pipo_ray.model.batch import KeptPoint, PrefixPart, WantedLogits
from pipo_ray.model.facts import ModelFacts
from pipo_ray.outputs import FinishReason, Logprob
from pipo_ray.params import SamplingParams
from pipo_ray.plan.kv_disk import KVDiskPlacement
from pipo_ray.plan.kv_pages import KVPlacement
from pipo_ray.plan.pieces import SweepPlan
from pipo_ray.session.processes import ProcessId


@dataclass(frozen=True)
class Placement:
    """Where every piece lives. `residents` maps a piece that stays in RAM to (arena, byte offset); `gpu_residents` are
    pieces that stay on the GPU; all others stream through `num_slots` slots of `slot_bytes`, and on a GPU through
    `num_gpu_slots` more there.
    """

    slot_bytes: int
    num_slots: int
    arena_bytes: tuple[int, ...]
    residents: dict[int, tuple[int, int]]
    num_gpu_slots: int = 0
    gpu_residents: tuple[int, ...] = ()


@dataclass(frozen=True)
class KVDiskSetup:
    """KV pages on the drive: object references to the page table and to the pages in RAM, which the driver made and
    holds, and where the loader opens the driver's file and its key (None: not encrypted). `shared`: sequences use what
    others have.
    """

    placement: KVDiskPlacement
    table_ref: list[Any]
    ram_ref: list[Any]
    path: str
    key_path: str | None
    shared: bool


@dataclass(frozen=True)
class StageSetup:
    """What loader, staging pool and compute worker must know of the run; the same for all three.

    `table_ref`, `slot_refs` and `arena_refs` are object references to memory that the driver made and holds. `kv_disk`:
    None without KV pages on the drive. `code_folder` is where machine code is kept that was compiled for the processor.
    """

    store: str
    plan: SweepPlan
    placement: Placement
    table_ref: list[Any]
    slot_refs: list[Any]
    arena_refs: list[Any]
    trace_folder: str | None = None
    verify_checksums: bool = True
    read_threads: int = 4
    transfer_bytes: int = 8 << 20
    background: bool = False
    kv_disk: KVDiskSetup | None = None
    code_folder: str | None = None


@dataclass(frozen=True)
class ComputeSetup:
    """What the compute worker must know besides: `device` is "cpu" or "cuda"; `dtype` a torch dtype name.

    `kernel_profile` is a file in which the first compute worker of a run keeps what it chose kernels by, for those that
    take its place, and `profile_folder` where the next run finds it; `code_folder` is where machine code is kept that
    was compiled for this processor. `kv` are the tiers of the KV cache, None: it is in the device's memory alone, which
    holds `kv_tokens`. `kv_bits` are the KV cache's bits per layer, if any has fewer than 16. With `kv_on_cpu` it is in
    RAM, where a GPU leaves attention to the processor. With `tables_in_ram` all rows of what is looked up are kept.
    CUDA graphs may take `graph_bytes` of the GPU.
    """

    facts: ModelFacts
    device: str
    dtype: str
    num_threads: int
    gpu_memory_bytes: int | None = None
    gpu_context_bytes: int = 0
    kernel_profile: str | None = None
    profile_folder: str | None = None
    code_folder: str | None = None
    kv: KVPlacement | None = None
    kv_tokens: int = 0
    kv_bits: tuple[int, ...] | None = None
    kv_on_cpu: bool = False
    tables_in_ram: bool = False
    graph_bytes: int = 0


@dataclass(frozen=True)
class SequenceSpec:
    """What the compute worker needs to sample and to write text for a sequence: sent with its first step, and again
    when its cache is rebuilt.
    """

    prompt_token_ids: tuple[int, ...]
    generated_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    sample_index: int
    max_tokens: int


@dataclass(frozen=True)
class SequenceStep:
    """One sequence's share of a sweep; see `SweepEntry`. With `sample` a token is chosen from the last logits. `spec`
    and `prefix` come with its first step. With `follows` it was sent before the sweep in front had ended: `token_ids`
    are empty, and the token that this one chooses takes their place; if it is the sequence's last, the step is left
    out.
    """

    sequence: str
    token_ids: tuple[int, ...]
    start: int
    capacity: int
    sample: bool
    logits: WantedLogits
    spec: SequenceSpec | None = None
    follows: bool = False
    prefix: tuple[PrefixPart, ...] = ()
    keep: tuple[KeptPoint, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return 1 if self.follows else len(self.token_ids)


@dataclass(frozen=True)
class SweepRequest:
    """Before it begins, the caches of the sequences in `drop` go, and of those in `cut` all but so many of the tokens
    that they keep themselves: they have ended, too, and others may begin with these tokens. `sent_ahead_by` is the
    process of the scheduler that sent it before the sweep in front had ended: if that has died since, nobody waits for
    it. `turn` counts what the scheduler has sent, from 1: the sweep in front has the turn before.
    """

    number: int
    steps: tuple[SequenceStep, ...]
    drop: tuple[str, ...] = ()
    cut: tuple[tuple[str, int], ...] = ()
    sent_ahead_by: ProcessId | None = None
    turn: int = 0


@dataclass(frozen=True)
class StepResult:
    """What a sweep made of one sequence: a token and the text it adds, or logits [tokens, vocabulary] float32, or
    neither. `left_out`: a step that `follows` had nothing to follow, or whose cache is lost.
    """

    sequence: str
    token_id: int | None = None
    text: str = ""
    logprob: float = 0.0
    logprobs: dict[int, Logprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logits: npt.NDArray[np.float32] | None = None
    left_out: bool = False


@dataclass(frozen=True)
class LostCache:
    """The compute worker has the cache `name` no more, of a sequence that runs or has ended; `error` where a drive took
    it, or part of what it stands on.
    """

    name: str
    error: PipoError | None = None


@dataclass(frozen=True)
class SweepResult:
    """Seconds and bytes are this sweep's: `waited_s` the compute worker stood still for want of a piece. `lost` is what
    has been lost since the sweep before, whatever came of it in this one.
    """

    number: int
    results: tuple[StepResult, ...]
    elapsed_s: float
    waited_s: float
    streamed_bytes: int
    lost: tuple[LostCache, ...] = ()


@dataclass(frozen=True)
class RequestSpec:
    """A request as the driver submits it. `generated` holds, per sample, tokens that were already streamed out (after a
    scheduler's death).
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    max_tokens: int
    score: bool = False
    generated: dict[int, tuple[int, ...]] = field(default_factory=dict)
    finished: tuple[int, ...] = ()


@dataclass(frozen=True)
class TokenEvent:
    """A token of sample `index` of a request, or its end, also by an `error`; `number` counts a client's events from
    1.
    """

    number: int
    request_id: str
    index: int
    result: StepResult
    sweeps: int
    bytes_streamed: int
    time_s: float
    error: PipoError | None = None


@dataclass(frozen=True)
class StageTimes:
    """How a stage spent its time since it started, in seconds. `paused_s`: it gave way to other programs."""

    stage: str
    busy_s: float
    waiting_s: float
    total_s: float
    details: dict[str, Any] = field(default_factory=dict)
    paused_s: float = 0.0
