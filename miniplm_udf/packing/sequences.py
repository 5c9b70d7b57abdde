"""Makes token sequences of a fixed length from the texts of instances. Pure: no Spark, no files, no randomness.

Owns what a packed sequence is. Input: the texts of instances in their stored order, and a tokenizer. Adjacent texts
(same stream, consecutive ordinals, in the middle of a document) are joined before they are tokenized, so the tokens at
a cut are the same as in the whole text; a separator stands only where a document ends. Output: sequences of L + 1 int32
ids and L uint8 target flags; consecutive sequences share one token, so that each token is a target once. No text is
dropped. The same texts give the same bytes, so a retry repeats them.

    tokens            t0 t1 t2 t3 t4 t5 t6 t7 t8           L = 4
    sequence 0        t0 t1 t2 t3 t4                       targets t1..t4
    sequence 1                    t4 t5 t6 t7 t8           targets t5..t8

A token is no target if the token before it does not stand before it in the corpus: between texts that are not adjacent,
unless one document ends there and another begins. The padding of the last sequence is no target either; it consists of
separators.

With `pack.sequences: instance`, each instance is packed by itself: its text begins a sequence, and padding ends it.
Padding stands at the end, so the tokens of the text have the positions 0, 1, ... and see no padding.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

from miniplm_udf.scoring.inputs import PIECE_CHARACTERS, pieces, segments

_CALL_CHARACTERS = 1024 * 1024  # text that one call encodes: limits the memory of `Encoding` objects
_CALL_PIECES = 1024


@dataclasses.dataclass(frozen=True)
class InstanceText:
    """The text of an instance and its place in its stream; the columns of `instances` of the same names.

    Attributes:
        stream_id, ordinal: id of the stream, and position in it; ordinals n and n + 1 are adjacent texts.
        text: the text.
        segment_ends: UTF-8 byte offsets in the text where one document ends and the next begins.
        starts_document, ends_document: whether the text begins and ends where a document does.
        document_ids: ids of the documents in the text, in order.
        start_byte: UTF-8 offset in the first document at which the text begins.
    """

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
        """UTF-8 offset in the last document at which the text ends."""
        n_bytes = len(self.text.encode("utf-8"))
        return n_bytes - self.segment_ends[-1] if len(self.segment_ends) else self.start_byte + n_bytes

    def follows(self, other: "InstanceText | None") -> bool:
        """Whether this text begins where the other text ends.

        Two inputs that begin alike share a stream id and ordinals. In the middle of a document, its id and offset
        must therefore fit too.

        Args:
            other: the text before this one; None if there is none, which this text does not follow.
        """
        if other is None or (self.stream_id, self.ordinal) != (other.stream_id, other.ordinal + 1):
            return False
        if other.ends_document or self.starts_document:
            return other.ends_document and self.starts_document
        return self.document_ids[0] == other.document_ids[-1] and self.start_byte == other.end_byte


@dataclasses.dataclass(frozen=True)
class Piece:
    """Text of one document that is tokenized by itself.

    Attributes:
        text: the text.
        is_joined: whether the piece before it stands before it in the corpus too, so that its first token is a target.
        ends_document: whether a separator follows.
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
        n_new_tokens: tokens that are neither padding nor shared with the sequence before.
    """

    token_ids: np.ndarray
    target_mask: np.ndarray
    n_new_tokens: int


def join_texts(texts: Iterable[InstanceText], limit: int = PIECE_CHARACTERS) -> Iterator[Piece]:
    """Joins adjacent texts and cuts them at the ends of documents.

    Args:
        texts: texts in their stored order.
        limit: longest piece, in characters. A longer document is cut, before a space if there is one; a piece is
            yielded before the next one is held.

    Yields:
        The pieces, whose texts joined are the texts.
    """
    text = ""  # the open document's text that is not yet in a piece
    is_joined = False  # `Piece.is_joined` of the piece that `text` will become
    is_closed = False  # whether the last piece ended a document
    previous: InstanceText | None = None
    for current in texts:
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
            # A text may begin with the end of a document of which it has no character: then no separator is added.
            if text and (i < len(parts) - 1 or current.ends_document):
                yield Piece(text, is_joined, True)
                text, is_joined, is_closed = "", True, True
        previous = current
    if text:
        yield Piece(text, is_joined, False)


def encode_pieces(
    joined: Iterable[Piece], tokenizer: Tokenizer, separator_id: int
) -> Iterator[tuple[np.ndarray, bool]]:
    """Tokenizes pieces.

    Args:
        joined: pieces in order.
        tokenizer: the tokenizer.
        separator_id: id of the separator, which is added after the end of a document.

    Yields:
        The token ids of a piece (int32, never empty), and whether the first of them is a target.
    """
    was_lost = False  # whether the previous piece gave no tokens, so that the next token has no predecessor
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
    """Cuts a stream of tokens into sequences; the last one is padded, and its padding is no target.

    Args:
        runs: pairs of token ids, never empty, and whether the first of them is a target.
        sequence_length: L.
        padding_id: id that fills the last sequence.

    Yields:
        The sequences.
    """
    length = sequence_length
    ids, flags = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.uint8)
    n_shared = 0  # 1 once ids[0] is the last token of a sequence that was yielded
    is_first = True
    for tokens, is_joined in runs:
        ids = np.concatenate([ids, tokens.astype(np.int32, copy=False)])
        new_flags = np.ones(len(tokens), dtype=np.uint8)
        new_flags[0] = is_joined and not is_first  # no token predicts the very first one
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


def pack_instances(
    texts: Iterable[InstanceText], tokenizer: Tokenizer, separator_id: int, sequence_length: int
) -> Iterator[PackedSequence]:
    """Makes sequences that each hold one instance. Memory does not grow with the number of texts.

    Args:
        texts: texts in any order; none is joined with another.
        tokenizer: the tokenizer.
        separator_id: id of the document separator, which is also the padding.
        sequence_length: L.

    Yields:
        One padded sequence for each text of at most L + 1 tokens, its separators included. A longer text, which another
        tokenizer than the one that cut it may make, continues in further sequences; the official code drops its end.

    Source: the official implementation of arXiv 2410.17215 (`LMDataset.collate`).
    """
    for text in texts:
        yield from pack_texts([text], tokenizer, separator_id, sequence_length)


def pack_texts(
    texts: Iterable[InstanceText], tokenizer: Tokenizer, separator_id: int, sequence_length: int
) -> Iterator[PackedSequence]:
    """Packs the texts of one shard. Memory does not grow with the number of texts.

    Args:
        texts: texts in their stored order.
        tokenizer: the tokenizer.
        separator_id: id of the document separator, which is also the padding.
        sequence_length: L.

    Yields:
        The sequences of the shard.
    """
    return fill_sequences(
        encode_pieces(join_texts(texts), tokenizer, separator_id), sequence_length, padding_id=separator_id
    )
