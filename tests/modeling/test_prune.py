"""Fewer layers: what is kept, that the folder is read back as the model that was cut, and that no folder is harmed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdflow.cli import main
from kdflow.errors import ConfigError
from kdflow.modeling import load_causal_lm, prune_layers, prune_model
from kdflow.modeling.prune import kept_layers

SHAPE = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 5}
HEADS = {**SHAPE, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
MODELS = {
    "gpt2": {"vocab_size": 50, "n_embd": 16, "n_layer": 5, "n_head": 2, "n_positions": 32},
    "opt": {**SHAPE, "num_attention_heads": 2, "ffn_dim": 16, "word_embed_proj_dim": 16},
    "gpt_oss": {
        **HEADS,
        "layer_types": [SLIDING, FULL, FULL, SLIDING, FULL],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "smollm3": {**HEADS, "no_rope_layers": [1, 1, 0, 1, 1], "pad_token_id": 0},
    "qwen3_moe": {**HEADS, **EXPERTS, "mlp_only_layers": [1, 4]},
    "deepseek_v3": {
        **SHAPE,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 8,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 2,
    },
    "qwen3_next": {
        **HEADS,
        **EXPERTS,
        "shared_expert_intermediate_size": 8,
        "layer_types": [LINEAR, LINEAR, FULL, LINEAR, FULL],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
    },
}


def make(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **MODELS[kind]), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def test_kept_layers() -> None:
    assert kept_layers(30, 10) == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
    assert kept_layers(4, 4) == [0, 1, 2, 3]
    assert kept_layers(7, 1) == [0]


def test_prune_keeps_embeddings_and_spaced_layers(tiny: Path, tmp_path: Path) -> None:
    full = load_causal_lm(str(tiny / "teacher"), torch.float32)
    weights = {name: w.clone() for name, w in full.state_dict().items()}
    prune_layers(full, 3).save_pretrained(tmp_path)
    cut = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert cut.config.num_hidden_layers == 3
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 3
    assert torch.equal(cut.model.embed_tokens.weight, weights["model.embed_tokens.weight"])
    for new, old in enumerate(kept_layers(4, 3)):
        name = "mlp.down_proj.weight"
        assert torch.equal(cut.model.layers[new].mlp.down_proj.weight, weights[f"model.layers.{old}.{name}"])
        assert cut.model.layers[new].self_attn.layer_idx == new
    with pytest.raises(ConfigError, match="expected 1 to 3, got 4"):
        prune_layers(full, 4)


@pytest.mark.parametrize("num_kept", [3, 2, 1])
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_written_is_read_back(tmp_path: Path, kind: str, num_kept: int) -> None:
    """Whatever the config tells of each layer goes with the layers: same tensors, same logits."""
    cut = prune_layers(make(kind), num_kept)
    cut.save_pretrained(tmp_path)
    again, told = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(told.values()), told
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids, use_cache=False).logits, cut(ids, use_cache=False).logits)


def test_kinds_of_layers_go_with_them() -> None:
    assert prune_layers(make("gpt_oss"), 3).config.layer_types == [SLIDING, FULL, FULL]
    assert prune_layers(make("qwen3_next"), 2).config.layer_types == [LINEAR, FULL]
    assert prune_layers(make("smollm3"), 3).config.no_rope_layers == [1, 0, 1]
    assert prune_layers(make("qwen3_moe"), 3).config.mlp_only_layers == [2]
    assert prune_layers(make("deepseek_v3"), 3).config.first_k_dense_replace == 1


def test_layers_that_the_config_cannot_tell() -> None:
    """Every second layer has experts; of layers 0, 2 and 4 none has, and of what is left every second one would."""
    config = AutoConfig.for_model("qwen3_moe", **HEADS, **EXPERTS, decoder_sparse_step=2)
    with pytest.raises(ConfigError, match=r"cannot tell that these layers were kept \(.* tensors would differ, model"):
        prune_layers(AutoModelForCausalLM.from_config(config), 3)


def prune(monkeypatch: pytest.MonkeyPatch, model: Path | str, output: Path | str) -> int:
    monkeypatch.setattr(sys, "argv", ["kdflow", "prune", str(model), "--num_layers", "2", "--output", str(output)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_command(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new/below", "empty"):
        assert prune(monkeypatch, tiny / "teacher", tmp_path / name) == 0
        assert f"{tmp_path / name}: 2 layers, 0 million parameters" in capsys.readouterr().out
        assert AutoModelForCausalLM.from_pretrained(tmp_path / name).config.num_hidden_layers == 2
        assert (tmp_path / name / "tokenizer.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "new"]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("way", ["itself", "relative", "link"])
def test_the_model_is_not_written_over(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, way
) -> None:
    model = tmp_path / "model"
    load_causal_lm(str(tiny / "teacher"), torch.float32).save_pretrained(model)
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    before = contents(model)
    output = {"itself": model, "relative": "elsewhere/../model", "link": tmp_path / "link"}[way]
    assert prune(monkeypatch, model, output) == 1
    assert f"{output} is not empty: choose another --output, or remove it" in capsys.readouterr().err
    assert contents(model) == before


def test_what_is_there_is_not_written_over(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("kept")
    for output, message in (
        ("file", "cannot be used (Not a directory): choose another --output, or remove it"),
        ("folder", "is not empty: choose another --output, or remove it"),
        ("file/below", "was not written"),
    ):
        assert prune(monkeypatch, tiny / "teacher", tmp_path / output) == 1
        assert f"{tmp_path / output} {message}" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "notes").read_text() == "kept"


CUT = """
import resource, signal, sys
import kdflow.modeling
signal.signal(signal.SIGXFSZ, {action})
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
kdflow.modeling.prune_model(sys.argv[1], 2, sys.argv[2])
"""


@pytest.mark.parametrize("action", ["signal.SIG_DFL", "signal.SIG_IGN"])
def test_a_prune_that_is_cut_leaves_no_folder(tiny: Path, tmp_path: Path, action: str) -> None:
    """Killed in the middle of the weights, or told that no more can be written; the next one goes well."""
    output = tmp_path / "output"
    command = [sys.executable, "-c", CUT.format(action=action), str(tiny / "teacher"), str(output)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert not output.exists()
    if action == "signal.SIG_DFL":
        assert ended.returncode == -signal.SIGXFSZ
        assert (tmp_path / "writing-output").is_dir()
    else:
        assert f"CheckpointError: {output} was not written" in ended.stderr
    prune_model(str(tiny / "teacher"), 2, str(output))
    assert len({path.stat().st_mode for path in output.iterdir()}) == 1, "whoever may read one may read all"
    assert [path.name for path in tmp_path.iterdir()] == ["output"]
