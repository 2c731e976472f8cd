"""Residual U-Nets of Myronenko 2018, arXiv:1810.11654, in two layouts whose parameters have MONAI's names.

Any state dict of MONAI's network of the same layout therefore loads by name, and gives the same features.
"""

from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class Conv3d(nn.Conv3d):
    """nn.Conv3d, but right for two sections in bfloat16 on the CPU.

    For 3-wide kernels at stride 1 oneDNN (as of torch 2.15) then leaves part of the weights' gradient
    unwritten: whatever the memory held, often NaN.  A third section of zeros is what the padding holds there
    anyway, so the result is the same.
    """

    def forward(self, x):
        """x [B, C, D, H, W] -> [B, C', D', H', W']."""
        if x.shape[2] == 2 and x.device.type == "cpu" and self.padding[0] == 1 and self.stride[0] == 1:
            return super().forward(F.pad(x, (0, 0, 0, 0, 0, 1)))[:, :, :2]
        return super().forward(x)


CONV = {2: nn.Conv2d, 3: Conv3d}
TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
LINEAR = {2: "bilinear", 3: "trilinear"}


class InstanceNorm(nn.Module):
    """Each channel of each sample to mean 0 and variance 1 over space, then scaled and shifted.

    nn.InstanceNorm3d refuses a map of a single voxel.  Deep in the network small inputs end there, and the
    formula holds: such a voxel is its own mean, so that the shift alone is left.
    """

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        """x [B, C, ...] -> the same shape."""
        return torch.instance_norm(x, self.weight, self.bias, running_mean=None, running_var=None,
                                   use_input_stats=True, momentum=0.0, eps=1e-5,
                                   cudnn_enabled=torch.backends.cudnn.enabled)


class ResBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))); ``norm`` and ``conv`` make a layer for so many channels.

    Nothing is done in place: autograd hooks of sharded training sit on the blocks' outputs.
    """

    def __init__(self, channels, norm, conv):
        super().__init__()
        self.norm1, self.norm2 = norm(channels), norm(channels)
        self.conv1, self.conv2 = conv(channels), conv(channels)

    def forward(self, x):
        """x [B, C, ...] -> the same shape."""
        residual = self.conv1(torch.relu(self.norm1(x)))
        return x + self.conv2(torch.relu(self.norm2(residual)))


def run_blocks(blocks, x, recompute):
    """x through each of ``blocks``; recompute: keep only their inputs for the backward pass."""
    for block in blocks:
        # Nothing in a block is random, so there is no random state to keep either.
        x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False) if recompute else block(x)
    return x


class Vista3DEncoder(nn.Module):
    """VISTA3D's image encoder with the one decoder branch that its class head reads (the automatic one).

    He et al. 2024, arXiv:2406.05285; MONAI's SegResNetDS2 with blocks_down (1, 2, 2, 4, 4), instance norm and
    dsdepth 1.  dims: 2 or 3; features: channels of the first level and of the output.  Parameters are those
    under ``image_encoder`` in a VISTA3D checkpoint, without the point branch (``up_layers``).
    """

    multiple = 16                                               # each side of the input is one of it

    def __init__(self, dims, features, checkpoint_activations=False):
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        widths = [features * 2 ** level for level in range(5)]

        def conv(inputs, outputs=None, stride=1):
            return CONV[dims](inputs, outputs or inputs, 3, stride, padding=1, bias=False)

        def blocks(width, number):
            return nn.Sequential(*(ResBlock(width, InstanceNorm, conv) for _ in range(number)))

        self.encoder = nn.ModuleDict({"conv_init": conv(1, features), "layers": nn.ModuleList()})
        for level, number in enumerate((1, 2, 2, 4, 4)):
            layer = nn.ModuleDict({"blocks": blocks(widths[level], number)})
            if level < 4:
                layer["downsample"] = conv(widths[level], widths[level + 1], stride=2)
            self.encoder["layers"].append(layer)
        self.up_layers_auto = nn.ModuleList()
        for wide, narrow in zip(widths[:0:-1], widths[-2::-1], strict=True):
            deconv = TRANSPOSED[dims](wide, narrow, 3, stride=2, padding=1, output_padding=1, bias=False)
            self.up_layers_auto.append(nn.ModuleDict({
                "upsample": nn.Sequential(OrderedDict(deconv=deconv)), "blocks": blocks(narrow, 1)}))
        self.up_layers_auto[-1]["head"] = CONV[dims](features, features, 1)

    def forward(self, image):
        """image [B, 1, ...] with sides that are multiples of 16 -> features [B, F, ...]."""
        recompute = self.checkpoint_activations and self.training
        x, skips = self.encoder["conv_init"](image), []
        for layer in self.encoder["layers"]:
            x = run_blocks(layer["blocks"], x, recompute)
            if "downsample" in layer:
                skips.append(x)
                x = layer["downsample"](x)
        for layer in self.up_layers_auto:
            x = run_blocks(layer["blocks"], layer["upsample"](x) + skips.pop(), recompute)
        return self.up_layers_auto[-1]["head"](x)


class SegResNet(nn.Module):
    """MONAI's SegResNet at its defaults, with as many channels out as in its first level.

    dims: 2 or 3; features: channels of the first level and of the output, a multiple of 8.
    """

    multiple = 8                                                # each side of the input is one of it

    def __init__(self, dims, features, checkpoint_activations=False):
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        widths = [features * 2 ** level for level in range(4)]

        def conv(inputs, outputs=None, kernel=3, stride=1, bias=False):
            layer = CONV[dims](inputs, outputs or inputs, kernel, stride, padding=kernel // 2, bias=bias)
            return nn.Sequential(OrderedDict(conv=layer))

        def blocks(width, number):
            return [ResBlock(width, group_norm, conv) for _ in range(number)]

        self.convInit = conv(1, features)
        self.down_layers = nn.ModuleList([nn.Sequential(nn.Identity(), *blocks(features, 1))])
        for width, number in zip(widths[1:], (2, 2, 4), strict=True):
            self.down_layers.append(nn.Sequential(conv(width // 2, width, stride=2), *blocks(width, number)))
        self.up_samples, self.up_layers = nn.ModuleList(), nn.ModuleList()
        for width in widths[-2::-1]:
            double = nn.Upsample(scale_factor=2, mode=LINEAR[dims], align_corners=False)
            self.up_samples.append(nn.Sequential(conv(2 * width, width, kernel=1), double))
            self.up_layers.append(nn.Sequential(*blocks(width, 1)))
        self.conv_final = nn.Sequential(group_norm(features), nn.ReLU(), conv(features, kernel=1, bias=True))

    def forward(self, image):
        """image [B, 1, ...] with sides that are multiples of 8 -> features [B, F, ...]."""
        recompute = self.checkpoint_activations and self.training
        x, skips = self.convInit(image), []
        for first, *blocks in self.down_layers:
            x = run_blocks(blocks, first(x), recompute)
            skips.append(x)
        skips.pop()                                             # the deepest is x itself
        for upsample, blocks in zip(self.up_samples, self.up_layers, strict=True):
            x = run_blocks(blocks, upsample(x) + skips.pop(), recompute)
        return self.conv_final(x)


def group_norm(channels):
    """GroupNorm in 8 groups, as MONAI's SegResNet has it."""
    return nn.GroupNorm(8, channels)
