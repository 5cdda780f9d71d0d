"""Matrices of which a sweep needs some rows: the embeddings."""

from __future__ import annotations

from pipo_ray.model.facts import ModelFacts
from pipo_ray.session.memory import format_size
from pipo_ray.store.manifest import Manifest


def looked_up_bytes(manifest: Manifest, facts: ModelFacts) -> int:
    """Bytes of all matrices whose rows are looked up, those included that are an output head as well."""
    names = {name for unit in facts.units if unit.kind == "lookup" for name in unit.tensors}
    stored = {manifest.aliases.get(name, name) for name in names}
    return sum(part.nbytes for name in stored for _, part in manifest.find_parts(name))


def lookups_line(manifest: Manifest, in_ram_bytes: int | None = None) -> str:
    """What the user is told of them; `in_ram_bytes` of them are in RAM, which is all."""
    if in_ram_bytes:
        return f"; the embedding table ({format_size(in_ram_bytes)}) is in RAM"
    looked_up = sum(block.nbytes for block in manifest.blocks if block.kind == "embedding")
    return f"; of the embedding table ({format_size(looked_up)}) only the rows needed are read" if looked_up else ""
