"""The loss in chunks: equal to the loss of all logits, in value and gradients; a fraction of their memory."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.support.allocations import peak_bytes
from trainer.losses import chunked_head
from trainer.losses.chunked_head import chunk_positions, weighted_nll


def inputs(n: int, width: int, vocabulary: int, size: float = 1.0) -> tuple[torch.Tensor, ...]:
    """Hidden states, weight, targets and their weights; some weights are 0, as for padding."""
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(n, width, generator=generator) * size).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).requires_grad_()
    targets = torch.randint(0, vocabulary, (n,), generator=generator)
    weights = torch.rand(n, generator=generator) / n
    weights[: n // 4] = 0
    return hidden, weight, targets, weights


def of_all_logits(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The plain formula."""
    return (F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none") * weights).sum()


def with_gradients(loss: torch.Tensor, *leaves: torch.Tensor, scale: float = 1.0) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss * scale, leaves)]


@pytest.mark.parametrize("size", [0.1, 5.0])
@pytest.mark.parametrize(("positions", "entries"), [(1, 1), (7, 1), (256, 1), (256, 1 << 20)])
def test_loss_and_gradients_are_those_of_all_logits(
    monkeypatch: pytest.MonkeyPatch, positions: int, entries: int, size: float
) -> None:
    monkeypatch.setitem(chunked_head._MOST_POSITIONS, "cpu", positions)
    monkeypatch.setattr(chunked_head, "_FEWEST_ENTRIES", entries)
    values = inputs(50, 8, 37, size)
    expected = with_gradients(of_all_logits(*values), *values[:2], scale=3.0)
    for result, value in zip(with_gradients(weighted_nll(*values), *values[:2], scale=3.0), expected, strict=True):
        torch.testing.assert_close(result, value, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(weighted_nll(*values), expected[0], atol=1e-5, rtol=1e-5)


def test_a_likely_target_keeps_its_small_gradient_in_bfloat16() -> None:
    hidden, weight = torch.ones(1, 1, requires_grad=True), torch.tensor([[5.0], [0.0]], requires_grad=True)
    targets, weights = torch.zeros(1, dtype=torch.int64), torch.ones(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _, gradient = with_gradients(weighted_nll(hidden, weight, targets, weights), hidden, weight)
    small = 1 / (1 + math.exp(5))  # p - 1 of the rounded p would be 0.0039 or 0.0078
    assert loss.item() == pytest.approx(-math.log1p(-small), rel=1e-5)
    assert gradient[:, 0].tolist() == pytest.approx([-small, small], rel=5e-3)


def test_products_under_autocast_are_bfloat16_and_sums_float32() -> None:
    values = inputs(64, 16, 4096, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = with_gradients(weighted_nll(*values), *values[:2])
        expected = with_gradients(of_all_logits(*values), *values[:2])
    exact = with_gradients(of_all_logits(*values), *values[:2])
    for result, other, value in zip(results, expected, exact, strict=True):
        assert result.dtype == torch.float32
        assert not torch.equal(result, value)  # else autocast would not be seen
        error, other_error = ((tensor - value).norm() / value.norm() for tensor in (result, other))
        assert error < max(2 * float(other_error), 1e-3)


@pytest.mark.parametrize(("n_positions", "vocabulary", "device"), [(4096, 8192, "cpu"), (16_384, 151_936, "cuda")])
def test_a_chunk_is_a_small_share_of_the_positions(n_positions: int, vocabulary: int, device: str) -> None:
    assert 64 <= chunk_positions(n_positions, vocabulary, device) <= n_positions / 16
    assert chunk_positions(10, 40, device) == 10  # too few to be worth a cut
    assert chunk_positions(0, 40, device) == 1


def test_the_peak_of_loss_and_backward_is_a_quarter_of_the_logits_at_most() -> None:
    values = inputs(2048, 64, 8192)
    logits, device = 2048 * 8192 * 4, torch.device("cpu")
    assert peak_bytes(lambda: torch.empty(2048, 8192), device) == logits
    # The gradients of hidden states and weight are counted, too.
    assert peak_bytes(lambda: weighted_nll(*values).backward(), device) <= 0.25 * logits
    assert peak_bytes(lambda: of_all_logits(*values).backward(), device) >= 2 * logits
    with torch.no_grad():
        assert peak_bytes(lambda: weighted_nll(*values), device) <= 0.25 * logits
