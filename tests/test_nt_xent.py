"""SimCLR's loss against its definition, a peer, and itself over two ranks."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from forks import two_ranks
from lightly.loss import NTXentLoss

from losses.nt_xent import nt_xent_loss
from utils import distributed
from utils.config import UserError


def views(count=6, width=5, seed=0):
    """Projections [count, width] of two views, of which rows with the same number resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    first, noise = torch.randn(2, count, width, generator=generator)
    return first.requires_grad_(), (first + noise).detach().requires_grad_()


def value_and_gradients(loss, *inputs):
    """The loss and its gradients, for assert_close."""
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def by_loops(first, second, temperature):
    """The paper's formula, one anchor and one comparison at a time."""
    rows, total = [*first, *second], 0.0
    for i, anchor in enumerate(rows):
        scores = [torch.exp(F.cosine_similarity(anchor, row, dim=0) / temperature) for row in rows]
        positive = scores[(i + len(first)) % len(rows)]
        total -= torch.log(positive / sum(score for k, score in enumerate(scores) if k != i))
    return total / len(rows)


@pytest.mark.parametrize("temperature", [0.07, 0.5, 2.0])
def test_equals_the_formula_and_its_gradient(temperature):
    """All 2B - 1 others are below the line, the anchor itself is not, and its other view alone is above."""
    pair = views()
    torch.testing.assert_close(value_and_gradients(nt_xent_loss(*pair, temperature), *pair),
                               value_and_gradients(by_loops(*pair, temperature), *pair), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count, width, temperature", [(16, 128, 0.07), (3, 8, 0.5), (32, 16, 0.1)])
def test_equals_lightlys(count, width, temperature):
    """To 1e-5, loss and gradient."""
    pair = views(count, width)
    torch.testing.assert_close(
        value_and_gradients(nt_xent_loss(*pair, temperature), *pair),
        value_and_gradients(NTXentLoss(temperature)(*pair), *pair), rtol=1e-5, atol=1e-5)


def test_the_length_of_projections_does_not_matter():
    """Similarities are cosines; each row may have its own length."""
    first, second = views()
    lengths = torch.logspace(-8, 8, len(first))[:, None]
    torch.testing.assert_close(nt_xent_loss(first * lengths, second / lengths, 0.1),
                               nt_xent_loss(first, second, 0.1))


def test_views_and_images_have_no_order():
    """Exchanging the views, or the images of both, changes nothing."""
    first, second = views()
    order, loss = torch.randperm(6), nt_xent_loss(first, second, 0.1)
    torch.testing.assert_close(nt_xent_loss(second, first, 0.1), loss)
    torch.testing.assert_close(nt_xent_loss(first[order], second[order], 0.1), loss)
    assert nt_xent_loss(first, second.roll(1, 0), 0.1) > loss + 1


def test_a_pair_alone_has_no_negatives_and_teaches_nothing():
    """Zero, not infinite: a last batch of one image must not end the run."""
    pair = views(count=1)
    assert all((value == 0).all() for value in value_and_gradients(nt_xent_loss(*pair, 0.1), *pair))


def test_equal_and_empty_projections_have_finite_gradients():
    """A collapsed network gives the same row for all images; then every other row is as likely."""
    for row in (torch.ones(1, 5), torch.zeros(1, 5)):
        pair = row.repeat(4, 1).requires_grad_(), row.repeat(4, 1).requires_grad_()
        loss, *gradients = value_and_gradients(nt_xent_loss(*pair, 0.1), *pair)
        torch.testing.assert_close(loss, torch.tensor(7.0).log())
        assert all(gradient.isfinite().all() and gradient.abs().max() < 10 for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_float32(dtype):
    """Squares of 300 overflow float16, and a similarity in bfloat16 has two digits; autocast or not."""
    first, second = ((300 * view.detach()).to(dtype).requires_grad_() for view in views(16, 32))
    expected = nt_xent_loss(first.float(), second.float(), 0.07)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = nt_xent_loss(first, second, 0.07)
        torch.testing.assert_close(loss, expected)
        gradients = torch.autograd.grad(loss, (first, second))
        assert all(gradient.dtype == dtype and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("temperature", [0.0, -0.1, float("nan"), float("inf")])
def test_a_temperature_that_makes_no_sense_is_refused(temperature):
    """Below zero the loss would push the views of an image apart."""
    with pytest.raises(UserError, match="SIMCLR_TEMPERATURE"):
        nt_xent_loss(*views(), temperature)


def test_projections_that_do_not_pair_are_refused():
    """Rows of different number would be paired at random, and no rows give nan."""
    first, second = views()
    for pair in ((first, second[:4]), (first[0], second[0]), (first[:0], second[:0])):
        with pytest.raises(ValueError, match="projections"):
            nt_xent_loss(*pair, 0.1)


# ------------------------------------------------------------------- two ranks

def network():
    """A projection head that is the same on every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))


def step(model, first, second):
    """Loss, projections' gradients [2B, 4] and the parameters' gradients of one step."""
    projections = model(torch.cat([first, second]).detach())
    projections.retain_grad()
    loss = nt_xent_loss(*projections.chunk(2), 0.1)
    loss.backward()
    return {"loss": loss.detach(), "projections": projections.grad,
            "parameters": [parameter.grad.clone() for parameter in model.parameters()]}


def run_rank(folder):
    """What each rank does: its half of the images, under each strategy, and a validation without gradient."""
    distributed.setup_distributed()
    rank, results = distributed.rank(), {}
    first, second = (view[4 * rank:4 * rank + 4] for view in views(8))
    for strategy in distributed.STRATEGIES:
        result = step(distributed.shard(network(), strategy), first, second)
        result["parameters"] = [getattr(grad, "full_tensor", grad.clone)() for grad in result["parameters"]]
        results[strategy] = result
    with torch.no_grad():
        results["validation"] = nt_xent_loss(first, second, 0.1)
    torch.save(results, folder / f"rank{rank}.pt")
    distributed.cleanup()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of both ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    assert "deprecated" not in two_ranks(lambda: run_rank(folder))
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("strategy", distributed.STRATEGIES)
def test_two_ranks_equal_one_process_on_the_whole_batch(ranks, strategy):
    """Each anchor meets the other rank's images, and they learn from it: loss and gradient, without a factor.

    A gather that does not pass the gradient on gives the right loss and fails the gradient.
    """
    model = network()
    expected = step(model, *views(8))
    losses, projections, parameters = zip(*(rank[strategy].values() for rank in ranks), strict=True)
    torch.testing.assert_close(sum(losses) / 2, expected["loss"])
    for gradients in parameters:
        torch.testing.assert_close(gradients, expected["parameters"], rtol=1e-5, atol=1e-7)
    whole = expected["projections"].view(2, 8, 4)
    for rank, gradient in enumerate(projections):                     # the mean over ranks is still to come
        own = whole[:, 4 * rank:4 * rank + 4].reshape(8, 4)
        torch.testing.assert_close(gradient / 2, own, rtol=1e-5, atol=1e-7)


def test_the_loss_of_validation_is_that_of_all_images(ranks):
    """Without gradient too, an anchor's negatives come from both ranks."""
    torch.testing.assert_close(sum(rank["validation"] for rank in ranks) / 2,
                               nt_xent_loss(*views(8), 0.1).detach())
