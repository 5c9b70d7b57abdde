"""`miniplm doctor`: what is missing, the command that installs it, the exit code; and that it loads nothing heavy."""

import dataclasses
import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from jobs import cli, doctor
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.upkeep import machine
from miniplm_udf.upkeep.machine import Finding


@pytest.fixture(autouse=True)
def no_mlflow_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def by_part(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.part: finding for finding in findings}


def test_it_runs_without_spark_and_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from jobs import cli, doctor; from miniplm_udf.upkeep import machine\n"
        "machine.gpus = lambda: iter(())\n"  # torch in a process of its own takes seconds
        f"code = cli.main(['doctor', '--json', '--root', {str(tmp_path / 'root')!r}])\n"
        "heavy = ('pyspark', 'torch', 'pyarrow', 'numpy', 'mlflow', 'deltalake', 'transformers')\n"
        "sys.exit(code or [name for name in heavy if name in sys.modules] or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    findings = {each["part"]: each for each in json.loads(done.stdout)["findings"]}
    assert findings["python"]["state"] == findings["root"]["state"] == findings["mlflow"]["state"] == "ok"
    assert {"base", "extra spark", "extra score", "extra train", "java", "memory", "jars"} <= findings.keys()
    assert findings["base"]["versions"]["fsspec"]
    assert not (tmp_path / "root").exists()


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    version = machine._version
    monkeypatch.setattr(machine, "_version", lambda name: None if name == "pyspark" else version(name))
    spark = by_part(machine.packages())["extra spark"]
    assert (spark.state, spark.remedy, spark.versions["pyspark"]) == ("missing", "pip install 'miniplm[spark]'", None)
    assert "not installed: pyspark" in spark.text
    # No base command needs it.
    assert doctor.exit_code([spark]) == 0
    assert "pip install 'miniplm[spark]'" in doctor.text([spark])


def test_a_wrong_version_and_a_missing_base_package_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    version = machine._version
    monkeypatch.setattr(machine, "_version", lambda name: "0.0.1" if name == "fsspec" else version(name))
    base = by_part(machine.packages())["base"]
    assert base.state == "missing"
    assert "fsspec>=2024.6 (found 0.0.1)" in base.text
    assert doctor.exit_code([base]) == 1


@pytest.mark.parametrize(
    ("answer", "state", "shown"),
    [
        ('openjdk version "17.0.9" 2023-10-17', "ok", "17.0.9"),
        ('java version "1.8.0_392"', "missing", "1.8.0_392"),
        (None, "missing", "none"),
    ],
)
def test_java_must_be_new_enough(
    answer: str | None, state: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "java"
    program.parent.mkdir()
    if answer is not None:
        program.write_text(f"#!/bin/sh\necho '{answer}' >&2\n")
        program.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    java = machine.java()
    assert java.state == state
    assert java.text.startswith(shown)
    assert ("openjdk-17" in java.remedy) == (state == "missing")


def test_jars_are_cached_or_to_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path))
    assert doctor._jars(with_s3=False).state == "note"
    for name in doctor.spark_jars.missing_jars(with_s3=True):
        place = doctor.spark_jars.jar_folder() / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    assert doctor._jars(with_s3=True).state == "ok"


def test_a_root_that_cannot_be_used_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    findings = list(doctor._root(ExperimentConfig(root=str(tmp_path / "file" / "root"))))
    assert findings[-1].state == "missing"
    assert doctor.exit_code(findings) == 1
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    (remote,) = doctor._root(ExperimentConfig(root="s3a://bucket/run"))
    assert remote.remedy == "pip install 'miniplm[s3]'"
    monkeypatch.undo()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    (remote,) = doctor._root(ExperimentConfig(root="s3a://bucket/run"))
    assert "127.0.0.1:9 does not answer" in remote.text
    assert doctor.exit_code([remote]) == 1


def test_an_mlflow_server_answers_or_not(tmp_path: Path) -> None:
    class HealthHandler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), HealthHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = ExperimentConfig(root=str(tmp_path))
    uri = f"http://127.0.0.1:{server.server_port}"
    served = dataclasses.replace(config, mlflow=dataclasses.replace(config.mlflow, tracking_uri=uri))
    assert doctor._mlflow(served).state == "ok"
    server.shutdown()
    server.server_close()
    silent = doctor._mlflow(served)
    assert (silent.state, "does not answer" in silent.text) == ("missing", True)
    assert doctor._mlflow(config).text.endswith("mlflow.db, made by the first training")


def test_a_wrong_config_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "-c", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
