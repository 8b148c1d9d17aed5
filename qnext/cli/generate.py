"""`qnext generate`: complete one prompt."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli.flags import sampling as options
from qnext.cli.flags.ranks import RankFlags
from qnext.cli.flags.values import AsJson, Model, Strict, option
from qnext.cli.terminal.progress import byte_progress
from qnext.cli.terminal.text import note, read_stdin, write_text
from qnext.errors import UsageError
from qnext.session.completion import complete, completion_document, encode_prompt, fit_to_context
from qnext.session.folder import EngineOpening, end_token_ids, open_folder
from qnext.session.prediction import predict_decoding
from qnext.session.sampling import resolve_sampling
from qnext.session.talk import drop

if TYPE_CHECKING:
    from qnext.text.thinking import TemplateRequest


@dataclass(frozen=True)
class FormFlags:
    """What PROMPT is."""

    chat: Annotated[bool, option("PROMPT is a user's message in the model's chat format.", "--chat")] = False
    special: Annotated[
        bool | None,
        option(
            "Names such as <|im_start|> in PROMPT are control tokens; in --chat they never are.",
            "--special/--no-special",
        ),
    ] = None

    def request(self, template: options.TemplateFlags) -> TemplateRequest | None:
        """What the chat template is told; None without --chat. Raises UsageError for flags that contradict."""
        if self.chat and self.special:
            raise UsageError("--chat writes the control tokens itself; --special contradicts it")
        if self.chat:
            return template.request()
        if template.is_given:
            raise UsageError("--think, --no-think and --chat-template-kwargs belong to --chat")
        return None


@dataclass(frozen=True)
class AnswerFlags:
    """What the answer is besides its text."""

    ignore_eos: Annotated[bool, option("Go on after the end token.", "--ignore-eos")] = False
    logprobs: Annotated[
        int | None, option("With --json: log-probabilities, N alternatives.", "--logprobs", metavar="N")
    ] = None


def command(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to complete; - reads standard input.")],
    *,
    sampling: options.SamplingFlags,
    asking: AnswerFlags,
    form: FormFlags,
    template: options.TemplateFlags,
    ranks: RankFlags,
    loading: options.LoadingFlags,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Complete PROMPT: text on stdout as it comes, memory plan and speed on stderr.

    An explicit flag counts first, then generation_config.json of the model, then greedy. Without --max-tokens the
    answer has at most 256 tokens, or what the context leaves.
    """
    if asking.logprobs is not None and not as_json:
        raise UsageError("--logprobs needs --json")
    asked, spread = form.request(template), ranks.begin(model)
    folder = open_folder(model, yarn=loading.yarn, expert_memory=loading.expert_memory, device=loading.device)
    params = resolve_sampling(folder.path, {**sampling.given, **asdict(asking), "watermark": loading.watermark_key})
    text = read_stdin() if prompt == "-" else prompt
    prompt_ids = encode_prompt(folder, text, asked=asked, special=form.special is not False)
    params = fit_to_context(folder.config, len(prompt_ids), params)
    if params.seed is None:
        # Drawn here so that --json can name it and the answer can be had again.
        params = replace(params, seed=secrets.randbits(32))
    from qnext.engine import EngineConfig
    from qnext.session.opening import open_engine
    from qnext.text.stream import TextStream

    stream = TextStream(folder.tokenizer, stop=sampling.stop or ())
    assert params.max_tokens is not None
    config = EngineConfig(
        max_num_seqs=1,
        max_model_len=len(prompt_ids) + params.max_tokens,
        prefix_cache=False,
        speculation=loading.speculation,
        eos_token_ids=end_token_ids(folder.tokenizer, folder.config),
    )
    how = EngineOpening(loading.dtype, spread, progress=byte_progress, note=note)
    network, engine = open_engine(folder, config, how)
    with engine:
        note(engine.memory_plan.describe())
        predicted = predict_decoding(network, context=len(prompt_ids)) if spread.num_ranks == 1 else None
        answer = complete(
            engine, prompt_ids, params, stream, predicted=predicted, write=drop if as_json else write_text
        )
    if as_json:
        print(json.dumps(completion_document(answer, prompt_ids, params, folder.tokenizer), ensure_ascii=False))
    elif not answer.text.endswith("\n"):
        write_text("\n")
    note(answer.describe(len(prompt_ids)))
