"""Random sequences with packed pages and a window, a new token of each, and what its attention is in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipo_ray.model.dense_attention import attend
from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.plan.attention_parts import SeenTokens, share_out
from pipo_ray.plan.kv_pages import PAGE_TOKENS
from pipo_ray.plan.low_bit_pages import SHORT_TOKENS, PageLayout
from pipo_ray.quant.kv_rounding import pack_pages, unpack_pages, views_of

_OUTLIER = 12.0


@dataclass
class RandomSequence:
    """Runs of pages, each uint8 [pages + 1, page_bytes] on the device and full of 0xFF behind the pages; windows
    [heads, room, dim] there, of which `size` - 1 tokens count; and float64 `keys`, `values` of all tokens before, and
    of keys that are packed `swings`: what a code less the middle one, 8 or 128, stands for.
    """

    runs: list[Tensor]
    windows: list[Tensor]
    size: int
    keys: Tensor
    values: Tensor
    swings: Tensor

    @property
    def num_pages(self) -> int:
        """In all runs."""
        return sum(len(run) - 1 for run in self.runs)


class RandomRow:
    """A row with a token of each sequence: `sizes` are the pages of every run, and the tokens in the window with the
    new one. The first run of a sequence is that of the first sequence, if it has as many pages. Tokens of others lie
    between them in the row.
    """

    def __init__(
        self, layout: PageLayout, group: int, dtype: torch.dtype, device: torch.device,
        sizes: Sequence[tuple[Sequence[int], int]], sharpness: float, seed: int,
    ) -> None:  # fmt: skip
        self.layout, self.device = layout, device
        self._generator = torch.Generator().manual_seed(seed)
        self._shared: dict[int, tuple[Tensor, ...]] = {}
        tokens, heads = 2 * len(sizes) + 1, layout.heads
        shapes = ((heads * group, layout.key_dim), (heads, layout.key_dim), (heads, layout.value_dim))
        self.query, self.keys, self.values = (
            self._random(tokens, heads, dim).to(dtype).transpose(0, 1).to(device) for heads, dim in shapes
        )
        self.query *= sharpness
        self.sequences = [self._sequence(runs, size, dtype) for runs, size in sizes]
        self.columns = [2 * number + 1 for number in range(len(sizes))]

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    def _tokens(self, count: int, dim: int) -> Tensor:
        """Numbers about another mean in every channel, some of them far out."""
        means = self._random(self.layout.heads, 1, dim)
        return self._random(self.layout.heads, count, dim) + means + _OUTLIER * (means > 2.0)

    def _run(self, pages: int) -> tuple[Tensor, ...]:
        layout, tokens = self.layout, pages * PAGE_TOKENS
        keys, values = self._tokens(tokens, layout.key_dim), self._tokens(tokens, layout.value_dim)
        memory = torch.full((pages + 1, layout.page_bytes), 0xFF, dtype=torch.uint8)
        if pages:
            views = views_of(memory[:pages], layout)
            pack_pages(keys, values, views, layout)
            codes = torch.empty(max(keys.numel(), values.numel()), dtype=torch.uint8)
            unpack_pages(views, layout, keys, values, codes)
            middles = views.key_zeros.double() + 2 ** (layout.bits - 1) * views.key_scales.double()
            middles = middles.transpose(0, 1).expand(-1, -1, PAGE_TOKENS, -1).flatten(1, 2)
        else:
            middles = keys.double()
        return memory.to(self.device), keys.double(), values.double(), keys.double() - middles

    def _sequence(self, runs: Sequence[int], size: int, dtype: torch.dtype) -> RandomSequence:
        found = [self._shared.setdefault(runs[0], self._run(runs[0])), *(self._run(pages) for pages in runs[1:])]
        room = max(size, 7) if size < 10 else SHORT_TOKENS
        dims = self.layout.key_dim, self.layout.value_dim
        windows = [self._tokens(room, dim).to(dtype) for dim in dims]
        keys, values = (
            torch.cat([*(run[1 + number] for run in found), window[:, : size - 1].double()], dim=1)
            for number, window in enumerate(windows)
        )
        for window in windows:
            window[:, size - 1 :] = torch.nan
        swings = torch.cat([run[3] for run in found], dim=1)
        on_device = [window.to(self.device) for window in windows]
        return RandomSequence([run[0] for run in found], on_device, size, keys, values, swings)

    def wanted(self, rule: AttentionRule) -> tuple[Tensor, Tensor]:
        """Attention [sequences, heads, value_dim] in float64, and the same of the values' sizes."""
        results = []
        for kind in (torch.clone, torch.abs):
            one = []
            for column, sequence in zip(self.columns, self.sequences, strict=True):
                new_keys, new_values = (x[:, column : column + 1].cpu().double() for x in (self.keys, self.values))
                keys = torch.cat([sequence.keys, new_keys], dim=1)
                values = kind(torch.cat([sequence.values, new_values], dim=1))
                query = self.query[:, column : column + 1].cpu().double()
                sinks = None if rule.sinks is None else rule.sinks.cpu().double()
                plain = AttentionRule(rule.scale, rule.sliding_window, rule.softcap, sinks)
                one.append(attend(query, keys, values, plain)[:, 0])
            results.append(torch.stack(one))
        return results[0], results[1]

    def attend(self, kernels: Any, rule: AttentionRule, num_programs: int, leaves: bool = False) -> Tensor:
        """By `kernels`: [sequences, heads, value_dim]. With `leaves` the first page of each full window is packed then,
        behind the last run.
        """
        seen, own, shared = [], [], []
        for column, one in zip(self.columns, self.sequences, strict=True):
            stops, at = [], 0
            for run in one.runs:
                shared.append(run.data_ptr() - at * self.layout.page_bytes)
                at += len(run) - 1
                stops.append(at)
            own += [*(window.data_ptr() for window in one.windows), shared[-1]]
            first_visible = rule.first_visible(at * PAGE_TOKENS + one.size)
            leaving = leaves and one.size == SHORT_TOKENS
            seen.append(
                SeenTokens(column, at, one.size, one.windows[0].shape[1], first_visible, tuple(stops), leaving)
            )  # fmt: skip
        work = share_out(seen, self.layout.heads, num_programs)
        numbers = torch.tensor(work.numbers, dtype=torch.int32).to(self.device)
        addresses = torch.tensor(own + shared).to(self.device)
        shape = self.query.shape[1], self.query.shape[0], self.layout.value_dim
        output = torch.full(shape, torch.nan, dtype=self.query.dtype, device=self.device)
        kernels._partials.fill_(torch.nan)
        kernels.attend(
            self.query, self.keys, self.values, output, rule, self.layout, addresses, numbers, work
        )  # fmt: skip
        assert not kernels._arrivals.any()
        if work.num_leaving:
            kernels.pack(self.layout, self.query.dtype, addresses, numbers, work)
        others = [token for token in range(len(output)) if token not in self.columns]
        assert output[others].isnan().all()
        return output[self.columns]

    def require_attention(self, got: Tensor, rule: AttentionRule, step: float, sums: float) -> None:
        """Fail if `got` is off by more than `step` of itself, and `sums` of what it would be without signs; or if the
        new tokens are not in the windows.
        """
        wanted, terms = self.wanted(rule)
        excess = (got.cpu().double() - wanted).abs() / (step * wanted.abs() + sums * terms)
        assert excess.max() <= 1.0, (float(excess.max()), self.layout)
        self._require_appended()

    def require_rounded(self, got: Tensor, rule: AttentionRule) -> None:
        """Fail if `got` is off by more than what is rounded explains, see `_attention_and_error`; or if the new tokens
        are not in the windows.
        """
        wanted, most = zip(
            *(self._attention_and_error(rule, column, one)
              for column, one in zip(self.columns, self.sequences, strict=True)), strict=True
        )  # fmt: skip
        excess = (got.cpu().double() - torch.stack(wanted)).abs() / torch.stack(most)
        assert excess.max() <= 1.0, (float(excess.max()), self.layout)
        self._require_appended()

    def _attention_and_error(self, rule: AttentionRule, column: int, one: RandomSequence) -> tuple[Tensor, Tensor]:
        """Attention [heads, value_dim] of a token in float64, and what the kernels may be off by. With u = 2^-11, half
        the spacing of float16:

        - q * scale of a packed key is rounded to float16: a score is off by at most u * sum |q * swing|, and where that
          is less than float16's least normal number by 2^-25 for each channel and code.
        - Sums are in float32, cut off at each of some steps: 2^-20 of the sum of what is added.
        - A token's weight p is rounded to float16, of the window to the query's type, and everything of the token is
          then weighed with the rounded one. So with errors e of the p the result is sum p (1 + e) v / sum p (1 + e),
          which is off by at most sum p |e| |v - result| / (1 - max |e|). Weights under 2^-14 of the largest lose up to
          2^-25 in the product with codes.
        - A value with several scales is rounded to float16 before it is multiplied.
        - The result is rounded to the query's type.
        """
        few, own = 2.0**-11, torch.finfo(self.query.dtype).eps / 2
        dim, packed = self.layout.key_dim, one.swings.shape[1]
        keys, values = (
            torch.cat([old, new[:, column : column + 1].cpu().double()], dim=1)
            for old, new in ((one.keys, self.keys), (one.values, self.values))
        )
        group = len(self.query) // len(keys)
        keys, values, swings = (x.repeat_interleave(group, 0) for x in (keys, values, one.swings))
        query = self.query[:, column].cpu().double()[:, :, None]
        scores = rule.scale * (keys @ query)[..., 0]
        sizes = rule.scale * (keys.abs() @ query.abs())[..., 0]
        turned = rule.scale * (swings.abs() @ query.abs())[..., 0]
        off = 2.0**-20 * sizes
        off[:, :packed] += (few + 2.0**-20) * turned + 2.0**-25 * dim * 2 ** (self.layout.bits - 1)
        if rule.softcap is not None:
            scores = rule.softcap * torch.tanh(scores / rule.softcap)
        scores[:, : rule.first_visible(scores.shape[1])] = -torch.inf
        sinks = scores.new_empty(len(scores), 0) if rule.sinks is None else rule.sinks.cpu().double()[:, None]
        weights = torch.cat([scores, sinks], dim=1).softmax(-1)[:, : scores.shape[1]]
        result = (weights[:, None] @ values)[:, 0]
        errors = off.expm1() + 2.0**-18
        errors[:, :packed] += few
        errors[:, packed:] += own
        seen = torch.where(weights > 0, errors, 0.0)
        assert seen.max() < 0.5, "the bound says little"
        most = (weights * seen)[:, None] @ (values - result[:, None]).abs()
        most = most[:, 0] / (1 - seen.amax(1, keepdim=True)) + own * result.abs() * 1.01
        if packed:
            most += 2.0**-24 * packed * values[:, :packed].abs().amax((1, 2))[:, None]
        if self.layout.value_groups > 1:
            most += few * (weights[:, None] @ values.abs())[:, 0] * 1.5
        return result, most + 2.0**-18 * (weights[:, None] @ values.abs())[:, 0]

    def _require_appended(self) -> None:
        for column, one in zip(self.columns, self.sequences, strict=True):
            for window, new in zip(one.windows, (self.keys, self.values), strict=True):
                assert torch.equal(window[:, one.size - 1], new[:, column])
                assert window[:, one.size :].isnan().all()
