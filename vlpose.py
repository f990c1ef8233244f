"""VLPose: bridging the domain gap in pose estimation with language-vision tuning.

The paper is arXiv 2402.14456.

A pose estimator that was trained on photographs fails on paintings. Fine-tuned on paintings, it
gets worse on photographs. VLPose leaves it unchanged and trains a small adapter around it. The
adapter reads the domain's name:

    image ───► frozen ViT, trained prompts P ──► E ─┐
    sentence ► frozen CLIP text tower ─────────► T ─┴► relation matcher ─► R ─► decoder ─► heatmaps

Without a sentence the adapter is off, and the output is the original model's, bit for bit.

The lesson, from top to bottom, with assets/tour.md as its pictures:
    1  the transformer block
    2  ViT with visual prompts: an image becomes E
    3  the pose model: E becomes heatmaps
    4  CLIP's text tower: a sentence becomes T
    5  the relation matcher: E asks E and T, the answer is R
    6  VLPose: R enters the decoder; all shapes in one place
The appendices, which the lesson does not need: a step's heatmaps, in bfloat16 or in parts; drop
path; which base can have which adapter; updates of the frozen weights; other backbones; finding
files of weights, and reading them without executing them; the names and shapes of public models;
saving and loading.

Letters: B images in a batch, K keypoints, H×W image, h×w heatmap, N tokens of an image, L tokens of
a sentence, n prompts, D width of an image token, D_text width of a text feature, C channels;
q, k, v queries, keys, values.
"""
import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from clip_tokenizer import CLIPTokenizer
from data import SKELETONS, known_skeleton, normalize

# ------------------------------------------------------------------------- 1. the transformer block

class Attention(nn.Module):
    """Multi-head self-attention over tokens (B, N, D): softmax(q kᵀ / √d) v, where d = D / heads.

    causal: a token sees only itself and the tokens before it.
    """

    def __init__(self, dim, heads, causal=False):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (B, N, D) each
        q = split_heads(q, self.heads)          # (B, heads, N, d)
        k = split_heads(k, self.heads)          # (B, heads, N, d)
        v = split_heads(v, self.heads)          # (B, heads, N, d)
        # softmax(q kᵀ / √d) v
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # (B, heads, N, d)
        return self.proj(merge_heads(x))        # (B, N, D)


def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, N, D) -> (B, heads, N, d)


def merge_heads(x):
    return x.transpose(1, 2).flatten(2)  # (B, heads, N, d) -> (B, N, D)


class Block(nn.Module):
    """A pre-norm transformer block: x (B, N, D) -> (B, N, D).

    Attention lets the tokens exchange information; the MLP works on each token by itself.
    drop_path: the probability that a training image skips a branch (stochastic depth, arXiv
        1603.09382).
    """

    def __init__(self, dim, heads, eps=1e-6, drop_path=0.0, activation=nn.GELU, causal=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, heads, causal)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), activation(), nn.Linear(4 * dim, dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x, n=0):
        """The first n tokens take part in the attention and then leave: n + N tokens -> N."""
        x = x[:, n:] + self.drop_path(self.attn(self.norm1(x))[:, n:])  # (B, N, D)
        return x + self.drop_path(self.mlp(self.norm2(x)))              # (B, N, D)


# ----------------------------------------------------------------------- 2. ViT with visual prompts

PATCH = 16  # pixels along the side of one image token


@dataclass(frozen=True)
class ViTConfig:
    """The size of a pose model. The defaults are the values of the public ViTPose models."""
    dim: int                  # D
    depth: int                # transformer blocks
    heads: int
    drop_path: float          # of the last block; it grows linearly from 0 at the first
    prompts: int              # n, VLPose's visual prompts: the paper's number, but for tiny
    layer_decay: float        # the learning rate's factor from one trained block to the one below
    image_size: tuple[int, int] = (256, 192)  # height, width in pixels
    decoder_dim: int = 256    # C of the classic decoder; 0 is the simple decoder, without channels
    sigma: float = 2.0        # of the Gaussians in its heatmaps, in heatmap pixels
    conv_stem: bool = False   # small convolutions in place of the patch embedding
    trunk: str = ""           # a network of torchvision, such as "resnet101", in place of the ViT


VIT_CONFIGS = {  # dim, depth, heads, drop_path, prompts, layer_decay
    # `tiny` is ours. Its convolutional stem learns in minutes from nothing, a patch does not.
    "tiny": ViTConfig(128, 4, 4, 0.0, 10, 1.0,
                      image_size=(128, 96), decoder_dim=64, sigma=1.25, conv_stem=True),
    "small": ViTConfig(384, 12, 12, 0.1, 50, 0.8),
    "base": ViTConfig(768, 12, 12, 0.3, 20, 0.75),
    "large": ViTConfig(1024, 24, 16, 0.5, 10, 0.8),
    "huge": ViTConfig(1280, 32, 16, 0.55, 5, 0.85),
}


class ViT(nn.Module):
    """A vision transformer without class token, ViTPose's backbone (arXiv 2204.12484)."""

    def __init__(self, config):
        super().__init__()
        height, width = config.image_size
        self.grid = (height // PATCH, width // PATCH)
        if config.conv_stem:
            self.patch_embed = conv_stem(config.dim)
        else:
            # Padding 2, as in the released ViTPose: a token begins two pixels further left and up.
            self.patch_embed = nn.Conv2d(3, config.dim, PATCH, stride=PATCH, padding=2)
        num_tokens = self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, config.dim))  # (1, N, D)
        self.blocks = nn.ModuleList()
        for i in range(config.depth):
            drop_path = config.drop_path * i / max(config.depth - 1, 1)
            self.blocks.append(Block(config.dim, config.heads, drop_path=drop_path))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        # Whether the backward pass computes a block anew instead of remembering what was inside.
        self.checkpointing = False
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, images, prompts=None):
        """Images (B, 3, H, W) -> features (B, D, H/16, W/16).

        prompts (depth, n, D): learnable tokens that stand before the image's tokens in each block
            (visual prompt tuning, arXiv 2203.12119).
        """
        x = self.patch_embed(images)                          # (B, D, H/16, W/16)
        x = x.flatten(2).transpose(1, 2).contiguous()         # (B, N, D), one row per token
        x = x + self.pos_embed                                # (B, N, D)
        n = 0 if prompts is None else prompts.shape[1]
        for i, block in enumerate(self.blocks):
            if n:
                P = prompts[i].expand(len(x), -1, -1)         # (B, n, D)
                x = torch.cat([P, x], dim=1)                  # (B, n + N, D)
            # Prompts help for one block: the next block has its own.
            if self.checkpointing:
                x = checkpoint(block, x, n, use_reentrant=False)
            else:
                x = block(x, n)                               # (B, N, D)
        x = self.norm(x)                                      # (B, N, D)
        return x.transpose(1, 2).unflatten(2, self.grid)      # (B, D, H/16, W/16)


def conv_stem(dim):
    """Four 3×3 convolutions of stride 2: images (B, 3, H, W) -> (B, D, H/16, W/16).

    A patch embedding does the same in one step of 16×16 pixels.
    """
    layers = []
    for c_in, c_out in [(3, 16), (16, 32), (32, 64)]:
        convolution = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1)
        layers += [convolution, nn.GroupNorm(8, c_out), nn.GELU()]
    return nn.Sequential(*layers, nn.Conv2d(64, dim, 3, stride=2, padding=1))


# -------------------------------------------------------------------------------- 3. the pose model

def deconv_block(c_in, c_out):
    """Doubles the resolution; one of the two blocks of ViTPose's classic decoder (figure 3a)."""
    deconvolution = nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1, bias=False)
    return nn.Sequential(deconvolution, nn.BatchNorm2d(c_out), nn.ReLU())


class HeatmapHead(nn.Module):
    """The decoder of features (B, D, H/16, W/16): two blocks B₁, B₂ and a predictor, in turn.

    Classic: two deconvolution blocks and a 1×1 convolution.
    Simple (0 channels): ReLU, bilinear ×4, and a 3×3 convolution.
    """

    def __init__(self, dim, channels, num_keypoints):
        super().__init__()
        if channels:
            self.block1 = deconv_block(dim, channels)
            self.block2 = deconv_block(channels, channels)
            self.predictor = nn.Conv2d(channels, num_keypoints, 1)
        else:
            self.block1 = nn.ReLU()
            self.block2 = nn.Upsample(scale_factor=4, mode="bilinear")
            self.predictor = nn.Conv2d(dim, num_keypoints, 3, padding=1)
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.predictor.bias)


class PoseModel(nn.Module):
    """Top-down pose estimator: images (B, 3, H, W) -> heatmaps (B, K, H/4, W/4).

    Images are normalised and show one person each. With a transformer this model is ViTPose (arXiv
    2204.12484), with a ResNet it is Simple Baselines (arXiv 1804.06208).
    skeleton: the keypoints' names and more (data.py), kept with the weights. 17 are COCO's.
    """

    def __init__(self, config, num_keypoints=17, skeleton=None):
        super().__init__()
        self.config = config
        self.num_keypoints = num_keypoints
        self.skeleton = skeleton or known_skeleton(num_keypoints)
        self.backbone = TorchvisionBackbone(config) if config.trunk else ViT(config)
        self.head = HeatmapHead(config.dim, config.decoder_dim, num_keypoints)

    def forward(self, images):
        return self.predictor(self.features(images))

    def features(self, images):
        """What the predictor makes heatmaps of: (B, C, H/4, W/4)."""
        E = self.backbone(images)  # (B, D, H/16, W/16)
        return self.head.block2(self.head.block1(E))

    @property
    def predictor(self):
        return self.head.predictor


# ----------------------------------------------------------------------------- 4. CLIP's text tower

class QuickGELU(nn.Module):
    """The approximation of GELU that OpenAI's CLIP was trained with."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


@dataclass(frozen=True)
class CLIPTextConfig:
    width: int
    heads: int
    layers: int
    embed_dim: int  # D_text, the width of the space that CLIP shares between text and images
    vocab_size: int = 49408
    context_length: int = 77
    activation: type = QuickGELU  # LAION's CLIPs were trained with nn.GELU


class CLIPText(nn.Module):
    """CLIP's text encoder (arXiv 2103.00020): token ids (B, 77) -> T (B, D_text).

    T is projected into the space that CLIP shares with images, and not normalised.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.width
        self.token_embed = nn.Embedding(config.vocab_size, width)
        self.pos_embed = nn.Parameter(torch.empty(config.context_length, width))
        self.blocks = nn.ModuleList()
        for _ in range(config.layers):
            block = Block(width, config.heads, eps=1e-5, activation=config.activation, causal=True)
            self.blocks.append(block)
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Parameter(torch.empty(width, config.embed_dim))
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)
        nn.init.normal_(self.projection, std=width ** -0.5)

    def forward(self, tokens, per_token=False):
        """With `per_token`: T (B, 77, D_text) of every token, and a mask (B, 77).

        The mask is True from a text's start to its end.
        """
        length = tokens.shape[1]
        x = self.token_embed(tokens) + self.pos_embed[:length]  # (B, 77, width)
        for block in self.blocks:
            x = block(x)
        T = self.norm(x) @ self.projection                      # (B, 77, D_text)
        end = tokens.argmax(dim=1)  # (B,) where the text ends: no id is higher than the end token's
        if per_token:
            places = torch.arange(length, device=tokens.device)
            return T, places <= end[:, None]
        return T[torch.arange(len(T)), end]  # attention is causal: only the end token has seen all


@torch.no_grad()
def encode_sentences(clip_text, sentences, per_token=False):
    """Sentences -> {sentence: T (L, D_text)}. The tower is frozen: each sentence is encoded once.

    L is 1: the feature of the end token, which stands for the whole sentence. With `per_token`, L
    is the number of the sentence's tokens, start and end included.
    """
    tokens = CLIPTokenizer()(sentences, truncate=True).to(clip_text.projection.device)  # (n, 77)
    features = []
    for part in tokens.split(256):  # not all at once, for memory's sake
        if per_token:
            T, mask = clip_text(part, per_token=True)  # (256, 77, D_text), (256, 77)
            features += [one[real] for one, real in zip(T, mask)]
        else:
            features += clip_text(part)[:, None]       # (256, 1, D_text)
    return dict(zip(sentences, features))


def text_inputs(sentences, texts):
    """What a model gets after the images: (T, mask) of each image's sentence; () without texts.

    T is (B, L, D_text), where L is the longest sentence's. The mask (B, L) is True for tokens and
    False for padding; it is None if nothing is padding.
    texts: {sentence: T (L, D_text)} from `encode_sentences`, or None.
    """
    if texts is None:
        return ()
    features = [texts[sentence] for sentence in sentences]
    T = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
    lengths = torch.tensor([len(feature) for feature in features])
    if lengths.min() == lengths.max():
        return T, None
    mask = torch.arange(T.shape[1]) < lengths[:, None]  # (B, L)
    return T, mask.to(T.device)


# -------------------------------------------------------------------------- 5. the relation matcher

MATCHERS = ("concat", "image")


class RelationMatcher(nn.Module):
    """How the image relates to the text (§3.2): E (B, N, D), T (B, L, D_text) -> R (B, N, D).

        T' = Linear(T)                           text features as wide as image tokens
        q = W_q E,   [k, v] = W_kv [E ; T']      every image token asks image and text tokens
        M = dropout(softmax(q kᵀ / √d))          d = D / heads; a token's weight for another one
        R = LayerNorm(E + W_o (M v))             the weighted mean, added to the image token

    [E ; T'] puts L text tokens behind N image tokens. Dropout (0.1) is active only in training.
    With the decoders `injector` and `dual` R starts at 0: see `VLPose.initialize`.
    variant: `concat` is the paper's. `image` takes keys and values only from E, without text.
    mask (B, L): True for text tokens, False for padding, see `text_inputs`.
    """

    def __init__(self, dim, text_dim, heads=8, variant="concat"):
        super().__init__()
        if variant not in MATCHERS:
            raise ValueError(f"matcher: expected one of {', '.join(MATCHERS)}, not {variant!r}")
        self.heads = heads
        self.variant = variant
        self.p = 0.1  # of dropout
        if variant == "concat":
            self.text = nn.Linear(text_dim, dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, E, T, mask=None):
        if self.variant == "concat":
            context = torch.cat([E, self.text(T)], dim=1)     # [E ; T'] (B, N + L, D)
        else:
            context = E
            mask = None
        if mask is not None:
            mask = F.pad(mask, (E.shape[1], 0), value=True)   # (B, N + L): no padding in the image
            mask = mask[:, None, None]                        # (B, 1, 1, N + L)

        q = split_heads(self.query(E), self.heads)            # (B, heads, N, d)
        k, v = self.key_value(context).chunk(2, dim=-1)       # (B, N + L, D) each
        k = split_heads(k, self.heads)                        # (B, heads, N + L, d)
        v = split_heads(v, self.heads)                        # (B, heads, N + L, d)
        # M v, where M (B, heads, N, N + L) is dropout(softmax(q kᵀ / √d))
        dropout = self.p if self.training else 0.0
        Mv = F.scaled_dot_product_attention(q, k, v, mask, dropout)  # (B, heads, N, d)
        return self.norm(E + self.out(merge_heads(Mv)))       # R (B, N, D)


# ---------------------------------------------------------------------------------------- 6. VLPose

# Each decoder with what it trains beside prompts and predictor: `matcher` computes R, `blocks` are
# A₁ and A₂.
# Another decoder is a line here and a branch in `decode`, a little further down; and a branch in
# `initialize`, if its training starts in a way of its own.
DECODERS = {
    "baseline": (),
    "injector": ("matcher",),
    "extractor-injector": ("matcher", "blocks"),
    "dual": ("matcher", "blocks"),
    "dual-released": ("matcher", "blocks"),
}


class VLPose(nn.Module):
    """A frozen pose model and the adapter around it.

    Frozen:  the base's parameters (`requires_grad_(False)` below); its BatchNorm statistics and its
             drop path, which is off (`train` keeps the base in evaluation mode); and, outside,
             CLIP's text tower (`encode_sentences`).
    Trained: the prompts P; the matcher; A₁ and A₂, two blocks beside the base's B₁ and B₂; the
             predictor, which starts as a copy of the base's (the base keeps its own).

    The shapes for ViTPose-B, 17 keypoints, one sentence:
      images B×3×256×192 -> patches B×768×16×12 -> tokens B×(20+192)×768 (20 prompts)
        -> E B×768×16×12
      sentence -> T B×1×512 -> T' B×1×768;  attention B×8×192×193 -> R B×768×16×12
      E, R -> m₁ B×256×32×24 -> m₂ B×256×64×48 -> heatmaps B×17×64×48

    base: a PoseModel, which becomes part of this one. With the simple decoder it serves the decoder
        `baseline` only; with a ResNet it takes no prompts.
    text_dim: D_text.
    decoder: one of DECODERS; `decode` has their equations. `dual` is the paper's.
    num_prompts: n, by default the paper's for a model of this size.
    matcher: the variant of the RelationMatcher.
    rank: of the `LowRank` updates, one for each weight of the base but its predictor's. The updates
        are trained, the weights stay frozen. 0 makes no updates, as in the paper.
    Raises ValueError if this base cannot have this decoder, matcher or number of prompts.
    """

    def __init__(self, base, text_dim, decoder="dual", num_prompts=None, matcher="concat", rank=0):
        super().__init__()
        config = base.config
        check_adapter(config, decoder, num_prompts)
        n = config.prompts if num_prompts is None else num_prompts
        self.config = config
        self.decoder = decoder
        self.num_keypoints = base.num_keypoints
        self.skeleton = base.skeleton
        self.reads_text = reads_text(decoder, matcher)
        self.options = dict(text_dim=text_dim, decoder=decoder, num_prompts=n, matcher=matcher,
                            rank=rank)
        self.base = base.requires_grad_(False)
        self.prompts = nn.Parameter(torch.empty(config.depth, n, config.dim))
        nn.init.trunc_normal_(self.prompts, std=0.02)
        if "matcher" in DECODERS[decoder]:
            self.matcher = RelationMatcher(config.dim, text_dim, variant=matcher)
        if "blocks" in DECODERS[decoder]:
            self.auxiliary1 = deconv_block(config.dim, config.decoder_dim)          # A₁
            self.auxiliary2 = deconv_block(config.decoder_dim, config.decoder_dim)  # A₂
        self.predictor = copy.deepcopy(base.head.predictor).requires_grad_(True)
        self.updates = new_updates(base, rank)
        self.initialize()
        self.train()

    def initialize(self):
        """Training starts near the original model: our choice, since the paper does not say.

        `dual-released` starts as the released code: with tiny weights, which BatchNorm scales up.
        So A₁ and A₂ act at full strength from the first step.
        """
        if self.decoder == "dual-released":
            for block in (self.auxiliary1, self.auxiliary2):
                nn.init.normal_(block[0].weight, std=0.001)
            return
        if self.decoder in ("injector", "dual"):
            nn.init.zeros_(self.matcher.norm.weight)           # R = 0: at first B₁ sees E alone
        if self.decoder in ("extractor-injector", "dual"):
            nn.init.constant_(self.auxiliary2[1].weight, 0.1)  # A₂ adds little at first

    def decode(self, E, R):
        """E and R (B, D, H/16, W/16) -> m₂ (B, C, H/4, W/4). Without a matcher, R is None.

        B₁, B₂ are the frozen blocks of the base's classic decoder, A₁, A₂ the trained auxiliary
        blocks beside them. Each doubles the resolution: m₁ and a₁ are (B, C, H/8, W/8).
        """
        B1 = self.base_part("head.block1")
        B2 = self.base_part("head.block2")
        if self.decoder == "baseline":            # figure 3a
            return B2(B1(E))                      #   m₂ = B₂(B₁(E))
        if self.decoder == "injector":            # figure 3b
            return B2(B1(E + R))                  #   m₂ = B₂(B₁(E + R))

        A1 = self.auxiliary1
        A2 = self.auxiliary2
        if self.decoder == "extractor-injector":  # figure 3c
            m1 = B1(E)                            #   m₁ = B₁(E)
            a1 = A1(R)                            #   a₁ = A₁(R)
            return B2(m1) + A2(a1 + m1)           #   m₂ = B₂(m₁) + A₂(a₁ + m₁)
        if self.decoder == "dual":                # figure 3d, the paper's full model
            m1 = B1(E + R)                        #   m₁ = B₁(E + R)
            a1 = A1(R)                            #   a₁ = A₁(R)
            return B2(m1) + A2(a1 + m1)           #   m₂ = B₂(m₁) + A₂(a₁ + m₁)
        if self.decoder == "dual-released":       # the released code's `first_amiddle_last_add`
            m1 = B1(E + R) + A1(E)                #   m₁ = B₁(E + R) + A₁(E)
            return B2(m1) + A2(m1)                #   m₂ = B₂(m₁) + A₂(m₁)
        raise NotImplementedError(f"decode has no branch for the decoder {self.decoder!r}")

    def base_part(self, name):
        """The base's `backbone`, `head.block1` or `head.block2`, with its updates, if any."""
        part = self.base.get_submodule(name)
        if not self.updates:  # the paper's model
            return part
        return with_updates(part, name, self.updates)

    def train(self, mode=True):
        """The base stays in evaluation mode: its BatchNorm statistics must not move in training."""
        super().train(mode)
        self.base.eval()
        return self

    def forward(self, images, text=None, mask=None):
        """Images (B, 3, H, W), text (B, L, D_text) -> heatmaps (B, K, H/4, W/4).

        text: T of each image's sentence. Without text an adapter that reads text is off, which
            leaves the original model, `self.base`. An adapter that reads no text is always on.
        mask: see `RelationMatcher`.
        """
        if text is None and self.reads_text:
            return self.base(images)
        return self.predictor(self.features(images, text, mask))

    def features(self, images, text=None, mask=None):
        """What the predictor makes heatmaps of: (B, C, H/4, W/4)."""
        E = self.base_part("backbone")(images, self.prompts)  # (B, D, H/16, W/16)
        R = None
        if "matcher" in DECODERS[self.decoder]:
            tokens = E.flatten(2).transpose(1, 2)             # (B, N, D)
            R = self.matcher(tokens, text, mask)              # (B, N, D)
            R = R.transpose(1, 2).unflatten(2, E.shape[2:])   # (B, D, H/16, W/16)
        return self.decode(E, R)


# === Appendix: a step's heatmaps; skip on a first reading =========================================
#
# Every step of training a pose model, in both methods, begins with one of the first two functions.

from contextlib import contextmanager, nullcontext


@dataclass(frozen=True)
class Compute:
    """How networks compute: the options --bf16 and --accumulate."""
    bf16: bool = False  # in bfloat16, where that is safe
    parts: int = 1      # a batch in so many parts, one after the other, which saves memory


def heatmaps_of_images(model, images, compute, *text):
    """A model's heatmaps (B, K, h, w), in float32, of images (B, 3, H, W), RGB in [0, 1].

    The images are normalised here. The model runs in bfloat16 with `--bf16`, and in parts with
    `--accumulate`. text: T and its mask, for a VLPose.
    """
    def run(images, *text):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=compute.bf16):
            heatmaps = model(normalize(images), *text)
        return (heatmaps.float(),)

    return in_parts(run, model, compute.parts, images, *text)[0]


def heatmaps_and_features(model, images, compute, *text):
    """The same, and the features (B, C, h, w) that the model makes its heatmaps of."""
    def run(images, *text):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=compute.bf16):
            features = model.features(normalize(images), *text)
            heatmaps = model.predictor(features)
        return heatmaps.float(), features.float()

    return in_parts(run, model, compute.parts, images, *text)


def in_parts(run, model, parts, *inputs):
    """Returns run(*inputs), computed in so many parts of the batch: this is `--accumulate`.

    It needs the memory of one part: each part forgets what it would keep for the backward pass, and
    computes it anew there. So a loss of the outputs is a loss of the whole batch, and its gradient
    is that of the whole batch, except that BatchNorm and dropout see the parts.

    run: a function that returns a tuple of tensors (B, ...).
    model: the network that `run` calls.
    parts: how many; there are never more than images. With one part nothing is computed anew.
    inputs: tensors (B, ...), or None for an input that is not there.
    """
    parts = min(parts, len(inputs[0]))  # a part without images would spoil BatchNorm's statistics
    if parts == 1:
        return run(*inputs)

    def split(x):
        if x is None:
            return [None] * parts
        return x.tensor_split(parts)

    def contexts():  # of the first time that a part is computed, and of the second
        return nullcontext(), statistics_stay(model)

    outputs = []
    for part in zip(*[split(x) for x in inputs]):
        outputs.append(checkpoint(run, *part, use_reentrant=False, context_fn=contexts))
    return tuple(torch.cat(pieces) for pieces in zip(*outputs))


@contextmanager
def statistics_stay(model):
    """BatchNorm normalises as before, but its running statistics do not move.

    They have moved already when the part was computed for the first time.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta):
            layer.momentum = momentum


# === Appendix: drop path; skip on a first reading =================================================

class DropPath(nn.Module):
    """In training, each image of x (B, N, D) becomes 0 with probability p, or is divided by 1 - p.

    This is torchvision's StochasticDepth, whose import takes longer than that of all other modules.
    """

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if self.p == 0 or not self.training:
            return x
        ones = x.new_ones(len(x), 1, 1)
        return x * F.dropout(ones, self.p)


# === Appendix: which base can have which adapter; skip on a first reading =========================

def check_adapter(config, decoder, num_prompts):
    """Raises ValueError if a base of this configuration cannot have this decoder and these prompts.

    num_prompts: None is the default, which every base can have.
    """
    if decoder not in DECODERS:
        raise ValueError(f"decoder: expected one of {', '.join(DECODERS)}, not {decoder!r}")
    if decoder != "baseline" and not config.decoder_dim:
        raise ValueError(f"decoder {decoder!r} needs the classic decoder; this base has the simple "
                         f"one: 'baseline'")
    if num_prompts and config.trunk:
        raise ValueError(f"the backbone {config.trunk} has no tokens that {num_prompts} prompts "
                         f"could join")


def reads_text(decoder, matcher):
    """Whether an adapter reads text. `baseline` has no matcher, and `image` matches no text."""
    return "matcher" in DECODERS[decoder] and matcher == "concat"


# === Appendix: beyond the paper, updates of the frozen weights; skip on a first reading ===========

class LowRank(nn.Module):
    """W -> W + ΔW: an update of a frozen weight, 0 at first.

    For the matrix W (out, in) of a linear layer, ΔW = B A has a low rank (LoRA, arXiv 2106.09685):
    B (out, rank) and A (rank, in) are far smaller than W. All other weights (convolutions, biases,
    norms) have no A, and B is the whole ΔW.
    """

    def __init__(self, W, rank):
        super().__init__()
        if W.ndim == 2:
            self.A = nn.Parameter(torch.randn(rank, W.shape[1]) / W.shape[1] ** 0.5)
            self.B = nn.Parameter(torch.zeros(W.shape[0], rank))
        else:
            self.A = None
            self.B = nn.Parameter(torch.zeros(W.shape))

    def forward(self, W):
        if self.A is None:
            return W + self.B       # ΔW = B
        return W + self.B @ self.A  # ΔW = B A


def new_updates(base, rank):
    """An update for each weight of a PoseModel but its predictor's; no updates for rank 0."""
    updates = nn.ModuleDict()
    if rank:
        for name, W in base.named_parameters():
            if not name.startswith("head.predictor"):  # VLPose trains a copy of it
                updates[update_name(name)] = LowRank(W, rank)
    return updates


def update_name(name):
    return name.replace(".", "-")  # a ModuleDict's names have no dots


def with_updates(part, part_name, updates):
    """A copy of a part of the base, with W + ΔW in place of each weight W.

    A copy, because the base stays as it is. `copy.deepcopy` keeps a table of what it has copied
    already (id of the original -> its copy). Where the table has W + ΔW for W beforehand, deepcopy
    takes that: no weight is copied, and gradients reach the updates.
    """
    copied = {}
    for name, W in part.named_parameters():
        update = updates[update_name(f"{part_name}.{name}")]
        copied[id(W)] = update(W)
    return copy.deepcopy(part, copied)


# === Appendix: other backbones; skip on a first reading ===========================================

from collections import OrderedDict
from dataclasses import replace

TRUNKS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152",
          "swin_t", "swin_s", "swin_b")
TRUNK_CONFIG = ViTConfig(dim=256, depth=0, heads=0, drop_path=0.0, prompts=0, layer_decay=1.0)
MODEL_CONFIGS = dict(VIT_CONFIGS)  # name -> configuration of every model that can be made
MODEL_CONFIGS.update({trunk: replace(TRUNK_CONFIG, trunk=trunk) for trunk in TRUNKS})


class TorchvisionBackbone(nn.Module):
    """A ResNet or Swin of torchvision in place of `ViT`.

    Images (B, 3, H, W) -> features (B, 256, H/16, W/16). It has no tokens that prompts could join.
    Its body ends at H/32, so that there are three deconvolutions, as in Simple Baselines (arXiv
    1804.06208).
    """

    def __init__(self, config):
        super().__init__()
        import torchvision  # only where it is needed, because it takes long

        classifier = torchvision.models.get_model(config.trunk)
        layers = OrderedDict()
        for name, layer in classifier.named_children():
            if name == "avgpool":  # here begins the classification
                break
            layers[name] = layer
        self.body = nn.Sequential(layers)  # (B, C, H/32, W/32)
        last = list(classifier.modules())[-1]  # the linear layer that reads the body's C channels
        self.up = deconv_block(last.in_features, config.dim)

    def forward(self, images, prompts=None):  # prompts is as in `ViT.forward`, but has no tokens
        return self.up(self.body(images))     # (B, D, H/16, W/16)


# === Appendix: finding and fetching files of weights; skip on a first reading =====================

import csv
import errno
import hashlib
import http.client
import math
import os
import re
import shutil
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError

from data import (DataError, cache_folder, check_regular, expecting, not_written, progress,
                  read_json)


class WeightsError(DataError):
    """Weights that cannot be had, read or used.

    The message is one line: the file, what was expected, what was found.
    """


@dataclass(frozen=True)
class PublicFile:
    """A row of assets/weights.csv: a file that others have published."""
    address: str
    digest: str = ""    # the first digits of its SHA-256, or after "md5:" of its MD5; "" if unknown
    skeleton: str = ""  # of a pose model; one of data.SKELETONS
    mirror: str = ""    # a second address of the same file


def read_addresses():
    """{name: PublicFile}."""
    files = {}
    path = Path(__file__).parent / "assets" / "weights.csv"
    with open(path, newline="", encoding="utf-8") as table:
        for row in csv.DictReader(table):
            name = row.pop("name")
            files[name] = PublicFile(**row)
    return files


PUBLIC_FILES = read_addresses()
# The public files of networks that find people, for `eval.py --detect`.
DETECTORS = ("keypointrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2",
             "fasterrcnn_mobilenet_v3_large_fpn")


def load_weights(path_or_name):
    """{name: tensor} from a safetensors file, a PyTorch checkpoint or a TorchScript archive.

    Nothing in the file is executed. A state dict that is nested in a checkpoint is unwrapped.
    Raises WeightsError if the file holds no state dict.
    """
    path = find_file(path_or_name)
    contents = read_file(path)         # plain containers and tensors: see the next appendix
    return tensors_of(contents, path)  # its state dict


def split_choice(path_or_name):
    """("file.pth", "ap10k") of "file.pth#ap10k", and ("file.pth", "") of "file.pth".

    What stands after # says what the file does not say: see `load_model` and `load_clip_text`.
    """
    text = str(path_or_name)
    if "#" not in text or Path(text).exists():
        return path_or_name, ""
    source, _, choice = text.rpartition("#")
    return source, choice


def find_file(path_or_name):
    """The path of a file, given its path, a run's folder, or the name of a public file.

    Raises WeightsError if there is no such file.
    """
    if path_or_name in PUBLIC_FILES:
        return fetch(path_or_name)
    path = Path(path_or_name)
    if path.is_dir():  # a run's
        for model in (path / "model.pth", path / "teacher.pth"):
            if model.is_file():
                return model
        found = ", ".join(sorted(file.name for file in path.glob("*.pth")))
        raise WeightsError(f"{path}: expected the folder of a finished run, with model.pth or "
                           f"teacher.pth, found {found or 'no models'}")
    if not path.is_file():
        raise WeightsError(f"{path_or_name}: no such file, nor the name of public weights such as "
                           f"vitpose-b")
    return path


def fetch(name):
    """The path of a public file in the cache folder, where it is fetched to when first needed.

    Where its checksum is published, it is tested every time, so that a file which was put there by
    hand is as safe.
    Raises WeightsError if the file cannot be fetched or is another one, and DataError if the cache
    folder cannot be written.
    """
    file = PUBLIC_FILES[name]
    path = cache_folder() / "weights" / (name.replace("/", "-") + Path(file.address).suffix)
    if not path.exists():
        fetch_from_any(file.address, file.mirror, path, file.digest)
    elif not has_digest(path, file.digest):
        raise WeightsError(f"{path}: expected {file.address}, whose {in_words(file.digest)}, found "
                           f"another file; remove it, and the next run fetches it anew")
    return path


# --------------------------------------------------------------------------------------- downloads

TIMEOUT = 30  # seconds without a byte from the server
CHUNK = 1_000_000  # bytes that are written at once
HUGGING_FACE = "https://huggingface.co/"


def fetch_from_any(address, mirror, path, digest):
    """Fetches a file from an address, or else from its mirror, a second address that may be ""."""
    asked = at_endpoint(address)
    try:
        download(address, path, digest)
    except (OSError, http.client.HTTPException, WeightsError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise not_written(path, error.strerror) from None
        message = f"{path.name}: cannot fetch {asked} ({error})"
        if not mirror:
            raise WeightsError(f"{message}; by hand, put it at {path}") from None
        print(f"{message}; trying {mirror}", file=sys.stderr)
        fetch_from_any(mirror, "", path, digest)


def download(address, path, digest):
    """Fetches a file. It is at `path` only when it is whole and has the digest.

    What a broken connection has left stays as PATH.part, and the next download goes on there. A
    part older than a minute was left by a killed program, and is used as well.
    """
    part = path.with_name(f"{path.name}.part")
    # no other program writes to this file
    own = path.with_name(f"{path.name}.part{os.getpid()}-{time.time_ns()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        own.touch()
    except OSError as error:
        why = f"{error.strerror}; POSEBRIDGE_HOME names another folder"
        raise not_written(path, why) from None
    try:
        for left in path.parent.glob(f"{path.name}.part*"):
            with suppress(OSError):  # another program has just taken it, or has it open
                if left == part or time.time() - left.stat().st_mtime > 2 * TIMEOUT:
                    os.replace(left, own)
        start = own.stat().st_size
        found = receive(address, own)
        digest = digest or found
        if start and not digest:  # nothing tells whether both pieces are of the same file
            own.write_bytes(b"")
            receive(address, own)
        if not has_digest(own, digest):
            own.unlink()
            raise WeightsError(f"expected a file whose {in_words(digest)}, found another one")
        os.replace(own, path)
    finally:
        if own.exists() and own.stat().st_size:
            os.replace(own, part)
        own.unlink(missing_ok=True)


def receive(address, file):
    """Appends to a file what it lacks of the file at an address.

    Returns the SHA-256 that Hugging Face's server says the whole file has, "" if it says none.
    Raises OSError if the connection breaks, or if the server sends a web page instead.
    """
    start = file.stat().st_size
    redirects = HuggingFaceRedirects()
    request = huggingface_request(address)
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        answer = urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416 or not start:  # 416: no such range, as the file has another length
            raise
        file.write_bytes(b"")
        return receive(address, file)
    with answer:
        if answer.headers.get_content_type() == "text/html":
            raise OSError("expected a file of weights, found a web page, perhaps to log in")
        is_rest = (answer.headers["Content-Range"] or "").startswith(f"bytes {start}-")
        if not is_rest:  # the server knows no ranges, and sends all
            start = 0
        length = int(answer.headers["Content-Length"] or 0)
        what = f"{request.full_url}: megabytes fetched"
        with open(file, "ab" if is_rest else "wb") as stream:
            for _ in progress(range(math.ceil(length / CHUNK)), what):
                stream.write(answer.read(CHUNK))
            if not length:  # the server does not say it
                shutil.copyfileobj(answer, stream)
    received = file.stat().st_size - start
    if length and received != length:
        raise OSError(f"the connection broke after {received:,} of {length:,} bytes; "
                      "the next try goes on there")
    return redirects.digest


class HuggingFaceRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and keeps the SHA-256 that Hugging Face's servers send with them."""
    digest = ""

    def redirect_request(self, request, answer, code, message, headers, address):
        self.digest = headers.get("X-Linked-Etag", self.digest).strip('"')
        return super().redirect_request(request, answer, code, message, headers, address)


def huggingface_request(address):
    """A request for an address. For Hugging Face, HF_ENDPOINT and HF_TOKEN count as in its tools.

    The token stays with that server: it does not follow redirects.
    """
    request = urllib.request.Request(at_endpoint(address), headers={"User-Agent": "posebridge"})
    token = os.environ.get("HF_TOKEN", "").strip()
    if token and address.startswith(HUGGING_FACE):
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    return request


def at_endpoint(address):
    """An address of Hugging Face at HF_ENDPOINT, where this is set; another address as it is."""
    endpoint = os.environ.get("HF_ENDPOINT", "").strip() or HUGGING_FACE
    if not address.startswith(HUGGING_FACE):
        return address
    if not endpoint.startswith(("https://", "http://")):
        raise WeightsError(f"HF_ENDPOINT: expected an address such as {HUGGING_FACE}, "
                           f"found {endpoint}")
    return address.replace(HUGGING_FACE, endpoint.rstrip("/") + "/", 1)


def has_digest(path, digest):
    """Whether a file has a digest: see `PublicFile`. Every file has the empty one."""
    if not digest:
        return True
    algorithm = "md5" if digest.startswith("md5:") else "sha256"
    with open(path, "rb") as stream:
        found = hashlib.file_digest(stream, algorithm).hexdigest()
    return found.startswith(digest.removeprefix("md5:"))


def in_words(digest):
    """"MD5 begins 8cad7c", for messages."""
    algorithm = "MD5" if digest.startswith("md5:") else "SHA-256"
    return f"{algorithm} begins {digest.removeprefix('md5:')}"


# -------------------------------------------------------------- the state dict in what a file holds

def tensors_of(contents, path):
    """{name: tensor} of the state dict in what a file holds, without gradients.

    Raises WeightsError if there is none, if a value is not a tensor, or if a tensor claims more
    data than the file has; and for a file of ours that is not a model, or of another version.
    """
    tensors = {}
    with expecting(path, "a state dict", WeightsError):
        check_kind(contents, path)
        for name, tensor in unwrap(contents).items():
            if isinstance(tensor, dict):
                raise WeightsError(f"{path}: expected one state dict, found {name!r:.60} beside "
                                   f"others; save {name!r:.60} alone")
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                raise WeightsError(f"{path}: expected a state dict; {name!r:.60} is not a tensor "
                                   f"but a {type(tensor).__name__}")
            if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
                raise WeightsError(f"{path}: tensor {name} of shape {list(tensor.shape)} is "
                                   f"larger than its data")
            tensors[name] = tensor.detach()
    if not tensors:
        raise WeightsError(f"{path}: expected a state dict, found no tensors")
    return without_wrapper(tensors)


def check_kind(contents, path):
    """Raises WeightsError for a run's checkpoint, and for a file of another version of ours."""
    if {"stage", "history", "optimizer", "code"} <= contents.keys():
        raise WeightsError(f"{path}: expected a model, found a checkpoint, from which "
                           "`train.py --resume` goes on")
    found = contents.get("format", FORMAT)
    if isinstance(found, str) and found.startswith("posebridge") and found != FORMAT:
        raise WeightsError(f"{path}: expected the format {FORMAT}, found {found}, which another "
                           "version of PoseBridge has written")


def unwrap(contents):
    """The state dict in a checkpoint; the contents themselves if they are not nested."""
    # "student" is in files of the alignment's authors, "base" in our own
    keys = ["state_dict", "model", "model_state_dict", "net", "student", "base"]
    if "base" not in contents:
        keys.append("adapter")              # a file of ours may hold an adapter alone
    for key in keys:
        if isinstance(contents.get(key), dict):
            return contents[key]
    return contents


def said_beside(path, section, key):
    """What config.json beside a file, as Hugging Face has them, says of a key; None if nothing.

    section: the part of config.json that has the key; without that part, it has the key itself.
    """
    file = Path(path).parent / "config.json"
    if not file.is_file():
        return None
    config = read_json(file, dict, "Hugging Face's description of a model")
    part = config.get(section)
    return (part if isinstance(part, dict) else config).get(key)


# What programs that wrap a model put before the names of all its tensors: DataParallel's module,
# torch.compile's _orig_mod, and the usual attributes of Lightning's modules and of running averages
WRAPPERS = re.compile(r"((module|_orig_mod|model|net|ema|ema_model)\.)+")


def without_wrapper(tensors):
    """The tensors without the prefix of a wrapper, if all names have the same one."""
    prefix = WRAPPERS.match(next(iter(tensors)))
    if not prefix or not all(name.startswith(prefix[0]) for name in tensors):
        return tensors
    return {name.removeprefix(prefix[0]): tensor for name, tensor in tensors.items()}


# === Appendix: reading files without executing them; skip on a first reading ======================

# A file of weights may come from anybody. So the four forms that such files have are taken apart
# here: nothing in a file is executed, and nothing that it says about its size is believed.

import io
import json
import mmap
import pickle
import warnings
import zipfile
from functools import cache

LARGEST_HEADER = 100_000_000  # bytes of a safetensors file, as its library allows
LARGEST_CODE = 10_000_000  # bytes of code in an archive of torch.jit.save, unpacked


def read_file(path):
    """What a file of weights holds: {name: tensor}, or a checkpoint with a state dict in it.

    The file has one of four forms: safetensors, a zip archive of torch.save or of torch.jit.save,
    or a file of torch.save from before torch 1.6.
    Raises WeightsError if it is damaged or of another kind.
    """
    with expecting(path, "an undamaged safetensors or PyTorch file", WeightsError):
        check_regular(path)
        with open(path, "rb") as file:
            start = file.read(9)
        is_safetensors = start[8:] == b"{"  # 8 bytes of length, then JSON
        is_zip = start.startswith(b"PK\x03\x04")
        if is_safetensors:
            return read_safetensors(path)
        if is_zip:
            check_zip(path)
        # Torch itself reads plain containers and tensors without executing anything. It refuses
        # files with anything else in them, such as a program's options: these are read below.
        with suppress(Exception), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
        if is_zip:
            return read_zip(path)
        return read_legacy(path)


# -------------------------------------------------------------------------------------- safetensors

DTYPES = {  # as safetensors calls them -> torch's
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors(path):
    """The tensors of a safetensors file.

    The file holds the length of a header (8 bytes), the header (JSON), and the tensors side by
    side. The header says for each tensor where it begins and ends, its shape and its data type.
    """
    header, header_end = read_header(path)
    size = os.path.getsize(path)
    data = torch.from_file(str(path), size=size, dtype=torch.uint8)  # mapped into memory, not read
    data = data[header_end:]

    tensors = {}
    end = 0  # of the tensor before
    for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
        first, last = header[name]["data_offsets"]
        shape = header[name]["shape"]
        dtype = DTYPES[header[name]["dtype"]]
        nbytes = math.prod(shape) * dtype.itemsize
        is_side_by_side = first == end and last <= len(data)
        is_right_size = last - first == nbytes and min(shape, default=0) >= 0
        if not is_side_by_side or not is_right_size:
            raise WeightsError(f"{path}: expected tensor {name} ({nbytes} bytes) after byte {end} "
                               f"of {len(data)}, found it at {first} to {last}")
        tensors[name] = data[first:last].clone().view(dtype).reshape(shape)
        end = last
    if end != len(data):
        raise WeightsError(f"{path}: expected tensors up to byte {len(data)}, "
                           f"found them up to {end}")
    return tensors


def read_header(path):
    """(the header of a safetensors file, the number of the byte where it ends)."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > min(size, LARGEST_HEADER):
            raise WeightsError(f"{path}: expected a header of {length} bytes, "
                               f"found a file of {size}")
        header = json.loads(file.read(length).decode("utf-8"))
    header.pop("__metadata__", None)  # texts about the file
    return header, 8 + length


# ------------------------------------------------------------------ pickles: what torch.save writes

# A pickle is a program for a small machine, which may call any function. Beside it, torch.save
# writes the storages, which are the numbers of the tensors. In the pickle a tensor is a call:
#     torch._utils._rebuild_tensor_v2(storage, offset, size, stride, ...)
# Nothing is called here. `InertUnpickler` only writes down what the program would call, and
# `inert_tensors` makes the tensors from these notes. Both kinds of torch's files below need them.

STORAGES = {  # as PyTorch's files call the data types -> torch's
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


class Inert(dict):
    """Stands for any object that a pickle describes; the object itself is never made.

    The program looks up a function or a class by name, calls it, and sets attributes of the result.
    Here each name becomes a new subclass of Inert, so that a call only makes an object of it: with
    the arguments in `args`, and later the attributes in `state`. It is a dict, because the program
    may fill the object like one.
    """
    args = ()
    state = None

    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls)
        self.args = args
        return self

    def __init__(self, *args, **kwargs):
        pass  # a dict's own would read the arguments

    def __setstate__(self, state):
        self.state = state

    def append(self, *items):  # the program may fill the object like a list, too
        pass

    extend = append
    add = append  # and like a set

    # The object may be put into a set itself, which a dict may not.
    __eq__ = object.__eq__
    __hash__ = object.__hash__


class InertUnpickler(pickle._Unpickler):
    """Reads a pickle into plain containers and `Inert` objects.

    It builds on the unpickler that is written in Python, since the one in C allocates as much
    memory as a pickle asks for.
    """

    def __init__(self, file):
        super().__init__(file, encoding="latin1")
        self.dtypes = {}  # key of a storage -> its data type

    def find_class(self, module, name):
        """What stands for the function or class of this name."""
        return type(f"{module}.{name}", (Inert,), {})

    def persistent_load(self, pid):
        """What stands for a storage: ("storage", type, key, device, number of elements)."""
        _, storage_type, key, *_ = pid
        self.dtypes[key] = STORAGES[storage_type.__name__]
        return Inert(key)


def inert_tensors(tree, dtypes, read_storage):
    """A checkpoint with the state dict in what an InertUnpickler has read, with its tensors made.

    Beside the state dict there is `meta`, which stays inert: mmpose describes its model in it.
    dtypes: {key of a storage: its data type}. read_storage(key) gives the bytes of a storage; only
    the state dict's storages are read, and not an optimizer's, say.
    """
    @cache  # tensors may share a storage
    def whole_storage(key):
        return torch.frombuffer(bytearray(read_storage(key)), dtype=dtypes[key])

    if type(tree).__name__.startswith("__torch__."):  # a TorchScript module
        tree = dict(scripted_tensors(tree, set()))
    state = unwrap(tree)
    if isinstance(state, Inert) and not state:
        raise ValueError(f"found an object of {type(state).__name__} instead of a state dict")
    tensors = {}
    for name, value in state.items():
        if type(value).__name__ == "torch._utils._rebuild_parameter":
            value = value.args[0]  # the tensor in an nn.Parameter
        if type(value).__name__ == "torch._utils._rebuild_tensor_v2":
            storage, offset, size, stride = value.args[:4]
            key, = storage.args
            value = whole_storage(key).as_strided(size, stride, offset)  # fails beyond the storage
        tensors[name] = value
    return {"state_dict": tensors, "meta": tree.get("meta")}


NUMPY_DTYPES = {"f4": torch.float32, "f8": torch.float64}


def inert_numbers(value):
    """The numbers in a list, or in what an InertUnpickler has made of a NumPy array (n,)."""
    if isinstance(value, Inert):
        _, _, dtype, _, data = value.state
        if isinstance(data, Inert):  # a text, from which Python 2's protocol makes bytes
            data = data.args[0].encode("latin1")
        value = torch.frombuffer(bytearray(data), dtype=NUMPY_DTYPES[dtype.args[0]]).tolist()
    return [float(number) for number in value]


def scripted_tensors(module, seen, prefix=""):
    """Yields (name, Inert) of each tensor in a TorchScript module, an object with attributes.

    seen: the ids of the modules so far, since a hostile file may have circles.
    """
    seen.add(id(module))
    for name, value in module.state.items():
        if type(value).__name__.startswith("torch._utils."):
            yield prefix + name, value
        elif isinstance(value, Inert) and isinstance(value.state, dict) and id(value) not in seen:
            yield from scripted_tensors(value, seen, f"{prefix}{name}.")


# ------------------------------------- zip archives: torch.save since torch 1.6, and torch.jit.save

def check_zip(path):
    """Raises WeightsError if an archive unpacks to much more than its size, or is damaged.

    torch.jit.save compresses its code; all other records must be stored as they are, once each.
    All checksums must be right.
    """
    with zipfile.ZipFile(path) as archive:
        code = 0   # bytes of code, unpacked
        total = 0  # bytes of all other records, unpacked
        is_compressed = False
        for record in archive.infolist():
            if "/code/" in record.filename:
                code += record.file_size
            else:
                total += record.file_size
                is_compressed |= record.compress_type != zipfile.ZIP_STORED
        if is_compressed or total > os.path.getsize(path) or code > LARGEST_CODE:
            raise WeightsError(f"{path}: expected records that are not compressed and do not "
                               "overlap")
        damaged = archive.testzip()
        if damaged:
            raise WeightsError(f"{path}: damaged: another checksum of its record {damaged}")


def read_zip(path):
    """The state dict in a file of torch.save with foreign objects, or in one of torch.jit.save.

    The archive holds a pickle, ARCHIVE/data.pkl, and each storage as a record, ARCHIVE/data/KEY.
    """
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
        folder = pickles[0].removesuffix("data.pkl")
        unpickler = InertUnpickler(io.BytesIO(archive.read(pickles[0])))
        tree = unpickler.load()

        def read_storage(key):
            return archive.read(f"{folder}data/{key}")
        return inert_tensors(tree, unpickler.dtypes, read_storage)


# ---------------------------------------------------------------------- files from before torch 1.6

def read_legacy(path):
    """The state dict in a file from before torch 1.6; mmpose still publishes such files.

    The file holds five pickles (a magic number, a version, the system, the contents, the storages'
    keys), then the storages in a row.
    """
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as file:
        if InertUnpickler(file).load() != torch.serialization.MAGIC_NUMBER:
            raise ValueError("it begins like neither")
        InertUnpickler(file).load()  # the version
        InertUnpickler(file).load()  # the system
        unpickler = InertUnpickler(file)
        tree = unpickler.load()
        keys = InertUnpickler(file).load()
        places = storage_places(file, keys, unpickler.dtypes)

        def read_storage(key):
            return file[places[key]]
        return inert_tensors(tree, unpickler.dtypes, read_storage)


def storage_places(file, keys, dtypes):
    """{key: the slice of the file with this storage}; it is read from the file's position on.

    Before each storage stands its number of elements (8 bytes).
    """
    places = {}
    for key in keys:
        count = int.from_bytes(file.read(8), "little")
        start = file.tell()
        end = start + count * dtypes[key].itemsize
        places[key] = slice(start, end)
        file.seek(end)  # an error beyond the end of the file
    return places


# === Appendix: the names and shapes of public models; skip on a first reading =====================

# Others publish the same networks under other names. `translate` gives their tensors our names, by
# the table LAYOUTS; `vitpose_layout` also reads from the tensors' shapes which size a model has.

# How others call our layers and tensors: their name, our name. {} is the number of a block. Layers
# that have our name already are not listed.
LAYOUTS = {
    "ViTPose's authors": """
        backbone.patch_embed.proj                            backbone.patch_embed
        backbone.blocks.{}.mlp.fc1                           backbone.blocks.{}.mlp.0
        backbone.blocks.{}.mlp.fc2                           backbone.blocks.{}.mlp.2
        backbone.last_norm                                   backbone.norm
        keypoint_head.deconv_layers.0                        head.block1.0
        keypoint_head.deconv_layers.1                        head.block1.1
        keypoint_head.deconv_layers.3                        head.block2.0
        keypoint_head.deconv_layers.4                        head.block2.1
        keypoint_head.final_layer                            head.predictor
    """,
    "mmpose": """
        backbone.patch_embed.projection                      backbone.patch_embed
        backbone.layers.{}.ln1                               backbone.blocks.{}.norm1
        backbone.layers.{}.attn.qkv                          backbone.blocks.{}.attn.qkv
        backbone.layers.{}.attn.proj                         backbone.blocks.{}.attn.proj
        backbone.layers.{}.ln2                               backbone.blocks.{}.norm2
        backbone.layers.{}.ffn.layers.0.0                    backbone.blocks.{}.mlp.0
        backbone.layers.{}.ffn.layers.1                      backbone.blocks.{}.mlp.2
        backbone.ln1                                         backbone.norm
        head.deconv_layers.0                                 head.block1.0
        head.deconv_layers.1                                 head.block1.1
        head.deconv_layers.3                                 head.block2.0
        head.deconv_layers.4                                 head.block2.1
        head.final_layer                                     head.predictor
    """,
    "ViTPose in transformers": """
        backbone.embeddings.position_embeddings              backbone.pos_embed
        backbone.embeddings.patch_embeddings.projection      backbone.patch_embed
        backbone.encoder.layer.{}.layernorm_before           backbone.blocks.{}.norm1
        backbone.encoder.layer.{}.attention.attention.query  backbone.blocks.{}.attn.q
        backbone.encoder.layer.{}.attention.attention.key    backbone.blocks.{}.attn.k
        backbone.encoder.layer.{}.attention.attention.value  backbone.blocks.{}.attn.v
        backbone.encoder.layer.{}.attention.output.dense     backbone.blocks.{}.attn.proj
        backbone.encoder.layer.{}.layernorm_after            backbone.blocks.{}.norm2
        backbone.encoder.layer.{}.mlp.fc1                    backbone.blocks.{}.mlp.0
        backbone.encoder.layer.{}.mlp.fc2                    backbone.blocks.{}.mlp.2
        backbone.encoder.layer.{}.mlp.experts.0              backbone.blocks.{}.mlp.experts.0
        backbone.encoder.layer.{}.mlp.experts.1              backbone.blocks.{}.mlp.experts.1
        backbone.encoder.layer.{}.mlp.experts.2              backbone.blocks.{}.mlp.experts.2
        backbone.encoder.layer.{}.mlp.experts.3              backbone.blocks.{}.mlp.experts.3
        backbone.encoder.layer.{}.mlp.experts.4              backbone.blocks.{}.mlp.experts.4
        backbone.encoder.layer.{}.mlp.experts.5              backbone.blocks.{}.mlp.experts.5
        backbone.layernorm                                   backbone.norm
        head.deconv1                                         head.block1.0
        head.batchnorm1                                      head.block1.1
        head.deconv2                                         head.block2.0
        head.batchnorm2                                      head.block2.1
        head.conv                                            head.predictor
    """,
    "OpenAI's CLIP": """
        token_embedding                                      token_embed
        positional_embedding                                 pos_embed
        transformer.resblocks.{}.ln_1                        blocks.{}.norm1
        transformer.resblocks.{}.attn.in_proj_weight         blocks.{}.attn.qkv.weight
        transformer.resblocks.{}.attn.in_proj_bias           blocks.{}.attn.qkv.bias
        transformer.resblocks.{}.attn.out_proj               blocks.{}.attn.proj
        transformer.resblocks.{}.ln_2                        blocks.{}.norm2
        transformer.resblocks.{}.mlp.c_fc                    blocks.{}.mlp.0
        transformer.resblocks.{}.mlp.c_proj                  blocks.{}.mlp.2
        ln_final                                             norm
        text_projection                                      projection
    """,
    "CLIP in transformers": """
        text_model.embeddings.token_embedding                token_embed
        text_model.embeddings.position_embedding.weight      pos_embed
        text_model.encoder.layers.{}.layer_norm1             blocks.{}.norm1
        text_model.encoder.layers.{}.self_attn.q_proj        blocks.{}.attn.q
        text_model.encoder.layers.{}.self_attn.k_proj        blocks.{}.attn.k
        text_model.encoder.layers.{}.self_attn.v_proj        blocks.{}.attn.v
        text_model.encoder.layers.{}.self_attn.out_proj      blocks.{}.attn.proj
        text_model.encoder.layers.{}.layer_norm2             blocks.{}.norm2
        text_model.encoder.layers.{}.mlp.fc1                 blocks.{}.mlp.0
        text_model.encoder.layers.{}.mlp.fc2                 blocks.{}.mlp.2
        text_model.final_layer_norm                          norm
        text_projection.weight                               projection
    """,
}


def names_in_layouts():
    """{their name: our name} of all publishers; a name is the same layer to all who use it."""
    names = {}
    for layout in LAYOUTS.values():
        for line in layout.strip().splitlines():
            theirs, ours = line.split()
            names[theirs] = ours
    return names


OUR_NAMES = names_in_layouts()
PUBLIC_SIZES = [VIT_CONFIGS[name] for name in ("small", "base", "large", "huge")]
VITPOSE_SIZES = {config.dim: config for config in PUBLIC_SIZES}
# The data sets that ViTPose+ has an expert and a decoder for, in its order -> their skeletons.
EXPERTS = {"coco": "COCO17", "aic": "AIC", "mpii": "MPII", "ap10k": "AP10K", "apt36k": "APT36K",
           "wholebody": "WHOLEBODY"}
# Parts of tensors' names in files that hold no ViTPose -> what the files are.
OTHER_KINDS = {
    "roi_heads.": "a detector of torchvision",
    "features.0": "a classifier of torchvision, which has to be named, such as swin_t",
    "token_embed": "a text tower of CLIP, which --text-weights reads",
    "embeddings.patch_embeddings.": "another ViT of transformers",
    "head_adv.": "a network of RegDA, whose head has several layers",
    "head.cls_x.": "an RTMPose",
    ".branches.": "an HRNet",
    ".cv1.conv.": "a YOLO of ultralytics",
}


def translate(state, path):
    """A state dict under our names, with query, key and value in one tensor.

    Raises WeightsError if two tensors get the same name.
    """
    ours = {}
    for name, tensor in state.items():
        new = our_name(name)
        if new in ours:
            raise WeightsError(f"{path}: tensor {name} is there twice, under another name")
        ours[new] = tensor
    for name in list(ours):
        if ".attn.q." in name:
            q = ours.pop(name)
            k = ours.pop(name.replace(".q.", ".k."))
            v = ours.pop(name.replace(".q.", ".v."))
            ours[name.replace(".q.", ".qkv.")] = torch.cat([q, k, v])
    return ours


def our_name(name):
    """Our name of a tensor: backbone.layers.3.ln1.weight -> backbone.blocks.3.norm1.weight."""
    spellings = [name]
    block = ""
    number = re.search(r"(?<=\.)\d+(?=\.)", name)  # the first one between dots
    if number:
        block = number[0]
        spellings.append(name[:number.start()] + "{}" + name[number.end():])
    for spelling in spellings:
        layer, _, kind = spelling.rpartition(".")  # "backbone.layers.{}.ln1", "weight"
        if spelling in OUR_NAMES:
            return OUR_NAMES[spelling].format(block)
        if layer in OUR_NAMES:
            return OUR_NAMES[layer].format(block) + "." + kind
    return name


def vitpose_layout(state, path, choice=""):
    """(config, tensors under our names, skeleton's name or "") of a public ViTPose or backbone.

    choice: "heads=6", or one of EXPERTS for a file with several; see `load_model`.
    A backbone alone has no decoder. Raises WeightsError if no size of ViTPose has these tensors,
    or if the file does not have what is chosen.
    """
    heads, expert = read_choice(choice, path)
    is_transformers = any(name.startswith("backbone.encoder.layer.") for name in state)
    if heads is None and is_transformers:
        heads = said_beside(path, "backbone_config", "num_attention_heads")
    state, expert = one_decoder(state, expert, path)
    if "pos_embed" in state:  # a backbone alone, perhaps with a classifier
        state = {f"backbone.{name}": tensor for name, tensor in state.items()
                 if not name.startswith("head.")}
    is_mmpose = any(name.startswith("backbone.layers.") for name in state)
    is_timm = "backbone.norm.weight" in state
    state = translate(state, path)
    check_is_vitpose(state, path)
    state.pop("backbone.cls_token", None)
    if "backbone.pos_embed" not in state:
        raise WeightsError(f"{path}: expected a ViTPose or a ViT such as MAE's, found no entry "
                           f"'backbone.pos_embed' but others such as {next(iter(state))!r}")

    positions = state["backbone.pos_embed"]  # (1, N, D), or (1, 1 + N, D) with a class token
    _, count, dim = positions.shape
    grid = token_grid(count)
    if grid is None:
        grid = token_grid(count - 1)
        is_added = not is_mmpose and not is_timm
        state["backbone.pos_embed"] = without_class_token(positions, is_added)
    if dim not in VITPOSE_SIZES or grid is None:
        raise WeightsError(f"{path}: expected a ViTPose, found {count} positions of width {dim}, "
                           f"which none has")
    if expert:
        state = with_expert(state, expert, dim)

    patches = state["backbone.patch_embed.weight"]  # (D, 3, 16, 16)
    if patches.shape[2:] == (14, 14):  # MAE's huge: padded, as ViTPose's authors do
        state["backbone.patch_embed.weight"] = F.pad(patches, (1, 1, 1, 1))

    image_size = (grid[0] * PATCH, grid[1] * PATCH)
    config = replace(VITPOSE_SIZES[dim], depth=count_blocks(state), image_size=image_size)
    if has_decoder(state):
        config = replace(config, decoder_dim=decoder_width(state))
    config = replace(config, heads=number_of_heads(config, heads, state, path))
    return config, state, EXPERTS.get(expert, "")


def read_choice(choice, path):
    """(number of heads or None, one of EXPERTS or "") of what stands after # in a file's name."""
    number = choice.removeprefix("heads=")
    if number != choice and number.isdecimal():
        return int(number), ""
    if choice and choice not in EXPERTS:
        raise WeightsError(f"{path}: expected heads=NUMBER or one of {', '.join(EXPERTS)} "
                           f"after #, found {choice}")
    return None, choice


def number_of_heads(config, heads, state, path):
    """The heads of a ViT: those chosen or in config.json, or if these are None, ViTPose's.

    Nothing in the tensors tells them. Raises WeightsError if nobody knows.
    """
    if heads is None:
        if config.dim == 384 and not has_decoder(state):
            raise WeightsError(f"{path}: a backbone of width 384 has 6 heads (DINO, DeiT, timm) or "
                               f"12 (ViTPose); expected '#heads=6' or '#heads=12' after its name")
        return config.heads
    if not isinstance(heads, int) or heads < 1 or config.dim % heads:
        raise WeightsError(f"{path}: expected a number of heads that divides the width "
                           f"{config.dim}, found {heads}")
    return heads


def one_decoder(state, expert, path):
    """(state dict, expert) with one decoder of a file of ViTPose's authors that has several.

    The file has `keypoint_head` for COCO, `associate_keypoint_heads.0` and so on for the next ones
    of EXPERTS; and ViTPose+ has experts. Their script for splitting a file leaves some of these.
    expert: one of EXPERTS. "" stands for COCO's, and is returned if there is nothing to choose.
    """
    heads = [name for name in state if "associate_keypoint_heads." in name]
    is_shared = any(name.endswith("mlp.fc2.weight") and 4 * len(tensor) < tensor.shape[1]
                    for name, tensor in state.items())  # an expert computes the rest
    if not heads and not is_shared and expert in ("", "coco"):  # a split file has its expert in fc2
        return {name: tensor for name, tensor in state.items() if ".experts." not in name}, expert
    number = list(EXPERTS).index(expert or "coco")
    chosen = f"associate_keypoint_heads.{number - 1}." if number else "keypoint_head."
    if number and not any(name.startswith(chosen) for name in heads):
        raise WeightsError(f"{path}: expected a decoder for {expert} ({chosen}*), found none")
    kept = {}
    for name, tensor in state.items():
        is_decoder = "keypoint_head" in name
        if name.startswith(chosen):
            name = name.replace(chosen, "keypoint_head.")
            if number and "final_layer" in name:  # it may be padded
                tensor = tensor[:len(SKELETONS[EXPERTS[expert]].names)]
        elif is_decoder:
            continue
        kept[name] = tensor
    expert = expert or "coco"
    print(f"{path}: made for several data sets; only {expert}'s part is read, of "
          f"{', '.join(EXPERTS)}, which '#' chooses after the name", file=sys.stderr)
    return kept, expert


def with_expert(state, expert, dim):
    """The state dict of an ordinary ViT of width `dim`, from that of a ViTPose+.

    There the last layer of an MLP computes only the first part of its output. The expert, a linear
    layer as well, computes the rest.
    """
    number = list(EXPERTS).index(expert)
    result = {}
    for name, tensor in state.items():
        if ".experts." in name:
            continue
        last_part = state.get(name.replace(".mlp.2.", f".mlp.experts.{number}."))
        if ".mlp.2." in name and last_part is not None:
            # The last rows of `tensor` are another expert's, or are missing.
            tensor = torch.cat([tensor[:dim - len(last_part)], last_part])
        result[name] = tensor
    return result


def check_is_vitpose(state, path):
    """Raises WeightsError, which says what a file is, if it holds no ViTPose under our names."""
    if "backbone.pos_embed" not in state:
        for part, kind in OTHER_KINDS.items():
            if any(part in name for name in state):
                raise WeightsError(f"{path}: expected a ViTPose, found {kind}")


def without_class_token(positions, is_added):
    """The image tokens' positions (1, N, D) in a table (1, 1 + N, D).

    Row 0 is the class token's. ViTPose's authors add it to every other row, mmpose and timm do not.
    """
    if is_added:
        return positions[:, 1:] + positions[:, :1]
    return positions[:, 1:]


def token_grid(count):
    """(rows, columns) of the tokens of an upright 4:3 image or a square one; None if none fits."""
    for rows, columns in [(4, 3), (1, 1)]:  # MAE's images are square
        k = math.isqrt(count // (rows * columns))
        if rows * k * columns * k == count:
            return rows * k, columns * k
    return None


def count_blocks(state):
    """The number of transformer blocks in a state dict under our names."""
    numbers = set()
    for name in state:
        block = re.match(r"(backbone\.)?blocks\.(\d+)\.", name)
        if block:
            numbers.add(block[2])
    return len(numbers)


def has_decoder(state):
    """Whether a state dict under our names has a decoder beside its backbone."""
    return any(name.startswith("head.") for name in state)


def decoder_width(state):
    """The channels of a classic decoder in a state dict under our names, 0 for a simple decoder."""
    _, channels, kernel, _ = state["head.predictor.weight"].shape
    return channels if kernel == 1 else 0  # the simple decoder's kernel is 3


RESNETS = {  # the number of blocks in layer 3, whether a block has a third convolution -> name
    (2, False): "resnet18",
    (6, False): "resnet34",
    (6, True): "resnet50",
    (23, True): "resnet101",
    (36, True): "resnet152",
}


def resnet_of(state, prefix=""):
    """The name of the ResNet of torchvision that a state dict belongs to, "" if to none.

    prefix: what stands before torchvision's own names.
    """
    layer = f"{prefix}layer3."
    blocks = {name.removeprefix(layer).split(".")[0] for name in state if name.startswith(layer)}
    return RESNETS.get((len(blocks), f"{layer}0.conv3.weight" in state), "")


# Simple Baselines' decoder: the number of a layer among the deconvolutions -> our name.
DECONVOLUTIONS = {
    "0": "backbone.up.0",
    "1": "backbone.up.1",
    "3": "head.block1.0",
    "4": "head.block1.1",
    "6": "head.block2.0",
    "7": "head.block2.1",
}


def simple_baselines_layout(state):
    """The tensors of a ResNet with Simple Baselines' decoder, under our names.

    They may have the names of its authors (arXiv 1804.06208), of mmpose, or of RegDA and those who
    build on it. A network of another kind gives {}.
    """
    ours = {}
    for name, tensor in state.items():
        short = re.sub(r"^((keypoint_)?head\.)?", "", name)
        layer, _, kind = re.sub(r"^(upsampling|deconv_layers)\.", "", short).rpartition(".")
        if short.startswith(("upsampling.", "deconv_layers.")) and layer in DECONVOLUTIONS:
            ours[f"{DECONVOLUTIONS[layer]}.{kind}"] = tensor
        elif short in ("final_layer.weight", "final_layer.bias", "weight", "bias"):
            ours[f"head.predictor.{kind}"] = tensor
        else:
            ours["backbone.body." + short.removeprefix("backbone.")] = tensor
    return ours if {"head.block2.0.weight", "head.predictor.weight"} <= ours.keys() else {}


def without_classifier(state):
    """The tensors of a ResNet or Swin of torchvision, but for its last layer."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(("fc.", "head."))}


# === Appendix: saving and loading models; skip on a first reading =================================

# A model's file holds plain values and tensors: how to build the model, and its state dict. To load
# it, the model is built and filled, and every tensor must fit.

from dataclasses import asdict

import numpy as np

from data import (make_skeleton, processes, skeleton_from, skeleton_named, skeletons_of,
                  written_whole)

FORMAT = "posebridge-1"
# An untrained text tower, which stands in where no public weights are given.
RANDOM_TEXT = CLIPTextConfig(width=128, heads=4, layers=2, embed_dim=128)
OTHER_PARTS_OF_CLIP = ("visual", "vision_model.", "logit_", "input_resolution", "context_length",
                       "vocab_size", "text_model.embeddings.position_ids")


# ------------------------------------------------------------------------------------------- saving

def save_checkpoint(path, model, adapter_only=False, **about):
    """Writes a PoseModel or VLPose to a file.

    about: what else the model's users must know, plain values.
    adapter_only: a file of a few MB, which `load_model` puts around the base that it is given. The
        base's predictor is in the file, because the skeleton may be another one than the base's.
    """
    base = model.base if isinstance(model, VLPose) else model
    skeleton = asdict(base.skeleton)
    skeleton["sigmas"] = base.skeleton.sigmas.tolist()
    contents = {"format": FORMAT, "about": about, "config": asdict(base.config),
                "skeleton": skeleton}
    if adapter_only:
        contents["predictor"] = base.head.predictor.state_dict()
        contents["fingerprint"] = fingerprint(base)
    else:
        contents["base"] = base.state_dict()
    if isinstance(model, VLPose):
        contents["options"] = model.options
        contents["adapter"] = adapter_tensors(model)
    save_tensors(path, contents)


def adapter_tensors(model):
    """The state dict of a VLPose without that of its base."""
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith("base.")}


# What differs between two copies of one base: the predictor belongs to a skeleton, the table of
# positions is stretched to an image size, and BatchNorm's counters may be missing.
NOT_IN_FINGERPRINT = re.compile(r"head\.predictor\.|backbone\.pos_embed|.*\.num_batches_tracked")


def fingerprint(base):
    """A short hash of a PoseModel's weights and heads, by which an adapter knows its base."""
    digest = hashlib.sha256(str(base.config.heads).encode())
    for name, tensor in base.state_dict().items():
        if not NOT_IN_FINGERPRINT.match(name):
            digest.update(tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def save_tensors(path, contents):
    """Writes a file. Only the first process writes, and only finite numbers are written."""
    if processes()[0] == 0:
        check_finite(contents, path)
        with written_whole(path) as draft:
            torch.save(contents, draft)


# ------------------------------------------------------------------------------------------ loading

def load_model(path_or_name, image_size=None, base=None, skeleton=None):
    """The model that `save_checkpoint` wrote, or a pose model from any public file or name.

    path_or_name: a file, a run's folder, or a public name, such as "vitpose-b". After # may stand
        what a public file does not say: "vitpose+_base.pth#ap10k" takes one of the EXPERTS of a
        file with several, by default COCO's; "dino.pth#heads=6" says the number of heads.
    image_size: height and width in pixels to use the model with, if not the ones of its training.
    base: if the file holds only an adapter, the file or name of the model that it goes around.
    skeleton: the name of a known skeleton, such as "ap10k", if a public file does not say what its
        keypoints are. Without a name, the first skeleton with so many keypoints is taken, and a
        line on stderr says so.
    A backbone without a decoder (MAE's, torchvision's) gets an untrained one.
    `model.about` is what the file says about the model's use.
    Raises WeightsError if a tensor is missing, left over or of another shape, and for an image size
    that the model cannot have.
    """
    source, choice = split_choice(path_or_name)
    path = find_file(source)
    contents = read_file(path)
    state = tensors_of(contents, path)
    with expecting(path, "a pose model", WeightsError):
        if contents.get("format") == FORMAT:
            if choice:
                raise WeightsError(f"{path}: expected no choice after #, found {choice}")
            about = about_of(contents, path)
            model = load_own(contents, state, path, image_size, base, skeleton)
            model.about = about
        else:
            model = load_public(source, choice, contents, state, path, image_size, skeleton)
            model.about = {}
        return model.eval()


def load_pose_model(path_or_name, image_size=None, skeleton=None):
    """The PoseModel in a file: of a VLPose, the original model. Otherwise like `load_model`."""
    model = load_model(path_or_name, image_size, skeleton=skeleton)
    if isinstance(model, VLPose):
        model = model.base
    return model.requires_grad_(True)


def load_public(source, choice, contents, state, path, image_size, skeleton):
    """A PoseModel from weights that others have published: see `load_model`.

    source: the path or name without its choice. state: the state dict in the contents of the file.
    """
    baselines = simple_baselines_layout(state)
    trunk = source if source in TRUNKS else resnet_of(state)
    known = ""  # the skeleton's name
    if baselines:
        config = MODEL_CONFIGS.get(resnet_of(baselines, "backbone.body."))
        state = baselines
        print(f"{path}: Simple Baselines' heatmaps are not UDP's: keypoints may be off by up to 3 "
              "pixels of the crop", file=sys.stderr)
        if config is None or choice:
            raise WeightsError(f"{path}: expected a ResNet of 18, 34, 50, 101 or 152 layers and no "
                               f"choice after #")
    elif trunk:
        if choice:
            raise WeightsError(f"{path}: expected no choice after #, found {choice}")
        config = MODEL_CONFIGS[trunk]
        body = without_classifier(state)
        state = {f"backbone.body.{name}": tensor for name, tensor in body.items()}
    else:
        config, state, known = vitpose_layout(state, path, choice)
    if source in PUBLIC_FILES and choice not in EXPERTS:
        known = PUBLIC_FILES[source].skeleton or known
    skeleton = skeleton or known
    if has_decoder(state):
        num_keypoints = len(state["head.predictor.weight"])
        config, state = resized(config, state, image_size or config.image_size, path)
        skeleton = skeleton_of_public(contents, num_keypoints, path, skeleton)
        model = PoseModel(config, num_keypoints, skeleton)
    else:
        config, state = resized(config, state, image_size or ViTConfig.image_size, path)
        model = PoseModel(config)
        print(f"{path}: a backbone alone; its decoder is new and untrained", file=sys.stderr)
        for name, tensor in model.state_dict().items():
            if name.startswith(("head.", "backbone.up.")):
                state[name] = tensor
    return load_strictly(model, state, path)


def skeleton_of_public(contents, count, path, name):
    """The Skeleton of a pose model with `count` keypoints that others have published.

    name: the skeleton's name, "" or None if it is not known. Then the file may describe it.
    Raises WeightsError if the skeleton of that name has another number of keypoints.
    """
    if name:
        skeleton = skeleton_named(name)
        if len(skeleton.names) != count:
            raise WeightsError(f"{path}: expected a skeleton of {count} keypoints, "
                               f"found {name} with {len(skeleton.names)}")
        return skeleton
    described = skeleton_of_mmpose(contents)
    if described and len(described.names) == count:
        return described
    skeleton = known_skeleton(count)
    names = skeletons_of(count)
    guess = "they are numbered, and nobody knows left from right"
    if names:
        guess = (f"taken for {names[0]}'s ({', '.join(skeleton.names[:3])}, ...); "
                 f"--skeleton chooses from {', '.join(names)}")
    print(f"{path}: does not say what its {count} keypoints are: {guess}", file=sys.stderr)
    return skeleton


def skeleton_of_mmpose(contents):
    """The Skeleton that a file of mmpose 1.x describes, None if it describes none."""
    meta = contents.get("meta")
    about = meta.get("dataset_meta") if isinstance(meta, dict) else None
    if not isinstance(about, dict) or "keypoint_id2name" not in about:
        return None
    name_of = about["keypoint_id2name"]
    count = len(name_of)
    links = about.get("skeleton_links", ())
    edges = [(a, b) for a, b in links if 0 <= min(a, b) and max(a, b) < count]
    skeleton = make_skeleton([name_of[joint] for joint in range(count)], edges)
    if skeleton in SKELETONS.values():
        return skeleton
    if "flip_indices" in about:
        pairs = [(a, b) for a, b in enumerate(about["flip_indices"]) if a < b < count]
        skeleton = replace(skeleton, flip_pairs=tuple(pairs))
    sigmas = np.array(inert_numbers(about.get("sigmas", ()))).round(6)  # they are in float32
    if not len(sigmas):
        return skeleton
    if len(sigmas) != count or not (sigmas > 0).all():
        raise ValueError(f"{count} keypoints with sigmas {sigmas.tolist()}")
    return replace(skeleton, sigmas=sigmas)


def load_own(contents, state, path, image_size, base, skeleton):
    """The PoseModel or VLPose of a file of `save_checkpoint`: see `load_model`."""
    has_adapter = "options" in contents or "adapter" in contents
    if "base" in contents:
        if skeleton:
            raise WeightsError(f"{path}: has its own skeleton; expected no other, "
                               f"found {skeleton}")
        if has_adapter and base:
            raise WeightsError(f"{path}: expected an adapter alone to go around {base}, found one "
                               "with its own base")
        model = load_own_base(contents, state, path, image_size)
    elif base is None:
        raise WeightsError(f"{path}: an adapter; expected the model that it goes around, too "
                           f"(eval.py: --base)")
    else:
        model = load_given_base(contents, path, image_size, base, skeleton)
    if has_adapter:
        model = load_own_adapter(contents, model, path)
    return model


def load_own_base(contents, state, path, image_size):
    """The PoseModel of a file of `save_checkpoint`. state: the model's state dict in it."""
    config = config_of(contents, path)
    num_keypoints = len(state["head.predictor.bias"])
    skeleton = None  # then `PoseModel` takes the usual one for so many keypoints
    if contents.get("skeleton"):
        skeleton = skeleton_of(contents, num_keypoints, path)
    blocks = count_blocks(state)
    if blocks != config.depth:
        raise WeightsError(f"{path}: another architecture: {blocks} transformer blocks, "
                           f"expected {config.depth}")
    config, state = resized(config, state, image_size or config.image_size, path)

    def build():
        return PoseModel(config, num_keypoints, skeleton)
    return build_and_load(build, state, path)


def load_given_base(contents, path, image_size, base, skeleton):
    """The PoseModel of another file that an adapter goes around, with the adapter's own predictor.

    Raises WeightsError unless it is the model that the adapter was trained around.
    """
    if "fingerprint" not in contents:
        print(f"{path}: an adapter of an older version, which does not say what its base is",
              file=sys.stderr)
        return load_pose_model(base, image_size, skeleton)
    config = config_of(contents, path)
    model = load_pose_model(base, image_size or config.image_size, skeleton)
    found = fingerprint(model)
    if found != contents["fingerprint"]:
        raise WeightsError(f"{path}: expected the base that it was trained around, with the "
                           f"fingerprint {contents['fingerprint']!r:.20}, found {base} with "
                           f"{found!r}")
    state = tensors_of(contents["predictor"], path)
    skeleton = skeleton_of(contents, len(state["bias"]), path)
    model.skeleton = skeleton
    model.num_keypoints = len(skeleton.names)
    model.config = replace(model.config, sigma=config.sigma)
    dim, decoder_dim = model.config.dim, model.config.decoder_dim
    predictor = HeatmapHead(dim, decoder_dim, model.num_keypoints).predictor
    model.head.predictor = load_strictly(predictor, state, path)
    return model


def load_own_adapter(contents, base, path):
    """The VLPose of a file of `save_checkpoint`, around its base, a PoseModel."""
    state = tensors_of(contents["adapter"], path)

    def build():
        return VLPose(base, **contents["options"])
    return build_and_load(build, state, path)


def build_and_load(build, state, path):
    """The model that `build` makes, with the tensors of a state dict.

    First it is built on the meta device, which takes no memory. So a small file that claims to be a
    huge model is refused before any memory is taken.
    """
    with torch.device("meta"):
        check_architecture(build(), state, path)
    return load_strictly(build(), state, path)


# ----------------------------------------------------------------- the values in a file are checked

ABOUT = {"text_weights": str, "sentences": str, "per_token": bool, "code": dict}
SIGMA_LIMITS = (0.1, 100.0)  # pixels of a heatmap
LARGEST_CROP = 4096  # pixels of a side
CONFIG_LIMITS = {  # the least and the greatest value; of two integers it is an integer, too
    "dim": (8, 10_000),
    "depth": (0, 1000),
    "heads": (0, 1000),
    "drop_path": (0.0, 1.0),
    "prompts": (0, 10_000),
    "layer_decay": (0.0, 1.0),
    "decoder_dim": (0, 10_000),
    "sigma": SIGMA_LIMITS,
}


def about_of(contents, path):
    """What a file says about its model's use, a dictionary."""
    about = contents["about"]
    if not isinstance(about, dict):
        raise WeightsError(f"{path}: expected a dictionary as 'about', found {about!r:.60}")
    for name, kind in ABOUT.items():
        value = about.get(name)
        if value is not None and not isinstance(value, kind):
            raise WeightsError(f"{path}: expected a {kind.__name__} as '{name}' of 'about', found "
                               f"{value!r:.60}")
    return about


def config_of(contents, path):
    """The ViTConfig in a file. Raises WeightsError for values that no model can have."""
    config = ViTConfig(**contents["config"])
    for name, (least, most) in CONFIG_LIMITS.items():
        value = getattr(config, name)
        if type(value) not in (int, type(most)) or not least <= value <= most:
            raise WeightsError(f"{path}: expected {name} from {least} to {most}, found "
                               f"{value!r:.60}")
    height, width = config.image_size
    check_sides(config, (height, width), path)
    if config.trunk and config.trunk not in TRUNKS:
        raise WeightsError(f"{path}: expected one of {', '.join(TRUNKS)}, found "
                           f"{config.trunk!r:.60}")
    multiple = math.lcm(8, 1 if config.trunk else config.heads)
    if not multiple or config.dim % multiple:
        raise WeightsError(f"{path}: expected a dim that is a multiple of 8 and of "
                           f"the number of heads, found {config.dim} and {config.heads} heads")
    return replace(config, image_size=(height, width))


def check_sides(config, image_size, path):
    """Raises WeightsError for an image size (height, width) that the model cannot have."""
    step = 32 if config.trunk else PATCH  # a network of torchvision ends at H/32
    for side in image_size:
        if side not in range(step, LARGEST_CROP + 1, step):
            raise WeightsError(f"{path}: expected an image size of multiples of {step} up to "
                               f"{LARGEST_CROP}, found {image_size!r:.60}")


def skeleton_of(contents, count, path):
    """The Skeleton in a file, of `count` keypoints. Raises WeightsError for any other one."""
    fields = contents["skeleton"]
    skeleton = skeleton_from(fields)
    numbers = [*skeleton.upper]
    for joints in (*skeleton.edges, *skeleton.groups.values(), *skeleton.flip_pairs):
        numbers.extend(joints)
    paired = [joint for pair in skeleton.flip_pairs for joint in pair]
    names = [name for name in skeleton.names if isinstance(name, str)]
    sigmas = [sigma for sigma in fields["sigmas"] if 0 < sigma < math.inf]
    is_right = {
        "names": len(names) == len(skeleton.names) == count,
        "sigmas": len(sigmas) == len(fields["sigmas"]) == count,
        "edges": all(len(edge) == 2 for edge in skeleton.edges),
        "flip_pairs": (all(len(pair) == 2 for pair in skeleton.flip_pairs)
                       and len(paired) == len(set(paired))),
        "keypoints": all(type(number) is int and 0 <= number < count for number in numbers),
    }
    for field, right in is_right.items():
        if not right:
            found = fields.get(field, numbers)
            raise WeightsError(f"{path}: expected a skeleton of {count} keypoints, found as its "
                               f"{field} {found!r:.60}")
    return skeleton


# -------------------------------------------------------------------------------- other image sizes

def resized(config, state, image_size, path):
    """(config, state dict) of a pose model for images of a size (height, width)."""
    image_size = tuple(image_size)
    check_sides(config, image_size, path)
    state = dict(state)
    if image_size != config.image_size and not config.trunk:
        positions = state["backbone.pos_embed"]
        state["backbone.pos_embed"] = resize_positions(positions, config.image_size, image_size)
    return replace(config, image_size=image_size), state


def resize_positions(table, old, new):
    """A positional table (1, N, D) for images of another size (height, width)."""
    rows = old[0] // PATCH
    columns = old[1] // PATCH
    table = table.float().transpose(1, 2).unflatten(2, (rows, columns))  # (1, D, rows, columns)
    grid = (new[0] // PATCH, new[1] // PATCH)
    return F.interpolate(table, grid, mode="bicubic").flatten(2).transpose(1, 2)


# ---------------------------------------------------------------------------- every tensor must fit

def load_strictly(module, state, path):
    """The module, with the tensors of a state dict loaded into it.

    Raises WeightsError unless they are exactly the tensors that the module has, and finite.
    """
    check_architecture(module, state, path)
    check_finite(state, path)
    module.load_state_dict(state, strict=False)  # for what may lack: see `check_architecture`
    return module


def check_architecture(module, state, path):
    """Raises WeightsError unless a state dict has the names, kinds and shapes of the module's.

    Of a VLPose it is the adapter's state dict, since the base is loaded before. BatchNorm's
    counters may be missing: old files lack them, and nothing here uses them.
    """
    own = adapter_tensors(module) if isinstance(module, VLPose) else module.state_dict()
    for name in sorted(own.keys() | state.keys()):
        if name.endswith("num_batches_tracked") and name not in state:
            continue
        expected = described(own.get(name))
        found = described(state.get(name))
        if found != expected:
            raise WeightsError(f"{path}: another architecture: tensor {name} is {found}, "
                               f"expected {expected}")


def described(tensor):
    """A tensor's kind and shape, such as float [768, 3, 16, 16]."""
    if tensor is None:
        return "nothing"
    kind = "float" if tensor.is_floating_point() else "int"
    return f"{kind} {list(tensor.shape)}"


def check_finite(contents, path):
    """Raises WeightsError if a tensor, at any depth, has a number that is not finite."""
    for name, value in contents.items():
        if isinstance(value, dict):
            check_finite(value, path)
        elif isinstance(value, torch.Tensor) and not value.isfinite().all():
            raise WeightsError(f"{path}: expected finite numbers, found others in tensor {name}")


# ------------------------------------------------------------------ predictor, backbone, text tower

def with_keypoints(model, skeleton):
    """The PoseModel with a predictor for another skeleton.

    Keypoints that both skeletons have keep their weights; the others' weights are new. A model
    that has the skeleton already stays as it is.
    """
    if model.skeleton.names == skeleton.names:
        return model
    config = model.config
    old = model.head.predictor
    new = HeatmapHead(config.dim, config.decoder_dim, len(skeleton.names)).predictor
    places = {name: place for place, name in enumerate(model.skeleton.plain_names)}
    kept = 0
    for joint, name in enumerate(skeleton.plain_names):
        place = places.get(name)
        if place is not None:
            new.weight.data[joint] = old.weight.data[place]
            new.bias.data[joint] = old.bias.data[place]
            kept += 1
    print(f"a new predictor for {len(skeleton.names)} keypoints, {kept} of which the model has had")
    model.head.predictor = new.to(old.weight)
    model.num_keypoints = len(skeleton.names)
    model.skeleton = skeleton
    return model


def load_backbone(model, path_or_name):
    """Fills only a PoseModel's backbone.

    A ViT is filled from any weights that `load_model` reads, and a network of torchvision from
    torchvision's weights of that network.
    """
    if model.config.trunk:
        state = without_classifier(load_weights(path_or_name))
        load_strictly(model.backbone.body, state, path_or_name)
    else:
        found = load_pose_model(path_or_name, model.config.image_size)
        load_strictly(model.backbone, found.backbone.state_dict(), path_or_name)
        model.config = replace(model.config, heads=found.config.heads)
        for block in model.backbone.blocks:
            block.attn.heads = found.config.heads


def load_clip_text(path_or_name):
    """CLIP's text tower from a file or name, of OpenAI, of transformers or our own.

    "random" is a small untrained tower, always the same. In files a head has 64 channels, as in all
    of CLIP's towers. "file.bin#gelu" says that the tower was trained with GELU, such as LAION's,
    and "file.bin#quick_gelu" that it was not. Raises WeightsError if the file holds no text tower.
    """
    if path_or_name == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return CLIPText(RANDOM_TEXT).eval()
    source, choice = split_choice(path_or_name)
    path = find_file(source)
    tensors = load_weights(path)
    is_ours = "token_embed.weight" in tensors
    is_openais = source in PUBLIC_FILES or "input_resolution" in tensors
    state = {}
    for name, tensor in tensors.items():
        if not name.startswith(OTHER_PARTS_OF_CLIP):
            state[name] = tensor
    with expecting(path, "CLIP's text tower", WeightsError):
        activation = activation_of(path, choice, is_known=is_ours or is_openais)
        if "text_projection.weight" in state:
            # A linear layer in transformers, a matrix to multiply from the right in OpenAI's file.
            state["text_projection.weight"] = state["text_projection.weight"].T
        if not is_ours:  # our own file has our names
            state = translate(state, path)
        vocab_size, width = state["token_embed.weight"].shape
        length, _ = state["pos_embed"].shape
        _, embed_dim = state["projection"].shape
        config = CLIPTextConfig(
            width=width,
            heads=width // 64,
            layers=count_blocks(state),
            embed_dim=embed_dim,
            vocab_size=vocab_size,
            context_length=length,
            activation=activation)
        return load_strictly(CLIPText(config), state, path).eval()


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}  # as config.json calls them


def activation_of(path, choice, is_known):
    """The activation of a text tower: one of ACTIVATIONS' classes.

    choice: its name, "" if it is not chosen. Then config.json beside the file may say it.
    is_known: whether the tower is one of OpenAI's or ours, which have QuickGELU.
    """
    name = choice or said_beside(path, "text_config", "hidden_act")
    if name is None:
        name = "quick_gelu"
        if not is_known:
            print(f"{path}: does not say whether it was trained with QuickGELU, as OpenAI's CLIP "
                  "was, or with GELU, as LAION's were: taken for OpenAI's; '#gelu' after its name "
                  "takes it for LAION's", file=sys.stderr)
    if name not in ACTIVATIONS:
        raise WeightsError(f"{path}: expected one of {', '.join(ACTIVATIONS)} as the activation, "
                           f"found {name}")
    return ACTIVATIONS[name]
