"""Seconds that `import diffusers_localdit` adds to `from diffusers import DiffusionPipeline, AutoencoderKL`.

Each repetition is a fresh process. The last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys

PROGRAM = """
import time
from diffusers import AutoencoderKL, DiffusionPipeline
start = time.perf_counter()
import diffusers_localdit
print(time.perf_counter() - start)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=7)
    args = parser.parse_args()

    seconds = [
        float(subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout)
        for _ in range(args.repetitions)
    ]
    print(f"median {statistics.median(seconds):.3f} s, from {min(seconds):.3f} to {max(seconds):.3f} s")
    print(json.dumps({"median_s": statistics.median(seconds), "min_s": min(seconds), "max_s": max(seconds)}))


if __name__ == "__main__":
    main()
