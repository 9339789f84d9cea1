"""`dspark.LLM`: verifier and drafter in this process, the same engines that the services run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

from dspark.config import DraftConfig, EngineConfig, ModelConfig
from dspark.engine.assembly import (
    LoadedTarget,
    load_draft_engine,
    load_target,
    make_verifier,
)
from dspark.engine.draft_link import DraftLink, LocalDraftLink
from dspark.engine.verifier import VerifierEngine
from dspark.models.tokenizer import load_tokenizer
from dspark.types import FinishReason, Request, SamplingParams, VerificationResult


@dataclass(slots=True)
class Generation:
    """What a request produced, and how."""

    prompt_token_ids: tuple[int, ...]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    drafted: int = 0
    verified: int = 0
    accepted: int = 0
    steps: int = 0  # target steps that emitted tokens
    accepted_lengths: list[int] = field(default_factory=list)  # draft tokens accepted, by step
    verified_lengths: list[int] = field(default_factory=list)
    confidences: list[tuple[float, ...]] = field(default_factory=list)  # of VerificationResult

    @property
    def accepted_length(self) -> float:
        """τ: tokens a step, the target's own included; the prompt's step does not count."""
        steps = self.steps - 1
        return (len(self.token_ids) - 1) / steps if steps > 0 else 0.0

    def add(self, result: VerificationResult) -> None:
        """Take in one step's result."""
        self.token_ids += result.token_ids
        self.finish_reason = result.finish_reason
        self.drafted += result.drafted
        self.verified += result.verified
        self.accepted += result.accepted
        self.steps += 1
        self.accepted_lengths.append(result.accepted)
        self.verified_lengths.append(result.verified)
        self.confidences.append(result.confidences)


class LLM:
    """Text in, text out, losslessly accelerated.

    >>> llm = LLM("smollm2-135m")
    >>> llm.generate(["What is a prime number?"])[0].text
    """

    def __init__(
        self,
        target: str = "smollm2-135m",
        drafter: str = "",
        *,
        dtype: str = "bfloat16",
        device: str = "cpu",
        tensor_parallel: int = 1,
        engine: EngineConfig | None = None,
        make_link: Callable[[LoadedTarget], DraftLink] | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Loads the target, and its drafter unless `make_link` leads to one elsewhere.

        `tensor_parallel`: how many processes, with a GPU each on cuda, share the target.
        """
        model = ModelConfig(
            target=target,
            drafter=drafter,
            dtype=dtype,
            device=device,
            tensor_parallel=tensor_parallel,
        )
        self.tokenizer: Any = load_tokenizer(target)
        self._loaded = load_target(model)
        self._link: DraftLink | None = None
        if self._loaded.has_drafter and make_link is not None:
            self._link = make_link(self._loaded)
        elif self._loaded.has_drafter:
            self._link = LocalDraftLink(
                load_draft_engine(model, DraftConfig(), self._loaded.target)
            )
        self.verifier: VerifierEngine = make_verifier(
            self._loaded, engine or EngineConfig(), self._link, on_progress
        )

    @property
    def speculative(self) -> bool:
        """Whether there is anything to draft with."""
        return self.verifier.drafts

    @property
    def block_size(self) -> int:
        """γ, the draft tokens of a block as they are drafted here."""
        return self.verifier.block_size

    @property
    def own_block_size(self) -> int:
        """γ of the drafter itself; 0 where it has none."""
        return self._loaded.block_size

    @property
    def drafter_fingerprint(self) -> str:
        """Names the drafter's exact weights; empty where it has none."""
        return self._loaded.drafter_fingerprint

    def chat_prompt(self, text: str) -> tuple[int, ...]:
        """Token ids of a single user turn, ready for the answer."""
        encoded = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )
        return tuple(encoded["input_ids"])

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[Generation]:
        """Answer all prompts (user turns, or token ids as they are), batched, in order."""
        token_ids = [
            self.chat_prompt(prompt) if isinstance(prompt, str) else tuple(prompt)
            for prompt in prompts
        ]
        if sampling is None:
            sampling = SamplingParams()
        if isinstance(sampling, SamplingParams):
            sampling = [replace(sampling, seed=sampling.seed + i) for i in range(len(token_ids))]
        out = [Generation(ids) for ids in token_ids]
        for index, result in self._stream(token_ids, sampling):
            out[index].add(result)
        for generation in out:
            generation.text = self.tokenizer.decode(generation.token_ids, skip_special_tokens=True)
        return out

    def _stream(
        self, prompts: Sequence[tuple[int, ...]], sampling: Sequence[SamplingParams]
    ) -> Iterator[tuple[int, VerificationResult]]:
        batch = uuid4().hex
        index_of = {f"{batch}-{i}": i for i in range(len(prompts))}
        queue = [Request(name, prompts[i], sampling[i]) for name, i in reversed(index_of.items())]
        # The waiting room is bounded; more prompts than it holds wait here instead.
        while queue or self.verifier.has_work:
            while queue and self.verifier.load[1] < self.verifier.config.max_waiting:
                self.verifier.add(queue.pop())
            for result in self.verifier.step():
                yield index_of[result.request_id], result
