"""Parameters of a test in all combinations, of which some run always and the others are `long`."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest


def combinations(core: Callable[..., bool], **parameters: Mapping[str, Any]) -> pytest.MarkDecorator:
    """Parametrizes a test by every combination of what `parameters` name: id to value.

    core: given the ids of a combination, in the order of the parameters: whether it runs always.
    """
    cases = []
    for chosen in itertools.product(*(values.items() for values in parameters.values())):
        ids, values = zip(*chosen, strict=True)
        cases.append(pytest.param(*values, id="-".join(ids), marks=() if core(*ids) else pytest.mark.long))
    assert any(not case.marks for case in cases), "none of the combinations runs always"
    return pytest.mark.parametrize(list(parameters), cases)
