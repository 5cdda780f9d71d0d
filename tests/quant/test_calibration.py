"""The model that is run for calibration is the original: transformers' own logits, whatever the architecture."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, BY_SLUG, VOCAB_SIZE
from harness import random_prompts
from transformers import AutoModelForCausalLM

from pipo_ray.errors import BudgetError
from pipo_ray.model import lockstep
from pipo_ray.model.blocks import TensorSpec
from pipo_ray.model.graph import load_config, resolve_dtype
from pipo_ray.model.inspect import find_facts
from pipo_ray.quant.calibration import CalibrationModel
from pipo_ray.store.checkpoint import Checkpoint

QUICK = ("llama", "qwen3-moe", "qwen3-next")
LENGTHS = (9, 21, 14)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[CalibrationModel]:
    config = load_config(folder)
    _, _, facts = find_facts(config, resolve_dtype("auto", config), folder)
    with (
        Checkpoint.open(folder) as checkpoint,
        CalibrationModel(checkpoint, config, facts, num_threads=1, **options) as model,
    ):
        yield model


def reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.inference_mode()
def logits_of(model: Any, windows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    return [model(input_ids=torch.tensor([list(window)]), use_cache=False).logits[0] for window in windows]


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "slug", [a.slug if a.slug in QUICK else pytest.param(a.slug, marks=pytest.mark.slow) for a in ARCHITECTURES]
)
def test_logits_are_those_of_transformers(slug: str, tmp_path: Path) -> None:
    folder = BY_SLUG[slug].save(tmp_path, dtype="bfloat16")
    windows = random_prompts(VOCAB_SIZE, LENGTHS)
    expected = logits_of(reference(folder), windows)
    with opened(folder) as model:
        seen: list[tuple[int, int]] = []
        for got in (list(model.logits(windows, progress=lambda *at: seen.append(at))) for _ in range(2)):
            assert [len(one) for one in got] == list(LENGTHS)
            assert max(map(difference, got, expected)) < 1e-5
        assert seen[-1] == (len(model.blocks), len(model.blocks))


@pytest.mark.parametrize(
    "slug", ["llama-tied", "qwen3-moe", *(pytest.param(slug, marks=pytest.mark.slow) for slug in ("llama", "gpt-oss"))]
)
def test_every_matrix_is_observed_once_and_what_is_given_goes_on(slug: str, tmp_path: Path) -> None:
    folder = BY_SLUG[slug].save(tmp_path)
    windows = random_prompts(VOCAB_SIZE, LENGTHS)
    inputs: dict[tuple[str, int | None], torch.Tensor] = {}

    def observe(spec: TensorSpec, parts: Sequence[torch.Tensor], weight: torch.Tensor) -> torch.Tensor | None:
        assert (spec.name, spec.expert) not in inputs
        assert tuple(weight.shape) == spec.shape
        inputs[spec.name, spec.expert] = torch.cat(list(parts))
        return 1.25 * weight if spec.name.endswith("down_proj.weight") or spec.expert == 1 else None

    with opened(folder) as model:
        model.run(windows, observe)
        changed = reference(folder)
        for name, parameter in changed.named_parameters():
            if (name, None) in inputs and name.endswith("down_proj.weight"):
                parameter.data *= 1.25
            elif (name, 1) in inputs:
                parameter.data[1] *= 1.25
        wanted: dict[str, list[torch.Tensor]] = {}
        for name, module in changed.named_modules():
            if type(module) is torch.nn.Linear:
                weight = "model.embed_tokens.weight" if slug == "llama-tied" and name == "lm_head" else f"{name}.weight"
                module.register_forward_pre_hook(
                    lambda _, args, weight=weight: wanted.setdefault(weight, []).append(args[0][0])
                )
        logits = logits_of(changed, windows)
        assert wanted.keys() == {name for name, expert in inputs if expert is None}
        for name, parts in wanted.items():
            assert difference(inputs[name, None], torch.cat(parts)) < 1e-5, name
        experts = {name for name, expert in inputs if expert is not None}
        assert bool(experts) == (slug == "qwen3-moe")
        if experts:
            tokens = {key: len(rows) for key, rows in inputs.items() if key[1] is not None}
            assert sum(tokens.values()) == len(experts) * sum(LENGTHS) * 2  # each token goes to two experts

        def change(spec: TensorSpec, weight: torch.Tensor) -> torch.Tensor:
            return 1.25 * weight if spec.name.endswith("down_proj.weight") or spec.expert == 1 else weight

        assert max(map(difference, model.logits(windows, change), logits)) < 1e-5


def test_only_one_matrix_is_in_memory_and_all_are_let_go(tmp_path: Path) -> None:
    import weakref

    folder = BY_SLUG["qwen3-moe"].save(tmp_path)
    alive: list[weakref.ref[torch.Tensor]] = []

    def observe(spec: TensorSpec, parts: Sequence[torch.Tensor], weight: torch.Tensor) -> None:
        alive.append(weakref.ref(weight))
        assert sum(one() is not None for one in alive) <= 2

    with opened(folder) as model:
        model.run(random_prompts(VOCAB_SIZE, LENGTHS), observe)
        assert not any(one() is not None for one in alive)


def test_a_pass_that_is_given_up_ends_its_threads(tmp_path: Path) -> None:
    import threading

    folder = BY_SLUG["llama"].save(tmp_path)
    windows = random_prompts(VOCAB_SIZE, LENGTHS)

    def fail(spec: TensorSpec, weight: torch.Tensor) -> torch.Tensor:
        raise ArithmeticError(spec.name)

    with opened(folder) as model:
        before = threading.active_count()
        logits = model.logits(windows)
        first = next(iter(logits))
        logits.close()
        assert threading.active_count() == before
        with pytest.raises(ArithmeticError, match="q_proj"):
            list(model.logits(windows, fail))
        assert threading.active_count() == before
        assert difference(next(iter(model.logits(windows))), first) == 0


def test_a_budget_that_is_too_small_names_the_least(tmp_path: Path) -> None:
    folder = BY_SLUG["llama"].save(tmp_path)
    windows = random_prompts(VOCAB_SIZE, LENGTHS)
    with (
        opened(folder, memory=600 << 20) as model,
        pytest.raises(BudgetError, match=r"44 tokens .*raise --memory to 7"),
    ):
        list(model.logits(windows))


def test_a_text_that_would_fit_is_named(tmp_path: Path) -> None:
    """With as many tokens as it names the pass is within the budget, and with one more it is not."""
    with opened(BY_SLUG["llama"].save(tmp_path), memory=750 << 20) as model:
        token = model.required_bytes([[0], [0]]) - model.required_bytes([[0]])
        count = (60 << 20) // token
        model.require_memory([[0]] * 1024)
        with pytest.raises(BudgetError, match=r"raise --memory to .*, or take a text of at most \d+ tokens$") as raised:
            model.require_memory([[0]] * count)
        fitting = int(str(raised.value).split()[-2])
        assert 1024 < fitting < count
        model.require_memory([[0]] * fitting)
        with pytest.raises(BudgetError):
            model.require_memory([[0]] * (fitting + 1))
        with pytest.raises(BudgetError, match=r"a text of 1024 tokens, the shortest, takes 8\d\d"):
            model.require_memory([[0]] * count, more_bytes=100 << 20)


def test_no_more_than_two_windows_have_logits(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That which was handed out, and that which is made next: for a large vocabulary they are the most of memory."""
    storages: list[int] = []
    most = 0

    def product(*args: torch.Tensor) -> torch.Tensor:
        nonlocal most
        result = lockstep_product(*args)
        if result.shape[-1] == 509:
            storages.append(result.untyped_storage()._weak_ref())
            most = max(most, sum(not torch.UntypedStorage._expired(one) for one in storages))
        return result

    lockstep_product = lockstep._product
    monkeypatch.setattr(lockstep, "_product", product)
    with opened(tiny_checkpoint("LlamaConfig", vocab_size=509)) as model:
        for logits in model.logits(random_prompts(VOCAB_SIZE, LENGTHS)):
            time.sleep(0.05)  # the next ones are made as far as they will be
            del logits
    assert len(storages) == len(LENGTHS)
    assert most == 2
    for one in storages:
        torch.UntypedStorage._free_weak_ref(one)
