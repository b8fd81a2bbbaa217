"""What goes through a pipe between a peer and who drives it: a line of JSON, then arrays in NumPy's form."""

import io
import json
from typing import Any, BinaryIO

import numpy as np


def send(stream: BinaryIO, message: dict[str, Any]) -> None:
    """Write a message; its `arrays`, where it has them, are a dict of ndarray."""
    packed = io.BytesIO()
    np.savez(packed, **message.get("arrays", {}))
    rest = {name: value for name, value in message.items() if name != "arrays"}
    stream.write(f"{json.dumps([rest, len(packed.getbuffer())])}\n".encode())
    stream.write(packed.getbuffer())
    stream.flush()


def receive(stream: BinaryIO) -> dict[str, Any]:
    """Read the next message; EOFError where there is none, or not the whole of one."""
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    message, size = json.loads(line)
    packed = stream.read(size)
    if len(packed) < size:
        raise EOFError
    with np.load(io.BytesIO(packed)) as file:
        arrays = dict(file)
    return message | ({"arrays": arrays} if arrays else {})
