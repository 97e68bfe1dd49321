"""The packaged demo model: it fits, loads with plain transformers, and is skewed the way its card says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from equipoise.engine import demo_model

TOPICS = ("code", "prose", "data", "german")
NUM_RANKS = 8
SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_model.path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(demo_model.path(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def loads(model, tokenizer) -> dict[str, torch.Tensor]:
    """Tokens that the routers send to each expert while reading a topic's prompts: (layers, experts) int64."""
    loads = {}
    for topic, prompts in demo_model.prompts().items():
        chosen: list[list[torch.Tensor]] = [[] for _ in model.model.layers]

        def note(number: int, chosen=chosen):
            return lambda _module, _inputs, output: chosen[number].append(output[2].flatten())

        hooks = [layer.mlp.gate.register_forward_hook(note(n)) for n, layer in enumerate(model.model.layers)]
        with torch.inference_mode():
            for first in range(0, len(prompts), 4):  # four prompts a pass: fewer passes, the same tokens
                model(**tokenizer("\n\n".join(prompts[first : first + 4]), return_tensors="pt"))
        for hook in hooks:
            hook.remove()
        num_experts = model.config.num_experts
        loads[topic] = torch.stack([torch.cat(layer).bincount(minlength=num_experts) for layer in chosen])
    return loads


def mean_par(load: torch.Tensor) -> float:
    """Largest over mean rank load at NUM_RANKS ranks of contiguous experts, averaged over layers."""
    ranks = load.double().reshape(len(load), NUM_RANKS, -1).sum(-1)
    return (ranks.amax(-1) / ranks.mean(-1)).mean().item()


def test_folder_is_at_most_8_mib():
    files = [path for path in demo_model.path().iterdir() if path.is_file()]
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "prompts.json"} <= {
        f.name for f in files
    }
    assert "training_state.pt" not in {f.name for f in files}, "the state of an unfinished training was left behind"
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20


def test_architecture_is_what_the_card_says(model):
    config = model.config
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("qwen3_moe", 4, 128)
    assert (config.num_experts, config.num_experts_per_tok) == (32, 4)
    assert config.num_experts % NUM_RANKS == 0


def test_tokenizer_round_trips_any_text(tokenizer):
    texts = [prompt for prompts in demo_model.prompts().values() for prompt in prompts]
    texts += ["", " lead", "a  b\t\n\n\n c ", "x = {'k': [1.5e-3, None]}", "Größe: 12 €, 日本語, 🙂", "\x00\x7f"]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_prompts_are_twelve_short_texts_per_topic():
    prompts = demo_model.prompts()
    assert tuple(prompts) == TOPICS
    for topic in TOPICS:
        assert len(set(prompts[topic])) == 12
        assert all(60 <= len(prompt.encode()) <= 200 for prompt in prompts[topic])


@pytest.mark.parametrize("topic", TOPICS)
def test_every_topic_overloads_a_rank(loads, topic):
    # the card's 1.8 is measured on far more held-out text; twelve prompts are a smaller sample, hence the margin
    assert mean_par(loads[topic]) >= 1.6


def test_topics_differ_in_their_hottest_experts(loads):
    hottest = {topic: loads[topic].argmax(-1).tolist() for topic in TOPICS}
    for one in TOPICS:
        for other in TOPICS[: TOPICS.index(one)]:
            differing = sum(a != b for a, b in zip(hottest[one], hottest[other], strict=True))
            assert differing >= 2, f"{one} {hottest[one]} and {other} {hottest[other]}"


def test_card_states_a_par_of_at_least_1_8_on_every_topic():
    card = (demo_model.path() / "README.md").read_text("utf-8")
    for topic in TOPICS:
        row = re.search(rf"^\| {topic} \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", card, re.M)
        assert row, f"no row for {topic}"
        loss, trigram, par = map(float, row.groups())
        assert loss < trigram
        assert par >= 1.8


def test_missing_checkpoint_is_said_plainly(monkeypatch, tmp_path):
    monkeypatch.setattr(demo_model, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="run scripts/train_demo_model.py"):
        demo_model.path()


@pytest.fixture
def corpus_module(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import demo_corpus

    yield demo_corpus
    sys.modules.pop("demo_corpus", None)


def sources(module, root: Path, topics=TOPICS):
    """One source per topic: 40 files of about 8 KiB below `root`."""
    for topic in topics:
        (root / topic).mkdir(parents=True, exist_ok=True)
        for number in range(40):
            (root / topic / f"{number}.txt").write_text(f"{topic} line of file {number}\n" * 300)
    return tuple(
        module.Source(topic, "files", str(root / topic), ("*.txt",), module.read_text, "none") for topic in TOPICS
    )


def test_corpus_is_the_same_twice_and_holds_pieces_out(corpus_module, tmp_path):
    found = sources(corpus_module, tmp_path)
    one, two = corpus_module.build_corpus(3, found), corpus_module.build_corpus(3, found)
    assert one.digest() == two.digest() != corpus_module.build_corpus(4, found).digest()
    for topic in TOPICS:
        held_out = {piece.name for piece in one.held_out[topic]}
        assert len(held_out) == 3
        assert held_out.isdisjoint(piece.name for piece in one.train[topic])


def test_corpus_names_a_missing_source_and_goes_on(corpus_module, tmp_path):
    found = sources(corpus_module, tmp_path)
    absent = corpus_module.Source("code", "a dialect", "/nonexistent", ("*",), corpus_module.read_text, "none")
    assert corpus_module.build_corpus(0, (*found, absent)).missing == ["code: no a dialect under /nonexistent"]


def test_corpus_refuses_a_topic_without_text(corpus_module, tmp_path):
    with pytest.raises(corpus_module.CorpusError, match=r"topic german has 0 bytes of text, needs 200000"):
        corpus_module.build_corpus(0, sources(corpus_module, tmp_path, TOPICS[:3]))


def test_manual_page_keeps_words_and_drops_roff(corpus_module, tmp_path):
    page = tmp_path / "page.1"
    page.write_text('.\\" comment\n.SH NAME\nl\\(:as \\- \\fBlist\\fP\n.PP\n.B bold\nword\n.TS\ntable\n.TE\nend\n')
    ((_, text),) = corpus_module.read_man(page)
    assert text == "NAME\n\nläs - list\n\nbold\nword\n\nend\n"
