"""Inputs as they arrive broken: every file that dotexport reads, changed at random, from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Damage = tuple[str, bytes]

ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1,
        10**30,
        1.5,
        float("nan"),
        float("inf"),
        "",
        "x",
        "../x",
        "/etc/passwd",
    ),
    *("\ud800", "a" * 5000, [], {}, [[]], {"x": None}, [1, "2", None]),
)
YAMLS = (
    *(b"&a [*a]", b"a: &a {b: *a}", b"[" * 3000, b"when: 2020-13-45", b"!!bool maybe"),
    *(b"!!python/object:os.system {}", b"? [1]\n: 2", b"\xff\xfe\x00", b"- a\n- b", b"a: b: c"),
)


def damaged(content: bytes, kind: str, rng: random.Random) -> Damage:
    """What became of the bytes, in words, and the bytes.

    Args:
        kind: json, yaml, jsonl, or anything else.
    """
    ways: list[Callable[[bytes, random.Random], Damage]] = [_cut, _flipped, _emptied, _doubled]
    if kind == "json":
        ways = [_other_value] * 6 + [_lost_key] * 2 + [_nested, _listed, *ways]
    elif kind == "yaml":
        ways = [_other_yaml] * 3 + [_line_lost, _line_doubled, *ways]
    elif kind in ("txt", "jsonl"):
        ways = [_line_lost, _nested, *ways]
    return rng.choice(ways)(content, rng)


def _cut(content: bytes, rng: random.Random) -> Damage:
    at = rng.randrange(len(content) + 1)
    return f"cut at byte {at}", content[:at]


def _flipped(content: bytes, rng: random.Random) -> Damage:
    changed = bytearray(content)
    # Headers and the beginnings of documents are where a byte says most.
    most = len(changed) if rng.random() < 0.5 else min(len(changed), 2000)
    places = [rng.randrange(most) for _ in range(rng.choice((1, 1, 8)))] if changed else []
    for at in places:
        changed[at] ^= 1 << rng.randrange(8)
    return f"{len(places)} bits flipped", bytes(changed)


def _emptied(content: bytes, rng: random.Random) -> Damage:
    return "emptied", b"\0" * len(content) if rng.random() < 0.5 else b""


def _doubled(content: bytes, rng: random.Random) -> Damage:
    return "twice in one file", content + content


def _nested(content: bytes, rng: random.Random) -> Damage:
    depth = rng.choice((70, 500, 200_000))
    return f"{depth} brackets", b"[" * depth + (b"]" * depth if rng.random() < 0.5 else b"")


def _listed(content: bytes, rng: random.Random) -> Damage:
    return "in a list", b"[" + content + b"]"


def _other_yaml(content: bytes, rng: random.Random) -> Damage:
    odd = rng.choice(YAMLS)
    return "odd YAML", odd if rng.random() < 0.5 else content + b"\n" + odd


def _line_lost(content: bytes, rng: random.Random) -> Damage:
    lines = content.splitlines(keepends=True)
    at = rng.randrange(max(1, len(lines)))
    return f"line {at + 1} lost", b"".join(lines[:at] + lines[at + 1 :])


def _line_doubled(content: bytes, rng: random.Random) -> Damage:
    lines = content.splitlines(keepends=True)
    at = rng.randrange(max(1, len(lines)))
    return f"line {at + 1} twice", b"".join(lines[: at + 1] + lines[at:])


def _other_value(content: bytes, rng: random.Random) -> Damage:
    document = json.loads(content)
    parent, key = rng.choice(list(_places(document)) or [(None, None)])
    if parent is None:
        return "null", b"null"
    odd = rng.choice(ODD)
    parent[key] = odd
    return f"{key} = {_brief(odd)}", json.dumps(document).encode()


def _lost_key(content: bytes, rng: random.Random) -> Damage:
    document = json.loads(content)
    places = [(p, k) for p, k in _places(document) if isinstance(p, dict)]
    parent, key = rng.choice(places) if places else ({"": 0}, "")
    del parent[key]
    return f"without {key}", json.dumps(document).encode()


def _places(document: Any, most: int = 4000) -> Iterator[tuple[Any, Any]]:
    """Every place of a value, those near the root as often as all below them together."""
    left, count = [document], 0
    while left and count < most:
        holder = left.pop(0)
        pairs = holder.items() if isinstance(holder, dict) else enumerate(holder)
        for key, value in list(pairs):
            count += 1
            yield holder, key
            if isinstance(value, dict | list):
                left.append(value)


def _brief(value: Any) -> str:
    said = ascii(value)
    return said if len(said) < 40 else f"{said[:37]}..."


def damage_file(file: Path, rng: random.Random) -> str:
    """Damage a file in its place; says how."""
    if rng.random() < 0.04:
        file.unlink()
        if rng.random() < 0.5:
            file.mkdir()
            return f"{file.name}: a folder"
        return f"{file.name}: gone"
    kind = file.suffix.lstrip(".").replace("yml", "yaml")
    said, content = damaged(file.read_bytes(), kind, rng)
    file.write_bytes(content)
    return f"{file.name}: {said}"
