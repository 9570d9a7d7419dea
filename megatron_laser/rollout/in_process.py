"""The in-process engine: transformers underneath, batched, with a KV cache, for models that fit one device.

It samples from fp32 log-softmax of logits / temperature and returns exactly those log-probs, or, with `top_k`, those
among the tokens that it sampled from. Each prompt is
prefilled once and its cache repeated for its samples, and what all prompts of a batch begin with (a system prompt,
worked examples) is prefilled once for all of them; finished rows leave the batch. A response that ends in
a stop token stays for one more position when a score is asked for: that forward's log-prob of the score token
is the self-reward's input.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from transformers import DynamicCache

from megatron_laser.algorithms.numerics import log_probs
from megatron_laser.batching.shared_prompts import common_beginning
from megatron_laser.rollout.drawing import SetRecord, draw, narrowed
from megatron_laser.rollout.engine import StopEarly, StoppedEarly
from megatron_laser.rollout.folder_names import folder_tensors
from megatron_laser.rollout.hf_model import RoutingRecorder, load_model, new_cache, random_model
from megatron_laser.rollout.routed_experts import Routed
from megatron_laser.types import Generation, SamplingParams

# Rows that are done leave the batch once they make up this share of it.
_COMPACT_SHARE = 0.25


class InProcessEngine:
    """A `RolloutEngine` over `AutoModelForCausalLM`."""

    def __init__(
        self,
        model_path: str | Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_batch_size: int = 256,
        made_up: bool = False,
    ) -> None:
        """Load the folder's weights, or make some up until the first sync; raises as `load_model` does."""
        self._model = (random_model if made_up else load_model)(model_path, dtype, device)
        self._parameters = folder_tensors(self._model)
        self._device = device
        self._max_batch_size = max_batch_size
        self._vocab_size: int = self._model.config.vocab_size
        self._max_positions: int = self._model.config.max_position_embeddings
        self._version = 0
        self.shares_beginnings = True
        """Whether what a batch's prompts begin with alike is computed once."""

    @property
    def version(self) -> int:
        """Version of the current weights."""
        return self._version

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        deadline: float,
        on_finished: Callable[[int, int, Generation], None] | None = None,
        stop: StopEarly | None = None,
    ) -> list[list[Generation]]:
        """See `RolloutEngine.generate`. Repeatable: equal prompts, sampling and weights give equal responses."""
        self._check(prompts, sampling.max_new_tokens)
        if sampling.score_token_id is not None:
            self._check_score_token(sampling.score_token_id)
        ends = time.monotonic() + deadline
        seed = sampling.seed if sampling.seed is not None else int(torch.randint(2**62, ()))
        generator = torch.Generator(self._device).manual_seed(seed)
        samples = sampling.samples_per_prompt
        results: list[list[Generation]] = []
        per_batch = max(1, self._max_batch_size // samples)
        with ExitStack() as stack:
            recorder = None
            if sampling.routing is not None:
                recorder = stack.enter_context(closing(RoutingRecorder(self._model, sampling.routing)))
            for start in range(0, len(prompts), per_batch):
                part = prompts[start : start + per_batch]
                batch = _Batch(self, part, sampling, generator, ends, stop, recorder)
                for index, generation in batch.run():
                    if on_finished is not None:
                        on_finished(start + index // samples, index % samples, generation)
                results += [batch.done[i : i + samples] for i in range(0, len(batch.done), samples)]
        return results

    def score(self, sequences: Sequence[Sequence[int]], token_id: int, *, deadline: float) -> list[float]:
        """See `RolloutEngine.score`."""
        return [row[0] for row in self.score_tokens(sequences, (token_id,), deadline=deadline)]

    @torch.inference_mode()
    def score_tokens(
        self, sequences: Sequence[Sequence[int]], token_ids: Sequence[int], *, deadline: float
    ) -> list[list[float]]:
        """See `token_scores.ScoresTokens`."""
        self._check(sequences, 0)
        for token_id in token_ids:
            self._check_score_token(token_id)
        ends = time.monotonic() + deadline
        scores: list[list[float]] = [[]] * len(sequences)
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))  # less padding
        for start in range(0, len(order), self._max_batch_size):
            if time.monotonic() > ends:
                raise TimeoutError(f"scored {start} of {len(sequences)} sequences in {deadline:g} s")
            chunk = order[start : start + self._max_batch_size]
            logits, _ = self.prefill([sequences[i] for i in chunk], None)
            for i, row in zip(chunk, log_probs(logits)[:, list(token_ids)].tolist()):
                scores[i] = row
        return scores

    @torch.no_grad()
    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """See `RolloutEngine.update_weights`. Raises KeyError on unknown or missing names, ValueError on shapes."""
        missing = set(self._parameters)
        for name, tensor in weights:
            if name not in self._parameters:
                raise KeyError(f"weight sync to version {version}: the engine has no parameter {name!r}")
            parameter = self._parameters[name]
            if tensor.shape != parameter.shape:  # copy_ would broadcast a smaller one
                raise ValueError(
                    f"weight sync to version {version}: {name} is {tuple(tensor.shape)}, "
                    f"the engine's is {tuple(parameter.shape)}"
                )
            parameter.copy_(tensor)
            missing.discard(name)
        if missing:
            raise KeyError(f"weight sync to version {version}: the stream lacked {sorted(missing)[:5]}")
        self._version = version

    def named_parameters(self) -> dict[str, torch.Tensor]:
        """The weights that the next call will use."""
        return self._parameters

    def close(self) -> None:
        """Nothing runs outside this process."""
        self._parameters = {}

    def prefill(
        self, prompts: Sequence[Sequence[int]], cache: DynamicCache | None, *, common: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded forward: last logits [prompts, vocab], and the mask [prompts, width] of real tokens.

        The first `common` tokens, which all prompts share, go through the model once; a cache has to take them.
        Padding stands behind them.
        """
        if common and cache is not None:
            ids = torch.as_tensor(prompts[0][:common], dtype=torch.int64, device=self._device)
            self._model(input_ids=ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(len(prompts))
        width = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), width - common, dtype=torch.int64)
        mask = torch.ones(len(prompts), width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            padding = width - len(prompt)
            ids[row, padding:] = torch.as_tensor(prompt[common:])
            mask[row, common : common + padding] = 0
        mask = mask.to(self._device)
        output = self._model(
            input_ids=ids.to(self._device),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, common:],
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=1,
        )
        return output.logits[:, -1], mask

    def decode(
        self, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        """One position for every row: logits [rows, vocab]."""
        return self._model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=positions[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]

    def _check_score_token(self, token_id: int) -> None:
        if not 0 <= token_id < self._vocab_size:
            raise ValueError(f"score token id {token_id} is outside the vocabulary of {self._vocab_size}")

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {index} is empty")
            if min(prompt) < 0 or max(prompt) >= self._vocab_size:
                raise ValueError(
                    f"prompt {index} has a token id outside the vocabulary of {self._vocab_size}"
                )
            if len(prompt) + max_new_tokens > self._max_positions:
                raise ValueError(
                    f"prompt {index} has {len(prompt)} tokens; with rollout.max_new_tokens {max_new_tokens} that "
                    f"passes the model's max_position_embeddings {self._max_positions}"
                )


class _Batch:
    """The sampling state of one batch: rows are (prompt, sample) pairs that are still running."""

    def __init__(
        self,
        engine: InProcessEngine,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        generator: torch.Generator,
        ends: float,
        stop: StopEarly | None,
        recorder: RoutingRecorder | None,
    ) -> None:
        self._engine = engine
        self._sampling = sampling
        self._generator = generator
        self._ends, self._stop_early = ends, stop
        self._stop = torch.tensor(sampling.stop_token_ids, device=engine._device)
        self._prompts = prompts
        count = len(prompts) * sampling.samples_per_prompt
        self.done: list[Generation] = [None] * count  # type: ignore[list-item]
        self._tokens: list[torch.Tensor] = []  # per step [count], -1 where a row did not run
        self._logprobs: list[torch.Tensor] = []
        self._sets = None if sampling.top_k is None else SetRecord(count)
        self._recorder = recorder
        self._prompt_routes: list[torch.Tensor] = []  # per prompt [tokens, layers, k]
        self._routes: list[torch.Tensor] = []  # per fed token [count, layers, k]

    def run(self) -> Iterable[tuple[int, Generation]]:
        """Sample until every row has ended; yield (row, generation) as rows end."""
        sampling, engine = self._sampling, self._engine
        cache = new_cache(engine._model.config)
        # Routes are noted for every token of every prompt.
        shares = engine.shares_beginnings and self._recorder is None
        common = common_beginning(self._prompts) if shares else 0
        logits, mask = engine.prefill(self._prompts, cache, common=common)
        if self._recorder is not None:
            routes = self._recorder.take(*mask.shape)
            self._prompt_routes = [row[real] for row, real in zip(routes, mask.bool().cpu())]
        if sampling.samples_per_prompt > 1:
            cache.batch_repeat_interleave(sampling.samples_per_prompt)
            logits = logits.repeat_interleave(sampling.samples_per_prompt, dim=0)
            mask = mask.repeat_interleave(sampling.samples_per_prompt, dim=0)
        rows = torch.arange(len(self.done), device=logits.device)
        # `ended` rows wait for their score (or for the next compaction).
        ended = torch.zeros(len(rows), dtype=torch.bool, device=logits.device)
        positions = mask.sum(1)
        for step in range(sampling.max_new_tokens):
            if self._stop_early is not None and self._stop_early.is_set:
                raise StoppedEarly(f"stopped with {len(rows)} of {len(self.done)} responses still running")
            if time.monotonic() > self._ends:
                raise TimeoutError(
                    f"generation: {len(rows)} of {len(self.done)} responses still running after {step} tokens"
                )
            tokens, logprobs = self._sample(logits, rows, ended)
            self._record(step, rows, tokens, logprobs, ended)
            stopped = torch.isin(tokens, self._stop) & ~ended
            if sampling.score_token_id is None:
                yield from self._finish(rows[stopped], step, "stop", None)
            newly = stopped if sampling.score_token_id is not None else torch.zeros_like(stopped)
            ended = ended | stopped
            last = step + 1 == sampling.max_new_tokens
            if last:
                yield from self._finish(rows[~ended], step, "length", None)
            alive = ~ended | newly
            if not bool(alive.any()) or (last and not bool(newly.any())):
                return
            if float(alive.float().mean()) <= 1.0 - _COMPACT_SHARE or last:
                keep = (newly if last else alive).nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                rows, tokens, ended, mask = rows[keep], tokens[keep], ended[keep], mask[keep]
                positions, newly = positions[keep], newly[keep]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            logits = engine.decode(tokens, mask, positions, cache)
            if self._recorder is not None:
                routes = self._recorder.take(len(rows), 1)[:, 0]
                self._routes.append(routes.new_zeros(len(self.done), *routes.shape[1:]))
                self._routes[-1][rows.cpu()] = routes
            positions = positions + 1
            if bool(newly.any()):
                scores = log_probs(logits[newly])[:, sampling.score_token_id]
                yield from self._finish(rows[newly], step, "stop", scores)

    def _sample(
        self, logits: torch.Tensor, rows: torch.Tensor, ended: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token [rows] and its log-prob [rows] under logits / temperature, before top-p, but with `top_k` after it."""
        temperature = self._sampling.temperature
        if self._sets is not None:
            logprobs = log_probs(logits, temperature or 1.0)
            return self._sets.sample(logprobs, self._sampling, self._generator, (rows, ~ended))
        if temperature == 0.0:
            logprobs = log_probs(logits)
            tokens = logprobs.argmax(dim=-1)
        else:
            logprobs = log_probs(logits, temperature)
            tokens = draw(narrowed(logprobs.exp(), self._sampling), self._generator)
        return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)

    def _record(
        self,
        step: int,
        rows: torch.Tensor,
        tokens: torch.Tensor,
        logprobs: torch.Tensor,
        ended: torch.Tensor,
    ) -> None:
        column = torch.full((len(self.done),), -1, dtype=torch.int64, device=rows.device)
        values = torch.zeros(len(self.done), device=rows.device)
        running = rows[~ended]
        column[running] = tokens[~ended]
        values[running] = logprobs[~ended]
        self._tokens.append(column)
        self._logprobs.append(values)

    def _finish(
        self, rows: torch.Tensor, step: int, reason: str, scores: torch.Tensor | None
    ) -> Iterable[tuple[int, Generation]]:
        if len(rows) == 0:
            return
        ids = torch.stack([column[rows] for column in self._tokens[: step + 1]], dim=1).int().cpu().numpy()
        logprobs = (
            torch.stack([column[rows] for column in self._logprobs[: step + 1]], dim=1).float().cpu().numpy()
        )
        values = [None] * len(ids) if scores is None else scores.tolist()
        for row, response, row_logprobs, score in zip(rows.tolist(), ids, logprobs, values):
            generation = Generation(
                response_ids=response.copy(),  # not a view of all that end here
                logprobs=row_logprobs.copy(),
                finish_reason=reason,  # type: ignore[arg-type]
                weight_version=self._engine.version,
                zc_logprob=score,
                routed_experts=self._routed(row),
                sets=None if self._sets is None else self._sets.of(row, step + 1),
            )
            self.done[row] = generation
            yield row, generation

    def _routed(self, row: int) -> Routed | None:
        """Where all tokens went that were fed for a row that ends now."""
        if self._sampling.routing is None:
            return None
        prompt = self._prompt_routes[row // self._sampling.samples_per_prompt]
        fed = [prompt, *(step[row : row + 1] for step in self._routes)]
        return torch.cat(fed).numpy()
