"""What is measured here imports its neighbors, as scripts do; last, since others look for another `kernels`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
