"""Makes training sequences of generated texts, which are rows of token ids. Pure; runs on executors.

Input: record batches with `token_ids` (int32 little-endian, by the tokenizer of the model that generated). Output: the
sequences of `sequences.py`. A student with the same tokenizer and separator gets the very ids that were generated; for
another tokenizer the documents in a row are decoded and encoded again, as the official code converts its data. The
first token of a row is no target, because the row before it is another instance. The same rows give the same bytes.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from miniplm_udf.config.sections import PackConfig
from miniplm_udf.packing.tokenizers import PackTokenizer

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from miniplm_udf.packing.sequences import PackedSequence, Piece

SequenceMaker = Callable[[Iterator["pa.RecordBatch"]], Iterator["PackedSequence"]]


def sequences_of_generations(origin: PackTokenizer, target: PackTokenizer, settings: PackConfig) -> SequenceMaker:
    """Returns the function from a shard's generations to its sequences.

    Args:
        origin: the tokenizer of the ids.
        target: the student's tokenizer.
        settings: length of a sequence, and whether each row has sequences of its own.
    """

    def make(batches: Iterator["pa.RecordBatch"]) -> Iterator["PackedSequence"]:
        import numpy as np

        from miniplm_udf.packing import sequences  # loads the tokenizer library, which a driver need not have

        rows = (np.frombuffer(ids, "<i4") for batch in batches for ids in batch.column("token_ids").to_pylist())
        runs_of = _runs_of(origin, target)
        groups: Iterable[Iterable[np.ndarray]] = ([row] for row in rows) if settings.sequences == "instance" else [rows]
        for group in groups:
            yield from sequences.fill_sequences(runs_of(group), settings.sequence_length, target.document_separator_id)

    return make


def _runs_of(
    origin: PackTokenizer, target: PackTokenizer
) -> Callable[[Iterable["np.ndarray"]], Iterable[tuple["np.ndarray", bool]]]:
    """Makes the function from rows of ids to the runs that `fill_sequences` takes."""
    from miniplm_udf.packing import sequences

    if _identity(origin) == _identity(target):
        return lambda rows: ((row, False) for row in rows)
    old, new = origin.load(), target.load()

    def converted(rows: Iterable["np.ndarray"]) -> Iterator[tuple["np.ndarray", bool]]:
        pieces = (piece for row in rows for piece in pieces_of(row, old, origin.document_separator_id))
        return sequences.encode_pieces(pieces, new, target.document_separator_id)

    return converted


def _identity(tokenizer: PackTokenizer) -> tuple[str, int]:
    return tokenizer.tokenizer_hash, tokenizer.document_separator_id


def pieces_of(row: "np.ndarray", tokenizer: Any, separator_id: int) -> Iterator["Piece"]:
    """Decodes the documents of a row.

    Args:
        row: token ids, shape (n,).
        tokenizer: the tokenizer of the ids.
        separator_id: the id that ends a document.

    Yields:
        One piece for each document; an empty document is left out.
    """
    import numpy as np

    from miniplm_udf.packing.sequences import Piece

    ends = [*np.flatnonzero(row == separator_id).tolist(), len(row)]
    start, is_joined = 0, False
    for end in ends:
        text = tokenizer.decode(row[start:end].tolist(), skip_special_tokens=False)
        if text:
            yield Piece(text, is_joined, end < len(row))
            is_joined = True
        start = end + 1
