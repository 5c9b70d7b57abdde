"""Training with a teacher: what the loop measures, what is checked before the first step, what is
recorded; without a teacher nothing changes.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, MistralConfig

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig, load_config
from miniplm_udf.config.targets import student_target
from miniplm_udf.config.training import TrainConfig
from miniplm_udf.errors import ConfigError, MiniplmError, ModelLoadError
from miniplm_udf.scoring.gguf_models import gguf_folder
from miniplm_udf.scoring.tokenizer import tokenizer_hash
from miniplm_udf.store.model_records import TokenizerRecord, TrainingRecord
from tests.support.loops import LENGTH, make_loop, make_teacher, run
from tests.support.no_wait import NoWait
from tests.support.tiny_models import make_model, write_gguf
from tests.support.trainer_roots import LLAMA, make_root, write_config, write_tokenizer
from trainer.models.blocks import drop_mask, prepare_blocks
from trainer.models.flops import training_flops_per_token
from trainer.models.teacher_loading import describe_teacher, has_shorter_windows, load_teacher
from trainer.preparation import open_inputs
from trainer.ranks.distributed import World
from trainer.tracking.store import connect
from trainer.train import plan, train

TWO_BLOCKS = LLAMA | {"num_hidden_layers": 2}
KD = {"kd_ratio": 0.5, "gradient_clip_norm": 0.3}


# --- the loop ---


@pytest.mark.parametrize("kind", ["official", "token_mean"])
def test_the_loss_is_the_mixture_in_any_micro_batches(kind: str) -> None:
    whole = run(make_loop(teacher=make_teacher(), loss=kind, **KD))
    parts = run(make_loop(teacher=make_teacher(), loss=kind, micro_batch_sequences=1, **KD))
    for measures, other in zip(whole, parts, strict=True):
        assert measures.lm_loss is not None
        assert measures.kd_loss is not None
        assert measures.loss == pytest.approx(0.5 * measures.lm_loss + 0.5 * measures.kd_loss, abs=1e-6)
        assert dataclasses.astuple(other)[1:4] == pytest.approx(dataclasses.astuple(measures)[1:4], abs=1e-4)
        assert (other.lm_loss, other.kd_loss) == pytest.approx((measures.lm_loss, measures.kd_loss), abs=1e-4)
    # The first LM loss equals the first loss of a training without a teacher.
    assert whole[0].lm_loss == pytest.approx(run(make_loop(loss=kind))[0].loss, abs=1e-6)
    assert run(make_loop())[0].lm_loss is None


def test_the_student_learns_what_the_teacher_predicts() -> None:
    measures = run(make_loop(teacher=make_teacher(), kd_ratio=1.0, steps=60, learning_rate=0.03))
    assert measures[-1].kd_loss is not None
    assert measures[0].kd_loss is not None
    assert measures[-1].kd_loss < 0.5 * measures[0].kd_loss


def test_a_step_does_not_wait_for_the_device() -> None:
    teacher = make_teacher()
    assert drop_mask(teacher.model, LENGTH)  # as `load_teacher` does on a GPU
    loop = make_loop(teacher=teacher, micro_batch_sequences=2, **KD)
    loop.model.config.use_cache = False  # as the trainer does
    prepare_blocks(loop.module, loop.config, LENGTH, "x")  # type: ignore[arg-type]
    with NoWait():
        loop.step(0)
        loop.step(1)


def test_the_teachers_forward_pass_counts_in_the_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.loop.peak_flops_per_second", lambda device, dtype: 1e6)
    loop = make_loop(teacher=make_teacher(TWO_BLOCKS), **KD)
    block = 4 * 16 * 16 + 3 * 16 * 32
    forward = 2 * (2 * block + 16 * 40) + 2 * 2 * 16 * LENGTH
    flops = training_flops_per_token(loop.model, LENGTH) + forward
    measures = run(loop)
    assert [m.mfu for m in measures] == pytest.approx([m.tokens_per_second * flops / 1e6 for m in measures])


# --- a whole training ---


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with two teachers that have the tokenizer of its packed data."""
    folder = tmp_path_factory.mktemp("fresh")
    make_root(folder)
    for seed, name in enumerate(("teacher", "other")):
        write_teacher(folder / name, folder / "root" / "models" / "tokenizer_bpe", seed=seed)
    return folder


def write_teacher(folder: Path, tokenizer_folder: Path, **changes: Any) -> None:
    """A model folder with 20 rows of padding in its vocabulary."""
    make_model("llama", **{"vocab_size": 320} | changes).save_pretrained(folder)
    shutil.copy(tokenizer_folder / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


@pytest.fixture
def root(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MINIPLM_CACHE", str(tmp_path / "cache"))
    shutil.copytree(fresh, tmp_path, dirs_exist_ok=True)
    return tmp_path


def config_of(root: Path, *overrides: str, teacher: str = "teacher") -> ExperimentConfig:
    words = [f"models.teacher.path={root / teacher}", f"tokenizers.bpe.path={root / teacher}", *overrides]
    return load_config(write_config(root, root / "root"), words)


def trained(config: ExperimentConfig) -> TrainingRecord:
    record = train(config, student_target(config, "small")).record
    assert record is not None
    return record


def model_weights(config: ExperimentConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(storage.local_path(config.layout.model("small"))) / "model.safetensors")


RATIO = "students.small.train.kd_ratio"


@pytest.mark.slow
def test_a_training_with_a_teacher_is_recorded(root: Path) -> None:
    config = config_of(root, f"{RATIO}=0.5")
    record = trained(config)
    assert record.kd_ratio == 0.5
    assert record.kd_teacher is not None
    assert record.kd_teacher["path"] == str(root / "teacher")
    run = connect(config).MlflowClient().get_run(record.run_id)
    assert run.data.params["train.kd_ratio"] == "0.5"
    assert run.data.params["kd_teacher.weights_hash"] == record.kd_teacher["weights_hash"]
    last = {name: run.data.metrics[name] for name in ("train_loss", "train/lm_loss", "train/kd_loss")}
    assert last["train_loss"] == pytest.approx(0.5 * last["train/lm_loss"] + 0.5 * last["train/kd_loss"], abs=1e-5)
    assert record.final_loss == pytest.approx(last["train_loss"])
    # The same teacher under another path and name is the same training.
    shutil.move(root / "teacher", root / "moved")
    expert = ["tokenizers.bpe.path=/nowhere", f"models.expert.path={root / 'moved'}", "models.expert.context_tokens=32"]
    words = [f"{RATIO}=0.5", "students.small.train.kd_teacher=expert", "models.expert.window_overlap_tokens=8", *expert]
    renamed = load_config(root / "experiment.yaml", words)
    assert train(renamed, student_target(renamed, "small")).skipped


def test_another_teacher_or_ratio_is_another_training(root: Path) -> None:
    configs = [
        config_of(root),
        config_of(root, f"{RATIO}=0.5"),
        config_of(root, f"{RATIO}=0.25"),
        config_of(root, f"{RATIO}=0.5", teacher="other"),
        config_of(root, f"{RATIO}=0.5", "models.teacher.dtype=bfloat16"),
        config_of(root, f"{RATIO}=0.5", "models.teacher.bos_token=<|endoftext|>"),
    ]
    assert len({open_inputs(config, student_target(config, "small"), World()).fingerprint for config in configs}) == 6


def test_windows_shorter_than_the_inputs_keep_the_mask() -> None:
    windows = (None, 16, 15)
    assert [has_shorter_windows(MistralConfig(sliding_window=size), 16) for size in windows] == [False, False, True]
    assert not has_shorter_windows(LlamaConfig(), 16)


def test_a_gguf_is_a_teacher(root: Path) -> None:
    pytest.importorskip("gguf")
    model = make_model("llama")
    write_gguf(root / "teacher.gguf", model)
    config = config_of(root, f"{RATIO}=0.5", teacher="teacher.gguf")
    target, folder = student_target(config, "small"), gguf_folder(root / "teacher.gguf")
    tokenizer = TokenizerRecord(
        document_separator="<|endoftext|>",
        document_separator_id=0,
        tokenizer_hash=tokenizer_hash(folder),
        vocab_size=316,
        fingerprint="f",
    )
    description = describe_teacher(config, target, tokenizer)
    assert description is not None
    teacher = load_teacher(config, target, tokenizer, description, torch.device("cpu"))
    tokens = torch.arange(LENGTH)[None]
    logits = teacher.logits(teacher.hidden(tokens)[0])
    torch.testing.assert_close(logits, model(input_ids=tokens).logits[0, :, :316], atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_without_a_ratio_no_teacher_is_loaded_and_nothing_changes(root: Path) -> None:
    plain = load_config(write_config(root, root / "root"))  # its teacher is at /nowhere
    record = trained(plain)
    expected = model_weights(plain)
    assert (record.kd_ratio, record.kd_teacher) == (0.0, None)
    assert "kd_ratio" not in (root / "experiment.yaml").read_text()
    with pytest.raises(
        ConfigError, match=r"students\.small\.tokenizer: .*'bpe', which is trained on the corpus; set tok"
    ):
        load_config(root / "experiment.yaml", [f"{RATIO}=0.5"])
    zero = load_config(root / "experiment.yaml", [f"{RATIO}=0.0"])
    assert train(zero, student_target(zero, "small")).skipped
    target = student_target(zero, "small")
    again = train(zero, target, retrain=True).record
    assert again is not None
    assert again.final_loss == record.final_loss
    assert all(torch.equal(value, expected[name]) for name, value in model_weights(zero).items())


@pytest.mark.slow
def test_a_killed_training_with_a_teacher_resumes_to_the_same_weights(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(root, f"{RATIO}=0.5")
    whole = trained(config)
    expected = model_weights(config)
    checkpoints = Path(storage.local_path(config.layout.checkpoint("train/small")))
    newest = max(checkpoints.glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(newest)
    shutil.rmtree(Path(storage.local_path(config.layout.model("small"))))
    again = trained(config)
    assert again.final_loss == whole.final_loss
    assert all(torch.equal(value, expected[name]) for name, value in model_weights(config).items())


def test_the_plan_shows_the_teacher_and_the_steps_of_equal_compute(root: Path) -> None:
    config = config_of(root, f"{RATIO}=0.5", "students.small.train.steps=5")
    target = student_target(config, "small")
    expected = {
        "teacher": "teacher", "path": str(root / "teacher"), "kd_ratio": 0.5, "teacher_parameters": None,
        "steps_of_equal_compute": None,
    }  # fmt: skip
    facts = plan(config, target)
    assert facts["distillation"] == expected
    student = facts["n_parameters"]
    storage.write_json(config.layout.model_record("teacher"), {"n_parameters": 3 * student})
    # The section `train` has 6 steps, and a step with this teacher costs as much as 2 steps of the student alone.
    known = plan(config, target)["distillation"]
    assert (known["teacher_parameters"], known["steps_of_equal_compute"]) == (3 * student, 3)
    assert "distillation" not in plan(config_of(root), student_target(config_of(root), "small"))


# --- what is refused, before anything is written ---


def refused(root: Path, error: type[MiniplmError], message: str, *overrides: str, teacher: str = "teacher") -> None:
    config = config_of(root, f"{RATIO}=0.5", *overrides, teacher=teacher)
    with pytest.raises(error, match=message) as raised:
        train(config, student_target(config, "small"))
    assert "\n" not in str(raised.value)
    assert not (root / "root" / "_checkpoints" / "train" / "small").exists()
    assert not (root / "root" / "models" / "small").exists()


@pytest.mark.slow
def test_another_tokenizer_is_refused_and_another_spelling_is_not(root: Path) -> None:
    write_tokenizer(root / "larger", vocab_size=310)
    write_teacher(root / "stranger", root / "larger")
    message = r"^students\.small\.tokenizer: expected the tokenizer of models\.teacher.*tokenizers\.bpe\.path"
    refused(root, ConfigError, message, teacher="stranger")
    path = root / "teacher" / "tokenizer.json"
    settings = json.loads(path.read_text()) | {"truncation": None}
    path.write_text(json.dumps(settings, indent=7))
    assert trained(config_of(root, f"{RATIO}=0.5")).kd_ratio == 0.5


def test_a_teacher_with_fewer_entries_than_its_tokenizer_is_refused(root: Path) -> None:
    write_teacher(root / "cut", root / "root" / "models" / "tokenizer_bpe", vocab_size=290)
    refused(
        root, ConfigError, r"^models\.teacher: expected a teacher with at least the 300 entries.*290", teacher="cut"
    )


def test_a_context_shorter_than_the_sequences_is_refused(root: Path) -> None:
    write_teacher(root / "short", root / "root" / "models" / "tokenizer_bpe", max_position_embeddings=15)
    small = ("models.teacher.context_tokens=12", "models.teacher.window_overlap_tokens=4")
    refused(
        root, ConfigError, r"^pack\.sequence_length: .* at most 15 tokens.*models\.teacher", *small, teacher="short"
    )


def test_a_missing_teacher_is_refused(root: Path) -> None:
    refused(root, ModelLoadError, r"^models\.teacher: .*nothing-here: expected a model folder", teacher="nothing-here")
    with pytest.raises(
        ConfigError, match=r"^students\.small\.train\.kd_teacher: expected one of .*'techer'.*'teacher'\?"
    ):
        config_of(root, f"{RATIO}=0.5", "students.small.train.kd_teacher=techer")
    with pytest.raises(ConfigError, match=r"^students\.small\.train\.kd_teacher: expected one of \['teacher'\]"):
        config_of(root, f"{RATIO}=0.5", "students.small.train.kd_teacher=reference")
    with pytest.raises(ConfigError, match=r"^students\.small\.train\.kd_teacher: .*models\.teacher with device_map"):
        config_of(root, f"{RATIO}=0.5", "models.teacher.device_map=auto")
    assert config_of(root, "models.teacher.device_map=auto").models["teacher"].device_map == "auto"


@pytest.mark.parametrize("ratio", [-0.1, 1.5, float("nan")])
def test_a_ratio_outside_0_to_1_is_refused(ratio: float) -> None:
    with pytest.raises(
        ConfigError, match=r"^train\.kd_ratio: expected 0 \(no teacher\) to 1 \(the teacher alone\), found"
    ):
        TrainConfig(kd_ratio=ratio)


def test_a_reference_with_a_teacher_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"reference\.train\.kd_ratio: expected 0.*set reference\.train\.kd_ratio=0$"):
        config_of(root, "train.kd_ratio=0.5")


@pytest.mark.slow
def test_document_masks_need_a_teacher_that_follows_them(root: Path) -> None:
    masks = "students.small.train.document_masks=true"
    bos = "models.teacher.bos_token=<|endoftext|>"
    refused(
        root, ConfigError, r"^train\.document_masks: .* without a token .*models\.teacher\.bos_token=none$", masks, bos
    )
    assert trained(config_of(root, f"{RATIO}=0.5", masks)).kd_ratio == 0.5
    make_model("mamba", vocab_size=320).save_pretrained(root / "recurrent")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(root / "teacher" / name, root / "recurrent")
    config = config_of(root, f"{RATIO}=0.5", masks, teacher="recurrent")
    with pytest.raises(ConfigError, match=r"^train\.document_masks: .*models\.teacher"):
        train(config, student_target(config, "small"), retrain=True)
