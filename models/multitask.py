"""One network for masks and classes of slices, and the weights of its two losses, fixed or learned."""

import math

import torch
import torch.nn as nn

from models.efficientnet import SpatialMean
from models.unet import UNet
from models.vista import crop, pad_to_multiple
from utils.config import UserError

WEIGHTINGS = ("fixed", "uncertainty")


class MultiTask(nn.Module):
    """A U-Net with a second head, on the mean of the encoder's deepest map, for the class of the slice.

    encoder, num_classes and options: as UNet has them, whose names the parts keep, so that its weights start
    this network and the reverse.  label_classes: of the slice.  weighting, weights: of the two losses, see
    TaskWeights, masks first.
    """

    def __init__(self, encoder="resnet18", num_classes=1, label_classes=2, weighting="fixed",
                 weights=(1.0, 1.0), **options):
        super().__init__()
        unet = UNet(num_classes=num_classes, encoder=encoder, **options)
        self.encoder, self.decoder, self.head = unet.encoder, unet.decoder, unet.head
        self.pool = SpatialMean()
        self.classifier = nn.Linear(self.encoder.dim, label_classes)
        self.task_weights = TaskWeights(weighting, weights)

    def forward(self, images):
        """images [B, 1, H, W] in [0, 1], of any size -> (masks, labels, terms).

        masks: logits [B, C, H, W]; labels: logits [B, K]; terms [2, 2] of ``TaskWeights``: an output,
        since sharded training gathers parameters in ``forward`` alone.
        """
        padded = pad_to_multiple(images, self.encoder.multiple)
        maps = self.encoder.stages(padded)
        masks = crop(self.head(self.decoder(padded, maps)), images.shape[2:])
        return masks, self.classifier(self.pool(maps[-1]).flatten(1)), self.task_weights()


class TaskWeights(nn.Module):
    """Weights of the losses of several tasks.

    "fixed": the given ``weights``, 0 or more.  "uncertainty": exp(-s) with a learned s = log sigma^2
    for each task, which starts at the given weight; s / 2 is added to the loss, or all weights would fall to
    0 (Kendall et al. 2018, arXiv:1705.07115, eq. 10, for losses that are log-likelihoods of classes).
    Raises UserError for another word, and for weights that cannot be.
    """

    def __init__(self, word, weights):
        super().__init__()
        if word not in WEIGHTINGS:
            raise UserError(f'SPINE_TASK_WEIGHTING is "{word}"; set it to one of {", ".join(WEIGHTINGS)}')
        if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise UserError(f"SPINE_TASK_WEIGHTS = {list(weights)}: give numbers of 0 or more, not only 0")
        if word == "uncertainty" and not all(weights):
            raise UserError(f"SPINE_TASK_WEIGHTS = {list(weights)}: learned weights start above 0; leave the "
                            'task out with SPINE_TASK_WEIGHTING = "fixed"')
        weights = torch.tensor(weights, dtype=torch.float32)
        if word == "fixed":
            self.register_buffer("weights", weights)
        else:
            self.log_variances = nn.Parameter(-weights.log())
        self.learned = word == "uncertainty"

    def forward(self):
        """float32 [2, T]: factors of the losses, and terms to be added to them."""
        if self.learned:
            return torch.stack([torch.exp(-self.log_variances), self.log_variances / 2])
        return torch.stack([self.weights, torch.zeros_like(self.weights)])


def weighted_total(losses, terms, present):
    """Sum over tasks of factor * loss + addend: losses, T float32 scalars; terms [2, T] -> scalar.

    present: T booleans, False for a task of which the batch has no label: it must not teach its weight that
    the task is easy.
    """
    present = torch.as_tensor(present, device=terms.device)
    return torch.where(present, terms[0] * torch.stack(list(losses)) + terms[1], 0.0).sum()
