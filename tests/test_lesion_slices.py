"""Synthetic lesions in slices: masks of the cord become masks of lesions."""

import numpy as np
import pytest
import torch

from datasets.lesion_slices import LesionSlices
from utils.config import UserError


class Slices:
    """A SliceDataset in small: 40 slices with a cord, from the 20th on with real lesions, and one without."""

    def __init__(self, mask_classes=("cord", "lesion"), epoch=0):
        self.mask_classes, self.epoch = list(mask_classes), epoch

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 41

    def __getitem__(self, index):
        image = torch.rand(1, 48, 48, generator=torch.Generator().manual_seed(index)) / 5 + 0.3
        mask = torch.zeros(48, 48, dtype=torch.int64)
        mask[10:40, 20:30] = index < 40
        if index >= 20 and "lesion" in self.mask_classes:
            mask[12:15, 22:26] *= 2
        mask[:4] = -1
        return {"image": image, "mask": mask, "seed": 1000 * self.epoch + index, "case": str(index)}


def test_lesions_lie_in_the_cord_and_only_their_pixels_are_bright():
    """Masks say 0, 1 and -1; the image changes near its lesions alone, and never outside of the cord."""
    source = Slices(["cord"])
    for index, item in enumerate(LesionSlices(source, 1.0)[i] for i in range(40)):
        cord = source[index]["mask"] == 1
        changed = (item["image"] != source[index]["image"])[0]
        assert torch.equal(item["mask"] == -1, source[index]["mask"] == -1)
        assert set(item["mask"].unique().tolist()) == {-1, 0, 1}
        assert not (item["mask"] == 1)[~cord].any() and not changed[~cord].any()
        assert changed[item["mask"] == 1].float().mean() > 0.9
        assert item["case"] == str(index) and item["image"].dtype == torch.float32
    empty = LesionSlices(source, 1.0)[40]
    assert torch.equal(empty["image"], source[40]["image"]) and not (empty["mask"] == 1).any()


def test_real_lesions_stay_lesions_and_share_is_how_often_others_come():
    """Nothing that is a lesion may be taught as healthy."""
    source = Slices()
    painted = [bool((item["image"] != source[i]["image"]).any())
               for i, item in enumerate(LesionSlices(source, 0.5)[i] for i in range(40))]
    assert 10 <= sum(painted) <= 30
    for share in (0.0, 1.0):
        dataset = LesionSlices(source, share)
        for index in range(20, 40):
            assert (dataset[index]["mask"] == 1)[source[index]["mask"] == 2].all()
    unpainted = LesionSlices(source, 0.0)
    for index in (0, 25, 40):
        assert torch.equal(unpainted[index]["image"], source[index]["image"])
        assert torch.equal(unpainted[index]["mask"] == 1, source[index]["mask"] == 2)


def test_what_is_painted_depends_on_the_items_seed_and_the_settings_alone():
    """The same in every process; others in the next epoch of training."""
    first, second = (LesionSlices(Slices(), 1.0) for _ in range(2))
    order = np.random.default_rng(0).permutation(20)
    again = {int(i): second[int(i)] for i in order}
    for index in range(20):
        assert torch.equal(first[index]["image"], again[index]["image"])
    before = first[3]["mask"]
    first.set_epoch(1)
    assert not torch.equal(first[3]["mask"], before)
    large = LesionSlices(Slices(), 1.0, semi_axis=(60.0, 70.0))
    assert (large[3]["mask"] == 1).sum() > (second[3]["mask"] == 1).sum()


@pytest.mark.parametrize("classes, share, words", [
    (["cord"], 1.5, "SPINE_LESIONS = 1.5"), (["lesion"], 1.0, "SPINE_MASK_CLASSES = \\['lesion'\\]"),
    (["cord"], 0.0, "SPINE_LESIONS_IN_VALIDATION = False, but masks of cord")])
def test_what_cannot_teach_lesions_is_refused(classes, share, words):
    """A wrong share, masks without a cord, and a validation without lesions."""
    with pytest.raises(UserError, match=words):
        LesionSlices(Slices(classes), share)
