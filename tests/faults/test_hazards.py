"""Single hazards, each held against a run that met none: lost checkpoints, full disks, odd deliveries, two drivers."""

import contextlib
import dataclasses
import gzip
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs import ingest, refine, score
from miniplm_udf.errors import CorpusError
from tests.support.faults import experiment
from tests.support.faults.check import Root, compare, read_root
from tests.support.faults.driver import stand_ins
from tests.support.faults.drivers import Driver, release
from tests.support.faults.points import Point, Stops, installed

STAGES = ("ingest", "score", "refine")
PAGE_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class Case:
    """A root, its input, and the session that works on it."""

    spark: Any
    folder: Path
    name: str = "root"
    varying: bool = True

    @property
    def root(self) -> Path:
        return self.folder / self.name

    @property
    def input(self) -> Path:
        return self.folder / "input"

    def run(self, *stages: str, models: tuple[str, ...] = ()) -> None:
        config = experiment.config(self.root, self.input, models)
        runs = {
            "ingest": lambda: ingest.run(self.spark, config),
            "score": lambda: score.run(self.spark, config, experiment.factories(self.varying, keyed=False)),
            "refine": lambda: refine.run(self.spark, config),
        }
        with stand_ins():
            for stage in stages or STAGES:
                runs[stage]()

    def deliver(self, name: str, *numbers: int, **times: float) -> Path:
        """A new file with documents of these numbers; its name says whether it is packed."""
        lines = "".join(json.dumps(experiment.document(number, 7)) + "\n" for number in numbers).encode()
        path = self.input / name
        path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
        if times:
            os.utime(path, (times["modified"], times["modified"]))
        return path


@pytest.fixture
def case(spark: Any, tmp_path: Path) -> Case:
    experiment.write_input(tmp_path / "input")
    return Case(spark, tmp_path)


def assert_equal(found: Root, expected: Root, varying: bool = True) -> None:
    assert not compare(found, expected, varying).lines
    assert len(found.scores) > 40
    assert len(found.refined) > 10


def test_checkpoints_deleted(case: Case) -> None:
    """Nothing is scored again, nothing is lost, and what arrived meanwhile comes in."""
    undisturbed = dataclasses.replace(case, name="undisturbed")
    for one in (case, undisturbed):
        one.run()
    before = read_root(case.root)
    shutil.rmtree(case.root / "_checkpoints")
    case.deliver("later.jsonl", 1, 2, 3)
    for one in (case, undisturbed):
        one.run()
    after = read_root(case.root)
    assert_equal(after, read_root(undisturbed.root))
    assert len(after.scores) > len(before.scores)
    values = {(row["instance_id"], row["model_revision"]): row["nll_sum_nats"] for row in after.scores}
    assert all(values[row["instance_id"], row["model_revision"]] == row["nll_sum_nats"] for row in before.scores)


def test_tables_cut_off_before_their_first_commit(case: Case) -> None:
    """A kill behind the making of a log's folder: Delta finds no table there, and makes none on top by itself."""
    for name in ("instances", "rejects", "scores", "score_matrix", f"refined/{experiment.CORPUS}", "corpora"):
        (case.root / "tables" / name / "_delta_log/_staged_commits").mkdir(parents=True)
    undisturbed = dataclasses.replace(case, name="undisturbed")
    for one in (case, undisturbed):
        one.run()
    assert_equal(read_root(case.root), read_root(undisturbed.root))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@contextlib.contextmanager
def full_at(point: Point, disk: Path, free_pages: int) -> Iterator[None]:
    """Fills the disk but for some pages when a run comes to the point; empties it again behind the block."""
    ballast = disk / "ballast"

    def fill(reached: Point) -> None:
        state = os.statvfs(disk)
        with ballast.open("wb") as file:
            file.write(bytes((state.f_bavail - free_pages) * PAGE_BYTES))

    stops = Stops(fill, lambda stage: None)
    stops.next = point
    with installed(stops):
        yield
    ballast.unlink(missing_ok=True)


def test_disk_full_during_a_commit(case: Case, small_disk: Path) -> None:
    """No page is free for the data, or too few for the data and the commit: a failure, and then all is there."""
    undisturbed = dataclasses.replace(case, name="undisturbed")
    undisturbed.run()
    case = dataclasses.replace(case, name="disk/root")
    failures = []
    for point in (
        Point("ingest", "before", 1),
        Point("score", "before"),
        Point("score", "between"),
        Point("matrix", "before", 1),
        Point("refine", "before"),
    ):
        for free_pages in (0, 6):
            with full_at(point, small_disk, free_pages):
                try:
                    case.run()
                except Exception as error:  # Spark raises errors of several classes here
                    failures.append((str(point), free_pages, type(error).__name__))
    case.run()
    assert {place for place, _, _ in failures} == {
        "ingest before", "score before", "score between", "matrix before", "refine before",
    }  # fmt: skip
    assert_equal(read_root(case.root), read_root(undisturbed.root))


def test_odd_deliveries(case: Case) -> None:
    """A .gz cut short, a file changed after it was read, one file under two names, a file of long ago."""
    case.run()
    before = read_root(case.root)
    shutil.copy(case.input / "0.jsonl", case.input / "copy.jsonl")
    whole = case.deliver("whole.jsonl.gz", *range(20, 60)).read_bytes()
    (case.input / "whole.jsonl.gz").unlink()
    (case.input / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    changed = (case.input / "1.jsonl").read_text()
    (case.input / "1.jsonl").write_text(changed + json.dumps(experiment.document(90, 7)) + "\n")
    case.deliver("old.jsonl", 1, 2, modified=1e9)
    case.run()
    after = read_root(case.root)
    new = {one for row in after.instances for one in row["document_ids"]} - {
        one for row in before.instances for one in row["document_ids"]
    }
    assert new == {"d7.1", "d7.2"}, "of all these, only the old file's documents are new and whole"
    assert [row["reason"] for row in after.rejects if "cut.jsonl.gz" in (row["source_file"] or "")] == [
        "unreadable_file"
    ]
    # Repaired, and under new names, the files are read; nothing that was there comes twice.
    (case.input / "repaired.jsonl.gz").write_bytes(whole)
    shutil.copy(case.input / "1.jsonl", case.input / "1-changed.jsonl")
    case.run()
    (case.input / "cut.jsonl.gz").unlink()
    undisturbed = dataclasses.replace(case, name="undisturbed")
    undisturbed.run()
    found, expected = read_root(case.root), read_root(undisturbed.root)
    # Lines that are no JSON are rejects of each file; one version of the corpus was made at each run.
    found = dataclasses.replace(found, rejects=expected.rejects, corpora=expected.corpora)
    assert_equal(found, expected)


@contextlib.contextmanager
def driver(folder: Path, name: str) -> Iterator[Driver]:
    """Another driver, on one core of this machine."""
    made = Driver("local[1]", {"spark.driver.memory": "1g"}, str(folder), folder / f"{name}.log")
    try:
        yield made
    finally:
        made.kill()


def command(case: Case, *stages: str, models: tuple[str, ...] = (), stop: Point | None = None) -> dict[str, Any]:
    return {
        "root": str(case.root), "input": str(case.input), "stages": stages, "models": models, "mode": "document",
        "varying": case.varying, "keyed": False, **release(stop),
    }  # fmt: skip


def test_two_models_scored_at_once_and_refine_reading_meanwhile(case: Case) -> None:
    """Two drivers append to `scores`; a refinement sees the matrix as it was, or as it is, and says so otherwise."""
    undisturbed = dataclasses.replace(case, name="undisturbed")
    for one in (case, undisturbed):
        one.run()
    case.deliver("later.jsonl", *range(1, 20))
    case.run("ingest")
    with driver(case.folder, "teacher") as first, driver(case.folder, "reference") as second:
        running = {"teacher": first, "reference": second}
        for one in running.values():
            one.wait_until_ready()
        for alias, one in running.items():
            one.send(command(case, "score", models=(alias,)))
        for one in running.values():
            # Refines all the while; a matrix of one model only is refused, never refined as if it were whole.
            while True:
                with contextlib.suppress(CorpusError):
                    case.run("refine")
                if one.has_news() and (event := one.event(1))["event"] != "stage":
                    assert event["event"] == "done", event
                    break
    case.run("score", "refine")
    undisturbed.run()
    found, expected = read_root(case.root), read_root(undisturbed.root)
    assert_equal(dataclasses.replace(found, corpora=expected.corpora), expected)


def test_a_second_driver_on_a_query_that_runs(case: Case) -> None:
    """It is refused, with the holder's name, and the first one ends as if nothing had been."""
    undisturbed = dataclasses.replace(case, name="undisturbed")
    undisturbed.run()
    case.run("ingest")
    with driver(case.folder, "first") as first:
        first.wait_until_ready()
        first.send(command(case, "score", "refine", stop=Point("score", "between")))
        first.wait_for("stopped", 120)
        with pytest.raises(CorpusError, match=r"the query is run by process \d+"):
            case.run("score")
        first.send(release(None))
        first.wait_for("done", 120)
    assert_equal(read_root(case.root), read_root(undisturbed.root))
