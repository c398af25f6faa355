"""
Train LocalDiT; see docs/TRAIN.md. All of it is in `diffusers_localdit.training`.

    python examples/train.py --preset shapes --data-root DIR
    accelerate launch examples/train.py --preset 512 --data-root DIR --pipeline DIR_OR_ID --output OUT
"""

import sys

from diffusers_localdit.training.train import main

if __name__ == "__main__":
    sys.exit(main())
