"""Judge a model of train_finetune.py on one split: figures with confidence intervals, tables, pictures.

    python evaluate.py --checkpoint runs/findings/mil_best.pt --output predictions/findings  # demo
    python evaluate.py --checkpoint runs/findings/mil_best.pt --data data/cache --labels labels.csv \\
        --split test --output predictions/findings
    torchrun --nproc_per_node=4 evaluate.py --checkpoint PATH --data DIR --split all --output DIR

Writes metrics.csv (each figure with its bootstrap interval over studies), predictions.csv (a row per study),
roc.png, confusion.png (classes), and for mil attention/<study>/: where the model looked, for each series a
NIfTI in the space of the source file and a PNG of the slices that it looked at most.
"""

import argparse
import csv
import re
from pathlib import Path

import torch
from tqdm import tqdm

import constants as C
from datasets.cache import load_image, read_cache
from datasets.labels import read_labels
from datasets.studies import ragged_collate, split_studies
from prepare_data import study_paths
from train_finetune import STAY, build_study_classifier
from train_pretrain import build_loader, study_set
from utils.attention_maps import attention_sheet, to_source_space, token_map
from utils.checkpoint import load_checkpoint
from utils.classification import bootstrap, confusion_figure, roc_figure, table
from utils.config import UserError, restore_constants, run_script
from utils.device import autocast, to_device
from utils.distributed import cleanup, gather, is_main, rank, setup_distributed, world_size
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
    add("--attention", type=int, default=4, metavar="N", help="studies to draw (default: %(default)s)")
    add("--device", help='such as "cpu" (default: a GPU where there is one)')
    args = parser.parse_args()
    if args.bootstrap < 1 or args.attention < 0:
        raise UserError("--bootstrap must be at least 1, --attention at least 0")
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


def write_attention(folder, dataset, batch, attention, names):
    """Maps and pictures of one study.  attention [T, C or 1]: shares of the study, each column's sum is 1.

    The maps are in units of the average token's attention.  A CT's windows share one map per head.
    """
    folder.mkdir(parents=True, exist_ok=True)
    attention = attention.cpu() * len(attention)
    heads = [f"_{re.sub(r'[^A-Za-z0-9.-]', '-', name)}" for name in names]
    heads = heads if attention.shape[1] > 1 else [""]
    entries = [dataset.entries[index] for index in reversed(dataset.members[batch["study"][0]])]
    images = {f"{series.study}/{series.name}": (series, modes) for series, modes in entries}
    ends = batch["cu_seqlens"][1:-1].cpu().long()
    coords, shares = (values.cpu().tensor_split(ends) for values in (batch["coords"], attention))
    for name in dict.fromkeys(batch["series"]):
        series, modes = images[name]
        parts = [i for i, each in enumerate(batch["series"]) if each == name]
        volume = load_image(series, modes[0]).numpy()
        for column, head in enumerate(heads):
            values = token_map(torch.cat([shares[i][:, column] for i in parts]),
                               torch.cat([coords[i] for i in parts]), batch["size"][parts[0]].tolist())
            image = to_source_space(values, series.affine, series.source_shape, series.source_affine)
            image.to_filename(folder / f"{series.name}{head}.nii.gz")
            attention_sheet(folder / f"{series.name}{head}.png", volume, values, 4, f"{name} {head[1:]}")


@torch.no_grad()
def evaluate_mil(args, checkpoint, device):
    """(word of the loss, names, dict study -> (outputs, labels)) of this rank's studies; draws attention."""
    names = checkpoint["names"]
    studies, labels = find_studies(args, names)
    model = build_study_classifier(len(names))
    load_model_state(model, checkpoint.get("ema_state_dict") or checkpoint["model_state_dict"])
    model.to(device).eval()
    dataset = study_set(studies, False, windows="all")
    loader, results = build_loader(dataset, dataset.groups(), 1, False, ragged_collate), {}
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
    return C.MIL_LOSS, names, results


TASKS = {"mil": evaluate_mil}


# --------------------------------------------------------------------- report

def write_predictions(path, word, names, results):
    """predictions.csv: for each study its probabilities (numbers, for a regression) and its true labels."""
    columns = names if word != "ce" else ["class"]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["study", *(f"predicted {name}" for name in names),
                         *(f"true {name}" for name in columns)])
        for study, (outputs, truth) in sorted(results.items()):
            predicted = {"bce": outputs.sigmoid(), "ce": outputs.softmax(0)}.get(word, outputs).tolist()
            true = ["" if value != value else names[int(value)] if word == "ce" else f"{value:g}"
                    for value in truth.tolist()]
            writer.writerow([study, *(f"{value:.4f}" for value in predicted), *true])


def report(args, word, names, results):
    """Write tables and pictures of all ranks' results, and print the figures."""
    write_predictions(args.output / "predictions.csv", word, names, results)
    pairs = [results[study] for study in sorted(results)]
    outputs, labels = (torch.stack(part) for part in zip(*pairs, strict=True))
    labelled = ~labels.isnan().all(1)
    print(f"{len(results)} studies ({args.split}), {int(labelled.sum())} with labels")
    if labelled.any():
        outputs, labels = outputs[labelled], labels[labelled]
        generator = torch.Generator().manual_seed(C.SEED)
        figures = bootstrap(word, names, outputs, labels, generator, args.bootstrap)
        with open(args.output / "metrics.csv", "w", newline="") as file:
            csv.writer(file).writerows([("figure", "value", "low", "high", "undefined_resamples"),
                                        *((name, *figure) for name, figure in figures.items())])
        print(f"95 % intervals of {args.bootstrap} resamples of the studies\n{table({args.split: figures})}")
        if word in ("bce", "ce"):
            roc_figure(args.output / "roc.png", word, names, outputs, labels, figures)
        if word == "ce":
            confusion_figure(args.output / "confusion.png", names, outputs, labels)
    print(f"Tables and pictures: {args.output}")


def main():
    args, device = parse_args(), setup_distributed()
    device = torch.device(args.device or device)
    checkpoint = load_checkpoint(args.checkpoint)
    if checkpoint["kind"] not in TASKS:
        raise UserError(f"{args.checkpoint}: a checkpoint of kind {checkpoint['kind']}; this script judges "
                        f"{', '.join(TASKS)}")
    restore_constants(C, checkpoint["constants"])
    args.output.mkdir(parents=True, exist_ok=True)
    word, names, results = TASKS[checkpoint["kind"]](args, checkpoint, device)
    results = {study: result for part in gather(results) for study, result in part.items()}
    if not results:
        raise UserError(f"--split {args.split}: none of its studies can be read")
    if is_main():
        report(args, word, names, results)
    cleanup()


if __name__ == "__main__":
    run_script(main)
