"""Vista: MONAI's layouts by name, any size of image, and training that fits every strategy."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from monai.networks.nets import VISTA3D, SegResNet, SegResNetDS2
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from models.segresnet import CONV, InstanceNorm
from models.token_vit import TokenViT
from models.vista import ENCODERS, Vista, pad_to_multiple
from utils import distributed
from utils.checkpoint import load_backbone, save_checkpoint
from utils.config import UserError

SMALL = {"num_classes": 6, "embedding": 5, "head_width": 8}
FEATURES = {"vista3d": 4, "segresnet": 8, "token_vit": 4}
BOTH = [(dims, encoder) for dims in (2, 3) for encoder in ENCODERS]
ALL = [*BOTH, (3, "token_vit")]


def small_vista(dims=3, encoder="vista3d", seed=0, **options):
    torch.manual_seed(seed)
    if encoder == "token_vit":
        recompute = options.get("checkpoint_activations", False)
        options["vit"] = TokenViT("custom", 48, 2, 2, checkpoint_activations=recompute)
    return Vista(dims, encoder, **{"features": FEATURES.get(encoder), **SMALL, **options})


def image(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def monai_encoder(dims, encoder, seed=0):
    """MONAI's network of the layout, with scales and shifts of the norms that are no ones and zeros."""
    torch.manual_seed(seed)
    width = {"out_channels": FEATURES[encoder], "init_filters": FEATURES[encoder]}
    if encoder == "segresnet":
        peer = SegResNet(spatial_dims=dims, in_channels=1, **width)
    else:
        peer = SegResNetDS2(spatial_dims=dims, in_channels=1, **width, dsdepth=1,
                            blocks_down=(1, 2, 2, 4, 4), norm="instance")
    for parameter in peer.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return peer


@pytest.mark.parametrize("dims, encoder", BOTH)
def test_weights_of_monai_load_by_name_and_give_its_features(tmp_path, dims, encoder):
    """Published weights are of use only if no layer is left out, doubled or applied in another order."""
    peer = monai_encoder(dims, encoder)
    torch.save(peer.state_dict(), tmp_path / "weights.pt")
    ours = small_vista(dims, encoder).encoder
    _, unmatched = load_backbone(ours, tmp_path / "weights.pt")
    assert not unmatched
    n = ours.multiple
    for size in [(n, 2 * n, 3 * n), (2 * n, n, 5 * n), (n, 3 * n, 2 * n)]:
        x = image(2, 1, *size[-dims:])
        with torch.no_grad():
            theirs = peer(x)
            # Of the two branches VISTA3D's class head reads the second.
            theirs = theirs[1] if encoder == "vista3d" else theirs
            torch.testing.assert_close(ours(x), theirs, rtol=1e-4, atol=1e-4)


def test_a_vista3d_checkpoint_starts_the_encoder(tmp_path):
    """Its image encoder stands under a prefix, beside heads and a point branch that are not ours."""
    peer = VISTA3D(monai_encoder(3, "vista3d"), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    torch.save(peer.state_dict(), tmp_path / "model.pt")
    model = small_vista()
    matched, unmatched = load_backbone(model.encoder, tmp_path / "model.pt", remove_prefix="image_encoder")
    assert not unmatched and len(matched) == len(model.encoder.state_dict())
    x = image(1, 1, 16, 32, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(x), peer.image_encoder(x)[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_encoder_of_one_vista_starts_another_with_other_heads(tmp_path, encoder):
    """Pretraining on other classes and embeddings; the new heads stay as they were."""
    first = small_vista(2, encoder)
    second = small_vista(2, encoder, seed=1, num_classes=9, embedding=3)
    heads = [p.clone() for p in second.semantic.parameters()]
    save_checkpoint(tmp_path / "v.pt", kind="vista3d", model_state_dict=first.state_dict())
    _, unmatched = load_backbone(second.encoder, tmp_path / "v.pt", remove_prefix="encoder")
    assert not unmatched
    for name, value in first.encoder.state_dict().items():
        assert torch.equal(second.encoder.state_dict()[name], value), name
    assert all(torch.equal(old, new) for old, new in zip(heads, second.semantic.parameters(), strict=True))


@pytest.mark.parametrize("dims, encoder", ALL)
def test_images_of_any_size_keep_it(dims, encoder):
    """Thin volumes, odd sides and single voxels; in training too, where the deepest map is one voxel."""
    model = small_vista(dims, encoder).train()
    for size in [(1, 1, 1), (1, 16, 16), (3, 17, 9), (16, 16, 16), (5, 33, 20)]:
        output = model(image(1, 1, *size[-dims:]))
        assert output["semantic"].shape == (1, 6, *size[-dims:])
        assert output["embedding"].shape == (1, 5, *size[-dims:])
        assert all(value.isfinite().all() for value in output.values())


def test_padding_mirrors_the_image_and_keeps_the_image():
    """The network must see texture beyond the edge, not a step; a pad may exceed the image."""
    x = image(1, 1, 3, 1, 17)
    padded = pad_to_multiple(x, 16)
    assert padded.shape == (1, 1, 16, 16, 32)
    expected = F.pad(x[0, 0], (0, 15), mode="reflect")          # [3, 1, 32]
    assert torch.equal(padded[0, 0, :3, 0], expected[:, 0])
    assert torch.equal(padded[0, 0, :, 0, 0], x[0, 0, [0, 1, 2, 1] * 4, 0, 0])
    assert torch.equal(padded, padded[..., :1, :].expand(-1, -1, -1, 16, -1))
    same = image(1, 1, 16, 32, 16)
    assert pad_to_multiple(same, 16) is same


def test_an_image_is_answered_like_its_mirrored_continuation():
    """The answer to an image is that to its mirrored continuation, cut back before the heads."""
    model = small_vista(head_width=16).eval()
    x = image(1, 1, 16, 20, 32)
    whole = pad_to_multiple(x, 16)
    with torch.no_grad():
        features = model.encoder(whole)[..., :20, :]
        torch.testing.assert_close(model(x)["semantic"], model.semantic(features))


def test_instance_norm_is_torchs_and_leaves_the_shift_of_a_single_voxel():
    """nn.InstanceNorm3d refuses 1 x 1 x 1 in training; the formula gives the shift, and no gradient."""
    norm, peer = InstanceNorm(4), torch.nn.InstanceNorm3d(4, affine=True)
    with torch.no_grad():
        norm.weight.uniform_(), norm.bias.uniform_()
    peer.load_state_dict(norm.state_dict())
    x = image(2, 4, 3, 5, 2)
    torch.testing.assert_close(norm(x), peer(x))
    single = image(2, 4, 1, 1, 1).requires_grad_()
    torch.testing.assert_close(norm(single).flatten(1), norm.bias.expand(2, 4), rtol=0, atol=1e-4)
    assert not torch.autograd.grad(norm(single).square().sum(), single)[0].any()


def loss_of(output):
    return output["semantic"].square().mean() + output["embedding"].sin().mean()


@pytest.mark.parametrize("dims, encoder", ALL)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradient_reaches_every_parameter(dims, encoder, recompute):
    """DDP waits for every gradient; a branch that is built but not used would hang it."""
    model = small_vista(dims, encoder, checkpoint_activations=recompute)
    loss_of(model(image(1, 1, *(16, 32, 32)[-dims:]))).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


@pytest.mark.parametrize("dims, encoder", ALL)
def test_recomputing_activations_changes_memory_alone(dims, encoder):
    """Same output and gradients to the bit, and fewer bytes kept from forward to backward."""
    outputs, grads, kept = [], [], []
    for recompute in (False, True):
        model, saved = small_vista(dims, encoder, checkpoint_activations=recompute), {}

        def keep(x, saved=saved):
            saved[x.untyped_storage().data_ptr()] = x           # the same storage counts once
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = loss_of(model(image(1, 1, *(16, 32, 48)[-dims:])))
        loss.backward()
        outputs.append(loss.detach())
        grads.append([p.grad for p in model.parameters()])
        kept.append(sum(x.numel() for x in saved.values()) - sum(p.numel() for p in model.parameters()))
    assert torch.equal(*outputs)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert kept[1] < 0.6 * kept[0], kept


@pytest.mark.parametrize("dims, encoder", ALL)
def test_channels_last_and_bfloat16_give_the_same_answer(dims, encoder):
    """Training and inference use both for speed."""
    model, x = small_vista(dims, encoder).eval(), image(1, 1, *(16, 32, 19)[-dims:])
    layout = torch.channels_last if dims == 2 else torch.channels_last_3d
    with torch.no_grad():
        before = model(x)
        model = model.to(memory_format=layout)
        for name, value in model(x.to(memory_format=layout)).items():
            torch.testing.assert_close(value, before[name], rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            for name, value in model(x.to(memory_format=layout)).items():
                assert (value.float() - before[name]).norm() < 0.05 * before[name].norm()


def test_the_network_is_one_graph_for_the_compiler():
    """A break in the graph costs what COMPILE is to gain."""
    model, x = small_vista(2, checkpoint_activations=True), image(1, 1, 20, 32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected, output = model(x), compiled(x)
    for name, value in expected.items():
        torch.testing.assert_close(output[name], value)
    torch.compiler.reset()


@pytest.fixture
def one_rank(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("encoder", [*ENCODERS, "token_vit"])
@pytest.mark.parametrize("recompute", [False, True])
def test_sharded_blocks_gather_what_they_need(one_rank, encoder, recompute):
    """A sharded block called otherwise than as a module would meet parameters that are not gathered."""
    x = image(1, 1, 16, 16, 20)
    plain, sharded = (small_vista(encoder=encoder, checkpoint_activations=recompute) for _ in range(2))
    blocks = list(distributed._blocks(sharded, distributed._size(sharded) / 100))
    assert len(blocks) > 5
    for block in [*blocks, sharded]:
        fully_shard(block, mesh=one_rank, reshard_after_forward=True)
    for model in (plain, sharded):
        loss_of(model(x)).backward()
    for (name, p), q in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(q.grad.full_tensor(), p.grad, msg=name)


def test_training_lowers_the_loss_of_both_heads():
    """Both heads learn from the shared features: a few steps on one small image."""
    model, x = small_vista(2, head_width=16), image(1, 1, 16, 32)
    target = (F.avg_pool2d(x, 5, 1, 2)[:, 0] > 0.5).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        output = model(x)
        terms = (F.cross_entropy(output["semantic"], target),
                 (output["embedding"][:, 0] - target).square().mean())
        losses.append([term.item() for term in terms])
        optimizer.zero_grad()
        sum(terms).backward()
        optimizer.step()
    assert losses[-1][0] < 0.6 * losses[0][0] and losses[-1][1] < 0.6 * losses[0][1], losses


def test_settings_that_do_not_exist_are_refused():
    """One line that names the constant."""
    for words, name in [({"encoder": "unet"}, "VISTA_ENCODER.*vista3d, segresnet"),
                        ({"head_width": 12}, "VISTA_HEAD_WIDTH is 12"),
                        ({"encoder": "segresnet", "features": 12}, "VISTA_FEATURES")]:
        with pytest.raises(UserError, match=name):
            small_vista(**words)
    small_vista(features=6)                                     # the instance norm of "vista3d" takes any
    with pytest.raises(UserError, match="4 axes.*VISTA_SLICES"):
        small_vista(2)(image(1, 1, 16, 16, 16))


def test_bfloat16_gradients_are_right_for_two_sections():
    """oneDNN leaves the gradient of a convolution over two sections partly unwritten: NaN, now and then."""
    torch.manual_seed(0)
    layer = CONV[3](64, 64, 3, padding=1, bias=False)
    image, slope = torch.randn(2, 1, 64, 2, 6, 6)
    layer(image).backward(slope)
    exact, layer.weight.grad = layer.weight.grad, None
    stale = torch.full((2 * exact.numel(),), torch.nan)            # what the unwritten memory may hold
    del stale
    with torch.autocast("cpu", torch.bfloat16):
        features = layer(image)
    features.backward(slope.to(features.dtype))
    assert (layer.weight.grad - exact).norm() < 0.02 * exact.norm()
