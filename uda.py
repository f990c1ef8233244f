"""Domain adaptive pose estimation via multi-level alignment (arXiv 2404.14885).

There are labels for a source domain (drawn people, say) and only images for the target domain (photographs). A student
learns from the labels. Three levels of alignment draw the two domains together:

    image     source images are redrawn with the statistics of target images         adain, StyleTransfer
    feature   a discriminator must not be able to tell the domains' features apart    reverse_gradient, L_adv
    pose      each target heatmap is sure of a place; together they cover many places    L_im

A teacher, the running average of the student, labels the target images. Both see a view of their own of each image, and
the student must say what the teacher says (L_con); the README has a drawing of it all.

    L = L_sup + 1.0 L_con + 0.1 L_adv + 0.3 L_im        (the paper's weights; a recipe may have others)

The lesson, from top to bottom: the loss of each part, then views, then the teacher, and at last `MultiLevelAlignment`,
whose `forward` is one step of adaptation in eight numbered parts. To see the whole first, begin there.

Letters: B images in a batch, K keypoints, H×W image, h×w heatmap, C channels. Points are x before y; pixel centres are
at integers. What changes images (style, colour, warp, occlusion) takes and gives RGB in [0, 1].
"""
import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.ops import StochasticDepth

from data import (MEAN, STD, encode_heatmaps, expecting, invert_matrix, mean_of_all, normalize, rows_of_all,
                  transform_points)
from vlpose import RelationMatcher, WeightsError, load_strictly, load_weights

# -------------------------------------------------------------------------------------- supervision, on the source

def supervised_loss(predicted, labels, weights):
    """L_sup = mean of ½ ω (y - ŷ)²: predicted ŷ and labels y (B, K, h, w), weights ω (B, K), 0 where not labelled.

    The authors' ½ matters here, beside other losses. VLPose's loss stands alone and has none: `heatmap_loss`, train.py.
    """
    return 0.5 * (weights[:, :, None, None] * (labels - predicted) ** 2).mean()


# ------------------------------------------------------------------------------------------------ image level: style

def adain(content, style):
    """Adaptive instance normalization (arXiv 1703.06868): AdaIN(c, s) = σ(s) (c - μ(c)) / σ(c) + μ(s).

    μ and σ are the mean and the standard deviation of each channel over the places of one image: content c
    (B, C, h, w) gets those of style s (B, C, h', w').
    """
    var_c, mean_c = torch.var_mean(content, dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
    var_s, mean_s = torch.var_mean(style, dim=(2, 3), keepdim=True)    # (B, C, 1, 1)
    ratio = ((var_s + 1e-5) / (var_c + 1e-5)).sqrt()                   # σ(s) / σ(c)
    return ratio * (content - mean_c) + mean_s


ENCODER_ENDS = (4, 11, 18, 31)  # layers up to relu1_1, relu2_1, relu3_1 and relu4_1
DECODER_STARTS = (27, 20, 13, 0)  # where in the whole decoder that of an encoder of depth 1, 2, 3 or 4 begins


class StyleTransfer(nn.Module):
    """Redraws one image in the style of another; images (B, 3, H, W) are RGB in [0, 1].

    `encoder` is VGG-19 up to relu4_1 behind a 1×1 convolution that normalises its input; it is never trained. `decoder`
    is its mirror image: it makes a picture of features whose statistics AdaIN has replaced.
    encoder, decoder: files or names: "adain-encoder" and "adain-decoder" are the public pair. WeightsError if a tensor
        is missing, left over or of another shape.
    width, depth: channels of the first layer, and at which of the four levels the encoder ends. A random encoder of
        width 16 and depth 1 is enough for figures, and its decoder is trained in half a minute; a deeper one blurs.
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
        self.encoder[0].weight.copy_(torch.diag(1 / std)[:, :, None, None])  # (x - mean) / std, as ImageNet's models
        self.encoder[0].bias.copy_(-mean / std)                              # want it; the public encoder has its own
        if encoder:
            load_style_encoder(self.encoder, encoder)
        if decoder:
            load_strictly(self.decoder, load_weights(decoder), decoder)

    @torch.no_grad()
    def forward(self, content, style, alpha=1.0):
        """Content in the colours and textures of style. alpha, a number or (B,): how much so, from 0 to 1."""
        c, s = self.encoder(content), self.encoder(style)
        alpha = torch.as_tensor(alpha).to(c).view(-1, 1, 1, 1)
        mixed = torch.lerp(c, adain(c, s), alpha)  # α AdaIN(c, s) + (1 - α) c
        height, width = content.shape[2:]
        return self.decoder(mixed).clamp(0, 1)[:, :, :height, :width]  # odd sides have been rounded up at each pooling

    def restyle(self, content, style, probability):
        """The image level: with this probability an image is redrawn in the style of the one beside it, α ~ U(0, 1)."""
        chosen = torch.rand(len(content)) < probability  # (B,) which images
        alpha = torch.rand(len(content))                 # (B,) how strongly
        mixed = content.clone()
        if chosen.any():
            mixed[chosen] = self(content[chosen], style[chosen], alpha[chosen])
        return mixed

    def loss(self, content, style):
        """What the decoder is trained with: (content loss, Gram loss). The paper adds them up as 1 : 0.1.

        Content loss: the mean squared error between the features of the result and t = AdaIN(c, s). Gram loss: that
        between the Gram matrices of the result and of the style image, summed over all levels of the encoder.
        """
        return style_transfer_losses(self, content, style)


# ------------------------------------------------------------------------------------- feature level: discriminator

def reverse_gradient(x, scale=1.0):
    """x itself, but its gradient comes back times -scale: the layers before it learn the opposite of those after it
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
    """L_adv = mean of -log(1 - sigmoid(z_source)) + mean of -log sigmoid(z_target): binary cross-entropy of logits z.

    The discriminator makes it small. The student, behind `reverse_gradient`, makes it large: then its features no
    longer tell where an image is from.
    """
    return F.softplus(source).mean() + F.softplus(-target).mean()  # softplus(z) = -log(1 - sigmoid(z))


# --------------------------------------------------------------------------------- pose level: information maximization

def information_maximization_loss(heatmaps):
    """L_im = Ĥ(p_row) + Ĥ(p_col) - Ĥ(p̄) of heatmaps y (B, K, h, w).

        p_row = softmax(the mean of y over each row), h numbers;  p_col = softmax(the mean over each column), w numbers
        p̄     = softmax(the mean of y over the batch), h w numbers
        Ĥ(p)  = H(p) / (h w), averaged over images and keypoints;  H(p) = -Σ p log p

    The first two terms are smaller if each heatmap is sure of a row and of a column. The last one is larger if the
    images do not all agree on one place. How much: a heatmap's values are 0 to 1 and their means far smaller, so each
    softmax is nearly flat, and even a perfect peak hardly lowers H: at the paper's weight L_im changes next to nothing.
    """
    h, w = heatmaps.shape[2:]
    H_row = entropy(heatmaps.mean(3))             # of p_row (B, K, h)
    H_col = entropy(heatmaps.mean(2))             # of p_col (B, K, w)
    y_bar = mean_of_all(heatmaps.mean(0))     # (K, h, w) the mean over the batch, on all processes
    H_bar = entropy(y_bar.flatten(1))             # of p̄ (K, h w)
    return (H_row + H_col - H_bar) / (h * w)


def entropy(logits):
    """H(p) = -Σ p log p of p = softmax over the last dimension; the mean over the others."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


# ------------------------------------------------------------------------------------------------------------- views
#
# A view is an image under a random affine map. A matrix (2, 3) leads from where a pixel is to where it goes, as in
# data.py. To compare what teacher and student see, their heatmaps go back by the inverse map into the frame of the
# whole image; `resize_affine` turns the map of the image into the same map of its smaller heatmap.

@dataclass(frozen=True)
class Views:
    """How far the views of a target image go. The defaults are the paper's, for 256×256 pixels and many epochs."""
    rotation: float = 60.0  # degrees, at most, either way
    shear: float = 30.0  # degrees
    shift: float = 0.05  # of the image's size
    scale: tuple[float, float] = (0.6, 1.3)  # the least and the greatest
    color: float = 0.25  # strength of the colour jitter
    occlusion: float = 0.5  # probability that an image has one of its sure keypoints covered
    patch: float = 20 / 256  # side of the square that covers it, of the image's height


GENTLE_VIEWS = Views(rotation=15.0, shear=5.0, scale=(0.85, 1.15))  # for minutes of training


def random_affine(count, size, views=Views()):
    """(count, 2, 3) random maps of images of `size` (height, width), about their centre c: p ↦ A (p - c) + c + shift.

    A = scale · rotation · shear.
    """
    sides = torch.tensor(size[::-1], dtype=torch.float32)
    angle = draw((count,), -views.rotation, views.rotation).deg2rad()
    slant = draw((count,), -views.shear, views.shear).deg2rad().tan()
    cos, sin, center = angle.cos(), angle.sin(), (sides - 1) / 2
    A = torch.stack([cos, cos * slant - sin, sin, sin * slant + cos], dim=1).view(-1, 2, 2)  # rotation · shear
    A = A * draw((count, 1, 1), *views.scale)
    offset = center + draw((count, 2), -views.shift, views.shift) * sides - A @ center
    return torch.cat([A, offset[:, :, None]], dim=2)


def grid_scale(old, new, like):
    """(2,) factors of x and y from a grid of size `old` (height, width) to `new`: the centres of corners coincide."""
    return torch.tensor([(n - 1) / (o - 1) for o, n in zip(old[::-1], new[::-1])]).to(like)


def resize_affine(matrix, old, new):
    """The map M (B, 2, 3) of a grid of size `old` (height, width) for one of size `new`: S M S⁻¹, S = `grid_scale`."""
    scale = grid_scale(old, new, matrix)
    return scale[:, None] * matrix / torch.cat([scale, scale.new_ones(1)])


def warp(x, matrix):
    """Moves each pixel p of x (B, C, h, w) to matrix · (p, 1), bilinearly; 0 where none goes. matrix (B, 2, 3)."""
    h, w = x.shape[2:]
    pixels = torch.cartesian_prod(torch.arange(h), torch.arange(w)).flip(1).to(matrix)  # (h w, 2), x before y
    origins = transform_points(pixels, invert_matrix(matrix))  # (B, h w, 2): where each comes from
    grid = 2 * origins / torch.tensor([w - 1, h - 1]).to(origins) - 1  # the outermost pixels' centres are -1 and 1
    return F.grid_sample(x, grid.view(-1, h, w, 2), align_corners=True)


def jitter_color(images, strength=0.25):
    """Random brightness, contrast and saturation, each 1 ± strength, of images (B, 3, H, W); as `data.jitter_color`."""
    brightness, contrast, saturation = (1 + strength * (2 * draw((len(images), 1, 1, 1)).to(images) - 1)
                                        for _ in range(3))
    images = torch.lerp(images.mean(1, keepdim=True), images, saturation)
    images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, contrast)
    return (brightness * images).clamp(0, 1)


def occlude(images, heatmaps, matrix, probability=0.5, threshold=0.9, size=20):
    """Adaptive occlusion: covers a keypoint that the teacher is sure of. The student must infer it from the others.

    images (B, 3, H, W): the student's views; each is changed with this probability. One keypoint with a confidence of
        at least `threshold` disappears under a patch of size×size pixels from elsewhere in the same image.
    heatmaps (B, K, h, w): the teacher's, in the frame of the whole images, which `matrix` (B, 2, 3) maps to the views.
    """
    height, width = images.shape[2:]
    if min(height, width) < 3 * size - 1:
        raise ValueError(f"occlusion: expected images of at least {3 * size - 1} pixels each way to take a patch of "
                         f"{size}×{size} from elsewhere, found {height}×{width}")
    points, confidence = peaks(heatmaps)
    scale = grid_scale(heatmaps.shape[2:], (height, width), points)
    points = transform_points(points * scale, matrix).round().long()  # (B, K, 2) in the view
    sides = torch.tensor([width, height], device=points.device)
    sure = (confidence >= threshold) & ((points >= 0) & (points < sides)).all(2)  # (B, K)
    chosen = draw(confidence.shape).to(confidence).masked_fill(~sure, -1).argmax(1)  # (B,) a random one that is sure
    covered = sure.any(1) & (draw(confidence.shape[:1]).to(confidence) < probability)  # (B,) whether an image changes
    places = sides - size + 1  # how many a patch's upper left corner can have along x and along y
    row = torch.arange(len(images), device=points.device)
    corner = (points[row, chosen] - size // 2).clamp(torch.zeros_like(sides), places - 1)  # (B, 2)
    # Corners wrap around. A step from `size` to `places - size` is at least `size` both ways: the patches are apart.
    step = size + (draw((len(images), 2)).to(confidence) * (places - 2 * size + 1)).long()  # (B, 2)

    def patch(corner):
        x, y = (corner[:, axis, None] + torch.arange(size, device=corner.device) for axis in (0, 1))  # (B, size)
        return row[:, None, None], slice(None), y[:, :, None], x[:, None, :]

    changed = images.clone()
    changed[patch(corner)] = images[patch((corner + step) % places)]
    return torch.where(covered[:, None, None, None], changed, images)


# ------------------------------------------------------------------------------------------------------ the teacher

def peaks(heatmaps):
    """Highest pixels (B, K, 2) of heatmaps (B, K, h, w), and how high they are (B, K): the teacher's confidence."""
    confidence, place = heatmaps.flatten(2).max(2)
    width = heatmaps.shape[3]
    return torch.stack([place % width, place // width], dim=2).to(heatmaps), confidence


def rectify(heatmaps, sigma):
    """Pseudo-labels: a Gaussian at the peak of each heatmap (B, K, h, w), as in the targets of labelled images."""
    points, confidence = peaks(heatmaps)
    size = heatmaps.shape[2:]
    return encode_heatmaps(points, torch.ones_like(confidence), size, size, sigma)[0]


def confidence_mask(heatmaps, ratio=0.5):
    """(B, K), True where the confidence is above this quantile of the whole batch's: by default, their median."""
    _, confidence = peaks(heatmaps)
    return confidence > rows_of_all(confidence).quantile(ratio)


def consistency_loss(predicted, pseudo_labels, mask):
    """L_con = mean over images, keypoints and pixels of (m (y_s - y_t))²: predicted heatmaps y_s (B, K, h, w) of the
    student, pseudo-labels y_t of the teacher, mask m (B, K)."""
    return (mask[:, :, None, None] * (predicted - pseudo_labels) ** 2).mean()


def make_teacher(student):
    """A copy of the student that never gets a gradient, but stays in training mode for the sake of its BatchNorm.

    It sees only target images. In training mode it normalises them with their own statistics, not with the source's
    (adaptive BatchNorm, arXiv 1603.04779), and gathers these in its buffers for the test. Averaging the student's
    buffers instead would mix in the source images that the student sees. Drop path and dropout are off: a label must
    not be noisy.
    """
    teacher = copy.deepcopy(student).requires_grad_(False).train()
    for module in teacher.modules():
        if isinstance(module, (StochasticDepth, RelationMatcher)):
            module.p = 0.0
    return teacher


@torch.no_grad()
def ema_update(teacher, student, decay=0.999):
    """teacher ← decay · teacher + (1 - decay) · student: the parameters; `make_teacher` says why not the buffers."""
    get_ema_multi_avg_fn(decay)(list(teacher.parameters()), list(student.parameters()), 0)


# ------------------------------------------------------------------------------------------------ a step of adaptation

@dataclass(frozen=True)
class LossWeights:
    """The weight of each loss beside L_sup; one of weight 0 is not computed. The defaults are the paper's."""
    consistency: float = 1.0
    adversarial: float = 0.1
    information: float = 0.3


@dataclass(frozen=True)
class Compute:
    """How networks compute: in bfloat16 where that is safe, and in so many parts of a batch, to save memory."""
    bf16: bool = False
    parts: int = 1


class MultiLevelAlignment(nn.Module):
    """Stage 2: the student, its teacher and the discriminator; `forward` is one step of adaptation.

    student: a PoseModel that has learned from the source's labels, or a VLPose around one, of which only the adapter
        learns. The teacher's last update is never made.
    restyle: (source images, target images) -> source images in the target's style: `StyleTransfer.restyle` with its
        probability filled in, or another function in its place. None leaves out the image level.
    source_keypoints: those that the source labels, all if it is None. The student is taught no others, so its heatmaps
        of others must not become pseudo-labels.
    decay: the share of the teacher that stays at each step.
    """

    def __init__(self, student, restyle=None, weights=LossWeights(), views=Views(), decay=0.999, source_keypoints=None,
                 compute=Compute()):
        super().__init__()
        self.student, self.teacher = student, make_teacher(student)
        self.discriminator = DomainDiscriminator(student.predictor.in_channels)
        self.config, self.restyle, self.weights, self.views = student.config, restyle, weights, views
        self.source_keypoints = slice(None) if source_keypoints is None else source_keypoints
        self.decay, self.compute = decay, compute

    def forward(self, source, labels, label_weights, target, source_text=(), target_text=()):
        """One step -> (L, the student's heatmaps of the source images (B, K, h, w)).

        source, target (B, 3, H, W): images, RGB in [0, 1]; labels (B, K, h, w), label_weights (B, K): the source's
        heatmaps, from `encode_heatmaps`. The target has none. source_text, target_text: T and a mask, for a VLPose.
        """
        weights, size = self.weights, self.config.image_size

        # 8. The optimizer has moved the student since the last step; the teacher follows.
        ema_update(self.teacher, self.student, self.decay)
        self.teacher.train()  # the loop has put BatchNorm without gradients in evaluation mode; see `make_teacher`

        # 1. Image level: some source images are redrawn in the style of the target images beside them.
        if self.restyle:
            source = self.restyle(source, target)                                             # (B, 3, H, W)

        # 2. Supervision: the student learns from the source's labels.
        heatmaps, source_features = heatmaps_and_features(self.student, source, self.compute, *source_text)
        self.losses = losses = {"supervised": supervised_loss(heatmaps, labels, label_weights)}  # for the log, too
        if not (weights.consistency or weights.adversarial or weights.information):
            return losses["supervised"], heatmaps

        # 3. Each target image is seen in two random views: one is the teacher's, one the student's.
        to_teacher, to_student = (random_affine(len(target), size, self.views).to(target.device) for _ in range(2))
        teacher_view = jitter_color(warp(target, to_teacher), self.views.color)               # (B, 3, H, W)
        student_view = jitter_color(warp(target, to_student), self.views.color)               # (B, 3, H, W)

        # 4. The teacher's heatmaps, back in the frame of the whole image: their peaks become pseudo-labels in part 5.
        with torch.no_grad():
            found, _ = heatmaps_and_features(self.teacher, teacher_view, self.compute, *target_text)
            found = self.to_whole_image(found, to_teacher)                                    # (B, K, h, w)

        # 5. Consistency: the student must find in its view what the teacher found in the other one. Adaptive occlusion
        #    makes that harder: a keypoint that the teacher is sure of disappears from the student's view.
        if self.views.occlusion:
            room = (min(size) + 1) // 3  # the largest patch that `occlude` has room for
            patch = min(round(self.views.patch * size[0]), room)
            student_view = occlude(student_view, found, to_student, self.views.occlusion, size=patch)
        predicted, target_features = heatmaps_and_features(self.student, student_view, self.compute, *target_text)
        predicted = self.to_whole_image(predicted, to_student)                                # (B, K, h, w)
        if weights.consistency:
            pseudo_labels, mask = rectify(found, self.config.sigma), confidence_mask(found)
            losses["consistency"] = weights.consistency * consistency_loss(predicted, pseudo_labels, mask)

        # 6. Feature level: the discriminator learns to tell the domains apart, the student to make that impossible.
        if weights.adversarial:
            logits = self.discriminate(source_features), self.discriminate(target_features)   # (B, 1, h, w) each
            losses["adversarial"] = weights.adversarial * adversarial_loss(*logits)

        # 7. Pose level: the target's heatmaps are sure of a place, and not all of the same one.
        if weights.information:
            losses["information"] = weights.information * information_maximization_loss(predicted)
        return sum(losses.values()), heatmaps

    def discriminate(self, features):
        with torch.autocast(features.device.type, torch.bfloat16, enabled=self.compute.bf16):
            return self.discriminator(reverse_gradient(features)).float()

    def to_whole_image(self, heatmaps, matrix):
        """Heatmaps (B, K, h, w) of views, back in the frame of the whole images; those that the source teaches."""
        back = invert_matrix(resize_affine(matrix, self.config.image_size, heatmaps.shape[2:]))
        return warp(heatmaps, back)[:, self.source_keypoints]


def heatmaps_and_features(model, images, compute, *text):
    """(B, K, h, w) and (B, C, h, w), in float32, of RGB images (B, 3, H, W) in [0, 1]."""
    def run(images, *text):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=compute.bf16):
            features = model.features(normalize(images), *text)
            heatmaps = model.predictor(features)
        return heatmaps.float(), features.float()
    return in_parts(run, compute.parts, images, *text)


# === Appendix: the style decoder's training, its encoder's weights, source views; skip on a first reading =============

from itertools import pairwise

from torch.utils.checkpoint import checkpoint


def draw(shape, low=0.0, high=1.0):
    """Random numbers between low and high, drawn on the CPU: the same ones whatever device computes."""
    return torch.empty(shape).uniform_(low, high)


def in_parts(run, parts, *inputs):
    """run(*inputs), outputs (B, ...), in so many parts of a batch, in the memory of one: what a part keeps for the
    backward pass is forgotten and computed anew there. An input may be None."""
    parts = min(parts, len(inputs[0]))  # one without images would spoil BatchNorm's statistics
    if parts == 1:
        return run(*inputs)
    chunks = zip(*([None] * parts if x is None else x.tensor_split(parts) for x in inputs))
    outputs = [checkpoint(run, *chunk, use_reentrant=False) for chunk in chunks]
    return tuple(map(torch.cat, zip(*outputs)))


def convolution(c_in, c_out):
    """A 3×3 convolution with reflection padding, and ReLU."""
    layer = nn.Conv2d(c_in, c_out, 3)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # an untrained encoder must not fade out
    nn.init.zeros_(layer.bias)
    return [nn.ReflectionPad2d(1), layer, nn.ReLU()]


def style_transfer_losses(stylist, content, style):
    style_levels = levels(stylist, style)
    t = adain(stylist.encoder(content), style_levels[-1])
    decoded = levels(stylist, stylist.decoder(t))
    content_loss = F.mse_loss(decoded[-1], t)
    return content_loss, sum(F.mse_loss(gram(x), gram(s)) for x, s in zip(decoded, style_levels))


def levels(stylist, images):
    """Features at relu1_1, relu2_1, relu3_1, relu4_1; the first `depth` of them."""
    outputs = [images]
    for first, last in pairwise((0, *ENCODER_ENDS[:stylist.depth])):
        outputs.append(stylist.encoder[first:last](outputs[-1]))
    return outputs[1:]


def gram(features):
    """How strongly each two channels of features f (B, C, h, w) fire together: f fᵀ / (C h w), (B, C, C)."""
    flat = features.flatten(2)  # (B, C, h w)
    return flat @ flat.mT / flat[0].numel()


def source_view(images, keypoints, visible, views):
    """A random view of labelled images (B, 3, H, W), keypoints (B, K, 2) and visible (B, K), 0 outside the view."""
    size = images.shape[2:]
    matrix = random_affine(len(images), size, views).to(images.device)
    keypoints = transform_points(keypoints.to(matrix), matrix)
    inside = ((keypoints >= 0) & (keypoints <= torch.tensor(size[::-1]).to(keypoints) - 1)).all(2)
    return jitter_color(warp(images, matrix), views.color), keypoints, visible.to(matrix) * inside


def load_style_encoder(encoder, path_or_name):
    """Fills a style encoder with the first layers of the public one."""
    state = load_weights(path_or_name)
    with expecting(path_or_name, "the public AdaIN encoder", WeightsError):
        state = {name: tensor for name, tensor in state.items() if int(name.split(".")[0]) < len(encoder)}
        load_strictly(encoder, state, path_or_name)
