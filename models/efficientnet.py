"""EfficientNet as an encoder of one-channel images, arranged for speed in bfloat16 and channels_last."""

from contextlib import contextmanager, nullcontext

import torch.nn as nn
import torchvision.models
from torch.utils.checkpoint import checkpoint
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

from models.depthwise import DepthwiseConv2d
from utils.config import UserError

EFFICIENTNETS = tuple(f"b{i}" for i in range(8))
SCALE_STAGES = (1, 2, 3, 5, 7)                  # torchvision's last stages at strides 2, 4, 8, 16, 32
GREY_MEAN, GREY_STD = 0.449, 0.226              # ImageNet's mean and deviation, averaged over colours


class EfficientNetScales(nn.Module):
    """EfficientNet for one-channel images that returns the features of every scale.

    name: "b0" ... "b7"; raises UserError for another word.  checkpoint_activations: recompute each stage in
    the backward pass.  The layers are torchvision's, without the last 1x1 convolution and the classifier.
    Stochastic depth is off: a block dropped for one of two compared images only would make differences
    that are not there.  Tan & Le 2019, arXiv:1905.11946.
    """

    left_out = ("features.8.",)                 # torchvision's last convolution, for its classifier

    def __init__(self, name, checkpoint_activations=False):
        super().__init__()
        if name not in EFFICIENTNETS:
            raise UserError(f'EFFICIENTNET is "{name}"; set it to one of b0 ... b7 in constants.py')
        build = getattr(torchvision.models, f"efficientnet_{name}")
        self.features = build(weights=None, stochastic_depth_prob=0.0).features[:-1]
        stem = nn.Conv2d(1, self.features[0][0].out_channels, 3, stride=2, padding=1, bias=False)
        nn.init.kaiming_normal_(stem.weight, mode="fan_out")
        self.features[0][0] = stem
        use_fast_layers(self.features)
        self.channels = tuple(self.features[i][-1].out_channels for i in SCALE_STAGES)
        self.checkpoint_activations = checkpoint_activations

    def forward(self, images):
        """images [B, 1, H, W] in [0, 1] -> list of five maps, at strides 2, 4, 8, 16, 32."""
        x, scales = (images - GREY_MEAN) / GREY_STD, []
        for i, stage in enumerate(self.features):
            x = run(stage, x, self.checkpoint_activations and self.training)
            if i in SCALE_STAGES:
                scales.append(x)
        return scales


def use_fast_layers(module):
    """Exchange layers of torchvision's blocks for equal ones that train faster; weights keep their names."""
    for layer in list(module.modules()):
        if isinstance(layer, Conv2dNormActivation) and layer[0].groups > 1:
            old = layer[0]
            layer[0] = DepthwiseConv2d(old.in_channels, old.kernel_size[0], old.stride[0])
            layer[0].load_state_dict(old.state_dict())
        elif isinstance(layer, SqueezeExcitation):
            layer.avgpool = SpatialMean()
        elif isinstance(layer, nn.SiLU):
            layer.inplace = False              # in place, its input is first copied for the backward pass


class SpatialMean(nn.Module):
    """Mean over the pixels: [B, C, H, W] -> [B, C, 1, 1].

    Taken over channels_last, the gradient comes back in that format; nn.AdaptiveAvgPool2d's comes back in
    the other, and adding the two costs several times more than either.
    """

    def forward(self, x):
        return x.permute(0, 2, 3, 1).mean((1, 2))[:, :, None, None]


def run(module, x, recompute):
    """module(x); with ``recompute`` its activations are computed again in the backward pass, not kept."""
    if not recompute:
        return module(x)
    return checkpoint(module, x, use_reentrant=False,
                      context_fn=lambda: (nullcontext(), keep_statistics(module)))


@contextmanager
def keep_statistics(module):
    """Batch norms in ``module`` leave their running statistics alone, so that no batch is counted twice."""
    momenta = {norm: norm.momentum for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)}
    for norm in momenta:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
