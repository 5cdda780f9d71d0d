"""Every promised architecture, streamed through the fewest and smallest slots that will do, against transformers.

With PIPO_ARCH_TABLE set, the results are written to that file as JSON rows, from which the README's table is made.
"""

from __future__ import annotations

import json
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, BY_SLUG, LONGROPE_ORIGINAL_LENGTH, VOCAB_SIZE, Architecture
from harness import PackedModel, Pipeline, pack_checkpoint, random_prompts, relative_errors
from transformers import AutoModelForCausalLM

NUM_TOKENS = 64
FEWER_TOKENS = 16
KINDS = ("llama", "gemma2", "qwen3-next", "granite-hybrid", "gpt-oss")
"""At full length in the fast tests, too: a cache, windows and a soft cap, two kinds of state, sinks."""
TOLERANCE = 1e-4
BF16_FACTOR = 1.2
ROUTING_MARGIN = 0.02
QUICK = ("llama", "gemma2", "qwen3-moe")
by_slug: dict[str, Any] = {"ids": lambda architecture: architecture.slug}


@dataclass(frozen=True)
class Row:
    """A row of the README's table of supported architectures."""

    architecture: str
    model_type: str
    mode: str
    chunked_prompts: bool
    float32_max_relative_error: float


@pytest.fixture(scope="module")
def table() -> Iterator[list[Row]]:
    rows: list[Row] = []
    yield rows
    if path := os.environ.get("PIPO_ARCH_TABLE"):
        Path(path).write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[PackedModel, Any]]:
    """The architecture of that slug in float32, packed, and transformers' own model; made once, and read only."""

    @cache
    def make(slug: str) -> tuple[PackedModel, Any]:
        folder = tmp_path_factory.mktemp(slug)
        checkpoint = BY_SLUG[slug].save(folder / "checkpoint")
        packed = pack_checkpoint(checkpoint, folder / "store", torch.float32)
        return packed, reference_model(checkpoint, torch.float32)

    return make


def reference_model(folder: Path, dtype: torch.dtype) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@torch.inference_mode()
def generated(model: Any, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The prompt and transformers' greedy continuation of it, alone and unpadded."""
    ids = torch.tensor([list(prompt)])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False)
    assert output.shape == (1, len(prompt) + num_tokens)
    return output[0].tolist()


@torch.inference_mode()
def forced(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    return model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0]


def compare_float32(pipeline: Pipeline, model: Any, prompts: list[list[int]], num_tokens: int) -> float:
    """Assert the same greedy tokens, teacher-forced; the largest relative error of a position's logits."""
    sequences = [generated(model, prompt, num_tokens) for prompt in prompts]
    lengths = [len(prompt) for prompt in prompts]
    joins = [0, 2, 0, 5][: len(prompts)]
    worst = 0.0
    for tokens, length, ours in zip(sequences, lengths, pipeline.follow(sequences, lengths, joins), strict=True):
        # Each of our tokens is the reference's, given that all before are: it is the same text as without being forced.
        assert list(ours.choices[length - 1 : -1]) == tokens[length:]
        worst = max(worst, *relative_errors(ours.logits, forced(model, tokens)))
    return worst


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(one, id=one.slug, marks=() if one.slug in KINDS else pytest.mark.slow) for one in ARCHITECTURES],
)
def test_float32_is_transformers(
    architecture: Architecture, float32: Callable[[str], tuple[PackedModel, Any]], table: list[Row]
) -> None:
    check_float32(architecture, float32, table, NUM_TOKENS)


@pytest.mark.parametrize("architecture", [one for one in ARCHITECTURES if one.slug not in KINDS], **by_slug)
def test_a_little_text_in_float32_is_transformers(
    architecture: Architecture, float32: Callable[[str], tuple[PackedModel, Any]]
) -> None:
    check_float32(architecture, float32, [], FEWER_TOKENS)


def check_float32(
    architecture: Architecture, float32: Callable[[str], tuple[PackedModel, Any]], table: list[Row], num_tokens: int
) -> None:
    packed, model = float32(architecture.slug)
    assert packed.facts.ragged == architecture.ragged, packed.facts.probe_reason
    prompts = random_prompts(VOCAB_SIZE, (5, 19, 11))
    with Pipeline(packed) as pipeline:
        error = compare_float32(pipeline, model, prompts, num_tokens)
        assert pipeline.stream.times.streamed_bytes > packed.manifest.total_bytes
    mode = "shared row" if packed.facts.ragged else "one by one"
    table.append(Row(architecture.name, architecture.model_type, mode, packed.facts.chunked, error))
    assert error <= TOLERANCE


@pytest.mark.parametrize("slug", ["llama", "opt", "qwen3-next", "gpt-oss"])
@pytest.mark.parametrize(
    "slots",
    [{"spare_slots": 1, "resident_pieces": 0}, {"slot_bytes": 1 << 17, "spare_slots": 5}, {"resident_pieces": 1 << 20}],
    ids=["one-spare", "large-slots", "all-resident"],
)
def test_greedy_text_does_not_depend_on_slots(
    slug: str, slots: dict[str, int], float32: Callable[[str], tuple[PackedModel, Any]]
) -> None:
    packed, model = float32(slug)
    prompts = random_prompts(VOCAB_SIZE, (3, 14))
    with Pipeline(packed, chunk=None, **slots) as pipeline:
        texts = pipeline.greedy(prompts, 10)
    assert texts == [generated(model, prompt, 10)[len(prompt) :] for prompt in prompts]


@pytest.mark.parametrize("length", [LONGROPE_ORIGINAL_LENGTH + n for n in (-20, -2, -1, 0, 1, 9)])
def test_longrope_changes_where_transformers_changes(
    length: int, float32: Callable[[str], tuple[PackedModel, Any]]
) -> None:
    """Prompts below and above the original context, and such as cross it while decoding: the KV cache is rebuilt."""
    packed, model = float32("phi3-longrope")
    assert packed.facts.rebuild_length == LONGROPE_ORIGINAL_LENGTH
    prompts = random_prompts(VOCAB_SIZE, (length, 4), seed=length)
    with Pipeline(packed) as pipeline:
        texts = pipeline.greedy(prompts, 8)
        assert texts == [generated(model, prompt, 8)[len(prompt) :] for prompt in prompts]
        assert compare_float32(pipeline, model, prompts, 8) <= TOLERANCE


# --- below float32 ----------------------------------------------------------------------------------------------------


class RoutingRecorder:
    """The experts that each router chose, token after token, by thread: a lane is a thread of its own."""

    def __init__(self, model: Any) -> None:
        self.chosen: dict[str, dict[str, list[torch.Tensor]]] = defaultdict(lambda: defaultdict(list))
        for name, module in model.named_modules():
            if type(module).__name__.endswith("TopKRouter"):
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def record(module: Any, args: Any, output: Any) -> None:
            indices = next(part for part in output if not part.is_floating_point())
            self.chosen[threading.current_thread().name][name].append(
                indices.reshape(-1, indices.shape[-1]).sort(-1).values
            )

        return record

    def take(self) -> list[torch.Tensor]:
        """Per thread that ran, in the order of names: [tokens, layers, top k]."""
        result = [
            torch.stack([torch.cat(parts) for parts in self.chosen[thread].values()], dim=1)
            for thread in sorted(self.chosen)
        ]
        self.chosen.clear()
        return result


@dataclass
class Bf16Error:
    """`squares` and `count` of logit errors over the positions that count, and how many of `positions` those are."""

    squares: float = 0.0
    count: int = 0
    agreeing: int = 0
    positions: int = 0

    def add(self, got: torch.Tensor, exact: torch.Tensor, agrees: torch.Tensor) -> None:
        difference = (got.double() - exact.double())[agrees]
        self.squares += float(difference.square().sum())
        self.count += difference.numel()
        self.agreeing += int(agrees.sum())
        self.positions += len(agrees)

    @property
    def rms(self) -> float:
        return float((self.squares / self.count) ** 0.5)


def bf16_errors(architecture: Architecture, folder: Path, seed: int) -> tuple[Bf16Error, Bf16Error]:
    """Our error and transformers' own, of one random bf16 checkpoint."""
    checkpoint = architecture.save(folder / "checkpoint", dtype="bfloat16", seed=seed)
    sequences = random_prompts(VOCAB_SIZE, (40, 13, 60), seed=seed)
    exact, own = (reference_model(checkpoint, dtype) for dtype in (torch.float32, torch.bfloat16))
    packed = pack_checkpoint(checkpoint, folder / "store", torch.bfloat16)
    ours, theirs = Bf16Error(), Bf16Error()
    with Pipeline(packed, slot_bytes=1 << 17, spare_slots=2, chunk=16) as pipeline:
        recorders = [RoutingRecorder(model) for model in (exact, own, pipeline.model)]
        # The last ten tokens of each are decoded one by one. With experts, one sequence at a time: so their routing is
        # told apart.
        if architecture.experts:
            followed, routing = [], []
            for tokens in sequences:
                followed += pipeline.follow([tokens], [len(tokens) - 10])
                routing += recorders[2].take()
        else:
            followed = pipeline.follow(sequences, [len(tokens) - 10 for tokens in sequences])
    for index, tokens in enumerate(sequences):
        exact_logits, own_logits = forced(exact, tokens), forced(own, tokens)
        everywhere = torch.ones(len(tokens), dtype=torch.bool)
        agrees = [everywhere, everywhere]
        if architecture.experts:
            wanted, chosen = recorders[0].take()[0], recorders[1].take()[0]
            assert wanted.shape == chosen.shape == routing[index].shape
            agrees = [(other == wanted).flatten(1).all(1) for other in (routing[index], chosen)]
        ours.add(followed[index].logits, exact_logits, agrees[0])
        theirs.add(own_logits, exact_logits, agrees[1])
    return ours, theirs


def check_bf16(architecture: Architecture, folder: Path, seeds: int) -> None:
    pairs = [bf16_errors(architecture, folder / str(seed), seed) for seed in range(seeds)]
    ours, theirs = (sum(pair[side].rms for pair in pairs) / seeds for side in (0, 1))
    assert ours <= BF16_FACTOR * theirs, f"RMS error {ours:.3e}, transformers' own {theirs:.3e}"
    shares = [
        sum(pair[side].agreeing for pair in pairs) / sum(pair[side].positions for pair in pairs) for side in (0, 1)
    ]
    assert shares[0] >= shares[1] - ROUTING_MARGIN, (
        f"routing agrees at {shares[0]:.1%}, transformers' own {shares[1]:.1%}"
    )
    print(
        f"{architecture.slug}: RMS {ours / theirs:.3f} of transformers' own, routing {shares[0]:.1%} / {shares[1]:.1%}"
    )


@pytest.mark.parametrize("slug", QUICK)
def test_bf16_is_as_exact_as_transformers_quick(slug: str, tmp_path: Path) -> None:
    check_bf16(BY_SLUG[slug], tmp_path, seeds=2)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES, **by_slug)
def test_bf16_is_as_exact_as_transformers(architecture: Architecture, tmp_path: Path) -> None:
    check_bf16(architecture, tmp_path, seeds=5)
