"""Train a network that segments electron microscopy: classes and instances (Vista2D, Vista3D).

    python train_vista3d.py -p em_demo -n em_demo                           # demo volumes, made on first use
    python train_vista3d.py -p snemi3d -n neurons --data data
    python train_vista3d.py -p snemi3d -n neurons --data data -c auto                     # resume
    python train_vista3d.py -p foundation -n all --data data --init vista3d_weights.pt    # or MONAI's weights
    python train_vista3d.py -p snemi3d -n tokens --data data --init runs/brain/jepa_last.pt \\
        --set VISTA_ENCODER=token_vit
    torchrun --nproc_per_node=4 train_vista3d.py -p foundation -n all --data data --set STRATEGY=fsdp

Presets: em_demo, em_small for a CPU; snemi2d, snemi3d, cremi3d, combine, foundation for a GPU.  Data: the
folders snemi3d, cremi3d, mitoem2, as `prepare_data.py download` brings them, or a volumes.csv that names your
own.
Settings: constants.py, sections 1 to 3 and 20 to 24.
"""

import math
import sys
import time
from contextlib import nullcontext

import torch
from tqdm import tqdm

import builders
import constants as C
from datasets.connectomics import ConnectomicsDataset
from datasets.em_augment import EMAugment
from datasets.em_labels import CLASSES, IGNORE, INSTANCE_CLASSES
from datasets.em_sources import find_sources, notes_on
from datasets.splits import SPLITS
from losses.discriminative import discriminative_loss
from losses.segmentation import check_class_weights, semantic_loss
from models.vista import Vista
from prepare_data import make_em_demo
from utils import config, distributed, states
from utils.agglomeration import segment
from utils.checkpoint import save_checkpoint
from utils.device import autocast, gradient_scaler, to_device
from utils.em_pictures import sheet
from utils.ema import EMA
from utils.history import Trackers, batch_line, epoch_line, progress_bar, say_end, write_history
from utils.instance_metrics import Contingency, SemanticMetrics
from utils.interrupts import Interrupts
from utils.optim import parameter_groups
from utils.runs import (
    best_row,
    check_finite,
    keep_checkpoint,
    monitored,
    open_run,
    own_sums,
    resume_position,
    stale_for,
)
from utils.schedules import accumulation_group, go_to_step

KIND = "vista3d"
SCORES = ("adapted_rand_error", "voi", "voi_split", "voi_merge")


def build_data(data, fast_dev_run):
    """(training loader, validation loader, root folder); of the demo volumes when ``data`` is None."""
    data = builders.data_path(data, make_em_demo, "em")
    sources = find_sources(data, C.VISTA_DATASETS, C.VISTA_VAL_FRACTION, C.VISTA_TEST_FRACTION, C.VISTA_GAP)
    builders.say_splits({split: [z for source in sources if source.split == split
                                 for z in range(*source.sections)] for split in SPLITS}, "sections")
    for note in notes_on(sources, 1 if C.VISTA_SLICES else C.VISTA_PATCH_SIZE[0]):
        distributed.say(note)
    augment = EMAugment(flip=C.VISTA_AUG_FLIP, rotate=C.VISTA_AUG_ROTATE, max_angle=C.VISTA_AUG_ANGLE,
                        elastic=C.VISTA_AUG_ELASTIC, noise=C.VISTA_AUG_NOISE, noise_std=C.VISTA_AUG_NOISE_STD,
                        gamma=C.VISTA_AUG_GAMMA, gamma_range=C.VISTA_AUG_GAMMA_RANGE,
                        contrast=C.VISTA_AUG_CONTRAST, missing=C.VISTA_AUG_MISSING, shift=C.VISTA_AUG_SHIFT,
                        defects=C.VISTA_AUG_DEFECTS, fill={"classes": IGNORE})
    one_batch = C.VISTA_BATCH_SIZE * distributed.world_size() if fast_dev_run else None
    train_set, val_set = (ConnectomicsDataset(
        [source for source in sources if source.split == split], C.VISTA_PATCH_SIZE, train=split == "train",
        crops=one_batch or crops, weights=C.VISTA_DATASET_WEIGHTS, augment=chosen, seed=C.SEED,
        boundary=C.VISTA_BOUNDARY, edge=C.VISTA_WEIGHT_EDGE, bone=C.VISTA_WEIGHT_BONE, slices=C.VISTA_SLICES,
        cache_rate=C.VISTA_CACHE_RATE, on_bad_file=C.ON_BAD_FILE)
        for split, crops, chosen in (("train", C.VISTA_CROPS_PER_EPOCH, augment),
                                     ("val", C.VISTA_VAL_CROPS, None)))
    train_loader, val_loader = (builders.build_item_loader(part, C.VISTA_BATCH_SIZE, False)
                                for part in (train_set, val_set))      # training draws its crops at random
    return train_loader, val_loader, data


def build_model():
    """The network that the constants describe."""
    dims = 2 if C.VISTA_SLICES else 3
    vit = builders.build_token_vit() if C.VISTA_ENCODER == "token_vit" else None
    model = Vista(dims, C.VISTA_ENCODER, C.VISTA_FEATURES, C.VISTA_NUM_CLASSES, C.VISTA_EMBEDDING,
                  C.VISTA_HEAD_WIDTH, C.VISTA_COORDINATES, C.ACTIVATION_CHECKPOINTING, vit)
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    return model.to(memory_format=formats[dims]) if C.CHANNELS_LAST else model


def loss_terms(outputs, batch, class_weights):
    """(loss, dict of its terms) of both heads; scalars, the means over the batch."""
    classes = batch["classes"].masked_fill(batch["classes"] == C.VISTA_IGNORE_INDEX, IGNORE)
    semantic = semantic_loss(outputs["semantic"], classes, batch["meaning"], class_weights,
                             ce_weight=C.VISTA_CE_WEIGHT, dice_weight=C.VISTA_DICE_WEIGHT)
    instance = discriminative_loss(outputs["embedding"], batch["instances"], batch["weight"],
                                   batch["instance_class"] if C.VISTA_PER_CLASS else None,
                                   C.VISTA_DELTA_V, C.VISTA_DELTA_D, batch["count"])
    terms = {"loss_ce": semantic["ce"], "loss_dice": semantic["dice"],
             "loss_pull": instance["pull"], "loss_push": instance["push"], "loss_norm": instance["norm"]}
    terms["loss_sem"] = C.VISTA_CE_WEIGHT * terms["loss_ce"] + C.VISTA_DICE_WEIGHT * terms["loss_dice"]
    terms["loss_ins"] = (C.VISTA_WEIGHT_PULL * terms["loss_pull"] + C.VISTA_WEIGHT_PUSH * terms["loss_push"]
                         + C.VISTA_WEIGHT_NORM * terms["loss_norm"])
    return terms["loss_sem"] + terms["loss_ins"], terms


def find_instances(outputs, spacing_nm):
    """Instances of each crop of a batch, found in the predicted foreground: list of int32 [D, H, W]."""
    found = []
    for logits, embedding, spacing in zip(outputs["semantic"], outputs["embedding"], spacing_nm, strict=True):
        if C.VISTA_SLICES:
            logits, embedding = logits[:, None], embedding[:, None]
        found.append(segment(logits.float().softmax(0), embedding, INSTANCE_CLASSES, C.VISTA_BOUNDARY,
                             C.VISTA_BANDWIDTH, C.VISTA_MIN_INSTANCE, C.VISTA_GROW_NM, spacing.tolist())[0])
    return found


@torch.no_grad()
def evaluate(model, loader, class_weights, device, interrupts):
    """Losses, class metrics and instance metrics of the validation windows, and rows for the sample sheet.

    None when the run was asked to stop meanwhile.  Repeats that make all ranks' shares equal do not count.
    """
    model.eval()
    metrics, losses, count, rows = SemanticMetrics(C.VISTA_NUM_CLASSES, CLASSES), {}, 0, []
    scores = torch.zeros(len(SCORES), 2, dtype=torch.float64)            # sum and count: crops with instances
    for i, batch in enumerate(progress_bar(loader, "validation")):
        if distributed.any_rank([interrupts.stop])[0]:
            return None
        most = int(batch["instances"].max())
        batch = to_device(batch, device)
        with autocast(device, C.PRECISION):
            outputs = model(batch["image"])
        real = loader.batch_sampler.real(i)
        kept = max(real, 1)                    # a rank without a case of its own still takes part in the sums
        outputs, batch = ({key: value[:kept] for key, value in each.items()} for each in (outputs, batch))
        loss, terms = loss_terms(outputs, {**batch, "count": most}, class_weights)
        for name, term in {"loss": loss, **terms}.items():
            losses[name] = losses.get(name, 0) + term.double() * real
        count += real
        if not real:
            continue
        predicted = outputs["semantic"].argmax(1)
        metrics.update(predicted, batch["classes"], batch["meaning"])
        for k, ids in enumerate(find_instances(outputs, batch["spacing_nm"])):
            truth = batch["instances"][k].cpu().numpy()
            if truth.any():
                table = Contingency()
                table.add(ids, truth.reshape(ids.shape))
                figures = table.scores()
                scores += torch.tensor([[figures[name], 1.0] if math.isfinite(figures[name]) else [0.0, 0.0]
                                        for name in SCORES], dtype=torch.float64)
            if len(rows) < C.SAMPLES_PER_EPOCH:
                rows.append({"image": batch["image"][k, 0].cpu(), "classes": batch["classes"][k].cpu(),
                             "instances": batch["instances"][k].cpu(),
                             "predicted_classes": predicted[k].cpu(), "predicted_instances": ids})
    metrics.reduce()
    count = distributed.all_reduce_sum(torch.tensor(float(count), device=device)).item()
    values = {name: distributed.all_reduce_sum(value).item() / count for name, value in losses.items()}
    means = (total / number if number else math.nan
             for total, number in distributed.all_reduce_sum(scores).tolist())
    values |= {name: value for name, value in metrics.compute().items() if not math.isnan(value)}
    return {**values, **dict(zip(SCORES, means, strict=True))}, rows


def main():
    args = config.training_parser(__doc__).parse_args()
    config.apply_preset(C, args.preset)
    config.apply_overrides(C, args.set)
    check_class_weights(C.VISTA_CLASS_WEIGHTS, C.VISTA_NUM_CLASSES)
    device = distributed.setup_distributed()
    torch.manual_seed(C.SEED)
    run_dir, checkpoint = open_run(C.RUNS_DIR, args.save_name, args.checkpoint, KIND, args.fast_dev_run)
    interrupts = Interrupts(C.CHECKPOINT_MINUTES)

    # Data and model
    train_loader, val_loader, data = build_data(args.data, args.fast_dev_run)
    train_set, sampler = train_loader.dataset, train_loader.batch_sampler
    num_batches = len(train_loader)
    steps_per_epoch = math.ceil(num_batches / C.VISTA_UPDATE_EVERY_BATCHES)
    epochs = 1 if args.fast_dev_run else C.VISTA_EPOCHS
    total_steps = epochs * steps_per_epoch
    monitor = monitored(C.VISTA_MONITOR, C.VISTA_MONITOR_MODE)
    model = build_model()
    class_weights = torch.tensor(C.VISTA_CLASS_WEIGHTS, device=device) if C.VISTA_CLASS_WEIGHTS else None
    if checkpoint is None:                  # of a token transformer pretraining knows nothing but itself
        builders.start_from(model, args.init, args.remove_prefix,
                            part=getattr(model.encoder, "vit", model.encoder))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model = distributed.shard(model.to(device), C.STRATEGY)

    # Optimizer
    groups = parameter_groups(model, C.VISTA_WEIGHT_DECAY, C.NO_DECAY_NORM_BIAS)
    schedule = {"name": C.VISTA_SCHEDULE, "warmup": C.VISTA_WARMUP_STEPS, "ipe_scale": C.IPE_SCALE,
                "start_lr": C.START_LR, "final_lr": C.VISTA_FINAL_LR}
    optimizer, scheduler = builders.build_optimization(
        [{**group, "lr": C.VISTA_LR} for group in groups], schedule, total_steps, steps_per_epoch)
    scaler = gradient_scaler(device, C.PRECISION)
    ema = EMA(model, C.EMA_DECAY, C.EMA_WARMUP) if C.USE_EMA else None

    # Resume
    first_epoch, first_batch, step, best, history, running, bad_files = 1, 0, 0, None, [], {}, set()
    torch.manual_seed(C.SEED + distributed.rank())                  # dropout differs between ranks
    if checkpoint is not None:
        changed = config.changed_constants(C, checkpoint["constants"])
        for change in changed:
            distributed.say(f"Changed since the checkpoint: {change}")
        settings = states.load_training_state(checkpoint, model, optimizer, scaler)
        if ema is not None:
            ema.load_state_dict(checkpoint["ema_state_dict"])
        step, best, history = checkpoint["step"], checkpoint["best"], checkpoint["history"]
        first_epoch, first_batch = resume_position(checkpoint, num_batches, C.VISTA_UPDATE_EVERY_BATCHES)
        share = first_batch / max(1, checkpoint["batch_in_epoch"])       # 1, unless batches are others now
        running = own_sums(checkpoint["running"], share, device)
        if changed or checkpoint["total_steps"] != total_steps:
            done = (first_epoch - 1) * steps_per_epoch + math.ceil(first_batch / C.VISTA_UPDATE_EVERY_BATCHES)
            go_to_step(scheduler, settings, min(done, total_steps))
        else:
            scheduler.load_state_dict(checkpoint["scheduler_state_dict"])
        if distributed.is_main():
            keep_checkpoint(run_dir, KIND, C.KEEP_TOP_K, C.SAVE_EVERY_EPOCHS, *monitor)
    if C.COMPILE:
        model.compile()

    # Record
    trackers = None
    if distributed.is_main():
        trackers = Trackers(C.TRACKERS, run_dir, config.hyperparameters(C), step)
        config.write_training_params(
            run_dir, C, preset=args.preset, overrides=args.set, kind=KIND,
            data=str(data), train_data=train_set.describe(), val_data=val_loader.dataset.describe(),
            train_items=len(train_set), val_items=len(val_loader.dataset),
            world_size=distributed.world_size(), device=str(device), parameters=parameters,
            effective_batch=sampler.batch_size * C.VISTA_UPDATE_EVERY_BATCHES * distributed.world_size(),
            steps_per_epoch=steps_per_epoch, total_steps=total_steps)

    def save_last(epoch, batch_in_epoch, train_loss=None, val_loss=None):
        """Write <kind>_last.pt.  All ranks gather the state, the main one writes it."""
        entries = {
            "kind": KIND, "epoch": epoch, "batch_in_epoch": batch_in_epoch, "num_batches": num_batches,
            "total_steps": total_steps, "step": step, "best": best,
            "train_loss": train_loss, "val_loss": val_loss, "history": history,
            "running": distributed.gather({name: value.cpu() for name, value in running.items()}),
            **states.training_state(model, optimizer, scheduler, scaler),
            "ema_state_dict": ema.state_dict() if ema is not None else None,
            "constants": config.hyperparameters(C),
            "spacing_nm": list(train_set.sources[0].spacing_nm)}
        if distributed.is_main():
            save_checkpoint(run_dir / f"{KIND}_last.pt", **entries)
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
        if C.VISTA_PATIENCE and stale_for(history, *monitor) >= C.VISTA_PATIENCE:
            distributed.say(f"No better {monitor[0]} in {C.VISTA_PATIENCE} validations: the run ends")
            break
        started = time.monotonic()
        distributed.say(f"Epoch {epoch}/{epochs}")
        model.train()
        train_set.set_epoch(epoch)
        sampler.set_position(epoch, first_batch)
        group_loss, group_items = torch.zeros((), device=device), []
        batches = progress_bar(train_loader, f"epoch {epoch}", first_batch)
        for i, batch in enumerate(batches, start=first_batch):
            size, is_last = accumulation_group(i, num_batches, C.VISTA_UPDATE_EVERY_BATCHES)
            batch = to_device({**batch, "count": int(batch["instances"].max())}, device)

            # Gradients travel between ranks only on the last micro-batch of a group.
            with distributed.gradient_sync(model, is_last):
                with autocast(device, C.PRECISION):
                    outputs = model(batch["image"])
                loss, terms = loss_terms(outputs, batch, class_weights)
                scaler.scale(loss / size).backward()
            for name, term in {"loss": loss, **terms}.items():
                running[name] = running.get(name, 0) + term.detach()
            group_loss, group_items = group_loss + loss.detach(), group_items + batch["case"]
            bad_files.update(filter(None, batch["bad_files"]))
            if distributed.is_main() and (i + 1) % C.LOG_EVERY_BATCHES == 0:
                means = {name: value.item() / (i + 1) for name, value in running.items()}
                tqdm.write(batch_line(i + 1, num_batches, means))
            if not is_last:
                continue

            scaler.unscale_(optimizer)                                  # clip true gradients, not scaled ones
            if C.GRAD_CLIP_NORM:
                torch.nn.utils.clip_grad_norm_(model.parameters(), C.GRAD_CLIP_NORM)
            check_finite(group_loss, terms, step + 1, group_items)
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
        values, rows = {}, []
        if epoch in (1, epochs) or epoch % C.VISTA_VAL_EVERY == 0:
            with ema.applied() if ema is not None else nullcontext():
                result = evaluate(model, val_loader, class_weights, device, interrupts)
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
        best = best_row(history, *monitor)[monitor[0]]
        running, first_batch = {}, 0
        if distributed.is_main():
            write_history(run_dir, history)
            if rows:
                sheet(run_dir / "samples" / f"epoch_{epoch}.png", rows)
            trackers.log(row, step)
        save_last(epoch, num_batches, row["train/loss"], row.get("val/loss"))
        if distributed.is_main():
            kept = keep_checkpoint(run_dir, KIND, C.KEEP_TOP_K, C.SAVE_EVERY_EPOCHS, *monitor)
            print(f"{epoch_line(row)} ({time.monotonic() - started:.0f} s)")
            print(f"Saved checkpoint: {kept}")

    if distributed.is_main():
        trackers.close()
    say_end(run_dir, bad_files, first_epoch <= epochs)
    distributed.cleanup()


if __name__ == "__main__":
    config.run_script(main)
