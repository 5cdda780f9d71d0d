"""NvmeLoader: owns the file descriptors and read threads of one drive; fills slots from the block store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from pipo_ray.actors.calls import obtain_lease

from pipo_ray.messages import KVDiskSetup, StageTimes
from pipo_ray.pipeline.checksums import BlockChecksums
from pipo_ray.pipeline.compiled_loader import make_loader
from pipo_ray.pipeline.drive import Drive
from pipo_ray.pipeline.polite_drive import PoliteDrive
from pipo_ray.pipeline.roll import ActorRoll, loader_name
from pipo_ray.pipeline.stage_memory import KVMemory, StageMemory
from pipo_ray.pipeline.tracing import TraceWriter
from pipo_ray.session.kv_file import read_key
from pipo_ray.store.manifest import Manifest

if TYPE_CHECKING:
    from pipo_ray.pipeline.page_server import PageServer


class NvmeLoader:
    """Starts to read ahead as soon as it exists, and after a restart goes on where its predecessor stopped."""

    def __init__(self, roll: str, number: int = 0) -> None:
        self._name = loader_name(number)
        ActorRoll(roll).sign_in(self._name)
        setup = obtain_lease(self._name)
        self._memory = StageMemory.attach(setup)
        manifest = Manifest.load(setup.store)
        folder = manifest.folders(setup.store)[number]
        checksums = (
            BlockChecksums({b.name: b for b in manifest.blocks}, setup.plan.pieces, Drive(folder))
            if setup.verify_checksums
            else None
        )
        trace_file = f"{setup.trace_folder}/{self._name}-{os.getpid()}.jsonl" if setup.trace_folder else None
        trace = TraceWriter(trace_file, self._name)
        drive = PoliteDrive(folder, trace=trace) if setup.background else Drive(folder)
        self._loader = make_loader(
            drive, setup.plan.pieces, self._memory.load_order(setup), self._memory.table, self._memory.slots,
            self._memory.residents, checksums=checksums, threads=setup.read_threads,
            transfer_bytes=setup.transfer_bytes,
            preloads=self._memory.preload_order(setup), trace=trace,
            number=number, folder=None if setup.code_folder is None else Path(setup.code_folder),
        )  # fmt: skip
        self._drive = drive
        self._loader.start()
        self._pages: PageServer | None = None
        if setup.kv_disk is not None and number == 0:  # KV pages are not striped: one loader serves them
            self._pages = self._serve_pages(setup.kv_disk, trace)

    def _serve_pages(self, setup: KVDiskSetup, trace: TraceWriter) -> PageServer:
        from pipo_ray.pipeline.page_file import PageFile  # the cipher's library only where it is needed
        from pipo_ray.pipeline.page_server import PageServer

        memory = KVMemory.attach(setup, self._memory.table)
        key = read_key(setup.key_path)
        file = PageFile(setup.path, setup.placement.page_bytes, key, memory.table.next_nonce)
        server = PageServer(file, memory.table, list(memory.pages), run_pages=setup.placement.run_pages, trace=trace)
        server.start()
        return server

    def ready(self) -> int:
        """The pid, once it reads."""
        return os.getpid()

    def error(self) -> Exception | None:
        """The latest error that reading again did not cure."""
        return self._loader.error

    def times(self) -> StageTimes:
        """Busy: at least one read in flight. Waiting: every slot is full. Paused: it gave way to other programs."""
        now = self._loader.snapshot()
        details = {
            "bytes_read": now.bytes_read, "pieces_read": now.pieces_read, "direct": now.direct, "retries": now.retries,
            "why_buffered": self._drive.why_buffered,
        }  # fmt: skip
        if self._pages is not None:
            pages = self._pages.snapshot()
            details |= {"kv_loaded_bytes": pages.loaded_bytes, "kv_saved_bytes": pages.saved_bytes}
            details |= {"kv_moving_s": pages.busy_s, "kv_direct": pages.direct, "kv_retries": pages.retries}
        return StageTimes(self._name, now.reading_s, now.waiting_for_slots_s, now.running_s, details, now.paused_s)
