"""What a block of threads has on a Hopper GPU."""

SHARED = 227 << 10  # bytes of shared memory a block may use
SHARED_SM = 228 << 10  # of a multiprocessor
RESERVED = 1024  # of it each block also costs


def fits(shared: int, blocks: int) -> bool:
    """Whether a multiprocessor holds so many blocks that use `shared` bytes each."""
    return shared <= SHARED and (shared + RESERVED) * blocks <= SHARED_SM
