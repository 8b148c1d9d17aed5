"""What tests/forked.py imports before it forks: packages of others that most programs need. Nothing of qnext."""

from __future__ import annotations

import importlib
import os

# As qnext/openmp.py, whose variable torch's threads read once; and one thread, as all tests have.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ["OMP_NUM_THREADS"] = "1"

for name in ("fastapi", "httpx2", "jinja2", "numpy", "pydantic", "rich.console", "safetensors.torch", "tokenizers"):
    importlib.import_module(name)
# torch imports its compiler with the first optimiser.
for name in ("torch", "torch._dynamo", "torch.distributed", "typer", "uvicorn"):
    importlib.import_module(name)
