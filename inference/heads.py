"""Over how many ranks a model can be spread: every rank holds whole KV heads, and as many as the others.

Sizing, preflight and the engine ask here.
"""

from inference.errors import EngineConfigError


def check_heads(size: int, *, num_heads: int, num_kv_heads: int) -> None:
    """Refuse a size that does not divide the heads.

    Raises:
        EngineConfigError: with the head counts and the sizes that work.
    """
    refusal = heads_refusal(size, num_heads=num_heads, num_kv_heads=num_kv_heads)
    if refusal:
        raise EngineConfigError(
            f"engine.tensor_parallel_size is {size}: {refusal}; "
            f"use {_either(possible_sizes(num_heads, num_kv_heads))}"
        )


def heads_refusal(size: int, *, num_heads: int, num_kv_heads: int) -> str:
    """Say why heads cannot be spread over `size` ranks; empty when they can."""
    if num_kv_heads % size == 0 and num_heads % size == 0:
        return ""
    return (
        f"tensor parallel {size} does not divide {num_kv_heads} KV heads "
        f"and {num_heads} attention heads"
    )


def possible_sizes(num_heads: int, num_kv_heads: int) -> list[int]:
    """Sizes that divide both head counts, smallest first."""
    return [
        size
        for size in range(1, num_kv_heads + 1)
        if not heads_refusal(size, num_heads=num_heads, num_kv_heads=num_kv_heads)
    ]


def _either(sizes: list[int]) -> str:
    *most, last = [str(size) for size in sizes]
    return f"{', '.join(most)} or {last}" if most else last
