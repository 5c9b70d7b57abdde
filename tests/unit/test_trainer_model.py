"""Models from architecture dicts: any family, checked keys, defaults from the data, weights a function of the seed."""

from typing import Any

import pytest
import torch

from miniplm_udf.errors import ConfigError
from tests.support.trainer_roots import FAMILIES, LLAMA
from trainer.models import model as model_module
from trainer.models.model import build_model, choose_scan, model_config, n_parameters


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


@pytest.mark.slow
def test_no_model_type_and_no_causal_lm() -> None:
    with pytest.raises(ConfigError, match="model_type"):
        config_of({})
    with pytest.raises(ConfigError, match="no causal LM"):
        build_model(config_of({"model_type": "t5"}), where="here", seed=0)


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def scan_of(monkeypatch: pytest.MonkeyPatch, installed: set[str], device: torch.device, **changes: Any) -> bool:
    """Whether `choose_scan` takes mambapy on a machine with these packages."""
    monkeypatch.setattr(model_module, "_is_installed", installed.__contains__)
    architecture = FAMILIES["mamba"] | changes
    config = config_of(architecture)
    choose_scan(config, architecture, device, where="here")
    return bool(config.use_mambapy)


def test_the_scan_is_the_fastest_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {"mamba_ssm", "causal_conv1d"}
    assert scan_of(monkeypatch, {"mambapy"}, CPU)
    assert scan_of(monkeypatch, kernels | {"mambapy"}, CPU), "the kernels need a GPU"
    assert scan_of(monkeypatch, {"mambapy", "mamba_ssm"}, CUDA), "one of the two kernels is missing"
    assert not scan_of(monkeypatch, kernels, CUDA)
    assert not scan_of(monkeypatch, set(), CPU, use_mambapy=False), "the user asked for the loop"


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("changes", [{}, {"use_mambapy": True}, {"model_type": "falcon_mamba"}])
def test_only_the_sequential_scan_is_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, changes: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"^here: expected a parallel scan .*`pip install mambapy`"):
        scan_of(monkeypatch, {"mamba_ssm"}, device, **changes)


def test_other_families_need_no_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "_is_installed", lambda package: False)
    choose_scan(config_of(LLAMA), LLAMA, CPU, where="here")


def test_mambapy_computes_what_the_loop_computes() -> None:
    pytest.importorskip("mambapy", reason="the extra train has mambapy")
    tokens = torch.randint(0, 100, (2, 37), generator=torch.Generator().manual_seed(0))
    results = []
    for changes in ({"use_mambapy": False}, {}):
        architecture = FAMILIES["mamba"] | changes
        config = config_of(architecture, max_positions=37)
        choose_scan(config, architecture, CPU, where="here")
        model = build_model(config, where="here", seed=0).train()
        logits = model(input_ids=tokens).logits
        logits.logsumexp(-1).sum().backward()
        results.append((config.use_mambapy, logits.detach(), [p.grad for p in model.parameters()]))
    (first_scan, logits, gradients), (second_scan, other_logits, other_gradients) = results
    assert (first_scan, second_scan) == (False, True)
    torch.testing.assert_close(other_logits, logits, atol=1e-5, rtol=1e-4)
    for gradient, other in zip(gradients, other_gradients, strict=True):
        torch.testing.assert_close(other, gradient, atol=1e-4, rtol=1e-3)
