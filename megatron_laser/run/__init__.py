"""What surrounds the training loop: the controller on rank 0, the ranks, inputs, engine, output folder."""
