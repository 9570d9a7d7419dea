"""What `serve` is going to start on this node: ports, GPUs, key and files, settled before any process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from megatron_laser.config import ConfigError, RunConfig, check_model_folder
from megatron_laser.config.addresses import http_url
from megatron_laser.config.model_folder.safetensors_headers import has_weight_files
from megatron_laser.config.schema.rollout import SglangConfig
from megatron_laser.rollout.open_files import raise_open_files
from megatron_laser.rollout.servers.command import assign_gpus, find_python
from megatron_laser.rollout.servers.fp8_gpus import check_gpus
from megatron_laser.rollout.servers.installed import Installed, check_sglang
from megatron_laser.rollout.servers.ports import PortFinder

_LOCK_DEADLINE = 45.0  # seconds; the watcher of a killed serve may still be cleaning up


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """The servers of one node.

    Attributes:
        config: the run.
        python: interpreter of SGLang's environment.
        ports: one per server.
        router_port: None: no router.
        gpus: CUDA_VISIBLE_DEVICES per server, None on a CPU.
        api_key: what servers and router ask for.
        endpoints: the file to publish.
        folder: for logs; the processes' working directory.
        mark: what all processes of this serve carry.
        installed: versions in SGLang's environment.
        remarks: what the user should know before the start.
    """

    config: RunConfig
    python: str
    ports: tuple[int, ...]
    router_port: int | None
    gpus: tuple[str | None, ...]
    api_key: str | None = field(repr=False)
    endpoints: Path
    folder: Path
    mark: str
    installed: Installed
    remarks: tuple[str, ...] = ()

    def url(self, port: int) -> str:
        """Address of a server on this node."""
        return http_url(self.config.rollout.sglang.host, port)

    def settings_file(self, number: int) -> Path:
        """Where the options of a server are while it runs; the key is among them."""
        return self.folder / f"server_{number}.yaml"

    def settings_files(self) -> list[Path]:
        """Those of all servers."""
        return [self.settings_file(number) for number in range(len(self.ports))]


def plan_fleet(config: RunConfig, endpoints: Path) -> FleetPlan:
    """Settle what will be started; nothing runs yet.

    Raises:
        ModelFolderError: the model folder's weights are not those of its config.json, or cannot be used.
        ConfigError: no SGLang, too few GPUs or open files, a taken port, or a folder that cannot be written.
    """
    sglang = config.rollout.sglang
    if config.rollout.engine != "sglang":
        raise ConfigError(
            [f"rollout.engine: {config.rollout.engine}; serve starts SGLang servers: set it to sglang"]
        )
    if sglang.urls is not None:
        raise ConfigError(
            [
                "rollout.sglang.urls names servers that run already; remove it, or do without `megatron-laser serve`"
            ]
        )
    if not (Path(config.model.path) / "config.json").is_file():
        raise ConfigError(
            [f"model.path: {config.model.path} has no config.json; expected a Hugging Face model folder"]
        )
    if has_weight_files(config.model.path):  # servers may be told to make them up
        check_model_folder(config.model.path)
    # Servers and router inherit it.
    raise_open_files(config.rollout.max_concurrency_per_server, sglang.servers)
    python = find_python(sglang, Path.cwd())
    installed = check_sglang(python, router=sglang.router, cuda=sglang.device == "cuda")
    check_gpus(config)
    gpus: tuple[str | None, ...] = (None,) * sglang.servers
    if sglang.device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = tuple(assign_gpus(sglang.servers, sglang.tensor, visible, None if visible else count_gpus()))
    finder = PortFinder(sglang.host, sglang.port)
    named = (
        sglang.port != SglangConfig().port
    )  # a resolved file names every setting, so the default is nobody's wish
    wanted = [
        finder.take(exactly_first=named and index == 0) for index in range(sglang.servers + sglang.router)
    ]
    folder = endpoints.parent / f"{endpoints.stem}_logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        api_key = _given_key(sglang.api_key_env) or shared_key(endpoints.parent)
    except OSError as error:
        raise ConfigError([f"{endpoints.parent} cannot be written: {error}"]) from error
    return FleetPlan(
        config=config,
        python=python,
        ports=tuple(wanted[1:] if sglang.router else wanted),
        router_port=wanted[0] if sglang.router else None,
        gpus=gpus,
        api_key=api_key,
        endpoints=endpoints,
        folder=folder,
        mark=secrets.token_hex(8),
        installed=installed,
        remarks=tuple(finder.skipped),
    )


def endpoints_file(config: RunConfig, given: Path | None) -> Path:
    """Where to publish: `given`, else rollout.sglang.endpoints; in a folder a file with this node's name.

    Raises:
        ConfigError: neither is set.
    """
    path = given.absolute() if given is not None else config.rollout.sglang.endpoints
    if path is None:
        raise ConfigError(
            [
                "rollout.sglang.endpoints: required by serve, which publishes its servers there; name a file, or a "
                "folder for several nodes, or give --endpoints"
            ]
        )
    return path if path.suffix == ".json" and not path.is_dir() else path / f"{socket.gethostname()}.json"


def claim(endpoints: Path) -> IO[str]:
    """The right to publish `endpoints`, held while the returned file is open.

    Raises:
        ConfigError: another serve has it.
    """
    file = endpoints.with_name(f".{endpoints.name}.lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"{file} cannot be written: {error}"]) from error
    until = time.monotonic() + _LOCK_DEADLINE
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip()
            # that of a killed serve is held by its watcher only until its servers are gone
            if time.monotonic() > until or _alive(owner):
                lock.close()
                raise ConfigError(
                    [
                        f"{endpoints} belongs to a serve that runs ({owner or 'unknown'}); stop it or name another file"
                    ]
                ) from None
            time.sleep(0.2)
        except OSError:  # no locks on this file system
            break
    lock.seek(0)
    lock.truncate()
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    endpoints.unlink(missing_ok=True)  # of a serve whose node went down
    return lock


def _alive(owner: str) -> bool:
    match = re.fullmatch(r"process (\d+) on (.+)", owner)
    return match is not None and (match[2] != socket.gethostname() or Path(f"/proc/{match[1]}").exists())


def _given_key(variable: str) -> str | None:
    key = os.environ.get(variable)
    if key and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.~+/=-]*", key):
        raise ConfigError(
            [
                f"rollout.sglang.api_key_env: the key in {variable} has a character that servers would misread; "
                "expected letters, digits and _.~+/=-, beginning with a letter, digit or _"
            ]
        )
    return key or None


def shared_key(folder: Path) -> str:
    """The API key of all serves that publish in `folder`; the first of them makes it.

    Raises:
        OSError: it cannot be read or written.
    """
    file = folder / ".api_key"
    if not file.exists():
        descriptor, temporary = tempfile.mkstemp(prefix=".api_key.", dir=folder)  # mode 0600
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as new:
                new.write(secrets.token_hex(32))
            with contextlib.suppress(FileExistsError):  # another node was first: its key counts
                os.link(temporary, file)
        finally:
            os.unlink(temporary)
    return file.read_text(encoding="utf-8").strip()


def count_gpus() -> int | None:
    """The GPUs of this node; None: nvidia-smi is not there or does not work."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return len(done.stdout.splitlines()) if done.returncode == 0 else None


def describe(plan: FleetPlan) -> str:
    """What will be started, in one line."""
    sglang: SglangConfig = plan.config.rollout.sglang
    ports = ", ".join(map(str, plan.ports))
    where = (
        "on the CPU" if sglang.device == "cpu" else "on GPUs " + " | ".join(gpus or "?" for gpus in plan.gpus)
    )
    count = "1 server" if len(plan.ports) == 1 else f"{len(plan.ports)} servers"
    router = f", router on port {plan.router_port}" if plan.router_port is not None else ""
    return f"{count} of {plan.config.model.path} {where}, {sglang.host} port {ports}{router}; logs in {plan.folder}"
