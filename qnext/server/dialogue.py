"""What all chat surfaces make of their bodies before they differ: a conversation ready for the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qnext.engine.sampling.constraint import Constraint
from qnext.server.answers import Answer
from qnext.server.calls import forced_calls
from qnext.server.exchange import Exchange
from qnext.server.tools import Offer, check_tools
from qnext.text.messages import Message
from qnext.text.output import OutputParser
from qnext.text.stream import Thought
from qnext.text.thinking import TemplateRequest, ThoughtState

if TYPE_CHECKING:
    from qnext.server.served import ServedModel


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
    stops_in_thought: bool = False
    continues: bool = False  # the answer goes on behind a beginning that the caller gave

    @property
    def is_thinking(self) -> bool:
        """Whether the answer begins inside a thought."""
        return self.thought == "open"

    def new_answer(self, exchange: Exchange) -> Answer:
        served = exchange.server.served
        # Where the prompt closed the thought, some models open another at the beginning all the same.
        may_think = served.may_think and not self.is_thinking and not (self.continues and self.thought == "closed")
        thought: Thought | None = "open" if self.is_thinking else "possible" if may_think else None
        parser = OutputParser(
            tool_style=served.tool_style if self.offer.callable else None, tools=self.offer.callable,
            starts_in_reasoning=self.is_thinking,
            reads_reasoning=may_think,
        )  # fmt: skip
        return Answer(
            served,
            stop=self.stop,
            parser=parser,
            starts_in_reasoning=self.is_thinking,
            thought=None if self.stops_in_thought else thought,
            max_calls=self.max_calls,
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
    stops_in_thought: bool = False,
    param: str = "messages",
    is_prompt: bool = True,
) -> Dialogue:
    """Render and encode; the constraint is that of the tools where one must be called. Raises ApiError.

    A constraint holds for the answer behind the thought, where there is one: that which the prompt opens, or that
    with which a model that decides by itself begins. `is_prompt` false: the tokens are only counted or shown.
    """
    served = exchange.server.served
    if offer.tools:
        await served.run(lambda: check_tools(offer.tools), asker=exchange.asker)
    prompt_ids, thought = await served.encode_chat(
        await exchange.aside(lambda: in_order_of_calls(messages)), asker=exchange.asker, tools=offer.tools,
        asked=asked, continues=continues, add_generation_prompt=add_generation_prompt, param=param,
        is_prompt=is_prompt,
    )  # fmt: skip
    if asked is not None and not continues and add_generation_prompt:
        for name in asked.without_effect(served.template_arguments, thought):
            exchange.ignore(name)
    chosen, chosen_param = constraint or (None, "response_format")
    if offer.callable and (offer.is_required or chosen is not None):
        may_repeat = parallel_calls and offer.name is None
        calls = _calls(served, offer, parallel=may_repeat)
        if offer.is_required:
            chosen, chosen_param = Constraint("calls", calls), "tools"
        elif chosen is not None:  # the answer is a call, or follows its format
            chosen = replace(chosen, alternative=calls)
    if chosen is not None and thought == "open":
        chosen = replace(chosen, starts_after=served.think_end)
    elif chosen is not None and thought == "possible" and served.is_hybrid:
        chosen = replace(chosen, starts_after=served.think_end, opened_by=served.think_start)
    return Dialogue(
        prompt_ids,
        thought,
        offer,
        chosen,
        chosen_param,
        max_calls=1 if offer.callable and not parallel_calls else None,
        stop=stop,
        stops_in_thought=stops_in_thought,
        continues=continues,
    )


def _calls(served: ServedModel, offer: Offer, *, parallel: bool) -> dict[str, Any]:
    return forced_calls(
        offer.callable,
        strict=offer.strict if offer.is_required else (),
        style=served.tool_style,
        name=offer.name,
        parallel=parallel,
        control_names=served.tokenizer.reserved_ids.keys(),
    )


def in_order_of_calls(messages: Sequence[Message]) -> list[Message]:
    """The messages with each result right behind its call, and several of them in the order of their calls.

    Chat formats write no ids, so that a model can tell results apart by their order alone. Clients send results over
    several turns, and other turns between call and result. A result whose call is gone becomes text of the user.
    """
    turns: list[tuple[Message, list[Message]]] = []  # with the results of its calls
    by_id: dict[str, int] = {}  # the turn that made a call last
    for message in messages:
        if message.role != "tool":
            by_id.update((call.id, len(turns)) for call in message.tool_calls if call.id is not None)
            turns.append((message, []))
            continue
        turn = by_id.get(message.tool_call_id or "")
        if turn is None:
            turn = _last_caller(turns)
        if turn is None:
            turns.append((Message("user", f"Result of an earlier call of a tool:\n{message.content}"), []))
        else:
            turns[turn][1].append(message)
    ordered: list[Message] = []
    for message, results in turns:
        places = {call.id: place for place, call in enumerate(message.tool_calls)}
        if all(result.tool_call_id in places for result in results):
            results.sort(key=lambda result: places[result.tool_call_id])
        ordered += [message, *results]
    return ordered


def _last_caller(turns: Sequence[tuple[Message, list[Message]]]) -> int | None:
    """The assistant's last turn, where no turn of the user came after it and it called something."""
    for index in range(len(turns) - 1, -1, -1):
        message = turns[index][0]
        if message.role == "assistant":
            return index if message.tool_calls else None
        if message.role == "user":
            return None
    return None
