"""`miniplm corpus`: versions of refined corpora, and taking documents down. A version is NAME, NAME@NUMBER or NAME@TAG.

Reads `corpora`, `pins`, `refined/<name>` and `instances`; `pin` and `unpin` write `pins` and `pinned/`, `restore` and
`rebuild` a new version of `refined/<name>`; `take-down` removes rows of every table, and records them in `takedowns`.

    miniplm corpus list|show|diff|pin|unpin|restore|rebuild|take-down -c conf/demo.yaml [VERSION ...] [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/corpus.py list -c conf/demo.yaml
"""

import argparse
import contextlib
import dataclasses
import getpass
import json
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import corpus_text
from jobs.session import guarded, make_session
from miniplm_udf.config import ExperimentConfig, load_config
from miniplm_udf.errors import EXIT_DONE, ConfigError
from miniplm_udf.removals import Takedown
from miniplm_udf.upkeep import takedown, versions

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

Found = dict[str, Any] | list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class _Action:
    """What one word does: names of the versions it takes, the work, and what is printed of it."""

    help: str
    takes: tuple[str, ...]
    run: Callable[["SparkSession", ExperimentConfig, argparse.Namespace], Found]
    text: Callable[[Any], str]


def _pin(spark: "SparkSession", config: ExperimentConfig, given: argparse.Namespace) -> Found:
    return dataclasses.asdict(versions.pin(spark, config.root, given.version, given.tag))


def _unpin(spark: "SparkSession", config: ExperimentConfig, given: argparse.Namespace) -> Found:
    name, version = versions.unpin(spark, config.root, given.version)
    return {"name": name, "version": version}


def _take_down(spark: "SparkSession", config: ExperimentConfig, given: argparse.Namespace) -> Found:
    ids = [*given.id, *(_ids_of(given.ids_from) if given.ids_from else [])]
    if given.dry_run:
        return takedown.look(spark, config.root, ids)
    command = f"miniplm corpus take-down, by {getpass.getuser()} on {socket.gethostname()}"
    found = takedown.take_down(spark, config, ids, Takedown(command, given.reason))
    with contextlib.suppress(ConfigError):  # no local folder, so no report
        # It shows texts. `miniplm report` makes it anew.
        (config.report_folder() / "report.html").unlink(missing_ok=True)
    return found


def _ids_of(path: str) -> list[str]:
    try:
        return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--ids-from: expected a file with an id a line, found {path}: {error}") from error


ACTIONS = {
    "list": _Action(
        "all versions of all corpora", (),
        lambda spark, config, given: versions.listing(spark, config.root), corpus_text.listing,
    ),
    "show": _Action(
        "a version's provenance, and what it holds by source", ("version",),
        lambda spark, config, given: versions.show(spark, config.root, given.version), corpus_text.show,
    ),
    "diff": _Action(
        "what was added and removed between two versions, by source, with texts", ("version", "other"),
        lambda spark, config, given: versions.diff(spark, config.root, given.version, given.other, given.examples),
        corpus_text.diff,
    ),
    "pin": _Action("keeps a version for ever, by a copy of its rows", ("version",), _pin, corpus_text.pinned),
    "unpin": _Action("gives a pinned version up to maintenance", ("version",), _unpin, corpus_text.unpinned),
    "restore": _Action(
        "makes a new version with an old one's rows", ("version",),
        lambda spark, config, given: versions.restore(spark, config, given.version), corpus_text.made,
    ),
    "rebuild": _Action(
        "makes a version's rows again from its record and the matrix; commits them if they are the same", ("version",),
        lambda spark, config, given: versions.rebuild(spark, config, given.version, given.dry_run), corpus_text.made,
    ),
    "take-down": _Action(
        "removes documents from every table, pinned versions too, and refuses them from then on", (), _take_down,
        corpus_text.taken_down,
    ),
}  # fmt: skip


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    top = argparse.ArgumentParser(
        prog="miniplm corpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    words = top.add_subparsers(dest="action", required=True, metavar="ACTION")
    made = {}
    for word, action in ACTIONS.items():
        parser = made[word] = words.add_parser(word, help=action.help, description=action.help)
        parser.add_argument("-c", "--config", required=True, help="experiment file, e.g. conf/demo.yaml")
        parser.add_argument("--json", action="store_true", help="print JSON")
        for name in action.takes:
            parser.add_argument(name, help="NAME (its newest version), NAME@NUMBER, or NAME@TAG of a pin")
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the config")
    made["diff"].add_argument("--examples", type=int, default=3, help="texts to show of each kind (default: 3)")
    made["pin"].add_argument("--tag", help="a name for the version, for NAME@TAG")
    made["rebuild"].add_argument("--dry-run", action="store_true", help="only compare the fingerprint")
    one = made["take-down"]
    one.add_argument("--id", action="append", default=[], help="id of a document; may be given again and again")
    one.add_argument("--ids-from", metavar="FILE", help="a file with an id a line")
    one.add_argument("--reason", help="kept with the record")
    one.add_argument("--dry-run", action="store_true", help="only tell what would go")
    return top, made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    top, parsers = _parsers()
    if not arguments or arguments[0] not in parsers:
        top.parse_args(arguments[:1])  # prints the help, or what is wrong, and ends the command
    action, parser = ACTIONS[arguments[0]], parsers[arguments[0]]

    def body() -> int:
        given = parser.parse_intermixed_args(arguments[1:])
        config = load_config(given.config, given.overrides)
        session = make_session(config, f"miniplm corpus {arguments[0]}")
        try:
            found = action.run(session, config, given)
        finally:
            session.stop()
        print(json.dumps(found, indent=2, default=str, ensure_ascii=False) if given.json else action.text(found))
        return EXIT_DONE

    return guarded(body)


if __name__ == "__main__":
    sys.exit(main())
