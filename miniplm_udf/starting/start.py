"""Looks at the texts, the teacher and the machine, and plans an experiment for them. Driver only, no Spark.

Input: what the user names. Output: a `Start`, from which `template.render` makes the config. Works in the base install
for JSON lines and text with a model folder; other formats, .gguf files and hub names need more packages.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from miniplm_udf import storage
from miniplm_udf.annotations.packages import NEEDED
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.sections import IngestConfig, ModelConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.ingestion.beginnings import TEXT
from miniplm_udf.ingestion.documents import find_field
from miniplm_udf.ingestion.input_files import listed_once
from miniplm_udf.starting import cleaning, fields, teacher, texts
from miniplm_udf.starting.cautions import cautions
from miniplm_udf.starting.fields import Fields
from miniplm_udf.starting.plan import DEFAULT_AIMS, Aims, Corpus, Machine, make_plan
from miniplm_udf.starting.teacher import TeacherFacts
from miniplm_udf.starting.template import Start, si
from miniplm_udf.starting.texts import TextSample
from miniplm_udf.upkeep import machine as this_machine
from miniplm_udf.upkeep.input_checks import input_problems

_CHARACTERS_PER_TOKEN = 4
_LANGUAGE_TEXTS = 200


def look(
    inputs: Sequence[str], teacher_path: str, root: str, separator: str | None = None, n_gpus: int | None = None,
    aims: Aims = DEFAULT_AIMS,
) -> Start:  # fmt: skip
    """Looks at everything and plans an experiment.

    Args:
        inputs: paths, folders, globs, a Delta table or names of a hub.
        teacher_path: the teacher.
        root: where the experiment will write.
        separator: the teacher's separator; None takes it from its files.
        n_gpus: GPUs to plan for; None counts those of this machine.
        aims: what the user wants from the experiment.

    Returns:
        What the config says.

    Raises:
        ConfigError: the input has no text, or the files of the teacher do not tell what ended documents.
        ModelLoadError: there is no such teacher, or its files cannot be read.
    """
    named = [_absolute(path) for path in inputs]
    with listed_once():
        _check_input(named, root)
        sample = texts.read_sample(named)
    chosen, values, n_bad = _texts_of(sample)
    facts = teacher.examine(teacher_path, separator, values)
    lengths = tuple(len(text.encode("utf-8", "replace")) for text in values)
    corpus = Corpus(
        n_documents=round(len(values) * sample.scale),
        n_bytes=round(sum(lengths) * sample.scale),
        texts=tuple(values) if sample.is_complete else (),
        lengths=lengths,
    )
    machine = Machine(_count_gpus() if n_gpus is None else n_gpus, len(os.sched_getaffinity(0)))
    plan = make_plan(corpus, facts, machine, aims)
    packages = [group for group, name in NEEDED.items() if find_spec("pyspark") is None or find_spec(name)]
    languages = _languages(values)
    pieces = cleaning.cut(values, _CHARACTERS_PER_TOKEN * plan.context)
    bad_share = n_bad / max(1, n_bad + len(values))
    return Start(
        root=storage.local_path(storage.to_uri(root)) if storage.is_local(root) else root,
        inputs=named if len(named) > 1 else named[0],
        format=sample.format,
        n_bytes=corpus.n_bytes,
        fields=chosen,
        teacher=facts,
        plan=plan,
        conditions=cleaning.conditions(pieces, languages, packages),
        packages=packages,
        cautions=list(cautions(corpus, facts, plan, languages, bad_share, sample.encoding_hint)),
        seen={
            "text": _text_line(sample, corpus, chosen, languages, n_bad),
            "teacher": _teacher_line(facts),
            "machine": f"{machine.n_gpus} GPUs" if machine.n_gpus else f"{machine.n_cores} cores, no GPU",
        },
    )


def _check_input(inputs: Sequence[str], root: str) -> None:
    """Refuses an input that ingest refuses, except for its fields, which are not chosen yet."""
    config = ExperimentConfig(
        root=root, models={"teacher": ModelConfig(path="teacher")}, ingest=IngestConfig(input=list(inputs))
    )
    problems = [text for text in input_problems(config) if not text.startswith("ingest.fields")]
    if problems:
        raise ConfigError.of_all(problems)


def _absolute(path: str) -> str:
    return storage.local_path(storage.to_uri(path)) if storage.is_local(path) else path


def _texts_of(sample: TextSample) -> tuple[Fields, list[str], int]:
    """The fields, the sampled texts, and the number of rows without a text that ingest takes."""
    rows = [row for row in sample.rows if row is not None]
    if not rows:
        raise ConfigError(
            f"--input: expected rows with a text, found {len(sample.rows)} rows of {sample.format} in the first files, "
            f"none of which can be read{sample.encoding_hint}"
        )
    dataclass_fields = Fields(sources=sample.sources) if sample.format == "text" else fields.choose(rows)
    name = dataclass_fields.text or TEXT
    values = [value for row in rows if isinstance(value := find_field(row, name), str) and value and "\0" not in value]
    if not values:
        raise ConfigError(f"--input: expected texts in the field {name!r}, found none in the first rows")
    return dataclass_fields, values, len(sample.rows) - len(values)


def _languages(values: Sequence[str]) -> Counter[str]:
    """The languages of some texts; empty without the package that identifies them."""
    if find_spec("py3langid") is None:
        return Counter()
    import py3langid

    chosen = values[:: max(1, -(-len(values) // _LANGUAGE_TEXTS))]
    return Counter(str(py3langid.classify(text[:2000])[0]) for text in chosen)


def _count_gpus() -> int:
    cards = next(iter(this_machine.gpus()))
    return len(cards.text.split("; ")) if cards.state == "ok" else 0


def _text_line(sample: TextSample, corpus: Corpus, chosen: Fields, languages: Counter[str], n_bad: int) -> str:
    about = "" if sample.is_complete else "about "
    parts = [
        f"{sample.n_files:,} files ({sample.format}), {about}{corpus.n_documents:,} documents, {about}"
        f"{si(corpus.n_bytes)}B of text"
    ]
    if chosen.sources:
        parts.append(f"{len(chosen.sources)} sources")
    if languages:
        top = ", ".join(f"{name} {n / languages.total():.0%}" for name, n in languages.most_common(3))
        parts.append(f"languages {top}")
    if n_bad:
        parts.append(f"{n_bad} of {len(sample.rows)} sampled rows without a text")
    parts.append("UTF-8" if not sample.encoding_hint else "not only UTF-8")
    return "; ".join(parts)


def _teacher_line(facts: TeacherFacts) -> str:
    size = f"{si(facts.n_parameters)}parameters" if facts.n_parameters else "of unknown size"
    longest = f"{facts.longest:,} tokens of context" if facts.longest else "no limit of its context"
    tokens = f"{facts.bytes_per_token:.2g} bytes in a token{'' if facts.is_measured else ' (assumed)'}"
    return (
        f"{Path(facts.path).name}: {facts.family}, {size}, {facts.dtype}, {facts.n_ids:,} tokens, {longest}, {tokens}"
    )


def as_plain(start: Start) -> dict[str, object]:
    """Returns what was seen and planned, for `--json`.

    Args:
        start: the result of `look`.
    """
    return {
        "seen": dict(start.seen),
        "fields": dataclasses.asdict(start.fields),
        "teacher": dataclasses.asdict(start.teacher),
        "plan": dataclasses.asdict(start.plan),
        "where": [dataclasses.asdict(line) for line in start.conditions],
        "cautions": list(start.cautions),
    }
