"""What Onset costs, as ratios to floors and peers: `make bench`. One thread everywhere."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy and PyTorch start theirs
