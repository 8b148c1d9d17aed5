"""Experts that are read when they are needed give the bits of those in memory, whatever is resident."""

from __future__ import annotations

import os
import random
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qnext import ops
from qnext.residency.policy import ResidentSet
from qnext.residency.store import ExpertStore, record_matrices
from tests.residency.records import (
    HIDDEN,
    NUM_EXPERTS,
    RING,
    THREADS,
    WIDTH,
    Layer,
    make_layer,
    open_store,
    write_file,
)

pytestmark = pytest.mark.skipif(ops.instruction_set() is None, reason="records are read by the native kernels")
FORMS = ("int4", "int8", "int4 with zeros", "bfloat16", "float32")


def routing_of(num_tokens: int, generator: torch.Generator, *, top_k: int = 4) -> ops.Routing:
    experts = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:top_k] for _ in range(num_tokens)])
    return ops.Routing(torch.rand(num_tokens, top_k, generator=generator), experts)


def shared_expert(generator: torch.Generator) -> ops.SharedExpert:
    gate, up, down = (torch.randn(s, generator=generator) for s in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)))
    return ops.SharedExpert(gate, up, down, torch.randn(1, HIDDEN, generator=generator))


@pytest.mark.parametrize("form", FORMS)
def test_a_table_in_memory_has_the_bits_of_panels(form: str) -> None:
    layer, layout = make_layer(form, seed=0)
    table = ops.ExpertTable(NUM_EXPERTS, layout.stride)
    table.memory_EB.copy_(layer.records_EB)
    gate_up, down = (ops.RecordWeight(matrix, table) for matrix in record_matrices(layout))
    for ours, theirs in ((gate_up, layer.gate_up), (down, layer.down)):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        assert torch.equal(ours.dequantize(), ops.dequantize(theirs, torch.float32))
    assert gate_up.nbytes + down.nbytes == table.memory_EB[:, : layout.num_bytes].nbytes
    generator = torch.Generator().manual_seed(1)
    for num_tokens in (1, 3, 70):
        x_TD, routing = torch.randn(num_tokens, HIDDEN, generator=generator), routing_of(num_tokens, generator)
        for shared in (None, shared_expert(generator)):
            want = ops.experts_swiglu(x_TD, layer.gate_up, layer.down, routing=routing, shared=shared)
            assert torch.equal(ops.experts_swiglu(x_TD, gate_up, down, routing=routing, shared=shared), want)


@pytest.mark.parametrize("reader", [RING, THREADS], ids=["io_uring", "threads"])
@pytest.mark.parametrize(
    ("form", "slots", "spare"), [("int4", 3, 4), ("int8", 0, 1), ("bfloat16", 30, 1), ("float32", 9, 2)]
)
def test_streamed_experts_have_the_bits_of_resident_ones(
    tmp_path: Path, form: str, slots: int, spare: int, reader: ops.RecordReader
) -> None:
    """Single tokens, batches and prompts that need every expert, in random order over three layers."""
    made = [make_layer(form, seed=seed) for seed in range(3)]
    layers, layout = [layer for layer, _ in made], made[0][1]
    store = open_store(write_file(tmp_path / "records", layers, layout), slots=slots, spare=spare, reader=reader)
    chance, generator = random.Random(0), torch.Generator().manual_seed(0)
    shared = shared_expert(generator)
    for step in range(60):
        layer = step % 3
        num_tokens = chance.choice([1, 1, 1, 2, 5, 40])
        x_TD, routing = torch.randn(num_tokens, HIDDEN, generator=generator), routing_of(num_tokens, generator)
        of_all = shared if step % 2 else None
        want = ops.experts_swiglu(x_TD, layers[layer].gate_up, layers[layer].down, routing=routing, shared=of_all)
        streamed = store.weights[f"model.layers.{layer}"]
        assert torch.equal(ops.experts_swiglu(x_TD, *streamed, routing=routing, shared=of_all), want), step
    counts = store.residency.counts()
    assert counts["misses"] and counts["sweep_misses"]
    assert (counts["hits"] + counts["sweep_hits"] > 0) == (slots > 0)
    for layer in range(3):
        assert len(store.residency.residents(layer)) == min(slots, NUM_EXPERTS)


def streamed(tmp_path: Path, *, num_layers: int = 1, slots: int = 3, **options: int) -> tuple[list[Layer], ExpertStore]:
    made = [make_layer("int4", seed=seed) for seed in range(num_layers)]
    layers = [layer for layer, _ in made]
    return layers, open_store(write_file(tmp_path / "records", layers, made[0][1]), slots=slots, **options)


@pytest.mark.parametrize(("slots", "half_life"), [(0, 4), (3, 1), (5, 16), (23, 100)])
def test_the_kernels_keep_whom_the_policy_keeps(tmp_path: Path, slots: int, half_life: int) -> None:
    _, store = streamed(tmp_path, slots=slots, half_life=half_life)
    experts, policy = store.residency.experts_of(0), ResidentSet(NUM_EXPERTS, slots, half_life=half_life)
    chance = random.Random(slots)
    for _ in range(300):
        chosen = sorted(chance.sample(range(NUM_EXPERTS), chance.choice([1, 4, 4, 4, 20])))
        uses, num_tokens = [chance.choice([1, 1, 2, 9]) for _ in chosen], chance.choice([1, 1, 7])
        assert experts.use(chosen, uses, num_tokens=num_tokens) == policy.use(chosen, uses, num_tokens=num_tokens)
        assert store.residency.residents(0) == policy.residents()
    assert store.residency.others(0) == policy.others()


def test_residents_are_remembered_with_their_loads(tmp_path: Path) -> None:
    """What one process knew fills the slots of the next, as far as there are any."""
    _, store = streamed(tmp_path, num_layers=2, slots=6)
    for _ in range(5):
        store.residency.experts_of(1).use([2, 3, 5, 7, 11, 13], [1, 2, 3, 4, 5, 6], num_tokens=6)
    known = store.residency.residents(1)
    assert [expert for expert, _ in known] == [13, 11, 7, 5, 3, 2]
    _, again = streamed(tmp_path, num_layers=2, slots=4)
    assert again.residency.fill(1, known) == 4 and again.residency.residents(1) == known[:4]
    assert again.residency.others(1) == known[4:], "they are known, too"
    assert again.residency.fill(1, known) == 0, "there is no free slot"
    assert again.residency.experts_of(1).use([2, 7, 13], [1, 1, 1], num_tokens=1) == 2
    again.residency.clear()
    assert again.residency.residents(1) == [] and again.residency.fill(1, known) == 4


def damage(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("reader", [RING, THREADS], ids=["io_uring", "threads"])
@pytest.mark.parametrize("harm", ["flipped", "truncated"])
def test_a_bad_record_is_an_error_and_never_an_answer(tmp_path: Path, harm: str, reader: ops.RecordReader) -> None:
    """The file is harmed while it is open. Experts that are whole are still served, before and after."""
    made = [make_layer("int4", seed=seed) for seed in range(2)]
    layers, layout = [layer for layer, _ in made], made[0][1]
    path = tmp_path / "records"
    store = open_store(write_file(path, layers, layout), slots=2, reader=reader)
    last = 4096 + layers[0].records_EB.nbytes + (NUM_EXPERTS - 1) * layout.stride  # the last expert of the last layer
    if harm == "flipped":
        damage(path, last + 100)
    else:
        os.truncate(path, last)
    x_TD, weights_TA = torch.randn(2, HIDDEN), torch.rand(2, 2)

    def answer(experts: list[list[int]]) -> Tensor:
        routing = ops.Routing(weights_TA, torch.tensor(experts))
        got = ops.experts_swiglu(x_TD, *store.weights["model.layers.1"], routing=routing)
        assert torch.equal(got, ops.experts_swiglu(x_TD, layers[1].gate_up, layers[1].down, routing=routing))
        return got

    answer([[0, 1], [1, 2]])
    for _ in range(2):
        with pytest.raises(ops.RecordError, match=rf"model\.layers\.1, expert {NUM_EXPERTS - 1}") as failure:
            answer([[0, 5], [NUM_EXPERTS - 1, 3]])
        assert str(path) in str(failure.value)
        answer([[5, 6], [7, 8]])
    with pytest.raises(ops.RecordError, match="expert 23"):
        store.residency.read(1, 23)


def test_a_file_that_is_replaced_is_read_on_as_it_was(tmp_path: Path) -> None:
    layers, store = streamed(tmp_path, slots=1)
    (tmp_path / "new").write_bytes(b"something else")
    (tmp_path / "new").replace(tmp_path / "records")
    x_TD, routing = torch.randn(1, HIDDEN), ops.Routing(torch.rand(1, 3), torch.tensor([[4, 9, 20]]))
    want = ops.experts_swiglu(x_TD, layers[0].gate_up, layers[0].down, routing=routing)
    assert torch.equal(ops.experts_swiglu(x_TD, *store.weights["model.layers.0"], routing=routing), want)


def test_the_next_layer_of_a_prompt_is_read_ahead(tmp_path: Path) -> None:
    _, store = streamed(tmp_path, num_layers=2, slots=2, spare=NUM_EXPERTS)
    everyone, uses = list(range(NUM_EXPERTS)), [3] * NUM_EXPERTS
    for layer in range(2):
        store.residency.experts_of(layer).use(everyone, uses, num_tokens=NUM_EXPERTS)
    counts = store.residency.counts()
    assert counts["guesses_used"] == counts["guesses"] > NUM_EXPERTS // 2
    assert counts["reads"] == 2 * NUM_EXPERTS == counts["sweep_misses"], "nobody is read twice"


def test_likely_experts_of_the_next_layer_are_read_early(tmp_path: Path) -> None:
    """A router that says what the next layer's will say: its experts are there before they are asked for. One that says
    something else is soon asked seldom. No answer changes."""
    layers, store = streamed(tmp_path, num_layers=2, slots=0, spare=20, least_wait_ns=0)
    generator = torch.Generator().manual_seed(0)
    router_ED = torch.randn(NUM_EXPERTS, HIDDEN, generator=generator)
    store.residency.look_ahead(0, router_ED)

    def steps(sign: float, count: int) -> tuple[int, int]:
        before = store.residency.counts()
        for _ in range(count):
            x_TD = torch.randn(1, HIDDEN, generator=generator)
            chosen = (sign * x_TD @ router_ED.t()).topk(3).indices
            for layer in range(2):
                routing = ops.Routing(torch.ones(1, 3), chosen)
                weights = store.weights[f"model.layers.{layer}"]
                got = ops.experts_swiglu(x_TD, *weights, routing=routing)
                want = ops.experts_swiglu(x_TD, layers[layer].gate_up, layers[layer].down, routing=routing)
                assert torch.equal(got, want)
        after = store.residency.counts()
        return after["guesses"] - before["guesses"], after["guesses_used"] - before["guesses_used"]

    num_guesses, num_used = steps(1.0, 40)
    assert num_used == num_guesses == 80
    num_guesses, num_used = steps(-1.0, 400)
    assert num_used == 0 and num_guesses < 200


@pytest.mark.parametrize("count", [0, 1, 15, 16, 63, 64, 65, 127, 128, 129, 257, 5000, (1 << 18) + 77, 10_000_001])
def test_checksums_are_those_of_zlib(count: int) -> None:
    bytes_B = torch.randint(256, (count + 1,), dtype=torch.uint8)[1:]
    assert ops.crc32(bytes_B) == zlib.crc32(bytes_B.numpy().tobytes())
