"""The Hugging Face hub: the files of a model, one by one, with the progress of each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qnext.checkpoint.nearby import published_models
from qnext.checkpoint.provenance import Making, licence_of, read_provenance
from qnext.errors import ModelNotFound, NotSupported, did_you_mean

FileReport = Callable[[str, int, int | None], None]  # file, bytes that are there, bytes in all

# Weights, configuration, tokenizer, templates and papers; never pickle, never code.
ALLOWED = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.md", "LICENSE*")

_NUM_WORKERS = 8
_WAIT_SECONDS = 0.2  # between two looks for Ctrl-C


def pull_model(name: str, out: Path | None, revision: str | None, *, report: FileReport | None) -> Path:
    """The folder of a model: `out`, or one of the local cache. Files that exist already are not downloaded again.

    Raises ModelNotFound in one line for a model that the hub refuses or does not have, NotSupported for a model with
    only GGUF files, and OSError of the disk.
    """
    with telling_of(name, revision):
        folder = _download(name, out, revision, report)
    if not any(folder.glob("*.safetensors")):
        _refuse_gguf(name, revision)
        raise ModelNotFound(f"{name}: holds no safetensors files, so it is no model that can be loaded")
    record_pull(folder, name, revision)
    return folder


def record_pull(folder: Path, name: str, revision: str | None) -> None:
    """Write the provenance of a download, unless it stands there. What the hub's own file of that name says, where it
    is one of ours, becomes that of the parent."""
    commit = _commit_of(folder)
    known = read_provenance(folder)
    settings = {"name": name, "revision": revision, "commit": commit}
    if known is not None and known["made_by"] == "pull" and known["settings"] == settings:
        return
    making = Making("pull", settings)
    licence = licence_of(folder) or (known or {}).get("licence")
    making.parents.append({"role": "repository", "name": name, "licence": licence, "provenance": known})
    making.write_beside(folder)


def _commit_of(folder: Path) -> str | None:
    """The commit that was downloaded: the name of a folder of the cache, or what the hub's client notes in others."""
    if folder.parent.name == "snapshots":
        return folder.name
    noted = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    return noted.read_text(encoding="utf-8").split("\n")[0] if noted.is_file() else None


@contextmanager
def telling_of(name: str, revision: str | None) -> Iterator[None]:
    """What the hub refuses or has not is ModelNotFound, in one line; what the disk refuses stays an OSError."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if "/" not in name and (hint := did_you_mean(f"Qwen/{name}", published_models())):
        raise ModelNotFound(f"{name}: a hub name looks like organisation/model{hint}")
    try:
        yield
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


def _download(name: str, out: Path | None, revision: str | None, report: FileReport | None) -> Path:
    """Files come first, where somebody watches; then the hub's own function completes and checks the folder."""
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    if report is not None:
        disable_progress_bars()
        download_files(name, out, revision, list(ALLOWED), report)
    found = huggingface_hub.snapshot_download(name, revision=revision, local_dir=out, allow_patterns=list(ALLOWED))
    return Path(found)


def _refuse_gguf(name: str, revision: str | None) -> None:
    """Raise NotSupported where the hub has GGUF files of the model, saying how they become a folder."""
    import huggingface_hub

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


def download_files(name: str, out: Path | None, revision: str | None, allowed: list[str], report: FileReport) -> None:
    """Download the missing files of a model, several files side by side, each from where it stopped.

    `report` is called by one thread at a time, and at once for every file with what exists. Where the hub cannot be
    reached, nothing is done: the next call to the hub says why. Raises what huggingface_hub raises for a file.
    """
    import huggingface_hub

    try:
        files = huggingface_hub.snapshot_download(
            name, revision=revision, local_dir=out, allow_patterns=allowed, dry_run=True
        )
    except OSError:
        return
    has_stopped, lock = threading.Event(), threading.Lock()

    def serial(file: str, completed: int, total: int | None) -> None:
        if has_stopped.is_set():
            raise KeyboardInterrupt
        with lock:
            report(file, completed, total)

    def fetch(info: Any) -> None:
        huggingface_hub.hf_hub_download(
            name, info.filename, revision=info.commit_hash, local_dir=out, tqdm_class=_bar(info, serial)
        )
        serial(info.filename, info.file_size or 0, info.file_size)

    for info in files:
        serial(info.filename, 0 if info.will_download else info.file_size or 0, info.file_size)
    with ThreadPoolExecutor(_NUM_WORKERS) as pool:
        futures = [pool.submit(fetch, info) for info in files if info.will_download]
        try:
            left = set(futures)
            while left:
                done, left = wait(left, timeout=_WAIT_SECONDS, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
        except BaseException:
            has_stopped.set()  # the next piece of each file ends its thread
            for future in futures:
                future.cancel()
            raise


def _bar(info: Any, report: FileReport) -> type:
    """What huggingface_hub takes for a class of progress bars. One for each file: the hub passes no name on."""

    class Bar:
        """Counts the bytes of one file on disk; those on the way are another number, which is left out."""

        def __init__(self, *args: Any, initial: int = 0, **options: Any) -> None:
            self.completed = initial
            self.total = options.get("total") or info.file_size
            self.update(0)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def update(self, num_bytes: float | None = 1) -> None:
            self.completed += int(num_bytes or 0)
            report(info.filename, self.completed, self.total)

        def ignore(self, *args: Any, **options: Any) -> None:
            pass

        update_transfer = set_postfix_str = set_transfer_postfix_str = set_description = ignore
        set_description_str = set_postfix = refresh = close = ignore

    return Bar
