"""`python -m diffusers_localdit` is the command `localdit`."""

import sys

from .cli import main

sys.exit(main())
