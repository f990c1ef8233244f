import sys
from pathlib import Path

import pytest
import torch

# Two threads take longer with small models, and round differently from processes of one thread.
torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from data import draw_figures  # noqa: E402

REAL = ROOT.parent / "shared" / "real"  # real samples: without them some tests skip


@pytest.fixture
def real():
    if not REAL.exists():
        pytest.skip("no real samples here")
    return REAL


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache folder with a few drawn figures."""
    folder = tmp_path_factory.mktemp("cache")
    draw_figures(folder, {"train": (6, 4), "val": (3, 2)})
    return folder


def command(cache, out, *more):
    """Options of a run of VLPose for a few steps, without those that `more` makes ineffective."""
    steps = [] if "scratch" in more else ["--steps", "6"]
    base = [] if "--weights" in more else ["--base-steps", "4"]
    return ["--cache", str(cache), "--out", str(out), *base, *steps,
            "--batch-size", "4", "--device", "cpu", *more]


def uda_command(cache, out, *more):
    """Likewise for multi-level alignment."""
    trained = not {"--style-weights", "none"} & {*more} and "--image-level 0" not in " ".join(more)
    style = ["--style-steps", "4"] if trained else []
    source = [] if "--weights" in more else ["--supervised-steps", "4"]
    return ["--mode", "uda", "--cache", str(cache), "--out", str(out), *style, *source,
            "--steps", "4", "--batch-size", "4", "--device", "cpu", *more]
