"""Following against refining: the rank error of the cut, and what a micro-batch costs as the matrix grows.

Fills a matrix with generated scores, follows four rules through micro-batches of 20,000 rows whose scores drift, and
holds each cut against the exact one over all rows so far (`refine.select`). Prints a table, writes
`build/bench/follow.json`: `rank_error`, the worst share of the candidates by which a cut is wrong, and
`follow_growth`, the time of a micro-batch at the largest matrix over that at the smallest. Needs Spark, no model.

    python -m tests.bench.bench_follow [--rows 100000,1000000] [--batches 4]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.session import make_session
from miniplm_udf import schemas
from miniplm_udf.config.experiment import ExperimentConfig, fingerprint
from miniplm_udf.config.refine import CorpusConfig, RefineConfig, SelectConfig
from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.config.spark import SparkConfig
from miniplm_udf.refinement import cuts, refine
from miniplm_udf.refinement.follow import Follower
from miniplm_udf.refinement.keep import choose
from miniplm_udf.refinement.selection import is_finite
from miniplm_udf.store import corpus_records, tables
from tests.support import bench_results as results
from tests.support.matrices import ALIASES, DIFFERENCE, write_record

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

BATCH_ROWS = 20_000
QUERY = "q" * 32
RULES = {
    "difference, half of the instances": CorpusConfig(score=DIFFERENCE, select=SelectConfig(ratio=0.5)),
    "difference, a tenth of the tokens": CorpusConfig(score=DIFFERENCE, select=SelectConfig(ratio=0.1, by="tokens")),
    "perplexity, half of the instances": CorpusConfig(score="-teacher_nll_mean", select=SelectConfig(ratio=0.5)),
    "random half": CorpusConfig(score="0", select=SelectConfig(rule="random", ratio=0.5)),
}


def fill(spark: "SparkSession", config: ExperimentConfig, batch_id: int, start: int, n: int) -> None:
    """One commit of the matrix: normal scores, whose mean drifts with the micro-batch."""
    from pyspark.sql import functions as F

    table = schemas.score_matrix(ALIASES)
    columns: dict[str, Any] = {
        "instance_id": F.md5(F.col("id").cast("string").cast("binary")),
        "source": F.lit("web"), "split": F.lit("pool"), "n_bytes": F.lit(2000), "content_hash": F.lit("c"),
        "instance_batch_id": F.lit(batch_id), "query_id": F.lit(QUERY), "batch_id": F.lit(batch_id),
        "length": F.expr("100 + pmod(hash(id), 900)"),
    }  # fmt: skip
    for number, alias in enumerate(ALIASES):
        columns[f"{alias}_nll_mean"] = 3 + number * (0.2 + 0.02 * batch_id) + 0.4 * F.randn(2 * batch_id + number)
        columns[f"{alias}_nll_sum_nats"] = F.lit(1.0)
        columns[f"{alias}_n_tokens"] = F.expr("100 + pmod(hash(id), 900)")
        columns[f"{alias}_bits_per_byte"] = F.lit(1.0)
        columns[f"{alias}_revision"] = F.lit(f"rev-{alias}")
    rows = spark.range(start, start + n).withColumns(columns)
    cast = [F.col(f.name).cast(f.dataType).alias(f.name) for f in table.spark_schema().fields]
    tables.append(rows.select(*cast), config.layout.table("score_matrix"), table, QUERY, batch_id)


def rank_error(config: ExperimentConfig, name: str, matrix: "DataFrame", cut: dict[str, Any]) -> tuple[int, int]:
    """(by how many ranks the cut is wrong, candidates)."""
    from pyspark.sql import functions as F

    resolved = refine.resolve_corpus(config, name)
    rows = refine.candidate_rows(matrix, config, name, resolved)
    assert resolved.select is not None
    exact = choose(rows, resolved.select, name).mark(rows)
    bucket = cuts.bucket_column(resolved.select, is_finite())
    n_rows, n_exact, n_bucket = exact.agg(
        F.count("*"), F.count_if("is_kept"), F.count_if(bucket >= cut["bucket"])
    ).collect()[0]
    assert abs(n_exact - n_bucket) <= cut["boundary_rows"]
    return abs(n_exact - n_bucket), n_rows


def measure(spark: "SparkSession", root: Path, n_rows: int, n_batches: int) -> list[dict[str, Any]]:
    """A row for each rule."""
    named = {f"rule{number}": corpus for number, corpus in enumerate(RULES.values())}
    config = ExperimentConfig(
        root=str(root),
        models={alias: ModelConfig(path="/nowhere") for alias in ALIASES},
        refine=RefineConfig(corpora=named),
    )
    for alias in ALIASES:
        write_record(config, alias)
    fill(spark, config, 0, 0, n_rows)
    matrix = tables.read(spark, config.layout.table("score_matrix"))
    followers = {name: Follower(spark, config, name) for name in named}
    for follower in followers.values():
        follower.source()
        follower.micro_batch(matrix, "", 0)
    seconds: dict[str, list[float]] = {name: [] for name in named}
    errors: dict[str, list[float]] = {name: [] for name in named}
    for batch_id in range(1, n_batches + 1):
        fill(spark, config, batch_id, n_rows + batch_id * BATCH_ROWS, BATCH_ROWS)
        matrix = tables.read(spark, config.layout.table("score_matrix"))
        for name, follower in followers.items():
            began = time.monotonic()
            follower.micro_batch(matrix.where(matrix.batch_id == batch_id), "", batch_id)
            seconds[name].append(time.monotonic() - began)
            newest = corpus_records.newest(config.layout.cuts(name))
            assert newest is not None
            assert newest.metadata is not None
            wrong, n_candidates = rank_error(config, name, matrix, newest.metadata["cut"])
            errors[name].append(wrong / n_candidates)
    return [
        {
            "rows": n_rows, "rule": rule, "rank_error": max(errors[name]), "seconds": statistics.median(seconds[name]),
            "buckets": len(cuts.read_counts(spark, config.layout.cuts(name), *_state(config, name)).counts),
        }
        for name, rule in zip(named, RULES, strict=True)
    ]  # fmt: skip


def _state(config: ExperimentConfig, name: str) -> tuple[str, str]:
    return fingerprint(refine.plain_config(config, refine.resolve_corpus(config, name))), QUERY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="100000,1000000", help="sizes of the matrix, ascending")
    parser.add_argument("--batches", type=int, default=4)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.rows.split(",")]
    spark = make_session(ExperimentConfig(root="/tmp/unused", spark=SparkConfig(master="local[2]")), "bench_follow")
    try:
        rows: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as folder:
            for size in sizes:
                rows += measure(spark, Path(folder) / f"root{size}", size, arguments.batches)
    finally:
        spark.stop()
    header = ("rows", "rule", "buckets", "worst rank error, % of candidates", "s a micro-batch")
    shown = [(f"{r['rows']:,}", r["rule"], r["buckets"], f"{100 * r['rank_error']:.4f}", r["seconds"]) for r in rows]
    print(results.table(header, shown))
    median = {size: statistics.median(row["seconds"] for row in rows if row["rows"] == size) for size in sizes}
    ratios = {
        "rank_error": max(row["rank_error"] for row in rows),
        "follow_growth": round(median[sizes[-1]] / median[sizes[0]], 3),
    }
    print(f"ratios: {ratios}; written to {results.record('follow', ratios, rows)}")


if __name__ == "__main__":
    main()
