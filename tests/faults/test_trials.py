"""The fault trials' own rules: what is planned, where a driver stops, and that a damaged root is told from a good."""

import collections
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from miniplm_udf import schemas
from tests.support.faults.check import Root, compare
from tests.support.faults.points import POINTS, Point, Stops
from tests.support.faults.runs import LANDINGS, PLACES, TRIALS
from tests.support.faults.trials import plan


def test_sixty_trials_kill_at_every_point_often_enough() -> None:
    trials = plan(TRIALS, seed=0)
    assert len(trials) == TRIALS
    at_points = collections.Counter(str(kill.point) for trial in trials for kill in trial.kills if kill.point)
    assert set(at_points) == set(PLACES)
    assert min(at_points.values()) >= LANDINGS
    kinds = collections.Counter(kill.kind for trial in trials for kill in trial.kills)
    assert set(kinds) == {"driver", "executor", "worker daemon", "python worker", "scorer process"}
    assert min(kinds.values()) >= 5
    at_random = {(trial.start, kill.kind) for trial in trials for kill in trial.kills if kill.point is None}
    assert {kind for stage, kind in at_random if stage == "score"} == set(kinds)
    assert sum(trial.varying for trial in trials) == TRIALS // 2
    by_start = collections.Counter((trial.start, trial.varying) for trial in trials)
    assert min(by_start.values()) >= 5, "each start with scores that vary, and that do not"
    assert all(trial.keyed for trial in trials for kill in trial.kills if kill.kind == "scorer process")
    # A run comes by a trial's points in their order.
    for trial in trials:
        places = [PLACES.index(str(kill.point)) for kill in trial.kills if kill.point]
        assert places == sorted(places)


def test_stops_are_passed_in_their_order() -> None:
    """Each point of a run is wanted in turn; all of them are come by, once, at the batch that was asked for."""
    wanted = [Point(stage, name, 0) for stage, names in POINTS.items() for name in names]
    reached: list[Point] = []

    def stop(point: Point) -> Point | None:
        reached.append(point)
        return wanted[len(reached)] if len(reached) < len(wanted) else None

    stops = Stops(stop, lambda stage: None)
    stops.next = wanted[0]
    write = stops.writer(lambda table: None)
    tables = {
        "ingest": (schemas.INSTANCES, schemas.REJECTS),
        "score": (schemas.SCORES, schemas.REJECTS),
        "matrix": (schemas.score_matrix(["teacher"]),),
    }
    for stage, written in tables.items():
        for batch_id in range(2):
            stops.micro_batch(stage, lambda batch, number, of=written: [write(table) for table in of])(None, batch_id)
    for table in (schemas.refined("best", ["teacher"]), schemas.CORPORA):
        write(table)
    assert reached == wanted


def root() -> Root:
    """Two instances, one rejected, the other scored with both models, and refined."""
    revisions = {"teacher": "t", "reference": "r"}
    scores = [
        {"instance_id": one, "model_revision": revisions[alias], "nll_sum_nats": value, "n_tokens": 2, "n_bytes": 9}
        for one, teacher in (("a", 4.0), ("b", 6.0))
        for alias, value in (("teacher", teacher), ("reference", 8.0))
    ]
    matrix: list[dict[str, Any]] = [
        {"instance_id": one, "reference_revision": "r", "reference_nll_sum_nats": 8.0, "reference_n_tokens": 2,
         "reference_nll_mean": 4.0, "teacher_revision": "t", "teacher_nll_sum_nats": teacher, "teacher_n_tokens": 2,
         "teacher_nll_mean": teacher / 2}
        for one, teacher in (("a", 4.0), ("b", 6.0))
    ]  # fmt: skip
    return Root(
        instances=[{"instance_id": one, "text": one, "split": "pool"} for one in "abc"],
        rejects=[{"reject_id": "x"}],
        scores=scores,
        matrix=matrix,
        refined=[{"instance_id": "a", "score": 2.0, "n_tokens": 2}],
        corpora=[{"name": "best", "version": 1, "n_instances": 1, "fingerprint": "f", "threshold": 2.0}],
        keys=[{"document_key": "k", "instance_id": "a"}],
    )


def change(table: str, row: int, **values: Any) -> Callable[[Root], None]:
    return lambda found: getattr(found, table)[row].update(values)


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("lost", lambda found: found.instances.pop()),
        ("lost", lambda found: found.rejects.clear()),
        ("lost", lambda found: found.keys.clear()),
        ("lost", lambda found: found.scores.pop()),
        ("lost", lambda found: found.matrix.pop()),
        ("lost", lambda found: found.refined.pop()),
        ("duplicated", lambda found: found.instances.append(found.instances[0])),
        ("duplicated", lambda found: found.keys.append(found.keys[0])),
        ("duplicated", lambda found: found.scores.append(found.scores[0])),
        ("duplicated", lambda found: found.matrix.append(found.matrix[0])),
        ("duplicated", lambda found: found.refined.append(found.refined[0])),
        ("differing", change("instances", 0, text="other")),
        ("differing", change("keys", 0, instance_id="b")),
        ("differing", change("scores", 0, nll_sum_nats=4.5)),
        ("differing", change("scores", 0, instance_id="orphan")),
        ("differing", change("matrix", 1, teacher_nll_sum_nats=6.5, teacher_nll_mean=3.25)),
        ("differing", change("refined", 0, score=2.5)),
        ("differing", change("corpora", 0, n_instances=2)),
        ("differing", lambda found: found.corpora.append({**found.corpora[0], "version": 2})),
        ("differing", lambda found: found.rejects.append({"reject_id": "y"})),
    ],
)
def test_damage_is_found(kind: str, damage: Callable[[Root], Any], varying: bool) -> None:
    good, found = root(), copy.deepcopy(root())
    assert not compare(good, root(), varying).lines
    damage(found)
    assert getattr(compare(found, good, varying), kind) > 0


def test_other_scores_are_no_damage_only_where_scores_vary() -> None:
    found = copy.deepcopy(root())
    for row in found.scores:
        row["nll_sum_nats"] *= 1.5
    for row in found.matrix:
        for name in ("teacher", "reference"):
            row[f"{name}_nll_sum_nats"] *= 1.5
            row[f"{name}_nll_mean"] *= 1.5
    found.refined[0]["score"] *= 1.5
    assert not compare(found, root(), varying=True).lines
    assert compare(found, root(), varying=False).differing > 0
    assert dataclasses.asdict(compare(found, root(), varying=True))["lost"] == 0
