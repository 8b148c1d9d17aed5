"""Runs a text through a model folder one layer at a time, and rounds each layer on the way.

There are two streams: the calibration and evaluation texts go through the rounded layers, and the evaluation text goes
through the original ones. So both models are compared while neither is in memory.

Legend: T tokens, D hidden, Y vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qnext.checkpoint.quantized_output import QuantizedOutput
from qnext.checkpoint.weight_source import FolderWeights
from qnext.model import Batch, DecoderLayer, RouterOutput, SparseMoE
from qnext.model.layers import RotaryEmbedding, make_norm
from qnext.model.mtp import MultiTokenPredictor
from qnext.quant.layer import LayerQuantizer, Rounded, TextChunk, round_matrix, second_moment
from qnext.quant.report import TextComparison

_TOKENS_PER_CHUNK = 4096
_LOGIT_ELEMENTS = 1 << 24
_EMBEDDING = "model.embed_tokens.weight"


class TextSample(NamedTuple):
    """Token ids; each sequence has the token after it too. Some sequences calibrate the model, others measure it."""

    calibration: Sequence[Tensor]
    evaluation: Sequence[Tensor]


class _Pieces(NamedTuple):
    """Sequences that go through a layer together."""

    batch: Batch
    rope: tuple[Tensor, Tensor]
    targets_T: Tensor  # the token after each


class _Streams(NamedTuple):
    """What runs through the layers: the calibration text through the rounded ones, the evaluation text through both."""

    calibration: list[TextChunk]
    original: list[TextChunk]
    rounded: list[TextChunk]


@torch.no_grad()
def run_layers(
    out: QuantizedOutput,
    source: FolderWeights,
    sample: TextSample,
    comparison: TextComparison,
    *,
    is_calibrated: bool,
) -> None:
    """Write every parameter of the model; GPTQ with `sample.calibration` where `is_calibrated`."""
    config = out.config
    rotary = RotaryEmbedding(config)
    calibration = _pieces(sample.calibration, rotary) if is_calibrated else []
    evaluation = _pieces(sample.evaluation, rotary)
    out.keep(_EMBEDDING)
    chunks = [_embed(source, pieces) for pieces in calibration]
    original = [_embed(source, pieces) for pieces in evaluation]
    rounded = list(original)
    for i, kind in enumerate(config.layer_types):
        prefix = f"model.layers.{i}."
        with torch.device("meta"):
            layer = DecoderLayer(config, i, kind=kind, is_moe=config.is_moe_layer(i))
        source.fill(layer, prefix)
        original, choices = _forward(layer, original)
        _round_layer(out, layer, prefix, chunks, is_calibrated=is_calibrated)
        chunks, _ = _forward(layer, chunks)
        rounded, new_choices = _forward(layer, rounded)
        for before, after in zip(choices, new_choices, strict=True):
            comparison.add_routing(i, before, after)
    out.keep("model.norm.weight")
    with torch.device("meta"):
        norm = make_norm(config, config.hidden_size)
    source.fill(norm, "model.norm.")
    streams = _Streams(*([_with(c, norm(c.hidden_TD)) for c in each] for each in (chunks, original, rounded)))
    _finish_head(out, source, streams, evaluation, comparison, is_calibrated=is_calibrated)
    if config.num_nextn_predict_layers:
        trunk = streams.calibration if config.mtp_uses_final_norm else chunks
        _round_mtp(out, source, trunk, calibration, is_calibrated=is_calibrated)


def _pieces(sequences: Sequence[Tensor], rotary: RotaryEmbedding) -> list[_Pieces]:
    groups: list[list[Tensor]] = []
    size = _TOKENS_PER_CHUNK
    for ids in sequences:
        if size + len(ids) - 1 > _TOKENS_PER_CHUNK:
            groups.append([])
            size = 0
        groups[-1].append(ids)
        size += len(ids) - 1
    made = []
    for group in groups:
        batch = Batch.from_lengths(torch.cat([ids[:-1] for ids in group]), [len(ids) - 1 for ids in group])
        made.append(_Pieces(batch, rotary(batch.positions_T), torch.cat([ids[1:] for ids in group])))
    return made


def _embed(source: FolderWeights, pieces: _Pieces) -> TextChunk:
    rows_TD = source.read_part(_EMBEDDING, source.kept_dtype(_EMBEDDING))[pieces.batch.token_ids_T]
    return TextChunk(pieces.batch, pieces.rope, rows_TD.to(torch.float32))


def _with(chunk: TextChunk, hidden_TD: Tensor) -> TextChunk:
    return chunk._replace(hidden_TD=hidden_TD)


def _forward(layer: DecoderLayer, chunks: Sequence[TextChunk]) -> tuple[list[TextChunk], list[Tensor]]:
    """The chunks after the layer, and the experts that its router chose for each."""
    choices: list[Tensor] = []

    def record(module: object, inputs: object, output: RouterOutput) -> None:
        choices.append(output.routing.experts_TA)

    hook = layer.mlp.gate.register_forward_hook(record) if isinstance(layer.mlp, SparseMoE) else None
    try:
        after = [_with(chunk, layer(chunk.hidden_TD, chunk.batch, chunk.rope)) for chunk in chunks]
    finally:
        if hook is not None:
            hook.remove()
    return after, choices


def _round_layer(
    out: QuantizedOutput, layer: DecoderLayer, prefix: str, chunks: Sequence[TextChunk], *, is_calibrated: bool
) -> None:
    quantizer = LayerQuantizer(
        layer,
        scheme_of=lambda name: out.scheme_of(prefix + name),
        scale_dtype=out.scale_dtype,
        is_calibrated=is_calibrated,
    )
    for rounded in quantizer.run(chunks):
        out.write(prefix + rounded.name, rounded)
    for name in out.names_in(layer.layer_index):
        if out.scheme_of(name) is None:
            out.keep(name)


def _finish_head(
    out: QuantizedOutput,
    source: FolderWeights,
    streams: _Streams,
    evaluation: Sequence[_Pieces],
    comparison: TextComparison,
    *,
    is_calibrated: bool,
) -> None:
    name = _EMBEDDING if out.config.tie_word_embeddings else "lm_head.weight"
    head_YD = source.read_parameter(name)
    new_head_YD = head_YD
    scheme = out.scheme_of(name)
    if scheme is not None:
        moment = second_moment(torch.cat([chunk.hidden_TD for chunk in streams.calibration])) if is_calibrated else None
        weight = round_matrix(head_YD, moment, scheme, scale_dtype=out.scale_dtype)
        out.write(name, Rounded(name, None, head_YD, weight, moment))
        new_head_YD = weight.dequantize()
    elif name != _EMBEDDING:
        out.keep(name)
    rows = max(1, _LOGIT_ELEMENTS // len(head_YD))
    for before, after, pieces in zip(streams.original, streams.rounded, evaluation, strict=True):
        parts = (tensor.split(rows) for tensor in (before.hidden_TD, after.hidden_TD, pieces.targets_T))
        for before_RD, after_RD, targets_R in zip(*parts, strict=True):
            comparison.add_logits(before_RD @ head_YD.t(), after_RD @ new_head_YD.t(), targets_R)


def _round_mtp(
    out: QuantizedOutput,
    source: FolderWeights,
    trunk: Sequence[TextChunk],
    calibration: Sequence[_Pieces],
    *,
    is_calibrated: bool,
) -> None:
    """The MTP module, on the trunk's rounded output and the true next tokens."""
    config = out.config
    with torch.device("meta"):
        layer = DecoderLayer(config, config.num_hidden_layers, kind="full_attention", is_moe=config.num_experts > 0)
        mtp = MultiTokenPredictor(config, layer)
    source.fill(mtp, "mtp.")
    table = source.read_part(_EMBEDDING, source.kept_dtype(_EMBEDDING))
    inputs = []
    for chunk, pieces in zip(trunk, calibration, strict=True):
        embedding_TD = table[pieces.targets_T].to(torch.float32)
        both = torch.cat([mtp.pre_fc_norm_embedding(embedding_TD), mtp.pre_fc_norm_hidden(chunk.hidden_TD)], dim=-1)
        inputs.append(_with(chunk, mtp.fc(both)))
    _round_layer(out, layer, "mtp.layers.0.", inputs, is_calibrated=is_calibrated)
