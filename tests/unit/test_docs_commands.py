"""The code that the documentation shows: commands, overrides, YAML, Python and names of config keys.

Nothing is run but the two calculations whose output the pages show. A command is parsed by its own parser.
"""

import ast
import contextlib
import importlib
import io
import re
from pathlib import Path

import pytest
import yaml

from docs.site import parsers
from docs.site.configuration import sections
from docs.site.markdown import CodeBlock, code_blocks
from jobs.cli import COMMANDS
from miniplm_udf.config.experiment import ExperimentConfig
from tests.support.shell_blocks import commands_in, mistakes, unknown_keys

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [*sorted((REPOSITORY / "docs").glob("*.md")), REPOSITORY / "README.md"]
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
    wrong = [
        f"{block.page}:{block.line}: {' '.join(words)[:90]}: {mistake}"
        for block in blocks("bash")
        for words in commands_in(block.text)
        for mistake in mistakes(words)
    ]
    # Lines that stand indented in the text.
    wrong += [
        f"{page.name}: {line}: {mistake}"
        for page in PAGES
        for line in re.findall(r"^    (miniplm [a-z].*)$", prose(page), re.M)
        if "|" not in line and "[" not in line
        for words in commands_in(line)
        for mistake in mistakes(words)
    ]
    assert wrong == []


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
