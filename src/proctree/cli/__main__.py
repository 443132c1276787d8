"""`python -m proctree.cli`."""

import sys

from proctree.cli import main

sys.exit(main())
