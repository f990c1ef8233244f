"""Trials of faults that take too long for the tests: broken files by the thousand, killed runs.

    python tests/faults.py                      all six, one after the other: a night's run
    python tests/faults.py fuzz --cases 10000   each broken file ends in success or one clean line
    python tests/faults.py flip --cases 150     flipped bits in a model file
    python tests/faults.py kill --trials 20     kill -9 at a random moment, then --resume
    python tests/faults.py kill --trials 20 --processes 2
    python tests/faults.py hang                 pipes in the place of files, and stopped processes
    python tests/faults.py pipe                 trainings whose output cannot be written
    python tests/faults.py code                 an edited module, then the cache and --resume

A run that was killed must end with the numbers of one that nobody has killed. Everything follows
from --seed. A case that does not hold is printed, and its file is kept in --out. Needs a POSIX
system.
"""
import argparse
import copy
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import convert  # noqa: E402
import train  # noqa: E402
from clip_tokenizer import CLIPTokenizer  # noqa: E402
# noqa: E402
from data import DataError, draw_figures, load_dataset, open_image, read_boxes, to_coco
from eval import evaluate_oks, fail  # noqa: E402
# noqa: E402
from vlpose import VIT_CONFIGS, PoseModel, VLPose, load_model, load_weights, save_checkpoint

SECONDS, BYTES = 5, 1e9  # of the processor, and of memory, that a case may take
ODD = [None, "", "1234", "é\0\n", -1, 0, 7, 1.7, 1e300, -1e300, 2e9, 10 ** 30, float("nan"),
       float("inf"), True, [], {}, [[]], [1, 2], {"a": 1}, "../../etc/passwd", "/", ["x"] * 51,
       [1e300] * 4, list(range(51)), 10 ** 400]

# ----------------------------------------------------------------------------------------- breaking

def broken_bytes(content, chance):
    """A few bytes changed, lost, doubled or added; or an end cut off."""
    content = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        place, length = chance.randrange(len(content) + 1), chance.choice((1, 4, 8, 64, 1000))
        kind = chance.randrange(6)
        if kind == 0 and content:
            content[min(place, len(content) - 1)] ^= 1 << chance.randrange(8)
        elif kind == 1:
            content[place:place + length] = chance.randbytes(length)
        elif kind == 2:
            del content[place:place + length]
        elif kind == 3:
            content[place:place] = content[place:place + length]
        elif kind == 4:
            content[place:place + length] = chance.choice((b"\0", b"\xff")) * length
        elif chance.random() < 0.3:
            del content[place:]
    return bytes(content)


def broken_tree(tree, chance):
    """A JSON value with a few odd values, or without some."""
    tree = json.loads(json.dumps(tree))
    for _ in range(chance.randint(1, 3)):
        parent, key, node = None, None, tree
        while isinstance(node, (dict, list)) and node and (parent is None
                                                           or chance.random() < 0.75):
            parent = node
            key = chance.choice(list(node)) if isinstance(node,
                                                          dict) else chance.randrange(len(node))
            node = node[key]
        if parent is None:
            return copy.deepcopy(chance.choice(ODD))
        if chance.random() < 0.25:
            del parent[key]
        else:
            parent[key] = copy.deepcopy(chance.choice(ODD))
    return tree


def broken_json(tree, chance):
    if chance.random() < 0.3:
        return broken_bytes(json.dumps(tree).encode(), chance)
    content = json.dumps(broken_tree(tree, chance)).encode()
    return content + chance.choice((b"", b"", b"", b" and more", b"]"))


def broken_zip(content, chance):
    """Broken bytes; or a broken pickle in an archive that is whole."""
    if chance.random() < 0.4:
        return broken_bytes(content, chance)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            inside = old.read(entry)
            new.writestr(entry.filename, broken_bytes(inside, chance)
                         if entry.filename.endswith(".pkl") else inside)
    return out.getvalue()


# ---------------------------------------------------------------------------------------- the kinds

def saved(save, *arguments, **options):
    buffer = io.BytesIO()
    save(*arguments, buffer, **options)
    return buffer.getvalue()


def kinds_of(home):
    """{kind: (how its file is called, chance -> bytes of a broken one, path -> what reads it)}"""
    draw_figures(home, {"train": (3, 1), "val": (2, 1)})
    people = load_dataset(f"figures:{home / train.FIGURES}", "val")
    coco = to_coco(people)
    (home / "images").symlink_to(home / train.FIGURES / "images")
    results = [{"image_id": record["image_id"], "category_id": 1, "score": 0.5,
                "keypoints": record["keypoints"]} for record in coco["annotations"]]
    boxes = [{"image_id": n + 1, "bbox": [1, 2, 30, 40], "score": 0.5, "category_id": 1}
             for n in range(5)]
    (home / "truth.json").write_text(json.dumps(coco), "utf-8")
    (home / "results.json").write_text(json.dumps(results), "utf-8")

    torch.manual_seed(0)
    model = VLPose(PoseModel(VIT_CONFIGS["tiny"]), 8)
    save_checkpoint(home / "model.pth", model, sentences="a {domain}", text_weights="random")
    own, contents = (home / "model.pth").read_bytes(), torch.load(home / "model.pth")
    small = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    foreign = {"state_dict": small.state_dict(),
               "meta": {"loss": np.float64(3), "args": argparse.Namespace(lr=1)}}
    plain, legacy = (saved(lambda f, new=new: torch.save(foreign, f,
                                                         _use_new_zipfile_serialization=new))
                     for new in (True, False))
    script = saved(lambda f: torch.jit.save(torch.jit.script(small), f))
    header = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
              "b": {"dtype": "I64", "shape": [2], "data_offsets": [24, 40]}}

    def safetensors(chance):
        text = broken_json(header, chance)
        length = len(text) if chance.random() < 0.8 else chance.randrange(2 ** 63)
        return length.to_bytes(8, "little") + text + bytes(chance.choice((40, 40, 39, 0)))

    def configured(chance):
        changed = dict(contents)
        for part in ("format", "about", "config", "skeleton", "options"):
            if chance.random() < 0.5:
                changed[part] = broken_tree(contents[part], chance)
        return saved(lambda f: torch.save(changed, f))

    def resume(path):
        (path.parent / "config.json").write_bytes(path.read_bytes())
        train.parse_options(["--resume", str(path.parent)])

    options = vars(train.parse_options(["--cache", str(home)])) | {"processes": 1, "inputs": {}}
    pictures = {}
    for ending in ("jpeg", "png", "webp", "bmp", "gif", "tiff"):
        with Image.open(people.files[0]) as image:
            form = ending.upper()
            pictures[ending] = saved(lambda f, image=image, form=form: image.save(f, form))
    arrays = {}
    try:
        from scipy.io import savemat
        joints = {"joints": np.ones((3, 14, 4))}
        for name, packed in (("mat", False), ("mat, compressed", True)):
            arrays[name] = saved(lambda f, packed=packed: savemat(f, joints, do_compression=packed))
    except ImportError:
        print("no SciPy: no MATLAB files")
    (lists := home / "cached_data/real_animal/horse").mkdir(parents=True)
    numbers = saved(lambda f: np.save(f, np.arange(9)))

    def npy(path):
        shutil.copy(path, lists / "train_idxs_by_video.npy")
        convert.tigdog_rows(home / "x", "horse", "train", 9)

    def tokens(path):
        text = path.read_bytes().decode("utf-8",
                                        errors="surrogatepass" if len(path.name) % 2 else "replace")
        tokenizer = CLIPTokenizer()
        ids = tokenizer.encode(text[:200])
        tokenizer.decode([i + 1 for i in ids])
        tokenizer([text[:60]])

    sentence = "a photo of a ukiyo-e 浮世絵 character, don't 𝒲 <|endoftext|>\t".encode()
    return {
        "annotations": ("a.json", lambda c: broken_json(coco, c),
                        lambda p: load_dataset(f"coco:{p}", "all")),
        "truth of an evaluation": ("t.json", lambda c: broken_json(coco, c),
                                   lambda p: evaluate_oks(p, home / "results.json")),
        "results": ("r.json", lambda c: broken_json(results, c),
                    lambda p: evaluate_oks(home / "truth.json", p)),
        "boxes": ("b.json", lambda c: broken_json(boxes, c),
                  lambda p: read_boxes(p, {n: n for n in range(9)})),
        "safetensors": ("s.safetensors", safetensors, load_weights),
        ".pth, our own": ("o.pth", lambda c: broken_zip(own, c), load_model),
        ".pth, others'": ("p.pth", lambda c: broken_zip(plain, c), load_weights),
        ".pth, before torch 1.6": ("l.pth", lambda c: broken_bytes(legacy, c), load_weights),
        ".pth, TorchScript": ("j.pt", lambda c: broken_zip(script, c), load_weights),
        "config in a model": ("c.pth", configured, load_model),
        "text": ("tokens.txt", lambda c: broken_bytes(sentence, c), tokens),
        "config.json": ("options.json", lambda c: broken_json(options, c), resume),
        ".npy": ("n.npy", lambda c: broken_bytes(numbers, c), npy),
        **{f"picture, {ending}": (f"x.{ending}",
                                  lambda c, content=content: broken_bytes(content, c), open_image)
           for ending, content in pictures.items()},
        **{f".{name}": ("joints.mat", lambda c, content=content: broken_bytes(content, c),
                        lambda p: convert.load_matlab(p, "joints", "'joints'"))
           for name, content in arrays.items()}}


# --------------------------------------------------------------------------------------- the trials

class TooLong(BaseException):
    pass


def too_long(*_):
    raise TooLong


def outcome(read, path):
    """"good", "clean", or what is wrong with how a file was read."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    signal.setitimer(signal.ITIMER_REAL, 12 * SECONDS)  # it may hang, or have to wait for others
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            read(path)
        found = "good"
    except (ValueError, OSError, MemoryError) as error:
        with redirect_stderr(io.StringIO()) as said:
            fail(error)
        line, = said.getvalue().splitlines()
        # what is not read from a file, or from a copy of it
        nameless = path.suffix == ".txt" or path.name == "n.npy"
        named = nameless or any(name in line
                                for name in (path.name, "config.json", "results.json",
                                             "truth.json"))
        found = "clean" if line.startswith("error: ") and named else f"nameless: {line}"
    except (Exception, TooLong, SystemExit) as error:
        found = f"{type(error).__name__}: {error!s:.300}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    taken = time.process_time() - start
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if taken > SECONDS:
        return f"{taken:.1f} s"
    return f"{grown / 1e9:.1f} GB" if grown > BYTES else found


def fuzz(args, home):
    signal.signal(signal.SIGALRM, too_long)
    kinds, total, bad = kinds_of(home), Counter(), 0
    print(f"{'kind':26}{'cases':>8}{'good':>8}{'clean':>8}{'found':>8}")
    for number, (kind, (name, breaking, read)) in enumerate(kinds.items()):
        counts, place = Counter(), home / f"kind-{number}"
        place.mkdir()
        for case in range(args.cases // len(kinds) + 1):
            path = place / name
            path.write_bytes(breaking(random.Random(f"{args.seed} {kind} {case}")))
            found = outcome(read, path)
            counts[found if found in ("good", "clean") else "found"] += 1
            if found not in ("good", "clean"):
                shutil.copy(path, args.out / f"{number}-{case}-{name}")
                print(f"{kind}, case {case}: {found}")
        total += counts
        bad += counts["found"]
        print(f"{kind:26}{counts.total():8}{counts['good']:8}{counts['clean']:8}"
              f"{counts['found']:8}", flush=True)
    print(f"{'all':26}{total.total():8}{total['good']:8}{total['clean']:8}{total['found']:8}")
    return bad


def flip(args, home):
    save_checkpoint(home / "model.pth", PoseModel(VIT_CONFIGS["tiny"]))
    whole = (home / "model.pth").read_bytes()
    before = load_model(home / "model.pth").state_dict()
    counts = Counter()
    for case in range(args.cases):
        content = bytearray(whole)
        place = random.Random(f"{args.seed} {case}").randrange(8 * len(whole))
        content[place // 8] ^= 1 << place % 8
        (home / "model.pth").write_bytes(content)
        try:
            after = load_model(home / "model.pth").state_dict()
            same = all(torch.equal(tensor, before[name]) for name, tensor in after.items())
            counts["loaded, the same weights" if same else "LOADED, OTHER WEIGHTS"] += 1
        except DataError:
            counts["noticed"] += 1
    print(dict(counts))
    return counts["LOADED, OTHER WEIGHTS"]


DRIVER = f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import train
train.CHECKPOINT_EVERY, train.LOG_EVERY = 3, 3
sys.exit(train.main())
"""
RUNS = {"vlpose": "--mode vlpose --base-steps 40 --steps 40 --batch-size 4",
        "uda": "--mode uda --style-steps 20 --supervised-steps 20 --steps 30 --batch-size 4 "
        "--oracle"}


def started(home, processes, arguments):
    several = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0",
               "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"] if processes > 1 else []
    return subprocess.Popen([sys.executable, *several, str(home / "driver.py"), *arguments],
                            start_new_session=True, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def family(process):
    """The processes that a process has started, and those that they have."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True,
                           text=True).stdout.split()
    return [other for child in map(int, found) for other in (child, *family(child))]


def kill_family(process):
    """Kills a process with all below it: those of torchrun have their own groups."""
    for other in [*family(process.pid), process.pid]:
        os.kill(other, signal.SIGKILL)


def cache_of(home, name):
    """A cache of its own with the figures of `home`, and no trained model."""
    cache = home / f"{name}-cache"
    cache.mkdir(exist_ok=True)
    if not (cache / train.FIGURES).exists():
        (cache / train.FIGURES).symlink_to(home / "cache" / train.FIGURES)
    return cache


def kill(args, home):
    """Runs that are killed once or twice at random moments.

    `same` counts the runs that end as if nothing had happened.
    """
    (home / "driver.py").write_text(DRIVER, "utf-8")
    draw_figures(home / "cache", {"train": (12, 4), "val": (4, 2)})
    bad = 0
    for mode, words in RUNS.items():
        def options(name):
            cache = cache_of(home, f"{mode}-{name}")
            return [*words.split(), "--device", "cpu", "--cache", str(cache), "--out",
                    str(home / f"{mode}-{name}")]
        start = time.monotonic()
        whole = started(home, args.processes, options("whole"))
        _, said = whole.communicate()
        assert whole.returncode == 0, said
        length, counts = time.monotonic() - start, Counter()
        for trial in range(args.trials):
            chance, arguments = random.Random(f"{args.seed} {mode} {trial}"), options(trial)
            folder = home / f"{mode}-{trial}"
            for _ in range(chance.choice((1, 2))):
                killed = started(home, args.processes, arguments)
                try:
                    killed.wait(chance.uniform(0.2, 1) * length)
                    counts["finished before"] += 1
                except subprocess.TimeoutExpired:
                    kill_family(killed)
                    counts["killed"] += 1
                killed.communicate()
                arguments = ["--resume",
                             str(folder)] if (folder / "config.json").exists() else options(trial)
            resumed = started(home, args.processes, arguments)
            _, said = resumed.communicate()
            same = resumed.returncode == 0 and (folder / "results.json").read_text("utf-8") == (
                home / f"{mode}-whole" / "results.json").read_text("utf-8")
            counts["same" if same else "OTHER"] += 1
            left = [str(path) for path in folder.rglob("*.draft")] if folder.exists() else []
            if not same:
                print(f"{mode}, trial {trial}: status {resumed.returncode}: {said[-1000:]}")
                shutil.copytree(folder, args.out / folder.name, dirs_exist_ok=True)
            counts["drafts left"] += len(left)
            shutil.rmtree(folder)
        bad += counts["OTHER"]
        print(f"{mode}, {args.processes} processes, {length:.0f} s a run: {dict(counts)}",
              flush=True)
    return bad


SHORT = ["--base-steps", "4", "--steps", "4", "--batch-size", "4", "--image-size", "64", "64",
         "--device", "cpu"]
MINUTE = 60  # seconds
STOPPED = f"""import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import data, train
data.SILENCE = 5
train.Passes.__getitem__ = lambda self, position: os.kill(os.getpid(), signal.SIGSTOP)
if __name__ == "__main__":
    sys.exit(train.main())
"""


def ended(words, seconds=MINUTE):
    """A program with its options -> (status, None where it hangs; what it said, seconds)."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *map(str, words)], start_new_session=True,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        said, _ = process.communicate(timeout=seconds)
        status = process.returncode
    except subprocess.TimeoutExpired:
        kill_family(process)
        said, _ = process.communicate()
        status = None
    return status, said, time.monotonic() - start


def verdict_on(status, said, name):
    """"right", or in capitals what is wrong with how a program has ended.

    It must end with one line that has this name; without a name it must go on.
    """
    if status is None:
        return "HANGS"
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if name is None:
        return "right" if status == 0 else "ENDS"
    if status == 2 and len(errors) == 1 and name in errors[0] and "Traceback" not in said:
        return "right"
    return "OTHER"


def print_row(what, status, seconds, verdict, said):
    """Prints a row of a table, and what was said if the verdict is bad; gives 1 if so, or 0."""
    print(f"{what:34}{status!s:>8}{seconds:9.1f}  {verdict}", flush=True)
    if verdict.isupper():
        print(said[-1000:])
    return verdict.isupper()


def print_head():
    print(f"{'what':34}{'status':>8}{'seconds':>9}  verdict")


def short_run(home, name, program=ROOT / "train.py"):
    """The words of a run of a few steps in a cache of its own."""
    return [program, *SHORT, "--cache", cache_of(home, name), "--out", home / name]


def hang(args, home):
    """Each command must end, or go on without the pipe, within a minute."""
    prepare_pipes(home)
    results, model = home / "other" / "results.json", home / "other" / "model.pth"
    numbers, fifo = [ROOT / "eval.py", "--results"], home / "pipe.json"

    def poses(model, pictures, *more):
        return [ROOT / "eval.py", "--device", "cpu", "--checkpoint", model, "--images",
                home / pictures, "--prompt", "a person", "--out", tempfile.mkdtemp(dir=home),
                *more]
    commands = {  # what: (what the error names, the words)
        "annotations": ("pipe.json", [*numbers, results, "--annotations", fifo]),
        "results": ("pipe.json", [*numbers, fifo, "--annotations", home / "truth.json"]),
        "boxes": ("pipe.json", poses(model, "circle/whole.jpg", "--boxes", fifo)),
        "config.json": ("config.json", [ROOT / "train.py", "--resume", home / "other"]),
        "checkpoint of a run": ("adapt.checkpoint.pth",
                                [ROOT / "train.py", "--resume", home / "run", "--steps", "6"]),
        "model": ("pipe.json", poses(fifo, "circle/whole.jpg")),
        "picture": ("found none that can be read", poses(model, "album/pipe.jpg")),
        "folder with a pipe": (None, poses(model, "album")),
        "links in circles": (None, poses(model, "circle/**/*.jpg")),
        "stopped process for crops": ("was it stopped", [
            *short_run(home, "stopped", home / "stopped.py"), "--workers", "1"])}
    print_head()
    bad = 0
    for what, (name, words) in commands.items():
        status, said, seconds = ended(words)
        bad += print_row(what, status, seconds, verdict_on(status, said, name), said)
    return bad


def prepare_pipes(home):
    """A run with a pipe for its checkpoint, another for its config.json, and pictures."""
    draw_figures(home / "cache", {"train": (12, 4), "val": (4, 2)})
    status, said, _ = ended(short_run(home, "run"))
    assert status == 0, said
    shutil.copytree(home / "run", home / "other")
    people = load_dataset(f"figures:{home / 'cache' / train.FIGURES}", "val")
    (home / "truth.json").write_text(json.dumps(to_coco(people)), "utf-8")
    for name in ("album", "circle"):
        (home / name).mkdir()
        shutil.copy(people.files[0], home / name / "whole.jpg")
    (home / "circle" / "up").symlink_to("..")
    (home / "circle" / "round").symlink_to("../circle")
    (home / "run" / "adapt.checkpoint.pth").unlink()
    (home / "other" / "config.json").unlink()
    for name in ("run/adapt.checkpoint.pth", "other/config.json", "album/pipe.jpg", "pipe.json"):
        os.mkfifo(home / name)
    (home / "stopped.py").write_text(STOPPED, "utf-8")


def pipe(args, home):
    """Trainings whose output cannot be written must end with status 0 and the same results."""
    draw_figures(home / "cache", {"train": (12, 4), "val": (4, 2)})
    status, said, _ = ended(short_run(home, "undisturbed"))
    assert status == 0, said
    whole = (home / "undisturbed" / "results.json").read_bytes()
    endings = ["| head -1", "2>&1 | head -1", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1",
               ">&-", "2>&-", ">&- 2>&-"]
    print_head()
    bad = 0
    for number, ending in enumerate(endings):
        words = " ".join(map(str, [sys.executable, *short_run(home, f"run-{number}")]))
        start = time.monotonic()
        run = subprocess.run(["bash", "-c", f"set -o pipefail; {words} {ending}"], text=True,
                             capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        results = home / f"run-{number}" / "results.json"
        same = run.returncode == 0 and results.exists() and results.read_bytes() == whole
        bad += print_row(ending, run.returncode, time.monotonic() - start,
                         "same" if same else "OTHER", run.stdout + run.stderr)
    return bad


EDITS = {"layer": ("vlpose.py", "return self.head.block2(", "return 0.9 * self.head.block2("),
         "loss": ("train.py", "loss = ((predicted - heatmaps) ** 2", "loss = (2 * (predicted - "
                  "heatmaps) ** 2"),
         "heatmaps": ("data.py", "/ (2 * sigma ** 2)) * near", "/ (3 * sigma ** 2)) * near")}


def code(args, home):
    """After an edit, nothing that other code has learned may be taken without a word."""
    draw_figures(home / "cache", {"train": (12, 4), "val": (4, 2)})
    (home / "program").mkdir()
    for name in train.MODULES:
        shutil.copy(ROOT / name, home / "program")
    (home / "program" / "assets").symlink_to(ROOT / "assets")
    status, said, _ = ended(short_run(home, "first", home / "program" / "train.py"))
    assert status == 0, said
    print_head()
    bad = 0
    for edit, (module, old, new) in EDITS.items():
        folder = home / edit
        for name in ("program", "cache", "first-cache", "first"):
            shutil.copytree(home / name, folder / name, symlinks=True)
        source = (folder / "program" / module).read_text("utf-8")
        assert source.count(old) == 1, f"{module}: expected one {old!r}"
        (folder / "program" / module).write_text(source.replace(old, new), "utf-8")
        program, changed = folder / "program" / "train.py", f"{module} has changed since"
        cache = ["--cache", folder / "first-cache"]
        resume = [program, "--resume", folder / "first", *cache, "--steps", "6"]
        for what, words, expected, message in (
                ("--resume --strict", [*resume, "--strict"], 2, "; without --strict"),
                ("--resume", resume, 0, " the last checkpoint: other numbers"),
                ("cache", [program, *SHORT, *cache, "--out", folder / "new"], 0,
                 ": training anew")):
            status, said, seconds = ended(words)
            right = status == expected and changed in said and message in said
            bad += print_row(f"{edit}, {what}", status, seconds, "said" if right else "OTHER", said)
        logs = [(parent / "log.csv").read_text("utf-8") for parent in (home / "first",
                                                                       folder / "new")]
        if logs[0] == logs[1]:
            print(f"{edit}: THE EDIT HAS NOT CHANGED THE LOG")
            bad += 1
    return bad


TRIALS = {"fuzz": fuzz, "flip": flip, "kill": kill, "hang": hang, "pipe": pipe, "code": code}
CASES = {"fuzz": 10_000, "flip": 150}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=("all", *TRIALS), nargs="?", default="all")
    parser.add_argument("--cases", type=int, help=f"by default {CASES}")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path,
                        default=Path(tempfile.gettempdir()) / "posebridge-faults")
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    bad, cases = 0, args.cases
    for name in TRIALS if args.trial == "all" else [args.trial]:
        print(f"--- {name}", flush=True)
        args.cases = cases or CASES.get(name)
        with tempfile.TemporaryDirectory() as home:
            bad += TRIALS[name](args, Path(home))
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
