"""Stages: their plan without Spark, records of summaries, exit codes; and how commands print tables and JSON."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jobs import plan, records, refine, stage_runner, stages
from jobs.command import Command, exit_code
from jobs.stage import Options, Stage
from jobs.stage_inputs import train_inputs
from jobs.stages import STAGES, stage_named
from jobs.text import as_json, table
from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig, load_config
from miniplm_udf.errors import ConfigError, CorpusError
from tests.support.stage_summaries import summary_of

CONF = Path(__file__).resolve().parents[2] / "conf"


@dataclasses.dataclass(frozen=True)
class Summary:
    kept: dict[str, int]
    too_many_rejects: bool = False


@pytest.fixture
def config(tmp_path: Path) -> ExperimentConfig:
    return load_config(CONF / "demo.yaml", [f"root={tmp_path}/root"])


def make_table(config: ExperimentConfig, name: str, version: int = 0) -> None:
    storage.write_text(storage.join(config.layout.table(name), "_delta_log", f"{version:020}.json"), "{}")


def finish(config: ExperimentConfig, stage: Stage) -> None:
    """Makes the outputs of a stage and its record."""
    for name in stage.outputs(config).tables:
        make_table(config, name)
    for uri in stage.outputs(config).files:
        storage.write_text(uri, "{}")
    summary = stage.to_json(summary_of(stage))
    records.write_record(config, stage.name, str(stage.fingerprint(None, config)), summary, 12.0)


def outcomes(config: ExperimentConfig, names: list[str], **options: Any) -> dict[str, str]:
    """The first line of each stage's plan."""
    chosen = [stage_named(name) for name in names]
    text = plan.plan_text(chosen, config, Options(**options), is_named=False)
    return {line.split()[0]: line.strip() for line in text.splitlines() if line.split()[0] in names}


def test_a_plan_follows_the_records_and_the_tables(config: ExperimentConfig) -> None:
    names = ["score", "refine", "pack"]
    assert all("would run: it has not finished on this root yet" in line for line in outcomes(config, names).values())
    for name in ("instances", "annotations"):
        make_table(config, name)
    for name in names:
        finish(config, stage_named(name))
    assert all("would be skipped: unchanged" in line for line in outcomes(config, names).values())
    make_table(config, "instances", version=1)
    found = outcomes(config, names)
    assert "would run: its config or its inputs have changed" in found["score"]
    assert "would run if score changes score_matrix" in found["refine"]
    assert "would run if refine changes refined/" in found["pack"]
    finish(config, stage_named("score"))
    storage.remove_folder(config.layout.table("refined/difference"))
    found = outcomes(config, names)
    assert "would be skipped" in found["score"]
    assert "would run: refined/difference is missing" in found["refine"]


def test_a_plan_of_user_files_says_that_only_spark_lists_them(config: ExperimentConfig) -> None:
    finish(config, stage_named("ingest"))
    assert "would run if its config or its input files have changed" in outcomes(config, ["ingest"])["ingest"]
    text = plan.plan_text([stage_named("ingest")], config, Options(), is_named=True)
    assert "would run again, because you named it" in text
    assert "writes  instances, rejects" in text


def test_a_plan_keeps_the_reference_and_refuses_to_replace_a_lost_one(config: ExperimentConfig) -> None:
    assert "would run: it has not finished" in outcomes(config, ["reference"])["reference"]
    finish(config, stage_named("reference"))
    assert "would be skipped: it exists" in outcomes(config, ["reference"])["reference"]
    assert "would run: --retrain-reference" in outcomes(config, ["reference"], retrain_reference=True)["reference"]
    storage.write_json(config.layout.model_record("reference"), {})
    storage.remove_folder(config.layout.model("reference"))
    assert "would be refused: reference" in outcomes(config, ["reference"])["reference"]


def test_a_service_leaves_no_record_and_a_plan_says_so(config: ExperimentConfig) -> None:
    assert "would run as a service" in outcomes(config, ["stream"])["stream"]
    assert "would run as a service" in outcomes(config, ["refine"], follow=True)["refine"]
    with pytest.raises(ConfigError, match="expected together with --follow"):
        Options(corpora=["kept"])


def test_refine_follows_with_its_option_alone(config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "run", lambda spark, config: "refined")
    monkeypatch.setattr(refine, "follow", lambda spark, config, names: names)
    stage = stage_named("refine")
    assert stage.run(None, config, Options()) == "refined"
    assert stage.run(None, config, Options(follow=True, corpora=["kept"])) == ["kept"]


def test_every_stage_is_described_once() -> None:
    names = [stage.name for stage in (*STAGES, *stages.SERVICES)]
    assert len(names) == len(set(names))
    for stage in (*STAGES, *stages.SERVICES):
        assert stage.help
        assert stage.description
        assert f"miniplm {stage.name} -c" in stage.description
        assert f"jobs/{stage.name}.py -c" in stage.description


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_record_gives_back_the_summary(stage: Stage, config: ExperimentConfig) -> None:
    summary = summary_of(stage)
    assert summary.__dataclass_params__.frozen
    records.write_record(config, stage.name, "f", stage.to_json(summary), 1.23456)
    record = stage.record(config)
    assert record is not None
    assert record.summary == summary
    assert (record.fingerprint, record.seconds) == ("f", 1.235)
    raw = storage.read_json(config.layout.stage(stage.name))
    assert raw["summary"] == json.loads(as_json(stage.to_json(summary)))
    # A record of an earlier release lacks a key: the stage runs again.
    raw["summary"].popitem()
    storage.write_json(config.layout.stage(stage.name), raw)
    assert stage.record(config) is None
    del raw["fingerprint"]
    storage.write_json(config.layout.stage(stage.name), raw)
    with pytest.raises(CorpusError, match=rf"{stage.name}.json: expected \['fingerprint', 'seconds', 'summary'\]"):
        stage.record(config)


def test_a_stage_that_never_finished_has_no_record(config: ExperimentConfig) -> None:
    assert stage_named("score").record(config) is None


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("annotate", "path version new_annotated annotated"),
        ("proxy", "revision path fitted_on heldout rows flops fit_seconds warnings seconds"),
        ("refine", "kept refined seconds"),
        ("pack", "packed seconds"),
        ("reference", "packed seconds model"),
        ("train", "students"),
        ("evaluate", "students"),
        ("report", "report seconds"),
    ],
)
def test_the_keys_of_a_summary_are_public(name: str, keys: str) -> None:
    stage = stage_named(name)
    assert list(stage.to_json(summary_of(stage))) == keys.split()


@pytest.mark.parametrize("name", [stage.name for stage in STAGES if stage.name != "report"])
def test_every_stage_before_the_report_changes_its_fingerprint(name: str, config: ExperimentConfig) -> None:
    report, stage = stage_named("report"), stage_named(name)
    before = report.fingerprint(None, config)
    records.write_record(config, name, "f", stage.to_json(summary_of(stage)), 1.0)
    assert report.fingerprint(None, config) != before


def test_rates_of_an_earlier_scoring_stay() -> None:
    score = stage_named("score")
    earlier = summary_of(score, tokens_per_second={"teacher": 10.0, "old": 3.0})
    summary = summary_of(score, tokens_per_second={"teacher": None, "reference": 5.0})
    rates = {"teacher": 10.0, "old": 3.0, "reference": 5.0}
    assert score.with_earlier(earlier, summary) == dataclasses.replace(summary, tokens_per_second=rates)
    assert score.with_earlier(None, summary).tokens_per_second == {"reference": 5.0}


def test_exit_codes_of_summaries() -> None:
    summaries = (None, object(), Summary({}), Summary({}, too_many_rejects=True))
    assert [exit_code(summary) for summary in summaries] == [0, 0, 0, 3]


def test_a_table_aligns_its_columns_and_formats_numbers() -> None:
    rows = [("a", 1234, None), ("long name", 0.123456789, "x"), ("short",)]
    assert table(("name", "number", ""), rows, "  ").splitlines() == [
        "  name       number", "  a          1,234     -", "  long name  0.123457  x", "  short",
    ]  # fmt: skip
    assert table(None, [("a", "b")]) == "a  b"
    assert table(None, []) == ""


def test_json_takes_dataclasses_and_dates() -> None:
    assert json.loads(as_json([Summary({"ä": 1})])) == [{"kept": {"ä": 1}, "too_many_rejects": False}]
    assert "ä" in as_json({"text": "ä"})
    assert json.loads(as_json({"path": Path("/x")})) == {"path": "/x"}


@pytest.mark.parametrize(
    ("options", "code", "printed"),
    [
        ([], 3, "1 kept"),
        (["--json"], 3, '"kept"'),
        (["--upper"], 3, "KEPT"),
        (["--dry-run"], 0, "plan:\nnothing to do"),
    ],
)
def test_a_command_prints_one_format_and_returns_its_code(
    options: list[str], code: int, printed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: ExperimentConfig, arguments: argparse.Namespace) -> Summary:
        return Summary({"a": 1}, too_many_rejects=True)

    command = Command(
        name="try", description=None, run=run, text=lambda summary: f"{len(summary.kept)} kept",
        formats={"upper": lambda summary: "KEPT"}, plan=lambda config, arguments: "nothing to do",
        exit_code=exit_code, takes_root=True,
    )  # fmt: skip
    assert command.main(["--root", str(tmp_path), *options]) == code
    assert printed in capsys.readouterr().out
    assert command.main(["--root", str(tmp_path), "-c", "x.yaml"]) == 2
    assert "try: expected either -c CONFIG or --root ROOT" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["reference", "train", "evaluate", "report"])
def test_no_stage_demands_a_local_folder(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-c", str(CONF / "demo.yaml"), "root=memory://bucket/run"]
    assert stage_runner.stage_main(name, [*arguments, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"{name}  would run" in printed
    assert "writes  memory://bucket/run/" in printed


def test_a_plan_knows_that_files_of_a_model_change_the_model(config: ExperimentConfig) -> None:
    make_table(config, "instances")
    for name in ("reference", "score"):
        finish(config, stage_named(name))
    lines = outcomes(config, ["reference", "score"], retrain_reference=True)
    assert "--retrain-reference" in lines["reference"]
    assert "would run if reference changes" in lines["score"]
    finish(config, stage_named("ingest"))
    lines = outcomes(config, ["ingest", "reference", "score"], retrain_reference=True)
    assert "would run if ingest or reference changes instances, " in lines["score"]
    assert "would run if ingest changes instances" in outcomes(config, ["ingest", "score"])["score"]


@pytest.mark.slow
def test_another_teacher_changes_the_training_of_the_students_that_have_one(tmp_path: Path) -> None:
    def inputs(*overrides: str) -> str:
        config = load_config(CONF / "demo.yaml", [f"root={tmp_path}/root", f"models.expert.path={expert}", *overrides])
        return json.dumps(train_inputs(config))

    expert = tmp_path / "expert"
    expert.mkdir()
    kd = ["tokenizers.bpe8k.path=expert", "students.miniplm.train.kd_teacher=expert"]
    kd += ["students.miniplm.train.kd_ratio=0.5"]
    plain, distilled = inputs(), inputs(*kd)
    dtype = "models.expert.dtype=bfloat16"
    assert inputs(dtype) == plain
    assert inputs(*kd, dtype) != distilled
    (expert / "model.safetensors").write_text("weights")
    assert inputs() == plain
    assert inputs(*kd) != distilled
