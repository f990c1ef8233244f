"""What must hold when torchrun starts several processes, or a batch is computed in parts: the same as otherwise."""
import argparse
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

import train
import uda
from conftest import ROOT
from data import (COCO17, SyncBatchNorm, all_items, average_gradients, draw_figures, encode_heatmaps,
                  first_process_first, load_dataset, mean_of_all, my_share, seed_step)
from eval import predict
from train import grid_pck, heatmap_loss, prepare
from uda import (GENTLE_VIEWS, Compute, MultiLevelAlignment, StyleTransfer, jitter_color, occlude, random_affine,
                 source_view)
from vlpose import PoseModel, ViTConfig, VLPose

N = 2  # processes
VIT = ViTConfig(32, 2, 4, 0.0, 0, 1.0, image_size=(64, 64), decoder_dim=16, sigma=1.0, conv_stem=True)
SIZE, SMALL = (64, 64), (16, 16)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    draw_figures(folder, {"train": (24, 12), "val": (67, 2)})
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
    torch.multiprocessing.start_processes(run_process, (function, folder, arguments), N, start_method="fork")
    return [torch.load(folder / f"{rank}.pth", weights_only=False) for rank in range(N)]


# ----------------------------------------------------------------------------------------------- parts of one step

def example():
    """Source images with labels, and target images."""
    generator = torch.Generator().manual_seed(0)
    visible = torch.ones(8, 17)
    visible[:3, :9] = 0  # one process has fewer labels than the other
    labels = encode_heatmaps(64 * torch.rand(8, 17, 2, generator=generator), visible, SIZE, SMALL, VIT.sigma)
    source, target = torch.rand(2, 8, 3, *SIZE, generator=generator)
    return source, *labels, target


def new_model():
    torch.manual_seed(0)
    model = PoseModel(VIT)
    nn.init.normal_(model.head.predictor.weight, std=0.1)
    return model


def alignment_step(compute=Compute(), without_batchnorm=False, strategy="full"):
    """What a step of alignment on this process's part of the example makes of the model."""
    student, stylist = new_model(), StyleTransfer(width=4, depth=1)
    if strategy == "vlpose":
        student = VLPose(student, 8, num_prompts=2)
        student.matcher.p = 0.0
    if without_batchnorm:
        student.head.block1[1] = student.head.block2[1] = nn.Identity()
        student.backbone.patch_embed = nn.Conv2d(3, 32, 16, stride=16)
    weights = uda.LossWeights(1.0, 0.1, 100.0)
    alignment = MultiLevelAlignment(student, lambda content, style: stylist.restyle(content, style, 0.5), weights,
                                    replace(GENTLE_VIEWS, occlusion=0.8, patch=0.15), 0.5, None, compute)
    prepare(alignment, checkpointing=False)
    trained = [parameter for parameter in alignment.parameters() if parameter.requires_grad]
    seed_step(5)
    text = [(torch.ones(len(my_share(range(8))), 1, 8), None)] * 2 if strategy == "vlpose" else []
    loss, heatmaps = alignment(*map(my_share, example()), *text)
    loss.backward()
    average_gradients(trained)
    loss, gradients = mean_of_all(loss.detach()), [parameter.grad for parameter in trained]
    torch.optim.SGD(trained, 0.1).step()
    uda.ema_update(alignment.teacher, alignment.student, 0.5)
    return {"loss": loss, "gradients": gradients, "state": dict(alignment.state_dict()), "heatmaps": heatmaps.detach()}


def drawn():
    """What happens at random to this process's part of a batch, and numbers that differ from process to process."""
    images = my_share(torch.rand(12, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    heatmaps = my_share(torch.rand(12, 5, 16, 16, generator=torch.Generator().manual_seed(2))) * 1.2
    torch.manual_seed(0)
    stylist = StyleTransfer(width=4, depth=1)
    seed_step(2)
    found = {"restyled": stylist.restyle(images, 1 - images, 0.5), "maps": random_affine(len(images), SIZE),
             "colours": jitter_color(images),
             "occluded": occlude(images, heatmaps, torch.eye(2, 3).expand(len(images), 2, 3)),
             "view": source_view(images, torch.zeros(len(images), 2, 2), torch.ones(len(images), 2), GENTLE_VIEWS)[0]}
    return found | {"images": images, "dropout": torch.nn.functional.dropout(torch.ones(100))}


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
    norm = SyncBatchNorm(3)
    norm(my_share(torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(3)) + 2))
    return {"full": alignment_step(), "vlpose": alignment_step(strategy="vlpose"), "drawn": drawn(), "order": order,
            "gradient": model.weight.grad, "norm": norm.state_dict(), "everyone": all_items([dist.get_rank()] * 2),
            "poses": predict(new_model(), figures, batch_size=16),
            "pck": grid_pck(new_model(), figures, COCO17.groups), "rows": my_share(list(range(67)), 16)}


@pytest.fixture(scope="module")
def both(cache, tmp_path_factory):
    return in_processes(many_things, tmp_path_factory.mktemp("processes"), cache)


def close(found, expected, **tolerance):
    torch.testing.assert_close(found, expected, **{"rtol": 1e-4, "atol": 1e-6} | tolerance)


@pytest.mark.parametrize("strategy", ["full", "vlpose"])
def test_a_step_of_alignment_is_that_of_one_process_with_the_whole_batch(both, strategy):
    """Its loss with labels for some, the median over the batch, the mean heatmap over the batch, AdaIN's pairs, the
    gradients, the teacher, and all statistics of BatchNorm."""
    alone, (first, second) = alignment_step(strategy=strategy), [found[strategy] for found in both]
    close(first["loss"], alone["loss"])
    close(torch.cat([first["heatmaps"], second["heatmaps"]]), alone["heatmaps"])
    for mine_, other, whole in zip(first["gradients"], second["gradients"], alone["gradients"], strict=True):
        assert torch.equal(mine_, other)
        close(mine_, whole, rtol=1e-3, atol=1e-5)
    for name, tensor in alone["state"].items():
        close(first["state"][name], tensor, rtol=1e-3, atol=1e-5)
        assert torch.equal(first["state"][name], second["state"][name]), name


def test_what_happens_to_an_image_at_random_does_not_depend_on_the_number_of_processes(both):
    alone, (first, second) = drawn(), [found["drawn"] for found in both]
    for name in alone.keys() - {"dropout"}:
        close(torch.cat([first[name], second[name]]), alone[name])
    for name in ("restyled", "occluded"):  # of these, some images in both processes
        assert all((found[name] != found["images"]).any() for found in (first, second))


def test_what_networks_do_at_random_differs_from_process_to_process(both):
    assert not torch.equal(both[0]["drawn"]["dropout"], both[1]["drawn"]["dropout"])


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


def test_poses_and_pck_are_exactly_those_of_one_process_without_a_doubled_tail(both, cache):
    figures = load_dataset("figures#photo", "val", cache)
    poses, pck = predict(new_model(), figures, batch_size=16), grid_pck(new_model(), figures, COCO17.groups)
    for rank, found in enumerate(both):
        assert len(found["poses"]) == 67 and found["poses"] == poses and found["pck"] == pck
        assert found["everyone"] == [0, 0, 1, 1]
    assert both[0]["rows"] + both[1]["rows"] == list(range(67)) and len(both[0]["rows"]) % 16 == 0


# ------------------------------------------------------------------------------------------------- parts of a batch

def test_a_step_of_alignment_in_parts_is_that_of_the_whole_batch_but_for_batchnorm():
    whole, parts = (alignment_step(Compute(parts=parts), without_batchnorm=True) for parts in (1, 4))
    close(parts["loss"], whole["loss"])
    close(parts["gradients"], whole["gradients"], rtol=1e-3, atol=1e-6)


def test_there_are_never_more_parts_than_images():
    many, each = (alignment_step(Compute(parts=parts))["state"] for parts in (20, 8))
    close(many, each)  # a part without images would make statistics NaN


def test_parts_need_the_memory_of_one():
    def kept(compute):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            alignment_step(compute)
        return sum(sizes)
    assert kept(Compute(parts=4)) < 0.5 * kept(Compute())


@pytest.mark.parametrize("strategy", ["full", "vlpose"])
def test_gradients_of_parts_add_up_to_those_of_the_whole_batch(strategy):
    generator = torch.Generator().manual_seed(0)
    batch = {"image": torch.randint(0, 256, (8, 3, *SIZE), generator=generator, dtype=torch.uint8),
             "keypoints": 64 * torch.rand(8, 17, 2, generator=generator), "visible": (torch.rand(
                 8, 17, generator=generator) < 0.5).float(), "sentence": list("abababaa")}
    gradients = []
    for parts in (1, 4):
        model, texts = new_model(), None
        if strategy == "vlpose":
            model, texts = VLPose(model, 8, num_prompts=2), {"a": torch.ones(1, 8), "b": torch.zeros(1, 8)}
        model.eval()  # neither BatchNorm's statistics nor dropout: they depend on the part
        loss, _ = heatmap_loss(model, texts, Compute(parts=parts), batch)
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    close(*gradients, rtol=1e-3)


# --------------------------------------------------------------------------------------------------------- whole runs

def torchrun(arguments, driver="train.py"):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={N}", "--master_port=0",
               "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", str(driver), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def command(cache, out, *more):
    return ["--cache", str(cache), "--out", str(out), "--steps", "6", "--batch-size", "4", "--device", "cpu", *more]


def losses(folder):
    return [float(line.split(",")[2]) for line in (folder / "log.csv").read_text().splitlines()[1:]]


@pytest.mark.parametrize("mode, more", [
    ("vlpose", "--strategy full --base-steps 6 --validate-every 1"),
    ("uda", "--style-steps 4 --supervised-steps 6 --target figures#cartoon --oracle")])
def test_a_run_of_two_processes_is_that_of_one(mode, more, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    driver = tmp_path / "driver.py"  # logs every step
    driver.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport train\ntrain.LOG_EVERY = 1\n"
                      "sys.exit(train.main())\n")
    more = ["--mode", mode, *more.split()]
    caches = [tmp_path / f"cache-{n}" for n in range(2)]
    for folder in caches:
        folder.mkdir()
        (folder / "figures-1").symlink_to(cache / "figures-1")
    assert train.main(command(caches[0], tmp_path / "one", *more)) == 0
    two = torchrun(command(caches[1], tmp_path / "two", *more), driver)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("run folder:") == 1
    assert json.loads((tmp_path / "two/config.json").read_text())["processes"] == 2
    # Heatmaps of an untrained model are nearly flat: where they are highest, a rounding error decides.
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-2 if mode == "uda" else 1e-3)
    one, two = ({file.name.replace(".older", "") for file in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert len(list(caches[1].glob("*.pth"))) == len(list(caches[0].glob("*.pth"))) > 0

    capsys.readouterr()
    assert train.main(["--resume", str(tmp_path / "two")]) == 0  # tests/faults.py kills runs of two processes
    assert "goes on with another number of processes, 1" in capsys.readouterr().out


def test_an_error_in_all_processes_is_one_line(cache, tmp_path):
    failed = torchrun(command(cache, tmp_path / "out", "--batch-size", "3"))
    lines = [line for line in failed.stderr.splitlines() if line.startswith("error:")]
    assert failed.returncode != 0 and len(lines) == 1, failed.stderr
    assert "stage base: expected a batch size that is a multiple of 2" in lines[0]


def test_an_error_in_one_process_ends_all_with_its_message(cache, tmp_path, rank=1):
    driver = tmp_path / "driver.py"
    driver.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                      "import train\nfrom data import DataError, processes\nloss = train.heatmap_loss\n"
                      "def failing(*arguments):\n"
                      f"    if processes()[0] == {rank}: raise DataError('this picture is broken')\n"
                      "    return loss(*arguments)\n"
                      "train.heatmap_loss = failing\n"
                      "sys.exit(train.main())\n")
    failed = torchrun(command(cache, tmp_path / "out", "--base-steps", "3"), driver)
    assert failed.returncode != 0
    assert re.findall("^error: .*", failed.stderr, re.M) == ["error: this picture is broken"]
    assert "process_group" not in failed.stdout


@pytest.mark.parametrize("mode, more", [
    ("vlpose", "--base-steps 4 --accumulate 2"), ("vlpose", "--base-steps 4 --accumulate 3"),
    ("uda", "--style-steps 2 --supervised-steps 2 --accumulate 3")])
def test_a_run_may_be_computed_in_parts(mode, more, cache, tmp_path):
    assert train.main(command(cache, tmp_path / "parts", "--mode", mode, *more.split())) == 0
