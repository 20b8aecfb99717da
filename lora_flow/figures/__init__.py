"""Pictures of a run. The public names are listed in `__init__.pyi`; matplotlib is imported when one is first used."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
