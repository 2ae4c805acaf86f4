"""Checksums of the files of a run: damage is one line, never other numbers.

``run.json`` carries the SHA-256 of ``model.safetensors`` and of its own content, ``config.yaml``
that of its text in a first line; a file of ``torch.save`` has a CRC-32 for every record. Files that
older versions wrote carry none and are read as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "check_records",
    "file_sha256",
    "seal",
    "sealed_sha256",
    "sign",
    "signed_text",
]

SEAL = "sha256"
"""Key of a sealed JSON object: the SHA-256 of named files, and of the object itself."""


_SIGNATURE = "# sha256 of the text below: "


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces (about 1.2 GB/s on one core)."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def check_records(path: Path) -> None:
    """Compare every record of a file of ``torch.save`` with its checksum; ``torch.load`` does not.

    Raises:
        ValueError, zipfile.BadZipFile, OSError: The file is damaged or of another kind.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise ValueError("compressed records, which torch.save does not write")
            bad = archive.testzip()
    except (NotImplementedError, RuntimeError) as error:  # flags of features that torch never uses
        raise ValueError(str(error)) from None
    if bad is not None:
        raise ValueError(f"wrong checksum of {bad}")


def seal(content: Mapping[str, Any], name: str, files: Mapping[str, str]) -> dict[str, Any]:
    """``content`` of the JSON file ``name`` with the hashes of ``files`` and its own."""
    sealed = {**content, SEAL: dict(files)}
    sealed[SEAL][name] = _sha256(_canonical(sealed))
    return sealed


def sealed_sha256(content: Mapping[str, Any], name: str) -> dict[str, str] | None:
    """The hashes that a sealed JSON object carries; None if it has no seal.

    Raises:
        ValueError: The object is not what was sealed.
    """
    if SEAL not in content:
        return None
    hashes = content[SEAL]
    if not isinstance(hashes, dict) or name not in hashes:
        raise ValueError(f"{SEAL} does not name {name}")
    unsealed = {**content, SEAL: {k: v for k, v in hashes.items() if k != name}}
    if _sha256(_canonical(unsealed)) != hashes[name]:
        raise ValueError(
            f"changed since it was written (its {SEAL} is another); restore it, or remove "
            f"{SEAL!r} from it if the change is yours"
        )
    return hashes


def sign(text: str) -> str:
    """``text`` below a comment that holds its hash."""
    return f"{_SIGNATURE}{_sha256(text)}\n{text}"


def signed_text(text: str) -> str:
    """The text below a signature, or all of it if there is none.

    Raises:
        ValueError: The text is not what was signed.
    """
    if not text.startswith(_SIGNATURE[:8]):
        return text
    match = re.match(re.escape(_SIGNATURE) + r"([0-9a-f]{64})\n", text)
    if match is None or _sha256(text[match.end() :]) != match.group(1):
        raise ValueError(
            "changed since it was written (the sha256 in its first line is another); restore it, "
            "or remove that line if the change is yours"
        )
    return text[match.end() :]


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
