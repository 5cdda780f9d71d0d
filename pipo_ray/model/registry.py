"""Architectures that need a special case: a few declared lines each, nothing else is per architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipo_ray.errors import CheckpointError, UnsupportedModelError
from pipo_ray.quant.foreign.detect import source_format


@dataclass(frozen=True)
class SpecialCase:
    """What is particular to one `model_type`.

    `refused` is the reason why it cannot be run; `ragged` False forbids sharing a row between requests without asking
    the probe.
    """

    refused: str | None = None
    ragged: bool = True


SPECIAL_CASES: dict[str, SpecialCase] = {}

_NONE = SpecialCase()


def special_case(model_type: str) -> SpecialCase:
    """The special case declared for `model_type`, or an empty one."""
    return SPECIAL_CASES.get(model_type, _NONE)


def require_supported(config: Mapping[str, Any], path: Path) -> str:
    """The `model_type` of the config.json at `path`, whose content is `config`; without torch, so it is known at once.

    Raises CheckpointError without a model_type, UnsupportedModelError for what no transformers could make us run, and
    for weights quantized in a way that cannot be read.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path}: has no model_type; give a Hugging Face checkpoint folder")
    if config.get("is_encoder_decoder"):
        raise UnsupportedModelError(
            f"{path}: {model_type} is an encoder-decoder; only decoder-only language models can be run: choose one"
        )
    source_format(config, path)
    if (refused := special_case(model_type).refused) is not None:
        raise UnsupportedModelError(f"{path}: architecture {model_type!r} cannot be run: {refused}")
    return model_type
