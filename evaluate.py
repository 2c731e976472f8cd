"""Judge a model of train_finetune.py on one split: figures with confidence intervals, tables, pictures.

    python evaluate.py --checkpoint runs/findings/mil_best.pt --output predictions/findings  # demo
    python evaluate.py --checkpoint runs/findings/mil_best.pt --data data/cache --labels labels.csv \\
        --split test --output predictions/findings
    python evaluate.py --checkpoint runs/classes/hvit_best.pt --data data/leaf --tta --output predictions/leaf
    torchrun --nproc_per_node=4 evaluate.py --checkpoint PATH --data DIR --split all --output DIR

Writes metrics.csv (each figure with its bootstrap interval over the cases), predictions.csv (a row per case),
roc.png, and for classes confusion.png.  For mil attention/<study>/: where the model looked, for each series a
NIfTI in the space of the source file and a PNG of the slices that it looked at most.  For hvit classes.txt, a
table of the classes, calibration.png, and mistakes.png: the photographs whose class seemed least likely.
The splits of hvit are those of splits.csv beside the checkpoint.
"""

import argparse
import csv
from pathlib import Path

import torch
from tqdm import tqdm

import builders
import constants as C
from datasets.cache import read_cache
from datasets.labels import read_labels
from datasets.photo_augment import evaluation_view, tta_views
from datasets.photo_splits import split_photos
from datasets.photos import find_photos
from datasets.studies import ragged_collate, split_studies
from prepare_data import study_paths
from train_finetune import STAY
from utils.attention_maps import write_attention
from utils.checkpoint import load_checkpoint
from utils.classification import bootstrap, confusion_figure, roc_figure, table
from utils.config import UserError, restore_constants, run_script
from utils.device import autocast, to_device
from utils.distributed import cleanup, gather, is_main, rank, setup_distributed, world_size
from utils.photo_metrics import PhotoMetrics, calibration_figure, class_table
from utils.photo_sheet import photo_sheet
from utils.states import load_model_state


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="a *_best.pt of train_finetune.py")
    add("--output", required=True, type=Path, metavar="DIR", help="folder for tables and pictures")
    add("--data", metavar="DIR", help="as in training (default: the demo data)")
    add("--labels", metavar="CSV", help="(default: the training's STUDY_LABELS)")
    add("--split", default="test", choices=["train", "val", "test", "all"], help="(default: %(default)s)")
    add("--bootstrap", type=int, default=1000, metavar="N", help="resamples (default: %(default)s)")
    add("--tta", type=int, nargs="?", const=2, default=1, metavar="N",
        help="hvit: mean of N views, 2 to 8: mirrored, then turned (without N: 2)")
    add("--mistakes", type=int, default=12, metavar="N", help="hvit: how many to draw (default: %(default)s)")
    add("--attention", type=int, default=4, metavar="N", help="mil: studies to draw (default: %(default)s)")
    add("--device", help='such as "cpu" (default: a GPU where there is one)')
    args = parser.parse_args()
    if args.bootstrap < 1 or args.attention < 0 or args.mistakes < 0:
        raise UserError("--bootstrap must be at least 1, --attention and --mistakes at least 0")
    return args


# ---------------------------------------------------------------- MIL on brain studies

def find_studies(args, names):
    """(studies of the split, labels or None).  UserError when the labels are not those of the model."""
    data, labels_csv = study_paths(args.data)
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
                           C.STUDY_SPLIT_CSV or None)
    if not splits[args.split]:
        raise UserError(f"--split {args.split}: holds no study; choose another split")
    return splits[args.split], labels


@torch.no_grad()
def evaluate_mil(args, checkpoint, device):
    """(word of the loss, dict study -> (outputs, labels), what else to report) of this rank's studies.

    Draws attention as it goes.
    """
    names = checkpoint["names"]
    studies, labels = find_studies(args, names)
    model = builders.build_study_classifier(len(names))
    load_model_state(model, checkpoint.get("ema_state_dict") or checkpoint["model_state_dict"])
    model.to(device).eval()
    dataset = builders.study_set(studies, False, windows="all")
    loader, results = builders.build_loader(dataset, dataset.groups(), 1, False, ragged_collate), {}
    unknown = torch.full((1 if C.MIL_LOSS == "ce" else len(names),), torch.nan)
    for i, batch in enumerate(tqdm(loader, "studies", disable=None if is_main() else True)):
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
    return C.MIL_LOSS, results, lambda results: None


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
    model = builders.build_photo_network(len(names), start=False)
    load_model_state(model, checkpoint.get("ema_state_dict") or checkpoint["model_state_dict"])
    model.to(device).eval()
    for i, batch in enumerate(tqdm(loader, "photographs", disable=None if is_main() else True)):
        images, spectral = to_device(batch, device)["image"], to_device(batch, device).get("spectral")
        views = tta_views(*evaluation_view(images, C.HVIT_IMG_SIZE, spectral), args.tta)
        with autocast(device, C.PRECISION):
            shares = sum(model(*view).float().softmax(1) for view in views) / len(views)
        labels = batch["label"].float().where(batch["label"] >= 0, torch.nan)
        for k in range(loader.batch_sampler.real(i)):
            if batch["bad_files"][k]:                      # what stands in for it would be judged in its name
                tqdm.write(f"Left out: {batch['bad_files'][k]}")
            else:
                results[batch["case"][k]] = shares[k].log().cpu(), labels[k:k + 1]
    return "ce", results, lambda results: report_classes(args, names, dataset, results)


def report_classes(args, names, dataset, results):
    """classes.txt, calibration.png, and mistakes.png: those whose own class seemed least likely, first."""
    known = {case: (scores, int(label)) for case, (scores, label) in results.items() if label == label}
    if not known:
        return
    scores, labels = (torch.stack([torch.as_tensor(part[i]) for part in known.values()]) for i in (0, 1))
    metrics = PhotoMetrics(names)
    metrics.update(scores, labels)
    (args.output / "classes.txt").write_text(class_table(metrics.per_class()) + "\n")
    print(class_table(metrics.per_class()))
    calibration_figure(args.output / "calibration.png", metrics.calibration)
    wrong = sorted((case for case, (scores, label) in known.items() if scores.argmax() != label),
                   key=lambda case: known[case][0][known[case][1]])[:args.mistakes]
    places = {photo.name: i for i, photo in enumerate(dataset.photos)}
    pictures = [(dataset[places[case]]["image"], f"{case}: {names[known[case][0].argmax()]} "
                 f"{known[case][0].max().exp():.2f}") for case in wrong]
    if pictures:
        photo_sheet(args.output / "mistakes.png", pictures)


TASKS = {"mil": ("study", "studies", evaluate_mil), "hvit": ("photograph", "photographs", evaluate_hvit)}


# --------------------------------------------------------------------- report

def write_predictions(path, case, word, names, results):
    """predictions.csv: for each case its probabilities (numbers, for a regression) and its true labels.

    For classes, also the predicted one.  case: what it is.
    """
    columns = [f"true {name}" for name in names] if word != "ce" else ["predicted class", "true class"]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([case, *(f"predicted {name}" for name in names), *columns])
        for name, (outputs, truth) in sorted(results.items()):
            predicted = {"bce": outputs.sigmoid(), "ce": outputs.softmax(0)}.get(word, outputs).tolist()
            answers = [names[outputs.argmax()]] if word == "ce" else []
            answers += ["" if value != value else names[int(value)] if word == "ce" else f"{value:g}"
                        for value in truth.tolist()]
            writer.writerow([name, *(f"{value:.4f}" for value in predicted), *answers])


def report(args, cases, word, names, results):
    """Write figures and their pictures, and print them."""
    pairs = [results[study] for study in sorted(results)]
    outputs, labels = (torch.stack(part) for part in zip(*pairs, strict=True))
    labelled = ~labels.isnan().all(1)
    print(f"{len(results)} {cases} ({args.split}), {int(labelled.sum())} with labels")
    if labelled.any():
        outputs, labels = outputs[labelled], labels[labelled]
        generator = torch.Generator().manual_seed(C.SEED)
        figures = bootstrap(word, names, outputs, labels, generator, args.bootstrap)
        with open(args.output / "metrics.csv", "w", newline="") as file:
            csv.writer(file).writerows([("figure", "value", "low", "high", "undefined_resamples"),
                                        *((name, *figure) for name, figure in figures.items())])
        print(f"95 % intervals of {args.bootstrap} resamples of the {cases}\n{table({args.split: figures})}")
        if word in ("bce", "ce"):
            roc_figure(args.output / "roc.png", word, names, outputs, labels, figures)
        if word == "ce":
            confusion_figure(args.output / "confusion.png", names, outputs, labels)


def main():
    args, device = parse_args(), setup_distributed()
    device = torch.device(args.device or device)
    checkpoint = load_checkpoint(args.checkpoint)
    if checkpoint["kind"] not in TASKS:
        raise UserError(f"{args.checkpoint}: a checkpoint of kind {checkpoint['kind']}; this script judges "
                        f"{', '.join(TASKS)}")
    restore_constants(C, checkpoint["constants"])
    args.output.mkdir(parents=True, exist_ok=True)
    case, cases, judge = TASKS[checkpoint["kind"]]
    word, results, report_more = judge(args, checkpoint, device)
    results = {case: result for part in gather(results) for case, result in part.items()}
    if not results:
        raise UserError(f"--split {args.split}: none of its {cases} can be read")
    if is_main():
        write_predictions(args.output / "predictions.csv", case, word, checkpoint["names"], results)
        report(args, cases, word, checkpoint["names"], results)
        report_more(results)
        print(f"Tables and pictures: {args.output}")
    cleanup()


if __name__ == "__main__":
    run_script(main)
