"""The score job: what is scored once is never scored again, whatever is added, lost or killed. Fake scorers."""

import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from delta.tables import DeltaTable

from jobs import score
from miniplm_udf import schemas, storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.sections import ModelConfig, ServerConfig
from miniplm_udf.errors import ConfigError, CorpusError, ModelLoadError, ScoringError
from miniplm_udf.lease import Lease
from miniplm_udf.scores import matrix
from miniplm_udf.scores import query as scores
from miniplm_udf.scores.models import describe_models, read_record
from miniplm_udf.scores.plan import ScoringPlan
from miniplm_udf.scores.summary import ScoreSummary
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.scoring.results import Score
from miniplm_udf.scoring.usage import ScorerUsage
from miniplm_udf.store import batch_range, delta_log, tables
from miniplm_udf.workers.arrow import score_arrow
from miniplm_udf.workers.messages import SCORED_DDL
from miniplm_udf.workers.remote import error_in_text
from miniplm_udf.workers.score_counts import ScoreCounts
from tests.support.completions_server import MODEL, CompletionsServer
from tests.support.score_tables import (
    FakeFactory,
    FakeScorer,
    experiment,
    fake_n_tokens,
    fake_nll,
    instance_id,
    model_config,
    scored_texts,
    texts,
    two_models,
    write_instances,
)
from tests.support.scoring_oracles import plain_model
from tests.support.tiny_models import make_model_folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelConfig]:
    folder = tmp_path_factory.mktemp("models")
    return {**two_models(folder), "third": model_config(make_model_folder(folder, name="third", seed=3))}


class Scored:
    """An experiment with fake scorers, and the log of what they scored."""

    scales: ClassVar[dict[str, float]] = {"teacher": 1.0, "reference": 2.0, "third": 3.0}

    def __init__(self, spark: Any, config: ExperimentConfig, log: Path) -> None:
        self.spark, self.config, self.log = spark, config, log

    def run(self, config: ExperimentConfig | None = None) -> ScoreSummary:
        used = config or self.config
        factories = {alias: FakeFactory(self.scales[alias], str(self.log)) for alias in used.scored_aliases}
        return score.run(self.spark, used, factories)

    def table(self, name: str) -> list[Any]:
        return list(self.spark.read.format("delta").load(self.config.layout.table(name)).collect())

    def with_models(self, models: dict[str, ModelConfig]) -> "Scored":
        return Scored(self.spark, experiment(Path(storage.local_path(self.config.root)), models), self.log)


@pytest.fixture
def scored(spark: Any, tmp_path: Path, models: dict[str, ModelConfig]) -> Scored:
    two = {alias: models[alias] for alias in ("teacher", "reference")}
    return Scored(spark, experiment(tmp_path / "root", two), tmp_path / "calls.log")


def keys(rows: list[Any]) -> list[tuple[str, str]]:
    return sorted((row["instance_id"], row["model_id"]) for row in rows)


def pairs(of: list[str], aliases: tuple[str, ...] = ("teacher", "reference")) -> list[tuple[str, str]]:
    return sorted((instance_id(text), alias) for text in of for alias in aliases)


@pytest.mark.long
def test_a_model_on_a_server_scores_beside_a_local_one(
    spark: Any, tmp_path: Path, models: dict[str, ModelConfig]
) -> None:
    """The same weights here and on the server: two revisions, and equal scores."""
    local = models["teacher"]
    with CompletionsServer(plain_model(Path(storage.local_path(str(local.path))))) as server:
        place = ServerConfig(url=server.url, model=MODEL, requests=2)
        served = dataclasses.replace(local, backend="openai", server=place)
        config = experiment(tmp_path / "root", {"teacher": served, "reference": local})
        write_instances(spark, config, texts(6))
        summary = score.run(spark, config)
    assert summary.scored == {"teacher": 6, "reference": 6}
    (rows, n_revisions), *_ = (
        tables.read(spark, config.layout.table("scores"))
        .selectExpr("count(*)", "count(distinct model_revision)")
        .collect()
    )
    assert (rows, n_revisions) == (12, 2)
    for row in tables.read(spark, config.layout.table("score_matrix")).collect():
        assert row["teacher_n_tokens"] == row["reference_n_tokens"]
        assert row["teacher_nll_mean"] == pytest.approx(row["reference_nll_mean"], abs=1e-5)
    # The same alias without the server: its record and its scores name no dtype that a model here could have.
    here = experiment(tmp_path / "root", {"teacher": dataclasses.replace(local, dtype="auto", context_tokens=16)})
    score.run(spark, here)
    scores = tables.read(spark, here.layout.table("scores")).where("model_id = 'teacher'")
    assert dict(scores.groupBy("dtype").count().collect()) == {"server": 6, "float32": 6}


def test_new_instances_models_and_lost_checkpoints_score_only_what_is_missing(
    scored: Scored, models: dict[str, ModelConfig]
) -> None:
    first, second, later = texts(5), texts(3, start=5), texts(2, start=20)
    write_instances(scored.spark, scored.config, first)
    write_instances(scored.spark, scored.config, texts(4, start=50), split="reference")
    write_instances(scored.spark, scored.config, texts(1, start=60), split="heldout")
    summary = scored.run()
    assert keys(scored.table("scores")) == pairs(first)
    for row in scored.table("scores"):
        text = next(text for text in first if instance_id(text) == row["instance_id"])
        assert row["nll_sum_nats"] == fake_nll(text, scored.scales[row["model_id"]])
        assert (row["n_tokens"], row["n_bytes"]) == (fake_n_tokens(text), len(text.encode()))
    assert summary.scored == summary.new_scored == {"teacher": 5, "reference": 5}
    assert summary.tokens["teacher"] == sum(map(fake_n_tokens, first))
    assert summary.tokens_per_second["teacher"] > 0
    assert summary.wait_share is None, "a slice or two: nothing to tell a steady state by"
    assert summary.rejected == 0
    assert summary.matrix_rows == 5
    assert summary.too_many_rejects is False

    again = scored.run()
    assert again.new_scored == {"teacher": 0, "reference": 0}
    assert again.tokens_per_second["teacher"] is None
    write_instances(scored.spark, scored.config, second)
    assert scored.run().new_scored == {"teacher": 3, "reference": 3}

    shutil.rmtree(storage.local_path(storage.join(scored.config.root, "_checkpoints")))
    write_instances(scored.spark, scored.config, later)
    lost = scored.run()
    assert lost.new_scored == {"teacher": 2, "reference": 2}
    assert lost.matrix_rows == 10

    grown = scored.with_models(models).run()
    assert grown.new_scored == {"teacher": 0, "reference": 0, "third": 10}
    assert grown.matrix_rows == 10
    everything = first + second + later
    assert keys(scored.table("scores")) == pairs(everything, ("teacher", "reference", "third"))
    # Each text went through each scorer once, in all these runs.
    for scale in scored.scales.values():
        assert scored_texts(scored.log, scale) == sorted(text[:40] for text in everything)
    # Back to two models: the matrix has their columns again, nothing is scored.
    assert scored.run().matrix_rows == 10
    aliases = ["teacher", "reference"]
    found = scored.spark.read.format("delta").load(scored.config.layout.table("score_matrix"))
    assert found.columns == schemas.score_matrix(aliases).column_names
    assert found.count() == 10
    # None of them read the table that it went to: another driver's commit would have been in conflict.
    for name in ("scores", "score_matrix"):
        history = DeltaTable.forPath(scored.spark, scored.config.layout.table(name)).history()
        appends = history.where("operation = 'WRITE' AND operationParameters['mode'] = 'Append'").collect()
        assert appends
        assert all(row["isBlindAppend"] for row in appends)


def test_a_bad_score_is_a_reject_and_nowhere_else(scored: Scored) -> None:
    good, bad = texts(3), ["nan one two", "inf one two", "fail one two"]
    write_instances(scored.spark, scored.config, good + bad)
    summary = scored.run()
    assert keys(scored.table("scores")) == pairs(good)
    assert sorted(row["instance_id"] for row in scored.table("score_matrix")) == sorted(map(instance_id, good))
    assert summary.rejected == 6
    assert summary.too_many_rejects is True
    revisions = {row["model_revision"] for row in scored.table("scores")}
    rejects = scored.table("rejects")
    assert {(row["instance_id"], row["stage"], row["reason"]) for row in rejects} == {
        (instance_id(text), f"score:{revision}", reason)
        for text, reason in zip(bad, ["nan_score", "nan_score", "no_tokens"], strict=True)
        for revision in revisions
    }
    assert len({row["reject_id"] for row in rejects}) == 6
    # Not tried again, neither on the same checkpoint nor without one.
    shutil.rmtree(storage.local_path(storage.join(scored.config.root, "_checkpoints")))
    assert scored.run().rejected == 6
    assert len(scored_texts(scored.log, 1.0)) == 6


def plan_of(scored: Scored, models: tuple[ModelDescription, ...] | None = None) -> ScoringPlan:
    config = scored.config
    return ScoringPlan(
        models=models or tuple(read_record(config, alias) for alias in config.scored_aliases),
        factories={alias: FakeFactory(scored.scales[alias], str(scored.log)) for alias in config.scored_aliases},
        instances_uri=config.layout.table("instances"),
        scores_uri=config.layout.table("scores"),
        rejects_uri=config.layout.table("rejects"),
        workers=2,
        workers_per_gpu=1,
        run_id="r",
    )


def test_a_replayed_micro_batch_scores_nothing_and_rejects_what_has_no_row(scored: Scored) -> None:
    write_instances(scored.spark, scored.config, texts(2))
    scored.run()
    more = [*texts(3, start=10), "fail again"]
    write_instances(scored.spark, scored.config, more, batch_id=1)
    batch = scores.pool(
        scored.spark.read.format("delta").load(scored.config.layout.table("instances")).where("batch_id = 1")
    )
    plan, total = plan_of(scored), scores.new_score_counts(scored.spark)
    query_id = "a" * 32
    tables_before = scored.table("rejects")
    counts = scores.score_batch(plan, query_id, batch, 7, total).models
    assert {alias: (c.n_scored, c.n_failed) for alias, c in counts.items()} == {"teacher": (3, 1), "reference": (3, 1)}
    n_calls, rows = len(scored_texts(scored.log, 1.0)), scored.table("scores")
    # As after a kill between the commit of scores and that of rejects.
    scored.spark.sql(f"DELETE FROM delta.`{scored.config.layout.table('rejects')}`")
    assert scores.score_batch(plan, query_id, batch, 7, total) == ScoreCounts()
    assert len(scored_texts(scored.log, 1.0)) == n_calls
    assert sorted(scored.table("scores")) == sorted(rows)
    assert tables_before == []
    # An empty micro-batch works as well.
    assert scores.score_batch(plan, query_id, batch.where("false"), 8, total) == ScoreCounts()


def in_batches(scored: Scored, n_batches: int, first: int = 0) -> None:
    """Writes instances as so many micro-batches of ingest: number n has the texts 2 n and 2 n + 1."""
    for number in range(n_batches):
        write_instances(scored.spark, scored.config, texts(2, start=2 * number), batch_id=first + number)


@pytest.mark.long
def test_a_look_for_what_is_known_opens_what_came_with_it(scored: Scored) -> None:
    for number in range(3):
        write_instances(scored.spark, scored.config, texts(2, start=2 * number), batch_id=number)
        scored.run()
    places = scored.config.layout.table("scores"), scored.config.layout.table("instances")
    found = scored.spark.read.format("delta").load(places[0])
    batch = scores.pool(scored.spark.read.format("delta").load(places[1]).where("batch_id = 1"))
    near = found.where(batch_range.condition(batch, *places))
    assert {row["instance_batch_id"] for row in near.collect()} == {1}
    assert 0 < len(near.inputFiles()) < len(found.inputFiles())
    assert not found.where(batch_range.condition(batch.where("false"), *places)).inputFiles()
    known = scores._known(plan_of(scored), "n" * 32, batch)
    assert known is not None
    assert sorted(row[0] for row in known.collect()) == sorted(2 * [instance_id(text) for text in texts(2, start=2)])


@pytest.mark.long
def test_instances_that_were_made_again_are_not_scored_again(scored: Scored) -> None:
    """Under other numbers than their scores have: a look must not go by the numbers then."""
    in_batches(scored, 3)
    assert scored.run().matrix_rows == 6
    for name in ("tables/instances", "_checkpoints"):
        shutil.rmtree(storage.local_path(storage.join(scored.config.root, name)))
    in_batches(scored, 4, first=50)
    again = scored.run()
    assert again.new_scored == {"teacher": 2, "reference": 2}
    assert again.matrix_rows == 8
    assert keys(scored.table("scores")) == pairs(texts(8))


def test_looks_end_with_the_instances_that_were_there_at_the_start(scored: Scored) -> None:
    in_batches(scored, 3)
    checkpoint = storage.join(scored.config.root, "_checkpoints", "looks")
    instances = scored.config.layout.table("instances")
    start, seen = scores._BatchHistory(), []
    start.begin(int(delta_log.newest_version(instances) or 0))

    def run() -> None:
        def take(batch: Any, batch_id: int) -> None:
            start.update(checkpoint, batch_id)
            seen.append((sorted({row["batch_id"] for row in batch.collect()}), start.may_be_known))

        stream = scored.spark.readStream.format("delta").option("maxFilesPerTrigger", 1).load(instances)
        writer = stream.writeStream.foreachBatch(take).option("checkpointLocation", checkpoint)
        writer.trigger(availableNow=True).start().awaitTermination()

    run()
    in_batches(scored, 2, first=7)
    run()
    by_batch = {batch[0]: known for batch, known in seen if batch}
    assert by_batch == {0: True, 1: True, 2: True, 7: False, 8: False}
    # A start looks again: the instances of batch 8 may have been taken by another query meanwhile.
    start.begin(int(delta_log.newest_version(instances) or 0))
    assert start.may_be_known
    in_batches(scored, 1, first=9)
    run()
    assert seen[-1] == ([9], False)


def test_a_model_is_scored_by_one_driver_at_a_time(scored: Scored) -> None:
    write_instances(scored.spark, scored.config, texts(1))
    scored.run()
    revision = scored.table("scores")[0]["model_revision"]
    with (
        Lease(scored.config.layout.lease(f"model-{revision}"), "another set of models"),
        pytest.raises(CorpusError, match="is run by process"),
    ):
        scored.run()


@pytest.mark.long
def test_a_replay_rejects_under_the_reason_not_scored(scored: Scored) -> None:
    write_instances(scored.spark, scored.config, [*texts(1), "fail once"])
    scored.run()
    batch = scores.pool(scored.spark.read.format("delta").load(scored.config.layout.table("instances")))
    query_id = scored.table("scores")[0]["query_id"]
    before = {row["reject_id"] for row in scored.table("rejects")}
    # Looking for what other queries scored opens no file of this one: Delta's statistics tell a 32-character id whole.
    found = scored.spark.read.format("delta").load(scored.config.layout.table("scores"))
    assert found.where(found["query_id"] == query_id).inputFiles()
    assert not found.where(found["query_id"] != query_id).inputFiles()
    # As after a kill between the commits of scores and of rejects: a table without rows of this micro-batch.
    plan = dataclasses.replace(plan_of(scored), rejects_uri=scored.config.layout.table("second_rejects"))
    tables.create(scored.spark, plan.rejects_uri, schemas.REJECTS)
    assert scores.score_batch(plan, query_id, batch, 0, scores.new_score_counts(scored.spark)) == ScoreCounts()
    after = scored.table("second_rejects")
    assert {row["reason"] for row in after} == {"not_scored"}
    assert {row["reject_id"] for row in after} == before


def test_a_commit_without_rows_that_is_tried_again_loses_no_instance(scored: Scored) -> None:
    """All texts failed, the empty commit was made, then a kill; Delta drops the second run's write, unread."""
    write_instances(scored.spark, scored.config, ["fail one", "fail two"])
    instances = scored.spark.read.format("delta").load(scored.config.layout.table("instances"))
    models = (describe_models(scored.spark, scored.config, scored.config.models)["teacher"],)
    plan = dataclasses.replace(plan_of(scored, models), factories={"teacher": FakeFactory(1.0, str(scored.log))})
    for uri, table in ((plan.scores_uri, schemas.SCORES), (plan.rejects_uri, schemas.REJECTS)):
        tables.create(scored.spark, uri, table)
    total = scores.new_score_counts(scored.spark)
    assert scores.score_batch(plan, "b" * 32, scores.pool(instances), 4, total).models["teacher"].n_failed == 2
    assert {row["reason"] for row in scored.table("rejects")} == {"no_tokens"}
    # As if killed before the commit of rejects: a table without rows of this micro-batch.
    second_rejects = scored.config.layout.table("second_rejects")
    tables.create(scored.spark, second_rejects, schemas.REJECTS)
    factories = {"teacher": LenientFactory(1.0, str(scored.log))}
    again = dataclasses.replace(plan, factories=factories, rejects_uri=second_rejects)
    assert scores.score_batch(again, "b" * 32, scores.pool(instances), 4, total) == ScoreCounts()
    assert scored.table("scores") == []
    rejects = scored.table("second_rejects")
    assert sorted(row["instance_id"] for row in rejects) == sorted(map(instance_id, ["fail one", "fail two"]))
    assert {row["reason"] for row in rejects} == {"not_scored"}


@dataclasses.dataclass(frozen=True)
class LenientFactory(FakeFactory):
    """Makes a scorer that refuses nothing."""

    @property
    def key(self) -> str:
        return f"lenient/{self.log}"

    def __call__(self) -> FakeScorer:
        scorer = FakeScorer(self.scale, self.log)
        score_all = scorer.score
        scorer.score = lambda texts, *rest: score_all([str(text).upper() for text in texts], *rest)  # type: ignore[method-assign]
        return scorer


@dataclasses.dataclass(frozen=True)
class StatingFactory(FakeFactory):
    """Makes a scorer that states a token budget.

    Attributes:
        budget: the budget that its search found; None if it did not search.
    """

    budget: int | None = None

    @property
    def key(self) -> str:
        return f"stating/{self.log}/{self.budget}"

    def __call__(self) -> FakeScorer:
        scorer = FakeScorer(self.scale, self.log)

        def usage() -> ScorerUsage:
            return ScorerUsage("chip/float32", self.budget, None, None, None, None)

        scorer.usage = usage  # type: ignore[attr-defined]
        return scorer


@pytest.mark.long
def test_token_budgets_are_kept_in_the_models_records(scored: Scored) -> None:
    config = scored.config
    record = config.layout.model_record

    def kept_after(budget: int | None) -> Any:
        factories = {
            "teacher": StatingFactory(1.0, str(scored.log), budget), "reference": FakeFactory(2.0, str(scored.log)),
        }  # fmt: skip
        score.run(scored.spark, config, factories)
        return storage.read_json(record("teacher")).get("tokens_per_batch")

    write_instances(scored.spark, config, texts(3))
    assert kept_after(None) is None
    write_instances(scored.spark, config, texts(2, start=3))
    assert kept_after(1000) == {"chip/float32": 1000}
    # The next jobs describe the model again and keep what was found.
    write_instances(scored.spark, config, texts(2, start=5))
    assert kept_after(None) == {"chip/float32": 1000}
    assert kept_after(500) == {"chip/float32": 1000}, "nothing was scored"
    assert "tokens_per_batch" not in storage.read_json(record("reference"))


class BareScorer:
    """Scores by length; refuses a text, or takes its time."""

    tokenizer_hash, slice_bytes = "bytes", 4000

    def tokenize(self, texts: Sequence[str | None], segment_ends: Sequence[Sequence[int]]) -> list[Any]:
        if any(text == "refused" for text in texts):
            raise ScoringError("the text is refused")
        return [str(text).encode() for text in texts]

    def score_tokenized(self, tokenized: Sequence[Any], ends_document: Sequence[bool]) -> list[Any]:
        return [Score(float(sum(raw)), len(raw), len(raw)) for raw in tokenized]

    def score(self, texts: Any, segment_ends: Any, ends_document: Any) -> list[Any]:
        return self.score_tokenized(self.tokenize(texts, segment_ends), ends_document)


@pytest.mark.long
def test_sparks_batches_are_read_in_another_thread(spark: Any) -> None:
    """Twenty batches a task, on workers that are used again; a consumer that stops early; an error in the thread."""
    from pyspark.errors import PySparkException
    from pyspark.sql import functions as F

    def scored_lengths(n: int, text: Any, total: Any = None) -> Any:
        rows = spark.range(0, n, 1, 2).select(
            F.col("id").cast("string").alias("instance_id"), text.alias("text"),
            F.array().cast("array<int>").alias("segment_ends"), F.lit(True).alias("ends_document"),
            F.array(F.lit("a"), F.lit("b")).alias("model_ids"),
        )  # fmt: skip
        factories = {"a": BareScorer, "b": BareScorer}
        return rows.mapInArrow(score_arrow(factories, sink=total), SCORED_DDL)

    text = F.repeat(F.col("id").cast("string"), 20)
    total = scores.new_score_counts(spark)
    for _ in range(3):
        total.value = ScoreCounts()
        found = scored_lengths(40_000, text, total).collect()
        assert len(found) == 80_000
        assert all(row["nll_sum_nats"] == 20 * sum(row["instance_id"].encode()) for row in found)
        assert {alias: counts.n_scored for alias, counts in total.value.models.items()} == {"a": 40_000, "b": 40_000}
        assert 0 < total.value.wait_share < 1
        assert len(scored_lengths(1_000_000, text).limit(5).collect()) == 5
        late = F.when(F.col("id") == 9_000, F.lit("refused")).otherwise(text)
        with pytest.raises(PySparkException) as caught:
            scored_lengths(10_000, late).collect()
        assert isinstance(error_in_text(caught.value), ScoringError)


def test_nothing_to_score_is_an_error(scored: Scored) -> None:
    with pytest.raises(CorpusError, match="miniplm ingest"):
        scored.run()
    write_instances(scored.spark, scored.config, texts(2), split="heldout")
    with pytest.raises(CorpusError, match="pool"):
        scored.run()
    write_instances(scored.spark, scored.config, texts(1, start=9))
    assert scored.run().scored == {"teacher": 1, "reference": 1}


def test_models_that_are_not_there(spark: Any, tmp_path: Path, models: dict[str, ModelConfig]) -> None:
    config = experiment(tmp_path / "root", {"teacher": model_config(tmp_path / "nowhere")})
    write_instances(spark, config, texts(1))
    with pytest.raises(ModelLoadError, match="nowhere"):
        score.run(spark, config)
    from miniplm_udf.config.training import ReferenceConfig

    untrained = ExperimentConfig(
        root=str(tmp_path / "root"), models={"teacher": models["teacher"], "ref": ModelConfig()},
        reference=ReferenceConfig(alias="ref"),
    )  # fmt: skip
    with pytest.raises(ModelLoadError, match="miniplm reference"):
        score.run(spark, untrained)
    long = experiment(tmp_path / "root", {"teacher": ModelConfig(path=models["teacher"].path, context_tokens=4096)})
    with pytest.raises(ConfigError, match="4096"):
        score.run(spark, long)


@pytest.mark.long
def test_two_aliases_of_one_model_are_scored_once(scored: Scored, models: dict[str, ModelConfig]) -> None:
    same = scored.with_models({"teacher": models["teacher"], "reference": models["teacher"]})
    write_instances(scored.spark, scored.config, texts(2))
    assert same.run().scored == {"teacher": 2, "reference": 2}
    assert len(same.table("scores")) == 2
    assert all(row["teacher_nll_mean"] == row["reference_nll_mean"] for row in same.table("score_matrix"))


@pytest.mark.long
def test_real_models_score_as_a_plain_forward_pass(spark: Any, tmp_path: Path, models: dict[str, ModelConfig]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from miniplm_udf.scoring.tokenizer import load_tokenizer

    config = experiment(tmp_path / "root", {"teacher": models["teacher"]})
    text = "the quick brown fox, é and more"
    write_instances(spark, config, [text])
    score.run(spark, config)
    row = spark.read.format("delta").load(config.layout.table("scores")).collect()[0]
    folder = Path(str(models["teacher"].path))
    tokenizer = load_tokenizer(folder)
    ids = [*tokenizer.encode(text, add_special_tokens=False).ids, tokenizer.token_to_id("<|endoftext|>")]
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits.float()
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(ids[1:]), reduction="sum").item()
    assert row["n_tokens"] == len(ids) - 1
    assert math.isclose(row["nll_sum_nats"], expected, abs_tol=1e-4 * len(ids))
    record = storage.read_json(config.layout.model("teacher.json"))
    assert record["model_revision"] == row["model_revision"]
    assert record["dtype"] == row["dtype"]
    # The dtype is settled, also where the record is gone.
    spark.sql(f"UPDATE delta.`{config.layout.table('scores')}` SET dtype = 'bfloat16'")
    storage.remove_folder(config.layout.model("teacher.json"))
    assert describe_models(spark, config, config.models)["teacher"].dtype == "bfloat16"


def test_the_checkpoints_belong_to_sets_of_models() -> None:
    assert matrix.checkpoint_name({"a": "1", "b": "2"}) != matrix.checkpoint_name({"b": "2", "a": "1"})
