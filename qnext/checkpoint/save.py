"""A model to a Hugging Face folder, which appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qnext import files
from qnext.checkpoint.files import DTYPE_NAMES, MAX_SHARD_BYTES, ShardWriter, TensorSpec
from qnext.checkpoint.names import disk_parts
from qnext.checkpoint.provenance import Making
from qnext.config import ModelConfig, to_hf
from qnext.errors import UsageError
from qnext.model import CausalLM, named_weights
from qnext.planning import list_parameters

# What belongs to a tokenizer in a model folder; everything else of `tokenizer_folder` stays where it is.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
)


@torch.no_grad()
def save_model(
    model: CausalLM,
    folder: str | Path,
    *,
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    tokenizer_folder: str | Path | None = None,
    generation_config: Mapping[str, Any] | None = None,
    readme: str | None = None,
    making: Making | None = None,
) -> None:
    """Write a folder that load_model and transformers read. MTP tensors are included.

    `dtype` is of all, or of each by its name; None keeps the dtype of each parameter. Tokenizer files are copied from
    `tokenizer_folder`. `generation_config` None means the file of `tokenizer_folder`, or the token ids of the
    configuration. `readme` is the text of README.md; `making` becomes the provenance. Raises UsageError for a model
    with quantised weights, and when `folder` exists and is not empty, unless `overwrite` is set and it holds a
    config.json.
    """
    parameters = dict(model.named_parameters())
    infos = list_parameters(model.config)
    if any(named_weights(model)):
        raise UsageError(f"{folder}: a model with quantised weights is not saved; load it with dequantize=True")
    assert infos.keys() == parameters.keys(), infos.keys() ^ parameters.keys()
    given = dtype if isinstance(dtype, Mapping) else dict.fromkeys(infos, dtype)
    dtypes = {name: given[name] or parameters[name].dtype for name in infos}
    with new_folder(folder, overwrite=overwrite, making=making) as temporary:
        write_config(temporary, model.config, dtype=dtypes["model.embed_tokens.weight"])
        write_side_files(temporary, model.config, tokenizer_folder, generation_config)
        if readme is not None:
            files.write_inside(temporary / "README.md", readme)
        writer = ShardWriter(temporary, disk_plan(model.config, dtypes), max_shard_bytes=max_shard_bytes)
        try:
            for name, info in infos.items():
                for part in disk_parts(info):
                    writer.write(part.name, parameters[name][part.place].to(dtypes[name]))
            writer.finish()
        finally:
            writer.close()


def disk_plan(config: ModelConfig, dtypes: Mapping[str, torch.dtype] | torch.dtype) -> dict[str, TensorSpec]:
    """The plan for ShardWriter. `dtypes` are given by parameter name."""
    return {
        part.name: TensorSpec(dtypes if isinstance(dtypes, torch.dtype) else dtypes[name], part.shape)
        for name, info in list_parameters(config).items()
        for part in disk_parts(info)
    }


@contextmanager
def new_folder(folder: str | Path, *, overwrite: bool = False, making: Making | None = None) -> Iterator[Path]:
    """As files.new_folder, with the provenance that `making` gives. Raises UsageError for a folder that is not empty,
    unless it may be overwritten and holds a model."""
    _check_place(Path(folder), overwrite=overwrite)
    with files.new_folder(folder) as temporary:
        yield temporary
        if making is not None:
            making.write_inside(temporary)


@contextmanager
def unfinished_folder(folder: str | Path) -> Iterator[files.Unfinished]:
    """As files.unfinished_folder. Raises UsageError for a folder that is not empty."""
    files.remove_finished(folder)
    _check_place(Path(folder), overwrite=False)
    with files.unfinished_folder(folder) as work:
        yield work


def _check_place(target: Path, *, overwrite: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise UsageError(f"{target}: exists and is no folder")
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise UsageError(f"{target}: exists and is not empty")
        if not (target / "config.json").is_file():
            raise UsageError(f"{target}: holds no model, so it is not overwritten")


def write_config(folder: Path, config: ModelConfig, *, dtype: torch.dtype) -> None:
    assert dtype in DTYPE_NAMES, dtype
    values = to_hf(config, dtype=str(dtype).removeprefix("torch."))
    files.write_inside(folder / "config.json", json.dumps(values, indent=2) + "\n")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer in one of the forms that are read."""
    forms = (("tokenizer.json",), ("vocab.json", "merges.txt"))
    return any(all((folder / name).is_file() for name in form) for form in forms)


def write_side_files(
    folder: Path,
    config: ModelConfig,
    tokenizer_folder: str | Path | None,
    generation_config: Mapping[str, Any] | None,
) -> None:
    """Write tokenizer files and generation_config.json; see save_model."""
    source = None if tokenizer_folder is None else Path(tokenizer_folder)
    if source is not None:
        if not has_tokenizer(source):
            raise UsageError(f"{source}: no tokenizer.json there")
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                files.copy_inside(source / name, folder / name)
    if generation_config is None and source is not None and (source / "generation_config.json").is_file():
        files.copy_inside(source / "generation_config.json", folder / "generation_config.json")
        return
    if generation_config is None:
        eos = config.eos_token_ids
        generation_config = {
            "bos_token_id": config.bos_token_id,
            "eos_token_id": list(eos) if len(eos) > 1 else (eos[0] if eos else None),
            "pad_token_id": config.pad_token_id,
        }
    values = {key: value for key, value in generation_config.items() if value is not None}
    files.write_inside(folder / "generation_config.json", json.dumps(values, indent=2) + "\n")
