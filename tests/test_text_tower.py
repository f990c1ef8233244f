"""The text tower that has seen figures: it must learn, and VLPose must be able to read with it."""
import json
import sys
from functools import partial

import numpy as np
import pytest
import text_tower
import torch
from assets.figures import STYLES
from data import draw_figures
from vlpose import encode_sentences, load_clip_text

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    draw_figures(folder, {"train": (3, 3), "val": (2, 2)})
    return folder


@pytest.fixture
def figures(home, monkeypatch):
    monkeypatch.setenv("POSEBRIDGE_HOME", str(home))
    # The same steps in a fifteenth of the time: most of the 49,408 tokens are in no sentence.
    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, fused=True))


def test_every_style_has_a_sentence_of_its_own_in_words_that_another_style_shares():
    assert text_tower.LOOKS.keys() == STYLES.keys()
    words = {style: {word for look in looks for word in look.split("/")}
             for style, looks in text_tower.LOOKS.items()}
    for style, own in words.items():
        others = set().union(*(words[other] for other in words if other != style))
        assert own & others and own - others


def test_a_sentence_says_what_the_picture_looks_like():
    red = torch.tensor([250, 40, 40], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    said = " ".join(text_tower.sentence_about("sketch", red, np.random.default_rng(seed))
                    for seed in range(30))
    assert "warm" in said and "colourful" in said and "dark" in said and "hatching" in said
    assert "cold" not in said and "grey" not in said and "cartoon" not in said


def test_vlpose_can_read_with_the_tower_that_is_written(figures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text_tower, "train", partial(text_tower.train, batch_size=8))
    monkeypatch.setattr(sys, "argv", ["text_tower.py", str(tmp_path / "tower"), "--steps", "3"])
    text_tower.main()
    assert "style's sentence is the nearest: photo" in capsys.readouterr().out
    sentences = json.loads((tmp_path / "tower" / "sentences.json").read_text("utf-8"))
    tower = load_clip_text(tmp_path / "tower" / "tower.pth")
    texts = encode_sentences(tower, [*sentences.values()])
    assert sentences.keys() == STYLES.keys() and len(texts) == len(STYLES)
    assert all(T.shape == (1, 128) for T in texts.values())


def test_a_batch_of_pictures_is_told_apart_better_the_longer_it_learns(figures, capsys):
    text_tower.train(40, batch_size=8)
    first, last = (float(line.split("loss ")[1].split()[0])
                   for line in capsys.readouterr().out.splitlines())
    assert last < first
