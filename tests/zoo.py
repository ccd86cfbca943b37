"""Real networks of torchvision and timm, made small: fewer blocks, narrower, or smaller inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision.models as tv
from timm.models.gcvit import GlobalContextVit
from timm.models.mlp_mixer import MlpMixer
from timm.models.volo import VOLO
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.inception import InceptionA
from torchvision.models.maxvit import MaxVit
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.swin_transformer import SwinTransformer, SwinTransformerBlockV2
from torchvision.models.vision_transformer import VisionTransformer
from zoo_weights import awaken


@dataclass(frozen=True, slots=True)
class Small:
    """One small network.

    Attributes:
        make: builds it.
        shape: of its input, without the batch.
        fixed: whether it takes no other size.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3, 64, 64)
    fixed: bool = False

    def build(self) -> tuple[nn.Module, Tensor]:
        """Return the network in eval mode, with weights that matter, and an input."""
        return awaken(self.make()), torch.randn(1, *self.shape)


def _timm(name: str, px: int = 64, **more: Any) -> Small:
    """Return a model of timm; those that are told their image size take no other."""
    if "img_size" in more:
        px = more["img_size"]
    return Small(lambda: timm.create_model(name, num_classes=10, **more), (3, px, px), "img_size" in more)


TORCHVISION = {
    "resnet": Small(lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)),
    "resnext": Small(lambda: ResNet(Bottleneck, [1, 1, 1, 1], groups=8, width_per_group=4)),
    "vgg11_bn": Small(
        lambda: nn.Sequential(tv.vgg11_bn().features, nn.Flatten(), nn.Linear(512, 10)), (3, 32, 32), fixed=True
    ),
    "densenet": Small(lambda: DenseNet(12, (2, 3, 3, 2), 24)),
    "mobilenet_v3_small": Small(tv.mobilenet_v3_small),
    "shufflenet_v2_x0_5": Small(tv.shufflenet_v2_x0_5),
    "squeezenet1_1": Small(tv.squeezenet1_1),
    "mnasnet0_5": Small(tv.mnasnet0_5),
    "regnet": Small(lambda: RegNet(BlockParams.from_init_params(2, 16, 8.0, 2.5, 8, se_ratio=0.25))),
    "efficientnet_b0": Small(tv.efficientnet_b0),
    "convnext": Small(
        lambda: ConvNeXt([CNBlockConfig(24, 48, 2), CNBlockConfig(48, 96, 2), CNBlockConfig(96, None, 2)])
    ),
    "googlenet": Small(lambda: tv.googlenet(weights=None, init_weights=False, aux_logits=False)),
    "inception_block": Small(
        lambda: nn.Sequential(nn.Conv2d(3, 32, 3), InceptionA(32, 16), nn.Conv2d(240, 8, 1)), (3, 32, 32)
    ),
    "fcn_resnet50": Small(lambda: tv.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True)),
    "deeplabv3_mobilenet": Small(
        lambda: tv.segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, aux_loss=True)
    ),
    "fpn_resnet18": Small(
        lambda: resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d)
    ),
    "vit": Small(lambda: VisionTransformer(64, 16, 2, 4, 48, 96, num_classes=10), fixed=True),
    "swin": Small(lambda: SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10), fixed=True),
    "swin_v2": Small(
        lambda: SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10, block=SwinTransformerBlockV2),
        fixed=True,
    ),
    "maxvit": Small(
        lambda: MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.1, num_classes=10),
        fixed=True,
    ),
}

TIMM = {
    "vit_tiny": _timm("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=48),
    "eva02_tiny": _timm("eva02_tiny_patch14_224", img_size=56, depth=2),
    "swin_tiny": _timm(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4)
    ),
    "xcit_nano": _timm("xcit_nano_12_p16_224", img_size=64, depth=2),
    "mixer": Small(lambda: MlpMixer(10, 64, num_blocks=2, embed_dim=64), fixed=True),
    "levit_128s": _timm("levit_128s", img_size=64),
    "coat_tiny": _timm("coat_tiny", img_size=64, serial_depths=(1, 1, 1, 1), parallel_depth=1),
    "gcvit": Small(
        lambda: GlobalContextVit(num_classes=10, img_size=64, embed_dim=32, depths=(1, 1, 1, 1)), fixed=True
    ),
    "convnext": _timm("test_convnext"),
    "nfnet": _timm("nf_regnet_b0"),
    "res2net": _timm("res2net50_14w_8s", layers=[1, 1, 1, 1]),
    "ghostnet": _timm("ghostnet_050"),
    "efficientnet": _timm("test_efficientnet"),
    "lambda_resnet": _timm("lambda_resnet26t", img_size=64),
    "volo": Small(lambda: VOLO([1, 1], 64, num_classes=10, embed_dims=[48, 96], num_heads=[2, 4]), fixed=True),
    "pvt_v2": _timm("pvt_v2_b0", depths=(1, 1, 1, 1)),
    "cait": _timm("cait_xxs24_224", img_size=64, depth=2, depth_token_only=1, embed_dim=48),
    "hiera": _timm("hiera_tiny_224", img_size=64, stages=(1, 1, 1, 1), embed_dim=32),
}

NETWORKS = {f"torchvision-{name}": small for name, small in TORCHVISION.items()} | {
    f"timm-{name}": small for name, small in TIMM.items()
}
