"""`miniplm evaluate`: no Spark, one student by name, and the tables that it prints."""

import dataclasses
import json
from pathlib import Path

import pytest

from jobs import cli, evaluate, stage_runner, train
from jobs.evaluation_text import evaluation_text
from jobs.stage import Options
from jobs.stages import stage_named
from jobs.summary import build_summary, summary_text
from miniplm_udf import storage
from miniplm_udf.config.evaluate import PAPER_TASKS
from miniplm_udf.config.experiment import ExperimentConfig, load_config
from miniplm_udf.layout import EVALUATION_FILE
from miniplm_udf.store.model_records import Evaluation, SetEvaluation, TextLoss
from tests.support import model_records
from tests.support.model_records import set_evaluation

CONF = Path(__file__).resolve().parents[2] / "conf"


def losses(nats: float | None) -> SetEvaluation:
    return set_evaluation(TextLoss(
        nats_per_token=nats, nats_per_instance_mean=nats, official_loss=nats, bits_per_byte=nats, n_instances=40,
        n_tokens=1234, n_bytes=5000,
    ))  # fmt: skip


def evaluation(*tasks: str) -> Evaluation:
    scores = {task: 0.25 + i / 100 for i, task in enumerate(tasks)}
    return model_records.evaluation({"dclm": losses(None), "heldout": losses(2.5)}, scores)


def write_evaluation(config: ExperimentConfig, name: str, numbers: Evaluation) -> None:
    storage.write_json(config.layout.model(name, EVALUATION_FILE), dataclasses.asdict(numbers))


def test_losses_and_tasks_are_printed_as_tables() -> None:
    reverse = list(reversed(PAPER_TASKS))
    students = {"miniplm": evaluation("mine", *reverse), "other": evaluation(*reverse), "third": evaluation()}
    text = evaluation_text(students)
    loss_table, task_table = text.split("\n\n")
    lines = [line.split() for line in loss_table.splitlines()]
    assert [line[:2] for line in lines[1:4]] == [["heldout", name] for name in students]
    assert lines[1][2:] == ["1,234", *["2.5000"] * 4]
    assert lines[4] == ["dclm", "miniplm", "1,234", *["-"] * 4]
    head, first, second = task_table.splitlines()
    columns = ["HellaSwag", "LAMBADA", "WinoGrande", "OpenBookQA", "ARC-e", "ARC-c", "PIQA", "SIQA", "StoryCloze"]
    assert head.split() == ["student", *columns, "mine", "Avg."]
    assert first.split() == ["miniplm", *[f"{34 - i}.0" for i in range(9)], "25.0", "29.5"]
    assert second.split()[-2:] == ["-", "-"]  # without one of the tasks, the average compares with nothing


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The trainer's command lines; no trainer and no Spark is started."""
    lines: list[list[str]] = []
    monkeypatch.setattr(stage_runner, "spark_session", None)
    for job in (evaluate, train):
        monkeypatch.setattr(
            job, "run_trainer", lambda command, path, overrides, *options: lines.append([command, *options])
        )
    return lines


def test_one_student_without_spark(
    tmp_path: Path, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-c", str(CONF / "demo.yaml"), f"root={tmp_path}/root"]
    config = load_config(CONF / "demo.yaml", [f"root={tmp_path}/root"])
    write_evaluation(config, "miniplm", evaluation("piqa"))
    assert cli.main(["evaluate", *arguments, "--student", "miniplm", "--json"]) == 0
    printed = capsys.readouterr()
    students = json.loads(printed.out)["evaluate"]["students"]
    assert students == {"miniplm": storage.read_json(config.layout.model("miniplm", EVALUATION_FILE))}
    assert "PIQA" in printed.err
    assert started == [["evaluate", "--student", "miniplm"]]
    # A part of the stage leaves no record, so that `miniplm run` evaluates the others.
    assert stage_named("evaluate").record(config) is None
    write_evaluation(config, "conventional", evaluation())
    assert cli.main(["evaluate", *arguments]) == 0
    assert started[1:] == [["evaluate"]]
    assert stage_named("evaluate").record(config) is not None
    assert cli.main(["train", *arguments]) == 0
    assert started[2:] == [["train"]]


@pytest.mark.slow
def test_the_stage_runs_again_for_another_set_or_file(tmp_path: Path) -> None:
    texts = tmp_path / "a.jsonl"
    texts.write_text('{"text": "x"}')

    def fingerprint(*overrides: str) -> str | None:
        config = load_config(CONF / "demo.yaml", [f"root={tmp_path}/root", *overrides])
        return stage_named("evaluate").fingerprint(None, config)

    inputs = f"evaluate.inputs={{a: {{path: {texts}}}}}"
    before = [fingerprint(), fingerprint(inputs), fingerprint("evaluate.tasks=[paper]")]
    assert len(set(before)) == 3
    assert fingerprint(inputs) == before[1]
    texts.write_text('{"text": "xy"}')
    assert fingerprint(inputs) != before[1]


@pytest.mark.parametrize(
    ("overrides", "applies"),
    [
        ([], True),
        (["ingest.split.heldout=0"], False),
        (["ingest.split.heldout=0", "evaluate.tasks=[paper]"], True),
        (["ingest.split.heldout=0", "evaluate.inputs={a: {path: x}}"], True),
        (["students={}"], False),
    ],
)
def test_the_stage_needs_students_and_texts_or_tasks(overrides: list[str], applies: bool, tmp_path: Path) -> None:
    config = load_config(CONF / "demo.yaml", [f"root={tmp_path}/root", *overrides])
    assert stage_named("evaluate").applies(config) is applies
    assert Options(students=["a"]).students == ["a"]


def test_the_summary_has_the_heldout_losses_and_the_tasks(tmp_path: Path) -> None:
    config: ExperimentConfig = load_config(CONF / "demo.yaml", [f"root={tmp_path}/root"])
    without = model_records.evaluation({"dclm": losses(3.0)})
    for name, numbers in {"miniplm": evaluation("piqa"), "conventional": without}.items():
        write_evaluation(config, name, numbers)
    summary = build_summary(config)
    assert summary["students"] == {"miniplm": {"heldout_nats_per_token": 2.5, "heldout_bits_per_byte": 2.5}}
    text = summary_text(config, summary, Options())
    assert "PIQA" in text
    assert "3.0000" in text
