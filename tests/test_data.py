"""What must hold for the data: reading, crops, heatmaps, augmentation and the built-in figures."""
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from assets.figures import STYLES, draw_figure
from conftest import ROOT, run_program
from data import (COCO17, GENTLE, REGDA, VITPOSE, Augmentation, Crops, DataError, crop_matrix,
                  decode_heatmaps, draw_figures, encode_heatmaps, half_body_box, image_names,
                  invert_matrix, load_dataset, open_image, picture_dataset, picture_rows, read_boxes,
                  remove_labels, select_images, to_coco, transform_points, warp_image,
                  with_sentences, written_whole)
from eval import evaluate_domains

SIZE = (128, 96)
COUNTS = {"train": (3, 2), "val": (2, 1)}


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    return draw_figures(tmp_path_factory.mktemp("cache"), COUNTS)


# ------------------------------------------------------------------------------------ reading files

def person(**changes):
    columns = [np.linspace(10, 40, 17), np.linspace(10, 50, 17), np.full(17, 2)]
    keypoints = np.column_stack(columns).ravel().tolist()
    return {"id": 7, "image_id": 3, "category_id": 1, "bbox": [5, 5, 40, 50], "area": 900,
            "iscrowd": 0, "num_keypoints": 17, "keypoints": keypoints} | changes


def write_coco(folder, annotations, file_name="a.jpg", **changes):
    Image.new("RGB", (64, 64)).save(folder / "a.jpg")
    content = {"images": [{"id": 3, "file_name": file_name, "width": 64, "height": 64}],
               "annotations": annotations,
               "categories": [{"id": 1, "name": "person"}]} | changes
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path


def test_a_coco_file_becomes_arrays(tmp_path):
    path = write_coco(
        tmp_path, [person(), person(id=8, iscrowd=1), person(id=9, keypoints=[0] * 51)])
    dataset = load_dataset(f"coco:{path}", "all")
    assert dataset.keypoints.shape == (3, 17, 3) and dataset.files == [str(tmp_path / "a.jpg")]
    assert dataset.boxes[0].tolist() == [5, 5, 40, 50] and dataset.areas[0] == 900
    assert dataset.annotated.tolist() == [0]  # neither the crowd nor the person without keypoints
    assert to_coco(dataset)["annotations"][0] == person()


# ------------------------------------------------------------------------- the domain of an image

@pytest.mark.parametrize("name", ["coco", "humanart"])
@pytest.mark.parametrize("category, domain", [
    ("oil_painting", "oil painting"), ("oil painting ", "oil painting"), ("cartoon", "cartoon"),
    ("", "photo"), (None, "photo"), (" ", "photo"), (7, "7"), (0, "0")])
def test_a_domain_has_one_spelling_and_nothing_is_photo(tmp_path, name, category, domain):
    image = {"id": 3, "file_name": "a.jpg", "category": category}
    path = write_coco(tmp_path, [person()], images=[image])
    dataset = load_dataset(f"{name}:{path}", "all")
    assert dataset.domains.tolist() == [domain]
    spelled = domain.replace(" ", "_")
    assert load_dataset(f"{name}:{path}#{spelled}", "all").domains.tolist() == [domain]
    read = with_sentences(dataset, {spelled: "a sentence"})
    assert read.sentences.tolist() == ["a sentence"]
    _, numbers = evaluate_domains(to_coco(dataset), [
        {"image_id": 3, "category_id": 1, "keypoints": person()["keypoints"], "score": 1}])
    assert list(numbers) == [domain] and numbers[domain]["AP"] > 0.999


@pytest.mark.parametrize("name, file_name, domain", [
    ("humanart", "HumanArt\\images\\oil_painting\\a.jpg", "oil painting"),
    ("humanart", "HumanArt/images/oil_painting/a.jpg", "oil painting"),
    ("humanart", "train2017\\a.jpg", "photo"), ("humanart", "a.jpg", "photo"),
    ("coco", "train\\a.jpg", "photo"), ("coco", "video_7/a.jpg", "photo")])
def test_a_folder_is_a_domain_in_human_art_alone(tmp_path, name, file_name, domain):
    place = tmp_path.joinpath(*file_name.replace("\\", "/").split("/"))
    place.parent.mkdir(parents=True, exist_ok=True)
    path = write_coco(tmp_path, [person()], file_name)
    if place != tmp_path / "a.jpg":
        (tmp_path / "a.jpg").rename(place)
    assert load_dataset(f"{name}:{path}", "all").domains.tolist() == [domain]


def test_the_domain_of_a_format_of_ones_own_is_spelled_alike(tmp_path, monkeypatch):
    path = write_coco(tmp_path, [person()])

    def read(root, split):
        return replace(data.read_coco(root, "all"), domains=np.array(["oil_painting"]))
    monkeypatch.setitem(data.READERS, "mine", read)
    assert load_dataset(f"mine:{path}", "val").domains.tolist() == ["oil painting"]


@pytest.mark.parametrize("domain", ["photo", "picture"])
def test_the_template_names_nothing_that_it_does_not_know(domain):
    sentence_of = data.fill_template("a photo of a {domain} character", [domain, "cartoon"])
    assert sentence_of == {domain: "a photo of a human character",
                           "cartoon": "a photo of a cartoon character"}


def test_a_path_without_the_name_of_a_format_is_offered_with_one(tmp_path):
    path = write_coco(tmp_path, [person()])
    for root, offer in ((tmp_path, "pictures"), (path, "coco")):
        with pytest.raises(DataError, match=f"unknown data set .*; is it {offer}:{root}\\?$"):
            load_dataset(str(root), "val")
    with pytest.raises(DataError, match="expected one of [a-z0-9, -]+$"):
        load_dataset(f"{tmp_path}/nowhere", "val")


# ------------------------------------------------------------------------- the split of a single file

def split_names(folder, names, order=None, unlabelled=()):
    """The names of the images that are held out, and of the others, of a file with these images."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    ids = np.arange(len(names)) if order is None else order
    images = [{"id": int(number), "file_name": names[number]} for number in ids]
    people = [person(id=int(number) + 1, image_id=int(number)) for number in ids
              if names[number] not in unlabelled]
    path = folder / "people.json"
    path.write_text(json.dumps({"images": images, "annotations": people}))
    found = {}
    for split in ("val", "train"):
        files = load_dataset(f"coco:{path}", split).files
        found[split] = sorted(Path(file).relative_to(folder).as_posix() for file in files)
    assert sorted(found["val"] + found["train"]) == sorted(names)
    return found["val"], found["train"]


def groups_in(names):
    return {re.sub(r"\d+\D*$", "", name) for name in names}


@pytest.mark.parametrize("pattern", [
    "video_{}/frame_{:04}.png", "cam{}_{:04}.png", "clip{}-{}.jpg", "day {}/IMG_{:05}_crop.jpg"])
def test_frames_of_a_video_are_held_out_together(tmp_path, capsys, pattern):
    names = [pattern.format(video, frame) for frame in range(10) for video in range(8)]
    val, train = split_names(tmp_path, names)
    assert groups_in(val).isdisjoint(groups_in(train)) and len(val) == 20
    said = capsys.readouterr().err
    assert "20 of 80 images are held out to test on, in 2 groups of alike names such as " in said
    assert said.count("held out") == 1


def test_copies_of_a_picture_by_roboflow_are_held_out_together(tmp_path):
    names = [f"p{n}_jpg.rf.{n * 7919 + copy:08x}.jpg" for n in range(20) for copy in range(3)]
    val, train = split_names(tmp_path, names)
    pictures = [{name.split("_")[0] for name in part} for part in (val, train)]
    assert pictures[0].isdisjoint(pictures[1]) and len(val) == 12


@pytest.mark.parametrize("names", [
    [f"{n:012}.jpg" for n in range(50)], [f"cover{n}/{n}.jpg" for n in range(50)],
    [*(f"frame{n}.jpg" for n in range(49)), "cover.jpg"]])
def test_a_fifth_is_held_out_one_by_one_where_names_tell_no_groups(tmp_path, capsys, names):
    val, _ = split_names(tmp_path, names)
    assert len(val) == 10 and val != sorted(names)[::5]
    assert "10 of 50 images are held out to test on, one by one\n" in capsys.readouterr().err


def test_what_is_held_out_depends_on_names_alone(tmp_path):
    names = [f"cam{camera}_{frame}.png" for camera in range(10) for frame in range(5)]
    val, _ = split_names(tmp_path / "here", names)
    order = np.random.default_rng(0).permutation(50)
    assert split_names(tmp_path / "elsewhere" / "deeper", names, order)[0] == val


def test_images_without_labels_do_not_make_up_what_is_held_out(tmp_path):
    names = [f"{n}.jpg" for n in range(60)]
    val, train = split_names(tmp_path, names, unlabelled=names[:50])
    assert len({*val} & {*names[50:]}) == 2 and len({*train} & {*names[50:]}) == 8


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_of_few_images_as_many_are_held_out_as_every_fifth(tmp_path, count):
    val, train = split_names(tmp_path, [f"{n}.jpg" for n in range(count)])
    assert len(val) == math.ceil(count / 5)


def test_a_single_file_is_tested_on_as_a_whole_and_of_two_the_one_for_testing(tmp_path):
    path = write_coco(tmp_path, [person()])
    assert data.split_to_test_on(f"coco:{path}") == "all"
    assert data.split_to_test_on(f"humanart:{path}#photo") == "all"
    assert data.split_to_test_on(f"coco:{tmp_path}") == "all"  # the only file in the folder
    for split in ("train", "val"):
        path.with_name(f"person_keypoints_{split}2017.json").write_text(path.read_text("utf-8"))
    assert data.split_to_test_on(f"coco:{tmp_path}") == "val"
    assert data.split_to_test_on("figures#photo") == data.split_to_test_on("lsp:.") == "val"


# ------------------------------------------------------------------------------------- own pictures

@pytest.fixture
def gallery(tmp_path):
    """Pictures of 30×20 pixels in three folders: three of one name, one on its side, one broken."""
    folder = tmp_path / "gallery"
    (folder / "b").mkdir(parents=True)
    (folder / "z").mkdir()
    picture = Image.new("RGB", (30, 20))
    for name in ("one.png", "b/one.png", "b/two.JPG", "z/one.png"):
        picture.save(folder / name)
    turned = Image.Exif()
    turned[0x0112] = 6  # Orientation
    picture.save(folder / "turned.jpg", exif=turned)
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture either")
    return folder


@pytest.mark.parametrize("split", ["train", "val", "all"])
def test_a_folder_of_pictures_is_a_data_set_without_labels(gallery, capsys, split):
    pictures = load_dataset(f"pictures:{gallery}", split)
    assert [Path(file).relative_to(gallery).as_posix() for file in pictures.files] == [
        "b/one.png", "b/two.JPG", "one.png", "turned.jpg", "z/one.png"]
    # each as a whole, as one sees it
    assert pictures.boxes[2:4].tolist() == [[0, 0, 30, 20], [0, 0, 20, 30]]
    assert not len(pictures.annotated) and len(remove_labels(pictures).ids) == 5
    assert "broken.jpg: not a readable image" in capsys.readouterr().err


def test_boxes_in_a_folder_say_where_its_people_are(gallery):
    boxes = [{"image_id": "b/one.png", "bbox": [1, 2, 3, 4], "score": 0.5},
             {"image_id": "two", "bbox": [5, 6, 7, 8]},
             {"image_id": "b/one", "bbox": [2, 2, 3, 4]},
             {"image_id": "turned.jpg", "bbox": [0, 0, 9, 9], "category_id": 18}]  # a dog, too
    (gallery / "boxes.json").write_text(json.dumps(boxes))
    pictures = load_dataset(f"pictures:{gallery}", "train")
    assert pictures.boxes.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [2, 2, 3, 4], [0, 0, 9, 9]]
    assert pictures.image_index.tolist() == [0, 1, 0, 3]


def test_a_box_without_a_size_is_skipped_alone_and_counted(gallery, capsys):
    boxes = [{"image_id": "two", "bbox": [5, 6, 7, 8]}, {"image_id": "two", "bbox": [5, 6, 7, 0]}]
    (gallery / "boxes.json").write_text(json.dumps(boxes))
    assert load_dataset(f"pictures:{gallery}", "all").boxes.tolist() == [[5, 6, 7, 8]]
    assert "boxes.json: skipped 1 of 2 boxes: they have no width" in capsys.readouterr().err


def test_a_detector_of_one_category_may_call_it_0_which_is_said(tmp_path, capsys):
    path = tmp_path / "boxes.json"
    box = {"image_id": 1, "bbox": [1, 2, 3, 4], "category_id": 0}
    path.write_text(json.dumps([box]))
    assert read_boxes(path, {1: 5}, category=18)[0].tolist() == [5]
    assert f"{path}: category 0, the only one, is taken as category 18" in capsys.readouterr().err
    path.write_text(json.dumps([box, box | {"category_id": 7}]))
    with pytest.raises(DataError, match=r"boxes of category 18, found categories \[0, 7\]"):
        read_boxes(path, {1: 5}, category=18)


def test_boxes_name_pictures_by_numbers_too_and_images_of_a_data_set_by_their_files(tmp_path):
    files = ["/album/0001.jpg", "/album/0012.jpg", "/album/x.jpg"]
    assert {name: picture_rows(files)[name] for name in (1, 12, "0012", "x.jpg")} == {
        1: 0, 12: 1, "0012": 1, "x.jpg": 2}
    dataset = picture_dataset(files, COCO17)  # its ids are 1, 2, 3
    names = image_names(dataset)
    assert (names[1], names[2], names["0001"], names["0012.jpg"]) == (0, 1, 0, 1) and 12 not in names


@pytest.mark.parametrize("image_id, words", [
    ("one.png", None), ("one", "two pictures are called one; expected folders"),
    ("elsewhere.png", "expected the image_id of a picture, such as .*, found none in 1 boxes; .*'elsewhere.png'")])
def test_a_box_belongs_to_one_picture(gallery, image_id, words):
    (gallery / "boxes.json").write_text(json.dumps([{"image_id": image_id, "bbox": [1, 2, 3, 4]}]))
    if words is None:  # the place of the one, the name of the other: a whole place comes first
        assert load_dataset(f"pictures:{gallery}", "all").image_index.tolist() == [2]
    else:
        with pytest.raises(DataError, match=f"boxes.json: .*{words}"):
            load_dataset(f"pictures:{gallery}", "all")


def test_a_file_without_images_is_one_error(tmp_path):
    (tmp_path / "nothing.json").write_text(json.dumps({"images": [], "annotations": []}))
    with pytest.raises(DataError, match="nothing.json: expected images, found none"):
        load_dataset(f"coco:{tmp_path / 'nothing.json'}", "all")


def test_a_folder_without_a_readable_picture_is_an_error(gallery):
    (gallery / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no such image, no folder with images"):
        load_dataset(f"pictures:{gallery / 'empty'}", "all")
    (gallery / "broken.jpg").rename(gallery / "empty" / "broken.jpg")
    with pytest.raises(
            DataError, match="^pictures:.*empty: expected pictures, found none that can be read$"):
        load_dataset(f"pictures:{gallery / 'empty'}", "all")


# -------------------------------------------------------------------------------------- wrong files

@pytest.mark.parametrize("text", [
    "", "[]", "12", '{"images": [', '{"images": [{"id": 1}], "annotations": [{"id": 1]}',
    '{"images" [1]}', '{[1]: 2}', "\x00\xff", '{"images": {}}',
    '{"images": [], "annotations": []} more', '{"images": [1], "annotations": [2]}'])
def test_a_file_that_is_not_coco_is_an_error_that_names_it(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="broken.json"):
        load_dataset(f"coco:{path}", "all")


@pytest.mark.parametrize("changes, words", [
    ({"keypoints": [1, 2]},
     "annotation 0, id 7, image_id 3: expected 51 finite numbers in 'keypoints', found 2 val"),
    ({"keypoints": ["x"] * 51},
     "annotation 0, id 7, .*51 finite numbers in 'keypoints', found 51 .* among them 'x'"),
    ({"keypoints": [math.nan] * 51},
     "annotation 0, id 7, .*51 finite numbers in 'keypoints', .*among them nan"),
    ({"keypoints": [1e300] * 51},  # too large for a float32
     "annotation 0, id 7, .*51 finite numbers in 'keypoints'"),
    ({"bbox": [1, 2, 3, math.inf]},
     "annotation 0, id 7, .*4 finite numbers in 'bbox', found 4 .* among them inf"),
    ({"bbox": [1, 2, 3]}, "annotation 0, id 7, .*4 finite numbers in 'bbox', found 3 values"),
    ({"bbox": None}, "annotation 0, id 7, .*'bbox', found None"),
    ({"area": math.nan}, "annotation 0, id 7, .*one finite number in 'area', found nan"),
    ({"image_id": "img_a"}, "annotation 0, id 7, .*one integer in 'image_id', found 'img_a'"),
    ({"iscrowd": 300}, r"annotation 0, id 7, .*one flag \(0 or 1\) in 'iscrowd', found 300"),
    ({"id": 7.5}, "annotation 0, .*one integer in 'id', found 7.5"),
    ({"image_id": 99}, "annotation id 7: .*image_id 99"),
])
def test_a_wrong_record_is_an_error_that_names_file_record_and_reason(tmp_path, changes, words):
    path = write_coco(tmp_path, [person(**changes)])
    with pytest.raises(DataError, match=f"annotations.json: {words}") as caught:
        load_dataset(f"coco:{path}", "all")
    assert "\n" not in str(caught.value)


def test_a_missing_field_is_named(tmp_path):
    record = person()
    del record["bbox"]
    with pytest.raises(
            DataError, match="annotations.json: annotation 0, id 7, .*'bbox', found nothing"):
        load_dataset(f"coco:{write_coco(tmp_path, [record])}", "all")


@pytest.mark.parametrize("image, words", [
    ({"id": 3}, "one text in 'file_name', found nothing"),
    ({"id": 3, "file_name": 5}, "one text in 'file_name', found 5"),
    ({"id": "a", "file_name": "a.jpg"}, "one integer in 'id', found 'a'"),
    (5, "one integer in 'id', found nothing")])
@pytest.mark.parametrize("name", ["coco", "humanart"])
def test_a_wrong_image_is_named(tmp_path, name, image, words):
    path = write_coco(tmp_path, [person()], images=[{"id": 1, "file_name": "a.jpg"}, image])
    with pytest.raises(DataError, match=f"annotations.json: image 1.*: expected {words}"):
        load_dataset(f"{name}:{path}", "all")


def test_a_person_without_an_area_has_that_of_the_box_and_is_no_crowd_unless_a_flag_says_so(
        tmp_path):
    record = person(image_id=4)
    del record["area"], record["iscrowd"]
    images = [{"id": n, "file_name": "a.jpg"} for n in (9, 4, 3)]
    dataset = load_dataset(
        f"coco:{write_coco(tmp_path, [record, person(id=8)], images=images)}", "all")
    assert dataset.areas.tolist() == [40 * 50, 900] and dataset.crowd.tolist() == [False, False]
    assert dataset.image_index.tolist() == [1, 2]


@pytest.mark.parametrize("file_name", [
    "../../secret.jpg", "{outside}/secret.jpg", "a/../../../secret.jpg", "..\\..\\secret.jpg"])
def test_a_file_name_never_leads_outside(tmp_path, file_name):
    Image.new("RGB", (64, 64)).save(tmp_path / "secret.jpg")
    folder = tmp_path / "data" / "set"
    folder.mkdir(parents=True)
    path = write_coco(folder, [person()], file_name.format(outside=tmp_path))
    with pytest.raises(DataError, match="secret.jpg' is missing; looked in"):
        load_dataset(f"coco:{path}", "all")


@pytest.mark.parametrize("file_name", [
    "images\\a.jpg", "./images/a.jpg", "images/1/a.jpg", "../images/a.jpg", "{here}/images/a.jpg",
    "..\\..\\label-studio\\media\\4\\a.jpg", "/home/somebody/images/a.jpg", "C:\\some\\a.jpg",
    "http://localhost:8080/data/upload/1/a.jpg"])
def test_an_image_is_found_whatever_folders_another_program_has_put_before_its_name(
        tmp_path, file_name):
    (tmp_path / "annotations").mkdir()
    path = write_coco(
        tmp_path / "annotations", [person()], file_name.format(here=tmp_path))
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations" / "a.jpg").rename(tmp_path / "images" / "a.jpg")
    dataset = load_dataset(f"coco:{path}", "all")
    assert Path(dataset.files[0]).samefile(tmp_path / "images" / "a.jpg")


def test_what_a_name_says_with_dots_comes_before_another_image_of_that_name(tmp_path):
    (tmp_path / "annotations").mkdir()
    path = write_coco(tmp_path / "annotations", [person()], "../a.jpg")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.jpg")
    assert Path(load_dataset(f"coco:{path}", "all").files[0]).samefile(tmp_path / "a.jpg")


def three_images(folder, *names):
    """A file of annotations in `folder` of three images with these names."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    path = write_coco(folder, [person(image_id=0)], images=images)
    (folder / "a.jpg").unlink()
    return path


def save_images(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (64, 64)).save(folder / name)


def test_leading_folders_may_differ_from_image_to_image(tmp_path):
    path = three_images(tmp_path, "HumanArt/images/1.jpg", "2.jpg", "upload/3/3.jpg")
    save_images(tmp_path / "images", "1.jpg", "2.jpg", "3.jpg")
    files = load_dataset(f"coco:{path}", "all").files
    assert files == [str(tmp_path / "images" / f"{number}.jpg") for number in (1, 2, 3)]


def test_two_names_never_become_one_image(tmp_path):
    path = three_images(tmp_path, "x/1.jpg", "y/1.jpg", "z/2.jpg")
    save_images(tmp_path, "1.jpg", "2.jpg")
    with pytest.raises(DataError, match="images 'x/1.jpg' and 'y/1.jpg' are both .*1.jpg: expected"):
        load_dataset(f"coco:{path}", "all")


@pytest.mark.parametrize("labels, images", [
    ("annotations", "images/default"), ("annotations", "data"), (".", "JPEGImages"), (".", "img"),
    ("Annotations", "Images"), ("labels", "labels/below/it")])
def test_images_are_looked_for_below_the_file_and_below_its_parent(
        tmp_path, capsys, labels, images):
    path = three_images(tmp_path / "set" / labels, "1.jpg", "2.jpg", "3.jpg")
    save_images(tmp_path / "set" / images, "1.jpg", "2.jpg", "3.jpg")
    files = load_dataset(f"coco:{path}", "all").files
    assert all(Path(file).parent.samefile(tmp_path / "set" / images) for file in files)
    assert capsys.readouterr().err.count("its images are in") == (images != "images")


def test_images_in_several_folders_are_ambiguous(tmp_path):
    path = three_images(tmp_path / "annotations", "1.jpg", "2.jpg", "3.jpg")
    for folder in ("cam1", "cam2"):
        save_images(tmp_path / folder, "1.jpg", "2.jpg", "3.jpg")
    with pytest.raises(DataError, match="'1.jpg' is in several folders, in .*cam1 and .*cam2"):
        load_dataset(f"coco:{path}", "all")


@pytest.mark.parametrize("there", [["2.jpg"], []])
def test_images_of_another_data_set_are_not_taken_for_missing_ones(tmp_path, there):
    path = three_images(tmp_path / "one", "1.jpg", "2.jpg", "3.jpg")
    save_images(tmp_path / "one" / "images", *there)
    save_images(tmp_path / "two", "1.jpg", "2.jpg", "3.jpg")
    with pytest.raises(DataError, match="'1.jpg' is missing"):
        load_dataset(f"coco:{path}", "all")


# ------------------------------------------------------------------------------------ sizes of images

def phone_picture(path, orientation, size=(40, 30)):
    """A picture that is stored 40 wide and 30 high, which EXIF may turn."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size).save(path, exif=exif)


def sized_coco(folder, *sizes, orientation=6):
    """A file of annotations that states these sizes of pictures, all of them phone_picture."""
    images = []
    for number, (width, height) in enumerate(sizes):
        phone_picture(folder / f"{number}.jpg", orientation)
        images.append({"id": number, "file_name": f"{number}.jpg", "width": width,
                       "height": height})
    return write_coco(folder, [person(image_id=0)], images=images)


def test_pictures_whose_stated_sizes_are_those_that_exif_gives_are_read_upright(tmp_path, capsys):
    dataset = load_dataset(f"coco:{sized_coco(tmp_path, (30, 40), (30, 40))}", "all")
    assert dataset.upright and "read as their EXIF orientation" in capsys.readouterr().err
    assert open_image(dataset.files[0], upright=dataset.upright)[0].size == (30, 40)


@pytest.mark.parametrize("size", [(40, 30), (40.0, 30.0), (0, 0), ("30", None)])
def test_other_pictures_are_read_as_they_are_stored(tmp_path, size):
    assert not load_dataset(f"coco:{sized_coco(tmp_path, size)}", "all").upright


@pytest.mark.parametrize("size, orientation", [((80, 60), 6), ((30, 40), 1), ((41, 30), 1)])
def test_a_stated_size_that_is_wrong_is_refused_with_both_sizes(tmp_path, size, orientation):
    path = sized_coco(tmp_path, (40, 30), size, orientation=orientation)
    width, height = size
    with pytest.raises(DataError, match=f"1.jpg has 40×30 pixels, but .* say {width}×{height}"):
        load_dataset(f"coco:{path}", "all")


def test_a_file_that_states_sizes_in_both_ways_is_refused(tmp_path):
    path = sized_coco(tmp_path, (40, 30), (30, 40))
    with pytest.raises(DataError, match="1.jpg is annotated as .* turns it, but .*0.jpg is not"):
        load_dataset(f"coco:{path}", "all")


def test_labels_far_outside_their_picture_are_counted(tmp_path, capsys):
    keypoints = person()["keypoints"].copy()
    keypoints[:6] = [65, 10, 2, 90, 10, 1]  # the first is near the border of 64 pixels
    keypoints[9:12] = [-99, 10, 0]  # not labelled
    load_dataset(f"coco:{write_coco(tmp_path, [person(keypoints=keypoints)])}", "all")
    said = capsys.readouterr().err
    assert "1 of 16 labelled keypoints lie far outside their images, first in annotation id 7" in said
    load_dataset(f"coco:{write_coco(tmp_path, [person()])}", "all")
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------- missing images


def test_a_missing_image_is_found_out_before_training(tmp_path):
    with pytest.raises(DataError, match="'b.jpg' is missing"):
        load_dataset(f"coco:{write_coco(tmp_path, [person()], 'b.jpg')}", "all")


def test_folders_in_a_file_name_that_do_not_exist_are_stripped(tmp_path):
    dataset = load_dataset(
        f"humanart:{write_coco(tmp_path, [person()], 'HumanArt/images/cartoon/a.jpg')}", "all")
    assert dataset.files == [str(tmp_path / "a.jpg")] and dataset.domains.tolist() == ["cartoon"]


def test_a_folder_names_the_domain_in_human_art_but_not_in_coco(tmp_path):
    path = write_coco(tmp_path, [person()], "images/a.jpg")
    assert load_dataset(f"humanart:{path}", "all").domains.tolist() == ["images"]
    assert load_dataset(f"coco:{path}", "all").domains.tolist() == ["photo"]


def test_a_missing_image_is_not_replaced_by_another_of_the_same_name(tmp_path):
    path = write_coco(tmp_path, [person()], "x/a.jpg")
    content = json.loads(path.read_text("utf-8"))
    content["images"].append({"id": 4, "file_name": "y/a.jpg", "width": 64, "height": 64})
    (tmp_path / "x").mkdir()
    (tmp_path / "a.jpg").rename(tmp_path / "x" / "a.jpg")
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="'y/a.jpg' is missing"):
        load_dataset(f"coco:{path}", "all")


def test_an_official_validation_file_alone_is_validation_data_as_a_whole(tmp_path):
    write_coco(tmp_path, [person()]).rename(tmp_path / "person_keypoints_val2017.json")
    assert len(load_dataset(f"coco:{tmp_path}", "val").ids) == 1
    with pytest.raises(DataError, match="expected person_keypoints_train2017.json to train on"):
        load_dataset(f"coco:{tmp_path}", "train")


def test_ids_must_be_unique(tmp_path):
    with pytest.raises(DataError, match="annotation id 7 appears more than once"):
        load_dataset(f"coco:{write_coco(tmp_path, [person(), person()])}", "all")


@pytest.mark.parametrize("spec, words", [
    ("cocoo:x", "unknown data set 'cocoo'"), ("coco:nowhere", "no such file or folder"),
    ("coco", "coco:FOLDER")])
def test_a_data_set_that_is_not_there_is_an_error(spec, words):
    with pytest.raises(DataError, match=words):
        load_dataset(spec, "train")


def test_a_single_file_is_divided_between_training_and_validation(real):
    parts = [load_dataset(f"coco:{real / 'coco'}", split) for split in ("train", "val", "all")]
    train, val, everything = (set(part.image_ids.tolist()) for part in parts)
    assert not train & val and train | val == everything and len(val) == 24
    assert sum(len(part.ids) for part in parts[:2]) == len(parts[2].ids) == 337


def test_human_art_is_read_with_its_own_field_names_and_paths(real):
    dataset = load_dataset(f"humanart:{real / 'humanart'}", "all")
    assert sorted(dataset.domains) == ["acrobatics", "digital art", "garage kits"]
    assert len(dataset.annotated) == 4 and all(Path(file).is_file() for file in dataset.files)


# ---------------------------------------------------------------------------- domains and sentences

ART = [
    "cartoon", "ink painting", "oil painting", "sculpture", "shadow play", "sketch",
    "stained glass"]


def test_natural_and_artificial_are_the_two_parts_of_the_figures(figures):
    natural, artificial, everything = (load_dataset(f"figures:{figures}{part}", "val")
                                       for part in ("#natural", "#artificial", ""))
    assert set(natural.domains) == {"photo"} and sorted(set(artificial.domains)) == ART
    assert (len(natural.ids), len(artificial.ids)) == (2, 7)
    assert sorted(natural.files + artificial.files) == sorted(everything.files)
    assert natural.name == f"figures:{figures}#natural"
    assert natural.sentences.tolist() == ["a photo of a person"] * 2
    assert artificial.files == load_dataset(f"figures:{figures}#{','.join(ART)}", "val").files


def test_a_part_that_is_not_there_is_an_error_that_names_those_that_are(tmp_path):
    path = write_coco(tmp_path, [person()])
    assert len(load_dataset(f"coco:{path}#natural", "all").ids) == 1
    parts = {"artificial": "artificial", "natural,artificial": "artificial, natural", "": ""}
    for part, missing in parts.items():
        with pytest.raises(
                DataError, match=f"#{part}: no image of domain {missing}; expected some of photo$"):
            load_dataset(f"coco:{path}#{part}", "all")


def test_natural_scenes_of_human_art_are_natural(real):
    natural, artificial = (load_dataset(f"humanart:{real / 'humanart'}#{part}", "all")
                           for part in ("natural", "artificial"))
    assert natural.domains.tolist() == ["acrobatics"]
    assert sorted(artificial.domains) == ["digital art", "garage kits"]
    assert len(natural.annotated) + len(artificial.annotated) == 4


def test_a_template_names_the_domain_of_each_image(figures):
    dataset = with_sentences(
        load_dataset(f"figures:{figures}", "val"), "a photo of a {domain} character")
    assert len(dataset.sentences) == len(dataset.files) == 9
    assert set(dataset.sentences) == {
        f"a photo of a {domain} character" for domain in ["human", *ART]}
    for row, image_row in enumerate(dataset.image_index):
        domain = str(dataset.domains[image_row])
        sentence = Crops(dataset, SIZE)[row, 0]["sentence"]
        assert sentence == f"a photo of a {'human' if domain == 'photo' else domain} character"
    # a template without the domain
    assert set(with_sentences(dataset, "a person").sentences) == {"a person"}


@pytest.mark.parametrize(
    "template", ["a photo of a {domain} character", "{domain}", "a {domain} of a {domain}"])
def test_in_a_template_photo_is_never_said_of_a_photo(figures, template):
    """Nobody says "a photo of a photo character"; a name with "photo" in it keeps the word."""
    dataset = load_dataset(f"figures:{figures}#natural", "val")
    assert set(with_sentences(dataset, template).sentences) == {
        template.replace("{domain}", "human")}
    dataset.domains = np.array(["photo", "photo montage"])
    assert with_sentences(dataset, "{domain}").sentences.tolist() == ["human", "photo montage"]
    assert dataset.domains.tolist() == ["photo", "photo montage"]  # the domains keep their names


def test_sentences_by_domain_come_from_a_dict_or_a_json_file(figures, tmp_path):
    dataset = load_dataset(f"figures:{figures}", "val")
    sentences = {domain: f"this is {domain}, größer" for domain in ["photo", *ART]}
    sentences["not there"] = "unread"
    (tmp_path / "sentences.json").write_text(json.dumps(sentences, ensure_ascii=False), "utf-8")
    for given in (sentences, tmp_path / "sentences.json", str(tmp_path / "sentences.json")):
        found = with_sentences(dataset, given)
        expected = [sentences[domain] for domain in dataset.domains.tolist()]
        assert found.sentences.tolist() == expected
        assert "this is photo, größer" in found.sentences  # what the user wrote stays as it is
    # a new data set
    assert dataset.sentences[0] == "a photo of a person" and found.files == dataset.files


def test_a_description_is_each_images_own(figures, tmp_path):
    dataset = with_sentences(load_dataset(f"figures:{figures}", "val"), "description")
    assert dataset.sentences.tolist() == [
        f"a {domain} of a person" for domain in dataset.domains.tolist()]
    images = [{"id": 3, "file_name": "a.jpg", "description": "one"}, {"id": 4, "file_name": "a.jpg",
                                                                      "description": "two, longer"}]
    path = write_coco(tmp_path, [person(image_id=4), person(id=8)], images=images)
    dataset = with_sentences(load_dataset(f"coco:{path}", "all"), "description")
    assert dataset.sentences.tolist() == ["one", "two, longer"]
    assert [Crops(dataset, SIZE)[row, 0]["sentence"] for row in (0, 1)] == ["two, longer", "one"]


def test_sentences_stay_with_their_images(figures):
    dataset = with_sentences(load_dataset(f"figures:{figures}", "train"), "description")
    keep = np.arange(len(dataset.files)) % 3 == 1
    part = select_images(dataset, keep)
    assert part.sentences.tolist() == dataset.sentences[keep].tolist()
    assert part.sentences.tolist() == [
        f"a {domain} of a person" for domain in part.domains.tolist()]
    assert part.select_people([0]).sentences is part.sentences
    assert remove_labels(part).sentences is part.sentences
    dataset.sentences = None
    assert select_images(dataset, keep).sentences is None
    assert Crops(dataset, SIZE)[0, 0]["sentence"] == ""


@pytest.mark.parametrize("descriptions", [
    [{}, {}], [{"description": "one"}, {}], [{"description": ""}, {}],
    [{"description": "one"}, {"description": None}]])
def test_a_missing_description_is_an_error_that_names_the_data_set(tmp_path, descriptions):
    images = [{"id": 3 + n, "file_name": "a.jpg"} | more for n, more in enumerate(descriptions)]
    path = write_coco(tmp_path, [person()], images=images)
    dataset = load_dataset(f"coco:{path}", "all")
    with pytest.raises(
            DataError,
            match=f"^coco:{path}: expected a 'description' of each image, found none in some$"):
        with_sentences(dataset, "description")
    dataset.sentences = None  # as of the data sets of domain adaptation
    with pytest.raises(DataError, match="expected a 'description' of each image"):
        with_sentences(dataset, "description")


def test_a_domain_without_a_sentence_is_an_error_that_names_it(figures, tmp_path):
    dataset = load_dataset(f"figures:{figures}", "val")
    sentences = dict.fromkeys(["photo", *ART], "a") | {"sketch": None}
    del sentences["oil painting"]
    (tmp_path / "sentences.json").write_text(json.dumps(sentences))
    for given in (sentences, tmp_path / "sentences.json"):
        with pytest.raises(DataError, match=f"^figures:{figures}: expected a sentence for each "
                                            "domain, found none for oil painting, sketch$"):
            with_sentences(dataset, given)


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"5", b'"text"', b"{", b"\xff", None])
def test_a_file_of_sentences_that_is_none_is_an_error_that_names_it(figures, tmp_path, content):
    path = tmp_path / "sentences.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
            DataError, match=f"^{path}: .*expected {{domain: sentence}}, a JSON object") as caught:
        with_sentences(load_dataset(f"figures:{figures}", "val"), str(path))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------ writing files

def test_a_file_or_folder_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with written_whole(path) as part:
        part.write_text("one")
        assert part.suffix == ".txt" and not path.exists()
    assert path.read_text("utf-8") == "one"
    with pytest.raises(KeyboardInterrupt), written_whole(path) as part:
        part.write_text("half of t")
        raise KeyboardInterrupt
    with written_whole(path) as part, written_whole(path) as other:  # two programs at once
        part.write_text("two")
        other.write_text("three")
    assert path.read_text("utf-8") == "two"
    with written_whole(tmp_path / "folder") as part:
        part.mkdir()
        (part / "b.txt").write_text("four")
    with pytest.raises(DataError, match="folder: cannot be"):  # too late
        with written_whole(tmp_path / "folder") as part:
            part.mkdir()
    assert (tmp_path / "folder" / "b.txt").read_text("utf-8") == "four"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "new"]


# --------------------------------------------------------------------------------- images and crops

@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_an_image_of_any_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    if mode == "I;16":
        Image.fromarray(np.full((8, 9), 200 * 256, np.uint16)).save(path)
    else:
        Image.new("L", (9, 8), 200).convert("RGB").convert(mode).save(path)
    for file in (path, Image.open(path)):
        image, shrink = open_image(file)
        assert image.mode == "RGB" and image.size == (9, 8) and shrink == 1
        grey, near = (255, 58) if mode == "1" else (200, 3)
        assert abs(int(np.asarray(image).mean()) - grey) <= near


def test_an_image_of_floats_is_refused_for_want_of_a_scale(tmp_path):
    Image.fromarray(np.full((8, 9), 0.5, np.float32)).save(tmp_path / "image.tif")
    with pytest.raises(DataError, match="image.tif: .* floats"):
        open_image(tmp_path / "image.tif")


def test_transparent_parts_of_a_picture_are_white_in_every_format(tmp_path):
    alpha = Image.new("L", (40, 30), 0)
    alpha.paste(255, (10, 10, 20, 20))  # black ink
    ink = Image.merge("LA", (Image.new("L", alpha.size, 0), alpha))
    ink.convert("RGBA").save(tmp_path / "rgba.png")
    ink.save(tmp_path / "la.png")
    ink.convert("RGBA").save(tmp_path / "rgba.webp", lossless=True)
    ink.convert("RGBA").save(tmp_path / "rgba.tif")
    ink.convert("RGBA").quantize(4).save(tmp_path / "palette.png")
    one_color = Image.new("P", alpha.size, 0)
    one_color.putpalette([0, 0, 0, 0, 0, 0])
    one_color.paste(1, mask=alpha)
    one_color.save(tmp_path / "palette.gif", transparency=0)
    grey = Image.new("L", alpha.size, 7)
    grey.paste(0, mask=alpha)
    grey.save(tmp_path / "grey.png", transparency=7)
    grey.convert("RGB").save(tmp_path / "rgb.png", transparency=(7, 7, 7))
    white = Image.new("L", alpha.size, 255)
    white.paste(0, mask=alpha)
    files = sorted(tmp_path.iterdir())
    for file in files:
        for given in (file, Image.open(file)):
            image, _ = open_image(given)
            assert image.mode == "RGB", file
            assert (np.asarray(image) == np.asarray(white)[:, :, None]).all(), file
    assert len(files) == 8


def test_a_half_transparent_colour_is_mixed_with_white(tmp_path):
    Image.new("RGBA", (9, 9), (200, 0, 0, 51)).save(tmp_path / "a.png")
    image, _ = open_image(tmp_path / "a.png")
    assert image.getpixel((4, 4)) == (244, 204, 204)


@pytest.mark.parametrize("low, high, dtype, expected", [
    (51_200, 52_100, np.uint16, (0, 255)), (0, 4095, np.uint16, (0, 255)),
    (0, 255, np.int32, (0, 255)), (-300, 70_000, np.int32, (0, 255)),
    (0, 65_535, np.uint16, (0, 255)), (5 * 256, 200 * 256, np.uint16, (5, 200))])
def test_grey_of_a_narrow_range_is_stretched_and_that_is_said_once(
        tmp_path, capsys, low, high, dtype, expected):
    data.report.cache_clear()
    ramp = np.linspace(low, high, 64).astype(dtype).reshape(8, 8)
    file = tmp_path / ("a.tif" if dtype is np.int32 else "a.png")
    Image.fromarray(ramp).save(file)
    for _ in range(2):
        image, _ = open_image(file)
    assert image.getextrema() == (expected,) * 3
    assert (np.diff(np.asarray(image)[:, :, 0].ravel().astype(int)) >= 0).all()
    is_wide = dtype is np.uint16 and high - low >= 2 ** 15
    assert capsys.readouterr().err.count("narrow range") == (not is_wide)


@pytest.mark.parametrize("name", ["holiday.jpg", "holiday.eps"])
def test_postscript_is_not_opened_because_that_starts_another_program(tmp_path, monkeypatch, name):
    from PIL import EpsImagePlugin
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: started.append(1))
    Image.new("RGB", (64, 64)).save(tmp_path / name, "EPS")
    with pytest.raises(DataError, match="holiday.*: not a readable image"):
        open_image(tmp_path / name)
    assert not started
    with Image.open(tmp_path / name) as image:  # as Pillow would
        image.format == "EPS" and pytest.raises(Exception, image.load)
    assert started


@pytest.mark.parametrize("size", [(643, 481), (2000, 1500)])
@pytest.mark.parametrize("rotation", [0, 20, 180])
def test_a_crop_of_a_large_image_is_sampled_from_its_means_at_the_right_place(size, rotation):
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    matrix = crop_matrix((30, 20, size[0], size[1]), SIZE, rotation=rotation)
    columns, rows = np.meshgrid(np.arange(SIZE[1]), np.arange(SIZE[0]))
    at = transform_points(np.stack([columns, rows], 2).astype(float), invert_matrix(matrix))
    inside = ((at > 60) & (at < np.array(size) - 60)).all(2)  # two blocks from the border
    for axis, values in enumerate((x, y)):
        crop = warp_image(Image.fromarray(values.astype(np.float32)), matrix, SIZE)
        assert np.abs(crop - at[:, :, axis])[inside].max() < 1e-2
    assert inside.mean() > 0.2


def test_a_large_png_gives_the_crop_of_the_same_jpeg(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (800, 600, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg", quality=100, subsampling=0)
    Image.open(tmp_path / "a.jpg").save(tmp_path / "a.png")
    box = np.array([[0, 0, 600, 800]])
    crops = []
    for file in (tmp_path / "a.jpg", tmp_path / "a.png", Image.open(tmp_path / "a.png")):
        pictures = data.picture_dataset([file], COCO17)
        dataset = data.with_boxes(pictures, np.zeros(1, int), box)
        crops.append(Crops(dataset, SIZE)[0, 0]["image"].float())
    assert torch.equal(crops[1], crops[2])
    assert (crops[0] - crops[1]).abs().mean() < 6  # levels of 255; 37 if pixels are skipped


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_a_broken_image_is_an_error_that_names_it(tmp_path, content):
    path = tmp_path / "broken.jpg"
    Image.effect_noise((200, 200), 50).save(path)
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(DataError, match="broken.jpg"):
        open_image(path)


def test_a_box_is_centred_in_its_crop_and_padded():
    # 60×80 has the crop's shape already: it grows to 75×100
    matrix = crop_matrix((30, 20, 60, 80), SIZE, padding=1.25)
    points = np.array([[60, 60], [60 - 37.5, 60 - 50], [60 + 37.5, 60 + 50]])
    inside = transform_points(points, matrix)
    assert np.allclose(inside, [[47.5, 63.5], [0, 0], [95, 127]])
    assert np.allclose(transform_points(inside, invert_matrix(matrix)), points)


def test_maps_of_arrays_and_of_tensors_are_inverted_alike():
    matrices = np.stack(
        [crop_matrix((30, 20, 60, 80), SIZE, rotation=angle) for angle in (0, 20, 200)])
    inverse, of_tensor = invert_matrix(matrices), invert_matrix(torch.from_numpy(matrices))
    assert isinstance(inverse, np.ndarray) and isinstance(of_tensor, torch.Tensor)
    assert np.allclose(inverse, of_tensor.numpy(), rtol=1e-12, atol=1e-12)
    points = np.random.default_rng(0).uniform(0, 100, (3, 5, 2))
    assert np.allclose(transform_points(transform_points(points, matrices), inverse), points)


def test_a_narrow_box_grows_to_the_crops_shape():
    matrix = crop_matrix((0, 0, 10, 100), SIZE, padding=1)
    assert np.allclose(transform_points(np.array([[5 - 37.5, 0]]), matrix), [[0, 0]])


def test_a_crop_turns_around_its_centre():
    straight, turned = (
        crop_matrix((0, 0, 75, 100), SIZE, padding=1, rotation=angle) for angle in (0, 90))
    right = np.array([[37.5 + 10, 50]])  # ten pixels right of the box's centre
    assert np.allclose(transform_points(right, straight), [[47.5 + 10 * 95 / 75, 63.5]])
    assert np.allclose(transform_points(right, turned), [[47.5, 63.5 + 10 * 127 / 100]])


@pytest.mark.parametrize("shrink", [1, 4])
def test_the_warped_image_shows_a_point_where_the_matrix_says(tmp_path, shrink):
    x, y = np.meshgrid(np.arange(640), np.arange(480))
    Image.fromarray(np.stack([x / 4, y / 4, x * 0], axis=2).astype(np.uint8)).save(
        tmp_path / "ramp.jpg", quality=100)
    image, read_shrink = open_image(tmp_path / "ramp.jpg", shrink)
    assert read_shrink == shrink
    matrix = crop_matrix((100, 50, 300, 300), SIZE, rotation=20)
    crop = warp_image(image, matrix, SIZE, read_shrink).astype(float)
    # (3, 2) in the image
    at = transform_points(np.array([[20.0, 30], [50, 90], [80, 60]]), invert_matrix(matrix))
    seen = crop[[30, 90, 60], [20, 50, 80], :2]
    assert np.abs(seen - at / 4).max() < 2  # grey levels, of which three steps cut off a part


# ------------------------------------------------------------------------------------ heatmap codec

def test_encoding_draws_a_gaussian_at_the_exact_position():
    keypoints = torch.tensor([[[40.3, 50.9], [0.0, 0.0], [10.0, 10.0]]])
    heatmaps, weights = encode_heatmaps(keypoints, torch.tensor([[2, 1, 0]]), (256, 192), (64, 48))
    x, y = 40.3 * 47 / 191, 50.9 * 63 / 255
    for v in range(64):
        for u in range(48):
            inside = abs(u - int(x + 0.5)) <= 6 and abs(v - int(y + 0.5)) <= 6
            expected = math.exp(-((u - x) ** 2 + (v - y) ** 2) / 8) if inside else 0
            assert abs(heatmaps[0, 0, v, u].item() - expected) < 1e-6
    assert weights.tolist() == [[1, 1, 0]] and heatmaps[0, 2].abs().sum() == 0


def test_a_keypoint_whose_gaussian_lies_outside_the_crop_has_no_weight():
    keypoints = torch.tensor([[[-60.0, 10], [10, 400], [190, 250]]])
    _, weights = encode_heatmaps(keypoints, torch.ones(1, 3), (256, 192), (64, 48))
    assert weights.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(
    "input_size, heatmap_size, sigma", [((256, 192), (64, 48), 2.0), ((128, 96), (32, 24), 1.5)])
def test_decoding_returns_what_was_encoded_to_a_fraction_of_a_pixel(
        input_size, heatmap_size, sigma):
    torch.manual_seed(0)
    low, high = 0.25, 0.75
    keypoints = (low + (high - low) * torch.rand(20, 17, 2)) * torch.tensor(input_size[::-1])
    heatmaps, _ = encode_heatmaps(keypoints, torch.ones(20, 17), input_size, heatmap_size, sigma)
    decoded, scores = decode_heatmaps(heatmaps, input_size, sigma)
    # a heatmap pixel is four pixels of the input
    assert (decoded - keypoints).norm(dim=2).max() < 0.2
    assert ((scores > 0.85) & (scores <= 1)).all()


def test_decoding_a_flat_heatmap_or_one_with_a_peak_at_the_border_stays_inside():
    heatmaps = torch.zeros(1, 3, 64, 48)
    heatmaps[0, 1, 0, 0] = 1
    heatmaps[0, 2, 63, 47] = 1
    decoded, scores = decode_heatmaps(heatmaps, (256, 192))
    assert decoded.isfinite().all()
    assert (decoded > -5).all()
    assert (decoded < torch.tensor([197.0, 261.0])).all()
    assert scores.tolist() == [[0, 1, 1]]


# ------------------------------------------------------------------------------------- augmentation

@pytest.mark.parametrize(
    "augmentation", [GENTLE, VITPOSE, REGDA], ids=["gentle", "ViTPose", "RegDA"])
def test_the_same_key_gives_the_same_crop_and_another_seed_another(figures, augmentation):
    crops = Crops(load_dataset(f"figures:{figures}", "train"), SIZE, augmentation)
    first, again, other = crops[0, (1, 2)], crops[0, (1, 2)], crops[0, (1, 3)]
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["keypoints"], again["keypoints"])
    assert not torch.equal(first["image"], other["image"])


@pytest.mark.parametrize("sides", [(161, 90), (401, 402)], ids=["small", "large"])
def test_an_image_read_before_gives_the_crop_of_one_read_anew(tmp_path, sides):
    """Also where one person is large, so that the file is read at half its size, and one small."""
    noise, files = np.random.default_rng(0), []
    for n, side in enumerate(sides):
        files.append(str(tmp_path / f"{n}.jpg"))
        Image.fromarray(noise.integers(0, 256, (side, side, 3), np.uint8)).save(files[-1])
    lengths = [side * share for side in sides for share in (0.2, 0.4, 0.6, 0.8, 0.9)]
    boxes = np.array([(5, 5, length, length) for length in lengths])
    dataset = data.with_boxes(data.picture_dataset(files, COCO17), np.repeat([0, 1], 5), boxes)
    crops = Crops(dataset, (40, 30), Augmentation(scale=0.3, rotation=20))
    for seed, row in enumerate(np.random.default_rng(1).integers(0, 10, 60).tolist()):
        anew = Crops(dataset, (40, 30), crops.augmentation)[row, seed]
        assert torch.equal(crops[row, seed]["image"], anew["image"])


@pytest.mark.parametrize("end, box, side, decoded", [
    ("jpg", 50, 160, 4), ("jpg", 50, 300, 12), ("jpg", 240, 300, 24), ("png", 240, 300, 12)])
def test_small_images_are_decoded_once_and_a_large_one_once_for_people_in_a_row(
        tmp_path, monkeypatch, end, box, side, decoded):
    files, opened = [str(tmp_path / f"{n}.{end}") for n in range(4)], []
    for file in files:
        Image.effect_noise((side, side), 50).save(file)
    image_file = data.image_file
    monkeypatch.setattr(data, "image_file", lambda file: opened.append(file) or image_file(file))
    dataset = data.picture_dataset(files, COCO17)
    dataset = data.with_boxes(dataset, np.arange(8) // 2, np.full((8, 4), box))
    crops = Crops(dataset, SIZE)
    for row in [*range(8)] * 3:
        crops[row, 0]
    # three times eight people, two in each image; of large boxes, JPEGs are read smaller
    assert len(opened) == decoded


def test_a_mirrored_crop_is_the_mirrored_picture_with_left_and_right_swapped(figures):
    dataset = load_dataset(f"figures:{figures}", "train")
    plain = Crops(dataset, SIZE)[0, 0]
    mirrored = Crops(dataset, SIZE, Augmentation(flip_probability=1.0))[0, 0]
    difference = plain["image"].flip(2).int() - mirrored["image"].int()
    assert difference.abs().max() <= 1  # rounding
    swapped = plain["keypoints"][COCO17.mirrored]
    swapped = swapped * torch.tensor([-1.0, 1]) + torch.tensor([95.0, 0])
    assert torch.allclose(mirrored["keypoints"], swapped, atol=1e-3)
    assert torch.equal(mirrored["visible"], plain["visible"][COCO17.mirrored])


def test_flip_pairs_are_left_and_right_of_the_same_joint():
    assert [COCO17.names[k] for k in COCO17.mirrored[:3]] == ["nose", "right_eye", "left_eye"]
    assert (COCO17.mirrored[COCO17.mirrored] == np.arange(17)).all()


EVERYTHING = Augmentation(
    flip_probability=0.5, half_body=0.5, scale=0.3, shift=0.16, box_shift=0.16, rotation=80)


RESIZED = Augmentation(flip_probability=0.5, resized_crop=0.4, rotation=80)


@pytest.mark.parametrize("augmentation", [EVERYTHING, RESIZED], ids=["moved", "resized crop"])
def test_keypoints_follow_the_picture_through_every_augmentation(tmp_path, augmentation):
    """A white dot at each keypoint is still there: after rotation, scaling, shift, mirror image,
    half-body and resized crops."""
    dots = np.zeros((200, 200, 3), np.uint8)
    keypoints = np.random.default_rng(0).integers(30, 170, (17, 2))
    columns = keypoints[:, 0, None, None] + np.arange(-1, 2)
    rows = keypoints[:, 1, None, None] + np.arange(-1, 2)[:, None]
    dots[rows, columns] = 255
    labels = np.column_stack([keypoints, np.full(17, 2)]).ravel().tolist()
    path = write_coco(tmp_path, [person(keypoints=labels, bbox=[30, 30, 140, 140])])
    Image.fromarray(dots).save(tmp_path / "a.png")
    path.write_text(path.read_text("utf-8").replace("a.jpg", "a.png").replace("64", "200"))
    crops, seen = Crops(load_dataset(f"coco:{path}", "all"), (256, 192), augmentation), 0
    for seed in range(30):
        crop = crops[0, seed]
        for (x, y), visible in zip(crop["keypoints"].tolist(), crop["visible"]):
            if visible and 1 <= x <= 190 and 1 <= y <= 254:
                assert crop["image"][:, round(y), round(x)].min() > 60
                seen += 1
    assert seen > 30 * 17 / 3


@pytest.mark.parametrize("size", [(64, 64), (128, 96)])
@pytest.mark.parametrize("least", [0.6, 0.25])
def test_a_resized_crop_is_a_part_of_the_box_anywhere_in_it_with_a_share_of_its_area_at_random(
        figures, size, least):
    dataset = load_dataset(f"figures:{figures}", "train")
    # of the whole box: padded, and of the crop's shape
    matrix = crop_matrix(dataset.boxes[0], size)
    corners = np.array([[0.0, 0], [size[1] - 1, size[0] - 1]])
    low, high = transform_points(corners, invert_matrix(matrix))
    crops, shares, places = Crops(dataset, size, Augmentation(resized_crop=least)), [], []
    for seed in range(400):
        left_top, right_bottom = transform_points(
            corners, invert_matrix(crops[0, seed]["matrix"].numpy()))
        # within the box
        assert (left_top > low - 1e-9).all() and (right_bottom < high + 1e-9).all()
        part = (right_bottom - left_top) / (high - low)
        assert part[0] == pytest.approx(part[1])  # of the same shape
        shares.append(part.prod())
        # 0 to 1 along each axis
        places.append((left_top - low) / (high - low - (right_bottom - left_top)))
    even = np.linspace(0, 1, 400)
    assert least <= min(shares) and max(shares) <= 1
    # each of them uniform
    for numbers in ((np.array(shares) - least) / (1 - least), *np.array(places).T):
        # Kolmogorov's distance, one in a thousand is greater
        assert np.abs(np.sort(numbers) - even).max() < 1.95 / 20
    correlations = np.corrcoef(np.column_stack([shares, places]).T)[np.triu_indices(3, 1)]
    assert correlations == pytest.approx(0, abs=0.2)


def test_a_keypoint_just_outside_the_crop_trains_if_outside_says_so_as_in_mmpose_and_else_not(
        tmp_path):
    keypoints = np.full((17, 3), 2.0)
    keypoints[:, :2] = 60, 60
    # on the box's border: padded, it is inside
    keypoints[:4, :2] = (20, 60), (100, 60), (60, 20), (60, 100)
    keypoints[4:8, :2] = (7, 60), (113, 60), (60, 7), (60, 113)  # three pixels outside
    keypoints[8, 2] = 0
    path = write_coco(
        tmp_path, [person(keypoints=keypoints.ravel().tolist(), bbox=[20, 20, 80, 80])])
    dataset = load_dataset(f"coco:{path}", "all")
    for outside in (False, True):
        # a pixel of it is one of the image
        item = Crops(dataset, (101, 101), Augmentation(outside=outside))[0, 0]
        _, weights = encode_heatmaps(
            item["keypoints"][None], item["visible"][None], (101, 101), (26, 26))
        assert weights[0].tolist() == [1] * 4 + [float(outside)] * 4 + [0] + [1] * 8
        assert item["visible"].tolist() == [2] * 4 + [2.0 * outside] * 4 + [0] + [2] * 8
    assert VITPOSE.outside and not any(other.outside for other in (Augmentation(), GENTLE, REGDA))


def test_half_a_body_is_a_box_around_the_mean_of_the_half_that_has_enough_keypoints():
    keypoints = np.zeros((17, 3))
    keypoints[:, :2] = np.random.default_rng(0).uniform(0, 100, (17, 2))
    upper, lower = np.arange(11), np.arange(11, 17)

    def boxes(*labelled):
        keypoints[:, 2] = 0
        keypoints[np.concatenate(labelled), 2] = 1
        found = [
            half_body_box(keypoints, COCO17, np.random.default_rng(seed)) for seed in range(400)]
        return [None if box is None else tuple(box.round(6)) for box in found]

    def around(half):
        points = keypoints[half, :2]
        size = 1.5 * (points.max(0) - points.min(0))
        return tuple(np.concatenate([points.mean(0) - size / 2, size]).round(6))

    both = boxes(upper, lower)
    assert set(both) == {around(upper), around(lower)}
    assert 0.63 < both.count(around(upper)) / 400 < 0.77
    assert set(boxes(upper, lower[:2])) == {around(upper)}  # two of the lower half are too few
    assert set(boxes(upper[:1], lower)) == {None}  # seven keypoints
    assert set(boxes(upper[:2], lower)) == {None}  # eight
    assert set(boxes(upper[:3], lower)) == {around(upper[:3]), around(lower)}
    assert set(boxes(upper[:8])) == {None} and set(boxes(upper[:9])) == {around(upper[:9])}


# ----------------------------------------------------------------------------- the built-in figures

def test_figures_are_written_in_human_arts_format(figures):
    content = json.loads((figures / "annotations" / "training_figures.json").read_text("utf-8"))
    fields = {"id", "file_name", "width", "height", "category", "description"}
    assert fields <= set(content["images"][0])
    assert len(content["images"]) == 3 + 2 * (len(STYLES) - 1)
    assert content["categories"][0]["keypoints"] == list(COCO17.names)
    as_human_art = load_dataset(
        f"humanart:{figures / 'annotations' / 'training_figures.json'}", "all")
    assert len(as_human_art.ids) == len(content["annotations"])


@pytest.mark.parametrize("style", list(STYLES))
def test_a_figures_labels_fit_its_picture(style):
    flags = []
    for seed in range(20):
        figure = draw_figure(style, np.random.default_rng(seed))
        assert figure.image.shape == (160, 160, 3) and figure.image.dtype == np.uint8
        x, y, w, h = figure.box
        assert 0 <= x and x + w <= 160 and 0 <= y and y + h <= 160 and 0 < figure.area <= w * h
        labelled = figure.keypoints[figure.keypoints[:, 2] > 0]
        flags += labelled[:, 2].tolist()
        points = labelled[:, :2]
        near = (points >= [x - 12, y - 12]) & (points <= [x + w + 12, y + h + 12])
        inside = near.all(1)
        assert inside.mean() > 0.7  # the box is of what is visible: a bush may hide some
    assert {1, 2} <= set(flags)


def test_the_same_seed_draws_the_same_figure():
    one, two = (draw_figure("photo", np.random.default_rng(5)) for _ in range(2))
    assert np.array_equal(one.image, two.image) and np.array_equal(one.keypoints, two.keypoints)


def test_several_programs_that_start_at_once_share_one_set_of_figures(tmp_path):
    command = ("import sys; sys.path.insert(0, sys.argv[1]); import data\n"
               "counts = {'train': (1, 1), 'val': (1, 1)}\n"
               "if __name__ == '__main__': print(data.draw_figures(sys.argv[2], counts))")
    script = tmp_path / "draw.py"
    script.write_text(command)
    arguments = [script, ROOT, tmp_path / "cache"]
    with ThreadPoolExecutor(3) as pool:
        runs = list(pool.map(lambda _: run_program(*arguments), range(3)))
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert [folder.name for folder in (tmp_path / "cache").iterdir()] == [data.FIGURES]
    drawn = load_dataset(f"figures:{tmp_path / 'cache' / data.FIGURES}", "val")
    assert len(drawn.ids) == len(STYLES)
