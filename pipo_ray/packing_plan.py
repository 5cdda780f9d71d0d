"""What a checkpoint becomes in a block store: looked at in the packing process, before anything is written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pipo_ray.compiled.support import machine_panel_bytes
from pipo_ray.errors import UnsupportedModelError
from pipo_ray.quant.panels import machine_layout

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from pipo_ray.model.blocks import BlockSpec
    from pipo_ray.model.facts import ModelFacts
    from pipo_ray.quant.foreign.checkpoint import ForeignCheckpoint
    from pipo_ray.quant.foreign.codes import ForeignCodes
    from pipo_ray.quant.policy import Precision
    from pipo_ray.store.checkpoint import Checkpoint
    from pipo_ray.store.source import TensorSource


@dataclass(frozen=True)
class PackingPlan:
    """A checkpoint's model (without weights), its facts, and its tensors in one dtype: as `blocks`, before a precision
    turns some of them into panels. `looked_up` are the tables of embeddings. `plain` is the checkpoint with its weights
    as numbers; `codes` are those that a quantized one has, else None.
    """

    config: PretrainedConfig
    model: PreTrainedModel
    facts: ModelFacts
    tensors: TensorSource
    plain: ForeignCheckpoint | Checkpoint
    codes: ForeignCodes | None
    blocks: tuple[BlockSpec, ...]
    looked_up: frozenset[str]

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: str) -> PackingPlan:
        """Of an open `checkpoint` that is packed in `dtype` ("bfloat16" and so on). Imports torch and transformers.

        Raises CheckpointError for weights that are not the model's, UnsupportedModelError for a model that cannot be
        run.
        """
        from pipo_ray.model.graph import load_config, resolve_dtype
        from pipo_ray.model.inspect import find_facts
        from pipo_ray.model.layout import block_layout
        from pipo_ray.quant.foreign.codes import ForeignCodes
        from pipo_ray.store.source import TensorSource

        config = load_config(checkpoint.folder)
        torch_dtype = resolve_dtype(dtype, config)
        try:
            model, trace, facts = find_facts(config, torch_dtype, checkpoint.folder)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{checkpoint.origin} cannot be run: {error}; choose another model") from error
        foreign = _foreign_view(checkpoint, model)
        plain = foreign or checkpoint
        tensors = TensorSource(model, plain, torch_dtype)
        codes = None if foreign is None else ForeignCodes(tensors, foreign)
        aliases = tensors.aliases
        looked_up = {aliases.get(name, name) for unit in trace.units if unit.kind == "lookup" for name in unit.tensors}
        blocks = tuple(block_layout(model, trace, aliases))
        return cls(config, model, facts, tensors, plain, codes, blocks, frozenset(looked_up))

    def assigned(self, precision: Precision) -> tuple[BlockSpec, ...]:
        """`blocks` with what `precision` asks for as panels. Raises InputError for what cannot be (`assign`)."""
        from pipo_ray.quant.assign import assign

        return assign(
            self.blocks,
            precision,
            looked_up=self.looked_up,
            layout=machine_layout(),
            panel_bytes=machine_panel_bytes(),
            linear_experts=precision.is_low_bit and self._linear_experts,
            source_format=None if self.codes is None else self.codes.low_bit,
            aliases=self.tensors.aliases,
        )

    @cached_property
    def _linear_experts(self) -> bool:
        from pipo_ray.model.linear_experts import experts_are_linear

        has_experts = any(tensor.expert is not None for block in self.blocks for tensor in block.tensors)
        return has_experts and experts_are_linear(self.config)


def check_precisions(source: Path, wanted: Sequence[tuple[Precision, str]]) -> None:
    """Raise what is wrong with any of `wanted`, a precision and the dtype that a store would have with it, for the
    checkpoint `source`: what packing would raise before it writes.
    """
    plans: dict[str, PackingPlan] = {}
    with opened(source) as checkpoint:
        for precision, dtype in wanted:
            if dtype not in plans:
                plans[dtype] = PackingPlan.of(checkpoint, dtype)
            plans[dtype].assigned(precision)


def count_tokens(source: Path, text: str) -> int | None:
    """Tokens of `text`, without what begins a text, by the tokenizer of the checkpoint `source`; None without one."""
    from pipo_ray.model.tokenizer import load_tokenizer

    with opened(source) as checkpoint:
        tokenizer = load_tokenizer(checkpoint.folder)
        # Not verbose: the tokenizer's own idea of the greatest length is not the model's.
        return None if tokenizer is None else len(tokenizer.encode(text, add_special_tokens=False, verbose=False))


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Checkpoint]:
    """The checkpoint folder or GGUF file `path`, ready to be packed."""
    if not path.is_file():
        from pipo_ray.store.checkpoint import Checkpoint

        with Checkpoint.open(path) as checkpoint:
            yield checkpoint
        return
    from pipo_ray.store.gguf_file import GgufFile

    file = GgufFile.open(path)
    from pipo_ray.quant.foreign.gguf_model import opened_gguf

    with opened_gguf(file) as checkpoint:
        yield checkpoint


def _foreign_view(checkpoint: Checkpoint, model: PreTrainedModel) -> ForeignCheckpoint | None:
    if not checkpoint.origin.is_file():
        from pipo_ray.quant.foreign.checkpoint import open_foreign

        return open_foreign(checkpoint)
    from pipo_ray.quant.foreign.gguf_model import GgufCheckpoint, view_gguf

    assert isinstance(checkpoint, GgufCheckpoint)
    return view_gguf(checkpoint, model)
