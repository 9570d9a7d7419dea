"""What SGLang's environment has installed, asked of its interpreter before anything is started."""

from __future__ import annotations

import inspect
import os
import subprocess
from dataclasses import dataclass

from megatron_laser.config import ConfigError
from megatron_laser.rollout.nccl import loaded_version
from megatron_laser.rollout.servers.command import child_environment
from megatron_laser.rollout.sglang_api import MIN_SGLANG, parse_version

_ASK_DEADLINE = 120.0  # seconds for an interpreter to say what it has installed

# NCCL comes with torch, and which one is loaded only shows then; importing it takes seconds, so only where it matters.
# A stand-in's text says that it is one; its module is not imported for that.
_SCRIPT = f"""\
{inspect.getsource(loaded_version)}
import importlib.metadata as m, importlib.util, sys
for name in ('sglang', 'sglang-router', 'torch'):
    try: print(m.version(name))
    except m.PackageNotFoundError: print('-')
try:
    if sys.argv[1:] != ['nccl']: raise ImportError
    import torch
    print(loaded_version() or '.'.join(map(str, torch.cuda.nccl.version())))
except Exception: print('-')
spec = importlib.util.find_spec('sgl_kernel')
try: text = open(spec.origin).read(500)
except Exception: text = ''
print('stand-ins' if 'Stand-in for' in text else '-')
"""


@dataclass(frozen=True, slots=True)
class Installed:
    """Versions in an environment; None: not there, or (NCCL, the loaded library's) not asked for.

    stand_ins: some libraries are the stand-ins of tools/setup_sglang_cpu.sh, which serve on CPUs alone.
    """

    sglang: str | None
    router: str | None
    torch: str | None
    nccl: str | None
    stand_ins: bool = False


def ask_installed(python: str, *, nccl: bool) -> Installed:
    """Ask the interpreter `python`.

    Args:
        nccl: also for NCCL, which imports torch.

    Raises:
        ConfigError: it does not run.
    """
    # The servers' own environment: LD_LIBRARY_PATH and LD_PRELOAD decide which NCCL it is.
    environment = child_environment(os.environ, python=python, mark="")
    command = [python, "-c", _SCRIPT, *(["nccl"] if nccl else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_DEADLINE, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError([f"rollout.sglang.python: {python} does not run: {error}"]) from error
    found = [None if word == "-" else word for word in done.stdout.split()]
    if done.returncode != 0 or len(found) != 5:
        reason = done.stderr.strip()[-300:] or f"exit status {done.returncode}, and no versions"
        raise ConfigError([f"rollout.sglang.python: {python} does not run: {reason}"])
    sglang, router, torch, nccl_version, stand_ins = found
    return Installed(sglang, router, torch, nccl_version, stand_ins is not None)


def check_sglang(python: str, *, router: bool, cuda: bool = False, nccl: bool | None = None) -> Installed:
    """What the environment of `python` has, once it is known to be enough.

    Args:
        router: whether sglang-router is needed.
        cuda: servers compute on GPUs.
        nccl: ask for NCCL, too, which imports torch (None: as `cuda`).

    Raises:
        ConfigError: SGLang is missing or too old, the router is missing, or the environment is for CPUs alone.
    """
    found = ask_installed(python, nccl=cuda if nccl is None else nccl)
    needed = ".".join(map(str, MIN_SGLANG))
    if found.sglang is None:
        raise ConfigError(
            [
                f"rollout.sglang.python: the environment of {python} has no SGLang; install sglang {needed} or newer "
                "into it, or name another interpreter there (on CPUs: tools/setup_sglang_cpu.sh)"
            ]
        )
    if cuda and (found.stand_ins or (found.torch or "").endswith("+cpu")):
        what = "stand-ins of tools/setup_sglang_cpu.sh" if found.stand_ins else f"torch {found.torch}"
        raise ConfigError(
            [
                f"rollout.sglang.device: cuda, but the environment of {python} is for CPUs ({what}); name the "
                "interpreter of one with CUDA in rollout.sglang.python, or set rollout.sglang.device: cpu for a small "
                "model"
            ]
        )
    if parse_version(found.sglang) < MIN_SGLANG:
        raise ConfigError(
            [
                f"rollout.sglang.python: {python} has SGLang {found.sglang}, and {needed} or newer is needed; "
                "upgrade it"
            ]
        )
    if router and found.router is None:
        raise ConfigError(
            [
                f"rollout.sglang.router: true, but the environment of {python} has no sglang-router; install it "
                "(pip install sglang-router), or set rollout.sglang.router to false"
            ]
        )
    return found
