"""How fast eval.py is, and how much memory it needs, beside json.load, pycocotools and faster-coco-eval.

    python tests/benchmark_eval.py [10]

Made-up people and results as for COCO's validation set: 5,000 images, 11,000 people and 100,000 results, or the given
number of times as many. Each tool runs in a process of its own; memory is its peak above the imports' (Linux only).
"""
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))


def make_annotations(num_images, rng):
    """COCO annotations, and each person's row of the image (people,), box (people, 4) and keypoints (people, 17, 2)."""
    people = np.where(rng.random(num_images) < 0.54, np.minimum(rng.geometric(0.245, num_images), 20), 0)
    image = np.repeat(np.arange(num_images), people)
    size = np.exp(rng.normal(4.3, 0.8, len(image)))
    boxes = np.column_stack([rng.uniform(0, 400, (len(image), 2)), 0.6 * size, 1.4 * size]).round(2)
    points = (boxes[:, None, :2] + rng.random((len(image), 17, 2)) * boxes[:, None, 2:]).astype(int)
    share = rng.choice([0, 0.3, 0.7, 0.9, 1], len(image), p=[0.4, 0.1, 0.2, 0.2, 0.1])
    flags = 2 * (rng.random((len(image), 17)) < share[:, None])
    keypoints = np.dstack([points, flags]) * (flags > 0)[:, :, None]
    annotations = [
        {"id": n + 1, "image_id": int(image[n]) + 1, "category_id": 1, "iscrowd": int(rng.random() < 0.02),
         "keypoints": keypoints[n].ravel().tolist(), "num_keypoints": int((flags[n] > 0).sum()),
         "area": float(0.6 * boxes[n, 2] * boxes[n, 3]), "bbox": boxes[n].tolist()} for n in range(len(image))]
    images = [{"id": n + 1, "file_name": f"{n}.jpg", "width": 640, "height": 480} for n in range(num_images)]
    categories = [{"id": 1, "name": "person"}]
    return {"images": images, "annotations": annotations, "categories": categories}, image, boxes, points


def make_results(num_results, num_images, image, boxes, points, rng):
    """Two thirds are people of the image with more or less noise, the rest anything."""
    where = np.sort(rng.integers(num_images, size=num_results))
    start, stop = np.searchsorted(image, where, "left"), np.searchsorted(image, where, "right")
    person = np.minimum(start + (rng.random(num_results) * (stop - start)).astype(int), len(image) - 1)
    noise = np.exp(rng.normal(-2.6, 1, num_results))
    somebody = (stop > start) & (rng.random(num_results) < 0.7)
    poses = points[person] + rng.standard_normal((num_results, 17, 2)) * (noise * boxes[person, 3])[:, None, None]
    poses[~somebody] = rng.uniform(0, 500, ((~somebody).sum(), 17, 2))
    keypoints = np.dstack([poses, rng.random((num_results, 17))]).round(3).reshape(num_results, 51)
    scores = np.clip(1 - 3 * noise + rng.normal(0, 0.1, num_results), 0, 1) * np.where(somebody, 1, 0.3)
    return [{"image_id": int(where[n]) + 1, "category_id": 1, "keypoints": keypoints[n].tolist(),
             "score": float(scores[n])} for n in range(num_results)]


def ours(annotations, results):
    from eval import classify_detections, coco_numbers, read_truth_and_detections
    yield
    truth, detections, sigmas = read_truth_and_detections(annotations, results)
    yield
    yield list(coco_numbers(truth, detections, *classify_detections(truth, detections, sigmas)).values())


def pycocotools(annotations, results):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    yield from run_peer(COCO, COCOeval, annotations, results)


def faster_coco_eval(annotations, results):
    from faster_coco_eval import COCO, COCOeval_faster
    yield from run_peer(COCO, COCOeval_faster, annotations, results)


def run_peer(COCO, COCOeval, annotations, results):
    yield
    people = COCO(annotations)
    found = people.loadRes(results)
    yield
    evaluation = COCOeval(people, found, "keypoints")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    yield list(evaluation.stats[:10])


def json_load(annotations, results):
    yield
    loaded = [json.load(open(file)) for file in (annotations, results)]
    yield
    yield [len(part) for part in loaded]


TOOLS = {tool.__name__: tool for tool in (json_load, ours, pycocotools, faster_coco_eval)}


def memory(kind):
    """VmRSS: in use now, VmHWM: the most so far; megabytes."""
    return int(Path("/proc/self/status").read_text().split(f"{kind}:")[1].split()[0]) / 1024


def measure(tool, annotations, results):
    """Seconds to read and to evaluate, megabytes, the numbers. A tool yields after its imports and after reading."""
    times = []
    with contextlib.redirect_stdout(io.StringIO()):
        for numbers in TOOLS[tool](annotations, results):
            times.append(time.perf_counter())
            imports = memory("VmRSS") if len(times) == 1 else imports
    return {"read": times[1] - times[0], "evaluate": times[2] - times[1], "memory": memory("VmHWM") - imports,
            "numbers": numbers}


def main():
    if sys.argv[1:2] == ["--measure"]:
        return print(json.dumps(measure(*sys.argv[2:])))
    factor, rng = int(sys.argv[1]) if len(sys.argv) > 1 else 1, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("annotations.json", "results.json")]
        annotations, *people = make_annotations(5000 * factor, rng)
        for file, content in zip(files, (annotations, make_results(100_000 * factor, 5000 * factor, *people, rng))):
            with open(file, "w") as stream:
                json.dump(content, stream)
        print(f"{5000 * factor} images, {len(annotations['annotations'])} people, {100_000 * factor} results")
        print(f"{'':18}{'read, s':>10}{'evaluate, s':>13}{'memory, MB':>12}   AP")
        del annotations, people, content
        for tool in TOOLS:
            command = [sys.executable, __file__, "--measure", tool, *files]
            done = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            numbers = "" if tool == "json_load" else f"   {done['numbers'][0]:.15f}"
            print(f"{tool:18}{done['read']:10.2f}{done['evaluate']:13.2f}{done['memory']:12.0f}{numbers}", flush=True)


if __name__ == "__main__":
    main()
