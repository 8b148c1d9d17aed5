"""Which files of tests take the longest."""

from __future__ import annotations

# Files that take more than about ten seconds, of a processor or by the clock: they go first, the longest before all, so
# that at the end of a run whose files are shared out no process is left alone with one. Those of the page stand
# together: a browser lasts as long as a process has tests of that folder, one after another.
LONGEST = (
    "tests/test_readme.py",
    "tests/replicas/test_ray_serve.py",
    "tests/training/test_ranks.py",
    "tests/test_other_device.py",
    "tests/recipes/test_ranks.py",
    "tests/ops/test_triton.py",
    "tests/server/test_process.py",
    "tests/server/page/test_conversations.py",
    "tests/server/page/test_live_view.py",
    "tests/server/page/test_chat.py",
    "tests/server/page/test_run_page.py",
    "tests/server/page/test_access.py",
    "tests/server/page/test_hostile.py",
    "tests/server/page/test_real_server.py",
    "tests/server/test_fields.py",
    "tests/server/test_routes.py",
    "tests/test_house.py",
    "tests/text/output/test_cuts.py",
    "tests/parallel/test_processes.py",
    "tests/server/test_key_limits.py",
    "tests/engine/test_memory.py",
    "tests/cli/test_experts.py",
    "tests/durability/test_publications.py",
    "tests/ops/test_attention_mixer.py",
    "tests/server/test_agent_history.py",
    "tests/server/test_thinking.py",
    "tests/docs/test_fine_tune.py",
    "tests/cli/test_quantize.py",
    "tests/checkpoint/test_float_forms.py",
    "tests/engine/test_drafter.py",
    "tests/engine/test_prefix_eviction.py",
    "tests/engine/test_shares.py",
    "tests/claims/test_claims.py",
    "tests/cli/test_edges.py",
    "tests/recipes/test_gspo.py",
    "tests/server/test_soak.py",
    "tests/engine/test_disk_damage.py",
)
