"""Beyond the assignment: published methods of finetuning, alone or combined, and their records."""

import fast  # noqa: F401, before PyTorch
