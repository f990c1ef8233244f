"""The code is plain: each line says one thing, as in the code bases that people read for pleasure.

The limits are near what MAE's models measure by the same arithmetic (density.py, also a command).
"""
import re

import pytest

from conftest import ROOT
from density import measure, parts

MODULES = ("clip_tokenizer", "vlpose", "data", "uda", "eval", "train")
FILES = [*(f"{module}.py" for module in MODULES), "assets/figures.py", "assets/panels.py"]
PAGES = ["README.md", *sorted(f"assets/{page.name}" for page in (ROOT / "assets").glob("*.md"))]
PARTS = [(file, part) for file in FILES for part in parts((ROOT / file).read_text("utf-8"))]


@pytest.mark.parametrize("file, part", PARTS)
def test_each_line_of_code_says_one_thing(file, part):
    source = (ROOT / file).read_text("utf-8")
    found = measure(source, *parts(source)[part])
    assert found["tokens"] <= 12.5
    assert found["densest tenth"] <= 24
    assert found["over 30 tokens"] <= 2  # of a hundred lines
    assert found["packed"] <= 1
    assert found["wide %"] == 0


@pytest.mark.parametrize("file", FILES)
def test_no_line_of_a_module_is_wider_than_100_columns(file):
    lines = (ROOT / file).read_text("utf-8").splitlines()
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize("page", PAGES)
def test_no_line_of_a_page_is_wider_than_100_columns_but_for_tables(page):
    lines = (ROOT / page).read_text("utf-8").splitlines()
    assert [line for line in lines if len(line) > 100 and not line.startswith("|")] == []


def test_the_lessons_fit_into_an_afternoon():
    lessons = [parts((ROOT / f"{module}.py").read_text("utf-8"))["lesson"] for module in MODULES]
    assert sum(last for _, last in lessons) <= 2300


@pytest.mark.parametrize("module", MODULES)
def test_each_appendix_has_a_subject_and_says_that_it_can_be_skipped(module):
    text = (ROOT / f"{module}.py").read_text("utf-8")
    banners = re.findall("^# === .*", text, flags=re.M)
    assert banners
    for banner in banners:
        assert re.fullmatch(r"# === Appendix: .+; skip on a first reading =+", banner), banner


def test_the_arithmetic_finds_dense_code():
    found = measure("a, b = [[x if x else 0 for x in y] for y in z], "
                    "{key: sum(row[i] * row[j] for i, j in pairs) for key, row in rows.items()}\n")
    assert found["tokens"] > 30 and found["packed"] == 100 and found["nested"] > 0
