"""Make the model fast. Results stay the same up to rounding, except with int8.

The import sets environment variables that libraries read when they load, unless the user has set
them. So commands import it before PyTorch.
"""

import os

# GNU OpenMP, PyTorch's on Linux, lets threads that wait for each other loop for this many turns
# before they sleep, 300,000 by default. Beside another busy process the loop keeps the core from
# the very thread that the others wait for (docs/performance.md).
VARIABLES = {"GOMP_SPINCOUNT": "1000"} if "OMP_WAIT_POLICY" not in os.environ else {}
# oneDNN and PyTorch each cache 1,024 kernels, one per product shape. Batches of many lengths fill
# both caches (0.5 GB) and fragment the heap. A step uses about 20 kernels.
VARIABLES |= {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
for _name, _value in VARIABLES.items():
    os.environ.setdefault(_name, _value)
