"""Training: the loop, the run's folder, and the command.

    python train.py --mode vlpose        a base model on photographs, then VLPose's adapter on art
    python train.py --mode uda           labels on one domain, and multi-level alignment to images of another

A run leaves everything in its folder: config.json, log.csv, results.json, the models, and pictures to look at.
`--resume FOLDER` goes on where a run was stopped, and ends with the same numbers as if it had not been.
"""
import argparse
import copy
import csv
import hashlib
import itertools
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.utils import make_grid

from data import (COCO17, FIGURES, GENTLE, NATURAL_DOMAINS, TRAINING, Crops, DataError, cache_folder,
                  decode_heatmaps, encode_heatmaps, load_dataset, normalize, with_skeleton)
from eval import (default_device, domain_table, draw_curves, draw_sheet, fail, format_table, pck_of_results, predict,
                  run_model, true_pose, usable_device)
from uda import (GENTLE_VIEWS, LossWeights, MultiLevelAlignment, PoseNet, StyleTransfer, Views, load_trunk, look,
                 supervised_loss)
from vlpose import (DECODERS, MATCHERS, VIT_CONFIGS, PoseModel, VLPose, encode_sentences, load_clip_text, load_strictly,
                    load_pose_model, load_weights, reading, save_checkpoint)

LOG_EVERY, CHECKPOINT_EVERY = 50, 500  # steps
VERSION = "training-1"  # a new number whenever training changes, so that a cached model is not taken for a new one

# ---------------------------------------------------------------------------------------------------------- one stage

@dataclass(frozen=True)
class Recipe:
    """How one stage trains."""
    steps: int
    batch_size: int
    lr: float
    seed: int
    bf16: bool  # compute in bfloat16 where that is safe
    layer_decay: float = 1.0
    weight_decay: float = 0.1  # ViTPose's


def learning_rate(step, steps):
    """Factor of the learning rate at a step: linear warm-up, then ×0.1 at 170 and again at 200 of 210 parts."""
    warm_up = min(500, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.1 ** ((step >= steps * 170 / 210) + (step >= steps * 200 / 210))


def parameter_groups(model, recipe):
    """Parameters by learning rate and weight decay: none on biases, norms and positional tables; with layer decay,
    each layer of the backbone learns more slowly than the one above it."""
    depth = len(model.backbone.blocks) if recipe.layer_decay < 1 else 0
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        level = depth + 1  # the decoder, and everything when there is no layer decay
        if depth and name.startswith("backbone.blocks."):
            level = int(name.split(".")[2]) + 1
        elif depth and name.startswith(("backbone.patch_embed", "backbone.pos_embed")):
            level = 0
        decay = 0.0 if parameter.ndim == 1 or name.endswith("pos_embed") else recipe.weight_decay
        scale = recipe.layer_decay ** (depth + 1 - level)
        group = groups.setdefault((scale, decay), {"params": [], "scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


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


def labels_of(batch, config):
    """Heatmaps (B, K, h, w) of a batch's keypoints, and weights (B, K): 0 where a keypoint is not labelled."""
    size = config.image_size
    return encode_heatmaps(batch["keypoints"], batch["visible"], size, (size[0] // 4, size[1] // 4), config.sigma)


def batch_pck(predicted, batch, config):
    """Share of a batch's labelled keypoints that lie closer than 0.05 of the crop's height to the truth."""
    points, _ = decode_heatmaps(predicted.detach().cpu(), config.image_size, config.sigma)
    right = (points - batch["keypoints"]).norm(dim=2) < 0.05 * config.image_size[0]
    return right[batch["visible"] > 0].float().mean().item()


def fit(stage, model, objective, data, recipe, run):
    """Trains what requires a gradient in `model`. A stage that was stopped goes on from its checkpoint.

    data: pairs of crops and the rows to draw from. objective: a batch from each of them -> the loss, and the heatmaps
    (B, K, h, w) predicted for the first one (None where there are none).
    """
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), betas=(0.9, 0.999))
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    first = run.restore(stage, model, optimizer)
    loaders = []
    for number, (crops, rows) in enumerate(data):  # each in an order of its own
        keys = batch_keys(rows, recipe.batch_size, recipe.seed + 10 ** 6 * number, first, recipe.steps)
        loaders.append(DataLoader(crops, batch_sampler=keys, num_workers=run.workers))
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and not module.weight.requires_grad:
            module.eval()  # statistics of frozen layers stay frozen too
    started = time.perf_counter()
    for step, batches in enumerate(zip(*loaders), start=first):
        torch.manual_seed(recipe.seed * 10 ** 6 + step)  # whatever is random depends on the step alone, too
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * group["scale"] * learning_rate(step, recipe.steps)
        loss, predicted = objective(*batches)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

        done = step + 1
        if done % LOG_EVERY == 0 or done == recipe.steps:
            speed = (done - first) / (time.perf_counter() - started)
            pck = math.nan if predicted is None else batch_pck(predicted, batches[0], model.config)
            left = (recipe.steps - done) / speed
            run.log(stage, done, recipe.steps, loss.item(), pck, speed * recipe.batch_size, left)
        if done % CHECKPOINT_EVERY == 0 or done == recipe.steps:
            run.save(stage, done, model, optimizer)


def state_hash(model):
    state = hashlib.sha256()
    for tensor in model.state_dict().values():
        state.update(tensor.cpu().numpy().tobytes())
    return state.hexdigest()


def fit_or_find(stage, model, objective, data, recipe, run, also=()):
    """`fit`, unless the same ViTPose or PoseNet was trained before, from the same start and in the same way: then it is
    in the cache. also: what else the outcome depends on."""
    pose = getattr(model, "pose", model)
    identity = [VERSION, FIGURES, state_hash(pose), asdict(pose.config), asdict(recipe), *also]
    for crops, rows in data:
        people, files = crops.dataset, [(Path(file).name, os.path.getsize(file)) for file in crops.dataset.files]
        labels = hashlib.sha256(people.keypoints[rows].tobytes() + people.boxes[rows].tobytes()).hexdigest()
        identity += [files, labels, crops.size, asdict(crops.augmentation)]
    path = run.cache / f"{stage}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]}.pth"
    if path.exists():
        print(f"{stage} model: {path} (trained before)")
        pose.load_state_dict(load_pose_model(path).state_dict())
        return
    fit(stage, model, objective, data, recipe, run)
    run.cache.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, pose)


# ------------------------------------------------------------------------------------------------------ the run folder

class Run:
    """A run's folder: config.json, log.csv, a checkpoint per stage, and the results."""

    def __init__(self, options):
        self.workers, self.cache = options.workers, Path(options.cache)
        self.folder = Path(options.resume or options.out or new_folder(options.mode))
        self.folder.mkdir(parents=True, exist_ok=True)
        write(self.folder / "config.json", json.dumps(vars(options) | {"resume": None}, indent=2))
        print(f"run folder: {self.folder}")
        self.history = []  # rows of log.csv
        if (self.folder / "log.csv").exists():
            with open(self.folder / "log.csv", newline="") as file:
                self.history = [{"stage": row["stage"], "step": int(row["step"]), "loss": float(row["loss"]),
                                 "pck": float(row["pck"])} for row in csv.DictReader(file)]

    def log(self, stage, step, steps, loss, pck, speed, left):
        self.history.append({"stage": stage, "step": step, "loss": loss, "pck": pck})
        print(f"{stage:8}{step:6}/{steps}  loss {loss:.5f}  PCK {pck:.3f}  {speed:4.0f} images/s  {left:4.0f} s left",
              flush=True)

    def save(self, stage, step, model, optimizer):
        """Writes what `restore` needs, beside its place and then moved there, and the learning curves so far."""
        state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                 "history": self.history}
        path = self.folder / f"{stage}.checkpoint.pth"
        torch.save(state, f"{path}.part")
        os.replace(f"{path}.part", path)
        with open(self.folder / "log.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["stage", "step", "loss", "pck"])
            writer.writeheader()
            writer.writerows(self.history)
        draw_curves(self.history).save(self.folder / "curves.png")

    def restore(self, stage, model, optimizer):
        """Loads the stage's checkpoint, if there is one. Returns the number of steps that are done."""
        path = self.folder / f"{stage}.checkpoint.pth"
        if not path.exists():
            return 0
        with reading(path, "a checkpoint of this run"):
            state = torch.load(path, weights_only=True, map_location="cpu")
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            rows = [row for row in self.history if row["stage"] != stage or row["step"] <= state["step"]]
            rows += [row for row in state["history"] if row["stage"] == stage]  # log.csv may lack the last ones
            self.history = list({(row["stage"], row["step"]): row for row in rows}.values())
            return state["step"]


def write(path, text):
    """Writes a file beside its place and moves it there: nobody finds half of it."""
    Path(f"{path}.part").write_text(text)
    os.replace(f"{path}.part", path)


def new_folder(mode):
    """Makes runs/vlpose-1, or with the first number that is free."""
    for number in itertools.count(1):
        folder = Path("runs") / f"{mode}-{number}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            pass


def augmentation_for(config, options):
    """Of crops, and of a target's views. The papers' for their models; `tiny` trains for minutes, too short for crops
    turned by 80 degrees."""
    gentle = options.augmentation == "gentle" or options.augmentation is None and config.conv_stem
    return (GENTLE, GENTLE_VIEWS) if gentle else (TRAINING, Views())


# ------------------------------------------------------------------------------------------------------------- VLPose

def domain_set(spec, split, kind, options):
    """The natural or the artificial images of a data set."""
    dataset = with_skeleton(load_dataset(spec, split, options.cache), COCO17)
    return dataset.select_images(np.isin(dataset.domains, list(NATURAL_DOMAINS)) == (kind == "natural"))


def say_people(spec, kind, dataset):
    """One line on what there is to train on."""
    skipped = len(dataset.ids) - len(dataset.annotated)
    print(f"{spec}: {len(dataset.annotated)} people in {len(dataset.files)} {kind} images to train on"
          + (f"; {skipped} without labelled keypoints skipped" if skipped else ""))


def training_set(spec, kind, options):
    """The images to train on."""
    dataset = domain_set(spec, "train", kind, options)
    if not len(dataset.annotated):
        domains = np.unique(load_dataset(spec, "train", options.cache).domains).tolist()
        raise DataError(f"{spec}: expected labelled people in {kind} images to train on; its domains are {domains[:8]}")
    say_people(spec, kind, dataset)
    return dataset


def heatmap_loss(model, batch, dataset, texts, bf16):
    """Mean squared error over the heatmaps of the labelled keypoints; also the predicted heatmaps (B, K, h, w)."""
    device = next(model.parameters()).device
    images = normalize(batch["image"].to(device))
    domains = dataset.domains[dataset.image_index[batch["row"].numpy()]]
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        predicted = run_model(model, images, domains, texts).float()
    target, weights = (tensor.to(device) for tensor in labels_of(batch, model.config))
    return ((predicted - target) ** 2 * weights[:, :, None, None]).mean(), predicted


def starting_model(options):
    """The model of --weights or --init, or a new one of --size."""
    torch.manual_seed(options.seed)
    given = options.weights or options.init
    base = load_pose_model(given) if given else PoseModel(VIT_CONFIGS[options.size])
    if base.num_keypoints != len(COCO17.names):
        raise DataError(f"{given}: expected {len(COCO17.names)} keypoints, found {base.num_keypoints}")
    return base.to(options.device)


def train_base(base, dataset, options, run):
    """Trains the base model on natural images, or finds it in the cache, trained before."""
    recipe = Recipe(options.base_steps, options.batch_size, options.base_lr, options.seed, options.bf16,
                    base.config.layer_decay if options.init else 1.0)
    torch.manual_seed(options.seed)
    crops = Crops(dataset, base.config.image_size, augmentation_for(base.config, options)[0])
    fit_or_find("base", base, lambda batch: heatmap_loss(base, batch, dataset, None, recipe.bf16),
                [(crops, dataset.annotated)], recipe, run)


def model_to_tune(base, text_dim, options):
    """A copy of the base model in which just what --strategy tunes requires a gradient."""
    torch.manual_seed(options.seed)
    base = copy.deepcopy(base)
    prompts = {"num_prompts": options.num_prompts, "deep": not options.shallow}
    if options.strategy == "vlpose":
        return VLPose(base, text_dim, options.decoder, matcher=options.matcher, **prompts)
    if options.strategy == "prompt":
        return VLPose(base, text_dim, "baseline", **prompts)
    base.requires_grad_(options.strategy == "full")
    if options.strategy == "last":
        last = base.backbone.up if base.config.trunk else base.backbone.blocks[-1]
        for layer in (last, base.head.predictor):
            layer.requires_grad_(True)
    return base


def adapt(base, dataset, texts, options, run):
    """Tunes a copy of the base model on artificial images."""
    model = model_to_tune(base, next(iter(texts.values())).shape[1], options).to(options.device)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    share = trainable / sum(parameter.numel() for parameter in base.parameters())
    print(f"{options.strategy}: {trainable:,} trainable parameters, {share:.1%} of the base model's")
    if trainable:
        recipe = Recipe(options.steps, options.batch_size, options.lr, options.seed, options.bf16,
                        base.config.layer_decay if options.strategy == "full" else 1.0)
        crops = Crops(dataset, base.config.image_size, augmentation_for(base.config, options)[0])
        read = texts if isinstance(model, VLPose) else None
        fit("adapt", model, lambda batch: heatmap_loss(model, batch, dataset, read, recipe.bf16),
            [(crops, dataset.annotated)], recipe, run)
    return model


def train_vlpose(options):
    """A base model on natural images, its adaptation to artificial ones, and what came of it."""
    natural = None if options.weights else training_set(options.source, "natural", options)
    artificial = training_set(options.target, "artificial", options)
    validation = [domain_set(options.source, "val", "natural", options),
                  domain_set(options.target, "val", "artificial", options)]
    validation = [dataset for dataset in validation if len(dataset.annotated)]
    if not validation:
        raise DataError(f"{options.source}, {options.target}: expected labelled people to validate on, found none")
    domains = np.unique(np.concatenate([dataset.domains for dataset in (artificial, *validation)])).tolist()
    if options.text_weights == "random":
        print("no CLIP weights given (--text-weights ViT-B/32): a small random text tower with a fixed seed stands in")
    clip_text = load_clip_text(options.text_weights).to(options.device)
    texts = encode_sentences(clip_text, {domain: options.template.replace("{domain}", domain) for domain in domains})
    base = starting_model(options)
    model_to_tune(base, clip_text.config.embed_dim, options)  # what cannot be should fail before anything is trained

    run = Run(options)
    if natural:
        train_base(base, natural, options, run)
    adapted = adapt(base, artificial, texts, options, run)
    save_checkpoint(run.folder / "model.pth", adapted, text_weights=options.text_weights, template=options.template)
    if isinstance(adapted, VLPose):
        torch.save(adapted.adapter_state_dict(), run.folder / "adapter.pth")
    compare(base, adapted, texts, validation, run)


def compare(base, adapted, texts, validation, run):
    """Prints and keeps the table of the original and the adapted model, and draws what both see."""
    columns = {"original": (base, None), "adapted": (adapted, None)}
    if isinstance(adapted, VLPose):
        columns |= {"adapted": (adapted, texts), "adapter off": (adapted, None)}
    tables, results = {}, {}
    for column, (model, read) in columns.items():
        results[column] = [predict(model, dataset, read, workers=run.workers) for dataset in validation]
        tables[column] = {domain: numbers for dataset, found in zip(validation, results[column])
                          for domain, numbers in domain_table(dataset, found, base.config.image_size).items()}
    print_table(tables)
    if "adapter off" in tables:
        same = results["adapter off"] == results["original"]  # every coordinate and score
        print(f"adapter off gives the original's poses exactly: {'yes' if same else 'NO'}")
    write(run.folder / "results.json", json.dumps(tables, indent=2))
    draw_sheet(one_of_each_domain(validation, results)).save(run.folder / "poses.png")


def one_of_each_domain(validation, results):
    """A person of each domain as the annotators, the original model and the adapted model see them, to draw."""
    people = []
    for number, dataset in enumerate(validation):
        domains, places = np.unique(dataset.domains[dataset.image_index[dataset.annotated]], return_index=True)
        for domain, place in zip(domains, places):
            row = dataset.annotated[place]
            poses = {label: np.reshape(results[label][number][place]["keypoints"], (-1, 3))
                     for label in ("original", "adapted")}
            people.append((domain, dataset, row, {"truth": true_pose(dataset, row)} | poses))
    return people


def print_table(tables):
    """AP and PCK per domain and their means over natural and artificial domains; one pair of columns per model."""
    domains = list(next(iter(tables.values())))
    natural = [domain for domain in domains if domain in NATURAL_DOMAINS]
    artificial = [domain for domain in domains if domain not in NATURAL_DOMAINS]
    print("\n" + " " * 20 + "".join(f"{column:>18}" for column in tables))
    print(f"{'domain':20}" + "        AP     PCK" * len(tables))
    for label, members in [*((domain, [domain]) for domain in natural + artificial),
                           ("mean of natural", natural), ("mean of artificial", artificial)]:
        if members:
            means = [{key: np.mean([table[domain][key] for domain in members]) for key in ("AP", "PCK")}
                     for table in tables.values()]
            print(f"{label:20}" + "".join(f"{mean['AP']:10.3f}{mean['PCK']:8.3f}" for mean in means))


# ----------------------------------------------------------------------------------------------- multi-level alignment

PREVIEWS = 8  # images in a picture


def new_student(options, skeleton):
    """An untrained student, but for the backbone of --init; or the trained one of --weights."""
    torch.manual_seed(options.seed)
    size, keypoints = tuple(options.image_size) if options.image_size else None, len(skeleton.names)
    if options.weights:
        pose = load_pose_model(options.weights, size)
        if pose.num_keypoints != keypoints:
            raise DataError(f"{options.weights}: expected {keypoints} keypoints, as the target has, "
                            f"found {pose.num_keypoints}")
        pose.config = replace(pose.config, sigma=options.sigma or pose.config.sigma)
    else:
        config = VIT_CONFIGS[options.size]
        size = size or ((256, 256) if config.trunk else config.image_size)
        pose = PoseModel(replace(config, image_size=size, sigma=options.sigma or config.sigma), keypoints)
        if options.init and config.trunk:
            load_trunk(pose, options.init)
        elif options.init:
            backbone = load_pose_model(options.init, size).backbone
            load_strictly(pose.backbone, backbone.state_dict(), options.init)
    return PoseNet(pose).to(options.device)


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


def read_domains(options):
    """The source with its labels, the target without, the target's test images, and what the oracle learns from."""
    test = load_dataset(options.target, "val", options.cache)
    labelled = load_dataset(options.target, "train", options.cache)
    target = labelled.unlabelled()
    source = with_skeleton(load_dataset(options.source, "train", options.cache), test.skeleton)
    enough = {"--source": (options.source, len(source.annotated)), "--target": (options.target, len(target.ids))}
    if options.oracle:
        enough["--oracle"] = options.target, len(labelled.annotated)
    for option, (spec, people) in enough.items():
        if people < options.batch_size:
            raise DataError(f"{option} {spec}: expected enough people for a batch of {options.batch_size}, "
                            f"found {people}")
    if not len(test.annotated):
        raise DataError(f"--target {options.target}: expected labelled people to test on, found none")
    say_people(options.source, "source", source)
    print(f"{options.target}: {len(target.ids)} people in {len(target.files)} target images, their labels unread")
    return source, target, test, labelled if options.oracle else None


def rgb(batch, device):
    return batch["image"].to(device) / 255


def train_style(stylist, source, target, options, run):
    """Stage 0: the decoder learns to redraw source images in the style of target images."""
    def objective(content, style):
        content_loss, style_loss = stylist.loss(rgb(content, options.device), rgb(style, options.device))
        return content_loss + 0.1 * style_loss, None

    recipe = Recipe(options.style_steps, options.batch_size, options.style_lr, options.seed, False, weight_decay=0.0)
    fit("style", stylist, objective, [source, target], recipe, run)


def train_supervised(stage, student, stylist, data, recipe, options, run):
    """Stage 1: the student learns from labels, those of the first of `data`. With a stylist its images are redrawn as
    those of the second."""
    def objective(batch, style=None):
        images = rgb(batch, options.device)
        if stylist:
            images = stylist.restyle(images, rgb(style, options.device), options.image_level)
        heatmaps, _ = look(student, images, recipe.bf16)
        labels, labelled = (tensor.to(options.device) for tensor in labels_of(batch, student.config))
        return supervised_loss(heatmaps, labels, labelled), heatmaps

    also = [state_hash(stylist), options.image_level] if stylist else []
    fit_or_find(stage, student, objective, data, recipe, run, also)


def align(student, stylist, data, recipe, options, run):
    """Stage 2: from stage 1's student, with the target's images. Returns the student and its teacher."""
    weights = LossWeights(options.consistency, options.feature_level, options.pose_level)
    views = replace(augmentation_for(student.config, options)[1], occlusion=options.occlusion)
    taught = np.flatnonzero((data[0][0].dataset.keypoints[:, :, 2] > 0).any(0)).tolist()
    torch.manual_seed(options.seed)
    model = MultiLevelAlignment(copy.deepcopy(student), weights, views, options.ema_decay, taught, recipe.bf16)
    model.to(options.device)

    def objective(batch, images):
        images, target_images = rgb(batch, options.device), rgb(images, options.device)
        if stylist:
            images = stylist.restyle(images, target_images, options.image_level)
        labels = (tensor.to(options.device) for tensor in labels_of(batch, student.config))
        return model(images, *labels, target_images)

    fit("adapt", model, objective, data, recipe, run)
    return model.student, model.teacher


def train_uda(options):
    """Style, supervision, adaptation, and what came of them; with --oracle also what the target's labels would give."""
    source, target, test, labelled = read_domains(options)
    student = new_student(options, test.skeleton)
    stylist = new_stylist(options) if options.image_level else None
    size, (augmentation, _) = student.config.image_size, augmentation_for(student.config, options)
    sources = Crops(source, size, augmentation), source.annotated
    targets = Crops(target, size), np.arange(len(target.ids))
    stage1 = Recipe(options.supervised_steps, options.batch_size, options.lr, options.seed, options.bf16)
    stage2 = Recipe(options.steps, options.batch_size, options.adapt_lr, options.seed, options.bf16)

    run = Run(options)
    if stylist and not options.style_weights:
        train_style(stylist, sources, targets, options, run)
    source_only = copy.deepcopy(student)
    if not options.weights:
        train_supervised("source", source_only, None, [sources], stage1, options, run)
        if stylist:
            train_supervised("restyled", student, stylist, [sources, targets], stage1, options, run)
        else:
            student = source_only
    student, teacher = align(student, stylist, [sources, targets], stage2, options, run)
    models = {"source only": source_only, "student": student, "teacher": teacher}
    if options.oracle:
        models["oracle"] = copy.deepcopy(source_only)
        data = [(Crops(labelled, size, augmentation), labelled.annotated)]
        train_supervised("oracle", models["oracle"], None, data, stage2, options, run)

    for name, model in models.items():
        save_checkpoint(run.folder / f"{name.replace(' ', '-')}.pth", model.pose)
    if stylist:
        torch.save(stylist.state_dict(), run.folder / "style.pth")
        draw_styles(stylist, sources, targets, options).save(run.folder / "style.png")
    compare_students(models, test, run)


def draw_styles(stylist, sources, targets, options):
    """Source images, target images, and the one in the style of the other, below each other."""
    count = min(PREVIEWS, options.batch_size)
    content, style = (torch.stack([rgb(crops[int(row), 0], options.device) for row in rows[:count]])
                      for crops, rows in (sources, targets))
    grid = make_grid(torch.cat([content, style, stylist(content, style)]).cpu(), nrow=count)
    return Image.fromarray((255 * grid).byte().permute(1, 2, 0).numpy())


def compare_students(models, test, run):
    """Prints and keeps the PCK of each model on the target's test images, and draws what some of them see."""
    table, poses = {}, {}
    for name, model in models.items():
        results = predict(model.pose, test, flip=False, workers=run.workers)
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
    write(run.folder / "results.json", json.dumps(table, indent=2))

    sure = poses["teacher"][:, :, 2] > np.median(poses["teacher"][:, :, 2])  # `confidence_mask`, of all test images
    people = []
    for place in np.linspace(0, len(test.annotated) - 1, PREVIEWS).astype(int):
        row, labels = test.annotated[place], poses["teacher"][place] * [1, 1, 0] + sure[place, :, None] * [0, 0, 1]
        people.append((Path(test.files[test.image_index[row]]).name, test, row, {
            "truth": true_pose(test, row), "source only": poses["source only"][place],
            "pseudo-labels": labels, "teacher": poses["teacher"][place]}))
    draw_sheet(people).save(run.folder / "poses.png")


# -------------------------------------------------------------------------------------------------------- the command

def positive(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def not_negative(text):
    if int(text) < 0:
        raise ValueError
    return int(text)


def probability(text):
    """Type of probabilities and of the teacher's decay."""
    if not 0 <= float(text) <= 1:
        raise ValueError
    return float(text)


def loss_weight(text):
    if not 0 <= float(text) < math.inf:
        raise ValueError
    return float(text)


def rate(text):
    """Type of learning rates and of sigma."""
    if not 0 < float(text) < math.inf:
        raise ValueError
    return float(text)


def image_side(text):
    """Type of an image's height and width: all networks here halve it up to five times."""
    if int(text) < 32 or int(text) % 32:
        raise argparse.ArgumentTypeError(f"{text}: expected a multiple of 32")
    return int(text)


def vlpose_options(add):
    add("--source", default="figures", help="name:root; its natural images train the base model")
    add("--target", default="figures", help="name:root; its artificial images are what is adapted to")
    add("--text-weights", default="random", help="CLIP's text tower: a file or a name such as ViT-B/32")
    add("--template", default="a photo of a {domain} character", help="the sentence that names a domain")
    add("--strategy", choices=["scratch", "full", "last", "prompt", "vlpose"], default="vlpose", help="what is tuned")
    add("--decoder", choices=DECODERS, default="dual")
    add("--matcher", choices=MATCHERS, default="concat",
        help="what answers an image token: image and text, the text, or the image alone")
    add("--num-prompts", type=not_negative, help="visual prompts per layer (default: the paper's number for the size)")
    add("--shallow", action="store_true", help="prompts before the first layer alone")
    add("--base-steps", type=positive, default=3300)
    add("--base-lr", type=rate, default=1.5e-3)
    add("--steps", type=positive, default=1200, help="of adaptation")
    add("--lr", type=rate, default=1.5e-3, help="of adaptation; the paper's, for a batch of 512, is 5e-4")


def uda_options(add):
    add("--source", default="figures#sculpture", help="name:root or name:root#domain; its labels are learned from")
    add("--target", default="figures#photo", help="likewise; its images are adapted to, its labels test")
    add("--image-size", type=image_side, nargs=2, metavar=("HEIGHT", "WIDTH"),
        help="of crops (default: 256 256 for ResNets, else the size's own)")
    add("--sigma", type=rate, help="of the heatmaps' Gaussians, in their pixels (default: 2, 1.25 for tiny; the "
        "paper's for animals is 1)")
    add("--style-encoder", help="VGG-19 for style transfer, a file or a name: adain-encoder, vgg19 (default: a small "
        "random network)")
    add("--style-weights", help="its decoder, instead of training one: a file or a name: adain-decoder, RUN/style.pth")
    add("--style-steps", type=positive, default=150)
    add("--style-lr", type=rate, default=5e-3)
    add("--supervised-steps", type=positive, default=1200)
    add("--lr", type=rate, default=1.5e-3, help="of supervised training; the paper's is 1e-4")
    add("--steps", type=positive, default=600, help="of adaptation")
    add("--adapt-lr", type=rate, default=5e-4, help="of adaptation")
    add("--ema-decay", type=probability, default=0.99, help="of the teacher; the paper's, for 15,000 steps, is 0.999")
    add("--image-level", type=probability, default=0.5,
        help="probability that a source image is restyled; 0: level off")
    add("--feature-level", type=loss_weight, default=0.002,
        help="weight of the adversarial loss, in the paper 0.1; 0: level off")
    add("--pose-level", type=loss_weight, default=0.3, help="weight of information maximization; 0: level off")
    add("--consistency", type=loss_weight, default=1.0, help="weight of the teacher's pseudo-labels; 0: off")
    add("--occlusion", type=probability, default=0.5, help="probability that a sure keypoint is covered; 0: off")
    add("--oracle", action="store_true", help="also train with the target's labels, to see what is left to gain")


MODES = {"vlpose": (train_vlpose, vlpose_options), "uda": (train_uda, uda_options)}


def parse_options(argv):
    """Each mode has options of its own: `--mode uda --help` lists them."""
    mode = argparse.ArgumentParser(add_help=False)
    mode.add_argument("--mode", choices=MODES, default="vlpose", help="VLPose, or multi-level alignment")
    parser = argparse.ArgumentParser(description="Trains and evaluates a pose estimator that crosses domains.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, parents=[mode])
    add = parser.add_argument
    _, add_options = MODES[mode.parse_known_args(argv)[0].mode]
    add_options(add)
    add("--size", choices=VIT_CONFIGS, default="tiny", help="of the model, where no weights give one")
    add("--init", help="weights that training starts from: a file or a name such as mae-b, resnet50")
    add("--weights", help="a trained ViTPose to adapt, instead of training one: a file or a name such as vitpose-b")
    add("--batch-size", type=positive, default=16)
    add("--augmentation", choices=["gentle", "paper"], help="how much (default: gentle for tiny, the paper's else)")
    add("--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
        help="compute in bfloat16 where that is safe: faster on GPUs and on recent CPUs")
    add("--seed", type=not_negative, default=0)
    add("--device", type=usable_device, default=default_device())
    add("--workers", type=not_negative, default=0, help="processes that cut out crops")
    add("--cache", default=str(cache_folder()), help="where figures and trained base models are kept")
    add("--out", help="the run's folder (default: runs/MODE-1, -2, ...)")
    add("--resume", metavar="FOLDER", help="go on with the run in this folder; every other option comes from there")
    return parser.parse_args(argv)


def resumed(folder):
    """The options of the run in a folder."""
    config = Path(folder) / "config.json"
    if not config.exists():
        raise DataError(f"{config}: not there; --resume wants the folder of an earlier run")
    with reading(config, "the options of a run"):
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
