"""How a command ends: one line for any error, a trace only with --debug, silence when the reader of stdout has gone."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs import cli, status
from jobs.command import guarded
from jobs.reject_text import over_limit
from miniplm_udf import failures, progress


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *words], capture_output=True, text=True, check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


def fail(error: Exception) -> Any:
    def body() -> int:
        raise error

    return body


def test_an_unexpected_error_is_one_line_and_its_trace_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path))
    monkeypatch.delenv(progress.LEVEL_VARIABLE, raising=False)
    assert guarded(fail(KeyError("score\nand more"))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    trace = tmp_path / "last-trace.txt"
    assert line.startswith("miniplm: KeyError: ")
    assert "run the same command again with --debug" in line
    assert str(trace) in line
    assert "Traceback" in trace.read_text()


@pytest.mark.parametrize("is_asked_for", [True, False])
def test_a_trace_is_shown_only_with_debug(
    is_asked_for: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path))
    monkeypatch.delenv(progress.LEVEL_VARIABLE, raising=False)
    with caplog.at_level(logging.DEBUG, logger="miniplm"):
        assert guarded(fail(RuntimeError("broken")), is_asked_for) == 1
    assert ("Traceback" in caplog.text) == is_asked_for
    assert progress.LEVEL_VARIABLE not in os.environ


def test_the_option_and_the_variable_do_the_same(tmp_path: Path) -> None:
    words = ["status", "--root", str(tmp_path / "nothing")]
    plain, option = run(*words, MINIPLM_LOG_LEVEL="INFO"), run(*words, "--debug")
    variable = run(*words, MINIPLM_LOG_LEVEL="DEBUG")
    assert plain.returncode == option.returncode == variable.returncode == 1
    assert ["Traceback" in done.stderr for done in (plain, option, variable)] == [False, True, True]
    assert len(plain.stderr.splitlines()) == 1


def test_a_missing_package_is_named_with_its_extra() -> None:
    error = ModuleNotFoundError("No module named 'pyspark'", name="pyspark.sql")
    line = failures._missing_package(error)
    assert line is not None
    assert line.startswith("the package pyspark is not installed: pip install 'miniplm[spark]'")
    assert failures._missing_package(ModuleNotFoundError(name="my_own_module")) is None


def test_the_extra_of_the_program_is_named_first() -> None:
    line = failures._missing_package(ModuleNotFoundError(name="torch"), "train")
    assert line is not None
    assert line.startswith("the package torch is not installed: pip install 'miniplm[train]'")


def test_a_package_that_executors_miss_is_named() -> None:
    quoted = "Error from python worker:\nModuleNotFoundError: No module named 'tokenizers'\n"
    line = failures._missing_package(RuntimeError(quoted))
    assert line is not None
    assert line.startswith("the package tokenizers is not installed for the Python of an executor: pip install 'mini")
    assert failures._missing_package(RuntimeError("ModuleNotFoundError: No module named 'my_own_module'")) is None


def test_the_line_of_a_java_error_says_what_failed() -> None:
    text = "An error occurred while calling o42.save.\n: java.lang.IllegalStateException: no space\n\tat x.y(Z.java:1)"
    assert failures.summary(RuntimeError(text)) == "java.lang.IllegalStateException: no space"


@pytest.mark.parametrize("words", [["--help"], ["refine", "--rules"], ["run", "--help"], ["completion", "bash"]])
def test_a_reader_that_has_gone_is_no_error(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *words], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    # argparse itself ignores that its help cannot be written.
    assert done.returncode == 141 or (words[-1] == "--help" and done.returncode == 0)
    assert done.stderr == ""


def test_another_broken_pipe_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path))
    assert guarded(fail(BrokenPipeError("a connection"))) == 1
    assert "BrokenPipeError" in capfd.readouterr().err


def test_an_interrupt_before_the_command_begins_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(argv: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(status, "main", interrupted)
    assert cli.main(["status"]) == 130
    assert capsys.readouterr().err == "miniplm: stopped by SIGINT; run the same command again to continue\n"


def test_rules_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--rules", "--json"], ["--json", "--rules"]):
        with pytest.raises(SystemExit):
            cli.main(["refine", *words])
        assert json.loads(capsys.readouterr().out)["miniplm"]["score"]


def test_a_dry_run_as_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    conf = Path(__file__).resolve().parents[2] / "conf" / "demo.yaml"
    assert cli.main(["score", "-c", str(conf), f"root={tmp_path}/root", "--dry-run", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["config"]["root"] == f"file://{tmp_path}/root"
    assert "would run" in shown["plan"][0]


def test_exit_code_3_names_the_rejects_and_the_key() -> None:
    line = over_limit("ingest", 7, {"nul_byte": 2, "invalid_json": 5, "empty_text": 0}, "ingest.max_reject_share", 0.05)
    assert line == (
        "exit code 3: ingest: 7 rejects (invalid_json 5, nul_byte 2) are more than ingest.max_reject_share=0.05 allows"
    )
