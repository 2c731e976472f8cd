"""Segment a volume of any size: instances, classes or class probabilities of electron microscopy.

    python infer_vista3d.py --checkpoint runs/neurons/vista3d_best.pt --input data/snemi3d/AC3_inputs.h5 \\
        --output predictions/AC3.h5 --patch-size 64 128 128 --aggregation gaussian
    python infer_vista3d.py --checkpoint PATH --input volume.tif --output neurons.zarr --class-id 1
    python infer_vista3d.py --checkpoint PATH --input volume.nii.gz --output probs.h5 --output-probs
    torchrun --nproc_per_node=4 infer_vista3d.py --checkpoint PATH --input volume.zarr --output out.zarr

Reads and writes HDF5, TIFF, NIfTI, OME-Zarr.  Beside the output: <output>_instances.csv, and <output>.png of
three slices.  The same command goes on where it was interrupted: what is finished is in <output>.parts.
"""

import argparse
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import constants as C
from datasets.em_files import intensity_range, open_volume, scale
from datasets.em_labels import BOUNDARY, CLASSES, INSTANCE_CLASSES
from datasets.em_writers import check_output, create_volume
from train_vista3d import KIND, build_model
from utils.agglomeration import segment
from utils.checkpoint import digest_of, load_checkpoint
from utils.config import UserError, restore_constants, run_script
from utils.device import autocast
from utils.distributed import barrier, cleanup, is_main, rank, say, setup_distributed, world_size
from utils.em_pictures import orthogonal_slices
from utils.object_table import ObjectTable
from utils.parts import Parts
from utils.sliding_window import predict_slabs, window_starts
from utils.states import load_trained
from utils.stitching import Block, Grid, paint_row, stitch
from utils.tta import mirror_mean

MODES = {"instances": np.uint32, "classes": np.uint8, "probs": np.float16}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="a vista3d_*.pt")
    add("--input", required=True, type=Path, metavar="PATH",
        help="volume: .h5, .tif, .nii, .nii.gz, .zarr, or a folder of images")
    add("--output", required=True, type=Path, metavar="PATH", help="file to write; its ending is its kind")
    add("--input-key", help="array in an HDF5 or Zarr file (default: the only one, main, volumes/raw, raw)")
    add("--output-key", default="segmentation", help="the same, to write (default: %(default)s)")
    add("--patch-size", type=int, nargs=3, metavar=("D", "H", "W"), help="window (default: as in training)")
    add("--stride", type=int, nargs=3, metavar=("D", "H", "W"), help="of the windows (default: half of them)")
    add("--aggregation", default="gaussian", choices=["gaussian", "average", "max"],
        help="how windows share a voxel's class probabilities (default: %(default)s)")
    add("--tta", action="store_true", help="mean class probabilities of all mirror images: 8 times the work")
    add("--batch-size", type=int, default=4, help="windows at a time (default: %(default)s)")
    add("--class-id", type=int, metavar="N", help="instances of this class alone (default: of all): "
        + ", ".join(f"{number} {CLASSES[number]}" for number in INSTANCE_CLASSES))
    add("--output-probs", action="store_true", help=f"class probabilities instead: {', '.join(CLASSES)}")
    add("--output-classes", action="store_true", help="the most probable class of each voxel instead")
    add("--bandwidth", type=float, default=0.5, help="radius of a cluster (default: %(default)s)")
    add("--merge-threshold", type=float, default=0.5, metavar="IOU",
        help="that makes instances of two windows one, where both saw them (default: %(default)s)")
    add("--min-instance-size", type=int, default=50, metavar="VOXELS", help="(default: %(default)s)")
    add("--grow", type=float, default=20.0, metavar="NM", help="into the boundary (default: %(default)s)")
    add("--spacing-nm", type=float, nargs=3, metavar=("D", "H", "W"), help="voxel size (default: the file's)")
    add("--device", help='such as "cpu" (default: a GPU where there is one)')
    args = parser.parse_args()
    if args.output_probs and args.output_classes:
        raise UserError("--output-probs and --output-classes exclude each other")
    if args.class_id is not None and args.class_id not in INSTANCE_CLASSES:
        raise UserError(f"--class-id {args.class_id}: instances exist of {INSTANCE_CLASSES}; "
                        "--output-classes and --output-probs have all")
    if args.batch_size < 1 or args.min_instance_size < 1 or args.grow < 0 or args.bandwidth <= 0 \
            or not 0 < args.merge_threshold <= 1 or min(args.spacing_nm or [1]) <= 0:
        raise UserError("--batch-size and --min-instance-size: 1 or more; --bandwidth and --spacing-nm: "
                        "above 0; --grow: 0 or more; --merge-threshold: above 0, at most 1")
    args.mode = "probs" if args.output_probs else "classes" if args.output_classes else "instances"
    return args


def choose_windows(args, shape):
    """(patch, stride, Grid of the blocks of instances or None) for a volume [D, H, W]."""
    patch = list(args.patch_size or C.VISTA_PATCH_SIZE)
    if C.VISTA_SLICES:
        patch[0] = 1                                         # such a network sees one section at a time
    stride = args.stride or [max(1, size // 2) for size in patch]
    if min(*patch, *stride) < 1 or any(step > size for step, size in zip(stride, patch, strict=True)):
        raise UserError(f"--stride {stride}: from 1 to the window, {patch}")
    if args.mode != "instances":
        return patch, stride, None
    margin = [max(1, (size - step) // 4) for size, step in zip(patch, stride, strict=True)]
    return patch, stride, Grid(shape, patch, stride, margin)


def build_predict(model, device, tta=False):
    """images [B, 1, D, H, W] in [0, 1] -> (probabilities [B, 5, D, H, W], embedding [B, E, D, H, W])."""
    @torch.inference_mode()
    def predict(images):
        with autocast(device, C.PRECISION):
            outputs = model(images[:, :, 0] if C.VISTA_SLICES else images)
        logits, embedding = outputs["semantic"][:, :len(CLASSES)], outputs["embedding"]
        if C.VISTA_SLICES:
            logits, embedding = logits[:, :, None], embedding[:, :, None]
        if not (logits.isfinite().all() and embedding.isfinite().all()):
            raise UserError("the network gives values that are not finite; use another checkpoint")
        # Classes last: softmax over the second axis would copy what lies in channels_last.
        return logits.movedim(1, -1).softmax(-1, dtype=torch.float32).movedim(-1, 1), embedding

    return partial(mirror_mean, predict) if tta else predict


def open_parts(args, volume, patch, stride):
    """The folder of what is finished, for these settings alone."""
    words = ("mode", "aggregation", "class_id", "bandwidth", "min_instance_size", "grow", "spacing_nm", "tta")
    settings = {"input": str(args.input.resolve()), "input_key": volume.key, "shape": volume.shape,
                "checkpoint": digest_of(args.checkpoint), "patch": patch, "stride": stride,
                **{word: getattr(args, word) for word in words}}
    if is_main():
        Parts(f"{args.output}.parts", settings)
    barrier()
    return Parts(f"{args.output}.parts", settings)


def run_windows(volume, predict, patch, stride, grid, args, parts, device):
    """Write this rank's parts: slabs of classes or probabilities, and the instances of each window.

    A rank owns rows of windows that follow each other, a row being those that begin at one section.  Rows
    that reach in from before are computed again, so that any number of ranks adds up the same windows.
    """
    rows = window_starts(volume.shape[0], patch[0], stride[0])
    own = np.array_split(rows, world_size())[rank()].tolist()
    if not own:
        return
    start, end = own[0], min((z for z in rows if z > own[-1]), default=volume.shape[0])
    done = dict(parts.slabs())
    while start in done:
        start = done[start]
    low, high = intensity_range(volume)
    chosen = INSTANCE_CLASSES if args.class_id is None else (args.class_id,)
    whole = all(size >= n for size, n in zip(patch, volume.shape, strict=True))      # else ends may be all
    least = args.min_instance_size if whole else max(1, args.min_instance_size // 8)  # that a window sees

    def keep_block(index, corner, outputs):
        """The instances of one window, without the rim that its neighbours see better."""
        if args.mode == "instances" and window_name(index) not in parts:
            ids, class_of = segment(*outputs, chosen, C.VISTA_BOUNDARY, args.bandwidth, least, args.grow,
                                    args.spacing_nm)
            rim = tuple(slice(part.start - first, part.stop - first)
                        for part, first in zip(grid.block(index), corner, strict=True))
            parts.save(window_name(index), ids=ids[rim], class_of=class_of)

    def finish(probabilities):
        """What is kept of them."""
        return (probabilities.half() if args.mode == "probs" else
                probabilities.argmax(0, keepdim=True).to(torch.uint8))

    slabs = predict_slabs(volume, predict, patch, stride, channels=len(CLASSES), aggregation=args.aggregation,
                          batch_size=args.batch_size, z_range=(start, end), finish=finish,
                          scale=lambda block: scale(block, low, high), on_window=keep_block, device=device)
    with tqdm(total=end - start, desc="sections", disable=None if is_main() else True) as progress:
        for z0, z1, slab in slabs:
            parts.save_slab(z0, z1, slab.cpu().numpy())
            progress.update(z1 - z0)
            if progress.disable and is_main():                           # no terminal, but perhaps a log file
                print(f"Sections {z0} to {z1 - 1} of {volume.shape[0]} finished", flush=True)


def window_name(index):
    """Name of the part with the instances of a window."""
    return "window_" + "_".join(map(str, index))


def paint_instances(grid, args, parts, writer):
    """Stitch the blocks' instances and write them section by section; returns the table of them.

    An instance keeps the voxels whose class, blended of all windows, is its own, and those that it grew into.
    """
    sections = lru_cache(maxsize=1)(parts.sections)            # of the row of blocks that is read

    def read_block(index):
        """A block of the instances, their classes being what the blended probabilities say."""
        z, y, x = grid.block(index)
        part = parts.load(window_name(index))
        ids, classes = part["ids"], sections(z.start, z.stop)[0, :, y, x]
        ids[(classes != part["class_of"][ids]) & (classes != BOUNDARY)] = 0
        return Block(ids, part["class_of"])

    tables = stitch(grid, read_block, args.merge_threshold, args.min_instance_size)
    class_of = np.zeros(1 + max(int(table.max()) for table in tables.values()), np.uint8)
    for index, table in tables.items():
        class_of[table] = parts.load(window_name(index))["class_of"]
    found = ObjectTable(class_of, CLASSES)
    for row in range(grid.size[0]):
        z0, _, labels = paint_row(grid, row, read_block, tables)
        writer.append(labels)
        found.add(labels, z0)
    return found


def write_output(volume, grid, args, parts, spacing_nm):
    """The finished parts as one file, the table of instances, and the picture."""
    channels = len(CLASSES) if args.mode == "probs" else None
    with create_volume(args.output, volume.shape, MODES[args.mode], spacing_nm, args.output_key,
                       channels) as writer:
        if args.mode == "instances":
            found = paint_instances(grid, args, parts, writer)
        else:
            for z0, z1 in parts.slabs():
                values = parts.sections(z0, z1)
                writer.append(values if channels else values[0])
    print(f"Output: {args.output}")
    if args.mode == "instances":
        print(f"{found.write(f'{args.output}_instances.csv')} instances: {args.output}_instances.csv")
        share = found.sums[:, 0].max() / np.prod(volume.shape)
        if share > 0.9:
            print(f"One instance fills {share:.0%} of the volume: the network knows too little; train longer")
    if args.mode != "probs":
        labels = open_volume(args.output, args.output_key if args.output.suffix.startswith(".h") else None)
        Image.fromarray(orthogonal_slices(volume, labels, args.spacing_nm)).save(f"{args.output}.png")
        print(f"Picture: {args.output}.png")


def main():
    args = parse_args()
    device = setup_distributed(args.device)
    checkpoint = load_checkpoint(args.checkpoint, KIND)
    restore_constants(C, checkpoint["constants"])
    check_output(args.output, len(CLASSES) if args.mode == "probs" else None)
    volume = open_volume(args.input, args.input_key)
    spacing_nm = args.spacing_nm or volume.spacing_nm
    args.spacing_nm = tuple(spacing_nm or checkpoint["spacing_nm"])
    if spacing_nm is None:
        say(f"{args.input}: voxel size unknown, --spacing-nm sets it; as in training: {args.spacing_nm} nm")
    patch, stride, grid = choose_windows(args, volume.shape)
    if is_main() and args.output.exists():
        print(f"Replaces {args.output}", flush=True)
    parts = open_parts(args, volume, patch, stride)
    predict = build_predict(load_trained(build_model(), checkpoint, device), device, args.tta)
    run_windows(volume, predict, patch, stride, grid, args, parts, device)
    barrier()
    if is_main():
        write_output(volume, grid, args, parts, spacing_nm)
        parts.remove()
    cleanup()


if __name__ == "__main__":
    run_script(main)
