"""What a frozen encoder's features know of labelled studies."""

import numpy as np
import torch

from utils.device import autocast, to_device
from utils.distributed import gather
from utils.probe import knn_accuracy, linear_probe


@torch.no_grad()
def study_features(encoder, loader, device, precision="fp32"):
    """{study: mean of its tokens' features, float32 [E] on the CPU}; collective, every rank gets all studies.

    encoder: (tokens [T, 1024], coords [T, 3], cu_seqlens [S + 1]) -> [T, E].  loader: batches of
    datasets.studies.ragged_collate, whole studies; each rank its share.  precision: of autocast.
    """
    features = {}
    for batch in loader:
        batch = to_device(batch, device, ("cu_seqlens", "study_cu_seqlens"))      # a GPU waits for none
        with autocast(device, precision):
            tokens = encoder(batch["tokens"], batch["coords"], batch["cu_seqlens"])             # [T, E]
        parts = tokens.float().cpu().tensor_split(batch["study_cu_seqlens"][1:-1].long())
        features.update((study, part.mean(0)) for study, part in zip(batch["study"], parts, strict=True))
    return {study: value for share in gather(features) for study, value in share.items()}


def probe_studies(encoder, train_loader, val_loader, labels, device, precision="fp32"):
    """Linear and kNN probe on multilabel study labels: dict probe_auroc, probe_balanced_accuracy, probe_knn.

    Fitted on the training studies' mean features, judged on the validation studies'; means over the labels.
    labels: dict study -> float tensor [L] of 0, 1 and NaN (missing).  Empty when a side has no labelled
    study; nan when no label has both classes on both sides.
    """
    features, answers = [], []
    for loader in (train_loader, val_loader):
        found = study_features(encoder, loader, device, precision)
        names = [study for study in sorted(found) if study in labels]
        if not names:
            return {}
        features.append(torch.stack([found[study] for study in names]).numpy())                # [B, E]
        answers.append(torch.stack([labels[study] for study in names]).numpy())                # [B, L]
    told_apart = [all({0, 1} <= set(side[:, i]) for side in answers) for i in range(answers[0].shape[1])]
    if not any(told_apart):                          # few studies: no label has both classes on both sides
        return dict.fromkeys(("probe_auroc", "probe_balanced_accuracy", "probe_knn"), float("nan"))
    linear = linear_probe(features[0], answers[0], features[1], answers[1], "multilabel")
    knn = []
    for train_answers, val_answers in zip(answers[0].T, answers[1].T, strict=True):
        known = [~np.isnan(column) for column in (train_answers, val_answers)]
        if known[0].any() and known[1].any():
            knn.append(knn_accuracy(features[0][known[0]], train_answers[known[0]],
                                    features[1][known[1]], val_answers[known[1]]))
    return {"probe_auroc": linear["auroc"], "probe_balanced_accuracy": linear["balanced_accuracy"],
            "probe_knn": float(np.mean(knn))}
