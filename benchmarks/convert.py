"""
Time and peak memory of converting a checkpoint of the released model's size (random bfloat16 numbers).

The conversion runs in a fresh process, whose peak resident memory is compared with the size of the file. It includes
the imports, and the pages of the memory-mapped file that were read, although the system can drop those at any time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

MANIFEST = Path(__file__).parents[1] / "tests" / "golden" / "full_size_manifest.json"

CONVERT = """
import json, sys
from diffusers_localdit.conversion import convert_checkpoint
from diffusers_localdit.transformer_localdit import LocalDiTTransformer2DModel

def resident(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))

imports = resident("VmRSS")
report = convert_checkpoint(sys.argv[1], sys.argv[2], global_context=sys.argv[3])
print(report)
print(json.dumps({"imports": imports, "peak": resident("VmHWM")}))
"""


def write_random_checkpoint(path: Path, num_layers: int) -> None:
    shapes = json.loads(MANIFEST.read_text())["state_dict"]
    torch.manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        start, _, rest = name.partition("transformer_blocks.")
        if start or not rest or int(rest.partition(".")[0]) < num_layers:
            tensors[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def measure(checkpoint: Path, output: Path, global_context: str) -> dict[str, float]:
    command = [sys.executable, "-c", CONVERT, str(checkpoint), str(output), global_context]
    start = time.perf_counter()
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - start
    report, _, last = process.stdout.rstrip().rpartition("\n")
    memory = json.loads(last)
    size = checkpoint.stat().st_size
    print(f"{report}\n")
    return {
        "file": checkpoint.name,
        "global_context": global_context,
        "file_mb": round(size / 1e6, 1),
        "seconds": round(seconds, 1),
        "imports_mb": round(memory["imports"] / 1e6, 1),
        "peak_mb": round(memory["peak"] / 1e6, 1),
        "peak_per_file": round(memory["peak"] / size, 3),
        "growth_per_file": round((memory["peak"] - memory["imports"]) / size, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=18, help="blocks in the file (default: %(default)s)")
    parser.add_argument("--global-context", default="auto", help="as for the conversion (default: %(default)s)")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".pt", ".safetensors"):
            checkpoint = Path(folder) / f"released_size{suffix}"
            write_random_checkpoint(checkpoint, args.layers)
            rows.append(measure(checkpoint, Path(folder) / f"from_{suffix[1:]}", args.global_context))
    widths = [max(len(name), *(len(str(row[name])) for row in rows)) for name in rows[0]]
    for cells in (rows[0], *(row.values() for row in rows)):
        print("  ".join(f"{cell!s:>{width}}" for cell, width in zip(cells, widths)))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
