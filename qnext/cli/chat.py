"""`qnext chat`: talk to a model in the terminal, or line by line through a pipe."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnext.cli import _sampling as options
from qnext.cli._chat_loop import ReadLine, converse, note
from qnext.cli._remote import ApiKey, Url
from qnext.cli._text_model import TextFolder, end_token_ids, load_weights, open_folder
from qnext.cli._types import Strict, human_int
from qnext.errors import UsageError

if TYPE_CHECKING:
    from qnext.cli._remote_talk import RemoteConversation
    from qnext.engine import SamplingParams
    from qnext.model import CausalLM
    from qnext.text.chat import ChatFormat
    from qnext.text.thinking import TemplateRequest
    from qnext.text.tokenizer import Tokenizer

COMPLETION_TOKENS = 256


def command(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Model folder; or give --url.")] = None,
    url: Url = None,
    api_key: ApiKey = None,
    name: Annotated[
        str | None,
        typer.Option(
            "-m", "--model", metavar="NAME", help="With --url, of the server's models; else the same as MODEL."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", metavar="TEXT", help="System message.")] = None,
    complete: Annotated[
        bool, typer.Option("--complete", help="Complete each input as plain text, without chat format or memory.")
    ] = False,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    think: options.Think = None,
    chat_template_kwargs: options.TemplateArguments = None,
    context: Annotated[
        int | None,
        typer.Option(
            "--context", metavar="N", parser=human_int, help="Tokens of context, such as 32k; default: the model's."
        ),
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Times and rates after each answer.")] = False,
    yarn: options.Yarn = None,
    speculation: options.Speculation = None,
    dtype: options.DType = None,
    strict: Strict = False,
) -> None:
    """Talk to a model; /help lists the commands.

    With --url the model is that of a running server of OpenAI's API. A folder without chat format is used for
    completion. A flag counts first, then generation_config.json, then greedy.
    """
    flags = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty, "seed": seed,
    }  # fmt: skip
    if url is None and model is None:
        model, name = name, None
    if (model is None) == (url is None):
        raise UsageError("give either MODEL or --url, such as runs/demo/model or http://127.0.0.1:8000")
    if complete and (think is not None or chat_template_kwargs is not None):
        raise UsageError("--think, --no-think and --chat-template-kwargs need a conversation, not --complete")
    asked = options.template_request(chat_template_kwargs, think)
    if model is None:
        assert url is not None
        if any(value is not None for value in (context, yarn, speculation, dtype)):
            raise UsageError("--context, --yarn, --speculation and --dtype are the server's to say")
        talk = {"stop": tuple(stop or ()), "shows_stats": stats, "thinks": think, "template_arguments": asked.arguments}
        converse(_remote(url, api_key, name, flags, completes=complete, system=system, **talk))
        return
    if api_key is not None or name is not None:
        raise UsageError("--api-key and --model belong to --url")
    folder = open_folder(model, yarn=yarn)
    params = options.resolve_sampling(folder.path, flags)
    from qnext.engine import check_options

    check_options(folder.config, max_model_len=context, speculation=speculation)
    chat_format = None if complete else _chat_format(folder)
    _check_asked(chat_format, system, asked)
    run_chat(
        load_weights(folder, dtype), folder.tokenizer, chat_format=chat_format, params=params, stop=tuple(stop or ()),
        system=system, max_model_len=context, speculation=speculation, shows_stats=stats, asked=asked,
    )  # fmt: skip


def _remote(
    url: str,
    api_key: str | None,
    name: str | None,
    flags: dict[str, Any],
    *,
    completes: bool,
    system: str | None,
    **more: Any,
) -> RemoteConversation:
    from qnext.cli._remote import model_of, root_of
    from qnext.cli._remote_talk import RemoteConversation

    if system is not None and completes:
        raise UsageError("a system message needs a conversation, not --complete")
    root = root_of(url)
    model = model_of(root, api_key, name)
    note(f"model {model} at {root}")
    params = {key: value for key, value in flags.items() if value is not None}
    if completes:
        params.setdefault("max_tokens", COMPLETION_TOKENS)
    return RemoteConversation(root, api_key, model, params, completes=completes, system=system, **more)


def _check_asked(chat_format: ChatFormat | None, system: str | None, asked: TemplateRequest) -> None:
    """What needs a chat format, and what its template does not read, is refused before the weights are read."""
    if chat_format is not None:
        asked.for_template(chat_format.arguments)
    elif system is not None or asked.arguments:
        raise UsageError(f"{'--chat-template-kwargs' if system is None else 'a system message'} needs a chat format")


def run_chat(
    model: CausalLM,
    tokenizer: Tokenizer,
    *,
    chat_format: ChatFormat | None = None,
    params: SamplingParams | None = None,
    stop: tuple[str, ...] = (),
    system: str | None = None,
    max_model_len: int | None = None,
    speculation: bool | None = None,
    shows_stats: bool = False,
    read_line: ReadLine | None = None,
    asked: TemplateRequest | None = None,
) -> None:
    """Converse until the input ends. Without `chat_format` each input is completed as plain text, by 256 tokens unless
    `params` says otherwise.

    `read_line` as for `converse`.
    """
    from qnext.cli._conversation import Conversation
    from qnext.engine import Engine, SamplingParams

    engine = Engine(
        model, max_num_seqs=1, max_model_len=max_model_len, speculation=speculation,
        eos_token_ids=end_token_ids(tokenizer, model.config),
    )  # fmt: skip
    note(engine.memory_plan.describe())
    params = params or SamplingParams()
    if chat_format is None and params.max_tokens is None:
        params = replace(params, max_tokens=COMPLETION_TOKENS)
    conversation = Conversation(
        engine,
        tokenizer,
        chat_format,
        params,
        stop=stop,
        system=system,
        shows_stats=shows_stats,
        template_arguments={} if asked is None else asked.arguments,
    )
    if asked is not None and asked.thinks is not None:
        conversation.set_thinking(asked.thinks)
    converse(conversation, read_line)


def _chat_format(folder: TextFolder) -> ChatFormat | None:
    """The folder's format; None, with one line that says so, where it has none."""
    from qnext.text.chat import ChatFormat

    try:
        return ChatFormat.for_folder(folder.path, tokenizer=folder.tokenizer)
    except UsageError as error:
        note(f"{error}: each input is completed as plain text, and questions get no answer")
        return None
