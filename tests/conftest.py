"""What tests share: drawn figures, commands of short runs, and programs that start quickly."""
import math
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import lru_cache, partial
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

# Two threads take longer with small models, and round differently from processes of one thread.
torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "real"  # real samples: without them some tests skip
sys.path.insert(0, str(ROOT))


@pytest.fixture
def real():
    if not REAL.exists():
        pytest.skip("no real samples here")
    return REAL


@pytest.fixture(scope="session", autouse=True)
def cheap_runs():
    """All runs have a small model and small pictures, one tokenizer and one untrained text tower.

    The tokenizer and the tower never change, and few tests see a size; see `tiny`.
    """
    import eval
    import train
    import vlpose
    tower = lru_cache(partial(vlpose.load_clip_text, "random"))
    large = vlpose.VIT_CONFIGS["tiny"]
    small = replace(large, dim=32, depth=2, decoder_dim=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vlpose.VIT_CONFIGS, "tiny", small)
        patch.setitem(vlpose.MODEL_CONFIGS, "tiny", small)
        patch.setattr(vlpose, "CLIPTokenizer", lru_cache(vlpose.CLIPTokenizer))
        patch.setattr(eval, "CLIPTokenizer", vlpose.CLIPTokenizer)
        patch.setattr(train, "load_clip_text", lambda source: (
            tower() if source == "random" else vlpose.load_clip_text(source)))
        patch.setattr(train, "draw_sheet", partial(train.draw_sheet, side=48))
        yield large


@pytest.fixture
def tiny(cheap_runs, monkeypatch):
    """The model `tiny` is as large as users have it."""
    import vlpose
    monkeypatch.setitem(vlpose.VIT_CONFIGS, "tiny", cheap_runs)
    monkeypatch.setitem(vlpose.MODEL_CONFIGS, "tiny", cheap_runs)


@pytest.fixture(scope="module")
def cheap_weights():
    """New layers get weights that are random, too, but the same for all layers.

    Most models of some tests get other weights at once, and millions of random numbers take time.
    """
    numbers = 0.1 * torch.randn(2 ** 22, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def fill(tensor, *_, **__):
        size = tensor.numel()
        enough = numbers.expand(math.ceil(size / len(numbers)), -1).reshape(-1)
        return tensor.copy_(enough[:size].view_as(tensor))

    with pytest.MonkeyPatch.context() as patch:
        for name in ("kaiming_uniform_", "kaiming_normal_", "trunc_normal_", "normal_"):
            patch.setattr(torch.nn.init, name, fill)
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache folder with a few drawn figures."""
    from data import draw_figures  # here, because programs below begin without these modules
    folder = tmp_path_factory.mktemp("cache")
    draw_figures(folder, {"train": (6, 4), "val": (2, 1)})
    return folder


# ----------------------------------------------------------------------------- runs of a few steps

CROPS = ["--image-size", "32", "32"]  # a twelfth of the pixels of a tiny model's own crops


def command(cache, out, *more):
    """Options of a run of VLPose for a few steps, without those that `more` makes ineffective."""
    steps = [] if "scratch" in more else ["--steps", "6"]
    base = [] if "--weights" in more else ["--base-steps", "4"]
    return ["--cache", str(cache), "--out", str(out), *base, *steps, *CROPS,
            "--batch-size", "4", "--device", "cpu", *more]


def uda_command(cache, out, *more):
    """Likewise for multi-level alignment."""
    trained = not {"--style-weights", "none"} & {*more} and "--image-level 0" not in " ".join(more)
    style = ["--style-steps", "4"] if trained else []
    source = [] if "--weights" in more else ["--supervised-steps", "4"]
    return ["--mode", "uda", "--cache", str(cache), "--out", str(out), *style, *source, *CROPS,
            "--steps", "4", "--batch-size", "4", "--device", "cpu", *more]


# ------------------------------------------------------------------- programs that tests start
#
# A program needs seconds to import torch. So a server imports it once, and a fork of that server
# plays each program: a new process, which has imported torch, but no module of this project, and
# knows nothing of the tests. Python's multiprocessing has such a server. It imports while the first
# tests run, and ends with the tests.

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "torch.distributed.run", "torch.utils.data",
                               "torch.utils.checkpoint", "torch._dynamo", "ftfy", "PIL.Image"])


@pytest.fixture(scope="session", autouse=True)
def fork_server():
    forkserver.ensure_running()


def run_program(script, *argv, launch=None):
    """Plays `python SCRIPT ARGV`, and returns what subprocess.run would return.

    launch: options of torchrun, which is then played instead of `python`.
    """
    words = [str(script), *map(str, argv)]
    with tempfile.TemporaryDirectory() as folder:
        program, printed = start_program(folder, words, launch)
        program.join(timeout=300)
        if program.is_alive():
            program.kill()
            raise subprocess.TimeoutExpired(words, 300)
        stdout, stderr = (file.read_text("utf-8") for file in printed)
    return subprocess.CompletedProcess(words, program.exitcode, stdout, stderr)


def start_program(folder, words, launch=None):
    """Returns the process that plays `python WORDS`, and two files in a folder: what it prints."""
    printed = [Path(folder) / "stdout", Path(folder) / "stderr"]
    program = SERVER.Process(target=play, args=(words, launch, printed, dict(os.environ)))
    program.start()
    return program, printed


def play(words, launch, printed, environment):
    """What the fork of the server does: its output goes into the two files `printed`."""
    for file, number in zip(printed, (1, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    multiprocessing.set_start_method(None, force=True)  # Python's default, not this server
    if launch is None:
        run_script(words)
    else:
        run_in_each_process(words, launch)


def run_script(words):
    """Does what `python SCRIPT ...` does, with one thread."""
    torch.set_num_threads(1)  # the server has imported torch without this program's environment
    sys.argv = words
    others = [path for path in sys.path if path not in (str(ROOT), str(ROOT / "tests"))]
    sys.path = [str(Path(words[0]).resolve().parent), *others]
    runpy.run_path(words[0], run_name="__main__")


def run_in_each_process(words, launch):
    """Does what torchrun does with these options, but starts its processes by fork."""
    from torch.distributed.run import config_from_args, elastic_launch, parse_args
    config, _, _ = config_from_args(parse_args([*launch, *words]))
    config.start_method = "fork"
    elastic_launch(config, run_script)(words)
