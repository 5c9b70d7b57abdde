"""Writes the demo's corpus: documentation text of the Python installation, as gzip JSONL. No Spark, no download.

    miniplm demo-text --to build/demo-text --scale 1.0

Reads the standard library and the installed packages; writes `<to>/demo-text-NNNN.jsonl.gz` (fields id, source, text).
What is taken, and why a second run changes nothing: miniplm_udf/demo_text.py.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.session import guarded
from miniplm_udf.demo_text import write_demo_text
from miniplm_udf.errors import EXIT_DONE


def run(to: Path, scale: float = 1.0) -> dict[str, Any]:
    """Writes the text and returns how much of each source there is."""
    manifest = write_demo_text(to, scale)
    return {"folder": str(to), "scale": scale, "shards": len(manifest["shards"]), "sources": manifest["sources"]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="miniplm demo-text", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--to", type=Path, default=Path("build/demo-text"), help="folder of the shards")
    parser.add_argument("--scale", type=float, default=1.0, help="1 is about 500 KB of text")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written; do nothing")
    arguments = parser.parse_args(argv)

    def body() -> int:
        if arguments.dry_run:
            print(json.dumps({"demo-text": {"folder": str(arguments.to), "scale": arguments.scale}}, indent=2))
            return EXIT_DONE
        print(json.dumps({"demo-text": run(arguments.to, arguments.scale)}, indent=2))
        return EXIT_DONE

    return guarded(body)


if __name__ == "__main__":
    sys.exit(main())
