"""A training step of the U-Net at 320 px, batch 16, against MONAI's BasicUNet of the same widths.

    python benchmarks/unet_step.py --n 10

ours      bfloat16 autocast, channels_last, fused AdamW
flags     MONAI's network under the same autocast, memory format and optimizer
plain     MONAI's network in float32, torch's default Adam

A step is forward, soft Dice, backward and optimizer; the loss is one function for all three.  MONAI's network
has the widths f, 2f, 4f, 8f, 16f, f, batch norm and ReLU, as ours; its finest transposed convolution keeps
all 2f channels where ours halves them.  With zeros in those channels it computes what ours does, which is
checked before the clock starts.  ``halved`` is MONAI's network without that difference, as DynUNet and most
U-Nets are built: layer for layer ours, under the same flags.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from monai.networks.nets import BasicUNet
from monai.networks.nets.basic_unet import UpCat

sys.path.insert(0, str(Path(__file__).parents[1]))

from losses.slices import mask_loss
from models.unet import UNet
from utils.optim import build_optimizer, parameter_groups

LR, WEIGHT_DECAY = 1e-3, 1e-4


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=10, help="timed rounds (default: %(default)s)")
    parser.add_argument("--size", type=int, default=320, help="pixels (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="slices (default: %(default)s)")
    parser.add_argument("--features", type=int, default=16, help="f (default: %(default)s)")
    return parser.parse_args()


def build_data(args):
    """images float32 [B, 1, S, S] of smooth noise, and masks int64 [B, S, S] of where it is bright."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(args.batch, 1, 20, 20, generator=generator)
    images = F.interpolate(noise, (args.size, args.size), mode="bicubic").clamp(0, 1)
    return images, (images[:, 0] > 0.7).long()


@torch.no_grad()
def build_peer(ours, f, halved=False):
    """MONAI's network with the weights of ours, and zeros where it has more of them."""
    widths, options = (f, 2 * f, 4 * f, 8 * f, 16 * f, f), {"act": "relu", "norm": "batch", "bias": False}
    peer = BasicUNet(2, 1, 1, widths, **options)
    if halved:
        peer.upcat_1 = UpCat(2, 2 * f, f, f, **options)
    state = {name: torch.zeros_like(value) for name, value in peer.state_dict().items()}
    names = [name for name in state if not name.endswith("deconv.bias")]
    for name, value in zip(names, ours.state_dict().values(), strict=True):
        state[name][tuple(slice(n) for n in value.shape)] = value
    peer.load_state_dict(state)
    return peer


def build_step(network, images, masks, fast):
    """A function that takes one step and returns its loss."""
    network = copy.deepcopy(network)
    if fast:
        network = network.to(memory_format=torch.channels_last)
        optimizer = build_optimizer("adamw", parameter_groups(network, WEIGHT_DECAY, False), LR, WEIGHT_DECAY)
    else:
        optimizer = torch.optim.Adam(network.parameters(), LR)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            logits = network(images)
        loss = mask_loss("dice", logits, masks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def check(ours, peers, images, masks):
    """The same logits, loss and gradients from the same weights."""
    def results(network):
        network = copy.deepcopy(network)
        logits = network(images[:2])
        loss = mask_loss("dice", logits, masks[:2])
        first = next(network.parameters())                      # the last that the backward pass reaches
        return logits.detach(), loss.detach(), torch.autograd.grad(loss, first)[0]

    expected = results(ours)
    for peer in peers:
        for mine, theirs in zip(expected, results(peer), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def measure(functions, rounds):
    """{name: median seconds} of functions, called in turns; the first round warms up."""
    seconds = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name in list(functions)[::1 if i % 2 else -1]:
            start = time.perf_counter()
            functions[name]()
            seconds[name] += [time.perf_counter() - start] if i else []
    return {name: statistics.median(values) for name, values in seconds.items()}


def main():
    args = parse_args()
    torch.manual_seed(0)
    images, masks = build_data(args)
    ours = UNet(features=args.features)
    peer, halved = (build_peer(ours, args.features, flag) for flag in (False, True))
    check(ours, (peer, halved), images, masks)

    fast = {"ours": ours, "flags": peer, "halved": halved}
    steps = {name: build_step(network, images, masks, True) for name, network in fast.items()}
    seconds = measure({**steps, "plain": build_step(peer, images, masks, False)}, args.n)
    print("seconds per step: " + ", ".join(f"{name} {value:.2f}" for name, value in seconds.items()))
    print(f"under the same flags: {seconds['flags'] / seconds['ours']:.2f} times as long as ours, "
          f"{seconds['halved'] / seconds['ours']:.2f} times with MONAI's finest level halved")
    print(f"ratio: {seconds['plain'] / seconds['ours']:.2f} (peer / ours, median of {args.n})")


if __name__ == "__main__":
    main()
