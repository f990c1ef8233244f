"""Evaluation: how good are a model's poses? COCO's numbers (OKS and AP), PCK, and the prediction.

    python eval.py --results results.json --annotations person_keypoints_val2017.json --details
    python eval.py --checkpoint runs/vlpose-1 --data figures#artificial

The *ground truth* is the people that annotators marked in the images. A *detection* is a pose that
a model predicts, with a score that says how sure the model is. COCO's numbers ask for three things
at once: every person is found, nobody is found where there is nobody, and right detections have
higher scores than wrong ones. assets/tour.md shows a matching. In the order of reading:

    keypoint similarity        How close is one keypoint to its true place, from 0 to 1?
    OKS                        How similar are a detection and a person?
    greedy matching            Which detection belongs to which person?
    true and false positives   Which detections are right, which are wrong, which are ignored?
    precision, recall, AP      Which share of detections is right, which share of people is found?
    PCK                        The simpler number of the papers on domain adaptation.
    prediction                 From a model and a data set to detections.
"""
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader

from vlpose import text_inputs  # first, because it checks the next one: see clip_tokenizer.py
from data import (COCO17, Augmentation, Crops, DataError, all_items, decode_heatmaps,
                  in_processes, invert_matrix, my_share, normalize, progress, transform_points)

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # a detection is right if its OKS is at least this
RECALLS = np.linspace(0, 1, 101)  # where the precision-recall curve is read
AREAS = ((0, 1e5 ** 2), (32 ** 2, 96 ** 2), (96 ** 2, 1e5 ** 2))  # pixels, both ends included
ALL, MEDIUM, LARGE = range(3)  # the rows of AREAS
MAX_DETECTIONS = 20  # of a category in an image: those with the best scores count
BATCH_SIZE = 64  # crops that go through a model at once

# ---------------------------------------------------------------------- ground truth and detections

@dataclass
class People:
    """The annotated people of an image, with K keypoints each."""
    image_id: np.ndarray  # (people,) the image's place, when the images are sorted by their ids
    category_id: np.ndarray  # (people,)
    points: np.ndarray  # (people, K, 2)
    labelled: np.ndarray  # (people, K) bool
    area: np.ndarray  # (people,) in pixels
    box: np.ndarray  # (people, 4) left, top, width, height
    crowd: np.ndarray  # (people,) bool: a box around many people; it may be matched again
    ignored: np.ndarray  # (people,) bool: crowds and people without keypoints need not be found
    id_is_zero: np.ndarray  # (people,) bool: a quirk, see `classify_detections`


@dataclass
class Detections:
    """The detections of an image, from the best score to the lowest."""
    image_id: np.ndarray  # (detections,) the image's place, likewise
    category_id: np.ndarray  # (detections,)
    score: np.ndarray  # (detections,)
    points: np.ndarray  # (detections, K, 2)
    area: np.ndarray  # (detections,) in pixels


@dataclass
class Scene:
    """An image with its people and detections; `classify_detections` says which ones are right."""
    domain: str  # "photo", "oil painting", ...
    people: People
    detections: Detections
    positive: np.ndarray | None = None  # (areas, thresholds, detections) see `classify_detections`
    to_find: np.ndarray | None = None  # (areas, people) bool


# ----------------------------------------------------------------------- object keypoint similarity

def keypoint_similarity(offset, area, sigmas):
    """How close a keypoint is to its true place: 1 at the place itself, towards 0 far away.

    offset (..., 2): from the true place to the detected one. area (...): the person's, in pixels.
    sigmas (...): the spread of human annotators at this kind of keypoint, relative to the person's
    size; it is small for eyes and large for hips.
    """
    squared_distance = offset[..., 0] ** 2 + offset[..., 1] ** 2
    # similarity = exp(-d² / (2 s² (2σ)²))
    # d is the distance in pixels and s² the area, so s is the person's size; σ is the sigma.
    # Annotators are off by about d = σ s, which is worth exp(-1/8) = 0.88; twice as far is worth
    # exp(-1/2) = 0.61.
    s_squared = area + np.spacing(1)  # never 0
    return np.exp(-(squared_distance / (sigmas * 2) ** 2 / s_squared / 2))


def object_keypoint_similarity(people, detections, sigmas):
    """OKS (detections, people) of all pairs in an image: how similar they are, from 0 to 1.

        OKS = Σ_{k ∈ L} similarity of keypoint k / |L|      L: the person's labelled keypoints

    The OKS of a detection and a person of different categories is 0.
    """
    oks = np.zeros((len(detections.points), len(people.points)))
    for p in range(len(people.points)):
        labelled = np.flatnonzero(people.labelled[p])
        if len(labelled):
            # `take` keeps the memory's order, so that sums are rounded as in pycocotools.
            offset = detections.points.take(labelled, axis=1) - people.points[p, labelled]
            similarity = keypoint_similarity(offset, people.area[p], sigmas[labelled])
        else:  # only the person's box is known: how far outside of it are the keypoints?
            offset = offset_from_box(detections.points, people.box[p])
            similarity = keypoint_similarity(offset, people.area[p], sigmas)
        oks[:, p] = similarity.mean(1)  # over the labelled keypoints; over all if there are none
    oks[detections.category_id[:, None] != people.category_id] = 0
    return oks


# ---------------------------------------------------------------------------------- greedy matching

def match_one_image(oks, ignored, crowd, thresholds=THRESHOLDS):
    """COCO's greedy matching in one image -> (thresholds, detections) the row of the person, or -1.

    oks (detections, people): the detection with the best score comes first. A detection can match
    a person if their OKS is at least the threshold. ignored, crowd (people,) bool.
    """
    thresholds = np.atleast_1d(thresholds)
    matched = np.full((len(thresholds), len(oks)), -1)
    free = np.ones((len(thresholds), len(ignored)), bool)
    for d in np.flatnonzero((oks >= thresholds.min()).any(1)):  # the others match nobody
        possible = free & (oks[d] >= thresholds[:, None])       # (thresholds, people)
        # Somebody who counts comes before all who are ignored.
        counting = possible & ~ignored
        possible = np.where(counting.any(1, keepdims=True), counting, possible)
        # Then the most similar person comes first; of equally similar people the last one does.
        person = last_argmax(np.where(possible, oks[d], -1))    # (thresholds,)
        found = np.flatnonzero(possible.any(1))                 # at which thresholds
        matched[found, d] = person[found]
        free[found, person[found]] = crowd[person[found]]       # a crowd may be matched again
    return matched


def last_argmax(values):
    """The place of the greatest value in each row of values (rows, n); the last one of equals."""
    return values.shape[1] - 1 - values[:, ::-1].argmax(1)


# ------------------------------------------------------------------------- true and false positives

def classify_detections(scene, sigmas):
    """Finds out which detections of a scene are right, and who is to be found.

    A detection is right, a true positive (1), if it matches a person. It is wrong, a false positive
    (0), if it matches nobody. It is ignored (-1) if it matches an ignored person, or if it matches
    nobody and its own area is out of range. For each range of areas, the people whose area is out
    of range are ignored, too; all others are to be found.
    """
    people, detections = scene.people, scene.detections
    oks = object_keypoint_similarity(people, detections, sigmas)
    scene.positive = np.empty((len(AREAS), len(THRESHOLDS), len(oks)), np.int8)
    scene.to_find = np.empty((len(AREAS), len(people.area)), bool)
    for a, (low, high) in enumerate(AREAS):
        ignored = people.ignored | (people.area < low) | (people.area > high)
        scene.to_find[a] = ~ignored
        if not len(oks):  # nobody was detected
            continue
        matched = match_one_image(oks, ignored, people.crowd)   # (thresholds, detections)

        value = np.where(ignored, -1, 1)            # (people,) of a detection that matches them
        value[people.id_is_zero & ~ignored] = 0     # pycocotools takes id 0 for "matched nobody"
        positive = np.zeros(matched.shape, int)
        found = matched >= 0
        positive[found] = value[matched[found]]

        outside = (detections.area < low) | (detections.area > high)
        positive[(positive == 0) & outside] = -1
        scene.positive[a] = positive


# ----------------------------------------------------------------------------- precision and recall

def precision_recall(positive, num_people):
    """Precision (101,) at each of RECALLS, and the recall that all detections reach together.

    positive (detections,): 1, 0 or -1 as above, the best score first. num_people: all to be found.
    Go through the detections and count the true positives TP and the false positives FP so far:
        precision = TP / (TP + FP)      recall = TP / num_people
    Recall rises on the way; precision goes up and down and mostly falls. The average precision is
        AP = 1/101 Σ_r max_{r' >= r} precision at recall r'     r = 0, 0.01, ..., 1
    where a recall that is never reached has precision 0.
    """
    counted = positive[positive >= 0]                 # without the ignored ones
    places = np.flatnonzero(counted)                  # of the true positives
    true_positives = np.arange(1, len(places) + 1)    # TP at these places
    precision = true_positives / (places + 1 + np.spacing(1))     # TP + FP = place + 1
    precision = np.maximum.accumulate(precision[::-1])[::-1]      # the best from here on
    recall = true_positives / num_people
    reached = np.searchsorted(recall, RECALLS)        # the first place that reaches each recall
    return np.append(precision, 0)[reached], len(places) / num_people


def coco_numbers(scenes):
    """COCO's ten numbers of classified scenes; -1 where there is nobody to find.

    AP is the mean precision over thresholds, recalls and categories. AP .5 and AP .75 are for one
    threshold, AP (M) and AP (L) for medium and large people. AR is the mean of the reached recall.
    """
    score = np.concatenate([scene.detections.score for scene in scenes])
    detected_category = np.concatenate([scene.detections.category_id for scene in scenes])
    positive = np.concatenate([scene.positive for scene in scenes], axis=2)
    person_category = np.concatenate([scene.people.category_id for scene in scenes])
    to_find = np.concatenate([scene.to_find for scene in scenes], axis=1)

    categories = np.unique(person_category)
    precision = np.full((len(AREAS), len(THRESHOLDS), len(RECALLS), len(categories)), np.nan)
    recall = np.full((len(AREAS), len(THRESHOLDS), len(categories)), np.nan)
    for c, category in enumerate(categories):
        rows = np.flatnonzero(detected_category == category)
        rows = rows[np.argsort(-score[rows], kind="stable")]    # best first, equal ones in order
        num_people = to_find[:, person_category == category].sum(1)   # (areas,)
        for a, t in np.ndindex(len(AREAS), len(THRESHOLDS)):
            if num_people[a]:
                curve, reached = precision_recall(positive[a, t, rows], num_people[a])
                precision[a, t, :, c] = curve
                recall[a, t, c] = reached

    numbers = {}
    for name, values in (("AP", precision), ("AR", recall)):
        numbers[name] = mean_or_minus_1(values[ALL])
        numbers[f"{name} .5"] = mean_or_minus_1(values[ALL, 0])     # THRESHOLDS[0] is 0.5
        numbers[f"{name} .75"] = mean_or_minus_1(values[ALL, 5])
        numbers[f"{name} (M)"] = mean_or_minus_1(values[MEDIUM])
        numbers[f"{name} (L)"] = mean_or_minus_1(values[LARGE])
    return numbers


def evaluate_oks(annotations, results, sigmas=COCO17.sigmas):
    """COCO's ten keypoint numbers as pycocotools gives them: {"AP": ..., "AP .5": ..., ...}.

    annotations, results: paths of COCO's JSON files, or what they hold. sigmas (K,): the spread of
    the annotators at each keypoint, relative to the person's size; None takes the sigmas of the
    annotations' own skeleton. For bad input it raises a DataError, which names the record.
    """
    return coco_numbers(classified_scenes(annotations, results, sigmas))


def classified_scenes(annotations, results, sigmas):
    """The scenes of `evaluate_oks`'s arguments, in which all detections are right or wrong."""
    scenes, sigmas = read_scenes(annotations, results, sigmas)
    for scene in scenes:
        classify_detections(scene, sigmas)
    return scenes


# ---------------------------------------------------------------------------------------------- PCK

def evaluate_pck(predicted, target, visible, size, threshold=0.05, groups=None):
    """The share of correct keypoints, measured in pixels: {group: PCK, "mean": PCK}.

    A keypoint is correct if it is closer to its true place than threshold * size. A joint's PCK is
    over all people whose joint is labelled. The PCK of a group is the mean over its joints. "mean"
    is the mean over the joints of all groups, or over all joints if there are no groups. Joints
    that are labelled for nobody are left out. The mean of no joints is -1.

    predicted, target: (people, K, 2).
    visible: (people, K), labelled where above 0.
    size: a number, or (people,), in the pixels of the points.
    groups: {name: joints}.
    Raises DataError for other shapes. The papers on domain adaptation measure on heatmaps instead,
    which gives other numbers for the same predictions: `evaluate_pck_grid`.
    """
    predicted, target, visible, size = map(np.asarray, (predicted, target, visible, size))
    fit = predicted.shape == target.shape == (*visible.shape, 2)
    if not fit or size.shape not in ((), visible.shape[:1]):
        raise DataError(
            "PCK: expected predicted and target (people, K, 2), visible (people, K), size a number "
            f"or (people,), found {predicted.shape}, {target.shape}, {visible.shape}, {size.shape}")
    distance = np.linalg.norm(predicted - target, axis=2)                # (people, K)
    labelled = visible > 0
    correct = labelled & (distance < threshold * size.reshape(-1, 1))
    count = labelled.sum(0)                                              # (K,)
    pck = np.where(count > 0, correct.sum(0) / np.maximum(count, 1), np.nan)    # (K,)

    means = {}
    counted = range(len(pck))  # the joints of "mean", each of them once
    if groups:
        means = {name: mean_or_minus_1(pck[list(joints)]) for name, joints in groups.items()}
        counted = sorted(set().union(*groups.values()))
    means["mean"] = mean_or_minus_1(pck[list(counted)])
    return means


# --------------------------------------------------------------------------------------- prediction

@torch.inference_mode()
def predict(model, dataset, texts=None, people=None, flip_test=True, workers=0,
            augmentation=Augmentation(), batch_size=BATCH_SIZE):
    """One detection in COCO's results format for each person.

    model: normalised images -> heatmaps, with a `config`.
    texts: {sentence: T (L, D_text)}, or None for no text.
    people: rows of the data set; None: all annotated people, or everybody if nobody is annotated.
    flip_test: whether the mirror images count, too: see `flip_tested`.
    augmentation: of the crops, at random but always the same for the same row.
    batch_size: so many crops go through the model at once.
    Raises DataError if the model predicts other keypoints than the data set has.
    """
    if people is None:
        people = dataset.annotated if len(dataset.annotated) else range(len(dataset.ids))
    results = []
    batches = predict_heatmaps(model, dataset, people, texts, flip_test, workers, augmentation,
                               batch_size)
    for batch, heatmaps in batches:                                     # (B, K, h, w)
        # A keypoint is at the peak of its heatmap, and its score is the peak's height.
        points, scores = decode_heatmaps(heatmaps, model.config.image_size, model.config.sigma)
        points = points.cpu().double().numpy()                          # (B, K, 2) in the crop
        scores = scores.cpu().double().numpy()                          # (B, K)
        to_image = invert_matrix(batch["matrix"].numpy())       # the matrix led from image to crop
        points = transform_points(points, to_image)                     # (B, K, 2) in the image
        image_ids = dataset.image_ids[dataset.image_index[batch["row"].numpy()]]
        results += coco_results(image_ids, points, scores)
    return all_items(results)


@torch.inference_mode()
def predict_heatmaps(model, dataset, people, texts=None, flip_test=False, workers=0,
                     augmentation=Augmentation(), batch_size=BATCH_SIZE):
    """Yields batches of `Crops` and their heatmaps (B, K, h, w), for the people of this process.

    The arguments are those of `predict`.
    """
    check_prediction(model, dataset, texts)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    crops = Crops(dataset, model.config.image_size, augmentation)
    keys = [(int(row), int(row)) for row in my_share(people, batch_size)]   # of crops: (row, seed)
    loader = DataLoader(crops, batch_size, sampler=keys, **in_processes(workers))
    try:
        for batch in progress(loader, "predicting batches of poses"):
            images = normalize(batch["image"].to(device))               # (B, 3, H, W)
            text = text_inputs(batch["sentence"], texts)                # T and its mask, if any
            if flip_test and dataset.skeleton.flip_pairs:
                yield batch, flip_tested(model, images, text, dataset.skeleton)
            else:
                yield batch, model(images, *text)                       # (B, K, h, w)
    finally:
        model.train(training)


def flip_tested(model, images, text, skeleton):
    """The mean of the heatmaps of the images and of those of the mirrored images, mirrored back.

    A mirrored image should give the mirrored heatmaps, with left and right exchanged. The mean of
    both is more exact than either.
    """
    mirrored = torch.as_tensor(skeleton.mirrored, device=images.device)     # (K,) left for right
    heatmaps = model(images, *text)                                     # (B, K, h, w)
    flipped = model(images.flip(3), *text)
    return (heatmaps + flipped.flip(3)[:, mirrored]) / 2


# === Appendix: reading annotations and results; skip on a first reading ===========================

# COCO's files list the people and the detections of all images. Here the lists become one `People`
# and one `Detections` with the rows of all images, which are then cut into a `Scene` for each.

import argparse
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import get_args

from PIL import Image, ImageDraw

from clip_tokenizer import CONTEXT_LENGTH, CLIPTokenizer
from data import (BOX, FARTHEST, ID, NUMBER, SKELETONS, UNNAMED, Output, Skeleton,
                  below_common_folder, cache_folder, check_empty, check_unique, chosen_categories,
                  column, crop_width, domain_of, find_pictures, finite_numbers, format_if_turned,
                  found_in, ids_in, image_names, image_rows, load_dataset, locked_folder, one_line,
                  open_image, picture_dataset, picture_rows, picture_size, read_boxes,
                  read_columns, read_json, read_pictures, read_skeleton, report,
                  report_boxes_outside, report_sides, sentences_read, short_names,
                  split_to_test_on, to_coco, to_rgb, with_boxes, with_sentences, with_skeleton,
                  write_json)
from vlpose import (DETECTORS, PUBLIC_FILES, VLPose, encode_sentences, load_clip_text, load_model,
                    load_pose_model, load_weights, split_choice)


def read_scenes(annotations, results, sigmas=COCO17.sigmas):
    """Reads annotations and results -> (a Scene for each image, sorted by image ids; sigmas (K,)).

    The arguments are those of `evaluate_oks`. As in pycocotools, people and detections whose
    category is not listed do not exist, nor do people whose image is not listed.
    """
    people_file, annotations = path_and_content(annotations, "annotations", dict)
    results_file, results = path_and_content(results, "results", list)
    sigmas = checked_sigmas(sigmas, people_file, annotations)
    image_records, category_records, person_records = sections_of(annotations, people_file)
    images = images_by_id(image_records, people_file)
    people = people_of(person_records, images, len(sigmas), people_file)
    category_ids = category_ids_of(category_records, people_file)
    detections = detections_of(results, images, len(sigmas), results_file)

    in_an_image = people.image_id >= 0
    people = rows_of(people, in_an_image & np.isin(people.category_id, category_ids))
    if people.id_is_zero.any():
        report(f"{people_file}: as in pycocotools, nobody finds annotation id 0, which lowers AP; "
               "count annotations from 1")
    listed = np.isin(detections.category_id, category_ids)
    if not listed.any():
        print(f"no result has a category_id of the annotations: {category_ids.tolist()}, "
              f"found {np.unique(detections.category_id).tolist()}", file=sys.stderr)
    detections = rows_of(detections, listed)

    people = cut_by_image(people, len(images))
    detections = cut_by_image(detections, len(images))
    scenes = []
    for image, people_here, detections_here in zip(images.values(), people, detections):
        domain = domain_of({"file_name": "", **image}, folders_are_domains=True)
        scenes.append(Scene(domain, people_here, best_detections(detections_here)))
    return scenes, sigmas


def path_and_content(source, name, json_type):
    """The path of one of COCO's JSON files and what it holds, of the expected type: list or dict.

    source: the path, or the content itself. Then `name` takes the path's place in messages.
    """
    if isinstance(source, (str, os.PathLike)):
        return str(source), read_json(source, json_type, f"COCO's {name}")
    if not isinstance(source, json_type):
        raise DataError(f"{name}: expected a path or what COCO's files hold, a "
                        f"{json_type.__name__}, found {source!r:.40}")
    return name, source


# In the functions below, `file` is what messages call the content.

def checked_sigmas(sigmas, file, annotations):
    """Sigmas (K,) as an array; None stands for those of the annotations' skeleton."""
    if sigmas is None:
        categories = chosen_categories(file, annotations)
        records = annotations.get("annotations") or ()
        sigmas = read_skeleton(file, categories, records).sigmas
    sigmas = np.asarray(sigmas, float)
    if sigmas.ndim != 1 or not (sigmas > 0).all():
        raise DataError("sigmas: expected a positive number for each keypoint, "
                        f"found {sigmas.tolist()}")
    return sigmas


def sections_of(content, file):
    """The lists of images, categories and people in COCO's annotations."""
    sections = []
    for key in ("images", "categories", "annotations"):
        section = content.get(key, [])
        if not isinstance(section, list):
            raise DataError(f"{file}: expected a list of {key}, found {section!r:.40}")
        sections.append(section)
    return sections


def people_of(records, images, num_keypoints, file):
    """COCO's annotations -> the People of all images, in the order of the file."""
    kinds = {
        "id": ID, "category_id": ID, "num_keypoints": ID, "iscrowd": ID,
        "keypoints": finite_numbers(3 * num_keypoints), "area": NUMBER, "bbox": BOX}
    table = read_columns(records, kinds, f"{file}: annotation")
    check_unique(table["id"], f"{file}: annotation")
    keypoints = table["keypoints"].reshape(-1, num_keypoints, 3)
    crowd = table["iscrowd"] != 0
    ids = image_ids_in(records, "image_id", f"{file}: annotation")
    return People(
        image_id=look_up(ids, numbers_of_ids(images)),
        category_id=table["category_id"],
        points=keypoints[:, :, :2],
        labelled=keypoints[:, :, 2] > 0,
        area=table["area"],
        box=table["bbox"],
        crowd=crowd,
        ignored=crowd | (table["num_keypoints"] == 0),
        id_is_zero=table["id"] == 0)


def category_ids_of(records, file):
    """The ids of COCO's categories, sorted."""
    if not records:
        raise DataError(f"{file}: not COCO keypoint annotations: no 'categories'")
    return np.unique(column(records, "id", ID, f"{file}: category"))


def images_by_id(records, file):
    """{image id: record}, sorted by id. Of images with the same id the first one counts."""
    images = {}
    for image_id, record in zip(image_ids_in(records, "id", f"{file}: image"), records):
        images.setdefault(image_id, record)
    return {image_id: images[image_id] for image_id in sorted(images, key=id_order)}


def id_order(image_id):
    """What ids are sorted by: numbers come before texts."""
    return isinstance(image_id, str), image_id


def image_ids_in(records, field, name):
    """The ids of images in records. As in pycocotools they may be any integers, and texts."""
    ids = [record.get(field) if isinstance(record, dict) else None for record in records]
    if set(map(type, ids)) <= {int, str}:
        return ids
    for place, image_id in enumerate(ids):  # one by one, to find the wrong one
        is_whole = isinstance(image_id, float) and image_id.is_integer()
        if not is_whole and not isinstance(image_id, (int, str)):
            record = records[place]
            raise DataError(f"{name} {place}{ids_in(record)}: expected one integer or text in "
                            f"'{field}', found {found_in(record, field)}")
    return ids


def look_up(ids, numbers):
    """The place of each id's image, (ids,), in `numbers`, {id: place}; -1 if it is not there."""
    return np.array([numbers.get(image_id, -1) for image_id in ids], int)


def numbers_of_ids(images):
    """{id: place in images}."""
    return {image_id: number for number, image_id in enumerate(images)}


def numbers_of_names(images):
    """{name: place in images} for what else may stand for an image; -1 if several have the name."""
    numbers = {}
    for number, (image_id, record) in enumerate(images.items()):
        path = str(record.get("file_name", ""))
        for name in {str(image_id), path, *short_names(path)}:
            numbers[name] = -1 if name in numbers else number
    return numbers


def detections_of(records, images, num_keypoints, file):
    """COCO's results -> the Detections of all images, in the order of the file."""
    if not records:
        raise DataError(f"{file}: expected a list of results, found an empty one")
    kinds = {"category_id": ID, "score": NUMBER,
             "keypoints": finite_numbers(3 * num_keypoints)}
    # As in pycocotools, the first record decides where all areas come from.
    if isinstance(records[0], dict):
        if records[0].get("bbox"):
            kinds["bbox"] = BOX
        elif "segmentation" in records[0]:  # then pycocotools takes them from the masks
            raise DataError(f"{file}: result 0: expected keypoints, with a 'bbox' or without, "
                            "found a 'segmentation'")
    table = read_columns(records, kinds, f"{file}: result")
    ids = image_ids_in(records, "image_id", f"{file}: result")
    image_numbers = look_up(ids, numbers_of_ids(images))
    if (image_numbers < 0).all():  # then the ids may be names of files, or the numbers in these
        image_numbers = look_up(ids, numbers_of_names(images))
    unknown = image_numbers < 0
    if unknown.any():
        row = unknown.argmax()
        raise DataError(f"{file}: result {row}: image_id {records[row]['image_id']!r} is no image "
                        "of the annotations")
    points = table["keypoints"].reshape(-1, num_keypoints, 3)[:, :, :2]
    if "bbox" in table:
        size = table["bbox"][:, 2:]  # (detections, 2) width, height
    else:
        size = np.ptp(points, axis=1)
    return Detections(
        image_id=image_numbers,
        category_id=table["category_id"],
        score=table["score"],
        points=points,
        area=size[:, 0] * size[:, 1])


def rows_of(table, rows):
    """The People or Detections in some rows: indices, a slice or (all,) bool."""
    return replace(table, **{name: values[rows] for name, values in vars(table).items()})


def cut_by_image(table, count):
    """People or Detections of `count` images -> a list with those of each. The order stays."""
    table = rows_of(table, np.argsort(table.image_id, kind="stable"))
    starts = np.searchsorted(table.image_id, np.arange(count), "left")
    stops = np.searchsorted(table.image_id, np.arange(count), "right")
    return [rows_of(table, slice(start, stop)) for start, stop in zip(starts, stops)]


def best_detections(detections):
    """The Detections of one image, the best first, at most MAX_DETECTIONS of each category.

    Equal scores stay in the order of the file.
    """
    best = []
    seen = Counter()  # category -> its detections so far
    for row in np.argsort(-detections.score, kind="stable"):
        category = detections.category_id[row]
        seen[category] += 1
        if seen[category] <= MAX_DETECTIONS:
            best.append(row)
    return rows_of(detections, best)


# === Appendix: two special cases of COCO's numbers; skip on a first reading =======================

def offset_from_box(points, box):
    """How far points (..., 2) are outside of a box (4,), in x and in y.

    COCO's rule for a person without labelled keypoints is that every point is perfect within the
    box, grown by its size on all sides.
    """
    corner = box[:2]
    size = box[2:]
    before = np.maximum(0, corner - size - points)
    behind = np.maximum(0, points - (corner + size * 2))
    return before + behind


def mean_or_minus_1(values):
    """The mean of the values that are not NaN, -1 if there are none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else -1.0


# === Appendix: domains and PCK; skip on a first reading ===========================================

def evaluate_domains(annotations, results, sigmas=COCO17.sigmas):
    """The numbers of `evaluate_oks`, and the same ten for each domain: numbers, {domain: numbers}.

    A domain is an image's `category`, or else the last folder of its `file_name`, or "photo".
    """
    scenes = classified_scenes(annotations, results, sigmas)
    domains = {domain: coco_numbers(members)
               for domain, members in scenes_of_domains(scenes).items()}
    return coco_numbers(scenes), domains


def scenes_of_domains(scenes):
    """{domain: its scenes}, sorted by domains."""
    members = {domain: [] for domain in sorted({scene.domain for scene in scenes})}
    for scene in scenes:
        members[scene.domain].append(scene)
    return members


def pck_of_results(dataset, results, size, chosen=slice(None), threshold=0.05, groups=None):
    """`evaluate_pck` of what `predict` gave for the annotated people of a data set.

    chosen: an index into them; the others do not count. threshold: a share of the crop's height,
    for crops of `size` (height, width).
    """
    people = dataset.annotated[chosen]
    predicted = poses_of(results)[chosen]                                # (people, K, 3)
    truth = dataset.keypoints[people]
    crop_heights = crop_width(dataset.boxes[people], size) * size[0] / size[1]
    return evaluate_pck(predicted[:, :, :2], truth[:, :, :2], truth[:, :, 2], crop_heights,
                        threshold, groups)


def evaluate_pck_grid(predicted, target, visible, size, threshold=0.05, groups=None):
    """PCK on the heatmap grid, as the papers on domain adaptation measure it (RegDA's code).

    predicted, target (people, K, 2): the highest cells of the heatmaps, see `highest_cells`.
    size: the heatmaps' (height, width). The threshold is a share of the height. A keypoint whose
    true cell is in the first two rows or columns does not count. All else is as in `evaluate_pck`.
    """
    height, width = size
    counts = (np.asarray(visible) > 0) & (target > 1).all(2)
    # RegDA's heatmaps are squares. On others an offset along x counts as a share of the width, and
    # one along y as a share of the height: so x is stretched, as if the width were the height.
    stretch = [height / width, 1]
    return evaluate_pck(predicted * stretch, target * stretch, counts, height, threshold, groups)


def highest_cells(heatmaps):
    """The highest cells (people, K, 2), x before y, of heatmaps (people, K, h, w).

    As in RegDA's code, the cell is (0, 0) where no cell is above 0.
    """
    people, joints, _, width = heatmaps.shape
    flat = np.asarray(heatmaps).reshape(people, joints, -1)
    y, x = np.divmod(flat.argmax(2), width)
    return np.stack([x, y], axis=2) * (flat.max(2) > 0)[:, :, None]


# === Appendix: prediction, also in detected boxes; skip on a first reading ========================

def check_prediction(model, dataset, texts):
    """Raises DataError if the model cannot predict the poses of this data set."""
    count = len(dataset.skeleton.names)
    if getattr(model, "num_keypoints", count) != count:
        raise DataError(f"{dataset.name}: {count} keypoints, but the model predicts "
                        f"{model.num_keypoints}")
    if texts is not None and dataset.sentences is None:
        raise DataError(f"{dataset.name}: expected a sentence for each image (`with_sentences` "
                        "gives them), found none")


def coco_results(image_ids, points, scores):
    """COCO's results of poses: points (people, K, 2) in their images, scores (people, K).

    As in mmpose's CocoMetric, the score of a pose is the mean of its keypoints' scores above 0.2,
    or 0 if there are none.
    """
    results = []
    for image_id, pose, score in zip(image_ids, points, scores):
        sure = score > 0.2
        results.append({"image_id": int(image_id), "category_id": 1,
                        "keypoints": np.column_stack([pose, score]).ravel().tolist(),
                        "score": float((score * sure).sum() / max(sure.sum(), 1))})
    return results


def poses_of(results):
    """The keypoints (people, K, 3) of results in COCO's format: x, y, score."""
    return np.reshape([result["keypoints"] for result in results], (len(results), -1, 3))


def predict_people(model, dataset, texts, people, box_scores=None, workers=0):
    """`predict`, with the box and the file of each person, as `to_coco` names the file.

    box_scores (people,): of a detector's boxes, in which mmpose's rules hold: a pose's score is
    multiplied by its box's, and repeated poses are removed.
    """
    results = predict(model, dataset, texts, people, workers=workers)
    _, places = below_common_folder(dataset.files)
    for result, row in zip(results, people):
        result["box"] = dataset.boxes[row].tolist()  # COCO's tools take areas from a "bbox"
        result["file_name"] = places[dataset.image_index[row]]
    if box_scores is None:
        return results
    for result, score in zip(results, box_scores):
        result["score"] *= float(score)
    poses = poses_of(results)                                           # (people, K, 3)
    scores = np.array([result["score"] for result in results])
    size = model.config.image_size
    areas = crop_width(dataset.boxes[people], size) ** 2 * size[0] / size[1]
    kept = oks_nms(poses[:, :, :2], scores, areas, dataset.image_index[people],
                   sigmas=dataset.skeleton.sigmas)
    return [results[row] for row in kept]


def oks_nms(keypoints, scores, areas, images, threshold=0.9, sigmas=COCO17.sigmas):
    """The rows of the poses that stay where one person has several, as in mmpose's oks_nms.

    In each image, from the best score down, a pose removes those after it whose OKS with it is
    above the threshold. This OKS is of all keypoints, with the mean of both areas.
    keypoints (poses, K, 2); scores, areas, images (poses,): equal numbers stand for one image.
    """
    kept = []
    order = np.lexsort((-scores, images))  # image by image, the best score first
    next_image = np.flatnonzero(np.diff(images[order])) + 1
    for remaining in np.split(order, next_image):  # the poses of one image
        while len(remaining):
            best = remaining[0]
            kept.append(best)
            others = remaining[1:]
            area = (areas[others] + areas[best]) / 2
            offset = keypoints[others] - keypoints[best]                   # (poses, K, 2)
            oks = keypoint_similarity(offset, area[:, None], sigmas).mean(1)
            remaining = others[oks <= threshold]
    return np.sort(kept).astype(int)


# === Appendix: the poses in one picture; skip on a first reading ==================================

@dataclass
class Poses:
    """The poses of the people in one picture, in its pixels."""
    keypoints: np.ndarray  # (people, K, 3) x, y, score
    boxes: np.ndarray  # (people, 4) left, top, width, height: where they were looked for
    skeleton: Skeleton  # names the keypoints; for `draw_pose`


def estimate_poses(model, image, boxes=None, sentence=None, adapter=True, batch_size=BATCH_SIZE):
    """The poses of the people in one picture -> Poses; or of a list of pictures -> a list of Poses.

    model: from `load_model`.
    image: a path, a Pillow image, or RGB bytes (H, W, 3); or a list of these. A file is turned as
        its EXIF orientation says. Of a Pillow image the orientation is ignored: its poses are in
        its pixels as they are.
    boxes: the people's, (people, 4) left, top, width, height in pixels. For a list of pictures it
        is a list of these. Without boxes (None) a whole picture is taken as one person.
    sentence: what VLPose reads, such as "a photo of a cartoon character". Without a sentence an
        adapter that reads text is off.
    adapter: False switches any adapter off.
    batch_size: so many people go through the model at once.
    Raises DataError for a box without a size, for a picture of another kind, and for a sentence
    that the model cannot read.
    """
    if not isinstance(image, (list, tuple)):
        boxes = None if boxes is None else [boxes]
        return estimate_poses(model, [image], boxes, sentence, adapter, batch_size)[0]
    images = [as_picture(each) for each in image]
    boxes = boxes_of_pictures(images, boxes)
    if isinstance(model, VLPose) and not adapter:
        model = model.base
    counts = [len(each) for each in boxes]
    rows = np.repeat(np.arange(len(images)), counts)  # (people,) the picture of each person
    pictures = picture_dataset(images, model.skeleton)
    pictures = with_boxes(pictures, rows, np.concatenate([np.zeros((0, 4)), *boxes]))
    texts = None
    if sentence is not None:
        texts = {sentence: encoded_for(model, sentence)}
        pictures = replace(pictures, sentences=np.full(len(images), sentence))
    results = predict(model, pictures, texts, np.arange(len(rows)), batch_size=batch_size)
    keypoints = np.reshape([result["keypoints"] for result in results],
                           (len(rows), model.num_keypoints, 3))
    keypoints = np.split(keypoints, np.cumsum(counts)[:-1])  # those of each picture
    return [Poses(points, own, model.skeleton) for points, own in zip(keypoints, boxes)]


def as_picture(image):
    """A path, or a Pillow image in RGB without EXIF, of what `estimate_poses` takes."""
    if isinstance(image, (str, os.PathLike)):
        return image
    if isinstance(image, Image.Image):
        return Image.fromarray(np.asarray(to_rgb(image)))
    pixels = np.asarray(image)
    has_colours = pixels.ndim == 3 and pixels.shape[2] in (3, 4)
    if pixels.dtype != np.uint8 or not (has_colours or pixels.ndim == 2):
        raise DataError("image: expected a path, a Pillow image, RGB bytes (H, W, 3) or grey "
                        f"ones, or a list of these, found {pixels.dtype} {pixels.shape}")
    return Image.fromarray(pixels)


def boxes_of_pictures(images, boxes):
    """The boxes of each picture, (people, 4); for None, one around the whole picture.

    images: paths, and Pillow images without EXIF.
    boxes: a list for the pictures, or None for all of them.
    """
    if boxes is None:
        boxes = [None] * len(images)
    if len(boxes) != len(images):
        raise DataError(f"boxes: expected those of {len(images)} pictures, found {len(boxes)}")
    found = []
    for image, each in zip(images, boxes):
        if each is None:
            size = image.size if isinstance(image, Image.Image) else picture_size(image)
            each = [(0, 0, *size)]
        found.append(np.array(each, float).reshape(-1, 4))
    for each in found:
        if not ((each[:, 2:] > 0).all() and (np.abs(each) <= FARTHEST).all()):
            raise DataError("boxes: expected a width and a height above 0, at most a million, "
                            f"found {each.tolist()}")
    return found


def encoded_for(model, sentence):
    """T (L, D_text) of a sentence, as the model reads it."""
    if not getattr(model, "reads_text", False):
        raise DataError("sentence: expected a VLPose, which reads text, with its adapter on, found "
                        f"a {type(model).__name__}")
    about = getattr(model, "about", {})  # what its file says of its use; see `load_model`
    weights = about.get("text_weights", "random")
    T = encode_sentence(sentence, weights, about.get("per_token", False))
    check_text_dim(model, T.shape[1], weights)
    return T.to(next(model.parameters()).device)


def check_text_dim(model, found, weights):
    """Raises DataError if a text tower's features have another width than a VLPose reads."""
    expected = model.options["text_dim"]
    if found != expected:
        raise DataError(f"{weights}: expected text features of width {expected}, which the adapter "
                        f"was trained with, found {found}")


@lru_cache(maxsize=64)
def encode_sentence(sentence, text_weights, per_token):
    """T (L, D_text) of a sentence, by the text tower with these weights."""
    report_cut([sentence], ["estimate_poses"])
    return encode_sentences(load_clip_text(text_weights), [sentence], per_token)[sentence]


# === Appendix: drawing; skip on a first reading ===================================================

ORANGE = (255, 140, 0)
BLUE = (0, 150, 255)
GREEN = (120, 220, 90)

# A line's width is the longer side of the skeleton / 50, but at least that of the picture / 800 and
# two pixels: so small people, and a few keypoints of a person, can be seen, too.
LINES_PER_SKELETON = 50
LINES_PER_PICTURE = 800
RIM = 1.5  # the width of a line with its dark rim, in widths of the line
RADIUS = 1.25  # the radius of a keypoint's disk, in widths of a line

# A layer is drawn larger than it is and then reduced, for smooth lines: 4 times if both its sides
# are below SMALL_LAYER pixels, and 2 times if they are below LARGE_LAYER. A larger one is drawn as
# it is, since its lines are thick and its memory would be huge.
SMALL_LAYER = 1000
LARGE_LAYER = 3000
LARGEST_PANEL = 4096  # pixels of the longer side: a larger drawing needs gigabytes
SMALLEST_PANEL = 512  # pixels of the longer side: a smaller picture is drawn larger


def limb_color(skeleton, *keypoints):
    """Orange for the left side, blue for the right, green for the middle and what joins both."""
    words = set()
    for keypoint in keypoints:
        words.update(skeleton.plain_names[keypoint].split("_"))
    if "left" in words and "right" not in words:
        return ORANGE
    if "right" in words and "left" not in words:
        return BLUE
    return GREEN


def draw_pose(image, keypoints, skeleton=COCO17, threshold=0.0):
    """A copy of an image, Pillow's or an array, with a skeleton drawn over it.

    The left side is orange, the right side blue, with a dark rim. Surer keypoints are more opaque.
    keypoints: (K, 3) x, y, score; those with a score of at most `threshold` are left out.
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image))
    image = to_rgb(image).copy()
    drawn = keypoints[:, 2] > threshold                                 # (K,)
    if not drawn.any():
        return image

    # The transparent layer is just large enough for the skeleton. It is drawn `fine` times larger.
    low = keypoints[drawn, :2].min(0)
    high = keypoints[drawn, :2].max(0)
    width = max(2.0, (high - low).max() / LINES_PER_SKELETON, max(image.size) / LINES_PER_PICTURE)
    corner = np.floor(low - 2 * width)  # with a margin for lines and disks
    size = np.ceil(high + 2 * width - corner).astype(int) + 1
    if size.max() < SMALL_LAYER:
        fine = 4
    elif size.max() < LARGE_LAYER:
        fine = 2
    else:
        fine = 1
    layer = Image.new("RGBA", tuple(fine * size))
    draw = ImageDraw.Draw(layer)

    xy = [tuple(point) for point in (keypoints[:, :2] - corner + 0.5) * fine]
    alpha = (255 * np.clip(keypoints[:, 2], 0.5, 1)).astype(int)        # (K,) the opacity
    for a, b in skeleton.edges:
        if drawn[a] and drawn[b]:
            opacity = min(alpha[a], alpha[b])
            color = limb_color(skeleton, a, b)
            draw.line([xy[a], xy[b]], (0, 0, 0, opacity), round(RIM * width * fine))
            draw.line([xy[a], xy[b]], (*color, opacity), round(width * fine))
    for j in np.flatnonzero(drawn):
        color = limb_color(skeleton, j)
        draw.circle(xy[j], RADIUS * width * fine, (*color, alpha[j]), (0, 0, 0, alpha[j]), fine)
    layer = layer.reduce(fine)
    image.paste(layer, tuple(corner.astype(int)), layer)
    return image


def draw_panels(dataset, row, panels, threshold):
    """An image of a data set, given its row, side by side for each of the panels {label: results}.

    The poses of a panel's results are drawn over it, without keypoints of at most `threshold`.
    """
    image, _ = open_image(dataset.files[row], upright=dataset.upright)
    longer = max(image.size)
    scale = min(max(1, SMALLEST_PANEL / longer), LARGEST_PANEL / longer)
    if scale != 1:
        size = [math.ceil(scale * side) for side in image.size]
        image = image.resize(size, reducing_gap=3)  # otherwise a long one takes gigabytes
    sheet = Image.new("RGB", (len(panels) * image.width, image.height))
    font_size = max(10, image.width / 30)
    for place, (label, results) in enumerate(panels.items()):
        panel = image
        for result in results:
            if result["image_id"] == dataset.image_ids[row]:
                pose = np.reshape(result["keypoints"], (-1, 3))
                # Scaling keeps corners in their place; the centre of the corner pixel is at 0.
                pose[:, :2] = (pose[:, :2] + 0.5) * scale - 0.5
                panel = draw_pose(panel, pose, dataset.skeleton, threshold)
        left = place * image.width
        sheet.paste(panel, (left, 0))
        ImageDraw.Draw(sheet).text((left + 4, 2), label, "white", stroke_width=1,
                                   stroke_fill="black", font_size=font_size)
    return sheet


# === Appendix: the command line of both programs; skip on a first reading =========================
#
# A field of a dataclass is an option: `base_lr` is `--base-lr`. An object of the dataclass has the
# values of all options, at first their defaults. Both programs read a command line in three lines:
#
#     given = vars(Parser(defaults).parse_args(argv))  # {field: value} of the options in it
#     options = replace(defaults, **given)
#     check_options(options, defaults)

SAME = object()  # the paper's value is the default


def option(default, *, help, paper=SAME, only=(), least=-math.inf, above=-math.inf, most=math.inf,
           step=None, **argument):
    """A field of a dataclass of options.

    paper: the default with `--recipe paper`, where that differs.
    only: when the option counts: a list of conditions that must all hold, such as "with --data",
        "without --weights" or, for one of two values, "with --strategy lora vlpose".
    least, above, most, step: the limits of a number; it is a multiple of `step`.
    argument: further arguments of argparse's `add_argument`, such as `choices` and `nargs`. Without
        a `type` among them, the type of the field turns a word into a value.
    """
    if paper is SAME:
        paper = default
    limits = Limits(least, above, most, step)
    return field(default=default, metadata={"help": help, "paper": paper, "only": only,
                                            "limits": limits, "argument": argument})


@dataclass
class Limits:
    """The limits of an option's value, if it is a number."""
    least: float
    above: float
    most: float
    step: int | None  # None: any number

    def allow(self, value, value_type):
        """Whether a value is of this type and, if it is a number, finite and within the limits."""
        if value_type is float and type(value) is int:
            value_type = int  # a whole number will do
        if type(value) is not value_type:
            return False
        if value_type in (str, bool):
            return True
        within = self.least <= value <= self.most and self.above < value < math.inf
        return within and not (self.step and value % self.step)

    def in_words(self, value_type):
        """What `allow` asks for, such as "an integer of at least 1"."""
        words = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
        words = words[value_type]
        if self.step:
            words = f"a multiple of {self.step}"
        if self.most < math.inf:
            return f"{words} from {self.least} to {self.most}"
        if self.above > -math.inf:
            return f"{words} above {self.above}"
        if self.least > -math.inf:
            return f"{words} of at least {self.least}"
        return words


class Parser(argparse.ArgumentParser):
    """argparse's parser of the options that `defaults` has. It returns only what is given.

    The help groups the options by when they count. An error is one line, like any other error.
    """

    def __init__(self, defaults, **more):
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **more)
        groups = {}
        for entry in fields(defaults):
            conditions = "; ".join(entry.metadata["only"])
            if conditions not in groups:
                title = f"only {conditions}" if conditions else "always"
                groups[conditions] = self.add_argument_group(title)
            argument = argument_of(entry, getattr(defaults, entry.name))
            groups[conditions].add_argument(flag_of(entry.name), **argument)

    def error(self, message):
        raise DataError(f"{message}; --help lists the options")


def flag_of(name):
    return "--" + name.replace("_", "-")


def argument_of(entry, default):
    """What argparse's `add_argument` is told of an option, but for its name."""
    argument = {"type": type_of(entry), **entry.metadata["argument"]}
    if entry.type is bool:
        argument = {"action": argparse.BooleanOptionalAction}
    text = entry.metadata["help"]
    if default is not None and default is not False:
        values = default if isinstance(default, (tuple, list)) else [default]
        words = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
        text += f" (default: {' '.join(words) or 'none'})"
    argument["help"] = text.replace("%", "%%")  # a single % has a meaning in argparse
    return argument


def type_of(entry):
    """int, float, str or bool: the type of an option's value, or of each value in its list."""
    if get_args(entry.type):
        return get_args(entry.type)[0]
    return entry.type


def check_options(options, defaults):
    """Raises DataError for a wrong value, and for an option that has no effect beside the others.

    The values are typed ones, or those of a run that goes on. A default is never refused.
    """
    for entry in fields(options):
        value = getattr(options, entry.name)
        default = getattr(defaults, entry.name)
        if value == default or (isinstance(default, tuple) and value == list(default)):
            continue  # JSON and argparse have lists for tuples
        check_value(entry, value)
        for condition in entry.metadata["only"]:
            if not holds(condition, options):
                raise DataError(f"{flag_of(entry.name)}: has no effect; it counts only {condition}")


def check_value(entry, value):
    """Raises DataError for a value that an option cannot have."""
    if value is None and None in (entry.default, entry.metadata["paper"]):
        return  # --steps is None where --epochs counts, and the other way round
    flag = flag_of(entry.name)
    values = value if get_args(entry.type) else [value]
    if not isinstance(values, list):
        raise DataError(f"{flag}: expected a list, found {values}")
    for each in values:
        limits = entry.metadata["limits"]
        if not limits.allow(each, type_of(entry)):
            expected = limits.in_words(type_of(entry))
            raise DataError(f"{flag}: expected {expected}, found {each}")
    choices = entry.metadata["argument"].get("choices")
    if choices and value not in choices:
        raise DataError(f"{flag}: expected one of {', '.join(choices)}, found {value}")


def holds(condition, options):
    """Whether a condition holds, such as "with --data" or "with --strategy lora vlpose"."""
    word, flag, *values = condition.split()
    value = getattr(options, flag.removeprefix("--").replace("-", "_"))
    found = value in values if values else bool(value)
    return found == (word == "with")


def data_spec(text):
    """The type of an option that names a data set, name:root. From then on the root is absolute."""
    name, _, root = text.partition(":")
    return f"{name}:{os.path.abspath(root)}" if root else text


def path_or_name(text):
    """The type of an option for a file or folder, from then on absolute, or for another name.

    A choice after # stays: see `vlpose.split_choice`.
    """
    source, choice = split_choice(text)
    if source in PUBLIC_FILES or source == "random" or not os.path.exists(source):
        return text
    return os.path.abspath(source) + text.removeprefix(source)


def sentences_or_file(text):
    """The type of an option for sentences, or for a JSON file of them: see `with_sentences`."""
    return path_or_name(text) if text.endswith(".json") else text


def default_device():
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def check_device(device):
    """Raises DataError for a device that does not work here."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"--device: {device!r} does not work here: {reason}") from None


def format_table(title, table):
    """{row: {column: number}} as text, after an empty line; `title` stands over the rows' names.

    An integer counts something; other numbers have three digits after the point.
    """
    title = one_line(title)
    names = [one_line(name) for name in table]
    name_width = max(map(len, [title, *names]))
    first_row = list(table.values())[0]
    widths = {column: max(10, len(column)) for column in first_row}
    heading = "".join(f" {column:>{width}}" for column, width in widths.items())
    lines = ["", f"{title:<{name_width}}{heading}"]
    for name, row in zip(names, table.values()):
        line = f"{name:<{name_width}}"
        for key, width in widths.items():
            digits = ",d" if isinstance(row[key], int) else ".3f"
            line += f" {row[key]:{width}{digits}}"
        lines.append(line)
    return "\n".join(lines)


SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM")
           if hasattr(signal, name)]


@contextmanager
def as_program(output_is_needed):
    """In the block the standard streams and the signals are as a program wants them.

    Letters that the console or a log in an old encoding lacks become \\uXXXX; otherwise a domain or
    a path with such letters would end the program. What cannot be printed does not end the program
    either, unless the output is needed. Signals to end it are a KeyboardInterrupt, with their
    number, so that nothing half-written is left; what nohup ignores stays ignored.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: the next open file would get its number, 0, 1 or 2
            setattr(sys, name, open(os.devnull, encoding="utf-8"))
    hook = sys.unraisablehook
    sys.unraisablehook = say_nothing
    streams = sys.stdout, sys.stderr
    for stream in streams:
        if hasattr(stream, "reconfigure"):  # not in some notebooks
            stream.reconfigure(errors="backslashreplace")
    handlers = {}
    if threading.current_thread() is threading.main_thread():  # others may not set handlers
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in handlers.items():
        is_default = handler in (signal.SIG_DFL, signal.default_int_handler)
        if is_default and "LOCAL_RANK" not in os.environ:  # torchrun ends its own
            signal.signal(number, interrupt)
    sys.stdout = Output(sys.stdout, "standard output", output_is_needed)
    sys.stderr = Output(sys.stderr, "standard error")
    try:
        yield
    finally:
        sys.unraisablehook = hook
        sys.stdout, sys.stderr = streams
        for number, handler in handlers.items():
            signal.signal(number, handler)


def interrupt(number, frame):
    signal.signal(number, signal.SIG_IGN)  # once more, it would interrupt the end
    raise KeyboardInterrupt(number)


def say_nothing(unraisable):
    """Takes the place of a traceback that ends nothing, such as that of a half-built object."""


HAS_ENDED = ("another process of torchrun has ended, perhaps for want of memory; --resume goes on "
             "from the last checkpoint")

# Words of an error -> what helps. Torch raises a RuntimeError for these as it does for bugs; only
# the words tell them apart.
REMEDIES = {
    "out of memory": "in train.py a smaller --batch-size, --accumulate and --checkpointing save "
                     "memory",
    "can't allocate memory": "a smaller --batch-size saves memory, too",
    "DataLoader worker (pid": "a process that cuts crops has died, perhaps for want of memory: "
                              "fewer --workers",
    "DataLoader timed out": "a process that cuts crops does not answer: was it stopped, or is a "
                            "disk or a network drive away? --workers 0 waits as long as it takes",
    "shared memory": "--workers 0 needs none; docker run --shm-size 2g gives more",
    "Too many open files": "`ulimit -n 4096` allows more, and fewer --workers need fewer",
    "gloo/transport": HAS_ENDED,   # the exchange on CPUs
    "ncclRemoteError": HAS_ENDED,  # and on GPUs
    "</torch_": "perhaps /dev/shm is full: --workers 0 does not use it"}
EXPECTED_ERRORS = (ValueError, OSError, NotImplementedError, MemoryError)  # also a DataError


def fail(error):
    """Says in one line what is wrong, and returns the exit status. An unexpected error goes on."""
    reading = read_by_workers() if "DataLoader timed out" in str(error) else []
    kill_workers()
    if isinstance(error, KeyboardInterrupt):
        return stopped(*error.args)
    remedies = [remedy for words, remedy in REMEDIES.items() if words in str(error)]
    if not remedies and not isinstance(error, EXPECTED_ERRORS):
        raise error
    print("; ".join([f"error: {line_of(error)}", *reading, *remedies]), file=sys.stderr)
    return 2


def read_by_workers():
    """"process 123 was reading a.jpg" of each process that cuts crops, as far as Linux tells."""
    found = []
    for child in multiprocessing.active_children():
        for file in sorted(open_files(child.pid) - open_files("self")):
            found.append(f"process {child.pid} was reading {one_line(file)}")
    return found


def open_files(process):
    """The paths of the files that a process has open. No file is touched: its disk may hang."""
    files = set()
    for link in Path(f"/proc/{process}/fd").glob("*"):
        with suppress(OSError):  # it has just been closed
            files.add(os.readlink(link))
    return {file for file in files if file.startswith("/") and not file.startswith("/dev/")}


def kill_workers():
    """Kills the processes that cut crops: the program would wait for one that was stopped."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() != threading.main_thread():
        return  # on Windows; or not a program
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would say that they were killed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
            child.join()
    signal.signal(signal.SIGCHLD, before)


def line_of(error):
    """The first line of an error, of readable length."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return one_line(lines[0])


def stopped(number=signal.SIGINT, run=None):
    """Says which signal has stopped the program and, if it was training, how the run goes on."""
    message = f"stopped by {signal.Signals(number).name}"
    if run:
        message += f"; go on with: python {sys.argv[0]} --resume {run}"
    print(message, file=sys.stderr)
    return 128 + number


# === Appendix: the command; skip on a first reading ===============================================

# The names of COCO's categories; CATEGORIES[1] is "person": the place in the list is COCO's id.
CATEGORIES = (
    "__background__, person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, "
    "traffic light, fire hydrant, N/A, stop sign, parking meter, bench, bird, cat, dog, horse, "
    "sheep, cow, elephant, bear, zebra, giraffe, N/A, backpack, umbrella, N/A, N/A, handbag, "
    "tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, "
    "skateboard, surfboard, tennis racket, bottle, N/A, wine glass, cup, fork, knife, spoon, "
    "bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, "
    "chair, couch, potted plant, bed, N/A, dining table, N/A, N/A, toilet, N/A, tv, laptop, "
    "mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, N/A, "
    "book, clock, vase, scissors, teddy bear, hair drier, toothbrush").split(", ")
POSES = ["without --results"]  # the options for the poses of a model


@dataclass
class EvalOptions:
    """The options for the numbers of a results file, and for the poses of a model."""
    results: str = option(
        None, type=path_or_name,
        help="Evaluate these keypoint results: a JSON file in COCO's format.")
    annotations: str = option(
        None, type=path_or_name, only=["with --results"],
        help="The people that the results are compared with: a JSON file in COCO's format.")
    sigmas: list[float] = option(
        None, nargs="+", above=0,
        help="The OKS sigmas of the keypoints: S1 S2 ... By default they are the skeleton's.")
    details: bool = option(
        False, only=["without --images"],
        help="Print more: of results the numbers of each domain, of a model's poses PCK.")
    json: bool = option(
        False, only=["without --images"], help="Print the numbers as JSON.")
    # whose poses, and in which pictures
    checkpoint: str = option(
        None, type=path_or_name, only=POSES,
        help="Use this model: a run's folder, a model's file, or the name of public weights.")
    base: str = option(
        None, type=path_or_name, only=POSES,
        help="The model that --checkpoint goes around, if --checkpoint is an adapter; otherwise "
             "the original for --compare.")
    skeleton: str = option(
        None, type=str.upper, choices=tuple(SKELETONS), only=POSES,
        help="The keypoints of --checkpoint, if its file does not say what they are.")
    data: str = option(
        None, type=data_spec, only=POSES,
        help="Predict the people of this data set: name:root or name:root#domain.")
    split: str = option(
        None, choices=("train", "val", "all"), only=["with --data"],
        help="Take this part of --data; by default val, but all of a single file.")
    images: list[str] = option(
        None, nargs="+", only=[*POSES, "without --data"],
        help="Predict people in these pictures: files, folders, or patterns such as '*.png'.")
    strict: bool = option(
        False, only=POSES,
        help="End with an error if a picture cannot be read or a sentence is too long, instead of "
             "skipping the picture or cutting the sentence.")
    large: bool = option(
        False, only=["with --images"],
        help="Read pictures of more than 100 million pixels, too.")
    # where the people are
    boxes: str = option(
        None, type=path_or_name, only=[*POSES, "without --detect"],
        help="Look for people in these boxes: a file in COCO's results format, in which the "
             "image_id of an own picture is its name.")
    detect: str = option(
        None, nargs="?", const="best", choices=("best", *DETECTORS), only=["with --out"],
        help="Let a detector find people first, and write its boxes to boxes.json.")
    detect_score: float = option(
        0.3, least=0, most=1, only=["with --detect"],
        help="Take boxes with at least this score; a low one is right for people in art.")
    category: str = option(
        "person", choices=CATEGORIES, metavar="NAME", only=POSES,
        help="Take the boxes of this category.")
    # the adapter, and what is read beside the pictures
    adapter: str = option(
        "on", choices=("on", "off"), only=POSES,
        help="Switch the model's adapter off, which gives the original's poses.")
    prompt: str = option(
        None, only=[*POSES, "without --adapter off"],
        help="Let VLPose read this in place of its own sentence.")
    text_weights: str = option(
        None, type=path_or_name, only=[*POSES, "without --adapter off"],
        help="CLIP's text tower. By default it is the one that the model was trained with.")
    # what is written
    out: str = option(
        None, type=os.path.abspath, only=POSES,
        help="Write results.json, annotations.json with its images, and drawings to this folder.")
    pictures: int = option(
        100, least=0, only=["with --out"], help="Draw at most this many pictures.")
    threshold: float = option(
        0.1, least=0, most=1, only=["with --out"],
        help="Draw the keypoints whose score is above this, and label them in annotations.json.")
    compare: bool = option(
        False, only=["with --out"],
        help="Draw the poses of two models side by side: of the original one, which is the "
             "adapter's base or --base, and of the adapted one.")
    # the machine
    cache: str = option(
        str(cache_folder().absolute()), type=os.path.abspath, only=POSES,
        help="The folder in which the built-in figures are kept.")
    device: str = option(default_device(), only=POSES, help="Compute on this device.")
    workers: int = option(
        4 if torch.cuda.is_available() else 0, least=0, only=POSES,
        help="The number of processes that cut out crops.")


def main(argv=None):
    """Runs a command line -> the exit status: 0, 2 after an error, 128 + the number of a signal."""
    with as_program(output_is_needed=True):
        try:
            defaults = EvalOptions()
            parser = Parser(defaults, description="The numbers of a results file, or the poses of "
                            "a model: of a data set, with their numbers, or of own pictures.")
            given = vars(parser.parse_args(argv))
            options = replace(defaults, **given)
            check_options(options, defaults)
            if options.results:
                numbers_of_results(options)
            else:
                poses_of_model(options)
        except (Exception, KeyboardInterrupt) as error:
            return fail(error)
    return 0


EXPECTED = "expected --results, --annotations; or --checkpoint and --data, or --images and --out"


def numbers_of_results(options):
    """The command with --results: the numbers of a file."""
    if not options.annotations:
        raise DataError(EXPECTED)
    print_numbers(options.annotations, options.results, options.sigmas, options.json,
                  domains=options.details)


def poses_of_model(options):
    """The command without --results: poses by a model, of a data set or of own pictures."""
    if not options.checkpoint or not (options.data or options.images and options.out):
        raise DataError(EXPECTED)
    check_device(options.device)
    if options.prompt == "none":  # an older spelling of --adapter off
        options = replace(options, prompt=None, adapter="off")
    if options.large:
        Image.MAX_IMAGE_PIXELS = None
    model = load_model(options.checkpoint, base=options.base, skeleton=options.skeleton)
    model.to(options.device)
    check_adapter_options(model, options)
    original = original_of(model, options) if options.compare else None
    if isinstance(model, VLPose) and options.adapter == "off":
        model = model.base
    dataset = read_data(model, options)
    report_sides(dataset.skeleton)
    with out_folder(options, dataset):
        predict_and_report(model, original, dataset, options)


def predict_and_report(model, original, dataset, options):
    """Predicts poses; writes and draws them with --out, and prints their numbers with --data.

    original: the model to compare with, for --compare.
    """
    dataset, texts = with_texts(dataset, model, options)
    chosen, people, box_scores = choose_people(dataset, options)
    results = predict_people(model, chosen, texts, people, box_scores, options.workers)
    if options.out:
        write_poses(options, chosen, results)
        panels = {"": results}
        if options.compare:
            before = predict_people(original, chosen, None, people, box_scores, options.workers)
            panels = {"original": before, "adapted": results}
        draw_pictures(options, chosen, people, panels)
    if options.data:
        pck = None
        if options.details and box_scores is None:  # else nobody knows which person a pose is of
            pck = pck_of_results(dataset, results, model.config.image_size,
                                 groups=dataset.skeleton.groups)
            pck["people"] = len(dataset.annotated)
        print_numbers(to_coco(dataset), results, dataset.skeleton.sigmas, options.json, pck=pck)


def check_adapter_options(model, options):
    """Raises DataError for options that have no effect on the model, and if --prompt is missing.

    The domain of own pictures is not known. So --prompt must replace a sentence with {domain}.
    """
    has_adapter = isinstance(model, VLPose)
    if not has_adapter and options.adapter == "off":
        raise DataError(f"--adapter: has no effect; {options.checkpoint} has no adapter")
    if not has_adapter and options.base and not options.compare:
        raise DataError(f"--base: has no effect without --compare; {options.checkpoint} has no "
                        "adapter")
    if not has_adapter or not model.reads_text:
        for name in ("prompt", "text_weights"):
            if getattr(options, name):
                raise DataError(f"{flag_of(name)}: has no effect; {options.checkpoint} reads no "
                                "text")
        return
    if options.adapter == "off":
        return
    sentence = options.prompt or model.about.get("sentences", "")
    if not options.data and "{domain}" in sentence:
        raise DataError("--prompt: say what the pictures show, such as 'a photo of a cartoon "
                        "character', or switch the adapter off with --adapter off")


def original_of(model, options):
    """The PoseModel that --compare draws beside the model: an adapter's base, or that of --base."""
    if isinstance(model, VLPose):
        return model.base
    if not options.base:
        raise DataError(f"--compare: {options.checkpoint} has no adapter that could be off; "
                        "expected --base, the model before its training")
    return load_pose_model(options.base).to(options.device)


def read_data(model, options):
    """The data set of --data, or that of --images, with the sigmas of --sigmas."""
    if options.data:
        split = options.split or split_to_test_on(options.data)
        dataset = load_dataset(options.data, split, options.cache)
        if model.skeleton.names[0] != UNNAMED.format(1):  # it knows what its keypoints are
            say_other_skeleton(model.skeleton, dataset)
            dataset = with_skeleton(dataset, model.skeleton)
        if not len(dataset.annotated):
            raise DataError(f"{options.data}: expected labelled people in split {split!r}, "
                            "found none")
    else:
        files = find_pictures(options.images)
        dataset = read_pictures(files, skeleton=model.skeleton, strict=options.strict)
        if not options.detect and not options.boxes and not boxes_in_album(options):
            print("each picture is taken as one person; --detect looks for people", file=sys.stderr)
    if options.sigmas is None:
        return dataset
    count = len(dataset.skeleton.names)
    if len(options.sigmas) != count:
        raise DataError(f"--sigmas: expected {count} numbers, found {len(options.sigmas)}")
    skeleton = replace(dataset.skeleton, sigmas=np.array(options.sigmas))
    return replace(dataset, skeleton=skeleton)


def say_other_skeleton(skeleton, dataset):
    """Says so if a data set names other keypoints than a model of as many."""
    names = skeleton.plain_names
    found = dataset.skeleton.plain_names
    if len(found) == len(names) and sorted(found) != sorted(names):
        print(f"{dataset.name}: {', '.join(found[:3])}, ... are other keypoints than the model's "
              f"{', '.join(names[:3])}, ...; --skeleton says what the model's are",
              file=sys.stderr)


@contextmanager
def out_folder(options, dataset):
    """Keeps --out, if there is one, for this program alone until the end of the block.

    Raises DataError if there are files in it, or if its pictures would be input the next time.
    Nothing is overwritten, least of all boxes and annotations that somebody has corrected.
    """
    if not options.out:
        yield
        return
    out = Path(options.out).resolve()
    folders = [Path(path).resolve() for path in options.images or () if os.path.isdir(path)]
    files = [Path(file).resolve() for file in dataset.files]
    out_is_inside = any(out.is_relative_to(folder) for folder in folders)
    if out_is_inside or any(file.is_relative_to(out) for file in files):
        raise DataError(f"--out {options.out}: there are pictures that are input; name another "
                        "folder")
    lock = locked_folder(options.out)
    try:
        check_empty(options.out)
        yield
    finally:
        lock.close()
        with suppress(OSError):
            os.unlink(lock.name)
            out.rmdir()  # unless something is in it


def with_texts(dataset, model, options):
    """The data set with the sentences of --prompt or the model's own, and {sentence: T}.

    For a model that reads no text there is None instead.
    """
    if not isinstance(model, VLPose) or not model.reads_text:
        return dataset, None
    weights = options.text_weights or model.about.get("text_weights")
    sentences = options.prompt or model.about.get("sentences")
    if not weights or not sentences:
        raise DataError(f"{options.checkpoint}: does not say how it reads text; --text-weights and "
                        "--prompt do")
    clip_text = load_clip_text(weights).to(options.device)
    check_text_dim(model, clip_text.config.embed_dim, weights)
    dataset = with_sentences(dataset, sentences)
    print(*sentences_read([dataset]), sep="\n", file=sys.stderr)
    report_cut(dataset.sentences, dataset.files, options.strict)
    different = np.unique(dataset.sentences).tolist()
    return dataset, encode_sentences(clip_text, different, model.about.get("per_token", False))


def report_cut(sentences, names, strict=False):
    """Says how many sentences are longer than what CLIP reads, of which the rest is cut off.

    names: what the sentences are of, such as files; that of the longest sentence is named.
    strict: whether such a sentence is a DataError instead.
    """
    tokenizer = CLIPTokenizer()
    different, place = np.unique(sentences, return_inverse=True)
    lengths = [len(tokenizer.encode(sentence)) + 2 for sentence in different.tolist()]
    lengths = np.array(lengths)[place]  # (sentences,) in tokens, with start and end
    cut = (lengths > CONTEXT_LENGTH).sum()
    if not cut:
        return
    longest = lengths.argmax()
    message = (f"{names[longest]}: expected a sentence of at most {CONTEXT_LENGTH} tokens, found "
               f"{lengths[longest]}")
    if strict:
        raise DataError(message)
    print(f"{message}; {cut} of {len(names)} sentences are cut", file=sys.stderr)


def choose_people(dataset, options):
    """Whose poses? -> the data set that has them, their rows in it, and their boxes' scores.

    They are the people in the boxes of --detect, of --boxes or of boxes.json in an album. Without
    boxes they are the labelled people of --data, or one person in each of --images; then there are
    no scores: None.
    """
    boxes_file = options.boxes
    category = CATEGORIES.index(options.category)
    if options.detect:
        boxes_file = detect(dataset, options)
    elif not boxes_file and boxes_in_album(options):
        boxes_file = boxes_in_album(options)
        category = None  # any, as in training
        print(f"people are in the boxes of {boxes_file}", file=sys.stderr)
    if boxes_file:
        dataset, box_scores = with_detected_boxes(dataset, boxes_file, category, options)
        return dataset, np.arange(len(dataset.ids)), box_scores
    if options.data:
        return dataset, dataset.annotated, None
    return dataset, np.arange(len(dataset.ids)), None


def boxes_in_album(options):
    """The boxes.json in the one folder of --images, which `pictures:FOLDER` reads, too; or None."""
    if not options.images or len(options.images) > 1:
        return None
    path = Path(options.images[0]) / "boxes.json"
    return path if path.is_file() else None


def detect(dataset, options):
    """Looks for --category in all images, and writes boxes.json in COCO's results format.

    Returns the path of boxes.json, which --boxes reads, too.
    """
    category = CATEGORIES.index(options.category)
    detector = load_detector(detector_name(options)).to(options.device)
    image_ids = dataset.image_ids.tolist()
    if not options.data:
        _, image_ids = below_common_folder(dataset.files)
    records = []
    for image_id, file in progress(list(zip(image_ids, dataset.files)), "detecting"):
        image, _ = open_image(file, upright=dataset.upright)
        boxes, scores = detected_boxes(detector, image, category, options)
        if not boxes:
            what = options.category
            print(f"no {what} found in {file}: taken as one {what} as a whole", file=sys.stderr)
            boxes = [(0, 0, *image.size)]
            scores = [options.detect_score]
        for (left, top, right, bottom), score in zip(boxes, scores):
            records.append({"image_id": image_id, "category_id": category, "score": score,
                            "bbox": [left, top, right - left, bottom - top]})
    path = Path(options.out) / "boxes.json"
    write_json(path, records)
    return path


def detector_name(options):
    """The name of the detector. The best one for people is not the best for other categories."""
    people_only, others = DETECTORS[0], DETECTORS[1:]
    if options.detect == "best":
        return people_only if options.category == "person" else others[0]
    if options.detect == people_only and options.category != "person":
        raise DataError(f"{people_only} finds only people; other categories need "
                        f"{' or '.join(others)}")
    return options.detect


def with_detected_boxes(dataset, path, category, options):
    """The data set with the people in the boxes of a file, and the boxes' scores (people,).

    category: of the boxes to take; None takes all.
    An image_id in the file is the id of an image of --data, or the name of an image's file.
    """
    if options.data:
        names = image_names(dataset)
    else:
        names = picture_rows(dataset.files)
    rows, boxes, scores = read_boxes(path, names, category)
    report_boxes_outside(path, dataset, rows, boxes)
    return with_boxes(dataset, rows, boxes), scores


def load_detector(name):
    """A detector of torchvision: a list of images -> a list of {"boxes", "labels", "scores"}.

    The images are RGB (3, H, W) from 0 to 1.
    """
    import torchvision  # only where it is needed, because it takes long

    detector = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    detector.load_state_dict(load_weights(name))
    detector.roi_heads.keypoint_roi_pool = None  # only boxes, in half the time
    if name == DETECTORS[0]:
        for layer in detector.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.eps = 0.0  # as it was trained
    return detector.eval()


@torch.inference_mode()
def detected_boxes(detector, image, category, options):
    """Boxes [[left, top, right, bottom], ...] of a category in a Pillow image, and their scores."""
    pixels = torch.tensor(np.asarray(image)).permute(2, 0, 1)           # (3, H, W)
    found, = detector([pixels.to(options.device) / 255])
    good = (found["labels"] == category) & (found["scores"] >= options.detect_score)
    return found["boxes"][good].tolist(), found["scores"][good].tolist()


def write_poses(options, dataset, results):
    """Writes results.json, and annotations.json with its images, for annotation programs."""
    out = Path(options.out)
    people = labelled_by(results, dataset, options.threshold)
    content = to_coco(people, options.category)
    write_json(out / "results.json", results)
    for record, file in zip(content["images"], dataset.files):
        record["width"], record["height"] = picture_size(file, dataset.upright)
        turned = format_if_turned(file) if dataset.upright else None
        place = out / "images" / record["file_name"]
        place.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(place):  # it may be a link to a picture, which nobody may write to
            raise DataError(f"{place}: expected no such file, found one")
        if turned:  # not all programs turn such a picture as EXIF says, nor does `load_dataset`
            image, _ = open_image(file, upright=True)
            image = Image.fromarray(np.asarray(image))  # forgets the compression that Pillow keeps
            image.save(place, turned, quality=95)
            continue
        try:
            place.symlink_to(os.path.abspath(file))
        except OSError:  # where links are not possible
            shutil.copyfile(file, place)
    write_json(out / "annotations.json", content)


def labelled_by(results, dataset, threshold):
    """The data set with the poses of `results` as its labels.

    A keypoint whose score is not above the threshold is not labelled (0). The others are visible
    (2) with a score of at least 0.5, and hidden (1) with a lower one.
    """
    image_ids = np.array([result["image_id"] for result in results])
    boxes = np.array([result["box"] for result in results])
    rows = image_rows("results", dataset.image_ids, np.arange(len(results)), image_ids)
    people = with_boxes(dataset, rows, boxes)
    poses = np.reshape([result["keypoints"] for result in results], people.keypoints.shape)
    scores = poses[:, :, 2:]                                            # (people, K, 1)
    visible = 1 + (scores >= 0.5)
    keypoints = np.concatenate([poses[:, :, :2], visible], axis=2) * (scores > threshold)
    return replace(people, keypoints=keypoints)


def draw_pictures(options, dataset, people, panels):
    """Draws the images that people (rows of the data set) are in, at most --pictures of them.

    panels: {label: results}, side by side. The last panel's results are counted.
    """
    results = list(panels.values())[-1]
    rows = np.unique(dataset.image_index[people])
    digits = max(3, len(str(dataset.image_ids.max())))
    drawn = rows[:options.pictures]
    for row in progress(drawn, "drawing pictures"):
        name = f"{dataset.image_ids[row]:0{digits}d}-{Path(dataset.files[row]).stem[:60]}.jpg"
        sheet = draw_panels(dataset, row, panels, options.threshold)
        sheet.save(Path(options.out) / name, quality=92)
    repeated = len(people) - len(results)
    print(f"{options.out}: {len(results)} poses ({repeated} repeated ones left out) in {len(rows)} "
          f"of {len(dataset.files)} images; {len(drawn)} drawn", file=sys.stderr)


def print_numbers(annotations, results, sigmas, as_json, domains=True, pck=None):
    """Prints COCO's ten numbers, with `domains` also those of each domain, and pck {group: PCK}."""
    scenes = classified_scenes(annotations, results, sigmas)
    numbers = numbers_and_people(scenes)
    tables = {}
    if domains:
        tables["domains"] = {domain: numbers_and_people(members)
                             for domain, members in scenes_of_domains(scenes).items()}
    if pck:
        tables["PCK@0.05"] = {"all": pck}
    if as_json:
        print(json.dumps({**numbers, **tables}))
        return
    print(format_table("COCO", {"all": numbers}))
    for title, table in tables.items():
        print(format_table(title, table))


def numbers_and_people(scenes):
    """COCO's ten numbers, and the number of people to find."""
    people = sum(scene.to_find[ALL].sum() for scene in scenes)
    return coco_numbers(scenes) | {"people": int(people)}


if __name__ == "__main__":
    sys.exit(main())
