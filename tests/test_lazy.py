"""Names that a package imports when they are first used."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

from qnext.lazy import lazy_names


@pytest.mark.parametrize("was_enabled", [True, False])
def test_no_garbage_is_looked_for_while_a_module_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, was_enabled: bool
) -> None:
    """Afterwards the collector is as it was, also where the import fails."""
    folder = tmp_path / "lazily"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "good.py").write_text("import gc\nis_collecting = gc.isenabled()\n")
    (folder / "bad.py").write_text("raise RuntimeError\n")
    monkeypatch.syspath_prepend(tmp_path)
    get = lazy_names("lazily", {"is_collecting": "good", "broken": "bad"})
    try:
        (gc.enable if was_enabled else gc.disable)()
        assert get("is_collecting") is False
        assert gc.isenabled() is was_enabled
        with pytest.raises(RuntimeError):
            get("broken")
        assert gc.isenabled() is was_enabled
    finally:
        gc.enable()
        for name in ("lazily", "lazily.good", "lazily.bad"):
            sys.modules.pop(name, None)


def test_a_name_that_a_package_has_not_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"'qnext\.engine' has no attribute 'nothing'"):
        lazy_names("qnext.engine", {})("nothing")
