"""Our attention: equal to transformers' own, used where it is, and without a mask in compiled layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from miniplm_udf.scoring import attention, compilation
from tests.support import tiny_models
from tests.support.causal_types import tiny_config


def plain(tmp_path: Path, family: str = "llama", **changes: Any) -> Any:
    folder = tiny_models.make_model_folder(tmp_path, family, max_position_embeddings=1024, **changes)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.slow
@pytest.mark.parametrize("n_tokens", [1, 63, 64, 65, 200, 800])
def test_equals_sdpa(tmp_path: Path, n_tokens: int) -> None:
    model = plain(tmp_path)
    input_BT = torch.randint(0, tiny_models.VOCAB_SIZE, (3, n_tokens), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(input_ids=input_BT, use_cache=False).logits
        attention.improve_attention(model)
        found = model(input_ids=input_BT, use_cache=False).logits
    assert model.config._attn_implementation == "miniplm_blocked"
    assert float((expected - found).abs().max()) < 1e-5


def test_a_sliding_window_is_kept(tmp_path: Path) -> None:
    model = plain(tmp_path, "gemma3_text", sliding_window=16)
    input_BT = torch.randint(0, tiny_models.VOCAB_SIZE, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(input_ids=input_BT, use_cache=False).logits
        attention.improve_attention(model)
        found = model(input_ids=input_BT, use_cache=False).logits
    assert float((expected - found).abs().max()) < 1e-4


def test_a_model_that_ours_gets_wrong_keeps_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **others: Any) -> tuple[torch.Tensor, None]:
        found, _ = right(*arguments, **others)
        return found + 1, None

    right = attention.blocked_attention
    monkeypatch.setattr(attention, "blocked_attention", wrong)
    model = plain(tmp_path)
    attention.improve_attention(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_computes_with_the_mask_keeps_its_own() -> None:
    """DeepSeek-V3.2 chooses keys by the mask, and fails where it is None."""
    model = AutoModelForCausalLM.from_config(tiny_config("deepseek_v32")).eval()
    attention.improve_attention(model)
    assert model.config._attn_implementation == "sdpa"
    with torch.inference_mode():
        assert model(input_ids=torch.ones(2, 40, dtype=torch.long), use_cache=False).logits.isfinite().all()


@pytest.mark.slow
def test_compiled_layers_need_no_mask(tmp_path: Path) -> None:
    """Dynamo alone, with no compiler behind it. The mask is made outside of the layers, before torch traces them."""

    def without_mask(*arguments: Any, **others: Any) -> tuple[torch.Tensor, None]:
        if (arguments[4] if len(arguments) > 4 else others["attention_mask"]) is not None:
            raise ValueError("a mask")
        return attention.blocked_attention(*arguments, **others)

    model = plain(tmp_path)
    attention.improve_attention(model)
    from transformers import AttentionInterface

    AttentionInterface.register("miniplm_blocked", without_mask)
    try:
        layers = compilation.CompiledLayers(model.base_model, "eager")
        with torch.inference_mode(), layers.active():
            model.base_model(input_ids=torch.ones(2, 40, dtype=torch.long), use_cache=False)
            assert compilation.finish_compiling()
            model.base_model(input_ids=torch.ones(2, 40, dtype=torch.long), use_cache=False)
    finally:
        AttentionInterface.register("miniplm_blocked", attention.blocked_attention)
    assert layers._functions[0]._runs == len(model.base_model.layers)


def test_a_mask_is_not_made_while_something_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says to all threads that it is compiling, and transformers then makes masks that may be left out."""
    model = AutoModelForCausalLM.from_config(tiny_models.make_config("llama")).eval()
    attention.improve_attention(model)
    seen: list[Any] = []
    layer = model.base_model.layers[0]
    layer.register_forward_pre_hook(
        lambda module, arguments, named: seen.append(named.get("attention_mask")), with_kwargs=True
    )
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    with torch.inference_mode():
        model.base_model(input_ids=torch.ones(2, 40, dtype=torch.long), use_cache=False)
    assert seen == [None]
