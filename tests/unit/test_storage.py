"""URIs and small files."""

from pathlib import Path

import pytest

from miniplm_udf import storage


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
    storage.upload_folder(first, uri)
    storage.upload_folder(second, uri)
    assert [p.name for p in storage.local_folder(uri).iterdir()] == ["b"]
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["m"]


def test_remote_folder_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    storage.upload_folder(source, "memory://bucket/model")
    assert storage.exists("memory://bucket/model/config.json")
    local = storage.local_folder("memory://bucket/model")
    assert (local / "config.json").read_text() == "{}"
    assert storage.local_folder("memory://bucket/model") == local
    # Another state of the same folder is another copy.
    (source / "config.json").write_text('{"retrained": true}')
    storage.upload_folder(source, "memory://bucket/model")
    assert (storage.local_folder("memory://bucket/model") / "config.json").read_text() == '{"retrained": true}'
