"""Evaluation: COCO's keypoint numbers (OKS) from NumPy alone, PCK, and what kinds of errors lie behind them.

    python eval.py --results results.json --annotations person_keypoints_val2017.json [--details] [--json]

A detection meets a person only within one image and one category: a *cell*. Instead of visiting cell after cell, what
follows works on the flat list of all (person, detection) pairs that share one: a few array operations for a data set.
"""
import argparse
import json
import math
import os
import sys
from dataclasses import dataclass, replace
from glob import glob
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader

from data import (BOX, COCO17, ID, NUMBER, SKELETONS, Crops, DataError, PoseDataset, cache_folder, column, crop_matrix,
                  crop_width, decode_heatmaps, domain_of, invert_matrix, load_dataset, normalize, open_image,
                  read_columns, read_records, stream_list, transform_points, warp_image)
from vlpose import VLPose, WeightsError, encode_sentences, load_clip_text, load_model

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # the OKS from which a detection is right; AP is the mean over these
RECALLS = np.linspace(0, 1, 101)  # where the precision-recall curve is read
AREAS = ((0, 1e5 ** 2), (32 ** 2, 96 ** 2), (96 ** 2, 1e5 ** 2))  # all, medium, large, in pixels; both ends belong
MAX_DETECTIONS = 20  # of a cell: the best by score, the others do not count
BATCH = 512  # pairs handled at once: few enough to stay in the processor's cache

# ------------------------------------------------------------------------------------------------------------ reading


@dataclass
class People:
    """N annotated people with K keypoints in M images. The number of a cell: category row * M + image row."""
    images: list  # COCO's image records, in the order of their ids
    image_ids: np.ndarray  # (M,)
    category_ids: np.ndarray  # (C,)
    cell: np.ndarray  # (N,)
    points: np.ndarray  # (N, K, 2)
    labelled: np.ndarray  # (N, K) bool
    area: np.ndarray  # (N,)
    box: np.ndarray  # (N, 4) left, top, width, height
    crowd: np.ndarray  # (N,) bool: a group, which any number of detections may match
    ignored: np.ndarray  # (N,) bool: need not be found, and a detection that matches does not count
    id_is_zero: np.ndarray  # (N,) bool


@dataclass
class Detections:
    """D results: the best of each cell, ordered by cell and, within it, by score."""
    cell: np.ndarray  # (D,), -1 for a category that is not listed
    rank: np.ndarray  # (D,) 0 for a cell's best
    score: np.ndarray  # (D,)
    points: np.ndarray  # (D, K, 2)
    area: np.ndarray  # (D,)


def cells(table, image_ids, category_ids):
    """The cell of each record; -1 where its image or its category is not among the sorted ids."""
    image, category = (np.where(np.isin(ids, known), np.searchsorted(known, ids), -1)
                       for ids, known in ((table["image_id"], image_ids), (table["category_id"], category_ids)))
    return np.where((image < 0) | (category < 0), -1, category * len(image_ids) + image)


def read_people(annotations, num_keypoints):
    """COCO annotations -> People. As in pycocotools, people whose image or category is not listed do not exist."""
    name, sections = source_name(annotations, "annotations"), ("images", "categories", "annotations")
    if is_path(annotations):
        records = read_records(annotations, sections)
    elif isinstance(annotations, dict):
        records = ((section, record) for section in sections for record in annotations.get(section, ()))
    else:
        raise DataError(f"annotations: expected a path or what COCO's files hold, found a {type(annotations).__name__}")
    kinds = {"id": ID, "image_id": ID, "category_id": ID, "keypoints": ((3 * num_keypoints,), float),
             "num_keypoints": ID, "area": NUMBER, "bbox": BOX, "iscrowd": ID}
    table, listed = read_columns((), kinds, name), {"images": [], "categories": []}
    for section, group in groupby(records, key=itemgetter(0)):
        group = map(itemgetter(1), group)
        if section == "annotations":
            table = read_columns(group, kinds, f"{name}: annotation")
        else:
            listed[section] = list(group)
    ids, times = np.unique(table["id"], return_counts=True)
    if (times > 1).any():
        raise DataError(f"{name}: annotation id {ids[times > 1][0]} appears more than once")
    if not listed["categories"]:
        raise DataError(f"{name}: not COCO keypoint annotations: no 'categories'")
    image_ids, rows = np.unique(column(listed["images"], "id", ID, f"{name}: image"), return_index=True)
    category_ids = np.unique(column(listed["categories"], "id", ID, f"{name}: category"))
    cell = cells(table, image_ids, category_ids)
    table = {field: values[cell >= 0] for field, values in table.items()}
    keypoints, crowd = table["keypoints"].reshape(-1, num_keypoints, 3), table["iscrowd"] != 0
    return People(
        images=[listed["images"][row] for row in rows], image_ids=image_ids, category_ids=category_ids,
        cell=cell[cell >= 0], points=keypoints[:, :, :2], labelled=keypoints[:, :, 2] > 0, area=table["area"],
        box=table["bbox"], crowd=crowd, ignored=crowd | (table["num_keypoints"] == 0), id_is_zero=table["id"] == 0)


def read_detections(results, people):
    """COCO results -> Detections."""
    name, num_keypoints = source_name(results, "results"), people.points.shape[1]
    records = stream_list(results) if is_path(results) else iter(results)
    first = next(records, None)
    if first is None:
        raise DataError(f"{name}: expected a list of results, found an empty one")
    kinds = {"image_id": ID, "category_id": ID, "score": NUMBER, "keypoints": ((3 * num_keypoints,), float)}
    if isinstance(first, dict) and first.get("bbox"):  # then pycocotools takes all areas from the boxes
        kinds["bbox"] = BOX
    elif isinstance(first, dict) and "segmentation" in first:  # from the masks
        raise DataError(f"{name}: result 0: expected keypoints, with a 'bbox' or without, found a 'segmentation'")
    table = read_columns(chain([first], records), kinds, f"{name}: result")
    unknown = np.flatnonzero(~np.isin(table["image_id"], people.image_ids))
    if len(unknown):
        image_id = table["image_id"][unknown[0]]
        raise DataError(f"{name}: result {unknown[0]}: image_id {image_id} is none of the images of the annotations")
    points = table["keypoints"].reshape(-1, num_keypoints, 3)[:, :, :2]
    extent = [np.ptp(table["keypoints"][:, axis::3], axis=1) for axis in (0, 1)]
    width, height = table["bbox"][:, 2:].T if "bbox" in table else extent
    cell = cells(table, people.image_ids, people.category_ids)
    order = np.lexsort((-table["score"], cell))  # stable: equal scores stay in the order of the file
    rank = np.arange(len(order)) - np.searchsorted(cell[order], cell[order])
    order, rank = order[rank < MAX_DETECTIONS], rank[rank < MAX_DETECTIONS]
    return Detections(cell[order], rank, table["score"][order], points[order], (width * height)[order])


def is_path(source):
    return isinstance(source, (str, os.PathLike))


def source_name(source, otherwise):
    return str(source) if is_path(source) else otherwise


def load(annotations, results, sigmas=COCO17.sigmas):
    """Paths of COCO's keypoint JSON and results JSON, or what they hold -> People, Detections, sigmas (K,)."""
    sigmas = np.asarray(sigmas, float)
    if sigmas.ndim != 1 or not (sigmas > 0).all():
        raise DataError(f"sigmas: expected a positive number for each keypoint, found {sigmas.tolist()}")
    people = read_people(annotations, len(sigmas))
    return people, read_detections(results, people), sigmas


# ------------------------------------------------------------------------------------------------ COCO's ten numbers

def pairs(cell, sorted_cell):
    """All (i, j) with cell[i] == sorted_cell[j], as two arrays (P,), ordered by i, then j."""
    start, stop = np.searchsorted(sorted_cell, cell, "left"), np.searchsorted(sorted_cell, cell, "right")
    count = stop - start
    i = np.repeat(np.arange(len(cell)), count)
    return i, np.arange(len(i)) + np.repeat(start - (np.cumsum(count) - count), count)


def similarity(offset, area, sigmas):
    """exp(-d² / 2 s² k²), where offset (..., 2) is the way from one point to the other, s² the area and k = 2 sigma."""
    return np.exp(-((offset[..., 0] ** 2 + offset[..., 1] ** 2) / (sigmas * 2) ** 2 / (area + np.spacing(1)) / 2))


def pair_oks(people, found, person, detection, sigmas):
    """The OKS of P pairs: the mean similarity over the person's labelled keypoints.

    A person without any is a region: keypoints are perfect within its box, grown by its size on all sides.
    """
    oks = np.empty(len(person))
    count = people.labelled.sum(1)[person]
    labelled_first = np.argsort(~people.labelled, axis=1, kind="stable")  # (N, K)
    for n in np.unique(count):  # pairs with the same number of keypoints fill an array without gaps
        same = np.flatnonzero(count == n)
        for batch in np.split(same, range(BATCH, len(same), BATCH)):
            p, d = person[batch, None], detection[batch, None]
            if n:
                k = labelled_first[person[batch], :n]  # (P, n)
                offset = found.points[d, k] - people.points[p, k]  # (P, n, 2)
            else:
                k, corner, size = np.arange(len(sigmas)), people.box[p, :2], people.box[p, 2:]
                points = found.points[detection[batch]]  # (P, K, 2)
                offset = np.maximum(0, corner - size - points) + np.maximum(0, points - (corner + size * 2))
            oks[batch] = similarity(offset, people.area[p], sigmas[k]).sum(1) / k.shape[-1]
    return oks


def assign(person, detection, oks, ignored, crowd, rank, thresholds):
    """COCO's greedy matching of P pairs -> (T, D) the person that each detection gets at each threshold, or -1.

    In all cells at once the best detection chooses, then the second best, and so on. Of the people that are still free
    and similar enough it takes one that is not ignored, if it can; then the most similar; of equals the last. The order
    is the same at every threshold: it is sorted once, and each detection takes the first of its list that it can get.
    """
    given = np.full((len(thresholds), len(rank)), -1)  # (T, D)
    free = np.ones((len(thresholds), len(ignored)), bool)  # (T, N)
    order = np.lexsort((-person, -oks, ignored[person], detection, rank[detection]))
    person, detection, oks = person[order], detection[order], oks[order]
    turns = np.searchsorted(rank[detection], np.arange(MAX_DETECTIONS + 1))
    for start, stop in zip(turns[:-1], turns[1:]):
        if start == stop:
            continue
        p, d = person[start:stop], detection[start:stop]
        possible = free[:, p] & (oks[start:stop] >= thresholds[:, None])  # (T, pairs of this turn)
        place = np.where(possible, np.arange(len(p)), len(p))
        lists = np.flatnonzero(np.diff(d, prepend=-1))  # where the list of each detection begins
        best = np.minimum.reduceat(place, lists, axis=1)  # (T, detections of this turn)
        t, row = np.nonzero(best < len(p))
        taken = p[best[t, row]]
        given[t, d[lists[row]]] = taken
        free[t, taken] = crowd[taken]
    return given


@dataclass
class Matches:
    """Who was found, for each area range A and threshold T; `summarize` makes COCO's numbers of it."""
    num_images: int
    num_categories: int
    cell: np.ndarray  # (D,) of the detections, best score first
    outcome: np.ndarray  # (A, T, D) 1 right, 0 wrong, -1 does not count
    person_cell: np.ndarray  # (N,)
    counted: np.ndarray  # (A, N) bool: people to be found


def match(people, found, sigmas):
    person, detection = pairs(people.cell, found.cell)
    oks = pair_oks(people, found, person, detection, sigmas)
    close = oks >= THRESHOLDS[0]
    person, detection, oks = person[close], detection[close], oks[close]
    by_score = np.argsort(-found.score, kind="stable")
    outcome = np.empty((len(AREAS), len(THRESHOLDS), len(found.cell)), np.int8)
    counted = np.empty((len(AREAS), len(people.cell)), bool)
    for a, (low, high) in enumerate(AREAS):
        ignored = people.ignored | (people.area < low) | (people.area > high)
        outside = (found.area < low) | (found.area > high)
        given = assign(person, detection, oks, ignored, people.crowd, found.rank, THRESHOLDS)
        # pycocotools stores the matched person's id and reads 0 as "nobody": the person with id 0 can never be found.
        value = np.where(ignored, -1, np.where(people.id_is_zero, 0, 1))
        right = np.append(value, 0)[given]  # nobody is -1, hence the last
        outcome[a] = np.where((right == 0) & outside, -1, right)[:, by_score]
        counted[a] = ~ignored
    return Matches(
        num_images=len(people.image_ids), num_categories=len(people.category_ids), cell=found.cell[by_score],
        outcome=outcome, person_cell=people.cell, counted=counted)


def precision_recall(outcome, people):
    """Outcomes (D,), best score first -> precision at each of RECALLS, 0 beyond the last, and the recall in the end."""
    hits = np.flatnonzero(outcome[outcome >= 0])  # places of the right ones among those that count
    found = np.arange(1, len(hits) + 1)
    precision = found / (hits + 1 + np.spacing(1))
    precision = np.maximum.accumulate(precision[::-1])[::-1]  # the best at this recall or any higher one
    return np.append(precision, 0)[np.searchsorted(found / people, RECALLS)], len(hits) / people


def summarize(matches, images=None):
    """COCO's ten numbers, -1 where nobody is to be found. `images` (M,) bool: only these, in the order of their ids."""
    images = np.ones(matches.num_images, bool) if images is None else images
    precision = np.full((len(AREAS), len(THRESHOLDS), len(RECALLS), matches.num_categories), np.nan)
    recall = np.full((len(AREAS), len(THRESHOLDS), matches.num_categories), np.nan)
    for category in range(matches.num_categories):
        chosen = category * matches.num_images + np.flatnonzero(images)
        outcome = matches.outcome[:, :, np.isin(matches.cell, chosen)]
        people = matches.counted[:, np.isin(matches.person_cell, chosen)].sum(1)  # (A,)
        for a, t in np.ndindex(outcome.shape[:2]):
            if people[a]:
                precision[a, t, :, category], recall[a, t, category] = precision_recall(outcome[a, t], people[a])

    def mean(values):
        values = values[~np.isnan(values)]
        return float(values.mean()) if values.size else -1.0

    numbers = {}
    for name, values in (("AP", precision), ("AR", recall)):
        numbers |= {name: mean(values[0]), f"{name} .5": mean(values[0, 0]), f"{name} .75": mean(values[0, 5]),
                    f"{name} (M)": mean(values[1]), f"{name} (L)": mean(values[2])}
    return numbers


def evaluate_oks(annotations, results, sigmas=COCO17.sigmas):
    """COCO's ten keypoint numbers, as pycocotools gives them: {"AP": ..., "AP .5": ..., ...}; -1: nobody to be found.

    annotations, results: paths, or the objects that the files hold. sigmas (K,): the spread of the annotators at each
    keypoint, relative to the person's size. Raises DataError, which names the record, for bad input.
    """
    return summarize(match(*load(annotations, results, sigmas)))


# -------------------------------------------------------------------------------------------- what lies behind the AP

def by_domain(people, matches):
    """COCO's ten numbers of each domain: {domain: {"AP": ...}}."""
    domains = np.array([domain_of({"file_name": "", **image}) for image in people.images])
    return {str(domain): summarize(matches, domains == domain) for domain in np.unique(domains)}


def evaluate_domains(annotations, results, sigmas=COCO17.sigmas):
    """`evaluate_oks` for each domain: an image's `category`, else the last folder of its `file_name`."""
    people, found, sigmas = load(annotations, results, sigmas)
    return by_domain(people, match(people, found, sigmas))


def by_keypoint(people, found, sigmas, names=COCO17.names):
    """COCO's ten numbers of each keypoint, as if no other were labelled: `by_keypoint(*load(annotations, results))`."""
    numbers = {}
    for k, name in enumerate(names):
        labelled = people.labelled & (np.arange(len(sigmas)) == k)
        alone = replace(people, labelled=labelled, ignored=people.ignored | ~labelled[:, k])
        numbers[name] = summarize(match(alone, found, sigmas))
    return numbers


def error_breakdown(people, found, sigmas, flip=COCO17.flip):
    """Where the labelled keypoints of the people that were found went, as shares that sum to 1; -1 if nobody was found.

    After Ronchi and Perona (ICCV 2017). With the keypoint similarity, *good* is 0.85 and more, as close as another
    annotator; *jitter* 0.5 and more; *inversion* 0.5 and more to the person's mirrored keypoint (left for right);
    *swap* 0.5 and more to the same or the mirrored keypoint of somebody else; *miss* none of these. A person is found
    by the detection that COCO's matching gives at an OKS of 0.1. flip (K,): the skeleton's mirror image.
    `error_breakdown(*load(annotations, results))`
    """
    person, detection = pairs(people.cell, found.cell)
    oks = pair_oks(people, found, person, detection, sigmas)
    given = assign(person, detection, oks, people.ignored, people.crowd, found.rank, np.array([0.1]))[0]  # (D,)
    counts = np.append(~people.ignored, False)[given]
    person, detection = person[counts[detection]], detection[counts[detection]]

    def near(k):  # (P, K) similarity of every detected keypoint to the person's keypoint k (K,), 0 where not labelled
        offset = found.points[detection] - people.points[person][:, k]
        return similarity(offset, people.area[person, None], sigmas[k]) * people.labelled[person][:, k]

    same, mirrored = near(np.arange(len(sigmas))), near(flip)
    own = given[detection] == person
    others = np.zeros(found.points.shape[:2])  # (D, K)
    np.maximum.at(others, detection[~own], np.maximum(same, mirrored)[~own])
    tests = [same[own] >= 0.85, same[own] >= 0.5, mirrored[own] >= 0.5, others[detection[own]] >= 0.5]
    kinds = np.select(tests, range(4), default=4)[people.labelled[person[own]]]
    shares = np.bincount(kinds, minlength=5) / len(kinds) if len(kinds) else np.full(5, -1.0)
    return dict(zip(("good", "jitter", "inversion", "swap", "miss"), shares.tolist()))


# --------------------------------------------------------------------------------------------- poses in detected boxes

def rescore(box_scores, keypoint_scores, threshold=0.2):
    """The score of a pose in a detected box, (N,), (N, K) -> (N,), as mmpose's CocoMetric has it.

    The box's score times the mean score of the keypoints above the threshold, 0 where there are none.
    """
    sure = keypoint_scores > threshold
    return box_scores * (keypoint_scores * sure).sum(1) / np.maximum(sure.sum(1), 1)


def oks_nms(keypoints, scores, areas, images, threshold=0.9, sigmas=COCO17.sigmas):
    """Removes repeated poses of one person, as mmpose's oks_nms: the rows that stay, in order.

    In each image, from the best score down, a pose that stays removes those after it whose OKS with it (all keypoints,
    the mean of the two areas) is above the threshold. keypoints (N, K, 2), scores (N,), areas (N,), images (N,): ids.
    """
    image = np.unique(images, return_inverse=True)[1]
    order = np.lexsort((-scores, image))
    image, keypoints, areas = image[order], keypoints[order], areas[order]
    first, second = pairs(image, image)
    first, second = first[first < second], second[first < second]
    oks = np.empty(len(first))
    for start in range(0, len(first), BATCH):
        i, j = first[start:start + BATCH], second[start:start + BATCH]
        area = (areas[i] + areas[j]) / 2
        oks[start:start + BATCH] = similarity(keypoints[i] - keypoints[j], area[:, None], sigmas).mean(1)
    first, second = first[oks > threshold], second[oks > threshold]
    rank = first - np.searchsorted(image, image[first])
    stays = np.ones(len(image), bool)
    for turn in range(rank.max(initial=-1) + 1):
        stays[second[(rank == turn) & stays[first]]] = False
    return np.sort(order[stays])


# ---------------------------------------------------------------------------------------------------------------- PCK

def evaluate_pck(predicted, target, visible, size, threshold=0.05, groups=None):
    """The share of correct keypoints as RegDA, UniFrame and multi-level alignment report it: {group: PCK, "mean": PCK}.

    A labelled keypoint is correct when it is closer than threshold * size. A joint's PCK is over all people, a group's
    the mean over its joints, "mean" that over the joints of all groups (without groups: over all joints). Joints that
    nobody has labelled are left out of means, and a mean of none is -1. For single joints, make each one a group.

    predicted, target (N, K, 2) and visible (N, K), labelled where above 0; size: a number or (N,), in the pixels of the
    points (the papers: of the input); groups {name: joints}. Raises DataError for other shapes.
    """
    predicted, target, visible, size = (np.asarray(value) for value in (predicted, target, visible, size))
    if not (predicted.shape == target.shape == (*visible.shape, 2) and size.shape in ((), visible.shape[:1])):
        raise DataError("PCK: expected predicted and target (N, K, 2), visible (N, K), size a number or (N,), found "
                        f"{predicted.shape}, {target.shape}, {visible.shape}, {size.shape}")
    labelled = visible > 0
    correct = labelled & (np.linalg.norm(predicted - target, axis=2) < threshold * size.reshape(-1, 1))
    count = labelled.sum(0)  # (K,)
    pck = correct.sum(0) / np.maximum(count, 1)

    def mean(joints):
        measured = [pck[joint] for joint in joints if count[joint]]
        return float(np.mean(measured)) if measured else -1.0

    groups = groups or {}
    joints = sorted(set().union(*groups.values())) if groups else range(len(count))
    return {name: mean(group) for name, group in groups.items()} | {"mean": mean(joints)}


# -------------------------------------------------------------------------------------------------------- prediction

def run_model(model, images, domains, texts):
    """Heatmaps for normalised images (B, 3, H, W); `texts` maps each image's domain to its text features (L, E)."""
    return model(images) if texts is None else model(images, torch.stack([texts[domain] for domain in domains]))


@torch.inference_mode()
def predict(model, dataset, texts=None, people=None, flip=True, batch_size=64, workers=0):
    """One result in COCO's format for each person in rows `people`: all labelled ones, if it is None.

    model: normalised images -> heatmaps, with a `config`. texts: domain -> text features (L, E), None for no text.
    flip: averages the heatmaps with those of the mirrored image. A result's score is the mean of its keypoints' scores
    above 0.2.
    """
    joints = len(dataset.skeleton.names)
    if getattr(model, "num_keypoints", joints) != joints:
        raise DataError(f"{dataset.name}: {joints} keypoints, but the model predicts {model.num_keypoints}")
    device, size = next(model.parameters()).device, model.config.image_size
    mirrored = torch.as_tensor(dataset.skeleton.flip, device=device)
    keys = [(int(row), 0) for row in (dataset.annotated if people is None else people)]
    batches = [keys[first:first + batch_size] for first in range(0, len(keys), batch_size)]
    training, results = model.training, []
    model.eval()
    for batch in DataLoader(Crops(dataset, size), batch_sampler=batches, num_workers=workers):
        images = normalize(batch["image"].to(device))
        image_rows = dataset.image_index[batch["row"].numpy()]
        heatmaps = run_model(model, images, dataset.domains[image_rows], texts)
        if flip:
            other = run_model(model, images.flip(3), dataset.domains[image_rows], texts)
            heatmaps = (heatmaps + other.flip(3)[:, mirrored]) / 2
        points, scores = (part.cpu().double().numpy() for part in decode_heatmaps(heatmaps, size, model.config.sigma))
        points = transform_points(points, invert_matrix(batch["matrix"].numpy()))  # (B, K, 2) back in the image
        poses = np.concatenate([points, scores[:, :, None]], axis=2)  # (B, K, 3)
        for image_id, pose, score in zip(dataset.image_ids[image_rows], poses, rescore(1.0, scores)):
            results.append({"image_id": int(image_id), "category_id": 1, "keypoints": pose.ravel().tolist(),
                            "score": float(score)})
    model.train(training)
    return results


def pck_of_results(dataset, results, size, chosen=slice(None), threshold=0.05, groups=None):
    """PCK (`evaluate_pck`) of what `predict` gave, for some rows of `dataset.annotated`; the threshold is a share of the
    crop's height."""
    people = dataset.annotated[chosen]
    poses = np.array([result["keypoints"] for result in results])[chosen]
    predicted, truth = poses.reshape(len(people), len(dataset.skeleton.names), 3), dataset.keypoints[people]
    crop_heights = crop_width(dataset.boxes[people], size) * size[0] / size[1]
    return evaluate_pck(predicted[:, :, :2], truth[:, :, :2], truth[:, :, 2], crop_heights, threshold, groups)


def domain_table(dataset, results, size):
    """{domain: {"AP": ..., "PCK": ...}} of what `predict` gave: COCO's AP and PCK@0.05 of the crop's height."""
    domains = dataset.domains[dataset.image_index[dataset.annotated]]
    return {domain: {"AP": numbers["AP"], "PCK": pck_of_results(dataset, results, size, domains == domain)["mean"]}
            for domain, numbers in evaluate_domains(dataset.to_coco(), results, dataset.skeleton.sigmas).items()
            if (domains == domain).any()}


# ------------------------------------------------------------------------------------------ other people, own pictures

def with_boxes(dataset, image_index, boxes):
    """The data set with other people in it: unlabelled ones, in boxes (N, 4) of the images in rows (N,)."""
    count = len(boxes)
    keypoints = np.zeros((count, len(dataset.skeleton.names), 3), np.float32)
    return replace(dataset, ids=np.arange(1, count + 1), image_index=image_index, keypoints=keypoints, boxes=boxes,
                   areas=boxes[:, 2] * boxes[:, 3], crowd=np.zeros(count, bool))


def read_boxes(path, rows):
    """A detector's COCO results for people -> rows of images (N,), boxes (N, 4), scores (N,).

    A result is {"image_id", "bbox", "score", "category_id"}. rows: image_id -> row of the
    image. People's own pictures go by their file's name, with or without its ending.
    """
    found = []
    for number, record in enumerate(stream_list(path)):
        try:
            box = [rows[record["image_id"]], *map(float, record["bbox"]), float(record.get("score", 1))]
            usable = len(box) == 6 and np.isfinite(box).all() and box[3] > 0 and box[4] > 0
        except (AttributeError, KeyError, TypeError, ValueError):
            usable = False
        if not usable:
            image_id = record.get("image_id") if isinstance(record, dict) else None
            raise DataError(f"{path}: box {number}: expected the 'image_id' of one of the images (or its file name), "
                            f"a 'bbox' [x, y, w, h] of some size and a 'score'; found {image_id}: {record!r:.120}")
        if record.get("category_id", 1) == 1:  # a person
            found.append(box)
    if not found:
        raise DataError(f"{path}: expected boxes of category 1, a person; found none")
    found = np.array(found)  # (N, 6)
    return found[:, 0].astype(int), found[:, 1:5], found[:, 5]


def predict_in_boxes(model, dataset, texts, box_scores, workers):
    """Poses in a detector's boxes, the people of `dataset`: scored and freed of repetitions as mmpose does it."""
    results = predict(model, dataset, texts, people=np.arange(len(box_scores)), workers=workers)
    for result, score in zip(results, box_scores):
        result["score"] *= float(score)
    poses = np.array([result["keypoints"] for result in results]).reshape(len(results), -1, 3)
    scores = np.array([result["score"] for result in results])
    height, width = size = model.config.image_size
    areas = crop_width(dataset.boxes, size) ** 2 * height / width
    stays = oks_nms(poses[:, :, :2], scores, areas, dataset.image_index, sigmas=dataset.skeleton.sigmas)
    return [results[row] for row in stays]


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def own_pictures(patterns, skeleton=COCO17):
    """Files, folders and patterns such as '*.png' as a data set: images numbered from 1, each one person as a whole."""
    files = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = sorted(str(file) for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        else:
            found = [pattern] if path.is_file() else sorted(glob(pattern, recursive=True))
        if not found:
            raise DataError(f"{pattern}: no such image, no folder with images, and no pattern that fits any")
        files += found
    files = list(dict.fromkeys(files))
    sizes = np.array([open_image(file, upright=True)[0].size for file in files])
    ids, domains = np.arange(1, len(files) + 1), np.full(len(files), "picture")
    empty = PoseDataset("pictures", skeleton, files, ids, sizes, domains, *[None] * 6, upright=True)
    return with_boxes(empty, np.arange(len(files)), np.column_stack([np.zeros_like(sizes), sizes]).astype(float))


# ---------------------------------------------------------------------------------------------------------- pictures

LEFT, RIGHT, MIDDLE = (255, 140, 0), (0, 150, 255), (120, 220, 90)  # the person's left, right, and what joins them


def limb_color(skeleton, *keypoints):
    sides = {skeleton.names[k].split("_")[0] for k in keypoints} & {"left", "right"}
    return {frozenset({"left"}): LEFT, frozenset({"right"}): RIGHT}.get(frozenset(sides), MIDDLE)


def draw_pose(image, keypoints, skeleton=COCO17, threshold=0.0):
    """A copy of the Pillow image with a skeleton drawn over it: left orange, right blue; the surer the more opaque.

    keypoints: (K, 3) x, y, score; those with a score of at most `threshold` are left out.
    """
    image, shown = image.copy(), keypoints[:, 2] > threshold
    if not shown.any():
        return image
    low, high = keypoints[shown, :2].min(0), keypoints[shown, :2].max(0)
    width = max(1.0, (high - low).max() / 50)
    corner = np.floor(low - 2 * width)
    size = np.ceil(high + 2 * width - corner).astype(int) + 1
    # Drawn larger and reduced again, for smooth lines; thick lines on a huge picture do without.
    fine = 4 if size.max() < 1000 else 2 if size.max() < 3000 else 1
    layer = Image.new("RGBA", tuple(fine * size))
    draw = ImageDraw.Draw(layer)
    xy = [tuple(point) for point in (keypoints[:, :2] - corner + 0.5) * fine]
    alpha = (255 * np.clip(keypoints[:, 2], 0.35, 1)).astype(int)
    for a, b in skeleton.edges:
        if shown[a] and shown[b]:
            color = (*limb_color(skeleton, a, b), min(alpha[a], alpha[b]))
            draw.line([xy[a], xy[b]], fill=color, width=round(width * fine))
    for k in np.flatnonzero(shown):
        (x, y), radius = xy[k], width * fine
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=(*limb_color(skeleton, k), alpha[k]))
    layer = layer.reduce(fine)
    image.paste(layer, tuple(corner.astype(int)), layer)
    return image


def draw_sheet(people, side=192):
    """A column for each of `people`, tuples (title, data set, row, {label: pose}): the person once with each pose (K, 3)
    of x, y, score."""
    labels = list(people[0][3])
    sheet = Image.new("RGB", (len(people) * side, len(labels) * side + 18), "white")
    for x, (title, dataset, row, poses) in enumerate(people):
        matrix = crop_matrix(dataset.boxes[row], (side, side))
        image, shrink = open_image(dataset.files[dataset.image_index[row]], dataset.boxes[row, 2:].max() / side)
        crop = Image.fromarray(warp_image(image, matrix, (side, side), shrink))
        ImageDraw.Draw(sheet).text((x * side + 4, 3), title, "black")
        for y, pose in enumerate(poses.values()):
            moved = np.column_stack([transform_points(pose[:, :2], matrix), pose[:, 2]])
            sheet.paste(draw_pose(crop, moved, dataset.skeleton), (x * side, 18 + y * side))
    for y, label in enumerate(labels):
        ImageDraw.Draw(sheet).text((4, 22 + y * side), label, "white", stroke_width=1, stroke_fill="black")
    return sheet


def true_pose(dataset, row):
    """A person's keypoints (K, 3) to draw: x, y, and the visibility 0, 1, 2 as a score."""
    return dataset.keypoints[row] * [1, 1, 0.5]


def draw_heatmaps(image, model, dataset, texts, people):
    """The image, darkened, where the heatmaps of these people (rows) glow; each pixel shows the highest."""
    glow = np.zeros((image.height, image.width), np.float32)
    device, size = next(model.parameters()).device, model.config.image_size
    for row in people:
        crop = Crops(dataset, size)[int(row), 0]
        with torch.inference_mode():
            pixels = normalize(crop["image"][None].to(device))
            heatmaps = run_model(model, pixels, dataset.domains[dataset.image_index[[row]]], texts)
        highest = Image.fromarray(heatmaps[0].amax(0).float().cpu().numpy())
        scale = (np.array(highest.size) - 1) / (np.array(size[::-1]) - 1)  # crop -> heatmap
        to_image = invert_matrix(crop["matrix"].numpy() * scale[:, None])
        glow = np.maximum(glow, warp_image(highest, to_image, (image.height, image.width)))
    glow = np.clip(glow, 0, 1)[:, :, None]
    return Image.fromarray(((1 - glow) * 0.35 * np.asarray(image) + glow * [255, 200, 60]).astype(np.uint8))


def draw_curves(history, width=480, height=180):
    """Loss and PCK over the steps, side by side, a row per stage. history: dicts of stage, step, loss and pck."""
    stages = list(dict.fromkeys(row["stage"] for row in history))
    picture = Image.new("RGB", (2 * width, height * len(stages)), "white")
    draw = ImageDraw.Draw(picture)
    for line, stage in enumerate(stages):
        rows = [row for row in history if row["stage"] == stage]
        last = rows[-1]["step"]
        for panel, (key, title) in enumerate([("loss", "loss"), ("pck", "PCK@0.05 of training batches")]):
            left, top, right = panel * width + 50, line * height + 30, (panel + 1) * width - 15
            bottom = top + height - 55
            if math.isnan(rows[0][key]):  # a stage that predicts no keypoints
                continue
            highest = max(row[key] for row in rows) or 1
            draw.text((left, top - 22), f"{stage}: {title}", "black")
            for tick in range(5):
                y = bottom - tick / 4 * (bottom - top)
                draw.line([(left, y), (right, y)], (225, 225, 225))
                draw.text((left - 5, y), f"{highest * tick / 4:.3g}", "black", anchor="rm")
            draw.text((right, bottom + 5), f"{last} steps", "black", anchor="ra")
            points = [(left + row["step"] / last * (right - left), bottom - row[key] / highest * (bottom - top))
                      for row in rows]
            draw.line(points, "royalblue", 2)
    return picture


# -------------------------------------------------------------------------------------------------------- the command

def format_coco(numbers):
    """The ten lines that pycocotools prints."""
    lines = []
    for name, value in numbers.items():
        title = "Average Precision  (AP)" if name.startswith("AP") else "Average Recall     (AR)"
        iou = {".5": "0.50", ".75": "0.75"}.get(name[3:], "0.50:0.95")
        area = {"(M)": "medium", "(L)": "large"}.get(name[3:], "all")
        lines.append(f" {title} @[ IoU={iou:<9} | area={area:>6} | maxDets={MAX_DETECTIONS:>3} ] = {value:0.3f}")
    return "\n".join(lines)


def format_table(title, table):
    """{row: {column: number}} as text."""
    width = max(map(len, [title, *table]))
    lines = [f"\n{title:<{width}}" + "".join(f"{column:>11}" for column in next(iter(table.values())))]
    for name, row in table.items():
        lines.append(f"{name:<{width}}" + "".join(f"{value:11.3f}" for value in row.values()))
    return "\n".join(lines)


def evaluate_results(args):
    """The numbers of a results file."""
    people, found, sigmas = load(args.annotations, args.results, args.sigmas)
    matches = match(people, found, sigmas)
    numbers, tables = summarize(matches), {}
    if args.details:
        known = len(sigmas) == len(COCO17.names)
        names = COCO17.names if known else [f"keypoint {k}" for k in range(1, len(sigmas) + 1)]
        tables = {"domains": by_domain(people, matches), "keypoints": by_keypoint(people, found, sigmas, names)}
        if known:
            tables["errors"] = {"all": error_breakdown(people, found, sigmas)}
    print_numbers(args, numbers, tables)


def print_numbers(args, numbers, tables):
    if args.json:
        print(json.dumps(numbers | tables))
    else:
        print("\n".join([format_coco(numbers), *(format_table(title, table) for title, table in tables.items())]))


def load_texts(model, about, args, domains):
    """{domain: text features}, by --prompt or the model's own template; None without an adapter, or for `none`."""
    if not isinstance(model, VLPose) or args.prompt == "none":
        return None
    weights, template = args.text_weights or about.get("text_weights"), args.prompt or about.get("template")
    if not weights or not template:
        raise DataError(f"{args.checkpoint}: does not say how it reads text; --text-weights and --prompt do")
    clip_text = load_clip_text(weights).to(args.device)
    if clip_text.config.embed_dim != model.options["text_dim"]:
        raise WeightsError(f"{weights}: expected text features of width {model.options['text_dim']}, which the adapter "
                           f"was trained with, found {clip_text.config.embed_dim}")
    sentences = {domain: template.replace("{domain}", domain) for domain in np.unique(domains).tolist()}
    return encode_sentences(clip_text, sentences)


def evaluate_checkpoint(args):
    """The numbers of a model on a data set, its results as COCO's JSON, and pictures."""
    model, about = load_model(args.checkpoint)
    model.to(args.device)
    dataset = load_dataset(args.data, args.split, args.cache)
    if not len(dataset.annotated):
        raise DataError(f"{args.data}: expected labelled people in split {args.split!r}, found none")
    texts = load_texts(model, about, args, dataset.domains)
    boxed, people, box_scores = dataset, dataset.annotated, None
    if args.boxes:
        image_rows = {image_id: row for row, image_id in enumerate(dataset.image_ids.tolist())}
        rows, boxes, box_scores = read_boxes(args.boxes, image_rows)
        boxed, people = with_boxes(dataset, rows, boxes), np.arange(len(rows))
    results = predict_and_write(args, model, boxed, texts, people, box_scores)
    loaded = load(dataset.to_coco(), results, dataset.skeleton.sigmas)
    matches = match(*loaded)
    tables = {"domains": by_domain(loaded[0], matches)}
    if args.details:
        tables |= {"keypoints": by_keypoint(*loaded, dataset.skeleton.names),
                   "errors": {"all": error_breakdown(*loaded, dataset.skeleton.flip)}}
        if not args.boxes:  # in detected boxes nobody knows whose pose it is
            groups = dataset.skeleton.groups
            tables["PCK@0.05"] = {"all": pck_of_results(dataset, results, model.config.image_size, groups=groups)}
    print_numbers(args, summarize(matches), tables)


def predict_pictures(args):
    """Poses for people's own pictures, drawn and as COCO's JSON."""
    model, about = load_model(args.checkpoint)
    model.to(args.device)
    if isinstance(model, VLPose) and not args.prompt:
        raise DataError("--prompt: say what the pictures show, such as 'a photo of a cartoon character', or 'none'")
    if model.num_keypoints not in SKELETONS:
        raise DataError(f"{args.checkpoint}: expected a model of {', '.join(map(str, SKELETONS))} keypoints, whose "
                        f"skeletons are known; found {model.num_keypoints}")
    pictures, box_scores = own_pictures(args.images, SKELETONS[model.num_keypoints]), None
    texts = load_texts(model, about, args, pictures.domains)
    if args.boxes:
        names = [{Path(file).name, Path(file).stem} for file in pictures.files]
        by_name = {name: row for row, both in enumerate(names) for name in both}
        if len(by_name) < sum(map(len, names)):
            raise DataError(f"{args.boxes}: two of the pictures have the same name, so that boxes could be of either")
        rows, boxes, box_scores = read_boxes(args.boxes, by_name)
        pictures = with_boxes(pictures, rows, boxes)
    predict_and_write(args, model, pictures, texts, np.arange(len(pictures.ids)), box_scores)


def predict_and_write(args, model, dataset, texts, people, box_scores):
    """The poses of the people in these rows; with --out also results.json and a picture per image that has people."""
    def poses(texts):
        if box_scores is not None:
            return predict_in_boxes(model, dataset, texts, box_scores, args.workers)
        return predict(model, dataset, texts, people, workers=args.workers)

    results = poses(texts)
    if not args.out:
        return results
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    files = dict(zip(dataset.image_ids.tolist(), dataset.files))
    named = [result | {"file_name": files[result["image_id"]]} for result in results]
    (folder / "results.json").write_text(json.dumps(named))
    columns = [poses(None), results] if args.compare else [results]
    image_rows = dataset.image_index[people]
    for row in np.unique(image_rows)[:args.pictures]:
        image, _ = open_image(dataset.files[row], upright=dataset.upright)
        panels = [draw_people(image, column, dataset.image_ids[row], dataset.skeleton) for column in columns]
        if args.compare:
            panels.append(draw_heatmaps(image, model, dataset, texts, people[image_rows == row]))
        sheet = Image.new("RGB", (image.width * len(panels), image.height))
        for place, panel in enumerate(panels):
            sheet.paste(panel, (place * image.width, 0))
        sheet.save(folder / f"{dataset.image_ids[row]}-{Path(dataset.files[row]).stem}.jpg", quality=92)
    print(f"{len(results)} poses in {folder / 'results.json'}, pictures beside it", file=sys.stderr)
    return results


def draw_people(image, results, image_id, skeleton):
    """The image with all poses that were found in it."""
    for result in results:
        if result["image_id"] == image_id:
            image = draw_pose(image, np.reshape(result["keypoints"], (-1, 3)), skeleton, threshold=0.1)
    return image


def default_device():
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def usable_device(text):
    """Type of the option --device: one that works here."""
    try:
        torch.zeros(1, device=text)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} does not work here: {str(error).splitlines()[0]}") from None
    return text


def fail(error):
    """One line for the user; an error in a worker process arrives as a whole traceback, whose last line says it."""
    message = (str(error).strip() or repr(error)).splitlines()[-1]
    print(f"error: {message.removeprefix('data.DataError: ')}", file=sys.stderr)
    return 2


def sigma_list(text):
    """Type of the option --sigmas: "0.026,0.025,..."."""
    return np.array([float(sigma) for sigma in text.split(",")])


def main(argv=None):
    parser = argparse.ArgumentParser(description="Numbers of a results file or of a model, and poses for pictures.")
    add = parser.add_argument
    add("--results", metavar="FILE", help="evaluate this: keypoint results in COCO's format (JSON)")
    add("--annotations", metavar="FILE", help="against these people, in COCO's format (JSON)")
    add("--sigmas", type=sigma_list, default=COCO17.sigmas, metavar="S1,S2,...",
        help="OKS sigmas, one for each keypoint (default: COCO's 17)")
    add("--checkpoint", metavar="FILE", help="use this model: a run's model.pth, or public weights by file or name")
    add("--data", metavar="NAME:ROOT", help="on this data set, as in train.py")
    add("--split", choices=["train", "val", "all"], default="val", help="of --data")
    add("--images", nargs="+", metavar="PATH", help="on these pictures: files, folders, patterns such as '*.png'")
    add("--boxes", metavar="FILE", help="look for people in these boxes: a detector's results in COCO's format (JSON); "
        "the image_id of an own picture is its file's name")
    add("--prompt", help="what VLPose reads instead of its own sentence; 'none' switches its adapter off")
    add("--text-weights", help="CLIP's text tower (default: the one that the model was trained with)")
    add("--out", metavar="FOLDER", help="write results.json and pictures there")
    add("--pictures", type=int, default=100, help="at most so many")
    add("--compare", action="store_true", help="draw original | adapted | heatmaps side by side")
    add("--details", action="store_true", help="numbers also by domain, by keypoint, and by kind of error")
    add("--json", action="store_true", help="print the numbers as JSON")
    add("--cache", default=str(cache_folder()), help="where the built-in figures are kept")
    add("--device", type=usable_device, default=default_device())
    add("--workers", type=int, default=0, help="processes that cut out crops")
    args = parser.parse_args(argv)
    try:
        if args.results and args.annotations:
            evaluate_results(args)
        elif args.checkpoint and args.data:
            evaluate_checkpoint(args)
        elif args.checkpoint and args.images and args.out:
            predict_pictures(args)
        else:
            parser.error("expected --results and --annotations, --checkpoint and --data, or --checkpoint, --images and "
                         "--out")
    except (ValueError, OSError) as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
