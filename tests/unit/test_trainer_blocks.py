"""The blocks: without a mask only where nothing changes, checkpointed with equal gradients and less memory."""

import logging
from typing import Any

import pytest
import torch

from miniplm_udf.config.training import TrainConfig
from miniplm_udf.errors import ConfigError
from tests.support.allocations import peak_bytes
from tests.support.trainer_roots import FAMILIES, LLAMA
from trainer.losses.lm_loss import CausalLMWithLoss
from trainer.models import blocks
from trainer.models.blocks import decoder_blocks, drop_mask, prepare_blocks
from trainer.models.model import build_model, model_config

VOCAB, LENGTH = 40, 12


def build(architecture: dict[str, Any], length: int = LENGTH) -> Any:
    config = model_config(architecture, where="x", vocab_size=VOCAB, separator_id=3, max_positions=length)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return build_model(config, where="x", seed=0)


def loss_of(module: CausalLMWithLoss, length: int = LENGTH, n: int = 2) -> torch.Tensor:
    tokens = torch.randint(0, VOCAB, (n, length + 1), generator=torch.Generator().manual_seed(0))
    loss: torch.Tensor = module(tokens[:, :-1], tokens[:, 1:], torch.ones(n, length)).total
    return loss


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_are_found(family: str) -> None:
    key = {"gpt2": "n_layer"}.get(family, "num_hidden_layers")
    layers = decoder_blocks(build(FAMILIES[family] | {key: 3}))
    assert len(layers) == 3
    assert len({type(layer) for layer in layers}) == 1


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_attention_without_a_mask_changes_nothing(family: str) -> None:
    module = CausalLMWithLoss(build(FAMILIES[family]).eval())
    expected = loss_of(module)
    assert drop_mask(module.model, LENGTH)
    assert module.model.config._attn_implementation not in module.model.config.to_json_string()
    assert torch.equal(loss_of(module), expected)
    assert not module.model.training


@pytest.mark.parametrize(("window", "is_dropped"), [(LENGTH - 1, False), (LENGTH, True)])
def test_a_window_shorter_than_the_sequence_keeps_its_mask(window: int, is_dropped: bool) -> None:
    module = CausalLMWithLoss(build(LLAMA | {"model_type": "mistral", "sliding_window": window}).eval())
    expected = loss_of(module)
    assert drop_mask(module.model, LENGTH) == is_dropped
    assert torch.equal(loss_of(module), expected)


def test_a_model_without_masks_of_its_own_stays() -> None:
    assert not drop_mask(build(FAMILIES["mamba"]), LENGTH)
    assert not drop_mask(torch.nn.Linear(2, 2), LENGTH)


def test_document_masks_keep_the_mask() -> None:
    module = CausalLMWithLoss(build(LLAMA))
    prepare_blocks(module, TrainConfig(document_masks=True), LENGTH, "here")
    assert module.model.config._attn_implementation == "sdpa"


def test_checkpointed_layers_have_equal_gradients_and_hold_less() -> None:
    length, results, peaks = 128, [], []
    for is_checkpointed in (False, True):
        module = CausalLMWithLoss(build(LLAMA | {"num_hidden_layers": 6, "intermediate_size": 256}, length))
        prepare_blocks(module, TrainConfig(activation_checkpointing=is_checkpointed), length, "here")
        module.train()
        peaks.append(peak_bytes(lambda module=module: loss_of(module, length, 8).backward(), torch.device("cpu")))
        results.append([parameter.grad for parameter in module.parameters()])
    assert peaks[1] < 0.5 * peaks[0]
    for result, expected in zip(*results, strict=True):
        assert torch.equal(result, expected)


def test_a_model_without_checkpointing_is_refused() -> None:
    module = CausalLMWithLoss(build(LLAMA))
    module.model.supports_gradient_checkpointing = False
    with pytest.raises(ConfigError, match=r"^train\.activation_checkpointing: .*found here .*=false"):
        prepare_blocks(module, TrainConfig(activation_checkpointing=True), LENGTH, "here")


@pytest.mark.slow
def test_what_cannot_be_compiled_is_refused_or_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compile_nothing(self: torch.nn.Module, **options: Any) -> None:
        def fail(*arguments: Any, **keywords: Any) -> None:
            raise RuntimeError("graph break\nmore lines")

        self._compiled_call_impl = fail

    monkeypatch.setattr(torch.nn.Module, "compile", compile_nothing)
    module = CausalLMWithLoss(build(LLAMA))
    expected, small = loss_of(module), TrainConfig(compile=True, micro_batch_sequences=1, batch_sequences=1)
    with pytest.raises(ConfigError, match=r"^train\.compile: .*found here \(graph break\); set train\.compile=false"):
        prepare_blocks(module, small, LENGTH, "here")
    module = CausalLMWithLoss(build(LLAMA))
    with caplog.at_level(logging.WARNING, "miniplm.trainer.blocks"):
        blocks._compile(module, TrainConfig(), LENGTH, "here")
    assert "here: trains without compilation, which is slower: graph break" in caplog.text
    assert torch.equal(loss_of(module), expected)


def test_only_a_gpu_compiles_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *arguments, **options: pytest.fail("compiled"))
    for choice in ("auto", False):
        prepare_blocks(CausalLMWithLoss(build(LLAMA)), TrainConfig(compile=choice), LENGTH, "here")  # type: ignore[arg-type]
