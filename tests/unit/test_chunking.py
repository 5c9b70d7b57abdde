"""Chunking with toy tokenizers: hand-made goldens, and invariants over random text in both modes."""

import itertools
import random
import re
import time
from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from miniplm_udf.ingestion import chunking
from miniplm_udf.ingestion.chunking import Chunk, Chunker, Encode, Span
from miniplm_udf.ingestion.documents import Document


def words(texts: list[str]) -> list[list[Span]]:
    """Words, marks and newlines; a space belongs to the word behind it, as with a byte-level BPE."""
    return [[match.span() for match in re.finditer(r" ?[^\s.!?;]+|\n| ?[.!?;]|\s", text)] for text in texts]


def utf8_bytes(texts: list[str]) -> list[list[Span]]:
    """One token a byte: a character of several bytes is several tokens that share its span."""
    return [[(i, i + 1) for i, c in enumerate(text) for _ in c.encode()] for text in texts]


def document(text: str, name: str = "d", source: str = "s", split: str = "pool") -> Document:
    return Document(name, source, text, split)


def cut(documents: Sequence[Document], encode: Encode, mode: str, max_tokens: int) -> list[Chunk]:
    chunker = Chunker(encode, mode, max_tokens)  # type: ignore[arg-type]
    return [chunk for item in documents for chunk in chunker.feed(item)] + list(chunker.close())


def texts(chunks: list[Chunk]) -> list[str]:
    return [chunk.text for chunk in chunks]


def check(chunks: list[Chunk], documents: Sequence[Document], encode: Encode, max_tokens: int) -> None:
    """Checks what holds for every cutting: nothing lost, nothing twice, nothing too long, every offset right."""
    parts: dict[int, list[chunking.DocumentSlice]] = {id(item): [] for item in documents}
    for chunk in chunks:
        first = chunk.slices[0].document
        assert {(part.document.source, part.document.split) for part in chunk.slices} == {(first.source, first.split)}
        raw = chunk.text.encode()
        assert chunk.n_bytes == len(raw)
        bounds = [0, *chunk.segment_ends, len(raw)]
        assert [raw[a:b].decode() for a, b in itertools.pairwise(bounds)] == [p.text for p in chunk.slices]
        assert all(part.ends for part in chunk.slices[:-1])
        assert all(part.starts for part in chunk.slices[1:])
        for part in chunk.slices:
            parts[id(part.document)].append(part)
    for item in documents:
        position = 0
        for part in parts[id(item)]:
            assert part.text
            assert part.start_byte == position
            assert part.starts == (position == 0)
            position += len(part.text.encode())
            assert part.ends == (position == len(item.text.encode()))
        assert "".join(part.text for part in parts[id(item)]) == item.text
    longest_character = max(len(list(encode([c])[0])) for item in documents for c in item.text)
    for chunk in chunks:
        assert chunk.n_tokens <= max(max_tokens, longest_character)
        if encode in (words, utf8_bytes):  # a BPE may tokenise a cut word in another way when it stands alone
            assert sum(len(encode([part.text])[0]) for part in chunk.slices) <= max(max_tokens, longest_character)


def test_cuts_behind_the_last_mark_and_gives_the_rest_back() -> None:
    assert texts(cut([document("a. b. c d e")], words, "document", 4)) == ["a. b.", " c d e"]
    one = [document("a b. c d e f g")]
    assert texts(cut(one, words, "document", 5)) == ["a b.", " c d e f g"]
    assert texts(cut([document("a b. c? d e f")], words, "document", 6)) == ["a b. c?", " d e f"]
    assert texts(cut([document("a b\nc d e f g")], words, "document", 5)) == ["a b\n", "c d e f g"]
    # A mark without whitespace behind it is none; without one all max_tokens are kept.
    assert texts(cut([document("a b.c d e f g")], words, "document", 5)) == ["a b.c d", " e f g"]
    assert texts(cut([document("a b c d e f")], words, "document", 3)) == ["a b c", " d e f"]


@pytest.mark.parametrize(
    ("n_tokens", "lengths"), [(0, []), (1, [1]), (4, [4]), (5, [4, 1]), (8, [4, 4]), (9, [4, 4, 1])]
)
def test_lengths_around_the_limit(n_tokens: int, lengths: list[int]) -> None:
    """Tails, also of one token, are kept; what fits is not cut, whatever marks it has."""
    documents = [document(" a" * n_tokens)] if n_tokens else []
    assert [chunk.n_tokens for chunk in cut(documents, words, "document", 4)] == lengths
    assert texts(cut([document("a. b c")], words, "document", 4)) == ["a. b c"]


def test_packed_golden() -> None:
    """The example of the module's header, with its separators and offsets."""
    documents = [document("a. b c", "1"), document("d e f g h", "2")]
    chunks = cut(documents, words, "packed", 4)
    assert texts(chunks) == ["a.", " b c", "d e f g", " h"]
    assert [chunk.n_tokens for chunk in chunks] == [2, 3, 4, 2]
    chunks = cut([document("a b", "1"), document("c", "2"), document("d é f g h i", "3")], words, "packed", 8)
    assert texts(chunks) == ["a bc", "d é f g h i"]  # cut behind the last separator
    assert chunks[0].segment_ends == [3]
    assert [part.document.document_id for part in chunks[0].slices] == ["1", "2"]
    assert texts(cut([document("a b", "1"), document("c d", "2")], words, "packed", 100)) == ["a bc d"]


def test_packed_separator_that_does_not_fit_is_no_chunk() -> None:
    """The text fills the chunk to the last token: the separator begins the next chunk, which has no text for it."""
    documents = [document("a b c", "1"), document("d e", "2")]
    chunks = cut(documents, words, "packed", 3)
    assert texts(chunks) == ["a b c", "d e"]
    assert [chunk.slices[-1].ends for chunk in chunks] == [True, True]
    assert texts(cut(documents[:1], words, "packed", 3)) == ["a b c"]


def test_ordinals_count_within_a_stream() -> None:
    documents = [document("a b c d e", "1"), document("f g h", "2")]
    assert [chunk.ordinal for chunk in cut(documents, words, "document", 2)] == [0, 1, 2, 0, 1]
    documents.append(document("x y z", "3", "t"))
    chunks = cut(documents, words, "packed", 2)
    for source in "st":
        own = [chunk.ordinal for chunk in chunks if chunk.slices[0].document.source == source]
        assert own == list(range(len(own)))
        assert own


def test_a_document_that_comes_twice_is_there_twice() -> None:
    twice = [document("a b")] * 2
    assert texts(cut(twice, words, "packed", 9)) == ["a ba b"]


def test_packed_keeps_sources_and_splits_apart() -> None:
    documents = [document("a", "1"), document("b", "2", "t"), document("c", "3", "s", "heldout"), document("d", "4")]
    assert sorted(texts(cut(documents, words, "packed", 100))) == ["ad", "b", "c"]


def test_a_character_of_several_tokens_is_never_cut() -> None:
    assert texts(cut([document("ab终cd")], utf8_bytes, "document", 4)) == ["ab", "终c", "d"]
    assert texts(cut([document("终终")], utf8_bytes, "document", 2)) == ["终", "终"]  # longer than allowed: kept whole


def test_text_without_tokens_is_kept() -> None:
    """With a tokenizer that drops whitespace, the chunks still hold all whitespace."""

    def letters(texts: list[str]) -> list[list[Span]]:
        return [[match.span() for match in re.finditer(r"\w+", text)] for text in texts]

    for mode in ("document", "packed"):
        documents = [document("  a   b  c  ", "1"), document("   ", "2"), document("d", "3")]
        chunks = cut(documents, letters, mode, 2)
        check(chunks, documents, letters, 2)


ALPHABET = [
    "a",
    "b",
    " ",
    "  ",
    "\n",
    "\r\n",
    ". ",
    "!",
    "?",
    ";",
    "é",
    "终",
    "🙂",
    "e\u0301",
    "\u2028",
    "\t",
    "👩‍👩‍👧",
]


@pytest.fixture(scope="module")
def byte_level_bpe() -> Encode:
    """A real byte-level BPE, small enough to split characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["a b. ab é 终 é"] * 3, trainer)
    return lambda batch: [e.offsets for e in tokenizer.encode_batch(batch, add_special_tokens=False)]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["document", "packed"])
@pytest.mark.parametrize("kind", ["words", "bytes", "bpe"])
def test_invariants_over_random_text(
    mode: str, kind: str, byte_level_bpe: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = {"words": words, "bytes": utf8_bytes, "bpe": byte_level_bpe}[kind]
    generator = random.Random(f"{mode} {kind}")
    monkeypatch.setattr(chunking, "PIECE_CHARACTERS", 50)
    monkeypatch.setattr(chunking, "_PIECE_SCAN", 20)
    for _ in range(100):
        documents = [
            document("".join(generator.choices(ALPHABET, k=generator.randint(1, 120))), str(i), generator.choice("st"))
            for i in range(generator.randint(1, 6))
        ]
        max_tokens = generator.choice([2, 3, 7, 33])
        chunks = cut(documents, encode, mode, max_tokens)
        check(chunks, documents, encode, max_tokens)
        monkeypatch.setattr(chunking, "_CALL_CHARACTERS", generator.choice([1, 60, 10_000]))
        again = cut(documents, encode, mode, max_tokens)
        assert sorted(texts(again)) == sorted(texts(chunks)), "how many texts one call tokenises must not matter"


def test_long_documents_are_tokenised_in_pieces_at_words() -> None:
    seen: list[str] = []

    def encode(batch: list[str]) -> list[list[Span]]:
        seen.extend(batch)
        return words(batch)

    text = "word " * 40_000 + "x" * 200_000
    chunks = cut([document(text)], encode, "document", 1000)
    assert "".join(texts(chunks)) == text
    assert "".join(seen) == text
    assert max(map(len, seen)) <= chunking.PIECE_CHARACTERS
    assert all(piece.startswith((" word", "word", "x", " x")) for piece in seen)
    # Pieces end at words, so tokens and chunks are the same as for the whole text.
    assert texts(chunks)[:40] == ["word" + " word" * 999] + [" word" * 1000] * 39


def test_a_document_of_megabytes_takes_linear_time() -> None:
    def run(n: int) -> float:
        start = time.process_time()
        cut([document("a " * n)], words, "document", 1024)
        return time.process_time() - start

    run(10_000)
    assert run(400_000) < 20 * max(run(100_000), 0.02)
