"""Train a model on labels, from scratch or from a pretrained backbone.

    python train_finetune.py --task mil -p brain_demo -n findings --init runs/brain/jepa_last.pt  # demo
    python train_finetune.py --task mil -n findings --data data/cache --init runs/brain/jepa_last.pt \\
        --set STUDY_LABELS=labels.csv
    python train_finetune.py --task mil -n findings --data data/cache -c auto \\
        --set STUDY_LABELS=labels.csv                                                              # resume
    torchrun --nproc_per_node=4 train_finetune.py --task mil -n findings --data data/cache ...

--task mil   findings of a brain study from all of its series: a frozen or trainable token transformer, and
             attention pooling over the study (multiple-instance learning).  Settings: constants.py, sections
             12 to 14, 18 and 19.  Labels: a CSV with study_id and a column per label; empty is unknown.
"""

import math
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn as nn
from torch.utils.data import Dataset
from tqdm import tqdm

import constants as C
from datasets.cache import read_cache
from datasets.labels import read_labels
from datasets.studies import ragged_collate, split_studies
from losses.classification import classification_loss
from models.mil import StudyClassifier, build_pooler
from prepare_data import study_paths
from train_pretrain import build_loader, build_token_vit, study_set
from utils import config, distributed, states
from utils.attention_maps import attention_sheet, token_map, token_volume
from utils.checkpoint import load_backbone, save_checkpoint
from utils.classification import StudyMetrics
from utils.device import autocast, to_device
from utils.ema import EMA
from utils.history import Trackers, batch_line, epoch_line, progress_bar, write_history
from utils.interrupts import Interrupts
from utils.optim import build_optimizer, parameter_groups
from utils.runs import check_finite, is_better, keep_checkpoint, open_run, resume_position
from utils.schedules import accumulation_group, build_scheduler, go_to_step


@dataclass
class Task:
    """What the training loop needs to know of a task; each build function below fills one."""

    kind: str                     # names the checkpoints
    model: nn.Module
    names: list                   # of the labels or classes, kept in the checkpoint
    train_set: Dataset
    val_set: Dataset
    collate: Callable
    compute: Callable             # (model, batch) -> (loss, outputs)
    loss: Callable                # (outputs, labels) of any number of items -> loss
    evaluate: Callable            # (task, model, loader, device, interrupts) -> (figures, rows) or None
    draw: Callable                # (path, rows): the sample picture of an epoch
    epochs: int
    batch_size: int
    every: int                    # micro-batches per optimizer step
    parameters: dict              # part of the network -> (learning rate, weight decay)
    schedule: dict = field(default_factory=dict)      # arguments of build_scheduler
    monitor: tuple = ("val/loss", "min")


# ---------------------------------------------------------------- MIL on brain studies

def labelled_studies(data, labels_csv):
    """(studies that have labels, labels) of a cache; what has no counterpart is listed."""
    labels = read_labels(labels_csv, C.MIL_LOSS)
    studies, unlabelled, unknown = labels.match(read_cache(data))
    if distributed.is_main():
        for names, what in ((unlabelled, "studies without labels"), (unknown, "labels without a study")):
            if names:
                print(f"{len(names)} {what}, left out: {', '.join(names)}")
    return studies, labels


def build_mil(args, init):
    """A classifier of whole studies over the tokens of all series (Ilse et al. 2018, arXiv:1802.04712)."""
    data, labels_csv = study_paths(args.data)
    if not labels_csv:
        raise config.UserError("STUDY_LABELS: name a CSV of the studies' labels, --set STUDY_LABELS=FILE")
    studies, labels = labelled_studies(data, labels_csv)
    splits = split_studies(studies, C.STUDY_VAL_FRACTION, C.STUDY_TEST_FRACTION, C.STUDY_SPLIT_CSV or None)
    check_monitor(labels.names)
    weight = class_weights(labels, splits["train"])
    if args.fast_dev_run:
        splits = {name: part[:distributed.world_size()] for name, part in splits.items()}
    train_set = study_set(splits["train"], True, windows="all", labels=labels,
                          random_crop=C.MIL_RANDOM_CROP, patch_drop_rate=C.MIL_PATCH_DROP)
    val_set = study_set(splits["val"], False, windows="all", labels=labels)

    model = build_study_classifier(len(labels.names))
    if init:
        matched, unmatched = load_backbone(model.encoder, init, args.remove_prefix)
        if distributed.is_main():
            print(f"--init {init}: {len(matched)} weights of the backbone matched, {len(unmatched)} not "
                  f"{unmatched[:5]}")

    def compute(model, batch):
        """(loss, outputs): logits [B, C] and attention [T, C or 1] of a batch of whole studies."""
        outputs = model(batch["tokens"], batch["coords"], batch["cu_seqlens"], batch["study_cu_seqlens"])
        return loss(outputs[0], batch["labels"]), outputs

    def loss(logits, labels):
        factors = None if weight is None else weight.to(logits.device)
        return classification_loss(C.MIL_LOSS, logits, labels, factors)

    return data, Task(
        kind="mil", model=model, names=labels.names, train_set=train_set, val_set=val_set,
        collate=ragged_collate, compute=compute, loss=loss, evaluate=evaluate_mil, draw=draw_attention,
        epochs=C.MIL_EPOCHS, batch_size=C.MIL_BATCH_SIZE, every=C.MIL_UPDATE_EVERY_BATCHES,
        parameters={"pooler": (C.MIL_LR, C.MIL_WEIGHT_DECAY),
                    "encoder": (C.MIL_LR * C.MIL_BACKBONE_LR_SCALE, C.MIL_WEIGHT_DECAY)},
        schedule={"name": C.MIL_SCHEDULE, "warmup": C.WARMUP_STEPS, "ipe_scale": C.IPE_SCALE,
                  "start_lr": C.START_LR, "final_lr": C.FINAL_LR},
        monitor=(C.MIL_MONITOR, C.MIL_MONITOR_MODE))


def check_monitor(names):
    """Raise UserError now, not after an epoch, when MIL_MONITOR is not measured with MIL_LOSS."""
    metrics = StudyMetrics(C.MIL_LOSS, names)
    metrics.update(torch.zeros(1, len(names)), torch.zeros(1, 1 if C.MIL_LOSS == "ce" else len(names)))
    measured = ["epoch", "train/loss", "val/loss", *(f"val/{name}" for name in metrics.compute())]
    if C.MIL_MONITOR not in measured:
        raise config.UserError(f"MIL_MONITOR = {C.MIL_MONITOR}: not measured with MIL_LOSS = {C.MIL_LOSS}; "
                               f"there are {', '.join(measured)}")


def class_weights(labels, studies):
    """Weights of the loss, of labels ("bce") or classes ("ce"), as the constants say; or None."""
    if C.MIL_LOSS not in ("bce", "ce") and C.MIL_CLASS_WEIGHTS:
        raise config.UserError(f'MIL_CLASS_WEIGHTS: the loss "{C.MIL_LOSS}" takes none; set it to []')
    if C.MIL_LOSS not in ("bce", "ce") or not (C.MIL_CLASS_WEIGHTS or C.MIL_BALANCE):
        return None
    if C.MIL_CLASS_WEIGHTS and len(C.MIL_CLASS_WEIGHTS) != len(labels.names):
        raise config.UserError(f"MIL_CLASS_WEIGHTS = {C.MIL_CLASS_WEIGHTS}: must be {len(labels.names)} "
                               f"numbers, for {', '.join(labels.names)}")
    return torch.as_tensor(C.MIL_CLASS_WEIGHTS or labels.balanced_weights(studies)).float()


def build_study_classifier(num_outputs):
    """Token transformer and attention pooling as the constants describe them."""
    encoder = build_token_vit()
    pooler = build_pooler(C.MIL_POOLER, encoder.dim, num_outputs, C.MIL_MLP_DIMS, C.MIL_ATTENTION_DIM,
                          C.MIL_ATTENTION_HEADS, C.MIL_USE_NORM)
    return StudyClassifier(encoder, pooler, C.MIL_FREEZE_BACKBONE)


def draw_attention(path, rows):
    """Where the network looked in the first validation series: the mean over its heads of attention."""
    (batch, attention), = rows
    end, size = int(batch["cu_seqlens"][1]), batch["size"][0].tolist()
    tokens, coords, shares = (values[:end].cpu() for values in (batch["tokens"], batch["coords"], attention))
    attention_sheet(path, token_volume(tokens, coords, size), token_map(shares.mean(1), coords, size), 4,
                    batch["series"][0])


@torch.no_grad()
def evaluate_mil(task, model, loader, device, interrupts):
    """(figures, one series for the sample picture); None when the run was asked to stop meanwhile."""
    model.eval()
    metrics, rows = StudyMetrics(C.MIL_LOSS, task.names), []
    for i, batch in enumerate(progress_bar(loader, "validation")):
        if distributed.any_rank([interrupts.stop])[0]:
            return None
        batch = to_device(batch, device, STAY)
        with autocast(device, C.PRECISION):
            _, (logits, attention) = task.compute(model, batch)
        if loader.batch_sampler.real(i):
            metrics.update(logits, batch["labels"])
            rows = rows or [(batch, attention)]
    metrics.reduce()
    loss = task.loss(metrics.logits, metrics.labels).item()         # whatever the batches are
    return {"loss": loss, **metrics.compute()}, rows if C.SAMPLES_PER_EPOCH else []


TASKS = {"mil": build_mil}
STAY = ("cu_seqlens", "study_cu_seqlens")          # on the CPU, so that a GPU waits for none


# ------------------------------------------------------------------- training

def parse_args():
    parser = config.training_parser(__doc__)
    parser.add_argument("--task", required=True, choices=TASKS, help="what is learnt")
    return parser.parse_args()


def build_optimization(task, model, total_steps, steps_per_epoch):
    """(optimizer, scheduler): each part of the network has its own rate; what is frozen is left out."""
    module, groups = distributed.unwrap(model), []
    for name, (lr, weight_decay) in task.parameters.items():
        part = getattr(module, name)
        groups += [{**group, "lr": lr}
                   for group in parameter_groups(part, weight_decay, C.NO_DECAY_NORM_BIAS)]
    optimizer = build_optimizer(C.OPTIMIZER, groups, groups[0]["lr"], 0.0, C.ADAM_BETAS, C.MOMENTUM)
    scheduler = build_scheduler(
        optimizer, total_steps=total_steps, steps_per_epoch=steps_per_epoch,
        pct_start=C.ONECYCLE_PCT_START, div_factor=C.ONECYCLE_DIV_FACTOR,
        final_div_factor=C.ONECYCLE_FINAL_DIV_FACTOR, num_cycles=C.NUM_CYCLES,
        step_size=C.STEP_SIZE, step_unit=C.STEP_UNIT, gamma=C.STEP_GAMMA,
        t0=C.RESTART_T0, t0_unit=C.RESTART_T0_UNIT, t_mult=C.RESTART_T_MULT,
        eta_min=task.schedule["final_lr"], **task.schedule)
    return optimizer, scheduler


def main():
    args = parse_args()
    config.apply_preset(C, args.preset)
    config.apply_overrides(C, args.set)
    device = distributed.setup_distributed()
    torch.manual_seed(C.SEED)
    run_dir, checkpoint = open_run(C.RUNS_DIR, args.save_name, args.checkpoint, args.task)
    interrupts = Interrupts(C.CHECKPOINT_MINUTES)

    # Data and model
    data, task = TASKS[args.task](args, None if checkpoint else args.init)
    if not checkpoint and not args.init and distributed.is_main():
        print("No --init: the network starts from random weights")
    train_loader, val_loader = (
        build_loader(part, part.groups(), task.batch_size, part is task.train_set, task.collate)
        for part in (task.train_set, task.val_set))
    sampler = train_loader.batch_sampler
    epochs = 1 if args.fast_dev_run else task.epochs
    steps = [math.ceil(sampler.length(epoch) / task.every) for epoch in range(1, epochs + 1)]
    total_steps = sum(steps)
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    model = distributed.shard(task.model.to(device), C.STRATEGY)
    optimizer, scheduler = build_optimization(task, model, total_steps, round(total_steps / epochs))
    scaler = torch.amp.GradScaler(device.type, enabled=C.PRECISION == "fp16")
    ema = EMA(model, C.EMA_DECAY, C.EMA_WARMUP) if C.USE_EMA else None

    # Resume
    first_epoch, first_batch, step, best, history, running, bad_files = 1, 0, 0, None, [], {}, set()
    torch.manual_seed(C.SEED + distributed.rank())                  # dropout differs between ranks
    if checkpoint is not None:
        states.load_model_state(model, checkpoint["model_state_dict"])
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        states.load_optimizer_state(model, optimizer, checkpoint["optimizer_state_dict"])
        scaler.load_state_dict(checkpoint["scaler_state_dict"])
        if ema is not None:
            ema.load_state_dict(checkpoint["ema_state_dict"])
        if checkpoint["names"] != task.names:
            raise config.UserError(f"the checkpoint is for {', '.join(checkpoint['names'])}, the labels for "
                                   f"{', '.join(task.names)}; resume with the labels of the run")
        step, best, history = checkpoint["step"], checkpoint["best"], checkpoint["history"]
        batches = sampler.length(checkpoint["epoch"])
        first_epoch, first_batch = resume_position(checkpoint, batches, task.every)
        share = first_batch / max(1, checkpoint["batch_in_epoch"])       # 1, unless batches are others now
        running = {name: share * value.to(device) for name, value in checkpoint["running"].items()}
        states.restore_rng_state(checkpoint["rng_state"])
        changed = config.changed_constants(C, checkpoint["constants"])
        if changed or checkpoint["total_steps"] != total_steps:
            go_to_step(scheduler, settings, sum(steps[:first_epoch - 1], -(-first_batch // task.every)))
        else:
            scheduler.load_state_dict(checkpoint["scheduler_state_dict"])
        if distributed.is_main():
            print("".join(f"Changed since the checkpoint: {change}\n" for change in changed), end="")
    if C.COMPILE:
        model.compile()

    trackers = None
    if distributed.is_main():
        trackers = Trackers(C.TRACKERS, run_dir, config.hyperparameters(C), step)
        config.write_training_params(
            run_dir, C, preset=args.preset, overrides=args.set, kind=task.kind,
            data=str(data), train_items=len(task.train_set), val_items=len(task.val_set),
            world_size=distributed.world_size(), device=str(device), parameters=parameters,
            effective_batch=task.batch_size * task.every * distributed.world_size(),
            steps_per_epoch=steps[0], total_steps=total_steps)

    def save_last(epoch, batch_in_epoch, train_loss=None, val_loss=None):
        """Write <kind>_last.pt.  All ranks gather the state, the main one writes it."""
        entries = {
            "kind": task.kind, "epoch": epoch, "batch_in_epoch": batch_in_epoch,
            "num_batches": sampler.length(epoch), "total_steps": total_steps, "step": step, "best": best,
            "train_loss": train_loss, "val_loss": val_loss, "history": history,
            "running": {name: distributed.all_reduce_mean(value) for name, value in running.items()},
            "model_state_dict": states.model_state(model),
            "ema_state_dict": ema.state_dict() if ema is not None else None, "names": task.names,
            "optimizer_state_dict": states.optimizer_state(model, optimizer),
            "scheduler_state_dict": scheduler.state_dict(), "scaler_state_dict": scaler.state_dict(),
            "rng_state": states.gather_rng_state(), "constants": config.hyperparameters(C)}
        if distributed.is_main():
            save_checkpoint(run_dir / f"{task.kind}_last.pt", **entries)
        interrupts.saved()

    def stop(epoch, batch_in_epoch):
        """Save, and end the process as SIGTERM would have."""
        save_last(epoch, batch_in_epoch)
        if distributed.is_main():
            trackers.close()
            print(f"Stopped at epoch {epoch}, batch {batch_in_epoch}/{num_batches}; resume with -c auto")
        distributed.cleanup()
        sys.exit(128 + signal.SIGTERM)

    # Train
    for epoch in range(first_epoch, epochs + 1):
        started, num_batches = time.monotonic(), sampler.length(epoch)
        if distributed.is_main():
            print(f"Epoch {epoch}/{epochs}")
        model.train()
        task.train_set.set_epoch(epoch)
        sampler.set_position(epoch, first_batch)
        group_loss, group_items = torch.zeros((), device=device), []
        batches = progress_bar(train_loader, f"epoch {epoch}", first_batch)
        for i, batch in enumerate(batches, start=first_batch):
            size, is_last = accumulation_group(i, num_batches, task.every)
            batch = to_device(batch, device, STAY)

            # Gradients travel between ranks only on the last micro-batch of a group.
            with distributed.gradient_sync(model, is_last):
                with autocast(device, C.PRECISION):
                    loss, _ = task.compute(model, batch)
                scaler.scale(loss / size).backward()
            running["loss"] = running.get("loss", 0) + loss.detach()
            group_loss, group_items = group_loss + loss.detach(), group_items + batch["study"]
            bad_files.update(filter(None, batch["bad_files"]))
            if distributed.is_main() and (i + 1) % C.LOG_EVERY_BATCHES == 0:
                means = {name: value.item() / (i + 1) for name, value in running.items()}
                tqdm.write(batch_line(i + 1, num_batches, means))
            if not is_last:
                continue

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

        # Validate with the averaged weights
        with ema.applied() if ema is not None else nullcontext():
            result = task.evaluate(task, model, val_loader, device, interrupts)
        if result is None:
            stop(epoch, num_batches)
        values, rows = result
        train_means = {name: distributed.all_reduce_mean(value / num_batches).item()
                       for name, value in running.items()}

        # Log and save
        row = {"epoch": epoch, "step": step, "lr": optimizer.param_groups[0]["lr"],
               **{f"train/{name}": value for name, value in train_means.items()},
               **{f"val/{name}": value for name, value in values.items()}}
        history.append(row)
        better = is_better(row, best, *task.monitor)
        best = row[task.monitor[0]] if better else best
        running, first_batch = {}, 0
        save_last(epoch, num_batches, row["train/loss"], row["val/loss"])
        if distributed.is_main():
            kept = keep_checkpoint(run_dir, task.kind, history, better, C.KEEP_TOP_K, C.SAVE_EVERY_EPOCHS,
                                   *task.monitor)
            write_history(run_dir, history)
            if rows:
                task.draw(run_dir / "samples" / f"epoch_{epoch}.png", rows)
            trackers.log(row, step)
            print(f"{epoch_line(row)} ({time.monotonic() - started:.0f} s)")
            print(f"Saved checkpoint: {kept}")

    if distributed.is_main():
        trackers.close()
        if bad_files:
            print(f"Skipped {len(bad_files)} bad files: {', '.join(sorted(bad_files))}")
        print(f"Done: {run_dir}")
    distributed.cleanup()


if __name__ == "__main__":
    config.run_script(main)
