"""The command: help, versions, exit codes, a dry run that starts nothing, and what the driver must not import."""

import dataclasses
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs import cli, stage_runner, stages
from jobs.stage import Options
from jobs.summary import mlflow_command
from jobs.text import as_json
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import ConfigError, CorpusError
from miniplm_udf.streams import status as statuses
from miniplm_udf.streams.status import QueryStatus
from tests.support.right_experiment import Place
from tests.support.stage_summaries import summary_of

REPOSITORY = Path(__file__).resolve().parents[2]
CONF = REPOSITORY / "conf"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in cli.COMMANDS)


def test_no_command_and_a_wrong_one_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert cli.main(["scroe"]) == 2
    assert "did you mean 'score'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: miniplm {name}" in capsys.readouterr().out


STAGES = [stage.name for stage in (*stages.STAGES, *stages.SERVICES)]


def outcomes_both_ways(
    stage: str, arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[object, str, str]]:
    """Exit code, stdout and last line of stderr of a stage, as a command and as a file that spark-submit runs."""
    outcomes = []
    file = str(REPOSITORY / "jobs" / f"{stage}.py")
    for line in (["miniplm", stage, *arguments], [file, *arguments]):
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as ended:
            sys.exit(cli.main()) if line[0] == "miniplm" else runpy.run_path(file, run_name="__main__")
        printed = capsys.readouterr()
        outcomes.append((ended.value.code, printed.out, printed.err.strip().rpartition("\n")[2]))
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_one_help_and_one_dry_run_however_it_is_started(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a command, and as a file that spark-submit runs."""
    config = ["-c", str(Place(tmp_path).file())]
    for arguments, expected in ((["--help"], f"usage: miniplm {stage}"), ([*config, "--dry-run"], "\nplan:\n")):
        outcomes = outcomes_both_ways(stage, arguments, capsys, monkeypatch)
        assert outcomes[0] == outcomes[1]
        assert outcomes[0][0] == 0
        assert expected in outcomes[0][1]
    assert not (tmp_path / "root").exists()


def test_a_stage_is_a_file_that_runs_outside_the_repository(tmp_path: Path) -> None:
    line = [sys.executable, str(REPOSITORY / "jobs" / "score.py"), "-c", str(CONF / "demo.yaml"), "--dry-run"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(line, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment)
    assert "score  would run" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_both_ways_to_start_a_stage_print_the_same_and_exit_alike(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the work of the stage and Spark's session are replaced."""
    config = ["-c", str(CONF / "demo.yaml"), f"root={tmp_path}/root", "proxy={}", "annotate.language=true"]
    config += [f"ingest.input={Place(tmp_path).texts}"]
    config += ["generate={prompt_tokens: 64, new_tokens: 64}", "train.steps=2", "train.warmup_steps=0"]
    stage = stages.stage_named(name)
    summary = summary_of(stage)
    has_rejects = hasattr(summary, "too_many_rejects")
    if has_rejects:
        summary = dataclasses.replace(summary, too_many_rejects=True)
    summary = stage.with_earlier(None, summary)
    result: Any = summary

    def work(spark: Any, config: ExperimentConfig, options: Options) -> Any:
        if isinstance(result, Exception):
            raise result
        return result

    faked = dataclasses.replace(stage, run=work, listed=None, needs_spark=False, last_line=lambda summary: "the end")
    monkeypatch.setattr(stage_runner, "stage_named", {name: faked}.__getitem__)
    shown, _ = outcomes_both_ways(name, config, capsys, monkeypatch)
    assert shown[1].startswith(f"{name}:")
    command, file = outcomes_both_ways(name, [*config, "--json"], capsys, monkeypatch)
    assert command == file
    code, printed, last_line = command
    assert code == shown[0] == (3 if has_rejects else 0)
    assert json.loads(printed) == {name: json.loads(as_json(stage.to_json(summary)))}
    if has_rejects:
        assert re.fullmatch(
            r"miniplm: exit code 3: .* rejects .*are more than \w+\.max_reject_share=\S+ allows; .*", last_line
        )
    else:
        assert last_line == "the end"
    for result, code in ((CorpusError("nothing there"), 1), (ConfigError("a wrong key"), 2)):
        expected = (code, "", f"miniplm: {type(result).__name__}: {result}")
        assert outcomes_both_ways(name, config, capsys, monkeypatch) == [expected, expected]


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", ["run", "ingest", "reference", "score", "refine", "pack", "train", "evaluate", "report"]
)
def test_dry_run_prints_config_and_plan_and_makes_nothing(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    # Options and overrides may stand in any order.
    config = str(Place(tmp_path).file())
    assert cli.main([stage, f"root={root}", "-c", config, "--dry-run", "pack.shards=3"]) == 0
    shown = capsys.readouterr().out
    assert '"shards": 3' in shown
    assert "would run: it has not finished on this root yet" in shown
    assert not root.exists()


@pytest.mark.slow
def test_dry_runs_and_the_status_load_no_spark(tmp_path: Path) -> None:
    """One process runs them in turn: the dry run of `miniplm run` and of every stage, and `miniplm status`."""
    record = QueryStatus(query="score", lease="score-1", run_id="r", started_at=statuses.now())
    statuses.write(f"file://{tmp_path}/ran", record)
    names = ["run", *(stage.name for stage in stages.STAGES)]
    dry_run = ["-c", str(Place(tmp_path).file()), "--dry-run"]
    commands = [*([name, *dry_run] for name in names), ["status", "--root", f"{tmp_path}/ran"]]
    code = (
        "import json, sys; from jobs import cli\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    code = cli.main(words)\n"
        "    print('>', words[0], code, [m for m in ('pyspark', 'delta', 'torch') if m in sys.modules])"
    )
    line = [sys.executable, "-c", code, json.dumps(commands)]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    results = [line for line in done.stdout.splitlines() if line.startswith("> ")]
    assert results == [f"> {name} 0 []" for name in (*names, "status")]
    assert not (tmp_path / "root").exists()


def test_a_stage_that_the_config_lacks_is_refused_before_spark_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["-c", str(CONF / "demo.yaml"), f"root={tmp_path}/root"]
    assert cli.main(["proxy", *given]) == 2
    assert "proxy: the config has nothing for this stage; expected the section `proxy`" in capsys.readouterr().err
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("name", ["plain", "a b", "ä#b;c&d", 'it\'s "it"', "10:00=@,+"])
def test_the_printed_mlflow_line_can_be_pasted(name: str, tmp_path: Path) -> None:
    from sqlalchemy.engine import make_url

    command = mlflow_command(ExperimentConfig(root=str(tmp_path / name)))
    *words, uri = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert words == ["mlflow", "ui", "--backend-store-uri"]
    assert make_url(uri).database == str(tmp_path / name / "mlflow.db")


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_run_refuses_a_service_before_its_plan(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "experiment.yaml"
    config.write_text(f"root: {tmp_path}/root\nstream: {{trigger: processing_time}}\n")
    assert cli.main(["run", "-c", str(config), *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "stream.trigger: `miniplm run` goes through all stages once" in printed.err


def test_the_help_of_run_lists_the_stages_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    assert " -> ".join(stage.name for stage in stages.STAGES) in capsys.readouterr().out


def test_bad_config_exits_2_without_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "-c", str(CONF / "demo.yaml"), "ingest.inptu=3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("miniplm: ConfigError: ")
    assert "unknown key ingest.inptu; did you mean 'input'?" in error
    assert "Traceback" not in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        ("jobs.cli, jobs.pipeline", "torch pyspark transformers mlflow"),
        ("jobs.status, jobs.corpus, miniplm_udf.corpora.listing", "torch pyspark delta transformers mlflow"),
        ("jobs.ingest, jobs.score, jobs.refine, jobs.pack, jobs.report", "torch transformers"),
        ("miniplm_udf.refinement.refine, miniplm_udf.store.tables", "torch transformers"),
        (
            "trainer.loop, trainer.losses.loss, trainer.models.blocks, trainer.loader.order, trainer.schedule",
            "pyspark mlflow deltalake pyarrow jsonargparse yaml",
        ),
        pytest.param("trainer.train, trainer.evaluation.run", "pyspark", marks=pytest.mark.slow),
        (
            "miniplm_udf.scoring.scorer, miniplm_udf.scoring.models",
            "pyspark mlflow deltalake pyarrow jsonargparse yaml",
        ),
    ],
)
def test_what_is_not_loaded(modules: str, forbidden: str) -> None:
    code = f"import sys; import {modules}; print([m for m in {forbidden.split()!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
