"""Measures the removal of planted noise: by the difference, either model alone, annotations, the advised `where`.

    python -m tests.bench.bench_noise [--clean 200] [--noise 40] [--bytes 500] [--keep] [-c conf/demo.yaml]

Clean text: beginnings of pool instances of the demo's root, which its reference was not trained on, without instances
that are near-duplicates of each other. Data files (tables, JSON) are shown separately. Noise of equal length: shuffled
words, base64, digits, repeated licence headers, and near-duplicates of clean texts, which are ingested later. The
stages themselves annotate and score all texts, with the demo's teacher and reference. Prints, for each kind, the
probability that a clean text ranks above a noisy one (AUC; ties count one half); for a condition, a text that passes
ranks above one that fails. Needs the root of `miniplm reference -c conf/demo.yaml`; `make bench-noise` makes it. Writes
`build/bench/noise.json`.
"""

import argparse
import base64
import dataclasses
import datetime
import random
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import score, session
from miniplm_udf import schemas
from miniplm_udf.annotations import annotate
from miniplm_udf.config.annotate import AnnotateConfig, NearDuplicatesConfig
from miniplm_udf.config.experiment import ExperimentConfig, load_config
from miniplm_udf.config.sections import SplitConfig
from miniplm_udf.refinement import cleaning
from miniplm_udf.store import tables
from tests.support import bench_results as results
from tests.support.annotation_oracles import jaccard
from tests.support.stream_tables import instance_values

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

CLEAN, DATA = "clean", "data_files"
SCORES = {
    "difference": "reference_nll_mean - teacher_nll_mean",
    "teacher": "-teacher_nll_sum_nats / n_bytes",
    "reference": "-reference_nll_sum_nats / n_bytes",
}
RANKED = "recipe, then difference"
# Measured, and not part of the recipe: they lose too much of text that is not prose.
OTHER_LINES = ("language = 'en'", "n_stop_words >= 2", f"{SCORES['difference']} > 0")
_THRESHOLD = 0.5
_HOLDERS = ("Example Corporation", "The Sample Authors", "J. Doe", "Northwind Ltd", "Contoso Project", "A. N. Other")
_HEADERS = (
    "# Copyright {year} {holder}. All rights reserved.\n# Use of this source code is governed by a BSD-style license\n"
    "# that can be found in the LICENSE file.\n\n",
    "/*\n * Copyright (c) {year}, {holder}\n * SPDX-License-Identifier: Apache-2.0\n *\n * Licensed under the Apache "
    "License, Version 2.0.\n */\n\n",
    '// Copyright {year} {holder}\n// THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND.\n\n',
)


def shuffled_words(rng: random.Random, text: str) -> str:
    """The words in another order; spaces and line ends stay in their places."""
    words = text.split()
    rng.shuffle(words)
    rest = iter(words)
    return re.sub(r"\S+", lambda match: next(rest), text)


def base64_lines(rng: random.Random, text: str) -> str:
    return base64.encodebytes(rng.randbytes(len(text) * 3 // 4)).decode()


def digits(rng: random.Random, text: str) -> str:
    numbers = [str(rng.randrange(10 ** rng.randint(1, 9))) for _ in range(len(text) // 3)]
    return " ".join(numbers)


def boilerplate(rng: random.Random, text: str) -> str:
    header = rng.choice(_HEADERS).format(year=rng.randint(1995, 2024), holder=rng.choice(_HOLDERS))
    return header * (len(text) // len(header) + 1)


def near_duplicate(rng: random.Random, text: str) -> str:
    """The text with one of its words in forty replaced."""
    words = text.split(" ")
    for place in rng.sample(range(len(words)), max(1, len(words) // 40)):
        words[place] = rng.choice(words)
    return " ".join(words)


KINDS: dict[str, Callable[[random.Random, str], str]] = {
    "shuffled words": shuffled_words,
    "base64": base64_lines,
    "digits": digits,
    "boilerplate": boilerplate,
    "near duplicates": near_duplicate,
}


def clean_texts(spark: "SparkSession", config: ExperimentConfig, n_texts: int, n_bytes: int) -> list[tuple[str, str]]:
    """Source and beginning of pool instances, in the order of a hash of their ids, no two of them nearly the same."""
    from pyspark.sql import functions as F

    pool = tables.read(spark, config.layout.table("instances")).where("split = 'pool'")
    chosen: list[tuple[str, str]] = []
    for row in pool.orderBy(F.xxhash64("instance_id")).select("source", "text").collect():
        text = row["text"].encode()[:n_bytes].decode(errors="ignore")
        is_near = any(jaccard(text, other) >= _THRESHOLD for _, other in chosen)
        if len(chosen) < n_texts and len(text.encode()) >= n_bytes * 0.8 and not is_near:
            chosen.append((row["source"], text))
    return chosen


def plant_noise(texts: Sequence[str], n_noise: int) -> list[tuple[str, str]]:
    """Kind and text of the planted rows, each made from a clean text and at most as long."""
    rng = random.Random(0)
    return [
        (kind, make(rng, text)[: len(text)])
        for kind, make in KINDS.items()
        for text in rng.sample(list(texts), min(n_noise, len(texts)))
    ]


def write_instances(
    spark: "SparkSession", config: ExperimentConfig, batches: Sequence[Sequence[tuple[str, str]]]
) -> None:
    """Writes (kind, text) rows as pool instances; each batch is ingested an hour after the one before."""
    from pyspark.sql import functions as F

    for hour, rows in enumerate(batches):
        frame = spark.createDataFrame(
            [(hour * 1_000_000 + number, *row) for number, row in enumerate(rows)],
            "id bigint, kind string, text string",
        )
        values = {
            **instance_values(),
            "query_id": F.lit("q" * 32),
            "batch_id": F.lit(hour).cast("bigint"),
            "source": F.col("kind"),
            "text": F.col("text"),
            "ends_document": F.lit(False),
            "n_bytes": F.octet_length("text").cast("bigint"),
            "content_hash": F.md5(F.col("text").cast("binary")),
            "ingested_at": F.lit(datetime.datetime(2026, 1, 1, hour, tzinfo=datetime.UTC)),
        }
        columns = frame.select(*(values[name].alias(name) for name in schemas.INSTANCES.column_names))
        tables.append(columns, config.layout.table("instances"), schemas.INSTANCES)


def conditions() -> dict[str, str]:
    """The conditions that are measured: the annotations' lines, the band, both, and each line by itself."""
    recipe = cleaning.lines()
    chosen = " and ".join(recipe)
    return {
        "annotations": " and ".join(recipe[1:-1]),
        "band": recipe[-1],
        "recipe": chosen,
        # As refine ranks: texts that fail come last, the others by the difference.
        RANKED: f"if({chosen}, {SCORES['difference']}, -1e9)",
        **{f"line: {line}": line for line in [*recipe, *OTHER_LINES]},
    }


def measure_rows(spark: "SparkSession", config: ExperimentConfig) -> list[dict[str, Any]]:
    """Annotates and scores the instances; returns the kind, the scores and the passed conditions of each."""
    from pyspark.sql import functions as F

    annotate.annotate(spark, config)
    score.run(spark, config)
    matrix = tables.read(spark, config.layout.table("score_matrix"))
    notes = tables.read(spark, config.layout.table("annotations")).drop("ingested_at")
    numbers = {**SCORES, **conditions()}
    rows = matrix.join(notes, "instance_id").select(
        F.col("source").alias("kind"),
        *(F.expr(sql).cast("double").alias(f"c{n}") for n, sql in enumerate(numbers.values())),
    )
    return [
        {"kind": row["kind"], **{name: row[f"c{number}"] for number, name in enumerate(numbers)}}
        for row in rows.collect()
    ]


def auc(clean: Sequence[float], noise: Sequence[float]) -> float:
    """The probability that a clean value is above a noisy one; equal values count one half."""
    wins = sum((c > n) + 0.5 * (c == n) for c in clean for n in noise)
    return wins / (len(clean) * len(noise))


def table_of(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each kind of noise: its number, and the AUC of each score or condition."""
    sources = [row for row in rows if row["kind"].startswith(CLEAN)]
    table = []
    for kind in KINDS:
        noise = [row for row in rows if row["kind"] == kind]
        areas = {
            name: round(auc([row[name] or 0.0 for row in sources], [row[name] or 0.0 for row in noise]), 3)
            for name in names
        }
        table.append({"kind": kind, "texts": len(noise), **areas})
    return table


def lost_share(rows: Sequence[Mapping[str, Any]], condition: str, source: str = CLEAN) -> float:
    """The share of the clean texts that fail a condition, of all sources or of one (`clean NAME`)."""
    values = [row[condition] for row in rows if row["kind"].startswith(source)]
    return sum(not value for value in values) / len(values)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", type=int, default=200, help="clean texts")
    parser.add_argument("--noise", type=int, default=40, help="texts of each kind of noise")
    parser.add_argument("--bytes", type=int, default=500, help="length of a text")
    parser.add_argument("-c", "--config", default="conf/demo.yaml", help="experiment with the pool and the models")
    parser.add_argument("--folder", type=Path, default=results.FOLDER / "noise", help="where the tables go")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="where noise.json goes")
    parser.add_argument(
        "--keep", action="store_true", help="use the texts of the last run; what is scored stays scored"
    )
    parser.add_argument("overrides", nargs="*", help="key=value of the experiment")
    arguments = parser.parse_args(argv)
    demo = load_config(arguments.config, arguments.overrides)
    reference = dataclasses.replace(demo.models["reference"], path=demo.layout.model("reference"))
    config = ExperimentConfig(
        root=str(arguments.folder),
        models={"teacher": demo.models["teacher"], "reference": reference},
        annotate=AnnotateConfig(
            duplicates=True, near_duplicates=NearDuplicatesConfig(threshold=_THRESHOLD), language=True, quality=True
        ),
        ingest=dataclasses.replace(demo.ingest, split=SplitConfig(reference=0, heldout=0)),
        spark=demo.spark,
    )
    if not arguments.keep:
        shutil.rmtree(arguments.folder, ignore_errors=True)
    spark = session.make_session(config, "bench noise")
    try:
        if not arguments.keep:
            clean = clean_texts(spark, demo, arguments.clean, arguments.bytes)
            noise = plant_noise([text for _, text in clean], arguments.noise)
            write_instances(spark, config, [[(_kind_of(source), text) for source, text in clean], noise])
        rows = measure_rows(spark, config)
    finally:
        spark.stop()
    report(rows, arguments.results)
    return 0


def _kind_of(source: str) -> str:
    return source if source == DATA else f"{CLEAN} {source}"


def report(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Prints both tables, and records them."""
    columns = [*SCORES, "annotations", "band", "recipe", RANKED]
    areas = table_of(rows, columns)
    print(results.table(("kind", "texts", *columns), [list(row.values()) for row in areas]))
    lines = [name for name in rows[0] if name not in {"kind", RANKED, *SCORES}]
    sources = sorted({row["kind"] for row in rows if row["kind"].startswith(CLEAN)})
    lost = [
        {
            "condition": line.removeprefix("line: "),
            "clean lost": round(lost_share(rows, line), 4),
            **{kind: round(lost_share(rows, line, kind), 3) for kind in (*sources, DATA, *KINDS)},
        }
        for line in lines
    ]
    print("\nshare of texts that fail a condition:")
    print(results.table(list(lost[0]), [list(row.values()) for row in lost]))
    ratios = {"lowest AUC of the recipe": min(row["recipe"] for row in areas), "clean lost": lost_share(rows, "recipe")}
    print(ratios)
    results.record("noise", ratios, areas, key="auc", folder=folder)
    results.record("noise", {}, lost, key="lost", folder=folder)
    results.record("noise", {}, rows, key="texts", folder=folder)


if __name__ == "__main__":
    sys.exit(main())
