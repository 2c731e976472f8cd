"""Slices with synthetic lesions, to learn lesions from masks of the cord."""

import torch
from torch.utils.data import Dataset

from datasets.lesions import paint_lesions
from datasets.slice_augment import generator
from utils.config import UserError

LESION = "lesion"                                    # the mask class that is one already
DRAW = 2                                             # number of these draws; SliceAugment has 0 and 1


class LesionSlices(Dataset):
    """The items of a SliceDataset, but

        image   in a ``share`` of the slices with cord, with lesions painted into it
        mask    0 background, 1 lesion, painted or real, -1 unknown

    slices: the SliceDataset, whose mask classes make up the cord; one of them may be "lesion".
    settings: further ones of ``paint_lesions``.  What is drawn depends on the item's seed alone, so it is the
    same in every epoch of a validation.  Raises UserError for another share, for masks without a cord, and
    when nothing says where lesions are: none is painted, and the masks have none.
    """

    def __init__(self, slices, share, **settings):
        classes = slices.mask_classes
        if not 0 <= share <= 1:
            raise UserError(f"SPINE_LESIONS = {share}: must be a share from 0 to 1")
        if not set(classes) - {LESION}:
            raise UserError(f"SPINE_LESIONS paints into the cord, but SPINE_MASK_CLASSES = {classes}: give "
                            "masks of it, and its name; or set SPINE_LESIONS=0.0")
        if share == 0 and LESION not in classes:
            raise UserError(f"SPINE_LESIONS_IN_VALIDATION = False, but masks of {', '.join(classes)} tell no "
                            "lesions to validate with: set it to True, or give masks of cord and lesion")
        self.slices, self.share, self.settings = slices, share, settings
        self.lesion = 1 + classes.index(LESION) if LESION in classes else 0

    def set_epoch(self, epoch):
        """As SliceDataset has it."""
        self.slices.set_epoch(epoch)

    def __len__(self):
        return len(self.slices)

    def __getitem__(self, index):
        item = self.slices[index]
        image, mask, rng = item["image"][0].numpy(), item["mask"].numpy(), generator(item["seed"], DRAW)
        lesion = (mask == self.lesion) & (mask > 0)
        if rng.uniform() < self.share:
            image, painted = paint_lesions(image, mask > 0, rng, **self.settings)
            lesion |= painted
        mask = torch.from_numpy(lesion).long().where(item["mask"] >= 0, -1)
        return {**item, "image": torch.from_numpy(image)[None], "mask": mask}
