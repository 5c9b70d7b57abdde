"""The watchdog counts for how long nothing has moved. The stages' own numbers are tested on Spark."""

from miniplm_udf.streams.watchdog import Watchdog


def test_quiet_time_counts_from_the_last_change_and_not_while_nothing_runs() -> None:
    now, activity = [0.0], [[(1, 0, 10)]]
    watchdog = Watchdog(lambda: activity[0], lambda: now[0])
    found = []
    for seconds, state in [
        (1, [(1, 0, 10)]),
        (5, [(1, 0, 10)]),
        (6, [(1, 0, 11)]),
        (9, [(1, 0, 11)]),
        (20, []),
        (30, []),
    ]:
        now[0], activity[0] = float(seconds), state
        found.append(watchdog.quiet_seconds())
    assert found == [0.0, 4.0, 0.0, 3.0, 0.0, 0.0]
