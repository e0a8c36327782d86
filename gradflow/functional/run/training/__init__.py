"""What a training loop does between two batches, on copies. May import what `run` may."""
