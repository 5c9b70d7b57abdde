"""How much of a GPU scoring uses: model FLOPs per second over the chip's peak, next to the official loop.

    python -m tests.bench.bench_gpu [--peak-tflops 989]

Two models with random weights, in bfloat16 on CUDA: 1.8B parameters in the shape of Qwen1.5 and 135M in the shape of
SmolLM2; instances of 1,024 random tokens. Prints one table: ours, the official loop (`plain_loops`), the rate of one
large matrix product as the ceiling, and utilisations of the peak; writes `build/bench/gpu.json`. Needs torch and
transformers alone. On a CPU `--size tiny` tries the code, no more.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models

from miniplm_udf.scoring.attention import improve_attention
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.scoring.inputs import EncodedPiece, Tokenized
from miniplm_udf.scoring.results import Score
from miniplm_udf.scoring.scorer import Scorer
from tests.support import bench_results as results
from tests.support import plain_loops

_TOKENS = 1024
_SIZES: dict[str, dict[str, Any]] = {
    "1.8B": {
        "model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 151936, "tie_word_embeddings": False,
    },
    "135M": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True,
    },
}  # fmt: skip


def make_model(size: str, device: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**_SIZES[size], max_position_embeddings=2048)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.to(device).eval().requires_grad_(False)


def describe(size: str) -> ModelDescription:
    return ModelDescription(
        model_id="bench", tokenizer_hash="none", dtype="bfloat16", context_tokens=_TOKENS, window_overlap_tokens=0,
        context_prefix="none", document_separator="<sep>", document_separator_id=0, prefix_token_id=None,
        vocab_size=_SIZES[size]["vocab_size"], n_parameters=0, weights_hash="none", path="random",
    )  # fmt: skip


def seconds_of(work: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matmul_flops_per_second(device: str, n: int) -> float:
    left = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    product = [seconds_of(lambda: left @ left) for _ in range(10)]
    return 2.0 * n**3 / min(product[2:])


def measure(size: str, device: str, n_instances: int, peak: float) -> dict[str, Any]:
    """One row of the table."""
    model = make_model(size, device)
    ids = np.random.default_rng(0).integers(1, _SIZES[size]["vocab_size"], (n_instances, _TOKENS + 1), dtype=np.int32)
    few = [[int(token) for token in row] for row in ids[:16]]
    of_one = plain_loops.model_flops(model, [_TOKENS])
    # The official loop first: ours changes the model.
    seconds_of(lambda: plain_loops.official(model, few))
    theirs = len(few) * of_one / seconds_of(lambda: plain_loops.official(model, few))
    flops = n_instances * of_one
    improve_attention(model)
    scorer = Scorer(model, Tokenizer(models.BPE()), describe(size), device=device)
    texts = [Tokenized([[EncodedPiece("", row, 0)]], 4 * _TOKENS) for row in ids]
    ends = [False] * n_instances
    start = time.perf_counter()
    scorer.score_tokenized(texts[:64], ends[:64])
    first = time.perf_counter() - start
    while scorer.finish_compiling():
        scorer.score_tokenized(texts[:64], ends[:64])
    compiled = time.perf_counter() - start
    found: list[Any] = []
    ours = flops / seconds_of(lambda: found.extend(scorer.score_tokenized(texts, ends)))
    if not all(isinstance(one, Score) and one.n_tokens == _TOKENS for one in found):
        raise RuntimeError(f"expected scores of all, found {found[:3]}")
    ceiling = matmul_flops_per_second(device, 8192 if device == "cuda" else 512)
    return {
        "model": size, "tokens_per_s": ours / of_one * _TOKENS, "ours_tflop_per_s": ours / 1e12,
        "official_tflop_per_s": theirs / 1e12, "matmul_tflop_per_s": ceiling / 1e12, "utilisation": ours / peak,
        "of_matmul": ours / ceiling, "vs_official": ours / theirs, "first_number_s": first,
        "compiled_after_s": compiled,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=sorted(_SIZES), default=["1.8B", "135M"])
    parser.add_argument("--instances", type=int, default=512, help="of 1,024 tokens")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="bfloat16, without sparsity; 989: H100, H200")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="where gpu.json goes")
    given = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [measure(size, device, given.instances, given.peak_tflops * 1e12) for size in given.size]
    print(results.table(list(rows[0]), [list(row.values()) for row in rows]))
    ratios = {f"utilisation_{row['model']}": round(row["utilisation"], 3) for row in rows}
    print(ratios)
    results.record("gpu", ratios, rows, folder=given.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
