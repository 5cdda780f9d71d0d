"""Tiny models are fastest on one thread, and the machine may be shared."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from architectures import BY_SLUG
from harness import PackedModel, pack_checkpoint


@pytest.fixture(scope="session")
def packed_llama(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    """A tiny Llama in float32."""
    folder = tmp_path_factory.mktemp("llama")
    BY_SLUG["llama"].save(folder / "checkpoint")
    return pack_checkpoint(folder / "checkpoint", folder / "store", torch.float32)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Torch computes on one thread in this folder's tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
