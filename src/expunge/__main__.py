"""`python -m expunge` is the command line."""

import sys

from expunge.cli import main

sys.exit(main())
