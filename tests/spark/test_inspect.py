"""Looking at what a version kept and dropped: which rows, in which order, with which scores and texts."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jobs import cli, inspect_corpus, session
from jobs import refine as job
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.refine import CorpusConfig, SelectConfig
from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.corpora import versions
from miniplm_udf.corpora.inspection import Question, cut_distance, inspect
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.store import corpus_records, tables
from tests.support.matrices import (
    ALIASES,
    DIFFERENCE,
    TEXTS,
    candidates,
    rows_of_matrix,
    with_corpora,
    write_matrix,
    write_record,
)
from tests.support.score_tables import experiment, write_instances

CONF = Path(__file__).resolve().parents[2] / "conf"
ALL = 1000
# The candidate without a score.
NAN = rows_of_matrix().index({key: value for key, value in candidates()[0].items() if key != "score"})


@pytest.fixture(scope="module")
def config(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    """A root with a matrix of 300 rows, their instances, and corpora that keep half of the candidates."""
    root = tmp_path_factory.mktemp("inspect") / "root"
    made = with_corpora(
        experiment(root, {alias: ModelConfig(path="/nowhere") for alias in ALIASES}),
        half=CorpusConfig(score=DIFFERENCE, select=SelectConfig(ratio=0.5)),
        sources=CorpusConfig(score=DIFFERENCE, select=SelectConfig(ratio=0.3, per_source="same")),
        middle=CorpusConfig(score=DIFFERENCE, select=SelectConfig(rule="band", low=0.3, high=0.6)),
    )
    rows = rows_of_matrix()
    rows[NAN]["teacher_nll_mean"] = float("nan")
    write_matrix(spark, made, rows)
    write_instances(spark, made, TEXTS)
    for alias in ALIASES:
        write_record(made, alias)
    job.run(spark, made)
    return made


NAN = next(
    number for number, row in enumerate(rows_of_matrix()) if row["split"] == "pool" and row["teacher_n_tokens"] >= 32
)


def scores() -> dict[str, float | None]:
    """The scores of all candidates, by id."""
    without = rows_of_matrix()[NAN]["instance_id"]
    return {row["instance_id"]: None if row["instance_id"] == without else row["score"] for row in candidates()}


def kept_ids() -> set[str]:
    ranked = sorted((-score, name) for name, score in scores().items() if score is not None)
    return {name for _, name in ranked[: len(scores()) // 2]}


def asked(spark: Any, config: ExperimentConfig, address: str = "half", **question: Any) -> dict[str, Any]:
    return dataclasses.asdict(inspect(spark, config.root, address, Question(**question)))


def names(found: dict[str, Any]) -> list[str]:
    return [row["instance_id"] for row in found["rows"]]


def test_the_two_sides_are_all_candidates(spark: Any, config: ExperimentConfig) -> None:
    kept = asked(spark, config, n_rows=ALL, n_characters=9)
    dropped = asked(spark, config, side="dropped", n_rows=ALL)
    assert set(names(kept)) == kept_ids()
    assert set(names(dropped)) == scores().keys() - kept_ids()
    assert len(kept["rows"]) == kept["n_matching"] == len(kept_ids())
    threshold = min(scores()[name] for name in kept_ids())  # type: ignore[type-var]
    of_text = dict(zip((row["instance_id"] for row in rows_of_matrix()), TEXTS, strict=True))
    for row in [*kept["rows"], *dropped["rows"]]:
        score = scores()[row["instance_id"]]
        assert row["score"] == score
        assert row["cut_distance"] == (None if score is None else score - threshold)
        assert row["document_ids"] == [of_text[row["instance_id"]][:20]]
        assert row["text"] == of_text[row["instance_id"]][: 9 if row["instance_id"] in kept_ids() else 400]
        assert row["is_cut"] == (row["instance_id"] in kept_ids())
    assert (kept["version"], kept["threshold"]) == ("half@1", threshold)


def test_rows_near_the_cut_come_first(spark: Any, config: ExperimentConfig) -> None:
    threshold = min(scores()[name] for name in kept_ids())  # type: ignore[type-var]
    finite = {name: score for name, score in scores().items() if score is not None and name not in kept_ids()}
    order = sorted(finite, key=lambda name: (abs(finite[name] - threshold), name))
    assert names(asked(spark, config, side="dropped", order="near_cut", n_rows=7)) == order[:7]
    assert names(asked(spark, config, side="dropped", order="near_cut", n_rows=ALL)) == order


@pytest.mark.parametrize("side", ["kept", "dropped"])
@pytest.mark.parametrize(("order", "sign"), [("highest", -1), ("lowest", 1)])
def test_rows_with_the_highest_or_the_lowest_scores_come_first(
    spark: Any, config: ExperimentConfig, side: Any, order: str, sign: int
) -> None:
    finite = {
        name: score
        for name, score in scores().items()
        if score is not None and (name in kept_ids()) == (side == "kept")
    }
    expected = sorted(finite, key=lambda name: (sign * finite[name], name))
    answer = asked(spark, config, side=side, order=order, n_rows=len(expected) - 1)
    assert names(answer) == expected[:-1]
    # The row without a finite score is not counted.
    assert (answer["order"], answer["n_matching"]) == (f"{order} score first", len(expected))


@pytest.mark.long
def test_a_sample_is_the_seeds(spark: Any, config: ExperimentConfig) -> None:
    first, again, other = (names(asked(spark, config, n_rows=8, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert first != sorted(first)
    assert len(set(first)) == len(first) == 8


def test_conditions_are_over_what_is_shown_and_the_instances(spark: Any, config: ExperimentConfig) -> None:
    web = {row["instance_id"] for row in rows_of_matrix() if row["source"] == "web"}
    ending = {row["instance_id"] for row, text in zip(rows_of_matrix(), TEXTS, strict=True) if "7 of" in text}
    found = asked(spark, config, source="web", sql="cut_distance > 0.5", n_rows=ALL)
    threshold = min(scores()[name] for name in kept_ids())  # type: ignore[type-var]
    assert set(names(found)) == {name for name in kept_ids() & web if scores()[name] - threshold > 0.5}  # type: ignore[operator]
    for side, ids in (("kept", kept_ids()), ("dropped", scores().keys() - kept_ids())):
        found = asked(spark, config, side=side, sql="text like '%7 of%' and score is not null", n_rows=ALL)
        assert set(names(found)) == ids & ending
        assert found["n_matching"] == len(names(found)) > 3
    for sql, message in (
        (
            "scoer > 1",
            r"--sql: 'scoer > 1' is no SQL over the columns shown, the annotations and the instances' own .*"
            r"columns are .*text.*cut_distance",
        ),
        ("score +", "--sql: 'score \\+' is no SQL"),
        ("score", "expected a condition"),
        ("score > (select 1)", "a subquery"),
        ("rand() > 0.5", "depends on the time"),
    ):
        with pytest.raises(ConfigError, match=message):
            asked(spark, config, sql=sql)
    with pytest.raises(CorpusError, match=r"half@1: expected kept rows of source 'no' and where score > 9, found none"):
        asked(spark, config, source="no", sql="score > 9")


def test_distances_are_from_the_nearest_cut(spark: Any, config: ExperimentConfig) -> None:
    """A band has two cuts, and a quota one a source."""
    for name in ("middle", "sources"):
        known = corpus_records.provenance_of(spark, config.root, name, 1)
        rows = (
            corpus_records.read_corpus(spark, config.root, name).withColumn("distance", cut_distance(known)).collect()
        )
        assert len(rows) > 10
        for row in rows:
            of = known.cuts["all sources" if name == "middle" else row["source"]]
            distances = [row["score"] - of[key][0] for key in ("down_to", "below") if key in of]
            assert len(distances) == (2 if name == "middle" else 1)
            assert row["distance"] == min(distances, key=abs)
    found = asked(spark, config, "middle", side="dropped", order="near_cut", n_rows=ALL)
    assert {row["cut_distance"] > 0 for row in found["rows"] if row["cut_distance"]} == {True, False}


@pytest.mark.long
def test_candidates_of_a_followed_version_are_known_too(spark: Any, config: ExperimentConfig) -> None:
    known = corpus_records.provenance_of(spark, config.root, "half", 1)
    followed = corpus_records.Provenance(**{**vars(known), "followed": {"since_version": 1}, "cuts": {}})
    _, _, rows = versions.recorded_candidates(spark, config.root, "half", 1, followed)
    assert {row[0] for row in rows.select("instance_id").collect()} == scores().keys()


def test_the_command_shows_rows_or_prints_json(
    spark: Any, config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(spark, "stop", lambda: None)
    monkeypatch.setattr(session, "make_session", lambda config, name: spark)
    given = ["half", "-c", str(CONF / "demo.yaml"), f"root={config.root}", "--side", "dropped", "-n", "3"]
    assert cli.main(["inspect", *given, "--near-cut"]) == 0
    shown = capsys.readouterr().out
    # All but the one whose score is no number.
    assert shown.startswith(
        f"half@1, dropped: 3 of {len(scores()) - len(kept_ids()) - 1} rows, nearest to the cut; threshold "
    )
    assert shown.count("   | text ") == 3
    assert "\x1b" not in shown
    assert cli.main(["inspect", *given, "--highest"]) == 0
    assert " rows, highest score first; threshold " in capsys.readouterr().out
    assert cli.main(["inspect", *given, "--json", "--sql", "score is null or isnan(score)"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["score"], row["instance_id"]) == (None, rows_of_matrix()[NAN]["instance_id"])
    assert cli.main(["inspect", *given, "--source", "nowhere"]) == 1
    assert "CorpusError: half@1: expected dropped rows of source 'nowhere'" in capsys.readouterr().err


def test_what_an_instance_is_not_there_for_is_shown_without(spark: Any, config: ExperimentConfig) -> None:
    (row,) = asked(spark, config, n_rows=1)["rows"]
    gone = spark.createDataFrame([(row["instance_id"],)], "instance_id string")
    tables.delete_matching(spark, config.layout.table("instances"), gone)
    (again,) = asked(spark, config, n_rows=1)["rows"]
    assert (again["instance_id"], again["text"]) == (row["instance_id"], None)
    assert "(no such instance)" in inspect_corpus.text(asked(spark, config, n_rows=1))
