"""What machine code asks the system for: to sleep until a word changes, to wake who sleeps, and the time."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from pipo_ray.pipeline import futex

_MONOTONIC = 1


def kernel_calls(wait_ns: int) -> str:
    """LLVM IR of `futex_wait` and `futex_wake`, which take the address of the C library's `syscall` and of a futex that
    processes share, and `time_ns`, which takes that of `clock_gettime`. Nobody sleeps for more than `wait_ns`, below a
    second, at a time.
    """
    number = futex.NUMBER or 0
    return f"""
define internal void @futex_wait(ptr %syscall, ptr %word, i32 %value) {{
  %time = alloca [2 x i64]
  store i64 0, ptr %time
  %rest_at = getelementptr i64, ptr %time, i64 1
  store i64 {wait_ns}, ptr %rest_at
  %expected = zext i32 %value to i64
  call i64 (i64, ...) %syscall(i64 {number}, ptr %word, i64 {futex.WAIT}, i64 %expected, ptr %time, ptr null, i64 0)
  ret void
}}

define internal void @futex_wake(ptr %syscall, ptr %word, i64 %count) {{
  call i64 (i64, ...) %syscall(i64 {number}, ptr %word, i64 {futex.WAKE}, i64 %count, ptr null, ptr null, i64 0)
  ret void
}}

define internal i64 @time_ns(ptr %clock_gettime) {{
  %time = alloca [2 x i64]
  %status = call i32 %clock_gettime(i32 {_MONOTONIC}, ptr %time)
  %seconds = load i64, ptr %time
  %rest_at = getelementptr i64, ptr %time, i64 1
  %rest = load i64, ptr %rest_at
  %whole = mul i64 %seconds, 1000000000
  %ns = add i64 %whole, %rest
  ret i64 %ns
}}
"""


@cache
def library_function(name: str) -> int:
    """The address of a function of the C library."""
    library: Any = ctypes.CDLL(None)
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
