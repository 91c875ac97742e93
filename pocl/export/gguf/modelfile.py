"""An Ollama Modelfile: which GGUF file is run, with which template, ends of answers and sampling.

Ollama fills in templates of Go, and takes from a GGUF file only such Jinja as it knows. So the chat template is tried
on conversations. Where each message is its content between two texts of its role, which nearly all templates make of
plain conversations, the same is written in Go.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Final

from gguf import TokenType

from pocl.export.gguf.architectures import Architecture
from pocl.export.gguf.vocabulary import GENERATION_CONFIG, Vocabulary
from pocl.inspect.chat_templates import DEFAULT_TEMPLATE
from pocl.inspect.reading import read_optional_object
from pocl.prompting.template_renderer import Call, Conversation, TemplateRenderer, call_shared_process

MODELFILE: Final = "Modelfile"
_ROLES: Final = ("system", "user", "assistant")
_MARKS: Final = {role: f"\u2045{role} content\u2046" for role in _ROLES}
"""Contents that stand in no template."""
_TRIALS: Final[Sequence[tuple[str, ...]]] = (
    ("user",),
    ("system", "user"),
    ("user", "assistant", "user"),
    ("system", "user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user"),
    ("system", "user", "assistant", "user", "assistant", "user"),
)
_SAMPLING: Final[Mapping[str, str]] = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""Parameters of Ollama by the settings of a generation config."""
_ADDED: Final = (TokenType.CONTROL, TokenType.USER_DEFINED)
_CONFIG_LIMIT: Final = 1 << 20
_SAMPLED_ALONE: Final = frozenset({"temperature", "top_k", "top_p", "min_p"})

_DAYS: Final = (date(2001, 2, 3), date(2025, 11, 20))


@dataclass(frozen=True)
class Frames:
    """A chat template as texts around the contents of messages."""

    begin: str
    """Before all else, of a conversation without a system message: some templates bring one of their own."""
    before: Mapping[str, str]
    """Before the content of a message, by role."""
    after: Mapping[str, str]
    """After it."""
    answer: str
    """Before the answer."""

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of a conversation, of which the first message alone may be the system's."""
        parts = [self.before[each["role"]] + each["content"] + self.after[each["role"]] for each in messages]
        has_system = bool(messages) and messages[0]["role"] == "system"
        return ("" if has_system else self.begin) + "".join(parts) + self.answer

    def splits(self, token: str) -> bool:
        """Whether a token stands across two of the texts."""
        endings, beginnings = (self.begin, *self.after.values()), (*self.before.values(), self.answer)
        return any((a + b).count(token) > a.count(token) + b.count(token) for a in endings for b in beginnings)

    @property
    def regularity(self) -> tuple[int, int, int]:
        """How alike the ends of messages are, how many there are, and how short: of several ways to cut a text the one
        of the greatest is what its author probably wrote.
        """
        ends = [each for each in self.after.values() if each]
        return -len(set(self.after.values())), len(ends), -sum(map(len, ends))

    def in_go(self) -> str:
        """The same as a template of Go, with `.Messages` and `.System` as Ollama gives them."""
        roles = [
            f'{{{{ {"else " if index else ""}if eq .Role "{role}" }}}}'
            f"{_literal(self.before[role])}{{{{ .Content }}}}{_literal(self.after[role])}"
            for index, role in enumerate(_ROLES)
        ]
        begin = f"{{{{ if not .System }}}}{_literal(self.begin)}{{{{ end }}}}" if self.begin else ""
        return f"{begin}{{{{ range .Messages }}}}{''.join(roles)}{{{{ end }}}}{{{{ end }}}}{_literal(self.answer)}"

    def without_begin(self, token: str) -> "Frames":
        """The frames without a token at the very beginning of the text."""
        system = self.before["system"].removeprefix(token)
        return replace(self, begin=self.begin.removeprefix(token), before={**self.before, "system": system})


def frames_of(
    source: str, special_tokens: Mapping[str, str], tokens: Collection[str] = (), call: Call = call_shared_process
) -> Frames | None:
    """The frames that a chat template puts around contents; None where it does more than that, or prints the date.

    Args:
        source: the template in Jinja.
        special_tokens: as a template sees them, by their names.
        tokens: no two frames may have a part of one each.
        call: renders.
    """
    conversations = [Conversation(conversation(trial), add_generation_prompt=True) for trial in _TRIALS]
    first, second = (
        TemplateRenderer("of the model", source, special_tokens, today, call).render(conversations) for today in _DAYS
    )
    if first != second or any(each.error is not None for each in first):
        return None
    texts = dict(zip(_TRIALS, (each.text for each in first), strict=True))
    return _fitting(texts, {*tokens, *special_tokens.values()})


def conversation(roles: Sequence[str]) -> list[dict[str, str]]:
    """A conversation of these roles, with contents that stand in no template."""
    return [{"role": role, "content": _MARKS[role]} for role in roles]


def _fitting(texts: Mapping[tuple[str, ...], str], tokens: Collection[str]) -> Frames | None:
    """The frames that give these texts of the trials; None where none do."""
    system, user, assistant = (_MARKS[role] for role in _ROLES)
    pieces = _cut(texts["user", "assistant", "user"], user, assistant, user)
    with_system = _cut(texts["system", "user"], system, user)
    if pieces is None or with_system is None:
        return None
    first, between, after_answer, tail = pieces
    lead, after_first, _ = with_system
    # Between two contents stand the end of a message and the beginning of the next: every place to cut is tried.
    found = [
        Frames(
            begin=first.removesuffix(before_user),
            before={"system": lead, "user": before_user, "assistant": between[length:]},
            after={
                "system": after_first.removesuffix(before_user),
                "user": tail[:length],
                "assistant": after_answer.removesuffix(before_user),
            },
            answer=tail[length:],
        )
        for before_user in _common_ends(first, after_answer)
        for length in range(len(tail) + 1)
    ]
    fitting = [
        frames
        for frames in found
        if all(frames.render(conversation(trial)) == text for trial, text in texts.items())
        and not any(frames.splits(token) for token in tokens)
    ]
    return max(fitting, key=lambda frames: frames.regularity, default=None)


def _cut(text: str, *contents: str) -> list[str] | None:
    pieces, rest = [], text
    for content in contents:
        piece, found, rest = rest.partition(content)
        if not found:
            return None
        pieces.append(piece)
    return [*pieces, rest]


def _common_ends(one: str, other: str) -> list[str]:
    """Every text that both end with, the longest first; the empty one last."""
    length = 0
    while length < min(len(one), len(other)) and one[-length - 1] == other[-length - 1]:
        length += 1
    return [one[len(one) - each :] for each in range(length, -1, -1)]


def write_modelfile(
    target: Path, directory: Path, vocabulary: Vocabulary, gguf_file: str, architecture: Architecture
) -> list[str]:
    """Write the Modelfile of a GGUF file beside it.

    Args:
        directory: the model directory, for its generation config.

    Returns:
        Sentences on what it cannot say.
    """
    generation = read_optional_object(directory / GENERATION_CONFIG, limit=_CONFIG_LIMIT)
    template = vocabulary.templates.get(DEFAULT_TEMPLATE)
    added = [token for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True) if kind in _ADDED]
    frames = None if template is None else frames_of(template, vocabulary.template_tokens, added)
    notes: list[str] = []
    lines = [f"FROM ./{gguf_file}"]
    if frames is not None:
        # Ollama has the tokenizer add the token by itself.
        begin = vocabulary.tokens[vocabulary.special_ids["bos"]] if vocabulary.adds_begin else ""
        lines.append(f'TEMPLATE """{frames.without_begin(begin).in_go()}"""')
    elif template is not None:
        notes.append(
            "The Modelfile has no TEMPLATE, since the chat template does more than to put texts around messages: "
            "Ollama takes one that it knows, or none. llama.cpp reads the template of the GGUF file itself (--jinja)."
        )
        lines.append("# No TEMPLATE: the chat template of the GGUF file cannot be said in Go's template language.")
    stops = [vocabulary.tokens[id_] for id_ in vocabulary.end_ids]
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in (*stops, vocabulary.stop_text) if stop]
    lines.append(f"PARAMETER num_ctx {architecture.context_length}")
    is_sampled = generation.get("do_sample") is True
    if not is_sampled:
        lines.append("PARAMETER temperature 0")
    for setting, parameter in _SAMPLING.items():
        value = generation.get(setting)
        if isinstance(value, int | float) and (is_sampled or setting not in _SAMPLED_ALONE):
            lines.append(f"PARAMETER {parameter} {value:g}")
    (target / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return notes


def _literal(text: str) -> str:
    """A text as a template of Go prints it, whatever stands in it; nothing for an empty one."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def _quoted(text: str) -> str:
    """A text as a value of a Modelfile, whose quotes escape nothing."""
    return f'"""{text}"""' if set(text) & {'"', "\n"} else f'"{text}"'
