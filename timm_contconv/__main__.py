"""`python -m timm_contconv` is `contconv`."""

from contconv import main

main()
