"""Judge a model of train_finetune.py on one split: figures with confidence intervals, tables, pictures.

    python evaluate.py --checkpoint runs/findings/mil_best.pt --output predictions/findings  # demo
    python evaluate.py --checkpoint runs/findings/mil_best.pt --data data/cache --labels labels.csv \\
        --split test --output predictions/findings
    python evaluate.py --checkpoint runs/classes/hvit_best.pt --data data/leaf --tta --output predictions/leaf
    python evaluate.py --checkpoint runs/cord/segment_best.pt --data masks.csv --output predictions/cord
    torchrun --nproc_per_node=4 evaluate.py --checkpoint PATH --data DIR --split all --output DIR

Writes metrics.csv (each figure with its bootstrap interval over the cases), predictions.csv (a row per case),
roc.png, and for classes confusion.png.  For mil attention/<study>/: where the model looked, for each series a
NIfTI in the space of the source file and a PNG of the slices that it looked at most.  For hvit classes.txt, a
table of the classes, calibration.png, and mistakes.png: the photographs whose class seemed least likely.
The splits of hvit are those of splits.csv beside the checkpoint.  For classify as for hvit, but no roc.png;
for segment masks.csv (a row per slice and mask class) and worst.png (the masks of lowest Dice); multitask has
both, and the intervals of these three are over patients, or what --resample says.  --set changes what the
training had set.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

import builders
import constants as C
from datasets.cache import read_cache
from datasets.labels import read_labels
from datasets.photo_augment import evaluation_view, tta_views
from datasets.photo_splits import split_photos, stored_groups
from datasets.photos import find_photos
from datasets.studies import ragged_collate, read_patients, split_studies
from models.slice_nets import named_outputs
from train_finetune import STAY
from utils.attention_maps import write_attention
from utils.case_report import UNITS, report_cases, report_classes, report_slices
from utils.checkpoint import load_checkpoint
from utils.config import UserError, apply_overrides, restore_constants, run_script
from utils.device import autocast, to_device
from utils.distributed import cleanup, gather, is_main, rank, say, setup_distributed, world_size
from utils.history import progress_bar
from utils.mask_metrics import MaskMetrics, predict_masks
from utils.states import load_trained


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="a *_best.pt of train_finetune.py")
    add("--output", required=True, type=Path, metavar="DIR", help="folder for tables and pictures")
    add("--data", metavar="DIR", help="as in training (default: the demo data)")
    add("--labels", metavar="CSV", help="mil: table of labels (default: the training's STUDY_LABELS)")
    add("--split", default="test", choices=["train", "val", "test", "all"],
        help="cases, as in training (default: %(default)s)")
    add("--bootstrap", type=int, default=1000, metavar="N", help="resamples (default: %(default)s)")
    add("--resample", default="patient", choices=UNITS,
        help="slices: what the intervals are over (default: %(default)s)")
    add("--tta", type=int, nargs="?", const=2, default=1, metavar="N",
        help="hvit: mean of N views, 2 to 8: mirrored, then turned (default: 1; without N: 2)")
    add("--mistakes", type=int, default=12, metavar="N",
        help="of classes or masks, to draw (default: %(default)s)")
    add("--attention", type=int, default=4, metavar="N", help="mil: studies to draw (default: %(default)s)")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="override what the training had set (default: nothing)")
    add("--device", help='such as "cpu" (default: a GPU where there is one)')
    args = parser.parse_args()
    if args.bootstrap < 1 or args.attention < 0 or args.mistakes < 0:
        raise UserError("--bootstrap must be at least 1, --attention and --mistakes at least 0")
    return args


# ---------------------------------------------------------------- MIL on brain studies

def find_studies(args, names):
    """(studies of the split, labels or None).  UserError when the labels are not those of the model."""
    data, labels_csv = builders.study_paths(args.data)
    studies, labels = read_cache(data), None
    if args.labels or labels_csv:
        labels = read_labels(args.labels or labels_csv, C.MIL_LOSS)
        if labels.names != names:
            raise UserError(f"{labels.source}: its labels are {', '.join(labels.names)}; the model's are "
                            f"{', '.join(names)}")
    if args.split == "all":
        return studies, labels
    if labels is None:
        raise UserError(f"--split {args.split}: needs the labels of training; give --labels, or --split all")
    splits = split_studies(labels.match(studies)[0], C.STUDY_VAL_FRACTION, C.STUDY_TEST_FRACTION,
                           C.STUDY_SPLIT_CSV or None, C.STUDY_PATIENTS)
    if not splits[args.split]:
        raise UserError(f"--split {args.split}: holds no study; choose another split")
    return splits[args.split], labels


@torch.no_grad()
def evaluate_mil(args, checkpoint, device):
    """(dict study -> (outputs, labels) of this rank's studies, how to report that of all).

    Draws attention as it goes.
    """
    names = checkpoint["names"]
    studies, labels = find_studies(args, names)
    model = load_trained(builders.build_study_classifier(len(names)), checkpoint, device)
    dataset = builders.study_set(studies, False, windows="all")
    loader, results = builders.build_loader(dataset, dataset.groups(), 1, False, ragged_collate), {}
    unknown = torch.full((1 if C.MIL_LOSS == "ce" else len(names),), torch.nan)
    for i, batch in enumerate(progress_bar(loader, "studies")):
        if not loader.batch_sampler.real(i):
            continue
        if any(batch["bad_files"]):                        # what stands in for it would be judged in its name
            tqdm.write(f"Left out: {'; '.join(filter(None, batch['bad_files']))}")
            continue
        batch, study = to_device(batch, device, STAY), batch["study"][0]
        with autocast(device, C.PRECISION):
            logits, attention = model(batch["tokens"], batch["coords"], batch["cu_seqlens"],
                                      batch["study_cu_seqlens"])
        results[study] = logits[0].float().cpu(), labels.values.get(study, unknown) if labels else unknown
        if i * world_size() + rank() < args.attention:
            write_attention(args.output / "attention" / study, dataset, batch, attention.float(), names)
    units = read_patients(C.STUDY_PATIENTS, [study.name for study in studies])
    return results, lambda results: report_cases(
        args.output, args.split, "study", "studies", C.MIL_LOSS, names, results, args.bootstrap, C.SEED,
        (units, "patients" if C.STUDY_PATIENTS else "studies"))


# ------------------------------------------------------- classes of photographs

def find_split(args, names):
    """Photographs of the split; the classes are those of the model.  UserError where the split is unknown."""
    photos, _, _ = find_photos(builders.photo_path(args.data), False, names)
    if args.split != "all":
        path = Path(args.checkpoint).with_name("splits.csv")
        if not path.is_file():
            raise UserError(f"--split {args.split}: {path} is missing; put it back, or give --split all")
        photos = split_photos(photos, names, C.HVIT_VAL_FRACTION, C.HVIT_TEST_FRACTION, path=path)[args.split]
    if not photos:
        raise UserError(f"--split {args.split}: holds no photograph; choose another split")
    return photos


@torch.no_grad()
def evaluate_hvit(args, checkpoint, device):
    """As evaluate_mil, of photographs: logarithms of probabilities [C], label [1], NaN = unknown."""
    names, results = checkpoint["names"], {}
    dataset = builders.photo_set(find_split(args, names), False)
    loader = builders.build_item_loader(dataset, C.HVIT_BATCH_SIZE, False)
    model = load_trained(builders.build_photo_network(len(names), start=False), checkpoint, device)
    for i, batch in enumerate(progress_bar(loader, "photographs")):
        batch = to_device(batch, device, ("label",))
        views = tta_views(*evaluation_view(batch["image"], C.HVIT_IMG_SIZE, batch.get("spectral")), args.tta)
        with autocast(device, C.PRECISION):
            shares = sum(model(*view).float().softmax(1) for view in views) / len(views)
        labels = batch["label"].float().where(batch["label"] >= 0, torch.nan)
        for k in range(loader.batch_sampler.real(i)):
            if batch["bad_files"][k]:                      # what stands in for it would be judged in its name
                tqdm.write(f"Left out: {batch['bad_files'][k]}")
            else:
                results[batch["case"][k]] = shares[k].log().cpu(), labels[k:k + 1]

    def report_all(results):
        report_cases(args.output, args.split, "photograph", "photographs", "ce", names, results,
                     args.bootstrap, C.SEED, (units, "groups of copies" if any(groups) else "photographs"))
        report_classes(args.output, names, results, lambda case: dataset[places[case]]["image"],
                       args.mistakes)

    places = {photo.name: i for i, photo in enumerate(dataset.photos)}
    groups = stored_groups(Path(args.checkpoint).with_name("splits.csv"), dataset.photos)
    units = {photo.name: group or photo.name for photo, group in zip(dataset.photos, groups, strict=True)}
    return results, report_all


# ----------------------------------------------------------- slices of spine MRI

@torch.no_grad()
def evaluate_slices(args, checkpoint, device):
    """As evaluate_mil, of slices: logarithms of probabilities [C], label [1], names by case_report.UNITS."""
    kind, names, mask_names = (checkpoint[key] for key in ("kind", "names", "mask_names"))
    _, slices, _, _ = builders.find_spine(kind, args.data, names)
    slices = slices if args.split == "all" else builders.split_spine(slices)[args.split]
    if not slices:
        raise UserError(f"--split {args.split}: holds no slice; choose another split")
    dataset = builders.slice_set(slices, False, mask_names)
    network = builders.build_slice_network(kind, names, mask_names, start=False)
    model = load_trained(network, checkpoint, device)

    def predict(batch):
        with autocast(device, C.PRECISION):
            outputs = named_outputs(kind, model(batch["image"].to(device)))
        return {name: values.float().cpu() for name, values in outputs.items()}

    metrics, results = MaskMetrics(mask_names, C.SPINE_THRESHOLD, C.SPINE_FOUND_SHARE), {}
    loader = builders.build_item_loader(dataset, C.SPINE_BATCH_SIZE, False)
    for i, batch in enumerate(progress_bar(loader, "slices")):
        outputs = predict(batch)
        for k in range(loader.batch_sampler.real(i)):
            if batch["bad_files"][k]:                      # what stands in for it would be judged in its name
                tqdm.write(f"Left out: {batch['bad_files'][k]}")
                continue
            label = batch["label"][k:k + 1].float().where(batch["label"][k:k + 1] >= 0, torch.nan)
            scores = outputs["labels"][k].log_softmax(0) if names else None
            results[batch["case"][k]] = (scores, label, {
                "patient": batch["patient"][k], "series": batch["series"][k], "slice": batch["case"][k]})
            if mask_names:
                metrics.update(outputs["masks"][k:k + 1], *(batch[key][k:k + 1] for key in (
                    "mask", "spacing", "case", "patient")))
    metrics.reduce()

    def look(case):
        item = dataset[places[case]]
        masks = predict({"image": item["image"][None]}).get("masks")
        return item, None if masks is None else predict_masks(masks, len(mask_names), C.SPINE_THRESHOLD)[0]

    places = {slice.case: i for i, slice in enumerate(slices)}
    return results, lambda results: report_slices(args.output, args.split, names, metrics, results, look,
                                                  args.bootstrap, args.resample, C.SEED, args.mistakes)


TASKS = {"mil": evaluate_mil, "hvit": evaluate_hvit, "classify": evaluate_slices, "segment": evaluate_slices,
         "multitask": evaluate_slices}


def main():
    args = parse_args()
    device = setup_distributed(args.device)
    checkpoint = load_checkpoint(args.checkpoint, *TASKS)
    restore_constants(C, checkpoint["constants"])
    apply_overrides(C, args.set)
    if args.split in ("train", "all"):
        say(f"--split {args.split}: figures of cases that the network was trained on say nothing of new ones")
    args.output.mkdir(parents=True, exist_ok=True)
    results, report_all = TASKS[checkpoint["kind"]](args, checkpoint, device)
    results = {case: result for part in gather(results) for case, result in part.items()}
    if not results:
        raise UserError(f"--split {args.split}: none of its cases can be read")
    if is_main():
        report_all(results)
        print(f"Tables and pictures: {args.output}")
    cleanup()


if __name__ == "__main__":
    run_script(main)
