"""Networks of slices by the kind of task, and their outputs by name."""

from models.multitask import MultiTask
from models.resnet import RESNETS, SliceResNet
from models.unet import UNet
from utils.config import UserError

KINDS = ("classify", "segment", "multitask")


def mask_channels(names):
    """Logits of a pixel: one for a single mask class; of several one for each, and the background's first."""
    return len(names) + (len(names) > 1)


def build_slice_model(kind, names, mask_names, encoder, weighting="fixed", weights=(1.0, 1.0),
                      checkpoint_activations=False, **unet):
    """The network of a kind in KINDS: a SliceResNet, a UNet, or a MultiTask, with random weights.

    names: of the classes; mask_names: of the masks' values 1, 2, ...; weighting, weights: of MultiTask; unet:
    further options of UNet.  Raises UserError for options that no network has.
    """
    if kind == "classify":
        if encoder not in RESNETS:
            raise UserError(f'SPINE_ENCODER = "{encoder}": classes need one of {", ".join(RESNETS)}')
        return SliceResNet(encoder, len(names), checkpoint_activations)
    unet = {**unet, "encoder": encoder, "num_classes": mask_channels(mask_names),
            "checkpoint_activations": checkpoint_activations}
    if kind == "segment":
        return UNet(**unet)
    return MultiTask(label_classes=len(names), weighting=weighting, weights=weights, **unet)


def named_outputs(kind, outputs):
    """What a network of that kind gives, by name: dict of

    "labels" logits [B, K]; "masks" logits [B, C, S, S]; "terms" [2, 2], see models.multitask.
    """
    if kind == "multitask":
        return dict(zip(("masks", "labels", "terms"), outputs, strict=True))
    return {"labels" if kind == "classify" else "masks": outputs}


def encoder_of(model):
    """The part that reads the slice: the encoder, or the whole of a classifier."""
    return getattr(model, "encoder", model)
