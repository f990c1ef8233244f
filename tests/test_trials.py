"""What must hold for the trials: each of them changes what is learned, and nothing else does."""
import numpy as np
import pytest

import data
import train
import trials
import uda
from assets.figures import STYLES
from conftest import uda_command
from data import COCO17, draw_figures, load_dataset
from vlpose import load_model


@pytest.fixture(autouse=True)
def undone(monkeypatch):
    """What a trial changes is as before afterwards."""
    for module, name in ((uda, "confidence_mask"), (uda, "heatmaps_of_images"), (uda, "rectify"),
                         (uda, "entropy"), (uda, "ema_update"),
                         (train, "restyling"), (train, "MultiLevelAlignment"),
                         (train, "Passes"), (train, "alignment_pools"), (data, "FIGURES"),
                         (train, "take_from"), (train, "keep"),
                         (trials.Agreement, "also_sure"),
                         *((style, "yaw") for style in STYLES.values())):
        monkeypatch.setattr(module, name, getattr(module, name))


def trained(words, cache, out):
    """The teacher's parameters after a short run of a trial from drawn people to photographs."""
    argv = uda_command(cache, out, "--source", "figures#artificial", "--target", "figures#photo",
                       "--augmentation", "paper")
    assert trials.main([words, *argv]) == 0
    teacher = load_model(out / "teacher.pth")
    return np.concatenate([tensor.numpy().ravel() for tensor in teacher.state_dict().values()])


@pytest.fixture(scope="module")
def plain(cache, tmp_path_factory):
    return trained("plain", cache, tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize("trial", [name for name in trials.TRIALS
                                   if name not in ("plain", "turned")])
def test_each_trial_changes_what_the_teacher_learns(trial, plain, cache, tmp_path):
    assert not np.array_equal(trained(trial, cache, tmp_path / "run"), plain)


def test_trials_can_be_joined(plain, cache, tmp_path):
    joined = trained("flip+subpixel", cache, tmp_path / "run")
    assert not np.array_equal(joined, plain)


def test_without_a_trial_the_training_is_the_same_again(plain, cache, tmp_path):
    assert np.array_equal(trained("plain", cache, tmp_path / "run"), plain)


def test_an_unknown_trial_is_refused_and_all_trials_are_named(capsys):
    with pytest.raises(SystemExit):
        trials.main(["flip+flop", "--mode", "uda"])
    assert "found flop" in (printed := capsys.readouterr().err) and "subpixel" in printed


def test_turned_figures_are_seen_from_behind_as_often_as_from_the_front(tmp_path):
    trials.turned(None)
    folder = draw_figures(tmp_path, {"train": (60, 1), "val": (1, 1)})
    assert folder.name == "figures-turned"
    people = load_dataset(f"figures:{folder}#photo", "train").keypoints
    left, right = (people[:, COCO17.names.index(f"{side}_shoulder"), 0]
                   for side in ("left", "right"))
    assert 0.3 < (left < right).mean() < 0.7
