"""Averages of weights: between before and after finetuning, over epochs, over runs.

All are functions of state dicts, after training, and what comes out costs no more than one model.

- `interpolate`: WiSE-FT (Wortsman et al. 2022, arXiv 2109.01903, equation 1), on the line from the
  pretrained to the finetuned weights, (1 - alpha) pretrained + alpha finetuned.
- `average`: the uniform mean, of the last epochs (stochastic weight averaging, Izmailov et al.
  2018, arXiv 1803.05407) or of runs from one pretrained model (the uniform soup, Wortsman et al.
  2022, arXiv 2203.05482).
- `greedy_soup`: recipe 1 of the soup paper, the mean of those runs that help it.

What differs from WiSE-FT: its CLIP has a zero-shot head, and so the line is drawn for the head,
too. A Llama that is finetuned with a new head has none to begin the line with, so at each alpha the
head is the finetuned one. Finetuned by a prompt, with the output layer for a head, all names are in
both and nothing is left over. What differs from the soup paper: its runs begin with one head. Here
each seed draws its own (LoRA also its A), and only prompts begin all seeds at one point. What
differs from the SWA paper: the means are of an ordinary schedule's weights, and there are no batch
statistics to be computed again.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

ALPHAS = tuple(i / 10 for i in range(11))


@torch.no_grad()
def interpolate(
    pretrained: dict[str, Tensor], finetuned: dict[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """(1 - alpha) pretrained + alpha finetuned; what only `finetuned` has stays as it is there.

    Alpha 0 and 1 are the two ends bit for bit; the tensors are new ones at every alpha.
    `pretrained` should not hold a head that was drawn at random. ValueError for an alpha outside
    [0, 1], and for a name of `pretrained` that `finetuned` has not, or in another shape.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha={alpha} is not in [0, 1], between pretrained and finetuned")
    _require_same_shapes("finetuned", finetuned, pretrained)
    mixed = {}
    for name, end in finetuned.items():
        start = pretrained.get(name, end).to(end)
        if alpha in (0.0, 1.0):  # where lerp is exact but for the sign of a zero
            mixed[name] = (end if alpha else start).clone()
        else:
            mixed[name] = torch.lerp(start, end, alpha)
    return mixed


@torch.no_grad()
def average(states: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The uniform mean, summed in float64 and rounded once to the dtypes of the first state.

    Needs memory for the sum and the state at hand, where `states` makes them one at a time. The
    mean of equal float32 states is that state exactly. ValueError for no states, and for different
    names or shapes.
    """
    n, like, total = 0, {}, {}
    for state in states:
        if n == 0:
            like = {name: tensor.new_empty(0) for name, tensor in state.items()}
            total = {name: _wide(tensor) for name, tensor in state.items()}
        else:
            _require_same_shapes(f"states[{n}]", state, total)
            _require_same_shapes("states[0]", total, state)
            for name, tensor in state.items():
                total[name] += tensor.cpu()
        n += 1
    if n == 0:
        raise ValueError("the average of no states: give at least one")
    return {name: (total[name] / n).to(like[name]) for name in total}


def greedy_soup(
    states: list[dict[str, Tensor]], score: Callable[[dict[str, Tensor]], float]
) -> tuple[dict[str, Tensor], list[int]]:
    """(the soup's weights, the indices of its ingredients in the order they were added).

    From the best state on, down the scores, each is added if the mean with it scores no less than
    the mean without. The soup is thus at least as good as the best state by `score`, higher is
    better, which is called 2 n - 1 times and should look at held-out data. ValueError for no states
    or a score that is not a number.
    """
    scores = [score(state) for state in states]
    for index, value in enumerate(scores):
        if value != value:
            raise ValueError(f"states[{index}] scores {value}, which has no place among the others")
    if not scores:
        raise ValueError("a soup of no states: give at least one")
    order = sorted(range(len(states)), key=scores.__getitem__, reverse=True)
    chosen, best = order[:1], scores[order[0]]
    soup = average(states[i] for i in chosen)
    for index in order[1:]:
        candidate = average(states[i] for i in [*chosen, index])
        value = score(candidate)
        if value >= best:
            soup, best = candidate, value
            chosen.append(index)
    return soup, chosen


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64, copy=True)  # not every device has float64


def _require_same_shapes(place: str, state: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    faults = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        if name in state
        else f"no {name}"
        for name, tensor in wanted.items()
        if name not in state or state[name].shape != tensor.shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ValueError(
            f"{place}: {', '.join(faults[:5])}{more}; give states of one model, equally named"
        )
