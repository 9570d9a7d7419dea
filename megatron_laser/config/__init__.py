"""Run configuration: schema, loading, checks and the dry run's plan. Imports neither torch nor Megatron.

`load_config` makes a `RunConfig` (`schema/`) of YAML and overrides and runs `checks/`; what follows from several
settings is in `derived`. A setting is read where it is used: `config.laser.beta`.
"""

from megatron_laser.config.checks.layout import check_layout
from megatron_laser.config.checks.settings import check_settings
from megatron_laser.config.derived import (
    evaluation_max_new_tokens,
    longest_sequence,
    mixing_first_step,
    needs_reference_model,
    old_policy_pass_kind,
    optimizer_steps,
    rollout_tries,
    self_reward_first_step,
)
from megatron_laser.config.loading import load_config, resolved_yaml
from megatron_laser.config.model_folder.architecture import (
    SUPPORTED_MODEL_TYPES,
    Architecture,
    MixtureOfExperts,
    read_architecture,
)
from megatron_laser.config.model_folder.parameters import (
    Layout,
    count_parameters,
    padded_vocab_size,
    stage_parameters,
)
from megatron_laser.config.model_folder.special_tokens import (
    ScoreToken,
    read_stop_token_ids,
    resolve_score_token,
)
from megatron_laser.config.model_folder.weight_checks import check_model_folder, model_folder_findings
from megatron_laser.config.plan.resolve import Plan, resolve_plan
from megatron_laser.config.schema.root import RunConfig, key_paths
from megatron_laser.errors import ConfigError, ModelFolderError

__all__ = [
    "SUPPORTED_MODEL_TYPES",
    "Architecture",
    "ConfigError",
    "Layout",
    "MixtureOfExperts",
    "ModelFolderError",
    "Plan",
    "RunConfig",
    "ScoreToken",
    "check_layout",
    "check_model_folder",
    "check_settings",
    "count_parameters",
    "evaluation_max_new_tokens",
    "key_paths",
    "load_config",
    "longest_sequence",
    "mixing_first_step",
    "model_folder_findings",
    "needs_reference_model",
    "old_policy_pass_kind",
    "optimizer_steps",
    "padded_vocab_size",
    "read_architecture",
    "read_stop_token_ids",
    "resolve_plan",
    "resolve_score_token",
    "resolved_yaml",
    "rollout_tries",
    "self_reward_first_step",
    "stage_parameters",
]
