"""The evidence: trains every row of the README's tables with several seeds, and makes the tables.

    python tests/evidence.py uda --jobs 2                      figures to figures: each level removed, and more
    python tests/evidence.py lsp:/data/lsp --init resnet18     figures to real photographs
    python tests/evidence.py uda --tables                      the tables of what is finished

Each row is one command of train.py, in a folder of its own; a finished one is skipped, a stopped one goes on. All
numbers are in results.csv. Jobs beside each other share the cores.
"""
import argparse
import csv
import json
import os
import shlex
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
IMAGE, FEATURE, POSE = "--image-level 0", "--feature-level 0", "--pose-level 0"
LEVELS = {  # row -> what is switched off
    "all three levels": "", "without image level": IMAGE, "without feature level": FEATURE, "without pose level": POSE,
    "image level alone": f"{FEATURE} {POSE}", "feature level alone": f"{IMAGE} {POSE}",
    "pose level alone": f"{IMAGE} {FEATURE}", "no level": f"{IMAGE} {FEATURE} {POSE}",
    "without occlusion": "--occlusion 0", "without consistency": "--consistency 0"}
MAIN_ROWS = ("all three levels", "without image level", "without feature level", "without pose level", "no level")


def commands(args):
    """{(row, seed): options of train.py}."""
    common = "--mode uda"
    if args.experiment.startswith("lsp:"):
        common += (f" --source figures --target {args.experiment} --size resnet18 --image-size 128 128 --sigma 1.25"
                   f" --augmentation gentle --init {args.init} --bf16 --supervised-steps 1000 --lr 5e-4 --steps 500"
                   " --adapt-lr 2e-4")
    rows = MAIN_ROWS if args.quick else LEVELS
    found = {}
    for seed in range(args.seeds):
        for row in rows:
            oracle = " --oracle" if row == "all three levels" else ""
            found[row, seed] = shlex.split(f"{common} {LEVELS[row]}{oracle} --seed {seed}")
    return found


def folder_of(args, row, seed):
    return args.folder / args.experiment.partition(":")[0] / f"{row.replace(' ', '-')}-{seed}"


def run(args, row, seed, options):
    """Trains one row, or goes on with it, unless it is finished. Its output is in log.txt."""
    folder = folder_of(args, row, seed)
    if (folder / "results.json").exists():
        return
    started = (folder / "config.json").exists()
    options = ["--resume", str(folder)] if started else [*options, "--out", str(folder)]
    print(f"python train.py {shlex.join(options)}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log:
        threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
        status = subprocess.run([sys.executable, ROOT / "train.py", *options], stdout=log, stderr=log,
                                env=os.environ | {"OMP_NUM_THREADS": threads}).returncode
    if status:
        print(f"failed; see {folder / 'log.txt'}", file=sys.stderr)


def collect(args, rows):
    """{(row, model): {measure: one number per seed}} of the finished runs; also writes results.csv."""
    numbers, lines = defaultdict(lambda: defaultdict(list)), []
    for row, seed in rows:
        path = folder_of(args, row, seed) / "results.json"
        if path.exists():
            for model, measures in json.loads(path.read_text()).items():
                for measure, value in measures.items():
                    numbers[row, model][measure].append(value)
                    lines.append((row, seed, model, measure, value))
    with open(args.folder / f"{args.experiment.partition(':')[0]}.csv", "w", newline="") as file:
        csv.writer(file).writerows([("row", "seed", "model", "measure", "value"), *lines])
    return numbers


def print_tables(numbers):
    def spread(values):
        return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else f"{values[0]:.3f}"

    print("\n| | seeds | student | teacher | teacher at 0.2 |\n|---|---|---|---|---|")
    for row, model in (("all three levels", "source only"), ("all three levels", "oracle")):
        if (row, model) in numbers:
            mean, coarse = (numbers[row, model][measure] for measure in ("mean", "mean at 0.2"))
            print(f"| {model} | {len(mean)} | {spread(mean)} | | {spread(coarse)} |")
    for row in LEVELS:
        if (row, "teacher") in numbers:
            student, teacher = (numbers[row, model]["mean"] for model in ("student", "teacher"))
            coarse = numbers[row, "teacher"]["mean at 0.2"]
            print(f"| {row} | {len(teacher)} | {spread(student)} | {spread(teacher)} | {spread(coarse)} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("experiment", help="uda, or lsp:ROOT")
    add("--init", default="resnet18", help="ImageNet weights for lsp")
    add("--seeds", type=int, default=3)
    add("--jobs", type=int, default=1, help="trainings beside each other")
    add("--quick", action="store_true", help="the main rows alone")
    add("--tables", action="store_true", help="train nothing")
    add("--folder", type=Path, default=Path("runs/evidence"))
    args = parser.parse_args()
    rows = commands(args)
    args.folder.mkdir(parents=True, exist_ok=True)
    if not args.tables:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda item: run(args, *item[0], item[1]), rows.items()))
    print_tables(collect(args, rows))


if __name__ == "__main__":
    main()
