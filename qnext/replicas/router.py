"""Ray Serve's request router for replicas: by the beginnings that they hold, then by load."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from qnext.replicas.direct import Hold, Pick
from qnext.replicas.prefixes import MAX_HELD_CHUNKS, SPREAD, PrefixIndex, ranked


class PrefixRouter(RequestRouter):
    """Ranks replicas by `prefixes.ranked`. Its memory of who holds what is that of one ingress process.

    A replica without room (`max_ongoing_requests`) is passed over by Ray Serve, which asks the next one.
    """

    def initialize_state(self, *, max_chunks: int = MAX_HELD_CHUNKS, spread: int = SPREAD) -> None:
        self._index: PrefixIndex[str] = PrefixIndex(max_chunks)
        self._spread = spread

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # once all were asked in vain
        asked = pending_request.args[0] if pending_request is not None and pending_request.args else None
        if isinstance(asked, Hold):
            return [[by_name[asked.replica]]] if asked.replica in by_name else []
        if isinstance(asked, Pick):
            return self._picked(by_name, asked)
        lengths = self.replica_queue_len_cache
        loads = {name: lengths.get(replica.replica_id) or 0 for name, replica in by_name.items()}
        order = ranked(self._index, chain_in(pending_request), loads, spread=self._spread)
        return [[by_name[name]] for name in order]

    def _picked(self, by_name: dict[str, RunningReplica], pick: Pick) -> list[list[RunningReplica]]:
        """The first one is taken, and nobody says so afterwards."""
        loads = {name: pick.loads.get(name, 0) for name in by_name if name not in pick.gone}
        order = ranked(self._index, pick.chain, loads, spread=self._spread)
        for name in order[:1]:
            self._index.learn(name, pick.chain)
        return [[by_name[name]] for name in order]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._index.learn(replica_id.unique_id, chain_in(pending_request))

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._index.forget(replica_id.unique_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._index.keep([replica.replica_id.unique_id for replica in replicas])


def chain_in(pending_request: PendingRequest | None) -> tuple[bytes, ...]:
    """What a request is routed by; empty for calls that are no requests of clients."""
    call = pending_request.args[0] if pending_request is not None and pending_request.args else None
    return getattr(call, "chain", ())
