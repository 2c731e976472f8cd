"""ResNets of slices against torchvision's; weights in both published layouts, and their faults."""

import pytest
import torch
import torchvision.models
from torch import nn

from models.resnet import RESNETS, SliceResNet, load_resnet_weights
from utils.checkpoint import load_backbone, save_checkpoint
from utils.config import BadFile, UserError


def small(word="resnet18", num_classes=3, seed=0, **options):
    torch.manual_seed(seed)
    return SliceResNet(word, num_classes, **options)


def images(size=(64, 64), batch=2, seed=0):
    return torch.rand(batch, 1, *size, generator=torch.Generator().manual_seed(seed))


def peer_of(word):
    """torchvision's network, with statistics and scales of its norms that are no zeros and ones."""
    torch.manual_seed(1)
    network = getattr(torchvision.models, word)(weights=None)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.1)
            nn.init.normal_(module.running_mean, 0.0, 0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
    return network


def radimagenet(network):
    """The layers in the nn.Sequential of RadImageNet's files, which end with the pooling."""
    return nn.ModuleDict({"backbone": nn.Sequential(*list(network.children())[:9])})


@pytest.mark.parametrize("word, layout", [("resnet18", "torchvision"), ("resnet34", "torchvision"),
                                          ("resnet18", "radimagenet"), ("resnet50", "radimagenet")])
def test_published_weights_give_their_networks_features_of_grey_images(tmp_path, word, layout):
    """Three equal planes through the colour stem are one plane through its sum; each layout has its range."""
    peer, ours = peer_of(word), small(word)
    wrapped = radimagenet(peer) if layout == "radimagenet" else peer
    torch.save(wrapped.state_dict(), tmp_path / "weights.pth")
    before = ours.head.weight.clone()
    matched, unmatched = load_resnet_weights(ours, tmp_path / "weights.pth")
    assert {"conv1.weight", "bn1.running_var", "layer4.1.conv2.weight"} < set(matched)
    assert all(name.startswith("fc.") or name.endswith("num_batches_tracked") for name in unmatched)
    assert torch.equal(ours.head.weight, before)
    x = images((96, 64))
    mean, std = (0.5, 0.5) if layout == "radimagenet" else (0.449, 0.226)
    peer.fc = nn.Identity()
    with torch.no_grad():
        expected = peer.eval()(((x - mean) / std).expand(-1, 3, -1, -1))
        torch.testing.assert_close(ours.eval().features(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours(x), ours.head(ours.features(x)))


def test_the_range_of_the_images_travels_with_the_weights(tmp_path):
    """A network started from a run that began with RadImageNet must see images as that one did."""
    first = small()
    torch.save(radimagenet(peer_of("resnet18")).state_dict(), tmp_path / "weights.pth")
    load_resnet_weights(first, tmp_path / "weights.pth")
    save_checkpoint(tmp_path / "classify_best.pt", kind="classify", model_state_dict=first.state_dict())
    second = small(num_classes=5, seed=3)
    _, unmatched = load_backbone(second, tmp_path / "classify_best.pt")
    assert unmatched == ["head.weight", "head.bias"]
    with torch.no_grad():
        torch.testing.assert_close(second.eval().features(images()), first.eval().features(images()))
    assert second.mean == 0.5 and small().mean != 0.5


@pytest.mark.parametrize("word", RESNETS)
@pytest.mark.parametrize("size", [(64, 64), (70, 101)])
def test_stages_are_the_maps_at_five_strides(word, size):
    """The decoder of a U-Net relies on their channels; the last map's mean are the features."""
    model = small(word, num_classes=0).eval()
    with torch.no_grad():
        maps = model.stages(images(size))
        assert [x.shape[1] for x in maps] == list(model.channels)
        for i, x in enumerate(maps):
            assert x.shape[2:] == tuple(-(-side // 2 ** (i + 1)) for side in size)
        torch.testing.assert_close(model(images(size)), maps[-1].mean((2, 3)), rtol=1e-5, atol=1e-5)
    assert model.dim == model.channels[-1]


def test_gradients_reach_every_parameter_and_recomputation_changes_none():
    """Recomputed stages run twice and give the same gradients; no batch counts twice in the statistics."""
    kept, recomputed = small(), small(checkpoint_activations=True)
    calls = {kept: 0, recomputed: 0}
    for model in calls:
        def count(*_, model=model):
            calls[model] += 1
        model.layer2[0].conv1.register_forward_hook(count)
        model(images()).square().sum().backward()
    assert calls[kept] == 1 and calls[recomputed] == 2
    for (name, p), q in zip(kept.named_parameters(), recomputed.parameters(), strict=True):
        assert p.grad.any(), name
        torch.testing.assert_close(q.grad, p.grad, msg=name)
    for (name, p), q in zip(kept.named_buffers(), recomputed.buffers(), strict=True):
        if p.is_floating_point():
            torch.testing.assert_close(q, p, msg=name)


def test_files_of_other_networks_are_refused(tmp_path):
    """A resnet34 has all that a resnet18 wants, in its shapes: half of it would load in silence."""
    path = tmp_path / "weights.pth"
    for theirs, ours, message in [("resnet34", "resnet18", "has layer1.2"),
                                  ("resnet18", "resnet34", "has no"), ("resnet50", "resnet18", "layer")]:
        torch.save(peer_of(theirs).state_dict(), path)
        with pytest.raises(UserError, match=f"weights.pth: .*{message}.*"):
            load_resnet_weights(small(ours), path)
    path.write_bytes(b"no tensors")
    with pytest.raises(BadFile, match="weights.pth: not a file of tensors; change SPINE_WEIGHTS"):
        load_resnet_weights(small(), path)
    with pytest.raises(UserError, match="no such file"):
        load_resnet_weights(small(), tmp_path / "none.pth")
    with pytest.raises(UserError, match='is "resnet101"; set it to one of resnet18, resnet34, resnet50'):
        SliceResNet("resnet101", 2)
