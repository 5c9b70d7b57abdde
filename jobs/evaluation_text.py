"""The tables of an evaluation, for a terminal: losses by set of texts, and scores by task as in the paper. Driver only.

Input: the evaluation of each student (`store.model_records.Evaluation`). Output: text. Owns the names
and the order of the columns; `jobs.text.table` aligns them. Reads and writes nothing.
"""

from collections.abc import Mapping

from jobs.text import decimal, table
from miniplm_udf.config.evaluate import HELDOUT, task_columns
from miniplm_udf.store.model_records import Evaluation, TaskEvaluation, TextLoss

_LOSSES = ("nats/token", "mean of instances", "official loss", "bits/byte")


def evaluation_text(students: Mapping[str, Evaluation | None]) -> str:
    """Returns evaluations as text: one table of losses, and one of tasks if there are any.

    Args:
        students: evaluations by name of the student; None: it has none, and is left out.
    """
    evaluations = {name: evaluation for name, evaluation in students.items() if evaluation is not None}
    sets = {name: evaluation.sets for name, evaluation in evaluations.items()}
    rows = [
        (texts, name, numbers[texts].n_tokens, *(decimal(loss) for loss in _losses(numbers[texts])))
        for texts in dict.fromkeys([HELDOUT, *(texts for numbers in sets.values() for texts in numbers)])
        for name, numbers in sets.items()
        if texts in numbers
    ]
    parts = [table(("texts", "student", "tokens", *_LOSSES), rows, "  ")] if rows else []
    if scores := {name: each.tasks for name, each in evaluations.items() if each.tasks is not None}:
        parts.append(_task_table(scores))
    return "\n\n".join(parts)


def _losses(loss: TextLoss) -> tuple[float | None, ...]:
    """The losses in the order of the columns."""
    return loss.nats_per_token, loss.nats_per_instance_mean, loss.official_loss, loss.bits_per_byte


def _task_table(students: Mapping[str, TaskEvaluation]) -> str:
    """The paper's table: a row a student, a column a task, accuracies in percent, and their average.

    A student that lacks a task has no average to compare.
    """
    tasks = task_columns(task for each in students.values() for task in each.scores)
    rows = []
    for name, each in students.items():
        scores = each.scores
        shown = [_percent(scores[task].value) if task in scores else None for task in tasks]
        rows.append((name, *shown, _percent(each.average) if None not in shown else None))
    return table(("student", *tasks.values(), "Avg."), rows, "  ")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"
