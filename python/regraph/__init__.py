"""regraph from Python: attention graphs with selective recomputation.

numpy: see regraph.core. PyTorch: `import regraph.torch` (this package alone never imports torch).
Errors are RegraphError.
"""

from ._lib import lib as _library
from .arrays import float32
from .core import (Context, Plan, Policy, Session, Spec, cp_document_rows, cp_rows, default_context,
                   device_check, example, parse_size)
from .errors import RegraphError
from .graph import Graph

__version__ = _library.rg_version().decode()
__all__ = ["Context", "Graph", "Plan", "Policy", "RegraphError", "Session", "Spec",
           "cp_document_rows", "cp_rows", "default_context", "device_check", "example", "float32",
           "parse_size"]
