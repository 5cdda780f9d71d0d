"""What a block store's precision is, in words and in bits per weight. Imports no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipo_ray.quant.calibration_text import CALIBRATION_KEY
from pipo_ray.quant.foreign.detect import SOURCE_KEY
from pipo_ray.store.dtypes import num_bytes
from pipo_ray.store.manifest import Manifest


def describe_precision(manifest: Manifest, layouts: Sequence[str] = (), obstacle: str | None = None) -> list[str]:
    """Lines for the user; none for a store without low-bit weights, out of a checkpoint without any.

    With `layouts`, those of int4 that are multiplied as they are on this machine, the best first, a line says so where
    the store has another one. With `obstacle`, why our own kernels cannot be compiled here, a line says which are used.
    """
    packed = [tensor.panels for block in manifest.blocks for tensor in block.tensors if tensor.panels is not None]
    source = describe_source(manifest)
    if not packed:
        return source
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
        *source,
        f"precision: {formats} with {packed_bits / weights:.2f} bits per weight, scales, zeros and padding included; "
        f"{len(kept)} tensors at 16 bits or more ({matrices} of them matrices{experts}); "
        f"{all_bits / all_weights:.2f} bits per weight in all",
    ]
    if calibrated := manifest.extra.get(CALIBRATION_KEY):
        nearest = calibrated["nearest"]
        rest = f"; {nearest} that too few of them reach are rounded to nearest" if nearest else ""
        lines.append(
            f"calibrated: {calibrated['matrices']} int4 matrices rounded with {calibrated['tokens']} tokens of "
            f"{calibrated['file']}{rest}"
        )
    stored = {panels.layout for panels in packed if panels.low_bit.bits == 4}
    others = sorted(stored - set(layouts))
    if layouts and others:
        lines.append(
            f"int4 weights are stored for {others[0]} and this processor's kernel takes {layouts[0]}: they are "
            "unpacked for every product, which is exact and slower; pack the checkpoint again on this machine"
        )
    elif obstacle is not None:
        lines.append(f"low-bit products are torch's, because {obstacle}: kernels of our own would be faster")
    return lines


def describe_source(manifest: Manifest) -> list[str]:
    """A line on what became of the weights of a checkpoint that was quantized; none for another one."""
    source = manifest.extra.get(SOURCE_KEY)
    if not isinstance(source, dict):
        return []
    repacked, again = source["repacked"], source["rounded_again"]
    done = [f"{repacked} matrices repacked {_how_exactly(source)}"] if repacked else []
    if source["dequantized"]:
        done.append(f"{source['dequantized']} dequantized")
    if again:
        done.append(f"{again} dequantized and rounded again, so that accuracy is lost twice")
    return [f"{source['label']}: {', '.join(done)}"]


def _how_exactly(source: Mapping[str, Any]) -> str:
    """Of groups that were not counted (GGUF's) some will have been rounded."""
    groups, inexact = source["groups"], source["groups"] - source["exact_groups"]
    if groups and not inexact:
        return "exactly"
    share = ""
    if groups:
        percent = "all" if inexact == groups else f"{max(1, min(99, round(100 * inexact / groups)))}%"
        share = f" in {percent} of the groups"
    return f"(codes as they are; scales and zeros rounded to bf16, by 2^-8 at most{share})"
