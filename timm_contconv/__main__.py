"""`python -m timm_contconv` is `contconv`."""

from .cli import main

main()
