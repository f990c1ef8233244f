"""Evaluation: how good are a model's poses? COCO's numbers (OKS and AP), PCK, and the prediction of the poses.

    python eval.py --results results.json --annotations person_keypoints_val2017.json [--details] [--json]

The *ground truth* is the people that annotators marked in the images. A *detection* is a pose that a model predicts,
with a score: how sure the model is of it. COCO's numbers ask for three things at once: every person is found, nobody is
found where there is nobody, and right detections have higher scores than wrong ones. In the order of reading:

    keypoint similarity        how close is one keypoint to its true place, from 0 to 1?
    OKS                        how similar are a detection and a person? The mean over the person's keypoints.
    greedy matching            which detection belongs to which person?
    true and false positives   which detections are right, which are wrong, which are ignored?
    precision, recall, AP      which share of the detections is right, which share of the people is found?
    PCK                        the simpler number of the papers on domain adaptation: the share of correct keypoints
    prediction                 from a model and a data set to detections

`evaluate_oks` and `evaluate_pck` are the functions to call. OKS and matching are shown for one pair and for one image;
what runs does the same for all at once, and tests hold the two together: `oks_of_pairs`, `match_all_images`.
"""
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader

from data import (COCO17, Augmentation, Crops, DataError, all_items, decode_heatmaps, ignore_group_signals,
                  invert_matrix, my_share, normalize, transform_points)
from vlpose import run_model

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # a detection is right if its OKS is at least this; AP is the mean over all
RECALLS = np.linspace(0, 1, 101)  # where the precision-recall curve is read
AREAS = ((0, 1e5 ** 2), (32 ** 2, 96 ** 2), (96 ** 2, 1e5 ** 2))  # all, medium, large: pixels, both ends included
MAX_DETECTIONS = 20  # of a group (see below): those with the best scores, the others are left out

# ----------------------------------------------------------------------------------------- ground truth and detections

@dataclass
class GroundTruth:
    """All annotated people, with K keypoints each.

    A detection can match a person only if both belong to the same image and have the same category. All people and
    detections of one image and one category are a *group*. Its number is category row * number of images + image row.
    """
    images: list  # COCO's image records, sorted by their ids
    image_ids: np.ndarray  # (images,) sorted
    category_ids: np.ndarray  # (categories,) sorted
    group: np.ndarray  # (people,)
    points: np.ndarray  # (people, K, 2)
    labelled: np.ndarray  # (people, K) bool
    area: np.ndarray  # (people,) in pixels
    box: np.ndarray  # (people, 4) left, top, width, height
    crowd: np.ndarray  # (people,) bool: a box around many people, which any number of detections may match
    ignored: np.ndarray  # (people,) bool: crowds and people without keypoints, who need not be found
    id_is_zero: np.ndarray  # (people,) bool: a quirk, see `classify_detections`


@dataclass
class Detections:
    """The best detections of each group, sorted by group, then from the best score to the lowest."""
    group: np.ndarray  # (detections,), -1 for a category that the annotations do not list
    rank: np.ndarray  # (detections,) place in the group, 0 for the best
    score: np.ndarray  # (detections,)
    points: np.ndarray  # (detections, K, 2)
    area: np.ndarray  # (detections,) in pixels


# ------------------------------------------------------------------------------------------ object keypoint similarity

def keypoint_similarity(offset, area, sigmas):
    """How close a keypoint is to its true place: 1 at the place itself, towards 0 far away.

    offset (..., 2): from the true place to the detected one. area (...): the person's, in pixels. sigmas (...): the
    spread of human annotators at this kind of keypoint, relative to the person's size; small for eyes, large for hips.
    """
    squared_distance = offset[..., 0] ** 2 + offset[..., 1] ** 2
    # similarity = exp(-d² / (2 s² (2σ)²))   d: the distance in pixels, s² = area, so s is the person's size, σ: sigma.
    # Annotators are off by about d = σ s, which is worth exp(-1/8) = 0.88; twice as far is worth exp(-1/2) = 0.61.
    return np.exp(-(squared_distance / (sigmas * 2) ** 2 / (area + np.spacing(1)) / 2))  # spacing: never divides by 0


def object_keypoint_similarity(person, labelled, area, detection, sigmas):
    """OKS of a person and a detection, points (K, 2) each: the mean similarity of the labelled keypoints.

    labelled (K,) bool, at least one; area: the person's, in pixels. `oks_of_pairs` does many at once, and knows people
    without any labelled keypoint.
    """
    return keypoint_similarity(detection - person, area, sigmas)[labelled].mean()


# ------------------------------------------------------------------------------------------------------ greedy matching

def match_one_image(oks, ignored, crowd, threshold):
    """COCO's greedy matching in one image: the row of the person that each detection matches, or -1.

    oks (detections, people), the detection with the best score first; ignored, crowd (people,) bool. The evaluation
    uses `match_all_images`; this loop says what it computes, and a test compares the two.
    """
    matched, free = [], np.ones(len(ignored), bool)
    for row in oks:  # the detection with the best score chooses first
        possible = [person for person in np.flatnonzero(free) if row[person] >= threshold]
        # Someone who is not ignored comes first, then the most similar person, then whoever stands last in the file.
        best = max(possible, key=lambda person: (not ignored[person], row[person], person), default=-1)
        if best >= 0:
            free[best] = crowd[best]  # nobody else can match this person, unless it is a crowd
        matched.append(int(best))
    return matched


# --------------------------------------------------------------------------------------------- true and false positives

def classify_detections(truth, detections, sigmas):
    """Which detections are right? -> positive (areas, thresholds, detections), ignored (areas, people) bool.

    positive is 1 for a true positive: the detection matches a person. It is 0 for a false positive: it matches nobody.
    It is -1 for an ignored detection: it matches an ignored person, or it matches nobody and its own area is out of
    range. For each range of areas, people whose area is out of range are ignored, too.
    """
    person, detection = candidate_pairs(truth.group, detections.group)
    oks = oks_of_pairs(truth, detections, person, detection, sigmas)
    close = oks >= THRESHOLDS[0]  # the others match at no threshold
    person, detection, oks = person[close], detection[close], oks[close]
    positive = np.empty((len(AREAS), len(THRESHOLDS), len(detections.group)), np.int8)
    ignored = np.empty((len(AREAS), len(truth.group)), bool)
    for a, (low, high) in enumerate(AREAS):
        ignored[a] = truth.ignored | (truth.area < low) | (truth.area > high)
        matched = match_all_images(person, detection, oks, ignored[a], truth.crowd, detections.rank, THRESHOLDS)
        # pycocotools stores the matched person's id and takes 0 for "nobody": a person with id 0 can never be found.
        if_matched = np.where(ignored[a], -1, np.where(truth.id_is_zero, 0, 1))  # (people,)
        positive[a] = np.append(if_matched, 0)[matched]  # the row of nobody is -1: the 0 at the end
        outside = (detections.area < low) | (detections.area > high)
        positive[a][(positive[a] == 0) & outside] = -1
    return positive, ignored


# ------------------------------------------------------------------------------------------------ precision and recall

def precision_recall(positive, num_people):
    """positive (detections,), the best score first -> precision (101,) at each of RECALLS, and the recall at the end.

    Go through the detections and count the true positives TP and the false positives FP so far:
        precision = TP / (TP + FP)      recall = TP / number of people who are not ignored
    Recall rises on the way, precision goes up and down and mostly falls. The average precision smooths and averages it:
        AP = 1/101 Σ_r max_{r' >= r} precision at recall r'     r = 0, 0.01, ..., 1; 0 where recall r is never reached
    """
    places = np.flatnonzero(positive[positive >= 0])  # of the true positives, in the list without the ignored
    true_positives = np.arange(1, len(places) + 1)  # TP at these places; between them precision only falls
    precision = true_positives / (places + 1 + np.spacing(1))  # TP + FP = place + 1
    precision = np.maximum.accumulate(precision[::-1])[::-1]  # the best at this recall or a higher one
    recall = true_positives / num_people
    return np.append(precision, 0)[np.searchsorted(recall, RECALLS)], len(places) / num_people


def coco_numbers(truth, detections, positive, ignored, images=None):
    """COCO's ten numbers from `classify_detections`; -1 where there is nobody to find.

    AP is the mean precision over thresholds, recalls and categories, AP .5 and AP .75 that for one threshold, AP (M)
    and AP (L) for medium and large people. AR is the mean of the last recall. images (images,) bool: only these count.
    """
    images = np.ones(len(truth.image_ids), bool) if images is None else images
    categories = len(truth.category_ids)
    precision = np.full((len(AREAS), len(THRESHOLDS), len(RECALLS), categories), np.nan)
    recall = np.full((len(AREAS), len(THRESHOLDS), categories), np.nan)
    for category in range(categories):
        groups = category * len(images) + np.flatnonzero(images)
        rows = np.flatnonzero(np.isin(detections.group, groups))
        rows = rows[np.argsort(-detections.score[rows], kind="stable")]  # best first; equal scores keep their order
        people = (~ignored[:, np.isin(truth.group, groups)]).sum(1)  # (areas,) the number of those to be found
        for a, t in np.ndindex(len(AREAS), len(THRESHOLDS)):
            if people[a]:
                precision[a, t, :, category], recall[a, t, category] = precision_recall(positive[a, t, rows], people[a])
    mean, numbers = mean_or_minus_1, {}
    for name, values in (("AP", precision), ("AR", recall)):
        numbers |= {name: mean(values[0]), f"{name} .5": mean(values[0, 0]), f"{name} .75": mean(values[0, 5]),
                    f"{name} (M)": mean(values[1]), f"{name} (L)": mean(values[2])}
    return numbers


def evaluate_oks(annotations, results, sigmas=COCO17.sigmas):
    """COCO's ten keypoint numbers, as pycocotools gives them: {"AP": ..., "AP .5": ..., ...}; -1: nobody to be found.

    annotations, results: paths of COCO's JSON files, or the objects that they hold. sigmas (K,): the spread of the
    annotators at each keypoint, relative to the person's size. Raises DataError, which names the record, for bad input.
    """
    truth, detections, sigmas = read_truth_and_detections(annotations, results, sigmas)
    return coco_numbers(truth, detections, *classify_detections(truth, detections, sigmas))


# ----------------------------------------------------------------------------------------------------------------- PCK

def evaluate_pck(predicted, target, visible, size, threshold=0.05, groups=None):
    """The share of correct keypoints, measured in pixels: {group: PCK, "mean": PCK}.

    A joint's PCK is over all people whose joint is labelled. The PCK of a group of joints is the mean over its joints,
    "mean" that over the joints of all groups, or without groups over all joints. A joint that is labelled for nobody is
    left out of means, and a mean of none is -1.
    predicted, target (people, K, 2); visible (people, K), labelled where above 0; size: a number or (people,), in the
    pixels of the points; groups {name: joints}. Raises DataError for other shapes. The papers on domain adaptation
    measure on heatmaps instead: `evaluate_pck_grid`, which gives other numbers for the same predictions.
    """
    predicted, target, visible, size = (np.asarray(value) for value in (predicted, target, visible, size))
    if not (predicted.shape == target.shape == (*visible.shape, 2) and size.shape in ((), visible.shape[:1])):
        raise DataError("PCK: expected predicted and target (people, K, 2), visible (people, K), size a number or "
                        f"(people,), found {predicted.shape}, {target.shape}, {visible.shape}, {size.shape}")
    labelled, distance = visible > 0, np.linalg.norm(predicted - target, axis=2)  # (people, K)
    correct = labelled & (distance < threshold * size.reshape(-1, 1))
    count = labelled.sum(0)  # (K,)
    # PCK_j = #{i: |predicted_ij - target_ij| < threshold size_i} / #{i},   i: the people whose joint j is labelled
    pck = np.where(count, correct.sum(0) / np.maximum(count, 1), np.nan)  # (K,)
    joints = sorted(set().union(*groups.values())) if groups else range(len(count))
    return {name: mean_or_minus_1(pck[list(group)]) for name, group in ((groups or {}) | {"mean": joints}).items()}


def evaluate_pck_grid(predicted, target, visible, threshold=0.05, groups=None):
    """PCK as RegDA, UniFrame and multi-level alignment report it: measured on the grid of the heatmaps.

    predicted, target: heatmaps (people, K, h, w); visible (people, K). A keypoint is where its heatmap is highest, at a
    whole cell (x, y), and is correct if closer than threshold times the heatmap's size to the target's cell: 3.2 of 64.
    The result has the form of `evaluate_pck`'s. As in RegDA, targets in the first two rows and columns do not count.
    """
    return pck_of_cells(*map(highest_cells, (predicted, target)), visible, np.shape(predicted)[2:], threshold, groups)


# ---------------------------------------------------------------------------------------------------------- prediction



@torch.inference_mode()
def predict(model, dataset, texts=None, people=None, flip=True, batch_size=64, workers=0, augmentation=Augmentation()):
    """One detection in COCO's results format for each person in rows `people`; without them, for all annotated ones, or
    for everyone where nobody is annotated. DataError if the model predicts other keypoints than the data set has.

    model: normalised images -> heatmaps, with a `config`. texts: {sentence: T (L, D_text)}, None for no text.
    flip: the flip test. The mirrored image should give the mirrored heatmaps, with left and right exchanged; the mean
    of both is more exact than either. augmentation: of the crops; at random, but always the same for the same row.
    """
    device, size = next(model.parameters()).device, model.config.image_size
    mirrored = torch.as_tensor(dataset.skeleton.mirrored, device=device)  # (K,) the left elbow for the right one, ...
    if getattr(model, "num_keypoints", len(mirrored)) != len(mirrored):
        raise DataError(f"{dataset.name}: {len(mirrored)} keypoints, but the model predicts {model.num_keypoints}")
    if texts is not None and dataset.sentences is None:
        raise DataError(f"{dataset.name}: expected a sentence for each image (`with_sentences` gives them), found none")
    if people is None:
        people = dataset.annotated if len(dataset.annotated) else range(len(dataset.ids))
    keys = progress(my_share([(int(row), int(row)) for row in people], batch_size), "predicting poses")  # (row, seed)
    crops, training, results = Crops(dataset, size, augmentation), model.training, []
    model.eval()
    for batch in DataLoader(crops, batch_size, sampler=keys, num_workers=workers, worker_init_fn=ignore_group_signals):
        images = normalize(batch["image"].to(device))  # (B, 3, H, W)
        heatmaps = run_model(model, images, batch["sentence"], texts)  # (B, K, h, w)
        if flip and dataset.skeleton.names[0] != "keypoint 1":  # else nobody knows which are left and right
            flipped = run_model(model, images.flip(3), batch["sentence"], texts)
            heatmaps = (heatmaps + flipped.flip(3)[:, mirrored]) / 2
        points, scores = (part.cpu().double().numpy() for part in decode_heatmaps(heatmaps, size, model.config.sigma))
        points = transform_points(points, invert_matrix(batch["matrix"].numpy()))  # (B, K, 2) from crop to image
        results += coco_results(dataset.image_ids[dataset.image_index[batch["row"].numpy()]], points, scores)
    model.train(training)
    return all_items(results)


# === Appendix: the same for all images at once; skip on a first reading ===============================================

import argparse
import csv
import json
import math
import os
import shutil
import signal
import sys
from dataclasses import field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import get_args

import torchvision
from PIL import Image, ImageDraw

from data import (BOX, FARTHEST, ID, NUMBER, Skeleton, below_common_folder, cache_folder, column,
                  crop_width, domain_of, find_pictures, image_rows, load_dataset, no_people,
                  open_image, picture_rows, picture_size, plain_name, progress, read_boxes, read_columns, read_json,
                  read_pictures, read_skeleton, to_coco, with_boxes, with_sentences, with_skeleton,
                  write_json)
from vlpose import DETECTORS, PUBLIC_FILES, VLPose, encode_sentences, load_clip_text, load_model, load_weights

BATCH = 512  # pairs handled at once: few enough to stay in the processor's cache
CATEGORIES = torchvision.models.get_model_weights(DETECTORS[1])["COCO_V1"].meta["categories"]  # the place is COCO's id


def oks_of_pairs(truth, detections, person, detection, sigmas):
    """`object_keypoint_similarity` (pairs,) of candidate pairs: the rows of a person and a detection of one group. Of a
    person without a labelled keypoint only the box is known: a keypoint is as far off as it is outside of the box."""
    oks = np.empty(len(person))
    num_labelled = truth.labelled.sum(1)[person]  # (pairs,) |L|
    labelled_first = np.argsort(~truth.labelled, axis=1, kind="stable")  # (people, K) all joints, the labelled first
    for count in np.unique(num_labelled):  # pairs with equally many labelled keypoints fill an array without gaps
        same = np.flatnonzero(num_labelled == count)
        for batch in np.split(same, range(BATCH, len(same), BATCH)):
            p, d = person[batch], detection[batch]
            if count:
                joints = labelled_first[p, :count]  # (pairs, count) L
                offset = detections.points[d[:, None], joints] - truth.points[p[:, None], joints]
            else:  # nothing is known but the person's box
                joints, offset = np.arange(len(sigmas)), offset_from_box(detections.points[d], truth.box[p, None])
            similarity = keypoint_similarity(offset, truth.area[p, None], sigmas[joints])  # (pairs, count or K)
            oks[batch] = similarity.sum(1) / similarity.shape[1]
    return oks


def match_all_images(person, detection, oks, ignored, crowd, rank, thresholds):
    """`match_one_image` for all groups and thresholds at once: (thresholds, detections) the matched people, or -1.

    In the first round the best detection of every group chooses, in the second round the second best, and so on: it
    takes the first person on the list of its candidates, sorted by preference, who is still free and similar enough.
    person, detection, oks (pairs,): the candidate pairs; ignored, crowd (people,) bool; rank (detections,).
    """
    matched = np.full((len(thresholds), len(rank)), -1)  # (thresholds, detections)
    free = np.ones((len(thresholds), len(ignored)), bool)  # (thresholds, people)
    order = np.lexsort((-person, -oks, ignored[person], detection, rank[detection]))  # the last key is the main one
    person, detection, oks = person[order], detection[order], oks[order]
    rounds = np.unique(np.searchsorted(rank[detection], np.arange(MAX_DETECTIONS + 1)))  # where each round begins
    for start, stop in zip(rounds[:-1], rounds[1:]):
        p, d = person[start:stop], detection[start:stop]
        possible = free[:, p] & (oks[start:stop] >= thresholds[:, None])  # (thresholds, pairs of this round)
        place = np.where(possible, np.arange(len(p)), len(p))
        lists = np.flatnonzero(np.diff(d, prepend=-1))  # where the list of each detection begins
        first = np.minimum.reduceat(place, lists, axis=1)  # (thresholds, detections of this round), len(p) for nobody
        t, row = np.nonzero(first < len(p))
        taken = p[first[t, row]]
        matched[t, d[lists[row]]] = taken
        free[t, taken] = crowd[taken]
    return matched


# === Appendix: reading annotations and results; skip on a first reading ===============================================

PATH = (str, os.PathLike)


def group_numbers(table, image_ids, category_ids):
    """The group of each record; -1 where its image or its category is not among the sorted ids."""
    image, category = (np.where(np.isin(ids, known), np.searchsorted(known, ids), -1)
                       for ids, known in ((table["image_id"], image_ids), (table["category_id"], category_ids)))
    return np.where((image < 0) | (category < 0), -1, category * len(image_ids) + image)


def read_ground_truth(name, content, num_keypoints):
    """COCO annotations -> GroundTruth. As in pycocotools, people whose image or category is not listed do not exist."""
    sections = {key: content.get(key, []) if isinstance(content, dict) else None
                for key in ("images", "categories", "annotations")}
    if not all(isinstance(section, list) for section in sections.values()):
        raise DataError(f"{name}: expected a path or what COCO's files hold: lists of images, categories, annotations")
    kinds = {"id": ID, "image_id": ID, "category_id": ID, "keypoints": ((3 * num_keypoints,), float),
             "num_keypoints": ID, "area": NUMBER, "bbox": BOX, "iscrowd": ID}
    table = read_columns(sections["annotations"], kinds, f"{name}: annotation")
    ids, times = np.unique(table["id"], return_counts=True)
    if (times > 1).any():
        raise DataError(f"{name}: annotation id {ids[times > 1][0]} appears more than once")
    if not sections["categories"]:
        raise DataError(f"{name}: not COCO keypoint annotations: no 'categories'")
    image_ids, rows = np.unique(column(sections["images"], "id", ID, f"{name}: image"), return_index=True)
    category_ids = np.unique(column(sections["categories"], "id", ID, f"{name}: category"))
    group = group_numbers(table, image_ids, category_ids)
    table = {field: values[group >= 0] for field, values in table.items()}
    keypoints, crowd = table["keypoints"].reshape(-1, num_keypoints, 3), table["iscrowd"] != 0
    return GroundTruth(
        images=[sections["images"][row] for row in rows], image_ids=image_ids, category_ids=category_ids,
        group=group[group >= 0], points=keypoints[:, :, :2], labelled=keypoints[:, :, 2] > 0, area=table["area"],
        box=table["bbox"], crowd=crowd, ignored=crowd | (table["num_keypoints"] == 0), id_is_zero=table["id"] == 0)


def read_detections(results, truth):
    """COCO results -> Detections."""
    num_keypoints = truth.points.shape[1]
    name, records = "results", results
    if isinstance(results, PATH):
        name, records = str(results), read_json(results, list, "COCO's results")
    if not records:
        raise DataError(f"{name}: expected a list of results, found an empty one")
    first = records[0]
    kinds = {"image_id": ID, "category_id": ID, "score": NUMBER, "keypoints": ((3 * num_keypoints,), float)}
    if isinstance(first, dict) and first.get("bbox"):  # then pycocotools takes all areas from the boxes
        kinds["bbox"] = BOX
    elif isinstance(first, dict) and "segmentation" in first:  # from the masks
        raise DataError(f"{name}: result 0: expected keypoints, with a 'bbox' or without, found a 'segmentation'")
    table = read_columns(records, kinds, f"{name}: result")
    for row in np.flatnonzero(~np.isin(table["image_id"], truth.image_ids)):
        raise DataError(f"{name}: result {row}: image_id {table['image_id'][row]} is no image of the annotations")
    points = table["keypoints"].reshape(-1, num_keypoints, 3)[:, :, :2]
    extent = [np.ptp(table["keypoints"][:, axis::3], axis=1) for axis in (0, 1)]
    width, height = table["bbox"][:, 2:].T if "bbox" in table else extent
    group = group_numbers(table, truth.image_ids, truth.category_ids)
    order = np.lexsort((-table["score"], group))  # stable: equal scores stay in the order of the file
    rank = np.arange(len(order)) - np.searchsorted(group[order], group[order])
    order, rank = order[rank < MAX_DETECTIONS], rank[rank < MAX_DETECTIONS]
    return Detections(group[order], rank, table["score"][order], points[order], (width * height)[order])


def read_truth_and_detections(annotations, results, sigmas=COCO17.sigmas):
    """Paths of COCO's keypoint JSON and results JSON, or what they hold -> GroundTruth, Detections, sigmas (K,), which
    are those of the annotations' own skeleton if they are None."""
    name, content = "annotations", annotations
    if isinstance(annotations, PATH):
        name, content = str(annotations), read_json(annotations, dict, "COCO's annotations")
    sigmas = np.asarray(read_skeleton(name, content).sigmas if sigmas is None else sigmas, float)
    if sigmas.ndim != 1 or not (sigmas > 0).all():
        raise DataError(f"sigmas: expected a positive number for each keypoint, found {sigmas.tolist()}")
    truth = read_ground_truth(name, content, len(sigmas))
    return truth, read_detections(results, truth), sigmas


def candidate_pairs(group, sorted_group):
    """All pairs of rows with group[first] == sorted_group[second]: arrays (pairs,), sorted by first, then second."""
    start, stop = np.searchsorted(sorted_group, group, "left"), np.searchsorted(sorted_group, group, "right")
    count = stop - start
    first = np.repeat(np.arange(len(group)), count)
    return first, np.arange(len(first)) + np.repeat(start - (np.cumsum(count) - count), count)


def offset_from_box(points, box):
    """How far outside of a box points are, (pairs, K, 2). COCO's rule for a person without labelled keypoints: within
    the box, grown by its size on all sides, every point is perfect. points (pairs, K, 2), box (pairs, 1, 4)."""
    corner, size = box[..., :2], box[..., 2:]
    return np.maximum(0, corner - size - points) + np.maximum(0, points - (corner + size * 2))


def mean_or_minus_1(values):
    """The mean of the values that are not NaN, -1 if there are none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else -1.0


def coco_results(image_ids, points, scores):
    """COCO's results of poses (people, K, 2) with scores of their keypoints (people, K). As in mmpose's CocoMetric, the
    score of a pose is the mean of its keypoints' scores above 0.2, 0 if there are none."""
    poses, sure = np.concatenate([points, scores[:, :, None]], axis=2), scores > 0.2  # (people, K, 3), (people, K)
    pose_scores = (scores * sure).sum(1) / np.maximum(sure.sum(1), 1)
    return [{"image_id": int(image_id), "category_id": 1, "keypoints": pose.ravel().tolist(), "score": float(score)}
            for image_id, pose, score in zip(image_ids, poses, pose_scores)]


# === Appendix: domains, the papers' PCK, no labels; skip on a first reading ===========================================

def by_domain(truth, detections, positive, ignored):
    """COCO's ten numbers of each domain: an image's `category`, else the last folder of its `file_name`."""
    domains = np.array([domain_of({"file_name": "", **image}) for image in truth.images])
    return {str(domain): coco_numbers(truth, detections, positive, ignored, domains == domain)
            for domain in np.unique(domains)}


def pck_of_results(dataset, results, size, chosen=slice(None), threshold=0.05, groups=None):
    """`evaluate_pck` of what `predict` gave for dataset.annotated[chosen]; threshold: a share of the crop's height."""
    people = dataset.annotated[chosen]
    poses = np.array([result["keypoints"] for result in results])[chosen]
    predicted, truth = poses.reshape(len(people), len(dataset.skeleton.names), 3), dataset.keypoints[people]
    crop_heights = crop_width(dataset.boxes[people], size) * size[0] / size[1]
    return evaluate_pck(predicted[:, :, :2], truth[:, :, :2], truth[:, :, 2], crop_heights, threshold, groups)



def highest_cells(heatmaps):
    """The cells (people, K, 2), x before y, where heatmaps (people, K, h, w) are highest; (0, 0) if none is above 0."""
    flat = np.asarray(heatmaps).reshape(*np.shape(heatmaps)[:2], -1)
    y, x = np.divmod(flat.argmax(2), np.shape(heatmaps)[3])
    return np.stack([x, y], axis=2) * (flat.max(2) > 0)[:, :, None]


def pck_of_cells(predicted, target, visible, size, threshold, groups):
    """`evaluate_pck_grid` of the cells (people, K, 2) of heatmaps of `size` (height, width)."""
    counts, square = (np.asarray(visible) > 0) & (target > 1).all(2), [size[0] / size[1], 1]
    return evaluate_pck(predicted * square, target * square, counts, size[0], threshold, groups)



# === Appendix: detected boxes and own pictures; skip on a first reading ===============================================



def oks_nms(keypoints, scores, areas, images, threshold=0.9, sigmas=COCO17.sigmas):
    """The rows of poses that stay where one person has several, as mmpose's oks_nms. From the best score down, a pose
    removes those after it whose OKS with it (all keypoints, the mean of the areas) is above the threshold. keypoints
    (poses, K, 2), scores, areas, images (poses,): ids."""
    order, kept = np.lexsort((-scores, images)), []
    for left in np.split(order, np.flatnonzero(np.diff(images[order])) + 1):  # the poses of one image
        while len(left):
            best, left = left[0], left[1:]
            kept.append(best)
            area = (areas[left] + areas[best]) / 2
            oks = keypoint_similarity(keypoints[left] - keypoints[best], area[:, None], sigmas).mean(1)
            left = left[oks <= threshold]
    return np.sort(kept).astype(int)


def predict_people(model, dataset, texts, people, box_scores=None, workers=0):
    """`predict`; in a detector's boxes as mmpose does it: a pose's score times its box's, repeated poses removed."""
    results = predict(model, dataset, texts, people, workers=workers)
    for result, row in zip(results, people):  # not "bbox": COCO's tools would take the areas from it
        result |= {"box": dataset.boxes[row].tolist(), "file_name": dataset.files[dataset.image_index[row]]}
    if box_scores is None:
        return results
    for result, score in zip(results, box_scores):
        result["score"] *= float(score)
    poses = np.array([result["keypoints"] for result in results]).reshape(len(results), -1, 3)
    scores = np.array([result["score"] for result in results])
    height, width = size = model.config.image_size
    areas = crop_width(dataset.boxes[people], size) ** 2 * height / width
    image_rows, sigmas = dataset.image_index[people], dataset.skeleton.sigmas
    return [results[row] for row in oks_nms(poses[:, :, :2], scores, areas, image_rows, sigmas=sigmas)]


@dataclass
class Poses:
    """The poses of the people in one picture, in its pixels."""
    keypoints: np.ndarray  # (people, K, 3) x, y, score
    boxes: np.ndarray  # (people, 4) left, top, width, height: where they were looked for
    skeleton: Skeleton  # names the keypoints; for `draw_pose`


def estimate_poses(model, image, boxes=None, sentence=None):
    """The poses of the people in one picture -> Poses.

    model: from `load_model`. image: a Pillow image, or RGB bytes (H, W, 3). boxes: the people's, (people, 4) left, top,
    width, height in pixels; without them, the picture is taken as one person as a whole. sentence: what VLPose reads,
    such as "a photo of a cartoon character"; without one its adapter is off.
    """
    image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    boxes = np.array([(0, 0, *image.size)] if boxes is None else boxes, float).reshape(-1, 4)
    if not ((boxes[:, 2:] > 0).all() and (np.abs(boxes) <= FARTHEST).all()):
        raise DataError(f"boxes: expected a width and a height above 0, at most a million, found {boxes.tolist()}")
    picture, texts = with_boxes(no_people([image], model.skeleton), np.zeros(len(boxes), int), boxes), None
    picture = replace(picture, upright=False)  # an EXIF orientation is ignored: the poses are in the image's pixels
    if sentence is not None:
        if not isinstance(model, VLPose):
            raise DataError(f"sentence: expected a VLPose, which reads text, found a {type(model).__name__}")
        picture = replace(picture, sentences=np.array([sentence]))
        T = read_sentence(sentence, **getattr(model, "about", {}))
        texts = {sentence: T.to(next(model.parameters()).device)}
    results = predict(model, picture, texts, np.arange(len(boxes)))
    keypoints = np.array([result["keypoints"] for result in results]).reshape(len(boxes), model.num_keypoints, 3)
    return Poses(keypoints, boxes, picture.skeleton)


@lru_cache(maxsize=64)
def read_sentence(sentence, text_weights="random", per_token=False, sentences=None):
    """T (L, D_text) of a sentence, by the text tower that a model was trained with."""
    return encode_sentences(load_clip_text(text_weights), [sentence], per_token)[sentence]


# === Appendix: drawing; skip on a first reading =======================================================================

def limb_color(skeleton, *keypoints):
    """Orange for the person's left, blue for the right, green for the middle and what joins the sides."""
    sides = {word for keypoint in keypoints for word in plain_name(skeleton.names[keypoint]).split("_")}
    sides &= {"left", "right"}
    return (255, 140, 0) if sides == {"left"} else (0, 150, 255) if sides == {"right"} else (120, 220, 90)


def draw_pose(image, keypoints, skeleton=COCO17, threshold=0.0):
    """A copy of an image, Pillow's or an array, with a skeleton drawn over it: left orange, right blue; the surer the
    more opaque, with a dark rim. keypoints: (K, 3) x, y, score; those of at most `threshold` are left out."""
    image = (image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))).convert("RGB")
    if not (drawn := keypoints[:, 2] > threshold).any():
        return image
    low, high = keypoints[drawn, :2].min(0), keypoints[drawn, :2].max(0)
    width = max(1.0, (high - low).max() / 50, max(image.size) / 800)
    corner = np.floor(low - 2 * width)
    size = np.ceil(high + 2 * width - corner).astype(int) + 1
    # Drawn larger and reduced again, for smooth lines; thick lines on a huge picture do without.
    fine = 4 if size.max() < 1000 else 2 if size.max() < 3000 else 1
    layer = Image.new("RGBA", tuple(fine * size))
    draw = ImageDraw.Draw(layer)
    xy = [tuple(point) for point in (keypoints[:, :2] - corner + 0.5) * fine]
    alpha = (255 * np.clip(keypoints[:, 2], 0.5, 1)).astype(int)
    for a, b in skeleton.edges:
        if drawn[a] and drawn[b]:
            for color, part in (((0, 0, 0), 1.5), (limb_color(skeleton, a, b), 1)):  # dark below, to be seen as a rim
                draw.line([xy[a], xy[b]], (*color, min(alpha[a], alpha[b])), round(part * width * fine))
    for j in np.flatnonzero(drawn):
        draw.circle(xy[j], 1.25 * width * fine, (*limb_color(skeleton, j), alpha[j]), (0, 0, 0, alpha[j]), fine)
    layer = layer.reduce(fine)
    image.paste(layer, tuple(corner.astype(int)), layer)
    return image



# === Appendix: the command line of both programs; skip on a first reading =========================
#
# The options of a program are the fields of a dataclass: `base_lr` is `--base-lr`. A field has the option's type and
# default, its value in the paper, its limits, when it counts, and its help, all in one place.

SAME = object()  # the paper's value is the default


@dataclass(frozen=True)
class Condition:
    """When an option counts: with or without another one or, if values are given, some of its values."""
    word: str  # "with" or "without"
    other: str  # the other option's field
    values: tuple

    def holds(self, options):
        value = getattr(options, self.other)
        found = value in self.values if self.values else bool(value)
        return found == (self.word == "with")

    def __str__(self):
        return " ".join([self.word, flag_of(self.other), *self.values])


def only_with(other, *values):
    return Condition("with", other, values)


def only_without(other, *values):
    return Condition("without", other, values)


def option(default, *, help, paper=SAME, only=(), **how):
    """A field of a dataclass of options.

    paper: its value in the paper, where that differs. only: the Conditions under which it counts. how: `least`,
    `above`, `most` and `step` are the limits of a number; `type`, `choices`, `nargs`, `const` and `metavar` are
    argparse's. Without a `type` the field's annotation is the type: int, float, str, bool, or a list of one of them.
    """
    return field(default=default, metadata={"help": help, "paper": paper, "only": only, "how": how})


def flag_of(name):
    return "--" + name.replace("_", "-")


def defaults_of(kind, recipe="minutes"):
    """{field: default} of a dataclass of options, for the recipe "minutes" or "paper"."""
    defaults = {}
    for entry in fields(kind):
        paper = entry.metadata["paper"]
        defaults[entry.name] = entry.default if recipe == "minutes" or paper is SAME else paper
    return defaults


def read_options(kind, argv, defaults, description):
    """An object of the dataclass `kind` with the values of the command line.

    Raises DataError for an option that is unknown, wrong, or given in vain.
    """
    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    groups = {}
    for entry in fields(kind):
        when = "; ".join(map(str, entry.metadata["only"]))
        if when not in groups:
            groups[when] = parser.add_argument_group(f"only {when}" if when else "always")
        groups[when].add_argument(flag_of(entry.name), default=defaults[entry.name], **argument_of(entry))
    options = kind(**vars(parser.parse_args(argv)))
    refuse_in_vain(options, defaults)
    return options


def argument_of(entry):
    """What argparse's `add_argument` wants to know of a field."""
    argument = {"help": entry.metadata["help"], **entry.metadata["how"]}
    if entry.type is bool:
        argument["action"] = argparse.BooleanOptionalAction
        return argument
    limits = {name: argument.pop(name) for name in ("least", "above", "most", "step") if name in argument}
    kind = (*get_args(entry.type), entry.type)[0]  # int of list[int] and of int | None
    if kind in (int, float) and "type" not in argument:
        argument["type"] = number(kind, **limits)
    return argument


def refuse_in_vain(options, defaults):
    """Raises DataError for an option that was given and has no effect beside the others."""
    for entry in fields(options):
        if getattr(options, entry.name) == defaults[entry.name]:
            continue
        for condition in entry.metadata["only"]:
            if not condition.holds(options):
                raise DataError(f"{flag_of(entry.name)}: has no effect; it counts only {condition}")


def number(kind, least=-math.inf, above=-math.inf, most=math.inf, step=None):
    """The type of an option: a finite int or float (`kind`) within limits, and a multiple of `step`."""
    expected = "an integer" if kind is int else "a number"
    if step:
        expected = f"a multiple of {step}"
    if most < math.inf:
        expected += f" from {least} to {most}"
    elif above > -math.inf:
        expected += f" above {above}"
    elif least > -math.inf:
        expected += f" of at least {least}"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        good = least <= value <= most and value > above and abs(value) < math.inf
        if not good or step and value % step:
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text}")
        return value
    return parse


# === Appendix: the command; skip on a first reading ===================================================================

def format_table(title, table):
    """{row: {column: number}} as text, after an empty line; `title` is the heading of the rows' names."""
    first = max(map(len, [title, *table]))
    widths = {column: max(10, len(column)) for column in next(iter(table.values()))}
    lines = [f"\n{title:<{first}}" + "".join(f" {column:>{width}}" for column, width in widths.items())]
    for name, row in table.items():
        lines.append(f"{name:<{first}}" + "".join(f" {row[column]:{width}.3f}" for column, width in widths.items()))
    return "\n".join(lines)


def print_numbers(args, annotations, results, sigmas, domains=True, pck=None):
    """COCO's ten numbers, with `domains` those of each domain, and PCK where it is given."""
    truth, detections, sigmas = read_truth_and_detections(annotations, results, sigmas)
    if len(detections.group) and detections.group.max() < 0:
        print(f"no result has a category_id of the annotations: {truth.category_ids.tolist()}", file=sys.stderr)
    classified = classify_detections(truth, detections, sigmas)
    numbers = coco_numbers(truth, detections, *classified)
    tables = {"domains": by_domain(truth, detections, *classified)} if domains else {}
    tables |= {"PCK@0.05": {"all": pck}} if pck else {}
    if args.json:
        print(json.dumps(numbers | tables))
    else:
        print("\n".join(format_table(title, table) for title, table in ({"COCO": {"all": numbers}} | tables).items()))


def with_texts(dataset, model, args):
    """The data set with its sentences, by --prompt or the model's own, and {sentence: T}; None without an adapter."""
    for name in ("prompt", "text_weights", "compare"):
        if getattr(args, name) and not isinstance(model, VLPose):
            raise DataError(f"--{name.replace('_', '-')}: has no effect; {args.checkpoint} reads no text")
    if not isinstance(model, VLPose) or args.prompt == "none":
        return dataset, None
    about, weights = model.about, args.text_weights or model.about.get("text_weights")
    sentences = args.prompt or about.get("sentences")
    if not weights or not sentences:
        raise DataError(f"{args.checkpoint}: does not say how it reads text; --text-weights and --prompt do")
    clip_text = load_clip_text(weights).to(args.device)
    if clip_text.config.embed_dim != model.options["text_dim"]:
        raise DataError(f"{weights}: expected text features of width {model.options['text_dim']}, which the adapter "
                        f"was trained with, found {clip_text.config.embed_dim}")
    dataset = with_sentences(dataset, sentences)
    return dataset, encode_sentences(clip_text, np.unique(dataset.sentences).tolist(), about.get("per_token", False))


def use_model(args):
    """Poses by a model: of a data set, with their numbers, or of own pictures."""
    model = load_model(args.checkpoint, base=args.base).to(args.device)
    if isinstance(model, VLPose) and not args.data and "{domain}" in (args.prompt or model.about.get("sentences", "")):
        raise DataError("--prompt: say what the pictures show, such as 'a photo of a cartoon character', or 'none'")
    if args.data:
        dataset = load_dataset(args.data, args.split, args.cache)
        if "keypoint 1" not in model.skeleton.names:  # the model knows what its keypoints are
            dataset = with_skeleton(dataset, model.skeleton)
        if not len(dataset.annotated):
            raise DataError(f"{args.data}: expected labelled people in split {args.split!r}, found none")
        rows = {number: row for row, number in enumerate(dataset.image_ids.tolist())}
    else:
        dataset = read_pictures(find_pictures(args.images), skeleton=model.skeleton, strict=args.strict)
        rows = picture_rows(dataset.files)
        if not args.detect and not args.boxes:
            print("each picture is taken as one person; --detect looks for people", file=sys.stderr)
    if args.sigmas is not None:
        if len(args.sigmas) != len(dataset.skeleton.names):
            raise DataError(f"--sigmas: expected {len(dataset.skeleton.names)} numbers, found {len(args.sigmas)}")
        dataset = replace(dataset, skeleton=replace(dataset.skeleton, sigmas=np.array(args.sigmas)))
    if args.out:
        check_out(args, dataset)
    dataset, texts = with_texts(dataset, model, args)
    boxed, people, box_scores = dataset, dataset.annotated if args.data else np.arange(len(dataset.ids)), None
    if args.detect:
        args.boxes = detect(dataset, args)
    if args.boxes:
        rows, boxes, box_scores = read_boxes(args.boxes, rows, CATEGORIES.index(args.category))
        boxed, people = with_boxes(dataset, rows, boxes), np.arange(len(rows))
    results = predict_people(model, boxed, texts, people, box_scores, args.workers)
    if args.out:
        write_poses(args, boxed, results)
        draw_pictures(args, model, boxed, texts, people, box_scores, results)
    if args.data:
        pck = args.details and not args.boxes and pck_of_results(  # in detected boxes nobody knows whose pose it is
            dataset, results, model.config.image_size, groups=dataset.skeleton.groups)
        print_numbers(args, to_coco(dataset), results, dataset.skeleton.sigmas, pck=pck)


def check_out(args, dataset):
    """Nothing is overwritten, least of all annotations that somebody has corrected; and no drawing becomes input."""
    out = Path(args.out).resolve()
    folders = [Path(folder).resolve() for folder in filter(os.path.isdir, args.images or ())]
    for name in ("results.json", "annotations.json", "config.json", "images"):
        if (out / name).exists():
            raise DataError(f"--out {args.out}: holds {name} already; name another folder")
    if any(map(out.is_relative_to, folders)) or any(Path(file).resolve().is_relative_to(out) for file in dataset.files):
        raise DataError(f"--out {args.out}: there are pictures that are input; name another folder")


def write_poses(args, dataset, results):
    """results.json; and annotations.json, which `load_dataset` and annotation programs read, with the images: there a
    keypoint is visible (2) with a score of at least 0.5, hidden (1) if it is drawn at all, or else not labelled."""
    image_ids, boxes = (np.array([result[key] for result in results]) for key in ("image_id", "box"))
    people = with_boxes(dataset, image_rows("results", dataset.image_ids, np.arange(len(results)), image_ids), boxes)
    poses = np.reshape([result["keypoints"] for result in results], people.keypoints.shape)
    scores = poses[:, :, 2:]
    poses = np.concatenate([poses[:, :, :2], 1 + (scores >= 0.5)], axis=2) * (scores > args.threshold)
    content = to_coco(replace(people, keypoints=poses), args.category)
    write_json(Path(args.out) / "results.json", results)
    for record, file in zip(content["images"], dataset.files):
        (record["width"], record["height"]), turned = picture_size(file, dataset.upright)
        place = Path(args.out) / "images" / record["file_name"]
        place.parent.mkdir(parents=True, exist_ok=True)
        if turned:  # not all programs turn it, `load_dataset` does not; without the compression that Pillow keeps
            Image.fromarray(np.asarray(open_image(file, upright=True)[0])).save(place, turned, quality=95)
        else:
            try:
                place.symlink_to(os.path.abspath(file))
            except OSError:  # where links are not possible
                shutil.copyfile(file, place)
    write_json(Path(args.out) / "annotations.json", content)


def draw_pictures(args, model, dataset, texts, people, box_scores, results):
    """A picture for each image with people, at most --pictures of them; with --compare two panels."""
    found, in_image = {"": results}, dataset.image_index[people]
    if args.compare:
        found = {"original": predict_people(model, dataset, None, people, box_scores, args.workers), "adapted": results}
    rows, digits = np.unique(in_image), max(3, len(str(dataset.image_ids.max())))
    for row in progress(rows[:args.pictures], "drawing pictures"):
        image, number = open_image(dataset.files[row], upright=dataset.upright)[0], dataset.image_ids[row]
        scale = min(1, 4096 / max(image.size))  # a huge drawing needs gigabytes
        image = image.resize([math.ceil(scale * side) for side in image.size]) if scale < 1 else image
        panels = dict.fromkeys(found, image)
        for label, poses in found.items():
            for pose in (pose["keypoints"] for pose in poses if pose["image_id"] == number):
                panels[label] = draw_pose(panels[label], np.reshape(pose, (-1, 3)) * (scale, scale, 1),
                                          dataset.skeleton, args.threshold)
        sheet = Image.fromarray(np.hstack([np.asarray(panel) for panel in panels.values()]))
        for place, label in enumerate(panels):
            ImageDraw.Draw(sheet).text((place * image.width + 4, 2), label, "white", stroke_width=1,
                                       stroke_fill="black", font_size=max(10, image.width / 30))
        sheet.save(Path(args.out) / f"{number:0{digits}d}-{Path(dataset.files[row]).stem[:60]}.jpg", quality=92)
    print(f"{args.out}: {len(results)} poses ({len(people) - len(results)} repeated ones left out) in {len(rows)} of "
          f"{len(dataset.files)} images; {len(rows[:args.pictures])} drawn", file=sys.stderr)


def load_detector(name):
    """A detector of torchvision: a list of RGB images (3, H, W) from 0 to 1 -> dicts of boxes, labels, scores."""
    detector = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    detector.load_state_dict(load_weights(name))
    detector.roi_heads.keypoint_roi_pool = None  # only boxes, in half the time
    for layer in detector.modules():
        if name == DETECTORS[0] and isinstance(layer, torch.nn.BatchNorm2d):
            layer.eps = 0.0  # as it was trained
    return detector.eval()


def detect(dataset, args):
    """Looks for --category in all images; returns the path of boxes.json, COCO's results, which --boxes reads, too."""
    what, category, records = args.category, CATEGORIES.index(args.category), []
    name = DETECTORS[what != "person"] if args.detect == "best" else args.detect
    if what != "person" and name == DETECTORS[0]:
        raise DataError(f"{name} finds only people; other categories need {' or '.join(DETECTORS[1:])}")
    detector, path = load_detector(name).to(args.device), Path(args.out) / "boxes.json"
    image_ids = dataset.image_ids.tolist() if args.data else below_common_folder(dataset.files)[1]
    for image_id, file in progress(list(zip(image_ids, dataset.files)), "detecting"):
        pixels = torch.tensor(np.asarray(open_image(file, upright=dataset.upright)[0])).permute(2, 0, 1)  # (3, H, W)
        with torch.inference_mode():
            found, = detector([pixels.to(args.device) / 255])
        good = (found["labels"] == category) & (found["scores"] >= args.detect_score)
        boxes, scores = found["boxes"][good].tolist(), found["scores"][good].tolist()
        if not boxes:
            print(f"no {what} found in {file}: taken as one {what} as a whole", file=sys.stderr)
            boxes, scores = [(0, 0, pixels.shape[2], pixels.shape[1])], [args.detect_score]
        records += [{"image_id": image_id, "category_id": category, "score": score,
                     "bbox": [x, y, right - x, bottom - y]} for (x, y, right, bottom), score in zip(boxes, scores)]
    write_json(path, records)
    return path


def usable_device(text):
    """Type of the option --device: one that works here."""
    try:
        torch.zeros(1, device=text)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} does not work here: {str(error).splitlines()[0]}") from None
    return text


REMEDIES = {"out of memory": "in train.py a smaller --batch-size, --accumulate and --checkpointing save memory",
            "DataLoader worker (pid": "a process that cuts crops has died, perhaps for want of memory: fewer --workers"}


class Parser(argparse.ArgumentParser):
    """An error in an option is one line like any other, not a list of all that there are."""

    def error(self, message):
        raise DataError(f"{message}; --help lists the options")


def fail(error):
    """Says in one line what is wrong, which a worker process writes in a later one; unexpected errors go on."""
    if isinstance(error, KeyboardInterrupt):  # with the signal, and the run that it has stopped, if there is one
        number, *folder = error.args or [signal.SIGINT]
        print(f"stopped by {signal.Signals(number).name}" + "".join(
            f"; go on with: python train.py --resume {place}" for place in folder), file=sys.stderr)
        return 128 + number
    remedy = "".join(f"; {text}" for words, text in REMEDIES.items() if words in str(error))
    if not remedy and not isinstance(error, (ValueError, OSError, NotImplementedError, MemoryError)):
        raise error
    lines = str(error).strip().splitlines() or [repr(error)]
    message = next((line[16:] for line in lines if line.startswith("data.DataError: ")), lines[0])
    print(f"error: {message if len(message) < 500 else message[:500] + '...'}{remedy}", file=sys.stderr)
    return 2


def data_spec(text):
    """Type of an option: a data set, name:root, as it is called from everywhere."""
    name, _, root = text.partition(":")
    return f"{name}:{os.path.abspath(root)}" if root else text


def path_or_name(text):
    """Type of an option: a file or folder, as it is called from everywhere; or another name."""
    return os.path.abspath(text) if os.path.exists(text) and text not in (*PUBLIC_FILES, "random") else text


with open(Path(__file__).parent / "assets" / "options.csv", newline="", encoding="utf-8") as file:
    OPTIONS = list(csv.DictReader(file))  # of both commands, but for those of train.py's recipes
KINDS = {  # of options -> what `add_argument` wants
    "data": {"type": data_spec}, "path": {"type": path_or_name}, "folder": {"type": os.path.abspath}, "text": {},
    "count": {"type": number(int, 0)}, "positive": {"type": number(int, 1)}, "share": {"type": number(float, 0, most=1)},
    "rate": {"type": number(float, above=0)}, "sigmas": {"type": number(float, above=0), "nargs": "+"},
    "sides": {"type": number(int, 32, step=32), "nargs": 2}, "split": {"choices": ("train", "val", "all")},
    "switch": {"action": argparse.BooleanOptionalAction, "default": False}, "device": {"type": usable_device},
    "texts": {"nargs": "+"}, "category": {"choices": CATEGORIES, "metavar": "NAME"},
    "detector": {"nargs": "?", "const": "best", "choices": ("best", *DETECTORS)}}
HELP = {"allow_abbrev": False, "formatter_class": argparse.ArgumentDefaultsHelpFormatter}
GPU, MPS = torch.cuda.is_available(), torch.backends.mps.is_available()
HERE = {"device": {"default": "cuda" if GPU else "mps" if MPS else "cpu"}, "bf16": {"default": None},
        "workers": {"default": 4 * GPU}, "cache": {"default": str(cache_folder().absolute())}}


def parse(parser, argv, commands, recipe=()):
    """Options of assets/options.csv and of a recipe's fields, in groups by when they have an effect: "with" or
    "without" another option, or with some of its values. DataError for one that is given in vain."""
    rows, groups = {row["option"]: row for row in OPTIONS if row["command"] in commands}, {}
    fields = {name: {"default": row["default"] or None, "help": row["help"]} | KINDS[row["kind"]] | HERE.get(name, {})
              for name, row in rows.items() if row["kind"]} | dict(recipe)
    for name, field in fields.items():
        title = rows[name]["only"] if name in rows else ""
        if title not in groups:
            groups[title] = parser.add_argument_group(f"only {title}" if title else "always")
        groups[title].add_argument(f"--{name.replace('_', '-')}", **field)
    options, defaults = parser.parse_args(argv), vars(parser.parse_args([]))
    for name in (name for name in rows if getattr(options, name) != defaults[name]):
        for condition in filter(None, rows[name]["only"].split("; ")):
            word, other, *values = condition.split()
            value = getattr(options, other.removeprefix("--").replace("-", "_"))
            if (value in values if values else bool(value)) != (word == "with"):
                raise DataError(f"--{name.replace('_', '-')}: has no effect; it counts only {condition}")
    return options


def main(argv=None):
    try:
        parser = Parser(description="Numbers of a results file or of a model, and poses for pictures.", **HELP)
        args = parse(parser, argv, ("eval",))
        Image.MAX_IMAGE_PIXELS = None if args.large else Image.MAX_IMAGE_PIXELS
        if args.results and args.annotations:
            print_numbers(args, args.annotations, args.results, args.sigmas, domains=args.details)
        elif args.checkpoint and (args.data or args.images and args.out):
            use_model(args)
        else:
            raise DataError("expected --results, --annotations; or --checkpoint and --data, or --images and --out")
    except (Exception, KeyboardInterrupt) as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
