"""Reading packed tables: every row in stored order, at the asked version, refused where it does not fit."""

from pathlib import Path

import numpy as np
import pytest
from deltalake import DeltaTable

from miniplm_udf import storage
from miniplm_udf.errors import CorpusError
from tests.support.trainer_roots import LENGTH, write_packed
from trainer import data
from trainer.data import PackedSequences, TokenizerInfo, read_tokenizer_info, user_metadata

INFO = TokenizerInfo(document_separator="x", document_separator_id=0, tokenizer_hash="h" * 32, vocab_size=500)
METADATA = {"tokenizer_hash": "h" * 32, "sequence_length": LENGTH}


def sequences(n: int, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`n` rows that tell their number: row i holds i, i + 1, ..."""
    tokens = np.arange(first, first + n)[:, None] + np.arange(LENGTH + 1)
    mask = (tokens[:, :-1] % 3 > 0).astype("u1")
    return tokens.astype("i4"), mask


def open_table(path: Path, version: int | None = None, length: int = LENGTH) -> PackedSequences:
    return PackedSequences(storage.to_uri(str(path)), version, length, INFO)


@pytest.mark.parametrize("n", [1, 2, 50])
def test_rows_come_back_in_the_asked_order(tmp_path: Path, n: int) -> None:
    tokens, mask = sequences(n)
    write_packed(tmp_path / "a b ü", tokens, mask, METADATA)
    table = open_table(tmp_path / "a b ü")
    rows = np.random.default_rng(0).permutation(n)
    found_tokens, found_mask = table.get(rows)
    assert table.n_sequences == n
    assert np.array_equal(found_tokens, tokens[rows])
    assert np.array_equal(found_mask, mask[rows])
    assert found_tokens.dtype == np.int32
    assert found_mask.dtype == np.uint8


def test_several_files_and_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_CACHE_BYTES", 1)  # each row group pushes out the one before
    for first, n in ((0, 10), (100, 7), (200, 12)):
        write_packed(tmp_path, *sequences(n, first), METADATA | {"commit": first}, mode="append")
    newest, old = open_table(tmp_path), open_table(tmp_path, version=1)
    assert (newest.version, newest.n_sequences, old.version, old.n_sequences) == (2, 29, 1, 17)
    assert newest.metadata is not None
    assert newest.metadata["commit"] == 200
    assert old.metadata is not None
    assert old.metadata["commit"] == 100
    found, _ = newest.get(np.arange(29))
    assert sorted(found[:, 0]) == [*range(10), *range(100, 107), *range(200, 212)]
    assert (np.diff(found[:, 0]) == 1).sum() == 29 - 3  # in their order inside each file
    for _ in range(2):
        mixed, _ = newest.get(np.array([28, 0, 15]))
        assert np.array_equal(mixed, found[[28, 0, 15]])


def test_the_manifest_names_files_and_rows_not_the_version(tmp_path: Path) -> None:
    write_packed(tmp_path, *sequences(10), METADATA)
    first = open_table(tmp_path).manifest_hash
    table = DeltaTable(tmp_path)
    table.alter.set_table_properties({"delta.logRetentionDuration": "interval 3650 days"})
    again = open_table(tmp_path)
    assert (again.version, again.manifest_hash) == (1, first)
    assert again.metadata == METADATA  # the newest commit has none: the newest that has one counts
    write_packed(tmp_path, *sequences(10), METADATA)
    assert open_table(tmp_path).manifest_hash != first


def test_user_metadata_as_spark_writes_it(tmp_path: Path) -> None:
    write_packed(tmp_path, *sequences(1), {"corpus": "here"})
    log = next((tmp_path / "_delta_log").glob("*.json")).read_text()
    # Spark's commitInfo holds the text under the key userMetadata, next to operation and engineInfo.
    assert '"userMetadata":"{\\"corpus\\": \\"here\\"}"' in log
    # A commit without it, such as a merge of small files, leaves the table what it is.
    write_packed(tmp_path, *sequences(1), None, "append")
    write_packed(tmp_path, *sequences(1), {"corpus": "there"})
    assert user_metadata(str(tmp_path), 1) == {"corpus": "here"}


def test_metadata_is_found_under_every_name(tmp_path: Path) -> None:
    """delta-rs lists no commit of a table whose path it has to encode."""
    place = tmp_path / "ä b#c"
    write_packed(place, *sequences(1), {"corpus": "here"})
    assert user_metadata(f"file://{place}", 0) == {"corpus": "here"}


def test_a_table_without_metadata_is_read(tmp_path: Path) -> None:
    write_packed(tmp_path, *sequences(3), None)
    assert open_table(tmp_path).metadata is None


def test_missing_table_names_the_stage(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="run the pack stage"):
        open_table(tmp_path / "none")
    with pytest.raises(CorpusError, match=r"miniplm\.json.*pack stage"):
        read_tokenizer_info(storage.to_uri(str(tmp_path / "none")))


def test_missing_version(tmp_path: Path) -> None:
    write_packed(tmp_path, *sequences(3), METADATA)
    with pytest.raises(CorpusError, match="version 7"):
        open_table(tmp_path, version=7)


def test_empty_table(tmp_path: Path) -> None:
    write_packed(tmp_path, *sequences(0), METADATA)
    with pytest.raises(CorpusError, match="no sequences"):
        open_table(tmp_path)


def test_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    write_packed(tmp_path, *sequences(5, first=490), METADATA)
    with pytest.raises(CorpusError, match="0 to 499"):
        open_table(tmp_path).get(np.array([0]))


@pytest.mark.parametrize("change", [{"tokenizer_hash": "other"}, {"sequence_length": 99}])
def test_packed_with_another_tokenizer_or_length(tmp_path: Path, change: dict[str, object]) -> None:
    write_packed(tmp_path, *sequences(5), METADATA | change)
    with pytest.raises(CorpusError, match=next(iter(change))):
        open_table(tmp_path)


def test_rows_of_another_length(tmp_path: Path) -> None:
    write_packed(tmp_path, *sequences(5), None)
    with pytest.raises(CorpusError, match="expected 9 entries a row"):
        open_table(tmp_path, length=8).get(np.array([0]))
