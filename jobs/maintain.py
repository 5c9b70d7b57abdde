"""`miniplm maintain`: merges small files and removes old ones of all tables of a root, under --dry-run only tells.

Reads and writes every table and checkpoint under the root. Pinned versions stay, and so does what a query of the root
has still to read. Run it now and then, also beside a service.

    miniplm maintain -c conf/demo.yaml [--retain-hours H] [--abandoned-days D] [--dry-run] [--json] [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/maintain.py -c conf/demo.yaml
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from jobs.corpus_text import table
from jobs.session import guarded, make_session
from miniplm_udf.config import load_config
from miniplm_udf.errors import EXIT_DONE
from miniplm_udf.upkeep.maintain import ABANDONED_DAYS, RETAIN_HOURS, Maintained, maintain


def text(found: Maintained) -> str:
    """What was done, a line a table."""
    head = ("table", "files removed", "kept hours", "merged", "")
    rows = [
        (one.table, one.n_removed, one.retained_hours, "yes" if one.is_merged else None, one.note)
        for one in found.tables
    ]
    lines = [table(head, rows)]
    lines += [f"pinned: {address}, which a model was trained on" for address in found.pinned]
    lines += [f"removed: {name}" for name in found.forgotten]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="miniplm maintain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-c", "--config", required=True, help="experiment file, e.g. conf/demo.yaml")
    parser.add_argument(
        "--retain-hours",
        type=float,
        metavar="H",
        help="how long replaced files are kept, those of corpora's versions that are not pinned too (default: "
        f"{RETAIN_HOURS:g}, and all versions of corpora and packed sequences)",
    )
    parser.add_argument(
        "--abandoned-days",
        type=float,
        default=ABANDONED_DAYS,
        metavar="D",
        help=f"a query that is behind and has not moved for so long keeps no files (default: {ABANDONED_DAYS:g})",
    )
    parser.add_argument("--dry-run", action="store_true", help="only tell what would be removed")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the config")

    def body() -> int:
        given = parser.parse_intermixed_args(argv)
        config = load_config(given.config, given.overrides)
        session = make_session(config, "miniplm maintain")
        try:
            found = maintain(session, config, given.retain_hours, given.abandoned_days, given.dry_run)
        finally:
            session.stop()
        print(json.dumps(dataclasses.asdict(found), indent=2) if given.json else text(found))
        return EXIT_DONE

    return guarded(body)


if __name__ == "__main__":
    sys.exit(main())
