"""The trainer's command: `python -m trainer train|evaluate|scaling -c CONF ... [key=value ...]`; also under torchrun.

Reads the command line, calls `train`, `evaluate` or `scaling`, and prints the result as JSON on stdout; logs and
progress go to stderr. Exit codes: 0 done, 1 failed, 2 bad config or usage, 130 after Ctrl-C; SIGTERM lets a training
save its last step and end with 0, and ends the other commands with 143. An error and a signal print one line; --debug
also prints an error's trace.
"""

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from miniplm_udf import failures, object_storage, stopping
from miniplm_udf.config.experiment import ExperimentConfig, load_config
from miniplm_udf.config.refine import parse_tokens
from miniplm_udf.errors import EXIT_DONE
from miniplm_udf.progress import debugging
from miniplm_udf.storage import Json

if TYPE_CHECKING:
    from trainer.scaling.command import ScalingOptions

LOGGER = logging.getLogger("miniplm.trainer")
_TRAIN = """Trains models on their packed tables and writes <root>/models/NAME/. A model that is finished with the same
config and data is skipped; a killed training resumes from its last checkpoint. With several GPUs or processes:
torchrun --nproc-per-node N -m trainer train ..."""
_EVALUATE = """Evaluates every student of the config, and the reference if the config trains one: losses on the held-out
text and on the sets of evaluate.inputs, accuracies on evaluate.tasks. Writes <root>/models/NAME/evaluation.json and the
same numbers to the model's MLflow run. What exists for the same weights, texts and settings is skipped."""
_SCALING = """Fits the law L(C) = A / C^alpha + floor to the losses of each student's finished runs in MLflow, and
states, with 90 % intervals, the loss of longer trainings and the compute saved at equal loss. See
docs/scaling-laws.md."""
_EPILOG = "example: python -m trainer train -c conf/demo.yaml --student miniplm train.steps=20 root=/tmp/try"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__.split("\n\n")[0], epilog=_EPILOG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|evaluate|scaling")
    train = commands.add_parser(
        "train",
        help="train students, or the reference",
        description=_TRAIN,
        epilog=_EPILOG,
    )
    which = train.add_mutually_exclusive_group()
    which.add_argument(
        "--student",
        metavar="NAME",
        action="append",
        help="a student; may be repeated; default: all students",
    )
    which.add_argument(
        "--reference",
        action="store_true",
        help="train the reference; a trained reference is frozen",
    )
    train.add_argument(
        "--retrain",
        action="store_true",
        help="train again, even if the model is finished or frozen",
    )
    evaluate = commands.add_parser("evaluate", help="evaluate models on texts and tasks", description=_EVALUATE)
    evaluate.add_argument(
        "--student",
        metavar="NAME",
        action="append",
        help="a student; may be repeated; default: all students and the reference",
    )
    scaling = commands.add_parser("scaling", help="fit scaling laws to finished runs", description=_SCALING)
    _add_scaling_options(scaling)
    for command in (train, evaluate, scaling):
        command.add_argument(
            "-c",
            "--config",
            required=True,
            metavar="CONF",
            help="the experiment's YAML file",
        )
        command.add_argument(
            "--dry-run",
            action="store_true",
            help="print the plan and do nothing",
        )
        # `miniplm train` itself says that a signal has stopped it.
        command.add_argument("--started-by-miniplm", action="store_true", help=argparse.SUPPRESS)
        command.add_argument("--debug", action="store_true", help="show debug messages, and the trace of an error")
        command.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="dotted overrides of the config",
        )
    return parser


def _add_scaling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--student",
        metavar="NAME",
        action="append",
        help="a student, whose name its runs have; may be repeated; default: all students",
    )
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="the student to compare with; default: the first of the same size with a random corpus",
    )
    parser.add_argument(
        "--metric",
        default="heldout_nats_per_token",
        help="MLflow metric of the loss (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens",
        type=_token_counts,
        default="1T,10T",
        metavar="N,N",
        help="lengths of training to extrapolate to, such as 300B,1.5T (default: %(default)s)",
    )
    parser.add_argument(
        "--replicates",
        type=int,
        default=1000,
        help="resampled fits behind the intervals, at least 20 (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the resampling (default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw the laws as a PNG file")


def _token_counts(text: str) -> tuple[int, ...]:
    counts = tuple(parse_tokens(part) for part in text.split(","))
    if not all(counts):
        raise argparse.ArgumentTypeError(f"expected tokens such as 1T or 300B,1.5T, found {text!r}")
    return tuple(count for count in counts if count)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown:
        parser.error(f"expected options and key=value overrides, found {' '.join(unknown)}")
    if arguments.command == "scaling" and arguments.replicates < 20:
        parser.error(f"--replicates: expected at least 20, found {arguments.replicates}")
    # argparse accepts positional words in one place only, but overrides may stand before and after an option.
    arguments.overrides += rest
    return arguments


def _run(arguments: argparse.Namespace) -> tuple[Json, list[str]]:
    """Runs the command; returns the JSON object for stdout, and lines for people, which follow it on stderr."""
    config: ExperimentConfig = load_config(arguments.config, arguments.overrides)
    object_storage.use(config.storage)
    # Imported here, so that --help and config errors come at once: torch and transformers take seconds to import.
    if arguments.command == "train":
        from miniplm_udf.config import targets
        from trainer.ranks.distributed import process_group
        from trainer.train import plan, train

        selected = (
            [targets.reference_target(config)]
            if arguments.reference
            else [targets.student_target(config, name) for name in arguments.student or config.students]
        )
        if arguments.dry_run:
            return {target.name: plan(config, target) for target in selected}, []
        results: Json = {}
        lines: list[str] = []
        with stopping.deferred(), process_group():
            for target in selected:
                result = train(config, target, retrain=arguments.retrain)
                results[target.name] = result.as_json()
                lines.append(str(result))
                # A signal may reach one rank alone. Ranks agree on a stop during a training, so all go on until then.
                if result.stopped_after is not None or (_is_alone() and stopping.received() is not None):
                    return results, lines
        if not arguments.reference and _is_first_rank() and stopping.received() is None:
            from trainer.results.registry import register

            # After all trainings: ranks that train the next student do not wait while rank 0 sends a model.
            for name, registration in register(config, list(results)).items():
                results[name]["registered"] = dataclasses.asdict(registration)
        return results, lines
    if arguments.command == "scaling":
        from trainer.scaling import command as scaling_command

        options = _scaling_options(arguments)
        compute = scaling_command.plan if arguments.dry_run else scaling_command.scaling
        return compute(config, options), []
    from miniplm_udf.config import targets
    from trainer.evaluation import run

    chosen = [targets.student_target(config, name) for name in arguments.student or ()] or targets.all_targets(config)
    if arguments.dry_run:
        return run.plan(config, chosen), []
    return {name: result.as_json() for name, result in run.evaluate(config, chosen).items()}, []


def _scaling_options(arguments: argparse.Namespace) -> "ScalingOptions":
    from trainer.scaling.command import ScalingOptions

    return ScalingOptions(
        students=tuple(arguments.student or ()),
        baseline=arguments.baseline,
        metric=arguments.metric,
        tokens=arguments.tokens,
        replicates=arguments.replicates,
        seed=arguments.seed,
        plot=arguments.plot,
    )


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _is_alone() -> bool:
    return os.environ.get("WORLD_SIZE", "1") == "1"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: words of the command line; None takes the arguments of the process.

    Returns:
        The exit code.
    """
    arguments = _parse(argv)
    # Before torch is loaded. Threads that spin while they wait keep each other from the cores if anything else runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with debugging(arguments.debug), stopping.stops_on_signals():
        try:
            result, lines = _run(arguments)
        except stopping.Stopped as stopped:
            if not arguments.started_by_miniplm:
                print(f"miniplm: the trainer was {stopped.message} from its last checkpoint", file=sys.stderr)
            return stopped.exit_code
        except Exception as error:
            return failures.report(error, "train")
        stopped_training = stopping.received()
    if _is_first_rank():
        print(json.dumps(result, indent=2, sort_keys=True, ensure_ascii=False), flush=True)
        for line in lines:
            print(line, file=sys.stderr)
    if stopped_training is None:
        return EXIT_DONE
    if not arguments.started_by_miniplm:
        print(f"miniplm: the training was {stopped_training.message}; its last step is saved", file=sys.stderr)
    # A scheduler that ends a job with SIGTERM takes every other code for a failure; a shell expects 130 after Ctrl-C.
    return EXIT_DONE if stopped_training.number == signal.SIGTERM else stopped_training.exit_code


if __name__ == "__main__":
    sys.exit(main())
