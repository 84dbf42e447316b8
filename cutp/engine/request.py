"""One sequence while the engine works on it. Every rank of a replica holds an equal copy."""

from __future__ import annotations

from dataclasses import dataclass, field

from cutp.engine.outputs import GenerationOutput, TokenLogprobs
from cutp.engine.prompt_wishes import PromptScores, PromptStates
from cutp.engine.sampling_params import SamplingParams
from cutp.engine.text_stream import TextStream

UNKNOWN = -1


@dataclass(eq=False)
class Request:
    """Tokens in, tokens out. A prompt with n samples is n requests, which share the prompt's pages.

    id: grows with the order of arrival, which is the order of service. key: what the caller calls the prompt.
    max_total: tokens the request may reach, prompt included; it also fixes the rotary table where that depends on the
    length. params: None for a request that generates nothing. scores, states: what is wanted of the prompt's own
    tokens. share_prefix: whether pages of equal prompts may be shared (not where the rotary table depends on the
    request). cache_salt: requests share pages only under equal salts.

    While it runs: ahead, whether the last generated token is UNKNOWN, as the step that draws it has only been started;
    cached, the tokens whose keys and values lie in its pages; slot, its row in the block tables and in the sampler's
    arrays.
    """

    id: int
    key: int | str
    prompt: str | None
    prompt_token_ids: list[int]
    max_total: int
    params: SamplingParams | None = None
    sample_index: int = 0
    end_token_ids: frozenset[int] = frozenset()
    text_stream: TextStream | None = None
    scores: PromptScores | None = None
    states: PromptStates | None = None
    share_prefix: bool = True
    cache_salt: bytes = b""
    generated: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    ahead: bool = False
    cached: int = 0
    pages: list[int] = field(default_factory=list)
    slot: int | None = None
    finish_reason: str | None = None

    @property
    def length(self) -> int:
        """Tokens known so far, prompt and generated."""
        return len(self.prompt_token_ids) + len(self.generated)

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not in the cache yet."""
        return len(self.prompt_token_ids) + len(self.generated) - self.cached

    @property
    def needed_from(self) -> int:
        """The first token whose hidden state is still needed; the ones before may come from the prefix cache."""
        first = self.length - 1
        for wish in (self.scores, self.states):
            if wish is not None:
                first = min(first, wish.next_position)
        return first

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens start .. stop - 1 of prompt and generated tokens."""
        border = len(self.prompt_token_ids)
        if stop <= border:
            return self.prompt_token_ids[start:stop]
        if start >= border:
            return self.generated[start - border : stop - border]
        return self.prompt_token_ids[start:] + self.generated[: stop - border]

    def expect(self) -> None:
        """Makes room for a token that is being drawn; `append` or `forget` follows."""
        self.generated.append(UNKNOWN)
        self.ahead = True

    def forget(self) -> None:
        """Takes back `expect`, if there was one."""
        if self.ahead:
            self.generated.pop()
            self.ahead = False

    def append(self, token_id: int) -> str:
        """Takes a sampled token, sets `finish_reason` when it ends the request, returns the text that is certain."""
        self.forget()
        self.generated.append(token_id)
        piece = ""
        if token_id in self.end_token_ids:
            self.finish_reason = "stop"
        else:
            if self.text_stream is not None:
                piece = self.text_stream.push(token_id, watch=len(self.generated) >= self.params.min_tokens)
                if self.text_stream.stopped:
                    self.finish_reason = "stop"
            if self.finish_reason is None and self.length >= self.max_total:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            piece += self._flush()
        return piece

    def cancel(self) -> str:
        """Ends the request where it is; returns the text that was held back."""
        self.forget()
        self.finish_reason = "cancelled"
        return self._flush(cancelled=True)

    def _flush(self, cancelled: bool = False) -> str:
        if self.text_stream is None:
            return ""
        piece = self.text_stream.finish()
        if self.text_stream.stopped and not cancelled:
            self.finish_reason = "stop"
        return piece

    def generation_output(self) -> GenerationOutput:
        prompt_logprobs = None
        if self.params.prompt_logprobs is not None and self.scores is not None:
            prompt_logprobs = (None, *self.scores.entries)
        return GenerationOutput(
            index=self.key,
            prompt=self.prompt,
            prompt_token_ids=tuple(self.prompt_token_ids),
            token_ids=tuple(self.generated),
            text=None if self.text_stream is None else self.text_stream.text,
            finish_reason=self.finish_reason,
            seed=self.params.seed,
            logprobs=None if self.params.logprobs is None else tuple(self.logprobs),
            sample_index=self.sample_index,
            prompt_logprobs=prompt_logprobs,
        )
