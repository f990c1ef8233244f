"""The README and its pages are true: code runs, commands are accepted, names and files exist."""
import re
import shlex

import pytest
import torch
from PIL import Image

import data
import eval
import train
from conftest import ROOT, run_program
from uda import MultiLevelAlignment
from vlpose import VIT_CONFIGS, PoseModel, VLPose, save_checkpoint

README = (ROOT / "README.md").read_text("utf-8")
PAGES = {"README.md": README}
PAGES |= {f"assets/{page.name}": page.read_text("utf-8") for page in (ROOT / "assets").glob("*.md")}
MODULES = ("clip_tokenizer", "vlpose", "data", "uda", "eval", "train")
CODE = []
for page in ("README.md", "assets/try.md"):
    for block in re.findall(r"^```python\n(.*?)^```", PAGES[page], flags=re.S | re.M):
        CODE += re.split(r"\n\n(?=# Another )", block)  # each recipe must run by itself


def commands_of(text):
    """The indented commands of a page, as lists of words; those of torchrun as those of python."""
    text = re.sub(r" \\\n\s+", " ", text)  # a command in one line
    text = re.sub("^    torchrun --nproc_per_node=8", "    python", text, flags=re.M)
    lines = [line for line in text.splitlines() if line.startswith("    python ")]
    return [shlex.split(line, comments=True) for line in lines]


COMMANDS = [(page, command) for page, text in PAGES.items() for command in commands_of(text)]


@pytest.fixture
def run_code(tmp_path, monkeypatch):
    """Runs the README's code that has these words, in a folder with a run; returns its names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "READERS", dict(data.READERS))
    monkeypatch.setattr(train, "MODES", dict(train.MODES))
    monkeypatch.setattr(train, "MultiLevelAlignment", train.MultiLevelAlignment)
    monkeypatch.setattr(train, "restyling", train.restyling)
    torch.manual_seed(0)
    (tmp_path / "runs" / "vlpose-1").mkdir(parents=True)
    save_checkpoint(tmp_path / "runs" / "vlpose-1" / "model.pth",
                    VLPose(PoseModel(VIT_CONFIGS["tiny"]), 128), text_weights="random",
                    sentences="a photo of a {domain} character", per_token=False)

    def run(words):
        code, = [code for code in CODE if words in code]
        names = {"__name__": "__main__"}
        exec(code, names)
        return names
    return run


@pytest.mark.parametrize("code", CODE, ids=lambda code: code.splitlines()[0])
def test_the_code_runs(code, run_code):
    run_code(code)


def test_the_lines_of_python_draw_a_pose(run_code):
    poses = run_code("pose.png")["poses"]
    assert poses.keypoints.shape == (1, 17, 3)
    with Image.open("pose.png") as image:
        assert image.size == (160, 160)


IMAGES = 2, 3, 128, 96  # of a tiny model, whose heatmaps are 32×24


def alignment_step(alignment):
    """(losses, gradient of the loss) of a step on random images."""
    images = torch.rand(IMAGES)
    loss, heatmaps = alignment(images, torch.rand(2, 17, 32, 24), torch.ones(2, 17), images)
    loss.backward()
    assert heatmaps.shape == (2, 17, 32, 24)
    return alignment.losses, alignment.student.predictor.weight.grad


def test_the_recipe_of_another_decoder_gives_heatmaps_that_learn(run_code):
    model = run_code("ExtractorOnly")["model"]
    heatmaps = model(torch.rand(IMAGES), text=torch.rand(2, 1, 128))
    (heatmaps * torch.rand_like(heatmaps)).sum().backward()
    assert heatmaps.shape == (2, 17, 32, 24)
    assert model.auxiliary1[0].weight.grad.any() and model.matcher.text.weight.grad.any()
    assert model.base.head.block1[0].weight.grad is None


def test_the_recipe_of_another_loss_adds_it_to_the_others(run_code):
    alignment = run_code("Smooth")["Smooth"](PoseModel(VIT_CONFIGS["tiny"]))
    losses, gradient = alignment_step(alignment)
    assert list(losses) == ["supervised", "consistency", "feature_level", "pose_level", "smooth"]
    assert losses["smooth"] > 0 and gradient.isfinite().all()


def test_the_recipe_of_another_restyling_is_what_the_student_sees(run_code):
    restyle = run_code("same_colours")["same_colours"]
    source, target = torch.rand(IMAGES), 0.3 + 0.1 * torch.rand(IMAGES)
    restyled = restyle(source, target)
    torch.testing.assert_close(restyled.mean((2, 3)), target.mean((2, 3)), rtol=0.01, atol=0.01)
    alignment = MultiLevelAlignment(PoseModel(VIT_CONFIGS["tiny"]), restyle)
    assert alignment_step(alignment)[1].isfinite().all()


def test_the_recipe_of_another_data_format_can_be_named_in_a_command(run_code, tmp_path):
    (tmp_path / "album").mkdir()
    Image.new("RGB", (90, 60)).save(tmp_path / "album" / "one.png")
    run_code("read_mine")
    people = data.load_dataset(f"mine:{tmp_path / 'album'}", "all")
    assert people.boxes.tolist() == [[0, 0, 90, 60]]
    assert (people.keypoints == [20, 20, 2]).all() and len(people.annotated) == 1
    assert len(data.load_dataset(f"mine:{tmp_path / 'album'}", "val").files) == 1
    assert len(data.load_dataset(f"mine:{tmp_path / 'album'}", "train").files) == 0


def test_the_recipe_of_another_option_is_one_of_the_command(run_code):
    run_code("MyOptions")
    assert train.parse_options(["--mode", "uda"]).temperature == 0.02
    assert train.parse_options(["--mode", "uda", "--recipe", "paper"]).temperature == 1
    assert train.parse_options(["--mode", "uda", "--temperature", "0.1"]).temperature == 0.1
    with pytest.raises(data.DataError, match="--temperature: expected a number above 0, found 0"):
        train.parse_options(["--mode", "uda", "--temperature", "0"])


def test_the_lines_work_from_another_folder(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                      "from data import draw_figure\n")
    done = run_program(script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page, command", COMMANDS, ids=lambda part: str(part)[:90])
def test_the_commands_are_accepted(page, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, script, *arguments = command
    if script == "train.py" and "--resume" in arguments:
        assert train.main(arguments) == 2 and "config.json: not there" in capsys.readouterr().err
    elif script == "train.py":
        assert train.parse_options(arguments).mode in train.MODES
    elif script == "eval.py":
        assert eval.main(arguments) == 2  # its files are not there
        said = capsys.readouterr().err
        assert "unrecognized" not in said and "no effect" not in said
    else:
        assert script in ("-m", "-c") or (ROOT / script).exists()


NAMES = sorted({name for text in PAGES.values()
                for name in re.findall(rf"`((?:{'|'.join(MODULES)})\.\w[\w.]*)`", text)})


@pytest.mark.parametrize("name", NAMES)
def test_the_names_of_the_pages_exist(name):
    module, *path = name.split(".")
    if path == ["py"]:
        return
    thing = __import__(module)
    for part in path:
        thing = getattr(thing, part)


@pytest.mark.parametrize("page", PAGES)
def test_pictures_and_links_lead_to_files(page):
    targets = re.findall(r"\]\((?!http|#)([^)#]+)", PAGES[page])
    places = [(ROOT / page).parent / target.replace("\n", "") for target in targets]
    assert [place for place in places if not place.exists()] == []


def anchor_of(heading):
    """The anchor that a heading has on GitHub."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_into_a_page_lead_to_a_heading(page):
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", PAGES[page]):
        path = ((ROOT / page).parent / target if target else ROOT / page).resolve()
        text = PAGES[path.relative_to(ROOT.resolve()).as_posix()]
        headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
        assert anchor in [anchor_of(heading) for heading in headings], f"{target}#{anchor}"


def test_every_option_of_the_pages_is_one_of_a_command(capsys):
    for argv in (["--mode", "vlpose", "--help"], ["--mode", "uda", "--help"]):
        with pytest.raises(SystemExit):
            train.parse_options(argv)
    with pytest.raises(SystemExit):
        eval.main(["--help"])
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    for script in ("evidence", "faults", "benchmark"):
        source = (ROOT / "tests" / f"{script}.py").read_text("utf-8")
        known |= set(re.findall(r"--[a-z][a-z-]+", source))
    for page, text in PAGES.items():
        assert set(re.findall(r"`(--[a-z][a-z-]+)", text)) <= known, page
