"""The models in vlpose.py: each against its equation written out again, or torch's own module."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

import vlpose
from clip_tokenizer import END
from vlpose import (DECODERS, MATCHERS, RANDOM_TEXT, VIT_CONFIGS, CLIPText, CLIPTextConfig,
                    CLIPTokenizer, DropPath, QuickGELU, RelationMatcher, ViT, ViTConfig, PoseModel,
                    VLPose, encode_sentences, load_clip_text)

TINY = ViTConfig(64, 3, 4, 0.2, 5, 0.8, image_size=(64, 48), decoder_dim=32)
B, TEXT = 2, 24


def randomise(module, seed=0):
    """Weights and statistics such that every tensor matters; a VLPose's base stays as it is."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var") and not name.startswith("base."):
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.is_floating_point() and not name.startswith("base."):
            tensor.normal_(0, 0.2, generator=generator)
    return module.eval()


def adapter_of(model):
    return {name: tensor for name, tensor in model.state_dict().items()
            if not name.startswith("base.")}


@pytest.fixture
def base():
    return randomise(PoseModel(TINY))


@pytest.fixture
def images():
    return torch.randn(B, 3, 64, 48)


@pytest.fixture
def text():
    return torch.randn(B, 1, TEXT)


# ------------------------------------------------------------------------------------- the backbone

@pytest.mark.parametrize("size, millions",
                         [("small", 24.3), ("base", 90.0), ("large", 308.5), ("huge", 637.2)])
def test_the_public_sizes_have_the_published_number_of_parameters(size, millions):
    with torch.device("meta"):
        model = PoseModel(VIT_CONFIGS[size])
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize("size", VIT_CONFIGS)
def test_heatmaps_have_a_quarter_of_the_images_size(size):
    config = VIT_CONFIGS[size]
    with torch.device("meta"):
        heatmaps = PoseModel(config, num_keypoints=13).eval()(torch.empty(1, 3, *config.image_size))
    assert heatmaps.shape == (1, 13, config.image_size[0] // 4, config.image_size[1] // 4)


@torch.no_grad()
def test_attention_is_that_of_torch(text):
    ours = randomise(vlpose.Attention(64, 4))
    torchs = nn.MultiheadAttention(64, 4, batch_first=True)
    for mine, theirs in [(ours.qkv.weight, torchs.in_proj_weight),
                         (ours.qkv.bias, torchs.in_proj_bias),
                         (ours.proj.weight, torchs.out_proj.weight),
                         (ours.proj.bias, torchs.out_proj.bias)]:
        theirs.copy_(mine)
    x = torch.randn(B, 7, 64)
    torch.testing.assert_close(ours(x), torchs(x, x, x)[0], rtol=1e-4, atol=1e-5)
    ours.causal, hidden = True, torch.ones(7, 7).triu(1).bool()
    torch.testing.assert_close(ours(x), torchs(x, x, x, attn_mask=hidden)[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_patch_is_seen_with_the_two_pixels_before_it(base, images):
    padded = F.pad(images, (2, 2, 2, 2))[:, :, 16:32, 32:48]  # row 1, column 2
    weight, bias = base.backbone.patch_embed.weight, base.backbone.patch_embed.bias
    expected = (weight * padded[:, None]).sum((2, 3, 4)) + bias
    found = base.backbone.patch_embed(images)[:, :, 1, 2]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_prompts_stand_before_the_patches_anew_at_every_layer(base, images):
    vit, prompts = base.backbone, torch.randn(3, 5, 64)
    x = vit.patch_embed(images).flatten(2).transpose(1, 2) + vit.pos_embed
    for P, block in zip(prompts, vit.blocks):
        x = block(torch.cat([P.expand(B, 5, 64), x], dim=1))[:, 5:]
    expected = vit.norm(x).transpose(1, 2).reshape(B, 64, 4, 3)
    torch.testing.assert_close(vit(images, prompts), expected)
    assert not torch.allclose(vit(images, prompts), vit(images))
    assert torch.equal(vit(images, prompts[:, :0]), vit(images))


def test_drop_path_grows_with_depth_and_only_trains(base, images):
    assert [block.drop_path.p for block in base.backbone.blocks] == [0, 0.1, 0.2]
    assert torch.equal(base(images), base(images))
    base.backbone.train()
    images = images.repeat(20, 1, 1, 1)  # so many that two draws are never the same for all of them
    assert not torch.equal(base.backbone(images), base.backbone(images))


@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
def test_drop_path_is_torchvisions_stochastic_depth(p):
    x = torch.rand(50, 3, 4)
    torch.manual_seed(0)
    expected = StochasticDepth(p, "row")(x)
    torch.manual_seed(0)
    assert torch.equal(DropPath(p)(x), expected)
    assert torch.equal(DropPath(p).eval()(x), x)


# --------------------------------------------------------------------------------------- text tower

@torch.no_grad()
def test_a_token_of_text_sees_only_those_before_it():
    tower = load_clip_text("random")
    a, b = CLIPTokenizer()(["a photo of a cat", "a photo of an owl"])[:, None]
    features, mask = tower(a, per_token=True)
    others, _ = tower(b, per_token=True)
    assert torch.equal(features[:, :4], others[:, :4])
    assert not torch.equal(features[:, 4], others[:, 4])
    assert mask.sum() == 7 and mask[0, :7].all()  # start, five words, end
    torch.testing.assert_close(tower(a), features[:, 6])
    b[:, 12:] = 5  # what comes after the end does not matter
    torch.testing.assert_close(tower(b), others[:, 6])


SENTENCES = ["a photo", "an oil painting of a person who reads a letter", "a cartoon"]


def test_a_sentence_is_encoded_as_the_feature_of_its_end_token():
    tower = load_clip_text("random")
    features = encode_sentences(tower, SENTENCES)
    assert list(features) == SENTENCES
    for sentence, T in features.items():
        assert T.shape == (1, RANDOM_TEXT.embed_dim) and not T.requires_grad
        torch.testing.assert_close(T, tower(CLIPTokenizer()(sentence)))
        tokens = CLIPTokenizer()(sentence)[0].tolist()
        per_token, _ = tower(torch.tensor([tokens]), per_token=True)
        torch.testing.assert_close(T, per_token[:, tokens.index(END)])
    assert not torch.allclose(features["a photo"], features["a cartoon"])
    long, cut = encode_sentences(tower, ["word " * 80, "word " * 75]).values()
    assert torch.equal(long, cut)  # the tower reads 77 tokens, two of which are start and end


@pytest.mark.parametrize("per_token", [False, True])
def test_many_sentences_are_encoded_in_parts_and_none_is_lost(per_token):
    tower = load_clip_text("random")
    sentences = [f"a photo of {number} people" for number in range(300)]
    features = encode_sentences(tower, sentences, per_token)
    assert list(features) == sentences
    for sentence in (sentences[0], sentences[255], sentences[256], sentences[-1]):
        torch.testing.assert_close(features[sentence],
                                   encode_sentences(tower, [sentence], per_token)[sentence])


def test_a_sentences_features_per_token_are_the_towers_from_its_start_to_its_end():
    tower = load_clip_text("random")
    features = encode_sentences(tower, SENTENCES, per_token=True)
    pooled = encode_sentences(tower, SENTENCES)
    # words, start and end
    assert list(features) == SENTENCES and [len(T) for T in features.values()] == [4, 12, 4]
    expected, mask = tower(CLIPTokenizer()(SENTENCES), per_token=True)
    for row, (sentence, T) in enumerate(features.items()):
        length = CLIPTokenizer()(sentence)[0].tolist().index(END) + 1
        assert torch.equal(T, expected[row, :length]) and not T.requires_grad
        assert mask[row].tolist() == [True] * length + [False] * (77 - length)
        # the end token's is what stands for the whole sentence
        torch.testing.assert_close(T[-1:], pooled[sentence])
        alone = encode_sentences(tower, [sentence], per_token=True)
        torch.testing.assert_close(T, alone[sentence])


def test_the_text_towers_have_the_published_number_of_parameters():
    # ViT-B/32, with OpenAI's text_projection
    for config, published in ((CLIPTextConfig(512, 8, 12, 512), 63_428_096),
                              (CLIPTextConfig(768, 12, 12, 768), 123_650_304)):  # ViT-L/14
        with torch.device("meta"):
            assert sum(parameter.numel()
                       for parameter in CLIPText(config).parameters()) == published


@torch.no_grad()
def test_quick_gelu_is_near_gelu_but_not_gelu():
    x = torch.linspace(-4, 4, 81)
    error = (QuickGELU()(x) - F.gelu(x)).abs().max()
    assert 0.01 < error < 0.03


# --------------------------------------------------------------------------------- relation matcher

@torch.no_grad()
@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("variant", MATCHERS)
def test_the_relation_is_the_papers_equation(variant, length):
    matcher = randomise(RelationMatcher(64, TEXT, heads=8, variant=variant))
    E, T = torch.randn(B, 12, 64), torch.randn(B, length, TEXT)
    context = torch.cat([E, matcher.text(T)], dim=1) if variant == "concat" else E
    assert hasattr(matcher, "text") == (variant != "image")  # nothing is trained that is not read
    Q, (K, V) = matcher.query(E), matcher.key_value(context).split(64, dim=2)
    M = [torch.softmax(q @ k.transpose(1, 2) / 8 ** 0.5, dim=2) @ v
         for q, k, v in zip(Q.split(8, 2), K.split(8, 2), V.split(8, 2))]  # head by head
    R = F.layer_norm(E + matcher.out(torch.cat(M, dim=2)), (64,), matcher.norm.weight,
                     matcher.norm.bias)
    torch.testing.assert_close(matcher(E, T), R)


@torch.no_grad()
@pytest.mark.parametrize("variant", MATCHERS)
def test_a_padded_sentence_in_a_batch_gives_the_same_relation_as_alone(variant):
    matcher = randomise(RelationMatcher(64, TEXT, heads=8, variant=variant))
    # what stands for padding here cannot be overlooked
    E, T = torch.randn(3, 12, 64), 20 * torch.randn(3, 6, TEXT)
    lengths = torch.tensor([2, 6, 1])
    mask = torch.arange(6) < lengths[:, None]
    R = matcher(E, T, mask)
    for i, length in enumerate(lengths):
        torch.testing.assert_close(R[i:i + 1], matcher(E[i:i + 1], T[i:i + 1, :length]))
    T[~mask] = 0
    torch.testing.assert_close(matcher(E, T, mask), R)  # whatever the padding
    hides_something = not torch.allclose(matcher(E, T), R)
    assert hides_something == (variant != "image")
    # nothing is padding
    torch.testing.assert_close(matcher(E, T, torch.ones(3, 6).bool()), matcher(E, T))


@torch.no_grad()
def test_the_mask_never_hides_image_tokens():
    """Where no text token counts, `concat` is `image`: each image token still asks all of them.

    `image` has no mask.
    """
    matcher = randomise(RelationMatcher(64, TEXT))
    alone = RelationMatcher(64, TEXT, variant="image")
    state = matcher.state_dict()
    alone.load_state_dict({name: state[name] for name in alone.state_dict()})
    E, T, nothing = torch.randn(B, 12, 64), torch.randn(B, 6, TEXT), torch.zeros(B, 6).bool()
    torch.testing.assert_close(matcher(E, T, nothing), alone.eval()(E, None))
    assert torch.equal(alone(E, T, nothing), alone(E, None))
    for token in range(12):  # a change of any image token reaches all others through the attention
        changed = E.clone()
        changed[:, token] += 1
        others = [other for other in range(12) if other != token]
        difference = matcher(changed, T, nothing) - matcher(E, T, nothing)
        assert (difference[:, others].abs().amax(2) > 1e-5).all()


@torch.no_grad()
def test_attention_dropout_is_for_training_alone():
    matcher = randomise(RelationMatcher(64, TEXT))
    E, T = torch.randn(B, 12, 64), torch.randn(B, 1, TEXT)
    assert torch.equal(matcher(E, T), matcher(E, T))
    matcher.train()
    assert not torch.equal(matcher(E, T), matcher(E, T))


# ------------------------------------------------------------------------------------------- VLPose

@torch.no_grad()
@pytest.mark.parametrize("decoder", DECODERS)
def test_each_decoder_is_its_figure(decoder, base, images, text):
    model = randomise(VLPose(base, TEXT, decoder), seed=1)
    E = base.backbone(images, model.prompts)
    B1, B2 = base.head.block1, base.head.block2
    if decoder != "baseline":
        R = model.matcher(E.flatten(2).transpose(1, 2), text).transpose(1, 2).reshape(E.shape)
    if decoder == "baseline":
        m2 = B2(B1(E))
    elif decoder == "injector":
        m2 = B2(B1(E + R))
    elif decoder == "extractor-injector":
        m1, a1 = B1(E), model.auxiliary1(R)
        m2 = B2(m1) + model.auxiliary2(a1 + m1)
    elif decoder == "dual":
        m1, a1 = B1(E + R), model.auxiliary1(R)
        m2 = B2(m1) + model.auxiliary2(a1 + m1)
    else:
        a1 = model.auxiliary1(E)
        m1 = B1(E + R) + a1
        m2 = B2(m1) + model.auxiliary2(m1)
    expected = F.conv2d(m2, model.predictor.weight, model.predictor.bias)
    torch.testing.assert_close(model(images, text), expected)
    assert model(images, text).shape == (B, 17, 16, 12)


@pytest.mark.parametrize("decoder", DECODERS)
def test_frozen_means_frozen(decoder, base, images, text):
    """Ten steps of training change every tensor of the adapter and not a bit of the base.

    Not even BatchNorm's statistics change.
    """
    original = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected = base(images)
    model = randomise(VLPose(base, TEXT, decoder), seed=1).train()
    before = {name: tensor.clone() for name, tensor in adapter_of(model).items()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(10):
        model(images, text).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(tensor, original[name]) for name, tensor in base.state_dict().items())
    assert all(parameter.grad is None for parameter in base.parameters())
    unchanged = {name for name, tensor in adapter_of(model).items()
                 if torch.equal(tensor, before[name])}
    assert not unchanged
    assert torch.equal(model.base(images), expected)  # in training mode still
    assert torch.equal(model.eval().base(images), expected)


@torch.no_grad()
def test_each_image_reads_its_own_sentence(base, images, text):
    model = randomise(VLPose(base, TEXT), seed=1)
    heatmaps = model(images, text)
    other = model(images, torch.stack([text[0], text[1] + 1]))
    torch.testing.assert_close(heatmaps[0], other[0])
    assert not torch.allclose(heatmaps[1], other[1])
    tokens = torch.randn(B, 7, TEXT)  # all tokens of a sentence instead of its end alone
    assert model(images, tokens).shape == heatmaps.shape


@torch.no_grad()
@pytest.mark.parametrize("matcher", MATCHERS)
def test_a_padded_sentence_in_a_batch_gives_the_same_heatmaps_as_alone(matcher, base, images):
    model = randomise(VLPose(base, TEXT, matcher=matcher), seed=1)
    T, mask = torch.randn(B, 5, TEXT), torch.tensor([[True] * 2 + [False] * 3, [True] * 5])
    heatmaps = model(images, T, mask)
    torch.testing.assert_close(heatmaps[:1], model(images[:1], T[:1, :2]))
    torch.testing.assert_close(heatmaps[1:], model(images[1:], T[1:]))
    assert torch.equal(model.predictor(model.features(images, T, mask)), heatmaps)
    assert torch.allclose(heatmaps[0], model(images, T)[0]) == (matcher == "image")


@torch.no_grad()
@pytest.mark.parametrize("decoder", list(DECODERS)[1:])
def test_at_first_the_relation_leaves_the_frozen_decoder_alone_but_feeds_the_extractor(
        decoder, base, images, text):
    """In the released code it does not leave it alone."""
    relation = VLPose(base, TEXT, decoder).matcher(base.backbone(images).flatten(2).mT, text)
    assert relation.any() == (decoder in ("extractor-injector", "dual-released"))


@torch.no_grad()
def test_the_injector_starts_at_the_original_and_dual_adds_a_tenth_of_an_extractors_block(
        base, images, text):
    """Without prompts, which change what the backbone sees."""
    assert torch.equal(VLPose(base, TEXT, "injector", num_prompts=0).eval()(images, text),
                       base(images))
    model = VLPose(base, TEXT, "dual", num_prompts=0).eval()
    assert not model.matcher(base.backbone(images).flatten(2).mT, text).any()  # R = 0
    m1 = base.head.block1(base.backbone(images))  # B₁(E), and A₁(0) = 0
    deconvolution, norm, _ = model.auxiliary2
    added = F.relu(0.1 * deconvolution(m1) / (1 + norm.eps) ** 0.5)
    torch.testing.assert_close(model.features(images, text), base.head.block2(m1) + added)
    assert added.any()  # or else nothing could be learned
    torch.testing.assert_close(model(images, text),
                               base.head.predictor(base.head.block2(m1) + added))


def test_dual_released_starts_as_the_released_code(base):
    """Deconvolutions normal with 0.001, norms of gain 1, PyTorch's linear layers.

    The predictor is a copy of the base's own.
    """
    model = VLPose(base, TEXT, "dual-released")
    for deconvolution, norm, _ in (model.auxiliary1, model.auxiliary2):
        weight = deconvolution.weight
        assert weight.std().item() == pytest.approx(0.001, rel=0.03) and abs(weight.mean()) < 5e-5
        # normal, not uniform
        assert (weight.abs() > 0.002).float().mean().item() == pytest.approx(0.0455, abs=0.01)
        assert (norm.weight == 1).all() and (norm.bias == 0).all()
    assert (model.matcher.norm.weight == 1).all() and (model.matcher.norm.bias == 0).all()
    for layer in (model.matcher.text, model.matcher.query, model.matcher.key_value,
                  model.matcher.out):
        limit = layer.in_features ** -0.5  # of PyTorch's uniform distribution
        assert 0.95 * limit < layer.weight.abs().max() <= limit and layer.weight.std() > limit / 2
    predictor = model.predictor
    assert torch.equal(predictor.weight, base.head.predictor.weight)
    assert predictor.weight.requires_grad
    assert torch.equal(predictor.bias, base.head.predictor.bias) and predictor.bias.requires_grad
    assert predictor is not base.head.predictor and not base.head.predictor.weight.requires_grad


@pytest.mark.parametrize("decoder", ["extractor-injector", "dual"])
def test_our_own_start_is_quiet(decoder, base):
    model = VLPose(base, TEXT, decoder)
    assert (model.auxiliary2[1].weight == 0.1).all() and (model.auxiliary1[1].weight == 1).all()
    gain = 0 if decoder == "dual" else 1
    assert (model.matcher.norm.weight == gain).all() and not model.matcher.norm.bias.any()


@pytest.mark.parametrize("size, options, share", [
    ("base", {}, 0.079), ("large", {}, 0.034), ("huge", {}, 0.022),
    ("base", {"decoder": "baseline", "num_prompts": 0, "rank": 4}, 0.063)],
                         ids=["base", "large", "huge", "low rank"])
def test_the_adapter_is_a_small_share_of_a_large_model(size, options, share):
    with torch.device("meta"):
        base = PoseModel(VIT_CONFIGS[size])
        whole = sum(tensor.numel() for tensor in base.parameters())
        model = VLPose(base, 512, **options)
    trained = sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)
    assert trained / whole == pytest.approx(share, abs=1e-3)


@torch.no_grad()
def test_without_prompts_and_relation_nothing_changes(base, images, text):
    assert torch.equal(VLPose(base, TEXT, "baseline", num_prompts=0)(images, text), base(images))


def test_there_are_as_many_prompts_as_asked_for_or_as_in_the_paper(base):
    assert VLPose(base, TEXT).prompts.shape == (3, 5, 64)
    assert VLPose(base, TEXT, num_prompts=2).prompts.shape == (3, 2, 64)
    prompts = [VIT_CONFIGS[size].prompts for size in ("small", "base", "large", "huge")]
    assert prompts == [50, 20, 10, 5]


@pytest.mark.parametrize("options, message", [
    ({"decoder": "triple"}, "decoder: expected one of baseline, .* not 'triple'"),
    ({"matcher": "both"}, "matcher: expected one of concat, image, not 'both'")])
def test_a_wrong_choice_is_named(options, message, base):
    with pytest.raises(ValueError, match=message):
        VLPose(base, TEXT, **options)


# --------------------------------------------------------------------------------- low-rank updates

def low_rank(base, decoder="baseline", rank=3):
    return VLPose(base, TEXT, decoder, 0, rank=rank)


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY, VIT_CONFIGS["tiny"]], ids=["patches", "convolutions"])
def test_low_rank_updates_start_at_the_original_model(config):
    base = randomise(PoseModel(config))
    images = torch.randn(B, 3, *config.image_size)
    assert torch.equal(low_rank(base).eval()(images, torch.zeros(B, 1, TEXT)), base(images))


@torch.no_grad()
def test_a_model_with_updates_is_one_whose_weights_are_w_plus_b_times_a(images, text):
    base = randomise(PoseModel(TINY))
    model, merged = randomise(low_rank(base), seed=1), randomise(PoseModel(TINY))
    for name, W in merged.named_parameters():
        if not name.startswith("head.predictor"):
            update = model.updates[name.replace(".", "-")]
            W += update.B @ update.A if W.ndim == 2 else update.B
    merged.head.predictor = model.predictor
    torch.testing.assert_close(model(images, text), merged(images))
    assert not torch.allclose(model(images, text), base(images))
    assert torch.equal(model.base(images), base(images))


@torch.no_grad()
@pytest.mark.parametrize("matcher", MATCHERS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_an_adapter_is_on_without_text_unless_it_reads_text(decoder, matcher, base, images, text):
    model = randomise(VLPose(base, TEXT, decoder, matcher=matcher), seed=1)
    adapted, other = model(images, text), model(images, torch.randn_like(text))
    assert model.reads_text == (not torch.equal(adapted, other))
    assert torch.equal(model(images), base(images) if model.reads_text else adapted)


def test_updates_of_linear_layers_have_the_rank_asked_for_all_others_their_weights_shape(base):
    updates = low_rank(base, rank=3).updates
    for name, W in base.named_parameters():
        if name.startswith("head.predictor"):  # it has a copy of its own
            assert name.replace(".", "-") not in updates
        else:
            update = updates[name.replace(".", "-")]
            assert update(W).shape == W.shape and (W.ndim == 2) == (update.A is not None)
            if W.ndim == 2:
                nn.init.normal_(update.B)
                assert torch.linalg.matrix_rank(update(torch.zeros_like(W))) == 3


@pytest.mark.parametrize("decoder", ["baseline", "dual"])
def test_updates_learn_and_the_base_does_not_move(decoder, base, images, text):
    original = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = randomise(low_rank(base, decoder), seed=1).train()
    model(images, text).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any()
               for parameter in model.updates.parameters())
    assert all(parameter.grad is None for parameter in base.parameters())
    assert all(torch.equal(tensor, original[name]) for name, tensor in base.state_dict().items())


def test_blocks_computed_anew_have_their_updates_too(base, images, text):
    model, gradients = randomise(low_rank(base), seed=1), []
    for base.backbone.checkpointing in (False, True):
        gradients.append(torch.autograd.grad(model(images, text).square().sum(),
                                             model.updates.parameters()))
    assert all(map(torch.equal, *gradients))


# ------------------------------------------------------------------------------------------- memory

@pytest.mark.parametrize("n", [0, 3])
def test_blocks_computed_anew_in_the_backward_pass_change_nothing_but_the_memory(n):
    model = ViT(ViTConfig(32, 3, 4, 0.5, 0, 1.0, image_size=(64, 48))).train()
    prompts, images = torch.randn(3, n, 32, requires_grad=True), torch.randn(4, 3, 64, 48)
    outcomes, kept = [], []
    for model.checkpointing in (False, True):
        sizes = []
        torch.manual_seed(0)  # of the drop path, which must be the same the second time
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x,
                                                      lambda x: x):
            features = model(images, prompts)
        tensors = [*model.parameters()] + [prompts] * (n > 0)
        outcomes.append([features, *torch.autograd.grad((features ** 2).sum(), tensors)])
        kept.append(sum(sizes))
    assert all(map(torch.equal, *outcomes))
    assert kept[1] < 0.5 * kept[0]
