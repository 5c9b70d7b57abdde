"""The base install: every command answers `--help` and `--dry-run` where no package of an extra can be imported."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import COMMANDS
from jobs.stages import SERVICES, STAGES
from tests.support.right_experiment import Place
from tests.support.without_packages import base_distributions, modules_of_extras, run_without

HEAVY = {"pyspark", "delta", "torch", "pyarrow", "numpy", "pandas", "tokenizers", "transformers", "deltalake", "mlflow"}
PROGRAM = """
import contextlib, io, json
from jobs import cli

def ending(words):
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code = cli.main(words)
        except SystemExit as end:
            code = end.code
    return [code, output.getvalue(), errors.getvalue()]

print(json.dumps([ending(words) for words in json.loads(sys.argv[1])]))
"""


def endings(folder: Path, command_lines: list[list[str]]) -> list[tuple[int, str, str]]:
    """Exit codes, outputs and messages of commands, which one process runs after each other."""
    done = run_without(modules_of_extras(), PROGRAM, folder, json.dumps(command_lines))
    assert done.returncode == 0, done.stderr[-3000:]
    results: list[Any] = json.loads(done.stdout)
    return [(code, output, errors) for code, output, errors in results]


def test_the_packages_that_cannot_be_imported() -> None:
    assert modules_of_extras() >= HEAVY
    assert {"pyyaml", "jsonargparse", "fsspec"} <= base_distributions()
    assert not {"yaml", "jsonargparse", "fsspec", "sqlglot", "tqdm"} & modules_of_extras()


def test_a_blocked_module_cannot_be_imported(tmp_path: Path) -> None:
    done = run_without({"numpy"}, "import numpy.linalg", tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'numpy'"


def test_every_command_has_help(tmp_path: Path) -> None:
    for command, (code, output, errors) in zip(
        COMMANDS, endings(tmp_path, [[command, "--help"] for command in COMMANDS]), strict=True
    ):
        assert (code, errors) == (0, ""), command
        assert output.startswith(f"usage: miniplm {command}")


def test_init_names_a_similar_teacher(tmp_path: Path) -> None:
    place = Place(tmp_path)
    words = ["init", "--input", str(place.texts), "--teacher", f"{place.folder}/teachr", "--out", f"{tmp_path}/e.yaml"]
    ((code, _, errors),) = endings(tmp_path, [words])
    assert code == 1
    assert errors.rstrip().endswith(f"needs pip install 'miniplm[score]'; did you mean '{place.teacher}'?")


def test_every_stage_has_a_dry_run(tmp_path: Path) -> None:
    config = str(Place(tmp_path).file())
    names = ["run", *(stage.name for stage in (*STAGES, *SERVICES))]
    for name, (code, output, errors) in zip(
        names, endings(tmp_path, [[name, "--dry-run", "-c", config] for name in names]), strict=True
    ):
        assert (code, errors) == (0, ""), f"{name}: {errors}"
        assert "plan:" in output


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("ingest", "miniplm: the package pyspark is not installed: pip install 'miniplm[spark]'"),
        ("estimate", "miniplm: the package pyarrow is not installed: pip install 'miniplm[spark]'"),
    ],
)
def test_a_command_that_needs_an_extra_names_it(command: str, message: str, tmp_path: Path) -> None:
    ((code, _, errors),) = endings(tmp_path, [[command, "-c", str(Place(tmp_path).file())]])
    assert code == 1
    assert errors.splitlines()[-1].startswith(message)


def test_the_commands_that_work_without_any_extra(tmp_path: Path) -> None:
    config = str(Place(tmp_path).file())
    doctor, completion, status, corpora = endings(
        tmp_path,
        [["doctor"], ["completion", "bash"], ["status", "-c", config], ["corpus", "list", "-c", config]],
    )
    assert (doctor[0], completion[0]) == (0, 0)
    assert "the base commands can run" in doctor[1]
    assert status[0] == corpora[0] == 1
    assert "nothing ran here yet" in status[2]
    assert "expected a Delta table, found none" in corpora[2]
