"""Lets the files of the fuzzer find one another when pytest looks into them for doctests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
