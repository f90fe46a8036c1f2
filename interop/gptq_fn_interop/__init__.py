"""Names, files and frameworks: what stands between checkpoints, torch, transformers and the functional core.

Here JAX and torch share a GPU. By default JAX would take three quarters of its memory at its first computation, so
importing this package asks it to allocate what it needs; XLA_PYTHON_CLIENT_PREALLOCATE=true asks for the other way.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
