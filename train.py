"""Training: the loop, and the stages of both methods.

    python train.py --mode vlpose        a base model on photographs, then VLPose's adapter on art
    python train.py --mode uda           labels in one domain, and multi-level alignment to images of another

The lesson, from top to bottom: (1) the options of each mode; (2) the loss and the loop, which all stages share; (3) the
stages of VLPose; (4) those of multi-level alignment. `train_vlpose` and `train_uda` are the tables of contents of the
papers' experiments. The appendix holds the run's folder, the cache, checks of the data, tables, and the command.
"""
import copy
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader

from data import Crops, encode_heatmaps, normalize
from eval import default_device, number, run_model, usable_device
from uda import LossWeights, MultiLevelAlignment, StyleTransfer, heatmaps_and_features, supervised_loss
from vlpose import (DECODERS, MATCHERS, MODEL_CONFIGS, VLPose, encode_sentences, load_clip_text, save_checkpoint)

# ------------------------------------------------------------------------------------------------------ 1. the options

def setting(default, help, type=str, **limits):
    """A field that is also an option of the command: `lr` is `--lr`."""
    return field(default=default, metadata={"help": help, "type": type, **limits})


count, positive, rate, weight, share = (number(int, 0), number(int, 1), number(float, 0, above=True), number(float, 0),
                                        number(float, 0, 1))


@dataclass
class Options:
    """Both modes."""
    size: str = setting("tiny", "The model, where no weights say it.", choices=MODEL_CONFIGS)
    init: str = setting(None, "Weights that training starts from: a file or a name such as mae-b or resnet50.")
    weights: str = setting(None, "A trained model to adapt, instead of training one: a file or a name: vitpose-b.")
    batch_size: int = setting(16, "Crops in a batch.", positive)
    augmentation: str = setting(None, "How much crops are changed. By default gentle for tiny, the paper's for others.",
                                choices=("gentle", "paper"))
    bf16: bool = setting(torch.cuda.is_available(), "Compute in bfloat16 where that is safe.")
    seed: int = setting(0, "Of all random numbers.", count)
    device: str = setting(default_device(), "Where to compute.", usable_device)
    workers: int = setting(0, "Processes that cut out crops.", count)
    cache: str = setting(None, "Where figures and trained base models are kept. By default ~/.cache/posebridge.")
    out: str = setting(None, "The run's folder. By default runs/MODE-1, -2, ...")


@dataclass
class VLPoseOptions(Options):
    """VLPose."""
    source: str = setting("figures", "name:root. Its natural images train the base model.")
    target: str = setting("figures", "name:root. Its artificial images are what is adapted to.")
    text_weights: str = setting("random", "CLIP's text tower: a file or a name such as ViT-B/32.")
    template: str = setting("a photo of a {domain} character", "The sentence that names a domain.")
    strategy: str = setting("vlpose", "What is tuned: nothing, all, the last layer, prompts, or VLPose's adapter.",
                            choices=("scratch", "full", "last", "prompt", "vlpose"))
    decoder: str = setting("dual", "How the relation enters the frozen decoder.", choices=DECODERS)
    matcher: str = setting("concat", "What answers an image token: image and text, text, or image.", choices=MATCHERS)
    num_prompts: int = setting(None, "Visual prompts per layer. By default the paper's for the size.", count)
    shallow: bool = setting(False, "Prompts before the first layer alone.")
    base_steps: int = setting(3300, "Steps of the base model's training.", positive)
    base_lr: float = setting(1.5e-3, "Its learning rate.", rate)
    steps: int = setting(1200, "Steps of adaptation.", positive)
    lr: float = setting(1.5e-3, "Its learning rate. The paper's, for a batch of 512, is 5e-4.", rate)


@dataclass
class AlignmentOptions(Options):
    """Multi-level alignment. A level or a loss of 0 is switched off."""
    source: str = setting("figures#sculpture", "name:root or name:root#domain. Its labels are learned from.")
    target: str = setting("figures#photo", "Likewise. Its images are adapted to, its labels are for the test alone.")
    image_size: int = setting(None, "Height and width of crops. By default 256 256 for ResNets, else the size's own.",
                              number(int, 32, step=32), nargs=2)
    sigma: float = setting(None, "Of the heatmaps' Gaussians, in their pixels. By default the size's own.", rate)
    style_encoder: str = setting(None, "VGG-19 for style transfer: a file, adain-encoder or vgg19. By default a small "
                                 "random network.")
    style_weights: str = setting(None, "Its decoder, instead of training one: a file, adain-decoder, RUN/style.pth.")
    style_steps: int = setting(150, "Steps of the style decoder's training.", positive)
    style_lr: float = setting(5e-3, "Its learning rate.", rate)
    supervised_steps: int = setting(1200, "Steps of supervised training on the source.", positive)
    lr: float = setting(1.5e-3, "Its learning rate. The paper's is 1e-4.", rate)
    steps: int = setting(600, "Steps of adaptation.", positive)
    adapt_lr: float = setting(5e-4, "Its learning rate.", rate)
    ema_decay: float = setting(0.99, "Decay of the teacher. The paper's, for 15,000 steps, is 0.999.", share)
    image_level: float = setting(0.5, "Probability that a source image is restyled.", share)
    feature_level: float = setting(0.002, "Weight of the adversarial loss. The paper's is 0.1.", weight)
    pose_level: float = setting(0.3, "Weight of information maximization.", weight)
    consistency: float = setting(1.0, "Weight of the teacher's pseudo-labels.", weight)
    occlusion: float = setting(0.5, "Probability that a sure keypoint is covered.", share)
    oracle: bool = setting(False, "Also train with the target's labels, to see what is left to gain.")


# -------------------------------------------------------------------------------------------- 2. the loss and the loop

@dataclass(frozen=True)
class Stage:
    """How one stage of a run trains."""
    name: str
    steps: int
    lr: float
    batch_size: int
    seed: int
    bf16: bool  # compute in bfloat16 where that is safe
    layer_decay: float = 1.0
    weight_decay: float = 0.1  # ViTPose's


def heatmap_loss(model, texts, bf16, batch):
    """Mean of w (y - ŷ)² over images, keypoints and pixels -> (loss, ŷ).

    ŷ (B, K, h, w) are the predicted heatmaps, y those of the labels; w (B, K) is 0 where a keypoint is not labelled.
    texts: {domain: T}; None without text.
    """
    device = next(model.parameters()).device
    images = normalize(batch["image"].to(device))                                      # (B, 3, H, W)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        predicted = run_model(model, images, batch["domain"], texts).float()           # ŷ
    target, weights = label_heatmaps(batch, model.config, device)                      # y, w
    return ((predicted - target) ** 2 * weights[:, :, None, None]).mean(), predicted


def fit(stage, model, loss_of, data, run):
    """Trains what requires a gradient in `model`. A stage that was stopped goes on from its checkpoint.

    loss_of: calls the model on a batch of each data set -> (loss, heatmaps predicted for the first batch, or None).
    data: pairs of Crops and the rows to draw from.
    """
    optimizer = torch.optim.AdamW(parameter_groups(model, stage), betas=(0.9, 0.999))
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    first = run.restore(stage, model, optimizer)
    model.train()
    freeze_statistics(model)
    for step, batches in enumerate(batches_of(data, stage, first, run.workers), start=first):
        torch.manual_seed(stage.seed * 10 ** 6 + step)  # all that is random in a step depends on its number alone
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * group["scale"] * learning_rate(step, stage.steps)

        loss, predicted = loss_of(*batches)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

        run.after_step(stage, step + 1, loss, predicted, batches[0], model, optimizer)


def label_heatmaps(batch, config, device):
    """Heatmaps (B, K, h, w) of a batch's labels, at a quarter of the crops' size, and the weights (B, K)."""
    size = config.image_size
    heatmaps, weights = encode_heatmaps(batch["keypoints"], batch["visible"], size, (size[0] // 4, size[1] // 4),
                                        config.sigma)
    return heatmaps.to(device), weights.to(device)


def learning_rate(step, steps):
    """Factor of the learning rate at a step: linear warm-up, then ×0.1 at 170 and again at 200 of 210 parts."""
    warm_up = min(500, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.1 ** ((step >= steps * 170 / 210) + (step >= steps * 200 / 210))


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
        scale = stage.layer_decay ** layers_above
        decay = 0.0 if parameter.ndim == 1 or name.endswith("pos_embed") else stage.weight_decay
        group = groups.setdefault((scale, decay), {"params": [], "scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def freeze_statistics(model):
    """BatchNorm layers whose parameters are frozen keep their statistics, too."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and not module.weight.requires_grad:
            module.eval()


# ----------------------------------------------------------------------------------------------------------- 3. VLPose

def train_vlpose(options):
    """VLPose's experiment: does art get better, and do photographs stay as they were?"""
    natural, artificial, validation = vlpose_data(options)
    texts = texts_of_domains([artificial, *validation], options)
    base, text_dim = starting_model(options), next(iter(texts.values())).shape[1]
    model_to_tune(base, text_dim, options)  # a combination that cannot work fails here, before anything is trained
    run = Run(options)

    # Stage 1: a base model learns from natural images, unless --weights gives a trained one.
    if natural:
        stage = Stage("base", options.base_steps, options.base_lr, options.batch_size, options.seed, options.bf16,
                      layer_decay=base.config.layer_decay if options.init else 1.0)
        torch.manual_seed(options.seed)
        fit_or_find(stage, base, partial(heatmap_loss, base, None, options.bf16),
                    [training_crops(natural, base, options)], run)

    # Stage 2: what --strategy names is tuned on artificial images; with VLPose, everything else is frozen.
    adapted = model_to_tune(base, text_dim, options)
    if report_trained_share(adapted, base, options):
        stage = Stage("adapt", options.steps, options.lr, options.batch_size, options.seed, options.bf16,
                      layer_decay=base.config.layer_decay if options.strategy == "full" else 1.0)
        loss_of = partial(heatmap_loss, adapted, texts if isinstance(adapted, VLPose) else None, options.bf16)
        fit(stage, adapted, loss_of, [training_crops(artificial, adapted, options)], run)

    save_checkpoint(run.folder / "model.pth", adapted, text_weights=options.text_weights, template=options.template)
    if isinstance(adapted, VLPose):
        save_tensors(run.folder / "adapter.pth", adapted.adapter_state_dict())
    compare_poses(base, adapted, texts, validation, run)  # the original, the adapted model, and its adapter off


def texts_of_domains(datasets, options):
    """{domain: T (1, D_text)}: a sentence for each domain, read by the frozen text tower."""
    if options.text_weights == "random":
        print("no CLIP weights given (--text-weights ViT-B/32): a small random text tower with a fixed seed stands in")
    domains = np.unique(np.concatenate([dataset.domains for dataset in datasets])).tolist()
    sentences = {domain: options.template.replace("{domain}", domain) for domain in domains}
    return encode_sentences(load_clip_text(options.text_weights).to(options.device), sentences)


def model_to_tune(base, text_dim, options):
    """A copy of the base model in which just what --strategy tunes requires a gradient."""
    torch.manual_seed(options.seed)
    base = copy.deepcopy(base)
    prompts = {"num_prompts": options.num_prompts, "deep": not options.shallow}
    if options.strategy == "vlpose":
        return VLPose(base, text_dim, options.decoder, matcher=options.matcher, **prompts).to(options.device)
    if options.strategy == "prompt":
        return VLPose(base, text_dim, "baseline", **prompts).to(options.device)
    base.requires_grad_(options.strategy == "full")  # of `scratch`, nothing
    if options.strategy == "last":
        last = base.backbone.up if base.config.trunk else base.backbone.blocks[-1]
        for layer in (last, base.head.predictor):
            layer.requires_grad_(True)
    return base


# -------------------------------------------------------------------------------------------- 4. multi-level alignment

def train_uda(options):
    """The experiment of multi-level alignment: how much of the gap to the target do images without labels close?"""
    source, target, test, labelled_target = alignment_data(options)
    student = new_student(options, test.skeleton)
    stylist = new_stylist(options) if options.image_level else None
    sources = training_crops(source, student, options)
    targets = Crops(target, student.config.image_size), np.arange(len(target.ids))
    run = Run(options)

    # Stage 0: the style decoder learns to redraw source images in the style of target images.
    if stylist and not options.style_weights:
        stage = Stage("style", options.style_steps, options.style_lr, options.batch_size, options.seed, bf16=False,
                      weight_decay=0.0)
        fit(stage, stylist, partial(style_loss, stylist), [sources, targets], run)
    restyle = partial(stylist.restyle, probability=options.image_level) if stylist else None

    # Stage 1: a model learns from the source's labels, and the student from the same labels of restyled images.
    source_only = copy.deepcopy(student)
    stage = Stage("source", options.supervised_steps, options.lr, options.batch_size, options.seed, options.bf16)
    if not options.weights:
        fit_or_find(stage, source_only, partial(source_loss, source_only, None, options.bf16), [sources], run)
        if stylist:
            fit_or_find(replace(stage, name="restyled"), student, partial(source_loss, student, restyle, options.bf16),
                        [sources, targets], run, depends_on=[state_hash(stylist), options.image_level])
        else:
            student = source_only

    # Stage 2: student and teacher adapt to the target's images. `MultiLevelAlignment.forward` is a step of it.
    torch.manual_seed(options.seed)
    alignment = MultiLevelAlignment(
        copy.deepcopy(student), restyle, LossWeights(options.consistency, options.feature_level, options.pose_level),
        replace(augmentation_for(student.config, options)[1], occlusion=options.occlusion), options.ema_decay,
        labelled_keypoints(source), options.bf16).to(options.device)
    stage = replace(stage, name="adapt", steps=options.steps, lr=options.adapt_lr)
    fit(stage, alignment, partial(alignment_loss, alignment), [sources, targets], run)
    models = {"source only": source_only, "student": alignment.student, "teacher": alignment.teacher}

    # For comparison: what the target's labels would give in as many steps.
    if labelled_target:
        models["oracle"] = copy.deepcopy(source_only)
        fit_or_find(replace(stage, name="oracle"), models["oracle"],
                    partial(source_loss, models["oracle"], None, options.bf16),
                    [training_crops(labelled_target, student, options)], run)

    for name, model in models.items():
        save_checkpoint(run.folder / f"{name.replace(' ', '-')}.pth", model)
    if stylist:
        save_tensors(run.folder / "style.pth", stylist.state_dict())
        draw_styles(stylist, sources, targets, options).save(run.folder / "style.png")
    compare_pck(models, test, run)


def rgb(batch, model):
    """A batch's images (B, 3, H, W) where the model is, RGB in [0, 1]."""
    return batch["image"].to(next(model.parameters()).device) / 255


def style_loss(stylist, source, target):
    """Stage 0: content loss + 0.1 style loss."""
    content, style = stylist.loss(rgb(source, stylist), rgb(target, stylist))
    return content + 0.1 * style, None


def source_loss(model, restyle, bf16, source, target=None):
    """Stage 1: L_sup of the source images, some of them in the style of the target images beside them."""
    images = rgb(source, model)
    if restyle:
        images = restyle(images, rgb(target, model))
    heatmaps, _ = heatmaps_and_features(model, images, bf16)
    return supervised_loss(heatmaps, *label_heatmaps(source, model.config, images.device)), heatmaps


def alignment_loss(alignment, source, target):
    """Stage 2: L = L_sup + L_con + L_adv + L_im, each with its weight."""
    images = rgb(source, alignment)
    return alignment(images, *label_heatmaps(source, alignment.config, images.device), rgb(target, alignment))


# === Appendix: batches, the run's folder, the cache, data, models, tables, the command; skip on a first reading =======

import argparse
import csv
import hashlib
import itertools
import json
import math
import os
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

from PIL import Image
from torchvision.utils import make_grid

from data import (COCO17, FIGURES, GENTLE, NATURAL_DOMAINS, TRAINING, DataError, cache_folder, decode_heatmaps,
                  expecting, load_dataset, with_skeleton, written_whole)
from eval import domain_table, draw_curves, draw_sheet, fail, format_table, pck_of_results, predict, true_pose
from uda import GENTLE_VIEWS, Views
from vlpose import PoseModel, load_backbone, load_pose_model, load_strictly, load_weights

# ------------------------------------------------------------------------------------------------------------- batches

def training_crops(dataset, model, options):
    """What `fit` draws from: the augmented crops of a data set, and the rows of its annotated people."""
    return Crops(dataset, model.config.image_size, augmentation_for(model.config, options)[0]), dataset.annotated


def augmentation_for(config, options):
    """Of crops, and of a target's views. The papers' for their models; `tiny` trains for minutes, too short for crops
    turned by 80 degrees."""
    gentle = options.augmentation == "gentle" or options.augmentation is None and config.conv_stem
    return (GENTLE, GENTLE_VIEWS) if gentle else (TRAINING, Views())


def batches_of(data, stage, first, workers):
    """Yields a batch of each data set for each step from `first` on; each data set has an order of its own."""
    loaders = []
    for place, (crops, rows) in enumerate(data):
        keys = batch_keys(rows, stage.batch_size, stage.seed + 10 ** 6 * place, first, stage.steps)
        loaders.append(DataLoader(crops, batch_sampler=keys, num_workers=workers))
    return zip(*loaders)


def batch_keys(rows, batch_size, seed, first, last):
    """Yields the keys (row, seed) of batches first..last - 1: shuffled passes over `rows`, one after the other.

    A batch depends on its number alone, so that a resumed run sees the same ones.
    """
    current, order = None, None
    for step in range(first, last):
        keys = []
        for position in range(step * batch_size, (step + 1) * batch_size):
            epoch, place = divmod(position, len(rows))
            if epoch != current:
                current, order = epoch, np.random.default_rng((seed, epoch)).permutation(rows)
            keys.append((int(order[place]), (seed, position)))
        yield keys


# ------------------------------------------------------------------------------------------------------ the run folder

LOG_EVERY, CHECKPOINT_EVERY = 50, 500  # steps


class Run:
    """A run's folder: config.json, log.csv, a checkpoint per stage, and the results."""

    def __init__(self, options):
        self.workers, self.cache = options.workers, Path(options.cache)
        self.folder = Path(options.resume or options.out or new_folder(options.mode))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write("config.json", json.dumps(vars(options) | {"resume": None}, indent=2))
        print(f"run folder: {self.folder}")
        self.history = []  # rows of log.csv
        if (self.folder / "log.csv").exists():
            with open(self.folder / "log.csv", newline="") as file:
                self.history = [{"stage": row["stage"], "step": int(row["step"]), "loss": float(row["loss"]),
                                 "pck": float(row["pck"])} for row in csv.DictReader(file)]

    def after_step(self, stage, done, loss, predicted, batch, model, optimizer):
        """Logs and saves every so many steps; `done` of them are done."""
        if done % LOG_EVERY == 0 or done == stage.steps:
            pck = math.nan if predicted is None else batch_pck(predicted, batch, model.config)
            self.history.append({"stage": stage.name, "step": done, "loss": loss.item(), "pck": pck})
            speed = (done - self.first) / (time.perf_counter() - self.started)  # steps per second
            print(f"{stage.name:8}{done:6}/{stage.steps}  loss {loss.item():.5f}  PCK {pck:.3f}  "
                  f"{speed * stage.batch_size:4.0f} images/s  {(stage.steps - done) / speed:4.0f} s left", flush=True)
        if done % CHECKPOINT_EVERY == 0 or done == stage.steps:
            self.save(stage, done, model, optimizer)

    def save(self, stage, done, model, optimizer):
        """Writes the learning curves so far, and then what `restore` needs."""
        with written_whole(self.folder / "log.csv") as part, open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, ["stage", "step", "loss", "pck"])
            writer.writeheader()
            writer.writerows(self.history)
        draw_curves(self.history).save(self.folder / "curves.png")
        save_tensors(self.folder / f"{stage.name}.checkpoint.pth",
                     {"step": done, "model": model.state_dict(), "optimizer": optimizer.state_dict()})

    def restore(self, stage, model, optimizer):
        """Loads the stage's checkpoint, if there is one. Returns the number of steps that are done."""
        path, self.first = self.folder / f"{stage.name}.checkpoint.pth", 0
        if path.exists():
            with expecting(path, "a checkpoint of this run"):
                state = torch.load(path, weights_only=True, map_location="cpu")
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                self.first = state["step"]
        self.history = [row for row in self.history if row["stage"] != stage.name or row["step"] <= self.first]
        self.started = time.perf_counter()
        return self.first

    def write(self, name, text):
        with written_whole(self.folder / name) as part:
            part.write_text(text)


def save_tensors(path, contents):
    with written_whole(path) as part:
        torch.save(contents, part)


def new_folder(mode):
    """Makes runs/vlpose-1, or with the first number that is free."""
    for place in itertools.count(1):
        folder = Path("runs") / f"{mode}-{place}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            pass


def batch_pck(predicted, batch, config):
    """Share of a batch's labelled keypoints that lie closer than 0.05 of the crop's height to the truth."""
    points, _ = decode_heatmaps(predicted.detach().cpu(), config.image_size, config.sigma)
    right = (points - batch["keypoints"]).norm(dim=2) < 0.05 * config.image_size[0]
    return right[batch["visible"] > 0].float().mean().item()


# ----------------------------------------------------------------------------------------------------------- the cache

VERSION = "training-1"  # a new number whenever training changes, so that a cached model is not taken for a new one


def fit_or_find(stage, model, loss_of, data, run, depends_on=()):
    """`fit`, unless the same PoseModel was trained before, from the same start and in the same way: then it is in the
    cache. depends_on: what else the outcome depends on."""
    identity = [VERSION, FIGURES, state_hash(model), asdict(model.config), asdict(stage), *depends_on]
    for crops, rows in data:
        people, files = crops.dataset, [(Path(file).name, os.path.getsize(file)) for file in crops.dataset.files]
        labels = hashlib.sha256(people.keypoints[rows].tobytes() + people.boxes[rows].tobytes()).hexdigest()
        identity += [files, labels, crops.size, asdict(crops.augmentation)]
    path = run.cache / f"{stage.name}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]}.pth"
    if path.exists():
        print(f"{stage.name} model: {path} (trained before)")
        model.load_state_dict(load_pose_model(path).state_dict())
        return
    fit(stage, model, loss_of, data, run)
    run.cache.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, model)


def state_hash(model):
    state = hashlib.sha256()
    for tensor in model.state_dict().values():
        state.update(tensor.cpu().numpy().tobytes())
    return state.hexdigest()


# ----------------------------------------------------------------------------------------- data and models for VLPose

def vlpose_data(options):
    """Natural images to train the base on (None with --weights), artificial ones to adapt to, and both to test on."""
    natural = None if options.weights else training_images(options.source, "natural", options)
    artificial = training_images(options.target, "artificial", options)
    validation = [images_of_kind(options.source, "val", "natural", options),
                  images_of_kind(options.target, "val", "artificial", options)]
    validation = [dataset for dataset in validation if len(dataset.annotated)]
    if not validation:
        raise DataError(f"{options.source}, {options.target}: expected labelled people to validate on, found none")
    return natural, artificial, validation


def images_of_kind(spec, split, kind, options):
    """The natural or the artificial images of a data set."""
    dataset = with_skeleton(load_dataset(spec, split, options.cache), COCO17)
    return dataset.select_images(np.isin(dataset.domains, list(NATURAL_DOMAINS)) == (kind == "natural"))


def training_images(spec, kind, options):
    """The natural or the artificial images to train on."""
    dataset = images_of_kind(spec, "train", kind, options)
    if not len(dataset.annotated):
        domains = np.unique(load_dataset(spec, "train", options.cache).domains).tolist()
        raise DataError(f"{spec}: expected labelled people in {kind} images to train on; its domains are {domains[:8]}")
    report_people(spec, kind, dataset)
    return dataset


def report_people(spec, kind, dataset):
    """One line on what there is to train on."""
    skipped = len(dataset.ids) - len(dataset.annotated)
    print(f"{spec}: {len(dataset.annotated)} people in {len(dataset.files)} {kind} images to train on"
          + (f"; {skipped} without labelled keypoints skipped" if skipped else ""))


def starting_model(options):
    """The model of --weights or --init, or a new one of --size."""
    torch.manual_seed(options.seed)
    given = options.weights or options.init
    base = load_pose_model(given) if given else PoseModel(MODEL_CONFIGS[options.size])
    if base.num_keypoints != len(COCO17.names):
        raise DataError(f"{given}: expected {len(COCO17.names)} keypoints, found {base.num_keypoints}")
    return base.to(options.device)


def report_trained_share(model, base, options):
    """Prints and returns how many parameters are trained."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    share = trained / sum(parameter.numel() for parameter in base.parameters())
    print(f"{options.strategy}: {trained:,} trainable parameters, {share:.1%} of the base model's")
    return trained


# --------------------------------------------------------------------------- data and models for multi-level alignment

def alignment_data(options):
    """The source with its labels, the target without, the target's test images, and with --oracle its training images
    with their labels, else None."""
    test = load_dataset(options.target, "val", options.cache)
    labelled_target = load_dataset(options.target, "train", options.cache)
    target = labelled_target.unlabelled()
    source = with_skeleton(load_dataset(options.source, "train", options.cache), test.skeleton)
    enough = {"--source": (options.source, len(source.annotated)), "--target": (options.target, len(target.ids))}
    if options.oracle:
        enough["--oracle"] = options.target, len(labelled_target.annotated)
    for option, (spec, people) in enough.items():
        if people < options.batch_size:
            raise DataError(f"{option} {spec}: expected enough people for a batch of {options.batch_size}, "
                            f"found {people}")
    if not len(test.annotated):
        raise DataError(f"--target {options.target}: expected labelled people to test on, found none")
    report_people(options.source, "source", source)
    print(f"{options.target}: {len(target.ids)} people in {len(target.files)} target images, their labels unread")
    return source, target, test, labelled_target if options.oracle else None


def labelled_keypoints(dataset):
    """Indices of the keypoints that anybody in the data set has labelled."""
    return np.flatnonzero((dataset.keypoints[:, :, 2] > 0).any(0)).tolist()


def new_student(options, skeleton):
    """An untrained student, but for the backbone of --init; or the trained one of --weights."""
    torch.manual_seed(options.seed)
    size, keypoints = tuple(options.image_size) if options.image_size else None, len(skeleton.names)
    if options.weights:
        student = load_pose_model(options.weights, size)
        if student.num_keypoints != keypoints:
            raise DataError(f"{options.weights}: expected {keypoints} keypoints, as the target has, "
                            f"found {student.num_keypoints}")
        student.config = replace(student.config, sigma=options.sigma or student.config.sigma)
    else:
        config = MODEL_CONFIGS[options.size]
        size = size or ((256, 256) if config.trunk else config.image_size)
        student = PoseModel(replace(config, image_size=size, sigma=options.sigma or config.sigma), keypoints)
        if options.init:
            load_backbone(student, options.init)
    return student.to(options.device)


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

PREVIEWS = 8  # images in a picture


def compare_poses(base, adapted, texts, validation, run):
    """Prints and keeps the table of the original and the adapted model, and draws what both predict."""
    columns = {"original": (base, None), "adapted": (adapted, None)}
    if isinstance(adapted, VLPose):
        columns |= {"adapted": (adapted, texts), "adapter off": (adapted, None)}
    tables, results = {}, {}
    for column, (model, read) in columns.items():
        results[column] = [predict(model, dataset, read, workers=run.workers) for dataset in validation]
        tables[column] = {domain: numbers for dataset, found in zip(validation, results[column])
                          for domain, numbers in domain_table(dataset, found, base.config.image_size).items()}
    print_domains(tables)
    if "adapter off" in tables:
        same = results["adapter off"] == results["original"]  # every coordinate and score
        print(f"adapter off gives the original's poses exactly: {'yes' if same else 'NO'}")
    run.write("results.json", json.dumps(tables, indent=2))
    draw_sheet(one_of_each_domain(validation, results)).save(run.folder / "poses.png")


def print_domains(tables):
    """AP and PCK of each domain and their means over natural and artificial domains; two columns for each model."""
    domains = list(next(iter(tables.values())))
    natural = [domain for domain in domains if domain in NATURAL_DOMAINS]
    artificial = [domain for domain in domains if domain not in NATURAL_DOMAINS]
    rows = {domain: [domain] for domain in natural + artificial}
    rows |= {"mean of natural": natural, "mean of artificial": artificial}
    print(format_table("domain", {
        row: {f"{model} {key}": np.mean([table[domain][key] for domain in members])
              for model, table in tables.items() for key in ("AP", "PCK")}
        for row, members in rows.items() if members}))


def one_of_each_domain(validation, results):
    """A person of each domain as the annotators, the original model and the adapted model see them, to draw."""
    people = []
    for place, dataset in enumerate(validation):
        domains, first = np.unique(dataset.domains[dataset.image_index[dataset.annotated]], return_index=True)
        for domain, person in zip(domains, first):
            row = dataset.annotated[person]
            poses = {label: np.reshape(results[label][place][person]["keypoints"], (-1, 3))
                     for label in ("original", "adapted")}
            people.append((domain, dataset, row, {"truth": true_pose(dataset, row)} | poses))
    return people


def draw_styles(stylist, sources, targets, options):
    """Source images, target images, and the one in the style of the other, below each other."""
    content, style = (torch.stack([crops[int(row), 0]["image"] for row in rows[:min(PREVIEWS, options.batch_size)]])
                      for crops, rows in (sources, targets))
    content, style = content.to(options.device) / 255, style.to(options.device) / 255
    grid = make_grid(torch.cat([content, style, stylist(content, style)]).cpu(), nrow=len(content))
    return Image.fromarray((255 * grid).byte().permute(1, 2, 0).numpy())


def compare_pck(models, test, run):
    """Prints and keeps the PCK of each model on the target's test images, and draws what some of them predict."""
    table, poses = {}, {}
    for name, model in models.items():
        results = predict(model, test, flip=False, workers=run.workers)
        pck = partial(pck_of_results, test, results, model.config.image_size, groups=test.skeleton.groups)
        table[name] = pck() | {"mean at 0.2": pck(threshold=0.2)["mean"]}
        poses[name] = np.array([result["keypoints"] for result in results]).reshape(len(results), -1, 3)
    print(format_table("PCK@0.05", {group: {name: column[group] for name, column in table.items()}
                                    for group in table["teacher"]}))
    if "oracle" in table:
        means = {name: column["mean"] for name, column in table.items()}
        gap = means["oracle"] - means["source only"] or math.nan
        print("share of the gap between source only and oracle that is closed: " + ", ".join(
            f"{name} {(means[name] - means['source only']) / gap:.0%}" for name in ("student", "teacher")))
    run.write("results.json", json.dumps(table, indent=2))

    sure = poses["teacher"][:, :, 2] > np.median(poses["teacher"][:, :, 2])  # `confidence_mask`, of all test images
    people = []
    for place in np.linspace(0, len(test.annotated) - 1, PREVIEWS).astype(int):
        row, labels = test.annotated[place], poses["teacher"][place] * [1, 1, 0] + sure[place, :, None] * [0, 0, 1]
        people.append((Path(test.files[test.image_index[row]]).name, test, row, {
            "truth": true_pose(test, row), "source only": poses["source only"][place],
            "pseudo-labels": labels, "teacher": poses["teacher"][place]}))
    draw_sheet(people).save(run.folder / "poses.png")


# -------------------------------------------------------------------------------------------------------- the command

MODES = {"vlpose": (train_vlpose, VLPoseOptions), "uda": (train_uda, AlignmentOptions)}


def parse_options(argv):
    """Each mode has options of its own: `--mode uda --help` lists them."""
    mode = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    mode.add_argument("--mode", choices=MODES, default="vlpose", help="VLPose, or multi-level alignment.")
    parser = argparse.ArgumentParser(description="Trains and evaluates a pose estimator that crosses domains.",
                                     allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     parents=[mode])
    _, kind = MODES[mode.parse_known_args(argv)[0].mode]
    groups = {cls: parser.add_argument_group(cls.__doc__) for cls in (kind, Options)}
    shared = {option.name for option in fields(Options)}
    for option in fields(kind):
        more = dict(option.metadata) | {"default": option.default}
        if option.type is bool:
            more |= {"action": argparse.BooleanOptionalAction}
            del more["type"]
        groups[Options if option.name in shared else kind].add_argument(
            f"--{option.name.replace('_', '-')}", **more)
    parser.add_argument("--resume", metavar="FOLDER", help="Go on with the run in this folder, with its own options.")
    options = parser.parse_args(argv)
    options.cache = options.cache or str(cache_folder())
    return options


def resumed(folder):
    """The options of the run in a folder."""
    config = Path(folder) / "config.json"
    if not config.exists():
        raise DataError(f"{config}: not there; --resume wants the folder of an earlier run")
    with expecting(config, "the options of a run"):
        saved = json.loads(config.read_text())
        return argparse.Namespace(**vars(parse_options(["--mode", saved["mode"]])) | saved | {"resume": folder})


def main(argv=None):
    options = parse_options(argv)
    try:
        if options.resume:
            options = resumed(options.resume)
        elif options.out and (Path(options.out) / "config.json").exists():
            raise DataError(f"{options.out}: holds a run already; continue it with --resume, or name another folder")
        train, _ = MODES[options.mode]
        train(options)
    except (ValueError, OSError, NotImplementedError) as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
