"""Default chat templates: ChatML, and a plain one for tokenizers whose only special token ends a document.

They are used where neither the settings nor the tokenizer have a template. Both spell everything that a conversation
holds: contents, reasoning, tool calls (as JSON, in the format of Qwen's models), and the tools in the system message.
Only variables that transformers also defines are used, so that an exported template renders the same text elsewhere.
"""

_INSTRUCTIONS = (
    "# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n"
    "You are provided with function signatures within <tools></tools> XML tags:\\n<tools>",
    "\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\\n<tool_call>\\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>',
)

_TEMPLATE = """\
{%- set first = 0 %}
{%- if tools %}
{{- @begin@ + 'system' + @role_end@ }}
{%- if messages and messages[0].role == 'system' %}
{{- messages[0].content + '\\n\\n' }}
{%- set first = 1 %}
{%- endif %}
{{- '@before_tools@' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '@after_tools@' + @end@ }}
{%- endif %}
{%- for message in messages[first:] %}
{{- @begin@ + message.role + @role_end@ }}
{%- if message.reasoning_content %}{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{%- set function = call.function or call %}
{%- set arguments = function.arguments or {} %}
{{- '\\n' if message.content or not loop.first else '' }}
{{- '<tool_call>\\n{"name": ' + (function.name | tojson) + ', "arguments": ' }}
{{- arguments if arguments is string else (arguments | tojson) }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- @end@ }}
{%- endfor %}
{%- if add_generation_prompt %}{{- @begin@ + 'assistant' + @role_end@ }}{%- endif %}"""


def _template(begin: str, role_end: str, end: str) -> str:
    """Return the template with these Jinja expressions before and after a role, and at the end of a message."""
    values = {"begin": begin, "role_end": role_end, "end": end}
    values |= {"before_tools": _INSTRUCTIONS[0], "after_tools": _INSTRUCTIONS[1]}
    text = _TEMPLATE
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


CHATML = _template("'<|im_start|>'", "'\\n'", "'<|im_end|>\\n'")
PLAIN = _template("''", "':\\n'", "eos_token + '\\n'")
