"""Prompts in, text out: nothing half, nothing twice, nothing behind a stop string."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipo_ray.errors import InputError
from pipo_ray.model.sampling import SampledToken
from pipo_ray.model.text import (
    IncrementalDetokenizer,
    SequenceText,
    StopChecker,
    TextDelta,
    decode_logprobs,
    encode_prompt,
    render_chat,
)
from pipo_ray.model.tokenizer import load_tokenizer
from pipo_ray.outputs import Logprob
from pipo_ray.params import SamplingParams

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Once upon a time there was a small dog.",
    "Grüße aus Köln, naïve café; 你好世界。日本語の文章です。 한국어 문장",
    "emoji 😀 🎉 family 👩‍👩‍👧 flag 🇩🇪 ... and   several   spaces\n\nnew lines\tand tabs",
]
TEXTS = st.lists(st.sampled_from([*"abc é你好😀👩\u200d👧", " ", "  ", "\n", "the", " dog", "."]), max_size=30).map(
    "".join
)
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('role ' + m.role) }}{% endif %}"
    "<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3, Qwen: a character outside ASCII is often spread over several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return wrap(tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    """A space is part of the word behind it, and the first one is dropped."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator([*CORPUS, *"abc é你好😀👩\u200d👧"], trainer)
    return wrap(tokenizer)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral: unknown characters are tokens for single bytes."""
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdeghot.", "你"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "d"), ("▁d", "o"), ("▁do", "g")]
    pieces += [left + right for left, right in merges]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return wrap(tokenizer)


TOKENIZERS = {"byte-level": byte_level(), "metaspace": metaspace(), "byte-fallback": byte_fallback()}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())


def stream(detokenizer: IncrementalDetokenizer, token_ids: Iterable[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


# --- detokenizer ------------------------------------------------------------------------------------------------------


@every_tokenizer
@given(TEXTS, st.integers(0, 40))
@settings(max_examples=100)
def test_streamed_text_continues_the_prompt(tokenizer: PreTrainedTokenizerFast, text: str, cut: int) -> None:
    """However the tokens are divided into prompt and answer: the answer is what decoding all of it adds."""
    ids = tokenizer.encode("the dog" + text)
    whole = tokenizer.decode(ids)
    if "\ufffd" in whole:  # the sequence itself is not text
        return
    prompt, answer = ids[: cut % len(ids)], ids[cut % len(ids) :]
    pieces = stream(IncrementalDetokenizer(tokenizer, prompt), answer)
    # The whole characters of the prompt; the first byte of another one can make its neighbours unreadable.
    readable = (tokenizer.decode(prompt[: len(prompt) - n]).rstrip("\ufffd") for n in range(min(4, len(prompt) + 1)))
    before = max(readable, key=len)
    assert whole.startswith(before)
    assert "".join(pieces) == whole[len(before) :]
    assert "\ufffd" not in "".join(pieces)


@every_tokenizer
@given(st.data())
@settings(max_examples=100)
def test_any_tokens_give_their_text(tokenizer: PreTrainedTokenizerFast, data: st.DataObject) -> None:
    """Random ids are seldom valid text; what is out is never taken back, and the valid parts are all there."""
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=60))
    prompt = tokenizer.encode("the dog")
    streamed = "".join(stream(IncrementalDetokenizer(tokenizer, prompt), ids))
    whole = tokenizer.decode(prompt + ids, skip_special_tokens=True)[len(tokenizer.decode(prompt)) :]
    if tokenizer is not TOKENIZERS["byte-fallback"]:  # there a wrong byte spoils the right ones next to it, afterwards
        assert streamed == whole.rstrip("\ufffd") or streamed == whole
    assert streamed.replace("\ufffd", "").startswith(whole.split("\ufffd")[0].rstrip())


@every_tokenizer
@given(TEXTS, TEXTS)
@settings(max_examples=30)
def test_detokenizer_resumes(tokenizer: PreTrainedTokenizerFast, first: str, second: str) -> None:
    head, tail = tokenizer.encode(first), tokenizer.encode(second)
    undisturbed, resumed = (IncrementalDetokenizer(tokenizer, [5, 6]) for _ in range(2))
    for token_id in head:
        undisturbed.push(token_id)
    assert resumed.resume(head) is None
    assert stream(undisturbed, tail) == stream(resumed, tail)


def test_a_character_comes_when_it_is_complete() -> None:
    tokenizer = TOKENIZERS["byte-fallback"]
    ids = tokenizer.encode("😀", add_special_tokens=False)[-4:]
    pieces = stream(IncrementalDetokenizer(tokenizer, tokenizer.encode("the")), [*ids, *ids[:3]])
    assert pieces == ["", "", "", "😀", "", "", "", ""]


def test_a_character_that_begins_in_the_prompt() -> None:
    for tokenizer in (TOKENIZERS["byte-level"], TOKENIZERS["byte-fallback"]):
        ids = tokenizer.encode("the 你好😀")
        assert stream(IncrementalDetokenizer(tokenizer, ids[:-1]), ids[-1:]) == ["😀", ""]


def test_a_long_prompt_in_byte_tokens_does_not_leak() -> None:
    tokenizer = TOKENIZERS["byte-fallback"]
    prompt, answer = tokenizer.encode("the " + "好" * 50), tokenizer.encode("好 dog", add_special_tokens=False)
    assert "".join(stream(IncrementalDetokenizer(tokenizer, prompt), answer)).strip() == "好 dog"


@pytest.mark.parametrize("skip, expected", [(True, "the dog the"), (False, "the dog</s><s> the")])
def test_special_tokens(skip: bool, expected: str) -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = [*tokenizer.encode("the dog"), 1, 0, *tokenizer.encode(" the")]
    assert "".join(stream(IncrementalDetokenizer(tokenizer, [0], skip), ids)) == expected


def test_detokenizing_takes_linear_time() -> None:
    """Twice the tokens, about twice the time; also where no text ever comes."""
    tokenizer = TOKENIZERS["byte-level"]
    text = tokenizer.encode("the quick brown fox 你好 " * 60)[:500]
    broken = [tokenizer.encode("😀")[-1]] * 500
    for ids in (text, broken, [1] * 500):
        took = []
        for repeats in (1, 4):
            detokenizer, start = IncrementalDetokenizer(tokenizer, []), time.process_time()
            for token_id in ids * repeats:
                detokenizer.push(token_id)
            took.append(time.process_time() - start)
            assert len(detokenizer._window) < 100
        assert took[1] < 10 * took[0] + 0.1


# --- stop checker -----------------------------------------------------------------------------------------------------


def first_stop(text: str, stops: list[str]) -> tuple[int, int, str] | None:
    """Begin, end and name of the stop string that ends first, the longest of those."""
    found = [(text.index(stop) + len(stop), text.index(stop), stop) for stop in stops if stop in text]
    if not found:
        return None
    end, begin, stop = min(found, key=lambda entry: (entry[0], entry[1]))
    return begin, end, stop


def split(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@given(
    st.text("ab.", max_size=40),
    st.lists(st.text("ab.", min_size=1, max_size=6), max_size=4),
    st.lists(st.integers(0, 100), max_size=40),
    st.booleans(),
)
@settings(max_examples=300)
def test_any_split_gives_the_same_text(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    checker = StopChecker(stops, include_stop_str=include)
    found = first_stop(text, stops)
    final = text if found is None else text[: found[1] if include else found[0]]
    shown, reason = "", None
    for piece in split(text, cuts):
        assert checker.push_token(0) is None
        new, reason = checker.push_text(piece)
        shown += new
        assert final.startswith(shown)
        if reason:
            break
    if reason is None:
        shown += checker.flush()
    assert (shown, reason) == (final, found[2] if found else None)


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=3))
@settings(max_examples=200)
def test_holds_back_no_more_than_needed(text: str, stops: list[str]) -> None:
    checker, shown = StopChecker(stops), ""
    checker.push_token(0)
    for end, character in enumerate(text, 1):
        new, reason = checker.push_text(character)
        shown += new
        if reason:
            return
        starts = [stop[:n] for stop in stops for n in range(1, len(stop))]
        held = max((len(start) for start in starts if text[:end].endswith(start)), default=0)
        assert shown == text[: end - held]


def test_stop_strings_wait_for_min_tokens() -> None:
    checker, shown = StopChecker(["aa"], min_tokens=2), []
    for _ in range(3):
        checker.push_token(0)
        shown.append(checker.push_text("a"))
    assert shown == [("", None), ("a", None), ("", "aa")]


@pytest.mark.parametrize(
    "options, tokens, expected",
    [
        ({"eos_token_ids": [9]}, [1, 9], ("stop", None)),
        ({"eos_token_ids": [9], "ignore_eos": True, "max_tokens": 3}, [9, 9, 9], ("length", None)),
        ({"stop_token_ids": [8]}, [1, 8], ("stop", 8)),
        ({"stop_token_ids": [8], "eos_token_ids": [8]}, [8], ("stop", None)),
        ({"stop_token_ids": [9], "eos_token_ids": [9], "ignore_eos": True}, [9], ("stop", 9)),
        ({"eos_token_ids": [9], "max_tokens": 2}, [1, 9], ("stop", None)),
        ({"eos_token_ids": [9], "min_tokens": 2}, [9, 9, 9], ("stop", None)),
        ({"stop_token_ids": [8], "min_tokens": 1}, [8, 8], ("stop", 8)),
        ({"max_tokens": 1}, [1], ("length", None)),
    ],
)
def test_tokens_that_end_a_text(options: dict[str, Any], tokens: list[int], expected: Any) -> None:
    checker = StopChecker(**options)
    results = [checker.push_token(token) for token in tokens]
    assert results == [None] * (len(tokens) - 1) + [expected]


# --- both together ----------------------------------------------------------------------------------------------------


def run(text: SequenceText, ids: Iterable[int]) -> list[TextDelta]:
    deltas = []
    for token_id in ids:
        deltas.append(text.push(token_id))
        if deltas[-1].finish_reason:
            break
    return deltas


@every_tokenizer
@given(st.data(), TEXTS, st.booleans())
@settings(max_examples=60)
def test_sequence_text_resumes_anywhere(
    tokenizer: PreTrainedTokenizerFast, data: st.DataObject, text: str, include: bool
) -> None:
    params = SamplingParams(stop=["dog.", "好😀", "c"], include_stop_str_in_output=include, max_tokens=40)
    prompt, ids = tokenizer.encode("the"), tokenizer.encode(text + " the dog. c", add_special_tokens=False)
    undisturbed = SequenceText(tokenizer, prompt, params, [1])
    deltas = run(undisturbed, ids)
    cut = data.draw(st.integers(0, len(deltas)))
    resumed = SequenceText(tokenizer, prompt, params, [1])
    resumed.resume(ids[:cut])
    assert resumed.num_tokens == cut
    assert run(resumed, ids[cut : len(deltas)]) == deltas[cut:]
    assert resumed.text == undisturbed.text == "".join(delta.text for delta in deltas)
    assert (resumed.finish_reason, resumed.stop_reason) == (undisturbed.finish_reason, undisturbed.stop_reason)
    with pytest.raises(RuntimeError):
        resumed.push(5)


@every_tokenizer
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_over_several_tokens(tokenizer: PreTrainedTokenizerFast, include: bool) -> None:
    params = SamplingParams(stop="dog. c", include_stop_str_in_output=include, max_tokens=None)
    text = SequenceText(tokenizer, tokenizer.encode("the"), params)
    deltas = run(text, tokenizer.encode(" dog the dog. cab the", add_special_tokens=False))
    assert text.text.lstrip() == "dog the dog. c" if include else "dog the "
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "dog. c")


def test_the_end_token_is_not_shown() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    (a,) = tokenizer.encode("a")
    for options, eos, expected in (
        ({"skip_special_tokens": False}, [1], TextDelta("", "stop", None)),
        ({"skip_special_tokens": False, "include_stop_str_in_output": True}, [1], TextDelta("</s>", "stop", None)),
        ({"stop_token_ids": [1]}, [], TextDelta("", "stop", 1)),
    ):
        text = SequenceText(tokenizer, [a], SamplingParams(**options), eos)
        assert run(text, [a, 1]) == [TextDelta("a"), expected]


def test_length_gives_out_what_was_held_back() -> None:
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("ab")
    text = SequenceText(tokenizer, [], SamplingParams(stop="abc", max_tokens=100), max_tokens=len(ids))
    assert run(text, ids)[-1] == TextDelta("ab", "length", None)
    text = SequenceText(tokenizer, [], SamplingParams(stop="abc"))
    run(text, ids)
    assert (text.abort(), text.text, text.finish_reason) == ("ab", "ab", None)


def test_without_a_tokenizer() -> None:
    with pytest.raises(InputError, match="stop='x' needs a tokenizer"):
        SequenceText(None, [1], SamplingParams(stop="x"))
    text = SequenceText(None, [1], SamplingParams(max_tokens=2, stop_token_ids=[7]))
    assert run(text, [5, 7]) == [TextDelta(""), TextDelta("", "stop", 7)]
    assert text.text == ""


def test_decode_logprobs() -> None:
    sampled = SampledToken(4, -0.5, ((4, -0.5, 2), (3, -0.1, 1)))
    assert decode_logprobs(None, sampled) == {4: Logprob(-0.5, 2, None), 3: Logprob(-0.1, 1, None)}
    entry = decode_logprobs(TOKENIZERS["byte-level"], sampled)
    assert list(entry) == [4, 3]
    assert entry[4].decoded_token == TOKENIZERS["byte-level"].decode([4])


# --- tokenizers, prompts, chat ----------------------------------------------------------------------------------------


def test_encode_prompt() -> None:
    tokenizer = byte_level()
    single = [("<s>", 0)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=single)
    ids = tokenizer.encode("the dog")
    assert ids[0] == 0
    size = len(tokenizer)
    assert encode_prompt(tokenizer, "the dog", size, None) == ids
    assert encode_prompt(tokenizer, {"prompt": "the dog"}, size, 100) == ids
    assert encode_prompt(tokenizer, "the dog", size, None, add_special_tokens=False) == ids[1:]
    for prompt in (ids, tuple(ids), {"prompt_token_ids": ids}, {"prompt_token_ids": ids, "prompt": "ignored"}):
        assert encode_prompt(None, prompt, size, len(ids) + 1) == ids


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ({"prompt_token_ids": []}, "the prompt is empty"),
        ({"text": "a"}, r"keys \['text'\]: give 'prompt' or 'prompt_token_ids'"),
        ([1, 50], "prompt token 1 is 50: the model's token ids go from 0 to 49"),
        ([-1], "prompt token 0 is -1"),
        ([1.5], "prompt token 0 is 1.5: a token id is a whole number"),
        ([True], "prompt token 0 is True"),
        (["a"], "prompt token 0 is 'a'"),
        ([1] * 8, "the prompt has 8 tokens, but the context is 8 tokens"),
        (7, "a prompt of type int"),
        (b"a", "a prompt of type bytes"),
        ("the", "the tokenizer does not belong to this model"),
        ("\udcff", "not valid Unicode"),
    ],
)
def test_bad_prompt(prompt: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        encode_prompt(TOKENIZERS["byte-level"], prompt, 50, 8)


def test_text_without_a_tokenizer() -> None:
    with pytest.raises(InputError, match="this checkpoint has no tokenizer: give a list of token ids"):
        encode_prompt(None, "the", 50, None)


@pytest.fixture
def chat_tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


def test_render_chat(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    text = render_chat(chat_tokenizer, [{"role": "user", "content": "hi"}, {"role": "assistant", "content": parts}])
    assert text == "<s>user: hi</s><s>assistant: a\nb</s><s>assistant: "


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], r"messages=\[\]: give a list"),
        ("hello", "messages='hello'"),
        ({"role": "user", "content": "a"}, "give a list of messages"),
        (["hello"], "message 0 is 'hello'"),
        ([{"content": "a"}], "message 0 has role=None"),
        ([{"role": "user"}], "message 0 has content=None"),
        ([{"role": "user", "content": 5}], "message 0 has content=5"),
        ([{"role": "user", "content": [{"type": "image"}]}], "content parts that are not text"),
        (
            [{"role": "user", "content": "a"}, {"role": "king", "content": "a"}],
            "template refuses these messages: role king",
        ),
    ],
)
def test_bad_messages(chat_tokenizer: PreTrainedTokenizerFast, messages: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        render_chat(chat_tokenizer, messages)


def test_chat_without_template_or_tokenizer() -> None:
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(InputError, match="no chat template"):
        render_chat(TOKENIZERS["byte-level"], messages)
    with pytest.raises(InputError, match="needs a tokenizer"):
        render_chat(None, messages)
