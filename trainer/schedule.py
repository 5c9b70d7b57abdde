"""The learning rate of a step: linear warm-up, then a cosine down to a share of the peak rate. A pure function.

Source: the recipe of arXiv 2410.17215, appendix: 2,000 warm-up steps, cosine to a tenth of the peak rate. The official
code does its first update with rate 0; here, update n has the rate of update n + 1 there (tests/unit/test_golden.py).
"""

import math


def learning_rate(step: int, *, steps: int, warmup_steps: int, peak: float, min_ratio: float) -> float:
    """Returns the learning rate of a step.

    Args:
        step: number of the step, from 0. Step 0 already has a rate above zero; the last warm-up step has the peak rate.
        steps: steps in the whole run.
        warmup_steps: steps of linear warm-up.
        peak: highest rate.
        min_ratio: rate at the end of the cosine, as a share of `peak`.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps + 1) / max(1, steps - warmup_steps))
    return peak * (min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
