"""`miniplm export`: a version of a corpus as files with texts, spans and scores, for any other trainer.

Reads `refined/<name>` (or its pinned copy), `corpora` and `instances`; writes one new folder: files of about
`--rows-per-file` rows, `manifest.json`, and a `README.md` that `datasets.load_dataset(FOLDER)` reads.

    miniplm export CORPUS --to jsonl.zst|parquet -c conf/demo.yaml [--out FOLDER] [--overwrite]
    spark-submit --properties-file conf/spark/local.conf jobs/export.py CORPUS --to parquet -c conf/demo.yaml
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.session import guarded, make_session
from miniplm_udf.config import load_config
from miniplm_udf.errors import EXIT_DONE
from miniplm_udf.reading.export import ExportRequest, export
from miniplm_udf.reading.file_writers import FORMATS


def text(found: Mapping[str, Any]) -> str:
    """What was written, on one line."""
    return (
        f"{found['corpus']}@{found['version']}: {found['n_instances']:,} instances, {found['n_tokens']:,} tokens, "
        f"{found['text_bytes']:,} bytes of text, as {len(found['files']):,} files of {found['n_bytes']:,} bytes "
        f"({found['to']}) in {found['path']}"
    )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="miniplm export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("version", metavar="CORPUS", help="NAME (its newest version), NAME@NUMBER, or NAME@TAG of a pin")
    made.add_argument("-c", "--config", required=True, help="experiment file, e.g. conf/demo.yaml")
    made.add_argument("--to", choices=FORMATS, required=True, help="the format")
    made.add_argument(
        "--out", metavar="FOLDER", help="path or URI of the folder to make (default: ROOT/exports/NAME-VERSION.FORMAT)"
    )
    made.add_argument(
        "--rows-per-file",
        type=int,
        default=ExportRequest.rows_per_file,
        metavar="N",
        help="about (default: %(default)s)",
    )
    made.add_argument("--overwrite", action="store_true", help="replace an earlier export in that place")
    made.add_argument("--json", action="store_true", help="print the manifest")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides of the config")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    def body() -> int:
        given = parser().parse_intermixed_args(argv)
        request = ExportRequest(
            to=given.to, out=given.out, rows_per_file=given.rows_per_file, overwrite=given.overwrite
        )
        config = load_config(given.config, given.overrides)
        session = make_session(config, "miniplm export")
        try:
            found = export(session, config, given.version, request)
        finally:
            session.stop()
        print(json.dumps(found, indent=2, ensure_ascii=False) if given.json else text(found))
        return EXIT_DONE

    return guarded(body)


if __name__ == "__main__":
    sys.exit(main())
