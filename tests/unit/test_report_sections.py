"""The sections of the report, from facts made by hand."""

import re

import pytest

from tests.support import report_facts


@pytest.mark.parametrize(("has_students", "n_trained"), [(False, 0), (True, 0), (True, 2)])
def test_the_section_about_students_is_there_if_the_config_has_students(has_students: bool, n_trained: int) -> None:
    page = report_facts.page(has_students, n_trained)
    expected = ["summary", "corpus-1", *(["students"] if has_students else []), "data"]
    assert re.findall(r'<section id="([^"]*)">', page) == expected
    assert re.findall(r'<a href="#([^"]*)">', page) == expected
    assert page.count("</section>") == len(expected)
    assert ("No student was trained yet." in page) == (has_students and not n_trained)
    assert ("student_1" in page) == (n_trained > 1)
