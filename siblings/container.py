"""A file of chunks: a header that describes them, an index, and a checksum per chunk (docs/codec.md, "The file").

Numbers are little-endian; lengths and counts are varints, seven bits per byte. Nothing is allocated on a file's word alone:
the lengths it states are checked against its own.
"""

import json
import struct
import zlib
from pathlib import Path

from common.utils import UserError, whole
from common.video import printable

MAGIC, VERSION = b"NeRV", 1
START = struct.Struct("<4sBII")
LARGEST = 2**20  # bytes of a header as JSON
# Likely content of headers, a dictionary for compression to about 40 bytes: short videos are small. Part of the format.
WORDS = b'"1234567890abcdef":[128,256,[0.125,0.25,0.75,0.5,12.5,29.97,50,30,24,"frames":"size":[64,64],"rate":25.0,"keep":1.0,'
WORDS += b'"bits":[8,8,8],"bits":[4,4,4,4],"bits":[6,6,6,6],"kind":"fit","kind":"codec","model":"'


class BadFile(UserError):
    """A file that is not ours, or is damaged: path and reason, on one line."""

    def __init__(self, path, reason):
        super().__init__(f"{printable(path)}: {reason}")


def varint(number):
    return bytes([number & 127 | 128]) + varint(number >> 7) if number > 127 else bytes([number])


def read_varint(data, place):
    """(the number at `place` in the bytes, the place after it). IndexError or ValueError if there is none."""
    number = 0
    for shift in range(0, 63, 7):
        byte, place = data[place], place + 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, place
    raise ValueError("a number without end")


def write(path, header, chunks):
    """Write a header (a dictionary that JSON can hold) and chunks (bytes) to a file; returns its length in bytes.

    The name appears only when the file is complete. UserError if it cannot be written.
    """
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=WORDS)
    head = packer.compress(json.dumps(header, separators=(",", ":")).encode()) + packer.flush()
    head += varint(len(chunks)) + b"".join(varint(len(chunk)) + struct.pack("<I", zlib.crc32(chunk)) for chunk in chunks)
    with whole(path) as part:
        return part.write_bytes(b"".join([START.pack(MAGIC, VERSION, len(head), zlib.crc32(head)), head, *chunks]))


class Reader:
    """header: the dictionary. len(reader): number of chunks. reader[i]: the bytes of one, or None if it is damaged.

    Raises BadFile if it is not such a file, its header is damaged, or extra bytes follow.
    """

    def __init__(self, path):
        self.path = path
        try:
            self.data = Path(path).read_bytes()
        except OSError as error:
            raise BadFile(path, error.strerror or "cannot be read") from None
        self.length = len(self.data)
        if self.length < START.size or self.data[:4] != MAGIC:
            raise BadFile(path, "not a file written by this program")
        _, version, size, checksum = START.unpack_from(self.data)
        if version != VERSION:
            raise BadFile(path, f"its format is version {version}, but this program reads {VERSION}")
        head, offset = self.data[START.size : START.size + size], START.size + size
        if zlib.crc32(head) != checksum:
            raise BadFile(path, "its header is damaged, or the file is truncated")
        try:
            unpacker = zlib.decompressobj(-15, zdict=WORDS)
            self.header = json.loads(unpacker.decompress(head, LARGEST))
            index = unpacker.unused_data
            count, place = read_varint(index, 0)
            self.entries = []  # (offset, length, checksum) of each chunk
            for _ in range(min(count, len(index) // 5 + 1)):  # each takes 5 bytes or more
                length, place = read_varint(index, place)
                self.entries.append((offset, length, struct.unpack_from("<I", index, place)[0]))
                offset, place = offset + length, place + 4
            if len(self.entries) != count or place != len(index) or not isinstance(self.header, dict):
                raise ValueError
        except (zlib.error, ValueError, IndexError, struct.error, RecursionError):
            raise BadFile(path, "its header was not written by this program") from None
        if self.length > offset:
            raise BadFile(path, f"{self.length - offset} bytes follow its end")

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, i):
        offset, length, checksum = self.entries[i]
        chunk = self.data[offset : offset + length]
        return chunk if len(chunk) == length and zlib.crc32(chunk) == checksum else None
