"""Masks and classes from one network: its parts, its weights of tasks, and sharded training."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from models.multitask import MultiTask, TaskWeights, weighted_total
from models.resnet import SliceResNet
from models.unet import UNet
from utils import distributed
from utils.checkpoint import load_backbone, save_checkpoint
from utils.config import UserError

ENCODERS = ("plain", "resnet18")


def small(encoder="plain", seed=0, **options):
    torch.manual_seed(seed)
    return MultiTask(encoder, **{"features": 4, "num_classes": 2, "label_classes": 5, **options})


def images(size=(64, 32), seed=0):
    return torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(seed))


def loss_of(output, weights=(1.0, 1.0)):
    """Both heads in one number."""
    masks, labels, terms = output
    losses = [masks.square().mean() * weights[0], labels.square().mean() * weights[1]]
    return weighted_total(losses, terms, (True, True))


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("size", [(64, 32), (50, 41)])
def test_masks_are_the_unets_and_classes_those_of_the_deepest_map(encoder, size):
    """The second head changes nothing of the first."""
    torch.manual_seed(0)
    unet = UNet(features=4, num_classes=2, encoder=encoder).eval()
    model = small(encoder, seed=1).eval()
    model.load_state_dict(unet.state_dict(), strict=False)
    with torch.no_grad():
        masks, labels, terms = model(images(size))
        torch.testing.assert_close(masks, unet(images(size)))
        if size == (64, 32):
            pooled = unet.encoder.stages(images(size))[-1].mean((2, 3))
            torch.testing.assert_close(labels, model.classifier(pooled))
    assert labels.shape == (2, 5) and terms.shape == (2, 2)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_both_tasks_train_the_encoder_and_each_its_head(encoder):
    """A shared encoder is the point; every parameter gets a gradient from the two losses."""
    for weights, silent in [((1.0, 0.0), ("classifier",)), ((0.0, 1.0), ("decoder", "head"))]:
        model = small(encoder)
        loss_of(model(images()), weights).backward()
        for name, p in model.named_parameters():
            assert p.grad.any() == (not name.startswith(silent)), name
    model = small(encoder, weighting="uncertainty", attention=True)
    loss_of(model(images())).backward()
    assert all(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("kind", ["classify", "segment"])
def test_weights_of_either_task_alone_start_the_encoder(tmp_path, kind):
    """One call fits both: the classifier's names are bare, the U-Net's have a prefix."""
    torch.manual_seed(3)
    first = SliceResNet("resnet18", 4) if kind == "classify" else UNet(features=4, encoder="resnet18")
    save_checkpoint(tmp_path / "best.pt", kind=kind, model_state_dict=first.state_dict())
    model = small("resnet18")
    _, unmatched = load_backbone(model.encoder, tmp_path / "best.pt", remove_prefix="encoder.")
    assert not unmatched
    expected = first.stages if kind == "classify" else first.encoder.stages
    with torch.no_grad():
        first.eval(), model.eval()
        torch.testing.assert_close(model.encoder.stages(images()), expected(images()))


def test_fixed_weights_weigh_the_losses():
    """The sum as it is written, without a term of its own and without a parameter."""
    weights = TaskWeights("fixed", (0.5, 2.0))
    losses = [torch.tensor(3.0), torch.tensor(0.25)]
    assert weighted_total(losses, weights(), (True, True)).item() == 0.5 * 3 + 2 * 0.25
    assert not list(weights.parameters())
    assert weighted_total(losses, weights(), (False, True)).item() == 2 * 0.25


def test_uncertainty_weights_are_the_papers_formula_and_start_where_asked():
    """Loss / sigma^2 + log sigma of each task (eq. 10 of the paper); sigma^2 starts at 1 / weight."""
    weights = TaskWeights("uncertainty", (0.5, 4.0))
    losses = [torch.tensor(3.0), torch.tensor(0.25)]
    sigma = torch.tensor([0.5, 4.0]) ** -0.5
    expected = sum(loss / s ** 2 + s.log() for loss, s in zip(losses, sigma, strict=True))
    torch.testing.assert_close(weighted_total(losses, weights(), (True, True)), expected)


def test_learned_weights_settle_at_one_half_over_the_loss():
    """Where exp(-s) L + s / 2 is least, exp(-s) = 1 / (2 L): tasks of large losses get small weights."""
    weights = TaskWeights("uncertainty", (1.0, 1.0))
    losses = torch.tensor([2.0, 0.1])
    optimizer = torch.optim.SGD(weights.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        weighted_total(losses, weights(), (True, True)).backward()
        optimizer.step()
    torch.testing.assert_close(weights()[0].detach(), 1 / (2 * losses), rtol=1e-3, atol=0)


def test_a_task_without_labels_does_not_move_its_weight():
    """Its loss is zero there, which would look like a task that is solved."""
    weights = TaskWeights("uncertainty", (1.0, 1.0))
    weighted_total([torch.tensor(2.0), torch.tensor(0.0)], weights(), (True, False)).backward()
    gradient = weights.log_variances.grad
    assert gradient[0] != 0 and gradient[1] == 0


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_sharded_training_reaches_the_learned_weights_too(one_rank):
    """Outside of the network's forward they would not be gathered."""
    plain, sharded = (small("resnet18", weighting="uncertainty") for _ in range(2))
    for block in [*distributed._blocks(sharded, distributed._size(sharded) / 100), sharded]:
        fully_shard(block, mesh=one_rank, reshard_after_forward=True)
    for model in (plain, sharded):
        loss_of(model(images())).backward()
    for (name, p), q in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(q.grad.full_tensor(), p.grad, msg=name)


def test_settings_that_do_not_exist_are_refused():
    """One line that names the constant."""
    for word, weights, message in [("equal", (1, 1), 'SPINE_TASK_WEIGHTING is "equal"; set it to one'),
                                   ("fixed", (0, 0), "SPINE_TASK_WEIGHTS = .* not only 0"),
                                   ("fixed", (-1, 1), "SPINE_TASK_WEIGHTS"),
                                   ("uncertainty", (0, 1), "learned weights start above 0")]:
        with pytest.raises(UserError, match=message):
            TaskWeights(word, weights)
