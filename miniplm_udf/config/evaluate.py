"""The section `evaluate` of an experiment: the texts and the tasks on which trained models are evaluated.

Frozen dataclasses, checked when they are made, as in sections.py. Owns the names of the paper's nine tasks
(arXiv 2410.17215). docs/evaluation.md describes the numbers. Imports nothing heavy.
"""

import dataclasses
import types
from collections.abc import Iterable, Mapping
from typing import Literal

from miniplm_udf.config.sections import check, check_name

PAPER = "paper"  # stands for the nine tasks in `evaluate.tasks`
LM_EVAL_MISSING = (
    "evaluate.tasks: expected the package lm-eval, which runs the tasks, found none; install it with "
    "`pip install 'miniplm[eval]'`, or remove the key"
)
HELDOUT = "heldout"  # name of the set of the experiment's own held-out text
# Task of lm-eval by the name of its column in the paper's table, in the order of the columns.
PAPER_TASKS: Mapping[str, str] = types.MappingProxyType(
    {
        "hellaswag": "HellaSwag",
        "lambada_openai": "LAMBADA",
        "winogrande": "WinoGrande",
        "openbookqa": "OpenBookQA",
        "arc_easy": "ARC-e",
        "arc_challenge": "ARC-c",
        "piqa": "PIQA",
        "social_iqa": "SIQA",
        "storycloze_2016": "StoryCloze",
    }
)


def task_columns(names: Iterable[str]) -> dict[str, str]:
    """The columns of a table of tasks: the paper's tasks first, in its order.

    Args:
        names: names of tasks; duplicates count once.

    Returns:
        The head of the column, by name of the task.
    """
    every = dict.fromkeys(names)
    return {task: PAPER_TASKS.get(task, task) for task in [*PAPER_TASKS, *every] if task in every}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextInputConfig:
    """An external set of texts.

    Attributes:
        path: a file, a folder or a glob of files of one format, or the location of a Delta table.
        format: auto tells the format from the file names (.jsonl[.gz|.zst], .parquet) or from a `_delta_log`.
        version: version of a Delta table; null takes the newest.
        text_column: name of the field or column with the text.
        source_column: name of the field or column with the source; a set without it has one source, its own name.
    """

    path: str
    format: Literal["auto", "jsonl", "parquet", "delta"] = "auto"
    version: int | None = None
    text_column: str = "text"
    source_column: str = "source"

    def __post_init__(self) -> None:
        check(bool(self.path), "evaluate.inputs: expected a path, found nothing; set evaluate.inputs.NAME.path")
        check(
            self.version is None or (self.version >= 0 and self.format in ("auto", "delta")),
            f"evaluate.inputs: version is the number of a version of a Delta table, found {self.version} for format "
            f"{self.format}; remove the key version, or set format: delta",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How trained models are evaluated, besides the held-out text of the experiment.

    Attributes:
        tokens_per_batch: most tokens of one forward pass.
        max_instances_per_source: most instances of each source of a set; 0: all of them.
        inputs: external sets of texts, by name.
        tasks: names of lm-eval tasks; `paper` stands for the paper's nine.
        tasks_folder: folder with YAML files of further tasks, which win over lm-eval's own tasks of the same names.
    """

    tokens_per_batch: int = 8192
    max_instances_per_source: int = 0
    inputs: dict[str, TextInputConfig] = dataclasses.field(default_factory=dict)
    tasks: list[str] = dataclasses.field(default_factory=list)
    tasks_folder: str | None = None

    def __post_init__(self) -> None:
        check(
            self.tokens_per_batch >= 1,
            f"evaluate.tokens_per_batch: expected at least 1, found {self.tokens_per_batch}",
        )
        for name in self.inputs:
            check_name("evaluation set", name)
            check(
                name != HELDOUT,
                f"evaluate.inputs.{name}: expected another name, because {HELDOUT} is the experiment's own held-out "
                "text; rename the set",
            )

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks without duplicates, with the names of the nine in place of `paper`."""
        names = [name for task in self.tasks for name in (PAPER_TASKS if task == PAPER else [task])]
        return list(dict.fromkeys(names))
