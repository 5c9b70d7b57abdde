"""Chunking: cuts documents into the texts of instances, by token counts and character offsets. Pure; on executors.

Inputs: `Document`s in file order, and an `Encode` function (texts to token spans in characters). Output: `Chunk`s.
Their texts are slices of the documents, never decoded tokens: the slices of a document joined are the document. The
output depends on the inputs alone, so a retry makes the same chunks. No Spark, no tokenizer library.

The rule of the paper is used, except that no text is dropped. A stream of tokens is either one document
(`document`), or all documents of one (source, split) with a separator after each (`packed`). While more than
`max_tokens` are left: take `max_tokens`; scan back to the last separator, token that ends in a newline, or token that
ends in a sentence mark (. ! ? ;) before whitespace; cut there and put the tokens behind the cut back; if there is no
such place, keep all of them. The remaining tokens are the last chunk. With `max_tokens` 4, `|` for the separator, and
documents "a. b c" and "d e f g h":

    tokens     a   .   b   c   |   d   e   f   g   h   |
    chunks    [a   .] [b   c   |] [d   e   f   g] [h   |]
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from miniplm_udf.ingestion.documents import Document

Span = tuple[int, int]
Encode = Callable[[list[str]], Sequence[Sequence[Span]]]

# Part of every instance's id: raise it when the rule, or the pieces below, give other cuts.
RULE_VERSION = 1
# Characters that are tokenized at once at most, and how far back a place to cut them is sought. Both are part of the
# rule.
PIECE_CHARACTERS = 64 * 1024
_PIECE_SCAN = 1024
# Characters of one call of `Encode`: limits the memory, and changes no cut.
_CALL_CHARACTERS = 256 * 1024
_SENTENCE_MARKS = frozenset(".!?;")


@dataclasses.dataclass(frozen=True)
class DocumentSlice:
    """A part of a document.

    Attributes:
        document: the document.
        text: the text of the slice.
        n_bytes: UTF-8 bytes of the text.
        start_byte: UTF-8 offset of the slice in the document.
        starts: whether the document begins with the slice.
        ends: whether the document ends with the slice.
    """

    document: Document
    text: str
    n_bytes: int
    start_byte: int
    starts: bool
    ends: bool


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Adjacent slices of one stream: the text of one instance.

    Attributes:
        ordinal: number of the chunk in its stream, from 0.
        slices: the slices in order; at least one.
        n_tokens: tokens, separators included.
    """

    ordinal: int
    slices: tuple[DocumentSlice, ...]
    n_tokens: int

    @property
    def text(self) -> str:
        """The text of the chunk: its slices joined, without separators."""
        return "".join(part.text for part in self.slices)

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return sum(part.n_bytes for part in self.slices)

    @property
    def segment_ends(self) -> list[int]:
        """UTF-8 offsets in the text at which one document ends and the next begins."""
        return list(itertools.accumulate(part.n_bytes for part in self.slices[:-1]))


class Chunker:
    """Cuts the documents of one input split. Feed them in file order, then close.

    Args:
        encode: the tokenizer.
        mode: `document` cuts each document by itself, `packed` joins the documents of one source and split.
        max_tokens: largest number of tokens in a chunk.
    """

    def __init__(self, encode: Encode, mode: Literal["document", "packed"], max_tokens: int) -> None:
        self._encode, self._mode, self._max_tokens = encode, mode, max_tokens
        self._streams: dict[tuple[str, str], _Stream] = {}
        self._waiting: list[_PieceSpan] = []
        self._waiting_characters = 0

    def feed(self, document: Document) -> Iterator[Chunk]:
        """Takes a document.

        Args:
            document: the next document of the input split.

        Yields:
            Chunks of this and earlier documents that are complete.
        """
        for piece in _pieces(document):
            self._waiting.append(piece)
            self._waiting_characters += piece.end - piece.start
            if self._waiting_characters >= _CALL_CHARACTERS:
                yield from self._flush()

    def close(self) -> Iterator[Chunk]:
        """Yields the remaining chunks."""
        yield from self._flush()
        for stream in self._streams.values():
            yield from stream.close()
        self._streams.clear()

    def _flush(self) -> Iterator[Chunk]:
        waiting, self._waiting, self._waiting_characters = self._waiting, [], 0
        if not waiting:
            return
        spans = self._encode([piece.document.text[piece.start : piece.end] for piece in waiting])
        for piece, piece_spans in zip(waiting, spans, strict=True):
            yield from self._push(piece, piece_spans)

    def _push(self, piece: "_PieceSpan", spans: Sequence[Span]) -> Iterator[Chunk]:
        document = piece.document
        key = (document.source, document.split)
        stream = self._streams.setdefault(key, _Stream(self._max_tokens))
        stream.add_tokens(document, piece.start, piece.end, spans)
        ended = piece.end == len(document.text)
        if ended and self._mode == "packed":
            stream.add_separator()
        yield from stream.cut()
        if ended and self._mode == "document":
            yield from stream.close()
            del self._streams[key]


@dataclasses.dataclass(frozen=True)
class _PieceSpan:
    """Characters [start, end) of a document, which are tokenized at once."""

    document: Document
    start: int
    end: int


def _pieces(document: Document) -> Iterator[_PieceSpan]:
    """Cuts a document into pieces of at most PIECE_CHARACTERS.

    A piece ends before the first whitespace after a word, if there is any near its end: there, tokenizers that split at
    words give the same tokens as for the whole document.
    """
    text, start = document.text, 0
    while len(text) - start > PIECE_CHARACTERS:
        limit = start + PIECE_CHARACTERS
        places = range(limit, limit - _PIECE_SCAN, -1)
        cut = next((i for i in places if text[i].isspace() and not text[i - 1].isspace()), limit)
        yield _PieceSpan(document, start, cut)
        start = cut
    yield _PieceSpan(document, start, len(text))


class _Stream:
    """The tokens of one stream that are in no chunk yet.

    A token has a document (None: it is a separator) and a span of the document's characters. The ends of the spans
    never decrease, and the last token of a piece ends with the piece. The text between two tokens belongs to the second
    one, so every character belongs to a token.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._documents: list[Document | None] = []
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._head = 0  # index of the first token that is in no chunk
        self._ordinal = 0
        # The document that the last chunk cut, and how many of its characters and bytes are in chunks.
        self._cut_document: Document | None = None
        self._cut_character = self._cut_byte = 0

    def add_tokens(self, document: Document, start: int, end: int, spans: Sequence[Span]) -> None:
        """Appends the tokens of the document's characters [start, end); spans are relative to `start`."""
        self._documents += [document] * len(spans)
        self._starts += [start + token_start for token_start, _ in spans]
        self._ends += itertools.accumulate([start + token_end for _, token_end in spans], max)
        if not spans:  # a tokenizer may drop whitespace; the text is kept and counts as one token
            self._documents.append(document)
            self._starts.append(start)
            self._ends.append(end)
        self._ends[-1] = end

    def add_separator(self) -> None:
        self._documents.append(None)
        self._starts.append(0)
        self._ends.append(0)

    def cut(self) -> Iterator[Chunk]:
        """Yields chunks while more than `max_tokens` are left."""
        while len(self._ends) - self._head > self._max_tokens:
            yield from self._take(self._cut_length())
        self._forget()

    def close(self) -> Iterator[Chunk]:
        """Yields the last chunk."""
        yield from self.cut()
        yield from self._take(len(self._ends) - self._head)
        self._forget()

    def _forget(self) -> None:
        del self._documents[: self._head], self._starts[: self._head], self._ends[: self._head]
        self._head = 0

    def _cut_length(self) -> int:
        """The number of tokens in the next chunk. Call it only while more than `max_tokens` are left."""
        last = self._head + self._max_tokens - 1
        for i in range(last, self._head - 1, -1):
            if self._is_mark(i):
                return i - self._head + 1
        for i in range(last, self._head - 1, -1):
            if self._is_whole(i):
                return i - self._head + 1
        # One character has more than `max_tokens` tokens: the chunk takes all of them.
        i = last + 1
        while not self._is_whole(i):
            i += 1
        return i - self._head + 1

    def _is_mark(self, i: int) -> bool:
        document = self._documents[i]
        if document is None:
            return True
        end, text = self._ends[i], document.text
        if end == 0:
            return False
        mark = text[end - 1]
        is_mark = mark == "\n" or (mark in _SENTENCE_MARKS and end < len(text) and text[end].isspace())
        return is_mark and self._is_whole(i)

    def _is_whole(self, i: int) -> bool:
        """Whether the text can be cut behind token i: the next token adds text and shares no character with it."""
        if i + 1 >= len(self._ends) or self._documents[i + 1] is not self._documents[i]:
            return True
        return self._starts[i + 1] >= self._ends[i] and self._ends[i + 1] > self._ends[i]

    def _take(self, length: int) -> Iterator[Chunk]:
        first, self._head = self._head, self._head + length
        slices = []
        tokens = zip(self._documents[first : self._head], self._ends[first : self._head], strict=True)
        for document, group in itertools.groupby(tokens, key=lambda token: token[0]):
            if document is not None:
                slices += self._slice(document, [end for _, end in group][-1])
        if slices:  # a separator alone, after a cut at the end of its document, has no text
            yield Chunk(self._ordinal, tuple(slices), length)
            self._ordinal += 1

    def _slice(self, document: Document, end: int) -> list[DocumentSlice]:
        was_cut = document is self._cut_document
        start, start_byte = (self._cut_character, self._cut_byte) if was_cut else (0, 0)
        text = document.text[start:end]
        n_bytes = len(text.encode("utf-8"))
        ends = end == len(document.text)
        self._cut_document = None if ends else document
        self._cut_character, self._cut_byte = end, start_byte + n_bytes
        return [DocumentSlice(document, text, n_bytes, start_byte, start == 0, ends)] if text else []
