"""Scheduler: owns the request queue; forms each sweep's batch, drives the compute worker, streams tokens out."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Sequence
from typing import Any

from pipo_ray.actors.calls import find, obtain_lease
from ray.exceptions import RayActorError, RayTaskError

from pipo_ray.errors import ActorFailedError, DriveError, MisreadError, PipoError, WorkerLostError
from pipo_ray.messages import RequestSpec, StageTimes, SweepRequest, SweepResult, TokenEvent
from pipo_ray.pipeline.roll import ActorRoll, loader_name
from pipo_ray.pipeline.slots import PieceUnreadableError
from pipo_ray.pipeline.stage_memory import StageMemory
from pipo_ray.pipeline.tracing import TraceWriter
from pipo_ray.scheduling.limits import Limits
from pipo_ray.scheduling.loop import AHEAD_S, SchedulingLoop


class Scheduler:
    """Async: clients submit and poll while a sweep runs."""

    def __init__(self, roll: str, limits: Limits) -> None:
        ActorRoll(roll).sign_in("Scheduler")
        setup = obtain_lease("Scheduler")
        self._memory = StageMemory.attach(setup)
        self._compute = find("ComputeWorker")
        self._loaders = [find(loader_name(number)) for number in range(setup.plan.num_drives)]
        trace_file = f"{setup.trace_folder}/Scheduler-{os.getpid()}.jsonl" if setup.trace_folder else None
        trace = TraceWriter(trace_file, "Scheduler")
        self._loop = SchedulingLoop(self._run_sweep, self._set_up, limits, trace, AHEAD_S, self._leave_out)
        self._task: asyncio.Task[None] | None = None
        self._identity = uuid.uuid4().hex

    async def ready(self) -> int:
        """The pid."""
        return os.getpid()

    async def submit(self, client: str, scheduler: str, requests: Sequence[RequestSpec]) -> str:
        """Queue `requests`, see `SchedulingLoop.submit`; returns our identity, another one for each process.

        Nothing is queued if `scheduler` is not our identity: the client knows only a predecessor of ours, and must
        submit everything again.
        """
        if scheduler != self._identity:
            return self._identity
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._loop.run())
        self._loop.submit(client, requests)
        return self._identity

    async def poll(self, client: str, scheduler: str, after: int, timeout_s: float) -> list[TokenEvent] | None:
        """The client's new events, or None if the client does not know this scheduler yet."""
        if scheduler != self._identity or not self._loop.knows(client):
            return None
        return await self._loop.poll(client, after, timeout_s)

    async def abort(self, client: str, request_ids: Sequence[str]) -> None:
        """See `SchedulingLoop.abort`."""
        self._loop.abort(client, request_ids)

    async def leave(self, client: str) -> None:
        """See `SchedulingLoop.leave`."""
        self._loop.leave(client)

    async def times(self) -> StageTimes:
        """See `SchedulingLoop.times`."""
        return self._loop.times()

    async def _set_up(self) -> None:
        await self._call(self._compute.set_up.remote())

    async def _run_sweep(self, request: SweepRequest) -> SweepResult:
        result: SweepResult = await self._call(self._compute.run_sweep.remote(request))
        return result

    def _leave_out(self, sequences: Sequence[str]) -> None:
        self._compute.leave_out.remote(list(sequences))

    async def _call(self, reference: Any) -> Any:
        try:
            return await reference
        except RayActorError as error:
            if self._memory.table.stopped:
                raise ActorFailedError("the run was stopped") from error
            raise WorkerLostError from error
        except RayTaskError as error:
            if isinstance(error.cause, WorkerLostError):
                raise WorkerLostError from error
            cause = await self._diagnose(error)
            if isinstance(cause, MisreadError):  # nothing of this sweep has been handed out; it is done again
                raise WorkerLostError from cause
            raise cause from error

    async def _diagnose(self, error: RayTaskError) -> PipoError:
        """The compute worker raised: that loader's own error if that is why, the error itself if it is one of ours."""
        inner = error.cause
        if isinstance(inner, PieceUnreadableError):
            try:
                cause = await self._loaders[inner.loader].error.remote()
            except RayActorError:
                cause = None
            if isinstance(cause, PipoError):
                return cause
            return DriveError("the loader could not read a piece of the model, and died before it said why; try again")
        if isinstance(inner, PipoError):
            return inner
        return ActorFailedError(
            f"ComputeWorker: {type(inner).__name__}: {inner}; run again with PIPO_DEBUG=1 for the traceback"
        )
