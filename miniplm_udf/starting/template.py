"""Writes the plan of an experiment as commented YAML, through a Jinja2 template (`experiment.yaml.j2`). Pure.

Input: what was seen and planned (`Start`). Output: the text of the file. Names and paths of the user go through
`json.dumps`, whose strings are YAML, so that none of them can change the structure.
"""

import dataclasses
import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from miniplm_udf.starting.cleaning import Condition
from miniplm_udf.starting.fields import Fields
from miniplm_udf.starting.plan import ALPHA, Plan, architecture
from miniplm_udf.starting.sizes import PlannedTraining
from miniplm_udf.starting.teacher import TeacherFacts

FAMILIES = ("llama", "qwen2")
_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_LINE_WIDTH = 112


@dataclasses.dataclass(frozen=True)
class Start:
    """The contents of an experiment file.

    Attributes:
        root: the root, as the config names it.
        inputs: the input, as the config names it.
        format: format of the input.
        n_bytes: bytes of text.
        fields: names of the fields.
        teacher: the teacher.
        plan: the numbers.
        conditions: the lines of `where`.
        packages: groups of annotations that can be computed.
        cautions: what the user should know.
        seen: one line each about the text, the teacher and the machine.
    """

    root: str
    inputs: str | Sequence[str]
    format: str
    n_bytes: int
    fields: Fields
    teacher: TeacherFacts
    plan: Plan
    conditions: Sequence[Condition]
    packages: Sequence[str]
    cautions: Sequence[str]
    seen: Mapping[str, str]


def render(start: Start) -> str:
    """Returns the YAML file.

    Args:
        start: what it says.
    """
    plan, teacher = start.plan, start.teacher
    name = start.root.rstrip("/").rpartition("/")[2] or "miniplm"
    ratio = teacher.n_parameters / plan.reference.shape.n_parameters if teacher.n_parameters else None
    return (
        _environment()
        .get_template("experiment.yaml.j2")
        .render(
            {field.name: getattr(start, field.name) for field in dataclasses.fields(start)}
            | {
                "title": f"An experiment on {_printable(name)}",
                "experiment": name if name.startswith("miniplm") else f"miniplm-{name}",
                "fields": _field_lines(start.fields),
                "context_reason": _context_reason(start),
                "ratio": f", {_number(1 / ratio)} of the teacher's (the paper: 1/17)" if ratio else "",
                "reference_architecture": architecture(plan.reference.shape, "llama"),
                "reference_train": _train(plan.reference),
                "student_train": _train(plan.student),
                "families": [(family, architecture(plan.student.shape, family)) for family in FAMILIES],
                "used": [line for line in start.conditions if line.is_used],
                "unused": [line for line in start.conditions if not line.is_used],
                "alpha": ALPHA,
                "budget_reason": _budget_reason(plan),
            }
        )
    )


def si(number: float) -> str:
    """Returns a number with three digits, a space and the prefix of its unit: `1.25 M`.

    Args:
        number: the number.
    """
    return next((f"{number / size:.3g} {unit}" for size, unit in _UNITS if number >= size), f"{number:.0f} ")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("miniplm_udf.starting", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        scalar=_scalar, flow=_flow, si=si, percent=_percent, fails=_fails, wrapped=_wrapped, printable=_printable
    )
    return environment


def _scalar(value: Any) -> str:
    """A value as YAML: strings in quotes, a list in brackets, a number that YAML 1.1 reads as one."""
    if isinstance(value, float):
        return f"{value:.1e}".replace("e-0", "e-") if value < 0.01 else f"{value:g}"
    return json.dumps(value if isinstance(value, str | int) else list(value), ensure_ascii=False)


def _flow(values: Mapping[str, Any], indent: int) -> str:
    """A mapping in braces, with line breaks."""
    plain = {key: value if isinstance(value, str) else _scalar(value) for key, value in values.items()}
    line = "{" + ", ".join(f"{key}: {value}" for key, value in plain.items()) + "}"
    return f"\n{' ' * (indent + 1)}".join(textwrap.wrap(line, _LINE_WIDTH - indent, break_long_words=False))


def _percent(share: float) -> str:
    return f"{share:.3g}" if share == 0 else f"{100 * share:.3g} %"


def _fails(share: float | None) -> str:
    return "" if share is None else f"; about {100 * share:.2g} % of the text fails it"


def _wrapped(text: str) -> str:
    return "\n#           ".join(textwrap.wrap(_printable(text), _LINE_WIDTH - 12, break_long_words=False))


def _printable(text: str) -> str:
    """A text for a comment, which is one line."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _number(share: float) -> str:
    return f"1/{1 / share:.3g}" if share < 1 else f"{share:.3g} times the size"


def _train(training: PlannedTraining) -> dict[str, int | float]:
    return {
        "steps": training.steps,
        "batch_sequences": training.batch,
        "micro_batch_sequences": training.micro_batch,
        "learning_rate": training.learning_rate,
        "save_every_steps": max(1, min(1000, training.steps // 2)),
        "log_every_steps": max(1, min(10, training.steps // 10)),
    }


def _field_lines(fields: Fields) -> list[tuple[str, str, str]]:
    """The names that the config has to state: those that are not the defaults, and the text for the reader."""
    if fields.text is None:
        return []
    lines = [("text", fields.text, "the text")]
    if fields.id not in (None, "id"):
        lines.append(("id", str(fields.id), "another value in each row of the sample"))
    if fields.source not in (None, "source"):
        examples = ", ".join(_printable(name)[:20] for name, _ in fields.sources[:3])
        lines.append(("source", str(fields.source), f"{len(fields.sources)} values in the sample: {examples}"))
    return lines


def _context_reason(start: Start) -> str:
    plan, longest = start.plan, start.teacher.longest
    if plan.aims.has_whole_texts:
        return "Tokens of the longest input: nearly all texts of the sample fit into it, or the teacher reads no more."
    if plan.context == 1024:
        return "Tokens of the longest input, the paper's number."
    if longest is not None and plan.context * 2 > longest:
        return f"Tokens of the longest input: the teacher reads at most {longest}."
    return (
        f"Tokens of the longest input: short, so that {si(plan.n_tokens)}tokens make enough instances to choose among."
    )


def _budget_reason(plan: Plan) -> str:
    machine = plan.machine
    if machine.n_gpus:
        return f"At most about 12 hours on {machine.n_gpus} GPUs for each model."
    return f"At most about 3 minutes on {machine.n_cores} cores for each model: `miniplm init --gpus N` plans for GPUs."
