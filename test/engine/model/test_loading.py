"""Loading: a rank reads and holds its experts only, and what cannot be served is refused in one clear line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from equipoise.config import EngineConfig, EplbConfig, ServeConfig
from equipoise.engine.checkpoint.files import load_tokenizer, model_directory
from equipoise.engine.checkpoint.reader import Checkpoint
from equipoise.engine.model.blueprint import ModelBlueprint
from equipoise.engine.model.runner import ModelRunner
from equipoise.engine.model.weights import WeightLoader
from equipoise.errors import ConfigError, InvalidInputError, ModelError, PlacementError
from equipoise.placement.balancedness import balancedness
from equipoise.placement.metadata import ExpertLocationMetadata
from equipoise.transfer.memory.pool import ExpertPool
from helpers.engine_loop import engine_greedy, serve_config
from helpers.tiny_models import FAMILIES, make_tiny_model

CPU = torch.device("cpu")
PROMPTS = [[1, 2, 3], [9] * 12]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("qwen"), "qwen3_moe", num_hidden_layers=2)


def copy_of(model: Path, target: Path) -> Path:
    target.mkdir()
    for file in model.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def rewrite_config(model: Path, **fields: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **fields}))


class TestRanks:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_each_slot_holds_its_expert_and_nothing_else_is_read(self, family: str, tmp_path: Path) -> None:
        model = make_tiny_model(tmp_path / family, family, max_shard_size="60KB")
        plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        config = serve_config(model, ep_size=2, redundant=2)
        chance = random.Random(family)
        expert_bytes = []
        for rank in range(2):
            blueprint = ModelBlueprint.prepare(config)
            slots = [
                [chance.randrange(blueprint.metadata.num_logical_experts) for _ in blueprint.topology.slots_of_rank(0)]
                for _ in blueprint.experts
            ]
            loader = WeightLoader(blueprint.model, blueprint.experts, Checkpoint(blueprint.directory))
            report = loader.load(slots, CPU, with_head=rank == 0)
            one_expert = 0
            for (name, module), held in zip(blueprint.experts, slots, strict=True):
                whole = plain.get_submodule(name)
                assert module.num_experts == len(held)
                one_expert = sum(tensor[0].nbytes for tensor in whole.parameters())
                expert_bytes.append(0)
                for leaf, tensor in module.named_parameters(recurse=False):
                    assert torch.equal(tensor, whole.get_parameter(leaf)[held]), f"{name}.{leaf}"
            # An expert in two slots of a per-expert checkpoint is read twice, in a stacked one once.
            most = sum(len(held) for held in slots) * one_expert
            least = sum(len(set(held)) for held in slots) * one_expert
            assert least <= report.expert_bytes_read <= most
            dense = {
                name: tensor
                for name, tensor in blueprint.model.state_dict().items()
                if not any(name.startswith(f"{experts}.") for experts, _ in blueprint.experts)
            }
            for name, tensor in dense.items():
                assert tensor.is_meta == (rank == 1 and name == "lm_head.weight"), name
                assert tensor.is_meta or torch.equal(tensor, plain.state_dict()[name]), name

    def test_runner_loads_the_slots_of_its_rank(self, qwen: Path) -> None:
        config = serve_config(qwen, ep_size=4, redundant=4)
        plain = AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.float32)
        runner = ModelRunner(ModelBlueprint.prepare(config), 2, CPU, config)
        whole = plain.model.layers[1].mlp.experts
        pool = runner.expert_weights()
        assert isinstance(pool, ExpertPool)
        assert pool.num_rows == 2 * 3 + 3, "a spare row for each slot of a layer, fewer than rounds in flight"
        held = pool.tensors[0][pool.row_of_slot[1]]
        assert torch.equal(held, whole.gate_up_proj[[6, 7, 0]])  # trivial placement: slots 6, 7, 8 of 12, 8 experts

    def test_bfloat16(self, qwen: Path) -> None:
        answers = engine_greedy(serve_config(qwen, dtype="bfloat16"), PROMPTS, 4)
        assert answers is not None
        assert [len(answer) for answer in answers] == [4, 4]


class TestPlacement:
    def location(self, path: Path, content: dict[str, Any]) -> str:
        path.write_text(json.dumps(content))
        return str(path)

    def prepare(self, model: Path, location: str, redundant: int = 4) -> ExpertLocationMetadata:
        config = ServeConfig(
            EngineConfig(str(model), ep_size=2, device="cpu"),
            EplbConfig(ep_num_redundant_experts=redundant, init_expert_location=location),
        )
        return ModelBlueprint.prepare(config).metadata

    def test_from_a_map(self, qwen: Path, tmp_path: Path) -> None:
        row = [7, 6, 5, 4, 3, 2, 1, 0, 0, 0, 1, 7]
        metadata = self.prepare(qwen, self.location(tmp_path / "m.json", {"physical_to_logical_map": [row, row]}))
        assert metadata.physical_to_logical_map.tolist() == [row, row]
        assert metadata.max_replicas == 5

    def test_from_load(self, qwen: Path, tmp_path: Path) -> None:
        load = [[1, 1, 1, 1, 1, 1, 1, 90], [1, 90, 1, 1, 1, 1, 1, 1]]
        metadata = self.prepare(qwen, self.location(tmp_path / "l.json", {"logical_count": load}))
        assert balancedness(torch.tensor(load), metadata).min() > 0.8  # all of the load on one rank would be 0.5
        assert metadata.max_replicas == 5

    def test_that_does_not_fit(self, qwen: Path, tmp_path: Path) -> None:
        for name, content in {
            "layers": {"physical_to_logical_map": [list(range(8))]},
            "missing expert": {"physical_to_logical_map": [[0] * 8] * 2},
            "load of other experts": {"logical_count": [[1] * 4] * 2},
        }.items():
            with pytest.raises(PlacementError):
                self.prepare(qwen, self.location(tmp_path / f"{name}.json", content), redundant=0)

    def test_slots_must_divide_over_the_ranks(self, qwen: Path) -> None:
        with pytest.raises(ConfigError, match="ep_num_redundant_experts=1 would do") as caught:
            ModelBlueprint.prepare(serve_config(qwen, ep_size=3))
        assert caught.value.field == "ep_num_redundant_experts"


class TestRefusals:
    def refused(self, model: Path | str, match: str, *, run: bool = False) -> None:
        def load() -> None:
            config = serve_config(Path(model))
            blueprint = ModelBlueprint.prepare(config)
            if run:
                ModelRunner(blueprint, 0, CPU, config)

        with pytest.raises(ModelError, match=match) as caught:
            load()
        assert "\n" not in str(caught.value)
        assert caught.value.field == "model_path"

    def test_no_directory_or_nothing_in_it(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "nowhere", "must be a directory")
        self.refused(tmp_path, "no config.json")
        with pytest.raises(ModelError, match="must be a directory"):
            model_directory(str(tmp_path / "nowhere"))

    def test_no_tokenizer(self, qwen: Path, tmp_path: Path) -> None:
        model = copy_of(qwen, tmp_path / "m")
        for file in model.glob("token*"):
            file.unlink()
        with pytest.raises(ModelError, match="tokenizer"):
            load_tokenizer(model)

    @pytest.mark.parametrize("config", ["", "[1]", '{"model_type": "no_such_model"}', "{}"])
    def test_broken_config(self, config: str, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(config)
        self.refused(tmp_path, "config.json (cannot be used|is not JSON|must hold a JSON object)")

    @pytest.mark.parametrize(
        ("family", "fields", "match"),
        [
            ("qwen3", {}, "no experts"),
            ("qwen3_next", {"num_experts": 4, "num_experts_per_tok": 2}, "linear_attention"),
            ("jamba", {"num_experts": 4}, "state-space|layers of a kind"),
            ("phimoe", {"num_local_experts": 4, "rope_scaling": {
                "rope_type": "longrope", "long_factor": [1.0] * 4, "short_factor": [1.0] * 4,
                "long_mscale": 1.0, "short_mscale": 1.0, "original_max_position_embeddings": 8,
            }}, "longrope"),
        ],
    )  # fmt: skip
    def test_unsupported_family(self, family: str, fields: dict[str, Any], match: str, tmp_path: Path) -> None:
        sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4,
                 "num_key_value_heads": 4, "vocab_size": 50}  # fmt: skip
        AutoConfig.for_model(family, **{**sizes, **fields}).save_pretrained(tmp_path)
        self.refused(tmp_path, match)

    def test_quantised(self, qwen: Path, tmp_path: Path) -> None:
        model = copy_of(qwen, tmp_path / "m")
        rewrite_config(model, quantization_config={"quant_method": "awq"})
        self.refused(model, "quant_method must be one of fp8, mxfp4 .* says awq")

    def test_no_weights(self, qwen: Path, tmp_path: Path) -> None:
        model = copy_of(qwen, tmp_path / "m")
        (model / "model.safetensors").unlink()
        self.refused(model, "no safetensors weights")

    @pytest.mark.parametrize("keep", [0, 7, 300, -100])
    def test_truncated(self, keep: int, qwen: Path, tmp_path: Path) -> None:
        model = copy_of(qwen, tmp_path / "m")
        whole = (model / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(whole[:keep])
        self.refused(model, "model.safetensors cannot be read")

    def test_index_that_lies(self, qwen: Path, tmp_path: Path) -> None:
        model = copy_of(qwen, tmp_path / "m")
        index = model / "model.safetensors.index.json"
        for weight_map, match in [
            ({"a": "gone.safetensors"}, "gone.safetensors is missing"),
            ({"a": "../x.safetensors"}, "outside the model directory"),
            ("nonsense", "not an index"),
        ]:
            index.write_text(json.dumps({"weight_map": weight_map}))
            self.refused(model, match)
        index.write_text(json.dumps({"weight_map": {"lm_head.weight2": "model.safetensors"}}))
        self.refused(model, "lacks", run=True)

    def test_missing_and_misshapen_tensors(self, qwen: Path, tmp_path: Path) -> None:
        model = copy_of(qwen, tmp_path / "m")
        tensors = load_file(model / "model.safetensors")
        expert = "model.layers.1.mlp.experts.3.up_proj.weight"
        norm = "model.norm.weight"
        for name, changed, match in [
            (norm, None, "lacks model.norm.weight"),
            (norm, torch.zeros(3), "must have shape"),
            (expert, None, "needs 8 experts, the checkpoint has 7"),
            (expert, torch.zeros(5, 5), "cannot be made|must have shape"),
        ]:
            kept = {key: tensor for key, tensor in tensors.items() if key != name}
            save_file(kept if changed is None else {**kept, name: changed}, model / "model.safetensors")
            self.refused(model, match, run=True)

    def test_another_number_of_experts_in_one_tensor(self, tmp_path: Path) -> None:
        model = make_tiny_model(tmp_path / "m", "gpt_oss")
        tensors = load_file(model / "model.safetensors")
        name = "model.layers.1.mlp.experts.down_proj"
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])  # every row that is asked for is there
        save_file(tensors, model / "model.safetensors")
        self.refused(model, f"{name} must hold 8 experts, has shape \\(9, ", run=True)

    def test_too_few_gpus(self, qwen: Path) -> None:
        if torch.cuda.device_count() > 7:
            pytest.skip("needs a machine with fewer than 8 GPUs")
        with pytest.raises(ConfigError, match="one GPU per rank"):
            ModelBlueprint.prepare(ServeConfig(EngineConfig(str(qwen), ep_size=8, device="cuda")))

    def test_demo_model_is_found_or_refused(self) -> None:
        try:
            assert (model_directory("demo") / "config.json").is_file()
        except InvalidInputError as error:
            assert isinstance(error, ModelError)  # noqa: PT017 - both outcomes are fine, nothing else is
