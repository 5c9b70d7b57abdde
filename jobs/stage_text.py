"""The summary of a stage as text for a terminal: one line for each number, one table for each group of outputs.

Input: the summary as JSON (`Stage.to_json`), which `--json` prints whole. Output: text. Values inside the groups that
have parts of their own are left out, and the last line names them. Reads and writes nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.text import cell, table
from miniplm_udf import storage


def stage_text(name: str, summary: Mapping[str, Any], left_out: Sequence[str] = ()) -> str:
    """Returns a summary as text.

    Args:
        name: the stage.
        summary: its summary as JSON.
        left_out: values that are printed elsewhere.
    """
    groups = {key: value for key, value in summary.items() if _is_group(value)}
    rows = [
        row
        for key, value in summary.items()
        # Seconds of the stage's own work; the log has those of the whole stage.
        if key not in (*groups, "seconds") and not _is_empty(value) and value not in left_out
        for row in _rows(_words(key), value)
    ]
    deeper = {
        part: None for group in groups.values() for item in group.values() for part in item if _has_parts(item[part])
    }
    parts = [table(None, rows, "  "), *(_group_table(key, group) for key, group in groups.items())]
    if deeper:
        parts.append(f"  --json prints these too: {', '.join(map(_words, deeper))}")
    return f"{name}:\n" + "\n\n".join(filter(None, parts)) if summary else f"{name}: skipped"


def _is_group(value: Any) -> bool:
    """Whether a value is a dict of dicts: outputs of one kind by name."""
    return isinstance(value, Mapping) and bool(value) and all(isinstance(item, Mapping) for item in value.values())


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value == "" or (isinstance(value, list | Mapping) and not value)


def _has_parts(value: Any) -> bool:
    return isinstance(value, list | Mapping)


def _rows(label: str, value: Any) -> list[tuple[str, str]]:
    """The lines of a value; texts by name have a line each, since paths are long."""
    if isinstance(value, Mapping):
        if any(isinstance(item, str) for item in value.values()):
            return [(f"{label} {name}", _shown(item)) for name, item in value.items()]
        return [(label, ", ".join(f"{name} {_shown(item)}" for name, item in value.items()))]
    return [(label, _shown(value))]


def _group_table(key: str, group: Mapping[str, Mapping[str, Any]]) -> str:
    columns = dict.fromkeys(
        name
        for item in group.values()
        for name in item
        if not any(_has_parts(each.get(name)) for each in group.values())
    )
    rows = [(name, *(_shown(item.get(column)) for column in columns)) for name, item in group.items()]
    return table((_words(key), *map(_words, columns)), rows, "  ")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, str) and value.startswith("file:"):
        return storage.local_path(value)
    return cell(value)


def _words(key: str) -> str:
    return key.removeprefix("n_").replace("_", " ")
