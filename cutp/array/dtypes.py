"""The data types of weights and activations, by the names checkpoints and users write.

NumPy has no bfloat16 or float8; `ml_dtypes` registers them as NumPy dtypes. All arithmetic happens in
float32 (see `ops`), so a 16-bit dtype here says how values are *rounded*, not how they are computed.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from cutp.errors import ConfigError

bfloat16 = np.dtype(ml_dtypes.bfloat16)
float16 = np.dtype(np.float16)
float32 = np.dtype(np.float32)

COMPUTE_DTYPES = {"float32": float32, "bfloat16": bfloat16, "float16": float16}
_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "float": "float32"}


def compute_dtype(name: str | np.dtype | type) -> np.dtype:
    """The dtype called `name` ("float32", "bfloat16", "float16", short forms, or a NumPy dtype).

    Raises ConfigError for anything else.
    """
    if isinstance(name, str):
        found = COMPUTE_DTYPES.get(_ALIASES.get(name, name))
    else:
        found = next((d for d in COMPUTE_DTYPES.values() if d == np.dtype(name)), None)
    if found is None:
        raise ConfigError(f"dtype {name!r} is not one of {', '.join(COMPUTE_DTYPES)}")
    return found


def dtype_name(dtype: np.dtype) -> str:
    """"bfloat16" for the bfloat16 dtype, and so on."""
    return np.dtype(dtype).name
