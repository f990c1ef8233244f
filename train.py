"""Training: the loop, and the stages of both methods.

    python train.py --mode vlpose        a base model on photographs, then VLPose's adapter on art
    python train.py --mode uda           labels in one domain, and multi-level alignment to images of another

The lesson, from top to bottom: (1) the recipe of each method, for minutes and as in its paper: skim it; (2) VLPose's
loss, and the loop that all stages share; (3) the stages of VLPose; (4) those of multi-level alignment. `train_vlpose`
and `train_uda` are the tables of contents of the papers' experiments. The appendix holds the plan of the stages, the
run's folder, the cache, data and models, tables, and the command.
"""
import copy
import re
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from data import average_gradients, encode_heatmaps, first_process_first, normalize, seed_step
from eval import number
from uda import Compute, LossWeights, MultiLevelAlignment, heatmaps_and_features, source_view, supervised_loss
from vlpose import DECODERS, MATCHERS, MODEL_CONFIGS, VLPose, padded, run_model

# ------------------------------------------------------------------------------------------------------ 1. the recipes

def setting(minutes, paper, help, type=str, **limits):
    """A field of a recipe: its value for minutes on a CPU, that of the paper, and what it means.

    It is an option of the command, too: `lr` is `--lr`. type, limits: its values, for `argparse`.
    """
    return field(default=minutes, metadata={"paper": paper, "help": help, "type": type, **limits})


# The types of options: `number` makes a function that reads a value and refuses one outside its limits.
count, positive, rate, weight, share = (number(int, 0), number(int, 1), number(float, above=0), number(float, 0),
                                        number(float, 0, most=1))
LORA = dict(decoder="baseline", num_prompts=0, rank=4)  # a VLPose of which low-rank updates alone are left
FALLS = (170 / 210, 200 / 210)  # ViTPose's: the learning rate falls after 170 and 200 of 210 epochs


@dataclass
class VLPoseRecipe:
    """VLPose."""
    size: str = setting("tiny", "base", "The size of the model, unless --weights gives one.", choices=MODEL_CONFIGS)
    batch_size: int = setting(16, 512, "The number of crops in a batch.", positive)
    augmentation: str = setting("gentle", "paper", "How much crops are changed.", choices=("gentle", "paper"))
    # the base model
    base_lr: float = setting(1.5e-3, 5e-4, "The learning rate of the base model's training.", rate)
    base_steps: int = setting(3300, None, "How many steps the base model is trained for.", positive)
    base_epochs: int = setting(None, 210, "How many epochs, in place of --base-steps.", positive)
    # its adaptation
    lr: float = setting(1.5e-3, 5e-4, "The learning rate of adaptation.", rate)
    steps: int = setting(1200, None, "How many steps the model is adapted for.", positive)
    epochs: int = setting(None, 210, "How many epochs, in place of --steps.", positive)
    lr_batch: int | None = setting(None, 512, "If given: both rates are scaled by batch size / this.", positive)
    validate_every: int = setting(0, 10, "Validate after so many epochs of adaptation; 0: each fifth.", count)
    select: str = setting("last", "best", "Keep the last model, or the best in validation.", choices=("last", "best"))
    # what is adapted, and what it reads
    strategy: str = setting("vlpose", "vlpose", "What is tuned: nothing, all, some layers, or an adapter.",
                            choices=("scratch", "full", "last", "stem", "all-but-stem", "prompt", "lora", "vlpose"))
    rank: int = setting(0, 0, "The rank of updates of the base's own weights; 0: 4 for lora, none for vlpose.", count)
    decoder: str = setting("dual", "dual", "How the relation enters the frozen decoder.", choices=DECODERS)
    matcher: str = setting("concat", "concat", "What image tokens attend to: both, text, image.", choices=MATCHERS)
    num_prompts: int = setting(None, None, "Visual prompts per layer; by default the paper's for the size.", count)


@dataclass
class AlignmentRecipe:
    """Multi-level alignment. A level or a loss of 0 is left out."""
    size: str = setting("tiny", "resnet101", "The size of the model, unless --weights gives it.", choices=MODEL_CONFIGS)
    batch_size: int = setting(16, 32, "The number of crops in a batch, from each domain.", positive)
    augmentation: str = setting("gentle", "paper", "How much crops and views are changed.", choices=("gentle", "paper"))
    # stage by stage
    style_steps: int = setting(150, 500_000, "Stage 0: how many steps the style decoder is trained for.", positive)
    style_lr: float = setting(5e-3, 1e-5, "The learning rate of stage 0.", rate)
    style_batch: int | None = setting(None, 16, "The batch of stage 0, if it is not --batch-size.", positive)
    supervised_steps: int = setting(1200, 20_000, "Stage 1: how many steps are supervised, on the source.", positive)
    lr: float = setting(1.5e-3, 1e-4, "The learning rate of stage 1.", rate)
    milestones: tuple = setting(FALLS, (), "Shares of stages 0 and 1 after which rates fall tenfold.", share, nargs="*")
    steps: int = setting(600, 15_000, "Stage 2: how many steps the student is adapted for.", positive)
    adapt_lr: float = setting(5e-4, 1e-4, "The learning rate of stage 2.", rate)
    strategy: str = setting("full", "full", "What stage 2 tunes: all, or an adapter.",
                            choices=("full", "vlpose", "lora"))
    adapt_milestones: tuple = setting(FALLS, (4 / 30, 19 / 30), "The same for stage 2.", share, nargs="*")
    steady_discriminator: bool = setting(False, True, "Keep the discriminator's rate as it is.")
    # all stages
    optimizer: str = setting("adamw", "adam", "The optimizer of all stages.", choices=("adamw", "adam"))
    weight_decay: float = setting(0.1, 0.0, "The weight decay of stages 1 and 2.", weight)
    warm_up: int = setting(500, 0, "The steps of linear warm-up, at most a tenth of a stage.", count)
    clip: float = setting(1.0, 0.0, "The norm that a gradient is clipped to; 0: not clipped.", weight)
    # the teacher and the three levels
    ema_decay: float = setting(0.99, 0.999, "How much of the teacher stays at each step.", share)
    image_level: float = setting(0.5, 0.5, "The probability that a source image is restyled.", share)
    feature_level: float = setting(0.002, 0.1, "The weight of the adversarial loss.", weight)
    pose_level: float = setting(0.3, 0.3, "The weight of information maximization.", weight)
    consistency: float = setting(1.0, 1.0, "The weight of the teacher's pseudo-labels.", weight)
    occlusion: float = setting(0.5, 0.5, "The probability that an image has a sure keypoint covered.", share)


# -------------------------------------------------------------------------------------------- 2. the loss and the loop

@dataclass(frozen=True)
class Stage:
    """How one stage of a run trains. The defaults are ViTPose's, but for the layer decay."""
    name: str
    steps: int
    lr: float
    batch_size: int
    seed: int
    bf16: bool  # compute in bfloat16 where that is safe
    layer_decay: float = 1.0
    weight_decay: float = 0.1
    optimizer: str = "adamw"
    warm_up: int = 500  # steps, at most a tenth of all
    milestones: tuple = FALLS  # shares of the steps after which the rate is divided by ten
    clip: float = 1.0  # the greatest norm of a gradient; 0: any
    steady: str = ""  # the rate of parameters whose name begins like this does not fall
    accumulate: int = 1  # parts of a batch whose gradients are added up
    validate_every: int = 0  # steps; 0: each fifth of the stage
    select: str = "last"  # or "best": the model to go on with


def heatmap_loss(model, texts, bf16, batch):
    """Mean of ω (y - ŷ)² over images, keypoints and pixels -> (loss, ŷ).

    ŷ (B, K, h, w) are the predicted heatmaps, y those of the labels; ω (B, K) is 0 where a keypoint is not labelled.
    texts: {sentence: T}; None without text.
    """
    device = next(model.parameters()).device
    images = normalize(batch["image"].to(device, non_blocking=True))                   # (B, 3, H, W)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        predicted = run_model(model, images, batch["sentence"], texts).float()         # ŷ
    labels, weights = label_heatmaps(batch, model.config, device)                      # y, ω
    return ((predicted - labels) ** 2 * weights[:, :, None, None]).mean(), predicted


def label_heatmaps(batch, config, device):
    """Heatmaps (B, K, h, w) of a batch's labels, at a quarter of the crops' size, and the weights (B, K)."""
    size = config.image_size
    points, visible = (batch[name].to(device, non_blocking=True) for name in ("keypoints", "visible"))
    return encode_heatmaps(points, visible, size, (size[0] // 4, size[1] // 4), config.sigma)


def fit(stage, model, loss_of, data, run):
    """Trains what requires a gradient in `model`. A stage that was stopped goes on from its checkpoint.

    loss_of: calls the model on a batch of each data set -> (loss, heatmaps predicted for the first batch, or None).
    data: pairs of Crops and the rows to draw from.
    """
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[stage.optimizer]
    optimizer = kind(parameter_groups(model, stage), fused=next(model.parameters()).is_cuda or None)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    first = run.restore(stage, model, optimizer, data)
    prepare(model, run)
    for step, batches in enumerate(batches_of(data, stage, first, run.workers), start=first):
        seed_step(stage.seed * 10 ** 6 + step)  # what is random in a step depends on its number and the seed
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * group["scale"] * (1 if group["steady"] else learning_rate(step, stage))

        optimizer.zero_grad(set_to_none=True)
        total = 0
        for part in parts_of(batches, stage.accumulate):
            loss, predicted = loss_of(*part)
            loss = loss / stage.accumulate
            loss.backward()
            total += loss.detach()
        run.stop_unless_finite(stage, step, total, batches, data)
        average_gradients(trained)
        if stage.clip:
            torch.nn.utils.clip_grad_norm_(trained, stage.clip)
        optimizer.step()

        run.after_step(stage, step + 1, total, predicted, part[0], model, optimizer)
    run.select(stage, model)


def learning_rate(step, stage):
    """Factor of the learning rate at a step: linear warm-up, then ×0.1 at each milestone."""
    warm_up = min(stage.warm_up, stage.steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.1 ** sum(step >= stage.steps * milestone - 1e-6 for milestone in stage.milestones)


# ----------------------------------------------------------------------------------------------------------- 3. VLPose

def train_vlpose(options):
    """VLPose's experiment: does art get better, and do photographs stay as they were?"""
    with first_process_first():
        source, target, tests = vlpose_data(options)
        texts = read_texts([target, *(test.dataset for test in tests)], options)
        base, text_dim = starting_model(options, target.skeleton), next(iter(texts.values())).shape[1]
    model_to_tune(base, text_dim, options)  # a combination that cannot work fails here, before anything is trained
    base_stage, adapt_stage = plan_vlpose(options, base, source, target)
    if options.dry_run:
        return
    run = Run(options, partial(validation, tests, texts, options.workers))

    # Stage 1: a base model learns from the source, unless --weights gives a trained one.
    if source:
        torch.manual_seed(options.seed)
        fit_or_find(base_stage, base, partial(heatmap_loss, base, None, options.bf16),
                    [vlpose_crops(source, base, options)], run)

    # Stage 2: what --strategy names is tuned on the target; with VLPose, everything else is frozen.
    adapted = model_to_tune(base, text_dim, options)
    if report_trained_share(adapted, base, options) > 0:
        adapter_texts = texts if isinstance(adapted, VLPose) else None
        fit(adapt_stage, adapted, partial(heatmap_loss, adapted, adapter_texts, options.bf16),
            [vlpose_crops(target, adapted, options)], run)

    save_model(run.folder / "model.pth", adapted, options)
    if isinstance(adapted, VLPose):
        save_model(run.folder / "adapter.pth", adapted, options, adapter_only=True)
    compare_poses(base, adapted, texts, tests, run)  # the original, the adapted model, and its adapter off


def model_to_tune(base, text_dim, options):
    """A copy of the base model in which just what --strategy tunes requires a gradient."""
    torch.manual_seed(options.seed)
    base = copy.deepcopy(base)
    adapters = {
        "vlpose": {name: getattr(options, name) for name in ("decoder", "num_prompts", "matcher", "rank")},
        "prompt": dict(decoder="baseline", num_prompts=options.num_prompts),
        "lora": LORA | dict(rank=options.rank or LORA["rank"])}
    if options.strategy in adapters:
        return VLPose(base, text_dim, **adapters[options.strategy]).to(options.device)
    stem, last = "backbone.(patch_embed|body.(conv1|bn1|features.0))", f"backbone.(up|blocks.{base.config.depth - 1})"
    layers = {"scratch": "none", "full": "", "last": rf"({last}|head.predictor)\.",
              "stem": rf"({stem}|head.predictor)\.", "all-but-stem": rf"(?!{stem}\.)"}
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(bool(re.match(layers[options.strategy], name)))
    return base


# -------------------------------------------------------------------------------------------- 4. multi-level alignment

def train_uda(options):
    """The experiment of multi-level alignment: how much of the gap to the target do images without labels close?"""
    with first_process_first():
        source, target, test, labelled_target = alignment_data(options)
        student = starting_model(options, test.skeleton, trunk_size=(256, 256))
        if options.strategy == "vlpose":
            check_adapter(student.config, "dual", None)
        stylist = new_stylist(options) if options.image_level else None
        texts = read_texts([source, target, test], options) if options.strategy != "full" else None
    style_stage, source_stage, adapt_stage = plan_uda(options, stylist, source, target)
    if options.dry_run:
        return
    sources, targets, source_views, target_views = alignment_crops(source, target, student, options)  # crops, Views
    run = Run(options, partial(validation, [Test(test, test, test.annotated)], texts, options.workers))
    compute = Compute(options.bf16, options.accumulate)

    # Stage 0: the style decoder learns to redraw source images in the style of target images.
    if style_stage:
        fit(style_stage, stylist, partial(style_loss, stylist), [sources, targets], run)
    restyle = partial(stylist.restyle, probability=options.image_level) if stylist else None

    # Stage 1: a model learns from the source's labels, and the student likewise, some of its images restyled.
    source_only = copy.deepcopy(student)
    if source_stage:
        loss_of = partial(source_loss, source_only, None, source_views, compute)
        fit_or_find(source_stage, source_only, loss_of, [sources], run, depends_on=[source_views, compute])
        if restyle and not texts:
            loss_of = partial(source_loss, student, restyle, source_views, compute)
            fit_or_find(replace(source_stage, name="restyled"), student, loss_of, [sources, targets], run,
                        depends_on=[source_views, compute, restyle, state_hash(stylist)])
        else:
            student = source_only

    # Stage 2: student and teacher adapt to the target's images. `MultiLevelAlignment.forward` is a step of it.
    torch.manual_seed(options.seed)
    if texts:  # both methods at once: the model stays as it is, and only an adapter around it learns
        adapter = LORA if options.strategy == "lora" else {}
        student = VLPose(copy.deepcopy(student), next(iter(texts.values())).shape[1], **adapter)
    labelled = np.flatnonzero((source.keypoints[:, :, 2] > 0).any(0)).tolist()  # keypoints; of --source none: nothing
    alignment = MultiLevelAlignment(
        copy.deepcopy(student), restyle, LossWeights(options.consistency, options.feature_level, options.pose_level),
        target_views, options.ema_decay, labelled or None, compute).to(options.device)
    fit(adapt_stage, alignment, partial(alignment_loss, alignment, source_views, texts), [sources, targets], run)
    models = {"source only": source_only, "student": alignment.student, "teacher": alignment.teacher}

    # For comparison: what the target's labels would give in as many steps.
    if labelled_target:
        models["oracle"] = copy.deepcopy(source_only)
        oracle_data, *_ = alignment_crops(labelled_target, target, student, options)
        fit_or_find(replace(adapt_stage, name="oracle", steady=""), models["oracle"],
                    partial(source_loss, models["oracle"], None, source_views, compute), [oracle_data], run,
                    depends_on=[source_views, compute])
    compare_pck(models, texts, stylist, test, run, options)


def style_loss(stylist, source, target):
    """Stage 0: content loss + 0.1 style loss."""
    content, style = stylist.loss(rgb(source, stylist), rgb(target, stylist))
    stylist.losses = {"content": content, "style": 0.1 * style}
    return content + 0.1 * style, None


def source_loss(model, restyle, views, compute, source, target=None):
    """Stage 1: L_sup of the source images, some of them in the style of the target images beside them."""
    images, labels, weights = labelled_images(source, model, views)
    if restyle:
        images = restyle(images, rgb(target, model))
    heatmaps, _ = heatmaps_and_features(model, images, compute)
    return supervised_loss(heatmaps, labels, weights), heatmaps


def alignment_loss(alignment, views, texts, source, target):
    """Stage 2: L = L_sup + L_con + L_adv + L_im, each with its weight. A VLPose reads `texts`, {sentence: T}."""
    read = [padded([texts[sentence] for sentence in batch["sentence"]]) for batch in (source, target)] if texts else []
    return alignment(*labelled_images(source, alignment, views), rgb(target, alignment), *read)


def labelled_images(batch, model, views):
    """Images (B, 3, H, W), RGB in [0, 1], heatmaps (B, K, h, w) of their labels, weights (B, K); with `views`, of a
    random view of each. The batch's labels become those of the view, for the log to compare with."""
    images = rgb(batch, model)
    if views:
        images, points, visible = source_view(images, batch["keypoints"], batch["visible"], views)
        batch |= {"keypoints": points, "visible": visible}
    return images, *label_heatmaps(batch, model.config, images.device)


def rgb(batch, model):
    """A batch's images (B, 3, H, W) where the model is, RGB in [0, 1]."""
    return batch["image"].to(next(model.parameters()).device, non_blocking=True) / 255


# === Appendix: the plan, the run's folder, the cache, data, models, tables, the command; skip on a first reading ======

import hashlib
import itertools
import json
import math
import os
import signal
import sys
import time
import weakref
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path

import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from PIL import Image, ImageDraw

from data import (FIGURES, GENTLE, NATURAL_DOMAINS, REGDA, VITPOSE, Augmentation, Crops, DataError, PoseDataset,
                  SyncBatchNorm, all_items, crop_matrix, crop_width, decode_heatmaps, expecting, free_space,
                  ignore_group_signals, join_processes, load_dataset, mean_of_all, my_share, open_image, processes,
                  read_boxes, to_coco, transform_points, unlabelled, unreadable, wait_for_all, warp_image, with_boxes,
                  with_sentences, with_skeleton, write_json, written_whole)
from eval import (GPU, HELP, KINDS, Parser, draw_pose, evaluate_domains, evaluate_pck_grid, fail, format_table,
                  heatmaps_of, highest_cells, parse, pck_of_results, predict, predict_people)
from uda import GENTLE_VIEWS, StyleTransfer, Views
from vlpose import (PoseModel, ViT, check_adapter, encode_sentences, load_backbone, load_clip_text, load_pose_model,
                    load_strictly, load_weights, read_file, save_checkpoint, save_tensors, with_keypoints)

# ------------------------------------------------------------------------------------------------ the plan, and batches
def plan_vlpose(options, base, source, target):
    """The stages of VLPose; it prints what will be trained. The first is None where --weights gives a base model."""
    scale = options.batch_size / (options.lr_batch or options.batch_size)  # mmpose's linear rule
    common = dict(batch_size=options.batch_size, seed=options.seed, bf16=options.bf16, accumulate=options.accumulate)
    base_stage, decay = None, base.config.layer_decay
    if source:
        epoch = math.ceil(len(source.annotated) / options.batch_size)  # steps
        base_stage = Stage("base", options.base_steps or options.base_epochs * epoch, scale * options.base_lr,
                           layer_decay=decay if options.init else 1.0, **common)
        print_plan(base_stage, source.name, len(source.annotated))
    epoch = math.ceil(len(target.annotated) / options.batch_size)
    adapt_stage = Stage("adapt", options.steps or options.epochs * epoch, scale * options.lr,
                        layer_decay=decay if options.strategy == "full" else 1.0,
                        validate_every=options.validate_every * epoch, select=options.select, **common)
    if options.strategy != "scratch":
        print_plan(adapt_stage, target.name, len(target.annotated))
    return base_stage, adapt_stage


def plan_uda(options, stylist, source, target):
    """The stages style, source and adapt, None where there is nothing to train; it prints what will be trained."""
    common = dict(seed=options.seed, optimizer=options.optimizer, warm_up=options.warm_up, clip=options.clip)
    both = source.name if source is target else f"{source.name} and {target.name}"
    style_stage = stage = None
    if stylist and not options.style_weights:
        style_stage = Stage("style", options.style_steps, options.style_lr, options.style_batch or options.batch_size,
                            bf16=False, weight_decay=0.0, milestones=tuple(options.milestones), **common)
        print_plan(style_stage, both, len(target.ids))
    common |= dict(batch_size=options.batch_size, bf16=options.bf16, weight_decay=options.weight_decay)
    if not options.weights:
        stage = Stage("source", options.supervised_steps, options.lr, milestones=tuple(options.milestones), **common)
        print_plan(stage, source.name, len(source.annotated))
        if stylist and options.strategy == "full":
            print_plan(replace(stage, name="restyled"), both, len(source.annotated))
    adapt_stage = Stage("adapt", options.steps, options.adapt_lr, milestones=tuple(options.adapt_milestones),
                        steady="discriminator." if options.steady_discriminator else "", **common)
    print_plan(adapt_stage, both, len(target.ids))
    return style_stage, stage, adapt_stage


def print_plan(stage, data, people):
    if stage.batch_size % (parts := processes()[1] * stage.accumulate):
        raise DataError(f"stage {stage.name}: expected a batch size that is a multiple of {parts} (processes × "
                        f"--accumulate), found {stage.batch_size}")
    falls = [math.ceil(stage.steps * milestone - 1e-6) for milestone in stage.milestones]
    print(f"plan: {stage.name}: {stage.steps:,} steps of {stage.batch_size} crops ({data}: {people:,} people, "
          f"{stage.steps * stage.batch_size / people:.1f} epochs), {stage.optimizer}, learning rate {stage.lr:g}"
          + (f", a tenth of it from steps {', '.join(f'{step:,}' for step in falls)}" if falls else "")
          + (f", validation every {stage.validate_every:,} steps" if stage.validate_every else ""))


def vlpose_crops(dataset, model, options):
    """What `fit` draws from: the augmented crops of a data set, and the rows of its annotated people."""
    augmentation = VITPOSE if options.augmentation == "paper" else GENTLE
    return Crops(dataset, model.config.image_size, augmentation), dataset.annotated


def alignment_crops(source, target, student, options):
    """What `fit` draws from of the source and of the target, and how far the views of both go (None: no views)."""
    paper = options.augmentation == "paper"
    views = replace(Views() if paper else GENTLE_VIEWS, occlusion=options.occlusion)
    targets = Crops(target, student.config.image_size, REGDA if paper else Augmentation()), np.arange(len(target.ids))
    sources = targets  # of --source none
    if source is not target:
        sources = Crops(source, student.config.image_size, REGDA if paper else GENTLE), source.annotated
    return sources, targets, views if paper else None, views


def parameter_groups(model, stage):
    """Parameters by learning rate and weight decay. Biases, norms and positional tables do not decay. With layer decay
    each layer of the backbone learns more slowly than the one above it: lr · decay^(layers above)."""
    depth = len(model.backbone.blocks) if stage.layer_decay < 1 else 0
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layers_above = 0  # of the decoder; without layer decay, of everything
        if depth and name.startswith("backbone.blocks."):
            layers_above = depth - int(name.split(".")[2])
        elif depth and name.startswith(("backbone.patch_embed", "backbone.pos_embed")):
            layers_above = depth + 1
        scale, steady = stage.layer_decay ** layers_above, bool(stage.steady) and name.startswith(stage.steady)
        decay = 0.0 if parameter.ndim == 1 or name.endswith("pos_embed") else stage.weight_decay
        group = groups.setdefault((scale, steady, decay), {
            "params": [], "scale": scale, "steady": steady, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def batches_of(data, stage, first, workers):
    """Yields a batch of each data set for each step from `first` on; each data set has an order of its own."""
    loaders = []
    for place, (crops, rows) in enumerate(data):
        size, passes = stage.batch_size, Passes(crops, rows, stage.seed + 10 ** 6 * place)
        positions = (my_share(range(step * size, (step + 1) * size)) for step in range(first, stage.steps))
        loader = DataLoader(passes, batch_sampler=positions, num_workers=workers, pin_memory=GPU, worker_init_fn=ignore_group_signals)
        loaders.append(count_unread(loader, crops.dataset))
    return zip(*loaders)


def parts_of(batches, parts):
    """Batches in so many parts, one after the other."""
    for place in range(parts):
        yield [{name: values[place * len(values) // parts:(place + 1) * len(values) // parts]
                for name, values in batch.items()} for batch in batches]


class Passes(torch.utils.data.Dataset):
    """Crops by their position in shuffled passes over the rows, one after the other. They depend on nothing else, so
    that a resumed run sees the same ones. For a picture that cannot be read there is the crop of the next position."""

    def __init__(self, crops, rows, seed):
        self.crops, self.rows, self.seed, self.epoch = crops, rows, seed, None

    def key(self, position):
        epoch, place = divmod(position, len(self.rows))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.rows)
        return int(self.order[place]), (self.seed, position)

    def __getitem__(self, position):
        problems = []
        for place in range(position, position + 100):
            try:
                return self.crops[self.key(place)] | {"unread": "".join(problems[:1])}
            except DataError as error:
                problems.append(str(error))
        raise DataError(problems[0])


def count_unread(batches, dataset):
    """The batches; names each picture that could not be read. A DataError if that is more than one of a hundred."""
    unread = set()
    for batch in batches:
        for problem in sorted({*batch.pop("unread")} - {"", *unread}):
            unread.add(problem)
            if len(unread) > len(dataset.files) / 100:
                raise DataError(f"{problem}; with it more than 1 % of the {len(dataset.files):,} pictures")
            print(f"{problem}; the next one is taken", file=sys.__stderr__ if processes()[0] else sys.stderr)
        yield batch


# --------------------------------------------------------------------------------- how `fit` computes, many processes
def prepare(model, run):
    """Makes a model ready for `fit`, in place; its parameters and its predictions stay as they are."""
    for module in model.modules():
        if type(module) is torch.nn.BatchNorm2d and processes()[1] > 1:
            module.__class__ = SyncBatchNorm
        if isinstance(module, ViT):
            module.checkpointing = run.checkpointing
    set_training_mode(model)


def set_training_mode(model):
    """Training mode, but for BatchNorm layers whose parameters are frozen: they keep their statistics, too."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not module.weight.requires_grad:
            module.eval()



# ------------------------------------------------------------------------------------------------------ the run folder
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
LOG_EVERY, CHECKPOINT_EVERY, CHECKPOINT_SECONDS = 50, 500, 300  # steps; a checkpoint also after so many seconds


class Run:
    """A run's folder: config.json, log.csv, the last two checkpoints of each stage, and the results. measure: (stage,
    model) -> a number of the validation, or NaN."""

    def __init__(self, options, measure):
        self.workers, self.cache, self.measure = options.workers, Path(options.cache), measure
        self.checkpointing, (rank, world), given = options.checkpointing, processes(), options.resume or options.out
        self.folder = Path(all_items([given or (None if rank else new_folder(options.mode))])[0])  # the first process's
        self.lock = None if rank else weakref.finalize(self, locked(self.folder / "lock").close)
        self.write("config.json", vars(options) | {"resume": None, "processes": world})
        print(f"run folder: {self.folder}")
        self.history, self.training, self.signal = [], False, 0  # rows of log.csv
        for one in SIGNALS:  # the other processes end with the first; what nohup ignores stays ignored
            signal.signal(one, signal.SIG_IGN if rank or signal.getsignal(one) == signal.SIG_IGN else self.on_signal)

    def on_signal(self, number, frame):
        """The first one lets a step of training end."""
        if not self.training or self.signal:
            raise KeyboardInterrupt(number, self.folder)
        self.signal = number

    def stop_unless_finite(self, stage, step, loss, batches, data):
        """What would become of the weights is never saved."""
        if not loss.isfinite():
            for people, batch in ((crops.dataset, batch) for (crops, _), batch in zip(data, batches)):
                for row in batch["row"].tolist():
                    print(f"in this batch: {people.name}, person {row}, {people.files[people.image_index[row]]}",
                          file=sys.__stdout__ if processes()[0] else sys.stdout)
            raise DataError(f"stage {stage.name}, step {step}: the loss is {loss.item()}, most likely because of the "
                            f"learning rate, {stage.lr:g}{', or --bf16' * stage.bf16}; the last checkpoint is good")

    def after_step(self, stage, done, loss, predicted, batch, model, optimizer):
        """Validates, logs and saves every so many steps; `done` of them are done."""
        value, last = math.nan, done == stage.steps
        if done % (stage.validate_every or max(stage.steps // 5, 100)) == 0 or last and stage.validate_every:
            value = float(self.measure(stage, model))
            set_training_mode(model)
            if stage.select == "best" and value > self.best:
                self.best = value
                save_tensors(self.folder / f"{stage.name}.best.pth", model.state_dict())
        if done % min(LOG_EVERY, max(1, stage.steps // 10)) == 0 or last or not math.isnan(value):
            pck = math.nan if predicted is None else batch_pck(predicted, batch, model.config)
            losses = {name: mean_of_all(part.detach()).item()
                      for name, part in ({"loss": loss} | getattr(model, "losses", {})).items()}
            self.history.append({"stage": stage.name, "step": done, "pck": pck, "validation": value} | losses)
            speed = (done - self.first) / (time.monotonic() - self.started)  # steps per second
            numbers = [f"{name} {n:.3f}  " for name, n in (("PCK", pck), ("validation", value)) if not math.isnan(n)]
            print(f"{stage.name:8}{done:6}/{stage.steps}  loss {losses['loss']:.5f}  {''.join(numbers)}"
                  f"{speed * stage.batch_size:4.0f} images/s  {(stage.steps - done) / speed:4.0f} s left", flush=True)
        if self.signal or last or done % CHECKPOINT_EVERY == 0 or time.monotonic() - self.saved > CHECKPOINT_SECONDS:
            self.save(stage, done, model, optimizer)
        if self.signal:
            raise KeyboardInterrupt(self.signal, self.folder)

    def save(self, stage, done, model, optimizer):
        """Writes the learning curves so far, and then what `restore` needs, beside the last checkpoint."""
        names = list(dict.fromkeys(["stage", "step", "loss", *(name for row in self.history for name in row)]))
        rows = [",".join(str(row.get(name, "")) for name in names) for row in self.history]
        self.write("log.csv", "\n".join([",".join(names), *rows, ""]))
        self.write("curves.png", draw_curves(self.history))
        newest, older = self.checkpoints
        if newest.exists() and processes()[0] == 0:
            os.replace(newest, older)
        save_tensors(newest, {"step": done, "best": self.best, "history": self.history, "model": model.state_dict(),
                              "optimizer": optimizer.state_dict(), "data": self.data})
        self.saved = time.monotonic()

    def restore(self, stage, model, optimizer, data):
        """Loads the stage's newest good checkpoint, if there is one. Returns the number of steps that are done."""
        self.first, self.best, self.training = 0, -math.inf, True
        self.data = json.loads(json.dumps({crops.dataset.name: identity_of(crops, rows) for crops, rows in data}))
        self.checkpoints = [self.folder / f"{stage.name}.checkpoint{age}.pth" for age in ("", ".older")]
        paths = list(filter(os.path.exists, self.checkpoints))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        size = sum(tensor.nbytes for tensor in [*model.state_dict().values(), *trained, *trained])
        need, free = 2 * size - sum(map(os.path.getsize, paths)), free_space(self.folder)  # there will be two of them
        if free < need:
            raise DataError(f"{self.folder}: expected {need // 10**6} MB for checkpoints, found {free // 10**6} free")
        for path in paths:
            with expecting(path, "a checkpoint of this run"):
                try:
                    state = read_file(path)
                except DataError as error:
                    print(f"{error}; it is removed, going back to what was before it", file=sys.stderr)
                    path.unlink(missing_ok=True)  # so that it does not take the place of the one before it
                    continue
                for name, now in self.data.items():
                    if changed := [what for what in now if now[what] != state["data"][name][what]]:
                        raise DataError(f"{path}: began with other {', '.join(changed)} of {name}: it cannot go on")
                if state["step"] > stage.steps:
                    raise DataError(f"{path}: has done {state['step']} steps, more than {stage.steps}")
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                self.first, self.best, self.history = state["step"], state["best"], state["history"]
            break
        self.started = self.saved = time.monotonic()
        return self.first

    def select(self, stage, model):
        """The best model in validation, where the stage wants it."""
        self.training = False
        if self.signal:
            raise KeyboardInterrupt(self.signal, self.folder)
        if stage.select == "best" and self.best > -math.inf:
            wait_for_all()  # the first process has written it
            model.load_state_dict(read_file(self.folder / f"{stage.name}.best.pth"))
            print(f"{stage.name}: selected the best in validation, AP {self.best:.3f}")

    def write(self, name, content):
        """Text, a picture, or an object for JSON; only the first process writes."""
        if processes()[0] == 0 and isinstance(content, dict):
            write_json(self.folder / name, content, indent=2)
        elif processes()[0] == 0:
            with written_whole(self.folder / name) as part:
                part.write_text(content) if isinstance(content, str) else content.save(part)


def locked(path):
    """A file that no other program can open in this way as long as this one runs; on Windows any can."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "w")
    with expecting(path.parent, "that no other program trains in it"), suppress(ImportError):
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def new_folder(mode):
    """Makes runs/vlpose-1, or with the first number that is free."""
    for place in itertools.count(1):
        with suppress(FileExistsError):
            (folder := Path("runs").absolute() / f"{mode}-{place}").mkdir(parents=True)
            return folder


def batch_pck(predicted, batch, config):
    """Share of a batch's labelled keypoints that lie closer than 0.05 of the crop's height to the truth."""
    points, _ = decode_heatmaps(predicted.detach().cpu(), config.image_size, config.sigma)
    truth, (height, width) = batch["keypoints"].cpu(), config.image_size
    right = (points - truth).norm(dim=2) < 0.05 * height
    inside = ((truth >= 0) & (truth <= torch.tensor([width, height]) - 1)).all(2)
    counts = inside & (batch["visible"].cpu() > 0)
    right, counted = mean_of_all(torch.stack([(right & counts).sum(), counts.sum()]).to(predicted))
    return (right / counted).item()


# ----------------------------------------------------------------------------------------------------------- the cache
VERSION = "training-1"  # a new number whenever training changes, so that a cached model is not taken for a new one


def fit_or_find(stage, model, loss_of, data, run, depends_on=()):
    """`fit`, unless the run has not begun it and the cache has what it gives. depends_on: what else that depends on."""
    identity = [VERSION, FIGURES, state_hash(model), asdict(model.config), asdict(stage), *depends_on]
    identity += [identity_of(crops, rows) for crops, rows in data]
    path = run.cache / f"{stage.name}-{digest(json.dumps(identity, default=str).encode())}.pth"
    try:
        if all_items([path.exists() and not (run.folder / f"{stage.name}.checkpoint.pth").exists()])[0]:
            model.load_state_dict(load_pose_model(path).state_dict())
            print(f"{stage.name} model: {path} (trained before)")
            return
    except DataError as error:
        print(f"{error}; training it anew")
    fit(stage, model, loss_of, data, run)
    try:
        save_checkpoint(path, model)
    except DataError as error:
        print(f"{error}; it is not kept for other runs", file=sys.stderr)


def identity_of(crops, rows):
    """What the crops that a stage draws depend on."""
    people = crops.dataset
    files = [(Path(file).name, os.path.getsize(file)) for file in people.files]
    labels = people.keypoints[rows].tobytes() + people.boxes[rows].tobytes()
    return {"people": len(rows), "files": digest(json.dumps(files).encode()), "labels": digest(labels),
            "keypoints": people.skeleton.names, "size": crops.size, "augmentation": asdict(crops.augmentation)}


def state_hash(model):
    return digest(b"".join(tensor.cpu().numpy().tobytes() for tensor in model.state_dict().values()))


def digest(content):
    return hashlib.sha256(content).hexdigest()[:12]


# ----------------------------------------------------------------------------------------- data and models for VLPose
@dataclass
class Test:
    """A data set to test on, and where to look for its people: in their own boxes, or in those of a detector."""
    dataset: PoseDataset
    boxed: PoseDataset  # whose people are the boxes
    people: np.ndarray  # rows of `boxed`
    scores: np.ndarray | None = None  # of the detector's boxes

    def numbers(self, model, texts, workers):
        """What the model predicts, and {domain: {"AP": ..., "PCK": ...}}."""
        results = predict_people(model, self.boxed, texts, self.people, self.scores, workers)
        return results, domain_table(self.dataset, results, model.config.image_size, detected=self.scores is not None)


def vlpose_data(options):
    """What the base learns from (None with --weights), what is adapted to, and the tests, the target's last."""
    target = training_set(options.target, options)
    source = None if options.weights else training_set(options.source, options, target.skeleton)
    tests = []
    for spec in dict.fromkeys((options.source, options.target)):
        dataset = open_with_sentences(spec, "val", options, target.skeleton)
        if len(dataset.annotated):
            tests.append(Test(dataset, dataset, dataset.annotated))
    if not tests:
        raise DataError(f"{options.source}, {options.target}: expected labelled people to validate on, found none")
    if options.boxes:
        dataset = tests[-1].dataset
        if dataset.name != options.target:
            raise DataError(f"{options.target}: expected labelled people to test on in boxes, found none")
        image_rows = {image_id: row for row, image_id in enumerate(dataset.image_ids.tolist())}
        rows, boxes, scores = read_boxes(options.boxes, image_rows)
        tests[-1] = Test(dataset, with_boxes(dataset, rows, boxes), np.arange(len(rows)), scores)
    check_pictures([test.dataset for test in tests])
    return source, target, tests


def open_with_sentences(spec, split, options, skeleton=None):
    dataset = load_dataset(spec, split, options.cache)
    return with_sentences(with_skeleton(dataset, skeleton) if skeleton else dataset, options.sentences)


def training_set(spec, options, skeleton=None):
    """A data set with labelled people to train on, and a line on how many there are."""
    dataset = open_with_sentences(spec, "train", options, skeleton)
    people, skipped = len(dataset.annotated), len(dataset.ids) - len(dataset.annotated)
    if not people:
        raise DataError(f"{spec}: expected labelled people to train on, found none")
    print(f"{spec}: {people:,} people in {len(dataset.files):,} images to train on"
          + (f"; {skipped} without labelled keypoints skipped" if skipped else "")
          + (f"; fewer than a batch of {options.batch_size} has" if people < options.batch_size else ""))
    return dataset


def check_pictures(datasets):
    """DataError, after their names, for pictures to test on that are not readable; `read_pictures` has read its own."""
    problems = unreadable([*dict.fromkeys(file for test in datasets if not test.upright for file in test.files)])
    if problems:
        print(*problems.values(), sep="\n", file=sys.stderr)
        raise DataError(f"{datasets[0].name}: {len(problems)} pictures to test on cannot be read, see above")


def starting_model(options, skeleton, trunk_size=(256, 192)):
    """The trained model of --weights, with a predictor for this skeleton; or a new one, but for the backbone of --init.
    trunk_size: of crops, where a network of torchvision is new."""
    torch.manual_seed(options.seed)
    size, config = options.image_size and tuple(options.image_size), MODEL_CONFIGS[options.size]
    if options.weights:
        model = with_keypoints(load_pose_model(options.weights, size), skeleton)
    else:
        config = replace(config, image_size=size or (trunk_size if config.trunk else config.image_size))
        model = PoseModel(config, len(skeleton.names), skeleton)
        if options.init:
            load_backbone(model, options.init)
    model.config = replace(model.config, sigma=options.sigma or model.config.sigma)
    return model.to(options.device)


def read_texts(datasets, options):
    """{sentence: T (L, D_text)} of all images, read by the frozen text tower."""
    if options.text_weights == "random":
        print("no CLIP weights given (--text-weights ViT-B/32): a small random text tower with a fixed seed stands in")
    sentences = np.unique(np.concatenate([dataset.sentences for dataset in datasets])).tolist()
    return encode_sentences(load_clip_text(options.text_weights).to(options.device), sentences, options.per_token)


def save_model(path, model, options, adapter_only=False):
    """Writes a model, or of a VLPose only the adapter, and which sentences it reads."""
    save_checkpoint(path, model, adapter_only, text_weights=options.text_weights, sentences=options.sentences,
                    per_token=options.per_token)


def report_trained_share(model, base, options):
    """Prints and returns how many parameters are trained."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    share = trained / sum(parameter.numel() for parameter in base.parameters())
    print(f"{options.strategy}: {trained:,} trainable parameters, {share:.1%} of the base model's")
    return trained


# --------------------------------------------------------------------------- data and models for multi-level alignment
def alignment_data(options):
    """The source with its labels, the target without, what is tested on, and for --oracle the target with its labels;
    all with the skeleton of the labels that are tested on, or else of the source, or with --source none the model's."""
    target = unlabelled(open_with_sentences(options.target, "train", options))
    source = target if options.source == "none" else training_set(options.source, options)
    split = "all" if options.test and os.path.isfile(options.test.partition(":")[2].partition("#")[0]) else "val"
    test = open_with_sentences(options.test or options.target, split, options)
    labelled = len(test.annotated) > 0
    if options.test and not labelled:
        raise DataError(f"--test {options.test}: expected labelled people to test on, found none")
    check_pictures([test])
    print(f"{options.target}: {len(target.ids):,} people in {len(target.files):,} images, their labels unread")
    skeleton = (load_pose_model(options.weights) if source is target else test if labelled else source).skeleton
    bare = with_boxes(replace(target, skeleton=skeleton), target.image_index, target.boxes)
    return (bare if source is target else with_skeleton(source, skeleton), bare,
            with_skeleton(test, skeleton) if labelled else bare,
            options.oracle and training_set(options.target, options, skeleton))


def new_stylist(options):
    """The style network: a small one for small images, or the one of --style-encoder and --style-weights."""
    torch.manual_seed(options.seed)
    stylist = StyleTransfer(options.style_encoder) if options.style_encoder else StyleTransfer(width=16, depth=1)
    if options.style_weights:
        state = load_weights(options.style_weights)
        whole = "encoder.0.weight" in state  # a run's style.pth
        if not whole and not options.style_encoder:
            raise DataError(f"--style-weights {options.style_weights}: expected a run's style.pth, or a decoder and "
                            "the --style-encoder that it was trained for")
        load_strictly(stylist if whole else stylist.decoder, state, options.style_weights)
    return stylist.to(options.device)


# ------------------------------------------------------------------------------------------------- tables and pictures
PREVIEWS, SOME = 8, 100  # images in a picture, people to validate with


def validation(tests, texts, workers, stage, model):
    """The AP over all of the target (the base's stage: the source) where a model is selected by it, or else the PCK of
    some of its people without the flip test; NaN where there is none."""
    test, model = tests[0 if stage.name == "base" else -1], getattr(model, "student", model)
    read, people = texts if isinstance(model, VLPose) else None, test.dataset.annotated
    if stage.select == "best":
        _, table = test.numbers(model, read, workers)
        return table[f"all of {test.dataset.name}"]["AP"]
    if stage.name == "style" or not len(people):
        return math.nan
    some = test.dataset.select_people(people[::math.ceil(len(people) / SOME)])
    results = predict(model, some, read, flip_test=False, workers=workers)
    return pck_of_results(some, results, model.config.image_size, groups=some.skeleton.groups)["mean"]


def compare_poses(base, adapted, texts, tests, run):
    """Prints and keeps the table of the original and the adapted model, and draws what both predict."""
    columns = {"original": (base, None), "adapted": (adapted, None)}
    if isinstance(adapted, VLPose):
        columns |= {"adapted": (adapted, texts), "adapter off": (adapted, None)}
    tables, results = {column: {} for column in columns}, {column: [] for column in columns}
    for column, (model, read) in columns.items():
        for test in tests:
            found, table = test.numbers(model, read, run.workers)
            results[column].append(found)
            for name, row in table.items():  # two data sets may have a domain of the same name
                tables[column][f"{name} ({test.dataset.name})" if name in tables[column] else name] = row
    print_domains(tables)
    run.write("results.json", tables)
    run.write("poses.png", draw_sheet([person for test in tests for person in some_of_each_domain(
        test.dataset, columns, PREVIEWS // len(tests))]))
    if "adapter off" in tables:
        report_adapter_off(results["adapter off"] == results["original"])  # every coordinate and score


def report_adapter_off(same):
    print(f"adapter off gives the original's poses exactly: {'yes' if same else 'NO'}")
    if not same:
        raise DataError("with its adapter off the model differs from the original: its weights must have changed")


def print_domains(tables):
    """AP and PCK of each domain, their means, and those over all of each data set; two columns for each model."""
    names = list(next(iter(tables.values())))
    whole = [name for name in names if name.startswith("all of ")]
    natural = [name for name in names if name.split(" (")[0] in NATURAL_DOMAINS]
    artificial = [name for name in names if name not in {*whole, *natural}]
    rows = {name: [name] for name in natural + artificial}
    rows |= {"mean of natural": natural, "mean of artificial": artificial} | {name: [name] for name in whole}
    print(format_table("domain", {row: {f"{model} {key}": np.mean([table[name][key] for name in members])
                                        for model, table in tables.items() for key in ("AP", "PCK")}
                                  for row, members in rows.items() if members}))


def some_of_each_domain(dataset, columns, count):
    """About `count` people, one at least of each domain, as the annotators and both models see them, to draw."""
    domains, poses = dataset.domains[dataset.image_index[dataset.annotated]], {}
    names = np.unique(domains)
    rows = np.concatenate([dataset.annotated[domains == name][:max(1, count // len(names))] for name in names])
    for label in ("original", "adapted"):
        poses[label] = [np.reshape(result["keypoints"], (-1, 3)) for result in predict(
            columns[label][0], dataset, columns[label][1], rows)]
    return [(domain, dataset, row, {"truth": true_pose(dataset, row)} | {label: poses[label][n] for label in poses})
            for n, (domain, row) in enumerate(zip(dataset.domains[dataset.image_index[rows]], rows))]


def compare_pck(models, texts, stylist, test, run, options):
    """Keeps the models, prints and keeps their PCK or what can be known without labels, and draws what they predict."""
    if stylist:
        save_tensors(run.folder / "style.pth", stylist.state_dict())
    table, results, labelled = {}, {}, len(test.annotated) > 0
    results_of = partial(predict, dataset=test, flip_test=False, workers=run.workers)
    for name, model in models.items():
        read = texts if isinstance(model, VLPose) else None
        save_model(run.folder / f"{name.replace(' ', '-')}.pth", model, options)
        results[name] = results_of(model, texts=read)
        if labelled:
            pck = partial(pck_of_results, test, results[name], model.config.image_size, groups=test.skeleton.groups)
            grid = grid_pck(model, test, test.skeleton.groups, read, run.workers)
            table[name] = pck() | {"mean at 0.2": pck(threshold=0.2)["mean"], "mean (grid)": grid["mean"]}
        else:
            table[name] = without_labels(model, test, results[name], read, run.workers)
    print(format_table("PCK@0.05" if labelled else "no labels", {
        group: {name: column[group] for name, column in table.items()} for group in table["teacher"]}))
    if "oracle" in table and labelled:
        means = {name: column["mean"] for name, column in table.items()}
        gap = means["oracle"] - means["source only"] or math.nan
        print("share of the gap between source only and oracle that is closed: " + ", ".join(
            f"{name} {(means[name] - means['source only']) / gap:.0%}" for name in ("student", "teacher")))
    run.write("results.json", table)
    run.write("poses.png", draw_pseudo_labels(test, results["source only"], results["teacher"]))
    if texts:
        save_model(run.folder / "adapter.pth", models["teacher"], options, adapter_only=True)
        report_adapter_off(results_of(models["teacher"]) == results["source only"])


def draw_pseudo_labels(test, source_only, teacher):
    """Some people: the truth, what the source-only model predicts, and of the teacher what it is sure of, and all."""
    rows = test.annotated if len(test.annotated) else np.arange(len(test.ids))
    source_only, teacher = (np.reshape([result["keypoints"] for result in results], (len(rows), -1, 3))
                            for results in (source_only, teacher))
    sure = teacher[:, :, 2] > np.median(teacher[:, :, 2])  # `confidence_mask`, of all
    people = []
    for place in np.unique(np.linspace(0, len(rows) - 1, PREVIEWS).astype(int)):
        poses = {"truth": true_pose(test, rows[place])} if len(test.annotated) else {}
        labels = teacher[place] * [1, 1, 0] + sure[place, :, None] * [0, 0, 1]
        poses |= {"source only": source_only[place], "pseudo-labels": labels, "teacher": teacher[place]}
        people.append((Path(test.files[test.image_index[rows[place]]]).name, test, rows[place], poses))
    return draw_sheet(people)


def domain_table(dataset, results, size, detected=False):
    """{domain: {"AP": ..., "PCK": ...}} of what `predict` gave, and the same of "all of" the data set: COCO's AP and
    PCK@0.05 of the crop's height. detected: in a detector's boxes nobody knows whose pose it is, so PCK is -1."""
    domains, whole = dataset.domains[dataset.image_index[dataset.annotated]], f"all of {dataset.name}"
    of_all, of_domains = evaluate_domains(to_coco(dataset), results, dataset.skeleton.sigmas)
    numbers = of_domains | {whole: of_all}
    chosen = {domain: domains == domain for domain in numbers} | {whole: np.full(len(domains), True)}
    return {domain: {"AP": row["AP"], "PCK": -1.0 if detected else
                     pck_of_results(dataset, results, size, chosen[domain])["mean"]}
            for domain, row in numbers.items() if chosen[domain].any()}


@torch.inference_mode()
def grid_pck(model, dataset, groups, texts=None, workers=0, threshold=0.05):
    """`evaluate_pck_grid` of a model on the annotated people of a data set, without the flip test. texts: as above."""
    cells, size = [], model.config.image_size
    grid = (size[0] // 4, size[1] // 4)
    for batch, predicted in heatmaps_of(model, dataset, dataset.annotated, texts, workers=workers):
        target, weights = encode_heatmaps(batch["keypoints"], batch["visible"], size, grid, model.config.sigma)
        cells.append((highest_cells(predicted.float().cpu()), highest_cells(target), weights.numpy()))
    predicted, target, visible = map(np.concatenate, zip(*all_items(cells)))
    return evaluate_pck_grid(predicted, target, visible, grid, threshold, groups)


def without_labels(model, dataset, results, texts=None, workers=0):
    """What can be known of a model without labels: the share of keypoints with a score of at least 0.5, and how far
    apart a keypoint is in two views, the median in pixels of the crop. The other view is moved, scaled and turned at
    random, always the same. results: what `predict` gave for all people in the plain crop, without the flip test."""
    people, size = np.arange(len(dataset.ids)), model.config.image_size
    view = Augmentation(scale=0.2, shift=0.1, rotation=20)
    others = predict(model, dataset, texts, people, flip_test=False, workers=workers, augmentation=view)
    plain, moved = (np.reshape([result["keypoints"] for result in found], (len(people), -1, 3))
                    for found in (results, others))
    apart = np.linalg.norm((plain - moved)[:, :, :2], axis=2) * size[1] / crop_width(dataset.boxes, size)[:, None]
    return {"sure keypoints": np.mean(plain[:, :, 2] >= 0.5), "pixels between two views": np.median(apart)}


def draw_curves(history, width=480, height=180):
    """Rows of log.csv as curves: loss and PCK, dark their mean over the last fifth so far; the validation is green."""
    stages = list(dict.fromkeys(row["stage"] for row in history))
    picture = Image.new("RGB", (2 * width, height * max(1, len(stages))), "white")  # empty before the first row
    draw, titles = ImageDraw.Draw(picture), {"loss": "loss", "pck": "PCK@0.05 of training batches, and validation"}
    for place, (stage, key) in enumerate((stage, key) for stage in stages for key in titles):
        rows = [row for row in history if row["stage"] == stage]
        steps, values, validation = np.array([(row["step"], row[key], row["validation"]) for row in rows]).T
        if np.isnan(values).all():  # a stage that predicts no keypoints
            continue
        smooth = np.array([values[n - n // 5:n + 1].mean() for n in range(len(values))])
        lines = {"lightsteelblue": values, "royalblue": smooth} | ({"seagreen": validation} if key == "pck" else {})
        left, top = place % 2 * width + 50, place // 2 * height + 30
        right, bottom = left + width - 65, top + height - 55
        highest = np.nanmax([*lines.values()]) or 1
        draw.text((left, top - 22), f"{stage}: {titles[key]}", "black")
        for tick in range(5):
            y = bottom - tick / 4 * (bottom - top)
            draw.line([(left, y), (right, y)], (225, 225, 225))
            draw.text((left - 5, y), f"{highest * tick / 4:.3g}", "black", anchor="rm")
        draw.text((right, bottom + 5), f"{rows[-1]['step']} steps", "black", anchor="ra")
        for color, line in lines.items():
            x, y = left + steps / steps[-1] * (right - left), bottom - line / highest * (bottom - top)
            draw.line([*zip(x[np.isfinite(y)], y[np.isfinite(y)])], color, 2)
    return picture


def draw_sheet(people, side=192):
    """A column for each of `people`, tuples (title, data set, row, {label: pose}): the person with each pose (K, 3)."""
    labels = list(people[0][3])
    sheet = Image.new("RGB", (len(people) * side, len(labels) * side + 18), "white")
    for x, (title, dataset, row, poses) in enumerate(people):
        matrix = crop_matrix(dataset.boxes[row], (side, side))
        file, wanted = dataset.files[dataset.image_index[row]], dataset.boxes[row, 2:].max() / side
        image, shrink = open_image(file, wanted, dataset.upright)
        crop = Image.fromarray(warp_image(image, matrix, (side, side), shrink))
        ImageDraw.Draw(sheet).text((x * side + 4, 3), title, "black")
        for y, pose in enumerate(poses.values()):
            moved = np.column_stack([transform_points(pose[:, :2], matrix), pose[:, 2]])
            sheet.paste(draw_pose(crop, moved, dataset.skeleton), (x * side, 18 + y * side))
    for y, label in enumerate(labels):
        ImageDraw.Draw(sheet).text((4, 22 + y * side), label, "white", stroke_width=1, stroke_fill="black")
    return sheet


def true_pose(dataset, row):
    """A person's keypoints (K, 3) to draw: x, y, and the visibility 0, 1, 2 as a score."""
    return dataset.keypoints[row] * [1, 1, 0.5]


# -------------------------------------------------------------------------------------------------------- the command
MODES = {"vlpose": (train_vlpose, VLPoseRecipe), "uda": (train_uda, AlignmentRecipe)}


def parse_options(argv):
    """The values of a recipe, changed by options, and what else a run needs. `--mode uda --help` lists its own."""
    first = Parser(add_help=False, **HELP)
    first.add_argument("--mode", choices=MODES, default="vlpose", help="VLPose, or alignment: `--mode uda --help`.")
    first.add_argument("--recipe", choices=("minutes", "paper"), default="minutes", help="For what defaults are set.")
    first.add_argument("--resume", metavar="FOLDER", help="Go on with a run; --steps or --epochs may make it longer.")
    chosen, _ = first.parse_known_args(argv)
    if chosen.resume is not None:
        return resumed(chosen.resume, argv)
    kind, own = MODES[chosen.mode][1], {}
    recipe = kind(**{option.name: option.metadata["paper"] for option in fields(kind) if chosen.recipe == "paper"})
    for option in fields(recipe):
        more = {name: value for name, value in option.metadata.items() if name != "paper"}
        more = KINDS["switch"] | {"help": more["help"]} if option.type is bool else more
        own[option.name] = more | {"default": getattr(recipe, option.name)}
    parser = Parser(description="Trains and evaluates a pose estimator that crosses domains.", parents=[first], **HELP)
    options = parse(parser, argv, ("train", chosen.mode), own)
    if options.source == options.target and not options.weights:
        raise DataError(f"--source {options.source}: expected other data than --target")
    if options.source == "none" and options.mode == "uda":
        if not options.weights:
            raise DataError("--source none: expected --weights, the model to adapt")
        for name in ("image_level", "feature_level"):  # they need a source
            if getattr(options, name) not in (0, getattr(recipe, name)):
                raise DataError(f"--{name.replace('_', '-')}: has no effect with --source none")
            setattr(options, name, 0.0)
    for steps, epochs in (("steps", "epochs"), ("base_steps", "base_epochs")):  # the one that was given counts
        if hasattr(options, epochs):
            given = [getattr(options, name) != getattr(recipe, name) for name in (steps, epochs)]
            if all(given):
                raise DataError(f"expected --{steps.replace('_', '-')} or --{epochs.replace('_', '-')}, found both")
            if any(given):
                setattr(options, epochs if given[0] else steps, None)
    if options.bf16 is None:  # a GPU without it, before Ampere, has no convolutions in it, and a CPU may be slow
        options.bf16 = options.device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return options


def resumed(folder, argv):
    """The options of the run in a folder, as if they were given again, and those that are given now."""
    config, asks = Path(folder) / "config.json", Parser(add_help=False, **HELP)
    for option in ("--resume", "--mode", "--recipe", "--device"):
        asks.add_argument(option)
    asked, now = asks.parse_known_args(argv)
    if not folder or not config.exists():
        raise DataError(f"{config}: not there; --resume wants the folder of an earlier run")
    with expecting(config, "the options of a run"):
        saved, world, then = json.loads(config.read_text()), int(os.environ.get("WORLD_SIZE", 1)), []
        saved["device"] = asked.device or saved["device"]  # its own may not be here
        if saved.pop("processes") != world:
            print(f"{folder}: goes on with another number of processes, {world}: not to the last digit")
        for name, value in ((name, value) for name, value in saved.items() if value is not None):
            option, values = f"--{name.replace('_', '-')}", value if isinstance(value, list) else [value]
            if isinstance(value, bool):
                option, values = option if value else f"--no-{option[2:]}", []
            then += [option, *map(str, values)]
        try:
            options = parse_options(then + now)
        except DataError as error:
            raise DataError(f"{config} and what is given now: {error}") from None
        options.mode, options.recipe = asked.mode or options.mode, asked.recipe or options.recipe
        for name, value in json.loads(json.dumps(vars(options))).items():
            if value != saved.get(name, value) and name not in "steps epochs device workers checkpointing".split():
                raise DataError(f"{config}: began with --{name.replace('_', '-')} {saved[name]}, found {value}")
    options.resume = os.path.abspath(folder)
    return options


def main(argv=None):
    store, options, handlers = None, None, {number: signal.getsignal(number) for number in SIGNALS}
    if int(os.environ.get("RANK", 0)):
        sys.stdout = sys.stderr = open(os.devnull, "w")  # the first process says it
    try:
        options = parse_options(argv if argv is not None else sys.argv[1:])
        if "LOCAL_RANK" in os.environ:
            store = join_processes(options)
        if options.out and not options.resume and (Path(options.out) / "config.json").exists():
            raise DataError(f"{options.out}: holds a run already; continue it with --resume, or name another folder")
        MODES[options.mode][0](options)
    except (Exception, KeyboardInterrupt) as error:
        if store and store.add("failed", 1) > 1:
            return 2  # another process has said why
        sys.stderr = sys.__stderr__ if options and "LOCAL_RANK" in os.environ else sys.stderr
        return fail(error)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if store:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
