"""A GGUF file's configuration, tokenizer and names of tensors, by transformers' own support for GGUF."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers import modeling_gguf_pytorch_utils as theirs
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipo_ray.errors import CheckpointError, UnsupportedModelError
from pipo_ray.quant.foreign.checkpoint import ForeignCheckpoint
from pipo_ray.quant.foreign.detect import SourceFormat, plain_config
from pipo_ray.quant.foreign.gguf_blocks import FORMATS, Array, GgufWeight, StackedWeight, can_read
from pipo_ray.quant.foreign.reading import TensorFiles
from pipo_ray.quant.foreign.weight import ForeignWeight, Survey
from pipo_ray.quant.formats import LowBitFormat
from pipo_ray.store.checkpoint import Checkpoint
from pipo_ray.store.gguf_file import GgufFile
from pipo_ray.store.safetensors_file import TensorHeader

_EXPERTS = theirs.Qwen2MoeTensorProcessor.GGUF_MOE_WEIGHTS_PATTERN
ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe", "gemma2")
"""Of which tests have seen that everything in the file gets into configuration and weights. transformers reads others,
too, but of some it loses sizes, scales or biases without a word.
"""

_ROPE_FACTORS = "rope_freqs.weight"
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_MOST_FACTOR_ERROR = 1e-3

# What transformers' mapping (5.23) leaves out and then takes from its defaults: by architecture.
_FORGOTTEN = {
    "qwen3": {"attention.key_length": "head_dim"},
    "qwen3moe": {"expert_feed_forward_length": "moe_intermediate_size"},
    "gemma2": {
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
}
_GEMMA2_27B_LAYERS = 46

_SCRATCH = "pipo-gguf-"
_SCRATCH_AGE_S = 60.0
"""A folder that is younger may not be locked yet."""


@dataclass(frozen=True)
class GgufCheckpoint(Checkpoint):
    """A GGUF file with its configuration and tokenizer written to `folder`; `file` is itself."""

    file: GgufFile = field(kw_only=True)
    reader: Any = field(kw_only=True)

    @property
    def origin(self) -> Path:
        """The file."""
        return self.file.folder

    def fingerprint(self) -> str:
        """As the file's."""
        return self.file.fingerprint()

    @cached_property
    def label(self) -> str:
        """For people: "GGUF Q4_K, Q6_K"."""
        kinds = Counter(tensor.tensor_type.name for tensor in self.reader.tensors if len(tensor.shape) > 1)
        return f"GGUF {', '.join(name for name, _ in kinds.most_common())}"


@contextmanager
def opened_gguf(file: GgufFile) -> Iterator[GgufCheckpoint]:
    """`file` with a temporary folder for its configuration and tokenizer, in the form of a checkpoint's.

    Raises CheckpointError for a damaged file, UnsupportedModelError for an architecture or a tokenizer that
    transformers does not read out of GGUF, or that we cannot.
    """
    path = file.folder
    try:
        reader = gguf.GGUFReader(path)
        architecture = str(theirs.read_field(reader, "general.architecture")[0])
    except Exception as error:  # the library raises what numpy and struct do
        raise CheckpointError(
            f"GGUF file {path} cannot be read ({type(error).__name__}: {_one_line(error)}); it is truncated or "
            "damaged: download it again"
        ) from error
    if architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{path}: GGUF files of architecture {architecture!r} cannot be read, only {', '.join(ARCHITECTURES)}; "
            "give its safetensors checkpoint"
        )
    if architecture == "llama" and _field(reader, "llama.expert_count"):
        raise UnsupportedModelError(f"{path}: GGUF files of Mixtral cannot be read; give its safetensors checkpoint")
    for tensor in reader.tensors:
        if not can_read(tensor.tensor_type):
            raise UnsupportedModelError(
                f"{path}: tensor {tensor.name!r} is {tensor.tensor_type.name}, which the installed gguf library cannot "
                "dequantize; use a file of another type, such as Q4_K_M or Q8_0"
            )
    with _scratch_folder() as folder:
        try:
            config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
        except Exception as error:
            raise UnsupportedModelError(
                f"{path}: transformers makes no configuration of this file of architecture {architecture!r} "
                f"({_one_line(error)}); give its safetensors checkpoint"
            ) from error
        _complete(config, reader, architecture, path)
        config.dtype = torch.bfloat16
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "")]
        config.save_pretrained(folder)
        _write_tokenizer(reader, path, folder)
        raw = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        raw["quantization_config"] = {"quant_method": "gguf"}
        checkpoint = GgufCheckpoint(Path(folder), raw, (), {}, {}, file=file, reader=reader)
        with checkpoint:
            yield checkpoint


@contextmanager
def _scratch_folder() -> Iterator[str]:
    """A temporary folder, locked while it is used; what killed processes left is removed."""
    for left in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        with suppress(OSError):  # in use, or another user's
            if time.time() - left.stat().st_mtime > _SCRATCH_AGE_S:
                with _locked(left):
                    shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=_SCRATCH) as folder, _locked(Path(folder)):
        yield folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises BlockingIOError if another process has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def view_gguf(checkpoint: GgufCheckpoint, model: PreTrainedModel) -> ForeignCheckpoint:
    """The file's tensors under the names of `model`'s state dict.

    Raises CheckpointError for a tensor whose processing is not known.
    """
    path = checkpoint.origin
    headers: dict[str, TensorHeader] = {}
    for tensor in checkpoint.reader.tensors:
        rows = math.prod(tensor.shape.tolist()[1:])
        shape = (rows, int(tensor.n_bytes) // rows)
        headers[tensor.name] = TensorHeader(tensor.name, "U8", shape, int(tensor.data_offset), int(tensor.n_bytes))
    inner = (checkpoint._descriptors, checkpoint._buffered, checkpoint._buffers, checkpoint._lock)
    raw = Checkpoint(path, {}, (), headers, dict.fromkeys(headers, path), *inner)
    weights = _Names(checkpoint, model, TensorFiles(raw)).weights()
    tensors = {
        name: TensorHeader(name, "F32", weight.shape, 0, 4 * math.prod(weight.shape))
        for name, weight in weights.items()
    }
    return ForeignCheckpoint(
        checkpoint.folder, plain_config(checkpoint.config), (), tensors, dict.fromkeys(tensors, path), *inner,
        source=SourceFormat("gguf", checkpoint.label, True, {}), weights=weights, survey=Survey(0, 0), whole=checkpoint,
    )  # fmt: skip


class _Names:
    """From a file's tensors to a model's."""

    def __init__(self, checkpoint: GgufCheckpoint, model: PreTrainedModel, files: TensorFiles) -> None:
        self._path, self._files = checkpoint.origin, files
        self._tensors = {tensor.name: tensor for tensor in checkpoint.reader.tensors}
        architecture = str(theirs.read_field(checkpoint.reader, "general.architecture")[0])
        self._processor = _processor(architecture, model.config.get_text_config().to_dict())
        try:
            self._names: dict[str, str] = theirs.get_gguf_hf_weights_map(model, self._processor)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"{self._path}: the tensors of architecture {architecture!r} have no names that transformers knows "
                f"({_one_line(error)}); give its safetensors checkpoint"
            ) from error

    def weights(self) -> dict[str, ForeignWeight]:
        """By the model's name."""
        result: dict[str, ForeignWeight] = {}
        stacks: dict[str, dict[str, GgufWeight]] = {}
        for key in self._tensors:
            if isinstance(self._processor, theirs.Qwen2MoeTensorProcessor) and (found := _EXPERTS.fullmatch(key)):
                if (name := self._names.get(found["name"])) is not None:
                    stacks.setdefault(name, {})[found["w"]] = self._weight(name, key)
            elif (name := self._names.get(key)) is not None:
                result[name] = self._processed(name, key)
            elif key != _ROPE_FACTORS:
                raise UnsupportedModelError(
                    f"{self._path}: the architecture has no place for tensor {key!r}, and would not be this model "
                    "without it; give its safetensors checkpoint"
                )
        for name, parts in stacks.items():
            wanted = ("down",) if "down" in parts else ("gate", "up")
            if set(parts) != set(wanted):
                raise CheckpointError(f"GGUF file {self._path}: {name!r} lacks its gate or its up; download it again")
            result[name] = _stacked(name, tuple(parts[one] for one in wanted))
        return result

    def _weight(self, name: str, key: str) -> GgufWeight:
        tensor = self._tensors[key]
        shape = tuple(reversed(tensor.shape.tolist()))
        kind = tensor.tensor_type
        return GgufWeight(name, shape, self._path, FORMATS.get(kind), self._files, key, kind)

    def _processed(self, name: str, key: str) -> GgufWeight:
        """With what transformers does to it: found by having it done to the numbers of the rows, or to a small tensor
        when it is read.
        """
        weight = self._weight(name, key)
        shape = weight.shape

        def processed(values: Array) -> Array:
            found: Array = self._processor.process(values, name=key).weights
            return found

        if len(shape) == 1:
            empty = processed(np.zeros(shape, np.float32))
            return GgufWeight(
                name, empty.shape, self._path, None, self._files, key, weight.kind, None,
                lambda values: processed(values.reshape(shape)),
            )  # fmt: skip
        numbers = np.arange(math.prod(shape[:-1])).reshape(*shape[:-1], 1)
        order = processed(numbers)
        if order.shape != numbers.shape or sorted(order.reshape(-1)) != list(range(numbers.size)):
            raise CheckpointError(
                f"GGUF file {self._path}: how {key!r} is to be read is not known; give a safetensors checkpoint"
            )
        if np.array_equal(order, numbers):
            return weight
        return GgufWeight(name, shape, self._path, weight.low_bit, self._files, key, weight.kind, order.reshape(-1))


def _stacked(name: str, parts: tuple[GgufWeight, ...]) -> ForeignWeight:
    if len(parts) == 1:
        return parts[0]
    experts, _, columns = parts[0].shape
    shape = (experts, sum(part.shape[1] for part in parts), columns)
    formats = [part.low_bit for part in parts if part.low_bit is not None]
    low_bit = None
    if len(formats) == len(parts):
        low_bit = LowBitFormat(4, min(one.group for one in formats), all(one.symmetric for one in formats))
    return StackedWeight(name, shape, parts[0].file, low_bit, parts)


def _processor(architecture: str, config: dict[str, Any]) -> Any:
    return theirs.TENSOR_PROCESSORS.get(architecture, theirs.TensorProcessor)(config=config)


def _field(reader: Any, name: str) -> Any:
    found = theirs.read_field(reader, name)
    return found[0] if found else None


def _complete(config: Any, reader: Any, architecture: str, path: Path) -> None:
    """Put into `config` what transformers leaves out, or refuse what it would ignore."""
    for key, name in _FORGOTTEN.get(architecture, {}).items():
        if (value := _field(reader, f"{architecture}.{key}")) is not None:
            setattr(config, name, value)
    if architecture == "gemma2":
        # llama.cpp knows it by the number of layers, too (`llama_model::load_hparams`): the file does not say it.
        largest = config.num_hidden_layers == _GEMMA2_27B_LAYERS
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if largest else config.head_dim
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if _ROPE_FACTORS in tensors:
        _set_llama3_rope(config, np.array(tensors[_ROPE_FACTORS].data, np.float32).reshape(-1), path)
        return
    scaling = _field(reader, f"{architecture}.rope.scaling.type")
    if scaling not in (None, "none"):
        raise UnsupportedModelError(
            f"{path}: its positions are scaled ({scaling!r}), which transformers does not read out of GGUF; give its "
            "safetensors checkpoint"
        )


def _set_llama3_rope(config: Any, factors: Array, path: Path) -> None:
    """The file has each frequency's divisor: those of Llama 3.1 and later, or they are refused."""
    theta = config.rope_parameters["rope_theta"]
    scaling = {"rope_type": "llama3", "factor": float(factors.max()), **_LLAMA3_ROPE, "rope_theta": theta}
    plain = 1.0 / theta ** (np.arange(0, 2 * len(factors), 2) / (2 * len(factors)))
    if np.abs(plain / llama3_frequencies(plain, scaling) / factors - 1).max() > _MOST_FACTOR_ERROR:
        raise UnsupportedModelError(f"{path}: its RoPE factors are not Llama 3's; give its safetensors checkpoint")
    config.rope_parameters = scaling


def llama3_frequencies(plain: Array, scaling: dict[str, Any]) -> Array:
    """RoPE's frequencies, scaled as Llama 3.1's are. Source: `_compute_llama3_parameters` in transformers."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    smooth = np.clip((share - low) / (high - low), 0.0, 1.0)
    result: Array = (1 - smooth) * plain / scaling["factor"] + smooth * plain
    return result


def _write_tokenizer(reader: Any, path: Path, folder: str) -> None:
    """Nothing where the file has none: prompts are token ids then."""
    if _field(reader, "tokenizer.ggml.model") in (None, "none", "no_vocab"):
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
        tokenizer.save_pretrained(folder)
    except Exception as error:
        raise UnsupportedModelError(
            f"{path}: transformers makes no tokenizer of this file ({_one_line(error)}); give its safetensors "
            "checkpoint"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
