"""Training on a CUDA device: a step never waits, compiled equals eager, and the loss holds a fraction of the logits.

Needs torch, transformers, numpy and pytest: `pytest tests/gpu` runs on a bare GPU box. Skips itself without a device.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from miniplm_udf.config.training import TrainConfig
from tests.support.allocations import peak_bytes
from tests.support.gpu_device import ON_GPU, needs_cuda, needs_device
from trainer.loop import Loop, make_optimizer
from trainer.losses.chunked_head import chunked_losses, weighted_nll
from trainer.losses.kd_loss import kd_chunk_positions, kd_losses
from trainer.losses.kd_teacher import Teacher
from trainer.losses.lm_loss import CausalLMWithLoss, DistilledCausalLM
from trainer.models.blocks import drop_mask, prepare_blocks
from trainer.models.model import build_model, model_config
from trainer.ranks.distributed import World

pytestmark = [pytest.mark.gpu, needs_device]
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
VOCAB, LENGTH, WIDTH = 4096, 64, 128
SIZES = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


class RandomRows:
    """Sequences of random tokens."""

    group_rows, sequence_length = np.array([8]), LENGTH

    def get(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.random.default_rng(0).integers(0, VOCAB, (8, LENGTH + 1)).astype("i4")
        return tokens[rows], np.ones((len(rows), LENGTH), "u1")


def make_teacher(shape: Any) -> Teacher:
    model = build_model(shape, where="x", seed=1).to(DEVICE, torch.bfloat16).eval().requires_grad_(False)
    assert drop_mask(model, LENGTH)
    return Teacher(model, VOCAB)


def make_loop(family: str, **train: Any) -> Loop:
    shape = model_config(
        {"model_type": family} | SIZES, where="x", vocab_size=VOCAB, separator_id=3, max_positions=LENGTH
    )
    shape.use_cache = False
    config = TrainConfig(steps=8, warmup_steps=0, batch_sequences=6, micro_batch_sequences=4, **train)  # type: ignore[arg-type]
    model = build_model(shape, where="x", seed=0).to(DEVICE)
    module = (
        DistilledCausalLM(model, make_teacher(shape), config.kd_ratio) if config.kd_ratio else CausalLMWithLoss(model)
    )
    prepare_blocks(module, config, LENGTH, "x")
    module.train()
    return Loop(module, make_optimizer(module, config), RandomRows(), config, 3, World(device=DEVICE))


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Makes every wait for the GPU an error."""
    if ON_GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("kd_ratio", [0.0, 0.5])
def test_a_step_does_not_wait_for_the_gpu(kd_ratio: float) -> None:
    loop = make_loop("llama", compile=False, kd_ratio=kd_ratio)
    loop.step(0), loop.step(1)
    with no_waiting():
        loop.step(2), loop.step(3)


def test_compiled_steps_equal_eager_steps_and_do_not_wait() -> None:
    """One compilation, of the largest step: Qwen 2 has biases, and the teacher's layers are compiled too."""
    results = []
    for compiles in (False, True):
        loop = make_loop("qwen2", compile=compiles, dtype="float32", kd_ratio=0.5)
        steps = [loop.step(number) for number in range(2)]
        with no_waiting():
            steps += [loop.step(number) for number in range(2, 4)]
        results.append([[*losses.tolist(), float(norm)] for _, losses, norm in steps])
    np.testing.assert_allclose(results[1], results[0], rtol=1e-4)


@needs_cuda
@pytest.mark.parametrize("has_teacher", [False, True])
def test_the_peak_of_loss_and_backward_is_a_quarter_of_the_logits_at_most(has_teacher: bool) -> None:
    n, vocabulary = 8192, 32_000
    # With 10 positions for each unit of the width, the weight's gradient takes its full share.
    width = WIDTH if has_teacher else n // 10
    hidden = torch.randn(n, width, device=DEVICE).requires_grad_()
    weight = torch.randn(vocabulary, width, device=DEVICE).requires_grad_()
    targets = torch.randint(0, vocabulary, (n,), device=DEVICE)
    weights = torch.full((n,), 1 / n, device=DEVICE)
    teacher_hidden, teacher_weight = (value.detach().bfloat16() for value in (hidden, weight))

    def run() -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            if has_teacher:
                size = kd_chunk_positions(n, vocabulary, "cuda")
                losses_of = kd_losses(
                    lambda part: (teacher_hidden[part] @ teacher_weight.T).float(), targets, weights, 0.5
                )
                loss, _ = chunked_losses(hidden, weight, losses_of, 3, size)
            else:
                loss = weighted_nll(hidden, weight, targets, weights)
        loss.backward()

    assert peak_bytes(run, DEVICE) <= 0.25 * 4 * n * vocabulary
