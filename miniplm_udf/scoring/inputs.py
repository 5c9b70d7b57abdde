"""From an instance's text to a model's input: token ids, which of them are scored, and how many bytes they cover.

Owns the two ways of scoring in docs/scoring.md (`context_prefix`: none, as the official code, and token), in two steps:
text to ids, which models with one tokenizer share, and ids to the input of one model. Also owns where a model's BOS
stands: in front of every window, as context that is never predicted and adds no prediction. Loads no model and no
torch. Input: text, `segment_ends` (UTF-8 byte offsets where one document ends and the next begins) and `ends_document`.
Output: an `EncodedText`, or a `Failure` if the text cannot be encoded. Executor side; pure.

Each segment is encoded alone. A segment longer than 64 Ki characters is encoded in pieces, cut before a space, so that
the lists and `Encoding` objects of a text of 50 MB never exist as a whole. Tokenizers that split words at spaces give
the same ids as for the whole text; tokenizers that put a space in front of a text (sentencepiece) do so for each piece.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tokenizers import Encoding, Tokenizer

from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.scoring.results import Failure
from miniplm_udf.scoring.windows import Window

PIECE_CHARACTERS = 64 * 1024
# Characters that one call encodes; bounds the memory of `Encoding` objects.
_CALL_CHARACTERS = 4 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class EncodedText:
    """The input of a model for one text.

    Attributes:
        ids: int32, shape (L,): prefix, text tokens and separators.
        scored: bool, shape (L - 1,): whether the prediction of ids[1 + i] from ids[: 1 + i] counts.
        n_bytes: UTF-8 bytes of the text that the scored tokens cover.
    """

    ids: np.ndarray
    scored: np.ndarray
    n_bytes: int


@dataclasses.dataclass(frozen=True)
class EncodedPiece:
    """A piece of a segment.

    Attributes:
        text: the piece.
        ids: its token ids, int32, shape (L,).
        first_token_bytes: UTF-8 bytes of text that the first token covers.
    """

    text: str
    ids: np.ndarray
    first_token_bytes: int


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """The tokens of one text, without a model's prefix and separators.

    Attributes:
        segments: the encoded pieces of each segment.
        n_bytes: UTF-8 bytes of the text.
    """

    segments: list[list[EncodedPiece]]
    n_bytes: int


def pieces(text: str, limit: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cuts a text into pieces of at most `limit` characters, before a space that follows another character.

    A piece in which no space can be the cut has exactly `limit` characters.

    Args:
        text: the text.
        limit: characters of the longest piece.

    Yields:
        Pieces whose concatenation is the text.
    """
    start = 0
    while len(text) - start > limit:
        cut = start + limit
        space = text.rfind(" ", start + 1, cut + 1)
        while space > start and text[space - 1].isspace():
            space = text.rfind(" ", start + 1, space)
        cut = space if space > start else cut
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def segments(text: str, segment_ends: Sequence[int]) -> list[str]:
    """The segments of a text, each from one document.

    Args:
        text: the text of an instance.
        segment_ends: UTF-8 byte offsets where one document ends and the next begins.

    Raises:
        ValueError: the offsets do not ascend, lie outside the text, or cut a character.
    """
    if len(segment_ends) == 0:
        return [text]
    raw = text.encode("utf-8")
    bounds = [0, *(int(end) for end in segment_ends), len(raw)]
    if any(left > right for left, right in itertools.pairwise(bounds)):
        raise ValueError(f"segment_ends: expected ascending offsets within {len(raw)} bytes, found {bounds[1:-1]}")
    return [raw[left:right].decode("utf-8") for left, right in itertools.pairwise(bounds)]


class TextTokenizer:
    """Tokenizes instances; models with one tokenizer share it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def tokenize(self, texts: Sequence[str | None], segment_ends: Sequence[Sequence[int]]) -> list[Tokenized | Failure]:
        """Tokenizes instances, many in one call, which the library spreads over the cores.

        Args:
            texts: the texts; None where a row has none.
            segment_ends: UTF-8 byte offsets where one document ends and the next begins, for each text.

        Returns:
            For each text its tokens, or Failure("tokenizer_failed").
        """
        cut = [_cut(text, ends) for text, ends in zip(texts, segment_ends, strict=True)]
        encoded = self._encode(
            piece for item in cut if not isinstance(item, Failure) for part in item for piece in part
        )
        return [item if isinstance(item, Failure) else _joined(item, encoded) for item in cut]

    def bytes_behind(self, piece: EncodedPiece, token_id: int) -> int:
        """Returns the number of UTF-8 bytes of the tokens that directly follow a certain token; encodes the text again.

        Args:
            piece: an encoded piece of text.
            token_id: id of the token.
        """
        behind = np.flatnonzero(piece.ids[:-1] == token_id) + 1
        if len(behind) == 0:
            return 0
        encoding = self._tokenizer.encode(piece.text, add_special_tokens=False)
        return sum(_token_bytes(piece.text, encoding, int(position)) for position in behind)

    def _encode(self, texts: Iterable[str]) -> Iterator[EncodedPiece | Failure]:
        group: list[str] = []
        size = 0
        for text in texts:
            group.append(text)
            size += len(text)
            if size >= _CALL_CHARACTERS:
                yield from self._encode_group(group)
                group, size = [], 0
        yield from self._encode_group(group)

    def _encode_group(self, group: list[str]) -> list[EncodedPiece | Failure]:
        try:
            encodings = self._tokenizer.encode_batch(group, add_special_tokens=False)
        except Exception as error:  # the Rust library raises bare Exception, and TypeError for lone surrogates
            if len(group) == 1:
                return [Failure("tokenizer_failed", f"{type(error).__name__}: {error}")]
            return [piece for text in group for piece in self._encode_group([text])]
        return [
            EncodedPiece(text, np.array(encoding.ids, dtype=np.int32), _token_bytes(text, encoding, 0))
            for text, encoding in zip(group, encodings, strict=True)
        ]


def _cut(text: str | None, segment_ends: Sequence[int]) -> list[list[str]] | Failure:
    """The pieces of a text's segments."""
    if text is None:
        return Failure("tokenizer_failed", "expected a text, found null")
    try:
        return [list(pieces(part)) for part in segments(text, segment_ends)]
    except ValueError as error:  # also a lone surrogate's UnicodeEncodeError
        return Failure("tokenizer_failed", f"{type(error).__name__}: {error}")


def _joined(parts: list[list[str]], encoded: Iterator[EncodedPiece | Failure]) -> Tokenized | Failure:
    """Joins the encoded pieces of one text, which come next in the iterator.

    Args:
        parts: the pieces of each segment, before encoding.
        encoded: the encoded pieces of this text and of the texts after it.
    """
    results = [[next(encoded) for _ in part] for part in parts]
    failures = [piece for part in results for piece in part if isinstance(piece, Failure)]
    if failures:
        return failures[0]
    n_bytes = sum(len(piece.encode("utf-8")) for part in parts for piece in part)
    segments = [[piece for piece in part if isinstance(piece, EncodedPiece) and len(piece.ids)] for part in results]
    return Tokenized(segments, n_bytes)


class TextEncoder:
    """Makes the input of a model from tokenized instances: adds prefix and separators, and marks scored tokens."""

    def __init__(self, tokenizer: TextTokenizer, description: ModelDescription) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = description.vocab_size
        self._separator_id = description.document_separator_id
        self._prefix_id = description.prefix_token_id if description.context_prefix == "token" else None
        self._bos_id = description.bos_token_id

    def encode(self, tokenized: Tokenized | Failure, ends_document: bool) -> EncodedText | Failure:
        """Encodes one instance.

        Args:
            tokenized: a result of `TextTokenizer.tokenize`; a failure is returned unchanged.
            ends_document: whether the text ends at a document's end, where a separator follows it.

        Returns:
            The input, or a Failure with the reason tokenizer_failed or no_tokens.
        """
        if isinstance(tokenized, Failure):
            return tokenized
        closed = [True] * (len(tokenized.segments) - 1) + [bool(ends_document)]
        joined = self._with_prefix if self._prefix_id is not None else self._official
        return self._checked(joined(tokenized, closed))

    def in_front(self, window: Window) -> list[int]:
        """Returns the ids in front of a window's input.

        Args:
            window: the window.

        Returns:
            The id of the BOS; no id if the model has no BOS, or the window begins with the BOS as the text's prefix.
        """
        if self._bos_id is None or (window.start == 0 and self._prefix_id == self._bos_id):
            return []
        return [self._bos_id]

    def _official(self, tokenized: Tokenized, closed: list[bool]) -> EncodedText:
        """Official arithmetic: a prediction counts unless its *input* token is a separator, also if it predicts one."""
        separator = np.array([self._separator_id], dtype=np.int32)
        parts: list[np.ndarray] = []
        unscored_bytes = 0
        for segment, has_separator in zip(tokenized.segments, closed, strict=True):
            for piece in segment:
                # The text's first token is not predicted, and the prediction after a separator's id does not count.
                if not parts or parts[-1][-1] == self._separator_id:
                    unscored_bytes += piece.first_token_bytes
                unscored_bytes += self._tokenizer.bytes_behind(piece, self._separator_id)
                parts.append(piece.ids)
            if has_separator:
                parts.append(separator)
        ids = _concatenate(parts)
        return EncodedText(ids, ids[:-1] != self._separator_id, max(tokenized.n_bytes - unscored_bytes, 0))

    def _with_prefix(self, tokenized: Tokenized, closed: list[bool]) -> EncodedText:
        """Arithmetic with a prefix: every text token counts; separators are context and are not predicted."""
        assert self._prefix_id is not None
        parts = [np.array([self._prefix_id], dtype=np.int32)]
        scored = [np.zeros(1, dtype=bool)]
        for segment, has_separator in zip(tokenized.segments, closed, strict=True):
            for piece in segment:
                parts.append(piece.ids)
                scored.append(np.ones(len(piece.ids), dtype=bool))
            if has_separator:
                parts.append(np.array([self._separator_id], dtype=np.int32))
                scored.append(np.zeros(1, dtype=bool))
        if closed[-1]:  # the last separator is followed by nothing
            parts.pop(), scored.pop()
        return EncodedText(_concatenate(parts), np.concatenate(scored)[1:], tokenized.n_bytes)

    def _checked(self, encoded: EncodedText) -> EncodedText | Failure:
        n_scored = int(encoded.scored.sum())
        if n_scored == 0:
            return Failure(
                "no_tokens",
                f"expected a token to score, found {len(encoded.ids)} tokens and none",
            )
        largest = int(encoded.ids.max())
        if largest >= self._vocab_size:
            return Failure(
                "tokenizer_failed",
                f"token id {largest} is outside the model's {self._vocab_size} ids",
            )
        return encoded


def _token_bytes(text: str, encoding: Encoding, position: int) -> int:
    """UTF-8 bytes of the characters that a token covers, wholly or in part."""
    span = encoding.token_to_chars(position)
    return len(text[span[0] : span[1]].encode("utf-8")) if span else 0


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)
