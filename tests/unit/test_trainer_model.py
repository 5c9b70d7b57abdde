"""Models from architecture dicts: any family, checked keys, defaults from the data, weights a function of the seed."""

from typing import Any

import pytest
import torch

from miniplm_udf.errors import ConfigError
from tests.support.trainer_roots import FAMILIES, LLAMA
from trainer.model import build_model, model_config, n_parameters


def config_of(architecture: dict[str, Any], vocab_size: int = 100, max_positions: int = 16) -> Any:
    return model_config(architecture, where="here", vocab_size=vocab_size, separator_id=3, max_positions=max_positions)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_build_and_run(family: str) -> None:
    config = config_of(FAMILIES[family])
    model = build_model(config, where="here", seed=0)
    assert (config.vocab_size, config.eos_token_id, config.pad_token_id) == (100, 3, None)
    assert getattr(config, "max_position_embeddings", 16) == 16
    with torch.no_grad():
        logits = model(input_ids=torch.full((2, 16), 99)).logits
    assert logits.shape == (2, 16, 100)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_weights_are_a_function_of_the_seed() -> None:
    first, again, other = (build_model(config_of(LLAMA), where="here", seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_tied_weights_count_once() -> None:
    tied, untied = LLAMA, LLAMA | {"tie_word_embeddings": False}
    sizes = [n_parameters(build_model(config_of(a), where="here", seed=0)) for a in (tied, untied)]
    assert sizes[1] - sizes[0] == 100 * 16


def test_a_larger_vocabulary_is_kept() -> None:
    assert config_of(LLAMA | {"vocab_size": 128}).vocab_size == 128


def test_rope_theta_is_taken() -> None:
    assert config_of(LLAMA | {"rope_theta": 5e5}).rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"hiden_size": 16}, "no key 'hiden_size'; did you mean 'hidden_size'"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": 15}, "here"),
        ({"vocab_size": 99}, "at least 100"),
        ({"max_position_embeddings": 15}, "at least 16"),
    ],
)
def test_what_cannot_be_built_is_a_config_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(config_of(LLAMA | change), where="here", seed=0)


def test_no_model_type_and_no_causal_lm() -> None:
    with pytest.raises(ConfigError, match="model_type"):
        config_of({})
    with pytest.raises(ConfigError, match="no causal LM"):
        build_model(config_of({"model_type": "t5"}), where="here", seed=0)
