"""``python -m bench``, also from a checkout where nothing is installed."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "kernels"))

from bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
