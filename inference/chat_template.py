"""The chat template in force, and the tokenizer it comes with. No code from a model folder is run."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.backends.dummy_tokenizer import DUMMY_MODEL_DIR, DummyTokenizer
from inference.errors import EngineConfigError, ModelError
from inference.weights import refuse_code

# Arguments of the template call that are not the job's to set.
_RESERVED = frozenset(
    {
        "conversation",
        "messages",
        "tools",
        "chat_template",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "sanitize_control_tokens",
    }
)


class RowLimit(BaseException):
    """Raised into a render by a caller's timer; passes through whatever a template may catch."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The chat template in force, or none."""

    source: str | None
    """Its text (of all variants, where a tokenizer names several)."""

    override: str | None
    """What the job gave instead of the model's own."""

    def describe(self, error: Exception) -> str:
        """Say which kind of error; its text only when the template's author wrote it."""
        said = str(error).splitlines()[0] if str(error) else ""
        detail = f": {said}" if said and said in (self.source or "") else ""
        return f"the chat template refuses this row ({type(error).__name__}){detail}"

    def warnings(self, kwargs: Mapping[str, Any]) -> list[str]:
        """Name the switches that do nothing, and what makes prompts differ between days."""
        if self.source is None:
            unused = ["input.chat_template_kwargs has no effect: input.chat_template is none"]
            return unused if kwargs else []
        known = _variables(self.source) | {"add_generation_prompt"}
        found = [
            f"input.chat_template_kwargs.{name} has no effect: the chat template never reads it"
            for name in kwargs
            if name not in known
        ]
        if "strftime_now" in self.source and "date_string" not in kwargs:
            found.append("the chat template writes today's date, so prompts differ from day to day")
        return found


def choose_template(
    tokenizer: Any, model_dir: Path, *, choice: str, kwargs: Mapping[str, Any], has_messages: bool
) -> ChatTemplate:
    """Settle which chat template is in force.

    Raises:
        EngineConfigError: there is none, it cannot be read, or the keyword arguments are reserved.
    """
    if choice == "none":
        if has_messages:
            raise EngineConfigError(
                "input.chat_template is none, but the input has messages; set it to auto or to a "
                "Jinja file, or give prompts as text"
            )
        return ChatTemplate(None, None)
    reserved = sorted(_RESERVED & kwargs.keys())
    if reserved:
        raise EngineConfigError(f"input.chat_template_kwargs must not set {', '.join(reserved)}")
    if choice != "auto":
        text = _read_template(choice)
        return ChatTemplate(text, text)
    own = tokenizer.chat_template
    if not own:
        raise EngineConfigError(
            f"the model in {model_dir} has no chat template; set input.chat_template to a Jinja "
            "file, or to none to send prompts as they are"
        )
    return ChatTemplate("\n".join(own.values()) if isinstance(own, dict) else own, None)


def _read_template(choice: str) -> str:
    if "{{" in choice or "{%" in choice:
        return choice
    try:
        return Path(choice).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EngineConfigError(
            f"input.chat_template: cannot read {choice}: {error}; give auto, none or a Jinja file"
        ) from None


def _variables(source: str) -> set[str]:
    """Return the names a template reads from its caller; every word, where it cannot be parsed."""
    from jinja2 import meta
    from jinja2.exceptions import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return meta.find_undeclared_variables(environment.parse(source))
    except TemplateSyntaxError:  # transformers' own tags
        return set(re.findall(r"\w+", source))


def load_tokenizer(model_dir: Path, allowed_code: Collection[str] = ()) -> Any:
    """Load a model folder's tokenizer without running any code from it.

    Raises:
        ModelError: there is none, it is broken, or it wants its own Python code.
    """
    if model_dir == DUMMY_MODEL_DIR:
        return DummyTokenizer()
    if not model_dir.is_dir():
        raise ModelError(f"model folder {model_dir} does not exist")
    refuse_code(model_dir / "tokenizer_config.json", allowed_code)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(model_dir), trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # whatever transformers makes of a broken folder
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"no usable tokenizer in {model_dir}: {reason}") from error
