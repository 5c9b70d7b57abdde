"""The section `generate` of an experiment: the teacher continues texts of the pool, for SeqKD.

A frozen dataclass, checked when it is made, as in sections.py. The defaults are the values of arXiv 2410.17215
(docs/training.md says what the paper states, and what it leaves open). Imports nothing heavy.
"""

import dataclasses
import hashlib
import json
import re

from miniplm_udf.config.sections import check
from miniplm_udf.storage import Json

# Raised when the same settings make other texts.
_GENERATION_RULE = 1
# The corpus that students name to train on the generated texts.
GENERATED = "generated"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How a model continues the beginnings of instances. Workers and GPUs are set in the section `score`.

    Attributes:
        model: alias of the model that continues.
        prompt_tokens: tokens at the beginning of each instance that are the prompt, by the model's tokenizer; a
            shorter instance stays as it is.
        new_tokens: most tokens that are generated after a prompt; fewer if the model ends the document.
        temperature: divides the logits before sampling; 0 takes the most probable token instead.
        top_p: samples from the most probable tokens whose probabilities sum to this share; 1: from all.
        seed: seed of the random numbers; another seed gives other texts.
        sample: share of the pool whose instances are continued, chosen as `score.sample` chooses.
        tokens_per_batch: most tokens, prompts and continuations, of one batch; null takes a value for the device.
        max_bytes_per_trigger: size of a micro-batch, in bytes of the instances' files. A killed job loses at most one
            micro-batch.
    """

    model: str = "teacher"
    prompt_tokens: int = 768
    new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    sample: float = 1.0
    tokens_per_batch: int | None = None
    max_bytes_per_trigger: str = "64m"

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens", "tokens_per_batch"):
            number = getattr(self, name)
            check(number is None or number >= 1, f"generate.{name}: expected at least 1, found {number}")
        check(self.temperature >= 0, f"generate.temperature: expected at least 0, found {self.temperature}")
        for name in ("top_p", "sample"):
            share = getattr(self, name)
            check(0 < share <= 1, f"generate.{name}: expected a share above 0 and at most 1, found {share}")
        check(
            re.fullmatch(r"\d+[bkmgt]?b?", self.max_bytes_per_trigger.lower()) is not None,
            f"generate.max_bytes_per_trigger: expected a size such as 64m or 1g, found {self.max_bytes_per_trigger!r}",
        )

    @property
    def settings(self) -> Json:
        """The keys that decide which texts are generated."""
        names = ("prompt_tokens", "new_tokens", "temperature", "top_p", "seed")
        return {name: getattr(self, name) for name in names}

    def revision(self, model_revision: str) -> str:
        """Returns a hash of the model and the settings that decide which texts are generated, 32 hexadecimal digits.

        Args:
            model_revision: revision of the model that continues.
        """
        facts = json.dumps([_GENERATION_RULE, model_revision, self.settings], sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:32]
