"""What all chat surfaces make of their bodies before they differ: a conversation ready for the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from qnext.engine.sampling.constraint import Constraint
from qnext.errors import QnextError
from qnext.server.answers import Answer
from qnext.server.errors import from_user_error
from qnext.server.exchange import Exchange
from qnext.server.tools import Offer
from qnext.text.messages import Message
from qnext.text.output import OutputParser, tool_call_grammar
from qnext.text.stream import Thought


@dataclass
class Dialogue:
    """A rendered conversation. `is_thinking`: the answer begins inside a thought."""

    prompt_ids: list[int]
    is_thinking: bool
    offer: Offer
    constraint: Constraint | None = None
    constraint_param: str = "response_format"
    max_calls: int | None = None
    stop: tuple[str, ...] = ()
    stops_in_thought: bool = False

    def new_answer(self, exchange: Exchange) -> Answer:
        served = exchange.server.served
        parser = OutputParser(
            tool_style=served.tool_style if self.offer.callable else None, tools=self.offer.callable,
            starts_in_reasoning=self.is_thinking, reads_reasoning=served.is_thinking,
        )  # fmt: skip
        thought: Thought | None = "open" if self.is_thinking else "possible" if served.is_thinking else None
        return Answer(
            served, stop=self.stop, parser=parser, starts_in_reasoning=self.is_thinking,
            thought=None if self.stops_in_thought else thought, max_calls=self.max_calls,
        )  # fmt: skip


async def make_dialogue(
    exchange: Exchange,
    messages: Sequence[Message],
    offer: Offer,
    *,
    constraint: tuple[Constraint, str] | None = None,
    parallel_calls: bool = True,
    thinks: bool = True,
    continues: bool = False,
    add_generation_prompt: bool = True,
    stop: tuple[str, ...] = (),
    stops_in_thought: bool = False,
    param: str = "messages",
) -> Dialogue:
    """Render and encode; the constraint is that of the tools where one must be called. Raises ApiError."""
    served = exchange.server.served
    prompt_ids, is_thinking = await served.encode_chat(
        in_order_of_calls(messages), tools=offer.tools, thinks=thinks, continues=continues,
        add_generation_prompt=add_generation_prompt, param=param,
    )  # fmt: skip
    chosen, chosen_param = constraint or (None, "response_format")
    if offer.is_required:
        try:
            text = tool_call_grammar(
                offer.callable, style=served.tool_style, name=offer.name,
                parallel=parallel_calls and offer.name is None, control_names=served.tokenizer.added_ids.keys(),
            )  # fmt: skip
        except QnextError as error:
            raise from_user_error(error, param="tools") from None
        chosen, chosen_param = Constraint("lark", text), "tools"
    if chosen is not None and is_thinking:
        chosen = Constraint(chosen.kind, chosen.value, served.think_end)
    return Dialogue(
        prompt_ids, is_thinking, offer, chosen, chosen_param,
        max_calls=1 if offer.callable and not parallel_calls else None, stop=stop, stops_in_thought=stops_in_thought,
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
