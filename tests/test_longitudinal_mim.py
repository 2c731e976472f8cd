"""The network that maps what changed between two chest X-rays."""

import pytest
import torch
import torch.nn.functional as F

from models.depthwise import DepthwiseConv2d
from models.longitudinal_mim import DifferenceAttention, LongitudinalMIMModelBig
from models.vit import ViT
from utils.config import UserError

SMALL = {"efficientnet": "b0", "vit": "tiny", "decoder_channels": (32, 24, 16, 16, 8), "mask_patch_size": 32}


def small_model(seed=0, **options):
    """A small member of the family whose head is as large as a trained one's."""
    torch.manual_seed(seed)
    model = LongitudinalMIMModelBig(**SMALL | options)
    torch.nn.init.normal_(model.head[-1].weight, std=0.3)
    return model


def image_pair(height, width, batch=2, seed=0):
    return torch.rand(2, batch, 1, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_map_has_the_size_of_the_images_and_lies_within_one(size):
    """Any size divisible by 32, square or not; values are tanh's."""
    with torch.no_grad():
        output = small_model().eval()(*image_pair(*size))
    assert output.shape == (2, 1, *size) and output.dtype == torch.float32
    assert output.abs().max() <= 1


def test_a_new_network_answers_no_change():
    """Training starts near zero, the value of almost every pixel of a difference map."""
    torch.manual_seed(0)
    with torch.no_grad():
        output = LongitudinalMIMModelBig(**SMALL)(*image_pair(64, 64))
    assert output.abs().max() < 0.05


@pytest.mark.parametrize("antisymmetric", [False, True])
def test_gradient_reaches_every_parameter(antisymmetric):
    """Also the mask token of a batch in which nothing is hidden: DDP waits for every gradient."""
    model = small_model(antisymmetric=antisymmetric)
    shown = torch.zeros(2, 2, 64, 64, dtype=torch.bool)
    model(*image_pair(64, 64), shown).square().mean().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    silent = {name for name, parameter in model.named_parameters() if not parameter.grad.any()}
    assert silent == {"mask_token"}

    model(*image_pair(64, 64), ~shown).square().mean().backward()
    assert model.mask_token.grad.any()


@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
def test_antisymmetric_swap_negates_and_identical_images_give_zero(size):
    """The promise of ANTISYMMETRIC holds to the bit, not to a tolerance."""
    model = small_model(antisymmetric=True).eval()
    prior, current = image_pair(*size)
    with torch.no_grad():
        forth, back = model(prior, current), model(current, prior)
        assert forth.abs().max() > 0.01
        assert torch.equal(forth, -back)
        assert not model(prior, prior).any()


def test_order_of_the_images_matters_without_antisymmetry():
    """A network that confused new and resolved would pass the tests of shape."""
    model = small_model().eval()
    prior, current = image_pair(64, 64)
    with torch.no_grad():
        assert not torch.allclose(model(prior, current), model(current, prior), atol=1e-3)


def test_hidden_pixels_do_not_influence_the_map():
    """Only the mask token stands where the mask is True, in the image that the channel names."""
    model = small_model().eval()
    prior, current = image_pair(64, 64)
    mask = torch.zeros(2, 2, 64, 64, dtype=torch.bool)
    mask[:, 1, :32, 32:] = True
    changed = torch.where(mask[:, 1:], 0.9, current)
    with torch.no_grad():
        expected = model(prior, torch.where(mask[:, 1:], model.mask_token.repeat(1, 1, 2, 2), current))
        assert torch.equal(model(prior, current, mask), expected)
        assert torch.equal(model(prior, changed, mask), expected)
        assert not torch.allclose(model(prior, current), expected)


def test_mask_tile_is_cut_at_the_edge_of_sizes_that_are_no_multiple_of_it():
    """A patch of 48 pixels covers a 64-pixel image once and a third of once more."""
    model = small_model(mask_patch_size=48)
    torch.nn.init.normal_(model.mask_token)
    tile, token = model.mask_tile(64, 32)[0, 0], model.mask_token[0, 0]
    assert torch.equal(tile[:48], token[:, :32]) and torch.equal(tile[48:], token[:16, :32])


def test_difference_attention_equals_its_formula():
    """Own value less what softmax attention finds in the other time, one head and one token at a time."""
    torch.manual_seed(0)
    layer = DifferenceAttention(128)
    tokens = torch.randn(2, 5, 128)                                               # one prior, one current
    x = layer.norm(tokens)
    query, key = layer.query_key(x).chunk(2, dim=2)
    value, expected = layer.value(x), torch.empty(2, 5, 128)
    for time in (0, 1):
        for head in (slice(0, 64), slice(64, 128)):
            for i in range(5):
                weights = (query[time, i, head] @ key[1 - time, :, head].T / 8).softmax(0)
                expected[time, i, head] = value[time, i, head] - weights @ value[1 - time, :, head]
    torch.testing.assert_close(layer(tokens), layer.project(expected))


def test_position_map_fits_any_grid():
    """At its own size the stored map is added as it is; a token's place changes its code elsewhere too."""
    torch.manual_seed(0)
    vit = ViT("tiny", in_channels=4, grid=4).eval()
    vit.layers = torch.nn.ModuleList()
    features = torch.randn(1, 4, 4, 4)
    expected = vit.norm((vit.embed(features) + vit.position).flatten(2).transpose(1, 2))
    torch.testing.assert_close(vit(features), expected)
    assert vit(torch.zeros(1, 4, 2, 6)).unique(dim=1).shape == (1, 12, 192)


def test_bfloat16_and_channels_last_give_the_same_map():
    """Precision and memory format are matters of speed alone."""
    model = small_model().eval()
    prior, current = image_pair(64, 64)
    with torch.no_grad():
        expected = model(prior, current)
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(prior, current), expected, rtol=1e-3, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(prior, current)
    assert output.dtype == torch.float32
    assert (output - expected).norm() < 0.1 * expected.norm()


def test_checkpointing_activations_changes_neither_gradients_nor_running_statistics():
    """Recomputation must not move the batch norms' averages a second time."""
    results = []
    for checkpointed in (False, True):
        model = small_model(drop=0.0, checkpoint_activations=checkpointed)
        model(*image_pair(64, 64)).square().mean().backward()
        results.append(({name: p.grad for name, p in model.named_parameters() if p.grad is not None},
                        {name: buffer for name, buffer in model.named_buffers() if "running" in name}))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("channels", "size", "stride"), [(6, 3, 1), (6, 3, 2), (6, 5, 1), (6, 5, 2)])
@pytest.mark.parametrize("shape", [(8, 8), (7, 10)])
def test_depthwise_gradients_equal_the_librarys_in_float32(channels, size, stride, shape):
    """The faster sums are the same sums; inputs hold few bits, so that bfloat16 rounds only the result."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randint(-4, 5, shape, generator=generator) / 4

    layer = DepthwiseConv2d(channels, size, stride)
    layer.weight.data = draw(*layer.weight.shape)
    x = draw(2, channels, *shape).requires_grad_()
    expected = F.conv2d(x, layer.weight, None, stride, size // 2, groups=channels)
    seed = draw(*expected.shape)
    expected_gradients = torch.autograd.grad(expected, (x, layer.weight), seed)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    gradients = torch.autograd.grad(output, (x, layer.weight), seed.bfloat16())
    torch.testing.assert_close(output.float(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("option", "word"), [("efficientnet", "b8"), ("vit", "huge")])
def test_unknown_words_name_their_constant(option, word):
    """The user learns which line of constants.py to change."""
    with pytest.raises(UserError, match=f"{option.upper()}.*{word}"):
        LongitudinalMIMModelBig(**SMALL | {option: word})


def test_a_size_not_divisible_by_32_is_refused():
    """Scales would not fit each other; the message says which constant to change."""
    with pytest.raises(UserError, match="IMG_SIZE"):
        small_model()(*image_pair(64, 80))
