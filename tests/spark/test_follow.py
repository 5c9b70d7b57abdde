"""Following: counts and cuts against a plain sort, replays, a full refinement in between, two writers, the service."""

import dataclasses
import hashlib
import json
import math
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from jobs import refine as job
from miniplm_udf import schemas, storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.refine import CorpusConfig, SelectConfig
from miniplm_udf.config.sections import ModelConfig, StreamConfig
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.refinement import cuts, fingerprints, refine
from miniplm_udf.refinement.follow import Follower
from miniplm_udf.refinement.selection import UNUSABLE, budget_of
from miniplm_udf.store import corpus_records, tables
from miniplm_udf.streams import status as statuses
from tests.support.matrices import ALIASES, DIFFERENCE, ids, with_corpora, write_record
from tests.support.score_tables import experiment
from tests.support.selection_oracles import by_sorting
from tests.support.services import Service, until

QUERY = "q" * 32
HALF = CorpusConfig(score=DIFFERENCE, select=SelectConfig(ratio=0.5))
Rows = list[dict[str, Any]]


def matrix_rows(n: int, batch_id: int, query_id: str = QUERY, shift: float = 0.0) -> Rows:
    """Matrix rows of one micro-batch: other ones for each, short instances and other splits among them."""
    rng = random.Random(batch_id)
    rows = []
    for number in range(n):
        row: dict[str, Any] = {
            "instance_id": hashlib.md5(f"{query_id}/{batch_id}/{number}".encode()).hexdigest(),
            "source": rng.choice(["web", "code"]), "n_bytes": rng.randint(100, 4000), "content_hash": "c",
            "split": "heldout" if number % 10 == 9 else "pool",
            "instance_batch_id": 0, "query_id": query_id, "batch_id": batch_id,
        }  # fmt: skip
        n_tokens = rng.randint(20, 300)
        for alias, mean in (("teacher", rng.gauss(3.0, 0.5)), ("reference", rng.gauss(3.2 + shift, 0.5))):
            row |= {
                f"{alias}_nll_mean": mean, f"{alias}_nll_sum_nats": mean * n_tokens, f"{alias}_n_tokens": n_tokens,
                f"{alias}_bits_per_byte": mean / 3 if number % 7 else None, f"{alias}_revision": f"rev-{alias}",
            }  # fmt: skip
        rows.append(row)
    return rows


def write_batch(spark: Any, config: ExperimentConfig, rows: Rows, replaces: bool = False) -> None:
    """One commit of the matrix, as its query makes them."""
    table = schemas.score_matrix(ALIASES)
    frame = spark.createDataFrame([tuple(row[c] for c in table.column_names) for row in rows], table.spark_schema())
    write = tables.overwrite if replaces else tables.append
    query_id, batch_id = rows[0]["query_id"], rows[0]["batch_id"]
    write(frame, config.layout.table("score_matrix"), table, query_id=query_id, batch_id=batch_id)


def ranked(rows: Rows) -> list[tuple[float, str, int]]:
    return [
        (row["reference_nll_mean"] - row["teacher_nll_mean"], row["instance_id"], row["teacher_n_tokens"])
        for row in rows
        if row["split"] == "pool" and row["teacher_n_tokens"] >= 32
    ]


def bucket_of(score: float) -> int:
    return math.floor(math.copysign(math.log1p(abs(score) * 1000) * 1024, score))


def take(follower: Follower, batch: Any) -> None:
    """Gives rows of the matrix to a follower, as a micro-batch of its stream."""
    follower.micro_batch(batch, "", 0)


class FollowedRoot:
    """A root with a matrix of one micro-batch, and a corpus `half` that is followed by hand."""

    def __init__(self, spark: Any, root: Path, corpus: CorpusConfig = HALF) -> None:
        self.spark = spark
        made = experiment(root, {alias: ModelConfig(path="/nowhere") for alias in ALIASES})
        self.config = with_corpora(made, half=corpus)
        self.rows: Rows = []
        for alias in ALIASES:
            write_record(self.config, alias)
        self.uri = self.config.layout.refined("half")
        self.cuts_uri = self.config.layout.cuts("half")

    def score(self, n: int, shift: float = 0.0, query_id: str = QUERY) -> int:
        """Adds a micro-batch to the matrix, and returns its number."""
        batch_id = self.rows[-1]["batch_id"] + 1 if self.rows else 0
        rows = matrix_rows(n, batch_id, query_id, shift)
        self.rows += rows
        write_batch(self.spark, self.config, rows)
        return batch_id

    def follower(self) -> Follower:
        made = Follower(self.spark, self.config, "half")
        made.source()
        return made

    def batch(self, *batch_ids: int) -> Any:
        matrix = tables.read(self.spark, self.config.layout.table("score_matrix"))
        return matrix.where(matrix.batch_id.isin(list(batch_ids)))

    def newest(self) -> corpus_records.Newest:
        found = corpus_records.newest(self.uri)
        assert found is not None
        return found

    def provenance(self) -> corpus_records.Provenance:
        found = self.newest().provenance
        assert found is not None
        return found

    def has_counts(self) -> bool:
        """Whether anything is counted yet: the table is made first, by a commit of its own."""
        found = corpus_records.newest(self.cuts_uri)
        return found is not None and found.metadata is not None

    def cut(self) -> dict[str, Any]:
        found = corpus_records.newest(self.cuts_uri)
        assert found is not None
        assert found.metadata is not None
        return dict(found.metadata["cut"])

    def kept(self) -> list[str]:
        """Ids of the newest version, each once."""
        found = ids(tables.read(self.spark, self.uri))
        assert len(found) == len(set(found))
        return found

    def check_provenance(self) -> None:
        """The newest version is what it says it is, and so says its row in `corpora`."""
        from pyspark.sql import functions as F

        found, rows = self.provenance(), tables.read(self.spark, self.uri)
        (sums,) = rows.agg(*fingerprints.sums_of(F.lit(True))).collect()
        assert (found.n_instances, found.n_tokens) == (sums["n_kept"], sums["n_tokens"])
        assert found.threshold == sums["threshold"]
        assert found.fingerprint == fingerprints.fingerprint_of([(sums["xor"], sums["sum"])], sums["n_kept"])
        shown = corpus_records.show_corpus(self.spark, self.config.root, "half")
        assert shown["version"] == self.newest().version
        assert shown["fingerprint"] == found.fingerprint
        assert shown["inputs"].get("followed") == found.followed


@pytest.mark.long
def test_each_cut_is_within_a_bucket_of_the_exact_one(spark: Any, tmp_path: Path) -> None:
    by_tokens = SelectConfig(ratio=0.3, by="tokens")
    world = FollowedRoot(spark, tmp_path / "root", CorpusConfig(score=DIFFERENCE, select=by_tokens))
    world.score(4000)
    follower = world.follower()
    expected = set(world.kept())
    since = world.newest().version
    for number, shift in enumerate((0.0, 0.2, -0.4)):
        batch_id = world.score(1000, shift) if number else 0
        take(follower, world.batch(batch_id))
        cut, candidates = world.cut(), ranked(world.rows)
        # The counts cover all candidates so far.
        counted: dict[int, list[int]] = {}
        for score, _, n_tokens in candidates:
            of = counted.setdefault(bucket_of(score), [0, 0])
            of[0], of[1] = of[0] + 1, of[1] + n_tokens
        found = tables.read(spark, world.cuts_uri).collect()
        assert {row["bucket"]: [row["n_rows"], row["n_tokens"]] for row in found} == counted
        assert {row["batch_id"] for row in found} == {batch_id}
        # The rank of the cut against the rank in a sort.
        budget = budget_of(0.3, sum(row[2] for row in candidates))
        n_exact = len(by_sorting(candidates, budget))
        above = [row for row in candidates if bucket_of(row[0]) >= cut["bucket"]]
        assert (cut["budget"], cut["n_within"]) == (budget, sum(row[2] for row in above))
        assert all(row[0] >= cut["score"] - 1e-9 for row in above)
        assert abs(len(above) - n_exact) <= cut["boundary_rows"] <= 0.002 * len(candidates)
        # Appended is what lies above, and nothing else has gone or come.
        expected |= (
            {name for _, name, _ in above}
            & {row["instance_id"] for row in world.rows if number}
            & {row["instance_id"] for row in world.rows if row["batch_id"] == batch_id}
        )
        assert world.kept() == sorted(expected)
        found_provenance = world.provenance()
        assert found_provenance.n_candidates == len(candidates)
        if number:
            assert found_provenance.followed is not None
            assert found_provenance.followed["cut"] == cut
            assert found_provenance.followed["since_version"] == since
            assert found_provenance.inputs["last_batches"] == {QUERY: batch_id}
        world.check_provenance()
    listed = corpus_records.list_corpora(spark, world.config.root).collect()
    assert ["followed" in json.loads(row["inputs"]) for row in listed] == [False, True, True]


class KilledDriver(Exception):
    pass


def test_a_replay_does_the_rest_and_nothing_twice(spark: Any, tmp_path: Path) -> None:
    """Killed before and after each commit of a micro-batch, which is then given again to a new driver."""
    world = FollowedRoot(spark, tmp_path / "root")
    world.score(300)
    take(world.follower(), world.batch(0))
    expected = world.kept()
    # Behind each commit is before the next.
    for module, name in ((cuts, "write_counts"), (refine, "commit"), (corpus_records, "record")):
        for committed in (False, True)[module is not cuts :]:
            batch_id, follower = world.score(150, 0.2), world.follower()
            real = getattr(module, name)

            def killed(*arguments: Any, real: Any = real, committed: bool = committed, **named: Any) -> None:
                if committed:
                    real(*arguments, **named)
                raise KilledDriver

            with mock.patch.object(module, name, killed), pytest.raises(KilledDriver):
                take(follower, world.batch(batch_id))
            take(world.follower(), world.batch(batch_id))
            counts: dict[int, tuple[int, int]] = {}
            for score, _, n_tokens in ranked(world.rows):
                counts = dict(cuts.merged(counts, {bucket_of(score): (1, n_tokens)}))
            cut = cuts.cut_of(counts, HALF.select)
            assert world.cut() == dataclasses.asdict(cut), (name, committed)
            new = ranked([row for row in world.rows if row["batch_id"] == batch_id])
            expected = sorted([*expected, *(one for score, one, _ in new if bucket_of(score) >= cut.bucket)])
            assert world.kept() == expected, (name, committed)
            world.check_provenance()
    before = world.newest()
    # All at once, as where the checkpoint is lost.
    take(world.follower(), world.batch(*range(batch_id + 1)))
    assert world.newest() == before
    # After its files were merged, it is the same version, and the follower continues.
    tables.compact(spark, world.uri, 31)
    assert (world.newest().base, world.newest().version) == (before.version + 1, before.version)
    take(world.follower(), world.batch(world.score(150, 0.2)))
    world.check_provenance()
    assert world.kept() != expected
    assert [row["version"] for row in corpus_records.list_corpora(spark, world.config.root).collect()] == [
        *range(1, 6),
        7,
    ]


@pytest.mark.long
def test_a_full_refinement_in_between_is_taken_up(spark: Any, tmp_path: Path) -> None:
    world = FollowedRoot(spark, tmp_path / "root")
    world.score(300)
    follower = world.follower()
    take(follower, world.batch(0))
    take(follower, world.batch(world.score(200, 0.3)))
    # The refinement sees two micro-batches that the follower has not come to.
    ahead = [world.score(200), world.score(200, -0.3)]
    full = job.run(spark, world.config).refined["half"]
    assert not full.skipped
    candidates = [(score, name, 1) for score, name, _ in ranked(world.rows)]
    exact = by_sorting(candidates, len(candidates) // 2)
    assert world.kept() == exact
    for batch_id in ahead:
        take(follower, world.batch(batch_id))
        assert world.newest().version == full.version
    assert world.cut()["budget"] == len(exact)
    assert job.run(spark, world.config).refined["half"].skipped
    later = world.score(200, 0.2)
    take(follower, world.batch(later))
    appended = {row["instance_id"] for row in world.rows if row["batch_id"] == later}
    assert set(exact) < set(world.kept())
    assert set(world.kept()) - set(exact) < appended
    assert world.provenance().followed is not None
    assert world.provenance().followed["since_version"] == full.version  # type: ignore[index]
    world.check_provenance()
    # A followed version differs from a full refinement, so the refinement is made, once.
    again = job.run(spark, world.config).refined["half"]
    assert not again.skipped
    candidates = [(score, name, 1) for score, name, _ in ranked(world.rows)]
    assert world.kept() == by_sorting(candidates, len(candidates) // 2)
    assert job.run(spark, world.config).refined["half"] == dataclasses.replace(again, skipped=True)


def test_a_micro_batch_that_keeps_nothing_makes_no_version_and_has_its_cut(spark: Any, tmp_path: Path) -> None:
    world = FollowedRoot(spark, tmp_path / "root")
    world.score(300)
    follower = world.follower()
    take(follower, world.batch(0))
    version = world.newest().version
    before = world.cut()
    take(follower, world.batch(world.score(50, -9.0)))
    assert world.newest().version == version
    assert world.cut()["budget"] > before["budget"]
    assert world.cut()["score"] < before["score"]
    # Nor does one without a candidate.
    rows = [{**row, "split": "heldout"} for row in matrix_rows(20, 2)]
    write_batch(spark, world.config, rows)
    counted = world.cut()
    take(follower, world.batch(2))
    assert world.cut() == counted


def test_a_score_that_is_no_number_is_counted_and_never_kept(spark: Any, tmp_path: Path) -> None:
    bad = "case when n_bytes % 3 = 0 then double('NaN') when n_bytes % 3 = 1 then 1e308D else -teacher_nll_mean end"
    world = FollowedRoot(spark, tmp_path / "root", CorpusConfig(score=bad, select=SelectConfig(ratio=0.9)))
    world.score(100)
    follower = world.follower()
    take(follower, world.batch(0))
    take(follower, world.batch(world.score(100)))
    candidates = [row for row in world.rows if row["split"] == "pool" and row["teacher_n_tokens"] >= 32]
    usable = [row["instance_id"] for row in candidates if row["n_bytes"] % 3 != 0]
    assert world.kept() == sorted(usable)
    assert world.provenance().n_unscorable == len(candidates) - len(usable)
    counts = {row["bucket"]: row["n_rows"] for row in tables.read(spark, world.cuts_uri).collect()}
    assert counts[UNUSABLE] == len(candidates) - len(usable)
    assert max(counts) < 1 << 20
    world.check_provenance()


def test_buckets_never_fall_as_scores_rise(spark: Any) -> None:
    from pyspark.sql import functions as F

    rng = random.Random(0)
    scores = [sign * rng.random() * 10.0**power for sign in (1, -1) for power in range(-12, 308, 3) for _ in range(9)]
    edges = [cuts.lower_edge(bucket) for bucket in range(-12_000, 12_000, 11)]
    scores = sorted([*scores, *edges, *(math.nextafter(edge, -1e9) for edge in edges), 0.0, 1.7e308, -1.7e308])
    frame = spark.createDataFrame([(score,) for score in scores], "score double")
    column = cuts.bucket_column(SelectConfig(ratio=0.5), F.lit(True))
    found = [row["bucket"] for row in frame.select("score", column.alias("bucket")).orderBy("score").collect()]
    assert found == sorted(found)
    # The edge of a bucket is at its edge, to the last digits.
    of = dict(zip(scores, found, strict=True))
    assert all(of[edge * (1 + 1e-12)] == of[edge] for edge in edges if edge * (1 + 1e-12) in of)
    assert all(abs(cuts.lower_edge(of[edge]) - edge) <= 1.1 * abs(edge) / 1000 + 1e-6 for edge in edges)


@pytest.mark.long
def test_of_two_writers_on_one_version_one_is_told(spark: Any, tmp_path: Path) -> None:
    world = FollowedRoot(spark, tmp_path / "root")
    world.score(300)
    first = world.follower()
    stale = world.newest()
    batch_id = world.score(200)
    take(first, world.batch(0))
    take(first, world.batch(batch_id))
    rows = refine.candidate_rows(world.batch(0), world.config, "half", refine.resolve_corpus(world.config, "half"))
    version = world.newest().version

    def commit(frame: Any, replaces: bool, n: int) -> int:
        found = dataclasses.replace(world.provenance(), n_unscorable=n)
        return refine.commit(world.config, frame, 1, found, stale, replaces)

    # Delta drops a commit on top of an old version; here it is an error.
    for replaces in (False, True):
        with pytest.raises(CorpusError, match="another driver has written a version meanwhile"):
            commit(rows, replaces, 98)
    assert world.newest().version == version
    # One in the middle of its commit while another is made.
    stale = world.newest()
    failures: list[BaseException] = []

    begun, go_on = tmp_path / "begun", tmp_path / "go on"

    def slow(batches: Iterator[Any]) -> Iterator[Any]:
        begun.touch()
        until(go_on.exists, "the quick one's commit")
        yield from batches

    def commit_slowly() -> None:
        try:
            # One task, for the other one needs a core.
            commit(rows.coalesce(1).mapInArrow(slow, rows.schema), False, 99)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=commit_slowly)
    thread.start()
    until(begun.exists, "the slow one's start")
    quick = commit(rows.limit(1), False, 100)
    go_on.touch()
    thread.join()
    assert [type(failure) for failure in failures] == [CorpusError], failures
    assert world.newest().version == quick
    assert world.provenance().n_unscorable == 100


@pytest.mark.long
def test_another_config_or_matrix_is_not_mixed_in(spark: Any, tmp_path: Path) -> None:
    world = FollowedRoot(spark, tmp_path / "root")
    world.score(300)
    follower = world.follower()
    take(follower, world.batch(0))
    # The same name with another ratio, refined by another driver.
    other = with_corpora(world.config, half=CorpusConfig(score=DIFFERENCE, select=SelectConfig(ratio=0.2)))
    refined = job.run(spark, other).refined["half"]
    batch_id = world.score(200)
    with pytest.raises(CorpusError, match="expected versions of the config that is followed"):
        take(follower, world.batch(batch_id))
    assert world.newest().version == refined.version
    # A new start refines by the config that is followed, and then continues.
    follower = world.follower()
    assert world.provenance().config["select"]["ratio"] == 0.5
    take(follower, world.batch(batch_id))
    take(follower, world.batch(world.score(200)))
    world.check_provenance()
    # Another matrix: the follower of the old one does not count its rows.
    write_batch(spark, world.config, matrix_rows(250, 0, "r" * 32), replaces=True)
    with pytest.raises(CorpusError, match="score_matrix was built again meanwhile"):
        take(follower, world.batch(0))
    with pytest.raises(ConfigError, match="'whole'"):
        Follower(spark, world.config, "whole")


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (CorpusConfig(score=DIFFERENCE, select=SelectConfig(rule="band", low=0.2, high=0.8)), "a second cut"),
        (CorpusConfig(score=DIFFERENCE, select=SelectConfig(rule="token_budget", budget_tokens="1k")), "a budget"),
        (CorpusConfig(score=DIFFERENCE, select=SelectConfig(ratio=0.5, per_source="same")), "all sources together"),
        (
            CorpusConfig(score=DIFFERENCE, where="starts_document", select=SelectConfig(ratio=0.5)),
            "starts_document.*without --follow",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused_before_anything_is_made(
    spark: Any, tmp_path: Path, corpus: CorpusConfig, message: str
) -> None:
    world = FollowedRoot(spark, tmp_path / "root", corpus)
    world.score(50)
    with pytest.raises(ConfigError, match=message):
        world.follower()
    assert not tables.exists(spark, world.uri)


@pytest.mark.long
def test_to_the_end_of_what_is_there_and_on_from_there(spark: Any, tmp_path: Path) -> None:
    world = FollowedRoot(spark, tmp_path / "root")
    rules = {
        "half": HALF,
        "above": CorpusConfig(score=DIFFERENCE, select=SelectConfig(rule="threshold", threshold=0.25)),
        "random": CorpusConfig(score="0", select=SelectConfig(rule="random", ratio=0.5, seed=3)),
        "noisy": CorpusConfig(select=SelectConfig(rule="gumbel", temperature=0.5, ratio=0.5)),
    }
    world.config = with_corpora(world.config, **rules)
    world.score(300)
    first = job.follow(spark, world.config).followed
    assert {found.followed for found in first.values()} == {None}
    world.score(200, 0.3)
    world.score(200, -0.3)
    second = job.follow(spark, world.config).followed
    candidates = ranked(world.rows)
    above = sorted(name for score, name, _ in candidates if score >= 0.25)
    # A threshold is exact.
    assert ids(corpus_records.read_corpus(spark, world.config.root, "above")) == above
    assert all(found.n_candidates == len(candidates) for found in second.values())
    assert abs(second["random"].n_instances - len(candidates) / 2) < 40
    assert abs(second["noisy"].n_instances - len(candidates) / 2) < 40
    # Nothing is new; and a checkpoint that is gone, or counts that are, change nothing.
    versions = {name: found.version for name, found in second.items()}

    def again() -> dict[str, Any]:
        return {name: found.version for name, found in job.follow(spark, world.config).followed.items()}

    assert again() == versions
    for name in ("half", "random"):
        storage.remove_folder(world.config.layout.checkpoint(f"follow-{name}"))
    storage.remove_folder(world.config.layout.cuts("above"))
    storage.remove_folder(world.config.layout.cuts("random"))
    assert again() == versions
    world.check_provenance()
    # Another query builds the matrix again.
    write_batch(spark, world.config, matrix_rows(250, 0, "r" * 32), replaces=True)
    third = job.follow(spark, world.config, ["half"]).followed
    assert list(third) == ["half"]
    rebuilt = [(score, name, 1) for score, name, _ in ranked(matrix_rows(250, 0, "r" * 32))]
    assert world.kept() == by_sorting(rebuilt, len(rebuilt) // 2)
    assert third["half"].followed is None


@pytest.mark.long
def test_the_service_follows_until_sigterm(spark: Any, tmp_path: Path) -> None:
    world = FollowedRoot(spark, tmp_path / "root")
    world.score(300)
    service = Service(spark, tmp_path)
    service.config = dataclasses.replace(
        world.config, stream=StreamConfig(trigger="processing_time", interval_seconds=1)
    )

    def n_candidates() -> int:
        return world.provenance().n_candidates if tables.exists(spark, world.uri) else 0

    def meanwhile() -> None:
        until(lambda: world.has_counts(), "the first counts")
        world.score(200, 0.3)
        until(lambda: n_candidates() == len(ranked(world.rows)), "the second micro-batch")
        # While it runs, a full refinement waits for its turn, and another follower is refused.
        full = job.run(spark, world.config).refined["half"]
        with pytest.raises(CorpusError, match="follow half: the query is run by process"):
            job.follow(spark, service.config)
        world.score(200, 0.1)
        until(lambda: n_candidates() == len(ranked(world.rows)), "the third")
        assert world.provenance().followed["since_version"] == full.version  # type: ignore[index]
        # The matrix is built again while the follower runs.
        write_batch(spark, world.config, matrix_rows(250, 0, "r" * 32), replaces=True)
        until(lambda: list(world.provenance().inputs["last_batches"]) == ["r" * 32], "the new matrix")
        write_batch(spark, world.config, matrix_rows(250, 1, "r" * 32, 0.5))
        until(lambda: world.provenance().inputs["last_batches"] == {"r" * 32: 1}, "its second micro-batch")

    service.run(meanwhile, lambda spark, config, factories: job.follow(spark, config))
    world.check_provenance()
    assert len(world.kept()) == world.provenance().n_instances
    (status,) = [found for found in statuses.read_all(world.config.root) if found.query == "follow half"]
    assert (status.state, status.backlog) == ("stopped", 0)
