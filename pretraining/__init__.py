"""Next-token training on plain text."""

import fast  # noqa: F401, before PyTorch
