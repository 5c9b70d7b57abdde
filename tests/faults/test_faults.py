"""The fault trials in short: six on a real cluster, in packed chunking, one kill each.

`make faults` runs sixty of chunking by document, with more kills; `python -m tests.faults.run --mode packed` of packed.
"""

from pathlib import Path

from tests.support.faults.runs import run
from tests.support.faults.trials import plan


def test_six_trials(tmp_path: Path) -> None:
    trials = plan(6, seed=0, kills_a_trial=1)
    found = run(trials, tmp_path / "faults", seed=0, seconds=1500, mode="packed")
    assert len(found.outcomes) == 6
    assert [line for outcome in found.outcomes for line in outcome.differences.lines] == []
    assert sum(found.landed.values()) == 6
