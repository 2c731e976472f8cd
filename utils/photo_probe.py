"""What a frozen backbone's features know of labelled photographs."""

import torch

from datasets.photo_augment import evaluation_view
from utils.device import autocast
from utils.distributed import gather_rows
from utils.probe import knn_accuracy, linear_probe

FIGURES = ("probe_accuracy", "probe_balanced_accuracy", "probe_knn")


@torch.no_grad()
def photo_features(encode, loader, size, device, precision="fp32"):
    """(features float32 [n, E], labels float32 [n]) of all ranks' photographs on the CPU; collective.

    encode: normalised images [B, 3, size, size] -> features [B, E], a network in evaluation mode.  loader: of
    a batch sampler whose ``real`` says how many items of a batch are no repeats; batches with uint8 "image"
    [B, 3, H, W] and "label" int64 [B], -1 = missing, which becomes NaN.  precision: of autocast.
    """
    features, labels = [], []
    for i, batch in enumerate(loader):
        real = loader.batch_sampler.real(i)
        images, _ = evaluation_view(batch["image"].to(device), size)
        with autocast(device, precision):
            found = encode(images)
        features.append(found[:real].float())
        labels.append(batch["label"][:real].float().where(batch["label"][:real] >= 0, torch.nan))
    return gather_rows(torch.cat(features)), gather_rows(torch.cat(labels))


def probe_photos(encode, train_loader, val_loader, size, device, precision="fp32"):
    """Linear and kNN probe: dict of accuracies probe_accuracy, probe_balanced_accuracy and probe_knn.

    Fitted on the training photographs' features, judged on the validation photographs'; nan where a side
    has fewer than two classes.  Arguments: as ``photo_features`` takes them.
    """
    (train_x, train_y), (val_x, val_y) = (
        photo_features(encode, loader, size, device, precision) for loader in (train_loader, val_loader))
    if min(len(labels[~labels.isnan()].unique()) for labels in (train_y, val_y)) < 2:
        return dict.fromkeys(FIGURES, float("nan"))
    sides = train_x.numpy(), train_y.numpy(), val_x.numpy(), val_y.numpy()
    linear = linear_probe(*sides, "multiclass")
    return dict(zip(FIGURES, (linear["accuracy"], linear["balanced_accuracy"], knn_accuracy(*sides)),
                    strict=True))
