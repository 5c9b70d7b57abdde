"""The lines of a progress where stderr is no terminal."""

import re

import pytest

from miniplm_udf.progress import progress


def test_what_an_earlier_process_finished_counts_and_is_no_part_of_the_rate(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="miniplm")
    with progress("train small", 40, "step", done=20) as shown:
        shown.update(5)
    line = re.search(r"train small: 25 of 40 step, ([\d,]+\.\d) step/s", caplog.text)
    assert line is not None
    assert shown.done == 25
