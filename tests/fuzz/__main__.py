"""`python -m tests.fuzz`: see driver.py, whose functions the worker processes import by name."""

import sys

from .driver import main

if __name__ == "__main__":
    sys.exit(main())
