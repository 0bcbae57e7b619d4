"""Pairs of neighbouring sentences from Python's reference manual, which the standard library carries."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pissa_hub.errors import PlanError

Pair = tuple[str, str]

# One section of so many is held out.
HELD_OUT = 4
_UNDERLINE = re.compile(r"([*=~^-])\1{2,}")
_SENTENCE_END = re.compile(r"(?<=[.:]) (?=[A-Z\"])")
_SHORTEST_SENTENCE = 30
_SHORTEST_PARAGRAPH = 80
_PROSE = 0.85


@dataclass(frozen=True)
class Pairs:
    """Sentences with the one that follows each in its paragraph. No sentence occurs twice.

    Attributes:
        training: pairs to learn from.
        held_out: pairs from other sections.
    """

    training: tuple[Pair, ...]
    held_out: tuple[Pair, ...]


def manual() -> Mapping[str, str]:
    """Topic -> plain text, some 500 kB. Raises PlanError where Python was installed without it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise PlanError("this Python lacks its manual, pydoc_data", "use a complete installation of Python") from None
    return topics


def sentence_pairs(topics: Mapping[str, str]) -> Pairs:
    """The pairs of a manual whose topics repeat parts of each other: what occurs again is left out."""
    training: list[Pair] = []
    held_out: list[Pair] = []
    seen: set[str] = set()
    largest_first = sorted(topics, key=lambda name: (-len(topics[name]), name))
    section_number = 0
    for section in (section for name in largest_first for section in _sections(topics[name])):
        pairs = []
        for pair in (pair for paragraph in _paragraphs(section) for pair in _neighbours(paragraph)):
            if pair[0] != pair[1] and seen.isdisjoint(pair):
                pairs.append(pair)
                seen.update(pair)
        if pairs:
            section_number += 1
            (training if section_number % HELD_OUT else held_out).extend(pairs)
    return Pairs(tuple(training), tuple(held_out))


def _sections(text: str) -> Iterator[str]:
    """The text between headings; a heading is a line underlined by punctuation."""
    section: list[str] = []
    for line in text.splitlines():
        if _UNDERLINE.fullmatch(line) and section:
            yield "\n".join(section[:-1])
            section = []
        else:
            section.append(line)
    yield "\n".join(section)


def _paragraphs(section: str) -> Iterator[str]:
    """Paragraphs of prose, each on one line; no grammar, code or tables."""
    for block in re.split(r"\n\s*\n", section):
        paragraph = " ".join(block.split())
        letters = sum(character.isalpha() or character == " " for character in paragraph)
        if len(paragraph) >= _SHORTEST_PARAGRAPH and paragraph[-1] in ".:)" and letters >= _PROSE * len(paragraph):
            yield paragraph


def _neighbours(paragraph: str) -> Iterator[Pair]:
    """First and second sentence, third and fourth, ..."""
    sentences = [part for part in _SENTENCE_END.split(paragraph) if len(part) >= _SHORTEST_SENTENCE]
    return zip(sentences[::2], sentences[1::2], strict=False)
