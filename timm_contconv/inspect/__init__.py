"""Pictures of what a model's kernels have learned. Needs matplotlib (the extra `viz`)."""
