"""Pictures of slices with masks."""

import numpy as np
import torch
from PIL import Image

from utils.em_pictures import colours
from utils.overlay import CAPTION_HEIGHT, GAP, NEW, PANEL_PIXELS, RESOLVED
from utils.slice_sheet import numbered, part_colours, slice_rows, slice_sheet


def batch(side=PANEL_PIXELS[0]):
    """Two black slices; the truth is a block, of the second slice unknown."""
    masks = torch.zeros(2, side, side, dtype=torch.int64)
    masks[0, 50:100, 50:100] = 1
    masks[1] = -1
    logits = torch.full((2, 1, side, side), -5.0)
    logits[:, :, 200:260, 200:260] = 1.0
    labels = torch.tensor([[0.0, 9.0], [9.0, 0.0]])
    return {"image": torch.zeros(2, 1, side, side), "mask": masks, "case": ["a" * 90, "b"],
            "label": torch.tensor([1, -1])}, {"masks": logits, "labels": labels}


def test_a_row_shows_the_slice_the_truth_and_the_prediction(tmp_path):
    """Each mask in its own panel, at its own place, in its colour; unknown pixels stay clear."""
    data, outputs = batch()
    slice_sheet(tmp_path / "sheet.png", slice_rows(data, {"masks": outputs["masks"]}, [], ["cord"]))
    picture = np.asarray(Image.open(tmp_path / "sheet.png")).astype(int)
    side = len(data["mask"][0])
    height, width = CAPTION_HEIGHT + side + GAP, side + GAP
    assert picture.shape == (2 * height, 3 * width - GAP, 3)
    first, second = picture[CAPTION_HEIGHT:height], picture[height + CAPTION_HEIGHT:]
    panels = [[strip[:side, k * width:k * width + side] for k in range(3)] for strip in (first, second)]
    assert not panels[0][0].any() and not panels[1][0].any() and not panels[1][1].any()
    lit = panels[0][1].any(-1)
    assert lit[50:100, 50:100].all() and lit.sum() < 52 * 52
    assert np.array_equal(panels[0][1][50, 60], RESOLVED)
    assert panels[0][2].any(-1)[200:260, 200:260].all() and panels[1][2].any()


def test_cord_and_lesion_have_the_colours_of_the_cascade():
    """Whatever their number in the masks; other parts have colours of their own, unknown pixels none."""
    mask = torch.tensor([-1, 0, 1, 2])
    for names, due in ((["cord", "lesion"], (RESOLVED, NEW)), (["lesion", "cord"], (NEW, RESOLVED)),
                       (["lesion", "disc"], (NEW, colours(np.array(3))))):
        found = part_colours(numbered(mask, names))
        assert found[2:].tolist() == [list(colour) for colour in due] and not found[:2].any()


def test_the_caption_tells_the_class_and_how_sure_it_is():
    """Where there are classes; an unknown one is called so."""
    data, outputs = batch(8)
    rows = slice_rows(data, {"labels": outputs["labels"]}, ["bare", "barred"], [])
    assert [row[0] for row in rows] == ["barred: barred 1.00", "unknown: bare 1.00"]
    assert all(len(row) == 2 for row in rows)
    assert [len(row) for row in slice_rows(data, {"masks": outputs["masks"]}, [], ["cord"])] == [4, 4]


def test_the_threshold_decides_what_is_predicted():
    """As in the metrics: probability 0.73 is not 0.9."""
    data, outputs = batch()
    found = [slice_rows(data, {"masks": outputs["masks"]}, [], ["cord"], threshold)[0][3].sum().item()
             for threshold in (0.5, 0.9)]
    assert found == [3600, 0]
