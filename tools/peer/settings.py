"""One task for both sides: our run's YAML, and the same as TRL's GRPOConfig."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_laser.config import RunConfig, load_config
from megatron_laser.config.loading import resolved_yaml
from megatron_laser.data import PromptCursor
from megatron_laser.run.inputs import read_inputs

# GRPO without LaSeR, one optimizer step per rollout batch, and nothing written that TRL does not write.
_COMMON = (
    "model.dtype=float32",
    "model.recompute=none",
    "rollout.temperature=1.0",
    "rollout.top_p=1.0",
    "reward.function=math_verify",
    "laser.enabled=false",
    "policy.advantage=grpo",
    "policy.normalize_std=true",
    "policy.clip_low=0.2",
    "policy.clip_high=0.2",
    "policy.dual_clip=null",
    "policy.importance_cap=null",
    "policy.kl_coefficient=0",
    "policy.entropy_coefficient=0",
    "policy.loss_aggregation=token_mean",
    "policy.minibatches=1",
    "policy.epochs=1",
    "optimizer.schedule=constant",
    "optimizer.warmup_steps=0",
    "checkpoint.every=0",
    "checkpoint.export_hf=false",
    "evaluation.every=0",
    "evaluation.baseline=false",
    "data.test=null",
    "logging.tensorboard=false",
    "logging.live=off",
    "logging.rollouts_every=0",
    "logging.level=WARNING",
    "run.resume=never",
)


def our_run(
    yaml: Path, overrides: list[str], folder: Path, *, steps: int, old_logprobs: str
) -> tuple[RunConfig, Path]:
    """Our configuration and the YAML file that holds it, in `folder`."""
    config = load_config(
        yaml,
        [
            "rollout.prompts_per_step=16",
            "rollout.samples_per_prompt=8",
            *overrides,
            *_COMMON,
            f"policy.old_logprobs={old_logprobs}",
            f"run.steps={steps}",
            f"run.output_dir={folder / old_logprobs}",
        ],
    )
    path = folder / f"{old_logprobs}.yaml"
    path.write_text(resolved_yaml(config), encoding="utf-8")
    return config, path


def trl_run(config: RunConfig, folder: Path) -> Path:
    """TRL's settings for `config`, as a JSON file in `folder`: the prompts in our order, and a GRPOConfig."""
    rollout, optimizer = config.rollout, config.optimizer
    batch = rollout.prompts_per_step * rollout.samples_per_prompt
    grpo: dict[str, Any] = dict(
        output_dir=str(folder / "trl"),
        max_steps=config.run.steps,
        seed=config.run.seed,
        # the rollout batch is one forward, one backward and one optimizer step
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        num_iterations=1,
        num_generations=rollout.samples_per_prompt,
        max_completion_length=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        shuffle_dataset=False,
        # token-level mean over the batch, as our token_mean; clipping and advantages as ours
        loss_type="dapo",
        scale_rewards="group",
        epsilon=config.policy.clip_low,
        epsilon_high=config.policy.clip_high,
        beta=0.0,
        mask_truncated_completions=False,
        learning_rate=optimizer.lr,
        lr_scheduler_type="constant",
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.grad_clip,
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    path = folder / "trl.json"
    prompts = _prompts_in_our_order(config, folder)
    path.write_text(json.dumps({"model": str(config.model.path), "prompts": prompts, "grpo": grpo}))
    return path


def _prompts_in_our_order(config: RunConfig, folder: Path) -> list[dict[str, Any]]:
    """The prompts of all steps: the n-th step of either side works on the same problems."""
    # As the run itself reads them, with its tokenizer; into another folder, since reading claims the folder.
    run = config.run.model_copy(update={"output_dir": folder / "inputs"})
    prompts = read_inputs(config.model_copy(update={"run": run})).train
    cursor = PromptCursor(len(prompts), config.run.seed, config.data.shuffle)
    taken = cursor.take(config.rollout.prompts_per_step * config.run.steps)
    return [
        {
            "text": prompts[position].problem + config.data.prompt_suffix,
            "token_ids": prompts[position].token_ids,
            "answer": prompts[position].answer,
        }
        for position, _ in taken
    ]
