"""The header of a GGUF file, checked before any library reads it.

A hostile header may name more tensors, longer texts or larger tensors than any file or memory holds.
"""

import math
import os
import struct
from pathlib import Path

import gguf

from thesislib.errors import BadInput
from thesislib.files import LARGEST, explain_errors
from thesislib.formats.checkpoint import check_memory

# bytes of GGUF's types of values, texts and lists apart
WIDTHS = dict(enumerate((1, 1, 2, 2, 4, 4, 4, 1))) | dict.fromkeys((10, 11, 12), 8)
MOST_NAMES = 1 << 16  # tensors, or settings
MOST_ELEMENTS = 1 << 22  # of all lists in a header: several times those of the largest tokenizer
MOST_DIMENSIONS = 4  # of a tensor in llama.cpp
SLACK = 1 << 20  # bytes that alignment may add


class _Cursor:
    """A position in the bytes of a header. Past their end it raises struct.error."""

    def __init__(self, head: bytes):
        self.head, self.position = head, 4  # behind the word GGUF
        self.order = ">" if head[4:6] == b"\0\0" else "<"  # of bytes, by the version's number

    def number(self, code: str) -> int:
        (value,) = struct.unpack_from(self.order + code, self.head, self.position)
        self.position += struct.calcsize(self.order + code)
        return value

    def skip(self, length: int) -> None:
        self.position += length
        if self.position > len(self.head):
            raise struct.error(f"a length of {length}")

    def skip_text(self) -> None:
        self.skip(self.number("Q"))

    def skip_setting(self) -> int:
        """Skip a setting; returns the number of elements if it is a list, else 0."""
        self.skip_text()  # its name
        kind, count, elements = self.number("I"), 1, 0
        if kind == gguf.GGUFValueType.ARRAY:
            kind, count = self.number("I"), self.number("Q")
            elements = count
            if elements > MOST_ELEMENTS or kind == gguf.GGUFValueType.ARRAY:
                raise struct.error(f"a list of {count} elements")
        if kind == gguf.GGUFValueType.STRING:
            for _ in range(count):
                self.skip_text()
        elif kind in WIDTHS:
            self.skip(count * WIDTHS[kind])
        else:
            raise struct.error(f"a value of kind {kind}")
        return elements

    def tensor(self) -> tuple[int, int, int]:
        """A tensor's number of elements, its type, and the position of its data behind the header."""
        self.skip_text()  # its name
        dimensions = self.number("I")
        if dimensions > MOST_DIMENSIONS:
            raise struct.error(f"a tensor of {dimensions} dimensions")
        return math.prod(self.number("Q") for _ in range(dimensions)), self.number("I"), self.number("Q")


def check_header(path: Path) -> None:
    """Read a file's header by its own counts and lengths, in bounded time and memory.

    Raises:
        BadInput: no GGUF; counts or lengths that lead out of the file or are beyond any model's; bytes behind the
            tensors; tensors that this machine has no memory for.
    """
    with explain_errors(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(min(size, LARGEST))
    if head[:4] != b"GGUF":
        raise BadInput(f"{path} is not a GGUF file (it does not start with 'GGUF')")
    cursor = _Cursor(head)
    try:
        elements, end = _walk(cursor)
    except struct.error as error:
        raise BadInput(
            f"{path} cannot be read as GGUF (its header leads out of it, or beyond any model's: {error}): "
            "truncated? fetch it again"
        ) from error
    end += cursor.position
    if size > end + SLACK:
        raise BadInput(
            f"{path} has {size:,} bytes, of which its header and tensors are {end:,}: expected no others; "
            "fetch it again"
        )
    if size < end:
        raise BadInput(f"{path} is truncated: its tensors end at byte {end}, the file at {size}")
    check_memory(4 * elements, path)


def _walk(cursor: _Cursor) -> tuple[int, int]:
    """Move a cursor to the end of its header; returns the elements of all tensors, and where their data ends.

    The end is counted from the header's.
    """
    _version, tensors, settings = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if max(tensors, settings) > MOST_NAMES:
        raise struct.error(f"{tensors} tensors and {settings} settings")
    listed = 0
    for _ in range(settings):
        count = cursor.skip_setting()
        listed += count
        if listed > MOST_ELEMENTS:
            raise struct.error(f"a list of {count} elements")
    sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    elements = end = 0
    for _ in range(tensors):
        count, kind, offset = cursor.tensor()
        block, width = sizes.get(kind, (1, 0))
        elements, end = elements + count, max(end, offset + count // block * width)
    return elements, end
