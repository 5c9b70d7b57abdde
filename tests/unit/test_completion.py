"""The completion scripts, sourced by the shells themselves: bash, and zsh and fish where they are installed."""

import os
import pty
import select
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from jobs import cli, completion

CASES = [
    ("sco", "score"),
    ("score --deb", "--debug"),
    ("refine --foll", "--follow"),
    ("corpus take", "take-down"),
    ("corpus diff --ex", "--examples"),
]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    for shell in completion.SHELLS:
        (folder / f"miniplm.{shell}").write_text(completion.script(shell))
    return folder


def in_bash(script: Path, words: str) -> str:
    """The words that bash offers for the last word."""
    code = (
        f"source {shlex.quote(str(script))}; COMP_WORDS=(miniplm {words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); "
        '_shtab_miniplm miniplm "${COMP_WORDS[COMP_CWORD]}"; echo "${COMPREPLY[@]}"'
    )
    return subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize(("words", "completed"), CASES)
def test_bash_completes_commands_and_options(scripts: Path, words: str, completed: str) -> None:
    assert in_bash(scripts / "miniplm.bash", words) == completed


def test_bash_completes_files_and_choices(scripts: Path, tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").touch()
    assert in_bash(scripts / "miniplm.bash", f"run -c {tmp_path}/exp") == f"{tmp_path}/experiment.yaml"
    assert in_bash(scripts / "miniplm.bash", "export --to ''") == "jsonl.zst jsonl.gz jsonl parquet"


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize(("words", "completed"), CASES)
def test_fish_completes_commands_and_options(scripts: Path, words: str, completed: str) -> None:
    code = f"source {scripts}/miniplm.fish; complete -C 'miniplm {words}'"
    offered = subprocess.run(["fish", "--no-config", "-c", code], capture_output=True, text=True, check=True).stdout
    assert [line.split("\t")[0] for line in offered.splitlines()] == [completed]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_completes_commands_and_options(scripts: Path) -> None:
    """Keys on a pseudo-terminal; zsh completes nothing without one."""
    keys, side = pty.openpty()
    environment = {**os.environ, "TERM": "dumb", "PS1": "> "}
    shell = subprocess.Popen(
        ["zsh", "-f", "-i"], stdin=side, stdout=side, stderr=side, start_new_session=True, env=environment
    )

    def shows(text: str) -> bool:
        shown, end = "", time.monotonic() + 20
        while text not in shown and time.monotonic() < end:
            if select.select([keys], [], [], 0.1)[0]:
                shown += os.read(keys, 4096).decode(errors="replace")
        return text in shown

    try:
        line = f'autoload -Uz compinit; compinit -u -D; eval "$(< {scripts}/miniplm.zsh)"; print rea""dy\n'
        os.write(keys, line.encode())
        assert shows("ready\r\n")
        for words, completed in CASES:
            os.write(keys, f"\x15miniplm {words}\t".encode())
            assert shows(completed), words
    finally:
        shell.kill()
        shell.wait()
        os.close(keys)
        os.close(side)


def test_every_command_has_its_parser_and_the_options_of_all() -> None:
    assert all(command in completion.script("bash") for command in cli.COMMANDS)
    for name in cli.COMMANDS:
        options = {option for action in completion._parser_of(name)._actions for option in action.option_strings}
        assert {"--json", "--debug"} <= options, name
