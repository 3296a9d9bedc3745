"""What each method gains on Fashion-MNIST: `make proof`.

`data.py` reads the pictures, `arms.py` names what is compared, `training.py` trains one arm with one seed,
`robustness.py` asks a trained network what accuracy does not show, and `run.py` runs what is not recorded yet.
"""
