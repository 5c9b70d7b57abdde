"""The time of a training step of a Mamba next to a Llama of equal width, by the implementation of Mamba's scan.

    python -m tests.bench.bench_mamba [--tokens 1024] [--width 768] [--layers 2] [--steps 5] [--sequential]

Prints one table and writes `build/bench/mamba.json`: seconds of a forward and backward pass over one sequence of random
tokens on this machine's CPU, in float32. The models take turns, so that other work on the machine slows all of them;
each number is the median over the steps, after one step that is not counted. mambapy's scan is parallel;
`--sequential` also measures transformers' loop over the tokens. The paper's Mamba has twice as many layers as its
Llama, so both depths are measured.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from tests.support import bench_results as results
from trainer.losses.loss import target_nll
from trainer.models.model import build_model, model_config, n_parameters

VOCABULARY = 8192


def architectures(width: int, layers: int, sequential: bool) -> dict[str, dict[str, Any]]:
    """The models to compare, by name, the Llama first; proportions as in conf/students."""
    heads = max(1, width // 64)
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "tie_word_embeddings": True}
    llama = {"intermediate_size": 4 * width, "num_attention_heads": heads, "num_key_value_heads": heads}
    models: dict[str, dict[str, Any]] = {
        "llama": {"model_type": "llama", **sizes, **llama},
        "mamba": {"model_type": "mamba", "use_mambapy": True, **sizes},
        "mamba_twice_as_deep": {"model_type": "mamba", "use_mambapy": True, **sizes, "num_hidden_layers": 2 * layers},
    }
    return models | ({"mamba_sequential": {"model_type": "mamba", **sizes}} if sequential else {})


def build(architecture: dict[str, Any], n_tokens: int) -> Any:
    """A model in training mode."""
    config = model_config(architecture, where="bench", vocab_size=VOCABULARY, separator_id=0, max_positions=n_tokens)
    config.use_cache = False
    return build_model(config, where="bench", seed=0).train()


def step_seconds(model: Any, tokens: torch.Tensor) -> float:
    """Seconds of one forward and backward pass over (1, T + 1) tokens."""
    started = time.perf_counter()
    target_nll(model(input_ids=tokens[:, :-1]).logits, tokens[:, 1:]).mean().backward()
    seconds = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    return seconds


def run(n_tokens: int, width: int, layers: int, steps: int, sequential: bool = False) -> list[dict[str, Any]]:
    """One row per model; `ratio` is its time over the Llama's."""
    models = {name: build(shape, n_tokens) for name, shape in architectures(width, layers, sequential).items()}
    tokens = torch.randint(0, VOCABULARY, (1, n_tokens + 1), generator=torch.Generator().manual_seed(0))
    rounds = [{name: step_seconds(model, tokens) for name, model in models.items()} for _ in range(steps + 1)]
    seconds = {name: statistics.median(times[name] for times in rounds[1:]) for name in models}
    return [
        {
            "model": name,
            "weights": n_parameters(model),
            "seconds": seconds[name],
            "ratio": seconds[name] / seconds["llama"],
        }
        for name, model in models.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 1024), ("width", 768), ("layers", 2), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sequential", action="store_true")
    options = parser.parse_args(argv)
    rows = run(options.tokens, options.width, options.layers, options.steps, options.sequential)
    print(f"{options.tokens} tokens, width {options.width}, {options.layers} layers, {torch.get_num_threads()} threads")
    print(results.table(list(rows[0]), [list(row.values()) for row in rows]))
    results.record("mamba", {f"{row['model']}_vs_llama": row["ratio"] for row in rows[1:]}, rows)


if __name__ == "__main__":
    main()
