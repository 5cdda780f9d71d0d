#!/usr/bin/env python3
"""Build the text, train the bundled demonstration model, measure it and write it into the package.

The bundled model is a Llama-architecture model of about 4.4 million parameters.  It is trained from nothing on text
that Debian packages under permissive licences (or in the public domain) carry, so its words are recognisably English
and its perplexity means something.  It exists to make the program demonstrable without a download.

Four steps, each a sub-command:

    corpus    needs a Debian system and its package archive, no GPU:
              python3 benchmarks/train_bundled_model.py corpus --data .train
              (--packages DIR takes .deb files that lie there already)
    train     needs torch, transformers, tokenizers, safetensors and numpy; a GPU, no network:
              python3 benchmarks/train_bundled_model.py train --data .train --out out/bundled --minutes 6
    evaluate  held-out perplexity of a checkpoint, and some answers:
              python3 benchmarks/train_bundled_model.py evaluate --checkpoint out/bundled --text .train/heldout.txt
    finish    copies the checkpoint, the two texts and the notices into the package and writes its README:
              python3 benchmarks/train_bundled_model.py finish --checkpoint out/bundled --data .train \
                  --target pipo_ray/bundled

The text is split by document into train, validation and test parts; paragraphs that occur twice are dropped first.
The best checkpoint is chosen on the validation part; the perplexity reported is that of the test part, which is
`heldout.txt`.  Every random choice is seeded.  `--minutes` fixes the number of steps from the speed measured in the
first steps; that number is logged, and `--steps` repeats a run with it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import html.parser
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SEED = 20240
VOCAB_SIZE = 4096
BOS, EOS, PAD, IM_START, IM_END = "<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [BOS, EOS, PAD, IM_START, IM_END]
HELDOUT_BYTES = 160_000
MODEL_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
]
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


# ---------------------------------------------------------------------------------------------------------------------
# The sources
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Source:
    """A Debian package whose text is used, with the licence of that text."""

    package: str
    title: str
    licence: str
    copyright: str
    heldout_bytes: int
    licence_start: str = ""
    """Where the licence text begins in the package's copyright file ("" when the text is in the public domain)."""
    licence_end: str = ""


SOURCES = [
    Source(
        "wordnet-base", "WordNet 3.0", "WordNet 3.0 licence (permissive)",
        "Copyright 2006 by Princeton University. All rights reserved.", 30_000,
        "This software and database is being provided", "\nFiles:",
    ),
    Source(
        "r-cran-janeaustenr", "The six novels of Jane Austen", "public domain (the package around them: MIT)",
        "Jane Austen (1775-1817); package: Copyright 2016-2017 Julia Silge", 40_000,
    ),
    Source(
        "sqlite3-doc", "SQLite documentation", "public domain", "D. Richard Hipp and the SQLite developers", 20_000,
    ),
    Source(
        "postgresql-doc-15", "PostgreSQL 15 documentation", "PostgreSQL licence",
        "Portions Copyright (c) 1996-2022, PostgreSQL Global Development Group; "
        "Portions Copyright (c) 1994, The Regents of the University of California", 20_000,
        "License: PostgreSQL\n Permission", "\nLicense:",
    ),
    Source(
        "python3.11-doc", "Python 3.11 documentation", "PSF-2.0",
        "Copyright (c) 2001-2023 Python Software Foundation; All Rights Reserved", 20_000,
        "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2\n----", "\nBEOPEN.COM",
    ),
    Source(
        "python-django-doc", "Django 3.2 documentation", "BSD-3-Clause",
        "Copyright (c) Django Software Foundation and individual contributors", 10_000,
        "License: BSD-3-Clause\n Redistribution", "\nLicense:",
    ),
    Source(
        "apache2-doc", "Apache HTTP Server 2.4 documentation", "Apache-2.0",
        "Copyright 2022 The Apache Software Foundation", 10_000,
    ),
    Source(
        "rust-doc", "The Rust Programming Language, Reference and companion books", "MIT or Apache-2.0",
        "Copyright The Rust Project Developers", 10_000,
    ),
]  # fmt: skip


@dataclasses.dataclass
class Document:
    """One document: a page, a chapter or a run of dictionary entries."""

    source: str
    name: str
    text: str
    blocks: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    @property
    def split(self) -> str:
        """`train`, `val` or `test`, from a hash of the name, so that the split does not depend on order."""
        bucket = int(hashlib.sha256(f"{self.source}/{self.name}".encode()).hexdigest()[:8], 16) % 1000
        if bucket < 12:
            return "val"
        return "test" if bucket < 30 else "train"


_PUNCTUATION = str.maketrans(
    {
        "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": " - ", "\u2026": "...",
        "\u00a0": " ", "\u2192": "->", "\u00d7": "x", "\u2022": "-", "\u2265": ">=", "\u2264": "<=", "\u2260": "!=",
        "\u00b6": "", "\u2212": "-", "\u2715": "", "\u00e9": "e", "\u00e8": "e", "\u00e0": "a", "\u00ef": "i",
    }
)  # fmt: skip


def normalise(text: str) -> str:
    """Plain ASCII in single spaces: a vocabulary of 4096 has no room for typographic variants."""
    text = text.translate(_PUNCTUATION).encode("ascii", "ignore").decode()
    return re.sub(r"\s+", " ", text).strip()


class PageReader(html.parser.HTMLParser):
    """Reads the running prose out of a documentation page: headings, paragraphs and list items."""

    BLOCKS = frozenset({
        "p", "li", "dt", "dd", "h1", "h2", "h3", "h4", "h5", "h6", "div", "blockquote", "section", "article", "br",
        "ul", "ol", "dl", "tr", "td", "th", "body",
    })  # fmt: skip
    SKIP = frozenset({
        "script", "style", "pre", "table", "nav", "header", "footer", "head", "svg", "button", "select", "form",
        "aside",
    })  # fmt: skip
    SKIP_CLASSES = frozenset({
        "navheader", "navfooter", "sphinxsidebar", "related", "toc", "sidebar", "top", "bottomlang", "toplang",
        "nosearch", "menu_wrap", "sidenote", "breadcrumb", "headerlink", "highlight", "clearer", "buttons",
        "nav-wrapper", "refsynopsisdiv", "page-header", "path", "up", "out-of-date", "imgcontainer", "fancy_toc",
        "rightsidebar", "fancy", "admonition-deprecated", "literal-block",
    })  # fmt: skip

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[tuple[str, str]] = []
        self._tag = "p"
        self._buffer: list[str] = []
        self._skip_tag = ""
        self._skip_depth = 0

    def flush(self) -> None:
        text = normalise("".join(self._buffer))
        self._buffer.clear()
        if text:
            self.blocks.append((self._tag, text))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skip_tag:
            self._skip_depth += tag == self._skip_tag
            return
        classes = set((dict(attrs).get("class") or "").split())
        if tag in self.SKIP or (tag in ("div", "a", "ul", "span") and classes & self.SKIP_CLASSES):
            if tag in self.SKIP or tag in ("div", "ul"):
                self.flush()
            self._skip_tag, self._skip_depth = tag, 1
        elif tag in self.BLOCKS:
            self.flush()
            self._tag = tag

    def handle_endtag(self, tag: str) -> None:
        if self._skip_tag:
            self._skip_depth -= tag == self._skip_tag
            if self._skip_depth <= 0:
                self._skip_tag = ""
        elif tag in self.BLOCKS:
            self.flush()
            self._tag = "p"

    def handle_data(self, data: str) -> None:
        if not self._skip_tag:
            self._buffer.append(data)


def is_prose(text: str) -> bool:
    """Whether a block reads as a sentence and not as code, a signature or a list of links."""
    if len(text) < 40 or len(text) > 6000:
        return False
    letters = sum(c.isalpha() or c in " ,." for c in text)
    return letters / len(text) > 0.85 and text.count(" ") >= 6


def read_page(source: str, name: str, path: Path) -> Document | None:
    """The prose of one page, or None where there is too little of it."""
    reader = PageReader()
    with contextlib.suppress(AssertionError):
        reader.feed(path.read_text("utf-8", "replace"))
    reader.flush()
    kept: list[str] = []
    pending = ""
    for tag, text in reader.blocks:
        if tag.startswith("h") and len(tag) == 2:
            pending = text if 3 < len(text) < 100 else ""
        elif is_prose(text):
            if pending:
                kept.append(pending)
                pending = ""
            kept.append(text)
    body = "\n\n".join(kept)
    if len(body) < 300:
        return None
    return Document(source, name, body, reader.blocks)


def pages(source: str, root: Path, skip: str) -> Iterator[Document]:
    """Every page under `root` whose relative path does not match `skip`."""
    for path in sorted(root.rglob("*.html*")):
        name = str(path.relative_to(root))
        if not path.is_symlink() and path.suffix == ".html" and not re.search(skip, name):
            document = read_page(source, name, path)
            if document is not None:
                yield document


# --- Jane Austen -----------------------------------------------------------------------------------------------------


def _r_strings(blob: bytes) -> list[str]:
    """The strings of a serialised R character vector (XDR format, versions 2 and 3); [] for any other object."""
    if blob[:2] != b"X\n":
        return []

    def word(at: int) -> int:
        return int.from_bytes(blob[at : at + 4], "big", signed=True)

    at = 14
    if word(2) == 3:
        at += 4 + word(at)
    if word(at) & 0xFF != 16:
        return []
    count = word(at + 4)
    at += 8
    out: list[str] = []
    for _ in range(count):
        size = word(at + 4)
        at += 8
        if size >= 0:
            out.append(blob[at : at + size].decode("utf-8", "replace"))
            at += size
    return out


def austen(root: Path) -> Iterator[Document]:
    """The chapters of the six novels, out of R's lazy-load data base (each entry: a length, then a zlib stream)."""
    data = next(root.rglob("data/Rdata.rdb")).read_bytes()
    at, book = 0, 0
    while at + 4 < len(data):
        stream = zlib.decompressobj()
        lines = _r_strings(stream.decompress(data[at + 4 :]))
        at = len(data) - len(stream.unused_data)
        if not lines:
            continue
        book += 1
        whole = "\n".join(line.strip() for line in lines)
        parts = re.split(r"\n(?=(?:CHAPTER|Chapter) [IVXLC\d]+)", whole)
        for number, part in enumerate(parts[1:], 1):
            paragraphs = [normalise(p).replace("_", "") for p in re.split(r"\n\s*\n", part)]
            text = "\n\n".join(p for p in paragraphs if p and not re.match(r"(THE END|Finis|VOLUME)", p, re.I))
            if len(text) > 1000:
                yield Document("r-cran-janeaustenr", f"book{book}/chapter{number}", text)


# --- WordNet ---------------------------------------------------------------------------------------------------------

_UNSUITABLE = re.compile(
    r"offensive|disparag|derogat|\bslur\b|obscen|vulgar|contempt|sexual|genital|intercourse|prostitut|copulat|erotic|"
    r"penis|vagina|brothel|pornograph|masturbat|orgasm|excrement|defecat|urinat|feces|faeces|rape\b|\bracis|"
    r"\b(?:a|an) (?:stupid|foolish|ugly|despicable|promiscuous)|ethnic|negro|\bnazi|suicid|incest|homosexual|breast|"
    r"buttock|lesbian|slut|whore|lewd|lustful|naked|nude|murder|tortur|genocid|jew\b|semitic|\banal\b|\bbloody\b",
    re.I,
)
_OBSCURE = re.compile(
    r"\bgenus\b|\bgenera\b|\bfamily [A-Z]|\bsuborder\b|\btaxonom|\b[12]\d{3}-|\(born|\bborn in\b|\bphylum\b", re.I
)
_POS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}


@dataclasses.dataclass
class Synset:
    """One WordNet sense."""

    key: str
    pos: str
    lexfile: int
    lemmas: list[str]
    definition: str
    examples: list[str]
    hypernyms: list[str]
    hyponyms: list[str]
    antonyms: list[tuple[int, str, int]]
    split: str = "train"


def load_wordnet(root: Path) -> tuple[dict[str, Synset], list[tuple[str, str, str, int]]]:
    """The suitable synsets, and (lemma, part of speech, synset of its first sense, number of tagged uses)."""
    folder = next(root.rglob("data.noun")).parent
    synsets: dict[str, Synset] = {}
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text("latin-1").splitlines():
            if line.startswith(" "):
                continue
            head, gloss = line.split(" | ", 1)
            fields = head.split()
            pos = "a" if fields[2] == "s" else fields[2]
            count = int(fields[3], 16)
            lemmas = [re.sub(r"\(\w+\)$", "", w).replace("_", " ") for w in fields[4 : 4 + 2 * count : 2]]
            at = 4 + 2 * count
            pointers = [fields[at + 1 + 4 * i : at + 5 + 4 * i] for i in range(int(fields[at]))]
            symbols = {p[0] for p in pointers}
            gloss = normalise(gloss)
            definition = re.split(r';\s*"|\s"(?=[^"]*"$)', gloss)[0].strip(" ;:")
            examples = [e for e in re.findall(r'"([^"]{12,140})"', gloss) if e[0].isalpha()]
            if _UNSUITABLE.search(gloss) or any(_UNSUITABLE.search(w) for w in lemmas):
                continue
            if not re.match(r"[a-z(].{7}", definition, re.I):
                continue
            if _OBSCURE.search(gloss) or ("@i" in symbols and re.search(r"\d", gloss)):
                continue
            key = pos + fields[0]
            synsets[key] = Synset(
                key, pos, int(fields[1]), lemmas, definition, examples,
                [pos + p[1] for p in pointers if p[0] == "@"],
                [pos + p[1] for p in pointers if p[0] == "~"],
                [(int(p[3][:2], 16), pos + p[1], int(p[3][2:], 16)) for p in pointers if p[0] == "!"],
            )  # fmt: skip
    uses: Counter[tuple[str, str]] = Counter()
    for line in (folder / "cntlist.rev").read_text("latin-1").splitlines():
        sense, _, tagged = line.split()
        lemma, rest = sense.split("%", 1)
        uses[lemma, {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}[rest[0]]] += int(tagged)
    words: list[tuple[str, str, str, int]] = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"index.{part}").read_text("latin-1").splitlines():
            if line.startswith(" "):
                continue
            fields = line.split()
            first = fields[1] + fields[-int(fields[2])]
            if first in synsets:
                words.append((fields[0].replace("_", " "), fields[1], first, uses[fields[0], fields[1]]))
    return synsets, words


def wordnet_documents(synsets: dict[str, Synset]) -> Iterator[Document]:
    """Dictionary pages of a dozen neighbouring entries; marks every synset with the split of its page."""
    groups: dict[tuple[str, int], list[Synset]] = defaultdict(list)
    for synset in synsets.values():
        groups[synset.pos, synset.lexfile].append(synset)
    for (pos, lexfile), members in sorted(groups.items()):
        for start in range(0, len(members), 12):
            page = members[start : start + 12]
            entries = []
            for synset in page:
                entry = f"{', '.join(synset.lemmas)} ({_POS[pos]}): {synset.definition}."
                if synset.examples:
                    entry += " For example: " + "; ".join(f'"{e}"' for e in synset.examples[:3]) + "."
                entries.append(entry)
            document = Document("wordnet-base", f"{pos}{lexfile}/{start}", "\n\n".join(entries))
            for synset in page:
                synset.split = document.split
            yield document


# --- Chat ------------------------------------------------------------------------------------------------------------

Turn = tuple[str, str]

SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You are a friendly assistant that explains words.",
    "You explain words and computing terms in plain English.",
]

SMALL_TALK: list[tuple[list[str], str]] = [
    (
        ["Hello", "Hello!", "Hi", "Hi!", "Hi there", "Good morning", "Good evening", "Hey", "hello", "hi", "Good day"],
        "Hello! Ask me what a word means, for another word for it, or about a computing term.",
    ),
    (
        ["How are you?", "How are you today?", "How do you do?", "Are you well?", "how are you"],
        "I am well, thank you. What would you like to know?",
    ),
    (
        ["Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Introduce yourself.",
         "Are you a robot?", "Are you a human?", "who are you"],
        "I am a very small language model that comes with pipo_ray. I learned from a dictionary, some novels and "
        "computer manuals, so I can explain words, but I am often wrong.",
    ),
    (
        ["What can you do?", "How can you help me?", "Can you help me?", "Help", "help", "What do you know?",
         "I need help.", "What can I ask you?"],
        "I can explain words, give another word or the opposite of a word, use a word in a sentence, and say a little "
        "about SQL and Python. Try: What is a computer?",
    ),
    (
        ["Thank you", "Thank you!", "Thanks", "Thanks!", "Thank you very much.", "thanks", "Great, thanks."],
        "You are welcome.",
    ),
    (
        ["Goodbye", "Bye", "Bye!", "Good night", "See you", "See you later.", "Goodbye!"],
        "Goodbye, and come back soon.",
    ),
    (
        ["How big are you?", "How many parameters do you have?", "Are you a large model?", "How large are you?"],
        "I have about four million parameters. That is very small: my weights take less than ten megabytes.",
    ),
    (
        ["Who made you?", "Where do you come from?", "How were you trained?", "What did you learn from?"],
        "I was trained in a few minutes on free texts: the WordNet dictionary, the novels of Jane Austen, and the "
        "manuals of PostgreSQL, SQLite, Python, Django, Apache and Rust.",
    ),
    (
        ["Are you always right?", "Can I trust you?", "Are your answers correct?", "Do you make mistakes?"],
        "No. I am a very small model and I am often wrong. Please check what I say.",
    ),
    (
        ["What is pipo_ray?", "What is pipo?", "Tell me about pipo_ray.", "What does pipo_ray do?"],
        "pipo_ray runs a large language model on a machine that it does not fit in. It keeps the weights outside the "
        "device and streams them in, block by block, while the device computes.",
    ),
    (["Test", "test", "This is a test.", "Are you there?", "Can you hear me?"], "Yes, I am here."),
    (["Yes", "Yes.", "OK", "Okay", "ok", "Good", "I see."], "Good. What else would you like to know?"),
    (["No", "No.", "No, thank you.", "Nothing"], "Very well. Ask me whenever you like."),
]  # fmt: skip


def article(word: str) -> str:
    """The word with an indefinite article."""
    return ("an " if word[0] in "aeiou" else "a ") + word


def examples_with(word: str, synset: Synset) -> list[str]:
    """The examples of a sense that use this word, and not one of its synonyms."""
    stem = word.lower()[: max(3, len(word) - 2)]
    return [example for example in synset.examples if stem in example.lower()]


def definition_turn(rng: random.Random, word: str, synset: Synset) -> Turn:
    """A question for the meaning of a word, and the answer."""
    if synset.pos == "n":
        questions = [
            f"What is {article(word)}?", f"What is {article(word)}?", f"What is {word}?", f"Define {word}.",
            f"What does {word} mean?", f"What does the word {word} mean?", f"Explain the word {word}.",
            f"Tell me about {word}.", f"what is {article(word)}", f"What is the meaning of {word}?",
        ]  # fmt: skip
        definition = synset.definition
        bare = word[0].islower() and re.match(r"(a|an|any|the|one|someone|something|anything) ", definition)
        subject = article(word) if bare and re.match(r"(a|an|someone|any) ", definition) else word
        if bare:
            answer = f"{subject[0].upper()}{subject[1:]} is {definition}."
        else:
            answer = f"{word[0].upper()}{word[1:]}: {definition}."
    else:
        if synset.pos == "v":
            questions = [
                f"What does it mean to {word}?", f"What does {word} mean?", f"What does the verb {word} mean?",
                f"Define {word}.", f"What does to {word} mean?",
            ]  # fmt: skip
            answer = f"To {word} means to {synset.definition}."
        else:
            kind = _POS[synset.pos]
            questions = [
                f"What does {word} mean?", f"What does the word {word} mean?", f"Define {word}.",
                f"What is the meaning of {word}?", f"What does the {kind} {word} mean?",
            ]  # fmt: skip
            answer = f"{word[0].upper()}{word[1:]} is an {kind}. It means: {synset.definition}."
    examples = examples_with(word, synset)
    if examples and len(answer) < 160:
        answer += f' For example: "{examples[0]}".'
    return rng.choice(questions), answer


def extra_turns(rng: random.Random, word: str, synset: Synset, synsets: dict[str, Synset]) -> Iterator[Turn]:
    """Questions for synonyms, opposites, examples, kinds and sub-kinds of a word."""
    same = [w for w in synset.lemmas if w.lower() != word.lower()]
    if same:
        question = rng.choice(
            [f"What is another word for {word}?", f"Give me a synonym of {word}.", f"Another word for {word}?"]
        )
        yield question, f"Another word for {word} is {same[0]}."
    for source, target, index in synset.antonyms:
        other = synsets.get(target)
        if other and 0 < source <= len(synset.lemmas) and synset.lemmas[source - 1] == word:
            opposite = other.lemmas[max(index, 1) - 1]
            question = rng.choice([f"What is the opposite of {word}?", f"Give me the opposite of {word}."])
            yield question, f"The opposite of {word} is {opposite}."
    examples = examples_with(word, synset)
    if examples:
        question = rng.choice([f"Use {word} in a sentence.", f"Give me an example of the word {word}."])
        example = rng.choice(examples)
        yield question, f"{example[0].upper()}{example[1:]}{'' if example[-1] in '.!?' else '.'}"
    kinds = [synsets[k].lemmas[0] for k in synset.hypernyms if k in synsets]
    if synset.pos == "n" and kinds and word[0].islower():
        subject = article(word)
        question = rng.choice([f"What kind of thing is {subject}?", f"What sort of thing is {subject}?"])
        yield question, f"{subject[0].upper()}{subject[1:]} is a kind of {kinds[0]}."
    members = [synsets[k].lemmas[0] for k in synset.hyponyms if k in synsets]
    if synset.pos == "n" and len(members) >= 3:
        question = rng.choice([f"Name some kinds of {word}.", f"What kinds of {word} are there?"])
        yield question, f"Some kinds of {word} are: {', '.join(members[:4])}."


def manual_turns(documents: Iterable[Document]) -> Iterator[list[Turn]]:
    """Questions out of the manuals' training pages: glossaries, SQL commands, Python modules, page titles."""
    for document in documents:
        if document.split != "train":
            continue
        blocks = document.blocks
        if document.name == "glossary.html":
            manual = "Python" if document.source.startswith("python") else "PostgreSQL"
            for (tag, term), (_, text) in itertools.pairwise(blocks):
                if tag == "dt" and len(term) < 40 and 30 < len(text) < 500:
                    yield [
                        (f"What is {article(term)} in {manual}?", text),
                        (f"What does {term} mean in {manual}?", text),
                    ]
        for tag, text in blocks[:6]:
            command = re.match(r"([A-Z][A-Z ]{3,40}) - ([a-z].{5,100})$", text)
            if document.source.startswith("postgresql") and command:
                name, purpose = command.groups()
                answer = f"The SQL command {name} is there to {purpose}."
                yield [
                    (f"What does the SQL command {name} do?", answer), (f"What is {name}?", answer),
                    (f"What does {name} do?", answer), (f"Explain {name} in SQL.", answer),
                ]  # fmt: skip
            module = re.match(r"([a-z_.0-9]{2,30}) - ([A-Z].{5,100})$", text)
            if document.source.startswith("python3") and tag == "h1" and module:
                name, purpose = module.groups()
                answer = f"The Python module {name}: {purpose.rstrip('.')}."
                yield [
                    (f"What is the Python module {name}?", answer), (f"What does the Python module {name} do?", answer),
                    (f"What is {name} in Python?", answer),
                ]  # fmt: skip
        titles = [text for tag, text in blocks if tag in ("h1", "h2")][:1]
        first = next((text for tag, text in blocks if tag == "p" and is_prose(text) and text[0].isupper()), "")
        if titles and first and 60 < len(first) < 450 and first[-1] == "." and document.source != "wordnet-base":
            title = re.sub(r"^(Chapter |Appendix )?[\dA-Z]?[\d.]+ ", "", titles[0]).strip(" .")
            if 3 < len(title) < 60 and " - " not in title:
                yield [(f"Tell me about {title}.", first), (f"Explain {title}.", first)]


def conversation(rng: random.Random, turns: list[Turn]) -> str:
    """Turns in the chat template's format, sometimes with a system message."""
    text = BOS
    if rng.random() < 0.25:
        text += f"{IM_START}system\n{rng.choice(SYSTEM_PROMPTS)}{IM_END}\n"
    for question, answer in turns:
        text += f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n{answer}{IM_END}\n"
    return text


def chat_documents(
    synsets: dict[str, Synset], words: list[tuple[str, str, str, int]], documents: list[Document]
) -> list[str]:
    """All conversations: common words often, rare words once or not at all; about a third with several turns."""
    rng = random.Random(SEED)
    turns: list[Turn] = []
    strongest: dict[str, int] = {}
    for word, _, _, uses in words:
        strongest[word] = max(strongest.get(word, 0), uses)
    for word, _, key, uses in words:
        synset = synsets[key]
        if synset.split != "train" or uses < 1 or len(word) < 2 or re.search(r"[^a-zA-Z' -]", word):
            continue
        if 4 * uses < strongest[word]:
            continue
        shown = next((w for w in synset.lemmas if w.lower() == word), word)
        copies = 8 if uses >= 30 else 5 if uses >= 8 else 3 if uses >= 3 else 2
        turns.extend({definition_turn(rng, shown, synset) for _ in range(copies)})
        for _ in range(2 if uses >= 8 else 1):
            turns.extend(extra_turns(rng, shown, synset, synsets))
    for group in manual_turns(documents):
        turns.extend(group * 2)
    for questions, answer in SMALL_TALK:
        turns.extend((rng.choice(questions), answer) for _ in range(400))
        turns.extend((question, answer) for question in questions for _ in range(10))
    turns = [(q, a) for q, a in sorted(turns) if not _UNSUITABLE.search(q + a)]
    rng.shuffle(turns)
    out: list[str] = []
    at = 0
    while at < len(turns):
        size = 1 if rng.random() < 0.65 else rng.choice([2, 3])
        out.append(conversation(rng, turns[at : at + size]))
        at += size
    return out


# ---------------------------------------------------------------------------------------------------------------------
# corpus
# ---------------------------------------------------------------------------------------------------------------------


def fetch(packages: Path, unpacked: Path) -> dict[str, str]:
    """Downloads the packages that `packages` lacks, unpacks them all; returns their versions."""
    packages.mkdir(parents=True, exist_ok=True)
    versions = {}
    for source in SOURCES:
        found = sorted(packages.glob(f"{source.package}_*.deb"))
        if not found:
            subprocess.run(["apt-get", "download", source.package], cwd=packages, check=True)
            found = sorted(packages.glob(f"{source.package}_*.deb"))
        versions[source.package] = subprocess.run(
            ["dpkg-deb", "-f", str(found[-1]), "Version"], check=True, capture_output=True, text=True
        ).stdout.strip()
        subprocess.run(["dpkg", "-x", str(found[-1]), str(unpacked / source.package)], check=True)
    return versions


def collect(root: Path) -> tuple[list[Document], dict[str, Synset], list[tuple[str, str, str, int]]]:
    """Every document of every source, in a fixed order."""
    synsets, words = load_wordnet(root / "wordnet-base")
    documents = list(wordnet_documents(synsets))
    documents += austen(root / "r-cran-janeaustenr")
    doc = "usr/share/doc"
    plan: list[tuple[str, str, str]] = [
        ("sqlite3-doc", f"{doc}/sqlite3", r"releaselog|syntax/|^draft|matrix|changes|chronology|search|keyword"),
        ("postgresql-doc-15", f"{doc}/postgresql-doc-15/html", r"^release|bookindex|^errcodes|^biblio|acronyms"),
        ("python3.11-doc", f"{doc}/python3.11/html", r"changelog|genindex|modindex|search|contents|license|download"),
        ("python-django-doc", f"{doc}/python-django-doc/html", r"_modules|releases/|genindex|modindex|search|contents"),
        ("apache2-doc", f"{doc}/apache2-doc/manual/en", r"sitemap|genindex|quickreference|directives"),
    ]  # fmt: skip
    for package, where, skip in plan:
        documents += pages(package, root / package / where, skip)
    books = root / "rust-doc" / doc / "rust-doc/html"
    for book in ("book", "reference", "nomicon", "edition-guide", "embedded-book", "rustc", "rustdoc"):
        documents += (
            dataclasses.replace(d, name=f"{book}/{d.name}") for d in pages("rust-doc", books / book, r"print\.html|toc")
        )
    return documents, synsets, words


def drop_repeats(documents: list[Document]) -> list[Document]:
    """Drops paragraphs seen before, in train, validation and test alike, and documents that this empties."""
    seen: set[bytes] = set()
    kept = []
    for document in documents:
        paragraphs = []
        for paragraph in document.text.split("\n\n"):
            digest = hashlib.blake2b(paragraph.lower().encode(), digest_size=8).digest()
            if len(paragraph) < 60 or digest not in seen:
                paragraphs.append(paragraph)
                seen.add(digest)
        text = "\n\n".join(paragraphs)
        if len(text) >= 300:
            kept.append(dataclasses.replace(document, text=text))
    return kept


def write_notice(root: Path, versions: dict[str, str]) -> str:
    """The notice that the licences of the texts ask for."""
    out = [
        "The bundled model was trained on, and heldout.txt and calibration.txt quote, the following texts.",
        "Their licences permit use, modification and redistribution, provided that these notices are kept.",
        "",
    ]
    for source in SOURCES:
        out += ["=" * 100, f"{source.title}  (Debian package {source.package} {versions[source.package]})"]
        out += [f"Licence: {source.licence}", source.copyright, ""]
        folder = root / source.package / "usr/share/doc"
        if source.licence_start:
            text = (folder / source.package / "copyright").read_text("utf-8")
            text = re.sub(r"^License: .*\n", "", text[text.index(source.licence_start) :])
            end = text.find(source.licence_end, 10)
            text = text[: end if end > 0 else None]
            text = re.sub(r"^ \.$", "", text, flags=re.M).replace("<NAME>", "Django")
            out += [line.rstrip() for line in text.strip().splitlines()] + [""]
        elif source.package == "rust-doc":
            out += (folder / "rust-doc/html/LICENSE-MIT.txt").read_text("utf-8").strip().splitlines()
            out.append("")
        elif source.licence == "Apache-2.0":
            out += ["This product includes software developed at", "The Apache Software Foundation.", ""]
            out += ["The Apache License, Version 2.0, is this project's own licence; see its LICENSE file.", ""]
    return "\n".join(out)


def train_tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level BPE tokenizer that puts <|bos|> before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def encode(tokenizer: Any, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """All texts in one array of ids, and where each begins."""
    arrays = []
    for at in range(0, len(texts), 2000):
        for encoding in tokenizer.encode_batch(texts[at : at + 2000], add_special_tokens=False):
            arrays.append(np.array(encoding.ids, dtype=np.uint16))
    starts = np.cumsum([0] + [len(a) for a in arrays[:-1]]).astype(np.int64)
    return np.concatenate(arrays), starts


def excerpt(documents: Iterable[Document]) -> str:
    """Whole documents of every source, up to its share of bytes."""
    texts: list[str] = []
    used: Counter[str] = Counter()
    for document in documents:
        limit = next(s.heldout_bytes for s in SOURCES if s.package == document.source)
        if used[document.source] + min(len(document.text), limit) <= limit:
            # of the longest pages the first `limit` bytes are enough
            text = document.text[:limit].rsplit("\n\n", 1)[0] if len(document.text) > limit else document.text
            used[document.source] += len(text)
            texts.append(text)
    return "\n\n".join(texts) + "\n"


def command_corpus(args: argparse.Namespace) -> None:
    """Builds the token arrays, the tokenizer, the held-out and the calibration text and the notices."""
    args.data.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        unpacked = Path(scratch) / "unpacked"
        unpacked.mkdir()
        versions = fetch((args.packages or Path(scratch) / "packages").resolve(), unpacked)
        documents, synsets, words = collect(unpacked)
        (args.data / "NOTICE").write_text(write_notice(unpacked, versions))
    rng = random.Random(SEED)
    rng.shuffle(documents)
    documents = drop_repeats(documents)
    chat = chat_documents(synsets, words, documents)
    parts: dict[str, list[Document]] = {"train": [], "val": [], "test": []}
    for document in documents:
        parts[document.split].append(document)

    heldout = excerpt(parts["test"])
    (args.data / "heldout.txt").write_text(heldout)
    # Without addresses of other sites: a text that is shipped should name none.
    (args.data / "calibration.txt").write_text(excerpt(d for d in parts["train"] if "://" not in d.text))

    plain = [f"{BOS}{d.text}{EOS}" for d in parts["train"]]
    sample = [d.text for d in rng.sample(parts["train"], len(parts["train"]) * 2 // 3)]
    sample += rng.sample(chat, len(chat) // 4)
    tokenizer = train_tokenizer(re.sub(r"<\|\w+\|>", "", text) for text in sample)
    tokenizer.save(str(args.data / "tokenizer.json"))
    text_ids, text_starts = encode(tokenizer, plain)
    chat_ids, chat_starts = encode(tokenizer, chat)
    val_ids, _ = encode(tokenizer, [f"{BOS}{d.text}{EOS}" for d in parts["val"]])
    np.savez_compressed(
        args.data / "tokens.npz",
        text=text_ids, text_starts=text_starts, chat=chat_ids, chat_starts=chat_starts, val=val_ids,
    )  # fmt: skip
    summary = {
        "packages": {
            s.package: {
                "title": s.title, "version": versions[s.package], "licence": s.licence,
                "documents": sum(d.source == s.package for d in documents),
                "bytes": sum(len(d.text) for d in documents if d.source == s.package),
            }
            for s in SOURCES
        },
        "documents": {name: len(part) for name, part in parts.items()},
        "conversations": len(chat),
        "tokens": {"text": len(text_ids), "chat": len(chat_ids), "val": len(val_ids)},
        "heldout_bytes": len(heldout),
    }  # fmt: skip
    (args.data / "sources.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


# ---------------------------------------------------------------------------------------------------------------------
# train
# ---------------------------------------------------------------------------------------------------------------------


def build_model(args: argparse.Namespace, bos: int, eos: int, pad: int) -> Any:
    """The model, with dropout on what each attention and each MLP adds to the residual stream (training only)."""
    import torch
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # A name without a mask function, so that no mask is built: compiled, "sdpa" would build one over all positions to
    # look for packed sequences, which keeps PyTorch from its causal flash kernel.
    AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 32,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
        attention_dropout=0.0,
        initializer_range=0.02,
        use_cache=False,
    )
    config._attn_implementation = "sdpa_causal"
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config)

    class DropoutLinear(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.dropout(super().forward(input), args.dropout, self.training)

    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.mul_(1 / math.sqrt(2 * args.layers))
                linear.__class__ = DropoutLinear
    return model


class Batches:
    """Draws training rows: long windows anywhere in the text, or short rows that begin where a document does."""

    def __init__(self, data: Path, device: Any, tokens_per_step: int) -> None:
        import torch

        arrays = np.load(data / "tokens.npz")
        text, chat = arrays["text"], arrays["chat"]
        self.text_tokens, self.chat_tokens = len(text), len(chat)
        self.stream = torch.from_numpy(np.concatenate([text, chat]).astype(np.int32)).to(device)
        self.text_starts, self.chat_starts = arrays["text_starts"], arrays["chat_starts"] + len(text)
        self.val = torch.from_numpy(arrays["val"].astype(np.int64)).to(device)
        self.device = device
        self.tokens_per_step = tokens_per_step
        self.rng = np.random.default_rng(SEED)

    def draw(self) -> Any:
        """One batch of token ids, [rows, length + 1]."""
        import torch

        long = self.rng.random() < 0.65
        length = 1024 if long else 256
        rows = max(1, self.tokens_per_step // length)
        last = len(self.stream) - length - 1
        if long:
            # prose fills four fifths of the long rows, conversations the rest
            of_text = self.rng.random(rows) < 0.8
            starts = np.where(
                of_text,
                self.rng.integers(0, self.text_tokens, rows),
                self.text_tokens + self.rng.integers(0, self.chat_tokens, rows),
            )
        else:
            of_text = self.rng.random(rows) < 0.2
            starts = np.where(of_text, self.rng.choice(self.text_starts, rows), self.rng.choice(self.chat_starts, rows))
        starts = np.minimum(starts, last)
        index = torch.from_numpy(starts).to(self.device)[:, None] + torch.arange(length + 1, device=self.device)
        return self.stream[index].long()


def mean_loss(model: Any, ids: Any, bos: int, autocast: Callable[[], Any], length: int = 1023) -> float:
    """Mean loss per token over windows of `length` tokens, each behind a <|bos|>."""
    import torch

    total, count = 0.0, 0
    rows = [ids[at : at + length] for at in range(0, len(ids), length)]
    with torch.no_grad():
        for at in range(0, len(rows), 16):
            for size in sorted({len(r) for r in rows[at : at + 16]}):
                batch = torch.stack([r for r in rows[at : at + 16] if len(r) == size])
                first = torch.full((len(batch), 1), bos, dtype=batch.dtype, device=batch.device)
                with autocast():
                    logits = model(input_ids=torch.cat([first, batch[:, :-1]], 1), use_cache=False).logits
                total += torch.nn.functional.cross_entropy(
                    logits.float().flatten(0, 1), batch.flatten(), reduction="sum"
                ).item()
                count += batch.numel()
    return total / count


def save_checkpoint(model: Any, data: Path, out: Path) -> None:
    """Writes the model in bf16, with tokenizer and chat template."""
    import torch
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().to(torch.bfloat16).cpu().contiguous() for k, v in model.state_dict().items()}
    save_file(weights, str(out / "model.safetensors"), metadata={"format": "pt"})
    config = copy.deepcopy(model.config)
    config.dtype = torch.bfloat16
    config.architectures = ["LlamaForCausalLM"]
    config.use_cache = True
    config.save_pretrained(out)
    tokenizer = json.loads((data / "tokenizer.json").read_text())
    ids = {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")))
    write_json(
        out / "generation_config.json",
        {
            "bos_token_id": ids[BOS], "eos_token_id": [ids[EOS], ids[IM_END]], "pad_token_id": ids[PAD],
            "do_sample": True, "temperature": 0.7, "top_p": 0.9,
        },
    )  # fmt: skip
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, "pad_token": PAD,
            "extra_special_tokens": [IM_START, IM_END], "model_max_length": config.max_position_embeddings,
            "clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"],
        },
    )  # fmt: skip
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def command_train(args: argparse.Namespace) -> None:
    """Trains the model and keeps the checkpoint with the lowest validation loss."""
    import torch

    began = time.monotonic()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = True
    args.out.mkdir(parents=True, exist_ok=True)
    log_path = args.out / "training_log.jsonl"
    log_path.unlink(missing_ok=True)

    def log(**record: Any) -> None:
        record = {"seconds": round(time.monotonic() - began, 1), **record}
        print(json.dumps(record), flush=True)
        with log_path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def autocast() -> Any:
        return torch.autocast(device.type, torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()

    tokenizer = json.loads((args.data / "tokenizer.json").read_text())
    ids = {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    model = build_model(args, ids[BOS], ids[EOS], ids[PAD]).to(device)
    batches = Batches(args.data, device, args.batch_tokens)
    parameters = sum(p.numel() for p in model.parameters())
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.95), eps=1e-8, fused=device.type == "cuda",
    )  # fmt: skip
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    log(
        event="start", device=name, torch=torch.__version__, parameters=parameters,
        text_tokens=batches.text_tokens, chat_tokens=batches.chat_tokens, batch_tokens=args.batch_tokens, lr=args.lr,
        dropout=args.dropout, weight_decay=args.weight_decay, layers=args.layers, hidden=args.hidden,
        intermediate=args.intermediate,
    )  # fmt: skip

    def loss_of(module: Any, batch: Any) -> Any:
        with autocast():
            logits = module(input_ids=batch[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    forward = loss_of
    module = model
    if args.compile and device.type == "cuda":
        state = copy.deepcopy(model.state_dict())
        draws = copy.deepcopy(batches.rng)
        try:
            compiled = torch.compile(loss_of, dynamic=False)
            shapes: set[Any] = set()
            while len(shapes) < 2:  # until rows of both lengths were drawn: each is compiled on its own
                batch = batches.draw()
                compiled(model, batch).backward()
                shapes.add(batch.shape)
            torch.cuda.synchronize()
            forward = compiled
            log(event="compiled")
        except Exception as error:  # the compiler needs parts that a machine may lack; plain execution always works
            log(event="not compiled", reason=str(error)[:300])
        model.load_state_dict(state)
        batches.rng = draws
        optimizer.zero_grad(set_to_none=True)

    warmup = args.warmup
    total = args.steps or 0
    measure_from, measure_to = 20, 80
    measured_at = 0.0
    reserve = 20.0
    best = math.inf
    done = 0
    running: list[Any] = []
    torch.manual_seed(SEED + 1)
    while True:
        if not total and done in (measure_from, measure_to):
            if device.type == "cuda":
                torch.cuda.synchronize()
            if done == measure_from:
                measured_at = time.monotonic()
            else:
                per_step = (time.monotonic() - measured_at) / (measure_to - measure_from)
                left = args.minutes * 60 - (time.monotonic() - began) - reserve
                total = max(done + 1, min(done + int(0.95 * left / per_step), args.max_steps))
                log(event="schedule", steps=total, seconds_per_step=round(per_step, 5),
                    tokens_per_second=round(args.batch_tokens / per_step))  # fmt: skip
        progress = min(1.0, done / total) if total else 0.0
        rate = args.lr * min(1.0, (done + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        loss = forward(module, batches.draw())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running.append(loss.detach())
        done += 1
        late = not args.steps and time.monotonic() - began > args.minutes * 60 - reserve * 0.5
        if (total and (done % max(1, total // args.evaluations) == 0 or done >= total)) or late:
            model.eval()
            val = mean_loss(model, batches.val, ids[BOS], autocast)
            train = torch.stack(running).float().mean().item()
            running.clear()
            epochs = done * args.batch_tokens / (batches.text_tokens + batches.chat_tokens)
            log(event="evaluation", step=done, lr=round(rate, 6), train_loss=round(train, 4), val_loss=round(val, 4),
                val_perplexity=round(math.exp(val), 3), epochs=round(epochs, 2), best=val < best)  # fmt: skip
            if val < best:
                best = val
                save_checkpoint(model, args.data, args.out)
        if (total and done >= total) or late:
            break
    result = evaluate(args.out, args.data / "heldout.txt", device)
    log(event="end", steps=done, best_val_perplexity=round(math.exp(best), 3), minutes=args.minutes, **result)


# ---------------------------------------------------------------------------------------------------------------------
# evaluate, finish
# ---------------------------------------------------------------------------------------------------------------------

QUESTIONS = [
    "Hello", "Who are you?", "What is a computer?", "What is a dog?", "What does happy mean?", "Define river.",
    "What is the opposite of hot?", "What is another word for big?", "Use house in a sentence.",
    "What does the SQL command CREATE TABLE do?", "What is an iterator in Python?", "What does it mean to run?",
]  # fmt: skip
PROMPTS = ["It was a fine morning, and Mrs.", "The database server", "When the connection is closed,"]


def evaluate(checkpoint: Path, text: Path, device: Any) -> dict[str, Any]:
    """Perplexity of a checkpoint on a text (bf16 weights, computed in float32), and some of its answers."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).to(device).eval()
    raw = text.read_text()
    ids = torch.tensor(tokenizer(raw, add_special_tokens=False)["input_ids"], device=device)
    loss = mean_loss(model, ids, tokenizer.bos_token_id, contextlib.nullcontext)
    answers: dict[str, str] = {}
    for question in QUESTIONS + PROMPTS:
        if question in PROMPTS:
            prompt = tokenizer.bos_token + question
        else:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
        inputs = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]], device=device)
        output = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=60, do_sample=False, temperature=None,
            top_p=None,
        )  # fmt: skip
        answers[question] = str(tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)).strip()
    return {
        "heldout_perplexity": round(math.exp(loss), 3),
        "heldout_bits_per_byte": round(loss * len(ids) / math.log(2) / len(raw.encode()), 4),
        "heldout_tokens": len(ids),
        "answers": answers,
    }


def command_evaluate(args: argparse.Namespace) -> None:
    """Prints held-out perplexity and answers."""
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    print(json.dumps(evaluate(args.checkpoint, args.text, device), indent=1))


def command_finish(args: argparse.Namespace) -> None:
    """Copies the checkpoint into the package, with the held-out text and the notices, and writes the README."""
    import torch

    torch.set_num_threads(args.threads or 1)
    args.target.mkdir(parents=True, exist_ok=True)
    for name in MODEL_FILES:
        shutil.copyfile(args.checkpoint / name, args.target / name)
    for name in ("heldout.txt", "calibration.txt", "NOTICE"):
        shutil.copyfile(args.data / name, args.target / name)
    result = evaluate(args.target, args.target / "heldout.txt", torch.device("cpu"))
    sources = json.loads((args.data / "sources.json").read_text())
    records = [json.loads(line) for line in (args.checkpoint / "training_log.jsonl").read_text().splitlines()]
    start = next(r for r in records if r["event"] == "start")
    end = next(r for r in records if r["event"] == "end")
    config = json.loads((args.target / "config.json").read_text())
    rows = "\n".join(
        f"| {p['title']} | `{name}` {p['version']} | {p['licence']} | {p['bytes'] / 1e6:.1f} MB |"
        for name, p in sources["packages"].items()
    )
    answers = "\n".join(f"| {q} | {a.replace(chr(10), ' ').replace('|', '/')} |"
                        for q, a in result["answers"].items())  # fmt: skip
    tokens, parts = sources["tokens"], sources["documents"]
    readme = f"""# The bundled model

A Llama-architecture language model of {start["parameters"] / 1e6:.2f} million parameters (bf16,
{(args.target / "model.safetensors").stat().st_size / 1e6:.1f} MB). It is trained from nothing on free text, so that
the program can be tried and measured without a download. It writes recognisable English and explains words; it knows
little and is often wrong. Do not rely on what it says.

## Architecture

`LlamaForCausalLM`: {config["num_hidden_layers"]} layers, hidden size {config["hidden_size"]}, MLP
{config["intermediate_size"]} (SwiGLU), {config["num_attention_heads"]} query heads and
{config["num_key_value_heads"]} key/value heads of {config["head_dim"]}, untied embeddings, vocabulary
{config["vocab_size"]} (byte-level BPE), {config["max_position_embeddings"]} positions. The chat template is ChatML-like
(`<|im_start|>role ... <|im_end|>`); generation ends at `<|eos|>` or `<|im_end|>`.

## Text

| Text | Debian package | Licence | Used |
|---|---|---|---|
{rows}

Running prose only (no code blocks, no tables). The {sources["conversations"]} conversations are made mechanically
from WordNet's definitions, the manuals' glossaries and a few handwritten replies. Senses that WordNet marks as
offensive, and some further topics, are left out. Documents are split into train, validation and test by a hash of
their name ({parts["train"]} / {parts["val"]} / {parts["test"]}); repeated paragraphs are dropped first. Training text:
{tokens["text"] / 1e6:.1f} million tokens of prose, {tokens["chat"] / 1e6:.1f} million of conversations.

The weights are released under this project's licence (Apache-2.0). `NOTICE` carries the notices and licence texts that
the sources ask for; `heldout.txt` and `calibration.txt` quote the sources, each under its own licence.

## Held-out perplexity

`heldout.txt` is an excerpt of the test part ({sources["heldout_bytes"] / 1e3:.0f} kB): no document of it was trained
on, nor used to choose the checkpoint. `calibration.txt` is an excerpt of the training part, of the same mixture.

| Measure | Value |
|---|---|
| perplexity per token | {result["heldout_perplexity"]} |
| bits per byte | {result["heldout_bits_per_byte"]} |
| tokens | {result["heldout_tokens"]} |

Measured over windows of 1023 tokens, each behind a `<|bos|>`; bf16 weights, float32 arithmetic.

## Training

{end["steps"]} steps of {start["batch_tokens"]} tokens on one {start["device"]} in
{end["seconds"] / 60:.1f} minutes (torch {start["torch"]}): AdamW, peak rate {start["lr"]}, cosine decay, weight decay
{start["weight_decay"]}, dropout {start["dropout"]}, bf16 autocast. To repeat it:

```sh
python3 benchmarks/train_bundled_model.py corpus --data .train
python3 benchmarks/train_bundled_model.py train --data .train --out out/bundled --steps {end["steps"]}
python3 benchmarks/train_bundled_model.py finish --checkpoint out/bundled --data .train --target pipo_ray/bundled
```

## Sample answers (greedy)

| Prompt | Answer |
|---|---|
{answers}
"""
    (args.target / "README.md").write_text(readme)
    size = sum(path.stat().st_size for path in args.target.iterdir() if path.is_file())
    print(json.dumps({"bytes": size, **result}, indent=1))


def main() -> None:
    """Parses the command line and runs one step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)

    corpus = commands.add_parser("corpus", help="build the token arrays from Debian packages")
    corpus.add_argument("--data", type=Path, default=Path(".train"))
    corpus.add_argument("--packages", type=Path, help="a folder of .deb files; missing ones are downloaded into it")
    corpus.set_defaults(run=command_corpus)

    train = commands.add_parser("train", help="train the model")
    train.add_argument("--data", type=Path, default=Path(".train"))
    train.add_argument("--out", type=Path, required=True)
    train.add_argument("--minutes", type=float, default=6.0, help="whole run, evaluation included")
    train.add_argument("--steps", type=int, help="exact number of steps, whatever time it takes")
    train.add_argument("--max-steps", type=int, default=8_000)
    train.add_argument("--batch-tokens", type=int, default=65_536)
    train.add_argument("--lr", type=float, default=3e-3)
    train.add_argument("--warmup", type=int, default=200)
    train.add_argument("--weight-decay", type=float, default=0.1)
    train.add_argument("--dropout", type=float, default=0.1)
    train.add_argument("--layers", type=int, default=8)
    train.add_argument("--hidden", type=int, default=192)
    train.add_argument("--intermediate", type=int, default=448)
    train.add_argument("--evaluations", type=int, default=24)
    train.add_argument("--device")
    train.add_argument("--threads", type=int, default=0)
    train.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    train.set_defaults(run=command_train)

    measure = commands.add_parser("evaluate", help="held-out perplexity and sample answers")
    measure.add_argument("--checkpoint", type=Path, required=True)
    measure.add_argument("--text", type=Path, default=Path(".train/heldout.txt"))
    measure.add_argument("--device")
    measure.add_argument("--threads", type=int, default=0)
    measure.set_defaults(run=command_evaluate)

    finish = commands.add_parser("finish", help="put the trained checkpoint into the package")
    finish.add_argument("--checkpoint", type=Path, required=True)
    finish.add_argument("--data", type=Path, default=Path(".train"))
    finish.add_argument("--target", type=Path, default=Path("pipo_ray/bundled"))
    finish.add_argument("--threads", type=int, default=0)
    finish.set_defaults(run=command_finish)

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
