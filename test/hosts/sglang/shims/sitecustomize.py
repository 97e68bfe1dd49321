"""Lets torchvision's CUDA build be imported beside a CPU build of torch.

Its operator library cannot load there, and ``torchvision._meta_registrations`` then fails on operators that have no
schema. A text-only model uses none of them: an empty module of that name is enough.
"""

import sys
import types

_NAME = "torchvision._meta_registrations"
sys.modules.setdefault(_NAME, types.ModuleType(_NAME))
