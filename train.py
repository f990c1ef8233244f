"""Training: the loop, the run's folder, and the command.

    python train.py --mode vlpose        a base model on photographs, then VLPose's adapter on art

A run leaves everything in its folder: config.json, log.csv, results.json, the models, and pictures to look at.
`--resume FOLDER` goes on where a run was stopped, and ends with the same numbers as if it had not been.
"""
import argparse
import copy
import csv
import hashlib
import itertools
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from data import (COCO17, FIGURES, GENTLE, NATURAL_DOMAINS, TRAINING, Augmentation, Crops, DataError, cache_folder,
                  decode_heatmaps, encode_heatmaps, load_dataset, normalize)
from eval import default_device, domain_table, draw_curves, draw_sheet, fail, predict, run_model, usable_device
from vlpose import (DECODERS, VIT_CONFIGS, ViTPose, VLPose, encode_sentences, load_clip_text, load_vitpose, reading,
                    save_checkpoint)

LOG_EVERY, CHECKPOINT_EVERY = 50, 500  # steps

# ---------------------------------------------------------------------------------------------------------- one stage

@dataclass(frozen=True)
class Recipe:
    """How one stage trains."""
    steps: int
    batch_size: int
    lr: float
    seed: int
    augmentation: Augmentation
    layer_decay: float = 1.0
    weight_decay: float = 0.1  # ViTPose's


def augmentation_for(config):
    """The paper's for the paper's models; `tiny` trains for minutes, too short for crops turned by 80 degrees."""
    return GENTLE if config == VIT_CONFIGS["tiny"] else TRAINING


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


def heatmap_loss(model, batch, dataset, texts):
    """Mean squared error over the heatmaps of the labelled keypoints; also the predicted heatmaps (B, K, h, w)."""
    device, size = next(model.parameters()).device, model.config.image_size
    images = normalize(batch["image"].to(device))
    domains = dataset.domains[dataset.image_index[batch["row"].numpy()]]
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        predicted = run_model(model, images, domains, texts).float()
    keypoints, visible = batch["keypoints"].to(device), batch["visible"].to(device)
    target, weights = encode_heatmaps(keypoints, visible, size, predicted.shape[2:], model.config.sigma)
    return ((predicted - target) ** 2 * weights[:, :, None, None]).mean(), predicted


def batch_pck(predicted, batch, config):
    """Share of a batch's labelled keypoints that lie closer than 0.05 of the crop's height to the truth."""
    points, _ = decode_heatmaps(predicted.detach().cpu(), config.image_size, config.sigma)
    right = (points - batch["keypoints"]).norm(dim=2) < 0.05 * config.image_size[0]
    return right[batch["visible"] > 0].float().mean().item()


def fit(stage, model, dataset, texts, recipe, run):
    """Trains what requires a gradient in `model`. A stage that was stopped goes on from its checkpoint."""
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), betas=(0.9, 0.999))
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    first = run.restore(stage, model, optimizer)
    keys = batch_keys(dataset.labelled, recipe.batch_size, recipe.seed, first, recipe.steps)
    crops = Crops(dataset, model.config.image_size, recipe.augmentation)
    loader = DataLoader(crops, batch_sampler=keys, num_workers=run.workers)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d) and not module.weight.requires_grad:
            module.eval()  # statistics of frozen layers stay frozen too
    started = time.perf_counter()
    for step, batch in enumerate(loader, start=first):
        torch.manual_seed(recipe.seed + step)  # dropout and drop path depend on the step alone, too
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * group["scale"] * learning_rate(step, recipe.steps)
        loss, predicted = heatmap_loss(model, batch, dataset, texts)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

        done = step + 1
        if done % LOG_EVERY == 0 or done == recipe.steps:
            speed = (done - first) / (time.perf_counter() - started)
            run.log(stage, done, recipe.steps, loss.item(), batch_pck(predicted, batch, model.config),
                    speed * recipe.batch_size, (recipe.steps - done) / speed)
        if done % CHECKPOINT_EVERY == 0 or done == recipe.steps:
            run.save(stage, done, model, optimizer)


# ------------------------------------------------------------------------------------------------------ the run folder

class Run:
    """A run's folder: config.json, log.csv, a checkpoint per stage, and the results."""

    def __init__(self, options):
        self.workers = options.workers
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
        print(f"{stage:6}{step:6}/{steps}  loss {loss:.5f}  PCK {pck:.3f}  {speed:4.0f} images/s  {left:4.0f} s left",
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
            self.history = state["history"]
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


# ------------------------------------------------------------------------------------------------------------- VLPose

def domain_set(spec, split, kind, options):
    """The natural or the artificial images of a data set."""
    dataset = load_dataset(spec, split, options.cache)
    return dataset.select_images(np.isin(dataset.domains, list(NATURAL_DOMAINS)) == (kind == "natural"))


def training_set(spec, kind, options):
    """The images to train on, with a line on what they hold."""
    dataset = domain_set(spec, "train", kind, options)
    if not len(dataset.labelled):
        domains = np.unique(load_dataset(spec, "train", options.cache).domains).tolist()
        raise DataError(f"{spec}: expected labelled people in {kind} images to train on; its domains are {domains[:8]}")
    skipped = len(dataset.ids) - len(dataset.labelled)
    print(f"{spec}: {len(dataset.labelled)} people in {len(dataset.files)} {kind} images to train on"
          + (f"; {skipped} without labelled keypoints skipped" if skipped else ""))
    return dataset


def starting_model(options):
    """The model of --weights or --init, or a new one of --size."""
    torch.manual_seed(options.seed)
    given = options.weights or options.init
    base = load_vitpose(given) if given else ViTPose(VIT_CONFIGS[options.size])
    if base.num_keypoints != len(COCO17.names):
        raise DataError(f"{given}: expected {len(COCO17.names)} keypoints, found {base.num_keypoints}")
    return base.to(options.device)


def train_base(base, dataset, options, run):
    """Trains the base model on natural images, or finds it in the cache, trained before."""
    recipe = Recipe(options.base_steps, options.batch_size, options.base_lr, options.seed,
                    augmentation_for(base.config), base.config.layer_decay if options.init else 1.0)
    labels = hashlib.sha256(dataset.keypoints.tobytes()).hexdigest()
    identity = json.dumps([FIGURES, labels, options.init, asdict(base.config), asdict(recipe)])
    path = Path(options.cache) / f"base-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.pth"
    if path.exists():
        print(f"base model: {path} (trained before)")
        return load_vitpose(path).to(options.device)
    torch.manual_seed(options.seed)
    fit("base", base, dataset, None, recipe, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, base)
    return base


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
        recipe = Recipe(options.steps, options.batch_size, options.lr, options.seed, augmentation_for(base.config),
                        base.config.layer_decay if options.strategy == "full" else 1.0)
        fit("adapt", model, dataset, texts if isinstance(model, VLPose) else None, recipe, run)
    return model


def train_vlpose(options):
    """A base model on natural images, its adaptation to artificial ones, and what came of it."""
    natural = None if options.weights else training_set(options.source, "natural", options)
    artificial = training_set(options.target, "artificial", options)
    validation = [domain_set(options.source, "val", "natural", options),
                  domain_set(options.target, "val", "artificial", options)]
    validation = [dataset for dataset in validation if len(dataset.labelled)]
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
        base = train_base(base, natural, options, run)
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
    draw_sheet(validation, results["original"], results["adapted"]).save(run.folder / "poses.png")


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


# -------------------------------------------------------------------------------------------------------- the command

def positive(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def not_negative(text):
    if int(text) < 0:
        raise ValueError
    return int(text)


def parse_options(argv):
    parser = argparse.ArgumentParser(description="Trains and evaluates a pose estimator that crosses domains.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--mode", choices=["vlpose"], default="vlpose")
    add("--source", default="figures", help="name:root; its natural images train the base model")
    add("--target", default="figures", help="name:root; its artificial images are what is adapted to")
    add("--size", choices=VIT_CONFIGS, default="tiny", help="of the base model, where --init and --weights give none")
    add("--init", help="weights that the base model's training starts from: a file or a name such as mae-b, resnet50")
    add("--weights", help="a ViTPose to adapt, instead of training a base model: a file or a name such as vitpose-b")
    add("--text-weights", default="random", help="CLIP's text tower: a file or a name such as ViT-B/32")
    add("--template", default="a photo of a {domain} character", help="the sentence that names a domain")
    add("--strategy", choices=["scratch", "full", "last", "prompt", "vlpose"], default="vlpose", help="what is tuned")
    add("--decoder", choices=DECODERS, default="dual")
    add("--matcher", choices=["concat", "cross"], default="concat")
    add("--num-prompts", type=not_negative, help="visual prompts per layer (default: the paper's number for the size)")
    add("--shallow", action="store_true", help="prompts before the first layer alone")
    add("--base-steps", type=positive, default=3300)
    add("--base-lr", type=float, default=1.5e-3)
    add("--steps", type=positive, default=1200, help="of adaptation")
    add("--lr", type=float, default=1.5e-3, help="of adaptation; the paper's, for a batch of 512, is 5e-4")
    add("--batch-size", type=positive, default=16)
    add("--seed", type=not_negative, default=0)
    add("--device", type=usable_device, default=default_device())
    add("--workers", type=not_negative, default=0, help="processes that cut out crops")
    add("--cache", default=str(cache_folder()), help="where figures and base models are kept")
    add("--out", help="the run's folder (default: runs/vlpose-1, -2, ...)")
    add("--resume", metavar="FOLDER", help="go on with the run in this folder; every other option comes from there")
    return parser.parse_args(argv)


def resumed(folder):
    """The options of the run in a folder."""
    config = Path(folder) / "config.json"
    if not config.exists():
        raise DataError(f"{config}: not there; --resume wants the folder of an earlier run")
    with reading(config, "the options of a run"):
        return argparse.Namespace(**json.loads(config.read_text()) | {"resume": folder})


def main(argv=None):
    options = parse_options(argv)
    try:
        if options.resume:
            options = resumed(options.resume)
        elif options.out and (Path(options.out) / "config.json").exists():
            raise DataError(f"{options.out}: holds a run already; continue it with --resume, or name another folder")
        train_vlpose(options)
    except (ValueError, OSError) as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
