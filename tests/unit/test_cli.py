"""The command: help, versions, exit codes, a dry run that starts nothing, and what the driver must not import."""

import subprocess
import sys
from pathlib import Path

import pytest

from jobs import cli

CONF = Path(__file__).resolve().parents[2] / "conf"


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


@pytest.mark.parametrize(
    "stage", ["run", "ingest", "reference", "score", "refine", "pack", "train", "evaluate", "report"]
)
def test_dry_run_prints_config_and_plan_and_makes_nothing(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    # Options and overrides may stand in any order.
    assert cli.main([stage, f"root={root}", "-c", str(CONF / "pile_qwen.yaml"), "--dry-run", "pack.shards=3"]) == 0
    shown = capsys.readouterr().out
    assert '"shards": 3' in shown
    assert "would run" in shown
    assert not root.exists()


def test_bad_config_exits_2_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "-c", str(CONF / "demo.yaml"), "ingest.inptu=3"]) == 2
    error = capsys.readouterr().err
    assert "ConfigError: unknown key ingest.inptu; did you mean 'input'?" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        ("jobs.cli, jobs.pipeline", "torch pyspark transformers mlflow"),
        ("jobs.ingest, jobs.score, jobs.refine, jobs.pack, jobs.report", "torch transformers"),
        ("miniplm_udf.refinement.refine, miniplm_udf.tables", "torch transformers"),
        (
            "trainer.loop, trainer.loss, trainer.order, trainer.schedule",
            "pyspark mlflow deltalake pyarrow jsonargparse yaml",
        ),
        pytest.param("trainer.train, trainer.evaluate", "pyspark", marks=pytest.mark.slow),
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
