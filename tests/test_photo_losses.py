"""Losses of photographs against loops and peers, for soft targets and weighted classes."""

import math

import kornia
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss
from torchvision.transforms.v2 import MixUp

from losses.classification import (
    PHOTO_LOSSES,
    check_photo_loss,
    class_weights,
    combined,
    focal,
    photo_loss,
    soft_cross_entropy,
)
from utils.config import UserError

WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0])


def data(soft=True, count=9, seed=0):
    """logits [count, 4] and targets [count, 4]: mixtures as MixUp makes them, or plain labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, 4, generator=generator)
    labels = torch.randint(4, (2, count), generator=generator)
    share = torch.rand(count, 1, generator=generator) if soft else 1.0
    targets = share * F.one_hot(labels[0], 4) + (1 - share) * F.one_hot(labels[1], 4)
    return logits.requires_grad_(), targets


def by_loops(logits, targets, weight, gamma, smoothing):
    """One class of one image at a time; gamma attenuates, smoothing softens."""
    total = 0.0
    for x, target in zip(logits, targets, strict=True):
        p = x.exp() / x.exp().sum()
        for c in range(len(x)):
            t = (1 - smoothing) * target[c] + smoothing / len(x)
            total = total - weight[c] * t * (1 - p[c]) ** gamma * p[c].log()
    return total / len(logits)


def assert_same(first, second, logits):
    """Equal losses with equal gradients."""
    torch.testing.assert_close(first, second)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits, retain_graph=True)[0]
                                 for loss in (first, second)),
                               rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("soft", [False, True])
def test_each_loss_equals_a_loop_over_images_and_classes(soft, weight):
    """The cross-entropy is smoothed and not attenuated, the focal loss the reverse, combined half of each."""
    logits, targets = data(soft)
    factors = torch.ones(4) if weight is None else weight
    cross = by_loops(logits, targets, factors, 0.0, 0.1)
    attenuated = by_loops(logits, targets, factors, 1.5, 0.0)
    for word, expected in {"ce": cross, "focal": attenuated, "combined": (cross + attenuated) / 2}.items():
        assert_same(photo_loss(word, logits, targets, weight, 1.5, 0.1), expected, logits)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_cross_entropy_is_torchs(smoothing):
    """For plain labels as for soft ones; weighted, it is divided by the images and not by the weights."""
    logits, targets = data(soft=False)
    labels = targets.argmax(1)
    assert_same(soft_cross_entropy(logits, targets, None, smoothing),
                F.cross_entropy(logits, labels, label_smoothing=smoothing), logits)
    total = F.cross_entropy(logits, labels, WEIGHT, reduction="sum", label_smoothing=smoothing)
    assert_same(soft_cross_entropy(logits, targets, WEIGHT, smoothing), total / 9, logits)


def test_without_attenuation_the_focal_loss_is_the_cross_entropy():
    """gamma 0; also where the network is so sure that p is 1."""
    logits, targets = data()
    for x in (logits, (1e4 * logits.detach()).requires_grad_()):
        assert_same(focal(x, targets, WEIGHT, 0.0), soft_cross_entropy(x, targets, WEIGHT), x)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_with_plain_labels_the_focal_loss_is_kornias_and_torchvisions(gamma):
    """kornia's mean counts every class of an image; of two classes the softmax is torchvision's sigmoid."""
    logits, targets = data(soft=False)
    assert_same(focal(logits, targets, WEIGHT, gamma),
                kornia.losses.focal_loss(logits, targets.argmax(1), None, gamma, "sum", WEIGHT) / 9, logits)
    x, one = logits[:, :1], targets[:, :1]
    two = torch.cat([torch.zeros_like(x), x], 1), torch.cat([1 - one, one], 1)
    assert_same(focal(*two, None, gamma), sigmoid_focal_loss(x, one, -1, gamma, "mean"), logits)
    assert_same(focal(*two, torch.tensor([0.75, 0.25]), gamma),
                sigmoid_focal_loss(x, one, 0.25, gamma, "mean"), logits)


@pytest.mark.parametrize("word", PHOTO_LOSSES)
def test_the_loss_of_mixed_images_is_the_mixture_of_the_labels_losses(word):
    """Zhang et al. 2018 mix losses or targets alike; 1 - p of the mixture's p would break it."""
    images, labels = torch.rand(9, 3, 4, 4), torch.randint(4, (9,))
    torch.manual_seed(0)
    mixed, targets = MixUp(num_classes=4)(images, labels)
    share = ((mixed - images.roll(1, 0)) / (images - images.roll(1, 0))).median()
    logits, first = data()[0], F.one_hot(labels, 4).float()
    parts = [photo_loss(word, logits, one, WEIGHT, 2.0, 0.1) for one in (first, first.roll(1, 0))]
    loss = photo_loss(word, logits, targets, WEIGHT, 2.0, 0.1)
    torch.testing.assert_close(loss, share * parts[0] + (1 - share) * parts[1], rtol=1e-4, atol=1e-5)


def test_the_focal_loss_attenuates_what_is_easy():
    """With gamma 2 a hundredth is left of the cross-entropy at p = 0.9, and four fifths at p = 0.1."""
    for p, share in ((0.9, 0.01), (0.1, 0.81)):
        logits, targets = torch.tensor([[p, 1 - p]]).log(), torch.tensor([[1.0, 0.0]])
        torch.testing.assert_close(focal(logits, targets, None, 2.0) / -math.log(p), torch.tensor(share))


def test_every_option_changes_the_losses_that_take_it_and_no_other():
    """An option that does nothing would be a wrong report of what was run."""
    logits, targets = data()
    takes = {"gamma": ("focal", "combined"), "label_smoothing": ("ce", "combined"), "weight": PHOTO_LOSSES}
    plain = {"gamma": 2.0, "label_smoothing": 0.0, "weight": None}
    for option, value in {"gamma": 3.0, "label_smoothing": 0.2, "weight": WEIGHT}.items():
        for word in PHOTO_LOSSES:
            same = torch.equal(photo_loss(word, logits, targets, **plain),
                               photo_loss(word, logits, targets, **{**plain, option: value}))
            assert same == (word not in takes[option]), (word, option)
    assert len({photo_loss(word, logits, targets).item() for word in PHOTO_LOSSES}) == 3
    assert_same(combined(logits, targets, WEIGHT, 2.0, 0.1),
                photo_loss("combined", logits, targets, WEIGHT, 2.0, 0.1), logits)


@pytest.mark.parametrize("word", PHOTO_LOSSES)
def test_neither_a_shift_of_the_logits_nor_the_order_matters(word):
    """A softmax knows differences alone; classes and images have no order."""
    logits, targets = data()
    loss, order = photo_loss(word, logits, targets, WEIGHT), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(photo_loss(word, logits + 7, targets, WEIGHT), loss)
    torch.testing.assert_close(photo_loss(word, logits[:, order], targets[:, order], WEIGHT[order]), loss)
    torch.testing.assert_close(photo_loss(word, logits.flip(0), targets.flip(0), WEIGHT), loss)


@pytest.mark.parametrize("word", PHOTO_LOSSES)
def test_an_image_counts_alike_whatever_stands_beside_it(word):
    """The loss of a batch is the mean of its images' losses, so accumulation and ranks do not change it."""
    logits, targets = data()
    parts = [photo_loss(word, logits[i:i + 3], targets[i:i + 3], WEIGHT) for i in (0, 3, 6)]
    torch.testing.assert_close(sum(parts) / 3, photo_loss(word, logits, targets, WEIGHT))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("word", PHOTO_LOSSES)
def test_a_network_that_is_wholly_sure_has_a_finite_gradient(word, gamma):
    """p is 1 or 0 in float32, right or wrong; the slope of a root of 1 - p is infinite there."""
    for size in (0.0, 20.0, 200.0, 1e6):
        logits = (size * torch.eye(4)).requires_grad_()
        for targets in (torch.eye(4), torch.eye(4).roll(1, 0), torch.full((4, 4), 0.25)):
            loss = photo_loss(word, logits, targets, None, gamma, 0.1)
            gradient, = torch.autograd.grad(loss, logits)
            assert loss.isfinite() and gradient.isfinite().all() and gradient.abs().max() < 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("word", PHOTO_LOSSES)
def test_half_precision_is_scored_in_float32(word, dtype):
    """Under autocast too; the gradient comes back in the type of the logits."""
    logits, targets = data()
    logits = (100 * logits.detach()).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = photo_loss(word, logits, targets.to(dtype), WEIGHT.to(dtype))
    torch.testing.assert_close(loss, photo_loss(word, logits.float(), targets.to(dtype).float(), WEIGHT))
    gradient, = torch.autograd.grad(loss, logits)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype and gradient.isfinite().all()


def test_what_makes_no_sense_is_refused_in_one_line():
    """The line names the constant, and for the loss the words there are."""
    with pytest.raises(UserError, match='HVIT_LOSS is "foccal".*ce, focal, combined'):
        check_photo_loss("foccal", 2.0, 0.1)
    for gamma in (-1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="HVIT_FOCAL_GAMMA"):
            check_photo_loss("focal", gamma, 0.1)
    for smoothing in (-0.1, 1.0, math.nan):
        with pytest.raises(UserError, match="HVIT_LABEL_SMOOTHING"):
            check_photo_loss("ce", 2.0, smoothing)
    logits, targets = data()
    with pytest.raises(UserError, match="HVIT_LOSS"):
        photo_loss("bce", logits, targets)
    with pytest.raises(ValueError, match="targets"):
        photo_loss("ce", logits, targets.argmax(1))


def test_class_weights_make_all_classes_count_alike():
    """n / (C * count): each class has the same sum of weights over the training images, n over all."""
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    weights = class_weights(labels, ["healthy", "rust", "blight"])
    torch.testing.assert_close(weights, torch.tensor([10 / 18, 10 / 9, 10 / 3]))
    torch.testing.assert_close(weights[labels].sum(), torch.tensor(10.0))
    torch.testing.assert_close(class_weights(labels.tolist(), "abc"), weights)


def test_a_class_without_training_images_is_named():
    """Its weight would be infinite."""
    with pytest.raises(UserError, match="no training image is of class rust, mould,"):
        class_weights([0, 0, 2], ["healthy", "rust", "blight", "mould"])
