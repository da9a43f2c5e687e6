"""timm: CNNs, mobile and grouped ones, ViTs, window transformers, hybrids, MLPs."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from zoo import Architecture, check, images, need

pytestmark = [pytest.mark.slow, pytest.mark.zoo]


def model(name: str, size: int = 64, below: str = "", **options: Any) -> Architecture:
    def build() -> nn.Module:
        import timm

        made: nn.Module = timm.create_model(name, pretrained=False, num_classes=10, **options)
        return made

    return Architecture(build, images(size), below)


def sized(name: str, size: int = 64, below: str = "", **options: Any) -> Architecture:
    return model(name, size, below, img_size=size, **options)


SHALLOW = (1, 1, 2, 1)
ARCHITECTURES = {
    # CNNs
    "resnetv2_50": model("resnetv2_50", layers=SHALLOW),
    "resnest14d": model("resnest14d"),
    "skresnet18": model("skresnet18"),
    "res2net50": model("res2net50_26w_4s"),
    "dla34": model("dla34"),
    "dpn48b": model("dpn48b"),
    "hrnet_w18_small": model("hrnet_w18_small"),
    "cspresnet50": model("cspresnet50"),
    "ese_vovnet19b_dw": model("ese_vovnet19b_dw"),
    "xception41": model("xception41"),
    "nfnet_l0": model("nfnet_l0"),
    "convnextv2_atto": model("convnextv2_atto"),
    "inception_next_atto": model("inception_next_atto"),
    "focalnet": model("focalnet_tiny_srf"),
    "mambaout_femto": model("mambaout_femto"),
    # mobile and grouped
    "regnety_002": model("regnety_002"),
    "mobilenetv4_conv_small": model("mobilenetv4_conv_small"),
    "ghostnetv2": model("ghostnetv2_100"),
    "rexnet_100": model("rexnet_100"),
    "repvgg_a0": model("repvgg_a0"),
    "repghostnet_050": model("repghostnet_050"),
    "repvit_m0_9": model("repvit_m0_9"),
    "hgnetv2_b0": model("hgnetv2_b0"),
    "starnet_s1": model("starnet_s1"),
    "shvit_s1": model("shvit_s1"),
    # ViTs
    "vit_tiny": sized("vit_tiny_patch16_224", depth=2),
    "deit3_small": sized("deit3_small_patch16_224", depth=2),
    "beit_base": sized("beit_base_patch16_224", depth=2),
    "eva02_tiny": sized("eva02_tiny_patch14_224", 56, depth=2),
    "cait_xxs24": sized("cait_xxs24_224", depth=2),
    "xcit_nano": sized("xcit_nano_12_p16_224", depth=2),
    "crossvit_tiny": sized("crossvit_tiny_240", 120),
    # hierarchical and window transformers
    "swin_tiny": sized("swin_tiny_patch4_window7_224", window_size=4, depths=(2, 2, 2, 2)),
    "swinv2_tiny": sized("swinv2_tiny_window8_256", window_size=4, depths=(2, 2, 2, 2)),
    "pvt_v2_b0": model("pvt_v2_b0"),
    "twins_svt_small": model("twins_svt_small"),
    "davit_tiny": model("davit_tiny"),
    "hiera_tiny": sized("hiera_tiny_224"),
    "mvitv2_tiny": sized("mvitv2_tiny"),
    "nest_tiny": sized("nest_tiny"),
    "tiny_vit_5m": model("tiny_vit_5m_224", 96),
    # hybrids
    "coat_tiny": sized("coat_tiny"),
    "coatnet_pico": sized("coatnet_pico_rw_224"),
    "maxvit_pico": sized("maxvit_pico_rw_256"),
    "levit_128s": sized("levit_128s"),
    "mobilevit_xxs": model("mobilevit_xxs"),
    "edgenext_xx_small": model("edgenext_xx_small"),
    "efficientformerv2_s0": model("efficientformerv2_s0", 224),
    "efficientvit_b0": model("efficientvit_b0"),
    "fastvit_t8": model("fastvit_t8"),
    "poolformer_s12": model("poolformer_s12"),
    "visformer_tiny": sized("visformer_tiny"),
    # MLPs
    "mixer_s32": sized("mixer_s32_224"),
    "resmlp_12": sized("resmlp_12_224"),
    "gmlp_ti16": sized("gmlp_ti16_224"),
    "sequencer2d_s": model("sequencer2d_s"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_timm(name: str, record_property: Any) -> None:
    need("timm", "torchvision")
    check(f"timm {name}", ARCHITECTURES[name], record_property)
