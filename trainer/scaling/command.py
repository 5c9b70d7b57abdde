"""The command `python -m trainer scaling`: fits a law to each student's runs and compares each with its baseline.

Inputs: an `ExperimentConfig`, its MLflow store and `ScalingOptions`. Output: the object that the command prints as
JSON, and a PNG file if one is named. Numbers have 4 significant digits. Writes nothing to MLflow or to the root.
"""

import dataclasses
import logging
import math
from pathlib import Path

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.rules import is_random_corpus
from miniplm_udf.config.targets import student_target
from miniplm_udf.storage import Json
from trainer.scaling.laws import COVERAGE, IntervalEstimate, ScalingFit, compute_saved, extrapolate, fit_law
from trainer.scaling.runs import StudentRuns, read_runs

LOGGER = logging.getLogger("miniplm.trainer.scaling")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingOptions:
    """The options of the command.

    Attributes:
        students: names of students; empty means all students of the config.
        baseline: the student to compare with. None takes, for each student, the first student of the config with the
            same number of weights and a random corpus.
        metric: MLflow metric of the loss.
        tokens: training lengths to extrapolate to, in tokens.
        replicates: resampled fits of the bootstrap.
        seed: seed of the bootstrap.
        plot: PNG file to write; None writes none.
    """

    students: tuple[str, ...] = ()
    baseline: str | None = None
    metric: str = "heldout_nats_per_token"
    tokens: tuple[int, ...] = (10**12, 10**13)
    replicates: int = 1000
    seed: int = 0
    plot: Path | None = None


@dataclasses.dataclass(frozen=True)
class _Study:
    """A student's runs and the law that was fitted to them."""

    runs: StudentRuns
    fit: ScalingFit


def plan(config: ExperimentConfig, options: ScalingOptions) -> Json:
    """Returns the plan of the command for a dry run; opens no store and writes nothing.

    Args:
        config: the experiment.
        options: the options of the command.

    Raises:
        ConfigError: the config has no student of a given name.
    """
    return {
        "reads": f"{storage.redact(config.mlflow_uri())}, experiment {config.mlflow.experiment}",
        "metric": options.metric,
        "students": _names(config, options),
        "tokens": list(options.tokens),
        "writes": str(options.plot) if options.plot else None,
    }


def scaling(config: ExperimentConfig, options: ScalingOptions) -> Json:
    """Fits, extrapolates and compares the laws of students.

    Args:
        config: the experiment.
        options: the options of the command.

    Returns:
        The JSON object that docs/scaling-laws.md describes.

    Raises:
        ConfigError: the config has no student of a given name.
        CorpusError: a student has too few finished runs, or runs of several models.
        MiniplmError: MLflow cannot be read.
    """
    studies = {
        name: _Study(runs, fit_law(runs.curves, replicates=options.replicates, seed=options.seed))
        for name, runs in read_runs(config, _names(config, options), options.metric).items()
    }
    for name, study in studies.items():
        for problem in study.fit.undetermined:
            LOGGER.warning("%s: the runs do not determine the law: %s", name, problem)
    if options.plot is not None:
        from trainer.scaling.plot import draw_laws  # imports matplotlib

        largest = max(study.runs.flop(tokens) for study in studies.values() for tokens in (*options.tokens, 1))
        draw_laws({name: study.fit for name, study in studies.items()}, options.metric, largest, options.plot)
    return {
        "metric": options.metric,
        "interval": COVERAGE,
        "laws": {name: _law(study, options) for name, study in studies.items()},
        "compute_saved": {
            name: _saved(study, studies[baseline], options)
            for name, study in studies.items()
            if (baseline := _baseline(config, options, studies, name)) is not None
        },
        "plot": str(options.plot) if options.plot else None,
    }


def _names(config: ExperimentConfig, options: ScalingOptions) -> list[str]:
    names = options.students or tuple(config.students)
    if options.baseline is not None:
        names = (*names, options.baseline)
    return [student_target(config, name).name for name in dict.fromkeys(names)]


def _baseline(config: ExperimentConfig, options: ScalingOptions, studies: dict[str, _Study], name: str) -> str | None:
    """Name of the student with which a student is compared; None for a baseline, or if there is none."""
    if options.baseline is not None:
        return options.baseline if name != options.baseline else None
    random = [other for other in studies if _is_conventional(config, other)]
    same_size = [other for other in random if studies[other].runs.n_parameters == studies[name].runs.n_parameters]
    return same_size[0] if same_size and name not in random else None


def _is_conventional(config: ExperimentConfig, name: str) -> bool:
    """Whether a student is trained on a random corpus, without a teacher."""
    student = config.students[name]
    return student.train.kd_ratio == 0 and is_random_corpus(config.refine.corpora, student.corpus)


def _law(study: _Study, options: ScalingOptions) -> Json:
    runs, fit = study.runs, study.fit
    return {
        "n_parameters": runs.n_parameters,
        "runs": len(runs.curves),
        "points": sum(len(curve.loss) for curve in runs.curves),
        "largest_run_flop": _rounded(fit.largest_flop),
        "coefficient": _rounded(fit.law.coefficient),
        **_with_ends("exponent", fit.exponent),
        **_with_ends("floor", fit.floor),
        "undetermined": list(fit.undetermined),
        "extrapolated": [
            {
                "tokens": tokens,
                "compute_flop": _rounded(runs.flop(tokens)),
                **_with_ends("loss", extrapolate(fit, runs.flop(tokens))),
            }
            for tokens in options.tokens
            if not fit.undetermined
        ],
    }


def _saved(study: _Study, baseline: _Study, options: ScalingOptions) -> Json:
    """The compute that a student saves at the loss of the baseline's largest run.

    It is also computed at the losses that longer trainings of the baseline would reach.
    """
    if reason := _not_comparable(study, baseline, options.metric):
        return {"baseline": baseline.runs.name, "not_comparable": reason, "at": []}
    computes = [baseline.fit.largest_flop, *(baseline.runs.flop(tokens) for tokens in options.tokens)]
    return {
        "baseline": baseline.runs.name,
        "not_comparable": None,
        "at": [
            {
                "baseline_tokens": _rounded(baseline.runs.tokens(compute)),
                "baseline_flop": _rounded(compute),
                "loss": _rounded(baseline.fit.law.loss(compute)),
                **_with_ends("times_less_compute", compute_saved(study.fit, baseline.fit, compute)),
            }
            for compute in computes
        ],
    }


def _not_comparable(study: _Study, baseline: _Study, metric: str) -> str | None:
    """Why the losses of two students cannot be compared, or None."""
    for each in (study, baseline):
        if each.fit.undetermined:
            return f"the runs of {each.runs.name} do not determine its law"
    student, base = study.runs, baseline.runs
    if student.text != base.text:
        return f"the losses are of different texts: {student.text} and {base.text}"
    if student.tokenizer != base.tokenizer and "bits_per_byte" not in metric:
        return f"tokens of {student.tokenizer} and of {base.tokenizer} differ: use --metric heldout_bits_per_byte"
    return None


def _with_ends(key: str, estimate: IntervalEstimate) -> dict[str, float | None]:
    ends = {"": estimate.value, "_low": estimate.low, "_high": estimate.high}
    return {f"{key}{end}": _rounded(value) for end, value in ends.items()}


def _rounded(value: float) -> float | None:
    """The value with 4 significant digits; None for a value that JSON does not have."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
