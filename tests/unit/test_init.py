"""`miniplm init`: what it sees of inputs and teachers, and that the checks before a run take what it writes."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import zstandard

from jobs import cli
from miniplm_udf.config.experiment import ExperimentConfig, load_config
from miniplm_udf.starting.cleaning import conditions
from miniplm_udf.starting.plan import Corpus, Machine, make_plan
from miniplm_udf.starting.teacher import TeacherFacts, examine
from tests.support.right_experiment import Place
from tests.support.user_corpus import make_documents

PILE = TeacherFacts(
    path="t", family="qwen2", n_parameters=1_840_000_000, n_ids=151_936, longest=32_768, separator="<|endoftext|>",
    separator_reason="", prefix=None, prefix_reason="", dtype="bfloat16", tuned="", quantised="", bytes_per_token=4.0,
)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path)
    (place.texts / "a.jsonl").unlink()
    write_weights(place.teacher)
    return place


def write_weights(folder: Path) -> None:
    """A safetensors file with one tensor of 320 x 1000."""
    n_bytes = 4 * 320 * 1000
    header = json.dumps({"w": {"dtype": "F32", "shape": [320, 1000], "data_offsets": [0, n_bytes]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(n_bytes))


def init(place: Place, *options: str, inputs: str | None = None) -> int:
    where = ["--root", str(place.root), "--out", str(place.folder / "e.yaml")]
    return cli.main(["init", "--input", inputs or str(place.texts), "--teacher", str(place.teacher), *where, *options])


def written(place: Place) -> ExperimentConfig:
    """The config, which the checks before a run take as it is."""
    assert cli.main(["run", "-c", str(place.folder / "e.yaml"), "--dry-run"]) == 0
    return load_config(place.folder / "e.yaml")


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


DOCUMENTS = make_documents(120, seed=5)
NESTED = [{"nr": 1, "doc": {"key": d["id"], "body": d["text"]}, "meta": {"set": d["source"]}} for d in DOCUMENTS]
STRINGS = [{"content": d["text"], "meta": json.dumps({"pile_set_name": d["source"]})} for d in DOCUMENTS]


def write_input(folder: Path, kind: str) -> None:
    if kind == "odd jsonl":
        (folder / "a.jsonl").write_text(lines(NESTED))
        (folder / "README.txt").write_text("not a document")
    elif kind == "json string":
        (folder / "a.jsonl.zst").write_bytes(zstandard.compress(lines(STRINGS).encode()))
    elif kind == "json array":
        (folder / "a.json").write_text(json.dumps(DOCUMENTS))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(STRINGS), folder / "a.parquet")
    elif kind == "nested parquet":
        pq.write_table(pa.Table.from_pylist(NESTED), folder / "a.parquet")
    elif kind == "arrow":
        pa.feather.write_feather(pa.Table.from_pylist(DOCUMENTS), folder / "a.arrow")
    else:
        for number, document in enumerate(DOCUMENTS):
            (folder / f"{number}.txt").write_text(document["text"])


# Names of text, id and source.
DEFAULTS = ("text", "id", "source")
INPUTS = {
    "odd jsonl": ("doc.body", "doc.key", "meta.set"),
    "json string": ("content", "id", "meta.pile_set_name"),
    "json array": DEFAULTS,
    "parquet": ("content", "id", "meta.pile_set_name"),
    "nested parquet": ("doc.body", "doc.key", "meta.set"),
    "arrow": DEFAULTS,
    "txt": DEFAULTS,
}


@pytest.mark.parametrize("kind", INPUTS)
def test_the_checks_take_what_it_writes(place: Place, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_input(place.texts, kind)
    assert init(place) == 0
    assert "120 documents" in capsys.readouterr().out
    config = written(place)
    fields = config.ingest.fields
    assert (fields.text, fields.id, fields.source) == INPUTS[kind]
    assert config.models["teacher"].document_separator == "<|endoftext|>"
    assert {student.architecture["model_type"] for student in config.students.values()} == {"llama", "qwen2"}
    where = str(config.refine.corpora["difference"].where)
    assert all(name in where for name in ("duplicate_of", "near_duplicate_of", "duplicate_5gram_share"))
    assert where == config.refine.corpora["random"].where


@pytest.mark.parametrize(("n_words", "context"), [(10, 64), (600, 128)])
def test_whole_texts_fit_into_an_instance(place: Place, n_words: int, context: int) -> None:
    """The teacher reads 128 tokens, and a word of this text is about one token."""
    rows = [{"text": f"text {n} " + "some " * (n_words - 2)} for n in range(100)]
    (place.texts / "a.jsonl").write_text(lines(rows))
    assert init(place, "--whole-texts") == 0
    config = written(place)
    assert (config.ingest.chunking.mode, config.ingest.chunking.max_tokens) == ("document", context + 1)
    lengths = {model.context_tokens for model in config.models.values()} | {config.pack.sequence_length}
    assert lengths == {context}
    cut = "about 0 of the sample" if n_words == 10 else "about 100 % of the sample"
    assert cut in (place.folder / "e.yaml").read_text()


def test_without_students_no_text_is_held_out(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    write_input(place.texts, "txt")
    assert init(place, "--no-students") == 0
    assert not [line for line in capsys.readouterr().out.splitlines() if line.startswith("students")]
    config = written(place)
    assert (config.students, config.tokenizers, config.ingest.split.heldout) == ({}, {}, 0.0)
    assert config.ingest.split.reference > 0
    assert list(config.refine.corpora) == ["difference", "random"]
    assert cli.main(["run", "-c", str(place.folder / "e.yaml"), "--dry-run"]) == 0
    assert "train      not part of this experiment" in capsys.readouterr().out


@pytest.mark.parametrize("pattern", ["", "/**/*.txt"])
def test_folders_of_text_files_are_sources(place: Place, pattern: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_input(place.texts, "txt")
    for number, document in enumerate(DOCUMENTS[:20]):
        folder = place.texts / f"set {number % 4}" / "below"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.txt").write_text(f"{number}. {document['text']}")
    assert init(place, inputs=f"{place.texts}{pattern}") == 0
    assert "; 5 sources; " in capsys.readouterr().out


def test_texts_in_an_object_storage(place: Place) -> None:
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe("/init/a.jsonl", lines(NESTED).encode())
    filesystem.pipe("/init/_b.jsonl", b"hidden")
    try:
        assert init(place, inputs="memory://init/*.jsonl") == 0
        assert written(place).ingest.fields.text == "doc.body"
        assert init(place, "--force", inputs="memory://init/*.parquet") == 2
    finally:
        filesystem.store.clear()


def test_a_file_is_replaced_only_with_force(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    write_input(place.texts, "txt")
    (place.folder / "e.yaml").write_text("mine")
    assert init(place) == 2
    assert "--force" in capsys.readouterr().err
    assert (place.folder / "e.yaml").read_text() == "mine"
    assert init(place, "--force", "--json") == 0
    assert json.loads(capsys.readouterr().out)["plan"]["context"] == 128


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\nhello\n", "write_table"),
        ("a.jsonl", '{"text": "größer"}\n'.encode("utf-16"), "iconv -f UTF-16"),
        ("a.jsonl", '{"text": "größer und schöner"}\n'.encode("latin-1"), "iconv -f WINDOWS-1252"),
        ("a.jsonl", b'{"n": 1}\n', "a field with a text"),
    ],
)
def test_an_input_without_text_is_refused(
    place: Place, name: str, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (place.texts / name).write_bytes(content)
    assert init(place, inputs=str(place.texts / name)) == 2
    assert message in capsys.readouterr().err
    assert not (place.folder / "e.yaml").exists()


def test_a_chat_token_is_not_taken_as_separator(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    write_input(place.texts, "txt")
    place.write_model(place.teacher, eos="some", quantization_config={"quant_method": "awq"})
    write_weights(place.teacher)
    assert init(place) == 0
    out = capsys.readouterr().out
    assert written(place).models["teacher"].document_separator == "<|endoftext|>"
    for caution in (
        "chat-tuned",
        "quantised (quantization_config: awq)",
        "only 120 documents",
        "about 20 are a good number",
    ):
        assert caution in " ".join(out.split())
    assert init(place, "--force", "--separator", "no such token") == 2


@pytest.mark.parametrize(("file_type", "name"), [(3, "Q4_1"), (7, "Q8_0"), (1, ""), (9999, "9999")])
def test_the_type_of_a_quantised_gguf_file_has_its_name(tmp_path: Path, file_type: int, name: str) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_file_type(file_type)
    writer.add_token_list(["a", "<|endoftext|>"])
    writer.add_eos_token_id(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    quantised = examine(str(tmp_path / "a.gguf"), None, []).quantised
    assert quantised == (f"a GGUF file of type {name}" if name else "")


def test_mixed_languages_and_close_models_are_said(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    german = "Der schnelle braune Fuchs springt über den faulen Hund und freut sich sehr darüber, Nummer"
    english = "The quick brown fox jumps over the lazy dog and is very happy about it, number"
    rows = [{"text": f"{(german, english)[n % 2]} {n}."} for n in range(100)]
    (place.texts / "a.jsonl").write_text(lines(rows))
    assert init(place) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "the languages are mixed" in out
    assert "the difference of two models of one size" not in out
    where = written(place).refine.corpora["difference"].where
    assert "language" not in str(where)


def test_the_paper_gets_the_papers_numbers() -> None:
    plan = make_plan(Corpus(n_documents=10**8, n_bytes=440 * 10**9), PILE, Machine(n_gpus=8, n_cores=64))
    assert plan.context == 1024
    assert 1e8 <= plan.reference.shape.n_parameters <= PILE.n_parameters / 12  # type: ignore[operator]
    assert plan.split.reference == 0.05
    assert plan.reference.tokens_per_parameter >= 20
    assert plan.reference.epochs <= 1
    small = make_plan(Corpus(n_documents=300, n_bytes=500_000), PILE, Machine(n_gpus=0, n_cores=2))
    assert (small.context, small.split.heldout) == (256, 0.1)
    assert round(small.reference.epochs) == 4


@pytest.mark.parametrize("n_ids", [49_152, 151_936])
def test_little_text_gets_the_width_that_the_time_of_the_machine_allows(n_ids: int) -> None:
    """A narrower model would need fewer tokens, and is worse on them."""
    teacher = dataclasses.replace(PILE, n_ids=n_ids)
    plan = make_plan(Corpus(n_documents=300, n_bytes=700_000), teacher, Machine(n_gpus=0, n_cores=2))
    assert (plan.reference.shape.hidden, plan.student.shape.hidden) == (64, 64)
    assert plan.reference.learning_rate == 3e-3
    assert plan.reference.flops <= plan.machine.budget
    close = dataclasses.replace(teacher, n_parameters=12 * 1_600_000)
    assert make_plan(Corpus(300, 700_000), close, Machine(0, 2)).reference.shape.n_parameters <= 5_000_000


def test_each_split_of_a_few_texts_has_a_text() -> None:
    texts = tuple(document["text"] for document in make_documents(8, seed=1))
    plan = make_plan(Corpus(8, 4000, texts), PILE, Machine(0, 2))
    from miniplm_udf.ingestion.documents import split_of

    assert {split_of(text, plan.split) for text in texts} == {"pool", "reference", "heldout"}


def test_a_condition_that_most_text_fails_is_left_out() -> None:
    from collections import Counter

    digits = [" ".join(str(n * m) for n in range(200)) for m in range(1, 10)]
    used = {line.sql: line.is_used for line in conditions(digits, Counter(), ["near_duplicates"])}
    assert used["alphabetic_word_share >= 0.8"] is False
    assert used["near_duplicate_of is null"] is True
    assert used["coalesce(duplicate_5gram_share, 0) <= 0.15"] is True


BASE_INSTALL = """
import sys
for name in ("pyspark", "delta", "deltalake", "torch", "transformers", "tokenizers", "huggingface_hub", "pyarrow",
             "numpy", "pandas", "zstandard", "gguf", "py3langid", "datasketch", "mlflow", "psutil", "filelock",
             "safetensors"):
    sys.modules[name] = None
from jobs import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def test_the_base_install_is_enough(place: Place) -> None:
    write_input(place.texts, "odd jsonl")
    words = [
        "init",
        "--input",
        str(place.texts),
        "--teacher",
        str(place.teacher),
        "--out",
        str(place.folder / "e.yaml"),
    ]
    done = subprocess.run([sys.executable, "-c", BASE_INSTALL, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert written(place).ingest.fields.text == "doc.body"
