"""The evidence: trains every row of the tables with several seeds, and makes tables and pictures.

    python tests/evidence.py vlpose --jobs 2          strategies, decoders, matchers, text, prompts
    python tests/evidence.py resnet --init resnet18   the same with a ResNet-18 that knows ImageNet
    python tests/evidence.py few --jobs 2             after `vlpose`: 5, 20, 100 labels a style
    python tests/evidence.py words --jobs 2           VLPose reads a text tower that knows figures
    python tests/evidence.py clip --jobs 2            the same with CLIP's own, of 338 MB
    python tests/evidence.py real --root /data/LSP    after `vlpose`: tuned on 1,000 photographs
    python tests/evidence.py uda --jobs 2             statues to photographs: each level left out
    python tests/evidence.py lsp --root /data/LSP     drawn photographs to real ones
    python tests/evidence.py lsp-resnet --root /data/LSP --init resnet18    with a ResNet-18
    python tests/evidence.py both --jobs 2            after `vlpose`: adapters and unlabelled art
    python tests/evidence.py tiny --jobs 2            after `vlpose`: 40 labels, 13 joints

Each row is one command of train.py, printed when it starts, in a folder of its own; a finished one
is skipped, a stopped one goes on. All numbers are in a CSV file. Those of `vlpose`, `uda` and `lsp`
are in assets/evidence/; this prints them as tables, and trains nothing:

    python tests/evidence.py vlpose --known assets/evidence/vlpose.csv --tables

Jobs beside each other share the cores.
"""
import argparse
import csv
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from assets.figures import STYLES  # noqa: E402
from data import (COCO17, NATURAL_DOMAINS, below_common_folder, crop_width,  # noqa: E402
                  load_dataset, make_skeleton, select_images, to_coco, with_sentences,
                  with_skeleton)
from eval import evaluate_pck, poses_of, predict  # noqa: E402
from text_tower import SENTENCES  # noqa: E402
from train import domain_table, parse_options  # noqa: E402
from vlpose import VLPose, encode_sentences, load_clip_text, load_model  # noqa: E402

IMAGE, FEATURE, POSE = "--image-level 0", "--feature-level 0", "--pose-level 0"
LEVELS = {  # row -> what is left out
    "all three levels": "", "no level": f"{IMAGE} {FEATURE} {POSE}",
    "without image level": IMAGE,
    "without feature level": FEATURE, "without pose level": POSE,
    "the source alone": f"{IMAGE} {FEATURE} {POSE} --consistency 0",
    "image level alone": f"{FEATURE} {POSE}",
    "feature level alone": f"{IMAGE} {POSE}", "pose level alone": f"{IMAGE} {FEATURE}",
    "without occlusion": "--occlusion 0", "without consistency": "--consistency 0"}
# the default, and others
WEIGHTS = {"feature level": (0.002, (0.01, 0.1)), "pose level": (0.3, (30, 100))}
SENSITIVITY = {f"{level} {weight}": f"--{level.replace(' ', '-')} {weight}"
               for level, (_, weights) in WEIGHTS.items() for weight in weights}
TO_LSP = "--mode uda --source figures#photo --target lsp:{root}"
LSP = f"{TO_LSP} --augmentation paper --supervised-steps 1250"
RECIPES = {  # of experiment `lsp`; each row has an oracle
    "all three levels": "", "1,200 steps": "--steps 1200",
    "figures of all styles": "--source figures",
    "figures of all styles, 1,200 steps": "--source figures --steps 1200",
    "5,000 supervised steps, 1,200 steps": "--supervised-steps 5000 --steps 1200",
    "gentle augmentation": "--augmentation gentle"}
LSP_RESNET = (f"{TO_LSP} --size resnet18 --init {{init}} --image-size 128 128 --sigma 1.25 --bf16 "
              "--style-lr 1e-2 --supervised-steps 1000 --lr 5e-4 --steps 1200 --adapt-lr 2e-4 "
              "--feature-level 0.01 --pose-level 30")
VIEWS = ("facing the camera", "from behind", "head down")
ART = sorted(STYLES.keys() - NATURAL_DOMAINS)
STRATEGIES = {  # row -> how it differs from the default; `scratch` is in each
    "vlpose": "", "full": "--strategy full", "prompt": "--strategy prompt",
    "last": "--strategy last", "stem": "--strategy stem",
    "all but the stem": "--strategy all-but-stem", "lora": "--strategy lora"}
LORA = {f"lora, rank {rank}": f"--strategy lora --rank {rank}" for rank in (1, 16)}  # `lora` has 4
RESNET = {"vlpose": "--num-prompts 0", "full": "--strategy full", "last": "--strategy last"}
# `prompt` has the baseline decoder, `vlpose` the dual one.
VARIANTS = {f"decoder {name}": f"--decoder {name}"
            for name in ("injector", "extractor-injector", "dual-released")}
VARIANTS |= {"no text": "--matcher image",
             "one sentence for all": "--sentences 'a photo of a person'",
             "bare names": "--sentences '{domain}'"}
VARIANTS |= {f"{number} prompts": f"--num-prompts {number}" for number in (0, 50)}  # default: 10
VARIANTS |= {"vlpose with lora": "--rank 4",
             "vlpose with lora, no text": "--rank 4 --matcher image"}
OF_VLPOSE = "--weights {folder}/vlpose/vlpose-{seed}/model.pth"  # the original of its rows
# From the same base, which Muon has trained; and a base that AdamW trains in as many steps.
ADAMW = {f"{row}, AdamW": f"{STRATEGIES[row]} --optimizer adamw {OF_VLPOSE}"
         for row in ("vlpose", "full", "last", "lora")}
ADAMW["base, AdamW"] = "--strategy last --optimizer adamw"
HELD_OUT = {}
for held_out in ("cartoon", "ink painting"):
    others = ",".join(style for style in ART if style != held_out)
    HELD_OUT[f"without {held_out}"] = f"--target 'figures#{others}'"
READERS = ("vlpose", "bare names", *HELD_OUT)  # tested with the right and with wrong sentences
WORDS = {"vlpose": ""} | HELD_OUT  # of `words` and `clip`
COMPOSED = {  # see `words`
    "cartoon": "a picture of a person: bright colours, thick dark outlines, a large head",
    "ink painting": "a picture of a person: no colours, thick dark outlines, normal proportions"}

BOTH = {"plain alignment": "", "VLPose's adapter": "--strategy vlpose",
        "low-rank updates": "--strategy lora",
        "low-rank updates, longer":
            "--strategy lora --adapt-lr 2e-3 --steps 1500 --image-level 0.8"}
PICTURES = ("cartoon", "art")
TINY_STRATEGIES = {row: STRATEGIES[row] for row in ("full", "last", "vlpose")}
TINY = {f"{pictures}, {name}": f"--target coco:{{folder}}/tiny-{pictures}-{{seed}} {options}"
        for pictures in PICTURES for name, options in TINY_STRATEGIES.items()}

REAL = {row: STRATEGIES[row] for row in ("vlpose", "last", "lora", "full")}

# labelled pictures of a style -> epochs between validations, 50 to 70 steps
FEW_LABELS = {5: 25, 20: 7, 100: 2}
FEW_STRATEGIES = {row: STRATEGIES[row] for row in ("vlpose", "lora", "full")}
FEW = {f"{number} labels, {name}":
       f"--target coco:{{folder}}/few-{number}-{{seed}} --validate-every {epochs} {options}"
       for number, epochs in FEW_LABELS.items() for name, options in FEW_STRATEGIES.items()}

EXPERIMENTS = {  # name -> options of all rows, rows
    "vlpose": ("--mode vlpose", STRATEGIES | LORA | VARIANTS | HELD_OUT | ADAMW),
    "resnet": ("--mode vlpose --size resnet18 --init {init} --image-size 128 96 --sigma 1.25 "
               "--base-steps 1500 --steps 800", RESNET),
    "uda": ("--mode uda", LEVELS | SENSITIVITY),
    "lsp": (LSP, RECIPES),
    "lsp-resnet": (LSP_RESNET, LEVELS),
    "both": (f"--mode uda --source figures#photo --target figures#artificial {OF_VLPOSE}", BOTH),
    "words": ("--mode vlpose --text-weights {folder}/tower/tower.pth "
              "--sentences {folder}/tower/sentences.json", WORDS),
    "clip": ("--mode vlpose --text-weights ViT-B/32 --sentences {folder}/tower/sentences.json",
             WORDS),
    "few": (f"{OF_VLPOSE} --source figures --steps 400 --select best", FEW),
    "real": (f"{OF_VLPOSE} --source figures --target lsp:{{root}} --steps 600", REAL),
    "tiny": (f"{OF_VLPOSE} --steps 200", TINY)}
# how many rows --quick runs; of the others, all
QUICK = {"vlpose": 3, "uda": 2, "lsp": 1, "lsp-resnet": 1}


def filled(args, options, seed=0):
    return options.format(root=shlex.quote(args.root), init=shlex.quote(args.init),
                          folder=args.folder, seed=seed, domain="{domain}")


def commands(args):
    """{(row, seed): options of train.py}."""
    found = {}
    for row, options in EXPERIMENTS[args.experiment][1].items():
        # "all three levels" of each experiment, and each recipe of `lsp`
        oracle = "--oracle" if row in RECIPES else ""
        for seed in range(args.seeds):
            common = EXPERIMENTS[args.experiment][0]
            if f"{IMAGE} " in f"{options} ":  # then nothing trains a style decoder
                common = common.replace("--style-lr 1e-2 ", "")
            found[row, seed] = shlex.split(filled(args,
                                                  f"{common} {options} {oracle} --seed {seed}",
                                                  seed))
    return found


def folder_of(args, row, seed):
    return args.folder / args.experiment / f"{row.replace(',', '').replace(' ', '-')}-{seed}"


def log_of(folder):
    return folder.with_name(f"{folder.name}.txt")


def run(args, row, seed, options):
    """Trains one row, or goes on with it, unless it is finished. Returns the status.

    What it prints stands in a file beside the folder, which has to be new or empty.
    """
    folder = folder_of(args, row, seed)
    options, config = [*options, "--out", str(folder)], folder / "config.json"
    if config.exists():
        wanted = json.loads(json.dumps(vars(parse_options(options))))  # tuples are lists there
        found = json.loads(config.read_text("utf-8"))
        if found | wanted != found:
            print(f"{folder}: a run with other options; remove it, or name another --folder",
                  file=sys.stderr)
            return 1
        options = ["--resume", str(folder)]
    if (folder / "results.json").exists():
        return 0
    print(f"python train.py {shlex.join(options)}", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(log_of(folder), "a", encoding="utf-8") as log:
        threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
        status = subprocess.run([sys.executable, ROOT / "train.py", *options], stdout=log,
                                stderr=log, env={"OMP_NUM_THREADS": threads}
                                | os.environ | {"PYTHONIOENCODING": "utf-8"}).returncode
    if status:
        print(f"failed; see {log_of(folder)}", file=sys.stderr)
    return status


def train_rows(args, options_of, chosen):
    """Trains rows, --jobs beside each other. True if one fails."""
    if args.experiment in NEEDS:
        NEEDS[args.experiment](args)
    tasks = [(args, row, seed, options) for (row, seed), options in options_of.items()
             if row in chosen and (row, seed) not in args.known]
    with ThreadPoolExecutor(args.jobs) as pool:
        return any(list(pool.map(lambda task: run(*task), tasks)))


def read_numbers(path):
    """{(row, seed): {model: {measure: number}}} of a CSV file that `collect` has written."""
    known = defaultdict(lambda: defaultdict(dict))
    with open(path, newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            measures = known[line["row"], int(line["seed"])][line["model"]]
            measures[line["measure"]] = float(line["value"])
    return known


def read_sentences(folder):
    """What VLPose finds in all art by the sentence that it reads; kept in sentences.json.

    {"right sentence": {domain: {"AP": ...}}, "wrong sentence": ..., "composed sentence": ...}: each
    image's own sentence; that of another style; and for the held-out styles one that is composed of
    phrases about other styles.
    """
    path = folder / "sentences.json"
    if not path.exists():
        model = load_model(folder / "model.pth")
        right = with_sentences(load_dataset("figures#artificial", "val"), model.about["sentences"])
        sentence_of = dict(zip(right.domains.tolist(), right.sentences.tolist()))
        wrong = with_sentences(right, {style: sentence_of[other]
                                       for style, other in zip(ART, ART[1:] + ART[:1])})
        composed = with_sentences(right, sentence_of | COMPOSED)
        read = {"right": right, "wrong": wrong, "composed": composed}
        path.write_text(json.dumps({f"{name} sentence": table_of(model, figures)
                                    for name, figures in read.items()}))
    return json.loads(path.read_text("utf-8"))


def domains_of(folder):
    """{model: {domain: {"AP": ...}}} of a run's models of both methods; kept in domains.json.

    They are tested on photographs and on each art, with their adapter on.
    """
    path = folder / "domains.json"
    if not path.exists():
        tables = defaultdict(dict)
        for name in ("source-only", "teacher"):
            model = load_model(folder / f"{name}.pth")
            for spec in ("figures#photo", "figures#artificial"):
                figures = load_dataset(spec, "val")
                tables[name] |= table_of(model, with_sentences(figures, model.about["sentences"]))
        path.write_text(json.dumps(tables), "utf-8")
    return json.loads(path.read_text("utf-8"))


def table_of(model, figures):
    """{domain: {"AP": ...}} of figures with sentences, which a VLPose reads."""
    texts = None
    if isinstance(model, VLPose):
        texts = encode_sentences(load_clip_text(model.about["text_weights"]),
                                 np.unique(figures.sentences).tolist())
    return domain_table(figures, predict(model, figures, texts), model.config.image_size)


def pck_by_view(folder):
    """How good a run's models are on people who face the camera, and on others.

    {view: {"people": their share, model: [PCK@0.05, PCK@0.05 with left and right exchanged]}}; kept
    in views.json.
    """
    path = folder / "views.json"
    if not path.exists():
        config = json.loads((folder / "config.json").read_text("utf-8"))
        people = load_dataset(config["target"], "val")
        found = defaultdict(dict)
        for name in ("source-only", "teacher", "oracle"):
            model = load_model(folder / f"{name}.pth")
            test = with_skeleton(people, model.skeleton)
            for view, (share, measured) in pck_of_views(model, test).items():
                found[view] |= {"people": share, name: measured}
        path.write_text(json.dumps(found), "utf-8")
    return json.loads(path.read_text("utf-8"))


def pck_of_views(model, test):
    """{view: (share of the people, [PCK@0.05, PCK@0.05 with left and right exchanged])}."""
    people, size = test.annotated, model.config.image_size
    poses = poses_of(predict(model, test, flip_test=False))             # (people, K, 3)
    truth = test.keypoints[people]
    sides = crop_width(test.boxes[people], size) * size[0] / size[1]
    views = views_of(truth, test.skeleton)
    found = {}
    for view in VIEWS:
        seen = views == view
        measured = []
        for points in (poses[:, :, :2], poses[:, test.skeleton.mirrored, :2]):
            pck = evaluate_pck(points[seen], truth[seen, :, :2], truth[seen, :, 2], sides[seen],
                               groups=test.skeleton.groups)
            measured.append(pck["mean"])
        found[view] = seen.mean(), measured
    return found


def views_of(keypoints, skeleton):
    """The name in VIEWS for each person whose keypoints (people, K, 3) have shoulders and hips."""
    left_hip, right_hip, left, right = (
        keypoints[:, skeleton.names.index(name)]
        for name in ("left_hip", "right_hip", "left_shoulder", "right_shoulder"))
    upside_down = left_hip[:, 1] + right_hip[:, 1] < left[:, 1] + right[:, 1]
    from_behind = left[:, 0] < right[:, 0]
    return np.select([upside_down, from_behind], VIEWS[:0:-1], VIEWS[0])


def train_tower(args):
    """A text tower that has seen figures, and the sentences that it knows; see text_tower.py."""
    if not (args.folder / "tower" / "tower.pth").exists():
        subprocess.run([sys.executable, ROOT / "tests" / "text_tower.py", args.folder / "tower"],
                       check=True)


def write_sentences(args):
    """The sentences alone: CLIP's own tower reads them, too."""
    (args.folder / "tower").mkdir(exist_ok=True)
    (args.folder / "tower" / "sentences.json").write_text(json.dumps(SENTENCES), "utf-8")


def draw_tiny_sets(args):
    """COCO folders with 40 labelled figures to train on and all of `val`, with 13 joints.

    Each seed has another 40.
    """
    joints = [name for name in COCO17.names if "eye" not in name and "ear" not in name]
    kept = [COCO17.names.index(name) for name in joints]
    skeleton = make_skeleton(joints, [(kept.index(a), kept.index(b)) for a, b in COCO17.edges
                                      if {a, b} <= {*kept}])
    for pictures, spec in zip(PICTURES, ("figures#cartoon", "figures#artificial")):
        splits = {split: with_skeleton(load_dataset(spec, split), skeleton)
                  for split in ("train", "val")}
        for seed in range(args.seeds):
            chosen = np.random.default_rng(seed).permutation(len(splits["train"].files)) < 40
            write_set(args.folder / f"tiny-{pictures}-{seed}",
                      select_images(splits["train"], chosen), splits["val"])


def draw_few_sets(args):
    """COCO folders with few labelled figures of each style, others for each seed.

    Every fifth of them is `val`.
    """
    figures = load_dataset("figures#artificial", "train")
    for number in FEW_LABELS:
        for seed in range(args.seeds):
            rng, place = np.random.default_rng(seed), np.full(len(figures.files), -1)
            for style in ART:
                chosen = rng.permutation(np.flatnonzero(figures.domains == style))[:number]
                place[chosen] = np.arange(number)
            train, val = (select_images(figures, (place >= 0) & ((place % 5 == 0) == held_out))
                          for held_out in (False, True))
            write_set(args.folder / f"few-{number}-{seed}", train, val)


def write_set(home, train, val):
    """Writes figures to train on and to validate on as a folder of COCO's.

    The folder has the pictures by a link.
    """
    if not home.exists():
        (home / "annotations").mkdir(parents=True)
        (home / "images").symlink_to(below_common_folder([*train.files, *val.files])[0])
        for split, figures in (("train", train), ("val", val)):
            path = home / "annotations" / f"person_keypoints_{split}2017.json"
            path.write_text(json.dumps(to_coco(figures)), "utf-8")


def measures_of(args, row, seed):
    """{model: {measure: number}} of a finished run."""
    folder = folder_of(args, row, seed)
    if "--mode uda" not in EXPERIMENTS[args.experiment][0]:
        return tuning_measures(args, row, folder)
    if args.experiment == "both":
        return with_mean_of_art(domains_of(folder))
    return json.loads((folder / "results.json").read_text("utf-8"))


def tuning_measures(args, row, folder):
    """{model: {measure: number}} of a run of VLPose.

    AP by domain and on average over art, and how much was trained.
    """
    results = json.loads((folder / "results.json").read_text("utf-8"))
    if args.experiment in ("vlpose", "words", "clip") and row in READERS:
        results |= read_sentences(folder)
    found = with_mean_of_art(results)
    log = log_of(folder).read_text("utf-8")
    trained = re.search(r"([\d,]+) trainable parameters", log)[1]
    found["adapted"]["trained"] = int(trained.replace(",", ""))
    for model, domains in results.items():
        held_out = [domain for domain in domains if domain.startswith("all of lsp:")]
        if held_out:
            found[model]["held out"] = domains[held_out[0]]["AP"]
    return found


def with_mean_of_art(tables):
    """{model: {domain: AP}} of {model: {domain: {"AP": ...}}}.

    With the mean of all styles, where all of them are there.
    """
    found = {model: {domain: numbers["AP"] for domain, numbers in domains.items()}
             for model, domains in tables.items()}
    for numbers in found.values():
        if numbers.keys() >= set(ART):  # a run without one of the styles has no mean to compare
            numbers["art"] = float(np.mean([numbers[style] for style in ART]))
    return found


def collect(args, rows):
    """{(row, model): {measure: a number per seed}} of the finished runs, and of the known ones.

    All of it is also written as CSV.
    """
    numbers, lines = defaultdict(lambda: defaultdict(list)), []
    for row, seed in rows:
        measured = args.known.get((row, seed), {})
        if (folder_of(args, row, seed) / "results.json").exists():
            measured = measures_of(args, row, seed)
        for model, measures in measured.items():
            for measure, value in measures.items():
                if value is not None:  # None is a joint that nothing labels
                    numbers[row, model][measure].append(value)
                    lines.append((row, seed, model, measure, value))
    with open(args.folder / f"{args.experiment}.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("row", "seed", "model", "measure", "value"), *lines])
    return numbers


def spread(values):
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def code(options):
    return f"`{options}`" if options else ""


def print_alignment(numbers, rows):
    print("| PCK of the target | seeds | PCK@0.05 | its teacher's | PCK@0.2 | options |\n|"
          + 6 * "---|")
    models = {model: (numbers["all three levels", model], None, options)
              for model, options in (("source only", ""), ("oracle", "--oracle"))}
    models |= {row: (numbers[row, "student"], numbers[row, "teacher"], options)
               for row, options in rows.items()}
    for row, (model, teacher, options) in models.items():
        if model:
            wide = spread((teacher or model)["mean at 0.2"])
            print(f"| {row} | {len(model['mean'])} | {spread(model['mean'])} | "
                  f"{spread(teacher['mean']) if teacher else ''} | {wide} | {code(options)} |")


def print_recipes(numbers):
    """Each recipe beside its own source-only model and its own oracle."""
    print("\n| PCK@0.05 | seeds | source only | student | its teacher | oracle | gap closed | "
          "the teacher's PCK@0.2 |\n|" + 8 * "---|")
    for row in RECIPES:
        if numbers[row, "student"]:
            columns = [numbers[row, model]["mean"]
                       for model in ("source only", "student", "teacher", "oracle")]
            lowest, student, _, highest = map(np.mean, columns)
            share = (student - lowest) / (highest - lowest)
            cells = " | ".join(map(spread, columns))
            wide = spread(numbers[row, "teacher"]["mean at 0.2"])
            print(f"| {row} | {len(columns[0])} | {cells} | {share:.0%} | {wide} |")


def print_views(args):
    folder = folder_of(args, "all three levels", 0)
    if (folder / "results.json").exists():
        print("\n| PCK@0.05, with left and right exchanged in brackets, seed 0 | people "
              "| source only | teacher | oracle |\n|" + 5 * "---|")
        for view, found in pck_by_view(folder).items():
            share = found.pop("people")
            cells = [f"{pck:.3f} ({exchanged:.3f})" for pck, exchanged in found.values()]
            print(f"| {view} | {share:.0%} | {' | '.join(cells)} |")


def print_tuning(numbers, rows):
    """A row for the original and each way of tuning.

    A gain is measured in what full fine-tuning gains on art.
    """
    columns = ("photo", *ART)
    print(f"| AP | seeds | mean of art | of full's gain | {' | '.join(columns)} | trained | "
          f"options |\n|" + 14 * "---|")
    original, full = numbers["vlpose", "original"], numbers["full", "adapted"]
    models = {"scratch, the original": (original, "--strategy scratch"),
              "the same by AdamW": (numbers["base, AdamW", "original"], "--optimizer adamw")}
    models |= {row: (numbers[row, "adapted"], options) for row, options in rows.items()}
    for row, (found, options) in models.items():
        if found.get("art"):  # not where a style was held out
            share, trained = "", int(found["trained"][0]) if "trained" in found else 0
            if full and original:
                lowest, highest = np.mean(original["art"]), np.mean(full["art"])
                share = f"{(np.mean(found['art']) - lowest) / (highest - lowest):.0%}"
            styles = " | ".join(f"{np.mean(found[style]):.3f}" for style in ART)
            print(f"| {row} | {len(found['art'])} | {spread(found['art'])} | {share} | "
                  f"{spread(found['photo'])} | {styles} | {trained:,} | {code(options)} |")


def print_few(numbers):
    print(f"| AP of art, photo | {' | '.join(f'{number} labels a style' for number in FEW_LABELS)} "
          f"|\n|" + 4 * "---|")
    for name in FEW_STRATEGIES:
        rows = [numbers[f"{number} labels, {name}", "adapted"] for number in FEW_LABELS]
        cells = [f"{spread(found['art'])}, {spread(found['photo'])}" if found else ""
                 for found in rows]
        print(f"| {name} | {' | '.join(cells)} |")


def print_both(numbers):
    """A row for the original, and one for the teacher of each row."""
    print(f"| AP | seeds | mean of art | photo | {' | '.join(ART)} | options |\n|" + 12 * "---|")
    models = {"the original": (numbers["plain alignment", "source-only"], "")}
    models |= {row: (numbers[row, "teacher"], options) for row, options in BOTH.items()}
    for row, (found, options) in models.items():
        if found:
            styles = " | ".join(f"{np.mean(found[style]):.3f}" for style in ART)
            print(f"| {row} | {len(found['art'])} | {spread(found['art'])} | "
                  f"{spread(found['photo'])} | {styles} | {code(options)} |")


def print_strategies(numbers, strategies, measure, prefix=""):
    """A row for the model before and after each way of tuning.

    What it finds there, and on figures' photographs.
    """
    models = {f"{prefix}not adapted": (numbers[f"{prefix}full", "original"], "")}
    models |= {f"{prefix}{name}": (numbers[f"{prefix}{name}", "adapted"], options)
               for name, options in strategies.items()}
    for row, (found, options) in models.items():
        if found:
            print(f"| {row} | {spread(found[measure])} | {spread(found['photo'])} | "
                  f"{code(options)} |")


def print_tiny(numbers):
    print("| 40 labelled pictures of | AP on these | on photographs | options |\n|---|---|---|---|")
    for pictures in PICTURES:
        print_strategies(numbers, TINY_STRATEGIES, pictures, f"{pictures}, ")


def print_real(numbers):
    print("| 1,000 photographs of LSP | AP on another 1,000 | on figures' photographs | options "
          "|\n|---|---|---|---|")
    print_strategies(numbers, REAL, "held out")


def print_sentences(numbers):
    """Does it read?

    What the right sentence gains, and what it finds in a style that it was not tuned on.
    """
    print("\n| AP on art | the right sentence | another style's | gain |\n|---|---|---|---|")
    for row in READERS:
        right, wrong = (numbers[row, f"{name} sentence"]["art"] for name in ("right", "wrong"))
        if right and row not in HELD_OUT:
            print(f"| {row} | {spread(right)} | {spread(wrong)} | "
                  f"{spread(np.subtract(right, wrong))} |")
    print("\n| AP on a style | the original | tuned on the others | with another's sentence | "
          "with a composed one | tuned on all |\n|" + 6 * "---|")
    for row in HELD_OUT:
        style = row.removeprefix("without ")
        sentences = [(row, f"{name} sentence") for name in ("right", "wrong", "composed")]
        columns = [numbers[key][style] for key in (("vlpose", "original"), *sentences,
                                                   ("vlpose", "adapted"))]
        if all(columns):
            print(f"| {style} | {' | '.join(spread(values) for values in columns)} |")


def draw_chart(lines, x_title, y_title, ticks=None, side=480):
    """A picture of {label: [(x, y), ...]}, one colour each; a single point has its label beside it.

    ticks: {x: text} along the horizontal axis, where these should not be numbers.
    """
    picture = Image.new("RGB", (side, side), "white")
    draw, values = ImageDraw.Draw(picture), np.concatenate([np.array(points)
                                                            for points in lines.values()])
    low = np.floor(20 * values.min(0) - 0.2) / 20
    high = np.maximum(np.ceil(20 * values.max(0) + 0.2) / 20, low + 0.05)
    steps = [next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1) if b - a < 9 * step)
             for a, b in zip(low, high)]
    # round numbers, nine at most
    marks = [np.arange(a, b + step / 2, step) for a, b, step in zip(low, high, steps)]
    left, top, right, bottom = 50, 20, side - 20, side - 40

    def place(point):
        u, v = (np.array(point) - low) / (high - low)
        return left + u * (right - left), bottom - v * (bottom - top)

    draw.rectangle((left, top, right, bottom), outline="grey")
    for x, text in (ticks or {x: f"{x:.2f}" for x in marks[0]}).items():
        draw.text((place((x, low[1]))[0], bottom + 5), text, "black", anchor="ma")
    for y in marks[1]:
        draw.text((left - 5, place((low[0], y))[1]), f"{y:.2f}", "black", anchor="rm")
    colors = cycle(("royalblue", "orangered", "seagreen"))
    for label, points in lines.items():
        color = next(colors) if len(points) > 1 else "black"
        draw.line([place(point) for point in points], color, width=2)
        for point in points:
            x, y = place(point)
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), color)
        # then the line is above its end, its label below
        falls = len(points) > 1 and points[-2][1] > points[-1][1]
        away, beside = (8, "l") if x < left + 0.7 * (right - left) else (-8, "r")
        dx, dy, level = (0, 8 if falls else -8,
                         "a" if falls else "s") if len(points) > 1 else (away, 0, "m")
        draw.text((x + dx, y + dy), label, color, anchor=beside + level)
    draw.text((side / 2, side - 8), x_title, "black", anchor="ms")
    draw.text((left + 5, top + 3), y_title, "black")
    return picture


def draw_tradeoff(numbers, path):
    """VLPose's figure 1: what each way of tuning does to art and to photographs.

    A line leads from what an adapter does to photographs when it is left on to where it leaves them
    when it is off.
    """
    original = numbers["vlpose", "original"]
    models = {"scratch": (original, [original])}  # measured on art, on photographs
    models |= {row: (numbers[row, "adapted"],
                     [numbers[row, "adapted"], numbers[row, "adapter off"]]) for row in STRATEGIES}
    points = {row: [(np.mean(photos["photo"]), np.mean(art["art"])) for photos in measured
                    if photos["photo"]] for row, (art, measured) in models.items() if art["art"]}
    if points:
        draw_chart(points, "AP on photographs", "AP on art").save(path)


def draw_frontier(numbers, path):
    """What each way of tuning gains on art for the parameters that it trains.

    A line joins the ranks of `lora`.
    """
    lines = defaultdict(list)
    for row in STRATEGIES | LORA:
        if (found := numbers[row, "adapted"])["art"]:
            lines[row.split(", rank")[0]].append((math.log10(found["trained"][0]),
                                                  np.mean(found["art"])))
    if len(lines["lora"]) > 1:
        ticks = {math.log10(number): f"{number:,}" for number in (10_000, 100_000, 1_000_000)}
        draw_chart({row: sorted(points) for row, points in lines.items()}, "trained parameters",
                   "AP on art", ticks).save(path)


def draw_sensitivity(numbers, path):
    """The alignment paper's figure 2: what the weights of two levels do.

    Each step to the right is another weight.
    """
    lines, off = {}, -1.5
    for level, (default, weights) in WEIGHTS.items():
        rows = {math.log10(weight / default): f"{level} {weight}" for weight in weights}
        rows |= {off: f"without {level}", 0: "all three levels"}
        lines[level] = [(x, np.mean(pck)) for x, row in sorted(rows.items())
                        if (pck := numbers[row, "teacher"]["mean"])]
    if all(len(points) > 2 for points in lines.values()):  # other weights have been tried
        ticks = {off: "off", -1: "0.1", 0: "1", 1: "10", 2: "100"}
        draw_chart(lines, "weight of a level, relative to the default", "PCK of the teacher",
                   ticks).save(path)


# first
NEEDS = {"words": train_tower, "clip": write_sentences, "few": draw_few_sets,
         "tiny": draw_tiny_sets}
# tables of their own
PRINTED = {"few": print_few, "real": print_real, "both": print_both, "tiny": print_tiny}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("experiment", choices=EXPERIMENTS)
    add("--root", default="lsp", help="of LSP")
    add("--init", default="resnet18", help="ImageNet weights of the ResNet-18")
    add("--seeds", type=int, default=3)
    add("--jobs", type=int, default=1, help="trainings beside each other")
    add("--quick", action="store_true", help="the main rows alone")
    add("--tables", action="store_true", help="train nothing")
    add("--known", type=read_numbers, default={}, metavar="FILE",
        help="a CSV file of an earlier call, whose rows are not trained again")
    add("--folder", type=Path, default=Path("runs/evidence"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    common, rows = EXPERIMENTS[args.experiment]
    options_of = commands(args)
    chosen = list(rows)[:QUICK.get(args.experiment) if args.quick else None]
    failed = not args.tables and train_rows(args, options_of, chosen)
    numbers, common = collect(args, options_of), filled(args, common)
    print(f"\nEach row is python train.py {common} --seed 0 (or 1, 2, ...), and its options:\n")
    if args.experiment in PRINTED:
        PRINTED[args.experiment](numbers)
    elif args.experiment == "lsp":
        print_alignment(numbers, {"all three levels": ""})
        print_recipes(numbers)
        print_views(args)
    elif "--mode uda" in common:
        print_alignment(numbers, rows)
        draw_sensitivity(numbers, args.folder / f"{args.experiment}.png")
    else:
        print_tuning(numbers, rows)
        if ("vlpose", "right sentence") in numbers:
            print_sentences(numbers)
        if args.experiment == "vlpose":
            draw_tradeoff(numbers, args.folder / "vlpose.png")
            draw_frontier(numbers, args.folder / "frontier.png")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
