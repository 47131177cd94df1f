"""LLM: the engine on its own, for a notebook or a script. No job file, no store.

from inference import LLM, SamplingParams

llm = LLM("models/smollm2")
for completion in llm.generate(["The capital of France is"], SamplingParams(max_tokens=8)):
    print(completion.text)
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from types import TracebackType
from typing import Any, Self

from inference.backends import create_backend, resolve_backend
from inference.config import EngineConfig
from inference.sampling import SamplingParams, draw_seed
from inference.sequence import Completion, Sequence

Messages = Seq[Mapping[str, Any]]
"""One conversation: messages with `role` and `content`."""


class LLM:
    """One model, ready to generate. Close it, or use it in a `with` block, to free the device."""

    def __init__(self, model: str, **engine_kwargs: Any) -> None:
        """Load the model; keyword arguments are the fields of `EngineConfig`.

        Raises:
            ModelError: the model folder is unusable.
            EngineConfigError: the settings cannot work on this model or machine.
            TypeError: there is no such field.
        """
        config = EngineConfig(model=model, **engine_kwargs)
        self.backend = create_backend(config)
        # The backend's own, where it decodes with one.
        self.tokenizer = getattr(self.backend, "tokenizer", None) or _load_tokenizer(config)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def generate(
        self,
        prompts: str | Seq[str] | Seq[Seq[int]],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Return `n` completions per prompt, in the prompts' order, then in the samples'.

        Args:
            prompts: one text, or texts, or token ids; texts get the tokenizer's own special tokens.
            sampling_params: for all prompts, or one per prompt; default: greedy.

        A prompt that cannot be run (empty, too long) gets completions with finish_reason `error`. Random
        draws follow the seed, the prompt's place in the list and the sample: the same call draws the same.
        """
        if isinstance(prompts, str):
            prompts = [prompts]
        return self._run([self._encode(prompt) for prompt in prompts], sampling_params)

    def chat(
        self,
        messages: Messages | Seq[Messages],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        **chat_template_kwargs: Any,
    ) -> list[Completion]:
        """Like `generate`, for one conversation or a list of them, through the model's chat template."""
        conversations: Any = (
            [messages] if messages and isinstance(messages[0], Mapping) else messages
        )
        prompts = [
            self._render(conversation, chat_template_kwargs) for conversation in conversations
        ]
        return self._run(prompts, sampling_params)

    def close(self) -> None:
        """Free the device. Safe to repeat."""
        self.backend.close()

    def _run(
        self,
        prompts: list[list[int]],
        sampling_params: SamplingParams | Seq[SamplingParams] | None,
    ) -> list[Completion]:
        if sampling_params is None:
            sampling_params = SamplingParams()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise ValueError(
                f"{len(sampling_params)} sampling_params for {len(prompts)} prompts; give one each"
            )
        found: dict[int, Completion] = {}
        seq_id = 0
        for index, (token_ids, sampling) in enumerate(zip(prompts, sampling_params, strict=True)):
            for sample_index in range(sampling.n):
                seed = draw_seed(sampling.seed, index, sample_index)
                try:
                    self.backend.submit([Sequence(seq_id, token_ids, sampling, seed)])
                except ValueError as error:
                    found[seq_id] = Completion(seq_id, (), "", "error", str(error))
                seq_id += 1
        while self.backend.num_unfinished:
            for completion in self.backend.step():
                found[completion.seq_id] = completion
        return [found[i] for i in range(seq_id)]

    def _encode(self, prompt: str | Seq[int]) -> list[int]:
        return list(self.tokenizer.encode(prompt)) if isinstance(prompt, str) else list(prompt)

    def _render(self, messages: Messages, kwargs: dict[str, Any]) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("the model has no chat template; use generate with whole prompts")
        text = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True, **kwargs
        )
        # The template writes the special tokens it wants; a second BOS would change the answer.
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def _load_tokenizer(config: EngineConfig) -> Any:
    if resolve_backend(config.backend) == "dummy":
        from inference.backends.dummy_tokenizer import DummyTokenizer

        return DummyTokenizer()
    from inference.loading import load_tokenizer
    from inference.weights import check_model_folder

    return load_tokenizer(check_model_folder(config.model))
