"""Writes `report.html`: one page, no network, no other file. Driver only.

Inputs: the experiment's tables and model folders (queries.py, students.py) and the pipeline's summary. Outputs:
`<report folder>/report.html`, replaced whole, and the same page with summary.json in MLflow. Every text, name and
number goes through jinja2 with autoescape, because the corpus's text is not trusted. Owns the words and formats of the
page; the numbers come from the other modules. A retry writes the page again and uses the same MLflow run.
"""

import datetime
import importlib.metadata
import json
import logging
import shlex
from typing import TYPE_CHECKING, Any

import jinja2

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.report import baselines, figures, queries
from miniplm_udf.report import students as students_module
from miniplm_udf.report.queries import CorpusFacts
from miniplm_udf.report.students import StudentFacts
from miniplm_udf.report.summary import PipelineSummary

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

LOGGER = logging.getLogger("miniplm.report")
_NONE = "–"


def build_report(spark: "SparkSession", config: ExperimentConfig, summary: PipelineSummary) -> str:
    """Writes the report of an experiment and logs it to MLflow.

    Args:
        spark: a session.
        config: the experiment; its tables are read at their newest versions.
        summary: the pipeline's summary.json: `seconds` per stage and `tokens_per_second` per model are taken from it,
            all counts come from the tables. May be empty.

    Returns:
        The place of report.html: a plain path, or a URI.

    Raises:
        CorpusError: nothing was ingested yet.
    """
    place = config.report_file("report.html")
    overview = queries.overview(spark, config)
    corpora = queries.corpora(spark, config)
    students = students_module.students(config)
    page = render(config, summary, overview, corpora, students)
    storage.write_text(place, page)
    LOGGER.info("report: %s (%s bytes)", storage.redact(place), f"{len(page.encode()):,}")
    students_module.log_comparison(config, page, summary)
    return place


def render(
    config: ExperimentConfig, summary: PipelineSummary, overview: queries.Overview, corpora: list[CorpusFacts],
    students: list[StudentFacts],
) -> str:  # fmt: skip
    """Returns the report as one HTML page.

    Args:
        config: the experiment.
        summary: the result of `jobs.summary.build_summary`.
        overview: counts of the tables.
        corpora: the newest version of each corpus.
        students: the trained students. The page has no section about students if the config names none.
    """
    sources = students_module.sources(students)
    curves = [student for student in students if student.curve]
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            root=storage.redact(config.root),
            created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            package_version=importlib.metadata.version("miniplm"),
            seconds=summary.get("seconds") or {},
            tokens_per_second=summary.get("tokens_per_second") or {},
            overview=overview,
            corpora=[(corpus, _corpus_figures(corpus)) for corpus in corpora],
            has_students=bool(config.students),
            students=students,
            evaluated=[student for student in students if student.heldout],
            external_sets=students_module.external_sets(students),
            tasks=students_module.tasks(students),
            sources=sources,
            curves=figures.training_curves(curves) if curves else None,
            heldout=figures.heldout_bars(students, sources[: queries.SHOWN_SOURCES]) if sources else None,
            without_curve=[student.name for student in students if not student.curve],
            differences=students_module.differences(students),
            noise_training_tokens=baselines.NOISE_TRAINING_TOKENS,
            noise_heldout_tokens=baselines.NOISE_HELDOUT_TOKENS,
            text_characters=queries.TEXT_CHARACTERS,
            mlflow_uri=storage.redact(config.mlflow_uri()),
            mlflow_experiment=config.mlflow.experiment,
            instances_uri=storage.redact(config.layout.table("instances")),
            matrix_uri=storage.redact(config.layout.table("score_matrix")),
        )
    )


def _corpus_figures(corpus: CorpusFacts) -> dict[str, str]:
    return {
        "score": figures.score_histogram(corpus.score, str(corpus.config["score"]), corpus.cut),
        "nll": figures.nll_histograms(corpus.nll_means) if corpus.nll_means else "",
        "sources": figures.kept_shares(corpus.sources, corpus.total.kept_share),
    }


def _inputs(corpus: CorpusFacts) -> list[tuple[str, str]]:
    """The version of the table and the revisions of the models that a corpus was made from, by their names."""
    recorded = corpus.record["inputs"]
    version = recorded.get("matrix_version")
    tables = [] if version is None else [("score_matrix", f"version {version}")]
    revisions = recorded.get("model_revisions", {})
    return tables + [(alias, f"revision {revision}") for alias, revision in revisions.items()]


def _literal(text: str) -> str:
    """The text as a Python literal."""
    return json.dumps(text, ensure_ascii=False)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("miniplm_udf.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(n=_count, x=_decimal, pct=_percent, duration=_duration, pretty=_pretty, inputs=_inputs)
    # Values in lines that a reader copies into Python or a shell.
    environment.filters.update(literal=_literal, shell=shlex.quote)
    return environment


def _count(value: float | None) -> str:
    """1234567 -> 1,234,567; None -> a dash."""
    return _NONE if value is None else f"{value:,.0f}"


def _decimal(value: float | None, digits: int = 4, sign: bool = False) -> str:
    if value is None:
        return _NONE
    return f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "−")


def _percent(value: float | None, digits: int = 1, sign: bool = False) -> str:
    if value is None:
        return _NONE
    return f"{value:{'+' if sign else ''}.{digits}%}".replace("-", "−").replace("%", " %")


def _duration(seconds: float | None) -> str:
    """75.2 -> 1 min 15 s."""
    if seconds is None:
        return _NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, default=str)
