"""Words that mean something: a small CLIP of the built-in figures, for VLPose to read with.

    python tests/text_tower.py FOLDER
    python train.py --mode vlpose --text-weights FOLDER/tower.pth --sentences FOLDER/sentences.json

The first command writes tower.pth and sentences.json, in some ten minutes on one CPU core.

CLIP's objective (arXiv 2103.00020): of all sentences in a batch, a picture finds its own, and the
other way round. A sentence says what a picture looks like, its medium, colours, lines and
proportions, in words that styles share.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from clip_tokenizer import CLIPTokenizer  # noqa: E402
from data import GENTLE, Crops, load_dataset, normalize  # noqa: E402
from vlpose import Block, CLIPText, CLIPTextConfig, conv_stem, save_tensors  # noqa: E402

LOOKS = {  # style -> what can be said of its pictures, each in two ways
    "photo": ("a photograph/a camera's picture", "dull colours/natural colours",
              "soft light/shading",
              "normal proportions/a small head"),
    "cartoon": ("a cartoon/a comic", "flat bright colours/bright colours",
                "thick dark outlines/dark lines",
                "a large head/short legs and a large head"),
    "sketch": ("a sketch/a drawing", "no colours/pale paper", "thin pencil lines/hatching",
               "normal proportions/long legs"),
    "oil painting": ("an oil painting/a painting", "warm earth colours/dull colours",
                     "brush strokes/strong light",
                     "normal proportions/a long robe"),
    "sculpture": ("a sculpture/a statue", "one colour/the colour of stone", "soft light/shading",
                  "normal proportions/a long robe"),
    "shadow play": ("a shadow play/a puppet", "dark on warm light/warm colours",
                    "a dark shape/from the side",
                    "a large head/rods"),
    "ink painting": ("an ink painting/a drawing", "pale colours/pale paper",
                     "thick dark outlines/dark lines",
                     "normal proportions/a long robe"),
    "stained glass": ("stained glass/a church window", "bright colours/jewels' colours",
                      "dark lines/lead lines",
                      "a large head/a long robe")}
OPENING, SIZE = "a picture of a person: ", (128, 96)
SENTENCES = {style: OPENING + ", ".join(look.split("/")[0] for look in looks)
             for style, looks in LOOKS.items()}


def sentence_about(style, image, rng):
    """Some words about a picture (3, H, W): its style, how bright, colourful and warm it is."""
    red, green, blue = image.float().mean((1, 2)).tolist()
    colors = ["bright" if red + green + blue > 390 else "dark",
              "colourful" if image.float().std(0).mean() > 25 else "grey",
              "warm" if red > blue + 15 else "cold"]
    words = [rng.choice(look.split("/"))
             for look in rng.permutation(LOOKS[style])[:rng.integers(1, 5)]]
    return OPENING + ", ".join(words + colors[:rng.integers(0, 4)])


class PictureTower(nn.Module):
    """Images (B, 3, 128, 96) -> features (B, 128)."""

    def __init__(self, dim=128):
        super().__init__()
        self.stem, self.pos_embed = conv_stem(dim), nn.Parameter(torch.zeros(1, 48, dim))
        self.blocks, self.norm = nn.Sequential(Block(dim, 4), Block(dim, 4)), nn.LayerNorm(dim)

    def forward(self, images):
        x = self.stem(images).flatten(2).mT.contiguous() + self.pos_embed  # (B, 48, D)
        return self.norm(self.blocks(x).mean(1))                           # (B, D)


def train(steps, batch_size=96, lr=1e-3):
    """The two towers."""
    torch.manual_seed(0)
    rng, tokenizer = np.random.default_rng(0), CLIPTokenizer()
    text = CLIPText(CLIPTextConfig(128, 2, 2, 128))
    pictures = PictureTower()
    scale = nn.Parameter(torch.tensor(2.66))
    sets = [Crops(load_dataset(f"figures#{style}", "train"), SIZE, GENTLE) for style in LOOKS]
    optimizer = torch.optim.AdamW([*text.parameters(), *pictures.parameters(), scale], lr,
                                  weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    for step in range(steps):
        styles = rng.integers(len(sets), size=batch_size)
        images = []
        for place, style in enumerate(styles):
            row = int(rng.integers(len(sets[style].dataset.ids)))
            images.append(sets[style][row, (0, step, place)]["image"])
        sentences = [sentence_about([*LOOKS][style], image, rng)
                     for style, image in zip(styles, images)]
        I = F.normalize(pictures(normalize(torch.stack(images))))          # (B, D)
        T = F.normalize(text(tokenizer(sentences)[:, :40]))                # (B, D); none is longer
        logits, own = scale.exp() * I @ T.mT, torch.arange(batch_size)     # (B, B)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.mT, own)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 19:
            print(f"{step + 1}/{steps}  loss {loss:.3f} (chance: {math.log(batch_size):.3f})",
                  flush=True)
    return text.eval(), pictures.eval()


@torch.no_grad()
def recognized(text, pictures):
    """{style: the share of its held-out pictures whose nearest sentence is their style's}."""
    T, found = F.normalize(text(CLIPTokenizer()([*SENTENCES.values()]))), {}
    for place, style in enumerate(SENTENCES):
        crops = Crops(load_dataset(f"figures#{style}", "val"), SIZE)
        images = torch.stack([crops[row, 0]["image"] for row in range(len(crops.dataset.ids))])
        nearest = (F.normalize(pictures(normalize(images))) @ T.mT).argmax(1)
        found[style] = (nearest == place).float().mean().item()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    text, pictures = train(args.steps)
    args.folder.mkdir(parents=True, exist_ok=True)
    save_tensors(args.folder / "tower.pth", text.state_dict())
    (args.folder / "sentences.json").write_text(json.dumps(SENTENCES, indent=2), "utf-8")
    print("pictures whose style's sentence is the nearest: " + ", ".join(
        f"{style} {share:.0%}" for style, share in recognized(text, pictures).items()))


if __name__ == "__main__":
    main()
