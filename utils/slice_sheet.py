"""Pictures of slices with true and predicted masks over them."""

from PIL import Image

from utils.em_pictures import array, colours, panel
from utils.mask_metrics import predict_masks
from utils.overlay import row, shortened, stack


def slice_sheet(path, rows):
    """Write a PNG with a row for each of ``rows``: the slice, and its true and predicted mask over it.

    Each row is (caption, image [H, W] in [0, 1]), with masks also true and predicted, integers [H, W], as
    tensors or arrays.  0 is background; unknown pixels, below 0, stay clear.  Long captions lose their
    beginning.
    """
    strips = []
    for caption, image, *masks in rows:
        image, *masks = array(image), *(array(mask).clip(0) for mask in masks)
        panels = [panel(image, labels, colours) for labels in (image, *masks)]
        strips.append(row(panels, [shortened(caption), "true", "predicted"]))
    Image.fromarray(stack(strips)).save(path)


def slice_rows(batch, outputs, names, mask_names, threshold=0.5):
    """Rows of ``slice_sheet`` of a batch of SliceDataset; outputs: see slice_nets.named_outputs.

    names: of the classes; mask_names, threshold: see mask_metrics.predict_masks.
    """
    captions, columns = batch["case"], [batch["image"][:, 0]]
    if "labels" in outputs:
        shares, chosen = outputs["labels"].float().softmax(1).max(1)
        words = [*names, "unknown"]                          # -1 is the last
        captions = [f"{words[label]}: {names[choice]} {share:.2f}" for label, choice, share in
                    zip(batch["label"].tolist(), chosen.tolist(), shares.tolist(), strict=True)]
    if "masks" in outputs:
        columns += [batch["mask"], predict_masks(outputs["masks"].float(), len(mask_names), threshold)]
    return list(zip(captions, *columns, strict=True))
