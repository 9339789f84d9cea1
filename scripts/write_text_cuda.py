"""Training text for the shipped drafter, as `dspark train` writes it but at a GPU's pace.

    python scripts/write_text_cuda.py --target FOLDER --out text.jsonl --tokens 20000000

Thousands of conversations are written in lockstep: every slot holds one, each step gives every slot
a token, and a CUDA graph replays the step. A prompt is fed token by token like an answer, and an
instruction's end becomes the beginning of its answer without leaving the slot. It knows Llama's
layers alone; `dspark train` writes with the engine, which knows every family.

Symbols: B slots, L positions of a slot, H query heads, G KV heads, D head width.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import rotate_half

from dspark.training.openings import OPENINGS
from dspark.training.text import (
    MIN_ANSWER_TOKENS,
    MIN_INSTRUCTION_TOKENS,
    Conversation,
    chat_template,
    until_it_repeats,
)

_HARVEST_EVERY = 16  # steps


class Slots:
    """B conversations that are being written."""

    def __init__(self, model: Any, slots: int, length: int, max_instruction: int) -> None:
        config, device = model.config, model.device
        self.slots, self.length, self.max_instruction = slots, length, max_instruction
        self._model, self._layers = model, model.model.layers
        self._heads, self._groups = config.num_attention_heads, config.num_key_value_heads
        self._width = config.hidden_size // config.num_attention_heads
        shape = (slots, self._groups, length, self._width)
        self._keys = [torch.zeros(shape, dtype=model.dtype, device=device) for _ in self._layers]
        self._values = [torch.zeros_like(keys) for keys in self._keys]
        self._cos, self._sin = (
            table[0]
            for table in model.model.rotary_emb(
                torch.zeros(1, dtype=model.dtype, device=device),
                torch.arange(length, device=device)[None],
            )
        )
        self._line = torch.arange(slots, device=device)
        whole = {"dtype": torch.int64, "device": device}
        self.tokens = torch.zeros(slots, length, **whole)
        self.at = torch.zeros(slots, **whole)  # the last token that is known
        self.given = torch.ones(slots, **whole)  # tokens before here are not drawn
        self.answering = torch.zeros(slots, dtype=torch.bool, device=device)
        self.begin = torch.zeros(slots, **whole)  # of the instruction; then of the answer
        self.temperature = torch.ones(slots, device=device)
        self.answer_temperature = torch.ones(slots, device=device)
        self.over = torch.ones(slots, dtype=torch.bool, device=device)
        self.end_token = torch.zeros(1, **whole)
        self.between = torch.zeros(0, **whole)  # template between instruction and answer
        self._graph: torch.cuda.CUDAGraph | None = None

    def step(self) -> None:
        """One token for every slot that is not over."""
        if self._graph is None:
            side = torch.cuda.Stream()
            with torch.cuda.stream(side):
                self._step()  # libraries set themselves up outside of the graph
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._step()
        self._graph.replay()

    def _step(self) -> None:
        sampled = self._sample(self._logits())
        after = (self.at + 1).clamp(max=self.length - 1)
        known = self.tokens[self._line, after]
        drawn = after >= self.given
        token = torch.where(drawn, sampled, known)
        self.tokens[self._line, after] = torch.where(self.over, known, token)
        ended = drawn & (token == self.end_token)
        turn = ended & ~self.answering & ~self.over
        for i in range(1, len(self.between)):
            place = (after + i).clamp(max=self.length - 1)
            kept = self.tokens[self._line, place]
            self.tokens[self._line, place] = torch.where(turn, self.between[i], kept)
        too_long = ~self.answering & ~turn & (after - self.begin >= self.max_instruction)
        full = after >= self.length - 1 - len(self.between)
        self.over |= (ended & self.answering) | too_long | full
        self.given.copy_(torch.where(turn, after + len(self.between), self.given))
        self.begin.copy_(torch.where(turn, after + len(self.between), self.begin))
        self.temperature.copy_(torch.where(turn, self.answer_temperature, self.temperature))
        self.answering |= turn
        self.at.copy_(torch.where(self.over, self.at, after))

    def _sample(self, logits: torch.Tensor) -> torch.Tensor:  # [B, V] -> [B]
        law = torch.softmax(logits.float() / self.temperature.clamp(min=1e-3)[:, None], dim=-1)
        race = torch.empty_like(law).exponential_()
        return torch.where(self.temperature > 0, (law / race).argmax(-1), logits.argmax(-1))

    def _logits(self) -> torch.Tensor:
        model, at = self._model, self.at
        x = F.embedding(self.tokens[self._line, at], model.model.embed_tokens.weight)
        cos, sin = self._cos[at][:, None], self._sin[at][:, None]
        seen = torch.arange(self.length, device=at.device) <= at[:, None]
        mask = torch.zeros_like(seen, dtype=x.dtype).masked_fill_(~seen, float("-inf"))
        fold = self._heads // self._groups
        mask = mask[:, None, None].expand(-1, 1, fold, -1)
        for layer, keys, values in zip(self._layers, self._keys, self._values, strict=True):
            attention = layer.self_attn
            y = layer.input_layernorm(x)
            q = _turn(attention.q_proj(y).view(self.slots, -1, self._width), cos, sin)
            k = _turn(attention.k_proj(y).view(self.slots, -1, self._width), cos, sin)
            keys[self._line, :, at] = k
            values[self._line, :, at] = attention.v_proj(y).view(self.slots, -1, self._width)
            # the query heads of a KV head are rows, so that its keys are read once
            out = F.scaled_dot_product_attention(
                q.view(self.slots, self._groups, fold, self._width), keys, values, attn_mask=mask
            )
            x = x + attention.o_proj(out.reshape(self.slots, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        logits: torch.Tensor = model.lm_head(model.model.norm(x))
        return logits


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:  # [B, H, D]
    return x * cos + rotate_half(x) * sin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True, help="folder of a Llama checkpoint")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=20_000_000, help="answer tokens")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--slots", type=int, default=2048)
    parser.add_argument("--length", type=int, default=640, help="tokens of a conversation, at most")
    parser.add_argument("--max-instruction", type=int, default=128)
    parser.add_argument("--opening-share", type=float, default=0.6)
    parser.add_argument("--instruction-temperature", type=float, nargs="+", default=[0.8, 1.0])
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.0, 0.7, 1.0, 1.0])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.target)
    model = AutoModelForCausalLM.from_pretrained(options.target, dtype=torch.bfloat16)
    model = model.to("cuda").eval().requires_grad_(False)
    before, between = chat_template(tokenizer)
    openings = [tokenizer.encode(text, add_special_tokens=False) for text in OPENINGS]
    rng = random.Random(options.seed)
    torch.manual_seed(options.seed)
    slots = Slots(model, options.slots, options.length, options.max_instruction)
    slots.end_token.fill_(tokenizer.eos_token_id)
    slots.between = torch.tensor(between, device="cuda")
    if between[0] != tokenizer.eos_token_id:
        sys.exit("the template does not end a user turn with the end-of-text token")

    seen: set[tuple[int, ...]] = set()
    done, started, steps = 0, time.monotonic(), 0
    with options.out.open("w") as out, torch.inference_mode():
        while done < options.tokens and time.monotonic() - started < options.seconds:
            over = slots.over.nonzero()[:, 0].cpu()
            for tokens, begin, at, answered, temperature in zip(
                slots.tokens[over].tolist(),
                slots.begin[over].tolist(),
                slots.at[over].tolist(),
                slots.answering[over].tolist(),
                slots.answer_temperature[over].tolist(),
                strict=True,
            ):
                prompt = tuple(tokens[:begin])
                answer = until_it_repeats(tokens[begin : at + 2])
                asked = begin - len(before) - len(between)
                if (
                    answered
                    and asked >= MIN_INSTRUCTION_TOKENS
                    and len(answer) >= MIN_ANSWER_TOKENS
                    and prompt not in seen
                ):
                    seen.add(prompt)
                    one = Conversation(prompt, tuple(answer), round(temperature, 3))
                    out.write(json.dumps(asdict(one)) + "\n")
                    done += len(answer)
            prompts = [
                before + (rng.choice(openings) if rng.random() < options.opening_share else [])
                for _ in over
            ]
            rows = torch.zeros(len(over), options.length, dtype=torch.int64)
            for row, prompt in zip(rows, prompts, strict=True):
                row[: len(prompt)] = torch.tensor(prompt)
            lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64).cuda()
            over = over.cuda()
            slots.tokens[over] = rows.cuda()
            slots.at[over] = 0
            slots.given[over] = lengths
            slots.begin[over] = len(before)
            slots.answering[over] = False
            first = torch.tensor(
                [rng.choice(options.instruction_temperature) for _ in prompts], dtype=torch.float32
            )
            then = torch.tensor(
                [rng.choice(options.temperature) for _ in prompts], dtype=torch.float32
            )
            slots.temperature[over], slots.answer_temperature[over] = first.cuda(), then.cuda()
            slots.over[over] = False
            for _ in range(_HARVEST_EVERY):
                slots.step()
            steps += _HARVEST_EVERY
            if steps % (50 * _HARVEST_EVERY) == 0:
                rate = done / (time.monotonic() - started)
                print(f"{steps} steps, {len(seen)} conversations, {done} tokens, {rate:.0f}/s")
    print(f"{len(seen)} conversations, {done} answer tokens, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
