"""ResNets for slices: torchvision's layers on one grey channel, their maps, pretrained weights."""

import torch
import torch.nn as nn
import torchvision.models

from models.efficientnet import GREY_MEAN, GREY_STD, SpatialMean, run
from models.pretrained import fill, read_tensors
from utils.config import UserError
from utils.foreign import RESNET_LAYERS

RESNETS = ("resnet18", "resnet34", "resnet50")


class SliceResNet(nn.Module):
    """torchvision's ResNet of that name for one-channel images; its layers keep torchvision's names.

    word: one of RESNETS; num_classes: outputs of ``head``, 0 for none, and ``forward`` gives features.
    checkpoint_activations: recompute each of the four stages in the backward pass.
    ``dim`` is E, ``channels`` are those of ``stages``.  ``mean`` and ``std`` of what the weights were trained
    on stand among the weights.  He et al. 2015, arXiv:1512.03385.  Raises UserError for another word.
    """

    multiple = 32                                       # maps of an image whose sides are one of it fit

    def __init__(self, word, num_classes=0, checkpoint_activations=False):
        super().__init__()
        if word not in RESNETS:
            raise UserError(f'the ResNet is "{word}"; set it to one of {", ".join(RESNETS)} in constants.py')
        network = getattr(torchvision.models, word)(weights=None)
        for name in RESNET_LAYERS:
            setattr(self, name, getattr(network, name))
        self.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.dim = network.fc.in_features
        self.channels = (64, *(self.dim // 2 ** i for i in (3, 2, 1, 0)))
        self.pool = SpatialMean()
        self.head = nn.Linear(self.dim, num_classes) if num_classes else nn.Identity()
        self.register_buffer("mean", torch.tensor(GREY_MEAN))
        self.register_buffer("std", torch.tensor(GREY_STD))
        self.checkpoint_activations = checkpoint_activations

    def stages(self, images):
        """images [B, 1, H, W] in [0, 1], of any size -> five maps [B, C, ...] at strides 2, 4, 8, 16, 32."""
        maps = [self.relu(self.bn1(self.conv1((images - self.mean) / self.std)))]
        x = self.maxpool(maps[0])
        for name in RESNET_LAYERS[4:]:
            x = run(self.get_submodule(name), x, self.checkpoint_activations and self.training)
            maps.append(x)
        return maps

    def features(self, images):
        """images as for ``stages`` -> [B, E], the mean of the last map."""
        return self.pool(self.stages(images)[-1]).flatten(1)

    def forward(self, images):
        """images as for ``stages`` -> logits [B, C]."""
        return self.head(self.features(images))


def load_resnet_weights(model, path):
    """Fill all of a SliceResNet but its head from local weights of torchvision, RadImageNet or Hugging Face.

    The planes of the first layer are summed to one: grey images have three equal channels there.
    Returns (matched, unmatched): names of the model that were filled, and names of the file that have no use
    here.  Raises UserError for a missing file and another network, BadFile for one that is not a state dict.
    """
    state = read_tensors(path, "SPINE_WEIGHTS")
    keep = [name for name in model.state_dict()
            if name.startswith("head.") or name in ("mean", "std") and name not in state]
    return fill(model, state, path, "SPINE_WEIGHTS", "SPINE_ENCODER", keep)
