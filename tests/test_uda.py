"""The parts of uda.py against their equations in loops, or against SciPy, torchvision, data.py."""
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms.functional import InterpolationMode, affine

import data
import uda
from data import (COCO17, PoseDataset, draw_figure, encode_heatmaps, invert_matrix,
                  transform_points, warp_image)
from eval import predict
from train import new_stylist, parse_options
from uda import (GENTLE_VIEWS, Compute, DomainDiscriminator, LossWeights, MultiLevelAlignment,
                 StyleTransfer, Views, adain, adversarial_loss, confidence_mask, consistency_loss,
                 ema_update, encoder_levels, heatmaps_and_features,
                 information_maximization_loss, jitter_color, make_teacher, occlude, peaks,
                 random_affine, rectify, resize_affine, reverse_gradient, supervised_loss, warp)
from vlpose import (MODEL_CONFIGS, DropPath, PoseModel, ViTConfig, VLPose, WeightsError,
                    cache_folder, load_backbone, load_pose_model, save_checkpoint)

VIT = ViTConfig(32, 2, 4, 0.0, 0, 1.0, image_size=(64, 64), decoder_dim=16, sigma=1.0)
SIMPLE = ViTConfig(32, 2, 4, 0.5, 0, 1.0, image_size=(64, 64), decoder_dim=0)
B, K, H, W = 3, 4, 12, 10  # heatmaps


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def heatmaps():
    return torch.rand(B, K, H, W)


def to_tensor(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


@pytest.fixture
def figures():
    """Two drawn people (2, 3, 96, 96), RGB in [0, 1]."""
    pictures = [Image.fromarray(draw_figure(style, np.random.default_rng(0)).image)
                for style in ("photo", "cartoon")]
    return torch.stack([to_tensor(picture.resize((96, 96))) for picture in pictures])


@pytest.fixture(scope="module")
def resnet():
    return PoseModel(replace(MODEL_CONFIGS["resnet18"], image_size=(64, 64)))


# -------------------------------------------------------------------------------------- the student

@torch.no_grad()
def test_a_resnet_becomes_three_deconvolutions_of_256_channels_and_a_quiet_predictor(resnet):
    images = torch.randn(2, 3, 64, 64)
    assert resnet(images).shape == (2, 17, 16, 16)
    assert resnet.features(images).shape == (2, 256, 16, 16)
    deconvolutions = [layer for layer in resnet.modules() if isinstance(layer, nn.ConvTranspose2d)]
    assert [layer.out_channels for layer in deconvolutions] == [256, 256, 256]
    assert resnet.head.predictor.weight.std() == pytest.approx(0.001, rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize("config", [VIT, SIMPLE, None],
                         ids=["ViT", "ViT with the simple decoder", "ResNet"])
def test_the_features_of_every_student_are_what_its_heatmaps_are_made_of(config, resnet):
    student = (PoseModel(config, 5) if config else resnet).eval()
    images = torch.rand(2, 3, 64, 64)
    heatmaps, features = heatmaps_and_features(student, images, Compute())
    predictor = student.head.predictor
    assert features.shape == (2, predictor.in_channels, 16, 16)
    torch.testing.assert_close(heatmaps, student(data.normalize(images)))
    torch.testing.assert_close(heatmaps, predictor(features))


@torch.no_grad()
def test_a_resnet_starts_from_torchvisions_weights_without_their_classifier(tmp_path):
    public = torchvision.models.resnet18().eval()
    torch.save(public.state_dict(), tmp_path / "resnet18.pth")
    model = PoseModel(MODEL_CONFIGS["resnet18"], 3)
    load_backbone(model, tmp_path / "resnet18.pth")
    body = model.backbone.body.eval()
    public.avgpool = public.fc = nn.Identity()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(body(images).flatten(1), public(images))
    message = "resnet18.pth: another architecture: tensor layer1.0.bn3.bias is nothing"
    with pytest.raises(WeightsError, match=message):
        load_backbone(PoseModel(MODEL_CONFIGS["resnet50"], 3), tmp_path / "resnet18.pth")


def test_a_student_predicts_and_is_saved_like_any_other_pose_model(tmp_path, resnet):
    figure = draw_figure("photo", np.random.default_rng(0))
    Image.fromarray(figure.image).save(tmp_path / "a.png")
    dataset = PoseDataset("one", COCO17, [str(tmp_path / "a.png")], np.array([1]),
                          np.array(["photo"]), np.array([7]), np.array([0]),
                          figure.keypoints[None].astype(np.float32),
                          np.array([figure.box], float), np.array([figure.area]), np.array([False]))
    save_checkpoint(tmp_path / "model.pth", resnet)
    before = predict(resnet, dataset)
    assert len(before) == 1 and before == predict(load_pose_model(tmp_path / "model.pth"), dataset)


def test_the_supervised_loss_is_the_mean_of_half_the_weighted_squares(heatmaps):
    target, weights = torch.rand_like(heatmaps), torch.tensor([[0.0, 1, 1, 0.5]] * B)
    total = sum(0.5 * weights[b, k] * (heatmaps[b, k] - target[b, k]).pow(2).sum()
                for b in range(B) for k in range(K))
    torch.testing.assert_close(supervised_loss(heatmaps, target, weights), total / heatmaps.numel())


# ------------------------------------------------------------------------------- image level: style

def test_adain_gives_each_channel_the_styles_mean_and_deviation():
    content, style = 3 * torch.randn(2, 5, 8, 6) + 1, 2 * torch.rand(2, 5, 4, 9) - 7
    restyled = adain(content, style)
    for b in range(2):
        for c in range(5):
            x, s = content[b, c], style[b, c]
            expected = s.std() * (x - x.mean()) / x.std() + s.mean()
            torch.testing.assert_close(restyled[b, c], expected, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(restyled[b, c].std(), s.std(), rtol=1e-4, atol=0)
    flat = adain(torch.ones(1, 1, 4, 4), style[:1, :1])
    # no division by a deviation of 0
    torch.testing.assert_close(flat, style[:1, :1].mean().expand(1, 1, 4, 4))


def test_the_layers_are_numbered_as_in_the_public_adain_pair():
    def names(convolutions):
        return [f"{n}.{kind}" for n in convolutions for kind in ("weight", "bias")]

    net = StyleTransfer()
    convolutions = [0, 2, 5, 9, 12, 16, 19, 22, 25, 29]
    assert list(net.encoder.state_dict()) == names(convolutions)
    assert net.encoder[29].weight.shape == (512, 256, 3, 3) and len(net.encoder) == 31
    convolutions = [1, 5, 8, 11, 14, 18, 21, 25, 28]
    assert list(net.decoder.state_dict()) == names(convolutions)
    assert net.decoder[1].weight.shape == (256, 512, 3, 3)
    assert net.decoder[28].weight.shape == (3, 64, 3, 3)
    # A shallower decoder keeps its layers' numbers.
    for depth, first in [(1, 28), (2, 21), (3, 14), (4, 1)]:
        shallow = list(StyleTransfer(width=4, depth=depth).decoder.state_dict())
        assert shallow == names([n for n in convolutions if n >= first])


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_the_losses_are_those_of_the_paper_at_every_level(depth, figures):
    net = StyleTransfer(width=4, depth=depth)
    content = figures[:, :, ::2, ::2]
    style = figures.flip(0)[:, :, ::2, ::2]

    def after_each_relu(x):
        outputs = []
        for layer in net.encoder:
            x = layer(x)
            outputs += [x] if isinstance(layer, nn.ReLU) else []
        return [outputs[n] for n in (0, 2, 4, 8)[:depth]]  # relu1_1, relu2_1, relu3_1, relu4_1

    target = adain(after_each_relu(content)[-1], after_each_relu(style)[-1])
    painted = after_each_relu(net.decoder(target))
    style_loss = 0
    for x, s in zip(painted, after_each_relu(style)):
        gram_x, gram_s = (torch.einsum("bihw,bjhw->bij", y, y) / y[0].numel() for y in (x, s))
        style_loss += ((gram_x - gram_s) ** 2).mean()
    found = net.loss(content, style)
    content_loss = ((painted[-1] - target) ** 2).mean()
    torch.testing.assert_close(found, (content_loss, style_loss), rtol=1e-4, atol=1e-6)
    sum(found).backward()
    assert all(parameter.grad is None for parameter in net.encoder.parameters())
    assert not any(parameter.requires_grad for parameter in net.encoder.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in net.decoder.parameters())


def test_a_small_decoder_learns_to_restyle(figures):
    net = StyleTransfer(width=8, depth=2)
    optimizer = torch.optim.Adam(net.decoder.parameters(), 5e-3)
    losses = []
    for _ in range(25):
        content, style = net.loss(figures[:, :, ::2, ::2], figures.flip(0)[:, :, ::2, ::2])
        optimizer.zero_grad()
        (content + 0.1 * style).backward()
        optimizer.step()
        losses.append(content.item())
    assert losses[-1] < 0.6 * losses[0]


@torch.no_grad()
def test_alpha_goes_from_the_content_itself_to_the_full_style_for_each_image(figures):
    net, style = StyleTransfer(width=4), figures.flip(0)
    nn.init.kaiming_normal_(net.decoder[-1].weight)
    mixed = net(figures, style, torch.tensor([0.0, 0.3]))
    torch.testing.assert_close(mixed[:1], net.decoder(net.encoder(figures[:1])).clamp(0, 1))
    torch.testing.assert_close(mixed[1:], net(figures[1:], style[1:], 0.3))
    features = net.encoder(figures)
    full = net.decoder(adain(features, net.encoder(style))).clamp(0, 1)
    torch.testing.assert_close(net(figures, style), full)
    assert not torch.allclose(net(figures, style), net(figures, style, 0.3))


def test_restyled_images_keep_their_size_and_range_and_carry_no_gradient():
    net = StyleTransfer(width=4)
    nn.init.kaiming_normal_(net.decoder[-1].weight, a=0.01)
    images = net(torch.rand(1, 3, 45, 61), torch.rand(1, 3, 32, 50))
    assert images.shape == (1, 3, 45, 61) and not images.requires_grad
    assert images.min() == 0 and images.max() == 1


def test_public_files_load_by_layer_and_deeper_layers_are_left_out(tmp_path):
    theirs = StyleTransfer(width=4)
    deeper = {"32.weight": torch.rand(7), "51.bias": torch.rand(3)}
    torch.save(theirs.encoder.state_dict() | deeper, tmp_path / "vgg.pth")
    torch.save(theirs.decoder.state_dict(), tmp_path / "decoder.pth")
    ours = StyleTransfer(tmp_path / "vgg.pth", tmp_path / "decoder.pth", width=4)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    assert not any(parameter.requires_grad for parameter in ours.encoder.parameters())


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("12.bias"), r"tensor 12.bias is nothing, expected float \[8\]"),
    (lambda state: state.update({"3.weight": torch.rand(2)}),
     r"tensor 3.weight is float \[2\], expected nothing"),
    (lambda state: state.update({"2.weight": torch.rand(4, 3, 5, 5)}),
     r"tensor 2.weight is float \[4, 3, 5, 5\]"),
    (lambda state: state.update({"conv1.weight": torch.rand(2)}),
     "expected the public AdaIN encoder.*'conv1'"),
], ids=["missing", "left over", "another shape", "another network"])
def test_an_encoder_that_does_not_fit_is_refused_in_one_line(tmp_path, change, message):
    state = StyleTransfer(width=4).encoder.state_dict()
    change(state)
    torch.save(state, tmp_path / "vgg.pth")
    with pytest.raises(WeightsError, match=f"vgg.pth: .*{message}") as error:
        StyleTransfer(tmp_path / "vgg.pth", width=4)
    assert "\n" not in str(error.value)


def test_a_decoder_that_does_not_fit_is_refused(tmp_path):
    torch.save(StyleTransfer(width=8).decoder.state_dict(), tmp_path / "decoder.pth")
    message = r"decoder.pth: another architecture: tensor 1.bias is float \[32\]"
    with pytest.raises(WeightsError, match=message):
        StyleTransfer(decoder=tmp_path / "decoder.pth", width=4)


def test_a_decoder_for_normalised_images_restyles_rgb_as_it_restyles_these(tmp_path, capsys):
    """The alignment's authors normalise both images, and read the result as normalised."""
    net = StyleTransfer()
    torch.save(net.encoder.state_dict(), tmp_path / "vgg.pth")
    torch.save(net.decoder.state_dict(), tmp_path / "decoder_s2l_0_1.pth.tar")
    content, style = torch.rand(2, 1, 3, 40, 56)
    c, s = net.encoder(data.normalize(content)), net.encoder(data.normalize(style))
    drawn = net.decoder(torch.lerp(c, adain(c, s), 0.7))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.MEAN, data.STD))
    expected = (drawn * std + mean).clamp(0, 1)

    def stylist(choice):
        return new_stylist(parse_options([
            "--mode", "uda", "--style-encoder", str(tmp_path / "vgg.pth"), "--device", "cpu",
            "--style-weights", f"{tmp_path}/decoder_s2l_0_1.pth.tar{choice}"]))
    torch.testing.assert_close(stylist("#normalized")(content, style, 0.7), expected)
    assert not capsys.readouterr().err
    assert not torch.allclose(stylist("")(content, style, 0.7), expected, atol=0.05)
    assert "pth.tar: does not say which images it was trained with" in capsys.readouterr().err
    with pytest.raises(data.DataError, match="expected no choice after #, or #normalized after"):
        stylist("#other")


def test_the_public_adain_pair_restyles_photographs(figures, real):
    files = [cache_folder() / "weights" / f"adain-{part}.pth" for part in ("encoder", "decoder")]
    if not all(file.exists() for file in files):
        pytest.skip("the public AdaIN pair is not in the cache folder")
    net = StyleTransfer("adain-encoder", "adain-decoder")
    photo = Image.open(real / "lsp" / "images" / "im0020.jpg").convert("RGB").resize((128, 128))
    photo = to_tensor(photo)[None]
    cartoon = figures[1:]
    # It was scaled so that each layer's mean activation on photographs is 1. Wrong inputs would not
    # give that.
    assert all(0.7 < level.mean() < 1.4 for level in encoder_levels(net.encoder, photo))
    undone = net(photo, cartoon, 0.0)
    assert torch.corrcoef(torch.stack([undone.flatten(), photo.flatten()]))[0, 1] > 0.7

    def palette(images):
        return torch.cat([images.mean((0, 2, 3)), images.std((0, 2, 3))])

    restyled = net(photo, cartoon)
    before = (palette(photo) - palette(cartoon)).norm()
    assert (palette(restyled) - palette(cartoon)).norm() < 0.5 * before


# --------------------------------------------------------------------- feature level: discriminator

def test_gradients_are_reversed_and_scaled_on_the_way_back_alone():
    x = torch.randn(4, requires_grad=True)
    y = reverse_gradient(x, 0.3)
    assert torch.equal(x, y)
    (y ** 3).sum().backward()
    torch.testing.assert_close(x.grad, -0.3 * 3 * x.detach() ** 2)
    assert torch.equal(reverse_gradient(x.detach()), x)  # nothing to reverse: for evaluation


def test_the_discriminator_is_four_convolutions_that_keep_the_features_size():
    network, features = DomainDiscriminator(32), torch.randn(2, 32, 9, 7)
    x = features
    for n, width in zip((0, 2, 4, 6), (32, 16, 16, 1)):
        assert network[n].weight.shape == (width, x.shape[1], 3, 3)
        x = F.conv2d(x, network[n].weight, network[n].bias, padding=1)
        x = torch.where(x > 0, x, 0.2 * x) if n < 6 else x
    assert x.shape == (2, 1, 9, 7)
    torch.testing.assert_close(network(features), x)


def test_the_adversarial_loss_is_cross_entropy_with_source_0_and_target_1():
    source, target = 3 * torch.randn(2, 1, 4, 4), 3 * torch.randn(3, 1, 4, 4)
    expected = (F.binary_cross_entropy(source.sigmoid(), torch.zeros_like(source))
                + F.binary_cross_entropy(target.sigmoid(), torch.ones_like(target)))
    torch.testing.assert_close(adversarial_loss(source, target), expected)
    assert torch.isfinite(adversarial_loss(torch.tensor([1e4]), torch.tensor([-1e4])))


def test_a_step_makes_the_discriminator_better_and_the_features_harder_to_tell_apart():
    network, features = DomainDiscriminator(8), torch.randn(4, 8, 6, 6, requires_grad=True)

    def loss(features):
        logits = network(reverse_gradient(features))
        return adversarial_loss(logits[:2], logits[2:])

    start = loss(features)
    start.backward()
    with torch.no_grad():
        assert loss(features - 1e-1 * features.grad) > start  # gradient descent on the features
        for parameter in network.parameters():
            parameter -= 1e-2 * parameter.grad
        assert loss(features) < start


# ------------------------------------------------------------- pose level: information maximization

def test_information_maximization_is_the_entropies_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    softmax = pytest.importorskip("scipy.special").softmax
    heatmaps = 5 * np.random.default_rng(0).standard_normal((B, K, H, W))
    rows = [stats.entropy(softmax(heatmaps[b, k].mean(1))) for b in range(B) for k in range(K)]
    columns = [stats.entropy(softmax(heatmaps[b, k].mean(0))) for b in range(B) for k in range(K)]
    together = [stats.entropy(softmax(heatmaps[:, k].mean(0).ravel())) for k in range(K)]
    expected = (np.mean(rows) + np.mean(columns) - np.mean(together)) / (H * W)
    assert information_maximization_loss(torch.tensor(heatmaps)).item() == pytest.approx(expected)


def test_information_maximization_wants_sure_heatmaps_that_differ_from_image_to_image():
    def peaks_at(*places):
        heatmaps = torch.zeros(len(places), 1, 16, 16)
        for heatmap, (y, x) in zip(heatmaps, places):
            heatmap[0, y, x] = 100
        return heatmaps

    different, same = peaks_at((2, 3), (8, 12), (13, 5)), peaks_at(*[(2, 3)] * 3)
    losses = [information_maximization_loss(x).item() for x in (different, same, 0.1 * different)]
    assert losses[0] == min(losses) and len(set(losses)) == 3


# -------------------------------------------------------------------------------------------- views

def test_a_pixel_goes_where_the_matrix_sends_it():
    x = torch.zeros(2, 1, 9, 9)
    x[:, 0, 2, 3] = 1  # at x 3, y 2
    shift = [[1.0, 0, 2], [0, 1, 4]]  # to x 5, y 6
    turn = [[0.0, -1, 8], [1, 0, 0]]  # to x 6, y 3
    moved = warp(x, torch.tensor([shift, turn]))
    assert [peaks(moved)[0][b, 0].tolist() for b in range(2)] == [[5, 6], [6, 3]]
    torch.testing.assert_close(moved.sum((1, 2, 3)), torch.ones(2))


def test_warping_is_that_of_data_py(figures):
    matrices = random_affine(2, (96, 96))
    warped = (255 * warp(figures, matrices)).permute(0, 2, 3, 1).numpy()
    for image, matrix, found in zip(figures, matrices, warped):
        picture = Image.fromarray((255 * image).byte().permute(1, 2, 0).numpy())
        expected = warp_image(picture, matrix.double().numpy(), (96, 96)).astype(float)
        difference = np.abs(found - expected)
        white = Image.new("RGB", (96, 96), "white")
        covered = warp_image(white, matrix.double().numpy(), (96, 96)).min(2) == 255
        covered = torch.from_numpy(covered)[None].float()
        # not the border, where Pillow repeats pixels
        core = (F.avg_pool2d(covered, 5, 1, 2) == 1)[0].numpy()
        assert core.mean() > 0.2 and difference[core].max() < 3


def test_warping_there_and_back_changes_nothing_that_stayed_inside():
    y, x = torch.meshgrid(torch.linspace(0, 3, 64), torch.linspace(0, 3, 48), indexing="ij")
    smooth = torch.stack([(x + y).sin(), (x * y / 3).cos()])[None].expand(5, -1, -1, -1)
    matrices = random_affine(5, (64, 48), Views(scale=(0.6, 0.7), shear=10))
    back = warp(warp(smooth, matrices), invert_matrix(matrices))
    assert (back - smooth)[:, :, 10:-10, 10:-10].abs().max() < 0.01
    product = torch.cat([matrices, torch.tensor([[[0.0, 0, 1]]]).expand(5, 1, 3)], dim=1)
    inverse = product.inverse()[:, :2]
    torch.testing.assert_close(invert_matrix(matrices), inverse, rtol=1e-4, atol=1e-3)


def test_random_maps_stay_within_the_limits_and_are_those_of_torchvision(figures):
    matrices = random_affine(500, (96, 96))
    assert matrices.shape == (500, 2, 3)
    scale = matrices[:, :, 0].norm(dim=1)
    angle = torch.atan2(matrices[:, 1, 0], matrices[:, 0, 0])
    slant = ((angle.cos() * matrices[:, 0, 1] + angle.sin() * matrices[:, 1, 1]) / scale).atan()
    shift = transform_points(torch.full((1, 2), 47.5), matrices)[:, 0] - 47.5
    for values, low, high in [(scale, 0.6, 1.3), (angle.rad2deg(), -60, 60),
                              (slant.rad2deg(), -30, 30), (shift, -4.8, 4.8)]:
        margin = 0.05 * (high - low)
        assert low - 1e-3 <= values.min() < low + margin
        assert high - margin < values.max() <= high + 1e-3
    for matrix, s, a, t, d in zip(matrices[:4], scale, angle.rad2deg(), slant.rad2deg(), shift):
        expected = affine(figures, a.item(), d.tolist(), s.item(), [-t.item(), 0.0],
                          InterpolationMode.BILINEAR)
        difference = (warp(figures, matrix.expand(2, 2, 3)) - expected).abs()
        assert difference.mean() < 5e-3 and difference[:, :, 40:56, 40:56].max() < 0.02


def test_heatmaps_return_from_a_view_by_the_same_map_in_their_own_pixels():
    size, small = (64, 48), (32, 24)
    points = torch.tensor([[[20.0, 40.0], [30.0, 25.0]]] * 4)
    views = random_affine(4, size, Views(scale=(0.8, 1.0)))
    matrices = resize_affine(views, size, small)
    factor = torch.tensor([23 / 47, 31 / 63])
    in_views = transform_points(points, views)
    torch.testing.assert_close(transform_points(points * factor, matrices), in_views * factor)
    seen = encode_heatmaps(in_views, torch.ones(4, 2), size, small, sigma=1.5)[0]
    found, height = peaks(warp(seen, invert_matrix(matrices)))
    assert (found - points * factor).abs().max() < 1 and height.min() > 0.8


def test_color_jitter_is_that_of_data_py(figures):
    torch.manual_seed(5)
    factors = torch.rand(3, 2)
    torch.manual_seed(5)
    found = jitter_color(figures, 0.25)

    class Fixed:
        def __init__(self, n):
            self.n = n

        def uniform(self, low, high, size):
            return (2 * factors[:, self.n] - 1).double().numpy()

    for n, image in enumerate(figures):
        bytes_ = (255 * image).round().permute(1, 2, 0).numpy().astype(np.uint8)
        expected = data.jitter_color(bytes_, 0.25, Fixed(n))
        assert np.abs(255 * found[n].permute(1, 2, 0).numpy() - expected).max() < 1.5


# -------------------------------------------------------------------------------------- the teacher

def test_pseudo_labels_are_gaussians_at_the_peaks(heatmaps):
    labels = rectify(heatmaps, sigma=1.5)
    points, confidence = peaks(heatmaps)
    for b in range(B):
        for k in range(K):
            y, x = np.unravel_index(heatmaps[b, k].numpy().argmax(), (H, W))
            assert points[b, k].tolist() == [x, y] and confidence[b, k] == heatmaps[b, k, y, x]
            for row in range(H):
                for column in range(W):
                    near = max(abs(row - y), abs(column - x)) <= 4.5
                    distance = (row - y) ** 2 + (column - x) ** 2
                    expected = near * math.exp(-distance / (2 * 1.5 ** 2))
                    assert labels[b, k, row, column].item() == pytest.approx(expected, abs=1e-6)


def test_the_mask_keeps_what_is_strictly_above_the_batchs_median(heatmaps):
    confidence = heatmaps.amax((2, 3))
    assert torch.equal(confidence_mask(heatmaps), confidence > np.median(confidence))
    assert confidence_mask(heatmaps).sum() == B * K / 2
    assert confidence_mask(heatmaps, 0.75).sum() == B * K / 4
    assert not confidence_mask(torch.ones(2, 3, 4, 4)).any()  # none is above the others


def test_the_consistency_loss_ignores_masked_keypoints(heatmaps):
    teacher, mask = torch.rand_like(heatmaps), torch.rand(B, K) < 0.5
    total = sum(((mask[b, k] * (heatmaps[b, k] - teacher[b, k])) ** 2).mean() / K
                for b in range(B) for k in range(K))
    torch.testing.assert_close(consistency_loss(heatmaps, teacher, mask), total / B)
    assert consistency_loss(heatmaps, teacher, torch.zeros(B, K, dtype=torch.bool)) == 0


def spikes(points, heights, size):
    """Heatmaps that are 0 but for a height (B, K) at a point (B, K, 2), x before y."""
    heatmaps = torch.zeros(*heights.shape, *size)
    for b in range(heights.shape[0]):
        for k in range(heights.shape[1]):
            x, y = points[b][k]
            heatmaps[b, k, y, x] = heights[b, k]
    return heatmaps


def test_occlusion_covers_one_confident_keypoint_with_a_patch_from_elsewhere_in_the_image():
    count, size = 40, (96, 72)
    images = torch.rand(count, 3, *size)  # no two pixels are alike
    x = torch.randint(0, 18, (count, 4))
    y = torch.randint(0, 24, (count, 4))
    points = torch.stack([x, y], dim=2)
    heights = torch.tensor([[0.95, 0.3, 0.9, 0.89]]).expand(count, -1)
    matrix = random_affine(count, size, Views(rotation=20))
    covered = occlude(images, spikes(points, heights, (24, 18)), matrix, probability=1.0)
    in_view = transform_points(points * torch.tensor([71 / 17, 95 / 23]), matrix).round()
    chosen, steps = set(), set()
    for image, before, places in zip(covered, images, in_view):
        places = {k: (int(x), int(y)) for k, (x, y) in enumerate(places.tolist())
                  if 0 <= x < 72 and 0 <= y < 96}
        changed = (image != before).any(0)
        if not places.keys() & {0, 2}:
            assert not changed.any()
            continue
        rows, columns = changed.any(1).nonzero()[:, 0], changed.any(0).nonzero()[:, 0]
        top, left = rows[0].item(), columns[0].item()
        assert changed[top:top + 20, left:left + 20].all()
        assert changed.sum() == 400  # one patch and nothing else
        hidden = {k for k, (x, y) in places.items()
                  if left <= x < left + 20 and top <= y < top + 20}
        assert hidden & {0, 2}
        chosen |= hidden
        source = (before == image[:, top, left, None, None]).all(0).nonzero()[0].tolist()
        patch = before[:, source[0]:source[0] + 20, source[1]:source[1] + 20]
        assert torch.equal(image[:, top:top + 20, left:left + 20], patch)
        steps |= {source[0] - top, source[1] - left}
    assert {0, 2} <= chosen
    assert min(map(abs, steps)) >= 20  # the two do not overlap
    assert len(steps) > 25  # it is another place each time


def test_the_hidden_keypoint_is_in_the_middle_of_its_patch_unless_the_border_is_near():
    images, identity = torch.rand(3, 3, 64, 64), torch.eye(2, 3).expand(3, 2, 3)
    heatmaps = spikes([[(30, 40)], [(1, 2)], [(63, 63)]], torch.ones(3, 1), (64, 64))
    changed = (occlude(images, heatmaps, identity, probability=1.0) != images).any(1)
    corners = [row.nonzero()[0].tolist() for row in changed]
    assert corners == [[30, 20], [0, 0], [44, 44]]


def test_occlusion_happens_with_its_probability_to_any_confident_keypoint():
    count = 400
    images, identity = torch.rand(count, 3, 16, 16), torch.eye(2, 3).expand(count, 2, 3)
    heights = torch.tensor([[1.0, 1.0, 0.5]] * count)
    heatmaps = spikes([[(2, 2), (12, 12), (2, 12)]] * count, heights, (16, 16))
    changed = (occlude(images, heatmaps, identity, size=4) != images).any(1)
    assert changed.any(2).any(1).float().mean().item() == pytest.approx(0.5, abs=0.1)
    hits = [changed[:, y, x].sum().item() for x, y in [(2, 2), (12, 12), (2, 12)]]
    assert min(hits[:2]) > 70 and hits[2] == 0
    assert torch.equal(occlude(images, heatmaps, identity, threshold=1.1, size=4), images)
    message = "at least 59 pixels each way to take a patch of 20×20 .*, found 16×16"
    with pytest.raises(ValueError, match=message):
        occlude(images, heatmaps, identity)


def test_the_teachers_parameters_are_the_students_running_average():
    student = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    teacher = make_teacher(student)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    for tensor in student.state_dict().values():
        tensor.add_(1)
    ema_update(teacher, student, 0.9)
    for name, parameter in teacher.named_parameters():
        expected = 0.9 * before[name] + 0.1 * student.get_parameter(name)
        torch.testing.assert_close(parameter, expected)
    for name, buffer in teacher.named_buffers():
        assert torch.equal(buffer, before[name]), name
    with pytest.raises(ValueError, match="is shorter than"):
        ema_update(teacher, nn.Sequential(nn.Conv2d(2, 3, 1)), 0.9)


@torch.no_grad()
def test_the_teacher_gathers_the_statistics_of_what_it_sees_itself():
    student = nn.Sequential(nn.BatchNorm2d(1, momentum=1.0))
    teacher = make_teacher(student)
    student(torch.randn(2, 1, 8, 8) + 100)  # source images
    target = 3 * torch.randn(64, 1, 8, 8) + 5
    out = teacher(target)
    found = torch.stack([out.mean(), out.std()])
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(teacher[0].running_mean, target.mean()[None])
    torch.testing.assert_close(teacher[0].running_var, target.var()[None])


@torch.no_grad()
def test_the_teachers_labels_are_not_noisy_though_the_students_drop_path_is():
    student = PoseModel(SIMPLE, 5).train()
    nn.init.normal_(student.head.predictor.weight)
    teacher, images = make_teacher(student), torch.randn(2, 3, 64, 64)
    assert torch.equal(teacher(images), teacher(images))
    assert any(not torch.equal(student(images), student(images)) for _ in range(10))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())


@pytest.mark.parametrize("noisy", [
    DropPath(0.5), torchvision.ops.StochasticDepth(0.5, "row"), nn.Dropout(0.5)])
def test_the_teacher_drops_nothing_in_a_network_of_torchvision_either(noisy):
    x = torch.ones(50, 1, 1)
    assert torch.equal(make_teacher(noisy)(x), x) and not torch.equal(noisy(x), x)


# ------------------------------------------------------------------------------- all of it together

def shrink(x):
    """Each image becomes smaller, by its own mean."""
    matrix = x.mean((1, 2, 3)).view(-1, 1, 1) * torch.eye(2, 3)
    return warp(x, resize_affine(matrix, (24, 20), (H, W)))


@pytest.mark.parametrize("function", [
    lambda x: rectify(x, 1.5), confidence_mask, lambda x: adain(x, x.flip(2) ** 2),
    lambda x: peaks(x)[0], shrink])
def test_what_becomes_of_an_image_does_not_depend_on_its_place_in_the_batch(function, heatmaps):
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(function(heatmaps[order]), function(heatmaps)[order])


SIZE, SMALL = (64, 64), (16, 16)


@pytest.fixture
def step():
    """Source images with labels, and target images, of one step."""
    visible = torch.ones(4, K)
    visible[0, 0] = 0
    labels = encode_heatmaps(64 * torch.rand(4, K, 2), visible, SIZE, SMALL, VIT.sigma)
    return torch.rand(4, 3, *SIZE), *labels, torch.rand(4, 3, *SIZE)


def aligned(occlusion=0.0, restyle=None, source_keypoints=None, **weights):
    torch.manual_seed(0)
    student = PoseModel(VIT, K)
    nn.init.normal_(student.head.predictor.weight, std=0.1)
    views = replace(GENTLE_VIEWS, occlusion=occlusion, patch=0.15)
    weights = replace(NONE, **weights)
    return MultiLevelAlignment(student, restyle, weights, views, 0.9, source_keypoints).train()


NONE = LossWeights(consistency=0.0, feature_level=0.0, pose_level=0.0)
PARTS = {"consistency": 1.0, "feature_level": 0.1, "pose_level": 0.3}


def loss_of(model, step):
    torch.manual_seed(1)
    return model(*step)[0]


def test_the_loss_is_the_weighted_sum_of_its_parts(step):
    supervised = loss_of(aligned(), step)
    expected = supervised_loss(aligned().student(data.normalize(step[0])), *step[1:3])
    torch.testing.assert_close(supervised, expected)
    restyled = aligned(restyle=lambda source, target: (source + target) / 2)  # any function will do
    mixed = (step[0] + step[3]) / 2
    redrawn = supervised_loss(aligned().student(data.normalize(mixed)), *step[1:3])
    torch.testing.assert_close(loss_of(restyled, step), redrawn)
    parts = {name: loss_of(aligned(**{name: weight}), step) - supervised
             for name, weight in PARTS.items()}
    assert all(abs(part) > 1e-6 for part in parts.values()), parts
    torch.testing.assert_close(loss_of(aligned(**PARTS), step), supervised + sum(parts.values()))
    twice = loss_of(aligned(feature_level=0.2), step) - supervised
    torch.testing.assert_close(twice, 2 * parts["feature_level"])


def test_the_losses_of_a_step_are_kept_for_the_log_each_with_its_weight(step):
    model = aligned(**PARTS)
    loss = loss_of(model, step)
    assert list(model.losses) == ["supervised", "consistency", "feature_level", "pose_level"]
    assert torch.equal(sum(model.losses.values()), loss)
    model = aligned(pose_level=0.3)
    loss_of(model, step)
    assert list(model.losses) == ["supervised", "pose_level"]


def test_another_loss_is_added_in_one_place(step):
    class Smoother(MultiLevelAlignment):
        def alignment_losses(self, teacher_heatmaps, student_heatmaps, *features):
            losses = super().alignment_losses(teacher_heatmaps, student_heatmaps, *features)
            losses["smooth"] = self.weights.smooth * (student_heatmaps.diff(dim=3) ** 2).mean()
            return losses

    @dataclass(frozen=True)
    class Weights(LossWeights):
        smooth: float = 0.2

    model = aligned(**PARTS)
    plain = loss_of(model, step)
    smoother = Smoother(aligned().student, None, Weights(**PARTS), model.views, 0.9).train()
    smoother.discriminator.load_state_dict(model.discriminator.state_dict())
    loss = loss_of(smoother, step)
    assert list(smoother.losses) == [*model.losses, "smooth"] and smoother.losses["smooth"] > 0
    torch.testing.assert_close(loss, plain + smoother.losses["smooth"])
    alone = Smoother(aligned().student, None, Weights(0.0, 0.0, 0.0, smooth=0.2), model.views)
    loss_of(alone, step)
    assert list(alone.losses) == ["supervised", "smooth"]
    idle = Smoother(aligned().student, None, Weights(0.0, 0.0, 0.0, smooth=0.0), model.views)
    loss_of(idle, step)
    assert list(idle.losses) == ["supervised"]  # nothing is asked of the target


@pytest.mark.parametrize("part", [{}, *({name: weight} for name, weight in PARTS.items())], ids=str)
def test_every_level_teaches_the_student_and_none_the_teacher(step, part):
    model = aligned(**part)
    loss_of(model, step).backward()
    gradient = model.student.backbone.patch_embed.weight.grad
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    discriminates = any(parameter.grad is not None
                        for parameter in model.discriminator.parameters())
    assert discriminates == ("feature_level" in part)


def test_the_student_sees_a_covered_view_and_the_teacher_does_not(step, monkeypatch):
    sizes = []

    def all_black(views, *rest, size):
        sizes.append(size)
        return torch.zeros_like(views)

    monkeypatch.setattr(uda, "occlude", all_black)
    model = aligned(consistency=1.0, occlusion=0.5)
    inputs = {"student": [], "teacher": []}
    for name in inputs:
        backbone = getattr(model, name).backbone
        backbone.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0]))
    loss_of(model, step)
    black = data.normalize(torch.zeros(4, 3, *SIZE))
    assert sizes == [round(0.15 * 64)]
    assert torch.equal(inputs["student"][1], black) and not torch.equal(inputs["teacher"][0], black)


def test_the_teacher_follows_the_student_from_step_to_step(step):
    model = aligned(consistency=1.0)
    weight, start = model.student.backbone.pos_embed, model.teacher.backbone.pos_embed.clone()
    loss_of(model, step)
    assert torch.equal(model.teacher.backbone.pos_embed, start)
    with torch.no_grad():
        weight += 1
    loss_of(model, step)
    torch.testing.assert_close(model.teacher.backbone.pos_embed, start + 0.1)


def test_the_teachers_batchnorm_learns_even_when_the_step_begins_in_evaluation_mode(step):
    model = aligned(consistency=1.0).eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()
              if name.endswith("running_mean")}
    loss_of(model, step)
    moved = {name.split(".")[0] for name, buffer in model.named_buffers()
             if name in before and not torch.equal(buffer, before[name])}
    assert moved == {"teacher"}


def test_steps_bring_the_loss_down(step):
    model = aligned(**PARTS)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, 1e-3)
    losses = []
    for _ in range(15):
        losses.append(loss_of(model, step))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.97 * losses[0]


def adapter_aligned():
    """A VLPose as the student, whose adapter is not at its quiet start any more."""
    torch.manual_seed(0)
    base = PoseModel(VIT, K)
    nn.init.normal_(base.head.predictor.weight, std=0.1)
    student = VLPose(base, 6, num_prompts=2)
    nn.init.ones_(student.matcher.norm.weight)
    views = replace(GENTLE_VIEWS, occlusion=0.0)
    return MultiLevelAlignment(student, None, LossWeights(), views, 0.9).train()


TEXTS = (  # of the source, of the target
    (torch.randn(4, 1, 6), None),
    (torch.randn(4, 3, 6), torch.tensor([[True, True, False]] * 4)))


def test_of_a_vlpose_only_the_students_adapter_learns(step):
    model = adapter_aligned()
    model(*step, *TEXTS)[0].backward()
    for name, parameter in model.named_parameters():
        learns = not name.startswith(("teacher.", "student.base."))  # the discriminator does, too
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == learns, name


def test_the_frozen_base_of_both_stays_in_evaluation_mode_and_the_teachers_adapter_follows(step):
    model = adapter_aligned()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(*step, *TEXTS)
    with torch.no_grad():
        model.student.prompts += 1
    model(*step, *TEXTS)
    torch.testing.assert_close(model.teacher.prompts, before["teacher.prompts"] + 0.1)
    for name, tensor in model.state_dict().items():
        if ".base." in name:
            assert torch.equal(tensor, before[name]), name
    moved = "teacher.auxiliary1.1.running_mean"
    assert not torch.equal(model.get_buffer(moved), before[moved])


def test_each_domain_is_read_with_its_own_text(step):
    def read(*texts):
        torch.manual_seed(1)
        return adapter_aligned()(*step, *texts)

    (loss, heatmaps), (source, target) = read(*TEXTS), TEXTS
    other = read(source, (torch.zeros(4, 1, 6), None))
    assert torch.equal(heatmaps, other[1]) and loss != other[0]
    assert not torch.equal(heatmaps, read((torch.zeros(4, 1, 6), None), target)[1])


def test_the_teachers_labels_are_not_noisy_though_the_students_matcher_has_dropout():
    torch.manual_seed(0)
    student = VLPose(PoseModel(VIT, K), 6)
    nn.init.ones_(student.matcher.norm.weight)
    images, text = torch.rand(2, 3, *SIZE), TEXTS[0][0][:2]

    def twice(model):
        return torch.equal(*(model.train()(images, text) for _ in range(2)))

    assert twice(make_teacher(student)) and not twice(student)


def test_source_images_are_redrawn_with_the_given_probability(figures):
    net, content = StyleTransfer(width=4, depth=2), torch.rand(200, 3, 16, 16)
    torch.testing.assert_close(net.restyle(content, content.flip(0), 0.0), content)
    mixed = net.restyle(content, content.flip(0), 0.5)
    changed = (mixed != content).flatten(1).any(1)
    assert 70 < changed.sum() < 130 and mixed.shape == content.shape
    assert (net.restyle(content, content.flip(0), 1.0) != content).flatten(1).any(1).all()


def test_keypoints_that_the_source_does_not_label_get_no_pseudo_labels(step):
    images, labels, weights, target = step
    model = aligned(consistency=1.0, pose_level=1.0, source_keypoints=[0, 2, 3])
    loss_of(model, (images, labels, torch.zeros_like(weights), target)).backward()
    gradient = model.student.head.predictor.weight.grad.abs().amax((1, 2, 3))  # (K,)
    assert gradient[1] == 0 and (gradient[[0, 2, 3]] > 0).all()


@pytest.mark.parametrize("size", [(32, 32), (256, 32)])
def test_small_and_narrow_images_are_enough(size):
    student = PoseModel(replace(VIT, image_size=size), K)
    labels, weights = torch.rand(2, K, size[0] // 4, size[1] // 4), torch.ones(2, K)
    source, target = torch.rand(2, 2, 3, *size)
    loss, _ = MultiLevelAlignment(student)(source, labels, weights, target)
    assert torch.isfinite(loss)
