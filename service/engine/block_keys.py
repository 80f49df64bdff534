"""What a full cache block is found by: a hash of its tokens, of all tokens before them, and of who may share them.

Keys and values of a token depend on every token before it. So a block's key is the hash of the key of the block before
it and of its own tokens, and two requests have a block's key in common exactly if they begin with the same tokens up to
its end. The first block's predecessor is the hash of the request's salt: requests with different salts share nothing,
and how fast one is answered tells nothing of the other.

Keys are 256 bits of BLAKE2b. Nobody can find two texts with the same one, not even on purpose, so that tokens need not
be compared.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from .request import Request

_KEY_BYTES = 32


def root_key(salt: str) -> bytes:
    """What stands before the first block of every request with ``salt``."""
    return blake2b(salt.encode("utf-8", errors="surrogatepass"), digest_size=_KEY_BYTES, person=b"qerve salt").digest()


def block_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Key of the block of ``token_ids`` that follows the one with the key ``parent``."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=_KEY_BYTES).digest()


def keys_of(request: Request, num_blocks: int, block_size: int) -> list[bytes]:
    """Keys of the leading ``num_blocks`` blocks of ``request``, all full; each is worked out once.

    The list is the request's own and may hold more.
    """
    keys = request.block_keys
    for index in range(len(keys), num_blocks):
        parent = keys[-1] if keys else root_key(request.cache_salt)
        keys.append(block_key(parent, request.tokens_between(index * block_size, (index + 1) * block_size)))
    return keys
