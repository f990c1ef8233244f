"""eval.py against pycocotools, rule by rule and on random data; PCK, NMS and the error kinds against plain loops."""
import contextlib
import copy
import io
import json
import re
from dataclasses import dataclass, fields, make_dataclass, replace

import numpy as np
import pytest

from conftest import ROOT, run_program
from data import COCO17, DataError
from eval import (THRESHOLDS, EvalOptions, Parser, check_options, coco_results, evaluate_domains,
                  evaluate_oks, evaluate_pck, flag_of, keypoint_similarity, main, match_one_image,
                  object_keypoint_similarity, oks_nms, option, read_scenes)

SIGMAS = {K: np.random.default_rng(K).uniform(0.02, 0.12, K) for K in (1, 14, 21, 26, 133)} | {17: COCO17.sigmas}


def pycocotools(annotations, results, sigmas=COCO17.sigmas, image_ids=None):
    """The ten numbers and the ten printed lines."""
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    annotations, results = copy.deepcopy((annotations, results))  # it writes into both
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        people = coco.COCO()
        people.dataset = annotations
        people.createIndex()
        evaluation = cocoeval.COCOeval(people, people.loadRes(results), "keypoints")
        evaluation.params.kpt_oks_sigmas = np.asarray(sigmas)
        evaluation.params.imgIds = evaluation.params.imgIds if image_ids is None else image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        printed.truncate(printed.seek(0))
        evaluation.summarize()
    return evaluation, printed.getvalue()


def evaluate(annotations, results, sigmas=COCO17.sigmas):
    """`evaluate_oks`, rounded, once it agrees with pycocotools."""
    numbers = evaluate_oks(annotations, results, sigmas)
    assert list(numbers.values()) == pytest.approx(pycocotools(annotations, results, sigmas)[0].stats, abs=1e-12, rel=0)
    return {name: round(value, 12) for name, value in numbers.items()}


# ------------------------------------------------------------------------------------ one rule each

def scene(*people, images=(1,), categories=(1,)):
    """COCO annotations of these people, numbered from 1."""
    return {"images": [{"id": i, "file_name": f"{i}.jpg"} for i in images],
            "categories": [{"id": c, "keypoints": list(COCO17.names)} for c in categories],
            "annotations": [{"id": n + 1, **person} for n, person in enumerate(people)]}


def person(x=0.0, labelled=17, size=100.0, image=1, **more):
    """17 keypoints in a column at x, the first few labelled; more fields override those made here."""
    keypoints = [value for k in range(17) for value in (x, 10 * k, 2 * (k < labelled))]
    return {"image_id": image, "category_id": 1, "keypoints": keypoints, "num_keypoints": labelled, "iscrowd": 0,
            "area": size ** 2, "bbox": [x, 0, size, size]} | more


def pose(x=0.0, score=0.5, width=100.0, image=1, **more):
    """Finds `person(x)`, with OKS 1. Its area is that of its box; its width says nothing else."""
    keypoints = [value for k in range(17) for value in (x, 10 * k, 1)]
    return {"image_id": image, "category_id": 1, "keypoints": keypoints, "score": score,
            "bbox": [0, 0, width, width]} | more


def test_a_perfect_pose_is_worth_1_and_sizes_that_nobody_has_are_worth_minus_1():
    assert evaluate(scene(person(size=50)), [pose()]) == {
        "AP": 1, "AP .5": 1, "AP .75": 1, "AP (M)": 1, "AP (L)": -1,
        "AR": 1, "AR .5": 1, "AR .75": 1, "AR (M)": 1, "AR (L)": -1}


def test_of_two_poses_of_one_person_the_second_is_wrong():
    numbers = evaluate(scene(person(), person(300)), [pose(score=0.9), pose(score=0.8), pose(300, score=0.7)])
    assert numbers["AR"] == 1 and numbers["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_a_crowd_need_not_be_found_and_forgives_any_number_of_poses():
    numbers = evaluate(scene(person(), person(300, iscrowd=1)), [pose(300, 0.9), pose(300, 0.8), pose(score=0.7)])
    assert numbers["AP"] == numbers["AR"] == 1


def test_an_ignored_person_who_is_no_crowd_forgives_one_pose():
    annotations = scene(person(), person(300, num_keypoints=0))
    assert evaluate(annotations, [pose(300, 0.9), pose(score=0.7)])["AP"] == 1
    assert evaluate(annotations, [pose(300, 0.9), pose(300, 0.8), pose(score=0.7)])["AP"] == pytest.approx(0.5)


@pytest.mark.parametrize("x, ap", [(399, 1.0), (401, 0.5)])  # the box is 100 wide and grows by 100 on both sides
def test_a_person_without_keypoints_forgives_a_pose_within_the_grown_box(x, ap):
    annotations = scene(person(), person(200, labelled=0, area=1e-3, bbox=[200, 0, 100, 200]))
    assert evaluate(annotations, [pose(x, 0.9), pose(score=0.7)])["AP"] == pytest.approx(ap)


def test_a_person_is_compared_by_labelled_keypoints_whatever_num_keypoints_says():
    half = pose()
    half["keypoints"][30:] = [1000.0] * 21
    assert evaluate(scene(person(labelled=10, num_keypoints=3)), [half])["AP"] == 1
    assert evaluate(scene(person(labelled=17, num_keypoints=3)), [half])["AP"] < 0.5
    assert evaluate(scene(person(labelled=0, num_keypoints=3)), [pose(image=1)])["AP"] == 1


def test_a_person_of_96_by_96_pixels_is_both_medium_and_large():
    numbers = evaluate(scene(person(size=96)), [pose()])
    assert numbers["AP (M)"] == numbers["AP (L)"] == 1
    assert evaluate(scene(person(size=32)), [pose()])["AP (M)"] == 1
    assert evaluate(scene(person(area=1023.9)), [pose()])["AP (M)"] == -1


@pytest.mark.parametrize("width, ap", [(10, 1.0), (96, 0.5), (100, 1.0)])
def test_a_wrong_pose_counts_only_where_its_own_size_belongs(width, ap):
    numbers = evaluate(scene(person(size=50)), [pose(900, 0.9, width), pose(score=0.8, width=50)])
    assert numbers["AP (M)"] == pytest.approx(ap)


def test_the_size_of_a_pose_is_its_extent_unless_the_first_result_has_a_box():
    annotations, wrong, right = scene(person(size=50)), pose(900, 0.9, 50), pose()
    without = [{key: value for key, value in result.items() if key != "bbox"} for result in (wrong, right)]
    assert evaluate(annotations, [wrong, right])["AP (M)"] == pytest.approx(0.5)
    assert evaluate(annotations, without)["AP (M)"] == 1  # a column: its extent is 0
    assert evaluate(annotations, [without[0], right])["AP (M)"] == 1


def test_only_the_20_best_poses_of_an_image_count():
    wrong = [pose(900 + 50 * i, 0.9) for i in range(20)]
    assert evaluate(scene(person()), [*wrong[:19], pose()])["AR"] == 1
    assert evaluate(scene(person()), [*wrong, pose()])["AR"] == 0


def test_equal_scores_stay_in_the_order_of_the_file_and_images_in_the_order_of_their_ids():
    assert evaluate(scene(person()), [pose(), pose(900)])["AP"] == 1
    assert evaluate(scene(person()), [pose(900), pose()])["AP"] == pytest.approx(0.5)
    assert evaluate(scene(person(image=7), images=(9, 7)), [pose(image=9), pose(image=7)])["AP"] == 1
    assert evaluate(scene(person(image=7), images=(5, 7)), [pose(image=7), pose(image=5)])["AP"] == pytest.approx(0.5)


def test_of_equally_similar_people_the_later_one_is_found():
    whole, half, half_right = person(), person(labelled=9), pose(score=0.4)
    half_right["keypoints"][27:] = [1000.0] * 24  # OKS 1 with one of them, 9 / 17 with the other
    assert evaluate(scene(half, whole), [pose(), half_right])["AR .75"] == 1
    assert evaluate(scene(whole, half), [pose(), half_right])["AR .75"] == 0.5


def test_a_person_who_counts_is_preferred_to_a_more_similar_one_who_does_not():
    annotations = scene(person(3), person(0, iscrowd=1))
    assert 0.5 < evaluate(annotations, [pose()])["AR"] < 1


def test_an_image_without_people_costs_precision_and_one_without_poses_recall():
    annotations = scene(person(), person(image=2), images=(1, 2, 3, 4))
    numbers = evaluate(annotations, [pose(image=3, score=0.9), pose(score=0.8)])
    assert numbers["AP"] == pytest.approx(51 / 101 / 2) and numbers["AR"] == 0.5


def test_without_anybody_to_find_every_number_is_minus_1():
    for annotations in (scene(), scene(person(iscrowd=1)), scene(person(num_keypoints=0))):
        assert set(evaluate(annotations, [pose()]).values()) == {-1}


def test_several_categories_are_averaged_and_those_not_listed_do_not_count():
    annotations = scene(person(), person(category_id=2), categories=(1, 2, 3))
    assert evaluate(annotations, [pose(), pose(category_id=9, score=0.9)])["AP"] == 0.5
    assert evaluate(annotations, [pose(category_id=2), pose()])["AP"] == 1
    assert evaluate(scene(person()), [pose(category_id=2)])["AP"] == 0


def test_people_in_images_or_categories_that_are_not_listed_do_not_exist():
    assert evaluate(scene(person(), person(image=5), person(category_id=5)), [pose()])["AR"] == 1


def test_a_person_with_id_0_is_never_found_because_pycocotools_reads_0_as_nobody():
    assert evaluate(scene(person() | {"id": 0}), [pose()])["AR"] == 0
    assert evaluate(scene(person() | {"id": -1}), [pose()])["AR"] == 1


# -------------------------------------------------------------------------------------- random data

def random_case(seed):
    """Annotations, results and sigmas in which all the rules meet.

    Coordinates on a coarse grid and few different scores make for many ties; sizes lie at and around the limits.
    """
    rng = np.random.default_rng(seed)
    K = int(rng.choice([1, 14, 17, 17, 17, 21, 26, 133]))
    grid, levels = rng.choice([1, 8, 40]), int(rng.choice([2, 4, 1000]))
    image_ids = [int(i) for i in rng.choice(50, rng.integers(1, 9), replace=False) * rng.choice([1, 10 ** 12])]
    categories = [int(c) for c in rng.choice(9, rng.choice([1, 1, 1, 2, 3]), replace=False)]
    people, results, numbers = [], [], iter(rng.permutation(400).tolist())
    for image in image_ids:
        here = []
        for _ in range(rng.choice([0, 1, 2, 3, 6, 25], p=[0.15, 0.3, 0.2, 0.2, 0.1, 0.05])):
            size, center = np.exp(rng.uniform(2.5, 6)), rng.uniform(0, 500, 2)
            points, flags = center + rng.uniform(-0.5, 0.5, (K, 2)) * size, rng.choice([0, 1, 2], K)
            if rng.random() < 0.3:
                flags[:] = rng.choice([0, 2])
            if here and rng.random() < 0.3:  # in the same place as somebody else
                points, flags = here[rng.integers(len(here))]
            here.append((points := np.round(points / grid) * grid, flags))
            people.append({
                "id": next(numbers), "image_id": image, "category_id": int(rng.choice(categories)),
                "iscrowd": int(rng.random() < 0.15), "keypoints": np.column_stack([points, flags]).ravel().tolist(),
                "num_keypoints": int((flags > 0).sum()) if rng.random() < 0.9 else int(rng.integers(3)),
                "area": float(rng.choice([size ** 2, 0, 1023.9, 1024, 9216, 9216.1, 2e10], p=[0.7, *[0.05] * 6])),
                "bbox": [*(center - size / 2).round(1).tolist(), round(size), round(size * rng.uniform(0.5, 1))]})
        for _ in range(rng.choice([0, 1, 3, 8, 25], p=[0.15, 0.2, 0.3, 0.2, 0.15])):
            points = rng.uniform(0, 500, (K, 2))
            if here and rng.random() < 0.8:
                points = here[rng.integers(len(here))][0]
                points = points + rng.standard_normal((K, 2)) * np.ptp(points) * rng.choice([0, 0.01, 0.05, 0.1, 0.5])
                if rng.random() < 0.2:  # half way to somebody else
                    points = (points + here[0][0]) / 2
            points = np.round(points / grid) * grid
            results.append({
                "image_id": image, "category_id": int(rng.choice(categories)) if rng.random() < 0.97 else 99,
                "keypoints": np.column_stack([points, rng.random(K)]).ravel().tolist(),
                "score": int(rng.integers(levels)) / levels})
    if not results:
        results = [{"image_id": image_ids[0], "category_id": categories[0], "keypoints": [1.0] * 3 * K, "score": 0.5}]
    if rng.random() < 0.15:
        results = [result | {"bbox": rng.uniform(0, 150, 4).tolist()} for result in results]
    rng.shuffle(people)
    rng.shuffle(results)
    folders = rng.choice(["sketch", "oil_painting"], len(image_ids))
    images = [{"id": i, "file_name": f"HumanArt/images/{name}/{i}.jpg"} for i, name in zip(image_ids, folders)]
    annotations = {"images": images, "categories": [{"id": c} for c in categories], "annotations": people}
    return annotations, results, SIGMAS[K]


@pytest.fixture
def case17():
    """A random case with COCO's keypoints and much to find."""
    return next(case[:2] for case in map(random_case, range(99)) if len(case[1]) > 40 and len(case[2]) == 17)


@pytest.mark.parametrize("block", range(6))
def test_on_random_data_all_ten_numbers_are_those_of_pycocotools(block):
    for seed in range(40 * block, 40 * block + 40):
        annotations, results, sigmas = random_case(seed)
        evaluate(annotations, results, sigmas)


def test_on_random_data_every_oks_is_that_of_pycocotools_to_the_last_bit():
    for seed in range(30):
        annotations, results, sigmas = random_case(seed)
        scenes, sigmas = read_scenes(annotations, results, sigmas)
        peer = pycocotools(annotations, results, sigmas)[0].ious
        for image, scene in zip(sorted(record["id"] for record in annotations["images"]), scenes):
            oks = object_keypoint_similarity(scene.people, scene.detections, sigmas)
            detected, annotated = scene.detections.category_id, scene.people.category_id
            assert not oks[detected[:, None] != annotated].any()
            for category in {*detected.tolist()} & {*annotated.tolist()}:
                found = oks[detected == category][:, annotated == category]
                assert np.array_equal(found, peer[image, category]), seed


def plain_match(oks, ignored, crowd, threshold):
    """COCO's greedy matching as a plain loop: the row of the person for each detection, or -1."""
    matched, free = [], [True] * len(ignored)
    for row in oks:
        possible = [p for p in range(len(row)) if free[p] and row[p] >= threshold]
        best = max(possible, key=lambda p: (not ignored[p], row[p], p), default=-1)
        if best >= 0:
            free[best] = crowd[best]
        matched.append(best)
    return matched


def test_matching_gives_what_a_plain_loop_gives_at_each_threshold():
    rng = np.random.default_rng(0)
    several = contested = 0
    for _ in range(1500):
        count = rng.integers(8)
        crowd, ignored = rng.random(count) < 0.2, rng.random(count) < 0.3
        levels = [0, 0.2, *THRESHOLDS, 0.97, 1] if rng.random() < 0.5 else [0.4, 0.8]  # many ties
        oks = rng.choice(levels, (rng.integers(12), count))
        matched = match_one_image(oks, ignored, crowd, THRESHOLDS)
        assert matched.shape == (len(THRESHOLDS), len(oks))
        for threshold, row in zip(THRESHOLDS, matched):
            plain = plain_match(oks, ignored, crowd, threshold)
            assert row.tolist() == plain
            several += len(set(plain) - {-1}) > 1
            contested += -1 in plain and count > 0
    assert min(several, contested) > 1000  # there was something to decide


def test_matching_prefers_people_who_are_not_ignored_then_the_more_similar_then_the_last():
    oks, nobody = np.array([[0.6, 0.9, 0.6]]), np.zeros(3, bool)
    second = np.array([False, True, False])
    assert match_one_image(oks, nobody, nobody, [0.5]).tolist() == [[1]]
    assert match_one_image(oks, second, nobody, [0.5]).tolist() == [[2]]
    assert match_one_image(oks, nobody, nobody, [0.95]).tolist() == [[-1]]
    twice = oks.repeat(2, axis=0)
    assert match_one_image(twice, nobody, nobody, [0.7]).tolist() == [[1, -1]]
    assert match_one_image(twice, nobody, second, [0.7]).tolist() == [[1, 1]]  # a crowd


def test_the_numbers_of_a_domain_are_those_of_pycocotools_on_its_images():
    for seed in range(30):
        annotations, results, sigmas = random_case(seed)
        _, domains = evaluate_domains(annotations, results, sigmas)
        for domain, numbers in domains.items():
            ids = [image["id"] for image in annotations["images"] if domain.replace(" ", "_") in image["file_name"]]
            expected = pycocotools(annotations, results, sigmas, ids)[0].stats
            assert list(numbers.values()) == pytest.approx(expected, abs=1e-12, rel=0), seed


def test_a_domain_without_anybody_is_listed_too():
    annotations = scene(person(), images=(1, 2))
    annotations["images"][1]["category"] = "oil_painting"
    numbers, domains = evaluate_domains(annotations, [pose()])
    assert domains["photo"] == numbers == evaluate_oks(annotations, [pose()])
    assert list(domains) == ["oil painting", "photo"]
    assert set(domains["oil painting"].values()) == {-1}


def test_faster_coco_eval_gives_the_same_numbers(case17):
    faster = pytest.importorskip("faster_coco_eval")
    annotations, results = case17
    numbers = evaluate_oks(annotations, results)
    with contextlib.redirect_stdout(io.StringIO()):
        people = faster.COCO(copy.deepcopy(annotations))
        evaluation = faster.COCOeval_faster(people, people.loadRes(copy.deepcopy(results)), "keypoints")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert list(numbers.values()) == pytest.approx(list(evaluation.stats[:10]), abs=1e-12)


def test_the_order_of_the_keys_is_that_of_coco_and_the_arguments_stay_as_they_are():
    annotations, results, sigmas = random_case(1)
    before = copy.deepcopy((annotations, results))
    assert list(evaluate_oks(annotations, results, sigmas)) == [
        "AP", "AP .5", "AP .75", "AP (M)", "AP (L)", "AR", "AR .5", "AR .75", "AR (M)", "AR (L)"]
    assert (annotations, results) == before


# ------------------------------------------------------------------------------------- real samples

def perturbed(annotations, seed=0):
    """Results that a decent model might give: every person with noise, some of them twice."""
    rng, results = np.random.default_rng(seed), []
    for record in annotations["annotations"] + annotations["annotations"][::2]:
        keypoints = np.array(record["keypoints"], float).reshape(-1, 3)
        noise = np.sqrt(record["area"]) * rng.choice([0.01, 0.05, 0.1])
        keypoints[:, :2] += rng.standard_normal((len(keypoints), 2)) * noise
        results.append({"image_id": record["image_id"], "category_id": record["category_id"], "score": rng.random(),
                        "keypoints": keypoints.ravel().tolist()})
    return results


@pytest.mark.parametrize("file, K", [
    ("coco/person_keypoints_train2017.json", 17), ("humanart/test_humanart.json", 17),
    ("animals/ap10k/test_ap10k.json", 17), ("animals/animalpose/test_animalpose.json", 20),
    ("animals/horse10/test_horse10.json", 22)])
def test_real_annotations_give_the_numbers_of_pycocotools(real, file, K, tmp_path):
    annotations = json.loads((real / file).read_text("utf-8"))
    results = perturbed(annotations)
    sigmas = COCO17.sigmas if K == 17 else np.full(K, 0.05)
    numbers = evaluate(annotations, results, sigmas)
    assert 0 < numbers["AP"] < 1
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert evaluate_oks(real / file, tmp_path / "results.json", sigmas) == evaluate_oks(annotations, results, sigmas)


def test_human_art_domains_are_read_from_its_own_field_names(real):
    annotations = json.loads((real / "humanart/test_humanart.json").read_text("utf-8"))
    assert set(evaluate_domains(annotations, perturbed(annotations))[1]) >= {"digital art"}


# -------------------------------------------------------------------------- poses in detected boxes

def test_the_score_of_a_pose_is_the_mean_of_its_keypoints_above_0_2():
    keypoint_scores = np.array([[0.9, 0.5, 0.2, 0.1], [0.2, 0.1, 0.0, 0.0]])
    results = coco_results(np.array([7, 8]), np.arange(16).reshape(2, 4, 2), keypoint_scores)
    assert [result["score"] for result in results] == pytest.approx([0.7, 0])
    assert results[0] | {"score": None} == {
        "image_id": 7, "category_id": 1, "keypoints": [0, 1, 0.9, 2, 3, 0.5, 4, 5, 0.2, 6, 7, 0.1], "score": None}


def plain_oks_nms(keypoints, scores, areas, images, threshold, sigmas):
    """As mmpose does it, image by image."""
    kept = []
    for image in np.unique(images):
        order = sorted(np.flatnonzero(images == image), key=lambda n: -scores[n])
        while order:
            best, *order = order
            kept.append(best)
            order = [n for n in order if np.exp(-((keypoints[n] - keypoints[best]) ** 2).sum(1) / (2 * sigmas) ** 2 / (
                (areas[n] + areas[best]) / 2 + np.spacing(1)) / 2).mean() <= threshold]
    return sorted(kept)


def test_oks_nms_keeps_what_a_plain_loop_keeps():
    rng = np.random.default_rng(0)
    for threshold in (0.3, 0.6, 0.9):
        people = rng.uniform(0, 300, (30, 17, 2))[rng.integers(30, size=400)]
        keypoints = people + rng.standard_normal((400, 17, 2)) * rng.choice([1, 5, 10], (400, 1, 1))
        scores, areas, images = rng.integers(50, size=400) / 50, rng.uniform(1e3, 2e4, 400), rng.integers(10, size=400)
        kept = oks_nms(keypoints, scores, areas, images, threshold)
        assert kept.tolist() == plain_oks_nms(keypoints, scores, areas, images, threshold, COCO17.sigmas)
        assert 50 < len(kept) < 390


def test_a_pose_that_was_removed_removes_nobody():
    keypoints = np.zeros((3, 17, 2)) + np.array([0, 9, 18])[:, None, None]
    arguments = np.array([0.9, 0.8, 0.7]), np.full(3, 1e4), np.zeros(3)
    assert oks_nms(keypoints[:2], *(a[:2] for a in arguments), 0.5).tolist() == [0]
    assert oks_nms(keypoints[1:], *(a[1:] for a in arguments), 0.5).tolist() == [0]
    assert oks_nms(keypoints, *arguments, 0.5).tolist() == [0, 2]
    assert oks_nms(keypoints * 0, *arguments, 1.0).tolist() == [0, 1, 2]  # OKS 1 is not above 1
    assert oks_nms(keypoints[:0], *(a[:0] for a in arguments)).tolist() == []


# ---------------------------------------------------------------------------------------------- PCK

def plain_pck(predicted, target, visible, size, threshold, groups):
    N, K = visible.shape
    joints = []
    for k in range(K):
        people = [n for n in range(N) if visible[n, k] > 0]
        hits = [np.hypot(*(predicted[n, k] - target[n, k])) < threshold * size[n] for n in people]
        joints.append(sum(hits) / len(hits) if hits else None)

    def mean(group):
        values = [joints[k] for k in group if joints[k] is not None]
        return sum(values) / len(values) if values else -1

    used = sorted({k for group in groups.values() for k in group})
    return {name: mean(group) for name, group in groups.items()} | {"mean": mean(used)}


def test_pck_is_that_of_a_plain_loop():
    rng = np.random.default_rng(0)
    for N in (1, 5, 50):
        target, visible = rng.uniform(0, 256, (N, 17, 2)), rng.choice([0, 1, 2], (N, 17), p=[0.6, 0.2, 0.2])
        predicted, size = target + rng.normal(0, 10, (N, 17, 2)), rng.uniform(200, 300, N)
        visible[:, [15, 16]] = 0  # nobody has ankles
        assert evaluate_pck(predicted, target, visible, size, 0.05, COCO17.groups) == pytest.approx(
            plain_pck(predicted, target, visible, size, 0.05, COCO17.groups))
        assert evaluate_pck(predicted, target, visible, 256) == pytest.approx(
            {"mean": plain_pck(predicted, target, visible, np.full(N, 256), 0.05, {"all": range(17)})["mean"]})


def test_the_pck_of_joints_that_nobody_has_labelled_is_minus_1_and_does_not_touch_the_mean():
    zeros, visible = np.zeros((2, 3, 2)), np.array([[1, 0, 0], [1, 1, 0]])
    groups = {"first": [0], "second and third": [1, 2], "third": [2]}
    assert evaluate_pck(zeros, zeros, visible, 100, groups=groups) == {
        "first": 1, "second and third": 1, "third": -1, "mean": 1}
    assert evaluate_pck(zeros, zeros, visible * 0, 100) == {"mean": -1}


def test_the_mean_pck_is_over_the_joints_of_the_groups_and_each_joint_weighs_the_same():
    target = np.zeros((1, 4, 2))
    predicted = target + np.array([0, 0, 100, 100])[None, :, None]
    groups = {"two right": [0, 1], "one wrong": [2]}  # the fourth is in none
    assert evaluate_pck(predicted, target, np.ones((1, 4)), 100, groups=groups)["mean"] == pytest.approx(2 / 3)


def test_a_keypoint_at_exactly_the_threshold_is_wrong():
    target = np.zeros((1, 2, 2))
    predicted = np.array([[[0, 6.4], [0, 6.39]]])
    assert evaluate_pck(predicted, target, np.ones((1, 2)), 64, 0.1)["mean"] == 0.5


@pytest.mark.parametrize("shapes", [((2, 3, 2), (2, 4, 2), (2, 3), ()), ((2, 3, 2), (2, 3, 2), (2, 4), ()),
                                    ((2, 3, 3), (2, 3, 3), (2, 3), ()), ((2, 3, 2), (2, 3, 2), (2, 3), (3,))])
def test_pck_refuses_arrays_that_do_not_fit_together(shapes):
    with pytest.raises(DataError, match="expected predicted and target"):
        evaluate_pck(*map(np.ones, shapes))


# ------------------------------------------------------------------------------- images in results

def renamed(records, field, ids):
    """Records with other ids of images: ids[0] stands for image 1, and so on."""
    return [record | {field: ids[record[field] - 1]} for record in records]


@pytest.mark.parametrize("ids", [["img-b", "img-a"], [2 ** 63 + 5, 2 ** 63 + 4], ["7", "10"], [0, -3]])
def test_ids_of_images_may_be_texts_and_any_integers_as_in_pycocotools(ids):
    annotations = scene(person(), person(300, image=2), images=(1, 2))
    results = [pose(5, image=1), pose(300, 0.4, image=2), pose(900, 0.7, image=2)]
    annotations["images"] = renamed(annotations["images"], "id", ids)
    annotations["annotations"] = renamed(annotations["annotations"], "image_id", ids)
    evaluate(annotations, renamed(results, "image_id", ids))


@pytest.mark.parametrize("names", [
    ["a/0007.jpg", "a/0008.jpg"], ["0007.jpg", "0008.jpg"], ["0007", "0008"], ["a/0007", "a/0008"],
    [7, 8], ["1001", "1002"]])
def test_results_may_name_images_by_their_files_if_none_has_an_id(names):
    annotations = scene(person(), person(300, image=2), images=(1, 2))
    results = [pose(5, image=1), pose(300, 0.4, image=2), pose(900, 0.7, image=2)]
    truth = evaluate_oks(annotations, results)
    annotations["images"] = [{"id": 1001, "file_name": "a/0007.jpg"}, {"id": 1002, "file_name": "a/0008.jpg"}]
    annotations["annotations"] = renamed(annotations["annotations"], "image_id", [1001, 1002])
    assert evaluate_oks(annotations, renamed(results, "image_id", names)) == truth
    with pytest.raises(DataError, match="result 1: image_id .* is no image"):  # some are ids
        evaluate_oks(annotations, renamed(results, "image_id", [1001, names[1]]))


def test_a_name_that_two_images_have_is_refused():
    annotations = scene(person())
    annotations["images"] = [{"id": 1, "file_name": "a/x.jpg"}, {"id": 2, "file_name": "b/x.jpg"}]
    with pytest.raises(DataError, match="result 0: image_id 'x.jpg' is no image"):
        evaluate_oks(annotations, [pose(image="x.jpg")])


def test_annotation_id_0_keeps_pycocotools_number_which_is_said(tmp_path, capsys):
    annotations = scene(person(), person(300))
    annotations["annotations"][0]["id"] = 0
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(annotations))
    results = [pose(), pose(300)]
    assert evaluate_oks(path, results) == pytest.approx(evaluate(annotations, results), abs=1e-9)
    assert f"{path}: as in pycocotools, nobody finds annotation id 0" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- bad input

BAD_INPUT = {  # what is done to a scene's people p and results r, and what is said about it
    "an unknown image": (lambda p, r: r[1].update(image_id=5), "result 1: image_id 5 is no image of the annotations"),
    "a short pose": (lambda p, r: r[1].update(keypoints=[1, 2]), "result 1, image_id 1: expected 51 .* found 2 values"),
    "a nested pose": (lambda p, r: r[1].update(keypoints=[[1, 2]] * 17), "found 17 values, among them .1, 2"),
    "no pose": (lambda p, r: r[1].pop("keypoints"), "result 1, .* in 'keypoints', found nothing"),
    "a coordinate NaN": (lambda p, r: r[1]["keypoints"].__setitem__(4, np.nan), "result 1, .*among them nan"),
    "an infinite coordinate": (lambda p, r: r[0]["keypoints"].__setitem__(4, -np.inf), "result 0, .*among them -inf"),
    "a coordinate that is text": (lambda p, r: r[0]["keypoints"].__setitem__(4, "7"), "result 0, .*among them '7'"),
    "score NaN": (lambda p, r: r[1].update(score=np.nan), "result 1, .* one finite number in 'score', found nan"),
    "score null": (lambda p, r: r[1].update(score=None), "result 1, .*found None"),
    "score as text": (lambda p, r: r[1].update(score="0.5"), "result 1, .*found '0.5'"),
    "no score": (lambda p, r: r[1].pop("score"), "result 1, .* in 'score', found nothing"),
    "no category": (lambda p, r: r[1].pop("category_id"), "result 1, .* in 'category_id', found nothing"),
    "a result that is a number": (lambda p, r: r.__setitem__(0, 7), "result 0: expected one integer in 'category_id'"),
    "a fraction as an image": (lambda p, r: r[0].update(image_id=1.5), "result 0, .* text in 'image_id', found 1.5"),
    "a box in the first result only": (lambda p, r: r[1].pop("bbox"), "result 1, .* 4 finite numbers in 'bbox'"),
    "masks": (lambda p, r: r[0].update(bbox=[], segmentation=[]), "result 0: .*found a 'segmentation'"),
    "no results": (lambda p, r: r.clear(), "results.*: expected a list of results, found an empty one"),
    "a short person": (lambda p, r: p[1]["keypoints"].pop(), "annotation 1, id 2, .*51 .*found 50 values"),
    "a person's coordinate NaN": (lambda p, r: p[0]["keypoints"].__setitem__(0, np.nan), "annotation 0, .*them nan"),
    "no area": (lambda p, r: p[1].pop("area"), "annotation 1, id 2, image_id 1: .*'area', found nothing"),
    "area NaN": (lambda p, r: p[1].update(area=np.nan), "annotation 1, id 2, .*'area', found nan"),
    "a fraction as an id": (lambda p, r: p[1].update(id=1.5), "one integer in 'id', found 1.5"),
    "an id twice": (lambda p, r: p[1].update(id=1), "annotation id 1 appears more than once"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_with_one_line_that_names_the_record(name, tmp_path, capsys):
    spoil, message = BAD_INPUT[name]
    annotations, results = scene(person(), person(300)), [pose(), pose(300)]
    evaluate(annotations, results)
    spoil(annotations["annotations"], results)
    with pytest.raises(DataError, match=message):
        evaluate_oks(annotations, results)
    files = write(tmp_path, annotations, results)
    assert main(files) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("error: ") and output.err.count("\n") == 1
    assert str(tmp_path) in output.err


def test_the_bad_record_is_found_among_thousands():
    results = [pose(score=n / 20000) for n in range(20000)]
    results[12345]["score"] = None
    with pytest.raises(DataError, match="result 12345, image_id 1: "):
        evaluate_oks(scene(person()), results)


def test_annotations_without_categories_or_without_ids_of_the_images_are_refused():
    annotations = scene(person())
    with pytest.raises(DataError, match="annotations: not COCO keypoint annotations: no 'categories'"):
        evaluate_oks({key: value for key, value in annotations.items() if key != "categories"}, [pose()])
    with pytest.raises(DataError, match="annotations: image 0: expected one integer or text in 'id', found nothing"):
        evaluate_oks(annotations | {"images": [{}]}, [pose()])


def test_arguments_that_are_no_coco_data_are_refused():
    with pytest.raises(DataError, match="annotations: expected a path or what COCO's files hold"):
        evaluate_oks([pose()], [pose()])
    with pytest.raises(DataError, match="results: expected a path or what COCO's files hold, a list"):
        evaluate_oks(scene(person()), {"a": 1})
    for sigmas in ([0.1] * 16 + [0], [[0.1] * 17], [0.1] * 16 + [np.nan]):
        with pytest.raises(DataError, match="sigmas: expected a positive number for each keypoint"):
            evaluate_oks(scene(person()), [pose()], sigmas)


# -------------------------------------------------------------------------------------- the command

@pytest.mark.parametrize("kind, limits, good, bad, expected", [
    (int, {"least": 1}, ["1", "7"], ["0", "-1", "1.5", "x", "", "nan", "inf"], "an integer of at least 1"),
    (int, {"least": 0}, ["0", "9" * 400], ["-1"], "an integer of at least 0"),
    (int, {"least": 32, "step": 32}, ["32", "256"], ["0", "16", "60", "-32"], "a multiple of 32 of at least 32"),
    (float, {"least": 0, "most": 1}, ["0", "1", "0.5"], ["-0.1", "1.1", "nan"], "a number from 0 to 1"),
    (float, {"least": 0}, ["0", "1e9"], ["-1e-9", "inf", "nan", "-inf", "x"], "a number of at least 0"),
    (float, {"above": 0}, ["1e-9", "2"], ["0", "-1", "inf", "nan"], "a number above 0")])
def test_a_number_of_an_option_is_within_its_limits_or_the_message_says_them(kind, limits, good, bad, expected):
    field = ("number", kind, option(None, help="A number.", **limits))
    defaults = make_dataclass("Numbers", [field])()
    for text in good:
        value = read(f"--number={text}", defaults).number
        assert value == kind(text) and type(value) is kind
    for text in bad:
        with pytest.raises(DataError) as error:
            read(f"--number={text}", defaults)
        assert str(error.value).startswith((f"--number: expected {expected}, found ",
                                            f"argument --number: invalid {kind.__name__} value: "))


@dataclass
class Options:
    """A small program's options: each is a field, with all that is to be known of it."""
    strategy: str = option("vlpose", choices=("vlpose", "full"), help="What is trained.")
    num_prompts: int = option(4, paper=8, least=0, only=["with --strategy vlpose"],
                              help="The number of prompts.")
    weights: str = option(None, help="Start from these.")
    base_lr: float = option(1e-3, above=0, only=["without --weights"], help="A rate.")
    image_size: list[int] = option(None, least=32, step=32, nargs=2, help="In pixels.")
    steady: bool = option(False, help="Whether it is steady.")


def read(line, defaults=Options()):
    given = vars(Parser(defaults, description="A small program.").parse_args(line.split()))
    options = replace(defaults, **given)
    check_options(options, defaults)
    return options


def test_the_fields_of_a_dataclass_are_a_programs_options():
    assert read("") == Options("vlpose", 4, None, 1e-3, None, False)
    assert read("", Options(num_prompts=8)) == Options("vlpose", 8, None, 1e-3, None, False)
    papers = {entry.name: entry.metadata["paper"] for entry in fields(Options)}
    assert papers == vars(Options(num_prompts=8))
    given = read("--num-prompts 2 --weights W --image-size 64 96 --steady")
    assert given == Options("vlpose", 2, "W", 1e-3, [64, 96], True)
    assert read("--strategy full --num-prompts 4").num_prompts == 4  # a default is never refused


@pytest.mark.parametrize("line, message", [
    ("--strategy full --num-prompts 2",
     "--num-prompts: has no effect; it counts only with --strategy vlpose"),
    ("--weights W --base-lr 1", "--base-lr: has no effect; it counts only without --weights"),
    ("--base-lr 0", "--base-lr: expected a number above 0, found 0"),
    ("--base-lr x", "argument --base-lr: invalid float value: 'x'; --help lists the options"),
    ("--image-size 64 65", "--image-size: expected a multiple of 32 of at least 32, found 65"),
    ("--strategy none", "argument --strategy: invalid choice: 'none'"),
    ("--num 3", "unrecognized arguments: --num 3; --help lists the options"),
])
def test_an_option_that_is_wrong_or_without_effect_is_refused_by_name(line, message):
    with pytest.raises(DataError, match=re.escape(message)):
        read(line)


def test_the_help_says_when_an_option_counts_and_its_default(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "only with --strategy vlpose: --num-prompts" in text
    assert "The number of prompts. (default: 4)" in text
    assert "Start from these. --image-size" in text  # no default: nothing is said


def test_a_default_in_the_help_has_three_digits():
    options = make_dataclass("Options", [("falls", tuple[float, ...], option((170 / 210, 0.5), help="Falls.")),
                                         ("rate", float, option(5e-4, help="Rate.")),
                                         ("none", tuple[float, ...], option((), help="None."))])
    text = " ".join(Parser(options()).format_help().split())
    assert "Falls. (default: 0.81 0.5)" in text and "Rate. (default: 0.0005)" in text
    assert "None. (default: none)" in text


@pytest.mark.parametrize("values, message", [
    ({"num_prompts": 2.0}, "--num-prompts: expected an integer of at least 0, found 2.0"),
    ({"num_prompts": True}, "--num-prompts: expected an integer of at least 0, found True"),
    ({"num_prompts": None}, "--num-prompts: expected an integer of at least 0, found None"),
    ({"base_lr": "fast"}, "--base-lr: expected a number above 0, found fast"),
    ({"base_lr": [1]}, "--base-lr: expected a number above 0, found [1]"),
    ({"image_size": 64}, "--image-size: expected a list, found 64"),
    ({"image_size": [64, "x"]}, "--image-size: expected a multiple of 32 of at least 32, found x"),
    ({"steady": "yes"}, "--steady: expected true or false, found yes"),
    ({"weights": 3}, "--weights: expected text, found 3"),
    ({"strategy": "none"}, "--strategy: expected one of vlpose, full, found none"),
    ({"strategy": {}}, "--strategy: expected text, found {}")])
def test_the_values_of_a_file_pass_the_same_checks(values, message):
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        check_options(Options(**values), Options())
    check_options(Options(num_prompts=2, base_lr=1, image_size=[64, 96], steady=True), Options())


def test_the_help_of_each_option_is_a_sentence():
    assert all(entry.metadata["help"].endswith(".") for entry in fields(EvalOptions))


def test_the_help_of_the_command_is_of_both_its_ways(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(flag_of(entry.name) in text for entry in fields(EvalOptions))


@pytest.mark.parametrize("line, message", [
    ("--results r --annotations a --workers 3",
     "--workers: has no effect; it counts only without --results"),
    ("--results=r --annotations=a --checkpoint=M",
     "--checkpoint: has no effect; it counts only without --results"),
    ("--checkpoint M --data d:x --annotations a",
     "--annotations: has no effect; it counts only with --results"),
    ("--results r", "expected --results, --annotations; or --checkpoint and --data, or"),
    ("--checkpoint M", "expected --results, --annotations; or --checkpoint and --data, or"),
    ("", "expected --results, --annotations; or --checkpoint and --data, or"),
])
def test_numbers_of_a_file_and_poses_of_a_model_are_told_apart(line, message, capsys):
    assert main(line.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--workers", "--pictures"])
def test_an_option_that_counts_takes_no_negative_number(flag, capsys):
    assert main([flag, "-1"]) == 2
    assert f"{flag}: expected an integer of at least 0, found -1" in capsys.readouterr().err


def write(folder, annotations, results):
    (folder / "annotations.json").write_text(json.dumps(annotations))
    (folder / "results.json").write_text(json.dumps(results))
    return ["--annotations", str(folder / "annotations.json"), "--results", str(folder / "results.json")]


def test_results_of_none_of_the_annotations_categories_are_said(tmp_path, capsys):
    assert main(write(tmp_path, scene(person(category_id=3), categories=(3,)), [pose()])) == 0
    assert capsys.readouterr().err == "no result has a category_id of the annotations: [3], found [1]\n"


def test_the_command_prints_cocos_ten_numbers_as_a_table(case17, tmp_path, capsys):
    assert main(write(tmp_path, *case17)) == 0
    names, numbers = capsys.readouterr().out.strip().splitlines()
    printed = re.findall(r"= (-?\d\.\d{3})", pycocotools(*case17)[1])
    assert numbers.split()[:-1] == ["all", *printed]
    assert re.split("  +", names)[1:] == [*evaluate_oks(*case17), "people"]
    counted = [person for person in case17[0]["annotations"] if person["num_keypoints"] and not person["iscrowd"]]
    assert int(numbers.split()[-1].replace(",", "")) == len(counted)


def test_the_command_prints_json_for_programs(case17, tmp_path, capsys):
    files = write(tmp_path, *case17)
    assert main([*files, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    people = printed.pop("people")
    assert printed == evaluate_oks(*case17)
    assert main([*files, "--json", "--details"]) == 0
    details = json.loads(capsys.readouterr().out)
    assert sum(numbers.pop("people") for numbers in details["domains"].values()) == people
    assert details["domains"] == evaluate_domains(*case17)[1]


def test_a_domain_in_letters_that_the_console_lacks_is_printed_with_escapes(tmp_path, capsys):
    annotations = scene(person())
    annotations["images"][0]["category"] = "\u5199\u771f"
    with open(tmp_path / "log.txt", "w", encoding="cp1252") as log, contextlib.redirect_stdout(log):
        assert main([*write(tmp_path, annotations, [pose()]), "--details"]) == 0
    assert capsys.readouterr().err == ""
    *_, row = (tmp_path / "log.txt").read_text("cp1252").splitlines()
    assert row.split()[:2] == ["\\u5199\\u771f", "1.000"]


def test_details_are_tables_under_the_ten_numbers(case17, tmp_path, capsys):
    assert main(write(tmp_path, *case17)) == 0
    numbers = capsys.readouterr().out
    assert main([*write(tmp_path, *case17), "--details"]) == 0
    output = capsys.readouterr().out
    assert output.startswith(numbers)
    for word in ("domains", "oil painting"):
        assert word in output.removeprefix(numbers)


@pytest.mark.parametrize("text", ["", "{", "[1, 2", "[{}]", "no JSON", "[]", "{}", "\xff"])
def test_a_file_that_is_no_coco_json_is_refused_in_one_line(text, tmp_path, capsys):
    files = write(tmp_path, scene(person()), [pose()])
    for file in ("annotations.json", "results.json"):
        files = write(tmp_path, scene(person()), [pose()])
        (tmp_path / file).write_text(text, encoding="latin-1")
        assert main(files) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and file in error and error.count("\n") == 1


def test_a_missing_file_ends_the_command_with_status_2_and_no_traceback(tmp_path):
    done = run_program(ROOT / "eval.py", "--results", "none.json", "--annotations",
                       tmp_path / "none.json")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "none.json" in done.stderr and done.stderr.count("\n") == 1


def test_the_similarity_of_each_pair_is_the_mean_over_the_persons_labelled_keypoints():
    rng = np.random.default_rng(0)
    people, detections = rng.uniform(0, 90, (2, 6, 17, 2))
    labelled = rng.random((6, 17)) < 0.5
    keypoints = np.concatenate([people, 2 * labelled[:, :, None]], axis=2)
    annotations = {"images": [{"id": 1}], "categories": [{"id": 1}], "annotations": [
        {"id": n + 1, "image_id": 1, "category_id": 1, "keypoints": points.ravel().tolist(),
         "bbox": [0, 0, 90, 90], "area": 5000.0 + n, "iscrowd": 0,
         "num_keypoints": int(labelled[n].sum())}
        for n, points in enumerate(keypoints)]}
    results = [{"image_id": 1, "category_id": 1, "score": 1.0 - n / 9,
                "keypoints": np.pad(points, ((0, 0), (0, 1))).ravel().tolist()}
               for n, points in enumerate(detections)]
    (scene,), sigmas = read_scenes(annotations, results, COCO17.sigmas)
    oks = object_keypoint_similarity(scene.people, scene.detections, sigmas)
    for d, p in np.ndindex(6, 6):
        similarity = keypoint_similarity(detections[d] - people[p], 5000.0 + p, sigmas)
        np.testing.assert_allclose(oks[d, p], similarity[labelled[p]].mean(), rtol=1e-12)
