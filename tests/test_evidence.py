"""What must hold for the evidence.

Rows are commands, finished ones are not run again, and tables say what runs found.
"""
import argparse
import json
import shutil

import evidence
import numpy as np
import pytest
import text_tower
from PIL import Image
from conftest import command, run_program
from data import COCO17, draw_figures, load_dataset
from train import main, parse_options


@pytest.fixture
def args(tmp_path):
    return argparse.Namespace(experiment="vlpose", seeds=2, jobs=1, quick=False, folder=tmp_path,
                              root="lsp", init="resnet18", known={})


@pytest.mark.parametrize("experiment", evidence.EXPERIMENTS)
def test_every_row_is_a_command_that_train_accepts(args, experiment):
    args.experiment = experiment
    options = [parse_options(words) for words in evidence.commands(args).values()]
    assert {option.seed for option in options} == {0, 1}
    told = {json.dumps(vars(option) | {"oracle": None}, sort_keys=True) for option in options}
    assert len(told) == len(options), "two rows are the same command"


def test_a_finished_row_is_not_run_again(args, capsys):
    (args.folder / "vlpose" / "full-0").mkdir(parents=True)
    (args.folder / "vlpose" / "full-0" / "results.json").write_text("{}")
    assert evidence.run(args, "full", 0, ["--no-such-option"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("mode", ["vlpose", "uda"])
def test_a_run_with_other_options_is_not_taken_for_the_row(args, capsys, mode):
    options = ["--mode", mode, "--seed", "0"]
    folder = evidence.folder_of(args, "full", 0)
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{}")
    config = vars(parse_options([*options, "--out", str(folder)])) | {"processes": 1}
    (folder / "config.json").write_text(json.dumps(config))
    assert evidence.run(args, "full", 0, options) == 0
    assert evidence.run(args, "full", 0, [*options, "--steps", "7"]) == 1
    assert f"{folder}: a run with other options" in capsys.readouterr().err


def test_a_row_that_fails_is_reported_with_its_log(args, capsys):
    assert evidence.run(args, "full", 0, ["--no-such-option"]) == 2
    assert "full-0.txt" in capsys.readouterr().err
    assert "--no-such-option" in (args.folder / "vlpose" / "full-0.txt").read_text("utf-8")


def test_a_row_is_trained_by_its_command_and_goes_on_where_it_was_stopped(
        args, tmp_path, monkeypatch):
    def run_quickly(words, stdout, **_):
        ended = run_program(*words[1:])
        stdout.write(ended.stdout + ended.stderr)
        return ended
    monkeypatch.setattr(evidence.subprocess, "run", run_quickly)
    draw_figures(tmp_path / "cache", {"train": (4, 4), "val": (2, 2)})
    args.folder = tmp_path / "evidence"
    options = ["--cache", str(tmp_path / "cache"), "--strategy", "scratch", "--base-steps", "2",
               "--image-size", "64", "64", "--batch-size", "2"]
    folder = evidence.folder_of(args, "scratch", 0)
    assert evidence.run(args, "scratch", 0, options) == 0
    (folder / "results.json").rename(tmp_path / "results.json")  # as if it had been stopped
    assert evidence.run(args, "scratch", 0, options) == 0
    assert (folder / "results.json").read_text() == (tmp_path / "results.json").read_text()


def test_tables_and_pictures_have_means_and_spreads_over_the_seeds(args, capsys):
    rows = {("full", 0): [], ("full", 1): [], ("last", 0): []}
    for (row, seed), photo in zip(rows, (0.5, 0.6, 0.4)):
        folder = args.folder / "vlpose" / f"{row}-{seed}"
        folder.mkdir(parents=True)
        table = {domain: {"AP": photo / 2} for domain in evidence.ART} | {"photo": {"AP": photo}}
        (folder / "results.json").write_text(json.dumps({"original": table, "adapted": table}))
        evidence.log_of(folder).write_text("full: 1,234 trainable parameters\nadapt 6/6")
    numbers = evidence.collect(args, rows)
    assert np.allclose(numbers["full", "adapted"]["art"], [0.25, 0.3])
    evidence.print_tuning(numbers, evidence.STRATEGIES)
    printed = capsys.readouterr().out
    assert "| full | 2 | 0.275 ± 0.035 |  | 0.550 ± 0.071 |" in printed
    assert "| 1,234 | `--strategy full` |" in printed
    assert "| last | 1 | 0.200 |  | 0.400 |" in printed
    evidence.draw_tradeoff(numbers, args.folder / "vlpose.png")
    assert (args.folder / "vlpose.png").exists()
    assert "full,1,adapted,photo,0.6" in (args.folder / "vlpose.csv").read_text("utf-8")


def test_numbers_of_an_earlier_call_give_the_same_table_and_are_not_trained_again(args, capsys):
    test_tables_and_pictures_have_means_and_spreads_over_the_seeds(args, capsys)
    args.known = evidence.read_numbers(args.folder / "vlpose.csv")
    for folder in (args.folder / "vlpose").glob("*-?"):
        shutil.rmtree(folder)
    rows = {("full", 0): [], ("full", 1): [], ("last", 0): []}
    evidence.print_tuning(evidence.collect(args, rows), evidence.STRATEGIES)
    printed = capsys.readouterr().out
    assert "| full | 2 | 0.275 ± 0.035 |  | 0.550 ± 0.071 |" in printed
    assert "| 1,234 | `--strategy full` |" in printed
    assert not evidence.train_rows(args, rows, {"full", "last"})
    assert capsys.readouterr().out == ""


PAGE_ROWS = {  # the first words of a row on the page -> row of the experiment
    "VLPose, the default": "vlpose", "`--strategy full`": "full", "`--strategy prompt`": "prompt",
    "`--strategy last`": "last", "`--strategy stem`": "stem",
    "`--strategy all-but-stem`": "all but the stem", "`--strategy lora`, of rank 4": "lora",
    "`--strategy lora --rank 1`": "lora, rank 1", "`--strategy lora --rank 16`": "lora, rank 16",
    "VLPose with low-rank updates, `--rank 4`": "vlpose with lora",
    "the same without text, `--rank 4 --matcher image`": "vlpose with lora, no text",
    "`--decoder injector`": "decoder injector",
    "`--decoder extractor-injector`": "decoder extractor-injector",
    "`--decoder dual-released`": "decoder dual-released",
    "no text, `--matcher image`": "no text",
    "one sentence for all, `--sentences 'a photo of a person'`": "one sentence for all",
    "bare names, `--sentences '{domain}'`": "bare names",
    "`--num-prompts 0`": "0 prompts", "`--num-prompts 50`": "50 prompts"}
ALIGNMENT_ROWS = {
    "all three levels": "all three levels", "without image level": "without image level",
    "without feature level": "without feature level", "without pose level": "without pose level",
    "no level: the mean teacher alone": "no level",
    "no level and no consistency: the source alone": "the source alone",
    "image level alone": "image level alone", "feature level alone": "feature level alone",
    "pose level alone": "pose level alone", "without occlusion": "without occlusion",
    "without consistency": "without consistency",
    "`--feature-level 0.01`": "feature level 0.01", "`--feature-level 0.1`": "feature level 0.1",
    "`--pose-level 30`": "pose level 30", "`--pose-level 100`": "pose level 100"}


RECIPES_OF_LSP = {
    "the recipe above": "all three levels", "the same, `--steps 1200`": "1,200 steps",
    "the same, `--supervised-steps 5000 --steps 1200`": "5,000 supervised steps, 1,200 steps",
    "without `--augmentation paper`": "gentle augmentation",
    "figures of all styles, `--source figures`": "figures of all styles",
    "figures of all styles, `--steps 1200`": "figures of all styles, 1,200 steps"}


def numbers_and_pages(args):
    """The numbers of an experiment's file, the page of the evidence, and the README."""
    args.seeds = 3
    file = evidence.ROOT / "assets" / "evidence" / f"{args.experiment}.csv"
    args.known = evidence.read_numbers(file)
    pages = [evidence.ROOT / "assets" / "evidence.md", evidence.ROOT / "README.md"]
    return (evidence.collect(args, evidence.commands(args)),
            *(page.read_text("utf-8") for page in pages))


def test_the_pages_say_of_alignment_what_its_file_of_numbers_says(args):
    args.experiment = "uda"
    numbers, page, readme = numbers_and_pages(args)
    lowest, highest = (numbers["all three levels", model]["mean"]
                       for model in ("source only", "oracle"))
    assert len(lowest) == len(highest) == 3
    assert f"| source only | {evidence.spread(lowest)} | | " in page
    assert f"| oracle | {evidence.spread(highest)} | | " in page
    assert f"| source only | {evidence.spread(lowest)} | | 0 % |" in readme
    assert f"the oracle | {evidence.spread(highest)} | | 100 % |" in readme
    for words, row in ALIGNMENT_ROWS.items():
        student, teacher = (numbers[row, model] for model in ("student", "teacher"))
        assert len(student["mean"]) == 3
        pck, of_teacher, wide = (evidence.spread(values) for values in (
            student["mean"], teacher["mean"], teacher["mean at 0.2"]))
        assert f"| {words} | {pck} | {of_teacher} | {wide} |" in page
        share = (np.mean(student["mean"]) - np.mean(lowest)) / (np.mean(highest) - np.mean(lowest))
        if row in ("no level", "all three levels"):
            assert f" | {pck} | {of_teacher} | {100 * share:.0f} % |" in readme


def test_the_pages_say_of_lsp_what_its_file_of_numbers_says(args):
    args.experiment = "lsp"
    numbers, page, readme = numbers_and_pages(args)
    lowest, highest, student, teacher = (numbers["all three levels", model] for model in (
        "source only", "oracle", "student", "teacher"))
    assert all(len(model["mean"]) == 3 for model in (lowest, highest, student, teacher))
    for words, model in (("source only", lowest), ("oracle", highest)):
        pck, wide = (evidence.spread(model[measure]) for measure in ("mean", "mean at 0.2"))
        assert f"| {words} | {pck} | | {wide} |" in page
    pck, of_teacher, wide = (evidence.spread(values) for values in (
        student["mean"], teacher["mean"], teacher["mean at 0.2"]))
    assert f"| all three levels | {pck} | {of_teacher} | {wide} |" in page
    low, high, found = (np.mean(model["mean"]) for model in (lowest, highest, student))
    share = (found - low) / (high - low)
    assert (f"PCK rises by {100 * (found - low):.1f} points, which closes {100 * share:.0f} % of "
            "the gap.") in page
    assert f"rises from {low:.3f} to {found:.3f}" in readme


def test_the_page_says_of_the_recipes_for_lsp_what_the_file_of_numbers_says(args):
    args.experiment = "lsp"
    numbers, page, _ = numbers_and_pages(args)
    for words, row in RECIPES_OF_LSP.items():
        columns = [numbers[row, model]["mean"]
                   for model in ("source only", "student", "teacher", "oracle")]
        lowest, student, _, highest = map(np.mean, columns)
        share = (student - lowest) / (highest - lowest)
        cells = map(evidence.spread, columns)
        wide = evidence.spread(numbers[row, "teacher"]["mean at 0.2"])
        assert f"| {words} | {' | '.join(cells)} | {100 * share:.0f} % | {wide} |" in page


def test_the_pages_say_of_vlpose_what_its_file_of_numbers_says(args):
    numbers, page, readme = numbers_and_pages(args)
    original, full = numbers["vlpose", "original"], numbers["full", "adapted"]
    assert len(original["art"]) == 3
    art, photo = evidence.spread(original["art"]), evidence.spread(original["photo"])
    assert f"| the original, `--strategy scratch` | {art} | 0 % | {photo} | 0 |" in page
    assert f"| the original | {art} | {photo} | | 0 |" in readme
    lowest, highest = np.mean(original["art"]), np.mean(full["art"])
    for words, row in PAGE_ROWS.items():
        found = numbers[row, "adapted"]
        art, photo = evidence.spread(found["art"]), evidence.spread(found["photo"])
        share = (np.mean(found["art"]) - lowest) / (highest - lowest)
        trained = f"{found['trained'][0]:,.0f}"
        assert len(found["art"]) == 3
        assert f"| {words} | {art} | {100 * share:.0f} % | {photo} | {trained} |" in page
        if row in ("vlpose", "full", "last", "lora"):
            assert f" | {art} | {photo} | " in readme


def test_alignment_has_a_table_and_a_picture_of_the_weights_once_a_row_is_finished(args, capsys):
    args.experiment, path = "uda", args.folder / "uda.png"
    rows = evidence.commands(args)
    evidence.draw_sensitivity(evidence.collect(args, rows), path)
    assert not path.exists()
    for (row, seed), pck in zip(rows, np.linspace(0.5, 0.81, len(rows))):
        folder = evidence.folder_of(args, row, seed)
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(dict.fromkeys(
            ("source only", "student", "teacher"), {"mean": pck, "mean at 0.2": 0.9})))
    numbers = evidence.collect(args, rows)
    evidence.draw_sensitivity(numbers, path)
    with Image.open(path) as picture:
        assert picture.size == (480, 480)
    evidence.print_alignment(numbers, evidence.LEVELS | evidence.SENSITIVITY)
    printed = capsys.readouterr().out
    assert "| source only | 2 | 0.505 ± 0.008 |  | 0.900 ± 0.000 |" in printed
    assert ("| pose level 100 | 2 | 0.805 ± 0.008 | 0.805 ± 0.008 | 0.900 ± 0.000 | "
            "`--pose-level 100` |") in printed


def test_each_style_is_read_with_its_own_sentence_and_with_that_of_another(tmp_path, monkeypatch):
    draw_figures(tmp_path, {"train": (4, 1), "val": (2, 2)})
    monkeypatch.setenv("POSEBRIDGE_HOME", str(tmp_path))
    assert main(command(tmp_path, tmp_path / "run")) == 0
    read = []
    monkeypatch.setattr(evidence, "predict",
                        lambda model, figures, texts: read.append((figures, texts)))
    monkeypatch.setattr(evidence, "domain_table", lambda *_: {})
    names = {f"{name} sentence" for name in ("right", "wrong", "composed")}
    assert evidence.read_sentences(tmp_path / "run").keys() == names
    (right, right_texts), (wrong, wrong_texts), (composed, composed_texts) = (
        (dict(zip(figures.domains.tolist(), figures.sentences.tolist())), texts)
        for figures, texts in read)
    assert right == {style: f"a photo of a {style} character" for style in evidence.ART}
    assert wrong.keys() == right.keys() and sorted(wrong.values()) == sorted(right.values())
    assert not any(right[style] == wrong[style] for style in evidence.ART)
    assert composed == right | evidence.COMPOSED
    assert right_texts.keys() == wrong_texts.keys() == {*right.values()}
    assert composed_texts.keys() == {*composed.values()}


def test_a_composed_sentence_has_only_phrases_of_other_styles():
    for style, sentence in evidence.COMPOSED.items():
        phrases = sentence.removeprefix(text_tower.OPENING).split(", ")
        heard = {look.split("/")[0] for other in evidence.ART if other != style
                 for look in text_tower.LOOKS[other]}
        assert sentence.startswith(text_tower.OPENING) and heard >= {*phrases}


def test_few_labels_are_the_same_number_of_each_style_and_every_fifth_is_held_out(
        args, monkeypatch, tmp_path):
    draw_figures(tmp_path / "home", {"train": (1, 8), "val": (1, 1)})
    monkeypatch.setenv("POSEBRIDGE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(evidence, "FEW_LABELS", {5: 25})
    evidence.draw_few_sets(args)
    train, val, other = (load_dataset(f"coco:{args.folder}/few-5-{seed}", split)
                         for seed, split in ((0, "train"), (0, "val"), (1, "train")))
    for part, count in ((train, 4), (val, 1)):
        assert dict(zip(*np.unique(part.domains,
                                   return_counts=True))) == dict.fromkeys(evidence.ART, count)
    assert not {*train.files} & {*val.files} and {*train.files} != {*other.files}


def test_few_labels_have_a_row_for_each_way_of_tuning(args, capsys):
    args.experiment = "few"
    for (row, seed), art in zip(evidence.commands(args), np.linspace(0.3, 0.64, 18)):
        folder = evidence.folder_of(args, row, seed)
        folder.mkdir(parents=True)
        table = {domain: {"AP": art} for domain in (*evidence.ART, "photo")}
        (folder / "results.json").write_text(json.dumps({"adapted": table}))
        evidence.log_of(folder).write_text("lora: 1,234 trainable parameters")
    evidence.print_few(evidence.collect(args, evidence.commands(args)))
    assert "| vlpose | 0.310 ± 0.014, 0.310 ± 0.014 | 0.430" in capsys.readouterr().out


def test_gains_are_shares_of_full_fine_tunings_and_the_frontier_is_drawn_by_parameters(
        args, capsys):
    rows = [*evidence.STRATEGIES, *evidence.LORA]
    numbers = {(row, "adapted"): {"art": [0.3 + place / 100], "photo": [0.5],
                                  "trained": [1000 * (place + 1)]}
               | {style: [0.3] for style in evidence.ART} for place, row in enumerate(rows)}
    numbers["full", "adapted"]["art"] = [0.5]
    numbers["base, AdamW", "original"] = {}
    numbers["vlpose", "original"] = numbers["vlpose", "adapted"] | {"art": [0.1]}
    evidence.print_tuning(numbers, evidence.STRATEGIES)
    printed = capsys.readouterr().out
    assert "| full | 1 | 0.500 | 100% |" in printed and "| vlpose | 1 | 0.300 | 50% |" in printed
    assert len({line.count("|") for line in printed.splitlines()}) == 1
    evidence.draw_frontier(numbers, args.folder / "frontier.png")
    with Image.open(args.folder / "frontier.png") as picture:
        assert picture.size == (480, 480)


def test_people_are_counted_by_their_view_and_with_left_and_right_exchanged(tmp_path, monkeypatch):
    draw_figures(tmp_path, {"train": (1, 1), "val": (40, 1)})
    monkeypatch.setenv("POSEBRIDGE_HOME", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"target": "figures#photo"}))
    model = argparse.Namespace(skeleton=COCO17, config=argparse.Namespace(image_size=(128, 96)))
    monkeypatch.setattr(evidence, "load_model", lambda _: model)

    def takes_all_for_people_who_face_the_camera(_, figures, flip_test):
        poses = figures.keypoints[figures.annotated].copy()
        left, right = (COCO17.names.index(f"{side}_shoulder") for side in ("left", "right"))
        turned = poses[:, left, 0] < poses[:, right, 0]
        poses[turned] = poses[turned][:, COCO17.mirrored]
        return [{"keypoints": pose.flatten().tolist()} for pose in poses]
    monkeypatch.setattr(evidence, "predict", takes_all_for_people_who_face_the_camera)
    found = evidence.pck_by_view(tmp_path)
    assert sum(view["people"] for view in found.values()) == pytest.approx(1)
    right, exchanged = found["facing the camera"]["teacher"]
    assert right == 1 and exchanged < 0.8
    right, exchanged = found["from behind"]["teacher"]
    assert right < 0.8 and exchanged == 1


def test_a_view_is_told_by_shoulders_and_hips():
    keypoints = np.zeros((3, 17, 3))
    upright = {"left_shoulder": (60, 20), "right_shoulder": (40, 20),
               "left_hip": (55, 60), "right_hip": (45, 60)}
    for joint, point in upright.items():
        keypoints[:, COCO17.names.index(joint), :2] = point
    keypoints[1, :, 0] *= -1
    keypoints[2, :, 1] *= -1
    assert evidence.views_of(keypoints, COCO17).tolist() == [*evidence.VIEWS]


@pytest.mark.parametrize("experiment", evidence.NEEDS)
def test_tables_alone_train_and_draw_nothing_first(args, experiment, monkeypatch):
    monkeypatch.setitem(evidence.NEEDS, experiment, pytest.fail)
    monkeypatch.setattr("sys.argv", ["evidence.py", experiment, "--tables", "--folder",
                                     str(args.folder)])
    assert evidence.main() == 0


@pytest.mark.parametrize("experiment", evidence.EXPERIMENTS)
def test_the_tables_of_every_experiment_can_be_made_of_its_finished_rows(
        args, experiment, monkeypatch, capsys):
    args.experiment = experiment
    for row, seed in evidence.commands(args):
        folder = evidence.folder_of(args, row, seed)
        folder.mkdir(parents=True)
        styles = [style for style in evidence.ART if row != f"without {style}"]
        aligned = {model: {"mean": pck, "mean at 0.2": 0.9} for model, pck in (
            ("source only", 0.5), ("student", 0.6), ("teacher", 0.6), ("oracle", 0.7))}
        results = {model: {domain: {"AP": ap} for domain in (*styles, "photo", "all of lsp:x")}
                   for model, ap in (("original", 0.4), ("adapted", 0.5))}
        if "--mode uda" in evidence.EXPERIMENTS[experiment][0]:
            results = aligned
        (folder / "results.json").write_text(json.dumps(results))
        evidence.log_of(folder).write_text("lora: 1,234 trainable parameters")
    everything = {style: {"AP": 0.5} for style in (*evidence.ART, "photo")}
    monkeypatch.setattr(evidence, "read_sentences", lambda _: dict.fromkeys(
        ("right sentence", "wrong sentence", "composed sentence"), everything))
    models = dict.fromkeys(("source-only", "teacher", "oracle"), (0.5, 0.4))
    monkeypatch.setattr(evidence, "pck_by_view",
                        lambda _: {"from behind": {"people": 0.3} | models})
    monkeypatch.setattr(evidence, "domains_of",
                        lambda _: dict.fromkeys(("source-only", "teacher"), everything))
    monkeypatch.setattr("sys.argv", ["evidence.py", experiment, "--tables", "--seeds", "2",
                                     "--folder", str(args.folder)])
    assert evidence.main() == 0
    assert "0.500 ± 0.000" in (printed := capsys.readouterr().out)
    assert experiment != "lsp" or "| gentle augmentation | 2 |" in printed and "| 50% |" in printed
