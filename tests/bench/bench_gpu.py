"""How much of a GPU scoring uses: model FLOPs per second over the chip's peak, next to the official loop.

    python -m tests.bench.bench_gpu [--seconds 230] [--size 1.8B 135M]

Two models with random weights, in bfloat16 on CUDA: 1.8B parameters in the shape of Qwen1.5 and 135M in the shape of
SmolLM2; instances of 1,024 random tokens. Prints a row for each model and variant as it is measured, next to the rate
of large matrix products in the same run; writes `build/bench/gpu.json` after each row. After `--seconds`, the rows that
are left are printed as skipped. `of_peak` compares with the peak of the GPU in the row's dtype (`scoring.peaks`); it is
missing for a GPU that the table does not have. Needs torch and transformers alone. On a CPU `--size tiny` tries the
code, no more.

Variants: the official loop (`plain_loops`); the scorer eager, with the search for its token budget, and compiled, with
the seconds to the first number and until all layers are compiled, from an empty and from a filled cache; texts of 20 to
1,024 tokens; float8. Compiled and float8 rows say how far their scores are from those of the eager row in bfloat16.
Means of random weights say little about a trained model: `bench_dtype` compares a real one.
"""

import argparse
import contextlib
import copy
import dataclasses
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models

from miniplm_udf.scoring.attention import improve_attention
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.scoring.float8 import quantised, use_float8
from miniplm_udf.scoring.inputs import EncodedPiece, Tokenized
from miniplm_udf.scoring.peaks import peak_flops_per_second
from miniplm_udf.scoring.results import Score
from miniplm_udf.scoring.scorer import Scorer
from tests.support import bench_results as results
from tests.support import plain_loops

_TOKENS, _SHORTEST = 1024, 20
# Instances of the official loop, and of the call that gives the first number.
_FEW = 32
# A row is started only with so much time left.
_LEAST_SECONDS = 3.0
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
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True,
    },
}  # fmt: skip
_COLUMNS = {
    "model": 6, "variant": 26, "tokens_per_s": 12, "tflop_per_s": 11, "of_peak": 7, "of_matmul": 9, "vs_official": 11,
    "first_number_s": 14,
}  # fmt: skip


class OutOfTime(BaseException):
    """The time of the run is over. Not an Exception, so that no library catches it."""


class Table:
    """Prints rows as they are measured, keeps them in gpu.json, and ends a row when the time is over."""

    def __init__(self, seconds: float, folder: Path) -> None:
        self._deadline, self._folder = time.monotonic() + seconds, folder
        self.rows: list[dict[str, Any]] = []
        self.n_failed = 0
        print("  ".join(name.rjust(width) for name, width in _COLUMNS.items()), flush=True)

    def measure(self, model: str, variant: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Prints the row that `work` returns, or why there is none."""
        row: dict[str, Any] = {"model": model, "variant": variant}
        try:
            with self._time_limit():
                row |= work()
        except OutOfTime:
            row["skipped"] = "the time is over (--seconds)"
        except Exception as error:  # the other rows are still wanted
            reason = next(iter(str(error).splitlines()), "")
            row["failed"] = f"{type(error).__name__}: {reason[:300]}"
            self.n_failed += 1
        self.rows.append(row)
        self._print(row)
        results.record("gpu", self._ratios(), self.rows, folder=self._folder)
        return None if "skipped" in row or "failed" in row else row

    @contextlib.contextmanager
    def _time_limit(self) -> Iterator[None]:
        left = self._deadline - time.monotonic()
        if left < _LEAST_SECONDS:
            raise OutOfTime

        def stop(*_: Any) -> None:
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, left)
        try:
            yield
        except Exception:
            if time.monotonic() >= self._deadline:  # a library has wrapped it
                raise OutOfTime from None
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    @staticmethod
    def _print(row: dict[str, Any]) -> None:
        cells = []
        for name, width in _COLUMNS.items():
            value = row.get(name, "")
            text = f"{value:,.0f}" if name == "tokens_per_s" and value != "" else value
            cells.append((f"{text:.3f}" if isinstance(text, float) else str(text)).rjust(width))
        more = {key: value for key, value in row.items() if key not in _COLUMNS}
        notes = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key}: {value}" for key, value in more.items()
        )
        print("  ".join(cells) + (f"  {notes}" if notes else ""), flush=True)

    def _ratios(self) -> dict[str, float]:
        rated = [row for row in self.rows if "of_peak" in row]
        return {f"utilisation, {row['model']}, {row['variant']}": round(row["of_peak"], 4) for row in rated}


_OFFICIAL, _EAGER, _COMPILED, _WARM = "official loop", "eager", "compiled", "compiled, filled cache"
_MIXED, _FLOAT8_EAGER, _FLOAT8 = "compiled, 20 to 1,024", "float8, eager", "float8, compiled"
# In the order of their importance: each group is measured for all models before the next group.
_GROUPS: tuple[tuple[str, ...], ...] = ((_OFFICIAL, _EAGER, _FLOAT8_EAGER), (_COMPILED, _MIXED), (_FLOAT8,), (_WARM,))


@dataclasses.dataclass
class Rates:
    """Rates of matrix products, in FLOP/s: the peaks of the GPU, None if they are not known, and rates of the run."""

    peak: float | None = None
    peak_float8: float | None = None
    matmul: float = float("nan")
    matmul_float8: float = float("nan")


class Bench:
    """The variants of one model."""

    def __init__(self, size: str, device: str, n_instances: int, rates: Rates) -> None:
        self.size, self._device, self._rates = size, device, rates
        self._model = make_model(size, device)
        self._flops = plain_loops.model_flops(self._model, [_TOKENS])
        generator = np.random.default_rng(0)
        self._ids = generator.integers(1, _SIZES[size]["vocab_size"], (n_instances, _TOKENS + 1), dtype=np.int32)
        # As many tokens as the full-length texts have.
        lengths = generator.integers(_SHORTEST, _TOKENS, 2 * n_instances, endpoint=True)
        self._mixed = [self._ids[n % n_instances, : length + 1] for n, length in enumerate(lengths)]
        self._official_rate = self._full_rate = float("nan")
        self._means: np.ndarray | None = None
        self._float8: Any = None
        self._compiled: Scorer | None = None
        self._tokens_per_batch: int | None = None

    def run(self, variant: str) -> dict[str, Any]:
        """One row of the table."""
        work = {
            _OFFICIAL: self._official, _EAGER: self._eager, _FLOAT8_EAGER: self._float8_eager, _COMPILED: self._cold,
            _MIXED: self._mixed_lengths, _FLOAT8: self._float8_compiled, _WARM: self._warm,
        }  # fmt: skip
        return work[variant]()

    def _official(self) -> dict[str, Any]:
        # Before the eager variant, which changes the model's attention.
        few = [[int(token) for token in row] for row in self._ids[:_FEW]]
        seconds_of(lambda: plain_loops.official(self._model, few))
        self._official_rate = len(few) * _TOKENS / seconds_of(lambda: plain_loops.official(self._model, few))
        return self._rated(self._official_rate)

    def _eager(self) -> dict[str, Any]:
        improve_attention(self._model)
        start = time.perf_counter()
        scorer = self._scorer(self._model, compiled=False)
        found = {"tokens_per_batch": scorer.tokens_per_batch, "found_in_s": time.perf_counter() - start}
        self._score(scorer, self._ids[:_FEW])
        seconds, self._means = self._score(scorer, self._ids)
        return self._rated(len(self._ids) * _TOKENS / seconds) | found

    def _float8_eager(self) -> dict[str, Any]:
        self._float8 = copy.deepcopy(self._model)
        use_float8(self._float8)
        scorer = self._scorer(self._float8, compiled=False)
        self._score(scorer, self._ids[:_FEW])
        seconds, means = self._score(scorer, self._ids)
        return self._rated(len(self._ids) * _TOKENS / seconds, is_float8=True) | self._spread(means)

    def _cold(self) -> dict[str, Any]:
        row = self._compile(self._model)
        self._full_rate = row["tokens_per_s"]
        return row

    def _mixed_lengths(self) -> dict[str, Any]:
        if self._compiled is None:
            raise RuntimeError("the compiled variant did not end")
        first, _ = self._score(self._compiled, self._mixed)
        seconds, _ = self._score(self._compiled, self._mixed)
        rate = sum(len(row) - 1 for row in self._mixed) / seconds
        row = {"tokens_per_s": rate, "of_full_length": rate / self._full_rate, "first_pass_more_s": first - seconds}
        # The scorer holds compiled code that the next variant drops.
        self._compiled = None
        return row

    def _float8_compiled(self) -> dict[str, Any]:
        if self._float8 is None:
            raise RuntimeError("the eager variant did not end")
        row = self._compile(self._float8, is_float8=True)
        self._compiled = None
        return row | {"vs_bfloat16": row["tokens_per_s"] / self._full_rate}

    def _warm(self) -> dict[str, Any]:
        """The start after the compiled code is dropped from the process, with the cache on the disk."""
        return self._start(self._model)[1]

    def _compile(self, model: Any, is_float8: bool = False) -> dict[str, Any]:
        """The start, the rate of compiled layers after it, and how far their scores are from eager ones in bfloat16."""
        self._compiled, start = self._start(model)
        seconds, means = self._score(self._compiled, self._ids)
        return self._rated(len(self._ids) * _TOKENS / seconds, is_float8) | start | self._spread(means)

    def _start(self, model: Any) -> tuple[Scorer, dict[str, Any]]:
        """A scorer without compiled code; seconds to its first numbers, and until all its layers are compiled."""
        forget_compiled_code(model)
        start = time.perf_counter()
        scorer = self._scorer(model, compiled=True)
        self._score(scorer, self._ids[:_FEW])
        first = time.perf_counter() - start
        while scorer.finish_compiling():
            self._score(scorer, self._ids[:_FEW])
        return scorer, {"first_number_s": first, "compiled_after_s": time.perf_counter() - start}

    def _scorer(self, model: Any, compiled: bool) -> Scorer:
        """A scorer; the first one of the bench searches the token budget of all."""
        scorer = Scorer(
            model, Tokenizer(models.BPE()), describe(self.size), self._tokens_per_batch, self._device, compiled
        )
        if self._device != "cpu":
            self._tokens_per_batch = scorer.tokens_per_batch
        return scorer

    @staticmethod
    def _score(scorer: Scorer, rows: Sequence[np.ndarray]) -> tuple[float, np.ndarray]:
        """Seconds, and nats a token of each row."""
        texts = [Tokenized([[EncodedPiece("", row, 0)]], 4 * len(row)) for row in rows]
        scores: list[Any] = []
        seconds = seconds_of(lambda: scores.extend(scorer.score_tokenized(texts, [False] * len(texts))))
        for score, row in zip(scores, rows, strict=True):
            if not isinstance(score, Score) or score.n_tokens != len(row) - 1:
                raise RuntimeError(f"expected a score of {len(row) - 1} tokens, found {score}")
        return seconds, np.array([score.nll_sum_nats / score.n_tokens for score in scores])

    def _spread(self, means: np.ndarray) -> dict[str, Any]:
        return {} if self._means is None else spread(self._means, means)

    def _rated(self, tokens_per_second: float, is_float8: bool = False) -> dict[str, Any]:
        flops, rates = tokens_per_second / _TOKENS * self._flops, self._rates
        matmul, peak = (rates.matmul_float8, rates.peak_float8) if is_float8 else (rates.matmul, rates.peak)
        return {
            "tokens_per_s": tokens_per_second, "tflop_per_s": flops / 1e12, **of_peak(flops, peak),
            "of_matmul": flops / matmul, "vs_official": tokens_per_second / self._official_rate,
        }  # fmt: skip


def of_peak(flops_per_second: float, peak: float | None) -> dict[str, float]:
    return {} if peak is None else {"of_peak": flops_per_second / peak}


def make_model(size: str, device: str) -> Any:
    """A model with random weights, made on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**_SIZES[size], max_position_embeddings=2048)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.to(device).eval().requires_grad_(False)


def describe(size: str) -> ModelDescription:
    return ModelDescription(
        model_id="bench", tokenizer_hash="none", dtype="bfloat16", context_tokens=_TOKENS, window_overlap_tokens=0,
        context_prefix="none", document_separator="<sep>", document_separator_id=0, prefix_token_id=None,
        vocab_size=_SIZES[size]["vocab_size"], n_parameters=0, weights_hash="none", path="random",
    )  # fmt: skip


def spread(exact: np.ndarray, rounded: np.ndarray) -> dict[str, Any]:
    """How far rounded means are from exact ones, in nats a token, and whether they rank the texts in the same order."""
    ranks = [values.argsort().argsort() for values in (exact, rounded)]
    half = max(len(exact) // 2, 1)
    tops = [set(values.argsort()[-half:].tolist()) for values in (exact, rounded)]
    difference = np.abs(rounded - exact)
    return {
        "largest_difference": float(difference.max()), "mean_difference": float(difference.mean()),
        "standard_deviation": float(exact.std()), "rank_correlation": float(np.corrcoef(*ranks)[0, 1]),
        "top_half_agreement": len(tops[0] & tops[1]) / half,
    }  # fmt: skip


def forget_compiled_code(model: torch.nn.Module) -> None:
    """Drops compiled code from this process; the cache on the disk stays."""
    from torch._inductor import utils

    torch._dynamo.reset()
    for module in model.modules():
        # The next scorer makes new functions, with no variants yet.
        vars(module).pop("forward", None)
    for name in ("clear_caches", "clear_inductor_caches"):
        if hasattr(utils, name):
            getattr(utils, name)()
            return


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


def float8_flops_per_second(device: str, n: int) -> float:
    matrix, scale = quantised(torch.randn(n, n, device=device, dtype=torch.bfloat16))
    scale_t = scale.t().contiguous()

    def multiply() -> torch.Tensor:
        return torch._scaled_mm(
            matrix, matrix.t(), scale_a=scale, scale_b=scale_t, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    product = [seconds_of(multiply) for _ in range(10)]
    return 2.0 * n**3 / min(product[2:])


def environment(device: str) -> dict[str, str]:
    import transformers

    name = torch.cuda.get_device_name(0) if device == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}


def run(sizes: Sequence[str], device: str, n_instances: int, table: Table, rates: Rates) -> None:
    """Measures all rows."""
    n = 8192 if device == "cuda" else 512

    def products() -> dict[str, Any]:
        rates.matmul = matmul_flops_per_second(device, n)
        return {"tflop_per_s": rates.matmul / 1e12, **of_peak(rates.matmul, rates.peak)}

    def float8_products() -> dict[str, Any]:
        rates.matmul_float8 = float8_flops_per_second(device, n)
        of_matmul = rates.matmul_float8 / rates.matmul
        return {"tflop_per_s": rates.matmul_float8 / 1e12, **of_peak(rates.matmul_float8, rates.peak_float8),
                "of_matmul": of_matmul}  # fmt: skip

    table.measure("-", f"bfloat16 products of {n}", products)
    table.measure("-", f"float8 products of {n}", float8_products)
    benches: dict[str, Bench] = {}
    for variants in _GROUPS:
        for size in sizes:
            for variant in variants:

                def measured(size: str = size, variant: str = variant) -> dict[str, Any]:
                    if size not in benches:
                        benches[size] = Bench(size, device, n_instances, rates)
                    return benches[size].run(variant)

                table.measure(size, variant, measured)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=sorted(_SIZES), default=["1.8B", "135M"])
    parser.add_argument("--instances", type=int, default=256, help="of 1,024 tokens")
    parser.add_argument("--seconds", type=float, default=230.0, help="rows that do not end by then are skipped")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="where gpu.json goes")
    given = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = environment(device)
    print(", ".join(f"{key} {value}" for key, value in where.items()), flush=True)
    results.record("gpu", {}, [where], key="environment", folder=given.results)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache,
        changed_environment(TORCHINDUCTOR_CACHE_DIR=f"{cache}/inductor", TRITON_CACHE_DIR=f"{cache}/triton"),
    ):
        table = Table(given.seconds, given.results)
        peaks = (peak_flops_per_second(torch.device(device), dtype) for dtype in ("bfloat16", "float8"))
        run(given.size, device, given.instances, table, Rates(*peaks))
    return 1 if table.n_failed else 0


@contextlib.contextmanager
def changed_environment(**values: str) -> Iterator[None]:
    """Sets environment variables for the block; the compilation cache is then empty, and not the user's own."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


if __name__ == "__main__":
    sys.exit(main())
