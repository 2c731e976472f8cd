"""The hierarchical vision transformer, its padding, and its second stream."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer import PatchMerging
from timm.models.vision_transformer import Block as TimmBlock

from models.hvit import DEPTHS, DFCA, FEW_TOKENS, HEADS, WIDTHS, Block, HViT, attention, shares
from utils.config import UserError

SMALL = {"size": "tiny", "num_classes": 4, "image_size": 64, "drop_path": 0.0, "dfca_dropout": 0.0}
STREAMS = ({}, {"spectral_channels": 5}, {"spectral_channels": 5, "dfca": True})
NORM = partial(torch.nn.LayerNorm, eps=1e-6)
TIMM_NAMES = {"qkv": "attn.qkv", "project": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}


def build(seed=0, **options):
    """A small network whose weights are large enough for every part to count."""
    torch.manual_seed(seed)
    model = HViT(**SMALL | options)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def inputs(model, height=64, width=64, batch=2, seed=0):
    """(images,) or (images, spectral), in [0, 1], as the model takes them."""
    generator = torch.Generator().manual_seed(seed)
    channels = [3, model.spectral_channels] if model.spectral_channels else [3]
    return [torch.rand(batch, count, height, width, generator=generator) for count in channels]


def gradients(model, seed=0):
    torch.manual_seed(seed)
    model(*inputs(model)).sin().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def timm_block(block):
    """timm's ViT block with the weights of ours."""
    state = {}
    for name, value in block.state_dict().items():
        part, kind = name.split(".")
        state[f"{TIMM_NAMES.get(part, part)}.{kind}"] = value
    peer = TimmBlock(block.norm1.weight.shape[0], block.heads, qkv_bias=True, norm_layer=NORM)
    peer.load_state_dict(state)
    return peer


def patch_counts(height, width):
    """How many patches each of the last stage's tokens was merged from, by merging ones."""
    counts = np.ones((height, width))
    for _ in range(3):
        counts = np.pad(counts, ((0, counts.shape[0] % 2), (0, counts.shape[1] % 2)))
        counts = sum(counts[i::2, j::2] for i in (0, 1) for j in (0, 1))
    return torch.from_numpy(counts).float()


def by_timm(model, images):
    """The features of a one-stream model by timm's layers; image and position map of fitting sizes."""
    x = F.conv2d(images, model.embed.project.weight, model.embed.project.bias, stride=16).permute(0, 2, 3, 1)
    x = model.embed.norm(x) + F.interpolate(model.position, x.shape[1:3], mode="bicubic").permute(0, 2, 3, 1)
    grid = x.shape[1:3]
    for stage in model.stages:
        if hasattr(stage.merge, "reduction"):
            merge = PatchMerging(x.shape[3], norm_layer=NORM)
            # timm's four neighbours come in the order of ours: down first, then right
            merge.load_state_dict(stage.merge.state_dict())
            x = merge(x)
        shape, x = x.shape, x.flatten(1, 2)
        for block in stage.blocks:
            x = timm_block(block)(x)
        x = x.view(shape)
    counts = patch_counts(*grid)[None, ..., None]
    return (model.norm(x) * counts).sum((1, 2)) / counts.sum()


@pytest.mark.parametrize("size", [(64, 64), (112, 80), (272, 48)])
def test_features_equal_those_of_timms_layers(size):
    """The same weights in a peer's blocks and mergings, on even and odd grids, give the same features."""
    model = build().eval()
    images, = inputs(model, *size)
    with torch.no_grad():
        torch.testing.assert_close(model.features(images), by_timm(model, images), rtol=1e-4, atol=1e-4)


def test_block_equals_timms():
    """One block by itself, at a tighter tolerance."""
    torch.manual_seed(0)
    block, x = Block(48, 3), torch.randn(2, 9, 48)
    for parameter in block.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    torch.testing.assert_close(block(x), timm_block(block)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [4, FEW_TOKENS, FEW_TOKENS + 1])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_attention_and_its_gradient_equal_the_formula(tokens, dtype, tolerance):
    """There are two ways of computing it; which one is taken must not be seen in what is learnt."""
    torch.manual_seed(0)
    qkv, weight = torch.randn(3, 2, 3, tokens, 8), torch.randn(2, 3, tokens, 8)

    def run(function, dtype):
        x = qkv.to(dtype).requires_grad_()
        found = function(*x)
        (found * weight.to(dtype)).sum().backward()
        return found.double(), x.grad.double()

    expected = run(lambda q, k, v: (q @ k.mT / 8 ** 0.5).softmax(3) @ v, torch.float64)
    for found, wanted in zip(run(attention, dtype), expected, strict=True):
        assert (found - wanted).norm() < tolerance * wanted.norm()


def test_dfca_equals_its_formula():
    """Colour tokens ask; spectral tokens plus the vector are keys and values; the norm follows the sum."""
    torch.manual_seed(0)
    dfca = DFCA(24, heads=4, dropout=0.0)
    for parameter in dfca.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    colour, spectral = torch.randn(2, 3, 2, 24), torch.randn(2, 3, 2, 24)
    x, context = colour.flatten(1, 2), spectral.flatten(1, 2) + dfca.disease
    weights, biases = dfca.attention.in_proj_weight.chunk(3), dfca.attention.in_proj_bias.chunk(3)
    q, k, v = (F.linear(source, weight, bias).unflatten(2, (4, 6)).transpose(1, 2)
               for source, weight, bias in zip((x, context, context), weights, biases, strict=True))
    answer = ((q @ k.transpose(2, 3) / 6 ** 0.5).softmax(3) @ v).transpose(1, 2).flatten(2)
    x = dfca.norm1(x + dfca.attention.out_proj(answer))
    x = dfca.norm2(x + dfca.fc2(F.gelu(dfca.fc1(x))))
    torch.testing.assert_close(dfca(colour, spectral).flatten(1, 2), x, rtol=1e-4, atol=1e-5)


def test_a_fresh_dfca_equals_multihead_attention_on_bare_spectral_tokens():
    """The learned vector starts at zero, and then moves the answer."""
    torch.manual_seed(0)
    dfca = DFCA(24, heads=4).eval()
    colour, spectral = torch.randn(2, 5, 1, 24), torch.randn(2, 5, 1, 24)
    x, context = colour.flatten(1, 2), spectral.flatten(1, 2)
    x = dfca.norm1(x + dfca.attention(x, context, context)[0])
    before = dfca(colour, spectral)
    torch.testing.assert_close(before.flatten(1, 2), dfca.norm2(x + dfca.fc2(F.gelu(dfca.fc1(x)))))
    dfca.disease.data += torch.randn(24)
    assert not torch.allclose(dfca(colour, spectral), before, atol=1e-3)


def test_small_is_the_guides():
    """27.6 M parameters, widths 96 to 768, depths 2 2 6 2, heads 3 6 12 24, drop path from 0 to its rate."""
    with torch.device("meta"):
        model = HViT("small", drop_path=0.2)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(27.6e6, abs=0.05e6)
    assert [stage.blocks[0].fc1.in_features for stage in model.stages] == [96, 192, 384, 768]
    assert [len(stage.blocks) for stage in model.stages] == [2, 2, 6, 2]
    assert [stage.blocks[0].heads for stage in model.stages] == [3, 6, 12, 24]
    rates = [block.drop_path.p for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx(np.linspace(0, 0.2, 12).tolist())


@pytest.mark.parametrize("size", WIDTHS)
def test_members_differ_in_width_alone(size):
    """Any of them takes the twelve heads of DFCA."""
    with torch.device("meta"):
        model = HViT(size, spectral_channels=5, dfca=True)
    assert model.dim == 8 * WIDTHS[size]
    assert all(WIDTHS[size] * 2 ** i % heads == 0 for i, heads in enumerate(HEADS))
    assert tuple(len(stage.blocks) for stage in model.spectral_stages) == DEPTHS


@pytest.mark.parametrize("options", [*STREAMS, {"size": "small"}])
def test_gradient_reaches_every_parameter(options):
    """Two sizes, and every way to use the second stream; no part is there for nothing."""
    assert not [name for name, grad in gradients(build(**options)).items() if grad is None or not grad.any()]


@pytest.mark.parametrize("options", STREAMS)
def test_any_size_has_features_whose_gradient_reaches_every_pixel(options):
    """Odd grids, oblong images, and such as are no multiple of the patch or smaller than one."""
    model = build(**options)
    for height, width in ((224, 224), (40, 100), (7, 33), (1, 1)):
        images = [image.requires_grad_() for image in inputs(model, height, width, batch=1)]
        features = model.features(*images)
        assert features.shape == (1, model.dim) and features.isfinite().all()
        features.sin().sum().backward()
        assert all((image.grad != 0).any(1).all() for image in images)


def test_attention_sees_no_token_made_of_padding():
    """At 224 px the grids are 14, 7, 4, 2: the least that hold every patch."""
    model, tokens = build().eval(), []
    for stage in model.stages:
        stage.blocks[0].register_forward_hook(lambda module, args, output: tokens.append(output.shape[1]))
    model(*inputs(model, 224, 224, batch=1))
    assert tokens == [14 * 14, 7 * 7, 4 * 4, 2 * 2]
    assert all((patch_counts(h, w) > 0).all() for h in range(1, 20) for w in range(1, 20))


@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (17, 3), (1, 9)])
def test_each_token_of_the_mean_counts_by_its_patches(grid):
    """Of 17 patches the last of three tokens holds one: a 17th of the mean instead of a third."""
    rows, columns = (shares(side, 8, "cpu") for side in grid)
    torch.testing.assert_close(rows[:, None] * columns, patch_counts(*grid) / (grid[0] * grid[1]))


def test_an_image_is_as_if_mirrored_up_to_whole_patches():
    """A border of zeros would be a pattern that the image does not have."""
    model = build().eval()
    image, = inputs(model, 40, 50, batch=1)
    mirrored = torch.from_numpy(np.pad(image.numpy(), ((0, 0), (0, 0), (0, 8), (0, 14)), mode="reflect"))
    torch.testing.assert_close(model(image), model(mirrored))


@pytest.mark.parametrize("options", STREAMS)
def test_an_image_in_a_batch_has_the_features_that_it_has_alone(options):
    """Nothing of one image reaches another."""
    model = build(**options).eval()
    images = inputs(model, 56, 40, batch=3)
    alone = torch.cat([model(*(image[i:i + 1] for image in images)) for i in range(3)])
    torch.testing.assert_close(model(*images), alone, rtol=1e-4, atol=1e-4)


def test_position_is_kept_for_its_own_grid_and_resized_for_others():
    """So that weights serve images of any size; and without it the patches could change places."""
    model = build().eval()
    assert torch.equal(model.position_of((4, 4)), model.position.permute(0, 2, 3, 1))
    expected = F.interpolate(model.position, (7, 3), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.position_of((7, 3)).permute(0, 3, 1, 2), expected)
    assert HViT(**SMALL | {"image_size": 200, "patch": 8}).position.shape[2:] == (25, 25)
    image, = inputs(model, 128, 256)
    moved = image.roll(128, 3)                               # the last stage's two tokens change places
    assert not torch.allclose(model(image), model(moved), atol=1e-3)
    model.position.data.zero_()
    torch.testing.assert_close(model(image), model(moved), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", STREAMS[1:])
def test_the_second_stream_changes_the_answer(options):
    """Both fusions use it; the original's DFCA was switched on and did nothing."""
    model = build(**options).eval()
    images, spectral = inputs(model)
    other = spectral.flip(3)
    assert not torch.allclose(model(images, spectral), model(images, other), atol=1e-2)
    assert not torch.allclose(model(images, spectral), model(images.flip(3), spectral), atol=1e-2)


def test_dfca_acts_at_every_stage():
    """Its four modules each see the tokens of both streams on the grid of their stage."""
    model, seen = build(spectral_channels=5, dfca=True).eval(), []
    for dfca in model.dfca:
        dfca.register_forward_hook(lambda module, args, output: seen.append([arg.shape[1:] for arg in args]))
    model(*inputs(model))
    assert seen == [[(side, side, width)] * 2 for side, width in ((4, 48), (2, 96), (1, 192), (1, 384))]


@pytest.mark.parametrize("options", [{}, {"drop_path": 0.5}, {**STREAMS[2], "dfca_dropout": 0.3}])
def test_checkpointing_activations_changes_no_gradient(options):
    """The recomputation draws the same dropout, and saves memory rather than results."""
    results = [gradients(build(checkpoint_activations=recompute, **options)) for recompute in (False, True)]
    torch.testing.assert_close(*results)


def test_checkpointing_computes_each_part_twice_in_training_alone():
    """Otherwise the option would do nothing."""
    for recompute, runs in ((False, 1), (True, 2)):
        model, calls = build(checkpoint_activations=recompute, **STREAMS[2]), []
        for part in (model.stages[2].blocks[1], model.spectral_stages[0].blocks[0], model.dfca[3]):
            part.fc1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        gradients(model)
        assert len(calls) == 3 * runs
        model.eval()(*inputs(model))
        assert len(calls) == 3 * runs + 3


@pytest.mark.parametrize("options", [{"drop_path": 0.5}, {**STREAMS[2], "dfca_dropout": 0.5}])
def test_dropout_acts_in_training_alone(options):
    """Two passes in training differ; in evaluation the rate changes nothing."""
    model = build(**options)
    images = inputs(model)
    assert not torch.allclose(model(*images), model(*images))
    plain = build(**{name: value for name, value in options.items() if "drop" not in name}).eval()
    torch.testing.assert_close(model.eval()(*images), plain(*images))


def test_drop_path_draws_for_each_image_and_keeps_the_mean():
    """Dropped for a whole batch it would be noise of the batch; what stays is scaled."""
    torch.manual_seed(0)
    block = Block(12, 3, drop_path=0.25)
    branch = block.drop_path(torch.ones(4000, 2, 12))
    assert torch.equal(branch, branch[:, :1, :1].expand_as(branch))
    assert sorted(set(branch[:, 0, 0].tolist())) == pytest.approx([0, 4 / 3])
    assert branch.mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("options", STREAMS)
def test_bfloat16_gives_nearly_the_same_features_in_float32(options):
    """The residual stream, the norms and the mean stay in float32 under autocast; so do finite gradients."""
    model = HViT(**SMALL | options)
    images = inputs(model)
    expected, kinds = model.features(*images), []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, args, output: kinds.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        features = model.features(*images)
    assert {*kinds, features.dtype} == {torch.float32}
    assert (features - expected).norm() < 0.02 * expected.norm()
    features.sin().sum().backward()
    assert all(p.grad.isfinite().all() for name, p in model.named_parameters() if not name.startswith("head"))


def test_without_classes_the_network_gives_its_features():
    """As pretraining uses it: a head without a gradient would stop distributed training."""
    model = build(num_classes=0)
    images = inputs(model)
    assert torch.equal(model(*images), model.features(*images))
    assert not [name for name, _ in model.named_parameters() if name.startswith("head")]


def test_compiled_network_computes_the_same(monkeypatch):
    """Python's control flow depends on shapes and settings alone."""
    monkeypatch.setattr("models.hvit.DEPTHS", (1, 1, 1, 1))
    model = build().eval()
    images, = inputs(model, 56, 40)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize(("options", "message"), [
    ({"dfca": True}, "HVIT_DFCA.*HVIT_SPECTRAL_CHANNELS"), ({"size": "huge"}, "HVIT_MODEL.*hvit_base"),
    ({"drop_path": 1.0}, "HVIT_DROP_PATH = 1.0"), ({**STREAMS[2], "dfca_heads": 5}, "HVIT_DFCA_HEADS = 5"),
    ({**STREAMS[2], "dfca_dropout": -0.1}, "HVIT_DFCA_DROPOUT")])
def test_options_that_cannot_work_name_their_constant(options, message):
    """Before any data is read."""
    with pytest.raises(UserError, match=message):
        HViT(**SMALL | options)


@pytest.mark.parametrize("options", STREAMS)
def test_images_that_do_not_fit_the_model_are_refused(options):
    """Spectral images missing, needless, or of other channels or sizes, and images that are not colour."""
    model = build(**options)
    images, spectral = torch.rand(2, 3, 32, 32), torch.rand(2, 5, 32, 32)
    wrong = [spectral] if not options else [None, spectral[:, :4], spectral[..., :16], spectral[:1]]
    for other in wrong:
        with pytest.raises(UserError, match="spectral images of shape.*HVIT_SPECTRAL_CHANNELS"):
            model(images, other)
    with pytest.raises(UserError, match="reads colour images"):
        model(images[:, :1], *([spectral] if options else []))
