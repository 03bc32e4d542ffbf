"""Commands for a trained model: generate, predict, explain, export."""

import fast  # noqa: F401, before PyTorch
