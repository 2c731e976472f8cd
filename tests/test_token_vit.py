"""The transformer over packed series of tokens."""

import math
from itertools import pairwise

import pytest
import torch

from models.ragged_attention import Sequences
from models.token_vit import SIZES, Block, TokenViT, drop_path, position_code
from utils.config import UserError

SMALL = {"size": "custom", "dim": 48, "depth": 3, "heads": 3, "mlp_ratio": 2.0}
LENGTHS = (7, 4, 0, 9)


def build(seed=0, **options):
    """A small transformer whose branches count for as much as the residual stream."""
    torch.manual_seed(seed)
    model = TokenViT(**SMALL | options)
    for block in model.blocks:
        for layer in (block.attention.qkv, block.attention.project, block.fc1, block.fc2):
            torch.nn.init.normal_(layer.weight, std=0.15)
    return model


def batch(lengths=LENGTHS, seed=0):
    """(tokens [T, 1024], coords [T, 3], cu_seqlens [S + 1])."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(sum(lengths), 1024, generator=generator)
    coords = torch.randint(0, 20, (sum(lengths), 3), generator=generator)
    return tokens, coords, torch.tensor([0, *lengths]).cumsum(0).int()


def gradients(model, seed=0):
    torch.manual_seed(seed)
    model(*batch()).square().sum(1).sqrt().sin().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"position": "add"}, {"size": "tiny"}])
def test_features_have_the_width_and_gradient_reaches_every_parameter(options):
    """Two sizes and both ways to give the position."""
    model = build(**options)
    assert model(*batch()).shape == (20, model.dim)
    assert not [name for name, grad in gradients(model).items() if grad is None or not grad.any()]


@pytest.mark.parametrize("position", ["concat", "add"])
def test_a_series_in_a_batch_has_the_features_that_it_has_alone(position):
    """Packing is a matter of speed: nothing of one series reaches another."""
    model = build(position=position)
    tokens, coords, cu = batch()
    with torch.no_grad():
        packed = model(tokens, coords, cu)
        alone = [model(tokens[a:b], coords[a:b], torch.tensor([0, b - a])) for a, b in pairwise(cu.tolist())]
        torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-6)
        tokens[:7] += 1
        changed = model(tokens, coords, cu)
    torch.testing.assert_close(changed[7:], packed[7:], rtol=0, atol=1e-6)
    assert not torch.allclose(changed[:7], packed[:7], atol=1e-2)


@pytest.mark.parametrize("dim", [30, 48, 64])
def test_position_code_equals_its_formula(dim):
    """Sines, then cosines, of each axis with base 10000; also past any grid of the cache."""
    coords = torch.tensor([[0, 0, 0], [1, 2, 3], [127, 191, 191], [500, 0, 1000]])
    counts = {30: (5, 5, 5), 48: (8, 8, 8), 64: (11, 11, 10)}[dim]
    expected = [[function(place / 10000 ** (i / count)) for place, count in zip(row, counts, strict=True)
                 for function in (math.sin, math.cos) for i in range(count)] for row in coords.tolist()]
    torch.testing.assert_close(position_code(coords, dim), torch.tensor(expected), rtol=0, atol=1e-4)


def test_no_two_places_share_a_code():
    """The whole grid of a large volume: 128 x 192 x 192 voxels are 32 x 12 x 12 tokens, and more."""
    coords = torch.cartesian_prod(torch.arange(32), torch.arange(24), torch.arange(24))
    code = (position_code(coords, 30) * 1e4).round()
    assert len(code.unique(dim=0)) == len(coords)


def test_position_is_appended_or_added():
    """Before the first block an embedding holds exactly these parts."""
    tokens, coords, cu = batch()
    for position in ("concat", "add"):
        model = build(position=position, depth=0)
        parts = model.embed(tokens), position_code(coords, 30 if position == "concat" else 48)
        expected = torch.cat(parts, 1) if position == "concat" else sum(parts)
        torch.testing.assert_close(model(tokens, coords, cu), model.norm(expected))


def test_block_equals_the_librarys_pre_norm_layer():
    """torch's TransformerEncoderLayer with norm_first computes the same from the same weights."""
    torch.manual_seed(0)
    block = Block(48, 3, layer=1, mlp_ratio=2.0)
    peer = torch.nn.TransformerEncoderLayer(48, 3, 96, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
    names = {"self_attn.in_proj_": "attention.qkv.", "self_attn.out_proj.": "attention.project.",
             "linear1.": "fc1.", "linear2.": "fc2."}
    own = dict(block.named_parameters())
    for name, parameter in peer.named_parameters():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if name == "attention.project.bias":                                          # ours has none
            torch.nn.init.zeros_(parameter)
        else:
            torch.nn.init.normal_(own[name], std=0.2)
            parameter.data.copy_(own[name])
    x = torch.randn(9, 48)
    torch.testing.assert_close(block(x, Sequences(torch.tensor([0, 9]), "cpu")), peer(x[None])[0])


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3, "drop_path": 0.3}])
def test_checkpointing_activations_changes_no_gradient(options):
    """The recomputation draws the same dropout, and saves memory rather than results."""
    results = [gradients(build(checkpoint_activations=recompute, **options)) for recompute in (False, True)]
    torch.testing.assert_close(*results)


def test_checkpointing_computes_each_block_twice_in_training_alone():
    """Otherwise the option would do nothing."""
    for recompute, runs in ((False, 1), (True, 2)):
        model, calls = build(checkpoint_activations=recompute), []
        model.blocks[0].attention.qkv.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        gradients(model)
        assert len(calls) == runs
        model.eval()(*batch())
        assert len(calls) == runs + 1


@pytest.mark.parametrize("option", ["dropout", "drop_path"])
def test_dropout_acts_in_training_alone(option):
    """Two passes in training differ; in evaluation the rate changes nothing."""
    model = build(**{option: 0.5})
    assert not torch.allclose(model(*batch()), model(*batch()))
    torch.testing.assert_close(model.eval()(*batch()), build()(*batch()))


def test_drop_path_drops_a_branch_for_whole_series():
    """Dropped for single tokens it would be another dropout; what stays is scaled to keep the mean."""
    torch.manual_seed(0)
    lengths = torch.randint(1, 5, (2000,))
    sequences = Sequences(torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(), "cpu")
    branch = drop_path(torch.ones(int(lengths.sum()), 2), 0.25, sequences)
    kept = torch.stack([part[0, 0] for part in branch.split(lengths.tolist())])
    assert torch.equal(branch, torch.repeat_interleave(kept, lengths)[:, None].expand(-1, 2))
    assert sorted(set(kept.tolist())) == pytest.approx([0, 4 / 3])
    assert kept.mean().item() == pytest.approx(1, abs=0.05)


def test_drop_path_grows_to_its_rate_at_the_last_block():
    """Early layers matter to all that follow."""
    assert [block.drop_path for block in build(drop_path=0.3).blocks] == pytest.approx([0.1, 0.2, 0.3])


def test_branches_start_smaller_with_depth():
    """The residual stream would grow with the number of blocks."""
    torch.manual_seed(0)
    for number, block in enumerate(TokenViT("tiny").blocks, 1):
        for layer, std in ((block.attention.qkv, 0.02), (block.fc1, 0.02),
                           (block.attention.project, 0.02 / math.sqrt(2 * number)),
                           (block.fc2, 0.02 / math.sqrt(2 * number))):
            assert layer.weight.std().item() == pytest.approx(std, rel=0.03)
        assert block.attention.project.bias is None and not block.attention.qkv.bias.any()


@pytest.mark.parametrize("size", SIZES)
def test_named_sizes_are_the_papers(size):
    """Width, blocks and heads of 64 (huge: 80); the code takes 30 dimensions of the embedding."""
    with torch.device("meta"):
        model = TokenViT(size)
    width, depth, heads = SIZES[size]
    assert model.embed.weight.shape == (width - 30, 1024) and len(model.blocks) == depth
    assert model.blocks[0].attention.heads == heads and width // heads == (80 if size == "huge" else 64)
    assert model.blocks[0].fc1.weight.shape == (4 * width, width)


def test_bfloat16_gives_nearly_the_same_features_in_float32():
    """Residual stream and norms stay in float32 under autocast."""
    model = build()
    with torch.no_grad():
        expected = model(*batch())
        with torch.autocast("cpu", torch.bfloat16):
            output = model(*batch())
    assert output.dtype == torch.float32
    assert (output - expected).norm() < 0.02 * expected.norm()


def test_compiled_model_computes_the_same_for_any_batch():
    """Lengths differ from batch to batch and are read on the host."""
    model = build()
    compiled = torch.compile(model, backend="eager")
    for lengths in ((7, 4), (3, 8, 2), (9,)):
        torch.testing.assert_close(compiled(*batch(lengths)), model(*batch(lengths)))


@pytest.mark.parametrize(("options", "message"), [
    ({"size": "giant"}, "STUDY_VIT is"), ({"dim": 30, "heads": 3}, "STUDY_VIT_DIM = 30"),
    ({"dim": 50}, "STUDY_VIT_DIM = 50"), ({"heads": 0}, "STUDY_VIT_DIM = 48"),
    ({"dim": 45, "position": "add"}, "STUDY_VIT_DIM = 45"), ({"position": "learned"}, "STUDY_POSITION"),
    ({"attention": "flash"}, "STUDY_ATTENTION"), ({"dropout": 1.0}, "STUDY_DROPOUT"),
    ({"drop_path": -0.1}, "STUDY_DROP_PATH")])
def test_options_that_cannot_work_name_their_constant(options, message):
    """Before any data is read."""
    with pytest.raises(UserError, match=message):
        TokenViT(**SMALL | options)
