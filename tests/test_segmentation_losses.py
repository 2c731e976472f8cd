"""Cross-entropy and soft Dice of voxels against loops, torch and MONAI; labels that leave classes open."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceLoss

from losses.segmentation import check_class_weights, semantic_loss
from utils.config import UserError

EPS = 1e-5
NEURONS_ALONE = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0],
                              [0, 0, 1, 0, 1]], dtype=torch.bool)
MITOCHONDRIA_ALONE = torch.eye(5, dtype=torch.bool)
MITOCHONDRIA_ALONE[0] = torch.tensor([1, 1, 1, 0, 1], dtype=torch.bool)
WEIGHTS = torch.tensor([0.05, 0.35, 0.25, 0.2, 0.15, 1.0, 0.0])


def data(shape=(3, 5, 4), batch=3, classes=7, labels=5, ignored=0.2, seed=0):
    """logits [B, 7, ...], target [B, ...] in which some voxels are ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, classes, *shape, generator=generator)
    target = torch.randint(labels, (batch, *shape), generator=generator)
    target[torch.rand(target.shape, generator=generator) < ignored] = -100
    return logits, target


def by_loops(logits, target, meaning=None, weights=None, ignored=-100):
    """(ce, dice), one voxel and one label at a time, in float64."""
    batch, classes = logits.shape[:2]
    probs = logits.double().softmax(1).flatten(2).numpy()
    target = target.flatten(1).numpy()
    size = classes if meaning is None else meaning.shape[1]
    meaning = np.eye(size, dtype=bool)[None].repeat(batch, 0) if meaning is None else meaning.numpy()
    total, norm, samples = 0.0, 0.0, []
    for b in range(batch):
        voxels = [i for i in range(target.shape[1]) if target[b, i] != ignored]
        for i in voxels:
            label = target[b, i]
            weight = 1.0 if weights is None else float(weights[label])
            total -= weight * np.log(sum(probs[b, c, i] for c in range(size) if meaning[b, label, c]))
            norm += weight
        scores = []
        for t in range(size):
            right = mass = count = 0.0
            for i in voxels:
                s = target[b, i]
                count += s == t
                for c in range(size):
                    if meaning[b, t, c] and (s == t or not meaning[b, s, c]):
                        mass += probs[b, c, i]
                        right += probs[b, c, i] * (s == t)
            if count:
                scores.append(1 - (2 * right + EPS) / (mass + count + EPS))
        if scores:
            samples.append(np.mean(scores))
    return total / norm, np.mean(samples)


@pytest.mark.parametrize("shape", [(3, 5, 4), (7, 6)])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("meaning", [None, "mixed"])
def test_the_loss_is_that_of_a_loop_over_voxels_and_labels(shape, weights, meaning):
    """Volumes and slices, weights, ignored voxels, and a batch of samples annotated in different ways."""
    logits, target = data(shape)
    if meaning:
        meaning = torch.stack([NEURONS_ALONE, MITOCHONDRIA_ALONE, torch.eye(5, dtype=torch.bool)])
    target[2][target[2] == 1] = 0                               # a class that one sample does not have
    terms = semantic_loss(logits, target, meaning, weights)
    ce, dice = by_loops(logits, target, meaning, weights)
    assert terms["ce"].item() == pytest.approx(ce, rel=1e-5)
    assert terms["dice"].item() == pytest.approx(dice, rel=1e-5)
    assert all(term.dtype == torch.float32 and term.dim() == 0 for term in terms.values())


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_cross_entropy_is_torchs(weights):
    """Value and gradient; with weights the mean is weighted."""
    logits, target = data(labels=6)
    logits.requires_grad_()
    ours = semantic_loss(logits, target, class_weights=weights)["ce"]
    theirs = F.cross_entropy(logits, target, weights, ignore_index=-100)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits))


def test_dice_is_monais_where_all_classes_are_present():
    """Only there do both definitions agree; value and gradient."""
    logits, target = data((6, 7, 8), classes=5, ignored=0)
    assert all(len(sample.unique()) == 5 for sample in target)
    logits.requires_grad_()
    ours = semantic_loss(logits, target)["dice"]
    theirs = DiceLoss(to_onehot_y=True, softmax=True, smooth_nr=EPS, smooth_dr=EPS)(logits, target[:, None])
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits))


@pytest.mark.parametrize("classes", [5, 7])
def test_labels_that_mean_themselves_are_the_plain_loss(classes):
    """Where everything is annotated, the identity must not change anything, spare classes included."""
    logits, target = data(classes=classes)
    weights = WEIGHTS[:classes]
    logits.requires_grad_()
    identity = torch.eye(5, dtype=torch.bool).expand(3, 5, 5)
    plain, meant = (semantic_loss(logits, target, meaning, weights) for meaning in (None, identity))
    for name in plain:
        torch.testing.assert_close(meant[name], plain[name])
        torch.testing.assert_close(*(torch.autograd.grad(terms[name], logits, retain_graph=True)
                                     for terms in (meant, plain)))


def one_hot(classes, of=7):
    """Logits [1, 7, N] that are sure of ``classes`` [1, N]."""
    return 30 * F.one_hot(classes, of).float().transpose(1, 2)


def test_absent_classes_are_no_part_of_dice():
    """A perfect answer scores 0 and a wholly wrong one 1, however few of the classes a crop holds."""
    target = torch.tensor([[1, 1, 1, 4, 4]])
    assert semantic_loss(one_hot(target), target)["dice"] < 1e-5
    assert semantic_loss(one_hot(torch.tensor([[4, 4, 4, 1, 1]])), target)["dice"] > 1 - 1e-4
    half = one_hot(torch.tensor([[1, 1, 1, 0, 0]]))             # boundary missed, neuron found
    assert semantic_loss(half, target)["dice"].item() == pytest.approx(0.5, abs=1e-4)


def test_what_a_label_may_mean_costs_nothing():
    """Mitochondria and clefts found in a volume where neurons alone are annotated are no mistake."""
    target = torch.tensor([[0, 0, 0, 1, 1, 1, 4, 4, -100]])
    meaning = NEURONS_ALONE[None]
    found = torch.tensor([[0, 2, 0, 1, 3, 1, 2, 4, 6]])
    for answers in (found, target.clamp(min=0)):
        terms = semantic_loss(one_hot(answers), target, meaning)
        assert terms["ce"] < 1e-5 and terms["dice"] < 1e-5
    plain = semantic_loss(one_hot(found), target)
    assert plain["ce"] > 5 and plain["dice"] > 0.2


def test_what_a_label_cannot_mean_is_a_mistake():
    """A cleft within an annotated neuron, a neuron in annotated background, a spare class anywhere."""
    target = torch.tensor([[0, 0, 0, 1, 1, 1, 4, 4, 4]])
    for place, answer in ((3, 2), (0, 1), (0, 3), (6, 0), (6, 5), (0, 6), (3, 6)):
        answers = target.clone()
        answers[0, place] = answer
        terms = semantic_loss(one_hot(answers), target, NEURONS_ALONE[None])
        assert terms["ce"] > 1 and terms["dice"] > 0.05, (place, answer)


def test_only_open_classes_are_free_to_move():
    """The gradient is the same for all classes a label may mean in proportion to their probability."""
    logits, target = data(batch=1, ignored=0)
    logits.requires_grad_()
    ce = semantic_loss(logits, target, NEURONS_ALONE[None])["ce"]
    grad, = torch.autograd.grad(ce, logits)
    probs = logits.detach().softmax(1)
    inside = target[0] == 1
    ratio = (grad / probs)[0, :, inside]
    torch.testing.assert_close(ratio[1], ratio[3])
    assert (ratio[[1, 3]] < 0).all() and (ratio[[0, 2, 4, 5, 6]] > 0).all()


@pytest.mark.parametrize("meaning", [None, NEURONS_ALONE.expand(3, 5, 5)])
def test_ignored_voxels_have_no_influence_and_no_gradient(meaning):
    """Neither in the cross-entropy nor in the sums of Dice."""
    logits, target = data()
    ignored = (target == -100)[:, None].expand_as(logits)
    before = semantic_loss(logits, target, meaning)
    changed = torch.where(ignored, 50 * torch.randn(logits.shape), logits).requires_grad_()
    after = semantic_loss(changed, target, meaning)
    grad, = torch.autograd.grad(after["ce"] + after["dice"], changed)
    for name in before:
        torch.testing.assert_close(after[name], before[name])
    assert not grad[ignored].any() and grad[~ignored].any()


@pytest.mark.parametrize("meaning", [None, NEURONS_ALONE.expand(3, 5, 5)])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_without_any_label_the_loss_is_a_zero_that_can_be_differentiated(meaning, weights):
    """A crop may lie in an unannotated corner; torch's mean would be NaN there."""
    logits, target = data(ignored=2)
    logits.requires_grad_()
    terms = semantic_loss(logits, target, meaning, weights)
    grad, = torch.autograd.grad(terms["ce"] + terms["dice"], logits)
    assert terms["ce"] == 0 and terms["dice"] == 0 and not grad.any()
    target[0, 0] = 5 if meaning is None else 2                  # one sample has labels: it counts in full
    assert semantic_loss(logits, target, meaning)["dice"] > 0.5


def test_labels_of_weight_zero_alone_are_a_zero_too():
    """The weights' sum stands below the line."""
    logits, target = data()
    weights = torch.zeros(7)
    weights[6] = 1
    assert semantic_loss(logits, target, class_weights=weights)["ce"] == 0


def test_another_ignore_index_is_one():
    """IGNORE_INDEX is a setting."""
    logits, target = data()
    expected = semantic_loss(logits, target)
    terms = semantic_loss(logits, torch.where(target == -100, 255, target), ignore_index=255)
    assert terms == expected


def test_a_term_without_weight_is_not_computed():
    """A weight of 0 switches a term off; the graph stays, so that every rank has the same."""
    logits, target = data()
    logits.requires_grad_()
    whole = semantic_loss(logits, target)
    for off, on in (("ce", "dice"), ("dice", "ce")):
        terms = semantic_loss(logits, target, **{f"{off}_weight": 0})
        assert terms[off] == 0 and terms[on] == whole[on]
        assert not torch.autograd.grad(terms[off], logits)[0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_scored_in_float32(dtype):
    """Sums over many voxels overflow float16 and stop growing in bfloat16; autocast would bring them back."""
    logits, target = data((20, 60, 60), batch=1)
    logits[0, :, 0] *= 30                                       # far below what a probability can hold
    logits = logits.to(dtype).requires_grad_()
    meaning = NEURONS_ALONE[None]
    expected = semantic_loss(logits.detach().float(), target, meaning)
    with torch.autocast("cpu", torch.bfloat16):
        terms = semantic_loss(logits, target, meaning)
    for name in terms:
        torch.testing.assert_close(terms[name], expected[name])
    grad, = torch.autograd.grad(terms["ce"] + terms["dice"], logits)
    assert grad.dtype == dtype and grad.isfinite().all()
    # A sure mistake still has its whole gradient: 1 / number of labelled voxels.
    sure = torch.zeros(1, 7, 4)
    sure[:, 6] = 200
    sure.requires_grad_()
    grad, = torch.autograd.grad(semantic_loss(sure, torch.zeros(1, 4, dtype=torch.long), meaning)["ce"], sure)
    torch.testing.assert_close(grad[0, 6], torch.full((4,), 0.25))


def test_memory_format_does_not_matter():
    """The network answers in channels_last_3d."""
    logits, target = data()
    meaning = MITOCHONDRIA_ALONE.expand(3, 5, 5)
    terms = semantic_loss(logits.to(memory_format=torch.channels_last_3d), target, meaning)
    for name, value in semantic_loss(logits, target, meaning).items():
        torch.testing.assert_close(terms[name], value)


def test_class_weights_that_do_not_fit_are_refused_with_both_lengths():
    """Three weights for sixteen classes must not be found by an error inside torch."""
    for check in (lambda: check_class_weights([0.1, 0.5, 0.4], 16),
                  lambda: semantic_loss(*data(), class_weights=torch.ones(3))):
        with pytest.raises(UserError, match=r"VISTA_CLASS_WEIGHTS has 3 entries.* (16|7) classes"):
            check()
    for weights in ([0.0] * 4, [1, -1, 1, 1], [1, float("nan"), 1, 1]):
        with pytest.raises(UserError, match="VISTA_CLASS_WEIGHTS"):
            check_class_weights(weights, 4)
    assert check_class_weights([], 4) is None and check_class_weights(None, 4) is None
    assert torch.equal(check_class_weights([1, 0, 2.5], 3), torch.tensor([1, 0, 2.5]))


def test_fewer_classes_than_labels_are_refused():
    """Five classes are labelled, so that a network of four cannot be trained on them."""
    with pytest.raises(UserError, match="VISTA_NUM_CLASSES = 4"):
        semantic_loss(*data(classes=4, labels=4), NEURONS_ALONE.expand(3, 5, 5))
