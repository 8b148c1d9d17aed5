"""Which files of tests take the longest."""

from __future__ import annotations

# Files whose tests take more than about ten seconds of a processor: they go first, so that at the end of a run whose
# files are shared out no process is left alone with one.
LONGEST = (
    "tests/test_readme.py",
    "tests/replicas/test_ray_serve.py",
    "tests/engine/test_hybrid_cache.py",
    "tests/ops/test_triton.py",
    "tests/server/test_streamed_calls.py",
    "tests/server/test_process.py",
    "tests/text/output/test_cuts.py",
    "tests/engine/test_tiers.py",
    "tests/engine/test_memory.py",
    "tests/model/test_wrapped.py",
    "tests/server/test_shares.py",
    "tests/test_house.py",
    "tests/server/test_agent_tools.py",
    "tests/engine/test_metrics.py",
    "tests/checkpoint/test_float_forms.py",
    "tests/server/test_responses.py",
    "tests/engine/test_engine.py",
    "tests/engine/test_executor.py",
    "tests/test_openmp.py",
)
