"""The patch discriminator."""

import pytest
import torch

from models.patch_gan import PatchDiscriminator


@pytest.mark.parametrize(("size", "patches"), [((64, 64), (6, 6)), ((32, 96), (2, 10))])
def test_one_logit_per_patch_at_batch_one(size, patches):
    """Stride 8, and two kernels of 4 without stride that take one row each."""
    assert PatchDiscriminator(width=8)(torch.rand(1, 3, *size)).shape == (1, 1, *patches)


def test_a_logit_sees_70_pixels():
    """Receptive field of the paper's default discriminator: without norms, the gradient is zero outside."""
    model = PatchDiscriminator(width=8)
    for i, layer in enumerate(model.layers):
        if isinstance(layer, torch.nn.GroupNorm):
            model.layers[i] = torch.nn.Identity()
        elif isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.constant_(layer.weight, 0.01)
    pairs = torch.rand(1, 3, 160, 160, requires_grad=True)
    model(pairs)[0, 0, 9, 9].backward()
    rows, columns = pairs.grad[0].any(0).nonzero().T
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == 70


def test_gradient_reaches_every_parameter_and_all_three_inputs():
    """The generator learns through the map, and the pair of images conditions the judgement."""
    model = PatchDiscriminator(width=8)
    pairs = torch.rand(2, 3, 64, 64, requires_grad=True)
    model(pairs).square().mean().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
    assert pairs.grad.flatten(2).any(2).all()


def test_bfloat16_gives_float32_logits():
    """The loss of the logits is computed in float32."""
    with torch.autocast("cpu", torch.bfloat16):
        assert PatchDiscriminator(width=8)(torch.rand(1, 3, 64, 64)).dtype == torch.float32
