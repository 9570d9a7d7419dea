"""Makes the base model of the small example: `python examples/tiny_sum/prepare.py`, about 80 s on one core.

With `--experts 8 --output examples/tiny_sum/base_moe` its layers are mixtures of experts, two of which see each token.

Two supervised phases on the task's demonstrations: a long one that is mostly careful, which teaches it to search,
then a short one with a larger share of hasty demonstrations, which teaches it to guess now and then. Some hasty
ones stand in the first phase too: where the sum always equals the target, copying the target is as good as adding,
and the model would not learn to add. Nothing in either phase says which responses are right. A second call with
the same settings and code does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))  # run as a script from any folder

import task
from vocabulary import END, PAD, SCORE, make_tokenizer, vocabulary

HERE = Path(__file__).resolve().parent
IDS = vocabulary()
BETA = 0.5
"""laser.beta of the recipe, for the partition check."""
BALANCE = 0.01
"""What the routers' auxiliary loss is multiplied by: they are balanced here, and left alone in RL."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides the base model, beside the code."""

    seed: int = 0
    batch: int = 64
    careful_steps: int = 1300
    careful_lr: float = 3e-3
    careful_hasty_share: float = 0.12
    hasty_steps: int = 150
    hasty_lr: float = 1e-3
    hasty_share: float = 0.4
    ref_logprob: float = -11.0
    experts: int = 0
    threads: int = 1

    def fingerprint(self) -> str:
        """Changes with any setting and with the code in this folder."""
        code = b"".join((HERE / name).read_bytes() for name in ("prepare.py", "task.py", "vocabulary.py"))
        return hashlib.sha256(json.dumps(asdict(self)).encode() + code).hexdigest()[:16]


def make_model(settings: Settings) -> PreTrainedModel:
    """An untrained Llama of 153k parameters, or a Qwen3-MoE whose tokens see as many of its own.

    Heads and layers divide by 2 for parallel layouts. Llama, because transformers 5 gives a folder of type qwen2 its
    own tokenizer class whatever tokenizer.json says, and this task's tokens are words.
    """
    torch.manual_seed(settings.seed)
    sizes = dict(
        vocab_size=len(IDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    if not settings.experts:
        return LlamaForCausalLM(LlamaConfig(**sizes))
    experts = dict(
        num_experts=settings.experts,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        head_dim=16,
    )
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts))


def encode(problem: task.Problem, response: str | None = None) -> list[int]:
    """Token ids of the prompt, and of the response with its end; what the tokenizer gives, only faster."""
    prompt = ["Which ", str(task.PICKED), " digits of ", *map(str, problem.digits)]
    tokens = [*prompt, " add up to ", str(problem.target), "?"]
    if response is not None:
        addition, boxed = response.split(",\\boxed{")
        left, total = addition.split("=")
        tokens += [*left, "=", total, ",", "\\boxed{", *boxed, "<|end|>"]
    return [IDS[token] for token in tokens]


def make_batch(rng: random.Random, size: int, hasty_share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [size, longest] and labels, where only responses are labelled."""
    rows, labels = [], []
    for _ in range(size):
        problem = task.make_problem(rng, "train")
        hasty = rng.random() < hasty_share
        row = encode(problem, task.hasty(problem, rng) if hasty else task.careful(problem))
        prompt = len(encode(problem))
        rows.append(torch.tensor(row))
        labels.append(torch.tensor([-100] * prompt + row[prompt:]))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, True, PAD), pad(labels, True, -100)


def train(model: PreTrainedModel, settings: Settings) -> None:
    """Both supervised phases, each with its own AdamW and cosine schedule."""
    rng = random.Random(f"{settings.seed} demonstrations")
    total, done, start = settings.careful_steps + settings.hasty_steps, 0, time.monotonic()
    for name, steps, peak, share in (
        ("careful", settings.careful_steps, settings.careful_lr, settings.careful_hasty_share),
        ("hasty", settings.hasty_steps, settings.hasty_lr, settings.hasty_share),
    ):
        optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
        for step in range(steps):
            decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.param_groups[0]["lr"] = peak * decay * min(1.0, (step + 1) / 50)
            ids, labels = make_batch(rng, settings.batch, share)
            # Padding's choice of experts is none of the balance.
            more = (
                {"attention_mask": (ids != PAD).long(), "output_router_logits": True}
                if settings.experts
                else {}
            )
            output = model(input_ids=ids, **more)
            logits = output.logits[:, :-1].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
            if settings.experts:
                loss = loss + BALANCE * output.aux_loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
            if done % 100 == 0 or done == total:
                spent = time.monotonic() - start
                left = spent / done * (total - done)
                print(
                    f"{name:7} step {done:4}/{total}  loss {loss.item():.3f}  {left:3.0f} s left", flush=True
                )


@torch.no_grad()
def sample(
    model: PreTrainedModel, problems: list[task.Problem], repeats: int, new_tokens: int = 16
) -> list[tuple[task.Problem, list[int]]]:
    """Samples at temperature 1; a problem and prompt plus response, which ends with END or was cut, each."""
    generator = torch.Generator().manual_seed(0)
    results = []
    for length in task.LENGTHS:  # equal prompts need no padding
        chosen = [problem for problem in problems if len(problem.digits) == length for _ in range(repeats)]
        if not chosen:
            continue
        ids = torch.tensor([encode(problem) for problem in chosen])
        for _ in range(new_tokens):
            probs = model(input_ids=ids).logits[:, -1].softmax(-1)
            drawn = torch.multinomial(probs, 1, generator=generator)
            ended = (ids == END).any(1, keepdim=True)
            ids = torch.cat([ids, torch.where(ended, PAD, drawn)], 1)
        for problem, row in zip(chosen, ids.tolist()):
            results.append((problem, row[: row.index(END) + 1] if END in row else row))
    return results


def shift_score_token(model: PreTrainedModel, rows: list[list[int]], ref_logprob: float) -> None:
    """Moves the score token's output row so that its mean log-prob after responses is `ref_logprob`.

    No training example holds the token, so where its logit ends up is an accident of the run and of the
    machine; a fixed place lets one configuration fit every base model. The same shift for every response,
    right or wrong, up to the small spread of the states' projection on their mean.
    """
    for _ in range(3):  # log-softmax is not quite linear in one logit
        logprobs, states = score_logprobs(model, rows)
        mean = states.mean(0)
        with torch.no_grad():
            model.lm_head.weight[SCORE] += (ref_logprob - logprobs.mean()) * mean / mean.dot(mean)


@torch.no_grad()
def score_logprobs(model: PreTrainedModel, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """log pi(z_c | prompt, response, end) [rows], and the states that it is read from [rows, hidden]."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, PAD)
    last = torch.tensor([len(row) - 1 for row in rows])
    states = model.model(input_ids=ids).last_hidden_state[torch.arange(len(rows)), last]
    return model.lm_head(states).log_softmax(-1)[:, SCORE], states


def measure(model: PreTrainedModel, settings: Settings) -> dict[str, float | dict[str, float]]:
    """Accuracy and score-token statistics on validation problems; moves the score token first."""
    problems = task.make_split("validation", task.SPLITS["validation"])
    results = sample(model, problems, repeats=4)
    ended = [(problem, row) for problem, row in results if row[-1] == END]
    rows = [row for _, row in ended]
    shift_score_token(model, rows, settings.ref_logprob)
    logprobs, _ = score_logprobs(model, rows)
    tails = [(encode(problem, task.careful(problem))[-5:], row[-5:]) for problem, row in ended]
    quantiles = (0.01, 0.25, 0.5, 0.75, 0.99)
    ref = logprobs.mean().item()
    return {
        "accuracy": sum(right == given for right, given in tails) / len(results),
        "ended": len(ended) / len(results),
        "ref_logprob": ref,
        "score_logprob_std": logprobs.std().item(),
        "score_logprob_quantiles": {str(q): logprobs.quantile(q).item() for q in quantiles},
        "beta": BETA,
        "partition_excess": math.exp(ref) * math.expm1(1 / BETA),
    }


def write_base(output: Path, model: PreTrainedModel, record: dict) -> None:
    """Writes model, tokenizer and prepare.json beside `output`, then moves the folder into place."""
    output.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (output.with_name(f"{output.name}.{word}-{os.getpid()}") for word in ("new", "old"))
    model.save_pretrained(fresh)
    GenerationConfig(eos_token_id=END, pad_token_id=PAD, do_sample=True).save_pretrained(fresh)
    make_tokenizer().save_pretrained(fresh)
    (fresh / "prepare.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if output.exists():
        output.rename(old)
    fresh.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def report(record: dict) -> None:
    """Prints what was measured."""
    base = record["measured"]
    print(
        f"accuracy {base['accuracy']:.3f}; score token log-prob {base['ref_logprob']:.2f} +- "
        f"{base['score_logprob_std']:.2f}; Z - 1 = {base['partition_excess']:.1e} at beta {base['beta']}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the small example's base model.")
    parser.add_argument("--output", type=Path, default=HERE / "base", help="folder to write")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument(
        "--experts", type=int, default=Settings.experts, help="of each layer; 0: a dense model"
    )
    parser.add_argument("--threads", type=int, default=Settings.threads)
    parser.add_argument("--force", action="store_true", help="train even when the folder is up to date")
    parser.add_argument("--regenerate-data", action="store_true", help="rewrite *.jsonl and tokenizer/ first")
    options = parser.parse_args(arguments)
    if options.regenerate_data:
        task.write_data(HERE)
        make_tokenizer().save_pretrained(HERE / "tokenizer")
        print(f"wrote {', '.join(f'{split}.jsonl' for split in task.SPLITS)} and tokenizer/")
    settings = Settings(seed=options.seed, experts=options.experts, threads=options.threads)
    fingerprint = settings.fingerprint()
    record_file = options.output / "prepare.json"
    if record_file.is_file() and not options.force:
        record = json.loads(record_file.read_text(encoding="utf-8"))
        if record.get("fingerprint") == fingerprint:
            print(f"{options.output} is up to date (--force trains it again)")
            report(record)
            return
    elif options.output.exists() and not record_file.is_file():
        parser.error(
            f"--output {options.output}: exists and was not made by this script; name another folder"
        )
    torch.set_num_threads(settings.threads)
    start = time.monotonic()
    model = make_model(settings)
    train(model, settings)
    model.eval()
    record = {
        "fingerprint": fingerprint,
        "settings": asdict(settings),
        "measured": measure(model, settings),
        "seconds": round(time.monotonic() - start, 1),
    }
    write_base(options.output, model, record)
    print(f"wrote {options.output} in {record['seconds']} s")
    report(record)


if __name__ == "__main__":
    main()
