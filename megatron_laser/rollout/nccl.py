"""What two sides of a weight sync must share of NCCL, besides its version: settings by which each maps memory.

NCCL reads them in every process for itself and asks nobody: of two processes of one node, of which one allocates by
`cuMem` and the other does not, each opens the other's buffers in its own way and fails with "invalid argument".

`cli/environment_facts.py` also runs this file in the servers' interpreter, where this package is not installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CUMEM, NVLS = "NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE"
SETTINGS = (CUMEM, NVLS)
DEBUG = "TORCH_DISTRIBUTED_DEBUG"


def loaded_version(maps: str = "/proc/self/maps") -> str | None:
    """The version of the libnccl that this process has loaded, "2.30.7"; None: it has loaded none.

    torch.cuda.nccl.version() is that of the headers torch was built with, and a container may put another library in
    its place. Its source also runs in the servers' interpreter, so it imports what it needs itself.
    """
    import ctypes

    try:
        with open(maps) as file:
            paths = {line.split(maxsplit=5)[5].strip() for line in file if "libnccl.so" in line}
    except OSError:
        return None
    for path in sorted(paths):
        code = ctypes.c_int(0)
        try:
            failed = ctypes.CDLL(path).ncclGetVersion(ctypes.byref(code))
        except (OSError, AttributeError):
            continue
        if not failed and code.value:
            major = code.value // (10000 if code.value >= 10000 else 1000)
            rest = code.value % (10000 if code.value >= 10000 else 1000)
            return f"{major}.{rest // 100}.{rest % 100}"
    return None


def trainer_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Those that are set in the trainer's environment; for the others NCCL decides."""
    return {name: environment[name].strip() for name in SETTINGS if environment.get(name, "").strip()}


def server_settings(environment: Mapping[str, str], options: Mapping[str, Any]) -> dict[str, str]:
    """With what an SGLang server computes that is started with this environment and these options.

    SGLang (`sglang/srt/entrypoints/engine.py`, 0.5.23) sets both to 0 where they are not set, and to 1 for
    `enable_symm_mem`; `enable_nccl_nvls` sets the second one.

    Args: options: of `sglang.launch_server`, however their names are written.
    """
    from megatron_laser.config.server_options import server_option

    found = {name: "0" for name in SETTINGS} | trainer_settings(environment)
    if server_option(options, "enable_symm_mem", False):
        found |= {CUMEM: "1", NVLS: "1"}
    if server_option(options, "enable_nccl_nvls", False):
        found[NVLS] = "1"
    return found


def debugs_collectives(environment: Mapping[str, str]) -> bool:
    """Whether torch would check each collective of this side with a second one, which the other side does not send."""
    return environment.get(DEBUG, "").upper() == "DETAIL"


def setting_problems(trainer: Mapping[str, str], servers: Mapping[str, str]) -> list[str]:
    """What differs between the two sides, one line each: both values, and what to export where."""
    problems = []
    for name in SETTINGS:
        ours, theirs = trainer.get(name), servers.get(name)
        if theirs is not None and ours != theirs:
            problems.append(
                f"{name} is {theirs} in the servers and {ours or 'not set'} in the trainer, and processes of one "
                f"node that differ in it cannot open each other's buffers; export {name}={theirs} before the trainer "
                "starts, or the same value for `megatron-laser serve` and the trainer"
            )
    return problems
