"""Pretended GPUs on a real standalone cluster: scoring asks for one a task, other stages for none."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.faults import experiment
from tests.support.faults.check import rows
from tests.support.faults.drivers import REPOSITORY
from tests.support.standalone import StandaloneCluster, die_with_parent

# With dynamic allocation, executors with a GPU are started for scoring alone.
DYNAMIC = {
    "spark.dynamicAllocation.enabled": "true",
    "spark.dynamicAllocation.shuffleTracking.enabled": "true",
    "spark.dynamicAllocation.initialExecutors": "2",
    "spark.dynamicAllocation.maxExecutors": "2",
}


def most_at_once(notes: list[dict[str, Any]]) -> int:
    return max(sum(one["start"] <= note["start"] < one["end"] for one in notes) for note in notes)


def run_job(folder: Path, dynamic: bool, gpus: int, split: bool) -> list[dict[str, Any]]:
    """Ingests and scores on two executors with two cores and `gpus` pretended GPUs each; returns the tasks' notes."""
    experiment.write_input(folder / "input")
    for number in range(2):
        (folder / f"input/more-{number}.jsonl").write_text(json.dumps(experiment.document(number, 9)) + "\n")
    (folder / "notes").mkdir()
    with StandaloneCluster(folder / "cluster", workers=2, cores=4, gpus=gpus) as cluster:
        conf = {**cluster.driver_conf(cores=2), "spark.executorEnv.PYTHONPATH": str(REPOSITORY)}
        if dynamic:
            conf = {key: value for key, value in conf.items() if "gpu" not in key and key != "spark.cores.max"}
            conf |= {**DYNAMIC, "spark.miniplm.gpu.discoveryScript": str(cluster.discovery_script)}
            conf["spark.miniplm.gpu.amount"] = str(gpus)
        else:
            conf["spark.executor.resource.gpu.amount"] = str(gpus)
        given = {
            "master": cluster.url, "conf": conf, "root": str(folder / "root"), "input": str(folder / "input"),
            "notes": str(folder / "notes"), "split": split,
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.support.gpu_job", json.dumps(given)]
        done = subprocess.run(
            command, cwd=REPOSITORY, timeout=150, capture_output=True, text=True, preexec_fn=die_with_parent
        )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(path.read_text()) for path in (folder / "notes").iterdir()]


def test_a_split_model_gets_all_gpus_of_its_executor(tmp_path: Path) -> None:
    notes = run_job(tmp_path, False, gpus=2, split=True)
    scoring = [note for note in notes if note["stage"] == "score"]
    assert scoring
    assert all(sorted(note["gpus"]) == ["0", "1"] for note in scoring)
    assert most_at_once(scoring) <= 2, "one task an executor"
    for executor in {note["executor"] for note in scoring}:
        assert most_at_once([note for note in scoring if note["executor"] == executor]) == 1
    assert all(note["gpus"] == [] for note in notes if note["stage"] == "ingest")


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed executors", "dynamic allocation"])
def test_scoring_alone_asks_for_gpus(tmp_path: Path, dynamic: bool) -> None:
    """Two executors with two cores and one GPU each: four tasks at once ingest, two score, and each has its GPU."""
    notes = run_job(tmp_path, dynamic, gpus=1, split=False)
    ingesting, scoring = ([note for note in notes if note["stage"] == stage] for stage in ("ingest", "score"))
    assert all(note["gpus"] == [] for note in ingesting)
    assert most_at_once(ingesting) > 2, "as many tasks as cores, not as GPUs"
    assert len(scoring) == 4 * len(experiment.SCALES), "four partitions, each scored with every model"
    assert all(note["gpus"] == ["0"] for note in scoring)
    assert most_at_once(scoring) == 2, "as many tasks as GPUs, not as cores"
    assert len({note["executor"] for note in scoring}) == 2
    for executor in {note["executor"] for note in scoring}:
        assert most_at_once([note for note in scoring if note["executor"] == executor]) == 1
    pool = {row["instance_id"] for row in rows(tmp_path / "root", "instances") if row["split"] == "pool"}
    scored = [(row["instance_id"], row["model_id"]) for row in rows(tmp_path / "root", "scores")]
    rejected = {row["instance_id"] for row in rows(tmp_path / "root", "rejects")}
    assert sorted(scored) == sorted((one, alias) for one in pool - rejected for alias in experiment.SCALES)
