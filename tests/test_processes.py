"""What must hold when torchrun starts several processes, or a batch is computed in parts.

Without random numbers, the results are the same. Random numbers are each process's own: they have
the same distribution.
"""
import copy
import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import eval
import train
import uda
from conftest import CROPS, ROOT, run_program
from data import (COCO17, FIGURES, SyncBatchNorm, all_items, average_gradients, draw_figures,
                  encode_heatmaps, first_process_first, load_dataset, mean_of_all, my_share,
                  normalize, seed_step)
from eval import predict
from train import grid_pck, heatmap_loss, prepare
from uda import (GENTLE_VIEWS, Compute, LossWeights, MultiLevelAlignment, StyleTransfer, Views,
                 confidence_mask, information_maximization_loss, jitter_color, occlude,
                 random_affine, source_view)
from vlpose import PoseModel, ViTConfig, VLPose, in_parts

N = 2  # processes
VIT = ViTConfig(32, 2, 4, 0.0, 0, 1.0, image_size=(64, 64), decoder_dim=16, sigma=1.0,
                conv_stem=True)
SIZE, SMALL = (64, 64), (16, 16)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    draw_figures(folder, {"train": (4, 2), "val": (67, 2)})
    return folder


@pytest.fixture(scope="module")
def small_cache(tmp_path_factory):
    """Figures for whole runs. Two processes cannot share the people of a domain evenly."""
    folder = tmp_path_factory.mktemp("small")
    draw_figures(folder, {"train": (8, 8), "val": (5, 3)})
    return folder


def run_process(rank, function, folder, arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=N,
                            timeout=timedelta(seconds=120))
    torch.save(function(*arguments), folder / f"{rank}.pth")
    dist.barrier()
    dist.destroy_process_group()


def in_processes(function, folder, *arguments):
    """What a function returns in each of two processes."""
    torch.multiprocessing.start_processes(run_process, (function, folder, arguments), N,
                                          start_method="fork")
    return [torch.load(folder / f"{rank}.pth", weights_only=False) for rank in range(N)]


# -------------------------------------------------------------------------------- parts of one step

def example():
    """Source images with labels, and target images."""
    generator = torch.Generator().manual_seed(0)
    visible = torch.ones(8, 17)
    visible[:3, :9] = 0  # one process has fewer labels than the other
    points = 64 * torch.rand(8, 17, 2, generator=generator)
    labels = encode_heatmaps(points, visible, SIZE, SMALL, VIT.sigma)
    source, target = torch.rand(2, 8, 3, *SIZE, generator=generator)
    return source, *labels, target


def new_model():
    torch.manual_seed(0)
    model = PoseModel(VIT)
    nn.init.normal_(model.head.predictor.weight, std=0.1)
    return model


NOTHING_RANDOM = Views(rotation=0, shear=0, shift=0, scale=(1, 1), color=0, occlusion=0)


def alignment_step(compute=Compute(), without_batchnorm=False, strategy="full", random=True):
    """What a step of alignment on this process's part of the example makes of the model."""
    student = new_model()
    stylist = StyleTransfer(width=4, depth=1)
    if strategy == "vlpose":
        student = VLPose(student, 8, num_prompts=2)
        student.matcher.p = 0.0
    if without_batchnorm:
        student.head.block1[1] = student.head.block2[1] = nn.Identity()
        student.backbone.patch_embed = nn.Conv2d(3, 32, 16, stride=16)

    def restyle(content, style):
        if random:
            return stylist.restyle(content, style, 0.5)
        return stylist(content, style, 0.5)

    views = replace(GENTLE_VIEWS, occlusion=0.8, patch=0.15) if random else NOTHING_RANDOM
    weights = LossWeights(1.0, 0.1, 100.0)
    alignment = MultiLevelAlignment(student, restyle, weights, views, 0.5, None, compute)
    prepare(alignment, checkpointing=False)
    trained = [parameter for parameter in alignment.parameters() if parameter.requires_grad]
    seed_step(5)
    text = []
    if strategy == "vlpose":
        text = [(torch.ones(len(my_share(range(8))), 1, 8), None)] * 2
    loss, heatmaps = alignment(*map(my_share, example()), *text)
    loss.backward()
    average_gradients(trained)
    loss = mean_of_all(loss.detach())
    losses = {name: mean_of_all(part.detach()) for name, part in alignment.losses.items()}
    gradients = [parameter.grad for parameter in trained]
    torch.optim.SGD(trained, 0.1).step()
    uda.ema_update(alignment.teacher, alignment.student, 0.5)
    return {"loss": loss, "losses": losses, "gradients": gradients,
            "state": dict(alignment.state_dict()), "heatmaps": heatmaps.detach()}


def of_the_whole_batch():
    """The mask of this process's heatmaps, and L_im, in which only p̄ is of the whole batch."""
    heatmaps = torch.rand(12, 5, 16, 16, generator=torch.Generator().manual_seed(2))
    heatmaps[:6] *= 0.9  # the median of one process's confidences is not that of the other's
    mine = (10 * my_share(heatmaps)).requires_grad_()
    information = information_maximization_loss(mine)
    information.backward()
    return {"mask": confidence_mask(mine.detach()), "L_im": mean_of_all(information.detach()),
            "gradient": mine.grad}


def drawn(seed=2):
    """Much that happens at random to the images of this process."""
    images = torch.rand(400, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    sure = torch.zeros(400, 1, 8, 8)
    sure[:, :, 4, 4] = 1  # in the middle
    torch.manual_seed(0)
    stylist = StyleTransfer(width=4, depth=1)
    seed_step(seed)
    still = torch.eye(2, 3).expand(400, 2, 3)
    keypoints = torch.full((400, 1, 2), 7.5)
    view, moved, _ = source_view(images, keypoints, torch.ones(400, 1), GENTLE_VIEWS)
    return {"restyled": stylist.restyle(images, 1 - images, 0.5) - images,
            "maps": random_affine(2000, SIZE), "colours": jitter_color(images),
            "occluded": occlude(images, sure, still, size=4) - images,
            "view": view, "moved": moved, "dropout": nn.functional.dropout(torch.ones(100))}


def many_things(cache):
    """All that the tests below look at, in one start of two processes."""
    figures = load_dataset("figures#photo", "val", cache)
    model = nn.Linear(2, 2)
    if dist.get_rank() == 0:
        model(torch.ones(1, 2)).sum().backward()  # the other process has no gradient at all
    average_gradients(list(model.parameters()))
    order = []
    with first_process_first():
        order.append(torch.tensor(os.times().elapsed))
        if dist.get_rank() == 0:
            torch.randn(1500, 1500) @ torch.randn(1500, 1500)
        order.append(torch.tensor(os.times().elapsed))
    eval.BATCH_SIZE = 16  # more than one batch for each process
    norm = SyncBatchNorm(3)
    images = my_share(torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(3)) + 2)
    norm(images)
    in_two_parts = SyncBatchNorm(3)
    outputs, = in_parts(lambda x: (in_two_parts(x),), in_two_parts, 2, images.requires_grad_())
    once = copy.deepcopy(in_two_parts.state_dict())
    outputs.sum().backward()  # each part is computed for the second time
    return {"full": alignment_step(random=False),
            "vlpose": alignment_step(strategy="vlpose", random=False),
            "whole": of_the_whole_batch(),
            "random step": alignment_step(), "random step again": alignment_step(),
            "drawn": drawn(), "drawn again": drawn(), "drawn with another seed": drawn(seed=3),
            "order": order, "gradient": model.weight.grad, "norm": norm.state_dict(),
            "norm in parts": (once, in_two_parts.state_dict()),
            "everyone": all_items([dist.get_rank()] * 2),
            "poses": predict(new_model(), figures),
            "pck": grid_pck(new_model(), figures, COCO17.groups),
            "rows": my_share(list(range(67)), 16)}


@pytest.fixture(scope="module")
def both(cache, tmp_path_factory):
    importlib.import_module("torch._dynamo")  # as optimizers do: here once, not in each process
    return in_processes(many_things, tmp_path_factory.mktemp("processes"), cache)


def close(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **{"rtol": 1e-4, "atol": 1e-6} | tolerance)


@pytest.mark.parametrize("strategy", ["full", "vlpose"])
def test_without_random_numbers_a_step_is_that_of_one_process_with_the_whole_batch(both, strategy):
    """Its loss with labels for some, the median over the batch, the mean heatmap over the batch,
    AdaIN's pairs, the gradients, the teacher, and all statistics of BatchNorm."""
    alone = alignment_step(strategy=strategy, random=False)
    first, second = [found[strategy] for found in both]
    close(first["loss"], alone["loss"])
    assert list(first["losses"]) == ["supervised", "consistency", "feature_level", "pose_level"]
    close(first["losses"], alone["losses"])
    close(torch.cat([first["heatmaps"], second["heatmaps"]]), alone["heatmaps"])
    gradients = [found["gradients"] for found in (first, second, alone)]
    for one, other, whole in zip(*gradients, strict=True):
        assert torch.equal(one, other)
        close(one, whole, rtol=1e-3, atol=1e-5)
    for name, tensor in alone["state"].items():
        close(first["state"][name], tensor, rtol=1e-3, atol=1e-5)
        assert torch.equal(first["state"][name], second["state"][name]), name


def test_the_mask_and_the_mean_heatmap_are_those_of_the_whole_batch(both):
    alone = of_the_whole_batch()
    first, second = [found["whole"] for found in both]
    assert torch.equal(torch.cat([first["mask"], second["mask"]]), alone["mask"])
    assert first["mask"].float().mean() < 0.4 < 0.6 < second["mask"].float().mean()
    close(first["L_im"], alone["L_im"])
    gradients = torch.cat([first["gradient"], second["gradient"]]) / N  # of the mean of two losses
    close(gradients, alone["gradient"], rtol=1e-3, atol=1e-9)


def test_with_random_numbers_both_processes_still_have_one_model(both):
    first, second = [found["random step"] for found in both]
    for one, other in zip(first["gradients"], second["gradients"], strict=True):
        assert torch.equal(one, other) and torch.isfinite(one).all()
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][name]), name


def test_random_numbers_differ_from_process_to_process_and_repeat_with_the_same_seed(both):
    first, second = both
    for name, numbers in first["drawn"].items():
        assert not torch.equal(numbers, second["drawn"][name]), name
        for found in both:
            once = found["drawn"][name]
            assert torch.equal(once, found["drawn again"][name]), name
            assert not torch.equal(once, found["drawn with another seed"][name]), name
    for found in both:
        close(found["random step"], found["random step again"], rtol=0, atol=0)


def test_random_numbers_have_the_distribution_of_one_process(both):
    alone = drawn(seed=4)
    for found in both:
        for name in ("restyled", "occluded"):  # the share of the images that change
            changed = (found["drawn"][name] != 0).flatten(1).any(1)
            assert changed.float().mean().item() == pytest.approx(0.5, abs=0.08), name
        for name in ("maps", "moved"):
            numbers = found["drawn"][name].flatten(1)  # (draws, ...)
            whole = alone[name].flatten(1)
            spread = whole.max(0).values - whole.min(0).values
            for statistic in (torch.mean, torch.std):
                difference = statistic(numbers, 0) - statistic(whole, 0)
                assert (difference.abs() < 0.06 * spread).all(), name
            assert ((numbers.max(0).values - whole.max(0).values).abs() < 0.1 * spread).all(), name
            assert ((numbers.min(0).values - whole.min(0).values).abs() < 0.1 * spread).all(), name


def test_a_gradient_that_one_process_lacks_counts_as_zero(both):
    for found in both:
        close(found["gradient"], torch.full((2, 2), 0.5))


def test_the_first_process_goes_first_and_the_others_wait(both):
    (_, done), (begun, _) = both[0]["order"], both[1]["order"]
    assert done <= begun


def test_batchnorm_gathers_the_statistics_of_all_processes(both):
    norm = nn.BatchNorm2d(3)
    norm(torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(3)) + 2)
    for found in both:
        close(found["norm"], dict(norm.state_dict()))


def test_batchnorms_statistics_of_all_processes_move_once_with_each_part(both):
    for found in both:
        once, twice = found["norm in parts"]
        assert twice["running_mean"].tolist() == once["running_mean"].tolist()
        assert twice["running_var"].tolist() == once["running_var"].tolist()


def test_poses_and_pck_are_exactly_those_of_one_process_without_a_doubled_tail(
        both, cache, monkeypatch):
    figures = load_dataset("figures#photo", "val", cache)
    monkeypatch.setattr(eval, "BATCH_SIZE", 16)
    poses = predict(new_model(), figures)
    pck = grid_pck(new_model(), figures, COCO17.groups)
    for rank, found in enumerate(both):
        assert len(found["poses"]) == 67 and found["poses"] == poses and found["pck"] == pck
        assert found["everyone"] == [0, 0, 1, 1]
    assert both[0]["rows"] + both[1]["rows"] == list(range(67)) and len(both[0]["rows"]) % 16 == 0


# --------------------------------------------------------------------------------- parts of a batch

def test_a_step_of_alignment_in_parts_is_that_of_the_whole_batch_but_for_batchnorm():
    whole = alignment_step(Compute(parts=1), without_batchnorm=True)
    parts = alignment_step(Compute(parts=4), without_batchnorm=True)
    close(parts["loss"], whole["loss"])
    close(parts["gradients"], whole["gradients"], rtol=1e-3, atol=1e-6)


def test_there_are_never_more_parts_than_images():
    many, each = (alignment_step(Compute(parts=parts))["state"] for parts in (20, 8))
    close(many, each)  # a part without images would make statistics NaN


def test_parts_need_the_memory_of_one():
    def kept(compute):
        sizes = []

        def pack(x):
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            alignment_step(compute)
        return sum(sizes)
    assert kept(Compute(parts=4)) < 0.5 * kept(Compute())


def test_batchnorms_statistics_move_once_with_each_part():
    batch = random_batch()
    expected = new_model().train()
    for part in normalize(batch["image"] / 255).tensor_split(4):
        expected(part)
    model = new_model().train()
    loss, _, _ = heatmap_loss(model, batch, None, Compute(parts=4))
    loss.backward()  # each part is computed for the second time
    assert all(layer.momentum == 0.1 for layer in model.modules() if hasattr(layer, "momentum"))
    for name, statistics in expected.named_buffers():
        if "running" in name:
            assert torch.equal(model.get_buffer(name), statistics)


def random_batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 3, *SIZE), generator=generator, dtype=torch.uint8)
    return {"image": images, "keypoints": 64 * torch.rand(8, 17, 2, generator=generator),
            "visible": (torch.rand(8, 17, generator=generator) < 0.5).float(),
            "sentence": list("abababaa")}


@pytest.mark.parametrize("strategy", ["full", "vlpose"])
def test_gradients_of_parts_add_up_to_those_of_the_whole_batch(strategy):
    batch = random_batch()
    gradients = []
    for parts in (1, 4, 3):  # 3 do not divide 8
        model, texts = new_model(), None
        if strategy == "vlpose":
            model = VLPose(model, 8, num_prompts=2)
            texts = {"a": torch.ones(1, 8), "b": torch.zeros(1, 8)}
        model.eval()  # neither BatchNorm's statistics nor dropout: they depend on the part
        loss, _, _ = heatmap_loss(model, batch, texts, Compute(parts=parts))
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for found in gradients[1:]:
        close(found, gradients[0], rtol=1e-3)


# --------------------------------------------------------------------------------------- whole runs

LAUNCH = [f"--nproc_per_node={N}", "--master_port=0", "--rdzv_backend=c10d",
          "--rdzv_endpoint=127.0.0.1:0"]


def torchrun(script, *argv):
    return run_program(script, *argv, launch=LAUNCH)


def torchrun_itself(script, *argv):
    """The same with nothing of the tests between: slower."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", *LAUNCH, script, *argv],
                          capture_output=True, text=True, cwd=ROOT, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def command(cache, out, *more):
    return ["--cache", str(cache), "--out", str(out), "--steps", "6", "--batch-size", "4",
            "--device", "cpu", *more]


def losses(folder):
    lines = (folder / "log.csv").read_text("utf-8").splitlines()[1:]
    return [float(line.split(",")[2]) for line in lines]


DRIVER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import train
import uda
train.LOG_EVERY = 1  # every step is logged
# What alignment draws at random is each process's own. Without it, the numbers must be equal.
uda.random_affine = lambda count, size, views: torch.eye(2, 3).repeat(count, 1, 1)
uda.jitter_color = lambda images, strength: images
uda.StyleTransfer.restyle = lambda self, content, style, probability: self(content, style)
sys.exit(train.main())
"""


@pytest.mark.parametrize("mode, more", [
    ("vlpose", "--strategy full --base-steps 6 --validate-every 1"),
    ("uda", "--style-steps 4 --supervised-steps 6 --target figures#cartoon --oracle "
            "--occlusion 0")])
def test_a_run_of_two_processes_is_that_of_one(mode, more, small_cache, tmp_path, capsys):
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    more = ["--mode", mode, *more.split(), *CROPS]
    caches = [tmp_path / f"cache-{n}" for n in range(2)]
    for folder in caches:
        folder.mkdir()
        (folder / FIGURES).symlink_to(small_cache / FIGURES)
    one = run_program(driver, *command(caches[0], tmp_path / "one", *more))
    assert one.returncode == 0, one.stderr
    two = torchrun(driver, *command(caches[1], tmp_path / "two", *more))
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("run folder:") == 1
    assert json.loads((tmp_path / "two/config.json").read_text("utf-8"))["processes"] == 2
    # An untrained model's heatmaps are nearly flat: a rounding error decides where their peak is.
    tolerance = 1e-2 if mode == "uda" else 1e-3
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=tolerance)
    files = [{file.name.replace(".older", "") for file in (tmp_path / name).iterdir()}
             for name in ("one", "two")]
    assert files[0] == files[1]
    trained = [len(list(folder.glob("*.pth"))) for folder in caches]
    assert trained[0] == trained[1] > 0

    # faults.py kills runs of two processes
    assert train.main(["--resume", str(tmp_path / "two")]) == 0
    assert "goes on with another number of processes, 1" in capsys.readouterr().out


def test_an_error_in_all_processes_is_one_line(small_cache, tmp_path):
    failed = torchrun(ROOT / "train.py", *command(small_cache, tmp_path / "out", "--batch-size",
                                                  "3"))
    lines = [line for line in failed.stderr.splitlines() if line.startswith("error:")]
    assert failed.returncode != 0 and len(lines) == 1, failed.stderr
    assert "stage base: expected a batch size that is a multiple of 2" in lines[0]


def test_an_error_in_one_process_ends_all_with_its_message(small_cache, tmp_path, rank=1):
    driver = tmp_path / "driver.py"
    driver.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train
import torch
from data import DataError, mean_of_all, processes
def failing(*arguments):
    if processes()[0] == {rank}:
        raise DataError('this picture is broken')
    mean_of_all(torch.ones(1))  # the other process waits for this one
train.new_optimizer = failing  # before PyTorch's compiler is imported, which takes seconds
sys.exit(train.main())
""")
    failed = torchrun_itself(driver, *command(small_cache, tmp_path / "out", "--base-steps", "3",
                                              *CROPS))
    assert failed.returncode != 0
    assert re.findall("^error: .*", failed.stderr, re.M) == ["error: this picture is broken"]
    assert "process_group" not in failed.stdout


@pytest.mark.parametrize("mode, more", [
    ("vlpose", "--base-steps 2 --accumulate 2"), ("vlpose", "--base-steps 2 --accumulate 3"),
    ("uda", "--style-steps 2 --supervised-steps 2 --accumulate 3")])
def test_a_run_may_be_computed_in_parts(mode, more, small_cache, tmp_path):
    assert train.main(command(small_cache, tmp_path / "parts", "--mode", mode, *more.split(),
                              *CROPS, "--steps", "2")) == 0
