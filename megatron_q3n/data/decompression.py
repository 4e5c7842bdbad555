"""Byte streams over plain, .gz and .zst files that raise an error for truncated files."""

import gzip
import io
import zlib
from typing import IO

import zstandard

from megatron_q3n.config import UserError
from megatron_q3n.data.sources import Source

_BLOCK_BYTES = 2**16

# exceptions raised while reading a damaged file
DAMAGE = (OSError, EOFError, zlib.error, zstandard.ZstdError)


class ByteStream:
    """The decompressed bytes of a source, and the position in the file on disk."""

    def __init__(self, source: Source) -> None:
        self._disk: IO[bytes] = source.path.open("rb")
        self.bytes: IO[bytes] = self._disk
        if source.compression == "gz":
            self.bytes = gzip.GzipFile(fileobj=self._disk)  # type: ignore[assignment]
        elif source.compression == "zst":
            self.bytes = io.BufferedReader(_ZstdFrames(self._disk))

    def position(self) -> int:
        """Return the bytes of the file on disk consumed so far."""
        return self._disk.tell()

    def close(self) -> None:
        """Close the file."""
        self.bytes.close()
        self._disk.close()


class _ZstdFrames(io.RawIOBase):
    """Concatenated Zstandard frames.

    The library's stream_reader reports a normal end of file for a truncated file (zstandard 0.25); this one raises
    EOFError.
    """

    def __init__(self, disk: IO[bytes]) -> None:
        self._disk = disk
        self._compressed = b""
        self._decompressed = memoryview(b"")
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._inside_frame = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        """Copy decompressed bytes of at most one block into the buffer. Returns: their number, 0 at the end."""
        while not self._decompressed:
            self._compressed = self._compressed or self._disk.read(_BLOCK_BYTES)
            if not self._compressed:
                if self._inside_frame:
                    raise EOFError("the compressed file ended before its end-of-frame mark")
                return 0
            self._decompress()
        count = min(len(buffer), len(self._decompressed))
        buffer[:count] = self._decompressed[:count]
        self._decompressed = self._decompressed[count:]
        return count

    def _decompress(self) -> None:
        self._decompressed = memoryview(self._frame.decompress(self._compressed))
        self._inside_frame = not self._frame.eof
        self._compressed = self._frame.unused_data
        if self._frame.eof:
            self._frame = zstandard.ZstdDecompressor().decompressobj()


def unreadable(source: Source, error: Exception) -> UserError:
    """Return the UserError for a source whose reading raised one of DAMAGE."""
    kind = f" as .{source.compression}" if source.compression else ""
    return UserError(f"{source.path}: cannot be read{kind} ({error}). Download or create the file again.")
