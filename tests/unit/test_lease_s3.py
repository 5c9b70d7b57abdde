"""Conditional writes on S3, and the lease there: one of many takers wins, and a lost answer is no lost lease."""

import threading

import pytest

from miniplm_udf import conditional_files, lease, storage
from miniplm_udf.layout import Root
from miniplm_udf.lease import Lease
from tests.support.s3_server import BUCKET, RequestFault, S3Server
from tests.support.takers import winners

ROUNDS = 8
TAKERS = 4


@pytest.fixture
def uri(s3: S3Server, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    s3.reset()
    monkeypatch.setattr(lease, "_POLL_SECONDS", 0.05)
    return Root(f"s3a://{BUCKET}/{request.node.name}").lease("score")


def test_one_of_many_that_create_or_replace_wins(uri: str) -> None:
    for number in range(ROUNDS):
        file = f"{uri}.{number}"
        assert winners(file, None, TAKERS) == 1
        present = conditional_files.read(file)
        assert present is not None
        assert winners(file, present.tag, TAKERS) == 1


@pytest.mark.parametrize("kind", ["drop_after", "slow_down"])
def test_a_put_that_is_sent_again_is_not_taken_for_another_ones(uri: str, s3: S3Server, kind: str) -> None:
    s3.add_fault(RequestFault(kind=kind, method="PUT", times=1))  # type: ignore[arg-type]
    tag = conditional_files.create(uri, "mine")
    assert tag is not None
    s3.add_fault(RequestFault(kind=kind, method="PUT", times=1))  # type: ignore[arg-type]
    assert conditional_files.replace(uri, "mine again", tag) is not None
    assert storage.read_text(uri) == "mine again"


def test_a_lease_is_renewed_and_released(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_RENEW_SECONDS", 0.05)
    renewed = threading.Event()
    renew = Lease._renew

    def counted(held: Lease) -> bool:
        is_held = renew(held)
        if held._renewals >= 3:
            renewed.set()
        return is_held

    monkeypatch.setattr(Lease, "_renew", counted)
    with Lease(uri, "score") as held:
        assert renewed.wait(10)
        held.check()
        record = lease.read(uri)
        assert record is not None
        assert record.renewals >= 3
    assert lease.read(uri) is None
