"""The conditions by which a first corpus is cleaned, each with its reason, and the share of the sample that fails it.

The difference of two models chooses text and does not clean it, so a config begins with columns of `annotate` in
`where`. Input: sampled texts and their languages. Output: `Condition`s. A condition that most of the text would fail
does not fit this text (code, tables, a script without spaces) and is written as a comment. The shares are estimates:
`annotate` computes the columns itself (annotations/quality.py, words.py). Pure.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence

# A condition that a higher share of the sample fails is left out.
MOST_FAILING = 0.2
# So that enough text stays, conditions that would together remove more than this are left out.
_MOST_REMOVED = 0.5
# Texts of one language are filtered by it; below this share, the languages are mixed.
ONE_LANGUAGE = 0.9
_WORD = re.compile(r"\w+")
_LEAST_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class Condition:
    """One line of `where`.

    Attributes:
        sql: the condition.
        reason: why, in words.
        share: share of the sampled text that fails it; None if the sample cannot tell.
        is_used: whether the corpus is cleaned by it.
    """

    sql: str
    reason: str
    share: float | None
    is_used: bool


def conditions(pieces: Sequence[str], languages: Counter[str], packages: Sequence[str]) -> list[Condition]:
    """Returns the conditions for some texts.

    Args:
        pieces: sampled texts, cut to the length of instances.
        languages: number of texts by language; empty if no language was identified.
        packages: groups of annotations whose package is installed, or of which that is not known.

    Returns:
        The conditions, in the order of the config.
    """
    copies = "exact copies: a student would learn them by heart"
    near = "near copies, boilerplate among them; the first one stays"
    lines = [
        Condition(f"teacher_n_tokens >= {_LEAST_TOKENS}", "the mean loss of fewer tokens says little", None, True),
        Condition("duplicate_of is null", copies, None, True),
        Condition("near_duplicate_of is null", near, None, "near_duplicates" in packages),
    ]
    cleaner = _Cleaner(pieces)
    lines += [
        cleaner.condition(
            "coalesce(duplicate_5gram_share, 0) <= 0.15",
            "repetition: the teacher copies from its own context, so repeated text would come first",
            lambda text: _repeated(_ngrams(text)) > 0.15,
        ),
        cleaner.condition(
            "coalesce(duplicate_line_character_share, 0) <= 0.2",
            "repeated lines, such as menus and tables (Gopher)",
            lambda text: _repeated_characters(text) > 0.2,
        ),
        cleaner.condition(
            "mean_word_characters between 3 and 10",
            "base64, minified code and runs of single characters (Gopher)",
            lambda text: not 3 <= _mean_word(text) <= 10,
        ),
        cleaner.condition(
            "alphabetic_word_share >= 0.8",
            "numbers and symbols in place of words (Gopher)",
            lambda text: _alphabetic(text) < 0.8,
        ),
    ]
    return lines + _language(languages, packages)


class _Cleaner:
    """Conditions on the sampled pieces, and which pieces the conditions before have removed."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self._pieces, self._removed = pieces, [False] * len(pieces)

    def condition(self, sql: str, reason: str, fails: Callable[[str], bool]) -> Condition:
        """The condition with its share; it is not used if it, or it with those before, would remove too much."""
        failing = [fails(piece) for piece in self._pieces]
        n_pieces = max(1, len(failing))
        removed = [old or new for old, new in zip(self._removed, failing, strict=True)]
        is_used = sum(failing) <= MOST_FAILING * n_pieces and sum(removed) <= _MOST_REMOVED * n_pieces
        self._removed = removed if is_used else self._removed
        return Condition(sql, reason, sum(failing) / n_pieces, is_used)


def _language(languages: Counter[str], packages: Sequence[str]) -> list[Condition]:
    if not languages or "language" not in packages:
        return []
    (name, n_texts), *_ = languages.most_common(1)
    share = n_texts / languages.total()
    reason = f"{share:.0%} of the sampled texts are {name!r}; other languages go, where the identifier is sure"
    sql = f"(language = '{name}' or language_confidence < 0.9)"
    return [Condition(sql, reason, 1 - share, is_used=share >= ONE_LANGUAGE)]


def cut(texts: Sequence[str], n_characters: int, most: int = 400) -> list[str]:
    """Cuts texts as packing does: joined, into pieces of one length.

    Args:
        texts: the texts.
        n_characters: characters of a piece.
        most: number of pieces.

    Returns:
        The pieces; a shorter last one only if there is no other.
    """
    joined = "\n\n".join(texts)
    n_pieces = min(most, len(joined) // n_characters)
    return [joined[n * n_characters : (n + 1) * n_characters] for n in range(n_pieces)] or ([joined] if joined else [])


def _ngrams(text: str) -> list[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return [tuple(words[n : n + 5]) for n in range(len(words) - 4)]


def _repeated(parts: Sequence[object]) -> float:
    return 1 - len(set(parts)) / len(parts) if parts else 0.0


def _repeated_characters(text: str) -> float:
    seen: set[str] = set()
    n_repeated = n_characters = 0
    for line in filter(str.strip, text.splitlines()):
        n_characters += len(line)
        n_repeated += len(line) if line in seen else 0
        seen.add(line)
    return n_repeated / max(1, n_characters)


def _mean_word(text: str) -> float:
    words = text.split()
    return sum(map(len, words)) / max(1, len(words))


def _alphabetic(text: str) -> float:
    words = text.split()
    return sum(any(letter.isalpha() for letter in word) for word in words) / max(1, len(words))
