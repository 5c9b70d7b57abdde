"""Versions of corpora without a JVM: listed, shown and compared over tables that delta-rs has written."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from miniplm_udf import schemas
from miniplm_udf.corpora import listing
from miniplm_udf.errors import CorpusError
from miniplm_udf.layout import Root
from miniplm_udf.store.delta_log import newest_version
from tests.support.corpus_rows import MADE_AT, record, write

REPOSITORY = Path(__file__).resolve().parents[2]


def instance_id(number: int) -> str:
    return f"{number * 2654435761 % 2**32:08x}" + "0" * 24


def kept(numbers: list[int]) -> list[dict[str, Any]]:
    return [
        {"instance_id": instance_id(n), "source": ["web", "code"][n % 2], "n_tokens": n, "n_bytes": n, "score": n / 7}
        for n in numbers
    ]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Version 0 of `kept` has rows 0 to 59, version 1 rows 40 to 99 of two files; `other` was followed."""
    root = tmp_path / "a root"
    schema = schemas.refined("kept", []).arrow_schema()
    write(root, "refined/kept", kept(list(range(60))), schema)
    write(root, "refined/kept", kept(list(range(40, 100))), schema, mode="overwrite")
    write(root, "refined/other", kept([1]), schema)
    record(root, "other", 0, followed={"since_version": 0})
    record(root, "kept", 1, derived={"by": "restore", "from_version": 0})
    record(root, "kept", 0)
    return root


def pin(root: Path, version: int, tag: str | None, numbers: list[int]) -> None:
    write(root, f"pinned/kept/{version}", kept(numbers), schemas.refined("kept", []).arrow_schema())
    row = {"name": "kept", "version": version, "tag": tag, "n_instances": 1, "fingerprint": "f", "pinned_at": MADE_AT}
    write(root, "pins", [row], schemas.PINS.arrow_schema())


def test_versions_are_listed_by_name_and_number(root: Path) -> None:
    pin(root, 0, "paper", [1])
    pin(root, 1, None, [1])
    listed = listing.listing(str(root))
    assert [(row["name"], row["version"], row["made_by"], row["pinned"]) for row in listed] == [
        ("kept", 0, "refine", "paper"), ("kept", 1, "restore", "yes"), ("other", 0, "follow", None),
    ]  # fmt: skip
    assert listed[0]["created_at"] == MADE_AT.replace(tzinfo=None)


def test_an_address_is_a_name_a_number_or_a_tag(root: Path) -> None:
    pin(root, 0, "paper", [1])
    addresses = ("kept", "kept@0", "kept@paper", "other")
    assert [listing.find(str(root), address) for address in addresses] == [
        ("kept", 1), ("kept", 0), ("kept", 0), ("other", 0),
    ]  # fmt: skip
    for address, message in (
        ("kept@9", r"versions \[0, 1\]"),
        ("kept@x", "has .'paper'."),
        ("no", "one of the corpora"),
    ):
        with pytest.raises(CorpusError, match=message):
            listing.find(str(root), address)


def test_a_version_is_counted_by_source_and_a_pinned_one_from_its_copy(root: Path) -> None:
    shown = listing.show(str(root), "kept@0")
    assert shown["by_source"] == {
        "code": {"n_instances": 30, "n_tokens": sum(range(1, 60, 2))},
        "web": {"n_instances": 30, "n_tokens": sum(range(0, 60, 2))},
    }
    assert (shown["pinned"], shown["tag"], shown["config"]) == (False, None, {"models": []})
    pin(root, 0, "paper", [1, 3])
    shown = listing.show(str(root), "kept@paper")
    assert shown["by_source"] == {"code": {"n_instances": 2, "n_tokens": 4}}
    assert (shown["pinned"], shown["tag"]) == (True, "paper")


def test_a_version_whose_files_are_gone_is_shown_without_counts(root: Path) -> None:
    folder = root / "tables" / "refined" / "kept"
    table = DeltaTable(str(folder), version=0)
    for name in table.get_add_actions().column("path").to_pylist():
        (folder / str(name)).unlink()
    assert listing.show(str(root), "kept@0")["by_source"] is None
    assert listing.show(str(root), "kept@1")["by_source"] is not None
    with pytest.raises(CorpusError, match=r"version 0: expected its files, found that they are gone"):
        listing.diff(str(root), "kept@0", "kept@1", 1)
    (folder / "_delta_log").rename(folder / "away")
    with pytest.raises(CorpusError, match=r"refined/kept: expected the versions \[1\].*found no table"):
        listing.diff(str(root), "kept@1", "other", 1)


@pytest.mark.parametrize("ids_at_once", [1_000_000, 50, 3])
def test_a_difference_is_the_same_in_one_part_or_in_many(
    root: Path, ids_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_IDS_AT_ONCE", ids_at_once)
    instance = {
        "instance_id": instance_id(99), "stream_id": "s", "ordinal": 0, "document_ids": ["d"], "start_byte": 0,
        "source": "code", "text": "ä" * 300, "segment_ends": [], "starts_document": True, "ends_document": True,
        "n_bytes": 600, "content_hash": "c", "split": "pool", "metadata": None, "ingested_at": MADE_AT,
        "query_id": "q", "batch_id": 0,
    }  # fmt: skip
    write(root, "instances", [instance], schemas.INSTANCES.arrow_schema())
    found = listing.diff(str(root), "kept@0", "kept", 2)
    counts = {
        kind: {source: row["n_instances"] for source, row in found[kind].items()}
        for kind in ("added", "removed", "both")
    }
    assert counts == {
        "added": {"code": 20, "web": 20}, "removed": {"code": 20, "web": 20}, "both": {"code": 10, "web": 10},
    }  # fmt: skip
    assert found["added"]["web"]["n_tokens"] == sum(range(60, 100, 2))
    assert (found["from"], found["to"]) == ("kept@0", "kept@1")
    assert found["added_examples"] == [
        {"instance_id": instance_id(99), "source": "code", "score": 99 / 7, "text": "ä" * 240},
        {"instance_id": instance_id(98), "source": "web", "score": 98 / 7, "text": None},
    ]
    assert [row["score"] for row in found["removed_examples"]] == [39 / 7, 38 / 7]


def test_of_equal_scores_the_lower_id_is_shown(root: Path) -> None:
    rows = [{**row, "score": 1.0} for row in kept(list(range(200, 230)))]
    write(root, "refined/kept", rows, schemas.refined("kept", []).arrow_schema(), mode="overwrite")
    record(root, "kept", 2)
    found = listing.diff(str(root), "kept@1", "kept@2", 3)
    assert [row["instance_id"] for row in found["added_examples"]] == sorted(row["instance_id"] for row in rows)[:3]


def test_a_root_without_corpora_says_which_table_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"tables/corpora: expected a Delta table, found none"):
        listing.listing(str(tmp_path))


def test_the_newest_version_is_read_from_the_log(root: Path, tmp_path: Path) -> None:
    place = root / "tables" / "refined" / "kept"
    assert newest_version(f"file://{place}") == 1
    assert newest_version(f"file://{tmp_path}/nothing") is None
    (place / "_delta_log" / f"{7:020}.checkpoint.parquet").touch()
    assert newest_version(f"file://{place}") == 7
    (tmp_path / "t" / "_delta_log").mkdir(parents=True)
    assert newest_version(f"file://{tmp_path}/t") is None, "a log without a commit"


@pytest.mark.slow
@pytest.mark.parametrize("words", [["list"], ["show", "kept"], ["diff", "kept@0", "kept@1"]])
def test_the_commands_start_no_spark(root: Path, words: list[str]) -> None:
    code = (
        "import sys; from jobs import cli; code = cli.main(sys.argv[1:]);"
        "print([m for m in ('pyspark', 'delta', 'torch') if m in sys.modules], code)"
    )
    config = root.parent / "conf.yaml"
    config.write_text(f"root: {root}\n")
    line = [sys.executable, "-c", code, "corpus", *words, "-c", str(config)]
    done = subprocess.run(line, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.splitlines()[-1] == "[] 0"
    assert "kept@1" in done.stdout


def test_a_table_that_cannot_be_read_is_named(root: Path) -> None:
    next((root / "tables" / "corpora").glob("*.parquet")).unlink()
    with pytest.raises(CorpusError, match=r"tables/corpora: expected a table that can be read without Spark, found"):
        listing.listing(str(root))


def test_a_damaged_log_is_not_taken_for_a_version_that_is_gone(root: Path) -> None:
    log = Path(Root(str(root)).refined("kept").removeprefix("file://")) / "_delta_log"
    newest = max(log.glob("*.json"))
    number = int(newest.stem)
    newest.write_text(newest.read_text()[:40])
    with pytest.raises(CorpusError, match="expected a table that can be read without Spark"):
        listing.show(str(root), f"kept@{number}")
    newest.unlink()
    assert listing.show(str(root), f"kept@{number}")["by_source"] is None
