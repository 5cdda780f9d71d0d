"""Loading a tokenizer: one for a process, whatever threads use it, and what it takes is what the plan says."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipo_ray.errors import CheckpointError
from pipo_ray.model.tokenizer import load_tokenizer, shared_tokenizer
from pipo_ray.plan.tokenizer_memory import tokenizer_bytes

ENTRIES = 60_000
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
TEXT = "It was a fine morning, and nobody had slept. " * 20

# In a process of its own: what others have left free in the heap is not taken for what a tokenizer takes.
GROWTH = """
import sys
from pathlib import Path
from pipo_ray.model.tokenizer import load_tokenizer
from pipo_ray.session.c_heap import trim_heap

def private() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private"))

warm = load_tokenizer(sys.argv[1])
assert warm("warm")
before = private()
tokenizer = load_tokenizer(sys.argv[2])
assert tokenizer(sys.argv[3])["input_ids"]
print(private() - before)
"""


def byte_pairs(entries: int) -> Tokenizer:
    """Random pairs of tokens, each made of two that stand before it."""
    rng = random.Random(0)
    tokens, vocab, merges = list(LETTERS), {letter: number for number, letter in enumerate(LETTERS)}, []
    while len(tokens) < entries:
        left, right = rng.choice(tokens), rng.choice(tokens)
        if left + right not in vocab and len(left + right) <= 12:
            vocab[left + right] = len(tokens)
            tokens.append(left + right)
            merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    return tokenizer


def unigrams(entries: int) -> Tokenizer:
    """Random words."""
    rng = random.Random(0)
    words = {
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=rng.randint(2, 12))): None for _ in range(2 * entries)
    }
    vocab = [("<unk>", 0.0), *((letter, -9.0) for letter in "abcdefghijklmnopqrstuvwxyz ")]
    vocab += [(word, -12 * rng.random()) for word in list(words)[: entries - len(vocab)]]
    return Tokenizer(models.Unigram(vocab, unk_id=0))


def save(tokenizer: Tokenizer, folder: Path) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(byte_pairs(1000), tmp_path_factory.mktemp("small"))


def test_a_folder_without_one(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    assert shared_tokenizer(tmp_path) is None
    assert tokenizer_bytes(tmp_path, 50_000) == 0


def test_it_is_the_one_that_was_saved(small: Path) -> None:
    loaded = load_tokenizer(small)
    assert loaded is not None
    assert loaded(TEXT)["input_ids"] == byte_pairs(1000).encode(TEXT).ids


def test_one_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    for load in (load_tokenizer, shared_tokenizer):
        with pytest.raises(CheckpointError, match="cannot be loaded") as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)


def test_all_who_want_it_have_the_same_one_and_nobody_keeps_it(small: Path) -> None:
    first = shared_tokenizer(small)
    assert first is not None
    assert shared_tokenizer(str(small)) is first
    assert load_tokenizer(small) is not first
    del first
    gc.collect()
    from pipo_ray.model import tokenizer

    assert str(small) not in tokenizer._shared


def test_one_that_does_not_say_whether_it_is_fast_is_not_shared(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As mistral-common's."""

    class Bare:
        pass

    monkeypatch.setattr("pipo_ray.model.tokenizer.load_tokenizer", lambda folder: Bare())
    assert type(shared_tokenizer(small)) is Bare
    assert shared_tokenizer(small) is not shared_tokenizer(small)


def test_threads_encode_and_decode_with_it_at_the_same_time(tmp_path: Path) -> None:
    """Its file cuts and pads, which the first to encode would switch off under the others' hands."""
    tokenizer = byte_pairs(1000)
    expected = tokenizer.encode(TEXT).ids
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=9)
    shared = shared_tokenizer(save(tokenizer, tmp_path))
    assert shared is not None
    assert shared.backend_tokenizer.truncation is None
    assert shared.backend_tokenizer.padding is None

    def both(number: int) -> bool:
        same = shared(TEXT)["input_ids"] == expected if number % 2 else shared.decode(expected).strip() == TEXT.strip()
        return bool(same)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(both, range(400)))


@pytest.mark.parametrize("make", [byte_pairs, unigrams])
def test_what_it_takes_is_what_the_plan_says(make: object, small: Path, tmp_path: Path) -> None:
    assert callable(make)
    folder = save(make(ENTRIES), tmp_path)
    command = [sys.executable, "-c", GROWTH, str(small), str(folder), TEXT]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0.6 * tokenizer_bytes(folder, ENTRIES) < grown <= tokenizer_bytes(folder, ENTRIES)


def test_another_file_may_become_either(tmp_path: Path, small: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    assert tokenizer_bytes(tmp_path, 32_000) == pytest.approx(59 << 20, rel=0.1), "what Unigram was measured with"
    (tmp_path / "tokenizer.model").rename(tmp_path / "vocab.json")
    assert tokenizer_bytes(tmp_path, 32_000) == pytest.approx(27 << 20, rel=0.1), "one in Python, twice"
    (tmp_path / "tokenizer.json").mkdir()
    assert tokenizer_bytes(tmp_path, 32_000) == pytest.approx(27 << 20, rel=0.1), "nor is it read"
    assert tokenizer_bytes(small, 1000) < 1 << 20
