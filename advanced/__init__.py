"""Beyond the assignment: one paper per file, on the parts of the folder above."""

import fast  # noqa: F401, before PyTorch
