"""Finds, checks and loads the teacher of Vanilla KD: a scored model of the config.

`describe_teacher` checks, from the files alone, that the teacher knows the tokenizer of the packed data. `load_teacher`
loads it as scoring does (a folder, a hub name or a GGUF; eval mode; its own dtype). Both run on every rank before
anything is written; a retry finds downloaded and converted files in the node's cache.
"""

import json
from typing import Any

import torch

from miniplm_udf import storage
from miniplm_udf.config.experiment import ExperimentConfig
from miniplm_udf.config.targets import Target
from miniplm_udf.errors import ConfigError, ModelLoadError
from miniplm_udf.scoring.attention import plain_attention
from miniplm_udf.scoring.description import ModelDescription
from miniplm_udf.scoring.model_files import model_folder
from miniplm_udf.scoring.models import describe, load_model
from miniplm_udf.scoring.tokenizer import load_tokenizer
from miniplm_udf.storage import Json
from miniplm_udf.store.model_records import TokenizerRecord
from trainer.losses.kd_teacher import Teacher
from trainer.models.blocks import drop_mask
from trainer.models.document_masks import check_follows_positions

# Parts of a tokenizer.json that do not change the ids of a text here (`scoring.tokenizer.load_tokenizer`).
_NOT_COMPARED = ("version", "decoder", "truncation", "padding", "post_processor")


def describe_teacher(config: ExperimentConfig, target: Target, tokenizer: TokenizerRecord) -> ModelDescription | None:
    """Describes the teacher of a target without loading its weights, and checks its tokenizer and its vocabulary.

    Args:
        config: the experiment.
        target: the model to train.
        tokenizer: the tokenizer of the packed data.

    Returns:
        The description; None for a target without a teacher.

    Raises:
        ConfigError: the teacher has another tokenizer or a smaller vocabulary, or a setting of the model is wrong.
        ModelLoadError: the teacher cannot be found or read.
    """
    if target.train.kd_ratio == 0:
        return None
    alias = target.train.kd_teacher
    try:
        description = describe(alias, config.models[alias])
    except ModelLoadError as error:
        raise ModelLoadError(f"models.{alias}: {error}") from error
    if not _is_same_tokenizer(config, target, tokenizer, description):
        raise ConfigError(
            f"students.{target.name}.tokenizer: expected the tokenizer of models.{alias}, the teacher, which predicts "
            f"its own token ids, found {target.tokenizer!r}, another tokenizer; set tokenizers.{target.tokenizer}.path "
            f"to the teacher's ({config.models[alias].path}) and pack again, or set kd_ratio: 0 for this student"
        )
    if description.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"models.{alias}: expected a teacher with at least the {tokenizer.vocab_size} entries of its tokenizer, "
            f"found {description.vocab_size}; choose another teacher, or set kd_ratio: 0 for students.{target.name}"
        )
    return description


def teacher_identity(config: ExperimentConfig, target: Target, teacher: ModelDescription | None) -> list[str]:
    """Returns the part of a training's fingerprint that identifies the teacher; empty without a teacher.

    Args:
        config: the experiment.
        target: the model to train.
        teacher: the result of `describe_teacher`.
    """
    # The config's dtype, not the settled one: like `train.dtype: auto`, it may differ between machines.
    if teacher is None:
        return []
    bos = [] if teacher.bos_token_id is None else [f"bos {teacher.bos_token_id}"]
    return [teacher.weights_hash, config.models[target.train.kd_teacher].dtype, *bos]


def teacher_record(teacher: ModelDescription | None) -> Json | None:
    """Returns the facts about the teacher for `training.json` and MLflow; None without a teacher.

    Args:
        teacher: the result of `describe_teacher`.
    """
    if teacher is None:
        return None
    names = ("model_id", "path", "weights_hash", "model_revision", "dtype", "bos_token", "n_parameters")
    return {name: getattr(teacher, name) for name in names}


def load_teacher(
    config: ExperimentConfig,
    target: Target,
    tokenizer: TokenizerRecord,
    description: ModelDescription,
    device: torch.device,
) -> Teacher:
    """Returns the teacher, loaded onto this rank's device.

    Args:
        config: the experiment.
        target: the model to train.
        tokenizer: the tokenizer of the packed data.
        description: the result of `describe_teacher`.
        device: where the student trains.

    Raises:
        ConfigError: the training's sequences are too long for the teacher, or it cannot train with document masks.
        ModelLoadError: the weights cannot be loaded, or the architecture cannot be scored.
    """
    alias, has_masks = target.train.kd_teacher, target.train.document_masks
    if has_masks and description.bos_token_id is not None:
        raise ConfigError(
            f"train.document_masks: expected a teacher without a token in front of its inputs, found "
            f"{description.bos_token} in front of those of models.{alias}; set train.document_masks=false, or "
            f"models.{alias}.bos_token=none"
        )
    model = load_model(config.models[alias], description, str(device))
    n_inputs = target.sequence_length + (0 if description.bos_token_id is None else 1)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and n_inputs > longest:
        raise ConfigError(
            f"pack.sequence_length: expected inputs of at most {longest} tokens, the max_position_embeddings of the "
            f"teacher models.{alias}, found {n_inputs}; lower it, or choose another teacher"
        )
    if has_masks:
        plain_attention(model)
        check_follows_positions(model, description.vocab_size, f"models.{alias}")
    elif device.type == "cuda":
        # With the attention of scoring, transformers searches the positions for documents, and the CPU waits for that.
        plain_attention(model)
        if not has_shorter_windows(model.config.get_text_config(), n_inputs):
            drop_mask(model, n_inputs)
    return Teacher(model, tokenizer.vocab_size, description.bos_token_id)


def has_shorter_windows(text_config: Any, n_inputs: int) -> bool:
    """Whether some layers see fewer tokens than the inputs have, so that attention without a mask would differ.

    The comparison that `drop_mask` makes is too coarse in bfloat16 to show it for certain.

    Args:
        text_config: the model's config in transformers.
        n_inputs: tokens of an input.
    """
    sizes = (getattr(text_config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return any(size is not None and size < n_inputs for size in sizes)


def _is_same_tokenizer(
    config: ExperimentConfig, target: Target, tokenizer: TokenizerRecord, description: ModelDescription
) -> bool:
    """Whether both tokenizers give the same ids to every text; their files may be written in different ways."""
    if description.tokenizer_hash == tokenizer.tokenizer_hash:
        return True
    folders = (
        storage.local_folder(config.layout.tokenizer(target.tokenizer)),
        model_folder(config.models[description.model_id]),
    )
    mine, theirs = (json.loads(load_tokenizer(folder).to_str()) for folder in folders)
    return all(mine.get(key) == theirs.get(key) for key in mine.keys() - set(_NOT_COMPARED))
