"""Packing: hand-made goldens, and invariants over random cuts of random text."""

import itertools
import random
from collections.abc import Iterator

import numpy as np
import pytest
from tokenizers import Tokenizer

from miniplm_udf.packing.sequences import (
    InstanceText,
    PackedSequence,
    Piece,
    encode_pieces,
    fill_sequences,
    join_texts,
    pack_instances,
    pack_texts,
)
from miniplm_udf.packing.tokenizers import train_bpe

SEPARATOR = "<|endoftext|>"
WORDS = ["the", "cat", "sat", "on", "a", "naïve", "Straße", "日本語", "🙂", "\n", "  ", SEPARATOR]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = Tokenizer.from_str(train_bpe(iter(["the cat sat on the mat " * 50]), 290, SEPARATOR).decode())
    made.encode_special_tokens = True
    return made


def one(
    text: str,
    ordinal: int = 0,
    stream: str = "s",
    starts: bool = True,
    ends: bool = True,
    joins=(),
    ids=(),
    at: int = 0,
) -> InstanceText:
    """`ids`: of its documents (d0, d1, ... unless told); `at`: its start in the first."""
    return InstanceText(
        stream, ordinal, text, [*joins], starts, ends, ids or [f"d{i}" for i in range(len(joins) + 1)], at
    )


def ids_and_flags(packed: list[PackedSequence]) -> tuple[list[int], list[int]]:
    """The token stream and, for each token, whether it is a target; the overlap and the padding taken away."""
    ids: list[int] = []
    flags: list[int] = []
    for i, sequence in enumerate(packed):
        n_shared = 1 if i else 0
        if i:
            assert sequence.token_ids[0] == ids[-1], "consecutive sequences share a token"
        n = sequence.n_new_tokens
        ids += sequence.token_ids[n_shared : n_shared + n].tolist()
        flags += ([] if i else [0]) + sequence.target_mask[: n - 1 + n_shared].tolist()
        assert not sequence.target_mask[n - 1 + n_shared :].any(), "padding is masked"
    return ids, flags


# --- joining ---


def test_adjacent_slices_join_and_documents_end():
    slices = [one("ab", 0, ends=False), one("cd", 1, starts=False, at=2), one("ef", 2)]
    assert list(join_texts(slices)) == [Piece("abcd", False, True), Piece("ef", True, True)]


@pytest.mark.parametrize(
    ("second", "is_joined"),
    [
        (one("cd", 2, starts=False, at=2), False),  # a gap in the stream
        (one("cd", 1, stream="t", starts=False, at=2), False),  # another stream
        (one("cd", 1), False),  # another document, though the first did not end
        (one("cd", 1, starts=False, ids=["e"], at=2), False),  # inside another document
        (one("cd", 1, starts=False, at=3), False),  # elsewhere in the document
        (one("cd", 1, starts=False, at=2), None),  # adjacent: one piece
    ],
)
def test_a_gap_is_not_joined(second: InstanceText, is_joined: bool | None):
    found = list(join_texts([one("ab", 0, ends=False), second]))
    if is_joined is None:
        assert found == [Piece("abcd", False, True)]
    else:
        assert found == [Piece("ab", False, False), Piece("cd", is_joined, True)]


def test_inputs_that_begin_alike_are_not_spliced():
    """Two files begin with one document and go on with others: one stream id, the same ordinals."""
    shared = one("aaa", 0, ends=False, ids=["a"])
    first = one("ax", 1, starts=False, ends=False, joins=[1], ids=["a", "x"], at=3)
    second = one("ayy", 1, starts=False, ends=False, joins=[1], ids=["a", "y"], at=3)
    first_rest = one("X", 2, starts=False, ids=["x"], at=1)
    second_rest = one("Y", 2, starts=False, ids=["y"], at=2)
    texts = [p.text for p in join_texts([shared, first, second, first_rest, second_rest])]
    assert texts == ["aaaa", "x", "a", "yy", "X", "Y"]
    # With the texts of one file alone, everything joins.
    assert [p.text for p in join_texts([shared, first, first_rest])] == ["aaaa", "xX"]
    assert [p.text for p in join_texts([shared, second, second_rest])] == ["aaaa", "yyY"]


def test_offsets_are_of_bytes():
    slices = [one("é", 0, ends=False), one("ß", 1, starts=False, ends=False, at=2), one("b", 2, starts=False, at=4)]
    assert [p.text for p in join_texts(slices)] == ["éßb"]
    after = one("b", 1, starts=False, ids=["d1"], at=2)
    assert [p.text for p in join_texts([one("éß", 0, ends=False, joins=[2]), after])] == ["é", "ßb"]


def test_behind_a_document_end_only_a_beginning_is_joined():
    first = one("ab", 0)
    assert [p.is_joined for p in join_texts([first, one("cd", 7, stream="t", starts=True)])] == [False, True]
    assert [p.is_joined for p in join_texts([first, one("cd", 7, stream="t", starts=False)])] == [False, False]


def test_documents_inside_a_slice_are_cut_at_bytes():
    joined = list(join_texts([one("éaßb", 0, joins=[3], ends=False)]))
    assert joined == [Piece("éa", False, True), Piece("ßb", True, False)]


def test_an_empty_end_of_a_document_makes_no_separator():
    # The slice before held the text of that document; its end alone is here.
    assert list(join_texts([one("ab", 5, starts=False, joins=[0])])) == [Piece("ab", False, True)]


def test_a_document_whose_end_comes_with_the_next_slice_ends_once():
    joined = list(join_texts([one("ab", 0, ends=False), one("cd", 1, starts=False, joins=[0], at=2)]))
    assert joined == [Piece("ab", False, True), Piece("cd", True, True)]


def test_long_documents_come_in_joined_pieces_of_bounded_length():
    slices = [one("word " * 20, i, starts=i == 0, ends=i == 9, at=100 * i) for i in range(10)]
    joined = list(join_texts(slices, limit=64))
    assert "".join(p.text for p in joined) == "word " * 200
    assert max(len(p.text) for p in joined) <= 64
    assert [p.is_joined for p in joined] == [False] + [True] * (len(joined) - 1)
    assert [p.ends_document for p in joined] == [False] * (len(joined) - 1) + [True]


def test_an_overlong_run_is_never_held_whole():
    taken = 0

    def slices() -> Iterator[InstanceText]:
        nonlocal taken
        for i in range(1000):
            taken += 1
            yield one("x" * 100, i, starts=i == 0, ends=False, at=100 * i)

    next(join_texts(slices(), limit=256))
    assert taken <= 4


# --- sequences ---


def run(*ids: int, joined: bool = True) -> tuple[np.ndarray, bool]:
    return np.array(ids, dtype=np.int32), joined


def rows(packed: Iterator[PackedSequence]) -> list[tuple[list[int], list[int], int]]:
    return [(p.token_ids.tolist(), p.target_mask.tolist(), p.n_new_tokens) for p in packed]


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([], []),
        ([run(1)], [([1, 0, 0, 0], [0, 0, 0], 1)]),
        ([run(1, 2)], [([1, 2, 0, 0], [1, 0, 0], 2)]),
        ([run(1, 2, 3, 4)], [([1, 2, 3, 4], [1, 1, 1], 4)]),  # L + 1 tokens: nothing is left
        ([run(1, 2, 3, 4, 5)], [([1, 2, 3, 4], [1, 1, 1], 4), ([4, 5, 0, 0], [1, 0, 0], 1)]),
        ([run(1, 2), run(3, 4, joined=False)], [([1, 2, 3, 4], [1, 0, 1], 4)]),
        ([run(1, 2, 3, 4), run(5, joined=False)], [([1, 2, 3, 4], [1, 1, 1], 4), ([4, 5, 0, 0], [0, 0, 0], 1)]),
        (
            [run(1, 2, 3), run(4, joined=False), run(5, 6, 7, 8)],
            [([1, 2, 3, 4], [1, 1, 0], 4), ([4, 5, 6, 7], [1, 1, 1], 3), ([7, 8, 0, 0], [1, 0, 0], 1)],
        ),
    ],
)
def test_golden_sequences(runs: list[tuple[np.ndarray, bool]], expected: list[tuple[list[int], list[int], int]]):
    assert rows(fill_sequences(runs, 3, padding_id=0)) == expected


def test_types_are_those_of_the_table():
    (packed,) = fill_sequences([run(1, 2)], 3, padding_id=0)
    assert (packed.token_ids.dtype, packed.target_mask.dtype) == (np.int32, np.uint8)
    assert (len(packed.token_ids), len(packed.target_mask)) == (4, 3)


# --- the whole, over random cuts ---


def random_stream(source: random.Random, stream: str) -> tuple[list[InstanceText], list[str]]:
    """A run of documents, cut anywhere; and the documents."""
    documents = ["".join(f"{source.choice(WORDS)} " for _ in range(source.randrange(1, 40))) for _ in range(5)]
    ends = list(itertools.accumulate(len(d) for d in documents))
    whole = "".join(documents)
    cuts = sorted({0, len(whole), *(source.randrange(1, len(whole)) for _ in range(8))})
    slices = []
    for ordinal, (left, right) in enumerate(itertools.pairwise(cuts)):
        inner = [len(whole[left:end].encode()) for end in ends if left < end < right]
        first = sum(end <= left for end in ends)  # the document that the slice begins in
        start_byte = len(whole[([0, *ends][first]) : left].encode())
        ids = [f"{stream} {first + i}" for i in range(len(inner) + 1)]
        slices.append(
            InstanceText(stream, ordinal, whole[left:right], inner, left in {0, *ends}, right in ends, ids, start_byte)
        )
    return slices, documents


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("length", [2, 7, 64])
def test_everything_kept_is_there_once(tokenizer: Tokenizer, seed: int, length: int):
    source = random.Random(seed)
    streams = [random_stream(source, f"s{i}")[0] for i in range(3)]
    kept = [s for stream in streams for s in stream if source.random() < 0.7]
    separator_id = tokenizer.token_to_id(SEPARATOR)
    ids, flags = ids_and_flags(list(pack_texts(kept, tokenizer, separator_id, length)))

    text = tokenizer.decode([i for i in ids if i != separator_id], skip_special_tokens=False).encode()
    assert text == b"".join(s.text.encode() for s in kept), "no kept text is dropped, changed or repeated"

    n_ends = sum(len(s.segment_ends) + s.ends_document for s in kept)
    assert ids.count(separator_id) == n_ends, "a separator at each real document end, and nowhere else"

    # Masked: the first token, and one behind each pair of kept slices that did not stand together in the corpus.
    n_broken = sum(
        not b.follows(a) and not (a.ends_document and b.starts_document) for a, b in itertools.pairwise(kept)
    )
    assert len(flags) - sum(flags) == n_broken + bool(kept)


@pytest.mark.parametrize("seed", range(5))
def test_tokens_at_a_cut_are_those_of_the_uncut_document(tokenizer: Tokenizer, seed: int):
    slices, documents = random_stream(random.Random(seed), "s")
    separator_id = tokenizer.token_to_id(SEPARATOR)
    ids, flags = ids_and_flags(list(pack_texts(slices, tokenizer, separator_id, 16)))
    expected = [i for d in documents for i in [*tokenizer.encode(d, add_special_tokens=False).ids, separator_id]]
    assert ids == expected
    assert flags == [0] + [1] * (len(ids) - 1)


def test_text_that_spells_the_separator_is_text(tokenizer: Tokenizer):
    separator_id = tokenizer.token_to_id(SEPARATOR)
    ids, _ = ids_and_flags(list(pack_texts([one(f"a{SEPARATOR}b", ends=False)], tokenizer, separator_id, 8)))
    assert separator_id not in ids


def test_a_piece_without_tokens_breaks_the_chain(tokenizer: Tokenizer):
    from tokenizers import normalizers

    stripping = Tokenizer.from_str(tokenizer.to_str())
    stripping.normalizer = normalizers.Strip()
    pieces = [Piece("a", False, False), Piece("  ", True, False), Piece("b", True, False)]
    assert [joined for _, joined in encode_pieces(pieces, stripping, 0)] == [False, False]


def test_the_same_slices_give_the_same_bytes(tokenizer: Tokenizer):
    slices, _ = random_stream(random.Random(1), "s")
    first, second = (
        [p.token_ids.tobytes() + p.target_mask.tobytes() for p in pack_texts(slices, tokenizer, 0, 8)] for _ in range(2)
    )
    assert first == second


def test_an_instance_is_a_padded_sequence(tokenizer: Tokenizer):
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in ("the cat", "sat", " on the mat", "x")]
    end = tokenizer.token_to_id(SEPARATOR)
    # Adjacent slices of one document, the second with the beginning of another one; and a text of one token.
    texts = [
        one("the cat", 0, ends=False),
        one("sat on the mat", 1, starts=False, joins=[3], ids=["d0", "d1"], at=7),
        one("x", 2, starts=False, ends=False, ids=["d2"], at=14),
    ]
    length = 3 + max(len(encoded[0]), len(encoded[1]) + len(encoded[2]))
    packed = list(pack_instances(texts, tokenizer, end, length))
    expected = [encoded[0], [*encoded[1], end, *encoded[2], end], encoded[3]]
    assert len(packed) == len(texts)
    for sequence, ids in zip(packed, expected, strict=True):
        n_padding = length + 1 - len(ids)
        assert sequence.token_ids.tolist() == ids + [end] * n_padding
        assert sequence.target_mask.tolist() == [1] * (len(ids) - 1) + [0] * n_padding
        assert sequence.n_new_tokens == len(ids)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("length", [2, 7, 64])
def test_of_an_instance_longer_than_a_sequence_nothing_is_dropped(tokenizer: Tokenizer, seed: int, length: int):
    slices, _ = random_stream(random.Random(seed), "s")
    separator_id = tokenizer.token_to_id(SEPARATOR)
    for text in slices:
        ids, flags = ids_and_flags(list(pack_instances([text], tokenizer, separator_id, length)))
        kept = tokenizer.decode([i for i in ids if i != separator_id], skip_special_tokens=False)
        assert kept == text.text
        assert flags == [0] + [1] * (len(ids) - 1), "within an instance every token but the first is a target"


# --- student tokenizers ---


def test_training_is_reproducible_and_takes_what_the_text_gives():
    text = ["the cat sat on the mat " * 5]
    assert train_bpe(iter(text), 300, SEPARATOR) == train_bpe(iter(text), 300, SEPARATOR)
    small = Tokenizer.from_str(train_bpe(iter(text), 100_000, SEPARATOR).decode())
    assert 257 <= small.get_vocab_size() < 400
    assert Tokenizer.from_str(train_bpe(iter(text), 1, SEPARATOR).decode()).get_vocab_size() == 257


def test_any_text_is_given_back_byte_for_byte(tokenizer: Tokenizer):
    text = "\x01 \r\n\t ünïcödé 日本語 🙂  " + SEPARATOR
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
