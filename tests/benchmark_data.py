"""Opening a file of train2017's size: seconds and peak memory of load_dataset and of json.load.

Each runs in a process of its own; memory is read as Linux tells it.

    python tests/benchmark_data.py
"""
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

IMAGES, PEOPLE = 118_287, 262_465
MEASURE = """
import sys, time
sys.path.insert(0, sys.argv[2])
import {module}
peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) / 1e6
start, before = time.perf_counter(), peak()
content = {work}
print(f"{module}: {{time.perf_counter() - start:.1f}} s, peak {{peak():.2f}} GB, {{before:.2f}} of it imports")
"""


def write_file(folder):
    """Random people with outlines of 40 points, 210 MB in all, and an empty file for every image."""
    rng = random.Random(0)
    (folder / "train2017").mkdir()
    images, annotations = [], []
    for n in range(IMAGES):
        url = f"http://images.cocodataset.org/train2017/{n:012}.jpg"
        images.append({"license": 3, "file_name": f"{n:012}.jpg", "coco_url": url,
                       "height": 480, "width": 640, "date_captured": "2013-11-14 11:18:45", "id": n})
        (folder / "train2017" / f"{n:012}.jpg").touch()
    for n in range(PEOPLE):
        keypoints = [rng.randrange(480) if i % 3 < 2 else 2 for i in range(51)] if n % 2 else [0] * 51
        outline = [round(rng.random() * 480, 2) for _ in range(80)]
        annotations.append({"segmentation": [outline], "num_keypoints": 17 * (n % 2), "area": 5000.5, "iscrowd": 0,
                            "keypoints": keypoints, "image_id": rng.randrange(IMAGES),
                            "bbox": [10.5, 20.25, 100.0, 200.0], "category_id": 1, "id": n})
    path = folder / "person_keypoints_train2017.json"
    categories = [{"id": 1, "name": "person"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        path = write_file(Path(folder))
        print(f"{path.stat().st_size / 1e6:.0f} MB, {IMAGES} images, {PEOPLE} people")
        for module, work in (("data", "data.load_dataset('coco:' + sys.argv[1], 'all')"),
                             ("json", "json.load(open(sys.argv[1]))")):
            code = MEASURE.format(module=module, work=work)
            subprocess.run([sys.executable, "-c", code, path, Path(__file__).parents[1]], check=True)
