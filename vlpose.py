"""VLPose: bridging the domain gap in pose estimation with language-vision tuning (arXiv 2402.14456).

A pose estimator that was trained on photographs fails on paintings. Fine-tuning it on paintings makes it worse on
photographs. VLPose leaves it as it is and adds an adapter that reads the name of the domain:

    image ─► frozen ViT with learnable prompts ─► E ─┐
    "a photo of a cartoon" ─► frozen CLIP text ─► T ─┴─► relation matcher ─► R ─► dual decoder ─► heatmaps

Without a sentence the adapter is off, and the original model is back, bit for bit.

Read from top to bottom: transformer block, ViT, ViTPose, CLIP's text tower, and then the paper's own three parts:
relation matcher, dual extractor-injector decoder and VLPose.
Shapes: B images, K keypoints, H×W image, h×w heatmap, N image tokens, L text tokens, D image width, E text width.
"""
import copy
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

from clip_tokenizer import CLIPTokenizer

PATCH = 16  # pixels along the side of one image token


# ------------------------------------------------------------------------------------------------- transformer block

class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, N, D); `causal` lets a token see itself and the ones before it."""

    def __init__(self, dim, heads, causal=False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))  # each (B, heads, N, D/heads)
        return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)))


def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, N, D) -> (B, heads, N, D/heads)


def merge_heads(x):
    return x.transpose(1, 2).flatten(2)  # (B, heads, N, D/heads) -> (B, N, D)


class QuickGELU(nn.Module):
    """The approximation of GELU that CLIP was trained with."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)); the MLP is four times as wide."""

    def __init__(self, dim, heads, eps=1e-6, drop_path=0.0, activation=nn.GELU, causal=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, causal)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), activation(), nn.Linear(4 * dim, dim))
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


# -------------------------------------------------------------------------------------------------------- ViTPose

@dataclass(frozen=True)
class ViTConfig:
    """Size of a ViTPose. `prompts` is how many visual prompts VLPose gives it, `layer_decay` the learning rate's
    factor from one layer to the one below when the backbone is trained (both from the papers)."""
    dim: int
    depth: int
    heads: int
    drop_path: float
    prompts: int
    layer_decay: float
    image_size: tuple[int, int] = (256, 192)  # height, width
    head_dim: int = 256  # channels of the decoder
    conv_stem: bool = False


VIT_CONFIGS = {
    # `tiny` is ours: it learns in minutes from nothing, which a 16×16 patch embedding does not.
    "tiny": ViTConfig(128, 4, 4, 0.0, 10, 1.0, image_size=(128, 96), head_dim=64, conv_stem=True),
    "small": ViTConfig(384, 12, 12, 0.1, 50, 0.8),
    "base": ViTConfig(768, 12, 12, 0.3, 20, 0.75),
    "large": ViTConfig(1024, 24, 16, 0.5, 10, 0.8),
    "huge": ViTConfig(1280, 32, 16, 0.55, 5, 0.85),
}


def conv_stem(dim):
    """Four 3×3 convolutions of stride 2: the same 16×16 pixels a token as the patch embedding, learned much faster."""
    layers = []
    for c_in, c_out in [(3, 32), (32, 64), (64, 96)]:
        layers += [nn.Conv2d(c_in, c_out, 3, stride=2, padding=1), nn.GroupNorm(8, c_out), nn.GELU()]
    return nn.Sequential(*layers, nn.Conv2d(96, dim, 3, stride=2, padding=1))


class ViT(nn.Module):
    """Plain vision transformer, the backbone of ViTPose (arXiv 2204.12484). It has no class token."""

    def __init__(self, config):
        super().__init__()
        height, width = config.image_size
        self.grid = (height // PATCH, width // PATCH)
        # Padding 2, not 0, as in the released ViTPose: without it every token sees pixels two further right and down.
        self.patch_embed = conv_stem(config.dim) if config.conv_stem else nn.Conv2d(3, config.dim, PATCH, PATCH, padding=2)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], config.dim))
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, drop_path=config.drop_path * i / (config.depth - 1)) for i in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images, prompts=None):
        """Images (B, 3, H, W) -> features (B, D, H/16, W/16).

        `prompts` (layers, n, D) are learnable tokens in front of the image's (visual prompt tuning, arXiv 2203.12119).
        One row is *shallow*: put there once. `depth` rows are *deep*: every layer gets its own, the last layer's are dropped.
        """
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed  # (B, N, D)
        count = 0 if prompts is None else prompts.shape[1]
        for i, block in enumerate(self.blocks):
            if count and i < len(prompts):
                x = torch.cat([prompts[i].expand(len(x), -1, -1), x[:, count if i else 0:]], dim=1)  # (B, n + N, D)
            x = block(x)
        return self.norm(x[:, count:]).transpose(1, 2).unflatten(2, self.grid)


def deconv_block(c_in, c_out):
    """Doubles the resolution; one of the two blocks of ViTPose's classic decoder (figure 3a)."""
    return nn.Sequential(nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())


class HeatmapHead(nn.Module):
    """The classic decoder: features (B, D, h, w) -> heatmaps (B, K, 4h, 4w)."""

    def __init__(self, dim, channels, num_keypoints):
        super().__init__()
        self.block1 = deconv_block(dim, channels)
        self.block2 = deconv_block(channels, channels)
        self.predictor = nn.Conv2d(channels, num_keypoints, 1)
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.predictor.bias)

    def forward(self, features):
        return self.predictor(self.block2(self.block1(features)))


class ViTPose(nn.Module):
    """Top-down pose estimator (arXiv 2204.12484): images (B, 3, H, W), one person each -> heatmaps (B, K, H/4, W/4)."""

    def __init__(self, config, num_keypoints=17):
        super().__init__()
        self.config, self.num_keypoints = config, num_keypoints
        self.backbone = ViT(config)
        self.head = HeatmapHead(config.dim, config.head_dim, num_keypoints)

    def forward(self, images):
        return self.head(self.backbone(images))


# ------------------------------------------------------------------------------------------------ CLIP's text tower

@dataclass(frozen=True)
class CLIPTextConfig:
    width: int
    heads: int
    layers: int
    embed_dim: int  # of the space that CLIP shares between text and images
    vocab_size: int = 49408
    context_length: int = 77


CLIP_TEXT_CONFIGS = {
    "ViT-B/32": CLIPTextConfig(512, 8, 12, 512),
    "ViT-B/16": CLIPTextConfig(512, 8, 12, 512),
    "ViT-L/14": CLIPTextConfig(768, 12, 12, 768),
    "RN50": CLIPTextConfig(512, 8, 12, 1024),
    "random": CLIPTextConfig(128, 4, 2, 128),  # what stands in where no public weights are given
}


class CLIPText(nn.Module):
    """CLIP's text encoder (arXiv 2103.00020): token ids (N, 77) -> features (N, E), projected, not normalised."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.width)
        self.pos_embed = nn.Parameter(torch.empty(config.context_length, config.width))
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, eps=1e-5, activation=QuickGELU, causal=True) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.projection = nn.Parameter(torch.empty(config.width, config.embed_dim))
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)
        nn.init.normal_(self.projection, std=config.width ** -0.5)

    def forward(self, tokens, per_token=False):
        """With `per_token`, features (N, 77, E) of every token and a mask (N, 77) that is True up to the end of the text."""
        x = self.token_embed(tokens) + self.pos_embed[:tokens.shape[1]]  # (N, 77, width)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x) @ self.projection  # (N, 77, E)
        end = tokens.argmax(dim=1)  # the end token has the highest id of all
        if per_token:
            return x, torch.arange(tokens.shape[1], device=tokens.device) <= end[:, None]
        return x[torch.arange(len(x)), end]


# ---------------------------------------------------------------------------------------------------------- VLPose

class RelationMatcher(nn.Module):
    """How the image relates to the text (§3.2): image (B, N, D), text (B, L, E) -> relation (B, N, D).

    Every image token asks; image and text tokens together answer (`concat`), or the text alone (`cross`):
        T' = Linear(T),  M = softmax(Q Kᵀ / √d),  R = LayerNorm(E + W_o(M V)).
    """

    def __init__(self, dim, text_dim, heads=8, variant="concat", dropout=0.1):
        super().__init__()
        if variant not in ("concat", "cross"):
            raise ValueError(f"matcher: expected 'concat' or 'cross', not {variant!r}")
        self.heads, self.variant, self.dropout = heads, variant, dropout
        self.text = nn.Linear(text_dim, dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image, text):
        context = self.text(text)  # (B, L, D)
        if self.variant == "concat":
            context = torch.cat([image, context], dim=1)  # (B, N + L, D)
        q = split_heads(self.query(image), self.heads)
        k, v = (split_heads(part, self.heads) for part in self.key_value(context).chunk(2, dim=-1))
        dropout = self.dropout if self.training else 0.0
        return self.norm(image + self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, dropout_p=dropout))))


DECODERS = ("baseline", "injector", "extractor-injector", "dual", "dual-released")


class VLPose(nn.Module):
    """A frozen ViTPose and the adapter around it: images (B, 3, H, W), text (B, L, E) -> heatmaps (B, K, H/4, W/4).

    text: the domain's sentence as `CLIPText` encodes it. `None` switches the adapter off: that is the original model.
    decoder: how the relation R enters the frozen decoder, one of `DECODERS` (figure 3a to d; `dual` is the paper's,
        `dual-released` what the authors' code does instead).
    num_prompts: visual prompts per layer, by default what the paper gives a model of this size; deep: fresh ones at every layer.
    """

    def __init__(self, base, text_dim, decoder="dual", num_prompts=None, deep=True, matcher="concat"):
        super().__init__()
        if decoder not in DECODERS:
            raise ValueError(f"decoder: expected one of {', '.join(DECODERS)}, not {decoder!r}")
        self.config = config = base.config
        self.base = base.requires_grad_(False)
        self.decoder = decoder
        num_prompts = config.prompts if num_prompts is None else num_prompts
        self.options = {"text_dim": text_dim, "decoder": decoder, "num_prompts": num_prompts, "deep": deep, "matcher": matcher}
        self.prompts = nn.Parameter(torch.empty(config.depth if deep else 1, num_prompts, config.dim))
        nn.init.trunc_normal_(self.prompts, std=0.02)
        if decoder != "baseline":
            self.matcher = RelationMatcher(config.dim, text_dim, variant=matcher)
        if decoder not in ("baseline", "injector"):
            self.block1 = deconv_block(config.dim, config.head_dim)  # A₁
            self.block2 = deconv_block(config.head_dim, config.head_dim)  # A₂
        self.predictor = copy.deepcopy(base.head.predictor).requires_grad_(True)
        self.train()

    def train(self, mode=True):
        """Frozen means frozen: the base's BatchNorm statistics must not move while the adapter trains."""
        super().train(mode)
        self.base.eval()
        return self

    def forward(self, images, text=None):
        if text is None:
            return self.base(images)
        features = self.base.backbone(images, self.prompts)  # E
        return self.predictor(self.decode(features, text))

    def relation(self, features, text):
        tokens = features.flatten(2).transpose(1, 2)  # (B, N, D)
        return self.matcher(tokens, text).transpose(1, 2).unflatten(2, features.shape[2:])  # (B, D, h, w)

    def decode(self, E, text):
        B1, B2 = self.base.head.block1, self.base.head.block2
        if self.decoder == "baseline":
            return B2(B1(E))
        R = self.relation(E, text)
        if self.decoder == "injector":
            return B2(B1(E + R))
        A1, A2 = self.block1, self.block2
        if self.decoder == "dual-released":
            m1 = B1(E + R) + A1(E)
            return B2(m1) + A2(m1)
        m1 = B1(E + R) if self.decoder == "dual" else B1(E)
        return B2(m1) + A2(A1(R) + m1)

    def adapter_state_dict(self):
        """The adapter's tensors alone: a few MB that turn any copy of the same base into this VLPose."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("base.")}

    def load_adapter(self, state):
        """Loads what `adapter_state_dict` gave; a ValueError names the tensors that do not fit."""
        own = self.adapter_state_dict()
        wrong = sorted(name for name in own.keys() | state.keys()
                       if name not in own or name not in state or own[name].shape != state[name].shape)
        if wrong:
            raise ValueError(f"adapter does not fit this model: {', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}")
        self.load_state_dict(state, strict=False)


# --------------------------------------------------------------------------------------------------- public weights

class WeightsError(ValueError):
    """Weights that cannot be read or do not fit. The message is one line that names the file and what was expected."""


def load_weights(path_or_name):
    """A file's tensors by name; a nested `state_dict` is unwrapped."""
    contents = read_checkpoint(path_or_name)
    for key in ("base", "state_dict", "model"):
        contents = contents.get(key, contents)
    return contents


def read_checkpoint(path):
    if not Path(path).is_file():
        raise WeightsError(f"{path}: no such file")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_strictly(module, state, path):
    """Loads tensors that must be exactly those that the module has."""
    own = module.state_dict()
    for name in sorted(own.keys() | state.keys()):
        expected, found = (f"{list(tensors[name].shape)}" if name in tensors else "nothing" for tensors in (own, state))
        if expected != found:
            raise WeightsError(f"{path}: a checkpoint of another architecture: tensor {name} is {found}, expected {expected}")
    module.load_state_dict(state)
    return module


FORMAT = "posebridge-1"


def save_checkpoint(path, model, **about):
    """Writes a ViTPose or VLPose, and whatever plain values `about` says of it, in one step: no reader sees half a file."""
    base = getattr(model, "base", model)
    contents = {"format": FORMAT, "config": asdict(base.config), "num_keypoints": base.num_keypoints,
                "base": base.state_dict(), "about": about}
    if isinstance(model, VLPose):
        contents |= {"options": model.options, "adapter": model.adapter_state_dict()}
    part = Path(f"{path}.{os.getpid()}.part")
    torch.save(contents, part)
    os.replace(part, path)


def load_model(path_or_name):
    """(model, about): what `save_checkpoint` wrote, or a ViTPose from any public file or name, and then {}."""
    contents = read_checkpoint(path_or_name)
    if contents.get("format") != FORMAT:
        return load_vitpose(path_or_name), {}
    config = contents["config"] | {"image_size": tuple(contents["config"]["image_size"])}
    model = load_strictly(ViTPose(ViTConfig(**config), contents["num_keypoints"]), contents["base"], path_or_name)
    if "adapter" in contents:
        model = VLPose(model, **contents["options"])
        model.load_adapter(contents["adapter"])
    return model.eval(), contents["about"]


def load_vitpose(path_or_name):
    model, _ = load_model(path_or_name)
    return getattr(model, "base", model)


def load_clip_text(path_or_name):
    """CLIP's text tower; "random" is a small one without training, the same in every run."""
    if path_or_name == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return CLIPText(CLIP_TEXT_CONFIGS["random"]).eval()
    raise WeightsError(f"{path_or_name}: not written yet")


@torch.no_grad()
def encode_sentences(clip_text, sentences):
    """{domain: sentence} -> {domain: features (1, E)}."""
    tokens = CLIPTokenizer()(list(sentences.values())).to(clip_text.projection.device)
    features = clip_text(tokens)  # (N, E)
    return dict(zip(sentences, features[:, None]))
