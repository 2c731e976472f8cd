"""What constants.py describes, built: networks, data sets, loaders and schedules that scripts share."""

from copy import copy
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import constants as C
from datasets.block_mask import VolumeBlockMask
from datasets.cache import read_cache
from datasets.labels import read_labels
from datasets.lesion_slices import LESION, LesionSlices
from datasets.photo_splits import settle_splits, split_photos
from datasets.photos import PhotoDataset, find_photos, sample_weights
from datasets.samplers import ItemBatchSampler, StudyAwareBatchSampler
from datasets.simclr_views import SimCLRViews
from datasets.slice_tasks import slices_for
from datasets.slices import SliceDataset, split_slices
from datasets.studies import StudyDataset
from models.jepa import Predictor
from models.mil import StudyClassifier, build_pooler
from models.photo import build_photo_model, layer_groups, load_torchvision_weights
from models.resnet import load_resnet_weights
from models.slice_nets import build_slice_model, encoder_of
from models.token_vit import TokenViT
from prepare_data import make_leaf_demo, make_spine_demo, make_study_demo
from utils.checkpoint import load_part
from utils.config import UserError
from utils.distributed import barrier, is_main, rank, say, world_size
from utils.interrupts import leave_to_parent
from utils.optim import build_optimizer, parameter_groups
from utils.schedules import build_scheduler
from utils.tables import first_of


def build_loader(dataset, groups, batch_size, shuffle, collate):
    """Loader of this rank's batches of whole groups of items, lists of indices; None: each by itself."""
    groups = [[i] for i in range(len(dataset))] if groups is None else groups
    sampler = StudyAwareBatchSampler(groups, batch_size, shuffle, C.SEED, rank(), world_size())
    return load(dataset, sampler, collate)


def build_item_loader(dataset, batch_size, shuffle, weights=None):
    """Loader of this rank's batches of single items; weights [items]: drawn with replacement, by these."""
    sampler = ItemBatchSampler(len(dataset), batch_size, shuffle, C.SEED, rank(), world_size(), weights)
    return load(dataset, sampler, None)


def load(dataset, sampler, collate):
    """DataLoader of a batch sampler.  Its own generator keeps it from drawing on the global random state."""
    return DataLoader(dataset, batch_sampler=sampler, num_workers=C.NUM_WORKERS, collate_fn=collate,
                      pin_memory=torch.cuda.is_available(), worker_init_fn=leave_to_parent,
                      generator=torch.Generator())


def build_optimization(groups, schedule, total_steps, steps_per_epoch):
    """(optimizer, scheduler) of parameter groups, each with its "lr" and "weight_decay".

    schedule: arguments of build_scheduler that are the method's or task's own: name, warmup, final_lr, ...
    """
    optimizer = build_optimizer(C.OPTIMIZER, groups, groups[0]["lr"], 0.0, C.ADAM_BETAS, C.MOMENTUM)
    scheduler = build_scheduler(
        optimizer, total_steps=total_steps, steps_per_epoch=steps_per_epoch,
        pct_start=C.ONECYCLE_PCT_START, div_factor=C.ONECYCLE_DIV_FACTOR,
        final_div_factor=C.ONECYCLE_FINAL_DIV_FACTOR, num_cycles=C.NUM_CYCLES,
        step_size=C.STEP_SIZE, step_unit=C.STEP_UNIT, gamma=C.STEP_GAMMA,
        t0=C.RESTART_T0, t0_unit=C.RESTART_T0_UNIT, t_mult=C.RESTART_T_MULT,
        eta_min=schedule["final_lr"], **schedule)
    return optimizer, scheduler


def say_splits(splits, what):
    """Say how many of ``what`` are in each split; returns the splits."""
    train, val, test = (len(splits[name]) for name in ("train", "val", "test"))
    say(f"{train} {what} to train, {val} to validate, {test} to test")
    return splits


def thin(splits, batch_size):
    """{split: items} with as many items as fill one batch of each rank, from all over the list."""
    count = batch_size * world_size()
    return {name: items[::max(1, len(items) // count)][:count] for name, items in splits.items()}


def start_from(model, init, remove_prefix, optional=(), part=None):
    """Fill a network from the file that --init names, and say what matched; or that there is none.

    part: of the network, which must match; None: all of it.  optional: beginnings of names that need not.
    """
    if not init:
        return say("No --init: the network starts from random weights")
    matched, unmatched = load_part(model, part or model, init, remove_prefix, optional)
    say(f"--init {init}: {len(matched)} weights of the backbone matched, {len(unmatched)} not"
        f"{first_of(unmatched)}")


def data_path(data, make, below):
    """Path of --data; where it is None, that ``below`` DEMO_DIR, which rank 0 makes."""
    if data is None and is_main():
        make()
    barrier()
    return Path(data or Path(C.DEMO_DIR) / below)


def say_filled(constant, path, matched, unmatched):
    """Say what the file that a constant names has filled."""
    say(f"{constant} {path}: {len(matched)} weights matched; of the file {len(unmatched)} have no use here"
        f"{first_of(unmatched)}")


# -------------------------------------------------------------- brain studies

def study_paths(data):
    """(cache, CSV of labels or ""): of --data, or of the demonstration studies.

    These have labels and splits of their own, which count unless the constants name others.
    """
    path = data_path(data, make_study_demo, "studies/cache")
    if data is None:
        C.STUDY_LABELS = C.STUDY_LABELS or str(path.with_name("labels.csv"))
        C.STUDY_SPLIT_CSV = C.STUDY_SPLIT_CSV or str(path.with_name("split.csv"))
    return path, C.STUDY_LABELS


def study_set(studies, train, **options):
    """The data set of some studies with the settings that all methods share."""
    return StudyDataset(
        studies, train=train, window_probabilities=C.STUDY_WINDOW_PROBABILITIES,
        max_crop_size=C.STUDY_MAX_CROP, spatial_augment=C.STUDY_SPATIAL_AUGMENT,
        remove_background=C.STUDY_REMOVE_BACKGROUND, gamma=C.STUDY_GAMMA, brightness=C.STUDY_BRIGHTNESS,
        contrast=C.STUDY_CONTRAST, noise=C.STUDY_NOISE, seed=C.SEED, on_bad_file=C.ON_BAD_FILE, **options)


def build_token_vit():
    """The transformer over tokens of volumes that the constants describe."""
    return TokenViT(C.STUDY_VIT, dim=C.STUDY_VIT_DIM, depth=C.STUDY_VIT_DEPTH, heads=C.STUDY_VIT_HEADS,
                    mlp_ratio=C.STUDY_VIT_MLP_RATIO, position=C.STUDY_POSITION, attention=C.STUDY_ATTENTION,
                    dropout=C.STUDY_DROPOUT, drop_path=C.STUDY_DROP_PATH,
                    checkpoint_activations=C.ACTIVATION_CHECKPOINTING)


def build_study_mask():
    """What JEPA hides of a volume."""
    return VolumeBlockMask(C.JEPA_TARGET_SHARE, C.JEPA_CONTEXT_CEILING, C.JEPA_ASPECT, C.JEPA_DROP_RATE,
                           context_range=C.JEPA_CONTEXT_RANGE)


def build_predictor(dim):
    """JEPA's predictor for an encoder of that width."""
    return Predictor(dim, C.JEPA_PREDICTOR_DIM, C.JEPA_PREDICTOR_DEPTH, C.JEPA_PREDICTOR_HEADS,
                     dropout=C.STUDY_DROPOUT, drop_path=C.STUDY_DROP_PATH, attention=C.STUDY_ATTENTION,
                     checkpoint_activations=C.ACTIVATION_CHECKPOINTING)


def build_study_classifier(num_outputs):
    """Token transformer and attention pooling as the constants describe them."""
    encoder = build_token_vit()
    pooler = build_pooler(C.MIL_POOLER, encoder.dim, num_outputs, C.MIL_MLP_DIMS, C.MIL_ATTENTION_DIM,
                          C.MIL_ATTENTION_HEADS, C.MIL_USE_NORM)
    return StudyClassifier(encoder, pooler, C.MIL_FREEZE_BACKBONE)


def labelled_studies(data, labels_csv):
    """(studies that have labels, labels) of a cache; what has no counterpart is listed."""
    labels = read_labels(labels_csv, C.MIL_LOSS)
    studies, unlabelled, unknown = labels.match(read_cache(data))
    for names, what in ((unlabelled, "studies without labels"), (unknown, "labels without a study")):
        if names:
            say(f"{len(names)} {what}, left out: {', '.join(names)}")
    return studies, labels


# ---------------------------------------------------------------- photographs

def photo_path(data):
    """Folder or CSV of photographs: --data, or the demonstration's."""
    return data_path(data, make_leaf_demo, "leaves/images")


def photo_splits(args, run_dir, resumed, labelled):
    """(data, class names, {"train", "val", "test": photographs}); the splits are written to splits.csv.

    A run that goes on keeps the splits it began with: those in its folder, or beside its checkpoint.
    labelled: every photograph must have a class.
    """
    data, path = photo_path(args.data), run_dir / "splits.csv"
    photos, classes, notes = find_photos(data, labelled)
    if is_main():
        earlier = [path, Path(args.checkpoint).with_name("splits.csv")] if resumed else []
        notes += settle_splits(path, photos, classes, [*earlier, C.HVIT_SPLIT_CSV],
                               (C.HVIT_HASH_DISTANCE, C.NUM_WORKERS, C.ON_BAD_FILE),
                               C.HVIT_VAL_FRACTION, C.HVIT_TEST_FRACTION, C.SEED)
        print("\n".join(notes))
    barrier()
    splits = split_photos(photos, classes, C.HVIT_VAL_FRACTION, C.HVIT_TEST_FRACTION, path=path)
    return data, classes, say_splits(splits, "photographs")


def build_views():
    """Two random views of each photograph, for SimCLR."""
    return SimCLRViews(
        C.HVIT_IMG_SIZE, C.SIMCLR_CROP_SCALE, flip=C.SIMCLR_FLIP, jitter=C.SIMCLR_JITTER,
        brightness=C.SIMCLR_BRIGHTNESS, contrast=C.SIMCLR_CONTRAST, saturation=C.SIMCLR_SATURATION,
        hue=C.SIMCLR_HUE, grayscale=C.SIMCLR_GRAYSCALE, blur=C.SIMCLR_BLUR, sigma=C.SIMCLR_BLUR_SIGMA)


def build_photo_network(num_classes, start=True):
    """The network that HVIT_MODEL names, num_classes 0: without head; ``start``: filled from HVIT_WEIGHTS."""
    model = build_photo_model(
        C.HVIT_MODEL, num_classes, C.HVIT_DROP_PATH, C.HVIT_DROPOUT if C.HVIT_DROPOUT >= 0 else None,
        C.HVIT_SPECTRAL_CHANNELS, C.HVIT_DFCA, C.HVIT_DFCA_HEADS, C.HVIT_DFCA_DROPOUT,
        C.ACTIVATION_CHECKPOINTING)
    if start and C.HVIT_WEIGHTS:
        say_filled("HVIT_WEIGHTS", C.HVIT_WEIGHTS, *load_torchvision_weights(model, C.HVIT_WEIGHTS))
    return model.to(memory_format=torch.channels_last) if C.CHANNELS_LAST else model


def photo_set(photos, train, cache_rate=0.0):
    """The data set of some photographs."""
    return PhotoDataset(photos, C.HVIT_IMG_SIZE, train, C.SEED, C.ON_BAD_FILE, C.HVIT_SPECTRAL_CHANNELS,
                        C.HVIT_FIT, cache_rate)


def photo_loaders(splits, batch_size, fast, balanced=False):
    """(training, validation) loaders of photographs; balanced: every class is drawn equally often.

    fast: so many photographs that each loader has one batch, taken from all over the list.
    """
    splits = thin(splits, batch_size) if fast else splits
    train_set, val_set = (photo_set(splits[name], name == "train", C.HVIT_CACHE_RATE)
                          for name in ("train", "val"))
    weights = sample_weights(splits["train"]) if balanced else None
    return (build_item_loader(train_set, batch_size, True, weights),
            build_item_loader(val_set, batch_size, False))


def still_loader(loader):
    """Loader of the same photographs in their order, without anything random, for what only looks at them."""
    dataset = copy(loader.dataset)                         # shares what is kept in memory
    dataset.train = False
    return build_item_loader(dataset, loader.batch_sampler.batch_size, False)


def photo_parameters(model):
    """Parameter groups from the head to the input, each part's rate a factor below that of the part above."""
    groups = []
    for depth, names in enumerate(reversed(layer_groups(model))):
        own = {"lr": C.HVIT_LR * C.HVIT_LAYER_DECAY ** depth,
               "from_epoch": 1 + C.HVIT_FREEZE_EPOCHS if depth else 1}
        groups += [{**group, **own} for group in parameter_groups(
            model, C.HVIT_WEIGHT_DECAY, C.NO_DECAY_NORM_BIAS, ("position",), names)]
    return groups


# ------------------------------------------------------------- slices of spine MRI

def find_spine(kind, data, names=None):
    """(path of the data, slices, class names, names of masks) for "classify" | "segment" | "multitask".

    data: folder or CSV; None: the demonstration's table, which rank 0 makes.  names: a network's classes.
    """
    data = data_path(data, make_spine_demo, f"spine/{C.SPINE_DEMO_TABLE}.csv")
    mask_names = [] if kind == "classify" else [LESION] if C.SPINE_LESIONS else C.SPINE_MASK_CLASSES
    slices, names, notes = slices_for(kind, data, mask_names, names, C.SPINE_LAYOUT, C.SPINE_AXIS,
                                      C.SPINE_MASK_WORD, C.ON_BAD_FILE)
    say("\n".join(notes))
    axes = {slice.axis for slice in slices}
    if len(axes) == 1:                 # of a table's own, too: the checkpoint tells infer_cascade.py
        C.SPINE_AXIS, = axes
    return data, slices, names, mask_names


def split_spine(slices):
    """{"train", "val", "test": slices}, by patient."""
    return split_slices(slices, C.SPINE_VAL_FRACTION, C.SPINE_TEST_FRACTION, C.SPINE_SPLIT_CSV or None)


def slice_set(slices, train, mask_names):
    """The data set of some slices, with synthetic lesions where the constants want them."""
    painted = bool(mask_names) and C.SPINE_LESIONS != 0
    dataset = SliceDataset(slices, C.SPINE_SIZE, train, C.SEED, C.ON_BAD_FILE,
                           C.SPINE_MASK_CLASSES if painted else mask_names, C.SPINE_FIT, C.SPINE_INTENSITY,
                           C.SPINE_PERCENTILES, C.SPINE_CACHE_MB, C.SPINE_FIELD_MM)
    if not painted:
        return dataset
    return LesionSlices(dataset, C.SPINE_LESIONS if train or C.SPINE_LESIONS_IN_VALIDATION else 0.0,
                        count=C.SPINE_LESION_COUNT, semi_axis=C.SPINE_LESION_AXIS,
                        flatness=C.SPINE_LESION_FLATNESS, factor=C.SPINE_LESION_FACTOR,
                        ceiling=C.SPINE_LESION_CEILING)


def slice_loaders(splits, mask_names, fast):
    """(training, validation) loaders of slices; fast: as photo_loaders."""
    if C.SPINE_BALANCE and any(slice.label < 0 for slice in splits["train"]):
        raise UserError("SPINE_BALANCE = True: some slices have no class; give all one, or set it to False")
    say_splits({name: {slice.patient for slice in part} for name, part in splits.items()}, "patients")
    say_splits(splits, "slices")
    splits = thin(splits, C.SPINE_BATCH_SIZE) if fast else splits
    weights = sample_weights(splits["train"]) if C.SPINE_BALANCE else None
    train_set, val_set = (slice_set(splits[name], name == "train", mask_names) for name in ("train", "val"))
    return (build_item_loader(train_set, C.SPINE_BATCH_SIZE, True, weights),
            build_item_loader(val_set, C.SPINE_BATCH_SIZE, False))


def build_slice_network(kind, names, mask_names, start=True):
    """The network of a kind of task that the constants describe; ``start``: filled from SPINE_WEIGHTS."""
    model = build_slice_model(
        kind, names, mask_names, C.SPINE_ENCODER, C.SPINE_TASK_WEIGHTING, C.SPINE_TASK_WEIGHTS,
        C.ACTIVATION_CHECKPOINTING, depth=C.SPINE_DEPTH, features=C.SPINE_FEATURES,
        attention=C.SPINE_ATTENTION, xavier=C.SPINE_XAVIER, prior=C.SPINE_MASK_PRIOR)
    if start and C.SPINE_WEIGHTS:
        say_filled("SPINE_WEIGHTS", C.SPINE_WEIGHTS, *load_resnet_weights(encoder_of(model), C.SPINE_WEIGHTS))
    return model.to(memory_format=torch.channels_last) if C.CHANNELS_LAST else model


def slice_parameters(model):
    """Parameter groups with the peak rate."""
    return [{**group, "lr": C.SPINE_LR} for group in parameter_groups(
        model, C.SPINE_WEIGHT_DECAY, C.NO_DECAY_NORM_BIAS, ("task_weights",))]
