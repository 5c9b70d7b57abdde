"""Prepares the blocks of a decoder for training: attention without a mask, activation checkpointing, compilation.

Input: a causal LM with its loss on its device, before DDP or FSDP wraps it. Output: the same module, changed in place;
its weights and the names of its weights stay. Each change is tested on the model itself; a model that does not allow it
keeps what transformers does. Without a mask, attention can use the flash kernels, and transformers does not make the
CPU wait for the GPU in each forward pass. Every block is compiled alone: all blocks share the compiled code, so the
time of compilation does not grow with the number of layers.
"""

import logging
from typing import Any

import torch

from miniplm_udf.config.training import TrainConfig
from miniplm_udf.errors import ConfigError
from trainer.losses.lm_loss import CausalLMWithLoss
from trainer.models.precision import autocast

LOGGER = logging.getLogger("miniplm.trainer.blocks")

# transformers makes no mask for an attention that has no mask function of the same name.
_MASKLESS = "miniplm_causal"
# Largest difference of the hidden states, relative to the largest hidden state, in float32 and in bfloat16.
_TOLERANCE, _TOLERANCE_HALF = 1e-3, 0.05


def decoder_blocks(model: Any) -> list[torch.nn.Module]:
    """Returns the layers of a decoder in their order; empty if they cannot be found.

    Args:
        model: a causal LM of transformers.
    """
    n_layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return next((list(modules) for modules in lists if len(modules) == n_layers), [])


def prepare_blocks(module: CausalLMWithLoss, config: TrainConfig, sequence_length: int, where: str) -> None:
    """Changes a model's attention, checkpointing and compilation as the config says.

    Args:
        module: the model on its device, not wrapped by DDP or FSDP yet; changed in place.
        config: `document_masks`, `activation_checkpointing`, `compile`, and the shape of a micro-batch.
        sequence_length: T, tokens of an input.
        where: config key of the architecture, for messages.

    Raises:
        ConfigError: the model has no activation checkpointing, or `compile: true` and it cannot be compiled.
    """
    if not config.document_masks:
        drop_mask(module.model, sequence_length)
    if config.activation_checkpointing:
        _checkpoint(module.model, where)
    device = next(module.parameters()).device
    if config.compile is True or (config.compile == "auto" and device.type == "cuda"):
        _compile(module, config, sequence_length, where)


@torch.no_grad()
def drop_mask(model: Any, sequence_length: int) -> bool:
    """Makes attention run without a mask, if the hidden states of a whole sequence stay the same.

    They change if an attention window is shorter than the sequence, for example.

    Args:
        model: a causal LM of transformers whose input is never padded on the left; changed in place.
        sequence_length: T, tokens of an input.

    Returns:
        Whether attention runs without a mask now.
    """
    if getattr(getattr(model, "config", None), "_attn_implementation", None) != "sdpa":
        return False
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(_MASKLESS, sdpa_attention_forward)
    was_training, weight = model.training, model.get_input_embeddings().weight
    tokens_BT = torch.arange(sequence_length, device=weight.device)[None] * 7919 % len(weight)
    model.eval()
    expected = model.base_model(input_ids=tokens_BT)[0]
    model.set_attn_implementation(_MASKLESS)
    try:
        difference = (model.base_model(input_ids=tokens_BT)[0] - expected).abs().max() / expected.abs().max()
        is_same = bool(difference < (_TOLERANCE if weight.dtype == torch.float32 else _TOLERANCE_HALF))
    except (TypeError, AttributeError):  # its layers compute with the mask
        is_same = False
    if not is_same:
        LOGGER.info("%s keeps the attention mask of transformers: it is not plain causal", type(model).__name__)
        model.set_attn_implementation("sdpa")
    model.train(was_training)
    return is_same


def _checkpoint(model: Any, where: str) -> None:
    # transformers 5 renamed the method.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(
            f"train.activation_checkpointing: expected a model whose layers can be computed again, found {where} "
            f"({error}); set train.activation_checkpointing=false for it"
        ) from error


def _compile(module: CausalLMWithLoss, config: TrainConfig, sequence_length: int, where: str) -> None:
    """Compiles blocks, also the teacher's, and the chunk's loss; runs a micro-batch, so that a failure shows here."""
    # The models of one command share the code of their layers, of which torch compiles eight variants at most.
    torch.compiler.reset()
    blocks = decoder_blocks(module.model) + (decoder_blocks(module.teacher.model) if module.teacher else [])
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False)
    eager = module.chunk_loss
    module.chunk_loss = torch.compile(eager, dynamic=False)
    try:
        _run_micro_batch(module, config, sequence_length)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        first_line = str(error).strip().split("\n")[0]
        if config.compile is True:
            raise ConfigError(
                f"train.compile: expected a model whose layers torch can compile, found {where} ({first_line}); "
                "set train.compile=false for it"
            ) from error
        LOGGER.warning("%s: trains without compilation, which is slower: %s", where, first_line)
        for block in blocks:
            block._compiled_call_impl = None  # torch has no public call that takes `compile` back
        module.chunk_loss = eager


def _run_micro_batch(module: CausalLMWithLoss, config: TrainConfig, sequence_length: int) -> None:
    was_training, device = module.training, next(module.parameters()).device
    shape = (min(config.micro_batch_sequences, config.batch_sequences), sequence_length)
    tokens_BT = torch.zeros(shape, dtype=torch.int64, device=device)
    module.train()
    with autocast(config, device):
        losses = module(tokens_BT, tokens_BT, torch.ones(shape, device=device))
    losses.total.backward()
    module.zero_grad(set_to_none=True)
    module.train(was_training)
