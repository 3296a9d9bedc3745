"""Hooks for training frameworks, a file each. A file needs its framework; nothing else of this package does."""
