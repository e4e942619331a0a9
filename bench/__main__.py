"""`python -m bench PIECE`: kernels, train, prepare, resources, report; `all` runs them one after another."""

from __future__ import annotations

import importlib
import sys

PIECES = ("kernels", "train", "prepare", "resources", "report", "all", "gpu")


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in PIECES:
        print(f"{__doc__}\nusage: python -m bench {{{','.join(PIECES)}}} [--help] ...", file=sys.stderr)
        return 2
    return importlib.import_module(f"bench.{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
