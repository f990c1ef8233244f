"""What must hold for prediction: poses are where people are, on data sets, in boxes and on own pictures."""
import io
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import eval
from data import (COCO17, Crops, DataError, draw_figures, encode_heatmaps, known_skeleton, load_dataset, make_skeleton,
                  normalize, read_pictures, to_coco, with_sentences)
from eval import (draw_pose, estimate_poses, evaluate_oks, evaluate_pck_grid, highest_cells, main,
                  predict, predict_people, with_boxes)
from train import domain_table, draw_curves, draw_sheet, grid_pck, true_pose
from vlpose import (MATCHERS, VIT_CONFIGS, PoseModel, VLPose, encode_sentences, load_clip_text, load_model, text_inputs,
                    save_checkpoint)

CONFIG = VIT_CONFIGS["tiny"]
KNOWN_NOTES = ("skipped", "--detect looks for people", "they have no width or height")


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    return draw_figures(tmp_path_factory.mktemp("cache"), {"train": (1, 1), "val": (6, 1)})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = VLPose(PoseModel(CONFIG), 128)
    torch.nn.init.normal_(model.predictor.weight, std=0.1)  # so that the adapter makes a difference
    path = tmp_path_factory.mktemp("model") / "model.pth"
    save_checkpoint(path, model, text_weights="random", sentences="a photo of a {domain} character")
    return path


class Oracle(torch.nn.Module):
    """A model that knows: it answers each image of a data set, or its mirror image, with the true heatmaps."""

    def __init__(self, dataset):
        super().__init__()
        self.config, self.weight = CONFIG, torch.nn.Parameter(torch.zeros(1))
        crops = [Crops(dataset, CONFIG.image_size)[int(row), 0] for row in dataset.annotated]
        self.answers, self.asked = [encode(crop["keypoints"], crop["visible"]) for crop in crops], 0

    def forward(self, images):
        first = self.asked % len(self.answers)
        mirrored = self.asked >= len(self.answers)
        self.asked += len(images)
        answers = torch.cat(self.answers[first:first + len(images)])
        return answers.flip(3)[:, COCO17.mirrored] if mirrored else answers


def encode(keypoints, visible):
    return encode_heatmaps(keypoints[None], visible[None], CONFIG.image_size, (32, 24), CONFIG.sigma)[0]


def test_true_heatmaps_give_a_perfect_score_with_and_without_the_flip_test(figures):
    dataset = load_dataset(f"figures:{figures}", "val")
    for flip_test in (False, True):
        results = predict(Oracle(dataset), dataset, flip_test=flip_test)
        assert evaluate_oks(to_coco(dataset), results)["AP"] > 0.99
    table = domain_table(dataset, results, CONFIG.image_size)
    assert set(table) == {*dataset.domains.tolist(), f"all of {dataset.name}"}
    assert all(row["PCK"] > 0.98 for row in table.values())
    assert table[f"all of {dataset.name}"]["AP"] == evaluate_oks(to_coco(dataset), results)["AP"]
    assert domain_table(replace(dataset, ids=np.arange(len(dataset.ids))), results, CONFIG.image_size) == table  # id 0
    detected = domain_table(dataset, results, CONFIG.image_size, detected=True)
    for domain, row in detected.items():
        assert row == table[domain] | {"PCK": -1}  # whose pose is it?
    counts = dict(zip(*np.unique(dataset.domains[dataset.image_index[dataset.annotated]], return_counts=True)))
    assert {domain: row["people"] for domain, row in table.items()} == counts | {
        f"all of {dataset.name}": len(dataset.annotated)}


def test_where_nobody_knows_left_and_right_the_flip_test_is_left_out(figures):
    dataset = load_dataset(f"figures:{figures}", "val")
    unknown = replace(dataset, skeleton=known_skeleton(26), keypoints=np.tile(dataset.keypoints, (1, 2, 1))[:, :26])
    torch.manual_seed(0)
    model = PoseModel(CONFIG, 26)
    torch.nn.init.normal_(model.head.predictor.weight, std=0.1)
    tested = predict(model, unknown, flip_test=True)
    assert tested == predict(model, unknown, flip_test=False)


def test_without_text_vlpose_predicts_what_its_base_predicts(figures):
    dataset = with_sentences(load_dataset(f"figures:{figures}", "val"), "{domain}")
    torch.manual_seed(0)
    model = VLPose(PoseModel(CONFIG), 128)
    texts = encode_sentences(load_clip_text("random"), np.unique(dataset.sentences).tolist())
    assert predict(model, dataset) == predict(model.base, dataset) != predict(model, dataset, texts)


@torch.no_grad()
@pytest.mark.parametrize("matcher", MATCHERS)
def test_a_sentence_gives_the_same_heatmaps_in_a_batch_with_longer_ones_as_alone(matcher):
    torch.manual_seed(0)
    model, images = VLPose(PoseModel(CONFIG), 128, matcher=matcher), torch.randn(3, 3, *CONFIG.image_size)
    for norm in (model.matcher.norm, model.predictor):  # so that the relation and the predictor make a difference
        torch.nn.init.normal_(norm.weight)
    model.eval()
    sentences = ["a photo", "an oil painting of a person who reads a letter", "a"]
    texts = encode_sentences(load_clip_text("random"), sentences, per_token=True)
    heatmaps = model(images, *text_inputs(sentences, texts))
    for i, sentence in enumerate(sentences):
        torch.testing.assert_close(heatmaps[i:i + 1], model(images[i:i + 1], *text_inputs([sentence], texts)))
    torch.testing.assert_close(heatmaps[1:2], model(images[1:2], texts[sentences[1]][None]))
    swapped = model(images, *text_inputs(sentences[::-1], texts))
    assert torch.allclose(swapped, heatmaps) == (matcher == "image")
    without_text = heatmaps if matcher == "image" else model.base(images)
    assert torch.equal(model(images, *text_inputs(sentences, None)), without_text)


def test_each_image_is_predicted_with_its_own_sentence(figures, monkeypatch):
    """Per token, so that sentences of several lengths are in a batch: as image by image."""
    dataset = with_sentences(load_dataset(f"figures:{figures}", "val"), "description")
    torch.manual_seed(0)
    model = VLPose(PoseModel(CONFIG), 128)
    for norm in (model.matcher.norm, model.predictor):
        torch.nn.init.normal_(norm.weight)
    texts = encode_sentences(load_clip_text("random"), np.unique(dataset.sentences).tolist(), per_token=True)
    assert len({len(T) for T in texts.values()}) > 1
    people = dataset.annotated[[0, 1, 7, 9, 11]]  # two photos, three others
    together = predict(model, dataset, texts, people, flip_test=False)  # five people in a batch
    monkeypatch.setattr(eval, "BATCH_SIZE", 1)
    alone = predict(model, dataset, texts, people, flip_test=False)
    for one, other in zip(together, alone, strict=True):
        assert np.allclose(one["keypoints"], other["keypoints"], atol=1e-2)
    lies = {sentence: texts["a photo of a person"] for sentence in texts}
    misled = predict(model, dataset, lies, people, flip_test=False)
    changed = [not np.allclose(one["keypoints"], other["keypoints"], atol=1e-2)
               for one, other in zip(together, misled, strict=True)]
    assert dataset.sentences[dataset.image_index[people]][0] == "a photo of a person"
    assert changed == [False, False, True, True, True]


def test_pck_on_the_grid_is_of_the_heatmaps_that_a_sentence_gives(figures):
    dataset = with_sentences(load_dataset(f"figures:{figures}", "val"), "{domain}")
    torch.manual_seed(0)
    model = VLPose(PoseModel(CONFIG), 128).eval()
    for norm in (model.matcher.norm, model.predictor):
        torch.nn.init.normal_(norm.weight)
    texts = encode_sentences(load_clip_text("random"), np.unique(dataset.sentences).tolist())
    crops = [Crops(dataset, CONFIG.image_size)[int(row), 0] for row in dataset.annotated]
    target = torch.stack([encode(crop["keypoints"], crop["visible"])[0] for crop in crops])
    visible = np.stack([crop["visible"] for crop in crops])
    numbers = []
    for T in (texts, None):
        with torch.no_grad():
            text = text_inputs([crop["sentence"] for crop in crops], T)
            heatmaps = model(normalize(torch.stack([crop["image"] for crop in crops])), *text)
        cells = highest_cells(heatmaps), highest_cells(target)
        numbers.append(evaluate_pck_grid(*cells, visible, target.shape[2:], 0.2, COCO17.groups))
        assert grid_pck(model, dataset, COCO17.groups, T, threshold=0.2) == pytest.approx(numbers[-1])
    assert numbers[0] != numbers[1]


def test_a_single_person_is_predicted_as_in_a_batch(figures):
    dataset = load_dataset(f"figures:{figures}", "val")
    model = PoseModel(CONFIG)
    alone, first = predict(model, dataset, people=dataset.annotated[:1]), predict(model, dataset)[0]
    assert len(alone) == 1 and np.allclose(alone[0]["keypoints"], first["keypoints"], atol=1e-3)


def test_prediction_leaves_the_model_in_the_mode_it_found(figures):
    dataset = load_dataset(f"figures:{figures}", "val")
    model = PoseModel(CONFIG).train()
    predict(model, dataset, people=dataset.annotated[:2])
    assert model.training


def test_a_drawn_skeleton_is_where_the_keypoints_are_at_any_size():
    keypoints = np.column_stack([np.linspace(10, 90, 17), np.linspace(20, 180, 17), np.ones(17)])
    for factor in (1, 10):
        image = Image.new("RGB", (100 * factor, 200 * factor))
        drawn = np.asarray(draw_pose(image, keypoints * [factor, factor, 1])).max(2)
        y, x = np.nonzero(drawn > 100)
        assert np.asarray(image).max() == 0  # the picture given is left as it was
        assert drawn[20 * factor, 10 * factor] > 100 and drawn[180 * factor, 90 * factor] > 100
        assert x.min() > 4 * factor and x.max() < 96 * factor and y.min() > 14 * factor and y.max() < 186 * factor


def test_uncertain_keypoints_are_left_out_and_poses_may_leave_the_picture():
    image = Image.new("RGB", (50, 50))
    keypoints = np.column_stack([np.linspace(-30, 80, 17), np.linspace(-30, 80, 17), np.full(17, 0.3)])
    assert np.asarray(draw_pose(image, keypoints)).max() > 0
    assert np.asarray(draw_pose(image, keypoints, threshold=0.5)).max() == 0


def test_sheets_and_curves_have_a_place_for_everything(figures):
    dataset = load_dataset(f"figures:{figures}", "val")
    results = predict(Oracle(dataset), dataset, flip_test=False)
    row, pose = dataset.annotated[0], np.reshape(results[0]["keypoints"], (-1, 3))
    person = "photo", dataset, row, {"truth": true_pose(dataset, row), "predicted": pose}
    assert draw_sheet([person] * 3, side=64).size == (3 * 64, 2 * 64 + 18)
    history = [{"stage": stage, "step": step, "loss": worst / step, "pck": pck, "validation": math.nan}
               for stage, worst, pck in (("style", 1, math.nan), ("adapt", 2, 0.5)) for step in (1, 2, 50)]
    panels = np.asarray(draw_curves(history, width=200, height=100))
    drawn = (panels == (65, 105, 225)).all(2).reshape(2, 100, 2, 200).any((1, 3))
    assert drawn.tolist() == [[True, False], [True, True]]  # no PCK in a stage that predicts no keypoints
    assert not (panels == (46, 139, 87)).all(2).any()  # nothing was validated


def test_a_single_validation_is_a_dot_in_the_curves():
    history = [{"stage": "adapt", "step": step, "loss": 1.0, "pck": 0.5,
                "validation": 0.8 if step == 2 else math.nan} for step in (1, 2, 3)]
    panels = np.asarray(draw_curves(history, width=200, height=100))
    assert (panels == (46, 139, 87)).all(2).any()


# -------------------------------------------------------------------------------------- the command

def test_a_checkpoint_is_evaluated_on_a_data_set(figures, checkpoint, tmp_path, capsys):
    arguments = ["--checkpoint", str(checkpoint), "--data", f"figures:{figures}", "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path), "--json", "--details"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    dataset = load_dataset(f"figures:{figures}", "val")
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert len(results) == 13
    assert set(results[0]) == {"image_id", "category_id", "keypoints", "score", "box", "file_name"}
    assert numbers["AP"] == evaluate_oks(to_coco(dataset), results)["AP"]
    assert set(numbers["domains"]) == set(dataset.domains.tolist())
    assert len(list(tmp_path.glob("*.jpg"))) == 13


def test_the_prompt_changes_the_poses_and_none_gives_the_originals(figures, checkpoint, tmp_path):
    results = {}
    for prompt in ("a photo of a cartoon", "none"):
        folder = tmp_path / prompt.replace(" ", "-")
        assert main(["--checkpoint", str(checkpoint), "--images", str(figures / "images" / "photo"), "--prompt", prompt,
                     "--out", str(folder), "--compare", "--device", "cpu"]) == 0
        results[prompt] = json.loads((folder / "results.json").read_text("utf-8"))
        with Image.open(next(folder.glob("*.jpg"))) as picture:
            assert picture.size == (1024, 512)  # original, adapted; enlarged
    assert len(results["none"]) == 7 and results["none"] != results["a photo of a cartoon"]


def test_a_checkpoint_says_which_sentences_the_model_reads_and_whether_token_by_token(figures, tmp_path, capsys):
    torch.manual_seed(0)
    model = VLPose(PoseModel(CONFIG), 128)
    for norm in (model.matcher.norm, model.predictor):
        torch.nn.init.normal_(norm.weight)
    save_checkpoint(tmp_path / "model.pth", model, text_weights="random", sentences="description", per_token=True)
    dataset = with_sentences(load_dataset(f"figures:{figures}", "val"), "description")
    texts = encode_sentences(load_clip_text("random"), np.unique(dataset.sentences).tolist(), per_token=True)
    expected = [np.round(result["keypoints"], 2) for result in predict_people(model, dataset, texts, dataset.annotated)]
    arguments = ["--checkpoint", str(tmp_path / "model.pth"), "--data", f"figures:{figures}", "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert np.allclose([result["keypoints"] for result in results], expected, atol=0.02)

    sentences = tmp_path / "sentences.json"
    others = set(dataset.domains.tolist()) - {"sketch"}
    sentences.write_text(json.dumps({domain: f"some {domain}" for domain in others}))
    capsys.readouterr()
    assert main([*arguments, "--prompt", str(sentences)]) == 2
    assert "expected a sentence for each domain, found none for sketch" in capsys.readouterr().err


def test_a_detectors_boxes_are_looked_into_and_repeated_poses_removed(real, checkpoint, tmp_path, capsys):
    boxes = real / "humanart" / "test_humanart_det_AP_H_56.json"
    assert main(["--checkpoint", str(checkpoint), "--data", f"humanart:{real / 'humanart'}", "--split", "all",
                 "--boxes", str(boxes), "--out", str(tmp_path), "--device", "cpu"]) == 0
    results = json.loads((tmp_path / "results.json").read_text("utf-8"))
    found = json.loads(boxes.read_text("utf-8"))
    assert 0 < len(results) <= len(found)
    assert max(result["score"] for result in results) <= max(box["score"] for box in found)


def test_boxes_of_other_images_are_skipped_and_counted(figures, checkpoint, tmp_path, capsys):
    """A detector's file may be of a whole data set, and of all categories."""
    dataset = load_dataset(f"figures:{figures}", "val")
    inside = [{"image_id": int(dataset.image_ids[2]), "bbox": [10, 10, 90, 140], "score": 0.5, "category_id": 1},
              {"image_id": int(dataset.image_ids[2]), "bbox": [10, 10, 90, 140], "score": 0.5, "category_id": 7}]
    (tmp_path / "boxes.json").write_text(json.dumps([record | {"image_id": 10 ** 6} for record in inside] + inside))
    assert main(["--checkpoint", str(checkpoint), "--data", f"figures:{figures}", "--prompt", "none", "--out",
                 str(tmp_path / "out"), "--boxes", str(tmp_path / "boxes.json"), "--device", "cpu"]) == 0
    assert f"{tmp_path / 'boxes.json'}: skipped 2 of 4 boxes: they are of other images" in capsys.readouterr().err
    result, = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert result["image_id"] == dataset.image_ids[2]


def test_the_score_of_a_pose_in_a_detected_box_is_the_box_score_times_the_poses_own(figures):
    dataset = load_dataset(f"figures:{figures}", "val")
    boxed = with_boxes(dataset, dataset.image_index[dataset.annotated], dataset.boxes[dataset.annotated])
    people, box_scores = np.arange(len(boxed.ids)), np.linspace(0.1, 1, len(boxed.ids))
    alone = predict_people(Oracle(dataset), boxed, None, people)
    scored = predict_people(Oracle(dataset), boxed, None, people, box_scores)
    assert len(scored) == len(alone) == 13  # one in each image: nothing is a repetition
    assert [result["score"] for result in scored] == pytest.approx(
        [result["score"] * score for result, score in zip(alone, box_scores)])
    assert [result["keypoints"] for result in scored] == [result["keypoints"] for result in alone]


def test_boxes_for_own_pictures_go_by_the_files_names(figures, checkpoint, tmp_path):
    picture = next((figures / "images" / "photo").iterdir())
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps([{"image_id": picture.stem, "bbox": [10, 10, 60, 100]},
                                 {"image_id": picture.name, "bbox": [80, 10, 60, 100]}]))
    assert main(["--checkpoint", str(checkpoint), "--images", str(picture), "--boxes", str(boxes), "--prompt", "none",
                 "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert len(json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))) == 2


def test_a_photo_that_the_camera_held_sideways_is_turned_upright(figures, checkpoint, tmp_path):
    orientation = Image.Exif()
    orientation[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (160, 100)).save(tmp_path / "phone.jpg", exif=orientation)
    assert main(["--checkpoint", str(checkpoint), "--images", str(tmp_path / "phone.jpg"), "--prompt", "none",
                 "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    with Image.open(next((tmp_path / "out").glob("*.jpg"))) as picture:
        assert picture.size == (320, 512)  # enlarged


@pytest.mark.parametrize("keypoints", [16, 14, 18, 5])
def test_models_of_other_skeletons_predict_own_pictures_too(figures, tmp_path, keypoints):
    save_checkpoint(tmp_path / "model.pth", PoseModel(CONFIG, keypoints))
    picture = str(next((figures / "images" / "photo").iterdir()))
    assert main(["--checkpoint", str(tmp_path / "model.pth"), "--images", picture, "--out", str(tmp_path / "out"),
                 "--device", "cpu"]) == 0
    result, = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert len(result["keypoints"]) == 3 * keypoints


@pytest.mark.parametrize("arguments, words", [
    (["--images", "nowhere*.jpg", "--prompt", "none", "--out", "out"], "nowhere*.jpg"),
    (["--images", "{text}", "--prompt", "none", "--out", "out"], "none that can be read"),
    (["--images", "{text}", "--out", "out"], "--prompt"),
    (["--data", "coco:nowhere"], "no such file or folder"),
    (["--images", "{picture}", "--prompt", "word " * 90, "--out", "out", "--strict"], "at most 77 tokens, found 92"),
    (["--images", "{picture}", "--prompt", "none", "--out", "out", "--boxes", "{nobody}"], "boxes of category 1"),
    (["--images", "{picture}", "--prompt", "none", "--out", "out", "--boxes", "{boxes}"], "has 'somebody else'"),
    (["--images", "{picture}", "--prompt", "none", "--out", "out", "--boxes", "{flat}"], "expected boxes of category 1"),
    (["--checkpoint", "{text}", "--data", "figures"], "text.jpg"),
    (["--checkpoint", "{strange}", "--data", "figures:{figures}"], "17 keypoints, but the model predicts 5"),
])
def test_bad_input_is_one_line_and_exit_status_2(figures, checkpoint, tmp_path, capsys, arguments, words):
    save_checkpoint(tmp_path / "strange.pth", PoseModel(CONFIG, 5))
    paths = SimpleNamespace(
        figures=figures, strange=tmp_path / "strange.pth", text=tmp_path / "text.jpg", boxes=tmp_path / "boxes.json",
        flat=tmp_path / "flat.json", nobody=tmp_path / "nobody.json",
        picture=next((figures / "images" / "photo").iterdir()))
    paths.text.write_text("this is not an image")
    paths.nobody.write_text("[]")
    paths.boxes.write_text('[{"image_id": "somebody else", "bbox": [0, 0, 1, 1]}]')
    paths.flat.write_text(json.dumps([{"image_id": paths.picture.name, "bbox": [0, 0, 1, 0]}]))
    arguments = [argument.format(**vars(paths)) for argument in arguments]
    assert main(["--checkpoint", str(checkpoint), *arguments]) == 2
    *notes, error = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("error: ") and words in error
    for note in notes:
        assert note.endswith(KNOWN_NOTES) or note.startswith("images of the domain 'picture' read")


# ---------------------------------------------------------------------------- one picture in Python

def test_the_poses_of_one_picture_are_those_of_a_data_set_that_holds_it(figures):
    dataset = with_sentences(load_dataset(f"figures:{figures}#cartoon", "val"), "a cartoon")
    torch.manual_seed(0)
    model = VLPose(PoseModel(CONFIG), 128).eval()
    texts = encode_sentences(load_clip_text("random"), ["a cartoon"])
    row = dataset.annotated[0]
    file, box = dataset.files[dataset.image_index[row]], dataset.boxes[row]
    expected = np.reshape(predict(model, dataset, texts, [row])[0]["keypoints"], (1, 17, 3))
    with Image.open(file) as image:
        poses = estimate_poses(model, image, [box], "a cartoon")
        pixels = np.asarray(image)
    np.testing.assert_allclose(poses.keypoints, expected, atol=1e-4)
    assert poses.skeleton is COCO17 and poses.boxes.tolist() == [box.tolist()]
    np.testing.assert_allclose(estimate_poses(model, pixels, [box], "a cartoon").keypoints, expected, atol=1e-4)
    two = estimate_poses(model, pixels, [box, box + [3, 0, 0, 0]], "a cartoon").keypoints
    assert two.shape == (2, 17, 3) and not np.allclose(two[0], two[1])


def test_without_boxes_the_picture_is_one_person_and_without_a_sentence_the_original_looks_at_it(figures):
    model, pixels = VLPose(PoseModel(CONFIG), 128).eval(), np.zeros((90, 60, 3), np.uint8)
    whole, original = estimate_poses(model, pixels), estimate_poses(model.base, pixels)
    assert whole.boxes.tolist() == [[0, 0, 60, 90]]
    np.testing.assert_array_equal(whole.keypoints, original.keypoints)
    assert estimate_poses(model, pixels, boxes=[]).keypoints.shape == (0, 17, 3)


@pytest.mark.parametrize("model, arguments, words", [
    (VLPose, {"boxes": [[1, 2, 0, 5]]}, "boxes: expected a width and a height above 0"),
    (PoseModel, {"sentence": "a cartoon"}, "sentence: expected a VLPose, which reads text, with .* found a PoseModel"),
    (VLPose, {"sentence": "a cartoon", "adapter": False}, "with its adapter on, found a PoseModel"),
    (VLPose, {"sentence": "a cartoon"}, "random: expected text features of width 512, .* found 128"),
])
def test_what_cannot_be_estimated_is_said(model, arguments, words):
    model = VLPose(PoseModel(CONFIG), 512) if model is VLPose else PoseModel(CONFIG)
    with pytest.raises(DataError, match=words):
        estimate_poses(model, np.zeros((90, 60, 3), np.uint8), **arguments)


def test_a_model_that_reads_no_text_is_the_adapted_one_unless_its_adapter_is_off(figures, tmp_path):
    torch.manual_seed(0)
    model = VLPose(PoseModel(CONFIG), None, "baseline", num_prompts=0, rank=4)  # `--strategy lora`
    torch.nn.init.normal_(model.predictor.weight, std=0.1)
    save_checkpoint(tmp_path / "lora.pth", model, text_weights="random", sentences="a photo of a {domain} character")
    picture = next((figures / "images" / "photo").iterdir())
    poses = {}
    for adapter in ("on", "off"):
        assert main(["--checkpoint", str(tmp_path / "lora.pth"), "--images", str(picture), "--out",
                     str(tmp_path / adapter), "--adapter", adapter, "--device", "cpu"]) == 0
        result, = json.loads((tmp_path / adapter / "results.json").read_text("utf-8"))
        poses[adapter] = np.reshape(result["keypoints"], (1, 17, 3))
    assert not np.allclose(poses["on"], poses["off"])
    model = load_model(tmp_path / "lora.pth")
    np.testing.assert_allclose(estimate_poses(model, picture).keypoints, poses["on"], atol=1e-4)
    np.testing.assert_allclose(estimate_poses(model, picture, adapter=False).keypoints, poses["off"], atol=1e-4)
    dataset = load_dataset(f"figures:{figures}", "val")
    assert predict(model, dataset) != predict(model.base, dataset)  # `predict` needs no text for it, either
    with pytest.raises(DataError, match="sentence: expected a VLPose, which reads text"):
        estimate_poses(model, picture, sentence="a cartoon")


def test_a_list_of_pictures_has_a_list_of_poses_whatever_the_size_of_the_batches(figures):
    model = PoseModel(CONFIG)
    torch.nn.init.normal_(model.head.predictor.weight, std=0.1)
    files = sorted((figures / "images" / "photo").iterdir())[:3]
    pixels = np.asarray(Image.open(files[1]).convert("RGB"))
    boxes = [[[10, 10, 60, 100], [20, 5, 50, 90]], [], [[0, 0, 80, 120]]]
    for batch_size in (1, 2, 64):
        found = estimate_poses(model, [str(files[0]), pixels, Image.open(files[2])], boxes, batch_size=batch_size)
        assert [len(poses.keypoints) for poses in found] == [2, 0, 1]
        for file, box, poses in zip(files, boxes, found):
            alone = estimate_poses(model, file, box)
            np.testing.assert_allclose(poses.keypoints, alone.keypoints, atol=1e-3)
            assert poses.boxes.tolist() == np.reshape(box, (-1, 4)).tolist()
    assert estimate_poses(model, []) == []
    with pytest.raises(DataError, match="boxes: expected those of 2 pictures, found 1"):
        estimate_poses(model, files[:2], boxes[:1])


def test_a_file_is_turned_as_exif_says_and_its_poses_are_in_the_turned_picture(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (160, 100)).save(tmp_path / "phone.jpg", exif=turned)
    assert estimate_poses(PoseModel(CONFIG), tmp_path / "phone.jpg").boxes.tolist() == [[0, 0, 100, 160]]


@pytest.mark.parametrize("image", [
    np.zeros((9, 6, 3)), np.zeros((3, 9, 6), np.uint8), np.zeros((2, 9, 6, 3), np.uint8), torch.zeros(3, 9, 6), 7,
    [np.zeros((9, 6, 3))], [[1, 2], [3, 4]]])
def test_what_is_no_picture_is_refused_with_what_was_expected(image):
    with pytest.raises(DataError, match=r"expected a path, a Pillow image, RGB bytes \(H, W, 3\) .*, found (float|u?int)"):
        estimate_poses(PoseModel(CONFIG), image)


def test_a_sentence_that_is_too_long_is_cut_and_said_once_for_all_pictures(figures, tmp_path, capsys):
    dataset = load_dataset(f"figures:{figures}", "val")
    sentences = ["a photo"] * len(dataset.files)
    sentences[2], sentences[4] = "word " * 90, "word " * 80
    eval.report_cut(np.array(sentences), dataset.files)
    assert capsys.readouterr().err == (f"{dataset.files[2]}: expected a sentence of at most 77 tokens, found 92; "
                                       f"2 of {len(sentences)} sentences are cut\n")
    eval.report_cut(np.array(["word " * 75] * 3), dataset.files[:3])
    assert capsys.readouterr().err == ""
    model = VLPose(PoseModel(CONFIG), 128).eval()
    torch.nn.init.normal_(model.matcher.norm.weight)
    picture = dataset.files[0]
    long, cut = (estimate_poses(model, picture, sentence="word " * count).keypoints for count in (90, 75))
    np.testing.assert_array_equal(long, cut)
    assert "at most 77 tokens, found 92" in capsys.readouterr().err


def test_a_picture_that_exif_would_turn_keeps_its_pixels(checkpoint):
    """Whoever opens a picture with Pillow draws on its pixels, so the poses are in these."""
    pixels = np.random.default_rng(0).integers(0, 255, (100, 160, 3), np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", exif=turned)
    model = load_model(checkpoint)
    poses, plain = estimate_poses(model, Image.open(buffer)), estimate_poses(model, pixels)
    assert (poses.keypoints == plain.keypoints).all() and poses.boxes.tolist() == [[0, 0, 160, 100]]


def test_poses_of_any_skeleton_can_be_drawn_on_any_kind_of_picture():
    skeleton = make_skeleton(("L_Paw", "R_Paw", "Tail"), [(0, 2), (1, 2)])
    poses = estimate_poses(PoseModel(CONFIG, 3, skeleton), np.zeros((100, 80, 3), np.uint8))
    poses.keypoints[:] = [[20, 20, 1], [60, 20, 1], [40, 80, 1]]
    for picture in (np.zeros((100, 80, 3), np.uint8), Image.new("L", (80, 100)), Image.new("RGBA", (80, 100))):
        drawn = np.asarray(draw_pose(picture, poses.keypoints[0], poses.skeleton))
        assert drawn.shape == (100, 80, 3) and np.abs(drawn[20, 20].astype(int) - [255, 140, 0]).max() < 30


def test_a_model_is_tested_on_the_keypoints_that_it_shares_with_a_data_set(figures, checkpoint, tmp_path, capsys):
    content = to_coco(load_dataset(f"figures:{figures}#photo", "val"))
    order = [*range(5, 17), 0]  # other keypoints in another order, and one that COCO does not have
    for person in content["annotations"]:
        pose = np.reshape(person["keypoints"], (17, 3))
        person["keypoints"] = [*pose[order].ravel(), 0, 0, 0]
        person["num_keypoints"] = int((pose[order, 2] > 0).sum())
    names = [COCO17.names[joint].title() for joint in order] + ["Tail"]
    content["categories"] = [{"id": 1, "name": "person", "keypoints": names, "skeleton": []}]
    (tmp_path / "other.json").write_text(json.dumps(content))
    (tmp_path / "images").symlink_to(figures / "images" / "photo")
    assert main(["--checkpoint", str(checkpoint), "--data", f"coco:{tmp_path / 'other.json'}", "--split", "all",
                 "--prompt", "none", "--device", "cpu"]) == 0
    assert "its skeleton lacks left_eye, right_eye, left_ear, right_ear" in capsys.readouterr().err


def test_people_on_a_sheet_are_shown_as_their_poses_see_them(tmp_path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, :40] = 255  # white on the left as stored; EXIF turns it to the top
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=turned)
    pictures = read_pictures([str(tmp_path / "a.png")])
    sheet = np.asarray(draw_sheet([("", pictures, 0, {"pose": np.zeros((17, 3))})]))[18:]
    assert pictures.boxes[0].tolist() == [0, 0, 40, 80]
    assert sheet[60, 96].min() > 250 and sheet[130, 96].max() < 5
