"""How well a checkpoint segments the sections kept for testing, beside two baselines on the same network.

    python benchmarks/em_accuracy.py --checkpoint runs/fib25/vista3d_last.pt --data em
    python benchmarks/em_accuracy.py --checkpoint PATH --data em --patch-size 40 200 200 --grow 1000

The validation and test sections of --data (a folder as train_vista3d.py takes it, with a split for each) are
written to a file of their own and segmented by infer_vista3d.py, with the options that this script does not
know.  Instances of the truth are connected components of the sections, since nothing in them tells that two
pieces are one; of a network of slices (VISTA_SLICES), of each section.  Figures of the test sections:

classes      Dice and IoU of the classes that are annotated
instances    of each annotated class: adapted Rand error, variation of information (bits), F1 at an IoU of .5
watershed    the same of the boundary map, from the maxima of the distance to it (h-maxima)
components   the same of what lies below a threshold of the boundary map, over 50 voxels, grown by watershed
             until they meet; for a class without boundaries, of what lies above a threshold of its map

The baselines' parameters are those of the lowest variation of information on the validation sections, or of
the highest F1 where the truth is sparse.  "best" is what the test sections themselves would have chosen: no
fair figure, but a bound of what the baseline can do.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import cc3d
import edt
import h5py
import numpy as np
from scipy import ndimage
from skimage.morphology import h_maxima
from skimage.segmentation import watershed

sys.path.insert(0, str(Path(__file__).parents[1]))

import constants as C
from datasets.em_crops import merge_labels
from datasets.em_labels import BOUNDARY, CLASSES, INSTANCE_CLASSES, relabel
from datasets.em_sources import find_sources
from datasets.em_writers import create_volume
from utils.checkpoint import load_checkpoint
from utils.config import UserError, restore_constants, run_script
from utils.instance_metrics import Contingency, SemanticMetrics

FIGURES = ("adapted_rand_error", "voi", "voi_split", "voi_merge", "instance_f1")
SMALL = 50                                                # voxels: components below are no objects
DEPTHS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)                 # h of the maxima of the distance
THRESHOLDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)        # of the boundary map
LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)              # of the map of a class


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a vista3d_*.pt")
    parser.add_argument("--data", required=True, metavar="DIR", help="as for train_vista3d.py")
    return parser.parse_known_args()


def segment_source(source, folder, checkpoint, options):
    """What infer_vista3d.py makes of a source: ({word: ids [D, H, W]}, probabilities [5, D, H, W])."""
    image = source.raw[slice(*source.sections)]
    with create_volume(folder / "image.h5", image.shape, image.dtype, source.spacing_nm, "main") as writer:
        writer.append(image)

    def infer(*mode):
        """The output of one run."""
        subprocess.run([sys.executable, Path(__file__).parents[1] / "infer_vista3d.py", "--checkpoint",
                        checkpoint, "--input", folder / "image.h5", "--output", folder / "output.h5",
                        *options, *mode], check=True, stdout=subprocess.DEVNULL)
        with h5py.File(folder / "output.h5") as file:
            return file["segmentation"][:]

    words = [word for word in source.labels if CLASSES.index(word) in INSTANCE_CLASSES]
    return ({word: infer("--class-id", str(CLASSES.index(word))) for word in words},
            infer("--output-probs").astype(np.float32))


def read_truth(source):
    """({word: ids [D, H, W]} of the annotated classes that come in instances, classes [D, H, W])."""
    box = (slice(*source.sections), *(slice(0, size) for size in source.raw.shape[1:]))
    classes, instances, kinds = merge_labels(source, box, C.VISTA_BOUNDARY)
    kinds = kinds[instances]
    return {word: in_blocks(relabel, np.where(kinds == CLASSES.index(word), instances, 0))
            for word in source.labels if CLASSES.index(word) in INSTANCE_CLASSES}, classes


def in_blocks(find, values, *parameters):
    """Ids [D, H, W] of ``find``, in the whole or for a network of slices in each section by itself."""
    if not C.VISTA_SLICES:
        return find(values, *parameters)
    found, count = [], 0
    for section in values:
        ids = np.asarray(find(section[None], *parameters)).astype(np.int64)
        found.append(np.where(ids > 0, ids + count, 0))
        count += int(ids.max(initial=0))
    return np.concatenate(found)


def watershed_instances(boundary, depth):
    """Basins of a boundary map [D, H, W] around the maxima of the distance to it, ``depth`` voxels high."""
    distance = edt.edt(boundary < 0.5, black_border=False)
    distance = ndimage.gaussian_filter(distance, [float(size > 1) for size in boundary.shape])
    seeds = h_maxima(distance, depth).astype(np.uint8)
    return watershed(boundary, cc3d.connected_components(seeds, connectivity=26).astype(np.int32))


def component_instances(boundary, threshold):
    """Components below a threshold of a boundary map [D, H, W], grown until they meet."""
    parts = cc3d.connected_components((boundary < threshold).astype(np.uint8), connectivity=6)
    return watershed(boundary, cc3d.dust(parts, SMALL, connectivity=6).astype(np.int32))


def object_components(probability, threshold):
    """Components above a threshold of the map of a class [D, H, W]."""
    parts = cc3d.connected_components((probability > threshold).astype(np.uint8), connectivity=26)
    return cc3d.dust(parts, SMALL, connectivity=26)


def baselines(word, probabilities):
    """{(name, parameter): ids} of every baseline and parameter."""
    if word == "neuron":
        boundary = probabilities[BOUNDARY]
        return {**{("watershed", depth): in_blocks(watershed_instances, boundary, depth) for depth in DEPTHS},
                **{("components", level): in_blocks(component_instances, boundary, level)
                   for level in THRESHOLDS}}
    return {("components", level): in_blocks(object_components, probabilities[CLASSES.index(word)], level)
            for level in LEVELS}


def scores(ids, truth):
    """The figures of one segmentation."""
    table = Contingency()
    table.add(ids, truth)
    return table.scores()


def badness(word, figures):
    """What is lowest for the best parameter."""
    return figures["voi"] if word == "neuron" else -figures["instance_f1"]


def print_row(name, figures):
    """One line of the table."""
    print(f"{name:32}" + "".join(f"{figures[figure]:>13.3f}" for figure in FIGURES))


def judge(split, checkpoint, options):
    """[({word: ids of ours}, {word: truth}, classes, probabilities, meaning)] of the sources of a split."""
    found = []
    for source in split:
        with tempfile.TemporaryDirectory() as folder:
            ids, probabilities = segment_source(source, Path(folder), checkpoint, options)
        found.append((ids, *read_truth(source), probabilities, source.meaning))
    return found


def main():
    args, options = parse_args()
    restore_constants(C, load_checkpoint(args.checkpoint, "vista3d")["constants"])
    sources = find_sources(args.data, C.VISTA_DATASETS, C.VISTA_VAL_FRACTION, C.VISTA_TEST_FRACTION,
                           C.VISTA_GAP)
    parts = {split: [source for source in sources if source.split == split] for split in ("val", "test")}
    if not all(parts.values()):
        raise UserError(f"{args.data}: needs validation and test sections, set VISTA_TEST_FRACTION or the "
                        "split column of volumes.csv")
    found = {split: judge(part, args.checkpoint, options) for split, part in parts.items()}

    metrics = SemanticMetrics(len(CLASSES), CLASSES)
    for _, _, classes, probabilities, meaning in found["test"]:
        metrics.update(probabilities.argmax(0)[None], classes[None], meaning)
    for name, value in metrics.compute().items():
        print(f"{name:32}{value:>13.3f}")

    for word in found["test"][0][0]:
        results = {split: {} for split in found}                 # (name, parameter): list of figures
        for split, part in found.items():
            for ids, truth, _, probabilities, _ in part:
                for key, made in {("ours", ""): ids[word], **baselines(word, probabilities)}.items():
                    results[split].setdefault(key, []).append(scores(made, truth[word]))
        mean = {split: {key: {name: np.mean([each[name] for each in figures]) for name in FIGURES}
                        for key, figures in part.items()} for split, part in results.items()}
        print(f"\n{word:32}" + "".join(f"{name[:12]:>13}" for name in FIGURES))
        print_row("ours", mean["test"]["ours", ""])
        for name in dict.fromkeys(name for name, _ in mean["test"] if name != "ours"):
            keys = [key for key in mean["test"] if key[0] == name]
            for split, note in (("val", ""), ("test", "best ")):
                key = min(keys, key=lambda key: badness(word, mean[split][key]))
                print_row(f"{note}{name}, {key[1]}", mean["test"][key])


if __name__ == "__main__":
    run_script(main)
