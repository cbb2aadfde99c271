"""Text and tokens: tokenizer files, chat templates, and where the system prompt ends and a request begins."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import numpy as np
import numpy.typing as npt
import tokenizers

from relay_attention.errors import ArtifactError, PromptError
from relay_attention.runtime.artifact import SYSTEM_PROMPT_NAME, Artifact

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
SPECIAL_TOKENS_NAME = "special_tokens_map.json"
TEMPLATE_NAME = "chat_template.jinja"
TOKENIZER_FILES = (TOKENIZER_NAME, TOKENIZER_CONFIG_NAME, SPECIAL_TOKENS_NAME, TEMPLATE_NAME)

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | npt.NDArray[np.integer[Any]] | Sequence[Message]

# User texts whose first characters tokenizers merge differently with what stands before them. The prefix is
# what the renderings of all of them share, so that a request may start in any of these ways without moving
# the boundary.
_PROBES = (
    *string.ascii_letters,
    *string.digits,
    *string.punctuation,
    *"éß中あ한я🙂",
    " b",
    "  b",
    "\nb",
    "\n\nb",
    "\tb",
)
_FEW_PROBES = ("A", " b", "\nb")


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks the assistant's words for training; here its body is just rendered."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja2)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class ChatTemplate:
    """A chat template, rendered with the options and globals that transformers gives it."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        self.source = source
        self.special_tokens = dict(special_tokens)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = self._tojson
        environment.globals["raise_exception"] = self._raise
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ArtifactError(f"the chat template cannot be compiled: {error}") from error

    def render(self, messages: Sequence[Message], now: datetime | None = None) -> str:
        """The text of a conversation, up to where the assistant's next answer begins.

        now: what `strftime_now` sees; a template that prints the date gives another prefix every day
        otherwise.
        Raises: PromptError with the template's own words when it refuses the conversation.
        """
        variables = {**self.special_tokens, "strftime_now": (now or datetime.now()).strftime}
        messages = [
            {key: value for key, value in message.items() if value is not None} for message in messages
        ]
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **variables
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise PromptError(f"the chat template refuses the messages: {error}") from error

    @staticmethod
    def _raise(message: str) -> None:
        raise jinja2.TemplateError(message)

    @staticmethod
    def _tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own filter escapes for HTML
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )


class Tokenizer:
    """The tokenizer of a folder: tokenizer.json, special tokens and chat template from files beside it."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        add_bos: bool = True,
    ):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.backend = tokenizer
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = ChatTemplate(chat_template, self.special_tokens) if chat_template else None
        self.bos_id = self._special_id("bos_token")
        self.eos_id = self._special_id("eos_token")
        self.pad_id = self._special_id("pad_token")
        self.add_bos = add_bos and self.bos_id is not None

    @classmethod
    def open(cls, folder: Path) -> Tokenizer:
        """Reads the tokenizer files of a folder (an artifact's or a model's).

        Raises: ArtifactError naming the file that is missing or damaged.
        """
        path = folder / TOKENIZER_NAME
        if not path.is_file():
            raise ArtifactError(f"{path}: missing: a tokenizer in the `tokenizers` format is needed")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ArtifactError(f"{path}: cannot be read as a tokenizer: {error}") from error
        special = _read_object(folder / SPECIAL_TOKENS_NAME)
        config = _read_object(folder / TOKENIZER_CONFIG_NAME)
        named = {
            name: token["content"] if isinstance(token, dict) else token
            for name, token in {**special, **config}.items()
            if name.endswith("_token")
            and (isinstance(token, str) or (isinstance(token, dict) and "content" in token))
        }
        template = config.get("chat_template")
        if (folder / TEMPLATE_NAME).is_file():
            template = _read_text(folder / TEMPLATE_NAME)
        elif isinstance(template, list):  # several, each with a name
            template = {item.get("name"): item.get("template") for item in template}.get("default")
        return cls(tokenizer, named, template, add_bos=config.get("add_bos_token") is not False)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with none added: special tokens come from the text itself."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return str(self.backend.decode(list(token_ids), skip_special_tokens=True))

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: not UTF-8: {error}") from error


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except ValueError as error:
        raise ArtifactError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: should be a JSON object, is {type(value).__name__}")
    return value


@dataclass(frozen=True)
class SystemPrompt:
    """A system prompt as tokens, and how a request's own tokens follow it.

    text: the system prompt's text. template: "chat" or "plain". token_ids: the prefix, shared by all.
    rendered_at: the time that the chat template saw (ISO 8601), so that a template that prints the date still
        agrees with the prefix tomorrow; None for "plain".
    """

    tokenizer: Tokenizer
    text: str
    template: str
    token_ids: tuple[int, ...]
    rendered_at: str | None = None

    @classmethod
    def make(cls, tokenizer: Tokenizer, text: str, template: str | None = None) -> SystemPrompt:
        """Tokenizes a system prompt and finds where it ends.

        template: "chat", "plain", or None for "chat" where the tokenizer has a chat template.
        With "chat" the prefix is what the renderings of different user messages have in common, counted in
        tokens; it ends before the user's text. With "plain" it is BOS (if there is one) and the text.
        Raises: PromptError if the template refuses a system message or does not put it before the user's.
        """
        template = template or ("chat" if tokenizer.chat_template else "plain")
        if template == "plain":
            bos = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
            return cls(tokenizer, text, "plain", tuple(bos + tokenizer.encode(text)))
        if tokenizer.chat_template is None:
            raise PromptError("the tokenizer has no chat template: use the template 'plain'")
        now = datetime.now().replace(microsecond=0)
        texts = _renderings(tokenizer.chat_template, text, now, _FEW_PROBES)
        shared = _shared(map(tokenizer.encode, texts))
        other = _renderings(tokenizer.chat_template, text + " B", now, _FEW_PROBES)
        if not shared or shared == _shared(map(tokenizer.encode, other)):
            raise PromptError("the chat template does not put the system message before the user's message")
        head, count = _restart(tokenizer, texts, shared)
        texts = _renderings(tokenizer.chat_template, text, now, _PROBES)
        token_ids = shared[:count] + _shared(tokenizer.encode(text.removeprefix(head)) for text in texts)
        return cls(tokenizer, text, "chat", tuple(token_ids), now.isoformat())

    @classmethod
    def open(cls, artifact: Artifact, tokenizer: Tokenizer) -> SystemPrompt:
        """The system prompt that an artifact was exported with."""
        prefix = artifact.manifest.prefix
        if prefix.template == "chat" and tokenizer.chat_template is None:
            raise ArtifactError(f"{artifact.path}: made with a chat template, but the folder holds none")
        text = _read_text(artifact.file(SYSTEM_PROMPT_NAME))
        return cls(tokenizer, text, prefix.template, prefix.token_ids, prefix.rendered_at)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of one request, prefix excluded.

        A string is a user message (template "chat") or a text that follows the prefix ("plain"); a list of
        messages is rendered after the system prompt, which it may repeat; token ids are taken as they are.
        Raises: PromptError if it is empty, of another type, or does not begin with this prefix.
        """
        if isinstance(prompt, str):
            if not prompt:
                raise PromptError("the prompt is empty")
            if self.template == "plain":
                return self.tokenizer.encode(prompt)
            return self._render([{"role": "user", "content": prompt}])
        if isinstance(prompt, np.ndarray):
            prompt = prompt.tolist()
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise PromptError(
                f"the prompt is {_describe(prompt)}, not a string, a list of token ids or a list of messages"
            )
        if not prompt:
            raise PromptError("the prompt is empty")
        if all(isinstance(item, (int, np.integer)) and not isinstance(item, bool) for item in prompt):
            return [int(item) for item in prompt]  # type: ignore[arg-type]
        if not all(isinstance(item, Mapping) and "role" in item for item in prompt):
            raise PromptError(
                'the prompt is a list, but neither of token ids nor of messages {"role": ..., "content": ...}'
            )
        return self._render(list(prompt))  # type: ignore[arg-type]

    def _render(self, messages: list[Message]) -> list[int]:
        chat_template = self.tokenizer.chat_template
        if self.template != "chat" or chat_template is None:
            raise PromptError(
                "the prompt is a list of messages, but the artifact has no chat template: give a string"
            )
        if messages[0].get("role") != "system":
            messages = [{"role": "system", "content": self.text}, *messages]
        elif messages[0].get("content") != self.text:
            raise PromptError(
                "the prompt starts with a system message that is not the one the artifact was made with"
            )
        text = chat_template.render(messages, self._now)
        head, count = self._head if text.startswith(self._head[0]) else ("", 0)
        tail, token_ids = self.tokenizer.encode(text.removeprefix(head)), list(self.token_ids[count:])
        if tail[: len(token_ids)] != token_ids:
            raise PromptError(
                "as the chat template renders it, the prompt does not begin with the artifact's system prompt"
            )
        return tail[len(token_ids) :]

    @cached_property
    def _now(self) -> datetime | None:
        return datetime.fromisoformat(self.rendered_at) if self.rendered_at else None

    @cached_property
    def _head(self) -> tuple[str, int]:
        assert self.tokenizer.chat_template is not None
        texts = _renderings(self.tokenizer.chat_template, self.text, self._now, _FEW_PROBES)
        return _restart(self.tokenizer, texts, self.token_ids)


def _renderings(template: ChatTemplate, text: str, now: datetime | None, probes: Sequence[str]) -> list[str]:
    system = {"role": "system", "content": text}
    return [template.render([system, {"role": "user", "content": probe}], now) for probe in probes]


def _shared(sequences: Iterable[list[int]]) -> list[int]:
    """The longest common beginning."""
    return [column[0] for column in takewhile(lambda ids: len(set(ids)) == 1, zip(*sequences, strict=False))]


def _restart(tokenizer: Tokenizer, texts: Sequence[str], token_ids: Sequence[int]) -> tuple[str, int]:
    """Where tokenizing texts that all begin with `token_ids` may start: (the text before, tokens in it).

    Special tokens are split off before all else, so what follows one does not depend on what stands before
    it: a long system prompt need not be tokenized for every request. ("", 0) where a tokenizer does not keep
    to that.
    """
    special = {id for id, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    count = max((place + 1 for place, token_id in enumerate(token_ids) if token_id in special), default=0)
    heads = set()
    for text in texts:
        encoding = tokenizer.backend.encode(text, add_special_tokens=False)
        if not count or encoding.ids[:count] != list(token_ids[:count]):
            return "", 0
        head = text[: encoding.offsets[count - 1][1]]
        if tokenizer.encode(text.removeprefix(head)) != encoding.ids[count:]:
            return "", 0
        heads.add(head)
    return (heads.pop(), count) if len(heads) == 1 else ("", 0)


def _describe(value: object) -> str:
    return f"{type(value).__name__} {value!r:.40}"
