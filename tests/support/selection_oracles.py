"""Expected results of selections and diagnostics, computed by plain sorts over all rows."""

import math
import random

from miniplm_udf.refinement.selection import Cut

RankedRow = tuple[float, str, int]


def by_sorting(rows: list[RankedRow], budget: int) -> list[str]:
    kept, total = [], 0
    for _, instance_id, weight in sorted(rows, key=lambda row: (-row[0], row[1])):
        total += weight
        if total > budget:
            break
        kept.append(instance_id)
    return sorted(kept)


def by_cut(rows: list[RankedRow], cut: Cut | None) -> list[str]:
    if cut is None:
        return []
    return sorted(
        instance_id
        for score, instance_id, _ in rows
        if score > cut.score or (score == cut.score and (cut.instance_id is None or instance_id <= cut.instance_id))
    )


def random_rows(rng: random.Random, n: int, n_scores: int, by_tokens: bool) -> list[RankedRow]:
    scores = [rng.choice([rng.gauss(0, 1), rng.gauss(0, 1e-9), rng.gauss(0, 1e6)]) for _ in range(n_scores)]
    return [
        (rng.choice(scores), f"{rng.getrandbits(128):032x}", rng.randint(1, 300) if by_tokens else 1) for _ in range(n)
    ]


def ranks(values: list[float]) -> list[float]:
    """Mean ranks of ties, plainly."""
    places: dict[float, list[int]] = {}
    for place, value in enumerate(sorted(values)):
        places.setdefault(value, []).append(place)
    return [sum(places[value]) / len(places[value]) for value in values]


def exact(rows: list[tuple[float, float]]) -> float:
    first, second = ranks([a for a, _ in rows]), ranks([b for _, b in rows])
    mean = (len(rows) - 1) / 2
    products = sum((a - mean) * (b - mean) for a, b in zip(first, second, strict=True))
    return products / math.sqrt(sum((a - mean) ** 2 for a in first) * sum((b - mean) ** 2 for b in second))
