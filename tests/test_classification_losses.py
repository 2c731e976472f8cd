"""Losses of study-level predictions against torch's own, and what missing labels do to them."""

import pytest
import torch
import torch.nn.functional as F

from losses.classification import LOSSES, classification_loss
from utils.config import UserError


def data(word, missing=True, seed=0):
    """logits [7, 3] and labels [7, 3] or [7, 1], a few of them missing."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(7, 3, generator=generator)
    if word == "bce":
        labels = torch.randint(2, (7, 3), generator=generator).float()
    elif word == "ce":
        labels = torch.randint(3, (7, 1), generator=generator).float()
    else:
        labels = torch.randn(7, 3, generator=generator)
    if missing:
        labels[2, 0] = labels[-1, -1] = torch.nan
    return logits, labels


def by_loops(word, logits, labels, weight):
    """One label at a time."""
    total = norm = 0.0
    outputs = []
    for column in range(labels.shape[1]):
        squares = []
        for row in range(len(labels)):
            x, y = logits[row], labels[row, column]
            if y.isnan():
                continue
            if word == "ce":
                factor = 1.0 if weight is None else weight[int(y)]
                total, norm = total - factor * x.log_softmax(0)[int(y)], norm + factor
            elif word == "bce":
                factor = 1.0 if weight is None else weight[column]
                p = torch.sigmoid(x[column])
                total, norm = total - factor * y * p.log() - (1 - y) * (1 - p).log(), norm + 1
            else:
                error = x[column] - y
                squares.append(error ** 2)
                total, norm = total + (error.abs() if word == "mae" else error ** 2), norm + 1
        if squares:
            outputs.append(torch.stack(squares).mean().sqrt())
    return torch.stack(outputs).mean() if word == "rmse" else total / norm


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("word", LOSSES)
def test_each_loss_equals_a_loop_over_the_labels_that_are_there(word, missing):
    """A missing label counts neither above nor below the line."""
    logits, labels = data(word, missing)
    weights = [None, torch.tensor([0.5, 2.0, 3.0])] if word in ("bce", "ce") else [None]
    for weight in weights:
        loss = classification_loss(word, logits, labels, weight)
        torch.testing.assert_close(loss, by_loops(word, logits, labels, weight))


def test_with_all_labels_the_losses_are_torchs():
    """Down to how the weights enter."""
    weight = torch.tensor([0.5, 2.0, 3.0])
    logits, labels = data("bce", missing=False)
    soft = 0.8 * labels + 0.1
    torch.testing.assert_close(classification_loss("bce", logits, soft, weight),
                               F.binary_cross_entropy_with_logits(logits, soft, pos_weight=weight))
    logits, labels = data("ce", missing=False)
    torch.testing.assert_close(classification_loss("ce", logits, labels, weight),
                               F.cross_entropy(logits, labels[:, 0].long(), weight))
    logits, labels = data("mse", missing=False)
    torch.testing.assert_close(classification_loss("mse", logits, labels), F.mse_loss(logits, labels))
    torch.testing.assert_close(classification_loss("mae", logits, labels), F.l1_loss(logits, labels))
    one = slice(0, 1)
    torch.testing.assert_close(classification_loss("rmse", logits[:, one], labels[:, one]),
                               F.mse_loss(logits[:, one], labels[:, one]).sqrt())


def test_rmse_is_no_mse():
    """Outputs of different scale: the root is taken of each by itself."""
    logits, labels = torch.zeros(4, 2), torch.tensor([[3.0, 0.1]]).expand(4, 2)
    assert classification_loss("rmse", logits, labels).item() == pytest.approx(1.55)
    assert classification_loss("mse", logits, labels).item() == pytest.approx(4.505)


@pytest.mark.parametrize("word", LOSSES)
def test_without_any_label_the_loss_is_a_zero_that_can_be_differentiated(word):
    """Every rank of a step has the same graph, and no NaN comes of it."""
    logits, labels = data(word)
    logits.requires_grad_()
    for weight in (None, torch.ones(3)) if word in ("bce", "ce") else (None,):
        loss = classification_loss(word, logits, torch.full_like(labels, torch.nan), weight)
        grad, = torch.autograd.grad(loss, logits)
        assert loss == 0 and (grad == 0).all()


@pytest.mark.parametrize("word", LOSSES)
def test_missing_labels_get_no_gradient_and_the_others_a_finite_one(word):
    """What is not known teaches nothing."""
    logits, labels = data(word)
    logits.requires_grad_()
    grad, = torch.autograd.grad(classification_loss(word, logits, labels), logits)
    missing = labels.isnan().expand_as(logits)
    assert grad.isfinite().all() and (grad[missing] == 0).all() and (grad[~missing] != 0).all()


def test_rmse_has_a_finite_gradient_at_no_error():
    """The root's slope is infinite at zero; a perfect batch must not end the run."""
    labels = torch.randn(5, 2)
    for error in (0.0, 1e-30, 1e-6):
        logits = (labels + error).requires_grad_()
        grad, = torch.autograd.grad(classification_loss("rmse", logits, labels), logits)
        assert grad.isfinite().all() and grad.abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("word", LOSSES)
def test_half_precision_is_scored_in_float32(word, dtype):
    """Squares of 300 overflow float16; the gradient comes back in the type of the logits."""
    logits, labels = data(word)
    logits = (100 * logits).to(dtype).requires_grad_()
    loss = classification_loss(word, logits, labels)
    torch.testing.assert_close(loss, classification_loss(word, logits.float(), labels))
    grad, = torch.autograd.grad(loss, logits)
    assert loss.dtype == torch.float32 and grad.dtype == dtype and grad.isfinite().all()


def test_unknown_words_and_weights_without_use_are_refused():
    """One line that says what is there instead."""
    logits, labels = data("mse")
    with pytest.raises(UserError, match="bce, ce, mse, mae, rmse"):
        classification_loss("focal", logits, labels)
    with pytest.raises(UserError, match="no class weights"):
        classification_loss("mae", logits, labels, torch.ones(3))
