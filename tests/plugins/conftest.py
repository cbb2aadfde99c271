"""Makes op_harness importable: pytest's importlib mode leaves the folders of test files off sys.path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
