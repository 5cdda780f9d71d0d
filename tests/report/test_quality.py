"""Perplexity, divergence and agreement, against torch; and what keeps the original's logits."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pipo_ray.errors import InputError, ResourceError
from pipo_ray.report.quality import LEAST_TOKENS, LogitsFile, Quality, windows_of


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=4), st.integers(3, 40), st.integers(0, 10**6))
def test_the_figures_are_those_of_torch(lengths: list[int], vocabulary: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipo_ray.report.quality._CHUNK_ELEMENTS", 60)  # a few rows at a time
        check_figures(lengths, vocabulary, seed)


def check_figures(lengths: list[int], vocabulary: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    quality, losses, kls, same = Quality(), [], [], []
    for length in lengths:
        window = generator.integers(0, vocabulary, length).tolist()
        ours, theirs = (generator.normal(0, 3, (length, vocabulary)).astype(np.float32) for _ in range(2))
        quality.add(window, ours, theirs)
        mine, other = (F.log_softmax(torch.from_numpy(x[:-1]).double(), -1) for x in (ours, theirs))
        losses.append(F.nll_loss(mine, torch.tensor(window[1:]), reduction="none"))
        kls.append(F.kl_div(mine, other, log_target=True, reduction="none").sum(-1))
        same.append((mine.argmax(-1) == other.argmax(-1)).double())
    assert quality.count == sum(lengths) - len(lengths)
    assert quality.perplexity == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-5)
    assert quality.kl == pytest.approx(float(torch.cat(kls).mean()), rel=1e-4)
    assert quality.same_token == pytest.approx(float(torch.cat(same).mean()))


def test_a_model_is_like_itself() -> None:
    logits = np.random.default_rng(0).normal(0, 50, (9, 20)).astype(np.float32)
    quality = Quality()
    quality.add(list(range(9)), logits, logits)
    assert (quality.kl, quality.same_token) == (0.0, 1.0)


def test_windows_hold_each_token_once_behind_what_begins_a_text() -> None:
    windows = windows_of(range(100, 300), [1, 2], 50, 130)
    assert all(window[:2] == [1, 2] for window in windows)
    assert [token for window in windows for token in window[2:]] == list(range(100, 230))
    assert max(map(len, windows)) == 50


def test_a_last_token_alone_behind_nothing_is_no_window() -> None:
    assert [len(window) for window in windows_of(range(101), [], 50, 1000)] == [50, 50]


def test_a_short_text_is_refused() -> None:
    with pytest.raises(InputError, match=f"the text has 5 tokens, at least {LEAST_TOKENS}"):
        windows_of(range(5), [1], 50, 1000)


def test_logits_come_back_and_leave_no_file(tmp_path: Path) -> None:
    windows = [[1, 2, 3], [4, 5]]
    file = LogitsFile(tmp_path / "new", windows, 7)
    wanted = [np.random.default_rng(i).normal(size=(len(w), 7)).astype(np.float32) for i, w in enumerate(windows)]
    for number in (1, 0):
        file.write(number, wanted[number])
    assert all((file.read(number) == wanted[number]).all() for number in range(2))
    assert not list((tmp_path / "new").iterdir())
    file.close()


def test_a_drive_without_room_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"logits take .* in .*; take fewer tokens, or set PIPO_CACHE"):
        LogitsFile(tmp_path, [[1] * 1000] * 1000, 1 << 30)
