"""A trial of a class without its weights: what its layers hand to attention, on the meta device.

The paged engine runs a class of transformers whose layers, numbered from 0, each attend once through
AttentionInterface, over all earlier tokens or a window of them, with heads of one size. Whoever does otherwise would
say so at the first step, or give other tokens than its own.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from inference.errors import EngineConfigError
from inference.model import PagedModel

_NUM_TOKENS = 2


def refuse_by_trial(model: Any) -> None:
    """Refuse a class whose layers do not attend as the paged engine needs it; the model is of no use afterwards.

    Args:
        model: from `empty_model`. A class that looks at values, as mixtures of experts do, is looked at as far
            as it runs without any.

    Raises:
        EngineConfigError: with the remedy.
    """
    trial = _Trial(model)
    model.to(
        "meta", torch.bfloat16
    )  # buffers too; products of experts have no other dtype without values
    try:
        trial.run()
    except EngineConfigError:
        raise
    except Exception:  # whatever a class makes of having no values
        return
    num_layers = trial.config.num_hidden_layers
    if trial.attended != list(range(num_layers)):
        trial.refuse(
            f"attends {len(trial.attended)} times in {num_layers} layers, not once in each in their order"
        )


class _Trial(PagedModel):
    """Notes who attends, instead of attending."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.attended: list[int] = []
        self._shape = self._kv_sizes()

    def _kv_sizes(self) -> tuple[int, int]:
        """Return KV heads and head dim."""
        try:
            shape = self.kv_shape(1)
        except RuntimeError:  # transformers' own, of a config whose layers differ
            self.refuse("has layers with heads of several sizes")
        return shape.num_kv_heads, shape.head_dim

    @torch.no_grad()
    def run(self) -> None:
        """Run two tokens through all layers. Raises EngineConfigError, and whatever comes of having no values."""
        ids = torch.zeros(1, _NUM_TOKENS, dtype=torch.long, device="meta")
        with FakeTensorMode(allow_non_fake_inputs=True):
            self._model.base_model(input_ids=ids, position_ids=ids, use_cache=False)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int
    ) -> Tensor:
        """Note the layer, and that its heads are those of the cache."""
        num_kv_heads, head_dim = self._shape
        wanted = [
            (1, self.num_heads, _NUM_TOKENS, head_dim),
            (1, num_kv_heads, _NUM_TOKENS, head_dim),
        ]
        if [tuple(q.shape), tuple(k.shape), tuple(v.shape)] != [wanted[0], wanted[1], wanted[1]]:
            self.refuse("attends with heads of other sizes than its config.json says")
        self.attended.append(layer)
        return q.transpose(1, 2)

    def refuse(self, found: str) -> NoReturn:
        """Raise EngineConfigError."""
        raise EngineConfigError(
            f"engine.backend is paged: {self.config.model_type} {found}; use transformers"
        )
