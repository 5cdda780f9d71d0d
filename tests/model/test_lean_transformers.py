"""What a run must not import, and what must work all the same. In processes of their own: imports are for ever."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import Forked

BUNDLED = Path(__file__).parents[2] / "pipo_ray" / "bundled"
BUILD = f"""
import sys
from pipo_ray.model.lean_transformers import import_transformers
import_transformers()
import pipo_ray.model.engine, torch
from pipo_ray.model.graph import build_graph, load_config
model = build_graph(load_config({str(BUNDLED)!r}), torch.float32, attention="eager", device=torch.device("cpu"))
"""
Run = Callable[[str], str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a program behind BUILD; what it says."""
    with Forked(BUILD, tmp_path_factory.mktemp("programs")) as built:

        def run(program: str) -> str:
            done = built.run(f"import sys, torch\nfrom pipo_ray.model.graph import load_config\n{program}")
            assert done.returncode == 0, done.stderr
            return done.stdout

        yield run


def test_a_graph_is_built_without_the_compiler(run: Run) -> None:
    unwanted = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.onnx", "sympy")
    assert run(f"print([name for name in {unwanted} if name in sys.modules])") == "[]\n"


def test_nor_is_it_needed_to_look_at_a_model(run: Run) -> None:
    """Torch's Python kernels for meta tensors import it, and sympy: a second before the first byte is packed."""
    program = f"""
from pipo_ray.model.inspect import find_facts
find_facts(load_config({str(BUNDLED)!r}), torch.bfloat16, {str(BUNDLED)!r})
print([name for name in ("torch._dynamo", "torch.fx.experimental.symbolic_shapes", "sympy") if name in sys.modules])
"""
    assert run(program) == "[]\n"


def test_questions_about_symbols_are_answered_by_the_real_module(run: Run) -> None:
    program = """
from pipo_ray.model.lean_transformers import without_compiler
with without_compiler():
    from torch.fx.experimental.symbolic_shapes import guard_or_false, sym_and, sym_eq
    assert guard_or_false(True) and not guard_or_false(False)
    assert sym_eq((2, 3), torch.Size([2, 3])) and not sym_eq((2, 3), (2, 4)) and sym_and(True, True)
    assert "sympy" not in sys.modules or type(sys.modules["sympy"]).__name__ == "_Algebra"
    try:
        guard_or_false("no condition")
    except AssertionError:
        print("refused")
    import sympy
    print(sympy.Integer(3) + 4, torch._dynamo.__class__.__name__)
    import torch._dynamo.utils
print(type(sys.modules["torch._dynamo"]).__name__)
"""
    assert run(program) == "refused\n7 _Compiler\nmodule\n"


def test_the_compiler_works_when_it_is_asked_for(run: Run) -> None:
    program = "print(torch.compile(lambda x: 2 * x, backend='eager')(torch.ones(1)).item(), torch._dynamo.__file__)"
    number, file = run(program).split()
    assert float(number) == 2
    assert file.endswith("__init__.py")


def test_a_package_that_imports_a_part_of_the_compiler_gets_the_real_one(run: Run) -> None:
    """As torchvision does."""
    program = """
from pipo_ray.model.lean_transformers import without_compiler
with without_compiler():
    from torch._dynamo.utils import counters
    import torch._dynamo.utils as again
assert again.counters is counters is sys.modules["torch._dynamo"].utils.counters
assert again.__spec__.origin == again.__file__
print(torch._dynamo.config.cache_size_limit > 0, not any("RealModules" in type(one).__name__ for one in sys.meta_path))
"""
    assert run(program) == "True True\n"


def test_torchvision_counts_as_absent_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    program = """
import importlib.util
from transformers.utils.import_utils import _is_package_available
import transformers.models.gemma2.modeling_gemma2
print(importlib.util.find_spec("torchvision"), bool(_is_package_available("torchvision")[0]))
"""
    done = subprocess.run([sys.executable, "-c", BUILD + program], capture_output=True, text=True, check=False)
    assert done.stdout == "None False\n", done.stderr


def test_what_a_stand_in_does_not_know_comes_from_the_real_module(run: Run) -> None:
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
