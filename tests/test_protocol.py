"""The papers' own protocol against plain-loop restatements of what their authors' code does.

PCK on the heatmap grid (RegDA, UniFrame, multi-level alignment), ViTPose's augmentation and targets (mmpose), and the
learning rates of all stages.
"""
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import COCO17, VITPOSE, Crops, encode_heatmaps, load_dataset
from eval import evaluate_pck_grid, highest_cells
from train import learning_rate, parse_options, plan_uda, plan_vlpose
from vlpose import MODEL_CONFIGS


# -------------------------------------------------------------------------- PCK on the heatmap grid

def highest_cell(heatmap):
    """(x, y) of the first highest cell in reading order, (0, 0) if no cell is above 0."""
    best, place = 0.0, (0, 0)
    for y, row in enumerate(heatmap):
        for x, value in enumerate(row):
            if value > best:
                best, place = value, (x, y)
    return place


def regda_pck(predicted, target, visible, threshold):
    """RegDA's PCK of each joint, -1 where none counts. The truth is the highest cell of the target heatmap, in row and
    column 2 or later; a prediction is right when closer than threshold × the heatmap's side."""
    people, joints, side = predicted.shape[:3]
    right, counted = [0] * joints, [0] * joints
    for person in range(people):
        for joint in range(joints):
            if not visible[person, joint] > 0:
                continue  # in RegDA's own data the target heatmap of such a joint is empty
            x, y = highest_cell(target[person, joint])
            if x > 1 and y > 1:
                guess = highest_cell(predicted[person, joint])
                tenth = side / 10  # RegDA measures in tenths of the heatmap, and its threshold is 0.5 of them
                distance = math.sqrt(((guess[0] - x) / tenth) ** 2 + ((guess[1] - y) / tenth) ** 2)
                counted[joint] += 1
                right[joint] += distance < 10 * threshold
    return [right[joint] / counted[joint] if counted[joint] else -1 for joint in range(joints)]


def bump(side, x, y, sigma=2.0):
    rows, columns = np.ogrid[:side, :side]
    return np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma ** 2))


def random_heatmaps(seed, people=40, joints=6, side=32):
    """Targets and predictions around them, with all that is special: joints near and on the edge, nothing predicted,
    nothing labelled, and a joint that nobody has."""
    rng = np.random.default_rng(seed)
    target, predicted = np.zeros((2, people, joints, side, side), np.float32)
    visible = (rng.random((people, joints)) < 0.8).astype(float)
    visible[:, joints - 1] = 0
    for person in range(people):
        for joint in range(joints):
            x, y = rng.integers(0, side, 2) if joint % 2 else rng.integers(0, 5, 2)
            target[person, joint] = bump(side, x, y)
            guess = np.array([x, y]) + rng.integers(-3, 4, 2)
            predicted[person, joint] = 0.7 * bump(side, *guess) + rng.normal(0, 0.02, (side, side))
            if rng.random() < 0.15:
                predicted[person, joint] = -rng.random((side, side))  # no cell above 0: RegDA takes (0, 0)
    return predicted, target, visible


def pck_of_heatmaps(predicted, target, visible, **more):
    cells = highest_cells(predicted), highest_cells(target)
    return evaluate_pck_grid(*cells, visible, target.shape[2:], **more)


@pytest.mark.parametrize("threshold", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_pck_on_the_grid_is_regdas(seed, threshold):
    predicted, target, visible = random_heatmaps(seed)
    expected = regda_pck(predicted, target, visible, threshold)
    assert 0 < max(expected) and expected[-1] == -1  # some are right, and the last joint is nobody's
    groups = {str(joint): (joint,) for joint in range(len(expected))}
    single = pck_of_heatmaps(predicted, target, visible, threshold=threshold, groups=groups)
    assert [single[str(joint)] for joint in range(len(expected))] == pytest.approx(expected)
    mean = np.mean([pck for pck in expected if pck >= 0])
    found = pck_of_heatmaps(predicted, target, visible, threshold=threshold)
    assert found["mean"] == pytest.approx(mean)


def test_groups_on_the_grid_are_means_over_joints_and_the_mean_is_over_the_joints_of_all_groups():
    predicted, target, visible = random_heatmaps(7)
    pck = regda_pck(predicted, target, visible, 0.05)
    groups = {"arm": (1, 3), "leg": (0,)}
    found = pck_of_heatmaps(predicted, target, visible, groups=groups)  # 0.05 is the default
    assert found == pytest.approx({"arm": (pck[1] + pck[3]) / 2, "leg": pck[0], "mean": (pck[0] + pck[1] + pck[3]) / 3})


def test_on_a_grid_of_64_three_cells_off_is_right_and_four_is_not():
    target, visible = np.stack([bump(64, 30, 40)] * 3)[None], np.ones((1, 3))
    predicted = np.stack([bump(64, 33, 40), bump(64, 34, 40), bump(64, 32, 42)])[None]
    groups = {"3": (0,), "4": (1,), "2 and 2": (2,)}
    found = pck_of_heatmaps(predicted, target, visible, groups=groups)
    assert (found["3"], found["4"], found["2 and 2"]) == (1, 0, 1)


def test_at_the_threshold_itself_a_keypoint_is_not_right():
    target, visible = bump(20, 8, 8)[None, None], np.ones((1, 1))
    beside = bump(20, 9, 8)[None, None]  # by one cell, which is 0.05 of 20
    assert pck_of_heatmaps(beside, target, visible)["mean"] == 0
    assert pck_of_heatmaps(target, target, visible)["mean"] == 1


def test_the_first_two_rows_and_columns_do_not_count_on_the_grid():
    corner = [(1, 9), (9, 1), (0, 0), (2, 2)]
    target = np.stack([bump(32, *place) for place in corner])[None]
    groups = {str(joint): (joint,) for joint in range(4)}
    found = pck_of_heatmaps(target, target, np.ones((1, 4)), groups=groups)
    assert [found[str(joint)] for joint in range(4)] == [-1, -1, -1, 1]


# -------------------------------------------------------- ViTPose's augmentation: centres and sizes

SIZE = (64, 48)  # height, width of the crops
DRAWS = 3000


def truncated_normal(rng):
    """A standard normal number within ±1."""
    while True:
        value = rng.standard_normal()
        if abs(value) <= 1:
            return value


def mmpose_half_body(keypoints, upper, rng):
    """Centre and size (not yet of the crop's shape) around one half of a person, or None."""
    labelled = [j for j in range(len(keypoints)) if keypoints[j][2] > 0]
    if len(labelled) < 9 or rng.random() > 0.3:
        return None
    above = [j for j in labelled if j in upper]
    below = [j for j in labelled if j not in upper]
    prefer_upper = rng.random() < 0.7
    if len(above) < 2 and len(below) < 3:
        return None
    if len(below) < 3:
        half = above
    elif len(above) < 2:
        half = below
    else:
        half = above if prefer_upper else below
    xs, ys = [keypoints[j][0] for j in half], [keypoints[j][1] for j in half]
    center = sum(xs) / len(half), sum(ys) / len(half)
    return center, (1.5 * (max(xs) - min(xs)), 1.5 * (max(ys) - min(ys)))


def mmpose_crop(keypoints, box, upper, rng):
    """Centre x and y, width and angle of a training crop: box padded by 1.25, half body, shift, scale, rotation, and at
    last the crop's shape."""
    x, y, w, h = box
    center, size = (x + w / 2, y + h / 2), (1.25 * w, 1.25 * h)
    center, size = mmpose_half_body(keypoints, upper, rng) or (center, size)
    if rng.random() < 0.3:  # one coin for both; by a share of the box as it is, neither scaled nor of the crop's shape
        center = tuple(center[axis] + 0.16 * truncated_normal(rng) * size[axis] for axis in (0, 1))
    scale = 1 + 0.5 * truncated_normal(rng)
    angle = 80 * truncated_normal(rng) if rng.random() < 0.6 else 0.0
    return center[0], center[1], scale * max(size[0], size[1] * SIZE[1] / SIZE[0]), angle


def crop_of(matrix):
    """The same four of a crop's matrix (2, 3)."""
    height, width = SIZE
    matrix = matrix.copy()
    if np.linalg.det(matrix[:, :2]) < 0:  # mirrored
        matrix[0] = [0, 0, width - 1] - matrix[0]
    x, y = np.linalg.solve(matrix[:, :2], (np.array([width, height]) - 1) / 2 - matrix[:, 2])
    sides = (np.array([width, height]) - 1) / np.linalg.norm(matrix[:, :2], axis=1)  # the crop's, in image pixels
    return x, y, sides[0], math.degrees(math.atan2(matrix[1, 0] * sides[1], matrix[1, 1] * sides[1]))


def one_person(folder, keypoints, box, side=128):
    Image.new("RGB", (side, side)).save(folder / "a.jpg")
    person = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "bbox": box, "area": box[2] * box[3],
              "num_keypoints": int((keypoints[:, 2] > 0).sum()), "keypoints": keypoints.ravel().tolist()}
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": [{"id": 1, "file_name": "a.jpg", "width": side, "height": side}],
                                "annotations": [person], "categories": [{"id": 1, "name": "person"}]}))
    return load_dataset(f"coco:{path}", "all")


def a_person(labelled):
    """Keypoints (17, 3): the upper half in the left part of the box, unevenly, the lower one to the right."""
    rng = np.random.default_rng(5)
    keypoints = np.zeros((17, 3))
    keypoints[:11, :2] = [45, 30] + rng.random((11, 2)) ** 2 * [25, 30]
    keypoints[11:, :2] = [55, 65] + rng.random((6, 2)) ** 2 * [28, 40]
    keypoints[labelled, 2] = 2
    return np.round(keypoints, 2) * (keypoints[:, 2:] > 0)


@pytest.fixture
def without_pixels(monkeypatch):
    """Thousands of crops whose pixels nobody looks at."""
    monkeypatch.setattr(data, "open_image", lambda *arguments: (None, 1.0))
    monkeypatch.setattr(data, "warp_image", lambda image, matrix, size, shrink: np.zeros((*size, 3), np.uint8))


def distance_of_distributions(one, other):
    """Kolmogorov and Smirnov's: the greatest difference between the shares below a value."""
    values = np.sort(np.concatenate([one, other]))
    below = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (one, other)]
    return np.abs(below[0] - below[1]).max()


PEOPLE = {"whole body": list(range(17)), "upper half with two lower keypoints": list(range(13)),
          "too few for half a body": list(range(5)) + [11, 12, 13]}
BOXES = {"tall": [40.0, 25.0, 45.0, 85.0], "wide": [20.0, 45.0, 90.0, 40.0]}


@pytest.mark.parametrize("box", BOXES.values(), ids=list(BOXES))
@pytest.mark.parametrize("labelled", PEOPLE.values(), ids=list(PEOPLE))
def test_training_crops_are_distributed_as_mmposes(without_pixels, tmp_path, labelled, box):
    keypoints = a_person(labelled)
    crops = Crops(one_person(tmp_path, keypoints, box), SIZE, VITPOSE)
    ours = np.array([crop_of(crops[0, seed]["matrix"].numpy()) for seed in range(DRAWS)])  # (draws, 4)
    rng = np.random.default_rng(1)
    theirs = np.array([mmpose_crop(keypoints.tolist(), box, COCO17.upper, rng) for _ in range(DRAWS)])
    center = np.array(box[:2]) + np.array(box[2:]) / 2

    def numbers(sample):
        """What is compared: the four, and how they go together (a shift does not grow with the scale)."""
        x, y, width, angle = sample.T
        shift_x, shift_y = x - center[0], y - center[1]
        together = {"x in widths": shift_x / width, "y in widths": shift_y / width}
        # Rounded, for many crops are not moved at all and must not seem so by an error in the last digit.
        return {name: np.round(values, 3) for name, values in
                ({"x": x, "y": y, "width": width, "angle": angle} | together).items()}

    limit = 1.95 * math.sqrt(2 / DRAWS)  # exceeded once in a thousand pairs of samples of one distribution
    apart = {name: distance_of_distributions(values, numbers(theirs)[name]) for name, values in numbers(ours).items()}
    assert max(apart.values()) < limit, apart


@pytest.mark.parametrize("box", BOXES.values(), ids=list(BOXES))
def test_a_shift_is_a_share_of_the_padded_box_whatever_the_crops_shape_and_scale(without_pixels, tmp_path, box):
    """Of the shifted crops alone, for three of ten are too few to show up among all."""
    keypoints = a_person(PEOPLE["too few for half a body"])
    crops = Crops(one_person(tmp_path, keypoints, box), SIZE, VITPOSE)
    ours = np.array([crop_of(crops[0, seed]["matrix"].numpy())[:3] for seed in range(DRAWS)])
    rng = np.random.default_rng(2)
    theirs = np.array([mmpose_crop(keypoints.tolist(), box, COCO17.upper, rng)[:3] for _ in range(DRAWS)])
    limits = 0.16 * 1.25 * np.array(box[2:])
    shares = []
    for sample in (ours, theirs):
        shifts = (sample[:, :2] - box[:2]) / limits - np.array(box[2:]) / 2 / limits  # (draws, 2)
        moved = np.abs(shifts).max(1) > 1e-6
        assert 0.27 < moved.mean() < 0.33
        assert (np.abs(shifts).max(0) <= 1 + 1e-6).all() and (np.abs(shifts).max(0) > 0.95).all(), np.abs(shifts).max(0)
        shares.append(shifts[moved])
    limit = 1.95 * math.sqrt(1 / len(shares[0]) + 1 / len(shares[1]))
    assert all(distance_of_distributions(one, other) < limit for one, other in zip(shares[0].T, shares[1].T))


def test_vitposes_augmentation_mirrors_every_second_crop_and_leaves_colors_alone(without_pixels, tmp_path):
    assert VITPOSE.color == 0
    crops = Crops(one_person(tmp_path, a_person(list(range(17))), BOXES["tall"]), SIZE, VITPOSE)
    mirrored = [np.linalg.det(crops[0, seed]["matrix"].numpy()[:, :2]) < 0 for seed in range(1000)]
    assert 0.45 < np.mean(mirrored) < 0.55


# -------------------------------------------------------------------------------- ViTPose's targets

def udp_heatmap(x, y, labelled, size, sigma):
    """mmpose's target of one keypoint at x, y of the heatmap, and its weight; sigma is a whole number."""
    height, width = size
    heatmap = np.zeros(size)
    if not labelled:
        return heatmap, 0
    middle_x, middle_y = int(x + 0.5), int(y + 0.5)  # towards 0, as a conversion to whole numbers goes
    reach = 3 * sigma
    left, right, top, bottom = middle_x - reach, middle_x + reach, middle_y - reach, middle_y + reach  # all inclusive
    if left >= width or top >= height or right + 1 < 0 or bottom + 1 < 0:
        return heatmap, 0
    for row in range(max(0, top), min(height - 1, bottom) + 1):
        for column in range(max(0, left), min(width - 1, right) + 1):
            heatmap[row, column] = math.exp(-((column - x) ** 2 + (row - y) ** 2) / (2 * sigma ** 2))
    return heatmap, 1


def encode(points, visible, size, sigma):
    """`encode_heatmaps` of points (K, 2) that are given in pixels of the heatmap, for an input four times as large."""
    height, width = size
    factor = (np.array([4 * width, 4 * height]) - 1) / (np.array([width, height]) - 1)
    keypoints = torch.tensor(points * factor, dtype=torch.float64)[None]
    heatmaps, weights = encode_heatmaps(keypoints, torch.tensor(visible)[None], (4 * height, 4 * width), size, sigma)
    return heatmaps[0].numpy(), weights[0].numpy()


@pytest.mark.parametrize("size, sigma", [((64, 48), 2), ((64, 64), 2), ((64, 64), 1)])
def test_targets_are_udpheatmaps_up_to_three_sigma_outside(size, sigma):
    rng, count = np.random.default_rng(0), 400
    sides = np.array([size[1], size[0]])
    points = rng.uniform(-3 * sigma, sides - 1 + 3 * sigma, (count, 2))
    points[0], points[1] = (5.5, 7.5), (-3 * sigma, 10)  # a half is rounded up, and the band's very edge counts
    visible = rng.choice([0.0, 1.0, 2.0], count)
    visible[:2] = 2
    outside = ((points < 0) | (points > sides - 1)).any(1)
    assert outside.sum() > 50
    heatmaps, weights = encode(points, visible, size, sigma)
    for point, v, heatmap, weight in zip(points, visible, heatmaps, weights):
        expected, expected_weight = udp_heatmap(*point, v > 0, size, sigma)
        assert weight == expected_weight == (v > 0), point
        np.testing.assert_allclose(heatmap, expected, atol=1e-6, err_msg=str(point))


@pytest.mark.parametrize("sigma", [1, 2])
def test_a_keypoint_farther_outside_than_its_gaussian_reaches_has_no_weight(sigma):
    size, far = (64, 48), 3 * sigma + 3
    points = np.array([(-far, 20.0), (48 + far, 20.0), (20.0, -far), (20.0, 64 + far)])
    assert [udp_heatmap(*point, True, size, sigma)[1] for point in points] == [0] * 4
    heatmaps, weights = encode(points, np.full(4, 2.0), size, sigma)
    assert not weights.any() and not heatmaps.any()


def test_the_labels_of_a_crop_keep_keypoints_that_lie_just_outside(tmp_path):
    keypoints = np.full((17, 3), 2.0)
    keypoints[:, :2] = 62, 60  # inside
    box = [45.0, 30.0, 35.0, 60.0]  # padded and of the crop's shape: x from 34.4 to 90.6, y from 22.5 to 97.5
    keypoints[:4, :2] = (31.5, 60), (93.5, 60), (60, 19.5), (60, 100.5)  # 3 pixels outside, 2.5 cells of the heatmap
    keypoints[4:8, :2] = (19, 60), (106, 60), (60, 7), (60, 113)  # 15 pixels outside, 12.6 cells
    still = replace(VITPOSE, flip_probability=0.0, half_body=0.0, scale=0.0, box_shift=0.0, rotation=0.0)
    item = Crops(one_person(tmp_path, keypoints, box), (256, 192), still)[0, 0]
    heatmaps, weights = encode_heatmaps(item["keypoints"][None], item["visible"][None], (256, 192), (64, 48), 2.0)
    assert weights[0].tolist() == [1] * 4 + [0] * 4 + [1] * 9
    assert (heatmaps[0].amax((1, 2)) > 0.1).tolist() == [True] * 4 + [False] * 4 + [True] * 9


# ----------------------------------------------------------------------------------- learning rates

def people(count):
    """Stands for a data set of so many people."""
    return SimpleNamespace(name="people", annotated=range(count), ids=range(count))


def vlpose_plan(per_epoch, *arguments):
    """The stages of VLPose by the paper's recipe, for data of so many batches."""
    options = parse_options(["--mode", "vlpose", "--recipe", "paper", "--batch-size", "8", *arguments])
    base = SimpleNamespace(config=MODEL_CONFIGS[options.size])
    plan = plan_vlpose(options, base, people(8 * per_epoch - 3), people(8 * per_epoch - 3))
    return plan["base"], plan["adapt"]


def uda_plan(*arguments):
    options = parse_options(["--mode", "uda", "--recipe", "paper", *arguments])
    sets = SimpleNamespace(source=people(1000), target=people(1000))
    plan = plan_uda(options, stylist=True, restyle=True, data=sets)
    return plan["style"], plan["source"], plan["adapt"]


@pytest.mark.parametrize("per_epoch", [30, 123])
def test_vitposes_learning_rate_is_mmposes(per_epoch):
    """Linear from 0.001 in 500 steps; ×0.1 from epoch 170 and again from epoch 200, of 210."""
    for stage in vlpose_plan(per_epoch):
        assert stage.steps == 210 * per_epoch
        for step in range(stage.steps):
            warm_up = min(1.0, 0.001 + 0.999 * step / 499)
            epoch = step // per_epoch
            expected = warm_up * (0.1 if epoch >= 170 else 1) * (0.1 if epoch >= 200 else 1)
            assert learning_rate(step, stage) == pytest.approx(expected, abs=0.0012), step


def test_vlposes_rate_is_scaled_from_a_batch_of_512_as_mmpose_does():
    for arguments, rate in (([], 5e-4 * 8 / 512), (["--batch-size", "64"], 6.25e-5), (["--batch-size", "512"], 5e-4),
                            (["--batch-size", "16", "--lr", "1e-3", "--base-lr", "1e-3"], 1e-3 / 32)):
        assert [stage.lr for stage in vlpose_plan(30, *arguments)] == pytest.approx([rate] * 2)


def test_vlposes_optimizer_is_vitposes_and_the_best_of_every_tenth_epoch_is_kept():
    base, adapt = vlpose_plan(30)
    for stage in (base, adapt):
        assert (stage.optimizer, stage.weight_decay, stage.clip, stage.steady) == ("adamw", 0.1, 1.0, "")
    assert (adapt.validate_every, adapt.select, adapt.layer_decay) == (300, "best", 1.0)
    assert vlpose_plan(30, "--strategy", "full", "--size", "huge")[1].layer_decay == 0.85


def test_learning_from_labels_has_a_constant_rate():
    _, stage, _ = uda_plan()
    assert {stage.lr * learning_rate(step, stage) for step in range(stage.steps)} == {1e-4} and stage.steps == 20_000


def test_adapting_the_students_rate_falls_after_4_and_19_of_30_epochs():
    """The authors' milestones are epochs 45 and 60 of 70, the first 40 of which are stage 1. Their scheduler steps
    before each epoch, so that both come one epoch early."""
    rates, counter = [], 0
    for epoch in range(70):
        counter += 1
        rates.append(0.1 ** ((counter >= 45) + (counter >= 60)))
    for per_epoch in (10, 500):
        *_, stage = uda_plan("--steps", str(30 * per_epoch))
        ours = [learning_rate(step, stage) for step in range(30 * per_epoch)]
        assert ours == pytest.approx(np.repeat(rates[40:], per_epoch).tolist())
        assert np.mean(ours) == pytest.approx(0.187, abs=5e-4)
        assert stage.lr == 1e-4 and stage.steady == "discriminator."  # whose rate does not fall


def test_alignment_is_trained_by_adam_without_decay_clipping_or_warm_up():
    style, source, adapt = uda_plan()
    for stage in (style, source, adapt):
        assert (stage.optimizer, stage.weight_decay, stage.clip, stage.warm_up) == ("adam", 0.0, 0.0, 0)
    assert (style.steps, style.lr, style.batch_size, source.steps, adapt.steps) == (500_000, 1e-5, 16, 20_000, 15_000)
    assert source.batch_size == adapt.batch_size == 32
