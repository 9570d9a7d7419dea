"""Every setting says what it means to continue a run with another value of it."""

import pytest

from megatron_laser.config.schema.fields import Changing
from megatron_laser.config.schema.kinds import all_settings, changing, kind_of
from megatron_laser.config.schema.readouts import ReadoutConfig
from megatron_laser.config.schema.root import RunConfig, key_paths


def test_all_settings_are_those_of_the_schema():
    assert list(all_settings()) == [
        f"{section}.{key}" for section, keys in key_paths().items() for key in keys
    ]


@pytest.mark.parametrize("setting", list(all_settings()))
def test_a_setting_has_a_kind_and_another_run_has_a_reason(setting):
    mark = changing(setting)
    assert mark.kind in ("identity", "learning", "running")
    assert bool(mark.reason) == (mark.kind == "identity")


def test_every_section_says_what_changing_a_setting_of_it_means():
    """A new setting then has a kind, and whoever adds a section has to think of it."""
    for name, field in RunConfig.model_fields.items():
        assert isinstance(field.annotation.__dict__.get("changing"), Changing), name


def test_kinds_are_what_docs_changing_says_of_them():
    kinds = {
        kind: {one for one in all_settings() if kind_of(one) == kind} for kind in ("identity", "learning")
    }
    assert {one for one in kinds["identity"] if one.startswith("laser.")} == {
        f"laser.{key}" for key in ("score_token", "ref_logprob", "beta", "targets", "loss", "reference")
    }
    assert {"model.path", "model.dtype", "data.train", "reward.function", "run.seed"} <= kinds["identity"]
    for one in (
        "optimizer.lr",
        "optimizer.betas",
        "policy.clip_high",
        "policy.kl_coefficient",
        "laser.alpha",
    ):
        assert one in kinds["learning"]
    assert {"rollout.temperature", "rollout.samples_per_prompt", "rollout.sglang.quantization"} <= kinds[
        "learning"
    ]
    for section in ("parallel", "batching", "checkpoint", "logging", "alarms", "evaluation"):
        assert {kind_of(one) for one in all_settings() if one.startswith(f"{section}.")} == {"running"}
    assert kind_of("run.steps") == kind_of("data.validation") == kind_of("rollout.engine") == "running"


def test_a_readouts_keys_have_kinds_of_their_own():
    assert {kind_of(f"laser.readouts[1].{key}") for key in ("tokens", "beta", "targets")} == {"identity"}
    assert kind_of("laser.readouts[0].weight") == kind_of("laser.readouts[1]") == "learning"
    assert all(kind_of(f"laser.readouts[0].{key}") for key in ReadoutConfig.model_fields)
    with pytest.raises(KeyError):
        kind_of("laser.no_such_setting")
