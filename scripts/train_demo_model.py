"""Train the demo model: a small Qwen3-MoE whose experts specialise by topic, on 2 CPU cores in under ten minutes.

4 layers of 32 experts, top-4, hidden 128: at 8 ranks every rank owns 4 experts, and with no balance loss some ranks get
2-3 times their share of a topic's tokens. That skew is what the demo shows Equipoise removing.

The text is what `demo_corpus.py` finds on this machine. Everything is fixed by the seed: text, tokenizer, initial
weights, the batch of step i (drawn from (seed, i), so resuming needs no generator state) and the number of steps, never
the wall clock. Two runs on one machine write the same bytes. The measured loss, the byte-trigram baseline, the skew and
sample answers are of the saved bfloat16 checkpoint, not of the float32 weights in training, and go to its model card.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before tokenizers is imported: merges are counted by one thread

import numpy as np
import torch
from demo_corpus import TOPICS, Corpus, CorpusError, build_corpus, pick_prompts
from demo_report import LIMIT_MIB, folder_mib, measure, model_card
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

END = "<|end|>"  # separates documents; also the end-of-text token
STATE = "training_state.pt"
DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "python" / "equipoise" / "demo_model"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the checkpoint, besides the text."""

    seed: int = 0
    steps: int = 1200
    threads: int = 2  # part of the recipe: sums split over another number of threads round differently
    vocab_size: int = 2048
    windows_per_topic: int = 4  # a step trains on this many windows of every topic
    window: int = 256  # tokens
    learning_rate: float = 4e-3
    warmup_steps: int = 60
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        for name in ("steps", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then a straight line to zero at the last step."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        return self.learning_rate * warm * (1 - step / self.steps)


class UsageError(Exception):
    """What the caller asked for cannot be done; printed as one line, exit code 2."""


def train_tokenizer(corpus: Corpus, recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text round-trips; digits stay single, so numbers cost the same everywhere."""
    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?[^\W\d_]+|\d| ?[^\s\w]+|_|\s+(?!\S)|\s"), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sample = [piece.text for topic in TOPICS for piece in corpus.train[topic][:100]]
    bpe.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False, model_max_length=1024
    )


def encode(tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> dict[str, torch.Tensor]:
    """Per topic one stream of token ids, int64, (num_tokens,): every piece led by END."""
    streams = {}
    for topic in TOPICS:
        ids = [tokenizer.eos_token_id]
        for piece in corpus.train[topic]:
            ids += tokenizer(piece.text, add_special_tokens=False, verbose=False)["input_ids"]
            ids.append(tokenizer.eos_token_id)
        streams[topic] = torch.tensor(ids)
    return streams


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """3.6 million parameters, float32, about a sixth of them active for a token."""
    torch.manual_seed(recipe.seed)
    config = Qwen3MoeConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,  # no balance loss: it would train away the skew that the demo is about
        initializer_range=0.04,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._experts_implementation = "grouped_mm"
    return Qwen3MoeForCausalLM(config)


def batch(streams: dict[str, torch.Tensor], recipe: Recipe, step: int) -> torch.Tensor:
    """The token ids of one step, int64, (len(TOPICS) * windows_per_topic, window); depends only on (seed, step)."""
    draw = np.random.default_rng((recipe.seed, step))
    rows = []
    for topic in TOPICS:
        stream = streams[topic]
        for start in draw.integers(0, len(stream) - recipe.window, recipe.windows_per_topic):
            rows.append(stream[start : start + recipe.window])
    return torch.stack(rows)


def save_state(path: Path, step: int, model, optimizer, identity: dict) -> None:
    """Write beside and rename, so that an interruption leaves the old state or the new one, never half of one."""
    beside = path.with_suffix(".tmp")
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "identity": identity}
    torch.save(state, beside)
    os.replace(beside, path)


def load_state(path: Path, model, optimizer, identity: dict) -> int:
    if not path.exists():
        raise UsageError(f"--resume: there is no {STATE} in {path.parent}; start without --resume")
    state = torch.load(path, weights_only=True)
    for key, value in identity.items():
        if state["identity"][key] != value:
            raise UsageError(f"--resume: {key} was {state['identity'][key]} when the run began and is now {value}")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def train(model, optimizer, streams, recipe: Recipe, first: int, stop: int, save: Callable[[int], None], say) -> None:
    """Steps first..stop-1. Saves every 100 steps and when interrupted, then lets the interruption through."""
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    columns += (TextColumn("{task.fields[rate]:.0f} tok/s"), TimeElapsedColumn(), TimeRemainingColumn())
    model.train()
    step, began, loss_now = first, time.monotonic(), float("nan")
    with Progress(*columns, console=say) as progress:
        bar = progress.add_task("", total=recipe.steps, completed=first, loss=loss_now, rate=0.0)
        try:
            for step in range(first, stop):
                ids = batch(streams, recipe, step)
                for group in optimizer.param_groups:
                    group["lr"] = recipe.lr_at(step)
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                loss_now = 0.95 * loss_now + 0.05 * loss.item() if loss_now == loss_now else loss.item()
                rate = (step + 1 - first) * ids.numel() / (time.monotonic() - began)
                progress.update(bar, completed=step + 1, loss=loss_now, rate=rate)
                if (step + 1) % 100 == 0 or step + 1 == stop:
                    save(step + 1)
                if (step + 1) % 100 == 0 and not say.is_terminal:
                    say.print(f"step {step + 1}/{recipe.steps}: loss {loss_now:.3f} nats/token, {rate:.0f} tok/s")
        except KeyboardInterrupt:
            say.print("interrupted: run again with --resume to go on from the last saved step")
            raise


def run(recipe: Recipe, output: Path, resume: bool, stop_after: int | None, say: Console) -> None:
    began = time.monotonic()
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    output.mkdir(parents=True, exist_ok=True)

    corpus = build_corpus(recipe.seed)
    for line in corpus.missing:
        say.print(f"missing source, going on without it: {line}")
    sizes = ", ".join(f"{topic} {corpus.num_bytes(corpus.train, topic) / 1e6:.1f} MB" for topic in TOPICS)
    say.print(f"text: {sizes}; digest {corpus.digest()[:16]}")
    tokenizer = train_tokenizer(corpus, recipe)
    streams = encode(tokenizer, corpus)
    model = new_model(recipe, tokenizer)
    say.print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters; ready in {time.monotonic() - began:.0f} s")
    decayed = [p for p in model.parameters() if p.ndim > 1]
    scales = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": scales, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), foreach=True)

    identity = {**dataclasses.asdict(recipe), "text digest": corpus.digest(), "torch": torch.__version__}
    first = load_state(output / STATE, model, optimizer, identity) if resume else 0
    stop = min(recipe.steps, stop_after or recipe.steps)
    train(model, optimizer, streams, recipe, first, stop,
          lambda step: save_state(output / STATE, step, model, optimizer, identity), say)  # fmt: skip
    if stop < recipe.steps:
        say.print(f"stopped after step {stop} of {recipe.steps}; go on with --resume")
        return
    minutes = (time.monotonic() - began) / 60

    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    prompts = pick_prompts(corpus, recipe.seed)
    (output / "prompts.json").write_text(json.dumps(prompts, indent=1, ensure_ascii=False) + "\n", "utf-8")
    report = measure(output, corpus, prompts)
    (output / "README.md").write_text(model_card(report, corpus, dataclasses.asdict(recipe), minutes), "utf-8")
    (output / STATE).unlink()
    report.show(say)
    say.print(f"{output}: {folder_mib(output):.2f} MiB of at most {LIMIT_MIB}, trained in {minutes:.1f} minutes")


def parse(argv: list[str] | None) -> argparse.Namespace:
    recipe = Recipe()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # type: ignore[union-attr]  # fmt: skip
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=recipe.steps, help="training steps; part of what is reproduced")
    parser.add_argument("--seed", type=int, default=recipe.seed, help="seed of text order, weights and batches")
    parser.add_argument("--threads", type=int, default=recipe.threads, help="CPU threads; another number rounds otherwise")
    parser.add_argument("--resume", action="store_true", help=f"go on from {STATE} in --output")
    parser.add_argument("--stop-after", type=int, help="stop, resumably, after this step of --steps")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        recipe = Recipe(seed=args.seed, steps=args.steps, threads=args.threads)
        run(recipe, args.output, args.resume, args.stop_after, Console())
    except (UsageError, CorpusError, ValueError, OSError) as error:
        print(f"train_demo_model: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
