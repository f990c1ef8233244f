"""What must hold for the data sets of domain adaptation and for what makes them fit each other."""
import gzip
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import convert
import data
from data import (ANIMAL14, ANIMAL18, BODY16, COCO17, SKELETONS, Crops, DataError, PoseDataset,
                  crop_matrix, encode_heatmaps, find_pictures, load_dataset, load_matlab,
                  make_skeleton, picture_dataset, plain_names, remove_labels, report_sides, to_coco,
                  transform_points, with_boxes, with_skeleton)
from uda import supervised_loss

COCO_IN_BODY16 = {name: BODY16.names.index(name) for name in COCO17.names if name in BODY16.names}


def write_images(folder, names, size=(64, 48)):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(folder / name)


def save_matlab(path, **variables):
    path.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("scipy.io").savemat(path, variables)


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


# ---------------------------------------------------------------------------------------- skeletons

@pytest.mark.parametrize("skeleton", [COCO17, BODY16, ANIMAL18, ANIMAL14])
def test_a_skeleton_is_consistent(skeleton):
    K = len(skeleton.names)
    assert len(set(skeleton.names)) == K == len(skeleton.sigmas) and (skeleton.sigmas > 0).all()
    assert (skeleton.mirrored[skeleton.mirrored] == np.arange(K)).all()
    assert (skeleton.sigmas[skeleton.mirrored] == skeleton.sigmas).all()
    for k, other in enumerate(skeleton.mirrored):
        assert (other == k) == (
            "left" not in skeleton.names[k] and "right" not in skeleton.names[k])
    used = set(skeleton.upper)
    used.update(*skeleton.edges, *skeleton.groups.values())
    assert used <= set(range(K))
    for a, b in skeleton.edges:  # a mirrored drawing has the same lines
        line = {skeleton.mirrored[a], skeleton.mirrored[b]}
        assert line in [set(edge) for edge in skeleton.edges]
    for group in skeleton.groups.values():
        assert set(skeleton.mirrored[list(group)]) == set(group)


def test_pck_groups_hold_the_joints_that_they_are_named_after():
    counted = sorted(k for group in BODY16.groups.values() for k in group)
    assert counted == [*range(6), *range(10, 16)]
    for skeleton, other_names in ((BODY16, {}), (ANIMAL18, {"tail_base": "hip"}), (ANIMAL14, {})):
        for group, joints in skeleton.groups.items():
            names = [skeleton.names[k] for k in joints]
            assert {other_names.get(name, name.split("_")[-1]) for name in names} == {group}


@pytest.mark.parametrize("name, plain", [
    ("left_eye", "left_eye"), ("L_Eye", "left_eye"), ("LeftEye", "left_eye"),
    ("left eye", "left_eye"), ("rightEye", "right_eye"), ("R_F_Paw", "right_front_hoof"),
    ("LEFT-EYE", "left_eye"), ("LKnee", "left_knee"), ("face-12", "face_12"), ("nose", "nose"),
    ("eye.L", "left_eye"), ("front_left_paw", "left_front_hoof"), ("linkes Auge", "left_auge"),
    ("左目", "left_目"), ("手首", "手首"), ("Nearknee", "nearknee"), ("leftover", "leftover")])
def test_the_names_of_keypoints_are_compared_in_one_spelling(name, plain):
    assert plain_names([name]) == [plain]


@pytest.mark.parametrize("left, right", [
    ("leftear", "rightear"), ("lshoulder", "rshoulder"), ("LEFTEYE", "RIGHTEYE"),
    ("Lefteye", "Righteye"), ("eyeL", "eyeR"), ("eye (left)", "eye (right)"), ("LSHO", "RSHO"),
    ("LF", "RF"), ("hip_lt", "hip_rt"), ("wingL1", "wingR1"), ("L1", "R1"), ("eyel2", "eyer2"),
    ("linke_Schulter", "rechte_Schulter"), ("KnieLinks", "KnieRechts"),
    ("schulterlinks", "schulterrechts"), ("oeil_gauche", "oeil_droit"),
    ("main gauche", "main droite"), ("ojo_izquierdo", "ojo_derecho"), ("ojo_izq", "ojo_der"),
    ("左肩", "右肩"), ("前左足", "前右足"), ("ひだりひじ", "みぎひじ"), ("왼쪽 어깨", "오른쪽 어깨"),
    ("левое_плечо", "правое_плечо"), ("mouth_left_right", "mouth_right_left")])
def test_left_and_right_are_read_in_many_spellings_and_languages(left, right):
    skeleton = make_skeleton(["nose", left, "tail", right], ())
    assert skeleton.mirrored.tolist() == [0, 3, 2, 1] and skeleton.flip_pairs == ((1, 3),)
    assert make_skeleton([left, "nose"], ()).flip_pairs == ()


@pytest.mark.parametrize("names", [
    [*"abcdefghijklmnopqr"], [f"{letter}1" for letter in "abcdefghijklmnopqr"],
    [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ"], ["p1", "p2"], [str(n) for n in range(1, 18)],
    ["Nearknee", "Offknee"], ["lip", "rear"], ["leftover", "upright"]])
def test_what_only_looks_like_a_side_is_none(names):
    assert make_skeleton(names, ()).flip_pairs == ()


def test_a_skeleton_without_left_and_right_is_said_and_so_is_a_side_without_the_other(capsys):
    report_sides(COCO17)
    assert capsys.readouterr().err == ""
    report_sides(make_skeleton(["p1", "p2"], ()))
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("no left and right among the keypoints p1, p2: no picture is mirrored")
    report_sides(make_skeleton(["nose", "L_Eye", "R_Eye", "R_F_Paw", "lefthip", "tail"], ()))
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("no counterpart of the keypoints R_F_Paw, lefthip for mirrored pictures")


def test_a_crop_is_not_mirrored_where_left_and_right_are_not_known(tmp_path):
    points = [[5, 6, 2], [20, 8, 2], [9, 30, 2]]
    mirror = data.Augmentation(flip_probability=1.0)
    for names, moved in ((["a", "b", "c"], False), (["leftear", "rightear", "tail"], True)):
        people = load_dataset(f"coco:{write_coco(tmp_path, names, points)}", "all")
        plain = Crops(people, (64, 64))[0, 0]["keypoints"]
        flipped = Crops(people, (64, 64), mirror)[0, 0]["keypoints"]
        expected = plain[[1, 0, 2]] if moved else plain
        x = 63 - expected[:, 0] if moved else expected[:, 0]
        torch.testing.assert_close(flipped, torch.stack([x, expected[:, 1]], 1))


def test_a_file_may_give_the_pairs_of_left_and_right(tmp_path):
    category = {"id": 1, "keypoints": ["p1", "p2", "p3"], "flip_pairs": [["p3", "p1"]]}
    path = write_coco(tmp_path, category["keypoints"], categories=[category])
    dataset = load_dataset(f"coco:{path}", "all")
    assert dataset.skeleton.flip_pairs == ((0, 2),)
    assert dataset.skeleton.mirrored.tolist() == [2, 1, 0]
    again = write_json(tmp_path / "again.json", to_coco(dataset))
    assert load_dataset(f"coco:{again}", "all").skeleton.flip_pairs == ((0, 2),)


@pytest.mark.parametrize("pairs", [
    5, [[1, 3]], [["p1"]], [["p1", "p9"]], [["p1", "p1"]], [["p1", "p2"], ["p2", "p3"]]])
def test_pairs_that_are_none_are_an_error_that_names_the_file(tmp_path, pairs):
    category = {"id": 1, "keypoints": ["p1", "p2", "p3"], "flip_pairs": pairs}
    path = write_coco(tmp_path, category["keypoints"], categories=[category])
    with pytest.raises(DataError, match="any.json: expected 'flip_pairs' of keypoints' names"):
        load_dataset(f"coco:{path}", "all")


def test_a_new_skeleton_takes_sides_halves_sigmas_and_groups_from_its_names():
    skeleton = make_skeleton(("Nose", "L_Knee", "R_Knee", "thumb1", "R_F_Paw", "tail"), [(0, 1)])
    assert skeleton.mirrored.tolist() == [0, 2, 1, 3, 4, 5]  # nobody has labelled a left front paw
    assert skeleton.upper == (0, 3, 4)
    assert skeleton.sigmas.tolist() == pytest.approx([0.026, 0.087, 0.087, 0.05, 0.089, 0.05])
    assert skeleton.groups == {
        "nose": (0,), "knee": (1, 2), "thumb_1": (3,), "front_hoof": (4,), "tail": (5,)}


@pytest.mark.parametrize("known", SKELETONS.values(), ids=SKELETONS)
def test_the_names_of_a_known_skeleton_give_that_skeleton(known):
    found = make_skeleton(list(known.names), [])
    assert (found.names, found.edges) == (known.names, known.edges)  # AP-10K's are APT-36K's, too
    reversed_names = make_skeleton(known.names[::-1], [])  # as many keypoints, but another skeleton
    assert reversed_names is not known
    if known.flip_pairs != data.pairs_of_sides(known.names):
        return  # the points of a face are only numbered
    assert (reversed_names.mirrored[::-1] == len(known.names) - 1 - known.mirrored).all()


def write_coco(folder, names, keypoints=None, skeleton=(), **changes):
    """A file in COCO's format with one picture of one person, or animal, with these keypoints."""
    write_images(folder, ["a.jpg"])
    keypoints = np.tile((9.0, 9.0, 2.0), (len(names), 1)) if keypoints is None else keypoints
    return write_json(folder / "any.json", {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"id": 1, "image_id": 1, "bbox": [1, 1, 30, 30],
                         "keypoints": np.ravel(keypoints).tolist()}],
        "categories": [{"id": 1, "name": "it", "keypoints": list(names), "skeleton": skeleton}]
    } | changes)


@pytest.mark.parametrize("count", [1, 13, 14, 17, 21, 133])
def test_a_coco_file_brings_its_own_skeleton(tmp_path, count):
    names = [f"{side}_{n}" for n in range(count) for side in ("left", "right")][:count]
    dataset = load_dataset(f"coco:{write_coco(tmp_path, names, skeleton=[[1, count]])}", "all")
    assert dataset.skeleton.names == tuple(names) and dataset.skeleton.edges == ((0, count - 1),)
    assert dataset.keypoints.shape == (1, count, 3)
    pairs = count // 2 * 2
    assert dataset.skeleton.mirrored[:pairs].tolist() == [joint ^ 1 for joint in range(pairs)]


def test_a_file_with_images_and_nobody_labelled_can_be_read(tmp_path):
    dataset = load_dataset(f"coco:{write_coco(tmp_path, COCO17.names, annotations=[])}", "all")
    assert len(dataset.files) == 1 and not len(dataset.annotated)


@pytest.mark.parametrize("area", [0, None])
def test_an_area_of_nothing_is_that_of_the_box(tmp_path, area):
    path = Path(write_coco(tmp_path, COCO17.names))
    content = json.loads(path.read_text("utf-8"))
    content["annotations"][0] |= {"area": area, "bbox": [1, 2, 30, 40]}
    path.write_text(json.dumps(content))
    assert load_dataset(f"coco:{path}", "all").areas.tolist() == [1200]


def test_the_one_file_of_a_folder_may_begin_with_a_byte_order_mark_beside_results(tmp_path):
    path = Path(write_coco(tmp_path, COCO17.names))
    path.write_text("\ufeff\n" + path.read_text("utf-8"), encoding="utf-8")
    (path.parent / "results.json").write_text("\n[{}]")
    assert len(load_dataset(f"coco:{path.parent}", "all").files) == 1


def test_people_may_have_only_the_first_of_the_keypoints_that_are_named(tmp_path):
    names, keypoints = [*COCO17.names, "left_toe", "right_toe"], np.tile((9.0, 9.0, 2.0), (17, 1))
    path = write_coco(tmp_path, names, keypoints, [[1, 2], [17, 19]])
    assert load_dataset(f"coco:{path}", "all").skeleton is COCO17  # as in Human-Art


def test_pairs_of_left_and_right_that_people_do_not_have_are_left_out(tmp_path):
    category = {"id": 1, "keypoints": ["p1", "p2", "p3", "p4", "p5"],
                "flip_pairs": [["p3", "p2"], ["p4", "p5"]]}
    path = write_coco(tmp_path, ["p1", "p2", "p3"], categories=[category])
    assert load_dataset(f"coco:{path}", "all").skeleton.flip_pairs == ((1, 2),)


@pytest.mark.parametrize("categories, words", [
    ([{"id": 1, "keypoints": ["L_Eye", "left_eye"]}],
     "'keypoints' with different names, found 'L_Eye' and 'left_eye', which are alike"),
    ([{"id": 1, "keypoints": 5}], "'categories' with the same names"),
    ([{"id": 1, "keypoints": ["a", "b"], "skeleton": [[1]]}], "'categories' with the same names"),
    ([{"id": 1, "name": "cat", "keypoints": ["a", "b"]}, {"id": 2, "keypoints": ["b", "a"]}],
     "'categories' with the same names of 'keypoints', found cat, 2; coco:FILE#category=NAME"),
    (3, "'categories', a list"), ([3], "'categories', a list")])
def test_a_skeleton_that_is_none_is_an_error_that_names_the_file(tmp_path, categories, words):
    with pytest.raises(DataError, match=f"any.json: expected {words}") as error:
        load_dataset(f"coco:{write_coco(tmp_path, ['a', 'b'], categories=categories)}", "all")
    assert "\n" not in str(error.value)


def test_an_edge_with_a_0_means_that_all_edges_count_from_0(tmp_path):
    names = ["top", "left", "right", "low"]
    for first in (0, 1):
        edges = [[first + a, first + b] for a, b in ((0, 1), (1, 3), (3, 2), (2, 0))]
        dataset = load_dataset(f"coco:{write_coco(tmp_path, names, skeleton=edges)}", "all")
        assert dataset.skeleton.edges == ((0, 1), (1, 3), (3, 2), (2, 0))


@pytest.mark.parametrize("count, names", [
    (17, COCO17.names), (14, tuple(f"keypoint {n}" for n in range(1, 15)))])
def test_a_file_that_names_no_keypoints_can_be_read_which_is_said_once(
        tmp_path, capsys, count, names):
    path = write_coco(tmp_path, COCO17.names[:count], categories=[{"id": 1, "name": "person"}])
    for split in ("train", "all"):
        assert load_dataset(f"coco:{path}", split).skeleton.names == names
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}: the categories name no keypoints; the {count} ")


def several_annotations(folder, *changes, categories=None):
    """A file with an annotation of three keypoints for each of the changes {field: value}."""
    person = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 30, 30], "keypoints": [9, 9, 2] * 3}
    annotations = []
    for number, change in enumerate(changes, 1):
        record = {"id": number, **person, **change}
        annotations.append({key: value for key, value in record.items() if value is not None})
    categories = categories or [{"id": 1, "name": "person", "keypoints": ["a", "b", "c"]}]
    return write_coco(folder, "abc", annotations=annotations, categories=categories)


@pytest.mark.parametrize("record", [5, {"id": 1, "image_id": 1, "keypoints": 5}])
def test_a_broken_annotation_is_named(tmp_path, record):
    path = write_coco(tmp_path, "abc", annotations=[record])
    with pytest.raises(DataError, match="any.json: annotation"):
        load_dataset(f"coco:{path}", "all")


def test_annotations_without_keypoints_are_people_without_labels(tmp_path):
    path = several_annotations(tmp_path, {}, {"keypoints": None}, {"keypoints": []})
    dataset = load_dataset(f"coco:{path}", "all")
    assert dataset.annotated.tolist() == [0] and not dataset.keypoints[1:].any()
    assert len(remove_labels(dataset).ids) == 3


def test_annotations_of_categories_without_keypoints_are_skipped_and_counted(tmp_path, capsys):
    ball = {"id": 2, "name": "ball"}
    person = {"id": 1, "name": "person", "keypoints": ["a", "b", "c"]}
    path = several_annotations(
        tmp_path, {}, {"category_id": 2, "keypoints": None}, {}, categories=[ball, person])
    assert load_dataset(f"coco:{path}", "all").ids.tolist() == [1, 3]
    assert f"{path}: skipped 1 of 3 annotations: they are of" in capsys.readouterr().err


def test_boxes_alone_are_a_target_whose_labels_are_not_read(tmp_path):
    path = several_annotations(
        tmp_path, {"keypoints": None}, {"keypoints": None}, categories=[{"id": 1, "name": "cat"}])
    target = remove_labels(load_dataset(f"coco:{path}", "all"))
    assert target.boxes.tolist() == [[1, 1, 30, 30]] * 2 and target.skeleton is COCO17


@pytest.mark.parametrize("box", [[1, 2, 0, 9], [1, 2, 9, -1]])
def test_a_labelled_box_without_a_size_is_skipped_alone_and_counted(tmp_path, capsys, box):
    path = several_annotations(tmp_path, {}, {"bbox": box}, {})
    assert load_dataset(f"coco:{path}", "all").ids.tolist() == [1, 3]
    assert f"{path}: skipped 1 of 3 annotations: their boxes" in capsys.readouterr().err


def test_visibilities_above_0_are_labels_which_is_said_once(tmp_path, capsys):
    path = several_annotations(tmp_path, {"keypoints": [9, 9, 0.25, 8, 8, 3, 0, 0, 0]}, {})
    for split in ("train", "all"):
        dataset = load_dataset(f"coco:{path}", split)
    assert dataset.keypoints[:, :, 2].tolist() == [[1, 2, 0], [2, 2, 2]]
    line, = capsys.readouterr().err.splitlines()
    assert line == f"{path}: visibilities such as 0.25 are taken as labelled"


def test_a_category_is_chosen_by_its_name_and_brings_its_skeleton(tmp_path):
    categories = [{"id": 1, "name": "person", "keypoints": ["a", "b", "c"]},
                  {"id": 4, "name": "car", "keypoints": ["left_wheel", "right_wheel"]}]
    path = several_annotations(tmp_path, {}, {"category_id": 4, "keypoints": [5, 6, 2] * 2}, {},
                               categories=categories)
    people, cars = (load_dataset(f"coco:{path}#category={name}", "all")
                    for name in ("person", "car"))
    assert people.ids.tolist() == [1, 3] and people.skeleton.names == ("a", "b", "c")
    assert cars.ids.tolist() == [2] and cars.skeleton.names == ("left_wheel", "right_wheel")
    assert cars.keypoints.tolist() == [[[5, 6, 2]] * 2] and cars.name.endswith("#category=car")
    assert load_dataset(f"coco:{path}#category=car, car", "all").ids.tolist() == [2]
    with pytest.raises(DataError, match="no category bus; expected some of person, car"):
        load_dataset(f"coco:{path}#category=bus", "all")
    with pytest.raises(DataError, match="expected coco:.* before a category, found humanart"):
        load_dataset(f"humanart:{path}#category=car", "all")


def test_boxes_of_several_categories_need_a_choice(tmp_path):
    path = several_annotations(
        tmp_path, {"keypoints": None}, {"keypoints": None, "category_id": 2},
        categories=[{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}])
    with pytest.raises(DataError, match="found cat, dog; coco:FILE#category=NAME reads one"):
        load_dataset(f"coco:{path}", "all")
    assert load_dataset(f"coco:{path}#category=dog", "all").ids.tolist() == [2]


def test_a_packed_file_is_an_error_that_says_so(tmp_path):
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(DataError, match="a.json.gz: .*found a packed file; unpack it first$"):
        load_dataset(f"coco:{tmp_path / 'a.json.gz'}", "all")


def test_annotations_have_the_parts_that_older_programs_ask_for(real):
    content = to_coco(load_dataset(f"coco:{real / 'coco'}", "all"))
    assert [*content] == ["info", "licenses", "images", "annotations", "categories"]
    assert "flip_pairs" not in content["categories"][0]  # the names tell them


def test_animals_of_ap10k_are_not_people(real):
    animals = load_dataset(f"coco:{real / 'animals' / 'ap10k'}", "all")
    assert animals.skeleton is SKELETONS["AP10K"] and len(animals.skeleton.names) == 17
    names = animals.skeleton.names
    assert names[animals.skeleton.mirrored[names.index("left_back_paw")]] == "right_back_paw"
    hoofed = with_skeleton(animals, ANIMAL14)  # AP-10K says paw where others say hoof
    assert (hoofed.keypoints[:, ANIMAL14.names.index("left_back_hoof")]
            == animals.keypoints[:, names.index("left_back_paw")]).all()


def test_what_was_read_is_written_and_read_again_the_same(real, tmp_path):
    for name in ("animals/ap10k", "animals/horse10", "coco"):
        first = load_dataset(f"coco:{real / name}", "all")
        write_json(tmp_path / "again.json", to_coco(first))
        (tmp_path / "images").unlink(missing_ok=True)
        (tmp_path / "images").symlink_to(
            os.path.commonpath([Path(file).parent for file in first.files]))
        again = load_dataset(f"coco:{tmp_path / 'again.json'}", "all")
        assert again.skeleton.names == first.skeleton.names
        assert again.skeleton.edges == first.skeleton.edges
        names = [[Path(file).name for file in dataset.files] for dataset in (first, again)]
        assert names[0] == names[1]
        for field in ("image_ids", "ids", "keypoints", "boxes", "areas", "crowd"):
            assert (getattr(again, field) == getattr(first, field)).all(), field


# -------------------------------------------------------------------------------- the data sets fit

def test_coco_people_get_the_sixteen_joints_of_the_body(real):
    coco = load_dataset(f"coco:{real / 'coco'}", "all")
    body = with_skeleton(coco, BODY16)
    assert body.keypoints.shape == (len(coco.ids), 16, 3) and body.skeleton is BODY16
    for name, k in COCO_IN_BODY16.items():
        source = coco.keypoints[:, COCO17.names.index(name)]
        assert (body.keypoints[:, k] == source * (source[:, 2:] > 0)).all()
    hips = coco.keypoints[:, [11, 12]]
    both = (hips[:, :, 2] > 0).all(1)
    pelvis = body.keypoints[:, BODY16.names.index("pelvis")]
    assert np.allclose(pelvis[both, :2], hips[both, :, :2].mean(1))
    assert (pelvis[both, 2] == hips[both, :, 2].min(1)).all()  # hidden, where one hip is
    assert both.any() and not both.all() and (pelvis[~both] == 0).all()
    # COCO labels neither the upper neck nor the top of the head
    assert (body.keypoints[:, [8, 9]] == 0).all()
    assert (coco.boxes == body.boxes).all() and coco.skeleton is COCO17


def test_keypoints_that_a_data_set_lacks_are_unlabelled_and_said(real, capsys):
    body = with_skeleton(load_dataset(f"coco:{real / 'coco'}", "all"), BODY16)
    capsys.readouterr()
    again = with_skeleton(body, COCO17)
    assert capsys.readouterr().err.strip().endswith(
        "lacks nose, left_eye, right_eye, left_ear, right_ear")
    assert not again.keypoints[:, :5].any() and again.keypoints[:, 5:].any()


def test_skeletons_that_share_no_keypoint_are_an_error(real):
    hoofed = make_skeleton(("left_hoof", "right_hoof", "tail"), [(0, 2)])
    with pytest.raises(DataError, match="coco:.*no keypoint of left_hoof, right_hoof, tail$"):
        with_skeleton(load_dataset(f"coco:{real / 'coco'}", "all"), hoofed)


def test_the_same_skeleton_changes_nothing(real):
    coco = load_dataset(f"coco:{real / 'coco'}", "all")
    again = with_skeleton(coco, COCO17)
    labelled = coco.keypoints[:, :, 2] > 0
    assert (again.keypoints[labelled] == coco.keypoints[labelled]).all()


def test_an_unlabelled_target_shows_boxes_and_no_keypoint(real):
    coco = load_dataset(f"coco:{real / 'coco'}", "all")
    coco.crowd[0], coco.boxes[1, 2] = True, 0
    coco.keypoints[2] = 0  # without labels, but with a box
    target = remove_labels(coco)
    assert target.ids.tolist() == coco.ids[2:].tolist() and (target.boxes == coco.boxes[2:]).all()
    assert target.keypoints.shape == (len(coco.ids) - 2, 17, 3) and not target.keypoints.any()
    assert coco.keypoints.any() and len(target.annotated) == 0
    crop = Crops(target, (64, 64))[len(target.ids) - 1, 0]
    assert crop["image"].any() and not crop["visible"].any()


def test_a_target_without_a_box_is_an_error(real):
    coco = load_dataset(f"coco:{real / 'coco'}", "all")
    coco.crowd[:] = True
    with pytest.raises(DataError, match="coco:.*expected a person with a box"):
        remove_labels(coco)


# ---------------------------------------------------------------------------------------------- LSP

@pytest.fixture
def lsp(real):
    pytest.importorskip("scipy")
    return real / "lsp"


def test_lsp_has_a_thousand_images_to_train_on_and_a_thousand_others_to_test_on(lsp):
    parts = [load_dataset(f"lsp:{lsp}", split) for split in ("train", "val", "all")]
    assert [len(part.ids) for part in parts] == [1000, 1000, 2000]
    assert parts[0].files + parts[1].files == parts[2].files
    assert load_dataset(f"lsp:{lsp}#photo", "val").files == parts[1].files
    assert parts[1].files[0].endswith("im1001.jpg") and set(parts[0].domains) == {"photo"}
    train, val, both = parts
    assert (np.concatenate([train.keypoints, val.keypoints]) == both.keypoints).all()
    assert (both.skeleton.names == BODY16.names) and len(both.annotated) == 2000
    # Flag 1 is an occluded joint: 2044 of them, and 2 more labels lie outside their images.
    assert [int((both.keypoints[:, :, 2] == v).sum()) for v in (0, 1, 2)] == [4002, 2044, 25954]
    expected = [[29.746, 143.345, 2], [24.523, 52.935, 2], [38.988, 15.566, 2]]
    # right ankle, right wrist, head top
    assert np.allclose(both.keypoints[0, [0, 10, 9]], expected, atol=1e-3)
    assert not both.keypoints[:, [6, 7]].any()  # no pelvis, no thorax


LIMBS = [*range(6), *range(10, 16)]  # of BODY16: what PCK counts


def test_lsp_as_in_regda_is_all_of_it_in_both_splits_without_hidden_joints(lsp):
    train, val, both = (
        load_dataset(f"lsp-regda:{lsp}", split) for split in ("train", "val", "all"))
    everything = load_dataset(f"lsp:{lsp}", "all")
    for part in (train, val, both):
        assert part.files == everything.files and len(part.annotated) == 2000
        assert (part.boxes == everything.boxes).all() and (part.keypoints == train.keypoints).all()
    assert set(np.unique(train.keypoints[:, :, 2])) == {0, 2}
    flags = load_matlab(lsp / "joints.mat", "joints", "")[2, :12]
    assert (flags == 0).sum() == 21_976  # limb joints that RegDA takes for visible, of 24,000
    # two lie below their images, and below RegDA's heatmaps
    assert (train.keypoints[:, LIMBS, 2] > 0).sum() == 21_974
    visible = everything.keypoints[:, :, 2] == 2
    assert (train.keypoints[visible] == everything.keypoints[visible]).all()
    assert not train.keypoints[~visible].any()
    assert train.name == f"lsp-regda:{lsp}"


def test_the_crop_of_an_lsp_image_is_all_of_it_in_a_square(lsp):
    dataset = load_dataset(f"lsp:{lsp}", "train")
    for row in (0, 1, 500):
        with Image.open(dataset.files[row]) as image:
            width, height = image.size
        matrix = crop_matrix(dataset.boxes[row], (256, 256))
        (left, top), (right, bottom) = transform_points(
            np.array([[0, 0], [width - 1, height - 1]]), matrix)
        assert np.isclose(left, 0) or np.isclose(top, 0)
        assert np.isclose(left + right, 255) and np.isclose(top + bottom, 255)  # in the middle
        assert np.isclose(max(right - left, bottom - top), 255)
        # not stretched
        assert np.isclose((right - left) * (height - 1), (bottom - top) * (width - 1))
    crop = Crops(dataset, (256, 256))[0, 0]
    assert crop["visible"].sum() == dataset.keypoints[0, :, 2].sum()
    # a narrow image, padded with black
    assert not crop["image"][:, :, :50].any() and crop["image"][:, :, 70:180].any()


def write_lsp(folder, joints, digits=4):
    save_matlab(folder / "joints.mat", joints=joints)
    write_images(folder, [f"images/im{n + 1:0{digits}}.jpg" for n in range(joints.shape[2])])
    return folder


def test_a_hidden_joint_of_lsp_is_labelled_but_not_as_in_regda(tmp_path):
    joints = np.full((3, 14, 4), 20.0)
    joints[2] = 0
    joints[2, 5, 1] = joints[2, 12, 3] = 1  # hidden: a left ankle, a neck
    write_lsp(tmp_path, joints)
    ours, regda = (
        load_dataset(f"{name}:{tmp_path}", "all").keypoints for name in ("lsp", "lsp-regda"))
    assert ours[1, 5].tolist() == [20, 20, 1] and ours[3, 8].tolist() == [20, 20, 1]
    assert regda[1, 5].tolist() == regda[3, 8].tolist() == [0, 0, 0]
    ours[[1, 3], [5, 8]] = 0
    assert (ours == regda).all()
    for split in ("train", "val"):
        assert (load_dataset(f"lsp-regda:{tmp_path}", split).keypoints == regda).all()
    assert [len(load_dataset(f"lsp:{tmp_path}", split).ids) for split in ("train", "val")] == [2, 2]


@pytest.mark.parametrize(
    "joints", [np.ones((3, 13, 4)), np.ones((2000, 14)), np.ones((3, 14)), np.full((3, 14), "a")])
def test_joints_of_another_shape_are_an_error_that_tells_it(tmp_path, joints):
    save_matlab(tmp_path / "joints.mat", joints=joints)
    with pytest.raises(DataError, match=r"joints.mat: expected 'joints' \(3, 14, 2000\), found "):
        load_dataset(f"lsp:{tmp_path}", "all")


def test_a_broken_matlab_file_is_an_error_that_names_it(tmp_path):
    pytest.importorskip("scipy")
    with pytest.raises(DataError, match="joints.mat: no such file; expected 'joints'"):
        load_dataset(f"lsp:{tmp_path}", "all")
    write_lsp(tmp_path, np.ones((3, 14, 4)))
    whole = (tmp_path / "joints.mat").read_bytes()
    for content in (b"", b"what?", whole[:40], whole[:200], whole[:-300]):
        (tmp_path / "joints.mat").write_bytes(content)
        with pytest.raises(
                DataError, match="joints.mat: expected 'joints' .* in a MATLAB file; ") as caught:
            load_dataset(f"lsp:{tmp_path}", "all")
        assert "\n" not in str(caught.value)
    save_matlab(tmp_path / "joints.mat", points=np.ones(3))
    with pytest.raises(DataError, match="found no entry 'joints'"):
        load_dataset(f"lsp:{tmp_path}", "all")


def test_a_matlab_file_that_unpacks_to_too_much_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LARGEST_MATLAB", 100)
    write_lsp(tmp_path, np.ones((3, 14, 4)))
    with pytest.raises(
            DataError, match="joints.mat: expected 'joints' .*, found joints of 3×14×4 numbers"):
        load_dataset(f"lsp:{tmp_path}", "all")


def test_without_scipy_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(DataError, match="joints.mat: MATLAB files need SciPy: pip install scipy"):
        load_dataset(f"lsp:{tmp_path}", "all")


def test_missing_and_broken_images_are_found_out_before_training(tmp_path):
    write_lsp(tmp_path, np.ones((3, 14, 4)))
    (tmp_path / "images" / "im0003.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="im0003.jpg: not a readable image"):
        load_dataset(f"lsp:{tmp_path}", "all")
    (tmp_path / "images" / "im0003.jpg").unlink()
    assert len(load_dataset(f"lsp:{tmp_path}", "train").ids) == 2
    with pytest.raises(DataError, match="joints.mat: image 'images/im0003.jpg' is missing"):
        load_dataset(f"lsp:{tmp_path}", "val")
    save_matlab(tmp_path / "joints.mat", joints=np.ones((3, 14, 1)).repeat(0, 2))
    with pytest.raises(DataError, match="joints.mat: expected"):
        load_dataset(f"lsp:{tmp_path}", "all")


# ---------------------------------------------------------------------------- SURREAL and Human3.6M

def records(joints, count, prefix=""):
    rng = np.random.default_rng(joints)
    return [{"name": f"{prefix}{n}.jpg", "keypoint2d": rng.uniform(0, 47, (joints, 2)).tolist(),
             "keypoint3d": [[0, 0, 0]] * joints, "intrinsic_matrix": np.eye(3).tolist()}
            for n in range(count)]


@pytest.fixture
def surreal(tmp_path):
    for split, count in (("train", 5), ("val", 2)):
        for run in range(3):
            write_json(tmp_path / split / f"run{run}.json", records(24, count))
            write_images(
                tmp_path / split / f"run{run}", [f"{n}.jpg" for n in range(count)], (48, 48))
    return tmp_path


def test_surreal_people_are_whole_images(surreal):
    val = load_dataset(f"surreal:{surreal}", "val")
    assert len(val.ids) == 6
    assert val.files[2] == str(surreal / "val/run1/0.jpg")
    assert set(val.domains) == {"render"}
    source = np.array(records(24, 2)[1]["keypoint2d"])
    # an ankle, pelvis, head, a wrist
    assert np.allclose(val.keypoints[1, [0, 6, 9, 15], :2], source[[7, 0, 15, 21]])
    assert (val.keypoints[:, :, 2] == 2).all() and val.skeleton is BODY16
    corners = np.array([[0, 0], [47, 47.0]])
    in_the_crop = transform_points(corners, crop_matrix(val.boxes[0], (64, 64)))
    assert np.allclose(in_the_crop, [[0, 0], [63, 63]])


def test_a_fifth_of_surreal_is_not_trained_on(surreal):
    train, both = (load_dataset(f"surreal:{surreal}", split) for split in ("train", "all"))
    assert len(train.ids) == 12 and len(set(train.files)) == 12 and len(both.ids) == 21
    order = list(range(15))
    random.Random(42).shuffle(order)  # what RegDA does to all of its samples
    assert train.files == [both.files[row] for row in order[3:]]


def test_joints_outside_an_image_are_not_labelled(surreal):
    content = records(24, 2)
    content[0]["keypoint2d"][7] = [20, 48.5]
    write_json(surreal / "val" / "run0.json", content)
    keypoints = load_dataset(f"surreal:{surreal}", "val").keypoints
    assert keypoints[0, 0].tolist() == [0, 0, 0] and (keypoints[:, :, 2] > 0).sum() == 6 * 16 - 1


@pytest.mark.parametrize("content, words", [
    ({}, "run0.json: expected surreal as RegDA prepares it, a JSON list, found {"),
    ([1], "run0.json: record 0: expected one text in 'name', found nothing"),
    ([{"name": 1, "keypoint2d": [[1, 2]] * 24}],
     "run0.json: record 0: expected one text in 'name', found 1"),
    ([{"name": "0.jpg"}],
     "run0.json: record 0: expected 24×2 finite numbers in 'keypoint2d', found nothing"),
    ([{"name": "0.jpg", "keypoint2d": [[1, 2]] * 16}],
     "run0.json: record 0: .*24×2 .*'keypoint2d', found 16 values"),
    ([{"name": "0.jpg", "keypoint2d": [["x", 2]] * 24}],
     "run0.json: record 0: .*found 24 values, among .*'x'"),
    ([{"keypoint2d": [[1, 2]] * 24}],
     "run0.json: record 0: expected one text in 'name', found nothing"),
    ([{"name": "../../../0.jpg", "keypoint2d": [[1, 2]] * 24}], "image .*0.jpg' is"),
    ([{"name": "7.jpg", "keypoint2d": [[1, 2]] * 24}], "7.jpg' is missing"),
    ([{"name": "0.jpg", "keypoint2d": [[float("nan"), 2]] * 24}],
     "run0.json: record 0: .*found 24 .* among .*nan"),
    ([{"name": "0.jpg", "keypoint2d": [[1e300, 2]] * 24}],
     "run0.json: record 0: .*finite numbers in 'keypoint2d'"),
])
def test_wrong_annotations_of_surreal_are_an_error_that_names_them(surreal, content, words):
    write_json(surreal / "val" / "run0.json", content)
    with pytest.raises(DataError, match=words) as caught:
        load_dataset(f"surreal:{surreal}", "val")
    assert "\n" not in str(caught.value) and str(surreal) in str(caught.value)


def test_missing_or_empty_annotations_are_an_error(surreal):
    for run in range(3):
        write_json(surreal / "val" / f"run{run}.json", [])
    with pytest.raises(DataError, match="expected images, found none"):
        load_dataset(f"surreal:{surreal}", "val")
    (surreal / "val" / "run2.json").unlink()
    with pytest.raises(
            DataError,
            match="run2.json: no such file; expected surreal as RegDA prepares it, a JSON list"):
        load_dataset(f"surreal:{surreal}", "val")


def test_human36m_is_split_by_subject(tmp_path):
    for subject in (1, 5, 6, 7, 8, 9, 11):
        content = records(16, 2, f"s_{subject:02}/")
        write_json(tmp_path / "annotations" / f"keypoints2d_{subject}.json", content)
        write_images(tmp_path / "crop_images", [record["name"] for record in content], (48, 48))
    train, val, both = (
        load_dataset(f"human36m:{tmp_path}", split) for split in ("train", "val", "all"))
    assert [len(part.ids) for part in (train, val, both)] == [10, 4, 14]
    assert not set(train.files) & set(val.files)
    assert val.files[0] == str(tmp_path / "crop_images/s_09/0.jpg")
    assert set(val.domains) == {"photo"}
    assert np.allclose(val.keypoints[0, :, :2], records(16, 2)[0]["keypoint2d"])
    assert (train.boxes == val.boxes[0]).all()


def test_human36m_is_tested_on_the_frames_that_regda_draws(tmp_path):
    points = np.broadcast_to(np.arange(1700)[:, None, None] % 48, (1700, 16, 2)).tolist()
    for subject in (9, 11):
        write_json(tmp_path / "annotations" / f"keypoints2d_{subject}.json",
                   [{"name": "a.jpg", "keypoint2d": place} for place in points])
    write_images(tmp_path / "crop_images", ["a.jpg"], (48, 48))
    drawn = random.Random(42).choices(points + points, k=3200)
    val = load_dataset(f"human36m:{tmp_path}", "val")
    assert (val.keypoints[:, :, :2] == np.array(drawn)).all() and len(set(val.ids)) == 3200


# ------------------------------------------------------------------------------------------ animals

@pytest.fixture
def synthetic(tmp_path):
    content = {}
    for animal in ("horse", "tiger"):
        names = [f"synthetic_animal/{animal}_combineds5r5_texture/{n}_img.png" for n in range(4)]
        write_images(tmp_path, names, (64, 48))
        points = [[[10.0 + n + k, 20, k % 2] for k in range(18)] for n in range(4)]
        content[animal] = {
            "imgpath": [f"./animal_data/{name}" for name in names], "keypoints": points,
            "bbox": [[-3, 40, 10, 50]] * 4, "train_idxs": [2, 0, 1], "valid_idxs": [3]}
    write_json(tmp_path / "clean_data" / "keypoints_18.json", content)
    return tmp_path


def test_synthetic_animals_are_split_by_their_lists(synthetic):
    train, val, both = (
        load_dataset(f"synthetic-animal:{synthetic}", split) for split in ("train", "val", "all"))
    assert [len(part.ids) for part in (train, val, both)] == [6, 2, 8]
    assert train.skeleton is ANIMAL18
    assert train.files[0] == str(
        synthetic / "synthetic_animal/horse_combineds5r5_texture/2_img.png")
    assert train.domains.tolist() == ["horse"] * 3 + ["tiger"] * 3
    # hidden joints are known
    assert val.keypoints[0, :3].tolist() == [[13, 20, 1], [14, 20, 2], [15, 20, 1]]
    assert val.boxes[0].tolist() == [0, 10, 40, 38]  # within the image of 64 x 48


def test_a_spec_may_choose_among_the_animals(synthetic):
    tigers = load_dataset(f"synthetic-animal:{synthetic}#tiger", "train")
    assert tigers.domains.tolist() == ["tiger"] * 3
    assert all("tiger" in file for file in tigers.files)
    assert len(load_dataset(f"synthetic-animal:{synthetic}#tiger,horse", "train").ids) == 6
    with pytest.raises(
            DataError, match="#lion: no image of domain lion; expected some of horse, tiger"):
        load_dataset(f"synthetic-animal:{synthetic}#lion", "train")


def test_eighteen_joints_serve_those_who_have_fourteen(synthetic):
    dataset = load_dataset(f"synthetic-animal:{synthetic}", "val")
    fourteen = with_skeleton(dataset, ANIMAL14)
    assert (fourteen.keypoints[:, 0] == dataset.keypoints[:, 0]).all()
    hooves = [skeleton.names.index("right_back_hoof") for skeleton in (ANIMAL14, ANIMAL18)]
    assert hooves == [5, 6] and (fourteen.keypoints[:, 5] == dataset.keypoints[:, 6]).all()
    again = with_skeleton(fourteen, ANIMAL18)
    assert not again.keypoints[:, ANIMAL18.names.index("chin")].any()


def test_dogs_and_sheep_of_uniframe_have_fourteen_joints(synthetic):
    content = json.loads((synthetic / "clean_data" / "keypoints_18.json").read_text("utf-8"))
    record = content["horse"] | {"keypoints": np.ones((4, 14, 3)).tolist()}
    path = write_json(
        synthetic / "clean_data" / "keypoints_14.json", {"hound": record, "sheep": record})
    dataset = load_dataset(f"synthetic-animal:{path}", "val")
    assert dataset.skeleton is ANIMAL14 and dataset.domains.tolist() == ["dog", "sheep"]
    converted = load_dataset(f"coco:{convert.convert('synthetic-animal', path)}", "val")
    assert converted.domains.tolist() == ["dog", "sheep"]
    assert [*map(Path, converted.files)] == [*map(Path, dataset.files)]


@pytest.mark.parametrize("change, words", [
    ({"valid_idxs": [9]}, "keypoints_18.json: .*IndexError"),
    ({"valid_idxs": None}, "keypoints_18.json: .*TypeError"),
    ({"bbox": [[1, 2, 3]] * 4}, "keypoints_18.json: .*IndexError"),
    ({"keypoints": [[[1, 2, 1]] * 17] * 4}, "keypoints_18.json"),
    ({"keypoints": 5}, "keypoints_18.json"),
    ({"imgpath": ["/etc/passwd"] * 4}, "passwd.* is missing"),
    ({"bbox": [[70, 80, 10, 50]] * 4}, "zero or negative size"),
])
def test_wrong_annotations_of_synthetic_animals_are_an_error_that_names_them(
        synthetic, change, words):
    path = synthetic / "clean_data" / "keypoints_18.json"
    content = json.loads(path.read_text("utf-8"))
    write_json(path, {"horse": content["horse"] | change})
    with pytest.raises(DataError, match=words) as caught:
        load_dataset(f"synthetic-animal:{synthetic}", "val")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_json_that_ends_too_early_is_an_error(synthetic):
    path = synthetic / "clean_data" / "keypoints_18.json"
    for text in ("", "{", '{"horse": 3}', "[]", '{"horse": {}}', "{}", "\x00"):
        path.write_text(text)
        with pytest.raises(
                DataError,
                match="_18.json: expected SyntheticAnimal's .*(; \\w+: |, found no entry ')"):
            load_dataset(f"synthetic-animal:{synthetic}", "train")


@pytest.fixture
def tigdog(tmp_path):
    home = tmp_path / "animal_data" / "behaviorDiscovery2.0"
    for animal, first in (("horse", 1), ("tiger", 7)):
        shots = [[4, first, first + 1], [5, 90, 95], [6, first + 2, first + 2]]
        save_matlab(home / "ranges" / animal / "ranges.mat", ranges=np.array(shots, np.uint16))
        for shot, count in ((4, 2), (6, 1)):  # nobody has labelled shot 5
            cells = np.empty((count, 1), object)
            for frame in range(count):
                points = np.column_stack([20.0 + np.arange(19), np.full(19, 20.0 + shot + frame)])
                points[1] = 0
                cells[frame, 0] = {
                    "positions": points,
                    "vis": np.uint8((points[:, :1] > 0) & (points[:, :1] != 22))}
            save_matlab(home / "landmarks" / animal / f"{shot}.mat", landmarks=cells)
        write_images(home / animal, [f"{first + n:08}.jpg" for n in range(3)])
        for name, rows in (("train", [2, 0]), ("valid", [1])):
            path = tmp_path / "cached_data" / "real_animal" / animal / f"{name}_idxs_by_video.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, rows)
    return tmp_path / "animal_data"


def test_tigdog_is_split_by_its_lists_of_frames(tigdog):
    train, val, both = (
        load_dataset(f"tigdog:{tigdog}", split) for split in ("train", "val", "all"))
    assert [len(part.ids) for part in (train, val, both)] == [4, 2, 6] and both.skeleton is ANIMAL18
    home = tigdog / "behaviorDiscovery2.0"
    names = ["horse/00000003.jpg", "horse/00000001.jpg", "tiger/00000009.jpg", "tiger/00000007.jpg"]
    assert train.files == [str(home / name) for name in names]
    assert val.domains.tolist() == ["horse", "tiger"]
    assert load_dataset(f"tigdog:{home}", "val").files == val.files
    horse, tiger = val.keypoints
    # unlabelled; labelled but not visible
    assert horse[0].tolist() == [20, 25, 2] and not horse[[1, 2]].any()
    # tigers: knees and elbows change places
    assert horse[8, 0] == 28 and tiger[8, 0] == 34 and tiger[14, 0] == 28
    assert horse[12, 0] == tiger[12, 0] == 32
    assert val.boxes[0].tolist() == [5, 10, 47, 30]  # 15 pixels around the joints, hidden ones too


def test_tigdog_without_its_lists_can_only_be_read_as_a_whole(tigdog):
    path = tigdog.parent / "cached_data" / "real_animal" / "tiger" / "train_idxs_by_video.npy"
    for rows in ([3], [[0]], [0.5], [-1], np.array([None])):
        np.save(path, rows, allow_pickle=True)
        with pytest.raises(
                DataError,
                match="tiger/train_idxs_by_video.npy: expected numbers of labelled frames"):
            load_dataset(f"tigdog:{tigdog}", "train")
    path.write_bytes(b"")
    with pytest.raises(
            DataError, match="tiger/train_idxs_by_video.npy: expected numbers of labelled frames"):
        load_dataset(f"tigdog:{tigdog}", "train")
    path.unlink()
    with pytest.raises(
            DataError,
            match="animal_data: expected UniFrame's cached_data/real_animal/tiger/train_idxs"):
        load_dataset(f"tigdog:{tigdog}", "train")
    assert len(load_dataset(f"tigdog:{tigdog}", "all").ids) == 6


def test_wrong_files_of_tigdog_are_an_error_that_names_them(tigdog):
    home = tigdog / "behaviorDiscovery2.0"
    cells = np.empty((1, 1), object)
    cells[0, 0] = {"positions": np.ones((5, 2)), "vis": np.ones((5, 1))}
    numbers = np.array([[[1.0]], [[2.0]]], object)
    for landmarks in (cells, numbers, np.ones((2, 1)), np.array([["a"], ["b"]])):
        save_matlab(home / "landmarks" / "tiger" / "4.mat", landmarks=landmarks)
        with pytest.raises(
                DataError,
                match="tiger/4.mat: (expected 'landmarks' of 2 frames|.* in a MATLAB file)"):
            load_dataset(f"tigdog:{tigdog}", "all")
    save_matlab(home / "ranges" / "tiger" / "ranges.mat", ranges=np.ones((3, 2)))
    with pytest.raises(DataError, match=r"ranges.mat: expected 'ranges' \(shots, 3\), found"):
        load_dataset(f"tigdog:{tigdog}", "all")
    (home / "ranges" / "horse" / "ranges.mat").unlink()
    with pytest.raises(DataError, match="horse/ranges.mat: no such file"):
        load_dataset(f"tigdog:{tigdog}", "all")


LEGS = ("left_front", "right_front", "left_back", "right_back")
NAMES20 = ["left_eye", "right_eye", "nose", "left_ear", "right_ear",
           *(f"{leg}_{joint}" for joint in ("elbow", "knee", "paw") for leg in LEGS),
           "throat", "withers", "tailbase"]


@pytest.fixture
def animalpose(tmp_path):
    write_images(tmp_path / "images", [f"2007_{n:06}.jpg" for n in range(9)] + ["do12.jpeg"])
    images = {str(n + 1): f"2007_{n:06}.jpg" for n in range(9)} | {"10": "do12.jpeg"}
    points = [[k + 1, 2 * k + 1, int(k != 13)] for k in range(20)]
    animals = [(n + 1, 1 + n % 2) for n in range(10)] + [(2, 1)]  # a picture of two species
    categories = [
        {"id": n, "name": name, "keypoints": NAMES20} for n, name in ((1, "dog"), (2, "sheep"))]
    annotations = [{"image_id": image, "category_id": species, "bbox": [5, 6, 35, 46],
                    "keypoints": points, "num_keypoints": 19} for image, species in animals]
    content = {"images": images, "categories": categories, "annotations": annotations}
    return write_json(tmp_path / "keypoints.json", content)


def test_animalpose_is_split_by_picture(animalpose):
    train, val, both = (
        load_dataset(f"animalpose:{animalpose.parent}", split) for split in ("train", "val", "all"))
    assert len(both.ids) == 11 and both.skeleton is ANIMAL14 and len(train.ids) + len(val.ids) == 11
    assert not set(train.files) & set(val.files) and len(set(val.files)) == 2
    shared = [file.endswith("000001.jpg") for file in both.files]
    assert both.domains[shared].tolist() == ["sheep", "dog"]
    assert both.domains[9] == "dog"  # by its name, whatever its category
    assert both.boxes[0].tolist() == [5, 6, 30, 40] and len(set(both.image_ids)) == 11
    order = [0, 1, 13, 14, 15, 16, 9, 10, 11, 12, 5, 6, 7, 8]  # UniFrame's fourteen of the twenty
    known = np.array(order) != 13
    assert (both.keypoints[0, known, 0] == np.array(order)[known] + 1).all()
    assert (both.keypoints[0, known, 2] == 2).all() and not both.keypoints[0, ~known].any()


def test_animalpose_of_mmpose_has_its_own_split(tmp_path):
    names = ["L_Eye", "R_Eye", *(f"{side}_{joint}" for joint in ("Elbow", "Knee", "Paw")
                                 for side in ("L_F", "R_F", "L_B", "R_B"))]
    files = {
        "train": "VOC2012/JPEGImages/2008_000123.jpg", "val": "animalpose_image_part2/cow/co7.jpeg"}
    for split, name in files.items():
        write_images(tmp_path, [name])
        write_json(tmp_path / "annotations" / f"animalpose_{split}.json", {
            "images": [{"id": 4, "file_name": name, "width": 64, "height": 48}],
            "categories": [{"id": 1, "name": "animal", "keypoints": names}],
            "annotations": [{
                "id": 1, "image_id": 4, "category_id": 1, "bbox": [5, 6, 30, 40], "area": 1200,
                "keypoints": [3.0, 4.0, 2.0] * 14, "num_keypoints": 14, "iscrowd": 0}]})
    for split, domain in (("train", "animal"), ("val", "cow")):
        dataset = load_dataset(f"animalpose:{tmp_path}", split)
        assert dataset.domains.tolist() == [domain] and dataset.boxes.tolist() == [[5, 6, 30, 40]]
        assert (dataset.keypoints == [3, 4, 2]).all()


def test_a_real_sample_of_animalpose_is_read(real):
    dataset = load_dataset(f"animalpose:{real / 'animals' / 'animalpose'}", "all")
    assert dataset.domains.tolist() == ["cat", "horse"]
    assert dataset.boxes[1].tolist() == [23, 9, 256, 240]
    assert dataset.keypoints[0, [0, 2, 10]].tolist() == [[117, 95, 2], [84, 214, 2], [123, 142, 2]]
    assert (dataset.keypoints[:, :, 2] > 0).sum(1).tolist() == [11, 9]


@pytest.mark.parametrize("change, words", [
    ({"image_id": 99}, "KeyError '99'"),
    ({"category_id": 9}, "KeyError 9"),
    ({"bbox": [1, 2, 3]}, "ValueError"),
    ({"bbox": [35, 6, 5, 46]}, "zero or negative size"),
    ({"keypoints": [[1, 2, 1]] * 19}, "ValueError"),
    ({"keypoints": None}, "ValueError"),
])
def test_wrong_annotations_of_animalpose_are_an_error_that_names_them(animalpose, change, words):
    content = json.loads(animalpose.read_text("utf-8"))
    content["annotations"][1] |= change
    write_json(animalpose, content)
    with pytest.raises(
            DataError, match=f"keypoints.json: .*{words}|annotation 2.*{words}") as caught:
        load_dataset(f"animalpose:{animalpose}", "all")
    assert "\n" not in str(caught.value)


def test_other_json_is_not_animalpose(animalpose):
    for content in ([], {}, {"categories": []}, {"categories": [{"keypoints": 3}]}, 5):
        write_json(animalpose, content)
        with pytest.raises(DataError, match="keypoints.json: .*AnimalPose's"):
            load_dataset(f"animalpose:{animalpose}", "all")


@pytest.mark.parametrize("name", ["synthetic-animal", "tigdog", "animalpose"])
def test_animals_are_the_same_in_cocos_format(name, request, capsys):
    root = request.getfixturevalue({"synthetic-animal": "synthetic"}.get(name, name))
    root = root if root.is_dir() else root.parent
    assert convert.main([name, str(root)]) == 0
    home = capsys.readouterr().out.strip()
    for split in ("train", "val"):
        own, coco = load_dataset(f"{name}:{root}", split), load_dataset(f"coco:{home}", split)
        assert coco.files == own.files and coco.domains.tolist() == own.domains.tolist()
        assert coco.skeleton.names == own.skeleton.names and (coco.keypoints == own.keypoints).all()
        assert np.allclose(coco.boxes, own.boxes)
    assert convert.main([name, str(root / "nowhere")]) == 2


@pytest.mark.parametrize("name", data.READERS)
def test_a_folder_without_the_data_set_is_an_error(tmp_path, name):
    if name in ("lsp", "lsp-regda", "tigdog"):
        pytest.importorskip("scipy")
    for split in ("train", "val", "all"):
        with pytest.raises(DataError, match="expected|no folder with images"):
            load_dataset(f"{name}:{tmp_path}", split)
    with pytest.raises(DataError, match="unknown split 'test': expected train, val or all"):
        load_dataset(f"{name}:{tmp_path}", "test")
    with pytest.raises(DataError, match=f"{name}:.*no such file or folder"):
        load_dataset(f"{name}:{tmp_path / 'missing'}", "all")
    if name != "figures":  # they are drawn where there is no root
        with pytest.raises(DataError, match=f"{name}:: no such file or folder"):
            load_dataset(f"{name}:", "all")


# ---------------------------------------------------------------------------- a format of one's own

def read_tables(root, split):
    """A made-up format: a folder of pictures, and a table with a line for each joint."""
    dataset = picture_dataset(
        find_pictures([root / split]), make_skeleton(("left_hand", "right_hand"), []))
    dataset = with_boxes(dataset, np.arange(2), np.array([[4.0, 4, 40, 40], [8, 8, 30, 30]]))
    joints = np.loadtxt(root / f"{split}.txt").reshape(2, 2, 3)
    dataset.keypoints[:] = joints
    return dataset


def test_a_reader_that_is_entered_in_readers_opens_a_format_of_ones_own(tmp_path, monkeypatch):
    write_images(tmp_path, ["train/a.png", "train/b.png"])
    np.savetxt(tmp_path / "train.txt", [[10, 20, 2], [30, 20, 2], [12, 14, 1], [0, 0, 0]])
    with pytest.raises(DataError, match="unknown data set 'tables' in 'tables:x': expected one of "
                                        f"{', '.join(data.READERS)}$"):
        load_dataset("tables:x", "train")

    monkeypatch.setitem(data.READERS, "tables", read_tables)
    dataset = load_dataset(f"tables:{tmp_path}", "train")
    assert isinstance(dataset, PoseDataset) and dataset.name == f"tables:{tmp_path}"
    assert len(load_dataset(f"tables:{tmp_path}#picture", "train").ids) == 2

    # What the model is trained on: the crop of a person with its two heatmaps.
    crop = Crops(dataset, (64, 64))[0, 0]
    assert crop["image"].shape == (3, 64, 64) and crop["visible"].tolist() == [2, 2]
    heatmaps, weights = encode_heatmaps(
        crop["keypoints"][None], crop["visible"][None], (64, 64), (16, 16))
    model = torch.nn.Conv2d(3, 2, 4, stride=4)
    predicted = model(crop["image"][None] / 255)
    loss = supervised_loss(predicted, heatmaps, weights)
    loss.backward()
    assert loss.isfinite() and model.weight.grad is not None
    assert Crops(dataset, (64, 64))[1, 0]["visible"].tolist() == [1, 0]  # hidden; not labelled
