"""A checkpoint folder is hosted whole and exactly, or refused with every offender named before anything is written."""

import json
import os
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from checkpoints import glm4_config, qwen3_config, save, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from rollout.model.checkpoint import CheckpointError, load_checkpoint, read_config
from rollout.model.end_of_sequence import end_of_sequence_ids
from rollout.model.families import decoder_spec, hosted_layout
from rollout.model.hosted import HostedModel
from rollout.model.router import Hosting
from rollout.model.storage import allocate
from weights.digest import Digest, tensor_digest
from weights.naming import to_wire
from weights.parallel_reader import ParallelReader, Reading, Wanted

CONFIGS = {"qwen3": qwen3_config, "glm4": glm4_config}


def load(folder: Path, hosting: Hosting | None = None) -> HostedModel:
    return HostedModel.load(folder, hosting=hosting, device="cpu")


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes the tensors of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def rewrite_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_of_the_learner_is_hosted_exactly(tmp_path, family, sharded, dtype):
    learner = tiny_model(CONFIGS[family](), seed=1, dtype=dtype)
    model = load(save(learner, tmp_path, sharded=sharded))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == sharded
    assert (tmp_path / "model.safetensors.index.json").exists() == sharded
    wire = dict(to_wire(learner.state_dict().items()))
    hosted = dict(model.layout.state_dict(model.parameters))
    assert hosted.keys() == wire.keys()
    for name, tensor in hosted.items():
        assert torch.equal(tensor, wire[name].to(tensor.dtype)), name
        assert tensor.dtype == (torch.float32 if ".mlp.gate." in name else dtype), name


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("hosting", [Hosting(), Hosting(gate="trainer"), Hosting(dtype=torch.float32)])
def test_the_version_is_that_of_the_tensors_in_the_files_whatever_they_are_hosted_in(
    tmp_path, family, sharded, hosting
):
    model = load(save(tiny_model(CONFIGS[family](), seed=1, dtype=torch.bfloat16), tmp_path, sharded=sharded), hosting)
    files = [load_file(file) for file in tmp_path.glob("*.safetensors")]
    published = {name: tensor for file in files for name, tensor in file.items()}
    assert model.wire_dtypes == {name: tensor.dtype for name, tensor in published.items()}
    assert set(model.wire_dtypes.values()) >= {torch.bfloat16}
    assert model.version("run").digest == Digest.total(tensor_digest(*entry) for entry in published.items())
    model.parameters["norm.weight"][0] += 1
    assert model.version("run").digest != Digest.total(tensor_digest(*entry) for entry in published.items())


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_a_narrower_checkpoint_is_widened_exactly(tmp_path, narrow):
    learner = tiny_model(qwen3_config(), seed=1, dtype=narrow)
    model = load(save(learner, tmp_path), Hosting(dtype=torch.float32))
    wire = dict(to_wire(learner.state_dict().items()))
    for name, tensor in model.layout.state_dict(model.parameters):
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, wire[name].float()), name


def test_an_fp32_checkpoint_is_not_rounded_to_a_bf16_host(tmp_path):
    folder = save(tiny_model(qwen3_config(), seed=1), tmp_path)
    with pytest.raises(CheckpointError, match="cannot be hosted as bfloat16 without loss") as caught:
        load(folder, Hosting(dtype=torch.bfloat16))
    assert "model.embed_tokens.weight: dtype F32" in str(caught.value)
    assert "mlp.gate.weight" not in str(caught.value)  # hosted in fp32 in RL mode


def test_every_tensor_that_does_not_fit_is_named_in_one_error_and_nothing_is_written(tmp_path):
    folder = save(tiny_model(qwen3_config(), seed=1), tmp_path)
    gone, odd = "model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.0.self_attn.k_proj.weight"

    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors[gone]
        tensors[odd] = tensors[odd][:-1].contiguous()
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        tensors["model.layers.2.input_layernorm.weight"] = torch.zeros(32)

    rewrite(folder, damage)
    spec = decoder_spec(read_config(folder))
    parameters = allocate(spec, "cpu")
    for parameter in parameters.values():
        parameter.fill_(7)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder, spec, hosted_layout(spec, parameters), parameters)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert sorted(lines) == sorted(
        [
            f"{gone}: missing",
            f"{odd}: shape [15, 32], expected [16, 32]",
            "model.norm.weight: dtype I32 cannot be hosted as float32 without loss; "
            "host the model in the checkpoint's dtype",
            "model.layers.0.self_attn.rotary_emb.inv_freq: unknown, the model has no such tensor",
            "model.layers.2.input_layernorm.weight: unknown, the model has no such tensor",
        ]
    )
    assert str(folder) in str(caught.value)
    assert all((parameter == 7).all() for parameter in parameters.values())
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_layers_for_multi_token_prediction_are_left_out_as_many_as_the_config_names(tmp_path):
    folder = save(tiny_model(glm4_config(), seed=1), tmp_path)
    rewrite(folder, lambda tensors: tensors.update({"model.layers.2.eh_proj.weight": torch.zeros(3, 3)}))
    assert "model.layers.2.eh_proj.weight" not in load(folder).layout
    rewrite(folder, lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.zeros(3, 3)}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.eh_proj\.weight: unknown"):
        load(folder)


def test_a_tied_head_that_equals_the_embedding_is_dropped(tmp_path):
    folder = save(tiny_model(qwen3_config(tie_word_embeddings=True), seed=1), tmp_path)
    before = load(folder)
    assert "lm_head.weight" not in before.parameters
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    after = load(folder)
    assert after.parameters.keys() == before.parameters.keys()
    for name, tensor in after.parameters.items():
        assert torch.equal(tensor, before.parameters[name])


def test_a_tied_head_that_differs_from_the_embedding_is_refused(tmp_path):
    folder = save(tiny_model(qwen3_config(tie_word_embeddings=True), seed=1), tmp_path)
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(folder)


def test_an_untied_model_needs_its_head(tmp_path):
    folder = save(tiny_model(qwen3_config(tie_word_embeddings=True), seed=1), tmp_path)
    rewrite_config(folder, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: missing"):
        load(folder)


def test_a_tensor_that_stands_in_two_shards_is_refused(tmp_path):
    folder = save(tiny_model(qwen3_config(), seed=1), tmp_path, sharded=True)
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file(load_file(second) | {name: tensors[name]}, second)
    with pytest.raises(CheckpointError, match=f"{name}: stands in more than one file"):
        load(folder)


def test_a_shard_that_is_gone_is_named(tmp_path):
    folder = save(tiny_model(qwen3_config(), seed=1), tmp_path, sharded=True)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        load(folder)


def test_a_truncated_file_is_named(tmp_path):
    folder = save(tiny_model(qwen3_config(), seed=1), tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read as safetensors"):
        load(folder)


def test_a_file_that_is_cut_between_its_check_and_its_reading_is_named(tmp_path, monkeypatch):
    folder = save(tiny_model(qwen3_config(), seed=1), tmp_path)
    honest = ParallelReader.read

    def cut_first(reader: ParallelReader, wanted: Iterable[Wanted]) -> Reading:
        os.truncate(folder / "model.safetensors", 20_000)
        return honest(reader, wanted)

    monkeypatch.setattr(ParallelReader, "read", cut_first)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*it ended at byte 20000 while it was read"):
        load(folder)


def test_parameters_made_for_inference_are_loaded_too(tmp_path):
    learner = tiny_model(qwen3_config(), seed=1)
    folder = save(learner, tmp_path)
    spec = decoder_spec(read_config(folder))
    with torch.inference_mode():
        parameters = allocate(spec, "cpu")
    layout = hosted_layout(spec, parameters)
    load_checkpoint(folder, spec, layout, parameters)
    wire = dict(to_wire(learner.state_dict().items()))
    assert all(torch.equal(tensor, wire[name]) for name, tensor in layout.state_dict(parameters))


@pytest.mark.gpu
@pytest.mark.parametrize("hosting", [{}, {"dtype": torch.float32}])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_on_a_gpu_has_the_bits_of_its_files(tmp_path, sharded, hosting):
    folder = save(tiny_model(qwen3_config(), seed=1, dtype=torch.bfloat16), tmp_path, sharded=sharded)
    model = HostedModel.load(folder, hosting=Hosting(platform="cuda", **hosting), device="cuda")
    files = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    hosted = dict(model.layout.state_dict(model.parameters))
    assert hosted.keys() == files.keys()
    for name, tensor in hosted.items():
        assert torch.equal(tensor.cpu(), files[name].to(tensor.dtype)), name


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {"a": "../b.safetensors"}}', "{", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_named(tmp_path, index):
    folder = save(tiny_model(qwen3_config(), seed=1), tmp_path, sharded=True)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        load(folder)


def test_a_folder_without_weights_says_what_it_lacks(tmp_path):
    folder = save(tiny_model(qwen3_config(), seed=1), tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        load(folder)


@pytest.mark.parametrize("content", [None, "[1]", "{"])
def test_a_config_that_cannot_be_read_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(tmp_path)


def test_unsupported_keys_are_refused_before_any_tensor_is_read(tmp_path):
    folder = save(tiny_model(qwen3_config(), seed=1), tmp_path)
    rewrite_config(folder, quantization_config={"quant_method": "awq"}, hidden_act="relu")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"hidden_act='relu'.*quantization_config="):
        load(folder)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, {}, []),
        (None, {"eos_token_id": 3}, [3]),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 3}, [5, 6]),
        ({"eos_token_id": None}, {"eos_token_id": 0}, [0]),
        ({}, {"eos_token_id": []}, []),
    ],
)
def test_what_ends_a_sequence_is_what_the_generation_config_says_or_else_the_config(
    tmp_path, generation, config, expected
):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert end_of_sequence_ids(tmp_path) == set(expected)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read as JSON: Expecting property name"),
        ("\xff", "cannot be read as JSON: "),
        ("[1]", r"expected a JSON object, got \[1\]"),
        ("null", "expected a JSON object, got null"),
        (
            '{"eos_token_id": [1, "2", true, -1]}',
            r"eos_token_id=\[1, '2', True, -1\]: expected a token id .* or null; not one: '2', True, -1",
        ),
        ('{"eos_token_id": 1.5}', "eos_token_id=1.5: expected a token id .*; not one: 1.5"),
    ],
)
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_an_end_of_sequence_that_cannot_be_read_names_the_file_and_the_offender(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=rf"/{name}: {says}"):
        end_of_sequence_ids(tmp_path)
