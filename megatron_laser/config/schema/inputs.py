"""Sections that say what goes in: the model, the data, the reward and the evaluation."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from megatron_laser.config.schema.fields import (
    RUNNING,
    Count,
    CountOrZero,
    FilePath,
    Learning,
    NonNegative,
    Number,
    Positive,
    RewardName,
    Running,
    Section,
    Seed,
    TemplateArguments,
    Text,
    TopP,
    identity,
)
from megatron_laser.config.schema.sources import OptionalSources, Sources

RecomputeModule = Literal["mlp", "layernorm", "moe_act", "core_attn"]


def _recompute(value: Any) -> Any:
    """One module may stand without the list's brackets; `none` and `full` are no modules."""
    if value in ("none", "full"):
        return value
    modules = tuple(value) if isinstance(value, list | tuple) else (value,)
    known = get_args(RecomputeModule)
    if not modules or any(module not in known for module in modules) or len(set(modules)) < len(modules):
        raise ValueError(f"expected none, full, or one or more of {', '.join(known)}, each once")
    return modules


Recompute = Annotated[Literal["none", "full"] | tuple[RecomputeModule, ...], BeforeValidator(_recompute)]

Fp8 = Literal["none", "blockwise", "tensorwise"]


_OTHER_MODEL = identity(
    "the checkpoint's weights are of that model; a folder with the same files may lie anywhere (docs/changing.md)"
)
_OTHER_DTYPE = identity("the checkpoint's weights are of that type")


class ModelConfig(Section):
    """The policy's starting point and how it is held in memory."""

    changing = RUNNING

    path: Annotated[FilePath, _OTHER_MODEL]
    """Hugging Face folder with config.json, *.safetensors and the tokenizer. A name on the hub is not
    accepted: download it first."""
    dtype: Annotated[Literal["float32", "bfloat16"], _OTHER_DTYPE] = "bfloat16"
    """Type of weights and activations in training. With bfloat16 the optimizer keeps float32 copies."""
    vocab_multiple: Count = 128
    """Each tensor-parallel shard of the padded vocabulary has a multiple of this many rows."""
    recompute: Recompute = "none"
    """Activation recomputation: `full` keeps only each layer's input and runs the layer again in the backward pass
    (about a third more compute, much less memory). A module or a list of them runs only these again: `mlp`, the MLP or
    all of the experts (most of the memory for less compute); `layernorm`, the norms before experts, and
    `moe_act`, the experts' activation function (both with Transformer Engine, cheap); `core_attn`, torch's attention
    (Transformer Engine's keeps nothing that this would save). The dry run shows whether `none` fits."""
    recompute_layers: Count | None = None
    """With `recompute: full`: only so many layers of each pipeline stage, of each chunk with
    `parallel.virtual_pipeline`, from its first on; the others keep their activations. null: all."""
    offload_activations: bool = False
    """With `recompute: full`: keep the layers' inputs in page-locked host memory from the forward to the backward pass,
    copied beside the computation. What is left on the GPU of a layer is nothing, so that length is bounded by one
    layer's work and the head."""
    fp8: Learning[Fp8] = "none"
    """FP8 matrix products in the layers (Transformer Engine, Hopper or newer, `dtype: bfloat16`): `blockwise`, a scale
    for each 1 x 128 of activations and gradients and each 128 x 128 of weights, e4m3 throughout (as DeepSeek-V3; CUDA
    12.9 or newer); `tensorwise`, one scale for each whole tensor as it is, gradients in e5m2. Weights and optimizer
    stay as they are; embedding, head, norms, routers and attention scores are not in FP8. Judge it by
    `logprob_diff_mean` and `rollout_k3_kl`. Rehearsed without a GPU, not run on one."""
    layers: Literal["auto", "transformer_engine", "torch"] = "auto"
    """What layers are built from: `auto`, Transformer Engine on CUDA (an error where it is missing or does not
    import) and torch on a CPU; `torch`, Megatron's own layers with torch's attention and norms, for a GPU without
    Transformer Engine (slower); `transformer_engine`, or an error. float32 takes torch's attention in either
    case; Transformer Engine's products round float32 inputs to TF32, torch's do not."""
    attention: Literal["auto", "flash", "fused"] = "auto"
    """Attention kernel of Transformer Engine: `auto`, its own choice for each shape; `flash`, flash-attn only
    (package `flash-attn`); `fused`, cuDNN only. Replaces NVTE_FLASH_ATTN, NVTE_FUSED_ATTN and NVTE_UNFUSED_ATTN,
    which must not be set to anything else."""
    keep_logits_gib: NonNegative | None = None
    """GPU memory that one micro-batch's log-prob call may use to keep probabilities for its backward, in the model's
    dtype. Rows * vocabulary shard * 2 bytes in bfloat16 (5 GB for 16384 rows and 152064 columns) keep all of them and
    save one of four products. Where it does not all fit, the loss is worked in blocks of rows, or the rest is
    recomputed. In bfloat16 they are rounded to 0.4 %. `null`: chosen once, at the first training step, from what is
    free then (at most 6 GiB, and half of what a reserve of 2 GiB and 1/32 of the GPU leaves; on a CPU always 512 MiB),
    and logged; the dry run shows it. Runs that are to repeat bit for bit elsewhere set a number. 0: nothing is kept."""


class DataConfig(Section):
    """Where the problems come from and how they become prompts."""

    changing = identity(
        "the run would go on with other prompts, and its place among them, which a checkpoint keeps, would mean nothing"
    )

    train: Sources
    """Training problems: one .jsonl or .parquet file, or a list of them. Or a list of sources `{path, weight, reward,
    name}`: each gives its `weight`'s share of the prompts (of the sum of all weights; 1 where none is given), shuffles
    and repeats by itself, may have a `reward` of its own, and has metrics `source/<name>/...` (`name`: the file's,
    without its suffix, where none is given). See data.md."""
    validation: Running[OptionalSources] = None
    """Problems for the evaluation every `evaluation.every` steps; null: none. Or sources `{path, reward, name}`, whose
    metrics are in `eval/source/<name>/...`, too."""
    test: Running[OptionalSources] = None
    """Problems for the evaluation after the last step; null: none. Sources as in `validation`, in
    `test/source/<name>/...`."""
    prompt_key: Text = "problem"
    """Column that holds the problem: a text, or a conversation, a list of turns with `role` (system, user, assistant)
    and `content`, of which the last is the user's; those before it may be worked examples."""
    answer_key: Text = "answer"
    """Column that holds the reference answer. For `math_verify` the answer is taken out of worked solutions
    (`#### 827`, a box), lists of one and numbers; a `reward.function` of your own gets text as it stands, the rest as
    JSON. `a.b` is b in the objects of column a."""
    prompt_suffix: str = " Please reason step by step, and put your final answer within \\boxed{}."
    """Appended to each problem, before the chat template."""
    apply_chat_template: bool = True
    """Send problem and suffix through the tokenizer's chat template as a user message, behind the earlier turns of a
    conversation; false: the plain text is the prompt. A BOS that a problem brings along is not doubled."""
    chat_template_arguments: TemplateArguments = Field(default_factory=dict)
    """Variables of the chat template, `{enable_thinking: false}`, in training and in every evaluation; `eval` and
    `score` of the trained folder use the same. One that the template does not use is refused."""
    system_prompt: Text | None = None
    """First message of every chat, for problems that bring no system message along; null: none (a template may write
    one of its own)."""
    max_prompt_tokens: Count = 2048
    """Longest prompt, in tokens. Longer ones are left out and counted."""
    shuffle: bool = True
    """Shuffle the training problems anew each epoch, from `run.seed`."""


_REWARD = identity(
    "right and wrong would mean something else in the second half: scores are trained on these labels, and curves of "
    "one run would show two rewards",
    branch=True,
)


class RewardTerm(Section):
    """One of several terms of the reward."""

    changing = _REWARD

    weight: Number = 1.0
    """Of its value in the sum that the policy learns from; 0: it is only shown."""
    function: RewardName | None = None
    """A function of its own, as `reward.function`, which returns one number; null: `reward.function` returns it."""


_TERM_NAME = re.compile(r"[\w.+-]+")


def _terms(value: Any) -> Any:
    """Name -> weight is short for name -> {weight}."""
    if not isinstance(value, dict):
        return value
    for name in value:
        if not isinstance(name, str) or not _TERM_NAME.fullmatch(name):
            raise ValueError(
                f"expected names of letters, digits, . _ + - (they are in metrics' names); {name!r} is none"
            )
        if name == "sum":
            raise ValueError(
                "expected another name than sum, which is that of all terms together in reward.label"
            )
        item = value[name]
        if isinstance(item, dict) and (strange := item.keys() - {"weight", "function"}):
            raise ValueError(
                f"expected weight and function of the term {name}, found {', '.join(map(str, strange))}"
            )
    reward = value.get("reward")
    if (
        reward.get("function") if isinstance(reward, dict) else getattr(reward, "function", None)
    ) is not None:
        raise ValueError("expected no function for the term reward: it is what reward.function returns")
    return {
        name: item if isinstance(item, dict | Section) else {"weight": item} for name, item in value.items()
    }


RewardTerms = Annotated[dict[str, RewardTerm], BeforeValidator(_terms)]


class RewardConfig(Section):
    """The verifier that labels responses right (1) or wrong (0)."""

    changing = _REWARD

    function: RewardName = "math_verify"
    """`math_verify`, `multiple_choice` or `free_text` (rewards.md), or `package.module:function`, or
    `path/to/file.py:function`; with `verl:` or `trl:` in front one that is written for these. It returns a number from
    0 (wrong) to 1 (right), or, with `terms` or `threshold`, any number or a dict of named ones; an error or anything
    else is the outcome `crash`, and such a response is left out of the
    step. It is tried before the run starts, and a step in which nothing could be graded stops the run."""
    terms: RewardTerms = Field(default_factory=dict)
    """Several rewards: name -> weight of a number that `function` returns in a dict (its one number is called
    `reward`), or name -> `{function, weight}` of a further function. The policy learns from the weighted sum;
    `reward/<name>` is a term's mean. Empty: `{reward: 1.0}`."""
    label: Text = "reward"
    """The term that says right or wrong, or `sum`, the weighted sum: the label that the self-reward score is trained
    towards, and that accuracy and votes count."""
    threshold: Number | None = None
    """From which value of `label` on a response is right: the label is then 1 or 0, and values may be any number;
    null: the value itself is the label, from 0 to 1."""
    workers: Running[Count] = 2
    """Worker processes that grade."""
    deadline: Running[Positive] = 5.0
    """Seconds for one response; a worker that takes longer is killed and the outcome is `timeout`: the
    response is left out of the step."""
    memory_limit_gib: Running[Positive | None] = 4.0
    """Address space, in GiB, of each grading worker and of each process that it starts; what needs more ends in
    `crash`. null: no limit."""
    max_processes: Running[CountOrZero | None] = None
    """Processes that a worker's functions may have started at once; with more all are killed, and the outcome is
    `crash`. They are counted ten times a second. null: no limit."""


class EvaluationConfig(Section):
    """Evaluation during the run (`data.validation`) and after it (`data.test`)."""

    changing = RUNNING

    every: CountOrZero = 0
    """Steps between evaluations on `data.validation`; 0: off."""
    baseline: bool = True
    """Also evaluate the initial model before the first step: the report then says what training changed."""
    samples_per_prompt: Count = 1
    """Responses per problem on `data.validation`."""
    max_prompts: Count | None = None
    """Use only the first so many problems of each split, of each of its sources where it has several; null: all."""
    temperature: NonNegative = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: TopP = 1.0
    """Nucleus sampling, in (0, 1]."""
    max_new_tokens: Count | None = None
    """Longest response, in tokens; null: `rollout.max_new_tokens`."""
    final_samples_per_prompt: Count = 8
    """Responses per problem on `data.test` after the last step."""
    seed: Seed = 1234
    """Seed of evaluation sampling, apart from training's; servers take it as they take `run.seed`."""
