"""Seconds of a Vol-JEPA step on series of 200 to 900 tokens: packed, against the same network padded.

    python benchmarks/ragged_attention.py --n 5

ours    packed tokens, attention within each series by models/ragged_attention.py
peer    the same weights on [series, most tokens, width] with scaled_dot_product_attention and a key mask

A step is ViT-Small as teacher and student, a predictor of 4 layers, smooth L1 and backward; both sides
compute in the same precision.  Each round draws new lengths.  First the gradients must agree in float32.
"""

import argparse
import copy
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).parents[1]))

from losses.jepa import jepa_loss
from models.jepa import Predictor, VolJEPA, teacher_targets
from models.token_vit import CODE, TokenViT, position_code
from utils.device import autocast

SERIES, SHORTEST, LONGEST, CONTEXT_SHARE = 8, 200, 900, 0.2


def draw_batch(seed):
    """(tokens [T, 1024], coords [T, 3], context bool [T], cu_seqlens): every token context or target."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (SERIES,), generator=generator)
    total = int(lengths.sum())
    tokens = torch.randn(total, 1024, generator=generator)
    coords = torch.randint(0, 20, (total, 3), generator=generator)
    context = torch.rand(total, generator=generator) < CONTEXT_SHARE
    return tokens, coords, context, F.pad(lengths.cumsum(0), (1, 0)).int()


def our_step(model, teacher, batch, precision):
    """Forward, loss and backward on packed tokens."""
    tokens, coords, context, cu = batch
    with autocast(tokens.device, precision):
        target = teacher_targets(teacher, tokens, coords, torch.ones_like(context), ~context, cu)
        pred = model(tokens, coords, context, ~context, cu)
    jepa_loss(pred, target).backward()


def pad(batch, keep):
    """(tokens [S, N, 1024], coords [S, N, 3], real bool [S, N]) of the kept tokens."""
    tokens, coords, _, cu = batch
    rows = [torch.arange(a, b)[keep[a:b]] for a, b in pairwise(cu.tolist())]
    padded = (pad_sequence([x[row] for row in rows], batch_first=True) for x in (tokens, coords))
    return *padded, pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)


def padded_code(coords):
    """Position code of [S, N, 3] -> [S, N, 30]."""
    return position_code(coords.flatten(0, 1), CODE).unflatten(0, coords.shape[:2])


def padded_blocks(blocks, x, real):
    """The blocks' layers on [S, N, E] with a key mask."""
    for block in blocks:
        qkv = block.attention.qkv(block.norm1(x)).unflatten(2, (3, block.attention.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                         # [S, heads, N, Dh]
        found = F.scaled_dot_product_attention(q, k, v, real[:, None, None])
        x = x + block.attention.project(found.transpose(1, 2).flatten(2))
        x = x + block.fc2(F.gelu(block.fc1(block.norm2(x))))
    return x


def padded_vit(vit, tokens, coords, real):
    """TokenViT on padded tokens -> [S, N, E]."""
    x = torch.cat([vit.embed(tokens), padded_code(coords)], 2)
    return vit.norm(padded_blocks(vit.blocks, x, real))


def peer_step(model, teacher, batches, precision):
    """The same step on padded tokens; batches: (all tokens, context, targets), padded by the loader."""
    (tokens, coords, real, is_target), (*context, seen), (_, target_coords, asked) = batches
    with autocast(tokens.device, precision):
        with torch.no_grad():
            target = padded_vit(teacher, tokens, coords, real)[is_target].float()    # [Tt, E]
            target = F.layer_norm(target, target.shape[1:])
        features = padded_vit(model.encoder, *context, seen)
        predictor = model.predictor
        mask_tokens = predictor.mask_token.expand(*asked.shape, -1)
        x = torch.cat([torch.cat([features, mask_tokens], 1),
                       padded_code(torch.cat([context[1], target_coords], 1))], 2)
        x = padded_blocks(predictor.blocks, predictor.embed(x), torch.cat([seen, asked], 1))
        pred = predictor.head(predictor.norm(x[:, seen.shape[1]:][asked]))           # [Tt, E]
    jepa_loss(pred, target).backward()


def pad_all(batch):
    """What peer_step takes: padding is the loader's work and is not timed."""
    context = batch[2]
    is_target = pad_sequence([(~context)[a:b] for a, b in pairwise(batch[3].tolist())], batch_first=True)
    return (*pad(batch, torch.ones_like(context)), is_target), pad(batch, context), pad(batch, ~context)


def timed(step, model, *args):
    """(seconds, gradients) of one step."""
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    step(model, *args)
    return time.perf_counter() - start, [parameter.grad for parameter in model.parameters()]


def relative_error(ours, theirs):
    """Norm of the difference of two lists of tensors over the norm of the second."""
    difference = sum((a - b).square().sum() for a, b in zip(ours, theirs, strict=True))
    return (difference / sum(b.square().sum() for b in theirs)).sqrt().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument("--dtype", default="bf16", help="bf16 | fp16 | fp32 (default: %(default)s)")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = VolJEPA(TokenViT("small"), Predictor(384, dim=512, depth=4, heads=8))
    teacher = copy.deepcopy(model.encoder).eval()

    batch = draw_batch(seed=0)
    padded = pad_all(batch)
    ours = timed(our_step, model, teacher, batch, "fp32")[1]
    theirs = timed(peer_step, model, teacher, padded, "fp32")[1]
    error = relative_error(ours, theirs)
    print(f"relative error of the gradients in fp32: {error:.1e}", flush=True)
    assert error < 1e-4, error

    seconds, waste = {"ours": [], "peer": []}, []
    for i in range(args.n + 1):                                            # the first round warms up
        batch = draw_batch(seed=i)
        padded = pad_all(batch)
        calls = {"ours": (our_step, batch), "peer": (peer_step, padded)}
        for name in sorted(calls, reverse=i % 2 == 1):
            step, data = calls[name]
            elapsed, _ = timed(step, model, teacher, data, args.dtype)
            seconds[name] += [elapsed] if i else []
            print(f"round {i} {name} {elapsed:5.2f} s", flush=True)
        waste += [padded[0][2].numel() / len(batch[0])] if i else []
    mine, peer = (statistics.median(seconds[name]) for name in ("ours", "peer"))
    ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["peer"], strict=True))
    print(f"{args.dtype}: ours {mine:.2f} s, peer {peer:.2f} s per step")
    print(f"padding waste (padded / real tokens): {statistics.median(waste):.2f}, "
          f"{min(waste):.2f} to {max(waste):.2f}")
    print(f"ratio: {ratio:.2f} (peer / ours, median of {args.n})")


if __name__ == "__main__":
    main()
