"""What each method gains on Fashion-MNIST: `make proof`.

`data.py` reads the pictures, `arms.py` names what is compared, `training.py` trains one arm with one seed,
`robustness.py`, `resolution.py` and `geometry.py` ask a trained network what accuracy does not show, `run.py` runs what
is not recorded yet, and `summary.py` writes docs/gains.md from what is.
"""
