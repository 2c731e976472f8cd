"""Perceptual and style losses, on random weights written on the spot."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import vgg19_bn

from losses.perceptual import VGGLoss, gram
from utils.config import BadFile, UserError


def random_state(last):
    """A state dict of vgg19_bn's features up to layer `last`, under torchvision's names; float32."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in vgg19_bn(weights=None).state_dict().items()}
    state = {}
    for key, shape in shapes.items():
        if not key.startswith("features.") or int(key.split(".")[1]) >= last:
            continue
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(0)
        elif len(shape) == 4:
            state[key] = torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5
        else:
            state[key] = 0.5 + torch.rand(shape, generator=generator)
    return state


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of the layers that blocks 1 to 4 need."""
    path = tmp_path_factory.mktemp("vgg") / "vgg19_bn.pth"
    torch.save(random_state(last=30), path)
    return path


@pytest.fixture(scope="module")
def loss(weights):
    return VGGLoss(weights)


def maps(seed, size=(32, 32), batch=2):
    coarse = torch.randn(batch, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.tanh(F.interpolate(coarse, size=size, mode="bicubic"))


def test_gram_equals_the_loop_over_channels():
    """Entry (i, j) is the sum of products of two channels, over C * H * W."""
    features = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([torch.stack([torch.stack([(image[i] * image[j]).sum() / 60 for j in range(3)])
                                         for i in range(3)]) for image in features])
    torch.testing.assert_close(gram(features), expected)


def test_both_terms_equal_torchvisions_network_cut_after_each_first_relu(weights, loss):
    """Feature maps are relu1_1 ... relu4_1 of ImageNet-normalised grey images, one image at a time."""
    pred, target = maps(0), maps(1)
    with torch.device("meta"):
        layers = vgg19_bn(weights=None).features[:30]
    state = {key.removeprefix("features."): value for key, value in torch.load(weights).items()}
    layers.load_state_dict(state, assign=True)
    layers.eval()

    def features(image):
        channels = [((image[0] + 1) / 2 - mean) / std
                    for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
        x, outputs = torch.stack(channels)[None], []
        for layer in layers:
            x = layer(x)
            outputs.append(x.clone())
        return [outputs[i] for i in (2, 9, 16, 29)]

    perceptual, style = [], []
    for a, b in zip(pred, target, strict=True):
        for k, (x, y) in enumerate(zip(features(a), features(b), strict=True), start=1):
            if k in (2, 3):
                perceptual.append((x - y).abs().mean())
            if k in (2, 3, 4):
                x, y = x[0].flatten(1), y[0].flatten(1)
                style.append(((x @ x.T - y @ y.T) / x.numel()).abs().mean())
    found = loss(pred, target)
    torch.testing.assert_close(found[0], torch.stack(perceptual).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[1], torch.stack(style).mean(), rtol=1e-4, atol=1e-6)


def test_equal_maps_score_zero_and_order_changes_nothing(loss):
    """A distance, averaged over the batch."""
    pred, target = maps(0), maps(1)
    assert [term.item() for term in loss(target, target)] == [0.0, 0.0]
    torch.testing.assert_close(loss(pred, target), loss(pred.flip(0), target.flip(0)))


def test_losses_fall_as_the_prediction_approaches_the_target(loss):
    """From the empty map to the target every step is a gain, for both terms."""
    target = maps(1)
    values = torch.stack([torch.stack(loss(step * target, target)) for step in (0.0, 0.25, 0.5, 0.75, 1.0)])
    assert (values.diff(dim=0) < 0).all()


def test_mode_of_training_changes_neither_the_value_nor_the_weights(loss):
    """Frozen features: batch statistics and weights stay as they were loaded."""
    pred, target = maps(0).requires_grad_(), maps(1)
    before, state = loss(pred, target), {key: value.clone() for key, value in loss.state_dict().items()}
    after = loss.train()(pred, target)
    sum(after).backward()
    torch.testing.assert_close(before, after)
    torch.testing.assert_close(dict(loss.state_dict()), state)
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert pred.grad.abs().sum() > 0


def test_large_maps_are_seen_at_224_pixels_and_small_ones_as_they_are(loss):
    """The longer side is brought to 224 and the proportions stay."""
    assert loss.features(torch.zeros(1, 1, 448, 320))[0].shape[-2:] == (224, 160)
    assert loss.features(torch.zeros(1, 1, 48, 32))[0].shape[-2:] == (48, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_constant_maps_have_finite_gradients(loss, dtype):
    """Features are computed in float32, under autocast too."""
    for pred, target in ((maps(0), maps(1)), (torch.zeros(1, 1, 32, 32), torch.zeros(1, 1, 32, 32))):
        pred = pred.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            terms = loss(pred, target.to(dtype))
        sum(terms).backward()
        assert all(term.dtype == torch.float32 and torch.isfinite(term) for term in terms)
        assert torch.isfinite(pred.grad).all()


def test_style_does_not_depend_on_place_and_perceptual_does(loss):
    """A Gram matrix sums over positions, so moving a finding costs it little beside removing the finding."""
    pred = torch.zeros(1, 1, 64, 64)
    pred[..., 16:32, 16:32] = 0.6
    perceptual, style = loss(pred.roll(16, dims=3), pred)
    removed_perceptual, removed_style = loss(torch.zeros_like(pred), pred)
    assert perceptual > removed_perceptual and style < 0.2 * removed_style


def test_files_with_classifier_and_without_prefix_or_counters_are_the_same_network(loss, tmp_path):
    """torchvision's own file is older than the batch counters of its layers and has a classifier."""
    state = random_state(last=30)
    bare = {key.removeprefix("features."): value for key, value in state.items() if "num_batches" not in key}
    torch.save({**bare, "classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "bare.pth")
    pred, target = maps(0), maps(1)
    torch.testing.assert_close(VGGLoss(tmp_path / "bare.pth")(pred, target), loss(pred, target))


@pytest.mark.parametrize("path", ["", None])
def test_no_path_is_an_error_that_names_the_constant(path):
    """Random weights would be another loss under the same name."""
    with pytest.raises(UserError, match="USE_PERC_STYLE.*VGG_WEIGHTS"):
        VGGLoss(path)


def test_a_missing_file_is_named_with_its_constant(tmp_path):
    """The user learns which file goes where."""
    with pytest.raises(UserError, match="absent.pth.*VGG_WEIGHTS"):
        VGGLoss(tmp_path / "absent.pth")


def write_text(path):
    path.write_text("<html>not found</html>")


def write_nothing(path):
    path.touch()


def write_pickle(path):
    path.write_bytes(pickle.dumps({"features.0.weight": [1.0]}))


def write_code(path):
    torch.save(torch.nn.Linear(2, 2), path)


def write_list(path):
    torch.save([torch.zeros(2)], path)


def write_plain_vgg(path):
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3), "features.0.bias": torch.zeros(64)}, path)


def write_truncated(path):
    torch.save({"0.weight": torch.zeros(64, 3, 3, 3)}, path)
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("write", [write_text, write_nothing, write_pickle, write_code, write_list,
                                   write_plain_vgg, write_truncated])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_of_something_else_is_one_line_that_names_it(write, tmp_path):
    """Whatever lies there, the run ends with the file and the remedy, and nothing in it is executed."""
    write(tmp_path / "file.pth")
    with pytest.raises(BadFile, match="file.pth.*VGG_WEIGHTS") as error:
        VGGLoss(tmp_path / "file.pth")
    assert "\n" not in str(error.value)
