"""What every test relies on: no network, a cache of its own, random checkpoints, and nothing left behind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from memory_saver import small_staging
from side_by_side import Turns, by_files

LEFTOVER_DEADLINE_S = 10.0  # what the watcher may take to clean up after a killed driver
TEST_RUN = uuid.uuid4().hex
CACHE = pytest.StashKey[Path]()
TURNS = pytest.StashKey["Turns | None"]()
_SESSION_FOLDER = re.compile(r"\.?pipo-[0-9a-f]{8}(-\d+-\d+)?")

with contextlib.suppress(ImportError):  # the GPU machine has pytest but not hypothesis
    import hypothesis

    hypothesis.settings.register_profile("pipo", deadline=None)
    hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
    hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "pipo")


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment before anything of ours, torch or transformers is imported. Ray's processes inherit it."""
    # A shell starts what runs in its background deaf to Ctrl-C, and the programs under test would inherit that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[CACHE] = Path(tempfile.mkdtemp(prefix="pytest-pipo-"))
    shared = getattr(config, "workerinput", {}).get("turns")
    config.stash[TURNS] = None if shared is None else Turns(Path(shared))
    os.environ |= {
        "PIPO_TEST_RUN": TEST_RUN,
        "PIPO_CACHE": str(config.stash[CACHE]),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    os.environ.setdefault("OMP_NUM_THREADS", str(min(4, len(os.sched_getaffinity(0)))))
    small_staging.install()
    # As in the compute worker. Threads that spin at every small product take an occupied core from those they wait for.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[CACHE], ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


# --- several processes (make test) -----------------------------------------------------------------------------------


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return by_files(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["turns"] = str(node.config.stash[CACHE])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    if (turns := item.config.stash[TURNS]) is None:
        return (yield)
    with turns.turn(item.get_closest_marker("alone") is not None):
        return (yield)


# --- nothing left behind ---------------------------------------------------------------------------------------------


def _read_proc(pid: str, name: str) -> bytes:
    """A file of /proc/PID, or nothing where the process is gone or not ours to read."""
    try:
        return Path("/proc", pid, name).read_bytes()
    except OSError:
        return b""


def _shared_files() -> set[str]:
    """The paths that a session of ours, or the Ray it starts, makes outside the tests' own folders."""
    folders = {"/tmp", tempfile.gettempdir()}
    found = [path for folder in folders for path in Path(folder).iterdir() if _SESSION_FOLDER.fullmatch(path.name)]
    found += [path for pattern in ("plasma*", "sem.*") for path in Path("/dev/shm").glob(pattern)]
    return {str(path) for path in found}


def _leftovers(before: set[str]) -> list[str]:
    """What this test run started or made and did not clean up; sessions of others on the machine are left out."""
    left = []
    elsewhere = b""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if int(pid) == os.getpid():
            continue
        environ, cmdline = _read_proc(pid, "environ"), _read_proc(pid, "cmdline")
        if b"PIPO_SESSION=" not in environ:
            continue
        if f"PIPO_TEST_RUN={TEST_RUN}".encode() in environ:
            left.append(f"process {pid}: {cmdline.replace(bytes(1), b' ').decode(errors='replace')[:200]}")
        else:
            elsewhere += environ + cmdline + _read_proc(pid, "maps")
    return left + [path for path in sorted(_shared_files() - before) if path.encode() not in elsewhere]


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail the session if a process with PIPO_SESSION, a /tmp/pipo-* folder or shared memory of ours is left."""
    before = _shared_files()
    yield
    deadline = time.monotonic() + LEFTOVER_DEADLINE_S
    while (left := _leftovers(before)) and time.monotonic() < deadline:
        time.sleep(0.2)
    if left:
        pytest.fail("left behind by this test session (not by the last test alone):\n  " + "\n  ".join(left), False)


# --- random checkpoints ----------------------------------------------------------------------------------------------

# Applied where a configuration class has a field of that name (or maps it to its own), unless a test overrides it.
TINY: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "ffn_dim": 128,
    "word_embed_proj_dim": 64,
    "num_hidden_layers": 4,  # the fourth is the first full attention of some hybrids
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.125,  # 1 / sqrt(hidden_size): logits far enough apart for greedy tokens to mean something
    "init_std": 0.125,
}


def make_tiny_checkpoint(folder: Path, config_class: str, dtype: str, seed: int, shard: str, **overrides: Any) -> None:
    """Write a random checkpoint to `folder`. Norm weights and biases are random too: a lost one changes the logits."""
    import torch
    import transformers

    cls = getattr(transformers, config_class)
    fields = cls().to_dict().keys() | cls.attribute_map.keys()
    config = cls(**({name: value for name, value in TINY.items() if name in fields} | overrides))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A factory of random checkpoints without a tokenizer, for any configuration class of transformers, made once each.

    tiny_checkpoint("LlamaConfig", dtype="float32", seed=0, max_shard_size="50GB", **config_overrides) -> folder.
    Read-only by agreement: a test that damages a checkpoint copies it first.
    """
    base = tmp_path_factory.mktemp("checkpoints")

    def make(
        config_class: str, *, dtype: str = "float32", seed: int = 0, max_shard_size: str = "50GB", **overrides: Any
    ) -> Path:
        key = json.dumps([config_class, dtype, seed, max_shard_size, overrides], sort_keys=True, default=repr)
        folder = base / f"{config_class}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        if not folder.exists():
            making = folder.with_suffix(".making")
            shutil.rmtree(making, ignore_errors=True)
            make_tiny_checkpoint(making, config_class, dtype, seed, max_shard_size, **overrides)
            making.rename(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def chat_checkpoint(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer of bytes and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("chat") / "tiny-chat"
    shutil.copytree(tiny_checkpoint("LlamaConfig", vocab_size=259), folder)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {byte: 3 + i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    fast.save_pretrained(folder)
    return folder
