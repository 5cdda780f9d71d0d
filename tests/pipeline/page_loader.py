"""KV pages in a file and a page server at them, in this process or in one of its own, as the loader has it:
python page_loader.py SPECIFICATION.json
"""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pipo_ray.pipeline.page_file import PageFile
from pipo_ray.pipeline.page_server import PageServer
from pipo_ray.pipeline.page_table import PageTable
from pipo_ray.pipeline.slots import U8
from pipo_ray.plan.kv_disk import RUN_BYTES
from pipo_ray.session.kv_file import KVFile, read_key

PAGE = 4096


@dataclass(frozen=True)
class Pages:
    """A stop word, the table and the frames, in one file that several processes map; the KV file's paths."""

    shared: str
    num_frames: int
    num_pages: int
    page_bytes: int
    path: str
    key_path: str | None

    @staticmethod
    def create(folder: Path, file: KVFile, num_frames: int, num_pages: int, page_bytes: int = PAGE) -> Pages:
        shared = folder / "shared"
        table_bytes = -(-PageTable.nbytes(num_frames, num_pages) // PAGE) * PAGE
        shared.write_bytes(bytes(PAGE + table_bytes + num_frames * page_bytes))
        return Pages(str(shared), num_frames, num_pages, page_bytes, file.path, file.key_path)

    def open(self) -> tuple[U8, PageTable, U8]:
        """Stop word, table, frames [num_frames, page_bytes]."""
        with open(self.shared, "r+b") as file:
            memory = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
        frames = len(memory) - self.num_frames * self.page_bytes
        table = PageTable(memory[PAGE:frames], self.num_frames, self.num_pages, lambda: bool(memory[0]))
        return memory[:1], table, memory[frames:].reshape(self.num_frames, self.page_bytes)

    def serve(self, table: PageTable, frames: U8) -> PageServer:
        """A server, started."""
        server = PageServer(
            PageFile(self.path, self.page_bytes, read_key(self.key_path), table.next_nonce),
            table,
            list(frames),
            run_pages=max(2, RUN_BYTES // self.page_bytes),
        )
        server.start()
        return server

    def start_process(self) -> subprocess.Popen[bytes]:
        """A server in a process of its own, which serves already."""
        specification = Path(self.shared).with_name("specification.json")
        specification.write_text(json.dumps(asdict(self)))
        process = subprocess.Popen([sys.executable, __file__, str(specification)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        return process


def main() -> None:
    pages = Pages(**json.loads(Path(sys.argv[1]).read_text()))
    _, table, frames = pages.open()
    server = pages.serve(table, frames)
    print("started", flush=True)
    server.stop()


if __name__ == "__main__":
    main()
