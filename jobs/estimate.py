"""`miniplm estimate`: what an experiment will cost, from a sample of its corpus and a few batches of its models.

Reads a bounded sample of `ingest.input`, cuts it as ingest would, and scores a part of it with each model on an
executor. Prints a table, or JSON; writes nothing. Takes a minute or two, whatever the corpus. Exit code 3 says that
more rows would be rejected than `max_reject_share` allows. A rerun samples the same rows.

    miniplm estimate -c conf/demo.yaml [--gpus 8 --mfu 0.4] [key=value ...]
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from jobs.session import add_config_arguments, exit_code, guarded, make_session
from miniplm_udf.config import ExperimentConfig, load_config, printable, to_dict
from miniplm_udf.errors import EXIT_DONE, ConfigError

_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="miniplm estimate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument("--sample-bytes", type=int, default=8_000_000, help="text to look at (default 8,000,000)")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs to reckon with (default 1)")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of their peak in use (default 0.4)")
    parser.add_argument(
        "--gpu-tflops", type=float, default=989.0, help="peak of one in TFLOP/s (default 989: H100 and H200 in bf16)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(config: ExperimentConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Starts a session and returns `miniplm_udf.estimate.estimate`'s findings."""
    from miniplm_udf.estimate import Gpus, estimate

    session = make_session(config, "miniplm estimate")
    try:
        gpus = Gpus(arguments.gpus, arguments.mfu, arguments.gpu_tflops)
        return estimate(session, config, arguments.sample_bytes, gpus)
    finally:
        session.stop()


def _check(arguments: argparse.Namespace) -> None:
    for name in ("sample_bytes", "gpus", "mfu", "gpu_tflops"):
        if not getattr(arguments, name) > 0:
            option = "--" + name.replace("_", "-")
            raise ConfigError(f"{option}: expected a number above 0, found {getattr(arguments, name)}")
    if arguments.mfu > 1:
        raise ConfigError(f"--mfu: expected a share of at most 1, found {arguments.mfu}")


def text(found: dict[str, Any]) -> str:
    """The estimate for a terminal."""
    return "\n\n".join([_corpus_lines(found), _model_lines(found), _cost_lines(found), _reject_lines(found)])


def _corpus_lines(found: dict[str, Any]) -> str:
    corpus, sample = found["corpus"], found["sample"]
    splits = ", ".join(f"{split} {n:,}" for split, n in corpus["by_split"].items())
    return "\n".join(
        [
            f"corpus      {_si(corpus['input_bytes'])}B in {corpus['files']:,} files, {_si(corpus['text_bytes'])}B of "
            f"text, {corpus['documents']:,} documents, {corpus['instances']:,} instances ({splits})",
            f"sample      {sample['share']:.2%} of it: {sample['rows']:,} rows from {sample['files_tried']} files, "
            f"looked at in {sample['seconds']:.0f} s",
        ]
    )


def _model_lines(found: dict[str, Any]) -> str:
    gpus = found["gpus"]
    lines = [
        f"{'model':<14}{'parameters':>11}{'tokens':>10}{'FLOPs':>9}{'tokens/s':>10}{'here':>11}{'GPUs':>11}"
        f"   here: {', '.join(sorted({m['device'] + ' ' + m['dtype'] for m in found['models'].values()}))}; "
        f"GPUs: {gpus['n']} x {gpus['tflops']:g} TFLOP/s at {gpus['mfu']:.0%}"
    ]
    for alias, model in found["models"].items():
        row = f"{alias:<14}{_si(model['parameters']):>11}{_si(model['tokens']):>10}{_si(model['flops']):>9}"
        row += f"{model['tokens_per_second']:>10,.0f}{_time(model['seconds']):>11}{_time(model['gpu_seconds']):>11}"
        lines.append(row + ("   measured with fresh weights: it is not trained yet" if model["fresh_weights"] else ""))
    training = found["reference_training"]
    if training:
        row = f"{'(training)':<14}{'':>11}{_si(training['tokens']):>10}{_si(training['flops']):>9}"
        row += f"{training['tokens_per_second']:>10,.0f}{_time(training['seconds']):>11}"
        lines.append(row + f"{_time(training['gpu_seconds']):>11}   of the reference")
    lines.append("FLOPs = 2 x parameters x tokens + 2 x layers x attention width x sum of window^2; training: 3 times")
    return "\n".join(lines)


def _cost_lines(found: dict[str, Any]) -> str:
    stage, tables = found["score"], found["tables"]
    return "\n".join(
        [
            f"score       {_time(stage['stage_seconds'])} here: models {_time(stage['model_seconds'])} by "
            f"{stage['workers']} worker(s), loading {_time(stage['start_seconds'])}, Spark about "
            f"{_time(stage['spark_seconds'])}; {_time(stage['gpu_seconds'])} of those GPUs",
            f"tables      scores {_si(tables['scores'])}B, score_matrix {_si(tables['score_matrix'])}B",
        ]
    )


def _reject_lines(found: dict[str, Any]) -> str:
    lines = []
    for stage, part in found["rejects"].items():
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in sorted(part["reasons"].items())) or "none"
        limit = f"  more than max_reject_share ({part['max_share']:.2%})" if part["too_many"] else ""
        lines.append(f"rejects     {stage}: {part['share']:.2%} of {part['of']:,} ({reasons}){limit}")
    warnings = [warning for model in found["models"].values() for warning in model["warnings"]]
    return "\n".join([*lines, *(f"warning     {warning}" for warning in warnings)])


def _si(n: float) -> str:
    return next((f"{n / size:.3g} {unit}" for size, unit in _UNITS if n >= size), f"{n:.0f} ")


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()

    def body() -> int:
        arguments = parser.parse_intermixed_args(argv)
        config = load_config(arguments.config, arguments.overrides)
        _check(arguments)
        if arguments.dry_run:
            print(json.dumps(printable(to_dict(config)), indent=2))
            return EXIT_DONE
        found = run(config, arguments)
        print(json.dumps(found, indent=2) if arguments.json else text(found))
        return exit_code(found)

    return guarded(body)


if __name__ == "__main__":
    sys.exit(main())
