"""One request while the engine works on it. Every rank holds an equal copy."""

from __future__ import annotations

from dataclasses import dataclass, field

from cutp.engine.outputs import GenerationOutput, ScoreOutput, TokenLogprobs
from cutp.engine.sampling_params import SamplingParams
from cutp.engine.text_stream import TextStream


@dataclass(eq=False)
class Request:
    """Tokens in, tokens out.

    max_total: tokens the request may reach, prompt included; fixed at admission, it also fixes the rotary table where
    that depends on the length. params is None for a request that is only scored.
    """

    index: int
    prompt: str | None
    prompt_token_ids: list[int]
    max_total: int
    params: SamplingParams | None = None
    end_token_ids: frozenset[int] = frozenset()
    text_stream: TextStream | None = None
    generated: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=lambda: [None])
    cached: int = 0
    pages: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def is_score(self) -> bool:
        return self.params is None

    @property
    def length(self) -> int:
        """Tokens known so far, prompt and generated."""
        return len(self.prompt_token_ids) + len(self.generated)

    @property
    def pending(self) -> int:
        """Tokens whose keys and values are not in the cache yet."""
        return self.length - self.cached

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens start .. stop - 1 of prompt and generated tokens."""
        border = len(self.prompt_token_ids)
        if stop <= border:
            return self.prompt_token_ids[start:stop]
        return self.prompt_token_ids[start:] + self.generated[max(0, start - border) : stop - border]

    def append(self, token_id: int) -> str:
        """Takes a sampled token, sets `finish_reason` when it ends the request, returns the text that is certain."""
        self.generated.append(token_id)
        piece = ""
        if token_id in self.end_token_ids:
            self.finish_reason = "stop"
        else:
            if self.text_stream is not None:
                piece = self.text_stream.push(token_id)
                if self.text_stream.stopped:
                    self.finish_reason = "stop"
            if self.finish_reason is None and self.length >= self.max_total:
                self.finish_reason = "length"
        if self.finish_reason is not None and self.text_stream is not None:
            piece += self.text_stream.finish()
            if self.text_stream.stopped:
                self.finish_reason = "stop"
        return piece

    def generation_output(self) -> GenerationOutput:
        return GenerationOutput(
            index=self.index,
            prompt=self.prompt,
            prompt_token_ids=tuple(self.prompt_token_ids),
            token_ids=tuple(self.generated),
            text=None if self.text_stream is None else self.text_stream.text,
            finish_reason=self.finish_reason,
            seed=self.params.seed,
            logprobs=None if self.params.logprobs is None else tuple(self.logprobs),
        )

    def score_output(self) -> ScoreOutput:
        return ScoreOutput(self.index, tuple(self.prompt_token_ids), tuple(self.prompt_logprobs))
