"""The paper's models: numbers of weights, recipes, what wins over a recipe, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from miniplm_udf.config.experiment import ExperimentConfig, load_config
from miniplm_udf.config.student_models import load_student_models
from miniplm_udf.errors import ConfigError
from trainer.models.flops import equal_compute_steps
from trainer.models.model import build_model, model_config, n_parameters

CONF = Path(__file__).resolve().parents[2] / "conf"
DEMO = CONF / "demo.yaml"
# The published numbers (arXiv 2410.17215 and its checkpoints).
PARAMETERS = {
    "qwen_104m": 103_502_336,
    "qwen_200m": 203_437_824,
    "qwen_500m": 463_987_712,
    "qwen_1_2b": 1_160_566_272,
    "llama_212m": 211_766_016,
    "mamba_130m": 140_458_752,
}
# Qwen1.5-1.8B.
TEACHER = {
    "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 5504,
    "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": False,
}  # fmt: skip
KD_STEPS = {"qwen_200m": 24_940, "qwen_500m": 43_111, "qwen_1_2b": 65_464}
RATES = {"qwen_200m": 6e-4, "qwen_500m": 3e-4, "qwen_1_2b": 2.5e-4, "llama_212m": 6e-4, "mamba_130m": 2e-3}


def config_of(name: str, vocab_size: int = 1000, **changes: Any) -> Any:
    architecture = load_student_models()[name].architecture | changes
    return model_config(architecture, where="here", vocab_size=vocab_size, separator_id=3, max_positions=1024)


def count(name: str, **changes: Any) -> int:
    with torch.device("meta"):
        return n_parameters(build_model(config_of(name, **changes), where="here", seed=0))


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_model_has_the_published_number_of_weights(name: str) -> None:
    assert count(name) == load_student_models()[name].parameters == PARAMETERS[name]


def test_the_largest_model_with_tied_embeddings() -> None:
    assert count("qwen_1_2b", tie_word_embeddings=True) == 927_192_576


def test_the_files_stand_where_users_look() -> None:
    assert set(load_student_models()) == set(PARAMETERS) == {path.stem for path in (CONF / "students").glob("*.yaml")}
    assert all("2410.17215" in model.source for model in load_student_models().values())


def test_qwen_models_have_the_published_rope_and_vocabulary() -> None:
    for name in PARAMETERS:
        if name.startswith("qwen"):
            config = config_of(name)
            assert (config.rope_parameters["rope_theta"], config.vocab_size) == (1e6, 151_936)
            assert config.max_position_embeddings == 32_768
    llama = config_of("llama_212m")
    assert (llama.rope_parameters["rope_theta"], llama.rope_parameters["rope_type"]) == (5e5, "llama3")
    assert config_of("mamba_130m").vocab_size == 65_024


def test_a_vocabulary_below_the_tokenizers_is_refused_with_the_remedy() -> None:
    with pytest.raises(
        ConfigError, match=r"^here\.vocab_size: expected at least 65025, .* found 65024; raise it, remove the key"
    ):
        config_of("mamba_130m", vocab_size=65_025)


@pytest.mark.parametrize("file", ["pile_qwen.yaml", "pile_families.yaml"])
def test_recipes_are_the_papers(file: str) -> None:
    config = load_config(CONF / file)
    assert config.reference is not None
    assert config.reference.model == "qwen_104m"
    assert config.pack.sequence_length == 1024
    for student in config.students.values():
        assert student.model is not None
        train = student.train
        assert student.architecture == load_student_models()[student.model].architecture
        assert train.learning_rate == RATES[student.model]
        assert (train.batch_sequences, train.loss) == (512, "official")
        if train.kd_ratio == 0:
            assert train.steps == 100_000
        assert (train.adam_beta1, train.adam_eps, train.gradient_clip_norm) == (0.9, 1e-6, 1.0)
        rest = (train.warmup_steps, train.weight_decay, train.adam_beta2, train.min_learning_rate_ratio)
        assert rest == ((10_000, 0.1, 0.95, 0.005) if student.model == "mamba_130m" else (2000, 0.01, 0.98, 0.1))
        assert train.min_learning_rate_ratio * train.learning_rate == pytest.approx(
            1e-5 if student.model == "mamba_130m" else RATES[student.model] / 10
        )


def test_students_with_a_teacher_train_for_equal_compute() -> None:
    students = load_config(CONF / "pile_qwen.yaml").students
    shape = model_config(TEACHER, where="here", vocab_size=1000, separator_id=3, max_positions=1024)
    with torch.device("meta"):
        teacher_parameters = n_parameters(build_model(shape, where="here", seed=0))
    assert teacher_parameters == 1_836_828_672
    distilled = {name: student for name, student in students.items() if student.train.kd_ratio}
    sizes, baselines = ("200m", "500m", "1_2b"), {"miniplm_kd": "difference", "vanilla_kd": "random"}
    assert distilled.keys() == {f"qwen_{size}_{baseline}" for size in sizes for baseline in baselines}
    for name, student in distilled.items():
        assert student.model == "_".join(name.split("_")[:-2])
        assert student.corpus == baselines["_".join(name.split("_")[-2:])]
        assert (student.train.kd_ratio, student.train.kd_teacher) == (0.5, "teacher")
        steps = equal_compute_steps(100_000, PARAMETERS[student.model], teacher_parameters)
        assert student.train.steps == steps == KD_STEPS[student.model]


def test_the_families_use_the_scores_of_the_qwen_experiment() -> None:
    qwen, families = (load_config(CONF / name) for name in ("pile_qwen.yaml", "pile_families.yaml"))
    for section in ("root", "models", "ingest", "reference", "score", "pack"):
        mine, theirs = getattr(families, section), getattr(qwen, section)
        if section == "reference":  # its micro-batches come from `train`, and change no weight
            assert mine.architecture == theirs.architecture
            continue
        assert mine == theirs
    assert families.refine.corpora.items() <= qwen.refine.corpora.items()


def demo_with(tmp_path: Path, student: dict[str, Any], train: dict[str, Any]) -> ExperimentConfig:
    raw = yaml.safe_load(DEMO.read_text())
    raw |= {"train": train, "students": {"one": {"corpus": "random", "tokenizer": "bpe8k", **student}}}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(raw))
    return load_config(tmp_path / "one.yaml")


def test_what_the_user_writes_wins_over_the_model(tmp_path: Path) -> None:
    given = {"model": "mamba_130m", "train": {"adam_beta2": 0.9}, "architecture": {"num_hidden_layers": 2}}
    student = demo_with(tmp_path, given, {"steps": 80, "warmup_steps": 8}).students["one"]
    train = student.train
    assert (train.adam_beta2, train.warmup_steps, train.weight_decay, train.adam_beta1) == (0.9, 8, 0.1, 0.9)
    assert (student.architecture["num_hidden_layers"], student.architecture["hidden_size"]) == (2, 768)
    assert load_student_models()["mamba_130m"].architecture["num_hidden_layers"] == 24


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"model": "qwen_20m"}, r"^students\.one\.model: expected one of llama_212m, .*did you mean 'qwen_200m'"),
        ({"model": 7}, r"^students\.one\.model: expected one of"),
        ({}, r"^students\.one: expected a model \(llama_212m, .*\) or an architecture, found neither"),
    ],
)
def test_an_unknown_model_and_none_are_refused(tmp_path: Path, student: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        demo_with(tmp_path, student, {})
