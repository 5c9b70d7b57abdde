"""The trainer's command: `python -m trainer train|evaluate -c CONF ... [key=value ...]`; also `torchrun -m trainer`.

Reads the command line, calls `train` or `evaluate`, prints the result as JSON on stdout (logs and progress go to
stderr) and sets the exit code: 0 done, 1 failed, 2 bad config or usage. A mistake of the user is one line, without a
traceback.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from miniplm_udf.config import ExperimentConfig, load_config
from miniplm_udf.errors import EXIT_DONE, MiniplmError
from miniplm_udf.progress import configure_logging

LOGGER = logging.getLogger("miniplm.trainer")
_TRAIN = """Trains models on their packed tables and writes <root>/models/NAME/. A finished model of the same config and
data is left as it is; a killed training goes on from its last checkpoint. Several GPUs or processes:
torchrun --nproc-per-node N -m trainer train ..."""
_EVALUATE = """Scores the held-out text with every student of the config, and the reference if there is one, and writes
<root>/models/NAME/evaluation.json and the same numbers to the model's MLflow run. What is unchanged is left."""
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
        "--student", metavar="NAME", action="append", help="a student of the config, may be repeated; without it, all"
    )
    which.add_argument(
        "--reference",
        action="store_true",
        help="the reference; once trained it is frozen",
    )
    train.add_argument(
        "--retrain",
        action="store_true",
        help="train anew, even a finished or frozen model",
    )
    evaluate = commands.add_parser("evaluate", help="held-out loss of all models", description=_EVALUATE)
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
            help="print what would be done, and do nothing",
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
    wrong = [word for word in rest if word.startswith("-") or "=" not in word]
    if wrong:
        parser.error(f"expected options and key=value overrides, found {' '.join(wrong)}")
    # argparse takes one run of positional words; overrides may stand on both sides of an option.
    arguments.overrides += rest
    return arguments


def _run(arguments: argparse.Namespace) -> Any:
    """Does what the command line says; returns what goes to stdout."""
    config: ExperimentConfig = load_config(arguments.config, arguments.overrides)
    # Imported here, so that --help and a wrong config answer at once: torch and transformers take seconds.
    if arguments.command == "train":
        from trainer import targets
        from trainer.train import plan, train

        chosen = (
            [targets.reference_target(config)]
            if arguments.reference
            else [targets.student_target(config, name) for name in arguments.student or config.students]
        )
        return {
            target.name: plan(config, target) if arguments.dry_run else train(config, target, retrain=arguments.retrain)
            for target in chosen
        }
    from trainer import evaluate

    return evaluate.plan(config) if arguments.dry_run else evaluate.evaluate(config)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code."""
    arguments = _parse(argv)
    configure_logging()
    try:
        result = _run(arguments)
    except MiniplmError as error:
        print(f"miniplm: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result, indent=2, sort_keys=True, ensure_ascii=False))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
