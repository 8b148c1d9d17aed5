"""The tokenizer of a model that is to chat: that of its base, with a chat template and the token that ends a turn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qnext.checkpoint.save import TOKENIZER_FILES
from qnext.errors import UsageError
from qnext.files import copy_inside, new_folder, write_inside
from qnext.session.folder import TextFolder, end_token_ids
from qnext.text.files import read_json_object
from qnext.text.template_files import TEMPLATE_FILES, read_templates
from qnext.text.templates import TEMPLATES
from qnext.text.train import IM_END

_GENERATION, _CONFIG = "generation_config.json", "tokenizer_config.json"


def tokenizer_folder(
    folder: Path, base: TextFolder, *, template: str | None, sampling: Mapping[str, Any] | None = None
) -> Path:
    """Make the folder new: the tokenizer files of `base`, its generation_config.json with `sampling`, and the chat
    template: that of `base`, or the one of our own that `template` names.

    Raises UsageError where `base` has no template and none is named, or its vocabulary lacks the tokens of a turn.
    """
    if template is None and read_templates(base.path) is None:
        raise UsageError(f"{base.path}: no chat template; --template {' or '.join(TEMPLATES)} gives it one")
    if template is not None and template not in TEMPLATES:
        raise UsageError(f"--template {template}: expected one of {', '.join(TEMPLATES)}")
    if template is not None:
        base.tokenizer.require_chat_tokens()
    with new_folder(folder) as partial:
        for name in TOKENIZER_FILES:
            if (base.path / name).is_file() and (template is None or name not in TEMPLATE_FILES):
                (partial / name).parent.mkdir(exist_ok=True)
                copy_inside(base.path / name, partial / name)
        if template is not None:
            config = read_json_object(base.path / _CONFIG)
            config.pop("chat_template", None)
            write_inside(partial / _CONFIG, _json({**config, "eos_token": IM_END}))
            write_inside(partial / "chat_template.jinja", TEMPLATES[template])
        ends = end_token_ids(base.tokenizer, base.config)
        if template is not None:
            ends |= {base.tokenizer.token_id(IM_END)}
        generation = {**read_json_object(base.path / _GENERATION), **(sampling or {}), "eos_token_id": sorted(ends)}
        write_inside(partial / _GENERATION, _json(generation))
    return folder


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"
