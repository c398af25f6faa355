"""Publish a converted or saved model as a repository of the Hub; see `--help`."""

import argparse
import sys

from diffusers_localdit.hub import add_arguments, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    try:
        run(parser.parse_args())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
