"""Difference maps of pairs of chest X-rays: what is new, and what has resolved, since the prior image.

    python infer_longitudinal.py --checkpoint runs/demo/longitudinal_mim_best.pt --output predictions/demo \\
        --data data/demo/longitudinal/pairs --split test --baseline
    python infer_longitudinal.py --checkpoint runs/real/longitudinal_mim_best.pt --output predictions/one \\
        --prior 2021.dcm --current 2022.png --register --tta 8
    torchrun --nproc_per_node=4 infer_longitudinal.py --checkpoint PATH --output DIR --data DIR

--data holds case folders with prior, current (NIfTI, PNG, JPEG, TIFF, DICOM) and, if it is known, diff_map;
--pairs is a table with the columns prior and current (paths relative to it) and, if wanted, case.
Writes <case>_diff.nii.gz (in the frame of the current image; positive is new, negative resolved, zero where
the prior did not reach), <case>_overlay.png, <case>_uncertainty.nii.gz (--tta), changes.csv, metrics.csv (of
known maps) and bad_files.csv (cases that cannot be used are skipped).
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import constants as C
from datasets.io import letterbox, read_image, undo_letterbox, write_nifti
from datasets.longitudinal import find_pairs, normalise, pair_name, read_map, read_pairs
from datasets.pair_files import list_bad_files
from longitudinal_MIM_training import KIND, build_model
from utils.checkpoint import load_checkpoint
from utils.config import BadFile, UserError, restore_constants, run_script
from utils.device import autocast
from utils.distributed import cleanup, gather, is_main, rank, setup_distributed, world_size
from utils.history import progress_bar
from utils.metrics import DESCRIPTIONS, ChangeMetrics, least_area, list_changes
from utils.overlay import save_overlay
from utils.registration import align, best_baseline
from utils.states import load_trained
from utils.tables import text_table, write_csv
from utils.tta import predict_tta

CHANGES = ("case", "component", "sign", "area_px", "area_fraction", "centroid_row", "centroid_column", "mean")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="a longitudinal_mim_*.pt")
    add("--output", required=True, type=Path, metavar="DIR", help="folder for maps, pictures and tables")
    add("--prior", metavar="FILE", help="earlier image of one pair")
    add("--current", metavar="FILE", help="later image of one pair")
    add("--data", metavar="DIR", help="folder of case folders")
    add("--pairs", metavar="CSV", help="columns prior, current; case (default: named after folder and files)")
    add("--split", default="all", choices=["train", "val", "test", "all"],
        help="patients, as in training (default: %(default)s)")
    add("--register", action="store_true", help="align the prior to the current image; sizes may differ")
    add("--tta", type=int, default=1, metavar="N", help="average over N views (default: %(default)s)")
    add("--threshold", type=float, default=0.05, help="|difference| of a change (default: %(default)s)")
    add("--min-area", type=int, metavar="PIXELS", help="smallest component, at IMG_SIZE (default: 0.1 %%)")
    add("--batch-size", type=int, default=8, help="pairs at a time (default: %(default)s)")
    add("--baseline", action="store_true", help="measure the best registered subtraction beside the model")
    add("--device", help='such as "cpu" (default: a GPU where there is one)')
    return check_args(parser.parse_args())


def check_args(args):
    """``args`` again.  Raises UserError for words that do not go together and numbers that make no sense."""
    ways = [args.data, args.pairs, args.prior or args.current]
    if sum(map(bool, ways)) != 1 or bool(args.prior) != bool(args.current):
        raise UserError("give either --data DIR, or --pairs CSV, or --prior FILE and --current FILE")
    if args.split != "all" and not args.data:
        raise UserError(f"--split {args.split}: only the cases of --data are split; leave it out")
    counts = {"--tta": args.tta, "--batch-size": args.batch_size, "--min-area": args.min_area}
    wrong = [f"{name} {n}: must be at least 1" for name, n in counts.items() if n is not None and n < 1]
    if not 0 < args.threshold < 1:
        wrong.append(f"--threshold {args.threshold:g}: must lie between 0 and 1")
    if wrong:
        raise UserError("; ".join(wrong))
    return args


def find_cases(args):
    """[(name, {"prior" | "current" | "truth": [paths]})] of the pair, the table, or a split of the folder."""
    if args.prior:
        return [(pair_name(args.prior, args.current), {"prior": [args.prior], "current": [args.current]})]
    if args.pairs:
        return read_pairs(args.pairs)
    return find_pairs(args.data, args.split, C.VAL_FRACTION, C.TEST_FRACTION, C.SPLIT_CSV or None)


def load_case(name, files, register):
    """dict(name; prior, current, truth or None: [S, S] for the network; covered [S, S]: what both saw; box of
    the letterbox; seen: prior and current in the current's shape; aligned). Raises BadFile."""
    for part, fewest in (("prior", 1), ("current", 1), ("truth", 0)):
        if not fewest <= len(files.get(part, [])) <= 1:
            raise BadFile(f"{name}: {len(files.get(part, []))} images for {part} where there must be one")
    images = {part: (read_map if part == "truth" else read_image)(paths[0]) for part, paths in files.items()}
    shape = images["current"].shape
    for part, image in images.items():
        if image.shape != shape and not (register and part == "prior"):
            hint = "; use --register" if part == "prior" else ""
            raise BadFile(f"{files[part][0]}: {image.shape} pixels, the current image has {shape}{hint}")
    seen = [normalise(images[part], files[part][0]) for part in ("prior", "current")]
    covered, aligned = np.ones(shape), True
    if register:
        (prior, _), (current, box) = (letterbox(image, max(shape)) for image in seen)
        prior, covered, aligned = align(prior, current)
        seen[0], covered = (undo_letterbox(image, box, shape) for image in (prior, covered))
    (prior, _), (current, box), (inside, _) = (letterbox(image, C.IMG_SIZE) for image in (*seen, covered))
    truth = letterbox(images["truth"], C.IMG_SIZE)[0] if "truth" in images else None
    return {"name": name, "prior": prior, "current": current, "truth": truth, "covered": inside > 0.5,
            "box": box, "seen": (seen[0] * covered, seen[1]), "aligned": aligned}


def save_case(case, pred, deviation, path, args):
    """Write the maps and the picture of one case; its rows of changes.csv. pred, deviation: arrays [S, S]."""
    diff, truth, uncertainty = (
        None if x is None else undo_letterbox(x, case["box"], case["seen"][1].shape)
        for x in (pred, case["truth"], deviation if args.tta > 1 else None))
    write_nifti(f"{path}_diff.nii.gz", diff)
    Path(f"{path}_uncertainty.nii.gz").unlink(missing_ok=True)              # an earlier run's, of another map
    if uncertainty is not None:
        write_nifti(f"{path}_uncertainty.nii.gz", uncertainty)
    save_overlay(f"{path}_overlay.png", *case["seen"], diff, truth, uncertainty, args.threshold)
    floor = least_area(pred.shape, args.min_area) * diff.size / (case["box"][2] * case["box"][3])
    return [{"case": case["name"], **change} for change in list_changes(diff, args.threshold, floor)]


def run_cases(model, cases, device, metrics, args):
    """Predict, save and measure this rank's cases; lists of what the tables need."""
    results = {"done": [], "bad": [], "changes": [], "measured": [], "pairs": []}
    for start in progress_bar(range(0, len(cases), args.batch_size), "batches"):
        batch = []
        for name, files in cases[start:start + args.batch_size]:
            try:
                batch.append(load_case(name, files, args.register))
            except BadFile as error:
                results["bad"].append((name, str(error)))
        if not batch:
            continue
        images = [torch.stack([torch.from_numpy(case[key])[None] for case in batch]).to(device)
                  for key in ("prior", "current")]                                          # [B, 1, S, S]
        maps = (x.cpu().numpy()[:, 0] for x in predict_tta(model, *images, args.tta))
        for case, pred, deviation in zip(batch, *maps, strict=True):
            pred = pred * case["covered"]                                   # what was not seen is not new
            results["changes"] += save_case(case, pred, deviation, args.output / case["name"], args)
            results["done"].append((case["name"], case["aligned"]))
            if case["truth"] is not None:
                figures, = metrics.update(pred[None, None], case["truth"][None, None])
                results["measured"].append({"case": case["name"], **figures})
                if args.baseline:
                    results["pairs"].append((case["prior"], case["current"], case["truth"]))
    return results


def report(results, metrics, args):
    """Write the tables of all ranks' results, and print the metrics and where things lie."""
    for rows in (results["changes"], results["measured"]):
        rows.sort(key=lambda row: row["case"])                               # as one process would write them
    list_bad_files(args.output, sorted(results["bad"]))
    if not results["done"]:
        raise UserError(f"{'' if args.prior else 'none of the cases can be used; '}{min(results['bad'])[1]}")
    write_csv(args.output / "changes.csv", CHANGES, results["changes"])
    (args.output / "metrics.csv").unlink(missing_ok=True)                   # an earlier run's, of other cases
    if results["measured"]:
        write_csv(args.output / "metrics.csv", ("case", *DESCRIPTIONS), results["measured"])
        rows = {"model": metrics.compute()}
        if args.baseline:
            best = best_baseline(results["pairs"], args.threshold, args.min_area)
            rows["subtraction"] = best["metrics"]
            print(f"subtraction: registered, histogram-matched, smoothed by {best['sigma']:.1f} px, |d| > "
                  f"{best['threshold']}, both chosen for the highest Dice on these very cases")
        print(f"{len(results['measured'])} cases with known map, threshold {args.threshold}:\n"
              f"{text_table(rows, DESCRIPTIONS, digits=4)}")
    for name in sorted(name for name, aligned in results["done"] if not aligned):
        print(f"{name}: left as it was, no better alignment was found")
    print(f"{len(results['done'])} cases, {len(results['changes'])} changes, {len(results['bad'])} bad cases "
          f"skipped; tables in {args.output}, pictures {args.output}/*_overlay.png")


def main():
    args = parse_args()
    device = setup_distributed(args.device)
    checkpoint = load_checkpoint(args.checkpoint, KIND)
    restore_constants(C, checkpoint["constants"])
    model = autocast(device, C.PRECISION)(load_trained(build_model(), checkpoint, device))

    cases = find_cases(args)
    if args.baseline and not any("truth" in files for _, files in cases):
        raise UserError("--baseline: no case has a diff_map to measure with; leave it out")
    args.output.mkdir(parents=True, exist_ok=True)
    metrics = ChangeMetrics(args.threshold, args.min_area)
    results = run_cases(model, cases[rank()::world_size()], device, metrics, args)
    metrics.reduce()
    parts = gather(results)
    results = {key: sum((part[key] for part in parts), []) for key in results}
    if is_main():
        report(results, metrics, args)
    cleanup()


if __name__ == "__main__":
    run_script(main)
