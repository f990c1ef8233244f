"""Data: from a picture with labels to a training sample, and from heatmaps back to keypoints.

A pose estimator gets one person at a time. The person's box is cut out of the image and scaled to a
fixed size: the *crop*. For each keypoint the model gives a *heatmap*, a small image that is bright
where the model takes the keypoint to be. assets/tour.md has pictures. Read in this order:

    Skeleton, PoseDataset   what is labelled, and where: people as arrays, images as file names
    crop_matrix             the affine map from an image to the crop of one person, and back
    encode_heatmaps         keypoints -> the heatmaps that a model should give
    decode_heatmaps         heatmaps -> keypoints, to a fraction of a pixel
    Crops                   all of this in one training sample, with augmentation

The appendices read data sets and hold what all modules share: skeletons, files, many processes.
`load_dataset("name:root", split)` opens COCO, Human-Art, the data sets of domain adaptation, your
own pictures, and the built-in figures. Its docstring says how to add a format.

Coordinates: a point is x before y, in pixels of its image or crop. The centres of pixels are at
integers, so the outermost ones of a width W are W - 1 apart. A size is (height, width), a box is
left, top, width, height. Shapes: B crops, K keypoints, H×W the crop, h×w the heatmap.
"""
import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


# ---------------------------------------------------------------------------------------- skeletons

@dataclass(frozen=True, eq=False)
class Skeleton:
    """Names and structure of K keypoints. Edges and groups are made of indices into `names`."""
    names: tuple[str, ...]  # such as COCO17's "nose", "left_eye", "right_eye", ..., "right_ankle"
    edges: tuple[tuple[int, int], ...]  # lines of a drawing: (7, 9) is COCO17's left forearm
    sigmas: np.ndarray  # (K,) how far annotators scatter, relative to the person's size; for OKS
    upper: tuple[int, ...]  # the upper half: a half-body crop keeps either these or the others
    groups: dict  # name of a group -> the keypoints that a PCK table averages
    flip_pairs: tuple[tuple[int, int], ...]  # left and right, which a mirror exchanges

    @cached_property
    def plain_names(self):
        """The names in one spelling, in which names are compared: left_eye for L_Eye."""
        return plain_names(self.names)

    @cached_property
    def mirrored(self):
        """(K,) each keypoint's counterpart in a mirrored image: right_eye for left_eye."""
        counterpart = np.arange(len(self.names))  # a nose is its own counterpart
        for a, b in self.flip_pairs:
            counterpart[a] = b
            counterpart[b] = a
        return counterpart


# ---------------------------------------------------------------------------------------- data sets

@dataclass
class PoseDataset:
    """Images and the people in them, as arrays with a row per image or with a row per person."""
    name: str
    skeleton: Skeleton
    files: list  # paths of the images, or Pillow images
    image_ids: np.ndarray  # (images,)
    domains: np.ndarray  # (images,) of str: "photo", "oil painting", ...
    ids: np.ndarray  # (people,) annotation ids
    image_index: np.ndarray  # (people,) the row of each person's image
    keypoints: np.ndarray  # (people, K, 3) x, y, v: 0 unlabelled, 1 hidden but labelled, 2 visible
    boxes: np.ndarray  # (people, 4) left, top, width, height
    areas: np.ndarray  # (people,) pixels that the person covers
    crowd: np.ndarray  # (people,) bool: a box around a group
    upright: bool = False  # whether images are to be turned as their EXIF orientation says
    sentences: np.ndarray | None = None  # (images,) of str for the text tower: `with_sentences`

    @property
    def annotated(self):
        """Rows of the people to train on: one person, not a crowd, with a labelled keypoint."""
        labelled = (self.keypoints[:, :, 2] > 0).any(1)
        return np.flatnonzero(labelled & ~self.crowd)

    def select_people(self, rows):
        """The data set with all images but only some people. rows: indices or (people,) bool."""
        return replace(
            self,
            ids=self.ids[rows],
            image_index=self.image_index[rows],
            keypoints=self.keypoints[rows],
            boxes=self.boxes[rows],
            areas=self.areas[rows],
            crowd=self.crowd[rows])


# ------------------------------------------------------------------------------------ crop geometry
#
# An affine map takes a point p = (x, y) of the image to A p + b in the crop. A is 2×2: it scales
# and turns; b is 2×1: it moves. Side by side they are the matrix M = [A b] (2, 3). Labels go
# through M into the crop. Predictions, and the places where a crop's pixels are read, go through
# the inverse of M into the image.

PADDING = 1.25  # a crop is this many times as large as the box: hands and feet are not cut off


def crop_width(boxes, size, padding=PADDING):
    """Width (...), in pixels of the image, of the crops of shape `size` around boxes (..., 4)."""
    height, width = size
    return padding * np.maximum(boxes[..., 2], boxes[..., 3] * width / height)


def crop_matrix(box, size, padding=PADDING, scale=1.0, rotation=0.0, shift=(0.0, 0.0)):
    """(2, 3) matrix from the pixels of an image to those of a crop of `size` around a box (4,).

    The box grows to the crop's aspect ratio, then by `padding` and `scale`. What is cut out turns
    by `rotation` degrees around its centre, and the centre moves by `shift` times the width and the
    height of what is cut out.
    """
    x, y, w, h = box
    height, width = size  # H and W
    cut = crop_width(np.asarray(box), size, padding) * scale  # what is cut out is `cut` wide
    # c, the point of the image that becomes the middle of the crop
    center_x = x + w / 2 + shift[0] * cut
    center_y = y + h / 2 + shift[1] * cut * height / width
    center = np.array([center_x, center_y])
    # R, the rotation by the angle θ
    theta = math.radians(rotation)
    cos = math.cos(theta)
    sin = math.sin(theta)
    R = np.array([[cos, -sin], [sin, cos]])
    # S, crop pixels per image pixel along x and y. Unbiased data processing (UDP, arXiv
    # 1911.07524): the W pixels of the crop span W - 1, from the centre of the first to the centre
    # of the last. With W in place of W - 1, a crop and its mirror image, or a crop and its heatmap,
    # would disagree by a fraction of a pixel.
    span = np.array([width, height]) - 1
    S = span / [cut, cut * height / width]
    # A = S R, and b such that c lands in the middle: A c + b = (W - 1, H - 1) / 2
    A = S[:, None] * R
    b = span / 2 - A @ center
    return np.column_stack([A, b])


def transform_points(points, matrix):
    """A p + b for points (..., points, 2) and matrices (..., 2, 3), both arrays or both tensors."""
    A = matrix[..., :2]
    b = matrix[..., None, :, 2]
    return points @ A.swapaxes(-1, -2) + b


def invert_matrix(matrix):
    """The inverse maps of matrices (..., 2, 3), an array or a tensor.

    q = A p + b is the same as p = A⁻¹ q - A⁻¹ b.
    """
    library = torch if isinstance(matrix, torch.Tensor) else np
    inverse = library.linalg.inv(matrix[..., :2])
    return library.concatenate([inverse, -inverse @ matrix[..., 2:]], -1)


def warp_image(image, matrix, size, shrink=1.0):
    """The crop (height, width, 3), in bytes, that `matrix` (2, 3) maps a Pillow image to.

    shrink: how many times smaller than stored the image was read. The matrix is for the image as
        stored.
    """
    inverse = invert_matrix(matrix)  # from the crop to the image, p = A q + b
    A = inverse[:, :2]
    b = inverse[:, 2]
    # Pillow counts from the corners of pixels: it wants u = p + 1/2 for v = q + 1/2. So p = A q + b
    # becomes u = A v + b + 1/2 - A (1/2, 1/2). In an image that was read n times smaller, u is n
    # times smaller, too.
    b = b + 0.5 - A.sum(1) / 2
    to_image = np.column_stack([A, b]) / shrink
    image, to_image = reduce_image(image, to_image, size)  # else a small crop would skip pixels
    crop = image.transform(size[::-1], Image.AFFINE, to_image.ravel(), Image.BILINEAR)
    return np.array(crop)


MEAN = (0.485, 0.456, 0.406)  # of ImageNet's colours, what every public backbone expects
STD = (0.229, 0.224, 0.225)


def normalize(images):
    """RGB images (B, 3, H, W), bytes or floats from 0 to 1 -> images as the models take them."""
    mean = torch.tensor(MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, device=images.device).view(3, 1, 1)
    if images.dtype == torch.uint8:
        images = images.float() / 255
    return (images - mean) / std


# ------------------------------------------------------------------------------------ heatmap codec
#
# A heatmap says where a keypoint is and how sure the model is of it. The target for a model is a
# Gaussian around the keypoint; a prediction is read off at its peak. A heatmap is usually a quarter
# as wide as the crop, so the highest pixel alone may be two pixels of the crop away from the peak:
# decoding finds the rest from the pixels around it.

def encode_heatmaps(keypoints, visible, input_size, heatmap_size, sigma=2.0):
    """Keypoints in crops -> the heatmaps that a model should give, and their weights in the loss.

    keypoints: (B, K, 2) in crops of `input_size`.
    visible: (B, K), 0 where a keypoint is not labelled.
    sigma: the width of the Gaussian, in heatmap pixels.
    Returns heatmaps (B, K, h, w) and weights (B, K). A keypoint that is not labelled, or whose
    Gaussian lies outside, has weight 0 and a heatmap of zeros. All else is as in mmpose's
    UDPHeatmap.
    """
    H, W = input_size
    h, w = heatmap_size
    # μ = (x, y), in heatmap pixels but not rounded to them; corner pixels lie on corner pixels
    x = keypoints[:, :, 0, None] * ((w - 1) / (W - 1))  # (B, K, 1)
    y = keypoints[:, :, 1, None] * ((h - 1) / (H - 1))
    # G(u, v) = exp(-((u - x)² + (v - y)²) / 2σ²) = exp(-(u - x)² / 2σ²) · exp(-(v - y)² / 2σ²)
    along_x = gaussian_profile(x, w, sigma)  # (B, K, w)
    along_y = gaussian_profile(y, h, sigma)  # (B, K, h)
    heatmaps = along_y[:, :, :, None] * along_x[:, :, None, :]  # (B, K, h, w)
    weights = (visible > 0) & (heatmaps.amax((2, 3)) > 0)  # (B, K)
    return heatmaps * weights[:, :, None, None], weights.to(heatmaps)


def gaussian_profile(center, length, sigma):
    """One of the two factors of a Gaussian: center (B, K, 1) -> (B, K, length)."""
    u = torch.arange(length, device=center.device)
    near = (u - (center + 0.5).trunc()).abs() <= 3 * sigma  # cut off at 3σ, as mmpose does
    return torch.exp(-(u - center) ** 2 / (2 * sigma ** 2)) * near


def decode_heatmaps(heatmaps, input_size, sigma=2.0):
    """Heatmaps (B, K, h, w) -> keypoints in the crops, and the heights of the peaks.

    Returns keypoints (B, K, 2) in crops of `input_size` and scores (B, K).
    DARK (arXiv 1910.06278): the logarithm of a Gaussian of height a is a parabola,
    L(p) = log a - |p - μ|² / 2σ². Its slope and curvature at any one point tell where its top μ is.
    They are measured at the highest pixel, m.
    """
    B, K, h, w = heatmaps.shape
    H, W = input_size
    scores, highest = heatmaps.flatten(2).max(2)  # (B, K)
    x = highest % w  # m = (x, y)
    y = highest // w
    # A prediction is noisy, so it is smoothed with a Gaussian. If it is a Gaussian, it stays one
    # with the same centre.
    reach = round(2.5 * sigma)
    offsets = torch.arange(-reach, reach + 1, device=heatmaps.device)
    kernel = torch.exp(-offsets ** 2 / (2 * sigma ** 2)).to(heatmaps)
    kernel = kernel / kernel.sum()
    smooth = heatmaps.reshape(B * K, 1, h, w)
    smooth = F.conv2d(smooth, kernel.view(1, 1, 1, -1), padding=(0, reach))
    smooth = F.conv2d(smooth, kernel.view(1, 1, -1, 1), padding=(reach, 0))
    log = smooth.view(B, K, h, w).clamp(min=1e-3).log()
    log = F.pad(log, (1, 1, 1, 1), mode="replicate")  # L also looks at the pixels around a corner
    log = log.flatten(2)  # (B, K, (h + 2)(w + 2))

    def L(dx, dy):
        """(B, K) the logarithm at m + (dx, dy)."""
        row = y + 1 + dy
        column = x + 1 + dx
        pixel = row * (w + 2) + column
        return log.gather(2, pixel[:, :, None])[:, :, 0]

    # g = (∂L/∂x, ∂L/∂y) at m, the gradient, from the pixels on either side
    gx = (L(1, 0) - L(-1, 0)) / 2
    gy = (L(0, 1) - L(0, -1)) / 2
    # C = [cxx cxy; cxy cyy] = [∂²L/∂x² ∂²L/∂x∂y; ∂²L/∂x∂y ∂²L/∂y²] at m, the Hessian
    cxx = L(1, 0) - 2 * L(0, 0) + L(-1, 0)
    cyy = L(0, 1) - 2 * L(0, 0) + L(0, -1)
    cxy = (L(1, 1) - L(1, -1) - L(-1, 1) + L(-1, -1)) / 4
    # The gradient of a parabola is linear, g + C (p - m), and 0 at the top. So the step there is
    # μ - m = -C⁻¹ g, with C⁻¹ = [cyy -cxy; -cxy cxx] / det C and det C = cxx cyy - cxy².
    determinant = cxx * cyy - cxy ** 2
    peaked = (determinant > 1e-9) & (cxx < 0)  # else there is no top, and the result is m itself
    determinant = torch.where(peaked, determinant, 1.0)
    step_x = (cxy * gy - cyy * gx) / determinant
    step_y = (cxy * gx - cxx * gy) / determinant
    step = torch.stack([step_x, step_y], dim=2) * peaked[:, :, None]  # (B, K, 2)
    points = torch.stack([x, y], dim=2) + step.clamp(-1, 1)  # the top is near m
    scale = points.new_tensor([(W - 1) / (w - 1), (H - 1) / (h - 1)])
    return points * scale, scores


# -------------------------------------------------------------------------- training and test crops

@dataclass(frozen=True)
class Augmentation:
    """What a training crop may undergo. The default does nothing: it is for testing."""
    flip_probability: float = 0.0  # of a mirror image
    half_body: float = 0.0  # the probability of a crop around only the upper or the lower half
    scale: float = 0.0  # the crop is 1 - scale to 1 + scale times as large
    shift: float = 0.0  # with probability 0.3 the crop moves by this share of its width and height
    box_shift: float = 0.0  # the same as a share of the padded box's width and height
    rotation: float = 0.0  # with probability 0.6 it turns by so many degrees, either way
    color: float = 0.0  # brightness, contrast and saturation change by up to this share
    resized_crop: float = 0.0  # above 0: a random part of the box, with this share of it at least
    outside: bool = False  # whether keypoints outside count, if their Gaussians reach into the crop


class Crops(torch.utils.data.Dataset):
    """One person per item, cut out and scaled to `size` (height, width), augmented.

    An item's key is (row of the person, seed), not a place in a list. So there is no length, and
    the same key always gives the same crop, whichever process makes it.
    """

    def __init__(self, dataset, size, augmentation=Augmentation()):
        self.dataset = dataset
        self.size = size
        self.augmentation = augmentation
        self.kept = {}  # images that need not be read again, see `open_image`

    def __getitem__(self, key):
        row, seed = key
        rng = np.random.default_rng(seed)
        data = self.dataset
        height, width = self.size
        image_row = data.image_index[row]
        keypoints = data.keypoints[row].astype(np.float64)  # (K, 3) x, y, v

        # Where from? A random map from the image to the crop, or to the crop's mirror image.
        matrix = self.random_matrix(keypoints, data.boxes[row], rng)  # (2, 3)
        if rng.random() < self.augmentation.flip_probability and data.skeleton.flip_pairs:
            matrix[0] = [0, 0, width - 1] - matrix[0]  # x becomes W - 1 - x
            keypoints = keypoints[data.skeleton.mirrored]  # in a mirror a left eye is a right one

        # The pixels. det A is the crop's area per area of the image, so 1 / √det A is image pixels
        # per crop pixel: an image so many times smaller is large enough, and read faster.
        max_shrink = 1 / math.sqrt(abs(np.linalg.det(matrix[:, :2])))
        image, shrink = open_image(data.files[image_row], max_shrink, data.upright, self.kept)
        pixels = warp_image(image, matrix, self.size, shrink)
        if self.augmentation.color:
            pixels = jitter_color(pixels, self.augmentation.color, rng)

        # The labels, moved with the pixels.
        points = transform_points(keypoints[:, :2], matrix)
        visible = keypoints[:, 2]
        if not self.augmentation.outside:
            inside = (points >= 0) & (points <= [width - 1, height - 1])
            visible = np.where(inside.all(1), visible, 0)
        return {
            "image": torch.from_numpy(pixels).permute(2, 0, 1),  # (3, H, W) bytes
            "keypoints": torch.from_numpy(points).float(),  # (K, 2) in the crop
            "visible": torch.from_numpy(visible).float(),  # (K,) 0: not labelled, or outside
            "matrix": torch.from_numpy(matrix),  # (2, 3) from the image to the crop
            "row": row,
            "sentence": "" if data.sentences is None else str(data.sentences[image_row])}

    def random_matrix(self, keypoints, box, rng):
        """The map (2, 3) from the image to a random crop around the box (4,), or half a body."""
        aug = self.augmentation
        padding = PADDING
        if rng.random() < aug.half_body:
            half = half_body_box(keypoints, self.dataset.skeleton, rng)
            if half is not None:
                box = half
                padding = 1.0  # this box is large already
        if aug.resized_crop:
            scale, shift = random_part(aug.resized_crop, rng)
            return crop_matrix(box, self.size, padding, scale, shift=shift)
        scale = 1 + aug.scale * truncated_normal(rng)
        rotation = aug.rotation * truncated_normal(rng)
        if rng.random() >= 0.6:
            rotation = 0.0
        move = truncated_normal(rng, 2)  # along x and y
        if rng.random() >= 0.3:
            move = np.zeros(2)
        left_top = box[:2] + aug.box_shift * padding * (move * box[2:])
        box = np.concatenate([left_top, box[2:]])
        return crop_matrix(box, self.size, padding, scale, rotation, aug.shift * move)


# === Appendix: skeletons; skip on a first reading =================================================

import hashlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
import threading
import time
import unicodedata
from collections import Counter, deque
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache, partial
from glob import escape, glob
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch.distributed as dist
from PIL import ExifTags, ImageOps


# --------------------------------------------------------------------------- names, left and right

# Left and right in the languages of annotators. Each word stands above its opposite.
LEFT_WORDS = """
    left  l lt links  linke  linker  linkes  gauche gauche izquierdo izquierda izq
    esquerdo esquerda sinistro sinistra левый  левая  левое  左 ひだり 왼쪽   왼""".split()
RIGHT_WORDS = """
    right r rt rechts rechte rechter rechtes droite droit  derecho   derecha   der
    direito  direita  destro   destra   правый правая правое 右 みぎ   오른쪽 오른""".split()
SIDES = {*LEFT_WORDS, *RIGHT_WORDS}
OPPOSITES = [*zip(LEFT_WORDS, RIGHT_WORDS), *zip(RIGHT_WORDS, LEFT_WORDS)]
OTHER_SIDE = {"left": "right", "right": "left"}
SAME_WORDS = {"f": "front", "b": "back", "paw": "hoof"}
SAME_WORDS |= dict.fromkeys(LEFT_WORDS, "left") | dict.fromkeys(RIGHT_WORDS, "right")
LETTER_BEFORE = {"l": "k", "r": "q"}


def plain_names(names):
    """The names of a skeleton's keypoints in one spelling, with the side first.

    left_eye stands for LeftEye, "left eye", L_Eye and eye.L. If the other side is there as well,
    left_eye also stands for lefteye and leye.
    """
    spelled = ["_".join(words_in(name)) or name for name in names]
    return [plain_name(name, spelled) for name in spelled]


def words_in(name):
    """The words of a name in lower case: left and eye for LeftEye, left-eye and "Left eye"."""
    words = re.findall(r"[左右]|[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W_A-Za-z左右]+", name)
    return [word.lower() for word in words]


def plain_name(name, spelled):
    """One of `plain_names`. spelled: all names of the skeleton, as words with _ between them."""
    words = set_side_apart(name, spelled).split("_")
    if not is_in_alphabet(words, spelled):
        words = [SAME_WORDS.get(word, word) for word in words]
    sides = [word for word in words if word in OTHER_SIDE]
    if len(sides) == 1:
        words.remove(sides[0])
        words = sides + words
    return "_".join(words)


def set_side_apart(name, spelled):
    """left_ear for leftear where rightear is among the names `spelled`, and name otherwise."""
    if not SIDES.isdisjoint(name.split("_")):
        return name
    for side, opposite in OPPOSITES:
        at_start = rf"(?<![^_]){side}(?=[^_])"
        at_end = rf"(?<=[^_]){side}(?![^_])"
        for pattern, apart in ((at_start, f"{side}_"), (at_end, f"_{side}")):
            other = re.sub(pattern, opposite, name)
            if other != name and other in spelled:
                return re.sub(pattern, apart, name)
    return name


def is_in_alphabet(words, spelled):
    """Whether an l or r in a name is no side, because a k or q is there in its place, too."""
    before = [LETTER_BEFORE.get(word, word) for word in words]
    return before != words and "_".join(before) in spelled


def pairs_of_sides(names):
    """((left, right), ...) the pairs of keypoints that the names tell, as indices."""
    plain = plain_names(names)
    pairs = []
    for joint, name in enumerate(plain):
        other = "_".join(OTHER_SIDE.get(word, word) for word in name.split("_"))
        if other != name and other in plain[joint + 1:]:
            pairs.append((joint, plain.index(other)))
    return tuple(pairs)


def report_sides(skeleton):
    """Says on stderr if left and right are not known, or if a side has no counterpart."""
    remedy = "'flip_pairs' in the annotations' category names pairs"
    if not skeleton.flip_pairs:
        names = ", ".join(skeleton.names)
        print(f"no left and right among the keypoints {names:.80}: no picture is mirrored; "
              f"{remedy}", file=sys.stderr)
        return
    alone = []
    for joint, name in enumerate(skeleton.plain_names):
        has_side = any(word.startswith(("left", "right")) for word in name.split("_"))
        if has_side and skeleton.mirrored[joint] == joint:
            alone.append(skeleton.names[joint])
    if alone:
        print(f"no counterpart of the keypoints {', '.join(alone)} for mirrored pictures; "
              f"{remedy}", file=sys.stderr)


# ---------------------------------------------------------------------------------- whole skeletons

def skeleton_from(fields):
    """A Skeleton from its fields as JSON has them."""
    groups = {name: tuple(joints) for name, joints in fields["groups"].items()}
    edges = tuple(tuple(edge) for edge in fields["edges"])
    sigmas = np.array(fields["sigmas"])
    names = tuple(fields["names"])
    # skeletons.json and model files of earlier versions have no pairs
    flip_pairs = fields.get("flip_pairs", pairs_of_sides(names))
    flip_pairs = tuple(tuple(pair) for pair in flip_pairs)
    return Skeleton(names, edges, sigmas, tuple(fields["upper"]), groups, flip_pairs)


with open(Path(__file__).parent / "assets" / "skeletons.json", encoding="utf-8") as file:
    SKELETONS = {name: skeleton_from(fields) for name, fields in json.load(file).items()}
COCO17 = SKELETONS["COCO17"]  # people, as in COCO and Human-Art
BODY16 = SKELETONS["BODY16"]  # people, as in MPII
ANIMAL18 = SKELETONS["ANIMAL18"]  # SyntheticAnimal and TigDog
ANIMAL14 = SKELETONS["ANIMAL14"]  # what SyntheticAnimal and AnimalPose have in common

LOWER_HALF = {"hip", "knee", "ankle", "heel", "toe", "foot", "pelvis", "tail", "back", "hind"}
DEFAULT_SIGMA = 0.05  # ours
UNNAMED = "keypoint {}"  # the names keypoint 1, keypoint 2, ... where only their number is known


def known_skeleton(count):
    """The skeleton of a model of which no more is known than the number of its keypoints."""
    for name in skeletons_of(count):
        return SKELETONS[name]
    return unnamed_skeleton(count)


def unnamed_skeleton(count):
    """The skeleton of keypoints that are called keypoint 1, keypoint 2, ..."""
    return make_skeleton([UNNAMED.format(number) for number in range(1, count + 1)], ())


def skeletons_of(count):
    """The names of the known skeletons with so many keypoints."""
    return [name for name, skeleton in SKELETONS.items() if len(skeleton.names) == count]


def skeleton_named(name):
    """The known skeleton of a name, such as "ap10k". Raises DataError for another name."""
    if name.upper() not in SKELETONS:
        raise DataError(f"skeleton: expected one of {', '.join(SKELETONS)}, found {name}")
    return SKELETONS[name.upper()]


def without_side(name):
    """eye for left_eye."""
    words = [word for word in name.split("_") if word not in ("left", "right")]
    return "_".join(words) or name


def known_sigma(part):
    """The sigma of a part of the body, such as "eye", in the first known skeleton that has it."""
    for skeleton in SKELETONS.values():  # COCO17 is the first
        for name, sigma in zip(skeleton.names, skeleton.sigmas):
            if without_side(name) == part:
                return sigma
    return DEFAULT_SIGMA


def make_skeleton(names, edges):
    """The known skeleton of these names, or a new one; names tell sides, sigmas and groups."""
    for known in SKELETONS.values():
        if known.names == tuple(names):
            return known
    sigmas = []
    upper = []
    groups = {}
    for joint, name in enumerate(plain_names(names)):
        part = without_side(name)
        sigmas.append(known_sigma(part))
        words = set(part.split("_"))
        is_lower = bool(words & LOWER_HALF)
        if "front" in words or not is_lower:  # an animal's front legs are in its upper half
            upper.append(joint)
        groups[part] = groups.get(part, ()) + (joint,)
    pairs = pairs_of_sides(names)
    return Skeleton(tuple(names), tuple(edges), np.array(sigmas), tuple(upper), groups, pairs)


# Keypoints that are the middle of two others. COCO labels nothing near the top of the head or the
# upper neck: both stay without a label, because a guess would teach a bias.
MIDPOINTS = {
    "pelvis": ("left_hip", "right_hip"),
    "thorax": ("left_shoulder", "right_shoulder")}


def with_skeleton(dataset, skeleton):
    """The data set with the keypoints of another skeleton.

    Each keypoint is the one of the same name, or the middle of two (MIDPOINTS). A keypoint that the
    data set lacks gets no label, and a line on stderr says so. Raises DataError if the data set
    lacks all keypoints.
    """
    joint_of = {name: joint for joint, name in enumerate(dataset.skeleton.plain_names)}
    wanted = skeleton.plain_names
    if wanted == list(joint_of):
        return replace(dataset, skeleton=skeleton)
    old = dataset.keypoints
    new = np.zeros((len(old), len(wanted), 3), old.dtype)
    missing = []
    for joint, name in enumerate(wanted):
        ends = [joint_of[end] for end in MIDPOINTS.get(name, ()) if end in joint_of]
        if name in joint_of:
            new[:, joint] = old[:, joint_of[name]]
        elif len(ends) == 2:
            a = old[:, ends[0]]  # (people, 3)
            b = old[:, ends[1]]
            new[:, joint] = (a + b) / 2
            new[:, joint, 2] = np.minimum(a[:, 2], b[:, 2])
        else:
            missing.append(skeleton.names[joint])
    new[new[:, :, 2] == 0] = 0
    if len(missing) == len(wanted):
        names = ", ".join(skeleton.names)
        raise DataError(f"{dataset.name}: its skeleton has no keypoint of {names}")
    if missing:
        print(f"{dataset.name}: its skeleton lacks {', '.join(missing)}", file=sys.stderr)
    return replace(dataset, skeleton=skeleton, keypoints=new)


# === Appendix: images; skip on a first reading ====================================================

LARGEST_IMAGE = 10 ** 8  # pixels
LARGEST_KEPT = 2 ** 15  # pixels of an image that is kept for later
MOST_KEPT = 10_000  # images that are kept; together they take at most 1.3 GB

# Formats of pixels. Pillow reads more: for PostScript, however, it would start another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "PSD",
           "PCX", "QOI", "SGI", "SUN", "DDS", "ICO", "XBM", "XPM", "TGA")


@lru_cache
def image_formats():
    """Those of FORMATS that this Pillow reads."""
    Image.init()  # loads Pillow's readers of all formats
    return [name for name in FORMATS if name in Image.OPEN]


@lru_cache
def image_endings():
    """The endings of file names, such as ".jpg", of these formats."""
    formats = {*image_formats(), "MPO"}  # a JPEG of several pictures
    return {ending for ending, name in Image.registered_extensions().items() if name in formats}


@contextmanager
def image_file(file):
    """An open Pillow image. Raises PictureError if it cannot be opened, or decoded in the block."""
    check_regular(file)
    try:
        with Image.open(file, formats=image_formats()) as image:
            # `eval.py --large` switches off Pillow's own limit, and ours with it
            no_limit = Image.MAX_IMAGE_PIXELS is None
            if image.width * image.height > LARGEST_IMAGE and not no_limit:
                raise ValueError(f"{image.width}×{image.height} pixels; "
                                 "`eval.py --large` reads more than 100 million")
            yield image
    except FileNotFoundError:
        raise PictureError(f"{file}: no such image") from None
    except Image.DecompressionBombError as error:
        remedy = "`eval.py --large` reads it"
        raise PictureError(f"{file}: not a readable image: {error}; {remedy}") from None
    except Exception as error:  # odd pictures, and odd EXIF, make Pillow raise almost anything
        reason = str(error) or type(error).__name__  # a MemoryError has no words
        raise PictureError(f"{file}: not a readable image: {reason}") from None


def open_image(file, max_shrink=1.0, upright=False, kept=None):
    """The image as RGB, and how many times smaller than stored it was read (1, 2, 4 or 8).

    file: a path, or a Pillow image.
    max_shrink: how many times smaller the image may be. JPEGs are read faster that way.
    upright: whether the image is turned as its EXIF orientation says. The images of data sets are
        not, because their annotations ignore it; but see `are_upright`.
    kept: {file: image}, images that need not be read again. This function fills the dictionary.
    """
    if isinstance(file, Image.Image):
        return to_rgb(file, upright), 1
    if kept and file in kept:
        smaller_is_faster = max_shrink >= 2 and str(file).lower().endswith((".jpg", ".jpeg"))
        if not smaller_is_faster:
            return kept[file], 1
    with image_file(file) as image:
        stored_width = image.width
        max_shrink = max(max_shrink, 1)
        least_width = math.ceil(image.width / max_shrink)
        least_height = math.ceil(image.height / max_shrink)
        # Lets the decoder of JPEGs shrink the image by 2, 4 or 8
        image.draft("RGB", (least_width, least_height))
        shrink = round(stored_width / image.width)
        image.load()
        image = to_rgb(image, upright)
    if kept is not None and shrink == 1:
        # Small images are kept. A large one is kept alone: the next people are often in it, too.
        is_large = image.width * image.height > LARGEST_KEPT
        if is_large or len(kept) >= MOST_KEPT:
            kept.clear()
        kept[file] = image
    return image, shrink


def to_rgb(image, upright=False):
    """A Pillow image in RGB and, if `upright`, turned as its EXIF orientation says.

    What is transparent becomes white, as in most viewers.
    """
    image.load()
    if upright and exif_orientation(image) != 1:  # exif_transpose() would copy it
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise DataError("its pixels are floats, and nobody knows of what scale: expected bytes")
    if image.mode.startswith("I"):  # 16 or 32 bits a pixel, which convert() would clip
        image = Image.fromarray(grey_bytes(np.asarray(image)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        opaque = Image.new("RGB", image.size, "white")
        opaque.paste(image, mask=image)
        return opaque
    if image.mode == "RGB":
        return image  # convert() would copy it
    return image.convert("RGB")


def grey_bytes(values):
    """Grey of 16 or 32 bits (H, W) as bytes.

    16 bits that use less than half of their range, such as those of a thermal camera, would become
    almost one grey: then the darkest pixel becomes 0 and the brightest 255. So do 32 bits.
    """
    values = values.astype(np.int64)
    low = values.min()
    high = values.max()
    fills_16_bits = low >= 0 and high < 2 ** 16 and high - low >= 2 ** 15
    if fills_16_bits or low == high:
        return (values >> 8).clip(0, 255).astype(np.uint8)
    worker = torch.utils.data.get_worker_info()
    if worker is None or worker.id == 0:  # otherwise each of them would say this
        report("pictures of 16 or 32 bits, but of a narrow range of grey: each picture's own "
               "range is stretched to that from black to white")
    return ((values - low) * 255 // (high - low)).astype(np.uint8)


def reduce_image(image, to_image, size):
    """Makes the part of an image that is in a crop smaller, where the crop has far fewer pixels.

    to_image: the map (2, 3) from the crop, of shape `size`, to the image; from the corners of
        pixels, as Pillow counts.
    Returns the part n times smaller, where each pixel is the mean of n×n, and the map to the part.
    For n below 2, the image and the map stay as they are. Most JPEGs are such images, because their
    decoder has made them small already.
    """
    n = int(math.sqrt(abs(np.linalg.det(to_image[:, :2]))))  # pixels of the image per crop pixel
    if n < 2:
        return image, to_image
    height, width = size
    corners = np.array([[0, 0], [width, 0], [0, height], [width, height]])
    points = transform_points(corners, to_image)
    left_top = (points.min(0) // n - 1).clip(0) * n  # whole blocks of n×n, and one more
    right_bottom = np.minimum(points.max(0) + 2 * n, image.size)
    if (left_top >= right_bottom).any():  # the crop lies outside
        return image, to_image
    box = [*left_top.astype(int).tolist(), *right_bottom.astype(int).tolist()]
    to_part = np.column_stack([to_image[:, :2], to_image[:, 2] - left_top]) / n
    return image.reduce(n, box), to_part


# === Appendix: random crops; skip on a first reading ==============================================

# For minutes of training, not days
GENTLE = Augmentation(flip_probability=0.5, scale=0.1, shift=0.05, rotation=10, color=0.25)
VITPOSE = Augmentation(  # as in mmpose
    flip_probability=0.5, half_body=0.3, scale=0.5, box_shift=0.16, rotation=80, outside=True)
REGDA = Augmentation(resized_crop=0.6)  # multi-level alignment's; its affine map is in uda.py

# mmpose's RandomHalfBody
LEAST_LABELLED = 9  # a person with fewer labelled keypoints has no half
LEAST_UPPER = 2  # labelled keypoints of an upper half
LEAST_LOWER = 3
UPPER_PROBABILITY = 0.7  # where both halves are labelled
HALF_BODY_PADDING = 1.5  # how many times larger than the half's keypoints the box is


def truncated_normal(rng, size=None):
    """Standard normal numbers within ±1."""
    values = rng.standard_normal(size)
    while (np.abs(values) > 1).any():
        values = np.where(np.abs(values) > 1, rng.standard_normal(size), values)
    return values


def random_part(least, rng):
    """The scale and the shift of a crop of a random part of the box: see `crop_matrix`.

    The part has at least the share `least` of the box's area.
    """
    side = math.sqrt(rng.uniform(least, 1))  # of the part, where the box's is 1
    shift = (rng.random(2) - 0.5) * (1 - side) / side
    return side, shift


def jitter_color(image, strength, rng):
    """Random brightness b, contrast c and saturation s, each 1 ± strength, of bytes (H, W, 3)."""
    b, c, s = 1 + strength * rng.uniform(-1, 1, 3)
    # Saturation mixes a colour v (3,) with its own grey, s v + (1 - s) mean(v); contrast mixes it
    # with the mean m of the image, c v + (1 - c) m; brightness mixes it with black, b v. One after
    # the other they give b c (s I + (1 - s) J) v + b (1 - c) m, where I is the identity and J the
    # 3×3 matrix of thirds: J v = mean(v).
    mix = b * c * (s * np.eye(3) + (1 - s) / 3)
    m = image.sum(dtype=np.uint32) / image.size  # mean() takes three times as long
    offset = (1 - c) * b * m
    mixed = image @ mix.astype(np.float32) + np.float32(offset)
    return mixed.clip(0, 255).astype(np.uint8)


def half_body_box(keypoints, skeleton, rng):
    """A box (4,) around the upper or the lower half of a person.

    None if too few of the keypoints (K, 3) are labelled.
    """
    labelled = keypoints[:, 2] > 0  # (K,)
    in_upper_half = np.isin(np.arange(len(keypoints)), skeleton.upper)
    upper = labelled & in_upper_half
    lower = labelled & ~in_upper_half
    has_upper = upper.sum() >= LEAST_UPPER
    has_lower = lower.sum() >= LEAST_LOWER
    if labelled.sum() < LEAST_LABELLED or not (has_upper or has_lower):
        return None
    prefers_upper = rng.random() < UPPER_PROBABILITY
    if has_upper and (prefers_upper or not has_lower):
        points = keypoints[upper, :2]
    else:
        points = keypoints[lower, :2]
    size = np.maximum(np.ptp(points, axis=0), 1) * HALF_BODY_PADDING
    return np.concatenate([points.mean(0) - size / 2, size])


# === Appendix: files and error messages; skip on a first reading ==================================

PACKED = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ")  # the first bytes of gz, zip, bz2, xz
TORCH_CANNOT_WRITE = "inline_container"  # torch.save's error names its C++ file, but no reason


LONGEST_LINE = 500  # letters of a message


class DataError(ValueError):
    """Bad input. The message is one line that names the file, the record, and what was expected."""

    def __str__(self):
        text = super().__str__()
        # An error of a process that cuts crops comes with that process's traceback before it.
        prefix = f"{type(self).__module__}.{type(self).__name__}: "
        causes = [line for line in text.splitlines() if line.startswith(prefix)]
        if causes:
            text = causes[-1].removeprefix(prefix)
        return one_line(text)


class PictureError(DataError):
    """A picture that is not there or cannot be read."""


def one_line(text):
    """A text as one line of readable length, for messages and tables.

    Names and files may hold letters that start a new line, clear a console or hide other letters:
    they are escaped.
    """
    line = escaped(text)
    if len(line) >= LONGEST_LINE:
        line = line[:LONGEST_LINE] + "..."
    return line


def escaped(text):
    """A text with \\n, \\x1b and the like in place of what is no printable letter."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class Output:
    """The standard output or the standard error, which may be closed, full or a broken pipe.

    What cannot be written is an error if it is `needed`, for it is the program's result. Otherwise
    this is said on the other stream, the program goes on, and all further text is lost.
    """

    def __init__(self, stream, name, needed=False):
        self.stream = stream
        self.name = name
        self.needed = needed

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        """Writes a text at once, for an error at Python's exit would change the exit status."""
        parts = re.split("([\n\r])", text)
        shown = [part if part in ("\n", "\r") else escaped(part) for part in parts]
        try:
            self.stream.write("".join(shown))
            self.stream.flush()
        except OSError as error:
            self.give_up(error)

    def flush(self):
        """`write` has done it."""

    def give_up(self, error):
        nowhere = open(os.devnull, "w", encoding="utf-8")
        with suppress(OSError):  # a notebook's stream has no number
            os.dup2(nowhere.fileno(), self.stream.fileno())  # Python still wants to write the rest
        self.stream = nowhere
        message = f"the {self.name} cannot be written: {error.strerror or error}"
        if self.needed:
            raise DataError(message)
        other = sys.stdout if self.name == "standard error" else sys.stderr
        if not getattr(other, "needed", False):
            print(f"{message}; the program goes on without it", file=other)


def stderr_of_all():
    """Where any of many processes may write what the user must see; see `main` in train.py."""
    rank, _ = processes()
    if rank == 0 or not sys.__stderr__:
        return sys.stderr
    return Output(sys.__stderr__, "standard error")


def cache_folder():
    """The folder of downloads, drawn figures and trained base models.

    It is $POSEBRIDGE_HOME, or else ~/.cache/posebridge. A user of a container may have no home;
    then it is in the folder for temporary files.
    """
    given = os.environ.get("POSEBRIDGE_HOME")
    if given:
        return Path(given)
    try:
        return Path.home() / ".cache" / "posebridge"
    except RuntimeError:
        folder = Path(tempfile.gettempdir()) / "posebridge"
        report(f"there is no home folder: {folder} is used; POSEBRIDGE_HOME names another one")
        return folder


@contextmanager
def expecting(path, what, error_type=DataError):
    """Turns any error in the block into one line that names the file and what was expected.

    All errors are caught, because a damaged file makes json, torch or SciPy raise almost anything.
    So a block should be short: a mistake in its own code, too, looks like a fault of the file.
    """
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise error_type(f"{path}: no such file; expected {what}") from None
    except KeyError as error:
        raise error_type(f"{path}: expected {what}, found no entry {error}") from None
    except Exception as error:
        raise error_type(f"{path}: expected {what}; {type(error).__name__}: {error}") from None


@contextmanager
def written_whole(path):
    """Gives a place to write a file or a folder to; at the end of the block it moves to `path`.

    So nobody ever finds half of it. If several programs write one path at once, the last file
    stays; of folders the first one stays, and the other programs get an error. Raises DataError if
    the path cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_old_drafts(path)
        new_draft_folder = tempfile.TemporaryDirectory(
            prefix=f"{path.name}.{os.getpid()}.", suffix=".draft", dir=path.parent)
        with new_draft_folder as folder, locked(Path(folder) / "lock"):
            draft = Path(folder) / path.name
            yield draft
            if draft.is_file():
                with open(draft, "rb+") as file:
                    os.fsync(file.fileno())  # on the disk before an older file goes
            os.replace(draft, path)
    except OSError as error:
        raise not_written(path, error.strerror) from None
    except RuntimeError as error:
        if TORCH_CANNOT_WRITE not in str(error):
            raise
        raise not_written(path, "the disk is full, or a quota or a limit of file sizes (ulimit -f) "
                                "is reached") from None


def remove_old_drafts(path):
    """Removes what killed programs have left of `path`: the drafts whose lock nobody holds."""
    for lock in path.parent.glob(f"{escape(path.name)}.*.????????.draft/lock"):
        if f".{os.getpid()}." in lock.parent.name:  # this program's own, which no lock keeps out
            continue
        with suppress(OSError, DataError):  # its program runs, or another one has just removed it
            with open(lock, "a", encoding="utf-8") as file:
                if is_locked_by_us(file):
                    shutil.rmtree(lock.parent)


def locked_folder(folder):
    """Makes a folder, unless it is there, and locks it -> its lock, an open file.

    Raises DataError if another program has locked it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return locked(folder / ".lock")
    except OSError as error:
        raise not_written(folder, error.strerror) from None


def check_empty(folder):
    """Raises DataError if there is anything in a folder but hidden files."""
    found = sorted(name for name in os.listdir(folder) if name[0] != ".")
    if found:
        raise DataError(f"{folder}: expected a new or an empty folder, found {found[0]} in it")


def locked(path):
    """Opens a lock file. While it is open, a second program that opens it gets a DataError."""
    check_regular(path)
    file = open(path, "a", encoding="utf-8")
    try:
        is_locked_by_us(file)
    except DataError:
        file.close()
        raise
    return file


def is_locked_by_us(file):
    """Locks an open file; False where there are no locks: on Windows and some network disks.

    Raises DataError if another program has locked the file.
    """
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, PermissionError):
        folder = Path(file.name).parent
        raise DataError(f"{folder}: expected that no other program uses it") from None
    except (ImportError, OSError):
        return False


def not_written(path, why):
    """The error for a file or a folder that cannot be written."""
    megabytes = free_space(path) / 1e6
    return DataError(f"{path}: cannot be written: {why}; {megabytes:,.0f} MB are free there")


def folders_below(folder, levels=math.inf):
    """A folder and the folders below it, at most so many levels deep, each of them once.

    Links are followed after all other folders: so a folder has its own path, and links that lead
    in circles end. A folder that cannot be read is named on stderr.
    """
    waiting = deque([(str(folder), 0)])
    visited = set()
    while waiting:
        place, level = waiting.popleft()
        try:
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            report(f"{place}: cannot be read: {error.strerror}; skipped")
            continue
        yield place
        if level == levels:
            continue
        for entry in entries:
            is_folder = os.path.isdir(entry.path)  # False for a link to itself
            if is_folder and entry.is_symlink():
                waiting.append((entry.path, level + 1))
            elif is_folder:
                waiting.appendleft((entry.path, level + 1))


def free_space(path):
    """Bytes that are free where a file or a folder is or will be."""
    path = Path(path).absolute()
    for folder in (path, *path.parents):
        if os.path.exists(folder):  # which is False, not an error, in another user's folder
            return shutil.disk_usage(folder).free
    return 0  # a drive that is not there


def read_json(path, json_type, what):
    """The content of a JSON file, which must be of json_type: list, or dict for an object."""
    name = "list" if json_type is list else "object"
    with expecting(path, f"{what}, a JSON {name}"):
        check_regular(path)
        data = Path(path).read_bytes()
        if data.startswith(PACKED):
            raise ValueError("found a packed file; unpack it first")
        content = json.loads(data)
        if not isinstance(content, json_type):
            raise DataError(f"{path}: expected {what}, a JSON {name}, found {content!r:.40}")
        return content


def check_regular(path):
    """Raises DataError for a pipe or a device: reading from one may never end."""
    if not os.path.isfile(path) and os.path.exists(path):
        raise DataError(f"{path}: expected a file, found a folder, a pipe or a device")


def write_json(path, content, indent=None):
    """Writes a JSON file as a whole. Raises DataError for numbers that are not finite."""
    with expecting(path, "finite numbers to write"):
        text = json.dumps(content, indent=indent, allow_nan=False)
    with written_whole(path) as draft:
        draft.write_text(text, "utf-8")


@lru_cache(maxsize=None)
def report(message):
    """Prints a line on stderr, once: a file is read for each of its splits."""
    print(one_line(message), file=sys.stderr)


def progress(items, what):
    """The items, one after the other. Every few seconds a line on stderr says how many are done."""
    last = time.monotonic()
    end = "    \r" if sys.stderr.isatty() else "\n"
    for place, item in enumerate(items):
        if time.monotonic() - last > 5:
            last = time.monotonic()
            print(f"{what}: {place} of {len(items)}", end=end, file=sys.stderr, flush=True)
        yield item


# === Appendix: JSON records to arrays; skip on a first reading ====================================

# COCO's files hold lists of records, such as {"id": 7, "bbox": [2, 3, 40, 90]}. Here one field of
# all records becomes one array. A record that does not fit is an error that names it:
#     read_columns(records, {"id": ID, "bbox": BOX}, "FILE: annotation")
# gives {"id": an array (records,), "bbox": an array (records, 4)}.

@dataclass(frozen=True)
class Kind:
    """What a field must hold in each record."""
    words: str  # "one integer", as errors call what they expected
    dtype: type
    shape: tuple = ()


def finite_numbers(*shape, dtype=float):
    """The Kind of a field with an array of this shape."""
    count = "×".join(str(length) for length in shape)
    return Kind(f"{count} finite numbers", dtype, shape)


ID = Kind("one integer", int)
NUMBER = Kind("one finite number", float)
BOX = finite_numbers(4)
TEXT = Kind("one text", object)
FLAG = Kind("one flag (0 or 1)", bool)

FARTHEST = 1e6  # pixels: no coordinate is beyond

# What Python raises if a record is not what the code expects
BROKEN = (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError)


def read_columns(records, kinds, name):
    """A list of records -> {field: array}, for `kinds`, {field: its Kind}.

    name: what the records are called in errors, such as "FILE: annotation".
    Raises a DataError that names the first record that does not hold what its Kind says.
    """
    return {field: column(records, field, kind, name) for field, kind in kinds.items()}


def column(records, field, kind, name):
    """One field of all records as an array (records, *shape), otherwise like `read_columns`."""
    if not records:
        return np.zeros((0, *kind.shape), kind.dtype)
    try:
        return to_array([record[field] for record in records], kind)  # all at once, which is fast
    except BROKEN:
        for place, record in enumerate(records):  # one by one, to find the wrong one
            check_field(record, field, kind, f"{name} {place}")
        raise  # none is wrong by itself


def to_array(values, kind):
    """An array of values. Raises one of the errors in BROKEN if they are not of this Kind."""
    if kind.dtype is object:
        if not all(isinstance(value, str) for value in values):
            raise TypeError("not a text")
        return np.array(values, object)
    numbers = np.array(values)
    if numbers.dtype.kind not in "biuf" or numbers.shape[1:] != kind.shape:
        raise ValueError("not numbers, or not so many")
    with np.errstate(all="ignore"):
        array = numbers.astype(kind.dtype, copy=False)
    if not np.isfinite(array).all():
        raise ValueError("not finite")
    is_rounded = kind.dtype in (int, bool) and (array != numbers).any()
    if is_rounded:  # 7.5 is not an integer
        raise ValueError("not an integer")
    return array


def check_field(record, field, kind, name):
    """Raises a DataError if a record does not hold what it should. name: what errors call it."""
    try:
        to_array([record[field]], kind)
    except BROKEN:
        name += ids_in(record)
        found = found_in(record, field)
        raise DataError(f"{name}: expected {kind.words} in '{field}', found {found}") from None


def ids_in(record):
    """The ids in a record as the end of its name in an error: ", id 7, image_id 3"."""
    if not isinstance(record, dict):
        return ""
    ids = [f", {key} {str(record[key]):.80}" for key in ("id", "image_id") if key in record]
    return "".join(ids)


def found_in(record, field):
    """What a record holds in place of what was expected, in a few words."""
    if not isinstance(record, dict) or field not in record:
        return "nothing"
    value = record[field]
    if not isinstance(value, list):
        return f"{value!r:.80}"
    for item in value:
        is_finite = isinstance(item, (int, float)) and abs(item) < np.inf
        if not is_finite:
            return f"{len(value)} values, among them {item!r}"[:80]
    return f"{len(value)} values"


# === Appendix: COCO and Human-Art; skip on a first reading ========================================

# A folder or file in COCO's format becomes a PoseDataset: the file of the split is found, its
# records become arrays, and its images are looked for. `to_coco` goes the other way.

# Official names of the annotation files
COCO_FILES = {
    "train": "person_keypoints_train2017.json",
    "val": "person_keypoints_val2017.json"}
HUMAN_ART_FILES = {
    "train": "training_humanart.json",
    "val": "validation_humanart.json"}
FIGURE_FILES = {
    "train": "training_figures.json",
    "val": "validation_figures.json"}


OFFICIAL_FILES = {"figures": FIGURE_FILES, "coco": COCO_FILES, "humanart": HUMAN_ART_FILES}


def read_coco(root, split, categories=None):
    """COCO, or any other folder or file in COCO's format; of some categories, given their names."""
    return read_coco_format(root, split, COCO_FILES, categories=categories)


def read_human_art(root, split):
    """Human-Art: COCO's format, where the images of a domain are in a folder of its name."""
    return read_coco_format(root, split, HUMAN_ART_FILES, folders_are_domains=True)


def read_figures(root, split):
    """The built-in figures, in Human-Art's format."""
    return read_coco_format(root, split, FIGURE_FILES, folders_are_domains=True)


def read_coco_format(root, split, official, folders_are_domains=False, categories=None):
    """A split of a folder or file in COCO's format.

    official: {split: name of its file}.
    folders_are_domains: see `domain_of`.
    categories: names, see `chosen_categories`.
    """
    path, has_this_split_alone = annotation_file(root, official, split)
    home = root if root.is_dir() else root.parent
    dataset = read_coco_file(path, home, folders_are_domains, categories)
    if has_this_split_alone:
        return dataset
    return hold_out(dataset, split)


# ------------------------------------------------------------------------------ the file of a split

def annotation_file(root, official, split):
    """The annotation file of a split, and whether the file holds that split alone.

    official: {"train": name of its file, "val": name of its file}.
    """
    if root.is_file():
        return root, False
    folders = (root, root / "annotations")
    found = official_files(folders, official)
    if split in found and len(found) == len(official):
        return found[split], True
    if list(found) == ["val"]:  # which is not divided into parts to train and to test on
        if split == "val":
            return found["val"], True
        train, val = official["train"], official["val"]
        raise DataError(f"{root}: expected {train} to train on, found {val} alone")
    others = json_files(folders)
    if len(others) != 1:
        names = " and ".join(official.values())
        raise DataError(f"{root}: expected {names}, or a single JSON file, which 'all' needs; "
                        f"found {len(others)}")
    return others[0], False


def official_files(folders, official):
    """{split: path} of the official files that are in one of the folders."""
    found = {}
    for split, name in official.items():
        for folder in folders:
            if (folder / name).is_file():
                found[split] = folder / name
    return found


def json_files(folders):
    """The paths of all files in the folders that may hold annotations."""
    files = []
    for folder in folders:
        paths = [path for path in sorted(folder.glob("*.json")) if path.is_file()]  # no pipe
        files += [path for path in paths if holds_object(path)]
    return files


def holds_object(path):
    """Whether a JSON file holds an object, as annotations are; results are lists."""
    with open(path, "rb") as file:
        start = file.read(99)
    return start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")


# ------------------------------------------------------------------------- the split of one file

HELD_OUT = 1 / 5  # of the labelled images are for validation
LARGEST_GROUP = 1 / 3  # of the labelled images: a larger group is divided
DIGITS = re.compile(r"\d+")
ROBOFLOWS_ENDING = re.compile(r"_(jpg|jpeg|png)\.rf\.\w+$")  # differs in copies of one picture


def hold_out(dataset, split):
    """A split of a data set that has only one file: some images are held out for validation.

    Frames of a video, or pictures of one place, are so alike that all of them belong in one
    split. So images whose names differ only in the last number are held out as one group. A group
    with more than a third of the images is divided into single images. Hashes of the names decide
    which groups are held out: neither the order of the file nor the folder around all images has
    an effect.
    """
    if split == "all":
        return dataset
    labelled = np.zeros(len(dataset.files), bool)
    labelled[dataset.image_index[dataset.annotated]] = True
    if not labelled.any():  # a target without labels
        labelled[:] = True
    groups = groups_of_names(dataset.files, labelled)
    chosen = groups_to_hold_out(count_labelled(groups, labelled))
    held_out = np.array([group in chosen for group in groups])
    if split == "train":
        return select_images(dataset, ~held_out)
    report_held_out(dataset.name, groups, chosen)
    return select_images(dataset, held_out)


def groups_of_names(files, labelled):
    """The name of each image's group, a list. labelled: (images,) bool."""
    _, places = below_common_folder(files)
    names = [os.path.splitext(place)[0] for place in places]
    names = [ROBOFLOWS_ENDING.sub("", name) if ".rf." in name else name for name in names]
    groups = [without_last_number(name) for name in names]
    sizes = count_labelled(groups, labelled)
    largest = LARGEST_GROUP * labelled.sum()
    return [group if sizes[group] <= largest else name for name, group in zip(names, groups)]


def without_last_number(name):
    """"cam1_#" for "cam1_0042": in the reversed name the last number comes first."""
    return DIGITS.sub("#", name[::-1], count=1)[::-1]


def count_labelled(groups, labelled):
    """{group: how many of its images are labelled}. groups: a list. labelled: (images,) bool."""
    sizes = Counter()
    for group, counts in zip(groups, labelled.tolist()):
        sizes[group] += counts
    return sizes


def groups_to_hold_out(sizes):
    """Groups with about a fifth of the labelled images. sizes: {group: its labelled images}."""
    labelled = sum(sizes.values())
    most = max(1, LARGEST_GROUP * labelled)
    chosen = set()
    count = 0
    for group in sorted(sizes, key=hash_of_name):
        if count < HELD_OUT * labelled and count + sizes[group] <= most:
            chosen.add(group)
            count += sizes[group]
    return chosen


def hash_of_name(name):
    """Bytes that are the same on all machines, as Python's own hash is not."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def report_held_out(name, groups, chosen):
    """A line on what is held out. groups: a list, the images'. chosen: a set, the held-out ones."""
    images = sum(group in chosen for group in groups)
    line = f"{name}: {images} of {len(groups)} images are held out to test on"
    if len(chosen) < images:
        examples = ", ".join(sorted(chosen)[:3])
        line += f", in {len(chosen)} groups of alike names such as {examples}"
    else:
        line += ", one by one"
    print(line, file=sys.stderr)


# --------------------------------------------------------------------------------- a file's records

def read_coco_file(path, home, folders_are_domains, categories=None):
    """A file in COCO's format, with its skeleton.

    home: the folder that the images are in or near, see `locate_images`.
    folders_are_domains: see `domain_of`.
    categories: names, see `chosen_categories`.
    Annotations that nobody can use are skipped, and a line on stderr says how many.
    """
    content = read_json(path, dict, "COCO's annotations")
    for section in ("images", "annotations"):
        if not isinstance(content.get(section), list):
            raise DataError(
                f"{path}: not COCO keypoints: expected lists 'images' and 'annotations'")
    chosen = chosen_categories(path, content, categories)
    records = annotations_of(path, content, chosen)
    skeleton = read_skeleton(path, chosen, records)
    count = len(skeleton.names)
    images = read_columns(
        [complete_image(image, folders_are_domains) for image in content["images"]],
        {"id": ID, "file_name": TEXT, "category": TEXT, "description": TEXT},
        f"{path}: image")
    people = read_columns(
        [complete_person(person, count) for person in records],
        {"id": ID, "image_id": ID, "keypoints": finite_numbers(3 * count, dtype=np.float32),
         "bbox": BOX, "area": NUMBER, "iscrowd": FLAG},
        f"{path}: annotation")
    if not len(images["id"]):
        raise DataError(f"{path}: expected images, found none")
    files = locate_images(path, images["file_name"].tolist(), home)
    sizes = stated_sizes(content["images"])
    dataset = PoseDataset(
        name=str(path),
        skeleton=skeleton,
        files=files,
        image_ids=images["id"],
        domains=images["category"].astype(str),
        ids=people["id"],
        image_index=image_rows(path, images["id"], people["id"], people["image_id"]),
        keypoints=whole_visibilities(path, people["keypoints"].reshape(-1, count, 3)),
        boxes=people["bbox"],
        areas=people["area"],
        crowd=people["iscrowd"],
        sentences=images["description"].astype(str),
        upright=are_upright(path, files, sizes))
    dataset = without_flat_boxes(path, dataset)
    check_people(path, dataset)
    report_outside(path, dataset, sizes)
    return dataset


def annotations_of(path, content, chosen):
    """The records of annotations without those of categories that are not chosen."""
    records = content["annotations"]
    others = []
    for category in content.get("categories") or ():
        if category not in chosen and "id" in category:
            others.append(category["id"])
    if not others:
        return records
    kept = []
    for record in records:
        is_other = isinstance(record, dict) and record.get("category_id") in others
        if not is_other:
            kept.append(record)
    skipped = len(records) - len(kept)
    report_skipped(path, skipped, len(records), "annotations: they are of another category")
    return kept


def without_flat_boxes(path, dataset):
    """The data set without labelled people whose boxes have no width or height."""
    is_flat = (dataset.boxes[:, 2:] <= 0).any(1)
    is_labelled = np.isin(np.arange(len(is_flat)), dataset.annotated)
    wrong = is_flat & is_labelled
    what = "annotations: their boxes have no width or height"
    report_skipped(path, wrong.sum(), len(wrong), what)
    return dataset.select_people(~wrong) if wrong.any() else dataset


def report_skipped(path, count, total, what):
    """Says in one line how many records were skipped. what: which ones, and why."""
    if count:
        report(f"{path}: skipped {count:,} of {total:,} {what}")


def whole_visibilities(path, keypoints):
    """Keypoints (people, K, 3) whose visibilities above 0 are 1 or 2, as COCO's are.

    In other files they may be shares, or 3. What is above 0 is labelled there, too.
    """
    visibility = keypoints[:, :, 2]  # a view
    is_odd = (visibility > 0) & ~np.isin(visibility, (1, 2))
    if is_odd.any():
        report(f"{path}: visibilities such as {visibility[is_odd][0]:g} are taken as labelled")
        visibility[is_odd] = visibility[is_odd].astype(int).clip(1, 2)
    return keypoints


def complete_image(image, folders_are_domains):
    """An image's record with its domain, and with the description that a file may leave out."""
    try:
        domain = domain_of(image, folders_are_domains)
        description = str(image.get("description") or "")
        return {**image, "category": domain, "description": description}
    except BROKEN:
        return image  # `read_columns` says what is wrong


def domain_of(image, folders_are_domains):
    """The domain of an image's record: its `category`, or else its folder, or else "photo".

    folders_are_domains: whether the folder counts, as in Human-Art. In most files in COCO's format
        a folder is a split, a program's habit, or a video.
    """
    domain = image.get("category")
    if domain in (None, "") and folders_are_domains:
        domain = PureWindowsPath(str(image["file_name"])).parent.name  # knows both / and \\
        if domain.endswith("2017"):  # one of COCO's, which has no domains
            domain = ""
    return domain_name("" if domain is None else domain)


def domain_name(word):
    """The same spelling for all: "oil painting" for "oil_painting", and "photo" for nothing."""
    return str(word).replace("_", " ").strip() or "photo"


def complete_person(person, count):
    """A person's record with what a file may leave out: without keypoints none is labelled."""
    try:
        _, _, width, height = person["bbox"]
        area = person.get("area") or float(width) * float(height)
        keypoints = person.get("keypoints") or [0] * (3 * count)
        return {"iscrowd": 0, **person, "area": area, "keypoints": keypoints}
    except BROKEN:
        return person  # `read_columns` says what is wrong


def chosen_categories(path, content, names=None):
    """The records of the categories to read: those of these names or, for None, with keypoints.

    Where no category names keypoints, all are taken. Raises DataError unless the categories have
    the same keypoints.
    """
    with expecting(path, "'categories', a list of records"):
        categories = list(content.get("categories") or ())
        chosen = [category for category in categories if category.get("keypoints")] or categories
        if names is not None:
            there = [name_of(category) for category in categories]
            missing = [name for name in names if name not in there]
            if missing:
                raise DataError(f"{path}: no category {', '.join(missing)}; expected some of "
                                f"{', '.join(there)}")
            chosen = [category for category in categories if name_of(category) in names]
        keypoints = [category.get("keypoints") for category in chosen]
        are_alike = all(each == keypoints[0] for each in keypoints)
        are_boxes = names is None and len(chosen) > 1 and not keypoints[0]
        if not are_alike or are_boxes and not labelled_keypoints(content.get("annotations", ())):
            found = ", ".join(name_of(category) for category in chosen)
            raise DataError(
                f"{path}: expected 'categories' with the same names of 'keypoints', "
                f"found {found:.200}; coco:FILE#category=NAME reads one of them")
        return chosen


def name_of(category):
    """A category's name or, without a name, its id."""
    return str(category.get("name", category.get("id")))


def read_skeleton(path, categories, records):
    """The skeleton that COCO's categories have in common.

    records: the annotations. They may have only the first of its keypoints, as in Human-Art: then
        the others are left out.
    """
    with expecting(path, "'categories' with the same names of 'keypoints' in each, "
                         "and a 'skeleton' of pairs of them"):
        count = labelled_keypoints(records)
        if not categories or not categories[0].get("keypoints"):
            return nameless_skeleton(path, count)
        first = categories[0]
        names = tuple(str(name) for name in first["keypoints"])
        check_names(path, names)
        if count is None:
            count = len(names)
        edges = read_edges(first.get("skeleton") or (), len(names[:count]))
        skeleton = make_skeleton(names[:count], edges)
    if first.get("flip_pairs"):
        pairs = read_flip_pairs(path, first["flip_pairs"], names, count)
        skeleton = replace(skeleton, flip_pairs=pairs)
    return skeleton


def nameless_skeleton(path, count):
    """The skeleton of `count` keypoints that a file does not name; None if nobody has any."""
    if count in (None, len(COCO17.names)):
        if count:
            report(f"{path}: the categories name no keypoints; the {count} are taken as COCO's")
        return COCO17
    report(f"{path}: the categories name no keypoints; the {count} get numbers as names")
    return unnamed_skeleton(count)


def check_names(path, names):
    """Raises DataError for keypoints whose names are alike, such as L_Eye and left_eye."""
    plain = plain_names(names)
    for joint, name in enumerate(plain):
        first = plain.index(name)
        if first != joint:
            raise DataError(f"{path}: expected 'keypoints' with different names, found "
                            f"{names[first]!r} and {names[joint]!r}, which are alike")


def read_edges(pairs, count):
    """COCO's pairs of keypoints, counted from 1, as pairs that are counted from 0.

    A pair with a 0 shows that the file counts from 0. Pairs beyond `count` are left out.
    """
    edges = [(a, b) for a, b in pairs]
    first = 0 if any(0 in edge for edge in edges) else 1
    inside = [edge for edge in edges if first <= min(edge) and max(edge) < count + first]
    return [(a - first, b - first) for a, b in inside]


def read_flip_pairs(path, pairs, names, count):
    """Pairs of names as pairs of indices. Pairs beyond the first `count` names are left out."""
    with expecting(path, "'flip_pairs' of keypoints' names, such as [['left_eye', 'right_eye']]"):
        in_pairs = [name for a, b in pairs for name in (a, b)]
        if len(set(in_pairs)) < len(in_pairs) or not all(isinstance(n, str) for n in in_pairs):
            raise ValueError(f"found {pairs!r:.80}")
        found = sorted(sorted((names.index(a), names.index(b))) for a, b in pairs)
        return tuple((a, b) for a, b in found if b < count)


def labelled_keypoints(records):
    """How many keypoints the people have, as the first one shows that has any; None if nobody."""
    for person in records:
        if not isinstance(person, dict):
            continue  # `read_columns` says what is wrong, here and below
        values = person.get("keypoints")  # x, y and v of each keypoint
        if isinstance(values, list) and values and len(values) % 3 == 0:
            return len(values) // 3
    return None


def image_rows(path, image_ids, ids, owners):
    """The row of each annotation's image, (annotations,).

    image_ids: (images,).
    ids, owners: (annotations,) ids of the annotations, and of the images that they are in.
    Raises DataError if an id is there twice, or if an image is not there.
    """
    check_unique(image_ids, f"{path}: image")
    check_unique(ids, f"{path}: annotation")
    order = np.argsort(image_ids)
    places = np.searchsorted(image_ids, owners, sorter=order)
    rows = order[places.clip(max=len(order) - 1)]
    lost = image_ids[rows] != owners
    if lost.any():
        place = lost.argmax()
        raise DataError(
            f"{path}: annotation id {ids[place]}: no image has its image_id {owners[place]}")
    return rows


def check_unique(ids, name):
    """Raises DataError if an id is there twice. name: what has the ids, "FILE: image"."""
    unique, counts = np.unique(ids, return_counts=True)
    repeated = unique[counts > 1]
    if len(repeated):
        raise DataError(f"{name} id {repeated[0]} appears more than once")


def check_people(path, dataset):
    """Raises DataError for wrong numbers, and for a box without area if it is to be trained on."""
    points = dataset.keypoints
    boxes = dataset.boxes
    is_near = (np.abs(points) <= FARTHEST).all((1, 2)) & (np.abs(boxes) <= FARTHEST).all(1)
    is_unknown = ~np.isin(points[:, :, 2], (0, 1, 2))  # (people, K)
    if is_unknown.any():
        row, joint = np.argwhere(is_unknown)[0]
        raise DataError(
            f"{path}: annotation id {dataset.ids[row]}: expected a visibility of 0, 1 or 2 of "
            f"{dataset.skeleton.names[joint]!r}, found {points[row, joint, 2]:g}")
    is_empty = (boxes[:, 2:] <= 0).any(1)
    is_annotated = np.isin(np.arange(len(boxes)), dataset.annotated)
    problems = {
        "a number that is not finite, or beyond a million":
            ~is_near | ~np.isfinite(dataset.areas),
        "a box of zero or negative size": is_annotated & is_empty}
    for problem, wrong in problems.items():
        if wrong.any():
            row = wrong.argmax()
            box = boxes[row].tolist()
            raise DataError(f"{path}: annotation id {dataset.ids[row]} has {problem}: bbox {box}")


# ---------------------------------------------------------------------------- the sizes of images

COMPARED_IMAGES = 1000  # at most so many images are opened to compare their sizes
FAR_OUTSIDE = 0.1  # of an image's longer side: a keypoint further outside is counted


def stated_sizes(records):
    """(images, 2) the width and height that the images' records state; 0, 0 if they do not."""
    sizes = np.zeros((len(records), 2))
    for row, record in enumerate(records):
        width = record.get("width")
        height = record.get("height")
        are_numbers = isinstance(width, (int, float)) and isinstance(height, (int, float))
        if are_numbers and 0 < width <= FARTHEST and 0 < height <= FARTHEST:
            sizes[row] = width, height
    return sizes


def are_upright(path, files, sizes):
    """Whether the annotations are of the images as EXIF turns them, as their stated sizes tell.

    sizes: (images, 2) from `stated_sizes`. Those of at most COMPARED_IMAGES images are compared.
    Raises DataError if more than one of a hundred has neither the stored nor the turned size, or if
    the images disagree.
    """
    rows = np.flatnonzero(sizes[:, 0])
    rows = rows[::max(1, math.ceil(len(rows) / COMPARED_IMAGES))].tolist()
    stated = {row: tuple(sizes[row].astype(int).tolist()) for row in rows}
    found = {}
    for row in rows:
        with suppress(DataError):  # an image that cannot be read is an error only later
            found[row] = picture_size(files[row], upright=False)
    others = [row for row in found if found[row] != stated[row]]
    turned = [row for row in others if picture_size(files[row]) == stated[row]]
    wrong = [row for row in others if row not in turned]
    if wrong:
        first = wrong[0]
        width, height = found[first]
        message = (f"{path}: {files[first]} has {width}×{height} pixels, but 'width' and 'height' "
                   f"say {stated[first][0]}×{stated[first][1]}")
        if len(wrong) > len(found) / 100:
            raise DataError(f"{message}; if the labels fit the image, correct these")
        report(f"{message}; the labels are taken as they are")
    if not turned:
        return False
    for row in found:
        if found[row] == stated[row] != picture_size(files[row]):
            raise DataError(
                f"{path}: by 'width' and 'height' {files[turned[0]]} is annotated as its EXIF "
                f"orientation turns it, but {files[row]} is not: expected one way for all")
    report(f"{path}: its images are read as their EXIF orientation turns them, because their "
           "sizes are stated so")
    return True


def report_outside(path, dataset, sizes):
    """Says how many labelled keypoints lie far outside their images, where the sizes are stated."""
    size = sizes[dataset.image_index]  # (people, 2)
    longer = size.max(1)
    margin = FAR_OUTSIDE * longer[:, None, None]
    points = dataset.keypoints[:, :, :2]
    is_outside = ((points < -margin) | (points > size[:, None] - 1 + margin)).any(2)
    labelled = (dataset.keypoints[:, :, 2] > 0) & (longer > 0)[:, None]
    count = (labelled & is_outside).sum()
    if count:
        person = (labelled & is_outside).any(1).argmax()
        report(f"{path}: {count} of {labelled.sum()} labelled keypoints lie far outside their "
               f"images, first in annotation id {dataset.ids[person]}: perhaps they are for "
               "images of another size, or for images as EXIF turns them")


# ----------------------------------------------------------------------------- where the images are

SEARCHED_IMAGES = 10  # so many images are in the folder that is looked for
SEARCHED_LEVELS = 3  # of folders


def locate_images(path, file_names, home):
    """Full paths of the images that the annotation file `path` names.

    They are in `home`, in the folder around it, or in a folder of a usual name in either. If the
    first ones are in none of these, `search_images` looks for their folder. Leading folders in the
    names that do not exist here (Human-Art's `HumanArt/images/`) are left out.
    Raises DataError for an image that is nowhere, and for two names of one image.
    """
    folders = []
    for place in (home, home.parent):
        for name in ("", "images", "train2017", "val2017"):
            folders.append(str(place / name))
    places = [place_below(path, name, home.parent) for name in file_names]
    leading = ()  # folders that do not exist here
    last_folder = folders[0]  # where the image before is: most likely this one is there, too
    files = []
    for row, place in enumerate(places):
        if place[:len(leading)] != leading:
            leading = ()
        rest = place[len(leading):]
        folder = folder_with(rest, [last_folder, *folders])
        if folder is None:
            folder, rest = with_other_letters(rest, [last_folder, *folders])
        if folder is None:
            folder, rest = without_leading(place, folders)
        if folder is None and row == 0:
            folder, rest = search_images(path, places[:SEARCHED_IMAGES], folders)
        if folder is None:
            raise DataError(
                f"{path}: image {file_names[row]!r} is missing; looked in {', '.join(folders)}")
        leading = place[:len(place) - len(rest)]
        files.append(os.path.join(folder, *rest))
        last_folder = folder
    check_shared_images(path, places, files)
    return files


def place_below(path, file_name, top):
    """An image's folders and name, such as ("images", "sketch", "a.jpg"), below unknown folders.

    A name with ".." or of a whole path, such as "C:/a.jpg", is that file if it is in the folder
    `top`: then its whole path is returned. Otherwise all up to ".." or "C:" is left out.
    """
    place = PureWindowsPath(file_name)  # knows both / and \\
    if ".." not in place.parts and not place.anchor:
        return place.parts
    base = path if path.is_dir() else path.parent
    there = os.path.abspath(base / file_name.replace("\\", "/"))
    if os.path.isfile(there) and Path(there).is_relative_to(top.absolute()):
        return Path(there).parts
    parts = place.relative_to(place.anchor).parts
    while ".." in parts:
        parts = parts[parts.index("..") + 1:]
    return parts


def with_other_letters(place, folders):
    """The folder that has an image, and the image's place below as that folder spells the name.

    Unicode has two ways to write é, one letter or two, and a Mac may have changed one into the
    other. (None, place) if nobody has it.
    """
    for form in ("NFC", "NFD"):
        spelled = tuple(unicodedata.normalize(form, part) for part in place)
        folder = folder_with(spelled, folders)
        if folder is not None:
            return folder, spelled
    return None, place


def without_leading(place, folders):
    """The folder that has an image, and the image's place below without leading folders.

    A leading folder is left out only if it does not exist here. (None, place) if nobody has it.
    """
    for count in range(1, len(place)):
        exists = any(os.path.isdir(os.path.join(folder, *place[count - 1:-1]))
                     for folder in folders)
        if exists:  # but the image is not in it
            break
        folder = folder_with(place[count:], folders)
        if folder is not None:
            return folder, place[count:]
    return None, place


def search_images(path, places, folders):
    """The folder of the first images of an annotation file, and the first one's place below it.

    It is looked for below the file's folder and, where that has annotations alone, below its
    parent. It holds all of `places`, perhaps without leading folders. (None, place) if no folder
    does, or if one of the images is in one of `folders`: then only the others are missing.
    Raises DataError if there are several such folders.
    """
    first = places[0]
    if any(folder_with(place, folders) for place in places):
        return None, first
    base = path if path.is_dir() else path.parent
    tops = [base] if has_folders_or_images(base) else [base, base.parent]
    for top in tops:
        below = sorted(folders_below(top, SEARCHED_LEVELS))
        for count in range(len(first)):
            rests = [place[count:] for place in places]
            found = [folder for folder in below
                     if all(folder_with(rest, [folder]) for rest in rests)]
            if len(found) > 1:
                raise DataError(f"{path}: image {'/'.join(first)!r} is in several folders, in "
                                f"{' and '.join(found[:3])}; expected such a folder in 'file_name'")
            if found:
                report(f"{path}: its images are in {found[0]}")
                return found[0], first[count:]
    return None, first


def has_folders_or_images(folder):
    """Whether a folder has more than files of annotations."""
    for name in os.listdir(folder):
        _, ending = os.path.splitext(name)
        if os.path.isdir(os.path.join(folder, name)) or ending.lower() in image_endings():
            return True
    return False


def check_shared_images(path, places, files):
    """Raises DataError if two images of different places are one file."""
    place_of = {}
    for place, file in zip(places, files):
        other = place_of.setdefault(file, place)
        if other != place:
            raise DataError(f"{path}: images {'/'.join(other)!r} and {'/'.join(place)!r} are both "
                            f"{file}: expected different folders")


def folder_with(place, folders):
    """The first of the folders that has a file at this place below it, or None."""
    for folder in folders:
        if os.path.isfile(os.path.join(folder, *place)):
            return folder
    return None


# ------------------------------------------------------------------------------------------ writing

def to_coco(dataset, category="person"):
    """The people of a PoseDataset as COCO's annotations, for `read_coco` and for pycocotools."""
    _, names = below_common_folder(dataset.files)
    images = []
    for number, name, domain in zip(dataset.image_ids, names, dataset.domains):
        images.append({"id": int(number), "file_name": name, "category": str(domain)})
    annotations = []
    for row, number in enumerate(dataset.ids):
        keypoints = dataset.keypoints[row]
        if number == 0:  # pycocotools takes 0 for nobody
            number = dataset.ids.max() + 1
        annotations.append({
            "id": int(number),
            "category_id": 1,
            "image_id": int(dataset.image_ids[dataset.image_index[row]]),
            "keypoints": keypoints.ravel().tolist(),
            "num_keypoints": int((keypoints[:, 2] > 0).sum()),
            "bbox": dataset.boxes[row].tolist(),
            "area": float(dataset.areas[row]),
            "iscrowd": int(dataset.crowd[row])})
    names = dataset.skeleton.names
    categories = [{
        "id": 1,
        "name": category,
        "keypoints": list(names),
        "skeleton": [[a + 1, b + 1] for a, b in dataset.skeleton.edges]}]  # COCO counts from 1
    pairs = dataset.skeleton.flip_pairs
    if pairs != pairs_of_sides(names):
        categories[0]["flip_pairs"] = [[names[a], names[b]] for a, b in pairs]
    return {
        "info": {},  # older programs need it, and the licences
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": categories}


# === Appendix: LSP, SURREAL and Human3.6M; skip on a first reading ================================

# Images with one person each. The crop is the whole image, as in RegDA's code: LSP has no boxes,
# and boxes around the joints would give the target's labels away.

LARGEST_MATLAB = 10 ** 7  # numbers in an array: a file of a megabyte may unpack to gigabytes
LSP_JOINTS = [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15, 8, 9]  # in BODY16
# BODY16 in SURREAL, as RegDA takes it: the shoulders are SMPL's collars
SMPL_JOINTS = [7, 4, 1, 2, 5, 8, 0, 9, 12, 15, 20, 18, 13, 14, 19, 21]
REGDA_TEST = 3200  # at most so many images are for testing


def read_lsp(root, split):
    """LSP, `lsp`: the second half of its images is held out for testing. Hidden joints count."""
    path, keypoints = read_lsp_joints(root)
    rows = np.arange(len(keypoints))
    middle = len(rows) // 2
    if split == "train":
        rows = rows[:middle]
    if split == "val":
        rows = rows[middle:]
    return lsp_images(path, keypoints, rows)


def read_lsp_regda(root, split):
    """LSP as in the papers, `lsp-regda`: all images in each split, without their hidden joints."""
    path, keypoints = read_lsp_joints(root)
    hidden = keypoints[:, :, 2] == 1
    keypoints[hidden] = 0
    return lsp_images(path, keypoints, np.arange(len(keypoints)))


def read_lsp_joints(root):
    """LSP's joints.mat and the keypoints (images, 16, 3) in it."""
    path = root / "joints.mat" if root.is_dir() else root
    what = "'joints' (3, 14, 2000)"
    joints = load_matlab(path, "joints", what)
    if joints.ndim != 3 or joints.shape[:2] != (3, 14) or joints.dtype.kind not in "uif":
        raise DataError(f"{path}: expected {what}, found {joints.dtype} {joints.shape}")
    joints = joints.transpose(2, 1, 0).astype(np.float32)  # (images, 14, 3) x, y, hidden
    joints[:, :, 2] = 2 - joints[:, :, 2]
    keypoints = np.zeros((len(joints), 16, 3))
    keypoints[:, LSP_JOINTS] = joints
    return path, keypoints


def lsp_images(path, keypoints, rows):
    """The data set of some rows of LSP's images."""
    names = [f"images/im{row + 1:04}.jpg" for row in rows]
    domains = ["photo"] * len(rows)
    return single_person_dataset(path, BODY16, path.parent, names, domains, keypoints[rows])


def read_surreal(root, split):
    """SURREAL as RegDA prepares it. As there, up to 3200 of its training images are left out."""
    parts = []
    for name in ("train", "val"):
        if split in (name, "all"):
            for run in range(3):
                parts.append((f"{name}/run{run}.json", f"{name}/run{run}"))
    names, keypoints = read_cropped(root, parts, 24, "surreal as RegDA prepares it")
    rows = list(range(len(names)))
    if split == "train":
        random.Random(42).shuffle(rows)
        held_out = min(len(rows) // 5, REGDA_TEST)
        rows = rows[held_out:]
    names = [names[row] for row in rows]
    keypoints = keypoints[rows][:, SMPL_JOINTS]
    return single_person_dataset(root, BODY16, root, names, ["render"] * len(rows), keypoints)


def read_human36m(root, split):
    """Human3.6M as RegDA prepares it: subjects 1 and 5 to 8, and 3200 frames of 9 and 11."""
    subjects = {"train": (1, 5, 6, 7, 8), "val": (9, 11), "all": (1, 5, 6, 7, 8, 9, 11)}
    parts = []
    for subject in subjects[split]:
        parts.append((f"annotations/keypoints2d_{subject}.json", "crop_images"))
    names, keypoints = read_cropped(root, parts, 16, "human36m as RegDA prepares it")
    rows = list(range(len(names)))
    if split == "val" and len(rows) > REGDA_TEST:
        rows = random.Random(42).choices(rows, k=REGDA_TEST)
    names = [names[row] for row in rows]
    return single_person_dataset(root, BODY16, root, names, ["photo"] * len(rows), keypoints[rows])


def read_cropped(root, parts, count, what):
    """File names and keypoints (images, count, 3) of parts: (JSON file, folder of images).

    All keypoints are visible.
    """
    names = []
    points = []
    kinds = {"name": TEXT, "keypoint2d": finite_numbers(count, 2, dtype=np.float32)}
    for annotations, folder in parts:
        path = root / annotations
        table = read_columns(read_json(path, list, what), kinds, f"{path}: record")
        names += [f"{folder}/{name}" for name in table["name"]]
        points.append(table["keypoint2d"])
    points = np.concatenate(points)
    visible = np.full((len(points), count, 1), 2, np.float32)
    return names, np.concatenate([points, visible], axis=2)


def load_matlab(path, variable, what):
    """An array from a MATLAB file. Raises DataError without SciPy, which reads such files."""
    try:
        from scipy.io import loadmat, whosmat
    except ImportError:
        raise DataError(f"{path}: MATLAB files need SciPy: pip install scipy") from None
    with expecting(path, f"{what} in a MATLAB file"), open(path, "rb") as file:
        for name, shape, _ in whosmat(file):
            if math.prod(shape) > LARGEST_MATLAB:
                size = "×".join(str(length) for length in shape)
                raise DataError(f"{path}: expected {what}, found {name} of {size} numbers")
        file.seek(0)
        return loadmat(file, variable_names=[variable])[variable]


def single_person_dataset(path, skeleton, home, names, domains, keypoints):
    """A data set of images with one person each. The crop is the whole image, padded to a square.

    names: file names of the images below `home`.
    keypoints: (images, K, 3). Keypoints outside the image count as not labelled.
    """
    if not len(names):
        raise DataError(f"{path}: expected images, found none")
    files = locate_images(path, names, home)
    sizes = np.zeros((len(files), 2), int)  # width, height
    for row, file in enumerate(progress(files, "reading the sizes of images")):
        with image_file(file) as image:  # which reads no pixels
            sizes[row] = image.size
    keypoints = np.array(keypoints, np.float32)
    points = keypoints[:, :, :2]
    outside = ((points < 0) | (points > sizes[:, None] - 1)).any(2)
    keypoints[outside | (keypoints[:, :, 2] == 0)] = 0
    longer = sizes.max(1, keepdims=True)
    extent = np.tile((longer - 1) / PADDING, 2)  # width, height; the crop is larger by PADDING
    left_top = (sizes - 1 - extent) / 2
    numbers = np.arange(len(files))
    dataset = PoseDataset(
        name=str(path),
        skeleton=skeleton,
        files=files,
        image_ids=numbers + 1,
        domains=np.array(domains),
        ids=numbers + 1,
        image_index=numbers,
        keypoints=keypoints,
        boxes=np.hstack([left_top, extent]),
        areas=extent.prod(1),
        crowd=np.zeros(len(files), bool))
    check_people(path, dataset)
    return dataset


# === Appendix: own pictures and boxes; skip on a first reading ====================================

# Pictures without annotations also become a PoseDataset. A picture is taken as one person, unless a
# file in COCO's results format has boxes for the pictures, which it calls by their names.

PICTURE = "picture"  # the domain of own pictures, since nobody has said what they show


def read_folder(root, split):
    """All images in a folder, without labels, in each split.

    The people are in the folder's boxes.json. Without this file each picture is one person.
    """
    pictures = read_pictures(find_pictures([root]), f"pictures:{root}")
    if (root / "boxes.json").is_file():
        rows_of_names = picture_rows(pictures.files)
        rows, boxes, _ = read_boxes(root / "boxes.json", rows_of_names, category=None)
        report_boxes_outside(root / "boxes.json", pictures, rows, boxes)
        pictures = with_boxes(pictures, rows, boxes)
    return pictures


# ----------------------------------------------------------------------------------------- pictures

def find_pictures(patterns):
    """Paths of the images in files, in folders and below, and in patterns such as *.png.

    Files in folders that are no images, by their names, are counted on stderr.
    """
    files = []
    for pattern in map(str, patterns):
        if os.path.isfile(pattern):
            found = [pattern]
        elif os.path.isdir(pattern):
            found = pictures_below(pattern)
        else:
            found = sorted(str(Path(file)) for file in files_that_fit(pattern))
        if not found:
            raise DataError(f"{pattern}: no such image, no folder with images, "
                            "and no pattern that fits any")
        files += found
    return list(dict.fromkeys(files))  # each once


def pictures_below(folder):
    """The paths of the images in a folder and below, sorted. Other files are said to be skipped."""
    pictures = []
    others = []
    for place in folders_below(folder):
        for name in os.listdir(place):
            file = os.path.join(place, name)
            _, ending = os.path.splitext(name)
            if name.startswith(".") or name == "boxes.json" or os.path.isdir(file):
                continue
            if ending.lower() in image_endings():
                pictures.append(file)
            else:
                others.append(os.path.relpath(file, folder))
    if others:
        names = ", ".join(sorted(others)[:5]) + (", ..." if len(others) > 5 else "")
        count = len(others) + len(pictures)
        report(f"{folder}: skipped {len(others)} of {count} files, whose names do not end as "
               f"those of images do: {names}")
    return sorted(pictures)


def files_that_fit(pattern):
    """Paths that fit a pattern, where `**` stands for any folders, each of them once.

    Python's glob would go through links that lead in circles again and again.
    """
    start, *rest = re.split(r"(?:^|(?<=[/\\]))\*\*(?:[/\\]|$)", pattern, maxsplit=1)
    if not rest:
        return glob(pattern)
    found = []
    for home in glob(start or "."):
        for folder in folders_below(home):
            is_hidden = os.sep + "." in folder[len(home) - 1:]
            if not is_hidden:
                found += files_that_fit(os.path.join(escape(folder), rest[0] or "*"))
    return found


def read_pictures(files, name="pictures", skeleton=COCO17, strict=False):
    """Pictures, numbered from 1, each taken as one person.

    A picture that cannot be read is named on stderr and skipped; if `strict`, it is an error.
    """
    problems = unreadable(files)
    for problem in problems.values():
        if strict:
            raise DataError(problem)
        print(f"{problem}; skipped", file=sys.stderr)
    good = [file for file in files if file not in problems]
    if not good:
        raise DataError(f"{name}: expected pictures, found none that can be read")
    if problems:
        print(f"{name}: skipped {len(problems)} of {len(files)}", file=sys.stderr)
    boxes = np.zeros((len(good), 4))
    for row, file in enumerate(good):
        width, height = picture_size(file)
        boxes[row] = 0, 0, width, height
    return with_boxes(picture_dataset(good, skeleton, name), np.arange(len(good)), boxes)


def unreadable(files):
    """{file: what is wrong} of the files of which no picture can be decoded."""
    problems = {}
    for file in progress(files, "checking pictures"):
        try:
            open_image(file, max_shrink=8, upright=True)
        except DataError as error:
            problems[file] = str(error)
    return problems


def picture_size(file, upright=True):
    """(width, height) of a picture, turned as its EXIF orientation says or, if not, as stored."""
    with image_file(file) as image:
        width, height = image.size
        if not upright or image.format == "TIFF":  # Pillow turns TIFFs itself
            return width, height
        if exif_orientation(image) in range(5, 9):  # it lies on its side
            return height, width
        return width, height


def format_if_turned(file):
    """The format of a picture, such as "JPEG", if EXIF says to turn or to mirror it; else None."""
    with image_file(file) as image:
        return image.format if exif_orientation(image) in range(2, 9) else None


def exif_orientation(image):
    """What EXIF says about a Pillow image: 1 is upright, 2 to 8 are turned or mirrored."""
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def picture_dataset(files, skeleton, name="pictures"):
    """A data set of pictures (paths or Pillow images) without people: `with_boxes` adds them."""
    return PoseDataset(
        name=name,
        skeleton=skeleton,
        files=files,
        image_ids=np.arange(1, len(files) + 1),
        domains=np.full(len(files), PICTURE),
        ids=np.zeros(0, int),
        image_index=np.zeros(0, int),
        keypoints=np.zeros((0, len(skeleton.names), 3), np.float32),
        boxes=np.zeros((0, 4)),
        areas=np.zeros(0),
        crowd=np.zeros(0, bool),
        upright=True)


def with_boxes(dataset, image_index, boxes):
    """The data set with other people, who are unlabelled.

    image_index: (people,) the row of each person's image.
    boxes: (people, 4).
    """
    count = len(boxes)
    return replace(
        dataset,
        ids=np.arange(1, count + 1),
        image_index=image_index,
        keypoints=np.zeros((count, len(dataset.skeleton.names), 3), np.float32),
        boxes=boxes,
        areas=boxes[:, 2] * boxes[:, 3],
        crowd=np.zeros(count, bool))


# -------------------------------------------------------------------------------------------- boxes

def read_boxes(path, rows, category=1):
    """A detector's boxes in COCO's results format, of a category or (None) of all.

    rows: {image_id: row of the image}. The image_id of an own picture is its file name, see
        `picture_rows`. Boxes of other images are skipped, and a line on stderr says how many.
    Returns rows of images (boxes,), boxes (boxes, 4) and scores (boxes,).
    Raises DataError for a wrong record, and if no box is left.
    """
    records = []
    for record in read_json(path, list, "boxes in COCO's results format"):
        given = record if isinstance(record, dict) else {}  # `read_columns` says what is wrong
        records.append({"score": 1, "category_id": 1, **given})
    table = read_columns(
        records, {"bbox": BOX, "score": NUMBER, "category_id": ID}, f"{path}: box")
    image_index = images_of_boxes(path, records, rows)
    check_boxes(path, table["bbox"])
    is_here = image_index >= 0
    has_size = (table["bbox"][:, 2:] > 0).all(1)
    is_used = is_here & has_size
    categories = sorted(set(table["category_id"].tolist()))
    if category is not None and categories == [0]:
        report(f"{path}: category 0, the only one, is taken as category {category}")
    elif category is not None:
        is_used &= table["category_id"] == category
    others = (~is_here).sum()
    if records and not is_here.any():
        raise DataError(f"{path}: expected the image_id of a picture, such as "
                        f"{next(iter(rows))!r}, found none in {len(records)} boxes; the first one "
                        f"has {records[0]['image_id']!r:.80}")
    if not is_used.any():
        raise DataError(f"{path}: expected boxes of category {category or 'any'}, found "
                        f"categories {str(categories):.80}, and {others} boxes of other images")
    report_skipped(path, others, len(records), "boxes: they are of other images")
    flat = (is_here & ~has_size).sum()
    report_skipped(path, flat, len(records), "boxes: they have no width or height")
    return image_index[is_used], table["bbox"][is_used], table["score"][is_used]


def report_boxes_outside(path, dataset, rows, boxes):
    """Says how many of a file's first thousand boxes have no part in their pictures.

    rows (boxes,): of the pictures.
    """
    rows = rows[:COMPARED_IMAGES]
    boxes = boxes[:COMPARED_IMAGES]
    outside = 0
    for row in np.unique(rows):
        left, top, width, height = boxes[rows == row].T
        with suppress(PictureError):  # it is named where the pictures are read
            right, bottom = picture_size(dataset.files[row], dataset.upright)
            inside = (-width < left) & (left < right) & (-height < top) & (top < bottom)
            outside += np.count_nonzero(~inside)
    if outside:
        report(f"{path}: {outside:,} of {len(boxes):,} boxes lie outside their pictures: perhaps "
               "they are for pictures of another size")


def images_of_boxes(path, records, rows):
    """The row of each box's image, (boxes,); -1 if `rows` has no such image."""
    image_index = np.full(len(records), -1)
    for place, record in enumerate(records):
        image_id = record.get("image_id")
        if isinstance(image_id, float) and image_id.is_integer():  # as pandas writes them
            image_id = int(image_id)
        if not isinstance(image_id, (int, str)):
            raise DataError(f"{path}: box {place}: expected an 'image_id' (or a file's name), "
                            f"found {image_id!r:.80}")
        row = rows.get(image_id, -1)
        if row is None:
            raise DataError(
                f"{path}: box {place}: two pictures are called {image_id}; expected folders")
        image_index[place] = row
    return image_index


def check_boxes(path, boxes):
    """Raises DataError for a box (4,) of boxes (boxes, 4) that is far away."""
    is_far = (np.abs(boxes) > FARTHEST).any(1)
    if is_far.any():
        place = is_far.argmax()
        raise DataError(f"{path}: box {place}: expected a 'bbox' [x, y, w, h] of at most a "
                        f"million pixels, found {boxes[place]}")


def picture_rows(files):
    """{name: row} of pictures, for all names by which a file of boxes may call them.

    The names of album/one/7.jpg in a folder album are "one/7.jpg", "one/7", "7.jpg", "7" and the
    number 7. The row is None if several pictures have the name.
    """
    _, places = below_common_folder(files)
    rows = {}
    for row, place in enumerate(places):
        for name in short_names(place):
            rows[name] = None if name in rows else row
    for row, place in enumerate(places):  # whole places come first: they are never shared
        rows[place] = row
    return rows


def short_names(place):
    """What may stand for a picture's file name in part: one/7, 7.jpg, 7 and 7 as a number."""
    path = PurePosixPath(place)
    names = {str(path.with_suffix("")), path.name, path.stem} if path.name else set()
    if path.stem.isdecimal():
        names.add(int(path.stem))
    return names


def image_names(dataset):
    """{id or file name: row} of a data set's images. A number always is an id."""
    rows = {}
    for name, row in picture_rows(dataset.files).items():
        if isinstance(name, str):
            rows[name] = row
    return rows | {image_id: row for row, image_id in enumerate(dataset.image_ids.tolist())}


def below_common_folder(files):
    """The deepest folder that holds all files, and the place of each below it.

    Two files never have the same place.
    """
    paths = [os.path.abspath(file) for file in files]
    home = os.path.commonpath({path[:path.rindex(os.sep) + 1] for path in paths})
    start = len(os.path.join(home, ""))  # with one separator at the end, also if home is the root
    return home, [path[start:].replace(os.sep, "/") for path in paths]


# === Appendix: opening a data set by name; skip on a first reading ================================

READERS = {
    "figures": read_figures,
    "coco": read_coco,
    "humanart": read_human_art,
    "lsp": read_lsp,
    "lsp-regda": read_lsp_regda,
    "surreal": read_surreal,
    "human36m": read_human36m,
    "pictures": read_folder}

# Human-Art's natural scenes; all other domains are artificial
NATURAL_DOMAINS = frozenset({"photo", "acrobatics", "cosplay", "dance", "drama", "movie"})


def load_dataset(spec, split, cache=None):
    """Opens "name:root" for split "train", "val" or "all".

    name: `figures` (without a root they are drawn once, into the folder `cache`), `coco`,
        `humanart`, `lsp`, `lsp-regda`, `surreal`, `human36m`; or `pictures`, without labels.
    root: the data set's folder, or one file in COCO's format. Where only one file is there, about
        a fifth of the images is "val" (see `hold_out`), the others are "train", and "all" is the
        whole file. All of `pictures` are in each split.
    "name:root#domain" is the part with images of that domain; several are separated by commas.
        "#natural" is short for photographs and Human-Art's natural scenes, "#artificial" for all
        others.
    "coco:root#category=car" is the part with annotations of that category, and its skeleton.
    Raises DataError for what cannot be read.

    To add a format, write a function f(root, split) -> PoseDataset and enter it in READERS:
        READERS["myformat"] = f
    Then "myformat:FOLDER" works wherever a data set is expected: it is f(Path("FOLDER"), split).
    """
    base, chosen = split_off_domains(spec)
    name, _, root = base.partition(":")
    if name not in READERS:
        known = ", ".join(READERS)
        hint = ""
        if os.path.exists(base):
            hint = f"; is it {'pictures' if os.path.isdir(base) else 'coco'}:{base}?"
        raise DataError(f"unknown data set {name!r} in {base!r}: expected one of {known}{hint}")
    if split not in ("train", "val", "all"):
        raise DataError(f"{base}: unknown split {split!r}: expected train, val or all")
    if name == "figures" and not root:
        root = draw_figures(cache or cache_folder())
    if not root or not Path(root).exists():
        raise DataError(
            f"{base}: no such file or folder; expected {name}:FOLDER or {name}:FILE.json")
    if chosen and chosen.startswith("category="):
        if name != "coco":
            raise DataError(f"{spec}: expected coco:{root} before a category, found {name}")
        names = chosen.removeprefix("category=").split(",")
        categories = [name.strip() for name in names]
        return replace(read_coco(Path(root), split, categories), name=spec)
    dataset = READERS[name](Path(root), split)
    domains = np.array([domain_name(domain) for domain in dataset.domains.tolist()], str)
    dataset = replace(dataset, name=base, domains=domains)
    if chosen is None:
        return dataset
    return replace(select_domains(dataset, chosen, spec), name=spec)


def split_to_test_on(spec):
    """The split of a data set that is named to test on: "val", or "all" of a single file."""
    base, _ = split_off_domains(spec)
    name, _, root = base.partition(":")
    if name not in OFFICIAL_FILES or not os.path.exists(root):
        return "val"
    _, is_divided = annotation_file(Path(root), OFFICIAL_FILES[name], "val")
    return "val" if is_divided else "all"


def split_off_domains(spec):
    """"name:root#domain" -> "name:root" and "domain"; None for the latter if there is none."""
    base, _, domain = spec.rpartition("#")
    _, _, root = spec.partition(":")
    has_domain = base != ""
    in_a_folders_name = "/" in domain or os.sep in domain or os.path.exists(root)
    if not has_domain or in_a_folders_name:
        return spec, None
    return base, domain


def select_domains(dataset, chosen, spec):
    """The images of the domains that `chosen` names, separated by commas."""
    there = set(dataset.domains.tolist())
    if chosen == "natural":
        domains = there & NATURAL_DOMAINS
    elif chosen == "artificial":
        domains = there - NATURAL_DOMAINS
    else:
        domains = {domain_name(word) for word in chosen.split(",") if word.strip()}
    missing = sorted(domains - there)
    if missing or not domains:
        names = ", ".join(missing) or chosen
        raise DataError(f"{spec}: no image of domain {names}; expected some of "
                        f"{', '.join(sorted(there))}")
    return select_images(dataset, np.isin(dataset.domains, list(domains)))


# === Appendix: parts of data sets, and sentences; skip on a first reading =========================

def select_images(dataset, keep):
    """The data set with only the images where `keep` (images,) is true, and the people in them."""
    people = dataset.select_people(keep[dataset.image_index])
    new_row = np.cumsum(keep) - 1  # (images,) of those that stay
    sentences = dataset.sentences
    return replace(
        people,
        files=[file for file, kept in zip(dataset.files, keep) if kept],
        image_ids=dataset.image_ids[keep],
        domains=dataset.domains[keep],
        image_index=new_row[people.image_index],
        sentences=None if sentences is None else sentences[keep])


def remove_labels(dataset):
    """The data set as a target domain without labels: everyone with a box, all keypoints 0."""
    has_size = (dataset.boxes[:, 2:] > 0).all(1)
    people = dataset.select_people(has_size & ~dataset.crowd)
    if not len(people.ids):
        raise DataError(f"{dataset.name}: expected a person with a box, found none; "
                        "pictures:FOLDER takes each picture as one person")
    return replace(people, keypoints=np.zeros_like(people.keypoints))


def with_sentences(dataset, sentences):
    """The data set with a sentence for each image, for VLPose's text tower to read.

    sentences: one of four.
        "description": each image's own sentence, as in Human-Art
        {domain: sentence}: a dictionary
        "FILE.json": the path of a JSON file that holds such a dictionary
        "a photo of a {domain} character": a template, where "human" stands for the domain "photo",
            and for "picture", the domain of own pictures
    Raises DataError if an image gets no sentence.
    """
    if sentences == "description":
        check_descriptions(dataset)
        return dataset
    domains = sorted(set(dataset.domains.tolist()))  # each once
    if isinstance(sentences, dict):
        sentence_of = with_domain_names(sentences)
    elif str(sentences).endswith(".json"):
        sentence_of = with_domain_names(read_json(sentences, dict, "{domain: sentence}"))
    else:
        sentence_of = fill_template(sentences, domains)
    missing = [domain for domain in domains if not isinstance(sentence_of.get(domain), str)]
    if missing:
        raise DataError(f"{dataset.name}: expected a sentence for each domain, "
                        f"found none for {', '.join(missing)}")
    texts = [sentence_of[domain] for domain in dataset.domains.tolist()]
    return replace(dataset, sentences=np.array(texts))


def with_domain_names(sentence_of):
    """{domain: sentence} with the domains spelled as `domain_name` spells them."""
    return {domain_name(domain): sentence for domain, sentence in sentence_of.items()}


def sentences_read(datasets):
    """A line for each domain: which sentence its images read, or how many different ones."""
    read = {}
    for dataset in datasets:
        for domain in np.unique(dataset.domains).tolist():
            sentences = dataset.sentences[dataset.domains == domain].tolist()
            read.setdefault(domain, set()).update(sentences)
    lines = []
    for domain, sentences in read.items():
        first = one_line(min(sentences))
        what = f'"{first}"' if len(sentences) == 1 else f"{len(sentences)} different sentences"
        lines.append(f"images of the domain {domain!r} read {what}")
    return lines


def check_descriptions(dataset):
    """Raises DataError unless each image has a description of its own."""
    if dataset.sentences is None or "" in dataset.sentences:
        raise DataError(
            f"{dataset.name}: expected a 'description' of each image, found none in some")


def fill_template(template, domains):
    """{domain: sentence} from a sentence in which "{domain}" stands for the domain."""
    sentence_of = {}
    for domain in domains:
        word = "human" if domain in ("photo", PICTURE) else domain
        sentence_of[domain] = template.replace("{domain}", word)
    return sentence_of


# === Appendix: many processes; skip on a first reading ============================================

# `torchrun --nproc_per_node=N train.py ...` starts N processes that run the same program, each with
# its share of every batch and of the people to predict. What they do together goes through these
# functions, so that the result is that of one process. Where there is only one, they do nothing.

def processes():
    """The number of this process, from 0, and how many there are."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def join_processes(options):
    """Makes this program one of those that torchrun has started.

    Returns the store in which the processes leave messages for each other.
    """
    on_gpus = options.device.startswith("cuda")
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # While the first process draws, downloads or saves, the others wait. If one fails, torchrun
    # ends them all.
    wait = timedelta(days=1)
    meeting = dist.rendezvous("env://", timeout=timedelta(minutes=options.patience))
    try:
        store, rank, world = next(meeting)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"the processes of torchrun have not met: {reason}; if torchrun has not "
                        "started this program, `unset LOCAL_RANK`") from None
    store.set_timeout(wait)
    backend = "nccl" if on_gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    arguments = rank, world, options.patience
    threading.Thread(target=watch_next, args=arguments, daemon=True).start()
    return store


SILENCE = 300  # seconds after which it is said that a process does not answer


def watch_next(rank, world, patience):
    """Says if the process after this one does not answer, and ends the program after a while.

    A process may hang or have been stopped; the others would wait for it for a day. So each one
    counts in a store, from a thread of its own, and looks whether the next one does.
    patience: the minutes after which the program ends.
    """
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                          is_master=False)
    following = (rank + 1) % world
    pause = SILENCE // 30  # seconds
    counted = silent = 0
    while True:
        store.add(f"beats of {rank}", 1)
        count = store.add(f"beats of {following}", 0)
        # Seconds are counted in pauses: a job that was stopped as a whole may go on.
        silent = silent + pause if count == counted else 0
        counted = count
        message = f"process {following} has not answered for {silent // 60} minutes"
        if silent >= 60 * patience:
            print(f"error: {message}; --patience waits longer", file=stderr_of_all())
            os._exit(2)  # torchrun ends the others
        if silent and silent % SILENCE == 0:
            print(message, file=stderr_of_all())
        time.sleep(pause)


def seed_step(seed):
    """Makes what is random in a step depend on its seed and on the process."""
    rank, _ = processes()
    torch.manual_seed(seed + 10 ** 15 * rank)


def in_processes(workers):
    """The settings of a DataLoader whose crops so many processes cut; with 0 this one does.

    A process that does not answer for minutes is an error, for it may have been stopped.
    """
    return dict(num_workers=workers, timeout=SILENCE if workers else 0,
                worker_init_fn=partial(start_worker, Image.MAX_IMAGE_PIXELS))


def start_worker(largest, worker):
    """What a process that cuts crops begins with.

    It ignores signals to the whole group, such as Ctrl-C: they are for the first process alone. And
    it reads pictures of as many pixels as that one does, `largest`.
    """
    Image.MAX_IMAGE_PIXELS = largest
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


# ----------------------------------------------------------------------------- shares and exchanges

def my_share(rows, multiple=1):
    """This process's part of a list, an array or a tensor that all processes have alike.

    All parts but the last ones are a multiple of `multiple` long.
    """
    rank, world = processes()
    length = math.ceil(len(rows) / world / multiple) * multiple
    return rows[rank * length:(rank + 1) * length]


def all_items(items):
    """The lists of all processes, one after the other. Each process waits here for the others."""
    _, world = processes()
    if world == 1:
        return list(items)
    lists = [None] * world
    dist.all_gather_object(lists, items)
    return sum(lists, [])


def wait_for_all():
    """No process goes on before all have come here."""
    all_items([])


@contextmanager
def first_process_first():
    """The first process goes through the block, then the others.

    What the first one draws or downloads is then there for all.
    """
    rank, _ = processes()
    if rank > 0:
        wait_for_all()
    yield
    if rank == 0:
        wait_for_all()


def rows_of_all(x):
    """The rows of a tensor x (rows, ...) of all processes, one after the other. No gradient."""
    x = x.detach().contiguous()
    _, world = processes()
    if world == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def mean_of_all(x):
    """The mean over the processes of a tensor that each has. Its gradient goes back to all."""
    if processes()[1] == 1:
        return x
    return MeanOfAll.apply(x)


class MeanOfAll(torch.autograd.Function):
    """`mean_of_all` with its gradient, which is the mean of all processes' gradients."""

    @staticmethod
    def forward(context, x):
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(context, gradient):
        return MeanOfAll.apply(gradient)


# ---------------------------------------------------------------------------------- a training step

class SyncBatchNorm(torch.nn.SyncBatchNorm):
    """BatchNorm with the statistics of the whole batch, also on CPUs; torch's own needs GPUs."""
    process_group = None  # all

    def forward(self, x):
        _, world = processes()
        if x.is_cuda or world == 1 or not self.training:
            return super().forward(x)
        pixels = x.float()  # (B, C, H, W), as many images as in each other process
        mean = mean_of_all(pixels.mean((0, 2, 3)))  # (C,)
        centred = pixels - mean[:, None, None]
        variance = mean_of_all((centred ** 2).mean((0, 2, 3)))  # (C,)
        pixels_of_all = x[:, 0].numel() * world
        self.update_statistics(mean, variance, pixels_of_all)
        scale = self.weight * (variance + self.eps).rsqrt()
        normal = centred * scale[:, None, None] + self.bias[:, None, None]
        return normal.to(x.dtype)

    @torch.no_grad()
    def update_statistics(self, mean, variance, count):
        """The running statistics, for evaluation, go towards those of `count` pixels a channel."""
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * count / (count - 1), self.momentum)


def average_gradients(parameters):
    """Gives each process the mean of all processes' gradients. A missing gradient counts as 0.

    Losses are means over equally many images, or of `mean_of_all`. So this is the gradient of the
    whole batch's loss.
    """
    _, world = processes()
    if world == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad.flatten() for parameter in parameters]
    mean = torch.cat(gradients).div_(world)  # in place: this may be gigabytes
    dist.all_reduce(mean)  # all gradients in one exchange
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, part in zip(parameters, mean.split(sizes)):
        parameter.grad.copy_(part.view_as(parameter))


# === Appendix: the built-in figures; skip on a first reading ======================================

from assets.figures import FIGURE_COUNTS, write_figures
# This module does not use `draw_figure`: it is here for the README's `from data import draw_figure`
from assets.figures import draw_figure  # noqa: F401

# A new name whenever the drawing changes, so that nobody takes an old cache for a new one.
FIGURES = "figures-2"


def draw_figures(cache, counts=FIGURE_COUNTS):
    """Draws the built-in figures into `cache`, unless they are there, and returns their folder.

    The folder has Human-Art's format. `counts` is {split: (photos, figures of each other style)}.
    Raises DataError if the folder cannot be written.
    """
    folder = Path(cache) / FIGURES
    if os.path.exists(folder):  # which is False, not an error, in another user's folder
        return folder
    print(f"drawing the built-in figures into {folder}", file=sys.stderr)
    try:
        with written_whole(folder) as draft:
            write_figures(draft, counts, progress)
    except DataError as error:
        if not os.path.exists(folder):  # otherwise another program was faster
            raise DataError(f"{error}; --cache or POSEBRIDGE_HOME name another folder") from None
    return folder
