"""How fast everything is, as a ratio to a peer that does the same work in the same run.

    python tests/benchmark.py model base --batches 1 8 32   a forward pass: transformers, products
    python tests/benchmark.py step tiny --batch 16          a training step of each strategy
    python tests/benchmark.py memory                        the batch by size, strategy and memory
    python tests/benchmark.py uda resnet18                  a step of alignment and its networks
    python tests/benchmark.py tokenizer                     open_clip's tokenizer
    python tests/benchmark.py oks 1                         pycocotools, faster-coco-eval
    python tests/benchmark.py crops --root /data/coco       crops: OpenCV's, as mmpose makes them
    python tests/benchmark.py annotations 1                 opening annotations: json.load

Whatever is compared takes turns, so that a machine's moods hit all alike; a ratio is the median of
the rounds' ratios. The peers are those of tests/requirements.txt. What else can be chosen, such as
--rounds: python tests/benchmark.py step -h
"""
import argparse
import contextlib
import copy
import io
import json
import math
import multiprocessing
import shlex
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import cycle, pairwise
from pathlib import Path
from statistics import median
from timeit import timeit

import numpy as np
import torch
# first: it makes the modules beside tests/ importable
from evidence import ROOT, STRATEGIES, VARIANTS
from PIL import Image
from torch.utils.data import DataLoader

from clip_tokenizer import CLIPTokenizer
from data import (COCO17, Crops, crop_matrix, invert_matrix, load_dataset, open_image,
                  picture_dataset, transform_points, warp_image, with_boxes)
from eval import classify_detections, coco_numbers, read_scenes
from train import (Stage, model_to_tune, new_optimizer, parse_options, prepare,
                   set_training_mode)
from uda import (MultiLevelAlignment, StyleTransfer, confidence_mask, consistency_loss, ema_update,
                 information_maximization_loss, jitter_color, occlude, random_affine, rectify,
                 resize_affine, warp)
from vlpose import MODEL_CONFIGS, PATCH, RANDOM_TEXT, VIT_CONFIGS, PoseModel, ViT, VLPose


def take_turns(actions, rounds):
    """{name: seconds in each round}.

    Each round runs every action once; the first round does not count.
    """
    times = [{name: timeit(action, number=1) for name, action in actions.items()}
             for _ in range(rounds + 1)]
    return {name: [turn[name] for turn in times[1:]] for name in actions}


def each(action, *lists):
    for items in zip(*lists):
        action(*items)


def ratio(these, those):
    return median(this / that for this, that in zip(these, those))


def line(name, *cells):
    """Prints a row of a table: its name, and numbers or headings."""
    cells = [cell if isinstance(cell, str) else f"{cell:.2f}" for cell in cells]
    print(f"{name:29}" + "".join(f"{cell:>{min(18, max(9, 90 // max(1, len(cells))))}}"
                                 for cell in cells), flush=True)


def compare(pairs, peer, number, rounds):
    """Prints a row for each {part: (our action, the peer's)}, which both handle so many things."""
    actions = {(part, who): action for part, pair in pairs.items()
               for who, action in zip(("ours", peer), pair)}
    times = take_turns(actions, rounds)
    line("each of them", "ours, ms", f"{peer}, ms", "ours, a second", f"speed ÷ {peer}")
    for part in pairs:
        ours, theirs = median(times[part, "ours"]) / number, median(times[part, peer]) / number
        line(part, f"{1e3 * ours:.3f}", f"{1e3 * theirs:.3f}", f"{1 / ours:.0f}",
             ratio(times[part, peer], times[part, "ours"]))


# ----------------------------------------------------------------------------------- a forward pass

def benchmark_model(args):
    config, types = VIT_CONFIGS[args.size], (torch.float32, torch.bfloat16)
    ours = {dtype: PoseModel(config).eval().to(dtype) for dtype in types}
    theirs = {dtype: transformers_model(config).eval().to(dtype) for dtype in types}
    print(f"{args.size}, {torch.get_num_threads()} threads; our speed as a multiple of the others'")
    line("", "ours, ms", "÷ transformers'", "÷ products'", "÷ float32's")
    for batch in args.batches:
        actions = {}
        for dtype in types:
            images = torch.randn(batch, 3, *config.image_size, dtype=dtype)
            actions["ours", dtype] = partial(ours[dtype], images)
            actions["transformers", dtype] = partial(theirs[dtype], images)
            actions["products", dtype] = partial(each, torch.matmul,
                                                 *matrix_products(config, batch, dtype))
        with torch.inference_mode():
            times = take_turns(actions, args.rounds)
        for dtype in types:
            own, others = times["ours", dtype], (("transformers", dtype), ("products", dtype),
                                                 ("ours", torch.float32))
            line(f"batch {batch}, {str(dtype)[6:]}", 1e3 * median(own),
                 *(ratio(times[key], own) for key in others))


def transformers_model(config):
    """A ViTPose of transformers of the same sizes, with random weights."""
    from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation
    backbone = VitPoseBackboneConfig(image_size=list(config.image_size), hidden_size=config.dim,
                                     mlp_ratio=4, num_hidden_layers=config.depth,
                                     num_attention_heads=config.heads)
    return VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone, num_labels=17,
                                                  use_simple_decoder=False))


def matrix_products(config, batch, dtype):
    """Left and right matrices: their products are all that a forward pass of ViTPose multiplies."""
    height, width = config.image_size
    N, D, C = height // PATCH * width // PATCH, config.dim, config.decoder_dim
    rows, heads, d = batch * N, batch * config.heads, D // config.heads
    shapes = [(rows, 3 * PATCH ** 2, D)]                                              # the patches
    # the blocks' layers
    shapes += config.depth * [(rows, D, 3 * D), (rows, D, D), (rows, D, 4 * D), (rows, 4 * D, D)]
    # deconvolutions, the predictor
    shapes += [(rows, D, 16 * C), (4 * rows, C, 16 * C), (16 * rows, C, 17)]
    inputs = {shape[:2]: torch.randn(shape[:2], dtype=dtype) for shape in shapes}
    left = [inputs[shape[:2]] for shape in shapes]
    right = [torch.randn(columns, inner, dtype=dtype).T for _, inner, columns in shapes]
    q, k, v, weights = (torch.randn(heads, N, width, dtype=dtype) for width in (d, d, d, N))
    return left + config.depth * [q, weights], right + config.depth * [k.mT, v]       # attention


# ---------------------------------------------------------------------------------- a training step

def benchmark_step(args):
    torch.manual_seed(0)
    config, text_dim = VIT_CONFIGS[args.size], RANDOM_TEXT.embed_dim
    base = PoseModel(config)
    height, width = config.image_size
    images, texts = torch.randn(args.batch, 3, height, width), torch.randn(args.batch, 1, text_dim)
    target = torch.rand(args.batch, base.num_keypoints, height // 4, width // 4)
    models = {row: model_to_tune(base, text_dim, parse_options(shlex.split(options)))
              for row, options in (STRATEGIES | {"0 prompts": VARIANTS["0 prompts"]}).items()}
    models["full, AdamW"] = copy.deepcopy(models["full"])
    for model in models.values():
        prepare(model, checkpointing=False)
    stage = Stage("adapt", 1, 1e-3, args.batch, 0, False, optimizer="muon")
    by_adamw = replace(stage, optimizer="adamw")
    optimizers = {row: new_optimizer(model, by_adamw if "AdamW" in row else stage)
                  for row, model in models.items()}

    def run(model):
        return model(images, texts) if isinstance(model, VLPose) else model(images)

    def loss(row):
        return ((run(models[row]) - target) ** 2).mean()

    def step(row):
        optimizers[row].zero_grad()
        loss(row).backward()
        optimizers[row].step()

    saved = {row: saved_bytes(models[row], partial(loss, row)) for row in models}
    training = take_turns({row: partial(step, row) for row in models}, args.rounds)
    with torch.inference_mode():
        everyone = models | {"original": base}
        prediction = take_turns({row: partial(run, model.eval())
                                 for row, model in everyone.items()}, args.rounds)

    full = f"{1e3 * median(training['full']):.0f} ms and {saved['full'] / 1e6:.0f} MB"
    print(f"{args.size}, batch {args.batch}, {torch.get_num_threads()} threads; full fine-tuning "
          f"takes {full} a step")
    line("", "trained", "step ÷ full's", "saved ÷ full's", "prediction ÷")
    for row, model in models.items():
        trained = sum(parameter.numel() for parameter in model.parameters()
                      if parameter.requires_grad)
        line(row, f"{trained:,}", ratio(training[row], training["full"]),
             saved[row] / saved["full"], ratio(prediction[row], prediction["original"]))


def saved_bytes(model, loss):
    """The memory that a forward pass keeps for the backward pass, besides the model's tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()  # views share one
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def benchmark_memory(args):
    """Computes what fits; it is not measured on a GPU.

    Parameters, gradients and Adam's two averages are in float32. A forward pass in bfloat16 keeps
    something for the backward pass. 1 GB is for the context, and a tenth of the memory for what
    passes by.
    """
    print("The largest batch that trains, by memory (computed, in bfloat16)")
    line("", "trained", "fixed GB", "MB/image", *(f"{memory} GB" for memory in MEMORIES))
    for size in args.sizes:
        config = VIT_CONFIGS[size]
        base = PoseModel(config)
        for row in ("full", "vlpose", "0 prompts", "last"):
            model = model_to_tune(base, RANDOM_TEXT.embed_dim,
                                  parse_options(shlex.split((STRATEGIES | VARIANTS)[row])))
            set_training_mode(model)
            parameters, trained = (sum(parameter.numel() for parameter in model.parameters()
                                       if parameter.requires_grad >= least) for least in (0, 1))
            for checkpointing in (False, True) if row in ("full", "vlpose") else (False,):
                for module in model.modules():
                    if isinstance(module, ViT):
                        module.checkpointing = checkpointing
                one, two = (saved_bytes(model, partial(bfloat16_output, model, batch))
                            for batch in (1, 2))
                fixed = 4 * parameters + 12 * trained + max(0, 2 * one - two)
                image = two - one
                if checkpointing:  # the inside of one block at a time is there, too
                    image += (plain - image) / config.depth
                plain = image
                fits = [max(0, int((0.9e9 * memory - 1e9 - fixed) / image)) for memory in MEMORIES]
                line(f"{size}, {row}{', checkpointing' * checkpointing}", f"{trained / 1e6:.1f} M",
                     fixed / 1e9, image / 1e6, *map(str, fits))


MEMORIES = (8, 12, 16, 24, 40, 80)  # GB


def bfloat16_output(model, batch):
    images = torch.randn(batch, 3, *model.config.image_size)
    texts = torch.randn(batch, 1, RANDOM_TEXT.embed_dim)
    with torch.autocast("cpu", torch.bfloat16):
        return model(images, texts) if isinstance(model, VLPose) else model(images)


# ------------------------------------------------------------------------------ a step of alignment

def benchmark_uda(args):
    """What is not a network should be a small part of a step of alignment.

    These are views, warps, pseudo-labels, losses and the teacher's average.
    """
    side, batch = args.side, args.batch
    torch.manual_seed(0)
    alignment = MultiLevelAlignment(PoseModel(replace(MODEL_CONFIGS[args.size],
                                                      image_size=(side, side)), 16))
    stylist = StyleTransfer(width=16, depth=1)
    optimizer = torch.optim.AdamW(parameter for parameter in alignment.parameters()
                                  if parameter.requires_grad)
    source, target = torch.rand(2, batch, 3, side, side)
    labels, labelled = torch.rand(batch, 16, side // 4, side // 4), torch.ones(batch, 16)

    def learn(loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def networks():
        with torch.no_grad():
            alignment.teacher(target)
        outputs = [alignment.student.features(images) for images in (source, target)]
        predictor, discriminator = alignment.student.head.predictor, alignment.discriminator
        learn(sum(predictor(features).mean() + discriminator(features).mean()
                  for features in outputs))

    matrix, heatmaps = random_affine(batch, (side, side)), labels * 0.1
    small = invert_matrix(resize_affine(matrix, (side, side), heatmaps.shape[2:]))
    sure = rectify(labels, 2.0)
    times = take_turns({
        "whole step": lambda: learn(alignment(source, labels, labelled, target)[0]),
        "networks": networks,
        "two views": lambda: [jitter_color(warp(target, matrix)) for _ in range(2)],
        "two heatmaps back": lambda: [warp(heatmaps, small) for _ in range(2)],
        "pseudo-labels, mask": lambda: (rectify(heatmaps, 2.0), confidence_mask(heatmaps)),
        "occlusion": lambda: occlude(target, sure, matrix, probability=1.0),
        "L_con": lambda: consistency_loss(heatmaps, labels, labelled),
        "L_im": lambda: information_maximization_loss(heatmaps),
        "teacher's average": lambda: ema_update(alignment.teacher, alignment.student),
        "restyling (small)": lambda: stylist.restyle(source, target, 0.5)}, args.rounds)
    print(f"{args.size}, {side}×{side}, batch {batch}, {torch.get_num_threads()} threads; below "
          "the networks, forward passes of one part each")
    line("", "ms", "÷ whole step")
    for part, turns in times.items():
        line(part, 1e3 * median(turns), ratio(turns, times["whole step"]))


# ------------------------------------------------------------------------------------ the tokenizer

def benchmark_tokenizer(args):
    from open_clip.tokenizer import SimpleTokenizer
    texts = [text for name in ("README.md", "assets/evidence.md")
             for text in (ROOT / name).read_text("utf-8").splitlines()]
    ours, theirs = CLIPTokenizer(), SimpleTokenizer()
    texts = [text for text in texts if len(ours.encode(text)) <= 75]  # open_clip cuts the others
    print(f"{len(texts)} lines of text")
    compare({
        "words met before": (lambda: ours(texts), lambda: theirs(texts)),
        "opening and new words": (
            lambda: CLIPTokenizer()(texts), lambda: SimpleTokenizer()(texts))},
        "open_clip", len(texts), args.rounds)


# ------------------------------------------------------------------ COCO's files and its evaluation
#
# Made-up people as in COCO: 11,000 in 5,000 images. Each tool runs in a process of its own, for the
# sake of its memory.
# It yields when it has imported what it needs and after each part; what it yields last is its
# result: AP, people.

def make_people(num_images, rng):
    """Each person's row of the image (people,), box (people, 4) and keypoints (people, 17, 3)."""
    people = np.where(rng.random(num_images) < 0.54,
                      np.minimum(rng.geometric(0.245, num_images), 20), 0)
    image = np.repeat(np.arange(num_images), people)
    size = np.exp(rng.normal(4.3, 0.8, len(image)))
    boxes = np.column_stack([rng.uniform(0, 400, (len(image), 2)), 0.6 * size, 1.4 * size]).round(2)
    points = (boxes[:, None, :2] + rng.random((len(image), 17, 2)) * boxes[:, None, 2:]).astype(int)
    share = rng.choice([0, 0.3, 0.7, 0.9, 1], len(image), p=[0.4, 0.1, 0.2, 0.2, 0.1])
    flags = 2 * (rng.random((len(image), 17)) < share[:, None])
    return image, boxes, np.dstack([points, flags])


def annotation_records(image, boxes, keypoints, rng):
    """COCO's annotations, each with an outline of 40 points."""
    for n, joints in enumerate(keypoints * (keypoints[:, :, 2:] > 0)):
        yield {"id": n + 1, "image_id": int(image[n]) + 1, "category_id": 1,
               "iscrowd": int(rng.random() < 0.02),
               "segmentation": [(480 * rng.random(80)).round(2).tolist()],
               "keypoints": joints.ravel().tolist(), "num_keypoints": int((joints[:, 2] > 0).sum()),
               "area": float(0.6 * boxes[n, 2] * boxes[n, 3]), "bbox": boxes[n].tolist()}


def result_records(num_results, num_images, image, boxes, keypoints, rng):
    """Two thirds are people of the image with more or less noise, the rest anything."""
    where = np.sort(rng.integers(num_images, size=num_results))
    start, stop = np.searchsorted(image, where, "left"), np.searchsorted(image, where, "right")
    person = np.minimum(start + (rng.random(num_results) * (stop - start)).astype(int),
                        len(image) - 1)
    noise = np.exp(rng.normal(-2.6, 1, num_results))
    somebody = (stop > start) & (rng.random(num_results) < 0.7)
    spread = (noise * boxes[person, 3])[:, None, None]
    poses = keypoints[person, :, :2] + rng.standard_normal((num_results, 17, 2)) * spread
    poses[~somebody] = rng.uniform(0, 500, ((~somebody).sum(), 17, 2))
    found = np.dstack([poses, rng.random((num_results, 17))]).round(3).reshape(num_results, 51)
    scores = np.clip(1 - 3 * noise + rng.normal(0, 0.1, num_results), 0, 1)
    scores = scores * np.where(somebody, 1, 0.3)
    for n in range(num_results):
        yield {"image_id": int(where[n]) + 1, "category_id": 1, "keypoints": found[n].tolist(),
               "score": float(scores[n])}


def write_list(file, records):
    """Writes a JSON list, record by record.

    Ten times COCO's training set would not fit into memory twice.
    """
    file.write("[")
    for n, record in enumerate(records):
        file.write((", " if n else "") + json.dumps(record))
    file.write("]")


def made_up_files(folder, num_images, num_results):
    """Files of annotations and of results, and empty ones in place of the images.

    The images only have to exist.
    """
    rng = np.random.default_rng(0)
    annotations, results = f"{folder}/annotations.json", f"{folder}/results.json"
    people = make_people(num_images, rng)
    images = [{"file_name": f"{n:012}.jpg", "height": 480, "width": 640, "id": n,
               "coco_url": f"http://images.cocodataset.org/train2017/{n:012}.jpg"}
              for n in range(1, num_images + 1)]
    with open(annotations, "w", encoding="utf-8") as file:
        file.write('{"categories": [{"id": 1, "name": "person"}], "images": ')
        write_list(file, images)
        file.write(', "annotations": ')
        write_list(file, annotation_records(*people, rng))
        file.write("}")
    with open(results, "w", encoding="utf-8") as file:
        write_list(file, result_records(num_results, num_images, *people, rng))
    Path(folder, "train2017").mkdir()
    for image in images:
        Path(folder, "train2017", image["file_name"]).touch()
    megabytes = Path(annotations).stat().st_size / 1e6
    print(f"{num_images} images, {len(people[0])} people, {megabytes:.0f} MB of annotations; "
          f"{num_results} results")
    return annotations, results


def our_evaluation(annotations, results):
    yield
    scenes, sigmas = read_scenes(annotations, results)
    yield
    for scene in scenes:
        classify_detections(scene, sigmas)
    yield coco_numbers(scenes)["AP"]


def pycocotools(annotations, results):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    yield
    people = COCO(annotations)
    found = people.loadRes(results)
    yield
    evaluation = COCOeval(people, found, "keypoints")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    yield evaluation.stats[0]


def faster_coco_eval(annotations, results):
    from faster_coco_eval import init_as_pycocotools
    init_as_pycocotools()  # from now on, imports from pycocotools give faster_coco_eval's
    yield from pycocotools(annotations, results)


def load_json(*files):
    yield
    yield [json.load(open(file, encoding="utf-8")) for file in files] and ""


def open_annotations(annotations, results):
    yield
    yield len(load_dataset(f"coco:{annotations}", "all").ids)


EVALUATORS = (our_evaluation, pycocotools, faster_coco_eval, load_json)
READERS = (load_json, open_annotations)


def measure(tool, files):
    """{what: how much} of memory and seconds for each part; and the result.

    The memory is what comes above that of the imports.
    """
    times, megabytes = [], []
    with contextlib.redirect_stdout(io.StringIO()):
        for result in tool(*files):
            times.append(time.perf_counter())
            # VmRSS: in use now, VmHWM: the most so far
            status = Path("/proc/self/status").read_text("utf-8")
            megabytes.append([int(status.split(f"{kind}:")[1].split()[0]) / 1024
                              for kind in ("VmRSS", "VmHWM")])
    parts = [end - start for start, end in pairwise(times)]
    return {"memory, MB": megabytes[-1][1]
            - megabytes[0][0]} | dict(zip(("read, s", "evaluate, s"), parts)), result


def compare_tools(tools, files, rounds):
    """Prints what each tool needs, and in brackets how many times as much as the first one."""
    done, results = {tool: [] for tool in tools}, {}
    for _ in range(rounds):
        for tool in tools:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                needs, results[tool] = process.submit(measure, tool, files).result()
            done[tool].append(needs)
    line("needs", *done[tools[0]][0], "result")
    for tool, turns in done.items():
        columns = {what: ([turn[what] for turn in turns], [turn[what] for turn in done[tools[0]]])
                   for what in turns[0]}
        cells = [f"{median(own):.2f} ({ratio(own, first):.2f})" for own, first in columns.values()]
        line(tool.__name__, *cells, str(results[tool])[:10])


def benchmark_files(tools, num_images, num_results, args):
    with tempfile.TemporaryDirectory() as folder:
        files = made_up_files(folder, int(num_images * args.factor), int(num_results * args.factor))
        compare_tools(tools, files, args.rounds)


# -------------------------------------------------------------------------------------------- crops

def benchmark_crops(args):
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        if args.root:
            small = load_dataset(f"coco:{args.root}", "train")
            small = small.select_people(small.annotated)
        else:
            small = photographs(folder, 64, (480, 640), rng)
        compare_crops("COCO's photographs" if args.root else "made-up photographs, 640×480", small,
                      256, args.rounds)
        large = photographs(folder, 8, (1632, 2448), rng)
        compare_crops("made-up photographs, 2448×1632", large, 32, args.rounds)


def photographs(folder, number, size, rng):
    """A data set of made-up JPEGs with a person each, who is as large as COCO's people.

    Like photographs they have amplitudes that fall with the frequency, and half a byte a pixel.
    """
    (height, width), files = size, []
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    for n in range(number):
        planes = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency,
                               size)
        planes /= planes.std((1, 2), keepdims=True)
        # mostly the same in all colours
        pixels = (120 + 55 * planes[0] + 15 * planes).clip(0, 255).astype(np.uint8)
        files.append(f"{folder}/{height}-{n}.jpg")
        Image.fromarray(pixels.transpose(1, 2, 0)).save(files[-1], quality=85)
    tall = height * np.exp(rng.normal(-1.1, 0.7, number)).clip(0.1, 0.95)
    sides = np.column_stack([0.58 * tall, tall])
    corners = rng.random((number, 2)) * (np.array([width, height]) - sides)
    return with_boxes(replace(picture_dataset(files, COCO17), upright=False), np.arange(number),
                      np.hstack([corners, sides]))


class OpenCVCrops(Crops):
    """The crops of mmpose's steps.

    OpenCV reads the whole image and warps it, then red and blue change places.
    """

    def __getitem__(self, key):
        import cv2
        cv2.setNumThreads(1)  # in workers, too
        row, data, size = key[0], self.dataset, self.size
        matrix = crop_matrix(data.boxes[row], size)
        image = cv2.imread(data.files[data.image_index[row]])
        image = cv2.warpAffine(image, matrix, size[::-1], flags=cv2.INTER_LINEAR)
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        points = transform_points(data.keypoints[row, :, :2], matrix)
        return {"image": torch.from_numpy(image).permute(2, 0, 1),
                "keypoints": torch.from_numpy(points)}


def compare_crops(title, dataset, number, rounds, size=(256, 192)):
    """In one process, in parts and as a whole, and in worker processes; in random order.

    That is the order of training. Where it says so, the people of an image follow each other, as in
    a detector's file: then we decode the image only once.
    """
    import cv2
    rows = np.random.default_rng(0).permutation(np.resize(np.arange(len(dataset.ids)), number))
    keys = [(int(row), 0) for row in rows]
    together = sorted(keys, key=lambda key: dataset.image_index[key[0]])
    ours, theirs = Crops(dataset, size), OpenCVCrops(dataset, size)
    apart = np.mean([(ours[key]["image"].float() - theirs[key]["image"]).abs().mean()
                     for key in keys])
    print(f"\n{title}: {number} crops of {size[0]}×{size[1]}, which differ by {apart:.2f} of 255 "
          f"on average")
    files = [dataset.files[dataset.image_index[row]] for row, _ in keys]
    matrices = [crop_matrix(dataset.boxes[row], size) for row, _ in keys]
    shrinks = [1 / math.sqrt(np.linalg.det(matrix[:, :2])) for matrix in matrices]
    images, smaller = zip(*map(open_image, files, shrinks))
    arrays, warp_array = list(map(cv2.imread, files)), partial(cv2.warpAffine, dsize=size[::-1],
                                                               flags=cv2.INTER_LINEAR)
    pairs = {
        "decode": (partial(each, open_image, files, shrinks), partial(each, cv2.imread, files)),
        "warp": (partial(each, warp_image, images, matrices, cycle([size]), smaller),
                 partial(each, warp_array, arrays, matrices)),
        "whole": (partial(each, ours.__getitem__, keys), partial(each, theirs.__getitem__, keys)),
        "whole, by image": (partial(each, ours.__getitem__, together),
                            partial(each, theirs.__getitem__, together))}
    for workers in (1, 2):
        loaders = [DataLoader(crops, 32, sampler=keys, num_workers=workers, persistent_workers=True)
                   for crops in (ours, theirs)]
        pairs[f"whole, workers: {workers}"] = [partial(list, loader) for loader in loaders]
    compare(pairs, "OpenCV", number, rounds)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(name, run, rounds):
        added = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        added.set_defaults(run=run)
        added.add_argument("--rounds", type=int, default=rounds,
                           help="how often all take their turns")
        return added.add_argument

    add = command("model", benchmark_model, 7)
    add("size", nargs="?", default="base", choices=("small", "base", "large", "huge"))
    add("--batches", type=int, nargs="+", default=(1, 8, 32), help="images in a batch")
    add = command("step", benchmark_step, 7)
    add("size", nargs="?", default="tiny", choices=VIT_CONFIGS)
    add("--batch", type=int, default=16, help="images in a batch")
    add = command("memory", benchmark_memory, 1)
    add("sizes", nargs="*", default=("small", "base", "large", "huge"))
    add = command("uda", benchmark_uda, 7)
    add("size", nargs="?", default="resnet18", choices=MODEL_CONFIGS)
    add("--side", type=int, default=256, help="height and width of an image in pixels")
    add("--batch", type=int, default=16, help="images of each domain in a batch")
    command("tokenizer", benchmark_tokenizer, 15)
    add = command("oks", partial(benchmark_files, EVALUATORS, 5000, 100_000), 3)
    add("factor", nargs="?", type=float, default=1,
        help="times COCO's validation set and 100,000 results")
    add = command("crops", benchmark_crops, 7)
    add("--root", help="COCO's folder; made-up photographs if it is not given")
    add = command("annotations", partial(benchmark_files, READERS, 118_287, 0), 3)
    add("factor", nargs="?", type=float, default=1, help="times COCO's training set, of 0.28 GB")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
