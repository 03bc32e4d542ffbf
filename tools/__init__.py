"""What a user does with a model: generate, predict, explain, export."""

import fast  # noqa: F401, before PyTorch
