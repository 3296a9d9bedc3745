"""Save, load, publish and pull models.

save.py      a model to a folder; exchange.py replaces a folder as a whole
load.py      a model from a folder or from a repository; download.py gets the files
push.py      a model to a repository; card.py writes its card
build.py     timm's builder, for configurations that strangers wrote
checks.py    what such a configuration may say; skeleton.py compares the model that it describes with its weights
weights.py   the folders of hub/ at the top of the repository: weights that can be published
names.py     the names that recipes give to timm's architectures
"""

from .load import from_pretrained
from .push import push_to_hub
from .save import save_pretrained

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]
