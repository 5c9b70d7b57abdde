"""The model with its loss: equal to the loss of `.logits` for heads of every kind; the right way is chosen for each."""

from typing import Any

import pytest
import torch

from tests.support.trainer_roots import FAMILIES, LLAMA
from trainer.losses.lm_loss import CausalLMWithLoss
from trainer.losses.loss import target_nll
from trainer.models.model import build_model, model_config

VOCAB, LENGTH = 40, 12
# The layers above the decoder: a soft cap, two scales, a bias, a decoder that `base_model` only wraps.
OTHER_HEADS: dict[str, dict[str, Any]] = {
    "gemma2": LLAMA | {"model_type": "gemma2", "head_dim": 8},
    "cohere": LLAMA | {"model_type": "cohere"},
    "granite": LLAMA | {"model_type": "granite", "logits_scaling": 2.0},
    "gptj": {"model_type": "gptj", "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4},
    "opt": {
        "model_type": "opt", "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "word_embed_proj_dim": 8,
    },
}  # fmt: skip
UNTIED = {"untied": LLAMA | {"tie_word_embeddings": False}}


def build(architecture: dict[str, Any]) -> Any:
    config = model_config(architecture, where="x", vocab_size=VOCAB, separator_id=3, max_positions=LENGTH)
    return build_model(config, where="x", seed=0).eval()


@pytest.mark.parametrize("family", [*FAMILIES, *UNTIED, *OTHER_HEADS])
def test_loss_and_gradients_are_those_of_the_models_own_logits(family: str) -> None:
    model = build((FAMILIES | UNTIED | OTHER_HEADS)[family])
    module = CausalLMWithLoss(model)
    assert module.has_plain_head == (family not in OTHER_HEADS)
    with torch.no_grad():
        for weight in model.parameters():  # large logits, biases that are not 0
            weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, VOCAB, (3, LENGTH + 1), generator=generator)
    weights = torch.rand(3, LENGTH, generator=generator)
    results = []
    for loss in (
        module(tokens[:, :-1], tokens[:, 1:], weights).total,
        (target_nll(model(input_ids=tokens[:, :-1]).logits, tokens[:, 1:]) * weights).sum(),
    ):
        loss.backward()
        results.append([loss.detach(), *(weight.grad.clone() for weight in model.parameters())])
        model.zero_grad()
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-5)


def test_the_model_stays_as_it_is() -> None:
    for model in (build(LLAMA), build(FAMILIES["gpt2"]).train()):
        was_training, before = model.training, {name: value.clone() for name, value in model.state_dict().items()}
        CausalLMWithLoss(model)
        assert model.training == was_training
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not model.base_model._forward_hooks


def test_a_soft_cap_is_seen_though_new_weights_have_small_logits() -> None:
    model = build(LLAMA)
    tokens = torch.arange(LENGTH)[None]
    small = model(input_ids=tokens).logits
    assert small.abs().max() < 1
    plain = model.forward

    def capped(*arguments: Any, **keywords: Any) -> Any:
        output = plain(*arguments, **keywords)
        output.logits = torch.tanh(output.logits / 50) * 50
        return output

    model.forward = capped
    torch.testing.assert_close(model(input_ids=tokens).logits, small, atol=1e-4, rtol=0)
    assert not CausalLMWithLoss(model).has_plain_head
