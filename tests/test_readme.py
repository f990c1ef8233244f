"""The README is true: its code runs, its commands are accepted, its names exist, its lessons are as short as said."""
import re
import shlex

import pytest
import torch
from PIL import Image

import eval
import train
from conftest import ROOT
from vlpose import VIT_CONFIGS, PoseModel, VLPose, save_checkpoint

README = (ROOT / "README.md").read_text()
MODULES = ("clip_tokenizer", "vlpose", "data", "uda", "eval", "train")
CODE = re.findall(r"^```python\n(.*?)^```", README, flags=re.S | re.M)
COMMANDS = [shlex.split(line) for line in re.sub(
    "^    torchrun --nproc_per_node=8", "    python", re.sub(r" \\\n\s+", " ", README), flags=re.M).splitlines()
            if line.startswith("    python ")]


def lines_of(module):
    """(lesson, appendix): the lines before the first banner, and the others."""
    lines = (ROOT / f"{module}.py").read_text().splitlines()
    banner = next(n for n, line in enumerate(lines) if re.match(r"# =+ *Appendix", line))
    return banner, len(lines) - banner


@pytest.mark.parametrize("module", MODULES)
def test_lesson_and_appendix_have_as_many_lines_as_the_map_says(module):
    row = next(line for line in README.splitlines() if line.startswith(f"| [{module}.py]"))
    assert tuple(map(int, re.findall(r"\| (\d+) \|", row.replace("|", "||")))) == lines_of(module)


def test_the_lessons_fit_into_an_afternoon():
    lessons, appendices = zip(*map(lines_of, MODULES))
    assert sum(lessons) <= 1900 and sum(lessons) + sum(appendices) <= 5200
    assert len(README.splitlines()) <= 230


@pytest.mark.parametrize("code", CODE, ids=lambda code: code.splitlines()[0])
def test_the_code_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (tmp_path / "runs" / "vlpose-1").mkdir(parents=True)
    save_checkpoint(tmp_path / "runs" / "vlpose-1" / "model.pth", VLPose(PoseModel(VIT_CONFIGS["tiny"]), 128),
                    text_weights="random", sentences="a photo of a {domain} character", per_token=False)
    exec(code, {})
    if "pose.png" in code:
        with Image.open("pose.png") as image:
            assert image.size == (160, 160)


@pytest.mark.parametrize("command", COMMANDS, ids=shlex.join)
def test_the_commands_are_accepted(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script, *arguments = command[1:]
    arguments = arguments[:arguments.index("#")] if "#" in arguments else arguments
    if script == "train.py":
        assert train.parse_options(arguments).mode in train.MODES
    elif script == "eval.py":
        assert eval.main(arguments) == 2  # its files are not there; an unknown option would end the program
    else:
        assert arguments[0] == "pytest" or (ROOT / script).exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(rf"`((?:{'|'.join(MODULES)})\.\w[\w.]*)`", README))))
def test_the_names_of_the_map_exist(name):
    module, *path = name.split(".")
    if path == ["py"]:
        return
    thing = __import__(module)
    for part in path:
        thing = getattr(thing, part)


@pytest.mark.parametrize("page", ["README.md", "assets/README.md", "assets/evidence.md", "assets/protocol.md"])
def test_pictures_and_links_lead_to_files(page):
    targets = re.findall(r"\]\((?!http|#)([^)#]+)", (ROOT / page).read_text())
    assert all((ROOT / page).parent.joinpath(target).exists() for target in targets), targets


def test_every_option_of_the_readme_is_one_of_a_command(capsys):
    known = set()
    for argv in (["--mode", "vlpose", "--help"], ["--mode", "uda", "--help"]):
        with pytest.raises(SystemExit):
            train.parse_options(argv)
    with pytest.raises(SystemExit):
        eval.main(["--help"])
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    assert set(re.findall(r"`(--[a-z][a-z-]+)", README)) <= known
