"""The advised conditions of `where`: their aliases and groups, and that the documentation and the demo show them."""

from pathlib import Path

import pytest

from miniplm_udf import schemas
from miniplm_udf.config.experiment import load_config
from miniplm_udf.refinement import cleaning
from tests.bench import bench_noise

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_line_names_the_teacher_and_only_columns_of_its_group() -> None:
    assert cleaning.lines("large")[0] == "large_n_tokens >= 32"
    assert not any("duplicate" in line for line in cleaning.lines(groups=()))
    for line in cleaning.LINES:
        if line.group is not None:
            columns = [column.name for column in schemas.ANNOTATIONS_BY_GROUP[line.group]]
            assert any(column in line.sql for column in columns)


def test_the_page_and_the_demo_show_the_lines_that_are_measured() -> None:
    page = " ".join((REPOSITORY / "docs" / "cleaning.md").read_text().split())
    config = load_config(REPOSITORY / "conf" / "demo.yaml")
    where = " ".join(str(config.refine.corpora["difference"].where).split())
    assert where == " and ".join(cleaning.lines())
    assert all(line in page for line in cleaning.lines())


@pytest.mark.parametrize(
    ("clean", "noise", "expected"), [([3.0, 2.0], [1.0], 1.0), ([1.0], [1.0, 0.0], 0.75), ([0.0], [1.0], 0.0)]
)
def test_the_area_is_the_share_of_pairs_in_order(clean: list[float], noise: list[float], expected: float) -> None:
    assert bench_noise.auc(clean, noise) == expected


def test_planted_noise_is_as_long_as_its_text_and_not_equal_to_it() -> None:
    texts = [" ".join(f"word{(number * 7 + place) % 97}" for place in range(80)) + "\n" for number in range(9)]
    planted = bench_noise.plant_noise(texts, 5)
    assert [kind for kind, _ in planted] == [kind for kind in bench_noise.KINDS for _ in range(5)]
    assert all(0.7 * len(texts[0]) <= len(text) <= max(map(len, texts)) for _, text in planted)
    assert not {text for _, text in planted} & set(texts)
    shuffled = next(text for kind, text in planted if kind == "shuffled words")
    assert any(sorted(shuffled.split()) == sorted(text.split()) for text in texts)
