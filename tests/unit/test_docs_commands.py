"""The code that the documentation shows: commands, overrides, YAML, Python and names of config keys.

A command is parsed by its own parser, and has a kind, which says whether `tests/e2e/test_shown_commands.py` runs it or
why not. Only the two calculations whose output the pages show are run here.
"""

import ast
import contextlib
import dataclasses
import importlib
import io
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from docs.site import parsers
from docs.site.configuration import sections
from docs.site.markdown import CodeBlock, code_blocks
from jobs.cli import COMMANDS
from miniplm_udf.config.experiment import ExperimentConfig
from tests.support.shell_blocks import commands_in, mistakes, unknown_keys
from tests.support.shown_commands import (
    PAGES,
    REPOSITORY,
    Kind,
    Places,
    ShownCommand,
    filled_in,
    kind_of,
    shown_commands,
    without_repetitions,
)

OURS = ("jobs", "miniplm_udf", "trainer")
# Sections whose names begin no key of another system.
SECTIONS = ("annotate", "evaluate", "generate", "ingest", "pack", "proxy", "refine", "report", "score", "stream")


def blocks(language: str) -> list[CodeBlock]:
    """The code blocks of a language on all pages."""
    return [block for page in PAGES for block in code_blocks(page) if block.language == language]


def prose(page: Path) -> str:
    """The text of a page outside of its code blocks."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def test_every_command_is_one_that_its_parser_takes() -> None:
    assert [f"{command}: {mistake}" for command in shown_commands() for mistake in mistakes(command.words)] == []


def test_commands_stand_in_blocks() -> None:
    """An indented line has no title, and no test takes it."""
    assert [
        f"{page.name}: {line}" for page in PAGES for line in re.findall(r"^    (miniplm [a-z].*)$", prose(page), re.M)
    ] == []


def test_every_command_is_run_or_says_why_not() -> None:
    assert [str(command) for command in shown_commands() if kind_of(command) is None] == []


def names_left(words: Sequence[str]) -> list[str]:
    """Words of a command that is to be run in which a name of the pages, or a path elsewhere, stays."""
    places = Places(**{field.name: f"<{field.name}>" for field in dataclasses.fields(Places)})
    pattern = re.compile(r"(^|=)/|\b[A-Z]{4,}\b|://(bucket|HOST)")
    return [word for word in filled_in(words, places) if pattern.search(word)]


def test_no_command_that_is_run_names_a_file_of_a_reader() -> None:
    run = [command for command in shown_commands() if kind_of(command) is Kind.RUN]
    assert {str(command): left for command in run if (left := names_left(command.words))} == {}
    assert len(without_repetitions(run)) > 50


@pytest.mark.parametrize(
    ("line", "title", "kind"),
    [
        ("miniplm score -c conf/demo.yaml", "", Kind.RUN),
        ("miniplm score -c conf/demo.yaml", "Needs a cluster", Kind.NEEDS),
        ("miniplm score -c conf/demo.yaml", "Needs patience", None),
        ("torchrun --standalone -m trainer train -c CONF", "", None),
        ("spark-submit --master yarn jobs/score.py -c CONF", "", None),
        ("aws s3 ls", "", None),
        ("make wheel", "", None),
        ("make bench-score", "", Kind.LONG),
        ("make test", "", Kind.ANOTHER_TEST),
    ],
)
def test_a_command_has_its_kind(line: str, title: str, kind: Kind | None) -> None:
    assert kind_of(ShownCommand("page.md", 1, title, tuple(line.split()))) is kind


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ("miniplm run -c conf/demo.yaml root=/data/run1", []),
        ("miniplm run -c conf/demo.yaml root=/scratch/run1", ["root=/scratch/run1"]),
        ("miniplm run -c CONFIG root=s3a://bucket/run1", ["root=s3a://bucket/run1"]),
        ("miniplm export CORPUS -c CONFIG --to parquet", ["CORPUS"]),
        ("miniplm score -c FILE", ["FILE"]),
    ],
)
def test_a_name_without_a_replacement_is_seen(line: str, left: list[str]) -> None:
    assert names_left(line.split()) == left


def test_commands_that_differ_in_values_are_run_once() -> None:
    lines = ["inspect a --side kept -n 5", "inspect b -n 9 --side kept", "inspect a --side dropped -n 5", "refine"]
    shown = [ShownCommand("page.md", 1, "", ("miniplm", *line.split(), "-c", "CONF")) for line in lines[::-1]]
    assert [command.words[1:3] for command in without_repetitions(shown)] == [
        ("inspect", "a"), ("inspect", "b"), ("refine", "-c"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "mistake"),
    [
        ("miniplm scoer -c conf/demo.yaml", "unknown command"),
        ("miniplm score -c conf/demo.yaml --wrokers 8", "unrecognized arguments"),
        ("miniplm score -c conf/demo.yaml score.wrokers=8", "did you mean 'workers'"),
        ("miniplm score -c CONFIG score.wrokers=8", "did you mean 'workers'"),
        ("miniplm score -c conf/demo.yml", "no file conf/demo.yml"),
        ("miniplm corpus pine difference -c conf/demo.yaml", "unknown action pine"),
        ("miniplm export difference -c conf/demo.yaml", "--to"),
        (
            "spark-submit --properties-file conf/spark/lokal.conf jobs/score.py -c x.yaml",
            "no file conf/spark/lokal.conf",
        ),
        ("for s in score scoer; do\n  spark-submit jobs/$s.py -c x.yaml\ndone", "no file jobs/scoer.py"),
        ("python -m trainer train -c conf/demo.yaml --studnet x", "unrecognized arguments"),
        ("torchrun --standalone -m trainer train -c x.yaml train.stesp=1", "did you mean 'steps'"),
        ('SET="train.steps=20 train.stesp=1"\npython -m trainer train -c conf/demo.yaml $SET', "stesp"),
        ("python -m tests.bench.bench_nothing", "no module"),
        ("make bench-nothing", "no target"),
        ("pytest tests/unit/test_nothing.py", "no file"),
        ("pip install 'miniplm[scoer]'", "no extra"),
        ("true && frobnicate --all", "unknown program"),
    ],
)
def test_a_wrong_command_is_seen(command: str, mistake: str) -> None:
    messages = [message for words in commands_in(command) for message in mistakes(words)]
    assert any(mistake in message for message in messages), messages


def test_a_block_for_a_cluster_says_so() -> None:
    elsewhere = re.compile(r"\btorchrun\b|--master (spark:|k8s:|yarn)|spark\.master=")
    assert [
        f"{block.page}:{block.line}"
        for block in blocks("bash")
        if elsewhere.search(block.text) and not block.title.startswith("Needs ")
    ] == []


def test_commands_in_the_text_exist_and_have_the_options() -> None:
    wrong = []
    for page in PAGES:
        for text in re.findall(r"`miniplm ([^`]+)`", prose(page)):
            words = text.split()
            if words[0].isupper() or words[0].startswith("-"):
                continue
            if words[0] not in COMMANDS:
                wrong.append(f"{page.name}: miniplm {text}")
                continue
            is_action = words[0] == "corpus" and len(words) > 1 and words[1] in parsers.corpus_actions()
            options = parsers.parser_of(words[0], words[1:2] if is_action else [])._option_string_actions
            wrong += [f"{page.name}: {text}" for word in words if word.startswith("--") and word not in options]
    assert wrong == []


def test_every_yaml_block_has_keys_of_the_config() -> None:
    names = set(ExperimentConfig.__dataclass_fields__)
    checked = 0
    for block in blocks("yaml"):
        raw = yaml.safe_load(block.text)
        if isinstance(raw, dict) and set(raw) & names:
            assert unknown_keys(raw) == [], f"{block.page}:{block.line}"
            checked += 1
    assert checked > 20


def test_every_config_key_in_the_text_exists() -> None:
    known = {f"{section.path}.{key.name}" for section in sections() for key in section.keys}
    known |= {section.path for section in sections()}
    known |= {re.sub(r"\.NAME$", "", name) for name in known}
    pattern = re.compile(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_.]+)(?:: [^`]*|=[^`]*)?`")
    wrong = [
        f"{page.name}: {key}"
        for page in PAGES
        for key in pattern.findall(prose(page))
        if not key.endswith((".py", ".md", ".html", ".json")) and key not in known
    ]
    assert wrong == []


def test_every_python_block_compiles_and_its_imports_exist() -> None:
    for block in blocks("python"):
        for node in ast.walk(ast.parse(block.text, f"{block.page}:{block.line}")):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OURS:
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert missing == [], f"{block.page}:{block.line}: {node.module} has no {missing}"


@pytest.mark.parametrize("name", ["paper-recipe.md", "trillion-tokens.md"])
def test_a_calculation_prints_what_the_page_shows(name: str) -> None:
    program, shown = [
        block for block in code_blocks(REPOSITORY / "docs" / name) if block.language in ("python", "text")
    ]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(program.text, name, "exec"), {})
    assert printed.getvalue().splitlines() == shown.text.splitlines()
