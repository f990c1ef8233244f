"""Domain adaptive pose estimation via multi-level alignment (arXiv 2404.14885).

There are labels for a source domain (drawn people, say) and only images for the target domain
(photographs). A student learns from the labels. Three levels of alignment bring the two domains
together:

    image    source images are redrawn with the statistics of target images     adain
    feature  a discriminator must not be able to tell the domains apart         L_adv
    pose     each target heatmap is sure of a place, and all cover many places  L_im

A teacher, the running average of the student, labels the target images. Teacher and student each
see a random view of each image, and the student must say what the teacher says (L_con). The README
has a drawing of the whole step, and assets/tour.md has pictures of each part.

    L = L_sup + 1.0 L_con + 0.1 L_adv + 0.3 L_im    (the paper's weights; a recipe may have others)

From top to bottom, the lesson has the loss of each level, then views, then the teacher, and at last
`MultiLevelAlignment`, whose `forward` is one step of adaptation, in parts numbered 0 to 8. To see
the whole first, begin there.

Letters: B images in a batch, K keypoints, H×W image, h×w heatmap, C channels. Points are x before
y; pixel centres are at integers. Functions that change images (style, colour, warp, occlusion) take
and return RGB in [0, 1]. Random numbers are drawn on the CPU and then moved to the images' device,
so that one seed gives the same numbers on every device.
"""
import copy
from dataclasses import astuple, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vlpose import (Compute, WeightsError, heatmaps_and_features, heatmaps_of_images,
                    load_strictly, load_weights)
from data import (MEAN, STD, encode_heatmaps, expecting, invert_matrix, mean_of_all, rows_of_all,
                  transform_points)

# ----------------------------------------------------------------------- supervision, on the source

def supervised_loss(predicted, label_heatmaps, weights):
    """L_sup = mean of ½ ω (y - ŷ)² over images, keypoints and pixels.

    predicted ŷ, label_heatmaps y (B, K, h, w); weights ω (B, K): 0 where a keypoint has no label.
    The authors' ½ matters here, beside other losses. VLPose's loss stands alone and has no ½: see
    `heatmap_loss` in train.py.
    """
    errors = label_heatmaps - predicted                         # y - ŷ (B, K, h, w)
    return 0.5 * (weights[:, :, None, None] * errors ** 2).mean()


# ------------------------------------------------------------------------------- image level: style

def adain(content, style):
    """AdaIN(c, s) = σ(s) (c - μ(c)) / σ(c) + μ(s): adaptive instance normalization.

    From arXiv 1703.06868. μ and σ are the mean and the standard deviation of each channel over the
    places of one image. Content c (B, C, h, w) gets the μ and σ of style s (B, C, h', w').
    """
    var_c, mean_c = torch.var_mean(content, dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
    var_s, mean_s = torch.var_mean(style, dim=(2, 3), keepdim=True)    # (B, C, 1, 1)
    ratio = ((var_s + 1e-5) / (var_c + 1e-5)).sqrt()                   # σ(s) / σ(c)
    return ratio * (content - mean_c) + mean_s


class StyleTransfer(nn.Module):
    """Redraws one image in the style of another; images (B, 3, H, W) are RGB in [0, 1].

    `encoder` is VGG-19 up to relu4_1; it is never trained. `decoder` is its mirror image: it makes
    a picture of features whose statistics AdaIN has replaced.

    encoder, decoder: files or names; "adain-encoder" and "adain-decoder" are the public pair.
        Raises WeightsError if a tensor is missing, left over or of another shape.
    width: how many channels the first layer has.
    depth: at which of its four levels the encoder ends. A random encoder of width 16 and depth 1 is
        enough for figures, and its decoder is trained in half a minute; a deeper one blurs.
    """

    def __init__(self, encoder=None, decoder=None, width=64, depth=4):
        super().__init__()
        self.encoder = style_encoder(width, depth)
        self.decoder = style_decoder(width, depth)
        if encoder:
            load_style_encoder(self.encoder, encoder)
        if decoder:
            load_strictly(self.decoder, load_weights(decoder), decoder)

    @torch.no_grad()
    def forward(self, content, style, alpha=1.0):
        """Content in the colours and textures of style, as strongly as alpha says.

        alpha: from 0 to 1, a number or (B,).
        """
        c = self.encoder(content)
        s = self.encoder(style)
        alpha = torch.as_tensor(alpha).to(c).view(-1, 1, 1, 1)
        mixed = torch.lerp(c, adain(c, s), alpha)  # α AdaIN(c, s) + (1 - α) c
        height, width = content.shape[2:]
        images = self.decoder(mixed).clamp(0, 1)
        return images[:, :, :height, :width]  # pooling has rounded odd sides up

    def restyle(self, content, style, probability):
        """The image level: redraws some images of a batch, image b in the style of style[b].

        An image is chosen with this probability. How strongly it changes is random: α ~ U(0, 1).
        """
        chosen = torch.rand(len(content)) < probability  # (B,) which images
        alpha = torch.rand(len(content))                 # (B,) how strongly
        mixed = content.clone()
        if chosen.any():
            mixed[chosen] = self(content[chosen], style[chosen], alpha[chosen])
        return mixed

    def loss(self, content, style):
        """The decoder's two losses: (content loss, Gram loss). The paper adds them up as 1 : 0.1.

        Content loss: the mean squared error between the features of the result and t = AdaIN(c, s).
        Gram loss: the mean squared error between the Gram matrices of the result and of the style
        image, summed over all levels of the encoder.
        """
        style_levels = encoder_levels(self.encoder, style)
        t = adain(self.encoder(content), style_levels[-1])
        result_levels = encoder_levels(self.encoder, self.decoder(t))
        content_loss = F.mse_loss(result_levels[-1], t)
        gram_loss = 0
        for x, s in zip(result_levels, style_levels):
            gram_loss = gram_loss + F.mse_loss(gram(x), gram(s))
        return content_loss, gram_loss


# --------------------------------------------------------------------- feature level: discriminator

def reverse_gradient(x, scale=1.0):
    """Returns x itself, but its gradient comes back times -scale (arXiv 1409.7495).

    The layers before it then learn the opposite of what the layers after it learn.
    """
    x = x.view_as(x)
    if x.requires_grad:
        x.register_hook(lambda gradient: -scale * gradient)
    return x


class DomainDiscriminator(nn.Sequential):
    """Features (B, C, h, w) -> logits (B, 1, h, w), high where they look like the target's."""

    def __init__(self, channels):
        half = channels // 2
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(channels, half, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(half, half, 3, padding=1), nn.LeakyReLU(0.2),
            nn.Conv2d(half, 1, 3, padding=1))


def adversarial_loss(source, target):
    """L_adv = mean of -log(1 - sigmoid(z_source)) + mean of -log sigmoid(z_target).

    This is the binary cross-entropy of logits z. The discriminator makes it small. The student,
    behind `reverse_gradient`, makes it large: then its features no longer tell where an image is
    from.
    """
    # softplus(z) = log(1 + exp(z)) = -log(1 - sigmoid(z))
    return F.softplus(source).mean() + F.softplus(-target).mean()


# ------------------------------------------------------------- pose level: information maximization

def information_maximization_loss(heatmaps):
    """L_im = Ĥ(p_row) + Ĥ(p_col) - Ĥ(p̄) of heatmaps y (B, K, h, w).

        p_row = softmax(the mean of y over each row), h numbers
        p_col = softmax(the mean of y over each column), w numbers
        p̄     = softmax(the mean of y over the batch), h w numbers
        Ĥ(p)  = H(p) / (h w), averaged over images and keypoints;  H(p) = -Σ p log p

    The first two terms are smaller if each heatmap is sure of a row and of a column. The last term
    is larger if the images do not all agree on one place. How much does it matter? A heatmap's
    values are 0 to 1 and their means are far smaller, so each softmax is nearly flat, and even a
    perfect peak hardly lowers H: at the paper's weight L_im changes next to nothing.
    """
    h, w = heatmaps.shape[2:]
    H_row = entropy(heatmaps.mean(3))          # of p_row (B, K, h)
    H_col = entropy(heatmaps.mean(2))          # of p_col (B, K, w)
    y_bar = mean_of_all(heatmaps.mean(0))      # (K, h, w) the mean over the batch of all processes
    H_bar = entropy(y_bar.flatten(1))          # of p̄ (K, h w)
    return (H_row + H_col - H_bar) / (h * w)


def entropy(logits):
    """H(p) = -Σ p log p, where p = softmax over the last dimension; the mean over the others."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


# -------------------------------------------------------------------------------------------- views
#
# A view is an image under a random affine map. A matrix (2, 3) leads from where a pixel is to where
# it goes, as in data.py. To compare what teacher and student see, their heatmaps go back by the
# inverse map into the frame of the whole image; `resize_affine` turns the map of the image into the
# same map of its smaller heatmap.

@dataclass(frozen=True)
class Views:
    """How far the views of a target image go. The defaults are the paper's, for many epochs."""
    rotation: float = 60.0  # degrees, at most, either way
    shear: float = 30.0  # degrees, at most, either way
    shift: float = 0.05  # of the image's size, at most, either way
    scale: tuple[float, float] = (0.6, 1.3)  # the least and the greatest
    color: float = 0.25  # strength of the colour jitter
    occlusion: float = 0.5  # probability that a keypoint is covered, if the teacher is sure of one
    patch: float = 20 / 256  # side of the square that covers it, of the image's height


GENTLE_VIEWS = Views(rotation=15.0, shear=5.0, scale=(0.85, 1.15))  # for minutes of training


def random_affine(count, size, views=Views()):
    """(count, 2, 3) random maps of images of `size` (height, width), about their centre c.

    Each maps p to A (p - c) + c + shift, where A = scale · rotation · shear.
    """
    height, width = size
    sides = torch.tensor([width, height], dtype=torch.float32)
    center = (sides - 1) / 2
    angle = torch.empty(count).uniform_(-views.rotation, views.rotation).deg2rad()
    slant = torch.empty(count).uniform_(-views.shear, views.shear).deg2rad().tan()
    scale = torch.empty(count, 1, 1).uniform_(*views.scale)
    shift = torch.empty(count, 2).uniform_(-views.shift, views.shift) * sides

    # rotation · shear = [cos  -sin] [1  slant]
    #                    [sin   cos] [0    1  ]
    cos = angle.cos()
    sin = angle.sin()
    first_row = torch.stack([cos, cos * slant - sin], dim=1)            # (count, 2)
    second_row = torch.stack([sin, sin * slant + cos], dim=1)
    A = scale * torch.stack([first_row, second_row], dim=1)             # (count, 2, 2)
    offset = center + shift - A @ center                                # (count, 2)
    return torch.cat([A, offset[:, :, None]], dim=2)


def warp(x, matrix):
    """Moves each pixel p of x (B, C, h, w) to matrix · (p, 1), bilinearly; matrix (B, 2, 3).

    Where no pixel goes, the result is 0.
    """
    h, w = x.shape[2:]
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    pixels = torch.stack([columns, rows], dim=2).view(h * w, 2).to(matrix)      # x before y
    origins = transform_points(pixels, invert_matrix(matrix))                   # (B, h w, 2)
    sides = torch.tensor([w - 1, h - 1]).to(origins)
    grid = 2 * origins / sides - 1  # `grid_sample` wants -1 and 1 at the outermost pixels' centres
    return F.grid_sample(x, grid.view(-1, h, w, 2), align_corners=True)


def jitter_color(images, strength=0.25):
    """Random brightness, contrast and saturation, each 1 ± strength, of images (B, 3, H, W)."""
    noise = 2 * torch.rand(3, len(images), 1, 1, 1).to(images) - 1
    brightness, contrast, saturation = 1 + strength * noise                     # (B, 1, 1, 1) each
    images = torch.lerp(images.mean(1, keepdim=True), images, saturation)
    images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, contrast)
    return (brightness * images).clamp(0, 1)


def occlude(images, heatmaps, matrix, probability=0.5, threshold=0.9, size=20):
    """Adaptive occlusion: hides a keypoint from the student, who must infer it from the others.

    In some images, one keypoint that the teacher is sure of disappears under a patch of size×size
    pixels from elsewhere in the same image.

    images (B, 3, H, W): the student's views.
    heatmaps (B, K, h, w): the teacher's, in the frame of the whole images.
    matrix (B, 2, 3): maps the whole images to the views.
    probability: how likely a view changes, if it shows a keypoint whose confidence is at least
        `threshold`. The other views stay as they are.
    Raises ValueError if the images are too small to take a patch from elsewhere.
    """
    point, exists = keypoint_to_hide(heatmaps, matrix, images.shape[2:], threshold)
    by_chance = torch.rand(len(images)).to(images.device) < probability
    return cover_with_patch(images, point, exists & by_chance, size)


def keypoint_to_hide(heatmaps, matrix, size, threshold):
    """One keypoint of each view -> its pixel (B, 2), and whether there is such a keypoint (B,).

    It is drawn from the keypoints that the teacher is sure of and that the view shows.
    heatmaps, matrix, threshold: as in `occlude`; size: of the views, (height, width).
    """
    height, width = size
    points, confidence = peaks(heatmaps)
    points = points * grid_scale(heatmaps.shape[2:], size, points)      # in the whole image
    points = transform_points(points, matrix).round().long()            # (B, K, 2) in the view
    sides = torch.tensor([width, height], device=points.device)
    inside = ((points >= 0) & (points < sides)).all(2)                  # (B, K)
    sure = (confidence >= threshold) & inside                           # (B, K)
    lots = torch.rand(sure.shape).to(points.device)
    drawn = lots.masked_fill(~sure, -1).argmax(1)                       # (B,) which keypoint
    return points[torch.arange(len(points)), drawn], sure.any(1)


# -------------------------------------------------------------------------------------- the teacher

def peaks(heatmaps):
    """The highest pixels (B, K, 2) of heatmaps, and their heights (B, K): the confidence."""
    confidence, place = heatmaps.flatten(2).max(2)
    width = heatmaps.shape[3]
    points = torch.stack([place % width, place // width], dim=2)
    return points.to(heatmaps), confidence


def rectify(heatmaps, sigma):
    """Pseudo-labels: a Gaussian at each heatmap's peak (B, K, h, w), as for labelled images."""
    points, confidence = peaks(heatmaps)
    size = heatmaps.shape[2:]
    gaussians, _ = encode_heatmaps(points, torch.ones_like(confidence), size, size, sigma)
    return gaussians


def confidence_mask(heatmaps, ratio=0.5):
    """(B, K), True where the confidence is above this quantile of the whole batch's confidences.

    By default the quantile is their median. The whole batch is the batch of all processes.
    """
    _, confidence = peaks(heatmaps)
    return confidence > rows_of_all(confidence).quantile(ratio)


def consistency_loss(predicted, pseudo_labels, mask):
    """L_con = mean of (m (y_s - y_t))² over images, keypoints and pixels.

    predicted (B, K, h, w): the student's heatmaps y_s; pseudo_labels: the teacher's y_t.
    mask (B, K): m.
    """
    return (mask[:, :, None, None] * (predicted - pseudo_labels) ** 2).mean()


def make_teacher(student):
    """A copy of the student that never gets a gradient, but whose BatchNorm is in training mode.

    The teacher sees only target images. In training mode BatchNorm normalises them with their own
    statistics, not with the source's (adaptive BatchNorm, arXiv 1603.04779), and gathers these in
    its buffers for the test. To average the student's buffers instead would mix in the source
    images that the student sees. Only the frozen base of a VLPose stays in evaluation mode.
    Drop path and dropout are off: a label must not be noisy.
    """
    teacher = copy.deepcopy(student).requires_grad_(False).train()
    for module in teacher.modules():
        if hasattr(module, "p"):  # the probability of drop path or dropout
            module.p = 0.0
    return teacher


@torch.no_grad()
def ema_update(teacher, student, decay=0.999):
    """teacher ← decay · teacher + (1 - decay) · student: the parameters, but not the buffers."""
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.lerp_(s, 1 - decay)


# ----------------------------------------------------------------------------- a step of adaptation

@dataclass(frozen=True)
class LossWeights:
    """The weights of the losses beside L_sup, by default the paper's; 0 leaves a loss out."""
    consistency: float = 1.0    # of L_con
    feature_level: float = 0.1  # of L_adv
    pose_level: float = 0.3     # of L_im


class MultiLevelAlignment(nn.Module):
    """Stage 2: the student, its teacher and the discriminator; `forward` is one step of adaptation.

    student: a PoseModel that has learned from the source's labels, or a VLPose around one, of which
        only the adapter learns.
    restyle: any function (source images, target images) -> images in place of the source's, such
        as `StyleTransfer.restyle` with its probability filled in. Give a function, not a module:
        a module's parameters would be trained here. None leaves out the image level.
    weights: how much each loss counts.
    views: how far the random views of target images go.
    decay: the share of the teacher that stays at each step.
    source_keypoints: the keypoints that are adapted, which are those that the source labels: the
        student is not taught the others, so its heatmaps of them must not become pseudo-labels.
        None means all, as with `--source none`, where nothing is labelled.
    compute: how networks compute.
    To add a loss, override `alignment_losses`; the README has an example. To make its weight an
    option, add a field with the same name to both LossWeights and train.AlignmentAdaptation. If all
    weights are 0, parts 3 to 8 are skipped, so that an added loss has no effect either.
    """

    def __init__(self, student, restyle=None, weights=LossWeights(), views=Views(), decay=0.999,
                 source_keypoints=None, compute=Compute()):
        super().__init__()
        self.student = student
        self.teacher = make_teacher(student)
        self.discriminator = DomainDiscriminator(student.predictor.in_channels)
        self.config = student.config
        self.restyle = restyle
        self.weights = weights
        self.views = views
        self.decay = decay
        self.source_keypoints = source_keypoints
        self.compute = compute
        self.losses = {}  # of the last step, times their weights; the log has a column for each

    def forward(self, source, label_heatmaps, label_weights, target, source_text=(),
                target_text=()):
        """One step -> (L, the student's heatmaps of the source images (B, K, h, w)).

        source, target (B, 3, H, W): images, RGB in [0, 1].
        label_heatmaps (B, K, h, w), label_weights (B, K): of the source's labels, from
            `encode_heatmaps`; the target has none.
        source_text, target_text: T and its mask, if the student is a VLPose.
        """
        # 0. The optimizer has moved the student since the last step; the teacher follows. `fit`
        #    puts frozen BatchNorm into evaluation mode, but the teacher's must gather statistics.
        ema_update(self.teacher, self.student, self.decay)
        self.teacher.train()

        # 1. Image level: some source images are redrawn in the style of target images.
        if self.restyle:
            source = self.restyle(source, target)                               # (B, 3, H, W)

        # 2. Supervision: the student learns from the source's labels.
        source_heatmaps, source_features = heatmaps_and_features(
            self.student, source, self.compute, *source_text)
        L_sup = supervised_loss(source_heatmaps, label_heatmaps, label_weights)
        losses = {"supervised": L_sup}

        learns_from_target = any(astuple(self.weights))  # is the weight of any loss above 0?
        if learns_from_target:
            # 3. Each target image is seen in two random views: the teacher's and the student's.
            to_teacher = self.random_maps(target)                               # (B, 2, 3)
            to_student = self.random_maps(target)
            teacher_view = jitter_color(warp(target, to_teacher), self.views.color)
            student_view = jitter_color(warp(target, to_student), self.views.color)

            # 4. The teacher's heatmaps, back in the frame of the whole image.
            with torch.no_grad():
                teacher_heatmaps = heatmaps_of_images(
                    self.teacher, teacher_view, self.compute, *target_text)
                teacher_heatmaps = self.to_whole_image(teacher_heatmaps, to_teacher)

            # 5. The student's heatmaps, likewise. Adaptive occlusion makes its task harder: a
            #    keypoint that the teacher is sure of disappears from the student's view.
            if self.views.occlusion:
                student_view = self.cover_a_keypoint(student_view, teacher_heatmaps, to_student)
            student_heatmaps, target_features = heatmaps_and_features(
                self.student, student_view, self.compute, *target_text)
            student_heatmaps = self.to_whole_image(student_heatmaps, to_student)

            # 6, 7 and 8. The losses of the target.
            losses.update(self.alignment_losses(
                teacher_heatmaps, student_heatmaps, source_features, target_features))
        self.losses = losses
        return sum(losses.values()), source_heatmaps

    def alignment_losses(self, teacher_heatmaps, student_heatmaps, source_features,
                         target_features):
        """The losses beside L_sup: {name: loss, times its weight}.

        teacher_heatmaps, student_heatmaps (B, K, h, w): of the target images, for the keypoints
            in `source_keypoints` alone.
        source_features, target_features (B, C, h, w): what the student makes its heatmaps of.
        """
        weights = self.weights
        losses = {}

        # 6. Consistency: the student must find in its view what the teacher found in the other one.
        if weights.consistency:
            pseudo_labels = rectify(teacher_heatmaps, self.config.sigma)        # (B, K, h, w)
            mask = confidence_mask(teacher_heatmaps)                            # (B, K)
            L_con = consistency_loss(student_heatmaps, pseudo_labels, mask)
            losses["consistency"] = weights.consistency * L_con

        # 7. Feature level: the discriminator learns to tell the domains apart, the student to make
        #    that impossible.
        if weights.feature_level:
            source_logits = self.discriminate(source_features)                  # (B, 1, h, w)
            target_logits = self.discriminate(target_features)
            L_adv = adversarial_loss(source_logits, target_logits)
            losses["feature_level"] = weights.feature_level * L_adv

        # 8. Pose level: the target's heatmaps are sure of a place, and not all of the same one.
        if weights.pose_level:
            L_im = information_maximization_loss(student_heatmaps)
            losses["pose_level"] = weights.pose_level * L_im
        return losses

    def random_maps(self, images):
        """(B, 2, 3), a random view of each image."""
        maps = random_affine(len(images), self.config.image_size, self.views)
        return maps.to(images.device)

    def cover_a_keypoint(self, student_view, teacher_heatmaps, to_student):
        """The student's view (B, 3, H, W) with a patch over one keypoint, see `occlude`."""
        height, width = self.config.image_size
        largest = (min(height, width) + 1) // 3  # that `occlude` has room for
        size = min(round(self.views.patch * height), largest)
        probability = self.views.occlusion
        return occlude(student_view, teacher_heatmaps, to_student, probability, size=size)

    def discriminate(self, features):
        """Logits (B, 1, h, w) of features (B, C, h, w), whose gradient comes back reversed."""
        with torch.autocast(features.device.type, torch.bfloat16, enabled=self.compute.bf16):
            return self.discriminator(reverse_gradient(features)).float()

    def to_whole_image(self, heatmaps, matrix):
        """Heatmaps (B, K, h, w) of views, back in the frame of the whole images.

        Only the heatmaps of `source_keypoints` are kept.
        """
        matrix = resize_affine(matrix, self.config.image_size, heatmaps.shape[2:])
        heatmaps = warp(heatmaps, invert_matrix(matrix))
        if self.source_keypoints is None:
            return heatmaps
        return heatmaps[:, self.source_keypoints]


# === Appendix: the networks of style transfer; skip on a first reading ============================

# How many layers `style_encoder` has up to relu1_1, relu2_1, relu3_1 and relu4_1. Each 3×3
# convolution counts as three, with its padding and its ReLU.
ENCODER_ENDS = (4, 11, 18, 31)


def style_encoder(width, depth):
    """VGG-19 up to relu1_1, relu2_1, relu3_1 or relu4_1 (depth 1 to 4), with random weights.

    A 1×1 convolution before it is (x - mean) / std, as models of ImageNet want their input. The
    public encoder brings a first layer of its own. The layers have the public file's numbers.
    """
    w = width
    layers = nn.Sequential(
        nn.Conv2d(3, 3, 1),
        *convolution(3, w),          # relu1_1
        *convolution(w, w),
        nn.MaxPool2d(2, ceil_mode=True),
        *convolution(w, 2 * w),      # relu2_1
        *convolution(2 * w, 2 * w),
        nn.MaxPool2d(2, ceil_mode=True),
        *convolution(2 * w, 4 * w),  # relu3_1
        *convolution(4 * w, 4 * w),
        *convolution(4 * w, 4 * w),
        *convolution(4 * w, 4 * w),
        nn.MaxPool2d(2, ceil_mode=True),
        *convolution(4 * w, 8 * w),  # relu4_1
    )
    encoder = layers[:ENCODER_ENDS[depth - 1]].requires_grad_(False)
    mean = torch.tensor(MEAN)
    std = torch.tensor(STD)
    encoder[0].weight.copy_(torch.diag(1 / std)[:, :, None, None])
    encoder[0].bias.copy_(-mean / std)
    return encoder


def style_decoder(width, depth):
    """The mirror image of `style_encoder`, initialised so that its pictures are nearly grey.

    As many layers are missing at its start as at the encoder's end. The others keep their numbers,
    which are the public file's.
    """
    w = width
    layers = nn.Sequential(
        *convolution(8 * w, 4 * w),
        nn.Upsample(scale_factor=2),
        *convolution(4 * w, 4 * w),
        *convolution(4 * w, 4 * w),
        *convolution(4 * w, 4 * w),
        *convolution(4 * w, 2 * w),
        nn.Upsample(scale_factor=2),
        *convolution(2 * w, 2 * w),
        *convolution(2 * w, w),
        nn.Upsample(scale_factor=2),
        *convolution(w, w),
        *convolution(w, 3)[:-1],     # colours: no ReLU behind the last convolution
    )
    missing = ENCODER_ENDS[-1] - ENCODER_ENDS[depth - 1]
    decoder = layers[missing:]
    nn.init.normal_(decoder[-1].weight, std=0.01)
    nn.init.constant_(decoder[-1].bias, 0.5)
    return decoder


def encoder_levels(encoder, images):
    """Features at relu1_1, relu2_1, relu3_1 and relu4_1, as far as the encoder goes."""
    features = images
    levels = []
    for number, layer in enumerate(encoder, start=1):
        features = layer(features)
        if number in ENCODER_ENDS:
            levels.append(features)
    return levels


def gram(features):
    """How strongly each two channels of features f (B, C, h, w) correlate: f fᵀ / (C h w)."""
    flat = features.flatten(2)                  # (B, C, h w)
    return flat @ flat.mT / flat[0].numel()     # (B, C, C)


def convolution(c_in, c_out):
    """A 3×3 convolution with reflection padding, and ReLU: a list of three layers."""
    layer = nn.Conv2d(c_in, c_out, 3)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # keeps the variance of features
    nn.init.zeros_(layer.bias)
    return [nn.ReflectionPad2d(1), layer, nn.ReLU()]


def load_style_encoder(encoder, path_or_name):
    """Fills a style encoder with the first layers of the public one.

    Raises WeightsError if the file is another network, or a tensor is missing or of another shape.
    """
    state = load_weights(path_or_name)
    with expecting(path_or_name, "the public AdaIN encoder", WeightsError):
        first_layers = {}
        for name, tensor in state.items():
            layer = int(name.split(".")[0])  # "29.weight" is of layer 29
            if layer < len(encoder):
                first_layers[name] = tensor
        load_strictly(encoder, first_layers, path_or_name)


def for_normalized_images(stylist):
    """Changes a style network that reads and draws normalised images into one for RGB in [0, 1].

    The decoders of the alignment's authors were trained so. Both steps are linear: x -> (x - μ) / σ
    becomes a part of the encoder's first layer, and y -> σ y + μ one of the decoder's last.
    """
    mean = torch.tensor(MEAN)
    std = torch.tensor(STD)
    first = stylist.encoder[0]  # a 1×1 convolution, which has no border
    last = stylist.decoder[-1]
    with torch.no_grad():
        first.weight /= std.view(1, 3, 1, 1)
        first.bias -= (first.weight * mean.view(1, 3, 1, 1)).sum((1, 2, 3))
        last.weight *= std.view(3, 1, 1, 1)
        last.bias.mul_(std).add_(mean)


# === Appendix: maps of smaller grids; skip on a first reading =====================================

def grid_scale(old, new, like):
    """(2,) factors of x and y from a grid of size `old` (height, width) to one of size `new`.

    The centres of the grids' corner pixels coincide. The result has `like`'s type and device.
    """
    old_height, old_width = old
    height, width = new
    factors = [(width - 1) / (old_width - 1), (height - 1) / (old_height - 1)]
    return torch.tensor(factors).to(like)


def resize_affine(matrix, old, new):
    """The map M = [A b] (B, 2, 3) of a grid of size `old`, for a grid of size `new`.

    It is [S A S⁻¹, S b], where S scales by `grid_scale`; sizes are (height, width).
    """
    scale = grid_scale(old, new, matrix)
    A = scale[:, None] * matrix[..., :2] / scale  # S A S⁻¹
    b = scale[:, None] * matrix[..., 2:]          # S b
    return torch.cat([A, b], dim=-1)


# === Appendix: patches; skip on a first reading ===================================================

def cover_with_patch(images, point, chosen, size):
    """Images in which a patch of size×size pixels from elsewhere lies over a point.

    images (B, 3, H, W), point (B, 2), chosen (B,): which images change.
    """
    height, width = images.shape[2:]
    least = 3 * size - 1
    if min(height, width) < least:
        raise ValueError(f"occlusion: expected images of at least {least} pixels each way to take "
                         f"a patch of {size}×{size} from elsewhere, found {height}×{width}")

    # The point is in the middle of the patch, unless the border is near.
    sides = torch.tensor([width, height], device=point.device)
    places = sides - size + 1  # how many places its upper left corner can have along x and along y
    corner = (point - size // 2).clamp(min=0).minimum(places - 1)       # (B, 2)

    # Its pixels come from a random step further right and down, where corners wrap around at the
    # border. A step from `size` to `places - size` is at least `size` both ways: no pixel is copied
    # onto itself.
    fraction = torch.rand(len(images), 2).to(point.device)
    step = size + (fraction * (places - 2 * size + 1)).long()           # (B, 2)
    origin = (corner + step) % places                                   # (B, 2)

    covered = images.clone()
    corners = corner.tolist()
    origins = origin.tolist()
    for image in chosen.nonzero()[:, 0].tolist():
        x, y = corners[image]
        from_x, from_y = origins[image]
        patch = images[image, :, from_y:from_y + size, from_x:from_x + size]
        covered[image, :, y:y + size, x:x + size] = patch
    return covered


# === Appendix: views of labelled images; skip on a first reading ==================================

def source_view(images, keypoints, visible, views):
    """A random view of labelled images -> (images, keypoints, visible) of the view.

    images (B, 3, H, W), keypoints (B, K, 2), visible (B, K); visible becomes 0 outside the view.
    """
    height, width = images.shape[2:]
    matrix = random_affine(len(images), (height, width), views).to(images.device)
    images = jitter_color(warp(images, matrix), views.color)
    keypoints = transform_points(keypoints.to(matrix), matrix)
    last_pixel = torch.tensor([width - 1, height - 1]).to(keypoints)
    inside = ((keypoints >= 0) & (keypoints <= last_pixel)).all(2)              # (B, K)
    return images, keypoints, visible.to(matrix) * inside
