"""`qnext chat`: talk to a model in the terminal, or line by line through a pipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from qnext.cli.flags import sampling as options
from qnext.cli.flags.ranks import RankFlags
from qnext.cli.flags.values import ApiKey, Strict, Url, human_int, option
from qnext.cli.terminal.chat_loop import converse
from qnext.cli.terminal.progress import byte_progress
from qnext.cli.terminal.text import note
from qnext.errors import UsageError
from qnext.session.conversation import ConversationOpening
from qnext.session.folder import EngineOpening, chat_format_of, open_folder
from qnext.session.sampling import resolve_sampling


@dataclass(frozen=True)
class PartnerFlags:
    """Whom one talks to, where it is no folder, and as what."""

    url: Url = None
    api_key: ApiKey = None
    name: Annotated[
        str | None,
        option("With --url, of the server's models; else the same as MODEL.", "-m", "--model", metavar="NAME"),
    ] = None
    system: Annotated[str | None, option("System message.", metavar="TEXT")] = None
    complete: Annotated[
        bool, option("Complete each input as plain text, without chat format or memory.", "--complete")
    ] = False


def command(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Model folder; or give --url.")] = None,
    *,
    partner: PartnerFlags,
    sampling: options.SamplingFlags,
    template: options.TemplateFlags,
    context: Annotated[
        int | None, option("Tokens of context, such as 32k; default: the model's.", parser=human_int, metavar="N")
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Times and rates after each answer.")] = False,
    ranks: RankFlags,
    loading: options.LoadingFlags,
    strict: Strict = False,
) -> None:
    """Talk to a model; /help lists the commands.

    With --url the model is that of a running server of OpenAI's API. A folder without chat format is used for
    completion. A flag counts first, then generation_config.json, then greedy.
    """
    url, name, complete = partner.url, partner.name, partner.complete
    if url is None and model is None:
        model, name = name, None
    if (model is None) == (url is None):
        raise UsageError("give either MODEL or --url, such as runs/demo/model or http://127.0.0.1:8000")
    if complete and template.is_given:
        raise UsageError("--think, --no-think and --chat-template-kwargs need a conversation, not --complete")
    talk: dict[str, Any] = {"stop": tuple(sampling.stop or ()), "system": partner.system, "shows_stats": stats}
    talk["template_arguments"] = template.request().arguments
    if model is None:
        assert url is not None
        if context is not None or loading != options.LoadingFlags() or ranks != RankFlags():
            raise UsageError(
                "--context, --yarn, --expert-memory, --speculation, --dtype, --device, --watermark and the flags of "
                "ranks are the server's to say"
            )
        from qnext.client.conversation import open_remote

        talk |= {"completes": complete, "thinks": template.think}
        remote = open_remote(url, partner.api_key, name, sampling.given, **talk)
        note(f"model {remote.model} at {remote.root}")
        converse(remote)
        return
    if partner.api_key is not None or name is not None:
        raise UsageError("--api-key and --model belong to --url")
    spread = ranks.begin(model)
    folder = open_folder(model, yarn=loading.yarn, expert_memory=loading.expert_memory, device=loading.device)
    params = resolve_sampling(folder.path, {**sampling.given, "watermark": loading.watermark_key})
    without = "each input is completed as plain text, and questions get no answer"
    chat_format = None if complete else chat_format_of(folder, note, without=without)
    opening = ConversationOpening(folder, chat_format, params, context, loading.speculation)
    conversation = opening.open(EngineOpening(loading.dtype, spread, byte_progress, note), **talk)
    with conversation.engine as engine:
        note(engine.memory_plan.describe())
        if template.think is not None:
            conversation.set_thinking(template.think)
        converse(conversation)
