"""What every fake SGLang server is made of: the state behind its endpoints. Standard library only.

fake_fleet.py adds calls in memory, fake_memory.py memory that comes and goes, faulty_server.py generation with faults,
fake_sglang.py a process. Each answers what it is about itself, and leaves the rest to `ServerState.answer`.
"""

from dataclasses import dataclass, field
from typing import Any

SGLANG_VERSION = "0.5.23"
LOADS = "/v1/loads?include=core"


@dataclass(eq=False)
class ServerState:
    """version: the name of its weights. sums: their checksums. info: what it says of itself, beside its version.

    load: of its one data-parallel rank, as `sglang_api.LOADS` gives it; None: it cannot say.
    """

    version: str = "default"
    paused: bool = False
    sums: dict[str, str] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    load: dict[str, Any] | None = field(
        default_factory=lambda: {"num_running_reqs": 0, "num_waiting_reqs": 0, "token_usage": 0.0}
    )

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        """What comes back, as JSON; None: there is no such endpoint."""
        if path == "/model_info":
            return {"weight_version": self.version, "is_generation": True, "model_path": "m"}
        if path == "/server_info":
            return {"version": SGLANG_VERSION, **self.info}
        if path == LOADS:
            return {"version": SGLANG_VERSION, "loads": [] if self.load is None else [self.load]}
        if path == "/weights_checker":
            return {"success": True, "ranks": [self.rank_sums()] * self.info.get("tp_size", 1)}
        if path in ("/pause_generation", "/continue_generation"):
            self.paused = path == "/pause_generation"
        elif path.startswith("/update_weights_from_"):
            self.version = body.get("weight_version", self.version)
        else:
            return None
        return {"success": True}

    def rank_sums(self) -> dict[str, Any]:
        """The checksums of one GPU."""
        return {"checksums": dict(self.sums), "per_gpu_checksum": str(sorted(self.sums.items()))}
