"""numpy arrays for the library's element types.

bf16 has no type in numpy: it travels as ml_dtypes.bfloat16 where that package is there, else as
uint16 with the same bits. Inputs may also be float32 or float64 arrays, which are rounded to
nearest even, as the command does.
"""

import numpy as np

from . import _lib
from .errors import RegraphError

try:
    from ml_dtypes import bfloat16 as _bfloat16
except ImportError:
    _bfloat16 = np.uint16

NUMPY = {"f32": np.dtype(np.float32), "f16": np.dtype(np.float16), "bf16": np.dtype(_bfloat16),
         "i32": np.dtype(np.int32)}


def convert(array, dtype):
    """A C-contiguous array of element type `dtype` ("bf16" …) with the values of `array`; itself
    where it is one already."""
    array = np.ascontiguousarray(array)
    target = NUMPY[dtype]
    if array.dtype == target or (dtype == "bf16" and array.dtype == np.uint16):
        return array
    if dtype == "i32":
        if not np.issubdtype(array.dtype, np.integer):
            raise RegraphError("RG_E_DTYPE", f"the array holds {array.dtype}; expected integers")
        if array.size and (array.min() < -(2**31) or array.max() >= 2**31):
            raise RegraphError("RG_E_DTYPE", "the array holds integers past 32 bits")
        return array.astype(np.int32)
    if array.dtype.kind not in "fiuV" or array.dtype == np.uint16:
        raise RegraphError("RG_E_DTYPE", f"the array holds {array.dtype}; expected {dtype}")
    source = np.ascontiguousarray(array, dtype=np.float32)
    result = np.empty(source.shape, target)
    _lib.lib.rg_convert(_lib.DTYPES.index(dtype), result.ctypes.data, 0, source.ctypes.data,
                        source.size)
    return result


def float32(array: np.ndarray) -> np.ndarray:
    """The values of an array that a session returned, as float32 (uint16 is taken for the bits of
    bf16)."""
    if array.dtype != np.uint16:
        return array.astype(np.float32)
    return (array.astype(np.uint32) << 16).view(np.float32)
