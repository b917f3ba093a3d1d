"""`python -m vla` is the `vla` command."""

import sys

from vla.cli import main

sys.exit(main())
