"""`miniplm inspect`: texts that a version of a corpus kept, or dropped, with their scores. Plain text, or JSON.

Reads `refined/<name>` (or its pinned copy), `corpora`, `instances`, and for what was dropped `score_matrix`; writes
nothing. (Its file has another name than the word: a folder with an `inspect.py` hides Python's own from spark-submit.)

    miniplm inspect CORPUS -c conf/demo.yaml [--side dropped] [--near-cut] [--source S] [--sql CONDITION] [-n ROWS]
    spark-submit --properties-file conf/spark/local.conf jobs/inspect_corpus.py CORPUS -c conf/demo.yaml
"""

import argparse
import json
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.session import guarded, make_session
from miniplm_udf.config import load_config
from miniplm_udf.errors import EXIT_DONE
from miniplm_udf.reading.inspection import SIDES, Question, inspect


def text(found: Mapping[str, Any]) -> str:
    """What was found, for a terminal: a head, and of each row two lines and its text, set in."""
    n_shown, n_matching = len(found["rows"]), found["n_matching"]
    threshold = "" if found["threshold"] is None else f"; threshold {found['threshold']:.6g}"
    head = f"{found['version']}, {found['side']}: {n_shown:,} of {n_matching:,} rows, {found['order']}{threshold}"
    return "\n\n".join([head, *(_row(number, row) for number, row in enumerate(found["rows"], 1))])


def _row(number: int, row: Mapping[str, Any]) -> str:
    distance = "" if row["cut_distance"] is None else f" (cut {row['cut_distance']:+.6g})"
    score = "none" if row["score"] is None else f"{row['score']:.6g}{distance}"
    sizes = f"{row['n_tokens']:,} tokens, {row['n_bytes']:,} bytes"
    means = [f"{name} {value:.6g}" for name, value in row.items() if name.endswith("_nll_mean") and value is not None]
    lines = [f"{number}. {row['source']}  score {score}  {sizes}  {row['instance_id']}"]
    if "document_ids" in row:
        from_byte = f" from byte {row['start_byte']:,}" if row["start_byte"] else ""
        means.append(f"of {', '.join(row['document_ids'])}{from_byte}")
    lines.append("   " + "  ".join(means))
    shown = "(no such instance)" if row["text"] is None else row["text"] + (" ..." if row["is_cut"] else "")
    lines += [f"   | {line}" for line in shown.split("\n")]
    return visible("\n".join(lines))


def visible(shown: str) -> str:
    """The text with what a terminal would obey instead of show (escapes, directions) spelled out, breaks apart."""

    def is_shown(one: str) -> bool:
        return one in "\n\t" or unicodedata.category(one) not in ("Cc", "Cf", "Cs", "Zl", "Zp")

    return "".join(one if is_shown(one) else one.encode("unicode_escape").decode("ascii") for one in shown)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="miniplm inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("version", metavar="CORPUS", help="NAME (its newest version), NAME@NUMBER, or NAME@TAG of a pin")
    made.add_argument("-c", "--config", required=True, help="experiment file, e.g. conf/demo.yaml")
    made.add_argument(
        "--side", choices=SIDES, default="kept", help="what was kept, or candidates that were not (default: kept)"
    )
    made.add_argument("--near-cut", action="store_true", help="those nearest to the cut first; else a random sample")
    made.add_argument("--source", metavar="S", help="of this source alone")
    made.add_argument(
        "--sql", metavar="CONDITION", help="where this holds, e.g. \"cut_distance < 0.1 and text like '%%http%%'\""
    )
    made.add_argument("-n", "--rows", type=int, default=Question.n_rows, help="rows to show (default: %(default)s)")
    made.add_argument(
        "--chars", type=int, default=Question.n_characters, help="characters of a text (default: %(default)s)"
    )
    made.add_argument("--seed", type=int, default=Question.seed, help="of the sample (default: %(default)s)")
    made.add_argument("--json", action="store_true", help="print JSON")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the config")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    def body() -> int:
        given = parser().parse_intermixed_args(argv)
        asked = Question(
            side=given.side, source=given.source, sql=given.sql, near_cut=given.near_cut, n_rows=given.rows,
            n_characters=given.chars, seed=given.seed,
        )  # fmt: skip
        config = load_config(given.config, given.overrides)
        session = make_session(config, "miniplm inspect")
        try:
            found = inspect(session, config.root, given.version, asked)
        finally:
            session.stop()
        print(json.dumps(found, indent=2, default=str, ensure_ascii=False) if given.json else text(found))
        return EXIT_DONE

    return guarded(body)


if __name__ == "__main__":
    sys.exit(main())
