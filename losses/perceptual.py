"""Perceptual and style losses on the features of a frozen VGG19 with batch norm."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import vgg19_bn

from models.pretrained import read_tensors
from utils.config import BadFile, UserError

CUTS = (0, 3, 10, 17, 30, 43)          # block k is features[CUTS[k - 1]:CUTS[k]] and ends at relu{k}_1
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_SIZE = 224                         # the size that the network was trained at


def build_blocks(path, last):
    """The first `last` blocks of vgg19_bn with the weights of a file, frozen: nn.ModuleList.

    path: torchvision's state dict, with or without the classifier and the prefix "features.".  Raises
    UserError when no file is given or it is missing, BadFile when it holds something else.
    """
    if not path:
        raise UserError("USE_PERC_STYLE needs trained features: set VGG_WEIGHTS=FILE in constants.py to "
                        "a local copy of torchvision's vgg19_bn-c79401a0.pth")
    names = {name.removeprefix("features."): value
             for name, value in read_tensors(path, "VGG_WEIGHTS").items()}
    with torch.device("meta"):                                   # no time for weights that are replaced below
        features = vgg19_bn(weights=None).features[:CUTS[last]]
    state = {name: value for name, value in names.items()
             if name.split(".")[0].isdigit() and int(name.split(".")[0]) < CUTS[last]}
    try:
        features.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise BadFile(f"{path}: not the weights of torchvision's vgg19_bn (plain vgg19 has no batch norm); "
                      "set VGG_WEIGHTS to the right file") from error
    features.float().requires_grad_(False)
    return nn.ModuleList(features[CUTS[k - 1]:CUTS[k]] for k in range(1, last + 1))


def gram(features):
    """[B, C, H, W] -> [B, C, C], divided by C * H * W (Johnson et al. 2016, arXiv:1603.08155, eq. 3)."""
    flat = features.flatten(2)                                                     # [B, C, HW]
    return flat @ flat.transpose(1, 2) / flat[0].numel()                           # [B, C, C]


class VGGLoss(nn.Module):
    """Distance between two maps as a network trained on photographs sees them.

    Perceptual: mean absolute difference of the features, averaged over `perceptual_blocks` (Johnson
    et al. 2016, arXiv:1603.08155, eq. 2, with L1).  Style: mean absolute difference of the Gram
    matrices, averaged over `style_blocks` (Gatys et al. 2016, CVPR; normalised as in Johnson's eq. 3).
    Blocks count from 1 to 5; block k ends at relu{k}_1.

    weights: path of torchvision's vgg19_bn state dict.  Raises UserError without one: features of
    random weights would be another loss under the same name.
    """

    def __init__(self, weights, perceptual_blocks=(2, 3), style_blocks=(2, 3, 4)):
        super().__init__()
        self.perceptual_blocks, self.style_blocks = tuple(perceptual_blocks), tuple(style_blocks)
        self.blocks = build_blocks(weights, max(self.perceptual_blocks + self.style_blocks))
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self.eval()

    def train(self, mode=True):
        """Stays in evaluation mode: batch statistics would make the loss depend on the other pairs."""
        return super().train(False)

    def features(self, maps):
        """Signed maps [B, 1, H, W] in [-1, 1] -> list of [B, C_k, H_k, W_k], one for each block."""
        x = (maps.float() + 1) / 2                                                 # to [0, 1]
        scale = MAX_SIZE / max(x.shape[-2:])
        if scale < 1:
            size = [max(1, round(side * scale)) for side in x.shape[-2:]]
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
        x = (x - self.mean) / self.std                                             # [B, 3, H, W]
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return outputs

    def forward(self, pred, target):
        """pred, target: [B, 1, H, W] in [-1, 1], sides of 16 or more, any float type -> (perceptual, style).

        Both are scalars computed in float32; the gradient reaches pred alone.
        """
        with torch.autocast(pred.device.type, enabled=False):
            with torch.no_grad():
                wanted = self.features(target)
            found = self.features(pred)
            perceptual = [F.l1_loss(found[k - 1], wanted[k - 1]) for k in self.perceptual_blocks]
            style = [F.l1_loss(gram(found[k - 1]), gram(wanted[k - 1])) for k in self.style_blocks]
        return torch.stack(perceptual).mean(), torch.stack(style).mean()
