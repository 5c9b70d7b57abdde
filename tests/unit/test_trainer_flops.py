"""Model FLOPs by hand for tied and untied models, and the peaks of chips by the names that CUDA reports."""

from typing import Any

import pytest
import torch

from miniplm_udf.scoring.cpu import pack_linears
from tests.support.trainer_roots import FAMILIES, LLAMA
from trainer.models.flops import equal_compute_steps, matrix_parameters, peak_flops_per_second, training_flops_per_token
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


def test_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    names = {
        "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA L40S": 362e12, "NVIDIA L40": 181e12, "NVIDIA L4": 121e12,
        "NVIDIA GeForce GTX 1080": None,
    }  # fmt: skip
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops_per_second(gpu, torch.bfloat16) == peak
        assert peak_flops_per_second(gpu, torch.float32) is None
    assert peak_flops_per_second(torch.device("cpu"), torch.bfloat16) is None
