"""Sections that say how and where it runs: parallel layout, batching, outputs and the run itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from megatron_laser.config.schema.fields import (
    RUNNING,
    Count,
    CountOrZero,
    Duration,
    FilePath,
    Positive,
    Section,
    Seed,
    Switch,
    Text,
    identity,
)
from megatron_laser.config.schema.keeping import BestConfig, EarlyStopConfig
from megatron_laser.config.schema.trials import FakeConfig, ProfileConfig


def _stage_layers(value: Any) -> Any:
    if value in ("even", "balanced"):
        return value
    if not isinstance(value, list | tuple) or not value or any(type(n) is not int or n < 1 for n in value):
        raise ValueError(
            "expected even, balanced or a list with the number of layers, 1 or more, of each chunk"
        )
    return tuple(value)


StageLayers = Annotated[Literal["even", "balanced"] | tuple[int, ...], BeforeValidator(_stage_layers)]


RESUME_STEP = re.compile(r"step\s+(\d+)")


def _resume(value: Any) -> Any:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("expected auto, never, step N, or the folder of a run or of one of its checkpoints")
    if (match := RESUME_STEP.fullmatch(value.strip())) is not None:
        return f"step {int(match[1])}"
    return value.strip()


Resume = Annotated[str, BeforeValidator(_resume)]
_OTHER_MODE = identity("what the steps before were made of cannot be continued with something else")
_OTHER_BATCHES = identity("step n trains on the n-th of these batches; the same files may lie anywhere")
_OTHER_SEED = identity("the order of the problems, in which a checkpoint keeps its place, is made of it")


class ParallelConfig(Section):
    """How many ranks share one copy of the model. The data-parallel size is what is left of the world."""

    changing = RUNNING

    tensor: Count = 1
    """Ranks that split each weight matrix; must divide the key/value heads."""
    pipeline: Count = 1
    """Stages that split the layers."""
    virtual_pipeline: Count = 1
    """Chunks of layers per stage (interleaved schedule); above 1 needs `pipeline` above 1."""
    stage_layers: StageLayers = "even"
    """Layers on each pipeline stage: `even`, as many on each, which must divide; `balanced`, so that the slowest stage
    has as little to compute as possible, with the head counted on the last one (the embedding is a look-up, which takes
    memory and no time); or their numbers, one for each of `pipeline` x `virtual_pipeline` chunks in the order of the
    layers."""
    context: Count = 1
    """Ranks that share each sequence (context parallelism), for sequences whose activations do not fit on one: a rank
    holds 1 / context of every sequence's tokens, and the longest may have `context` times
    `batching.tokens_per_micro_batch`. Rank r of C has chunks r and 2C - 1 - r of 2C equal ones (zig-zag), so that all
    have the same attention to compute. It costs messages, since keys and values go round these ranks in each layer, and
    padding of every sequence to a multiple of 2 x context. It does not split weights; `optimizer.distributed` shards
    the optimizer over it."""
    expert: Count = 1
    """Ranks that share out the experts of a mixture-of-experts model; must divide their number. They are ranks of the
    other dimensions: `tensor` x `context` x data is a multiple of `expert` x `expert_tensor`."""
    expert_tensor: Count = 1
    """Ranks that split each expert's weight matrices; apart from `tensor`, which splits the rest of a layer."""
    sequence: bool = False
    """Split activations between the tensor-parallel regions along the sequence; needs `tensor` above 1."""


class BatchingConfig(Section):
    """How sequences are packed into micro-batches."""

    changing = RUNNING

    tokens_per_micro_batch: Count = 16384
    """Token budget of a packed micro-batch on one rank (dynamic batch size). A micro-batch has `parallel.context` times
    as many tokens, and the longest sequence, `data.max_prompt_tokens` + `rollout.max_new_tokens`, must fit these."""
    pad_multiple: Count | None = None
    """Packed micro-batches are padded to a multiple of this many tokens, with a sequence of its own that has no
    label, and may so be longer than the budget; no result depends on it. Few different lengths keep GPU memory in
    one piece. The layout must divide it: `parallel.sequence` each rank's tokens, and `parallel.context` the whole into
    2 x context chunks. Apart from it, each sequence is padded to a multiple of 2 x `parallel.context` where that is
    above 1. null: 128 x `parallel.tensor` x `parallel.context` on CUDA; on a CPU 2 or what the layout needs."""
    balance: Literal["tokens", "flops"] = "tokens"
    """What is shared out evenly over data-parallel ranks and micro-batches: `tokens`, or `flops`, the matrix products
    by the model's shape, in which attention grows with the square of a sequence. Worth it where responses are long and
    differ: in a 7B model attention adds an eighth to a layer's work at 8k tokens and half at 32k. The budget is of
    tokens either way, and no result depends on it. `rank_imbalance` of the metrics says what is left."""
    share_prompts: bool | None = None
    """Pack the prompt of a group once, for all its responses that are in one micro-batch, which attend to it: less to
    compute, the more so the longer prompts are beside responses, and no result depends on it. A group is cut only where
    the budget or the number of ranks asks for it. It needs a CPU and layers of torch
    (kernels on GPUs know no shared prompts), a dense model and `parallel.context: 1`. null: where these hold."""


class CheckpointConfig(Section):
    """What is kept of the run."""

    changing = RUNNING

    every: CountOrZero = 100
    """Steps between checkpoints; the last step is saved too. 0: none, the run cannot be resumed."""
    keep_last: Count = 2
    """Newest checkpoints that are kept."""
    keep_every: CountOrZero = 0
    """Checkpoints at multiples of this step are kept for good; 0: none."""
    asynchronous: bool = False
    """Write in a background thread from a copy in host memory while training goes on."""
    verify: bool = True
    """Compare every file with its checksum before resuming."""
    deadline: Positive = 3600.0
    """Seconds that a rank waits for another while a checkpoint is written or read: the slowest rank's files and
    checksums. Apart from `run.deadline`, which need not be raised for a slow file system."""
    folder: FilePath | None = None
    """Where this run's checkpoints lie, and no other run's; null: `output_dir`/checkpoints."""
    export_hf: bool = True
    """Write a Hugging Face folder to `output_dir`/hf at the end of the run."""
    export_every: CountOrZero = 0
    """Steps between Hugging Face folders that are written while the run goes on, `output_dir`/hf_step_N; 0: none."""
    export_keep: Count | None = None
    """Newest of these folders that are kept; null: all."""
    best: BestConfig = Field(default_factory=BestConfig)
    """The checkpoint of the best evaluation."""


class LoggingConfig(Section):
    """What is shown and written while the run goes on. metrics.jsonl is always written."""

    changing = RUNNING

    tensorboard: bool = True
    """Write TensorBoard events to `output_dir`/tensorboard."""
    wandb: bool = False
    """Send metrics to Weights & Biases (package `wandb`); without an API key they are recorded offline in
    `output_dir`/wandb for `wandb sync`."""
    all_metrics: bool = False
    """Send every metric to TensorBoard and wandb, several hundred in some runs; false: those that are looked at most,
    80 at the most but for many sources and readouts (metrics.md). metrics.jsonl has all of them in either case."""
    wandb_project: Text | None = None
    """The wandb project; null: megatron_laser."""
    live: Annotated[Literal["auto", "on", "off"], Switch] = "auto"
    """Live terminal view on rank 0; `auto`: only on a terminal, else one plain line a step."""
    rollouts_every: CountOrZero = 0
    """Steps between dumps of all responses to `output_dir`/rollouts; 0: off."""
    rollouts_tokens: bool = False
    """Dump what is known of each token, too: log-probs of engine and trainer, entropy, readouts; for `megatron-laser
    view`, about 40 bytes a token."""
    timeline_every: CountOrZero = 10
    """Steps between lines of `output_dir`/timeline.jsonl: when each rank did what; 0: off."""
    record_batches_every: CountOrZero = 0
    """Steps between batches that are kept as they were trained on, in `output_dir`/batches, for `run.mode: train_only`;
    0: none. `run.mode: rollout_only` keeps every one."""
    straggler_every: CountOrZero = 50
    """Steps between comparisons of the ranks' seconds per phase; a line is printed when one is slow. 0: off."""
    machine: Text | None = None
    """What the GPUs can do: a machine that the planner knows, such as h100, or a machine file (.yaml) that was written
    by hand or measured. Of it come the peak that `mfu/...` is a share of, and the seconds that a step is predicted to
    take (`plan/...`). Servers are taken to run on the same. null: by the name of the CUDA device, where it is known; on
    a CPU, and on GPUs of other names, there is neither."""
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Level of the log."""
    profile: ProfileConfig = Field(default_factory=ProfileConfig)
    """Windows of a profiler."""


UNKNOWN_STEPS = 2**31 - 1
"""`run.steps` until `run.epochs` have been made into steps, which takes the data."""


class RunSettings(Section):
    """The run: its length, its seed, its folder and how long anybody waits."""

    changing = RUNNING

    name: str = ""
    """Name in logs and reports; empty: the name of `output_dir`."""
    steps: Count
    """Training steps; one step is one rollout batch. Either this or `epochs`."""
    epochs: Positive | None = None
    """In place of `steps`: how often the training problems are gone through, 2 or 0.5. At the start steps become
    epochs x usable problems / `rollout.prompts_per_step`, rounded up; of several sources all problems together count.
    It does not go with `rollout.drop_uniform_groups`, which takes as many problems as it needs."""
    mode: Annotated[Literal["train", "rollout_only", "train_only"], _OTHER_MODE] = "train"
    """`rollout_only`: no training: responses of `model.path` are generated, graded and kept in `output_dir`/batches.
    `train_only`: no rollouts: the run trains on the batches of `batches`, and needs no engine, servers, graders or
    data; so two settings can be compared on the same responses. Both leave out evaluations. `train`: everything."""
    batches: Annotated[FilePath | None, _OTHER_BATCHES] = None
    """With `mode: train_only`: the folder of the batches, another run's `output_dir`/batches. Step n trains on the n-th
    of them. Settings that made them (prompts and samples a step, temperature, score token, ...) must be this run's,
    and are compared."""
    fake: FakeConfig = Field(default_factory=FakeConfig)
    """Made-up weights and responses."""
    seed: Annotated[Seed, _OTHER_SEED] = 1
    """Seed of data order, of what the in-process engine samples and of random states. Servers sample by it only with
    `rollout.sglang.deterministic`."""
    output_dir: FilePath
    """Folder for everything that the run writes."""
    resume: Resume = "auto"
    """`auto`: the same command continues the run in `output_dir` from its newest checkpoint; `never`: a folder
    that already holds a run is refused. `step N`: go back to that checkpoint of the run, once; what came after it is
    moved aside. Another run's folder, or a checkpoint in one (`RUN/checkpoints/step_40`): a branch, that is, begin with
    that state in a new `output_dir`. See changing.md."""
    deadline: Positive = 900.0
    """Seconds that a rank waits for another, outside a rollout, before it stops with an error. Longer than
    `rollout.sync_deadline`, for which all ranks wait."""
    start_grace: Positive = 120.0
    """Seconds that a process waits for all others to start and meet; from then on `deadline` holds, for the first
    use of each communicator too."""
    time_limit: Duration | None = None
    """Seconds from the start of the command, or text such as '3:55:00' or 3h55m, in which the run saves and stops by
    itself, so that the same command continues it: where the next step, its evaluation and the save behind it would not
    fit any more, going by the longest of those seen. Less than a scheduler's (docs/stopping.md). null: none."""
    max_bad_steps: Count = 3
    """Steps in a row with a loss or gradient that is not finite, after which the run stops. Their updates are
    skipped and their batches kept in `output_dir`/bad_steps for `megatron-laser replay`."""
    early_stop: EarlyStopConfig = Field(default_factory=EarlyStopConfig)
    """When the run ends early."""

    @property
    def steps_known(self) -> bool:
        """False until `epochs` have been made into steps."""
        return self.epochs is None

    @model_serializer(mode="wrap")
    def _as_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """With `epochs` nobody has given `steps`."""
        found: dict[str, Any] = handler(self)
        return found if self.steps_known else {**found, "steps": None}

    @model_validator(mode="before")
    @classmethod
    def _steps_or_epochs(cls, data: Any) -> Any:
        if not isinstance(data, dict) or data.get("epochs") is None or data.get("steps") is not None:
            return data
        return {**data, "steps": UNKNOWN_STEPS}

    @field_validator("epochs", mode="before")
    @classmethod
    def _not_beside_steps(cls, value: Any, info: ValidationInfo) -> Any:
        steps = info.data.get("steps", UNKNOWN_STEPS)
        if value is not None and steps != UNKNOWN_STEPS:
            raise ValueError(
                f"expected null beside run.steps {steps}; give one of the two, and null for the other"
            )
        return value

    @model_validator(mode="before")
    @classmethod
    def _name_from_output_dir(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("name") and isinstance(data.get("output_dir"), str | Path):
            return {**data, "name": Path(data["output_dir"]).name}
        return data
