"""The tour: its blocks run and make the pictures that the page shows, which are small and clear."""
import re

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

import tour
from assets.panels import LABEL_COLORS, MAP_COLORS, Panel, as_image, panels
from data import draw_figures
from uda import MultiLevelAlignment, StyleTransfer
from vlpose import VIT_CONFIGS, PoseModel, VLPose, save_checkpoint, save_tensors

STEPS = tour.steps_of(tour.PAGE.read_text("utf-8"))
SHOWN = [step for step in STEPS if step.file]
CONFIG = VIT_CONFIGS["tiny"]  # as large as users have it: the tests have not made it smaller yet
by_file = pytest.mark.parametrize("step", SHOWN, ids=lambda step: step.file)


def save_untrained_runs(folder):
    """What the page's commands leave behind in runs/, with models that have learned nothing."""
    torch.manual_seed(0)
    base = PoseModel(CONFIG)
    for name in ("vlpose-1", "uda-1", "uda-30", "uda-100"):
        (folder / name).mkdir(parents=True)
    for name in ("uda-1/source-only", "uda-1/student", "uda-1/teacher",
                 "uda-30/teacher", "uda-100/teacher"):
        save_checkpoint(folder / f"{name}.pth", base)
    save_checkpoint(folder / "vlpose-1" / "model.pth", VLPose(base, 128))
    save_tensors(folder / "uda-1" / "style.pth", StyleTransfer(width=16, depth=1).state_dict())
    alignment = {"model": MultiLevelAlignment(base).state_dict()}
    save_tensors(folder / "uda-1" / "adapt.checkpoint.pth", alignment)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """[(what is printed, the picture or None)] of each step, with few figures."""
    folder = tmp_path_factory.mktemp("tour")
    draw_figures(folder, {"train": (1, 1), "val": (16, 12)})
    save_untrained_runs(folder / "runs")
    names = {}
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.chdir(folder)
        patch.setenv("POSEBRIDGE_HOME", str(folder))
        return [tour.run(step, names) for step in STEPS]


# ----------------------------------------------------------------------------------------- the page

@by_file
def test_each_block_makes_the_picture_that_the_page_shows(step, made):
    _, picture = made[STEPS.index(step)]
    with Image.open(tour.PAGE.parent / step.file) as shown:
        assert picture.size == shown.size
    assert picture.width == step.width
    assert len(np.unique(picture)) > 2


def test_only_blocks_with_a_picture_make_one(made):
    assert [picture is None for _, picture in made] == [not step.file for step in STEPS]


def test_each_block_prints_what_the_page_says_but_for_the_numbers(made):
    number = r"-?\d+(\.\d+)?"
    for step, (printed, _) in zip(STEPS, made):
        assert re.sub(number, "#", printed) == re.sub(number, "#", step.printed)


@by_file
def test_each_picture_takes_three_to_eight_lines(step):
    lines = step.code.splitlines()
    assert 3 <= len(lines) <= 8
    assert [line for line in lines if len(line) > 100] == []


def test_each_of_twelve_to_sixteen_steps_has_a_picture():
    sections = re.split(r"^## \d+\. ", tour.PAGE.read_text("utf-8"), flags=re.M)[1:]
    assert 12 <= len(sections) <= 16
    assert [section[:40] for section in sections if "<img " not in section] == []


def test_the_folder_holds_the_pictures_of_the_page_and_all_are_small():
    files = sorted((tour.PAGE.parent / "tour").iterdir())
    assert [f"tour/{file.name}" for file in files] == sorted(step.file for step in SHOWN)
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) < 150_000 and sum(sizes) < 1_500_000


@by_file
def test_each_picture_is_described_in_words_and_has_a_caption(step):
    text = tour.PAGE.read_text("utf-8")
    tag = f'<img src="{step.file}" width="{step.width}"\nalt="{step.alt}">\n\n*'
    assert len(step.alt) > 20 and tag in text


def test_the_command_says_where_the_page_is_not_what_its_blocks_give(tmp_path, monkeypatch, capsys):
    block = ("```python\nfrom assets.panels import *\nprint(7)\n"
             "picture = panels([Panel('a', np.eye(2))])\n```\n")
    shown = '\n```text\n{}\n```\n\n<img src="a.png" width="{}"\nalt="A picture.">\n'
    monkeypatch.setattr(tour, "PAGE", tmp_path / "tour.md")
    monkeypatch.chdir(tmp_path)
    tour.PAGE.write_text(block + shown.format(7, 800), "utf-8")
    assert tour.main() == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width == 800
    tour.PAGE.write_text(block + shown.format(8, 800), "utf-8")
    assert tour.main() == 1 and "8\nbut it is:\n7\n" in capsys.readouterr().out
    tour.PAGE.write_text(block + shown.format(7, 760), "utf-8")
    assert tour.main() == 1 and "760 pixels wide" in capsys.readouterr().out


def test_the_command_names_a_run_that_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tour, "PAGE", tmp_path / "tour.md")
    monkeypatch.setattr(tour, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    tour.PAGE.write_text("python train.py --out runs/uda-30\n", "utf-8")
    assert tour.main() == 2
    assert "runs/uda-30: not there" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- the pictures

def test_the_colours_of_a_map_grow_lighter_with_its_values_so_that_everybody_sees_the_order():
    image = as_image(np.linspace(0, 1, 256)[None])
    lightness = np.asarray(image.convert("L"))[0].astype(int)
    assert (np.diff(lightness) >= 0).all() and lightness[-1] - lightness[0] > 150
    assert image.getpixel((0, 0)) == ImageColor.getrgb(MAP_COLORS[0])
    assert image.getpixel((255, 0)) == ImageColor.getrgb(MAP_COLORS[-1])


def test_what_is_not_a_number_is_white_in_a_map():
    assert as_image(np.array([[0, np.nan, 1]])).getpixel((1, 0)) == (255, 255, 255)


def test_bytes_and_numbers_and_pictures_of_the_same_image_look_the_same():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 4), np.uint8)
    rows = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    for picture in (pixels, torch.tensor(pixels), torch.tensor(pixels) / 255, rows,
                    Image.fromarray(rows)):
        assert (np.asarray(as_image(picture)) == rows).all()


def test_features_are_red_where_their_strongest_direction_is_high():
    features = np.random.default_rng(0).normal(0, 0.01, (7, 6, 6))
    features[4, :, 3:] += 5
    red = np.asarray(as_image(features))[:, :, 0].astype(int)
    assert abs(red[:, 3:].mean() - red[:, :3].mean()) > 200


def test_a_point_is_drawn_in_the_middle_of_its_pixel():
    black = Image.new("RGB", (10, 10))
    drawn = panels([Panel("", black, points={"here": [(2, 7)]})], columns=1)
    pixels = np.asarray(drawn)[:800]  # further down is the mark beside "here"
    orange = np.argwhere((pixels == ImageColor.getrgb(LABEL_COLORS[0])).all(2))
    top, left = np.argwhere((pixels == 0).all(2)).min(0)
    row, column = orange.mean(0) - (top, left)
    scale = 78  # pixels of the drawing, 788 wide, for a pixel of the image
    assert abs(column - 2.5 * scale) < 1
    assert abs(row - 7.5 * scale) < 1
