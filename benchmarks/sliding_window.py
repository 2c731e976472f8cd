"""A volume to labels by sliding windows: ours against MONAI's sliding_window_inference at its defaults.

    python benchmarks/sliding_window.py --n 3

peer    MONAI, 32 x 64 x 64 windows, overlap 0.5, Gaussian blend, 4 windows at once, float32, then argmax
ours    predict_slabs with the same windows, a network in bfloat16 autocast, channels_last_3d, inference_mode
flags   MONAI with that same network: what of the ratio is due to precision and memory format alone

The network is MONAI's SegResNet with 16 filters and 32 outputs, trained for a few steps on cells of different
brightness: at random weights the two best classes are nearly alike, and agreement would mean nothing.
Beforehand both blends must give the same probabilities in float32.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference
from monai.networks.nets import SegResNet
from scipy.spatial import cKDTree

sys.path.insert(0, str(Path(__file__).parents[1]))

from utils.sliding_window import predict_slabs

SHAPE, PATCH, STRIDE, CLASSES = (64, 128, 128), (32, 64, 64), (16, 32, 32), 32
CELLS, USED = 400, 5                      # of the volume; classes that occur, as in a network with headroom
CROP, RATE = (16, 32, 32), 2e-3           # of training


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=3, help="timed rounds (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="of training (default: %(default)s)")
    return parser.parse_args()


def make_volume(seed):
    """(image float32 in [0, 1], classes int64): Voronoi cells whose brightness tells their class."""
    rng = np.random.default_rng(seed)
    seeds = rng.random((CELLS, 3)) * SHAPE
    cell = cKDTree(seeds).query(np.indices(SHAPE).reshape(3, -1).T)[1].reshape(SHAPE)
    classes = rng.integers(USED, size=CELLS)[cell]
    image = (classes + 0.5) / USED + 0.05 * rng.standard_normal(SHAPE)
    return image.astype(np.float32).clip(0, 1), classes


def train(model, steps):
    """A few steps on random crops of another volume, in place; returns the last loss."""
    image, classes = map(torch.from_numpy, make_volume(1))
    optimizer = torch.optim.AdamW(model.parameters(), RATE, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        corners = [[int(torch.randint(n - p + 1, (), generator=generator))
                    for n, p in zip(SHAPE, CROP, strict=True)] for _ in range(2)]
        crops = [tuple(slice(a, a + p) for a, p in zip(corner, CROP, strict=True)) for corner in corners]
        logits = model(torch.stack([image[crop] for crop in crops])[:, None])
        loss = F.cross_entropy(logits, torch.stack([classes[crop] for crop in crops]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return loss.item()


def set_format(model, fast):
    """Bring the one network into the memory format of a variant."""
    model.to(memory_format=torch.channels_last_3d if fast else torch.contiguous_format)


def main():
    args = parse_args()
    torch.manual_seed(0)
    model = SegResNet(spatial_dims=3, init_filters=16, in_channels=1, out_channels=CLASSES)
    loss = train(model.train(), args.steps)
    model.eval()
    print(f"cross-entropy after {args.steps} steps: {loss:.3f}", flush=True)
    image, _ = make_volume(2)
    tensor = torch.from_numpy(image)[None, None]

    def plain(images):
        return model(images).softmax(1)

    def fast(images):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            logits = model(images.contiguous(memory_format=torch.channels_last_3d))
        logits = logits.movedim(1, -1)                                 # as it lies in memory: twice as fast
        return logits.softmax(-1, dtype=torch.float32).movedim(-1, 1)

    def ours(predict, finish=None):
        slabs = predict_slabs(image, predict, PATCH, STRIDE, channels=CLASSES, finish=finish)
        return torch.cat([slab.clone() for _, _, slab in slabs], 1)

    def monai(predict):
        with torch.no_grad():
            return sliding_window_inference(tensor, PATCH, 4, predict, overlap=0.5, mode="gaussian")[0]

    def to_labels(part):
        return part.argmax(0, keepdim=True).to(torch.uint8)

    set_format(model, fast=False)
    error = (ours(plain) - monai(plain)).abs().max().item()
    print(f"largest difference of the probabilities in float32: {error:.1e}", flush=True)
    assert error < 1e-5

    runs = {"peer": lambda: to_labels(monai(plain)), "flags": lambda: to_labels(monai(fast)),
            "ours": lambda: ours(fast, to_labels)}
    labels, seconds = {}, {name: [] for name in runs}
    for i in range(args.n + 1):                                                # the first round warms up
        for name in runs if i % 2 else reversed(runs):
            set_format(model, fast=name != "peer")
            start = time.perf_counter()
            labels[name] = runs[name]()
            elapsed = time.perf_counter() - start
            seconds[name] += [elapsed] if i else []
            print(f"round {i} {name:6s} {elapsed:6.2f} s", flush=True)
    agreement = (labels["ours"] == labels["peer"]).float().mean().item()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"labels that agree: {100 * agreement:.2f} %; {labels['peer'].unique().numel()} classes occur")
    assert agreement >= 0.995
    print("seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in medians.items()))
    print(f"under the same precision and memory format: {medians['flags'] / medians['ours']:.2f} times")
    print(f"ratio: {medians['peer'] / medians['ours']:.2f} (peer / ours, median of {args.n})")


if __name__ == "__main__":
    main()
