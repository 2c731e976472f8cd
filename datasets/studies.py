"""Brain studies as sequences of tokens: the dataset of cached series, its batches, the splits by study."""

from itertools import chain

import torch
from torch.utils.data import Dataset

from datasets.cache import load_image, load_mask
from datasets.intensity import MODES, augment_intensity, normalise
from datasets.labels import STUDY_COLUMNS
from datasets.samplers import check_on_bad_file, first_readable, item_generator
from datasets.splits import SPLITS, read_table, split_groups
from datasets.tokens import crop_tokens, cut_tokens, draw_orientation, grid_size, token_background, whole
from utils.config import BadFile, UserError

WINDOWS = ("sample", "all")
UPRIGHT = [False, False, False], False               # no flips, no swap


def split_studies(studies, val_fraction, test_fraction, csv=None, patients=None):
    """Divide studies -> dict of lists "train", "val", "test"; no patient is ever in two.

    By a hash of the patient's name, so that one stays where it is when others are added; or as the file
    ``csv``, with the columns study_id (or study) or patient, and split, says.  patients: see read_patients.
    Raises UserError when fractions or the file make no sense, or patients are too few.
    """
    patient_of, members = read_patients(patients, [study.name for study in studies]), {}
    for name, patient in patient_of.items():
        members.setdefault(patient, []).append(name)
    names = dict.fromkeys(STUDY_COLUMNS, members)
    what = f"{len(studies)} studies"
    if patients:
        names = {"patient": {patient: [patient] for patient in members}, **names}
        what += f" of {len(members)} patients"
    split_of = split_groups(names, val_fraction, test_fraction, csv, what, "STUDY_")
    return {split: [study for study in studies if split_of[patient_of[study.name]] == split]
            for split in SPLITS}


def read_patients(path, names):
    """{study: patient} for the ``names`` of studies.

    path: a CSV with the columns study_id (or study) and patient; None or "": each study is a patient of its
    own.  Raises UserError when the file lacks a column, or a study.
    """
    if not path:
        return {name: name for name in names}
    rows = read_table(path, "STUDY_PATIENTS")
    key = next((column for column in STUDY_COLUMNS if rows and column in rows[0][1]), None)
    if key is None or "patient" not in rows[0][1]:
        raise UserError(f"STUDY_PATIENTS {path}: needs rows, and the columns study_id and patient")
    patients = {row[key]: row["patient"] for _, row in rows}
    absent = [name for name in names if not patients.get(name)]
    if absent:
        raise UserError(f"STUDY_PATIENTS {path}: has no patient for study {absent[0]} ({len(absent)} in all)")
    return {name: patients[name] for name in names}


class StudyDataset(Dataset):
    """Series of studies as tokens; the same item for the same (seed, epoch, index), wherever it is made.

    Item: dict of
        tokens      float32 [N, 1024], normalised
        coords      int64 [N, 3], index (d, h, w) of each token in the grid of the whole volume as it lies
                    after flips and swap: a crop keeps its place
        foreground  bool [N], True = no background voxel in the token
        mode        int, place in intensity.MODES of the image that was read
        size        int64 [3], that grid's sides in tokens
        series      str, "study/name"; study: str, its study
        bad_files   str, messages of files skipped to make this item, joined by ";" (normally empty)
        context, target  bool [N], what the networks of JEPA see and predict; only with ``mask``
        labels      float32 [L] of the study, NaN = missing; only with ``labels``
    studies: as cache.read_cache gives them.
    windows: "sample", an item per series: of a CT one window is drawn by ``window_probabilities`` (brain,
    blood, bone) among those it has, in validation the first.  "all", an item per image, for whole studies.
    Training only (``train``): random_crop, at most max_crop_size tokens along D, H, W; spatial_augment, flips
    and the swap of H and W; patch_drop_rate, the share of foreground tokens left out at random; gamma,
    brightness, contrast, noise, the limits of intensity.augment_intensity.
    remove_background: leave out background tokens.  mask: block_mask.VolumeBlockMask.  labels: labels.Labels.
    on_bad_file: "stop" raises BadFile; with "skip" the next readable image stands in, of the same study if it
    has one.  An image without any foreground token is a bad file.
    Raises UserError for arguments that make no sense, and when every image is unreadable.
    """

    def __init__(self, studies, train, *, windows="sample", window_probabilities=(0.7, 0.15, 0.15),
                 random_crop=True, max_crop_size=(20, 20, 20), spatial_augment=True, remove_background=True,
                 patch_drop_rate=0.0, gamma=0.0, brightness=0.0, contrast=0.0, noise=0.0,
                 mask=None, labels=None, seed=0, on_bad_file="stop"):
        if windows not in WINDOWS:
            raise ValueError(f'windows "{windows}" is not one of {", ".join(WINDOWS)}')
        self.entries = []                            # (series, the modes to choose from)
        for series in (series for study in studies for series in study.series):
            modes = sorted(series.images, key=MODES.index)
            self.entries += [(series, modes)] if windows == "sample" else [(series, [mode]) for mode in modes]
        if not self.entries:
            raise UserError("a dataset of no series: check --data and the splits")
        unlabelled = [study.name for study in studies if labels and study.name not in labels.values]
        if unlabelled:
            raise UserError(f"study {unlabelled[0]} has no labels; leave it out, as Labels.match does")
        check_arguments(window_probabilities, max_crop_size, patch_drop_rate)
        self.train, self.seed = train, seed
        self.probability = dict(zip(MODES, (1, *window_probabilities), strict=True))
        self.random_crop, self.max_crop_size = random_crop, max_crop_size
        self.spatial_augment, self.remove_background = spatial_augment, remove_background
        self.patch_drop_rate, self.amounts = patch_drop_rate, (gamma, brightness, contrast, noise)
        self.mask, self.labels, self.on_bad_file, self.epoch = mask, labels, check_on_bad_file(on_bad_file), 0
        self.members = {}                            # study -> its items
        for index, (series, _) in enumerate(self.entries):
            self.members.setdefault(series.study, []).append(index)

    def set_epoch(self, epoch):
        """Draw this epoch's windows, crops and masks from now on; before the loader starts its workers."""
        self.epoch = epoch

    def __len__(self):
        return len(self.entries)

    def groups(self):
        """The items of each study: a list of lists of indices, for StudyAwareBatchSampler."""
        return list(self.members.values())

    def __getitem__(self, index):
        index = range(len(self))[index]                                    # IndexError at the end
        generator = item_generator(self.seed, self.epoch, index)
        series, mode, image, foreground, bad_files = self.read_from(index, generator)
        tokens, coords, foreground, size = self.cut(image, foreground, generator)
        kept = self.keep(foreground, generator)
        tokens, coords, foreground = tokens[kept], coords[kept], foreground[kept]
        if self.train:
            tokens = augment_intensity(tokens, mode, generator, *self.amounts)
        else:
            tokens = normalise(tokens, mode)
        item = {"tokens": tokens, "coords": coords, "foreground": foreground, "mode": MODES.index(mode),
                "size": size, "series": f"{series.study}/{series.name}", "study": series.study,
                "bad_files": ";".join(bad_files)}
        if self.mask is not None:
            item["context"], item["target"] = self.mask(coords, foreground, item["mode"], generator)
        if self.labels is not None:
            item["labels"] = self.labels.values[series.study]
        return item

    def read_from(self, index, generator):
        """(series, mode, image, foreground, messages of images skipped) of the first readable image.

        The search begins at ``index``, goes through its study first, then through the items behind, cyclic.
        """
        own = self.members[self.entries[index][0].study]
        start = own.index(index)
        places = chain(own[start:], own[:start], range(own[-1] + 1, len(self)), range(own[0]))

        def read_entry(place):
            series, modes = self.entries[place]
            mode = self.choose(modes, generator)
            return series, mode, *read(series, mode)

        found, bad_files = first_readable(read_entry, places, self.on_bad_file, "images")
        return *found, bad_files

    def choose(self, modes, generator):
        """The mode to read: drawn by the probabilities in training, the first in validation."""
        if not self.train or len(modes) == 1:
            return modes[0]
        weights = torch.tensor([float(self.probability[mode]) for mode in modes])
        return modes[int(torch.multinomial(weights, 1, generator=generator))]

    def cut(self, image, foreground, generator):
        """tokens.cut_tokens of the image: a random crop, flipped and swapped; in validation as it is."""
        box, orientation = whole(foreground.shape), UPRIGHT
        if self.train and self.random_crop:
            box = crop_tokens(foreground, self.max_crop_size, generator)
        if self.train and self.spatial_augment:
            orientation = draw_orientation(generator)
        return cut_tokens(image, foreground, box, *orientation)

    def keep(self, foreground, generator):
        """bool [N]: tokens that stay; without background, and in training without the share to be dropped."""
        kept = foreground.clone() if self.remove_background else torch.ones_like(foreground)
        if self.train and self.patch_drop_rate > 0:
            places = foreground.nonzero().flatten()
            order = torch.randperm(len(places), generator=generator)
            kept[places[order[:int(self.patch_drop_rate * len(places))]]] = False         # never all
        return kept


def check_arguments(window_probabilities, max_crop_size, patch_drop_rate):
    """Raise UserError for values that make no sense."""
    if len(window_probabilities) != 3 or min(window_probabilities) < 0 or sum(window_probabilities) <= 0:
        raise UserError(f"STUDY_WINDOW_PROBABILITIES = {list(window_probabilities)}: must be three numbers, "
                        "for brain, blood and bone; none negative, not all 0")
    if len(max_crop_size) != 3 or min(max_crop_size) < 1:
        raise UserError(f"STUDY_MAX_CROP = {list(max_crop_size)}: must be three numbers, 1 at least")
    if not 0 <= patch_drop_rate < 1:
        raise UserError(f"a patch drop rate of {patch_drop_rate}: must be 0 at least and below 1")


def read(series, mode):
    """(image uint8 [D, H, W], foreground bool [d, h, w]) of a cached series.  Raises BadFile."""
    image, background = load_image(series, mode), token_background(load_mask(series))
    if background.all():
        raise BadFile(f"{series.folder / series.name}: no token without background")
    return image, ~background.view(grid_size(image.shape))


def ragged_collate(items):
    """Items of a StudyDataset as one batch of S series of B studies, T tokens without padding.  A dict of

        tokens, coords, foreground, context, target   as in the items, one behind the other, [T, ...]
        mode, size            int64 [S], [S, 3]
        cu_seqlens            int32 [S + 1], where each series begins in the tokens; the last is T
        study_cu_seqlens      int32 [B + 1], where each study begins, in tokens too
        series_study          int64 [S], each series' study
        series, bad_files     lists of S str
        study                 list of B str
        labels                float32 [B, L], NaN = missing
    context, target and labels are there where the items have them.  Consecutive items of one study form it.
    """
    new = [i == 0 or item["study"] != items[i - 1]["study"] for i, item in enumerate(items)]
    firsts = [item for item, is_new in zip(items, new, strict=True) if is_new]
    cu_seqlens = torch.tensor([0] + [len(item["tokens"]) for item in items]).cumsum(0).int()
    batch = {key: torch.cat([item[key] for item in items])
             for key in ("tokens", "coords", "foreground", "context", "target") if key in items[0]}
    batch |= {key: [item[key] for item in items] for key in ("series", "bad_files")}
    batch |= {"mode": torch.tensor([item["mode"] for item in items]),
              "size": torch.stack([item["size"] for item in items]),
              "cu_seqlens": cu_seqlens,
              "study_cu_seqlens": cu_seqlens[torch.tensor([*new, True])],
              "series_study": torch.tensor(new).cumsum(0) - 1,
              "study": [item["study"] for item in firsts]}
    if "labels" in items[0]:
        batch["labels"] = torch.stack([item["labels"] for item in firsts])
    return batch
