"""Machine code for this processor: compiled by LLVM and kept on disk."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

_DIGEST_BYTES = 32


class MachineCode:
    """The functions of an LLVM module. Each takes the address of a context (`pipo_ray/compiled/ir.py`).

    Importing llvmlite takes 0.05 s and 45 MiB, most of it mapped code. Compiling takes 0.3 s and 40 MiB more; with
    `folder` that is done once for a module, a processor and a version of LLVM, and what came out is read back. Code is
    taken only from a file that nobody else can write.
    """

    def __init__(self, source: str, folder: Path | None = None) -> None:
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
        machine = llvm.Target.from_default_triple().create_target_machine(cpu=cpu, features=features, opt=2)
        key = hashlib.sha256(repr((source, cpu, features, llvm.llvm_version_info)).encode()).hexdigest()
        file = None if folder is None else folder / f"{key[:32]}.o"
        code = None if file is None else _read(file)
        if code is None:
            code = _compile(llvm, machine, source)
            if file is not None:
                _write(file, code)
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()

    def address(self, name: str) -> int:
        """Of a function; good as long as this object lives. Raises KeyError if there is none of that name."""
        found = int(self._engine.get_function_address(name))
        if not found:
            raise KeyError(name)
        return found


def run_here(address: int, context: int) -> None:
    """Call the function at `address` with the context at `context`, without the GIL."""
    function_at(address)(context)


def context_of(words: Sequence[int]) -> Any:
    """An array of 64-bit words; its address is `ctypes.addressof`."""
    return (ctypes.c_int64 * len(words))(*words)


@cache
def function_at(address: int) -> Callable[[int], None]:
    """The function at `address`, which takes the address of a context and runs without the GIL."""
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


def _compile(llvm: Any, machine: Any, source: str) -> bytes:
    module = llvm.parse_assembly(source)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_unrolling = options.loop_vectorization = options.slp_vectorization = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return bytes(machine.emit_object(module))


def _read(file: Path) -> bytes | None:
    """What `_write` wrote; None if that is not there whole, or if somebody else may have written it."""
    try:
        with file.open("rb") as opened:
            status = os.fstat(opened.fileno())
            if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return None
            data = opened.read()
    except OSError:
        return None
    code = data[_DIGEST_BYTES:]
    return code if code and hashlib.sha256(code).digest() == data[:_DIGEST_BYTES] else None


def _write(file: Path, code: bytes) -> None:
    """Without a folder to write to it is compiled every time."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(dir=file.parent, prefix=".")  # mode 0600
        try:
            with os.fdopen(descriptor, "wb") as opened:
                opened.write(hashlib.sha256(code).digest() + code)
            os.replace(scratch, file)
        except OSError:
            os.unlink(scratch)
