"""One row of preference data: prompt, chosen and rejected in TRL's formats, checked, and what a template needs besides.

A row is `prompt`, `chosen`, `rejected` as strings or as lists of messages, or `chosen` and `rejected` alone with the
prompt as their common beginning. TRL's own helper takes the prompt out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trl.data_utils import maybe_extract_prompt

from gradent.errors import DataFileError, PairError
from gradent.pairs.preparation import IgnoredPairError

__all__ = ["Parts", "kind_of", "plain_text", "read_template", "refuse_unread", "split_row"]

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
"""Roles of ShareGPT's rows, which say `from` and `value`."""

Parts = tuple[Any, Any, Any]
"""Prompt, chosen and rejected of a row: all strings, or all lists of messages."""


def split_row(where: str, values: Any) -> Parts:
    """Prompt, chosen and rejected of one row, all strings or all messages."""
    if not isinstance(values, Mapping):
        raise DataFileError(f"{where}: the row is a {type(values).__name__}; an object with keys is expected.")
    missing = [key for key in ("chosen", "rejected") if key not in values]
    if missing:
        raise DataFileError(
            f"{where}: missing {' and '.join(map(repr, missing))}; the row has {sorted(map(str, values))}. Accepted: "
            "prompt, chosen and rejected, or chosen and rejected that begin with the same prompt."
        )
    refuse_unread(where, values)
    if isinstance(values["rejected"], list) and any(isinstance(each, str | list) for each in values["rejected"]):
        raise DataFileError(
            f"{where}: rejected is a list of {len(values['rejected'])} responses; a pair has one. Make a row of each: "
            "the same prompt and chosen, with one of them as rejected."
        )
    values = {**values, **{key: _renamed(values[key]) for key in ("prompt", "chosen", "rejected") if key in values}}
    kinds = {key: kind_of(where, key, values[key]) for key in ("chosen", "rejected")}
    if kinds["chosen"] != kinds["rejected"]:
        raise DataFileError(
            f"{where}: chosen is {kinds['chosen']} but rejected is {kinds['rejected']}; both must be alike."
        )
    if values["chosen"] == values["rejected"]:
        raise IgnoredPairError(
            f"{where}: chosen equals rejected; such a pair has no preference to learn. Remove it.",
            "chosen equals rejected, so that there is no preference to learn",
        )
    return _take_prompt(where, values, kinds["chosen"])


def _renamed(part: Any) -> Any:
    """Messages that say `from` and `value`, as ShareGPT's do, in TRL's words; anything else as it is."""
    messages = [part] if isinstance(part, Mapping) else part
    if not isinstance(messages, list) or not messages:
        return part
    if not all(isinstance(message, Mapping) and {"from", "value"} <= message.keys() for message in messages):
        return part
    return [
        {"role": _ROLES.get(str(message["from"]), str(message["from"])), "content": message["value"]}
        for message in messages
    ]


def refuse_unread(where: str, values: Mapping[str, Any]) -> None:
    """Refuse a row with keys that change its tokens in ways that gradent does not know."""
    for key in ("images", "image"):
        if values.get(key):
            raise DataFileError(
                f"{where}: the row carries {key!r}, which gradent does not read, so its tokens would not be those that "
                f"TRL trains on. Remove {key!r} to audit the row without it; with it, measure while it is trained: "
                "EntanglementCallback."
            )
    for key in ("prompt", "chosen", "rejected"):
        if _holds_image(values.get(key)):
            raise DataFileError(
                f"{where}: a message of {key} holds an image, which gradent does not read. Remove that part of its "
                "content to audit the row without it; with it, measure while it is trained: EntanglementCallback."
            )


def _holds_image(messages: Any) -> bool:
    """Whether the content of a message is in parts, and one of them is no text."""
    listed = messages if isinstance(messages, list) else [messages]
    contents = [each.get("content") for each in listed if isinstance(each, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, Mapping) and part.get("type") in ("image", "image_url", "video") for part in parts)


def _take_prompt(where: str, values: Mapping[str, Any], kind: str) -> Parts:
    if "prompt" in values:
        prompt_kind = kind_of(where, "prompt", values["prompt"])
        if (prompt_kind, kind) == ("messages", "text"):
            raise DataFileError(f"{where}: prompt is messages but chosen and rejected are text; all must be alike.")
    is_explicit = "prompt" in values and prompt_kind == kind
    # Of texts that do not begin alike TRL's helper makes an empty prompt, unless chosen is empty or ends in a space: it
    # then looks at the last letter, and cuts there. Of messages it makes an empty prompt, which TRL refuses to render.
    is_empty = kind == "text" and values["chosen"][-1:].strip(" ") and values["rejected"]
    if not is_explicit and values["chosen"][:1] != values["rejected"][:1] and not is_empty:
        raise DataFileError(
            f"{where}: no 'prompt', and chosen and rejected do not begin alike, so there is no prompt to take out. "
            "Add a 'prompt', or let both begin with it."
        )
    example = {key: values[key] for key in ("prompt", "chosen", "rejected") if key in values}
    split = maybe_extract_prompt(example)
    return _given(split["prompt"]), _given(split["chosen"]), _given(split["rejected"])


def _given(part: Any) -> Any:
    """Messages without the keys that a table fills with nothing, which templates take for something."""
    if isinstance(part, str):
        return part
    return [{key: value for key, value in message.items() if value is not None or key == "content"} for message in part]


def read_template(where: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a row gives to the chat template besides its messages, read as TRL reads it."""
    tools, more = values.get("tools"), values.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataFileError(f"{where}: tools is text that is no JSON ({error}); TRL reads it so.") from error
    if not isinstance(more, Mapping):
        raise DataFileError(f"{where}: chat_template_kwargs is a {type(more).__name__}; an object is expected.")
    return ({"tools": tools} if tools else {}) | dict(more)


def kind_of(where: str, key: str, value: Any) -> str:
    """`text` or `messages`."""
    if isinstance(value, list) and not value:
        if key == "prompt":
            raise PairError(f"{where}: {key} is empty; it needs at least one message.")
        raise IgnoredPairError(
            f"{where}: {key} is empty; it needs at least one token. Remove this pair.",
            "a response has no messages, and TRL trains on the other one alone",
        )
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and isinstance(value[0], Mapping) and {"role", "content"} & value[0].keys():
        for number, message in enumerate(value):
            if not (isinstance(message, Mapping) and isinstance(message.get("role"), str) and _says(message)):
                raise DataFileError(
                    f"{where}: {key}[{number}] is not a message; each needs 'role', and 'content' or 'tool_calls'."
                )
        return "messages"
    raise DataFileError(
        f"{where}: {key} is {_describe(value)}; accepted is a string, or a list of messages "
        '([{"role": "user", "content": "..."}, ...]).'
    )


def _says(message: Mapping[str, Any]) -> bool:
    """Whether a message has content, or calls tools in its place."""
    return "content" in message or bool(message.get("tool_calls"))


def _describe(value: Any) -> str:
    if value is None:
        return "null"
    return f"a {type(value).__name__}" + (f" of {type(value[0]).__name__}" if isinstance(value, list) else "")


def plain_text(response: Any) -> str:
    """A prompt or response as one string: itself, or what its messages say and call."""
    if isinstance(response, str):
        return response
    return "\n".join(text for message in response for text in _texts(message) if text)


def _texts(message: Mapping[str, Any]) -> list[str]:
    """The content of a message, part by part, and its calls."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [] if content is None else [content]
    texts = [_part(part) for part in parts]
    calls = [call.get("function", call) for call in message.get("tool_calls") or [] if isinstance(call, Mapping)]
    return texts + [_call(call) for call in calls]


def _part(part: Any) -> str:
    return str(part.get("text") or f"[{part.get('type')}]") if isinstance(part, Mapping) else str(part)


def _call(call: Mapping[str, Any]) -> str:
    arguments = call.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    return f"{call.get('name')}({text})"
