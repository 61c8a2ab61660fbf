from dataclasses import replace

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from synthrep_trainer.encoder import (
    EncoderConfig,
    make_encoder,
    parameter_groups,
    timm_arguments,
)
from synthrep_trainer.heads import make_projection_head

TINY = EncoderConfig(
    model="vit_synthrep_tiny", image_size_px=32, projection_hidden=48, projection_dim=16
)


def images(count=3, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_features_are_the_class_token_after_the_final_norm():
    encoder = make_encoder(TINY, seed=0).eval()
    captured = []
    encoder.backbone.norm.register_forward_hook(lambda *call: captured.append(call[-1]))
    result = encoder(images())
    assert result.shape == (3, 128)
    assert encoder.width == 128
    assert torch.equal(result, captured[0][:, 0])
    assert not torch.allclose(result, captured[0].mean(1))


def test_own_model_has_the_documented_shape():
    backbone = make_encoder(TINY, seed=0).backbone
    assert len(backbone.blocks) == 6
    assert backbone.blocks[0].attn.num_heads == 4
    assert backbone.patch_embed.num_patches == 64


@pytest.mark.parametrize(
    ("config", "width", "patches"),
    [
        (EncoderConfig(model="vit_tiny_patch16_224", image_size_px=32, patch_size_px=8), 192, 16),
        (EncoderConfig(model="vit_tiny_patch16_224", image_size_px=64), 192, 16),
        (EncoderConfig(model="deit_tiny_distilled_patch16_224", image_size_px=32), 192, 4),
    ],
)
def test_timm_models_are_built_at_any_size(config, width, patches):
    encoder = make_encoder(config, seed=0).eval()
    assert encoder.backbone.patch_embed.num_patches == patches
    result = encoder(images(2, config.image_size_px))
    assert result.shape == (2, width)
    tokens = encoder.backbone.forward_features(images(2, config.image_size_px))
    assert torch.equal(result, tokens[:, 0])


def test_timm_alone_loads_the_weights():
    encoder = make_encoder(TINY, seed=0).eval()
    name, arguments = timm_arguments(TINY)
    backbone = timm.create_model(name, **arguments).eval()
    backbone.load_state_dict(encoder.backbone.state_dict())
    assert torch.equal(backbone(images()), encoder(images()))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EncoderConfig(model="resnet18", image_size_px=32), "ViT of timm"),
        (EncoderConfig(model="no_such_model", image_size_px=32), "ViT of timm"),
        (EncoderConfig(model="vit_medium_patch16_gap_240", image_size_px=32), "class token"),
        (EncoderConfig(model="vit_synthrep_tiny", image_size_px=30), "multiple of the patch"),
    ],
)
def test_models_that_cannot_serve_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        make_encoder(config, seed=0)


@pytest.mark.parametrize(
    "change",
    [
        {"image_size_px": 0},
        {"patch_size_px": -4},
        {"projection_hidden": 0},
        {"projection_dim": 0},
        {"drop_path_rate": 1.0},
    ],
)
def test_impossible_sizes_are_refused(change):
    with pytest.raises(ValueError, match="got EncoderConfig"):
        replace(TINY, **change)


def test_seed_alone_decides_the_weights():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = make_encoder(TINY, seed=3).state_dict()
    head = make_projection_head(TINY, 128, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    second = make_encoder(TINY, seed=3).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other_head = make_projection_head(TINY, 128, seed=3).state_dict()
    assert all(torch.equal(head[name], other_head[name]) for name in head)
    third = make_encoder(TINY, seed=4).state_dict()
    weight = "backbone.blocks.0.attn.qkv.weight"
    assert not torch.equal(first[weight], third[weight])


def test_config_survives_json():
    for config in (TINY, EncoderConfig("vit_base_patch16_224", 224, 14, 0.1, 4096, 256)):
        assert EncoderConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("text", ['{"model": "x"}', '{"model": "x", "nope": 1}', "[]", "7", "{"])
def test_json_of_something_else_is_refused(text):
    with pytest.raises(ValueError, match="EncoderConfig|Expecting"):
        EncoderConfig.from_json(text)


def test_only_weights_of_two_dimensions_and_more_decay():
    encoder = make_encoder(TINY, seed=0)
    head = make_projection_head(TINY, encoder.width, seed=0)
    encoder.backbone.patch_embed.proj.weight.requires_grad_(False)
    decaying, plain = parameter_groups(encoder, head, weight_decay=0.1)
    assert decaying["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    names = {
        id(p): name for m in (encoder, head) for name, p in m.named_parameters() if p.requires_grad
    }
    decaying_names = {names.pop(id(p)) for p in decaying["params"]}
    plain_names = {names.pop(id(p)) for p in plain["params"]}
    assert not names
    assert {"backbone.pos_embed", "backbone.cls_token", "linears.2.weight"} <= decaying_names
    assert not any(name.endswith("bias") for name in decaying_names)
    assert all(name.endswith("bias") or "norm" in name for name in plain_names)


def test_stochastic_depth_grows_up_to_the_asked_rate():
    blocks = make_encoder(replace(TINY, drop_path_rate=0.2), seed=0).backbone.blocks
    assert blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert all(
        isinstance(block.drop_path1, nn.Identity)
        for block in make_encoder(TINY, seed=0).backbone.blocks
    )


def test_a_step_reaches_every_parameter():
    encoder = make_encoder(TINY, seed=0)
    head = make_projection_head(TINY, encoder.width, seed=0)
    head(encoder(images(4)), num_views=2).square().sum().backward()
    for module in (encoder, head):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("model", ["vit_synthrep_tiny", "deit_tiny_distilled_patch16_224"])
def test_tokens_hold_the_features_and_one_token_a_patch(model):
    encoder = make_encoder(replace(TINY, model=model, image_size_px=32), seed=0)
    rows = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = encoder.tokens(rows)
    torch.testing.assert_close(tokens.features, encoder(rows))
    assert tokens.patches.shape == (3, encoder.num_patches, encoder.width)


def test_other_sizes_take_interpolated_positions():
    encoder = make_encoder(replace(TINY, image_size_px=32), seed=0)
    small = make_encoder(replace(TINY, image_size_px=16), seed=1)
    state = encoder.state_dict()
    name = "backbone.pos_embed"
    state[name] = resample_abs_pos_embed(state[name], [4, 4], [8, 8])
    small.load_state_dict(state)
    rows = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encoder.tokens(rows).features, small(rows))


def test_masked_patches_are_replaced_by_the_mask_token():
    encoder = make_encoder(TINY, seed=0)
    rows = torch.randn(2, 3, TINY.image_size_px, TINY.image_size_px)
    masks = torch.zeros(2, encoder.num_patches, dtype=torch.bool)
    masks[1] = True
    token = torch.randn(encoder.width)
    masked = encoder.tokens(rows, masks, token).features
    torch.testing.assert_close(masked[0], encoder.tokens(rows).features[0])
    blank = encoder.tokens(torch.zeros_like(rows), masks, token).features
    assert torch.equal(masked[1], blank[1])
