"""Publish a converted or saved model as a repository of the Hub; see `--help`."""

import sys

from diffusers_localdit.cli import main

if __name__ == "__main__":
    sys.exit(main(["publish", *sys.argv[1:]]))
