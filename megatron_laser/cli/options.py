"""What several commands share: arguments, options and what is made of them, and this process made ready for work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from megatron_laser.data import ChatOptions
    from megatron_laser.evaluation.prefix_rule import AskedPrefixes
    from megatron_laser.testtime import EngineChoice, ModelFolder

API_KEY_VARIABLE = "MEGATRON_LASER_API_KEY"
"""Environment variable that holds the servers' API key where none is named."""


def complete_override(incomplete: str) -> list[str]:
    """`section.key=` that begin so. Whole names always: a shell puts a space behind the only one that fits."""
    from megatron_laser.config.schema.root import key_paths

    names = (f"{section}.{key}=" for section, keys in key_paths().items() for key in keys)
    return [name for name in names if name.startswith(incomplete)]


ConfigFile = Annotated[Path, typer.Argument(help="The run's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings as [cyan]section.key=value[/] (YAML values), for example parallel.tensor=2 or "
        "rollout.sglang.options.mem_fraction_static=0.8.",
        autocompletion=complete_override,
    ),
]
SetFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--set-file",
        help="YAML file with further settings, in sections or as [cyan]section.key: value[/]: they count more than "
        "CONFIG and less than section.key=value. May be given several times; later wins.",
    ),
]
Model = Annotated[
    Path,
    typer.Argument(
        help="A training run's output folder (its hf/ and config.yaml), RUN/hf_best or RUN/hf_step_N, or a Hugging "
        "Face folder.",
        metavar="MODEL",
    ),
]
Urls = Annotated[
    list[str] | None,
    typer.Option(
        "--url",
        help="An SGLang server that holds MODEL, http://HOST:PORT; may be given several times. Without: the "
        "weights are loaded in this process.",
    ),
]
Router = Annotated[
    str | None, typer.Option("--router", help="A router in front of the servers, beside their --url.")
]
KeyVariable = Annotated[
    str, typer.Option("--api-key-env", help="Environment variable with the servers' API key.")
]
Dtype = Annotated[str, typer.Option(help="In this process: float32 or bfloat16.")]
Batch = Annotated[int, typer.Option(help="In this process: sequences at once.")]
Concurrency = Annotated[int, typer.Option(help="With servers: requests at once on each.")]
Wait = Annotated[
    float, typer.Option("--wait", help="With servers: seconds until all of them must have answered.")
]
ScoreToken = Annotated[
    str | None, typer.Option(help="The score token or its id; by default the training run's.")
]
RefLogprob = Annotated[float | None, typer.Option(help="c_ref; by default the training run's.")]
Beta = Annotated[float | None, typer.Option(help="beta_v; by default the training run's, else 0.1.")]
StopIds = Annotated[
    list[int] | None,
    typer.Option("--stop-token-id", help="What ends a response; by default the EOS ids of MODEL."),
]


TemplateArguments = Annotated[
    list[str] | None,
    typer.Option(
        "--chat-template-argument",
        help="NAME=VALUE (in YAML) for the chat template, such as enable_thinking=false; may be given several times. "
        "In place of those of the training run.",
        metavar="NAME=VALUE",
    ),
]
SystemPrompt = Annotated[
    str | None,
    typer.Option(help="First message of every chat that has no system message; by default as in training."),
]


def chat_options(
    arguments: list[str] | None, system_prompt: str | None, *, template: bool, from_run: dict[str, Any]
) -> ChatOptions:
    """What the chat template is given: the options, else what the training run gave it, else nothing."""
    import yaml

    from megatron_laser.config.yaml_text import yaml_value
    from megatron_laser.data import ChatOptions

    if not template:
        if arguments or system_prompt:
            raise typer.BadParameter(
                "--chat-template-argument and --system-prompt are for a chat template; without one leave them out"
            )
        return ChatOptions()
    given: dict[str, Any] = {}
    for text in arguments or []:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"--chat-template-argument {text!r}: expected NAME=VALUE")
        try:
            given[name] = yaml_value(value)
        except yaml.YAMLError:
            raise typer.BadParameter(
                f"--chat-template-argument {text!r}: the value is not valid YAML"
            ) from None
    return ChatOptions(
        from_run.get("chat_template_arguments", {}) if arguments is None else given,
        from_run.get("system_prompt", "") if system_prompt is None else system_prompt,
    )


def model_folder(
    path: Path,
    score_token: str | None,
    ref_logprob: float | None,
    beta: float | None,
    stop_token_ids: list[int] | None,
    *,
    with_score: bool = True,
    prefixes: AskedPrefixes | None = None,
) -> ModelFolder:
    """Prepare the process and read the model's folder; see `testtime.load_model_folder`."""
    from megatron_laser.testtime import load_model_folder

    prepare_process("WARNING", is_main=True)
    return load_model_folder(
        path,
        score_token=score_token,
        ref_logprob=ref_logprob,
        beta=beta,
        stop_token_ids=stop_token_ids or (),
        with_score=with_score,
        prefixes=prefixes,
    )


def engine_choice(
    urls: list[str] | None,
    router: str | None,
    variable: str,
    dtype: str,
    batch: int,
    concurrency: int,
    wait: float,
) -> EngineChoice:
    """The engine that the options name."""
    from megatron_laser.testtime import EngineChoice

    return EngineChoice(
        urls=tuple(urls or ()),
        router_url=router,
        api_key=os.environ.get(variable) or None,
        dtype=dtype,  # type: ignore[arg-type]
        max_batch_size=batch,
        max_concurrency_per_server=concurrency,
        wait=wait,
    )


def require_positive(name: str, value: float) -> None:
    """Refuse 0 and less as a usage error."""
    if not value > 0:
        raise typer.BadParameter(f"{name} {value}: expected a number above 0")


def prepare_process(level: str, is_main: bool) -> None:
    """Logging of this process; quiets import-time remarks of libraries about what is optional here."""
    import logging
    import warnings

    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|transformer_engine).*")
    logging.basicConfig(level=level if is_main else "ERROR", format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("megatron.core", "torch.distributed", "httpx"):
        logging.getLogger(noisy).setLevel("ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from megatron_laser.config.process_environment import drop_empty_numbers, openmp_threads

    drop_empty_numbers()
    threads = openmp_threads()
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
