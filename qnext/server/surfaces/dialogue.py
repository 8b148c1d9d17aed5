"""From the fields of a chat surface to a prompt of token ids, with the constraint and the readers of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qnext.engine.sampling.constraint import Constraint
from qnext.server.exchange import Exchange
from qnext.server.inference.forced_calls import forced_calls
from qnext.server.inference.served import ServedModel
from qnext.server.surfaces.answers import AnswerReader
from qnext.server.surfaces.held import judged_messages
from qnext.server.surfaces.tools import Offer, check_tools
from qnext.text.messages import Message
from qnext.text.output import OutputParser
from qnext.text.prompts import ChatPrompt
from qnext.text.stream import Thought
from qnext.text.thinking import TemplateRequest, ThoughtState


@dataclass(frozen=True)
class ChatInput:
    """The fields that a chat surface reads from its body: what makes the prompt, and what restricts the answer.

    `constraint` comes with the field that defines it. It applies to the answer after the thought, where there is one.
    `param` is the field of the conversation, for errors.
    """

    messages: Sequence[Message]
    offer: Offer
    asked: TemplateRequest | None = None
    constraint: tuple[Constraint, str] | None = None
    parallel_calls: bool = True
    continues: bool = False  # the last message is the beginning of the answer
    add_generation_prompt: bool = True
    stop: tuple[str, ...] = ()
    stops_in_thought: bool = False  # stop strings end the thought too
    param: str = "messages"


@dataclass(frozen=True)
class Dialogue:
    """A rendered conversation. `thought` says in which state the prompt leaves the thought of the answer."""

    chat: ChatInput
    prompt_ids: list[int]
    thought: ThoughtState
    constraint: Constraint | None
    constraint_param: str

    @property
    def is_thinking(self) -> bool:
        """Whether the answer begins inside a thought."""
        return self.thought == "open"

    def new_answer(self, exchange: Exchange) -> AnswerReader:
        chat, served = self.chat, exchange.server.served
        # Where the prompt closed the thought, some models open another at the beginning all the same.
        may_think = served.may_think and not self.is_thinking and not (chat.continues and self.thought == "closed")
        thought: Thought | None = "open" if self.is_thinking else "possible" if may_think else None
        tools = chat.offer.callable
        parser = OutputParser(
            tool_style=served.tool_style if tools else None,
            tools=tools,
            starts_in_reasoning=self.is_thinking,
            reads_reasoning=may_think,
        )
        return AnswerReader(
            served,
            stop=chat.stop,
            parser=parser,
            starts_in_reasoning=self.is_thinking,
            thought=None if chat.stops_in_thought else thought,
            max_calls=1 if tools and not chat.parallel_calls else None,
        )


async def make_dialogue(exchange: Exchange, chat: ChatInput, *, is_prompt: bool = True) -> Dialogue:
    """Render and encode a conversation. `is_prompt` false: the tokens are only counted or shown. Raises ApiError."""
    served, offer = exchange.server.served, chat.offer
    if offer.tools:
        await served.run(lambda: check_tools(offer.tools), asker=exchange.asker)
    messages: Sequence[Message] = await exchange.aside(lambda: in_order_of_calls(chat.messages))
    if is_prompt:
        messages = await judged_messages(exchange, messages, param=chat.param)
    asked = chat.asked or TemplateRequest()
    prompt = ChatPrompt(messages, asked, offer.tools, chat.add_generation_prompt, chat.continues)
    ids, thought = await served.encode_chat(prompt, asker=exchange.asker, param=chat.param, is_prompt=is_prompt)
    if chat.asked is not None and not chat.continues and chat.add_generation_prompt:
        for name in chat.asked.without_effect(served.template_arguments, thought):
            exchange.ignore(name)
    constraint, param = _constraint(served, chat)
    return Dialogue(chat, ids, thought, constraint and _behind_thought(served, constraint, thought), param)


def _constraint(served: ServedModel, chat: ChatInput) -> tuple[Constraint | None, str]:
    """The constraint of the answer and the field that says it. Tools bring one where a call is forced."""
    offer = chat.offer
    chosen, param = chat.constraint or (None, "response_format")
    if not offer.callable or not (offer.is_required or chosen is not None):
        return chosen, param
    calls = _calls(served, offer, parallel=chat.parallel_calls and offer.name is None)
    if offer.is_required or chosen is None:
        return Constraint("calls", calls), "tools"
    return replace(chosen, alternative=calls), param  # the answer is a call, or follows its format


def _behind_thought(served: ServedModel, constraint: Constraint, thought: ThoughtState) -> Constraint:
    """The constraint, to begin behind the thought: one that the prompt opened, or that the model may begin with."""
    if thought == "open":
        return replace(constraint, starts_after=served.think_end)
    if thought == "possible" and served.is_hybrid:
        return replace(constraint, starts_after=served.think_end, opened_by=served.think_start)
    return constraint


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
    """The messages with each result behind its call, and the results in the order of their calls.

    Chat formats write no ids of calls, so a model distinguishes results only by their order. Clients send results in
    any order, and with other turns between. A result whose call is missing becomes text of the user.
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
    """The assistant's last turn, where it called something and no turn of the user follows."""
    for index in range(len(turns) - 1, -1, -1):
        message = turns[index][0]
        if message.role == "assistant":
            return index if message.tool_calls else None
        if message.role == "user":
            return None
    return None
