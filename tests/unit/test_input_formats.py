"""Text files, JSON arrays, Arrow, encodings, nested fields and the formats of folders, without Spark."""

import bz2
import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from miniplm_udf.config.sections import FieldsConfig, IngestConfig, SplitConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.ingestion.documents import Document, DocumentReader, Reject
from miniplm_udf.ingestion.encodings import encoding_hint, encoding_of
from miniplm_udf.ingestion.field_checks import check_text_fields
from miniplm_udf.ingestion.file_format import csv_hint, file_format
from miniplm_udf.ingestion.globs import expand_recursive
from miniplm_udf.ingestion.hub import patterns
from miniplm_udf.ingestion.json_arrays import json_rows
from miniplm_udf.ingestion.listing import InputFile, base_folders, folder_source
from miniplm_udf.ingestion.readability import check_file
from miniplm_udf.ingestion.taken import TakenFile, growth
from miniplm_udf.ingestion.unpacking import DamagedDataError
from miniplm_udf.ingestion.whole_files import FileReader
from tests.support.hub_server import COMMIT, hub_server

ELEMENTS = [{"text": 'a "quoted" [list], \\'}, [1, {"k": ["]"]}], "s,t", 5, {}, {"text": "ü终", "n": {"m": [[]]}}]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_elements_of_an_array_wherever_chunks_end(indent: int | None, size: int) -> None:
    data = b"\xef\xbb\xbf \n" + json.dumps(ELEMENTS, indent=indent, ensure_ascii=False).encode() + b"\n"
    chunks = [data[start : start + size] for start in range(0, len(data), size)]
    assert [json.loads(row) for row in json_rows(chunks)] == ELEMENTS


def test_arrays_that_are_empty_or_damaged_and_files_of_lines() -> None:
    assert list(json_rows([b"[", b" ]\n"])) == []
    assert list(json_rows([b'{"a":\n', b"1}\nx"])) == [b'{"a":', b"1}", b"x"]
    assert list(json_rows([])) == []
    for data, problem in ((b'[{"a": 1}, {"b"', "does not end"), (b"[1] 2", "behind"), (b'["]', "does not end")):
        with pytest.raises(DamagedDataError, match=problem):
            list(json_rows([data]))


def rows_of(kind: str, path: Path, fields: FieldsConfig | None = None, bases: tuple[str, ...] = ()) -> list[Any]:
    place = pa.RecordBatch.from_pylist([{"source_file": f"file:{path}", "block_start": 0}])
    reader = FileReader(kind, fields or FieldsConfig(), bases)
    return [row for batch in reader(iter([place])) for row in batch.to_pylist()]


@pytest.mark.parametrize(
    ("path", "file", "source"),
    [
        ("/texts", "/texts/json5/58.txt", "json5"),
        ("/texts", "/texts/json5/deep/er/58.txt", "json5"),
        ("/texts", "/texts/58.txt", None),
        ("/texts/json5", "/texts/json5/58.txt", None),
        ("/texts/**/*.txt", "/texts/a%20b/58.txt", "a b"),
        ("/texts/*/58.txt", "/texts/json5/58.txt", "json5"),
        ("/texts/json5/58.txt", "/texts/json5/58.txt", None),
        ("s3a://bucket", "s3a://bucket/json5/58.txt", "json5"),
    ],
)
def test_the_source_of_a_text_file_is_its_first_folder(path: str, file: str, source: str | None) -> None:
    scheme = "" if "://" in path else "file://"
    uri = f"{scheme}{file}"
    assert folder_source(uri, base_folders([f"{scheme}{path}"], [uri])) == source


def test_a_text_file_is_one_document_with_an_id_from_its_name(tmp_path: Path) -> None:
    text = "A text.\nIts second line.\n"
    (tmp_path / "sub").mkdir()
    packers = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress}
    for suffix, pack in packers.items():
        path = tmp_path / "sub" / f"a.b.txt{suffix}"
        path.write_bytes(pack(b"\xef\xbb\xbf" + text.encode()))
        (row,) = rows_of("text", path, bases=base_folders([f"file://{tmp_path}"], [f"file:{path}"]))
        assert (row["id"], row["source"], row["text"].decode()) == (b"sub/a.b", b"sub", text)
    (row,) = rows_of("text", path)
    assert (row["id"], row["source"]) == (b"a.b", None)
    assert base_folders([f"file://{tmp_path}/*/a.*", "file:///x/y.txt"], ["file:/x/y.txt"])[1] == "file:/x/"
    with pytest.raises(ConfigError, match=r"ingest.fields.text: expected no name for text files"):
        check_text_fields(FieldsConfig(text="body"))


def write_arrow(path: Path, table: pa.Table, stream: bool) -> None:
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with make(str(path), table.schema) as writer:
        writer.write_table(table, 700)


@pytest.mark.parametrize("stream", [True, False])
def test_arrow_files(tmp_path: Path, stream: bool) -> None:
    """Every row, fields inside structs and strings of JSON, one bad string, and what damage is found."""
    n_rows = 1500
    texts = pa.array([f"Text {i}.".encode() for i in range(n_rows - 1)] + [b"\xff"]).view(pa.string())
    meta = [json.dumps({"set": f"s{i % 2}", "n": i}) for i in range(n_rows)]
    table = pa.table({"body": texts, "id": range(n_rows), "meta": meta, "doc": [{"lang": "en"}] * n_rows})
    path = tmp_path / "a.arrow"
    write_arrow(path, table, stream)
    fields = FieldsConfig(text="body", source="meta.set", metadata=["doc.lang", "meta.n"])
    rows = rows_of("arrow", path, fields)
    assert len(rows) == n_rows
    assert [rows[7][name] for name in ("text", "id", "source")] == [b"Text 7.", b"7", b"s1"]
    assert json.loads(rows[7]["metadata"]) == {"doc.lang": "en", "meta.n": 7}
    assert rows[-1]["text"] == b"\xff"
    assert check_file(f"file:{path}", "arrow", fields).problem is None
    data = path.read_bytes()
    for n_bytes in (0, 5, len(data) // 2, len(data) - 8):
        path.write_bytes(data[:n_bytes])
        assert check_file(f"file:{path}", "arrow", fields).problem is not None, n_bytes
    write_arrow(path, pa.table({"body": [1, 2]}), stream)
    assert check_file(f"file:{path}", "arrow", fields)[1:3] == ("its column 'body' holds no text: int64", 2)


def test_files_of_other_formats_are_checked(tmp_path: Path) -> None:
    cases = {
        ("a.json", "json", b"[1, 2, 3"): "does not end",
        ("a.json", "json", b"[1, 2, 3]"): None,
        ("a.json", "jsonl", b' [{"text": "x"}]'): "it holds a JSON array",
        ("a.jsonl", "jsonl", b'{"text": "x"}'): None,
        ("a.txt.gz", "text", gzip.compress(os.urandom(3000))[:1000]): "end too early",
    }
    for (name, kind, data), problem in cases.items():
        (tmp_path / name).write_bytes(data)
        message = check_file(f"file:{tmp_path / name}", kind, FieldsConfig()).problem
        assert (message is None) == (problem is None)
        assert (problem or "") in (message or "")


TEXT = "Die Größe der Straße wäre schön, très élégant; 5 €?"


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (TEXT.encode(), None),
        (TEXT.encode("utf-16"), "UTF-16LE"),
        (TEXT.encode("utf-16-be"), "UTF-16"),
        (b"\0" + TEXT.encode("utf-16-le"), "UTF-16"),  # a line after a line break in UTF-16
        (TEXT.encode("utf-32-le"), "UTF-32"),
        (TEXT[:-3].encode("latin-1", "ignore"), "WINDOWS-1252"),
        ('{"text": "Größe"}'.encode("latin-1"), "WINDOWS-1252"),
        (TEXT.encode() + b"\xe4", None),
        ("Привет, мир: это текст.".encode("cp1251"), None),
        ("日本語の文章です。".encode("shift-jis"), None),
        (b"\xff\x00\x01", None),
    ],
)
def test_encodings_are_named_only_where_they_are_sure(data: bytes, name: str | None) -> None:
    assert encoding_of(data) == name
    assert ("iconv -f" in encoding_hint(data)) == (name is not None)


def test_a_reject_names_the_encoding() -> None:
    reader = DocumentReader(FieldsConfig(), "unknown", SplitConfig(reference=0, heldout=0))
    line = json.dumps({"text": TEXT[:-4]}, ensure_ascii=False)
    for encoding, reason, label in (("utf-16", "nul_byte", "UTF-16LE"), ("latin-1", "invalid_utf8", "Latin-1")):
        reject = reader.read_line(line.encode(encoding))
        assert isinstance(reject, Reject)
        assert (reject.reason, label in reject.detail) == (reason, True)


def test_fields_inside_a_string_of_json() -> None:
    fields = FieldsConfig(text="doc.body", source="meta.set.name", metadata=["meta.n"])
    reader = DocumentReader(fields, "unknown", SplitConfig(reference=0, heldout=0))
    row = {"doc": {"body": "Text."}, "meta": json.dumps({"set": {"name": "web"}, "n": 3})}
    document = reader.read_line(json.dumps(row).encode())
    assert isinstance(document, Document)
    assert (document.text, document.source, document.metadata) == ("Text.", "web", '{"meta.n": 3}')
    other = reader.read_line(json.dumps({**row, "meta": "{broken"}).encode())
    assert isinstance(other, Document)
    assert (other.source, other.metadata) == ("unknown", "{}")


def files(*names: str) -> list[InputFile]:
    return [InputFile(f"file:/d/{name}", 0, 1) for name in names]


def test_the_format_of_a_folder_with_several_kinds_of_files() -> None:
    def kind(*names: str) -> str:
        return file_format(None, IngestConfig(input="/d"), files(*names))  # type: ignore[arg-type]

    assert kind("a.txt", "b.txt.gz") == "text"
    assert kind("a.jsonl.bz2", "README.txt", "t.csv") == "jsonl"
    assert kind("s/data-0.arrow", "s/state.json", "s/dataset_info.json", "dataset_dict.json") == "arrow"
    with pytest.raises(ConfigError, match=r"expected files of one format, found .*'arrow', 'parquet'"):
        kind("a.arrow", "b.parquet")
    with pytest.raises(ConfigError, match=r"CSV and TSV files are not read, found /d/a\.csv; write it as Parquet"):
        kind("a.csv", "b.tsv")


@pytest.mark.parametrize(("name", "mark"), [("it's a.csv", ","), ("t.tsv", "\t")])
def test_the_command_for_csv_works(tmp_path: Path, name: str, mark: str) -> None:
    (tmp_path / name).write_text(f'id{mark}text\n1{mark}"Two\nlines"\n')
    hint = csv_hint([f"file:{tmp_path}/{name.replace(' ', '%20')}"])
    command = re.search(r"python (-c .*) \(or in Spark", hint or "")
    assert command is not None
    subprocess.run([sys.executable, *shlex.split(command[1])], check=True)
    rows = pq.read_table(tmp_path / f"{name[:-4]}.parquet").to_pylist()
    assert rows == [{"id": 1, "text": "Two\nlines"}]


def test_recursive_globs() -> None:
    assert expand_recursive("a/**", 3) == "a"
    assert expand_recursive("a/**/*.txt", 2) == "a/{,[!_.]*/,[!_.]*/[!_.]*/}*.txt"
    assert expand_recursive("**/b/**", 0) == "{}b"


def test_files_that_have_grown() -> None:
    taken = [TakenFile("file:///d/a", 0, 0, 10), TakenFile("file:///d/b", 0, 0), TakenFile("file:///d/c", 0, 0, 9)]
    now = [InputFile(f"file:/d/{name}", 0, n_bytes) for name, n_bytes in (("a", 15), ("b", 20), ("c", 9), ("d", 5))]
    assert growth(now, taken) == {"file:/d/a": 5}


def test_the_hub(tmp_path: Path) -> None:
    """A stand-in server: only readable files of the path come, once, and later without the server."""
    repo = tmp_path / "repo"
    for name in ("data/a.parquet", "data/README.md", "en/b.jsonl", "tab/c.csv"):
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_text(name)
    code = (
        "import sys; from miniplm_udf.ingestion.hub import local_copy\n"
        "for path in sys.argv[1:]:\n"
        "  try: print(local_copy(path))\n"
        "  except Exception as error: print(type(error).__name__, error)\n"
    )
    prefix = "hf://datasets/org/texts"

    def copies(*paths: str) -> list[str]:
        done = subprocess.run([sys.executable, "-c", code, *paths], env=environment, capture_output=True, text=True)
        return done.stdout.splitlines()

    with hub_server(repo, "org/texts") as (url, requests):
        environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        first = copies(
            f"{prefix}/data", f"{prefix}@main/**/*.jsonl", f"{prefix}/tab", "hf://datasets/org/none", "hf://x"
        )
        gets = [request.rpartition("/")[2] for request in requests if request.startswith("GET /datasets/")]
    folder = tmp_path / "home/hub/datasets--org--texts/snapshots" / COMMIT
    assert first[:2] == [f"{folder}/data", f"{folder}/**/*.jsonl"]
    assert "has no file that ingest reads; it has tab/c.csv; CSV and TSV files are not read" in first[2]
    assert "cannot be fetched (RepositoryNotFoundError" in first[3]
    assert "expected hf://datasets/ORG/NAME" in first[4]
    assert sorted(gets) == ["a.parquet", "b.jsonl"]
    assert sorted(path.name for path in folder.rglob("*.*")) == ["a.parquet", "b.jsonl"]
    assert (folder / "data/a.parquet").read_text() == "data/a.parquet"
    assert copies(f"{prefix}/data") == [f"{folder}/data"]
    assert patterns("en/{a,b}*.jsonl") == ["en/**.jsonl"]
