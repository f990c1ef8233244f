"""Trials: both methods with what is in neither paper, to see whether it gains anything.

    python tests/trials.py agree --mode uda --source figures --target lsp:/data/LSP \\
        --augmentation paper --supervised-steps 1250 --steps 300 --out runs/trials/agree

The first word is the trial, and the others are options of train.py. With `plain` this run is the
row "figures of all styles" of `python tests/evidence.py lsp`, but for its oracle. Trials can be
joined by +; of two that change the same function or class only the second one counts.
"""
import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import train  # noqa: E402
import uda  # noqa: E402
from assets.figures import STYLES  # noqa: E402
from data import (Augmentation, Crops, crop_width, decode_heatmaps,  # noqa: E402
                  encode_heatmaps, load_dataset, with_skeleton)
from eval import flip_tested  # noqa: E402
from uda import peaks  # noqa: E402

NEAR = 2  # heatmap pixels
confidence_mask = uda.confidence_mask
ema_update = uda.ema_update
entropy = uda.entropy
heatmaps_of_images = uda.heatmaps_of_images
restyling = train.restyling
alignment_pools = train.alignment_pools


# ------------------------------------------------------------------------ which pseudo-labels count

def plain(options):
    """Nothing changes."""


def ratio(share, options):
    """Another share of the pseudo-labels is left out, in place of a half."""
    uda.confidence_mask = partial(confidence_mask, ratio=share)


def opening(options):
    """At first 80 % of the pseudo-labels are left out, at the end 20 %."""
    steps = iter(torch.linspace(0.8, 0.2, options.steps).tolist())
    uda.confidence_mask = lambda heatmaps: confidence_mask(heatmaps, next(steps, 0.2))


def joint(options):
    """Each joint has a median of its own."""
    def of_each_joint(heatmaps):
        _, confidence = peaks(heatmaps)
        return confidence > confidence.quantile(0.5, dim=0)     # (B, K)
    uda.confidence_mask = of_each_joint


class Agreement(uda.MultiLevelAlignment):
    """A pseudo-label counts where teacher and student, in two views, see the same place."""
    also_sure = False

    def alignment_losses(self, teacher_heatmaps, student_heatmaps, *features):
        apart = peaks(teacher_heatmaps)[0] - peaks(student_heatmaps.detach())[0]
        same = apart.norm(dim=2) <= NEAR                        # (B, K)
        uda.confidence_mask = lambda heatmaps: (
            same & confidence_mask(heatmaps) if self.also_sure else same)
        return super().alignment_losses(teacher_heatmaps, student_heatmaps, *features)


def agree(options):
    """The agreement of two views counts in place of the height of the peak."""
    train.MultiLevelAlignment = Agreement


def agree_and_sure(options):
    """The agreement of two views counts, and the height of the peak."""
    train.MultiLevelAlignment = Agreement
    Agreement.also_sure = True


def prior(options):
    """A limb whose length nobody in the source has loses the pseudo-labels of both its ends."""
    target = load_dataset(options.target, "train", options.cache)
    source = with_skeleton(load_dataset(options.source, "train", options.cache), target.skeleton)
    people = source.annotated
    poses = source.keypoints[people]                            # (people, K, 3)
    sides = crop_width(source.boxes[people], (4, 3)) * 4 / 3    # heights of the crops
    adapted = np.flatnonzero((poses[:, :, 2] > 0).any(0)).tolist()  # the others have no heatmaps
    limbs = []
    for a, b in target.skeleton.edges:
        known = (poses[:, [a, b], 2] > 0).all(1)
        lengths = np.linalg.norm(poses[known, a, :2] - poses[known, b, :2], axis=1) / sides[known]
        if known.any():
            limbs.append((adapted.index(a), adapted.index(b), *np.quantile(lengths, [0.01, 0.99])))

    def of_possible_limbs(heatmaps):
        points, _ = peaks(heatmaps)
        mask = confidence_mask(heatmaps)
        for a, b, shortest, longest in limbs:
            length = (points[:, a] - points[:, b]).norm(dim=1) / heatmaps.shape[2]
            possible = (shortest <= length) & (length <= longest)
            mask[:, a] &= possible
            mask[:, b] &= possible
        return mask
    uda.confidence_mask = of_possible_limbs


# ----------------------------------------------------------------------- how exact the heatmaps are

def flip(options):
    """The teacher's heatmaps are the mean of those of its view and of the mirrored view."""
    skeleton = load_dataset(options.target, "train", options.cache).skeleton
    def of_both(model, images, compute, *text):
        plain_model = partial(heatmaps_of_images, model)
        return flip_tested(lambda pixels: plain_model(pixels, compute, *text), images, (), skeleton)
    uda.heatmaps_of_images = of_both


def subpixel(options):
    """A pseudo-label is where DARK decodes it, and not a whole heatmap pixel."""
    def between_pixels(heatmaps, sigma):
        size = heatmaps.shape[2:]
        points, confidence = decode_heatmaps(heatmaps, size, sigma)
        return encode_heatmaps(points, torch.ones_like(confidence), size, size, sigma)[0]
    uda.rectify = between_pixels


def soft(options):
    """A pseudo-label is the teacher's heatmap as it is, and not a Gaussian at its peak."""
    uda.rectify = lambda heatmaps, sigma: heatmaps


def sharp(options):
    """L_im is of y / 0.02, whose softmax is not flat."""
    uda.entropy = lambda heatmaps: entropy(heatmaps / 0.02)


def mixed_norm(options):
    """The teacher's BatchNorm has the student's statistics, which are of both domains."""
    def with_statistics(teacher, student, decay):
        ema_update(teacher, student, decay)
        for of_teacher, of_student in zip(teacher.buffers(), student.buffers(), strict=True):
            of_teacher.copy_(of_student)

    def in_evaluation_mode(model, images, compute, *text):
        return heatmaps_of_images(model.eval(), images, compute, *text)
    uda.ema_update = with_statistics
    uda.heatmaps_of_images = in_evaluation_mode


# ------------------------------------------------------------------------------- what each one sees

class Still(uda.MultiLevelAlignment):
    """The teacher sees each crop as it is, in other colours. Of a step's two maps its is first."""
    of_teacher = False

    def random_maps(self, images):
        self.of_teacher = not self.of_teacher
        maps = super().random_maps(images)
        return torch.eye(2, 3).to(maps).expand_as(maps) if self.of_teacher else maps


def still(options):
    """The teacher sees each crop as it is, in other colours."""
    train.MultiLevelAlignment = Still


class FourViews(uda.MultiLevelAlignment):
    """The teacher's heatmaps are the mean over four views. They are moved before the student's."""
    of_teacher = False

    def forward(self, *inputs):
        self.inputs = inputs
        return super().forward(*inputs)

    def to_whole_image(self, heatmaps, matrix):
        self.of_teacher = not self.of_teacher
        *_, target, _, text = self.inputs
        views = [super().to_whole_image(heatmaps, matrix)]
        for _ in range(3 if self.of_teacher else 0):
            matrix = self.random_maps(target)
            view = uda.jitter_color(uda.warp(target, matrix), self.views.color)
            heatmaps = uda.heatmaps_of_images(self.teacher, view, self.compute, *text)
            views.append(super().to_whole_image(heatmaps, matrix))
        return torch.stack(views).mean(0)                       # (B, K, h, w)


def four_views(options):
    """The teacher's heatmaps are the mean over four views."""
    train.MultiLevelAlignment = FourViews


def calm(options):
    """Target images are not augmented before their views are drawn."""
    def with_plain_targets(sets, size, options):
        pools = alignment_pools(sets, size, options)
        pools.targets = Crops(sets.target, size, Augmentation()), pools.targets[1]
        return pools
    train.alignment_pools = with_plain_targets


def upright(options):
    """The views of target images go less far: as with the gentle augmentation."""
    def with_gentle_views(sets, size, options):
        pools = alignment_pools(sets, size, options)
        pools.target_views = replace(uda.GENTLE_VIEWS, occlusion=options.occlusion)
        return pools
    train.alignment_pools = with_gentle_views


# ------------------------------------------------------------------------------- images and batches

def turned(options):
    """Figures of all styles turn away from the camera by up to 180 degrees.

    They are drawn into a folder of their own. This works where new processes are forks: on Linux,
    before Python 3.14.
    """
    data.FIGURES = "figures-turned"
    for style in STYLES.values():
        style.yaw = (0, 180)


def clutter(options):
    """Up to 40 % of a target image shines through each restyled source image."""
    train.restyling = lambda stylist, options: partial(blended, restyling(stylist, options))


def blended(restyle, source, target):
    share = 0.4 * torch.rand(len(source), 1, 1, 1).to(source)
    return torch.lerp(restyle(source, target), target, share)


class OneDomainABatch(train.Passes):
    """Passes in which each batch has crops of one domain. The domains take turns."""
    batch_size = 16

    def __init__(self, crops, rows, seed):
        super().__init__(crops, rows, seed)
        people = crops.dataset
        domains = people.domains[people.image_index[rows]]
        self.rows_of = [rows[domains == name] for name in np.unique(domains)]

    def key(self, position):
        if len(self.rows_of) == 1:
            return super().key(position)
        step, place = divmod(position, self.batch_size)
        turn, domain = divmod(step, len(self.rows_of))
        rows = self.rows_of[domain]
        epoch, place = divmod(turn * self.batch_size + place, len(rows))
        order = np.random.default_rng((self.seed, epoch, domain)).permutation(rows)
        return int(order[place]), (self.seed, position)


def one_style(options):
    """Each batch has images of one domain. The domains take turns.

    The cache cannot tell models by the order of their batches, so this trial has none.
    """
    train.take_from = lambda *_: False
    train.keep = lambda *_: None
    OneDomainABatch.batch_size = options.batch_size
    train.Passes = OneDomainABatch


TRIALS = {
    "plain": plain,
    "ratio-0.3": partial(ratio, 0.3),
    "ratio-0.7": partial(ratio, 0.7),
    "ratio-0.8": partial(ratio, 0.8),
    "opening": opening,
    "joint": joint,
    "agree": agree,
    "agree-and-sure": agree_and_sure,
    "prior": prior,
    "flip": flip,
    "subpixel": subpixel,
    "soft": soft,
    "sharp": sharp,
    "mixed-norm": mixed_norm,
    "still": still,
    "four-views": four_views,
    "calm": calm,
    "upright": upright,
    "turned": turned,
    "clutter": clutter,
    "one-style": one_style}


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", help="one or more, joined by +, such as flip+subpixel: "
                                       f"{', '.join(TRIALS)}")
    args, of_train = parser.parse_known_args(argv)
    names = args.trials.split("+")
    for name in names:
        if name not in TRIALS:
            parser.error(f"expected trials from {', '.join(TRIALS)}; found {name}")
    options = train.parse_options(of_train)
    for name in names:
        TRIALS[name](options)
    return train.main(of_train)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
