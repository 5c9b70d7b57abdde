"""The package as a cluster gets it: a wheel by --py-files, and workers that have neither the clone nor its environment.

The workers' Spark is a copy outside of the repository, their Python an environment with what an executor needs besides
torch (the scorer is a fake), and their environment variables are what `StandaloneCluster` gives them.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pyspark
import pytest

from jobs.spark_jars import jar_properties
from tests.support.faults.check import rows
from tests.support.faults.drivers import REPOSITORY
from tests.support.standalone import StandaloneCluster, die_with_parent

EXECUTOR_PACKAGES = ("pyarrow", "pandas<3", "numpy", "fsspec", "tqdm", "psutil")
HELPERS = REPOSITORY / "tests/support"


def run(*command: object, **named: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280, **named)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return str(done.stdout)


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """Built from a copy of what packaging reads: a build leaves folders behind where it runs."""
    source = tmp_path / "source"
    for name in ("jobs", "miniplm_udf", "trainer"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, source)
    return next(tmp_path.glob("*.whl"))


@pytest.fixture
def worker_python(tmp_path: Path) -> Path:
    """An environment made by uv, with the versions of constraints.txt."""
    uv, python = Path(sys.executable).with_name("uv"), tmp_path / "worker/bin/python"
    run(uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "worker")
    constraints = REPOSITORY / "constraints.txt"
    run(uv, "pip", "install", "--quiet", "--python", python, "-c", constraints, *EXECUTOR_PACKAGES)
    return python


def test_the_wheel_has_the_rules_and_the_students(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for link, folder in (("rules", "rule_files"), ("students", "student_files")):
        shipped = {path.name for path in (REPOSITORY / "conf" / link).glob("*.yaml")}
        assert shipped
        assert shipped == {name.split("/")[-1] for name in names if name.startswith(f"miniplm_udf/config/{folder}/")}


def linked_or_copied(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def test_workers_without_the_clone_score(tmp_path: Path, wheel: Path, worker_python: Path) -> None:
    package = shutil.copy(wheel, tmp_path / "miniplm.zip")  # Spark puts no .whl on the path of its Python workers
    spark_home = tmp_path / "spark"
    shutil.copytree(Path(pyspark.__file__).parent, spark_home, copy_function=linked_or_copied)
    with StandaloneCluster(tmp_path / "cluster", workers=2, gpus=1, spark_home=spark_home) as cluster:
        properties = {**cluster.driver_conf(), "spark.pyspark.python": worker_python}
        properties |= {"spark.pyspark.driver.python": sys.executable, **jar_properties(with_s3=False, given={})}
        conf = tmp_path / "cluster.conf"
        conf.write_text("".join(f"{key} {value}\n" for key, value in properties.items()))
        run(
            Path(pyspark.__file__).parent / "bin/spark-submit", "--master", cluster.url, "--properties-file", conf,
            "--py-files", f"{package},{HELPERS / 'packaged_fake.py'}", HELPERS / "packaged_job.py",
            tmp_path / "root", tmp_path / "answer.json",
            cwd=tmp_path, preexec_fn=die_with_parent,
            env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "SPARK_LOCAL_IP": "127.0.0.1"},
        )  # fmt: skip
    answer = json.loads((tmp_path / "answer.json").read_text())
    for worker in answer["workers"]:
        assert package.name in worker["package"]
        assert Path(worker["python"]).parent == worker_python.parent
        seen = [*worker["path"], *worker["environment"]]
        assert not [one for one in seen if str(REPOSITORY) in one or sys.prefix in one]
    assert answer["scored"] == {"teacher": 20}
    scores = rows(tmp_path / "root", "scores")
    assert sorted(row["instance_id"] for row in scores) == [f"{number:032x}" for number in range(20)]
    texts = {row["instance_id"]: row["text"] for row in rows(tmp_path / "root", "instances")}
    assert all(row["nll_sum_nats"] == sum(texts[row["instance_id"]].encode()) for row in scores)
