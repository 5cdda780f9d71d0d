"""A stage: one machine's loader, staging pool and compute worker, with their scheduler, started and watched by the
driver.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from pathlib import Path
from typing import Any

from pipo_ray.errors import ActorFailedError, PipoError
from pipo_ray.messages import ComputeSetup, KVDiskSetup, StageSetup, StageTimes
from pipo_ray.pipeline.drive_watch import DriveWatch
from pipo_ray.pipeline.page_table import PageTable
from pipo_ray.pipeline.roll import WINDOW_S, ActorRoll, loader_name
from pipo_ray.pipeline.slots import SlotTable
from pipo_ray.pipeline.stage_memory import StageMemory
from pipo_ray.plan.budget import RunPlan
from pipo_ray.scheduling.limits import Limits
from pipo_ray.session.huge_pages import use_huge_pages
from pipo_ray.session.kv_file import KVFile
from pipo_ray.session.memory import format_size, proportional_size
from pipo_ray.session.oom import oom_kills
from pipo_ray.session.session import Session
from pipo_ray.session.slots import SharedBuffer, object_store_bytes
from pipo_ray.store.manifest import Manifest

_log = logging.getLogger("pipo_ray")
_START_PATIENCE_S = 120.0
_SUPERVISE_S = 0.2


def store_bytes(plan: RunPlan) -> int:
    """Bytes of object store that the stage's buffers need."""
    placement = plan.placement
    table = _table_bytes(plan)
    slots = [placement.slot_bytes] * placement.num_slots
    return object_store_bytes([table, *slots, *placement.arena_bytes, *_kv_bytes(plan)])


def _table_bytes(plan: RunPlan) -> int:
    return SlotTable.nbytes(plan.placement.num_slots, len(plan.placement.residents), plan.sweep.num_drives)


def _kv_bytes(plan: RunPlan) -> list[int]:
    """Of the table of KV pages, and of those in RAM, if there are pages on the drive."""
    kv = plan.kv_disk
    return [] if kv is None else [PageTable.nbytes(kv.ram_pages, kv.disk_pages), kv.ram_bytes]


class Stage:
    """Creates slots and resident memory, then the four actors under their names, and a loader for each further drive
    that the store is striped over.

    The driver holds every buffer, so that any actor may die and find its memory again.
    """

    def __init__(
        self,
        session: Session,
        store: Path,
        plan: RunPlan,
        compute: ComputeSetup,
        limits: Limits,
        *,
        trace: bool = False,
        verify_checksums: bool = True,
        background: bool = False,
    ) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from pipo_ray.actors.compute_worker import ComputeWorker
        from pipo_ray.actors.nvme_loader import NvmeLoader
        from pipo_ray.actors.scheduler import Scheduler
        from pipo_ray.actors.staging_pool import StagingPool

        self._session, self._plan = session, plan
        self._oom_kills = oom_kills()
        self._refusal: str | None = None  # of the staging pool
        placement, kv = plan.placement, plan.kv_disk
        # First of all: here it shows whether the drive has room.
        self._kv_file = None if kv is None else KVFile(kv.folder, kv.disk_bytes, encrypted=kv.encrypted)
        self.trace_folder = Path(session.path) / "trace" if trace else None
        if self.trace_folder is not None:
            self.trace_folder.mkdir(exist_ok=True)
        num_loaders = plan.sweep.num_drives
        self.roll = ActorRoll.create(Path(session.path) / "roll", num_loaders)

        # Slots are shared memory of this node, and so is the store's place in the file system: nowhere else, not even
        # after a restart.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)

        def actor(kind: Any, name: str, **options: Any) -> Any:
            made = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, **options)(kind)
            return made.options(name=name, scheduling_strategy=here)

        roll = self.roll.path
        self.staging_pool = actor(StagingPool, "StagingPool", max_concurrency=8).remote(roll, plan.weight_bytes)
        self.nvme_loaders = [
            actor(NvmeLoader, loader_name(number), max_concurrency=2).remote(roll, number)
            for number in range(num_loaders)
        ]
        # Two sweeps: one runs, and the one behind it is already there.
        groups = {"text": 1, "sweeps": 2}
        self.compute_worker = actor(ComputeWorker, "ComputeWorker", concurrency_groups=groups).remote(roll, compute)
        self.scheduler = actor(Scheduler, "Scheduler", max_concurrency=64).remote(roll, limits)
        # While the actors' processes start and import what they need; they wait for the lease then.
        self._table_buffer = session.allocate(_table_bytes(plan))
        self._buffers: list[SharedBuffer] = [session.allocate(placement.slot_bytes) for _ in range(placement.num_slots)]
        self.huge_page_bytes = use_huge_pages([buffer.view for buffer in self._buffers])
        self._arenas: list[SharedBuffer] = [session.allocate(nbytes) for nbytes in placement.arena_bytes]
        self._kv_buffers = [session.allocate(nbytes) for nbytes in _kv_bytes(plan)]
        use_huge_pages([buffer.view for buffer in self._kv_buffers[1:]])
        kv_setup = None
        if kv is not None and self._kv_file is not None:
            table_ref, ram_ref = ([buffer.ref] for buffer in self._kv_buffers)
            shared = limits.sharing != "none"
            kv_setup = KVDiskSetup(kv, table_ref, ram_ref, self._kv_file.path, self._kv_file.key_path, shared)
        setup = StageSetup(
            store=str(store), plan=plan.sweep, placement=placement, table_ref=[self._table_buffer.ref],
            slot_refs=[buffer.ref for buffer in self._buffers], arena_refs=[arena.ref for arena in self._arenas],
            trace_folder=str(self.trace_folder) if self.trace_folder else None, verify_checksums=verify_checksums,
            background=background, read_threads=plan.transfer.read_threads, transfer_bytes=plan.transfer.transfer_bytes,
            kv_disk=kv_setup, code_folder=compute.code_folder,
        )  # fmt: skip
        self._setup = setup
        self.memory = StageMemory.attach(setup)
        folders = Manifest.load(store).folders(store)[:num_loaders]
        pages = None
        if kv is not None:
            pages = PageTable(self._kv_buffers[0].view, kv.ram_pages, kv.disk_pages, lambda: False)
        pages_folder = "" if kv is None else kv.folder
        self._drive = DriveWatch(self.memory.table, *map(str, folders), pages=pages, pages_folder=pages_folder)
        self._closing = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
        self._supervisor.start()

    def wait_until_ready(self) -> None:
        """Wait until all actors answer. Raises the PipoError that one of them reports."""
        for loader in self.nvme_loaders:
            self.call(loader, "ready")
        self.call(self.scheduler, "ready")
        self.call(self.compute_worker, "set_up")

    def notes(self) -> list[str]:
        """Lines for the user, from actors that are ready: about what this machine cannot do."""
        return list(self.call(self.compute_worker, "notes"))

    def call(self, actor: Any, method: str, *arguments: Any, patience_s: float = _START_PATIENCE_S) -> Any:
        """Call an actor and wait; asks again while it is being restarted. Errors of ours come back as themselves."""
        import ray

        deadline = time.monotonic() + patience_s
        while True:
            self.check()
            reference = getattr(actor, method).remote(*arguments)
            try:
                while True:
                    done, _ = ray.wait([reference], timeout=1.0)
                    if done:
                        return ray.get(reference)
                    self.check()
            except ray.exceptions.RayTaskError as error:
                self.check()  # that an actor died for good is why the others stopped
                if isinstance(error.cause, PipoError):
                    raise error.cause from None
                raise ActorFailedError(f"{method}: {type(error.cause).__name__}: {error.cause}") from error
            except ray.exceptions.RayActorError as error:
                if time.monotonic() > deadline:
                    raise ActorFailedError(f"an actor did not come back within {patience_s:.0f} s: {error}") from error
                time.sleep(0.1)

    def check(self) -> None:
        """Raise ActorFailedError if an actor has died too often, or the staging pool does not take the memory."""
        if self._refusal is not None:
            raise ActorFailedError(f"StagingPool: {self._refusal}")
        lost = self.roll.lost()
        if lost is not None:
            in_use = proportional_size(self._session.pids())
            raise ActorFailedError(
                f"actor {lost} died for the third time within {WINDOW_S:.0f} s ({self._reason(lost)}); "
                f"memory budget {format_size(self._plan.memory_bytes)}, in use now {format_size(in_use)}; "
                "lower --max-batch-tokens or raise --memory"
            )

    @property
    def nvme_loader(self) -> Any:
        """The loader of the store's own folder."""
        return self.nvme_loaders[0]

    def pids(self) -> dict[str, int]:
        """The actors' pids by name."""
        return {name: self.roll.pid(name) for name in self.roll.actors}

    def times(self) -> list[StageTimes]:
        """How each stage has spent its time."""
        result = []
        for actor in (*self.nvme_loaders, self.staging_pool, self.compute_worker, self.scheduler):
            with contextlib.suppress(PipoError):
                times = self.call(actor, "times", patience_s=10.0)
                if times is not None:
                    result.append(times)
        return result

    def close(self) -> None:
        """End the actors and give the memory back."""
        import ray

        self._closing.set()
        self.memory.table.stop()
        self._supervisor.join()
        for actor in (self.scheduler, self.compute_worker, *self.nvme_loaders, self.staging_pool):
            with contextlib.suppress(Exception):
                ray.kill(actor, no_restart=True)
        for buffer in [*self._buffers, *self._arenas, *self._kv_buffers, self._table_buffer]:
            buffer.release()
        if self._kv_file is not None:
            self._kv_file.close()
        # Any view keeps the whole object store's memory taken, as long as somebody keeps this object, or a frame:
        # Ray's errors refer to themselves, and their tracebacks keep it. So no local variable holds a view.
        del self.memory, self._setup, self._drive

    def _supervise(self) -> None:
        """Open the staging pool whenever it was started; stop the pipeline when an actor has died too often; say what
        is the matter with the drive. (A warning of our log goes to stderr unless the program has other plans for it.)
        """
        import ray

        opened = 0
        while not self._closing.wait(_SUPERVISE_S):
            for line in self._drive.news():
                _log.warning("pipo: %s", line)
            if self.roll.lost() is not None:
                self.memory.table.stop()
                return
            starts = self.roll.starts("StagingPool")
            if starts > opened:
                try:
                    ray.get(self.staging_pool.open.remote(self._setup), timeout=_START_PATIENCE_S)
                    opened = starts
                except ray.exceptions.RayTaskError as error:
                    # Its text only: a traceback would keep this frame, and with it a view of the object store.
                    self._refusal = str(error.cause)
                except ray.exceptions.RayError:
                    continue  # it died: there will be another start

    def _reason(self, lost: str) -> str:
        kills = oom_kills() - self._oom_kills
        if kills:
            return f"the kernel's out-of-memory killer has ended {kills} processes of this memory group"
        return "its process was killed from outside or crashed; see the logs in the session folder"
