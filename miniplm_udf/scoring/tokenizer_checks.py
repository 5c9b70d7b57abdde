"""Tests what a tokenizer does to text: whether encoding is repeatable, and what it drops or merges.

Owns a fixed set of pairs of texts that differ in one thing. A tokenizer that gives both texts of a pair the same tokens
loses that difference, and its scores belong to a reduced text. Two differences are allowed to be lost: canonical
equivalence (Qwen's tokenizer composes Unicode) and a space in front of a text (sentencepiece puts one there). Input: a
`tokenizers.Tokenizer` that is set for raw text. Output: words for people. Executor side; pure.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from miniplm_udf.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_REPEATS = 8
_TEST_TEXT = "Unbelievable tokenization, abababab 1234567 naïve 東京 😀\n\tdef f(x):  return x"
# Differences that a tokenizer may lose, each with pairs of texts that differ only in it.
_PAIRS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("letter case", (("A word", "a word"), ("WORD", "word"))),
    ("accents", (("café", "cafe"),)),
    ("compatibility forms", (("\ufb01n", "fin"), ("\u2460", "1"), ("\uff21", "A"))),
    ("punctuation marks", (("\u201ca\u201d", '"a"'), ("a\u2026", "a..."), ("a-b", "a b"), ("``", '"'))),
    ("spaces", (("a  b", "a b"), ("ab", "a b"), ("a ", "a"), ("a\t", "a"))),
    ("line breaks", (("a\nb", "a b"), ("a\n\nb", "a\nb"), ("a\r\nb", "a\nb"), ("a\n", "a"), ("\na", "a"))),
    ("invisible characters", (("a\u200bb", "ab"), ("a\u00adb", "ab"), ("a\x07b", "ab"), ("a\u00a0b", "a b"))),
    ("rare characters", (("漢", "字"), ("ж", "щ"), ("😀", "🧬"), ("\U00010380", "\U00010381"))),
    ("long words", (("x" * 400, "x" * 401),)),
)


def is_repeatable(tokenizer: "Tokenizer") -> bool:
    """Whether a text gets the same tokens at every call; encodes a test text several times.

    Args:
        tokenizer: the tokenizer.
    """
    expected = _ids(tokenizer, _TEST_TEXT)
    return all(_ids(tokenizer, _TEST_TEXT) == expected for _ in range(_REPEATS))


def lost_differences(tokenizer: "Tokenizer") -> list[str]:
    """Finds the differences between texts that a tokenizer drops or merges.

    Args:
        tokenizer: the tokenizer.

    Returns:
        Their names, such as "letter case"; empty if it keeps all of a text.
    """
    return [
        difference
        for difference, pairs in (*_PAIRS, *_added_token_pairs(tokenizer))
        if any(_are_equal(tokenizer, left, right) for left, right in pairs)
    ]


def special_tokens_read(tokenizer: "Tokenizer") -> list[str]:
    """The special tokens into which a tokenizer turns ordinary text that spells them.

    Args:
        tokenizer: any tokenizer.
    """
    added = tokenizer.get_added_tokens_decoder()
    return [
        token.content
        for number, token in added.items()
        if token.special and number in (_ids(tokenizer, token.content) or [])
    ]


def check_every_byte(alias: str, lost: list[str]) -> None:
    """Checks that every byte of a text can be scored, as `context_prefix: token` promises.

    Args:
        alias: the model's name in the config.
        lost: the result of `lost_differences`.

    Raises:
        ConfigError: the tokenizer drops or merges something.
    """
    if lost:
        raise ConfigError(
            f"models.{alias}.context_prefix: token scores every byte of a text, but this tokenizer drops or merges "
            f"{', '.join(lost)}; set models.{alias}.context_prefix to none"
        )


def tokenizer_warnings(alias: str, tokenizer: "Tokenizer", lost: list[str]) -> list[str]:
    """Returns warnings about a model's tokenizer for readers of the scores.

    Args:
        alias: the model's name in the config.
        tokenizer: the model's tokenizer.
        lost: the result of `lost_differences`.
    """
    warnings = []
    if lost:
        warnings.append(
            f"{alias}: its tokenizer drops or merges {', '.join(lost)}: texts that differ in these alone get equal "
            f"tokens, so its scores are those of a reduced text"
        )
    special = special_tokens_read(tokenizer)
    if special:
        more = f" and {len(special) - 3} more" if len(special) > 3 else ""
        warnings.append(f"{alias}: text that spells {', '.join(special[:3])}{more} becomes the special token")
    return warnings


def _ids(tokenizer: "Tokenizer", text: str) -> list[int] | None:
    """The ids of a text; None if the tokenizer refuses the text."""
    try:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    except Exception:  # the Rust library raises bare Exception; scoring rejects the row of this text
        return None


def _are_equal(tokenizer: "Tokenizer", left: str, right: str) -> bool:
    ids = _ids(tokenizer, left)
    return ids is not None and ids == _ids(tokenizer, right)


def _added_token_pairs(tokenizer: "Tokenizer") -> Iterator[tuple[str, tuple[tuple[str, str], ...]]]:
    """Pairs of texts for added tokens that absorb the spaces around them. Special tokens are not searched in texts."""
    for token in tokenizer.get_added_tokens_decoder().values():
        if not token.special and (token.lstrip or token.rstrip):
            yield f"spaces around {token.content}", ((f"a  {token.content}  b", f"a {token.content} b"),)
