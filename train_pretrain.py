"""Pretrain a backbone without labels.

    python train_pretrain.py --method jepa -p brain_demo -n brain            # demo studies, made on first use
    python train_pretrain.py --method jepa -n brain --data data/cache        # cached by prepare_data.py cache
    python train_pretrain.py --method jepa -n brain --data data/cache -c auto                      # resume
    python train_pretrain.py --method jepa -n stage2 --data data/other --init runs/brain/jepa_last.pt
    torchrun --nproc_per_node=4 train_pretrain.py --method jepa -n brain --data data/cache --set STRATEGY=fsdp

--method jepa   Vol-JEPA on brain MRI and CT: a student sees a part of each series and predicts what a
                teacher, its moving average, makes of the rest.  Settings: constants.py, sections 12 to 17.
"""

import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn as nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import constants as C
from datasets.block_mask import VolumeBlockMask, mask_ratios
from datasets.cache import read_cache
from datasets.labels import read_labels
from datasets.samplers import StudyAwareBatchSampler
from datasets.studies import StudyDataset, ragged_collate, split_studies
from losses.jepa import jepa_loss
from models.jepa import Predictor, VolJEPA, teacher_targets
from models.token_vit import TokenViT
from prepare_data import study_paths
from utils import config, distributed, states
from utils.checkpoint import load_backbone, save_checkpoint
from utils.collapse import feature_statistics
from utils.device import autocast, to_device
from utils.ema import make_teacher, update_teacher_
from utils.history import Trackers, batch_line, epoch_line, progress_bar, write_history
from utils.interrupts import Interrupts, leave_to_parent
from utils.mask_sheet import mask_rows, mask_sheet
from utils.optim import build_optimizer, parameter_groups
from utils.runs import check_finite, is_better, keep_checkpoint, open_run, resume_position
from utils.schedules import accumulation_group, build_scheduler, go_to_step, teacher_momentum
from utils.study_probe import probe_studies


@dataclass
class Method:
    """What the training loop needs to know of a method; each build function below fills one."""

    kind: str                     # names the checkpoints
    model: nn.Module              # what is trained
    teacher: nn.Module | None     # what follows it and makes the targets, saved beside it
    train_set: Dataset
    val_set: Dataset
    collate: Callable
    compute: Callable             # (model, teacher, batch) -> (loss, dict of other figures), 0-dim tensors
    follow: Callable              # (model, teacher, step, total steps): after each optimizer step
    evaluate: Callable            # (model, teacher, loader, device, interrupts, epoch): (dict, rows) or None
    draw: Callable                # (path, rows): the sample picture of an epoch
    train_groups: list            # indices of the training set that stay together in a batch
    epochs: int
    batch_size: int
    every: int                    # micro-batches per optimizer step
    lr: float
    weight_decay: float
    no_decay: bool                # on biases and normalisation layers
    schedule: dict = field(default_factory=dict)      # arguments of build_scheduler
    monitor: tuple = ("val/loss", "min")


# ---------------------------------------------------------------- JEPA on brain studies

def build_jepa(args, init):
    """Student, predictor and teacher on cached studies (Vol-JEPA; Assran et al. 2023, arXiv:2301.08243)."""
    data, labels = study_paths(args.data)
    splits = split_studies(read_cache(data), C.STUDY_VAL_FRACTION, C.STUDY_TEST_FRACTION,
                           C.STUDY_SPLIT_CSV or None)
    if args.fast_dev_run:
        splits = {name: studies[:distributed.world_size()] for name, studies in splits.items()}
    options = {"windows": "all" if C.JEPA_STUDY_SAMPLER else "sample",
               "mask": VolumeBlockMask(C.JEPA_TARGET_SHARE, C.JEPA_CONTEXT_CEILING, C.JEPA_ASPECT,
                                       C.JEPA_DROP_RATE, context_range=C.JEPA_CONTEXT_RANGE)}
    train_set = study_set(splits["train"], True, random_crop=C.JEPA_RANDOM_CROP, **options)
    model = build_vol_jepa(init, args.remove_prefix)
    probe = None
    if labels and C.JEPA_PROBE_EVERY:
        whole = [study_set(splits[name], False, windows="all") for name in ("train", "val")]
        probe = [build_loader(part, part.groups(), C.JEPA_BATCH_SIZE, False, ragged_collate)
                 for part in whole] + [read_labels(labels, "bce").values]

    def evaluate(model, teacher, loader, device, interrupts, epoch):
        """Validation loss, signs of collapse, and now and then what the frozen teacher knows."""
        result = evaluate_jepa(model, teacher, loader, device, interrupts)
        if result and probe and (epoch == 1 or epoch % C.JEPA_PROBE_EVERY == 0):
            result[0].update(probe_studies(teacher, *probe, device, C.PRECISION))
        return result

    effective = C.JEPA_BATCH_SIZE * C.JEPA_UPDATE_EVERY_BATCHES * distributed.world_size()
    scale = effective / 256 if C.JEPA_SCALE_LR else 1.0
    return data, Method(
        kind="jepa", model=model, teacher=make_teacher(model.encoder), collate=ragged_collate,
        train_set=train_set, val_set=study_set(splits["val"], False, **options),
        train_groups=train_set.groups() if C.JEPA_STUDY_SAMPLER else [[i] for i in range(len(train_set))],
        compute=jepa_step, follow=follow_student, evaluate=evaluate, draw=mask_sheet,
        epochs=C.JEPA_EPOCHS, batch_size=C.JEPA_BATCH_SIZE, every=C.JEPA_UPDATE_EVERY_BATCHES,
        lr=C.JEPA_LR * scale,
        weight_decay=C.JEPA_WEIGHT_DECAY, no_decay=C.JEPA_NO_DECAY_NORM_BIAS,
        schedule={"name": C.JEPA_SCHEDULE, "warmup": C.JEPA_WARMUP_STEPS, "ipe_scale": C.JEPA_IPE_SCALE,
                  "start_lr": C.JEPA_START_LR * scale, "final_lr": C.JEPA_FINAL_LR * scale},
        monitor=(C.JEPA_MONITOR, C.JEPA_MONITOR_MODE))


def build_vol_jepa(init, remove_prefix):
    """Student and predictor, with the weights of the file ``init`` if there is one."""
    encoder = build_token_vit()
    predictor = Predictor(encoder.dim, C.JEPA_PREDICTOR_DIM, C.JEPA_PREDICTOR_DEPTH, C.JEPA_PREDICTOR_HEADS,
                          dropout=C.STUDY_DROPOUT, drop_path=C.STUDY_DROP_PATH, attention=C.STUDY_ATTENTION,
                          checkpoint_activations=C.ACTIVATION_CHECKPOINTING)
    if init:
        matched, unmatched = load_backbone(encoder, init, remove_prefix)
        own, _ = load_backbone(predictor, init, "predictor.", minimum=0.0, prefer=("model_state_dict",))
        if distributed.is_main():
            print(f"--init {init}: {len(matched)} weights of the encoder matched, {len(unmatched)} not "
                  f"{unmatched[:5]}; {len(own)} of the predictor")
    return VolJEPA(encoder, predictor)


def follow_student(model, teacher, step, total_steps):
    """The teacher moves towards the student."""
    momentum = teacher_momentum(step, total_steps, *C.JEPA_TEACHER_MOMENTUM, C.JEPA_IPE_SCALE)
    update_teacher_(teacher, distributed.unwrap(model).encoder, momentum)


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


def jepa_predict(model, teacher, batch):
    """(what the student predicts from the context, what the teacher says) at the target tokens, [Tt, E]."""
    targets = teacher_targets(teacher, batch["tokens"], batch["coords"], batch["foreground"],
                              batch["target"], batch["cu_seqlens"])
    pred = model(batch["tokens"], batch["coords"], batch["context"], batch["target"], batch["cu_seqlens"])
    return pred, targets


def jepa_step(model, teacher, batch):
    """(loss, figures): smooth L1 between prediction and teacher, and the shares that the masks reach."""
    return jepa_loss(*jepa_predict(model, teacher, batch)), mask_ratios(batch)


@torch.no_grad()
def evaluate_jepa(model, teacher, loader, device, interrupts):
    """(figures, rows of the sample picture); None when the run was asked to stop meanwhile."""
    model.eval()
    sums, count, features, rows = {}, 0, [], []
    for i, batch in enumerate(progress_bar(loader, "validation")):
        if distributed.any_rank([interrupts.stop])[0]:
            return None
        batch = to_device(batch, device, STAY)
        with autocast(device, C.PRECISION):
            pred, targets = jepa_predict(model, teacher, batch)
        series = len(batch["series"]) if loader.batch_sampler.real(i) else 0
        for name, value in {"loss": jepa_loss(pred, targets), **mask_ratios(batch)}.items():
            sums[name] = sums.get(name, 0) + value * series
        count += series
        features.append(targets[::max(1, len(targets) * len(loader) // 4096)])       # some thousand in all
        if series and len(rows) < C.SAMPLES_PER_EPOCH:
            rows += mask_rows(batch, (pred.float() - targets).abs().mean(1))
    count = distributed.all_reduce_sum(torch.tensor(float(count), device=device)).item()
    values = {name: distributed.all_reduce_sum(value).item() / count for name, value in sums.items()}
    for name, value in feature_statistics(torch.cat(features)).items():
        values[f"teacher_{name}"] = distributed.all_reduce_mean(torch.tensor(value, device=device)).item()
    return values, rows[:C.SAMPLES_PER_EPOCH]


METHODS = {"jepa": build_jepa}
STAY = ("context", "target", "foreground", "cu_seqlens")          # on the CPU, so that a GPU waits for none


# ------------------------------------------------------------------- training

def parse_args():
    parser = config.training_parser(__doc__)
    parser.add_argument("--method", required=True, choices=METHODS, help="how the backbone learns")
    return parser.parse_args()


def build_loader(dataset, groups, batch_size, shuffle, collate):
    """Loader of this rank's batches.  Its own generator keeps it from drawing on the global random state."""
    sampler = StudyAwareBatchSampler(groups, batch_size, shuffle, C.SEED, distributed.rank(),
                                     distributed.world_size())
    return DataLoader(dataset, batch_sampler=sampler, num_workers=C.NUM_WORKERS, collate_fn=collate,
                      pin_memory=torch.cuda.is_available(), worker_init_fn=leave_to_parent,
                      generator=torch.Generator())


def build_optimization(method, model, total_steps, steps_per_epoch):
    """(optimizer, scheduler) of what is trained."""
    groups = parameter_groups(model, method.weight_decay, method.no_decay, ("mask_token",))
    optimizer = build_optimizer(C.OPTIMIZER, groups, method.lr, method.weight_decay, C.ADAM_BETAS, C.MOMENTUM)
    scheduler = build_scheduler(
        optimizer, total_steps=total_steps, steps_per_epoch=steps_per_epoch,
        pct_start=C.ONECYCLE_PCT_START, div_factor=C.ONECYCLE_DIV_FACTOR,
        final_div_factor=C.ONECYCLE_FINAL_DIV_FACTOR, num_cycles=C.NUM_CYCLES,
        step_size=C.STEP_SIZE, step_unit=C.STEP_UNIT, gamma=C.STEP_GAMMA,
        t0=C.RESTART_T0, t0_unit=C.RESTART_T0_UNIT, t_mult=C.RESTART_T_MULT,
        eta_min=method.schedule["final_lr"], **method.schedule)
    return optimizer, scheduler


def main():
    args = parse_args()
    config.apply_preset(C, args.preset)
    config.apply_overrides(C, args.set)
    device = distributed.setup_distributed()
    torch.manual_seed(C.SEED)
    run_dir, checkpoint = open_run(C.RUNS_DIR, args.save_name, args.checkpoint, args.method)
    interrupts = Interrupts(C.CHECKPOINT_MINUTES)

    # Data and model
    data, method = METHODS[args.method](args, None if checkpoint else args.init)
    size, collate, singles = method.batch_size, method.collate, [[i] for i in range(len(method.val_set))]
    train_loader = build_loader(method.train_set, method.train_groups, size, True, collate)
    val_loader = build_loader(method.val_set, singles, size, False, collate)
    sampler = train_loader.batch_sampler
    epochs = 1 if args.fast_dev_run else method.epochs
    steps = [math.ceil(sampler.length(epoch) / method.every) for epoch in range(1, epochs + 1)]
    total_steps = sum(steps)
    parameters = sum(parameter.numel() for parameter in method.model.parameters())
    model = distributed.shard(method.model.to(device), C.STRATEGY)
    teacher = method.teacher and distributed.shard(method.teacher.to(device), C.STRATEGY)
    optimizer, scheduler = build_optimization(method, model, total_steps, round(total_steps / epochs))
    scaler = torch.amp.GradScaler(device.type, enabled=C.PRECISION == "fp16")

    # Resume
    first_epoch, first_batch, step, best, history, running, bad_files = 1, 0, 0, None, [], {}, set()
    torch.manual_seed(C.SEED + distributed.rank())                  # dropout differs between ranks
    if checkpoint is not None:
        states.load_model_state(model, checkpoint["model_state_dict"])
        if teacher is not None:
            states.load_model_state(teacher, checkpoint["teacher_state_dict"])
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        states.load_optimizer_state(model, optimizer, checkpoint["optimizer_state_dict"])
        scaler.load_state_dict(checkpoint["scaler_state_dict"])
        step, best, history = checkpoint["step"], checkpoint["best"], checkpoint["history"]
        batches = sampler.length(checkpoint["epoch"])
        first_epoch, first_batch = resume_position(checkpoint, batches, method.every)
        share = first_batch / max(1, checkpoint["batch_in_epoch"])       # 1, unless batches are others now
        running = {name: share * value.to(device) for name, value in checkpoint["running"].items()}
        states.restore_rng_state(checkpoint["rng_state"])
        changed = config.changed_constants(C, checkpoint["constants"])
        if changed or checkpoint["total_steps"] != total_steps:
            go_to_step(scheduler, settings, sum(steps[:first_epoch - 1], -(-first_batch // method.every)))
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
            run_dir, C, preset=args.preset, overrides=args.set, kind=method.kind,
            data=str(data), train_items=len(method.train_set), val_items=len(method.val_set),
            world_size=distributed.world_size(), device=str(device), parameters=parameters,
            effective_batch=method.batch_size * method.every * distributed.world_size(),
            steps_per_epoch=steps[0], total_steps=total_steps)

    def save_last(epoch, batch_in_epoch, train_loss=None, val_loss=None):
        """Write <kind>_last.pt.  All ranks gather the state, the main one writes it."""
        entries = {
            "kind": method.kind, "epoch": epoch, "batch_in_epoch": batch_in_epoch,
            "num_batches": sampler.length(epoch), "total_steps": total_steps, "step": step, "best": best,
            "train_loss": train_loss, "val_loss": val_loss, "history": history,
            "running": {name: distributed.all_reduce_mean(value) for name, value in running.items()},
            "model_state_dict": states.model_state(model),
            "teacher_state_dict": None if teacher is None else states.model_state(teacher),
            "optimizer_state_dict": states.optimizer_state(model, optimizer),
            "scheduler_state_dict": scheduler.state_dict(), "scaler_state_dict": scaler.state_dict(),
            "rng_state": states.gather_rng_state(), "constants": config.hyperparameters(C)}
        if distributed.is_main():
            save_checkpoint(run_dir / f"{method.kind}_last.pt", **entries)
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
        method.train_set.set_epoch(epoch)
        sampler.set_position(epoch, first_batch)
        group_loss, group_items = torch.zeros((), device=device), []
        batches = progress_bar(train_loader, f"epoch {epoch}", first_batch)
        for i, batch in enumerate(batches, start=first_batch):
            size, is_last = accumulation_group(i, num_batches, method.every)
            batch = to_device(batch, device, STAY)

            # Gradients travel between ranks only on the last micro-batch of a group.
            with distributed.gradient_sync(model, is_last):
                with autocast(device, C.PRECISION):
                    loss, figures = method.compute(model, teacher, batch)
                scaler.scale(loss / size).backward()
            for name, value in {"loss": loss, **figures}.items():
                running[name] = running.get(name, 0) + value.detach()
            group_loss, group_items = group_loss + loss.detach(), group_items + batch["series"]
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
            method.follow(model, teacher, scheduler.last_epoch - 1, total_steps)
            step += 1
            group_loss, group_items = torch.zeros((), device=device), []

            stop_now, save_now = distributed.any_rank([interrupts.stop, interrupts.save])
            if stop_now:
                stop(epoch, i + 1)
            if save_now:
                save_last(epoch, i + 1)

        # Validate
        result = method.evaluate(model, teacher, val_loader, device, interrupts, epoch)
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
        better = is_better(row, best, *method.monitor)
        best = row[method.monitor[0]] if better else best
        running, first_batch = {}, 0
        save_last(epoch, num_batches, row["train/loss"], row["val/loss"])
        if distributed.is_main():
            kept = keep_checkpoint(run_dir, method.kind, history, better, C.KEEP_TOP_K, C.SAVE_EVERY_EPOCHS,
                                   *method.monitor)
            write_history(run_dir, history)
            if rows:
                method.draw(run_dir / "samples" / f"epoch_{epoch}.png", rows)
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
