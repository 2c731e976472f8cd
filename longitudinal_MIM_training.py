"""Train a network that maps what changed between two chest X-rays (Longitudinal MIM).

    python longitudinal_MIM_training.py -p demo -n demo                       # demo data, made on first use
    python longitudinal_MIM_training.py -p xray_256 -n real --data data/pairs
    python longitudinal_MIM_training.py -p xray_256 -n real --data data/pairs -c auto       # resume
    torchrun --nproc_per_node=4 longitudinal_MIM_training.py -n big --data data/pairs --set STRATEGY=fsdp

Data: case folders with prior, current and diff_map .nii.gz, as `prepare_data.py pairs` writes them.
Settings: constants.py, sections 1 to 11.
"""

import math
import sys
import time
from contextlib import nullcontext

import torch
from tqdm import tqdm

import builders
import constants as C
from datasets.augment import XrayAugment
from datasets.longitudinal import LongitudinalMIMDataset, find_cases, split_cases
from datasets.masking import PatchMask
from losses.gan import discriminator_loss, generator_loss
from losses.image import change_weight, fourier_loss, l1_loss, l2_loss, masked_l1, soft_dice_loss, ssim_loss
from losses.perceptual import VGGLoss
from models.longitudinal_mim import LongitudinalMIMModelBig
from models.patch_gan import PatchDiscriminator
from models.pretrained import load_efficientnet_weights, load_vit_weights
from prepare_data import make_longitudinal_demo
from utils import config, distributed, states
from utils.checkpoint import save_checkpoint
from utils.device import autocast, gradient_scaler, to_device
from utils.ema import EMA
from utils.history import Trackers, batch_line, epoch_line, progress_bar, say_end, write_history
from utils.interrupts import Interrupts
from utils.metrics import ChangeMetrics
from utils.optim import build_optimizer, parameter_groups
from utils.overlay import sample_sheet
from utils.runs import best_row, check_finite, keep_checkpoint, open_run, own_sums, resume_position
from utils.schedules import accumulation_group, go_to_step, mask_probability

KIND = "longitudinal_mim"
MONITOR = ("val/loss", "min")               # the metric of longitudinal_mim_best.pt and KEEP_TOP_K


def build_data(data, fast_dev_run):
    """(training loader, validation loader, root folder); of the demo pairs when ``data`` is None."""
    data = builders.data_path(data, make_longitudinal_demo, "longitudinal/pairs")
    cases = find_cases(data, C.ON_BAD_FILE)
    splits = split_cases(cases, data, C.VAL_FRACTION, C.TEST_FRACTION, C.SPLIT_CSV or None)
    splits = builders.say_splits(builders.thin(splits, C.BATCH_SIZE) if fast_dev_run else splits, "pairs")
    augment = XrayAugment(C.AUG_FLIP, C.AUG_ROTATION, C.AUG_SHIFT, C.AUG_SCALE,
                          C.AUG_CLAHE, C.AUG_SHARPNESS, C.AUG_EXPOSURE, C.AUG_NOISE)
    mask = PatchMask(C.MASK_PATCH_SIZE, C.MASK_MODE)
    train_set = LongitudinalMIMDataset(splits["train"], C.IMG_SIZE, augment, mask, C.SEED, C.ON_BAD_FILE)
    val_set = LongitudinalMIMDataset(splits["val"], C.IMG_SIZE, on_bad_file=C.ON_BAD_FILE)
    return (builders.build_item_loader(train_set, C.BATCH_SIZE, True),
            builders.build_item_loader(val_set, C.BATCH_SIZE, False), data)


def build_model():
    """The network that the constants describe, with pretrained parts where files are named."""
    model = LongitudinalMIMModelBig(C.EFFICIENTNET, C.VIT, C.DECODER_CHANNELS, C.MASK_PATCH_SIZE,
                                    C.ANTISYMMETRIC, C.DROPOUT, C.ACTIVATION_CHECKPOINTING)
    return model.to(memory_format=torch.channels_last) if C.CHANNELS_LAST else model


def load_pretrained(model, args):
    """Start from other weights: constants name files of the two encoders, --init a run that has the first."""
    if C.EFFICIENTNET_WEIGHTS:
        builders.say_filled("EFFICIENTNET_WEIGHTS", C.EFFICIENTNET_WEIGHTS,
                            *load_efficientnet_weights(model, C.EFFICIENTNET_WEIGHTS))
    if C.VIT_WEIGHTS:
        builders.say_filled("VIT_WEIGHTS", C.VIT_WEIGHTS, *load_vit_weights(model, C.VIT_WEIGHTS))
    if args.init or not (C.EFFICIENTNET_WEIGHTS or C.VIT_WEIGHTS):
        builders.start_from(model, args.init, args.remove_prefix, part=model.encoder)


def build_optimization(model, discriminator, total_steps, steps_per_epoch):
    """(optimizer, scheduler, discriminator's optimizer or None)."""
    groups = parameter_groups(model, C.WEIGHT_DECAY, C.NO_DECAY_NORM_BIAS)
    schedule = {"name": C.SCHEDULE, "warmup": C.WARMUP_STEPS, "ipe_scale": C.IPE_SCALE,
                "start_lr": C.START_LR, "final_lr": C.FINAL_LR}
    optimizer, scheduler = builders.build_optimization(
        [{**group, "lr": C.MAX_LR} for group in groups], schedule, total_steps, steps_per_epoch)
    if discriminator is None:
        return optimizer, scheduler, None
    groups = parameter_groups(discriminator, C.GAN_WEIGHT_DECAY, C.NO_DECAY_NORM_BIAS)
    gan_optimizer = build_optimizer("adamw", groups, C.GAN_LR, C.GAN_WEIGHT_DECAY, C.GAN_BETAS)
    return optimizer, scheduler, gan_optimizer


def loss_terms(pred, batch, vgg):
    """Weighted terms of the loss of pred [B, 1, H, W]: a dict of scalars, each the mean over the batch."""
    diff = batch["diff"]
    weight = change_weight(diff, C.CHANGE_WEIGHT, C.CHANGE_THRESHOLD) if C.USE_CHANGE_WEIGHT else None
    terms = {}
    if C.USE_L1:
        terms["L1"] = C.LAMBDA_L1_ALL * l1_loss(pred, diff, weight)
        if "mask" in batch:
            hidden = batch["mask"].any(1, keepdim=True)                                        # [B, 1, H, W]
            terms["L1_masked"] = C.LAMBDA_L1_MASKED * masked_l1(pred, diff, hidden)
    if C.USE_L2:
        terms["L2"] = C.LAMBDA_L2 * l2_loss(pred, diff, weight)
    if C.USE_DICE:
        terms["Dice"] = C.LAMBDA_DICE * soft_dice_loss(pred, diff, C.CHANGE_THRESHOLD, C.DICE_TEMPERATURE)
    if C.USE_SSIM:
        terms["SSIM"] = C.LAMBDA_SSIM * ssim_loss(pred, diff)
    if C.USE_PERC_STYLE:
        perceptual, style = vgg(pred, diff)
        terms["Perceptual"], terms["Style"] = C.LAMBDA_P * perceptual, C.LAMBDA_S * style
    if C.USE_FOURIER:
        terms["Fourier"] = C.LAMBDA_FOURIER * fourier_loss(pred, diff)
    return terms


@torch.no_grad()
def evaluate(model, loader, vgg, device, interrupts):
    """Mean loss terms and change metrics over the validation set, and rows for the sample sheet.

    None when the run was asked to stop meanwhile.  Repeats that make all ranks' shares equal do not count.
    """
    model.eval()
    metrics, sums, count, rows = ChangeMetrics(C.CHANGE_THRESHOLD), {}, 0, []
    for i, batch in enumerate(progress_bar(loader, "validation")):
        if distributed.any_rank([interrupts.stop])[0]:
            return None
        batch = to_device(batch, device)
        with autocast(device, C.PRECISION):
            pred = model(batch["prior"], batch["current"]).float()                             # [B, 1, H, W]
        real = loader.batch_sampler.real(i)
        kept = max(real, 1)                    # a rank without a case of its own still takes part in the sums
        for name, term in loss_terms(pred[:kept], {"diff": batch["diff"][:kept]}, vgg).items():
            sums[name] = sums.get(name, 0) + term * real
        count += real
        metrics.update(pred[:real], batch["diff"][:real])
        rows += list(zip(batch["prior"], batch["current"], batch["diff"], pred, strict=True))[:real]
        rows = rows[:C.SAMPLES_PER_EPOCH]
    count = distributed.all_reduce_sum(torch.tensor(float(count), device=device)).item()
    losses = {name: distributed.all_reduce_sum(value).item() / count for name, value in sums.items()}
    metrics.reduce()
    return {"loss": sum(losses.values()), **losses, **metrics.compute()}, rows


def adversarial_term(discriminator, pred, batch):
    """The generator's loss.  Its gradient passes the discriminator without staying there."""
    judge = distributed.unwrap(discriminator).requires_grad_(False)
    loss = generator_loss(judge(torch.cat([batch["prior"], batch["current"], pred.float()], 1)))
    judge.requires_grad_(True)
    return loss


def discriminator_term(discriminator, pred, batch):
    """The discriminator's loss on true and predicted maps, judged in one pass beside the images."""
    images = torch.cat([batch["prior"], batch["current"]], 1)
    maps = [batch["diff"], pred.float()]
    pairs = torch.cat([torch.cat([images, each], 1) for each in maps])                         # [2B, 3, H, W]
    return discriminator_loss(*discriminator(pairs).chunk(2))


def main():
    args = config.training_parser(__doc__).parse_args()
    config.apply_preset(C, args.preset)
    config.apply_overrides(C, args.set)
    device = distributed.setup_distributed()
    torch.manual_seed(C.SEED)
    run_dir, checkpoint = open_run(C.RUNS_DIR, args.save_name, args.checkpoint, KIND, args.fast_dev_run)
    interrupts = Interrupts(C.CHECKPOINT_MINUTES)

    # Data and model
    train_loader, val_loader, data = build_data(args.data, args.fast_dev_run)
    train_set, sampler = train_loader.dataset, train_loader.batch_sampler
    num_batches = len(train_loader)
    steps_per_epoch = math.ceil(num_batches / C.UPDATE_EVERY_BATCHES)
    epochs = 1 if args.fast_dev_run else C.LONGITUDINAL_MIM_EPOCHS
    total_steps = epochs * steps_per_epoch
    model = build_model()
    vgg = VGGLoss(C.VGG_WEIGHTS).to(device) if C.USE_PERC_STYLE else None
    discriminator = PatchDiscriminator() if C.USE_GAN else None
    if checkpoint is None:
        load_pretrained(model, args)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model = distributed.shard(model.to(device), C.STRATEGY)
    if discriminator is not None:
        discriminator = distributed.shard(discriminator.to(device), "ddp")     # small: never sharded

    # Optimizer
    optimizer, scheduler, gan_optimizer = build_optimization(model, discriminator, total_steps,
                                                             steps_per_epoch)
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
        gan_state = checkpoint["gan_state_dict"]
        if discriminator is not None and gan_state:
            states.load_model_state(discriminator, gan_state["model"])
            options = states.load_optimizer_state(discriminator, gan_optimizer, gan_state["optimizer"])
            for group, own in zip(gan_optimizer.param_groups, options, strict=True):
                group.update(own)
        step, best, history = checkpoint["step"], checkpoint["best"], checkpoint["history"]
        first_epoch, first_batch = resume_position(checkpoint, num_batches, C.UPDATE_EVERY_BATCHES)
        share = first_batch / max(1, checkpoint["batch_in_epoch"])       # 1, unless batches are others now
        running = own_sums(checkpoint["running"], share, device)
        if changed or checkpoint["total_steps"] != total_steps:
            done = (first_epoch - 1) * steps_per_epoch + math.ceil(first_batch / C.UPDATE_EVERY_BATCHES)
            go_to_step(scheduler, settings, min(done, total_steps))
        else:
            scheduler.load_state_dict(checkpoint["scheduler_state_dict"])
        if distributed.is_main():
            keep_checkpoint(run_dir, KIND, C.KEEP_TOP_K, C.SAVE_EVERY_EPOCHS, *MONITOR)
    if C.COMPILE:
        model.compile()

    # Record
    trackers = None
    if distributed.is_main():
        trackers = Trackers(C.TRACKERS, run_dir, config.hyperparameters(C), step)
        config.write_training_params(
            run_dir, C, preset=args.preset, overrides=args.set, kind=KIND,
            data=str(data), train_items=len(train_set), val_items=len(val_loader.dataset),
            world_size=distributed.world_size(), device=str(device), parameters=parameters,
            effective_batch=sampler.batch_size * C.UPDATE_EVERY_BATCHES * distributed.world_size(),
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
            "gan_state_dict": None if discriminator is None else {
                "model": states.model_state(discriminator),
                "optimizer": states.optimizer_state(discriminator, gan_optimizer)},
            "constants": config.hyperparameters(C)}
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
        started = time.monotonic()
        distributed.say(f"Epoch {epoch}/{epochs}")
        model.train()
        train_set.set_epoch(epoch, mask_probability((epoch - 1) / epochs, C.MASK_PROB_LOW, C.MASK_PROB_HIGH))
        sampler.set_position(epoch, first_batch)
        gan_on = discriminator is not None and epoch >= C.GAN_START_EPOCH
        group_loss, group_items = torch.zeros((), device=device), []
        batches = progress_bar(train_loader, f"epoch {epoch}", first_batch)
        for i, batch in enumerate(batches, start=first_batch):
            size, is_last = accumulation_group(i, num_batches, C.UPDATE_EVERY_BATCHES)
            batch = to_device(batch, device)

            # Gradients travel between ranks only on the last micro-batch of a group.
            with distributed.gradient_sync(model, is_last):
                with autocast(device, C.PRECISION):
                    pred = model(batch["prior"], batch["current"], batch["mask"])              # [B, 1, H, W]
                terms = loss_terms(pred, batch, vgg)
                if gan_on:
                    terms["GAN"] = C.LAMBDA_GAN * adversarial_term(discriminator, pred, batch)
                loss = sum(terms.values())
                scaler.scale(loss / size).backward()
            if gan_on:
                with distributed.gradient_sync(discriminator, is_last):
                    gan_loss = discriminator_term(discriminator, pred.detach(), batch)
                    scaler.scale(gan_loss / size).backward()
                terms["Discriminator"] = gan_loss
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
            if gan_on:
                scaler.step(gan_optimizer)
                gan_optimizer.zero_grad(set_to_none=True)
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
            result = evaluate(model, val_loader, vgg, device, interrupts)
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
        best = best_row(history, *MONITOR)[MONITOR[0]]
        running, first_batch = {}, 0
        if distributed.is_main():
            write_history(run_dir, history)
            if rows:
                sample_sheet(run_dir / "samples" / f"epoch_{epoch}.png", rows, C.CHANGE_THRESHOLD)
            trackers.log(row, step)
        save_last(epoch, num_batches, row["train/loss"], row["val/loss"])
        if distributed.is_main():
            kept = keep_checkpoint(run_dir, KIND, C.KEEP_TOP_K, C.SAVE_EVERY_EPOCHS, *MONITOR)
            print(f"{epoch_line(row)} ({time.monotonic() - started:.0f} s)")
            print(f"Saved checkpoint: {kept}")

    if distributed.is_main():
        trackers.close()
    say_end(run_dir, bad_files, first_epoch <= epochs)
    distributed.cleanup()


if __name__ == "__main__":
    config.run_script(main)
