"""The page of the commands: what each does, its usage and its options, from the argparse parsers.

Input: `jobs.cli.COMMANDS`, the parser of each command, and the parsers of the trainer. Output: a Markdown page.
"""

import argparse
import re

from docs.site import parsers
from docs.site.markdown import cell, code, table
from jobs.cli import COMMANDS

_HEAD = """# Commands

`miniplm COMMAND -c CONFIG [options] [key=value ...]`. This page is generated from the parsers of the commands.
Exit codes: 0 done; 1 failed; 2 bad config or usage; 3 done, with more rejects than `max_reject_share` allows;
128 + signal: stopped by a signal. Each Spark stage is also a file for spark-submit, `jobs/NAME.py`.
"""


def _option(action: argparse.Action) -> str:
    names = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    takes_value = bool(action.option_strings) and action.nargs != 0
    value = action.metavar or (
        "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    )
    return code(f"{names} {value}" if takes_value else names)


def _meaning(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    return f"{text} (required)" if action.required and action.option_strings else text


def _options(parser: argparse.ArgumentParser) -> str:
    actions = [
        action
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
        and action.help is not argparse.SUPPRESS
    ]
    return table(("option", "meaning"), [(_option(action), _meaning(parser, action)) for action in actions])


def _entry(title: str, summary: str, parser: argparse.ArgumentParser, level: int = 2) -> str:
    usage = re.sub(r"\s+", " ", parser.format_usage()).removeprefix("usage: ").strip()
    return f"{'#' * level} `{title}`\n\n{summary}\n\n```text\n{usage}\n```\n\n{_options(parser)}"


def _description(parser: argparse.ArgumentParser) -> str:
    text = (parser.description or "").strip()
    return f"\n\n```text\n{text}\n```" if text else ""


def page() -> str:
    """Returns the page of the commands."""
    rows = [(f"[`miniplm {name}`](#miniplm-{name})", summary) for name, summary in COMMANDS.items()]
    parts = [_HEAD, table(("command", "what it does"), rows)]
    for name, summary in COMMANDS.items():
        parser = parsers.parser_of(name)
        parts.append(_entry(f"miniplm {name}", summary + "." + _description(parser), parser))
        if name == "corpus":
            for action in parsers.corpus_actions():
                inner = parsers.parser_of("corpus", [action])
                title = f"miniplm corpus {action}"
                parts.append(_entry(title, f"{inner.description or ''}.", inner, level=3))
    parts.append("## The trainer\n\nThe stages `reference`, `train` and `evaluate` start it; it needs no JVM.\n")
    for action, parser in parsers.trainer_parsers().items():
        parts.append(_entry(f"python -m trainer {action}", cell(parser.description or ""), parser, level=3))
    return "\n".join(parts)
