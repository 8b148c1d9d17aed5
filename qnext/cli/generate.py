"""`qnext generate`: complete one prompt."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli.flags import sampling as options
from qnext.cli.flags.values import AsJson, Model, Strict, option
from qnext.cli.terminal.progress import byte_progress
from qnext.cli.terminal.text import note, read_stdin, write_text
from qnext.errors import UsageError
from qnext.session.completion import complete, completion_document, encode_prompt, fit_to_context
from qnext.session.folder import end_token_ids, load_weights, open_folder
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


def command(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to complete; - reads standard input.")],
    *,
    sampling: options.SamplingFlags,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end token.")] = False,
    logprobs: Annotated[
        int | None, typer.Option("--logprobs", metavar="N", help="With --json: log-probabilities, N alternatives.")
    ] = None,
    form: FormFlags,
    template: options.TemplateFlags,
    loading: options.LoadingFlags,
    as_json: AsJson = False,
    strict: Strict = False,
) -> None:
    """Complete PROMPT: text on stdout as it comes, memory plan and speed on stderr.

    An explicit flag counts first, then generation_config.json of the model, then greedy. Without --max-tokens the
    answer has at most 256 tokens, or what the context leaves.
    """
    if logprobs is not None and not as_json:
        raise UsageError("--logprobs needs --json")
    asked = form.request(template)
    folder = open_folder(model, yarn=loading.yarn, expert_memory=loading.expert_memory)
    given = {**sampling.given, "ignore_eos": ignore_eos, "logprobs": logprobs, "watermark": loading.watermark_key}
    params = resolve_sampling(folder.path, given)
    text = read_stdin() if prompt == "-" else prompt
    prompt_ids = encode_prompt(folder, text, asked=asked, special=form.special is not False)
    params = fit_to_context(folder.config, len(prompt_ids), params)
    if params.seed is None:
        # Drawn here so that --json can name it and the answer can be had again.
        params = replace(params, seed=secrets.randbits(32))
    from qnext.engine import Engine, EngineConfig, check_options
    from qnext.text.stream import TextStream

    stream = TextStream(folder.tokenizer, stop=sampling.stop or ())
    check_options(folder.config, EngineConfig(speculation=loading.speculation))
    network = load_weights(folder, loading.dtype, progress=byte_progress)
    assert params.max_tokens is not None
    engine = Engine.of(
        network,
        EngineConfig(
            max_num_seqs=1,
            max_model_len=len(prompt_ids) + params.max_tokens,
            prefix_cache=False,
            speculation=loading.speculation,
            eos_token_ids=end_token_ids(folder.tokenizer, folder.config),
        ),
    )
    note(engine.memory_plan.describe())
    predicted, write = predict_decoding(network, context=len(prompt_ids)), drop if as_json else write_text
    answer = complete(engine, prompt_ids, params, stream, predicted=predicted, write=write)
    if as_json:
        print(json.dumps(completion_document(answer, prompt_ids, params, folder.tokenizer), ensure_ascii=False))
    elif not answer.text.endswith("\n"):
        write_text("\n")
    note(answer.describe(len(prompt_ids)))
