"""Loading in vlpose.py: public layouts against their own programs, hostile files, downloads."""
import argparse
import collections
import copy
import dataclasses
import errno
import hashlib
import http.server
import io
import json
import os
import pickle
import random
import struct
import sys
import threading
import time
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import vlpose
from data import COCO17, SKELETONS, DataError, PoseDataset, encode_heatmaps, make_skeleton
from eval import estimate_poses, main, say_other_skeleton
from train import parse_options, starting_model
from vlpose import (DECODERS, DETECTORS, EXPERTS, PUBLIC_FILES, TRUNKS, VIT_CONFIGS, PoseModel,
                    PublicFile, ViTConfig, VLPose, WeightsError, encode_sentences, load_backbone,
                    load_clip_text, load_model, load_pose_model, load_weights, save_checkpoint,
                    with_keypoints)

pytestmark = pytest.mark.usefixtures("cheap_weights")
SMALL = ViTConfig(384, 2, 12, 0.0, 3, 0.8)  # ViTPose-S with two layers


def randomise(module, seed=0):
    """Weights such that every tensor matters: norms and BatchNorm statistics too."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.05,
                           generator=generator)
    return module.eval()


@pytest.fixture(scope="module")
def vitpose():
    return randomise(PoseModel(SMALL))


@pytest.fixture(scope="module")
def crops():
    return torch.randn(1, 3, 256, 192, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name


@torch.no_grad()
def same_heatmaps(a, b, images):
    return relative_error(a(images), b(images)) <= 1e-6


# ---------------------------------------------------------------------- ViTPose, as others write it

@pytest.mark.parametrize("simple", [False, True], ids=["classic", "simple"])
@pytest.mark.parametrize("dim, layers", [(384, 3), (768, 1)], ids=["S", "B"])
def test_heatmaps_are_those_of_transformers_from_its_own_file(dim, layers, simple, crops, tmp_path):
    transformers = pytest.importorskip("transformers")
    backbone = transformers.VitPoseBackboneConfig(
        image_size=[256, 192], hidden_size=dim, num_hidden_layers=layers, num_attention_heads=12,
        mlp_ratio=4)
    config = transformers.VitPoseConfig(backbone_config=backbone, num_labels=17,
                                        use_simple_decoder=simple)
    peer = randomise(transformers.VitPoseForPoseEstimation(config))
    peer.save_pretrained(tmp_path)
    model = load_pose_model(tmp_path / "model.safetensors")
    with torch.no_grad():
        assert relative_error(model(crops), peer(crops).heatmaps) <= 1e-5
    assert (model.config.depth, model.config.image_size) == (layers, (256, 192))
    assert model.config.decoder_dim == (0 if simple else 256)


# Ours, the authors' and mmpose's names, line by line as their published files have them.
LAYOUTS = """
backbone.patch_embed       backbone.patch_embed.proj       backbone.patch_embed.projection
backbone.pos_embed         backbone.pos_embed              backbone.pos_embed
backbone.blocks.{}.norm1   backbone.blocks.{}.norm1        backbone.layers.{}.ln1
backbone.blocks.{}.attn    backbone.blocks.{}.attn         backbone.layers.{}.attn
backbone.blocks.{}.norm2   backbone.blocks.{}.norm2        backbone.layers.{}.ln2
backbone.blocks.{}.mlp.0   backbone.blocks.{}.mlp.fc1      backbone.layers.{}.ffn.layers.0.0
backbone.blocks.{}.mlp.2   backbone.blocks.{}.mlp.fc2      backbone.layers.{}.ffn.layers.1
backbone.norm              backbone.last_norm              backbone.ln1
head.block1.0              keypoint_head.deconv_layers.0   head.deconv_layers.0
head.block1.1              keypoint_head.deconv_layers.1   head.deconv_layers.1
head.block2.0              keypoint_head.deconv_layers.3   head.deconv_layers.3
head.block2.1              keypoint_head.deconv_layers.4   head.deconv_layers.4
head.predictor             keypoint_head.final_layer       head.final_layer
"""


def rename(state, layout):
    """A state dict of ours under the authors' (1) or mmpose's (2) names."""
    result = {}
    for line in LAYOUTS.split("\n")[1:-1]:
        for block in range(SMALL.depth if "{}" in line else 1):
            names = [name.format(block) for name in line.split()]
            result |= {names[layout] + name.removeprefix(names[0]): tensor.clone()
                       for name, tensor in state.items()
                       if name == names[0] or name.startswith(f"{names[0]}.")}
    assert len(result) == len(state)
    return result


def test_the_authors_layout_adds_the_class_position_to_every_other(vitpose, crops, tmp_path):
    state = rename(vitpose.state_dict(), 1)
    row = torch.randn(1, 1, 384)
    state["backbone.pos_embed"] = torch.cat([row, state["backbone.pos_embed"] - row], dim=1)
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
               tmp_path / "authors.pth")
    assert same_heatmaps(load_pose_model(tmp_path / "authors.pth"), vitpose, crops)


@pytest.mark.parametrize("class_token", [False, True])
def test_mmposes_layout_has_no_class_position_or_one_that_is_not_used(
        class_token, vitpose, crops, tmp_path):
    state = rename(vitpose.state_dict(), 2)
    if class_token:
        state["backbone.cls_token"] = torch.randn(1, 1, 384)
        state["backbone.pos_embed"] = torch.cat([torch.randn(1, 1, 384),
                                                 state["backbone.pos_embed"]], dim=1)
    torch.save({"meta": {"sigmas": np.ones(17), "cfg": "..."},
                "state_dict": collections.OrderedDict(state)},
               tmp_path / "mmpose.pth", _use_new_zipfile_serialization=False)
    assert same_heatmaps(load_pose_model(tmp_path / "mmpose.pth"), vitpose, crops)


@pytest.mark.parametrize("dim, heads, patch", [(384, 12, 16), (1280, 16, 14)],
                         ids=["small", "huge"])
def test_a_mae_backbone_gets_a_decoder_and_a_table_of_our_shape(dim, heads, patch, tmp_path):
    state = {name.removeprefix("backbone."): tensor for name, tensor in
             rename(randomise(PoseModel(ViTConfig(dim, 1, heads, 0.0, 3, 0.8))).state_dict(),
                    1).items()
             if name.startswith("backbone.")}
    for part in ("weight", "bias"):
        state[f"norm.{part}"] = state.pop(f"last_norm.{part}")
    count = (224 // patch) ** 2
    state |= {"cls_token": torch.zeros(1, 1, dim),
              "pos_embed": torch.full((1, 1 + count, dim), 0.5),
              "patch_embed.proj.weight": torch.randn(dim, 3, patch, patch)}
    state["pos_embed"][:, 0] = 0
    torch.save({"model": state}, tmp_path / "mae.pth")
    backbone = load_pose_model(f"{tmp_path}/mae.pth#heads={heads}").backbone
    assert backbone.grid == (16, 12) and torch.allclose(backbone.pos_embed, torch.tensor(0.5))
    assert torch.equal(backbone.norm.weight, state["norm.weight"])
    inner = slice((16 - patch) // 2, (16 + patch) // 2)
    assert torch.equal(backbone.patch_embed.weight[:, :, inner, inner],
                       state["patch_embed.proj.weight"])


def test_another_input_size_stretches_the_positional_table(vitpose, crops, tmp_path):
    with torch.no_grad():
        ramp = torch.linspace(-1, 1, 16)[:, None].expand(16, 12).reshape(1, 192, 1)
        vitpose.backbone.pos_embed[:, :, :1] = ramp
    save_checkpoint(tmp_path / "ours.pth", vitpose)
    model = load_pose_model(tmp_path / "ours.pth", image_size=(384, 288))
    table = model.backbone.pos_embed[0, :, 0].view(24, 18)
    assert torch.allclose(table, table[:, :1], atol=1e-6)  # a ramp still, and as high
    assert (table[2:-2].diff(dim=0) > 0.05).all()
    assert table[12, 0].item() == pytest.approx(-table[11, 0].item(), abs=1e-6)
    assert table[-1, 0] > 0.95
    assert model(crops[:, :, :, :].new_zeros(1, 3, 384, 288)).shape == (1, 17, 96, 72)
    assert model.config.image_size == (384, 288)
    with pytest.raises(ValueError, match="multiples of 16"):
        load_pose_model(tmp_path / "ours.pth", image_size=(250, 192))


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("backbone.blocks.1.norm2.bias"),
     r"1\.norm2\.bias is nothing, expected float \[384\]"),
    (lambda state: state.update({"backbone.blocks.0.mlp.gate.weight": torch.zeros(6, 1536)}),
     r"blocks\.0\.mlp\.gate\.weight is float \[6, 1536\], expected nothing"),
    (lambda state: state.update({"head.predictor.bias": torch.zeros(16)}),
     r"bias is float \[16\], .* \[17\]"),
    (lambda state: state.update({"backbone.norm.weight": torch.zeros(384).int()}),
     "weight is int .* expected float"),
    (lambda state: state.pop("backbone.pos_embed"), r"found no entry 'backbone\.pos_embed'"),
    (lambda state: state.update({"backbone.pos_embed": torch.zeros(1, 190, 384)}),
     "190 positions of width 384"),
    (lambda state: state.update({"backbone.pos_embed": torch.zeros(384)}), "expected a pose model"),
    (lambda state: state.update({"head.final_layer.bias": torch.zeros(17)}),
     "head.final_layer.bias is there twice"),
    (lambda state: state.update({"note": "hello"}), "'note' is not a tensor but a str"),
], ids=["missing", "left over", "shape", "integer", "no table", "table", "dimensions", "twice",
        "text"])
def test_a_tensor_that_does_not_fit_is_named(change, message, vitpose, tmp_path):
    state = vitpose.state_dict()
    change(state)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=message) as error:
        load_pose_model(tmp_path / "other.pth")
    assert str(error.value).startswith(str(tmp_path / "other.pth")) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["resnet50", "swin_t"])
def test_torchvisions_networks_are_backbones_as_they_are(name, tmp_path, monkeypatch):
    crops = torch.randn(1, 3, 64, 96)
    monkeypatch.setenv("POSEBRIDGE_HOME", str(tmp_path))
    peer = torchvision.models.get_model(name).eval()
    (tmp_path / "weights").mkdir()
    torch.save(peer.state_dict(), tmp_path / "weights" / f"{name}.pth")
    monkeypatch.setitem(PUBLIC_FILES, name, PublicFile(PUBLIC_FILES[name].address))
    base = load_pose_model(name)
    if name == "resnet50":  # its tensors say what it is
        by_path = load_pose_model(tmp_path / "weights" / f"{name}.pth")
        same_tensors(by_path.backbone.body.state_dict(), base.backbone.body.state_dict())
    seen = []
    peer.avgpool.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        peer(crops)
        assert torch.equal(base.backbone.body(crops), seen[0]) and seen[0].shape[2:] == (2, 3)
        assert base(crops).shape == (1, 17, 16, 24)
    with pytest.raises(ValueError, match=f"{name} has no tokens that 5 prompts"):
        VLPose(base, 32, num_prompts=5)
    model = VLPose(base, 32).eval()
    assert model(crops, torch.randn(1, 1, 32)).shape == (1, 17, 16, 24)
    save_checkpoint(tmp_path / "model.pth", model)
    again = load_model(tmp_path / "model.pth")
    with torch.no_grad():
        assert torch.equal(again(crops), base(crops))


def bare(state):
    """The backbone of a state dict under the authors' or mmpose's names, as people share it."""
    return {name.removeprefix("backbone."): tensor for name, tensor in state.items()
            if name.startswith("backbone.")}


@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize("layout", [1, 2], ids=["last_norm", "mmpretrain"])
def test_a_backbone_alone_is_read_under_all_its_names(layout, prefix, vitpose, crops, tmp_path):
    state = {prefix + name: tensor
             for name, tensor in bare(rename(vitpose.state_dict(), layout)).items()}
    torch.save({"state_dict": state}, tmp_path / "backbone.pth")
    model = load_pose_model(f"{tmp_path}/backbone.pth#heads=12")
    assert same_heatmaps(model.backbone, vitpose.backbone, crops)


@pytest.fixture(scope="module")
def dino():
    """A backbone of width 384 with 6 heads, in timm's names, and one of its blocks."""
    timm = pytest.importorskip("timm")
    peer = randomise(timm.models.vision_transformer.VisionTransformer(
        embed_dim=384, depth=2, num_heads=6, num_classes=10))
    return peer.state_dict(), peer.blocks[1]


def test_a_bare_backbone_of_width_384_is_refused_until_its_heads_are_said(dino, tmp_path):
    state, block = dino
    torch.save(state, tmp_path / "dino.pth")
    with pytest.raises(WeightsError, match="6 heads .DINO.* or 12 .ViTPose.; expected '#heads=6'"):
        load_pose_model(tmp_path / "dino.pth")
    for heads in (7, 0):
        with pytest.raises(WeightsError, match=f"divides the width 384, found {heads}"):
            load_pose_model(f"{tmp_path}/dino.pth#heads={heads}")
    with pytest.raises(WeightsError, match="expected heads=NUMBER or one of coco, aic.*found six"):
        load_pose_model(f"{tmp_path}/dino.pth#six")
    tokens = torch.randn(1, 9, 384)
    read = load_pose_model(f"{tmp_path}/dino.pth#heads=6")
    assert same_heatmaps(read.backbone.blocks[1], block, tokens)
    table = state["pos_embed"][:, 1:]  # timm adds the class token's row to no other
    assert torch.allclose(vlpose.resize_positions(table, (224, 224), (256, 192)),
                          read.backbone.pos_embed)
    started = PoseModel(SMALL)  # --init
    load_backbone(started, f"{tmp_path}/dino.pth#heads=6")
    assert same_heatmaps(started.eval().backbone.blocks[1], block, tokens)
    assert started.config.heads == 6
    save_checkpoint(tmp_path / "ours.pth", started)
    assert same_heatmaps(load_model(tmp_path / "ours.pth").backbone.blocks[1], block, tokens)


@pytest.fixture(scope="module")
def transformers_backbone():
    """The tensors of a ViTPose-S of transformers without its decoder."""
    transformers = pytest.importorskip("transformers")
    config = transformers.VitPoseBackboneConfig(
        image_size=[256, 192], hidden_size=384, num_hidden_layers=2, num_attention_heads=12,
        mlp_ratio=4)
    peer = transformers.VitPoseForPoseEstimation(
        transformers.VitPoseConfig(backbone_config=config, num_labels=17))
    return {name: tensor for name, tensor in peer.state_dict().items() if "head." not in name}


@pytest.mark.parametrize("text", [
    '{"num_attention_heads": 6, "hidden_act": "gelu"}',
    '{"backbone_config": {"num_attention_heads": 6}, "num_attention_heads": 3}',
    '{"backbone_config": null, "num_attention_heads": 6}'])
def test_the_config_of_hugging_face_beside_a_file_says_its_heads(
        text, transformers_backbone, tmp_path):
    torch.save(transformers_backbone, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(text)
    assert load_pose_model(tmp_path / "pytorch_model.bin").config.heads == 6
    (tmp_path / "config.json").write_text('{"num_attention_heads": "all"}')
    with pytest.raises(WeightsError, match="number of heads that divides the width 384, found all"):
        load_pose_model(tmp_path / "pytorch_model.bin")


def test_the_config_of_another_model_beside_a_file_does_not_say_its_heads(vitpose, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert", "num_attention_heads": 16}')
    torch.save(rename(vitpose.state_dict(), 1), tmp_path / "vitpose-s.pth")
    assert load_pose_model(tmp_path / "vitpose-s.pth").config.heads == 12


# -------------------------------------------------------------- ViTPose+ and files of several tasks

@pytest.fixture(scope="module")
def vitpose_plus():
    """transformers' ViTPose+, and its tensors under the authors' names with a decoder per expert.

    The decoders are those of transformers, one for each data set.
    """
    transformers = pytest.importorskip("transformers")

    def build(labels):
        backbone = transformers.VitPoseBackboneConfig(
            image_size=[256, 192], hidden_size=384, num_hidden_layers=2, num_attention_heads=12,
            mlp_ratio=4, num_experts=6, part_features=96)
        config = transformers.VitPoseConfig(backbone_config=backbone, num_labels=labels,
                                            use_simple_decoder=False)
        return randomise(transformers.VitPoseForPoseEstimation(config), labels)

    peer = build(17)
    heads = [build(count).head for count in (17, 14, 16, 17, 17, 133)]
    heads[0] = peer.head
    state = {}
    for name, tensor in peer.state_dict().items():
        for theirs, authors in [("embeddings.position_embeddings", "pos_embed"),
                                ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
                                ("encoder.layer", "blocks"), ("layernorm_before", "norm1"),
                                ("layernorm_after", "norm2"), ("layernorm", "last_norm"),
                                ("attention.output.dense", "attn.proj")]:
            name = name.replace(theirs, authors)
        if "attention.query" in name:
            theirs = name.replace("blocks", "encoder.layer")
            three = [peer.state_dict()[theirs.replace("query", part)]
                     for part in ("query", "key", "value")]
            state[name.replace("attention.attention.query", "attn.qkv")] = torch.cat(three)
        elif "attention.attention" not in name and not name.startswith("head."):
            state[name] = tensor
    for number, head in enumerate(heads):
        prefix = f"associate_keypoint_heads.{number - 1}." if number else "keypoint_head."
        for layer, place in [("deconv1", "deconv_layers.0"), ("batchnorm1", "deconv_layers.1"),
                             ("deconv2", "deconv_layers.3"), ("batchnorm2", "deconv_layers.4"),
                             ("conv", "final_layer")]:
            for kind, tensor in head.get_submodule(layer).state_dict().items():
                state[f"{prefix}{place}.{kind}"] = tensor
    return peer, heads, state


@torch.no_grad()
def heatmaps_of_expert(vitpose_plus, number, crops):
    peer, heads, _ = vitpose_plus
    peer.head = heads[number]
    heatmaps = peer(crops, dataset_index=torch.tensor([number])).heatmaps
    peer.head = heads[0]
    return heatmaps


def test_vitpose_plus_of_transformers_gives_the_heatmaps_of_its_first_expert(
        vitpose_plus, crops, tmp_path, capsys):
    vitpose_plus[0].save_pretrained(tmp_path)
    model = load_pose_model(tmp_path / "model.safetensors")
    expected = heatmaps_of_expert(vitpose_plus, 0, crops)
    assert relative_error(model(crops), expected) <= 1e-5 and model.skeleton is COCO17
    assert "only coco's part is read" in capsys.readouterr().err
    with pytest.raises(WeightsError, match="expected a decoder for aic .* found none"):
        load_pose_model(f"{tmp_path}/model.safetensors#aic")


@pytest.mark.parametrize("expert", EXPERTS)
def test_each_expert_of_the_authors_vitpose_plus_is_chosen_by_name(
        expert, vitpose_plus, crops, tmp_path):
    state = dict(vitpose_plus[2])
    for part in ("weight", "bias"):  # in the authors' files some last layers are padded
        last = state[f"associate_keypoint_heads.0.final_layer.{part}"]
        state[f"associate_keypoint_heads.0.final_layer.{part}"] = torch.cat([last, last[:3]])
    torch.save({"state_dict": state}, tmp_path / "plus.pth")
    number = list(EXPERTS).index(expert)
    model = load_pose_model(f"{tmp_path}/plus.pth#{expert}")
    expected = heatmaps_of_expert(vitpose_plus, number, crops)
    assert relative_error(model(crops), expected) <= 1e-5
    assert model.skeleton is SKELETONS[EXPERTS[expert]]


def with_expert_built_in(state, number):
    """The state dict of a ViTPose+ with an expert's part in fc2, as the authors' script makes it.

    The script leaves all experts in the file, too.
    """
    state = dict(state)
    for name, tensor in state.items():
        if ".mlp.fc2." in name:
            state[name] = torch.cat([tensor, state[name.replace("fc2", f"experts.{number}")]])
    return state


def test_what_the_authors_script_for_splitting_leaves_in_a_file_is_left_out(
        vitpose_plus, crops, tmp_path):
    state = with_expert_built_in(vitpose_plus[2], 0)  # its coco.pth: all else is as before
    torch.save({"state_dict": state}, tmp_path / "coco.pth")
    expected = heatmaps_of_expert(vitpose_plus, 0, crops)
    assert relative_error(load_pose_model(tmp_path / "coco.pth")(crops), expected) <= 1e-5


def test_another_experts_part_replaces_the_one_that_a_split_file_has_built_in(
        vitpose_plus, crops, tmp_path):
    state = with_expert_built_in(vitpose_plus[2], 0)
    torch.save({"state_dict": state}, tmp_path / "coco.pth")  # with all decoders and experts
    expected = heatmaps_of_expert(vitpose_plus, 3, crops)
    model = load_pose_model(f"{tmp_path}/coco.pth#ap10k")
    assert relative_error(model(crops), expected) <= 1e-5


def test_a_missing_expert_is_an_error(vitpose_plus, tmp_path):
    state = {name: tensor for name, tensor in vitpose_plus[2].items() if ".experts.3." not in name}
    torch.save(state, tmp_path / "plus.pth")
    with pytest.raises(WeightsError, match=r"mlp.2.bias is float \[288\], expected float \[384\]"):
        load_pose_model(f"{tmp_path}/plus.pth#ap10k")


@pytest.mark.parametrize("expert", ["ap10k", "mpii"])
def test_a_split_file_has_one_experts_part_whatever_experts_are_left_in_it(
        expert, vitpose_plus, crops, tmp_path, monkeypatch, capsys):
    number = list(EXPERTS).index(expert)
    state = {name: tensor for name, tensor in with_expert_built_in(vitpose_plus[2], number).items()
             if "keypoint_head" not in name}
    decoder = f"associate_keypoint_heads.{number - 1}."
    state |= {name.replace(decoder, "keypoint_head."): tensor
              for name, tensor in vitpose_plus[2].items() if name.startswith(decoder)}
    name = f"easy-vitpose-s-{expert}"
    (tmp_path / "weights").mkdir()
    path = tmp_path / "weights" / f"{name}.pth"
    torch.save({"state_dict": state}, path)
    expected = heatmaps_of_expert(vitpose_plus, number, crops)
    by_path = load_pose_model(path)
    assert relative_error(by_path(crops), expected) <= 1e-5
    said = capsys.readouterr().err
    assert "does not say what its" in said and "coco's part" not in said
    monkeypatch.setenv("POSEBRIDGE_HOME", str(tmp_path))
    by_name = load_pose_model(name)
    assert by_name.skeleton is SKELETONS[EXPERTS[expert]]
    assert relative_error(by_name(crops), expected) <= 1e-5
    assert not capsys.readouterr().err


@pytest.mark.parametrize("task, seed", [("", 0), ("coco", 0), ("mpii", 16)])
def test_a_file_of_several_tasks_without_experts_has_one_decoder_for_each(
        task, seed, vitpose, crops, tmp_path):
    state = rename(vitpose.state_dict(), 1)
    other = rename(randomise(PoseModel(SMALL, 16), 16).state_dict(), 1)
    for name in other:
        if name.startswith("keypoint_head."):
            place = name.replace("keypoint_head", "associate_keypoint_heads.1")
            state[place] = other[name]
            state[place.replace(".1.", ".0.", 1)] = torch.zeros(3)
    torch.save({"state_dict": state}, tmp_path / "multi.pth")
    model = load_pose_model(f"{tmp_path}/multi.pth#{task}" if task else tmp_path / "multi.pth")
    expected = randomise(PoseModel(SMALL, 16), 16) if seed else vitpose
    same_tensors(model.head.state_dict(), expected.head.state_dict())
    same_tensors(model.backbone.state_dict(), vitpose.backbone.state_dict())
    assert model.skeleton is SKELETONS["MPII" if seed else "COCO17"]


# --------------------------------------------------------------------- Simple Baselines' ResNets

class SimpleBaselines(nn.Module):
    """Simple Baselines with torchvision's ResNet-18, with the names of RegDA and its successors."""

    def __init__(self):
        super().__init__()
        whole = torchvision.models.resnet18()
        self.backbone = nn.Sequential(collections.OrderedDict(
            (name, layer) for name, layer in whole.named_children()
            if name not in ("avgpool", "fc")))
        layers = []
        for channels in (512, 256, 256):
            layers += [nn.ConvTranspose2d(channels, 256, 4, stride=2, padding=1, bias=False),
                       nn.BatchNorm2d(256), nn.ReLU()]
        self.upsampling = nn.Sequential(*layers)
        self.head = nn.Conv2d(256, 16, 1)

    def forward(self, images):
        return self.head(self.upsampling(self.backbone(images)))


@pytest.fixture(scope="module")
def simple_baselines():
    return randomise(SimpleBaselines())


@pytest.mark.parametrize("names", ["RegDA", "mmpose 0.x", "mmpose 1.x", "the authors"])
def test_simple_baselines_are_read_under_all_their_names(names, simple_baselines, tmp_path, capsys):
    peer = simple_baselines
    head = {"mmpose 0.x": "keypoint_head.", "mmpose 1.x": "head."}.get(names, "")
    state = peer.state_dict()
    if names != "RegDA":
        state = {name.replace("upsampling.", f"{head}deconv_layers.")
                 .replace("head.weight", f"{head}final_layer.weight")
                 .replace("head.bias", f"{head}final_layer.bias"): tensor
                 for name, tensor in state.items()}
    if names == "the authors":
        state = {name.removeprefix("backbone."): tensor for name, tensor in state.items()}
    contents = {"student": state, "teacher": {}, "epoch": 3, "args": argparse.Namespace()}
    torch.save(contents if names == "RegDA" else {"state_dict": state}, tmp_path / "x.pth")
    model = load_pose_model(tmp_path / "x.pth", image_size=(64, 96), skeleton="mpii")
    assert same_heatmaps(model, peer, torch.randn(1, 3, 64, 96))
    assert model.config.trunk == "resnet18" and model.skeleton is SKELETONS["MPII"]
    assert "are not UDP's: keypoints may be off by up to 3 pixels" in capsys.readouterr().err
    with pytest.raises(WeightsError, match="x.pth: expected an image size of multiples of 32"):
        load_pose_model(tmp_path / "x.pth", image_size=(240, 176), skeleton="mpii")


# ------------------------------------------------------------------------------ whose keypoints?

# Pairs of the 68 keypoints of a face, from the middle outwards, as iBUG numbers them.
FACE = [*((i, 16 - i) for i in range(8)), *((17 + i, 26 - i) for i in range(5)), (31, 35), (32, 34),
        (36, 45), (37, 44), (38, 43), (39, 42), (40, 47), (41, 46), (48, 54), (49, 53), (50, 52),
        (55, 59), (56, 58), (60, 64), (61, 63), (65, 67)]


def true_mirror(name):
    names = list(SKELETONS[name].names)
    mirror = list(range(len(names)))
    for a, left in enumerate(names):
        if left.startswith("left_"):
            b = names.index(left.replace("left_", "right_", 1))
            mirror[a], mirror[b] = b, a
    if name == "WHOLEBODY":
        for a, b in FACE:
            mirror[23 + a], mirror[23 + b] = 23 + b, 23 + a
    return mirror


class Perfect(nn.Module):
    """Always finds the keypoints at their places, in a picture that is brighter on its right."""

    def __init__(self, skeleton, mirror):
        super().__init__()
        self.config, self.skeleton, self.mirror = SMALL, skeleton, mirror
        self.num_keypoints = len(skeleton.names)
        generator = torch.Generator().manual_seed(0)
        self.places = torch.rand(1, self.num_keypoints, 2, generator=generator) * 40 + 3  # cells
        points = self.places * torch.tensor([191 / 47, 255 / 63])
        self.heatmaps = nn.Parameter(encode_heatmaps(
            points, torch.ones(1, self.num_keypoints), (256, 192), (64, 48), 2.0)[0])

    def forward(self, images):
        left, right = images.mean((0, 1, 2)).chunk(2)
        if left.mean() < right.mean():
            return self.heatmaps
        return self.heatmaps[:, self.mirror].flip(3)


@pytest.mark.parametrize("name", SKELETONS)
def test_a_perfect_model_finds_every_keypoint_in_its_place(name):
    ramp = np.linspace(0, 255, 192).astype(np.uint8)
    picture = np.broadcast_to(ramp[None, :, None], (256, 192, 3))
    model = Perfect(SKELETONS[name], true_mirror(name))
    keypoints = estimate_poses(model, picture).keypoints
    unnamed = tuple(f"keypoint {number}" for number in range(1, model.num_keypoints + 1))
    model.skeleton = replace(model.skeleton, names=unnamed, flip_pairs=())  # without flip test
    assert np.abs(keypoints - estimate_poses(model, picture).keypoints).max() < 0.01
    assert np.ptp(keypoints[0, :, :2], axis=0).min() > 100 and keypoints[:, :, 2].min() > 0.9


MMPOSE = {"dataset_name": "fly", "num_keypoints": 5,
          "keypoint_id2name": {0: "Nose", 1: "wingA", 2: "wingB", 3: "tail", 4: "x"},
          "keypoint_name2id": {}, "upper_body_ids": [0], "lower_body_ids": [],
          "flip_indices": [0, 2, 1, 3, 4], "flip_pairs": [[1, 2]],
          "dataset_keypoint_weights": np.ones(5, np.float32),
          "skeleton_links": [(0, 1), (0, 2), (4, 9)],
          "sigmas": np.array([0.1, 0.2, 0.2, 0.3, 0.025], np.float32)}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("plain", [False, True], ids=["numpy", "lists"])
def test_a_file_of_mmpose_says_its_own_skeleton(zipped, plain, tmp_path, capsys):
    meta = MMPOSE | {"sigmas": MMPOSE["sigmas"].tolist(), "dataset_keypoint_weights": []} if plain \
        else MMPOSE
    state = rename(PoseModel(SMALL, 5).state_dict(), 2)
    torch.save({"meta": {"dataset_meta": meta, "cfg": "..."}, "state_dict": state},
               tmp_path / "fly.pth", _use_new_zipfile_serialization=zipped)
    skeleton = load_model(tmp_path / "fly.pth").skeleton
    assert skeleton.names == ("Nose", "wingA", "wingB", "tail", "x")
    assert skeleton.mirrored.tolist() == [0, 2, 1, 3, 4]
    assert skeleton.edges == ((0, 1), (0, 2))  # the third leads nowhere
    assert skeleton.sigmas.tolist() == [0.1, 0.2, 0.2, 0.3, 0.025]
    assert not capsys.readouterr().err
    save_checkpoint(tmp_path / "ours.pth", load_model(tmp_path / "fly.pth"))
    assert load_model(tmp_path / "ours.pth").skeleton.mirrored.tolist() == [0, 2, 1, 3, 4]


@pytest.mark.parametrize("change", [
    {"keypoint_id2name": {0: 1, 1: 2, 2: 3, 3: 4, 4: 5}}, {"keypoint_id2name": {7: "a"}},
    {"sigmas": Path("a")}, {"sigmas": np.array([0.1, 0.2])}, {"sigmas": [0, 1, 1, 1, 1]},
    {"flip_indices": ["a"] * 5}, {"skeleton_links": [3]}, {"sigmas": collections.deque([1])}])
def test_a_description_of_a_skeleton_that_is_damaged_is_refused(change, tmp_path):
    state = rename(PoseModel(SMALL, 5).state_dict(), 2)
    torch.save({"meta": {"dataset_meta": MMPOSE | change}, "state_dict": state},
               tmp_path / "fly.pth")
    with pytest.raises(WeightsError, match="fly.pth: expected"):
        load_model(tmp_path / "fly.pth")


@pytest.fixture
def unnamed(tmp_path):
    """Makes a file of ViTPose's authors, which does not say what its keypoints are."""
    def make(count):
        path = tmp_path / f"{count}.pth"
        torch.save({"state_dict": rename(PoseModel(SMALL, count).state_dict(), 1)}, path)
        return path
    return make


@pytest.mark.parametrize("count, guess, said", [
    (17, "COCO17", "taken for COCO17's (nose, left_eye, right_eye, ...); --skeleton chooses from "
                   "COCO17, AP10K, APT36K"),
    (14, "AIC", "taken for AIC's (right_shoulder, right_elbow, right_wrist, ...); --skeleton "
                "chooses from AIC, ANIMAL14, CROWDPOSE"),
    (133, "WHOLEBODY", "chooses from WHOLEBODY"),
    (21, None, "they are numbered, and nobody knows left from right")])
def test_a_guess_is_said_in_a_line_with_how_to_choose(count, guess, said, unnamed, capsys):
    skeleton = load_model(unnamed(count)).skeleton
    assert skeleton.names == (SKELETONS[guess].names if guess else skeleton.names)
    assert bool(skeleton.flip_pairs) == bool(guess)
    err = capsys.readouterr().err
    assert f"{count}.pth: does not say what its {count} keypoints are: " in err and said in err
    assert err.count("\n") == 1


def test_the_skeleton_is_chosen_by_name(unnamed, tmp_path, capsys):
    model = load_model(unnamed(17), skeleton="ap10k")
    assert model.skeleton is SKELETONS["AP10K"] and not capsys.readouterr().err
    with pytest.raises(WeightsError, match="17.pth: expected a skeleton of 17 keypoints, found aic "
                                           "with 14"):
        load_model(unnamed(17), skeleton="aic")
    with pytest.raises(DataError, match="skeleton: expected one of COCO17, .*, found horse"):
        load_model(unnamed(17), skeleton="horse")
    save_checkpoint(tmp_path / "ours.pth", model)
    with pytest.raises(WeightsError, match="ours.pth: has its own skeleton; expected no other, "
                                           "found coco17"):
        load_model(tmp_path / "ours.pth", skeleton="coco17")


def test_a_data_set_that_contradicts_the_models_skeleton_is_named(capsys):
    data = PoseDataset("mine.json", SKELETONS["AP10K"], *[None] * 9)
    say_other_skeleton(SKELETONS["AP10K"], data)
    say_other_skeleton(SKELETONS["AIC"], data)  # another number of keypoints: no guess was wrong
    assert not capsys.readouterr().err
    say_other_skeleton(COCO17, data)
    assert capsys.readouterr().err == (
        "mine.json: left_eye, right_eye, nose, ... are other keypoints than the model's nose, "
        "left_eye, right_eye, ...; --skeleton says what the model's are\n")


def test_both_commands_take_a_skeleton(unnamed, tmp_path, capsys):
    Image.new("RGB", (60, 80)).save(tmp_path / "a.png")
    words = ["--checkpoint", unnamed(17), "--images", tmp_path / "a.png", "--out", tmp_path / "out",
             "--skeleton", "ap10k", "--device", "cpu"]
    assert main([*map(str, words)]) == 0
    category, = json.loads((tmp_path / "out" / "annotations.json").read_text())["categories"]
    assert category["keypoints"] == list(SKELETONS["AP10K"].names)
    options = parse_options(["--weights", str(unnamed(17)), "--skeleton", "ap10k",
                             "--device", "cpu"])
    capsys.readouterr()
    assert starting_model(options, SKELETONS["AP10K"]).skeleton is SKELETONS["AP10K"]
    assert not capsys.readouterr().out  # no new predictor
    assert main(["--checkpoint", str(unnamed(17)), "--skeleton", "horse"]) == 2
    assert "--skeleton" in capsys.readouterr().err


# --------------------------------------------------------------------------- files of other kinds

@pytest.mark.parametrize("name, kind", [
    ("features.0.0.weight", "a classifier of torchvision, which has to be named"),
    ("roi_heads.box_head.fc6.weight", "a detector of torchvision"),
    ("token_embedding.weight", "a text tower of CLIP, which --text-weights reads"),
    ("text_model.embeddings.token_embedding.weight", "a text tower of CLIP"),
    ("backbone.stage4.0.branches.0.0.conv1.weight", "an HRNet"),
    ("head.cls_x.weight", "an RTMPose"),
    ("head_adv.0.weight", "a network of RegDA, whose head has several layers"),
    ("vit.embeddings.patch_embeddings.projection.weight", "another ViT of transformers"),
    ("model.model.2.cv1.conv.weight", "a YOLO of ultralytics"),
    ("something.else", "no entry 'backbone.pos_embed'")])
def test_a_refusal_says_what_the_file_is(name, kind, tmp_path):
    state = {"backbone.stage4.0.weight": torch.zeros(2), name: torch.zeros(2),
             "upsampling.6.weight": torch.zeros(2)}
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=f"x.pth: expected a .*, found {kind}"):
        load_model(tmp_path / "x.pth")


@pytest.mark.parametrize("contents", [nn.Linear(2, 3), {"model": nn.Linear(2, 3), "epoch": 1}],
                         ids=["alone", "in a checkpoint"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_whole_pickled_model_is_named_by_its_class(contents, zipped, tmp_path):
    torch.save(contents, tmp_path / "whole.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="whole.pt: .*found .*torch.nn.modules.linear.Linear"):
        load_weights(tmp_path / "whole.pt")


def test_a_file_with_several_state_dicts_names_them(tmp_path):
    state = {"w": torch.zeros(2)}
    torch.save({"first": state, "second": state, "epoch": 3}, tmp_path / "two.pth")
    with pytest.raises(WeightsError, match="expected one state dict, found 'first' beside others"):
        load_weights(tmp_path / "two.pth")


def test_no_name_means_one_layer_to_one_publisher_and_another_layer_to_another():
    rows = [line.split() for table in vlpose.LAYOUTS.values()
            for line in table.strip().splitlines()]
    assert all(len(row) == 2 for row in rows)
    assert len({theirs for theirs, ours in rows}) == len(rows)


# -------------------------------------------------------------------------------- CLIP's text tower

TEXTS = ["a photo of a cartoon character", "an oil painting of a person", "a"]


@pytest.fixture(scope="module")
def openai_state():
    """A CLIP in OpenAI's layout, which open_clip has, too, and its features of TEXTS."""
    open_clip = pytest.importorskip("open_clip")
    peer = randomise(open_clip.model.CLIP(
        embed_dim=96, quick_gelu=True,
        vision_cfg={"layers": 1, "width": 64, "image_size": 32, "patch_size": 16},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2,
                  "layers": 3}))
    with torch.no_grad():
        return peer.state_dict(), peer.encode_text(open_clip.get_tokenizer("ViT-B-32")(TEXTS))


def test_text_features_are_those_of_open_clip_from_openais_layout(openai_state, tmp_path):
    state, expected = openai_state
    torch.save(state, tmp_path / "clip.pt")
    features = encode_sentences(load_clip_text(tmp_path / "clip.pt"), TEXTS)
    assert list(features) == TEXTS and features["a"].shape == (1, 96)
    assert relative_error(torch.cat(list(features.values())), expected) <= 1e-5


def test_a_tower_that_was_trained_with_gelu_is_run_with_gelu(openai_state, tmp_path, capsys):
    """LAION's towers have the names and shapes of OpenAI's."""
    open_clip = pytest.importorskip("open_clip")
    state = openai_state[0]
    peer = open_clip.model.CLIP(
        embed_dim=96, quick_gelu=False,
        vision_cfg={"layers": 1, "width": 64, "image_size": 32, "patch_size": 16},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2,
                  "layers": 3})
    peer.load_state_dict(state)
    with torch.no_grad():
        laions = peer.encode_text(open_clip.get_tokenizer("ViT-B-32")(TEXTS))
    torch.save(state, tmp_path / "clip.bin")

    def error(source, expected):
        features = encode_sentences(load_clip_text(source), TEXTS)
        return relative_error(torch.cat(list(features.values())), expected)
    assert error(f"{tmp_path}/clip.bin#gelu", laions) <= 1e-5
    assert error(f"{tmp_path}/clip.bin#quick_gelu", openai_state[1]) <= 1e-5
    assert not capsys.readouterr().err
    assert error(tmp_path / "clip.bin", openai_state[1]) <= 1e-5
    assert "taken for OpenAI's; '#gelu' after its name takes it for LAION's" in (
        capsys.readouterr().err)
    assert error(tmp_path / "clip.bin", laions) > 1e-3  # so it matters
    (tmp_path / "config.json").write_text(
        '{"text_config": {"hidden_act": "gelu"}, "vision_config": {"hidden_act": "quick_gelu"}}')
    assert error(tmp_path / "clip.bin", laions) <= 1e-5
    with pytest.raises(WeightsError, match="one of quick_gelu, gelu as the activation, found relu"):
        load_clip_text(f"{tmp_path}/clip.bin#relu")


def test_text_features_are_those_of_transformers_from_its_own_file(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPConfig(
        text_config={"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 3,
                     "intermediate_size": 512,
                     "eos_token_id": 49407}, projection_dim=96,
        vision_config={"hidden_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1,
                       "intermediate_size": 64})
    peer = randomise(transformers.CLIPModel(config))
    peer.save_pretrained(tmp_path)
    model = load_clip_text(tmp_path / "model.safetensors")
    tokens = vlpose.CLIPTokenizer()(TEXTS)
    with torch.no_grad():
        hidden = peer.text_model(tokens).last_hidden_state  # (N, 77, width)
        expected = peer.text_projection(hidden[torch.arange(3), tokens.argmax(1)])
        assert relative_error(model(tokens), expected) <= 1e-5
        features, mask = model(tokens, per_token=True)
        assert relative_error(features[mask], peer.text_projection(hidden[mask])) <= 1e-5


class Node(nn.Module):
    def forward(self, x):
        return x


def script(state):
    """A TorchScript module with these tensors: half precision, as OpenAI's archives are."""
    root = Node()
    for name, tensor in state.items():
        *path, last = name.split(".")
        node = root
        for part in path:
            if not hasattr(node, part):
                node.add_module(part, Node())
            node = getattr(node, part)
        node.register_parameter(last, nn.Parameter(tensor.half()))
    root.register_buffer("context_length", torch.tensor(77))
    return torch.jit.script(root)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_torchscript_archive_gives_the_same_tensors_and_its_code_is_not_run(
        openai_state, tmp_path, monkeypatch):
    state, expected = openai_state
    torch.jit.save(script(state), tmp_path / "clip.pt")
    monkeypatch.setattr(torch.jit, "load", lambda *args, **kwargs: pytest.fail("ran the archive"))
    loaded = load_weights(tmp_path / "clip.pt")
    assert loaded.keys() == state.keys() | {"context_length"}
    assert all(torch.equal(loaded[name], tensor.half()) for name, tensor in state.items())
    features = encode_sentences(load_clip_text(tmp_path / "clip.pt"), TEXTS)
    assert relative_error(torch.cat(list(features.values())), expected) <= 1e-2  # half precision


def test_the_random_text_tower_is_always_the_same_and_leaves_the_seed_alone():
    torch.manual_seed(5)
    first = load_clip_text("random").state_dict()
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))
    assert all(torch.equal(tensor, first[name])
               for name, tensor in load_clip_text("random").state_dict().items())


def test_a_file_that_is_not_clip_is_refused(vitpose, tmp_path):
    save_checkpoint(tmp_path / "pose.pth", vitpose)
    with pytest.raises(WeightsError,
                       match="expected CLIP's text tower, found no entry 'token_embed.weight'"):
        load_clip_text(tmp_path / "pose.pth")
    with pytest.raises(WeightsError,
                       match="ViT-B/64: no such file, nor the name of public weights"):
        load_clip_text("ViT-B/64")


# ------------------------------------------------------------------------------ our own checkpoints

@pytest.mark.parametrize("decoder", DECODERS)
def test_a_vlpose_comes_back_whole(decoder, tmp_path):
    crops, base = torch.randn(2, 3, 128, 96), randomise(PoseModel(VIT_CONFIGS["tiny"]))
    model = randomise(VLPose(base, 8, decoder, num_prompts=2, matcher="image", rank=2), seed=2)
    how_it_reads = {"text_weights": "random", "sentences": "a {domain}", "per_token": True}
    save_checkpoint(tmp_path / "model.pth", model, **how_it_reads)
    torch.load(tmp_path / "model.pth", weights_only=True)  # plain containers and tensors alone
    again = load_model(tmp_path / "model.pth")
    assert again.about == how_it_reads and again.options == model.options
    text = torch.randn(2, 1, 8)
    with torch.no_grad():
        assert torch.equal(again(crops, text), model(crops, text))
        assert torch.equal(again.base(crops), model.base(crops))
        assert torch.equal(load_pose_model(tmp_path / "model.pth")(crops), model.base(crops))


def test_a_simple_decoder_serves_prompts_alone(crops, tmp_path):
    base = randomise(PoseModel(ViTConfig(384, 2, 12, 0.0, 3, 0.8, decoder_dim=0)))
    model = randomise(VLPose(base, 8, "baseline"), seed=3)
    save_checkpoint(tmp_path / "model.pth", model)
    again = load_model(tmp_path / "model.pth")
    with torch.no_grad():
        assert torch.equal(again(crops, torch.zeros(1, 1, 8)), model(crops, torch.zeros(1, 1, 8)))
    with pytest.raises(ValueError, match="'dual' needs the classic decoder"):
        VLPose(base, 8)


@pytest.mark.parametrize("change, message", [
    (lambda contents: contents.pop("config"), "found no entry 'config'"),
    (lambda contents: contents["config"].update(width=3), "width"),
    (lambda contents: contents["config"].update(depth=3), "2 transformer blocks, expected 3"),
    (lambda contents: contents["options"].update(decoder="none"), "decoder: expected one of"),
    (lambda contents: contents["adapter"].pop("prompts"), "tensor prompts is nothing"),
    (lambda contents: contents.update(base=7), "not a tensor"),
])
def test_a_damaged_checkpoint_of_ours_is_one_error(change, message, tmp_path):
    save_checkpoint(tmp_path / "model.pth", VLPose(PoseModel(SMALL), 8))
    contents = torch.load(tmp_path / "model.pth")
    change(contents)
    torch.save(contents, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=message):
        load_model(tmp_path / "model.pth")


@pytest.mark.parametrize("change, message", [
    (dict(about=["a"]), "expected a dictionary as 'about', found ..a"),
    (dict(about=None), "expected a dictionary as 'about', found None"),
    (dict(about={"sentences": 7}), "expected a str as 'sentences' of 'about', found 7"),
    (dict(about={"per_token": "yes"}), "expected a bool as 'per_token' of 'about', found 'yes'"),
    (dict(config={"sigma": -1.0}), "expected sigma from 0.1 to 100.0, found -1.0"),
    (dict(config={"sigma": 1e9}), "expected sigma from 0.1 to 100.0, found 1000000000.0"),
    (dict(config={"sigma": float("nan")}), "expected sigma from 0.1 to 100.0, found nan"),
    (dict(config={"sigma": "2"}), "expected sigma from 0.1 to 100.0, found '2'"),
    (dict(config={"heads": 5}), "multiple of 8 and of the number of heads, found 384 and 5 heads"),
    (dict(config={"heads": 0}), "the number of heads, found 384 and 0 heads"),
    (dict(config={"heads": 4.0}), "expected heads from 0 to 1000, found 4.0"),
    (dict(config={"prompts": 10 ** 9}), "expected prompts from 0 to 10000, found 1000000000"),
    (dict(config={"trunk": "resnet7"}), "expected one of resnet18, .* found 'resnet7'"),
    (dict(config={"image_size": (100, 96)}), "multiples of 16 up to 4096, found .100, 96"),
    (dict(config={"image_size": (10 ** 5, 96)}), "multiples of 16 up to 4096, found .100000, 96"),
    (dict(config={"image_size": (240, 96), "trunk": "resnet18"}), "multiples of 32 up to 4096"),
    (dict(skeleton={"edges": ["ab"]}), "a skeleton of 17 keypoints, found as its keypoints .*'a'"),
    (dict(skeleton={"edges": [(0, 17)]}), "a skeleton of 17 keypoints, found as its keypoints"),
    (dict(skeleton={"edges": [(0, 1, 2)]}), "found as its edges .*0, 1, 2"),
    (dict(skeleton={"upper": [-1]}), "found as its keypoints .-1, "),
    (dict(skeleton={"flip_pairs": [[0, 99]]}), "found as its keypoints "),
    (dict(skeleton={"flip_pairs": [[-1, 2]]}), "found as its keypoints "),
    (dict(skeleton={"flip_pairs": [["a", 2]]}), "found as its keypoints "),
    (dict(skeleton={"flip_pairs": [[1]]}), "found as its flip_pairs ..1"),
    (dict(skeleton={"flip_pairs": [[1, 2], [2, 3]]}), "found as its flip_pairs ..1, 2., .2, 3"),
    (dict(skeleton={"sigmas": [0.0] * 17}), "found as its sigmas .0.0, 0.0"),
    (dict(skeleton={"names": ["nose"]}), "found as its names ..nose"),
])
def test_values_that_no_model_can_have_are_refused_where_they_are_read(change, message, tmp_path):
    save_checkpoint(tmp_path / "model.pth", PoseModel(SMALL))
    contents = torch.load(tmp_path / "model.pth")
    for name, value in change.items():
        contents[name] = value if name == "about" else contents[name] | value
    torch.save(contents, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=f"model.pth: .*{message}"):
        load_model(tmp_path / "model.pth")


def test_every_model_that_can_be_made_passes_the_checks_of_a_file(tmp_path):
    for config in vlpose.MODEL_CONFIGS.values():
        contents = {"config": dataclasses.asdict(config)}
        assert vlpose.config_of(contents, "model.pth") == config


@pytest.mark.parametrize("read", [load_model, load_weights])
def test_a_file_of_a_newer_version_and_a_checkpoint_of_a_run_are_not_read_as_something_else(
        read, tmp_path, vitpose):
    contents = {"format": "posebridge-2", "base": vitpose.state_dict(), "about": {}}
    torch.save(contents, tmp_path / "newer.pth")
    with pytest.raises(WeightsError, match="newer.pth: expected the format posebridge-1, found "
                                           "posebridge-2, which another version"):
        read(tmp_path / "newer.pth")
    contents = {"step": 3, "history": [], "optimizer": {}, "model": vitpose.state_dict()}
    torch.save(contents, tmp_path / "somebodys.pth")  # no checkpoint of ours has these four alone
    read(tmp_path / "somebodys.pth")
    torch.save(contents | {"stage": {}, "code": {}}, tmp_path / "base.checkpoint.pth")
    with pytest.raises(WeightsError, match="checkpoint.pth: expected a model, found a checkpoint"):
        read(tmp_path / "base.checkpoint.pth")


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.",
                                    "model._orig_mod.", "net.", "ema.", "ema_model.module."])
def test_the_prefixes_of_wrappers_are_read_over(key, prefix, tmp_path):
    expected = {"backbone.pos_embed": torch.ones(2), "head.final_layer.bias": torch.zeros(3)}
    state = {prefix + name: tensor for name, tensor in expected.items()}
    torch.save({key: state, "epoch": 3}, tmp_path / "wrapped.pth")
    same_tensors(load_weights(tmp_path / "wrapped.pth"), expected)


def test_a_compiled_model_of_several_gpus_is_a_pose_model(vitpose, tmp_path):
    wrapped = nn.DataParallel(torch.compile(vitpose, backend="eager"))
    assert all(name.startswith("module._orig_mod.") for name in wrapped.state_dict())
    torch.save(wrapped.state_dict(), tmp_path / "wrapped.pth")
    same_tensors(load_model(tmp_path / "wrapped.pth").state_dict(), vitpose.state_dict())


def test_of_a_model_and_its_average_in_one_state_dict_none_is_chosen(vitpose, tmp_path):
    state = {}
    for prefix in ("model.", "ema."):
        state |= {prefix + name: tensor for name, tensor in vitpose.state_dict().items()}
    torch.save(state, tmp_path / "two.pth")
    with pytest.raises(WeightsError, match="found no entry 'backbone.pos_embed' but others such as "
                                           "'model.backbone"):
        load_model(tmp_path / "two.pth")


def test_a_checkpoint_keeps_the_skeleton(tmp_path):
    skeleton = make_skeleton(("Nose", "L_Paw", "R_Paw"), [(0, 1), (0, 2)])
    save_checkpoint(tmp_path / "model.pth", VLPose(PoseModel(SMALL, 3, skeleton), 8))
    found = load_model(tmp_path / "model.pth").base.skeleton
    assert found.names == skeleton.names and found.edges == skeleton.edges
    assert found.groups == skeleton.groups
    assert (found.sigmas == skeleton.sigmas).all() and found.mirrored.tolist() == [0, 2, 1]


@pytest.mark.parametrize("decoder, rank",
                         [*((decoder, 0) for decoder in DECODERS), ("baseline", 4)])
def test_an_adapter_is_a_small_file_that_goes_around_its_base(tmp_path, decoder, rank):
    narrow = replace(SMALL, dim=48, image_size=(64, 64), decoder_dim=16)
    model = randomise(VLPose(PoseModel(narrow), 8, decoder, rank=rank), seed=1)
    save_checkpoint(tmp_path / "base.pth", model.base)
    save_checkpoint(tmp_path / "adapter.pth", model, adapter_only=True, sentences="a {domain}")
    assert not any("base" in name for name in load_weights(tmp_path / "adapter.pth"))
    again = load_model(tmp_path / "adapter.pth", base=tmp_path / "base.pth")
    images, text = torch.randn(2, 3, 64, 64), torch.randn(2, 1, 8)
    with torch.no_grad():
        assert torch.equal(again(images, text), model(images, text))
        assert torch.equal(again(images), model(images))
    assert again.about == {"sentences": "a {domain}"}
    with pytest.raises(WeightsError,
                       match="adapter.pth: an adapter; expected the model that it goes around"):
        load_model(tmp_path / "adapter.pth")
    for other in (PoseModel(VIT_CONFIGS["tiny"]), PoseModel(narrow)):  # the second has its shapes
        save_checkpoint(tmp_path / "other.pth", other)
        with pytest.raises(WeightsError, match="adapter.pth: expected the base that it was trained "
                                               "around, .* found .*other.pth with"):
            load_model(tmp_path / "adapter.pth", base=tmp_path / "other.pth")
    save_checkpoint(tmp_path / "whole.pth", model)
    with pytest.raises(WeightsError, match="whole.pth: expected an adapter alone to go around"):
        load_model(tmp_path / "whole.pth", base=tmp_path / "base.pth")


def test_an_adapter_brings_its_skeleton_image_size_and_sigma_to_the_base_that_the_user_has(
        tmp_path, vitpose):
    torch.save(vitpose.state_dict(), tmp_path / "public.pth")
    images, text = torch.randn(2, 3, 64, 96), torch.randn(2, 1, 8)
    base = load_pose_model(tmp_path / "public.pth", (64, 96))  # as `train.py --weights` has it
    base = with_keypoints(base, make_skeleton(("nose", "L_Paw", "R_Paw"), [(0, 1)]))
    base.config = replace(base.config, sigma=3.0)
    model = VLPose(base, 8).eval()
    nn.init.normal_(model.predictor.weight)
    save_checkpoint(tmp_path / "adapter.pth", model, adapter_only=True)
    again = load_model(tmp_path / "adapter.pth", base=tmp_path / "public.pth")
    assert again.skeleton.names == again.base.skeleton.names == ("nose", "L_Paw", "R_Paw")
    assert again.config == again.base.config == base.config
    with torch.no_grad():
        assert torch.equal(again(images, text), model(images, text))
        assert torch.equal(again.base(images), model.base(images))


def test_an_adapter_does_not_go_around_its_base_with_another_number_of_heads(tmp_path, vitpose):
    torch.save(vitpose.state_dict(), tmp_path / "public.pth")
    save_checkpoint(tmp_path / "adapter.pth", VLPose(vitpose, 8), adapter_only=True)
    load_model(tmp_path / "adapter.pth", base=tmp_path / "public.pth")
    with pytest.raises(WeightsError, match="expected the base that it was trained around"):
        load_model(tmp_path / "adapter.pth", base=f"{tmp_path}/public.pth#heads=6")


def test_an_adapter_of_an_older_version_is_read_but_nobody_knows_whether_its_base_is_right(
        tmp_path, capsys):
    model = VLPose(PoseModel(SMALL), 8)
    save_checkpoint(tmp_path / "adapter.pth", model, adapter_only=True)
    contents = torch.load(tmp_path / "adapter.pth", weights_only=True)
    for name in ("config", "skeleton", "predictor", "fingerprint"):
        contents.pop(name)
    torch.save(contents, tmp_path / "adapter.pth")
    save_checkpoint(tmp_path / "base.pth", model.base)
    again = load_model(tmp_path / "adapter.pth", base=tmp_path / "base.pth")
    same_tensors(again.state_dict(), model.state_dict())
    assert "adapter.pth: an adapter of an older version" in capsys.readouterr().err


def saved_with(path, model, **options):
    """A file of the model whose options say something else, too."""
    save_checkpoint(path, model)
    contents = torch.load(path, weights_only=True)
    contents["options"] |= options
    torch.save(contents, path)
    return path


def test_an_adapter_that_claims_more_data_than_the_file_has_is_refused(tmp_path):
    model = VLPose(PoseModel(SMALL), 8)
    path = saved_with(tmp_path / "model.pth", model, num_prompts=10 ** 6)
    contents = torch.load(path, weights_only=True)
    contents["adapter"]["prompts"] = torch.zeros(1, 1, 1).expand(SMALL.depth, 10 ** 6, SMALL.dim)
    torch.save(contents, path)
    with pytest.raises(WeightsError, match="tensor prompts of shape .* is larger than its data"):
        load_model(path)


@pytest.mark.parametrize("options, words", [
    ({"num_prompts": 5}, "tensor prompts is float"),
    ({"decoder": "injector"}, "tensor auxiliary1.0.weight is float"),
    ({"text_dim": 9}, "tensor matcher.text.weight is float"),
    ({"rank": 2}, "is nothing, expected float")])
def test_an_adapter_that_is_not_what_its_options_say_is_refused(tmp_path, options, words):
    path = saved_with(tmp_path / "model.pth", VLPose(PoseModel(SMALL), 8), **options)
    with pytest.raises(WeightsError, match=f"another architecture: .*{words}"):
        load_model(path)


@pytest.mark.parametrize("name", ["model.pth", "teacher.pth"])
def test_the_folder_of_a_run_stands_for_its_model(tmp_path, name):
    with pytest.raises(WeightsError, match="teacher.pth, found no models"):
        load_model(tmp_path)
    (tmp_path / "base.checkpoint.pth").touch()
    with pytest.raises(WeightsError, match="a finished run, .* found base.checkpoint.pth"):
        load_model(tmp_path)
    save_checkpoint(tmp_path / name, PoseModel(SMALL))
    assert load_model(tmp_path).config == SMALL


def test_another_skeleton_gets_a_new_predictor_that_keeps_what_both_have(capsys):
    model = PoseModel(SMALL)
    weight, bias = model.head.predictor.weight.clone(), model.head.predictor.bias.clone()
    assert with_keypoints(model, COCO17) is model and not capsys.readouterr().out
    with_keypoints(model, make_skeleton(("tail", "RightEye", "Nose"), []))
    printed = capsys.readouterr().out
    assert printed == "a new predictor for 3 keypoints, 2 of which the model has had\n"
    assert model(torch.randn(1, 3, *SMALL.image_size)).shape[1] == model.num_keypoints == 3
    new = model.head.predictor
    assert torch.equal(new.weight[1:], weight[[2, 0]]) and torch.equal(new.bias[1:], bias[[2, 0]])
    with_keypoints(model, COCO17)
    assert torch.equal(model.head.predictor.weight[[2, 0]], weight[[2, 0]])


def test_a_checkpoint_replaces_the_old_one_in_one_step(tmp_path, monkeypatch):
    model = PoseModel(VIT_CONFIGS["tiny"])
    save_checkpoint(tmp_path / "model.pth", model)
    before = (tmp_path / "model.pth").read_bytes()

    def disk_full(contents, path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "no space left")
    monkeypatch.setattr(torch, "save", disk_full)
    message = r"model.pth: cannot be written: no space left; [\d,]+ MB are free there$"
    with pytest.raises(DataError, match=message):
        save_checkpoint(tmp_path / "model.pth", model)
    assert (tmp_path / "model.pth").read_bytes() == before


# -------------------------------------------------------------------------------------- safetensors

def test_safetensors_are_read_as_the_library_reads_them(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    tensors = {str(dtype): torch.randint(0, 2, (3, 5)).to(dtype)
               for dtype in vlpose.DTYPES.values()}
    tensors |= {"scalar": torch.tensor(2.5), "nothing": torch.zeros(0, 4), "last": torch.arange(7)}
    library.save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    loaded = load_weights(tmp_path / "x.safetensors")
    same_tensors(loaded, tensors)


def safetensors(header, data):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(first, last, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


GOOD = {"a": entry(0, 8, [2]), "b": entry(8, 20, [3, 1])}


@pytest.mark.parametrize("content", [
    safetensors(GOOD | {"b": entry(4, 16, [3])}, bytes(16)),
    safetensors(GOOD | {"b": entry(0, 8, [2])}, bytes(8)),
    safetensors(GOOD | {"b": entry(12, 24, [3])}, bytes(24)),
    safetensors(GOOD, bytes(19)),
    safetensors(GOOD, bytes(21)),
    safetensors(GOOD | {"b": entry(8, 20, [4])}, bytes(20)),
    safetensors(GOOD | {"b": entry(8, 20, [-1, -3])}, bytes(20)),
    safetensors(GOOD | {"b": entry(8, 20, [2 ** 62, 4])}, bytes(20)),
    safetensors(GOOD | {"b": entry(20, 8, [3])}, bytes(20)),
    safetensors({"a": entry(-8, 0, [2])}, bytes(8)),
    safetensors(GOOD | {"b": entry(8, 20, [3], "F31")}, bytes(20)),
    safetensors(GOOD | {"b": entry(8, 20, 3)}, bytes(20)),
    safetensors(GOOD | {"b": entry(8.0, 20.0, [3])}, bytes(20)),
    safetensors(GOOD | {"b": [8, 20]}, bytes(20)),
    safetensors(b'{"a":' * 100_000, b""),
    safetensors(b'{"\xff": 1}', b""),
    safetensors(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
                b' "a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', bytes(8)),
    struct.pack("<Q", 2 ** 63) + b"{}",
    struct.pack("<Q", 99) + b"{}",
    struct.pack("<Q", 0) + b"{",
], ids=["overlap", "same place", "hole", "too short", "too long", "wrong shape", "negative shape",
        "overflow", "backwards", "negative", "type", "shape", "fractions", "list", "deep",
        "not text", "twice", "header", "short header", "no header"])
def test_safetensors_that_lie_are_refused(content, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match="x.safetensors"):
        load_weights(tmp_path / "x.safetensors")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy", "foreign zip", "foreign legacy"])
def test_a_damaged_file_is_an_error_or_still_a_state_dict(kind, tmp_path):
    """Cut anywhere, or with bytes changed at random: never another exception, never a crash."""
    path, rng = tmp_path / "x", random.Random(0)
    state = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.arange(4).half()}
    contents = state
    if "foreign" in kind:
        contents = {"state_dict": state, "args": argparse.Namespace(lr=0.1)}
    if kind == "safetensors":
        path.write_bytes(safetensors({"a": entry(0, 24, [2, 3]), "b": entry(24, 32, [4], "F16")},
                                     bytes(32)))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization="zip" in kind)
    assert load_weights(path).keys() == state.keys()
    whole = path.read_bytes()
    damaged = [whole[:rng.randrange(len(whole))] for _ in range(60)]
    for _ in range(240):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 1, 4])):
            content[rng.randrange(len(content))] = rng.choice([0, 1, 255, rng.randrange(256)])
        damaged.append(bytes(content))
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            assert all(isinstance(tensor, torch.Tensor) for tensor in load_weights(path).values())
        except WeightsError:
            refused += 1
    assert refused >= 60


# ------------------------------------------------------------------------ pickles and their objects

class Configuration(dict):
    """Stands for mmengine's and others' dictionaries with attributes."""


class HistoryBuffer:
    def __init__(self):
        self.log = np.arange(3.0)
        self.methods = {"mean": np.mean}


FOREIGN = {"args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(a=[1])),
           "hub": HistoryBuffer(),
           "cfg": Configuration(a=1, b=Configuration()), "scalar": np.float64(3),
           "queue": collections.deque([1, 2], 5),
           "counts": collections.defaultdict(list, a=[1]), "set": {1, (2, 3)}, "complex": 1j,
           "bytes": b"\0\xff",
           "path": Path("a") / "b", "optimizer": {"state": {0: {"momentum": torch.zeros(9)}}}}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_beside_foreign_objects_are_read_and_the_objects_stay_inert(
        protocol, zipped, tmp_path, monkeypatch):
    shared = torch.randn(5, 4)
    state = {"whole": shared, "row": shared[2], "transposed": shared.T, "scalar": torch.tensor(7),
             "half": torch.randn(3).half(), "bfloat16": torch.randn(3).bfloat16(),
             "bool": torch.tensor([True, False]),
             "parameter": nn.Parameter(torch.randn(2, 2))}
    contents = {"state_dict": collections.OrderedDict(state), **FOREIGN}
    torch.save(contents, tmp_path / "x.pth", pickle_protocol=protocol,
               _use_new_zipfile_serialization=zipped)
    for made in (HistoryBuffer, Configuration, argparse.Namespace):
        monkeypatch.setattr(made, "__new__", lambda *args: pytest.fail("made a foreign object"))
    same_tensors(load_weights(tmp_path / "x.pth"), state)


def frame(pickled, path, zipped):
    """A PyTorch file whose pickle is the given one, with one storage of 16 bytes."""
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/data/0", bytes(16))
            archive.writestr("archive/version", "3\n")
    else:
        start = b"".join(pickle.dumps(value, 2)
                         for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
        keys = pickle.dumps(["0"], 2)
        path.write_bytes(start + pickled + keys + struct.pack("<q", 4) + bytes(16))


class Reduce:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def attacks(marker):
    """(name, pickle): programs that would create the file `marker` if anything were carried out."""
    touch, system = text(f"touch {marker}"), b"cposix\nsystem\n"
    write = f"open({str(marker)!r}, 'w')"
    for call in [(os.system, f"touch {marker}"), (eval, write), (exec, write),
                 (os.mkdir, str(marker)),
                 (open, str(marker), "w"), (__import__, "this")]:
        yield call[0].__name__, pickle.dumps({"state_dict": {"a": Reduce(*call)}}, 2)
        yield f"{call[0].__name__} in a frame", pickle.dumps(Reduce(*call), 4)
    yield "INST", b"(" + touch + b"iposix\nsystem\n."
    yield "OBJ", b"(" + system + touch + b"o."
    yield "STACK_GLOBAL", (b"\x80\x04" + text("builtins") + text("eval") + b"\x93" + text(write)
                           + b"\x85R.")
    yield "dotted name", (b"\x80\x04" + text("os") + text("system.__call__") + b"\x93" + touch
                          + b"\x85R.")
    yield "getattr", (b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n" + text("os") + b"\x85R"
                      + text("system") + b"tR" + touch + b"\x85R.")
    yield "map", b"ccollections\ndeque\n(cbuiltins\nmap\n(" + system + b"](" + touch + b"etRtR."
    yield "BUILD a class", (b"cargparse\nNamespace\nN}" + text("__setstate__") + system + b"s\x86b0"
                            b"cargparse\nNamespace\n)R" + touch + b"b.")
    yield "BUILD an object", (b"cargparse\nNamespace\n)R}" + text("__setstate__") + system + b"sb"
                              + touch + b"b.")
    yield "NEWOBJ", b"\x80\x02" + system + touch + b"\x85\x81."
    yield "NEWOBJ_EX", b"\x80\x04" + system + touch + b"\x85}\x92."
    yield "BUILD torch's function", (b"ctorch._utils\n_rebuild_tensor_v2\nN}" + text("__code__")
                                     + system + b"s\x86b" + touch + b"\x85R.")
    yield "BUILD a call", system + touch + b"\x85R" + touch + b"b."
    yield "extension", b"\x80\x02\x82\x01" + touch + b"\x85R."
    yield "persistent id", b"(" + text("module") + system + touch + b"tQ."
    yield "storage type", b"(" + text("storage") + system + text("0") + touch + b"K\x04tQ."


def remove(marker):
    if marker.is_dir():
        marker.rmdir()
    marker.unlink(missing_ok=True)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_attacks_are_real(tmp_path, capsys):
    """Python's own unpickler carries them out, but for the last, aimed at readers like ours."""
    for name, pickled in attacks(tmp_path / "marker"):
        if name == "BUILD an object":
            break
        pickle.loads(pickled)
        assert (tmp_path / "marker").exists() or sys.modules.pop("this"), name
        remove(tmp_path / "marker")
    delattr(argparse.Namespace, "__setstate__")  # which one of them has put there


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_nothing_that_a_malicious_pickle_asks_for_is_done(zipped, tmp_path):
    events, watched = [], {"os.system", "os.mkdir", "os.exec", "os.posix_spawn",
                           "pickle.find_class"}
    sys.addaudithook(lambda event, args: events.append((event, args)) if event in watched else None)
    for name, pickled in attacks(tmp_path / "marker"):
        frame(pickled, tmp_path / "x.pth", zipped)
        events.clear()
        with pytest.raises(WeightsError):
            load_weights(tmp_path / "x.pth")
        assert not (tmp_path / "marker").exists() and not events and "this" not in sys.modules, name
    assert not hasattr(argparse.Namespace, "__setstate__")
    assert callable(torch._utils._rebuild_tensor_v2)


class Layer:
    """Stands for a module, whose source torch compares with what an old file says it was."""
    dump_patches = False


@pytest.fixture
def layer():
    yield
    Layer.__name__, Layer.dump_patches = "Layer", False


@pytest.mark.parametrize("attack", ["writes a file", "warns"])
def test_the_source_of_a_module_in_an_old_file_is_neither_compared_nor_written(
        attack, layer, tmp_path):
    """Torch honours the persistent id ("module", class, file, source).

    Where the source differs, torch warns, or appends the difference to CLASS.patch. No function is
    called for that, but the file says what is written, and where.
    """
    module = f"c{Layer.__module__}\nLayer\n".encode()
    # BUILD sets attributes: the class's name is the place, dump_patches allows the patch
    if attack == "writes a file":
        attributes = text("__name__") + text(str(tmp_path / "marker")) + b"s"
        attributes += text("dump_patches") + b"\x88s"
        module += b"N}" + attributes + b"\x86b"
    # and forgets the result
    program = b"(" + text("module") + module + text("layer.py") + text("chosen text") + b"tQ0"

    path = tmp_path / "old.pth"
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(1).half()}
    torch.save({"state_dict": state, "args": argparse.Namespace()}, path,
               _use_new_zipfile_serialization=False)
    same_tensors(load_weights(path), state)  # as it is without the program
    whole = path.read_bytes()
    with io.BytesIO(whole) as file:
        for _ in range(3):  # magic number, version, system
            pickle.load(file)
        start = file.tell() + 2  # behind the mark of the protocol
    path.write_bytes(whole[:start] + program + whole[start:])

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(WeightsError,
                           match="old.pth: expected an undamaged safetensors or PyTorch file"):
            load_weights(path)
    assert not warned and [file.name for file in tmp_path.iterdir()] == ["old.pth"]
    assert Layer.__name__ == "Layer" and not Layer.dump_patches

    with pytest.warns(torch.serialization.SourceChangeWarning,
                      match="source code of class '.*' has changed"):
        # the attack is real
        same_tensors(torch.load(path, weights_only=False)["state_dict"], state)
    assert (tmp_path / "marker.patch").exists() == (attack == "writes a file")
    if attack == "writes a file":
        assert "+chosen text" in (tmp_path / "marker.patch").read_text("utf-8").splitlines()


def tensor_pickle(offset, size, stride, numel=4):
    storage = Reduce(int)  # replaced by the persistent id below

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if value is storage else None
    file = io.BytesIO()
    call = Reduce(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False,
                  collections.OrderedDict())
    Pickler(file, 2).dump({"state_dict": {"a": call}, "args": argparse.Namespace()})
    return file.getvalue()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_tensor_never_reaches_beyond_its_data(zipped, tmp_path):
    frame(tensor_pickle(1, (3,), (1,)), tmp_path / "x.pth", zipped)
    assert torch.equal(load_weights(tmp_path / "x.pth")["a"], torch.zeros(3))
    for place in [(0, (5,), (1,)), (4, (1,), (1,)), (-1, (2,), (1,)), (0, (2,), (-1,)),
                  (0, (2, 2), (3, 1)), (0, (-2,), (1,)), (0, (2 ** 40,), (0,)),
                  (0, (2 ** 62, 4), (1, 1)), (0, (3, 3), (0, 1)),
                  (2 ** 62, (1,), (1,)), (0, ("a",), (1,))]:
        frame(tensor_pickle(*place), tmp_path / "x.pth", zipped)
        with pytest.raises(WeightsError):
            load_weights(tmp_path / "x.pth")


@pytest.mark.parametrize("pickled", [
    b"]" * 200_000 + b".",
    b"\x80\x02]r\xff\xff\xff\xff.",
    b"\x80\x04\x8e" + struct.pack("<Q", 2 ** 62) + b"x.",
    b"\x80\x05\x96" + struct.pack("<Q", 2 ** 62) + b"x.",
    b"\x80\x04\x95" + struct.pack("<Q", 2 ** 62) + b"].",
    b"}(X\x01\0\0\0a" + b"]2" + b"(h\x00h\x00l" * 0 + b"u.",
    b"L" + b"9" * 100_000 + b"L\n.",
    b"(l" + b"0(" * 1000 + b".",
    b"",
    b".",
], ids=["nested", "memo", "bytes", "bytearray", "frame", "list as value", "number", "marks",
        "empty", "stop"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_asks_for_too_much_is_refused(pickled, zipped, tmp_path):
    frame(pickled, tmp_path / "x.pth", zipped)
    with pytest.raises(WeightsError):
        load_weights(tmp_path / "x.pth")


def test_an_archive_that_unpacks_to_more_than_itself_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"a": "b"}, 2) + bytes(50_000_000))
    with pytest.raises(WeightsError, match="not compressed and do not overlap"):
        load_weights(tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"a": "b"}, 2) + bytes(1000))
        for number in range(100):  # a hundred names for the same bytes
            twin = copy.copy(archive.filelist[0])
            twin.filename = f"x/data/{number}"
            archive.filelist.append(twin)
    with pytest.raises(WeightsError, match="not compressed and do not overlap"):
        load_weights(tmp_path / "x.pth")


@pytest.mark.parametrize("content", [
    b"", b"{}", b"PK\x03\x04", b"not weights at all" * 9, pickle.dumps([1, 2]), bytes(100)])
def test_a_file_of_another_kind_is_refused(content, tmp_path):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(WeightsError, match="x.bin: expected"):
        load_weights(tmp_path / "x.bin")


# ---------------------------------------------------------------------------------------- downloads

class Server(http.server.BaseHTTPRequestHandler):
    """Answers with `content`. The other attributes say what goes wrong."""
    content = b""
    asked = []           # (path, its Range, its Authorization)
    breaks_after = None  # so many bytes are sent, of each answer
    ranges = True        # whether it knows them
    kind = "application/octet-stream"
    token = None         # without it there is no answer
    silent = False
    status = None        # of an answer to everything

    def do_GET(self):
        self.asked.append((self.path, self.headers["Range"], self.headers["Authorization"]))
        if self.silent:
            time.sleep(3)
        if self.status:
            self.send_error(self.status)
            return
        if self.token and self.headers["Authorization"] != f"Bearer {self.token}":
            self.send_error(401)
            return
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/file.pth")
            self.send_header("X-Linked-Etag", f'"{hashlib.sha256(self.whole).hexdigest()}"')
            self.end_headers()
            return
        content, status = self.content, 200
        if self.headers["Range"] and self.ranges:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
            status, content = 206, content[start:]
        self.send_response(status)
        if status == 206:
            end = len(self.content) - 1
            self.send_header("Content-Range", f"bytes {start}-{end}/{end + 1}")
        self.send_header("Content-Type", self.kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:self.breaks_after])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server with a file of weights, "test-weights", which goes into tmp_path/weights."""
    torch.save({"w": torch.arange(50_000.0)}, tmp_path / "file.pth")
    content = (tmp_path / "file.pth").read_bytes()
    handler = type("Handler", (Server,), {"content": content, "whole": content, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("POSEBRIDGE_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    handler.url = f"http://127.0.0.1:{server.server_port}/file.pth"
    handler.digest = hashlib.sha256(content).hexdigest()[:8]
    monkeypatch.setitem(PUBLIC_FILES, "test-weights", PublicFile(handler.url, handler.digest))
    yield handler
    server.shutdown()
    server.server_close()


def kept(tmp_path):
    return sorted(file.name for file in (tmp_path / "weights").iterdir())


def fetched():
    assert torch.equal(load_weights("test-weights")["w"], torch.arange(50_000.0))


def test_a_name_is_fetched_once_checked_and_kept(server, tmp_path):
    for _ in range(2):
        fetched()
    assert server.asked == [("/file.pth", None, None)]
    assert kept(tmp_path) == ["test-weights.pth"]


@pytest.mark.parametrize("digest", ["as published", "md5", ""])
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_download_that_broke_goes_on_where_it_stopped(server, tmp_path, monkeypatch, ranges,
                                                        digest):
    if digest == "md5":
        digest = "md5:" + hashlib.md5(server.content).hexdigest()[:6]
    if digest != "as published":
        monkeypatch.setitem(PUBLIC_FILES, "test-weights", PublicFile(server.url, digest))
    server.breaks_after, server.ranges = 120_000, ranges
    message = (r"cannot fetch http://127.0.0.1\S+ \(the connection broke after 120,000 of "
               r"201,\d+ bytes; the next try goes on there\)")
    with pytest.raises(WeightsError, match=message):
        load_weights("test-weights")
    assert kept(tmp_path) == ["test-weights.pth.part"]
    server.breaks_after = None
    fetched()
    assert server.asked[1] == ("/file.pth", "bytes=120000-", None)
    assert kept(tmp_path) == ["test-weights.pth"]


def test_what_a_killed_download_has_left_is_used_but_not_what_another_one_is_writing(
        server, tmp_path):
    (tmp_path / "weights").mkdir()
    killed, running = (tmp_path / "weights" / f"test-weights.pth.part{n}" for n in (1, 2))
    for file in (killed, running):
        file.write_bytes(server.content[:1000])
    os.utime(killed, (time.time() - 100,) * 2)
    fetched()
    assert server.asked == [("/file.pth", "bytes=1000-", None)]
    assert kept(tmp_path) == ["test-weights.pth", "test-weights.pth.part2"]


def test_a_part_that_belongs_to_another_file_is_not_kept(server, tmp_path):
    (tmp_path / "weights").mkdir()
    part = tmp_path / "weights" / "test-weights.pth.part"
    part.write_bytes(bytes(100))
    with pytest.raises(WeightsError, match="expected a file whose SHA-256 begins"):
        load_weights("test-weights")
    assert kept(tmp_path) == []
    part.write_bytes(bytes(10 ** 6))  # longer than the file: the server knows no such range
    fetched()


def test_a_server_that_refuses_the_whole_file_as_a_range_is_an_error(server, tmp_path):
    server.status = 416
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "test-weights.pth.part").write_bytes(bytes(100))
    with pytest.raises(WeightsError, match="HTTP Error 416"):
        load_weights("test-weights")
    assert [asked[1] for asked in server.asked] == ["bytes=100-", None]


def test_programs_that_begin_a_download_at_the_same_time_have_files_of_their_own(
        server, tmp_path, monkeypatch):
    drafts = []

    def receive(address, file, plain=vlpose.receive):
        drafts.append(file)
        return plain(address, file)
    monkeypatch.setattr(vlpose, "receive", receive)
    monkeypatch.setattr(vlpose.time, "time_ns", lambda: 7)  # Windows' clock ticks 64 times a second
    for process in (1, 2):
        monkeypatch.setattr(vlpose.os, "getpid", lambda: process)
        fetched()
        (tmp_path / "weights" / "test-weights.pth").unlink()
    assert drafts[0] != drafts[1]


def test_a_part_that_another_program_has_open_is_left_to_it(server, tmp_path, monkeypatch):
    def replace(source, target, plain=os.replace):
        if Path(source).name.endswith(".part"):
            raise PermissionError(errno.EACCES, "used by another process")  # as Windows says
        plain(source, target)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "test-weights.pth.part").write_bytes(server.content[:100])
    monkeypatch.setattr(vlpose.os, "replace", replace)
    fetched()
    assert server.asked == [("/file.pth", None, None)]


def test_another_file_is_not_kept(server, tmp_path):
    server.content = server.whole + b"\0\0"
    with pytest.raises(WeightsError, match="cannot fetch http://127.0.0.1.*expected a file whose "
                                           f"SHA-256 begins {server.digest}.*by hand, put it at"):
        load_weights("test-weights")
    assert kept(tmp_path) == []
    server.content = server.whole
    fetched()


def test_two_pieces_without_a_digest_are_never_put_together(server, tmp_path, monkeypatch):
    monkeypatch.setitem(PUBLIC_FILES, "test-weights", PublicFile(server.url))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "test-weights.pth.part").write_bytes(bytes(1000))
    fetched()
    assert [asked[1] for asked in server.asked] == ["bytes=1000-", None]


def test_a_web_page_is_no_file_of_weights(server, tmp_path, monkeypatch):
    monkeypatch.setitem(PUBLIC_FILES, "test-weights", PublicFile(server.url))
    server.content, server.kind = b"<html>log in, please</html>", "text/html; charset=utf-8"
    with pytest.raises(WeightsError, match="found a web page, perhaps to log in"):
        load_weights("test-weights")
    assert kept(tmp_path) == []


def test_a_silent_server_ends_a_download(server, tmp_path, monkeypatch):
    monkeypatch.setattr(vlpose, "TIMEOUT", 0.2)
    server.silent = True
    with pytest.raises(WeightsError, match="timed out"):
        load_weights("test-weights")
    assert kept(tmp_path) == []


def test_the_second_address_is_tried_second_and_said(server, tmp_path, monkeypatch, capsys):
    closed = "http://127.0.0.1:9/file.pth"
    file = PublicFile(closed, server.digest, mirror=server.url)
    monkeypatch.setitem(PUBLIC_FILES, "test-weights", file)
    fetched()
    assert f"cannot fetch {closed}" in (said := capsys.readouterr().err)
    assert said.endswith(f"; trying {server.url}\n") and said.count("\n") == 1
    (tmp_path / "weights" / "test-weights.pth").unlink()
    server.content = bytes(100)  # a mirror with another file
    with pytest.raises(WeightsError, match=f"{server.url} .expected a file whose SHA-256"):
        load_weights("test-weights")
    assert kept(tmp_path) == []


def test_hugging_face_is_asked_as_its_own_tools_ask(server, tmp_path, monkeypatch):
    """At HF_ENDPOINT, with HF_TOKEN there alone, and with the SHA-256 that the server says."""
    address = "https://huggingface.co/moved"
    monkeypatch.setitem(PUBLIC_FILES, "test-weights", PublicFile(address))
    monkeypatch.setenv("HF_ENDPOINT", server.url.removesuffix("/file.pth") + "/")
    monkeypatch.setenv("HF_TOKEN", "secret")
    server.content = server.whole[:-1] + b"\1"
    with pytest.raises(WeightsError, match="expected a file whose SHA-256 begins"):
        load_weights("test-weights")
    server.content = server.whole
    fetched()
    assert server.asked[2:] == [("/moved", None, "Bearer secret"), ("/file.pth", None, None)]


def test_a_token_goes_to_hugging_face_alone(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    fetched()
    assert server.asked == [("/file.pth", None, None)]
    request = vlpose.huggingface_request("https://huggingface.co.evil.com/a")
    assert request.full_url == "https://huggingface.co.evil.com/a"
    assert not request.has_header("Authorization")


def test_a_newline_after_a_token_is_ignored_so_that_no_message_has_the_token(server, monkeypatch):
    monkeypatch.setitem(PUBLIC_FILES, "test-weights", PublicFile("https://huggingface.co/file.pth"))
    monkeypatch.setenv("HF_ENDPOINT", server.url.removesuffix("/file.pth"))
    monkeypatch.setenv("HF_TOKEN", "secret\n")
    fetched()
    assert server.asked == [("/file.pth", None, "Bearer secret")]


def test_messages_name_the_endpoint_that_was_asked(server, monkeypatch):
    monkeypatch.setitem(PUBLIC_FILES, "test-weights", PublicFile("https://huggingface.co/file.pth"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match="cannot fetch http://127.0.0.1:9/file.pth "):
        load_weights("test-weights")
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.com")
    with pytest.raises(WeightsError, match="^HF_ENDPOINT: expected an address such as "
                                           "https://huggingface.co/, found hf-mirror.com$"):
        load_weights("test-weights")


def test_a_server_that_needs_a_token_is_named(server, monkeypatch):
    monkeypatch.setitem(PUBLIC_FILES, "test-weights", PublicFile("https://huggingface.co/file.pth"))
    monkeypatch.setenv("HF_ENDPOINT", server.url.removesuffix("/file.pth"))
    server.token = "right"
    with pytest.raises(WeightsError, match="HTTP Error 401"):
        load_weights("test-weights")
    monkeypatch.setenv("HF_TOKEN", "right")
    fetched()


def test_a_cache_that_cannot_be_written_is_not_a_failed_download(server, tmp_path):
    (tmp_path / "weights").write_text("a file where the folder should be")
    with pytest.raises(DataError, match="test-weights.pth: cannot be written.*POSEBRIDGE_HOME"):
        load_weights("test-weights")
    assert not server.asked


def test_a_full_disk_is_not_a_failed_download(server, tmp_path, monkeypatch):
    def receive(address, file):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(vlpose, "receive", receive)
    with pytest.raises(DataError, match="test-weights.pth: cannot be written: No space left"):
        load_weights("test-weights")
    assert kept(tmp_path) == []


def test_offline_the_error_says_which_file_goes_where(server, tmp_path, monkeypatch):
    file = PublicFile("http://127.0.0.1:9/file.pth", server.digest)
    monkeypatch.setitem(PUBLIC_FILES, "test-weights", file)
    place = tmp_path / "weights" / "test-weights.pth"
    with pytest.raises(WeightsError,
                       match=f"cannot fetch http://127.0.0.1:9/file.pth .* put it at {place}"):
        load_weights("test-weights")
    place.write_bytes(server.content[:-1])
    with pytest.raises(WeightsError, match=f"{place}: expected .*, whose SHA-256 begins.*remove"):
        load_weights("test-weights")
    place.write_bytes(server.content)
    assert len(load_weights("test-weights")["w"]) == 50_000


def test_every_public_name_has_an_address_and_a_hash_but_for_hugging_faces():
    names = {f"vitpose-{size}{kind}" for size in "sblh" for kind in ("", "-simple", "-humanart")}
    for name in (*TRUNKS, *DETECTORS):
        known = torchvision.models.get_model_weights(name)
        assert PUBLIC_FILES[name].address in [weights.url for weights in known]
    names |= {"vitpose-b-hf", "mae-b", "mae-l", "mae-h", "adain-encoder", "adain-decoder",
              "resnet101", "vitpose-plus-h", "easy-vitpose-b-coco25"}
    assert names | {"ViT-B/32", "ViT-B/16", "ViT-L/14", "RN50"} <= PUBLIC_FILES.keys()
    for name, file in PUBLIC_FILES.items():
        digest = file.digest.removeprefix("md5:")
        if file.address.startswith("https://huggingface.co/"):
            assert not digest  # the server says it
            continue
        assert file.address.startswith("https://") and len(digest) in (6, 8, 64)
        assert set(digest) <= set("0123456789abcdef")
        assert len(digest) != 8 or f"-{digest}" in file.address
        assert not file.skeleton or name.startswith("vitpose")


def test_every_public_pose_model_has_a_skeleton():
    for name, file in PUBLIC_FILES.items():
        if "vitpose" in name:
            data_set = name.rpartition("-")[2]
            expected = EXPERTS.get(data_set, "COCO25" if data_set == "coco25" else "COCO17")
            assert file.skeleton == expected, name


@pytest.mark.parametrize("name, count, last", [
    ("adain-encoder", 34, (512, 512, 3, 3)), ("adain-decoder", 18, (3, 64, 3, 3))])
def test_the_real_public_files_load_where_they_are_in_the_cache(name, count, last):
    if not (vlpose.cache_folder() / "weights" / f"{name}.pth").exists():
        pytest.skip(f"{name} is not in the cache folder")
    weights = load_weights(name)
    assert len(weights) == count and list(weights.values())[-2].shape == last
