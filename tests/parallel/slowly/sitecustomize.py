"""Python with this folder on its path takes its time over every image, so that a test can disturb a run at work."""

import importlib.abc
import importlib.util
import os
import sys
import time
from pathlib import Path

_MODULE = "ssx_mpi.stages.stills"
#: seconds added to an image, from this one on, until there is a file of this name
_DELAY = float(os.environ.get("SLOWLY_SECONDS", "0.2"))
_FROM = int(os.environ.get("SLOWLY_FROM", "0"))
_UNTIL = os.environ.get("SLOWLY_UNTIL")


class _Slowly(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads the module as others would, then puts the delay in front of its work on an image."""

    def find_spec(self, name, path=None, target=None):
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        quick = module.StillProcessor.find_spots

        def find_spots(self, image):
            if image >= _FROM and (_UNTIL is None or not Path(_UNTIL).exists()):
                time.sleep(_DELAY)
            return quick(self, image)

        module.StillProcessor.find_spots = find_spots


sys.meta_path.insert(0, _Slowly())
