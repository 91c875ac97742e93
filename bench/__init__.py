"""Side-by-side benchmarks: `python -m bench --help`."""

import os

# Threads that wait actively take the cores from each other where anything else runs. torch reads it when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
