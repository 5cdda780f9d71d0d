"""Packed pages wherever they lie, as one tensor."""

from __future__ import annotations

import torch

from pipo_ray.model.packed_pages import PackedPages


def joined(pages: PackedPages, stop: int) -> torch.Tensor:
    """A copy of the first `stop` pages, [stop, page_bytes]; [0] without any."""
    parts = [part.clone() for parts in pages.parts(0, stop) for part in parts]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
