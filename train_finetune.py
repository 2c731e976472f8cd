"""Train a model on labels, from scratch or from a pretrained backbone.

    python train_finetune.py --task mil -p brain_demo -n findings --init runs/brain/jepa_last.pt  # demo
    python train_finetune.py --task mil -n findings --data data/cache --init runs/brain/jepa_last.pt \\
        --set STUDY_LABELS=labels.csv
    torchrun --nproc_per_node=4 train_finetune.py --task mil -n findings --data data/cache -c auto \\
        --set STUDY_LABELS=labels.csv                                                              # resume
    python train_finetune.py --task hvit -p leaf_demo -n classes --init runs/leaves/simclr_best.pt  # demo
    python train_finetune.py --task classify -p spine_location_view -n location --data slices.csv
    python train_finetune.py --task segment -p cord_segmentation -n cord --data masks.csv \\
        --init runs/location/classify_best.pt
    python train_finetune.py --task segment -p lesion_pretraining -n painted --data masks.csv
    python train_finetune.py --task segment -p lesion_segmentation_pretrained -n lesion --data lesions.csv \\
        --init runs/painted/segment_best.pt

--task mil   findings of a brain study from all of its series: a frozen or trainable token transformer, and
             attention pooling over the study (multiple-instance learning).  Labels: a CSV with study_id and
             a column per label; empty is unknown.
--task hvit  classes of photographs: the hierarchical vision transformer, or one of torchvision's networks.
             Data: a folder per class, or a CSV with path and label.
--task classify | segment | multitask   slices of spine MRI: classes by a ResNet, masks by a U-Net, or both by
             one network.  Data: a CSV or folders of DICOM, NIfTI or pictures, see datasets/slices.py; split
             by patient.
Settings: constants.py, sections 1 to 3, for mil 12 to 14, 18, 19, hvit 25, 28, 29, the others 30 to 33.
"""

import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import builders
import constants as C
from datasets.photo_augment import PhotoAugment, denormalise, evaluation_view, mix
from datasets.slice_augment import SliceAugment
from datasets.studies import ragged_collate, split_studies
from losses.classification import check_photo_loss, class_weights, classification_loss, photo_loss
from losses.slice_tasks import slice_loss
from models.hvit import HViT
from models.slice_nets import encoder_of, mask_channels, named_outputs
from utils import config, distributed, states
from utils.attention_maps import draw_attention
from utils.checkpoint import save_checkpoint
from utils.classification import StudyMetrics
from utils.device import autocast, gradient_scaler, to_device
from utils.ema import EMA
from utils.history import Trackers, batch_line, epoch_line, progress_bar, say_end, write_history
from utils.interrupts import Interrupts
from utils.optim import drop_frozen_, parameter_groups
from utils.photo_metrics import PhotoMetrics
from utils.photo_sheet import photo_sheet, prediction_rows
from utils.runs import best_row, check_finite, keep_checkpoint, open_run, own_sums, resume_position, stale_for
from utils.schedules import accumulation_group, go_to_step
from utils.scores import LogitScores, SliceScores, check_monitor, one_slice
from utils.slice_sheet import slice_rows, slice_sheet


@dataclass
class Task:
    """What the training loop needs to know of a task; each build function below fills one."""

    kind: str                     # names the checkpoints
    model: nn.Module
    names: list                   # of the labels or classes, kept in the checkpoint
    train_loader: DataLoader
    val_loader: DataLoader
    item: str                     # the batch's entry that names its items
    compute: Callable             # (model, batch) -> (loss, outputs)
    scores: Callable              # () -> utils.scores: add(batch, outputs, count), compute() -> dict
    rows: Callable                # (batch, outputs) -> rows of the sample picture
    draw: Callable                # (path, rows): the sample picture of an epoch
    epochs: int
    every: int                    # micro-batches per optimizer step
    parameters: Callable          # model -> parameter groups with their peak rates
    schedule: dict                # arguments of build_scheduler
    monitor: tuple                # metric of the best checkpoint, "min" | "max"
    patience: int = 0             # epochs without a better one that end the run; 0: never
    mask_names: list = field(default_factory=list)               # as names, of the classes of masks


# ---------------------------------------------------------------- MIL on brain studies

def build_mil(args, run_dir, resumed):
    """A classifier of whole studies over the tokens of all series (Ilse et al. 2018, arXiv:1802.04712)."""
    data, labels_csv = builders.study_paths(args.data)
    if not labels_csv:
        raise config.UserError("STUDY_LABELS: name a CSV of the studies' labels, --set STUDY_LABELS=FILE")
    studies, labels = builders.labelled_studies(data, labels_csv)
    splits = split_studies(studies, C.STUDY_VAL_FRACTION, C.STUDY_TEST_FRACTION, C.STUDY_SPLIT_CSV or None,
                           C.STUDY_PATIENTS)
    weight = labels.loss_weights(splits["train"], C.MIL_CLASS_WEIGHTS, C.MIL_BALANCE)
    splits = builders.say_splits(builders.thin(splits, 1) if args.fast_dev_run else splits, "studies")
    train_set = builders.study_set(splits["train"], True, windows="all", labels=labels,
                                   random_crop=C.MIL_RANDOM_CROP, patch_drop_rate=C.MIL_PATCH_DROP)
    val_set = builders.study_set(splits["val"], False, windows="all", labels=labels)

    names, model = labels.names, builders.build_study_classifier(len(labels.names))
    if not resumed:
        builders.start_from(model.encoder, args.init, args.remove_prefix)

    def compute(model, batch):
        """(loss, outputs): logits [B, C] and attention [T, C or 1] of a batch of whole studies."""
        outputs = model(batch["tokens"], batch["coords"], batch["cu_seqlens"], batch["study_cu_seqlens"])
        return loss(outputs[0], batch["labels"]), outputs

    def loss(logits, labels):
        factors = None if weight is None else weight.to(logits.device)
        return classification_loss(C.MIL_LOSS, logits, labels, factors)

    def scores():
        return LogitScores(loss, StudyMetrics(C.MIL_LOSS, names), "labels")

    check_monitor("MIL_MONITOR", C.MIL_MONITOR, C.MIL_MONITOR_MODE, f"MIL_LOSS = {C.MIL_LOSS}", scores(),
                  {"labels": torch.zeros(1, 1 if C.MIL_LOSS == "ce" else len(names))},
                  [torch.zeros(1, len(names))])

    def parameters(model):
        parts = ((model.pooler, C.MIL_LR), (model.encoder, C.MIL_LR * C.MIL_BACKBONE_LR_SCALE))
        return [{**group, "lr": lr} for part, lr in parts
                for group in parameter_groups(part, C.MIL_WEIGHT_DECAY, C.NO_DECAY_NORM_BIAS)]

    train_loader, val_loader = (
        builders.build_loader(part, part.groups(), C.MIL_BATCH_SIZE, part is train_set, ragged_collate)
        for part in (train_set, val_set))
    return data, Task(
        kind="mil", model=model, names=names, train_loader=train_loader, val_loader=val_loader,
        item="study", compute=compute, scores=scores,
        rows=lambda batch, outputs: [(batch, outputs[1])], draw=draw_attention,
        epochs=C.MIL_EPOCHS, every=C.MIL_UPDATE_EVERY_BATCHES, parameters=parameters,
        schedule={"name": C.MIL_SCHEDULE, "warmup": C.WARMUP_STEPS, "ipe_scale": C.IPE_SCALE,
                  "start_lr": C.START_LR, "final_lr": C.FINAL_LR},
        monitor=(C.MIL_MONITOR, C.MIL_MONITOR_MODE))


# ------------------------------------------------------- classes of photographs

def build_hvit(args, run_dir, resumed):
    """A classifier of photographs by the word of HVIT_MODEL."""
    check_photo_loss(C.HVIT_LOSS, C.HVIT_FOCAL_GAMMA, C.HVIT_LABEL_SMOOTHING)
    if C.HVIT_BALANCE not in ("none", "weights", "sampler"):
        raise config.UserError(f'HVIT_BALANCE = "{C.HVIT_BALANCE}": must be none, weights or sampler')
    if C.HVIT_MIXUP_PROB + C.HVIT_CUTMIX_PROB > 1:
        raise config.UserError(f"HVIT_MIXUP_PROB = {C.HVIT_MIXUP_PROB} and HVIT_CUTMIX_PROB = "
                               f"{C.HVIT_CUTMIX_PROB}: their sum must be 1 at most")
    data, names, splits = builders.photo_splits(args, run_dir, resumed, labelled=True)
    weight = class_weights([photo.label for photo in splits["train"]], names) \
        if C.HVIT_BALANCE == "weights" else None
    train_loader, val_loader = builders.photo_loaders(splits, C.HVIT_BATCH_SIZE, args.fast_dev_run,
                                                      C.HVIT_BALANCE == "sampler")
    model = builders.build_photo_network(len(names), start=not resumed)
    if not resumed and (args.init or not C.HVIT_WEIGHTS):
        builders.start_from(model, args.init, args.remove_prefix, (*HViT.second_stream, "head."))
    augment = PhotoAugment(C.HVIT_SEVERITY, C.HVIT_IMG_SIZE)

    def compute(model, batch):
        """(loss, (logits [B, C], images as the network saw them)); augmented and mixed only in training."""
        images, spectral, targets = batch["image"], batch.get("spectral"), one_hot(batch["label"])
        if model.training:
            images, spectral = augment(images, batch["seed"], spectral)
            images, targets, spectral = mix(
                images, targets, C.HVIT_MIXUP_ALPHA, C.HVIT_MIXUP_PROB, C.HVIT_CUTMIX_ALPHA,
                C.HVIT_CUTMIX_PROB, torch.Generator().manual_seed(int(batch["seed"][0])), spectral)
        else:
            images, spectral = evaluation_view(images, C.HVIT_IMG_SIZE, spectral)
        logits = model(images, spectral)
        return soft_loss(logits, targets), (logits, images)

    def one_hot(labels):
        return F.one_hot(labels, len(names)).float()

    def soft_loss(logits, targets):
        factors = None if weight is None else weight.to(logits.device)
        return photo_loss(C.HVIT_LOSS, logits, targets, factors, C.HVIT_FOCAL_GAMMA, C.HVIT_LABEL_SMOOTHING)

    def scores():
        return LogitScores(lambda logits, labels: soft_loss(logits, one_hot(labels)), PhotoMetrics(names))

    check_monitor("HVIT_MONITOR", C.HVIT_MONITOR, C.HVIT_MONITOR_MODE, f"HVIT_LOSS = {C.HVIT_LOSS}", scores(),
                  {"label": torch.zeros(1, dtype=torch.int64)}, [torch.zeros(1, len(names))])
    return data, Task(
        kind="hvit", model=model, names=names, train_loader=train_loader, val_loader=val_loader,
        item="case", compute=compute, scores=scores, draw=photo_sheet,
        rows=lambda batch, outputs: prediction_rows(batch, outputs[0], denormalise(outputs[1]), names),
        epochs=C.HVIT_EPOCHS, every=C.HVIT_UPDATE_EVERY_BATCHES, parameters=builders.photo_parameters,
        schedule={"name": C.HVIT_SCHEDULE, "warmup": C.HVIT_WARMUP_STEPS, "final_lr": C.HVIT_FINAL_LR},
        monitor=(C.HVIT_MONITOR, C.HVIT_MONITOR_MODE), patience=C.HVIT_PATIENCE)


# ----------------------------------------------------------- slices of spine MRI

def build_slices(kind, args, run_dir, resumed):
    """Slices of spine MRI by kind: "classify", a ResNet | "segment", a U-Net | "multitask", both in one."""
    data, slices, names, mask_names = builders.find_spine(kind, args.data)
    train_loader, val_loader = builders.slice_loaders(builders.split_spine(slices), mask_names,
                                                      args.fast_dev_run)
    model = builders.build_slice_network(kind, names, mask_names, start=not resumed)
    if not resumed and (args.init or not C.SPINE_WEIGHTS):
        builders.start_from(model, args.init, args.remove_prefix, ("head.",), encoder_of(model))
    augment = SliceAugment(C.SPINE_SEVERITY, C.SPINE_SIZE)
    weight = torch.tensor(C.SPINE_CLASS_WEIGHTS) if C.SPINE_CLASS_WEIGHTS else None

    def loss(outputs, masks, labels):
        return slice_loss(outputs, masks, labels, C.SPINE_LOSS, weight, C.SPINE_DICE_WEIGHT)

    def compute(model, batch):
        """(loss, outputs by name) of a batch of slices, augmented only in training."""
        images, masks = batch["image"], batch["mask"] if mask_names else None
        if model.training:
            images, masks = augment(images, masks, batch["seed"])
        outputs = named_outputs(kind, model(images))
        return loss(outputs, masks, batch["label"]), outputs

    def scores():
        return SliceScores(loss, names, mask_names, C.SPINE_THRESHOLD, C.SPINE_FOUND_SHARE)

    monitor = C.SPINE_MONITOR or ("val/dice" if mask_names else "val/f1_macro")
    check_monitor("SPINE_MONITOR", monitor, C.SPINE_MONITOR_MODE, f"--task {kind}", scores(),
                  *one_slice(len(names), mask_channels(mask_names)))
    return data, Task(
        kind=kind, model=model, names=names, mask_names=mask_names, train_loader=train_loader,
        val_loader=val_loader, item="case", compute=compute, scores=scores, draw=slice_sheet,
        rows=lambda batch, outputs: slice_rows(batch, outputs, names, mask_names, C.SPINE_THRESHOLD),
        epochs=C.SPINE_EPOCHS, every=C.SPINE_UPDATE_EVERY_BATCHES, parameters=builders.slice_parameters,
        schedule={"name": C.SPINE_SCHEDULE, "warmup": C.SPINE_WARMUP_STEPS, "final_lr": C.SPINE_FINAL_LR},
        monitor=(monitor, C.SPINE_MONITOR_MODE), patience=C.SPINE_PATIENCE)


TASKS = {"mil": build_mil, "hvit": build_hvit, "classify": partial(build_slices, "classify"),
         "segment": partial(build_slices, "segment"), "multitask": partial(build_slices, "multitask")}
STAY = ("cu_seqlens", "study_cu_seqlens", "seed")          # on the CPU, so that a GPU waits for none


# ------------------------------------------------------------------- training

def parse_args():
    parser = config.training_parser(__doc__)
    parser.add_argument("--task", required=True, choices=TASKS, metavar="TASK",
                        help=f"what is learnt: {', '.join(TASKS)}")
    return parser.parse_args()


@torch.no_grad()
def evaluate(task, model, device, interrupts):
    """(figures, rows of the sample picture); None when the run was asked to stop meanwhile."""
    model.eval()
    loader, scores, rows = task.val_loader, task.scores(), []
    for i, batch in enumerate(progress_bar(loader, "validation")):
        if distributed.any_rank([interrupts.stop])[0]:
            return None
        batch, real = to_device(batch, device, STAY), loader.batch_sampler.real(i)
        with autocast(device, C.PRECISION):
            _, outputs = task.compute(model, batch)
        scores.add(batch, outputs, real)                                     # repeats do not count
        wanted = -(-C.SAMPLES_PER_EPOCH * (i + 1) // len(loader)) - len(rows)
        if real and wanted > 0:
            found = task.rows(batch, outputs)
            rows += found[::max(1, len(found) // wanted)][:wanted]
    return scores.compute(), rows


def main():
    args = parse_args()
    config.apply_preset(C, args.preset)
    config.apply_overrides(C, args.set)
    device = distributed.setup_distributed()
    torch.manual_seed(C.SEED)
    run_dir, checkpoint = open_run(C.RUNS_DIR, args.save_name, args.checkpoint, args.task, args.fast_dev_run)
    interrupts = Interrupts(C.CHECKPOINT_MINUTES)

    # Data and model
    data, task = TASKS[args.task](args, run_dir, checkpoint is not None)
    train_set, sampler = task.train_loader.dataset, task.train_loader.batch_sampler
    epochs = 1 if args.fast_dev_run else task.epochs
    steps = [math.ceil(sampler.length(epoch) / task.every) for epoch in range(1, epochs + 1)]
    total_steps = sum(steps)
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    model = distributed.shard(task.model.to(device), C.STRATEGY)

    # Optimizer
    optimizer, scheduler = builders.build_optimization(
        task.parameters(distributed.unwrap(model)), task.schedule, total_steps, round(total_steps / epochs))
    scaler = gradient_scaler(device, C.PRECISION)
    ema = EMA(model, C.EMA_DECAY, C.EMA_WARMUP) if C.USE_EMA else None

    # Resume
    first_epoch, first_batch, step, best, history, running, bad_files = 1, 0, 0, None, [], {}, set()
    torch.manual_seed(C.SEED + distributed.rank())                  # dropout differs between ranks
    if checkpoint is not None:
        then, now = checkpoint["names"] + checkpoint.get("mask_names", []), task.names + task.mask_names
        if then != now:
            raise config.UserError(f"the checkpoint is for {', '.join(then)}, the labels for "
                                   f"{', '.join(now)}; resume with the labels of the run")
        changed = config.changed_constants(C, checkpoint["constants"])
        for change in changed:
            distributed.say(f"Changed since the checkpoint: {change}")
        settings = states.load_training_state(checkpoint, model, optimizer, scaler)
        if ema is not None:
            ema.load_state_dict(checkpoint["ema_state_dict"])
        step, best, history = checkpoint["step"], checkpoint["best"], checkpoint["history"]
        batches = sampler.length(checkpoint["epoch"])
        first_epoch, first_batch = resume_position(checkpoint, batches, task.every)
        share = first_batch / max(1, checkpoint["batch_in_epoch"])       # 1, unless batches are others now
        running = own_sums(checkpoint["running"], share, device)
        if changed or checkpoint["total_steps"] != total_steps:
            done = sum(steps[:first_epoch - 1], -(-first_batch // task.every))
            go_to_step(scheduler, settings, min(done, total_steps))
        else:
            scheduler.load_state_dict(checkpoint["scheduler_state_dict"])
        if distributed.is_main():
            keep_checkpoint(run_dir, task.kind, C.KEEP_TOP_K, C.SAVE_EVERY_EPOCHS, *task.monitor)
    if C.COMPILE:
        model.compile()

    # Record
    trackers = None
    if distributed.is_main():
        trackers = Trackers(C.TRACKERS, run_dir, config.hyperparameters(C), step)
        config.write_training_params(
            run_dir, C, preset=args.preset, overrides=args.set, kind=task.kind,
            data=str(data), train_items=len(train_set), val_items=len(task.val_loader.dataset),
            world_size=distributed.world_size(), device=str(device), parameters=parameters,
            effective_batch=sampler.batch_size * task.every * distributed.world_size(),
            steps_per_epoch=steps[0], total_steps=total_steps)

    def save_last(epoch, batch_in_epoch, train_loss=None, val_loss=None):
        """Write <kind>_last.pt.  All ranks gather the state, the main one writes it."""
        entries = {
            "kind": task.kind, "epoch": epoch, "batch_in_epoch": batch_in_epoch,
            "num_batches": sampler.length(epoch), "total_steps": total_steps, "step": step, "best": best,
            "train_loss": train_loss, "val_loss": val_loss, "history": history,
            "running": distributed.gather({name: value.cpu() for name, value in running.items()}),
            "ema_state_dict": ema.state_dict() if ema is not None else None, "names": task.names,
            "mask_names": task.mask_names,
            **states.training_state(model, optimizer, scheduler, scaler),
            "constants": config.hyperparameters(C)}
        if distributed.is_main():
            save_checkpoint(run_dir / f"{task.kind}_last.pt", **entries)
        interrupts.saved()

    def stop(epoch, batch_in_epoch):
        """Save, and end the process as the signal would have."""
        save_last(epoch, batch_in_epoch)
        if distributed.is_main():
            trackers.close()
            print(f"Stopped at epoch {epoch}, batch {batch_in_epoch}/{num_batches}; resume with -c auto")
        distributed.cleanup()
        sys.exit(interrupts.exit_code)

    # Train
    for epoch in range(first_epoch, epochs + 1):
        if task.patience and stale_for(history, *task.monitor) >= task.patience:
            distributed.say(f"No better {task.monitor[0]} in {task.patience} validations: the run ends")
            break
        started, num_batches = time.monotonic(), sampler.length(epoch)
        distributed.say(f"Epoch {epoch}/{epochs}")
        model.train()
        train_set.set_epoch(epoch)
        sampler.set_position(epoch, first_batch)
        group_loss, group_items = torch.zeros((), device=device), []
        batches = progress_bar(task.train_loader, f"epoch {epoch}", first_batch)
        for i, batch in enumerate(batches, start=first_batch):
            size, is_last = accumulation_group(i, num_batches, task.every)
            batch = to_device(batch, device, STAY)

            # Gradients travel between ranks only on the last micro-batch of a group.
            with distributed.gradient_sync(model, is_last):
                with autocast(device, C.PRECISION):
                    loss, _ = task.compute(model, batch)
                scaler.scale(loss / size).backward()
            running["loss"] = running.get("loss", 0) + loss.detach()
            group_loss, group_items = group_loss + loss.detach(), group_items + batch[task.item]
            bad_files.update(filter(None, batch["bad_files"]))
            if distributed.is_main() and (i + 1) % C.LOG_EVERY_BATCHES == 0:
                means = {name: value.item() / (i + 1) for name, value in running.items()}
                tqdm.write(batch_line(i + 1, num_batches, means))
            if not is_last:
                continue

            drop_frozen_(optimizer, epoch)
            scaler.unscale_(optimizer)                                  # clip true gradients, not scaled ones
            if C.GRAD_CLIP_NORM:
                torch.nn.utils.clip_grad_norm_(model.parameters(), C.GRAD_CLIP_NORM)
            check_finite(group_loss, {"loss": loss}, step + 1, group_items)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            distributed.sync_buffers_(model)
            if ema is not None:
                ema.update()
            step += 1
            group_loss, group_items = torch.zeros((), device=device), []

            stop_now, save_now = distributed.any_rank([interrupts.stop, interrupts.save])
            if stop_now:
                stop(epoch, i + 1)
            if save_now:
                save_last(epoch, i + 1)

        # Validate
        with ema.applied() if ema is not None else nullcontext():
            result = evaluate(task, model, device, interrupts)
        if result is None:
            stop(epoch, num_batches)
        values, rows = result
        train_means = {name: distributed.all_reduce_mean(value / num_batches).item()
                       for name, value in running.items()}

        # Log and save
        row = {"epoch": epoch, "step": step, "train/lr": optimizer.param_groups[0]["lr"],
               **{f"train/{name}": value for name, value in train_means.items()},
               **{f"val/{name}": value for name, value in values.items()}}
        history.append(row)
        best = best_row(history, *task.monitor)[task.monitor[0]]
        running, first_batch = {}, 0
        if distributed.is_main():
            write_history(run_dir, history)
            if rows:
                task.draw(run_dir / "samples" / f"epoch_{epoch}.png", rows)
            trackers.log(row, step)
        save_last(epoch, num_batches, row["train/loss"], row["val/loss"])
        if distributed.is_main():
            kept = keep_checkpoint(run_dir, task.kind, C.KEEP_TOP_K, C.SAVE_EVERY_EPOCHS, *task.monitor)
            print(f"{epoch_line(row)} ({time.monotonic() - started:.0f} s)")
            print(f"Saved checkpoint: {kept}")

    if distributed.is_main():
        trackers.close()
    say_end(run_dir, bad_files, first_epoch <= epochs)
    distributed.cleanup()


if __name__ == "__main__":
    config.run_script(main)
