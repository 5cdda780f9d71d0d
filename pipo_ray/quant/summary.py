"""What a block store's precision is, in words and in bits per weight. Imports no torch."""

from __future__ import annotations

import math
from collections import Counter

from pipo_ray.store.dtypes import num_bytes
from pipo_ray.store.manifest import Manifest


def describe_precision(manifest: Manifest, layout: str | None = None, obstacle: str | None = None) -> list[str]:
    """Lines for the user; none for a store without low-bit weights.

    With `layout`, the int4 layout of this machine, a line says so where the store has another one. With `obstacle`, why
    our own int4 kernel cannot be compiled here, a line says which is used.
    """
    packed = [tensor.panels for block in manifest.blocks for tensor in block.tensors if tensor.panels is not None]
    if not packed:
        return []
    tensors = [tensor for block in manifest.blocks for tensor in block.tensors]
    kept = [tensor for tensor in tensors if tensor.panels is None]
    matrices = sum(len(tensor.shape) >= 2 for tensor in kept)
    weights = sum(panels.rows * panels.columns for panels in packed)
    packed_bits = 8 * sum(math.prod(panels.shape) for panels in packed)
    all_weights = weights + sum(math.prod(tensor.shape) for tensor in kept)
    all_bits = 8 * sum(num_bytes(tensor.dtype, tensor.shape) for tensor in tensors)
    experts = ", fused experts among them" if any(tensor.expert is not None for tensor in kept) else ""
    formats = ", ".join(f"{count} in {name}" for name, count in Counter(panels.format for panels in packed).items())
    lines = [
        f"precision: {formats} with {packed_bits / weights:.2f} bits per weight, scales, zeros and padding included; "
        f"{len(kept)} tensors at 16 bits or more ({matrices} of them matrices{experts}); "
        f"{all_bits / all_weights:.2f} bits per weight in all"
    ]
    layouts = {panels.layout for panels in packed if panels.low_bit.bits == 4}
    others = sorted(layouts - {layout})
    if layout is not None and others:
        lines.append(
            f"int4 weights are stored for {others[0]} and this processor's kernel takes {layout}: they are unpacked "
            "for every product, which is exact and slower; pack the checkpoint again on this machine"
        )
    elif layouts and obstacle is not None:
        lines.append(f"int4 products are torch's, because {obstacle}: the kernel of our own would be faster")
    return lines
