"""ComputeWorker: owns the device, the module graph and the KV cache; runs sweeps."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import Any

import ray
from pipo_ray.actors.calls import obtain_lease

from pipo_ray.errors import WorkerLostError
from pipo_ray.messages import ComputeSetup, StageSetup, StageTimes, SweepRequest, SweepResult
from pipo_ray.model.engine_thread import EngineThread, OvertookError
from pipo_ray.pipeline.roll import ActorRoll
from pipo_ray.session.processes import is_alive

_importing = threading.Lock()


class ComputeWorker:
    """Light until `set_up`: an error there is an answer to the caller and not a dead process."""

    def __init__(self, roll: str, setup: ComputeSetup) -> None:
        from pipo_ray.pipeline.stage_memory import StageMemory

        ActorRoll(roll).sign_in("ComputeWorker")
        # Meanwhile the driver makes the slots. What goes wrong with it goes wrong in `set_up` again, and is told there.
        self._profiles = None if setup.profile_folder is None else Path(setup.profile_folder)
        threading.Thread(target=_import_engine, args=(self._profiles,), name="import", daemon=True).start()
        self._compute_setup = setup
        self._setup: StageSetup = obtain_lease("ComputeWorker")
        self._memory = StageMemory.attach(self._setup)
        self._thread = EngineThread()
        self._engine: Any = None
        self._text: Any = None

    def set_up(self) -> int:
        """Build the graph and wait for the loader; forget all sequences. Returns the pid. Raises PipoError for what
        cannot be run.
        """
        self._thread.call(self._set_up)
        return os.getpid()

    def _set_up(self) -> None:
        if self._engine is None:
            ComputeEngine = _import_engine(self._profiles)
            self._engine = ComputeEngine(self._setup, self._compute_setup, self._memory)
            # What is there now stays: looking through it for garbage again and again costs a sweep 0.1 s at times.
            gc.collect()
            gc.freeze()
        else:
            self._engine.forget_all()

    def notes(self) -> tuple[str, ...]:
        """After `set_up`: lines for the user, about what this machine cannot do."""
        return self._engine.notes if self._engine is not None else ()

    @ray.method(concurrency_group="sweeps")
    def run_sweep(self, request: SweepRequest) -> SweepResult:
        """One sweep over the weights for everybody in `request`. Raises WorkerLostError before `set_up`, and for what a
        scheduler sent ahead that has died.
        """
        if self._engine is None:
            raise WorkerLostError("the compute worker that was set up has died")
        try:
            return self._thread.sweep(request, lambda: self._run_sweep(request))
        except OvertookError as error:
            raise WorkerLostError(str(error)) from error

    def _run_sweep(self, request: SweepRequest) -> SweepResult:
        if request.sent_ahead_by is not None and not is_alive(request.sent_ahead_by):
            raise WorkerLostError("the scheduler that sent this sweep has died")
        result: SweepResult = self._engine.run_sweep(request)
        return result

    @ray.method(concurrency_group="text")
    def leave_out(self, sequences: list[str]) -> None:
        """Nobody wants these sequences' next tokens any more: steps that follow are left out."""
        if self._engine is not None:
            self._engine.leave_out(sequences)

    @ray.method(concurrency_group="text")
    def encode(self, prompts: list[Any]) -> list[tuple[list[int], str | None]]:
        """Token ids of each prompt, and its text where it was given as text."""
        return self._texts().encode(prompts)  # type: ignore[no-any-return]

    @ray.method(concurrency_group="text")
    def render_chat(self, messages: list[dict[str, Any]]) -> str:
        """The conversation in the checkpoint's chat template, ready for an answer."""
        return self._texts().render_chat(messages)  # type: ignore[no-any-return]

    @ray.method(concurrency_group="text")
    def check_params(self, params: list[Any]) -> None:
        """Raise InputError for sampling parameters that this checkpoint cannot serve (stop strings without a
        tokenizer).
        """
        self._texts().check_params(params)

    @ray.method(concurrency_group="text")
    def times(self) -> StageTimes | None:
        """Busy: computing. Waiting: for a piece."""
        return self._engine.times() if self._engine is not None else None

    @ray.method(concurrency_group="text")
    def watch_kernels(self) -> None:
        """Let `times` tell how long the GPU's kernels ran in the next sweep."""
        if self._engine is not None:
            self._engine.watch_kernels()

    def _texts(self) -> Any:
        if self._text is None:
            # Prompts may come while another thread imports transformers, which is no time to use it.
            _import_engine(self._profiles)
            from pipo_ray.model.prompts import PromptEncoder

            self._text = PromptEncoder(self._setup.store, self._compute_setup.facts)
        return self._text


def _import_engine(profiles: Path | None) -> Any:
    """The class ComputeEngine; torch and transformers come with it. Safe to call from several threads."""
    with _importing:
        from pipo_ray.model.lean_transformers import import_transformers

        import_transformers(profiles)
        from pipo_ray.model.engine import ComputeEngine

    return ComputeEngine
