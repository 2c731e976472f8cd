"""What validation measures: the loss and the figures of all items, whatever their batches and ranks."""

import torch

from utils.config import UserError
from utils.distributed import gather, gather_rows
from utils.mask_metrics import MaskMetrics
from utils.photo_metrics import PhotoMetrics
from utils.runs import monitored


class LogitScores:
    """Loss and figures of logits, which are all kept.

    loss: (logits [N, C], labels) -> scalar; metrics: has update(logits, labels) and compute(); label: the
    batch's entry that holds the labels.
    """

    def __init__(self, loss, metrics, label="label"):
        self.loss, self.metrics, self.label = loss, metrics, label
        self.logits, self.labels = [], []

    def add(self, batch, outputs, count):
        """Add the first ``count`` items of a batch; outputs: the logits [B, C] first."""
        self.logits.append(outputs[0][:count].float())
        self.labels.append(batch[self.label][:count])

    def compute(self):
        """Collective: dict of floats, "loss" and those of the metrics."""
        logits, labels = (gather_rows(torch.cat(part)) for part in (self.logits, self.labels))
        self.metrics.update(logits, labels)
        return {"loss": self.loss(logits, labels).item(), **self.metrics.compute()}


class SliceScores:
    """Loss and figures of slices: of masks, of classes, or of both.

    loss: (outputs, masks, labels) -> scalar, taken of one slice at a time; their mean counts.  names: of the
    classes; mask_names: of the masks' values 1, 2, ...; either may be empty.  threshold, found_share: see
    MaskMetrics.
    """

    def __init__(self, loss, names, mask_names, threshold=0.5, found_share=0.0):
        self.loss, self.losses = loss, []
        self.masks = MaskMetrics(mask_names, threshold, found_share) if mask_names else None
        self.classes = PhotoMetrics(names) if names else None

    def add(self, batch, outputs, count):
        """Add the first ``count`` slices of a batch of SliceDataset; outputs as named_outputs gives them."""
        masks, labels, outputs = batch["mask"][:count], batch["label"][:count], dict(outputs)
        terms = {"terms": outputs.pop("terms")} if "terms" in outputs else {}
        outputs = {name: values[:count] for name, values in outputs.items()}
        for k in range(count):
            one = {name: values[k:k + 1] for name, values in outputs.items()}
            self.losses.append(self.loss(one | terms, masks[k:k + 1], labels[k:k + 1]).item())
        if self.masks:
            self.masks.update(outputs["masks"].float(), masks, batch["spacing"][:count],
                              batch["case"][:count], batch["patient"][:count])
        if self.classes:
            logits, labels = outputs["labels"].float().cpu(), labels.cpu()
            self.classes.update(logits[labels >= 0], labels[labels >= 0])

    def compute(self):
        """Collective: dict of floats, "loss" and those of MaskMetrics and PhotoMetrics, see ``beside``."""
        losses, masks, classes = sum(gather(self.losses), []), {}, {}
        if self.masks:
            self.masks.reduce()
            masks = self.masks.compute()
        if self.classes:
            self.classes.reduce()
            classes = self.classes.compute()
        return {"loss": sum(losses) / len(losses), **beside(classes, masks)}


def beside(classes, masks):
    """Figures of classes and of masks in one dict; where there are both, the accuracy of masks is renamed."""
    if "accuracy" in classes:
        masks = {name.replace("accuracy", "pixel_accuracy"): value for name, value in masks.items()}
    return classes | masks


def one_slice(labels, channels):
    """(batch, outputs by name) of one slice, zeros, as SliceScores.add takes them; for ``check_monitor``.

    labels, channels: of the logits of classes and of a pixel; 0: there are none.
    """
    batch = {"mask": torch.zeros(1, 8, 8, dtype=torch.int64), "label": torch.zeros(1, dtype=torch.int64),
             "spacing": torch.ones(1, 2), "case": [""], "patient": [""]}
    outputs = {"masks": torch.zeros(1, channels, 8, 8)} if channels else {}
    outputs |= {"labels": torch.zeros(1, labels)} if labels else {}
    return batch, outputs | ({"terms": torch.ones(2, 2)} if len(outputs) == 2 else {})


def check_monitor(constant, monitor, mode, note, scores, batch, outputs):
    """Raise UserError now, not after an epoch, when the ``monitor`` that a constant names is not measured.

    mode: see runs.monitored, whose error is raised here, too.
    note: on what decides what is measured; batch, outputs: of any one item.
    """
    scores.add(batch, outputs, 1)
    measured = ["epoch", "train/loss", *(f"val/{name}" for name in scores.compute())]
    if monitor not in measured:
        raise UserError(f"{constant} = {monitor}: not measured with {note}; there are {', '.join(measured)}")
    monitored(monitor, mode)
