"""Markdown: writes tables, and reads the code blocks of pages. Pure."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[ \t]*(?P<rest>[^\n]*)\n(?P<text>.*?)^(?P=indent)```\s*$", re.M | re.S
)


@dataclasses.dataclass(frozen=True)
class CodeBlock:
    """A fenced code block of a page.

    Attributes:
        page: name of the page's file.
        line: number of the line on which the block begins, from 1.
        language: the first word after the fence; empty if there is none.
        title: text of `title="..."` after the language; empty if there is none.
        text: the lines between the fences.
    """

    page: str
    line: int
    language: str
    title: str
    text: str


def code_blocks(page: Path) -> list[CodeBlock]:
    """Returns the fenced code blocks of a page, in order.

    Args:
        page: a Markdown file.
    """
    text = page.read_text(encoding="utf-8")
    blocks = []
    for match in _FENCE.finditer(text):
        title = re.search(r'title="([^"]*)"', match["rest"])
        line = text.count("\n", 0, match.start()) + 1
        blocks.append(CodeBlock(page.name, line, match["language"], title[1] if title else "", match["text"]))
    return blocks


def cell(text: object) -> str:
    """Returns text for a cell of a table: on a single line, with the characters that Markdown would read escaped.

    Args:
        text: any value.
    """
    plain = " ".join(str(text).split()).replace("|", "\\|")
    # Outside of code, <NAME> would be an HTML tag.
    return "".join(
        part if part.startswith("`") else part.replace("<", "&lt;").replace("*", "\\*")
        for part in re.split(r"(`[^`]*`)", plain)
    )


def with_pipes_in_code(text: str) -> str:
    """Returns a page whose tables have plain pipes in inline code: GitHub wants `\\|` there, and Python-Markdown `|`.

    Args:
        text: a page.
    """
    lines = text.split("\n")
    return "\n".join(
        re.sub(r"`[^`]*`", lambda span: span[0].replace("\\|", "|"), line) if line.startswith("|") else line
        for line in lines
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns a table.

    Args:
        head: the heads of the columns.
        rows: the cells of each row; text between backticks stays as it is.
    """
    lines = [head, ["---"] * len(head), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def code(text: object) -> str:
    """Returns text as inline code; nothing for empty text.

    Args:
        text: any value.
    """
    plain = str(text)
    return f"`{plain}`" if plain else ""
