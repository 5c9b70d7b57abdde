"""Tasks through lm-eval, on tiny local copies of the paper's nine, without a network."""

import importlib.util
import json
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from miniplm_udf.config.evaluate import PAPER_TASKS
from miniplm_udf.config.experiment import ExperimentConfig, load_config
from miniplm_udf.config.targets import student_target
from miniplm_udf.errors import ConfigError
from miniplm_udf.store.model_records import read_training
from tests.support.local_tasks import write_tasks
from tests.support.tracking_store import own_tracking_store
from tests.support.trainer_roots import MakeConfig, make_root, write_config
from trainer.evaluation import losses, run
from trainer.evaluation.records import EvaluateResult
from trainer.tracking.store import connect
from trainer.train import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a trained student, and a folder of tasks; to be copied."""
    folder = tmp_path_factory.mktemp("trained")
    config = make_root(folder)
    with own_tracking_store():
        train(config, student_target(config, "small"))
    write_tasks(folder / "tasks")
    return folder


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Refuses every connection, and lists who was called."""
    called: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> None:
        called.append(address)
        raise ConnectionRefusedError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: refuse(socket.socket(), host))
    return called


@pytest.fixture
def make(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeConfig]:
    """Makes the config of a copy of the root, with overrides; without held-out text, to be quick."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)

    def config(*overrides: str) -> ExperimentConfig:
        fixed = ["ingest.split.heldout=0", f"evaluate.tasks_folder={tmp_path}/tasks"]
        return load_config(write_config(tmp_path, tmp_path / "root"), [*fixed, *overrides])

    with own_tracking_store():
        yield config


def evaluate(config: ExperimentConfig) -> EvaluateResult:
    return run.evaluate(config, [student_target(config, "small")])["small"]


def test_one_task_and_what_is_recorded_of_it(make: MakeConfig, connections: list[Any], tmp_path: Path) -> None:
    config = make("evaluate.tasks=[piqa]")
    # The questions' two answers are the same text, so every answer is as likely as the other: the first is chosen.
    (tmp_path / "tasks/piqa.jsonl").write_text(
        "\n".join(json.dumps({"goal": "g", "sol1": "tea", "sol2": "tea", "label": label}) for label in (0, 0, 0, 1))
    )
    result = evaluate(config)
    tasks = result.evaluation.tasks
    assert tasks is not None
    score = tasks.scores["piqa"]
    assert (score.metric, score.value, score.n_questions, score.version) == ("acc_norm", 0.75, 4, "1.0")
    assert score.stderr == pytest.approx(0.25)
    assert (tasks.average, tasks.lm_eval_version) == (0.75, importlib.metadata.version("lm-eval"))
    training = read_training(config, "small")
    assert training is not None
    logged = connect(config).MlflowClient().get_run(training.run_id).data
    assert (logged.metrics["tasks/piqa"], logged.metrics["tasks/average"]) == (0.75, 0.75)
    assert logged.tags["task_version/piqa"] == "1.0"
    assert logged.tags["lm_eval_version"] == tasks.lm_eval_version
    assert evaluate(config).skipped
    (tmp_path / "tasks/piqa.jsonl").write_text(json.dumps({"goal": "g", "sol1": "a", "sol2": "b", "label": 0}))
    assert not evaluate(config).skipped
    assert connections == []


def test_the_nine_tasks_of_the_paper(make: MakeConfig, connections: list[Any]) -> None:
    """lm-eval's own definitions of the nine, each with a few questions of ours."""
    tasks = evaluate(make("evaluate.tasks=[paper]")).evaluation.tasks
    assert tasks is not None
    assert list(tasks.scores) == list(PAPER_TASKS)
    metrics = {name: score.metric for name, score in tasks.scores.items()}
    with_norm = {"hellaswag", "openbookqa", "arc_easy", "arc_challenge", "piqa"}
    assert metrics == {name: "acc_norm" if name in with_norm else "acc" for name in PAPER_TASKS}
    assert all(score.n_questions == 4 and 0 <= score.value <= 1 for score in tasks.scores.values())
    assert tasks.average == pytest.approx(sum(score.value for score in tasks.scores.values()) / 9)
    assert connections == []


def test_the_example_of_the_docs_is_a_task(make: MakeConfig, tmp_path: Path) -> None:
    """The YAML file of Story Cloze in docs/evaluation.md, with questions in the columns that it names."""
    text = (Path(__file__).resolve().parents[2] / "docs/evaluation.md").read_text()
    (example,) = (block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "dataset_kwargs" in block)
    (tmp_path / "tasks/storycloze_2016.yaml").write_text(example)
    tasks = evaluate(make("evaluate.tasks=[storycloze_2016]")).evaluation.tasks
    assert tasks is not None
    assert (tasks.scores["storycloze_2016"].metric, tasks.scores["storycloze_2016"].version) == ("acc", "1.0")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param(
            ["evaluate.tasks=[piqq]"],
            "expected names of lm-eval tasks or paper, found 'piqq'; did you mean 'piqa'",
            marks=pytest.mark.long,  # it reads all of lm-eval's tasks
        ),
        (["evaluate.tasks=[piqa, lost]"], r"the task lost cannot be loaded with its data \(.*evaluate\.tasks_folder"),
        (
            ["evaluate.tasks=[perplexity]"],
            "expected a task with acc_norm or acc, found perplexity with word_perplexity",
        ),
        (["evaluate.tasks=[piqa]", "evaluate.tasks_folder=/nowhere"], "expected a local folder.*/nowhere"),
    ],
)
def test_a_task_that_cannot_run_is_refused(
    make: MakeConfig, tmp_path: Path, overrides: list[str], message: str
) -> None:
    lost = json.loads((tmp_path / "tasks/piqa.yaml").read_text())
    lost |= {"task": "lost", "dataset_kwargs": {"data_files": {"validation": "no_such.jsonl"}}}
    perplexity = {
        **{key: value for key, value in lost.items() if key != "include"},
        "task": "perplexity",
        "dataset_kwargs": {"data_files": {"validation": "piqa.jsonl"}},
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{goal}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    for task in (lost, perplexity):
        (tmp_path / f"tasks/{task['task']}.yaml").write_text(json.dumps(task))
    with pytest.raises(ConfigError, match=message):
        evaluate(make(*overrides))


def test_a_wrong_task_is_refused_before_texts_are_scored(
    make: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses.EvaluatedModel, "score", None)
    (tmp_path / "tasks/piqa.jsonl").unlink()
    with pytest.raises(ConfigError, match="the task piqa cannot be loaded"):
        evaluate(make("evaluate.tasks=[piqa]", "ingest.split.heldout=0.01"))


def test_a_missing_library_is_named(make: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    with pytest.raises(ConfigError, match=r"expected the package lm-eval.*pip install 'miniplm\[eval\]'"):
        evaluate(make("evaluate.tasks=[piqa]"))
