"""What each way of tuning costs: python tests/benchmark_vlpose.py [tiny 16]

A step of training and a prediction of one batch, relative to full fine-tuning and to the original model. All ways take
turns in every round, so that a machine's moods hit them alike; the median ratio over the rounds counts.
"""
import shlex
import sys
import time

import torch
from evidence import TUNING  # first: it makes the modules beside it importable
from train import Recipe, model_to_tune, parameter_groups, parse_options
from vlpose import CLIP_TEXT_CONFIGS, VIT_CONFIGS, ViTPose, VLPose

ROUNDS = 15


def seconds(action):
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def median_ratios(rounds, row):
    """{row: its time as a multiple of another row's}, the median over rounds {row: seconds}."""
    return {name: sorted(times[name] / times[row] for times in rounds)[len(rounds) // 2] for name in rounds[0]}


def main(size="tiny", batch="16"):
    torch.manual_seed(0)
    config, batch, text_dim = VIT_CONFIGS[size], int(batch), CLIP_TEXT_CONFIGS["random"].embed_dim
    base = ViTPose(config)
    height, width = config.image_size
    images, texts = torch.randn(batch, 3, height, width), torch.randn(batch, 1, text_dim)
    target = torch.rand(batch, base.num_keypoints, height // 4, width // 4)
    models = {row: model_to_tune(base, text_dim, parse_options(shlex.split(options)))
              for row, options in TUNING.items() if not options.startswith(("--target", "--template"))}
    optimizers = {row: torch.optim.AdamW(parameter_groups(model, Recipe(1, batch, 1e-3, 0, False)))
                  for row, model in models.items()}

    def run(model):
        return model(images, texts) if isinstance(model, VLPose) else model(images)

    def step(row):
        optimizers[row].zero_grad()
        ((run(models[row]) - target) ** 2).mean().backward()
        optimizers[row].step()

    training = [{row: seconds(lambda: step(row)) for row in models} for _ in range(ROUNDS + 1)][1:]
    with torch.inference_mode():
        prediction = [{row: seconds(lambda: run(model.eval())) for row, model in models.items()}
                      for _ in range(ROUNDS + 1)][1:]

    full = sorted(times["full"] for times in training)[ROUNDS // 2]
    print(f"{size}, batch {batch}, {torch.get_num_threads()} threads; a step of full fine-tuning: {full * 1e3:.0f} ms\n")
    print("| | trained | a step of training | a prediction |\n|---|---|---|---|")
    training, prediction = median_ratios(training, "full"), median_ratios(prediction, "full")
    for row, model in models.items():
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        print(f"| {row} | {trained:,} | {training[row]:.2f} | {prediction[row]:.2f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
