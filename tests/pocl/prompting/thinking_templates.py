"""Chat templates in the shapes of families of 2025 and 2026, most of which write thoughts, written for these tests after
the published behaviours.
"""

# Long lines and full-width bars are the templates' own: wrapping them would hide what they write.
# ruff: noqa: E501, RUF001

from dataclasses import dataclass

from tests.pocl.prompting.chat_templates import CHATML_TURN, Family


@dataclass(frozen=True)
class ThinkingFamily(Family):
    """A template, and what it makes of the answer "Because." with and without the thought "Hm"."""

    thinking: str | None = None
    """What is trained on of an answer with a thought; None where the template writes no thought that a message has."""
    thought: str = "<think>"
    """What a thought begins with."""


THINKING_FAMILIES: dict[str, ThinkingFamily] = {
    "gpt-oss": ThinkingFamily(
        """
{{- "<|start|>system<|message|>You are a model.\nCurrent date: " + strftime_now("%Y-%m-%d") + "\n\nReasoning: " }}
{{- (reasoning_effort | default("medium")) + "\n\n# Valid channels: analysis, commentary, final.<|end|>" }}
{%- if messages[0].role in ["system", "developer"] %}
    {%- set instructions = messages[0].content %}{%- set loop_messages = messages[1:] %}
{%- else %}{%- set instructions = "" %}{%- set loop_messages = messages %}{%- endif %}
{%- if instructions %}{{- "<|start|>developer<|message|># Instructions\n\n" + instructions + "<|end|>" }}{%- endif %}
{%- for message in loop_messages %}
    {%- if message.role == "assistant" %}
        {%- set future = namespace(answer=false) %}
        {%- for later in loop_messages[loop.index:] %}{%- if later.role == "assistant" and "tool_calls" not in later %}{%- set future.answer = true %}{%- endif %}{%- endfor %}
        {%- if message.thinking and ((loop.last and not add_generation_prompt) or "tool_calls" in message) and not future.answer %}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
        {%- endif %}
        {%- if "tool_calls" in message %}
            {%- set call = message.tool_calls[0].function %}
            {{- "<|start|>assistant to=functions." + call.name + "<|channel|>commentary json<|message|>" + (call.arguments | tojson) + "<|call|>" }}
        {%- elif loop.last and not add_generation_prompt %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}
        {%- else %}
            {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
        {%- endif %}
    {%- elif message.role == "tool" %}
        {{- "<|start|>functions.tool to=assistant<|channel|>commentary<|message|>" + message.content + "<|end|>" }}
    {%- else %}
        {{- "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start|>assistant" }}{%- endif %}
""",
        "<|start|>assistant",
        "<|channel|>final<|message|>Because.<|return|>",
        "<|return|>",
        thinking="<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>Because.<|return|>",
        thought="<|channel|>analysis<|message|>",
    ),
    "qwen 3.5": ThinkingFamily(
        """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- if ns.last < 0 %}{{- raise_exception('No user query found in messages.') }}{%- endif %}
{%- for m in messages %}
    {%- set content = m.content | trim %}
    {%- if m.role == 'assistant' %}
        {%- if m.reasoning_content is string %}{%- set reasoning = m.reasoning_content | trim %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] | trim %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- else %}{%- set reasoning = '' %}{%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last %}{{- '<think>\n' + reasoning + '\n</think>\n\n' }}{%- endif %}
        {{- content + '<|im_end|>\n' }}
    {%- else %}{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- else %}{{- '<think>\n' }}{%- endif %}
{%- endif %}
""",
        "<|im_start|>assistant\n<think>\n",
        "\n</think>\n\nBecause.<|im_end|>",
        "<|im_end|>",
        thinking="Hm\n</think>\n\nBecause.<|im_end|>",
    ),
    "glm 4.5": ThinkingFamily(
        """[gMASK]<sop>
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|assistant|>' }}
        {%- set reasoning = m.reasoning_content if m.reasoning_content is string else '' %}
        {%- if loop.index0 > ns.last and reasoning %}{{- '\n<think>' + reasoning.strip() + '</think>' }}{%- else %}{{- '\n<think></think>' }}{%- endif %}
        {%- if m.content.strip() %}{{- '\n' + m.content.strip() }}{%- endif %}
    {%- else %}{{- '<|' + m.role + '|>\n' + m.content }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{{- '\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' }}{%- endif %}
""",
        "<|assistant|>",
        "\n<think></think>\nBecause.<|endoftext|>",
        "<|endoftext|>",
        end_added=True,
        thinking="\n<think>Hm</think>\nBecause.<|endoftext|>",
    ),
    "kimi k2 thinking": ThinkingFamily(
        """
{%- if messages[0].role != 'system' %}{{- '<|im_system|>system<|im_middle|>You are an assistant.<|im_end|>' }}{%- endif %}
{%- for m in messages %}
    {{- '<|im_' + m.role + '|>' + m.role + '<|im_middle|>' }}
    {%- if m.role == 'assistant' %}{{- '<think>' + (m.reasoning_content or '') + '</think>' }}{%- endif %}
    {{- m.content + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_assistant|>assistant<|im_middle|>' }}{%- endif %}
""",
        "<|im_assistant|>assistant<|im_middle|>",
        "<think></think>Because.<|im_end|>",
        "<|im_end|>",
        thinking="<think>Hm</think>Because.<|im_end|>",
    ),
    "minimax m2": ThinkingFamily(
        """
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = 'You are an assistant.' %}{%- endif %}
{{- ']~!b[]~b]system\n' + system + '[e~[\n' }}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- ']~b]ai\n' }}
        {%- if m.reasoning_content and loop.index0 > ns.last %}{{- '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{%- endif %}
        {{- m.content + '[e~[\n' }}
    {%- else %}{{- ']~b]' + m.role + '\n' + m.content + '[e~[\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- ']~b]ai\n<think>\n' }}{%- endif %}
""",
        "]~b]ai\n",
        "Because.[e~[",
        "[e~[",
        # The generation prompt opens the thought, which stands in the prompt of an answer that has one.
        thinking="Hm\n</think>\n\nBecause.[e~[",
    ),
    "seed-oss": ThinkingFamily(
        """
{%- for m in messages %}
    {{- '<seed:bos>' + m.role + '\n' }}
    {%- if m.role == 'assistant' and m.reasoning_content is string and m.reasoning_content | trim | length > 0 %}
        {{- '\n<seed:think>' + m.reasoning_content | trim + '</seed:think>\n' }}
    {%- endif %}
    {{- m.content + '<seed:eos>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<seed:bos>assistant\n' }}{%- endif %}
""",
        "<seed:bos>assistant\n",
        "Because.<seed:eos>",
        "<seed:eos>",
        thinking="\n<seed:think>Hm</seed:think>\nBecause.<seed:eos>",
        thought="<seed:think>",
    ),
    "ministral 3": ThinkingFamily(
        """{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- '[SYSTEM_PROMPT]' + messages[0].content + '[/SYSTEM_PROMPT]' }}{%- set messages = messages[1:] %}{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '[INST]' + m.content + '[/INST]' }}
    {%- elif m.content is string %}{{- m.content + eos_token }}
    {%- else %}
        {%- for block in m.content %}
            {%- if block.type == 'text' %}{{- block.text }}{%- elif block.type == 'thinking' %}{{- '[THINK]' + block.thinking + '[/THINK]' }}
            {%- else %}{{- raise_exception('Only text and thinking chunks are supported.') }}{%- endif %}
        {%- endfor %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}
""",
        "[/INST]",
        "Because.</s>",
        thinking="[THINK]Hm[/THINK]Because.</s>",
        thought="[THINK]",
    ),
    "hunyuan": ThinkingFamily(
        """
{%- for m in messages %}
    {%- if m.role == 'system' %}{{- m.content }}
    {%- elif m.role == 'user' %}{{- '<|hy_User|>' + m.content + '<|hy_Assistant|>' }}
    {%- else %}{{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n<answer>\n' + m.content + '\n</answer><|hy_eos|>' }}{%- endif %}
{%- endfor %}
""",
        "<think>\n\n</think>\n<answer>\n",
        "Because.\n</answer><|hy_eos|>",
        "<|hy_eos|>",
        # Without a generation prompt all that stands before any answer is the prompt's.
        thinking=None,
    ),
    "hunyuan with a generation prompt": ThinkingFamily(
        """
{%- for m in messages %}
    {%- if m.role == 'system' %}{{- m.content }}
    {%- elif m.role == 'user' %}{{- '<|hy_User|>' + m.content }}
    {%- else %}{{- '<|hy_Assistant|><think>\n' + (m.reasoning_content or '') + '\n</think>\n<answer>\n' + m.content + '\n</answer><|hy_eos|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|hy_Assistant|>' }}{%- endif %}
""",
        "<|hy_Assistant|>",
        "<think>\n\n</think>\n<answer>\nBecause.\n</answer><|hy_eos|>",
        "<|hy_eos|>",
        thinking="<think>\nHm\n</think>\n<answer>\nBecause.\n</answer><|hy_eos|>",
    ),
    "command a reasoning": ThinkingFamily(
        """{{- bos_token }}
{%- for m in messages %}
    {{- '<|START_OF_TURN_TOKEN|><|' + {'user': 'USER', 'assistant': 'CHATBOT', 'system': 'SYSTEM'}[m.role] + '_TOKEN|>' }}
    {%- if m.role == 'assistant' %}
        {%- if m.thinking %}{{- '<|START_THINKING|>' + m.thinking + '<|END_THINKING|>' }}{%- endif %}
        {{- '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' }}
    {%- else %}{{- m.content }}{%- endif %}
    {{- '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif %}
""",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "<|START_RESPONSE|>Because.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        thinking="<|START_THINKING|>Hm<|END_THINKING|><|START_RESPONSE|>Because.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        thought="<|START_THINKING|>",
    ),
    "gemma 4": ThinkingFamily(
        """{{- bos_token }}
{%- for m in messages %}
    {{- '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
    {%- if m.reasoning %}{{- '<|channel>thought\n' + m.reasoning + '\n<channel|>' }}{%- elif m.role == 'assistant' and m.thinking %}{{- '<|channel>thought\n' + m.thinking + '\n<channel|>' }}{%- endif %}
    {{- m.content | trim + '<turn|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|turn>model\n' }}{%- if not enable_thinking | default(false) %}{{- '<|channel>thought\n<channel|>' }}{%- endif %}{%- endif %}
""",
        "<|turn>model\n",
        "Because.<turn|>",
        "<turn|>",
        thinking="<|channel>thought\nHm\n<channel|>Because.<turn|>",
        thought="<|channel>thought",
    ),
    "apertus": ThinkingFamily(
        """{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- '<|system_start|>' + messages[0].content + '<|system_end|>' }}{%- set messages = messages[1:] %}{%- endif %}
{{- '<|developer_start|>Deliberation: ' + ('enabled' if enable_thinking | default(false) else 'disabled') + '<|developer_end|>' }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '<|user_start|>' + m.content + '<|user_end|>' }}
    {%- elif m.content is string %}{{- '<|assistant_start|>' + m.content + '<|assistant_end|>' }}
    {%- else %}
        {{- '<|assistant_start|>' }}
        {%- for block in m.content.blocks %}{{- '<|inner_prefix|>' + block.text + '<|inner_suffix|>' if block.type == 'thoughts' else block.text }}{%- endfor %}
        {{- '<|assistant_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant_start|>' }}{%- endif %}
""",
        "<|assistant_start|>",
        "Because.<|assistant_end|>",
        "<|assistant_end|>",
        thought="<|inner_prefix|>",
    ),
    "exaone 4": ThinkingFamily(
        """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {{- '[|' + m.role + '|]\n' }}
    {%- if m.role == 'assistant' and loop.index0 > ns.last %}{{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{%- endif %}
    {{- m.content + '[|endofturn|]\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[|assistant|]\n' + ('<think>\n' if enable_thinking | default(false) else '<think>\n\n</think>\n\n') }}{%- endif %}
""",
        "[|assistant|]\n<think>\n\n</think>\n\n",
        "Because.[|endofturn|]",
        "[|endofturn|]",
        thinking="<think>\nHm\n</think>\n\nBecause.[|endofturn|]",
    ),
    "exaone deep": ThinkingFamily(
        "{% for m in messages %}{{ '[|' + m.role + '|]' }}"
        "{% if m.role == 'assistant' %}{{ m.content.split('</thought>')[-1].lstrip('\n') + '[|endofturn|]' }}"
        "{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]<thought>\n' }}{% endif %}",
        "[|assistant|]",
        "Because.[|endofturn|]",
        "[|endofturn|]",
        thought="<thought>",
    ),
    "olmo 3 think": ThinkingFamily(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% if m.role == 'assistant' and loop.last %}{{ eos_token }}{% else %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}",
        "<|im_start|>assistant\n",
        "Because.<|endoftext|>",
        "<|endoftext|>",
    ),
    "deepseek v3.1": ThinkingFamily(
        "{% set ns = namespace(system='') %}"
        "{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content %}{% endif %}{% endfor %}{{ bos_token + ns.system }}"
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
        "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜></think>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜>' + ('<think>' if thinking | default(false) else '</think>') }}{% endif %}",
        "<｜Assistant｜></think>",
        "Because.<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
    ),
    "nemotron nano 2": ThinkingFamily(
        "{% for m in messages %}{% if m.role == 'system' %}{{ '<SPECIAL_10>System\n' + m.content + '\n' }}"
        "{% elif m.role == 'user' %}{{ '<SPECIAL_11>User\n' + m.content + '\n' }}"
        "{% else %}{{ '<SPECIAL_11>Assistant\n' + m.content.split('</think>')[-1].strip() + '\n<SPECIAL_12>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<SPECIAL_11>Assistant\n<think>\n' }}{% endif %}",
        "<SPECIAL_11>Assistant\n",
        "Because.\n<SPECIAL_12>",
        "<SPECIAL_12>",
    ),
    "jamba": ThinkingFamily(
        "{{ bos_token }}{% for m in messages %}{{ '<|bom|><|' + m.role + '|> ' + m.content + '<|eom|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|bom|><|assistant|>' }}{% endif %}",
        "<|bom|><|assistant|>",
        " Because.<|eom|>",
        "<|eom|>",
    ),
    "ernie 4.5": ThinkingFamily(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\n' }}"
        "{% elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + eos_token }}{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}",
        "Assistant: ",
        "Because.</s>",
    ),
    "lfm 2": ThinkingFamily(
        "{{ bos_token }}{% set ns = namespace(last=-1) %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'assistant' and loop.index0 != ns.last %}"
        "{{ '<|im_start|>assistant\n' + m.content.split('</think>')[-1] | trim + '<|im_end|>\n' }}{% else %}"
        + CHATML_TURN
        + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>assistant\n",
        "Because.<|im_end|>",
        "<|im_end|>",
    ),
}
