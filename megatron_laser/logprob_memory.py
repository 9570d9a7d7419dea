"""What the log-prob op may keep in memory, by arithmetic: the op spends it, the dry run counts it. No torch."""

from __future__ import annotations

MIB, GIB = 2**20, 2**30

# One tile of float32 logits: 8448 columns of 16384 rows.
TILE_BYTES = 528 * MIB
# Probabilities are kept in tiles of several slices: the fewer there are, the less often dX is read and written; the
# smaller they are, the earlier the backward gives memory back. In bfloat16 this is four slices as wide as a tile.
KEPT_TILE_BYTES = 2 * TILE_BYTES

# Most that "auto" keeps. 16384 rows of 152064 columns are 4.64 GiB in bfloat16; whoever wants more says so.
KEEP_CAP_BYTES = 6 * GIB
# Never given away: the call's own tile, products and dX (1.3 GiB for 16384 rows of 5120), cuBLAS's workspaces, a
# library that loads a kernel late.
KEEP_RESERVE_BYTES = 2 * GIB
# Of the whole device, for what the caching allocator loses between blocks when sizes change from call to call.
KEEP_RESERVE_SHARE = 1 / 32
# Of what is then free. The first micro-batch need not be the longest, and the layers' activations of a longer one come
# out of the other half.
KEEP_SHARE = 1 / 2
# What is chosen is a multiple of this: another version of a driver or a few buffers more do not change it.
KEEP_STEP_BYTES = 512 * MIB
# On a CPU "auto" is a constant and never what happens to be free: CPU runs are compared bit for bit, and what is kept
# is rounded otherwise than what is recomputed. Enough for everything of a model that is trained on a CPU (2048 rows
# of 32768 columns in float32 are 256 MiB), and nothing that another process on the machine would miss.
KEEP_CPU_BYTES = 512 * MIB
# One tile of logits of torch's backend, and one of probabilities that it keeps.
CPU_TILE_BYTES = 64 * MIB


def choose_keep_budget(free_bytes: int, total_bytes: int, cap: int = KEEP_CAP_BYTES) -> int:
    """Bytes of probabilities that one log-prob call may keep for its backward on a GPU with so much memory free.

    At most `cap` and half of what is free after a reserve of 2 GiB and 1/32 of the device, rounded down to 512 MiB.

    Args:
        free_bytes: free when the call begins, with everything else that will be there in a later step already
            taken off: the optimizer's moments, which its first step makes.
        total_bytes: memory of the device.
    """
    reserve = KEEP_RESERVE_BYTES + int(KEEP_RESERVE_SHARE * total_bytes)
    share = int(KEEP_SHARE * max(0, free_bytes - reserve))
    return min(cap, share // KEEP_STEP_BYTES * KEEP_STEP_BYTES)
