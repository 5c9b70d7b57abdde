"""The shell commands that the documentation shows: taken out of code blocks, and checked without running them.

`commands_in` reads a block of bash into simple commands, with its loops and variables filled in. `mistakes` checks a
command: the options with its own parser, the overrides with the dataclasses of the config, paths and modules with the
repository. A tool that is not ours has to be named in `TOOLS`.
"""

import argparse
import configparser
import contextlib
import importlib.util
import io
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from docs.site import parsers
from jobs.cli import COMMANDS
from miniplm_udf.config.collecting import check_sections
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.overrides import apply_override
from miniplm_udf.errors import ConfigError
from miniplm_udf.storage import Json

REPOSITORY = Path(__file__).resolve().parents[2]
# Programs of others. The documentation shows few of them, and no test runs them.
TOOLS = {"aws", "cp", "docker", "export", "mlflow", "source", "venv-pack"}
_SEPARATORS = ";&|\n"
_COMMAND_OF_MODULE = {"pipeline": "run", "inspect_corpus": "inspect", "demo_text": "demo-text"}


def _simple_commands(text: str) -> Iterator[list[str]]:
    """The words of each simple command, without quotes; variables stay as they are."""
    joined = re.sub(r"(?m)(^|\s)#.*$", "", text.replace("\\\n", " "))
    lexer = shlex.shlex(joined, posix=True, punctuation_chars=_SEPARATORS)
    lexer.whitespace_split, lexer.whitespace, lexer.commenters = True, " \t\r", ""
    words: list[str] = []
    for word in lexer:
        if set(word) <= set(_SEPARATORS):
            yield words
            words = []
        else:
            words.append(word)
    yield words


def _filled_in(words: Sequence[str], variables: dict[str, list[str]]) -> Iterator[list[str]]:
    """The command for each value of the loop's variable; a variable that is a word of its own may be several words."""
    used = [name for name in variables if re.search(rf"\${name}\b", " ".join(words))]
    if not used:
        yield list(words)
        return
    name, rest = used[0], {key: value for key, value in variables.items() if key != used[0]}
    for value in variables[name]:
        filled: list[str] = []
        for word in words:
            filled += shlex.split(value) if word == f"${name}" else [re.sub(rf"\${name}\b", value, word)]
        yield from _filled_in(filled, rest)


def commands_in(text: str) -> list[list[str]]:
    """Returns the simple commands of a block of bash, as lists of words.

    Args:
        text: the block; `for` loops over words, assignments and line continuations are understood.
    """
    variables: dict[str, list[str]] = {}
    commands: list[list[str]] = []
    for simple in _simple_commands(text):
        words = simple[1:] if simple[:1] == ["do"] else simple
        if not words or words == ["done"]:
            continue
        if words[0] == "for":
            variables[words[1]] = words[3:]
            continue
        while words and (match := re.fullmatch(r"([A-Za-z_]\w*)=(.*)", words[0], re.S)):
            variables[match[1]] = [match[2]]
            words = words[1:]
        if words:
            commands += _filled_in(words, variables)
    return commands


def override_mistakes(config: str | None, overrides: Sequence[str]) -> list[str]:
    """Returns what is wrong with overrides of a config: a file of `conf/` that is not there, an unknown key.

    Args:
        config: the path after `-c`; a placeholder stands for any config.
        overrides: `key=value`. Values are not checked: making a whole config takes a third of a second.
    """
    if config is not None and config.startswith("conf/") and not (REPOSITORY / config).is_file():
        return [f"no file {config}"]
    raw: Json = {"root": "root"}
    try:
        for override in overrides:
            apply_override(raw, override, ExperimentConfig)
    except ConfigError as error:
        return [str(error)]
    return unknown_keys(raw)


def unknown_keys(raw: Json) -> list[str]:
    """Returns the messages about keys that a config does not have; the config may be a part of one.

    Args:
        raw: the config.
    """
    return [problem for problem in check_sections(raw, ExperimentConfig).problems if "unknown key" in problem]


def parse_mistakes(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """Returns what is wrong with a command line.

    Args:
        parser: the parser of the command.
        words: the words after the command.
    """
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages), contextlib.redirect_stdout(io.StringIO()):
            parsed = parser.parse_intermixed_args(list(words))
    except SystemExit as end:
        return [messages.getvalue().strip().splitlines()[-1]] if end.code else []
    return override_mistakes(getattr(parsed, "config", None), getattr(parsed, "overrides", []))


def _of_miniplm(words: Sequence[str]) -> list[str]:
    if words[0].startswith("-"):
        return []  # `miniplm --help`
    if words[0] not in COMMANDS:
        return [f"unknown command {words[0]}"]
    if words[0] != "corpus":
        return parse_mistakes(parsers.parser_of(words[0]), words[1:])
    if words[1] not in parsers.corpus_actions():
        return [f"unknown action {words[1]}"]
    return parse_mistakes(parsers.parser_of("corpus", words[1:]), words[2:])


def _of_trainer(words: Sequence[str]) -> list[str]:
    actions = parsers.trainer_parsers()
    return parse_mistakes(actions[words[0]], words[1:]) if words[0] in actions else [f"unknown action {words[0]}"]


def _of_spark_submit(words: Sequence[str]) -> list[str]:
    place = next((i for i, word in enumerate(words) if re.search(r"(^|/)jobs/\w+\.py$", word)), None)
    if place is None:
        return ["expected a file of jobs/"]
    module = Path(words[place]).stem
    if not (REPOSITORY / "jobs" / f"{module}.py").is_file():
        return [f"no file jobs/{module}.py"]
    before = list(words[:place])
    files = [before[i + 1] for i, word in enumerate(before) if word == "--properties-file"]
    missing = [f"no file {file}" for file in files if not (REPOSITORY / file).is_file()]
    return missing + _of_miniplm([_COMMAND_OF_MODULE.get(module, module), *words[place + 1 :]])


def _of_python(words: Sequence[str]) -> list[str]:
    if words[:2] == ["-m", "trainer"]:
        return _of_trainer(words[2:])
    if words[0] != "-m" or importlib.util.find_spec(words[1]) is None:
        return [f"no module {words[1]}"]
    return []


def _of_torchrun(words: Sequence[str]) -> list[str]:
    place = list(words).index("-m")
    return _of_trainer(words[place + 2 :]) if words[place + 1] == "trainer" else ["expected -m trainer"]


def _of_make(words: Sequence[str]) -> list[str]:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = [word for word in words if "=" not in word]
    return [f"no target {each}" for each in targets if not re.search(rf"^{re.escape(each)}:", makefile, re.M)]


def _of_pytest(words: Sequence[str]) -> list[str]:
    paths = [word for word in words if word.startswith("tests/")]
    return [f"no file {path}" for path in paths if not (REPOSITORY / path).exists()]


def _of_pip(words: Sequence[str]) -> list[str]:
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    names = [name for word in words for name in re.findall(r"^miniplm\[([\w,]+)\]$", word)]
    extras = {extra for name in names for extra in name.split(",")}
    return [f"no extra {extra}" for extra in sorted(extras - set(config["options.extras_require"]))]


_CHECKS: dict[str, Callable[[Sequence[str]], list[str]]] = {
    "miniplm": _of_miniplm,
    "spark-submit": _of_spark_submit,
    "python": _of_python,
    "torchrun": _of_torchrun,
    "make": _of_make,
    "pytest": _of_pytest,
    "pip": _of_pip,
}


def mistakes(words: Sequence[str]) -> list[str]:
    """Returns what is wrong with a command; empty if nothing is, as far as can be seen without running it.

    Args:
        words: the words of a simple command.
    """
    if words[0] in TOOLS:
        return []
    return _CHECKS[words[0]](words[1:]) if words[0] in _CHECKS else [f"unknown program {words[0]}"]
