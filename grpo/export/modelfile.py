"""Ollama's Modelfile: the file, the prompt as a Go template, stop texts, and sampling as DeepSeek-R1 is sampled.

Ollama shows thoughts apart if the template says how they are enclosed: it looks for `.Thinking` within `range .Messages`, and
takes the text around it for the tags. A template of one `.Prompt`, as a run from a base model has it, has no turns; all is shown.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from grpo.config import DataConfig
from grpo.data.prompts import TEMPLATES
from grpo.export.turns import Turns, turns_of

QUESTION = "⟦question⟧"


def modelfile(
    file: str,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    *,
    thinks: bool,
    adds_bos: bool,
    stop: Sequence[str],
    parameters: dict[str, float | int],
) -> str:
    """A Modelfile for a GGUF file beside it.

    Args:
        data: how the model was asked; its template decides which kind is written.
        thinks: whether its answers may begin with a thought in tags.
        adds_bos: whether Ollama itself begins every prompt with that token.
        stop: texts that end an answer.
        parameters: of sampling, by Ollama's names.
    """
    template = go_template(tokenizer, data, thinks=thinks, adds_bos=adds_bos)
    lines = [f"FROM ./{file}"]
    if template is None:
        lines.append("# The chat template does not write one turn after another; Ollama is left to find one by itself.")
    else:
        lines.append(f"TEMPLATE {quoted(template)}")
    if data.system_prompt is not None:
        lines.append(f"SYSTEM {plainly_quoted(data.system_prompt)}")
    lines += [f"PARAMETER {name} {value:g}" for name, value in parameters.items()]
    lines += [f"PARAMETER stop {plainly_quoted(text)}" for text in stop]
    return "\n".join(lines) + "\n"


def plainly_quoted(text: str) -> str:
    """As a value that is no template. Without quotation marks where those of the text could be taken for the end.

    Raises:
        ValueError: there is no way to write it.
    """
    if '"' not in text:
        return f'"""{text}"""'
    if "\n" not in text and text == text.strip() and not text.startswith('"'):
        return text
    if '"""' not in text and not text.endswith('"'):
        return f'"""{text}"""'
    raise ValueError(
        f"the Modelfile cannot hold {text!r}, as a system prompt or a stop text: its quotation marks would end it. Change them "
        "in data.system_prompt or rollout.stop."
    )


def quoted(text: str) -> str:
    """As the value of a template in Go; text within three quotation marks ends at the next three."""
    text = text.replace('"""', '{{ "\\"\\"\\"" }}')
    return f'"""{text}{{{{ "" }}}}"""' if text.endswith('"') else f'"""{text}"""'


def go_template(tokenizer: PreTrainedTokenizerBase, data: DataConfig, *, thinks: bool, adds_bos: bool) -> str | None:
    """The run's own prompt around `.Prompt`; of a chat template, its turns around `.Messages`, or None if it has no turns."""
    bos = str(tokenizer.bos_token) if adds_bos else ""
    if not TEMPLATES[data.template].is_chat:
        text = TEMPLATES[data.template].fill(QUESTION, tokenizer, data)
        return literal(text.removeprefix(bos)).replace(QUESTION, "{{ .Prompt }}")
    turns = turns_of(tokenizer, data)
    return None if turns is None else _of_turns(turns, bos, thinks=thinks)


def _of_turns(turns: Turns, bos: str, *, thinks: bool) -> str:
    """Without a line break that the turns do not have: every character of a Go template is text."""
    start = literal(turns.start.removeprefix(bos))
    if turns.before_system is not None:
        system = f"{literal(turns.before_system.removeprefix(bos))}{{{{ .System }}}}{literal(turns.after_system)}"
        start = f"{{{{ if .System }}}}{system}{{{{ else }}}}{start}{{{{ end }}}}"
    thought = "{{ if and .Thinking $last }}<think>{{ .Thinking }}</think>{{ end }}" if thinks else ""
    return (
        start
        + "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        + f'{{{{ if eq .Role "user" }}}}{literal(turns.before_user)}{{{{ .Content }}}}{literal(turns.after_user)}'
        + f'{{{{ else if eq .Role "assistant" }}}}{literal(turns.before_assistant)}{thought}{{{{ .Content }}}}'
        + f"{{{{ if not $last }}}}{literal(turns.after_assistant)}{{{{ end }}}}{{{{ end }}}}"
        + f'{{{{ if and $last (ne .Role "assistant") }}}}{literal(turns.prompt)}{{{{ end }}}}{{{{ end }}}}'
    )


def literal(text: str) -> str:
    """Text that Go's template language leaves as it is."""
    return text.replace("{{", '{{ "{{" }}')
