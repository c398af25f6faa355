"""What all commands share: how they report errors."""

import argparse
import sys
import traceback
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Reports errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.split()[0]}: error: {message} (see {self.prog} --help)\n")


def fail(prog: str, message: str, code: int, debug: bool) -> int:
    """Report the exception that is being handled in one line, with its traceback if `debug`; returns `code`."""
    if debug:
        traceback.print_exc()
    print(f"{prog.split()[0]}: error: {message}", file=sys.stderr, flush=True)
    return code
