"""LLM: the engine on its own, for a notebook or a script. No job file, no store.

from inference import LLM, SamplingParams

llm = LLM("models/smollm2")
for completion in llm.generate(["The capital of France is"], SamplingParams(max_tokens=8)):
    print(completion.text)
"""

import operator
import threading
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from inference.backends import Backend, create_backend
from inference.backends.checks import check_sequence
from inference.chat import to_messages
from inference.config import EngineConfig
from inference.errors import PromptError
from inference.model_config import vocab_size_of
from inference.prompt import check_text, unknown_token
from inference.sampling import SamplingParams, draw_seed
from inference.sequence import Completion, Sequence

Messages = Seq[Mapping[str, Any]]
"""One conversation: messages with `role` and `content`."""

SUBMITTED_AT_ONCE = 1024
"""Sequences, of the greatest length too, that one message to rank processes holds."""

Sampling = SamplingParams | Seq[SamplingParams] | None


class LLM:
    """One model, ready to generate. Close it, or use it in a `with` block, to free the device.

    Threads may share one: their calls take turns. A call that is interrupted, by Ctrl-C or by an engine that
    breaks, takes the engine with it; the next call loads the model again.
    """

    def __init__(self, model: str | Path, **engine_kwargs: Any) -> None:
        """Load the model in a local folder; keyword arguments are the fields of `EngineConfig`.

        Raises:
            ModelError: the model folder is unusable.
            EngineConfigError: the settings cannot work on this model or machine.
            TypeError: there is no such field.
        """
        if not isinstance(model, (str, Path)):
            raise TypeError(f"model is a {type(model).__name__}; give the path of a model folder")
        self._config = EngineConfig(model=str(model), **engine_kwargs)
        self._turn = threading.RLock()
        self._is_closed = False
        # First, because it has kernels compiled while transformers is imported, which the tokenizer needs.
        self._backend: Backend | None = create_backend(self._config)
        try:
            self.tokenizer, self._vocab_size = _load_tokenizer(self._config)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def backend(self) -> Backend:
        """The engine. Raises RuntimeError once closed."""
        if self._is_closed:
            raise RuntimeError("this LLM is closed; make another one")
        if self._backend is None:
            self._backend = create_backend(self._config)
        return self._backend

    def generate(
        self, prompts: str | Iterable[str] | Iterable[Seq[int]], sampling_params: Sampling = None
    ) -> list[Completion]:
        """Return `n` completions per prompt, in the prompts' order, then in the samples'.

        Args:
            prompts: one text, or texts, or token ids; texts get the tokenizer's own special tokens.
            sampling_params: for all prompts, or one per prompt; default: greedy.

        A prompt that cannot be run (empty, too long) gets completions with finish_reason `error`. Random
        draws follow the seed, the prompt's place in the list and the sample: the same call draws the same.

        Raises:
            TypeError, ValueError: an argument is of another kind; nothing was run.
            InferenceError: the engine broke.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        elif isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Iterable):
            raise TypeError(
                f"prompts is a {type(prompts).__name__}; give texts or lists of token ids"
            )
        return self._run([self._encoded(*item) for item in enumerate(prompts)], sampling_params)

    def chat(
        self,
        messages: Messages | Iterable[Messages],
        sampling_params: Sampling = None,
        **chat_template_kwargs: Any,
    ) -> list[Completion]:
        """Like `generate`, for one conversation or a list of them, through the model's chat template."""
        if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
            raise TypeError(
                f"messages is a {type(messages).__name__}; give a list such as "
                "[{'role': 'user', 'content': 'Hello'}], or use generate with whole prompts"
            )
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("the model has no chat template; use generate with whole prompts")
        conversations: list[Any] = list(messages)
        if conversations and isinstance(conversations[0], Mapping):
            conversations = [conversations]
        prompts = [self._rendered(messages, chat_template_kwargs) for messages in conversations]
        return self._run(prompts, sampling_params)

    def close(self) -> None:
        """Free the device, after the call under way. Safe to repeat."""
        with self._turn:
            self._is_closed = True
            self._drop_backend()

    def _run(self, prompts: list[list[int] | PromptError], sampling: Sampling) -> list[Completion]:
        params = _one_each(sampling, len(prompts))
        with self._turn:
            backend = self.backend
            try:
                return _run(backend, prompts, params)
            except BaseException:
                # What it still holds is nobody's now, and would come back among the next call's.
                self._drop_backend()
                raise

    def _drop_backend(self) -> None:
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def _encoded(self, index: int, prompt: object) -> list[int] | PromptError:
        if isinstance(prompt, str):
            try:
                return self._known(list(self.tokenizer.encode(check_text(prompt))))
            except PromptError as error:
                return error
        try:
            if isinstance(prompt, bytes):
                raise TypeError
            token_ids = [operator.index(token_id) for token_id in prompt]  # type: ignore[attr-defined]
        except TypeError:
            raise TypeError(
                f"prompts[{index}] is a {type(prompt).__name__}; give texts, or lists of token ids, "
                "one such prompt as [[1, 2, 3]]"
            ) from None
        return self._known(token_ids)

    def _rendered(self, messages: object, kwargs: dict[str, Any]) -> list[int] | PromptError:
        try:
            plain = to_messages([dict(m) if isinstance(m, Mapping) else m for m in messages])  # type: ignore[attr-defined]
            text = self.tokenizer.apply_chat_template(
                plain, tokenize=False, add_generation_prompt=True, **kwargs
            )
            # The template writes the special tokens it wants; a second BOS would change the answer.
            return self._known(
                list(self.tokenizer.encode(check_text(text), add_special_tokens=False))
            )
        except PromptError as error:
            return error
        except Exception as error:  # a template may raise anything
            name = type(error).__name__
            return PromptError("invalid_input", f"the chat template refuses the messages ({name})")

    def _known(self, token_ids: list[int]) -> list[int] | PromptError:
        """Refuse tokens the model has no embedding for: one would break every sequence beside it."""
        size = self._vocab_size
        if size is None or not token_ids or (min(token_ids) >= 0 and max(token_ids) < size):
            return token_ids
        return PromptError("invalid_input", unknown_token(token_ids, size))


def _run(
    backend: Backend, prompts: Seq[list[int] | PromptError], params: Seq[SamplingParams]
) -> list[Completion]:
    found: dict[int, Completion] = {}
    accepted: list[Sequence] = []
    seq_id = 0
    for index, (prompt, sampling) in enumerate(zip(prompts, params, strict=True)):
        for sample_index in range(sampling.n):
            try:
                if isinstance(prompt, PromptError):
                    raise prompt
                seed = draw_seed(sampling.seed, index, sample_index)
                sequence = Sequence(seq_id, prompt, sampling, seed)
                check_sequence(sequence, (), backend.info.max_model_len)
                accepted.append(sequence)
            except (PromptError, ValueError) as error:
                found[seq_id] = Completion(seq_id, (), "", "error", str(error))
            seq_id += 1
    for start in range(0, len(accepted), SUBMITTED_AT_ONCE):
        backend.submit(accepted[start : start + SUBMITTED_AT_ONCE])
    while backend.num_unfinished:
        for completion in backend.step():
            found[completion.seq_id] = completion
    return [found[i] for i in range(seq_id)]


def _one_each(sampling: Sampling, count: int) -> Seq[SamplingParams]:
    """Return one of them per prompt. Raises TypeError, ValueError."""
    if sampling is None:
        sampling = SamplingParams()
    if isinstance(sampling, SamplingParams):
        return [sampling] * count
    if isinstance(sampling, Mapping) or not all(isinstance(s, SamplingParams) for s in sampling):
        raise TypeError(
            f"sampling_params is a {type(sampling).__name__}; give SamplingParams(...), or a list of "
            "one for each prompt"
        )
    if len(sampling) != count:
        raise ValueError(f"{len(sampling)} sampling_params for {count} prompts; give one each")
    return sampling


def _load_tokenizer(config: EngineConfig) -> tuple[Any, int | None]:
    """Return the tokenizer, and how many tokens the model has, if it says so."""
    if config.backend == "dummy":
        from inference.backends.dummy_tokenizer import DummyTokenizer

        return DummyTokenizer(), DummyTokenizer.vocab_size
    from inference.loading import load_tokenizer
    from inference.weights import check_model_folder

    folder = check_model_folder(config.model, config.allowed_code)
    return load_tokenizer(folder), vocab_size_of(folder.config)
