"""What must hold for training.

Schedule and order, what each strategy trains, and runs that repeat and resume exactly.
"""
import importlib
import io
import json
import math
import re
import shutil
import sys
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import convert  # noqa: F401 - READERS then have the papers' animals
import eval
import train
import uda
from data import (COCO17, DataError, below_common_folder, draw_figures, load_dataset, make_skeleton,
                  to_coco)
from eval import Parser, flag_of, predict
from train import (MUON_RATE, Muon, Passes, Stage, learning_rate, main, new_optimizer, orthogonal,
                   parameter_groups)
from conftest import CROPS, ROOT, command, run_program, uda_command
from vlpose import (MATCHERS, MODEL_CONFIGS, VIT_CONFIGS, PoseModel, VLPose, encode_sentences,
                    load_clip_text, load_model, load_pose_model, save_checkpoint)


def results_of(folder):
    return (folder / "results.json").read_text("utf-8")


def rows_of(folder):
    """The rows of a run's log.csv, each a list of its cells."""
    _, *lines = (folder / "log.csv").read_text("utf-8").splitlines()
    return [line.split(",") for line in lines]


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert main(command(cache, folder)) == 0
    return folder


# ------------------------------------------------------------------------------------------ details

def test_every_pass_visits_each_person_once_in_a_new_order():
    passes = Passes(None, np.arange(10, 20), 0)
    keys = [passes.key(position) for position in range(20)]
    rows = [row for row, _ in keys]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10, 20)) and rows[:10] != rows[10:]
    assert len({seed for _, seed in keys}) == 20


def test_a_crop_depends_on_its_position_and_the_seed_alone():
    passes, again, other = (Passes(None, np.arange(7), seed) for seed in (5, 5, 6))
    everything = [passes.key(position) for position in range(27)]
    assert [again.key(position) for position in range(12, 27)] == everything[12:]
    assert [other.key(position) for position in range(27)] != everything


def test_with_muon_the_learning_rate_warms_up_and_falls_linearly_to_0():
    stage = Stage("base", 1000, 1.0, 64, 0, False, optimizer="muon")
    factors = [learning_rate(step, stage) for step in range(1000)]
    assert factors[:100] == [(step + 1) / 100 for step in range(100)]
    assert factors[100] == 1 and np.allclose(np.diff(factors[100:]), -1 / 900)
    assert factors[-1] == pytest.approx(1 / 900)


@pytest.mark.parametrize("shape", [(8, 8), (64, 16), (16, 576)])
def test_muons_iteration_keeps_the_singular_vectors_and_brings_all_singular_values_near_1(shape):
    torch.manual_seed(0)
    U, S, Vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    S = torch.linspace(0.05, 1, len(S))
    found = orthogonal(U @ S.diag() @ Vt)
    middle = U.T @ found @ Vt.T  # diagonal, if the vectors are the same
    assert (middle - middle.diag().diag()).abs().max() < 1e-3
    assert middle.diag().min() > 0.6 and middle.diag().max() < 1.25


def test_muons_steps_are_those_of_torch_for_matrices():
    peer = getattr(torch.optim, "Muon", None)
    if peer is None:
        pytest.skip("this torch has no Muon")
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.ones(32, 16)) for _ in range(2))
    optimizer = Muon([dict(params=[ours], muon=True)], lr=0.02 / MUON_RATE, weight_decay=0.1)
    other = peer([theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, ns_steps=5)
    for _ in range(5):
        ours.grad, theirs.grad = (2 * torch.randn(32, 16)).repeat(2, 1, 1)
        optimizer.step()
        other.step()
    # Theirs computes in bfloat16.
    assert (ours - theirs).norm() < 0.02 * (theirs - 1).norm()


def test_muon_moves_matrices_and_kernels_and_adamw_the_first_the_last_and_all_other_weights():
    torch.manual_seed(0)
    model = PoseModel(VIT_CONFIGS["tiny"])
    stage = Stage("base", 10, 1e-3, 4, 0, False, optimizer="muon")
    optimizers = [new_optimizer(model, stage), new_optimizer(twin := deepcopy(model), replace(
        stage, optimizer="adamw"))]
    for optimizer, one in zip(optimizers, (model, twin)):
        one(torch.ones(2, 3, *model.config.image_size)).square().sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = stage.lr
        optimizer.step()
    by_adamw = {name for (name, p), q in zip(model.named_parameters(), twin.parameters())
                if torch.equal(p, q)}
    by_muon = {name for name, p in model.named_parameters() if p.ndim in (2, 4)} - {
        "backbone.patch_embed.0.weight", "head.predictor.weight"}
    assert by_adamw == {name for name, _ in model.named_parameters()} - by_muon


def test_the_learning_rate_warms_up_and_falls_twice():
    stage = Stage("base", 21000, 1.0, 1, 0, False)
    factors = [learning_rate(step, stage) for step in range(21000)]
    assert factors[0] == 1 / 500 and factors[499] == 1
    assert factors[16999] == 1 and math.isclose(factors[17000], 0.1)
    assert math.isclose(factors[20000], 0.01)


def test_biases_norms_and_positions_do_not_decay_and_lower_layers_learn_more_slowly(tiny):
    model = PoseModel(VIT_CONFIGS["tiny"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, Stage("base", 1, 1.0, 1, 0, False, layer_decay=0.5))
    settings = {names[id(parameter)]: group for group in groups for parameter in group["params"]}
    assert len(settings) == len(names)
    for name in ("backbone.pos_embed", "backbone.norm.bias"):
        assert settings[name]["weight_decay"] == 0
    assert settings["head.predictor.weight"]["weight_decay"] == 0.1
    scales = [settings[name]["scale"]
              for name in ("backbone.pos_embed", "backbone.blocks.0.attn.qkv.weight",
                           "backbone.blocks.3.attn.qkv.weight", "head.predictor.weight")]
    assert scales == [0.5 ** 5, 0.5 ** 4, 0.5, 1]


# --------------------------------------------------------------------------------------- whole runs

def test_a_run_leaves_its_numbers_models_and_pictures(run):
    assert {file.name for file in run.iterdir()} == {
        "config.json", "log.csv", "results.json", "model.pth", "adapter.pth", "curves.png",
        "poses.png", "base.checkpoint.pth", "adapt.checkpoint.pth", ".lock"}
    assert (run / "adapter.pth").stat().st_size < 2e6


def test_an_adapters_file_around_the_base_is_the_whole_model(run, cache):
    model = load_model(run / "adapter.pth", base=next(cache.glob("base-*.pth")))
    assert isinstance(model, VLPose) and model.about == load_model(run / "model.pth").about
    for name, tensor in load_model(run / "model.pth").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_the_pictures_show_a_few_people_of_each_domain_where_there_are_few(monkeypatch, tmp_path):
    cache, titles = tmp_path / "cache", []
    draw_figures(cache, {"train": (6, 4), "val": (3, 2)})
    monkeypatch.setattr(train, "draw_sheet", lambda people, draw=train.draw_sheet: (
        titles.append([title for title, *_ in people]), draw(people))[1])
    assert main(command(cache, tmp_path / "photos", "--target", "figures#cartoon")) == 0
    assert main(command(cache, tmp_path / "art")) == 0
    assert titles[0] == ["photo"] * 3 + ["cartoon"] * 2 and titles[1][:3] == ["photo"] * 3
    assert len(set(titles[1])) == len(titles[1]) - 2 == 8  # each art once


def test_with_the_adapter_off_the_original_is_back_exactly(run):
    results = json.loads(results_of(run))
    assert results["adapter off"] == results["original"] != results["adapted"]


def test_training_leaves_no_trace_in_the_frozen_base(run, cache):
    model, base = load_model(run / "model.pth"), load_model(next(cache.glob("base-*.pth")))
    assert model.about["sentences"] == "a photo of a {domain} character"
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, model.base.state_dict()[name]), name


def test_the_same_command_gives_the_same_numbers_and_reuses_figures_and_base(
        run, cache, tmp_path, capsys):
    assert main(command(cache, tmp_path / "again")) == 0
    assert "trained before" in capsys.readouterr().out
    assert results_of(tmp_path / "again") == results_of(run)


class Killed(BaseException):
    """What no program can catch."""


def stopped_and_resumed(make, cache, folder, monkeypatch, stage, *more):
    """A run with a cache of its own that is interrupted and goes on.

    It stops after step 3 of a stage, one step behind its checkpoint.
    """
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    after_step = train.Run.after_step

    def stop(self, at, done, *rest):
        after_step(self, at, done, *rest)
        if (at.name, done) == (stage, 3):
            raise Killed

    own_cache = folder / "cache"
    own_cache.mkdir()
    (own_cache / train.FIGURES).symlink_to(cache / train.FIGURES)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.Run, "after_step", stop)
        main(make(own_cache, folder / "stopped", *more))
    assert main(["--resume", str(folder / "stopped")]) == 0
    return folder / "stopped"


@pytest.mark.parametrize("stage", ["base", "adapt"])
def test_a_run_that_was_stopped_resumes_to_the_same_numbers(
        run, cache, tmp_path, monkeypatch, stage):
    resumed = stopped_and_resumed(command, cache, tmp_path, monkeypatch, stage)
    assert results_of(resumed) == results_of(run)
    stages = [row[0] for row in rows_of(resumed)]
    assert {"base", "adapt"} <= set(stages)


@pytest.mark.parametrize("strategy, trained", [
    ("scratch", 0), ("full", 1.0), ("last", 0.18), ("stem", 0.09), ("all-but-stem", 0.91),
    ("prompt", 0.01), ("lora", 0.31)])
def test_each_strategy_trains_its_share_of_the_parameters(
        tiny, cache, tmp_path, capsys, strategy, trained):
    # In larger crops even a few small steps move a pose.
    assert main(command(cache, tmp_path / strategy, "--strategy", strategy, "--image-size", "64",
                        "64")) == 0
    output = capsys.readouterr().out
    share = float(output.split("parameters, ")[1].split("%")[0]) / 100 if trained else 0
    assert abs(share - trained) < 0.01
    results = json.loads(results_of(tmp_path / strategy))
    assert (results["adapted"] == results["original"]) == (strategy == "scratch")
    assert "no CLIP weights given" not in output  # none of them reads text
    model = load_model(tmp_path / strategy / "model.pth")
    assert isinstance(model, VLPose) == (strategy in ("prompt", "lora"))
    if isinstance(model, VLPose):
        images = torch.rand(1, 3, 64, 64)
        assert not torch.equal(model(images), model.base(images))  # it is on without a sentence


@pytest.mark.parametrize("arguments, words", [
    (["--source", "nothing"], "unknown data set"),
    (["--target", "coco:/nowhere"], "no such file or folder"),
    (["--weights", "/nowhere.pth"], "/nowhere.pth"),
    (["--batch-size", "0"], "batch-size"),
    (["--device", "abacus"], "does not work here"),
    (["--size", "resnet50", "--num-prompts", "3"], "prompts"),
])
def test_bad_input_is_one_line_and_exit_status_2(cache, tmp_path, capsys, arguments, words):
    status = main(command(cache, tmp_path / "bad", *arguments))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2 and "error: " in error and words in error
    assert not (tmp_path / "bad").exists()  # so that the corrected command may use the same folder


def test_a_finished_run_is_not_overwritten(run, cache, capsys):
    assert main(command(cache, run)) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_resuming_a_folder_without_a_run_is_an_error(tmp_path, capsys):
    assert main(["--resume", str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err


def test_a_truncated_image_stops_training_with_its_name(tmp_path, capsys):
    folder = draw_figures(tmp_path / "own", {"train": (4, 1), "val": (2, 1)})
    image = load_dataset(f"figures:{folder}", "train").files[0]
    with open(image, "r+b") as file:
        file.truncate(1500)
    spec = f"figures:{folder}"
    assert main(command(tmp_path, tmp_path / "run", "--source", f"{spec}#photo", "--target",
                        f"{spec}#artificial")) == 2
    assert image in capsys.readouterr().err


# ---------------------------------------------------------------------------- multi-level alignment

@pytest.fixture(scope="module")
def aligned(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "aligned"
    assert main(uda_command(cache, folder, "--oracle")) == 0
    return folder


@lru_cache
def weights(folder, name):
    return load_model(folder / f"{name}.pth").state_dict()


def test_alignment_leaves_its_numbers_models_and_pictures(aligned):
    stages = "style", "source", "restyled", "adapt", "oracle"
    models = "source-only", "student", "teacher", "oracle"
    assert {file.name for file in aligned.iterdir()} == {
        "config.json", "log.csv", "results.json", "curves.png", "poses.png", "style.pth", ".lock",
        *(f"{stage}.checkpoint.pth" for stage in stages), *(f"{model}.pth" for model in models)}
    table = json.loads(results_of(aligned))
    assert list(table) == ["source only", "student", "teacher", "oracle"]
    assert set(table["teacher"]) == {*COCO17.groups, "mean", "mean at 0.2", "mean (grid)",
                                     *CONFIDENCE}
    for column in table.values():
        assert column.pop("pixels between two views") > 0
        assert all(0 <= number <= 1 for number in column.values())


@pytest.mark.parametrize("stage", ["style", "restyled", "adapt"])
def test_alignment_that_was_stopped_resumes_to_the_same_numbers(
        aligned, cache, tmp_path, monkeypatch, stage):
    resumed = stopped_and_resumed(uda_command, cache, tmp_path, monkeypatch, stage, "--oracle")
    for model in ("source-only", "student", "teacher", "oracle"):
        for name, tensor in weights(aligned, model).items():
            assert torch.equal(tensor, weights(resumed, model)[name]), (model, name)
    log = [row[:2] for row in rows_of(resumed)]
    assert list(dict(log)) == ["style", "source", "restyled", "adapt", "oracle"]
    assert len(set(map(tuple, log))) == len(log)


def test_the_targets_labels_are_never_read_in_training(aligned, cache, tmp_path):
    other = shutil.copytree(cache / train.FIGURES, tmp_path / "other")
    path = other / "annotations" / "training_figures.json"
    contents, rng = json.loads(path.read_text("utf-8")), np.random.default_rng(0)
    for person in contents["annotations"]:
        person |= {"keypoints": rng.integers(0, 2, 51).tolist(),
                   "num_keypoints": int(rng.integers(18)), "area": 1}
    path.write_text(json.dumps(contents))
    assert main(uda_command(cache, tmp_path / "run", "--target", f"figures:{other}#photo")) == 0
    for model in ("student", "teacher"):
        for name, tensor in weights(aligned, model).items():
            assert torch.equal(tensor, weights(tmp_path / "run", model)[name]), (model, name)


def given(aligned):
    """Options that give the style network and the source model of a run to another one."""
    return ["--style-weights", str(aligned / "style.pth"),
            "--weights", str(aligned / "source-only.pth")]


def test_stages_that_are_given_are_skipped_and_a_given_model_takes_another_sigma(
        aligned, cache, tmp_path):
    assert main(uda_command(cache, tmp_path / "run", *given(aligned), "--sigma", "3")) == 0
    files = {file.name for file in (tmp_path / "run").glob("*.checkpoint.pth")}
    assert files == {"adapt.checkpoint.pth"}
    for name, tensor in weights(aligned, "source-only").items():
        assert torch.equal(tensor, weights(tmp_path / "run", "source-only")[name]), name
    for name, tensor in torch.load(aligned / "style.pth").items():
        assert torch.equal(tensor, torch.load(tmp_path / "run" / "style.pth")[name]), name
    assert load_model(tmp_path / "run" / "student.pth").config.sigma == 3


def test_each_part_of_the_alignment_can_be_left_out(aligned, cache, tmp_path, monkeypatch):
    peaks = uda.peaks

    def sure_peaks(heatmaps):
        points, confidence = peaks(heatmaps)
        return points, 1 + confidence

    monkeypatch.setattr(uda, "peaks", sure_peaks)
    outcomes = {}  # an untrained teacher is sure of nothing; here it is
    for option in (None, "image-level", "feature-level", "pose-level", "consistency", "occlusion"):
        folder, more = tmp_path / str(option), [*given(aligned), "--steps", "2"]
        if option == "image-level":
            more = more[2:]  # without the style network
        if option:
            more += [f"--{option}", "0"]
        assert main(uda_command(cache, folder, *more)) == 0
        outcomes[option] = weights(folder, "student")["head.predictor.weight"]
        assert option is None or not torch.equal(outcomes[option], outcomes[None]), option
        assert (folder / "style.pth").exists() == (option != "image-level")


def test_a_run_that_does_not_know_an_option_yet_resumes_with_its_default(aligned, tmp_path):
    shutil.copytree(aligned, tmp_path / "old")
    config = json.loads((aligned / "config.json").read_text("utf-8"))
    del config["bf16"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert main(["--resume", str(tmp_path / "old")]) == 0


@pytest.mark.parametrize("mode", ["vlpose", "uda"])
def test_a_resnet_takes_its_own_image_size_sigma_and_initial_weights(
        cache, tmp_path, monkeypatch, mode):
    monkeypatch.setitem(MODEL_CONFIGS, "resnet18",
                        replace(MODEL_CONFIGS["resnet18"], decoder_dim=16))
    torch.manual_seed(0)
    torchvision_state = torchvision.models.resnet18(num_classes=3).state_dict()
    torch.save(torchvision_state, tmp_path / "resnet18.pth")
    make, name = command, "model.pth"
    more = ["--base-lr", "1e-9", "--num-prompts", "0", "--base-steps", "2"]
    if mode == "uda":
        make, name = uda_command, "source-only.pth"
        more = ["--lr", "1e-9", "--image-level", "0", "--supervised-steps", "2"]
    assert main(make(cache, tmp_path / "run", *more, "--size", "resnet18", "--sigma", "1",
                     "--init", str(tmp_path / "resnet18.pth"), "--image-size", "64", "64",
                     "--steps", "2", "--optimizer", "adamw")) == 0
    model = load_pose_model(tmp_path / "run" / name)
    config = model.config
    assert (config.image_size, config.sigma, config.trunk) == ((64, 64), 1.0, "resnet18")
    torch.testing.assert_close(model.backbone.body.conv1.weight, torchvision_state["conv1.weight"],
                               atol=1e-5, rtol=0)


def test_an_oracle_may_have_learned_from_labels_where_nothing_to_test_on_is_labelled(
        cache, tmp_path, capsys):
    target = shutil.copytree(cache / train.FIGURES, tmp_path / "target")
    remove_keypoints(target / "annotations" / "validation_figures.json")
    assert main(uda_command(cache, tmp_path / "run", "--oracle", "--target",
                            f"figures:{target}#photo")) == 0
    table = json.loads(results_of(tmp_path / "run"))
    assert list(table) == ["source only", "student", "teacher", "oracle"]
    assert list(table["oracle"]) == CONFIDENCE and "no labels" in capsys.readouterr().out


def remove_keypoints(path):
    """Makes COCO's people into people without labels."""
    contents = json.loads(path.read_text("utf-8"))
    for person in contents["annotations"]:
        person["keypoints"] = [0] * 51
    path.write_text(json.dumps(contents))


@pytest.mark.parametrize("arguments, words", [
    (["--source", "figures#marble"], "marble"),
    (["--target", "coco:/nowhere"], "no such file or folder"),
    (["--style-weights", "{run}/teacher.pth"], "teacher.pth"),
    (["--style-encoder", "{run}/style.pth"], "expected the public AdaIN encoder"),
    (["--weights", "{run}/style.pth"], "style.pth"),
    (["--size", "resnet18", "--image-size", "60", "64"],
     "expected a multiple of 32 from 32 to 4096, found 60"),
    (["--style-weights", "{run}/decoder.pth"], "--style-encoder"),
    (["--feature-level", "-1"], "feature-level"), (["--sigma", "0"], "sigma"),
    (["--oracle", "--target", "figures:{unlabelled}#photo"],
     "expected labelled people to train on"), (["--occlusion", "2"], "occlusion"),])
def test_bad_input_to_alignment_is_one_line_and_exit_status_2(
        aligned, cache, tmp_path, capsys, arguments, words):
    decoder = {"1.weight": torch.zeros(3, 16, 3, 3), "1.bias": torch.zeros(3)}
    torch.save(decoder, aligned / "decoder.pth")
    unlabelled = shutil.copytree(cache / train.FIGURES, tmp_path / "unlabelled")
    remove_keypoints(unlabelled / "annotations" / "training_figures.json")
    words_of = {"run": aligned, "unlabelled": unlabelled}
    status = main(uda_command(cache, tmp_path / "bad",
                              *(word.format(**words_of) for word in arguments)))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2 and "error: " in error and words in error
    assert not (tmp_path / "bad").exists()


# ---------------------------------------------------------------------- both methods under one roof

def both_command(cache, out, *more):
    return uda_command(cache, out, "--strategy", "vlpose", "--source", "figures#photo", "--target",
                       "figures#cartoon", *more)


@pytest.fixture(scope="module")
def both(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "both"
    assert main(both_command(cache, folder)) == 0
    return folder


def test_an_adapter_that_learns_without_labels_leaves_its_files(both):
    assert {file.name for file in both.glob("*.pth")} == {
        "style.pth", "source-only.pth", "student.pth", "teacher.pth", "adapter.pth",
        *(f"{stage}.checkpoint.pth" for stage in ("style", "source", "adapt"))}  # no `restyled`
    assert (both / "adapter.pth").stat().st_size < 2e6
    student, teacher = (load_model(both / f"{name}.pth") for name in ("student", "teacher"))
    adapter = load_model(both / "adapter.pth", base=both / "source-only.pth")
    about = {"text_weights": "random", "sentences": "a photo of a {domain} character",
             "per_token": False}
    assert student.about == teacher.about == adapter.about == about
    assert all(torch.equal(tensor, adapter.state_dict()[name])
               for name, tensor in teacher.state_dict().items())
    assert not torch.equal(student.prompts, teacher.prompts)


def test_alignment_leaves_no_trace_in_the_base_and_moves_the_whole_adapter(both):
    original, teacher = load_model(both / "source-only.pth"), load_model(both / "teacher.pth")
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, teacher.base.state_dict()[name]), name
    torch.manual_seed(0)  # of the run
    start = VLPose(original, 128).state_dict()
    for name, tensor in teacher.state_dict().items():
        assert name.startswith("base.") or not torch.equal(tensor, start[name]), name


def test_with_the_aligned_adapter_off_the_source_only_model_is_back_exactly(both, cache):
    figures, teacher = load_dataset("figures", "val", cache), load_model(both / "teacher.pth")
    found = predict(teacher, figures)
    assert found == predict(load_model(both / "source-only.pth"), figures)
    figures = train.with_sentences(figures, teacher.about["sentences"])
    texts = encode_sentences(load_clip_text("random"), np.unique(figures.sentences).tolist())
    assert found != predict(teacher, figures, texts)


def test_an_aligned_run_says_that_the_adapter_can_be_switched_off(cache, tmp_path, capsys):
    assert main(both_command(cache, tmp_path / "run", "--per-token", "--oracle")) == 0
    assert "adapter off gives the original's poses exactly: yes" in capsys.readouterr().out


def test_an_adapter_that_learns_without_labels_resumes_to_the_same_numbers(
        both, cache, tmp_path, monkeypatch):
    resumed = stopped_and_resumed(both_command, cache, tmp_path, monkeypatch, "adapt")
    for model in ("student", "teacher"):
        for name, tensor in weights(both, model).items():
            assert torch.equal(tensor, weights(resumed, model)[name]), (model, name)


def test_a_model_with_the_simple_decoder_is_refused_before_anything_is_trained(
        cache, tmp_path, capsys):
    save_checkpoint(tmp_path / "simple.pth", PoseModel(replace(VIT_CONFIGS["tiny"], decoder_dim=0)))
    assert main(both_command(cache, tmp_path / "bad", "--weights",
                             str(tmp_path / "simple.pth"))) == 2
    assert "needs the classic decoder" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


# ------------------------------------------------------------------------------------- any skeleton

def with_joints(cache, folder, count):
    """A COCO file of the drawn cartoons with so many keypoints: 12 or more of COCO's, others."""
    figures = load_dataset(f"figures:{cache / train.FIGURES}#cartoon", "train")
    body = [name for name in COCO17.names if count > 17 or "eye" not in name and "ear" not in name]
    names = (*body, *(f"{side}_finger_{number}" for number in range(count)
                      for side in ("left", "right")))[:count]
    joints = [COCO17.names.index(name) for name in body]
    keypoints = figures.keypoints[:, joints].transpose(1, 0, 2)  # repeated until there are enough
    keypoints = np.resize(keypoints, (count, len(figures.ids), 3)).transpose(1, 0, 2)
    skeleton = make_skeleton(names, [(0, 1), (1, 2)])
    (folder / "images").symlink_to(below_common_folder(figures.files)[0])
    figures = replace(figures, skeleton=skeleton, keypoints=keypoints)
    (folder / "people.json").write_text(json.dumps(to_coco(figures)))
    return f"coco:{folder / 'people.json'}", names


@pytest.mark.parametrize("count", [13, 21, 133])
@pytest.mark.parametrize("make", [command, uda_command])
def test_the_targets_file_says_which_keypoints_there_are(cache, tmp_path, capsys, make, count):
    target, names = with_joints(cache, tmp_path, count)
    assert main(make(cache, tmp_path / "new", "--target", target, "--batch-size", "2")) == 0
    kept = ["model"] if make is command else ["source-only", "teacher"]
    models = [load_model(tmp_path / "new" / f"{name}.pth") for name in kept]
    for model in models:
        model = getattr(model, "base", model)
        assert (model.skeleton.names, model.num_keypoints) == (names, count)
        assert model.skeleton.edges == ((0, 1), (1, 2))
    missing = [name for name in names if name not in COCO17.names]
    assert ("its skeleton lacks " + ", ".join(missing) in capsys.readouterr().err) == bool(missing)


@pytest.mark.parametrize("make", [command, uda_command])
def test_a_given_model_gets_a_predictor_for_other_keypoints_and_keeps_those_that_it_has(
        cache, tmp_path, capsys, make):
    target, names = with_joints(cache, tmp_path, 13)
    torch.manual_seed(5)
    given = PoseModel(VIT_CONFIGS["tiny"])
    save_checkpoint(tmp_path / "given.pth", given)
    assert main(make(cache, tmp_path / "run", "--target", target, "--batch-size", "2", "--weights",
                     str(tmp_path / "given.pth"))) == 0
    said = "a new predictor for 13 keypoints, 13 of which the model has had"
    assert said in capsys.readouterr().out
    name = "model.pth" if make is command else "source-only.pth"
    original = load_model(tmp_path / "run" / name)
    joints = [COCO17.names.index(name) for name in names]
    predictor = getattr(original, "base", original).head.predictor
    assert torch.equal(predictor.weight, given.head.predictor.weight[joints])


@pytest.mark.parametrize("make", [command, uda_command])
def test_skeletons_that_share_no_joint_are_refused_by_their_names(cache, tmp_path, capsys, make):
    target, names = with_joints(cache, tmp_path, 13)
    contents = json.loads((tmp_path / "people.json").read_text("utf-8"))
    contents["categories"][0]["keypoints"] = [f"fin_{number}" for number in range(13)]
    (tmp_path / "people.json").write_text(json.dumps(contents))
    assert main(make(cache, tmp_path / "bad", "--target", target, "--batch-size", "2")) == 2
    error = capsys.readouterr().err
    assert "its skeleton has no keypoint of fin_0, fin_1" in error
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("make", [command, uda_command])
def test_animals_are_learned_by_their_own_joints_and_what_people_share_with_them(
        cache, tmp_path, real, capsys, make):
    target = f"animalpose:{real / 'animals' / 'animalpose' / 'test_animalpose.json'}"
    assert main(make(cache, tmp_path / "run", "--target", target, "--batch-size", "1")) == 0
    assert "its skeleton lacks left_front_hoof" in capsys.readouterr().err
    assert load_model(tmp_path / "run").num_keypoints == 14


# -------------------------------------------------------------------------- pictures without labels

@pytest.fixture
def pictures(cache, tmp_path):
    home = tmp_path / "pictures"
    shutil.copytree(cache / train.FIGURES / "images" / "cartoon", home)
    return f"pictures:{home}"


CONFIDENCE = ["sure keypoints", "pixels between two views"]


@pytest.mark.parametrize("strategy", ["full", "vlpose", "lora"])
def test_pictures_without_labels_are_adapted_to_and_what_can_be_known_is_said(
        cache, tmp_path, pictures, capsys, strategy):
    assert main(uda_command(cache, tmp_path / "run", "--target", pictures, "--strategy",
                            strategy)) == 0
    printed = capsys.readouterr().out
    table = json.loads(results_of(tmp_path / "run"))
    assert list(table) == ["source only", "student", "teacher"]
    for numbers in table.values():
        assert list(numbers) == CONFIDENCE
        assert 0 <= numbers["sure keypoints"] <= 1 and numbers["pixels between two views"] > 0
    assert "no labels, 5 people " in printed and "pixels between two views" in printed
    assert "say how sure a model is, not how right" in printed
    adapter_off = "adapter off gives the original's poses exactly: yes" in printed
    assert adapter_off == (strategy != "full")
    assert {"teacher.pth", "poses.png",
            "curves.png"} <= {file.name for file in (tmp_path / "run").iterdir()}


def test_labels_for_the_test_may_come_from_elsewhere(cache, tmp_path, pictures):
    assert main(uda_command(cache, tmp_path / "run", "--target", pictures, "--test",
                            "figures#cartoon")) == 0
    table = json.loads(results_of(tmp_path / "run"))
    assert set(table["teacher"]) == {*COCO17.groups, "mean", "mean at 0.2", "mean (grid)",
                                     *CONFIDENCE}


def test_a_model_adapts_to_pictures_without_any_source(cache, tmp_path, pictures, capsys):
    torch.manual_seed(0)
    given = PoseModel(VIT_CONFIGS["tiny"], 3,
                      make_skeleton(("head", "left_hand", "right_hand"), [(0, 1), (0, 2)]))
    save_checkpoint(tmp_path / "given.pth", given)
    assert main(uda_command(cache, tmp_path / "run", "--target", pictures, "--source", "none",
                            "--weights", str(tmp_path / "given.pth"))) == 0
    assert f"plan: adapt: 4 steps of 4 crops ({pictures}: " in capsys.readouterr().out
    assert {file.name
            for file in (tmp_path / "run").glob("*.checkpoint.pth")} == {"adapt.checkpoint.pth"}
    teacher = load_model(tmp_path / "run" / "teacher.pth")
    student = load_model(tmp_path / "run" / "student.pth")
    assert teacher.skeleton.names == given.skeleton.names
    assert not torch.equal(student.head.predictor.weight, given.head.predictor.weight)
    assert float(rows_of(tmp_path / "run")[-1][2]) != 0  # the loss: consistency and pose level


def test_a_file_to_test_on_is_tested_whole_and_without_a_source_in_the_models_own_keypoints(
        cache, tmp_path, pictures, monkeypatch):
    target, names = with_joints(cache, tmp_path, 13)
    tested = []
    monkeypatch.setattr(train, "compare_pck", lambda *arguments: tested.append(arguments[2].test))
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "given.pth", PoseModel(VIT_CONFIGS["tiny"]))
    assert main(uda_command(cache, tmp_path / "run", "--target", pictures, "--source", "none",
                            "--weights", str(tmp_path / "given.pth"), "--test", target)) == 0
    whole = load_dataset(target, "all")
    part = load_dataset(target, "val")
    assert len(tested[0].annotated) == len(whole.annotated) > len(part.annotated)
    assert tested[0].skeleton.names == COCO17.names and set(names) < set(COCO17.names)


@pytest.mark.parametrize("arguments, words", [
    (["--source", "{pictures}"], "expected labelled people to train on, found none"),
    (["--source", "none"], "--source none: expected --weights"),
    (["--test", "{pictures}"], "expected labelled people to test on, found none"),
])
def test_labels_that_are_missing_where_they_are_needed_are_named(
        cache, tmp_path, pictures, capsys, arguments, words):
    status = main(uda_command(cache, tmp_path / "bad",
                              *(word.format(pictures=pictures) for word in arguments)))
    assert status == 2 and words in capsys.readouterr().err and not (tmp_path / "bad").exists()


# ---------------------------------------------------------------------- the cache of trained models

def program_in(folder):
    """A copy of the six modules to edit."""
    folder.mkdir()
    for name in train.MODULES:
        shutil.copy(ROOT / name, folder)
    (folder / "assets").symlink_to(ROOT / "assets")
    return folder


def cache_in(folder, cache):
    """A cache with the drawn figures and no trained model."""
    folder.mkdir()
    (folder / train.FIGURES).symlink_to(cache / train.FIGURES)
    return folder


def printed_by(program, *argv):
    ended = run_program(program / "train.py", *argv)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def base_weights(folder):
    return load_model(folder / "model.pth").state_dict()


def test_after_an_edit_of_the_code_no_model_is_taken_from_the_cache(cache, tmp_path):
    program, own = program_in(tmp_path / "program"), cache_in(tmp_path / "cache", cache)
    fresh = cache_in(tmp_path / "fresh", cache)

    def trained(name, cache):
        return printed_by(program, *command(cache, tmp_path / name, "--strategy", "scratch"))

    trained("first", own)
    assert "trained before" in trained("second", own)
    with open(program / "vlpose.py", "a") as file:  # an edit of the decoder
        file.write("\n\nplain = PoseModel.features\n"
                   "PoseModel.features = lambda self, images: torch.tanh(plain(self, images))\n")
    printed = trained("edited", own)
    assert "base model: vlpose.py has changed since: training anew" in printed
    assert "trained before" not in printed
    trained("edited, fresh", fresh)
    assert "trained before" in trained("edited again", own)  # it is cached anew
    weights = {name: base_weights(tmp_path / name)
               for name in ("first", "edited", "edited, fresh", "edited again")}
    for name, tensor in weights["edited, fresh"].items():
        assert torch.equal(tensor, weights["edited"][name]), name
        assert torch.equal(tensor, weights["edited again"][name]), name
    predictor = "head.predictor.weight"
    assert not torch.equal(weights["first"][predictor], weights["edited"][predictor])


@pytest.mark.parametrize("stylist", [True, False])
def test_a_restyling_of_ones_own_is_cached_until_its_file_is_edited(
        cache, tmp_path, monkeypatch, capsys, stylist):
    own, file = cache_in(tmp_path / "cache", cache), tmp_path / "my_style.py"
    monkeypatch.syspath_prepend(tmp_path)
    if not stylist:
        monkeypatch.setattr(train, "new_stylist", lambda options: None)

    def trained(name, share):
        file.write_text(f"def restyle(source, target):\n    return {share} * source + {1 - share} "
                        f"* target\n")
        sys.modules.pop("my_style", None)
        importlib.invalidate_caches()
        restyle = importlib.import_module("my_style").restyle
        monkeypatch.setattr(train, "restyling", lambda stylist, options: restyle)
        more = [] if stylist else ["--image-level", "0"]
        assert main(uda_command(own, tmp_path / name, *more, "--steps", "1")) == 0
        return capsys.readouterr().out

    assert "restyled model" not in trained("first", 0.5)
    assert re.search("^restyled model: .* \\(trained before\\)$", trained("second", 0.5), re.M)
    printed = trained("edited", 0.25)
    assert "restyled model: my_style.py has changed since: training anew" in printed
    # that has nothing to do with it
    assert "source model: " in printed and printed.count("trained before") == 1
    assert len(list(own.glob("restyled-*.pth"))) == 1


def test_a_restyling_whose_code_nobody_can_see_is_never_cached(cache, tmp_path, monkeypatch):
    own = cache_in(tmp_path / "cache", cache)
    typed = {}
    exec("def restyle(source, target): return target", typed)
    for number, restyle in enumerate((typed["restyle"], partial(torch.lerp, weight=0.5))):
        monkeypatch.setattr(train, "restyling", lambda stylist, options: restyle)
        assert main(uda_command(own, tmp_path / str(number), "--steps", "1")) == 0
    assert not list(own.glob("restyled-*")) and len(list(own.glob("source-*.pth"))) == 1


def test_a_stage_that_other_code_has_begun_is_finished_but_not_cached(cache, tmp_path, monkeypatch):
    changed = train.SOURCES | {"vlpose.py": b"edited"}
    after_step = train.Run.after_step

    def stop(self, stage, done, *rest):
        after_step(self, stage, done, *rest)
        if done == 2:
            raise Killed

    own = cache_in(tmp_path / "cache", cache)
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.Run, "after_step", stop)
        main(command(own, tmp_path / "run", "--strategy", "scratch"))
    monkeypatch.setattr(train, "SOURCES", changed)
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert not list(own.glob("base-*.pth"))


def test_a_run_whose_base_was_cached_goes_on_around_that_base_after_an_edit(
        run, cache, tmp_path, monkeypatch, capsys):
    assert main(command(cache, tmp_path / "run")) == 0  # with the base that `run` has trained
    base = load_model(tmp_path / "run" / "model.pth").base.state_dict()
    changed = train.SOURCES | {"vlpose.py": b"edited"}
    monkeypatch.setattr(train, "SOURCES", changed)
    capsys.readouterr()
    assert main(["--resume", str(tmp_path / "run"), "--steps", "9"]) == 0
    said = capsys.readouterr().out
    assert "training anew" not in said and "base.cached.pth (trained before)" in said
    assert "the original's poses exactly: yes" in said
    found = load_model(tmp_path / "run" / "model.pth").base.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in base.items())


@dataclass
class WithOneMore(train.VLPoseOptions):
    smoothing: float = eval.option(0.0, least=0, help="An option that somebody has added.")


def test_an_option_that_somebody_adds_is_part_of_the_caches_key(cache, tmp_path, monkeypatch):
    own = cache_in(tmp_path / "cache", cache)
    monkeypatch.setitem(train.MODES, "vlpose", (train.train_vlpose, WithOneMore))
    for number, smoothing in enumerate("010"):
        assert main(command(own, tmp_path / str(number), "--strategy", "scratch", "--smoothing",
                            smoothing)) == 0
    assert len(list(own.glob("base-*.pth"))) == 2


IN_KEY = {"size", "batch_size", "augmentation",
          "weights", "skeleton", "init", "image_size", "sigma", "bf16", "accumulate", "seed"}
IN_KEY_OF = {"vlpose": IN_KEY | {"base_lr", "base_steps", "base_epochs", "lr_batch", "optimizer"},
             "uda": IN_KEY | {"supervised_steps", "lr", "milestones", "optimizer", "weight_decay",
                              "warm_up", "clip"}}


@pytest.mark.parametrize("mode", ["vlpose", "uda"])
def test_strategies_rates_and_the_machine_share_one_base(cache, mode):
    model = PoseModel(VIT_CONFIGS["tiny"])
    figures = load_dataset("figures#photo", "train", cache)
    pool = train.vlpose_pool(figures, model, options())
    key = train.key_of(Stage("base", 1, 1.0, 1, 0, False), model, [pool], options("--mode", mode),
                       None, None)
    assert set(key["options"]) == IN_KEY_OF[mode]
    known = {entry.name for entry in fields(train.MODES[mode][1])}
    assert known > {"source", "target", "strategy", "steps", "device", "out"}


# ---------------------------------------------------------------------------- recipes and protocols

def options(*argv):
    return train.parse_options(list(argv))


@pytest.mark.parametrize("mode, kind",
                         [("vlpose", train.VLPoseOptions), ("uda", train.AlignmentOptions)])
def test_the_fields_of_one_class_are_the_options_with_their_defaults_limits_and_help(
        mode, kind, capsys):
    known = {action.dest for action in Parser(kind())._actions}
    assert known == {"help", *(entry.name for entry in fields(kind))}
    with pytest.raises(SystemExit):
        options("--mode", mode, "--help")
    printed = "".join(capsys.readouterr().out.split())  # lines break at spaces and hyphens
    for recipe in ("minutes", "paper"):
        values = vars(options("--mode", mode, "--recipe", recipe))
        for entry in fields(kind):
            expected = entry.default if recipe == "minutes" else entry.metadata["paper"]
            if entry.name not in ("mode", "recipe", "bf16"):
                assert values[entry.name] == expected, entry.name
    for entry in fields(kind):
        help = entry.metadata["help"]
        assert help.replace(" ", "") in printed and help.endswith("."), entry.name
        limits, flag = entry.metadata["limits"], flag_of(entry.name)
        for value in (limits.least - 1, limits.above, limits.most + 1):
            if not math.isfinite(value):
                continue
            values = 2 * [str(value)] if entry.name == "image_size" else [str(value)]
            with pytest.raises(DataError, match=f"{flag}: expected "):
                options("--mode", mode, flag, *values)


def test_what_one_field_says_is_what_the_command_does():
    entry = {entry.name: entry for entry in fields(train.VLPoseOptions)}["base_lr"]
    assert (entry.type, entry.default, entry.metadata["paper"]) == (float, 2e-3, 5e-4)
    assert entry.metadata["limits"].above == 0
    assert entry.metadata["only"] == ["without --weights"]
    assert options("--base-lr", "0.25").base_lr == 0.25
    with pytest.raises(DataError, match="--base-lr: expected a number above 0, found 0"):
        options("--base-lr", "0")
    with pytest.raises(DataError,
                       match="--base-lr: has no effect; it counts only without --weights"):
        options("--base-lr", "0.25", "--weights", "vitpose-b")


def test_the_methods_options_come_before_those_of_the_machine():
    for kind in (train.VLPoseOptions, train.AlignmentOptions):
        names = [entry.name for entry in fields(kind)]
        assert names[:2] == ["source", "target"] and names.index("strategy") < names.index("device")
        assert names[-3:] == ["mode", "recipe", "resume"]


def test_the_help_of_the_matcher_names_its_two_choices():
    entry = {entry.name: entry for entry in fields(train.VLPoseOptions)}["matcher"]
    assert all(f"({choice})" in entry.metadata["help"] for choice in MATCHERS)
    assert len(MATCHERS) == 2


@pytest.mark.parametrize("strategy", ["vlpose", "prompt", "lora"])
def test_an_adapter_is_checked_without_building_it(cache, monkeypatch, strategy):
    monkeypatch.setattr(train, "VLPose", pytest.fail)
    assert main(["--cache", str(cache), "--dry-run", "--strategy", strategy]) == 0


def test_a_recipe_has_every_value_of_the_paper_and_an_option_overrides_one():
    paper = options("--mode", "uda", "--recipe", "paper", "--lr", "5e-5")
    assert (paper.lr, paper.adapt_lr, paper.optimizer) == (5e-5, 1e-4, "adam")
    assert (paper.weight_decay, paper.warm_up, paper.clip) == (0, 0, 0)
    assert (paper.supervised_steps, paper.steps, paper.style_steps) == (20_000, 15_000, 500_000)
    assert (paper.batch_size, paper.style_batch, paper.ema_decay) == (32, 16, 0.999)
    assert (paper.feature_level, paper.pose_level) == (0.1, 0.3)
    assert vars(options("--mode", "uda"))["lr"] == 2e-3


def test_of_steps_and_epochs_the_one_that_is_given_counts():
    assert (options().steps, options().epochs) == (600, None)
    assert (options("--epochs", "3").steps, options("--epochs", "3").epochs) == (None, 3)
    paper = options("--recipe", "paper", "--steps", "7")
    assert (paper.steps, paper.epochs, paper.base_steps, paper.base_epochs) == (7, None, None, 210)
    for steps in ("7", "600"):  # the default was given, too
        with pytest.raises(DataError, match="expected --steps or --epochs, found both"):
            options("--epochs", "3", "--steps", steps)


@pytest.mark.parametrize("ampere", [True, False])
def test_bfloat16_is_the_default_where_a_gpu_has_it_and_nowhere_else(monkeypatch, ampere):
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)  # there may be no GPU here
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or ampere)
    assert options("--device", "cuda:1").bf16 == ampere
    assert options("--device", "cuda", "--no-bf16").bf16 is False
    assert options("--device", "cuda", "--bf16").bf16 is True
    assert options("--device", "cpu").bf16 is False


@pytest.mark.parametrize("argv", [["--text", "X"], ["--mode", "uda", "--pose", "0"], ["--no-shal"]])
def test_options_are_not_guessed_from_abbreviations(argv):
    with pytest.raises(DataError, match="unrecognized arguments"):
        options(*argv)


def plan_of(cache, capsys, *more):
    """The stages that a dry run prints, by name."""
    assert main(["--cache", str(cache), "--dry-run", *more]) == 0
    lines = capsys.readouterr().out.splitlines()
    return {line.split(": ")[1]: line for line in lines if line.startswith("plan: ")}


def test_a_dry_run_says_what_would_be_trained_and_leaves_nothing(
        cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plan = plan_of(cache, capsys, "--batch-size", "4", "--epochs", "3", "--validate-every", "2")
    assert plan["base"].startswith("plan: base: 1,650 steps of 4 crops (figures#natural: 6 people, "
                                   "1100.0 epochs), muon, learning rate 0.002 (matrices 0.02), falling to "
                                   "0")
    assert "adapt: 21 steps of 4 crops (figures#artificial: 28 people, 3.0 epochs)" in plan["adapt"]
    assert plan["adapt"].endswith("falling to 0, validation every 14 steps")
    plan = plan_of(cache, capsys, "--mode", "uda", "--recipe", "paper", "--size", "resnet18",
                   "--batch-size", "4", "--image-level", "0")
    assert list(plan) == ["source", "adapt"] and "adam, learning rate 0.0001" in plan["source"]
    assert plan["source"].endswith("0.0001")
    assert plan["adapt"].endswith("a tenth of it from steps 2,000, 9,500")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("more, rate", [
    ("--strategy full", 0.001), ("--strategy lora", 0.001), ("--strategy all-but-stem", 0.001),
    ("--rank 4", 0.001), ("--strategy last", 0.002), ("--strategy stem", 0.002),
    ("--strategy prompt", 0.002), ("--strategy vlpose", 0.002), ("--rank 4 --lr 0.003", 0.003)])
def test_what_changes_the_bases_blocks_learns_at_half_the_rate(cache, capsys, more, rate):
    plan = plan_of(cache, capsys, *more.split())
    assert f"muon, learning rate {rate} (" in plan["adapt"]


def test_learning_rates_follow_the_batch_linearly_from_the_papers_512(cache, capsys):
    for batch, rate in ((512, "0.0005"), (64, "6.25e-05")):
        plan = plan_of(cache, capsys, "--recipe", "paper", "--size", "tiny", "--batch-size",
                       str(batch))
        assert f"learning rate {rate}," in plan["base"]
        assert f"learning rate {rate}," in plan["adapt"]


def test_the_papers_student_falls_twice_while_its_discriminator_stays():
    stage = Stage("adapt", 15_000, 1e-4, 32, 0, False, optimizer="adam", warm_up=0,
                  milestones=(4 / 30, 19 / 30), clip=0, steady="discriminator.", weight_decay=0.0)
    factors = [learning_rate(step, stage) for step in range(15_000)]
    assert factors[0] == factors[1999] == 1 and math.isclose(factors[2000], 0.1)
    assert math.isclose(factors[9500], 0.01)
    assert np.mean(factors) == pytest.approx(0.187, abs=5e-4)
    model = uda.MultiLevelAlignment(PoseModel(VIT_CONFIGS["tiny"]))
    steady = {group["steady"]: len(group["params"]) for group in parameter_groups(model, stage)}
    assert steady[True] == len(list(model.discriminator.parameters()))
    assert all(group["weight_decay"] == 0 for group in parameter_groups(model, stage))


def test_the_best_model_in_validation_is_kept_and_resuming_does_not_change_which(
        cache, tmp_path, monkeypatch, capsys):
    # a rate at which the last is rarely the best
    more = ["--validate-every", "1", "--select", "best", "--lr", "3e-2"]
    assert main(command(cache, tmp_path / "run", *more, "--steps", "21")) == 0
    printed = capsys.readouterr().out
    measured = {int(row[1]): float(row[4]) for row in rows_of(tmp_path / "run")
                if row[0] == "adapt" and row[4] != "nan"}
    assert list(measured) == [7, 14, 21]  # 28 people in batches of 4
    assert f"selected the best in validation, AP {max(measured.values()):.3f}" in printed
    best = load_model(tmp_path / "run" / "adapt.best.pth")  # also while the run goes on
    kept = load_model(tmp_path / "run" / "model.pth")
    assert best.about == kept.about and best.options == kept.options
    assert all(torch.equal(tensor, kept.state_dict()[name])
               for name, tensor in best.state_dict().items())
    resumed = stopped_and_resumed(command, cache, tmp_path, monkeypatch, "adapt", *more, "--steps",
                                  "21")
    assert results_of(resumed) == results_of(tmp_path / "run")


def test_all_of_a_data_set_has_one_number_beside_those_of_its_domains(run):
    results = json.loads(results_of(run))["adapted"]
    assert list(results)[0] == "photo"
    assert {"all of figures#natural", "all of figures#artificial"} < set(results)
    assert results["photo"] == results["all of figures#natural"]


def humanart(folder, figures):
    """Figures as Human-Art holds its images: natural scenes beside art, under other names."""
    other = shutil.copytree(figures, folder / "humanart")
    for split in ("training", "validation"):
        path = other / "annotations" / f"{split}_figures.json"
        contents = json.loads(path.read_text("utf-8"))
        for image in contents["images"]:
            image["category"] = NEW_NAMES.get(image["category"], image["category"])
        path.rename(path.with_name(f"{split}_humanart.json")).write_text(json.dumps(contents))
    return other


# One of them has letters that many consoles lack, others are spelled in an unusual way.
NEW_NAMES = {"photo": "dance", "sketch": "\u901f\u5199", "shadow play": "shadow_play"}


@pytest.fixture(scope="module")
def natural(cache, tmp_path_factory):
    """A run on Human-Art: its folder, the data set's folder and what it has printed."""
    folder = tmp_path_factory.mktemp("natural")
    other = humanart(folder, cache / train.FIGURES)
    printed = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")  # as `> log.txt` on Windows
    with redirect_stdout(printed):
        assert main(command(cache, folder / "run", "--target", f"humanart:{other}")) == 0
    printed.flush()
    return folder / "run", other, printed.buffer.getvalue().decode("cp1252")


def test_human_arts_natural_scenes_are_trained_on_and_reported_like_its_art(natural):
    folder, other, printed = natural
    assert f"humanart:{other}: 34 people in 34 images to train on" in printed
    results = json.loads(results_of(folder))["adapted"]
    assert {"dance", "cartoon", f"all of humanart:{other}", "photo"} < set(results)


def test_a_domain_keeps_its_row_whatever_it_is_called_and_whatever_the_console_can_print(natural):
    folder, other, printed = natural
    results = json.loads(results_of(folder))["adapted"]
    assert {"\u901f\u5199", "shadow play"} < set(results)
    rows = dict(line.rsplit(maxsplit=7)[::7] for line in printed.splitlines()
                if len(line.split()) > 7)
    assert rows["\\u901f\\u5199"] == rows["shadow play"] == "1"  # person
    people = [numbers["people"] for row, numbers in results.items() if "all of" not in row]
    whole = [numbers["people"] for row, numbers in results.items() if "all of" in row]
    assert sum(people) == sum(whole)


def test_each_domain_is_said_with_the_sentence_that_its_images_read(natural):
    _, _, printed = natural
    for domain, word in (("photo", "human"), ("dance", "dance"), ("shadow play", "shadow play")):
        assert f'images of the domain {domain!r} read "a photo of a {word} character"' in printed


def test_a_mean_is_of_the_domains_that_have_a_number_and_how_many_those_are_is_said(capsys):
    tables = {"original": {
        "photo": {"AP": 0.5, "PCK": 0.7, "people": 9}, "dance": {"AP": 0.3, "PCK": -1.0, "people": 4},
        "sketch": {"AP": -1.0, "PCK": -1.0, "people": 1}, "all of x": {"AP": 0.4, "PCK": 0.7, "people": 14}}}
    domain_of = {row: row for row in tables["original"]}
    train.print_domains(tables, domain_of, ["all of x"])
    rows = [line.rsplit(maxsplit=3) for line in capsys.readouterr().out.splitlines() if line]
    numbers = {title.strip(): values for title, *values in rows[1:]}
    assert numbers["mean of natural (PCK: 1 of 2)"] == ["0.400", "0.700", "13"]
    assert numbers["mean of artificial (AP: 0 of 1, PCK: 0 of 1)"] == ["-1.000", "-1.000", "1"]
    assert numbers["all of x"] == ["0.400", "0.700", "14"]


# ------------------------------------------------------------------------------ a split of one's own

def one_file(folder, figures, part=""):
    """Figures as one file in COCO's format in `folder`."""
    folder.mkdir()
    people = load_dataset(f"figures:{figures}{part}", "train")
    (folder / "images").symlink_to(below_common_folder(people.files)[0])
    (folder / "people.json").write_text(json.dumps(to_coco(people)), "utf-8")
    return f"coco:{folder / 'people.json'}", len(people.files)


def test_with_a_file_to_test_on_nothing_of_the_target_is_held_out(cache, tmp_path):
    figures = cache / train.FIGURES
    art, images = one_file(tmp_path / "art", figures, "#artificial")
    test, others = one_file(tmp_path / "test", figures, "#photo")
    mine = ["--cache", str(cache), "--target", art, "--test", test]
    source, target, tests = train.vlpose_data(options(*mine))
    assert len(target.files) == images and source.name == "figures#natural"
    assert [each.dataset.name for each in tests] == ["figures#natural", test]
    assert len(tests[-1].people) == others
    data = train.alignment_data(options("--mode", "uda", *mine, "--oracle"))
    assert len(data.target.files) == len(data.labelled_target.files) == images
    assert len(data.test.annotated) == others
    # A source that is the data to test on, too, is predicted once.
    _, _, tests = train.vlpose_data(options("--cache", str(cache), "--target", art, "--test",
                                            "figures#natural"))
    assert [each.dataset.name for each in tests] == ["figures#natural"]
    # Without --test some are held out.
    _, target, tests = train.vlpose_data(options("--cache", str(cache), "--target", art))
    assert 0 < len(tests[-1].dataset.files) == images - len(target.files) < images


def test_a_file_that_is_trained_on_is_not_to_test_on(cache, tmp_path):
    art, _ = one_file(tmp_path / "art", cache / train.FIGURES)
    with pytest.raises(DataError, match="--test coco:.*: expected other data than --target"):
        options("--target", art, "--test", art)


def test_a_detectors_boxes_are_what_is_tested_on(natural, cache, tmp_path, capsys):
    folder, other, _ = natural
    contents = json.loads((other / "annotations" / "validation_humanart.json").read_text("utf-8"))
    boxes = [{"image_id": 10 ** 6, "bbox": [1, 1, 9, 9], "score": 0.5}]
    for person in contents["annotations"]:
        boxes.append({"image_id": person["image_id"], "bbox": person["bbox"], "score": 0.9,
                      "category_id": 1})
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    assert main(command(cache, tmp_path / "boxed", "--target", f"humanart:{other}", "--boxes",
                        str(tmp_path / "boxes.json"))) == 0
    assert ": they are of other images" in capsys.readouterr().err
    tables = [json.loads(results_of(name)) for name in (folder, tmp_path / "boxed")]
    whole = f"all of humanart:{other}"
    # the boxes are the true ones
    assert tables[0]["original"][whole]["AP"] == tables[1]["original"][whole]["AP"]
    assert tables[1]["original"][whole]["PCK"] == -1
    assert tables[0]["original"]["photo"] == tables[1]["original"]["photo"]


@pytest.mark.parametrize("sentences", ["description", "file"])
def test_sentences_may_be_the_images_own_or_those_of_a_file_read_token_by_token(
        cache, tmp_path, sentences):
    if sentences == "file":
        sentences = str(tmp_path / "sentences.json")
        names = {style: f"{style}, {'very ' * n}fine" for n, style in enumerate(train.load_dataset(
            f"figures:{cache / train.FIGURES}", "val").domains.tolist())}
        (tmp_path / "sentences.json").write_text(json.dumps(names))
    assert main(command(cache, tmp_path / "run", "--sentences", sentences, "--per-token")) == 0
    about = {"text_weights": "random", "sentences": sentences, "per_token": True}
    assert load_model(tmp_path / "run" / "model.pth").about == about
    results = json.loads(results_of(tmp_path / "run"))
    assert results["adapter off"] == results["original"] != results["adapted"]


def test_source_images_of_the_papers_recipe_are_seen_in_random_views_with_their_keypoints():
    images, views = torch.rand(4, 3, 64, 64), uda.Views(color=0.0)
    images[:, :, 30:33, 40:43] = 9.0  # a bright spot
    points = torch.tensor([[[41.0, 31.0], [500.0, 0.0]]]).expand(4, -1, -1)
    visible = torch.ones(4, 2)
    seen, moved, visible = uda.source_view(images, points, visible, views)
    assert not torch.equal(seen, images) and visible[:, 1].sum() == 0
    for view, (x, y), inside in zip(seen, moved[:, 0], visible[:, 0]):
        if inside:
            assert view[0, y.round().int().clamp(0, 63),
                        x.round().int().clamp(0, 63)] > 0.9 or min(x, y) < 1


# -------------------------------------------------------- the papers' commands, on small stand-ins

@pytest.fixture
def stand_ins(cache, tmp_path):
    """The folders of the papers' commands, in their own formats, with a few drawn people."""
    figures = cache / train.FIGURES
    people = train.load_dataset(f"figures:{figures}", "train")
    humanart(tmp_path, figures)
    coco = tmp_path / "coco"
    (coco / "annotations").mkdir(parents=True)
    for split, source in (("train", "training"), ("val", "validation")):
        shutil.copytree(figures / "images" / "photo", coco / f"{split}2017")
        path = figures / "annotations" / f"{source}_figures.json"
        contents = json.loads(path.read_text("utf-8"))
        images = [image | {"file_name": Path(image["file_name"]).name}
                  for image in contents["images"] if image["category"] == "photo"]
        known = {image["id"] for image in images}
        for image in images:
            del image["category"]  # COCO's images have none
        annotations = [person for person in contents["annotations"] if person["image_id"] in known]
        contents |= {"images": images, "annotations": annotations}
        path = coco / "annotations" / f"person_keypoints_{split}2017.json"
        path.write_text(json.dumps(contents))
    for split in ("train", "val"):
        for part in range(3):
            folder = tmp_path / "SURREAL" / split / f"run{part}"
            folder.mkdir(parents=True)
            records = [{"name": f"{n}.jpg",
                        "keypoint2d": np.resize(people.keypoints[n, :, :2], (24, 2)).tolist()}
                       for n in range(4)]
            folder.with_suffix(".json").write_text(json.dumps(records))
            for n in range(4):
                shutil.copy(people.files[n], folder / f"{n}.jpg")
    (tmp_path / "Human36M" / "annotations").mkdir(parents=True)
    shutil.copytree(figures / "images" / "photo", tmp_path / "Human36M" / "crop_images")
    photos = sorted((tmp_path / "Human36M" / "crop_images").iterdir())
    for subject in (1, 5, 6, 7, 8, 9, 11):
        records = [{"name": photo.name, "keypoint2d": (10.0 * np.arange(32)).reshape(16, 2).tolist()}
                   for photo in photos[:2]]
        path = tmp_path / "Human36M" / "annotations" / f"keypoints2d_{subject}.json"
        path.write_text(json.dumps(records))
    scipy = pytest.importorskip("scipy.io")
    (tmp_path / "LSP" / "images").mkdir(parents=True)
    joints = np.resize(people.keypoints[:6, :14, :2].transpose(2, 1, 0), (3, 14, 6))
    joints[2] = 0
    scipy.savemat(tmp_path / "LSP" / "joints.mat", {"joints": joints})
    for n in range(6):
        shutil.copy(people.files[n], tmp_path / "LSP" / "images" / f"im{n + 1:04}.jpg")
    box = {"image_id": 1, "bbox": [9, 9, 90, 120], "score": 0.9}
    (tmp_path / "boxes.json").write_text(json.dumps([box]))
    return tmp_path


PAGE = (ROOT / "assets" / "protocol.md").read_text("utf-8")
COMMANDS = [line.split() for line in re.sub(r" \\\n\s+", " ", PAGE).splitlines()
            if line.startswith("    python train.py")]
assert len(COMMANDS) == 3


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_papers_commands_train_on_data_in_its_real_format(
        words, stand_ins, cache, tmp_path, capsys):
    """As a dry run with the paper's numbers, then for a few steps of a small model."""
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "vitpose.pth", PoseModel(VIT_CONFIGS["tiny"]))
    swap = {"vitpose-h": tmp_path / "vitpose.pth", "resnet101": tmp_path / "vitpose.pth",
            "ViT-B/32": "random",
            "HumanArt_validation_detections_AP_H_56_person.json": tmp_path / "boxes.json"}
    argv = []
    for word in words[2:]:
        word = str(swap.get(word, word)).replace("/data/HumanArt", f"{tmp_path}/humanart")
        argv.append(word.replace("/data", str(tmp_path)))
    if "adain-encoder" in argv:  # a download; the small encoder does as well here
        place = argv.index("--style-encoder")
        argv = argv[:place] + argv[place + 2:]
    small = ["--cache", str(cache), "--device", "cpu", "--batch-size", "4"]
    small += ["--size", "tiny"] if "uda" in argv else []
    plan = plan_of(cache, capsys, *argv, *small)
    if "uda" in argv:
        assert list(plan) == ["style", "source", "restyled", "adapt"]
        assert "20,000 steps" in plan["source"]
        assert "15,000 steps of 4 crops" in plan["adapt"]
        assert "500,000 steps of 16 crops" in plan["style"]
        small += [*CROPS, "--style-steps", "2", "--style-batch", "4", "--supervised-steps", "2"]
    else:
        # 210 epochs of 34 people
        assert list(plan) == ["adapt"] and "1,890 steps of 4 crops" in plan["adapt"]
        assert "validation every 90 steps" in plan["adapt"]
    assert main([*argv, *small, "--steps", "2", "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "results.json").exists()
