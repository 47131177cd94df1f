"""End tokens: which tokens end a completion, from everything a model folder says about it. No torch."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from inference.errors import ModelError

# Ends of a chat turn or of a text. A model's files may list only one of them; a model that writes one is done.
CHAT_END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>")


def end_token_ids(folder: str | Path, tokenizer: Any) -> frozenset[int]:
    """Return the union of what generation_config.json, config.json and the tokenizer call an end token.

    Nothing else of generation_config.json is ever used: sampling is what `SamplingParams` says.

    Raises:
        ModelError: a file is not JSON, or an end token is not an integer.
    """
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = Path(folder) / name
        if not path.exists():
            continue
        try:
            config = json.loads(path.read_bytes())
            found.update(_ids(config.get("eos_token_id")))
            found.update(_ids((config.get("text_config") or {}).get("eos_token_id")))
        except (ValueError, TypeError, AttributeError) as error:
            raise ModelError(f"{path}: eos_token_id is not a token id or a list of them") from error
    found.update(_ids(tokenizer.eos_token_id))
    found.update(special_token_ids(tokenizer, CHAT_END_TOKENS))
    return frozenset(found)


def special_token_ids(tokenizer: Any, texts: Iterable[str]) -> frozenset[int]:
    """Return the ids of those texts that are special tokens of this tokenizer.

    Special tokens never appear in a completion's text, so a stop string that is one has to be found as a token.
    """
    wanted = set(texts)
    return frozenset(
        int(token_id)
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.special and token.content in wanted
    )


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    return [int(token_id) for token_id in ids]
