"""What a user should hear of the drive while a run goes on, read from the slot table."""

from __future__ import annotations

from pipo_ray.pipeline.slots import SlotTable

SILENT_S = 10.0
"""A drive that gives nothing for so long is not slow, it hangs: a bus reset takes the kernel 30 s, a network longer."""


class DriveWatch:
    """Over the slot table of a run whose block store is in `store`."""

    def __init__(self, table: SlotTable, store: str) -> None:
        self._table, self._store = table, store
        self._silent = self._buffered = False

    def news(self) -> list[str]:
        """Lines about what has happened since the last call; of a stall one, when it is `SILENT_S` old."""
        lines = []
        if self._table.drive_buffered and not self._buffered:
            self._buffered = True
            lines.append(
                f"{self._store}: its file system refuses direct reads (O_DIRECT); the weights are read through the "
                "page cache, which is dropped behind them: slower on a fast drive"
            )
        silent_s = self._table.drive_silent_s
        if silent_s < SILENT_S:
            self._silent = False
        elif not self._silent:
            self._silent = True
            lines.append(
                f"{self._store}: the drive has not answered for {silent_s:.0f} s; the run goes on as soon as it does "
                "(Ctrl-C ends it)"
            )
        return lines
