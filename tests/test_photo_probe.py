"""SimCLR's network, what frozen features know of photographs, and sheets of photographs."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch.utils.data import DataLoader

from datasets.photo_augment import evaluation_view
from datasets.samplers import ItemBatchSampler
from models.photo import build_photo_model
from models.simclr import SimCLR
from utils.photo_probe import photo_features, probe_photos
from utils.photo_sheet import photo_sheet, prediction_rows, view_rows


def loader_of(labels, seed=0, rank=0, world_size=1):
    """Batches of photographs whose colour is their class's."""
    generator = torch.Generator().manual_seed(seed)
    items = [{"image": (torch.randint(0, 60, (3, 20, 20), generator=generator)
                        + 150 * (torch.arange(3) == label)[:, None, None]).to(torch.uint8), "label": label}
             for label in labels]
    sampler = ItemBatchSampler(len(items), 4, False, 0, rank, world_size)
    return DataLoader(items, batch_sampler=sampler)


def colours(images):
    """Mean colour and two dimensions of nothing, [B, 5]."""
    return torch.cat([images.mean((2, 3)), images[:, :2, 0, 0]], 1)


def test_features_are_those_of_each_photograph_once():
    """Read in order, repeats left out; a missing label is NaN."""
    loader = loader_of([0, 2, -1, 1, 1])
    features, labels = photo_features(colours, loader, 16, torch.device("cpu"))
    images = torch.stack([item["image"] for item in loader.dataset])
    torch.testing.assert_close(features, colours(evaluation_view(images, 16)[0]))
    assert labels.tolist()[:2] + labels.tolist()[3:] == [0, 2, 1, 1] and math.isnan(labels[2])
    share, _ = photo_features(colours, loader_of([0, 1, 2], rank=1, world_size=2), 16, torch.device("cpu"))
    assert len(share) == 1                                   # of three, rank 1 has one and a repeat


def test_probes_are_those_of_scikit_learn():
    """Linear accuracy on held-out photographs; all right where colours tell the classes, chance without."""
    train, val = loader_of([0, 1, 2] * 6), loader_of([2, 1, 0] * 3, seed=1)
    figures = probe_photos(colours, train, val, 16, torch.device("cpu"))
    assert figures == {"probe_accuracy": 1.0, "probe_balanced_accuracy": 1.0, "probe_knn": 1.0}
    def noise(images):
        return images[:, 0, :4, 0]
    (train_x, train_y), (val_x, val_y) = (photo_features(noise, each, 16, torch.device("cpu"))
                                          for each in (train, val))
    scale = train_x.numpy().mean(0), train_x.numpy().std(0)
    model = LogisticRegression(class_weight="balanced", max_iter=2000).fit(
        (train_x.numpy() - scale[0]) / scale[1], train_y)
    expected = model.score((val_x.numpy() - scale[0]) / scale[1], val_y)
    figures = probe_photos(noise, train, val, 16, torch.device("cpu"))
    assert figures["probe_accuracy"] == pytest.approx(expected)


def test_a_probe_of_one_class_is_undefined():
    """Nothing can be told apart: nan, not a perfect score."""
    figures = probe_photos(colours, loader_of([0, 1, 2, 0]), loader_of([1, 1, -1]), 16, torch.device("cpu"))
    assert all(math.isnan(value) for value in figures.values())


def test_the_projector_stands_on_the_features():
    """Linear, ReLU, linear of the features, which come out as they are; gradient reaches every weight."""
    torch.manual_seed(0)
    model = SimCLR(build_photo_model("efficientnet_b0", 0), 24).eval()
    images = torch.rand(2, 3, 32, 32)
    projections, features = model(images)
    torch.testing.assert_close(features, model.backbone.features(images))
    first, _, second = model.projector
    torch.testing.assert_close(projections, second(first(features).clamp(min=0)))
    assert projections.shape == (2, 24)
    projections.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_sheets_show_every_picture_under_its_caption(tmp_path):
    """Rows of so many columns; a long caption is cut at its beginning, an image in [0, 1] is as in uint8."""
    image = torch.randint(0, 256, (3, 30, 30), dtype=torch.uint8)
    for name, picture in (("a", image), ("b", image / 255)):
        photo_sheet(tmp_path / f"{name}.png", [(picture, "x" * 72)] * 5, columns=4)
    first, second = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "ab")
    assert np.array_equal(first, second) and first.shape[0] > 2 * 320 and first.shape[1] > 4 * 320


def test_rows_name_what_they_show():
    """True class, predicted class and its probability; two views beside each other."""
    images, logits = torch.rand(2, 3, 8, 8), torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    rows = prediction_rows({"label": torch.tensor([1, 0])}, logits, images, ["sound", "ill"])
    assert [caption for _, caption in rows] == ["ill: sound 0.50", "sound: ill 0.95"]
    pair = torch.rand(4, 3, 8, 8)
    rows = view_rows({"case": ["a", "b"]}, (pair, None))
    assert [caption for _, caption in rows] == ["a", "second view", "b", "second view"]
    assert torch.equal(rows[1][0], pair[2]) and torch.equal(rows[2][0], pair[1])
