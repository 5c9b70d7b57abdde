"""Expected annotations, computed in plain Python; and texts planted at known likeness of one another."""

import dataclasses
import random
import unicodedata
from collections.abc import Sequence
from typing import Any

_UNSPACED = ("CJK UNIFIED", "HIRAGANA LETTER", "KATAKANA LETTER", "THAI CHARACTER")
VOCABULARY = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in ("a", "e", "i", "ou") for c in ("n", "rt", "st", "ll")]


def words(text: str) -> list[str]:
    found: list[str] = []
    run = ""
    visible = "".join(character for character in text if unicodedata.category(character) != "Cf")
    for character in [*unicodedata.normalize("NFC", visible).lower(), " "]:
        is_unspaced = unicodedata.name(character, "").startswith(_UNSPACED)
        if unicodedata.category(character)[0] in "LMN" and not is_unspaced:
            run += character
            continue
        found += [run] * bool(run) + [character] * is_unspaced
        run = ""
    return found


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    found = words(text)
    return [tuple(found[start : start + n]) for start in range(len(found) - n + 1)]


def shingles(text: str, size: int = 5) -> set[tuple[str, ...]]:
    found = words(text)
    return set(ngrams(text, size)) or ({tuple(found)} if found else set())


def jaccard(one: str, other: str, size: int = 5) -> float:
    a, b = shingles(one, size), shingles(other, size)
    return len(a & b) / len(a | b)


def quality(text: str) -> dict[str, Any]:
    """The group `quality` of a text of plain spaces."""
    tokens, found = text.split(), words(text)
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    grams = ngrams(text, 5)
    again = [line for number, line in enumerate(lines) if line in lines[:number]]

    def ratio(above: float, below: float) -> float | None:
        return above / below if below else None

    def share(hits: Sequence[bool]) -> float | None:
        return ratio(sum(hits), len(hits))

    return {
        "n_words": len(tokens),
        "mean_word_characters": ratio(sum(map(len, tokens)), len(tokens)),
        "alphabetic_word_share": share([any(map(str.isalpha, token)) for token in tokens]),
        "hash_word_ratio": ratio(text.count("#"), len(tokens)),
        "ellipsis_word_ratio": ratio(text.count("...") + text.count("…"), len(tokens)),
        "n_stop_words": len({"the", "be", "to", "of", "and", "that", "have", "with"} & set(found)),
        "unique_word_share": ratio(len(set(found)), len(found)),
        "duplicate_5gram_share": ratio(len(grams) - len(set(grams)), len(grams)),
        "has_curly_bracket": "{" in text,
        "has_lorem_ipsum": "lorem ipsum" in text.lower(),
        "n_lines": len(lines),
        "bullet_line_share": share([line[0] in "•‣▪●◦" or line[:2] in ("- ", "* ") for line in lines]),
        "ellipsis_line_share": share([line.endswith(("...", "…")) for line in lines]),
        "punctuated_line_share": share([line[-1] in '.!?"”…。！？' for line in lines]),
        "short_line_share": share([len(line) < 30 for line in lines]),
        "duplicate_line_share": ratio(len(again), len(lines)),
        "duplicate_line_character_share": ratio(sum(map(len, again)), sum(map(len, lines))),
    }


@dataclasses.dataclass(frozen=True)
class Planted:
    """A text and an edited copy. `jaccard` is the similarity of their shingles of five words."""

    original: str
    copy: str
    jaccard: float


def random_text(rng: random.Random, n_words: int) -> str:
    return " ".join(rng.choices(VOCABULARY, k=n_words))


def plant(rng: random.Random, target: float, n_words: int) -> Planted:
    """A random text and an edited copy whose similarity is near the target: words replaced, left out or put in, one by
    one, or a passage at the end replaced."""
    original = random_text(rng, n_words)
    copy = original.split()
    if rng.random() < 0.3:
        # A share of shared shingles s out of two equal sets is a Jaccard similarity of s / (2 - s).
        kept = round(n_words * 2 * target / (1 + target))
        copy = [*copy[:kept], *random_text(rng, n_words - kept).split()]
    while jaccard(original, " ".join(copy)) > target:
        place = rng.randrange(len(copy))
        copy[place : place + rng.choice((0, 1, 1))] = rng.choice(([], rng.choices(VOCABULARY, k=1)))
    return Planted(original, " ".join(copy), jaccard(original, " ".join(copy)))
