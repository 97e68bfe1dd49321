"""Train the demo model: a small Qwen3-MoE whose experts specialise by topic, on 2 CPU cores in under ten minutes.

4 layers of 32 experts, top-4, hidden 128: at 8 ranks every rank owns 4 experts, and some ranks get twice their share of
a topic's tokens and more. That skew is what the demo shows Equipoise removing, so the balance loss stays weak.

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

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: a thread that spins starves others on a shared core
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before tokenizers is imported: merges are counted by one thread

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from demo_corpus import TOPICS, Corpus, CorpusError, build_corpus, pick_prompts
from demo_report import LIMIT_MIB, folder_mib, measure, model_card

END = "<|end|>"  # separates documents; also the end-of-text token
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"  # plain text: it saw no chats
STATE = "training_state.pt"
DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / "python" / "equipoise" / "engine" / "demo_model"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the checkpoint, besides the text."""

    seed: int = 0
    steps: int = 600
    threads: int = 2  # part of the recipe: sums split over another number of threads round differently
    vocab_size: int = 2048
    windows_per_topic: int = 4  # a step trains on this many windows of every topic
    window: int = 256  # tokens
    muon_rate: float = 2e-2  # learning rates, at their peak
    adam_rate: float = 8e-3
    router_rate: float = 1.6e-2
    warmup_steps: int = 60
    balance: float = 0.003  # weight of balance_loss

    def __post_init__(self) -> None:
        for name in ("steps", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def share_at(self, step: int) -> float:
        """Share of the peak learning rate: linear warm-up, then a straight line to zero at the last step."""
        return min(1.0, (step + 1) / self.warmup_steps) * (1 - step / self.steps)


class UsageError(Exception):
    """What the caller asked for cannot be done; printed as one line, exit code 2."""


def train_tokenizer(corpus: Corpus, recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text round-trips; digits stay single, so numbers cost the same everywhere."""
    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?_*[^\W\d_]+|\d| ?[^\s\w]+|_+|\s+(?!\S)|\s"), behavior="isolated")
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
        tokenizer_object=bpe,
        chat_template=CHAT_TEMPLATE,
        eos_token=END,
        pad_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
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
        router_aux_loss_coef=0.0,  # transformers' own mixes the layers; balance_loss below does not
        initializer_range=0.04,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._experts_implementation = "grouped_mm"
    return Qwen3MoeForCausalLM(config)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised: here it needs half of AdamW's steps. Takes matrices or stacks of them.

    Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. torch.optim.Muon takes 2-D weights
    only, and the experts' are (experts, out, in).
    """

    def __init__(self, params, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(state["momentum"], group["momentum"])  # Nesterov
                rows, columns = weight.shape[-2:]
                update = self._orthogonal(update.mT).mT if rows > columns else self._orthogonal(update)
                weight.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    @staticmethod
    def _orthogonal(x: torch.Tensor) -> torch.Tensor:
        """Five Newton-Schulz steps towards the nearest orthogonal matrix; singular values land in about 0.7-1.2."""
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
        return x


def new_optimizers(model, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for attention and experts; AdamW for embeddings, router and norms. `peak` is a group's highest rate."""
    kinds: dict[str, list[torch.nn.Parameter]] = {"hidden": [], "embedding": [], "router": [], "norm": []}
    for name, weight in model.named_parameters():
        hidden = "router" if ".gate." in name else "embedding" if "embed" in name else "hidden"
        kinds["norm" if weight.ndim == 1 else hidden].append(weight)
    peaks = {"embedding": recipe.adam_rate, "router": recipe.router_rate, "norm": recipe.adam_rate}
    groups = [{"params": kinds[kind], "peak": peak, "lr": 0.0} for kind, peak in peaks.items()]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, foreach=True)
    return [Muon([{"params": kinds["hidden"], "peak": recipe.muon_rate}]), adam]


def batch(streams: dict[str, torch.Tensor], recipe: Recipe, step: int) -> torch.Tensor:
    """The token ids of one step, int64, (len(TOPICS) * windows_per_topic, window); depends only on (seed, step)."""
    draw = np.random.default_rng((recipe.seed, step))
    rows = []
    for topic in TOPICS:
        stream = streams[topic]
        for start in draw.integers(0, len(stream) - recipe.window, recipe.windows_per_topic):
            rows.append(stream[start : start + recipe.window])
    return torch.stack(rows)


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Mean over layers of E * sum(share of tokens * mean probability): 1.0 when even. Logits are (tokens, E) each.

    Taken over a batch of all topics, weakly: it keeps one expert from being everybody's favourite, so that each topic
    finds its own, and leaves the skew within a topic alone. Qiu et al., "Demons in the detail", 2025, on why batches
    that mix topics let experts specialise.
    """
    losses = []
    for logits in router_logits:
        num_experts = logits.shape[-1]
        chosen = logits.topk(top_k, dim=-1).indices.flatten()
        share = torch.bincount(chosen, minlength=num_experts) / len(chosen)
        losses.append(num_experts * (share * logits.softmax(-1).mean(0)).sum())
    return torch.stack(losses).mean()


def save_state(path: Path, step: int, model, optimizers, identity: dict) -> None:
    """Write beside and rename, so that an interruption leaves the old state or the new one, never half of one."""
    beside = path.with_suffix(".tmp")
    state = {"step": step, "identity": identity, "model": model.state_dict()}
    state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    torch.save(state, beside)
    os.replace(beside, path)


def load_state(path: Path, model, optimizers, identity: dict) -> int:
    """Restores model and optimizers in place and returns the next step. Raises UsageError if another run left it."""
    state = torch.load(path, weights_only=True)
    for key, value in identity.items():
        if state["identity"][key] != value:
            raise UsageError(f"--resume: {key} was {state['identity'][key]} when the run began and is now {value}")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"]


def train(model, optimizers, streams, recipe: Recipe, first: int, stop: int, save: Callable[[int], None], say) -> None:
    """Steps first..stop-1, saving every 50: an interrupted step is lost with those since, and computed again."""
    columns: tuple[ProgressColumn | str, ...] = ("training", BarColumn(), MofNCompleteColumn())
    columns += (
        "loss {task.fields[loss]:.3f}, {task.fields[rate]:.0f} tok/s",
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    model.train()
    step, began, loss_now = first, time.monotonic(), float("nan")
    with Progress(*columns, console=say) as progress:
        bar = progress.add_task("", total=recipe.steps, completed=first, loss=loss_now, rate=0.0)
        try:
            for step in range(first, stop):
                ids = batch(streams, recipe, step)
                out = model(input_ids=ids, labels=ids, output_router_logits=True)
                loss = out.loss
                (loss + recipe.balance * balance_loss(out.router_logits, model.config.num_experts_per_tok)).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = group["peak"] * recipe.share_at(step)
                    optimizer.step()
                    optimizer.zero_grad()
                loss_now = 0.95 * loss_now + 0.05 * loss.item() if loss_now == loss_now else loss.item()
                rate = (step + 1 - first) * ids.numel() / (time.monotonic() - began)
                progress.update(bar, completed=step + 1, loss=loss_now, rate=rate)
                if (step + 1) % 50 == 0 or step + 1 == stop:
                    save(step + 1)
                if (step + 1) % 50 == 0 and not say.is_terminal:
                    say.print(f"step {step + 1}/{recipe.steps}: loss {loss_now:.3f} nats/token, {rate:.0f} tok/s")
        except KeyboardInterrupt:
            say.print("interrupted: run again with --resume to go on from the last saved step")
            raise


def run(recipe: Recipe, output: Path, resume: bool, stop_after: int | None, say: Console) -> None:
    began = time.monotonic()
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    if resume and not (output / STATE).exists():
        raise UsageError(f"--resume: there is no {STATE} in {output}; start without --resume")
    output.mkdir(parents=True, exist_ok=True)

    corpus = build_corpus(recipe.seed)
    for line in corpus.missing:
        say.print(f"missing source, going on without it: {line}")
    sizes = ", ".join(f"{topic} {corpus.num_bytes(corpus.train, topic) / 1e6:.1f} MB" for topic in TOPICS)
    say.print(f"text: {sizes}; digest {corpus.digest()[:16]}")
    tokenizer = train_tokenizer(corpus, recipe)
    streams = encode(tokenizer, corpus)
    model = new_model(recipe, tokenizer)
    say.print(
        f"model: {sum(p.numel() for p in model.parameters()):,} parameters; ready in {time.monotonic() - began:.0f} s"
    )
    optimizers = new_optimizers(model, recipe)

    identity = {**dataclasses.asdict(recipe), "text digest": corpus.digest(), "torch": str(torch.__version__)}
    first = load_state(output / STATE, model, optimizers, identity) if resume else 0
    stop = min(recipe.steps, stop_after or recipe.steps)
    train(model, optimizers, streams, recipe, first, stop,
          lambda step: save_state(output / STATE, step, model, optimizers, identity), say)  # fmt: skip
    if stop < recipe.steps:
        say.print(f"stopped after step {stop} of {recipe.steps}; go on with --resume")
        return
    minutes = (time.monotonic() - began) / 60

    model.bfloat16().save_pretrained(output)
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
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], formatter_class=defaults)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=recipe.steps, help="training steps; part of what is reproduced")
    parser.add_argument("--seed", type=int, default=recipe.seed, help="seed of text order, weights and batches")
    parser.add_argument(
        "--threads", type=int, default=recipe.threads, help="CPU threads; another number rounds otherwise"
    )
    parser.add_argument("--resume", action="store_true", help=f"go on from {STATE} in --output")
    parser.add_argument("--stop-after", type=int, help="stop, resumably, after this step of --steps")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.stop_after is not None and args.stop_after < 1:
            raise UsageError(f"--stop-after must be at least 1, got {args.stop_after}")
        recipe = Recipe(seed=args.seed, steps=args.steps, threads=args.threads)
        run(recipe, args.output, args.resume, args.stop_after, Console(soft_wrap=True))
    except (UsageError, CorpusError, ValueError, OSError) as error:
        print(f"train_demo_model: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
