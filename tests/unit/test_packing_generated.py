"""Packing of generated ids: unchanged for the tokenizer that made them, converted for another one."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from miniplm_udf.config.sections import PackConfig
from miniplm_udf.packing.generated import sequences_of_generations
from miniplm_udf.packing.sequences import PackedSequence
from miniplm_udf.packing.tokenizers import PackTokenizer, train_bpe

SEPARATOR = "<|endoftext|>"


def make(name: str, text: str, vocab_size: int, separator: str = SEPARATOR) -> PackTokenizer:
    content = train_bpe(iter([text * 50]), vocab_size, separator)
    tokenizer = PackTokenizer(name, content, separator, 0, vocab_size)
    assert tokenizer.load().token_to_id(separator) == 0
    return tokenizer


TEACHER = make("teacher", "the cat sat on the mat, naïve Straße 🙂 ", 300)
OTHER = make("other", "a dog ", 262)
TEXTS = [["the cat sat", " on the mat 🙂"], ["naïve", ""], ["a dog sat on the cat"]]


def rows() -> list[list[int]]:
    """Two rows that end with a separator, one that was cut."""
    loaded = TEACHER.load()
    encoded = [[loaded.encode(text, add_special_tokens=False).ids for text in texts] for texts in TEXTS]
    return [[*encoded[0][0], 0, *encoded[0][1]], [*encoded[1][0], 0], encoded[2][0]]


def batch(ids: list[list[int]]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"token_ids": [np.array(row, "<i4").tobytes() for row in ids]})


def packed(target: PackTokenizer, sequences: Any, length: int = 5) -> list[PackedSequence]:
    settings = PackConfig(sequence_length=length, sequences=sequences)
    make_sequences = sequences_of_generations(TEACHER, target, settings)
    return list(make_sequences(iter([batch(rows()[:2]), batch(rows()[2:])])))


def stream(sequences: list[PackedSequence]) -> list[int]:
    """The ids without padding; consecutive sequences share one id."""
    ids: list[int] = []
    for number, sequence in enumerate(sequences):
        ids += sequence.token_ids[0 if number == 0 else 1 :].tolist()
    return ids[: sum(sequence.n_new_tokens for sequence in sequences)]


def test_ids_stay_for_the_same_tokenizer() -> None:
    sequences = packed(TEACHER, "packed")
    assert stream(sequences) == [i for row in rows() for i in row]
    flags = [flag for sequence in sequences for flag in sequence.target_mask.tolist()][: len(stream(sequences)) - 1]
    starts = {len(rows()[0]), len(rows()[0]) + len(rows()[1])}
    assert [n + 1 for n, flag in enumerate(flags) if not flag] == sorted(starts), "no row is predicted from another"


def test_with_sequences_instance_each_row_begins_a_sequence() -> None:
    sequences = packed(TEACHER, "instance", 64)
    assert [stream([sequence]) for sequence in sequences] == rows()
    assert [sequence.target_mask.sum() for sequence in sequences] == [len(row) - 1 for row in rows()]


@pytest.mark.parametrize("sequences", ["packed", "instance"])
def test_another_tokenizer_encodes_the_same_documents(sequences: str) -> None:
    loaded = OTHER.load()
    result = packed(OTHER, sequences, 200)
    ids = [i for sequence in result for i in stream([sequence])] if sequences == "instance" else stream(result)
    expected = []
    for texts, ends in zip(TEXTS, ([True, False], [True], [False]), strict=True):
        for text, is_ended in zip(texts, ends, strict=False):
            expected += [*loaded.encode(text, add_special_tokens=False).ids, *([0] if is_ended else [])]
    assert ids == expected


def test_the_same_file_with_another_separator_is_converted() -> None:
    """The student's separator takes the place of the model's."""
    content = TEACHER.content
    target = PackTokenizer("student", content, "t", int(TEACHER.load().token_to_id("t")), 300)
    ids = stream(packed(target, "packed"))
    assert 0 not in ids
    assert ids[len(rows()[0]) - len(rows()[0][rows()[0].index(0) :])] == target.document_separator_id
