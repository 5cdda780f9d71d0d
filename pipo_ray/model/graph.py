"""The module graph: transformers' own modules with parameters on the meta device and real buffers."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipo_ray.errors import CheckpointError, InputError, UnsupportedModelError
from pipo_ray.model.lean_transformers import without_compiler
from pipo_ray.model.registry import require_supported

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

logging.getLogger("transformers").setLevel(logging.ERROR)


def load_config(folder: str | Path) -> PretrainedConfig:
    """The configuration of the checkpoint or block store in `folder`.

    Raises CheckpointError if there is none, UnsupportedModelError for an architecture that transformers does not know
    as a decoder-only language model.
    """
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); give a checkpoint folder") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); download the checkpoint again") from error
    model_type = require_supported(raw if isinstance(raw, dict) else {}, path)
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModelError(
            f"{path}: architecture {model_type!r} is not a decoder-only language model that the installed transformers "
            "knows; use a causal language model or a newer transformers"
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a config that contradicts itself
        raise CheckpointError(
            f"{path}: not a valid {model_type} configuration: {_one_line(error)}; use the config.json that belongs to "
            "these weights"
        ) from error
    # What the weights were quantized with is past: in the store, and in the graph, they are ours.
    for one in (config, config.get_text_config()):
        if hasattr(one, "quantization_config"):
            del one.quantization_config
    return config


def resolve_dtype(name: str, config: PretrainedConfig) -> torch.dtype:
    """The dtype named by `--dtype`: "auto" is the checkpoint's own (float32 if it names none)."""
    if name == "auto":
        own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
        if isinstance(own, str):
            own = getattr(torch, own, None)
        return own if isinstance(own, torch.dtype) and own in DTYPES.values() else torch.float32
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is not known; one of auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def build_graph(
    config: PretrainedConfig, dtype: torch.dtype, *, attention: str, device: torch.device | None = None
) -> PreTrainedModel:
    """The model of `config` in evaluation mode: parameters and persistent buffers on meta in their run-time dtypes,
    other buffers real.

    `attention` is the attention implementation ("eager", "sdpa" or a registered one). With `device` None the buffers
    stay on meta too, for tracing. Parameters keep float32 where transformers declares so
    (`_keep_in_fp32_modules_strict`).
    """
    try:
        model = meta_model(config, dtype, attention)
    except Exception as error:
        raise UnsupportedModelError(
            f"architecture {config.model_type!r}: transformers cannot build it: {_one_line(error)}"
        ) from error
    model.eval()
    model.requires_grad_(False)
    _apply_dtype_plan(model, dtype)
    set_experts_implementation(model, "eager")
    if device is not None:
        _materialize_buffers(model, device)
    return model


def meta_model(config: PretrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The model with everything on meta, built without torch's Python kernels for meta tensors where that works."""
    for mode in (_NativeKernels(), contextlib.nullcontext()):
        try:
            with torch.device("meta"), without_compiler(), mode:
                model: PreTrainedModel = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, attn_implementation=attention
                )
            break
        except Exception:
            if not isinstance(mode, _NativeKernels):
                raise
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                module._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
    return model


class _NativeKernels(TorchFunctionMode):
    """Keeps away from meta tensors what torch computes for them in Python, because that imports sympy, which stays
    (30 MiB, half a second): random numbers are left out, and what begins with `arange` is really computed.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        if func is torch.arange and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def set_experts_implementation(model: PreTrainedModel, name: str) -> None:
    """Choose how fused experts run, in every configuration object the modules hold."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            config._experts_implementation = name


def stored_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, each tied tensor once under its canonical name."""
    state: dict[str, torch.Tensor] = model.state_dict()
    for alias in tied_aliases(model):
        state.pop(alias, None)
    return state


def tied_aliases(model: PreTrainedModel) -> dict[str, str]:
    """Tied tensors: alias name -> canonical name."""
    return dict(getattr(model, "all_tied_weights_keys", {}) or {})


def _apply_dtype_plan(model: PreTrainedModel, dtype: torch.dtype) -> None:
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    from transformers.core_model_loading import build_glob_alternation

    pattern, by_group, _ = build_glob_alternation(list(plan))
    for name, parameter in list(model.named_parameters()):
        match = pattern.search(name)
        if match is not None and match.lastgroup is not None:
            owner, _, leaf = name.rpartition(".")
            wanted = plan[by_group[match.lastgroup]]
            model.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(parameter.to(wanted), requires_grad=False)


def _materialize_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Give non-persistent buffers (rotary frequencies, masks, scales) the values that transformers' own initialisation
    computes.
    """
    persistent = set(model.state_dict())
    for name, parameter in model.named_parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        del name
    for name, buffer in list(model.named_buffers()):
        if name in persistent:
            buffer._is_hf_initialized = True  # type: ignore[attr-defined]
            continue
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = torch.empty(buffer.shape, dtype=buffer.dtype)
    with torch.no_grad(), without_compiler():
        model.initialize_weights()
    for name, buffer in list(model.named_buffers()):
        if name not in persistent:
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._buffers[leaf] = buffer.to(device)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def context_length(config: PretrainedConfig) -> int:
    """The longest context in tokens: `max_position_embeddings` or its older names; 2**20 where the architecture has no
    limit.
    """
    text: Any = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 1 << 20
