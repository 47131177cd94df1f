"""What makes two runs the same run: everything that can change a token, field by field.

`run_id` is the job's name and a short digest of the fingerprint and of the inputs' ETags: the same
job over the same files resumes, tonight's files make a new run.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from storage.errors import BadInput, FingerprintMismatch
from tasks.job import RunConfig

ENGINE_SEMANTICS = 2
"""Raised whenever the same settings may give other tokens than the last release gave."""

_PROMPT_FIELDS = (
    "prompt",
    "prompt_column",
    "messages_column",
    "tools_column",
    "id_column",
    "chat_template_kwargs",
    "on_overlong",
)
_RECORDED = (
    *("torch", "transformers", "tokenizers", "pyarrow", "prefect", "boto3", "accelerate"),
    *("deepspeed", "bitsandbytes"),
)


def fingerprint_fields(
    job: RunConfig, *, model_content_id: str, backend: str, max_model_len: int
) -> dict[str, Any]:
    """Return every setting that can change a token or the output schema, by dotted name.

    Raises:
        BadInput: the chat template cannot be read.
    """
    fields: dict[str, Any] = {
        "model.content_id": model_content_id,
        "model.dtype": job.model.dtype,
        "model.quantization": job.model.quantization,
        "engine.backend": backend,
        "engine.kv_cache_dtype": job.engine.kv_cache_dtype,
        "engine.max_model_len": max_model_len,
        "engine.tensor_parallel_size": job.engine.tensor_parallel_size,
        "engine.semantics": ENGINE_SEMANTICS,
        "input.chat_template": _template_identity(job.input.chat_template),
        "sampling_columns": job.sampling_columns,
        "output.columns": job.output.columns,
        "output.rename": job.output.rename,
        "output.token_ids": job.output.token_ids,
    }
    fields |= {f"input.{name}": getattr(job.input, name) for name in _PROMPT_FIELDS}
    fields |= {f"sampling.{k}": v for k, v in dataclasses.asdict(job.sampling.params()).items()}
    plain: dict[str, Any] = json.loads(json.dumps(fields, sort_keys=True))
    return plain


def fingerprint(fields: dict[str, Any]) -> str:
    """Name the fields by content."""
    return _digest(fields)


def default_run_id(name: str, fingerprint: str, etags: Iterable[str]) -> str:
    """Return the run id of this job over these input files."""
    return f"{name}-{_digest([fingerprint, *etags])[:10]}"


def check_fingerprint(place: str, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to mix runs.

    Raises:
        FingerprintMismatch: names each differing field with its stored and wanted value.
    """
    names = sorted(stored.keys() | wanted.keys())
    differing = [n for n in names if stored.get(n) != wanted.get(n)]
    if differing:
        shown = "; ".join(
            f"{n} was {_short(stored.get(n))}, now {_short(wanted.get(n))}" for n in differing[:5]
        )
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise FingerprintMismatch(
            f"{place} belongs to other settings: {shown}{more}; "
            "give another run_id or output.uri, or restore the settings"
        )


def versions() -> dict[str, str]:
    """Return the versions that a later reader may want to know."""
    found = {}
    for name in ("nightjar", *_RECORDED):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _template_identity(setting: str) -> str:
    if setting in ("auto", "none"):
        return setting
    try:
        text = Path(setting).read_bytes()
    except OSError as error:
        raise BadInput(
            f"input.chat_template: cannot read {setting}: {error.strerror}; give auto, none or a Jinja file"
        ) from None
    return "sha256:" + hashlib.sha256(text).hexdigest()


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
