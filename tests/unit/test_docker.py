"""The Dockerfiles: linted, their COPY sources exist, and the entry point starts what Spark on Kubernetes asks for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "conf" / "docker"
DOCKERFILES = sorted(FOLDER.glob("*.Dockerfile"))


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_hadolint_has_no_complaint(file: Path) -> None:
    done = subprocess.run(["hadolint", str(file)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.stem)
def test_the_copied_files_exist_and_the_user_is_not_root(file: Path) -> None:
    lines = [line.split() for line in file.read_text().splitlines()]
    sources = [word for line in lines if line[:1] == ["COPY"] for word in line[1:-1]]
    assert "constraints.txt" in sources
    missing = [name for name in sources if not name.startswith("dist/") and not (REPOSITORY / name).is_file()]
    assert missing == []
    (user,) = [line[1] for line in lines if line[:1] == ["USER"]]
    assert int(user) > 0


def entry_point(folder: Path, *words: str) -> list[str]:
    """The command that the entry point runs: fakes of java and of spark-submit print their arguments."""
    for name in ("bin/java", "spark/bin/spark-submit"):
        program = folder / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/bin/sh\necho {program.name}\nprintf '%s\\n' \"$@\"\n")
        program.chmod(0o755)
    variables = {
        "SPARK_HOME": str(folder / "spark"), "JAVA_HOME": str(folder), "SPARK_DRIVER_BIND_ADDRESS": "10.0.0.1",
        "SPARK_DRIVER_URL": "spark://driver", "SPARK_EXECUTOR_ID": "3", "SPARK_EXECUTOR_CORES": "8",
        "SPARK_EXECUTOR_MEMORY": "16g", "SPARK_APPLICATION_ID": "app", "SPARK_EXECUTOR_POD_IP": "10.0.0.2",
        "SPARK_RESOURCE_PROFILE_ID": "1", "SPARK_EXECUTOR_POD_NAME": "pod", "SPARK_JAVA_OPT_0": "-Da=b c",
        "SPARK_JAVA_OPT_1": "-Dsecond", "SPARK_JAVA_OPT_10": "-Deleventh", "SPARK_JAVA_OPT_2": "-Dthird",
    }  # fmt: skip
    done = subprocess.run(
        [str(FOLDER / "entrypoint.sh"), *words], env={"PATH": os.environ["PATH"], **variables},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return done.stdout.splitlines()


def test_the_entry_point_starts_an_executor(tmp_path: Path) -> None:
    words = entry_point(tmp_path, "executor")
    assert words[:7] == ["java", "-Da=b c", "-Dsecond", "-Dthird", "-Deleventh", "-Xms16g", "-Xmx16g"]
    assert "org.apache.spark.scheduler.cluster.k8s.KubernetesExecutorBackend" in words
    assert words[words.index("--resourceProfileId") + 1] == "1"


def test_the_entry_point_starts_a_driver_and_other_commands(tmp_path: Path) -> None:
    words = entry_point(tmp_path, "driver", "local:///score.py", "-c", "e.yaml")
    assert words[:3] == ["spark-submit", "--conf", "spark.driver.bindAddress=10.0.0.1"]
    assert words[-5:] == ["--deploy-mode", "client", "local:///score.py", "-c", "e.yaml"][-5:]
    assert entry_point(tmp_path, "echo", "miniplm", "--help") == ["miniplm --help"]
