"""Classifiers of photographs by a word: the hierarchical ViT and torchvision's networks, used alike."""

from contextlib import nullcontext

import torch.nn as nn
import torchvision.models
from torch.utils.checkpoint import checkpoint

from models.efficientnet import EFFICIENTNETS, keep_statistics, use_fast_layers
from models.hvit import WIDTHS, HViT, check_images, check_rate
from models.pretrained import fill, read_tensors
from models.resnet import RESNETS
from utils.config import UserError
from utils.distributed import unwrap

PHOTO_MODELS = (*(f"hvit_{size}" for size in WIDTHS), *RESNETS, "swin_t",
                *(f"efficientnet_{name}" for name in EFFICIENTNETS))

# The layers of torchvision's networks in the order in which they run: a stem, then four stages.
RESNET = (("conv1", "bn1", "relu", "maxpool"), ("layer1",), ("layer2",), ("layer3",), ("layer4", "avgpool"))
SWIN = (("features.0",), ("features.1",), ("features.2", "features.3"), ("features.4", "features.5"),
        ("features.6", "features.7", "norm", "permute", "avgpool"))
EFFICIENTNET = (("features.0",), ("features.1", "features.2"), ("features.3",), ("features.4", "features.5"),
                ("features.6", "features.7", "features.8", "avgpool"))


class TorchvisionNet(nn.Module):
    """A torchvision classifier in two parts: ``network`` up to the pooled features, and ``head``.

    network: one of torchvision's, whose classifier is its attribute ``head_name``; it is moved to ``head``,
    or dropped when not ``with_head``.  stages: names of its other layers, in the order in which they run.
    checkpoint_activations: recompute each stage in the backward pass.
    """

    def __init__(self, network, head_name, stages, with_head=True, checkpoint_activations=False):
        super().__init__()
        head = getattr(network, head_name)
        self.dim = [layer for layer in head.modules() if isinstance(layer, nn.Linear)][-1].in_features
        for layer in head.modules():
            if isinstance(layer, nn.Dropout):
                layer.inplace = False                       # in place it would change what features() gave
        setattr(network, head_name, nn.Identity())
        self.network, self.stages, self.checkpoint_activations = network, stages, checkpoint_activations
        self.head = head if with_head else nn.Identity()
        self.parts = (*(tuple(f"network.{name}" for name in names) for names in stages), ("head",))

    def features(self, images, spectral=None):
        """images [B, 3, H, W] of any size from 4 pixels, as the script normalises them -> [B, E].

        spectral: None; these networks read colour alone.  Raises UserError for other channels.
        """
        check_images(images, spectral, 0)
        x = images
        for names in self.stages:
            if self.checkpoint_activations and self.training:
                x = checkpoint(self.run_stage, names, x, use_reentrant=False,
                               context_fn=lambda: (nullcontext(), keep_statistics(self.network)))
            else:
                x = self.run_stage(names, x)
        return x.flatten(1)

    def forward(self, images, spectral=None):
        """As ``features`` -> logits [B, C]."""
        return self.head(self.features(images, spectral))

    def run_stage(self, names, x):
        """x through the layers of these names."""
        for name in names:
            x = self.network.get_submodule(name)(x)
        return x


def build_photo_model(word, num_classes, drop_path=0.2, dropout=None, spectral_channels=0, dfca=False,
                      dfca_heads=12, dfca_dropout=0.1, checkpoint_activations=False):
    """The classifier of that name in PHOTO_MODELS, with random weights.

    Each has ``features(images, spectral=None)`` -> [B, E], ``dim`` = E, ``head`` and ``forward`` -> logits
    [B, C]; num_classes 0: no head, and ``forward`` gives the features, as pretraining needs them.
    drop_path: rate of whole residual branches at the last block; a ResNet has none and ignores it.
    dropout: of torchvision's swin_t (in its blocks) and efficientnet (before the head); None leaves their own
    rates, 0 and 0.2 to 0.5.  checkpoint_activations: less memory, more time.  The other options are those of
    the hierarchical ViT (models/hvit.py).
    Raises UserError for another word, and for options that the network cannot follow.
    """
    if word not in PHOTO_MODELS:
        raise UserError(f'HVIT_MODEL is "{word}"; set it to one of {", ".join(PHOTO_MODELS)} in constants.py')
    check_rate("HVIT_DROP_PATH", drop_path)
    if dropout is not None:
        check_rate("HVIT_DROPOUT", dropout)
        if word.startswith(("hvit", "resnet")):
            raise UserError(f"HVIT_DROPOUT = {dropout}: {word} has no dropout; set it to -1")
    if word.startswith("hvit"):
        return HViT(word.removeprefix("hvit_"), num_classes, drop_path=drop_path,
                    spectral_channels=spectral_channels, dfca=dfca, dfca_heads=dfca_heads,
                    dfca_dropout=dfca_dropout, checkpoint_activations=checkpoint_activations)
    if spectral_channels or dfca:
        raise UserError(f"HVIT_SPECTRAL_CHANNELS = {spectral_channels}, HVIT_DFCA = {dfca}: {word} reads "
                        "colour images alone; set them to 0 and False, or HVIT_MODEL to hvit_small")
    options = {} if dropout is None else {"dropout": dropout}
    network, head_name, stages = build_network(word, drop_path, num_classes=num_classes or 1, **options)
    return TorchvisionNet(network, head_name, stages, num_classes > 0, checkpoint_activations)


def build_network(word, drop_path, **options):
    """torchvision's network of that name, the name of its classifier, and its layers in order."""
    if word in RESNETS:
        return getattr(torchvision.models, word)(weights=None, **options), "fc", RESNET
    if word == "swin_t":                                       # torchvision's function fixes the drop path
        return torchvision.models.SwinTransformer(
            [4, 4], 96, [2, 2, 6, 2], [3, 6, 12, 24], [7, 7], stochastic_depth_prob=drop_path,
            **options), "head", SWIN
    network = getattr(torchvision.models, word)(weights=None, stochastic_depth_prob=drop_path, **options)
    use_fast_layers(network.features)
    return network, "classifier", EFFICIENTNET


def load_torchvision_weights(model, path):
    """Fill all but the head from local weights of torchvision's names, such as resnet50-11ad3fa6.pth.

    Hugging Face's ResNet and EfficientNet and timm's have these names once they are read.
    Returns (matched, unmatched): names of the network that were filled, and names of the file that have no
    use here, its head.  Raises UserError for a missing file, the file of another network, and a hierarchical
    ViT, of which torchvision has none; BadFile for one that is not a state dict.
    """
    if isinstance(model, HViT):
        raise UserError("HVIT_WEIGHTS is for torchvision's networks; start the hierarchical ViT from another "
                        'run with --init, and set HVIT_WEIGHTS to ""')
    return fill(model.network, read_tensors(path, "HVIT_WEIGHTS"), path, "HVIT_WEIGHTS", "HVIT_MODEL")


def layer_groups(model):
    """Names of the parameters in six lists: what reads the image, four stages, head; the same for each word.

    For learning rates that fall towards the input, and for freezing the first groups.  A model without a head
    has an empty last list.
    """
    model = unwrap(model)
    names = [name for name, _ in model.named_parameters()]
    return [[name for name in names if f"{name}.".startswith(tuple(f"{part}." for part in parts))]
            for parts in model.parts]
