"""Spine MRI from raw series to masks: anatomy, location and view, sequence, cord present, cord, lesions.

    python infer_cascade.py --input data/demo/spine --split test --weights weights --output predictions/spine
    python infer_cascade.py --input scans --weights weights --output out --stages cord cord_mask
    python infer_cascade.py --input scans --weights weights --output out --doubtful stop --clip-lesions \\
        --keep "anatomy=MR/spine/*" location_view=cervical_sagittal,thoracic_sagittal sequence=T2w
    torchrun --nproc_per_node=4 infer_cascade.py --input scans --weights weights --output out

--weights holds <stage>.pt, checkpoints of train_finetune.py, or is a folder of runs named after the stages; a
stage that it lacks is left out.
DICOM, NIfTI and folders of PNG are found below --input.  The slices of a series vote on its anatomy, its
location and view, and its sequence; of the series that are kept, the slices with cord are segmented.  Writes
cascade.csv (a row for each series), slices.csv (for each slice), bad_files.csv (series that cannot be used),
and below series/ <name>_cord.nii.gz and <name>_lesion.nii.gz on the voxels of the source, and <name>.png.
The same command goes on where it was interrupted; with other options it judges again, over what is there.
With a table of what is true, --truth or a series.csv at --input, it ends with the accuracy of each stage and
of the whole, which are also in metrics.csv.
"""

import argparse
from pathlib import Path

import builders
import constants as C
from datasets.pair_files import list_bad_files
from datasets.slice_lists import find_series
from datasets.slice_series import (
    AXES,
    MIN_SLICES,
    read_series,
    slices_along,
    spacing_along,
    to_source,
    write_mask,
)
from utils import cascade
from utils.cascade import KEEP, MASKS, STAGES
from utils.cascade_judge import Rules, Stage, View, axis_of, busiest, judge, save_overlay
from utils.cascade_truth import read_truth, report_truth, truths_of
from utils.checkpoint import digest_of, load_checkpoint
from utils.config import BadFile, UserError, hyperparameters, restore_constants, run_script
from utils.distributed import cleanup, gather, is_main, rank, say, setup_distributed, world_size
from utils.history import progress_bar
from utils.states import load_trained
from utils.tables import write_csv


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--input", required=True, type=Path, metavar="DIR", help="folder with series, at any depth")
    add("--weights", required=True, type=Path, metavar="DIR", help="folder of <stage>.pt, or of runs")
    add("--output", required=True, type=Path, metavar="DIR", help="folder for tables, masks and pictures")
    add("--stages", nargs="+", choices=STAGES, metavar="STAGE",
        help=f"of {', '.join(STAGES)} (default: those that have a file)")
    add("--keep", nargs="+", default=[], metavar="STAGE=CLASS", help="classes that go on, also CLASS,CLASS "
        "or with * (default: " + " ".join(f"{stage}={words[0]}" for stage, words in KEEP.items()) + ")")
    add("--min-slices", type=int, default=MIN_SLICES, metavar="N",
        help="series with fewer are listed, not judged (default and least: %(default)s)")
    add("--margin", type=float, default=0.2, metavar="SHARE", help="of the votes between the first class and "
        "the second, below which a vote is doubtful (default: %(default)s)")
    add("--doubtful", default="go", choices=["go", "stop"],
        help="what doubtful series do (default: %(default)s)")
    add("--axis", choices=AXES, help="of the slices; pictures have but one (default: as trained)")
    add("--threshold", type=float, metavar="P", help="of masks' probabilities (default: as trained)")
    add("--clip-lesions", action="store_true", help="cut lesion masks to the cord mask")
    add("--overlays", type=int, default=3, metavar="N", help="slices in a picture; 0: no pictures "
        "(default: %(default)s)")
    add("--truth", type=Path, metavar="CSV",
        help="what is true (default: series.csv in --input or beside it)")
    add("--split", default="all", choices=["train", "val", "test", "all"],
        help="series, by that table (default: %(default)s)")
    add("--batch-size", type=int, default=16, metavar="N", help="slices at a time (default: %(default)s)")
    add("--device", help='such as "cpu" (default: a GPU where there is one)')
    args = parser.parse_args()
    if args.batch_size < 1 or args.overlays < 0 or args.min_slices < MIN_SLICES:
        raise UserError(f"--batch-size: 1 or more; --overlays: 0 or more; --min-slices: {MIN_SLICES} or more")
    if not 0 <= args.margin <= 1 or not 0 < (0.5 if args.threshold is None else args.threshold) < 1:
        raise UserError("--margin must be from 0 to 1, --threshold between 0 and 1")
    if args.input.resolve() in [args.output.resolve(), *args.output.resolve().parents]:
        raise UserError(f"--output {args.output}: lies in --input, and would be read with it; choose another")
    return args


def load_stages(args, device):
    """The Stages to be used, in their order; says what they keep, which are left out and what that means."""
    paths = {name: weights_of(args.weights, name) for name in args.stages or STAGES}
    missing = [path for path in paths.values() if not path.is_file()]
    if len(missing) == len(paths) or (args.stages and missing):
        there = sorted(path.name for path in args.weights.glob("*.pt"))
        raise UserError(f"--weights {args.weights}: has no {' or '.join(path.name for path in missing)}, but "
                        f"{', '.join(there[:8]) or 'no .pt file'}; name checkpoints after their stages, or "
                        "give a folder of runs so named")
    paths = {name: path for name, path in paths.items() if path not in missing}
    if args.clip_lesions and not set(MASKS) <= set(paths):
        raise UserError("--clip-lesions: needs the stages cord_mask and lesion_mask")
    keep, before = cascade.parse_keep(args.keep, paths), hyperparameters(C)
    stages = [load_stage(name, path, keep.get(name), before, args.threshold, device)
              for name, path in paths.items()]
    for stage in stages:
        say(f"{stage.name}: " + (f"keeps {', '.join(stage.kept)} of {len(stage.names)} classes"
                                          if stage.kept else f"masks of {', '.join(stage.names)}"))
    for name in (name for name in STAGES if name not in paths):
        say(f"{name}: left out; {cascade.LEFT_OUT[name]}")
    return stages


def weights_of(folder, stage):
    """Path of a stage's checkpoint: <stage>.pt, or the best one of a run that is named after the stage."""
    return next(iter(sorted((folder / stage).glob("*_best.pt"))), folder / f"{stage}.pt")


def load_stage(name, path, words, before, threshold, device):
    """One Stage.  words: classes to keep, None for masks; before: the constants without any checkpoint's."""
    checkpoint = load_checkpoint(path, "segment" if name in MASKS else "classify", "multitask")
    restore_constants(C, {**before, **checkpoint["constants"]})
    network = builders.build_slice_network(checkpoint["kind"], checkpoint["names"], checkpoint["mask_names"],
                                           start=False)
    names = list(checkpoint["mask_names" if name in MASKS else "names"])
    kept = cascade.kept_classes(name, words, names) if words else []
    view = View(C.SPINE_SIZE, C.SPINE_FIT, C.SPINE_INTENSITY, tuple(C.SPINE_PERCENTILES), C.SPINE_FIELD_MM)
    return Stage(name, checkpoint["kind"], load_trained(network, checkpoint, device), names, kept, view,
                 C.SPINE_AXIS, threshold or C.SPINE_THRESHOLD, C.PRECISION, digest_of(path))


def axis_trained(stages, asked):
    """The axis of the slices: that asked for, or that of all networks."""
    axes = {stage.axis: stage.name for stage in stages}
    if not asked and len(axes) > 1:
        told = ", ".join(f"{name} on {axis} slices" for axis, name in axes.items())
        raise UserError(f"the networks were trained along different axes ({told}); choose one with --axis")
    return asked or next(iter(axes))


def find_entries(args):
    """({name for files: Entry} of the series to judge, {name: Truth} of those that a table knows)."""
    entries, notes = find_series(args.input)
    entries, more = cascade.without_masks(entries)
    named = dict(zip(cascade.output_names(entries), entries, strict=True))
    near = [folder / "series.csv" for folder in (args.input, args.input.resolve().parent)]
    table = args.truth or next((path for path in near if path.is_file()), None)
    truths = truths_of(named, read_truth(table)) if table else {}
    if args.truth and not truths:
        raise UserError(f"--truth {args.truth}: none of its paths is a series of {args.input}")
    if args.split != "all":
        truths = {name: truth for name, truth in truths.items() if truth.split == args.split}
        named = {name: named[name] for name in truths}
    if not named:
        raise UserError(f"{args.input}: holds no series" + (f" of a table's split {args.split}; see --truth"
                                                            if args.split != "all" else ""))
    say("\n".join([*notes, *more, f"{len(named)} series in {args.input}"
                            + (f", {len(truths)} of them in {table}" if truths else "")]))
    return named, truths


def judge_entry(name, entry, stages, rules, args, device):
    """{"row", "slices": rows of the tables} of a series; "bad": why it cannot be used; "again": whether
    it was judged before.

    Its files are written, the one that tells what they were made with last: a series that is whole, from the
    same files with the same weights and rules, is not judged again.
    """
    record = args.output / "series" / f"{name}.json"
    inside = sorted(entry.path.iterdir()) if entry.path.is_dir() else [entry.path]
    made_with = {"path": str(entry.path.resolve()), "uid": entry.uid, "rules": rules,
                 "stages": {stage.name: (stage.digest, stage.kept, stage.threshold) for stage in stages},
                 "overlays": args.overlays,
                 "files": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in inside
                           if file.is_file()]}
    found, before = cascade.read_record(record, made_with), record.is_file()
    if found:
        return found
    known = {"series": name, "path": str(entry.path), "uid": entry.uid}
    record.parent.mkdir(parents=True, exist_ok=True)
    outputs = {part: record.with_name(f"{record.stem}_{part}.nii.gz") for part in MASKS.values()}
    picture = record.with_suffix(".png")
    for path in (record, picture, *outputs.values()):
        path.unlink(missing_ok=True)
    try:
        series = read_series(entry.path, entry.uid)
    except BadFile as error:
        return {"row": {**known, "stopped": "bad file", "notes": str(error)}, "slices": [], "bad": str(error),
                "again": before}
    row, lines, masks = judge(series, stages, rules, args.batch_size, device)
    axis = axis_of(series, rules)
    for part, mask in masks.items():
        write_mask(outputs[part], to_source(series, axis, mask), like=series)
    shown = busiest(masks, args.overlays)
    if shown:
        save_overlay(picture, slices_along(series, axis), spacing_along(series, axis)[1:], masks, shown)
    files = [outputs[part].name for part in masks] + [picture.name] * bool(shown)
    written = cascade.write_record(record, made_with, files, {**known, **row},
                                   [{"series": name, **line} for line in lines])
    return {**written, "again": before}


def report(results, named, truths, stages, rules, args):
    """Write the tables of all ranks' results, and print where series ended, and how far that is true."""
    names, kept = {stage.name: stage.names for stage in stages}, {stage.name: stage.kept for stage in stages}
    shares = [f"{stage.name}/{word}" for stage in stages if stage.name in KEEP for word in stage.names]
    sizes = [f"{part}_mm3" for stage, part in MASKS.items() if stage in names]
    rows = [result["row"] for result in results]
    write_csv(args.output / "cascade.csv", cascade.series_columns(names), rows)
    write_csv(args.output / "slices.csv",
              ["series", "slice", *shares, *["goes_on"] * ("cord" in names), *sizes],
              [line for result in results for line in result["slices"]])
    bad = [(result["row"]["path"], result["bad"]) for result in results if "bad" in result]
    list_bad_files(args.output, bad)
    if len(bad) == len(results):
        raise UserError(f"none of the series can be used; {bad[0][1]}")
    again = sum(result.get("again", False) for result in results)
    if again:
        print(f"{again} series judged again, over what {args.output} held: weights, rules or files differ "
              "from before")
    print("\n".join(cascade.summary(rows)))
    if truths:
        lines, figures = report_truth(results, named, truths, kept, names, args.output / "series", rules.axis)
        write_csv(args.output / "metrics.csv", ("figure", "value", "of"), figures)
        print("\n".join(lines))
    print(f"{len(bad)} series could not be used; tables: {args.output}, masks and pictures: "
          f"{args.output / 'series'}")


def main():
    args = parse_args()
    device = setup_distributed(args.device)
    stages = load_stages(args, device)
    named, truths = find_entries(args)
    rules = Rules(axis_trained(stages, args.axis), args.min_slices, args.margin, args.doubtful == "stop",
                  args.clip_lesions)
    own = progress_bar(list(named.items())[rank()::world_size()], "series")
    results = sum(gather([judge_entry(*each, stages, rules, args, device) for each in own]), [])
    if is_main():
        order = {name: number for number, name in enumerate(named)}
        results.sort(key=lambda result: order[result["row"]["series"]])
        report(results, named, truths, stages, rules, args)
    cleanup()


if __name__ == "__main__":
    run_script(main)
