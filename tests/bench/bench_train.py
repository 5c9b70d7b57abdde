"""The speed of a training step: the trainer's loop, a plain loop of transformers, and the chip's matrix products.

    python -m tests.bench.bench_train [--shape 200m] [--batch 64] [--micro 16] [--rounds 6] [--compile auto]

Prints two tables and writes `build/bench/train.json`. Steps: both loops train models with equal weights on the same
random tokens, in float32 on a CPU and bfloat16 on a GPU; they take turns, and each number is the median over the
rounds, after two steps that are not counted. The plain loop is the shortest that transformers allows: `labels`,
`backward`, torch's AdamW, no clipping of the gradient. The limit is one large matrix product. Heads: forward and
backward pass between the hidden states and the loss, in three implementations, each with its largest memory. On a GPU
the model is `qwen_200m` of `conf/students`; on a CPU a small model. On a CPU, processor seconds count: other work on
the machine changes them less. Needs torch, transformers and numpy alone.
"""

import argparse
import dataclasses
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from miniplm_udf.config.student_models import load_student_models
from miniplm_udf.config.training import TrainConfig
from miniplm_udf.scoring.peaks import peak_flops_per_second
from tests.support import bench_results as results
from tests.support.allocations import peak_bytes
from trainer.loop import Loop, make_optimizer
from trainer.losses.chunked_head import chunk_loss, weighted_nll
from trainer.losses.lm_loss import CausalLMWithLoss
from trainer.models.blocks import prepare_blocks
from trainer.models.flops import training_flops_per_token
from trainer.models.model import build_model, model_config
from trainer.models.precision import autocast, product_dtype
from trainer.ranks.distributed import World

_SMALL = {
    "model_type": "qwen2", "vocab_size": 32_000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's architecture, the tokens of a sequence, and the sequences of a step and of a forward pass."""

    architecture: dict[str, Any]
    tokens: int
    batch: int
    micro: int


def shapes() -> dict[str, Shape]:
    """The shapes by name."""
    paper = load_student_models()["qwen_200m"].architecture
    return {"200m": Shape(paper, 1024, 64, 16), "small": Shape(_SMALL, 256, 16, 8)}


class RandomSequences:
    """Sequences of random tokens, whose every position has a target."""

    def __init__(self, shape: Shape, n_sequences: int):
        self.n_sequences, self.sequence_length = n_sequences, shape.tokens
        self.group_rows = np.array([n_sequences])
        size = (n_sequences, shape.tokens + 1)
        self._tokens = np.random.default_rng(0).integers(0, shape.architecture["vocab_size"], size, dtype=np.int32)

    def get(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (n, L + 1) and target masks (n, L) of rows."""
        return self._tokens[rows], np.ones((len(rows), self.sequence_length), dtype=np.uint8)


def build(shape: Shape, device: torch.device) -> Any:
    """A model with new weights; they are the same at each call."""
    vocabulary = shape.architecture["vocab_size"]
    config = model_config(
        shape.architecture, where="bench", vocab_size=vocabulary, separator_id=0, max_positions=shape.tokens
    )
    config.use_cache = False
    return build_model(config, where="bench", seed=0).to(device).train()


def our_step(
    shape: Shape, config: TrainConfig, sequences: RandomSequences, device: torch.device
) -> Callable[[int], Any]:
    """One step of the trainer's loop, by its number."""
    module = CausalLMWithLoss(build(shape, device))
    prepare_blocks(module, config, shape.tokens, "bench")
    optimizer = make_optimizer(module, config)
    # No token is a separator, so all targets count.
    return Loop(module, optimizer, sequences, config, -1, World(device=device)).step


def plain_step(
    shape: Shape, config: TrainConfig, sequences: RandomSequences, device: torch.device
) -> Callable[[int], Any]:
    """One step of the plain loop, by its number."""
    model = build(shape, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate)

    def step(number: int) -> None:
        rows = np.arange(number * shape.batch, (number + 1) * shape.batch) % sequences.n_sequences
        tokens = torch.from_numpy(sequences.get(rows)[0]).to(device, torch.int64)[:, :-1]
        for part in tokens.split(shape.micro):
            with autocast(config, device):
                loss = model(input_ids=part, labels=part).loss
            (loss * len(part) / shape.batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the wall clock on a GPU, processor seconds on a CPU."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def measure_steps(shape: Shape, config: TrainConfig, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Rows of ours, the plain loop and the limit."""
    sequences = RandomSequences(shape, 4 * shape.batch)
    flops_per_token = training_flops_per_token(build(shape, device), shape.tokens)
    peak = peak_flops_per_second(device, str(product_dtype(config, device)).removeprefix("torch."))
    seconds: dict[str, list[float]] = {"ours": [], "plain": []}
    warm_up, memory, steps = {}, {}, {}
    for name, make in (("ours", our_step), ("plain", plain_step)):
        started = time.perf_counter()
        steps[name] = make(shape, config, sequences, device)
        steps[name](0)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds_of(lambda name=name: steps[name](1), device)
        warm_up[name] = time.perf_counter() - started
        memory[name] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    for number in range(rounds):
        for name, step in steps.items():
            seconds[name].append(seconds_of(lambda step=step, number=number: step(2 + number), device))
    tokens = shape.batch * shape.tokens
    rates = {name: tokens / statistics.median(values) for name, values in seconds.items()}
    rates["matrix product"] = matmul_flops_per_second(device, product_dtype(config, device)) / flops_per_token
    return [
        {
            "loop": name,
            "tokens_per_s": rate,
            "tflop_per_s": rate * flops_per_token / 1e12,
            "mfu": None if peak is None else rate * flops_per_token / peak,
            "of_limit": rate / rates["matrix product"],
            "vs_plain": rate / rates["plain"],
            "warm_up_s": warm_up.get(name),
            "peak_gib": memory.get(name),
        }
        for name, rate in rates.items()
    ]


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """The rate of one large matrix product, the best of eight."""
    n = 8192 if device.type == "cuda" else 1024
    left = torch.randn(n, n, device=device, dtype=dtype)
    return 2.0 * n**3 / min([seconds_of(lambda: left @ left, device) for _ in range(10)][2:])


def heads(compiles: bool) -> dict[str, Callable[..., torch.Tensor]]:
    """The ways from hidden states, weight, targets and their weights to the loss, by name."""
    functional = torch.nn.functional
    loss_of = torch.compile(chunk_loss, dynamic=False) if compiles else chunk_loss

    def whole(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(hidden, weight).float()
        return (functional.cross_entropy(logits, targets, reduction="none") * weights).sum()

    def of_torch(
        hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        nll = functional.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)
        return (nll * weights).sum()

    ways = {"ours": functools.partial(weighted_nll, loss_of=loss_of), "all logits": whole}
    return ways | ({"linear_cross_entropy": of_torch} if hasattr(functional, "linear_cross_entropy") else {})


def measure_heads(shape: Shape, config: TrainConfig, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Rows of the heads: seconds forward and backward, and the largest memory as a share of the float32 logits."""
    n_positions, vocabulary = shape.micro * shape.tokens, shape.architecture["vocab_size"]
    width = shape.architecture["hidden_size"]
    # As in training: float32 weights, and under autocast products of bfloat16.
    hidden = torch.randn(n_positions, width, device=device).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device) * 0.02).requires_grad_()
    targets = torch.randint(0, vocabulary, (n_positions,), device=device)
    weights = torch.full((n_positions,), 1 / n_positions, device=device)
    ways = heads(config.compile is True or (config.compile == "auto" and device.type == "cuda"))

    def run(way: Callable[..., torch.Tensor]) -> None:
        with autocast(config, device):
            loss = way(hidden, weight, targets, weights)
        loss.backward()
        hidden.grad = weight.grad = None

    for way in ways.values():
        run(way)  # the first call may compile
    memory = {name: peak_bytes(lambda way=way: run(way), device) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(seconds_of(lambda way=way: run(way), device))
    return [
        {
            "head": name,
            "seconds": statistics.median(values),
            "vs_all_logits": statistics.median(seconds["all logits"]) / statistics.median(values),
            "peak_of_logits": memory[name] / (4 * n_positions * vocabulary),
        }
        for name, values in seconds.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the tables and writes the results."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(shapes()), default="200m" if device.type == "cuda" else "small")
    parser.add_argument("--batch", type=int, help="sequences of a step")
    parser.add_argument("--micro", type=int, help="sequences of a forward pass")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--compile", choices=["auto", "true", "false"], default="auto")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="where train.json goes")
    options = parser.parse_args(argv)
    shape = shapes()[options.shape]
    shape = dataclasses.replace(shape, batch=options.batch or shape.batch, micro=options.micro or shape.micro)
    compiles = {"auto": "auto", "true": True, "false": False}[options.compile]
    config = TrainConfig(
        batch_sequences=shape.batch, micro_batch_sequences=shape.micro, compile=compiles, loss="token_mean"
    )
    print(f"{options.shape}, {shape}, {device}, {product_dtype(config, device)}, {torch.get_num_threads()} threads")
    head_rows = measure_heads(shape, config, options.rounds, device)
    print(results.table(list(head_rows[0]), [list(row.values()) for row in head_rows]))
    gc.collect()
    step_rows = measure_steps(shape, config, options.rounds, device)
    print(results.table(list(step_rows[0]), [list(row.values()) for row in step_rows]))
    ratios = {f"{name}_{options.shape}": round(step_rows[0][name], 3) for name in ("vs_plain", "of_limit")}
    print(ratios)
    results.record("train", ratios, step_rows, f"steps_{options.shape}", options.results)
    results.record("train", {}, head_rows, f"heads_{options.shape}", options.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
