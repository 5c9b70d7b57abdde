"""Several writers of one Delta table on S3: every commit is there once, and Delta's own log store loses some."""

import pytest

from tests.support import s3_server
from tests.support.faults.race import RaceResult, race

pytestmark = pytest.mark.long
OWN = "spark, Delta's own log store"


def table(name: str) -> str:
    return f"s3a://{s3_server.BUCKET}/{name}"


def assert_whole(found: RaceResult) -> None:
    """Each row once, and each version: nothing was replaced."""
    assert (found.lost, found.duplicated, found.unknown, found.gaps, found.replaced) == (0, 0, 0, 0, 0), found


def test_two_drivers_lose_nothing_where_a_hundred_commits_are_refused(s3: s3_server.S3Server) -> None:
    found = race(s3, table("two"), ["spark", "spark"], lambda refused, replaced: refused >= 100 or replaced > 0)
    print(found)
    assert found.refused >= 100
    assert_whole(found)


def test_the_race_finds_what_the_log_store_of_delta_loses(s3: s3_server.S3Server) -> None:
    """So the race above would see a lost commit."""
    found = race(s3, table("own"), [OWN, OWN], lambda refused, replaced: replaced >= 3)
    print(found)
    assert found.lost > 0


def test_a_driver_beside_delta_rs(s3: s3_server.S3Server) -> None:
    found = race(s3, table("mixed"), ["spark", "spark", "delta-rs"], lambda refused, replaced: refused + replaced >= 30)
    print(found)
    assert_whole(found)


def test_answers_of_commits_are_lost(s3: s3_server.S3Server) -> None:
    """The storage does the put and closes the connection: once, or for longer than the client tries again."""
    turns = iter(range(1_000_000))

    def drop_answers() -> None:
        times = 40 if next(turns) % 5 == 0 else 1
        s3.add_fault(s3_server.RequestFault("drop_after", "PUT", r"_delta_log/\d+\.json", times=times))

    found = race(
        s3, table("ambiguous"), ["spark", "spark"], lambda refused, replaced: refused + replaced >= 20, drop_answers
    )
    print(found)
    assert_whole(found)
