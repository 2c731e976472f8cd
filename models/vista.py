"""Vista: one network for slices and volumes, a class and an instance embedding for every voxel."""

import torch
import torch.nn as nn

from models.segresnet import CONV, SegResNet, Vista3DEncoder, run_blocks
from models.token_unet import TokenUNet
from utils.config import UserError

ENCODERS = {"vista3d": Vista3DEncoder, "segresnet": SegResNet}


class Vista(nn.Module):
    """A residual U-Net ("encoder") and two heads on its features: classes, and instance embeddings.

    dims: 2 (slices) or 3; encoder: "vista3d" | "segresnet" (see models/segresnet.py) | "token_vit" (volumes
    alone, see models/token_unet.py), which takes ``vit``; features: its width, a multiple of 8 for
    "segresnet"; num_classes, embedding: channels of the two outputs; head_width: channels
    inside a head, a multiple of 8; checkpoint_activations: recompute blocks and heads in the backward pass.
    coordinates: add each voxel's place to the first ``dims`` channels of its embedding, one unit to that many
    voxels; 0: do not.  A convolution answers alike wherever it is, so that two neurites that look alike get
    one embedding; the place sets them apart (Novotny et al. 2018, ECCV, "Semi-convolutional operators").
    Raises UserError for other words and widths.
    """

    def __init__(self, dims=3, encoder="vista3d", features=48, num_classes=16, embedding=16, head_width=64,
                 coordinates=16.0, checkpoint_activations=False, vit=None):
        super().__init__()
        if encoder not in (*ENCODERS, "token_vit"):
            words = ", ".join((*ENCODERS, "token_vit"))
            raise UserError(f'VISTA_ENCODER is "{encoder}"; set it to one of {words}')
        if dims not in CONV:
            raise ValueError(f"dims is {dims}: must be 2 for slices or 3 for volumes")
        if encoder == "token_vit" and dims != 3:
            raise UserError('VISTA_ENCODER = "token_vit" reads volumes alone; set VISTA_SLICES to False')
        widths = {"VISTA_HEAD_WIDTH": head_width}
        if encoder == "segresnet":
            widths["VISTA_FEATURES"] = features
        for name, width in widths.items():
            if width % 8:
                raise UserError(f"{name} is {width}; set it to a multiple of 8, for GroupNorm")
        self.dims, self.coordinates = dims, coordinates
        self.checkpoint_activations = checkpoint_activations
        if encoder == "token_vit":
            self.encoder = TokenUNet(vit, features, checkpoint_activations)
        else:
            self.encoder = ENCODERS[encoder](dims, features, checkpoint_activations)
        self.semantic = head(dims, features, head_width, num_classes)
        self.instance = head(dims, features, head_width, embedding, convolutions=2)

    def forward(self, image):
        """image [B, 1, D, H, W] (dims 2: [B, 1, H, W]) in [0, 1], of any size -> dict of the same size:

        semantic: logits [B, C, ...]; embedding [B, E, ...]; in autocast's type.  Raises UserError for an
        image of other dimensions.
        """
        if image.dim() != self.dims + 2:
            raise UserError(f"images of shape {tuple(image.shape)}: the network takes images of "
                            f"{self.dims + 2} axes; set VISTA_SLICES as it was trained with")
        features = self.encoder(pad_to_multiple(image, self.encoder.multiple))
        features = crop(features, image.shape[2:])
        recompute = self.checkpoint_activations and self.training
        embedding = run_blocks([self.instance], features, recompute)
        if self.coordinates:
            embedding = add_coordinates(embedding, self.coordinates)
        return {"semantic": run_blocks([self.semantic], features, recompute), "embedding": embedding}


def head(dims, features, width, outputs, convolutions=1):
    """Convolutions 3 wide, each with norm and ReLU, and one 1 wide to the outputs.

    GroupNorm, since batches hold one or two crops: a batch's statistics would be noise, and other ones in
    inference.  In groups of 8, since the norm of single channels would erase how much of a class there is.
    """
    layers = []
    for inputs in [features] + [width] * (convolutions - 1):
        layers += [CONV[dims](inputs, width, 3, padding=1, bias=False),
                   nn.GroupNorm(width // 8, width), nn.ReLU()]
    return nn.Sequential(*layers, CONV[dims](width, outputs, 1))


def add_coordinates(embedding, voxels):
    """[B, E, ...] with the place of each voxel, in units of ``voxels``, added to its first channels; float32.

    Places count from the middle; E is at least the number of axes.
    """
    shape = embedding.shape[2:]
    axes = [(torch.arange(size, device=embedding.device) - (size - 1) / 2) / voxels for size in shape]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"))                                 # [dims, ...]
    rest = places.new_zeros(embedding.shape[1] - len(shape), *shape)
    return embedding.float() + torch.cat([places, rest])


def pad_to_multiple(image, multiple):
    """[B, C, ...], each axis lengthened to a multiple by mirroring at its far end, as often as it takes.

    multiple: of all axes, or of each.
    """
    axes = image.dim() - 2
    multiples = multiple if isinstance(multiple, tuple) else axes * (multiple,)
    for axis, size, of in zip(range(2, axes + 2), image.shape[2:], multiples, strict=True):
        if size % of:
            there_and_back = max(2 * size - 2, 1)               # 0 1 2 1 | 0 1 2 1 | ...
            index = torch.arange(-(-size // of) * of, device=image.device) % there_and_back
            image = image.index_select(axis, torch.minimum(index, there_and_back - index))
    return image


def crop(x, shape):
    """The first ``shape`` voxels along the spatial axes of x [B, C, ...]."""
    return x[(..., *(slice(size) for size in shape))]
