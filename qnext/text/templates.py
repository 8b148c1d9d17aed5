"""Chat templates for folders that this project writes, and how a template is recognised.

`INSTRUCT` and `THINKING` render the same as `qnext.text.native`, so that other programs read these folders correctly.
"""

from __future__ import annotations

import hashlib
import json

from qnext.text.native import TOOLS_HEAD, TOOLS_TAIL

_SYSTEM = r"""
{%- set has_system = messages[0].role in ['system', 'developer'] %}
{%- set turns = messages[1:] if has_system else messages %}
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if has_system %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- TOOLS_HEAD }}
    {%- for tool in tools %}
        {{- '\n' + (tool | tojson) }}
    {%- endfor %}
    {{- TOOLS_TAIL + '<|im_end|>\n' }}
{%- elif has_system %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- macro tool_calls(message, content) %}
    {%- for entry in message.tool_calls or [] %}
        {%- set call = entry.function if entry.function is defined else entry %}
        {%- if content or not loop.first %}
            {{- '\n' }}
        {%- endif %}
        {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
        {{- call.arguments if call.arguments is string else call.arguments | tojson }}
        {{- '}\n</tool_call>' }}
    {%- endfor %}
{%- endmacro %}"""

_OTHER_TURNS = r"""
    {%- elif message.role == 'tool' %}
        {%- if loop.first or turns[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or turns[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- else %}
        {%- set role = 'system' if message.role == 'developer' else message.role %}
        {{- '<|im_start|>' + role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}"""

_INSTRUCT_TURNS = r"""
{%- for message in turns %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content or '' %}
        {{- '<|im_start|>assistant\n' + content + tool_calls(message, content) + '<|im_end|>\n' }}"""

_INSTRUCT_PROMPT = r"""
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

_THINKING_TURNS = r"""
{%- set ns = namespace(last_query=turns | length - 1, is_searching=true) %}
{%- for message in turns[::-1] %}
    {%- if ns.is_searching and message.role == 'user' %}
        {%- if not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
            {%- set ns.is_searching = false %}
            {%- set ns.last_query = turns | length - 1 - loop.index0 %}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- for message in turns %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content or '' %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {{- tool_calls(message, content) + '<|im_end|>\n' }}"""

_THINKING_PROMPT = r"""
    {{- '<|im_start|>assistant\n<think>\n' }}
{%- endif %}
"""


def _assemble(turns: str, prompt: str) -> str:
    source = (_SYSTEM + turns + _OTHER_TURNS + prompt).removeprefix("\n")
    return source.replace("TOOLS_HEAD", json.dumps(TOOLS_HEAD)).replace("TOOLS_TAIL", json.dumps(TOOLS_TAIL))


INSTRUCT_TEMPLATE = _assemble(_INSTRUCT_TURNS, _INSTRUCT_PROMPT)
THINKING_TEMPLATE = _assemble(_THINKING_TURNS, _THINKING_PROMPT)
TEMPLATES = {"instruct": INSTRUCT_TEMPLATE, "thinking": THINKING_TEMPLATE}  # that a folder may be given


def template_hash(text: str) -> str:
    """SHA-256 of a template without the white space around it, which editors and downloads change."""
    return hashlib.sha256(text.strip().encode("utf-8", errors="surrogatepass")).hexdigest()


# The third is the template of Qwen3-Coder.
KNOWN_TEMPLATES: dict[str, str] = {
    template_hash(INSTRUCT_TEMPLATE): "instruct",
    template_hash(THINKING_TEMPLATE): "thinking",
    "eae48a3307931acb10a6fce475a36b711709672ea79ee1a9bc52f083d8b0a2af": "coder",
}
