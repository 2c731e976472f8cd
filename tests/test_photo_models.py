"""Every network that HVIT_MODEL can name, used alike."""

import copy
from functools import cache

import pytest
import torch
import torchvision.models

from models.photo import (
    PHOTO_MODELS,
    build_photo_model,
    layer_groups,
    load_torchvision_weights,
)
from utils.checkpoint import load_backbone
from utils.config import BadFile, UserError

# One of each family, with torchvision's name of its classifier
PEERS = {"resnet50": "fc", "swin_t": "head", "efficientnet_b0": "classifier"}
FAMILIES = ("hvit_tiny", *PEERS)
STEMS = {"hvit_tiny": "embed.", "resnet50": "network.conv1.", "swin_t": "network.features.0.",
         "efficientnet_b0": "network.features.0."}


@cache
def original(function, word, seed=0, **options):
    """Made once: drawing the weights of such networks takes longer than most tests."""
    torch.manual_seed(seed)
    return function(word, **options)


def build(word, num_classes=4, **options):
    """A classifier that drops nothing, unless ``options`` say otherwise."""
    if word.startswith(("swin", "efficientnet")):
        options = {"dropout": 0.0} | options
    options = {"num_classes": num_classes, "drop_path": 0.0} | options
    return copy.deepcopy(original(build_photo_model, word, **options))


def build_peer(word):
    """torchvision's own network, of ten classes and other weights."""
    return copy.deepcopy(original(torchvision.models.get_model, word, seed=1, num_classes=10)).eval()


def images(height=64, width=64, batch=3, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def bare(word, model):
    """torchvision's own network with the weights of ours."""
    peer = build_peer(word)
    head = peer.get_submodule(PEERS[word])
    linear = head[-1] if isinstance(head, torch.nn.Sequential) else head
    linear.weight, linear.bias = (torch.nn.Parameter(value[:4].clone()) for value in linear.parameters())
    state = {name.removeprefix("network."): value for name, value in model.network.state_dict().items()}
    state |= {f"{PEERS[word]}.{name}": value for name, value in model.head.state_dict().items()}
    peer.load_state_dict(state)
    return peer


def gradients(model, x):
    torch.manual_seed(0)
    model(x).sin().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("word", PEERS)
@pytest.mark.parametrize("training", [False, True])
def test_logits_equal_torchvisions(word, training):
    """The baselines of a table are those that everybody knows; batch statistics included."""
    model = build(word)
    peer = bare(word, model)
    for layer in peer.modules():
        if isinstance(layer, (torch.nn.Dropout, torchvision.ops.StochasticDepth)):
            layer.p = 0.0
    model.train(training)
    peer.train(training)
    x = images(72, 100)
    torch.testing.assert_close(model(x), peer(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("word", PHOTO_MODELS)
def test_every_word_builds_a_network_of_one_interface(word):
    """A training script does not ask which of them it has."""
    with torch.device("meta"):
        model = build_photo_model(word, 4)
        features = model.features(torch.rand(2, 3, 96, 128))
        assert features.shape == (2, model.dim) and model.head(features).shape == (2, 4)
    names = [name for name, _ in model.named_parameters()]
    groups = layer_groups(model)
    assert len(groups) == 6 and all(groups)
    assert sorted(sum(groups, [])) == sorted(names)
    assert not any(word in name for name in names for word in ("module.", "_orig_mod", "_checkpoint"))


@pytest.mark.parametrize("word", FAMILIES)
def test_without_classes_a_network_gives_its_features(word):
    """As pretraining uses it: a head without a gradient would stop distributed training."""
    model, headless = build(word).eval(), build(word, num_classes=0).eval()
    headless.load_state_dict({name: value for name, value in model.state_dict().items()
                               if not name.startswith("head.")})
    assert torch.equal(model(images()), model.head(model.features(images())))
    torch.testing.assert_close(headless(images()), model.features(images()))
    assert layer_groups(headless) == [*layer_groups(model)[:5], []]


@pytest.mark.parametrize("word", FAMILIES)
def test_groups_follow_the_image_through_the_network(word):
    """What a group computes depends on no later group: freezing the first ones freezes what they see."""
    model = build(word).eval()
    groups = layer_groups(model)
    assert all(name.startswith((STEMS[word], "position", "network.bn1.")) for name in groups[0])
    assert all(name.startswith("head.") for name in groups[-1])
    order = []
    for name, module in model.named_modules():
        owner = [i for i, group in enumerate(groups) if f"{name}.weight" in group]
        if owner:
            module.register_forward_hook(lambda *_, i=owner[0]: order.append(i))
    model(images(batch=1))
    assert order == sorted(order) and set(order) == set(range(6))


@pytest.mark.parametrize("word", FAMILIES)
def test_gradient_reaches_every_parameter(word):
    """No part is there for nothing."""
    model = build(word)
    if word == "resnet50":
        model.eval()                      # with the statistics of so small a batch some gradients cancel
    assert not [name for name, grad in gradients(model, images()).items() if grad is None or not grad.any()]


@pytest.mark.parametrize("word", FAMILIES)
def test_small_and_oblong_images_have_finite_logits(word):
    """Photographs come in all shapes."""
    model = build(word).eval()
    for height, width in ((8, 8), (30, 47)):
        assert model(images(height, width, batch=1)).isfinite().all()


@pytest.mark.parametrize("word", FAMILIES)
def test_checkpointing_activations_changes_neither_gradients_nor_statistics(word):
    """The recomputation draws the same dropped branches, and no batch is counted twice."""
    options = {} if word == "resnet50" else {"drop_path": 0.4}
    models = [build(word, checkpoint_activations=recompute, **options) for recompute in (False, True)]
    torch.testing.assert_close(*(gradients(model, images()) for model in models), rtol=1e-3, atol=1e-5)
    states = [{name: value for name, value in model.state_dict().items() if "running" in name}
              for model in models]
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("word", PEERS)
def test_checkpointing_computes_each_stage_twice_in_training_alone(word):
    """Otherwise the option would do nothing."""
    model, calls = build(word, checkpoint_activations=True), []
    layers = ["conv1", "layer3"] if word == "resnet50" else ["features.0", "features.3"]
    for name in layers:
        model.network.get_submodule(name).register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(model, images())
    assert len(calls) == 4
    model.eval()(images())
    assert len(calls) == 6


@pytest.mark.parametrize(("word", "option"), [
    ("hvit_tiny", "drop_path"), ("swin_t", "drop_path"), ("swin_t", "dropout"),
    ("efficientnet_b0", "drop_path"), ("efficientnet_b0", "dropout")])
def test_dropout_acts_in_training_alone(word, option):
    """Two passes in training differ; in evaluation the rate changes nothing."""
    model, x = build(word, **{option: 0.5}), images()
    assert not torch.allclose(model(x), model(x))
    model.load_state_dict(build(word).state_dict())
    torch.testing.assert_close(model.eval()(x), build(word).eval()(x))


def test_without_a_rate_torchvisions_own_dropout_stays():
    """EfficientNet is defined with its own; features stay as they are when the head drops some of them."""
    with torch.device("meta"):
        for word in ("efficientnet_b0", "efficientnet_b4"):
            peer = getattr(torchvision.models, word)(weights=None)
            assert build_photo_model(word, 4).head[0].p == peer.classifier[0].p
    model = build("efficientnet_b0", dropout=0.9)
    features = model.features(images())
    before = features.clone()
    model.head(features)
    assert torch.equal(features, before)


@pytest.mark.parametrize("word", FAMILIES)
def test_bfloat16_gives_finite_logits_and_gradients(word):
    """As autocast runs them on a GPU, and on a CPU that has the type."""
    model, x = build(word), images()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    logits.float().sin().sum().backward()
    assert logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("word", FAMILIES)
def test_a_copy_shares_nothing_with_the_model(word):
    """Averaged weights and teachers are copies."""
    model = build(word).eval()
    twin, expected = copy.deepcopy(model), model(images())
    for parameter in model.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(twin(images()), expected)


@pytest.mark.parametrize("word", PEERS)
def test_a_file_of_torchvisions_weights_gives_torchvisions_features(word, tmp_path):
    """With another number of classes than ours, whose head stays as it is."""
    peer = build_peer(word)
    torch.save(peer.state_dict(), tmp_path / "weights.pth")
    model = build(word).eval()
    head = copy.deepcopy(model.head.state_dict())
    matched, unmatched = load_torchvision_weights(model, tmp_path / "weights.pth")
    setattr(peer, PEERS[word], torch.nn.Identity())
    torch.testing.assert_close(model.features(images()), peer(images()), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(model.head.state_dict(), head)
    assert len(unmatched) == 2 + sum("num_batches_tracked" in name for name in peer.state_dict())
    assert all(name.startswith(PEERS[word]) or "num_batches" in name for name in unmatched)
    assert set(layer_groups(model)[1]) <= {f"network.{name}" for name in matched}


def test_weights_that_do_not_fit_are_refused(tmp_path):
    """Of another network, of another member, missing, damaged, or for a network that torchvision has not."""
    model = build("resnet50")
    for file, word in (("other.pth", "resnet18"), ("wide.pth", "wide_resnet50_2")):
        with torch.device("meta"):
            state = getattr(torchvision.models, word)(weights=None).state_dict()
        zero = torch.zeros(())
        torch.save({name: zero.expand(value.shape) for name, value in state.items()}, tmp_path / file)
    (tmp_path / "noise.pth").write_bytes(b"no tensors")
    for name in ("other.pth", "wide.pth"):
        with pytest.raises(UserError, match=f"{name}.*HVIT_MODEL"):
            load_torchvision_weights(model, tmp_path / name)
    with pytest.raises(UserError, match="gone.pth: no such file.*HVIT_WEIGHTS"):
        load_torchvision_weights(model, tmp_path / "gone.pth")
    with pytest.raises(BadFile, match="noise.pth.*HVIT_WEIGHTS"):
        load_torchvision_weights(model, tmp_path / "noise.pth")
    with pytest.raises(UserError, match="HVIT_WEIGHTS.*--init"):
        load_torchvision_weights(build("hvit_tiny"), tmp_path / "other.pth")


@pytest.mark.parametrize("word", FAMILIES)
def test_pretrained_features_start_a_classifier(word, tmp_path):
    """What pretraining saves has the names of the fine-tuned network, for images of another size too."""
    pretrained = build(word, num_classes=0).eval()
    for parameter in pretrained.parameters():
        parameter.data *= 1.1
    torch.save(pretrained.state_dict(), tmp_path / "simclr.pt")
    model = build(word).eval()
    _, unmatched = load_backbone(model, tmp_path / "simclr.pt")
    assert all(name.startswith("head.") for name in unmatched)
    torch.testing.assert_close(model.features(images(96, 96)), pretrained(images(96, 96)))


@pytest.mark.parametrize(("word", "options", "message"), [
    ("vgg", {}, "HVIT_MODEL.*resnet50"), ("hvit_tiny", {"dfca": True}, "HVIT_DFCA.*HVIT_SPECTRAL_CHANNELS"),
    ("resnet50", {"dfca": True}, "HVIT_DFCA = True: resnet50"),
    ("swin_t", {"spectral_channels": 4}, "HVIT_SPECTRAL_CHANNELS = 4"),
    ("swin_t", {"drop_path": 1.0}, "HVIT_DROP_PATH"), ("swin_t", {"dropout": -0.1}, "HVIT_DROPOUT = -0.1"),
    ("resnet50", {"dropout": 0.1}, "HVIT_DROPOUT = 0.1: resnet50"),
    ("hvit_base", {"dropout": 0.1}, "HVIT_DROPOUT = 0.1: hvit_base")])
def test_options_that_cannot_work_name_their_constant(word, options, message):
    """Before any data is read; an option that a network has not is not dropped in silence."""
    with pytest.raises(UserError, match=message):
        build_photo_model(word, 4, **options)


def test_images_that_do_not_fit_are_refused():
    """torchvision's networks read colour and nothing else."""
    model = build("resnet50")
    with pytest.raises(UserError, match="reads colour images"):
        model(images()[:, :1])
    with pytest.raises(UserError, match="spectral images.*HVIT_SPECTRAL_CHANNELS = 0"):
        model(images(), images())
