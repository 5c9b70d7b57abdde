"""The demo's corpus, from a small made-up installation and once from the real one."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from jobs.demo_text import main
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.ingestion import demo_text
from miniplm_udf.ingestion.demo_text import choose, kind_of, list_files, write_demo_text

LONG = "A sentence that says something about the function that it belongs to. " * 5


@pytest.fixture
def roots(tmp_path: Path) -> dict[str, Path]:
    """40 packages with a module, a data file, a licence and a README each."""
    site = tmp_path / "site"
    for i in range(40):
        package, metadata = site / f"p{i}", site / f"p{i}-1.dist-info"
        package.mkdir(parents=True), metadata.mkdir()
        (package / "m.py").write_text(f'"""Module {i}. {LONG}"""\n\ndef f():\n    """Function {i}. {LONG}"""\n')
        (package / "d.json").write_text(json.dumps({"n": i, "text": LONG * 3}))
        (metadata / "LICENSE").write_text(f"Licence {i}\n{LONG * 4}")
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: p{i}\n\n# Package {i}\n\n{LONG}\n")
        (metadata / "RECORD.txt").write_text("not text\n" * 100)
    return {"site-packages": site}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl.gz"))
        for line in gzip.decompress(path.read_bytes()).decode().splitlines()
    ]


def state_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_every_source_is_read(roots: dict[str, Path], tmp_path: Path):
    write_demo_text(tmp_path / "out", 1.0, roots)
    rows = {row["id"]: row for row in rows_of(tmp_path / "out")}
    assert {row["source"] for row in rows.values()} == set(demo_text._SOURCES)
    # Two docstrings, a module, data, a licence and a README; RECORD.txt is none of them.
    assert len(rows) == 40 * 6
    assert rows["site-packages/p3-1.dist-info/METADATA"]["text"].startswith("# Package 3")
    assert rows["site-packages/p3/m.py::f:3"]["text"].startswith("Function 3.")
    assert all(row["id"].startswith("site-packages/") for row in rows.values())


def test_again_changes_no_file(roots: dict[str, Path], tmp_path: Path):
    write_demo_text(tmp_path / "out", 0.05, roots)
    before = state_of(tmp_path / "out")
    write_demo_text(tmp_path / "out", 0.05, roots)
    assert state_of(tmp_path / "out") == before
    (roots["site-packages"] / "p0" / "new.py").write_text("# " + LONG)
    write_demo_text(tmp_path / "out", 0.05, roots)
    assert state_of(tmp_path / "out") == before, "a corpus that is there is not changed under those who ingested it"


def test_made_again_elsewhere_it_is_the_same_bytes(roots: dict[str, Path], tmp_path: Path):
    for name in ("one", "two"):
        write_demo_text(tmp_path / name, 1.0, roots)
    one, two = ({k: v[0] for k, v in state_of(tmp_path / name).items()} for name in ("one", "two"))
    assert one == two


def test_a_damaged_shard_is_written_again(roots: dict[str, Path], tmp_path: Path):
    write_demo_text(tmp_path / "out", 1.0, roots)
    shard = tmp_path / "out" / "demo-text-0000.jsonl.gz"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:50])
    write_demo_text(tmp_path / "out", 1.0, roots)
    assert shard.read_bytes() == whole


def test_a_larger_scale_adds_shards_and_a_smaller_one_takes_them_away(
    roots: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(demo_text, "BYTES_PER_SOURCE", 8000)
    write_demo_text(tmp_path / "out", 0.5, roots)
    small = state_of(tmp_path / "out")
    write_demo_text(tmp_path / "out", 1.0, roots)
    large = state_of(tmp_path / "out")
    shards = [name for name in small if name.endswith(".gz")]
    assert len(shards) == 2
    assert len(large) > len(small)
    assert all(large[name] == small[name] for name in shards), "full shards stay, with their modification times"
    write_demo_text(tmp_path / "out", 0.5, roots)
    assert set(state_of(tmp_path / "out")) == set(small)


def test_sources_are_balanced_and_within_the_size(roots: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo_text, "BYTES_PER_SOURCE", 4000)
    _, counts = choose(list_files(roots), 1.0)
    for count in counts.values():
        assert 4000 <= count["bytes"] < 4000 + demo_text.MAX_DOCUMENT_BYTES


def test_less_text_than_asked_for_is_said(roots: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level("WARNING", logger="miniplm"):
        write_demo_text(tmp_path / "out", 100.0, roots)
    assert "took all" in caplog.text


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe" + LONG.encode(), LONG.encode() + b"\0", b"short", b"x" * (demo_text.MAX_DOCUMENT_BYTES + 1)],
)
def test_what_is_no_text_or_of_no_size_is_left_out(tmp_path: Path, content: bytes):
    (tmp_path / "a.txt").write_bytes(content)
    assert list(demo_text.documents_of("data_files", {"x/a.txt": tmp_path / "a.txt"})) == []


def test_code_that_does_not_parse_and_lone_surrogates_are_left_out(tmp_path: Path):
    (tmp_path / "bad.py").write_text("def (:\n" + LONG)
    (tmp_path / "odd.py").write_text(f'"""\\ud800 {LONG}"""\n')
    files = {f"x/{name}": tmp_path / name for name in ("bad.py", "odd.py")}
    assert list(demo_text.documents_of("docstrings", files)) == []


@pytest.mark.parametrize(
    ("file_id", "kind"),
    [
        ("site-packages/a-1.dist-info/METADATA", "readmes"),
        ("site-packages/a-1.dist-info/licenses/LICENSE.txt", "licences"),
        ("site-packages/a/METADATA", None),
        ("site-packages/a/license.py", "source_code"),
        ("site-packages/a/x.csv", "data_files"),
        ("site-packages/a-1.dist-info/top_level.txt", None),
        ("site-packages/a/x.so", None),
    ],
)
def test_kinds(file_id: str, kind: str | None):
    assert kind_of(file_id) == kind


def test_own_and_compiled_files_are_not_listed(tmp_path: Path):
    for name in ("miniplm-0.1.dist-info/METADATA", "a/__pycache__/m.py", "a/m.py", "__editable___miniplm_finder.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert list(list_files({"site-packages": tmp_path})) == ["site-packages/a/m.py"]


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_scale_must_be_above_zero(tmp_path: Path, scale: float):
    with pytest.raises(ConfigError, match="above 0"):
        write_demo_text(tmp_path / "out", scale, {})


def test_no_text_is_an_error_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError):
        write_demo_text(tmp_path / "out", 1.0, {"x": tmp_path / "empty"})
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_this_installation_has_all_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--to", str(tmp_path / "out"), "--scale", "0.1", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)["demo-text"]
    assert set(summary["sources"]) == set(demo_text._SOURCES)
    assert all(count["documents"] > 0 for count in summary["sources"].values())
    assert len(rows_of(tmp_path / "out")) == sum(count["documents"] for count in summary["sources"].values())
