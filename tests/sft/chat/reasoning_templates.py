"""Chat templates that print reasoning as known model families do, written for these tests.

Each has what the model generates for an answer and for a call of the tool `weather`, with `{r}` for the reasoning,
`{a}` for the answer, and `{i}` for the id of the call.
"""

# ruff: noqa: E501 (a template reads best line by line)

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """One family.

    Args:
        template: Jinja source.
        answer: What the model generates for an answer.
        call: What it generates for a call.
        history: Whether the template prints the reasoning of earlier answers.
    """

    template: str
    answer: str
    call: str
    history: bool = False


_LAST_QUESTION = "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
_SPLIT = (
    "{% set text = m.content or '' %}{% set why = m.reasoning_content or '' %}"
    "{% if not why and '</think>' in text %}{% set why = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
_JSON_CALLS = "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function.name }} {{ c.function.arguments | tojson }}\n</tool_call>{% endfor %}"
_CALL_FORMAT = '<tool_call>\nweather {{"city": "Lima"}}\n</tool_call>'

QWEN3 = Family(
    _LAST_QUESTION + "{% for m in messages %}{% if m.role == 'assistant' %}" + _SPLIT + "<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or why) %}<think>\n{{ why }}\n</think>\n\n{% endif %}{{ text }}"
    + _JSON_CALLS
    + "<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    "<think>\n{r}\n</think>\n\n{a}<|im_end|>",
    "<think>\n{r}\n</think>\n\n" + _CALL_FORMAT + "<|im_end|>",
)
QWEN35 = Family(
    _LAST_QUESTION + "{% for m in messages %}{% if m.role == 'assistant' %}" + _SPLIT + "<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last or preserve_thinking | default(false) %}<think>\n{{ why }}\n</think>\n\n{% endif %}{{ text }}"
    + _JSON_CALLS
    + "<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% if enable_thinking is defined and not enable_thinking %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}",
    "{r}\n</think>\n\n{a}<|im_end|>",
    "{r}\n</think>\n\n" + _CALL_FORMAT + "<|im_end|>",
)
DEEPSEEK_R1 = Family(
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{{ m.content.split('</think>')[-1] }}"
    "{% for c in m.tool_calls or [] %}<|call|>{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}<|im_end|>"
    "{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
    "{r}\n</think>\n\n{a}<|im_end|>",
    "",
)
HARMONY = Family(
    "<|start|>system<|message|>Reasoning: {{ reasoning_effort | default('medium') }}<|end|>{% set list = messages %}{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}"
    "{% set ns = namespace(answered=false) %}{% for n in list[loop.index:] %}{% if n.role == 'assistant' and not n.tool_calls %}{% set ns.answered = true %}{% endif %}{% endfor %}"
    "{% if m.thinking and not ns.answered %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}<|channel|>commentary json<|message|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% elif m.role == 'assistant' and loop.last and not add_generation_prompt %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>"
    "{% elif m.role == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
    "<|channel|>analysis<|message|>{r}<|end|><|start|>assistant<|channel|>final<|message|>{a}<|return|>",
    '<|channel|>analysis<|message|>{r}<|end|><|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{{"city": "Lima"}}<|call|>',
)
SMOLLM3 = Family(
    "{% set on = enable_thinking | default(true) %}<|im_start|>system\nReasoning Mode: {{ '/think' if on else '/no_think' }}<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not on %}{{ '<think>\n\n</think>\n' }}{% endif %}"
    "{{ m.content.lstrip('\n') }}" + _JSON_CALLS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if not on %}{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}",
    "<think>\n{r}\n</think>\n{a}<|im_end|>",
    "<think>\n{r}\n</think>\n" + _CALL_FORMAT + "<|im_end|>",
    history=True,
)
GLM45 = Family(
    "[gMASK]<sop>"
    + _LAST_QUESTION
    + "{% for m in messages %}{% if m.role == 'assistant' %}"
    + _SPLIT
    + "<|assistant|>\n"
    "<think>{{ why.strip() if loop.index0 > ns.last else '' }}</think>{% if text %}{{ '\n' + text }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ '\n' }}<tool_call>{{ c.function.name }}{% for k, v in c.function.arguments.items() %}{{ '\n' + k + '=' + v }}{% endfor %}{{ '\n' }}</tool_call>{% endfor %}"
    "{% elif m.role == 'tool' %}<|observation|>\n{{ m.content }}"
    "{% else %}<|{{ m.role }}|>\n{{ m.content }}{% if m.role == 'user' and enable_thinking is defined and not enable_thinking %}/nothink{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and not enable_thinking %}{{ '\n<think></think>' }}{% endif %}{% endif %}",
    "\n<think>{r}</think>\n{a}<|user|>",
    "\n<think>{r}</think>\n<tool_call>weather\ncity=Lima\n</tool_call><|observation|>",
)
MAGISTRAL = Family(
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{% elif m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]{% else %}"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% elif part.type == 'thinking' %}[THINK]{{ part.thinking }}[/THINK]{% else %}{{ raise_exception('unknown part') }}{% endif %}{% endfor %}{% endif %}"
    "{% for c in m.tool_calls or [] %}[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}{{ eos_token }}{% endif %}{% endfor %}",
    "[THINK]{r}[/THINK]{a}<|im_end|>",
    '[THINK]{r}[/THINK][TOOL_CALLS]weather[ARGS]{{"city": "Lima"}}<|im_end|>',
    history=True,
)
KIMI = Family(
    "{% set ns = namespace(answered=-1) %}{% for m in messages %}{% if m.role == 'assistant' and not m.tool_calls %}{% set ns.answered = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_{{ 'system' if m.role == 'tool' else m.role }}|>{{ m.role }}<|im_middle|>"
    "{% if m.role == 'assistant' %}<think>{{ '' if loop.index0 <= ns.answered else m.reasoning_content or '' }}</think>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>{{ c.function.arguments | tojson }}<|tool_call_end|>{% endfor %}"
    "{% elif m.role == 'tool' %}## Return of {{ m.tool_call_id }}\n{{ m.content }}{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}",
    "<think>{r}</think>{a}<|im_end|>",
    '<think>{r}</think><|tool_call_begin|>{i}<|tool_call_argument_begin|>{{"city": "Lima"}}<|tool_call_end|><|im_end|>',
)
FAMILIES = {
    "qwen3": QWEN3,
    "qwen3.5": QWEN35,
    "deepseek-r1": DEEPSEEK_R1,
    "gpt-oss": HARMONY,
    "smollm3": SMOLLM3,
    "glm-4.5": GLM45,
    "magistral": MAGISTRAL,
    "kimi": KIMI,
}
SPECIAL_TOKENS = [
    "<|user|>", "<|assistant|>", "<|observation|>", "<|system|>", "<|call|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>",
    "[INST]", "[/INST]", "[TOOL_CALLS]", "[ARGS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[THINK]", "[/THINK]",
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>",
    "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
]  # fmt: skip
