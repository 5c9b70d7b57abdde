"""No run scores the text that one of its models was trained on: refused for the same input, else a warning."""

import dataclasses
from pathlib import Path

import pytest

from jobs import cli
from miniplm_udf import storage
from miniplm_udf.config.experiment import load_config
from miniplm_udf.layout import TRAINING_FILE
from miniplm_udf.store.model_records import TrainedText, read_training
from tests.support.model_records import training_record
from tests.support.right_experiment import Place

SHARE = 0.3


def place_with(tmp_path: Path, corpus: str, share_here: float, text: TrainedText | None) -> Place:
    """An experiment whose reference is a model that an earlier experiment trained."""
    place = Place(tmp_path)
    reference = place.folder / "earlier" / "reference"
    reference.parent.mkdir()
    place.write_model(reference)
    record = training_record(name="reference", lineage={"corpus": corpus}, text=text)
    storage.write_json(str(reference / TRAINING_FILE), dataclasses.asdict(record))
    place.config.pop("reference")
    place.set("models.reference.path", str(reference))
    place.set("models.reference.document_separator", "<|endoftext|>")
    place.set("ingest.split.reference", share_here)
    return place


def text_of(place_folder: Path, pattern: str = "texts/*.jsonl") -> TrainedText:
    return TrainedText(inputs=[f"file://{place_folder}/{pattern}"], reference_share=SHARE)


def outcome(
    place: Place, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> tuple[int, str, list[str]]:
    """The exit code of a dry run, its error, and its warnings about the reference."""
    code = cli.main(["run", "-c", str(place.file()), "--dry-run"])
    error = capsys.readouterr().err.partition("ConfigError: ")[2].strip()
    return code, error, [message for message in caplog.messages if "was trained on" in message]


def test_the_same_input_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    place = place_with(tmp_path, "reference", 0.1, text_of(tmp_path))
    code, error, warnings = outcome(place, capsys, caplog)
    assert (code, warnings) == (2, [])
    assert error.startswith(
        f"models.reference.path: {tmp_path}/earlier/reference was trained on the split reference of"
    )
    assert "this experiment has the same input" in error
    assert "set ingest.split.reference=0.3, which leaves these texts out" in error


def test_a_split_that_leaves_out_the_seen_texts_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    place = place_with(tmp_path, "reference", SHARE, text_of(tmp_path))
    assert outcome(place, capsys, caplog) == (0, "", [])


@pytest.mark.parametrize("text", [text_of(Path("/elsewhere")), None], ids=["another input", "an earlier release"])
def test_an_input_that_may_have_the_same_texts_is_a_warning(
    text: TrainedText | None, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    code, error, warnings = outcome(place_with(tmp_path, "reference", 0.1, text), capsys, caplog)
    assert (code, error, len(warnings)) == (0, "", 1)
    share = "0.3" if text is not None else "the share of that experiment"
    assert "If this input has the same texts, the losses of reference" in warnings[0]
    assert f"set ingest.split.reference={share}" in warnings[0]


def test_a_student_of_the_same_input_is_refused_whatever_the_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    place = place_with(tmp_path, "difference", 0.9, text_of(tmp_path))
    code, error, _ = outcome(place, capsys, caplog)
    assert code == 2
    assert "was trained on the corpus difference of" in error
    assert error.endswith("name a model that was trained on other text")


def test_the_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    place = place_with(tmp_path, "reference", SHARE, text_of(tmp_path))
    config = load_config(place.file(), [])
    record = training_record(name="small", text=text_of(tmp_path))
    storage.write_json(config.layout.model("small", TRAINING_FILE), dataclasses.asdict(record))
    assert read_training(config, "small") == record
