"""AdamW step and average of the weights of ViT-Base: ours against torch's optimizer and timm's ModelEmaV3.

    python benchmarks/ema_step.py --n 15

peer    torch.optim.AdamW(fused=True) and timm's ModelEmaV3, the fastest forms known; parity is the aim
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
from timm.utils import ModelEmaV3

sys.path.insert(0, str(Path(__file__).parents[1]))

from models.vit import ViT
from utils.ema import EMA
from utils.optim import build_optimizer, parameter_groups

LR, WEIGHT_DECAY, DECAY = 1e-3, 0.01, 0.999


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=15, help="timed rounds (default: %(default)s)")
    args = parser.parse_args()

    torch.manual_seed(0)
    ours = ViT("base", in_channels=3, patch_size=16)
    peer = copy.deepcopy(ours)
    generator = torch.Generator().manual_seed(0)
    for a, b in zip(ours.parameters(), peer.parameters(), strict=True):
        a.grad = torch.randn(a.shape, generator=generator)
        b.grad = a.grad.clone()
    optimizer = build_optimizer("adamw", parameter_groups(ours, WEIGHT_DECAY, False), LR, WEIGHT_DECAY)
    average = EMA(ours, DECAY, warmup=False)
    peer_optimizer = torch.optim.AdamW(peer.parameters(), LR, weight_decay=WEIGHT_DECAY, fused=True)
    peer_average = ModelEmaV3(peer, decay=DECAY)

    def our_step():
        optimizer.step()
        average.update()

    def peer_step():
        peer_optimizer.step()
        peer_average.update(peer)

    seconds = {our_step: [], peer_step: []}
    for i in range(args.n + 2):                                        # the first two rounds warm up
        for step in (our_step, peer_step) if i % 2 else (peer_step, our_step):
            elapsed = timed(step)
            seconds[step] += [elapsed] if i >= 2 else []

    torch.testing.assert_close(list(ours.parameters()), list(peer.parameters()))
    torch.testing.assert_close(average.shadow[0], [p.detach() for p in peer_average.module.parameters()])
    mine, theirs = (statistics.median(seconds[step]) for step in (our_step, peer_step))
    count = sum(parameter.numel() for parameter in ours.parameters())
    print(f"{count / 1e6:.1f} M parameters, equal: ours {1e3 * mine:.1f} ms, peer {1e3 * theirs:.1f} ms")
    print(f"ratio: {theirs / mine:.2f} (peer / ours, median of {args.n})")


if __name__ == "__main__":
    main()
