"""Sections that say who generates responses, how they are sampled, and how the engine gets new weights."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

from megatron_laser.config.addresses import host_and_port
from megatron_laser.config.schema.fields import (
    RUNNING,
    AtLeastOne,
    Count,
    FilePath,
    Learning,
    MinP,
    Port,
    Positive,
    Section,
    Strings,
    Text,
    TokenIds,
    TopP,
    identity,
)


def _http_url(value: str) -> str:
    host_and_port(value)
    return value.rstrip("/")


Url = Annotated[str, AfterValidator(_http_url)]
Urls = Annotated[tuple[Url, ...], Strings, Field(min_length=1)]


_SMOKE_RUN = identity("a smoke run has a folder and settings of its own")
_OTHER_ENVIRONMENT = identity(
    "samples would be made by another environment, and mean something else in the second half", branch=True
)
_OTHER_ENDS = identity("scores are read, and c_ref was measured, behind these tokens")


class SglangConfig(Section):
    """SGLang servers: where they are, or how `megatron-laser serve` starts them on a node."""

    changing = RUNNING

    urls: Urls | None = None
    """Addresses of servers that run already and are used as they are; null: those of `endpoints`, or, without
    it, servers that the run starts itself on the node of rank 0."""
    endpoints: FilePath | None = None
    """File in which `megatron-laser serve` publishes its servers (also `dir/*.json` style folders: every file in a
    folder counts). It must lie where the trainer sees it."""
    router_url: Url | None = None
    """Address of a router in front of the servers of `urls`; generation goes through it, control never does."""
    python: Text | None = None
    """Interpreter of the environment that has SGLang; null: the variable MEGATRON_LASER_SGLANG_PYTHON, else the
    trainer's own interpreter where SGLang is installed beside it, else `.venv-sglang/bin/python` in the working
    directory (looked at first with `device: cpu`, whose environment it is), else `python`."""
    servers: Count = 1
    """Servers that `serve` starts on its node."""
    tensor: Count = 1
    """Tensor-parallel size of a server, which is the number of its GPUs."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where the servers compute. `cpu` is for small models: `tools/setup_sglang_cpu.sh` makes its environment."""
    host: Text = "127.0.0.1"
    """Address that servers and router bind to: loopback, or this node's address on a private network."""
    port: Port = 30000
    """Port of the router or of the first server; each further server takes the next one that is free."""
    router: bool = False
    """Start sglang-router (cache-aware) in front of the servers of `serve`."""
    api_key_env: Text = "MEGATRON_LASER_API_KEY"
    """Environment variable with the key that servers ask for. `serve` makes one when it is not set, and
    publishes it in its endpoints file, which only its owner can read."""
    deterministic: bool = False
    """Start servers with SGLang's deterministic inference, and accept no others: each response is then sampled by a
    seed of its own, made of `run.seed` or `evaluation.seed`, the step and its place, and does not depend on what else
    the server computes. Slower; not on CPUs. false: servers ignore seeds, and two runs of one seed sample other
    responses."""
    quantization: Learning[Literal["fp8"] | None] = None
    """`fp8`: servers hold the matrices of attention, MLP and experts as float8_e4m3fn with one scale for each block of
    128 x 128, and multiply with activations quantized in groups of 128; embedding, output layer, routers, norms, biases
    and the key/value cache stay in `model.dtype`. The trainer quantizes at each weight sync and goes on in
    `model.dtype`, so responses come from another policy than the one that is trained: correct it with
    `policy.importance_cap` or `policy.importance_mask`, and judge it by the metrics `logprob_diff_mean` and
    `rollout_k3_kl` (`policy.mismatch_abort` ends a run by the first). Needs `model.dtype: bfloat16` and GPUs of Ada
    or Hopper (compute capability 8.9 or 9.0). Not run on a GPU yet. null: servers hold what the trainer has."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further options of `sglang.launch_server` by name, without the dashes: `{mem_fraction_static: 0.8}`."""
    start_deadline: Positive = 1800.0
    """Seconds that a server may take to load the model and answer."""
    hang_deadline: Positive = 300.0
    """Seconds without any sign of life after which a server counts as dead and is started again. Long prefills and
    kernels that are compiled at their first use keep a server busy: leave room for them. While weights are loaded from
    disk (`weight_sync: disk`) a server may be silent for `rollout.sync_deadline`."""


class RolloutConfig(Section):
    """How responses are sampled for training."""

    changing = RUNNING

    engine: Literal["in_process", "sglang", "none"] = "in_process"
    """Who generates: `in_process` runs the policy's weights inside rank 0's process (small models);
    `sglang` uses SGLang servers, see `sglang.*` below. `none`: nobody; it is set, whatever stands here, where nothing
    is generated (`run.mode: train_only`, `run.fake.responses`)."""
    limit: Annotated[Count | None, _SMOKE_RUN] = None
    """A smoke run of a big recipe with one override, `rollout.limit=4`: at most so many prompts a step and problems an
    evaluation, and with that at most 3 steps, 256 tokens a response, 2 responses for a problem of an evaluation, and
    warm-ups of one step, so that each part of a step is met. It writes to `run.output_dir` with -smoke behind it. null:
    the run itself."""
    prompts_per_step: Learning[Count] = 128
    """Prompts per training step; each makes one group."""
    samples_per_prompt: Learning[Count] = 8
    """Samples per prompt, the group size G of GRPO; 2 or more, but with `policy.advantage: reinforce_pp`."""
    drop_uniform_groups: Learning[bool] = False
    """Drop groups whose samples all have one reward, which teach nothing about right and wrong, and try further
    prompts until `prompts_per_step` groups are there (dynamic sampling). `groups_dropped_right` and
    `groups_dropped_wrong` count them; `accuracy_tried` is the accuracy over everything that was graded, `reward_mean`
    that of the batch."""
    oversampling_cap: Learning[AtLeastOne] = 3.0
    """With `drop_uniform_groups`: a step tries at most this many times `prompts_per_step` prompts, then trains
    on what it has (on uniform groups when there is nothing else)."""
    oversample: Learning[AtLeastOne] = 1.0
    """Over-sampling with partial rollouts: start this many times the prompts that are still missing at once and stop
    when enough are complete; what is unfinished is kept and resumed in the next step, under newer weights. Above 1
    needs `engine: sglang`."""
    ahead: Learning[Literal[0, 1]] = 0
    """1: asynchronous rollouts, one step off-policy: generate for the next step while this one trains, so that
    responses come from weights one step old (needs `engine: sglang` and a correction, see
    `policy.importance_cap`). 0: strictly on-policy."""
    max_staleness: Learning[Count] = 2
    """Largest number of steps by which a token's weights may be older than those that are trained; a partial
    response of an earlier step that would pass it is generated anew, and then the step waits for it."""
    max_new_tokens: Learning[Count] = 8192
    """Longest response, in tokens. A response cut here has no score. With `function` it counts what the environment
    writes, too."""
    function: Annotated[Text | None, _OTHER_ENVIRONMENT] = None
    """An async function of yours that makes a sample, of several turns, with tools or an environment:
    `path/to/file.py:function` or `package.module:function`, see [rollout.md](rollout.md#a-function-of-yours). null: the
    policy answers in one piece. It is checked before the run starts; runs in the process of rank 0; and makes the
    responses of the run's evaluations as well."""
    function_options: Annotated[dict[str, Any], _OTHER_ENVIRONMENT] = Field(default_factory=dict)
    """Keyword arguments of `function`: `{max_turns: 4}`."""
    function_deadline: Positive | None = None
    """Seconds that `function` may take for one sample, waiting for servers included; null: 600, or half of `deadline`
    where that is less. A sample that takes longer, an
    error, or an impossible sample is counted (`function_failed_timeout`, `_error`, `_invalid`) and left out of the
    step; a step without any sample stops the run."""
    temperature: Learning[Positive] = 1.0
    """Sampling temperature. Response log-probs are of logits / temperature; the score never is."""
    top_p: Learning[TopP] = 1.0
    """Nucleus sampling: of the `top_k` most probable tokens those that reach so much probability together. Below 1 it
    needs `top_k`. Evaluations have a top_p of their own, see `evaluation.top_p`."""
    top_k: Learning[Count | None] = None
    """Sample from so many of the most probable tokens, 2 to 128; null: from all. The engine then tells from which
    tokens each was sampled, and log-probs of responses, and so ratios and KL, are those of the softmax over these
    tokens alone, on both sides; entropy and score stay those of the whole vocabulary."""
    min_p: Learning[MinP] = 0.0
    """Leave out tokens whose probability is below so much of the most probable one's, in [0, 1). Above 0 it needs
    `top_k`."""
    stop_token_ids: Annotated[TokenIds | None, _OTHER_ENDS] = None
    """Token ids that end a response; null: the EOS ids of the model's generation_config.json. Only a
    response that ended on one of them has a score."""
    deadline: Positive = 3600.0
    """Seconds that one step's rollout may take before the run stops with an error."""
    max_batch_size: Count = 256
    """Sequences generated at once by the in-process engine."""
    max_concurrency_per_server: Count = 256
    """Requests that are open at once on each server; what is beyond waits in rank 0. Servers that join or die change
    the sum. Each is a connection, which counts as an open file of rank 0: the run raises its limit, and ends with an
    error where `ulimit -Hn` does not let it. With a router so many times the servers go through it."""
    min_servers: Count = 1
    """The run goes on while at least so many servers are healthy and hold the current weights; below it waits
    for up to `servers_deadline`."""
    servers_deadline: Positive = 900.0
    """Seconds to wait for `min_servers` healthy servers before the run saves and stops, with the reason."""
    weight_sync: Literal["distributed", "disk", "colocated"] = "distributed"
    """How servers get new weights: `distributed` broadcasts buckets (NCCL between GPUs, gloo on CPUs); `disk`
    writes a folder that all servers can read; `colocated`: servers share the trainer's GPUs, each side
    offloads its memory while the other computes, and weights are handed over by CUDA IPC."""
    sync_folder: FilePath | None = None
    """With `weight_sync: disk`: folder for the weights, which trainer and servers both see, and of this run alone:
    older weights in it are deleted; null: `output_dir`/weights."""
    sync_bucket_mib: Count = 512
    """Size of a bucket of weights in MiB. Rank 0 holds two of them beside its shard of the model."""
    sync_flatten: bool = True
    """With `weight_sync: distributed`: one broadcast for each bucket; false: one for each tensor."""
    sync_deadline: Positive = 600.0
    """Seconds that one weight sync may take."""
    sync_address: Text | None = None
    """With `weight_sync: distributed`: address of rank 0's node that servers can reach; null: loopback when all
    servers are on loopback, else the address from which rank 0 reaches the first server."""
    verify_sync: bool = False
    """Compare checksums of the servers' weights with the trainer's after every sync; the first weights of a run and
    the first update of them are always compared."""
    sglang: SglangConfig = Field(default_factory=SglangConfig)
    """The servers."""

    @field_validator("function")
    @classmethod
    def _has_module_and_name(cls, value: str | None) -> str | None:
        if value is not None:
            module, _, function = value.rpartition(":")
            if not (module and function.isidentifier()):
                raise ValueError("expected 'path/to/file.py:function' or 'package.module:function'")
        return value
