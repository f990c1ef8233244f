"""What each way of tuning costs: python tests/benchmark_vlpose.py [tiny 16]

A step of training, without the cutting of crops, as a multiple of one of full fine-tuning; and the prediction of a
batch as a multiple of the original model's. All ways take turns in every round, so that a machine's moods hit them
alike; the median over the rounds counts.
"""
import shlex
import sys
import time

import torch
from evidence import STRATEGIES, VARIANTS  # first: it makes the modules beside tests/ importable
from train import Stage, model_to_tune, parameter_groups, parse_options
from vlpose import CLIP_TEXT_CONFIGS, VIT_CONFIGS, PoseModel, VLPose

ROUNDS = 15


def seconds(action):
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def take_turns(actions):
    """Rounds of {row: seconds}; the first one does not count."""
    return [{row: seconds(action) for row, action in actions.items()} for _ in range(ROUNDS + 1)][1:]


def ratio(rounds, row, other):
    """The median of a row's time as a multiple of another's in the same round."""
    return sorted(times[row] / times[other] for times in rounds)[ROUNDS // 2]


def main(size="tiny", batch="16"):
    torch.manual_seed(0)
    config, batch, text_dim = VIT_CONFIGS[size], int(batch), CLIP_TEXT_CONFIGS["random"].embed_dim
    base = PoseModel(config)
    height, width = config.image_size
    images, texts = torch.randn(batch, 3, height, width), torch.randn(batch, 1, text_dim)
    target = torch.rand(batch, base.num_keypoints, height // 4, width // 4)
    models = {row: model_to_tune(base, text_dim, parse_options(shlex.split(options)))
              for row, options in (STRATEGIES | VARIANTS).items() if "--sentences" not in options}
    optimizers = {row: torch.optim.AdamW(parameter_groups(model, Stage("adapt", 1, 1e-3, batch, 0, False)))
                  for row, model in models.items()}

    def run(model):
        return model(images, texts) if isinstance(model, VLPose) else model(images)

    def step(row):
        optimizers[row].zero_grad()
        ((run(models[row].train()) - target) ** 2).mean().backward()
        optimizers[row].step()

    training = take_turns({row: lambda row=row: step(row) for row in models})
    with torch.inference_mode():
        everyone = models | {"original": base}
        prediction = take_turns({row: lambda model=model.eval(): run(model) for row, model in everyone.items()})

    full = sorted(times["full"] for times in training)[ROUNDS // 2]
    print(f"{size}, batch {batch}, {torch.get_num_threads()} threads; a step of full fine-tuning: {1e3 * full:.0f} ms")
    print("\n| | trained | step ÷ full's | prediction ÷ the original's |\n|---|---|---|---|")
    for row, model in models.items():
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        step_ratio, prediction_ratio = ratio(training, row, "full"), ratio(prediction, row, "original")
        print(f"| {row} | {trained:,} | {step_ratio:.2f} | {prediction_ratio:.2f} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
