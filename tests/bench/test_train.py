"""Compiled training equals eager training; the benchmark of training runs and compares what it says.

The sizes say nothing of speed.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from miniplm_udf.config.training import TrainConfig
from tests.bench import bench_train
from tests.support.trainer_roots import LLAMA
from trainer.losses.kd_teacher import Teacher
from trainer.losses.lm_loss import CausalLMWithLoss, DistilledCausalLM
from trainer.models.blocks import drop_mask, prepare_blocks
from trainer.models.model import build_model, model_config

VOCAB, LENGTH = 8192, 64
SHAPE = bench_train.Shape(LLAMA | {"vocab_size": 40}, tokens=8, batch=4, micro=2)


def losses_and_gradients(compiles: bool, n_layers: int, has_teacher: bool = False, **train: Any) -> list[torch.Tensor]:
    """The losses of two micro-batches of different sizes, in chunks of 128 positions, and the gradients."""
    shape = LLAMA | {"num_hidden_layers": n_layers}
    config = model_config(shape, where="x", vocab_size=VOCAB, separator_id=3, max_positions=LENGTH)
    config.use_cache = False
    model = build_model(config, where="x", seed=0)
    module = CausalLMWithLoss(model)
    if has_teacher:
        frozen = build_model(config, where="x", seed=1).eval().requires_grad_(False)
        drop_mask(frozen, LENGTH)
        module = DistilledCausalLM(model, Teacher(frozen, VOCAB - 5), 0.5)
    settings = TrainConfig(compile=compiles, micro_batch_sequences=4, batch_sequences=6, **train)
    prepare_blocks(module, settings, LENGTH, "x")
    module.train()
    generator = torch.Generator().manual_seed(0)
    results = []
    for n in (4, 2):
        tokens = torch.randint(0, VOCAB - 5, (n, LENGTH + 1), generator=generator)
        loss = module(tokens[:, :-1], tokens[:, 1:], torch.rand(n, LENGTH, generator=generator)).total
        loss.backward()
        results.append(loss.detach())
    return results + [weight.grad for weight in module.parameters() if weight.grad is not None]


@pytest.mark.long
@pytest.mark.parametrize(("n_layers", "is_checkpointed"), [(12, False), (2, True)])
def test_compiled_equals_eager_and_all_layers_share_the_code(n_layers: int, is_checkpointed: bool) -> None:
    torch.compiler.reset()
    counters.clear()
    expected = losses_and_gradients(False, n_layers, activation_checkpointing=is_checkpointed)
    assert not counters["stats"]["unique_graphs"]
    results = losses_and_gradients(True, n_layers, activation_checkpointing=is_checkpointed)
    # Two for the blocks and two for the chunks: their last micro-batch is smaller.
    assert 2 <= counters["stats"]["unique_graphs"] <= 4
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value, atol=1e-5, rtol=1e-5)


@pytest.mark.long
def test_compiled_equals_eager_with_a_teacher() -> None:
    expected = losses_and_gradients(False, 2, has_teacher=True)
    for result, value in zip(losses_and_gradients(True, 2, has_teacher=True), expected, strict=True):
        torch.testing.assert_close(result, value, atol=1e-5, rtol=1e-5)


def test_the_benchmark_compares_the_loops_and_the_heads() -> None:
    config = TrainConfig(batch_sequences=4, micro_batch_sequences=2, loss="token_mean")
    rows = bench_train.measure_steps(SHAPE, config, 1, torch.device("cpu"))
    assert [row["loop"] for row in rows] == ["ours", "plain", "matrix product"]
    assert [row["vs_plain"] for row in rows] == [row["tokens_per_s"] / rows[1]["tokens_per_s"] for row in rows]
    assert rows[2]["of_limit"] == 1
    heads = bench_train.measure_heads(SHAPE, config, 1, torch.device("cpu"))
    assert [row["head"] for row in heads][:2] == ["ours", "all logits"]
    assert heads[1]["vs_all_logits"] == 1


def test_both_loops_train_on_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[int]] = {}

    class Recorded(bench_train.RandomSequences):
        def get(self, rows: Any) -> Any:
            seen.setdefault(self.name, set()).update(rows.tolist())  # type: ignore[attr-defined]
            return super().get(rows)

    config = TrainConfig(batch_sequences=4, micro_batch_sequences=2, loss="token_mean")
    for name, make in (("ours", bench_train.our_step), ("plain", bench_train.plain_step)):
        sequences = Recorded(SHAPE, 8)
        sequences.name = name  # type: ignore[attr-defined]
        step = make(SHAPE, config, sequences, torch.device("cpu"))
        step(0), step(1)
    assert seen["ours"] == seen["plain"] == set(range(8))


def test_the_results_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train, "shapes", lambda: {"200m": SHAPE, "small": SHAPE})
    assert bench_train.main(["--shape", "small", "--rounds", "1", "--results", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "train.json").read_text())
    assert set(written) == {"ratios", "steps_small", "heads_small"}
    assert written["ratios"]["vs_plain_small"] == round(written["steps_small"][0]["vs_plain"], 3)
