"""Peak memory of infer_vista3d.py, in processes of their own: flat in depth, and against MONAI.

    python benchmarks/inference_memory.py

ours    the script itself with a network of 16 classes and 16 embedding channels that costs nothing, windows
        of 32 x 128 x 128 at half their size, uint8 volumes in HDF5
peer    MONAI's sliding_window_inference of the same network's 32 channels, 4 windows at once
Takes some 15 minutes on two cores; the peak is the largest resident set of the process, libraries included.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).parents[1]))

PATCH, CHANNELS = (32, 128, 128), 16
LARGE, LEAST_RATIO, LIMIT_GB, FLAT = (1024, 1024), 4.0, 3.0, 0.05


class Cheap(nn.Module):
    """An image as class logits and as embedding: two convolutions of one voxel."""

    def __init__(self):
        super().__init__()
        self.semantic, self.instance = (nn.Conv3d(1, CHANNELS, 1) for _ in range(2))

    def forward(self, image):
        """[B, 1, D, H, W] -> dict of [B, 16, D, H, W]."""
        return {"semantic": self.semantic(image), "embedding": self.instance(image)}


def write_volume(path, shape):
    """Smooth blobs, uint8, section by section."""
    y, x = np.meshgrid(*(np.arange(n) / 20 for n in shape[1:]), indexing="ij")
    with h5py.File(path, "w") as file:
        volume = file.create_dataset("main", shape, np.uint8, chunks=(8, 128, 128))
        volume.attrs["resolution"] = (30.0, 6.0, 6.0)
        for z in range(shape[0]):
            volume[z] = (127 + 100 * np.sin(y + z / 5) * np.cos(x)).astype(np.uint8)


def run_ours(folder, words):
    """Call the script's main with the cheap network."""
    import infer_vista3d
    from utils.checkpoint import save_checkpoint
    torch.manual_seed(0)
    save_checkpoint(folder / "cheap.pt", kind="vista3d", model_state_dict=Cheap().state_dict(), constants={})
    infer_vista3d.build_model = Cheap
    sys.argv = ["infer_vista3d.py", "--checkpoint", str(folder / "cheap.pt"), "--input",
                str(folder / "volume.h5"), "--output", str(folder / "out.h5"), "--patch-size",
                *map(str, PATCH), *words]
    infer_vista3d.main()


def run_monai(folder):
    """The volume as float32 through sliding_window_inference."""
    from monai.inferers import sliding_window_inference
    with h5py.File(folder / "volume.h5") as file:
        image = torch.from_numpy(file["main"][()].astype(np.float32))[None, None] / 255
    network = Cheap()
    with torch.inference_mode():
        sliding_window_inference(image, PATCH, 4, lambda x: torch.cat(list(network(x).values()), 1),
                                 overlap=0.5, mode="gaussian")


def peak_gb(side, shape, words=()):
    """Peak resident memory of one side in a fresh process, GB (1e9 bytes)."""
    with tempfile.TemporaryDirectory() as folder:
        write_volume(Path(folder) / "volume.h5", shape)
        done = subprocess.run([sys.executable, __file__, "--side", side, "--folder", folder, *words],
                              capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        peak = float(done.stdout.splitlines()[-1])
    print(f"{side:6s} {' x '.join(map(str, shape)):18s} {' '.join(words):18s} {peak:.2f} GB", flush=True)
    return peak


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=["ours", "monai"], help="inside the processes that are measured")
    parser.add_argument("--folder", type=Path, help="the same")
    args, words = parser.parse_known_args()
    if args.side:
        run_ours(args.folder, words) if args.side == "ours" else run_monai(args.folder)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
        return
    deep, shallow = (peak_gb("ours", (depth, *LARGE), ["--output-classes"]) for depth in (256, 128))
    assert deep < LIMIT_GB and abs(deep - shallow) < FLAT * shallow
    deep, shallow = (peak_gb("ours", (depth, 256, 256)) for depth in (128, 64))
    assert abs(deep - shallow) < FLAT * shallow
    ours = peak_gb("ours", (128, 512, 512), ["--output-classes"])
    ratio = peak_gb("monai", (128, 512, 512)) / ours
    assert ratio >= LEAST_RATIO
    print(f"ratio: {ratio:.2f} (peer / ours, peak memory, median of 1)")


if __name__ == "__main__":
    main()
