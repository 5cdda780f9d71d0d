"""Makes the tensors of the module graph from those of a checkpoint, with transformers' own conversions.

What `from_pretrained` does for a whole model at once (`convert_and_load_state_dict_in_model` in
transformers/core_model_loading.py), this does for a few rows of one tensor, so that memory stays bounded.
"""

from __future__ import annotations

import copy
import math
import re
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from pipo_ray.errors import CheckpointError
from pipo_ray.model.blocks import BlockSpec, TensorSpec
from pipo_ray.store.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_WEIGHT_DTYPES = ("BF16", "F16", "F32")
_COMPARE_BYTES = 8 << 20
_INTEGERS = {2: (np.int16, np.uint16), 4: (np.int32, np.uint32)}


@dataclass(frozen=True, eq=False)
class _Recipe:
    """How to make one or several graph tensors: of `sources`, (checkpoint tensor, source pattern), by `converter`.

    `converter` None is a rename: one source, as it is. `first_target` is the name transformers runs the conversion
    under. `experts` is the number of experts where dim 0 can be made one expert at a time, else 0.
    """

    first_target: str
    sources: tuple[tuple[str, str], ...]
    converter: WeightConverter | None = None
    experts: int = 0


class RowSources(NamedTuple):
    """Rows of a graph tensor: row r is row `places[1, r]` of the checkpoint tensor `keys[places[0, r]]`."""

    keys: tuple[str, ...]
    places: torch.Tensor

    def runs(self, start: int, stop: int) -> list[tuple[str, int, int]]:
        """Rows `start` to `stop` as (checkpoint tensor, first row, row behind the last), in order."""
        result: list[tuple[str, int, int]] = []
        for which, row in self.places[:, start:stop].T.tolist():
            if result and result[-1][0] == self.keys[which] and result[-1][2] == row:
                result[-1] = (*result[-1][:2], row + 1)
            else:
                result.append((self.keys[which], row, row + 1))
        return result


class TensorSource:
    """The tensors of `model`'s state dict, read out of `checkpoint`.

    `model` is a PreTrainedModel on the meta device whose parameters have the dtypes they shall be stored in; `dtype`
    is the one that was asked for. The sources are resolved and checked at once, without reading weights. Any number of
    threads may read; conversions are made one at a time.

    Raises CheckpointError: a tensor of a dtype other than bf16, fp16 and fp32, a tensor
    whose shape is not the model's, sources that a conversion cannot combine.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self._model = model
        self._targets: dict[str, torch.Tensor] = dict(model.state_dict())
        self._recipes: dict[str, _Recipe] = {}
        self._last: tuple[_Recipe, int | None, dict[str, torch.Tensor]] | None = None
        self._converting = threading.Lock()
        unexpected = self._resolve()
        self._ties = _tie_groups(model, self._targets)
        self.unexpected: tuple[str, ...] = _without(unexpected, model._keys_to_ignore_on_load_unexpected)
        """Tensors of the checkpoint that the model has no place for (a vision tower, say)."""
        self.missing: tuple[str, ...] = _without(
            # A tensor that is not on the meta device was computed by the module itself and needs no checkpoint.
            (name for name, target in self._targets.items() if target.is_meta and self._present(name) is None),
            model._keys_to_ignore_on_load_missing,
        )
        """Tensors of the model that the checkpoint cannot make."""

    @property
    def precision(self) -> str:
        """The dtype asked for, as in "bfloat16"."""
        return str(self.dtype).removeprefix("torch.")

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Tied tensors, alias to stored name. A pair that the checkpoint has twice with different values is not tied.

        Reads both where the checkpoint has both. As `PreTrainedModel.tie_weights` does, but that the stored name is
        always the one that the model calls the source: `read` finds the data under either.
        """
        result: dict[str, str] = {}
        for stored, aliases in self._ties.items():
            for alias in aliases:
                if alias not in self._recipes or self._present(stored) == alias or self._equal(stored, alias):
                    result[alias] = stored
        return result

    def require(self, blocks: Sequence[BlockSpec]) -> None:
        """Check that the checkpoint has all of `blocks` and of the model.

        Raises CheckpointError naming what it lacks.
        """
        wanted = (tensor.name for block in blocks for tensor in block.tensors)
        missing = list(self.missing) + [name for name in wanted if self._present(name) is None]
        if missing:
            names = sorted(set(missing), key=dot_natural_key)
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise CheckpointError(
                f"checkpoint {self.checkpoint.origin} lacks {len(names)} of the model's tensors: {shown}; check that "
                "config.json and weights belong together, or download the checkpoint again"
            )

    def read(self, spec: TensorSpec, row_start: int, row_stop: int) -> torch.Tensor:
        """Rows (dim 0) `row_start` to `row_stop` of `spec`: a contiguous CPU tensor of its dtype; a scalar has one row.

        Raises CheckpointError: a NaN, a value that `spec`'s dtype cannot hold, a file that cannot be read.
        ValueError if `spec` is not a tensor of the model.
        """
        name = self._present(spec.name)
        if name is None:
            raise CheckpointError(
                f"checkpoint {self.checkpoint.origin} lacks tensor {spec.name!r}; download the checkpoint again"
            )
        shape = tuple(self._targets[name].shape)
        if (shape if spec.expert is None else shape[1:]) != spec.shape:
            raise ValueError(f"tensor {spec.name} has shape {shape} in the model, {spec.shape} was asked for")
        recipe, dtype = self._recipes[name], TORCH_DTYPES[spec.dtype]
        if recipe.converter is None:
            row = math.prod(spec.shape[1:])
            start = (spec.expert or 0) * math.prod(spec.shape)
            data = self._load(recipe.sources[0][0], start + row_start * row, start + row_stop * row, dtype)
            return data.view(*(row_stop - row_start, *spec.shape[1:])) if spec.shape else data.view(())
        with self._converting:
            return self._read_converted(spec, name, recipe, row_start, row_stop, dtype)

    def reads_apart(self, spec: TensorSpec) -> bool:
        """Whether several reads of it and its neighbours at a time cost no more than one after the other: not if a
        conversion, or a group of a quantized checkpoint's columns, serves several.
        """
        name = self._present(spec.name)
        return name is not None and self._plain_key(name) is not None

    def read_bf16(self, spec: TensorSpec, row_start: int, row_stop: int) -> NDArray[np.uint8] | None:
        """Rows of `spec` as they lie in the checkpoint, unchecked, if that is bf16 and row by row; else None."""
        if (key := self.bf16_key(spec)) is None:
            return None
        row = 2 * math.prod(spec.shape[1:])
        return self.checkpoint.read(key, row_start * row, row_stop * row)

    def bf16_key(self, spec: TensorSpec) -> str | None:
        """The checkpoint tensor that `spec` is as it lies there, if that is bf16; else None."""
        name = self._present(spec.name)
        key = None if name is None or spec.expert is not None else self._plain_key(name)
        return key if key is not None and self.checkpoint.tensors[key].dtype == "BF16" else None

    def _plain_key(self, name: str) -> str | None:
        """The checkpoint tensor that the graph tensor `name` is, as it lies in the file."""
        recipe = self._recipes[name]
        key = recipe.sources[0][0]
        return key if recipe.converter is None and self.checkpoint.is_plain(key) else None

    def _read_converted(
        self, spec: TensorSpec, name: str, recipe: _Recipe, row_start: int, row_stop: int, dtype: torch.dtype
    ) -> torch.Tensor:
        if _merges(recipe.converter) and recipe.experts and spec.expert is None:
            experts = [self._convert(recipe, expert, dtype)[name] for expert in range(row_start, row_stop)]
            return torch.cat(experts) if experts else torch.empty((0, *spec.shape[1:]), dtype=dtype)
        # A fused tensor that is asked for as a whole is converted as a whole: it may have thousands of rows.
        whole = self._convert(recipe, spec.expert if recipe.experts else None, dtype)[name]
        if spec.expert is not None:
            whole = whole[0 if recipe.experts else spec.expert]
        return whole[row_start:row_stop].contiguous() if spec.shape else whole.contiguous()

    def checkpoint_keys(self, name: str) -> tuple[str, ...]:
        """The checkpoint tensors that a graph tensor is made of."""
        present = self._present(name)
        return () if present is None else tuple(key for key, _ in self._recipes[present].sources)

    def row_sources(self, spec_name: str, expert: int | None) -> RowSources | None:
        """Where each row of a graph tensor, or of an expert's slice of it, comes from; None if its rows are not rows of
        checkpoint tensors, moved as they are.
        """
        name = self._present(spec_name)
        if name is None:
            return None
        recipe = self._recipes[name]
        keys = [key for key, _ in recipe.sources]
        if recipe.converter is None:
            rows = self._targets[name].shape[:-1].numel()
            if expert is not None:
                rows //= self._targets[name].shape[0]
            return RowSources(
                (keys[0],), torch.stack((torch.zeros(rows).long(), torch.arange(rows) + (expert or 0) * rows))
            )
        model: Any = self._model
        if expert is not None:
            if not (_merges(recipe.converter) and recipe.experts):
                return None
            recipe, keys, model = *self._expert_sources(recipe, expert), _OneExpertModel(self._model)
        # The conversion itself tells, run on the rows' numbers: one column, whose entries say where they came from.
        counts = [math.prod(self.checkpoint.tensors[key].shape[:-1]) for key in keys]
        starts = [sum(counts[:number]) for number in range(len(counts))]
        numbers = [
            torch.arange(start, start + count).view(*self.checkpoint.tensors[key].shape[:-1], 1)
            for key, start, count in zip(keys, starts, counts, strict=True)
        ]
        try:
            result = self._run(recipe, numbers, model)[name]
        except CheckpointError:
            return None
        wanted = (*self._targets[name].shape[:-1], 1)
        if tuple(result.shape) != (wanted if expert is None else (1, *wanted[1:])):
            return None
        flat = result.reshape(-1)
        which = torch.bucketize(flat, torch.tensor(starts), right=True) - 1
        return RowSources(tuple(keys), torch.stack((which, flat - torch.tensor(starts)[which])))

    def _present(self, name: str) -> str | None:
        """The graph tensor that has the data of `name`: itself, or one that it is tied to."""
        if name in self._recipes:
            return name
        for stored, aliases in self._ties.items():
            group = (stored, *aliases)
            if name in group:
                return next((member for member in group if member in self._recipes), None)
        return None

    def _resolve(self) -> set[str]:
        """Find every graph tensor's recipe; the checkpoint tensors that none needs are returned."""
        mapping = get_model_conversion_mapping(self._model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        prefix, unexpected = self._model.base_model_prefix, set()
        renames: dict[str, str] = {}
        converted: dict[str, list[tuple[str, str]]] = {}
        # In transformers' order: it decides which expert is which, and some renamings look at what came before.
        for key in sorted(self.checkpoint.tensors, key=dot_natural_key):
            target, pattern = rename_source_key(key, renamings, converters, prefix, self._targets)
            if target not in self._targets and key in self._targets:
                target, pattern = rename_source_key(key, [], [], prefix, self._targets)
            if target not in self._targets:
                unexpected.add(key)
            elif pattern is None:
                renames.setdefault(target, key)
            else:
                converted.setdefault(target, []).append((key, pattern))
        for target, sources in converted.items():
            converter = by_pattern[sources[0][1]]
            recipe = _Recipe(target, tuple(sources), converter, self._separable(target, converter, sources))
            self._add_converted(recipe)
        for target, key in renames.items():
            self._check_dtype(target, key)
            self._check_shape(target, self.checkpoint.tensors[key].shape, [key])
            self._recipes[target] = _Recipe(target, ((key, key),))
        return unexpected

    def _add_converted(self, recipe: _Recipe) -> None:
        # A run on meta tensors tells which tensors come out, and their shapes, whatever the operations are.
        keys = [key for key, _ in recipe.sources]
        for key in keys:
            self._check_dtype(recipe.first_target, key)
        tensors = [torch.empty(self.checkpoint.tensors[key].shape, device="meta") for key in keys]
        for name, result in self._run(recipe, tensors, self._model).items():
            if name in self._targets:
                self._check_shape(name, tuple(result.shape), keys)
                self._recipes[name] = recipe

    def _check_dtype(self, target: str, key: str) -> None:
        stored, wanted = self.checkpoint.tensors[key].dtype, self._targets[target].dtype
        if stored not in _WEIGHT_DTYPES if wanted.is_floating_point else TORCH_DTYPES.get(stored) != wanted:
            names = ", ".join(_WEIGHT_DTYPES) if wanted.is_floating_point else str(_NAMES.get(wanted, wanted))
            raise CheckpointError(
                f"tensor {key!r} in {self.checkpoint.files[key]} has dtype {stored}, supported is {names}; use "
                "the unquantized checkpoint, or save it in bfloat16"
            )

    def _check_shape(self, target: str, shape: Sequence[int], keys: Sequence[str]) -> None:
        wanted = tuple(self._targets[target].shape)
        if tuple(shape) != wanted:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise CheckpointError(
                f"tensor {keys[0]!r}{more} in {self.checkpoint.files[keys[0]]} gives {target!r} the shape "
                f"{list(shape)}, config.json asks for {list(wanted)}; use the config.json that belongs to these weights"
            )

    def _separable(self, target: str, converter: WeightConverter, sources: Sequence[tuple[str, str]]) -> int:
        """The number of experts if every operation of `converter` leaves dim 0 (the expert) alone, else 0."""
        shape = self._targets[target].shape
        operations = list(converter.operations)
        merged = _merges(converter)
        if len(shape) < 2 or not all(map(_leaves_rows, operations[merged:])):
            return 0
        if merged:
            counts = Counter(pattern for _, pattern in sources)
            return shape[0] if set(counts.values()) == {shape[0]} else 0
        dims = {self.checkpoint.tensors[key].shape[:1] for key, _ in sources}
        return shape[0] if dims == {(shape[0],)} else 0

    def _convert(self, recipe: _Recipe, expert: int | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The recipe's graph tensors; with `expert`, only that expert's slice of them (dim 0 has size 1)."""
        if self._last is not None:
            last_recipe, last_expert, results = self._last
            if last_recipe is recipe and last_expert == expert and all(t.dtype == dtype for t in results.values()):
                return results
        self._last = None  # before the next one is made: one conversion at a time is all the memory that is promised
        model: Any = self._model
        if expert is None:
            chosen, tensors = recipe, [self._load_whole(key, dtype) for key, _ in recipe.sources]
        else:
            chosen, tensors, model = self._expert_inputs(recipe, expert, dtype)
        results = {name: tensor.contiguous() for name, tensor in self._run(chosen, tensors, model).items()}
        self._last = recipe, expert, results
        return results

    def _expert_inputs(
        self, recipe: _Recipe, expert: int, dtype: torch.dtype
    ) -> tuple[_Recipe, list[torch.Tensor], Any]:
        model = _OneExpertModel(self._model)
        if not _merges(recipe.converter):
            tensors = []
            for key, _ in recipe.sources:
                shape = self.checkpoint.tensors[key].shape
                row = math.prod(shape[1:])
                tensors.append(self._load(key, expert * row, (expert + 1) * row, dtype).view(1, *shape[1:]))
            return recipe, tensors, model
        chosen, keys = self._expert_sources(recipe, expert)
        return chosen, [self._load_whole(key, dtype) for key in keys], model

    def _expert_sources(self, recipe: _Recipe, expert: int) -> tuple[_Recipe, list[str]]:
        """The recipe for one expert, of a checkpoint that has a tensor per expert, and the tensors it takes."""
        patterns = dict.fromkeys(pattern for _, pattern in recipe.sources)
        sources = tuple([entry for entry in recipe.sources if entry[1] == pattern][expert] for pattern in patterns)
        return _Recipe(recipe.first_target, sources, recipe.converter), [key for key, _ in sources]

    def _run(self, recipe: _Recipe, tensors: list[torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
        converter: Any = copy.deepcopy(recipe.converter)
        for (key, pattern), tensor in zip(recipe.sources, tensors, strict=True):
            converter.add_tensor(recipe.first_target, key, pattern, tensor)
        tensors.clear()  # the operations free what they have used up, if nobody else holds it
        try:
            with torch.no_grad():
                results = converter.convert(recipe.first_target, model=model, config=self._model.config)
        except (RuntimeError, ValueError, IndexError, KeyError, AttributeError) as error:
            key = recipe.sources[0][0]
            raise CheckpointError(
                f"tensors {key!r} and {len(recipe.sources) - 1} more in {self.checkpoint.files[key]} do not combine to "
                f"{recipe.first_target!r} ({' '.join(str(error).split())[:200]}); download the checkpoint again"
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in results.items()}

    def _load_whole(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        shape = self.checkpoint.tensors[key].shape
        return self._load(key, 0, math.prod(shape), dtype).view(shape)

    def _load(self, key: str, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Elements `start` to `stop` of a checkpoint tensor, checked and cast, of shape (stop - start,)."""
        stored = TORCH_DTYPES[self.checkpoint.tensors[key].dtype]
        if stop == start:
            return torch.empty(0, dtype=dtype)
        raw = self.checkpoint.read(key, start * stored.itemsize, stop * stored.itemsize)
        data = torch.from_numpy(raw).view(stored)
        if not stored.is_floating_point:
            return data.to(dtype)
        largest = _largest_magnitude(raw, stored)
        if largest.isnan():
            raise CheckpointError(
                f"tensor {key!r} in {self.checkpoint.files[key]} holds NaN ({int(data.isnan().sum())} of "
                f"{data.numel()} values from {start}); the checkpoint is damaged: download it again"
            )
        result = data.to(dtype)
        if largest.to(dtype).isinf():
            self._refuse_overflow(key, data, result)
        return result

    def _refuse_overflow(self, key: str, data: torch.Tensor, result: torch.Tensor) -> None:
        broken = result.isinf() & ~data.isinf()
        if broken.any():
            value = float(data[broken].abs().max())
            limit = torch.finfo(result.dtype).max
            way_out = "--dtype bfloat16" if result.dtype == torch.float16 else "--dtype float32"
            raise CheckpointError(
                f"tensor {key!r} in {self.checkpoint.files[key]} has value {value:.6g}, {_NAMES[result.dtype]} holds "
                f"up to {limit:.6g}; use {way_out}"
            )

    def _equal(self, left: str, right: str) -> bool:
        target = self._targets[left]
        if target.shape != self._targets[right].shape:
            return False
        shape, dtype = tuple(target.shape), _NAMES[target.dtype]
        rows = max(1, _COMPARE_BYTES // max(1, math.prod(shape[1:]) * target.element_size()))
        return all(
            torch.equal(
                self.read(TensorSpec(left, shape, dtype), start, min(start + rows, shape[0])),
                self.read(TensorSpec(right, shape, dtype), start, min(start + rows, shape[0])),
            )
            for start in range(0, shape[0], rows)
        )


class _OneExpertModel:
    """The model, as seen by a conversion that gets one expert: operations compare with its parameters' shapes."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> torch.Tensor:
        return torch.empty((1, *self._model.get_parameter(name).shape[1:]), device="meta")


def _largest_magnitude(raw: NDArray[np.uint8], dtype: torch.dtype) -> torch.Tensor:
    """The largest |x| among the values of a floating `dtype` in `raw`; NaN if there is any. A scalar of `dtype`.

    Sign aside, IEEE floats are ordered like the integers with the same bits, and NaN is above infinity. As signed
    integers the positive ones are the largest, as unsigned the negative ones: two passes at memory speed without a
    copy. One thread, where torch's reductions would wait for all of theirs on a PC that is doing something else as
    well.
    """
    signed, unsigned = _INTEGERS[dtype.itemsize]
    positive, negative = int(raw.view(signed).max()), int(raw.view(unsigned).max())
    sign = 1 << (8 * dtype.itemsize - 1)
    bits = max(positive, negative - sign if negative >= sign else 0, 0)
    return torch.from_numpy(np.array([bits], unsigned).view(signed)).view(dtype)[0]


def _merges(converter: WeightConverter | None) -> bool:
    """Whether the checkpoint has a tensor per expert, which `converter` stacks first."""
    first: Any = converter.operations[0] if converter is not None else None
    return type(first) is MergeModulelist and first.dim == 0


def _leaves_rows(operation: Any) -> bool:
    """Whether an operation makes row i (dim 0) of its result from row i of its inputs alone."""
    if type(operation) in (Concatenate, Chunk):
        return operation.dim > 0 and operation.num_shards_attribute is None
    if type(operation) is Interleave:
        return bool(operation.dim > 0)
    return type(operation) is Transpose and operation.dim0 > 0 and operation.dim1 > 0


def _tie_groups(model: PreTrainedModel, targets: dict[str, torch.Tensor]) -> dict[str, list[str]]:
    """Stored name to the names tied to it."""
    groups: dict[str, list[str]] = {}
    for alias, stored in model.all_tied_weights_keys.items():
        if alias in targets and stored in targets and alias != stored:
            groups.setdefault(stored, []).append(alias)
    return groups


def _without(names: Iterable[str], patterns: Iterable[str] | None) -> tuple[str, ...]:
    ignored = [re.compile(pattern) for pattern in patterns or ()]
    kept = (name for name in names if not any(pattern.search(name) for pattern in ignored))
    return tuple(sorted(kept, key=dot_natural_key))
