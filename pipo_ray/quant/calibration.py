"""The original model in the packing process: run from its checkpoint over a calibration text, in bounded memory.

No block store, no Ray. One matrix's weights are in memory at a time, and the activations of all windows, which go
through the model side by side (`model/lockstep.py`): every weight is read once for all of them.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from transformers import PretrainedConfig

from pipo_ray.errors import BudgetError
from pipo_ray.model.blocks import BlockSpec, TensorSpec
from pipo_ray.model.facts import ModelFacts
from pipo_ray.model.graph import build_graph, resolve_dtype
from pipo_ray.model.inspect import trace_of
from pipo_ray.model.layout import SAFETENSORS_DTYPES, block_layout
from pipo_ray.model.linear_experts import experts_are_linear
from pipo_ray.model.lockstep import FinishedError, LockstepBinder, MatrixHook
from pipo_ray.quant.calibration_text import LEAST_TOKENS
from pipo_ray.session.memory import MIB, format_least, format_size
from pipo_ray.session.worker_environment import num_threads as usable_threads
from pipo_ray.store.checkpoint import Checkpoint
from pipo_ray.store.source import TensorSource

WeightChange = Callable[[TensorSpec, torch.Tensor], torch.Tensor]
"""(spec, weight [rows, columns] as the checkpoint's dtype) -> the weight to use in its stead, of any floating dtype."""

LinearObserver = MatrixHook
"""(spec, inputs: per window that reaches the matrix float32 [tokens, columns], weight [rows, columns]) -> the weight to
go on with, or None for the same. Two matrices that are multiplied with the same tensor get the same tensors as inputs.
"""

BlockProgress = Callable[[int, int], None]
"""(blocks begun, blocks in all)."""

PROCESS_BYTES = 700 * MIB
"""Python, torch and transformers, the module graph, and what products and attention take on the way."""

_POLL_S = 0.1


class CalibrationModel:
    """The model of `checkpoint` in float32, whose `facts` were found by `find_facts`. A context manager.

    Matrices are read in the checkpoint's own dtype and widened as they are multiplied. With `memory`, bytes that the
    process may take, a pass that needs more is refused (`required_bytes`). Threads: all of the process's cores, unless
    `num_threads` says less. One pass at a time.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: PretrainedConfig,
        facts: ModelFacts,
        *,
        memory: int | None = None,
        num_threads: int | None = None,
    ) -> None:
        self._facts, self._memory = facts, memory
        self._num_threads, self._threads_before = num_threads, 0
        self._trace = trace_of(facts)
        self._model = build_graph(config, torch.float32, attention=facts.attention, device=torch.device("cpu"))
        self._source = TensorSource(self._model, checkpoint, torch.float32)
        self._dtype = SAFETENSORS_DTYPES[resolve_dtype("auto", config)]
        self.blocks: tuple[BlockSpec, ...] = block_layout(self._model, self._trace, self._source.aliases)
        """As they are packed; every tensor's dtype is the one that it is computed in."""
        self._specs = {(spec.name, spec.expert): spec for block in self.blocks for spec in block.tensors}
        self._block_of = {
            (spec.name, spec.expert): number for number, block in enumerate(self.blocks) for spec in block.tensors
        }
        self._linear_experts = any(expert is not None for _, expert in self._specs) and experts_are_linear(config)

    def __enter__(self) -> CalibrationModel:
        self._source.require(self.blocks)
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(self._num_threads or usable_threads())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_num_threads(self._threads_before)

    def logits(
        self,
        windows: Sequence[Sequence[int]],
        change: WeightChange | None = None,
        progress: BlockProgress | None = None,
        more_bytes: int = 0,
    ) -> Generator[torch.Tensor, None, None]:
        """Per window of token ids its logits, float32 [tokens, vocabulary]: of the original model, or with the weights
        that `change` gives, which takes `more_bytes` itself. No more than two windows' are in memory. Close the
        iterator if it is not used up.

        Raises BudgetError, and what reading the checkpoint raises.
        """

        def on_matrix(spec: TensorSpec, inputs: Sequence[torch.Tensor], weight: torch.Tensor) -> torch.Tensor | None:
            return None if change is None else change(spec, weight)

        return self._pass(windows, on_matrix, progress, stops=False, more_bytes=more_bytes)

    def run(
        self,
        windows: Sequence[Sequence[int]],
        observe: LinearObserver,
        progress: BlockProgress | None = None,
        more_bytes: int = 0,
    ) -> None:
        """One pass over all of `windows`, in the order of the layers. `observe` is called once for each matrix of
        nn.Linear that is reached, and each expert that tokens are routed to where experts are linear; with what it
        gives, the pass goes on. `more_bytes` is what it takes itself.

        A module that a pass calls several times is observed in the last call, with the inputs of all; the calls before
        it use the original weight. Raises as `logits` does.
        """
        for _ in self._pass(windows, observe, progress, stops=True, more_bytes=more_bytes):
            pass

    def required_bytes(self, windows: Sequence[Sequence[int]]) -> int:
        """An upper estimate of the memory that a pass over `windows` takes, the process included."""
        waiting = sum(map(len, windows)) * self._token_bytes
        running = max(map(len, windows)) * (self._token_bytes + 4 * 2 * self._facts.vocab_size)
        return PROCESS_BYTES + waiting + running + self.largest_matrix_bytes

    @property
    def _token_bytes(self) -> int:
        """Every window waits at a matrix with its residual stream, what it is multiplied with, the products before."""
        return 4 * (4 * self._facts.hidden_size + 2 * self._facts.intermediate_size)

    @property
    def largest_matrix_bytes(self) -> int:
        """Of the weights that are held one at a time, in the checkpoint's dtype."""
        itemsize = 4 if self._dtype == "F32" else 2
        sizes = [spec.shape[0] * spec.shape[1] for spec in self._specs.values() if len(spec.shape) == 2]
        return max(sizes) * itemsize

    def require_memory(self, windows: Sequence[Sequence[int]], more_bytes: int = 0) -> None:
        """Raise BudgetError if a pass over `windows` that takes `more_bytes` besides is beyond the memory; it names
        what would do, and how much text would fit.
        """
        need = self.required_bytes(windows) + more_bytes
        if self._memory is None or need <= self._memory:
            return
        tokens = sum(map(len, windows))
        least = need - max(0, tokens - LEAST_TOKENS) * self._token_bytes
        fitting = tokens - -(-(need - self._memory) // self._token_bytes)
        shorter = (
            f"or take a text of at most {fitting} tokens"
            if fitting >= LEAST_TOKENS
            else f"a text of {LEAST_TOKENS} tokens, the shortest, takes {format_least(least)}"
        )
        raise BudgetError(
            f"a pass over {tokens} tokens of calibration text needs {format_least(need)} of memory, "
            f"{format_size(tokens * self._token_bytes)} of them for what the tokens are on their way through a layer; "
            f"{format_size(self._memory)} are given: raise --memory to {format_least(need)}, {shorter}"
        )

    def _pass(
        self,
        windows: Sequence[Sequence[int]],
        on_matrix: MatrixHook,
        progress: BlockProgress | None,
        *,
        stops: bool,
        more_bytes: int,
    ) -> Generator[torch.Tensor, None, None]:
        self.require_memory(windows, more_bytes)
        begun: set[int] = set()

        def on_tensor(spec: TensorSpec) -> None:
            begun.add(self._block_of[spec.name, spec.expert])
            if progress is not None:
                progress(len(begun), len(self.blocks))

        binder = LockstepBinder(
            self._model,
            self._trace,
            self._specs,
            self._source.aliases,
            self._read,
            self._read_rows,
            linear_experts=self._linear_experts,
            on_matrix=on_matrix,
            stop_after_matrices=stops,
            on_tensor=on_tensor,
        )
        with closing(_results(self._model, binder, windows)) as results:
            yield from results
        if progress is not None:
            progress(len(self.blocks), len(self.blocks))

    def _read(self, spec: TensorSpec) -> torch.Tensor:
        """A matrix in the checkpoint's dtype, anything else in that of the computation."""
        if len(spec.shape) == 2 and spec.dtype == "F32":
            spec = replace(spec, dtype=self._dtype)
        return self._source.read(spec, 0, spec.shape[0] if spec.shape else 1)

    def _read_rows(self, spec: TensorSpec, ids: torch.Tensor) -> torch.Tensor:
        unique, places = ids.unique(return_inverse=True)
        rows = torch.cat([self._source.read(spec, row, row + 1) for row in unique.tolist()])
        return rows[places]


class _Handover:
    """The logits of a window, from the lane that made them to the caller; nobody makes more until they are taken."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._taken = threading.Semaphore(0)

    def give(self, item: Any, gone: Callable[[], bool]) -> None:
        self._queue.put(item)
        while not self._taken.acquire(timeout=_POLL_S):
            if gone():
                raise FinishedError

    def take(self) -> Any:
        while True:  # a thread that waits for ever does not see that it is asked to end
            try:
                item = self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            self._taken.release()
            return item


def _results(
    model: Any, binder: LockstepBinder, windows: Sequence[Sequence[int]]
) -> Generator[torch.Tensor, None, None]:
    """Run `windows` in lanes, in threads of their own; their logits in order as far as passes come to their end."""
    handover = _Handover()
    binder.begin(len(windows))

    def body(window: Sequence[int]) -> None:
        try:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([list(window)]), use_cache=False).logits[0]
                binder.finish_window()
                handover.give(logits.float(), lambda: binder.stopped)
        except FinishedError:
            pass

    def lanes() -> None:
        end: BaseException | None = None
        try:
            binder.lanes.run([lambda window=window: body(window) for window in windows])  # type: ignore[misc]
        except BaseException as error:
            end = error
        with suppress(FinishedError):
            handover.give(end or StopIteration(), lambda: binder.stopped)

    runner = threading.Thread(target=lanes, name="calibration")
    runner.start()
    try:
        while not isinstance(item := handover.take(), BaseException):
            yield item
            del item  # taking the next one lets those behind it be made
        if not isinstance(item, StopIteration):
            raise item
    finally:
        binder.stopped = True
        runner.join()
        binder.close()
