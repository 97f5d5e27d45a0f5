"""The model of a transformers pipeline, on the device where the pipeline put it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..errors import WeightsError
from .base import Decoder, Part, context_within

if TYPE_CHECKING:
    import transformers


class PipelineDecoder(Decoder):
    """A causal language model of transformers with one KV cache.

    Args:
        pipeline: a text-generation pipeline. Its tokenizer and its generate() are not used.
        context_length: at most this many tokens; None for all that the model has.

    Raises:
        InvalidRequest: the context_length is more than the weights have.
        WeightsError: the weights do not say which ids end an answer.
    """

    engine = "transformers"
    slots = 1
    chunk = 256
    mixed = False
    # With four layers of Phi-3-mini in fp32 on two cores one token takes 108 ms, and each one more 7.
    cost = 0.1
    switch = 0

    def __init__(self, pipeline: "transformers.TextGenerationPipeline", *, context_length: int | None = None):
        import torch
        from transformers import DynamicCache

        # Without the config every layer keeps all its keys, so that rewinding works behind a sliding window too;
        # the model's own mask still hides what lies outside the window.
        self._new_cache = DynamicCache
        self._torch = torch
        self._model = pipeline.model.eval()
        own = self._model.config.max_position_embeddings
        self.context_length = self.capacity = context_within(context_length, own)
        eos = self._model.generation_config.eos_token_id
        if eos is None:
            eos = self._model.config.eos_token_id
        if eos is None:
            raise WeightsError(
                "the model's generation_config.json names no eos_token_id; add the ids that end an answer"
            )
        self.eos = frozenset(eos if isinstance(eos, list) else [eos])
        self._cache = self._new_cache()

    def step(self, parts: Mapping[int, Part]) -> Mapping[int, np.ndarray]:
        """See Decoder."""
        part, torch = parts[0], self._torch
        with torch.inference_mode():
            tokens = torch.tensor([list(part.ids)], device=self._model.device)
            wanted = max(1, part.logits)  # 0 would mean all
            output = self._model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=wanted)
        return {0: output.logits[0].float().cpu().numpy()} if part.logits else {}

    def rewind(self, slot: int, length: int) -> None:
        """See Decoder."""
        surplus = self._cache.get_seq_length() - length
        if length == 0:
            self._cache = self._new_cache()
        elif surplus > 0:
            self._cache.crop(-surplus)

    def close(self) -> None:
        """See Decoder."""
        del self._model, self._cache
