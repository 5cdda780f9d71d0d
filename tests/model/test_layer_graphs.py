"""Layers as graphs: same logits in every kind of sweep, and modules wherever graphs won't do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import BY_SLUG
from fake_graph import FakeGraphs
from harness import Followed, PackedModel, Pipeline, pack_checkpoint, random_prompts, relative_errors

from pipo_ray.model.captured_layer import CapturedLayer, Places
from pipo_ray.model.layer_graphs import SIZES

PROMPT_LENGTHS = (3, 9, 6)
LENGTHS = (30, 24, 18)
JOINS = (0, 2, 9)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    return packed("llama", tmp_path_factory.mktemp("llama"))


def packed(slug: str, folder: Path) -> PackedModel:
    BY_SLUG[slug].save(folder / "checkpoint")
    return pack_checkpoint(folder / "checkpoint", folder / "store", torch.float32)


def follow(model: PackedModel, graphs: FakeGraphs | None, kv_pool: int | None = 120) -> tuple[list[Followed], int]:
    """Logits of sequences that come and go, and how many sweeps were computed by graphs alone."""
    sequences = random_prompts(model.facts.vocab_size, LENGTHS)
    with Pipeline(model, resident_pieces=None, kv_pool=kv_pool, graphs=graphs) as pipeline:
        found = pipeline.follow(sequences, PROMPT_LENGTHS, JOINS)
        return found, 0 if pipeline.graphs is None else pipeline.graphs.sweeps


def same(found: list[Followed], wanted: list[Followed]) -> bool:
    return all(
        max(relative_errors(ours.logits, theirs.logits)) <= 1e-5 for ours, theirs in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("slug", ["llama", "gemma2", "opt", "qwen3"])
@pytest.mark.parametrize("kv_pool", [120, None])
def test_logits_are_the_modules(slug: str, kv_pool: int | None, tmp_path: Path) -> None:
    model, graphs = packed(slug, tmp_path), FakeGraphs()
    wanted, _ = follow(model, None, kv_pool)
    found, sweeps = follow(model, graphs, kv_pool)
    assert same(found, wanted)
    assert sweeps >= 8
    layers = model.facts.num_layers
    assert graphs.captured % (2 * layers) == 0, "attention cuts a layer in two"
    assert graphs.replayed >= 2 * layers * sweeps


def test_a_layer_that_asks_the_device_stays_a_module(tmp_path: Path) -> None:
    """A router of experts, which does so behind attention; that must run once all the same."""
    model, graphs = packed("mixtral", tmp_path), FakeGraphs()
    assert same(follow(model, graphs)[0], follow(model, None)[0])
    assert graphs.captured == 0


def test_a_layer_that_cannot_be_captured_stays_a_module(llama: PackedModel) -> None:
    graphs = FakeGraphs(refused=("aten::silu",))
    assert same(follow(llama, graphs)[0], follow(llama, None)[0])
    assert graphs.captured == llama.facts.num_layers, "up to attention, and not behind it"
    assert graphs.replayed == 0


class CompilationError(Exception):
    """As a compiler raises it."""


def test_what_a_compiler_raises_in_a_capture_closes_it(llama: PackedModel) -> None:
    graphs = FakeGraphs()
    prompts = random_prompts(llama.facts.vocab_size, (5,) * 5)
    with Pipeline(llama, resident_pieces=None, kv_pool=100) as pipeline:
        wanted = pipeline.greedy(prompts, 6)
    with Pipeline(llama, resident_pieces=None, kv_pool=100, graphs=graphs) as pipeline:
        pipeline.model.model.layers[1].mlp.register_forward_pre_hook(fail_in(graphs, CompilationError("no")))
        assert pipeline.greedy(prompts, 6) == wanted
        assert graphs.open == 0
        assert graphs.captured > 0


def test_ctrl_c_in_a_capture_closes_it(llama: PackedModel) -> None:
    graphs = FakeGraphs()
    prompts = random_prompts(llama.facts.vocab_size, (5,))
    with Pipeline(llama, resident_pieces=None, kv_pool=100, graphs=graphs) as pipeline:
        handle = pipeline.model.model.layers[1].mlp.register_forward_pre_hook(fail_in(graphs, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            pipeline.greedy(prompts, 20)
        handle.remove()
        assert graphs.open == 0
        assert graphs.closed
        assert len(pipeline.greedy(prompts, 20)[0]) == 20


def fail_in(graphs: FakeGraphs, error: BaseException) -> Callable[..., None]:
    """A hook that raises `error` in a capture."""

    def hook(*_: object) -> None:
        if graphs.open:
            raise error

    return hook


def test_kernels_of_a_size_run_before_they_are_captured(llama: PackedModel) -> None:
    """Five tokens take the graphs of six: what is compiled for six must not be for the first time in a capture."""
    graphs, seen = FakeGraphs(), set[int]()
    prompts = random_prompts(llama.facts.vocab_size, (1,) * 5)

    def hook(module: object, given: tuple[torch.Tensor, ...]) -> None:
        rows = given[0].shape[1]
        assert rows in seen or not graphs.open
        seen.add(rows)

    with Pipeline(llama, resident_pieces=None, kv_pool=100, graphs=graphs) as pipeline:
        pipeline.model.model.layers[1].mlp.register_forward_pre_hook(hook)
        pipeline.greedy(prompts, 6)
    assert graphs.captured
    assert seen == {5, 6}


def test_arguments_that_cannot_be_compared_are_other_ones() -> None:
    given = {0: torch.ones(1, 1, 8), "more": {"mask": torch.ones(3)}}
    inputs, constants = {(0, None): Places(torch.ones(1, 1, 8), 1)}, {("more", None): {"mask": torch.ones(3)}}
    assert not CapturedLayer([], inputs, constants, Places(torch.ones(1, 1, 8), 1)).takes(given, 1)
    assert CapturedLayer([], inputs, {("more", None): None}, inputs[0, None]).takes({**given, "more": None}, 1)


def test_graphs_that_compute_something_else_are_not_used(llama: PackedModel, caplog: pytest.LogCaptureFixture) -> None:
    graphs = FakeGraphs()
    graphs.error = 0.1
    found, sweeps = follow(llama, graphs)
    assert same(found, follow(llama, None)[0])
    assert sweeps == 0
    assert graphs.closed
    assert "no graphs: they are off by" in caplog.text


def test_places_that_no_token_has_change_nothing(llama: PackedModel) -> None:
    """Five sequences take the graphs of six; then they end one by one."""
    sequences = random_prompts(llama.facts.vocab_size, (40, 36, 32, 28, 24))
    found = []
    for graphs in (FakeGraphs(), None):
        with Pipeline(llama, resident_pieces=None, kv_pool=200, graphs=graphs) as pipeline:
            found.append(pipeline.follow(sequences, (4, 4, 4, 4, 4)))
            if pipeline.graphs is not None:
                assert pipeline.graphs.sweeps >= 20
    assert same(*found)


def test_where_there_is_room_for_few_tokens_only(llama: PackedModel) -> None:
    """Of one sequence, and not of twelve."""
    layers, hidden = llama.facts.num_layers, llama.facts.hidden_size
    graphs = FakeGraphs(room_bytes=(96 << 20) + 11 * 10 * 4 * hidden * layers)
    prompts = random_prompts(llama.facts.vocab_size, (4,) * 12)
    with Pipeline(llama, resident_pieces=None, kv_pool=300, graphs=graphs) as pipeline:
        assert pipeline.graphs is not None
        pipeline.greedy(prompts, 6)
        assert graphs.captured == 0
        pipeline.greedy(prompts[:1], 6)
        assert graphs.captured == 2 * layers
        before = pipeline.graphs.sweeps
        pipeline.greedy(prompts, 6)
        pipeline.greedy(prompts[:1], 6)
        assert pipeline.graphs.sweeps > before


def test_without_room_there_are_none(llama: PackedModel) -> None:
    graphs = FakeGraphs(room_bytes=1 << 20)
    assert same(follow(llama, graphs)[0], follow(llama, None)[0])
    assert graphs.captured == 0


def test_graphs_that_took_more_than_there_is_go(llama: PackedModel) -> None:
    graphs = FakeGraphs(room_bytes=200 << 20)
    graphs.taken_bytes = 300 << 20
    found, sweeps = follow(llama, graphs)
    assert same(found, follow(llama, None)[0])
    assert graphs.closed
    assert sweeps == 0


def test_long_prompts_are_computed_by_modules(llama: PackedModel) -> None:
    graphs = FakeGraphs()
    prompts = random_prompts(llama.facts.vocab_size, (SIZES[-1] + 1,) * 3)
    with Pipeline(llama, resident_pieces=None, kv_pool=300, chunk=None, graphs=graphs) as pipeline:
        for prompt in prompts:
            pipeline.greedy([prompt], 1)
    assert graphs.captured == 0


def test_behind_a_sweep_that_failed_graphs_are_captured_anew(llama: PackedModel) -> None:
    graphs = FakeGraphs()
    prompts = random_prompts(llama.facts.vocab_size, (5,))
    with Pipeline(llama, resident_pieces=None, kv_pool=100, graphs=graphs) as pipeline:
        wanted = pipeline.greedy(prompts, 20)
        assert pipeline.graphs is not None
        before, captured = pipeline.graphs.sweeps, graphs.captured
        assert before > 10
        handle = pipeline.model.lm_head.register_forward_pre_hook(_fail)
        with pytest.raises(ValueError, match="on purpose"):
            pipeline.greedy(prompts, 2)
        handle.remove()
        assert graphs.closed
        assert pipeline.greedy(prompts, 20) == wanted
        assert pipeline.graphs.sweeps > before + 10
        assert graphs.captured == 2 * captured


def _fail(*_: object) -> None:
    raise ValueError("on purpose")
