"""`miniplm explore`: a local page over a version of a corpus: texts kept and dropped, side by side, with their scores.

Reads `corpora`, `refined/<name>` (or its pinned copy), `score_matrix`, `proxy_scores`, `annotations`, `instances`;
writes nothing under the root, and starts no Spark. The page can be opened on this machine only; Ctrl-C ends it. Needs
the extra `explore`.

    miniplm explore CORPUS -c conf/demo.yaml [--port N] [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/explore.py CORPUS -c conf/demo.yaml
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jobs.command import Command, add_version_argument
from jobs.text import as_json
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import ConfigError


def _run(config: ExperimentConfig, arguments: argparse.Namespace) -> str:
    try:
        import duckdb  # noqa: F401 - to say early that the extra is missing
    except ModuleNotFoundError as error:
        raise ConfigError("explore needs DuckDB: pip install 'miniplm[explore]'") from error
    from miniplm_udf.explorer.candidates import ExploredCorpus
    from miniplm_udf.explorer.server import make_server

    with tempfile.TemporaryDirectory(prefix="miniplm-explore-") as folder:
        candidates = ExploredCorpus(config, arguments.version, str(Path(folder) / "candidates.duckdb"))
        try:
            server = make_server(candidates, arguments.port)
        except OSError as error:
            raise ConfigError(
                f"--port {arguments.port}: {error.strerror}; without --port, a free port is taken"
            ) from error
        with server:
            url = f"http://127.0.0.1:{server.server_address[1]}/"
            shown = f"{candidates.name}@{candidates.version}: {url} (Ctrl-C ends it)"
            print(as_json({"url": url}) if arguments.json else shown, flush=True)
            server.serve_forever()
    return ""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_version_argument(parser, metavar="CORPUS")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 (default: a free one)")


COMMAND = Command(
    name="explore", description=__doc__, run=_run, text=str, add_arguments=_add_arguments, takes_root=True
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm explore` and returns its exit code; `argv` defaults to the arguments of the process."""
    return COMMAND.main(argv)


if __name__ == "__main__":
    sys.exit(main())
