"""Turns of a conversation → its document."""

from collections.abc import Iterable, Sequence
from typing import Any

from data.document import Document, Role, check_roles

SPEAKERS: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
                             "gpt": "assistant"}


def role_of(name: object) -> Role:
    """Errors: ValueError for one that no conversation here has, such as a tool's."""
    role = SPEAKERS.get(name) if isinstance(name, str) else None
    if role is None:
        raise ValueError(f"unknown role: {name!r} is none of {', '.join(SPEAKERS)}")
    return role


def conversation(turns: Iterable[tuple[Role, Sequence[str | bytes]]], meta: dict[str, object]) -> Document:
    """Errors: ValueError where somebody says nothing, or out of turn."""
    parts, roles = list[str | bytes](), list[Role]()
    for role, given in turns:
        spoken = [part for part in given if isinstance(part, bytes) or part.strip()]
        if not spoken:
            raise ValueError(f"empty turn: the {role} says nothing")
        parts += spoken
        roles.extend(role for _ in spoken)
    if not parts:
        raise ValueError("empty conversation: nobody says anything")
    document = Document("", tuple(parts), meta=meta, roles=tuple(roles))
    check_roles(document)
    return document


def named(row: dict[str, Any], *fields: str) -> dict[str, object]:
    """What of a row evaluation may want to know."""
    return {field: row[field] for field in fields if isinstance(row.get(field), str | int)}
