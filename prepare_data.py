"""Make data for training: a demonstration set, or pairs with a known difference map from your own X-rays.

    python prepare_data.py demo --output data/demo
    python prepare_data.py pairs --data my_xrays --output data/pairs --per-image 8 --size 256 --workers 4
    python prepare_data.py pairs --data my_xrays --output data/pairs --findings nodules effusion=0.5
    python prepare_data.py pairs --data my_ct --ct --output data/ct_pairs

Interrupt and start again as you like: whole cases are kept, the rest is made.
"""

import argparse
from pathlib import Path

import constants as C
from datasets.demo import write_longitudinal_demo
from datasets.drr import write_ct_pairs
from datasets.findings import FINDINGS
from datasets.pair_files import find_sources, find_volumes
from datasets.pairs import write_pairs
from utils.config import UserError, apply_overrides, closest, run_script


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="a small made-up set, ready for training")
    pairs = commands.add_parser("pairs", help="pairs with a known difference map from X-rays or CT volumes")
    for command in (demo, pairs):
        command.add_argument("--output", required=command is pairs, metavar="DIR", help="folder for the data")
        command.add_argument("--size", type=int, help="pixels per side (default: constants.py)")
        command.add_argument("--seed", type=int, help="(default: SEED)")
        command.add_argument("--workers", type=int, help="processes; 0: this one only (default: NUM_WORKERS)")
        command.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
                             help="override constants.py")
    pairs.add_argument("--data", required=True, metavar="DIR",
                       help="X-rays (PNG, JPEG, TIFF, DICOM, NIfTI); with --ct: NIfTI files, DICOM folders")
    pairs.add_argument("--patients", metavar="CSV", help="columns path (below --data), patient")
    pairs.add_argument("--per-image", type=int, metavar="N",
                       help="pairs per X-ray or CT volume (default: PAIR_PER_IMAGE)")
    pairs.add_argument("--ct", action="store_true", help="the data are CT volumes")
    pairs.add_argument("--findings", nargs="+", metavar="WORD[=P]",
                       help=f"only these, with their probabilities: {', '.join(FINDINGS)}")
    return parser.parse_args()


def finding_probabilities(words):
    """{word: probability} of --findings; PAIR_FINDINGS without it.  UserError: unknown word, bad number."""
    if words is None:
        return C.PAIR_FINDINGS
    chosen = {}
    for pair in words:
        word, separator, number = pair.partition("=")
        if word not in FINDINGS:
            raise UserError(f"--findings {word}: not one of {', '.join(FINDINGS)}{closest(word, FINDINGS)}")
        try:
            chosen[word] = float(number) if separator else C.PAIR_FINDINGS.get(word, 0.5)
        except ValueError as error:
            raise UserError(f"--findings {pair}: expected WORD=PROBABILITY") from error
    return chosen


def check_settings(args, findings):
    """Raise UserError for numbers that no pair can be made with."""
    if args.size < 64 or args.size % 32:
        raise UserError(f"--size {args.size}: give a multiple of 32, at least 64")
    if args.workers < 0 or args.seed < 0:
        raise UserError("--workers and --seed: give 0 or more")
    if args.command == "demo":
        return
    if args.per_image < 1:
        raise UserError(f"--per-image {args.per_image}: give 1 or more")
    shares = {**findings, "PAIR_UNCHANGED": C.PAIR_UNCHANGED, "PAIR_DEVICES": C.PAIR_DEVICES}
    for name, share in shares.items():
        if name in findings and name not in FINDINGS:
            raise UserError(f"PAIR_FINDINGS: {name} is not one of {', '.join(FINDINGS)}")
        if not 0 <= share <= 1:
            raise UserError(f"{name}: a probability lies between 0 and 1, not {share}")
    if not any(findings.values()):
        raise UserError("PAIR_FINDINGS: all are 0; for pairs without change set PAIR_UNCHANGED=1.0")


def pair_settings(findings):
    """Keyword arguments of datasets.pairs.make_pair."""
    return {
        "findings": findings, "unchanged": C.PAIR_UNCHANGED, "devices": C.PAIR_DEVICES,
        "rotation": C.PAIR_ROTATION, "shift": C.PAIR_SHIFT, "scale": C.PAIR_SCALE,
        "breath": C.PAIR_BREATH, "bend": C.PAIR_BEND,
        "exposure": C.PAIR_EXPOSURE, "local_contrast": C.PAIR_LOCAL_CONTRAST,
        "noise": C.PAIR_NOISE, "blur": C.PAIR_BLUR,
    }


def ct_settings(findings):
    """What datasets.drr.write_ct_pairs takes."""
    return {
        "probabilities": {"nodule" if kind == "nodules" else kind: share for kind, share in findings.items()},
        "both_probability": C.CT_BOTH_PROBABILITY, "consolidation_clusters": C.CT_CONSOLIDATION_CLUSTERS,
        "consolidation_hu": C.CT_CONSOLIDATION_HU, "nodule_radius_mm": C.CT_NODULE_RADIUS_MM,
        "effusion_height": C.CT_EFFUSION_HEIGHT, "pneumothorax_rim_mm": C.CT_PNEUMOTHORAX_RIM_MM,
        "cardiomegaly_growth_mm": C.CT_CARDIOMEGALY_GROWTH_MM,
        "max_angle": C.CT_MAX_ANGLE, "max_angle_sum": C.CT_MAX_ANGLE_SUM, "angle_power": C.CT_ANGLE_POWER,
        "spacing_mm": C.CT_SPACING_MM, "margin_mm": C.CT_MARGIN_MM, "devices": C.PAIR_DEVICES,
        "exposure": C.PAIR_EXPOSURE, "local_contrast": C.PAIR_LOCAL_CONTRAST,
        "noise": C.PAIR_NOISE, "blur": C.PAIR_BLUR,
    }


def make_longitudinal_demo():
    """Write the demonstration X-rays and pairs below DEMO_DIR, unless there; returns the pairs' folder."""
    settings = pair_settings(C.PAIR_FINDINGS)
    unknown = C.DEMO_SETTINGS.keys() - settings.keys()
    if unknown:
        raise UserError(f"DEMO_SETTINGS: unknown {', '.join(unknown)}; allowed: {', '.join(settings)}")
    return write_longitudinal_demo(Path(C.DEMO_DIR) / "longitudinal", C.DEMO_SIZE, C.DEMO_PATIENTS,
                                   C.DEMO_PAIRS_PER_PATIENT, C.SEED, C.NUM_WORKERS,
                                   {**settings, **C.DEMO_SETTINGS})


def make_demo(args):
    """Write every demonstration set."""
    C.DEMO_DIR, C.DEMO_SIZE = args.output or C.DEMO_DIR, args.size
    C.SEED, C.NUM_WORKERS = args.seed, args.workers
    print(f"Demo data: {make_longitudinal_demo()}")


def make_pairs(args):
    """Write pairs from X-rays or CT volumes and print the counts."""
    findings = finding_probabilities(args.findings)
    check_settings(args, findings)
    find, write, settings = ((find_volumes, write_ct_pairs, ct_settings) if args.ct else
                             (find_sources, write_pairs, pair_settings))
    sources = find(args.data, args.patients)
    counts = write(sources, args.output, args.per_image, args.size, args.seed, args.workers,
                   settings(findings))
    patients = len({patient for patient, _ in sources})
    print(f"{counts['made']} pairs made and {counts['kept']} kept; "
          f"{len(sources)} images of {patients} patients")
    if counts["bad"]:
        print(f"{counts['bad']} files could not be used: {Path(args.output) / 'bad_files.csv'}")
    print(f"Pairs: {args.output}")


COMMANDS = {"demo": make_demo, "pairs": make_pairs}


def main():
    args = parse_args()
    apply_overrides(C, args.set)
    defaults = {"demo": {"size": C.DEMO_SIZE}, "pairs": {"size": C.PAIR_SIZE, "per_image": C.PAIR_PER_IMAGE}}
    for name, value in {"seed": C.SEED, "workers": C.NUM_WORKERS, **defaults[args.command]}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    COMMANDS[args.command](args)


if __name__ == "__main__":
    run_script(main)
