"""Which foreign format a checkpoint is in, by its config.json. Imports no torch: known before anything is started."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipo_ray.errors import CheckpointError, UnsupportedModelError

SOURCE_KEY = "source_format"
"""Of what the checkpoint's format was and what became of it, in the manifest's `extra`: see `describe.py`."""

KNOWN = "GPTQ, AWQ, compressed-tensors, fine-grained FP8, MXFP4 and GGUF"
_INSTEAD = "give a checkpoint in bf16, fp16 or fp32, or in one of these"


@dataclass(frozen=True)
class SourceFormat:
    """A checkpoint's own format. `label` is for people; `has_codes` says whether some of its weights may be kept as
    they are in a format of ours; `settings` is config.json's `quantization_config`.
    """

    method: str
    label: str
    has_codes: bool
    settings: Mapping[str, Any]


def source_format(config: Mapping[str, Any], where: object) -> SourceFormat | None:
    """The format of the checkpoint `where` with this config.json; None if its weights are not quantized.

    Raises UnsupportedModelError naming a method, a bit width or a variant that cannot be read, CheckpointError for a
    configuration that contradicts itself.
    """
    settings = quantization_settings(config)
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"{where}: quantization_config is {str(settings)[:80]!r}, not an object; {_INSTEAD}")
    method = settings.get("quant_method")
    known = {
        "gptq": _gptq,
        "awq": _awq,
        "compressed-tensors": _compressed_tensors,
        "fp8": _fp8,
        "mxfp4": _mxfp4,
        "gguf": lambda settings: SourceFormat("gguf", "GGUF", True, settings),
    }
    if not isinstance(method, str) or method not in known:
        raise UnsupportedModelError(
            f"{where}: weights quantized with {method!r} cannot be read; known are {KNOWN}: {_INSTEAD}"
        )
    try:
        return known[method](settings)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{where}: {error}; {_INSTEAD}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}; use the config.json that belongs to these weights") from error


def quantization_settings(config: Mapping[str, Any]) -> Any:
    """config.json's `quantization_config`, of the model or of its text part; None without one."""
    text = config.get("text_config")
    for fields in (config, text if isinstance(text, Mapping) else {}):
        for name in ("quantization_config", "compression_config"):
            if fields.get(name):
                return fields[name]
    return None


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` as it would be if the weights were not quantized."""
    result = {
        name: value for name, value in config.items() if name not in ("quantization_config", "compression_config")
    }
    if isinstance(text := result.get("text_config"), Mapping):
        result["text_config"] = plain_config(text)
    return result


def whole_number(settings: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """The whole number called `name`. Raises CheckpointError."""
    value = settings.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"quantization_config has {name} {value!r}, a whole number is needed")
    return value


def groups_label(group: int) -> str:
    """Of a group size in columns; -1 is a whole row."""
    return "one group per row" if group == -1 else f"groups of {group}"


def _checked_group(settings: Mapping[str, Any]) -> int:
    group = whole_number(settings, "group_size", -1)
    if group != -1 and group < 1:
        raise CheckpointError(f"quantization_config has group_size {group}; it is -1 for a whole row, or 1 and more")
    return group


def _refuse_exceptions(settings: Mapping[str, Any], bits: int, group: int) -> None:
    """GPTQModel's `dynamic` has settings of its own for the modules that a pattern matches. One that begins with "-"
    says that they are not quantized.
    """
    dynamic = settings.get("dynamic")
    for pattern, own in (dynamic if isinstance(dynamic, Mapping) else {}).items():
        if pattern.startswith("-") or not isinstance(own, Mapping):
            continue
        if (own.get("bits", bits), own.get("group_size", group)) != (bits, group):
            raise UnsupportedModelError(
                f"other bits or groups for some modules, here {pattern!r} of `dynamic`, cannot be read, only the same "
                "for all"
            )


def _gptq(settings: Mapping[str, Any]) -> SourceFormat:
    bits, group = whole_number(settings, "bits"), _checked_group(settings)
    _refuse_exceptions(settings, bits, group)
    if bits not in (2, 3, 4, 8):
        raise UnsupportedModelError(f"GPTQ with {bits} bits cannot be read, only 2, 3, 4 and 8")
    layout = settings.get("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise UnsupportedModelError(f"GPTQ stored as {layout!r} cannot be read, only 'gptq' and 'gptq_v2'")
    return SourceFormat("gptq", f"GPTQ int{bits}, {groups_label(group)}", bits in (4, 8), settings)


def _awq(settings: Mapping[str, Any]) -> SourceFormat:
    bits = whole_number(settings, "bits" if "bits" in settings else "w_bit")
    name = "group_size" if "group_size" in settings else "q_group_size"
    group = whole_number(settings, name, 128)
    _refuse_exceptions(settings, bits, group)
    version = str(settings.get("version", "gemm")).lower()
    if bits != 4:
        raise UnsupportedModelError(f"AWQ with {bits} bits cannot be read, only 4")
    if version != "gemm":
        raise UnsupportedModelError(f"AWQ stored for {version!r} cannot be read, only 'gemm'")
    return SourceFormat("awq", f"AWQ int4, {groups_label(group)}", True, settings)


def _fp8(settings: Mapping[str, Any]) -> SourceFormat:
    layout = settings.get("fmt", "e4m3")
    if layout not in ("e4m3", "float8_e4m3fn"):
        raise UnsupportedModelError(f"FP8 in {layout!r} cannot be read, only e4m3")
    size = settings.get("weight_block_size")
    if size is None:
        return SourceFormat("fp8", "FP8, a scale per row or tensor", False, settings)
    if not (isinstance(size, list) and len(size) == 2 and all(type(one) is int and one > 0 for one in size)):
        raise CheckpointError(f"quantization_config has weight_block_size {size!r}, two sizes are needed")
    return SourceFormat("fp8", f"FP8, blocks of {size[0]} x {size[1]}", False, settings)


def _mxfp4(settings: Mapping[str, Any]) -> SourceFormat:
    return SourceFormat("mxfp4", "MXFP4, groups of 32", False, settings)


def _compressed_tensors(settings: Mapping[str, Any]) -> SourceFormat:
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError("quantization_config has no config_groups")
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise UnsupportedModelError(f"compressed-tensors with sparsity {sparsity['format']!r} cannot be read")
    if settings.get("transform_config"):
        raise UnsupportedModelError("compressed-tensors with transforms of the activations cannot be read")
    labels = []
    has_codes = False
    for scheme in groups.values():
        weights = scheme.get("weights") if isinstance(scheme, Mapping) else None
        if weights is None:
            continue
        label, codes = _compressed_scheme(weights, scheme.get("format") or settings.get("format"))
        labels.append(label)
        has_codes = has_codes or codes
    if not labels:
        raise CheckpointError("quantization_config's config_groups quantize no weights")
    return SourceFormat(
        "compressed-tensors", f"compressed-tensors {' and '.join(dict.fromkeys(labels))}", has_codes, settings
    )


def _compressed_scheme(weights: Mapping[str, Any], layout: object) -> tuple[str, bool]:
    kind, bits = weights.get("type", "int"), whole_number(weights, "num_bits", 8)
    strategy = weights.get("strategy")
    if layout not in ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized"):
        raise UnsupportedModelError(
            f"compressed-tensors stored as {layout!r} cannot be read, only 'pack-quantized', 'int-quantized', "
            "'naive-quantized' and 'float-quantized'"
        )
    packed = layout == "pack-quantized"
    if (kind, bits) not in ((("int", 4), ("int", 8)) if packed else (("int", 8), ("float", 8))):
        raise UnsupportedModelError(
            f"compressed-tensors {kind}{bits} stored as {layout!r} cannot be read, only int4, int8 and 8-bit float"
        )
    if strategy not in ("tensor", "channel", "group", "block"):
        raise UnsupportedModelError(f"compressed-tensors with a scale per {strategy!r} cannot be read")
    grid = groups_label(whole_number(weights, "group_size")) if strategy == "group" else f"a scale per {strategy}"
    return f"{'FP8' if kind == 'float' else f'int{bits}'}, {grid}", kind == "int"
