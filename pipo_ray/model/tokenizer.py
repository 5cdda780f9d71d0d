"""The tokenizer of a checkpoint folder or block store: its files, and loading it. No torch is imported for it."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from pipo_ray.errors import CheckpointError
from pipo_ray.session.c_heap import trim_heap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "spiece.model", "sentencepiece.bpe.model",
    "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model",
)  # fmt: skip

_shared: weakref.WeakValueDictionary[str, PreTrainedTokenizerBase] = weakref.WeakValueDictionary()
_sharing = threading.Lock()


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a checkpoint folder or block store has files of a tokenizer."""
    return any(Path(folder, name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint folder or block store, or None where it has none. Loads no code from the folder.

    What loading leaves free of the heap is given back: of a BPE tokenizer with 128,000 entries 80 of 120 MiB.

    Raises CheckpointError where there is one that cannot be read.
    """
    if not has_tokenizer(folder):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises plain Exception
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be loaded ({type(error).__name__}: {reason}); replace its files, in "
            "the checkpoint if this is a packed copy of one, or remove them and give prompts as token ids"
        ) from error
    trim_heap()
    return tokenizer


def shared_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase | None:
    """The same for all in this process who encode or decode with `folder`'s tokenizer, in whatever thread: the largest
    ones take hundreds of MiB. One that is written in Python has a state while it works; everybody gets one of his own.
    """
    with _sharing:
        shared = _shared.get(str(folder))
        if shared is None:
            shared = load_tokenizer(folder)
            if shared is not None and getattr(shared, "is_fast", False):  # mistral-common's has no such attribute
                # What its file says about cutting and padding would be taken out of it while others read it.
                shared.backend_tokenizer.no_truncation()
                shared.backend_tokenizer.no_padding()
                _shared[str(folder)] = shared
        return shared
