"""Seconds and memory of a training step of the full-size chest X-ray network: B7, ViT-Base, 512 px, batch 2.

    python benchmarks/longitudinal_step.py --n 3

ours    bfloat16 autocast, channels_last, fused AdamW, the layers of models/efficientnet.py
flags   the same precision, format and optimizer with torchvision's own layers
peer    the same network with torchvision's own layers in contiguous float32 with torch's default AdamW

A step is forward, L1 + L2 + soft Dice, backward, clipping, AdamW, EMA.  Every step starts from the same
weights, so the losses must agree.  Peak memory is that of our step in a process of its own.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from losses.image import l1_loss, l2_loss, soft_dice_loss
from models.depthwise import DepthwiseConv2d
from models.efficientnet import SpatialMean
from models.longitudinal_mim import LongitudinalMIMModelBig
from utils.ema import EMA
from utils.optim import build_optimizer, parameter_groups

MEMORY_LIMIT_GB = 12


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=3, help="timed rounds (default: %(default)s)")
    parser.add_argument("--efficientnet", default="b7")
    parser.add_argument("--vit", default="base")
    parser.add_argument("--size", type=int, default=512, help="pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=2, help="pairs (default: %(default)s)")
    parser.add_argument("--memory", action="store_true", help="only two of our steps; print the peak in GB")
    return parser.parse_args()


def build_model(args):
    """The network without dropout and with a head as large as a trained one's, to compare losses."""
    torch.manual_seed(0)
    model = LongitudinalMIMModelBig(args.efficientnet, args.vit, drop=0.0)
    torch.nn.init.normal_(model.head[-1].weight, std=0.05)
    return model


def build_batch(args):
    """(prior, current, diff): diff is zero but for a disc of 0.3."""
    generator = torch.Generator().manual_seed(0)
    prior, current = torch.rand(2, args.batch, 1, args.size, args.size, generator=generator)
    line = torch.linspace(-1, 1, args.size)
    disc = (line[:, None] ** 2 + line ** 2 < 0.1).float()
    return prior, current, 0.3 * disc.expand_as(prior)


def set_layers(model, own):
    """Compute the encoder's layers as models/efficientnet.py does (own) or as torchvision does."""
    for layer in model.encoder.modules():
        if isinstance(layer, torch.nn.SiLU):
            layer.inplace = not own
        elif isinstance(layer, DepthwiseConv2d | SpatialMean):
            vars(layer).pop("forward", None)
            if not own and isinstance(layer, DepthwiseConv2d):
                layer.forward = torch.nn.Conv2d.forward.__get__(layer)
            elif not own:
                layer.forward = torch.nn.AdaptiveAvgPool2d.forward.__get__(torch.nn.AdaptiveAvgPool2d(1))


def set_up(model, name):
    """Bring the one network into the memory format and layers of a variant."""
    model.to(memory_format=torch.contiguous_format if name == "peer" else torch.channels_last)
    set_layers(model, own=name == "ours")


def build_optimizer_of(model, name):
    if name == "peer":
        return torch.optim.AdamW(model.parameters(), 6e-4, weight_decay=1e-2)
    return build_optimizer("adamw", parameter_groups(model, 1e-2, False), 6e-4, 1e-2)


def train_step(model, optimizer, ema, batch, bfloat16):
    """One step; returns (loss, seconds)."""
    prior, current, diff = batch
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        pred = model(prior, current)
    loss = l1_loss(pred, diff) + l2_loss(pred, diff) + soft_dice_loss(pred, diff)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    ema.update()
    return loss.item(), time.perf_counter() - start


def measure_memory(args):
    """Peak resident memory in GB of a process that takes two of our steps."""
    model = build_model(args).to(memory_format=torch.channels_last)
    optimizer, ema, batch = build_optimizer_of(model, "ours"), EMA(model, 0.999), build_batch(args)
    for _ in range(2):
        train_step(model, optimizer, ema, batch, bfloat16=True)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main():
    args = parse_args()
    if args.memory:
        print(measure_memory(args))
        return
    command = [sys.executable, *sys.argv, "--memory"]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    peak = float(child.stdout.split()[-1])
    print(f"peak memory of our step: {peak:.1f} GB (limit {MEMORY_LIMIT_GB})", flush=True)

    model, batch = build_model(args), build_batch(args)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    variants, losses, seconds = {}, {}, {"ours": [], "flags": [], "peer": []}
    for i in range(args.n + 1):                                        # the first round warms up
        for name, times in seconds.items():
            set_up(model, name)
            model.load_state_dict(weights)
            if name not in variants:                               # in the format that the network has now
                variants[name] = build_optimizer_of(model, name), EMA(model, 0.999)
            losses[name], elapsed = train_step(model, *variants[name], batch, bfloat16=name != "peer")
            times += [elapsed] if i else []
            print(f"round {i} {name:6s} {elapsed:6.2f} s  loss {losses[name]:.4f}", flush=True)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    assert all(abs(loss - losses["peer"]) < 0.02 * losses["peer"] for loss in losses.values()), losses
    assert peak < MEMORY_LIMIT_GB, f"{peak:.1f} GB"
    print("seconds per step: " + ", ".join(f"{name} {value:.2f}" for name, value in medians.items()))
    print(f"under the same precision, format and optimizer: {medians['flags'] / medians['ours']:.2f} times")
    print(f"ratio: {medians['peer'] / medians['ours']:.2f} (peer / ours, median of {args.n})")


if __name__ == "__main__":
    main()
