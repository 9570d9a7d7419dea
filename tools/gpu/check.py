"""Is this interpreter's environment the one of tools/gpu? Prints what it has; exit status 1 names what differs.

    PYTHON tools/gpu/check.py

No GPU is needed: libraries are loaded, nothing is computed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXACT = (
    *("torch", "triton", "sglang", "sglang-router", "megatron-core", "transformer-engine", "transformers"),
    *("numpy", "pyarrow"),
)


def problems(facts: Mapping[str, str], constraints: Mapping[str, str], nccl: Mapping[str, str]) -> list[str]:
    """What is not as pinned.

    Args:
        facts: of `megatron_laser.cli.environment_facts.collect`.
        constraints: package -> version, of constraints.txt.
        nccl: the installed nvidia-nccl packages, with their versions.
    """
    found = []
    for name in EXACT:
        if facts[name].split("+")[0] != constraints[name]:
            found.append(f"{name} is {facts[name]}, expected {constraints[name]}")
    if facts["transformer-engine-torch"] != constraints["transformer-engine"]:
        found.append(
            f"transformer-engine-torch is {facts['transformer-engine-torch']}, expected "
            f"{constraints['transformer-engine']}, built against this torch"
        )
    if not facts.get("cuda", "").startswith("13."):
        found.append(f"torch is built for CUDA {facts.get('cuda', 'none')}, expected 13")
    wanted = {name: version for name, version in constraints.items() if name.startswith("nvidia-nccl-")}
    if dict(nccl) != wanted:
        found.append(f"NCCL packages are {dict(nccl) or 'none'}, expected {wanted}")
    if facts.get("nccl") not in wanted.values():
        found.append(
            f"torch loads NCCL {facts.get('nccl', 'none')}, expected {', '.join(wanted.values())}: another libnccl "
            "comes before torch's; look at LD_LIBRARY_PATH and LD_PRELOAD"
        )
    return found


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    from resolve import CONSTRAINTS, canonical, read_constraints

    # By path: that this package imports is the set-up's next step to show, not this one's.
    environment = runpy.run_path(str(ROOT / "megatron_laser" / "cli" / "environment_facts.py"))
    facts, constraints = environment["collect"](), read_constraints()
    nccl = {
        name: distribution.version
        for distribution in importlib.metadata.distributions()
        if (name := canonical(distribution.metadata["Name"])).startswith("nvidia-nccl-")
    }
    for name, value in facts.items():
        print(f"{name:26s} {value}")
    if facts["apex"] == "not installed":
        print("apex is left out: Transformer Engine has FusedAdam and the GEMM that accumulates gradients")
    wrong = problems(facts, constraints, nccl)
    for problem in wrong:
        print(f"WRONG: {problem}", file=sys.stderr)
    print("one torch, one NCCL: as pinned" if not wrong else f"{len(wrong)} differences from {CONSTRAINTS}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
