"""Hard knocks, for as long as one likes: each must be survived.

    python benchmarks/soak.py inputs --count 1000 --seed 0
    python benchmarks/soak.py inputs --first 417 --count 1               # one of them again
    python benchmarks/soak.py kill --times 20 --seed 0
    python benchmarks/soak.py checkpoints --times 100 --seed 0

inputs        damaged files of every kind through every reader
kill          each way to train killed --times times, and ended as if it had not been
checkpoints   those of each cut short --times times, and files that carry code

Prints a table of what was tried and survived; exit code 1 when something was not.  What failed is kept in
--output for another look.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from soak_checkpoints import checkpoints
from soak_inputs import inputs
from soak_kills import kills

# Each takes (count, seed, first, output folder), prints its table, and returns (tried, failed).
SOAKS = {"inputs": inputs, "kill": kills, "checkpoints": checkpoints}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("soak", choices=SOAKS, nargs="?", default="inputs",
                        help="what to try (default: %(default)s)")
    parser.add_argument("--count", "--times", type=int, default=100, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--first", type=int, default=0, help="number of the first one (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/soak"), metavar="DIR",
                        help="where failures are kept (default: %(default)s)")
    return parser.parse_args()


def main():
    args = parse_args()
    start = time.perf_counter()
    tried, failed = SOAKS[args.soak](args.count, args.seed, args.first, args.output)
    print(f"{args.soak}: {tried - failed} of {tried} survived, seed {args.seed}, "
          f"{time.perf_counter() - start:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
