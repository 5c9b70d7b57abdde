"""URIs and small files."""

import re
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from miniplm_udf import storage
from miniplm_udf.errors import ConfigError
from tests.support.full_disk import largest_file


@pytest.mark.parametrize(
    ("path", "uri"),
    [
        ("/a/b/", "file:///a/b"),
        ("file:/a/b", "file:///a/b"),
        ("file:///a/b/", "file:///a/b"),
        ("/a b", "file:///a b"),
        ("s3a://bucket/x/", "s3a://bucket/x"),
        ("hdfs://name:9000/x", "hdfs://name:9000/x"),
    ],
)
def test_to_uri(path: str, uri: str) -> None:
    assert storage.to_uri(path) == uri
    assert storage.to_uri(uri) == uri


@pytest.mark.parametrize("name", ["a b", "ä", "a#b", "a+b;c&d=e,f@g!", "a'b\"c", "10:00", "~x/y", "<b>(c)", "😀 "])
def test_names_that_every_engine_takes(name: str, tmp_path: Path) -> None:
    uri = storage.to_uri(str(tmp_path / name))
    storage.check_location("root", uri)
    storage.write_text(storage.join(uri, "x.json"), "{}")
    assert (tmp_path / name / "x.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        *(
            (f"/data/a{text}b", f"found {re.escape(repr(text))} at position 8")
            for text in "%`$*?[]{}\\|^\n\t\x7f\udcff"
        ),
        ("/data/a::b", "found '::' at position 8"),
        ("s3a://k:s%2Fcret@bucket/a%25b", r"found '%' at position 3 of '/a%25b'"),
        ("simplecache::s3://bucket/x", "found '::'"),
        ("file:relative", "expected file: and an absolute path"),
        ("file://host/x", "expected file: and an absolute path"),
    ],
)
def test_names_that_an_engine_takes_for_others_are_refused(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^root: .*{message}"):
        storage.check_location("root", storage.to_uri(path))


def test_dots_and_home_in_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "far" / "run").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "run")
    assert storage.to_uri(str(tmp_path / "link" / ".." / "other")) == f"file://{tmp_path}/far/other"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.to_uri("~/a") == f"file://{tmp_path}/a"
    with pytest.raises(ConfigError, match=r"~nobody-here/a: expected the name of a user"):
        storage.to_uri("~nobody-here/a")


def test_a_colon_makes_no_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.to_uri("crawl-2024T10:00") == f"file://{tmp_path}/crawl-2024T10:00"


def test_a_bare_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.to_uri("x") == f"file://{tmp_path}/x"
    assert storage.local_path(storage.to_uri("a b")) == str(tmp_path / "a b")


def test_remote_is_not_local() -> None:
    assert not storage.is_local("s3a://bucket/x")
    with pytest.raises(ValueError, match="not a local path"):
        storage.local_path("s3a://bucket/x")


def test_redact_hides_keys() -> None:
    assert storage.redact("s3a://key:secret@bucket/x?token=abc") == "s3a://bucket/x"


def test_json_round_trip_replaces_whole(tmp_path: Path) -> None:
    uri = storage.to_uri(str(tmp_path / "deep" / "x.json"))
    assert storage.read_json(uri) is None
    storage.write_json(uri, {"a": "ä"})
    storage.write_json(uri, {"b": [1]})
    assert storage.read_json(uri) == {"b": [1]}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.json"]


def test_upload_folder_replaces_the_old_one(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, name in ((first, "a"), (second, "b")):
        folder.mkdir()
        (folder / name).write_text(name)
    uri = storage.to_uri(str(tmp_path / "models" / "m"))
    storage.upload_folder(first, uri, last=["a"])
    (tmp_path / "models" / ".m.killed_0").mkdir()
    (tmp_path / "models" / ".m.other.killed_0").mkdir()  # of the model m.other
    storage.upload_folder(second, uri, last=["b"])
    assert [p.name for p in storage.local_folder(uri).iterdir()] == ["b"]
    assert {p.name for p in (tmp_path / "models").iterdir()} == {"m", ".m.other.killed_0"}


def test_remote_folder_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    storage.upload_folder(source, "memory://bucket/model", last=["config.json"])
    assert storage.exists("memory://bucket/model/config.json")
    local = storage.local_folder("memory://bucket/model")
    assert (local / "config.json").read_text() == "{}"
    assert storage.local_folder("memory://bucket/model") == local
    # Another state of the same folder is another copy.
    (source / "config.json").write_text('{"retrained": true}')
    storage.upload_folder(source, "memory://bucket/model", last=["config.json"])
    assert (storage.local_folder("memory://bucket/model") / "config.json").read_text() == '{"retrained": true}'


def test_a_remote_folder_has_its_last_file_only_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.json", "training.json", "weights"):
        (tmp_path / name).write_text("old")
    storage.upload_folder(tmp_path, "memory://bucket/whole", last=["training.json"])
    (tmp_path / "weights").write_text("new")
    original = MemoryFileSystem.put_file

    def killed_at_the_weights(self: MemoryFileSystem, local: str, remote: str, **options: Any) -> None:
        if local.endswith("weights"):
            raise KeyboardInterrupt
        original(self, local, remote, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", killed_at_the_weights)
    with pytest.raises(KeyboardInterrupt):
        storage.upload_folder(tmp_path, "memory://bucket/whole", last=["training.json"])
    assert storage.list_folder("memory://bucket/whole") == ["a.json", "weights"]
    monkeypatch.undo()
    storage.upload_folder(tmp_path, "memory://bucket/whole", last=["training.json"])
    assert storage.list_folder("memory://bucket/whole") == ["a.json", "training.json", "weights"]
    assert storage.read_text("memory://bucket/whole/weights") == "new"


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    storage.write_text(str(tmp_path / "run.json"), "old")
    with largest_file(1000), pytest.raises(OSError, match="File too large"):
        storage.write_text(str(tmp_path / "run.json"), "x" * 100_000)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert storage.read_text(str(tmp_path / "run.json")) == "old"
