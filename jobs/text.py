"""Results as text for a terminal: tables, JSON, and dataclasses as plain data. Driver only.

Every command prints its tables with `table` and its JSON with `as_json`. Reads and writes nothing.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any


def table(head: Sequence[str] | None, rows: Sequence[Sequence[Any]], indent: str = "") -> str:
    """Formats rows as left-aligned columns.

    Args:
        head: names of the columns; None prints no head.
        rows: cells; a row may have fewer than the widest. None is shown as `-`, an integer with commas between its
            thousands, a float with 6 digits.
        indent: put before every line.

    Returns:
        One line a row, without a newline at the end.
    """
    lines = [*([tuple(head)] if head is not None else []), *(tuple(map(cell, row)) for row in rows)]
    n_columns = max(map(len, lines), default=0)
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(n_columns)]
    return "\n".join(
        indent + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=False)).rstrip()
        for line in lines
    )


def cell(value: Any) -> str:
    """Returns the text of one value, as `table` shows it.

    Args:
        value: a number, a text or None; any other value is shown as `str` formats it.
    """
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)


def decimal(value: float | None) -> str | None:
    """Returns a loss with 4 decimals; None stays None, which `table` shows as `-`.

    Args:
        value: the loss, or None.
    """
    return None if value is None else f"{value:.4f}"


def plain(value: Any) -> Any:
    """Returns a dataclass, or a list or dict of dataclasses, as plain data, and any other value as it is.

    Args:
        value: any value.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def as_json(value: Any) -> str:
    """Returns a result as indented JSON; a value that JSON does not know becomes a string.

    Args:
        value: plain data or dataclasses.
    """
    # A terminal of another encoding could not print the letters.
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return json.dumps(plain(value), indent=2, default=str, ensure_ascii=not is_utf8)
