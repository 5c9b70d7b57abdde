"""Reading packed tables: every row in stored order, at the asked version, refused where it does not fit."""

from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from miniplm_udf import storage
from miniplm_udf.errors import CorpusError
from miniplm_udf.store.model_records import TokenizerRecord
from tests.support.packed_tables import packed_batch, write_rows
from tests.support.s3_server import BUCKET, S3Server
from tests.support.trainer_roots import LENGTH, write_packed
from trainer.loader import data, order
from trainer.loader.data import PackedSequences, read_tokenizer, user_metadata
from trainer.loader.packed_files import RowGroupReader, list_row_groups

INFO = TokenizerRecord(
    document_separator="x", document_separator_id=0, tokenizer_hash="h" * 32, vocab_size=3000, fingerprint="f"
)
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
    monkeypatch.setattr(data, "count_lanes", lambda group_rows: 1)  # two row groups are kept: others are decoded again
    for first, n in ((0, 10), (100, 7), (200, 12), (300, 5)):
        write_packed(tmp_path, *sequences(n, first), METADATA | {"commit": first}, mode="append")
    newest, old = open_table(tmp_path), open_table(tmp_path, version=1)
    assert (newest.version, newest.n_sequences, old.version, old.n_sequences) == (3, 34, 1, 17)
    assert newest.metadata is not None
    assert newest.metadata["commit"] == 300
    assert old.metadata is not None
    assert old.metadata["commit"] == 100
    rows, _ = newest.get(np.arange(34))
    assert sorted(rows[:, 0]) == [*range(10), *range(100, 107), *range(200, 212), *range(300, 305)]
    assert (np.diff(rows[:, 0]) == 1).sum() == 34 - 4  # in their order inside each file
    for _ in range(2):
        mixed, _ = newest.get(np.array([33, 0, 15, 28, 1]))
        assert np.array_equal(mixed, rows[[33, 0, 15, 28, 1]])
    assert newest.get(np.array([], dtype=np.int64))[0].shape == (0, LENGTH + 1)


def write_groups(path: Path, sizes: list[int], group_rows: int) -> np.ndarray:
    """A table of one commit for each size, in row groups of at most `group_rows` rows; returns its token ids."""
    tokens, mask = sequences(sum(sizes))
    first = 0
    for size in sizes:
        part = slice(first, first + size)
        write_rows(path, [packed_batch(first, tokens[part], mask[part])], METADATA, "append", group_rows)
        first += size
    return tokens


def test_rows_are_numbered_by_their_sequence_ids_whatever_the_files_names(tmp_path: Path) -> None:
    tokens = write_groups(tmp_path, [9] * 12, group_rows=4)
    table = open_table(tmp_path)
    assert table.group_rows.tolist() == [4, 4, 1] * 12
    assert np.array_equal(table.get(np.arange(108))[0], tokens)


@pytest.mark.parametrize(("group_rows", "share"), [(4, 1.1), (64, 1.1), (400, 2)])
@pytest.mark.parametrize("world_size", [1, 4])
def test_an_epoch_decodes_each_rank_s_share_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_rows: int, share: float, world_size: int
) -> None:
    monkeypatch.setattr(order, "WINDOW_ROWS", 64 if group_rows == 4 else 256)
    tokens = write_groups(tmp_path, [1200, 1201], group_rows)
    tables = [open_table(tmp_path) for _ in range(world_size)]
    row_order = order.RowOrder(tables[0].group_rows, 0)
    assert row_order.lanes == {4: 16, 64: 4, 400: 1}[group_rows]
    for step in range(2401 // 48):
        for rank, table in enumerate(tables):
            rows = row_order.batch_rows(step, 48, rank, world_size)
            assert np.array_equal(table.get(rows)[0], tokens[rows])
    # A table in row groups larger than the window is read too; only then can a rank not keep to its own row groups.
    n_decoded = sum(table.cache.rows_decoded for table in tables)
    assert n_decoded <= share * 2401 * (world_size if group_rows == 400 else 1)


def test_large_row_groups_of_earlier_versions_are_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, group_rows in (("new", 512), ("old", 1300)):
        tokens = write_groups(tmp_path / name, [1300], group_rows)
        with caplog.at_level("WARNING", logger="miniplm"):
            table = open_table(tmp_path / name)
        rows = order.RowOrder(table.group_rows, 0).batch_rows(0, 1300)
        assert np.array_equal(table.get(rows)[0], tokens[rows])
        assert ("has row groups of 1300 rows" in caplog.text) == (name == "old")


def test_the_memory_does_not_grow_with_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "WINDOW_ROWS", 64)
    for name, sizes in (("small", [128]), ("large", [1000, 1000])):
        write_groups(tmp_path / name, sizes, group_rows=4)
    small, large = open_table(tmp_path / "small"), open_table(tmp_path / "large")
    row_bytes = 4 * (LENGTH + 1) + LENGTH
    assert small.cache.n_bytes == large.cache.n_bytes == (16 + 1) * 4 * row_bytes


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
    """delta-rs lists no commit of a table whose path has a `#`."""
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
        read_tokenizer(storage.to_uri(str(tmp_path / "none")))


def test_missing_version(tmp_path: Path) -> None:
    write_packed(tmp_path, *sequences(3), METADATA)
    with pytest.raises(CorpusError, match="version 7"):
        open_table(tmp_path, version=7)


def test_empty_table(tmp_path: Path) -> None:
    write_packed(tmp_path, *sequences(0), METADATA)
    with pytest.raises(CorpusError, match="no sequences"):
        open_table(tmp_path)


def test_ids_outside_the_vocabulary(tmp_path: Path) -> None:
    write_packed(tmp_path, *sequences(5, first=2990), METADATA)
    with pytest.raises(CorpusError, match=r"part-.*\.parquet: expected ids 0 to 2999"):
        open_table(tmp_path).get(np.array([0]))


@pytest.mark.parametrize("change", [{"tokenizer_hash": "other"}, {"sequence_length": 99}])
def test_packed_with_another_tokenizer_or_length(tmp_path: Path, change: dict[str, object]) -> None:
    write_packed(tmp_path, *sequences(5), METADATA | change)
    with pytest.raises(CorpusError, match=next(iter(change))):
        open_table(tmp_path)


def test_rows_of_another_length(tmp_path: Path) -> None:
    write_packed(tmp_path, *sequences(5), None)
    with pytest.raises(
        CorpusError, match=r"part-.*\.parquet: expected 9 entries of token_ids a row .* found 17 in row 0"
    ):
        open_table(tmp_path, length=8).get(np.array([0]))


def data_file(path: Path) -> Path:
    """The only data file of a table."""
    (file,) = path.glob("*.parquet")
    return file


def replace_rows(path: Path, **columns: pa.Array) -> None:
    """Writes the table's data file again with other columns."""
    file = data_file(path)
    table = pq.read_table(file)
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, values)
    pq.write_table(table, file)


def binary_rows(values: np.ndarray) -> list[bytes | None]:
    return [row.tobytes() for row in values]


@pytest.mark.parametrize(
    ("column", "value", "problem"),
    [
        ("token_ids", None, "17 entries of token_ids .* found null in row 3"),
        ("token_ids", b"1234567890", r"17 entries of token_ids .* found 2\.5 in row 3"),
        ("target_mask", b"", "16 entries of target_mask .* found 0 in row 3"),
    ],
)
def test_a_bad_row_is_named_with_its_file(tmp_path: Path, column: str, value: bytes | None, problem: str) -> None:
    tokens, mask = sequences(5)
    write_packed(tmp_path, tokens, mask, METADATA)
    values = binary_rows(tokens if column == "token_ids" else mask)
    values[3] = value
    replace_rows(tmp_path, **{column: pa.array(values, pa.binary())})
    with pytest.raises(
        CorpusError, match=rf"part-.*\.parquet: expected {problem} of row group 0: restore .* pack stage"
    ):
        open_table(tmp_path).get(np.array([0]))


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.binary_view()])
def test_other_binary_types_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    tokens, mask = sequences(5)
    write_packed(tmp_path, tokens, mask, METADATA)
    replace_rows(tmp_path, token_ids=pa.array(binary_rows(tokens), kind))
    assert np.array_equal(open_table(tmp_path).get(np.arange(5))[0], tokens)


def test_files_of_an_object_store_are_read(tmp_path: Path) -> None:
    tokens, mask = sequences(50)
    write_packed(tmp_path, tokens, mask, METADATA)
    fsspec.filesystem("memory").pipe("/packed/part-0.parquet", data_file(tmp_path).read_bytes())
    (group,) = list_row_groups(["memory://packed/part-0.parquet"])
    for read, expected in zip(RowGroupReader(LENGTH, 3000).read(group), (tokens, mask), strict=True):
        assert np.array_equal(read, expected)


def test_a_row_group_on_s3_is_one_request(s3: S3Server, tmp_path: Path) -> None:
    write_packed(tmp_path, *sequences(50), METADATA)
    filesystem, place = fsspec.core.url_to_fs(f"s3a://{BUCKET}/part-0.parquet")
    filesystem.pipe_file(place, data_file(tmp_path).read_bytes())
    (group,) = list_row_groups([f"s3a://{BUCKET}/part-0.parquet"])
    reader = RowGroupReader(LENGTH, 3000)
    reader.read(group)  # opens the file
    s3.reset()
    reader.read(group)
    assert s3.requests() == {"get 206": 1}


def test_a_damaged_file_is_named_when_the_table_is_opened(tmp_path: Path) -> None:
    write_packed(tmp_path, *sequences(50), METADATA)
    file = data_file(tmp_path)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(
        CorpusError, match=rf"{file.name}: expected a file of a packed table.*restore the file.*pack stage"
    ):
        open_table(tmp_path)
    file.unlink()
    with pytest.raises(CorpusError, match=rf"{file.name}: .*found: no such file; restore the file.*pack stage"):
        open_table(tmp_path)


def test_a_file_damaged_in_the_middle_is_named_when_it_is_read(tmp_path: Path) -> None:
    write_packed(tmp_path, *sequences(50), METADATA)
    file = data_file(tmp_path)
    content = bytearray(file.read_bytes())
    content[4:300] = b"\xff" * 296
    file.write_bytes(content)
    with pytest.raises(CorpusError, match=file.name):
        open_table(tmp_path).get(np.array([0]))


def test_a_table_of_other_columns_is_refused(tmp_path: Path) -> None:
    write_deltalake(tmp_path.as_uri(), pa.table({"text": ["a"], "token_ids": [b"1"]}))
    with pytest.raises(CorpusError, match="found no target_mask: the folder holds another table; move it away"):
        open_table(tmp_path)


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.int64()], ids=str)
def test_columns_of_other_types_are_refused_when_the_table_is_opened(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array([[1, 2]] if pa.types.is_list(kind) else [1], type=kind)
    write_deltalake(tmp_path.as_uri(), pa.table({"token_ids": column, "target_mask": [b"1"], "sequence_id": [0]}))
    with pytest.raises(CorpusError, match=r"expected the type binary of the column token_ids .*, found .*int"):
        open_table(tmp_path)


def test_metadata_of_another_writer_counts_as_none(tmp_path: Path) -> None:
    write_rows(tmp_path, [packed_batch(0, *sequences(2))], None)
    log = tmp_path / "_delta_log" / f"{0:020}.json"
    log.write_text(log.read_text().replace('"commitInfo":{', '"commitInfo":{"userMetadata":"by hand",', 1))
    assert open_table(tmp_path).metadata is None


def test_a_damaged_log_is_one_line_with_a_remedy(tmp_path: Path) -> None:
    write_rows(tmp_path, [packed_batch(0, *sequences(2))], None)
    (tmp_path / "_delta_log" / f"{0:020}.json").write_text('{"add": \n')
    with pytest.raises(CorpusError, match=r"cannot be read: [^\n]*; restore it .* run the pack stage again$"):
        open_table(tmp_path)
