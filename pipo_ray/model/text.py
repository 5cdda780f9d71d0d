"""Text in and text out: prompts to token ids, token ids to text that streams, and where the text stops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from pipo_ray.errors import InputError
from pipo_ray.outputs import Logprob
from pipo_ray.params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipo_ray.model.sampling import SampledToken

Prompt = str | Sequence[int] | Mapping[str, Any]

REPLACEMENT = "\ufffd"  # what a decoder makes of bytes that are not UTF-8, or not yet
CONTEXT_TOKENS = (
    6  # of the prompt, in front of the first generated token: whether it begins with a space depends on them
)
MAX_PENDING = 32  # tokens without text after which the bytes are taken for what they are: a character has at most 4


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase | None,
    prompt: Prompt,
    vocab_size: int,
    max_model_len: int | None,
    *,
    add_special_tokens: bool = True,
) -> list[int]:
    """Token ids of a prompt: a string, token ids, or a mapping with `prompt` (string) or `prompt_token_ids`.

    `vocab_size`: rows of the model's embedding. `max_model_len`: tokens of context, of which at least one must be left
    for the answer; None for no limit. `add_special_tokens=False` for the text of `render_chat`, which contains them.
    Raises InputError for an empty prompt, an id out of range, a prompt that is too long, and text without a tokenizer.
    """
    if isinstance(prompt, Mapping):
        keys = [key for key in ("prompt_token_ids", "prompt") if prompt.get(key) is not None]
        if not keys:
            raise InputError(f"a prompt with the keys {sorted(map(str, prompt))}: give 'prompt' or 'prompt_token_ids'")
        prompt = prompt[keys[0]]
    ids: list[Any]
    if isinstance(prompt, str):
        ids = _encode_text(tokenizer, prompt, add_special_tokens)
    elif isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray)):
        ids = list(prompt)
    else:
        raise InputError(
            f"a prompt of type {type(prompt).__name__}: give a string, a list of token ids, or "
            "{'prompt_token_ids': [...]}"
        )
    if not ids:
        raise InputError("the prompt is empty: give at least one token")
    for position, token_id in enumerate(ids):
        if not isinstance(token_id, Integral) or isinstance(token_id, bool):
            raise InputError(f"prompt token {position} is {_short(token_id)}: a token id is a whole number")
        if not 0 <= int(token_id) < vocab_size:
            hint = "the tokenizer does not belong to this model" if isinstance(prompt, str) else "correct the prompt"
            raise InputError(
                f"prompt token {position} is {token_id}: the model's token ids go from 0 to {vocab_size - 1}; {hint}"
            )
    if max_model_len is not None and len(ids) >= max_model_len:
        raise InputError(
            f"the prompt has {len(ids)} tokens, but the context is {max_model_len} tokens and one must be left for the "
            f"answer: shorten the prompt to at most {max_model_len - 1} tokens"
        )
    return [int(token_id) for token_id in ids]


def render_chat(tokenizer: PreTrainedTokenizerBase | None, messages: Sequence[Mapping[str, Any]]) -> str:
    """The conversation as the checkpoint's chat template writes it, ready for the assistant's answer.

    A message has a `role` and a `content`: a string, or a list of {"type": "text", "text": ...}, which are joined by
    line breaks. The text contains the special tokens: encode it with `add_special_tokens=False`.
    Raises InputError for malformed messages, a missing chat template, and messages that the template refuses.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise InputError(
            f"messages={_short(messages)}: give a list of messages with 'role' and 'content', at least one"
        )
    checked = [_check_message(index, message) for index, message in enumerate(messages)]
    if tokenizer is None:
        raise InputError("a conversation needs a tokenizer, and this checkpoint has none: generate from token ids")
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("this checkpoint has no chat template: it is not a chat model; generate from a plain prompt")
    try:
        text = tokenizer.apply_chat_template(checked, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"the checkpoint's chat template refuses these messages: {error}") from error
    return str(text)


def decode_logprobs(tokenizer: PreTrainedTokenizerBase | None, sampled: SampledToken) -> dict[int, Logprob]:
    """The entry of `CompletionOutput.logprobs` for a token: the chosen one first, then the most probable ones."""
    return {
        token_id: Logprob(logprob, rank, None if tokenizer is None else _decode(tokenizer, [token_id], False))
        for token_id, logprob, rank in sampled.top_logprobs
    }


class IncrementalDetokenizer:
    """Turns token ids into text as they come, in time linear in their number.

    Text is handed out when it cannot change any more: a character whose bytes are spread over tokens comes with the
    last of them. Decoding begins a few tokens before the new ones, because many tokenizers write a space or not
    depending on what is in front. So the text is what continues the prompt's, which can begin with a space. Without a
    tokenizer it is "".
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        prompt_token_ids: Sequence[int],
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._skipped = frozenset(tokenizer.all_special_ids) if tokenizer and skip_special_tokens else frozenset()
        # From the last tokens that gave text on: the first `_num_read` are the ones whose text is out, the rest is
        # pending.
        # Skipped ids are not among them: the decoder never sees them, and they must not use up the context.
        tail = [i for i in prompt_token_ids[-8 * CONTEXT_TOKENS :] if i not in self._skipped]
        self._window, self._num_read, self._read_text = self._context(tail)

    def push(self, token_id: int) -> str:
        """Take the next token; returns the text that is certain by it, often "" and sometimes several tokens' text."""
        if self._tokenizer is None or token_id in self._skipped:
            return ""
        self._window.append(token_id)
        whole = self._text(self._window)
        text = self._unread(whole)
        pending = len(self._window) - self._num_read
        if (not text or text.endswith(REPLACEMENT)) and pending < MAX_PENDING:
            return ""
        fresh = self._window[self._num_read :]
        fresh_text = self._text(fresh)
        # A window that begins inside a character would spoil what comes next: keep it a bit longer then.
        if len(self._window) > 2 * MAX_PENDING or not fresh_text.startswith(REPLACEMENT):
            self._window, whole = fresh, fresh_text
        self._num_read, self._read_text = len(self._window), whole
        return text

    def flush(self) -> str:
        """The text still held back, without the bytes of an unfinished character. Nothing may be pushed after it."""
        whole = self._text(self._window)
        text = self._unread(whole).rstrip(REPLACEMENT)
        self._num_read, self._read_text = len(self._window), whole
        return text

    def resume(self, token_ids: Sequence[int]) -> None:
        """Take tokens whose text was handed out before: the state is as if they had been pushed."""
        for token_id in token_ids:
            self.push(token_id)

    def _text(self, token_ids: list[int]) -> str:
        return _decode(self._tokenizer, token_ids, self._skip_special_tokens) if self._tokenizer and token_ids else ""

    def _unread(self, whole: str) -> str:
        """What of the window's text, `whole`, is not out yet."""
        if whole.startswith(self._read_text):
            return whole[len(self._read_text) :]
        # Byte tokens of sentencepiece: an invalid one turns the valid ones before it into replacement characters too.
        return self._text(self._window[self._num_read :])

    def _context(self, tail: list[int]) -> tuple[list[int], int, str]:
        """The last tokens of the prompt, how many of them are whole characters, and their text.

        The first may begin inside a character, and the answer may complete the last: both make neighbours unreadable.
        """
        window = tail[-CONTEXT_TOKENS:]
        best = window, len(window), self._text(window)
        for extra in reversed(range(4)):
            window = tail[-CONTEXT_TOKENS - extra :]
            ends = range(len(window), max(-1, len(window) - 4), -1)
            reads = ((end, self._text(window[:end]).rstrip(REPLACEMENT)) for end in ends)
            end, text = max(reads, key=lambda read: len(read[1]))
            if text and not text.startswith(REPLACEMENT):
                return window, end, text
            best = (window, end, text) if text else best
        return best


class StopChecker:
    """Finds where a text ends: at a stop string, a stop token, an end-of-sequence token, or its greatest length.

    Text comes out as soon as it cannot be part of a stop string. The result does not depend on how the text is split
    over tokens: the stop string that is complete first counts, the longest of those that are complete at the same
    character.
    """

    def __init__(
        self,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        eos_token_ids: Sequence[int] = (),
        *,
        include_stop_str: bool = False,
        ignore_eos: bool = False,
        min_tokens: int = 0,
        max_tokens: int | None = None,
    ) -> None:
        self._matches = [_PrefixMatch(string) for string in stop]
        self._stop_token_ids = frozenset(stop_token_ids)
        self._eos_token_ids = frozenset() if ignore_eos else frozenset(eos_token_ids)
        self._include_stop_str = include_stop_str
        self._min_tokens = min_tokens
        self._max_tokens = max_tokens
        self._held = ""
        self.num_tokens = 0

    def push_token(self, token_id: int) -> tuple[Literal["stop", "length"], int | None] | None:
        """Count a token; returns (finish_reason, stop_reason) if the token itself ends the text, else None."""
        counts = self.num_tokens >= self._min_tokens
        self.num_tokens += 1
        if counts and token_id in self._eos_token_ids:
            return "stop", None
        if counts and token_id in self._stop_token_ids:
            return "stop", token_id
        if self._max_tokens is not None and self.num_tokens >= self._max_tokens:
            return "length", None
        return None

    def push_text(self, text: str) -> tuple[str, str | None]:
        """Take the text that the last token made certain; returns the text to show and the stop string it ended at."""
        if not self._matches:
            return text, None
        text = self._held + text
        for end in range(len(self._held) + 1, len(text) + 1):
            complete = [match for match in self._matches if match.push(text[end - 1])]
            if complete and self.num_tokens > self._min_tokens:
                string = max((match.string for match in complete), key=len)
                self._held = ""
                return text[: end if self._include_stop_str else end - len(string)], string
        num_held = max((match.length for match in self._matches), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], None

    def flush(self) -> str:
        """The text held back in case a stop string would follow. For the end of a text by other means."""
        held, self._held = self._held, ""
        return held


@dataclass(frozen=True)
class TextDelta:
    """What a token adds to a sample's text, and whether it ends it (as in `CompletionOutput`)."""

    text: str
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None


class SequenceText:
    """The text of one sample: detokenizer and stop checker together.

    It follows from the token ids alone, so it can be made again after a crash. `max_tokens`: `params.max_tokens`, or
    less where the context ends before. Raises InputError for stop strings without a tokenizer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        eos_token_ids: Sequence[int] = (),
        max_tokens: int | None = None,
    ) -> None:
        check_stop_strings(tokenizer, params)
        self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids, params.skip_special_tokens)
        self._checker = StopChecker(
            params.stop_strings,
            params.stop_token_ids or (),
            eos_token_ids,
            include_stop_str=params.include_stop_str_in_output,
            ignore_eos=params.ignore_eos,
            min_tokens=params.min_tokens,
            max_tokens=params.max_tokens if max_tokens is None else max_tokens,
        )
        self._include_stop_str = params.include_stop_str_in_output
        self._parts: list[str] = []
        self._last = TextDelta("")

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._parts)

    @property
    def num_tokens(self) -> int:
        """Tokens taken so far."""
        return self._checker.num_tokens

    @property
    def finish_reason(self) -> Literal["stop", "length"] | None:
        """Why it is complete, or None while it goes on."""
        return self._last.finish_reason

    @property
    def stop_reason(self) -> int | str | None:
        """The stop string or stop token id that ended it."""
        return self._last.stop_reason

    def push(self, token_id: int) -> TextDelta:
        """Take the next token. Raises RuntimeError when the text is complete."""
        if self.finish_reason is not None:
            raise RuntimeError(f"token {token_id} after the end of the text ({self.finish_reason})")
        self._last = self._advance(token_id)
        self._parts.append(self._last.text)
        return self._last

    def abort(self) -> str:
        """The text held back so far, for a request that ends from outside. Nothing may be pushed after it."""
        text, _ = self._checker.push_text(self._detokenizer.flush())
        self._parts.append(text + self._checker.flush())
        return self._parts[-1]

    def resume(self, token_ids: Sequence[int]) -> None:
        """Take tokens that were pushed before a crash: the state is as after them, their text is not given again."""
        for token_id in token_ids:
            self.push(token_id)

    def _advance(self, token_id: int) -> TextDelta:
        end = self._checker.push_token(token_id)
        hidden = end is not None and end[0] == "stop" and not self._include_stop_str
        text = "" if hidden else self._detokenizer.push(token_id)
        if end is not None:
            text += self._detokenizer.flush()
        shown, stop_string = self._checker.push_text(text)
        if stop_string is not None:
            return TextDelta(shown, "stop", stop_string)
        if end is not None:
            return TextDelta(shown + self._checker.flush(), *end)
        return TextDelta(shown)


def check_stop_strings(tokenizer: PreTrainedTokenizerBase | None, params: SamplingParams) -> None:
    """Raise InputError for stop strings without a tokenizer: there is no text to find them in."""
    if tokenizer is None and params.stop_strings:
        raise InputError(
            f"stop={params.stop_strings[0]!r} needs a tokenizer, and this checkpoint has none: give stop_token_ids"
        )


class _PrefixMatch:
    """How many last characters of a text are the beginning of `string` (Knuth, Morris, Pratt): constant time each."""

    def __init__(self, string: str) -> None:
        self.string = string
        self.length = 0
        self._shorter = [0] * len(string)  # [i]: the longest proper prefix of string[:i + 1] that is also its suffix
        for i in range(1, len(string)):
            length = self._shorter[i - 1]
            while length and string[i] != string[length]:
                length = self._shorter[length - 1]
            self._shorter[i] = length + (string[i] == string[length])

    def push(self, character: str) -> bool:
        """Take a character; whether `string` ends with it. Afterwards `length` is below the string's."""
        while self.length and character != self.string[self.length]:
            self.length = self._shorter[self.length - 1]
        self.length += character == self.string[self.length]
        if self.length < len(self.string):
            return False
        self.length = self._shorter[-1]
        return True


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], skip_special_tokens: bool) -> str:
    # No clean-up: it changes text that is out already (the space before a full stop).
    text = tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    return str(text)


def _encode_text(tokenizer: PreTrainedTokenizerBase | None, text: str, add_special_tokens: bool) -> list[int]:
    if not text:
        raise InputError("the prompt is empty: give at least one character")
    if tokenizer is None:
        raise InputError(
            f"the prompt {_short(text)} is text, and this checkpoint has no tokenizer: give a list of token ids"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the prompt {_short(text)} is not valid Unicode text: {error.reason}") from error
    # Not verbose: the tokenizer's own idea of the greatest length is not the model's.
    return list(tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))


def _check_message(index: int, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InputError(f"message {index} is {_short(message)}: give a mapping with 'role' and 'content'")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise InputError(f"message {index} has role={_short(role)}: give a string such as 'user'")
    if isinstance(content, list):
        texts: list[Any] = [
            part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"
        ]
        if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
            raise InputError(
                f"message {index} has content parts that are not text: only {{'type': 'text'}} is supported"
            )
        content = "\n".join(texts)
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise InputError(f"message {index} has content={_short(content)}: give a string")
    return {**message, "content": content}


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
