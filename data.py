"""Data: from a picture with labels to a training sample, and from heatmaps back to keypoints.

A pose estimator gets one person at a time. The person's box is cut out of the image and scaled to a
fixed size: the *crop*. For each keypoint the model gives a *heatmap*, a small image that is bright
where the model takes the keypoint to be. The lesson follows the data; read it in this order:

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


class DataError(ValueError):
    """Bad input. The message is one line that names the file, the record, and what was expected."""


# ---------------------------------------------------------------------------------------- skeletons

@dataclass(frozen=True, eq=False)
class Skeleton:
    """Names and structure of K keypoints. Edges and groups are made of indices into `names`."""
    names: tuple[str, ...]  # such as COCO17's "nose", "left_eye", "right_eye", ..., "right_ankle"
    edges: tuple[tuple[int, int], ...]  # lines of a drawing: (7, 9) is COCO17's left forearm
    sigmas: np.ndarray  # (K,) how far annotators scatter, relative to the person's size; for OKS
    upper: tuple[int, ...]  # the upper half: a half-body crop keeps either these or the others
    groups: dict  # name of a group -> the keypoints that a PCK table averages

    @cached_property
    def mirrored(self):
        """(K,) each keypoint's counterpart in a mirrored image: right_eye for left_eye."""
        other_side = {"left": "right", "right": "left"}
        names = [plain_name(name) for name in self.names]
        counterpart = np.arange(len(names))  # a nose is its own counterpart
        for joint, name in enumerate(names):
            words = [other_side.get(word, word) for word in name.split("_")]
            other = "_".join(words)
            if other in names:
                counterpart[joint] = names.index(other)
        return counterpart

    @property
    def has_sides(self):
        """Whether left and right are known: not if the names only count the keypoints."""
        return self.names[0] != UNNAMED.format(1)


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
    method = Image.Transform.AFFINE
    crop = image.transform(size[::-1], method, to_image.ravel(), Image.Resampling.BILINEAR)
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
    Gaussian lies outside, has weight 0 and a heatmap of zeros. Others are mmpose's UDPHeatmap.
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
        if rng.random() < self.augmentation.flip_probability:
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

import json
import os
import random
import re
import shutil
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from glob import escape, glob
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch.distributed as dist
from PIL import ExifTags, ImageOps


def skeleton_from(fields):
    """A Skeleton from its fields as JSON has them."""
    groups = {name: tuple(joints) for name, joints in fields["groups"].items()}
    edges = tuple(tuple(edge) for edge in fields["edges"])
    sigmas = np.array(fields["sigmas"])
    return Skeleton(tuple(fields["names"]), edges, sigmas, tuple(fields["upper"]), groups)


with open(Path(__file__).parent / "assets" / "skeletons.json", encoding="utf-8") as file:
    SKELETONS = {name: skeleton_from(fields) for name, fields in json.load(file).items()}
COCO17 = SKELETONS["COCO17"]  # people, as in COCO and Human-Art
BODY16 = SKELETONS["BODY16"]  # people, as in MPII
ANIMAL18 = SKELETONS["ANIMAL18"]  # SyntheticAnimal and TigDog
ANIMAL14 = SKELETONS["ANIMAL14"]  # what SyntheticAnimal and AnimalPose have in common

SAME_WORDS = {"l": "left", "r": "right", "f": "front", "b": "back", "paw": "hoof"}
LOWER_HALF = {"hip", "knee", "ankle", "heel", "toe", "foot", "pelvis", "tail", "back", "hind"}
DEFAULT_SIGMA = 0.05  # ours
UNNAMED = "keypoint {}"  # the names keypoint 1, keypoint 2, ... where only their number is known


def known_skeleton(count):
    """The skeleton of a model of which no more is known than the number of its keypoints."""
    for skeleton in SKELETONS.values():
        if len(skeleton.names) == count:
            return skeleton
    return make_skeleton([UNNAMED.format(number) for number in range(1, count + 1)], ())


def plain_name(name):
    """The same spelling for all: left_eye for LeftEye, L_Eye, "left eye" and left-eye."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W_A-Za-z]+", name)
    words = [word.lower() for word in words]
    return "_".join(SAME_WORDS.get(word, word) for word in words) or name


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
    """The known skeleton of these names, or a new one; names tell halves, sigmas and groups."""
    for known in SKELETONS.values():
        if known.names == tuple(names):
            return known
    sigmas = []
    upper = []
    groups = {}
    for joint, name in enumerate(names):
        part = without_side(plain_name(name))
        sigmas.append(known_sigma(part))
        words = set(part.split("_"))
        is_lower = bool(words & LOWER_HALF)
        if "front" in words or not is_lower:  # an animal's front legs are in its upper half
            upper.append(joint)
        groups[part] = groups.get(part, ()) + (joint,)
    return Skeleton(tuple(names), tuple(edges), np.array(sigmas), tuple(upper), groups)


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
    joint_of = {plain_name(name): joint for joint, name in enumerate(dataset.skeleton.names)}
    wanted = [plain_name(name) for name in skeleton.names]
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


@contextmanager
def image_file(file):
    """An open Pillow image. Raises DataError if it cannot be opened, or decoded in the block."""
    try:
        with Image.open(file) as image:
            # `eval.py --large` switches off Pillow's own limit, and ours with it
            no_limit = Image.MAX_IMAGE_PIXELS is None
            if image.width * image.height > LARGEST_IMAGE and not no_limit:
                raise ValueError(f"{image.width}×{image.height} pixels; "
                                 "`eval.py --large` reads more than 100 million")
            yield image
    except FileNotFoundError:
        raise DataError(f"{file}: no such image") from None
    except Image.DecompressionBombError as error:
        remedy = "`eval.py --large` reads it"
        raise DataError(f"{file}: not a readable image: {error}; {remedy}") from None
    except Exception as error:  # odd pictures, and odd EXIF, make Pillow raise almost anything
        raise DataError(f"{file}: not a readable image: {error}") from None


def open_image(file, max_shrink=1.0, upright=False, kept=None):
    """The image as RGB, and how many times smaller than stored it was read (1, 2, 4 or 8).

    file: a path, or a Pillow image.
    max_shrink: how many times smaller the image may be. JPEGs are read faster that way.
    upright: whether the image is turned as its EXIF orientation says. The images of data sets are
        not, because their annotations ignore it.
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
    """A Pillow image in RGB and, if `upright`, turned as its EXIF orientation says."""
    if upright:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image  # convert() would copy it
    if image.mode == "F":
        raise DataError("its pixels are floats, and nobody knows of what scale: expected bytes")
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip instead of scale
        high_bytes = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(high_bytes.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


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

TORCH_CANNOT_WRITE = "inline_container"  # torch.save's error names its C++ file, but no reason


def cache_folder():
    """The folder of downloads, drawn figures and trained base models.

    It is $POSEBRIDGE_HOME, or else ~/.cache/posebridge.
    """
    return Path(os.environ.get("POSEBRIDGE_HOME") or Path.home() / ".cache" / "posebridge")


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
            prefix=f"{path.name}.", suffix=".draft", dir=path.parent)
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
    for lock in path.parent.glob(f"{escape(path.name)}.????????.draft/lock"):
        with suppress(OSError, DataError):  # its program runs, or another one has just removed it
            locked(lock).close()
            lock.unlink()  # Windows refuses this while a program has the file open
            shutil.rmtree(lock.parent)


def claimed(folder):
    """Takes a new or an empty folder for this program -> its lock, an open file.

    Raises DataError if there is anything in the folder but hidden files, or if another program has
    taken it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = locked(folder / "lock")
    found = sorted(name for name in os.listdir(folder) if name != "lock" and name[0] != ".")
    if found:
        lock.close()
        raise DataError(f"{folder}: expected a new or an empty folder, found {found[0]} in it")
    return lock


def locked(path):
    """Opens a lock file. A second program that does so gets a DataError while this one has it open.

    On Windows nothing is locked.
    """
    check_regular(path)
    file = open(path, "w")
    try:
        with expecting(path.parent, "that no other program uses it"), suppress(ImportError):
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except DataError:
        file.close()
        raise
    return file


def not_written(path, why):
    """The error for a file or a folder that cannot be written."""
    megabytes = free_space(path) / 1e6
    return DataError(f"{path}: cannot be written: {why}; {megabytes:,.0f} MB are free there")


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
        content = json.loads(Path(path).read_bytes())
        if not isinstance(content, json_type):
            raise ValueError(f"found {content!r:.40}")
        return content


def check_regular(path):
    """Raises DataError for a pipe or a device: reading from one may never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise DataError(f"{path}: expected a file, found a folder, a pipe or a device")


def write_json(path, content, indent=None):
    """Writes a JSON file as a whole. Raises DataError for numbers that are not finite."""
    with expecting(path, "finite numbers to write"):
        text = json.dumps(content, indent=indent, allow_nan=False)
    with written_whole(path) as draft:
        draft.write_text(text, "utf-8")


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
    ids = [f", {key} {record[key]}" for key in ("id", "image_id") if key in record]
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


def read_coco(root, split):
    """COCO, or any other folder or file in COCO's format."""
    return read_coco_format(root, split, COCO_FILES, category_of)


def read_human_art(root, split):
    """Human-Art: COCO's format, where the images of a domain are in a folder of its name."""
    return read_coco_format(root, split, HUMAN_ART_FILES, domain_of)


def read_figures(root, split):
    """The built-in figures, in Human-Art's format."""
    return read_coco_format(root, split, FIGURE_FILES, domain_of)


def read_coco_format(root, split, official, find_domain):
    """A split of a folder or file in COCO's format.

    official: {split: name of its file}.
    find_domain: gives an image's domain for the image's record.
    """
    path, has_this_split_alone = annotation_file(root, official, split)
    home = root if root.is_dir() else root.parent
    dataset = read_coco_file(path, home, find_domain)
    if has_this_split_alone:
        return dataset
    return hold_out(dataset, split, np.arange(len(dataset.files)))


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
        files += [path for path in sorted(folder.glob("*.json")) if holds_object(path)]
    return files


def holds_object(path):
    """Whether a JSON file holds an object, as annotations are; results are lists."""
    with open(path, "rb") as file:
        start = file.read(99)
    return start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")


def hold_out(dataset, split, numbers):
    """A split of a data set that has only one file.

    numbers (images,): an image whose number is a multiple of five is for validation, the others are
        for training.
    """
    if split == "all":
        return dataset
    keep = numbers % 5 == 0
    if split == "train":
        keep = ~keep
    return select_images(dataset, keep)


# --------------------------------------------------------------------------------- a file's records

def read_coco_file(path, home, find_domain):
    """A file in COCO's format, with its skeleton.

    home: the folder that the images are in or near, see `locate_images`.
    """
    content = read_json(path, dict, "COCO's annotations")
    for section in ("images", "annotations"):
        if not isinstance(content.get(section), list):
            raise DataError(
                f"{path}: not COCO keypoints: expected lists 'images' and 'annotations'")
    skeleton = read_skeleton(path, content)
    count = len(skeleton.names)
    images = read_columns(
        [complete_image(image, find_domain) for image in content["images"]],
        {"id": ID, "file_name": TEXT, "category": TEXT, "description": TEXT},
        f"{path}: image")
    people = read_columns(
        [complete_person(person) for person in content["annotations"]],
        {"id": ID, "image_id": ID, "keypoints": finite_numbers(3 * count, dtype=np.float32),
         "bbox": BOX, "area": NUMBER, "iscrowd": FLAG},
        f"{path}: annotation")
    if not len(images["id"]):
        raise DataError(f"{path}: expected images, found none")
    dataset = PoseDataset(
        name=str(path),
        skeleton=skeleton,
        files=locate_images(path, images["file_name"].tolist(), home),
        image_ids=images["id"],
        domains=images["category"].astype(str),
        ids=people["id"],
        image_index=image_rows(path, images["id"], people["id"], people["image_id"]),
        keypoints=people["keypoints"].reshape(-1, count, 3),
        boxes=people["bbox"],
        areas=people["area"],
        crowd=people["iscrowd"],
        sentences=images["description"].astype(str))
    check_people(path, dataset)
    return dataset


def complete_image(image, find_domain):
    """An image's record with its domain, and with the description that a file may leave out."""
    try:
        domain = str(find_domain(image))
        description = str(image.get("description") or "")
        return {**image, "category": domain, "description": description}
    except BROKEN:
        return image  # `read_columns` says what is wrong


def category_of(image):
    """The domain of an image's record: its `category`, or "photo"."""
    return image.get("category", "photo")


def domain_of(image):
    """The domain of an image's record: its `category`, or else its folder, as in Human-Art."""
    folder = PurePosixPath(str(image["file_name"])).parent.name
    if folder.endswith("2017"):  # one of COCO's, which has no domains
        folder = ""
    domain = image.get("category") or folder or "photo"
    return str(domain).replace("_", " ")


def complete_person(person):
    """A person's record with the entries that a file may leave out."""
    try:
        _, _, width, height = person["bbox"]
        area = person.get("area") or float(width) * float(height)
        return {"iscrowd": 0, **person, "area": area}
    except BROKEN:
        return person  # `read_columns` says what is wrong


def read_skeleton(path, content):
    """The skeleton in COCO's `categories`, or COCO17.

    People may have only the first of its keypoints, as in Human-Art: then the others are left out.
    """
    with expecting(path, "'categories' with the same names of 'keypoints' in each, "
                         "and a 'skeleton' of pairs of them"):
        categories = []
        for category in content.get("categories") or ():
            if category.get("keypoints"):
                categories.append(category)
        if not categories:
            return COCO17
        first = categories[0]
        names = tuple(str(name) for name in first["keypoints"])
        are_different = len({plain_name(name) for name in names}) == len(names)
        are_alike = all(category["keypoints"] == first["keypoints"] for category in categories)
        if not are_different or not are_alike:
            raise ValueError(
                f"found {len(categories)} categories, the first with {len(names)} names")
        names = names[:labelled_keypoints(content, len(names))]
        edges = []
        for a, b in first.get("skeleton") or ():  # counted from 1
            if 0 < min(a, b) and max(a, b) <= len(names):
                edges.append((a - 1, b - 1))
        return make_skeleton(names, edges)


def labelled_keypoints(content, count):
    """How many of `count` keypoints the people have, as the first one shows that has any."""
    for person in content.get("annotations") or ():
        values = person.get("keypoints")  # x, y and v of each keypoint
        if values:
            is_whole = len(values) % 3 == 0  # otherwise `read_columns` says what is wrong
            return len(values) // 3 if is_whole else count
    return count


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
    has_known_flags = np.isin(points[:, :, 2], (0, 1, 2)).all(1)
    is_empty = (boxes[:, 2:] <= 0).any(1)
    is_annotated = np.isin(np.arange(len(boxes)), dataset.annotated)
    problems = {
        "a number that is not finite, or beyond a million":
            ~is_near | ~np.isfinite(dataset.areas),
        "a visibility other than 0, 1 and 2": ~has_known_flags,
        "a box of zero or negative size": is_annotated & is_empty}
    for problem, wrong in problems.items():
        if wrong.any():
            row = wrong.argmax()
            box = boxes[row].tolist()
            raise DataError(f"{path}: annotation id {dataset.ids[row]} has {problem}: bbox {box}")


# ----------------------------------------------------------------------------- where the images are

def locate_images(path, file_names, home):
    """Full paths of the images that the annotation file `path` names.

    They are in `home`, in the folder around it, or in a folder of a usual name in either. Leading
    folders in the names that do not exist here (Human-Art's `HumanArt/images/`) are left out.
    Raises DataError for an image that is nowhere, or whose name leads out of the folders.
    """
    folders = []
    for place in (home, home.parent):
        for name in ("", "images", "train2017", "val2017"):
            folders.append(str(place / name))
    left_out = leading_folders(place_below(path, file_names[0]), folders)
    files = []
    last_folder = folders[0]  # where the image before is: most likely this one is there, too
    for name in file_names:
        place = place_below(path, name)[left_out:]
        folder = folder_with(place, [last_folder, *folders])
        if folder is None:
            raise DataError(f"{path}: image {name!r} is missing; looked in {', '.join(folders)}")
        files.append(os.path.join(folder, *place))
        last_folder = folder
    return files


def leading_folders(place, folders):
    """How many leading folders of an image's place do not exist here. 0 if the image is nowhere."""
    for count in range(len(place)):
        if folder_with(place[count:], folders) is not None:
            return count
    return 0


def place_below(path, file_name):
    """An image's folders and name, such as ("images", "sketch", "a.jpg")."""
    place = PureWindowsPath(file_name)  # knows both / and \\
    if ".." in place.parts or place.anchor:
        raise DataError(
            f"{path}: image file name {file_name!r} leads outside the data set's folder")
    return place.parts


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
    categories = [{
        "id": 1,
        "name": category,
        "keypoints": list(dataset.skeleton.names),
        "skeleton": [[a + 1, b + 1] for a, b in dataset.skeleton.edges]}]  # COCO counts from 1
    return {"images": images, "annotations": annotations, "categories": categories}


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
    """SURREAL as RegDA prepares it. A fifth of its training images is left out, as there."""
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

PICTURE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def read_folder(root, split):
    """All images in a folder, without labels, in each split.

    The people are in the folder's boxes.json. Without this file each picture is one person.
    """
    pictures = read_pictures(find_pictures([root]), f"pictures:{root}")
    if (root / "boxes.json").is_file():
        rows_of_names = picture_rows(pictures.files)
        rows, boxes, _ = read_boxes(root / "boxes.json", rows_of_names, category=None)
        pictures = with_boxes(pictures, rows, boxes)
    return pictures


# ----------------------------------------------------------------------------------------- pictures

def find_pictures(patterns):
    """Paths of the images in files, in folders and below, and in patterns such as *.png."""
    files = []
    for pattern in patterns:
        if os.path.isfile(pattern):
            found = [pattern]
        elif os.path.isdir(pattern):
            below = Path(pattern).rglob("*")
            found = sorted(str(file) for file in below if file.suffix.lower() in PICTURE_ENDINGS)
        else:
            found = sorted(glob(str(pattern), recursive=True))
        if not found:
            raise DataError(f"{pattern}: no such image, no folder with images, "
                            "and no pattern that fits any")
        files += found
    return list(dict.fromkeys(str(file) for file in files))  # each once


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
        domains=np.full(len(files), "picture"),
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
    is_used = is_here.copy()
    if category is not None:
        is_used &= table["category_id"] == category
    others = (~is_here).sum()
    if not is_used.any():
        raise DataError(f"{path}: expected boxes of category {category or 'any'}, "
                        f"found {others} elsewhere")
    if others:
        print(f"{path}: skipped {others} boxes of other images", file=sys.stderr)
    return image_index[is_used], table["bbox"][is_used], table["score"][is_used]


def images_of_boxes(path, records, rows):
    """The row of each box's image, (boxes,); -1 if `rows` has no such image."""
    image_index = np.full(len(records), -1)
    for place, record in enumerate(records):
        image_id = record.get("image_id")
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
    """Raises DataError for a box (4,) of boxes (boxes, 4) that is empty or far away."""
    has_size = (boxes[:, 2:] > 0).all(1)
    is_near = (np.abs(boxes) <= FARTHEST).all(1)
    wrong = ~(has_size & is_near)
    if wrong.any():
        place = wrong.argmax()
        raise DataError(f"{path}: box {place}: expected a 'bbox' [x, y, w, h] of some size, "
                        f"found {boxes[place]}")


def picture_rows(files):
    """{name: row} of pictures, for all names by which a file of boxes may call them.

    The names of album/one/a.jpg in a folder album are "one/a.jpg", "one/a", "a.jpg" and "a". The
    row is None if several pictures have the name.
    """
    _, places = below_common_folder(files)
    rows = {}
    for row, place in enumerate(places):
        path = PurePosixPath(place)
        for name in {str(path.with_suffix("")), path.name, path.stem}:
            rows[name] = None if name in rows else row
    for row, place in enumerate(places):  # whole places come first: they are never shared
        rows[place] = row
    return rows


def below_common_folder(files):
    """The deepest folder that holds all files, and the place of each below it.

    Two files never have the same place.
    """
    paths = [os.path.abspath(file) for file in files]
    home = os.path.commonpath([os.path.dirname(path) for path in paths])
    return home, [Path(path).relative_to(home).as_posix() for path in paths]


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
    root: the data set's folder, or one file in COCO's format. Where only one file is there, every
        fifth image is "val", the others are "train", and "all" is the whole file. All of `pictures`
        are in each split.
    "name:root#domain" is the part with images of that domain; several are separated by commas.
        "#natural" is short for photographs and Human-Art's natural scenes, "#artificial" for all
        others.
    Raises DataError for what cannot be read.

    To add a format, write a function f(root, split) -> PoseDataset and enter it in READERS:
        READERS["myformat"] = f
    Then "myformat:FOLDER" works wherever a data set is expected: it is f(Path("FOLDER"), split).
    """
    base, chosen = split_off_domains(spec)
    name, _, root = base.partition(":")
    if name not in READERS:
        known = ", ".join(READERS)
        raise DataError(f"unknown data set {name!r} in {base!r}: expected one of {known}")
    if split not in ("train", "val", "all"):
        raise DataError(f"{base}: unknown split {split!r}: expected train, val or all")
    if name == "figures" and not root:
        root = draw_figures(cache or cache_folder())
    if not root or not Path(root).exists():
        raise DataError(
            f"{base}: no such file or folder; expected {name}:FOLDER or {name}:FILE.json")
    dataset = READERS[name](Path(root), split)
    dataset = replace(dataset, name=base)
    if chosen is None:
        return dataset
    return replace(select_domains(dataset, chosen, spec), name=spec)


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
        domains = set(chosen.split(","))
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
        raise DataError(f"{dataset.name}: expected a person with a box, found none")
    return replace(people, keypoints=np.zeros_like(people.keypoints))


def with_sentences(dataset, sentences):
    """The data set with a sentence for each image, for VLPose's text tower to read.

    sentences: one of four.
        "description": each image's own sentence, as in Human-Art
        {domain: sentence}: a dictionary
        "FILE.json": the path of a JSON file that holds such a dictionary
        "a photo of a {domain} character": a template, where the domain "photo" becomes "human"
    Raises DataError if an image gets no sentence.
    """
    if sentences == "description":
        check_descriptions(dataset)
        return dataset
    domains = sorted(set(dataset.domains.tolist()))  # each once
    if isinstance(sentences, dict):
        sentence_of = sentences
    elif str(sentences).endswith(".json"):
        sentence_of = read_json(sentences, dict, "{domain: sentence}")
    else:
        sentence_of = fill_template(sentences, domains)
    missing = [domain for domain in domains if not isinstance(sentence_of.get(domain), str)]
    if missing:
        raise DataError(f"{dataset.name}: expected a sentence for each domain, "
                        f"found none for {', '.join(missing)}")
    texts = [sentence_of[domain] for domain in dataset.domains.tolist()]
    return replace(dataset, sentences=np.array(texts))


def check_descriptions(dataset):
    """Raises DataError unless each image has a description of its own."""
    if dataset.sentences is None or "" in dataset.sentences:
        raise DataError(
            f"{dataset.name}: expected a 'description' of each image, found none in some")


def fill_template(template, domains):
    """{domain: sentence} from a sentence in which "{domain}" stands for the domain."""
    sentence_of = {}
    for domain in domains:
        word = "human" if domain == "photo" else domain
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
    store, rank, world = next(dist.rendezvous("env://", timeout=wait))
    backend = "nccl" if on_gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    threading.Thread(target=watch_next, args=(rank, world), daemon=True).start()
    return store


SILENCE = 300     # seconds after which it is said that a process does not answer
PATIENCE = 1800   # seconds after which the program ends then


def watch_next(rank, world):
    """Says if the process after this one does not answer, and ends the program in the end.

    A process may hang or have been stopped; the others would wait for it for a day. So each one
    counts in a store, from a thread of its own, and looks whether the next one does.
    """
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                          is_master=False)
    following = (rank + 1) % world
    counted = changed = said = 0
    while True:
        store.add(f"beats of {rank}", 1)
        count = store.add(f"beats of {following}", 0)
        now = time.monotonic()
        if count != counted or not changed:
            counted, changed, said = count, now, 0
        silent = now - changed
        if silent > SILENCE * (said + 1):
            said += 1
            print(f"process {following} has not answered for {silent / 60:.0f} minutes",
                  file=sys.__stderr__, flush=True)
        if silent > PATIENCE:
            os._exit(2)  # torchrun ends the others
        time.sleep(min(10, SILENCE / 10))


def seed_step(seed):
    """Makes what is random in a step depend on its seed and on the process."""
    rank, _ = processes()
    torch.manual_seed(seed + 10 ** 15 * rank)


def in_processes(workers):
    """The settings of a DataLoader whose crops so many processes cut; with 0 this one does.

    A process that does not answer for minutes is an error, for it may have been stopped.
    """
    return dict(num_workers=workers, timeout=SILENCE if workers else 0,
                worker_init_fn=ignore_group_signals)


def ignore_group_signals(worker):
    """Lets a process that cuts crops ignore signals to the whole group, such as Ctrl-C.

    They are for the first process alone.
    """
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
    if folder.exists():
        return folder
    print(f"drawing the built-in figures into {folder}", file=sys.stderr)
    try:
        with written_whole(folder) as draft:
            write_figures(draft, counts, progress)
    except DataError:
        if not folder.exists():  # otherwise another program was faster
            raise
    return folder
