"""What the commands of `contconv` do. What they take is in the package `contconv`, which starts without timm."""
