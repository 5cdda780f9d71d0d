from __future__ import annotations

from pathlib import Path

import pytest

from pipo_ray.errors import InputError
from pipo_ray.model.tokenizer import load_tokenizer
from pipo_ray.quant.calibration_text import BUNDLED_TEXT, LEAST_TOKENS, WINDOW_TOKENS, CalibrationText


def test_windows_are_the_text_behind_what_begins_one() -> None:
    tokenizer = load_tokenizer(BUNDLED_TEXT.parent)
    assert tokenizer is not None
    text = CalibrationText.load()
    windows = text.windows(tokenizer, 512, 3000)
    assert {window[0] for window in windows} == {tokenizer.bos_token_id}
    assert max(map(len, windows)) <= 512
    assert max(map(len, windows)) - min(map(len, windows)) <= len(windows)
    tokens = [token for window in windows for token in window[1:]]
    assert tokens == tokenizer(text.text, add_special_tokens=False)["input_ids"][:3000]
    assert max(map(len, text.windows(tokenizer, 1 << 20))) <= WINDOW_TOKENS


def test_nothing_of_the_heldout_text_is_in_the_bundled_one() -> None:
    heldout = set((BUNDLED_TEXT.parent / "heldout.txt").read_text().split("\n\n"))
    long = {paragraph for paragraph in CalibrationText.load().text.split("\n\n") if len(paragraph) > 60}
    assert len(long) > 100
    assert not long & heldout


@pytest.mark.parametrize(
    "content, said", [(None, "cannot be read: No such file"), (b"ab\xff", r"not UTF-8 \(byte 2\)")]
)
def test_what_cannot_be_read(content: bytes | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=f"calibration text {file} .*{said}"):
        CalibrationText.load(file)


def test_a_text_that_is_too_short(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("A few words. " * 20)
    text = CalibrationText.load(tmp_path / "text.txt")
    with pytest.raises(InputError, match=rf"text\.txt has \d+ tokens, at least {LEAST_TOKENS} are needed"):
        text.windows(load_tokenizer(BUNDLED_TEXT.parent), 512)
    with pytest.raises(InputError, match="no tokenizer"):
        text.windows(None, 512)
