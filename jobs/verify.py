"""`miniplm verify`: checks that no row is lost or duplicated and that all sums agree. Writes nothing.

Reads everything. Prints one line for each check, and exits with 1 if one does not hold. It may run while queries run:
rows that no query has reached yet are *behind*, not lost. Use spark-submit if the tables are large.

    miniplm verify -c conf/demo.yaml
    miniplm verify --root s3a://bucket/run1 --json
    spark-submit --properties-file conf/spark/local.conf jobs/verify.py -c conf/demo.yaml
"""

import argparse
import sys
from collections.abc import Sequence

from jobs.command import Command
from jobs.session import spark_session
from jobs.text import table
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import EXIT_DONE, EXIT_FAILED
from miniplm_udf.task_progress import watched_tasks
from miniplm_udf.upkeep.verify import Check, verify

_MARKS = {True: "ok", False: "FAILED"}


def text(checks: Sequence[Check]) -> str:
    """Returns the checks as a table of text, and below it their notes and examples.

    Args:
        checks: the finished checks.
    """
    head = ("", "check", "expected", "found", "behind")
    rows = [
        (_MARKS[check.ok], check.name, check.expected, check.found, f"{check.behind:,}" if check.behind else "")
        for check in checks
    ]
    lines = [table(head, rows)]
    for check in checks:
        examples = f"for example {', '.join(check.examples)}" if check.examples else ""
        if why := "; ".join(part for part in (check.note, examples) if part):
            lines.append(f"{check.name}: {why}")
    n_failed = sum(not check.ok for check in checks)
    lines.append(f"{len(checks)} checks, {n_failed} failed" if n_failed else f"{len(checks)} checks, all hold")
    return "\n".join(lines)


def _run(config: ExperimentConfig, arguments: argparse.Namespace) -> list[Check]:
    with spark_session(config, "miniplm verify") as spark, watched_tasks(spark, "verify"):
        return verify(spark, config.root)


def _exit_code(checks: Sequence[Check]) -> int:
    return EXIT_DONE if all(check.ok for check in checks) else EXIT_FAILED


COMMAND = Command(name="verify", description=__doc__, run=_run, text=text, takes_root=True, exit_code=_exit_code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm verify` and returns its exit code; `argv` defaults to the arguments of the process."""
    return COMMAND.main(argv)


if __name__ == "__main__":
    sys.exit(main())
