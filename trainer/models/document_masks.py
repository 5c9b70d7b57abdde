"""Document masks: position ids that keep the tokens of a sequence from seeing the documents before theirs.

Axes in tensor names: B sequences, T input tokens. Input: token ids, target mask and separator of packed sequences.
Output: position ids that begin again at 0 in each document. transformers builds the attention mask from them, if it is
given no mask and no cache. Owns the check that a model follows them. Needs torch alone; reads and writes nothing.

    inputs      a  b  |  c  d  e  |  f       | is the separator: it ends the document before it
    positions   0  1  2  0  1  2  3  0
"""

import torch

from miniplm_udf.errors import ConfigError

_PROBE_TOKENS = 6  # length of each of the two documents of the check


def document_positions(inputs_BT: torch.Tensor, mask_BT: torch.Tensor, separator_id: int) -> torch.Tensor:
    """Computes the position of each token in its document.

    A document begins at the start of a sequence, after a separator, and at a token that the token before it does not
    predict: there, two texts meet that are not adjacent in the corpus. Padding is a row of documents of one token.

    Args:
        inputs_BT: int64 input ids.
        mask_BT: 1 where the next token is a target of a position.
        separator_id: id of the document separator.

    Returns:
        int64 positions, (B, T).
    """
    places_T = torch.arange(inputs_BT.shape[1], device=inputs_BT.device)
    begins_BT = torch.ones_like(inputs_BT, dtype=torch.bool)
    begins_BT[:, 1:] = (inputs_BT[:, :-1] == separator_id) | (mask_BT[:, :-1] == 0)
    # Not `where`: on a GPU it copies the 0 and waits for the copy.
    first_BT = places_T.expand_as(begins_BT).masked_fill(~begins_BT, 0).cummax(dim=1).values
    return places_T - first_BT


@torch.no_grad()
def check_follows_positions(model: torch.nn.Module, vocab_size: int, where: str) -> None:
    """Refuses a model that lets a document depend on the document before it.

    Args:
        model: a model on any device; it stays as it is.
        vocab_size: size of its vocabulary.
        where: config key of the architecture, for the message.

    Raises:
        ConfigError: the logits of a document change with the document before it.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    tokens_BT = torch.arange(4 * _PROBE_TOKENS, device=device).view(2, -1) % vocab_size
    tokens_BT[:, _PROBE_TOKENS:] = tokens_BT[0, _PROBE_TOKENS:]  # the same second document after two others
    positions_BT = (torch.arange(2 * _PROBE_TOKENS, device=device) % _PROBE_TOKENS).expand(2, -1)
    try:
        logits_BTV = model(input_ids=tokens_BT, position_ids=positions_BT, use_cache=False).logits
        is_masked = torch.allclose(logits_BTV[0, _PROBE_TOKENS:], logits_BTV[1, _PROBE_TOKENS:], rtol=1e-4, atol=1e-5)
    except TypeError:  # its forward pass takes no position ids
        is_masked = False
    finally:
        model.train(was_training)
    if not is_masked:
        raise ConfigError(
            f"train.document_masks: expected a model whose tokens see only their own document, found {where}, in which "
            "they see the documents before too (a recurrent state, for example); set train.document_masks=false for it"
        )
