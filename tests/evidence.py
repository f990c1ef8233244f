"""The evidence: trains every row of the README's tables with several seeds, and makes the tables.

    python tests/evidence.py uda --jobs 2                          statues to photographs: each level left out, and more
    python tests/evidence.py lsp --root /data/lsp --init resnet18  figures to real photographs
    python tests/evidence.py vlpose --jobs 2                       strategies, decoders, matchers, text, prompts

Each row is one command of train.py, printed when it starts, in a folder of its own; a finished one is skipped, a
stopped one goes on. All numbers are in a CSV file. Jobs beside each other share the cores.
"""
import argparse
import csv
import json
import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[1]
IMAGE, FEATURE, POSE = "--image-level 0", "--feature-level 0", "--pose-level 0"
LEVELS = {  # row -> what is left out; the first six are the quick ones
    "all three levels": "", "without image level": IMAGE, "without feature level": FEATURE, "without pose level": POSE,
    "no level": f"{IMAGE} {FEATURE} {POSE}", "the source alone": f"{IMAGE} {FEATURE} {POSE} --consistency 0",
    "image level alone": f"{FEATURE} {POSE}",
    "feature level alone": f"{IMAGE} {POSE}", "pose level alone": f"{IMAGE} {FEATURE}",
    "without occlusion": "--occlusion 0", "without consistency": "--consistency 0"}
LEVELS |= {f"feature level {weight}": f"--feature-level {weight}" for weight in (0.0005, 0.01, 0.1)}
LEVELS |= {f"pose level {weight}": f"--pose-level {weight}" for weight in (30, 100)}
LSP = ("--source figures --target lsp:{root} --size resnet18 --init {init} --image-size 128 128 --sigma 1.25 --bf16 "
       "--augmentation gentle --style-lr 1e-2 --supervised-steps 1000 --lr 5e-4 --steps 400 --adapt-lr 2e-4 "
       "--feature-level 0.01 --pose-level 30")
TUNING = {  # row -> how VLPose differs from the default; the first three are the quick ones
    "full": "--strategy full", "vlpose": "", "prompt": "--strategy prompt", "scratch": "--strategy scratch",
    "last": "--strategy last", "prompt, shallow": "--strategy prompt --shallow",
    **{f"decoder {name}": f"--decoder {name}" for name in ("baseline", "injector", "extractor-injector",
                                                           "dual-released")},
    "matcher cross": "--matcher cross", "no text": "--matcher image",
    "one sentence for all": "--template 'a photo of a person'",
    **{f"{number} prompts": f"--num-prompts {number}" for number in (0, 1, 5, 20, 50)}}  # the default is 10


def commands(args):
    """{(row, seed): options of train.py}."""
    if args.experiment == "vlpose":
        common, rows, quick = "--mode vlpose", TUNING, 3
    else:
        common, rows, quick = "--mode uda", LEVELS, 6
        if args.experiment == "lsp":
            common += " " + LSP.format(root=shlex.quote(args.root), init=shlex.quote(args.init))
    found = {}
    for seed in range(args.seeds):
        for row in list(rows)[:quick if args.quick else None]:
            oracle = "--oracle" if row == "all three levels" else ""
            found[row, seed] = shlex.split(f"{common} {rows[row]} {oracle} --seed {seed}")
    return found


def folder_of(args, row, seed):
    return args.folder / args.experiment / f"{row.replace(',', '').replace(' ', '-')}-{seed}"


def run(args, row, seed, options):
    """Trains one row, or goes on with it, unless it is finished. What it prints is in log.txt. Returns the status."""
    folder = folder_of(args, row, seed)
    if (folder / "results.json").exists():
        return 0
    started = (folder / "config.json").exists()
    options = ["--resume", str(folder)] if started else [*options, "--out", str(folder)]
    print(f"python train.py {shlex.join(options)}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log:
        threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
        status = subprocess.run([sys.executable, ROOT / "train.py", *options], stdout=log, stderr=log,
                                env={"OMP_NUM_THREADS": threads} | os.environ).returncode
    if status:
        print(f"failed; see {folder / 'log.txt'}", file=sys.stderr)
    return status


def measures_of(folder):
    """{model: {measure: number}} of a finished run."""
    results = json.loads((folder / "results.json").read_text())
    if "adapted" in results:  # VLPose: AP of each domain, and what it trained
        art = [domain for domain in results["adapted"] if domain != "photo"]
        results = {model: {domain: numbers["AP"] for domain, numbers in domains.items()}
                   for model, domains in results.items()}
        for numbers in results.values():
            numbers["art"] = float(np.mean([numbers[domain] for domain in art]))
        trained = re.search(r"([\d,]+) trainable parameters", (folder / "log.txt").read_text())
        results["adapted"]["trained"] = int(trained[1].replace(",", ""))
    return results


def collect(args, rows):
    """{(row, model): {measure: a number per seed}} of the finished runs; all of it is also written as CSV."""
    numbers, lines = defaultdict(lambda: defaultdict(list)), []
    for row, seed in rows:
        folder = folder_of(args, row, seed)
        if (folder / "results.json").exists():
            for model, measures in measures_of(folder).items():
                for measure, value in measures.items():
                    numbers[row, model][measure].append(value)
                    lines.append((row, seed, model, measure, value))
    with open(args.folder / f"{args.experiment}.csv", "w", newline="") as file:
        csv.writer(file).writerows([("row", "seed", "model", "measure", "value"), *lines])
    return numbers


def spread(values):
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def print_alignment(numbers):
    print("\n| PCK of the target | seeds | student | teacher | teacher, at 0.2 |\n|---|---|---|---|---|")
    for model in ("source only", "oracle"):
        pck = numbers["all three levels", model]
        if pck:
            print(f"| {model} | {len(pck['mean'])} | {spread(pck['mean'])} | | {spread(pck['mean at 0.2'])} |")
    for row in LEVELS:
        student, teacher = numbers[row, "student"], numbers[row, "teacher"]
        if teacher:
            taught = row != "the source alone"  # a teacher that has seen no target image is no teacher
            print(f"| {row} | {len(teacher['mean'])} | {spread(student['mean'])} | "
                  + (f"{spread(teacher['mean'])} | {spread(teacher['mean at 0.2'])} |" if taught else "| |"))


def draw_points(points, x_title, y_title, side=480):
    """A picture of {label: (x, y)}."""
    picture = Image.new("RGB", (side, side), "white")
    draw, values = ImageDraw.Draw(picture), np.array(list(points.values()))
    low = np.floor(20 * values.min(0) - 0.2) / 20
    high = np.maximum(np.ceil(20 * values.max(0) + 0.2) / 20, low + 0.05)
    left, top, right, bottom = 50, 20, side - 20, side - 40
    draw.rectangle((left, top, right, bottom), outline="grey")
    for tick in np.linspace(0, 1, 5):
        x, y = low + tick * (high - low)
        draw.text((left + tick * (right - left), bottom + 5), f"{x:.3g}", "black", anchor="ma")
        draw.text((left - 5, bottom - tick * (bottom - top)), f"{y:.3g}", "black", anchor="rm")
    for label, point in points.items():
        u, v = (np.array(point) - low) / (high - low)
        x, y = left + u * (right - left), bottom - v * (bottom - top)
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), "royalblue")
        draw.text((x, y - 8), label, "black", anchor="ls" if u < 0.75 else "rs")
    draw.text((side / 2, side - 8), x_title, "black", anchor="ms")
    draw.text((left + 5, top + 3), y_title, "black")
    return picture


def print_tuning(numbers):
    print("\n| AP | seeds | photo | mean of art | trained parameters |\n|---|---|---|---|---|")
    for row in TUNING:
        adapted = numbers[row, "adapted"]
        if adapted:
            print(f"| {row} | {len(adapted['art'])} | {spread(adapted['photo'])} | {spread(adapted['art'])} | "
                  f"{adapted['trained'][0]:,} |")


def draw_tradeoff(numbers, path):
    """The paper's figure 1: what each way of tuning does to art and to photographs."""
    points = {row: [np.mean(measures[key]) for key in ("photo", "art")]
              for row in TUNING if TUNING[row].startswith("--strategy") and (measures := numbers[row, "adapted"])}
    for label, model in (("original, adapter off", "original"), ("vlpose", "adapted")):
        if measures := numbers["vlpose", model]:
            points[label] = [np.mean(measures[key]) for key in ("photo", "art")]
    if points:
        draw_points(points, "AP on photographs", "AP on art").save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("experiment", choices=["uda", "lsp", "vlpose"])
    add("--root", default="lsp", help="of LSP")
    add("--init", default="resnet18", help="ImageNet weights of the ResNet-18 for LSP")
    add("--seeds", type=int, default=3)
    add("--jobs", type=int, default=1, help="trainings beside each other")
    add("--quick", action="store_true", help="the main rows alone")
    add("--tables", action="store_true", help="train nothing")
    add("--folder", type=Path, default=Path("runs/evidence"))
    args = parser.parse_args()
    rows = commands(args)
    args.folder.mkdir(parents=True, exist_ok=True)
    failed = False
    if not args.tables:
        with ThreadPoolExecutor(args.jobs) as pool:
            failed = any(list(pool.map(lambda item: run(args, *item[0], item[1]), rows.items())))
    numbers = collect(args, rows)
    if args.experiment == "vlpose":
        print_tuning(numbers)
        draw_tradeoff(numbers, args.folder / "vlpose.png")
    else:
        print_alignment(numbers)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
