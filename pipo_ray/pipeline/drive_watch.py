"""What a user should hear of the drive while a run goes on, read from the slot table."""

from __future__ import annotations

from pipo_ray.pipeline.slots import SlotTable

SILENT_S = 10.0
"""A drive that gives nothing for so long is not slow, it hangs: a bus reset takes the kernel 30 s, a network longer."""


class DriveWatch:
    """Over the slot table of a run whose block store is in `folders`, one for each loader."""

    def __init__(self, table: SlotTable, *folders: str) -> None:
        self._table, self._folders = table, folders
        self._silent: set[int] = set()
        self._buffered: set[int] = set()

    def news(self) -> list[str]:
        """Lines about what has happened since the last call; of a stall one, when it is `SILENT_S` old."""
        return [line for loader, folder in enumerate(self._folders) for line in self._news_of(loader, folder)]

    def _news_of(self, loader: int, folder: str) -> list[str]:
        lines = []
        if self._table.drive_buffered(loader) and loader not in self._buffered:
            self._buffered.add(loader)
            lines.append(
                f"{folder}: its file system refuses direct reads (O_DIRECT); the weights are read through the "
                "page cache, which is dropped behind them: slower on a fast drive"
            )
        silent_s = self._table.drive_silent_s(loader)
        if silent_s < SILENT_S:
            self._silent.discard(loader)
        elif loader not in self._silent:
            self._silent.add(loader)
            lines.append(
                f"{folder}: the drive has not answered for {silent_s:.0f} s; the run goes on as soon as it does "
                "(Ctrl-C ends it)"
            )
        return lines
