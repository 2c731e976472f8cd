"""Pretrain a backbone without labels.

    python train_pretrain.py --method jepa -p brain_demo -n brain            # demo studies, made on first use
    python train_pretrain.py --method jepa -n brain --data data/cache        # cached by prepare_data.py cache
    python train_pretrain.py --method jepa -n brain --data data/cache -c auto                      # resume
    python train_pretrain.py --method jepa -n stage2 --data data/other --init runs/brain/jepa_last.pt
    torchrun --nproc_per_node=4 train_pretrain.py --method jepa -n brain --data data/cache --set STRATEGY=fsdp

    python train_pretrain.py --method simclr -p leaf_demo -n leaves          # demo leaves, made on first use

--method jepa   Vol-JEPA on brain MRI and CT: a student sees a part of each series and predicts what a
                teacher, its moving average, makes of the rest.
--method simclr   photographs: two random views of an image shall be told from those of all others.  Data:
                photographs in any folders, or a CSV; classes are used to probe alone.
Settings: constants.py, sections 1 to 3, for jepa 12 to 17, simclr 25 to 27.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import builders
import constants as C
from datasets.block_mask import mask_ratios
from datasets.cache import read_cache
from datasets.labels import read_labels
from datasets.photo_augment import normalise
from datasets.studies import ragged_collate, split_studies
from losses.jepa import jepa_loss
from losses.nt_xent import nt_xent_loss
from models.jepa import VolJEPA, teacher_targets
from models.simclr import SimCLR
from utils import config, distributed, states
from utils.checkpoint import load_backbone, save_checkpoint
from utils.collapse import feature_statistics
from utils.device import autocast, gradient_scaler, to_device
from utils.ema import make_teacher, update_teacher_
from utils.history import Trackers, batch_line, epoch_line, progress_bar, say_end, write_history
from utils.interrupts import Interrupts
from utils.mask_sheet import mask_rows, mask_sheet
from utils.optim import parameter_groups
from utils.photo_probe import probe_photos
from utils.photo_sheet import photo_sheet, view_rows
from utils.runs import best_row, check_finite, keep_checkpoint, monitored, open_run, own_sums, resume_position
from utils.schedules import accumulation_group, go_to_step, teacher_momentum
from utils.study_probe import probe_studies
from utils.tables import first_of


@dataclass
class Method:
    """What the training loop needs to know of a method; each build function below fills one."""

    kind: str                     # names the checkpoints
    model: nn.Module              # what is trained
    teacher: nn.Module | None     # what follows it and makes the targets, saved beside it
    train_loader: DataLoader
    val_loader: DataLoader
    item: str                     # the batch's entry that names its items
    compute: Callable             # (model, teacher, batch) -> (loss, dict of other figures, outputs)
    follow: Callable              # (model, teacher, step, total steps): after each optimizer step
    features: tuple               # (name, outputs -> [n, E]): what must not collapse
    rows: Callable                # (batch, outputs) -> rows of the sample picture
    draw: Callable                # (path, rows): the sample picture of an epoch
    probe: Callable | None        # (model, teacher, device) -> dict of what frozen features know
    probe_every: int              # epochs
    epochs: int
    every: int                    # micro-batches per optimizer step
    parameters: Callable          # model -> parameter groups with their peak rates
    schedule: dict                # arguments of build_scheduler
    monitor: tuple                # metric of the best checkpoint, "min" | "max"


# ---------------------------------------------------------------- JEPA on brain studies

def build_jepa(args, run_dir, resumed):
    """Student, predictor and teacher on cached studies (Vol-JEPA; Assran et al. 2023, arXiv:2301.08243)."""
    data, labels = builders.study_paths(args.data)
    splits = split_studies(read_cache(data), C.STUDY_VAL_FRACTION, C.STUDY_TEST_FRACTION,
                           C.STUDY_SPLIT_CSV or None, C.STUDY_PATIENTS)
    splits = builders.say_splits(builders.thin(splits, 1) if args.fast_dev_run else splits, "studies")
    options = {"windows": "all" if C.JEPA_STUDY_SAMPLER else "sample", "mask": builders.build_study_mask()}
    train_set = builders.study_set(splits["train"], True, random_crop=C.JEPA_RANDOM_CROP, **options)
    val_set = builders.study_set(splits["val"], False, **options)
    groups = train_set.groups() if C.JEPA_STUDY_SAMPLER else None
    encoder = builders.build_token_vit()
    predictor = builders.build_predictor(encoder.dim)
    if not resumed:
        start_jepa(encoder, predictor, args.init, args.remove_prefix)
    probe = None
    if labels and C.JEPA_PROBE_EVERY:
        whole = [builders.study_set(splits[name], False, windows="all") for name in ("train", "val")]
        loaders = [builders.build_loader(part, part.groups(), C.JEPA_BATCH_SIZE, False, ragged_collate)
                   for part in whole]
        answers = read_labels(labels, "bce").values

        def probe(model, teacher, device):
            return probe_studies(teacher, *loaders, answers, device, C.PRECISION)

    effective = C.JEPA_BATCH_SIZE * C.JEPA_UPDATE_EVERY_BATCHES * distributed.world_size()
    scale = effective / 256 if C.JEPA_SCALE_LR else 1.0

    def parameters(model):
        groups = parameter_groups(model, C.JEPA_WEIGHT_DECAY, C.JEPA_NO_DECAY_NORM_BIAS, ("mask_token",))
        return [{**group, "lr": C.JEPA_LR * scale} for group in groups]

    return data, Method(
        kind="jepa", model=VolJEPA(encoder, predictor), teacher=make_teacher(encoder), item="series",
        train_loader=builders.build_loader(train_set, groups, C.JEPA_BATCH_SIZE, True, ragged_collate),
        val_loader=builders.build_loader(val_set, None, C.JEPA_BATCH_SIZE, False, ragged_collate),
        compute=jepa_step, follow=follow_student, features=("teacher", lambda outputs: outputs[1]),
        rows=lambda batch, outputs: mask_rows(batch, (outputs[0].float() - outputs[1]).abs().mean(1)),
        draw=mask_sheet, probe=probe, probe_every=C.JEPA_PROBE_EVERY,
        epochs=C.JEPA_EPOCHS, every=C.JEPA_UPDATE_EVERY_BATCHES, parameters=parameters,
        schedule={"name": C.JEPA_SCHEDULE, "warmup": C.JEPA_WARMUP_STEPS, "ipe_scale": C.JEPA_IPE_SCALE,
                  "start_lr": C.JEPA_START_LR * scale, "final_lr": C.JEPA_FINAL_LR * scale},
        monitor=monitored(C.JEPA_MONITOR, C.JEPA_MONITOR_MODE))


def start_jepa(encoder, predictor, init, remove_prefix):
    """Fill both from the run of --init; of another stage only the encoder must match."""
    if not init:
        return builders.start_from(encoder, init, remove_prefix)
    matched, unmatched = load_backbone(encoder, init, remove_prefix)
    own, _ = load_backbone(predictor, init, "predictor.", minimum=0.0, prefer=("model_state_dict",))
    distributed.say(f"--init {init}: {len(matched)} weights of the encoder matched, {len(unmatched)} not"
                    f"{first_of(unmatched)}; {len(own)} of the predictor")


def jepa_step(model, teacher, batch):
    """(loss, figures, outputs): smooth L1 between what the student predicts from the context and what the
    teacher says at the target tokens, both [Tt, E]; the shares that the masks reach.
    """
    targets = teacher_targets(teacher, batch["tokens"], batch["coords"], batch["foreground"],
                              batch["target"], batch["cu_seqlens"])
    pred = model(batch["tokens"], batch["coords"], batch["context"], batch["target"], batch["cu_seqlens"])
    return jepa_loss(pred, targets), mask_ratios(batch), (pred, targets)


def follow_student(model, teacher, step, total_steps):
    """The teacher moves towards the student."""
    momentum = teacher_momentum(step, total_steps, *C.JEPA_TEACHER_MOMENTUM, C.JEPA_IPE_SCALE)
    update_teacher_(teacher, distributed.unwrap(model).encoder, momentum)


# ------------------------------------------------------- SimCLR on photographs

def build_simclr(args, run_dir, resumed):
    """Backbone and projection on two views of each photograph (Chen et al. 2020, arXiv:2002.05709)."""
    if C.HVIT_SPECTRAL_CHANNELS:
        raise config.UserError(f"HVIT_SPECTRAL_CHANNELS = {C.HVIT_SPECTRAL_CHANNELS}: SimCLR learns from "
                               "colour images alone; set it to 0")
    data, _, splits = builders.photo_splits(args, run_dir, resumed, labelled=False)
    train_loader, val_loader = builders.photo_loaders(splits, C.SIMCLR_BATCH_SIZE, args.fast_dev_run)
    still_loader = builders.still_loader(train_loader)
    backbone = builders.build_photo_network(0, start=not resumed)
    if not resumed and (args.init or not C.HVIT_WEIGHTS):
        builders.start_from(backbone, args.init, args.remove_prefix)
    labelled = all(any(photo.label >= 0 for photo in splits[name]) for name in ("train", "val"))
    views = builders.build_views()

    def compute(model, teacher, batch):
        """(loss, figures, outputs): NT-Xent of two views of each photograph; the views and their features."""
        pair = torch.cat(views(batch["image"], batch["seed"]))                            # [2B, 3, S, S]
        projections, features = model(normalise(pair))
        first, second = projections.chunk(2)
        agreement = F.cosine_similarity(first.float(), second.float()).mean()
        return nt_xent_loss(first, second, C.SIMCLR_TEMPERATURE), {"agreement": agreement}, (pair, features)

    def probe(model, teacher, device):
        return probe_photos(lambda images: model(images)[1], still_loader, val_loader, C.HVIT_IMG_SIZE,
                            device, C.PRECISION)

    return data, Method(
        kind="simclr", model=SimCLR(backbone, C.SIMCLR_PROJECTION_DIM), teacher=None, item="case",
        train_loader=train_loader, val_loader=val_loader, compute=compute, follow=lambda *values: None,
        features=("feature", lambda outputs: outputs[1]), rows=view_rows, draw=photo_sheet,
        probe=probe if labelled and C.SIMCLR_PROBE_EVERY else None, probe_every=C.SIMCLR_PROBE_EVERY,
        epochs=C.SIMCLR_EPOCHS, every=C.SIMCLR_UPDATE_EVERY_BATCHES,
        parameters=lambda model: [{**group, "lr": C.SIMCLR_LR} for group in parameter_groups(
            model, C.SIMCLR_WEIGHT_DECAY, C.NO_DECAY_NORM_BIAS, ("position",))],
        schedule={"name": C.SIMCLR_SCHEDULE, "warmup": C.SIMCLR_WARMUP_STEPS,
                  "final_lr": C.SIMCLR_FINAL_LR},
        monitor=("val/probe_accuracy", "max") if labelled and C.SIMCLR_PROBE_EVERY else ("val/loss", "min"))


METHODS = {"jepa": build_jepa, "simclr": build_simclr}
STAY = ("context", "target", "foreground", "cu_seqlens", "seed")  # on the CPU, so that a GPU waits for none


# ------------------------------------------------------------------- training

def parse_args():
    parser = config.training_parser(__doc__)
    parser.add_argument("--method", required=True, choices=METHODS, metavar="METHOD",
                        help=f"how the backbone learns: {', '.join(METHODS)}")
    return parser.parse_args()


@torch.no_grad()
def evaluate(method, model, teacher, device, interrupts):
    """(figures, rows of the sample picture); None when the run was asked to stop meanwhile."""
    model.eval()
    loader, sums, count, features, rows = method.val_loader, {}, 0, [], []
    for i, batch in enumerate(progress_bar(loader, "validation")):
        if distributed.any_rank([interrupts.stop])[0]:
            return None
        batch, real = to_device(batch, device, STAY), loader.batch_sampler.real(i)
        with autocast(device, C.PRECISION):
            loss, figures, outputs = method.compute(model, teacher, batch)
        for name, value in {"loss": loss, **figures}.items():
            sums[name] = sums.get(name, 0) + value * real
        count += real
        watched = method.features[1](outputs)
        features.append(watched[::max(1, len(watched) * len(loader) // 4096)])       # some thousand in all
        if real and len(rows) < C.SAMPLES_PER_EPOCH:
            rows += method.rows(batch, outputs)
    count = distributed.all_reduce_sum(torch.tensor(float(count), device=device)).item()
    values = {name: distributed.all_reduce_sum(value).item() / count for name, value in sums.items()}
    for name, value in feature_statistics(torch.cat(features)).items():
        mean = distributed.all_reduce_mean(torch.tensor(value, device=device)).item()
        values[f"{method.features[0]}_{name}"] = mean
    return values, rows[:C.SAMPLES_PER_EPOCH]


def main():
    args = parse_args()
    config.apply_preset(C, args.preset)
    config.apply_overrides(C, args.set)
    device = distributed.setup_distributed()
    torch.manual_seed(C.SEED)
    run_dir, checkpoint = open_run(C.RUNS_DIR, args.save_name, args.checkpoint, args.method,
                                   args.fast_dev_run)
    interrupts = Interrupts(C.CHECKPOINT_MINUTES)

    # Data and model
    data, method = METHODS[args.method](args, run_dir, checkpoint is not None)
    train_set, sampler = method.train_loader.dataset, method.train_loader.batch_sampler
    epochs = 1 if args.fast_dev_run else method.epochs
    steps = [math.ceil(sampler.length(epoch) / method.every) for epoch in range(1, epochs + 1)]
    total_steps = sum(steps)
    parameters = sum(parameter.numel() for parameter in method.model.parameters())
    model = distributed.shard(method.model.to(device), C.STRATEGY)
    teacher = method.teacher and distributed.shard(method.teacher.to(device), C.STRATEGY)

    # Optimizer
    optimizer, scheduler = builders.build_optimization(
        method.parameters(model), method.schedule, total_steps, round(total_steps / epochs))
    scaler = gradient_scaler(device, C.PRECISION)

    # Resume
    first_epoch, first_batch, step, best, history, running, bad_files = 1, 0, 0, None, [], {}, set()
    torch.manual_seed(C.SEED + distributed.rank())                  # dropout differs between ranks
    if checkpoint is not None:
        changed = config.changed_constants(C, checkpoint["constants"])
        for change in changed:
            distributed.say(f"Changed since the checkpoint: {change}")
        settings = states.load_training_state(checkpoint, model, optimizer, scaler)
        if teacher is not None:
            states.load_model_state(teacher, checkpoint["teacher_state_dict"])
        step, best, history = checkpoint["step"], checkpoint["best"], checkpoint["history"]
        batches = sampler.length(checkpoint["epoch"])
        first_epoch, first_batch = resume_position(checkpoint, batches, method.every)
        share = first_batch / max(1, checkpoint["batch_in_epoch"])       # 1, unless batches are others now
        running = own_sums(checkpoint["running"], share, device)
        if changed or checkpoint["total_steps"] != total_steps:
            done = sum(steps[:first_epoch - 1], -(-first_batch // method.every))
            go_to_step(scheduler, settings, min(done, total_steps))
        else:
            scheduler.load_state_dict(checkpoint["scheduler_state_dict"])
        if distributed.is_main():
            keep_checkpoint(run_dir, method.kind, C.KEEP_TOP_K, C.SAVE_EVERY_EPOCHS, *method.monitor)
    if C.COMPILE:
        model.compile()

    # Record
    trackers = None
    if distributed.is_main():
        trackers = Trackers(C.TRACKERS, run_dir, config.hyperparameters(C), step)
        config.write_training_params(
            run_dir, C, preset=args.preset, overrides=args.set, kind=method.kind,
            data=str(data), train_items=len(train_set), val_items=len(method.val_loader.dataset),
            world_size=distributed.world_size(), device=str(device), parameters=parameters,
            effective_batch=sampler.batch_size * method.every * distributed.world_size(),
            steps_per_epoch=steps[0], total_steps=total_steps)

    def save_last(epoch, batch_in_epoch, train_loss=None, val_loss=None):
        """Write <kind>_last.pt.  All ranks gather the state, the main one writes it."""
        entries = {
            "kind": method.kind, "epoch": epoch, "batch_in_epoch": batch_in_epoch,
            "num_batches": sampler.length(epoch), "total_steps": total_steps, "step": step, "best": best,
            "train_loss": train_loss, "val_loss": val_loss, "history": history,
            "running": distributed.gather({name: value.cpu() for name, value in running.items()}),
            "teacher_state_dict": None if teacher is None else states.model_state(teacher),
            **states.training_state(model, optimizer, scheduler, scaler),
            "constants": config.hyperparameters(C)}
        if distributed.is_main():
            save_checkpoint(run_dir / f"{method.kind}_last.pt", **entries)
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
        started, num_batches = time.monotonic(), sampler.length(epoch)
        distributed.say(f"Epoch {epoch}/{epochs}")
        model.train()
        train_set.set_epoch(epoch)
        sampler.set_position(epoch, first_batch)
        group_loss, group_items = torch.zeros((), device=device), []
        batches = progress_bar(method.train_loader, f"epoch {epoch}", first_batch)
        for i, batch in enumerate(batches, start=first_batch):
            size, is_last = accumulation_group(i, num_batches, method.every)
            batch = to_device(batch, device, STAY)

            # Gradients travel between ranks only on the last micro-batch of a group.
            with distributed.gradient_sync(model, is_last):
                with autocast(device, C.PRECISION):
                    loss, figures, _ = method.compute(model, teacher, batch)
                scaler.scale(loss / size).backward()
            for name, value in {"loss": loss, **figures}.items():
                running[name] = running.get(name, 0) + value.detach()
            group_loss, group_items = group_loss + loss.detach(), group_items + batch[method.item]
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
        result = evaluate(method, model, teacher, device, interrupts)
        if result is None:
            stop(epoch, num_batches)
        values, rows = result
        if method.probe and (epoch == 1 or epoch % method.probe_every == 0):
            values |= method.probe(model, teacher, device)
        train_means = {name: distributed.all_reduce_mean(value / num_batches).item()
                       for name, value in running.items()}

        # Log and save
        row = {"epoch": epoch, "step": step, "train/lr": optimizer.param_groups[0]["lr"],
               **{f"train/{name}": value for name, value in train_means.items()},
               **{f"val/{name}": value for name, value in values.items()}}
        history.append(row)
        best = best_row(history, *method.monitor)[method.monitor[0]]
        running, first_batch = {}, 0
        if distributed.is_main():
            write_history(run_dir, history)
            if rows:
                method.draw(run_dir / "samples" / f"epoch_{epoch}.png", rows)
            trackers.log(row, step)
        save_last(epoch, num_batches, row["train/loss"], row["val/loss"])
        if distributed.is_main():
            kept = keep_checkpoint(run_dir, method.kind, C.KEEP_TOP_K, C.SAVE_EVERY_EPOCHS, *method.monitor)
            print(f"{epoch_line(row)} ({time.monotonic() - started:.0f} s)")
            print(f"Saved checkpoint: {kept}")

    if distributed.is_main():
        trackers.close()
    say_end(run_dir, bad_files, first_epoch <= epochs)
    distributed.cleanup()


if __name__ == "__main__":
    config.run_script(main)
