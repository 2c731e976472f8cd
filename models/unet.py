"""U-Net and Attention U-Net for slices of any size, with a plain encoder or a ResNet's."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from models.efficientnet import run
from models.resnet import RESNETS, SliceResNet
from models.vista import crop, pad_to_multiple
from utils.config import UserError

ENCODERS = ("plain", *RESNETS)


class UNet(nn.Module):
    """U-Net: an encoder of maps at ever coarser strides, and a decoder back to the image's own pixels.

    num_classes: channels of the logits, 1 for one structure against the rest; depth, in_channels: of the
    plain encoder; features: channels at the finest level, doubled at each coarser one (a ResNet brings its
    own).  attention: gates on the skip connections (Attention U-Net).  encoder: one of ENCODERS.  xavier:
    initial weights of Glorot & Bengio 2010 for all convolutions, zeros for biases; False: torch's.
    prior: probability in (0, 1) of all structures together that the last bias starts from, as few pixels are
    of them (Lin et al. 2017, arXiv:1708.02002, section 3.3); 0: torch's random bias.
    checkpoint_activations: recompute each level in the backward pass: less memory, more time.
    ``encoder`` and ``decoder`` have names of their own in the state, so that the weights of a classifier or
    of another U-Net start the encoder alone.
    Ronneberger et al. 2015, arXiv:1505.04597, with zero padding and batch norm.  Raises UserError for options
    that no network has.
    """

    def __init__(self, in_channels=1, num_classes=1, depth=4, features=16, attention=False, encoder="plain",
                 xavier=False, prior=0.0, checkpoint_activations=False):
        super().__init__()
        if not 0 <= prior < 1:
            raise UserError(f"SPINE_MASK_PRIOR = {prior}: a probability, at least 0 and below 1")
        self.encoder = build_encoder(encoder, in_channels, depth, features, checkpoint_activations)
        self.decoder = Decoder(self.encoder, features, attention, checkpoint_activations)
        self.head = nn.Conv2d(features, num_classes, 1)
        if xavier:
            init_xavier_(self)
        if prior:
            structures = max(num_classes - 1, 1)
            nn.init.constant_(self.head.bias, math.log(prior / structures / (1 - prior)))
            nn.init.zeros_(self.head.bias[:num_classes - structures])              # the background's, if any

    def forward(self, images):
        """images [B, in_channels, H, W] in [0, 1], of any size -> logits [B, num_classes, H, W]."""
        padded = pad_to_multiple(images, self.encoder.multiple)
        features = self.decoder(padded, self.encoder.stages(padded))
        return crop(self.head(features), images.shape[2:])


def build_encoder(word, in_channels=1, depth=4, features=16, checkpoint_activations=False):
    """The encoder of that name in ENCODERS: ``stages`` gives its maps, ``channels`` theirs, coarsest last.

    Raises UserError for another word, a depth or width below 1, and colour images for a ResNet.
    """
    if word not in ENCODERS:
        raise UserError(f'SPINE_ENCODER is "{word}"; set it to one of {", ".join(ENCODERS)} in constants.py')
    if depth < 1 or features < 1:
        raise UserError(f"SPINE_DEPTH = {depth}, SPINE_FEATURES = {features}: set both to 1 or more")
    if word == "plain":
        return PlainEncoder(in_channels, depth, features, checkpoint_activations)
    if in_channels != 1:
        raise UserError(f"{word} reads one grey channel, not {in_channels}; use the plain encoder")
    return SliceResNet(word, 0, checkpoint_activations)


class PlainEncoder(nn.Module):
    """The left side of a U-Net: two convolutions at each level, and the maximum of 2 x 2 pixels between.

    in_channels, depth, features: as UNet has them; the deepest level has features * 2 ** depth channels.
    """

    def __init__(self, in_channels=1, depth=4, features=16, checkpoint_activations=False):
        super().__init__()
        self.channels = tuple(features * 2 ** level for level in range(depth + 1))
        self.dim, self.multiple = self.channels[-1], 2 ** depth
        inputs = (in_channels, *self.channels)
        self.levels = nn.ModuleList(double_conv(*pair) for pair in zip(inputs, self.channels, strict=False))
        self.checkpoint_activations = checkpoint_activations

    def stages(self, images):
        """images [B, in_channels, H, W], sides multiples of 2 ** depth -> maps at strides 1, 2, 4, ..."""
        maps = []
        for level in self.levels:
            x = F.max_pool2d(maps[-1], 2) if maps else images
            maps.append(run(level, x, self.checkpoint_activations and self.training))
        return maps


class Decoder(nn.Module):
    """The right side of a U-Net, for the maps of ``encoder``: [B, features, H, W] at the image's own pixels.

    features: channels at the finest level; attention: gates on all skips but that of the finest level, which
    does not say yet what is seen there (Oktay et al. 2018, section 3).  An encoder whose first map is half
    the image has the image itself for the finest skip.
    """

    def __init__(self, encoder, features=16, attention=False, checkpoint_activations=False):
        super().__init__()
        skips = encoder.channels[:-1]
        self.image_skip = encoder.multiple == 2 ** len(encoder.channels)
        if self.image_skip:
            skips = (1, *skips)
        self.blocks, below = nn.ModuleList(), encoder.channels[-1]
        for level in range(len(skips) - 1, -1, -1):
            width = features * 2 ** level
            self.blocks.append(UpBlock(below, skips[level], width, attention and level > 0, level < 2))
            below = width
        self.checkpoint_activations = checkpoint_activations

    def forward(self, images, maps):
        """images [B, C, H, W] that ``maps`` were made of, finest map first -> [B, features, H, W]."""
        *skips, x = [images, *maps] if self.image_skip else maps
        for block, skip in zip(self.blocks, reversed(skips), strict=True):
            x = run(block, (x, skip), self.checkpoint_activations and self.training)
        return x


class UpBlock(nn.Module):
    """One level up: transposed convolution, skip connection beside it, two convolutions.

    below, skip, width: channels of the coarser map, of the skip and of the output.  joined: the same by fewer
    operations.  The first convolution of two maps is the sum of one of each, and nothing stands between the
    doubling and its part, so that both are one transposed convolution whose kernel is theirs in turn; neither
    the doubled map nor the two beside each other are written.  That pays where maps are large and kernels
    small: at the finest levels.
    """

    def __init__(self, below, skip, width, attention=False, joined=False):
        super().__init__()
        self.up = nn.ConvTranspose2d(below, width, 2, stride=2, bias=False)
        self.gate = AttentionGate(skip, below) if attention else None
        self.convs = double_conv(skip + width, width)
        self.joined = joined

    def forward(self, pair):
        """pair: the coarser map [B, below, H, W] and the skip [B, skip, 2H, 2W] -> [B, width, 2H, 2W]."""
        x, skip = pair
        if self.gate is not None:
            skip = self.gate(skip, x)
        if not self.joined:
            return self.convs(torch.cat([skip, self.up(x)], 1))
        of_skip, of_up = self.convs[0].weight.split((skip.shape[1], self.up.out_channels), 1)
        with torch.autocast(x.device.type, enabled=False):
            kernel = F.conv2d(self.up.weight, of_up, padding=2)                   # [below, width, 4, 4]
        x = F.conv_transpose2d(x, kernel, stride=2, padding=1) + F.conv2d(skip, of_skip, padding=1)
        return self.convs[1:](x)


class AttentionGate(nn.Module):
    """Skip connection times a weight in [0, 1] of each pixel, which the coarser map decides.

    Oktay et al. 2018, arXiv:1804.03999, eq. 1 and 2: the weight is the sigmoid of a projection of
    relu(W_x x + W_g g + b), taken on the coarser grid and enlarged bilinearly.
    skip, below: channels of x and of the gating map g.
    """

    def __init__(self, skip, below):
        super().__init__()
        self.of_skip = nn.Conv2d(skip, skip, 2, stride=2, bias=False)
        self.of_below = nn.Conv2d(below, skip, 1)
        self.weight = nn.Conv2d(skip, 1, 1)

    def weights(self, x, g):
        """x [B, skip, 2H, 2W], g [B, below, H, W] -> [B, 1, 2H, 2W] in [0, 1]."""
        weights = torch.sigmoid(self.weight(torch.relu(self.of_skip(x) + self.of_below(g))))
        return F.interpolate(weights, scale_factor=2, mode="bilinear", align_corners=False)

    def forward(self, x, g):
        """x and g as for ``weights`` -> [B, skip, 2H, 2W]."""
        return x * self.weights(x, g)


def double_conv(inputs, outputs):
    """Two 3 x 3 convolutions without bias, each with batch norm and ReLU, to ``outputs`` channels."""
    layers = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs),
                   nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def init_xavier_(module):
    """Weights of all convolutions uniform after Glorot & Bengio 2010, eq. 16; their biases zero."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
