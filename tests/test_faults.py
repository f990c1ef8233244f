"""What must hold when something goes wrong: nothing is lost, and nothing is silently wrong."""
import argparse
import ctypes
import errno
import gc
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import unicodedata
import zipfile
from contextlib import nullcontext
from dataclasses import fields
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch.utils.data import DataLoader

import data
import eval
import faults
import train
import vlpose
from conftest import (ROOT, SERVER, command, run_program, run_script, start_program,
                      uda_command)
from data import (DataError, load_dataset, read_boxes, unreadable, write_json, written_whole)
from train import Passes, count_unread, main
from vlpose import VIT_CONFIGS, PoseModel, VLPose, WeightsError, load_model, save_checkpoint


def own_cache(cache, folder):
    """A cache with the drawn figures and no trained model."""
    folder.mkdir()
    (folder / train.FIGURES).symlink_to(cache / train.FIGURES)
    return folder


def results_of(folder):
    return (folder / "results.json").read_text("utf-8")


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory):
    """A finished run with a checkpoint every two steps, and its cache."""
    home = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "CHECKPOINT_EVERY", 2)
        assert main(command(own_cache(cache, home / "cache"), home / "run")) == 0
    return home


@pytest.fixture
def copy(run, tmp_path):
    """A copy of that run to go on with."""
    shutil.copytree(run / "run", tmp_path / "run")
    return tmp_path / "run"


def error_of(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], lines
    return lines[-1]


def flip_a_bit(path, place):
    content = bytearray(path.read_bytes())
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


# ------------------------------------------------------------------------------- numbers not finite

@pytest.mark.parametrize("make, option, stage", [
    (command, "--base-lr", "base"), (command, "--lr", "adapt"),
    (uda_command, "--style-lr", "style"), (uda_command, "--lr", "source"),
    (uda_command, "--adapt-lr", "adapt")])
def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(
        cache, tmp_path, capsys, make, option, stage):
    own = own_cache(cache, tmp_path / "cache")
    assert main(make(own, tmp_path / "run", option, "1e30")) == 2
    printed = capsys.readouterr()
    message = printed.err.strip().splitlines()[-1]
    assert f"error: stage {stage}, step " in message and "learning rate, 1e+30" in message
    assert printed.out.count("in this batch: ") in (4, 8) and ".jpg" in printed.out
    for path in [*(tmp_path / "run").glob("*.pth"), *own.glob("*.pth")]:
        vlpose.check_finite(vlpose.read_file(path), path)
    assert not list((tmp_path / "run").glob(f"{stage}.*.pth"))
    assert bool(list(own.glob("base-*.pth"))) == (make is command and stage == "adapt")


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path):
    model = VLPose(PoseModel(VIT_CONFIGS["tiny"]), 8)
    save_checkpoint(tmp_path / "good.pth", model)
    contents = torch.load(tmp_path / "good.pth")
    for part in ("base", "adapter"):
        name, tensor = next((name, tensor) for name, tensor in contents[part].items()
                            if tensor.is_floating_point())
        kept = tensor.clone()
        tensor.flatten()[0] = torch.inf
        torch.save(contents, tmp_path / "bad.pth")
        with pytest.raises(WeightsError, match=f"bad.pth: expected finite numbers, found others in "
                           f".*{name}"):
            load_model(tmp_path / "bad.pth")
        tensor.copy_(kept)
    model.prompts.data[0, 0, 0] = torch.nan
    with pytest.raises(WeightsError, match="new.pth: expected finite numbers, found others in "
                       "tensor prompts"):
        save_checkpoint(tmp_path / "new.pth", model)
    assert not (tmp_path / "new.pth").exists()


def test_json_never_holds_a_number_that_it_has_no_word_for(tmp_path):
    with pytest.raises(DataError, match="a.json: expected finite numbers to write"):
        write_json(tmp_path / "a.json", {"AP": float("nan")})
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------- flipped bits

def test_a_flipped_bit_in_a_model_is_noticed_wherever_it_changes_a_weight(tmp_path):
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "model.pth", PoseModel(VIT_CONFIGS["tiny"]))
    before, chance = load_model(tmp_path / "model.pth").state_dict(), random.Random(0)
    whole, noticed = (tmp_path / "model.pth").read_bytes(), 0
    for _ in range(60):
        (tmp_path / "model.pth").write_bytes(whole)
        flip_a_bit(tmp_path / "model.pth", chance.randrange(8 * len(whole)))
        try:
            after = load_model(tmp_path / "model.pth").state_dict()
            # in a gap
            assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
        except WeightsError as error:
            assert "model.pth" in str(error)
            noticed += 1
    assert noticed > 50


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_it(run, copy, capsys, damaged):
    for name in ("adapt.checkpoint.pth", "adapt.checkpoint.older.pth")[:damaged]:
        flip_a_bit(copy / name, 4 * (copy / name).stat().st_size)  # in the middle
    (copy / "results.json").unlink()
    assert main(["--resume", str(copy)]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("damaged: another checksum of its record") == damaged
    assert len(list(copy.glob("adapt.*.damaged"))) == damaged  # nothing is deleted
    assert printed.err.count("going back to what was before it") == damaged
    assert f"adapt   {5 if damaged == 1 else 1:6}/6" in printed.out
    assert results_of(copy) == results_of(run / "run")


@pytest.mark.parametrize("content", ["cut", "empty", "a zip of something else"])
def test_a_file_that_is_no_checkpoint_is_renamed_and_the_one_before_it_is_taken(
        copy, capsys, content):
    path = copy / "adapt.checkpoint.pth"
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    elif content == "empty":
        path.write_bytes(b"")
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("letter.txt", "Dear reader")
    assert main(["--resume", str(copy)]) == 0
    printed = capsys.readouterr()
    assert f"{path}: expected an undamaged safetensors or PyTorch file" in printed.err
    assert printed.err.count("going back to what was before it") == 1
    assert (copy / "adapt.checkpoint.damaged").exists() and "adapt        5/6" in printed.out


def test_memory_that_runs_out_says_nothing_about_a_checkpoint(copy, monkeypatch, capsys):
    def refuse(*_, **__):
        raise MemoryError("no memory")
    monkeypatch.setattr(vlpose.zipfile, "ZipFile", refuse)
    assert main(["--resume", str(copy)]) == 2
    assert "no memory" in error_of(capsys) and not list(copy.glob("*.damaged"))


def test_a_run_that_goes_on_reads_its_checkpoint_once(copy, monkeypatch):
    read = []

    def read_file(path, plain=train.read_file):
        read.append(Path(path).name)
        return plain(path)
    monkeypatch.setattr(train, "read_file", read_file)
    assert main(["--resume", str(copy)]) == 0
    assert sorted(read) == ["adapt.checkpoint.pth", "base.checkpoint.pth"]


def changed_checkpoint(change, path):
    """A checkpoint becomes one that somebody has changed, with right checksums."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize("change, words", [
    (lambda state: state.update(step=-3), "found step -3"),
    (lambda state: state.update(step="6"), "found step '6'"),
    (lambda state: state.update(step=10 ** 6), "found step 1000000; step 6 is the last one"),
    (lambda state: state.update(history=["of another kind"]), "a checkpoint of stage adapt"),
    (lambda state: state.update(history=3), "a checkpoint of stage adapt"),
    (lambda state: state["stage"].update(name="base"), "found {'name': 'base'"),
    (lambda state: state["model"].clear(), "found another model"),
    (lambda state: state.pop("optimizer"), "found no entry 'optimizer'"),
    (lambda state: state.update(best="high"), "found best 'high'"),
    (lambda state: state.update(data=3), "found data 3"),
    (lambda state: state.update(code=["train.py"]), "found code ['train.py']")])
def test_a_checkpoint_that_does_not_belong_there_falls_back_to_the_one_before_it(
        run, copy, capsys, change, words):
    changed_checkpoint(change, copy / "adapt.checkpoint.pth")
    (copy / "results.json").unlink()
    assert main(["--resume", str(copy)]) == 0
    printed = capsys.readouterr()
    assert words in printed.err and "going back to what was before it" in printed.err
    assert "adapt        5/6" in printed.out
    assert results_of(copy) == results_of(run / "run")


def test_other_settings_of_the_optimizer_in_a_checkpoint_do_not_count(run, copy):
    def change(state):
        for group in state["optimizer"]["param_groups"]:
            group.update(weight_decay=50.0, betas=(0.1, 0.1), scale=100.0)
    for name in ("adapt.checkpoint.pth", "adapt.checkpoint.older.pth"):
        changed_checkpoint(change, copy / name)
    (copy / "adapt.checkpoint.pth").unlink()  # steps 5 and 6 come again
    assert main(["--resume", str(copy)]) == 0
    assert results_of(copy) == results_of(run / "run")


def test_a_checkpoint_that_cannot_be_read_ends_the_run_and_stays(copy, monkeypatch, capsys):
    whole = {path: path.read_bytes() for path in copy.glob("*.pth")}

    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(vlpose.zipfile, "ZipFile", refuse)
    assert main(["--resume", str(copy)]) == 2
    assert "Input/output error" in error_of(capsys)
    assert {path: path.read_bytes() for path in copy.glob("*.pth")} == whole


def test_a_run_that_goes_on_says_which_code_has_changed(copy, monkeypatch, capsys):
    edited = {"uda.py": b"edited", "data.py": b"edited"}
    monkeypatch.setattr(train, "SOURCES", train.SOURCES | edited)
    (copy / "adapt.checkpoint.pth").unlink()
    assert main(["--resume", str(copy)]) == 0
    said = capsys.readouterr().err
    assert "adapt: data.py, uda.py have changed since the last checkpoint: other numbers" in said


def test_comments_docstrings_and_blank_lines_are_no_change_of_the_code():
    def hash_of(text):
        return train.code_hash(text.encode())
    code = "SCALE = 2\n\ndef double(x):\n    return SCALE * x\n"
    explained = ('"""A module."""\nSCALE = 2  # times\n\n\ndef double(x):\n    """Twice x, é."""\n\n'
                 "    # a product\n    return (SCALE\n            * x)\n")
    assert hash_of(explained) == hash_of(code)
    for old, new in (("2", "3"), ("* x", "+ x"), ("double", "twice"), ("SCALE * x", "'2 * x'")):
        assert hash_of(code.replace(old, new, 1)) != hash_of(code), new
    for name, source in train.SOURCES.items():
        assert train.code_hash(source + b"# the end\n") == train.code_hash(source), name
        assert train.code_hash(source + b"END = 1\n") != train.code_hash(source), name


def test_a_run_does_not_go_on_with_other_content_of_a_file_that_an_option_names(
        run, cache, tmp_path, capsys):
    weights = shutil.copy(run / "run" / "model.pth", tmp_path / "weights.pth")
    more = ["--weights", str(weights)]
    assert main(command(own_cache(cache, tmp_path / "cache"), tmp_path / "run", *more)) == 0
    changed_checkpoint(lambda state: state["base"]["head.predictor.bias"].add_(1), weights)
    assert main(["--resume", str(tmp_path / "run")]) == 2
    assert f"config.json: began with other content of --weights {weights}" in error_of(capsys)
    weights.unlink()
    assert main(["--resume", str(tmp_path / "run")]) == 2
    assert f"began with --weights {weights}, which is not there now" in error_of(capsys)


@pytest.mark.parametrize("kind", [train.VLPoseOptions, train.AlignmentOptions])
def test_the_content_of_every_file_that_an_option_may_name_is_compared(kind):
    names = [entry.name for entry in fields(kind)
             if entry.metadata["argument"].get("type") is eval.path_or_name]
    assert "weights" in names and set(names) <= set(train.INPUTS)


def test_a_sentence_stays_one_where_a_file_or_a_folder_has_its_name(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "description").mkdir()
    assert main(command(cache, tmp_path / "run", "--sentences", "description")) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text("utf-8"))
    assert config["sentences"] == "description" and config["inputs"] == {}
    assert train.parse_options(["--sentences", "s.json"]).sentences == "s.json"
    (tmp_path / "s.json").write_text("{}")
    assert train.parse_options(["--sentences", "s.json"]).sentences == str(tmp_path / "s.json")


def test_a_folder_without_a_model_in_config_json_is_one_line_that_names_it(copy, tmp_path, capsys):
    config = json.loads((copy / "config.json").read_text("utf-8"))
    (tmp_path / "empty").mkdir()
    changed = config | {"weights": str(tmp_path / "empty"), "base_steps": 1650}
    (copy / "config.json").write_text(json.dumps(changed))
    assert main(["--resume", str(copy)]) == 2
    assert "config.json and what is given now: " in (said := error_of(capsys))
    assert "empty: expected the folder of a finished run" in said


@pytest.mark.parametrize("inputs", [{"wings": "abc"}, ["weights"], 3])
def test_inputs_in_config_json_that_are_none_are_one_line(copy, capsys, inputs):
    config = json.loads((copy / "config.json").read_text("utf-8"))
    (copy / "config.json").write_text(json.dumps(config | {"inputs": inputs}))
    assert main(["--resume", str(copy)]) == 2
    assert "config.json: expected the options of a run" in error_of(capsys)


def test_other_pictures_with_equal_names_and_sizes_are_other_data(cache, tmp_path):
    figures = shutil.copytree(cache / train.FIGURES, tmp_path / "figures")
    dataset = load_dataset(f"figures:{figures}#photo", "train")
    before = train.identity_of(data.Crops(dataset, (64, 64)), dataset.annotated)
    for file in dataset.files:
        content = bytearray(Path(file).read_bytes())
        content[len(content) // 2] ^= 1
        Path(file).write_bytes(content)
    after = train.identity_of(data.Crops(dataset, (64, 64)), dataset.annotated)
    assert [what for what in before if before[what] != after[what]] == ["files"]


def test_a_damaged_base_model_in_the_cache_is_trained_anew(run, cache, tmp_path, capsys):
    own = own_cache(cache, tmp_path / "cache")
    kept, = (run / "cache").glob("base-*.pth")
    shutil.copy(kept, own)
    flip_a_bit(own / kept.name, 4 * kept.stat().st_size)
    assert main(command(own, tmp_path / "run")) == 0
    assert "another checksum" in (said := capsys.readouterr().out) and "training it anew" in said
    assert results_of(tmp_path / "run") == results_of(run / "run")
    load_model(own / kept.name)  # it is whole again


def test_an_adapter_that_leaves_a_trace_when_it_is_off_is_an_error(
        cache, tmp_path, capsys, monkeypatch):
    numbers = train.TestSet.numbers

    def other_numbers(self, model, *rest):
        _, table = numbers(self, model, *rest)
        return [object()], table  # no two results are equal

    monkeypatch.setattr(train.TestSet, "numbers", other_numbers)
    assert main(command(cache, tmp_path / "run")) == 2
    assert "with its adapter off the model differs from the original" in error_of(capsys)
    assert {"results.json", "model.pth",
            "poses.png"} <= {file.name for file in (tmp_path / "run").iterdir()}


# -------------------------------------------------------------------------- a run that is not alone

def test_two_programs_never_train_in_one_folder(copy, capsys):
    def train_elsewhere():
        lock = train.locked_folder(copy)  # held as long as this name
        locked.set()
        time.sleep(60)

    fork = multiprocessing.get_context("fork")
    locked, other = fork.Event(), fork.Process(target=train_elsewhere)
    other.start()
    assert locked.wait(60)
    assert main(["--resume", str(copy)]) == 2
    assert "no other program uses it" in error_of(capsys)
    other.kill()
    other.join()
    assert main(["--resume", str(copy)]) == 0


def test_a_run_does_not_go_on_with_other_data(cache, tmp_path, capsys):
    figures = shutil.copytree(cache / train.FIGURES, tmp_path / "figures")
    spec = ["--source", f"figures:{figures}#photo", "--target", f"figures:{figures}#cartoon"]
    assert main(command(own_cache(cache, tmp_path / "cache"), tmp_path / "run", *spec)) == 0
    path = figures / "annotations" / "training_figures.json"
    contents = json.loads(path.read_text("utf-8"))
    cartoons = {image["id"] for image in contents["images"] if image["category"] == "cartoon"}
    contents["annotations"].remove(next(person for person in contents["annotations"]
                                        if person["image_id"] in cartoons))
    path.write_text(json.dumps(contents))
    assert main(["--resume", str(tmp_path / "run")]) == 2
    assert "adapt.checkpoint.pth: began with other people, labels, images of figures:" in error_of(
        capsys)


def with_one_pair(contents):
    contents["categories"][0]["flip_pairs"] = [["left_eye", "right_eye"]]


def with_other_descriptions(contents):
    for image in contents["images"]:
        image["description"] = "a portrait"


def with_two_labels_exchanged(contents):
    first, second, *_ = contents["annotations"]
    first["image_id"], second["image_id"] = second["image_id"], first["image_id"]


@pytest.mark.parametrize("change, what", [
    (with_one_pair, "sides"), (with_other_descriptions, "sentences"),
    (with_two_labels_exchanged, "images")])
def test_a_run_does_not_go_on_with_annotations_of_which_anything_has_changed(
        cache, tmp_path, capsys, change, what):
    figures = shutil.copytree(cache / train.FIGURES, tmp_path / "figures")
    argv = command(own_cache(cache, tmp_path / "cache"), tmp_path / "run", "--source",
                   f"figures:{figures}#photo", "--target", f"figures:{figures}#cartoon",
                   "--sentences", "description")
    assert main(argv) == 0
    path = figures / "annotations" / "training_figures.json"
    contents = json.loads(path.read_text("utf-8"))
    change(contents)
    path.write_text(json.dumps(contents))
    assert main(["--resume", str(tmp_path / "run")]) == 2
    assert f"checkpoint.pth: began with other {what} of figures:" in error_of(capsys)
    capsys.readouterr()
    argv[argv.index("--out") + 1] = str(tmp_path / "new")
    assert main(argv) == 0  # what a base model learns from has no sentences
    assert ("trained before" in capsys.readouterr().out) == (what == "sentences")


def test_a_checkpoint_that_knows_less_of_its_data_goes_on(run, copy):
    for path in copy.glob("*.checkpoint*.pth"):
        changed_checkpoint(lambda state: [data.pop("sides") for data in state["data"].values()],
                           path)
    assert main(["--resume", str(copy)]) == 0
    assert results_of(copy) == results_of(run / "run")


def test_a_finished_run_is_made_longer_by_more_steps(run, copy, capsys):
    assert main(["--resume", str(copy), "--steps", "9"]) == 0
    assert "adapt        9/9" in capsys.readouterr().out
    assert json.loads((copy / "config.json").read_text("utf-8"))["steps"] == 9
    assert main(["--resume", str(copy), "--steps", "8"]) == 2
    assert "has done 9 steps, more than 8" in error_of(capsys)


def test_a_run_of_so_many_steps_may_go_on_for_so_many_epochs(copy):
    options = train.parse_options(["--resume", str(copy), "--epochs", "3"])
    assert (options.steps, options.epochs) == (None, 3)


def test_a_run_that_began_on_a_gpu_may_go_on_without_bfloat16(copy):
    config = json.loads((copy / "config.json").read_text("utf-8"))
    (copy / "config.json").write_text(json.dumps(config | {"bf16": True}))
    for more, expected in (([], True), (["--no-bf16"], False)):
        assert train.parse_options(["--resume", str(copy), *more]).bf16 == expected


@pytest.mark.parametrize("more, words", [
    (["--base-lr", "0.5"], "config.json: began with --base-lr 0.002, found 0.5"),
    (["--mode", "uda"], "config.json: began with --mode vlpose, found uda"),
    (["--out", "elsewhere"], "config.json: began with --out "),
    (["--nonsense"], "unrecognized arguments: --nonsense")])
def test_what_contradicts_the_run_is_an_error(copy, capsys, more, words):
    config = json.loads((copy / "config.json").read_text("utf-8"))
    assert main(["--resume", str(copy), *more]) == 2
    assert words in error_of(capsys)
    assert json.loads((copy / "config.json").read_text("utf-8")) == config


def test_a_run_of_alignment_does_not_go_on_as_one_of_vlpose(tmp_path, capsys):
    options = train.parse_options(["--mode", "uda"])
    train.write_json(tmp_path / "config.json", vars(options) | {"processes": 1, "inputs": {}})
    assert main(["--resume", str(tmp_path), "--mode", "vlpose"]) == 2
    assert "config.json: began with --mode uda, found vlpose" in error_of(capsys)


def test_the_plan_of_a_run_that_would_go_on_can_be_printed(copy, capsys):
    before = {path: path.read_bytes() for path in copy.iterdir()}
    assert main(["--resume", str(copy), "--steps", "9", "--dry-run"]) == 0
    assert "plan: adapt: 9 steps" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in copy.iterdir()} == before


def test_no_folder_to_resume_is_an_error(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("", "nowhere"):
        assert main(["--resume", folder]) == 2
        assert "--resume wants the folder of an earlier run" in error_of(capsys)


@pytest.mark.parametrize("change, words", [
    ({"lr": -1}, "config.json and what is given now: --lr: expected a number above 0, found -1"),
    ({"select": "worst"}, "config.json and what is given now: --select: expected one of last, best,"
     " found worst"),
    ({"wings": 2}, "config.json: expected the options of a run, found --wings"),
    ({"seed": [1, 2]}, "config.json and what is given now: --seed: expected an integer from 0 "
     "to 1000000000000, found [1, 2]"),
    ({"steps": None}, "config.json and what is given now: expected --steps or --epochs, found neither"),
    ({"epochs": 3}, "config.json and what is given now: expected --steps or --epochs, found both"),
    ({"device": "abacus"}, "config.json and what is given now: --device: 'abacus' does not work")])
def test_the_values_of_config_json_pass_the_checks_of_options(copy, capsys, change, words):
    config = json.loads((copy / "config.json").read_text("utf-8"))
    (copy / "config.json").write_text(json.dumps(config | change))
    assert main(["--resume", str(copy)]) == 2
    assert words in error_of(capsys)


def test_paths_in_config_json_are_absolute(run, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "figures").symlink_to(cache / train.FIGURES)
    save_checkpoint("given.pth", PoseModel(VIT_CONFIGS["tiny"]))
    options = train.parse_options(["--target", "figures:figures#cartoon", "--weights", "given.pth",
                                   "--out", "run", "--text-weights", "ViT-B/32", "--cache",
                                   "cache"])
    assert options.target == f"figures:{tmp_path / 'figures'}#cartoon"
    assert options.weights == str(tmp_path / "given.pth")
    assert (options.out, options.cache) == (str(tmp_path / "run"), str(tmp_path / "cache"))
    assert (options.source, options.text_weights) == ("figures#natural", "ViT-B/32")


# ---------------------------------------------------------------------------------- options in vain

@pytest.mark.parametrize("kind", [
    train.VLPoseOptions, train.AlignmentOptions, eval.EvalOptions])
def test_the_conditions_of_options_name_only_options_and_values_that_there_are(kind):
    known = {eval.flag_of(entry.name): entry for entry in fields(kind)}
    for flag, entry in known.items():
        for condition in entry.metadata["only"]:
            word, other, *values = condition.split()
            assert word in ("with", "without") and other in known and other != flag, flag
            choices = known[other].metadata["argument"].get("choices", values)
            assert set(values) <= set(choices), flag


@pytest.mark.parametrize("argv, words", [
    ("--strategy full --num-prompts 5",
     "--num-prompts: has no effect; it counts only with --strategy prompt vlpose"),
    ("--weights W --base-lr 1", "--base-lr: has no effect; it counts only without --weights"),
    ("--weights W --init X", "--init: "),
    ("--strategy full --matcher image",
     "--matcher: has no effect; it counts only with --strategy vlpose"),
    ("--strategy prompt --decoder injector", "--decoder: "),
    ("--decoder baseline --matcher image", "--matcher: "), ("--strategy scratch --lr 1", "--lr: "),
    ("--select best", "--select: "), ("--strategy last --rank 4", "--rank: "),
    ("--strategy full --text-weights ViT-B/32", "--text-weights: "),
    ("--source figures --target figures", "--source figures: expected other data than --target"),
    ("--mode uda --image-level 0 --style-weights X",
     "--style-weights: has no effect; it counts only with --image"),
    ("--mode uda --style-weights X --style-steps 9", "--style-steps: "),
    ("--mode uda --feature-level 0 --steady-discriminator", "--steady-discriminator: "),
    ("--mode uda --weights W --supervised-steps 9", "--supervised-steps: "),
    ("--mode uda --per-token", "--per-token: "),
    ("--mode uda --source none --weights W --feature-level 0.1",
     "--feature-level: has no effect with --source none"),
    ("--mode uda --source none --weights W --feature-level 0.002",  # the default
     "--feature-level: has no effect with --source none"),
    ("--mode uda --source none --weights W --style-steps 9", "--style-steps: "),
    ("--mode uda --source none --weights W --steady-discriminator", "--steady-discriminator: ")])
def test_an_option_without_an_effect_is_refused(argv, words):
    with pytest.raises(DataError) as error:
        train.parse_options(argv.split())
    assert words in str(error.value)


@pytest.mark.parametrize("argv, words", [
    ("--checkpoint M --images a.jpg --compare",
     "--compare: has no effect; it counts only with --out"),
    ("--results r --annotations a --checkpoint M", "--checkpoint: "),
    ("--results r --annotations a --prompt x", "--prompt: "),
    ("--results r --annotations a --detect", "--detect: "),
    ("--checkpoint M --images a.jpg --out o --detect-score 0.5", "--detect-score: "),
    ("--checkpoint M --images a.jpg --out o --split all", "--split: "),
    ("--checkpoint M --images a.jpg --out o --json", "--json: "),
    ("--checkpoint M --images a.jpg --detect", "--detect: "),
    ("--checkpoint M --data d:x --pictures 5", "--pictures: ")])
def test_an_option_of_eval_without_an_effect_is_refused(argv, words, capsys):
    assert eval.main(argv.split()) == 2
    assert words in error_of(capsys)


@pytest.mark.parametrize("more", [["--prompt", "a cat"], ["--compare"],
                                  ["--text-weights", "random"], ["--adapter", "off"],
                                  ["--base", "vitpose-b"]])
def test_what_is_for_vlpose_is_refused_for_a_plain_model(cache, tmp_path, capsys, more):
    save_checkpoint(tmp_path / "plain.pth", PoseModel(VIT_CONFIGS["tiny"]))
    picture = next((cache / train.FIGURES / "images" / "cartoon").iterdir())
    assert eval.main(["--checkpoint", str(tmp_path / "plain.pth"), "--images", str(picture),
                      "--out", str(tmp_path / "out"), "--device", "cpu", *more]) == 2
    found = "has no adapter" if more[0] == "--compare" else "has no effect"
    assert f"{more[0]}: " in (error := error_of(capsys)) and found in error


def test_a_fully_tuned_model_is_compared_with_the_original_that_is_named(
        cache, tmp_path, monkeypatch):
    """Its file does not hold the original, which an adapter's file does."""
    for name in ("tuned", "original"):
        model = PoseModel(VIT_CONFIGS["tiny"])
        torch.nn.init.normal_(model.head.predictor.weight, std=0.3)
        save_checkpoint(tmp_path / f"{name}.pth", model)
    drawn = []
    monkeypatch.setattr(eval, "draw_pictures", lambda *arguments: drawn.append(arguments[-1]))
    picture = next((cache / train.FIGURES / "images" / "cartoon").iterdir())

    def estimate(name, *more):
        assert eval.main(["--checkpoint", str(tmp_path / f"{name}.pth"), "--images", str(picture),
                          "--out", str(tmp_path / f"out{len(drawn)}"), "--device", "cpu",
                          *more]) == 0
        return drawn[-1]

    panels = estimate("tuned", "--compare", "--base", str(tmp_path / "original.pth"))
    assert panels == {"original": estimate("original")[""], "adapted": estimate("tuned")[""]}


# ------------------------------------------------------------------------------ nothing overwritten

@pytest.mark.parametrize("name", ["results.json", "boxes.json", "config.json", "001-a.jpg"])
def test_eval_writes_into_no_folder_that_holds_anything(cache, tmp_path, capsys, name):
    save_checkpoint(tmp_path / "plain.pth", PoseModel(VIT_CONFIGS["tiny"]))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    assert eval.main(["--checkpoint", str(tmp_path / "plain.pth"), "--data",
                      f"figures:{cache / train.FIGURES}", "--out", str(tmp_path / "out"),
                      "--device", "cpu"]) == 2
    assert f"expected a new or an empty folder, found {name} in it" in error_of(capsys)
    assert (tmp_path / "out" / name).read_text("utf-8") == "mine"


@pytest.mark.parametrize("name", ["results.json", "adapt.checkpoint.pth"])
def test_training_begins_in_no_folder_that_holds_anything(cache, tmp_path, capsys, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    (tmp_path / "run" / ".hidden").write_text("a file manager's")
    assert main(command(cache, tmp_path / "run")) == 2
    assert f"run: expected a new or an empty folder, found {name} in it" in error_of(capsys)
    assert (tmp_path / "run" / name).read_text("utf-8") == "mine"


def test_a_picture_is_never_written_through_a_link(cache, tmp_path):
    dataset = load_dataset(f"figures:{cache / train.FIGURES}#photo", "train")
    options = eval.EvalOptions(out=str(tmp_path / "out"))
    result = {"image_id": int(dataset.image_ids[0]), "keypoints": [9.0, 9.0, 1.0] * 17,
              "box": [0.0, 0.0, 20.0, 20.0], "score": 1.0}
    (tmp_path / "original.jpg").write_text("mine")
    place = tmp_path / "out" / "images" / data.to_coco(dataset)["images"][0]["file_name"]
    place.parent.mkdir(parents=True)
    place.symlink_to(tmp_path / "original.jpg")  # as a program makes it that writes there, too
    with pytest.raises(DataError, match="expected no such file, found one"):
        eval.write_poses(options, dataset, [result])
    assert (tmp_path / "original.jpg").read_text("utf-8") == "mine"


def test_a_folder_with_input_is_never_drawn_into(cache, tmp_path, capsys):
    save_checkpoint(tmp_path / "plain.pth", PoseModel(VIT_CONFIGS["tiny"]))
    album = shutil.copytree(cache / train.FIGURES / "images" / "cartoon", tmp_path / "album")
    before = {file: file.read_bytes() for file in album.iterdir()}
    one = str(next(iter(before)))
    for images, out in ((one, album), (str(album / "*.jpg"), album), (one, tmp_path),
                        (str(album), album / "drawn")):
        assert eval.main(["--checkpoint", str(tmp_path / "plain.pth"), "--images", images, "--out",
                          str(out), "--device", "cpu"]) == 2
        assert "there are pictures that are input" in error_of(capsys)
    assert {file: file.read_bytes() for file in album.iterdir()} == before


# -------------------------------------------------------------------------------------- bad records

@pytest.mark.parametrize("record, words", [
    ({"bbox": "1234"}, r", image_id 1: expected 4 finite numbers in 'bbox', found '1234'"),
    ({"bbox": [1, 2, 3]}, "in 'bbox', found 3 values"),
    ({"bbox": [1, 2, 3, True and None]}, "among them None"),
    ({"bbox": [0, 0, 1e300, 5]}, "expected a 'bbox'"),
    ({"bbox": [0, 0, 2e9, 5]}, "expected a 'bbox'"),
    ({"score": "high"}, "in 'score', found 'high'"),
    ({"category_id": 1.7}, "expected one integer in 'category_id'"),
    ({"image_id": None}, "expected an 'image_id'"), ({"image_id": [1]}, "expected an 'image_id'")])
def test_a_box_of_another_kind_is_named(tmp_path, record, words):
    box = {"image_id": 1, "bbox": [1, 2, 3, 4], "score": 1} | record
    (tmp_path / "boxes.json").write_text(json.dumps([box]))
    with pytest.raises(DataError, match=f"boxes.json: box 0.*{words}"):
        read_boxes(tmp_path / "boxes.json", {1: 0})


@pytest.mark.parametrize("section, change, words", [
    ("annotations", {"keypoints": [5, 5, -7] * 17},
     "annotation id 1: expected a visibility of 0, 1 or 2 of 'nose', found -7"),
    ("annotations", {"bbox": [0, 0, 2e9, 9]},
     "annotation id 1 has a number that is not finite, or beyond a million"),
    ("annotations", {"keypoints": [1e300, 5, 2] * 17}, "keypoints"),
    ("annotations", {"id": 1.7}, "'id', found 1.7"),
    ("annotations", {"bbox": "1234"}, "in 'bbox', found '1234'"),
    ("images", {"file_name": None}, "in 'file_name'"), ("images", {"id": 1.2}, "'id', found 1.2"),
    ("images", {"id": [1, 2]}, "'id'")])
def test_an_annotation_of_another_kind_is_named(tmp_path, section, change, words):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.jpg")
    content = {"images": [{"id": 1, "file_name": "a.jpg"}],
               "categories": [{"id": 1, "name": "person"}],
               "annotations": [{"id": 1, "image_id": 1, "bbox": [0, 0, 9, 9],
                                "keypoints": [5, 5, 2] * 17}]}
    content[section][0] |= change
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(DataError) as error:
        load_dataset(f"coco:{tmp_path / 'a.json'}", "all")
    assert str(error.value).startswith(str(tmp_path / "a.json")) and words in str(error.value)


@pytest.mark.parametrize("text", ['{"images": []} and more', '{"images": ' + "9" * 5000 + "}",
                                  "[1, 2", "", "\xff"])
def test_json_that_is_none_is_named(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="latin1")
    with pytest.raises(DataError, match="a.json: expected COCO's annotations, a JSON object; "):
        load_dataset(f"coco:{tmp_path / 'a.json'}", "all")


# -------------------------------------------------------------------------------------- interrupted

@pytest.mark.parametrize("number, stage", [*zip(train.SIGNALS, ("base", "adapt", "adapt"))])
def test_a_signal_lets_the_step_end_and_the_run_goes_on_from_it(
        run, cache, tmp_path, monkeypatch, capsys, number, stage):
    def interrupted(self, at, done, *rest, plain=train.Run.after_step):
        if (at.name, done) == (stage, 3):
            os.kill(os.getpid(), number)
        plain(self, at, done, *rest)
    # nohup, say, ignores one of them
    before, folder = signal.signal(number, signal.SIG_DFL), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "after_step", interrupted)
        patch.setattr(sys, "argv", ["mine.py"])  # a script that changes what is trained
        assert main(command(own_cache(cache, tmp_path / "cache"), folder)) == 128 + number
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"stopped by {number.name}; go on with: python mine.py --resume {folder}"
    assert vlpose.read_file(folder / f"{stage}.checkpoint.pth")["step"] == 3
    assert signal.signal(number, before) == signal.SIG_DFL
    assert main(["--resume", str(folder)]) == 0
    assert f"{stage}: goes on after step 3" in capsys.readouterr().err
    assert results_of(folder) == results_of(run / "run")


@pytest.fixture
def hears_ctrl_c():
    """Ctrl-C does what it usually does, also in tests that a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) == signal.default_int_handler


@pytest.mark.parametrize("pause, step", [(0, 3), (0.6, None)])
def test_a_signal_that_comes_twice_is_one_but_a_later_one_ends_the_run_at_once(
        cache, tmp_path, monkeypatch, capsys, hears_ctrl_c, pause, step):
    def interrupted(self, at, done, *rest, plain=train.Run.after_step):
        if (at.name, done) == ("base", 3):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(pause)
        plain(self, at, done, *rest)
    monkeypatch.setattr(train.Run, "after_step", interrupted)
    own = own_cache(cache, tmp_path / "cache")
    assert main(command(own, tmp_path / "run")) == 130
    assert "stopped by SIGINT; go on with: " in capsys.readouterr().err
    checkpoint = tmp_path / "run" / "base.checkpoint.pth"
    assert checkpoint.exists() == (step is not None)
    assert step is None or vlpose.read_file(checkpoint)["step"] == step


def test_many_signals_at_once_end_a_program_with_one_line(
        run, tmp_path, monkeypatch, capsys, hears_ctrl_c):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    stopped = eval.stopped

    def slowly(*arguments):
        for _ in range(9):
            os.kill(os.getpid(), signal.SIGINT)
        return stopped(*arguments)
    monkeypatch.setattr(eval, "stopped", slowly)
    monkeypatch.setattr(eval, "write_poses", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert eval.main(["--checkpoint", str(run / "run"), "--images", str(tmp_path / "a.png"),
                      "--prompt", "none", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped by SIGINT"


def test_a_run_that_is_stopped_before_its_first_row_of_the_log_has_a_checkpoint(
        cache, tmp_path, monkeypatch):
    def interrupted(self, at, done, *rest, plain=train.Run.after_step):
        os.kill(os.getpid(), signal.SIGTERM)
        plain(self, at, done, *rest)
    monkeypatch.setattr(train.Run, "after_step", interrupted)
    own = own_cache(cache, tmp_path / "cache")
    # a row every ten steps
    assert main(command(own, tmp_path / "run", "--base-steps", "100")) == 143
    assert vlpose.read_file(tmp_path / "run" / "base.checkpoint.pth")["step"] == 1


def groups_of_children():
    return {os.getpgid(child.pid) for child in multiprocessing.active_children()}


def test_a_signal_to_the_group_of_a_run_does_not_reach_the_processes_that_cut_crops(cache):
    figures = load_dataset("figures#photo", "train", cache)
    stage = train.Stage("base", 6, 1e-3, 2, 0, False)
    batches = train.batches_of([(data.Crops(figures, (128, 96)), figures.annotated)], stage, 0, 1)
    next(batches)
    assert groups_of_children() and os.getpgrp() not in groups_of_children()
    assert len(list(batches)) == 5


def test_likewise_in_validation(run, cache, monkeypatch):
    model, groups = load_model(run / "run" / "model.pth"), set()
    figures = load_dataset("figures#photo", "train", cache)
    model.register_forward_hook(lambda *_: groups.update(groups_of_children()))
    monkeypatch.setattr(eval, "BATCH_SIZE", 1)
    eval.predict(model, figures, workers=1)
    assert groups and os.getpgrp() not in groups


@pytest.mark.parametrize("kind", ["DataError", "TypeError"])
def test_a_program_ends_after_an_error_of_a_process_that_cuts_crops(tmp_path, kind):
    program = tmp_path / "program.py"
    program.write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import data, eval
from data import DataError
from torch.utils.data import DataLoader
class Broken:
    def __len__(self): return 9
    def __getitem__(self, row): raise {kind}("this picture is broken")
if __name__ == "__main__":
    try: list(DataLoader(Broken(), **data.in_processes(2)))
    except Exception as error: sys.exit(eval.fail(error))
""")
    ended = run_program(program)
    assert ended.returncode in (1, 2) and "this picture is broken" in ended.stderr


def test_a_process_that_cuts_crops_and_was_stopped_ends_the_run_with_its_picture_and_a_remedy(
        cache, tmp_path, capsys, monkeypatch):
    def stop(image, *_):
        os.kill(os.getpid(), signal.SIGSTOP)
    monkeypatch.setattr(data, "SILENCE", 2)
    monkeypatch.setattr(ImageFile.ImageFile, "load", stop)
    files = load_dataset("figures#photo", "train", cache).files
    with pytest.raises(RuntimeError, match="timed out after 2 seconds") as error:
        list(DataLoader([data.open_image], collate_fn=lambda opened: opened[0](files[3]),
                        **data.in_processes(1)))
    worker, = multiprocessing.active_children()
    assert eval.fail(error.value) == 2
    said = error_of(capsys)
    assert f"2 seconds; process {worker.pid} was reading {files[3]}; a process that cuts crops " \
        "does not answer: was it stopped" in said
    assert not multiprocessing.active_children()


def test_a_step_that_does_not_end_after_a_signal_is_given_up(cache, tmp_path, monkeypatch):
    def hang(self, *rest):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    monkeypatch.setattr(train, "STEP_SECONDS", 1)
    monkeypatch.setattr(train.Run, "after_step", hang)
    begin = time.monotonic()
    assert main(command(own_cache(cache, tmp_path / "cache"), tmp_path / "run")) == 143
    assert time.monotonic() - begin < 50


@pytest.mark.parametrize("work", ["validate", "save"])
@pytest.mark.parametrize("moment", ["in the step", "in the work"])
def test_after_a_signal_validation_and_saving_take_as_long_as_they_want(
        cache, tmp_path, monkeypatch, work, moment):
    def interrupted(self, stage, *rest, plain=train.Run.after_step):
        if (stage.name, moment) == ("adapt", "in the step"):
            os.kill(os.getpid(), signal.SIGTERM)
        plain(self, stage, *rest)

    def slow(self, stage, *rest, plain=getattr(train.Run, work)):
        if stage.name == "adapt":
            if moment == "in the work":
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.2)
        return plain(self, stage, *rest)
    monkeypatch.setattr(train, "STEP_SECONDS", 1)
    monkeypatch.setattr(train.Run, "after_step", interrupted)
    monkeypatch.setattr(train.Run, work, slow)
    own = own_cache(cache, tmp_path / "cache")
    more = ["--base-steps", "2", "--steps", "1", "--validate-every", "1"]
    assert main(command(own, tmp_path / "run", *more)) == 143
    assert vlpose.read_file(tmp_path / "run" / "adapt.checkpoint.pth")["step"] == 1


@pytest.mark.parametrize("patience", [1, 12, train.VLPoseOptions.patience])
def test_the_process_after_a_stopped_one_names_it_and_ends_the_program(
        monkeypatch, capfd, patience):
    beats = {"beats of 0": 7, "beats of 1": 5}
    class Store:
        def __init__(self, *_, **__): pass

        def add(self, key, count):
            beats[key] += count
            return beats[key]

    def end(status):
        raise SystemExit(status)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(data.dist, "TCPStore", Store)
    monkeypatch.setattr(data.time, "sleep", lambda _: None)
    monkeypatch.setattr(data.os, "_exit", end)
    with pytest.raises(SystemExit):
        data.watch_next(0, 2, patience)
    *said, last = capfd.readouterr().err.splitlines()
    assert said == [f"process 1 has not answered for {minutes} minutes"
                    for minutes in range(5, patience, 5)]
    assert last == (f"error: process 1 has not answered for {patience} minutes; --patience waits "
                    "longer")


def test_rank_left_in_the_environment_makes_no_program_silent(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "abc")
    assert main(["--lr", "x"]) == 2
    assert "--lr" in error_of(capsys)


def test_local_rank_alone_in_the_environment_is_one_line(cache, tmp_path, monkeypatch, capfd):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(command(cache, tmp_path / "run")) == 2
    assert "environment variable RANK expected" in error_of(capfd)


@pytest.mark.parametrize("read", [
    lambda file: read_boxes(file, {1: 0}),
    lambda file: train.resumed(file.parent, []),
    lambda file: vlpose.read_file(file),
    lambda file: data.locked(file)])
def test_a_pipe_is_refused_where_a_file_is_expected(tmp_path, read):
    os.mkfifo(tmp_path / "config.json")  # reading from it would wait for ever
    with pytest.raises(DataError, match="config.json: expected a file, found a folder, a pipe"):
        read(tmp_path / "config.json")


def test_a_signal_that_nohup_ignores_stays_ignored(run, copy):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train.Run(train.parse_options(["--resume", str(copy)]), None, {}, vlpose.PoseModel(VIT_CONFIGS["tiny"]))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN != signal.getsignal(signal.SIGTERM)
    finally:
        for number in train.SIGNALS:
            signal.signal(number, signal.default_int_handler
                          if number == signal.SIGINT else signal.SIG_DFL)
        signal.signal(signal.SIGHUP, before)


def test_a_run_that_is_killed_after_its_base_keeps_the_bases_learning_curve(run, copy):
    for checkpoint in copy.glob("adapt.checkpoint*"):
        checkpoint.unlink()
    (copy / "results.json").unlink()
    assert main(["--resume", str(copy)]) == 0
    assert (copy / "log.csv").read_text("utf-8") == (run / "run" / "log.csv").read_text("utf-8")


def test_a_run_of_a_gpu_goes_on_where_there_is_none(run, copy):
    config = json.loads((copy / "config.json").read_text("utf-8"))
    (copy / "config.json").write_text(json.dumps(config | {"device": "cuda"}))
    assert main(["--resume", str(copy), "--device", "cpu"]) == 0
    assert json.loads((copy / "config.json").read_text("utf-8"))["device"] == "cpu"


def test_a_run_that_lacked_memory_goes_on_with_checkpointing(copy):
    assert main(["--resume", str(copy), "--checkpointing"]) == 0


@pytest.mark.parametrize("of_torchrun, processes", [(True, 1), (True, 2), (False, 2)])
def test_going_on_with_another_number_of_processes_is_said(
        copy, monkeypatch, capsys, of_torchrun, processes):
    monkeypatch.setenv("WORLD_SIZE", str(processes))  # as torchrun sets it, or left by a cluster
    if of_torchrun:
        monkeypatch.setenv("LOCAL_RANK", "0")
    train.parse_options(["--resume", str(copy)])
    said = "goes on with another number of processes, 2" in capsys.readouterr().out
    assert said == (of_torchrun and processes == 2)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_torchrun_has_left_in_the_environment_does_not_hang_a_program(
        cache, tmp_path, monkeypatch, capfd, rank):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    left = {"LOCAL_RANK": "0", "RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port)}
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(data, "timedelta", lambda minutes=0, days=0: timedelta(seconds=1))
    assert main(command(cache, tmp_path / "run")) == 2
    said = error_of(capfd)
    assert "the processes of torchrun have not met: " in said and "`unset LOCAL_RANK`" in said


def test_a_program_can_be_started_by_a_link_to_it(tmp_path):
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    ended = run_program(tmp_path / "train.py", "--help")
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_an_image_is_found_whichever_way_its_accents_are_spelled(tmp_path, forms):
    named, stored = (unicodedata.normalize(form, "Zoë/José.jpg") for form in forms)
    (tmp_path / stored).parent.mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / stored)
    content = {"images": [{"id": 1, "file_name": named}],
               "categories": [{"id": 1, "name": "person"}],
               "annotations": [{"id": 1, "image_id": 1, "bbox": [0, 0, 9, 9],
                                "keypoints": [5, 5, 2] * 17}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    dataset = load_dataset(f"coco:{tmp_path / 'a.json'}", "all")
    assert named != stored and os.path.samefile(dataset.files[0], tmp_path / stored)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="changes the user")
def test_a_folder_of_another_user_is_an_error_that_names_the_option(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o700)
    program = tmp_path / "program.py"
    program.write_text(f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
import data, train
os.chdir({str(tmp_path / 'closed')!r})
os.setuid(65534)
from eval import fail
for make in (lambda: train.new_folder("vlpose"), lambda: data.draw_figures("cache")):
    try: make()
    except Exception as error: fail(error)
""")
    ended = run_program(program)
    said = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 2 and "--out names another folder" in said[0]
    assert "--cache or POSEBRIDGE_HOME name another folder" in said[1]


def test_a_training_may_run_in_a_thread(run, cache, tmp_path):
    ended = []
    argv = command(own_cache(cache, tmp_path / "cache"), tmp_path / "run")
    thread = threading.Thread(target=lambda: ended.append(main(argv)))
    thread.start()
    thread.join()
    assert ended == [0] and results_of(tmp_path / "run") == results_of(run / "run")


def test_a_seed_that_no_generator_takes_is_refused(capsys):
    assert main(["--seed", str(10 ** 12 + 1)]) == 2
    assert "--seed: expected an integer from 0 to 1000000000000" in error_of(capsys)
    data.seed_step(10 ** 12 * 10 ** 6 + 10 ** 6)


def test_a_base_that_was_computed_in_parts_is_not_taken_for_one_that_was_not(cache, tmp_path):
    own = own_cache(cache, tmp_path / "cache")
    for parts in ("1", "2", "1"):
        assert main(uda_command(own, tmp_path / f"run-{len(list(tmp_path.iterdir()))}",
                                "--image-level", "0", "--accumulate", parts,
                                "--supervised-steps", "1", "--steps", "1")) == 0
    assert len(list(own.glob("source-*.pth"))) == 2


def test_vlpose_without_a_source_is_refused_in_one_line(cache, capsys):
    assert main(["--mode", "vlpose", "--weights", "vitpose-b", "--source", "none", "--cache",
                 str(cache)]) == 2
    assert error_of(capsys).startswith("error: unknown data set 'none'")


def test_ctrl_c_ends_an_estimation_in_one_line(
        run, tmp_path, monkeypatch, capsys, hears_ctrl_c):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    monkeypatch.setattr(eval, "write_poses", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert eval.main(["--checkpoint", str(run / "run"), "--images", str(tmp_path / "a.png"),
                      "--prompt", "none", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped by SIGINT"


def test_a_checkpoint_is_written_every_few_minutes_whatever_the_step(cache, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(train.Run, "save", lambda self, stage, done, *rest, plain=train.Run.save: (
        steps.append(done), plain(self, stage, done, *rest)))
    assert main(command(cache, tmp_path / "run")) == 0
    assert steps[-6:] == [1, 2, 3, 4, 5, 6]


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True,
                           text=True).stdout.split()
    return [int(child) for child in found]


def alive(pid):
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text("utf-8").rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks into /proc")
def test_nobody_goes_on_drawing_for_a_program_that_was_killed(tmp_path):
    script = tmp_path / "draw.py"
    script.write_text(f"""import sys
sys.path.insert(0, {str(ROOT)!r})
from data import draw_figures
if __name__ == "__main__":
    draw_figures({str(tmp_path)!r}, {{"train": (2000, 0), "val": (0, 0)}})
""")
    parent, _ = start_program(tmp_path, [str(script)])
    while not (workers := children(parent.pid)) or not list(tmp_path.rglob("*.jpg")):
        time.sleep(0.1)
    parent.kill()
    parent.join()
    end = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < end:
        time.sleep(0.2)
    assert not any(map(alive, workers)) and len(list(tmp_path.rglob("*.jpg"))) < 2000


def test_a_killed_programs_draft_goes_and_a_living_ones_stays(tmp_path):
    path = tmp_path / "[a].json"

    def write():
        with written_whole(path):
            begun.set()
            time.sleep(60)

    fork = multiprocessing.get_context("fork")
    writers = []
    for _ in range(2):
        begun = fork.Event()
        writers.append(fork.Process(target=write))
        writers[-1].start()
        assert begun.wait(60)
    drafts = set(tmp_path.iterdir())
    assert len(drafts) == 2
    for draft in drafts:
        os.utime(draft, (0, 0))  # as after a clock's jump
    others = {tmp_path / "thesis.draft", tmp_path / "a.json.abcdefgh.draft"}
    for other in others:
        other.mkdir()

    write_json(path, {})
    assert set(tmp_path.iterdir()) == {path} | drafts | others
    writers[0].kill()
    writers[0].join()
    write_json(path, {})
    assert len(drafts & set(tmp_path.iterdir())) == 1
    writers[1].kill()
    writers[1].join()
    write_json(path, {})  # nothing of anybody else's is touched
    assert set(tmp_path.iterdir()) == {path} | others


def test_a_killed_worker_is_one_line_with_the_remedy(cache, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Passes, "__getitem__",
                        lambda self, position: os.kill(os.getpid(), signal.SIGKILL))
    assert main(command(own_cache(cache, tmp_path / "cache"), tmp_path / "run", "--workers",
                        "1")) == 2
    assert "fewer --workers" in (said := error_of(capsys)) and "DataLoader worker" in said


def test_memory_that_runs_out_is_one_line_with_the_remedy(cache, tmp_path, capsys, monkeypatch):
    def hungry(*arguments, **more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee "
                                     "documentation")
    monkeypatch.setattr(train, "heatmap_loss", hungry)
    assert main(command(own_cache(cache, tmp_path / "cache"), tmp_path / "run")) == 2
    assert "--accumulate and --checkpointing save memory" in (said := error_of(capsys))
    assert "See documentation" not in said


# ------------------------------------------------------------------------------------------ no room

def test_a_disk_that_is_full_is_one_line_and_leaves_no_part(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a file may not be larger
    try:
        with pytest.raises(DataError, match=r"model.pth: cannot be written: .*; [\d,]+ MB are free "
                           r"there$"):
            save_checkpoint(tmp_path / "model.pth", PoseModel(VIT_CONFIGS["tiny"]))
        with pytest.raises(DataError, match="a.json: cannot be written: File too large; "):
            write_json(tmp_path / "a.json", [1.5] * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_run_for_whose_checkpoints_there_is_no_room_does_not_begin(
        tiny, cache, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "free_space", lambda folder: 5_000_000)
    assert main(command(own_cache(cache, tmp_path / "cache"), tmp_path / "run")) == 2
    assert "MB for checkpoints and models, found 5 free" in error_of(capsys)


def test_a_cache_that_cannot_be_written_is_a_warning(cache, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    figures = f"figures:{cache / train.FIGURES}"
    assert main(command(tmp_path / "file" / "cache", tmp_path / "run", "--source",
                        f"{figures}#photo", "--target", f"{figures}#cartoon")) == 0
    assert "it is not kept for other runs" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named_with_the_reason(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(DataError, match=r"a.txt: cannot be written: Not a directory; [\d,]+ MB are "
                       r"free there"):
        with written_whole(tmp_path / "file" / "run" / "a.txt"):
            pass


# ---------------------------------------------------------------------------------- rotten pictures

class Rotten:
    """Crops of which some cannot be read."""

    def __init__(self, bad):
        self.bad, self.dataset = bad, type("Set", (), {"files": range(300)})

    def __getitem__(self, key):
        if key[0] in self.bad:
            raise DataError(f"{key[0]}.jpg: not a readable image")
        return {"row": key[0], "key": key}


def test_a_picture_that_cannot_be_read_is_replaced_by_the_next_of_its_pass():
    passes, good = Passes(Rotten({3, 4}), np.arange(10), 0), Passes(Rotten({}), np.arange(10), 0)
    for position in range(40):
        crop, place = passes[position], position
        while good[place]["row"] in (3, 4):
            place += 1
        assert crop["key"] == good[place]["key"] and bool(crop["unread"]) == (place > position)
    with pytest.raises(DataError, match="jpg: not a readable image"):
        Passes(Rotten(range(10)), np.arange(10), 0)[0]


def test_unreadable_pictures_are_named_once_and_more_than_one_of_a_hundred_end_the_run(capsys):
    batches = [{"unread": ["", "a.jpg: bad"]}, {"unread": ["a.jpg: bad", "b.jpg: bad"]},
               {"unread": ["c.jpg: bad", ""]}]
    assert list(count_unread(batches, Rotten(()).dataset)) == [{}, {}, {}]  # 3 of 300
    said = [f"{name}.jpg: bad; the next one is taken" for name in "abc"]
    assert capsys.readouterr().err.splitlines() == said
    with pytest.raises(DataError, match="d.jpg: bad; with it more than 1 % of the 300 pictures"):
        list(count_unread([{"unread": [f"{name}.jpg: bad" for name in "abcd"]}],
                          Rotten(()).dataset))


@pytest.mark.parametrize("make, split", [(command, "val"), (uda_command, "val")])
def test_pictures_to_test_on_are_read_before_anything_is_trained(
        cache, tmp_path, capsys, make, split):
    figures = shutil.copytree(cache / train.FIGURES, tmp_path / "figures")
    broken = sorted((figures / "images" / "photo").glob(f"{split}_*"))[:2]
    for file in broken:
        file.write_bytes(file.read_bytes()[:1500])
    spec = ["--source", f"figures:{figures}#cartoon", "--target", f"figures:{figures}#photo"]
    assert main(make(cache, tmp_path / "run", *spec)) == 2
    said = capsys.readouterr().err
    assert all(f"{file}: not a readable image" in said for file in broken)
    assert "2 of the pictures to test on cannot be read" in said
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------- limits

@pytest.mark.filterwarnings("ignore:Image size")
def test_pictures_of_more_than_a_hundred_million_pixels_are_only_read_when_asked_for(
        tmp_path, monkeypatch):
    Image.new("1", (10_001, 10_000)).save(tmp_path / "large.png")
    problem, = unreadable([tmp_path / "large.png"]).values()
    assert "10001×10000 pixels; `eval.py --large` reads more than 100 million" in problem
    # twice as many, and Pillow does not even open it
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10 ** 7)
    problem, = unreadable([tmp_path / "large.png"]).values()
    assert "could be decompression bomb DOS attack.; `eval.py --large` reads it" in problem
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert data.picture_size(tmp_path / "large.png") == (10_001, 10_000)


@pytest.mark.parametrize("limit, read", [(None, True), (10 ** 4, False)])
def test_a_process_that_is_not_forked_reads_pictures_as_large_as_the_first_one_does(
        tmp_path, monkeypatch, limit, read):
    Image.new("RGB", (200, 200)).save(tmp_path / "a.png")
    pictures = data.read_pictures([tmp_path / "a.png"])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # 200×200 is more than twice 10,000
    monkeypatch.setattr(eval, "DataLoader", partial(DataLoader, multiprocessing_context=SERVER))
    model = PoseModel(VIT_CONFIGS["tiny"])
    with nullcontext() if read else pytest.raises(DataError, match="decompression bomb"):
        assert len(eval.predict(model, pictures, people=[0], workers=1)) == 1
    eval.kill_workers()  # Python would wait five seconds for the one that has failed


def test_a_huge_picture_is_drawn_smaller_and_its_poses_are_where_they_were(tmp_path):
    save_checkpoint(tmp_path / "plain.pth", PoseModel(VIT_CONFIGS["tiny"]))
    Image.new("RGB", (8192, 64), "white").save(tmp_path / "wide.jpg")
    assert eval.main(["--checkpoint", str(tmp_path / "plain.pth"), "--images",
                      str(tmp_path / "wide.jpg"), "--out", str(tmp_path / "out"), "--device", "cpu",
                      "--threshold", "0"]) == 0
    with Image.open(tmp_path / "out" / "001-wide.jpg") as drawing:
        assert drawing.size == (4096, 32)


@pytest.mark.parametrize("change", [
    {"depth": 20_000}, {"dim": 10 ** 9}, {"decoder_dim": 10 ** 9},
    {"image_size": (10 ** 7, 10 ** 7)}, {"trunk": "swin_b"}])
def test_a_model_file_gets_no_more_memory_than_its_tensors_need(tmp_path, change):
    save_checkpoint(tmp_path / "model.pth", VLPose(PoseModel(VIT_CONFIGS["tiny"]), 8))
    contents = torch.load(tmp_path / "model.pth")
    contents["config"] |= change
    torch.save(contents, tmp_path / "model.pth")
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(WeightsError, match="model.pth: "):
        load_model(tmp_path / "model.pth")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("box", [(0, 0, 1e300, 5), (0, 0, 2e9, 5), (0, 0, float("nan"), 5),
                                 (0, 0, 0, 5)])
def test_a_box_beyond_a_million_pixels_is_an_error(box):
    with pytest.raises(DataError, match="boxes: expected a width and a height above 0, at most a "
                       "million"):
        eval.estimate_poses(PoseModel(VIT_CONFIGS["tiny"]), Image.new("RGB", (64, 64)), [box])


# ------------------------------------------------------------------------------ seen while training

def test_a_stage_is_validated_once_and_each_loss_of_the_alignment_is_logged(
        cache, tmp_path, capsys):
    assert main(uda_command(cache, tmp_path / "run", "--steps", "101", "--batch-size", "1",
                            "--optimizer", "adamw")) == 0
    header, *rows = (line.split(",")
                     for line in (tmp_path / "run" / "log.csv").read_text("utf-8").splitlines())
    table = [dict(zip(header, row)) for row in rows]
    assert header == ["stage", "step", "loss", "pck", "validation", "content", "style",
                      "supervised", "consistency", "feature_level", "pose_level"]
    assert [row["step"] for row in table if row["validation"] != "nan"] == ["100"]
    for row in table:
        parts = {"style": ("content", "style"),
                 "adapt": ("supervised", "consistency", "feature_level", "pose_level")}
        if row["stage"] in parts:
            total = sum(float(row[part]) for part in parts[row["stage"]])
            assert float(row["loss"]) == pytest.approx(total, rel=1e-5)
    printed = capsys.readouterr().out
    assert "validation" in printed and not any("nan" in line for line in printed.splitlines())


def test_a_training_set_smaller_than_a_batch_is_said(cache, tmp_path, capsys):
    assert main(command(cache, tmp_path / "run", "--batch-size", "8")) == 0
    said = "6 people in 6 images to train on; fewer than a batch of 8 has"
    assert said in capsys.readouterr().out


class Full(io.StringIO):
    """A stream that takes so many lines, as the pipe to `head` does."""

    def __init__(self, lines):
        super().__init__()
        self.lines = lines

    def write(self, text):
        if self.getvalue().count("\n") >= self.lines:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return super().write(text)


@pytest.mark.parametrize("lines_out, lines_err", [(1, 99), (99, 0), (0, 0)])
def test_a_training_needs_neither_its_output_nor_its_errors(
        run, cache, tmp_path, monkeypatch, lines_out, lines_err):
    out, err = Full(lines_out), Full(lines_err)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(command(own_cache(cache, tmp_path / "cache"), tmp_path / "run")) == 0
    lost = "the standard output cannot be written: Broken pipe; the program goes on without it"
    assert err.getvalue().count(lost) == (1 if lines_err else 0)
    assert (sys.stdout, sys.stderr) == (out, err)  # as it was before
    for name in ("log.csv", "results.json"):
        assert (tmp_path / "run" / name).read_bytes() == (run / "run" / name).read_bytes()


def test_a_broken_standard_error_is_said_once_on_the_standard_output(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", Full(0))
    with eval.as_program(output_is_needed=False):
        for _ in range(3):
            print("a warning", file=sys.stderr)
    assert capsys.readouterr().out == ("the standard error cannot be written: Broken pipe; the "
                                       "program goes on without it\n")


def numbers_command(folder, domain="photo"):
    """The options of eval.py for a picture with a person, who is found exactly."""
    pose = [5, 5, 2, 9, 9, 2] + [7, 8, 2] * 15
    person = {"id": 1, "image_id": 1, "category_id": 1, "keypoints": pose, "num_keypoints": 17,
              "bbox": [0, 0, 9, 9], "area": 81, "iscrowd": 0}
    content = {"images": [{"id": 1, "file_name": "a.jpg", "category": domain}],
               "categories": [{"id": 1, "name": "person"}], "annotations": [person]}
    found = [{"image_id": 1, "category_id": 1, "keypoints": pose, "score": 1}]
    (folder / "a.json").write_text(json.dumps(content))
    (folder / "r.json").write_text(json.dumps(found))
    return ["--results", str(folder / "r.json"), "--annotations", str(folder / "a.json"),
            "--details"]


def test_numbers_that_cannot_be_printed_are_an_error_in_one_line(tmp_path, monkeypatch, capsys):
    argv = numbers_command(tmp_path)
    monkeypatch.setattr(sys, "stdout", Full(0))
    assert eval.main(argv) == 2
    assert error_of(capsys) == "error: the standard output cannot be written: Broken pipe"


def test_numbers_do_not_need_the_errors_and_stay_alone_in_the_output(
        tmp_path, monkeypatch, capsys):
    argv = numbers_command(tmp_path)
    data.report.cache_clear()
    monkeypatch.setattr(sys, "stderr", Full(0))
    assert eval.main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["AP"] == pytest.approx(1)


def redirect(name, number, to):
    """Leads a standard stream elsewhere, as a shell does before a program begins."""
    if to is None:
        os.close(number)
        setattr(sys, name, None)  # so Python begins without a stream
        return
    if to == "a pipe that nobody reads":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(to, os.O_WRONLY | os.O_CREAT)
    os.dup2(writer, number)
    setattr(sys, name, open(number, "w", closefd=False))


def run_with_streams(words, stdout, stderr):
    """Plays `python WORDS` with other standard streams, and ends as Python does."""
    redirect("stdout", 1, stdout)
    redirect("stderr", 2, stderr)
    try:
        run_script(words)
    except SystemExit as end:
        gc.freeze()  # the end need not look at all that the server has imported
        ctypes.pythonapi.Py_Exit(end.code)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("script, stdout, stderr, status", [
    ("train.py", "/dev/full", "said.txt", 0), ("train.py", None, None, 0),
    ("train.py", "a pipe that nobody reads", None, 0), ("eval.py", "/dev/full", "said.txt", 2),
    ("eval.py", None, "said.txt", 2), ("eval.py", "said.txt", None, 0)])
def test_a_programs_status_is_that_of_its_work(
        tmp_path, monkeypatch, script, stdout, stderr, status):
    """Python's own flush at exit would make it 120."""
    monkeypatch.chdir(tmp_path)
    words = [str(ROOT / script), *(numbers_command(tmp_path) if script == "eval.py" else ["--help"])]
    program = SERVER.Process(target=run_with_streams, args=(words, stdout, stderr))
    program.start()
    program.join(timeout=60)
    assert program.exitcode == status
    said = Path("said.txt").read_text("utf-8") if "said.txt" in (stdout, stderr) else ""
    assert "Traceback" not in said and "Exception ignored" not in said


EVIL = "night\n\x1b[2J\udce9" + "x" * 3000


def test_names_are_printed_escaped_and_cut_and_stay_data(tmp_path, capsys):
    assert eval.main(numbers_command(tmp_path, EVIL)) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith(r"night\n\x1b[2J\udce9xxx") and row.split()[1] == "1.000"
    _, domains = eval.evaluate_domains(tmp_path / "a.json", tmp_path / "r.json")
    assert list(domains) == [EVIL]


def test_an_error_or_a_report_never_prints_raw_control_characters(tmp_path, capsys):
    with pytest.raises(DataError) as error:
        read_boxes(tmp_path / EVIL[:12], {})
    assert str(error.value).startswith(str(tmp_path / r"night\n\x1b[2J")[:-1])
    assert len(str(DataError(EVIL))) < 520 and str(DataError(EVIL)).isprintable()
    data.report(EVIL)
    assert eval.fail(DataError(EVIL)) == 2 and eval.fail(OSError(EVIL)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.isprintable() and len(line) < 520 for line in lines)


def test_whatever_a_program_prints_has_no_raw_control_characters(capsys):
    with eval.as_program(output_is_needed=False):
        print("a\x1b[31m.jpg\nb\x9b.jpg")
    assert capsys.readouterr().out == "a\\x1b[31m.jpg\nb\\x9b.jpg\n"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"images": [], "annotations": [{"id": 1, "area": '
                                  + "[" * 900 + "]" * 900 + "}]}",
                                  '{"images": [{"id": ' + "9" * 4000 + ', "file_name": 3}]}',
                                  '{"images": ' + "9" * 5000 + "}"])
def test_deep_json_and_enormous_integers_are_one_short_line(tmp_path, capsys, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError) as error:
        load_dataset(f"coco:{tmp_path / 'a.json'}", "all")
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_a_user_without_a_home_folder_has_a_cache_in_the_temporary_folder(
        tmp_path, monkeypatch, capsys):
    def no_home():
        raise RuntimeError("Could not determine home directory.")
    monkeypatch.delenv("POSEBRIDGE_HOME", raising=False)
    monkeypatch.setattr(data.Path, "home", no_home)
    monkeypatch.setattr(data.tempfile, "gettempdir", lambda: str(tmp_path))
    data.report.cache_clear()
    assert data.cache_folder() == data.cache_folder() == tmp_path / "posebridge"
    assert capsys.readouterr().err.count("there is no home folder") == 1


def test_a_folder_that_cannot_be_written_is_an_error_that_names_the_option(
        cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("no folder")
    argv = command(cache, "nowhere")
    place = argv.index("--out")
    assert main(argv[:place] + argv[place + 2:]) == 2
    assert "--out names another folder" in error_of(capsys)
    assert main(command(tmp_path / "runs" / "cache", tmp_path / "run")) == 2
    assert "--cache or POSEBRIDGE_HOME name another folder" in error_of(capsys)


@pytest.mark.parametrize("make, stage, step, more", [
    (command, "base", 2, []), (command, "adapt", 2, []), (command, "base", 4, []),
    (command, "adapt", 2, ["--validate-every", "1"]),                       # in a validation
    (command, "adapt", 2, ["--validate-every", "1", "--select", "best", "--workers", "1"]),
    (command, "adapt", 6, []), (uda_command, "adapt", 4, [])])              # in the last tables
def test_pictures_that_vanish_end_the_run_with_a_line_that_says_how_to_go_on(
        cache, tmp_path, monkeypatch, capsys, make, stage, step, more):
    def remove(self, at, done, *rest, plain=train.Run.after_step):
        if (at.name, done) == (stage, step):
            shutil.rmtree(tmp_path / "cache")
        plain(self, at, done, *rest)
    monkeypatch.setattr(train.Run, "after_step", remove)
    own = tmp_path / "cache"
    shutil.copytree(cache / train.FIGURES, own / train.FIGURES)
    assert main(make(own, tmp_path / "run", *more)) == 2
    said = error_of(capsys)
    assert ".jpg: " in said and said.count("--resume goes on from the last checkpoint") == 1


def test_a_runs_folder_that_is_removed_is_made_anew_and_can_go_on(
        run, cache, tmp_path, monkeypatch, capsys):
    def remove(self, at, done, *rest, plain=train.Run.after_step):
        if (at.name, done) == ("adapt", 2):
            shutil.rmtree(self.folder)
        plain(self, at, done, *rest)
    own = own_cache(cache, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "after_step", remove)
        assert main(command(own, tmp_path / "run")) == 0
    assert "config.json was removed; it is written anew" in capsys.readouterr().err
    assert results_of(tmp_path / "run") == results_of(run / "run")
    assert main(["--resume", str(tmp_path / "run"), "--steps", "7"]) == 0


def test_a_foreign_config_json_does_not_choose_where_the_cache_is_written(
        run, copy, tmp_path, monkeypatch, capsys):
    config = json.loads((copy / "config.json").read_text("utf-8"))
    assert train.parse_options(["--resume", str(copy)]).cache == config["cache"]  # has figures
    config["cache"] = str(tmp_path / "elsewhere")
    (copy / "config.json").write_text(json.dumps(config))
    mine = train.defaults_of("vlpose", "minutes").cache
    assert train.parse_options(["--resume", str(copy)]).cache == mine
    assert f"elsewhere holds no figures; {mine} is taken instead" in capsys.readouterr().err
    given = train.parse_options(["--resume", str(copy), "--cache", str(run / "cache")])
    assert given.cache == str(run / "cache")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_runs_folder_exists_leaves_nothing_and_says_one_line(
        tmp_path, capsys, monkeypatch, number):
    def stop(*_):
        os.kill(os.getpid(), number)
        yield
    before = signal.signal(number, signal.SIG_DFL)
    monkeypatch.setattr(data, "progress", stop)
    assert main(command(tmp_path / "cache", tmp_path / "run")) == 128 + number
    assert capsys.readouterr().err.splitlines()[-1] == f"stopped by {number.name}"
    assert list((tmp_path / "cache").iterdir()) == [] and not (tmp_path / "run").exists()
    assert signal.signal(number, before) == signal.SIG_DFL


def test_strict_refuses_other_code_and_sentences_that_are_too_long(
        cache, copy, tmp_path, monkeypatch, capsys):
    assert main(command(cache, tmp_path / "new", "--strict", "--sentences", "word " * 90)) == 2
    assert "expected a sentence of at most 77 tokens" in error_of(capsys)
    monkeypatch.setattr(train, "SOURCES", train.SOURCES | {"uda.py": b"edited"})
    (copy / "results.json").unlink()
    assert main(["--resume", str(copy), "--strict"]) == 2
    assert "base: uda.py has changed since the last checkpoint; without --strict" in error_of(
        capsys)
    assert not (copy / "results.json").exists()
    assert main(["--resume", str(copy)]) == 0


def test_the_first_stage_looks_for_room_for_the_whole_run(cache, tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(train.Checkpoints, "check_space",
                        lambda self, model, later: asked.append((self.stage.name, later)))
    assert main(command(own_cache(cache, tmp_path / "cache"), tmp_path / "run")) == 0
    size = sum(tensor.nbytes for tensor in load_model(
        tmp_path / "run" / "model.pth").base.state_dict().values())
    assert asked == [("base", 3 * size), ("adapt", size)]


@pytest.mark.parametrize("words", [
    "[/src/gloo/gloo/transport/tcp/pair.cc:545] Read error [::1]:11170: Connection reset by peer.",
    "NCCL error in: /src/NCCLUtils.cpp:77\nncclRemoteError: A call failed possibly due to a remote "
    "process exiting prematurely."])
def test_a_process_whose_partner_was_killed_ends_with_one_line(capsys, words):
    assert eval.fail(RuntimeError(words)) == 2
    assert "another process of torchrun has ended" in error_of(capsys)


def test_too_few_file_handles_are_one_line_with_the_remedy(capsys):
    assert eval.fail(OSError(errno.EMFILE, "Too many open files", "a.jpg")) == 2
    assert "`ulimit -n 4096` allows more" in error_of(capsys)


class HalfBuilt:
    """An object of torch whose end fails because its beginning has failed."""

    def __del__(self):
        raise AttributeError("_workers_status")


def test_nothing_follows_the_line_of_an_error(cache, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        half = HalfBuilt()  # noqa: F841
        raise OSError(errno.EMFILE, "Too many open files")
    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    monkeypatch.setattr(train, "batches_of", refuse)
    assert main(command(own_cache(cache, tmp_path / "cache"), tmp_path / "run")) == 2
    assert "`ulimit -n 4096` allows more" in error_of(capsys)
    assert said == [] and sys.unraisablehook == said.append


@pytest.mark.parametrize("box, outside", [
    ((5000, 5000, 9, 9), True), ((-20, 5, 20, 9), True), ((5, 64, 9, 9), True),
    ((-20, -20, 22, 22), False), ((63, 63, 900, 900), False)])
def test_boxes_outside_their_pictures_are_counted(run, tmp_path, capsys, box, outside):
    (tmp_path / "album").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "album" / "a.png")
    boxes = [{"image_id": "a.png", "bbox": list(box), "score": 1, "category_id": 1}] * 2
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    (tmp_path / "album" / "boxes.json").write_text(json.dumps(boxes))
    load_dataset(f"pictures:{tmp_path / 'album'}", "all")
    assert eval.main(["--checkpoint", str(run / "run"), "--images", str(tmp_path / "album"),
                      "--boxes", str(tmp_path / "boxes.json"), "--prompt", "none", "--out",
                      str(tmp_path / "out"), "--device", "cpu"]) == 0
    said = capsys.readouterr().err
    assert said.count("boxes.json: 2 of 2 boxes lie outside their pictures") == 2 * outside


def test_an_error_is_one_line_of_readable_length_that_names_the_file(capsys):
    worker = ("Caught DataError in DataLoader worker process 0.\n"
              "Original Traceback (most recent call last):\n  File\n"
              "data.DataError: a.jpg: not a readable image\n\n"
              "During handling of the above exception, another\nmore\n")
    assert eval.fail(DataError(worker)) == 2
    assert error_of(capsys) == "error: a.jpg: not a readable image"
    assert eval.fail(DataError("long " * 1000)) == 2
    assert len(error_of(capsys)) < 520
    with pytest.raises(ZeroDivisionError):
        eval.fail(ZeroDivisionError("a bug"))


@pytest.mark.parametrize("program, name, verdict", [
    ("import time; time.sleep(60)", "a.json", "HANGS"),
    ("print('error: a.json: a pipe'); raise SystemExit(2)", "a.json", "right"),
    ("print('error: b.json: a pipe'); raise SystemExit(2)", "a.json", "OTHER"),
    ("print('error: a.json: a pipe'); raise OSError('a.json')", "a.json", "OTHER"),
    ("raise SystemExit(2)", None, "ENDS"), ("", None, "right"), ("", "a.json", "OTHER")])
def test_the_trials_tell_how_a_program_has_ended(program, name, verdict):
    status, said, _ = faults.ended(["-c", program], seconds=0.5 if verdict == "HANGS" else 60)
    assert faults.verdict_on(status, said, name) == verdict


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_the_trial_of_broken_files_has_a_file_of_each_kind(tmp_path, capsys):
    before = signal.getsignal(signal.SIGALRM)
    try:
        bad = faults.fuzz(argparse.Namespace(cases=0, seed=0, out=tmp_path), tmp_path / "home")
    finally:
        signal.signal(signal.SIGALRM, before)
    *kinds, whole = capsys.readouterr().out.splitlines()[1:]
    assert bad == 0 and len(kinds) > 15
    assert all(kind.split()[-4] == "1" for kind in kinds) and whole.split()[1] == str(len(kinds))
