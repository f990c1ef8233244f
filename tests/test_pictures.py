"""What must hold for people's own pictures: everybody is looked for, nothing is dropped in silence, poses can be
corrected and trained on, and other programs can run the model."""
import json
import os
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import data
import eval
import vlpose
from data import COCO17, draw_figures, load_dataset, read_pictures
from eval import CATEGORIES, draw_panels, draw_pose, limb_color, load_detector, main, predict, with_boxes
from train import confidence
from vlpose import DETECTORS, VIT_CONFIGS, PoseModel, VLPose, save_checkpoint

CONFIG = VIT_CONFIGS["tiny"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return draw_figures(tmp_path_factory.mktemp("cache"), {"train": (1, 1), "val": (4, 1)}) / "images" / "photo"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = PoseModel(CONFIG)
    torch.nn.init.normal_(model.head.predictor.weight, std=0.3)  # some keypoints are sure, some are not drawn
    path = tmp_path_factory.mktemp("model") / "model.pth"
    save_checkpoint(path, model)
    return path


@pytest.fixture
def estimate(checkpoint, tmp_path, capsys):
    """Runs the command on pictures; gives the results, and what it said."""
    def run(*arguments, status=0, out="out"):
        options = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / out), "--device", "cpu", "--images"]
        assert main([*options, *map(str, arguments)]) == status
        said = capsys.readouterr().err
        return (json.loads((tmp_path / out / "results.json").read_text("utf-8")) if status == 0 else None), said
    return run


# ------------------------------------------------------------------------------------- the detector

def plant(monkeypatch, *findings):
    """A detector that finds these (corners, label, score) in the first picture, in the second, and so on."""
    findings = iter(findings)

    class Detector(torch.nn.Module):
        def forward(self, images):
            corners, labels, scores = zip(*next(findings)) if len(images) == 1 else ()
            return [{"boxes": torch.tensor(corners), "labels": torch.tensor(labels), "scores": torch.tensor(scores)}]

    asked = []
    monkeypatch.setattr(eval, "load_detector", lambda name: asked.append(name) or Detector())
    return asked


PERSON, DOG = CATEGORIES.index("person"), CATEGORIES.index("dog")
SCENE = [([10., 20., 60., 120.], PERSON, 0.9), ([80., 20., 150., 120.], PERSON, 0.4), ([0., 0., 50., 50.], DOG, 0.8),
         ([5., 5., 9., 9.], PERSON, 0.1)]


def test_people_are_found_by_a_detector_and_its_boxes_can_be_read_again(photos, estimate, tmp_path, monkeypatch):
    picture = sorted(photos.glob("val*"))[0]
    assert plant(monkeypatch, SCENE) == []
    results, said = estimate(picture, "--detect")
    boxes = json.loads((tmp_path / "out" / "boxes.json").read_text("utf-8"))
    assert [(box["image_id"], box["category_id"], box["bbox"], round(box["score"], 5)) for box in boxes] == [
        (picture.name, 1, [10, 20, 50, 100], 0.9), (picture.name, 1, [80, 20, 70, 100], 0.4)]
    assert [result["box"] for result in results] == [box["bbox"] for box in boxes]
    assert "taken as one person" not in said
    again, _ = estimate(picture, "--boxes", tmp_path / "out" / "boxes.json", out="again")
    assert again == results


def test_boxes_of_a_data_set_are_named_by_the_ids_of_its_images(photos, checkpoint, tmp_path, monkeypatch):
    dataset = load_dataset(f"figures:{photos.parents[1]}#photo", "val")
    plant(monkeypatch, *[SCENE] * len(dataset.files))
    assert main(["--checkpoint", str(checkpoint), "--data", dataset.name, "--detect", "--out", str(tmp_path),
                 "--device", "cpu"]) == 0
    boxes = json.loads((tmp_path / "boxes.json").read_text("utf-8"))
    assert [box["image_id"] for box in boxes] == np.repeat(dataset.image_ids, 2).tolist()


def test_an_albums_boxes_are_taken_as_in_training_unless_others_are_named(photos, estimate, tmp_path):
    album = shutil.copytree(photos, tmp_path / "album")
    names = sorted(file.name for file in album.iterdir())
    boxes = [{"image_id": names[0], "bbox": [1, 2, 30, 40], "category_id": 18, "score": 0.5},
             {"image_id": names[1], "bbox": [5, 2, 30, 40], "category_id": 1, "score": 0.5}]
    (album / "boxes.json").write_text(json.dumps(boxes))
    results, said = estimate(album)
    assert f"people are in the boxes of {album / 'boxes.json'}" in said and "one person" not in said
    trained_on = load_dataset(f"pictures:{album}", "train")
    assert [result["box"] for result in results] == trained_on.boxes.tolist() == [[1, 2, 30, 40], [5, 2, 30, 40]]
    others = tmp_path / "others.json"
    others.write_text(json.dumps(boxes[1:]))
    results, said = estimate(album, "--boxes", others, out="named")
    assert len(results) == 1 and "boxes.json" not in said
    results, said = estimate(*(album / name for name in names), out="files")  # no folder is named
    assert len(results) == len(names) and "each picture is taken as one person" in said


def test_results_name_pictures_wherever_the_command_was_given(photos, estimate, monkeypatch):
    results, _ = estimate(photos, out="absolute")
    monkeypatch.chdir(photos.parent)
    relative, _ = estimate(photos.name, out="relative")
    assert relative == results
    assert [result["file_name"] for result in results] == sorted(file.name for file in photos.iterdir())


@pytest.mark.parametrize("size, drawn", [((96, 128), (384, 512)), ((512, 100), (512, 100)), ((30, 20), (512, 342))])
def test_a_small_picture_is_drawn_large_enough_to_judge_it(size, drawn):
    picture = data.picture_dataset([Image.new("RGB", size)], COCO17)
    pose = np.zeros((17, 3))
    pose[0] = (size[0] - 1) / 2, (size[1] - 1) / 2, 1  # a nose in the middle
    sheet = draw_panels(picture, 0, {"": [{"image_id": 1, "keypoints": pose.ravel().tolist()}]}, 0.1)
    assert sheet.size == drawn
    y, x = np.nonzero(np.asarray(sheet).sum(2))
    assert abs(x.mean() - (drawn[0] - 1) / 2) < 1 and abs(y.mean() - (drawn[1] - 1) / 2) < 1


def test_where_nobody_is_found_the_picture_is_one_person_and_that_is_said(photos, estimate, monkeypatch):
    one, two = sorted(photos.glob("val*"))[:2]
    plant(monkeypatch, SCENE, SCENE[2:])  # in the second picture only a dog, and somebody of too low a score
    results, said = estimate(one, two, "--detect")
    assert [result["file_name"] for result in results] == [one.name, one.name, two.name]
    assert results[2]["box"] == [0, 0, 160, 160]
    assert said.count("no person found in") == 1 and f"no person found in {two}: taken as one person" in said


def test_a_low_score_is_enough_where_it_is_asked_for(photos, estimate, monkeypatch):
    plant(monkeypatch, SCENE)
    results, _ = estimate(next(photos.iterdir()), "--detect", "--detect-score", "0.05")
    assert len(results) == 3


def test_other_categories_need_another_detector_and_their_boxes_are_told_apart(photos, estimate, tmp_path, monkeypatch):
    picture = next(photos.iterdir())
    asked = plant(monkeypatch, SCENE, SCENE)
    (result,), _ = estimate(picture, "--detect", "--category", "dog")
    assert result["box"] == [0, 0, 50, 50]
    assert json.loads((tmp_path / "out" / "boxes.json").read_text("utf-8"))[0]["category_id"] == DOG == 18  # COCO's number
    assert json.loads((tmp_path / "out" / "annotations.json").read_text("utf-8"))["categories"][0]["name"] == "dog"
    estimate(picture, "--detect", out="people")
    assert asked == [DETECTORS[1], DETECTORS[0]]
    plant(monkeypatch, SCENE)
    mixed = [{"image_id": picture.name, "bbox": [1, 2, 30, 40], "category_id": number} for number in (1, DOG, 1)]
    (tmp_path / "mixed.json").write_text(json.dumps(mixed))
    assert len(estimate(picture, "--boxes", tmp_path / "mixed.json", "--category", "dog", out="mixed")[0]) == 1
    _, said = estimate(picture, "--detect", DETECTORS[0], "--category", "dog", status=2, out="none")
    assert f"{DETECTORS[0]} finds only people" in said


def test_an_unknown_category_is_an_error_that_names_those_that_there_are(photos, estimate, capsys):
    _, said = estimate(photos, "--detect", "--category", "dogg", status=2)
    assert re.search(r"argument --category: invalid choice: 'dogg'", said)


def test_pictures_are_detected_as_they_are_shown(estimate, tmp_path, monkeypatch):
    orientation = Image.Exif()
    orientation[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (160, 100)).save(tmp_path / "phone.jpg", exif=orientation)
    shapes = []

    class Blind(torch.nn.Module):
        def forward(self, images):
            shapes.extend(image.shape for image in images)
            return [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "scores": torch.zeros(0)}]

    monkeypatch.setattr(eval, "load_detector", lambda name: Blind())
    (result,), _ = estimate(tmp_path / "phone.jpg", "--detect")
    assert shapes == [(3, 160, 100)] and result["box"] == [0, 0, 100, 160]


@pytest.mark.parametrize("name", [DETECTORS[0], DETECTORS[2]])
def test_a_detector_gives_what_torchvision_gives_with_the_same_public_file(name, tmp_path, monkeypatch):
    """Random weights under the names of the public files, which are older than torchvision's layers."""
    torch.manual_seed(0)
    weights = torchvision.models.get_model_weights(name)["COCO_V1"]
    made = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    for key, tensor in made.state_dict().items():
        if key.startswith("backbone.body") and tensor.ndim == 4:
            tensor *= 0.01
        if "running_var" in key:
            tensor.uniform_(5e-5, 2e-4)  # so small that the eps of a layer matters
    state = {re.sub(r"rpn\.head\.conv\.0\.0\.", "rpn.head.conv.", re.sub(r"(_blocks\.\d)\.0\.", r"\1.", key)): tensor
             for key, tensor in made.state_dict().items() if not key.endswith("num_batches_tracked")}
    monkeypatch.setenv("POSEBRIDGE_HOME", str(tmp_path))
    (tmp_path / "weights").mkdir()
    torch.save(state, tmp_path / "weights" / f"{name}.pth")
    monkeypatch.setitem(vlpose.PUBLIC_FILES, name, vlpose.PublicFile(weights.url))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: dict(state))
    peer, ours = torchvision.models.get_model(name, weights=weights, min_size=160).eval(), load_detector(name)
    ours.transform.min_size = (160,)
    peer.roi_heads.score_thresh = ours.roi_heads.score_thresh = 0  # nothing is above chance
    peer.roi_heads.detections_per_img = ours.roi_heads.detections_per_img = 5
    image = torch.rand(3, 160, 200)
    with torch.no_grad():
        (expected,), (found,) = peer([image]), ours([image])
    assert len(expected["boxes"]) > 0
    for key in ("boxes", "labels", "scores"):
        torch.testing.assert_close(found[key], expected[key])


def test_the_public_files_of_detectors_are_torchvisions_best_and_checked():
    for name in DETECTORS:
        url, digits = vlpose.PUBLIC_FILES[name].address, vlpose.PUBLIC_FILES[name].digest
        best = torchvision.models.get_model_weights(name).DEFAULT
        assert url == best.url and url.endswith(f"-{digits}.pth") and len(digits) == 8
    metrics = torchvision.models.get_model_weights(DETECTORS[0]).DEFAULT.meta["_metrics"]
    assert metrics["COCO-val2017"]["box_map"] == 54.6
    for name in DETECTORS:
        meta = torchvision.models.get_model_weights(name).DEFAULT.meta
        if name != DETECTORS[0]:  # which finds only people
            assert CATEGORIES == meta["categories"]


# -------------------------------------------------------------------------- predict, correct, train

def test_predicted_poses_are_read_back_as_annotations(photos, estimate, tmp_path):
    results, _ = estimate(photos)
    dataset = load_dataset(f"coco:{tmp_path / 'out' / 'annotations.json'}", "all")
    poses = np.reshape([result["keypoints"] for result in results], (-1, 17, 3))
    scores, drawn = poses[:, :, 2], poses[:, :, 2] > 0.1
    assert dataset.skeleton is COCO17 and len(dataset.files) == len(results) == 5
    assert (dataset.keypoints[:, :, 2] == np.where(drawn, np.where(scores >= 0.5, 2, 1), 0)).all()
    assert 0 < drawn.mean() < 1 and (dataset.keypoints[~drawn] == 0).all()
    np.testing.assert_allclose(dataset.keypoints[drawn][:, :2], poses[drawn][:, :2], rtol=1e-6)
    assert dataset.boxes.tolist() == [result["box"] for result in results]
    for file, result in zip(dataset.files, results):
        assert Path(file).read_bytes() == (photos / result["file_name"]).read_bytes()


def test_annotations_are_what_cocos_own_reader_expects(photos, estimate, tmp_path):
    COCO = pytest.importorskip("pycocotools.coco").COCO
    results, _ = estimate(photos, "--threshold", "0.3")
    coco = COCO(str(tmp_path / "out" / "annotations.json"))
    people, images = coco.loadAnns(coco.getAnnIds()), coco.loadImgs(coco.getImgIds())
    assert len(people) == len(results) and all(image["width"] == image["height"] == 160 for image in images)
    category, = coco.loadCats(coco.getCatIds())
    assert category["keypoints"] == list(COCO17.names) and len(category["skeleton"]) == len(COCO17.edges)
    for person, result in zip(people, results):
        assert person["num_keypoints"] == sum(score > 0.3 for score in result["keypoints"][2::3])
        assert person["area"] == person["bbox"][2] * person["bbox"][3]
    assert coco.loadRes(str(tmp_path / "out" / "results.json")).getAnnIds()  # "box" is nothing to COCO's tools


def test_what_exif_turns_is_upright_beside_the_annotations(estimate, tmp_path):
    """Programs disagree about EXIF: `coco:` reads pictures as stored, so an upright copy is beside the annotations."""
    orientation = Image.Exif()
    orientation[0x0112] = 6
    pixels = np.zeros((100, 160, 3), np.uint8)
    pixels[:50] = 255
    Image.fromarray(pixels).save(tmp_path / "phone.jpg", exif=orientation)
    estimate(tmp_path / "phone.jpg")
    dataset = load_dataset(f"coco:{tmp_path / 'out' / 'annotations.json'}", "all")
    image, _ = data.open_image(dataset.files[0])
    assert image.size == (100, 160) and np.asarray(image)[80, 90].min() > 200 > 50 > np.asarray(image)[80, 10].max()
    content = json.loads((tmp_path / "out" / "annotations.json").read_text("utf-8"))
    assert (content["images"][0]["width"], content["images"][0]["height"]) == (100, 160)


@pytest.mark.parametrize("name", ["a.jpg", "a.tif", "a.png"])
def test_a_turned_picture_has_the_size_that_it_is_shown_with(estimate, tmp_path, name):
    turned = Image.Exif()
    turned[0x0112] = 6
    for mode in ("RGB", "I;16") if name == "a.png" else ("RGB",):
        Image.new(mode, (100, 40)).save(tmp_path / name, exif=turned)
        image, _ = data.open_image(tmp_path / name, upright=True)
        assert image.size == data.picture_size(tmp_path / name) == (40, 100)
    assert estimate(tmp_path / name)[0][0]["box"] == [0, 0, 40, 100]


@pytest.mark.parametrize("kind, value", [(1, b"\x06"), (2, b"6\0"), (3, b"\x09\0"), (3, b"\0\0")])  # a byte, text
def test_an_orientation_that_means_nothing_turns_nothing(tmp_path, kind, value):
    tag = struct.pack("<HHI4s", 0x0112, kind, 2 if kind == 2 else 1, value)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + tag + bytes(4)
    Image.new("RGB", (100, 40)).save(tmp_path / "a.jpg", exif=exif)
    assert data.picture_size(tmp_path / "a.jpg") == (100, 40)
    assert data.format_if_turned(tmp_path / "a.jpg") is None
    assert data.open_image(tmp_path / "a.jpg", upright=True)[0].size == (100, 40)


MAKE = struct.pack("<HHIf", 0x010f, 11, 1, 1.5)  # a number in place of a text: Pillow raises whatever comes of it
TURNED = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)


@pytest.mark.parametrize("exif", [b"nonsense", b"II*\0" + struct.pack("<IH", 8, 2) + MAKE + TURNED + bytes(4)])
def test_a_picture_whose_exif_is_broken_is_skipped_like_any_that_cannot_be_read(photos, estimate, tmp_path, exif):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png", exif=b"Exif\0\0" + exif)
    results, said = estimate(tmp_path / "a.png", next(photos.iterdir()))
    assert len(results) == 1 and "a.png: not a readable image" in said and "skipped 1 of 2" in said


@pytest.mark.parametrize("name, options", [("a.tif", {"compression": "tiff_lzw"}), ("photo", {"format": "JPEG"}),
                                           (f"{'n' * 251}.jpg", {})])
def test_the_upright_copy_has_the_format_of_the_picture_whatever_its_name(estimate, tmp_path, name, options):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (100, 40)).save(tmp_path / name, exif=turned, **options)
    with Image.open(tmp_path / name) as given:
        estimate(tmp_path / name)
        with Image.open(tmp_path / "out" / "images" / name) as upright:
            assert (upright.size, upright.format) == ((40, 100), given.format)
    assert list((tmp_path / "out").glob("*.jpg"))


def test_where_links_are_not_possible_the_pictures_are_copied(photos, estimate, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("a file system without links")
    monkeypatch.setattr(Path, "symlink_to", refuse)
    results, _ = estimate(photos)
    dataset = load_dataset(f"coco:{tmp_path / 'out' / 'annotations.json'}", "all")
    assert len(dataset.files) == len(results) and not any(Path(file).is_symlink() for file in dataset.files)


def test_images_of_a_run_that_was_stopped_are_not_written_into(photos, estimate, tmp_path):
    (tmp_path / "out" / "images").mkdir(parents=True)
    assert "out: expected a new or an empty folder, found images" in estimate(photos, status=2)[1]


def test_annotations_that_somebody_may_have_corrected_are_not_overwritten(photos, estimate, tmp_path):
    estimate(photos)
    (tmp_path / "out" / "annotations.json").write_text("corrected")
    for pictures in (photos, tmp_path / "out" / "images"):
        assert "expected a new or an empty folder, found 001-" in estimate(pictures, status=2)[1]
    assert (tmp_path / "out" / "annotations.json").read_text("utf-8") == "corrected"
    assert all(file.resolve().is_file() for file in (tmp_path / "out" / "images").iterdir())


@pytest.mark.parametrize("out", ["album", "album/out"])
def test_drawings_never_lie_among_the_pictures_where_they_would_be_input_the_next_time(photos, estimate, tmp_path, out):
    shutil.copytree(photos, tmp_path / "album")
    assert "there are pictures that are input" in estimate(tmp_path / "album", status=2, out=out)[1]
    assert len(list((tmp_path / "album").rglob("*"))) == len(list(photos.iterdir()))


def test_corrected_annotations_are_tested_into_another_folder(photos, estimate, tmp_path, checkpoint):
    results, _ = estimate(photos)
    assert main(["--checkpoint", str(checkpoint), "--data", f"coco:{tmp_path / 'out' / 'annotations.json'}", "--split",
                 "all", "--out", str(tmp_path / "again"), "--device", "cpu"]) == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text("utf-8"))
    assert 0 < len(again) <= len(results) and len(list((tmp_path / "again").glob("*.jpg"))) == len(again)


# --------------------------------------------------------------------------- which files are pictures

def test_a_folder_gives_the_pictures_of_all_formats_and_says_what_it_skips(tmp_path, capsys):
    formats = {"a.jpg": "JPEG", "b.jfif": "JPEG", "c.jp2": "JPEG2000", "d.ppm": "PPM", "e.TGA": "TGA", "f.mpo": "MPO",
               "g.apng": "PNG", "h.dib": "DIB", "i.jpe": "JPEG", "j.webp": "WEBP", "k.tiff": "TIFF", "l.pcx": "PCX"}
    for name, kind in formats.items():
        Image.new("RGB", (40, 30), "red").save(tmp_path / name, kind)
    for name in ("y.heic", "z", "notes.txt", ".DS_Store"):
        (tmp_path / name).write_bytes(b"no picture")
    (tmp_path / "boxes.json").write_text("[]")
    files = data.find_pictures([tmp_path])
    assert [Path(file).name for file in files] == list(formats)
    assert "skipped 3 of 15 files, whose names do not end as those of images do: notes.txt, y.heic, z" in capsys.readouterr().err
    for file in files:
        assert np.abs(np.asarray(data.open_image(file)[0]).mean((0, 1)) - (254, 0, 0)).max() < 3


@pytest.fixture
def linked(tmp_path):
    """An album with a folder, a link to a folder elsewhere, and links that lead in circles."""
    for name in ("store/s.jpg", "album/own.jpg", "album/b/b.jpg", "album/.hidden/h.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    try:
        for link, target in {"summer": "../store", "up": "..", "b/round": "../../album", "a": "b"}.items():
            (tmp_path / "album" / link).symlink_to(target, target_is_directory=True)
        (tmp_path / "album" / "link.jpg").symlink_to("own.jpg")
    except OSError:
        pytest.skip("a file system without links")
    return tmp_path / "album"


def test_linked_folders_are_looked_into_once_and_links_in_circles_end(linked):
    names = [Path(file).relative_to(linked).as_posix() for file in data.find_pictures([linked])]
    assert names == [".hidden/h.jpg", "b/b.jpg", "link.jpg", "own.jpg", "summer/s.jpg"]


@pytest.mark.parametrize("pattern, names", [
    ("**/*.jpg", ["b/b.jpg", "link.jpg", "own.jpg", "summer/s.jpg"]), ("*.jpg", ["link.jpg", "own.jpg"]),
    ("*/*.jpg", ["a/b.jpg", "b/b.jpg", "summer/s.jpg"]), ("b/**", ["b/b.jpg"]), ("**/b/**/b*", ["b/b.jpg"])])
def test_a_pattern_ends_where_links_lead_in_circles(linked, pattern, names, monkeypatch):
    def found(pattern):
        return [Path(file).as_posix() for file in data.find_pictures([pattern]) if Path(file).is_file()]
    absolute = [Path(file).relative_to(linked).as_posix() for file in found(linked / pattern)]
    monkeypatch.chdir(linked)
    # below "b" lies a link to all that is above, but what "b/**" gives there is not asked here
    assert [name for name in absolute if "round" not in name] == names
    assert [name for name in found(pattern) if "round" not in name] == names


def test_a_pipe_or_a_folder_among_pictures_is_named_and_the_others_are_read(photos, estimate, tmp_path):
    (tmp_path / "album" / "folder.jpg").mkdir(parents=True)
    shutil.copy(next(photos.iterdir()), tmp_path / "album")
    if not hasattr(os, "mkfifo"):
        pytest.skip("a system without pipes among files")
    for name in ("pipe.jpg", "pipe"):
        os.mkfifo(tmp_path / "album" / name)
    results, said = estimate(tmp_path / "album")
    assert len(results) == 1 and "skipped 1 of 3 files, whose names do not end as those of images do: pipe" in said
    assert "pipe.jpg: expected a file, found a folder, a pipe or a device; skipped" in said
    os.mkfifo(tmp_path / "album" / "annotations.json")
    with pytest.raises(data.DataError, match="found 0"):
        load_dataset(f"coco:{tmp_path / 'album'}", "all")


def test_a_picture_of_enormous_length_can_be_drawn():
    """Without a first coarse step the resizing asks for gigabytes, and a MemoryError ends all drawings."""
    long = data.picture_dataset([Image.new("RGB", (99_000_000, 1), "white")], COCO17)
    sheet = eval.draw_panels(long, 0, {"": []}, 0.1)
    assert sheet.size == (4096, 1) and sheet.getpixel((4000, 0)) == (255, 255, 255)


def test_a_drawing_of_a_transparent_picture_is_on_white_and_leaves_the_picture_as_it_is():
    pose = np.tile((5.0, 5.0, 1.0), (17, 1))
    for mode, color in (("RGBA", (0, 0, 0, 0)), ("RGB", "white")):
        image = Image.new(mode, (90, 60), color)
        before = image.tobytes()
        drawing = draw_pose(image, pose)
        assert drawing.getpixel((80, 50)) == (255, 255, 255) and drawing.getpixel((5, 5)) != (255, 255, 255)
        assert image.tobytes() == before


# ------------------------------------------------------------------------ what people look at, keep

def test_pictures_of_equal_names_in_two_folders_are_all_there(photos, estimate, tmp_path):
    for folder in ("a", "b/c"):
        (tmp_path / "pictures" / folder).mkdir(parents=True)
        shutil.copy(next(photos.iterdir()), tmp_path / "pictures" / folder / "x.jpg")
    shutil.copy(next(photos.iterdir()), tmp_path / "pictures" / "x.jpg")
    names = "a/x.jpg", "x.jpg", "b/c/x.jpg"
    boxes = [{"image_id": name, "bbox": [place, 0, 50, 50]} for place, name in enumerate(names)]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    results, _ = estimate(tmp_path / "pictures", "--boxes", tmp_path / "boxes.json")
    assert {result["file_name"]: result["box"][0] for result in results} == {
        box["image_id"]: box["bbox"][0] for box in boxes}
    assert sorted(file.name for file in (tmp_path / "out").glob("*.jpg")) == ["001-x.jpg", "002-x.jpg", "003-x.jpg"]
    dataset = load_dataset(f"coco:{tmp_path / 'out' / 'annotations.json'}", "all")
    assert len(set(dataset.files)) == 3


def test_a_picture_that_cannot_be_read_is_named_counted_and_skipped_or_with_strict_an_error(photos, estimate, tmp_path):
    (tmp_path / "pictures").mkdir()
    shutil.copy(next(photos.iterdir()), tmp_path / "pictures" / "good.jpg")
    (tmp_path / "pictures" / "bad.jpg").write_text("no picture")
    results, said = estimate(tmp_path / "pictures")
    assert len(results) == 1 and "bad.jpg: not a readable image" in said and "skipped 1 of 2" in said
    shutil.rmtree(tmp_path / "out")
    _, said = estimate(tmp_path / "pictures", "--strict", status=2)
    assert re.fullmatch(r"error: .*bad\.jpg: not a readable image: .*\n", said) and not (tmp_path / "out").exists()


def test_an_empty_folder_and_boxes_of_other_pictures_leave_nothing_half_written(photos, estimate, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no folder with images" in estimate(tmp_path / "empty", status=2)[1]
    (tmp_path / "boxes.json").write_text(json.dumps([{"image_id": "elsewhere.jpg", "bbox": [0, 0, 9, 9]}]))
    _, said = estimate(photos, "--boxes", tmp_path / "boxes.json", status=2)
    assert "expected the image_id of a picture" in said and not (tmp_path / "out").exists()


def test_it_is_said_that_a_picture_is_one_person_how_many_are_drawn_and_what_repeats(photos, estimate, tmp_path):
    assert "each picture is taken as one person" in estimate(photos, "--pictures", "2")[1]
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 2
    names = [file.name for file in photos.iterdir()]
    boxes = [{"image_id": name, "bbox": [10, 10, 90, 140], "score": 0.5} for name in names + names[:2]]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    results, said = estimate(photos, "--boxes", tmp_path / "boxes.json", "--pictures", "3", out="boxed")
    assert len(results) == len(names) == 5
    assert "5 poses (2 repeated ones left out) in 5 of 5 images; 3 drawn" in said
    assert "taken as one person" not in said


def test_the_threshold_of_drawing_is_an_option(photos, estimate, tmp_path):
    picture = next(photos.iterdir())
    drawn = []
    for threshold in ("0", "1"):
        estimate(picture, "--threshold", threshold, out=threshold)
        with Image.open(next((tmp_path / threshold).glob("001*"))) as image, Image.open(picture) as original:
            original = original.resize(image.size)
            drawn.append(np.abs(np.asarray(image, float) - np.asarray(original)).max())
    assert drawn[0] > 100 > 30 > drawn[1]


def test_limbs_can_be_seen_on_dark_and_on_bright_pictures_and_the_more_the_surer():
    keypoints = np.zeros((17, 3))
    keypoints[[5, 7]] = [[30, 50, 0.15], [170, 50, 0.15]]  # one upper arm, of a model that is not sure
    for value in (0, 128, 255):
        image = Image.new("RGB", (200, 100), (value,) * 3)
        unsure, sure = (np.asarray(draw_pose(image, keypoints * [1, 1, factor]))[:, 100].astype(int)
                        for factor in (1, 6))
        assert np.abs(unsure - value).max() > 60 and np.abs(sure - value).max() >= np.abs(unsure - value).max()
        assert value == 0 or unsure.max(1).min() < value  # the rim is darker than what is around it


def test_lines_are_wider_on_larger_pictures():
    keypoints = np.zeros((17, 3))
    keypoints[[5, 7]] = [[300, 500, 1], [370, 500, 1]]  # a small person
    widths = [(np.asarray(draw_pose(Image.new("RGB", size), keypoints))[:, 335].max(1) > 60).sum()
              for size in ((600, 600), (4800, 600))]
    assert widths[1] >= 2 * widths[0]


def test_a_picture_of_any_mode_is_drawn_on_in_its_own_colours():
    red = Image.new("RGB", (40, 40), "red")
    for image in (red, np.asarray(red), red.convert("P"), red.convert("CMYK"), red.convert("RGBA")):
        assert draw_pose(image, np.zeros((17, 3))).getpixel((20, 20)) == (255, 0, 0)


def test_left_and_right_have_their_colours_under_any_names():
    for names in (("L_Eye", "R_Eye", "Nose"), ("eye_left", "EyeRight", "nose"), ("LeftEye", "RightEye", "nose"),
                  ("left_eye", "right_eye", "nose")):
        skeleton = data.make_skeleton(names, ())
        assert [limb_color(skeleton, joint) for joint in range(3)] == [(255, 140, 0), (0, 150, 255), (120, 220, 90)]


def test_a_runs_folder_will_do_and_an_adapter_with_its_base(photos, estimate, checkpoint, tmp_path, capsys):
    assert estimate(photos)[0] == estimate(photos, "--checkpoint", checkpoint.parent, out="again")[0]
    base = vlpose.load_model(checkpoint)
    torch.manual_seed(1)
    model = VLPose(base, 128)
    torch.nn.init.normal_(model.predictor.weight, std=0.3)
    about = {"text_weights": "random", "sentences": "a {domain}"}
    save_checkpoint(tmp_path / "adapter.pth", model, adapter_only=True, **about)
    save_checkpoint(tmp_path / "whole.pth", model, **about)
    _, said = estimate(photos, "--checkpoint", tmp_path / "adapter.pth", "--prompt", "a cartoon", status=2)
    assert "--base" in said
    whole, _ = estimate(photos, "--checkpoint", tmp_path / "whole.pth", "--prompt", "a cartoon", out="whole")
    adapter = "--checkpoint", tmp_path / "adapter.pth", "--base", checkpoint
    around, _ = estimate(photos, *adapter, "--prompt", "a cartoon", out="around")
    assert around == whole != json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))


# ------------------------------------------------------------------------ skeletons, without labels

def three_joints(tmp_path, photos):
    """A file in COCO's format with a skeleton of its own, and results that are right."""
    names = ["L_Paw", "R_Paw", "Tail"]
    images = [{"id": 1, "file_name": next(photos.iterdir()).name}]
    person = {"id": 5, "image_id": 1, "category_id": 1, "keypoints": [20, 30, 2, 90, 40, 2, 60, 120, 2],
              "num_keypoints": 3, "bbox": [10, 20, 100, 120], "area": 9000, "iscrowd": 0}
    content = {"images": images, "annotations": [person],
               "categories": [{"id": 1, "name": "cat", "keypoints": names, "skeleton": [[1, 3], [2, 3]]}]}
    (tmp_path / "cats.json").write_text(json.dumps(content))
    swapped = [{"image_id": 1, "category_id": 1, "keypoints": [90, 40, 1, 20, 30, 1, 60, 120, 1], "score": 1}]
    (tmp_path / "results.json").write_text(json.dumps(swapped))
    return ["--annotations", str(tmp_path / "cats.json"), "--results", str(tmp_path / "results.json")]


def test_the_numbers_of_a_file_are_of_its_own_skeleton(photos, tmp_path, capsys):
    files = three_joints(tmp_path, photos)
    assert main([*files, "--json", "--details"]) == 0
    details = json.loads(capsys.readouterr().out)
    assert main([*files, "--json", "--sigmas", "9", "9", "9"]) == 0  # so generous that even the wrong paws are close
    assert json.loads(capsys.readouterr().out)["AP"] > 0.999 > details["AP"]


def test_sigmas_also_override_those_of_a_data_set(photos, tmp_path, capsys):
    three_joints(tmp_path, photos)
    shutil.copytree(photos, tmp_path / "images")
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "cats.pth", PoseModel(CONFIG, 3))  # of which nobody knows the names: taken as they come
    options = ["--checkpoint", str(tmp_path / "cats.pth"), "--data", f"coco:{tmp_path / 'cats.json'}", "--split", "all",
               "--json", "--device", "cpu"]
    numbers = []
    for sigmas in ([], ["--sigmas", "99", "99", "99"]):
        assert main(options + sigmas) == 0
        numbers.append(json.loads(capsys.readouterr().out)["AP"])
    assert numbers == [0, pytest.approx(1)]
    assert main([*options, "--sigmas", "1", "2"]) == 2
    assert "--sigmas: expected 3 numbers, found 2" in capsys.readouterr().err


def test_without_labelled_people_everybody_is_predicted(photos):
    pictures = read_pictures(sorted(map(str, photos.iterdir())))
    assert len(predict(PoseModel(CONFIG), pictures)) == 5
    labelled = with_boxes(pictures, pictures.image_index, pictures.boxes)
    labelled.keypoints[3, 0] = 1
    assert [result["image_id"] for result in predict(PoseModel(CONFIG), labelled)] == [4]


class Painter(torch.nn.Module):
    """A model that sees: a keypoint is where a crop is brightest; `shift` heatmap pixels beside it, and this sure."""

    def __init__(self, peak=1.0, shift=0):
        super().__init__()
        self.config, self.weight, self.peak, self.shift = CONFIG, torch.nn.Parameter(torch.zeros(1)), peak, shift

    def forward(self, images):
        size = CONFIG.image_size[0] // 4, CONFIG.image_size[1] // 4
        heat = torch.nn.functional.interpolate(images.mean(1, keepdim=True), size, mode="bilinear", antialias=True)
        heat = heat - heat.amin((2, 3), keepdim=True)
        heat = self.peak * heat / heat.amax((2, 3), keepdim=True)
        return heat.roll(self.shift, 3).expand(-1, 17, -1, -1)


def test_without_labels_two_views_agree_where_a_model_sees_the_same_thing_in_both(tmp_path):
    y, x = np.mgrid[:200, :160]
    places = (60, 80), (90, 120), (70, 100), (80, 90)
    spots = [255 * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 200) for cx, cy in places]
    pictures = data.picture_dataset([Image.fromarray(spot.astype(np.uint8)).convert("RGB") for spot in spots], COCO17)
    pictures = with_boxes(pictures, np.arange(4), np.tile([0.0, 0, 160, 200], (4, 1)))
    def known(model):
        return confidence(model, pictures, predict(model, pictures, flip_test=False))

    exact = known(Painter())
    assert exact == known(Painter())  # the other view is always the same one
    assert exact["sure keypoints"] == 1 and exact["pixels between two views"] < 1.5
    # What is wrong by a fixed way in the crop is wrong by as much in both views, but for the turn and the scale
    shifted = known(Painter(shift=6))
    assert exact["pixels between two views"] < shifted["pixels between two views"] < 2 * 6 * 4
    assert known(Painter(peak=0.4))["sure keypoints"] == 0


@pytest.mark.parametrize("sentences, status", [("a photo of a {domain} character", 2), ("a painting", 0)])
def test_a_prompt_is_needed_where_the_models_own_sentence_wants_a_domain(tmp_path, capsys, sentences, status):
    model = VLPose(PoseModel(CONFIG), 128)
    save_checkpoint(tmp_path / "vlpose.pth", model, text_weights="random", sentences=sentences)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    assert main(["--checkpoint", str(tmp_path / "vlpose.pth"), "--images", str(tmp_path / "a.png"), "--out",
                 str(tmp_path / "out"), "--device", "cpu"]) == status
    assert ("--prompt" in capsys.readouterr().err) == (status == 2)
    assert (tmp_path / "out").exists() == (status == 0)


# ---------------------------------------------------------------------------------- what takes long

def test_what_takes_long_says_how_far_it_is(monkeypatch, capsys):
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(data.time, "monotonic", lambda: next(clock))
    assert list(data.progress("abcdefgh", "reading")) == list("abcdefgh")
    lines = capsys.readouterr().err.splitlines()
    assert 1 < len(lines) < 4 and all(re.fullmatch(r"reading: \d of 8", line) for line in lines)
    monkeypatch.undo()
    assert list(data.progress([1, 2], "reading")) == [1, 2] and capsys.readouterr().err == ""
