"""What a packing run that was killed had finished: one JSON line per file, on the disk before the next file begins."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from pipo_ray.store.manifest import JOURNAL_NAME, sync_folder


@dataclass(frozen=True)
class FinishedFile:
    """A file that is completely on the disk: its size in bytes, and the checksum of each block by name."""

    name: str
    size: int
    checksums: dict[str, str]


class Journal:
    """The journal of the store that is being packed in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL_NAME

    def read(self, fingerprint: str) -> dict[str, FinishedFile] | None:
        """The finished files by name; None without a journal, or if it belongs to another plan than `fingerprint`."""
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        finished: dict[str, FinishedFile] = {}
        try:
            if not lines or json.loads(lines[0]).get("fingerprint") != fingerprint:
                return None
            for line in lines[1:]:
                entry = json.loads(line)
                finished[entry["name"]] = FinishedFile(entry["name"], entry["size"], dict(entry["checksums"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # a line that was cut off by the kill: its file is packed again
        return finished

    def start(self, fingerprint: str) -> None:
        """Begin anew."""
        self._write("w", {"fingerprint": fingerprint})
        sync_folder(self.path.parent)

    def add(self, file: FinishedFile) -> None:
        """Record a file that is on the disk."""
        self._write("a", {"name": file.name, "size": file.size, "checksums": file.checksums})

    def remove(self) -> None:
        """From now on the folder is a store, if it has a manifest."""
        self.path.unlink(missing_ok=True)
        sync_folder(self.path.parent)

    def _write(self, mode: str, entry: dict[str, object]) -> None:
        with open(self.path, mode, encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
