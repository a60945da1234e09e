"""``fa-stereo evaluate`` as a file, for ``torchrun --nproc-per-node N scripts/evaluate.py ...``."""

import sys

from fa_stereo.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
