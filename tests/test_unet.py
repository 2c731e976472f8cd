"""U-Nets against MONAI's and the plain formulas; any size, every encoder, sharded training."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from monai.networks.nets import BasicUNet
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from models.resnet import SliceResNet
from models.unet import ENCODERS, AttentionGate, UNet
from models.vista import crop, pad_to_multiple
from utils import distributed
from utils.checkpoint import load_backbone, save_checkpoint
from utils.config import UserError

BOTH = ("plain", "resnet18")


def small(seed=0, **options):
    torch.manual_seed(seed)
    return UNet(**{"features": 4, **options})


def images(size=(64, 96), batch=2, channels=1, seed=0):
    return torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def monai_twin(ours, f, channels=1, classes=1):
    """MONAI's BasicUNet that computes what ``ours`` does.

    Its finest transposed convolution has twice as many channels, of which half are zero here, and each has a
    bias, zero too.
    """
    widths = (f, 2 * f, 4 * f, 8 * f, 16 * f, f)
    peer = BasicUNet(2, channels, classes, widths, act="relu", norm="batch", bias=False)
    state = {name: torch.zeros_like(value) for name, value in peer.state_dict().items()}
    names = [name for name in state if not name.endswith("deconv.bias")]
    for name, value in zip(names, ours.state_dict().values(), strict=True):
        state[name][tuple(slice(n) for n in value.shape)] = value
    peer.load_state_dict(state)
    return peer


@pytest.mark.parametrize("channels, classes", [(1, 1), (2, 3)])
def test_weights_of_monais_basic_unet_give_its_output_and_gradients(channels, classes):
    """The joined kernel of transposed convolution and convolution is exact, to the border of the image."""
    ours = small(in_channels=channels, num_classes=classes, seed=1)
    peer, x = monai_twin(ours, 4, channels, classes), images((48, 32), channels=channels)
    for mode in (True, False):                                  # a batch's statistics, then the running ones
        outputs = [model.train(mode)(x) for model in (ours, peer)]
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    for model in (ours, peer):
        model.train()(x).square().mean().backward()
    theirs = [p.grad for name, p in peer.named_parameters() if not name.endswith("deconv.bias")]
    for (name, p), q in zip(ours.named_parameters(), theirs, strict=True):
        torch.testing.assert_close(p.grad, crop_to(q, p.shape), rtol=1e-3, atol=1e-5, msg=name)


def crop_to(x, shape):
    """The first entries of x along all axes."""
    return x[tuple(slice(n) for n in shape)]


def naive_forward(model, x):
    """The network written out: doubled map and gated skip side by side, no joined kernels."""
    maps = model.encoder.stages(x)
    skips = [x, *maps[:-1]] if model.decoder.image_skip else maps[:-1]
    x = maps[-1]
    for block, skip in zip(model.decoder.blocks, skips[::-1], strict=True):
        gated = skip if block.gate is None else naive_gate(block.gate, skip, x)
        x = block.convs(torch.cat([gated, block.up(x)], 1))
    return model.head(x)


def naive_gate(gate, x, g):
    """One coarse pixel at a time, as equation 1 of the paper has it; then enlarged and multiplied."""
    weights = torch.zeros(len(g), 1, *g.shape[2:], dtype=g.dtype)
    of_x, of_g, psi = gate.of_skip.weight, gate.of_below.weight[:, :, 0, 0], gate.weight.weight[0, :, 0, 0]
    for row in range(g.shape[2]):
        for column in range(g.shape[3]):
            patch = x[:, :, 2 * row:2 * row + 2, 2 * column:2 * column + 2]
            query = torch.einsum("bchw,ochw->bo", patch, of_x) + g[:, :, row, column] @ of_g.T
            score = (query + gate.of_below.bias).clamp(min=0) @ psi + gate.weight.bias
            weights[:, 0, row, column] = 1 / (1 + torch.exp(-score))
    return x * F.interpolate(weights, scale_factor=2, mode="bilinear")


@pytest.mark.parametrize("encoder", BOTH)
@pytest.mark.parametrize("attention", [False, True])
def test_the_network_is_its_formula(encoder, attention):
    """Gates weigh what they should, joined kernels are exact for skips of any width."""
    model, x = small(encoder=encoder, attention=attention).double(), images((64, 32)).double()
    assert [block.joined for block in model.decoder.blocks][-3:] == [False, True, True]
    gates = [block.gate for block in model.decoder.blocks]
    assert gates[-1] is None and all((gate is not None) == attention for gate in gates[:-1])
    torch.testing.assert_close(model(x), naive_forward(model, x))


def test_gates_lie_between_0_and_1_and_follow_the_coarse_map():
    """The same skip, another context: another weight."""
    torch.manual_seed(0)
    gate, x, g = AttentionGate(4, 8), images((8, 12), channels=4), images((4, 6), channels=8)
    weights = gate.weights(x, g)
    assert weights.shape == (2, 1, 8, 12) and 0 < weights.min() and weights.max() < 1
    assert not torch.allclose(weights, gate.weights(x, -g))
    torch.testing.assert_close(gate(x, g), x * weights)


@pytest.mark.parametrize("encoder", BOTH)
@pytest.mark.parametrize("size", [(33, 50), (7, 64), (96, 32)])
def test_images_of_any_size_give_logits_of_their_size(encoder, size):
    """What is added to fill the grid is mirrored and cut off again."""
    model, x = small(encoder=encoder, num_classes=3).eval(), images(size)
    with torch.no_grad():
        output = model(x)
        padded = pad_to_multiple(x, model.encoder.multiple)
        assert output.shape == (2, 3, *size)
        torch.testing.assert_close(output, crop(model(padded), size))


def test_depth_features_and_channels_shape_the_network():
    """f channels at the finest level, doubled at each coarser one."""
    model = small(depth=3, features=6, in_channels=2, num_classes=5)
    assert model.encoder.channels == (6, 12, 24, 48) and model.encoder.multiple == 8
    assert [x.shape[1:] for x in model.encoder.stages(images((16, 8), channels=2))] == [
        (6, 16, 8), (12, 8, 4), (24, 4, 2), (48, 2, 1)]
    assert model(images((16, 8), channels=2)).shape == (2, 5, 16, 8)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_gradients_reach_every_parameter(encoder):
    """A layer without a gradient is a layer that never learns."""
    model = small(encoder=encoder, attention=True)
    model(images()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("encoder", BOTH)
def test_recomputed_levels_give_the_same_gradients_and_statistics(encoder):
    """They are kept nowhere and computed twice; no batch counts twice in the statistics."""
    kept, recomputed = (small(encoder=encoder, attention=True, checkpoint_activations=flag)
                        for flag in (False, True))
    calls = {}
    for model in (kept, recomputed):
        for name, layer in model.named_modules():
            if isinstance(layer, nn.BatchNorm2d):
                def count(*_, name=name, model=model):
                    calls[model, name] = calls.get((model, name), 0) + 1
                layer.register_forward_hook(count)
        model(images()).square().mean().backward()
    assert all(number == (2 if model is recomputed and not name.startswith("encoder.bn1") else 1)
               for (model, name), number in calls.items())
    for (name, p), q in zip(kept.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)
    for (name, p), q in zip(kept.named_buffers(), recomputed.buffers(), strict=True):
        if p.is_floating_point():
            torch.testing.assert_close(q, p, msg=name)


def test_xavier_weights_fill_their_interval():
    """Uniform within sqrt(6 / (inputs + outputs)) of each convolution; torch's default is not."""
    filled = 0
    for name, layer in small(features=16, xavier=True).named_modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            window = layer.weight[0, 0].numel()
            limit = math.sqrt(6 / (window * (layer.in_channels + layer.out_channels)))
            assert layer.weight.abs().max() <= limit and (layer.bias is None or not layer.bias.any()), name
            if layer.weight.numel() > 1000:
                assert layer.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.05), name
                filled += 1
    assert filled > 10
    assert not torch.equal(small(xavier=True).head.weight, small().head.weight)


@pytest.mark.parametrize("word", ["resnet18", "resnet50"])
def test_a_classifier_starts_the_encoder(tmp_path, word):
    """Its layers have the same names; its head has no use here."""
    torch.manual_seed(5)
    classifier = SliceResNet(word, 7)
    save_checkpoint(tmp_path / "classify_best.pt", kind="classify", model_state_dict=classifier.state_dict())
    model, x = small(encoder=word).eval(), images()
    _, unmatched = load_backbone(model.encoder, tmp_path / "classify_best.pt", remove_prefix="encoder.")
    assert not unmatched
    with torch.no_grad():
        torch.testing.assert_close(model.encoder.stages(x), classifier.eval().stages(x))


@pytest.mark.parametrize("encoder", BOTH)
def test_another_unet_starts_the_encoder_or_the_whole(tmp_path, encoder):
    """Lesions start from the cord, or from painted lesions; the encoder alone where the decoder differs."""
    first = small(seed=1, encoder=encoder)
    save_checkpoint(tmp_path / "segment_best.pt", kind="segment", model_state_dict=first.state_dict())
    second = small(seed=2, encoder=encoder)
    _, unmatched = load_backbone(second, tmp_path / "segment_best.pt")
    assert not unmatched
    with torch.no_grad():
        torch.testing.assert_close(second.eval()(images()), first.eval()(images()))
    other = small(seed=3, encoder=encoder, attention=True, num_classes=4)
    _, unmatched = load_backbone(other.encoder, tmp_path / "segment_best.pt", remove_prefix="encoder.")
    assert not unmatched


@pytest.mark.parametrize("size", [(16, 16), (32, 48)])
def test_bfloat16_and_channels_last_cost_no_more_than_in_monais_network(size):
    """Also at the deepest level of small images, where a map has one pixel or six.

    Of two networks that compute the same, ours must not be the one that rounds more.
    """
    ours, x = small(features=16), images(size, batch=4)
    plain = gradients(ours, x, False)
    fast = gradients(small(features=16), x, True)
    theirs = gradients(monai_twin(small(features=16), 16), x, True)
    errors = []
    for (name, exact), mine, other in zip(plain.items(), fast.values(), theirs.values(), strict=True):
        errors.append([(gradient - exact).norm() / exact.norm()
                       for gradient in (mine, crop_to(other, exact.shape))])
        assert mine.isfinite().all(), name
    mine, other = torch.tensor(errors).mean(0)
    assert mine < 1.2 * other


def gradients(model, x, fast):
    """{name: gradient} of the kernels; fast: bfloat16 and channels_last."""
    if fast:
        model = model.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=fast):
        output = model(x)
    output.float().square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.dim() == 4}


def test_the_network_is_one_graph_for_the_compiler():
    """A break in the graph costs what COMPILE is to gain."""
    model, x = small(attention=True).eval(), images((40, 32))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    torch.compiler.reset()


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("encoder", BOTH)
@pytest.mark.parametrize("recompute", [False, True])
def test_sharded_blocks_gather_what_they_need(one_rank, encoder, recompute):
    """A joined kernel reads its layers' weights; their block must have gathered them by then."""
    options = {"encoder": encoder, "attention": True, "checkpoint_activations": recompute}
    plain, sharded = small(**options), small(**options)
    blocks = list(distributed._blocks(sharded, distributed._size(sharded) / 100))
    assert len(blocks) > 3
    for block in [*blocks, sharded]:
        fully_shard(block, mesh=one_rank, reshard_after_forward=True)
    for model in (plain, sharded):
        model(images()).square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(q.grad.full_tensor(), p.grad, msg=name)


def test_training_learns_a_shape():
    """A few steps on one small batch find bright discs."""
    model, x = small(features=8), images((32, 32))
    target = (F.avg_pool2d(x, 5, 1, 2) > 0.5).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = F.binary_cross_entropy_with_logits(model(x), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0], losses


def test_settings_that_do_not_exist_are_refused():
    """One line that names the constant."""
    for options, message in [({"encoder": "vgg"}, 'SPINE_ENCODER is "vgg"; set it to one of plain, resnet18'),
                             ({"depth": 0}, "SPINE_DEPTH = 0"), ({"features": 0}, "SPINE_FEATURES = 0"),
                             ({"encoder": "resnet18", "in_channels": 3}, "one grey channel, not 3")]:
        with pytest.raises(UserError, match=message):
            small(**options)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_prior_is_what_an_untrained_network_says(channels):
    """On an empty slice of a U-Net whose last weights are zero, so that the bias alone speaks."""
    network = UNet(num_classes=channels, depth=2, features=4, prior=0.2, xavier=True)
    torch.nn.init.zeros_(network.head.weight)
    logits = network.eval()(torch.zeros(1, 1, 16, 16))[0, :, 0, 0]
    shares = logits.sigmoid() if channels == 1 else logits.softmax(0)[1:]
    torch.testing.assert_close(shares, torch.full_like(shares, 0.2 / len(shares)))
    assert UNet(depth=1, features=4).head.bias.item() != UNet(depth=1, features=4).head.bias.item()
    with pytest.raises(UserError, match="SPINE_MASK_PRIOR = 1"):
        UNet(prior=1)
