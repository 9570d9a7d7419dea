"""Settings of rollouts that cannot work together: refused before anything starts, with the keys and what to do."""

from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from megatron_laser.config import ConfigError, RunConfig, check_settings
from megatron_laser.config.checks.rollout import deadline_problems
from megatron_laser.config.server_options import OWN_OPTIONS
from megatron_laser.rollout.servers.command import server_command
from megatron_laser.run.compared_settings import differences, settings_of

URLS = ["http://10.0.0.5:30000", "http://10.0.0.6:30000"]


def config(rollout=None, sglang=None, policy=None, laser=None):
    data = {
        "model": {"path": "m"},
        "data": {"train": "t.jsonl"},
        "laser": {"score_token": 5, "ref_logprob": -23.0} | (laser or {}),
        "policy": policy or {},
        "rollout": {"engine": "sglang", "sglang": sglang or {}} | (rollout or {}),
        "run": {"steps": 10, "output_dir": "out"},
    }
    return RunConfig.model_validate(data)


CAP = {"importance_cap": 2.0}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rollout": {"engine": "in_process"}},
        {"rollout": {"engine": "in_process"}, "laser": {"score_source": "server"}},
        {"sglang": {"urls": URLS}},
        {"sglang": {"urls": URLS, "router_url": "http://10.0.0.5:31000"}, "rollout": {"min_servers": 2}},
        {"sglang": {"endpoints": "endpoints"}, "rollout": {"min_servers": 16}},
        {"sglang": {"servers": 4, "router": True}, "rollout": {"min_servers": 4}},
        {"sglang": {"host": "::1"}},
        {"sglang": {"host": "localhost"}},
        {"sglang": {"host": "10.1.2.3"}},
        {"sglang": {"host": "node-7.cluster"}},
        {"sglang": {"options": {"mem_fraction_static": 0.8, "--chunked-prefill-size": 4096, "lora": None}}},
        {"sglang": {"options": {"cuda_graph_bs": [1, 2, 4], "disable_radix_cache": True}}},
        {"sglang": {"options": {"pp_size": None, "enable_dp_attention": False, "max_running_requests": 64}}},
        {"sglang": {"options": {"cuda_graph_backend_prefill": "full"}}},
        {"rollout": {"weight_sync": "disk", "sync_folder": "/shared"}},
        {"rollout": {"weight_sync": "colocated"}},
        {"laser": {"score_source": "server"}, "policy": {"old_logprobs": "on_policy"}},
        {"rollout": {"ahead": 1}, "policy": CAP},
        {"rollout": {"ahead": 1, "oversample": 1.5}, "policy": CAP | {"old_logprobs": "on_policy"}},
        {"rollout": {"oversample": 1.5}, "policy": {"old_logprobs": "rollout"}},
        {"rollout": {"ahead": 1, "max_staleness": 1}, "policy": CAP},
        {"rollout": {"top_p": 0.9, "top_k": 128, "min_p": 0.05}},
        {"rollout": {"engine": "in_process", "top_k": 2}},
        {"rollout": {"top_p": 0.9, "top_k": 20}, "sglang": {"deterministic": True}},
        {"rollout": {"ahead": 1}, "policy": CAP, "laser": {"enabled": False, "score_source": "server"}},
    ],
)
def test_combinations_that_work_pass(settings):
    check_settings(config(**settings))


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        *(
            (
                {"rollout": {"engine": engine, name: value}},
                [f"rollout.{name}: {value} without rollout.top_k", "nucleus", "evaluation.top_p"],
            )
            for engine in ("sglang", "in_process")
            for name, value in (("top_p", 0.9), ("min_p", 0.1))
        ),
        *(({"rollout": {"top_k": k}}, [f"rollout.top_k: {k}", "expected 2 to 128"]) for k in (1, 129)),
        (
            {"rollout": {"top_k": 20, "min_p": 0.1}, "sglang": {"deterministic": True}},
            ["rollout.min_p: 0.1", "rollout.sglang.deterministic: true"],
        ),
        (
            {"rollout": {"top_k": 20}, "sglang": {"options": {"sampling-mask-max-tokens": 10}}},
            ["sampling_mask_max_tokens: 10", "rollout.top_k 20"],
        ),
        (
            {"sglang": {"deterministic": True, "device": "cpu"}},
            ["rollout.sglang.deterministic: true", "device cpu", "in_process"],
        ),
        (
            {"sglang": {"deterministic": True, "tensor": 2}},
            ["rollout.sglang.deterministic: true", "rollout.sglang.tensor 2", "weight_sync: disk"],
        ),
        (
            {"sglang": {"options": {"preferred_sampling_params": "{}"}}},
            ["rollout.sglang.options.preferred_sampling_params: cannot be used", "whole distribution"],
        ),
        (
            {"sglang": {"options": {"enable_deterministic_inference": True}}},
            ["follows from rollout.sglang.deterministic"],
        ),
        (
            {"sglang": {"urls": URLS, "endpoints": "e.json"}},
            ["rollout.sglang.urls and rollout.sglang.endpoints are both given", "keep one"],
        ),
        (
            {"sglang": {"router_url": "http://10.0.0.5:1"}},
            ["rollout.sglang.router_url needs rollout.sglang.urls", "go to each server"],
        ),
        (
            {"sglang": {"endpoints": "e.json", "router_url": "http://10.0.0.5:1"}},
            ["rollout.sglang.router_url needs rollout.sglang.urls"],
        ),
        (
            {"sglang": {"urls": URLS, "router": True}},
            ["rollout.sglang.router: true", "rollout.sglang.urls", "rollout.sglang.router_url"],
        ),
        (
            {"sglang": {"urls": [URLS[0], URLS[0] + "/"]}},
            ["rollout.sglang.urls", URLS[0], "names a server twice"],
        ),
        (
            {"sglang": {"servers": 2}, "rollout": {"min_servers": 3}},
            ["rollout.min_servers: 3 is more than the 2 of rollout.sglang.servers", "never start"],
        ),
        (
            {"sglang": {"urls": URLS}, "rollout": {"min_servers": 3}},
            ["rollout.min_servers: 3 is more than the 2 of rollout.sglang.urls"],
        ),
        *(
            ({"sglang": {"host": host}}, [f"rollout.sglang.host: {host}", "loopback", "private network"])
            for host in ("0.0.0.0", "::", "8.8.8.8", "2001:4860:4860::8888")
        ),
        *(
            (
                {"sglang": {"options": {name: 1}}},
                [f"rollout.sglang.options.{name}: follows from", "remove it"],
            )
            for name in (
                "model_path",
                "--model-path",
                "model",
                "tp-size",
                "tensor_parallel_size",
                "api_key",
                "--port",
            )
        ),
        *(
            (
                {"sglang": {"options": {name: value}}},
                [f"rollout.sglang.options.{name}: cannot be used: ", "remove it"],
            )
            for name, value in (
                ("dp_size", 2),
                ("--data-parallel-size", 2),
                ("attn-dp-size", 2),
                ("enable_dp_attention", True),
                ("pp_size", 2),
                ("pipeline-parallel-size", 2),
                ("nnodes", 2),
                ("node_rank", 1),
                ("dist_init_addr", "10.0.0.5:1"),
                ("nccl-init-addr", "10.0.0.5:1"),
                ("speculative_algorithm", "EAGLE"),
                ("--speculative-draft-model-path", "/m"),
                ("tokenizer_worker_num", 4),
                ("grpc_mode", True),
                ("ssl-certfile", "/c"),
                ("admin_api_key", "k"),
                ("delete_ckpt_after_loading", True),
            )
        ),
        *(
            ({"sglang": {"options": {"--mem-fraction-static": value}}}, ["a number between 0 and 1"])
            for value in ("most", -3, 85)
        ),
        *(
            (
                {"sglang": {"options": {short: 2}}},
                [f"rollout.sglang.options.{short}: SGLang would read it as {whole}", "remove it"],
            )
            for short, whole in (
                ("data-parallel", "data_parallel_size"),
                ("--tensor_par", "tensor_parallel_size"),
                ("tp", "tp_size"),
                ("--dp", "dp_size"),
            )
        ),
        (
            {
                "rollout": {"weight_sync": "colocated"},
                "sglang": {"options": {"cuda-graph-backend-prefill": "full"}},
            },
            ["rollout.sglang.options.cuda-graph-backend-prefill: full with rollout.weight_sync: colocated"],
        ),
        (
            {"rollout": {"deadline": 200}, "sglang": {"hang_deadline": 300}},
            [
                "rollout.deadline: 200",
                "rollout.sglang.hang_deadline 300",
                "raise the first or lower the second",
            ],
        ),
        (
            {"sglang": {"options": {"json_model_override_args": {"a": 1}}}},
            ["rollout.sglang.options.json_model_override_args: expected a value or a list", "{'a': 1}"],
        ),
        (
            {"sglang": {"urls": URLS}, "rollout": {"weight_sync": "colocated"}},
            ["rollout.weight_sync: colocated with rollout.sglang.urls", "weight_sync: distributed"],
        ),
        (
            {"sglang": {"router": True}, "rollout": {"weight_sync": "colocated"}},
            ["rollout.weight_sync: colocated with rollout.sglang.urls", "router"],
        ),
        (
            {"rollout": {"weight_sync": "colocated", "ahead": 1}, "policy": CAP},
            ["rollout.weight_sync: colocated with rollout.ahead: 1", "ahead: 0"],
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_keys_and_what_to_do(settings, parts):
    with pytest.raises(ConfigError) as error:
        check_settings(config(**settings))
    (problem,) = error.value.problems
    for part in parts:
        assert part in problem


@pytest.mark.parametrize("reason", ["rollout.ahead: 1", "rollout.oversample: 1.5"])
class TestOffPolicyResponses:
    """Responses of older weights than those that are trained need a correction, wherever they come from."""

    def settings(self, reason, **more):
        key, value = reason.removeprefix("rollout.").split(": ")
        return {"rollout": {key: float(value) if "." in value else int(value)} | more}

    @pytest.mark.parametrize("old", ["recompute", "on_policy"])
    def test_no_correction_is_refused_whatever_the_ratio_is_taken_against(self, reason, old):
        with pytest.raises(ConfigError) as error:
            check_settings(config(**self.settings(reason), policy={"old_logprobs": old}))
        (problem,) = error.value.problems
        assert problem.startswith(
            f"{reason} trains on responses of older weights; set policy.importance_cap (2.0"
        )
        for corrected in ({"old_logprobs": old} | CAP, {"old_logprobs": "rollout"}):
            check_settings(config(**self.settings(reason), policy=corrected))

    def test_scores_come_from_the_trainer(self, reason):
        with pytest.raises(ConfigError) as error:
            check_settings(config(**self.settings(reason), policy=CAP, laser={"score_source": "server"}))
        (problem,) = error.value.problems
        assert (
            f"{reason} with laser.score_source server" in problem
            and "use laser.score_source: trainer" in problem
        )

    def test_the_in_process_engine_cannot(self, reason):
        with pytest.raises(ConfigError) as error:
            check_settings(config(**self.settings(reason, engine="in_process"), policy=CAP))
        assert list(error.value.problems) == [
            f"{reason} needs rollout.engine: sglang; the in-process engine generates in one piece"
        ]


def test_a_bound_on_age_that_every_response_would_pass_is_refused():
    with pytest.raises(ConfigError) as error:
        check_settings(config(rollout={"ahead": 1, "oversample": 1.5, "max_staleness": 1}, policy=CAP))
    assert list(error.value.problems) == [
        "rollout.max_staleness: 1; rollout.ahead 1 and rollout.oversample 1.5 need 2 or more"
    ]


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        check_settings(
            config(
                rollout={"ahead": 1, "oversample": 2, "max_staleness": 1, "min_servers": 5},
                sglang={"host": "0.0.0.0", "options": {"port": 1}},
                laser={"score_source": "server"},
            )
        )
    assert len(error.value.problems) == 6


@pytest.mark.parametrize(
    ("sglang", "message"),
    [
        ({"urls": ["10.0.0.5:30000"]}, "expected an address such as http://10.0.0.5:30000"),
        ({"urls": ["http://"]}, "expected an address"),
        ({"urls": []}, "at least 1"),
        ({"router_url": "tcp://x"}, "expected an address"),
        ({"port": 70000}, "port"),
        ({"servers": 0}, "servers"),
        ({"device": "tpu"}, "device"),
        ({"start_deadline": 0}, "start_deadline"),
        ({"optoins": {}}, "optoins"),
    ],
)
def test_values_that_mean_nothing_are_refused(sglang, message):
    with pytest.raises(ValidationError, match=message):
        config(sglang=sglang)


@pytest.mark.parametrize(
    "rollout",
    [
        {"ahead": 2},
        {"oversample": 0.5},
        {"max_staleness": 0},
        {"weight_sync": "carrier"},
        {"sync_bucket_mib": 0},
    ],
)
def test_numbers_outside_their_range_are_refused(rollout):
    with pytest.raises(ValidationError, match=next(iter(rollout))):
        config(rollout=rollout)


def test_addresses_lose_a_slash_at_their_end():
    found = config(sglang={"urls": [URLS[0] + "/"], "router_url": "http://r:1/"}).rollout.sglang
    assert found.urls == (URLS[0],) and found.router_url == "http://r:1"


def test_the_options_that_are_refused_are_those_that_serve_sets_itself(tmp_path):
    command = server_command(
        config(rollout={"weight_sync": "colocated"}),
        python="python",
        port=1,
        settings_file=tmp_path / "s.yaml",
        api_key="k",
        gpus="0",
        mark="m",
        environment={},
    )
    flags = {argument[2:].replace("-", "_") for argument in command.arguments if argument.startswith("--")}
    assert flags <= set(OWN_OPTIONS)


def test_a_run_goes_on_with_other_servers_and_must_be_told_to_with_another_kind_of_data():
    first = config(sglang={"urls": URLS})
    moved = config(
        sglang={"urls": ["http://10.9.9.9:1"], "hang_deadline": 5},
        rollout={
            "min_servers": 1,
            "weight_sync": "disk",
            "sync_deadline": 5,
            "max_concurrency_per_server": 7,
            "verify_sync": True,
        },
    )
    assert {one.changing.kind for one in differences(settings_of(first), moved, {})} == {"running"}
    for changed in (
        {"ahead": 1},
        {"oversample": 2.0},
        {"max_staleness": 5},
        {"samples_per_prompt": 4},
        {"temperature": 0.9},
    ):
        other = config(sglang={"urls": URLS}, rollout=changed)
        assert [one.changing.kind for one in differences(settings_of(first), other, {})] == ["learning"]


@pytest.mark.parametrize(
    ("world_size", "sync", "whole", "refused"),
    [
        (2, 600.0, 900.0, False),
        (2, 100.0, 110.0, False),
        (2, 810.0, 900.0, False),
        (2, 850.0, 900.0, True),
        (1, 850.0, 900.0, False),
    ],
)
def test_ranks_wait_longer_for_each_other_than_a_sync_may_take(world_size, sync, whole, refused):
    rollout = SimpleNamespace(engine="sglang", sync_deadline=sync)
    problems = deadline_problems(
        SimpleNamespace(rollout=rollout, run=SimpleNamespace(deadline=whole)), world_size
    )
    assert bool(problems) is refused
    if refused:
        assert "run.deadline: 900 with rollout.sync_deadline 850" in problems[0] and "935" in problems[0]
