"""tutelage: knowledge distillation for PyTorch, from the formula to the deployed student."""

import lazy_loader

__version__ = "0.1.0"
# What there is stands in __init__.pyi, where type checkers read it too; a name is imported when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
