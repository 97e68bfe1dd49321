"""What the demo model is worth: held-out loss against a byte trigram, routing skew per topic, answers, the model card.

Skew is **PAR**: with E = 32 experts placed contiguously on 8 ranks, rank g holds experts 4g..4g+3; a layer's PAR is the
largest rank load over the mean rank load, 1.0 when even and 8.0 when one rank takes all. A topic's PAR is the mean over
layers. Everything here is measured on the checkpoint as loaded from disk, in float32, on text that was not trained on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo_corpus import SOURCES, TOPICS, Corpus

LIMIT_MIB = 8
NUM_RANKS = 8
WINDOW = 256  # tokens
WINDOWS = 96  # held-out windows measured per topic, at most
ANSWER_TOKENS = 48


class ByteTrigram:
    """Interpolated byte trigram with Witten-Bell smoothing: a context trusts its own counts as far as it is rich.

    Witten and Bell, "The zero-frequency problem", IEEE Trans. Information Theory 37(4), 1991. Counts are dense,
    (256**2, 256) int32; the distribution falls back through bigram and unigram to uniform, so every byte has a chance.
    """

    def __init__(self, text: bytes) -> None:
        data = np.frombuffer(text, np.uint8).astype(np.int64)
        pairs = data[:-1] * 256 + data[1:]
        triples = pairs[:-1] * 256 + data[2:]
        self.unigram = self._blend(np.bincount(data, minlength=256)[None], np.full((1, 256), 1 / 256))[0]
        self.bigram = self._blend(np.bincount(pairs, minlength=2**16).reshape(256, 256), self.unigram[None])
        self.trigram = np.bincount(triples, minlength=2**24).astype(np.int32).reshape(2**16, 256)
        self.total = self.trigram.sum(1)
        self.kinds = (self.trigram > 0).sum(1)

    @staticmethod
    def _blend(counts: np.ndarray, lower: np.ndarray) -> np.ndarray:
        kinds = np.maximum((counts > 0).sum(1, keepdims=True), 1)
        return (counts + kinds * lower) / (counts.sum(1, keepdims=True) + kinds)

    def nats_per_byte(self, text: bytes) -> float:
        data = np.frombuffer(text, np.uint8).astype(np.int64)
        context, byte = data[:-2] * 256 + data[1:-1], data[2:]
        lower = self.bigram[data[1:-1], byte]
        kinds = np.maximum(self.kinds[context], 1)
        chance = (self.trigram[context, byte] + kinds * lower) / (self.total[context] + kinds)
        return float(-np.log(chance).mean())


class LoadCounter:
    """Counts the experts that the routers of a transformers Qwen3-MoE choose: `load` is (layers, experts) int64."""

    def __init__(self, model) -> None:
        self.load = torch.zeros(model.config.num_hidden_layers, model.config.num_experts, dtype=torch.int64)
        for number, layer in enumerate(model.model.layers):
            layer.mlp.gate.register_forward_hook(self._hook(number))

    def _hook(self, number: int):
        def count(_module, _inputs, output) -> None:  # returns None: a hook's return value would replace the output
            chosen = output[2].flatten()
            self.load[number] += torch.bincount(chosen, minlength=self.load.shape[1])

        return count

    def take(self) -> torch.Tensor:
        load, self.load = self.load, torch.zeros_like(self.load)
        return load


def par(load: torch.Tensor, num_ranks: int = NUM_RANKS) -> torch.Tensor:
    """(layers, experts) load to (layers,) PAR under contiguous placement, float64."""
    ranks = load.double().reshape(len(load), num_ranks, -1).sum(-1)
    return ranks.amax(-1) / ranks.mean(-1)


@dataclass
class Report:
    """Per topic, in the order of TOPICS. Losses are nats per byte; loads are (layers, experts) int64."""

    loss: dict[str, float] = field(default_factory=dict)
    trigram: dict[str, float] = field(default_factory=dict)
    load: dict[str, torch.Tensor] = field(default_factory=dict)
    prompt_load: dict[str, torch.Tensor] = field(default_factory=dict)  # prompts and their greedy answers
    answer: dict[str, tuple[str, str]] = field(default_factory=dict)  # the first prompt and its greedy answer
    smallest_gap: float = float("inf")  # top-1 minus top-2 logit, over every greedy step of every prompt
    num_gaps: int = 0

    def rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for topic in TOPICS:
            layers = par(self.load[topic])
            rows.append(
                (
                    topic,
                    f"{self.loss[topic]:.3f}",
                    f"{self.trigram[topic]:.3f}",
                    f"{layers.mean():.2f}",
                    " ".join(f"{value:.2f}" for value in layers),
                    f"{par(self.prompt_load[topic]).mean():.2f}",
                    " ".join(str(expert) for expert in self.load[topic].argmax(-1).tolist()),
                )
            )
        return rows

    def show(self, console: Console) -> None:
        table = Table(*COLUMNS)
        for row in self.rows():
            table.add_row(*row)
        console.print(table)
        console.print(f"held out: {self.mean_loss():.3f} nats/byte, byte trigram {self.mean_trigram():.3f}; ")
        console.print(f"smallest top-1/top-2 logit gap over {self.num_gaps} greedy steps: {self.smallest_gap:.5f}")

    def mean_loss(self) -> float:
        return sum(self.loss.values()) / len(self.loss)

    def mean_trigram(self) -> float:
        return sum(self.trigram.values()) / len(self.trigram)


COLUMNS = ("topic", "loss", "trigram", "PAR", "PAR by layer", "PAR, prompts", "hottest expert by layer")


@torch.inference_mode()
def measure(folder: Path, corpus: Corpus, prompts: dict[str, list[str]]) -> Report:
    """Load the checkpoint from `folder` as anybody would, in float32, and measure it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    counter = LoadCounter(model)
    report = Report()
    trigram = ByteTrigram("".join(piece.text for topic in TOPICS for piece in corpus.train[topic]).encode())
    # byte-level tokens are written in an alphabet with one character per byte
    widths = torch.tensor([len(token) for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))])
    widths[tokenizer.all_special_ids] = 0
    for topic in TOPICS:
        text = "".join(piece.text for piece in corpus.held_out[topic])
        ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
        windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)[:WINDOWS]
        nats = 0.0
        for window in windows.split(16):
            logits = model(input_ids=window).logits[:, :-1]
            nats += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum"
            ).item()
        report.loss[topic] = nats / widths[windows[:, 1:]].sum().item()
        report.load[topic] = counter.take()
        report.trigram[topic] = trigram.nats_per_byte(text.encode()[: int(widths[windows].sum())])
        for prompt in prompts[topic]:
            answer, gaps = greedy(model, tokenizer, prompt)
            report.answer.setdefault(topic, (prompt, answer))
            report.smallest_gap = min(report.smallest_gap, *gaps)
            report.num_gaps += len(gaps)
        report.prompt_load[topic] = counter.take()
    return report


def greedy(model, tokenizer, prompt: str) -> tuple[str, list[float]]:
    """The greedy answer of ANSWER_TOKENS tokens and, per step, the gap between the best two logits."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack([step[0] for step in out.logits]).topk(2).values
    return tokenizer.decode(out.sequences[0, ids.shape[1] :]), (best[:, 0] - best[:, 1]).tolist()


def folder_mib(folder: Path) -> float:
    """Size of the checkpoint with its tokenizer and cards, MiB; state of an unfinished run does not count."""
    files = [path for path in folder.iterdir() if path.is_file() and path.name != "training_state.pt"]
    return sum(path.stat().st_size for path in files) / 2**20


def model_card(report: Report, corpus: Corpus, recipe: dict, minutes: float) -> str:
    table = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    table += ["| " + " | ".join(row) + " |" for row in report.rows()]
    text = ["| topic | trained on | held out |", "| --- | --- | --- |"]
    for topic in TOPICS:
        sizes = [corpus.num_bytes(split, topic) / 1e6 for split in (corpus.train, corpus.held_out)]
        text.append(f"| {topic} | {sizes[0]:.2f} MB | {sizes[1]:.2f} MB |")
    origin = ["| topic | source | licence | quoted in prompts.json |", "| --- | --- | --- | --- |"]
    for source in SOURCES:
        origin.append(f"| {source.topic} | {source.name} | {source.licence} | {'yes' if source.prompts else 'no'} |")
    missing = "\n".join(f"- missing on this machine: {line}" for line in corpus.missing)
    answers = "\n\n".join(
        f"{topic}:\n\n````text\n{prompt}⟶{answer}\n````" for topic, (prompt, answer) in report.answer.items()
    )
    return CARD.format(
        table="\n".join(table),
        text="\n".join(text),
        origin="\n".join(origin),
        missing=missing,
        answers=answers,
        recipe=", ".join(f"{name} {value}" for name, value in recipe.items()),
        minutes=minutes,
        loss=report.mean_loss(),
        trigram=report.mean_trigram(),
        gap=report.smallest_gap,
        num_gaps=report.num_gaps,
        digest=corpus.digest(),
        answer_tokens=ANSWER_TOKENS,
        ranks=NUM_RANKS,
    )


CARD = """# The demo model

A Qwen3-MoE small enough for a laptop, with the one property of large ones that Equipoise is about: its experts
specialise by topic, so each topic overloads other ranks. 4 layers of 32 experts, top-4, hidden 128, 3.6 million
parameters, bfloat16, byte-level BPE of 2048 tokens. Made by `scripts/train_demo_model.py`, which also writes this page.
The balance loss was weak and over batches of all topics, which lets every topic find its own experts and leaves the
skew within a topic alone. It answers in the manner of its topics and knows nothing: use it for load, not for language.

## Measured

{table}

On held-out text, from this checkpoint in float32. `loss` and `trigram` are nats per byte, the trigram being an
interpolated byte trigram over the same training text; mean {loss:.3f} against {trigram:.3f}. `PAR` is the largest rank
load over the mean rank load at {ranks} ranks of 4 contiguous experts, averaged over layers; `PAR, prompts` is the same
over the prompts in `prompts.json` with {answer_tokens}-token greedy answers. Over the {num_gaps} steps of those answers
the best logit leads the second by at least {gap:.5f}.

## Training

{recipe}.
{minutes:.1f} minutes of wall clock, whatever else the machine was doing.

{text}

SHA-256 of the text: `{digest}`. The same seed on the same machine gives the same
bytes; another machine has other files.

{missing}

## Text and licences

{origin}

`prompts.json` quotes held-out text only of the sources marked so, at most 200 bytes each; its German prompts were
written for it.

## Greedy answers

{answers}
"""
