"""Makes the pictures of assets/tour.md: python tests/tour.py, after both of its runs.

It runs the page's blocks of Python in order, in one namespace, and saves each block's `picture` as
the file that the page shows below the block. It also compares what a block prints with what the
page says that it prints: so if you change a block, the page's picture and numbers change with it.
"""
import contextlib
import io
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PAGE = ROOT / "assets" / "tour.md"
COLORS = 255  # of a picture, so that its file is small; chosen so that no pixel changes much
SEED = 1  # of each block
STEP = re.compile(
    r"^```python\n(?P<code>.*?)^```\n"
    r"(\n```text\n(?P<printed>.*?)^```\n)?"
    r'(\n<img src="(?P<file>[^"]*)" width="(?P<width>\d+)"\nalt="(?P<alt>[^"]*)">\n)?',
    flags=re.S | re.M)


@dataclass
class Step:
    """A block of the page: its code, what it prints, and its picture; "" and 0 without one."""
    code: str
    printed: str
    file: str  # of the picture, from the page's folder
    width: int  # of the picture, in pixels
    alt: str  # what it shows, in words


def steps_of(text):
    """The Steps of the page's text."""
    steps = []
    for found in STEP.finditer(text):
        step = Step(found["code"], found["printed"] or "", found["file"] or "",
                    int(found["width"] or 0), found["alt"] or "")
        steps.append(step)
    return steps


def run(step, names):
    """Runs a step in the namespace `names` -> what it prints, and its picture or None."""
    torch.manual_seed(SEED)
    names.pop("picture", None)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(step.code, names)
    return printed.getvalue(), names.get("picture")


def main():
    os.chdir(ROOT)  # where runs/ is
    text = PAGE.read_text("utf-8")
    for run_folder in sorted(set(re.findall(r"runs/[\w-]+", text))):
        if not Path(run_folder).exists():
            print(f"{run_folder}: not there; the page's first commands make it", file=sys.stderr)
            return 2
    names = {}
    different = 0
    for step in steps_of(text):
        printed, picture = run(step, names)
        if picture:
            small = picture.quantize(COLORS, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=0)
            small.save(PAGE.parent / step.file, optimize=True)
            print(f"{step.file}: {picture.width}×{picture.height}")
            if picture.width != step.width:
                print(f"the page says that it is {step.width} pixels wide")
                different += 1
        if printed != step.printed:
            print(f"the page says that this is printed:\n{step.printed}but it is:\n{printed}")
            different += 1
    return min(different, 1)


if __name__ == "__main__":
    sys.exit(main())
