"""The recipes say what is particular to them, once; the rest is their base's."""

import pytest
import yaml
from helpers.source_tree import ROOT

from megatron_laser.config.layers import BASE, read_layers

EXAMPLES = ROOT / "examples"
RECIPES = sorted(EXAMPLES.glob("*/*.yaml"))


def leaves(data, path=()):
    """(section, ..., key) -> value; a list is one value."""
    for key, value in data.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: str(file.relative_to(EXAMPLES)))
def test_a_recipe_has_at_most_one_base_and_repeats_nothing_of_it(recipe):
    written = yaml.safe_load(recipe.read_text())
    base = written.pop(BASE, None)
    assert base is None or isinstance(base, str)
    inherited = {}
    for layer in read_layers(recipe)[:-1]:
        inherited |= dict(leaves(layer.source.data))
    repeated = {key: value for key, value in leaves(written) if inherited.get(key, ...) == value}
    assert repeated == {}


def test_what_recipes_of_several_models_share_is_written_in_their_base():
    """No value of theirs stands in more than half of them."""
    alone = [file for file in RECIPES if "paper.yaml" in str(yaml.safe_load(file.read_text()).get(BASE))]
    assert len(alone) > 4
    counts = {}
    for file in alone:
        for item in leaves(yaml.safe_load(file.read_text())):
            if item[0] != (BASE,):
                counts[str(item)] = counts.get(str(item), 0) + 1
    assert {item: count for item, count in counts.items() if count > len(alone) / 2} == {}
