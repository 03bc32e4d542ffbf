"""Check that 1000 AdamW steps on a small regression end in the assignment's reference weights."""

import numpy as np
import torch

from optimizer import AdamW
from utils import run_script

# The weights of the assignment's optimizer_test.npy.
REFERENCE = torch.tensor([[0.554828, 0.866657, 0.072920], [-0.447245, -0.295123, -0.271727]])
TOLERANCE = 3e-5  # without any decay the weights differ by 4.4e-5


def final_weights(opt_class: type[torch.optim.Optimizer]) -> torch.Tensor:
    """Return the weights (2, 3) that 1000 uniform samples of y = [x0 + x1, -x2] train."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2, bias=False)
    optimizer = opt_class(model.parameters(), lr=1e-3, weight_decay=1e-4, correct_bias=True)
    for _ in range(1000):
        optimizer.zero_grad()
        x = torch.tensor(rng.uniform(size=3), dtype=torch.float32)
        target = torch.stack((x[0] + x[1], -x[2]))
        loss = (target - model(x)).square().sum()
        loss.backward()
        optimizer.step()
    return model.weight.detach()


def main() -> int:
    difference = (final_weights(AdamW) - REFERENCE).abs().max().item()
    print(f"largest difference {difference:.2e} (tolerance {TOLERANCE:.0e})")
    if not difference <= TOLERANCE:
        print("Optimizer test failed: check the bias correction and whether the decay is applied.")
        return 1
    print("Optimizer test passed!")
    return 0


if __name__ == "__main__":
    run_script(main)
