"""Machine code: compiled, kept, run."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

import pipo_ray.compiled.machine as machine
from pipo_ray.compiled import support
from pipo_ray.compiled.ir import Function
from pipo_ray.compiled.machine import MachineCode, context_of, run_here
from pipo_ray.compiled.support import obstacle

pytest.importorskip("llvmlite")

FIELDS = ("next", "count", "output")


def counting() -> str:
    """Adds 1 to a byte for each task."""
    function = Function("counting", FIELDS)
    with function.tasks(function.place_of("next"), function.field("count")) as number:
        place = function.at(function.field("output", "ptr"), number)
        function.store("i8", function.value(f"add i8 {function.load('i8', place)}, 1"), place)
    return function.text()


def test_a_function_is_called_and_an_unknown_one_is_not_there() -> None:
    code = MachineCode(counting())
    output = torch.zeros(5000, dtype=torch.uint8)
    context = context_of([0, len(output), output.data_ptr()])
    run_here(code.address("counting"), ctypes.addressof(context))
    assert output.eq(1).all()
    with pytest.raises(KeyError, match="another"):
        code.address("another")


def test_code_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MachineCode(counting(), tmp_path / "code")
    (file,) = (tmp_path / "code").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    compiled: list[str] = []
    compile_ = machine._compile
    monkeypatch.setattr(machine, "_compile", lambda *one: compiled.append(one[2]) or compile_(*one))
    MachineCode(counting(), tmp_path / "code").address("counting")
    assert compiled == []
    MachineCode(counting().replace("counting", "other"), tmp_path / "code").address("other")
    assert len(compiled) == 1


@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "writable"])
def test_damaged_or_foreign_code_is_not_run(damage: str, tmp_path: Path) -> None:
    MachineCode(counting(), tmp_path)
    (file,) = tmp_path.iterdir()
    sound = file.read_bytes()
    if damage == "writable":
        file.chmod(0o666)
    else:
        changed = {"flipped": sound[:200] + bytes([sound[200] ^ 1]) + sound[201:], "short": sound[:-9], "empty": b""}
        file.write_bytes(changed[damage])
    assert machine._read(file) is None
    MachineCode(counting(), tmp_path).address("counting")
    assert file.read_bytes() == sound
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_folder_that_cannot_be_written_to_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    MachineCode(counting(), tmp_path / "file" / "code").address("counting")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = {"avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vnni", "avx512vbmi"}
    assert obstacle(everything) is None
    assert obstacle(everything - {"avx512_bf16"}) == "this processor has no AVX512_BF16"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert obstacle(everything) == "llvmlite is not installed"


@pytest.mark.parametrize(
    ("flags", "layouts", "small"),
    [
        ({"avx2", "fma", "f16c"}, ("avx2", "avx512"), True),
        ({"avx2", "fma"}, ("avx2",), False),
        (set(), ("plain",), False),
    ],
)
def test_what_a_processor_without_16_bit_arithmetic_multiplies(
    flags: set[str], layouts: tuple[str, ...], small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AVX2 kernels of our own, in float32, which take more layouts and smaller panels than torch's."""
    monkeypatch.setattr(support, "processor_flags", lambda: frozenset(flags))
    monkeypatch.setattr(support, "machine_layout", lambda: layouts[0])
    found, reason = support.low_bit_support()
    assert found == layouts
    assert (reason is None) == small
    assert small or "this processor has no AVX512" in str(reason)
    assert (support.machine_panel_bytes() < 2 << 20) == small
    monkeypatch.setattr(support, "compiler_obstacle", lambda: "llvmlite is not installed")
    found, reason = support.low_bit_support()
    assert found == layouts[:1]
    assert (reason == "llvmlite is not installed") == small
