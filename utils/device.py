"""Batches on the device, and mixed precision by a word of constants.py."""

import torch

from utils.config import UserError
from utils.distributed import say

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device, precision):
    """torch.autocast for "fp32" (off) | "bf16" | "fp16" on a torch.device.  UserError: another word."""
    if precision not in DTYPES:
        raise UserError(f"PRECISION={precision}: allowed are {', '.join(DTYPES)}")
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def gradient_scaler(device, precision):
    """torch.amp.GradScaler, which is at work with "fp16" alone; says that this is slow on a CPU."""
    if precision == "fp16" and device.type == "cpu":
        say("PRECISION=fp16 is many times slower than bf16 on a CPU: --set PRECISION=bf16")
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def to_device(batch, device, stay=()):
    """A dict of a batch with its tensors on ``device``; those named in ``stay``, and other entries, stay."""
    return {key: value.to(device, non_blocking=True) if torch.is_tensor(value) and key not in stay else value
            for key, value in batch.items()}
