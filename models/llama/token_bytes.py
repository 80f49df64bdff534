"""What a vocabulary's spelling of a token says of its bytes.

Vocabularies spell bytes that are no characters in two ways: as ``<0xE2>``, or all bytes as characters of their own, of
which those that print stand for themselves and the others are counted up from U+0100.
"""

import re

_BYTE = re.compile("<0x([0-9A-F]{2})>")
_PRINTED = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_BYTE_OF = {chr(byte): byte for byte in _PRINTED}
_BYTE_OF |= {chr(0x100 + place): byte for place, byte in enumerate(sorted(set(range(0x100)) - _PRINTED))}


def bytes_of_token(token: str) -> bytes:
    """Bytes of ``token`` as a vocabulary spells it; as text, where it is not spelled in bytes."""
    match = _BYTE.fullmatch(token)
    if match is not None:
        return bytes([int(match[1], 16)])
    if all(character in _BYTE_OF for character in token):
        return bytes(_BYTE_OF[character] for character in token)
    return token.replace("\u2581", " ").encode()
