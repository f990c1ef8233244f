"""Domain adaptive pose estimation via multi-level alignment (arXiv 2404.14885).

Labels exist for a source domain (drawn people, say); of the target domain there are images and nothing else. A student
learns from the labels, and is drawn towards the target domain on three levels:

    image     source images are restyled with the statistics of target images          adain, StyleTransfer
    feature   a discriminator must not be able to tell the domains' features apart     reverse_gradient, L_adv
    pose      sure heatmaps for each target image, different ones over all of them     L_im

A teacher, the student's running average, labels a view of each target image for the student, which sees another one:

    target image ─┬─ view 1 ─► teacher ─► heatmaps ─► warp back ─► rectify, mask ─┐
                  └─ view 2 ─► occlude ─► student ─► heatmaps ─► warp back ───────┴─► L_con, L_im

    L = L_sup + 1.0 L_con + 0.1 L_adv + 0.3 L_im

Shapes: B images, K keypoints, H×W image, h×w heatmap, C channels. Points are x before y; pixel centres are at integers.
What changes images (style, color, warp, occlusion) takes and gives RGB in [0, 1]; the networks want them normalised.
"""
import copy
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

from data import MEAN, STD, encode_heatmaps, normalize, transform_points
from vlpose import VIT_CONFIGS, PoseModel, load_strictly, load_weights, reading

# ------------------------------------------------------------------------------------------------------- the student

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


class PoseNet(nn.Module):
    """Any ViTPose, with a view of its features: images (B, 3, H, W) -> heatmaps (B, K, h, w), features (B, C, h, w).

    The features are what the last convolution makes heatmaps of. `pose` is the ViTPose itself, with the same weights:
    for prediction, checkpoints, and the teacher, where heatmaps are all that is wanted.
    """

    def __init__(self, pose):
        super().__init__()
        self.pose, self.config = pose, pose.config

    def forward(self, images):
        head = self.pose.head
        features = head.block2(head.block1(self.pose.backbone(images)))
        return head.predictor(features), features


class PoseResNet(PoseNet):
    """Simple Baselines (arXiv 1804.06208): a ResNet, three deconvolutions of 256 channels, a 1×1 convolution.

    images (B, 3, H, W) -> heatmaps (B, K, H/4, W/4), features (B, 256, H/4, W/4).
    weights: torchvision's for that ResNet, a file or a name; its classifier is left out. None: random ones.
    """

    def __init__(self, name="resnet101", num_keypoints=16, weights=None, image_size=(256, 256), sigma=2.0):
        if name not in RESNETS:
            raise ValueError(f"network: expected one of {', '.join(RESNETS)}, not {name!r}")
        super().__init__(PoseModel(replace(VIT_CONFIGS[name], image_size=image_size, sigma=sigma), num_keypoints))
        if weights:
            load_trunk(self.pose, weights)


def load_trunk(pose, path_or_name):
    """Fills the body of a ViTPose with torchvision's weights for that network, but for their classifier."""
    state = load_weights(path_or_name)
    body = {name: tensor for name, tensor in state.items() if not name.startswith(("fc.", "head."))}
    load_strictly(pose.backbone.body, body, path_or_name)


def supervised_loss(predicted, target, weights):
    """L_sup = mean of ½ w (y - ŷ)²; heatmaps (B, K, h, w), weights (B, K)."""
    return 0.5 * (weights[:, :, None, None] * (target - predicted) ** 2).mean()


# ------------------------------------------------------------------------------------------------ image level: style

def adain(content, style, eps=1e-5):
    """Adaptive instance normalization (arXiv 1703.06868): content (B, C, h, w) with each channel's mean and deviation
    those of style (B, C, h', w'): σ(s) (c - μ(c)) / σ(c) + μ(s)."""
    (content_var, content_mean), (style_var, style_mean) = (
        torch.var_mean(x, dim=(2, 3), keepdim=True) for x in (content, style))  # (B, C, 1, 1)
    return ((style_var + eps) / (content_var + eps)).sqrt() * (content - content_mean) + style_mean


def convolution(c_in, c_out):
    layer = nn.Conv2d(c_in, c_out, 3)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # an untrained encoder must not fade out
    nn.init.zeros_(layer.bias)
    return [nn.ReflectionPad2d(1), layer, nn.ReLU()]


ENCODER_ENDS = (4, 11, 18, 31)  # layers up to relu1_1, relu2_1, relu3_1 and relu4_1
DECODER_STARTS = (27, 20, 13, 0)  # from there back to an image
VGG19 = (0, 2, 5, 7, 10, 12, 14, 16, 19)  # where torchvision's VGG-19 has the encoder's 3×3 convolutions


class StyleTransfer(nn.Module):
    """Redraws one image in the style of another; images (B, 3, H, W) are RGB in [0, 1].

    `encoder` is VGG-19 up to relu4_1 behind a 1×1 convolution that normalises its input, and never trained;
    `decoder`, its mirror image, makes a picture of features whose statistics have been replaced.
    encoder, decoder: files or names: "adain-encoder" and "adain-decoder" are the public pair, "vgg19" fits the encoder.
        WeightsError if a tensor is missing, left over or of another shape.
    width, depth: channels of the first layer, and at which of the four levels the encoder ends. A random encoder of
        width 16 and depth 1 does for figures, and its decoder is trained in half a minute; a deeper one blurs.
    """

    def __init__(self, encoder=None, decoder=None, width=64, depth=4):
        super().__init__()
        self.depth = depth
        a, b, c, d = width, 2 * width, 4 * width, 8 * width
        pool, double = nn.MaxPool2d(2, ceil_mode=True), nn.Upsample(scale_factor=2)
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 3, 1),
            *convolution(3, a), *convolution(a, a), pool,
            *convolution(a, b), *convolution(b, b), pool,
            *convolution(b, c), *convolution(c, c), *convolution(c, c), *convolution(c, c), pool,
            *convolution(c, d))[:ENCODER_ENDS[depth - 1]].requires_grad_(False)
        self.decoder = nn.Sequential(
            *convolution(d, c), double,
            *convolution(c, c), *convolution(c, c), *convolution(c, c), *convolution(c, b), double,
            *convolution(b, b), *convolution(b, a), double,
            *convolution(a, a), *convolution(a, 3)[:2])[DECODER_STARTS[depth - 1]:]
        nn.init.normal_(self.decoder[-1].weight, std=0.01)
        nn.init.constant_(self.decoder[-1].bias, 0.5)  # grey: a good place to start from
        mean, std = torch.tensor(MEAN), torch.tensor(STD)
        self.encoder[0].weight.copy_(torch.diag(1 / std)[:, :, None, None])  # what torchvision's VGG-19 wants;
        self.encoder[0].bias.copy_(-mean / std)  # the public encoder has its own here, BGR · 255 - mean
        if encoder:
            self.load_encoder(encoder)
        if decoder:
            load_strictly(self.decoder, load_weights(decoder), decoder)

    def load_encoder(self, path_or_name):
        state = load_weights(path_or_name)
        with reading(path_or_name, "VGG-19, its layers numbered as in the public AdaIN encoder or in torchvision"):
            if "features.0.weight" in state:
                ours = [n for n, layer in enumerate(self.encoder) if isinstance(layer, nn.Conv2d)]
                state = self.encoder[0].state_dict(prefix="0.") | {
                    f"{our}.{kind}": state[f"features.{their}.{kind}"]
                    for our, their in zip(ours[1:], VGG19) for kind in ("weight", "bias")}
            state = {name: tensor for name, tensor in state.items() if int(name.split(".")[0]) < len(self.encoder)}
            load_strictly(self.encoder, state, path_or_name)

    @torch.no_grad()
    def forward(self, content, style, alpha=1.0):
        """Content in the style's colors and textures. alpha, a number or (B,): how much so, from 0 to 1."""
        features = self.encoder(content)
        alpha = torch.as_tensor(alpha).to(features).view(-1, 1, 1, 1)
        mixed = torch.lerp(features, adain(features, self.encoder(style)), alpha)  # α adain(c, s) + (1 - α) c
        height, width = content.shape[2:]
        return self.decoder(mixed).clamp(0, 1)[:, :, :height, :width]  # decoded sides are multiples of 8

    def loss(self, content, style):
        """What the decoder is trained with: (content loss, style loss). The paper adds them up as 1 : 0.1.

        Content: MSE at the last level to the AdaIN target. Style: MSE of Gram matrices, summed over the levels.
        """
        style_levels = self.levels(style)
        target = adain(self.encoder(content), style_levels[-1])
        levels = self.levels(self.decoder(target))
        content_loss = F.mse_loss(levels[-1], target)
        return content_loss, sum(F.mse_loss(gram(x), gram(s)) for x, s in zip(levels, style_levels))

    def restyle(self, content, style, probability):
        """Image level: with this probability a source image is redrawn as the target image beside it, α ~ U(0, 1)."""
        chosen = torch.rand(len(content)) < probability
        mixed = content.clone()
        if chosen.any():
            mixed[chosen] = self(content[chosen], style[chosen], torch.rand(int(chosen.sum())))
        return mixed

    def levels(self, images):
        """Features at relu1_1, relu2_1, relu3_1, relu4_1; the first `depth` of them."""
        outputs = [images]
        for first, last in pairwise((0, *ENCODER_ENDS[:self.depth])):
            outputs.append(self.encoder[first:last](outputs[-1]))
        return outputs[1:]


def gram(features):
    """How strongly each two channels of (B, C, h, w) fire together: F Fᵀ / (C h w), (B, C, C)."""
    flat = features.flatten(2)  # (B, C, h w)
    return flat @ flat.mT / flat[0].numel()


# ------------------------------------------------------------------------------------- feature level: discriminator

def reverse_gradient(x, scale=1.0):
    """x itself, but its gradient comes back times -scale: what is before it learns the opposite of what is after it
    (arXiv 1409.7495)."""
    x = x.view_as(x)
    if x.requires_grad:
        x.register_hook(lambda gradient: -scale * gradient)
    return x


class DomainDiscriminator(nn.Sequential):
    """Features (B, C, h, w) -> logits (B, 1, h, w): target (high) or source (low), at each place of the map."""

    def __init__(self, channels):
        half = channels // 2
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(channels, half, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(half, half, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(half, 1, 3, padding=1))


def adversarial_loss(source, target):
    """L_adv = mean of -log(1 - σ(source)) + mean of -log σ(target): binary cross-entropy of the logits of
    `reverse_gradient(features)`. The discriminator makes it small, the student, behind the reversal, large."""
    return F.softplus(source).mean() + F.softplus(-target).mean()


# --------------------------------------------------------------------------------- pose level: information maximization

def information_maximization_loss(heatmaps):
    """L_im = Ĥ(p_row) + Ĥ(p_col) - Ĥ(p̄) of heatmaps (B, K, h, w).

    Each heatmap should be sure of a row and of a column; a keypoint's over the whole batch should not all agree.
    """
    h, w = heatmaps.shape[2:]
    rows = entropy(heatmaps.mean(3))  # (B, K, h)
    columns = entropy(heatmaps.mean(2))  # (B, K, w)
    together = entropy(heatmaps.mean(0).flatten(1))  # (K, h w)
    return (rows + columns - together) / (h * w)


def entropy(logits):
    """H = -Σ p log p of p = softmax over the last dimension; the mean over the others."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


# ------------------------------------------------------------------------------------------------------------- views
#
# A view is an image under a random affine map. Matrices (B, 2, 3) lead from where a pixel is to where it goes, as in
# data.py. A view's heatmaps return to the frame of the whole image by the inverse map, in heatmap pixels:
#     warp(heatmaps, invert_affine(resize_affine(matrix, image_size, heatmap_size)))

@dataclass(frozen=True)
class Views:
    """How far the views of a target image go. The defaults are the paper's, for 256×256 pixels and many epochs."""
    rotation: float = 60.0  # degrees, at most, either way
    shear: float = 30.0  # degrees
    shift: float = 0.05  # of the image's size
    scale: tuple[float, float] = (0.6, 1.3)  # the least and the greatest
    color: float = 0.25  # strength of the colour jitter
    occlusion: float = 0.5  # probability that a keypoint is covered
    patch: float = 20 / 256  # side of the square that covers it, of the image's height


GENTLE_VIEWS = Views(rotation=15.0, shear=5.0, scale=(0.85, 1.15))  # for minutes of training


def random_affine(count, size, views=Views()):
    """(count, 2, 3) random maps of images of `size` (height, width), about their centre."""
    def uniform(low, high, *shape):
        return torch.empty(count, *shape).uniform_(low, high)

    sides = torch.tensor(size[::-1], dtype=torch.float32)
    angle = uniform(-views.rotation, views.rotation).deg2rad()
    slant = uniform(-views.shear, views.shear).deg2rad().tan()
    cos, sin, center = angle.cos(), angle.sin(), (sides - 1) / 2
    linear = torch.stack([cos, cos * slant - sin, sin, sin * slant + cos], dim=1).view(-1, 2, 2)  # rotation · shear
    linear = linear * uniform(*views.scale, 1, 1)
    offset = center + uniform(-views.shift, views.shift, 2) * sides - linear @ center
    return torch.cat([linear, offset[:, :, None]], dim=2)


def invert_affine(matrix):
    linear = torch.linalg.inv(matrix[:, :, :2])
    return torch.cat([linear, -linear @ matrix[:, :, 2:]], dim=2)


def grid_scale(old, new, like):
    """(2,) factors of x and y from a grid of size `old` (height, width) to `new`: corner on corner (UDP)."""
    return torch.tensor([(n - 1) / (o - 1) for o, n in zip(old[::-1], new[::-1])]).to(like)


def resize_affine(matrix, old, new):
    """The same map (B, 2, 3) for a grid of size `new` (height, width) instead of `old`: S M S⁻¹."""
    scale = grid_scale(old, new, matrix)
    return scale[:, None] * matrix / torch.cat([scale, scale.new_ones(1)])


def warp(x, matrix):
    """Moves each pixel p of x (B, C, h, w) to matrix · (p, 1), bilinearly; 0 where none goes. matrix (B, 2, 3)."""
    h, w = x.shape[2:]
    pixels = torch.cartesian_prod(torch.arange(h), torch.arange(w)).flip(1).to(matrix)  # (h w, 2), x before y
    sources = transform_points(pixels, invert_affine(matrix))  # (B, h w, 2): where each comes from
    grid = 2 * sources / torch.tensor([w - 1, h - 1]).to(sources) - 1  # the outermost pixels' centres are -1 and 1
    return F.grid_sample(x, grid.view(-1, h, w, 2), align_corners=True)


def jitter_color(images, strength=0.25):
    """Random brightness, contrast and saturation, each 1 ± strength, of images (B, 3, H, W); as `data.jitter_color`."""
    brightness, contrast, saturation = 1 + strength * (2 * torch.rand(3, len(images), 1, 1, 1).to(images) - 1)
    images = torch.lerp(images.mean(1, keepdim=True), images, saturation)
    images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, contrast)
    return (brightness * images).clamp(0, 1)


# ------------------------------------------------------------------------------------------------------ the teacher

def peaks(heatmaps):
    """Highest pixels (B, K, 2) of heatmaps (B, K, h, w), and how high they are (B, K): the teacher's confidence."""
    confidence, place = heatmaps.flatten(2).max(2)
    width = heatmaps.shape[3]
    return torch.stack([place % width, place // width], dim=2).to(heatmaps), confidence


def rectify(heatmaps, sigma):
    """Pseudo-labels: a Gaussian at each heatmap's peak, the same as in the targets of labelled images."""
    points, confidence = peaks(heatmaps)
    size = heatmaps.shape[2:]
    return encode_heatmaps(points, torch.ones_like(confidence), size, size, sigma)[0]


def confidence_mask(heatmaps, ratio=0.5):
    """(B, K), True for a peak higher than that share of all the batch's: higher than their median, if it is 0.5."""
    _, confidence = peaks(heatmaps)
    return confidence > confidence.quantile(ratio)


def consistency_loss(student, teacher, mask):
    """L_con = mean over images and pixels of the mean over keypoints of (mask (y_s - y_t))²; mask (B, K)."""
    return (mask[:, :, None, None] * (student - teacher) ** 2).mean()


def occlude(views, heatmaps, matrix, probability=0.5, threshold=0.9, size=20):
    """Adaptive occlusion: covers a keypoint that the teacher is sure of, for the student to infer it from the others.

    views (B, 3, H, W): the student's; each is changed with this probability. One keypoint with a confidence of at least
        `threshold` disappears under a patch of size×size pixels from elsewhere in the same view.
    heatmaps (B, K, h, w): the teacher's, in the frame of the whole images, which `matrix` (B, 2, 3) maps to the views.
    """
    height, width = views.shape[2:]
    if min(height, width) < 3 * size - 1:
        raise ValueError(f"occlusion: expected images of at least {3 * size - 1} pixels each way to take a patch of "
                         f"{size}×{size} from elsewhere, found {height}×{width}")
    points, confidence = peaks(heatmaps)
    scale = grid_scale(heatmaps.shape[2:], (height, width), points)
    points = transform_points(points * scale, matrix).round().long()  # (B, K, 2) in the view
    sides = torch.tensor([width, height], device=points.device)
    sure = (confidence >= threshold) & ((points >= 0) & (points < sides)).all(2)  # (B, K)
    chosen = torch.rand_like(confidence).masked_fill(~sure, -1).argmax(1)  # (B,) any one that is sure
    row = torch.nonzero(sure.any(1) & (torch.rand_like(confidence[:, 0]) < probability))[:, 0]  # (n,) to be changed
    places = sides - size + 1  # how many a patch's upper left corner can have along x and along y
    corner = (points[row, chosen[row]] - size // 2).clamp(torch.zeros_like(sides), places - 1)  # (n, 2)
    # On a circle of all places, a step of at least `size` either way round: the two patches do not overlap.
    step = size + (torch.rand(len(row), 2, device=sides.device) * (places - 2 * size + 1)).long()

    def patch(corner):
        x, y = (corner[:, axis, None] + torch.arange(size, device=corner.device) for axis in (0, 1))  # (n, size)
        return row[:, None, None], slice(None), y[:, :, None], x[:, None, :]

    covered = views.clone()
    covered[patch(corner)] = views[patch((corner + step) % places)]
    return covered


def make_teacher(student):
    """A copy of the student that never gets a gradient, and stays in training mode for its BatchNorm's sake.

    It sees target images alone. In training mode it normalises them with their own statistics, not with the source's
    (adaptive BatchNorm, arXiv 1603.04779), and gathers these in its buffers for the test. Averaging the student's
    buffers instead would mix in the source images that the student sees. Drop path is off: a label must not be noisy.
    """
    teacher = copy.deepcopy(student).requires_grad_(False).train()
    for module in teacher.modules():
        if isinstance(module, StochasticDepth):
            module.p = 0.0
    return teacher


@torch.no_grad()
def ema_update(teacher, student, decay=0.999):
    """teacher ← decay · teacher + (1 - decay) · student: the parameters; `make_teacher` says why not the buffers."""
    for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        mine.lerp_(theirs, 1 - decay)


# ------------------------------------------------------------------------------------------------ a step of adaptation

@dataclass(frozen=True)
class LossWeights:
    """What each part of the loss counts; a part of weight 0 is left out. The defaults are the paper's."""
    consistency: float = 1.0
    adversarial: float = 0.1
    information: float = 0.3


class MultiLevelAlignment(nn.Module):
    """Stage 2: the student, its teacher and the discriminator; `forward` is the loss of one step.

    student: a PoseNet that has learned from the source's labels. taught: the joints (n,) that the source labels; others
    must not be guessed at either (all joints, if it is None). decay: the teacher's share that stays at each step.
    """

    def __init__(self, student, weights=LossWeights(), views=Views(), decay=0.999, taught=None, bf16=False):
        super().__init__()
        self.student, self.teacher = student, make_teacher(student)
        self.discriminator = DomainDiscriminator(student.pose.head.predictor.in_channels)
        self.config, self.weights, self.views = student.config, weights, views
        self.taught = slice(None) if taught is None else taught
        self.decay, self.bf16 = decay, bf16

    def forward(self, images, labels, labelled, target):
        """(loss, the student's heatmaps of the source images).

        images (B, 3, H, W): the source's, restyled; labels (B, K, h, w), labelled (B, K): as `encode_heatmaps` gives
        them; target (B, 3, H, W): the target's. Images are RGB in [0, 1].
        """
        ema_update(self.teacher, self.student, self.decay)  # what the last step taught
        self.teacher.train()  # see `make_teacher`
        heatmaps, source_features = look(self.student, images, self.bf16)
        loss = supervised_loss(heatmaps, labels, labelled)
        weights, back = self.weights, self.back_to_image
        if not (weights.consistency or weights.adversarial or weights.information):
            return loss, heatmaps

        first, second = self.random_view(target), self.random_view(target)  # matrices (B, 2, 3)
        with torch.no_grad():
            seen = back(look(self.teacher, self.view(target, first), self.bf16)[0], first)[:, self.taught]
        shown = self.view(target, second)
        if self.views.occlusion:
            height, width = target.shape[2:]
            patch = min(round(self.views.patch * height), (min(height, width) + 1) // 3)  # what `occlude` has room for
            shown = occlude(shown, seen, second, self.views.occlusion, size=patch)
        guessed, target_features = look(self.student, shown, self.bf16)
        guessed = back(guessed, second)[:, self.taught]
        if weights.consistency:
            pseudo_labels, sure = rectify(seen, self.config.sigma), confidence_mask(seen)
            loss = loss + weights.consistency * consistency_loss(guessed, pseudo_labels, sure)
        if weights.adversarial:
            verdicts = self.judge(source_features), self.judge(target_features)
            loss = loss + weights.adversarial * adversarial_loss(*verdicts)
        if weights.information:
            loss = loss + weights.information * information_maximization_loss(guessed)
        return loss, heatmaps

    def judge(self, features):
        with torch.autocast(features.device.type, torch.bfloat16, enabled=self.bf16):
            return self.discriminator(reverse_gradient(features)).float()

    def random_view(self, images):
        return random_affine(len(images), images.shape[2:], self.views).to(images.device)

    def view(self, images, matrix):
        return jitter_color(warp(images, matrix), self.views.color)

    def back_to_image(self, heatmaps, matrix):
        """A view's heatmaps in the frame of the whole image."""
        return warp(heatmaps, invert_affine(resize_affine(matrix, self.config.image_size, heatmaps.shape[2:])))


def look(network, images, bf16):
    """What a PoseNet makes of RGB images in [0, 1]; with bf16 all but the result is computed in bfloat16."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        heatmaps, features = network(normalize(images))
    return heatmaps.float(), features.float()
