"""Opening plain, .gz and .zst files as byte streams that say when they were cut short."""

import gzip
import io
import zlib
from typing import IO

import zstandard

from megatron_q3n.config import UserError
from megatron_q3n.data.sources import Source

_BLOCK_BYTES = 2**16

# what reading such a stream raises for a damaged file
DAMAGE = (OSError, EOFError, zlib.error, zstandard.ZstdError)


class ByteStream:
    """The decompressed bytes of a source, and how far the file on disk has been read."""

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
    """Zstandard frames end to end.

    The library's own stream_reader ends quietly where a cut file ends (zstandard 0.25); this one raises EOFError.
    """

    def __init__(self, disk: IO[bytes]) -> None:
        self._disk = disk
        self._packed = b""
        self._plain = memoryview(b"")
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._inside = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        """Fill the buffer as far as one block of the file does; 0 at the end."""
        while not self._plain:
            self._packed = self._packed or self._disk.read(_BLOCK_BYTES)
            if not self._packed:
                if self._inside:
                    raise EOFError("the compressed file ended before its end-of-frame mark")
                return 0
            self._decompress()
        count = min(len(buffer), len(self._plain))
        buffer[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count

    def _decompress(self) -> None:
        self._plain = memoryview(self._frame.decompress(self._packed))
        self._inside = not self._frame.eof
        self._packed = self._frame.unused_data
        if self._frame.eof:
            self._frame = zstandard.ZstdDecompressor().decompressobj()


def unreadable(source: Source, error: Exception) -> UserError:
    """Return the error to raise for a file that DAMAGE was met in."""
    packed = f" as .{source.compression}" if source.compression else ""
    return UserError(f"{source.path}: cannot be read{packed} ({error}). Fetch or make it again.")
