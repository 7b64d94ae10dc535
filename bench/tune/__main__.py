"""``python -m bench.tune``; see command.py."""

import sys

from bench.tune.command import main

sys.exit(main())
