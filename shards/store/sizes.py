"""Sizes in bytes as text."""

GIB = 1 << 30


def size_text(size: int) -> str:
    """Return a number of bytes in the largest fitting unit: GiB, MiB or bytes."""
    if size >= GIB:
        return f"{size / GIB:.2f} GiB"
    if size >= 1 << 20:
        return f"{size / (1 << 20):.1f} MiB"
    return f"{size} bytes"
