"""Which tensors make up which block, and in what order: the layout a model is packed in."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from pipo_ray.errors import UnsupportedModelError
from pipo_ray.model.blocks import BlockKind, BlockSpec, TensorSpec
from pipo_ray.model.trace import Trace, Unit, layer_prefixes

SAFETENSORS_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}

# A child of a decoder layer that holds less than this share of the layer's bytes (a norm) does not make a half of its
# own.
_HEAVY = 0.05


def block_layout(model: PreTrainedModel, trace: Trace, aliases: dict[str, str]) -> tuple[BlockSpec, ...]:
    """Group the traced units into blocks, in the order of use.

    Every stored tensor that a forward pass uses is in exactly one block. Embedding tables are looked up and therefore
    not in the order of a sweep; a table tied to the head is stored as the head. `aliases` maps tied tensors to the
    stored one (those that the checkpoint really ties).
    """
    stored = dict(model.state_dict())
    head = _head_tensors(model, aliases)
    layers = layer_prefixes(model)
    placed: set[str] = set()
    blocks: dict[str, tuple[BlockKind, int | None, list[TensorSpec]]] = {}

    def put(block: str, kind: BlockKind, layer: int | None, spec: TensorSpec) -> None:
        blocks.setdefault(block, (kind, layer, []))[2].append(spec)

    second_half = _second_halves(model, trace, layers, stored)
    entered_second: set[int] = set()
    experts_done: set[int] = set()
    seen: set[int] = set()
    for call in trace.calls:
        if call in seen:
            continue
        seen.add(call)
        unit = trace.units[call]
        names = [n for n in (aliases.get(n, n) for n in unit.tensors) if n not in placed]
        if unit.kind == "lookup":
            names = [n for n in names if n not in head]
        placed.update(names)
        layer = _layer_of(unit.module, layers)
        if layer is None:
            for name in names:
                if unit.kind == "lookup":
                    put(f"embedding.{name}", "embedding", None, _spec(name, stored[name], cut=True))
                elif name in head:
                    put("head", "head", None, _spec(name, stored[name], cut=unit.kind == "linear"))
                else:
                    put("rest", "rest", None, _spec(name, stored[name], cut=False))
            continue
        child = _child_of(unit.module, layers[layer])
        if child == second_half.get(layer):
            entered_second.add(layer)
        kind: BlockKind = "layer" if layer not in second_half else "mlp" if layer in entered_second else "attention"
        block = f"layers.{layer}.{kind}" + (".after_experts" if layer in experts_done else "")
        for spec in _unit_specs(unit, names, stored):
            if spec.expert is None:
                put(block, kind, layer, spec)
        for spec in sorted((s for s in _unit_specs(unit, names, stored) if s.expert is not None), key=_expert_of):
            put(f"layers.{layer}.expert.{spec.expert}", "expert", layer, spec)
            experts_done.add(layer)
    if "head" not in blocks:
        raise UnsupportedModelError(f"architecture {model.config.model_type!r}: its output head was not found")
    return tuple(BlockSpec(name, kind, layer, tuple(specs)) for name, (kind, layer, specs) in blocks.items())


def _expert_of(spec: TensorSpec) -> int:
    assert spec.expert is not None
    return spec.expert


def _unit_specs(unit: Unit, names: list[str], stored: dict[str, torch.Tensor]) -> Iterator[TensorSpec]:
    # What is bound whole comes first: it must be there before the first part of what streams through.
    for name in sorted(names, key=lambda n: unit.kind == "linear" and stored[n].dim() == 2):
        tensor = stored[name]
        if unit.kind == "experts" and tensor.dim() == 3:
            for expert in range(tensor.shape[0]):
                yield _spec(name, tensor[expert], cut=False, expert=expert)
        else:
            yield _spec(name, tensor, cut=unit.kind == "linear" and tensor.dim() == 2)


def _spec(name: str, tensor: torch.Tensor, *, cut: bool, expert: int | None = None) -> TensorSpec:
    return TensorSpec(name, tuple(tensor.shape), SAFETENSORS_DTYPES[tensor.dtype], expert, "rows" if cut else "none")


def _head_tensors(model: PreTrainedModel, aliases: dict[str, str]) -> set[str]:
    module = model.get_output_embeddings()
    if module is None:
        return set()
    own = {id(p) for p in module.parameters()}
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in own}
    prefix = next((name for name, m in model.named_modules() if m is module), "")
    names |= {f"{prefix}.{name}" for name, _ in module.named_parameters()}
    return {aliases.get(name, name) for name in names}


def _layer_of(module: str, layers: list[str]) -> int | None:
    for index, prefix in enumerate(layers):
        if module == prefix or module.startswith(prefix + "."):
            return index
    return None


def _child_of(module: str, layer: str) -> str:
    return module[len(layer) + 1 :].split(".")[0]


def _second_halves(
    model: PreTrainedModel, trace: Trace, layers: list[str], stored: dict[str, torch.Tensor]
) -> dict[int, str]:
    """For each layer the child that is called first behind the first heavy one and its end: where the second half
    begins.
    """
    result: dict[int, str] = {}
    by_layer: dict[int, list[tuple[str, int]]] = {}
    for call in dict.fromkeys(trace.calls):
        unit = trace.units[call]
        layer = _layer_of(unit.module, layers)
        if layer is not None:
            size = sum(stored[n].numel() for n in unit.tensors if n in stored)
            by_layer.setdefault(layer, []).append((_child_of(unit.module, layers[layer]), size))
    for layer, calls in by_layer.items():
        totals: dict[str, int] = {}
        for child, size in calls:
            totals[child] = totals.get(child, 0) + size
        heavy = [child for child, size in totals.items() if size >= _HEAVY * sum(totals.values())]
        if len(heavy) < 2:
            continue
        order = list(totals)
        result[layer] = order[order.index(heavy[0]) + 1]
    return result
