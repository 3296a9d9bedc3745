"""Run the Python blocks of the README that an installed wheel carries, in a temporary folder.

    python -I tests/installed_readme.py

-I keeps the sources of this checkout out of the way.
"""

import importlib.metadata
import os
import re
import tempfile

readme = importlib.metadata.metadata("timm_contconv").get_payload()
blocks = re.findall(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
assert blocks, "the README of the wheel holds no Python"
names: dict = {"__name__": "README"}
with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"README.md, block {number}", "exec"), names)
print(f"{len(blocks)} blocks of the README ran with {names['tcc'].__file__}")
