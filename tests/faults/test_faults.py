"""The fault trials in short: six on a real cluster, one kill each. `make faults` runs sixty, with more kills."""

from pathlib import Path

from tests.faults.run import run
from tests.faults.trials import plan


def test_six_trials(tmp_path: Path) -> None:
    trials = plan(6, seed=0, kills_a_trial=1)
    found = run(trials, tmp_path / "faults", seed=0, seconds=1500)
    assert len(found.outcomes) == 6
    assert [line for outcome in found.outcomes for line in outcome.differences.lines] == []
    assert sum(found.landed.values()) == 6
