"""Damage to files: of bytes, and of what a format means by them, drawn from a generator."""

import io
import json
import random
import struct
import tempfile
import tomllib
from pathlib import Path

import numpy as np

from nblora.storage.checkpoint import write_checkpoint
from nblora.storage.safetensors_reader import SafetensorsFile

INTERESTING = [
    b"\0", b"\xff", b"\xff" * 8, b"{", b"[", b'"', b"}", b",", b"\\", b"NaN", b"1e999", b"-1", b"1" * 40, b"null",
    b"[" * 3000, b"{}", b'"\\ud800"', b"../", b"/dev/zero", b"\xef\xbb\xbf", b"__metadata__",
]  # fmt: skip
VALUES = [
    None, True, -1, 0, 1, 1.5, 2**31, 2**63, 2**64, 10**30, 1e308, "", "x", "../x", "(a+)+b", "a{99999999999999999999}",
    "\0", "é" * 50, [], [1], {}, {"a": 1}, [[]], "F32", "BF16", "none", "all", 3 * [10**6],
]  # fmt: skip


def damage(rng: random.Random, data: bytes) -> bytes:
    """One to four kinds of damage."""
    for _ in range(rng.randint(1, 4)):
        data = rng.choice([_flip, _cut, _insert, _repeat, _drop, _overwrite])(rng, data)
    return data


def _flip(rng: random.Random, data: bytes) -> bytes:
    if not data:
        return data
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randint(0, len(data))]


def _insert(rng: random.Random, data: bytes) -> bytes:
    place = rng.randint(0, len(data))
    return data[:place] + rng.choice(INTERESTING) + data[place:]


def _repeat(rng: random.Random, data: bytes) -> bytes:
    start, stop = sorted(rng.randint(0, len(data)) for _ in range(2))
    return data[:stop] + data[start:stop] * rng.randint(1, 3) + data[stop:]


def _drop(rng: random.Random, data: bytes) -> bytes:
    start, stop = sorted(rng.randint(0, len(data)) for _ in range(2))
    return data[:start] + data[stop:]


def _overwrite(rng: random.Random, data: bytes) -> bytes:
    place, new = rng.randint(0, len(data)), rng.choice(INTERESTING)
    return data[:place] + new + data[place + len(new) :]


def damage_json(rng: random.Random, data: bytes) -> bytes:
    """A JSON text with some values, names or parts exchanged; it stays JSON."""
    content = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        content = _exchange(rng, content)
    return json.dumps(content).encode()


def damage_lines(rng: random.Random, data: bytes) -> bytes:
    """JSON lines, one of them damaged as `damage_json` does."""
    lines = data.splitlines()
    place = rng.randrange(len(lines))
    lines[place] = damage_json(rng, lines[place])
    return b"\n".join(lines) + b"\n"


def damage_safetensors(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file whose header is JSON of the right length, and says something else."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + length], data[8 + length :]
    content = json.loads(header)
    texts = [name for name, value in content.get("__metadata__", {}).items() if value[:1] in ("{", "[")]
    if texts and rng.random() < 0.6:  # what the metadata holds is JSON of its own
        name = rng.choice(texts)
        content["__metadata__"][name] = damage_json(rng, content["__metadata__"][name].encode()).decode()
        header = json.dumps(content).encode()
    else:
        header = damage_json(rng, header)
    if rng.random() < 0.1:
        body = damage(rng, body)
    return struct.pack("<Q", len(header)) + header + body


def damage_sealed(rng: random.Random, data: bytes) -> bytes:
    """A checkpoint whose configuration or tensors say something else, under a checksum that is right again."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(data)
        with SafetensorsFile(path) as file:
            config, tensors = file.metadata["config"], {name: file.array(name) for name in file.tensors}
            kind = file.metadata["kind"]
        name = rng.choice(list(tensors))
        chance = rng.random()
        if chance < 0.15:
            tensors[name] = tensors[name].reshape(-1)
        elif chance < 0.25:
            tensors[name] = tensors[name].astype(rng.choice(["float64", "float16", "int32"]))
        elif chance < 0.35:
            del tensors[name]
        elif chance < 0.4:
            kind = rng.choice(["Dense", "Layer", "Sequential", "x", ""])
        else:
            config = damage_json(rng, config.encode()).decode()
        write_checkpoint(path, kind, json.loads(config), tensors)
        return path.read_bytes()


def damage_toml(rng: random.Random, data: bytes) -> bytes:
    """A TOML file of tables with some values or names exchanged."""
    content = _exchange(rng, tomllib.loads(data.decode()))
    lines = []
    for table, entries in content.items() if isinstance(content, dict) else ():
        if isinstance(entries, dict):
            lines.append(f"[{json.dumps(table)}]")
            lines += [f"{json.dumps(name)} = {json.dumps(value)}" for name, value in entries.items()]
        else:
            lines.insert(0, f"{json.dumps(table)} = {json.dumps(entries)}")
    return "\n".join(lines).encode()


def damage_npz(rng: random.Random, data: bytes) -> bytes:
    """A whole archive of other arrays."""
    with np.load(io.BytesIO(data)) as file:
        arrays = dict(file)
    name = rng.choice(list(arrays))
    array = arrays[name]
    arrays[name] = rng.choice(
        [
            array[:-1], array[None], array.ravel(), array.astype("S"), array.astype(object), array.astype(complex),
            np.array(1.0), np.zeros((len(array), 0)), np.full_like(array, rng.choice([-(2**31), 3, 0])),
            array.astype("datetime64[s]"), np.zeros(3, "i4,f4"), array * np.nan,
        ]
    )  # fmt: skip
    if rng.random() < 0.2:
        arrays[rng.choice(["x", "z", "x_test", ""])] = arrays.pop(name)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _exchange(rng: random.Random, value: object, depth: int = 0) -> object:
    if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.75):
        name = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.12:
            return {other: inner for other, inner in value.items() if other != name}
        if kind < 0.2:
            return value | {rng.choice([name + "x", "", name.upper(), "a.b"]): value[name]}
        return value | {name: _exchange(rng, value[name], depth + 1)}
    if isinstance(value, list) and value and rng.random() < 0.75:
        place = rng.randrange(len(value))
        kind = rng.random()
        if kind < 0.15:
            return value[:place] + value[place + 1 :]
        if kind < 0.3:
            return value + value[place:]
        return [*value[:place], _exchange(rng, value[place], depth + 1), *value[place + 1 :]]
    if isinstance(value, int | float) and rng.random() < 0.3:
        return value + rng.choice([-1, 1, 7, 0.5])
    return rng.choice(VALUES)
