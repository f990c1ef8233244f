"""The papers' other data sets: turns them into COCO's format, which train.py reads.

    python tests/convert.py lsp /data/LSP                          joints.mat and images/: half of them in each split
    python tests/convert.py lsp-regda /data/LSP                    all in both, without hidden joints, as in the papers
    python tests/convert.py surreal /data/SURREAL                  what RegDA distributes, with its train/ and val/
    python tests/convert.py human36m /data/Human36M                what RegDA prepares: subjects 1, 5 to 8; of 9 and 11
                                                                   3200 frames
    python tests/convert.py synthetic-animal /data/synthetic       clean_data/keypoints_18.json or _14.json
    python tests/convert.py tigdog /data/behaviorDiscovery2.0      and cached_data/: no video is in both splits
    python tests/convert.py animalpose /data/animalpose            keypoints.json, or mmpose's two files, and images/
    python train.py --mode uda --source coco:/data/SURREAL/surreal --target coco:/data/LSP/lsp-regda

It writes the annotations of both splits into a folder NAME in the data set's own, which train.py takes as coco:FOLDER,
and prints that folder. MATLAB files need SciPy. The keypoints are BODY16's of people, ANIMAL18's or ANIMAL14's of
animals; the domain of an image is "photo", "render" or its species.

Images hold one person or animal each; where several share an image, it is listed once for each of them. The crops are
those of RegDA, CC-SSL and UniFrame: the whole image, or a box that is padded by 1.25, as PADDING does.
"""
import argparse
import json
import math
import os
import random
import sys
from pathlib import Path, PurePosixPath

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import (ANIMAL14, ANIMAL18, ANNOTATION_FILES, BODY16, BROKEN, PADDING, READERS, TEXT, DataError,  # noqa: E402
                  PoseDataset, annotation_file, check_people, expecting, hold_out, image_file, load_dataset,
                  locate_images, make_skeleton, read_columns, read_json, to_coco, with_skeleton, write_json)
from eval import fail  # noqa: E402

def one_each(spec, path, skeleton, home, names, domains, keypoints, corners=None):
    """Images with one person each: keypoints (people, K, 3), corners (people, 4) left, top, right, bottom. Without
    corners the crop is the whole image, padded to a square. Joints outside the image are not labelled."""
    if not len(names):
        raise DataError(f"{path}: expected images, found none")
    files = locate_images(path, names, home)
    sizes = np.zeros((len(files), 2), int)  # height, width
    for size, file in zip(sizes, files):
        with image_file(file) as image:  # which reads no pixels
            size[:] = image.height, image.width
    limits, keypoints = sizes[:, ::-1], np.array(keypoints, np.float32)  # of x and y
    outside = ((keypoints[:, :, :2] < 0) | (keypoints[:, :, :2] > limits[:, None] - 1)).any(2)
    keypoints[outside | (keypoints[:, :, 2] == 0)] = 0
    if corners is None:
        extent = np.tile((sizes.max(1, keepdims=True) - 1) / PADDING, 2)
        low = (limits - 1 - extent) / 2
    else:
        low = np.maximum(corners[:, :2], 0)
        extent = np.minimum(corners[:, 2:], limits) - low
    numbers = np.arange(len(files))
    dataset = PoseDataset(
        name=spec, skeleton=skeleton, files=files, image_ids=numbers + 1, domains=np.array(domains), ids=numbers + 1,
        image_index=numbers, keypoints=keypoints, boxes=np.hstack([low, extent]), areas=extent.prod(1),
        crowd=np.zeros(len(files), bool))
    check_people(path, dataset)
    return dataset


LARGEST = 10 ** 7  # numbers in an array


def load_matlab(path, variable, what):
    """An array from a MATLAB file."""
    try:
        from scipy.io import loadmat, whosmat
    except ImportError:
        raise DataError(f"{path}: MATLAB files need SciPy: pip install scipy") from None
    with expecting(path, f"{what} in a MATLAB file"), open(path, "rb") as file:
        for name, shape, _ in whosmat(file):
            if math.prod(shape) > LARGEST:  # a megabyte may unpack to gigabytes
                raise DataError(f"{path}: expected {what}, found {name} of {'×'.join(map(str, shape))} numbers")
        file.seek(0)
        return loadmat(file, variable_names=[variable])[variable]


LSP_JOINTS = [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15, 8, 9]  # in BODY16


def read_lsp(spec, root, split):
    """LSP. RegDA adapts to and tests on all 2000 images, without their hidden joints: `lsp-regda`. Here, as `lsp`, the
    test images are held out, and hidden joints count."""
    path, what = root / "joints.mat" if root.is_dir() else root, "'joints' (3, 14, 2000)"
    joints = load_matlab(path, "joints", what)
    if joints.ndim != 3 or joints.shape[:2] != (3, 14) or joints.dtype.kind not in "uif":
        raise DataError(f"{path}: expected {what}, found {joints.dtype} {joints.shape}")
    regda, images = spec.startswith("lsp-regda"), joints.shape[2]
    first, last = images // 2 * (split == "val" and not regda), images // (2 if split == "train" and not regda else 1)
    rows = range(first, last)
    x, y, hidden = joints.transpose(0, 2, 1)[:, rows].astype(np.float32)  # (people, 14) each
    visible = 2 - (2 if regda else 1) * hidden
    keypoints = np.zeros((len(rows), 16, 3))
    keypoints[:, LSP_JOINTS] = np.stack([x, y, visible], 2)
    names = [f"images/im{row + 1:04}.jpg" for row in rows]
    # The whole image is the crop, as in RegDA: a box around the joints would give the target's labels away.
    return one_each(spec, path, BODY16, path.parent, names, ["photo"] * len(rows), keypoints)


# BODY16 in SURREAL, as RegDA takes it: its shoulders are SMPL's collars.
SMPL_JOINTS = [7, 4, 1, 2, 5, 8, 0, 9, 12, 15, 20, 18, 13, 14, 19, 21]
CROPPED = {  # data set -> split -> annotations and image folder of each part
    "surreal": {split: [(f"{split}/run{run}.json", f"{split}/run{run}") for run in range(3)]
                for split in ("train", "val")},
    "human36m": {split: [(f"annotations/keypoints2d_{subject}.json", "crop_images") for subject in subjects]
                 for split, subjects in (("train", (1, 5, 6, 7, 8)), ("val", (9, 11)))}}


def read_cropped(spec, root, split):
    """SURREAL and Human3.6M as RegDA prepares them: images are cut out at 1.5 times the box of the joints."""
    data = spec.partition(":")[0]
    joints, total = (SMPL_JOINTS, 24) if data == "surreal" else (range(16), 16)
    kinds = {"name": TEXT, "keypoint2d": ((total, 2), np.float32)}
    parts, names, points = CROPPED[data], [], []
    for annotations, folder in parts["train"] + parts["val"] if split == "all" else parts[split]:
        path = root / annotations
        table = read_columns(read_json(path, list, f"{data} as RegDA prepares it"), kinds, f"{path}: record")
        names += [f"{folder}/{name}" for name in table["name"]]
        points.append(table["keypoint2d"][:, joints])
    rows, chance = list(range(len(names))), random.Random(42)  # what RegDA leaves out of training, and tests on
    if (data, split) == ("surreal", "train"):
        chance.shuffle(rows)
        rows = rows[min(len(rows) // 5, 3200):]
    elif (data, split) == ("human36m", "val") and len(rows) > 3200:
        rows = chance.choices(rows, k=3200)
    keypoints = np.pad(np.concatenate(points)[rows], ((0, 0), (0, 0), (0, 1)), constant_values=2)  # all visible
    # The whole image is the crop, as in RegDA: it has been cut out already.
    return one_each(spec, root, BODY16, root, [names[row] for row in rows],
                    ["render" if data == "surreal" else "photo"] * len(rows), keypoints)


# ------------------------------------------------------------------------------------------------------------ animals

def read_synthetic_animal(spec, root, split):
    """SyntheticAnimal with the annotations that UDA-Animal-Pose (horse, tiger) and UniFrame (dog, sheep) cleaned."""
    path = root / "clean_data" / "keypoints_18.json" if root.is_dir() else root
    names, domains, keypoints, corners = [], [], [], []
    with expecting(path, "SyntheticAnimal's clean_data/keypoints_18.json"):
        for animal, records in json.loads(path.read_bytes()).items():
            rows = {"train": records["train_idxs"], "val": records["valid_idxs"],
                    "all": records["train_idxs"] + records["valid_idxs"]}[split]
            names += [str(records["imgpath"][row]) for row in rows]
            domains += ["dog" if animal == "hound" else animal] * len(rows)
            keypoints.append(np.array(records["keypoints"], np.float32)[rows])
            corners.append(np.array(records["bbox"], float)[rows][:, [0, 2, 1, 3]])  # from left, right, top, bottom
        keypoints = np.concatenate(keypoints)
        keypoints[:, :, 2] = 1 + (keypoints[:, :, 2] > 0)  # a hidden joint is known all the same
        skeleton = {18: ANIMAL18, 14: ANIMAL14}[keypoints.shape[1]]
    return one_each(spec, path, skeleton, path.parent, names, domains, keypoints, np.concatenate(corners))


TIGER_JOINTS = [*range(8), 14, 15, 16, 17, 12, 13, 8, 9, 10, 11]  # ANIMAL18 in the files of tigers


def read_tigdog(spec, root, split):
    """TigDog's horses and tigers, split by video as in CC-SSL, with its boxes: of the joints, for want of others."""
    home = root / "behaviorDiscovery2.0" if (root / "behaviorDiscovery2.0").is_dir() else root
    names, domains, keypoints = [], [], []
    for animal, joints in (("horse", range(18)), ("tiger", TIGER_JOINTS)):
        path, frames, points = home / "ranges" / animal / "ranges.mat", [], []
        ranges = load_matlab(path, "ranges", "TigDog's shots")
        if ranges.ndim != 2 or ranges.shape[1] != 3 or ranges.dtype.kind not in "uif":
            raise DataError(f"{path}: expected 'ranges' (shots, 3), found {ranges.dtype} {ranges.shape}")
        for shot, first, last in ranges.astype(int).tolist():
            path = home / "landmarks" / animal / f"{shot}.mat"
            if path.is_file():  # some shots have no labels
                frames += [f"{animal}/{frame:08d}.jpg" for frame in range(first, last + 1)]
                points += read_landmarks(path, last + 1 - first)
        rows = range(len(frames)) if split == "all" else tigdog_rows(home, animal, split, len(frames))
        names += [frames[row] for row in rows]
        domains += [animal] * len(rows)
        keypoints += [points[row][joints] for row in rows]
    keypoints = np.array(keypoints, np.float32).reshape(-1, 18, 3)
    known = keypoints[:, :, :2] > 0
    low = np.where(known, keypoints[:, :, :2], np.inf).min(1) - 15  # pixels
    high = np.where(known, keypoints[:, :, :2], -np.inf).max(1) + 15
    corners = np.where((low < high).all(1, keepdims=True), np.hstack([low, high]), 0)  # of nothing: an empty box
    keypoints[:, :, 2] = 2 * ((keypoints[:, :, 2] > 0) & known.all(2))
    return one_each(spec, home, ANIMAL18, home, names, domains, keypoints, corners)


def read_landmarks(path, frames):
    """(18, 3) x, y, visible for each frame of a shot: a cell with a structure of positions and visibilities."""
    cells = load_matlab(path, "landmarks", "TigDog's landmarks")
    with expecting(path, f"'landmarks' of {frames} frames"):
        return [np.hstack(list(cells[frame, 0][0, 0])[:2])[:18].reshape(18, 3) for frame in range(frames)]


def tigdog_rows(home, animal, split, frames):
    """The list of a split's frames, from the folder `cached_data` of UniFrame's code or `data` of CC-SSL's."""
    name = f"real_animal/{animal}/{'train' if split == 'train' else 'valid'}_idxs_by_video.npy"
    found = [path for folder in home.resolve().parents[:2] for path in folder.glob(f"*data/{name}")]
    if not found:
        raise DataError(f"{home.parent}: expected UniFrame's cached_data/{name} in it or beside it for split {split!r}")
    with expecting(found[0], f"numbers of labelled frames, below {frames}"):
        rows = np.load(found[0], allow_pickle=False)
        if rows.ndim != 1 or rows.dtype.kind not in "ui" or rows.min() < 0 or rows.max() >= frames:
            raise ValueError(f"found {rows.dtype} {rows.shape}")
        return rows.tolist()


SPECIES = {"ca": "cat", "co": "cow", "do": "dog", "ho": "horse", "sh": "sheep"}  # in image names like do12.jpeg


def read_animalpose(spec, root, split):
    """AnimalPose, from its authors' keypoints.json or from mmpose's files in COCO's format.

    UniFrame divides the animals at random, so that pictures are in both of its splits; here every fifth picture is held
    out. mmpose has lost the species in PASCAL VOC's pictures: their domain is "animal".
    """
    path, own = annotation_file(root, {part: f"animalpose_{part}.json" for part in ("train", "val")}, split)
    content = read_json(path, dict, "AnimalPose's annotations")
    names, domains, keypoints, corners = [], [], [], []
    try:
        joints = tuple(content["categories"][0]["keypoints"])
        species = {category["id"]: category["name"] for category in content["categories"]}
        images, coco = content["images"], isinstance(content["images"], list)
        files = {str(image["id"]): image["file_name"] for image in images} if coco else images
        for record in content["annotations"]:
            names.append(str(files[str(record["image_id"])]))
            stem = PurePosixPath(names[-1]).stem
            domains.append(SPECIES.get(stem[:2] if stem[2:].isdigit() else "", species[record["category_id"]]))
            keypoints.append(np.array(record["keypoints"], np.float32).reshape(len(joints), 3))
            x, y, right, bottom = record["bbox"]
            corners.append((x, y, x + right, y + bottom) if coco else (x, y, right, bottom))
        keypoints, corners = np.array(keypoints), np.array(corners, float)
        keypoints[:, :, 2] = 2 * (keypoints[:, :, 2] > 0)
    except BROKEN as error:
        raise DataError(f"{path}: annotation {len(names)}: not AnimalPose's: {type(error).__name__} {error}") from None
    dataset = one_each(spec, path, make_skeleton(joints, ()), path.parent, names, domains, keypoints, corners)
    dataset = with_skeleton(dataset, ANIMAL14)
    return dataset if own else hold_out(dataset, split, np.unique(names, return_inverse=True)[1])


READERS |= {"lsp": read_lsp, "lsp-regda": read_lsp, "surreal": read_cropped, "human36m": read_cropped,
            "synthetic-animal": read_synthetic_animal, "tigdog": read_tigdog, "animalpose": read_animalpose}


def convert(name, root):
    """Writes the annotations of both splits; returns the folder that `coco:` wants."""
    home = Path(os.path.abspath(root))
    home = home if home.is_dir() else home.parents[home.parent.name == "clean_data"]  # synthetic animals' annotations
    for split in ("train", "val"):
        dataset = load_dataset(f"{name}:{root}", split)
        content = to_coco(dataset, "person" if dataset.skeleton is BODY16 else "animal")
        for image, file in zip(content["images"], dataset.files):
            image["file_name"] = Path(os.path.abspath(file)).relative_to(home).as_posix()
        write_json(home / name / ANNOTATION_FILES["coco"][split], content)
    return home / name


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[name for name in READERS if name != "pictures"])
    parser.add_argument("root", help="the data set's folder, as its authors distribute it")
    args = parser.parse_args(argv)
    try:
        print(convert(args.name, args.root))
    except (ValueError, OSError) as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
