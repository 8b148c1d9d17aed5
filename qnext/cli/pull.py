"""`qnext pull`: a model from the Hugging Face hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

# Weights, configuration, tokenizer, templates and papers; never pickle, never code.
ALLOWED = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.md", "LICENSE*")


def command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="organisation/model")],
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="a folder; default: the local cache")] = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="progress and folder on stdout, a line of JSON each, as it happens")
    ] = False,
) -> None:
    """Download a model and print its folder. An interrupted download continues where it stopped.

    With --json: lines {"file", "completed", "total"} in bytes, then {"folder"}.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    from qnext.checkpoint.nearby import published_models
    from qnext.errors import ModelNotFound, UsageError, did_you_mean

    if "/" not in name and (hint := did_you_mean(f"Qwen/{name}", published_models())):
        raise ModelNotFound(f"{name}: a hub name looks like organisation/model{hint}")
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"{out}: exists and is no folder")
    try:
        folder = _download(name, out, revision, as_json=as_json)
    except GatedRepoError:
        raise ModelNotFound(f"{name}: access must be granted on the hub first, then `hf auth login`") from None
    except RepositoryNotFoundError:
        hint = did_you_mean(name, published_models()) if name not in published_models() else ""
        raise ModelNotFound(f"{name}: the hub has no such model, or it is private{hint}") from None
    except RevisionNotFoundError:
        raise ModelNotFound(f"{name}: the hub has no revision {revision!r} of it") from None
    except HFValidationError:
        raise ModelNotFound(f"{name}: is not a hub name, which looks like organisation/model") from None
    except OSError as error:
        # A full or read-only disk carries an errno; what the network does to a request does not.
        if error.errno is not None and not isinstance(error, ConnectionError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].removeprefix("Got: ")[:200]
        if "ConnectError" in reason or "Name or service not known" in reason or "Max retries" in reason:
            reason = f"the hub cannot be reached ({reason}); with the network back the same command goes on"
        raise ModelNotFound(f"{name}: cannot be downloaded: {reason}") from None
    if not any(Path(folder).glob("*.safetensors")):
        _refuse_gguf(name, revision)
        raise ModelNotFound(f"{name}: holds no safetensors files, so it is no model that can be loaded")
    print(json.dumps({"folder": str(folder)}) if as_json else folder)


def _refuse_gguf(name: str, revision: str | None) -> None:
    """Raise NotSupported where the hub has GGUF files of the model, saying how they become a folder."""
    import huggingface_hub

    from qnext.errors import NotSupported

    try:
        files = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=["*.gguf"], dry_run=True)
    except OSError:
        return
    names = sorted(info.filename for info in files) if isinstance(files, list) else []
    if names:
        raise NotSupported(
            f"{name}: holds GGUF files and no safetensors; `hf download {name} {names[0]} --local-dir DIR`, "
            f"then `qnext convert DIR/{names[0]} OUT`"
        )


def _download(name: str, out: Path | None, revision: str | None, *, as_json: bool) -> str:
    """The folder. Files come first, where somebody watches; then the hub's own function completes and checks it."""
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    from qnext.cli._download import download_files, file_bars, file_lines

    with file_lines() if as_json else file_bars() as report:
        if report is not None:
            disable_progress_bars()
            download_files(name, out, revision, list(ALLOWED), report)
    return huggingface_hub.snapshot_download(name, revision=revision, local_dir=out, allow_patterns=list(ALLOWED))
