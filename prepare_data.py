"""Make data for training: demo sets, downloads, caches of brain studies, pairs with a known difference map.

    python prepare_data.py demo
    python prepare_data.py demo studies leaves
    python prepare_data.py download snemi3d --output data
    python prepare_data.py cache --data my_studies --output data/cache --workers 8
    python prepare_data.py cache --data my_studies --output data/cache --modes data/cache/mode_mapping.csv
    python prepare_data.py pairs --data my_xrays --output data/pairs --per-image 8 --size 256 --workers 4
    python prepare_data.py pairs --data my_xrays --output data/pairs --findings nodules effusion=0.5
    python prepare_data.py pairs --data my_ct --ct --output data/ct_pairs

cache reads study folders of NIfTI files and DICOM series; its settings are section 12 of constants.py.
Interrupt and start again as you like: what is whole is kept, the rest is made.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import constants as C
from datasets.cache import INDEX, write_cache
from datasets.cache_report import told_of
from datasets.demo import write_longitudinal_demo
from datasets.demo_em import write_em_demo
from datasets.demo_leaves import make_leaves
from datasets.demo_spine import write_demo_spine
from datasets.demo_studies import write_demo_studies
from datasets.download import DATASETS, download
from datasets.drr import write_ct_pairs
from datasets.findings import FINDINGS
from datasets.pair_files import describe_sources, find_sources, find_volumes
from datasets.pairs import write_pairs
from utils.config import UserError, apply_overrides, closest, run_script


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True,
                                     parser_class=partial(argparse.ArgumentParser, allow_abbrev=False))
    demo = commands.add_parser("demo", help="small made-up sets, ready for training")
    demo.add_argument("sets", nargs="*", metavar="SET",
                      help=f"which ones: {', '.join(DEMOS)} (default: all)")
    fetch = commands.add_parser("download", help="electron microscopy: " + ", ".join(DATASETS))
    fetch.add_argument("dataset", choices=DATASETS)
    fetch.add_argument("--output", default="data", metavar="DIR",
                       help="folder for data (default: %(default)s)")
    fetch.add_argument("--url", help="another place of the file (default: the publisher's)")
    fetch.add_argument("--sha256", metavar="HASH", help="of the file at --url (default: the publisher's)")
    cache = commands.add_parser("cache", help="brain MRI and CT studies as small files that load at once")
    pairs = commands.add_parser("pairs", help="pairs with a known difference map from X-rays or CT volumes")
    demo.add_argument("--output", metavar="DIR", help="folder for data (default: DEMO_DIR)")
    cache.add_argument("--output", required=True, metavar="DIR", help="folder for data")
    pairs.add_argument("--output", required=True, metavar="DIR", help="folder for data")
    for command, size in ((demo, "DEMO_SIZE"), (pairs, "PAIR_SIZE")):
        command.add_argument("--size", type=int, metavar="PIXELS",
                             help=f"per side of X-rays (default: {size} of constants.py)")
        command.add_argument("--seed", type=int, metavar="N", help="(default: SEED of constants.py)")
    for command in (demo, cache, pairs):
        command.add_argument("--workers", type=int, metavar="N",
                             help="processes; 0: this one only (default: NUM_WORKERS of constants.py)")
        command.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
                             help="override constants.py (default: nothing)")
    cache.add_argument("--data", required=True, metavar="DIR",
                       help="a folder per study; below it NIfTI files and DICOM series, in any order")
    cache.add_argument("--modes", metavar="CSV",
                       help="columns study, mode: mri or ct (default: guessed; see mode_mapping.csv there)")
    pairs.add_argument("--data", required=True, metavar="DIR",
                       help="X-rays (PNG, JPEG, TIFF, DICOM, NIfTI); with --ct: NIfTI files, DICOM folders")
    pairs.add_argument("--patients", metavar="CSV",
                       help="columns path (below --data), patient (default: by the names of folders, files)")
    pairs.add_argument("--per-image", type=int, metavar="N",
                       help="pairs per X-ray or CT volume (default: PAIR_PER_IMAGE of constants.py)")
    pairs.add_argument("--ct", action="store_true", help="the data are CT volumes")
    pairs.add_argument("--findings", nargs="+", metavar="WORD[=P]",
                       help="only these, with their probabilities (default: PAIR_FINDINGS of constants.py): "
                       + ", ".join(FINDINGS))
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
        "rotation": C.PAIR_ROTATION, "shift": C.PAIR_SHIFT, "scale": C.PAIR_SCALE, "breath": C.PAIR_BREATH,
        "bend": C.PAIR_BEND, "exposure": C.PAIR_EXPOSURE, "local_contrast": C.PAIR_LOCAL_CONTRAST,
        "noise": C.PAIR_NOISE, "blur": C.PAIR_BLUR}


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


def make_study_demo():
    """Write the demonstration studies below DEMO_DIR and cache them, unless there; returns the cache."""
    folder = Path(C.DEMO_DIR) / "studies"
    write_demo_studies(folder, C.DEMO_STUDIES, C.SEED, C.NUM_WORKERS)
    index, wanted = folder / "cache" / INDEX, {"num_studies": C.DEMO_STUDIES, "settings": cache_settings()}
    found = json.loads(index.read_text()) if index.is_file() else {}
    if any(found.get(key) != value for key, value in wanted.items()):
        write_cache(folder / "raw", folder / "cache", folder / "modes.csv", C.NUM_WORKERS, cache_settings())
    return folder / "cache"


def make_em_demo():
    """Write the demonstration volumes of electron microscopy below DEMO_DIR, unless there; returns where."""
    return write_em_demo(Path(C.DEMO_DIR) / "em", tuple(C.DEMO_EM_SIZE), C.SEED, C.NUM_WORKERS)


def make_leaf_demo():
    """Write the demonstration photographs below DEMO_DIR, unless there; returns their folder."""
    return make_leaves(Path(C.DEMO_DIR) / "leaves", C.DEMO_LEAVES, seed=C.SEED, workers=C.NUM_WORKERS)


def make_spine_demo():
    """Write the demonstration spines below DEMO_DIR, unless there; returns their folder."""
    patients, size = C.DEMO_SPINE
    return write_demo_spine(Path(C.DEMO_DIR) / "spine", patients, C.SEED, C.NUM_WORKERS, size)


def make_demo(args):
    """Write the demonstration sets."""
    unknown = [name for name in args.sets if name not in DEMOS]
    if unknown:
        raise UserError(f"demo {unknown[0]}: there are {', '.join(DEMOS)}{closest(unknown[0], DEMOS)}")
    C.DEMO_DIR, C.DEMO_SIZE = args.output or C.DEMO_DIR, args.size
    C.SEED, C.NUM_WORKERS = args.seed, args.workers
    for name in args.sets or DEMOS:
        print(f"Demo data: {DEMOS[name]()}")


def make_download(args):
    """Fetch a public data set and say where it lies."""
    paths = download(args.dataset, args.output, args.url, args.sha256)
    print(f"{args.dataset}: {', '.join(map(str, paths))}")


def cache_settings():
    """What datasets.cache.write_cache takes."""
    return {"spacing": C.STUDY_SPACING_MM, "percentiles": C.STUDY_MRI_PERCENTILES,
            "mri_background": C.STUDY_MRI_BACKGROUND, "ct_background": C.STUDY_CT_BACKGROUND_HU}


def make_cache(args):
    """Cache brain studies and print the counts."""
    counts = write_cache(args.data, args.output, args.modes, args.workers, cache_settings())
    print(f"{counts['studies']} studies: {counts['made']} series cached, {counts['kept']} kept, "
          f"{counts['removed']} removed")
    if counts["bad"]:
        print(f"{counts['bad']} files or series could not be used: {Path(args.output) / 'bad_files.csv'}")
    print("\n".join(told_of(args.output)))
    print(f"Cache: {args.output}; MRI or CT: {Path(args.output) / 'mode_mapping.csv'}")


def make_pairs(args):
    """Write pairs from X-rays or CT volumes and print the counts."""
    findings = finding_probabilities(args.findings)
    check_settings(args, findings)
    find, write, settings = ((find_volumes, write_ct_pairs, ct_settings) if args.ct else
                             (find_sources, write_pairs, pair_settings))
    sources = find(args.data, args.patients)
    print("\n".join(describe_sources(sources, args.data, args.patients)), flush=True)
    counts = write(sources, args.output, args.per_image, args.size, args.seed, args.workers,
                   settings(findings))
    print(f"{counts['made']} pairs made and {counts['kept']} kept")
    if counts["bad"]:
        print(f"{counts['bad']} files could not be used: {Path(args.output) / 'bad_files.csv'}")
    print(f"Pairs: {args.output}")


DEMOS = {"longitudinal": make_longitudinal_demo, "studies": make_study_demo, "em": make_em_demo,
         "leaves": make_leaf_demo, "spine": make_spine_demo}
COMMANDS = {"demo": make_demo, "download": make_download, "cache": make_cache, "pairs": make_pairs}


def main():
    args = parse_args()
    apply_overrides(C, getattr(args, "set", []))
    defaults = {"demo": {"size": C.DEMO_SIZE}, "pairs": {"size": C.PAIR_SIZE, "per_image": C.PAIR_PER_IMAGE}}
    for name, value in {"seed": C.SEED, "workers": C.NUM_WORKERS, **defaults.get(args.command, {})}.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.workers < 0 or args.seed < 0:
        raise UserError("--workers and --seed: give 0 or more")
    if args.command in defaults and (args.size < 64 or args.size % 32):
        raise UserError(f"--size {args.size}: give a multiple of 32, at least 64")
    COMMANDS[args.command](args)


if __name__ == "__main__":
    run_script(main)
