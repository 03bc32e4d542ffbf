"""Which methods combine, and that the list explains every one."""

from itertools import combinations

import pytest
from advanced.catalogue import METHODS, PARTIAL, READERS, compose


def test_a_method_alone_is_itself():
    for name in METHODS:
        assert compose([name]) == (name,)


def test_methods_act_in_one_order_however_they_are_given():
    assert compose(["wise_ft", "lora", "pretrain"]) == ("pretrain", "lora", "wise_ft")


REFUSED = {
    *(frozenset(pair) for group in (READERS, PARTIAL) for pair in combinations(group, 2)),
    *(frozenset((part, "mixout")) for part in PARTIAL),
    *(frozenset((part, "l2sp")) for part in ("lora", "head")),
    frozenset(("head", "wise_ft")),
    *(frozenset(("plain", name)) for name in METHODS if name != "plain"),
    *(frozenset(("zero_shot", name)) for name in METHODS if name not in ("zero_shot", "pretrain")),
    frozenset(("prompt", "head")),
    frozenset(("prompt", "smart")),
    frozenset(("adapter", "wise_ft")),
}


@pytest.mark.parametrize("pair", list(combinations(METHODS, 2)), ids="+".join)
def test_pairs_that_cannot_be_are_refused_in_a_line_that_names_one(pair):
    if frozenset(pair) in REFUSED:
        with pytest.raises(ValueError, match="|".join(pair)) as refused:
            compose(pair)
        assert "\n" not in str(refused.value)
    else:
        assert set(compose(pair)) == set(pair)


def test_a_method_named_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        compose(["lora", "lora"])
