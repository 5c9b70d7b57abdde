"""Model FLOPs by hand for tied and untied models, and the peaks of chips by the names that CUDA reports."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from miniplm_udf.scoring.cpu import pack_linears
from miniplm_udf.scoring.model_flops import attention_layers, matrix_parameters, model_sizes
from miniplm_udf.scoring.peaks import peak_flops_per_second, peak_of_gpu
from tests.support import tiny_models
from tests.support.trainer_roots import FAMILIES, LLAMA
from trainer.models.flops import equal_compute_steps, training_flops_per_token
from trainer.models.model import build_model, model_config

BLOCK = 4 * 16 * 16 + 3 * 16 * 32  # of LLAMA: four products of attention, three of the MLP
HEAD = 40 * 16


def build(architecture: dict[str, Any]) -> Any:
    config = model_config(architecture, where="x", vocab_size=40, separator_id=3, max_positions=12)
    return build_model(config, where="x", seed=0)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_by_hand(tied: bool) -> None:
    model = build(LLAMA | {"tie_word_embeddings": tied, "num_hidden_layers": 2})
    assert matrix_parameters(model) == 2 * BLOCK + HEAD
    assert training_flops_per_token(model, 100) == 6 * (2 * BLOCK + HEAD) + 6 * 2 * 16 * 100


@pytest.mark.parametrize(("steps", "student", "teacher", "expected"), [(100, 10, 30, 50), (7, 1, 0, 7), (7, 1, 4, 3)])
def test_steps_of_equal_compute_by_hand(steps: int, student: int, teacher: int, expected: int) -> None:
    assert equal_compute_steps(steps, student, teacher) == expected


def test_packed_weights_count() -> None:
    model = build(LLAMA | {"num_hidden_layers": 2})
    pack_linears(model)
    assert matrix_parameters(model) == 2 * BLOCK + HEAD


def test_other_families() -> None:
    gpt2 = build(FAMILIES["gpt2"])  # its layers are Conv1D; its table of positions is no product
    assert matrix_parameters(gpt2) == 12 * 16 * 16 + HEAD
    mamba = build(FAMILIES["mamba"])
    assert training_flops_per_token(mamba, 100) == 6 * matrix_parameters(mamba)
    assert training_flops_per_token(torch.nn.Linear(3, 5), 100) == 6 * 15


def test_sizes_of_a_mixture_of_experts_and_of_a_model_without_attention() -> None:
    assert not model_sizes(build(LLAMA)).has_experts
    small = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_key_value_heads": 2}
    assert model_sizes(build({**LLAMA, **small, "model_type": "qwen3_moe"})).has_experts
    sizes = model_sizes(torch.nn.Linear(3, 5))
    assert (sizes.parameters, sizes.layers, sizes.width, sizes.has_experts) == (15, 0, 0, False)
    assert sizes.forward_flops([10, 20]) == sizes.forward_flops([10, 20], 5) == 2 * 15 * 30


def test_the_output_layer_counts_for_scored_positions() -> None:
    sizes = model_sizes(build(LLAMA | {"num_hidden_layers": 2}))
    attention = 2 * 2 * 16 * (10**2 + 20**2)
    assert sizes.forward_flops([10, 20]) == sizes.forward_flops([10, 20], 30)
    assert sizes.forward_flops([10, 20], 12) == 2 * (2 * BLOCK * 30 + HEAD * 12) + attention


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (None, 4),
        (["full_attention", "sliding_attention", "hybrid", "chunked_attention"], 4),
        (["linear_attention", "full_attention", "mamba", "conv"], 1),
        (["linear_attention"] * 4, 0),
        # More than the model has.
        (["full_attention"] * 6, 4),
    ],
)
def test_layers_with_attention(kinds: list[str] | None, expected: int) -> None:
    config = SimpleNamespace(num_attention_heads=2, num_hidden_layers=4, hidden_size=16, layer_types=kinds)
    assert attention_layers(config) == expected
    config.num_attention_heads = None
    assert attention_layers(config) == 0


def test_a_hybrid_counts_its_attention_alone() -> None:
    config = tiny_models.make_model("bamba").config
    n_attention = sum(kind == "full_attention" for kind in config.layer_types)
    assert 0 < attention_layers(config) == n_attention < config.num_hidden_layers


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32"),
    [
        ("NVIDIA GB200", 2500e12, 80e12),
        ("NVIDIA B200", 2250e12, 75e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA H200 NVL", 835e12, 60e12),
        ("NVIDIA GH200 480GB", 989e12, 67e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H100 NVL", 835e12, 60e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA A10", 125e12, 31.2e12),
        ("NVIDIA A30", 165e12, 10.3e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA L40", 181e12, 90.5e12),
        ("NVIDIA L4", 121e12, 30.3e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
        ("Tesla V100-SXM2-32GB", None, 15.7e12),
        ("Tesla T4", None, 8.1e12),
        # Not in the table, although a part of the name is.
        ("NVIDIA A10G", None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA GeForce GTX 1080", None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
    ],
)
def test_peaks(name: str, bfloat16: float | None, float32: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_of_gpu(name, "bfloat16") == (None if bfloat16 is None else pytest.approx(bfloat16))
    assert peak_of_gpu(name, "float32") == (None if float32 is None else pytest.approx(float32))
    assert peak_of_gpu(name, "float16") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops_per_second(torch.device("cuda", 0), "bfloat16") == peak_of_gpu(name, "bfloat16")
    assert peak_flops_per_second(torch.device("cpu"), "bfloat16") is None
