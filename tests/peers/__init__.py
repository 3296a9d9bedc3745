"""The authors' code, or code written after their checkpoints, set up to do what one of our layers does."""
