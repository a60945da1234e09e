"""``fa-stereo train`` as the file that torchrun needs: ``torchrun --nproc-per-node 4 scripts/train.py ...``."""

import sys

from fa_stereo.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
