"""Checks of trainings before a command starts: architectures, lengths, tokenizers, passes over the text. No Spark.

Input: a config. Output: problems, each a sentence with its key and its remedy. Reads tokenizer.json of the tokenizers
that have a path, and sizes of input files. A reference that is trained already is not checked. Driver only; writes
nothing.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.keys import same_for
from miniplm_udf.config.sections import TokenizerConfig
from miniplm_udf.config.targets import Target, reference_target, student_target
from miniplm_udf.config.training import ReferenceConfig, TrainConfig
from miniplm_udf.errors import ConfigError, DamagedRecordError, MiniplmError
from miniplm_udf.storage import Json
from miniplm_udf.store.model_records import read_training
from miniplm_udf.upkeep.architectures import architecture_problems, find_class
from miniplm_udf.upkeep.input_checks import text_bytes
from miniplm_udf.upkeep.model_checks import is_local_session, tokenizer_of

_BYTES_PER_TOKEN = 3
# A model that sees its text more often than this has learned it by heart: the number of steps is a mistake.
_MOST_PASSES = 100
_GOOD_PASSES, _GOOD_STEPS = 4, 200


def student_problems(config: ExperimentConfig) -> Iterator[str]:
    """Yields what is wrong with the students' architectures, and with their steps.

    Args:
        config: the experiment.
    """
    yield from _passes_of_students(config)
    yield from _checkpoint_problems(config, [student_target(config, name) for name in config.students])
    for name, student in config.students.items():
        if student.model is not None and not student.architecture:
            continue  # the name of its model is wrong, which the config reports
        place = f"students.{name}.architecture"
        yield from architecture_problems(place, student.architecture)
        yield from _length_problems(place, student.architecture, config.pack.sequence_length, "pack.sequence_length")
        tokenizer = config.tokenizers.get(student.tokenizer)
        if tokenizer is not None:
            n_ids, key = _student_vocabulary(student.tokenizer, tokenizer)
            yield from _vocabulary_problems(place, student.architecture, n_ids, key)


def reference_problems(config: ExperimentConfig) -> Iterator[str]:
    """Yields what is wrong with the reference that is to be trained.

    Args:
        config: the experiment.
    """
    reference = config.reference
    if reference is None:
        return
    if config.root and storage.exists(config.layout.model(reference.alias, "config.json")):
        return
    place, model = "reference.architecture", config.models.get(reference.alias)
    yield from architecture_problems(place, reference.architecture)
    context = model.context_tokens if model else 0
    key = (
        f"models.{reference.alias}.context_tokens" if context > config.pack.sequence_length else "pack.sequence_length"
    )
    longest = max(context, config.pack.sequence_length)
    yield from _length_problems(place, reference.architecture, longest, key)
    origin = config.models.get(reference.tokenizer)
    if origin is not None and origin.path is not None:
        n_ids = _size_of(origin.path, origin.revision)
        yield from _vocabulary_problems(place, reference.architecture, n_ids, f"models.{reference.tokenizer}")
    yield from _text_problems(config, reference)
    if model is not None:
        yield from _checkpoint_problems(config, [reference_target(config)])


def _checkpoint_problems(config: ExperimentConfig, targets: Iterable[Target]) -> Iterator[str]:
    """Unfinished trainings whose values have changed, so that the trainer neither resumes them nor begins again."""
    for target in targets:
        finished = read_training(config, target.name)
        if not config.root or (finished is not None and target.frozen):
            continue
        folder = config.layout.training(target.name)
        names = [name for name in storage.list_folder(folder) if name.startswith("step-")]
        states = [_state(storage.join(folder, name, "state.json")) for name in names]
        # A checkpoint of the finished model is replaced; one of an earlier release has no settings.
        others = [
            state["settings"]
            for state in states
            if state.get("settings") and (finished is None or state.get("fingerprint") != finished.fingerprint)
        ]
        differences = [_differences(recorded, target.settings()) for recorded in others]
        if differences and all(differences):
            yield (
                f"{target.where.removesuffix('.architecture')}: expected the values of its unfinished training in "
                f"{storage.shown(folder)}, found {differences[-1]}; go back to these values to resume it, or delete "
                "the folder to give it up"
            )


def _state(uri: str) -> Mapping[str, Any]:
    """The numbers of a checkpoint; empty if the file is damaged, since the trainer then takes another checkpoint."""
    try:
        return storage.read_json(uri) or {}
    except DamagedRecordError:
        return {}


def _differences(recorded: Mapping[str, str], settings: Mapping[str, str]) -> str:
    """The values of the config that differ from those of a checkpoint; a new key of this release is no difference."""
    names = [name for name in settings if name in recorded and recorded[name] != settings[name]]
    names += [name for name in recorded if name.startswith("architecture.") and name not in settings]
    return ", ".join(f"{name} {settings.get(name, 'no value')} (there {recorded[name]})" for name in names)


def tokenizer_problems(config: ExperimentConfig) -> Iterator[str]:
    """Yields what is wrong with the students' tokenizers that have a path.

    Args:
        config: the experiment.
    """
    for name in sorted({student.tokenizer for student in config.students.values()} & config.tokenizers.keys()):
        wanted = config.tokenizers[name]
        if wanted.path is None:
            continue
        try:
            tokenizer = tokenizer_of(wanted.path, wanted.revision)
            if tokenizer is not None:
                from miniplm_udf.scoring.separators import token_id

                token_id(f"tokenizers.{name}.document_separator", wanted.document_separator, tokenizer)
        except ConfigError as error:
            yield str(error)
        except MiniplmError as error:
            if is_local_session(config):
                yield f"tokenizers.{name}.path: {error}"


def _length_problems(place: str, architecture: Json, longest: int, key: str) -> Iterator[str]:
    config_class = find_class(str(architecture.get("model_type")))
    names = {"max_position_embeddings"}
    if config_class is not None:
        names.add(config_class.other_names.get("max_position_embeddings", "max_position_embeddings"))
    for name in sorted(names & architecture.keys()):
        if isinstance(architecture[name], int) and architecture[name] < longest:
            yield (
                f"{place}.{name}: expected at least {longest}, the longest input ({key}), found {architecture[name]}; "
                f"raise it, remove the key to take that length, or lower {key}"
            )


def _vocabulary_problems(place: str, architecture: Json, n_ids: int | None, key: str) -> Iterator[str]:
    own = architecture.get("vocab_size")
    if n_ids is not None and isinstance(own, int) and own < n_ids:
        yield (
            f"{place}.vocab_size: expected at least {n_ids}, the size of the tokenizer of {key}, found {own}; raise "
            "it, or remove the key to take the tokenizer's size"
        )


def _student_vocabulary(name: str, tokenizer: TokenizerConfig) -> tuple[int | None, str]:
    """The size of a student's tokenizer, as far as it is known; and its key."""
    # A trained BPE may get fewer entries, if there is too little text.
    n_ids = None if tokenizer.path is None else _size_of(tokenizer.path, tokenizer.revision)
    return n_ids, f"tokenizers.{name}"


def _size_of(path: str, revision: str | None) -> int | None:
    try:
        tokenizer = tokenizer_of(path, revision)
    except MiniplmError:
        return None  # another check reports it
    return None if tokenizer is None else max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _text_problems(config: ExperimentConfig, reference: ReferenceConfig) -> Iterator[str]:
    """A reference needs text, and not thousands of passes over it."""
    share, train = config.ingest.split.reference, reference.train
    if share == 0:
        yield (
            "ingest.split.reference: expected a share above 0, on which the reference is trained, found 0; set "
            "ingest.split.reference=0.05, or name a trained reference in models and remove the section reference"
        )
        return
    if n_bytes := text_bytes(config):
        yield from _pass_problems(config, "reference.train", train, share * n_bytes, f"{share:.0%} of the input")


def _passes_of_students(config: ExperimentConfig) -> Iterator[str]:
    """Students that go over their text again and again, even if their corpus has all the text that it can have."""
    n_bytes, split = text_bytes(config), config.ingest.split
    # The input of a root that has ingested may have been moved away since.
    if not n_bytes or (config.root and storage.exists(config.layout.stage("ingest"))):
        return
    keys: dict[tuple[TrainConfig, float], list[str]] = {}
    for name, student in config.students.items():
        if (corpus := config.refine.corpora.get(student.corpus)) is not None:
            # The section is None if it is wrong, which the config reports.
            share = (1 - split.reference - split.heldout) * (getattr(corpus.select, "ratio", None) or 1.0)
            keys.setdefault((student.train, share), []).append(f"students.{name}.train")
    for (train, share), alike in keys.items():
        where = f"at most {share:.0%} of the input"
        for problem in _pass_problems(config, alike[0], train, share * n_bytes, where):
            yield problem + same_for(alike[1:])


def _pass_problems(config: ExperimentConfig, key: str, train: TrainConfig, n_bytes: float, where: str) -> Iterator[str]:
    """A training whose steps go over its text again and again.

    Args:
        config: the experiment.
        key: the key of the training.
        train: its settings.
        n_bytes: bytes of its text, at most.
        where: which text that is, in words.
    """
    available = max(1.0, n_bytes / _BYTES_PER_TOKEN)
    per_step = train.batch_sequences * config.pack.sequence_length
    passes = train.steps * per_step / available
    if passes > _MOST_PASSES:
        batch, steps = _good_batches(_GOOD_PASSES * available / config.pack.sequence_length, train.batch_sequences)
        yield (
            f"{key}.steps: expected at most {_MOST_PASSES} passes over the text, found "
            f"{passes:,.0f}: {train.steps:,} steps of {per_step:,} tokens, and about {available:,.0f} tokens in "
            f"{where}; set {key}.steps={steps} and {key}.batch_sequences={batch} for about {_GOOD_PASSES} passes, or "
            "add text"
        )


def _good_batches(n_sequences: float, batch: int) -> tuple[int, int]:
    """Sequences of a step, at most `batch`, and steps, that go through so many sequences in some hundred steps."""
    batch = max(1, min(batch, round(n_sequences / _GOOD_STEPS)))
    return batch, max(1, round(n_sequences / batch))
