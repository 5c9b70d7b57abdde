"""`miniplm corpus`: versions of refined corpora, and taking documents down. A version is NAME, NAME@NUMBER or NAME@TAG.

`list`, `show` and `diff` only read: `corpora`, `pins`, `refined/<name>`, `instances`; they start no Spark. `pin` and
`unpin` write `pins` and `pinned/`; `restore` and `rebuild` write a new version of `refined/<name>`; `take-down` removes
rows of every table and records them in `takedowns`. A retry of any of them finds what is done and does the rest.

    miniplm corpus list|show|diff|pin|unpin|restore|rebuild|take-down -c conf/demo.yaml [VERSION ...] [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/corpus.py list -c conf/demo.yaml
"""

import argparse
import getpass
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import corpus_text
from jobs.command import Command, add_version_argument, make_parser
from jobs.session import command_session
from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.corpora import listing
from miniplm_udf.errors import ConfigError
from miniplm_udf.upkeep import preflight

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

Work = Callable[["SparkSession", ExperimentConfig, argparse.Namespace], Any]


def _list(config: ExperimentConfig, arguments: argparse.Namespace) -> Any:
    preflight.check_files(config.root, ["corpora"])
    return listing.listing(config.root)


def _show(config: ExperimentConfig, arguments: argparse.Namespace) -> Any:
    preflight.check_files(config.root, ["corpora"])
    return listing.show(config.root, arguments.version)


def _diff(config: ExperimentConfig, arguments: argparse.Namespace) -> Any:
    preflight.check_files(config.root, ["corpora", "instances"])
    return listing.diff(config.root, arguments.version, arguments.other, arguments.examples)


def _pin(spark: "SparkSession", config: ExperimentConfig, arguments: argparse.Namespace) -> Any:
    from miniplm_udf.corpora import versions

    return versions.pin(spark, config.root, arguments.version, arguments.tag)


def _unpin(spark: "SparkSession", config: ExperimentConfig, arguments: argparse.Namespace) -> Any:
    from miniplm_udf.corpora import versions

    name, version = versions.unpin(spark, config.root, arguments.version)
    return {"name": name, "version": version}


def _restore(spark: "SparkSession", config: ExperimentConfig, arguments: argparse.Namespace) -> Any:
    from miniplm_udf.corpora import versions

    return versions.restore(spark, config, arguments.version)


def _rebuild(spark: "SparkSession", config: ExperimentConfig, arguments: argparse.Namespace) -> Any:
    from miniplm_udf.corpora import versions

    return versions.rebuild(spark, config, arguments.version, arguments.dry_run)


def _take_down(spark: "SparkSession", config: ExperimentConfig, arguments: argparse.Namespace) -> Any:
    from miniplm_udf.corpora import takedown
    from miniplm_udf.store.takedowns import Takedown

    ids = [*arguments.id, *(_read_ids(arguments.ids_from) if arguments.ids_from else [])]
    if arguments.dry_run:
        return takedown.preview(spark, config.root, ids)
    command = f"miniplm corpus take-down, by {getpass.getuser()} on {socket.gethostname()}"
    result = takedown.take_down(spark, config, ids, Takedown(command, arguments.reason))
    # The report shows texts. `miniplm report` makes it again.
    storage.remove_folder(config.report_file("report.html"))
    return result


def _read_ids(path: str) -> list[str]:
    try:
        return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--ids-from: expected a file with one id a line, found {path}: {error}") from error


def _with_spark(
    word: str, work: Work, needed: Sequence[str] = ()
) -> Callable[[ExperimentConfig, argparse.Namespace], Any]:
    """Runs the work in a Spark session of its own, after a check that the tables it needs are there."""

    def run(config: ExperimentConfig, arguments: argparse.Namespace) -> Any:
        with command_session(config, f"corpus {word}", needed) as spark:
            return work(spark, config, arguments)

    return run


def _takes(*names: str, **options: Mapping[str, Any]) -> Callable[[argparse.ArgumentParser], None]:
    """Adds versions as positional arguments, and further options (`_` stands for `-`)."""

    def add(parser: argparse.ArgumentParser) -> None:
        for name in names:
            add_version_argument(parser, name)
        for option, settings in options.items():
            parser.add_argument("--" + option.replace("_", "-"), **settings)

    return add


def _action(
    word: str, help: str, run: Callable[[ExperimentConfig, argparse.Namespace], Any], text: Callable[[Any], str],
    add_arguments: Callable[[argparse.ArgumentParser], None],
) -> Command:  # fmt: skip
    return Command(name=f"corpus {word}", description=help, run=run, text=text, add_arguments=add_arguments)


ACTIONS = {
    "list": _action("list", "all versions of all corpora", _list, corpus_text.listing, _takes()),
    "show": _action(
        "show", "a version's provenance, and what it holds by source", _show, corpus_text.show, _takes("version")
    ),
    "diff": _action(
        "diff", "what was added and removed between two versions, by source, with texts", _diff, corpus_text.diff,
        _takes(
            "version", "other",
            examples={"type": int, "default": 3, "help": "texts of added and of removed rows to show (default: 3)"},
        ),
    ),
    "pin": _action(
        "pin", "copies a version's rows, so that maintenance never removes them",
        _with_spark("pin", _pin, ["corpora"]), corpus_text.pinned,
        _takes("version", tag={"help": "a name for the version, for NAME@TAG"}),
    ),
    "unpin": _action(
        "unpin", "removes the pin of a version and its copy, so that maintenance may remove the version",
        _with_spark("unpin", _unpin), corpus_text.unpinned, _takes("version"),
    ),
    "restore": _action(
        "restore", "makes a new version with an old one's rows", _with_spark("restore", _restore, ["corpora"]),
        corpus_text.made, _takes("version"),
    ),
    "rebuild": _action(
        "rebuild", "makes a version's rows again from its record and the matrix; commits them if they are the same",
        _with_spark("rebuild", _rebuild, ["corpora", "score_matrix"]), corpus_text.made,
        _takes("version", dry_run={"action": "store_true", "help": "only compare the fingerprint"}),
    ),
    "take-down": _action(
        "take-down", "removes documents from every table, pinned versions too, and refuses them from then on",
        # A table restored from a copy later would still contain the documents.
        _with_spark("take-down", _take_down, preflight.EVERY_TABLE), corpus_text.taken_down,
        _takes(
            id={"action": "append", "default": [], "help": "id of a document; may be repeated"},
            ids_from={"metavar": "FILE", "help": "a file with one id a line"},
            reason={"help": "kept with the record"},
            dry_run={"action": "store_true", "help": "only say what would be removed"},
        ),
    ),
}  # fmt: skip


def command_parser() -> argparse.ArgumentParser:
    """The parser of `miniplm corpus` with all actions; it describes them, and each action parses its own options."""
    parser = make_parser("corpus", __doc__)
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="ACTION", parser_class=argparse.ArgumentParser
    )
    for word, action in ACTIONS.items():
        actions.add_parser(word, help=action.description, parents=[action.parser()], add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm corpus ACTION`.

    Args:
        argv: the words after the command's name, the action first; None takes the arguments of the process.

    Returns:
        The exit code of the action.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in ACTIONS:
        command_parser().parse_args(arguments[:1])  # prints the help, or what is wrong, and ends the command
    return ACTIONS[arguments[0]].main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
