"""What both sides of a comparison do: the same tokens, contexts and steps."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Workload:
    """Lengths in tokens.

    prompt_len:  of a prompt before decoding
    num_steps:   decoded after it
    prefill_len: of a long prompt
    """

    prompt_len: int = 16
    num_steps: int = 128
    prefill_len: int = 512

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.prefill_len, self.prompt_len + self.num_steps) + 1

    @property
    def prefill(self) -> str:
        """Metric of the long prompt."""
        return f"prefill {self.prefill_len}"

    @staticmethod
    def decode(num_sequences: int) -> str:
        """Metric of decoding ``num_sequences`` at a time."""
        return f"decode {num_sequences}"
