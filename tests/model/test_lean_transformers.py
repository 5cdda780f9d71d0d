"""What a run must not import, and what must work all the same. In processes of their own: imports are for ever."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BUNDLED = Path(__file__).parents[2] / "pipo_ray" / "bundled"
BUILD = f"""
import sys
from pipo_ray.model.lean_transformers import import_transformers
import_transformers()
import pipo_ray.model.engine, torch
from pipo_ray.model.graph import build_graph, load_config
model = build_graph(load_config({str(BUNDLED)!r}), torch.float32, attention="eager", device=torch.device("cpu"))
"""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", BUILD + program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_graph_is_built_without_the_compiler() -> None:
    unwanted = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.onnx", "sympy")
    assert run(f"print([name for name in {unwanted} if name in sys.modules])") == "[]\n"


def test_the_compiler_works_when_it_is_asked_for() -> None:
    program = "print(torch.compile(lambda x: 2 * x, backend='eager')(torch.ones(1)).item(), torch._dynamo.__file__)"
    number, file = run(program).split()
    assert float(number) == 2
    assert file.endswith("__init__.py")


def test_what_a_stand_in_does_not_know_comes_from_the_real_module() -> None:
    program = """
from pipo_ray.model.lean_transformers import without_compiler
with without_compiler():
    assert not hasattr(torch._dynamo, "__file__")
    assert torch._dynamo.config.cache_size_limit > 0
    assert torch._dynamo.__file__
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
import transformers.masking_utils
with transformers.masking_utils.TransformGetItemToIndex() as mode:
    print(type(mode) is TransformGetItemToIndex or mode is None)
"""
    assert run(program) == "True\n"
