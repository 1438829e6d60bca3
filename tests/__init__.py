import os

# OpenMP reads these when torch is loaded, here and in every process that tests start. Two threads per process would compete for the
# cores that pytest-xdist shares out.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pipeline  # noqa: F401  sets OpenMP's waiting policy
