"""Tokens from logits: transformers' distributions, independent rows, and random numbers that repeat."""

from __future__ import annotations

import dataclasses
import math
import pickle
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pipo_ray.errors import PipoError
from pipo_ray.model import cpu_draws, draws, sampling
from pipo_ray.model.sampling import SequenceSampling, fresh_seed, sample_tokens, uniform
from pipo_ray.model.sampling_memory import (
    DRAWING_BYTES,
    GREEDY_BYTES,
    SORTING_BYTES,
    rows_at_once,
    sampling_bytes,
)
from pipo_ray.model.scores import process_logits
from pipo_ray.model.seen_tokens import SeenTokens
from pipo_ray.model.weight_unit import unit
from pipo_ray.params import SamplingParams

VOCAB = 37  # odd, so that rows of a batch are aligned differently


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def sequence(
    prompt: Any = (1, 2), generated: Any = (), seed: int = 0, eos: Any = (), **params: Any
) -> SequenceSampling:
    return SequenceSampling(SamplingParams(**params), seed, list(prompt), list(generated), eos_token_ids=eos)


def chi_square_is_small(observed: torch.Tensor, expected: torch.Tensor, draws: int) -> bool:
    """Whether counts follow the probabilities: mean + 5 standard deviations of the chi-square distribution."""
    assert observed[expected == 0].sum() == 0
    keep = expected > 0
    statistic = ((observed - expected * draws) ** 2 / (expected * draws))[keep].sum().item()
    freedom = int(keep.sum()) - 1
    return statistic <= freedom + 5 * math.sqrt(2 * freedom)


# --- what is drawn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params, warpers",
    [
        ({}, []),
        ({"temperature": 0.7}, [TemperatureLogitsWarper(0.7)]),
        ({"top_k": 4}, [TopKLogitsWarper(4)]),
        ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.5, "min_p": 0.05, "top_k": 6, "top_p": 0.9},
            [TemperatureLogitsWarper(1.5), MinPLogitsWarper(0.05), TopKLogitsWarper(6), TopPLogitsWarper(0.9)],
        ),
        ({"repetition_penalty": 1.7}, [RepetitionPenaltyLogitsProcessor(1.7)]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_draws_follow_the_distribution_of_transformers(params: dict[str, Any], warpers: list[Any]) -> None:
    logits, draws = random_logits(1, vocab=11, scale=1.0), 3000
    scores = logits.clone()
    for warper in warpers:
        scores = warper(torch.tensor([[1, 2]]), scores)
    expected = scores.softmax(-1)[0].double()
    sequences = [sequence(seed=seed, **params) for seed in range(draws)]
    tokens = [sampled.token_id for sampled in sample_tokens(logits.expand(draws, -1), sequences)]
    assert chi_square_is_small(torch.bincount(torch.tensor(tokens), minlength=11).double(), expected, draws)


def test_draws_over_t_follow_the_distribution() -> None:
    logits, draws = random_logits(1, vocab=11, scale=1.0), 3000
    sequences = [sequence(generated=[0] * t, seed=5) for t in range(draws)]
    tokens = [sampled.token_id for sampled in sample_tokens(logits.expand(draws, -1), sequences)]
    counts = torch.bincount(torch.tensor(tokens), minlength=11).double()
    assert chi_square_is_small(counts, logits.softmax(-1)[0].double(), draws)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB, initializer_range=0.3, eos_token_id=None, pad_token_id=0, **sizes)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.3, 0.7])
def test_greedy_tokens_of_generate(model: LlamaForCausalLM, repetition_penalty: float) -> None:
    prompt = [3, 14, 15, 9]
    reference = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=20, repetition_penalty=repetition_penalty
    )[0, len(prompt) :].tolist()
    generated: list[int] = []
    while len(generated) < 20:
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + generated])).logits[0, -1:]
        state = sequence(prompt, generated, temperature=0, repetition_penalty=repetition_penalty)
        generated.append(sample_tokens(logits, [state])[0].token_id)
    assert generated == reference


def test_random_tokens_of_generate(model: LlamaForCausalLM) -> None:
    """Two samples of one distribution: generate's multinomial, and ours."""
    prompt, draws = torch.tensor([[3, 14, 15, 9]]), 4000
    torch.manual_seed(1)
    theirs = model.generate(
        prompt, do_sample=True, max_new_tokens=1, num_return_sequences=draws, temperature=1.4, top_k=8, top_p=0.9
    )[:, -1]
    with torch.inference_mode():
        logits = model(prompt).logits[0, -1:]
    sequences = [sequence(seed=seed, temperature=1.4, top_k=8, top_p=0.9) for seed in range(draws)]
    ours = torch.tensor([s.token_id for s in sample_tokens(logits.expand(draws, -1), sequences)])
    a, b = (torch.bincount(x, minlength=VOCAB).double() for x in (theirs, ours))
    seen = a + b > 0
    freedom = int(seen.sum()) - 1
    assert freedom >= 2
    assert ((a - b) ** 2 / (a + b))[seen].sum() <= freedom + 5 * math.sqrt(2 * freedom)


# --- what is left to draw from ----------------------------------------------------------------------------------------


# The machine with the GPU has no hypothesis, so the cases of this file are drawn with a seed each.


def weights_of(scores: torch.Tensor) -> torch.Tensor:
    return draws.whole(draws.scaled(scores, scores.amax(-1, keepdim=True)))


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_top_p_keeps_what_transformers_keeps(scale: float) -> None:
    for seed in range(60):
        top_p = [random.Random(seed + row).uniform(0.001, 0.999) for row in range(3)]
        logits = random_logits(3, seed, scale=scale)
        weights = weights_of(logits)
        kept = draws.keep_top_p(draws.scaled(logits, logits.amax(-1, keepdim=True)), top_p)
        for row in range(3):
            theirs = TopPLogitsWarper(top_p[row])(torch.LongTensor(), logits[row : row + 1].double())[0] > -math.inf
            assert torch.equal(kept[row] > 0, theirs & (weights[row] > 0)), (seed, top_p)
            places = cpu_draws.top_p_places(weights[row].numpy(), top_p[row])
            assert places.tolist() == kept[row].nonzero().flatten().tolist()
        assert torch.equal(kept[kept > 0], weights[kept > 0])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_top_p_with_equal_weights(device: str) -> None:
    """The definition itself: largest first, the lower id among equals, until top_p is reached."""
    for seed in range(200):
        draw = random.Random(seed)
        values = [draw.randint(0, 3) for _ in range(draw.randint(1, 20))] + [1]
        top_p = draw.choice([0.25, 0.5, 0.75, draw.uniform(0.001, 0.999)])
        weights = [value << 50 for value in values]
        expected, reached = [0] * len(values), 0
        for token in sorted(range(len(values)), key=lambda token: (-weights[token], token)):
            if reached < math.ceil(float(sum(weights)) * top_p):
                expected[token] = weights[token]
            reached += weights[token]
        kept = draws.keep_top_p(torch.tensor([weights], dtype=torch.float32, device=device), [top_p])
        assert kept.tolist() == [expected], (values, top_p)
        places = cpu_draws.top_p_places(np.array(weights), top_p)
        assert places.tolist() == [token for token, weight in enumerate(expected) if weight]


def test_top_k_and_min_p_are_transformers() -> None:
    unused = torch.LongTensor()
    for seed in range(60):
        draw = random.Random(seed)
        top_k, min_p, temperature = draw.randint(1, VOCAB + 3), draw.random(), draw.uniform(0.1, 3.0)
        logits = random_logits(1, seed)
        divided = TemperatureLogitsWarper(temperature)(unused, logits)
        expected = TopKLogitsWarper(top_k)(unused, MinPLogitsWarper(min_p)(unused, divided)) > -math.inf
        state = sequence(temperature=temperature, min_p=min_p, top_k=top_k)
        scores = process_logits(logits, [state])
        assert torch.equal(scores, divided)
        scaled = draws.scaled(scores, scores.amax(-1, keepdim=True))
        weights = draws.whole(scaled)
        left = draws.cut(scaled.clone(), scores, [state.params])
        assert torch.equal(left, torch.where(expected, weights, 0)), seed
        ids, rest = cpu_draws.cut(weights[0].numpy(), scores[0].numpy(), scaled[0].numpy(), state.params)
        ids = np.arange(VOCAB) if ids is None else ids
        assert ids.tolist() == expected[0].nonzero().flatten().tolist()
        assert rest.tolist() == left[0, ids].tolist()


def test_the_weights_of_a_vocabulary_fit_in_64_bits() -> None:
    for vocab_size in (1, 2, 3, 37, 32_000, 128_256, 262_144, 262_145):
        for weights in (
            draws.whole(draws.scaled(torch.zeros(1, vocab_size), torch.zeros(1, 1))).numpy()[0],
            cpu_draws.whole(cpu_draws.scaled(np.zeros(vocab_size, np.float32), np.float32(0))),
        ):
            assert set(weights.tolist()) == {unit(vocab_size)}
            assert 2**61 < int(weights.sum()) <= 2**62


def test_of_equal_logits_the_lower_ids_are_the_most_probable() -> None:
    for seed in range(60):
        draw = random.Random(seed)
        rows = random_logits(3, seed, vocab=draw.choice([20, VOCAB, 9000])).round()
        rows *= draw.choice([1.0, -0.0, 1e-38, 1e38])
        rows[1, ::2] *= -1
        found = draws.most_probable(rows, 20).tolist()
        for row, ids in zip(rows, found, strict=True):
            values = row.tolist()
            assert ids == sorted(range(len(values)), key=lambda token: (-values[token], token))[:20]
            assert cpu_draws.most_probable(row.numpy(), 20).tolist() == ids


def test_presence_and_frequency_penalties_are_openai_s() -> None:
    logits = random_logits(1)
    state = sequence([1, 2], [4, 4, 4, 9], temperature=0, presence_penalty=0.5, frequency_penalty=-0.25)
    change = (process_logits(logits, [state]) - logits)[0]
    expected = torch.zeros(VOCAB)
    expected[4], expected[9] = 3 * 0.25 - 0.5, 0.25 - 0.5
    torch.testing.assert_close(change, expected, atol=1e-5, rtol=0)


def test_logit_bias_decides() -> None:
    logits = random_logits(1)
    last = int(logits.argmin())
    (sampled,) = sample_tokens(logits, [sequence(temperature=0, logit_bias={last: 100})])
    assert sampled.token_id == last
    assert sampled.logprob == pytest.approx(logits.log_softmax(-1)[0, last].item(), abs=1e-5)


@pytest.mark.parametrize("temperature", [0, 1])
def test_min_tokens_suppress_the_end(temperature: float) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [5, 6]] = 50.0
    params = {"eos": [5, 1000], "stop_token_ids": [6], "min_tokens": 2, "temperature": temperature}
    for generated, ends in (([], False), ([1], False), ([1, 1], True)):
        token = sample_tokens(logits, [sequence(generated=generated, **params)])[0].token_id
        assert (token in (5, 6)) is ends


def test_seen_tokens_are_all_tokens() -> None:
    for seed in range(60):
        draw = random.Random(seed)
        prompt, generated = ([draw.randrange(9) for _ in range(draw.randint(1, 12))] for _ in range(2))
        seen = SeenTokens(prompt)
        for end in sorted(draw.choices(range(len(generated) + 1), k=3)):
            seen.follow(generated[:end])
            assert sorted(seen.distinct()) == sorted({*prompt, *generated[:end]})
            ids, counts = seen.generated()
            assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == Counter(generated[:end])


@pytest.mark.parametrize("params", [{"repetition_penalty": 1.3}, {"presence_penalty": 0.5, "frequency_penalty": 0.2}])
def test_seen_tokens_that_are_kept_change_nothing(params: dict[str, Any]) -> None:
    prompt, generated = [1, 2, 99], [4, 4, 1, 7, 4, 98]
    kept = SeenTokens(prompt)
    for end in range(len(generated) + 1):
        logits = random_logits(1, end)
        state = sequence(prompt, generated[:end], **params)
        expected = process_logits(logits, [state])
        assert torch.equal(process_logits(logits, [dataclasses.replace(state, seen=kept)]), expected)


def test_penalties_apply_to_greedy() -> None:
    logits = torch.tensor([[1.0, 1.5, 1.4]])
    assert sample_tokens(logits, [sequence([0], [1], temperature=0, presence_penalty=0.5)])[0].token_id == 2


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.zeros(3, 1000)
    logits[0, [7, 700]] = 1.0
    logits[1, 999] = 1.0
    for params in ({}, {"presence_penalty": 0.1}):
        states = [sequence(generated=[1], temperature=0, **params)] * 3
        assert [sampled.token_id for sampled in sample_tokens(logits, states)] == [7, 999, 0]


# --- log probabilities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 1.3, "top_k": 5}, {"repetition_penalty": 1.5}])
@pytest.mark.parametrize("k", [0, 1, 5, VOCAB + 1])
def test_logprobs_are_of_the_raw_distribution(params: dict[str, Any], k: int) -> None:
    logits = random_logits(4)
    for row, sampled in enumerate(sample_tokens(logits, [sequence(logprobs=k, **params)] * 4)):
        reference = logits[row].double().log_softmax(-1)
        order = reference.argsort(descending=True).tolist()
        assert sampled.logprob == pytest.approx(reference[sampled.token_id].item(), abs=1e-5)
        expected = [sampled.token_id, *(token for token in order[:k] if token != sampled.token_id)]
        assert [token for token, _, _ in sampled.top_logprobs] == expected
        for token, logprob, rank in sampled.top_logprobs:
            assert logprob == pytest.approx(reference[token].item(), abs=1e-5)
            assert rank == order.index(token) + 1
    assert sample_tokens(logits[:1], [sequence()])[0].top_logprobs == ()


def test_ranks_of_equals_differ() -> None:
    (sampled,) = sample_tokens(torch.zeros(1, 8), [sequence(logprobs=3, seed=3)])
    ranks = [rank for _, _, rank in sampled.top_logprobs]
    assert len(set(ranks)) == len(ranks)
    assert sorted(ranks)[:3] == [1, 2, 3]


# --- rows do not touch each other, and what repeats -------------------------------------------------------------------

CHOICES: dict[str, list[Any]] = {
    "temperature": [0, 0.3, 1, 2],
    "top_p": [1.0, 0.9, 0.3],
    "top_k": [0, 1, 7],
    "min_p": [0.0, 0.1],
    "repetition_penalty": [1.0, 1.3],
    "presence_penalty": [0.0, 0.5],
    "logprobs": [None, 0, 4],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    for seed in range(40):
        draw = random.Random(seed)
        states = []
        for _ in range(draw.randint(2, 6)):
            params = {name: draw.choice(values) for name, values in CHOICES.items()}
            generated = draw.choices(range(VOCAB), k=draw.randint(0, 5))
            states.append(sequence([1], generated, draw.randint(0, 50), **params))
        logits = random_logits(len(states), seed).to(dtype)
        before = logits.clone()
        together = sample_tokens(logits, states)
        assert torch.equal(logits, before)
        assert together == [sample_tokens(logits[row : row + 1], [state])[0] for row, state in enumerate(states)]
        assert together[::-1] == sample_tokens(logits.flip(0), states[::-1])
        assert together == sample_tokens(logits[:1], states[:1]) + sample_tokens(logits[1:], states[1:])


def mixed_states(rows: int) -> list[SequenceSampling]:
    draw = random.Random(3)
    states = []
    for row in range(rows):
        params = {name: draw.choice(values) for name, values in CHOICES.items()}
        if draw.random() < 0.3:
            params |= {"logit_bias": {draw.randrange(VOCAB): draw.uniform(-5, 5)}, "min_tokens": draw.randrange(8)}
        states.append(sequence([1, 99], draw.choices(range(VOCAB), k=draw.randint(0, 5)), row, eos=[2, 99], **params))
    return states


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("most", [1, 3, 100])
def test_rows_at_once_are_the_rows_one_by_one(device: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's way of sampling, on the CPU as well: whatever it takes at once, a row gives what the CPU's way gives."""
    monkeypatch.setattr(sampling, "rows_at_once", lambda vocab_size, bytes_per_logit: most)
    states = mixed_states(120)
    logits = random_logits(len(states), 1).bfloat16()
    sizes = [len(rows) for rows in sampling._groups(states, VOCAB)]
    assert max(sizes) == min(most, 20)
    together = sampling._sample_groups(list(logits.to(device)), states)
    for row, state in enumerate(states):
        (alone,) = sampling._sample_groups([logits[row].to(device)], [state])
        assert together[row] == alone
        assert sampling._sample_row(logits[row], state) == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize("vocab_size", [VOCAB, 32_000, 262_144, 10_000_000])
@pytest.mark.parametrize("bytes_per_logit", [GREEDY_BYTES, DRAWING_BYTES, SORTING_BYTES])
def test_rows_at_once_take_what_is_planned_for(vocab_size: int, bytes_per_logit: int) -> None:
    rows = rows_at_once(vocab_size, bytes_per_logit)
    assert rows >= 1
    for num_rows in (1, 3, rows, 2 * rows):
        used = min(rows, num_rows) * vocab_size * bytes_per_logit
        assert used <= sampling_bytes(vocab_size, num_rows) <= max(64 * vocab_size, 32 << 20)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {"temperature": 0.8}, {"top_p": 0.9}, {"top_k": 9}, {"logprobs": 5}]
)
def test_cuda_takes_no_more_memory_than_is_planned_for(params: dict[str, Any]) -> None:
    logits = random_logits(16, vocab=128_256).bfloat16().cuda()
    states = [sequence(generated=[1, 2], seed=row, presence_penalty=0.1, **params) for row in range(16)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sample_tokens(logits, states)
    assert torch.cuda.max_memory_allocated() - before <= sampling_bytes(128_256, 16)


def test_a_row_of_a_real_vocabulary_does_not_depend_on_the_others() -> None:
    logits = random_logits(5, vocab=100_003)
    kinds = [{"temperature": 0}, {}, {"top_p": 0.9}, {"top_k": 50}, {"temperature": 0, "repetition_penalty": 1.2}]
    states = [sequence(seed=row, logprobs=5, **kind) for row, kind in enumerate(kinds)]
    together = sample_tokens(logits, states)
    assert together == [sample_tokens(logits[row : row + 1], [state])[0] for row, state in enumerate(states)]


def test_the_random_number_depends_on_seed_sample_and_t() -> None:
    assert uniform(7, 0) == uniform(7, 0, 0) == 0.7584968808564502
    keys = [(seed, t, sample) for seed in (0, 1, -5, 2**64 - 1) for t in range(20) for sample in range(3)]
    numbers = {uniform(*key) for key in keys}
    assert len(numbers) == len(keys)
    assert all(0 <= number < 1 for number in numbers)


def test_samples_of_a_request_differ_and_repeat() -> None:
    logits = torch.zeros(8, 1000)
    states = [dataclasses.replace(sequence(seed=3), sample_index=index) for index in range(8)]
    tokens = [sampled.token_id for sampled in sample_tokens(logits, states)]
    assert len(set(tokens)) > 6
    assert tokens == [sampled.token_id for sampled in sample_tokens(logits, pickle.loads(pickle.dumps(states)))]


def test_fresh_seeds_are_accepted_and_differ() -> None:
    seeds = {fresh_seed() for _ in range(100)}
    assert len(seeds) == 100
    assert all(SamplingParams(seed=seed).seed == seed for seed in seeds)


# --- what can go wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_p": 0.5}, {"top_k": 3, "min_p": 0.1}])
def test_numbers_that_are_none_are_reported(bad: float, params: dict[str, Any]) -> None:
    logits = random_logits(3)
    logits[1, 5] = bad
    with pytest.raises(PipoError, match="row 1 of the logits"):
        sample_tokens(logits, [sequence(**params)] * 3)


@pytest.mark.parametrize("temperature", [0, 1])
def test_nothing_left_to_choose_is_reported(temperature: float) -> None:
    with pytest.raises(PipoError, match="no token that may be chosen"):
        sample_tokens(torch.zeros(1, 2), [sequence(eos=[0, 1], min_tokens=1, temperature=temperature)])


def test_masked_logits_are_never_chosen() -> None:
    logits = torch.full((200, 9), -math.inf)
    logits[:, [2, 8]] = 0.0
    sampled = sample_tokens(logits, [sequence(seed=seed, logprobs=4) for seed in range(200)])
    assert {s.token_id for s in sampled} == {2, 8}
    assert sampled[0].logprob == pytest.approx(-math.log(2))


@pytest.mark.parametrize(
    "params", [{"temperature": 1e-5}, {"temperature": 1e30}, {"top_p": 1e-300}, {"top_p": 1 - 1e-16}]
)
def test_extreme_parameters(params: dict[str, Any]) -> None:
    logits = random_logits(4, scale=100.0)
    tokens = [sampled.token_id for sampled in sample_tokens(logits, [sequence(**params)] * 4)]
    assert "temperature" not in params or params["temperature"] > 1 or tokens == logits.argmax(-1).tolist()


def test_no_rows() -> None:
    assert sample_tokens(torch.empty(0, VOCAB), []) == []
    with pytest.raises(ValueError, match="for 1 sequences"):
        sample_tokens(torch.zeros(2, VOCAB), [sequence()])


@pytest.mark.gpu
def test_cuda_chooses_the_same_tokens_and_waits_once() -> None:
    logits = random_logits(6, vocab=128_256)
    kinds = [{"temperature": 0}, {}, {"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.05}, {"presence_penalty": 1.0}]
    states = [sequence(generated=[1, 2], seed=row, logprobs=5, **kind) for row, kind in enumerate(kinds)]
    expected = sample_tokens(logits, states)
    on_device = logits.cuda()
    assert [s.token_id for s in sample_tokens(on_device, states)] == [s.token_id for s in expected]
    assert sample_tokens(on_device, states) == [sample_tokens(on_device[i : i + 1], [states[i]])[0] for i in range(6)]
    import warnings

    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sample_tokens(on_device, states)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([warning for warning in caught if "synchroniz" in str(warning.message)]) == 1
