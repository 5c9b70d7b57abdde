"""The head in tiles against the plain log-softmax: several tiles of rows and of vocabulary, in every architecture."""

from typing import Any

import pytest
import torch

from miniplm_udf.scoring import head
from miniplm_udf.scoring.head import Head
from tests.support import tiny_models

# Two whole tiles of a CPU and some of a third; rows of more than one tile.
VOCAB_SIZE = 2 * head._TILE_VOCABULARY["cpu"] + 77
N_ROWS = head._TILE_ROWS["cpu"] + 44
FAMILIES = ("llama", "gemma2", "granite", "cohere", "phi", "gpt2")


def plain_nll(model: Any, hidden_ND: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
    """-log p in float64 of the model's own logits, its decoder put aside."""
    config = model.config
    logits_NV = model.get_output_embeddings()(hidden_ND).double()
    logits_NV = logits_NV * getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    logits_NV = cap * torch.tanh(logits_NV / cap) if cap else logits_NV
    return -torch.log_softmax(logits_NV, dim=1).gather(1, target_N[:, None]).squeeze(1)


def made(family: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A model, hidden states, and targets that stand in every tile, also at its first and last row."""
    model = tiny_models.make_model(family, vocab_size=VOCAB_SIZE).requires_grad_(False)
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:
        torch.nn.init.normal_(bias, std=2.0)
    generator = torch.Generator().manual_seed(0)
    target_N = torch.randint(0, VOCAB_SIZE, (N_ROWS,), generator=generator)
    tile = head._TILE_VOCABULARY["cpu"]
    target_N[:6] = torch.tensor([0, tile - 1, tile, 2 * tile - 1, 2 * tile, VOCAB_SIZE - 1])
    return model, torch.randn(N_ROWS, 32, generator=generator) * 3, target_N


@pytest.mark.parametrize("family", FAMILIES)
def test_tiles_are_the_whole(family: str) -> None:
    model, hidden_ND, target_N = made(family)
    expected_N = plain_nll(model, hidden_ND, target_N)
    assert float(expected_N.std()) > 0.1
    with torch.inference_mode():
        found_N = Head(model).nll(hidden_ND, target_N)
    assert found_N.dtype == torch.float32
    assert float((found_N - expected_N).abs().max()) < 2e-5


def test_hidden_states_in_float32_are_rounded_as_the_model_rounds_them() -> None:
    """Mamba's decoder returns float32 in every dtype."""
    model = tiny_models.make_model("mamba").bfloat16().requires_grad_(False)
    input_BT = torch.arange(20).view(2, 10) + 5
    with torch.inference_mode():
        hidden_BTD = model.base_model(input_ids=input_BT, use_cache=False)[0]
        assert hidden_BTD.dtype == torch.float32
        expected_BTV = model(input_ids=input_BT, use_cache=False).logits
        assert torch.equal(Head(model).logits(hidden_BTD), expected_BTV)
        assert Head(model).hidden(input_BT).dtype == torch.bfloat16


def test_large_logits_do_not_overflow() -> None:
    model, hidden_ND, target_N = made("llama")
    expected_N = plain_nll(model, hidden_ND * 100, target_N)
    assert float(expected_N.max()) > 200
    found_N = Head(model).nll(hidden_ND * 100, target_N)
    torch.testing.assert_close(found_N.double(), expected_N, rtol=1e-6, atol=1e-3)


def test_no_rows() -> None:
    model, hidden_ND, target_N = made("llama")
    assert Head(model).nll(hidden_ND[:0], target_N[:0]).shape == (0,)
