"""`miniplm refine`: score_matrix -> a new version of each refined corpus.

Reads `score_matrix` and the models' records, writes `refined/<name>` and `corpora`. A corpus whose config and inputs
have not changed is left as it is. With --follow, a corpus grows with the matrix: newly scored rows above the cut are
appended, and counted in `cuts/<name>` (with `stream.trigger: processing_time` until it is stopped, else to the end of
the matrix). Needs no GPU: change a ratio and run again. A retry continues after a kill. Driver only.

    miniplm refine -c conf/demo.yaml [--follow [--corpus NAME ...]] [key=value ...]
    miniplm refine --rules
    spark-submit --properties-file conf/spark/local.conf jobs/refine.py -c conf/demo.yaml
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jobs.stage_runner import stage_main
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.errors import ConfigError
from miniplm_udf.refinement.follow import FollowedVersion, Follower, followed_version
from miniplm_udf.refinement.refine import RefinedVersion, refine
from miniplm_udf.streams.runner import QueryRunner

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefineSummary:
    """The result of `miniplm refine`: kept instances and newest versions by corpus, and the seconds that it took."""

    kept: dict[str, int]
    refined: dict[str, RefinedVersion]
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class FollowSummary:
    """The result of `miniplm refine --follow`: newest versions by corpus, and the seconds that it took."""

    followed: dict[str, FollowedVersion]
    seconds: float


def run(spark: "SparkSession", config: ExperimentConfig) -> RefineSummary:
    """Refines all corpora; returns the summary of the stage.

    Args:
        spark: the session.
        config: the experiment.

    Raises:
        ConfigError: the config has no corpora, or an expression is wrong.
        CorpusError: there is no matrix, or a corpus would be empty.
    """
    start = time.monotonic()
    refined = {name: refine(spark, config, name) for name in _names(config)}
    kept = {name: version.n_instances for name, version in refined.items()}
    return RefineSummary(kept=kept, refined=refined, seconds=round(time.monotonic() - start, 3))


def follow(spark: "SparkSession", config: ExperimentConfig, names: Sequence[str] = ()) -> FollowSummary:
    """Follows corpora: appends newly scored rows above the cut; returns the summary of the stage.

    With processing_time, it runs until it is asked to stop.

    Args:
        names: the corpora to follow; none: all.

    Raises:
        ConfigError, CorpusError: a corpus cannot be refined (see `run`), or another driver follows one of the corpora.
    """
    start = time.monotonic()
    chosen = list(names) or _names(config)
    queries = [Follower(spark, config, name) for name in chosen]
    QueryRunner(spark, config.root, config.stream).run(queries)
    followed = {name: followed_version(config, name) for name in chosen}
    return FollowSummary(followed=followed, seconds=round(time.monotonic() - start, 3))


def _names(config: ExperimentConfig) -> list[str]:
    if not config.refine.corpora:
        raise ConfigError("refine.corpora: expected at least one corpus, found none; conf/demo.yaml has examples")
    return list(config.refine.corpora)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm refine` and returns its exit code; `argv` defaults to the arguments of the process."""
    return stage_main("refine", argv)


if __name__ == "__main__":
    sys.exit(main())
