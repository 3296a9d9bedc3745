"""Pictures of a model's learned kernels. Needs matplotlib (the extra `viz`)."""
