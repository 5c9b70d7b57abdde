"""Near-duplicates planted at known similarities and found again, and what each group of annotations costs.

    python -m tests.bench.bench_annotate [--pairs 200] [--words 300] [--threshold 0.8] [--texts 20000] [--only ...]

Recall: pairs of a random text and its edited copy (words replaced, left out, put in; passages replaced), of
similarities from 0.5 to 0.99, among as many texts that are like none. Each copy is ingested after its original. A pair
counts by its true similarity, computed in plain Python; it is found where the copy names its original. Precision: of
all rows that name another, those whose true similarity reaches the threshold. Cost: a root of generated texts of 4 KB,
annotated by each group alone. Prints two tables, writes `build/bench/annotate.json`.
"""

import argparse
import dataclasses
import datetime
import itertools
import random
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import session
from miniplm_udf import schemas
from miniplm_udf.annotations import annotate, minhash
from miniplm_udf.config.annotate import AnnotateConfig, ContaminationConfig, NearDuplicatesConfig
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.spark import SparkConfig
from miniplm_udf.store import tables
from tests.support import bench_results as results
from tests.support.annotation_oracles import VOCABULARY, Planted, jaccard, plant, random_text
from tests.support.stream_tables import instance_values

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

TARGETS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.83, 0.86, 0.9, 0.95, 0.99)
_EDGES = (0.0, 0.55, 0.65, 0.75, 0.8, 0.85, 0.9, 0.95, 1.01)
PARTS = ("recall", "cost")
_WORDS_OF_4_KB = 800


def config_of(folder: Path, settings: AnnotateConfig) -> ExperimentConfig:
    return ExperimentConfig(root=str(folder / "root"), annotate=settings)


def write_texts(frame: "DataFrame", config: ExperimentConfig, values: dict[str, Any]) -> None:
    """Appends instances.

    Args:
        frame: with what the values are made of.
        values: other columns than the generated ones.
    """
    from pyspark.sql import functions as F

    whole = {**instance_values(), "query_id": F.lit("q" * 32), "batch_id": F.lit(0).cast("bigint"), **values}
    # From the frame: a value may be one of its own columns.
    rows = frame.select(*(whole[name].alias(name) for name in schemas.INSTANCES.column_names))
    tables.append(rows, config.layout.table("instances"), schemas.INSTANCES)


def plant_pairs(spark: "SparkSession", config: ExperimentConfig, pairs: Sequence[Planted], n_words: int) -> None:
    """Ingests the originals and as many texts that are like none, and an hour later the copies."""
    from pyspark.sql import functions as F

    rng = random.Random(1)
    first = {f"original {number}": pair.original for number, pair in enumerate(pairs)}
    first |= {f"other {number}": random_text(rng, n_words) for number in range(len(pairs))}
    second = {f"copy {number}": pair.copy for number, pair in enumerate(pairs)}
    for hour, texts in enumerate((first, second)):
        frame = spark.createDataFrame([(0, *row) for row in texts.items()], "id bigint, name string, text string")
        at = datetime.datetime(2026, 1, 1, hour, tzinfo=datetime.UTC)
        own = {"instance_id": F.col("name"), "text": F.col("text"), "content_hash": F.md5(F.col("text").cast("binary"))}
        write_texts(frame, config, {**own, "ingested_at": F.lit(at)})


@dataclasses.dataclass(frozen=True)
class Bin:
    """Pairs of a true similarity from `low` up to `high`; `expected` is the share that the bands promise."""

    low: float
    high: float
    n_pairs: int
    n_found: int
    expected: float


def measure_recall(
    spark: "SparkSession", folder: Path, n_pairs: int, n_words: int, threshold: float
) -> tuple[list[Bin], dict[str, float]]:
    """Bins, and `recall` and `precision` over all."""
    config = config_of(folder, AnnotateConfig(near_duplicates=NearDuplicatesConfig(threshold=threshold)))
    rng = random.Random(0)
    pairs = [plant(rng, target, n_words) for target in TARGETS for _ in range(n_pairs)]
    plant_pairs(spark, config, pairs, n_words)
    annotate.annotate(spark, config)
    rows = tables.read(spark, config.layout.table("annotations")).where("near_duplicate_of is not null").collect()
    named = {row["instance_id"]: row["near_duplicate_of"] for row in rows}
    found = [named.get(f"copy {number}") == f"original {number}" for number in range(len(pairs))]
    texts = {f"original {number}": pair.original for number, pair in enumerate(pairs)}
    texts |= {f"copy {number}": pair.copy for number, pair in enumerate(pairs)}
    right = [
        name in texts and other in texts and jaccard(texts[name], texts[other]) >= threshold
        for name, other in named.items()
    ]
    bins = []
    bands = minhash.bands_of(threshold)
    for low, high in itertools.pairwise(_EDGES):
        of = [number for number, pair in enumerate(pairs) if low <= pair.jaccard < high]
        shared = [minhash.p_shared(pairs[n].jaccard, *bands) if pairs[n].jaccard >= threshold else 0.0 for n in of]
        bins.append(Bin(low, min(high, 1.0), len(of), sum(found[n] for n in of), sum(shared) / max(len(of), 1)))
    above = [number for number, pair in enumerate(pairs) if pair.jaccard >= threshold]
    ratios = {
        "recall": round(sum(found[number] for number in above) / len(above), 4),
        "precision": round(sum(right) / len(right), 4),
    }
    return bins, ratios


def generate_texts(spark: "SparkSession", config: ExperimentConfig, n_texts: int) -> None:
    """Texts of random words, a tenth of which are copies of others."""
    from pyspark.sql import functions as F

    vocabulary = F.array(*map(F.lit, VOCABULARY))
    seed = F.when(F.col("id") % 10 == 0, F.col("id") / 2).otherwise(F.col("id")).cast("bigint")
    drawn = F.transform(
        F.sequence(F.lit(1), F.lit(_WORDS_OF_4_KB)),
        lambda place: F.get(vocabulary, F.pmod(F.xxhash64(seed, place), F.lit(len(VOCABULARY))).cast("int")),
    )
    text = F.concat(F.array_join(drawn, " "), F.lit(".\n"))
    values = {"text": text, "content_hash": F.md5(text.cast("binary"))}
    write_texts(spark.range(n_texts), config, values)


def measure_cost(spark: "SparkSession", folder: Path, n_texts: int) -> list[dict[str, Any]]:
    """Seconds of each group alone over the same texts, and of a second run that finds nothing new."""
    evaluation = folder / "evaluation.txt"
    evaluation.parent.mkdir(parents=True, exist_ok=True)
    evaluation.write_text(random_text(random.Random(2), 100_000))
    groups: dict[str, AnnotateConfig] = {
        "duplicates": AnnotateConfig(duplicates=True),
        "near_duplicates": AnnotateConfig(near_duplicates=NearDuplicatesConfig()),
        "contamination": AnnotateConfig(contamination=ContaminationConfig(files=str(evaluation))),
        "language": AnnotateConfig(language=True),
        "quality": AnnotateConfig(quality=True),
    }
    generate_texts(spark, config_of(folder, groups["duplicates"]), n_texts)
    rows = []
    for group, settings in groups.items():
        row: dict[str, Any] = {"group": group, "texts": n_texts}
        for run in ("seconds", "again"):
            start = time.perf_counter()
            annotate.annotate(spark, config_of(folder, settings))
            row[run] = time.perf_counter() - start
        print(f"{group}: {row['seconds']:.1f} s, again {row['again']:.1f} s", flush=True)
        rows.append({**row, "texts_per_second": n_texts / row["seconds"]})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200, help=f"planted at each of {TARGETS}")
    parser.add_argument("--words", type=int, default=300, help="of a planted text")
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--texts", type=int, default=20_000, help="texts of 4 KB to measure the cost on")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--folder", type=Path, default=results.FOLDER / "annotate", help="where the tables go")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="where annotate.json goes")
    given = parser.parse_args(argv)
    base = ExperimentConfig(root=str(given.folder), spark=SparkConfig(conf={"spark.driver.memory": "4g"}))
    spark = session.make_session(base, "bench annotate")
    shutil.rmtree(given.folder, ignore_errors=True)
    try:
        if "recall" in given.only:
            bins, ratios = measure_recall(spark, given.folder / "recall", given.pairs, given.words, given.threshold)
            rows = [dataclasses.asdict(one) for one in bins]
            print(
                results.table(("low", "high", "n_pairs", "n_found", "expected"), [list(row.values()) for row in rows])
            )
            print(ratios)
            results.record("annotate", ratios, rows, key=f"threshold {given.threshold:g}", folder=given.results)
        if "cost" in given.only:
            rows = measure_cost(spark, given.folder / "cost", given.texts)
            header = ("group", "texts", "seconds", "again", "texts_per_second")
            print(results.table(header, [[row[name] for name in header] for row in rows]))
            results.record("annotate", {}, rows, key="cost", folder=given.results)
    finally:
        spark.stop()
        shutil.rmtree(given.folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
