"""Versions of a corpus: listed, shown, compared, pinned, brought back, and made again from what was recorded."""

from pathlib import Path
from typing import Any

import pytest

from jobs import corpus_text
from jobs import refine as job
from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.refine import CorpusConfig, SelectConfig
from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.corpora import listing, versions
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.store import corpus_records, pins, tables
from miniplm_udf.upkeep import checks, verify_versions
from tests.support.matrices import ALIASES, DIFFERENCE, ids, matrix_rows, with_corpora, write_matrix, write_record
from tests.support.score_tables import experiment, write_instances


def of_ratio(config: ExperimentConfig, ratio: float) -> ExperimentConfig:
    return with_corpora(config, kept=CorpusConfig(score=DIFFERENCE, select=SelectConfig(ratio=ratio)))


@pytest.fixture(scope="module")
def config(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    """A root with a matrix of 200 rows, and two versions of a corpus: half of them, and a quarter."""
    made = experiment(
        tmp_path_factory.mktemp("versions") / "root", {alias: ModelConfig(path="/nowhere") for alias in ALIASES}
    )
    write_matrix(spark, made, matrix_rows(200))
    for alias in ALIASES:
        write_record(made, alias)
    for ratio in (0.5, 0.25):
        job.run(spark, of_ratio(made, ratio))
    return made


def holds(spark: Any, config: ExperimentConfig) -> None:
    at = checks.CheckedRoot(spark, config.root)
    # The table comes with the first pin.
    has_pins = tables.exists(spark, config.layout.table("pins"))
    results = [*verify_versions.corpora_of(at), *(verify_versions.pinned(at) if has_pins else [])]
    assert [check for check in results if not check.ok] == []


def test_versions_are_listed_shown_and_compared(spark: Any, config: ExperimentConfig) -> None:
    listed = listing.listing(config.root)[:2]
    first, second = (one["version"] for one in listed)
    assert [one["made_by"] for one in listed] == ["refine", "refine"]
    text = corpus_text.listing(listed)
    assert f"kept@{first}" in text
    assert listed[1]["fingerprint"] in text

    half, quarter = (corpus_records.read_corpus(spark, config.root, "kept", version) for version in (first, second))
    shown = listing.show(config.root, f"kept@{first}")
    counted = half.groupBy("source").agg({"*": "count", "n_tokens": "sum"}).collect()
    expected = {r["source"]: {"n_instances": r["count(1)"], "n_tokens": r["sum(n_tokens)"]} for r in counted}
    assert shown["by_source"] == expected
    assert sum(of["n_instances"] for of in shown["by_source"].values()) == shown["n_instances"] == half.count()
    assert shown["inputs"]["model_revisions"] == {alias: f"rev-{alias}" for alias in ALIASES}
    text = corpus_text.show(shown)
    for word in (shown["fingerprint"], "rev-teacher", "matrix_version", "ratio 0.5", "books", shown["code_revision"]):
        assert word in text

    found = listing.diff(config.root, f"kept@{second}", f"kept@{first}", 2)
    added = set(ids(half)) - set(ids(quarter))
    assert sum(of["n_instances"] for of in found["added"].values()) == len(added) > 0
    assert sum(of["n_instances"] for of in found["both"].values()) == quarter.count()
    assert found["removed"] == {}
    assert found["removed_examples"] == []
    # The rows with the highest scores that only the second address has; there is no table of instances here.
    order = sorted((-row["score"], row["instance_id"]) for row in half.collect() if row["instance_id"] in added)
    assert [one["instance_id"] for one in found["added_examples"]] == [one[1] for one in order[:2]]
    assert "(no such instance)" in corpus_text.diff(found)
    back = listing.diff(config.root, f"kept@{first}", f"kept@{second}", 0)
    assert (back["removed"], back["added"]) == (found["added"], {})


def test_examples_have_their_texts(spark: Any, tmp_path: Path) -> None:
    made = experiment(tmp_path / "root", {})
    write_instances(spark, made, ["a text that is shown", "ä" * 300, "another text"])
    rows = tables.read(spark, made.layout.table("instances")).collect()
    ids_of = {row["text"][:3]: row["instance_id"] for row in rows}
    shown = listing._texts(made.root, [ids_of["a t"], ids_of["äää"], "0" * 32])
    assert shown == {ids_of["a t"]: "a text that is shown", ids_of["äää"]: "ä" * 240}


def test_a_pin_has_a_name_and_is_a_copy(spark: Any, config: ExperimentConfig) -> None:
    first, second = (one["version"] for one in listing.listing(config.root)[:2])
    made = versions.pin(spark, config.root, f"kept@{first}", "paper")
    assert versions.find(spark, config.root, "kept@paper") == ("kept", first)
    assert versions.pin(spark, config.root, "kept@paper") == pins.of_version(spark, config.root, "kept", first)
    assert listing.show(config.root, "kept@paper")["tag"] == "paper"
    assert f"kept@{first} is pinned as kept@paper" in corpus_text.pinned(vars(made))
    holds(spark, config)
    for tag, message in (("paper", "has it"), ("7", "no number")):
        with pytest.raises(ConfigError, match=message):
            versions.pin(spark, config.root, f"kept@{second}", tag)
    with pytest.raises(ConfigError, match="unpin it first"):
        versions.pin(spark, config.root, f"kept@{first}", "other")
    for address, message in (
        ("kept@nobody", "has .'paper'."),
        ("kept@99", "versions"),
        ("other", "one of the corpora"),
    ):
        with pytest.raises(CorpusError, match=message):
            versions.find(spark, config.root, address)
    # A file of the copy that goes away, and the copy as a whole, are seen.
    copy = Path(storage.local_path(config.layout.pinned("kept", first)))
    next(copy.glob("*.parquet")).unlink()
    at = checks.CheckedRoot(spark, config.root)
    assert [check.ok for check in verify_versions.pinned(at)] == [True, False]
    pins.remove(spark, config.root, "other", 1)
    storage.remove_folder(str(copy))
    assert [check.found for check in verify_versions.pinned(at)][1] == "nothing"
    assert versions.unpin(spark, config.root, f"kept@{first}") == ("kept", first)
    assert pins.find(spark, config.root) == []
    with pytest.raises(CorpusError, match="expected a pinned version"):
        versions.unpin(spark, config.root, f"kept@{first}")


@pytest.mark.long
def test_an_old_version_comes_back_as_a_new_one(spark: Any, config: ExperimentConfig) -> None:
    first = listing.listing(config.root)[0]
    before = ids(corpus_records.read_corpus(spark, config.root, "kept", first["version"]))
    made = versions.restore(spark, config, f"kept@{first['version']}")
    assert made.version > first["version"]
    assert (made.fingerprint, made.skipped) == (first["fingerprint"], False)
    assert ids(corpus_records.read_corpus(spark, config.root, "kept")) == before
    newest = corpus_records.newest(config.layout.refined("kept"))
    assert newest is not None
    assert newest.provenance is not None
    assert newest.provenance.derived == {"by": "restore", "from_version": first["version"]}
    assert listing.listing(config.root)[-1]["made_by"] == "restore"
    assert "by restore, from_version" in corpus_text.show(listing.show(config.root, "kept"))
    again = versions.restore(spark, config, f"kept@{first['version']}")
    assert (again.version, again.skipped) == (made.version, True)
    assert "nothing was written" in corpus_text.made(again)
    # A restored version differs from a refinement of the present matrix, so the refinement is not skipped.
    assert not job.run(spark, of_ratio(config, 0.5)).refined["kept"].skipped
    holds(spark, config)


def test_a_version_is_made_again_from_its_record(spark: Any, config: ExperimentConfig) -> None:
    later = [{**row, "batch_id": 2} for row in matrix_rows(60, seed=1)]
    write_matrix(spark, config, later)
    known = listing.listing(config.root)
    # One that is not the newest: another test may have brought the first one back.
    one = next(one for one in known if one["fingerprint"] != known[-1]["fingerprint"])
    version = one["version"]
    checked = versions.rebuild(spark, config, f"kept@{version}", dry_run=True)
    assert checked.fingerprint == one["fingerprint"]
    assert listing.listing(config.root) == known, "a dry run writes nothing"
    made = versions.rebuild(spark, config, f"kept@{version}")
    assert (made.fingerprint, made.skipped) == (one["fingerprint"], False)
    old, new = (corpus_records.read_corpus(spark, config.root, "kept", at) for at in (version, made.version))
    assert old.orderBy("instance_id").collect() == new.orderBy("instance_id").collect()
    holds(spark, config)
    # A rebuild from a changed matrix is refused.
    kept = new.selectExpr("min(instance_id) AS instance_id")
    tables.delete_matching(spark, config.layout.table("score_matrix"), kept.persist())
    with pytest.raises(CorpusError, match="expected the fingerprint"):
        versions.rebuild(spark, config, f"kept@{version}")
    followed = corpus_records.Provenance(
        **{
            **vars(corpus_records.provenance_of(spark, config.root, "kept", version)),
            "followed": {"since_version": 1, "n_appended": 1, "cut": {}},
        }
    )
    with pytest.raises(CorpusError, match="rebuild kept@1"):
        versions._version_inputs(spark, config.root, "kept", version, followed)
