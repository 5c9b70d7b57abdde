"""`miniplm inspect`: texts that a version of a corpus kept, or dropped, with their scores. Plain text, or JSON.

Reads `refined/<name>` (or its pinned copy), `corpora`, `instances`, and for dropped rows `score_matrix`; writes
nothing. (The file is not called inspect.py, because that name would hide Python's module from spark-submit.)

    miniplm inspect CORPUS -c conf/demo.yaml [--side dropped] [--near-cut | --highest | --lowest] [--source S]
        [--sql CONDITION] [-n ROWS]
    spark-submit --properties-file conf/spark/local.conf jobs/inspect_corpus.py CORPUS -c conf/demo.yaml
"""

import argparse
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.command import Command, add_version_argument
from jobs.session import command_session
from jobs.text import plain
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.corpora.inspection import ORDERS, SIDES, Question, inspect


def text(answer: Any) -> str:
    """Returns the answer as text for a terminal: a head, and for each row two lines and its text, indented.

    Args:
        answer: the answer of the inspection, a dataclass or plain data.
    """
    shown = plain(answer)
    threshold = "" if shown["threshold"] is None else f"; threshold {shown['threshold']:.6g}"
    head = (
        f"{shown['version']}, {shown['side']}: {len(shown['rows']):,} of {shown['n_matching']:,} rows, "
        f"{shown['order']}{threshold}"
    )
    return "\n\n".join([head, *(_row(number, row) for number, row in enumerate(shown["rows"], 1))])


def _row(number: int, row: Mapping[str, Any]) -> str:
    """Two lines about a row, and its text indented."""
    distance = "" if row["cut_distance"] is None else f" (cut {row['cut_distance']:+.6g})"
    score = "none" if row["score"] is None else f"{row['score']:.6g}{distance}"
    sizes = f"{row['n_tokens']:,} tokens, {row['n_bytes']:,} bytes"
    means = [f"{name} {value:.6g}" for name, value in row.items() if name.endswith("_nll_mean") and value is not None]
    lines = [f"{number}. {row['source']}  score {score}  {sizes}  {row['instance_id']}"]
    if "document_ids" in row:
        from_byte = f" from byte {row['start_byte']:,}" if row["start_byte"] else ""
        noun = "document" if len(row["document_ids"]) == 1 else "documents"
        means.append(f"{noun} {', '.join(row['document_ids'])}{from_byte}")
    lines.append("   " + "  ".join(means))
    shown = "(no such instance)" if row["text"] is None else row["text"] + (" ..." if row["is_cut"] else "")
    lines += [f"   | {line}" for line in shown.split("\n")]
    return visible("\n".join(lines))


def visible(shown: str) -> str:
    """Returns a text with control characters as escapes, because a terminal would obey them instead of showing them.

    Args:
        shown: any text; its line breaks and tabs stay as they are.
    """

    def is_shown(character: str) -> bool:
        return character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")

    return "".join(
        character if is_shown(character) else character.encode("unicode_escape").decode("ascii") for character in shown
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_version_argument(parser, metavar="CORPUS")
    parser.add_argument(
        "--side", choices=SIDES, default="kept", help="rows that were kept, or candidates that were not (default: kept)"
    )
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--near-cut", action="store_true", help="rows nearest to the cut (default: a random sample)")
    order.add_argument("--highest", action="store_true", help="rows with the highest scores, the highest first")
    order.add_argument("--lowest", action="store_true", help="rows with the lowest scores, the lowest first")
    parser.add_argument("--source", metavar="S", help="only rows of this source")
    parser.add_argument(
        "--sql", metavar="CONDITION", help="only rows for which this holds, e.g. \"cut_distance < 0.1 and text like "
        "'%%http%%'\"",
    )  # fmt: skip
    parser.add_argument("-n", "--rows", type=int, default=Question.n_rows, help="rows to show (default: %(default)s)")
    parser.add_argument(
        "--chars", type=int, default=Question.n_characters, help="characters of a text (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=Question.seed, help="seed of the sample (default: %(default)s)")


def _run(config: ExperimentConfig, arguments: argparse.Namespace) -> Any:
    order = next((order for order in ORDERS if getattr(arguments, order, False)), Question.order)
    question = Question(
        side=arguments.side, source=arguments.source, sql=arguments.sql, order=order,
        n_rows=arguments.rows, n_characters=arguments.chars, seed=arguments.seed,
    )  # fmt: skip
    with command_session(config, "inspect", ["corpora", "instances"]) as spark:
        return inspect(spark, config.root, arguments.version, question)


COMMAND = Command(name="inspect", description=__doc__, run=_run, text=text, add_arguments=_add_arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm inspect` and returns its exit code; `argv` defaults to the arguments of the process."""
    return COMMAND.main(argv)


if __name__ == "__main__":
    sys.exit(main())
