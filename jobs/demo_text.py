"""Writes the demo's corpus: documentation text of the Python installation, as gzip JSONL. No Spark, no download.

Reads the standard library and the installed packages; writes `<to>/demo-text-NNNN.jsonl.gz` (fields id, source, text).
miniplm_udf/ingestion/demo_text.py says which text is taken, and why a second run changes nothing.

    miniplm demo-text --to build/demo-text --scale 1.0
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.command import guarded, make_parser
from jobs.stage_text import stage_text
from jobs.text import as_json
from miniplm_udf.errors import EXIT_DONE
from miniplm_udf.ingestion.demo_text import write_demo_text
from miniplm_udf.storage import Json


def run(to: Path, scale: float = 1.0) -> Json:
    """Writes the text.

    Args:
        to: the folder; it is made.
        scale: size of the corpus; 1 is about 500 KB of text.

    Returns:
        `folder`, `scale`, `shards` (their number) and `sources` (counts by source).
    """
    manifest = write_demo_text(to, scale)
    return {"folder": str(to), "scale": scale, "shards": len(manifest.shards), "sources": manifest.sources}


def command_parser() -> argparse.ArgumentParser:
    """The parser of `miniplm demo-text`."""
    parser = make_parser("demo-text", __doc__)
    parser.add_argument("--to", type=Path, default=Path("build/demo-text"), help="folder of the shards")
    parser.add_argument("--scale", type=float, default=1.0, help="1 is about 500 KB of text")
    parser.add_argument("--dry-run", action="store_true", help="print the folder and the scale; do nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm demo-text` and returns its exit code; `argv` defaults to the arguments of the process."""
    arguments = command_parser().parse_args(argv)

    def body() -> int:
        planned = {"folder": str(arguments.to), "scale": arguments.scale}
        result = planned if arguments.dry_run else run(arguments.to, arguments.scale)
        print(as_json({"demo-text": result}) if arguments.json else stage_text("demo-text", result))
        return EXIT_DONE

    return guarded(body, arguments.debug)


if __name__ == "__main__":
    sys.exit(main())
