"""Patch discriminator for the adversarial loss."""

import torch.nn as nn


class PatchDiscriminator(nn.Module):
    """Tells true difference maps of a pair of images from predicted ones, patch of 70 x 70 pixels by patch.

    width: channels of the first layer.  GroupNorm stands for the paper's batch norm, so that batches of 1
    work.  Isola et al. 2017, arXiv:1611.07004, appendix 6.1.2.
    """

    def __init__(self, width=64):
        super().__init__()
        layers = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for channels, stride in ((width, 2), (2 * width, 2), (4 * width, 1)):
            layers += [nn.Conv2d(channels, 2 * channels, 4, stride, padding=1, bias=False),
                       nn.GroupNorm(8, 2 * channels), nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(8 * width, 1, 4, padding=1)]
        self.layers = nn.Sequential(*layers)
        for module in self.layers:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, pairs):
        """pairs [B, 3, H, W] (prior, current, map; sides of 32 or more) -> logits [B, 1, H/8 - 2, W/8 - 2].

        The logits are float32; positive = true map.
        """
        return self.layers(pairs).float()
