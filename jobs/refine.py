"""`miniplm refine`: score_matrix -> a new version of each refined corpus.

Reads `score_matrix` and the models' records, writes `refined/<name>` and `corpora`. A corpus whose config and inputs
have not changed is left as it is. With --follow, a corpus grows with the matrix: rows that are scored meanwhile and lie
above the cut are appended (`stream.trigger: processing_time` for ever, else to the end of what is there), counted in
`cuts/<name>`. Needs no GPU: change a ratio and run again.

    miniplm refine -c conf/demo.yaml [--follow [--corpus NAME ...]] [key=value ...]
    miniplm refine --rules
    spark-submit --properties-file conf/spark/local.conf jobs/refine.py -c conf/demo.yaml
"""

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jobs import records
from jobs.session import guarded, make_session, stage_parser
from miniplm_udf.config import ExperimentConfig, load_config, printable, to_dict
from miniplm_udf.errors import EXIT_DONE, ConfigError
from miniplm_udf.refinement.follow import follow_query, newest_version
from miniplm_udf.refinement.refine import refine
from miniplm_udf.rules import describe
from miniplm_udf.streams.runner import QueryRunner

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def run(spark: "SparkSession", config: ExperimentConfig) -> dict[str, Any]:
    """Refines all corpora.

    Raises:
        ConfigError: the config has no corpora, or an expression is wrong.
        CorpusError: there is no matrix, or a corpus would be empty.
    """
    start = time.monotonic()
    refined = {name: refine(spark, config, name) for name in _names(config)}
    return {
        "kept": {name: found["n_instances"] for name, found in refined.items()},
        "refined": refined,
        "seconds": round(time.monotonic() - start, 3),
    }


def follow(spark: "SparkSession", config: ExperimentConfig, names: Sequence[str] = ()) -> dict[str, Any]:
    """Follows the named corpora, or all; with processing_time, until it is asked to stop.

    Raises:
        ConfigError, CorpusError: as `run`; another driver follows one of them.
    """
    start = time.monotonic()
    chosen = list(names) or _names(config)
    queries = [follow_query(spark, config, name) for name in chosen]
    QueryRunner(spark, config.root, config.stream).run(queries)
    return {
        "followed": {name: newest_version(spark, config, name) for name in chosen},
        "seconds": round(time.monotonic() - start, 3),
    }


def _names(config: ExperimentConfig) -> list[str]:
    if not config.refine.corpora:
        raise ConfigError("refine.corpora: expected at least one corpus, found none; conf/demo.yaml has examples")
    return list(config.refine.corpora)


def main(argv: Sequence[str] | None = None) -> int:
    parser = stage_parser("refine", __doc__)
    parser.add_argument("--follow", action="store_true", help="append what is scored meanwhile and lies above the cut")
    parser.add_argument(
        "--rules", action="store_true", help="print the rules for refine.corpora.NAME.rule; no -c needed"
    )
    parser.add_argument("--corpus", action="append", default=[], metavar="NAME", help="with --follow: this one alone")

    def body() -> int:
        if "--rules" in (sys.argv[1:] if argv is None else argv):
            print(describe())
            return EXIT_DONE
        arguments = parser.parse_intermixed_args(argv)
        config = load_config(arguments.config, arguments.overrides)
        if arguments.corpus and not arguments.follow:
            raise ConfigError("--corpus: expected together with --follow; without it, all corpora are refined")
        if arguments.dry_run:
            print(json.dumps(printable(to_dict(config)), indent=2))
            return EXIT_DONE
        session = make_session(config, "miniplm refine")
        try:
            if arguments.follow:
                summary = follow(session, config, arguments.corpus)
            else:
                summary = records.execute("refine", run, session, config)
        finally:
            session.stop()
        print(json.dumps({"refine": summary}, indent=2, default=str))
        return EXIT_DONE

    return guarded(body)


if __name__ == "__main__":
    sys.exit(main())
