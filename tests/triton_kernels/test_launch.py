"""What is launched again is not looked for again, and only where it is the same kernel. Needs no triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pipo_ray.triton_kernels.launch import Launch


class CompiledKernel:
    """A compiled kernel of Triton's, by its name."""

    def __init__(self, name: str, calls: list[tuple[Any, ...]], takes: int | None) -> None:
        self._name, self._calls, self._takes = name, calls, takes

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        assert len(grid) == 3, "a grid that is launched has three sides"

        def run(*arguments: Any) -> None:
            if self._takes is not None and len(arguments) != self._takes:
                raise TypeError(f"function takes exactly {self._takes} arguments ({len(arguments)} given)")
            self._calls.append((self._name, grid, *arguments))

        return run


class Kernel:
    """A function under `triton.jit`, which counts how often it was asked for what it is compiled to."""

    def __init__(self, takes: int | None = None, interpreted: bool = False) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.found = 0
        self._takes, self._interpreted = takes, interpreted

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., CompiledKernel | None]:
        def find(*arguments: Any, num_warps: int) -> CompiledKernel | None:
            self.found += 1
            name = f"kernel {self.found} of {num_warps} warps"
            self.calls.append((name, (*grid, 1, 1)[:3], *arguments))
            return None if self._interpreted else CompiledKernel(name, self.calls, self._takes)

        return find


def test_the_second_time_the_compiled_kernel_is_called_with_all_arguments() -> None:
    kernel, inputs = Kernel(), torch.zeros(8)
    launch = Launch(kernel, (3, 2), (7, True), num_warps=4)  # type: ignore[arg-type]
    for _ in range(3):
        launch(inputs, None)
    assert kernel.found == 1
    assert kernel.calls == 3 * [("kernel 1 of 4 warps", (3, 2, 1), inputs, None, 7, True)]


def test_what_begins_elsewhere_or_is_not_there_is_another_kernels() -> None:
    """A kernel is compiled for addresses that are multiples of 16 bytes, or are not."""
    kernel, memory = Kernel(), torch.zeros(64)
    launch = Launch(kernel, (1,), (), num_warps=4)  # type: ignore[arg-type]
    for _ in range(2):
        launch(memory, memory)
        launch(memory, memory[4:])
        launch(memory, memory[1:])
        launch(memory[1:], memory)
        launch(memory, None)
    assert kernel.found == 4
    names = [name for name, *_ in kernel.calls[5:]]
    assert names == [f"kernel {number} of 4 warps" for number in (1, 1, 2, 3, 4)]


def test_a_triton_that_takes_other_arguments_finds_its_kernel_anew() -> None:
    kernel = Kernel(takes=1)
    launch = Launch(kernel, (1,), (7,), num_warps=4)  # type: ignore[arg-type]
    for _ in range(3):
        launch(torch.zeros(1))
    assert (kernel.found, len(kernel.calls)) == (3, 3)


def test_what_is_interpreted_is_interpreted_again() -> None:
    kernel = Kernel(interpreted=True)
    launch = Launch(kernel, (1,), (7,), num_warps=4)  # type: ignore[arg-type]
    for _ in range(3):
        launch(torch.zeros(1))
    assert kernel.found == 3
