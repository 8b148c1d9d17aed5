"""What do the integer schemes cost in perplexity, against llama.cpp's types on the same model?

Trains a small model, quantises it with `qnext quantize`, calibrated on text that it was trained on; exports it and
lets llama-quantize do the same; and measures all on text that was never trained on. Without llama-quantize, in
--llama-cpp or on the PATH, its rows are left out; without llama-imatrix, those that need it.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from _pair import machine, print_json

import torch
from torch import Tensor

from qnext.checkpoint import load_model, save_model
from qnext.checkpoint.check import read_layout
from qnext.checkpoint.gguf import export_gguf, import_gguf, read_gguf
from qnext.checkpoint.gguf.names import gguf_entries
from qnext.checkpoint.header import read_index
from qnext.config import ModelConfig, hybrid_pattern
from qnext.errors import UsageError
from qnext.eval import EvalDocument, Perplexity, evaluate_perplexity
from qnext.model import Batch, CausalLM
from qnext.ops import keep_freed_memory
from qnext.quant.scheme import make_policy
from qnext.recipes import demo
from qnext.recipes.recipe import Recipe, Run, prepare
from qnext.text.gguf import vocabulary_keys
from qnext.training import Hooks
from qnext.training.sources import take_bytes, tokenize

LENGTH = 512
_PIECE, _CHARACTERS_PER_TOKEN = 2000, 5  # more than a token has, so that enough of them come
_ROWS = 1024  # of logits at a time
# Ours: what `qnext quantize` is told, {text} standing for the calibration text.
SCHEMES = {
    "int8 nearest": "--scheme int8",
    "int4-g32 nearest": "--scheme int4-g32",
    "int4-g32 calibrated": "--scheme int4-g32 --text {text}",
    "int4-g32 calibrated, head too": "--scheme int4-g32 --head int4 --text {text}",
    "int4-g128 calibrated": "--scheme int4-g128 --text {text}",
}
# Those of ours that each of llama.cpp's is compared with directly.
RIVALS = ("int4-g32 calibrated", "int4-g32 calibrated, head too")
# llama.cpp's: what llama-quantize is told. "Kept" rows keep what we keep, the embedding and the projection of the gates
# of DeltaNet, so that only the same matrices differ. An importance matrix is what llama.cpp calibrates with.
_KEPT = "--token-embedding-type bf16 --tensor-type ssm_ba=bf16"
LLAMA_TYPES = {
    "Q4_K_M": "{source} {out} Q4_K_M",
    "Q4_K_M, kept": f"{_KEPT} {{source}} {{out}} Q4_K_M",
    "Q4_K --pure, kept": f"--pure {_KEPT} {{source}} {{out}} Q4_K",
    "Q4_0": "{source} {out} Q4_0",
    "Q4_K_M, imatrix": "--imatrix {imatrix} {source} {out} Q4_K_M",
    "Q4_K_M, imatrix, kept": f"--imatrix {{imatrix}} {_KEPT} {{source}} {{out}} Q4_K_M",
    "Q4_K --pure, imatrix, kept": f"--imatrix {{imatrix}} --pure {_KEPT} {{source}} {{out}} Q4_K",
}


class Bits(NamedTuple):
    """Bits a weight, scales included: of the matrices that our schemes quantise, and of all weights."""

    matrices: float
    all: float


def small_model() -> ModelConfig:
    """9.4 M parameters. Every row is a multiple of 256, so that llama.cpp's k-quants apply everywhere, as they do in
    the released models. Seven experts: llama.cpp takes eight for Mixtral and gives its attention more bits.
    """
    return ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        layer_types=hybrid_pattern(4, interval=4),
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        partial_rotary_factor=0.25,
        rope_theta=10_000.0,
        max_position_embeddings=LENGTH,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        linear_conv_kernel_dim=4,
        num_experts=7,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        shared_expert_intermediate_size=256,
        initializer_range=0.007,
    )


def quality_recipe(*, seconds: float) -> Recipe:
    """The demo's training of another model."""
    recipe = demo(seconds=seconds, seed=0)
    train = recipe.train.with_(sample_every=0, eval_every=200, snapshot_every=50)
    return replace(recipe, name="quality", model=small_model(), train=train)


def train(folder: Path, *, seconds: float) -> Run:
    hooks = Hooks(on_evaluation=lambda step, result: print(f"step {step}: {result.bits_per_byte:.4f} bits per byte"))
    is_begun = (folder / "tokenizer" / "tokenizer.json").exists()
    run = prepare(quality_recipe(seconds=seconds), folder, resume=is_begun, hooks=hooks)
    print(
        f"{run.corpus.description}; {sum(p.numel() for p in run.trainer.model.parameters()):,} parameters", flush=True
    )
    if not run.trainer.is_done:
        run.trainer.run()
        run.trainer.save()
    return run


def held_out(run: Run, *, limit: int) -> list[EvalDocument]:
    (end_id,) = run.tokenizer.eos_ids
    texts = [file.text for file in take_bytes(run.corpus.held_out, limit=limit)]
    encoded = tokenize(texts, run.tokenizer, end_id=end_id)
    if len(texts) < 2:
        raise UsageError("--eval-bytes: one document alone has no standard error")
    return [EvalDocument(ids.tolist(), len(text.encode())) for ids, text in zip(encoded, texts, strict=True)]


def calibration_text(run: Run, *, tokens: int) -> str:
    """Pieces of what was trained on, evenly spread, of a little more than `tokens` in all."""
    text = "".join(file.text for file in run.corpus.train)
    stride = max(_PIECE, len(text) * _PIECE // (_CHARACTERS_PER_TOKEN * tokens))
    return "\n".join(text[start : start + _PIECE] for start in range(0, len(text), stride))


class Reference:
    """What the bf16 weights, computed in fp32, say about the documents: the end of their forward pass is kept."""

    def __init__(self, folder: Path, documents: Sequence[EvalDocument]) -> None:
        self._model = load_model(folder, dtype=torch.float32)
        self._documents = documents
        self._hidden = [_hidden(self._model, document) for document in documents]

    def perplexity(self) -> Perplexity:
        return evaluate_perplexity(self._model, self._documents, sequence_length=LENGTH)

    def measure(self, model: CausalLM) -> Scores:
        """Of `model`, document by document."""
        rows = []
        for document, base_TD in zip(self._documents, self._hidden, strict=True):
            targets_T = torch.as_tensor(document.token_ids[1:])
            sums = torch.zeros(2, dtype=torch.float64)
            chunks = (tensor.split(_ROWS) for tensor in (base_TD, _hidden(model, document), targets_T))
            for base_RD, hidden_RD, targets_R in zip(*chunks, strict=True):
                p_RY, q_RY = (
                    m.logits(h).float().log_softmax(-1) for m, h in ((self._model, base_RD), (model, hidden_RD))
                )
                sums[0] -= q_RY.gather(1, targets_R[:, None]).sum(dtype=torch.float64)
                sums[1] += (p_RY.exp() * (p_RY - q_RY)).sum(dtype=torch.float64)
            rows.append([float(sums[0]), float(sums[1]), len(targets_T)])
        return Scores(*torch.tensor(rows, dtype=torch.float64).unbind(1))


def _hidden(model: CausalLM, document: EvalDocument) -> Tensor:
    """[T, D], for every token but the last; pieces of LENGTH do not see each other."""
    ids_T = torch.as_tensor(document.token_ids[:-1])
    return model(Batch.from_lengths(ids_T, [len(piece) for piece in ids_T.split(LENGTH)])).hidden_TD


class Scores(NamedTuple):
    """Sums over each document: -log p of its tokens and KL divergence from the reference, in nats; and its tokens."""

    nats_N: Tensor
    divergence_N: Tensor
    tokens_N: Tensor


def change(scores: Scores, base: Scores) -> dict[str, float]:
    """Changes from `base`, with standard errors over documents: perplexity in per cent, mean divergence in nats."""
    nats, nats_error = _ratio(scores.nats_N - base.nats_N, base.tokens_N)
    divergence, divergence_error = _ratio(scores.divergence_N - base.divergence_N, base.tokens_N)
    return {
        "percent": 100 * math.expm1(nats),
        "error": 100 * math.exp(nats) * nats_error,
        "divergence": divergence,
        "divergence_error": divergence_error,
    }


def _ratio(values_N: Tensor, tokens_N: Tensor) -> tuple[float, float]:
    """Sum over sum, and its standard error."""
    mean = values_N.sum() / tokens_N.sum()
    count = len(values_N)
    square = (values_N - mean * tokens_N).square().sum() * count / (count - 1)
    return float(mean), float(square.sqrt() / tokens_N.sum())


class Matrices:
    """The matrices that our schemes quantise, and how many bits each of them takes in a folder or file."""

    def __init__(self, folder: Path) -> None:
        layout = read_layout(folder)
        policy = make_policy("int4-g32", head=None, is_tied=layout.config.tie_word_embeddings)
        self.config = layout.config
        self.sizes = {name: math.prod(target.part.shape) for name, target in layout.targets.items()}
        self.parameter_of = {
            name: target.parameter.name
            for name, target in layout.targets.items()
            if policy.scheme_of(target.parameter) is not None
        }

    def of_folder(self, folder: Path) -> Bits:
        tensors = read_index(folder).tensors.values()
        inside = [info for info in tensors if f"{info.name.rpartition('.')[0]}.weight" in self.parameter_of]
        return self._bits(sum(info.num_bytes for info in inside), sum(info.num_bytes for info in tensors))

    def of_gguf(self, path: Path) -> Bits:
        tensors = read_gguf(path).tensors
        parameters = set(self.parameter_of.values())
        inside = [entry.name for entry in gguf_entries(self.config, tensors) if entry.parameter.name in parameters]
        sizes = {tensor.name: tensor.end - tensor.start for tensor in tensors.values()}
        return self._bits(sum(sizes[name] for name in inside), sum(sizes.values()))

    def _bits(self, inside: int, total: int) -> Bits:
        return Bits(
            8 * inside / sum(self.sizes[name] for name in self.parameter_of), 8 * total / sum(self.sizes.values())
        )


class Variant(NamedTuple):
    """A quantised model: `weights` is a folder to compute in fp32, `codes` the same one where we compute on codes."""

    name: str
    bits: Bits
    weights: Path
    codes: Path | None
    types: dict[str, str]


def our_variants(model: Path, text: Path, work: Path, matrices: Matrices, *, tokens: int) -> Iterator[Variant]:
    for name, options in SCHEMES.items():
        folder = work / name.replace(" ", "-")
        words = [word.format(text=text) for word in options.split()] + ["--tokens", str(tokens)]
        _call([sys.executable, "-m", "qnext", "quantize", str(model), str(folder), *words])
        yield Variant(name, matrices.of_folder(folder), folder, folder, {})


def llama_variants(
    model: Path, text: Path, work: Path, matrices: Matrices, options: argparse.Namespace
) -> Iterator[Variant]:
    programs = None if options.llama_cpp is None else str(options.llama_cpp)
    quantize, measure_imatrix = (
        shutil.which("llama-quantize", path=programs),
        shutil.which("llama-imatrix", path=programs),
    )
    if quantize is None:
        return
    source, imatrix = work / "source.gguf", work / "imatrix.gguf"
    export_gguf(model, source, kind="bf16", tokenizer_keys=vocabulary_keys(model, num_rows=matrices.config.vocab_size))
    if measure_imatrix is not None:
        chunks = ["-c", str(LENGTH), "--chunks", str(options.tokens // LENGTH), "-t", str(torch.get_num_threads())]
        _call([measure_imatrix, "-m", str(source), "-f", str(text), "-o", str(imatrix), *chunks])
    for name, words in LLAMA_TYPES.items():
        if "{imatrix}" in words and not imatrix.exists():
            continue
        gguf = work / f"{name.replace(' ', '-')}.gguf"
        _call([quantize, *(word.format(source=source, out=gguf, imatrix=imatrix) for word in words.split())])
        folder = work / f"{gguf.stem}-imported"
        import_gguf(gguf, folder, dtype=torch.float32, dequantize=True)
        yield Variant(f"llama.cpp {name}", matrices.of_gguf(gguf), folder, None, _types(gguf))


def _types(gguf: Path) -> dict[str, str]:
    """Which type each kind of matrix has: "Q4_K, Q6_K" where it differs by layer."""
    found: dict[str, set[str]] = {}
    for tensor in read_gguf(gguf).tensors.values():
        if len(tensor.shape) > 1:
            found.setdefault(re.sub(r"blk\.\d+\.", "", tensor.name), set()).add(tensor.block.name)
    return {name: ", ".join(sorted(types)) for name, types in found.items()}


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")


@torch.no_grad()
def compare(options: argparse.Namespace, run: Run, work: Path) -> dict[str, Any]:
    """Each variant beside the bf16 weights in fp32, with a standard error over the documents, each paired with itself.

    "weights" computes with the rounded weights in fp32, whoever rounded them, so that nothing else differs; "native" is
    our own forward pass on the codes, which rounds activations too. The last two figures of a row of llama.cpp's are
    the changes from it to int4-g32 calibrated, with the head in int8 as `qnext quantize` has it, and with it in int4.
    """
    model = work / "bf16"
    save_model(run.trainer.model, model, dtype=torch.bfloat16, tokenizer_folder=run.folder / "tokenizer")
    text = work / "calibration.txt"
    text.write_text(calibration_text(run, tokens=options.tokens), encoding="utf-8")
    matrices, documents = Matrices(model), held_out(run, limit=options.eval_bytes)
    variants = chain(
        [Variant("bf16", matrices.of_folder(model), model, model, {})],
        our_variants(model, text, work, matrices, tokens=options.tokens),
        llama_variants(model, text, work, matrices, options),
    )
    reference = Reference(model, documents)
    rows: list[dict[str, Any]] = []
    measured: dict[str, Scores] = {}
    print("bits a weight: of the quantised matrices, of all; changes of perplexity and KL: weights, then native")
    for variant in variants:
        scores = reference.measure(load_model(variant.weights, dtype=torch.float32, dequantize=True))
        measured[variant.name] = scores
        changes = {"weights": change(scores, measured["bf16"])}
        if variant.codes is not None:
            changes["native"] = change(reference.measure(load_model(variant.codes)), measured["bf16"])
        else:
            changes |= {f"{name} over it": change(measured[name], scores) for name in RIVALS}
        rows.append({"name": variant.name, "bits": variant.bits._asdict(), "types": variant.types, **changes})
        print(_line(variant, changes), flush=True)
    whole, base = reference.perplexity(), measured["bf16"]
    if not math.isclose(whole.nats_per_token, float(base.nats_N.sum() / base.tokens_N.sum()), rel_tol=1e-5):
        raise RuntimeError("documents measured alone and evaluate_perplexity disagree")
    return {**asdict(whole), "variants": rows}


def _line(variant: Variant, changes: dict[str, dict[str, float]]) -> str:
    figures = "  ".join(
        f"{change['percent']:+6.3f} % ± {change['error']:.3f} {1e3 * change['divergence']:+7.3f}e-3 ± "
        f"{1e3 * change['divergence_error']:.3f}"
        for change in changes.values()
    )
    return f"{variant.name:32} {variant.bits.matrices:6.3f} {variant.bits.all:6.3f}  {figures}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="of training")
    parser.add_argument(
        "--run",
        type=Path,
        help="keeps the training: an interrupted one goes on, a finished one is used; default a temporary folder",
    )
    parser.add_argument("--llama-cpp", type=Path, help="folder of llama.cpp's programs; default the PATH")
    parser.add_argument("--tokens", type=int, default=131072, help="of the training text, to calibrate with")
    parser.add_argument("--eval-bytes", type=int, default=1 << 30, help="of held-out text, at most")
    options = parser.parse_args()
    keep_freed_memory()
    print(f"{machine()['cpu']}, {options.minutes:g} minutes of training")
    with tempfile.TemporaryDirectory() as folder:
        run = train(options.run or Path(folder) / "run", seconds=60 * options.minutes)
        result = compare(options, run, Path(folder))
    print_json({"benchmark": "quality", "minutes": options.minutes, "steps": run.trainer.step, **result})


if __name__ == "__main__":
    main()
