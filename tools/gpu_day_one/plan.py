"""Which parts there are, in which order, side by side with what, and how long each may take; no heavy imports."""

from __future__ import annotations

from dataclasses import dataclass

REHEARSAL_LIMIT = 150  # seconds of any part at toy size on a CPU


@dataclass(frozen=True)
class Part:
    """One process: `function` of `module`; `limit`: seconds on a GPU."""

    stage: str
    name: str
    module: str
    function: str
    limit: int

    @property
    def full_name(self) -> str:
        """`stage`, or `stage.name`."""
        return f"{self.stage}.{self.name}" if self.name else self.stage


BASE = Part("small", "base", "small", "base", 240)
TRAIN = Part("small", "", "small", "train", 290)
# Rounds follow each other; the lanes of one round run side by side, the parts of a lane one after the other. What is
# timed has the GPU to itself. The small example takes minutes whatever the GPU (a step is hundreds of tiny kernels), so
# what is not timed runs beside it.
ROUNDS: tuple[tuple[tuple[Part, ...], ...], ...] = (
    ((Part("env", "", "env", "run", 60),),),
    ((Part("kernels", "exact", "exact", "engines", 80),),),
    # The CUDA C++ kernel alone: a kernel that hangs cannot be interrupted from inside.
    ((Part("kernels", "cuda", "exact", "cuda_kernel", 60),),),
    ((Part("kernels", "linear", "kernels", "linear", 130),),),
    ((Part("train", "", "train", "run", 130),),),
    ((Part("kernels", "score", "kernels", "score", 40),),),
    (
        (TRAIN,),
        (Part("tests", "", "gpu_tests", "run", 150), Part("server", "", "server", "run", 120)),
    ),
    ((Part("offload", "", "offload", "run", 50),),),
    ((Part("kernels", "choices", "kernels", "choices", 60),),),
)
# Needs no GPU: begins at once, beside everything, and the small example waits for it.
BACKGROUND = (BASE,)


def parts() -> list[Part]:
    """All of them, in order."""
    return [*BACKGROUND, *(part for lanes in ROUNDS for lane in lanes for part in lane)]


def chosen(only: str | None) -> set[str]:
    """Full names of the parts that `only` names (stages or parts, separated by commas); all for None.

    Raises ValueError for a name that is neither.
    """
    everything = parts()
    if only is None:
        return {part.full_name for part in everything}
    found = set()
    for name in only.split(","):
        matching = {part.full_name for part in everything if name in (part.stage, part.full_name)}
        if not matching:
            stages = dict.fromkeys(part.stage for part in everything)
            raise ValueError(f"--only {name}: no such stage; there are {', '.join(stages)}")
        found |= matching
    if TRAIN.full_name in found:
        found.add(BASE.full_name)
    return found
