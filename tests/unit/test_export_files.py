"""Exports: a folder is complete or absent, and its files hold the rows that were written."""

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from miniplm_udf import storage
from miniplm_udf.corpora import export_folder
from miniplm_udf.corpora.file_writers import COUNTED, FORMATS, write_file
from miniplm_udf.errors import ConfigError

MANIFEST = {"kind": export_folder.KIND, "corpus": "kept", "version": 3}


@pytest.fixture(params=["disk", "object store"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A place that is not there yet."""
    if request.param == "disk":
        yield f"file://{tmp_path}/exports/with space"
        return
    uri = f"memory://{tmp_path.name}"
    yield f"{uri}/exports/kept"
    fsspec.filesystem("memory").store.clear()


def make(place: str, text: str, overwrite: bool = False) -> None:
    with export_folder.written(place, overwrite) as folder:
        storage.write_text(storage.join(folder, "one"), text)
        storage.write_text(storage.join(folder, "stray"), text)
        export_folder.remove_others(folder, ["one"])
        storage.write_json(storage.join(folder, export_folder.MANIFEST), MANIFEST)


def fail(place: str, before: str | None = None) -> None:
    """Fails half-way; meanwhile the place has what it had."""
    with export_folder.written(place, overwrite=True) as folder:
        storage.write_text(storage.join(folder, "one"), "half of it")
        if before is not None:
            assert storage.read_text(storage.join(place, "one")) == before
        raise ZeroDivisionError


def beside(place: str) -> list[str]:
    """All names in the folder that the place is in, hidden ones too."""
    filesystem, path = fsspec.core.url_to_fs(place.rsplit("/", 1)[0])
    return [name.rsplit("/", 1)[-1] for name in filesystem.ls(path, detail=False)]


def test_a_folder_is_whole_and_nothing_lies_beside_it(place: str) -> None:
    make(place, "first")
    assert storage.list_folder(place) == [export_folder.MANIFEST, "one"]
    assert storage.read_text(storage.join(place, "one")) == "first"
    assert export_folder.manifest_of(place) == MANIFEST
    assert beside(place) == [place.rsplit("/", 1)[-1]]


def test_an_export_is_replaced_only_when_asked(place: str) -> None:
    make(place, "first")
    with pytest.raises(ConfigError, match="an export of kept@3; choose another folder, or --overwrite"):
        make(place, "second")
    assert storage.read_text(storage.join(place, "one")) == "first"
    storage.write_text(storage.join(place, "more"), "of an older export")
    make(place, "second", overwrite=True)
    assert storage.list_folder(place) == [export_folder.MANIFEST, "one"]
    assert storage.read_text(storage.join(place, "one")) == "second"
    assert beside(place) == [place.rsplit("/", 1)[-1]]


@pytest.mark.parametrize("theirs", ["a file", "manifest.json"])
def test_what_is_no_export_is_never_replaced(place: str, theirs: str) -> None:
    storage.write_text(storage.join(place, theirs), "[1, 2")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="never overwritten"):
            make(place, "ours", overwrite)
    assert storage.list_folder(place) == [theirs]
    assert storage.read_text(storage.join(place, theirs)) == "[1, 2"


def test_what_fails_leaves_nothing(place: str) -> None:
    with pytest.raises(ZeroDivisionError):
        fail(place)
    assert not storage.list_folder(place)
    make(place, "first")
    assert storage.list_folder(place) == [export_folder.MANIFEST, "one"]


def test_on_a_disk_the_old_one_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    place = f"file://{tmp_path}/kept"
    make(place, "first")
    with pytest.raises(ZeroDivisionError):
        fail(place, before="first")
    assert storage.read_text(storage.join(place, "one")) == "first"
    # Files that a killed export left.
    (tmp_path / ".kept.partial").mkdir()
    (tmp_path / ".kept.partial/half").write_text("of it")
    make(place, "second", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_on_an_object_store_what_a_kill_left_is_known_for_what_it_is() -> None:
    place = "memory://killed/kept"
    try:
        storage.write_text(storage.join(place, export_folder.UNFINISHED), "")
        storage.write_text(storage.join(place, "half"), "of it")
        make(place, "first")
        assert storage.list_folder(place) == [export_folder.MANIFEST, "one"]
    finally:
        fsspec.filesystem("memory").store.clear()


def test_a_place_that_cannot_be_made_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can be written to"):
        make(f"file://{tmp_path}/file/below", "first")
    with pytest.raises(ConfigError, match="never overwritten"):
        make(f"file://{tmp_path}/file", "first", overwrite=True)


TEXTS = ["plain", "naïve 終 🙂\n\t\x1b\u2028\ufeff", 'say "no" \\ twice', ""]


def batches(to: str) -> list[pa.RecordBatch]:
    """Two batches of rows, with an empty one before, between and behind."""
    found = []
    for start in (0, 2):
        texts = TEXTS[start : start + 2]
        counted = {name: [n + start, -(2**60) - n] for n, name in enumerate(COUNTED)}
        columns: dict[str, Any] = {"text": texts, "ends": [[1, 2], []], "metadata": [None, "[]"]}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        columns["ends"] = pa.array(columns["ends"], pa.list_(pa.int32()))
        columns["metadata"] = pa.array(columns["metadata"], pa.string())
        if to != "parquet":
            columns = {"line": [json.dumps(row, ensure_ascii=False) for row in rows]}
        found.append(pa.RecordBatch.from_pydict({**columns, **counted}))
    nothing = found[0].slice(0, 0)
    return [nothing, found[0], nothing, found[1], nothing]


def lines_of(path: Path, to: str) -> list[str]:
    """The lines of a file, unpacked by the program that its extension names."""
    unpack: dict[str, Callable[[bytes], bytes]] = {
        "jsonl": bytes, "jsonl.gz": gzip.decompress, "jsonl.zst": decompress_frame,
    }  # fmt: skip
    *lines, end = unpack[to](path.read_bytes()).decode("utf-8").split("\n")
    assert end == ""
    return lines


def decompress_frame(content: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompressobj().decompress(content)


@pytest.mark.parametrize("to", FORMATS)
def test_a_file_holds_its_rows_and_says_what_they_are(to: str, tmp_path: Path) -> None:
    path = tmp_path / f"part.{to}"
    found = write_file(f"file://{path}", to, iter(batches(to)))
    if to == "parquet":
        rows = pq.read_table(path).to_pylist()
        assert pq.read_schema(path).metadata is None
    else:
        rows = [json.loads(line) for line in lines_of(path, to)]
    assert [row["text"] for row in rows] == TEXTS
    assert [row["ends"] for row in rows] == [[1, 2], []] * 2
    assert [row["metadata"] for row in rows] == [None, "[]"] * 2
    assert set(rows[0]) == {"text", "ends", "metadata"}
    hashes = [0, -(2**60), 2, -(2**60)]
    assert found == {
        "n_bytes": path.stat().st_size,
        "n_rows": 4,
        "n_tokens": 1 + 3 - 2 * (2**60 + 1),
        "text_bytes": 2 + 4 - 2 * (2**60 + 2),
        "hash_xor": 2,
        "hash_sum": sum(one & 0xFFFFFFFF for one in hashes),
    }


@pytest.mark.parametrize("to", FORMATS)
def test_a_task_without_rows_writes_no_file(to: str, tmp_path: Path) -> None:
    nothing = batches(to)[0]
    assert write_file(f"file://{tmp_path}/part", to, iter([nothing, nothing])) is None
    assert write_file(f"file://{tmp_path}/part", to, iter([])) is None
    assert list(tmp_path.iterdir()) == []


def test_json_lines_are_one_frame_with_a_checksum(tmp_path: Path) -> None:
    write_file(f"file://{tmp_path}/part", "jsonl.zst", iter(batches("jsonl.zst")))
    content = (tmp_path / "part").read_bytes()
    parameters = zstandard.get_frame_parameters(content)
    assert parameters.has_checksum
    assert decompress_frame(content).count(b"\n") == 4


@pytest.mark.parametrize("to", ["jsonl", "jsonl.gz"])
def test_json_lines_are_written_without_zstandard(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    write_file(f"file://{tmp_path}/part", to, iter(batches(to)))
    assert len(lines_of(tmp_path / "part", to)) == 4


def test_a_gzip_file_depends_on_its_rows_alone(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_file(f"file://{tmp_path}/{name}", "jsonl.gz", iter(batches("jsonl.gz")))
    content = (tmp_path / "first").read_bytes()
    assert content == (tmp_path / "second").read_bytes()
    # Neither the flag of a name nor a time.
    assert content[3:8] == bytes(5)


def test_parquet_has_a_row_group_every_64_mib(tmp_path: Path) -> None:
    row = pa.RecordBatch.from_pydict({"text": ["z" * 2**20], **{name: [1] for name in COUNTED}})
    write_file(f"file://{tmp_path}/part", "parquet", iter([row] * 100))
    found = pq.ParquetFile(tmp_path / "part").metadata
    assert [found.row_group(n).num_rows for n in range(found.num_row_groups)] == [64, 36]
