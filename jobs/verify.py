"""`miniplm verify`: checks a root: nothing lost, nothing twice, every sum. Reads everything, writes nothing.

Prints the sums, one line a check, and exits 1 where one does not hold. It may run while queries run: rows that none has
reached yet are *behind*, not lost. Submit where the tables are large.

    miniplm verify -c conf/demo.yaml
    miniplm verify --root s3a://bucket/run1 --json
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from jobs.session import guarded, make_session
from miniplm_udf.config import ExperimentConfig, load_config
from miniplm_udf.errors import EXIT_DONE, EXIT_FAILED, ConfigError
from miniplm_udf.upkeep.verify import Check, verify

_MARKS = {True: "ok", False: "FAILED"}


def text(checks: Sequence[Check]) -> str:
    """The checks as a table."""
    head = ("", "check", "expected", "found", "behind")
    rows: list[tuple[str, ...]] = [head]
    for check in checks:
        numbers = [f"{n:,}" if isinstance(n, int) else n for n in (check.expected, check.found)]
        rows.append((_MARKS[check.ok], check.name, *numbers, f"{check.behind:,}" if check.behind else ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for check in checks:
        examples = f"for example {', '.join(check.examples)}" if check.examples else ""
        if why := "; ".join(part for part in (check.note, examples) if part):
            lines.append(f"{check.name}: {why}")
    n_failed = sum(not check.ok for check in checks)
    lines.append(f"{len(checks)} checks, {n_failed} failed" if n_failed else f"{len(checks)} checks, all hold")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="miniplm verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-c", "--config", help="experiment file, for its root and its Spark session")
    parser.add_argument("--root", help="the root itself")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the config")

    def body() -> int:
        given = parser.parse_intermixed_args(argv)
        if (given.config is None) == (given.root is None):
            raise ConfigError("verify: expected either -c CONFIG or --root ROOT")
        config = load_config(given.config, given.overrides) if given.config else ExperimentConfig(root=given.root)
        session = make_session(config, "miniplm verify")
        try:
            checks = verify(session, config.root)
        finally:
            session.stop()
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=2) if given.json else text(checks))
        return EXIT_DONE if all(check.ok for check in checks) else EXIT_FAILED

    return guarded(body)


if __name__ == "__main__":
    sys.exit(main())
