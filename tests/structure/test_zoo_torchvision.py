"""torchvision: classification, video, segmentation, detection backbones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from zoo import Architecture, check, images, need

pytestmark = [pytest.mark.slow, pytest.mark.zoo]


def models() -> Any:
    import torchvision

    return torchvision.models


def plain(name: str, size: int = 64, **options: Any) -> Architecture:
    return Architecture(lambda: getattr(models(), name)(weights=None, **options), images(size))


def segmentation(name: str) -> Architecture:
    def build() -> nn.Module:
        make = getattr(models().segmentation, name)
        return make(weights=None, weights_backbone=None, num_classes=5)

    return Architecture(build, images(64))


def detection(build: Callable[[Any], nn.Module], size: int = 64) -> Architecture:
    return Architecture(lambda: build(models().detection), images(size))


def small_vit() -> nn.Module:
    return models().VisionTransformer(
        image_size=64, patch_size=16, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128
    )


def small_maxvit() -> nn.Module:
    return models().MaxVit(
        input_size=(64, 64),
        stem_channels=16,
        partition_size=2,
        block_channels=[16, 32],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
        num_classes=10,
    )


ARCHITECTURES = {
    "resnet18": plain("resnet18"),
    "resnext50": plain("resnext50_32x4d", num_classes=10),
    "densenet121": plain("densenet121", num_classes=10),
    "googlenet": plain("googlenet", init_weights=False),
    "inception_v3": plain("inception_v3", 80, init_weights=False, aux_logits=False),
    "squeezenet1_1": plain("squeezenet1_1"),
    "shufflenet_v2": plain("shufflenet_v2_x0_5", num_classes=10),
    "mobilenet_v2": plain("mobilenet_v2", num_classes=10),
    "mobilenet_v3_small": plain("mobilenet_v3_small", num_classes=10),
    "efficientnet_b0": plain("efficientnet_b0", num_classes=10),
    "regnet_x_400mf": plain("regnet_x_400mf", num_classes=10),
    "regnet_y_400mf": plain("regnet_y_400mf", num_classes=10),
    "mnasnet0_5": plain("mnasnet0_5", num_classes=10),
    "convnext_tiny": plain("convnext_tiny", num_classes=10),
    "swin_t": plain("swin_t", num_classes=10),
    "swin_v2_t": plain("swin_v2_t", num_classes=10),
    "vit": Architecture(small_vit, images(64)),
    "maxvit": Architecture(small_maxvit, images(64)),
    "r3d_18": Architecture(
        lambda: models().video.r3d_18(weights=None), lambda b: (torch.rand(b, 3, 4, 32, 32),)
    ),
    "fcn_resnet50": segmentation("fcn_resnet50"),
    "deeplabv3_mobilenet": segmentation("deeplabv3_mobilenet_v3_large"),
    "lraspp_mobilenet": segmentation("lraspp_mobilenet_v3_large"),
    "resnet18_fpn": detection(
        lambda d: d.backbone_utils.resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, trainable_layers=5
        )
    ),
    "mobilenet_v3_fpn": detection(
        lambda d: d.backbone_utils.mobilenet_backbone(
            backbone_name="mobilenet_v3_large", weights=None, fpn=True, trainable_layers=6
        )
    ),
    "ssdlite_backbone": detection(
        lambda d: d.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).backbone, 96
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_torchvision(name: str, record_property: Any) -> None:
    need("torchvision")
    check(f"torchvision {name}", ARCHITECTURES[name], record_property)
