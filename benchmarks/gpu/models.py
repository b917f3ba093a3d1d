"""Speed of OpenVLA and OpenVLA-OFT at 7B on a GPU: `python benchmarks/gpu/models.py --out models.json`.

`benchmarks/models.py` with the published sizes in bfloat16: decisions at batch 1, 64 and 256, LoRA steps at batch 8,
at batch 1 also with CUDA graphs and compiled, at the others also with compiled blocks. Its options override these. It
takes a GPU with 80 GB.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = ["--device", "cuda", "--size", "7b", "--dtype", "bfloat16", "--batches", "1", "64", "256",
            "--speedups", "none", "graph", "compile", "blocks"]  # fmt: skip


def main(words: Sequence[str] | None = None) -> int:
    if not torch.cuda.is_available():
        print("torch sees no GPU: run it where there is one, or benchmarks/models.py --device cpu", file=sys.stderr)
        return 1
    sys.path.insert(0, str(ROOT))
    from benchmarks.models import main as measure

    return measure(words, "benchmarks/gpu/models.py", DEFAULTS)


if __name__ == "__main__":
    sys.exit(main())
