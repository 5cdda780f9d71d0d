"""Quantize a small random Llama with GPTQModel, save it, and say what it reads out of the file: `... OPTIONS`.

Runs in gptqmodel's environment, on the CPU. The options, JSON: `folder`, and `cases`, by name what makes GPTQModel's
QuantizeConfig. For each of them, in `folder`:

    NAME/                 the checkpoint, as GPTQModel's writer leaves it
    NAME.safetensors      after it was loaded again with the plain torch kernel, of every quantized matrix
        MODULE.codes          uint8 [rows, columns], by GPTQModel's own unpacking
        MODULE.points         uint8 [rows, groups], the zero points likewise, after its conversion of version 1
        MODULE.scales         float16 [rows, groups]
        MODULE.group_of       int32 [columns], the group of each column
        MODULE.values         float16 [rows, columns], what the kernel multiplies with
        tokens, logits        a prompt's ids, and the model's own logits in float32 [tokens, vocabulary]
                          Metadata: the case's settings, and the versions, as JSON. What is there already stays.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

# Dequantizing is compiled otherwise, matrix by matrix: slow, and no reference. It wants two workers, and takes one on
# two cores.
os.environ |= {"TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "", "GPTQMODEL_CPU_WORKERS": "2"}

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm, reverse_awq_order, unpack_awq
from gptqmodel.utils.model_dequant import unpack_cols, unpack_rows
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY, PROMPT, TEXTS = 64, 24, 16
# AWQ's search for the best clipping wants rows that 64 divides.
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
}  # fmt: skip
BACKENDS = {"gptq": BACKEND.GPTQ_TORCH, "awq": BACKEND.AWQ_TORCH}


def random_llama(folder: Path) -> None:
    """Rows of one sign are among its matrices, so that some zero points are the least and the greatest code."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.05, dtype="float16")).half()
    for name, weight in model.named_parameters():
        if "_proj" in name:
            weight.data[::8].abs_().add_(0.02)
            weight.data[1::8].abs_().add_(0.02).neg_()
    model.save_pretrained(folder)
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "w0")),
        unk_token="w0",
        bos_token="w1",
        eos_token="w2",
        pad_token="w2",
    )
    tokenizer.save_pretrained(folder)


def quantize(plain: Path, folder: Path, settings: dict[str, Any]) -> None:
    """Calibrated with random tokens."""
    config = QuantizeConfig(**settings, device="cpu", offload_to_disk=False)
    model = GPTQModel.load(str(plain), config, dtype=torch.float16)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, VOCABULARY, (64,), generator=generator).tolist() for _ in range(TEXTS)]
    examples = [{"input_ids": text, "attention_mask": [1] * len(text)} for text in texts]
    model.quantize(examples, batch_size=1, backend=BACKENDS[settings["method"]])
    model.save(str(folder))


def read_back(folder: Path, method: str) -> dict[str, torch.Tensor]:
    """See above."""
    model = GPTQModel.load(str(folder), backend=BACKENDS[method], device="cpu", dtype=torch.float16)
    found: dict[str, torch.Tensor] = {}
    for name, module in model.model.named_modules():
        if isinstance(module, TorchLinear):
            found |= _parts(
                name,
                unpack_rows(module.qweight, module.bits),
                unpack_cols(module.qzeros, module.bits),
                module.scales,
                module.g_idx,
                TorchLinear.dequantize_weight(module),
            )
        elif isinstance(module, AwqTorchLinear):
            packed = (module.qweight, module.qzeros)
            codes, points = reverse_awq_order(*unpack_awq(*packed, module.bits), module.bits)
            values = dequantize_gemm(*packed, module.scales, module.bits, module.group_size)
            groups = torch.arange(len(codes), dtype=torch.int32) // module.group_size
            found |= _parts(name, codes & 15, points & 15, module.scales, groups, values)
    if not found:
        raise SystemExit(f"{folder}: no module of the torch kernel")
    tokens = torch.randint(3, VOCABULARY, (1, PROMPT), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        logits = model.model(input_ids=tokens).logits[0]
    return found | {"tokens": tokens[0], "logits": logits.float()}


def _parts(
    name: str,
    codes: torch.Tensor,
    points: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    values: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The matrices lie transposed."""
    assert scales.dtype == values.dtype == torch.float16
    return {
        f"{name}.codes": codes.T.to(torch.uint8).contiguous(),
        f"{name}.points": points.T.to(torch.uint8).contiguous(),
        f"{name}.scales": scales.T.contiguous(),
        f"{name}.group_of": groups.clone(),
        f"{name}.values": values.T.contiguous(),
    }


def main() -> None:
    """Every case."""
    options = json.loads(sys.argv[1])
    folder = Path(options["folder"])
    versions = {name: metadata.version(name) for name in ("gptqmodel", "torch", "transformers")}
    random_llama(folder / "plain")
    for name, settings in options["cases"].items():
        about = {"settings": json.dumps(settings), "versions": json.dumps(versions), "shape": json.dumps(SHAPE)}
        file = folder / f"{name}.safetensors"
        if file.exists() and _metadata(file) == about:
            continue
        shutil.rmtree(folder / name, ignore_errors=True)
        quantize(folder / "plain", folder / name, settings)
        save_file(read_back(folder / name, settings["method"]), file, metadata=about)
        print(name, flush=True)


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        found: dict[str, str] = opened.metadata() or {}
    return found


if __name__ == "__main__":
    main()
