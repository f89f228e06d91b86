"""Downloads that go on where they broke off, are verified, and are there whole or not at all."""

import hashlib
import http.client
import math
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path

from expunge import progress
from expunge.errors import CorruptData, MissingData
from expunge.files import replacing

_PIECE = 2**20  # bytes
_ATTEMPTS = 3  # that bring nothing new
_SECONDS = 30.0  # without a byte
# of the network; a full disk is not among them
_BROKEN = (urllib.error.URLError, TimeoutError, ConnectionError, ssl.SSLError, http.client.HTTPException)


def download(url: str, path: Path, md5: str, *, pause: float = 1.0) -> None:
    """Download a file and verify it; what has arrived is kept beside it as ``NAME.part`` until then.

    A server that can continue (HTTP Range) is asked to; from any other it starts anew.

    Args:
        url: http or https.
        path: Where it goes. A file that is there already and verifies is kept; another one is replaced.
        md5: What it must have.
        pause: Seconds before another attempt, doubled with each.

    Raises:
        MissingData: The server cannot be reached or does not have it; the next call goes on.
        CorruptData: It arrived and is not the official file; it is deleted.
    """
    if path.is_file() and checksum(path) == md5:
        return
    part = path.with_name(f"{path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    fruitless = 0
    while True:
        before = _size(part)
        try:
            _continue(url, part)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500:
                raise _not_there(url, path, f"the server answers {error.code} {error.reason}") from error
            reason: Exception = error
        except _BROKEN as error:
            reason = error
        fruitless = 0 if _size(part) > before else fruitless + 1
        if fruitless == _ATTEMPTS:
            raise _not_there(url, path, f"{reason}") from reason
        time.sleep(pause * 2**fruitless)
    found = checksum(part)
    if found != md5:
        size = _size(part)
        part.unlink()
        raise CorruptData(
            f"{url} gave {size:,} bytes with MD5 {found}, and the official file has {md5}. They are deleted. Try "
            "again; if it stays so, the file was changed or something on the way answers in its place."
        )
    with replacing(path) as temporary:
        part.replace(temporary)


def checksum(path: Path, kind: str = "md5") -> str:
    """The checksum of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()


def _continue(url: str, part: Path) -> None:
    have = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing behind what is there: whole, or of another file, which its checksum will tell
            return
        raise
    with answer:
        if answer.status != 206 or not str(answer.headers["Content-Range"]).startswith(f"bytes {have}-"):
            have = 0
        length = answer.headers["Content-Length"]
        total = have + int(length) if length else None
        pieces = None if total is None else math.ceil((total - have) / _PIECE)
        with progress.task(f"{part.stem}, MiB", pieces) as advance, part.open("ab" if have else "wb") as file:
            while piece := answer.read(_PIECE):
                file.write(piece)
                have += len(piece)
                advance()
    if total is not None and have < total:
        raise ConnectionError(f"the connection broke off at {have:,} of {total:,} bytes")


def _not_there(url: str, path: Path, reason: str) -> MissingData:
    return MissingData(
        f"could not download {url}: {reason}. What has arrived is kept, and the same command goes on from there. "
        f"Without a network, bring the file to {path} by other means."
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
