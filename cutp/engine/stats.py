"""What an engine has done since it was made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EngineStats:
    """Counters of one replica, equal on its ranks but for the times, which are this rank's.

    prompt_tokens: computed in chunks of more than one pending token, those of a recomputation included.
    generated_tokens: tokens that were sampled. cached_tokens: prompt tokens taken from the prefix cache.
    preemptions: how often a running request lost its pages and had to be computed again. schedule_seconds: host time
    spent on deciding what to run. step_seconds: the whole of the steps.
    """

    requests_added: int = 0
    requests_finished: int = 0
    requests_cancelled: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    schedule_seconds: float = 0.0
    step_seconds: float = 0.0

    def count_step(self, plan, schedule_seconds: float, step_seconds: float) -> None:
        """Adds one step of the scheduler's `plan`, once its chunks have been computed."""
        self.steps += 1
        self.preemptions += len(plan.preempted)
        for chunk in plan.chunks:
            count = chunk.stop - chunk.start
            if count > 1 or not chunk.request.generated:
                self.prompt_tokens += count
        self.cached_tokens += plan.cached_tokens
        self.schedule_seconds += schedule_seconds
        self.step_seconds += step_seconds
