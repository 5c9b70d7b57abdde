"""`miniplm maintain`: merges small files and removes old ones in all tables of a root; --dry-run only counts them.

Reads and writes every table and checkpoint under the root. Pinned versions are kept, and so are the files that a query
of the root has still to read. Run it from time to time; it may run next to a service. A retry continues.

    miniplm maintain -c conf/demo.yaml [--retain-hours H] [--abandoned-days D] [--dry-run] [--json] [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/maintain.py -c conf/demo.yaml
"""

import argparse
import sys
from collections.abc import Sequence

from jobs.command import Command
from jobs.session import command_session
from jobs.text import table
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.upkeep import preflight
from miniplm_udf.upkeep.maintain import ABANDONED_DAYS, RETAIN_HOURS, Maintained, maintain


def text(result: Maintained) -> str:
    """Returns one line of text for each table of the root, then the pinned versions and the removed checkpoints.

    Args:
        result: what the maintenance did.
    """
    head = ("table", "files removed", "kept hours", "merged", "")
    rows = [
        (tended.table, tended.n_removed, tended.retained_hours, "yes" if tended.is_merged else None, tended.note)
        for tended in result.tables
    ]
    lines = [table(head, rows)]
    lines += [f"pinned: {address}, which a model was trained on" for address in result.pinned]
    lines += [f"removed: {name}" for name in result.forgotten]
    return "\n".join(lines)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--retain-hours",
        type=float,
        metavar="H",
        help="how long replaced files are kept, also those of corpora's versions that are not pinned (default: "
        f"{RETAIN_HOURS:g}, and all versions of corpora and packed sequences)",
    )
    parser.add_argument(
        "--abandoned-days",
        type=float,
        default=ABANDONED_DAYS,
        metavar="D",
        help=f"a query that is behind and has not moved for so long keeps no files (default: {ABANDONED_DAYS:g})",
    )
    parser.add_argument("--dry-run", action="store_true", help="only count what would be removed")


def _run(config: ExperimentConfig, arguments: argparse.Namespace) -> Maintained:
    # Maintenance could remove the only files that are left to recover from.
    with command_session(config, "maintain", preflight.EVERY_TABLE) as spark:
        return maintain(spark, config, arguments.retain_hours, arguments.abandoned_days, arguments.dry_run)


COMMAND = Command(name="maintain", description=__doc__, run=_run, text=text, add_arguments=_add_arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm maintain` and returns its exit code; `argv` defaults to the arguments of the process."""
    return COMMAND.main(argv)


if __name__ == "__main__":
    sys.exit(main())
