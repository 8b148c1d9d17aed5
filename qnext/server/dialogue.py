"""What all chat surfaces make of their bodies before they differ: a conversation ready for the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from qnext.engine.sampling.constraint import Constraint
from qnext.errors import QnextError
from qnext.server.answers import Answer
from qnext.server.errors import from_user_error
from qnext.server.exchange import Exchange
from qnext.server.tools import Offer
from qnext.text.messages import Message
from qnext.text.output import OutputParser, tool_call_grammar
from qnext.text.thinking import TemplateRequest, ThoughtState


@dataclass
class Dialogue:
    """A rendered conversation. `thought`: where the prompt leaves that of the answer."""

    prompt_ids: list[int]
    thought: ThoughtState
    offer: Offer
    constraint: Constraint | None = None
    constraint_param: str = "response_format"
    max_calls: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def is_thinking(self) -> bool:
        """Whether the answer begins inside a thought."""
        return self.thought == "open"

    def new_answer(self, exchange: Exchange) -> Answer:
        served = exchange.server.served
        parser = OutputParser(
            tool_style=served.tool_style if self.offer.callable else None, tools=self.offer.callable,
            starts_in_reasoning=self.is_thinking,
            reads_reasoning=self.thought == "possible" and served.may_think,
        )  # fmt: skip
        return Answer(
            served, stop=self.stop, parser=parser, starts_in_reasoning=self.is_thinking, max_calls=self.max_calls
        )


async def make_dialogue(
    exchange: Exchange,
    messages: Sequence[Message],
    offer: Offer,
    *,
    constraint: tuple[Constraint, str] | None = None,
    parallel_calls: bool = True,
    asked: TemplateRequest | None = None,
    continues: bool = False,
    add_generation_prompt: bool = True,
    stop: tuple[str, ...] = (),
    param: str = "messages",
) -> Dialogue:
    """Render and encode; the constraint is that of the tools where one must be called. Raises ApiError.

    A constraint holds for the answer behind the thought, where there is one: that which the prompt opens, or that
    with which a model that decides by itself begins.
    """
    served = exchange.server.served
    prompt_ids, thought = await served.encode_chat(
        in_order_of_calls(messages), tools=offer.tools, asked=asked, continues=continues,
        add_generation_prompt=add_generation_prompt, param=param,
    )  # fmt: skip
    chosen, chosen_param = constraint or (None, "response_format")
    if offer.is_required:
        try:
            text = tool_call_grammar(
                offer.callable, style=served.tool_style, name=offer.name,
                parallel=parallel_calls and offer.name is None, control_names=served.tokenizer.reserved_ids.keys(),
            )  # fmt: skip
        except QnextError as error:
            raise from_user_error(error, param="tools") from None
        chosen, chosen_param = Constraint("lark", text), "tools"
    if chosen is not None and thought == "open":
        chosen = replace(chosen, starts_after=served.think_end)
    elif chosen is not None and thought == "possible" and served.is_hybrid:
        chosen = replace(chosen, starts_after=served.think_end, opened_by=served.think_start)
    return Dialogue(
        prompt_ids, thought, offer, chosen, chosen_param,
        max_calls=1 if offer.callable and not parallel_calls else None, stop=stop,
    )  # fmt: skip


def in_order_of_calls(messages: Sequence[Message]) -> list[Message]:
    """The messages with neighbouring results in the order of the calls that they answer.

    Chat formats write no ids, so that a model can tell results apart by their order alone.
    """
    ordered: list[Message] = []
    for is_result, group in groupby(messages, key=lambda message: message.role == "tool"):
        found = list(group)
        if is_result and ordered:
            places = {call.id: place for place, call in enumerate(ordered[-1].tool_calls)}
            if all(message.tool_call_id in places for message in found):
                found.sort(key=lambda message: places[message.tool_call_id])
        ordered += found
    return ordered
