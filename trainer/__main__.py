"""The trainer's command: `python -m trainer train|evaluate -c CONF ... [key=value ...]`; also `torchrun -m trainer`.

Reads the command line, calls `train` or `evaluate`, and prints the result as JSON on stdout; logs and progress go to
stderr. Exit codes: 0 done, 1 failed, 2 bad config or usage, 128 + signal after SIGTERM or Ctrl-C. An error that the
user can fix, and a signal, print one line and no traceback.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence

from miniplm_udf import stopping
from miniplm_udf.config.experiment import ExperimentConfig, load_config
from miniplm_udf.errors import EXIT_DONE, MiniplmError
from miniplm_udf.progress import configure_logging
from miniplm_udf.storage import Json

LOGGER = logging.getLogger("miniplm.trainer")
_TRAIN = """Trains models on their packed tables and writes <root>/models/NAME/. A model that is finished with the same
config and data is skipped; a killed training resumes from its last checkpoint. With several GPUs or processes:
torchrun --nproc-per-node N -m trainer train ..."""
_EVALUATE = """Scores the held-out text with every student of the config, and with the reference if the config trains
one. Writes <root>/models/NAME/evaluation.json and the same numbers to the model's MLflow run. An unchanged model is
skipped."""
_EPILOG = "example: python -m trainer train -c conf/demo.yaml --student miniplm train.steps=20 root=/tmp/try"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__.split("\n\n")[0], epilog=_EPILOG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|evaluate")
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
    evaluate = commands.add_parser("evaluate", help="compute the held-out loss of all models", description=_EVALUATE)
    for command in (train, evaluate):
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
        command.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="dotted overrides of the config",
        )
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown:
        parser.error(f"expected options and key=value overrides, found {' '.join(unknown)}")
    # argparse accepts one group of positional words, but overrides may stand before and after an option.
    arguments.overrides += rest
    return arguments


def _run(arguments: argparse.Namespace) -> Json:
    """Runs the command; returns the JSON object for stdout."""
    config: ExperimentConfig = load_config(arguments.config, arguments.overrides)
    # Imported here, so that --help and config errors come at once: torch and transformers take seconds to import.
    if arguments.command == "train":
        from trainer import targets
        from trainer.train import plan, train

        selected = (
            [targets.reference_target(config)]
            if arguments.reference
            else [targets.student_target(config, name) for name in arguments.student or config.students]
        )
        if arguments.dry_run:
            return {target.name: plan(config, target) for target in selected}
        return {target.name: train(config, target, retrain=arguments.retrain).as_json() for target in selected}
    from trainer import evaluate

    if arguments.dry_run:
        return evaluate.plan(config)
    return {name: result.as_json() for name, result in evaluate.evaluate(config).items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: words of the command line; by default those of the process.

    Returns:
        The exit code.
    """
    arguments = _parse(argv)
    configure_logging()
    with stopping.stops_on_signals():
        try:
            result = _run(arguments)
        except stopping.Stopped as stopped:
            print(f"miniplm: the trainer was {stopped.message} from its last checkpoint", file=sys.stderr)
            return stopped.exit_code
        except MiniplmError as error:
            print(f"miniplm: {type(error).__name__}: {error}", file=sys.stderr)
            return error.exit_code
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result, indent=2, sort_keys=True, ensure_ascii=False))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
