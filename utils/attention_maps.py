"""Where a study classifier looked: attention as a volume, in the space of the source, and as a picture."""

import re

import matplotlib
import nibabel
import numpy as np
import torch
from nibabel.processing import resample_from_to
from PIL import Image, ImageDraw, ImageFont

from datasets.cache import load_image
from datasets.tokens import TOKEN, untokenize
from utils.overlay import CAPTION_HEIGHT, grey, panel_factor, row, stack, zoom

STRONGEST = 0.6                 # opacity of the token with the most attention
COLUMNS = 4                     # panels side by side


def token_map(attention, coords, size):
    """Spread each token's attention over its 4 x 16 x 16 voxels.

    attention [N], coords int [N, 3] token indices (d, h, w), size (d, h, w) in tokens; tensors or arrays.
    Returns float32 array [D, H, W] = 4 d, 16 h, 16 w.  Zero where no token is; tokens at the same place,
    as of the three windows of a CT, add up.
    """
    attention, coords = (torch.as_tensor(x).detach().cpu() for x in (attention, coords))
    grid = np.zeros(tuple(map(int, size)), np.float32)
    np.add.at(grid, tuple(coords.numpy().T), attention.float().numpy())
    return np.kron(grid, np.ones(TOKEN, np.float32))


def token_volume(tokens, coords, size):
    """The picture that tokens make: uint8 [D, H, W], from their least value to their greatest.

    tokens float [N, 1024], coords int [N, 3], size (d, h, w) in tokens; tensors.  Zero where no token is.
    """
    d, h, w = map(int, size)
    places = (coords[:, 0] * h + coords[:, 1]) * w + coords[:, 2]
    low, high = tokens.min(), tokens.max()
    grid = torch.zeros(d * h * w, tokens.shape[1], dtype=torch.uint8)
    grid[places] = ((tokens - low) / (high - low).clamp(min=1e-12) * 255).round().byte()
    return untokenize(grid, (d, h, w)).numpy()


def to_source_space(values, affine, source_shape, source_affine):
    """A map of the cached grid, resampled (linear) to the voxels of the file that the series came from.

    values float32 [D, H, W]; affine [4, 4]: index (d, h, w) -> mm, RAS+; source_shape (x, y, z) and
    source_affine [4, 4]: of the source.  Returns a float32 Nifti1Image that any viewer lays over the source;
    zero outside the cached grid.
    """
    # "constant" would end at the centres of the outermost voxels and so cut 2 mm off the outermost slices.
    image = nibabel.Nifti1Image(np.asarray(values, np.float32), np.asarray(affine, np.float64))
    source = tuple(map(int, source_shape)), np.asarray(source_affine, np.float64)
    return resample_from_to(image, source, order=1, mode="grid-constant", cval=0.0)


def attention_sheet(path, volume, attention, count, title):
    """Write a PNG of the ``count`` most attended slices, in order of position, under the attention in colour.

    title: a line above them, over one that says what the colour means.
    volume uint8 [D, H, W]; attention [D, H, W] >= 0 as ``token_map`` gives it.  Slices of one layer
    of tokens have the same attention, so its middle slice stands for them.  The colour is the more opaque the
    more attention a token has; a caption says the slice and the layer's share of the map's attention.
    """
    attention = np.asarray(attention, np.float32)
    middles = np.arange(TOKEN[0] // 2, len(volume), TOKEN[0])
    weights = attention[middles].sum((1, 2), dtype=np.float64)
    shares = weights / max(weights.sum(), np.finfo(np.float64).tiny)
    peak = max(attention.max(), np.finfo(np.float32).tiny)
    shown = np.sort(np.argsort(-shares, kind="stable")[:count])
    panels = [heat(volume[middles[i]], attention[middles[i]] / peak) for i in shown]
    captions = [f"slice {middles[i] + 1} of {len(volume)}: {shares[i]:.1%} of the attention" for i in shown]
    strips = [row(panels[i:i + COLUMNS], captions[i:i + COLUMNS]) for i in range(0, len(panels), COLUMNS)]
    sheet = stack(strips)
    heads = [heading(text, sheet.shape[1]) for text in (title, "the more yellow, the more attention")]
    Image.fromarray(np.concatenate([*heads, sheet])).save(path)


def heat(image, strength):
    """A panel: slice uint8 [H, W] under the colours of strength [H, W] in [0, 1], opaque where strong."""
    factor = panel_factor(image.shape)
    picture = zoom(grey(torch.tensor(image) / 255), factor)
    strength = np.asarray(Image.fromarray(strength).resize(picture.shape[1::-1], Image.Resampling.BILINEAR))
    colours = 255 * matplotlib.colormaps["inferno"](0.3 + 0.7 * strength)[..., :3]
    alpha = STRONGEST * strength[..., None]
    return np.rint((1 - alpha) * picture + alpha * colours).astype(np.uint8)


def heading(text, width):
    """A line of text on black, uint8 [CAPTION_HEIGHT, width, 3]."""
    canvas = Image.new("RGB", (width, CAPTION_HEIGHT))
    ImageDraw.Draw(canvas).text((4, 3), text, fill="white", font=ImageFont.load_default(size=14))
    return np.asarray(canvas)


def draw_attention(path, rows):
    """Where a network looked in the first series: the mean over its heads of attention.

    rows: pairs of a batch of datasets.studies.ragged_collate and its attention [T, heads].
    """
    batch, attention = rows[0]
    end, size = int(batch["cu_seqlens"][1]), batch["size"][0].tolist()
    tokens, coords, shares = (values[:end].cpu() for values in (batch["tokens"], batch["coords"], attention))
    attention_sheet(path, token_volume(tokens, coords, size), token_map(shares.mean(1), coords, size), 4,
                    batch["series"][0])


def write_attention(folder, dataset, batch, attention, names):
    """Maps and pictures of one study.  attention [T, C or 1]: shares of the study, each column's sum is 1.

    The maps are in units of the average token's attention.  A CT's windows share one map per head.
    """
    folder.mkdir(parents=True, exist_ok=True)
    attention = attention.cpu() * len(attention)
    heads = [f"_{re.sub(r'[^A-Za-z0-9.-]', '-', name)}" for name in names]
    heads = heads if attention.shape[1] > 1 else [""]
    entries = [dataset.entries[index] for index in reversed(dataset.members[batch["study"][0]])]
    images = {f"{series.study}/{series.name}": (series, modes) for series, modes in entries}
    ends = batch["cu_seqlens"][1:-1].cpu().long()
    coords, shares = (values.cpu().tensor_split(ends) for values in (batch["coords"], attention))
    for name in dict.fromkeys(batch["series"]):
        series, modes = images[name]
        parts = [i for i, each in enumerate(batch["series"]) if each == name]
        volume = load_image(series, modes[0]).numpy()
        for column, head in enumerate(heads):
            values = token_map(torch.cat([shares[i][:, column] for i in parts]),
                               torch.cat([coords[i] for i in parts]), batch["size"][parts[0]].tolist())
            image = to_source_space(values, series.affine, series.source_shape, series.source_affine)
            image.to_filename(folder / f"{series.name}{head}.nii.gz")
            title = f"{name}, finding: {head[1:]}" if head else name
            attention_sheet(folder / f"{series.name}{head}.png", volume, values, 4, title)
