"""The discriminative loss: what it computes, what leaves it unchanged, and inputs that break others."""

import inspect

import numpy as np
import pytest
import torch

from losses import discriminative
from losses.discriminative import discriminative_loss

TERMS = ("pull", "push", "norm")


def draw(samples=2, features=4, shape=(5, 6, 7), ids=6, seed=0, scale=1.0):
    """(embedding, instances with 0 among them, weights 1..100, classes 1..3 of the instances)."""
    generator = torch.Generator().manual_seed(seed)
    embedding = scale * torch.randn(samples, features, *shape, generator=generator)
    instances = torch.randint(0, ids, (samples, *shape), generator=generator, dtype=torch.int32)
    weight = 1 + 99 * torch.rand(samples, *shape, generator=generator)
    return embedding, instances, weight, torch.where(instances > 0, instances % 3 + 1, 0).long()


def loop_over_instances(e, ids, w, delta_v=0.5, delta_d=1.5):
    """The terms of one sample [E, ...] and one class, in float64, instance by instance, pair by pair."""
    centres, pulls, pushes = [], [], []
    for i in ids[ids > 0].unique():
        own, weight = e[:, ids == i].double(), w[ids == i].double()
        centre = (own * weight).sum(1) / weight.sum()
        excess = ((own - centre[:, None]).square().sum(0).sqrt() - delta_v).clamp(min=0)
        pulls.append((weight * excess ** 2).sum() / weight.sum())
        centres.append(centre)
    for i, centre in enumerate(centres):
        for other in centres[:i]:
            pushes.append((2 * delta_d - (centre - other).norm()).clamp(min=0) ** 2)
    push = torch.stack(pushes).mean() if pushes else torch.zeros((), dtype=torch.float64)
    return torch.stack([torch.stack(pulls).mean(), push, torch.stack([c.norm() for c in centres]).mean()])


def naive(embedding, instances, weight, classes=None, **deltas):
    """The terms of a batch: mean over classes present, mean over samples with instances."""
    classes = torch.ones_like(instances) if classes is None else classes
    terms = []
    for e, ids, w, kind in zip(embedding, instances, weight, classes, strict=True):
        found = [loop_over_instances(e, torch.where(kind == c, ids, 0), w, **deltas)
                 for c in kind.unique() if c > 0 and (ids[kind == c] > 0).any()]
        terms += [torch.stack(found).mean(0)] if found else []
    return torch.stack(terms).mean(0)


def value_and_gradient(loss, embedding, *args, **deltas):
    """(three terms, gradient of 1 pull + 0.7 push + 0.2 norm), float64."""
    embedding = embedding.clone().requires_grad_()
    terms = loss(embedding, *args, **deltas)
    terms = torch.stack([terms[name] for name in TERMS]) if isinstance(terms, dict) else terms
    (terms.double() @ torch.tensor([1.0, 0.7, 0.2], dtype=torch.float64)).backward()
    return terms.detach().double(), embedding.grad.double()


def assert_same(ours, theirs, tolerance=1e-5):
    """Terms and gradients agree relative to their size."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=1e-7)
    assert (ours[1] - theirs[1]).norm() <= tolerance * theirs[1].norm()


def stacked(terms):
    """dict of terms -> [3]."""
    return torch.stack([terms[name] for name in TERMS])


@pytest.mark.parametrize("deltas", [{}, {"delta_v": 0.0, "delta_d": 0.3}, {"delta_v": 2.0, "delta_d": 4.0}])
@pytest.mark.parametrize("shape", [(5, 6, 7), (9, 11)])
@pytest.mark.parametrize("per_class", [False, True])
def test_terms_and_gradients_equal_a_loop_over_instances(shape, per_class, deltas):
    """The gradient is written out by hand: it must be that of the formula, in patches and in slices."""
    embedding, instances, weight, classes = draw(shape=shape)
    classes = classes if per_class else None
    ours = value_and_gradient(discriminative_loss, embedding, instances, weight, classes, **deltas)
    assert_same(ours, value_and_gradient(naive, embedding, instances, weight, classes, **deltas))


@pytest.mark.parametrize("sizes", [(210, 64), (40, 1), (17, 3), (1, 1), (10 ** 6, 10 ** 3)])
def test_blocks_and_separate_sums_change_nothing(monkeypatch, sizes):
    """A GPU takes all 210 voxels at once, with several sums of each instance; the CPU block after block."""
    data = draw()
    monkeypatch.setattr(discriminative, "work_sizes", lambda embedding: sizes)
    assert_same(value_and_gradient(discriminative_loss, *data), value_and_gradient(naive, *data))


def test_no_weight_is_weight_one_and_only_ratios_matter():
    """Weights change the emphasis within an instance, not the scale of the loss."""
    embedding, instances, weight, _ = draw()
    ones = value_and_gradient(discriminative_loss, embedding, instances)
    assert_same(value_and_gradient(discriminative_loss, embedding, instances, torch.ones_like(weight)), ones)
    weighted = value_and_gradient(discriminative_loss, embedding, instances, weight)
    factor = 10.0 ** instances                                       # another scale for each instance
    assert_same(value_and_gradient(discriminative_loss, embedding, instances, factor * weight), weighted)
    assert (weighted[0][:2] - ones[0][:2]).abs().min() > 1e-3


def test_a_large_instance_counts_like_a_small_one():
    """Neurites differ by a factor of 1000 in size; the loss must not be that of the largest."""
    instances = torch.ones(1, 1, 40, 40, dtype=torch.int32)
    instances[..., :2, :2] = 2
    embedding = torch.zeros(1, 3, 1, 40, 40)
    embedding[0, 0, 0, 0, 0], embedding[0, 0, 0, 1, 1] = 4, -4       # two of four voxels of 2 are 4 off
    assert discriminative_loss(embedding, instances)["pull"].item() == pytest.approx(0.5 * 3.5 ** 2 / 2)


def test_names_of_instances_do_not_matter():
    """Ids are names; gaps between them, as of a class not present, are no instances."""
    embedding, instances, weight, classes = draw()
    for names in (torch.tensor([0, 3, 5, 1, 2, 4]), torch.tensor([0, 30, 7, 11, 2, 190])):
        renamed = names[instances.long()]
        assert_same(value_and_gradient(discriminative_loss, embedding, renamed, weight, classes),
                    value_and_gradient(discriminative_loss, embedding, instances, weight, classes))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_ids_may_be_of_any_integer_type(dtype):
    """Loaders send what is smallest."""
    embedding, instances, weight, _ = draw()
    torch.testing.assert_close(stacked(discriminative_loss(embedding, instances.to(dtype), weight)),
                               stacked(discriminative_loss(embedding, instances, weight)), rtol=0, atol=0)


def test_pull_and_push_do_not_see_a_translation():
    """The frame of embeddings is arbitrary; far from the origin differences must not lose their digits."""
    embedding, instances, weight, _ = draw(scale=2.0)
    near = discriminative_loss(embedding, instances, weight)
    far = discriminative_loss(embedding + 100, instances, weight)
    for name in ("pull", "push"):
        torch.testing.assert_close(far[name], near[name], rtol=1e-4, atol=0)
    assert far["norm"] > 100


def test_a_batch_is_the_mean_of_its_samples():
    """Ids of different samples are different instances and do not repel each other."""
    data = draw(samples=3)
    singles = [stacked(discriminative_loss(*(x[i:i + 1] for x in data))) for i in range(3)]
    torch.testing.assert_close(stacked(discriminative_loss(*data)), torch.stack(singles).mean(0))


def test_samples_without_instances_do_not_dilute_the_mean():
    """A crop of background alone says nothing about embeddings."""
    embedding, instances, weight, classes = draw(samples=3)
    instances[1] = 0
    kept = [x[[0, 2]] for x in (embedding, instances, weight, classes)]
    torch.testing.assert_close(stacked(discriminative_loss(embedding, instances, weight, classes)),
                               stacked(discriminative_loss(*kept)))
    _, gradient = value_and_gradient(discriminative_loss, embedding, instances, weight, classes)
    assert not gradient[1].any()


def test_only_instances_of_one_class_repel_each_other():
    """A mitochondrion and the neuron around it may share an embedding: classes are told apart elsewhere."""
    instances = torch.tensor([[[1, 1, 2, 2]]])
    embedding = torch.zeros(1, 2, 1, 4)
    one_class = discriminative_loss(embedding, instances, classes=torch.tensor([[[1, 1, 1, 1]]]))
    assert one_class["push"] == 9
    assert discriminative_loss(embedding, instances, classes=torch.tensor([[[1, 1, 3, 3]]]))["push"] == 0


def test_instances_of_no_class_are_left_out():
    """Class 0 is background, -100 is ignored."""
    embedding, instances, weight, classes = draw()
    for nothing in (0, -100):
        expected = discriminative_loss(embedding, torch.where(instances == 2, 0, instances), weight, classes)
        classes = torch.where(instances == 2, nothing, classes)
        found = discriminative_loss(embedding, instances, weight, classes)
        torch.testing.assert_close(stacked(found), stacked(expected))


def test_background_has_no_say_and_no_gradient():
    """Whatever the network says there; nor do ids below 0 count."""
    embedding, instances, weight, _ = draw()
    background = (instances == 0)[:, None].expand_as(embedding)
    expected = value_and_gradient(discriminative_loss, embedding, instances, weight)
    found = value_and_gradient(discriminative_loss, embedding.masked_fill(background, 1e6),
                               torch.where(instances == 0, -1, instances), weight)
    assert_same(found, expected)
    assert not found[1][background].any()


@pytest.mark.parametrize("classes", [None, 1, 0])
def test_without_instances_all_is_zero(classes):
    """Every rank has the same graph, so the terms must be there to be differentiated."""
    embedding, instances, weight, _ = draw()
    classes = None if classes is None else torch.full_like(instances, classes)
    terms, gradient = value_and_gradient(discriminative_loss, embedding, torch.zeros_like(instances), weight,
                                         classes)
    assert not terms.any() and not gradient.any()


def test_one_instance_repels_nothing():
    """The mean over no pairs is 0, not nan."""
    embedding, instances, weight, _ = draw(ids=2)
    found = value_and_gradient(discriminative_loss, embedding, instances, weight)
    assert found[0][1] == 0
    assert_same(found, value_and_gradient(naive, embedding, instances, weight))


def test_instances_of_weight_zero_are_none():
    """A mean over no weight does not exist."""
    embedding, instances, weight, _ = draw()
    without = torch.where(instances == 3, 0, instances)
    expected = value_and_gradient(discriminative_loss, embedding, without, weight)
    weight = torch.where(instances == 3, 0, weight)
    assert_same(value_and_gradient(discriminative_loss, embedding, instances, weight), expected)


@pytest.mark.parametrize("delta_v", [0.5, 0.0])
def test_equal_embeddings_have_a_finite_gradient(delta_v):
    """A network that starts with zeros: all distances and norms are roots of 0."""
    embedding, instances, weight, _ = draw()
    terms, gradient = value_and_gradient(discriminative_loss, torch.zeros_like(embedding), instances, weight,
                                         delta_v=delta_v)
    assert terms.tolist() == [0, 9, 0]
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    """float16 ends at 65504: squares and sums over an instance pass it at once.  Autocast changes nothing."""
    embedding, instances, weight, classes = draw(shape=(16, 32, 32), ids=3, scale=30.0)
    half = embedding.to(dtype)
    expected = value_and_gradient(discriminative_loss, half.float(), instances, weight, classes)
    with torch.autocast("cpu", torch.bfloat16):
        terms = discriminative_loss(half, instances, weight, classes)
    assert all(term.dtype == torch.float32 for term in terms.values())
    found = value_and_gradient(discriminative_loss, half, instances, weight, classes)
    torch.testing.assert_close(stacked(terms).double(), expected[0], rtol=0, atol=0)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(found[1], expected[1].to(dtype).double(), rtol=0, atol=0)


def test_memory_layout_does_not_matter():
    """channels_last networks give channels_last embeddings; crops and transposes are no copies."""
    embedding, instances, weight, classes = draw(features=3)
    expected = value_and_gradient(discriminative_loss, embedding, instances, weight, classes)
    last = embedding.to(memory_format=torch.channels_last_3d)
    assert_same(value_and_gradient(discriminative_loss, last, instances, weight, classes), expected)
    turned = value_and_gradient(lambda x, *args: discriminative_loss(x.transpose(2, 4), *args),
                                embedding.transpose(2, 4).contiguous(), instances, weight, classes)
    assert_same((turned[0], turned[1].transpose(2, 4)), expected)


def test_a_given_count_saves_reading_it_and_bounds_the_ids():
    """The host knows the largest id beforehand; a larger count adds nothing, larger ids are left out."""
    embedding, instances, weight, classes = draw()
    found = [stacked(discriminative_loss(embedding, instances, weight, classes, count=n)) for n in (5, 9)]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], stacked(discriminative_loss(embedding, instances, weight, classes)))
    cut = stacked(discriminative_loss(embedding, instances, weight, classes, count=3))
    without = torch.where(instances > 3, 0, instances)
    torch.testing.assert_close(cut, stacked(discriminative_loss(embedding, without, weight, classes)))


WAITING = ("item", "_local_scalar_dense", "nonzero", "_unique", "masked_select", "bincount", "equal")


def test_nothing_waits_for_the_device_when_the_count_is_given():
    """The host waits for a value, or for a shape that depends on one, until a GPU is idle: in each step."""
    embedding, *rest = draw()
    embedding.requires_grad_()
    for count, expected in [(None, {"item", "_local_scalar_dense"}), (5, set())]:
        with torch.autograd.profiler.profile() as profile:
            sum(discriminative_loss(embedding, *rest, count=count).values()).backward()
        names = {event.name.removeprefix("aten::") for event in profile.function_events}
        assert "scatter_add_" in names
        assert {name for name in names if name.startswith(WAITING)} == expected


def test_sums_over_many_voxels_keep_their_digits():
    """A soma fills a patch: float32 additions one after another would be wrong in the fourth digit."""
    rng = np.random.default_rng(0)
    embedding = torch.from_numpy(rng.normal(3.0, 0.1, (1, 16, 50, 50, 50)).astype(np.float32))
    instances = torch.ones(1, 50, 50, 50, dtype=torch.int32)
    found = discriminative_loss(embedding, instances, torch.full((1, 50, 50, 50), 0.1))["norm"].item()
    assert found == pytest.approx(embedding[0].double().mean((1, 2, 3)).norm().item(), rel=3e-5)


def test_defaults_are_those_of_the_paper():
    """delta_v 0.5 and delta_d 1.5; clustering takes delta_v as its bandwidth."""
    defaults = {name: p.default for name, p in inspect.signature(discriminative_loss).parameters.items()}
    assert (defaults["delta_v"], defaults["delta_d"]) == (0.5, 1.5)


def test_descent_separates_instances():
    """What it is for: after some steps each voxel is nearest to the centre of its own instance."""
    generator = torch.Generator().manual_seed(0)
    instances = torch.randint(0, 5, (1, 8, 16, 16), generator=generator)
    embedding = torch.randn(1, 4, 8, 16, 16, generator=generator).requires_grad_()
    for _ in range(60):
        terms = discriminative_loss(embedding, instances)
        gradient, = torch.autograd.grad(terms["pull"] + terms["push"] + 0.001 * terms["norm"], embedding)
        embedding.data -= instances.numel() / 5 * gradient           # a voxel's share in its instance
    e, ids = embedding.detach().flatten(2)[0].T, instances.flatten()
    centres = torch.stack([e[ids == i].mean(0) for i in range(1, 5)])
    assert (torch.cdist(e, centres).argmin(1) + 1 == ids)[ids > 0].all()
    assert terms["push"] < 1e-2 and terms["pull"] < 1e-2
