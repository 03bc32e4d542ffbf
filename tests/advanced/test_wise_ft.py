"""Averages of weights against closed forms, exact where they promise to be."""

import pytest
import torch

from advanced.methods.wise_ft import average, greedy_soup, interpolate


def random_state(seed: int, **dtypes: torch.dtype) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    state = {"a": torch.randn(7, 5, generator=rng), "b": torch.randn(9, generator=rng)}
    return {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in state.items()}


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()


def test_interpolation_is_equation_1_and_the_new_head_is_the_finetuned():
    pretrained, finetuned, alpha = random_state(0), random_state(1), 0.1
    finetuned["head"] = torch.ones(3)
    mixed = interpolate(pretrained, finetuned, alpha)
    assert list(mixed) == ["a", "b", "head"]
    assert torch.equal(mixed["head"], finetuned["head"])
    for name, start in pretrained.items():
        expected = (1 - alpha) * start.double() + alpha * finetuned[name].double()
        torch.testing.assert_close(mixed[name].double(), expected, rtol=1e-6, atol=1e-7)


def test_the_ends_are_the_two_states_bit_for_bit_in_memory_of_their_own():
    pretrained, finetuned = random_state(0), random_state(1)
    pretrained["a"][0, 0], finetuned["a"][0, 0] = -0.0, 1e38
    pretrained["b"][0], finetuned["b"][0] = -3e38, 3e38  # their difference overflows
    for alpha, end in ((0, pretrained), (0.0, pretrained), (1, finetuned), (1.0, finetuned)):
        mixed = interpolate(pretrained, finetuned, alpha)
        assert all(same_bits(mixed[name], end[name]) for name in end)
        mixed["a"].zero_()
    assert finetuned["a"].count_nonzero() == pretrained["a"].count_nonzero() + 1 == 35


def test_names_that_were_not_finetuned_are_an_error():
    state = random_state(0)
    with pytest.raises(ValueError, match=r"not finetuned: \['b'\]"):
        interpolate(state, {"a": state["a"]}, 0.5)
    for others in ([state, {"a": state["a"]}], [{"a": state["a"]}, state]):
        with pytest.raises(ValueError, match="state 1 has other names"):
            average(others)


def test_average_is_the_float64_mean_rounded_once():
    states = [random_state(seed, b=torch.bfloat16) for seed in range(7)]
    mean = average(iter(states))
    for name, dtype in (("a", torch.float32), ("b", torch.bfloat16)):
        expected = torch.stack([state[name].double() for state in states]).sum(dim=0) / 7
        assert mean[name].dtype == dtype
        torch.testing.assert_close(mean[name], expected.to(dtype), rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    ("values", "chosen", "mean"),
    [
        ([3.0, -1.0, 2.0], [1, 2], 0.5),  # with 3.0 the mean is 4/3, which is farther off
        ([3.0, -1.0, -2.0], [1, 0], 1.0),  # -2.0 makes it worse, 3.0 behind it does not
        ([2.0, 2.0, 2.0], [0, 1, 2], 2.0),  # no worse, so all of them, the earlier first
    ],
)
def test_greedy_soup_adds_a_run_unless_the_score_falls(values, chosen, mean):
    states = [{"x": torch.tensor([value], dtype=torch.float64)} for value in values]
    soup, indices = greedy_soup(states, lambda state: -(state["x"].item() ** 2))  # best at 0
    assert indices == chosen
    assert soup["x"].item() == mean
