"""What several tests share: tiny random models, rollout batches, and starting torchrun."""
