"""`python -m timm_contconv` is `contconv`."""

from contconv import app

app()
