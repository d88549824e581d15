"""A logits processor of others for both of vLLM's runners: it prefers tokens by a rule of its own, where asked to."""

from vllm.v1.sample.logits_processor import LogitsProcessor as OlderProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as NewerProcessor


class Prefer(OlderProcessor, NewerProcessor):
    """Adds the number ``extra_args["prefer"]`` to the logits of every third token."""

    def __init__(self, vllm_config, place, is_pin_memory=None):
        self.wanted = {}

    @classmethod
    def validate_params(cls, sampling_params):
        pass

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        if batch_update is None:
            return
        for index in batch_update.removed:
            self.wanted.pop(index, None)
        for index, sampling_params, _, _ in batch_update.added:
            self.wanted[index] = (sampling_params.extra_args or {}).get("prefer", 0)
        for source, target, direction in batch_update.moved:
            moved, met = self.wanted.pop(source, 0), self.wanted.pop(target, 0)
            self.wanted[target] = moved
            if direction.name == "SWAP":
                self.wanted[source] = met

    def add_request(self, req_idx, sampling_params):
        self.wanted[req_idx] = (sampling_params.extra_args or {}).get("prefer", 0)
        return bool(self.wanted[req_idx])

    def apply(self, logits, ctx=None):
        slots = range(len(logits)) if ctx is None else ctx.expanded_idx_mapping.tolist()
        for row, slot in enumerate(slots):
            if self.wanted.get(slot):
                logits[row, ::3] += self.wanted[slot]
        return logits
