"""Pictures of masked prediction."""

import numpy as np
import torch
from conftest import grid_coords
from PIL import Image

from datasets.tokens import tokenize
from utils.mask_sheet import mask_rows, mask_sheet, panels


def series(size=(2, 3, 4)):
    """(tokens, coords) of a volume whose values rise from token to token."""
    coords = grid_coords(size)
    values = torch.arange(float(len(coords))).view(*size)
    volume = values.repeat_interleave(4, 0).repeat_interleave(16, 1).repeat_interleave(16, 2)
    return tokenize(volume), coords


def test_panels_show_tokens_where_they_lie_what_was_seen_and_where_prediction_failed():
    """The slice with most tokens; hidden ones are black in the second panel, well predicted in the third."""
    tokens, coords = series()
    kept = torch.tensor([*range(12), 12, 13])                       # the first slice whole, two of the second
    context = torch.zeros(14, dtype=torch.bool)
    context[[0, 5]] = True
    target, error = ~context, torch.zeros(12)
    error[0] = 1.0                                                  # of token 1, the first target
    parts = (tokens[kept], coords[kept], context, target, error)
    image, seen, heat = panels(*(part.numpy() for part in parts))
    assert image.shape == (48, 64, 3)
    means = image[::16, ::16, 0].ravel().astype(int)
    assert (np.diff(means) > 0).all()                               # row by row, as the values rise
    lit = seen.reshape(3, 16, 4, 16, 3).any((1, 3, 4))
    assert lit.ravel().nonzero()[0].tolist() == [0, 5]
    bright = heat.reshape(3, 16, 4, 16, 3).mean((1, 3, 4)).ravel()
    assert bright.argmax() == 1 and bright[0] == 0


def test_rows_of_a_ragged_batch_are_its_series_each_with_its_own_errors(tmp_path):
    """A sheet has a row per series, also of other sizes."""
    parts = [series((1, 2, 2)), series((2, 3, 4))]
    tokens, coords = (torch.cat(values) for values in zip(*parts, strict=True))
    context = torch.arange(len(tokens)) % 3 == 0
    batch = {"tokens": tokens, "coords": coords, "context": context, "target": ~context,
             "cu_seqlens": torch.tensor([0, 4, 28], dtype=torch.int32)}
    rows = mask_rows(batch, torch.arange(float((~context).sum())))
    assert [len(row["tokens"]) for row in rows] == [4, 24]
    assert [row["error"].tolist()[0] for row in rows] == [0, 2]
    mask_sheet(tmp_path / "sheet.png", rows)
    assert np.asarray(Image.open(tmp_path / "sheet.png")).shape[0] > 2 * 300
