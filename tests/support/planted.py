"""Texts whose score can be read off their words, and scorers that give it. Imported by Spark's workers too."""

import dataclasses
import random
from collections.abc import Sequence

from miniplm_udf.scoring.results import Score

GOOD = [f"good{number}" for number in range(20)]
POOR = [f"poor{number}" for number in range(20)]


def planted(n: int, start: int = 0) -> list[str]:
    """Texts of 40 words, each good or poor with a chance of the text's own."""
    found = []
    for number in range(start, start + n):
        rng = random.Random(number)
        share = rng.random()
        words = [rng.choice(GOOD if rng.random() < share else POOR) for _ in range(40)]
        found.append(f"{number} " + " ".join(words))
    return found


def truth(text: str) -> float:
    """The score, in nats a token: the share of good words."""
    words = text.split()
    return sum(word.startswith("good") for word in words) / len(words)


@dataclasses.dataclass(frozen=True)
class PlantedFactory:
    """Scorers by which the reference loses 3 nats a word, and the teacher as much less as there are good words."""

    is_teacher: bool

    @property
    def key(self) -> str:
        return f"planted/{self.is_teacher}"

    def __call__(self) -> "PlantedFactory":
        return self

    def score(
        self, texts: Sequence[str], segment_ends: Sequence[Sequence[int]], ends_document: Sequence[bool]
    ) -> list[Score]:
        return [
            Score((3 - truth(text) * self.is_teacher) * len(text.split()), len(text.split()), len(text.encode()))
            for text in texts
        ]
