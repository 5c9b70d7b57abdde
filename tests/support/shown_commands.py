"""The commands that the documentation shows: where they stand, whether a test runs them, and on which files.

`shown_commands` takes them out of the pages: blocks of bash, and whole commands in the text (with a config or a root).
`kind_of` says whether a command is run, or why not: the closed list `Kind`. `filled_in` puts the files of a small
experiment in the place of the files that the pages name. Nothing is run here: `tests/e2e/test_shown_commands.py` does.
"""

import argparse
import dataclasses
import enum
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from docs.site import parsers
from docs.site.markdown import code_blocks
from tests.support.commands import TRAINER
from tests.support.shell_blocks import commands_in

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [*sorted((REPOSITORY / "docs").glob("*.md")), REPOSITORY / "README.md"]

# The replacements: a name or a path of the pages, and the field of `Places` that takes its place. `CONFIGS` has the
# files after `-c`; `REPLACEMENTS` has patterns, which are applied in this order to all other words.
CONFIGS = {
    **dict.fromkeys(("CONF", "CONFIG", "conf/demo.yaml", "conf/pile_qwen.yaml", "experiment.yaml"), "{config}"),
    "conf/pile_seqkd.yaml": "{seqkd}",
}
REPLACEMENTS = (
    (r"/data/run1\b|\bbuild/demo\b", "{root}"),
    (r"/data/run2\b", "{other_root}"),
    (r"/data/(?=difference)", "{folder}/"),
    (r"(/my/texts|/pile)/\*\.jsonl(\.zst)?", "{texts}"),
    (r"^(Qwen/Qwen2\.5-0\.5B|NAME_OR_FOLDER)$", "{teacher}"),
    (r"^NAME$", "{student}"),
    (r"\b(8765|9400)$", "{port}"),
    (r"^difference@2$", "difference"),
    # The steps of the pages take minutes.
    (r"^train\.steps=200$", "train.steps=4"),
    (r"^train\.save_every_steps=20$", "train.save_every_steps=2"),
)
# The titles of blocks that no test runs.
NEEDS = {
    "Needs a bucket",
    "Needs a clone",
    "Needs a cluster",
    "Needs a GPU cluster",
    "Needs a hub model",
    "Needs Docker",
    "Needs GPUs",
}
# Overrides that only name the files of an experiment; all commands get the same files.
_PLACES = {"ingest.input", "root"}
# Commands that leave the tables and the models as they are.
_READ_ONLY = {
    *("compare", "corpus diff", "corpus list", "corpus pin", "corpus show", "doctor", "estimate", "explore", "init"),
    *("inspect", "status", "verify"),
}


class Kind(enum.StrEnum):
    """The closed list of what the tests do with a command, and of the reasons not to run it."""

    RUN = "it is run on a small experiment"
    NEEDS = "the title of its block says what it needs; in a sentence, its own words do"
    ANOTHER_TEST = "another test, or CI, runs it"
    LONG = "the whole demo, a benchmark or a fault run, which takes minutes to hours"
    SET_UP = "prepares the shell"


@dataclasses.dataclass(frozen=True)
class ShownCommand:
    """A command on a page.

    Attributes:
        page: name of the page's file.
        line: number of the line on which its block or its sentence begins, from 1.
        title: the title of its block; empty if there is none.
        words: the command.
    """

    page: str
    line: int
    title: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Places:
    """The files and names of a test that take the place of those on the pages.

    Attributes:
        config: the config of a small experiment whose stages have run.
        seqkd: the same with a section `generate` and a student on the generated texts.
        root: the root of that experiment.
        other_root: another root with students.
        texts: a pattern of input files.
        teacher: the folder of a model.
        folder: a folder to write into.
        student: the name of a student.
        port: a port that nothing listens on.
    """

    config: str
    seqkd: str
    root: str
    other_root: str
    texts: str
    teacher: str
    folder: str
    student: str
    port: str


def shown_commands() -> list[ShownCommand]:
    """Returns the commands of all pages, in their order."""
    return [command for page in PAGES for command in sorted(_of_page(page), key=lambda command: command.line)]


def _of_page(page: Path) -> Iterator[ShownCommand]:
    for block in code_blocks(page):
        if block.language == "bash":
            for words in commands_in(block.text):
                yield ShownCommand(block.page, block.line, block.title, tuple(words))
    text = page.read_text(encoding="utf-8")
    # The lines of a block stay as empty lines, so that the numbers of the lines after it are right.
    prose = re.sub(r"^ *```.*?^ *```", lambda block: "\n" * block[0].count("\n"), text, flags=re.M | re.S)
    for span in re.finditer(r"`((?:miniplm|python -m|make|spark-submit|torchrun) [^`]+)`", prose):
        is_whole = re.search(r" -c | --root |^make ", span[1]) and not re.search(r"[\[…]|\.\.\.", span[1])
        if is_whole:
            line = prose.count("\n", 0, span.start()) + 1
            for words in commands_in(span[1].replace("\n", " ")):
                yield ShownCommand(page.name, line, "", tuple(words))


def kind_of(command: ShownCommand) -> Kind | None:
    """Returns what the tests do with a command; None if nothing says it.

    Args:
        command: a command on a page.
    """
    first, *rest = command.words
    if command.title.startswith("Needs "):
        return Kind.NEEDS if command.title in NEEDS else None
    if any("//HOST" in word for word in rest):
        return Kind.NEEDS
    if first == "make":
        target = rest[0]
        return Kind.LONG if re.match("demo$|faults$|bench-", target) else _target_kind(target)
    if command.words[:2] == ("python", "-m") and rest[1].startswith("tests.bench."):
        return Kind.LONG
    if list(command.words[:4]) == [*TRAINER, "scaling"]:
        return Kind.ANOTHER_TEST  # tests/unit/test_scaling.py, which first writes runs that determine a law
    if first == "source":
        return Kind.SET_UP
    is_ours = first == "miniplm" or list(command.words[:3]) == TRAINER
    return Kind.RUN if is_ours or command.words[:2] == ("mlflow", "ui") else None


def _target_kind(target: str) -> Kind | None:
    """The kind of `make TARGET`: CI runs `make test`, and this `setup`; tests build the site and run the notebooks."""
    targets = ("check", "docs", "notebooks", "setup", "test", "test-long")
    return Kind.ANOTHER_TEST if target in targets else None


def filled_in(words: Sequence[str], places: Places) -> list[str]:
    """Returns a command with a test's own files in the place of those that the page names.

    Args:
        words: the command.
        places: what takes the place of the names.
    """
    values = dataclasses.asdict(places)
    filled: list[str] = []
    for word in words:
        if filled[-1:] == ["-c"]:
            filled.append(CONFIGS.get(word, word).format(**values))
            continue
        for pattern, replacement in REPLACEMENTS:
            word = re.sub(pattern, replacement.format(**values), word)
        filled.append(word)
    return filled


def signature(words: Sequence[str]) -> tuple[object, ...]:
    """Returns what two commands have in common that differ in their values only: the command, the names of its options
    and overrides, and the values of options that have a list of choices.

    Args:
        words: a command that is run (`Kind.RUN`).
    """
    if words[0] == "mlflow":
        return tuple(words[:2])
    parser, name, rest = _parser(words)
    parsed = vars(parser.parse_intermixed_args(rest))
    chosen = {action.dest for action in parser._actions if action.choices is not None}
    options = tuple(
        (dest, str(value) if dest in chosen else "")
        for dest, value in sorted(parsed.items())
        if dest != "overrides" and value != parser.get_default(dest)
    )
    keys = tuple(sorted({override.split("=")[0] for override in parsed.get("overrides") or ()} - _PLACES))
    config = parsed.get("config")
    return name, options, keys, CONFIGS.get(str(config), config)


def _parser(words: Sequence[str]) -> tuple[argparse.ArgumentParser, str, list[str]]:
    """The parser of a command, the command's name, and the words that the parser takes."""
    if list(words[:3]) == TRAINER:
        return parsers.trainer_parsers()[words[3]], f"trainer {words[3]}", list(words[4:])
    if words[1] == "corpus":
        return parsers.parser_of("corpus", words[2:]), f"corpus {words[2]}", list(words[3:])
    return parsers.parser_of(words[1]), words[1], list(words[2:])


def writes(words: Sequence[str]) -> bool:
    """Returns whether a command that is run may write under the root.

    Args:
        words: the command.
    """
    name = "ui" if words[0] == "mlflow" else _parser(words)[1]
    return not (name in _READ_ONLY or name == "ui" or "--dry-run" in words)


def without_repetitions(commands: Sequence[ShownCommand]) -> list[ShownCommand]:
    """Returns the commands that are run: the first of those that differ in their values only, readers before writers.

    Args:
        commands: commands of the kind `Kind.RUN`.
    """
    first: Mapping[object, ShownCommand] = {signature(each.words): each for each in reversed(commands)}
    kept = [each for each in commands if first[signature(each.words)] is each]
    return sorted(kept, key=lambda each: writes(each.words))
