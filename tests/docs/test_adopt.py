"""The page on adoption from top to bottom: its commands run in their order, and none of them connects elsewhere."""

from __future__ import annotations

import re
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from qnext.cli import main
from qnext.server.access.audit import AuditLog
from qnext.server.access.keys import KeyRing
from tests.docs.snippets import ROOT, blocks, check_arguments, commands
from tests.server.clients.conftest import refuse_names, refuse_outbound
from tests.server.serving import running_server, save_served

PAGE = ROOT / "docs" / "adopt.md"
ADDRESS = "http://127.0.0.1:8000"
SECRET = "secret-of-the-page"
TEXT = (
    "# Handbook\n\nThe office opens at nine.\n\n## Notice\n\nThe notice period is six weeks.\n\n## Leave\n\n"
    "Leave is thirty days.\n\n| team | room |\n|---|---|\n| sales | 12 |\n| law | 7 |\n\n"
    "## Travel\n\nTrains come first.\n"
)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parent / target).exists(), target


def test_its_commands_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot_download(name: str, **options: object) -> str:
        """Instead of the model a small one with random weights."""
        return str(save_served(Path(str(options["local_dir"]))))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    for name in ("documents", "reports"):
        Path(name).mkdir()
    Path("documents/handbook.md").write_text(TEXT * 3)
    Path("documents/terms.md").write_text(
        "# Terms\n\nThe price is ten.\n\n## Delivery\n\nGoods arrive on Monday.\n" * 8
    )
    Path("letter.txt").write_text("Dear reader, this letter was written by a person. " * 4)
    found = [words for block in blocks(PAGE) for words in commands(block)]
    assert len(found) > 25
    with ExitStack() as stack, monkeypatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, refuse_outbound(getattr(socket.socket, name)))
        patch.setattr(socket, "getaddrinfo", refuse_names(socket.getaddrinfo))
        url = ""
        for words in found:
            words = [word.replace(ADDRESS, url).replace("$QNEXT_KEY", SECRET) for word in words]
            if words[:2] == ["qnext", "serve"]:
                check_arguments(words[1:])
                if not url:
                    ring = KeyRing(Path("keys.json"), admin=[SECRET])
                    log = AuditLog(Path("audit.jsonl"), chain=True)
                    url = stack.enter_context(running_server(Path("models/80b-int4"), keys=ring, audit=log)).url
            elif words[0] == "curl":
                done = subprocess.run([*words, "-sS", "--fail-with-body"], capture_output=True, text=True, timeout=60)
                assert done.returncode == 0, done.stdout + done.stderr
            else:
                assert words[0] == "qnext", words
                with pytest.raises(SystemExit) as stop:
                    main(words[1:])
                assert stop.value.code == 0, words
    assert Path("models/80b-int4/provenance.json").is_file() and Path("reports/int4.json").is_file()
