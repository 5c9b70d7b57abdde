"""The tables of an evaluation, for a terminal: losses by set of texts, and scores by task as in the paper. Driver only.

Input: the content of `evaluation.json` of each student (trainer/evaluation/records.py). Output: text. Owns the names
and the order of the columns; `jobs.text.table` aligns them. Reads and writes nothing.
"""

from collections.abc import Mapping

from jobs.text import table
from miniplm_udf.config.evaluate import HELDOUT, task_columns
from miniplm_udf.storage import Json

_LOSSES = {
    "nats_per_token": "nats/token",
    "nats_per_instance_mean": "mean of instances",
    "official_loss": "official loss",
    "bits_per_byte": "bits/byte",
}


def evaluation_text(summary: Json) -> str:
    """Returns the summary of the stage `evaluate` as text.

    Args:
        summary: `students` holds the evaluations by name.
    """
    students = summary.get("students", {})
    # A record of an earlier release holds only names.
    return evaluation_tables(students) if isinstance(students, dict) else ""


def evaluation_tables(students: Mapping[str, Json]) -> str:
    """Returns a table of losses as text, and a table of tasks if there are any.

    Args:
        students: content of `evaluation.json`, by name of the student.
    """
    sets = {name: evaluation.get("sets", {}) for name, evaluation in students.items()}
    rows = [
        (texts, name, numbers[texts]["n_tokens"], *(_decimal(numbers[texts][key]) for key in _LOSSES))
        for texts in dict.fromkeys([HELDOUT, *(texts for numbers in sets.values() for texts in numbers)])
        for name, numbers in sets.items()
        if texts in numbers
    ]
    parts = [table(("texts", "student", "tokens", *_LOSSES.values()), rows, "  ")] if rows else []
    if scores := {name: each["tasks"] for name, each in students.items() if each.get("tasks")}:
        parts.append(_task_table(scores))
    return "\n\n".join(parts)


def _task_table(students: Mapping[str, Json]) -> str:
    """The paper's table: a row a student, a column a task, accuracies in percent, and their average.

    A student that lacks a task has no average to compare.
    """
    tasks = task_columns(task for each in students.values() for task in each["scores"])
    rows = []
    for name, each in students.items():
        scores = each["scores"]
        shown = [_percent(scores[task]["value"]) if task in scores else None for task in tasks]
        rows.append((name, *shown, _percent(each["average"]) if None not in shown else None))
    return table(("student", *tasks.values(), "Avg."), rows, "  ")


def _decimal(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
