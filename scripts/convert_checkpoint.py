"""Convert a released LocalDiT checkpoint to a folder for `from_pretrained`, or back; see `--help`."""

import argparse
import sys

from diffusers_localdit.conversion import CheckpointError, add_arguments, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    try:
        run(parser.parse_args())
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
