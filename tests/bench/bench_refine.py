"""Refinement against a sort, an approximate quantile and a bare scan; and the join of what is kept with its texts.

    python -m tests.bench.bench_refine [--rows 10000000 100000000] [--only scan ours] [--texts 1000000] [--keep]

Fills a `score_matrix` of each size with generated scores. Ours (the cut, and the selected ids written out), ORDER
BY ... LIMIT, percentile_approx and a filter; a scan that drops what it reads; rows above a known score written out, as
if a cut cost nothing: all of the same columns, each to files of its own. Then `refine` whole, with its provenance and
its commit. Ours is held against the sort, row for row. Prints a table, writes `build/bench/refine.json`: `vs_scan`,
`vs_write`, `vs_sort` and `growth` (seconds a row at the largest size over those at the smallest). With --texts: the
join of half of the ids with texts of 4 KB as `pack` makes it, without broadcast, against a copy of those rows alone
(`text_vs_copy`). Parts and sizes may be run one by one: what was measured before is kept.
"""

import argparse
import dataclasses
import functools
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import session
from miniplm_udf import schemas
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.refine import CorpusConfig, RefineConfig, SelectConfig
from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.config.spark import SparkConfig
from miniplm_udf.packing import corpus as pack
from miniplm_udf.refinement import refine
from miniplm_udf.refinement.keep import choose
from miniplm_udf.refinement.selection import budget_of
from miniplm_udf.store import tables
from miniplm_udf.store.text_join import texts_of
from tests.support import bench_results as results
from tests.support.matrices import ALIASES, write_record
from tests.support.stream_tables import instance_values

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

PARTS = ("scan", "write", "ours", "sort", "percentile", "refine")
RATIO = 0.5
# The columns that our refinement reads: columns of the score and of `where`, and the ids.
COLUMNS = ("instance_id", "split", "teacher_n_tokens", "teacher_nll_mean", "reference_nll_mean")
# The middle of the generated scores.
_MIDDLE = 0.3
_ROWS_PER_COMMIT = 20_000_000
_SHA_512_PER_TEXT = 32


@dataclasses.dataclass(frozen=True)
class MatrixRoot:
    """A root with a `score_matrix` of so many rows, all of them candidates."""

    spark: "SparkSession"
    folder: Path
    rows: int

    @functools.cached_property
    def config(self) -> ExperimentConfig:
        return ExperimentConfig(
            root=str(self.folder / "root"),
            models={alias: ModelConfig(path="/nowhere") for alias in ALIASES},
            refine=RefineConfig(corpora={"half": CorpusConfig(rule="miniplm", select=SelectConfig(ratio=RATIO))}),
        )

    @property
    def budget(self) -> int:
        return budget_of(RATIO, self.rows)

    @property
    def matrix(self) -> "DataFrame":
        return tables.read(self.spark, self.config.layout.table("score_matrix"))

    def generate(self) -> None:
        """Makes the matrix, or the rows that an earlier, interrupted call did not write."""
        for alias in ALIASES:
            write_record(self.config, alias)
        uri, table = self.config.layout.table("score_matrix"), schemas.score_matrix(ALIASES)
        tables.create(self.spark, uri, table)
        for number, start in enumerate(range(0, self.rows, _ROWS_PER_COMMIT)):
            if not self.matrix.where(f"batch_id = {number}").isEmpty():
                continue
            rows = self.spark.range(start, min(start + _ROWS_PER_COMMIT, self.rows)).withColumns(matrix_values(number))
            cast = [rows[field.name].cast(field.dataType) for field in table.spark_schema().fields]
            tables.append(rows.select(*cast), uri, table, "q" * 32, number)

    def candidates(self) -> "DataFrame":
        return refine.candidate_rows(self.matrix, self.config, "half", refine.resolve_corpus(self.config, "half"))

    def written(self, part: str) -> Path:
        return self.folder / part

    def _write(self, frame: "DataFrame", part: str) -> None:
        # Random ids and scores do not compress.
        written = frame.select("instance_id", "score").write.mode("overwrite").option("compression", "none")
        written.parquet(str(self.written(part)))

    def scan(self) -> None:
        self.matrix.select(*COLUMNS).write.format("noop").mode("overwrite").save()

    def ours(self) -> None:
        select = refine.resolve_corpus(self.config, "half").select
        assert select is not None
        rows = self.candidates()
        self._write(choose(rows, select, "half").mark(rows).where("is_kept"), "ours")

    def write(self) -> None:
        from pyspark.sql import functions as F

        self._write(self.candidates().where(F.col("score") > F.lit(_MIDDLE)), "write")

    def sort(self) -> None:
        self._write(
            self.candidates().orderBy("score", "instance_id", ascending=[False, True]).limit(self.budget), "sort"
        )

    def percentile(self) -> None:
        from pyspark.sql import functions as F

        rows = self.candidates()
        (cut,) = rows.agg(F.percentile_approx("score", 1 - RATIO, 10_000)).collect()[0]
        self._write(rows.where(F.col("score") > F.lit(cut)), "percentile")

    def refine(self) -> None:
        # Removed first: an unchanged corpus would be left as it is.
        shutil.rmtree(self.folder / "root/tables/refined", ignore_errors=True)
        shutil.rmtree(self.folder / "root/tables/corpora", ignore_errors=True)
        refine.refine(self.spark, self.config, "half")

    def is_the_sorts(self) -> bool:
        """Whether ours wrote the ids and scores that the sort wrote."""
        from pyspark.sql import functions as F

        hashed = F.xxhash64("instance_id", "score")
        sums = [F.count("*"), F.bit_xor(hashed), F.sum(hashed.bitwiseAND(F.lit(0xFFFFFFFF).cast("bigint")))]
        ours, other = (self.spark.read.parquet(str(self.written(part))).agg(*sums) for part in ("ours", "sort"))
        return ours.collect() == other.collect()


def matrix_values(batch_id: int) -> dict[str, Any]:
    """Columns of the matrix for a number `id`: normal losses, eight sources, ids of 32 hexadecimal digits."""
    from pyspark.sql import functions as F

    values: dict[str, Any] = {
        "instance_id": F.expr("lower(lpad(hex(xxhash64(id, 1)), 16, '0') || lpad(hex(xxhash64(id, 2)), 16, '0'))"),
        "source": F.expr("'source ' || pmod(id, 8)"),
        "split": F.lit("pool"),
        "n_bytes": F.expr("400 + 4 * pmod(hash(id), 900)"),
        "content_hash": F.lit("c"),
        "instance_batch_id": F.lit(batch_id),
        "query_id": F.lit("q" * 32),
        "batch_id": F.lit(batch_id),
    }
    for number, alias in enumerate(ALIASES):
        mean = 3 + _MIDDLE * number + 0.6 * F.randn(10 * batch_id + number)
        values |= {
            f"{alias}_nll_mean": mean,
            f"{alias}_nll_sum_nats": F.lit(1.0),
            f"{alias}_n_tokens": F.expr("100 + pmod(hash(id), 900)"),
            f"{alias}_bits_per_byte": F.lit(1.0),
            f"{alias}_revision": F.lit(f"rev-{alias}"),
        }
    return values


def timed(action: Callable[[], object], repeats: int = 1) -> float:
    """Seconds, of the quickest of some runs."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return min(found)


def measure(sized: MatrixRoot, parts: Sequence[str]) -> dict[str, Any]:
    """One row of the table, of these parts."""
    row: dict[str, Any] = {"rows": sized.rows}
    for part in parts:
        row[part] = timed(getattr(sized, part), 2 if part in ("scan", "write", "ours") else 1)
        print(f"{sized.rows:,} rows: {part} {row[part]:.2f} s", flush=True)
    has_both = all(sized.written(part).exists() for part in ("ours", "sort"))
    if {"ours", "sort"} & set(parts) and has_both and not sized.is_the_sorts():
        raise RuntimeError(f"{sized.rows} rows: expected the rows of the sort, found others")
    return row


@dataclasses.dataclass(frozen=True)
class Texts:
    """`instances` with texts of 4 KB; half of them are kept."""

    spark: "SparkSession"
    folder: Path
    rows: int

    @property
    def uri(self) -> str:
        return str(self.folder / "instances")

    def generate(self) -> None:
        from pyspark.sql import functions as F

        if tables.exists(self.spark, self.uri):
            return
        text = F.concat(*(F.sha2(F.concat_ws("/", "id", F.lit(n)), 512) for n in range(_SHA_512_PER_TEXT)))
        values = {**instance_values(), "text": text, "query_id": F.lit("q" * 32), "batch_id": F.lit(0).cast("bigint")}
        rows = self.spark.range(self.rows).withColumns(values).select(*schemas.INSTANCES.column_names)
        tables.append(rows, self.uri, schemas.INSTANCES)
        kept = tables.read(self.spark, self.uri).where("pmod(xxhash64(instance_id), 2) = 0")
        kept.select("instance_id").write.parquet(str(self.folder / "kept"))
        self._texts().write.parquet(str(self.folder / "kept_texts"))

    def _texts(self) -> "DataFrame":
        kept = self.spark.read.parquet(str(self.folder / "kept"))
        return texts_of(kept, tables.read(self.spark, self.uri), pack.TEXT_COLUMNS, self.rows // 2)

    def join(self) -> None:
        self._texts().write.mode("overwrite").parquet(str(self.folder / "joined"))

    def copy(self) -> None:
        rows = self.spark.read.parquet(str(self.folder / "kept_texts"))
        rows.write.mode("overwrite").parquet(str(self.folder / "copied"))


def shuffled_bytes(spark: "SparkSession") -> int:
    """Bytes that tasks of this session have written for shuffles so far."""
    context: Any = spark._jsc
    context = context.sc()
    context.listenerBus().waitUntilEmpty()
    executors = context.statusStore().executorList(False)
    return sum(executors.apply(index).totalShuffleWrite() for index in range(executors.size()))


def measure_texts(texts: Texts) -> dict[str, Any]:
    spark = texts.spark
    spark.conf.set("spark.sql.autoBroadcastJoinThreshold", "-1")
    texts.generate()
    copy = timed(texts.copy, 3)
    before = shuffled_bytes(spark)
    join = timed(texts.join)
    shuffled = shuffled_bytes(spark) - before
    join = min(join, timed(texts.join, 2))
    n_joined, n_kept = (spark.read.parquet(str(texts.folder / name)).count() for name in ("joined", "kept"))
    if n_joined != n_kept:
        raise RuntimeError(f"expected {n_kept} texts, found {n_joined}")
    return {"texts": texts.rows, "copy": copy, "join": join, "shuffled_mib": shuffled / 2**20}


def ratios(rows: Sequence[dict[str, Any]], texts: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Those that can be had: of the largest size that has the parts."""
    found = {}
    for name, above, below in (
        ("vs_scan", "ours", "scan"),
        ("vs_write", "ours", "write"),
        ("vs_sort", "sort", "ours"),
        ("refine_vs_scan", "refine", "scan"),
    ):
        of = [row for row in rows if above in row and below in row]
        if of:
            found[name] = round(of[-1][above] / of[-1][below], 3)
    ours = [row["ours"] / row["rows"] for row in rows if "ours" in row]
    if len(ours) > 1:
        found["growth"] = round(ours[-1] / ours[0], 3)
    if texts:
        found["text_vs_copy"] = round(texts[-1]["join"] / texts[-1]["copy"], 3)
    return found


def merged(folder: Path, key: str, by: str, new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that earlier runs measured, replaced by the new rows of the same size."""
    path = folder / "refine.json"
    rows = {row[by]: row for row in (json.loads(path.read_text()).get(key, []) if path.exists() else [])}
    for row in new:
        rows[row[by]] = rows.get(row[by], {}) | row
    return [rows[size] for size in sorted(rows)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000_000, 100_000_000], help="sizes of the matrix")
    parser.add_argument(
        "--only", nargs="*", choices=PARTS, default=list(PARTS), help="parts to measure; none: fill alone"
    )
    parser.add_argument("--texts", type=int, default=1_000_000, help="texts to join with; 0: leave out")
    parser.add_argument("--folder", type=Path, default=results.FOLDER / "refine", help="where the tables go")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="where refine.json goes")
    parser.add_argument("--keep", action="store_true", help="leave the tables, for a next run")
    given = parser.parse_args(argv)
    # As `refine` reads.
    conf = {"spark.driver.memory": "4g", "spark.sql.files.maxPartitionBytes": "128m"}
    # ORDER BY ... LIMIT holds its rows in memory, whatever the limit, and fails at 10^8 rows; a sort is held against.
    conf["spark.sql.execution.topKSortFallbackThreshold"] = "1000000"
    spark = session.make_session(ExperimentConfig(root=str(given.folder), spark=SparkConfig(conf=conf)), "bench refine")
    rows, texts = [], []
    try:
        for n in sorted(given.rows):
            sized = MatrixRoot(spark, given.folder / str(n), n)
            sized.generate()
            rows.append(measure(sized, given.only))
        if given.texts:
            texts.append(measure_texts(Texts(spark, given.folder / "texts", given.texts)))
    finally:
        spark.stop()
    all_rows, all_texts = merged(given.results, "rows", "rows", rows), merged(given.results, "texts", "texts", texts)
    found = ratios(all_rows, all_texts)
    print(results.table(("rows", *PARTS), [[row.get(name, "-") for name in ("rows", *PARTS)] for row in all_rows]))
    header = ("texts", "copy", "join", "shuffled_mib")
    print(results.table(header, [[row[name] for name in header] for row in all_texts]))
    print(found)
    results.record("refine", found, all_rows, folder=given.results)
    results.record("refine", found, all_texts, key="texts", folder=given.results)
    if not given.keep:
        shutil.rmtree(given.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
