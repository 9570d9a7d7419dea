"""Transformer Engine's context parallelism without a GPU: its real ring over gloo, its kernels stand-ins."""

from pathlib import Path

import pytest
from helpers.torchrun import torchrun
from te_sources import VERSION, transformer_engine_sources

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RING = Path(__file__).with_name("te_ring_worker.py")


def test_its_ring_over_our_order_of_tokens_is_attention_over_whole_sequences():
    try:
        sources = transformer_engine_sources()
    except LookupError as error:
        pytest.skip(f"no Transformer Engine {VERSION} from pip: {error}")
    torchrun(RING, 4, sources)
