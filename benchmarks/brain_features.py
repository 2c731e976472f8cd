"""What frozen features know of held-out brain studies: pretrained against random, beside a small CNN.

    python benchmarks/brain_features.py --checkpoint runs/brain/jepa_last.pt \
        --data data/demo/studies/cache --labels data/demo/studies/labels.csv
    python benchmarks/brain_features.py --checkpoint runs/brain/jepa_last.pt \
        --data data/cache --types t1c t1 flair

--labels   findings: a linear probe is fitted on the mean tokens of the training and validation studies of the
           pretraining's split, and judged on the test studies, which no network has seen (macro AUROC).
--types    kinds of MRI series, words in the series' names, the first that fits; balanced accuracy on the test
           studies.  Of few studies each is judged by a probe fitted on all others; the encoder may then have
           seen its images, without labels.
The random encoder is the same network before training; the CNN (three strided 3D convolutions on volumes of
24 x 48 x 48 voxels) is trained from scratch on the labels that the probe gets.  Mean and range over --seeds.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).parents[1]))

import constants as C
from builders import build_loader, build_token_vit, study_set
from datasets.cache import load_image, read_cache
from datasets.intensity import normalise
from datasets.labels import read_labels
from datasets.studies import ragged_collate, split_studies
from losses.classification import classification_loss
from utils.checkpoint import load_backbone, load_checkpoint
from utils.classification import StudyMetrics
from utils.config import restore_constants
from utils.device import autocast
from utils.probe import linear_probe

CNN_SIZE, CNN_EPOCHS = (24, 48, 48), 40
FEW = 20                          # studies, up to which each is judged by a probe fitted on all others


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="a jepa_*.pt")
    parser.add_argument("--data", required=True, help="a cache of studies")
    parser.add_argument("--labels", help="CSV of findings")
    parser.add_argument("--types", nargs="+", help="words in the names of series")
    parser.add_argument("--seeds", type=int, default=3, help="of random encoders and CNNs")
    return parser.parse_args()


@torch.no_grad()
def series_features(encoder, studies):
    """(names "study/series", means of the tokens float32 [N, E]) of every image of the studies."""
    dataset = study_set(studies, False, windows="all")
    names, features = [], []
    for batch in build_loader(dataset, dataset.groups(), C.JEPA_BATCH_SIZE, False, ragged_collate):
        with autocast(torch.device("cpu"), C.PRECISION):
            tokens = encoder(batch["tokens"], batch["coords"], batch["cu_seqlens"]).float()      # [T, E]
        names += batch["series"]
        features += [part.mean(0) for part in tokens.tensor_split(batch["cu_seqlens"][1:-1].long())]
    return names, torch.stack(features)


def mean_by(keys, rows):
    """{key: mean of its rows}, the rows of one key being a study's images."""
    return {key: rows[[other == key for other in keys]].mean(0) for key in dict.fromkeys(keys)}


def volumes_of(studies):
    """(names "study/series", float32 [N, 1, 24, 48, 48]) of every image, normalised and resized."""
    names, volumes = [], []
    for series in (series for study in studies for series in study.series):
        for mode in series.images:
            volume = normalise(load_image(series, mode), mode)[None, None]
            volumes.append(F.interpolate(volume, CNN_SIZE, mode="trilinear", antialias=False)[0])
            names.append(f"{series.study}/{series.name}")
    return names, torch.stack(volumes)


def train_cnn(volumes, groups, labels, word, outputs, seed):
    """A small CNN: volumes [N, 1, ...], groups int64 [N], the row of each in labels [B, L]."""
    torch.manual_seed(seed)
    layers = [block for wide, narrow in ((1, 16), (16, 32), (32, 64)) for block in (
        nn.Conv3d(wide, narrow, 3, 2, 1), nn.GroupNorm(8, narrow), nn.ReLU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(64, outputs))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, CNN_EPOCHS * -(-len(labels) // 16))
    for _ in range(CNN_EPOCHS):
        for chosen in torch.randperm(len(labels)).split(16):
            member = torch.isin(groups, chosen)
            flip = [axis for axis in (2, 3, 4) if torch.rand(()) < 0.5]
            logits = model(volumes[member].flip(flip) + 0.05 * torch.randn(()))
            rows = torch.searchsorted(chosen.sort().values, groups[member])
            pooled = torch.zeros(len(chosen), outputs).index_add(0, rows, logits)
            pooled = pooled / rows.bincount(minlength=len(chosen))[:, None]
            loss = classification_loss(word, pooled, labels[chosen.sort().values])
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval()


def findings(args, encoders):
    """{row of the table: macro AUROC of the test studies, one per seed}."""
    labels = read_labels(args.labels, "bce")
    splits = split_studies(read_cache(args.data), C.STUDY_VAL_FRACTION, C.STUDY_TEST_FRACTION,
                           C.STUDY_SPLIT_CSV or None, C.STUDY_PATIENTS)
    sides = [labels.match(side)[0] for side in (splits["train"] + splits["val"], splits["test"])]
    answers = [torch.stack([labels.values[study.name] for study in side]) for side in sides]
    print(f"findings: {', '.join(labels.names)}; {len(sides[0])} studies to fit, {len(sides[1])} to judge")
    scores = {}
    for name, members in encoders.items():
        for encoder in members:
            features = []
            for side in sides:
                series, rows = series_features(encoder, side)
                means = mean_by([each.split("/")[0] for each in series], rows)
                features.append(np.stack([means[study.name].numpy() for study in side]))
            score = linear_probe(features[0], answers[0].numpy(), features[1], answers[1].numpy(),
                                 "multilabel")["auroc"]
            scores.setdefault(name, []).append(score)
    (names, volumes), (test_names, test_volumes) = map(volumes_of, sides)
    rows = {study.name: row for row, study in enumerate(sides[0])}
    groups = torch.tensor([rows[each.split("/")[0]] for each in names])
    for seed in range(args.seeds):
        model = train_cnn(volumes, groups, answers[0], "bce", len(labels.names), seed)
        with torch.no_grad():
            logits = mean_by([each.split("/")[0] for each in test_names], model(test_volumes))
        metrics = StudyMetrics("bce", labels.names)
        metrics.update(torch.stack([logits[study.name] for study in sides[1]]), answers[1])
        scores.setdefault("small CNN, supervised", []).append(metrics.compute()["auroc"])
    return scores


def types(args, encoders):
    """{row of the table: balanced accuracy over series, one per seed}."""
    studies = read_cache(args.data)
    kind_of = {}
    for series in (series for study in studies for series in study.series if series.mode == "mri"):
        words = [word for word in args.types if word in series.name.lower()]
        if words:
            kind_of[f"{series.study}/{series.name}"] = args.types.index(words[0])
    names = list(kind_of)
    answers, groups = np.array(list(kind_of.values())), np.array([name.split("/")[0] for name in names])
    folds = [groups == group for group in np.unique(groups)]
    if len(folds) > FEW:
        splits = split_studies(studies, C.STUDY_VAL_FRACTION, C.STUDY_TEST_FRACTION,
                               C.STUDY_SPLIT_CSV or None, C.STUDY_PATIENTS)
        folds = [np.isin(groups, [study.name for study in splits["test"]])]
    judged = np.logical_or.reduce(folds)
    counts = ", ".join(f"{np.sum(answers[judged] == i)} {word}" for i, word in enumerate(args.types))
    print(f"series to judge: {counts}, of {len(set(groups[judged]))} studies; "
          f"{'each by the other studies' if len(folds) > 1 else f'{np.sum(~judged)} series to fit'}")
    found, volumes = volumes_of(studies)
    volumes = torch.stack([volumes[found.index(name)] for name in names])

    def score(predict):
        """Balanced accuracy of predict(rows to fit, rows to judge) -> classes."""
        predicted = np.zeros_like(answers)
        for fold in folds:
            predicted[fold] = predict(~fold, fold)
        return balanced_accuracy_score(answers[judged], predicted[judged])

    scores = {}
    for name, members in encoders.items():
        for encoder in members:
            means = mean_by(*series_features(encoder, studies))
            features = np.stack([means[each].numpy() for each in names])
            scores.setdefault(name, []).append(score(lambda fit, judge, x=features: make_pipeline(
                StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000)).fit(
                    x[fit], answers[fit]).predict(x[judge])))
    for seed in range(args.seeds):
        def cnn(fit, judge, seed=seed):
            labels = torch.from_numpy(answers[fit]).float()[:, None]
            model = train_cnn(volumes[fit], torch.arange(len(labels)), labels, "ce", len(args.types), seed)
            with torch.no_grad():
                return model(volumes[judge]).argmax(1).numpy()
        scores.setdefault("small CNN, supervised", []).append(score(cnn))
    return scores


def main():
    args = parse_args()
    checkpoint = load_checkpoint(args.checkpoint, "jepa")
    restore_constants(C, checkpoint["constants"])
    C.NUM_WORKERS = 0
    pretrained = build_token_vit().eval()
    load_backbone(pretrained, args.checkpoint)
    encoders = {"pretrained, frozen": [pretrained], "random, frozen": []}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        encoders["random, frozen"].append(build_token_vit().eval())
    scores = findings(args, encoders) if args.labels else types(args, encoders)
    for name, values in scores.items():
        spread = f"  ({min(values):.3f} to {max(values):.3f}, {len(values)} seeds)" if len(values) > 1 else ""
        print(f"{name:24s} {np.mean(values):.3f}{spread}")
    best = max(scores["random, frozen"])
    print(f"ratio: {scores['pretrained, frozen'][0] / best:.2f} (pretrained / best random encoder)")


if __name__ == "__main__":
    main()
