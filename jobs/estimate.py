"""`miniplm estimate`: what an experiment will cost, from a sample of its corpus and a few batches of its models.

Reads a bounded sample of `ingest.input`, cuts it as ingest would, and scores a part of the sample with each model
on an executor. Prints a table, or JSON; writes nothing. Takes a minute or two, whatever the corpus. Exit code 3 says
that more rows would be rejected than `max_reject_share` allows. A rerun samples the same rows.

    miniplm estimate -c conf/demo.yaml [--gpus 8 --mfu 0.4] [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/estimate.py -c conf/demo.yaml
"""

import argparse
import sys
from collections.abc import Sequence

from jobs.command import Command
from jobs.reject_text import over_limit
from jobs.session import spark_session
from jobs.text import table
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import EXIT_DONE, EXIT_TOO_MANY_REJECTS, ConfigError
from miniplm_udf.estimate.results import Estimate, Gpus
from miniplm_udf.task_progress import watched_tasks

_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def run(config: ExperimentConfig, arguments: argparse.Namespace) -> Estimate:
    """Makes the estimate in a session of its own.

    Args:
        config: the experiment.
        arguments: the options --gpus, --mfu, --gpu-tflops and --sample-bytes.

    Returns:
        The estimate.
    """
    from miniplm_udf.estimate.estimate import estimate

    gpus = Gpus(arguments.gpus, arguments.mfu, arguments.gpu_tflops)
    with spark_session(config, "miniplm estimate") as spark, watched_tasks(spark, "estimate"):
        return estimate(spark, config, arguments.sample_bytes, gpus)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sample-bytes", type=int, default=8_000_000, help="text to read (default 8,000,000)")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs to estimate for (default 1)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of their peak in use (default 0.4)")
    parser.add_argument(
        "--gpu-tflops", type=float, default=989.0, help="peak of a GPU in TFLOP/s (default 989: H100 and H200 in bf16)"
    )


def _check(arguments: argparse.Namespace) -> None:
    """Refuses options outside their range."""
    for name in ("sample_bytes", "gpus", "mfu", "gpu_tflops"):
        if not getattr(arguments, name) > 0:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option}: expected a number above 0, found {getattr(arguments, name)}")
    if arguments.mfu > 1:
        raise ConfigError(f"--mfu: expected a share of at most 1, found {arguments.mfu}")


def text(result: Estimate) -> str:
    """Returns the estimate as text for a terminal.

    Args:
        result: the result of `run`.
    """
    return "\n\n".join([_corpus_lines(result), _model_lines(result), _cost_lines(result), _reject_lines(result)])


def _corpus_lines(result: Estimate) -> str:
    corpus, sample = result.corpus, result.sample
    splits = ", ".join(f"{split} {n:,}" for split, n in corpus.by_split.items())
    contents = (
        f"{_si(corpus.input_bytes)}B in {corpus.files:,} files, {_si(corpus.text_bytes)}B of text, "
        f"{corpus.documents:,} documents, {corpus.instances:,} instances ({splits})"
    )
    taken = (
        f"{sample.share:.2%} of the corpus: {sample.rows:,} rows from {sample.files_tried} files, read and measured in "
        f"{sample.seconds:.0f} s"
    )
    return table(None, [("corpus", contents), ("sample", taken)])


def _model_lines(result: Estimate) -> str:
    gpus, models, training = result.gpus, result.models, result.reference_training
    rows = [
        (
            alias, _si(model.parameters), _si(model.tokens), _si(model.flops),
            f"{model.tokens_per_second:,.0f}", _time(model.seconds), _time(model.gpu_seconds),
            "measured with fresh weights: it is not trained yet" if model.fresh_weights else "",
        )
        for alias, model in models.items()
    ]  # fmt: skip
    if training:
        numbers = (_si(training.tokens), _si(training.flops), f"{training.tokens_per_second:,.0f}")
        times = (_time(training.seconds), _time(training.gpu_seconds))
        rows.append(("(training)", "", *numbers, *times, "of the reference"))
    devices = ", ".join(sorted({f"{model.device} {model.dtype}" for model in models.values()}))
    lines = [
        table(("model", "parameters", "tokens", "FLOPs", "tokens/s", "here", "GPUs", ""), rows),
        f"here: {devices}; GPUs: {gpus.n} x {gpus.tflops:g} TFLOP/s at {gpus.mfu:.0%}",
        table(None, [("prefix", f"{alias}: {model.prefix}") for alias, model in models.items()]),
        "FLOPs = 2 x parameters x tokens + 2 x layers x attention width x sum of window^2; training: 3 times",
    ]
    return "\n".join(lines)


def _cost_lines(result: Estimate) -> str:
    stage, tables = result.score, result.tables
    times = (
        f"{_time(stage.stage_seconds)} here: models {_time(stage.model_seconds)} by {stage.workers} worker(s), loading "
        f"{_time(stage.start_seconds)}, Spark about {_time(stage.spark_seconds)}; {_time(stage.gpu_seconds)} on the "
        "GPUs of --gpus"
    )
    sizes = f"scores {_si(tables['scores'])}B, score_matrix {_si(tables['score_matrix'])}B"
    return table(None, [("score", times), ("Delta tables", sizes)])


def _reject_lines(result: Estimate) -> str:
    rows = []
    for stage, part in result.rejects.items():
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in sorted(part.reasons.items())) or "none"
        limit = f"  more than max_reject_share ({part.max_share:.2%})" if part.too_many else ""
        rows.append(("rejects", f"{stage}: {part.share:.2%} of {part.of:,} ({reasons}){limit}"))
    rows += [("warning", warning) for model in result.models.values() for warning in model.warnings]
    return table(None, rows)


def _si(n: float) -> str:
    """A number with a unit prefix (k, M, G, T, P, E)."""
    return next((f"{n / size:.3g} {unit}" for size, unit in _UNITS if n >= size), f"{n:.0f} ")


def _time(seconds: float) -> str:
    """A duration in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _run(config: ExperimentConfig, arguments: argparse.Namespace) -> Estimate:
    _check(arguments)
    return run(config, arguments)


def _exit_code(result: Estimate) -> int:
    return EXIT_TOO_MANY_REJECTS if result.too_many_rejects else EXIT_DONE


def _last_line(result: Estimate) -> str:
    """The sentence about the first stage that would reject too many rows."""
    over = next(((name, part) for name, part in result.rejects.items() if part.too_many), None)
    if over is None:
        return ""
    name, part = over
    limit = over_limit(name, None, part.reasons, f"{name}.max_reject_share", part.max_share)
    return f"{limit}; these are the rejects of the sample, and nothing was written"


def _plan(config: ExperimentConfig, arguments: argparse.Namespace) -> str:
    _check(arguments)
    rows = [
        ("reads", f"about {arguments.sample_bytes:,} bytes of {', '.join(config.ingest.inputs)}"),
        ("runs", f"{', '.join(config.scored_aliases)} on a part of them, on an executor"),
        ("writes", "nothing"),
    ]
    return table(None, rows, "  ")


COMMAND = Command(
    name="estimate", description=__doc__, run=_run, text=text, add_arguments=_add_arguments, plan=_plan,
    exit_code=_exit_code, last_line=_last_line,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm estimate` and returns its exit code; `argv` defaults to the arguments of the process."""
    return COMMAND.main(argv)


if __name__ == "__main__":
    sys.exit(main())
