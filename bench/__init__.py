"""Benchmarks, baselines and records.

Of a GPU's memory JAX takes what it needs when it needs it, and may take nearly all: PyTorch's peers need some too. This
must be said before a backend starts.
"""

import os

from pi0fast import compiler

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
compiler.take_gpu_memory()
