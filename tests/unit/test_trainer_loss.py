"""The loss: token NLLs as torch's, gradients as torch's, weights by hand, the same sum in any cut of the batch."""

import math

import pytest
import torch
import torch.nn.functional as F

from trainer.losses import loss as loss_module
from trainer.losses.loss import target_nll, target_weights
from trainer.schedule import learning_rate

SEPARATOR = 0


@pytest.mark.parametrize("tile_entries", [1, 40, 1 << 24])
def test_nll_and_gradient_are_those_of_cross_entropy(monkeypatch: pytest.MonkeyPatch, tile_entries: int) -> None:
    monkeypatch.setattr(loss_module, "_TILE_ENTRIES", tile_entries)
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, 5, 11, generator=generator) * 20).requires_grad_()
    targets = torch.randint(0, 11, (3, 5), generator=generator)
    weights = torch.rand(3, 5, generator=generator)
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(3, 5)
    (expected,) = torch.autograd.grad((plain * weights).sum(), logits)
    found = target_nll(logits, targets)
    (gradient,) = torch.autograd.grad((found * weights).sum(), logits)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits = torch.zeros(1, 1, 4096, dtype=torch.bfloat16, requires_grad=True)
    nll = target_nll(logits, torch.zeros(1, 1, dtype=torch.int64))
    assert nll.dtype == torch.float32
    assert nll.item() == pytest.approx(math.log(4096), abs=1e-5)  # a sum in bfloat16 would stop at 256
    (gradient,) = torch.autograd.grad(nll.sum(), logits)
    assert gradient.dtype == torch.bfloat16


INPUTS = torch.tensor([[5, SEPARATOR, 6, 7], [5, 6, 7, 8], [SEPARATOR, 1, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.uint8)


def test_official_weights_by_hand() -> None:
    weights, count = target_weights(INPUTS, MASK, SEPARATOR, "official")
    # Row 0 has two targets with a real input; row 2 has only a separator as input and counts nowhere.
    assert weights.tolist() == [[0.5, 0, 0.5, 0], [0.25] * 4, [0] * 4]
    assert count.item() == 2


def test_token_mean_weights_by_hand() -> None:
    weights, count = target_weights(INPUTS, MASK, SEPARATOR, "token_mean")
    assert weights.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert count.item() == 8


@pytest.mark.parametrize("kind", ["official", "token_mean"])
def test_parts_of_a_batch_add_up(kind: str) -> None:
    whole, count = target_weights(INPUTS, MASK, SEPARATOR, kind)  # type: ignore[arg-type]
    parts = [target_weights(INPUTS[i : i + 1], MASK[i : i + 1], SEPARATOR, kind) for i in range(3)]  # type: ignore[arg-type]
    assert torch.equal(torch.cat([part for part, _ in parts]), whole)
    assert sum(float(c) for _, c in parts) == float(count)


def test_learning_rate_by_hand() -> None:
    rates = [learning_rate(s, steps=10, warmup_steps=4, peak=1.0, min_ratio=0.1) for s in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[6] == pytest.approx(0.1 + 0.9 / 2)  # half of the cosine
    assert rates[-1] == pytest.approx(0.1)


def test_learning_rate_without_warmup_and_with_nothing_else() -> None:
    assert learning_rate(0, steps=1, warmup_steps=0, peak=1.0, min_ratio=0.1) == pytest.approx(0.1)
    assert [learning_rate(s, steps=2, warmup_steps=2, peak=1.0, min_ratio=0.1) for s in (0, 1)] == [0.5, 1.0]
