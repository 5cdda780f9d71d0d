"""What a user should hear of the drive while a run goes on, read from shared memory."""

from __future__ import annotations

from pipo_ray.pipeline.page_table import PageTable
from pipo_ray.pipeline.slots import SlotTable

SILENT_S = 10.0
"""A drive that gives nothing for so long is not slow, it hangs: a bus reset takes the kernel 30 s, a network longer."""


class DriveWatch:
    """Over the slot table of a run whose block store is in `folders`, one for each loader; and over the table of KV
    pages whose file is in `pages_folder`, if there is one.
    """

    def __init__(self, table: SlotTable, *folders: str, pages: PageTable | None = None, pages_folder: str = "") -> None:
        self._table, self._folders = table, folders
        self._pages, self._pages_folder = pages, pages_folder
        self._silent: set[int] = set()
        self._buffered: set[int] = set()

    def news(self) -> list[str]:
        """Lines about what has happened since the last call; of a stall one, when it is `SILENT_S` old."""
        lines = []
        for loader, folder in enumerate(self._folders):
            silent_s, buffered = self._table.drive_silent_s(loader), self._table.drive_buffered(loader)
            lines += self._news_of(loader, folder, silent_s, buffered, "the weights are read")
        if self._pages is not None:
            silent_s, buffered = self._pages.drive_silent_s, self._pages.drive_buffered
            lines += self._news_of(-1, self._pages_folder, silent_s, buffered, "KV pages are written and read")
        return lines

    def _news_of(self, drive: int, folder: str, silent_s: float, buffered: bool, what: str) -> list[str]:
        lines = []
        if buffered and drive not in self._buffered:
            self._buffered.add(drive)
            lines.append(
                f"{folder}: its file system refuses direct access (O_DIRECT); {what} through the page cache, which is "
                "dropped behind them: slower on a fast drive"
            )
        if silent_s < SILENT_S:
            self._silent.discard(drive)
        elif drive not in self._silent:
            self._silent.add(drive)
            lines.append(
                f"{folder}: the drive has not answered for {silent_s:.0f} s; the run goes on as soon as it does "
                "(Ctrl-C ends it)"
            )
        return lines
