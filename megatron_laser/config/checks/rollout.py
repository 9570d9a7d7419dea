"""Cross-field checks of rollouts by servers: what cannot work together, before anything is started."""

from __future__ import annotations

import ipaddress

from megatron_laser.config.readouts import readout_setting
from megatron_laser.config.schema.rollout import RolloutConfig
from megatron_laser.config.schema.root import RunConfig
from megatron_laser.config.server_options import option_problems, replay_problems, server_option

MOST_TOP_K = 128
"""Of each token of a batch so many ids are kept, at most: 4 bytes for each."""

SYNC_MARGIN = 1.1
"""`run.deadline` over `rollout.sync_deadline`: rank 0 gives up, aborts the group and tells the others in between."""


def rollout_problems(config: RunConfig) -> list[str]:
    """Problems of the rollout section with itself and with others; one line each."""
    rollout = config.rollout
    problems = [*_nucleus_problems(rollout), *_staleness_problems(config), *_function_problems(config)]
    if rollout.engine == "none":
        return problems
    if rollout.engine == "in_process":
        if rollout.sglang.quantization is not None:
            problems.append(
                "rollout.sglang.quantization: fp8 needs rollout.engine: sglang; the in-process engine computes in "
                "model.dtype"
            )
        return [*problems, *_in_process_problems(rollout)]
    problems += _server_problems(rollout)
    problems += option_problems(rollout)
    if config.moe.routing_replay:
        problems += replay_problems(rollout.sglang.options, prefix="rollout.sglang.options.")
    problems += _seed_problems(rollout)
    problems += _quantization_problems(config)
    if rollout.weight_sync == "colocated":
        problems += _colocated_problems(rollout)
    return problems


def _nucleus_problems(rollout: RolloutConfig) -> list[str]:
    """Responses may come from a set of tokens only where the engine can tell which, for each of them."""
    narrow = [f"rollout.top_p: {rollout.top_p:g}"] if rollout.top_p < 1.0 else []
    narrow += [f"rollout.min_p: {rollout.min_p:g}"] if rollout.min_p else []
    if rollout.top_k is None and narrow:
        return [
            f"{' and '.join(narrow)} without rollout.top_k; log-probs of training are made over the tokens that each "
            "was sampled from (the nucleus), and without a limit these could be the whole vocabulary. Set rollout.top_k"
            f" (2 to {MOST_TOP_K}); evaluation.top_p needs none"
        ]
    if rollout.top_k is None:
        return []
    problems = []
    if not 2 <= rollout.top_k <= MOST_TOP_K:
        problems.append(
            f"rollout.top_k: {rollout.top_k}; expected 2 to {MOST_TOP_K}: of one token there is nothing to learn, and "
            "the tokens that each was sampled from are kept and sent to all ranks; null samples from all"
        )
    if rollout.engine != "sglang":
        return problems
    if rollout.min_p and rollout.sglang.deterministic:
        problems.append(
            f"rollout.min_p: {rollout.min_p:g} with rollout.sglang.deterministic: true; SGLang samples by seeds "
            "without min_p only, and the server would end. Use 0, or false"
        )
    limit = server_option(rollout.sglang.options, "sampling_mask_max_tokens", None)
    if isinstance(limit, int) and limit < rollout.top_k:
        problems.append(
            f"rollout.sglang.options.sampling_mask_max_tokens: {limit} is less than rollout.top_k {rollout.top_k}; the "
            "servers would refuse every request: remove it"
        )
    return problems


def _function_problems(config: RunConfig) -> list[str]:
    """What a `rollout.function` cannot be combined with."""
    rollout = config.rollout
    if rollout.function is None:
        given = rollout.function_options
        return [f"rollout.function_options: {given} without rollout.function; name one"] if given else []
    problems = []
    if rollout.oversample > 1:
        problems.append(
            f"rollout.function with rollout.oversample: {rollout.oversample:g}: a function cannot be stopped in the "
            "middle of a sample and go on in the next step; use oversample: 1"
        )
    if config.moe.routing_replay:
        problems.append(
            "rollout.function with moe.routing_replay: true: the experts of a sample of several turns are not put "
            "together; use routing_replay: false"
        )
    if rollout.function_deadline is not None and rollout.function_deadline > rollout.deadline:
        problems.append(
            f"rollout.function_deadline: {rollout.function_deadline:g} is longer than rollout.deadline "
            f"{rollout.deadline:g}; one slow sample would stop the run: lower the first or raise the second"
        )
    return problems


def _seed_problems(rollout: RolloutConfig) -> list[str]:
    """Where servers cannot sample by seeds, although `rollout.sglang.deterministic` asks for it."""
    sglang = rollout.sglang
    if not sglang.deterministic:
        return []
    if sglang.device == "cpu":
        return [
            "rollout.sglang.deterministic: true with rollout.sglang.device cpu; SGLang has no deterministic attention "
            "there. Use false (servers then ignore run.seed), or rollout.engine: in_process, which samples by it"
        ]
    if sglang.tensor > 1 and rollout.weight_sync == "distributed":
        return [
            f"rollout.sglang.deterministic: true with rollout.sglang.tensor {sglang.tensor} and rollout.weight_sync "
            "distributed; such a server pins the number of its NCCL channels, which must be the same in all processes "
            "that exchange weights. Use tensor 1 and more servers, weight_sync: disk, or false"
        ]
    return []


def _quantization_problems(config: RunConfig) -> list[str]:
    sglang = config.rollout.sglang
    if sglang.quantization is None:
        return []
    problems = []
    if sglang.device == "cpu":
        problems.append(
            "rollout.sglang.quantization: fp8 with rollout.sglang.device cpu; SGLang multiplies FP8 there with AMX "
            "only, and packs weights for it in a way that no weight sync undoes. Use null"
        )
    if config.model.dtype != "bfloat16":
        problems.append(
            f"rollout.sglang.quantization: fp8 with model.dtype {config.model.dtype}; SGLang's FP8 kernels take "
            "activations in bfloat16. Use model.dtype: bfloat16, or null"
        )
    return problems


def quantization_warnings(config: RunConfig) -> list[str]:
    """What is allowed with `rollout.sglang.quantization`, but hardly what is wanted; one line each."""
    if config.rollout.engine != "sglang" or config.rollout.sglang.quantization is None:
        return []
    policy, warnings = config.policy, []
    if policy.old_logprobs != "rollout" and policy.importance_cap is None and policy.importance_mask is None:
        warnings.append(
            "rollout.sglang.quantization: fp8 samples from another policy than the one that is trained, and nothing "
            "corrects for it; set policy.importance_cap (2.0, truncated importance sampling) or "
            "policy.importance_mask, and watch logprob_diff_mean and rollout_k3_kl"
        )
    if config.laser.enabled and config.laser.score_source == "server":
        warnings.append(
            "rollout.sglang.quantization: fp8 with laser.score_source server: scores for advantages and metrics are "
            f"of the quantized model, and {readout_setting(config, 0, 'ref_logprob')} was measured on the plain one; "
            "laser.score_source: trainer has the trainer's own"
        )
    return warnings


def off_policy_reason(rollout: RolloutConfig) -> str | None:
    """The setting by which responses come from older weights than those that are trained; None: none does."""
    if rollout.ahead:
        return f"rollout.ahead: {rollout.ahead}"
    if rollout.oversample > 1:
        return f"rollout.oversample: {rollout.oversample:g}"
    return None


def _staleness_problems(config: RunConfig) -> list[str]:
    reason = off_policy_reason(config.rollout)
    if reason is None:
        return []
    problems = []
    if config.policy.old_logprobs != "rollout" and config.policy.importance_cap is None:
        problems.append(
            f"{reason} trains on responses of older weights; set policy.importance_cap (2.0, truncated importance "
            "sampling), or policy.old_logprobs: rollout"
        )
    if config.laser.enabled and config.laser.score_source == "server":
        problems.append(
            f"{reason} with laser.score_source server: the server's score would come from other weights than the "
            "step's; use laser.score_source: trainer"
        )
    needed = config.rollout.ahead + (1 if config.rollout.oversample > 1 else 0)
    if config.rollout.max_staleness < needed:
        problems.append(
            f"rollout.max_staleness: {config.rollout.max_staleness}; rollout.ahead {config.rollout.ahead} and "
            f"rollout.oversample {config.rollout.oversample:g} need {needed} or more"
        )
    return problems


def _in_process_problems(rollout: RolloutConfig) -> list[str]:
    reason = off_policy_reason(rollout)
    if reason is None:
        return []
    return [f"{reason} needs rollout.engine: sglang; the in-process engine generates in one piece"]


def _server_problems(rollout: RolloutConfig) -> list[str]:
    sglang = rollout.sglang
    problems = []
    if sglang.urls is not None and sglang.endpoints is not None:
        problems.append(
            "rollout.sglang.urls and rollout.sglang.endpoints are both given; keep one: addresses, or the file "
            "that `megatron-laser serve` publishes"
        )
    if sglang.router_url is not None and sglang.urls is None:
        problems.append(
            "rollout.sglang.router_url needs rollout.sglang.urls: a router forwards generation, but pausing and "
            "weight updates go to each server"
        )
    if sglang.urls is not None and sglang.router:
        problems.append(
            "rollout.sglang.router: true starts a router for servers of `megatron-laser serve`, and those of "
            "rollout.sglang.urls run already; give their router's address in rollout.sglang.router_url, or remove it"
        )
    if sglang.urls is not None and len(set(sglang.urls)) < len(sglang.urls):
        problems.append(f"rollout.sglang.urls: {list(sglang.urls)} names a server twice")
    known = len(sglang.urls) if sglang.urls is not None else None if sglang.endpoints else sglang.servers
    if known is not None and rollout.min_servers > known:
        name = "rollout.sglang.urls" if sglang.urls is not None else "rollout.sglang.servers"
        problems.append(
            f"rollout.min_servers: {rollout.min_servers} is more than the {known} of {name}; the run would never start"
        )
    if rollout.deadline <= sglang.hang_deadline:
        problems.append(
            f"rollout.deadline: {rollout.deadline:g} is not longer than rollout.sglang.hang_deadline "
            f"{sglang.hang_deadline:g}; a server that hangs would end the step before it counts as dead and its "
            "requests are repeated on others: raise the first or lower the second"
        )
    problems += host_problems(sglang.host)
    return problems


def host_problems(host: str) -> list[str]:
    """A server takes weights and control from whoever reaches it: loopback or a named private address only."""
    if host == "localhost":
        return []
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return []  # a host name: whoever runs the cluster's DNS knows what it is
    if address.is_unspecified or not (address.is_private or address.is_loopback or address.is_link_local):
        return [
            f"rollout.sglang.host: {host}; expected loopback or this node's address on a private network, since "
            "whoever reaches a server can replace its weights"
        ]
    return []


def _colocated_problems(rollout: RolloutConfig) -> list[str]:
    problems = []
    sglang = rollout.sglang
    if sglang.urls is not None or sglang.endpoints is not None or sglang.router:
        problems.append(
            "rollout.weight_sync: colocated with rollout.sglang.urls, endpoints or router: the servers share the "
            "trainer's GPUs and are started with the run, on its node; remove them or use weight_sync: distributed"
        )
    if rollout.ahead:
        problems.append(
            "rollout.weight_sync: colocated with rollout.ahead: 1; the same GPUs cannot generate and train at once: "
            "use ahead: 0, or servers on GPUs of their own"
        )
    return problems


def deadline_problems(config: RunConfig, world_size: int) -> list[str]:
    """All ranks wait while rank 0 syncs weights: their own deadline must not end a sync that may still succeed."""
    needed = round(config.rollout.sync_deadline * SYNC_MARGIN, 6)  # 1.1 x 100 is more than 110 in binary
    if config.rollout.engine != "sglang" or world_size == 1 or needed <= config.run.deadline:
        return []
    return [
        f"run.deadline: {config.run.deadline:g} with rollout.sync_deadline {config.rollout.sync_deadline:g}; the other "
        f"ranks wait for a weight sync, so expected {needed:g} or more ({SYNC_MARGIN:g} times it): raise "
        "run.deadline, or lower rollout.sync_deadline"
    ]


def colocated_gpus(rollout: RolloutConfig) -> int | None:
    """GPUs that colocated servers share with the trainer, and so its number of ranks; None for other settings."""
    if rollout.engine != "sglang" or rollout.weight_sync != "colocated" or rollout.sglang.device == "cpu":
        return None
    return rollout.sglang.servers * rollout.sglang.tensor


def colocated_layout_problems(rollout: RolloutConfig, world_size: int) -> list[str]:
    """Colocated servers on other GPUs than the trainer's `world_size` would idle, or leave some of them idle."""
    gpus = colocated_gpus(rollout)
    if gpus in (None, world_size):
        return []
    sglang = rollout.sglang
    return [
        f"rollout.weight_sync: colocated with rollout.sglang.servers {sglang.servers} x rollout.sglang.tensor "
        f"{sglang.tensor} = {gpus} GPUs and {world_size} trainer ranks: they share GPUs, so expected as many of both"
    ]
