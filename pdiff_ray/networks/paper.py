"""The paper's small networks, by name.

The paper gives the names of the networks whose parameters are all generated, and how many these are: the layouts are
this project's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from pdiff_ray.common.registry import Registry


class MLP(nn.Sequential):
    """A fully connected ReLU network of flattened images."""

    def __init__(self, in_channels: int, image_size: int, num_classes: int, hidden: Sequence[int]) -> None:
        widths = [in_channels * image_size**2, *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        super().__init__(*layers, nn.Linear(widths[-1], num_classes))


class GreyMLP(nn.Module):
    """A fully connected ReLU network with BatchNorm, of the mean of an image's channels."""

    def __init__(self, in_channels: int, image_size: int, num_classes: int, hidden: Sequence[int]) -> None:
        super().__init__()
        widths = [image_size**2, *hidden]
        layers = [
            nn.Sequential(OrderedDict(linear=nn.Linear(*pair), bn=nn.BatchNorm1d(pair[1]), relu=nn.ReLU()))
            for pair in pairwise(widths)
        ]
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.layers(images.mean(1).flatten(1)))


class ConvNet(nn.Module):
    """3 x 3 convolutions with BatchNorm and ReLU, halved between them where the image allows, then average pooling."""

    def __init__(
        self, in_channels: int, image_size: int, num_classes: int, widths: Sequence[int] = (32, 64, 128)
    ) -> None:
        super().__init__()
        channels, size = in_channels, image_size
        self.layers = nn.ModuleList()
        for index, width in enumerate(widths):
            halved = index < len(widths) - 1 and size >= 4
            layer = {
                "conv": nn.Conv2d(channels, width, 3, padding=1, bias=False),
                "bn": nn.BatchNorm2d(width),
                "relu": nn.ReLU(),
                "pool": nn.MaxPool2d(2) if halved else nn.Identity(),
            }
            self.layers.append(nn.Sequential(OrderedDict(layer)))
            channels, size = width, size // 2 if halved else size
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        for layer in self.layers:
            images = layer(images)
        return self.fc(images.mean((2, 3)))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm, and a shortcut around them (He et al. 2016)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """Basic blocks, so many of each width, at half the size of the width before, then average pooling."""

    def __init__(
        self, in_channels: int, image_size: int, num_classes: int, widths: Sequence[int], blocks: int = 1
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        every = [width for width in widths for _ in range(blocks)]
        pairs = enumerate(pairwise([widths[0], *every]))
        self.blocks = nn.Sequential(*(BasicBlock(*pair, stride=2 if i and not i % blocks else 1) for i, pair in pairs))
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.blocks(self.relu(self.bn1(self.conv1(images)))).mean((2, 3)))


def vit(in_channels: int, image_size: int, num_classes: int) -> nn.Module:
    """Builds timm's vision transformer with 64 patches, of images enlarged to 64 x 64 as the published code does."""
    from timm.models.vision_transformer import VisionTransformer

    network = VisionTransformer(64, 8, in_channels, num_classes, embed_dim=52, depth=3, num_heads=4, mlp_ratio=2)
    return nn.Sequential(OrderedDict(enlarge=nn.Upsample((64, 64), mode="bilinear"), vit=network))


def convnext(in_channels: int, image_size: int, num_classes: int) -> nn.Module:
    """Builds timm's ConvNeXt, whose first stage has the size of the images, as they are small."""
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(in_channels, num_classes, depths=(1, 1, 1, 2), dims=(8, 16, 24, 56), patch_size=1)


# First version: 25 k to 155 k parameters. With MNIST's 784 inputs S-1 to S-3 have 25,450, 55,050 and 152,970 here; with
# CIFAR-10's images ConvNet-3 has 94,762. Final version, with CIFAR-10's images: ConvNet-mini has 24,262 parameters,
# MLP-mini 66,970, ResNet-mini 25,138, ViT-mini 80,714 and ConvNeXt-mini 74,970, as published. ResNet-20 is He et al.'s
# (2016, section 4.2) for CIFAR-10, with convolutions in the two shortcuts that change the width: 272,474.
NETWORKS: Registry[Callable[..., nn.Module]] = Registry(
    "network of the paper",
    {
        "s1": partial(MLP, hidden=[32]),
        "s2": partial(MLP, hidden=[64, 64]),
        "s3": partial(MLP, hidden=[160, 160]),
        "mlp": MLP,
        "convnet3": partial(ConvNet, widths=(32, 64, 128)),
        "convnet": ConvNet,
        "convnet_mini": partial(ConvNet, widths=(12, 12, 24, 36, 36)),
        "mlp_mini": partial(GreyMLP, hidden=[64, 16]),
        "resnet_mini": partial(ResNet, widths=(8, 10, 24, 28)),
        "resnet20": partial(ResNet, widths=(16, 32, 64), blocks=3),
        "vit_mini": vit,
        "convnext_mini": convnext,
    },
)
