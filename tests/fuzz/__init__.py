"""Random use of the whole library: every case ends in a right result, checked against the oracle, or in one sentence.

A case is plain JSON. `cases.py` draws cases by number, `run.py` runs one (`run_case`), `shrink.py` makes a failing one
smaller, `python -m tests.fuzz` runs thousands, and `kept/` holds those that failed once: `tests/test_fuzz.py` reruns them.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
if str(HERE.parent) not in sys.path:  # reference.py, seam_methods.py and checkpoints.py stand beside the tests
    sys.path.insert(0, str(HERE.parent))
