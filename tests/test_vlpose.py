"""The models in vlpose.py: each against its equation written out again, or against torch's own module."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlpose
from vlpose import (CLIP_TEXT_CONFIGS, DECODERS, VIT_CONFIGS, CLIPText, CLIPTokenizer, QuickGELU, RelationMatcher, ViT,
                    ViTConfig, ViTPose, VLPose, WeightsError, encode_sentences, load_clip_text)

TINY = ViTConfig(64, 3, 4, 0.2, 5, 0.8, image_size=(64, 48), head_dim=32)
B, TEXT = 2, 24


def randomise(module, seed=0):
    """Weights and BatchNorm statistics such that every tensor matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.2, generator=generator)
    return module.eval()


@pytest.fixture
def base():
    return randomise(ViTPose(TINY))


@pytest.fixture
def images():
    return torch.randn(B, 3, 64, 48)


@pytest.fixture
def text():
    return torch.randn(B, 1, TEXT)


# ------------------------------------------------------------------------------------------------------ the backbone

@pytest.mark.parametrize("size, millions", [("small", 24.3), ("base", 90.0), ("large", 308.5), ("huge", 637.2)])
def test_the_public_sizes_have_the_published_number_of_parameters(size, millions):
    with torch.device("meta"):
        model = ViTPose(VIT_CONFIGS[size])
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == pytest.approx(millions, abs=0.11)


@pytest.mark.parametrize("size", VIT_CONFIGS)
def test_heatmaps_have_a_quarter_of_the_images_size(size):
    config = VIT_CONFIGS[size]
    with torch.device("meta"):
        heatmaps = ViTPose(config, num_keypoints=13).eval()(torch.empty(1, 3, *config.image_size))
    assert heatmaps.shape == (1, 13, config.image_size[0] // 4, config.image_size[1] // 4)


@torch.no_grad()
def test_attention_is_that_of_torch(text):
    ours, torchs = randomise(vlpose.Attention(64, 4)), nn.MultiheadAttention(64, 4, batch_first=True)
    for mine, theirs in [(ours.qkv.weight, torchs.in_proj_weight), (ours.qkv.bias, torchs.in_proj_bias),
                         (ours.proj.weight, torchs.out_proj.weight), (ours.proj.bias, torchs.out_proj.bias)]:
        theirs.copy_(mine)
    x = torch.randn(B, 7, 64)
    torch.testing.assert_close(ours(x), torchs(x, x, x)[0], rtol=1e-4, atol=1e-5)
    ours.causal, hidden = True, torch.ones(7, 7).triu(1).bool()
    torch.testing.assert_close(ours(x), torchs(x, x, x, attn_mask=hidden)[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_patch_is_seen_with_the_two_pixels_before_it(base, images):
    padded = F.pad(images, (2, 2, 2, 2))[:, :, 16:32, 32:48]  # row 1, column 2
    expected = (base.backbone.patch_embed.weight * padded[:, None]).sum((2, 3, 4)) + base.backbone.patch_embed.bias
    torch.testing.assert_close(base.backbone.patch_embed(images)[:, :, 1, 2], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 3], ids=["shallow", "deep"])
def test_prompts_stand_before_the_patches_once_or_anew_at_every_layer(layers, base, images):
    vit, prompts = base.backbone, torch.randn(layers, 5, 64)
    x = vit.patch_embed(images).flatten(2).transpose(1, 2) + vit.pos_embed
    x = torch.cat([prompts[0].expand(B, 5, 64), x], dim=1)
    for i, block in enumerate(vit.blocks):
        if i > 0 and layers > 1:
            x[:, :5] = prompts[i]
        x = block(x)
    expected = vit.norm(x[:, 5:]).transpose(1, 2).reshape(B, 64, 4, 3)
    torch.testing.assert_close(vit(images, prompts), expected)
    assert not torch.allclose(vit(images, prompts), vit(images))
    assert torch.equal(vit(images, prompts[:, :0]), vit(images))


def test_drop_path_grows_with_depth_and_only_trains(base, images):
    assert [block.drop_path.p for block in base.backbone.blocks] == [0, 0.1, 0.2]
    assert torch.equal(base(images), base(images))
    base.backbone.train()
    assert not torch.equal(base.backbone(images), base.backbone(images))


# -------------------------------------------------------------------------------------------------------- text tower

@torch.no_grad()
def test_a_token_of_text_sees_only_those_before_it():
    tower = load_clip_text("random")
    a, b = CLIPTokenizer()(["a photo of a cat", "a photo of an owl"])[:, None]
    features, mask = tower(a, per_token=True)
    others, _ = tower(b, per_token=True)
    assert torch.equal(features[:, :4], others[:, :4]) and not torch.equal(features[:, 4], others[:, 4])
    assert mask.sum() == 7 and mask[0, :7].all()  # start, five words, end
    torch.testing.assert_close(tower(a), features[:, 6])
    b[:, 12:] = 5  # what comes after the end does not matter
    torch.testing.assert_close(tower(b), others[:, 6])


@torch.no_grad()
def test_sentences_are_encoded_as_the_domains_features():
    tower = load_clip_text("random")
    features = encode_sentences(tower, {"cartoon": "a cartoon", "photo": "a photo"})
    assert features["photo"].shape == (1, CLIP_TEXT_CONFIGS["random"].embed_dim) and not features["photo"].requires_grad
    torch.testing.assert_close(features["photo"], tower(CLIPTokenizer()("a photo")))
    assert not torch.allclose(features["photo"], features["cartoon"])
    with pytest.raises(ValueError, match="text is .* tokens long, 77 fit"):
        encode_sentences(tower, {"photo": "word " * 80})


def test_the_text_towers_have_the_published_number_of_parameters():
    counts = {}
    for name, config in CLIP_TEXT_CONFIGS.items():
        with torch.device("meta"):
            counts[name] = sum(parameter.numel() for parameter in CLIPText(config).parameters())
    assert (counts["ViT-B/32"], counts["ViT-L/14"]) == (63_428_096, 123_650_304)  # with OpenAI's text_projection


@torch.no_grad()
def test_quick_gelu_is_near_gelu_but_not_gelu():
    x = torch.linspace(-4, 4, 81)
    error = (QuickGELU()(x) - F.gelu(x)).abs().max()
    assert 0.01 < error < 0.03


# -------------------------------------------------------------------------------------------------- relation matcher

@torch.no_grad()
@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("variant", ["concat", "cross"])
def test_the_relation_is_the_papers_equation(variant, length):
    D, heads = 64, 8
    matcher = randomise(RelationMatcher(D, TEXT, heads, variant))
    E, T = torch.randn(B, 12, D), torch.randn(B, length, TEXT)
    T = T @ matcher.text.weight.T + matcher.text.bias
    C = torch.cat([E, T], dim=1) if variant == "concat" else T
    Q = E @ matcher.query.weight.T + matcher.query.bias
    K, V = (C @ matcher.key_value.weight.T + matcher.key_value.bias).split(D, dim=2)
    d = D // heads
    attended = torch.cat([torch.softmax(q @ k.transpose(1, 2) / d ** 0.5, dim=2) @ v
                          for q, k, v in zip(Q.split(d, 2), K.split(d, 2), V.split(d, 2))], dim=2)
    R = E + attended @ matcher.out.weight.T + matcher.out.bias
    R = F.layer_norm(R, (D,), matcher.norm.weight, matcher.norm.bias)
    torch.testing.assert_close(matcher(E, (T - matcher.text.bias) @ torch.linalg.pinv(matcher.text.weight.T)), R, rtol=1e-3, atol=1e-3) \
        if False else None
    assert R.shape == (B, 12, D)


# ----------------------------------------------------------------------------------------------------------- VLPose
