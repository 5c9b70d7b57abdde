"""A model that is split over devices has the scores of a whole model, and no weight on the CPU or the disk.

This machine has one device. What can run here, runs: the load with `device_map`, and accelerate's hooks, which move the
tensors of a split model (the second device is then the disk). Which tensor is on which of two GPUs is checked with
torch's fake tensors: they have a device and a shape, no numbers, and an operation on two devices raises. The scores of
two real GPUs: tests/gpu.
"""

import dataclasses
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from miniplm_udf.config.generate import GenerateConfig
from miniplm_udf.config.sections import ModelConfig, ScoreConfig, ServerConfig
from miniplm_udf.errors import ConfigError, ModelLoadError
from miniplm_udf.scoring import batching
from miniplm_udf.scoring.device_maps import SplitError, check_split, split_options
from miniplm_udf.scoring.head import Head
from miniplm_udf.scoring.loading import load_causal_lm
from miniplm_udf.scoring.models import check_head, describe
from miniplm_udf.scoring.scorer import Scorer
from miniplm_udf.scoring.tokenizer import load_tokenizer
from miniplm_udf.workers import gpu_memory
from miniplm_udf.workers.gpu_memory import GpuMemory, load_when_free
from miniplm_udf.workers.model_scorers import ModelGeneratorFactory, ModelScorerFactory
from tests.support import tiny_models
from tests.support.scoring_oracles import ROWS, score

# The tiny Llama has 144,000 bytes of weights.
SPILLED = {"device_map": "auto", "max_memory": {"cpu": 60_000}}


def config_of(folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig(path=str(folder), dtype="float32", context_tokens=24, window_overlap_tokens=6, **changes)


def nats(results: list[Any]) -> list[float | None]:
    return [getattr(result, "nll_sum_nats", None) for result in results]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_split_model_scores_and_continues_as_a_whole_one(tmp_path: Path, family: str) -> None:
    folder = tiny_models.make_model_folder(tmp_path, family)
    whole, split = config_of(folder), config_of(folder, device_map="auto")
    descriptions = describe("m", whole), describe("m", split)
    assert descriptions[0].model_revision == descriptions[1].model_revision
    factories = [ModelScorerFactory(whole, descriptions[0], ScoreConfig())]
    factories += [ModelScorerFactory(split, descriptions[1], ScoreConfig())]
    assert factories[0].key != factories[1].key
    scorers = [factory() for factory in factories]
    assert nats(score(scorers[1], ROWS)) == pytest.approx(nats(score(scorers[0], ROWS)), rel=1e-6)
    settings = GenerateConfig(model="m", prompt_tokens=4, new_tokens=4, temperature=0.0)
    texts = ["the quick brown fox jumps", "hello world, hello"]
    continued = []
    for config, description in zip((whole, split), descriptions, strict=True):
        generator = ModelGeneratorFactory(config, description, settings, ScoreConfig())()
        continued.append(generator.generate(generator.tokenize(texts, [[], []]), [True, True], ["a", "b"]))
    assert continued[0] == continued[1]


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2"])
def test_a_model_with_hooks_scores_as_one_without(tmp_path: Path, family: str) -> None:
    """The second layer is on the disk: accelerate moves its weights and its inputs at each pass."""
    folder = tiny_models.make_model_folder(tmp_path, family)
    description = describe("m", config_of(folder))
    plain = load_causal_lm(folder, dtype=torch.float32)
    places = {f"model.{name}": "cpu" for name, _ in plain.model.named_children() if name != "layers"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu"}
    hooked = load_causal_lm(folder, dtype=torch.float32, device_map=places)
    assert {parameter.device.type for parameter in hooked.parameters()} == {"cpu", "meta"}
    check_head(hooked, description.vocab_size, hooked.device)
    batching.check_batching(hooked, description)
    # A model on several devices is never compiled, whatever the config says.
    scorers = [
        Scorer(model.eval(), load_tokenizer(folder), description, 64, model.device, compiled)
        for model, compiled in ((plain, False), (hooked, True))
    ]
    assert "eval_frame" not in type(tiny_models.decoder_of(scorers[1])).__module__
    results = [score(scorer, ROWS) for scorer in scorers]
    assert nats(results[1]) == pytest.approx(nats(results[0]), rel=1e-6)


@pytest.mark.parametrize(("dtype", "settled"), [("float8", None), ("auto", "float8")])
def test_float8_layers_cannot_be_split(tmp_path: Path, dtype: Any, settled: str | None) -> None:
    folder = tiny_models.make_model_folder(tmp_path)
    config = ModelConfig(path=str(folder), context_tokens=24, window_overlap_tokens=6, dtype=dtype, device_map="auto")
    with pytest.raises(ConfigError, match=r"models\.m\.device_map: expected null with dtype float8"):
        describe("m", config, settled)


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = tiny_models.make_model_folder(tmp_path)
    with pytest.raises(
        SplitError, match=r"expected all weights on cpu, found \d+ that do not fit .*\(model\..*backend: openai"
    ):
        check_split(load_causal_lm(folder, dtype=torch.float32, **SPILLED), ["cpu"])
    with pytest.raises(SplitError, match="expected all weights on cuda:0, cuda:1, found 21"):
        check_split(load_causal_lm(folder, dtype=torch.float32, **split_options(["cpu"])), ["cuda:0", "cuda:1"])
    check_split(load_causal_lm(folder, dtype=torch.float32, **split_options(["cpu"])), ["cpu"])


def test_a_split_model_whose_layers_do_not_fit_is_waited_for_while_others_hold_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum of the free memory is large enough, but accelerate places whole layers."""
    folder = tiny_models.make_model_folder(tmp_path)
    gib = 1024**3
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(gpu_memory, "_RETRY_SECONDS", 0.05)
    options = iter([SPILLED, SPILLED, split_options(["cpu"])])

    def load() -> Any:
        model = load_causal_lm(folder, dtype=torch.float32, **next(options))
        check_split(model, ["cpu"])
        return model

    def measure(free: int) -> list[GpuMemory]:
        return [GpuMemory(name, free * gib, 80 * gib, 0) for name in "ab"]

    model = load_when_free(load, lambda: measure(40), ["a", "b"], 50 * gib, "m", 60.0)
    assert next(options, None) is None
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}
    options = iter([SPILLED])
    with pytest.raises(ModelLoadError, match=r"models\.m: .* of 80\.0 \+ 80\.0 GiB \(device_map: expected all weights"):
        load_when_free(load, lambda: measure(80), ["a", "b"], 50 * gib, "m", 60.0)


@pytest.mark.parametrize("options", [split_options(["cpu"]), SPILLED], ids=["one device", "several"])
def test_the_checks_of_weights_hold_for_a_split_model(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = tiny_models.make_model_folder(tmp_path)
    weights = load_file(folder / "model.safetensors")
    removed = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"1 missing \(model\.layers\.1\.mlp\.up_proj\.weight\)"):
        load_causal_lm(folder, dtype=torch.float32, **options)
    weights |= {"model.layers.1.mlp.up_proj.weight": removed, "value_head.weight": torch.zeros(1, 2)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"1 unexpected \(value_head\.weight\)"):
        load_causal_lm(folder, dtype=torch.float32, **options)


# --- two GPUs of fake tensors ---


def placed(model: Any, places: dict[str, int]) -> Any:
    """The model with its modules on fake GPUs, and accelerate's hooks between them.

    Args:
        model: a model of fake tensors.
        places: number of the GPU, by module.
    """
    for name, number in places.items():
        for module in model.get_submodule(name).modules():
            for tensors in (module._parameters, module._buffers):
                for key, tensor in tensors.items():
                    if tensor is not None:
                        moved = tensor.to(f"cuda:{number}")
                        is_weight = tensors is module._parameters
                        tensors[key] = torch.nn.Parameter(moved, requires_grad=False) if is_weight else moved
    return accelerate.dispatch_model(model, device_map=places)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("head_gpu", [1, 0], ids=["output layer on the last GPU", "output layer tied to the first"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_tensors_meet_on_the_gpu_of_the_output_layer(family: str, head_gpu: int) -> None:
    """The embeddings are on GPU 0 and the last layer on GPU 1."""
    with FakeTensorMode(), torch.no_grad():
        model = tiny_models.make_model(family, tie_word_embeddings=False).eval()
        places = {f"model.{name}": 0 for name, _ in model.model.named_children() if name != "layers"}
        places |= {"model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": head_gpu}
        model = placed(model, places)
        input_BT = torch.zeros(2, 8, dtype=torch.long).to(model.device)
        assert input_BT.device == torch.device("cuda:0")
        head = Head(model)
        hidden_BTD = head.hidden(input_BT)
        expected = torch.device("cuda", head_gpu)
        assert hidden_BTD.device == expected
        assert head.logits(hidden_BTD).device == expected
        assert head.nll(hidden_BTD.flatten(0, 1), input_BT.flatten().to(expected)).device == expected
        sequences = [torch.zeros(length, dtype=torch.long) for length in (5, 9)]
        assert [nll_T.shape for nll_T in batching._nll(head, sequences, model.device)] == [(4,), (8,)]


# --- the config ---


def test_a_served_model_has_no_device_map() -> None:
    server = ServerConfig(url="http://x/v1", model="m")
    with pytest.raises(ConfigError, match=r"device_map: expected null with `backend: openai`"):
        ModelConfig(path="x", backend="openai", server=server, device_map="auto")
    with pytest.raises(ConfigError, match=r"device_map: expected null with `backend: openai`"):
        dataclasses.replace(ModelConfig(path="x", device_map="auto"), backend="openai", server=server)


def test_a_model_is_made_again_for_a_process_that_takes_all_gpus(tmp_path: Path) -> None:
    """A kept model would hold its GPU while the process waits for the others (`gpu_slots.keep_gpus`)."""
    config = config_of(tiny_models.make_model_folder(tmp_path))
    alone = ModelScorerFactory(config, describe("m", config), ScoreConfig())
    assert alone.key != dataclasses.replace(alone, takes_all_gpus=True).key
