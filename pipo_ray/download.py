"""Fetches a model from the Hugging Face hub into its usual cache."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipo_ray.errors import CheckpointError, InputError, PipoError, ResourceError

Progress = Callable[[str, int, int], None]

_NETWORK_TIMEOUT_S = 10
_SIDE_PATTERNS = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.vocab", "*.bpe", "*.spm"]


def download(model_id: str, progress: Progress | None = None) -> Path:
    """Fetch a hub model's configuration, tokenizer and safetensors weights into the usual cache; the snapshot's folder.

    The configuration comes first: an architecture that cannot be run is refused before its weights are downloaded.
    Raises ResourceError without a network, InputError for an id that the hub does not know or give,
    UnsupportedModelError, CheckpointError for a model without safetensors weights.
    """
    from pipo_ray.store.checkpoint import INDEX_NAME, SINGLE_NAME

    report: Progress = progress or (lambda phase, done, total: None)
    report("download", 0, 0)
    folder = _snapshot(model_id, None, _SIDE_PATTERNS, report)
    if not (folder / "config.json").exists():
        raise CheckpointError(f"hub model {model_id} has no config.json: choose a transformers checkpoint")
    from pipo_ray.model.graph import load_config

    load_config(folder)
    wanted = [SINGLE_NAME]
    with contextlib.suppress(OSError, ValueError, AttributeError):
        wanted += sorted(set(json.loads((folder / INDEX_NAME).read_text())["weight_map"].values()))
    folder = _snapshot(model_id, folder.name, _SIDE_PATTERNS + wanted, report)
    if not any((folder / name).exists() for name in (SINGLE_NAME, INDEX_NAME)):
        raise CheckpointError(
            f"hub model {model_id} has no safetensors weights (neither {SINGLE_NAME} nor {INDEX_NAME}); choose one "
            "that has, or convert it with transformers' save_pretrained where you trust its pickles"
        )
    return folder


def _snapshot(model_id: str, revision: str | None, patterns: list[str], report: Progress) -> Path:
    import huggingface_hub
    from huggingface_hub import errors
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        """Shows nothing; reports the bytes."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            self.counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **(kwargs | {"file": sink, "mininterval": 3600}))

        def update(self, n: float | None = 1) -> bool | None:
            changed: bool | None = super().update(n)
            if self.counts_bytes:
                report("download", int(self.n), int(self.total or 0))
            return changed

    with open(os.devnull, "w") as sink:
        try:
            return Path(
                huggingface_hub.snapshot_download(
                    model_id,
                    revision=revision,
                    allow_patterns=patterns,
                    ignore_patterns=["*/*"],
                    etag_timeout=_NETWORK_TIMEOUT_S,
                    tqdm_class=Bar,
                )
            )
        except errors.GatedRepoError as error:
            raise InputError(
                f"hub model {model_id} is only given to who has accepted its terms; accept them at "
                f"huggingface.co/{model_id} and log in with `hf auth login`"
            ) from error
        except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
            raise InputError(
                f"the hub does not know the model {model_id} (and there is no such folder); check the name, or log in "
                "with `hf auth login` if it is private"
            ) from error
        except errors.LocalEntryNotFoundError as error:
            offline = huggingface_hub.constants.HF_HUB_OFFLINE
            reason = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
            raise ResourceError(
                f"model {model_id} is not a folder and not in the hub's cache, and {reason}; "
                f"{'unset it' if offline else 'connect to the network'}, or give the folder of a checkpoint"
            ) from error
        except PipoError:
            raise
        except Exception as error:  # httpx's, the hub's and the disk's errors have no base of their own
            raise ResourceError(
                f"downloading the hub model {model_id} failed ({type(error).__name__}: {_one_line(error)}); run it "
                "again: it goes on where it stopped, or give the folder of a checkpoint"
            ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
