"""`python -m bench NAME`: one benchmark, or all of them: `all` on a CPU, `gpu` on a GPU."""

from __future__ import annotations

import importlib
import sys

NAMES = ("kernels", "train", "learn", "host", "prepare", "duplicates", "resources", "report", "all", "gpu")


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        is_asked = sys.argv[1:2] in (["--help"], ["-h"])
        usage = f"{__doc__}\nusage: python -m bench {{{','.join(NAMES)}}} [--help] ..."
        print(usage, file=sys.stdout if is_asked else sys.stderr)
        return 0 if is_asked else 2
    return importlib.import_module(f"bench.{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
