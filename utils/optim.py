"""Optimizers by a word, with torch's fastest implementation for the device."""

import torch
from torch.distributed.tensor import DTensor

from utils.config import UserError

OPTIMIZERS = ("sgd", "adam", "adamw")


def parameter_groups(model, weight_decay, exclude_norm_bias, no_decay_names=(), names=None):
    """Trainable parameters as a list of groups, each {"params": list, "weight_decay": float}.

    exclude_norm_bias: parameters with fewer than two dimensions (biases, normalisation layers) do not decay.
    no_decay_names: words; a parameter whose name holds one, such as "mask_token", does not decay either.
    names: of the parameters that count; None: all.
    """
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or names is not None and name not in names:
            continue
        exempt = exclude_norm_bias and parameter.ndim <= 1 or any(word in name for word in no_decay_names)
        (free if exempt else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def drop_frozen_(optimizer, epoch):
    """Forget the gradients of groups that are frozen in ``epoch``: those whose "from_epoch" comes later.

    Without a gradient a parameter is neither stepped nor decayed, and does not count in the gradient's norm.
    Every rank and every strategy computes them all the same, so nothing waits for a part that is missing.
    """
    for group in optimizer.param_groups:
        if epoch < group.get("from_epoch", 1):
            for parameter in group["params"]:
                parameter.grad = None


def build_optimizer(name, groups, lr, weight_decay, betas=(0.9, 0.999), momentum=0.9):
    """torch's SGD, Adam or AdamW over ``groups``.

    weight_decay: of groups that set none; for "adam" it is an L2 term in the gradient, for "adamw" decoupled
    (Loshchilov & Hutter 2019, arXiv:1711.05101).  betas: "adam", "adamw".  momentum: "sgd".
    Raises UserError for another word.
    """
    fused = _can_fuse(name, groups)
    if name == "sgd":
        return torch.optim.SGD(groups, lr, momentum=momentum, weight_decay=weight_decay, fused=fused)
    if name == "adam":
        return torch.optim.Adam(groups, lr, tuple(betas), weight_decay=weight_decay, fused=fused)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr, tuple(betas), weight_decay=weight_decay, fused=fused)
    raise UserError(f"OPTIMIZER = {name!r}: unknown; use one of {', '.join(OPTIMIZERS)}")


def _can_fuse(name, groups):
    """Whether torch has a fused kernel for all parameters: one pass over memory instead of many.

    On the CPU it is several times faster than the plain loop, and the foreach form is slower than the loop.
    Sharded parameters (DTensor) have fused Adam and AdamW, no fused SGD; None leaves the choice to torch.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    on_device = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
    return True if on_device and not (sharded and name == "sgd") else None
