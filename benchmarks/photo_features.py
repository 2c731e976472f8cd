"""What frozen features know of held-out photographs: SimCLR's, and those of the same network before training.

    python benchmarks/photo_features.py --checkpoint runs/leaves_*/simclr_last.pt --data leaf

A linear and a kNN probe are fitted on the training and validation photographs of a run's own splits
(splits.csv beside its checkpoint) and judged on its test photographs, which pretraining has not seen: a row
for each checkpoint, then mean and standard deviation over them.  "8 x 8 pixels" are the photographs
themselves, shrunk: what a network that knows nothing could still pass on.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

import constants as C
from builders import build_item_loader, build_photo_network, photo_set
from datasets.photo_splits import split_photos
from datasets.photos import find_photos
from utils.checkpoint import load_backbone, load_checkpoint
from utils.config import UserError, restore_constants, run_script
from utils.photo_probe import probe_photos


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, nargs="+", help="simclr_*.pt, one for each seed")
    parser.add_argument("--data", required=True, help="photographs in a folder per class, or a CSV")
    return parser.parse_args()


def judge(path, data):
    """{what gave the features: figures of its probes} of one run."""
    checkpoint = load_checkpoint(path)
    if checkpoint["kind"] != "simclr":
        raise UserError(f"{path}: a checkpoint of kind {checkpoint['kind']}; this file judges simclr")
    restore_constants(C, checkpoint["constants"])
    photos, classes, _ = find_photos(data, True)
    splits = split_photos(photos, classes, C.HVIT_VAL_FRACTION, C.HVIT_TEST_FRACTION,
                          path=Path(path).with_name("splits.csv"))
    loaders = [build_item_loader(photo_set(part, False), C.HVIT_BATCH_SIZE, False)
               for part in (splits["train"] + splits["val"], splits["test"])]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(C.SEED)
    model = build_photo_network(0, start=False).to(device).eval()
    encoders = {"8 x 8 pixels": lambda images: F.adaptive_avg_pool2d(images, 8).flatten(1), "random": model}
    found = {name: probe_photos(encode, *loaders, C.HVIT_IMG_SIZE, device, C.PRECISION)
             for name, encode in encoders.items()}
    load_backbone(model, path, "backbone.")
    return found | {"SimCLR": probe_photos(model, *loaders, C.HVIT_IMG_SIZE, device, C.PRECISION)}


def main():
    args = parse_args()
    rows = {}
    for path in args.checkpoint:
        for name, figures in judge(path, args.data).items():
            figures_text = "  ".join(f"{key} {value:.3f}" for key, value in figures.items())
            print(f"{path:40s} {name:12s} {figures_text}", flush=True)
            rows.setdefault(name, []).append(list(figures.values()))
    for name, values in rows.items():
        values = np.array(values)
        print(f"{'mean and deviation of ' + str(len(values)):40s} {name:12s} " + "  ".join(
            f"{key} {mean:.3f} +- {std:.3f}" for key, mean, std in zip(
                figures, values.mean(0), values.std(0, ddof=min(1, len(values) - 1)), strict=True)))


if __name__ == "__main__":
    run_script(main)
