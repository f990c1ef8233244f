"""The papers' animals: turns three data sets into COCO's format, which train.py reads.

    python tests/convert.py synthetic-animal /data/synthetic
        with clean_data/keypoints_18.json in it; or a file clean_data/keypoints_14.json
    python tests/convert.py tigdog /data/behaviorDiscovery2.0
        with UniFrame's cached_data/ in it or beside it: no video is in both splits
    python tests/convert.py animalpose /data/animalpose
        with keypoints.json or mmpose's two files, and images/
    python train.py --mode uda --source coco:/data/synthetic/synthetic-animal \\
        --target coco:/data/animalpose/animalpose

It also converts lsp, lsp-regda, surreal and human36m. train.py reads these by their names, but
slowly where there are very many images: here the size of each is written down once.

The command writes the annotations of both splits into a folder NAME in the data set's own, and
prints this folder, which train.py takes as coco:FOLDER. MATLAB files need SciPy. The keypoints are
those of ANIMAL18 or ANIMAL14; the domain of an image is its species.

Images hold one animal each; where several share an image, it is listed once for each of them. The
crops are those of CC-SSL and UniFrame: a box that is padded by 1.25, as PADDING does.
"""
import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import (ANIMAL14, ANIMAL18, BROKEN, COCO_FILES, READERS, DataError,  # noqa: E402
                  annotation_file, check_people, expecting, load_dataset, load_matlab,
                  make_skeleton, picture_size, read_json, select_images, single_person_dataset,
                  to_coco, with_skeleton, write_json)
from eval import fail  # noqa: E402


def with_corners(dataset, corners):
    """The data set with other boxes, clipped to the images.

    corners: (images, 4) left, top, right, bottom.
    """
    sizes = np.array([picture_size(file, upright=False) for file in dataset.files])
    left_top = np.maximum(corners[:, :2], 0)
    extent = np.minimum(corners[:, 2:], sizes) - left_top
    boxes = np.hstack([left_top, extent])
    dataset = replace(dataset, boxes=boxes, areas=extent.prod(1))
    check_people(dataset.name, dataset)
    return dataset


def read_synthetic_animal(root, split):
    """SyntheticAnimal with cleaned annotations.

    Those of horses and tigers are UDA-Animal-Pose's, those of dogs and sheep are UniFrame's.
    """
    path = root / "clean_data" / "keypoints_18.json" if root.is_dir() else root
    names = []
    domains = []
    keypoints = []
    corners = []
    with expecting(path, "SyntheticAnimal's clean_data/keypoints_18.json"):
        for animal, records in json.loads(path.read_bytes()).items():
            train = records["train_idxs"]
            val = records["valid_idxs"]
            rows = {"train": train, "val": val, "all": train + val}[split]
            names += [str(records["imgpath"][row]) for row in rows]
            domains += ["dog" if animal == "hound" else animal] * len(rows)
            keypoints.append(np.array(records["keypoints"], np.float32)[rows])
            boxes = np.array(records["bbox"], float)[rows]  # left, right, top, bottom
            corners.append(boxes[:, [0, 2, 1, 3]])
        keypoints = np.concatenate(keypoints)
        keypoints[:, :, 2] = 1 + (keypoints[:, :, 2] > 0)  # a hidden joint is known all the same
        skeleton = {18: ANIMAL18, 14: ANIMAL14}[keypoints.shape[1]]
    dataset = single_person_dataset(path, skeleton, path.parent, names, domains, keypoints)
    return with_corners(dataset, np.concatenate(corners))


TIGER_JOINTS = [*range(8), 14, 15, 16, 17, 12, 13, 8, 9, 10, 11]  # ANIMAL18 in the files of tigers


def read_tigdog(root, split):
    """TigDog's horses and tigers, split by video as in CC-SSL.

    The boxes are CC-SSL's, too: there are none but those around the joints.
    """
    home = root / "behaviorDiscovery2.0"
    if not home.is_dir():
        home = root
    names = []
    domains = []
    keypoints = []
    for animal, joints in (("horse", range(18)), ("tiger", TIGER_JOINTS)):
        frames, points = read_shots(home, animal)
        rows = range(len(frames))
        if split != "all":
            rows = tigdog_rows(home, animal, split, len(frames))
        names += [frames[row] for row in rows]
        domains += [animal] * len(rows)
        keypoints += [points[row][joints] for row in rows]
    keypoints = np.array(keypoints, np.float32).reshape(-1, 18, 3)
    known = keypoints[:, :, :2] > 0
    low = np.where(known, keypoints[:, :, :2], np.inf).min(1) - 15  # pixels
    high = np.where(known, keypoints[:, :, :2], -np.inf).max(1) + 15
    has_joints = (low < high).all(1, keepdims=True)
    corners = np.where(has_joints, np.hstack([low, high]), 0)  # otherwise the box is empty
    visible = (keypoints[:, :, 2] > 0) & known.all(2)
    keypoints[:, :, 2] = np.where(visible, 2, 0)
    dataset = single_person_dataset(home, ANIMAL18, home, names, domains, keypoints)
    return with_corners(dataset, corners)


def read_shots(home, animal):
    """File names and joints (18, 3) of all labelled frames of an animal."""
    path = home / "ranges" / animal / "ranges.mat"
    ranges = load_matlab(path, "ranges", "TigDog's shots")
    if ranges.ndim != 2 or ranges.shape[1] != 3 or ranges.dtype.kind not in "uif":
        found = f"{ranges.dtype} {ranges.shape}"
        raise DataError(f"{path}: expected 'ranges' (shots, 3), found {found}")
    frames = []
    points = []
    for shot, first, last in ranges.astype(int).tolist():
        path = home / "landmarks" / animal / f"{shot}.mat"
        if path.is_file():  # some shots have no labels
            frames += [f"{animal}/{frame:08d}.jpg" for frame in range(first, last + 1)]
            points += read_landmarks(path, last + 1 - first)
    return frames, points


def read_landmarks(path, frames):
    """(18, 3) x, y, visible for each frame of a shot."""
    cells = load_matlab(path, "landmarks", "TigDog's landmarks")
    landmarks = []
    with expecting(path, f"'landmarks' of {frames} frames"):
        for frame in range(frames):
            structure = list(cells[frame, 0][0, 0])  # positions (joints, 2), visible (joints, 1)
            landmarks.append(np.hstack(structure[:2])[:18].reshape(18, 3))
    return landmarks


def tigdog_rows(home, animal, split, frames):
    """The numbers of a split's frames, from UniFrame's `cached_data` or from CC-SSL's `data`."""
    part = "train" if split == "train" else "valid"
    name = f"real_animal/{animal}/{part}_idxs_by_video.npy"
    found = []
    for folder in home.resolve().parents[:2]:
        found += folder.glob(f"*data/{name}")
    if not found:
        raise DataError(f"{home.parent}: expected UniFrame's cached_data/{name} "
                        f"in it or beside it for split {split!r}")
    with expecting(found[0], f"numbers of labelled frames, below {frames}"):
        rows = np.load(found[0], allow_pickle=False)
        if rows.ndim != 1 or rows.dtype.kind not in "ui" or rows.min() < 0 or rows.max() >= frames:
            raise ValueError(f"found {rows.dtype} {rows.shape}")
        return rows.tolist()


ANIMALPOSE_FILES = {"train": "animalpose_train.json", "val": "animalpose_val.json"}  # mmpose's
# In names of images such as do12.jpeg
SPECIES = {"ca": "cat", "co": "cow", "do": "dog", "ho": "horse", "sh": "sheep"}


def read_animalpose(root, split):
    """AnimalPose, from its authors' keypoints.json or from mmpose's files in COCO's format.

    UniFrame divides the animals at random, so that pictures are in both of its splits; here every
    fifth picture is held out. mmpose has lost the species in PASCAL VOC's pictures: their domain is
    "animal".
    """
    path, own = annotation_file(root, ANIMALPOSE_FILES, split)
    content = read_json(path, dict, "AnimalPose's annotations")
    names = []
    domains = []
    keypoints = []
    corners = []
    try:
        joints = tuple(content["categories"][0]["keypoints"])
        species = {category["id"]: category["name"] for category in content["categories"]}
        files = content["images"]
        coco = isinstance(files, list)
        if coco:
            files = {str(image["id"]): image["file_name"] for image in files}
        for record in content["annotations"]:
            names.append(str(files[str(record["image_id"])]))
            domains.append(species_of(names[-1], species[record["category_id"]]))
            keypoints.append(np.array(record["keypoints"], np.float32).reshape(len(joints), 3))
            x, y, right, bottom = record["bbox"]
            if coco:  # width and height
                right += x
                bottom += y
            corners.append((x, y, right, bottom))
        keypoints = np.array(keypoints)
        keypoints[:, :, 2] = np.where(keypoints[:, :, 2] > 0, 2, 0)
        corners = np.array(corners, float)
    except BROKEN as error:
        why = f"{type(error).__name__} {error}"
        raise DataError(f"{path}: annotation {len(names)}: not AnimalPose's: {why}") from None
    skeleton = make_skeleton(joints, ())
    dataset = single_person_dataset(path, skeleton, path.parent, names, domains, keypoints)
    dataset = with_corners(dataset, corners)
    dataset = with_skeleton(dataset, ANIMAL14)
    if own:
        return dataset
    if split == "all":
        return dataset
    _, numbers = np.unique(names, return_inverse=True)  # of the pictures
    held_out = numbers % 5 == 0
    return select_images(dataset, held_out if split == "val" else ~held_out)


def species_of(name, otherwise):
    """The species that the name of an image tells, or the other one."""
    stem = PurePosixPath(name).stem
    if stem[2:].isdigit():
        return SPECIES.get(stem[:2], otherwise)
    return otherwise


READERS.update({"synthetic-animal": read_synthetic_animal, "tigdog": read_tigdog,
                "animalpose": read_animalpose})
PEOPLE = ("lsp", "lsp-regda", "surreal", "human36m")  # also read by name; as JSON they open faster
ANIMALS = ("synthetic-animal", "tigdog", "animalpose")


def convert(name, root):
    """Writes the annotations of both splits; returns the folder that `coco:` wants."""
    home = Path(os.path.abspath(root))
    if not home.is_dir():  # a file of synthetic animals
        home = home.parents[1] if home.parent.name == "clean_data" else home.parent
    for split in ("train", "val"):
        dataset = load_dataset(f"{name}:{root}", split)
        content = to_coco(dataset, "person" if name in PEOPLE else "animal")
        for image, file in zip(content["images"], dataset.files):
            image["file_name"] = Path(os.path.abspath(file)).relative_to(home).as_posix()
        write_json(home / name / COCO_FILES[split], content)
    return home / name


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=ANIMALS + PEOPLE)
    parser.add_argument("root", help="the data set's folder, as its authors distribute it")
    args = parser.parse_args(argv)
    try:
        print(convert(args.name, args.root))
    except (ValueError, OSError) as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
