"""The file for KV pages and its key, as the driver holds them: without a name, and gone with the processes."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import tempfile
from pathlib import Path

from pipo_ray.errors import InputError, ResourceError
from pipo_ray.session.descriptors import close_private, keep_private
from pipo_ray.session.memory import format_size

KEY_BYTES = 32
# f_type of statfs (man 2 statfs): file systems that are memory.
_IN_MEMORY = {0x01021994: "tmpfs", 0x858458F6: "ramfs"}


class KVFile:
    """A file of `nbytes` in `folder`, all of it reserved, and a random key in memory.

    The driver keeps both open, so that a loader that is killed finds its pages again. Others of this user open them by
    `path` and `key_path`, through the driver's descriptors. The key is never in a file system, a message or the object
    store; the operating system may write it to swap space, as all memory.
    """

    def __init__(self, folder: str | Path, nbytes: int, *, encrypted: bool = True) -> None:
        """Raises InputError for a folder that is not on a drive, ResourceError for one that cannot hold the file."""
        check_folder(folder)
        self._descriptors: list[int] = []
        try:
            self.path = self._keep(_open_nameless(folder))
            _reserve(self._descriptors[0], nbytes, folder)
            self.key_path = self._keep(_memory_with(secrets.token_bytes(KEY_BYTES))) if encrypted else None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the space back, as soon as the loader's descriptor is closed too. Calling it twice is harmless."""
        while self._descriptors:
            close_private(self._descriptors.pop())

    def _keep(self, descriptor: int) -> str:
        self._descriptors.append(keep_private(descriptor))
        return f"/proc/{os.getpid()}/fd/{descriptor}"


def read_key(path: str | None) -> bytes | None:
    """The key behind `KVFile.key_path`; None without one."""
    return None if path is None else Path(path).read_bytes()


def check_folder(folder: str | Path) -> None:
    """Raise InputError if KV pages on disk cannot be in `folder`."""
    if not Path(folder).is_dir():
        raise InputError(f"--kv-folder {folder}: there is no such folder; make it, or name another one")
    kind = _IN_MEMORY.get(_file_system(folder))
    if kind is not None:
        raise InputError(
            f"--kv-folder {folder} lies in memory ({kind}), which is what KV pages on disk are to save; name a folder "
            "on a drive"
        )


def check_room(folder: str | Path, nbytes: int) -> None:
    """Raise ResourceError if `folder` has less than `nbytes` free."""
    if nbytes > _free(folder):
        raise _no_room(folder, nbytes, os.strerror(errno.ENOSPC))


def _file_system(folder: str | Path) -> int:
    """f_type, the number of its kind."""
    libc = ctypes.CDLL(None, use_errno=True)
    answer = (ctypes.c_long * 64)()  # struct statfs begins with it and has 120 bytes
    if libc.statfs(os.fsencode(folder), ctypes.byref(answer)) != 0:
        number = ctypes.get_errno()
        raise InputError(f"--kv-folder {folder} cannot be looked at: {os.strerror(number)}; name another one")
    return int(answer[0]) & 0xFFFFFFFF


def _open_nameless(folder: str | Path) -> int:
    """A new file without a name, or, where the file system has no such thing, one whose name is taken away at once."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        try:
            # With O_EXCL nobody can give it a name later (man 2 open).
            return os.open(folder, flags | os.O_TMPFILE | os.O_EXCL, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
                raise
        descriptor, name = tempfile.mkstemp(prefix=".pipo-kv-", dir=folder)
        os.unlink(name)
        return descriptor
    except OSError as error:
        raise ResourceError(
            f"--kv-folder {folder}: no file for KV pages can be made there: {error.strerror}; name another folder"
        ) from error


def _reserve(descriptor: int, nbytes: int, folder: str | Path) -> None:
    check_room(folder, nbytes)  # trying would fill the drive for a moment, for everybody
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        raise _no_room(folder, nbytes, str(error.strerror)) from error


def _no_room(folder: str | Path, nbytes: int, cause: str) -> ResourceError:
    return ResourceError(
        f"--kv-on-disk: {format_size(nbytes)} of KV pages do not fit into {folder}, which has "
        f"{format_size(_free(folder))} free ({cause}); lower --kv-on-disk, or name a folder on another drive with "
        "--kv-folder"
    )


def _free(folder: str | Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _memory_with(content: bytes) -> int:
    """A descriptor of anonymous memory with `content` in it."""
    descriptor = os.memfd_create("pipo-kv-key", os.MFD_CLOEXEC)
    os.write(descriptor, content)
    return descriptor
