"""Kept slices of text to token sequences of fixed length, for one tokenizer. Pure: no Spark, no files, no randomness.

Owns what a packed sequence is. Input: slices in their stored order. Adjacent ones (same stream, consecutive ordinals,
one document going on) are joined as text before they are tokenised, so the tokens at a cut are natural; a separator
stands at real document ends alone. Output: sequences of L + 1 int32 ids and L uint8 target flags; consecutive
ones share one token, so that each token is a target once. No kept text is dropped. The same slices give the same bytes,
so a retry repeats them.

    tokens            t0 t1 t2 t3 t4 t5 t6 t7 t8           L = 4
    sequence 0        t0 t1 t2 t3 t4                       targets t1..t4
    sequence 1                    t4 t5 t6 t7 t8           targets t5..t8

A target is masked where the token before it did not come before it in the corpus: between slices that are not adjacent,
unless a document ended there and another begins; and on the padding of the last sequence, which is separators.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

from miniplm_udf.scoring.inputs import PIECE_CHARACTERS, pieces, segments

_CALL_CHARACTERS = 1024 * 1024  # text that one call encodes: bounds the memory of `Encoding` objects
_CALL_PIECES = 1024


@dataclasses.dataclass(frozen=True)
class Slice:
    """A row of `instances`, as schemas.py declares these columns."""

    stream_id: str
    ordinal: int
    text: str
    segment_ends: Sequence[int]
    starts_document: bool
    ends_document: bool
    document_ids: Sequence[str]
    start_byte: int

    @property
    def end_byte(self) -> int:
        """UTF-8 offset of its end inside its last document."""
        n_bytes = len(self.text.encode("utf-8"))
        return n_bytes - self.segment_ends[-1] if len(self.segment_ends) else self.start_byte + n_bytes

    def follows(self, other: "Slice | None") -> bool:
        """Whether its text is adjacent to the end of the other's.

        Two inputs that begin alike share a stream id and ordinals, so inside a document its id and offset must fit too.
        """
        if other is None or (self.stream_id, self.ordinal) != (other.stream_id, other.ordinal + 1):
            return False
        if other.ends_document or self.starts_document:
            return other.ends_document and self.starts_document
        return self.document_ids[0] == other.document_ids[-1] and self.start_byte == other.end_byte


@dataclasses.dataclass(frozen=True)
class Piece:
    """Text of one document that is tokenised alone.

    Attributes:
        is_joined: what stands before it came before it in the corpus: its first token is a target.
        ends_document: a separator stands behind it.
    """

    text: str
    is_joined: bool
    ends_document: bool


@dataclasses.dataclass(frozen=True)
class PackedSequence:
    """One row of a packed table.

    Attributes:
        token_ids: int32, shape (L + 1,).
        target_mask: uint8, shape (L,): 1 where token_ids[i + 1] is a target of token i.
        n_new_tokens: tokens that are neither padding nor the one shared with the sequence before.
    """

    token_ids: np.ndarray
    target_mask: np.ndarray
    n_new_tokens: int


def join_slices(slices: Iterable[Slice], limit: int = PIECE_CHARACTERS) -> Iterator[Piece]:
    """Joins adjacent slices and cuts them at document ends; a longer document comes in pieces of at most `limit`
    characters, cut before a space where there is one, each before the next is held."""
    text = ""  # of the document that is open
    is_joined = False  # of the piece that `text` will be
    is_closed = False  # the last piece ended a document
    previous: Slice | None = None
    for current in slices:
        if not current.follows(previous):
            if text:
                yield Piece(text, is_joined, False)
                text, is_closed = "", False
            is_joined = is_closed and current.starts_document
        parts = segments(current.text, current.segment_ends)
        for i, part in enumerate(parts):
            if i > 0:
                is_joined = is_closed
            *full, text = [*pieces(text + part, limit)] or [""]
            for piece in full:
                yield Piece(piece, is_joined, False)
                is_joined, is_closed = True, False
            # A slice may begin with the end of a document that has no text in it: no separator of its own.
            if text and (i < len(parts) - 1 or current.ends_document):
                yield Piece(text, is_joined, True)
                text, is_joined, is_closed = "", True, True
        previous = current
    if text:
        yield Piece(text, is_joined, False)


def encode_pieces(
    joined: Iterable[Piece], tokenizer: Tokenizer, separator_id: int
) -> Iterator[tuple[np.ndarray, bool]]:
    """Token ids of each piece, int32, with the separator behind a document's end, and whether its first is a target."""
    was_lost = False  # a piece without tokens broke the chain
    for group in _groups(joined):
        encodings = tokenizer.encode_batch([piece.text for piece in group], add_special_tokens=False)
        for piece, encoding in zip(group, encodings, strict=True):
            ids = np.array([*encoding.ids, *([separator_id] if piece.ends_document else [])], dtype=np.int32)
            if len(ids):
                yield ids, piece.is_joined and not was_lost
            was_lost = len(ids) == 0


def _groups(joined: Iterable[Piece]) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    n_characters = 0
    for piece in joined:
        group.append(piece)
        n_characters += len(piece.text)
        if n_characters >= _CALL_CHARACTERS or len(group) >= _CALL_PIECES:
            yield group
            group, n_characters = [], 0
    if group:
        yield group


def fill_sequences(
    runs: Iterable[tuple[np.ndarray, bool]], sequence_length: int, padding_id: int
) -> Iterator[PackedSequence]:
    """Cuts a stream of tokens into sequences; the last is padded, with its padding masked.

    Args:
        runs: (ids, whether the first of them is a target); none empty.
        sequence_length: L.
        padding_id: fills the last sequence.
    """
    length = sequence_length
    ids, flags = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.uint8)
    n_shared = 0  # 1 as soon as ids[0] is the last token of a sequence that is out
    is_first = True
    for tokens, is_joined in runs:
        ids = np.concatenate([ids, tokens.astype(np.int32, copy=False)])
        new_flags = np.ones(len(tokens), dtype=np.uint8)
        new_flags[0] = is_joined and not is_first  # nothing predicts the first token of all
        flags, is_first = np.concatenate([flags, new_flags]), False
        start = 0
        while len(ids) - start > length:
            window = slice(start, start + length + 1)
            yield PackedSequence(ids[window], flags[window][1:], length + 1 - n_shared)
            start, n_shared = start + length, 1
        ids, flags = ids[start:], flags[start:]
    if len(ids) > n_shared:
        n_padding = length + 1 - len(ids)
        padded = np.concatenate([ids, np.full(n_padding, padding_id, dtype=np.int32)])
        mask = np.concatenate([flags[1:], np.zeros(n_padding, dtype=np.uint8)])
        yield PackedSequence(padded, mask, len(ids) - n_shared)


def pack(
    slices: Iterable[Slice], tokenizer: Tokenizer, separator_id: int, sequence_length: int
) -> Iterator[PackedSequence]:
    """Slices in stored order to the sequences of one shard. Memory does not grow with the number of slices."""
    return fill_sequences(
        encode_pieces(join_slices(slices), tokenizer, separator_id), sequence_length, padding_id=separator_id
    )
