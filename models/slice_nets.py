"""Networks of slices by the kind of task, their outputs by name, and their start from another run."""

from models.multitask import MultiTask
from models.resnet import RESNETS, SliceResNet
from models.unet import UNet
from utils.checkpoint import load_backbone
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


def load_slice_weights(model, path, remove_prefix="", optional=()):
    """Start a network from a run of any kind: its encoder, and the rest as far as that run has it.

    Returns (matched, unmatched): names of the network.  optional: as for ``load_backbone``, of the encoder.
    Raises UserError when less than 90 % of the encoder is found, and BadFile for an unreadable file.
    """
    encoder = encoder_of(model)
    matched, unmatched = load_backbone(encoder, path, remove_prefix or "encoder.", optional=optional)
    if encoder is model:
        return matched, unmatched
    rest, missing = load_backbone(model, path, remove_prefix, minimum=0.0)
    matched = {f"encoder.{name}" for name in matched} | set(rest)
    return sorted(matched), [name for name in missing if name not in matched]
