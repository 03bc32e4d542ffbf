"""Averages of weights: between before and after finetuning, over epochs, over runs.

All are functions of state dicts after training, and the result costs no more than one model.

- `interpolate`: WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903, equation 1),
  (1 - alpha) pretrained + alpha finetuned.
- `average`: the uniform mean of the last epochs (stochastic weight averaging, Izmailov et al. 2018,
  arXiv 1803.05407) or of runs from one pretrained model (uniform soup, Wortsman et al. 2022, arXiv
  2203.05482).
- `greedy_soup`: recipe 1 of the soup paper, the mean of the runs that do not lower its accuracy.

Differences from the papers:

- WiSE-FT interpolates CLIP's zero-shot head, too. A new head has no pretrained counterpart, so it
  is the finetuned one at each alpha. A model finetuned by prompts has no new head.
- The runs of the soup paper share their initial weights. Here each seed draws LoRA's A anew.
- Izmailov et al. average along a constant or cyclical learning rate; here the schedule is ordinary.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

State = dict[str, Tensor]
ALPHAS = tuple(i / 10 for i in range(11))


@torch.no_grad()
def interpolate(pretrained: State, finetuned: State, alpha: float) -> State:
    """Return (1 - alpha) pretrained + alpha finetuned as new tensors.

    Names that only `finetuned` has keep its tensors. Alpha 0 and 1 return the two ends bit for bit.
    """
    unknown = pretrained.keys() - finetuned.keys()
    if unknown:
        raise ValueError(f"names that were not finetuned: {sorted(unknown)[:5]}")
    mixed = {}
    for name, end in finetuned.items():
        start = pretrained.get(name, end).to(end)
        if alpha in (0.0, 1.0):  # lerp would lose the sign of a zero
            mixed[name] = (end if alpha else start).clone()
        else:
            mixed[name] = torch.lerp(start, end, alpha)
    return mixed


@torch.no_grad()
def average(states: Iterable[State]) -> State:
    """Return the uniform mean, summed in float64 on the CPU and rounded once to the first dtypes.

    A generator of states needs the memory of the sum and of one state.
    """
    n, like, total = 0, {}, {}
    for state in states:
        if n == 0:
            like = {name: tensor.new_empty(0) for name, tensor in state.items()}
            total = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in state.items()}
        if state.keys() != total.keys():
            raise ValueError(f"state {n} has other names than the first")
        for name, tensor in state.items():
            total[name] += tensor.cpu()  # not every device has float64
        n += 1
    return {name: (total[name] / n).to(like[name]) for name in total}


def greedy_soup(states: list[State], score: Callable[[State], float]) -> tuple[State, list[int]]:
    """Return (the soup's weights, the indices of its ingredients in the order they were added).

    Start with the best state by `score` (higher is better). In the order of the scores, add each
    state if the mean with it scores no less. `score` is called 2 n - 1 times.
    """
    scores = [score(state) for state in states]
    order = sorted(range(len(states)), key=scores.__getitem__, reverse=True)
    chosen, best = order[:1], scores[order[0]]
    for index in order[1:]:
        value = score(average(states[i] for i in [*chosen, index]))
        if value >= best:
            chosen, best = [*chosen, index], value
    return average(states[i] for i in chosen), chosen
