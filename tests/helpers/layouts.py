"""Workers that go through several layouts in the same processes."""

from megatron.core import parallel_state

from megatron_laser.distributed import runtime as runtimes


def laid_out(config, runtime):
    """The runtime of `config`'s layout; `runtime`: of the layout before, None at first."""
    if runtime is None:
        return runtimes.start(config)
    parallel_state.destroy_model_parallel()
    return runtimes.build_groups(config, runtime.store)
