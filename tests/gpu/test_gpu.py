"""The pipeline on a CUDA device: `make test-gpu`. Larger models and the budget: benchmarks/gpu_correctness.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from harness import Pipeline, pack_checkpoint, random_prompts, relative_errors
from kv_sweeps import Written, append_random
from pipeline.pages_on_disk import pages_on_disk
from transformers import AutoModelForCausalLM

from pipo_ray.compiled.attend import CompiledAttention
from pipo_ray.compiled.support import instruction_set
from pipo_ray.model.dense_attention import attend
from pipo_ray.model.fused_rows import attend_row, can_attend
from pipo_ray.model.kv_host import HostKV
from pipo_ray.model.kv_low_bit import LowBitStore
from pipo_ray.model.kv_pool import KVPool
from pipo_ray.model.kv_spans import AttentionRule
from pipo_ray.model.kv_tiers import KVTiers
from pipo_ray.pipeline.device_ops import CudaOps
from pipo_ray.pipeline.host_functions import HostFunctions
from pipo_ray.plan.kv_pages import PAGE_TOKENS, KVPlacement, page_bytes, ram_units_for
from pipo_ray.quant.policy import Precision

pytestmark = pytest.mark.gpu
in_both_modes = pytest.mark.parametrize("num_slots", [None, 1], ids=["performance", "memory-saver"])
"""Of what a mode decides, this changes how pieces come to a GPU: memory-saver has one slot in RAM."""
_CHOSEN = [
    architecture for architecture in ARCHITECTURES if architecture.slug in ("llama", "gemma2", "gpt-oss", "qwen3-next")
]


@pytest.mark.parametrize("architecture", _CHOSEN, ids=lambda architecture: architecture.slug)
@pytest.mark.parametrize("gpu_resident_pieces", [0, 3])
@in_both_modes
def test_logits_are_transformers_own(
    architecture: Architecture, gpu_resident_pieces: int, num_slots: int | None, tmp_path: Path
) -> None:
    architecture.save(tmp_path / "checkpoint")
    packed = pack_checkpoint(tmp_path / "checkpoint", tmp_path / "store", torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", attn_implementation="eager").eval()
    prompts = random_prompts(packed.facts.vocab_size, (5, 23, 11))
    device = torch.device("cuda", 0)
    with Pipeline(packed, device=device, gpu_resident_pieces=gpu_resident_pieces, num_slots=num_slots) as pipeline:
        followed = pipeline.follow(prompts, [3, 20, 8])
    for tokens, ours in zip(prompts, followed, strict=True):
        with torch.inference_mode():
            wanted = reference(torch.tensor([tokens]), use_cache=False).logits[0]
        assert max(relative_errors(ours.logits.cpu(), wanted)) <= 1e-4


@pytest.mark.parametrize("precision", ["int4", "int8"])
@in_both_modes
def test_low_bit_weights_are_unpacked_on_the_gpu(precision: str, num_slots: int | None, tmp_path: Path) -> None:
    """The same store on the processor, whose products are tested against float64: equal but for bf16's roundings."""
    _CHOSEN[0].save(tmp_path / "checkpoint")
    packed = pack_checkpoint(
        tmp_path / "checkpoint", tmp_path / "store", torch.bfloat16, Precision.parse(precision), panel_bytes=1
    )
    prompts = random_prompts(packed.facts.vocab_size, (5, 23, 11))
    with Pipeline(packed) as pipeline:
        wanted = pipeline.follow(prompts, [3, 20, 8])
    device = torch.device("cuda", 0)
    with Pipeline(packed, device=device, gpu_resident_pieces=2, num_slots=num_slots) as pipeline:
        followed = pipeline.follow(prompts, [3, 20, 8])
    for ours, theirs in zip(followed, wanted, strict=True):
        assert max(relative_errors(ours.logits.cpu(), theirs.logits)) <= 0.05


@in_both_modes
def test_a_failed_sweep_is_begun_anew(num_slots: int | None, tmp_path: Path) -> None:
    _CHOSEN[0].save(tmp_path / "checkpoint")
    packed = pack_checkpoint(tmp_path / "checkpoint", tmp_path / "store", torch.float32)
    prompts = random_prompts(packed.facts.vocab_size, (5, 9))
    device = torch.device("cuda", 0)
    with Pipeline(packed, device=device, gpu_resident_pieces=2, num_slots=num_slots) as pipeline:
        undisturbed = pipeline.greedy(prompts, 6)
        layer = pipeline.model.model.layers[1].mlp
        handle = layer.register_forward_pre_hook(_fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            pipeline.greedy(prompts, 2)
        handle.remove()
        assert pipeline.greedy(prompts, 6) == undisturbed


@in_both_modes
def test_text_with_a_kv_cache_larger_than_the_gpu_holds(num_slots: int | None, tmp_path: Path) -> None:
    """Three layers of five pages need 15: of 12 none can stay."""
    _CHOSEN[0].save(tmp_path / "checkpoint")
    packed = pack_checkpoint(tmp_path / "checkpoint", tmp_path / "store", torch.float32)
    prompts = random_prompts(packed.facts.vocab_size, (150, 70))
    device = torch.device("cuda", 0)
    options = {"slot_bytes": 1 << 20, "chunk": 64, "device": device, "num_slots": num_slots}
    with Pipeline(packed, **options) as pipeline:
        wanted = pipeline.greedy(prompts, 40)
    with Pipeline(packed, **options, kv_pages=(14, 18)) as pipeline:
        assert pipeline.greedy(prompts, 40) == wanted
        assert pipeline.kv_tiers is not None
        assert pipeline.kv_tiers.loaded_bytes > 10 * pipeline.kv_tiers.unit_bytes


@pytest.mark.parametrize("architecture", _CHOSEN[:3], ids=lambda architecture: architecture.slug)
@in_both_modes
def test_logits_with_keys_and_values_in_ram(architecture: Architecture, num_slots: int | None, tmp_path: Path) -> None:
    """Chunks on the GPU, single tokens on the processor; in 16 bits by its kernel, if it has one."""
    architecture.save(tmp_path / "checkpoint")
    device = torch.device("cuda", 0)
    attention = None if instruction_set() is None else CompiledAttention(tmp_path / "code")
    calls = HostFunctions(device)
    for dtype, kernel, tolerance in ((torch.float32, None, 1e-4), (torch.bfloat16, attention, 0.05)):
        packed = pack_checkpoint(tmp_path / "checkpoint", tmp_path / f"store {dtype}", dtype)
        prompts = random_prompts(packed.facts.vocab_size, (60, 33, 21))
        with Pipeline(packed, device=device) as pipeline:
            wanted = pipeline.follow(prompts, [40, 3, 8], joins=[0, 2, 9])
        with Pipeline(
            packed, device=device, num_slots=num_slots,
            kv_store=lambda *_: HostKV(device, kernel, calls),  # type: ignore[arg-type, return-value]  # noqa: B023
        ) as pipeline:  # fmt: skip
            followed = pipeline.follow(prompts, [40, 3, 8], joins=[0, 2, 9])
        for ours, theirs in zip(followed, wanted, strict=True):
            assert max(relative_errors(ours.logits.cpu(), theirs.logits.cpu())) <= tolerance


@in_both_modes
def test_text_with_kv_pages_on_the_drive(num_slots: int | None, tmp_path: Path) -> None:
    _CHOSEN[0].save(tmp_path / "checkpoint")
    packed = pack_checkpoint(tmp_path / "checkpoint", tmp_path / "store", torch.float32)
    prompts = random_prompts(packed.facts.vocab_size, (900, 300))
    device = torch.device("cuda", 0)
    options = {"slot_bytes": 1 << 20, "chunk": 200, "device": device, "num_slots": num_slots}
    with Pipeline(packed, **options) as pipeline:
        wanted = pipeline.greedy(prompts, 40)
    with (
        pages_on_disk(packed.facts, tmp_path, 15) as kv_store,
        Pipeline(packed, **options, kv_store=kv_store) as pipeline,
    ):
        assert pipeline.greedy(prompts, 40) == wanted
        assert pipeline.runner._kv_store.loaded_pages > 10


@pytest.mark.parametrize("architecture", _CHOSEN[:2], ids=lambda architecture: architecture.slug)
@in_both_modes
def test_a_kv_cache_in_few_bits_is_that_of_the_processor(
    architecture: Architecture, num_slots: int | None, tmp_path: Path
) -> None:
    """Whose cache is tested against float64: equal but for float32's roundings, which turn a code here and there."""
    architecture.save(tmp_path / "checkpoint")
    packed = pack_checkpoint(tmp_path / "checkpoint", tmp_path / "store", torch.float32)
    prompts = random_prompts(packed.facts.vocab_size, (450, 230, 30))
    bits = (4,) * packed.facts.num_layers
    on_gpu = {"device": torch.device("cuda", 0), "num_slots": num_slots}
    logits = []
    for options in ({**on_gpu, "kv_bits": bits}, {"kv_bits": bits}, on_gpu):
        with Pipeline(packed, slot_bytes=1 << 20, chunk=200, **options) as pipeline:
            logits.append([one.logits.cpu() for one in pipeline.follow(prompts, [440, 200, 20])])
    few, processor, wide = (torch.cat(one) for one in logits)
    rounding = max(relative_errors(few, wide))
    assert rounding > 0.02, "4 bits change nothing here: the test shows nothing"
    assert max(relative_errors(few, processor)) <= 0.1 * rounding


@pytest.mark.parametrize("bits", [(4, 4, 4), (4, 8, 4)])
def test_packed_pages_on_the_drive_give_the_logits_of_those_on_the_gpu(bits: tuple[int, ...], tmp_path: Path) -> None:
    """Bit by bit: chunks are the same, wherever the pages come from."""
    _CHOSEN[0].save(tmp_path / "checkpoint")
    packed = pack_checkpoint(tmp_path / "checkpoint", tmp_path / "store", torch.float32)
    prompts = random_prompts(packed.facts.vocab_size, (1900, 300))
    options = {"slot_bytes": 1 << 20, "chunk": 500, "device": torch.device("cuda", 0)}
    with Pipeline(packed, kv_bits=bits, **options) as pipeline:
        wanted = pipeline.follow(prompts, [1880, 280])
    with pages_on_disk(packed.facts, tmp_path, 12, bits) as disk:
        stores = []

        def store(dtype: torch.dtype, ops: object) -> LowBitStore:
            stores.append(disk(dtype, ops))
            return LowBitStore(bits, None, stores[0])

        with Pipeline(packed, kv_store=store, **options) as pipeline:
            followed = pipeline.follow(prompts, [1880, 280])
    for ours, theirs in zip(followed, wanted, strict=True):
        assert torch.equal(ours.logits, theirs.logits)
    assert stores[0].loaded_pages > 10


def test_kv_pages_are_bit_identical_through_the_tiers() -> None:
    """Of Llama-3-8B's width; sequences join and leave, so that layers are demoted and promoted."""
    layers, shape = 6, (8, 128, 128)
    nbytes = page_bytes(layers * 4096, layers)
    device = torch.device("cuda", 0)
    ops = CudaOps(device)
    tiers = KVTiers(KVPlacement((1,) * layers, nbytes, 100, ram_units_for((1,) * layers, 40, 100)), torch.bfloat16, ops)
    live: list[Written] = []
    for sweep in range(40):
        if sweep in (0, 3, 6, 20):
            live.append(Written(tiers.open(10 * PAGE_TOKENS)))
        if sweep in (14, 18):
            tiers.drop(live.pop(0).cache)
        batch = [(one, 200 if one.cache.length == 0 else 1 + sweep % 3) for one in live]
        append_random(tiers, batch, layers, shape=shape)
    assert tiers.loaded_bytes > tiers.saved_bytes > 0
    tiers._pinning.join()
    ops.synchronize()
    ops.unpin_all()  # before the memory is unmapped: the driver may want the addresses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("heads, kv_heads, dim", [(8, 2, 64), (4, 4, 128), (6, 1, 256)])
def test_a_row_in_one_call_is_every_sequence_alone(
    dtype: torch.dtype, window: int | None, heads: int, kv_heads: int, dim: int
) -> None:
    """Prompts, chunks and single tokens side by side, with gaps between them in the pool."""
    device = torch.device("cuda", 0)
    torch.manual_seed(0)
    pool = KVPool(400, device)
    caches = [pool.open(capacity) for capacity in (60, 30, 90, 41)]
    caches[1].drop()
    del caches[1]
    for counts in ((33, 50, 1), (1, 20, 12), (1, 1, 1)):
        batch = list(zip(caches, counts, strict=True))
        pool.begin_sweep(batch)
        assert pool.row is not None
        query = torch.randn(sum(counts), heads, dim, device=device, dtype=dtype)
        key, value = (torch.randn(1, kv_heads, sum(counts), dim, device=device, dtype=dtype) for _ in range(2))
        assert can_attend(query, value, None, None)
        keys, values = pool.layer(0, key[0], value[0])
        for memory, new in ((keys, key), (values, value)):
            memory.index_copy_(0, pool.row.places, new[0].transpose(0, 1))
        got = attend_row(query, keys, values, pool.row, dim**-0.5, window)
        start = 0
        for cache, count in batch:
            cache.advance(count)
            own = slice(cache.first, cache.first + cache.length)
            wanted = attend(
                query[start : start + count].transpose(0, 1).float(), keys[own].transpose(0, 1).float(),
                values[own].transpose(0, 1).float(), AttentionRule(dim**-0.5, window),
            )  # fmt: skip
            torch.testing.assert_close(got[start : start + count].float(), wanted.transpose(0, 1), rtol=0.02, atol=0.02)
            start += count


def _fail(*_: object) -> None:
    raise RuntimeError("on purpose")
