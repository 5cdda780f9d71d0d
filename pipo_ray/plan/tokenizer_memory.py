"""What a tokenizer takes of the memory, told from its files."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

from pipo_ray.model.tokenizer import has_tokenizer

_UNIGRAM = re.compile(rb'"type"\s*:\s*"Unigram"')
_BYTES_PER_BYTE = 5.0
_BYTES_PER_ENTRY, _UNIGRAM_BYTES_PER_ENTRY = 440, 2048
_MAYBE_UNIGRAM = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def tokenizer_bytes(folder: str | Path, vocab_size: int) -> int:
    """Bytes of private memory that the tokenizer in a checkpoint folder or block store takes once it is loaded and the
    heap trimmed, for a model of `vocab_size` entries; 0 without one.

    With transformers 5 and tokenizers 0.23 one of BPE takes 3.6 to 4.6 times its indented `tokenizer.json`, with as
    many pairs as entries 0.33 to 0.41 KB for each (vocabularies of 32,000 to 256,000: 8 to 81 MiB); the trie of Unigram
    1.7 to 1.9 KB (59 and 436 MiB). What is read from another file is converted, and either of them then; or stays with
    a tokenizer in Python, which is loaded for prompts and for answers.
    """
    if not has_tokenizer(folder):
        return 0
    file = Path(folder, "tokenizer.json")
    try:
        size = file.stat().st_size
        is_unigram = size > 0 and _is_unigram(file)
    except OSError:  # what is wrong with it is said by who loads it
        size, is_unigram = 0, False
    if is_unigram or any(Path(folder, name).is_file() for name in _MAYBE_UNIGRAM if not size):
        return _UNIGRAM_BYTES_PER_ENTRY * vocab_size
    if not size:
        return 2 * _BYTES_PER_ENTRY * vocab_size
    return max(int(_BYTES_PER_BYTE * size), _BYTES_PER_ENTRY * vocab_size)


def _is_unigram(file: Path) -> bool:
    """Whether the model of a `tokenizer.json` is Unigram; the type stands before the vocabulary, or behind it."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _UNIGRAM.search(content) is not None
