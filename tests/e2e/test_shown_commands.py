"""The commands of README.md and docs/*.md really run, on a small experiment: one process, one JVM, readers first.

`tests/support/shown_commands.py` says which commands run, why the others do not, and what takes the place of the files
that the pages name. Services are stopped by SIGTERM as soon as they are up.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.overrides import apply_override
from miniplm_udf.streams import status
from tests.support.command_process import CommandProcess, Result
from tests.support.commands import TRAINER
from tests.support.ports import free_port
from tests.support.shown_commands import Kind, Places, filled_in, kind_of, shown_commands, without_repetitions
from tests.support.user_corpus import REPOSITORY, Experiment

GENERATE = [
    "generate={model: teacher, prompt_tokens: 32, new_tokens: 8, sample: 0.5}",
    "students.seqkd={corpus: generated, tokenizer: bpe8k, architecture: {model_type: llama, hidden_size: 32, "
    "intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2, tie_word_embeddings: true}}",
]


def write_config(path: Path, overrides: list[str]) -> str:
    """The demo's config with overrides, as a file."""
    raw: dict[str, Any] = yaml.safe_load((REPOSITORY / "conf/demo.yaml").read_text(encoding="utf-8"))
    for override in overrides:
        apply_override(raw, override, ExperimentConfig)
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return str(path)


@pytest.fixture
def places(experiment: Experiment, tmp_path: Path) -> Places:
    """A copy of the experiment, which the commands change, in a folder that has `conf`, as a clone has."""
    (tmp_path / "conf").symlink_to(REPOSITORY / "conf")
    root, other_root = tmp_path / "root", tmp_path / "other root"
    shutil.copytree(experiment.root, root)
    shutil.copytree(root / "models", other_root / "models")
    overrides = [*experiment.overrides, f"root={root}"]
    return Places(
        config=write_config(tmp_path / "small.yaml", overrides),
        seqkd=write_config(tmp_path / "seqkd.yaml", [*overrides, *GENERATE]),
        root=str(root), other_root=str(other_root), texts=f"{experiment.texts}/*.jsonl",
        teacher=str(experiment.teacher), folder=str(tmp_path), student="miniplm", port=str(free_port()),
    )  # fmt: skip


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def service_of(words: list[str], places: Places) -> Callable[[str], bool] | None:
    """For a service: whether it is up, by what it has printed."""
    if words[0] == "explore":
        return lambda printed: any(map(answers, re.findall(r"http://127\.0\.0\.1:\d+/", printed)))
    if words[0] != "stream" and "stream.trigger=processing_time" not in words:
        return None
    has_port = any(word.startswith("stream.metrics_port=") for word in words)
    queries = 3 if words[0] == "stream" else 1

    def is_up(_: str) -> bool:
        running = [query for query in status.read_all(places.root) if query.state == "running"]
        return len(running) == queries and (not has_port or answers(f"http://127.0.0.1:{places.port}/metrics"))

    return is_up


def mlflow_ui(words: list[str], folder: Path) -> Result:
    """Starts MLflow's page, and stops it and its workers once it answers."""
    port, begun = free_port(), time.monotonic()
    # Without its jobs, which no page needs, the server is fewer processes.
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(folder / "mlflow.log", "w+") as log:
        line = [sys.executable, "-m", *words, "--port", str(port), "--workers", "1"]
        process = subprocess.Popen(line, cwd=folder, stdout=log, stderr=log, start_new_session=True, env=environment)
        is_up = False
        while process.poll() is None and not is_up and time.monotonic() - begun < 300:
            is_up = answers(f"http://127.0.0.1:{port}/")
            time.sleep(0.3)
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()
        log.seek(0)
        return Result(0 if is_up else 1, "", log.read(), time.monotonic() - begun)


def expected_codes(words: list[str]) -> set[int]:
    """The exit codes that the pages state for a command."""
    if words[0] == "explore":
        return {128 + signal.SIGTERM}
    # No row may match a condition on the small experiment.
    return {0, 1} if words[0] == "inspect" and "--sql" in words else {0}


def mistake(words: list[str], result: Result) -> str:
    """The mistake in a result; empty if the command did what the pages state."""
    if result.code not in expected_codes(words):
        return f"exit code {result.code}: {result.stderr[-1500:]}"
    if result.code == 1 and "found none" not in result.stderr:
        return f"exit code 1, and not because no row matches: {result.stderr[-1500:]}"
    return "a trace on stderr: " + result.stderr[-1500:] if "Traceback" in result.stderr else ""


@pytest.mark.long
def test_every_shown_command_runs(places: Places, tmp_path: Path) -> None:
    commands = without_repetitions([each for each in shown_commands() if kind_of(each) is Kind.RUN])
    failed = []
    environment = os.environ | {"MLFLOW_TRACKING_URI": ""}
    # A signal that ends a command ends the JVM of its process, too.
    with CommandProcess(tmp_path, environment) as process, CommandProcess(tmp_path, environment) as ended_by_signal:
        for command in commands:
            words = filled_in(command.words, places)
            if words[0] == "mlflow":
                result = mlflow_ui(words, tmp_path)
            else:
                words = words if words[:3] == TRAINER else words[1:]
                result = (ended_by_signal if words[0] == "explore" else process).run(words, service_of(words, places))
            print(f"{result.seconds:6.1f} s  {command}")
            if problem := mistake(words, result):
                failed.append(f"{command}: {problem}")
    assert not failed, "\n\n".join(failed)
