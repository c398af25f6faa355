"""Convert a released LocalDiT checkpoint to a folder for `from_pretrained`, or back; see `--help`."""

import sys

from diffusers_localdit.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
