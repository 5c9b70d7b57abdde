"""`miniplm export`: a version of a corpus as files with texts, spans and scores, for any other trainer.

Reads `refined/<name>` (or its pinned copy), `corpora` and `instances`; writes one new folder: files of about
`--rows-per-file` rows, `manifest.json`, and a `README.md` that `datasets.load_dataset(FOLDER)` reads.

    miniplm export CORPUS --to jsonl|jsonl.gz|jsonl.zst|parquet -c conf/demo.yaml [--out FOLDER] [--overwrite]
    spark-submit --properties-file conf/spark/local.conf jobs/export.py CORPUS --to parquet -c conf/demo.yaml
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from jobs.command import Command, add_version_argument
from jobs.session import command_session
from jobs.text import plain
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.corpora.export import ExportRequest, export
from miniplm_udf.corpora.file_writers import FORMATS


def text(manifest: Any) -> str:
    """Returns one line with the version, counts and place of an export.

    Args:
        manifest: the manifest of the export, a dataclass or plain data.
    """
    row = plain(manifest)
    return (
        f"{row['corpus']}@{row['version']}: {row['n_instances']:,} instances, {row['n_tokens']:,} tokens, "
        f"{row['text_bytes']:,} bytes of text, as {len(row['files']):,} files of {row['n_bytes']:,} bytes "
        f"({row['to']}) in {row['path']}"
    )


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_version_argument(parser, metavar="CORPUS")
    parser.add_argument(
        "--to", choices=FORMATS, required=True, help="the format: JSON lines, with or without compression, or Parquet"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help="path or URI of the new folder (default: ROOT/exports/NAME-VERSION.FORMAT)"
    )
    parser.add_argument(
        "--rows-per-file",
        type=int,
        default=ExportRequest.rows_per_file,
        metavar="N",
        help="rows of a file, about (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in that folder")


def _run(config: ExperimentConfig, arguments: argparse.Namespace) -> Any:
    request = ExportRequest(
        to=arguments.to, out=arguments.out, rows_per_file=arguments.rows_per_file, overwrite=arguments.overwrite
    )
    with command_session(config, "export", ["corpora", "instances"]) as spark:
        return export(spark, config, arguments.version, request)


COMMAND = Command(name="export", description=__doc__, run=_run, text=text, add_arguments=_add_arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm export` and returns its exit code; `argv` defaults to the arguments of the process."""
    return COMMAND.main(argv)


if __name__ == "__main__":
    sys.exit(main())
