"""How long a step of adaptation takes, by part: python tests/benchmark_uda.py [resnet18 256 16]

What is not a network (views, warps, pseudo-labels, mask, occlusion, losses, the teacher's average) should be a small
part of a step. It is timed as the difference between whole steps and steps of the networks alone, taken in turn.
"""
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import invert_matrix  # noqa: E402
from uda import (MultiLevelAlignment, StyleTransfer, confidence_mask, consistency_loss, ema_update,  # noqa: E402
                 information_maximization_loss, jitter_color, occlude, random_affine, rectify, resize_affine, warp)
from vlpose import MODEL_CONFIGS, PoseModel  # noqa: E402


def seconds(action, repeats=5):
    """The median time of an action, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def main(name="resnet18", side="256", batch="16"):
    side, batch = int(side), int(batch)
    torch.manual_seed(0)
    model = MultiLevelAlignment(PoseModel(replace(MODEL_CONFIGS[name], image_size=(side, side)), 16))
    stylist = StyleTransfer(width=16, depth=1)
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    source, target = torch.rand(2, batch, 3, side, side)
    labels, labelled = torch.rand(batch, 16, side // 4, side // 4), torch.ones(batch, 16)

    def learn(loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def networks():
        with torch.no_grad():
            model.teacher(target)
        outputs = [model.student.features(images) for images in (source, target)]
        predictor, discriminator = model.student.head.predictor, model.discriminator
        learn(sum(predictor(features).mean() + discriminator(features).mean() for features in outputs))

    def whole():
        learn(model(source, labels, labelled, target)[0])

    rounds = [(seconds(whole, 1), seconds(networks, 1)) for _ in range(7)]
    step, network = (sorted(times)[3] for times in zip(*rounds))
    share = sorted(1 - alone / together for together, alone in rounds)[3]
    print(f"{name}, {side}×{side}, batch {batch}, {torch.get_num_threads()} threads")
    print(f"whole step           {step * 1e3:8.1f} ms")
    print(f"networks alone       {network * 1e3:8.1f} ms")
    print(f"share of the rest    {share:8.1%}   (median over {len(rounds)} pairs)")

    matrix, heatmaps = random_affine(batch, (side, side)), labels * 0.1
    small = invert_matrix(resize_affine(matrix, (side, side), heatmaps.shape[2:]))
    sure = rectify(labels, 2.0)
    parts = {
        "two views": lambda: [jitter_color(warp(target, matrix)) for _ in range(2)],
        "two heatmaps back": lambda: [warp(heatmaps, small) for _ in range(2)],
        "pseudo-labels, mask": lambda: (rectify(heatmaps, 2.0), confidence_mask(heatmaps)),
        "occlusion": lambda: occlude(target, sure, matrix, probability=1.0),
        "L_con": lambda: consistency_loss(heatmaps, labels, labelled),
        "L_im": lambda: information_maximization_loss(heatmaps),
        "teacher's average": lambda: ema_update(model.teacher, model.student),
        "restyling (small)": lambda: stylist.restyle(source, target, 0.5)}
    print("\nforwards, each by itself:")
    for part, action in parts.items():
        print(f"{part:21}{seconds(action) * 1e3:8.1f} ms")


if __name__ == "__main__":
    main(*sys.argv[1:])
