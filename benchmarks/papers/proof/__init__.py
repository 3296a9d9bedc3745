"""What each method gains on Fashion-MNIST: `make proof`.

`data.py` reads the pictures, `arms.py` names what is compared, `training.py` trains one arm with one seed,
`robustness.py` asks a trained network what accuracy does not show, `run.py` runs what is not recorded yet, and
`summary.py` prints tables with intervals and draws the charts of the documentation.
"""
