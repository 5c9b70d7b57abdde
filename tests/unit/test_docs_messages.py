"""The page of messages: each quoted message is one that the code can print."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("jobs", "miniplm_udf", "trainer")
# Stands for the parts of a message that differ from case to case.
REST = "…"


def text_of(node: ast.expr) -> str | None:
    """The text of a string in the code, with `REST` for what is filled in; None for another expression."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or REST for part in node.values)
    if isinstance(node, ast.BinOp):
        return (text_of(node.left) or REST) + (text_of(node.right) or REST)
    return None


def texts_of_the_code() -> Iterator[str]:
    """All strings of the packages."""
    for package in PACKAGES:
        for file in sorted((REPOSITORY / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp) and (text := text_of(node)):
                    yield text


def quoted_messages(page: str) -> list[str]:
    """The messages in the first column of the page's tables; a message with backticks stands between double ones."""
    rows = re.findall(r"^\| (?:`` (.+?) ``|`([^`]+)`) \| ", page, re.M)
    return [double or single for double, single in rows]


def is_in(message: str, text: str) -> bool:
    """Whether the fixed parts of a message stand in a text, in order."""
    parts = [part for part in message.split(REST) if part.strip(" :,;.()")]
    return all(part in text for part in parts) and bool(re.search(".*?".join(map(re.escape, parts)), text, re.S))


def test_every_message_of_the_page_is_one_of_the_code() -> None:
    page = (REPOSITORY / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = quoted_messages(page)
    texts = list(dict.fromkeys(texts_of_the_code()))
    rows = re.findall(r"^\| (?!message |---)", page, re.M) + re.findall(r"^\|(?=-)", page, re.M)
    assert len(messages) == len(rows) - page.count("|---|---|---|") > 50
    assert [message for message in messages if not any(is_in(message, text) for text in texts)] == []


def test_a_message_that_the_code_does_not_have_is_seen() -> None:
    assert is_in("config …: no such file", "config …: no such file; conf/demo.yaml is a complete example")
    assert not is_in("config …: no such folder", "config …: no such file; conf/demo.yaml is a complete example")
    assert not is_in("found …: expected", "expected …, found …")
