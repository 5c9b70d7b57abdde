"""The proxy of a score that can be read off the words, and of one that cannot; and all that follows from it."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs import proxy, refine, score
from miniplm_udf import schemas, storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.refine import CorpusConfig, RefineConfig, SelectConfig
from miniplm_udf.config.rules import in_sample
from miniplm_udf.config.sections import ProxyConfig
from miniplm_udf.corpora import takedown, versions
from miniplm_udf.corpora.export import ExportRequest, export
from miniplm_udf.corpora.inspection import MOST_ROWS, SIDES, Question, inspect
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.explorer.candidates import ROWS_PER_PAGE, ExploredCorpus, Filter
from miniplm_udf.proxy import features, fit, quality
from miniplm_udf.proxy.report import PoolRows
from miniplm_udf.scores.summary import ScoreSummary
from miniplm_udf.store import catalog, delta_log, proxy_records, tables
from miniplm_udf.store.takedowns import Takedown
from miniplm_udf.store.text_join import texts_of
from miniplm_udf.upkeep import verify
from tests.support.planted import PlantedFactory, planted, truth
from tests.support.score_tables import experiment, instance_id, two_models, write_instances

SAMPLE = 0.5
CORPORA = {
    "cheap": CorpusConfig(candidates="proxy_scores", select=SelectConfig(ratio=0.5)),
    "mixed": CorpusConfig(
        candidates="proxy_scores",
        score="coalesce(reference_nll_mean - teacher_nll_mean, prediction)",
        select=SelectConfig(ratio=0.3, by="tokens"),
    ),
}


def score_with_models(spark: Any, config: ExperimentConfig) -> ScoreSummary:
    return score.run(spark, config, {"teacher": PlantedFactory(True), "reference": PlantedFactory(False)})


def rows(spark: Any, config: ExperimentConfig, name: str) -> list[Any]:
    return list(tables.read(spark, config.layout.table(name)).collect())


def predictions(spark: Any, config: ExperimentConfig) -> dict[str, float]:
    return {row["instance_id"]: row["prediction"] for row in rows(spark, config, "proxy_scores")}


def wrong(spark: Any, config: ExperimentConfig) -> list[verify.Check]:
    return [check for check in verify.verify(spark, config.root) if not check.ok or check.behind]


@pytest.fixture(scope="module")
def made(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[ExperimentConfig, proxy.ProxySummary]:
    """A root of 360 instances of the pool, half of them scored by models, all of them by the proxy; and its summary."""
    folder = tmp_path_factory.mktemp("proxy")
    config = dataclasses.replace(
        experiment(folder / "root", two_models(folder), sample=SAMPLE),
        proxy=ProxyConfig(heldout=0.3, features=4096),
        refine=RefineConfig(corpora=CORPORA),
    )
    write_instances(spark, config, planted(360))
    write_instances(spark, config, planted(10, start=900), split="heldout")
    score_with_models(spark, config)
    return config, proxy.run(spark, config)


@pytest.fixture
def copied(made: tuple[ExperimentConfig, proxy.ProxySummary], tmp_path: Path) -> ExperimentConfig:
    """The same root again, for one test."""
    config, _ = made
    shutil.copytree(storage.local_path(config.root), tmp_path / "root")
    return dataclasses.replace(config, root=str(tmp_path / "root"))


def test_a_planted_difference_is_learnt_and_predicted_for_the_whole_pool(
    spark: Any, made: tuple[ExperimentConfig, proxy.ProxySummary]
) -> None:
    config, summary = made
    texts = {instance_id(text): text for text in planted(360)}
    sampled = {row[0] for row in spark.createDataFrame([(one,) for one in texts], "instance_id string")
               .where(in_sample(SAMPLE)).collect()}  # fmt: skip
    scored = {row["instance_id"]: row for row in rows(spark, config, "score_matrix")}
    assert scored.keys() == sampled
    assert 0.3 * len(texts) < len(sampled) < 0.7 * len(texts)

    found = rows(spark, config, "proxy_scores")
    assert sorted(row["instance_id"] for row in found) == sorted(texts)
    assert found[0].asDict().keys() == set(schemas.PROXY_SCORES.column_names)
    assert {row["proxy_revision"] for row in found} == {summary.revision}
    unscored = [row for row in found if row["instance_id"] not in sampled]
    judged = quality.judge(
        [row["instance_id"] for row in unscored],
        [truth(texts[row["instance_id"]]) for row in unscored],
        [row["prediction"] for row in unscored],
    )
    # The quality reported for held-out rows also holds for rows that no model has scored.
    assert min(judged.spearman, summary.heldout.spearman) > 0.8
    assert judged.top["0.5"].kept > 0.7
    assert summary.heldout.top["0.5"].kept > 0.7
    assert summary.warnings == []
    # In the score's own unit, though nearer the mean.
    errors = [row["prediction"] - truth(texts[row["instance_id"]]) for row in unscored]
    assert abs(float(np.mean(errors))) < 0.05
    tokens = [row["estimated_tokens"] / len(texts[row["instance_id"]].split()) for row in found]
    assert 0.9 < min(tokens) <= max(tokens) < 1.1

    assert summary.fitted_on["n_fitted"] + summary.fitted_on["n_heldout"] == len(sampled)
    assert summary.rows == PoolRows(pool=360, scored=len(sampled))
    assert summary.flops.models_on_scored < summary.flops.with_proxy
    assert storage.read_json(proxy_records.report_uri(config.root))["heldout"] == dataclasses.asdict(summary.heldout)
    assert wrong(spark, config) == []


@pytest.mark.long
def test_nothing_is_done_twice_and_what_is_new_is_predicted(
    spark: Any, copied: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, uri = predictions(spark, copied), copied.layout.table("proxy_scores")
    version, record = delta_log.newest_version(uri), proxy_records.read(copied.root)
    proxy.run(spark, copied)
    assert (delta_log.newest_version(uri), proxy_records.read(copied.root)) == (version, record)

    # Killed after the commit of a micro-batch, and before its query records it as finished.
    def killed(*given: Any) -> None:
        raise RuntimeError("killed")

    write_instances(spark, copied, planted(10, start=500), batch_id=1)
    with monkeypatch.context() as patched:
        patched.setattr(tables, "compact", killed)
        with pytest.raises(Exception, match="killed"):
            proxy.run(spark, copied)
    assert len(predictions(spark, copied)) == len(before) + 10
    proxy.run(spark, copied)
    assert len(rows(spark, copied, "proxy_scores")) == len(before) + 10
    assert before.items() <= predictions(spark, copied).items()
    # The models are behind, the proxy is not.
    assert {check.name.split(" of the pool")[0] for check in wrong(spark, copied)} == {"teacher: 0.5", "reference: 0.5"}

    # Another proxy, and then the first again: it is not fitted, and predicts what it predicted.
    other = dataclasses.replace(copied, proxy=ProxyConfig(heldout=0.2, features=4096))
    assert proxy.run(spark, other).revision != record.revision
    monkeypatch.setattr(fit, "_fit", killed)
    assert proxy.run(spark, copied).revision == record.revision
    assert before.items() <= predictions(spark, copied).items()


@pytest.mark.long
def test_the_same_rows_give_the_same_proxy(spark: Any, copied: ExperimentConfig) -> None:
    before, record = predictions(spark, copied), proxy_records.read(copied.root)
    assert record is not None
    # The record stays, and its coefficients are gone.
    for uri in (proxy_records.model_uri(copied.root, record.revision), storage.join(copied.root, "_checkpoints")):
        storage.remove_folder(uri)
    # In other files, in another order.
    for name in ("instances", "score_matrix"):
        frame = tables.read(spark, copied.layout.table(name)).repartition(3, "content_hash").localCheckpoint()
        frame.write.format("delta").mode("overwrite").save(copied.layout.table(name))
    again = proxy.run(spark, copied)
    assert (again.revision, again.heldout) == (record.revision, record.quality)
    assert predictions(spark, copied) == before


@pytest.mark.long
def test_a_score_that_words_do_not_tell_is_said_to_be_out_of_reach(
    spark: Any, copied: ExperimentConfig, caplog: pytest.LogCaptureFixture
) -> None:
    by_hash = "cast(conv(substring(md5(concat('x', instance_id)), 1, 8), 16, 10) as double)"
    blind = dataclasses.replace(copied, proxy=ProxyConfig(score=by_hash, heldout=0.4, features=4096))
    summary = proxy.run(spark, blind)
    assert abs(summary.heldout.spearman) < 3 * summary.heldout.spearman_error
    assert "worthless here" in summary.warnings[0]
    assert "worthless here" in caplog.text
    # Whoever refines by it is told, too.
    only = dataclasses.replace(blind.refine, corpora={"cheap": CORPORA["cheap"]})
    refined = refine.run(spark, dataclasses.replace(blind, refine=only)).refined["cheap"]
    assert any("worthless here" in note for note in refined.diagnostics["notes"])


@pytest.mark.long
def test_corpora_are_chosen_by_predictions_and_go_through_all_that_corpora_do(
    spark: Any, copied: ExperimentConfig
) -> None:
    summary = refine.run(spark, copied).refined
    found = rows(spark, copied, "proxy_scores")
    by_prediction = sorted(found, key=lambda row: (-row["prediction"], row["instance_id"]))
    cheap = rows(spark, copied, "refined/cheap")
    assert {row["instance_id"] for row in cheap} == {row["instance_id"] for row in by_prediction[:180]}
    assert summary["cheap"].n_candidates == 360
    assert summary["cheap"].threshold == by_prediction[179]["prediction"]
    texts = {instance_id(text): text for text in planted(360)}
    scored = {row["instance_id"] for row in rows(spark, copied, "score_matrix")}
    for row in rows(spark, copied, "refined/mixed"):
        true = truth(texts[row["instance_id"]])
        assert (row["score"] == pytest.approx(true, abs=1e-12)) is (row["instance_id"] in scored)
    assert all(one.skipped for one in refine.run(spark, copied).refined.values())
    kept = tables.read(spark, copied.layout.table("refined/cheap"))
    instances = tables.read(spark, copied.layout.table("instances"))
    assert texts_of(kept.select("instance_id"), instances, ["text"], 180).count() == 180
    assert {"proxy_scores", "cheap_text"} <= set(catalog.register_tables(spark, copied.root))

    # Models score more instances: corpora that use their scores are refined again, corpora that use predictions stay.
    versions.pin(spark, copied.root, "mixed")
    more = dataclasses.replace(copied, score=dataclasses.replace(copied.score, sample=0.6))
    score_with_models(spark, more)
    assert wrong(spark, more) == []
    assert versions.rebuild(spark, more, "mixed", dry_run=True).skipped
    again = refine.run(spark, more).refined
    assert {name: one.skipped for name, one in again.items()} == {"cheap": True, "mixed": False}

    gone = cheap[0]["instance_id"]
    document = next(row for row in rows(spark, copied, "instances") if row["instance_id"] == gone)["document_ids"][0]
    removed = takedown.take_down(spark, more, [document], Takedown("a test")).removed
    assert removed["proxy_scores"] == removed["refined/cheap"] == 1
    assert wrong(spark, more) == []


def explored(config: ExperimentConfig, name: str, folder: Path) -> dict[str, tuple[bool, float, float]]:
    """Whether each candidate was kept, its score and its distance to the cut, from all pages of `miniplm explore`."""
    corpus = ExploredCorpus(config, name, str(folder / f"{name}.duckdb"))
    shown = {}
    for side in SIDES:
        for page in range(-(-corpus.side(Filter(), side).n_matching // ROWS_PER_PAGE)):
            for row in corpus.side(Filter(page=page), side).rows:
                shown[row["instance_id"]] = (row["kept"], row["score"], row["cut_distance"])
    corpus.close()
    return shown


def inspected(spark: Any, config: ExperimentConfig, name: str) -> dict[str, tuple[bool, float, float]]:
    """The same from `miniplm inspect`."""
    answers = {side: inspect(spark, config.root, name, Question(side=side, n_rows=MOST_ROWS)) for side in SIDES}
    return {
        row["instance_id"]: (side == "kept", row["score"], row["cut_distance"])
        for side, answer in answers.items()
        for row in answer.rows
    }


def test_a_corpus_of_predictions_is_explored_inspected_and_exported(
    spark: Any, copied: ExperimentConfig, tmp_path: Path
) -> None:
    summary = refine.run(spark, copied)
    for name in CORPORA:
        exported = export(spark, copied, name, ExportRequest())
        assert (exported.n_instances, exported.n_candidates) == (summary.kept[name], 360)
        assert "teacher_nll_mean" not in exported.columns
        shown, expected = explored(copied, name, tmp_path), inspected(spark, copied, name)
        assert len(expected) == 360
        assert {key: row[0] for key, row in shown.items()} == {key: row[0] for key, row in expected.items()}
        assert all(row[1:] == pytest.approx(expected[key][1:], abs=1e-12) for key, row in shown.items())


@pytest.mark.long
def test_a_larger_sample_scores_only_what_it_has_more(spark: Any, copied: ExperimentConfig) -> None:
    before = {row["instance_id"] for row in rows(spark, copied, "score_matrix")}
    whole = dataclasses.replace(copied, score=dataclasses.replace(copied.score, sample=1.0))
    summary = score_with_models(spark, whole)
    assert summary.new_scored == {"teacher": 360 - len(before), "reference": 360 - len(before)}
    assert wrong(spark, whole) == []
    # A score that is lost is missed, whichever query should have made it.
    lost = min(before)
    spark.sql(f"DELETE FROM delta.`{whole.layout.table('scores')}` WHERE instance_id = '{lost}'")
    spark.sql(f"DELETE FROM delta.`{whole.layout.table('score_matrix')}` WHERE instance_id = '{lost}'")
    failed = {check.name: check.examples for check in verify.verify(spark, whole.root) if not check.ok}
    assert failed["teacher: pool = scored + rejected"] == (lost,)


def test_what_is_missing_is_named(spark: Any, copied: ExperimentConfig) -> None:
    with pytest.raises(ConfigError, match="expected the section of a proxy"):
        proxy.run(spark, dataclasses.replace(copied, proxy=None, refine=dataclasses.replace(copied.refine, corpora={})))
    few = dataclasses.replace(copied, proxy=ProxyConfig(rows=30))
    with pytest.raises(CorpusError, match="at least 20 scored instances to fit on and 20 held-out ones"):
        proxy.run(spark, few)
    with pytest.raises(ConfigError, match=r"proxy\.score: 'teacher_nll_maen' is no SQL"):
        proxy.run(spark, dataclasses.replace(copied, proxy=ProxyConfig(score="teacher_nll_maen")))
    storage.remove_folder(storage.join(copied.root, "proxy"))
    with pytest.raises(CorpusError, match=r"expected the record of the proxy .* run `miniplm proxy`"):
        refine.run(spark, copied)
    storage.remove_folder(copied.layout.table("proxy_scores"))
    with pytest.raises(CorpusError, match="run `miniplm proxy`"):
        refine.run(spark, copied)


def test_a_text_has_the_same_features_wherever_it_stands(spark: Any) -> None:
    texts = ["One word, one Word.", "", "東京は日本の首都", "\n\t ", "naïve café"]
    frame = spark.createDataFrame([(text, len(text.encode())) for text in texts], "text string, n_bytes bigint")
    both = [features.with_features(frame.coalesce(n), 64).collect() for n in (1, 2)]
    assert sorted(map(str, both[0])) == sorted(map(str, both[1]))
    by_bytes = {row["n_bytes"]: row for row in both[0]}
    # one, word, ",", "." and their pairs: one word, word ",", ", one", word "."
    assert by_bytes[len(texts[0])]["n_grams"] == 8
    # Eight signs, each by itself, and seven pairs.
    assert by_bytes[len(texts[2].encode())]["n_grams"] == 15
    assert by_bytes[len(texts[4].encode())]["n_grams"] == 3
    assert all(np.isfinite(row["features"].toArray()).all() for row in both[0])
    assert features.with_features(frame.where("false"), 64).collect() == []
