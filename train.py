"""Training: the loop, and the stages of both methods.

    python train.py --mode vlpose        a base model on photographs, then VLPose's adapter on art
    python train.py --mode uda           labels in one domain, and alignment to images of another

The lesson, from top to bottom:
    1  VLPose's loss, and the loop that all stages share
    2  the stages of VLPose; `train_vlpose` is their table of contents
    3  the stages of multi-level alignment; `train_uda` is theirs
The first appendix has all options, with their defaults for minutes on a CPU and in the papers. The
others hold the plan of the stages and their batches, how `fit` computes, the run's folder, the
cache of trained models, data and models, tables and pictures, and the command.
"""
import copy
from dataclasses import dataclass, fields
from functools import partial

import torch

from uda import LossWeights, MultiLevelAlignment, source_view, supervised_loss
from vlpose import VLPose, check_adapter, heatmaps_of_images, text_inputs
from data import average_gradients, encode_heatmaps, first_process_first, seed_step

# ------------------------------------------------------------------------- 1. the loss and the loop

FALLS = (170 / 210, 200 / 210)  # ViTPose's: the learning rate falls after 170 and 200 of 210 epochs


@dataclass(frozen=True)
class Stage:
    """How one stage of a run trains. From `weight_decay` to `clip` the defaults are ViTPose's."""
    name: str
    steps: int
    lr: float
    batch_size: int
    seed: int
    bf16: bool                 # compute in bfloat16 where that is safe
    layer_decay: float = 1.0
    weight_decay: float = 0.1
    optimizer: str = "adamw"
    warm_up: int = 500         # steps, at most a tenth of all
    milestones: tuple = FALLS  # not with muon: the rate falls tenfold after these shares of steps
    clip: float = 1.0          # the greatest norm of a gradient; 0: any
    steady: str = ""           # parameters whose names start with this keep their learning rate
    validate_every: int = 0    # steps; 0: half of them, but from 100 to 1,000
    select: str = "last"       # or "best": the model to go on with


def heatmap_loss(model, batch, texts, compute):
    """Mean of ω (y - ŷ)² over images, keypoints and pixels -> (loss, ŷ, labels).

    ŷ (B, K, h, w) are the predicted heatmaps, y those of the labels; ω (B, K) is 0 where a keypoint
    is not labelled. The labels are keypoints (B, K, 2) and which are visible (B, K).
    texts: {sentence: T}, which a VLPose reads; None without text.
    """
    images, points, visible = labelled_images(batch, model)
    text = text_inputs(batch["sentence"], texts)
    predicted = heatmaps_of_images(model, images, compute, *text)      # ŷ; normalises, too
    heatmaps, weights = label_heatmaps(points, visible, model.config)  # y, ω
    loss = ((predicted - heatmaps) ** 2 * weights[:, :, None, None]).mean()
    return loss, predicted, (points, visible)


def labelled_images(batch, model, views=None):
    """Images (B, 3, H, W), their keypoints (B, K, 2), and which are visible (B, K), 0 or 1.

    views: how far a random view of each image goes; None leaves the images as they are.
    """
    images = rgb(batch, model)
    points = batch["keypoints"].to(images.device, non_blocking=True)
    visible = batch["visible"].to(images.device, non_blocking=True)
    if views is None:
        return images, points, visible
    return source_view(images, points, visible, views)


def rgb(batch, model):
    """A batch's images (B, 3, H, W) where the model is, RGB in [0, 1]."""
    device = next(model.parameters()).device
    return batch["image"].to(device, non_blocking=True) / 255


def label_heatmaps(points, visible, config):
    """Heatmaps (B, K, h, w) of labels, a quarter of the crops' size, and their weights (B, K)."""
    height, width = config.image_size
    size = (height // 4, width // 4)
    return encode_heatmaps(points, visible, config.image_size, size, config.sigma)


def fit(stage, model, loss_of, pools, run):
    """Trains what requires a gradient in `model`.

    A stage that was stopped goes on from its last checkpoint.

    loss_of: the model and a batch of each data set -> (loss, predicted heatmaps, labels). The last
        two are of the first batch, for the log: (B, K, h, w), and points and visible. Both may be
        None.
    pools: a pair for each data set: its Crops, and the rows of people to draw from.
    """
    optimizer = new_optimizer(model, stage)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    done = run.restore(stage, model, optimizer, pools)  # the number of steps
    prepare(model, run.options.checkpointing)
    batches_to_come = batches_of(pools, stage, done, run.options.workers)  # in shuffled passes
    for step, batches in enumerate(batches_to_come, start=done):
        seed_step(stage.seed * 10 ** 6 + step)  # what is random depends on the step and the seed
        for group in optimizer.param_groups:
            factor = 1 if group["steady"] else learning_rate(step, stage)
            group["lr"] = stage.lr * group["scale"] * factor

        optimizer.zero_grad(set_to_none=True)
        loss, predicted, labels = loss_of(model, *batches)
        loss.backward()
        stop_unless_finite(stage, step, loss, batches, pools)
        average_gradients(trained)
        if stage.clip:
            torch.nn.utils.clip_grad_norm_(trained, stage.clip)
        optimizer.step()

        run.after_step(stage, step + 1, loss.detach(), predicted, labels, model, optimizer)
    run.finish(stage, model)


def learning_rate(step, stage):
    """Factor of the learning rate: linear warm-up, then a linear or a stepwise fall."""
    warm_up = min(stage.warm_up, stage.steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    if stage.optimizer == "muon":
        return (stage.steps - step) / (stage.steps - warm_up)  # to 0
    falls = sum(step >= stage.steps * milestone - 1e-6 for milestone in stage.milestones)
    return 0.1 ** falls  # a tenth at each milestone


MUON_RATE = 10  # times the learning rate: a matrix learns at 0.02 where the rest learns at 0.002


class Muon(torch.optim.AdamW):
    """Muon for matrices and kernels, AdamW for the rest: see `parameter_groups`.

    Written as U S Vᵀ (singular values S), a sum of gradients has a few large singular values and
    many small ones, so that a plain step changes W along few directions. Muon steps along U Vᵀ,
    whose singular values are 1. Its authors suppose that rare but useful directions are then
    learned, too (kellerjordan.github.io/posts/muon; the weight decay λ is arXiv 2502.16982's).
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if not group["muon"]:
                continue
            lr = MUON_RATE * group["lr"]
            for W in group["params"]:
                if W.grad is None:
                    continue
                G = W.grad.flatten(1)  # a kernel (out, in, k, k) is a matrix (out, in · k · k)
                rows, columns = G.shape
                state = self.state[W]
                if not state:  # AdamW's `load_state_dict` wants a step
                    state.update(momentum=torch.zeros_like(G), step=torch.zeros(()))
                # M ← 0.95 M + G
                M = state["momentum"].mul_(0.95).add_(G)
                # W ← (1 - lr λ) W - lr √max(1, rows / columns) U Vᵀ,  where U S Vᵀ = G + 0.95 M
                direction = orthogonal(G + 0.95 * M).view_as(W)
                W.mul_(1 - lr * group["weight_decay"])
                W.sub_(direction, alpha=lr * max(1, rows / columns) ** 0.5)
                W.grad = None  # so that AdamW leaves it alone
        super().step()


# ---------------------------------------------------------------------------------------- 2. VLPose

def train_vlpose(options):
    """VLPose's experiment: does art get better, and do photographs stay as they were?"""
    with first_process_first():
        source, target, tests = vlpose_data(options)
        texts, text_dim = read_texts([target, *(test.dataset for test in tests)], options)
        base = starting_model(options, target.skeleton)
    adapter = adapter_of(options)
    if adapter:  # what cannot work fails here, before anything is trained
        check_adapter(base.config, adapter["decoder"], adapter["num_prompts"])
    plan = plan_vlpose(options, base, source, target)
    if options.dry_run:
        return

    def measure(stage, model):
        # tests[0] is the source's, tests[-1] the target's. Where only one is labelled it is both.
        if stage.name == "base":
            return validation(stage, model, tests[0], None, options.workers)
        return validation(stage, model, tests[-1], texts, options.workers)

    run = Run(options, measure, plan, base)

    # Stage 1: a base model learns from the source, unless --weights gives a trained one.
    if "base" in plan:
        loss_of = partial(heatmap_loss, texts=None, compute=run.compute)
        fit_or_find(plan["base"], base, loss_of, [vlpose_pool(source, base, options)], run)

    # Stage 2: what --strategy names is tuned on the target. With VLPose that is only an adapter.
    adapted = model_to_tune(base, text_dim, options)
    report_trained_share(adapted, base, options)
    if "adapt" in plan:
        loss_of = partial(heatmap_loss, texts=texts, compute=run.compute)
        fit(plan["adapt"], adapted, loss_of, [vlpose_pool(target, adapted, options)], run)

    # The original, the adapted model, and its adapter off.
    compare_poses(base, adapted, texts, tests, run)


def model_to_tune(base, text_dim, options):
    """A copy of the base model in which just what --strategy tunes requires a gradient.

    With an adapter it is a VLPose around the copy, and everything in the copy is frozen.
    """
    torch.manual_seed(options.seed)
    base = copy.deepcopy(base)
    adapter = adapter_of(options)
    if adapter:
        return VLPose(base, text_dim, **adapter).to(options.device)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(is_tuned(name, options.strategy, base.config.depth))
    return base


LORA = dict(decoder="baseline", num_prompts=0, rank=4)  # a VLPose with nothing but low-rank updates


def adapter_of(options):
    """What --strategy builds VLPose with; None if it tunes the base's own parameters."""
    if options.strategy == "vlpose":
        return dict(decoder=options.decoder, num_prompts=options.num_prompts,
                    matcher=options.matcher, rank=options.rank)
    if options.strategy == "prompt":
        return dict(decoder="baseline", num_prompts=options.num_prompts)
    if options.strategy == "lora":
        return LORA | dict(rank=options.rank or LORA["rank"])
    return None


# The first layers of a ViT, of a ResNet (two names) and of a Swin
STEM = ("backbone.patch_embed.",
        "backbone.body.conv1.", "backbone.body.bn1.",
        "backbone.body.features.0.")
UP = "backbone.up."  # the last layers of a ResNet or Swin, see `TorchvisionBackbone`


def is_tuned(name, strategy, depth):
    """Whether a strategy without an adapter tunes the parameter of this name.

    depth: the number of a ViT's blocks. `last` tunes the last block of a ViT, or the last layers of
        another backbone, and the predictor.
    """
    in_stem = name.startswith(STEM)
    in_last = name.startswith((f"backbone.blocks.{depth - 1}.", UP))
    in_predictor = name.startswith("head.predictor.")
    if strategy == "full":
        return True
    if strategy == "last":
        return in_last or in_predictor
    if strategy == "stem":
        return in_stem or in_predictor
    if strategy == "all-but-stem":
        return not in_stem
    return False  # scratch: the base as it is


# ------------------------------------------------------------------------- 3. multi-level alignment

def train_uda(options):
    """Alignment's experiment: how much of the gap to the target do unlabelled images close?"""
    with first_process_first():
        data = alignment_data(options)
        start = starting_model(options, data.test.skeleton, trunk_size=(256, 256))
        if options.strategy == "vlpose":
            check_adapter(start.config, "dual", None)
        stylist = new_stylist(options)
    restyle = restyling(stylist, options)
    plan = plan_uda(options, stylist, restyle, data)
    if options.dry_run:
        return

    test = TestSet(data.test, data.test, data.test.annotated)

    def measure(stage, model):
        if stage.name == "adapt":
            return validation(stage, model.student, test, data.texts, options.workers)
        return validation(stage, model, test, None, options.workers)

    pools = alignment_pools(data, start.config.image_size, options)
    run = Run(options, measure, plan, start, restyle)
    supervised = partial(source_loss, views=pools.source_views, compute=run.compute)

    # Stage 0: a style decoder learns to redraw source images in the style of target images.
    if "style" in plan:
        fit(plan["style"], stylist, style_loss, [pools.sources, pools.targets], run)

    # Stage 1: a model learns from the source's labels, unless --weights gives a trained one.
    source_only = start
    if "source" in plan:
        source_only = copy.deepcopy(start)
        fit_or_find(plan["source"], source_only, supervised, [pools.sources], run)

    # The student learns from the same start and labels, but some of its source images are restyled.
    # An adapter has no such stage: around the source-only model it keeps that model as it is.
    student = source_only
    if "restyled" in plan:
        student = copy.deepcopy(start)
        loss_of = partial(supervised, restyle=restyle)
        fit_or_find(plan["restyled"], student, loss_of, [pools.sources, pools.targets], run,
                    restyle, stylist)

    # Stage 2: student and teacher adapt to the target's images.
    alignment = adapt(plan["adapt"], student, restyle, data, pools, run)
    models = {"source only": source_only,
              "student": alignment.student, "teacher": alignment.teacher}

    # The oracle: what would the target's labels give in as many steps?
    if "oracle" in plan:
        models["oracle"] = copy.deepcopy(source_only)
        fit_or_find(plan["oracle"], models["oracle"], supervised, [pools.labelled_targets], run)

    # How good is each of them on the target?
    compare_pck(models, stylist, data, run)


def restyling(stylist, options):
    """The image level: (source images, target images) -> source images, some in the target's style.

    None leaves out the image level. To try another restyling, return a function of your own in the
    first line; it chooses itself which images it changes. `--image-level 0` then saves the training
    of the style decoder, and your function runs all the same.
    """
    if stylist is None:
        return None

    def restyle(source, target):
        return stylist.restyle(source, target, options.image_level)
    return restyle


def style_loss(stylist, source, target):
    """Stage 0: content loss + 0.1 style loss of the style decoder. It predicts no heatmaps."""
    content, style = stylist.loss(rgb(source, stylist), rgb(target, stylist))
    stylist.losses = {"content": content, "style": 0.1 * style}  # for the log
    return content + 0.1 * style, None, None


def source_loss(model, source, target=None, *, views, compute, restyle=None):
    """Stage 1, and the oracle: L_sup of a batch of labelled images -> (loss, ŷ, labels).

    With `restyle`, some of the images get the style of target images; see `restyling`.
    """
    images, points, visible = labelled_images(source, model, views)
    if restyle:
        images = restyle(images, rgb(target, model))                              # (B, 3, H, W)
    predicted = heatmaps_of_images(model, images, compute)                        # (B, K, h, w)
    loss = supervised_loss(predicted, *label_heatmaps(points, visible, model.config))
    return loss, predicted, (points, visible)


def adapt(stage, student, restyle, data, pools, run):
    """Stage 2: student and teacher adapt to the target's images.

    `MultiLevelAlignment.forward` is a step of this stage. With an adapter both methods work at
    once: the model stays as it is, and only the adapter around it learns.
    """
    options = run.options
    torch.manual_seed(options.seed)
    student = copy.deepcopy(student)
    if options.strategy != "full":  # both methods at once: only an adapter learns
        adapter = LORA if options.strategy == "lora" else {}
        student = VLPose(student, data.text_dim, **adapter)
    names = [entry.name for entry in fields(LossWeights)]  # of the options, too
    weights = LossWeights(**{name: getattr(options, name) for name in names})
    alignment = MultiLevelAlignment(
        student, restyle, weights, views=pools.target_views, decay=options.ema_decay,
        source_keypoints=pools.source_keypoints, compute=run.compute)
    alignment.to(options.device)

    def loss_of(alignment, source, target):  # L_sup + L_con + L_adv + L_im, each with its weight
        images, points, visible = labelled_images(source, alignment, pools.source_views)
        labels, label_weights = label_heatmaps(points, visible, alignment.config)
        loss, predicted = alignment(
            images, labels, label_weights, rgb(target, alignment),
            text_inputs(source["sentence"], data.texts),
            text_inputs(target["sentence"], data.texts))
        return loss, predicted, (points, visible)

    fit(stage, alignment, loss_of, [pools.sources, pools.targets], run)
    return alignment


# === Appendix: the options of both modes; skip on a first reading =================================

import ast
import hashlib
import inspect
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
import weakref
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from data import (FIGURES, GENTLE, NATURAL_DOMAINS, REGDA, SKELETONS, VITPOSE, Augmentation, Crops,
                  DataError, Output, PictureError, PoseDataset, SyncBatchNorm, all_items,
                  cache_folder, check_empty, crop_matrix, crop_width, decode_heatmaps, expecting,
                  free_space, image_names, in_processes, join_processes, load_dataset,
                  locked_folder, mean_of_all, my_share, open_image, processes, read_boxes,
                  read_json, remove_labels, report_boxes_outside, report_sides, sentences_read,
                  split_to_test_on, stderr_of_all, to_coco, transform_points, unreadable,
                  wait_for_all, warp_image, with_boxes, with_sentences, with_skeleton, write_json,
                  written_whole)
from eval import (SIGNALS, Parser, as_program, check_device, check_options, data_spec,
                  default_device, draw_pose, evaluate_domains, evaluate_pck_grid, fail, flag_of,
                  format_table, highest_cells, option, path_or_name, pck_of_results, poses_of,
                  predict, predict_heatmaps, predict_people, report_cut, sentences_or_file)
from uda import GENTLE_VIEWS, StyleTransfer, Views, for_normalized_images
from vlpose import (DECODERS, LARGEST_CROP, MATCHERS, MODEL_CONFIGS, PUBLIC_FILES, SIGMA_LIMITS,
                    Compute, PoseModel, ViT, WeightsError, encode_sentences, find_file,
                    load_backbone, load_clip_text, load_model, load_pose_model, load_strictly,
                    load_weights, read_file, reads_text, save_checkpoint, save_tensors,
                    split_choice, with_keypoints)

# Each field is an option of the command: `base_lr` is `--base-lr`. Its first value is the default,
# for minutes on a CPU; `paper` is the default with `--recipe paper`, where it differs. `only` says
# when the option counts; where it does not count, a value other than the default is refused. How a
# command line is read is at the end of this file; `option` and the checks are in eval.py, in "the
# command line of both programs".
#
# A model that was trained on labels is cached. What it depends on, but for its data and its
# restyling, stands in VLPoseBase, AlignmentBase and ModelOptions. See the cache before you add a
# field to another class.

NOT_MUON = ["without --optimizer muon"]     # the rate falls after milestones
NEW_MODEL = ["without --weights"]           # a model is trained before it is adapted
OLD_MODEL = ["with --weights"]
CHANGES_THE_BLOCKS = ("full", "lora", "all-but-stem")
TUNED = ["without --strategy scratch"]      # a model is adapted
READS_TEXT = ["with --strategy vlpose"]
DECODERS_WITH_MATCHER = [name for name in DECODERS if "matcher" in DECODERS[name]]
HAS_MATCHER = " ".join(["with --decoder", *DECODERS_WITH_MATCHER])


@dataclass
class VLPoseAdaptation:
    """The options of `--mode vlpose` for its data, and for what is adapted to the target."""
    source: str = option("figures#natural", type=data_spec,
        help="The base model learns from this data set: name:root or name:root#domain.")
    target: str = option("figures#artificial", type=data_spec,
        help="The model is adapted to this data set: name:root or name:root#domain.")
    test: str = option(None, type=data_spec,
        help="The adapted model is tested on labelled people of this data set, in place of images "
             "of the target that are held out. A single file is read whole.")
    boxes: str = option(None, type=path_or_name,
        help="Test on the target in these boxes: a detector's results in COCO's format.")
    # what is adapted, and what it reads
    strategy: str = option("vlpose",
        choices=("scratch", "full", "last", "stem", "all-but-stem", "prompt", "lora", "vlpose"),
        help="What is tuned: nothing (scratch), all (full), some layers (last, stem, "
             "all-but-stem), or an adapter (prompt, lora, vlpose).")
    rank: int = option(0, least=0, only=["with --strategy lora vlpose"],
        help="The rank of low-rank updates of the base's weights; 0: 4 for lora, none for vlpose.")
    decoder: str = option("dual", choices=DECODERS, only=READS_TEXT,
        help="How the relation enters the frozen decoder.")
    matcher: str = option("concat", choices=MATCHERS, only=[*READS_TEXT, HAS_MATCHER],
        help="What image tokens attend to: image and text (concat), or the image alone (image).")
    num_prompts: int = option(None, least=0, only=["with --strategy prompt vlpose"],
        help="The number of visual prompts in each layer; by default the paper's for the size.")
    # its training
    lr: float = option(None, paper=5e-4, above=0, only=TUNED,
        help="The learning rate of the adaptation; by default 1e-3 where the base's blocks change "
             "(full, lora, all-but-stem, and vlpose with --rank), and 2e-3 elsewhere. In --mode "
             "uda that is --adapt-lr.")
    steps: int = option(600, paper=None, least=1, only=TUNED,
        help="The model is adapted for so many steps.")
    epochs: int = option(None, paper=210, least=1, only=TUNED,
        help="The model is adapted for so many epochs; they take the place of --steps.")
    validate_every: int = option(0, paper=10, least=0, only=TUNED,
        help="The adapted model is validated after so many epochs; 0: after half of the steps, but "
             "after 100 at least and 1,000 at most.")
    select: str = option("last", paper="best", choices=("last", "best"),
        only=["with --validate-every"],
        help="Which model is kept: the last one, or the best in validation.")


@dataclass
class VLPoseBase:
    """The options of `--mode vlpose` for the training of the base model."""
    size: str = option("tiny", paper="base", choices=MODEL_CONFIGS, only=NEW_MODEL,
        help="The size of the model, unless --weights gives one.")
    batch_size: int = option(16, paper=512, least=1, help="The number of crops in a batch.")
    augmentation: str = option("gentle", choices=("gentle", "paper"), paper="paper",
        help="How strongly crops are augmented.")
    base_lr: float = option(2e-3, paper=5e-4, above=0, only=NEW_MODEL,
        help="The learning rate of the base model's training.")
    base_steps: int = option(1650, paper=None, least=1, only=NEW_MODEL,
        help="The base model is trained for so many steps.")
    base_epochs: int = option(None, paper=210, least=1, only=NEW_MODEL,
        help="The base model is trained for so many epochs; they take the place of --base-steps.")
    optimizer: str = option("muon", paper="adamw", choices=("muon", "adamw"),
        help="The optimizer of both stages. With muon matrices learn at ten times the rates, and "
             "the rates fall linearly to 0. With adamw they are divided by ten after 81 % of the "
             "steps, and again after 95 %.")
    lr_batch: int = option(None, paper=512, least=1,
        help="If it is given, both learning rates are multiplied by batch size / this number.")


HAS_SOURCE = "without --source none"
STYLED = ["with --image-level", HAS_SOURCE]
STYLE_TRAINED = ["with --image-level", "without --style-weights", HAS_SOURCE]


@dataclass
class AlignmentAdaptation:
    """The options of `--mode uda` for its data, for style, and for the adaptation to the target.

    A level or a loss whose weight is 0 is left out.
    """
    source: str = option("figures#sculpture", type=data_spec,
        help="The model learns from the labels of this data set: name:root or name:root#domain; "
             "with `none` only the model of --weights adapts.")
    target: str = option("figures#photo", type=data_spec,
        help="The model is adapted to images of this data set; its labels are used only to test.")
    test: str = option(None, type=data_spec,
        help="The models are tested on labelled people of this data set, in place of images of "
             "the target that are held out. A single file is read whole.")
    oracle: bool = option(False,
        help="Train also with the target's labels, which shows what is left to gain.")
    # stage 0: the style decoder
    style_encoder: str = option(None, type=path_or_name, only=STYLED,
        help="The VGG-19 of style transfer: a file or adain-encoder; by default a small network.")
    style_weights: str = option(None, type=path_or_name, only=STYLED,
        help="A trained decoder of style transfer: a file, adain-decoder, or RUN/style.pth.")
    style_steps: int = option(100, paper=500_000, least=1, only=STYLE_TRAINED,
        help="Stage 0: the style decoder is trained for so many steps.")
    style_lr: float = option(5e-3, paper=1e-5, above=0, only=STYLE_TRAINED,
        help="The learning rate of stage 0.")
    style_batch: int = option(None, paper=16, least=1, only=STYLE_TRAINED,
        help="The number of crops in a batch of stage 0, if it is not --batch-size.")
    # stage 2: adaptation to the target
    steps: int = option(300, paper=15_000, least=1,
        help="Stage 2: the student is adapted for so many steps.")
    adapt_lr: float = option(1e-3, paper=1e-4, above=0, help="The learning rate of stage 2.")
    adapt_milestones: tuple[float, ...] = option(
        FALLS, paper=(4 / 30, 19 / 30), nargs="*", least=0, most=1, only=NOT_MUON,
        help="The rate of stage 2 falls tenfold after these shares of its steps.")
    strategy: str = option("full", choices=("full", "vlpose", "lora"),
        help="What stage 2 tunes: all of the model, or an adapter.")
    steady_discriminator: bool = option(False, paper=True,
        only=["with --feature-level", HAS_SOURCE],
        help="The learning rate of the discriminator does not fall.")
    # the teacher and the three levels
    ema_decay: float = option(0.99, paper=0.999, least=0, most=1,
        help="The share of the teacher that each step keeps.")
    image_level: float = option(0.5, least=0, most=1,
        help="The probability that a source image is restyled.")
    feature_level: float = option(0.002, paper=0.1, least=0,
        help="The weight of the adversarial loss.")
    pose_level: float = option(0.3, least=0, help="The weight of information maximization.")
    consistency: float = option(1.0, least=0,
        help="The weight of consistency with the teacher's pseudo-labels.")
    occlusion: float = option(0.5, least=0, most=1,
        help="The probability that one of the keypoints that the teacher is sure of is covered.")


@dataclass
class AlignmentBase:
    """The options of `--mode uda` for stage 1: a model learns from the source's labels."""
    size: str = option("tiny", paper="resnet101", choices=MODEL_CONFIGS, only=NEW_MODEL,
        help="The size of the model, unless --weights gives one.")
    batch_size: int = option(16, paper=32, least=1,
        help="The number of crops in a batch, from each domain.")
    augmentation: str = option("gentle", choices=("gentle", "paper"), paper="paper",
        help="How strongly crops and views are augmented.")
    supervised_steps: int = option(600, paper=20_000, least=1, only=NEW_MODEL,
        help="Stage 1: the model learns from the source's labels for so many steps.")
    lr: float = option(2e-3, paper=1e-4, above=0, only=NEW_MODEL,
        help="The learning rate of stage 1. In --mode vlpose that is --base-lr, and --lr is the "
             "adaptation's.")
    milestones: tuple[float, ...] = option(
        FALLS, paper=(), nargs="*", least=0, most=1, only=NOT_MUON,
        help="The rates of stages 0 and 1 fall tenfold after these shares of their steps.")
    weight_decay: float = option(0.1, paper=0.0, least=0,
        help="The weight decay of stages 1 and 2.")
    # these count in all stages
    optimizer: str = option("muon", paper="adam", choices=("muon", "adamw", "adam"),
        help="The optimizer of all stages. With muon matrices learn at ten times the rates, and "
             "the rates fall linearly to 0.")
    warm_up: int = option(500, paper=0, least=0,
        help="The number of steps of linear warm-up; it is at most a tenth of a stage.")
    clip: float = option(1.0, paper=0.0, least=0,
        help="Gradients with a greater norm than this are clipped; with 0 none are.")


@dataclass
class ModelOptions:
    """The options that both modes have for the model and for how it computes."""
    weights: str = option(None, type=path_or_name,
        help="A trained model to adapt; none is trained then. It is a file or a name such as "
             "vitpose-b; of a VLPose its base is taken.")
    skeleton: str = option(None, type=str.upper, choices=tuple(SKELETONS), only=OLD_MODEL,
        help="The keypoints of --weights, if its file does not say what they are.")
    init: str = option(None, type=path_or_name, only=NEW_MODEL,
        help="A new backbone of --size starts from these weights: a file or a name such as mae-b.")
    image_size: list[int] = option(None, nargs=2, least=32, most=LARGEST_CROP, step=32,
        help="The height and the width of crops; by default the size's own.")
    sigma: float = option(None, least=SIGMA_LIMITS[0], most=SIGMA_LIMITS[1],
        help="The standard deviation of heatmaps' Gaussians, in pixels of the heatmap; by "
             "default the size's own.")
    bf16: bool = option(None,
        help="Compute in bfloat16; by default a GPU that has it does. A CPU that does not have "
             "it is many times slower with it.")
    accumulate: int = option(1, least=1,
        help="Each batch is computed in so many parts, which saves memory.")
    seed: int = option(0, least=0, most=10 ** 12, help="The seed for all random numbers.")


@dataclass
class RunOptions:
    """The options that both modes have for text, for the machine and for the run's folder."""
    sentences: str = option("a photo of a {domain} character", type=sentences_or_file,
        only=READS_TEXT,
        help="What is read of an image: a template that names its domain, a JSON file {domain: "
             "sentence}, or `description`, the image's own text.")
    per_token: bool = option(False, only=READS_TEXT,
        help="All tokens of a sentence are read, not just its end.")
    text_weights: str = option("random", type=path_or_name, only=READS_TEXT,
        help="The weights of CLIP's text tower: a file or a name such as ViT-B/32.")
    strict: bool = option(False,
        help="End with an error if a sentence is too long, instead of cutting it, or if the code "
             "has changed since the last checkpoint, instead of going on with --resume.")
    # the machine
    checkpointing: bool = option(False,
        help="The blocks of a transformer are computed anew in the backward pass, which saves "
             "more memory.")
    device: str = option(default_device(), help="The device that computes.")
    workers: int = option(4 if torch.cuda.is_available() else 0, least=0,
        help="The number of processes that cut out crops.")
    patience: int = option(30, least=1, most=100_000,
        help="Of several processes of torchrun one may be stopped: the run ends if it has not "
             "answered for so many minutes.")
    # the run's folder
    cache: str = option(str(cache_folder().absolute()), type=os.path.abspath,
        help="The folder where figures and trained base models are kept.")
    out: str = option(None, type=os.path.abspath,
        help="The run's folder. By default it is runs/MODE-1, -2, ...")
    dry_run: bool = option(False, help="Print the plan and train nothing.")


@dataclass
class FirstOptions:
    """The options that are read first: the others and their defaults depend on them."""
    mode: str = option("vlpose", choices=("vlpose", "uda"),
        help="VLPose, or multi-level alignment; `--mode uda --help` lists the options of that.")
    recipe: str = option("minutes", choices=("minutes", "paper"),
        help="What the defaults are made for: minutes on a CPU, or the paper's numbers.")
    resume: str = option(None, metavar="FOLDER",
        help="Go on with the run in this folder; --steps or --epochs may make it longer.")


@dataclass
class VLPoseOptions(FirstOptions, RunOptions, ModelOptions, VLPoseBase, VLPoseAdaptation):
    """All options of `--mode vlpose`. `--help` lists those of the last class first."""


@dataclass
class AlignmentOptions(FirstOptions, RunOptions, ModelOptions, AlignmentBase, AlignmentAdaptation):
    """All options of `--mode uda`."""


# === Appendix: the plan and the batches; skip on a first reading ==================================

def plan_vlpose(options, base, source, target):
    """{name: Stage} of what will be trained: "base" and "adapt". Prints a line on each of them.

    There is no base stage where --weights gives the base, and with `scratch` nothing is adapted.
    """
    plan = {}
    scale = 1.0
    if options.lr_batch:  # mmpose's linear rule
        scale = options.batch_size / options.lr_batch
    common = dict(batch_size=options.batch_size, seed=options.seed, bf16=options.bf16,
                  optimizer=options.optimizer)
    layer_decay = base.config.layer_decay
    if source:
        epoch = math.ceil(len(source.annotated) / options.batch_size)  # steps
        plan["base"] = Stage(
            "base", options.base_steps or options.base_epochs * epoch, scale * options.base_lr,
            layer_decay=layer_decay if options.init else 1.0, **common)
        print_plan(plan["base"], source.name, len(source.annotated))
    if options.strategy != "scratch":
        epoch = math.ceil(len(target.annotated) / options.batch_size)
        changes_the_blocks = options.strategy in CHANGES_THE_BLOCKS or options.rank
        lr = options.lr or (1e-3 if changes_the_blocks else 2e-3)
        plan["adapt"] = Stage(
            "adapt", options.steps or options.epochs * epoch, scale * lr,
            layer_decay=layer_decay if options.strategy == "full" else 1.0,
            validate_every=options.validate_every * epoch, select=options.select, **common)
        print_plan(plan["adapt"], target.name, len(target.annotated))
    return plan


def plan_uda(options, stylist, restyle, data):
    """{name: Stage} of what will be trained: style, source, restyled, adapt, oracle.

    Stages that the options leave out, or whose result they give, are not in it. Prints a line on
    each of them.
    """
    plan = {}
    both = f"{data.source.name} and {data.target.name}"
    if options.source == "none":
        both = data.target.name
    people = {"source": len(data.source.annotated), "target": len(data.target.ids)}
    common = dict(seed=options.seed, optimizer=options.optimizer, warm_up=options.warm_up,
                  clip=options.clip)
    if stylist and not options.style_weights:
        plan["style"] = Stage(
            "style", options.style_steps, options.style_lr,
            options.style_batch or options.batch_size, bf16=False, weight_decay=0.0,
            milestones=tuple(options.milestones), **common)
        print_plan(plan["style"], both, people["target"])
    common.update(batch_size=options.batch_size, bf16=options.bf16,
                  weight_decay=options.weight_decay)
    if not options.weights:
        plan["source"] = Stage("source", options.supervised_steps, options.lr,
                               milestones=tuple(options.milestones), **common)
        print_plan(plan["source"], data.source.name, people["source"])
        if restyle and options.strategy == "full":
            plan["restyled"] = replace(plan["source"], name="restyled")
            print_plan(plan["restyled"], both, people["source"])
    plan["adapt"] = Stage(
        "adapt", options.steps, options.adapt_lr, milestones=tuple(options.adapt_milestones),
        steady="discriminator." if options.steady_discriminator else "", **common)
    print_plan(plan["adapt"], both, people["target"])
    if options.oracle:
        plan["oracle"] = replace(plan["adapt"], name="oracle", steady="")
        labelled = data.labelled_target
        print_plan(plan["oracle"], labelled.name, len(labelled.annotated))
    return plan


def print_plan(stage, data, people):
    """A line on a stage. data: the name of what it draws from; people: how many there are."""
    _, world = processes()
    if stage.batch_size % world:
        raise DataError(f"stage {stage.name}: expected a batch size that is a multiple of {world}, "
                        f"the number of processes, found {stage.batch_size}")
    epochs = stage.steps * stage.batch_size / people
    line = (f"plan: {stage.name}: {stage.steps:,} steps of {stage.batch_size} crops ({data}: "
            f"{people:,} people, {epochs:.1f} epochs), {stage.optimizer}, "
            f"learning rate {stage.lr:g}")
    falls = [math.ceil(stage.steps * milestone - 1e-6) for milestone in stage.milestones]
    if stage.optimizer == "muon":
        line += f" (matrices {MUON_RATE * stage.lr:g}), falling to 0"
    elif falls:
        line += ", a tenth of it from steps " + ", ".join(f"{step:,}" for step in falls)
    if stage.validate_every:
        line += f", validation every {stage.validate_every:,} steps"
    print(line)


def vlpose_pool(dataset, model, options):
    """What `fit` draws from: augmented crops of a data set, and the rows of annotated people."""
    augmentation = VITPOSE if options.augmentation == "paper" else GENTLE
    return Crops(dataset, model.config.image_size, augmentation), dataset.annotated


@dataclass
class AlignmentPools:
    """What the stages of alignment draw from: pairs of Crops and rows, as `fit` wants them."""
    sources: tuple
    targets: tuple
    labelled_targets: tuple | None  # of --oracle
    source_views: Views | None      # how far random views go; None: the crops as they are
    target_views: Views
    source_keypoints: list | None   # those that adapt, since the source labels them; None: all


def alignment_pools(data, size, options):
    """AlignmentPools of data sets, in crops of `size` (height, width)."""
    paper = options.augmentation == "paper"
    views = replace(Views() if paper else GENTLE_VIEWS, occlusion=options.occlusion)
    labelled_crops = REGDA if paper else GENTLE
    everyone = np.arange(len(data.target.ids))
    targets = Crops(data.target, size, REGDA if paper else Augmentation()), everyone
    sources = targets
    if options.source != "none":
        sources = Crops(data.source, size, labelled_crops), data.source.annotated
    labelled_targets = None
    if options.oracle:
        people = data.labelled_target
        labelled_targets = Crops(people, size, labelled_crops), people.annotated
    labelled = (data.source.keypoints[:, :, 2] > 0).any(0)  # (K,)
    return AlignmentPools(sources, targets, labelled_targets, views if paper else None, views,
                          np.flatnonzero(labelled).tolist() or None)


def batches_of(pools, stage, done, workers):
    """Yields a batch of each data set for each step that is left, after so many `done` ones.

    Each data set has an order of its own. A process cuts out its share of each batch.
    """
    size = stage.batch_size
    loaders = []
    for place, (crops, rows) in enumerate(pools):
        passes = Passes(crops, rows, stage.seed + 10 ** 6 * place)
        positions = (my_share(range(step * size, (step + 1) * size))
                     for step in range(done, stage.steps))
        loader = DataLoader(passes, batch_sampler=positions,
                            pin_memory=torch.cuda.is_available(), **in_processes(workers))
        loaders.append(count_unread(loader, crops.dataset))
    return zip(*loaders)


class Passes(torch.utils.data.Dataset):
    """Crops by their position in shuffled passes over the rows, one pass after the other.

    They depend on nothing else, so that a resumed run sees the same ones. For a picture that cannot
    be read there is the crop of the next position.
    """

    def __init__(self, crops, rows, seed):
        self.crops = crops
        self.rows = rows
        self.seed = seed
        self.epoch = None  # the pass whose order is `order`
        self.order = None

    def key(self, position):
        """The key of the crop at a position: its row, and the seed of its augmentation."""
        epoch, place = divmod(position, len(self.rows))
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng((self.seed, epoch)).permutation(self.rows)
        return int(self.order[place]), (self.seed, position)

    def __getitem__(self, position):
        problems = []
        for place in range(position, position + 100):
            try:
                crop = self.crops[self.key(place)]
            except DataError as error:
                problems.append(str(error))
                continue
            return crop | {"unread": problems[0] if problems else ""}
        raise DataError(f"{problems[0]}, nor are the pictures after it; {GO_ON}")


GO_ON = "once the pictures are there, --resume goes on from the last checkpoint"


@contextmanager
def as_the_run_can_go_on():
    """An error of a picture in the block says how the run goes on."""
    try:
        yield
    except PictureError as error:
        raise DataError(f"{error}; {GO_ON}") from None


def count_unread(batches, dataset):
    """The batches; prints the name of each picture that could not be read.

    Raises DataError if these are more than one of a hundred.
    """
    unread = set()
    for batch in batches:
        problems = set(batch.pop("unread")) - {""}
        for problem in sorted(problems - unread):
            unread.add(problem)
            if len(unread) > len(dataset.files) / 100:
                raise DataError(f"{problem}; with it more than 1 % of the {len(dataset.files):,} "
                                f"pictures; {GO_ON}")
            print(f"{problem}; the next one is taken", file=stderr_of_all())
        yield batch


# === Appendix: how `fit` computes; skip on a first reading ========================================

def new_optimizer(model, stage):
    """The optimizer of a stage, for what requires a gradient in the model."""
    optimizers = {"muon": Muon, "adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
    on_gpu = next(model.parameters()).is_cuda
    return optimizers[stage.optimizer](parameter_groups(model, stage), fused=on_gpu)


def orthogonal(G):
    """U Vᵀ of a matrix G (rows, columns) = U S Vᵀ, nearly: singular values become 0.7 to 1.2.

    This is the Newton-Schulz iteration of Muon's authors. ‖G‖ is the root of the sum of squares, so
    that S ≤ 1 in X = G / ‖G‖. A step X ← P X, where P = a I + b A + c A² and A = X Xᵀ, leaves U and
    V and turns each singular value s into a s + b s³ + c s⁵. Five steps bring all above 0.0015 to
    0.7 to 1.2. The small P's are multiplied into Q, and Q with X only once: for the weights of
    tiny that takes two thirds of the time.
    """
    if G.shape[0] > G.shape[1]:
        return orthogonal(G.T).T  # A is the smaller one of X Xᵀ and Xᵀ X
    X = G / (G.norm() + 1e-7)
    A = X @ X.T                   # (rows, rows)
    I = torch.eye(len(A), dtype=A.dtype, device=A.device)
    Q = I
    for _ in range(5):
        P = 3.4445 * I - 4.7750 * A + 2.0315 * A @ A
        Q = P @ Q
        A = P @ A @ P             # X Xᵀ of the next X = P X
    return Q @ X


# Muon's authors leave the first layer and the last one to AdamW. The first ones are those of tiny,
# of the other ViTs, of a ResNet and of a Swin; the last one is a predictor. This is for models that
# learn from nothing. In a student and in updates of frozen weights, whose names begin in another
# way, Muon moves the first layer, too.
FIRST = ("backbone.patch_embed.0.", "backbone.patch_embed.weight",
         "backbone.body.conv1.", "backbone.body.features.0.0.")


def parameter_groups(model, stage):
    """Parameters by learning rate and weight decay, as an optimizer wants them.

    Biases, norms and tables of positions do not decay. With layer decay each layer of the backbone
    learns more slowly than the one above it: lr · decay^(layers above).
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0
        if stage.layer_decay < 1:
            scale = stage.layer_decay ** layers_above(name, len(model.backbone.blocks))
        steady = stage.steady != "" and name.startswith(stage.steady)
        decay = stage.weight_decay
        if parameter.ndim == 1 or name.endswith("pos_embed"):
            decay = 0.0
        first_or_last = name.startswith(FIRST) or "predictor." in name
        muon = stage.optimizer == "muon" and parameter.ndim in (2, 4) and not first_or_last
        kind = scale, steady, decay, muon
        if kind not in groups:
            groups[kind] = dict(params=[], scale=scale, steady=steady, weight_decay=decay,
                                muon=muon)
        groups[kind]["params"].append(parameter)
    return list(groups.values())


def layers_above(name, depth):
    """The number of layers between a parameter of a ViT with `depth` blocks and the decoder."""
    if name.startswith("backbone.blocks."):
        return depth - int(name.split(".")[2])
    if name.startswith(("backbone.patch_embed", "backbone.pos_embed")):
        return depth + 1
    return 0


def prepare(model, checkpointing):
    """Makes a model ready for `fit`, in place. Only how it computes changes, not what it predicts.

    checkpointing: the blocks of a transformer are computed anew in the backward pass.
    """
    _, world = processes()
    for module in model.modules():
        if type(module) is torch.nn.BatchNorm2d and world > 1:
            # The layer stays the same object, whose parameters the optimizer has; only its
            # `forward` changes. A new layer would have to be put into its place in each model.
            module.__class__ = SyncBatchNorm
        if isinstance(module, ViT):
            module.checkpointing = checkpointing
    set_training_mode(model)


def set_training_mode(model):
    """Training mode, but BatchNorm layers with frozen parameters keep their statistics, too."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not module.weight.requires_grad:
            module.eval()


def stop_unless_finite(stage, step, loss, batches, pools):
    """Raises DataError, after the names of the batch's pictures, for a loss that is not finite.

    What would become of the weights is never saved.
    """
    if loss.isfinite():
        return
    rank, _ = processes()
    for (crops, _), batch in zip(pools, batches):
        people = crops.dataset
        for row in batch["row"].tolist():
            file = people.files[people.image_index[row]]
            print(f"in this batch: {people.name}, person {row}, {file}",
                  file=sys.__stdout__ if rank else sys.stdout)
    reason = f"the learning rate, {stage.lr:g}"
    if stage.bf16:
        reason += ", or --bf16"
    raise DataError(f"stage {stage.name}, step {step}: the loss is {loss.item()}, most likely "
                    f"because of {reason}; the last checkpoint is good")


# === Appendix: the run's folder; skip on a first reading ==========================================

SAME_SIGNAL = 0.5         # seconds: a terminal and a program in between may both send it
STEP_SECONDS = 120        # a step that has not ended so long after a signal is given up
LOG_EVERY = 50            # steps
CHECKPOINT_EVERY = 500    # steps
CHECKPOINT_SECONDS = 300  # a checkpoint is never older


class Run:
    """A run in its folder: `fit` tells it of each step, and it validates, logs and saves.

    measure: (stage, model) -> a number of the validation, or NaN.
    plan, model: {name: Stage} of what will be trained, and the model that it begins with.
    restyle: the function that changes images in training, for the cache of trained models.
    """

    def __init__(self, options, measure, plan, model, restyle=None):
        rank, world = processes()
        self.options = options
        self.measure = measure
        self.stages = list(plan)
        self.bytes_of_model = sum(tensor.nbytes for tensor in model.state_dict().values())
        self.compute = Compute(options.bf16, options.accumulate)
        # {file: hash}; the cache asks whether it has changed
        self.code = {name: code_hash(source) for name, source in SOURCES.items()}
        file = file_of(restyle)
        if file:
            self.code[file.name] = code_hash(file.read_bytes())
        self.folder = folder_of(options)
        inputs = {}
        if rank == 0:
            lock = locked_folder(self.folder)
            if options.resume:  # `resumed` has compared them already
                inputs = read_json(self.folder / "config.json", dict, "a run's options")["inputs"]
            else:
                check_empty(self.folder)
                inputs = digests_of_inputs(options)
            weakref.finalize(self, lock.close)  # others stay out as long as this run is there
        self.config = vars(options) | {  # what is for this command alone is not kept
            "resume": None, "strict": False,
            "processes": world, "inputs": inputs}
        write_file(self.folder / "config.json", self.config)
        print(f"run folder: {self.folder}")
        self.log = Log(self.folder)
        self.signals = Signals(self.folder)
        self.checkpoints = None  # of the stage that trains

    def restore(self, stage, model, optimizer, pools):
        """The stage begins, or goes on from its newest good checkpoint -> number of steps done."""
        self.signals.wait_for_step = True
        self.checkpoints = Checkpoints(self.folder, stage, pools, self.code)
        later = self.stages[self.stages.index(stage.name) + 1:]
        self.checkpoints.check_space(model, self.bytes_of_model * (2 * len(later) + 1))
        state = self.checkpoints.load(model, optimizer)
        done = 0
        if state:
            done = state["step"]
            self.log.rows = state["history"]
            changed = changed_code(self.code, state["code"])
            if changed:
                message = f"{stage.name}: {changed} since the last checkpoint"
                if self.options.strict:
                    raise DataError(f"{message}; without --strict the run goes on")
                print(f"{message}: other numbers follow", file=sys.stderr)
            if done < stage.steps:
                print(f"{stage.name}: goes on after step {done}", file=sys.stderr)
        self.log.start_clock(done)
        return done

    def after_step(self, stage, done, loss, predicted, labels, model, optimizer):
        """Validates, logs and saves every so many steps; `done` of them are done."""
        self.signals.step_has_ended()
        last = done == stage.steps
        validate_every = stage.validate_every or min(max(stage.steps // 2, 100), 1000)
        to_validate = done % validate_every == 0
        if last:  # the run's table follows anyway
            to_validate = stage.validate_every > 0
        validation = math.nan
        if to_validate and predicted is not None:
            validation = self.validate(stage, model)

        log_every = min(LOG_EVERY, max(1, stage.steps // 10))
        to_log = done % log_every == 0 or last or not math.isnan(validation)
        if to_log:
            pck = math.nan
            if predicted is not None:
                pck = batch_pck(predicted, *labels, model.config)
            losses = {"loss": loss, **getattr(model, "losses", {})}
            self.log.add(stage, done, losses, pck, validation)

        age = time.monotonic() - self.checkpoints.saved
        to_save = done % CHECKPOINT_EVERY == 0 or age > CHECKPOINT_SECONDS or last
        if to_save or self.signals.received:
            self.save(stage, done, model, optimizer)
        self.signals.stop_if_received()

    def validate(self, stage, model):
        """The number of the validation; keeps the model if it is the best one so far."""
        value = float(self.measure(stage, model))
        set_training_mode(model)
        if stage.select == "best" and value > self.checkpoints.best:
            self.checkpoints.best = value
            save_model(self.checkpoints.best_model, model, self.options)
        return value

    def save(self, stage, done, model, optimizer):
        """Writes the log so far, and then a checkpoint. A folder that was removed is made anew."""
        if processes()[0] == 0 and not (self.folder / "config.json").exists():
            print(f"{self.folder}: config.json was removed; it is written anew", file=sys.stderr)
            write_file(self.folder / "config.json", self.config)
        self.log.write()
        self.checkpoints.save(done, model, optimizer, self.log.rows)

    def finish(self, stage, model):
        """The stage is done. The model becomes the best in validation, where the stage wants it."""
        self.signals.wait_for_step = False
        self.signals.stop_if_received()
        best = self.checkpoints.best
        if stage.select == "best" and best > -math.inf:
            wait_for_all()  # the first process has written it
            model.load_state_dict(load_model(self.checkpoints.best_model).state_dict())
            print(f"{stage.name}: selected the best in validation, AP {best:.3f}")


def folder_of(options):
    """The path of the run's folder. Where none is named, the first process makes a new one."""
    given = options.resume or options.out
    if not given and processes()[0] == 0:
        given = new_folder(options.mode)
    return Path(all_items([given])[0])  # the first process's


# These options may name a file, which must be the same when the run goes on.
INPUTS = ("weights", "init", "text_weights", "style_encoder", "style_weights", "boxes",
          "sentences")


def digests_of_inputs(options):
    """{option: hash of its file} for the options that name a file, or a run's folder."""
    digests = {}
    for name in INPUTS:
        source, _ = split_choice(getattr(options, name, None) or "")
        if name == "sentences" and not source.endswith(".json"):
            continue  # a file or folder of that name has nothing to do with it
        if source and os.path.exists(source):
            with open(find_file(source), "rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def new_folder(mode):
    """Makes runs/vlpose-1, or with the first number that is free."""
    for number in itertools.count(1):
        folder = Path("runs").absolute() / f"{mode}-{number}"
        try:
            folder.mkdir(parents=True)
            return folder
        except OSError as error:
            if not os.path.exists(folder):
                raise DataError(f"{folder}: cannot be written: {error.strerror}; --out names "
                                "another folder") from None


def write_file(path, content):
    """Writes text, a picture, or a dict as JSON; only the first process does."""
    if processes()[0] > 0:
        return
    if isinstance(content, dict):
        write_json(path, content, indent=2)
        return
    with written_whole(path) as draft:
        if isinstance(content, str):
            draft.write_text(content, "utf-8")
        else:
            content.save(draft, compress_level=1)  # a PNG; a higher level takes longer


# ------------------------------------------------------------------------------------------ the log

class Log:
    """log.csv and curves.png of a run: a row for every few steps of each stage."""

    def __init__(self, folder):
        self.folder = folder
        self.rows = []
        self.done_before = 0  # steps of the stage before the clock started
        self.started = time.monotonic()

    def start_clock(self, done):
        """The speed is measured from here, where so many steps of the stage are done."""
        self.done_before = done
        self.started = time.monotonic()

    def add(self, stage, done, losses, pck, validation):
        """Adds and prints a row. losses: {"loss": the whole, and the parts that it has}."""
        row = {"stage": stage.name, "step": done, "loss": None, "pck": pck,
               "validation": validation}
        for name, loss in losses.items():
            row[name] = mean_of_all(loss.detach()).item()
        self.rows.append(row)
        seconds = time.monotonic() - self.started
        speed = (done - self.done_before) / seconds  # steps per second
        line = f"{stage.name:8}{done:6}/{stage.steps}  loss {row['loss']:.5f}  "
        if not math.isnan(pck):
            line += f"PCK {pck:.3f}  "
        if not math.isnan(validation):
            line += f"validation {validation:.3f}  "
        line += f"{speed * stage.batch_size:4.0f} images/s  "
        line += f"{(stage.steps - done) / speed:4.0f} s left"
        print(line, flush=True)

    def write(self):
        """Writes all rows; a cell is empty where a stage has no such loss."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        lines = [",".join(names or ("stage", "step", "loss"))]
        for row in self.rows:
            lines.append(",".join(str(row.get(name, "")) for name in names))
        write_file(self.folder / "log.csv", "\n".join(lines) + "\n")
        write_file(self.folder / "curves.png", draw_curves(self.rows))


def batch_pck(predicted, points, visible, config):
    """Share of a batch's labelled keypoints that are closer than 0.05 of a crop's height.

    predicted (B, K, h, w): heatmaps; points (B, K, 2) and visible (B, K): the labels.
    """
    height, width = config.image_size
    found, _ = decode_heatmaps(predicted.detach().cpu(), config.image_size, config.sigma)
    truth = points.cpu()                                                     # (B, K, 2)
    right = (found - truth).norm(dim=2) < 0.05 * height                      # (B, K)
    inside = ((truth >= 0) & (truth <= torch.tensor([width, height]) - 1)).all(2)
    counted = inside & (visible.cpu() > 0)
    numbers = torch.stack([(right & counted).sum(), counted.sum()])
    right, counted = mean_of_all(numbers.to(predicted))
    return (right / counted).item()


def draw_curves(rows, width=480, height=180):
    """A picture of the log's rows: a line of two charts, loss and PCK, for each stage.

    The dark line is the mean over the last fifth so far; the validation is green.
    """
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    picture = Image.new("RGB", (2 * width, height * max(1, len(stages))), "white")
    for place, stage in enumerate(stages):
        of_stage = [row for row in rows if row["stage"] == stage]
        top = place * height
        loss_title = f"{stage} - loss: batches pale, mean dark"
        pck_title = f"{stage} - PCK@0.05: batches pale, mean dark, validation green"
        draw_chart(picture, (0, top, width, top + height), loss_title, of_stage, "loss")
        draw_chart(picture, (width, top, 2 * width, top + height), pck_title, of_stage, "pck")
    return picture


def draw_chart(picture, box, title, rows, key):
    """Draws a column of the log as a curve into a box of the picture; nothing if it is all NaN."""
    steps = np.array([row["step"] for row in rows])
    values = np.array([row[key] for row in rows])
    if np.isnan(values).all():  # a stage that predicts no keypoints
        return
    smooth = [values[n - n // 5:n + 1].mean() for n in range(len(values))]
    lines = {"lightsteelblue": values, "royalblue": np.array(smooth)}
    if key == "pck":
        lines["seagreen"] = np.array([row["validation"] for row in rows])
    highest = np.nanmax(list(lines.values())) or 1
    left, top, right, bottom = np.add(box, (60, 30, -15, -25)).tolist()  # within the margins
    draw = ImageDraw.Draw(picture)
    draw.text((left, top - 22), title, "black")
    for tick in range(5):
        y = bottom - tick / 4 * (bottom - top)
        draw.line([(left, y), (right, y)], (225, 225, 225))
        draw.text((left - 5, y), f"{highest * tick / 4:.3g}", "black", anchor="rm")
    draw.text((right, bottom + 5), f"{rows[-1]['step']} steps", "black", anchor="ra")
    for color, line in lines.items():
        x = left + steps / steps[-1] * (right - left)
        y = bottom - line / highest * (bottom - top)
        known = np.isfinite(y)
        points = list(zip(x[known], y[known]))
        draw.line(points, color, 2)
        if len(points) == 1:  # a line of one point is invisible; many stages are validated once
            draw.circle(points[0], 3, color)


# ---------------------------------------------------------------------------------- the checkpoints

class Checkpoints:
    """The last two checkpoints of a stage, and its best model in validation.

    pools: what the stage draws from; it does not go on with anything else.
    code: {file: hash} of the program; see the cache.
    """

    def __init__(self, folder, stage, pools, code):
        self.folder = folder
        self.stage = stage
        self.newest = folder / f"{stage.name}.checkpoint.pth"
        self.older = folder / f"{stage.name}.checkpoint.older.pth"
        self.best_model = folder / f"{stage.name}.best.pth"
        self.settings = asdict(replace(stage, steps=0, bf16=False))  # without what may change
        self.best = -math.inf
        self.data = {}  # what the stage learns from, which stays the same
        for crops, rows in pools:
            people = crops.dataset
            read = [] if people.sentences is None else people.sentences.tolist()
            sentences = digest(json.dumps(read).encode())
            self.data[people.name] = identity_of(crops, rows) | {"sentences": sentences}
        self.code = code  # of the program that began the stage
        self.saved = time.monotonic()

    def check_space(self, model, later):
        """Raises DataError if the disk has no room for two checkpoints with AdamW's two moments.

        later: bytes that the run needs after this stage at least, for two checkpoints of each
            later one and a model. So the first stage finds out, not the last one.
        """
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        tensors = [*model.state_dict().values(), *trained, *trained]
        there = [path.stat().st_size for path in (self.newest, self.older) if path.exists()]
        need = 2 * sum(tensor.nbytes for tensor in tensors) - sum(there) + later
        free = free_space(self.folder)
        if free < need:
            raise DataError(f"{self.folder}: expected {need // 10 ** 6} MB for checkpoints and "
                            f"models, found {free // 10 ** 6} free")

    def save(self, done, model, optimizer, history):
        """Writes what `load` needs; the newest checkpoint so far becomes the older one."""
        if processes()[0] == 0 and self.newest.exists():
            os.replace(self.newest, self.older)
        save_tensors(self.newest, {
            "stage": self.settings, "step": done, "best": self.best, "history": history,
            "model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "data": self.data, "code": self.code})
        self.saved = time.monotonic()

    def load(self, model, optimizer):
        """Fills model and optimizer from the newest good checkpoint.

        Returns what else the checkpoint holds, None without one.
        """
        path = state = None
        if processes()[0] == 0:
            path, state = self.newest_good(model)
        path = all_items([path])[0]  # the first process's
        if path is None:
            return None
        if state is None:
            state = read_file(path)
        self.check_inputs(path, state)
        with expecting(path, "a model and an optimizer of this stage"):
            model.load_state_dict(state["model"])
            # The settings of the optimizer are the stage's, whatever the file says.
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
        self.best = state["best"]
        self.code = state["code"]
        return state

    def newest_good(self, model):
        """(path, contents) of the newest checkpoint that is whole and of this stage, or two None.

        A damaged or foreign checkpoint is renamed, so that the next checkpoint does not push out a
        good older one. An error of the disk or of rights says nothing about the checkpoint; it ends
        the run.
        """
        for path in (self.newest, self.older):
            if not path.exists():
                continue
            try:
                return path, self.read(path, model)
            except BadCheckpoint as error:
                aside = path.with_suffix(".damaged")
                os.replace(path, aside)
                print(f"{error}; it is now called {aside.name}; going back to what was before it",
                      file=sys.stderr)
        return None, None

    def read(self, path, model):
        """What a checkpoint holds. Raises BadCheckpoint if it is damaged or of another stage."""
        try:
            state = read_file(path)
        except WeightsError as error:
            lacks_memory = "allocate memory" in str(error)  # torch's words
            if lacks_memory or isinstance(error.__context__, (OSError, MemoryError)):
                raise  # the file could not be read, and may be good
            raise BadCheckpoint(str(error)) from None
        with expecting(path, f"a checkpoint of stage {self.stage.name}", BadCheckpoint):
            for name, kind in ENTRIES.items():  # they are used later
                if not isinstance(state[name], kind):
                    raise ValueError(f"found {name} {state[name]!r:.40}")
            shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
            step = state["step"]
            rows = state["history"]
            if state["stage"] != self.settings:
                raise ValueError(f"found {state['stage']!r:.80}")
            if shapes != {name: tensor.shape for name, tensor in state["model"].items()}:
                raise ValueError("found another model")
            if not are_log_rows(rows):
                raise ValueError(f"found a history that is none: {rows!r:.40}")
            logged = [row["step"] for row in rows if row["stage"] == self.stage.name]
            last = max(logged, default=0)
            if type(step) is not int or not last <= step <= last + LOG_EVERY:
                raise ValueError(f"found step {step!r:.40}; step {last} is the last one in its log")
        return state

    def check_inputs(self, path, state):
        """Raises DataError if the stage began with other data, or has done too many steps."""
        for name, now in self.data.items():
            with expecting(path, f"a checkpoint of {name}"):
                then = dict(state["data"][name])
            changed = [what for what in now if what in then and now[what] != then[what]]
            if changed:
                raise DataError(f"{path}: began with other {', '.join(changed)} of {name}: "
                                "it cannot go on")
        if state["step"] > self.stage.steps:
            raise DataError(f"{path}: has done {state['step']} steps, "
                            f"more than {self.stage.steps}")


ENTRIES = {"best": float, "optimizer": dict, "data": dict, "code": dict}  # of a checkpoint


class BadCheckpoint(DataError):
    """A checkpoint that is damaged or belongs to something else."""


def are_log_rows(rows):
    """Whether these are rows of a Log: {"stage": name, "step": number, other columns: number}."""
    for row in rows:
        numbers = [value for name, value in row.items() if name != "stage"]
        if not isinstance(row["stage"], str) or not isinstance(row["step"], int):
            return False
        if not all(isinstance(number, (int, float)) for number in numbers):
            return False
    return True


# -------------------------------------------------------------------------------------- the signals

class Signals:
    """What Ctrl-C and its like do: the first one lets a step of training end and be saved.

    Between the stages, and the second time, they end the program at once; so does a step that takes
    too long after the first one. Only the first process listens, for the others end with it; and
    only in the main thread, for Python allows no other one to.
    """

    def __init__(self, folder):
        self.folder = folder
        self.wait_for_step = False  # whether a stage is training
        self.received = 0           # the signal's number
        self.since = 0.0            # seconds of the clock, when it was received
        self.is_in_step = True      # and not in the validation or the saving after a step
        rank, _ = processes()
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if rank > 0:
                signal.signal(number, signal.SIG_IGN)
            elif signal.getsignal(number) != signal.SIG_IGN:  # what nohup ignores stays ignored
                signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self.received and time.monotonic() - self.since < SAME_SIGNAL:
            return
        if self.received or not self.wait_for_step:
            signal.signal(number, signal.SIG_IGN)  # once more, it would interrupt the end
            raise KeyboardInterrupt(self.received or number, self.folder)
        self.received = number
        self.since = time.monotonic()
        if self.is_in_step and hasattr(signal, "alarm"):  # not on Windows
            signal.alarm(STEP_SECONDS)

    def step_has_ended(self):
        """Validation and saving may take their time, since no work may be lost there."""
        self.is_in_step = False
        if hasattr(signal, "alarm"):
            signal.alarm(0)

    def stop_if_received(self):
        """Ends the program if a signal was received; otherwise the next step begins."""
        if self.received:
            raise KeyboardInterrupt(self.received, self.folder)
        self.is_in_step = True


# === Appendix: the cache of trained models; skip on a first reading ===============================
#
# A cached model is found by its stage, its data, its starting weights and the options that may have
# changed it. Its file has hashes of the code that trained it: if the code of a module was edited
# since then, the model is trained anew.

def digest(content):
    """A short hash of bytes."""
    return hashlib.sha256(content).hexdigest()[:12]


class WithoutDocstrings(ast.NodeTransformer):
    """Removes values that stand alone, such as docstrings, from parsed code."""

    def visit_Expr(self, node):
        return None if isinstance(node.value, ast.Constant) else node


@cache
def code_hash(source):
    """A hash of a module's text, in which comments, docstrings and layout do not count."""
    tree = WithoutDocstrings().visit(ast.parse(source))
    return digest(ast.unparse(tree).encode())


MODULES = ("clip_tokenizer.py", "vlpose.py", "data.py", "uda.py", "eval.py", "train.py")
HERE = Path(__file__).resolve().parent  # also if the program was started by a link to it
# Their text when the program starts: this code runs, even if a file is edited later.
SOURCES = {name: (HERE / name).read_bytes() for name in MODULES}

# Options of these classes are not in the key: most of them cannot change a cached model. Those that
# can are in the key as their effect: the data, the probability of a restyling, and the weights of
# the style network. Every other option is in the key, also a new one.
NOT_IN_KEY = (VLPoseAdaptation, AlignmentAdaptation, RunOptions, FirstOptions)


def fit_or_find(stage, model, loss_of, pools, run, restyle=None, stylist=None):
    """Gives a model the result of a stage, from the first place that has it.

    The places are (1) this run's folder, (2) the cache, unless this run has begun the stage, and
    (3) `fit`.
    restyle, stylist: the function that changes images, and the network whose weights it uses.
    """
    # (1) A model that this run took from the cache stays in its folder: later stages need the same.
    own = run.folder / f"{stage.name}.cached.pth"
    if all_items([own.exists()])[0]:
        model.load_state_dict(load_pose_model(own).state_dict())
        print(f"{stage.name} model: {own} (trained before)")
        return

    # (2) The cache finds a model by its key, and compares the code that has trained it.
    files = list(MODULES)
    if restyle:
        file = file_of(restyle)
        if file is None:  # nobody can tell whether it is still the same
            fit(stage, model, loss_of, pools, run)
            return
        files.append(file.name)
    code = {name: run.code[name] for name in files}
    key = key_of(stage, model, pools, run.options, restyle, stylist)
    path = Path(run.options.cache) / f"{stage.name}-{digest(json.dumps(key).encode())}.pth"
    begun = (run.folder / f"{stage.name}.checkpoint.pth").exists()
    to_find = all_items([path.exists() and not begun])[0]  # as the first process sees it
    if to_find and take_from(path, stage, model, code):
        save_checkpoint(own, model)
        return

    # (3) A stage that other code has begun is finished, but not kept for other runs.
    fit(stage, model, loss_of, pools, run)
    if run.checkpoints.code == run.code:
        keep(path, model, code)


def key_of(stage, model, pools, options, restyle, stylist):
    """What a trained model depends on, but for the code and the machine."""
    in_key = vars(options).copy()
    for options_class in NOT_IN_KEY:
        if isinstance(options, options_class):
            for entry in fields(options_class):
                del in_key[entry.name]
    _, world = processes()  # several processes add up in another order
    key = {"figures": FIGURES, "stage": asdict(stage), "config": asdict(model.config),
           "weights": state_hash(model), "options": in_key, "processes": world,
           "data": [identity_of(crops, rows) for crops, rows in pools]}
    if restyle:
        key["restyle"] = f"{restyle.__module__}.{restyle.__qualname__}"
        key["probability"] = options.image_level
        key["stylist"] = None if stylist is None else state_hash(stylist)
    return key


def take_from(path, stage, model, code):
    """Fills a model from the cache, and says so; False if it must be trained anew."""
    try:
        found = load_pose_model(path)
    except DataError as error:
        print(f"{error}; training it anew")
        return False
    changed = changed_code(code, found.about.get("code", {}))
    if changed:
        print(f"{stage.name} model: {changed} since: training anew")
        return False
    model.load_state_dict(found.state_dict())
    print(f"{stage.name} model: {path} (trained before)")
    return True


def changed_code(now, then):
    """"train.py has changed", or "train.py, uda.py have changed"; "" if no file has.

    now, then: {file: hash}.
    """
    changed = [name for name in now if now[name] != then.get(name)]
    if not changed:
        return ""
    return f"{', '.join(changed)} {'has' if len(changed) == 1 else 'have'} changed"


def keep(path, model, code):
    """Writes a trained model into the cache; a cache that cannot be written is only a warning."""
    try:
        save_checkpoint(path, model, code=code)
    except DataError as error:
        print(f"{error}; it is not kept for other runs", file=sys.stderr)


def file_of(function):
    """The path of the file that defines a plain function; None for others, or without a file."""
    if not inspect.isfunction(function) and not inspect.ismethod(function):
        return None
    file = inspect.getsourcefile(function)
    if file is None or not os.path.exists(file):
        return None
    return Path(file)


def identity_of(crops, rows):
    """What the crops that a stage draws depend on, in values that JSON has.

    Of the files all names and sizes count, and what stands in a hundred of them: so it is noticed
    if all were replaced, and nobody has to wait until all are read.
    """
    people = crops.dataset
    try:
        files = [(Path(file).name, os.path.getsize(file)) for file in people.files]
        for file in people.files[::math.ceil(len(files) / 100)]:
            files.append(digest(Path(file).read_bytes()))
    except OSError as error:
        raise DataError(f"{error.filename}: expected the pictures of {people.name}: "
                        f"{error.strerror}; {GO_ON}") from None
    labels = people.keypoints[rows].tobytes() + people.boxes[rows].tobytes()
    sides = people.skeleton.flip_pairs, people.skeleton.upper
    return {"people": len(rows), "files": digest(json.dumps(files).encode()),
            "labels": digest(labels), "images": digest(people.image_index[rows].tobytes()),
            "keypoints": list(people.skeleton.names), "sides": digest(repr(sides).encode()),
            "size": list(crops.size), "augmentation": asdict(crops.augmentation)}


def state_hash(model):
    tensors = model.state_dict().values()
    return digest(b"".join(tensor.cpu().numpy().tobytes() for tensor in tensors))


# === Appendix: data and models; skip on a first reading ===========================================

@dataclass
class TestSet:
    """A data set to test on, and where to look for its people: their own boxes, or a detector's."""
    dataset: PoseDataset
    boxed: PoseDataset                # its people are the boxes
    people: np.ndarray                # rows of `boxed`
    scores: np.ndarray | None = None  # of the detector's boxes

    def numbers(self, model, texts, workers):
        """What the model predicts, and {domain: {"AP", "PCK", "people"}}."""
        results = predict_people(model, self.boxed, texts, self.people, self.scores, workers)
        detected = self.scores is not None
        return results, domain_table(self.dataset, results, model.config.image_size, detected)


def vlpose_data(options):
    """The source (None with --weights), the target, and a list of their TestSets in this order.

    The list leaves out a data set without labelled people to test on.
    """
    target = training_set(options.target, options, split=split_of_target(options))
    source = None
    if not options.weights:
        source = training_set(options.source, options, target.skeleton)
    labelled = [open_test(options, target.skeleton)]
    if options.source not in (options.target, options.test):
        labelled.insert(0, open_with_sentences(options.source, "val", options, target.skeleton))
    tests = [TestSet(dataset, dataset, dataset.annotated)
             for dataset in labelled if len(dataset.annotated)]
    if not tests:
        held_out = ", ".join(Path(file).name for file in labelled[-1].files[:5])
        raise DataError(f"{options.source}, {options.target}: expected labelled people to "
                        f"validate on, found none; label some in the held-out images {held_out}")
    if options.boxes:
        tests[-1] = test_in_boxes(tests[-1].dataset, options)
    check_pictures([test.dataset for test in tests])
    return source, target, tests


def test_in_boxes(dataset, options):
    """The target as a TestSet in the boxes of a detector's results."""
    if dataset.name != (options.test or options.target):
        raise DataError(f"{options.target}: expected labelled people to test on in boxes, "
                        "found none")
    rows, boxes, scores = read_boxes(options.boxes, image_names(dataset))
    report_boxes_outside(options.boxes, dataset, rows, boxes)
    return TestSet(dataset, with_boxes(dataset, rows, boxes), np.arange(len(rows)), scores)


@dataclass
class AlignmentData:
    """The data sets of alignment, all with one skeleton: see `alignment_data`."""
    source: PoseDataset                  # with --source none it is the target
    target: PoseDataset                  # without its labels
    test: PoseDataset
    labelled_target: PoseDataset | None  # of --oracle
    texts: dict | None                   # {sentence: T} where an adapter reads them
    text_dim: int | None                 # the width of T


def alignment_data(options):
    """AlignmentData. The skeleton is the test's, or where nothing is labelled there the source's.

    With --source none it is always the model's.
    """
    target = open_with_sentences(options.target, split_of_target(options), options)
    target = remove_labels(target)
    source = None
    if options.source != "none":
        source = training_set(options.source, options)
    test = open_test(options)
    labelled = len(test.annotated) > 0
    check_pictures([test])
    with_people = len(np.unique(target.image_index))
    images = f"{len(target.files):,} images"
    if with_people < len(target.files):
        images = f"{with_people:,} of {images}; the others have no box and are left out"
    print(f"{options.target}: {len(target.ids):,} people, their labels unread, in {images}")

    if source is None:
        skeleton = load_pose_model(options.weights, skeleton=options.skeleton).skeleton
    elif labelled:
        skeleton = test.skeleton
    else:
        skeleton = source.skeleton
    target = with_boxes(replace(target, skeleton=skeleton), target.image_index, target.boxes)
    source = with_skeleton(source, skeleton) if source else target
    test = with_skeleton(test, skeleton) if labelled else target
    labelled_target = None
    if options.oracle:
        labelled_target = training_set(options.target, options, skeleton, split_of_target(options))

    texts, text_dim = read_texts([source, target, test], options)
    return AlignmentData(source, target, test, labelled_target, texts, text_dim)


def open_test(options, skeleton=None):
    """The data set that the target's models are tested on: that of --test, or held-out images."""
    if not options.test:
        return open_with_sentences(options.target, "val", options, skeleton)
    test = open_with_sentences(options.test, split_to_test_on(options.test), options, skeleton)
    if not len(test.annotated):
        raise DataError(f"--test {options.test}: expected labelled people to test on, found none")
    return test


def split_of_target(options):
    """The split to adapt to: "train", or "all" of a single file if --test names another one."""
    if options.test and split_to_test_on(options.target) == "all":
        return "all"
    return "train"


def open_with_sentences(spec, split, options, skeleton=None):
    dataset = load_dataset(spec, split, options.cache)
    if skeleton:
        dataset = with_skeleton(dataset, skeleton)
    return with_sentences(dataset, options.sentences)


def training_set(spec, options, skeleton=None, split="train"):
    """A data set with labelled people to train on; prints a line on how many there are."""
    dataset = open_with_sentences(spec, split, options, skeleton)
    people = len(dataset.annotated)
    skipped = len(dataset.ids) - people
    if not people:
        held_out = len(load_dataset(spec, "val", options.cache).annotated)
        raise DataError(f"{spec}: expected labelled people to train on, found none; {held_out} "
                        "are in images that are held out to test on")
    line = f"{spec}: {people:,} people in {len(dataset.files):,} images to train on"
    if skipped:
        line += f"; {skipped} without labelled keypoints skipped"
    if people < options.batch_size:
        line += f"; fewer than a batch of {options.batch_size} has"
    print(line)
    return dataset


def check_pictures(datasets):
    """Raises DataError, after their names, for pictures to test on that cannot be read.

    Own pictures are left out: `read_pictures` has read them already.
    """
    others = [dataset for dataset in datasets if not dataset.name.startswith("pictures:")]
    files = [file for dataset in others for file in dataset.files]
    problems = unreadable(list(dict.fromkeys(files)))
    if problems:
        print(*problems.values(), sep="\n", file=sys.stderr)
        raise DataError(f"{len(problems)} of the pictures to test on cannot be read, see above")


def starting_model(options, skeleton, trunk_size=(256, 192)):
    """The model of --weights, with a predictor for this skeleton; or a new one.

    A new model has the backbone of --init, if that is given.
    trunk_size: height and width of crops, where a network of torchvision is new.
    """
    torch.manual_seed(options.seed)
    report_sides(skeleton)
    size = tuple(options.image_size) if options.image_size else None
    if options.weights:
        model = load_pose_model(options.weights, size, options.skeleton)
        model = with_keypoints(model, skeleton)
    else:
        config = MODEL_CONFIGS[options.size]
        if size is None:
            size = trunk_size if config.trunk else config.image_size
        model = PoseModel(replace(config, image_size=size), len(skeleton.names), skeleton)
        if options.init:
            load_backbone(model, options.init)
    if options.sigma:
        model.config = replace(model.config, sigma=options.sigma)
    return model.to(options.device)


def new_stylist(options):
    """The style network; None without the image level.

    It is a small one for small images, or the one of --style-encoder and --style-weights.
    """
    if not options.image_level:
        return None
    torch.manual_seed(options.seed)
    if options.style_encoder:
        stylist = StyleTransfer(options.style_encoder)
    else:
        stylist = StyleTransfer(width=16, depth=1)
    if options.style_weights:
        source, choice = split_choice(options.style_weights)
        state = load_weights(source)
        whole = "encoder.0.weight" in state  # a run's style.pth
        if not whole and not options.style_encoder:
            raise DataError(f"--style-weights {options.style_weights}: expected a run's style.pth, "
                            "or a decoder and the --style-encoder that it was trained for")
        part = stylist if whole else stylist.decoder
        load_strictly(part, state, options.style_weights)
        if choice == "normalized" and not whole:
            for_normalized_images(stylist)
        elif choice:
            raise DataError(f"--style-weights {options.style_weights}: expected no choice after #, "
                            "or #normalized after a decoder's name")
        elif not whole and source not in PUBLIC_FILES:
            print(f"{source}: does not say which images it was trained with: taken for RGB in "
                  "[0, 1]; '#normalized' after its name takes it for one of the alignment's "
                  "authors, whose images are normalised", file=sys.stderr)
    return stylist.to(options.device)


def read_texts(datasets, options):
    """{sentence: T (L, D_text)} of all images, read by the frozen text tower; and D_text.

    Both are None where no adapter reads text.
    """
    reads = options.strategy == "vlpose"
    if reads and options.mode == "vlpose":
        reads = reads_text(options.decoder, options.matcher)
    if not reads:
        return None, None
    if options.text_weights == "random":
        print("no CLIP weights given (--text-weights ViT-B/32): a small random text tower with a "
              "fixed seed stands in")
    print(*sentences_read(datasets), sep="\n")
    sentences = np.concatenate([dataset.sentences for dataset in datasets])
    files = [file for dataset in datasets for file in dataset.files]
    report_cut(sentences, files, options.strict)
    clip_text = load_clip_text(options.text_weights).to(options.device)
    texts = encode_sentences(clip_text, np.unique(sentences).tolist(), options.per_token)
    return texts, clip_text.config.embed_dim


def save_model(path, model, options, adapter_only=False):
    """Writes a model, or of a VLPose only the adapter, and which sentences it reads."""
    save_checkpoint(path, model, adapter_only, text_weights=options.text_weights,
                    sentences=options.sentences, per_token=options.per_token)


def report_trained_share(model, base, options):
    """Prints how many parameters are trained."""
    counts = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    trained = sum(counts)
    share = trained / sum(parameter.numel() for parameter in base.parameters())
    print(f"{options.strategy}: {trained:,} trainable parameters, {share:.1%} of the base model's")


# === Appendix: tables and pictures; skip on a first reading =======================================

PREVIEWS = 8  # people in a picture
SOME = 100    # people to validate with


@as_the_run_can_go_on()
def validation(stage, model, test, texts, workers):
    """The number that is measured while a stage trains; NaN where nothing is labelled.

    Where the stage selects its best model, it is the AP over all of the TestSet. Otherwise it is
    the PCK of some of its people, without the flip test.
    """
    if stage.select == "best":
        _, table = test.numbers(model, texts, workers)
        return table[whole_of(test.dataset)]["AP"]
    people = test.dataset.annotated
    if not len(people):
        return math.nan
    some = test.dataset.select_people(people[::math.ceil(len(people) / SOME)])
    results = predict(model, some, texts, flip_test=False, workers=workers)
    pck = pck_of_results(some, results, model.config.image_size, groups=some.skeleton.groups)
    return pck["mean"]


# ---------------------------------------------------------------------------------------- of VLPose

@as_the_run_can_go_on()
def compare_poses(base, adapted, texts, tests, run):
    """Keeps the adapted model, prints and keeps a table of it and the original, draws their poses.

    A VLPose's adapter.pth is small; with its adapter off, its poses must be the original's.
    """
    models = {"original": (base, None), "adapted": (adapted, texts)}  # what predicts, what it reads
    save_model(run.folder / "model.pth", adapted, run.options)
    if isinstance(adapted, VLPose):
        save_model(run.folder / "adapter.pth", adapted, run.options, adapter_only=True)
        models["adapter off"] = (adapted.base, None)
    tables = {}
    results = {}
    domain_of = {}  # of each row of the tables
    for label, (model, read) in models.items():
        tables[label] = {}
        results[label] = []
        for test in tests:
            found, table = test.numbers(model, read, run.options.workers)
            results[label].append(found)
            for domain, numbers in table.items():
                row = domain
                if row in tables[label]:  # two data sets have a domain of the same name
                    row = f"{domain} ({test.dataset.name})"
                tables[label][row] = numbers
                domain_of[row] = domain
    write_file(run.folder / "results.json", tables)
    people = []
    for test in tests:
        people += some_of_each_domain(test.dataset, models, PREVIEWS // len(tests))
    write_file(run.folder / "poses.png", draw_sheet(people))
    print_domains(tables, domain_of, [whole_of(test.dataset) for test in tests])
    if "adapter off" in models:
        report_adapter_off(results["adapter off"] == results["original"])


def report_adapter_off(same):
    """same: every coordinate and every score is the original's."""
    print(f"adapter off gives the original's poses exactly: {'yes' if same else 'NO'}")
    if not same:
        raise DataError("with its adapter off the model differs from the original: its weights "
                        "must have changed")


def domain_table(dataset, results, size, detected=False):
    """{domain: {"AP", "PCK", "people"}} of what `predict` gave, and of the data set as a whole.

    AP is COCO's, PCK is PCK@0.05 of the crop's height. detected: in a detector's boxes nobody knows
    whose pose it is, so that PCK is -1.
    """
    of_all, numbers = evaluate_domains(to_coco(dataset), results, dataset.skeleton.sigmas)
    domains = dataset.domains[dataset.image_index[dataset.annotated]]  # (people,)
    chosen = {domain: domains == domain for domain in numbers}         # {domain: which people}
    whole = whole_of(dataset)
    numbers[whole] = of_all
    chosen[whole] = np.full(len(domains), True)
    table = {}
    for domain, people in chosen.items():
        if not people.any():
            continue
        pck = -1.0
        if not detected:
            pck = pck_of_results(dataset, results, size, people)["mean"]
        table[domain] = {"AP": numbers[domain]["AP"], "PCK": pck, "people": int(people.sum())}
    return table


def whole_of(dataset):
    """The row of a table for all people of a data set, beside the rows of its domains."""
    return f"all of {dataset.name}"


def print_domains(tables, domain_of, whole):
    """AP and PCK of each domain, their means, and those over all of each data set.

    tables: {model: {row: {"AP", "PCK", "people"}}}; each model has two columns.
    domain_of: {row: domain}; whole: the rows for whole data sets.
    """
    natural = [row for row, domain in domain_of.items() if domain in NATURAL_DOMAINS]
    artificial = [row for row in domain_of if row not in {*whole, *natural}]
    members = {row: [row] for row in natural + artificial}
    first_table = next(iter(tables.values()))
    for kind, rows in (("natural", natural), ("artificial", artificial)):
        if rows:
            members[f"mean of {kind}{left_out(first_table, rows)}"] = rows
    for row in whole:
        members[row] = [row]
    printed = {}
    for title, rows in members.items():
        printed[title] = {}
        for model, table in tables.items():
            for measure in ("AP", "PCK"):
                values = known_numbers(table, rows, measure)
                printed[title][f"{model} {measure}"] = np.mean(values) if values else -1.0
        printed[title]["people"] = sum(first_table[row]["people"] for row in rows)
    print(format_table("domain", printed))


def known_numbers(table, rows, measure):
    """The AP or the PCK of the rows that have one; -1 stands where nobody can be measured."""
    return [table[row][measure] for row in rows if table[row][measure] >= 0]


def left_out(table, rows):
    """" (PCK: 1 of 2)" where only one of two rows has a PCK, which is then the mean; or ""."""
    notes = []
    for measure in ("AP", "PCK"):
        known = len(known_numbers(table, rows, measure))
        if known < len(rows):
            notes.append(f"{measure}: {known} of {len(rows)}")
    return f" ({', '.join(notes)})" if notes else ""


def some_of_each_domain(dataset, models, count):
    """About `count` people to draw, at least one of each domain, with the poses of both models.

    models: {label: (model, texts)}, of which `original` and `adapted` are drawn.
    """
    domains = dataset.domains[dataset.image_index[dataset.annotated]]
    names = np.unique(domains)
    rows = []
    for name in names:
        rows.extend(dataset.annotated[domains == name][:max(1, count // len(names))])
    people = [{"truth": true_pose(dataset, row)} for row in rows]
    for label in ("original", "adapted"):
        model, texts = models[label]
        for poses, result in zip(people, predict(model, dataset, texts, rows)):
            poses[label] = np.reshape(result["keypoints"], (-1, 3))
    titles = dataset.domains[dataset.image_index[rows]]
    return [(title, dataset, row, poses) for title, row, poses in zip(titles, rows, people)]


# ------------------------------------------------------------------------------------- of alignment

@as_the_run_can_go_on()
def compare_pck(models, stylist, data, run):
    """Keeps the models and a table of them, prints it, and draws what they predict.

    The table has PCK, unless nothing is labelled, and what can be known without labels.
    """
    test = data.test
    if stylist:
        save_tensors(run.folder / "style.pth", stylist.state_dict())
    labelled = len(test.annotated) > 0
    table = {}
    results = {}
    for name, model in models.items():
        save_model(run.folder / f"{name.replace(' ', '-')}.pth", model, run.options)
        read = data.texts if isinstance(model, VLPose) else None
        results[name] = predict(model, test, read, flip_test=False, workers=run.options.workers)
        table[name] = {}
        if labelled:
            table[name] = pck_numbers(model, test, results[name], read, run.options.workers)
        table[name] |= confidence(model, test, results[name], read, run.options.workers)
    write_file(run.folder / "results.json", table)
    picture = draw_pseudo_labels(test, results["source only"], results["teacher"])
    write_file(run.folder / "poses.png", picture)
    people = f"{len(results['teacher']):,} people"
    print_columns(f"PCK@0.05 of {people}" if labelled else f"no labels, {people}", table)
    if labelled:
        print("PCK is without the flip test; eval.py predicts with it")
    print("the last two rows say how sure a model is, not how right: it can grow surer of wrong "
          "poses")
    if labelled and "oracle" in table:
        print_gap({name: numbers["mean"] for name, numbers in table.items()})
    teacher = models["teacher"]
    if isinstance(teacher, VLPose):
        save_model(run.folder / "adapter.pth", teacher, run.options, adapter_only=True)
        off = predict(teacher.base, test, flip_test=False, workers=run.options.workers)
        report_adapter_off(off == results["source only"])


def print_columns(title, columns):
    """A table of {column: {row: number}}."""
    rows = {row: {} for row in columns["teacher"]}
    for row, numbers in rows.items():
        for name, column in columns.items():
            numbers[name] = column[row]
    print(format_table(title, rows))


def print_gap(means):
    """How much of the way from the source-only model to the oracle the others have come."""
    start = means["source only"]
    gap = means["oracle"] - start or math.nan
    shares = [f"{name} {(means[name] - start) / gap:.0%}" for name in ("student", "teacher")]
    print("share of the gap between source only and oracle that is closed: " + ", ".join(shares))


def pck_numbers(model, dataset, results, texts, workers):
    """PCK of what `predict` gave, by groups of joints; the mean at 0.2, and as the papers count."""
    groups = dataset.skeleton.groups
    size = model.config.image_size
    numbers = pck_of_results(dataset, results, size, groups=groups)
    wide = pck_of_results(dataset, results, size, threshold=0.2, groups=groups)
    numbers["mean at 0.2"] = wide["mean"]
    numbers["mean (grid)"] = grid_pck(model, dataset, groups, texts, workers)["mean"]
    return numbers


@torch.inference_mode()
def grid_pck(model, dataset, groups, texts=None, workers=0, threshold=0.05):
    """`evaluate_pck_grid` of a model on annotated people, without the flip test.

    texts: {sentence: T}, which a VLPose reads.
    """
    height, width = model.config.image_size
    found = []  # of each batch
    batches = predict_heatmaps(model, dataset, dataset.annotated, texts, workers=workers)
    for batch, heatmaps in batches:
        predicted = highest_cells(heatmaps.float().cpu())                       # (B, K, 2)
        target, visible = label_heatmaps(batch["keypoints"], batch["visible"], model.config)
        found.append((predicted, highest_cells(target), visible.numpy()))
    predicted, target, visible = map(np.concatenate, zip(*all_items(found)))
    size = (height // 4, width // 4)
    return evaluate_pck_grid(predicted, target, visible, size, threshold, groups)


def confidence(model, dataset, results, texts=None, workers=0):
    """What can be known of a model without labels: how sure it is, which is not how right it is.

    `sure keypoints` is the share of keypoints with a score of at least 0.5. `pixels between two
    views` is how far apart a keypoint is in two views, the median in pixels of the crop. The other
    view is moved, scaled and turned at random, always the same.
    results: what `predict` gave for its people in the plain crop, without the flip test.
    """
    people = dataset.annotated if len(dataset.annotated) else np.arange(len(dataset.ids))
    size = model.config.image_size
    view = Augmentation(scale=0.2, shift=0.1, rotation=20)
    others = predict(model, dataset, texts, people, flip_test=False, workers=workers,
                     augmentation=view)
    plain = poses_of(results)                                                   # (people, K, 3)
    apart = np.linalg.norm((plain - poses_of(others))[:, :, :2], axis=2)        # (people, K)
    widths = crop_width(dataset.boxes[people], size)                            # (people,)
    apart *= size[1] / widths[:, None]                                          # in pixels of crops
    return {"sure keypoints": np.mean(plain[:, :, 2] >= 0.5),
            "pixels between two views": np.median(apart)}


def draw_pseudo_labels(test, source_only, teacher):
    """Some people with their poses: the truth, the source-only model's, and the teacher's.

    The teacher's are drawn as what it is sure of, the pseudo-labels, and as a whole.
    """
    labelled = len(test.annotated) > 0
    rows = test.annotated if labelled else np.arange(len(test.ids))
    before = poses_of(source_only)
    after = poses_of(teacher)
    sure = after[:, :, 2] > np.median(after[:, :, 2])  # `confidence_mask`, of all people
    pseudo_labels = after.copy()
    pseudo_labels[:, :, 2] = sure
    people = []
    for place in np.unique(np.linspace(0, len(rows) - 1, PREVIEWS).astype(int)):
        row = rows[place]
        poses = {}
        if labelled:
            poses["truth"] = true_pose(test, row)
        poses["source only"] = before[place]
        poses["pseudo-labels"] = pseudo_labels[place]
        poses["teacher"] = after[place]
        title = Path(test.files[test.image_index[row]]).name
        people.append((title, test, row, poses))
    return draw_sheet(people)


# ------------------------------------------------------------------------------------------ of both

def draw_sheet(people, side=192):
    """A picture with a column for each person and a row for each of their poses.

    people: tuples (title, data set, row of the person, {label: pose (K, 3)}).
    """
    _, _, _, first = people[0]
    labels = list(first)
    sheet = Image.new("RGB", (len(people) * side, len(labels) * side + 18), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (title, dataset, row, poses) in enumerate(people):
        left = column * side
        draw.text((left + 4, 3), title, "black")
        matrix = crop_matrix(dataset.boxes[row], (side, side))
        crop = crop_of(dataset, row, matrix, side)
        for line, pose in enumerate(poses.values()):
            moved = np.column_stack([transform_points(pose[:, :2], matrix), pose[:, 2]])
            sheet.paste(draw_pose(crop, moved, dataset.skeleton), (left, 18 + line * side))
    for line, label in enumerate(labels):
        draw.text((4, 22 + line * side), label, "white", stroke_width=1, stroke_fill="black")
    return sheet


def crop_of(dataset, row, matrix, side):
    """A picture of side×side pixels of a person's image, which `matrix` maps to it."""
    file = dataset.files[dataset.image_index[row]]
    wanted = dataset.boxes[row, 2:].max() / side  # a smaller image is read faster
    image, shrink = open_image(file, wanted, dataset.upright)
    return Image.fromarray(warp_image(image, matrix, (side, side), shrink))


def true_pose(dataset, row):
    """A person's keypoints (K, 3) to draw: x, y, and the visibility 0, 1, 2 as a score."""
    return dataset.keypoints[row] * [1, 1, 0.5]


# === Appendix: the command; skip on a first reading ===============================================

MODES = {"vlpose": (train_vlpose, VLPoseOptions), "uda": (train_uda, AlignmentOptions)}


def main(argv=None):
    """Runs a command line -> the exit status: 0, 2 after an error, 128 + the number of a signal."""
    with as_program(output_is_needed=False):
        return run_command(argv)


def run_command(argv):
    """What `main` does once the standard streams and the signals are prepared."""
    store = options = None
    is_one_of_many = "LOCAL_RANK" in os.environ  # torchrun has started it
    if is_one_of_many and os.environ.get("RANK", "0") != "0":
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # the first says it
    try:
        options = parse_options(argv)
        if is_one_of_many:
            store = join_processes(options)
        out = options.out
        if out and not options.resume and (Path(out) / "config.json").exists():
            raise DataError(f"{out}: holds a run already; continue it with --resume, or name "
                            "another folder")
        run_mode, _ = MODES[options.mode]
        run_mode(options)
    except (Exception, KeyboardInterrupt) as error:
        if store and store.add("failed", 1) > 1:
            return 2  # another process has said why
        if options and is_one_of_many:
            sys.stderr = Output(sys.__stderr__ or sys.stderr, "standard error")
        return fail(error)
    finally:
        if hasattr(signal, "alarm"):
            signal.alarm(0)
    if store:
        dist.destroy_process_group()
    return 0


def parse_options(argv):
    """The options of a command line, an object of the mode's dataclass.

    Raises DataError for an option that is unknown, wrong, or without effect.
    """
    given, _ = Parser(FirstOptions(), add_help=False).parse_known_args(argv)
    first = FirstOptions(**vars(given))
    if first.resume is not None:
        return resumed(first.resume, argv)
    defaults = defaults_of(first.mode, first.recipe)
    return with_given(argv, defaults, defaults)


def defaults_of(mode, recipe):
    """The options of a mode with the defaults of a recipe, "minutes" or "paper"."""
    _, options_class = MODES[mode]
    options = options_class()
    if recipe == "paper":
        for entry in fields(options):
            setattr(options, entry.name, entry.metadata["paper"])
    return options


def with_given(argv, options, defaults):
    """The options with the values that a command line gives to some of them, all checked.

    options: the defaults, or those of a run that goes on.
    """
    parser = Parser(defaults, description="Trains and evaluates a pose estimator that crosses "
                    "domains.")
    given = vars(parser.parse_args(argv))
    options = replace(options, **given)
    check_options(options, defaults)
    check_device(options.device)
    if options.source == options.target and not options.weights:
        raise DataError(f"--source {options.source}: expected other data than --target")
    is_vlpose = isinstance(options, VLPoseOptions)  # whatever --mode is given with --resume
    if is_vlpose and options.test == options.target:
        raise DataError(f"--test {options.test}: expected other data than --target")
    if is_vlpose:
        keep_the_given(options, given, "steps", "epochs")
        keep_the_given(options, given, "base_steps", "base_epochs")
    elif options.source == "none":
        leave_the_source_out(options, given)
    if options.bf16 is None:
        options.bf16 = has_bf16(options.device)
    return options


def keep_the_given(options, given, steps, epochs):
    """Of --steps and --epochs the one that is given counts; the other one becomes None."""
    if steps in given and epochs not in given:
        setattr(options, epochs, None)
    if epochs in given and steps not in given:
        setattr(options, steps, None)
    values = [getattr(options, steps), getattr(options, epochs)]
    if values.count(None) != 1:
        found = "neither" if values == [None, None] else "both"
        raise DataError(f"expected {flag_of(steps)} or {flag_of(epochs)}, found {found}")


def leave_the_source_out(options, given):
    """With --source none the model of --weights adapts without the levels that need a source."""
    if not options.weights:
        raise DataError("--source none: expected --weights, the model to adapt")
    for name in ("image_level", "feature_level"):
        if given.get(name):
            raise DataError(f"{flag_of(name)}: has no effect with --source none")
        setattr(options, name, 0.0)


def has_bf16(device):
    """Whether bfloat16 is fast: a GPU before Ampere has no convolutions in it."""
    return device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)


# What may be other than before when a run goes on.
MAY_CHANGE = ("steps", "epochs", "device", "bf16", "workers", "checkpointing", "patience", "resume",
              "strict", "cache", "dry_run")


def resumed(folder, argv):
    """The options of the run in a folder, changed by those of the command line.

    The saved values take the place of the defaults, and pass the same checks as typed ones.
    """
    config = Path(folder) / "config.json"
    if not folder or not config.exists():
        raise DataError(f"{config}: not there; --resume wants the folder of an earlier run")
    saved = read_json(config, dict, "the options of a run")
    with expecting(config, "the options of a run"):
        processes_then = saved.pop("processes")
        inputs_then = dict(saved.pop("inputs"))
        defaults = defaults_of(saved["mode"], saved["recipe"])
        names = [*saved, *inputs_then]
        unknown = [flag_of(name) for name in names if name not in vars(defaults)]
        if unknown:
            raise DataError(f"{config}: expected the options of a run, found {unknown[0]}")
        if saved["cache"] != defaults.cache and not (Path(saved["cache"]) / FIGURES).exists():
            # A run's folder that comes from somebody else does not choose where files are written.
            print(f"{config}: its cache {saved['cache']} holds no figures; {defaults.cache} is "
                  "taken instead", file=sys.stderr)
            saved["cache"] = defaults.cache
        began = replace(defaults, **saved)
    try:
        options = with_given(argv, began, defaults)
        inputs_now = digests_of_inputs(options)
    except DataError as error:
        raise DataError(f"{config} and what is given now: {error}") from None
    for name, then in saved.items():
        now = getattr(options, name)
        if name not in MAY_CHANGE and now != then:
            raise DataError(f"{config}: began with {flag_of(name)} {then}, found {now}")
    for name, then in inputs_then.items():
        value = getattr(options, name)
        if name not in inputs_now:
            raise DataError(f"{config}: began with {flag_of(name)} {value}, which is not there now")
        if inputs_now[name] != then:
            raise DataError(f"{config}: began with other content of {flag_of(name)} {value}")
    processes_now = 1
    if "LOCAL_RANK" in os.environ:  # torchrun has started this program
        processes_now = int(os.environ.get("WORLD_SIZE", 1))
    if processes_now != processes_then:
        print(f"{folder}: goes on with another number of processes, {processes_now}: not to the "
              "last digit")
    options.resume = os.path.abspath(folder)
    return options


if __name__ == "__main__":
    sys.exit(main())
