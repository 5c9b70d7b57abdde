"""Float8 layers: their product, what they replace in a model, the scores, the revision, and what is refused."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from miniplm_udf.config.sections import ModelConfig
from miniplm_udf.errors import ConfigError, ModelLoadError
from miniplm_udf.scoring.float8 import Float8Linear, can_quantise, check_device, quantised
from miniplm_udf.scoring.models import describe
from miniplm_udf.scoring.results import Score
from tests.support import tiny_models
from tests.support.scoring_oracles import ROWS, score
from tests.support.tiny_models import decoder_of, make_model_folder, make_scorer

LARGEST = 448.0


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIPLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def rounded_to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """The nearest numbers with 3 bits behind the leading bit and exponents from -6, in float64."""
    exponents = torch.floor(torch.log2(values.abs().clamp(min=2.0**-6)))
    steps = 2.0 ** (exponents - 3)
    return torch.round(values / steps) * steps


def expected_rows(values_RK: torch.Tensor) -> torch.Tensor:
    """The rows as float8 with a scale for each row holds them, in float64."""
    exact = values_RK.double()
    scale = exact.abs().amax(1, keepdim=True) / LARGEST
    return rounded_to_e4m3(exact / scale) * scale


@pytest.mark.parametrize("n_tokens", [1, 7, 64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_product_is_that_of_the_rounded_matrices(n_tokens: int, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    # Rows of very different sizes, which one scale for all would round to zero.
    sizes = 10.0 ** torch.randint(-4, 3, (n_tokens, 1), generator=generator)
    x_TK = (torch.randn(n_tokens, 64, generator=generator) * sizes).bfloat16()
    weight_NK = torch.randn(48, 64, generator=generator).bfloat16()
    bias_N = torch.randn(48, generator=generator).bfloat16() if has_bias else None
    found_TN = Float8Linear(weight_NK, bias_N)(x_TK)
    product_TN = expected_rows(x_TK) @ expected_rows(weight_NK).T
    expected_TN = product_TN + (bias_N.double() if bias_N is not None else 0)
    exact_TN = torch.nn.functional.linear(x_TK.double(), weight_NK.double(), bias_N.double() if has_bias else None)  # type: ignore[union-attr]
    assert found_TN.dtype == torch.bfloat16
    # The result is rounded to bfloat16 once, and with the bias once more.
    bound_TN = 2.0**-8 * (product_TN.abs() + expected_TN.abs()) + 1e-12
    assert ((found_TN.double() - expected_TN).abs() <= bound_TN).all()
    difference_TN = (found_TN.double() - exact_TN).abs()
    assert (difference_TN > bound_TN).any(), "the matrices are rounded, so the product is not exact"


def test_the_scales_of_rows() -> None:
    rows_RK = torch.tensor([[0.0, 0.0], [1e-30, 0.0], [1.0, -448.0], [3.0, 1.5], [float("inf"), 1.0]])
    values_RK, scale_R1 = quantised(rows_RK)
    assert scale_R1.squeeze(1).tolist()[2:4] == pytest.approx([1.0, 3.0 / LARGEST])
    restored_RK = values_RK.float() * scale_R1
    assert torch.equal(restored_RK[:2], torch.zeros(2, 2))
    assert torch.allclose(restored_RK[2:4], rows_RK[2:4])
    assert restored_RK[4].isnan().any(), "an infinity makes the row's score NaN, which is rejected"


def test_a_token_does_not_depend_on_the_others() -> None:
    layer = Float8Linear(torch.randn(32, 32).bfloat16())
    x_TK = torch.randn(5, 32).bfloat16()
    loud_TK = torch.cat([x_TK, 1000 * torch.randn(3, 32).bfloat16()])
    assert torch.equal(layer(x_TK), layer(loud_TK)[:5])


def test_other_shapes_and_layouts() -> None:
    layer = Float8Linear(torch.randn(48, 32).bfloat16())
    x_BTK = torch.randn(2, 3, 32).bfloat16()
    found_BTN = layer(x_BTK)
    assert found_BTN.shape == (2, 3, 48)
    assert torch.equal(found_BTN[1], layer(x_BTK[1]))
    transposed = x_BTK.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(layer(transposed), found_BTN)
    assert torch.allclose(layer.weight.float(), expected_rows(layer.weight).float(), rtol=0.01)


def test_the_layers_of_a_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Qwen 2 has biases; its output layer has the shape of a float8 layer, and stays as it is."""
    with caplog.at_level(logging.INFO, "miniplm.scorer"):
        decoder = decoder_of(make_scorer(make_model_folder(tmp_path, "qwen2"), dtype="float8"))
    replaced = [name for name, layer in decoder.named_modules() if isinstance(layer, Float8Linear)]
    assert len(replaced) == 2 * 7
    assert decoder.embed_tokens.weight.dtype == decoder.norm.weight.dtype == torch.bfloat16
    assert decoder.layers[0].self_attn.q_proj.bias is not None
    # Each layer 2 x 32 x 32 + 2 x 32 x 16 of attention and 3 x 32 x 48; the tied output layer 320 x 32.
    in_float8 = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    share = 100 * in_float8 / (in_float8 + 320 * 32)
    assert f"{share:.0f} % of the parameters in matrix products are in float8" in caplog.text


def test_what_stays_in_bfloat16() -> None:
    assert can_quantise("q_proj", torch.nn.Linear(32, 16))
    assert not can_quantise("q_proj", torch.nn.Linear(32, 8))
    assert not can_quantise("q_proj", torch.nn.Linear(24, 16))
    assert not can_quantise("gate", torch.nn.Linear(32, 16))
    assert not can_quantise("q_proj", torch.nn.modules.linear.NonDynamicallyQuantizableLinear(32, 16))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "qwen3_moe", "falcon_h1"])
def test_scores_differ_a_little(tmp_path: Path, family: str) -> None:
    """Experts that are stacked stay in bfloat16, the attention of the same model does not."""
    folder = make_model_folder(tmp_path, family, factor=3.0)
    exact, half, float8 = (score(make_scorer(folder, dtype=dtype), ROWS) for dtype in ("float32", "bfloat16", "float8"))
    differences = []
    for one, two, three in zip(exact, half, float8, strict=True):
        if not isinstance(one, Score):
            assert three == one
            continue
        assert (three.n_tokens, three.n_bytes) == (one.n_tokens, one.n_bytes)
        assert three.nll_sum_nats != two.nll_sum_nats
        differences.append(abs(three.nll_sum_nats - one.nll_sum_nats) / one.n_tokens)
    # Means of a token: three bits round by up to 6 %, and a wrong scale changes whole nats.
    assert 1e-4 < sum(differences) / len(differences) < 0.2


def test_the_revision_is_its_own_and_auto_never_chooses_it(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path)
    configs = {
        dtype: ModelConfig(path=str(folder), context_tokens=24, window_overlap_tokens=6, dtype=dtype)  # type: ignore[arg-type]
        for dtype in ("auto", "float32", "bfloat16", "float8")
    }
    described = {dtype: describe("m", config) for dtype, config in configs.items()}
    assert described["float8"].dtype == "float8"
    assert len({described[dtype].model_revision for dtype in ("float32", "bfloat16", "float8")}) == 3
    assert described["auto"].dtype in ("float32", "bfloat16")
    # The dtype of the first scoring is kept when the key is removed.
    assert describe("m", configs["auto"], "float8") == described["float8"]
    assert describe("m", configs["bfloat16"], "float8") == described["bfloat16"]
    with pytest.raises(ConfigError, match="expected float32, bfloat16 or float8, found 'float16'"):
        describe("m", configs["auto"], "float16")


def test_a_model_without_such_layers_is_refused(tmp_path: Path) -> None:
    """GPT-2's products are not in torch.nn.Linear."""
    with pytest.raises(ModelLoadError, match=r"GPT2LMHeadModel: dtype: expected linear layers .* set dtype: bfloat16"):
        make_scorer(make_model_folder(tmp_path, "gpt2"), dtype="float8")


def test_a_device_without_float8_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_device(torch.device("cpu"))

    def unsupported(*_: Any, **__: Any) -> torch.Tensor:
        """The error of an older GPU, which is not here."""
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with compute capability >= 9.0 or 8.9")

    def ignores_scales(x: torch.Tensor, y: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return (x.float() @ y.float()).bfloat16()

    folder = make_model_folder(tmp_path)
    for fake, reason in ((unsupported, "is only supported"), (ignores_scales, "a wrong product")):
        monkeypatch.setattr(torch, "_scaled_mm", fake)
        with pytest.raises(ModelLoadError, match=rf"8\.9 or newer\), found cpu: .*{reason}.*; set dtype: bfloat16"):
            make_scorer(folder, dtype="float8")


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*tiny_models.FAMILIES, *tiny_models.OTHER_FAMILIES} - {"gpt2"}))
def test_every_other_family_is_scored(tmp_path: Path, family: str) -> None:
    scorer = make_scorer(make_model_folder(tmp_path, family), dtype="float8")
    assert any(isinstance(layer, Float8Linear) for layer in decoder_of(scorer).modules())
    assert all(isinstance(one, Score) for one in score(scorer, ROWS[:4]))
