"""Data: from a picture with labels to a training sample, and from a model's heatmaps back to keypoints in the picture.

A pose estimator gets one person at a time. The person's box is cut out of the image and scaled to a fixed size: the
*crop*. For each keypoint the model gives a *heatmap*, a small image that is bright where it takes the keypoint to be.
The lesson follows the data; read it in this order:

    Skeleton, PoseDataset   what is labelled, and where: people as arrays, images as file names
    crop_matrix             the affine map from an image to the crop of one person, and back
    encode_heatmaps         keypoints -> the heatmaps that a model should give
    decode_heatmaps         heatmaps -> keypoints, to a fraction of a pixel
    Crops                   all of this in one training sample, with augmentation

The appendices hold the files: `load_dataset("name:root", split)` reads COCO, Human-Art, the data sets of domain
adaptation, and the built-in figures, which are drawn once and then read like any other data.

Coordinates: a point is x before y, in pixels of the image or crop that it goes with; the centres of pixels are at
integers, so that the outermost ones of a width W are W - 1 apart. A size is (height, width), a box left, top, width,
height. Shapes: B crops, K keypoints, H×W the crop, h×w the heatmap.
Images of data sets are read as stored: their EXIF orientation is ignored, because COCO's annotations ignore it too.
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


# -------------------------------------------------------------------------------------------------------- skeletons

@dataclass(frozen=True, eq=False)
class Skeleton:
    """Names and structure of K keypoints; everything else is an index into `names`."""
    names: tuple[str, ...]  # such as COCO17's "nose", "left_eye", "right_eye", ..., "right_ankle"
    edges: tuple[tuple[int, int], ...]  # the lines that a drawing connects: (7, 9) is its left forearm
    sigmas: np.ndarray  # (K,) how far human annotators scatter, relative to the person's size: the scale of OKS
    upper: tuple[int, ...]  # the upper half: the half-body augmentation keeps either these or the rest
    groups: dict  # group name -> keypoints that a PCK table averages

    @cached_property
    def flip(self):
        """(K,) each keypoint's counterpart in a mirrored image: left_eye for right_eye, nose for nose."""
        swap, names = {"left": "right", "right": "left"}, [plain_name(name) for name in self.names]
        mirrored = ["_".join(swap.get(word, word) for word in name.split("_")) for name in names]
        return np.array([names.index(name) if name in names else joint for joint, name in enumerate(mirrored)])

    @cached_property
    def has_sides(self):
        """Whether left and right are known: not where the keypoints are "keypoint 1", "keypoint 2", ..."""
        return self.names[0] != "keypoint 1"


# -------------------------------------------------------------------------------------------------------- data sets

@dataclass
class PoseDataset:
    """Images and the people in them, as arrays: each with a row per image, or with a row per person."""
    name: str
    skeleton: Skeleton
    files: list  # paths of the images, or Pillow images
    image_ids: np.ndarray  # (images,)
    domains: np.ndarray  # (images,) of str: "photo", "oil painting", ...
    ids: np.ndarray  # (people,) annotation ids
    image_index: np.ndarray  # (people,) the row of each person's image
    keypoints: np.ndarray  # (people, K, 3) x, y, v: 0 not labelled, 1 labelled but hidden, 2 visible
    boxes: np.ndarray  # (people, 4) left, top, width, height
    areas: np.ndarray  # (people,) pixels that the person covers
    crowd: np.ndarray  # (people,) bool: a box around a group
    upright: bool = False  # whether images are to be turned as their EXIF orientation says
    sentences: np.ndarray | None = None  # (images,) of str: what the text tower reads; see `with_sentences`

    @property
    def annotated(self):
        """Rows of the people who can be trained on: one person, not a crowd, with a labelled keypoint."""
        return np.flatnonzero((self.keypoints[:, :, 2] > 0).any(1) & ~self.crowd)

    def select_people(self, rows):
        """The data set with only the people in `rows`, indices or (people,) bool; all images stay."""
        return replace(self, ids=self.ids[rows], image_index=self.image_index[rows], keypoints=self.keypoints[rows],
                       boxes=self.boxes[rows], areas=self.areas[rows], crowd=self.crowd[rows])


# ---------------------------------------------------------------------------------------------------- crop geometry
#
# An affine map takes a point p = (x, y) of the image to A p + b in the crop. A is 2×2: it scales and turns; b is 2×1:
# it moves. Side by side they are the matrix M = [A b] (2, 3). Labels go through M into the crop; predictions, and the
# places where a crop's pixels are read, go through its inverse into the image.

PADDING = 1.25  # a crop holds this many times the width and height of the box, so that hands and feet are not cut off


def crop_width(boxes, size, padding=PADDING):
    """Width (...) in image pixels of the crops of shape `size` (height, width) around boxes (..., 4)."""
    return padding * np.maximum(boxes[..., 2], boxes[..., 3] * size[1] / size[0])


def crop_matrix(box, size, padding=PADDING, scale=1.0, rotation=0.0, shift=(0.0, 0.0)):
    """(2, 3) matrix from the pixels of an image to those of a crop of `size` (height, width) around a box (4,).

    The box grows to the crop's aspect ratio, then by `padding` and `scale`. What is cut out turns by `rotation` degrees
    around its centre, which moves by `shift` times the width and height of the cut.
    """
    x, y, w, h = box
    height, width = size  # H and W
    side = crop_width(np.asarray(box), size, padding) * scale  # the cut is side wide and side · H / W high
    # c, the point of the image that becomes the middle of the crop
    center = np.array([x + w / 2 + shift[0] * side, y + h / 2 + shift[1] * side * height / width])
    # R, the rotation by the angle θ
    theta = math.radians(rotation)
    turn = np.array([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]])
    # S, crop pixels per image pixel along x and y. Unbiased data processing (UDP, arXiv 1911.07524): the W pixels of
    # the crop span W - 1, from the centre of the first to the centre of the last. With W a crop and its mirror image,
    # or a crop and its heatmap, would disagree by a fraction of a pixel.
    zoom = (np.array([width, height]) - 1) / [side, side * height / width]
    # A = S R, and b such that c lands in the middle: A c + b = (W - 1, H - 1) / 2
    linear = zoom[:, None] * turn
    return np.column_stack([linear, (np.array([width, height]) - 1) / 2 - linear @ center])


def transform_points(points, matrix):
    """A p + b for points (..., points, 2) and matrices (..., 2, 3), both NumPy arrays or both tensors."""
    return points @ matrix[..., :2].swapaxes(-1, -2) + matrix[..., None, :, 2]


def invert_matrix(matrix):
    """The inverse maps of matrices (..., 2, 3), a NumPy array or a tensor: q = A p + b is p = A⁻¹ q - A⁻¹ b."""
    library = torch if isinstance(matrix, torch.Tensor) else np
    linear = library.linalg.inv(matrix[..., :2])
    return library.concatenate([linear, -linear @ matrix[..., 2:]], -1)


def warp_image(image, matrix, size, shrink=1.0):
    """The crop (height, width, 3) that `matrix` maps a Pillow image to; `image` was read `shrink` times smaller."""
    inverse = invert_matrix(matrix)  # [A b] from the crop to the image, p = A q + b
    # Pillow counts from the corners of pixels, u = p + 1/2. So p = A q + b becomes u = A (v - 1/2) + b + 1/2, where
    # v = q + 1/2; and u is `shrink` times smaller in an image that was read so many times smaller.
    inverse[:, 2] = inverse[:, 2] + 0.5 - inverse[:, :2].sum(1) / 2
    to_image = (inverse / shrink).ravel()
    return np.array(image.transform(size[::-1], Image.Transform.AFFINE, to_image, Image.Resampling.BILINEAR))


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, what every public backbone expects


def normalize(images):
    """RGB images (B, 3, H, W), bytes or floats from 0 to 1 -> images as the models take them."""
    mean, std = (torch.tensor(value, device=images.device).view(3, 1, 1) for value in (MEAN, STD))
    return ((images.float() / 255 if images.dtype == torch.uint8 else images) - mean) / std


# ----------------------------------------------------------------------------------------------------- heatmap codec
#
# A heatmap says where a keypoint is and how sure the model is of it. The target for a model is a Gaussian around the
# keypoint; a prediction is read off at its peak. A heatmap is usually a quarter as wide as the crop, so the highest
# pixel alone may be two pixels of the crop away from the peak: decoding finds the rest from the pixels around it.

def encode_heatmaps(keypoints, visible, input_size, heatmap_size, sigma=2.0):
    """Keypoints (B, K, 2) in crops of `input_size` and visible (B, K) -> targets (B, K, h, w) and weights (B, K).

    sigma, the width of the Gaussian, is in heatmap pixels. A keypoint that is not labelled, or whose Gaussian lies
    outside, has weight 0 and a target of 0. The result is that of mmpose's UDPHeatmap.
    """
    keypoints = keypoints.float() if not keypoints.is_floating_point() else keypoints
    scale = (np.array(heatmap_size[::-1]) - 1) / (np.array(input_size[::-1]) - 1)  # corner pixel onto corner pixel
    centers = keypoints * torch.tensor(scale).to(keypoints)  # (B, K, 2) μ, in heatmap pixels but not rounded to them
    # G(x, y) = exp(-((x - μx)² + (y - μy)²) / 2σ²) = exp(-(x - μx)² / 2σ²) · exp(-(y - μy)² / 2σ²)
    profiles = []  # the two factors: (B, K, w) along x, (B, K, h) along y
    for axis, length in enumerate(heatmap_size[::-1]):
        center = centers[:, :, axis, None]  # (B, K, 1)
        grid = torch.arange(length, device=centers.device)
        near = (grid - (center + 0.5).trunc()).abs() <= 3 * sigma  # a Gaussian is cut off 3σ from its nearest pixel
        profiles.append(torch.exp(-(grid - center) ** 2 / (2 * sigma ** 2)) * near)
    heatmaps = profiles[1][:, :, :, None] * profiles[0][:, :, None, :]  # (B, K, h, w)
    weights = (visible > 0) & (heatmaps.amax((2, 3)) > 0)  # (B, K)
    return heatmaps * weights[:, :, None, None], weights.to(heatmaps)


def decode_heatmaps(heatmaps, input_size, sigma=2.0):
    """Heatmaps (B, K, h, w) -> keypoints (B, K, 2) in crops of `input_size` and scores (B, K), the peaks' heights.

    DARK (arXiv 1910.06278): the logarithm of a Gaussian of height a is a parabola, L(p) = log a - |p - μ|² / 2σ². Its
    slope and curvature at any one point tell where its top μ is. They are measured at the highest pixel, m.
    """
    B, K, h, w = heatmaps.shape
    scores, highest = heatmaps.flatten(2).max(2)  # (B, K)
    y, x = highest // w, highest % w  # m
    # A prediction is noisy, so it is smoothed; a Gaussian smoothed with a Gaussian is one with the same centre.
    reach = round(2.5 * sigma)
    kernel = torch.exp(-torch.arange(-reach, reach + 1, device=heatmaps.device) ** 2 / (2 * sigma ** 2)).to(heatmaps)
    kernel = kernel / kernel.sum()
    smooth = F.conv2d(heatmaps.reshape(B * K, 1, h, w), kernel.view(1, 1, 1, -1), padding=(0, reach))
    smooth = F.conv2d(smooth, kernel.view(1, 1, -1, 1), padding=(reach, 0)).view(B, K, h, w)
    log = F.pad(smooth.clamp(min=1e-3).log(), (1, 1, 1, 1), mode="replicate").flatten(2)  # with a border, for L below

    def L(dx, dy):
        """(B, K) the logarithm at m + (dx, dy)."""
        return log.gather(2, ((y + 1 + dy) * (w + 2) + x + 1 + dx)[:, :, None])[:, :, 0]

    # g = (∂L/∂x, ∂L/∂y) at m, the gradient, from the pixels on either side
    gx, gy = (L(1, 0) - L(-1, 0)) / 2, (L(0, 1) - L(0, -1)) / 2
    # H = [hxx hxy; hxy hyy] = [∂²L/∂x² ∂²L/∂x∂y; ∂²L/∂x∂y ∂²L/∂y²] at m, the Hessian
    hxx, hyy = L(1, 0) - 2 * L(0, 0) + L(-1, 0), L(0, 1) - 2 * L(0, 0) + L(0, -1)
    hxy = (L(1, 1) - L(1, -1) - L(-1, 1) + L(-1, -1)) / 4
    # The gradient of a parabola is linear, g + H (p - m), and 0 at the top. So the step there is
    # μ - m = -H⁻¹ g, with H⁻¹ = [hyy -hxy; -hxy hxx] / det H and det H = hxx hyy - hxy².
    determinant = hxx * hyy - hxy ** 2
    peaked = (determinant > 1e-9) & (hxx < 0)  # the parabola has a top; without one the result is m itself
    determinant = torch.where(peaked, determinant, torch.ones_like(determinant))
    step = torch.stack([hxy * gy - hyy * gx, hxy * gx - hxx * gy], dim=2) / determinant[:, :, None]  # (B, K, 2)
    points = torch.stack([x, y], dim=2) + (step * peaked[:, :, None]).clamp(-1, 1)  # the top is near m
    return points * torch.tensor((np.array(input_size[::-1]) - 1) / (w - 1, h - 1)).to(points), scores


# ------------------------------------------------------------------------------------------- training and test crops

@dataclass(frozen=True)
class Augmentation:
    """What a training crop may undergo. The default does nothing: for testing."""
    flip: float = 0.0  # probability of a mirror image
    half_body: float = 0.0  # probability of a crop around only the upper or the lower half
    scale: float = 0.0  # factor from 1 - scale to 1 + scale
    shift: float = 0.0  # how far the crop moves, as a fraction of its own size, with probability 0.3
    box_shift: float = 0.0  # the same, as a fraction of the padded box, which has not yet the crop's shape
    rotation: float = 0.0  # degrees either way, with probability 0.6
    color: float = 0.0  # strength of the colour jitter
    resized_crop: float = 0.0  # the crop is a random square part of the box, with at least this share of its area
    outside: bool = False  # whether keypoints outside the crop count, as far as their Gaussians reach into it


GENTLE = Augmentation(flip=0.5, scale=0.1, shift=0.05, rotation=10, color=0.25)  # for minutes, not days, of training
VITPOSE = Augmentation(flip=0.5, half_body=0.3, scale=0.5, box_shift=0.16, rotation=80, outside=True)  # as in mmpose
REGDA = Augmentation(resized_crop=0.6)  # multi-level alignment's; the affine map follows in uda.py


class Crops(torch.utils.data.Dataset):
    """One person per item, cut out and scaled to `size` (height, width), augmented.

    An item's key is (row of the person, seed), not a place in a list: so there is no length, and the same key always
    gives the same crop, whichever process makes it.
    """

    def __init__(self, dataset, size, augmentation=Augmentation()):
        self.dataset, self.size, self.augmentation, self.kept = dataset, size, augmentation, {}

    def __getitem__(self, key):
        row, seed = key
        data, rng, flip = self.dataset, np.random.default_rng(seed), self.dataset.skeleton.flip
        keypoints = data.keypoints[row].astype(np.float64)  # (K, 3) x, y, v

        # Where from? A random map from the image to the crop or, with probability `flip`, to the crop's mirror image.
        matrix = self.random_matrix(keypoints, data.boxes[row], rng)
        if rng.random() < self.augmentation.flip:
            matrix[0] = [0, 0, self.size[1] - 1] - matrix[0]  # x becomes W - 1 - x
            keypoints = keypoints[flip]  # a left eye in a mirror looks like a right one

        # The pixels. det A is the crop's area per area of the image, so 1 / √det A is image pixels per crop pixel.
        wanted = 1 / math.sqrt(abs(np.linalg.det(matrix[:, :2])))  # a smaller image is read faster
        image, shrink = open_image(data.files[data.image_index[row]], wanted, data.upright, self.kept)
        image = warp_image(image, matrix, self.size, shrink)
        if self.augmentation.color:
            image = jitter_color(image, self.augmentation.color, rng)

        # The labels, moved with the pixels.
        points = transform_points(keypoints[:, :2], matrix)
        inside = ((points >= 0) & (points <= np.array(self.size[::-1]) - 1)).all(1)
        visible = keypoints[:, 2] * (inside | self.augmentation.outside)
        return {"image": torch.from_numpy(image).permute(2, 0, 1),  # (3, H, W) bytes
                "keypoints": torch.from_numpy(points).float(),  # (K, 2) in the crop
                "visible": torch.from_numpy(visible).float(),  # (K,) 0: not labelled, or outside
                "matrix": torch.from_numpy(matrix), "row": row,  # (2, 3) from the image to the crop
                "sentence": "" if data.sentences is None else str(data.sentences[data.image_index[row]])}

    def random_matrix(self, keypoints, box, rng):
        """The map (2, 3) from the image to a random crop of it around the box (4,), or around half a body."""
        aug, padding = self.augmentation, PADDING
        if rng.random() < aug.half_body:
            half = half_body_box(keypoints, self.dataset.skeleton, rng)
            box, padding = (box, padding) if half is None else (half, 1.0)
        scale = 1 + aug.scale * truncated_normal(rng)
        rotation = aug.rotation * truncated_normal(rng) * (rng.random() < 0.6)
        move = truncated_normal(rng, 2) * (rng.random() < 0.3)
        box = box + aug.box_shift * padding * np.append(move * box[2:], (0, 0))
        shift = aug.shift * move
        if aug.resized_crop:
            scale = math.sqrt(rng.uniform(aug.resized_crop, 1))
            shift = (rng.random(2) - 0.5) * (1 - scale) / scale  # anywhere within the box
        return crop_matrix(box, self.size, padding, scale, rotation, shift)


# === Appendix A: COCO files; skip on a first reading ==================================================================

import json
import os
import re
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from glob import escape, glob
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch.distributed as dist
from PIL import ExifTags, ImageOps


def skeleton_from(fields):
    """A Skeleton from its fields as JSON has them."""
    groups = {group: tuple(joints) for group, joints in fields["groups"].items()}
    return Skeleton(tuple(fields["names"]), tuple(map(tuple, fields["edges"])), np.array(fields["sigmas"]),
                    tuple(fields["upper"]), groups)


with open(Path(__file__).parent / "assets" / "skeletons.json", encoding="utf-8") as file:
    SKELETONS = {name: skeleton_from(fields) for name, fields in json.load(file).items()}
COCO17, BODY16, ANIMAL18, ANIMAL14 = (SKELETONS[name] for name in ("COCO17", "BODY16", "ANIMAL18", "ANIMAL14"))


@contextmanager
def written_whole(path):
    """Yields where to write a file or a folder; at the end of the block it moves to `path`: nobody ever finds half of
    it. DataError where that cannot be. Of programs that write the same path at once the last one's file stays, or the
    first one's folder: the others get the error."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for draft in path.parent.glob(f"{escape(path.name)}.????????.draft"):
            with suppress(OSError):  # another program has just removed it
                if time.time() - draft.stat().st_mtime > 3600:  # that of a program that was killed
                    shutil.rmtree(draft)
        with tempfile.TemporaryDirectory(prefix=f"{path.name}.", suffix=".draft", dir=path.parent) as beside:
            yield (part := Path(beside) / path.name)
            if part.is_file():
                with open(part, "rb+") as file:
                    os.fsync(file.fileno())
            os.replace(part, path)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch's word for a full disk
            raise
        why = getattr(error, "strerror", None) or "the disk does not take it"
        raise DataError(f"{path}: cannot be written: {why}; {free_space(path) / 1e6:,.0f} MB are free there") from None


def free_space(path):
    """Bytes that are free where a file or a folder is or will be."""
    return shutil.disk_usage(next(filter(os.path.exists, (path, *Path(path).absolute().parents)))).free


def write_json(path, content, indent=None):
    with expecting(path, "finite numbers to write"):
        text = json.dumps(content, indent=indent, allow_nan=False)
    with written_whole(path) as part:
        part.write_text(text)


def cache_folder():
    """Where downloads, drawn figures and trained base models are kept: $POSEBRIDGE_HOME, or ~/.cache/posebridge."""
    return Path(os.environ.get("POSEBRIDGE_HOME") or Path.home() / ".cache" / "posebridge")


def progress(items, what):
    """The items, one after the other; what takes long says every few seconds how many of them it has come to."""
    last, end = time.monotonic(), "    \r" if sys.stderr.isatty() else "\n"
    for place, item in enumerate(items):
        if time.monotonic() - last > 5:
            last = time.monotonic()
            print(f"{what}: {place} of {len(items)}", end=end, file=sys.stderr, flush=True)
        yield item


@contextmanager
def expecting(path, what, kind=DataError):
    """An error of this kind that names the file where it is missing, or is not what the block expects it to be."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise kind(f"{path}: no such file; expected {what}") from None
    except KeyError as error:
        raise kind(f"{path}: expected {what}, found no entry {error}") from None
    except Exception as error:  # a damaged file makes readers raise almost anything
        raise kind(f"{path}: expected {what}; {type(error).__name__}: {error}") from None


# ----------------------------------------------------------------------------------------------------------- images
@contextmanager
def image_file(file):
    """An open Pillow image; a DataError if it cannot be opened or, within the block, be decoded."""
    try:
        with Image.open(file) as image:
            if Image.MAX_IMAGE_PIXELS and image.width * image.height > 10 ** 8:
                raise ValueError(f"{image.width}×{image.height} pixels; `eval.py --large` reads more than 100 million")
            yield image
    except FileNotFoundError:
        raise DataError(f"{file}: no such image") from None
    except Exception as error:  # odd pictures, and odd EXIF, make Pillow raise almost anything
        larger = "; `eval.py --large` reads it" * isinstance(error, Image.DecompressionBombError)
        raise DataError(f"{file}: not a readable image: {error}{larger}") from None


def open_image(file, shrink=1.0, upright=False, kept=None):
    """The image as RGB, and how many times smaller it was read than it is: at most `shrink` times, by which JPEGs are
    read faster. upright: turned as its EXIF orientation says; the images of data sets are not, for their annotations
    ignore it. file: a path, or a Pillow image. kept: {file: image}, those that need not be read again."""
    if isinstance(file, Image.Image):
        return to_rgb(ImageOps.exif_transpose(file) if upright else file), 1
    if kept and file in kept and (shrink < 2 or not str(file).lower().endswith((".jpg", ".jpeg"))):
        return kept[file], 1
    with image_file(file) as image:
        full_width = image.width
        image.draft("RGB", (math.ceil(image.width / max(shrink, 1)), math.ceil(image.height / max(shrink, 1))))
        smaller = round(full_width / image.width)
        image.load()
        image = to_rgb(ImageOps.exif_transpose(image) if upright else image)
    if kept is not None and smaller == 1:  # 10,000 small images, at most 1.3 GB; of large ones the last, for all in it
        if image.width * image.height > 2 ** 15 or len(kept) >= 10_000:
            kept.clear()
        kept[file] = image
    return image, smaller


def to_rgb(image):
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip instead of scale
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise DataError("its pixels are floats, and nobody knows of what scale: expected bytes")
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies


def truncated_normal(rng, size=None):
    """Standard normal numbers within ±1."""
    values = rng.standard_normal(size)
    while np.any(outside := np.abs(values) > 1):
        values = np.where(outside, rng.standard_normal(size), values)
    return values


def jitter_color(image, strength, rng):
    """Random brightness b, contrast c and saturation s, each 1 ± strength, of a byte image (H, W, 3)."""
    b, c, s = 1 + strength * rng.uniform(-1, 1, 3)
    # Saturation mixes a colour v (3,) with its own grey, s v + (1 - s) mean(v); contrast mixes it with the mean m of
    # the image, c v + (1 - c) m; brightness mixes it with black, b v. One after the other they give
    # b c (s I + (1 - s) J) v + b (1 - c) m, where I is the identity and J the 3×3 matrix of thirds: J v = mean(v).
    mix = b * c * (s * np.eye(3) + (1 - s) / 3)
    offset = (1 - c) * b * (image.sum(dtype=np.uint32) / image.size)  # mean() takes three times as long
    return (image @ mix.astype(np.float32) + np.float32(offset)).clip(0, 255).astype(np.uint8)


def half_body_box(keypoints, skeleton, rng):
    """A box (4,) around the upper or the lower half of a person, as mmpose's RandomHalfBody; None if fewer than nine of
    the keypoints (K, 3) are labelled, or too few of either half."""
    labelled = keypoints[:, 2] > 0
    upper = labelled & np.isin(np.arange(len(keypoints)), skeleton.upper)
    lower = labelled & ~upper
    halves = [half for half, least in ((upper, 2), (lower, 3)) if half.sum() >= least]
    if labelled.sum() < 9 or not halves:
        return None
    points = keypoints[halves[0] if rng.random() < 0.7 else halves[-1], :2]
    size = np.maximum(np.ptp(points, axis=0), 1) * 1.5
    return np.concatenate([points.mean(0) - size / 2, size])


# --------------------------------------------------------------------------------------------- JSON records to arrays
def read_json(path, kind, what):
    """The list or the object (kind: list, dict) that a JSON file holds."""
    with expecting(path, f"{what}, a JSON {'list' if kind is list else 'object'}"):
        content = json.loads(Path(path).read_bytes())
        if not isinstance(content, kind):
            raise ValueError(f"found {content!r:.40}")
        return content


FARTHEST = 1e6  # pixels: no coordinate is beyond
# The shape and type of a field; a text is any str, a flag 0 or 1
ID, NUMBER, BOX, TEXT, FLAG = ((), int), ((), float), ((4,), float), ((), object), ((), bool)
BROKEN = (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError)  # what a wrong record raises


def column(records, field, kind, name, first=0):
    """One field of all records as an array (records, *shape) of finite numbers or texts; kind is its (shape, type). A
    DataError names the first record that does not hold them; `first` is the place of records[0] in its list."""
    shape, dtype = kind
    if not records:
        return np.zeros((0, *shape), dtype)
    try:
        values = [record[field] for record in records]
        if dtype is object:
            if all(isinstance(value, str) for value in values):
                return np.array(values, object)
        elif (values := np.array(values)).dtype.kind in "biuf" and values.shape[1:] == shape:
            with np.errstate(all="ignore"):
                array = values.astype(dtype, copy=False)
            if np.isfinite(array).all() and (array.dtype.kind == "f" or (array == values).all()):
                return array
    except BROKEN:
        pass
    if len(records) > 1:  # which of them is it?
        return np.concatenate([column([record], field, kind, name, first + i) for i, record in enumerate(records)])
    record = records[0] if isinstance(records[0], dict) else {}
    ids = "".join(f", {key} {record[key]}" for key in ("id", "image_id") if key in record)
    what = {int: "integer", object: "text", bool: "flag (0 or 1)"}.get(dtype, "finite number")
    expected = f"{'×'.join(map(str, shape)) or 'one'} {what}{'s' * bool(shape)}"
    found = repr(record[field]) if field in record else "nothing"
    if isinstance(record.get(field), list):
        items = record[field]
        odd = [item for item in items if not (isinstance(item, (int, float)) and abs(item) < np.inf)]
        found = f"{len(items)} values" + (f", among them {odd[0]!r}" if odd else "")
    raise DataError(f"{name} {first}{ids}: expected {expected} in '{field}', found {found:.80}")


def read_columns(records, kinds, name):
    """A list of records -> {field: array}."""
    return {field: column(records, field, kind, name) for field, kind in kinds.items()}


# ------------------------------------------------------------------------------------------------ COCO and Human-Art
NATURAL_DOMAINS = frozenset({"photo", "acrobatics", "cosplay", "dance", "drama", "movie"})  # the others are artificial


def read_coco(name, path, home, folder_is_domain):
    """Reads a file of COCO's format and its skeleton; its images are in or near `home`, see `locate_images`. An image's
    domain is its `category`, or "photo"; if `folder_is_domain`, it may be its folder's name."""
    content = read_json(path, dict, "COCO's annotations")
    if not all(isinstance(content.get(section), list) for section in ("images", "annotations")):
        raise DataError(f"{path}: not COCO keypoints: expected lists 'images' and 'annotations'")

    def complete(record):
        """The record with what a file may leave out."""
        try:
            if "bbox" not in record:
                domain = domain_of(record) if folder_is_domain else record.get("category", "photo")
                return record | {"category": str(domain), "description": str(record.get("description") or "")}
            area = float(record["bbox"][2]) * float(record["bbox"][3])
            return {"iscrowd": 0} | record | {"area": record.get("area") or area}
        except BROKEN:
            return record  # the column reader says what is wrong

    skeleton = read_skeleton(path, content)
    count = len(skeleton.names)
    kinds = {"images": {"id": ID, "file_name": TEXT, "category": TEXT, "description": TEXT},
             "annotations": {"id": ID, "image_id": ID, "keypoints": ((3 * count,), np.float32), "bbox": BOX,
                             "area": NUMBER, "iscrowd": FLAG}}
    tables = {section: read_columns([*map(complete, content[section])], kinds[section], f"{path}: {section[:-1]}")
              for section in kinds}
    images, people = tables["images"], tables["annotations"]
    if not len(images["id"]):
        raise DataError(f"{path}: expected images, found none")
    dataset = PoseDataset(
        name=name, skeleton=skeleton, files=locate_images(path, images["file_name"].tolist(), home),
        image_ids=images["id"], domains=images["category"].astype(str), ids=people["id"],
        image_index=image_rows(path, images["id"], people["id"], people["image_id"]),
        keypoints=people["keypoints"].reshape(-1, count, 3), boxes=people["bbox"], areas=people["area"],
        crowd=people["iscrowd"], sentences=images["description"].astype(str))
    check_people(path, dataset)
    return dataset


def read_skeleton(path, content):
    """The skeleton in COCO's `categories`, or COCO17; people may have only its first keypoints, as in Human-Art."""
    with expecting(path, "'categories' with the same names of 'keypoints' in each, and a 'skeleton' of pairs of them"):
        given = [category for category in content.get("categories") or () if category.get("keypoints")]
        if not given:
            return COCO17
        names = tuple(map(str, given[0]["keypoints"]))
        different = len(set(map(plain_name, names))) == len(names)
        if not different or any(category["keypoints"] != given[0]["keypoints"] for category in given):
            raise ValueError(f"found {len(given)} categories, the first with {len(names)} names")
        people = content.get("annotations") or ()
        first = next((person["keypoints"] for person in people if person.get("keypoints")), names * 3)
        if not len(first) % 3:
            names = names[:len(first) // 3]
        return make_skeleton(names, [(a - 1, b - 1) for a, b in given[0].get("skeleton") or ()
                                     if 0 < min(a, b) and max(a, b) <= len(names)])


def with_sentences(dataset, sentences):
    """The data set with a sentence for each image, for VLPose's text tower to read.

    sentences: a template such as "a photo of a {domain} character" ("photo" is called "human" there); {domain:
        sentence}, or the path of a JSON file with that; or "description": each image's own, as Human-Art has them.
    """
    if sentences == "description":
        if dataset.sentences is None or "" in dataset.sentences:
            raise DataError(f"{dataset.name}: expected a 'description' of each image, found none in some")
        return dataset
    domains = dataset.domains.tolist()
    if str(sentences).endswith(".json"):
        sentences = read_json(sentences, dict, "{domain: sentence}")
    if isinstance(sentences, dict):
        missing = sorted(domain for domain in set(domains) if not isinstance(sentences.get(domain), str))
        if missing:
            raise DataError(f"{dataset.name}: expected a sentence for each domain, found none for {', '.join(missing)}")
        return replace(dataset, sentences=np.array([sentences[domain] for domain in domains]))
    names = ["human" if domain == "photo" else domain for domain in domains]
    return replace(dataset, sentences=np.array([sentences.replace("{domain}", name) for name in names]))


def domain_of(image):
    """Human-Art names an image's domain in `category`, or else by its folder; an image in COCO's has neither."""
    folder = PurePosixPath(str(image["file_name"])).parent.name
    domain = image.get("category") or (folder if not folder.endswith("2017") else "") or "photo"
    return str(domain).replace("_", " ")


def image_rows(path, image_ids, ids, owners):
    """The row of each annotation's image, given its image's id in `owners`."""
    for kind, numbers in (("image", image_ids), ("annotation", ids)):
        unique, counts = np.unique(numbers, return_counts=True)
        if (counts > 1).any():
            raise DataError(f"{path}: {kind} id {unique[counts > 1][0]} appears more than once")
    order = np.argsort(image_ids)
    rows = order[np.searchsorted(image_ids, owners, sorter=order).clip(max=len(order) - 1)]
    lost = image_ids[rows] != owners
    if lost.any():
        raise DataError(f"{path}: annotation id {ids[lost][0]}: no image has its image_id {owners[lost][0]}")
    return rows


def locate_images(path, file_names, home):
    """Full paths of images in `home`, in the folder around it, or in folders of the usual names in either.
    Leading folders of a file name that do not exist here (Human-Art's `HumanArt/images/`) are stripped."""
    folders = [str(place / name) for place in (home, home.parent) for name in ("", "images", "train2017", "val2017")]
    parts = []
    for name in file_names:
        place = PureWindowsPath(name)  # knows both separators
        if ".." in place.parts or place.anchor:
            raise DataError(f"{path}: image file name {name!r} leads outside the data set's folder")
        parts.append(place.parts)
    start = next((start for start in range(len(parts[0]))
                  if any(os.path.isfile(os.path.join(folder, *parts[0][start:])) for folder in folders)), 0)
    files, folder = [], folders[0]
    for name, pieces in zip(file_names, parts):
        places = (folder, *folders)  # most often it is the folder of the image before
        folder = next((place for place in places if os.path.isfile(os.path.join(place, *pieces[start:]))), None)
        if folder is None:
            raise DataError(f"{path}: image {name!r} is missing; looked in {', '.join(folders)}")
        files.append(os.path.join(folder, *pieces[start:]))
    return files


def check_people(path, dataset):
    """People must have finite numbers, and those who will be trained on a box with an area."""
    boxes, annotated = dataset.boxes, np.isin(np.arange(len(dataset.ids)), dataset.annotated)
    numbers = np.hstack([*dataset.keypoints.transpose(2, 0, 1), boxes])  # (people, 3 K + 4)
    near = (np.abs(numbers) <= FARTHEST).all(1) & np.isfinite(dataset.areas)  # NaN is not
    seen = np.isin(dataset.keypoints[:, :, 2], (0, 1, 2)).all(1)
    empty = annotated & ~(boxes[:, 2:] > 0).all(1)
    for problem, wrong in (("a number that is not finite, or beyond a million", ~near),
                           ("a visibility other than 0, 1 and 2", ~seen), ("a box of zero or negative size", empty)):
        for row in np.flatnonzero(wrong):
            raise DataError(f"{path}: annotation id {dataset.ids[row]} has {problem}: bbox {boxes[row].tolist()}")


def to_coco(dataset, category="person"):
    """The people of a PoseDataset as COCO's annotations: what `read_coco` reads, and pycocotools."""
    _, names = below_common_folder(dataset.files)
    images = [{"id": int(number), "file_name": name, "category": str(domain)}
              for number, name, domain in zip(dataset.image_ids, names, dataset.domains)]
    annotations = [
        {"id": int(dataset.ids[n] or dataset.ids.max() + 1), "category_id": 1,  # pycocotools takes 0 for nobody
         "image_id": int(dataset.image_ids[dataset.image_index[n]]), "keypoints": dataset.keypoints[n].ravel().tolist(),
         "num_keypoints": int((dataset.keypoints[n, :, 2] > 0).sum()), "bbox": dataset.boxes[n].tolist(),
         "area": float(dataset.areas[n]), "iscrowd": int(dataset.crowd[n])} for n in range(len(dataset.ids))]
    return {"images": images, "annotations": annotations, "categories": [to_category(dataset.skeleton, category)]}


def to_category(skeleton, name="person"):
    """A skeleton as COCO has it: edges count from 1."""
    return {"id": 1, "name": name, "keypoints": list(skeleton.names),
            "skeleton": [[a + 1, b + 1] for a, b in skeleton.edges]}


# ----------------------------------------------------------------------------------------------- own pictures and boxes
def below_common_folder(files):
    """The deepest folder that holds all files, and where each is below it. Two files never have the same place."""
    paths = [os.path.abspath(file) for file in files]
    home = os.path.commonpath([os.path.dirname(path) for path in paths])
    return home, [Path(path).relative_to(home).as_posix() for path in paths]


def find_pictures(patterns):
    """Paths of the images that files, folders (and the folders in them) and patterns such as '*.png' name."""
    files, endings = [], {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    for pattern in patterns:
        found = [pattern] if os.path.isfile(pattern) else sorted(glob(str(pattern), recursive=True))
        if os.path.isdir(pattern):
            found = sorted(str(file) for file in Path(pattern).rglob("*") if file.suffix.lower() in endings)
        if not found:
            raise DataError(f"{pattern}: no such image, no folder with images, and no pattern that fits any")
        files += found
    return list(dict.fromkeys(map(str, files)))


def unreadable(files):
    """{file: what is wrong} of those of which no picture can be decoded."""
    problems = {}
    for file in progress(files, "checking pictures"):
        try:
            open_image(file, shrink=8, upright=True)
        except DataError as error:
            problems[file] = str(error)
    return problems


def read_pictures(files, name="pictures", skeleton=COCO17, strict=False):
    """Pictures, numbered from 1, each taken as one person. What cannot be read is named and skipped, unless strict."""
    problems = unreadable(files)
    for problem in problems.values():
        if strict:
            raise DataError(problem)
        print(f"{problem}; skipped", file=sys.stderr)
    good = [file for file in files if file not in problems]
    if not good:
        raise DataError(f"{name}: expected pictures, found none that can be read")
    print(f"{name}: skipped {len(problems)} of {len(files)}\n" if problems else "", end="", file=sys.stderr)
    boxes = np.array([(0, 0, *picture_size(file)[0]) for file in good], float)
    return with_boxes(no_people(good, skeleton, name), np.arange(len(good)), boxes)


def no_people(files, skeleton, name="pictures"):
    """A data set of pictures, paths or Pillow images, in which nobody has been looked for yet."""
    return PoseDataset(name=name, skeleton=skeleton, files=files, image_ids=np.arange(1, len(files) + 1),
                       domains=np.full(len(files), "picture"), upright=True,
                       **dict.fromkeys(("ids", "image_index", "keypoints", "boxes", "areas", "crowd")))


def picture_size(file, upright=True):
    """(width, height) of a picture, `upright` as EXIF says (Pillow turns TIFFs); the format of one stored otherwise."""
    with image_file(file) as image:
        turn = image.getexif().get(ExifTags.Base.Orientation, 1) if upright else 1
        size = image.size[::-1] if turn in range(5, 9) and image.format != "TIFF" else image.size
        return size, image.format if turn in range(2, 9) else None


def select_images(dataset, keep):
    """The data set with only the images where `keep` (images,) is true, and the people in them."""
    people = dataset.select_people(keep[dataset.image_index])
    return replace(people, files=[file for file, kept in zip(dataset.files, keep) if kept],
                   image_ids=dataset.image_ids[keep], domains=dataset.domains[keep],
                   image_index=(np.cumsum(keep) - 1)[people.image_index],
                   sentences=None if dataset.sentences is None else dataset.sentences[keep])


def unlabelled(dataset):
    """The data set as a target domain without labels: everyone with a box, all keypoints 0."""
    people = dataset.select_people((dataset.boxes[:, 2:] > 0).all(1) & ~dataset.crowd)
    if not len(people.ids):
        raise DataError(f"{dataset.name}: expected a person with a box, found none")
    return replace(people, keypoints=np.zeros_like(people.keypoints))


def with_boxes(dataset, image_index, boxes):
    """The data set with other people in it: unlabelled, in boxes (people, 4) of the images in rows (people,)."""
    count = len(boxes)
    keypoints = np.zeros((count, len(dataset.skeleton.names), 3), np.float32)
    return replace(dataset, ids=np.arange(1, count + 1), image_index=image_index, keypoints=keypoints, boxes=boxes,
                   areas=boxes[:, 2] * boxes[:, 3], crowd=np.zeros(count, bool))


def picture_rows(files):
    """{name: row}: a picture's place below the folder of all, or its name only, both also without the ending."""
    rows, places = {}, below_common_folder(files)[1]
    for row, place in enumerate(places):
        path = PurePosixPath(place)
        for name in {str(path.with_suffix("")), path.name, path.stem}:
            rows[name] = SHARED if name in rows else row
    return rows | {place: row for row, place in enumerate(places)}


SHARED = -2  # in place of a row: two pictures have this name


def read_boxes(path, rows, category=1):
    """A detector's COCO results, of a category or (None) of all -> rows of images (boxes,), boxes (boxes, 4), scores
    (boxes,). rows: image_id -> row of the image; of an own picture it is the file's name, see `picture_rows`."""
    records = [{"score": 1, "category_id": 1} | record if isinstance(record, dict) else {"": record}
               for record in read_json(path, list, "boxes in COCO's results format")]
    table = read_columns(records, {"bbox": BOX, "score": NUMBER, "category_id": ID}, f"{path}: box")
    image, boxes = np.empty(len(records), int), table["bbox"]
    for place, name in enumerate(record.get("image_id") for record in records):
        if not isinstance(name, (int, str)):
            raise DataError(f"{path}: box {place}: expected an 'image_id' (or a file's name), found {name!r:.80}")
        image[place] = rows.get(name, -1)
        if image[place] == SHARED:
            raise DataError(f"{path}: box {place}: two pictures are called {name}; expected folders")
    for place in np.flatnonzero(~((boxes[:, 2:] > 0).all(1) & (np.abs(boxes) <= FARTHEST).all(1))):
        raise DataError(f"{path}: box {place}: expected a 'bbox' [x, y, w, h] of some size, found {boxes[place]}")
    used = (image >= 0) & (category is None or table["category_id"] == category)
    if not used.any():
        raise DataError(f"{path}: expected boxes of category {category or 'any'}, found {(image < 0).sum()} elsewhere")
    if (image < 0).any():
        print(f"{path}: skipped {(image < 0).sum()} boxes of other images", file=sys.stderr)
    return image[used], boxes[used], table["score"][used]


def read_folder(spec, root, split):
    """All images in a folder, without labels, in each split; people are in its boxes.json, or each picture is one."""
    pictures = read_pictures(find_pictures([root]), spec)
    if (root / "boxes.json").is_file():
        rows, boxes, _ = read_boxes(root / "boxes.json", picture_rows(pictures.files), category=None)
        pictures = with_boxes(pictures, rows, boxes)
    return pictures


READERS = {"pictures": read_folder}
ANNOTATION_FILES = {  # data set -> its official names for the two splits
    "coco": {split: f"person_keypoints_{split}2017.json" for split in ("train", "val")}} | {
    name: {"train": f"training_{name}.json", "val": f"validation_{name}.json"} for name in ("humanart", "figures")}


def load_dataset(spec, split, cache=None):
    """Opens "name:root" for split "train", "val" or "all". Raises DataError for what cannot be read.

    "name:root#domain" is the part with images of that domain; several are separated by commas. "#natural" is short for
        photographs and Human-Art's natural scenes, "#artificial" for all others.
    name: `figures` (no root: drawn once into the cache folder), `coco`, `humanart`; or `pictures`, without labels.
    root: the data set's folder, or one file in COCO's format. Where only one file is there, every fifth image is "val",
        the others are "train", and "all" is the whole file. All of `pictures` are in each split.
    """
    path, _, chosen = spec.rpartition("#")
    if not path or {"/", os.sep} & set(chosen) or os.path.exists(spec.partition(":")[2]):  # the # of a folder's name
        return open_dataset(spec, split, cache)
    dataset = open_dataset(path, split, cache)
    there = set(dataset.domains.tolist())
    kinds = {"natural": there & NATURAL_DOMAINS, "artificial": there - NATURAL_DOMAINS}
    domains = kinds.get(chosen, set(chosen.split(",")))
    if not domains or domains - there:
        raise DataError(f"{spec}: no image of domain {', '.join(sorted(domains - there)) or chosen}; expected some of "
                        f"{', '.join(sorted(there))}")
    return replace(select_images(dataset, np.isin(dataset.domains, list(domains))), name=spec)


def open_dataset(spec, split, cache):
    """`load_dataset` with all domains."""
    name, _, root = spec.partition(":")
    names = [*ANNOTATION_FILES, *READERS]
    if name not in names:
        raise DataError(f"unknown data set {name!r} in {spec!r}: expected one of {', '.join(names)}")
    if split not in ("train", "val", "all"):
        raise DataError(f"{spec}: unknown split {split!r}: expected train, val or all")
    root = Path(root) if root else draw_figures(cache or cache_folder()) if name == "figures" else None
    if root is None or not root.exists():
        raise DataError(f"{spec}: no such file or folder; expected {name}:FOLDER or {name}:FILE.json")
    if name in READERS:
        return READERS[name](spec, root, split)
    path, own = annotation_file(root, ANNOTATION_FILES[name], split)
    dataset = read_coco(spec, path, root if root.is_dir() else root.parent, folder_is_domain=name != "coco")
    return dataset if own else hold_out(dataset, split, np.arange(len(dataset.files)))


def annotation_file(root, names, split):
    """The annotation file of a split, and whether it holds that split alone."""
    if root.is_file():
        return root, False
    folders = (root, root / "annotations")
    official = {s: folder / name for s, name in names.items() for folder in folders if (folder / name).is_file()}
    if split in official and (len(official) == len(names) or split == "val"):
        return official[split], True
    if list(official) == ["val"]:
        raise DataError(f"{root}: expected {names['train']} to train on, found {names['val']} alone")
    found = [path for folder in folders for path in sorted(folder.glob("*.json"))  # objects; results are lists
             if path.read_bytes()[:99].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{"]
    if len(found) != 1:
        raise DataError(f"{root}: expected {' and '.join(names.values())}, or a single JSON file, which 'all' needs; "
                        f"found {len(found)}")
    return found[0], False


def hold_out(dataset, split, numbers):
    """A split of the one file that there is: images (images,) whose number is a multiple of five are for validation."""
    return select_images(dataset, (split == "all") | ((numbers % 5 == 0) == (split == "val")))


# === Appendix B: skeletons and what makes them fit each other; skip on a first reading ===============================

SIGMAS = {name.removeprefix("left_").removeprefix("right_"): sigma for skeleton in [*SKELETONS.values()][::-1]
          for name, sigma in zip(skeleton.names, skeleton.sigmas)}  # COCO's, where it has any
LOWER = {"hip", "knee", "ankle", "heel", "toe", "foot", "pelvis", "tail", "back", "hind"}  # words of the lower half
WORDS = {"l": "left", "r": "right", "f": "front", "b": "back", "paw": "hoof"}


def known_skeleton(count):
    """The skeleton of a model of which no more is known than that it has so many keypoints."""
    known = [skeleton for skeleton in SKELETONS.values() if len(skeleton.names) == count]
    return known[0] if known else make_skeleton([f"keypoint {number}" for number in range(1, count + 1)], ())


def plain_name(name):
    """left_eye for LeftEye, L_Eye, "left eye" and left-eye."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[^\W_A-Za-z]+", name)
    return "_".join(WORDS.get(word, word) for word in map(str.lower, words)) or name


def make_skeleton(names, edges):
    """The known skeleton of these names; or a new one, with what the names tell: sides, halves, sigmas and groups."""
    for known in SKELETONS.values():
        if known.names == tuple(names):
            return known
    sigmas, upper, groups = [], [], {}
    for joint, name in enumerate(map(plain_name, names)):
        words = [word for word in name.split("_") if word not in ("left", "right")]
        kind = "_".join(words) or name  # of both sides: eye
        sigmas.append(SIGMAS.get(kind, 0.05))  # the default is ours
        if "front" in words or not LOWER & set(words):
            upper.append(joint)
        groups[kind] = (*groups.get(kind, ()), joint)
    return Skeleton(tuple(names), tuple(edges), np.array(sigmas), tuple(upper), groups)


# COCO labels nothing near the top of the head or the upper neck: both stay unlabelled, a guess would teach a bias.
MIDPOINTS = {"pelvis": ("left_hip", "right_hip"), "thorax": ("left_shoulder", "right_shoulder")}


def with_skeleton(dataset, skeleton):
    """The data set with the keypoints of another skeleton: those of the same name, or the middle of two (MIDPOINTS).
    What the data set lacks is unlabelled, and said; a DataError if that is everything."""
    have = {plain_name(name): joint for joint, name in enumerate(dataset.skeleton.names)}
    wanted = [plain_name(name) for name in skeleton.names]
    if wanted == [*have]:
        return replace(dataset, skeleton=skeleton)
    pairs = [(name, name) if name in have else MIDPOINTS.get(name, ("", "")) for name in wanted]
    missing = [name for name, pair in zip(skeleton.names, pairs) if not have.keys() >= set(pair)]
    if len(missing) == len(pairs):
        raise DataError(f"{dataset.name}: its skeleton has no keypoint of {', '.join(skeleton.names)}")
    if missing:
        print(f"{dataset.name}: its skeleton lacks {', '.join(missing)}", file=sys.stderr)
    blank = np.zeros_like(dataset.keypoints[:, :1])
    points = np.concatenate([dataset.keypoints, blank], 1)  # its last keypoint stands for all that are missing
    first, second = (points[:, [have.get(pair[side], -1) for pair in pairs]] for side in (0, 1))  # (people, K, 3)
    keypoints = (first + second) / 2
    keypoints[:, :, 2] = np.minimum(first[:, :, 2], second[:, :, 2])
    keypoints[keypoints[:, :, 2] == 0] = 0
    return replace(dataset, skeleton=skeleton, keypoints=keypoints)


# === Appendix: many processes; skip on a first reading ============================================

from datetime import timedelta

from torch.distributed.nn import functional as distributed

# `torchrun --nproc_per_node=N train.py ...` starts N processes that all do the same, each with its share of every batch
# and of the people to predict. What they do together goes through these functions. Without torchrun there is one.

def processes():
    """The number of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def my_share(rows, multiple=1):
    """This process's part of a list, an array or a tensor that all have alike: a multiple of rows, or what is left."""
    rank, world = processes()
    length = math.ceil(len(rows) / world / multiple) * multiple
    return rows[rank * length:(rank + 1) * length]


def all_items(items):
    """The lists of all processes, one behind the other. Each process waits here for the others."""
    _, world = processes()
    lists = [items] * world
    if world > 1:
        dist.all_gather_object(lists, items)
    return sum(lists, [])


def wait_for_all():
    """No process goes on before all have come here."""
    all_items([])


def rows_of_all(x):
    """The rows of a tensor x (rows, ...) of all processes, one behind the other. They have no gradient."""
    if processes()[1] == 1:
        return x.detach()
    return torch.cat(distributed.all_gather(x.detach()))


def mean_of_all(x):
    """The mean over the processes of a tensor that each has. Its gradient goes back to all of them."""
    _, world = processes()
    if world == 1:
        return x
    return distributed.all_reduce(x) / world


@contextmanager
def first_process_first():
    """The first process goes through the block, then the others: what it draws or downloads is there for them."""
    rank, _ = processes()
    if rank > 0:
        wait_for_all()
    yield
    if rank == 0:
        wait_for_all()


class SyncBatchNorm(torch.nn.SyncBatchNorm):
    """BatchNorm with the statistics of the whole batch, over all processes: torch's own, which knows only GPUs."""
    process_group = None  # all

    def forward(self, x):
        _, world = processes()
        if x.is_cuda or world == 1 or not self.training:
            return super().forward(x)
        pixels, count = x.float(), x[:, 0].numel() * world
        mean = mean_of_all(pixels.mean((0, 2, 3)))
        centred = pixels - mean[:, None, None]
        variance = mean_of_all((centred ** 2).mean((0, 2, 3)))
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def seed_step(seed):
    """What is random in a step depends on its number, the run's seed and the process."""
    torch.manual_seed(seed + 10 ** 15 * processes()[0])


def average_gradients(parameters):
    """Each process gets the mean of all processes' gradients, in one exchange; one that a process lacks counts as 0.
    Losses are means over equally many images, or of `mean_of_all`: this is the gradient of the whole batch's loss."""
    if processes()[1] > 1:
        mean = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        dist.all_reduce(mean.div_(processes()[1]))
        for parameter, part in zip(parameters, mean.split([p.numel() for p in parameters])):
            parameter.grad = part.view_as(parameter)


def join_processes(options):
    """Makes this program one of those that torchrun has started; returns what they write messages to each other in."""
    if cuda := options.device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    wait = timedelta(days=1)  # while the first process draws, downloads or saves; torchrun ends all if one fails
    store, rank, world = next(dist.rendezvous("env://", timeout=wait))
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=wait)
    return store


def ignore_group_signals(worker):
    """In a process that cuts crops: what is sent to the whole group, such as Ctrl-C, is for the first process alone."""
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


# === Appendix C: the built-in figures; skip on a first reading ========================================================

from functools import lru_cache
from itertools import chain
from typing import Callable

from PIL import ImageDraw, ImageFilter
from torch.utils.data import DataLoader

# A person is a 3-D skeleton clothed in capsules (rods with round ends that may taper). The capsules go through a small
# z-buffer, which leaves for every pixel what is seen there and how near it is: all that is needed to know which joints
# are covered, where outlines run and how light falls. A style is a set of proportions and a function that paints the
# buffers. Axes: x right, y down, z towards the camera; the person is about 1 high.

SIZE, FINE = 160, 320  # pixels of a picture, and of the buffers: it is drawn at twice its size, then halved
NONE, HEAD, NECK, HAIR, EYE, PUPIL, LIPS, TORSO, SKIRT = range(9)  # parts
ARM, FOREARM, HAND, THIGH, SHIN, FOOT, OBJECT, CLUTTER = range(10, 26, 2)  # left limbs, + 1: right
SKIN, LOCKS, WHITE, BLACK, RED, TOP, BOTTOM, SHOE, THING, BAR = range(1, 11)  # materials


@dataclass
class Figure:
    image: np.ndarray  # (160, 160, 3) uint8
    keypoints: np.ndarray  # (17, 3) x, y, v in COCO's order; v is 2 visible, 1 covered, 0 outside (then x = y = 0)
    box: tuple  # x, y, w, h of the visible silhouette
    area: int  # its number of pixels


@dataclass
class Style:
    paint: Callable  # (scene, rng) -> picture (160, 160, 3)
    poses: str = "stand stand walk walk run sit cheer cheer dance"
    yaw: tuple = (0, 180)  # degrees away from the camera, to either side
    head: float = 1.0  # size
    eyes: float = 1.0  # size
    thick: float = 1.0  # thickness of trunk and limbs
    legs: float = 1.0  # length
    arms: float = 1.0  # length
    robe: float = 0.0  # probability of a robe instead of trousers, shorts or a skirt
    clutter: int = 0  # most rods in the background


@dataclass
class Scene:
    part: np.ndarray  # (320, 320) what is seen
    depth: np.ndarray  # (320, 320) how near it is, in fine pixels
    joints: np.ndarray  # (17, 3) in fine pixels
    covered: np.ndarray  # (17,) bool
    scale: float  # fine pixels per unit
    outfit: np.ndarray  # (32,) material of each part

    @cached_property
    def pixels(self):
        """Where something is seen: (pixels,) indices into the flattened buffers."""
        return np.flatnonzero(self.part)

    @cached_property
    def material(self):
        return self.outfit[self.part.flat[self.pixels]]  # (pixels,)


# ---- the skeleton: poses are ranges in degrees ----------------------------------------------------------------------
with open(Path(__file__).parent / "assets" / "poses.json", encoding="utf-8") as file:
    POSES = {name: [*limits.values()] for name, limits in json.load(file).items()}  # such as "lean": [-5, 8]


def rotation(axis, degrees):
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[[i, j], [i, j]] = np.cos(np.radians(degrees))
    matrix[[i, j], [j, i]] = np.sin(np.radians(degrees)) * np.array([-1, 1])
    return matrix


def swing(forwards, sideways):
    """Direction of a limb that hangs down, swung forwards and then sideways (degrees)."""
    return rotation("z", -sideways) @ rotation("x", forwards) @ [0, 1, 0]


def bend(limb, towards, degrees):
    """Direction of a lower limb: the upper one's, turned towards another direction."""
    across = towards - (towards @ limb) * limb
    return np.cos(np.radians(degrees)) * limb + np.sin(np.radians(degrees)) * across / np.linalg.norm(across)


FACE = np.array([(0, 18, 68), (26, -4, 50), (-26, -4, 50), (64, 4, -4), (-64, 4, -4)]) / 1000  # nose, eyes, ears


def build_person(style, rng):
    """A random person -> joints (17, 3), capsules [(part, end, end, radius, radius)], whether in a robe."""
    lean, hip, stride, apart, knee, arm, lift, elbow, tilt = (
        rng.uniform(*limits, 2) for limits in POSES[rng.choice(style.poses.split())])  # a left and a right
    stride = stride[0] * rng.choice([-1, 1]) * np.array([1, -1])
    yaw = rng.choice([-1, 1]) * rng.uniform(*style.yaw)
    pelvis = rotation("x", rng.uniform(-12, 8)) @ rotation("z", tilt[0]) @ rotation("y", yaw)
    trunk = pelvis @ rotation("x", -lean[0]) @ rotation("y", rng.uniform(-20, 20)) @ rotation("z", rng.uniform(-8, 8))
    skull = trunk @ rotation("y", rng.uniform(-40, 40)) @ rotation("x", rng.uniform(-20, 12))
    head, thick, arms, legs = np.array([style.head, style.thick, style.arms, style.legs]) * rng.uniform(0.92, 1.1, 4)
    robe, skirt, long_hair = rng.random(3) < (style.robe, 0.2, 0.4)
    wide, flare = (1.3, 1.7) if robe else (1, 1)

    joints, chest = np.zeros((17, 3)), trunk @ [0, -0.27, 0]
    capsules = [(TORSO, chest, np.zeros(3), 0.07, 0.07)]
    for side, left in enumerate((1, -1)):
        shoulder, hip_joint = chest + trunk @ [0.1 * left, 0, 0], pelvis @ [0.058 * left, 0, 0]
        upper = swing(arm[side] - 0.8 * stride[side], left * lift[side])  # arms swing against the legs
        lower = bend(upper, rng.uniform((-0.2, -1, 0.4), (0.7, 0.1, 1)) * (-left, 1, 1), elbow[side])
        elbow_joint = shoulder + 0.165 * arms * trunk @ upper
        wrist = elbow_joint + 0.145 * arms * trunk @ lower
        thigh = swing(hip[side] + stride[side], left * apart[side])
        shin = bend(thigh, -swing(hip[side] + stride[side] + 90, 0), knee[side])
        knee_joint = hip_joint + 0.24 * legs * pelvis @ thigh
        ankle = knee_joint + 0.235 * legs * pelvis @ shin
        toes = ankle + 0.085 * pelvis @ bend(shin, np.cross(shin, [-1, 0.25 * left, 0]), 75)
        joints[5 + side::2] = shoulder, elbow_joint, wrist, hip_joint, knee_joint, ankle
        capsules += [
            (TORSO, 0.4 * chest + 0.6 * shoulder, hip_joint, 0.062, 0.064), (TORSO, chest, shoulder, 0.042, 0.042),
            (ARM + side, shoulder, elbow_joint, 0.042, 0.032 * wide),
            (FOREARM + side, elbow_joint, wrist, 0.031 * wide, 0.022 * flare),
            (HAND + side, wrist, wrist + 0.055 * trunk @ lower, 0.022, 0.017),
            (THIGH + side, hip_joint, knee_joint, 0.06, 0.043 * flare),
            (SHIN + side, knee_joint, ankle, 0.042 * flare, 0.027 * flare),
            (FOOT + side, ankle, toes, 0.027, 0.021)]
        if robe:
            capsules.append((FOREARM + side, wrist, wrist + [0, 0.09, 0], 0.03, 0.045))  # a wide sleeve
    for u in (0.2, 0.5, 0.8) if robe or skirt else ():  # cloth between the legs
        hem_knee, hem_ankle = u * joints[[13, 15]] + (1 - u) * joints[[14, 16]]
        capsules.append((SKIRT, np.zeros(3), hem_knee, 0.07, 0.06))
        if robe:
            capsules.append((SKIRT, hem_knee, hem_ankle, 0.06, 0.05))
    capsules = [(part, a, b, thick * ra, thick * rb) for part, a, b, ra, rb in capsules]

    nose, *eyes_and_ears = FACE
    features = [(HEAD, (0, 0.026, 0.01), (0, -0.02, -0.002), 0.05, 0.062),
                (HEAD, nose - (0, 0.02, 0.01), nose, 0.009, 0.012),
                (LIPS, (-0.014, 0.044, 0.052), (0.014, 0.044, 0.052), 0.008, 0.008),
                (HAIR, (0, -0.035, -0.012), (0, 0.09, -0.045) if long_hair else (0, -0.02, -0.022), 0.06, 0.05)]
    for part, at, radius in zip((EYE, EYE, HEAD, HEAD), eyes_and_ears, (0.016 * style.eyes,) * 2 + (0.017,) * 2):
        features.append((part, at, at, radius, radius))
    for eye in eyes_and_ears[:2]:
        features.append((PUPIL, *[eye + (0, 0.001, 0.006 + 0.005 * style.eyes)] * 2, *[0.008 * style.eyes] * 2))
    middle = trunk @ [0, -0.325, 0.015] + head * skull @ [0, -0.075, 0.01]
    for part, a, b, ra, rb in features:
        capsules.append((part, middle + head * skull @ a, middle + head * skull @ b, head * ra, head * rb))
    capsules.append((NECK, trunk @ [0, -0.30, 0.005], middle, 0.03, 0.035))
    joints[:5] = middle + head * FACE @ skull.T
    return joints, capsules, robe


def dress(robe, rng):
    """The material of each part (32,)."""
    outfit = np.zeros(32, np.uint8)
    outfit[[HEAD, NECK, HAIR, PUPIL, EYE, LIPS]] = SKIN, SKIN, LOCKS, BLACK, WHITE, RED
    sleeves = [(SKIN, SKIN), (TOP, SKIN), (TOP, TOP)][2 if robe else rng.integers(3)]
    trousers = (TOP, TOP) if robe else [(BOTTOM, SKIN), (BOTTOM, BOTTOM)][rng.integers(2)]
    outfit[ARM:] = np.repeat((*sleeves, SKIN, *trousers, SHOE, THING, THING, 0, 0, 0), 2)
    outfit[[TORSO, SKIRT, CLUTTER + 1]] = TOP, trousers[0], BAR
    return outfit


# ---- the z-buffer ---------------------------------------------------------------------------------------------------
def draw_capsule(scene, part, a, b, ra, rb):
    """Adds a capsule, in fine pixels, wherever it is nearer than what the buffers hold."""
    (ax, ay, az), (dx, dy, dz), ra, rb = a.tolist(), (b - a).tolist(), float(ra), float(rb)
    reach = max(ra, rb)
    left, right = (min(max(int(x), 0), FINE) for x in (min(ax, ax + dx) - reach, max(ax, ax + dx) + reach + 1))
    top, bottom = (min(max(int(y), 0), FINE) for y in (min(ay, ay + dy) - reach, max(ay, ay + dy) + reach + 1))
    x, y = np.arange(left, right, dtype=np.float32) - ax, np.arange(top, bottom, dtype=np.float32)[:, None] - ay
    along = np.minimum(np.maximum((x * dx + y * dy) / (dx * dx + dy * dy + 1e-6), 0), 1)
    radius = ra + (rb - ra) * along
    bulge = radius ** 2 - (x - along * dx) ** 2 - (y - along * dy) ** 2
    depth = az + along * dz + np.sqrt(np.maximum(bulge, 0))
    window = slice(top, bottom), slice(left, right)
    nearer = (bulge > 0) & (depth > scene.depth[window])
    np.copyto(scene.depth[window], depth, where=nearer)
    np.copyto(scene.part[window], np.uint8(part), where=nearer)


def compose(style, rng):
    """Places a random person in the image."""
    joints, capsules, robe = build_person(style, rng)
    ends, radii = np.array([capsule[1:3] for capsule in capsules]), np.array([capsule[3:] for capsule in capsules])
    low, high = (ends - radii[..., None]).min((0, 1)), (ends + radii[..., None]).max((0, 1))
    near = rng.uniform(1.1, 1.6) if rng.random() < 0.12 else 1  # then the border cuts it
    scale = near * rng.uniform(0.68, 0.96) * FINE / (high - low)[:2].max()
    shift = (rng.uniform(0.1, 0.9, 3) * (FINE - scale * (high - low)) - scale * low) * (1, 1, 0)
    joints, ends, radii = joints * scale + shift, ends * scale + shift, radii * scale
    scene = Scene(np.zeros((FINE, FINE), np.uint8), np.full((FINE, FINE), -1e6, np.float32),
                  joints, None, scale, dress(robe, rng))
    for _ in range(rng.integers(style.clutter + 1)):
        a = np.append(rng.uniform(0, FINE, 2), -1e4)
        draw_capsule(scene, CLUTTER + rng.integers(2), a, a + rng.normal(0, (40, 40, 0)), *rng.uniform(3, 14, 2))
    for (part, *_), (a, b), (ra, rb) in zip(capsules, ends, radii):
        draw_capsule(scene, part, a, b, ra, rb)
    if rng.random() < 0.15:
        hide_a_joint(scene, rng)
    touch = np.linalg.norm(joints[:, None, None] - ends, axis=-1) < 1e-3  # (17, capsules, 2)
    limb = np.where(touch, radii, 0).max((1, 2))  # its radius at the joint
    x, y = np.clip(np.rint(joints[:, :2]), 0, FINE - 1).astype(int).T
    scene.covered = scene.depth[y, x] > joints[:, 2] + 1.3 * limb + 0.02 * scale  # clearly nearer than its own surface
    return scene


def hide_a_joint(scene, rng):
    """Puts a pole or a bush in front of the person."""
    pole, joint = rng.random() < 0.5, rng.choice(scene.joints[5:]) * (1, 1, 0) + (0, 0, 1e4)
    for _ in range(1 if pole else 9):
        middle, along = joint + rng.normal(0, (8, 8, 0)), rng.normal(0, (900, 900, 0) if pole else (12, 12, 0))
        draw_capsule(scene, OBJECT, middle - along, middle + along, *rng.uniform(0.02, 0.06, 2) * scene.scale)


# ---- what the styles share; `pixels` are those where something is seen ----------------------------------------------
def light(scene, direction, ambient=0.0):
    """Brightness (pixels,) by Lambert's law, with normals from the slope of the depth."""
    def slope(step):
        ahead, behind = (scene.depth.take(scene.pixels + s, mode="clip") for s in (step, -step))
        return np.clip((ahead - behind) / 2, -4, 4)
    x, y, (lx, ly, lz) = slope(1), slope(FINE), (np.array(direction) / np.linalg.norm(direction)).tolist()
    return ambient + (1 - ambient) * np.maximum((lz - lx * x - ly * y) / np.sqrt(1 + x * x + y * y), 0)


def fold(scene, depth):
    """Lays the clothes in folds, in fine pixels deep, for the light to fall on."""
    cloth = scene.pixels[(scene.material == TOP) | (scene.material == BOTTOM)]
    scene.depth.flat[cloth] += depth * np.sin(cloth % FINE * 0.25 + 2 * np.sin(cloth // FINE * 0.05))


def outline(scene, region, jump=0.04, width=1):
    """Lines (pixels,), 0 or 1, where the region (320, 320) changes or the depth jumps by so many units."""
    line = np.zeros((FINE, FINE), bool)
    for r, z, l in ((region, scene.depth, line), (region.T, scene.depth.T, line.T)):
        change = (r[width:] != r[:-width]) | (np.abs(z[width:] - z[:-width]) > jump * scene.scale)
        l[width:] |= change
        l[:-width] |= change
    return line.take(scene.pixels).astype(np.float32)


def layer(scene, values):
    """Values (pixels,) as a picture (160, 160), 0 elsewhere."""
    fine = np.zeros((FINE, FINE), np.float32)
    fine.flat[scene.pixels] = values
    return np.asarray(Image.fromarray(fine).reduce(2))


def stamp(scene, backdrop, colors):
    """The seen pixels' colors (pixels, 3) on a fine backdrop -> picture (160, 160, 3)."""
    fine = np.array(backdrop)
    fine.reshape(-1, 3)[scene.pixels] = np.clip(colors, 0, 255)
    return np.asarray(Image.fromarray(fine).reduce(2))


def picture_of(values):
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def backdrop(grid):
    """A few colors (rows, columns, 3) blended into a fine image, and a pen to draw on it."""
    image = picture_of(grid).resize((FINE, FINE), Image.Resampling.BICUBIC)
    return image, ImageDraw.Draw(image)


def noise(rng, cells):
    """Smooth random field (160, 160, 1) between -1 and 1, with so many bumps across."""
    grid = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((SIZE, SIZE), Image.Resampling.BILINEAR))[..., None]


def pick(rng, *colors):
    return np.array(colors[rng.integers(len(colors))], np.float32)


def pigments(rng, skin, colors):
    """A color for each material (11, 3); clothes and things take theirs from `colors`."""
    table = np.zeros((11, 3), np.float32)
    table[SKIN:TOP] = skin, (35, 25, 20), (245, 245, 245), (20, 15, 15), (170, 70, 70)
    table[TOP:] = rng.permutation(colors)[:5]
    return table


# ---- the styles -----------------------------------------------------------------------------------------------------
def photo(scene, rng):
    def dull(*shape):
        return rng.uniform(45, 215, (*shape, 1)) + rng.normal(0, 17, (*shape, 3)) + (6, 0, -6)
    image, pen = backdrop(dull(3, 3))
    for (x, y, w, h), color in zip(rng.uniform(0, FINE, (14, 4)), dull(rng.integers(14))):
        shape = pen.rectangle if w < 200 else pen.ellipse
        shape((x - w / 3, y - h / 4, x + w / 3, y + h / 4), fill=tuple(color.astype(int)))
    tone = rng.random()
    skin = tone * np.array([250, 212, 185]) + (1 - tone) * np.array([92, 58, 40])
    table = pigments(rng, skin, 1.1 * dull(9) + rng.normal(0, 25, (9, 3)))
    table[LOCKS], table[BAR] = pick(rng, (25, 18, 15), (75, 48, 28), (190, 150, 90), (130, 125, 120)), table[SKIN]
    shade = light(scene, rng.uniform((-1, -1, 0.3), (1, 0.2, 1)), rng.uniform(0.25, 0.6))
    if rng.random() < 0.5:  # a striped shirt
        stripes = np.sin(scene.pixels % FINE * rng.normal(0, 0.2) + scene.pixels // FINE * rng.normal(0, 0.2))
        shade *= 1 + 0.3 * stripes * (scene.material == TOP)
    picture = picture_of(stamp(scene, image, table[scene.material] * shade[:, None]) * (1 + 0.12 * noise(rng, 40)))
    curves = 255 * np.linspace(0, 1, 256) ** rng.uniform(0.7, 1.4) * rng.uniform(0.85, 1.15, (3, 1))  # camera settings
    picture = picture.point(curves.ravel().astype(int).tolist()).filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.9)))
    return np.asarray(picture) + rng.uniform(1, 10) * rng.standard_normal((SIZE, SIZE, 3), np.float32)


def cartoon(scene, rng):
    bright = [(230, 60, 60), (250, 200, 50), (60, 160, 230), (80, 190, 90), (240, 130, 40), (150, 90, 200)]
    sky = pick(rng, (150, 215, 250), (255, 225, 150), (250, 190, 200), (190, 235, 200))
    image, pen = backdrop([[sky]])
    for angle in np.arange(0, 2 * np.pi, np.pi / 8):  # sunbeams
        edges = [(160 + 300 * np.cos(a), 160 + 300 * np.sin(a)) for a in (angle, angle + 0.2)]
        pen.polygon([(160, 160), *edges], fill=tuple((0.65 * sky + 90).astype(int)))
    for x in rng.integers(0, FINE, 3):
        pen.ellipse((x - 150, 230 + x // 8, x + 150, 600), fill=bright[rng.integers(6)])
    table = pigments(rng, pick(rng, (255, 214, 170), (255, 225, 80), (150, 95, 60), (140, 200, 240)), bright)
    table[LOCKS] = pick(rng, (40, 30, 40), (120, 60, 30), (250, 200, 60), (220, 70, 60))
    shade = np.where(light(scene, (-0.6, -0.7, 0.6)) > 0.35, np.float32(1), 0.78)  # two flat tones
    shade *= 1 - outline(scene, scene.outfit[scene.part], width=2)
    return stamp(scene, image, table[scene.material] * shade[:, None])


def sketch(scene, rng):
    lines, (rows, columns) = layer(scene, outline(scene, scene.outfit[scene.part])), np.ogrid[:SIZE, :SIZE]
    ink = np.zeros((SIZE, SIZE), np.float32)
    for _ in range(2):  # the contour is searched for twice
        dy, dx = (np.rint(3 * noise(rng, 6)[..., 0]).astype(int) for _ in range(2))
        ink = np.maximum(ink, 1.4 * lines[np.clip(rows + dy, 0, SIZE - 1), np.clip(columns + dx, 0, SIZE - 1)])
    dark = layer(scene, 1 - light(scene, (-0.7, -0.6, 0.5)))
    hatch = ((columns + rows) % 4 < 1) & (dark > 0.7) | ((columns - rows) % 4 < 1) & (dark > 0.9)
    paper = np.float32((246, 240, 226)) + 5 * noise(rng, 80)
    pencil = pick(rng, (50, 50, 60), (110, 60, 40), (40, 50, 100))
    image = picture_of(paper + (pencil - paper) * np.clip(ink + 0.5 * hatch, 0, 1)[..., None])
    pen = ImageDraw.Draw(image)
    for (x, y, _), (dx, dy) in zip(rng.choice(scene.joints / 2, 5), rng.normal(0, 40, (5, 2))):  # construction
        pen.line((x - dx, y - dy, x + dx, y + dy), fill=(190, 182, 175))
        pen.circle((x, y), abs(dx) / 3, outline=(200, 192, 185))
    return image


@lru_cache
def strokes():
    """For each pixel the offset (2, 160, 160) in y and x to the middle of the brush stroke that covers it."""
    rng = np.random.default_rng(0)
    image = Image.new("I", (SIZE, SIZE))
    middles, angles = rng.uniform(0, SIZE, (9000, 2)), rng.normal(0.8, 0.6, 9000)
    for k, (y, x, dy, dx) in enumerate(np.column_stack([middles, 2.5 * np.sin(angles), 2.5 * np.cos(angles)])):
        ImageDraw.Draw(image).line((x - dx, y - dy, x + dx, y + dy), fill=k, width=2)
    stroke = np.asarray(image)
    return np.rint(middles[stroke].transpose(2, 0, 1) - np.mgrid[:SIZE, :SIZE]).astype(int) * (stroke > 0)


def oil_painting(scene, rng):
    earth = [(150, 50, 40), (190, 140, 75), (95, 100, 60), (65, 85, 125), (130, 85, 55), (215, 195, 155), (110, 55, 75)]
    image, _ = backdrop(pick(rng, *earth) * rng.uniform(0.15, 0.5, (5, 5, 1)))
    table = pigments(rng, pick(rng, (245, 195, 150), (215, 155, 110), (150, 100, 70)), earth)
    fold(scene, 1.5)
    shade = 0.3 + 1.1 * light(scene, (rng.choice([-1, 1]), -0.7, 0.6)) ** 2
    picture = stamp(scene, image, table[scene.material] * shade[:, None])
    (dy, dx), (rows, columns) = np.roll(strokes(), rng.integers(0, SIZE, 2), (1, 2)), np.ogrid[:SIZE, :SIZE]
    rows, columns = np.clip(rows + dy, 0, SIZE - 1), np.clip(columns + dx, 0, SIZE - 1)
    ridges = 0.05 * np.sin(rows * 13 + columns * 78)[..., None].astype(np.float32)
    return picture[rows, columns] * (1 + ridges) * np.float32((1.05, 1, 0.85)) + 8


def sculpture(scene, rng):
    stone = pick(rng, (240, 236, 226), (140, 105, 60), (200, 125, 90), (165, 167, 165), (95, 140, 120))
    wall = rng.uniform(50, 190) * rng.uniform(0.85, 1, 3)
    image, pen = backdrop(wall * rng.uniform(0.8, 1.2, (3, 3, 1)))
    for x in range(rng.integers(60), FINE, rng.integers(60, 120)):  # a museum's niches
        pen.rounded_rectangle((x, 40, x + 36, 400), 18, fill=tuple((0.8 * wall).astype(int)))
    x, y, _ = scene.joints[scene.joints[:, 1].argmax()]
    pen.rectangle((x - 70, y + 6, x + 70, 2 * FINE), fill=tuple((0.7 * stone).astype(int)))  # the plinth
    pen.rectangle((x - 82, y + 2, x + 82, y + 16), fill=tuple((0.85 * stone).astype(int)))
    fold(scene, 1.5)
    shade = light(scene, (rng.choice([-0.8, 0.8]), -0.8, 0.6), 0.2)
    shade += rng.uniform(0, 0.6) * shade ** 9 - 0.25 * outline(scene, scene.part)  # gloss and crevices
    return stamp(scene, image, stone * shade[:, None]) * (1 + 0.08 * noise(rng, 30) + 0.08 * noise(rng, 80))


def shadow_play(scene, rng):
    dusk, glow = (185, 90, 20), (255, 235, 150)
    image, pen = backdrop([[dusk] * 3, [dusk, glow, dusk], [dusk] * 3])
    for x, y, _ in scene.joints[9:11]:
        pen.line((x, y, x + rng.uniform(-60, 60), FINE), fill=(50, 25, 10), width=3)  # the rods
    leather = [(130, 25, 15), (35, 80, 30), (70, 40, 15), (150, 90, 10), (30, 40, 60), (90, 20, 60)]
    table = pigments(rng, pick(rng, (150, 80, 20), (60, 30, 12)), leather)
    if rng.random() < 0.4:
        table[:] = 22, 12, 6  # plain black puppets
    x, y, size = scene.pixels % FINE, scene.pixels // FINE, rng.uniform(0.4, 0.7)
    holes = (np.sin(size * (x + y)) * np.sin(size * (x - y)) > 0.5) & (scene.material == TOP)
    cut = 0.8 * np.maximum(outline(scene, scene.part, jump=1e9), holes)[:, None]
    picture = stamp(scene, image, table[scene.material] * (1 - cut) + np.float32((255, 200, 100)) * cut)
    image = picture_of(picture * (1 + 0.05 * noise(rng, 60)))
    for x, y, _ in scene.joints[5:][~scene.covered[5:]] / 2:
        ImageDraw.Draw(image).circle((x, y), 1.5, fill=(255, 215, 120), outline=(40, 20, 5))  # rivets
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.8)))


def ink_painting(scene, rng):
    paper = np.float32((238, 228, 205)) * (1 + 0.03 * noise(rng, 5) + 0.03 * noise(rng, 70))
    for height in rng.uniform(20, 110, 3):  # mountains, fading downwards
        ridge = height + np.interp(np.arange(SIZE), np.linspace(0, SIZE, 8), rng.uniform(-25, 25, 8))
        below = np.float32(np.arange(SIZE)[:, None] - ridge)[..., None]
        paper -= 60 * np.exp(-np.maximum(below, 0) / 14) * (below > 0)
    robes = [(228, 222, 208), (150, 165, 175), (205, 130, 110), (125, 150, 125), (110, 110, 115), (215, 195, 150)]
    shade = 0.7 + 0.35 * light(scene, (0.3, -0.6, 0.7))
    wet = picture_of(paper).resize((FINE, FINE), Image.Resampling.BOX)
    wash = stamp(scene, wet, pigments(rng, (240, 220, 195), robes)[scene.material] * shade[:, None])
    picture = paper + (wash - paper) * np.clip(0.8 + 0.5 * noise(rng, 8), 0, 1)
    line = picture_of(layer(scene, 255 * outline(scene, scene.outfit[scene.part], width=2)))
    line = np.asarray(line.filter(ImageFilter.GaussianBlur(0.8)))[..., None] / np.float32(255)
    image = picture_of(picture + (20 - picture) * np.clip(line * (1.6 + 1.8 * noise(rng, 12)), 0, 1))  # thick and thin
    pen, (x, y) = ImageDraw.Draw(image), rng.choice([6, 142], 2).tolist()
    pen.rectangle((x, y, x + 11, y + 11), fill=(190, 40, 30))  # the seal
    pen.line((x + 2, y + 3, x + 9, y + 3, x + 3, y + 8, x + 9, y + 8), fill=(240, 220, 200))
    return image


@lru_cache
def panes():
    """Voronoi cells (320, 320): the number of the nearest of 80 random points; they wrap around."""
    apart = np.abs(np.random.default_rng(0).uniform(0, FINE, (80, 2, 1)) - np.arange(FINE))
    y, x = (np.minimum(apart, FINE - apart) ** 2).transpose(1, 0, 2)
    return (y[:, :, None] + x[:, None, :]).argmin(0).astype(np.uint16)


def stained_glass(scene, rng):
    jewels = [(210, 30, 45), (35, 80, 200), (25, 150, 90), (240, 180, 40), (125, 50, 160), (235, 110, 35)]
    table = pigments(rng, (245, 210, 165), jewels)
    table[LOCKS], table[THING], table[NONE] = (110, 60, 25), (245, 205, 70), 0.6 * pick(rng, *jewels[:3])
    (x, y, _), (rows, columns) = scene.joints[0], np.ogrid[:FINE, :FINE]
    nimbus = np.hypot(columns - x, rows - y) < 0.19 * scene.scale
    scene.part[nimbus & (scene.part == NONE)] = CLUTTER
    cells = np.roll(panes(), rng.integers(0, FINE, 2), (0, 1)) * (scene.part != HEAD)  # a face is one pane
    glass = (table[:, None] * rng.uniform(0.7, 1.3, (80, 1))).clip(0, 255).astype(np.uint8)  # (11, 80, 3)
    scene.pixels = np.arange(FINE * FINE)
    window = glass[scene.outfit[scene.part], cells]
    window[outline(scene, scene.part * np.uint16(80) + cells, jump=1e9).reshape(FINE, FINE) > 0] = 25  # lead
    return np.asarray(Image.fromarray(window).reduce(2)) * (1 + 0.2 * noise(rng, 4) + 0.08 * noise(rng, 70)) + 10


STYLES = {
    "photo": Style(photo, "stand stand walk walk run sit cheer cheer dance", (0, 110), clutter=5),
    "cartoon": Style(cartoon, yaw=(0, 60), head=2.1, eyes=1.5, thick=1.1, legs=0.65, arms=0.85),
    "sketch": Style(sketch, thick=0.9, legs=1.1, arms=1.05),
    "oil painting": Style(oil_painting, "stand walk sit sit dance bend cheer", (0, 120), thick=1.1, robe=0.6),
    "sculpture": Style(sculpture, "stand stand dance sit squat cheer bend run", (0, 130), thick=1.1, robe=0.4),
    "shadow play": Style(shadow_play, "stand walk walk run dance dance cheer sit bend", (60, 105), 1.5, 1.3, robe=0.4),
    "ink painting": Style(ink_painting, "stand stand walk sit dance squat bend cheer", (10, 110), robe=0.85),
    "stained glass": Style(stained_glass, "stand stand stand walk sit cheer dance", (0, 30), 1.25, 1.3, robe=0.7)}


def draw_figure(style: str, rng: np.random.Generator) -> Figure:
    """Draws one random person in a style of STYLES; the same generator state gives the same figure."""
    scene = compose(STYLES[style], rng)
    person = Image.fromarray((scene.part != NONE) & (scene.part < OBJECT)).convert("L")
    person = person.reduce(2).point(lambda covered: covered >= 128)
    left, top, right, bottom = person.getbbox()
    keypoints = np.column_stack([(scene.joints[:, :2] - 0.5) / 2, 2 - scene.covered])  # fine pixel 2x + 0.5 is x
    keypoints[((keypoints[:, :2] < 0) | (keypoints[:, :2] > SIZE - 1)).any(1)] = 0
    image = np.asarray(picture_of(STYLES[style].paint(scene, rng)))
    return Figure(image, keypoints, (left, top, right - left, bottom - top), int(np.asarray(person).sum()))


FIGURES = "figures-1"  # a new number whenever the drawing changes, so that an old cache is not taken for a new one
FIGURE_COUNTS = {"train": (4000, 600), "val": (300, 100)}  # of photos and of each artificial style


def draw_figures(cache, counts=FIGURE_COUNTS):
    """Draws the data set into `cache`, in Human-Art's format, unless it is there, and returns its folder."""
    folder = Path(cache) / FIGURES
    if folder.exists():
        return folder
    print(f"drawing the built-in figures into {folder}", file=sys.stderr)
    try:
        with written_whole(folder) as draft:
            for split_number, (split, (natural, artificial)) in enumerate(counts.items()):
                jobs = [(draft, style, split, number, (0, split_number, style_number, number))
                        for style_number, style in enumerate(STYLES)
                        for number in range(natural if style in NATURAL_DOMAINS else artificial)]
                # A DataLoader's processes end with the program that has started them, however that ends.
                drawn = DataLoader([*enumerate(jobs, 1)], 50, num_workers=os.cpu_count(), collate_fn=write_figures)
                images, people = zip(*chain.from_iterable(progress(drawn, f"drawing {split} figures, parts of 50")))
                content = {"images": images, "annotations": people, "categories": [to_category(COCO17)]}
                write_json(draft / "annotations" / ANNOTATION_FILES["figures"][split], content)
    except DataError:
        if not folder.exists():  # else another program was faster
            raise
    return folder


def write_figures(jobs):
    """Draws and saves figures; gives their images and annotations in Human-Art's format, COCO's with a domain."""
    found = []
    for image_id, (folder, style, split, number, seed) in jobs:
        figure = draw_figure(style, np.random.default_rng(seed))
        file_name = f"images/{style.replace(' ', '_')}/{split}_{number:05d}.jpg"
        (folder / file_name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(figure.image).save(folder / file_name, quality=92)
        height, width = figure.image.shape[:2]
        image = {"file_name": file_name, "width": width, "height": height, "category": style,
                 "description": f"a {style} of a person", "id": image_id}
        person = {"category_id": 1, "iscrowd": 0, "keypoints": np.round(figure.keypoints, 2).ravel().tolist(),
                  "num_keypoints": int((figure.keypoints[:, 2] > 0).sum()), "id": image_id, "image_id": image_id,
                  "bbox": [round(float(value), 2) for value in figure.box], "area": int(figure.area)}
        found.append((image, person))
    return found
