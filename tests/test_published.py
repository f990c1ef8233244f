"""The command for published numbers, on figures in place of COCO and Human-Art, with made weights.

The real data sets and weights are too large for a test.
"""
import json
import shutil

import published
import pytest
import torch
from data import FIGURES, draw_figures
from vlpose import PUBLIC_FILES, PoseModel, PublicFile, ViTConfig

SMALL = ViTConfig(384, 1, 12, 0.0, 3, 0.8, image_size=(64, 48))  # ViTPose-S with one layer


@pytest.fixture
def roots(tmp_path, monkeypatch):
    """COCO's and Human-Art's folders, with a detector's boxes, and vitpose-s in the cache."""
    monkeypatch.setenv("POSEBRIDGE_HOME", str(tmp_path))
    draw_figures(tmp_path, {"train": (1, 1), "val": (3, 1)})
    names = {"coco": ("person_keypoints_train2017.json", "person_keypoints_val2017.json"),
             "humanart": ("training_humanart.json", "validation_humanart.json")}
    for data, (train, val) in names.items():
        folder = shutil.copytree(tmp_path / FIGURES, tmp_path / data) / "annotations"
        (folder / "training_figures.json").rename(folder / train)
        (folder / "validation_figures.json").rename(folder / val)
        people = json.loads((folder / val).read_text("utf-8"))["annotations"]
        boxes = [{"image_id": person["image_id"], "category_id": 1, "bbox": person["bbox"],
                  "score": 0.9} for person in people]
        (folder / published.BOXES[data]).write_text(json.dumps(boxes))
    torch.manual_seed(0)
    (tmp_path / "weights").mkdir()
    torch.save(PoseModel(SMALL).state_dict(), tmp_path / "weights" / "vitpose-s.pth")
    file = PUBLIC_FILES["vitpose-s"]
    monkeypatch.setitem(PUBLIC_FILES, "vitpose-s", PublicFile(file.address, "", "COCO17"))
    return [f"--coco={tmp_path}/coco", f"--humanart={tmp_path}/humanart", f"--out={tmp_path}/out"]


def test_each_number_is_measured_once_and_held_against_the_published_one(
        roots, tmp_path, monkeypatch, capsys):
    table = published.read_table()
    monkeypatch.setattr(published, "read_table", lambda: [
        row | {"AP": "0.001" if row["boxes"] == "detected" else row["AP"]} for row in table])
    assert published.main([*roots, "--models", "vitpose-s"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[:-1]] == [
        ["vitpose-s", "coco", "detected"], ["vitpose-s", "humanart", "detected"],
        ["vitpose-s", "humanart", "true"]]
    assert [line.split()[-1] for line in lines[:-1]] == ["agrees", "agrees", "DIFFERS"]
    assert lines[-1] == "2 of 3 numbers agree within 0.002"
    kept = tmp_path / "out" / "vitpose-s-humanart-true.json"
    assert set(json.loads(kept.read_text("utf-8"))) >= {"AP", "AP .5", "AR", "domains"}

    kept.write_text('{"AP": 0.5069}')  # it is not measured again
    monkeypatch.setattr(published.eval, "main", lambda words: pytest.fail("measured again"))
    assert published.main([*roots, "--models", "vitpose-s"]) == 0
    assert "published 0.507  here 0.507  agrees" in capsys.readouterr().out
    for found, word in ((0.509, "agrees"), (0.5094, "DIFFERS"), (0.505, "agrees")):
        kept.write_text(json.dumps({"AP": found}))
        published.main([*roots, "--models", "vitpose-s"])
        assert f"published 0.507  here {found:.3f}  {word}" in capsys.readouterr().out


def test_a_dry_run_prints_the_commands_and_measures_nothing(roots, monkeypatch, capsys):
    monkeypatch.setattr(published.eval, "main", lambda words: pytest.fail("measured"))
    assert published.main([*roots, "--models", "vitpose-s", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("python eval.py --checkpoint vitpose-s --data ") for line in lines)
    assert lines[0].split(" --boxes ")[1].split(" ")[0].endswith(published.BOXES["coco"])
    assert lines[-1].endswith("--json  # published 0.507") and "--boxes" not in lines[-1]


@pytest.mark.parametrize("words, said", [
    ([], "expected --coco or --humanart"),
    (["--coco", "{root}", "--models", "vitpose-x"], "in --models names of published.csv"),
    (["--coco", "{root}"], "expected COCO_val2017_detections_AP_H_56_person.json")])
def test_what_is_missing_is_said(words, said, tmp_path, capsys):
    with pytest.raises(SystemExit):
        published.main([word.format(root=tmp_path) for word in words])
    assert said in capsys.readouterr().err


def test_the_table_names_public_models_and_has_the_protocols_sixteen_numbers():
    table = published.read_table()
    assert {row["model"] for row in table} <= PUBLIC_FILES.keys()
    assert len({(row["model"], row["data"], row["boxes"]) for row in table}) == len(table)
    page = (published.HERE.parent / "assets" / "protocol.md").read_text("utf-8")
    humanart = [row["AP"] for row in table if row["data"] == "humanart"]
    assert len(humanart) == 16 and all(f"| {number} " in page for number in humanart)
