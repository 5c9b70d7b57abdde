"""`miniplm generate`: a model continues the beginnings of instances, for students that learn by SeqKD.

Reads `instances` (split = pool); appends to `generations` and `rejects`; writes the model's record
`<root>/models/<alias>.json`. One Structured Streaming query with a checkpoint under `<root>/_checkpoints/`; an instance
that has a row with the same model, seed and settings is never continued again. A rerun continues after a kill. Students
with `corpus: generated` are trained on the result, which `miniplm pack` packs. Off without the section `generate`.
Driver only; the work is in `miniplm_udf.generation`.

    miniplm generate -c conf/pile_seqkd.yaml [key=value ...]
    spark-submit --properties-file conf/spark/local.conf jobs/generate.py -c conf/pile_seqkd.yaml
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from jobs.session import new_run_id
from jobs.stage_runner import stage_main
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.generation.run import GenerationSummary, prepare, summarize
from miniplm_udf.streams.runner import QueryRunner
from miniplm_udf.workers.worker_scorers import TextGenerator

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def run(
    spark: "SparkSession", config: ExperimentConfig, factory: Callable[[], TextGenerator] | None = None
) -> GenerationSummary:
    """Continues the instances of the pool that are not continued yet.

    With `stream.trigger: processing_time` it goes on with new instances until SIGTERM or SIGINT.

    Args:
        spark: the session.
        config: the experiment.
        factory: makes the generator, used instead of the model's.

    Returns:
        The counts of the tables, and of this run.

    Raises:
        ConfigError: the config has no section `generate`.
        CorpusError: there is nothing to continue.
        ModelLoadError: the model is missing, or cannot be used.
    """
    start = time.monotonic()
    generating = prepare(spark, config, new_run_id(), factory)
    QueryRunner(spark, config.root, config.stream).run([generating.query])
    return summarize(spark, config, generating, time.monotonic() - start)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `miniplm generate` and returns its exit code; `argv` defaults to the arguments of the process."""
    return stage_main("generate", argv)


if __name__ == "__main__":
    sys.exit(main())
