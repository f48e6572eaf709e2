"""config.json of a Qwen3 in both spellings, and what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from support.qwen3_folder import MOE, SMALL

from poweropd_megatron.errors import InputError
from poweropd_megatron.models.families import read_model_config
from poweropd_megatron.models.model_config import ExpertsConfig, ModelConfig

SETTING = "student.path"
MISSING = ...


def write_config(folder: Path, **changes: Any) -> Path:
    config = {k: v for k, v in (SMALL | changes).items() if v is not MISSING}
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


@pytest.mark.parametrize(
    "spelling",
    [
        {},
        {"rope_scaling": None},
        {
            "rope_theta": MISSING,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
            "torch_dtype": MISSING,
            "dtype": "bfloat16",
        },
    ],
    ids=["old", "old with null", "transformers-5"],
)
def test_both_spellings_give_megatrons_names(tmp_path: Path, spelling: dict[str, Any]) -> None:
    write_config(tmp_path, **spelling)
    assert read_model_config(tmp_path, setting=SETTING) == ModelConfig(
        model_type="qwen3",
        num_layers=2,
        hidden_size=48,
        ffn_hidden_size=80,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        vocab_size=53,
        max_position_embeddings=128,
        layernorm_epsilon=1e-5,
        rotary_base=5000.0,
        tie_word_embeddings=False,
        qk_layernorm=True,
    )


def test_embeddings_are_untied_unless_it_says_so_and_real_numbers_may_be_integers(
    tmp_path: Path,
) -> None:
    write_config(tmp_path, tie_word_embeddings=MISSING, rope_theta=1000000, rms_norm_eps=1)
    config = read_model_config(tmp_path, setting=SETTING)
    assert config.tie_word_embeddings is False
    assert (config.rotary_base, config.layernorm_epsilon) == (1e6, 1.0)
    assert isinstance(config.layernorm_epsilon, float)


@pytest.mark.parametrize(
    "spelling",
    [
        {},
        {"num_experts": MISSING, "num_local_experts": 4, "mlp_only_layers": None},
        {"decoder_sparse_step": MISSING, "mlp_only_layers": MISSING},
    ],
    ids=["old", "transformers-5", "defaults left out"],
)
def test_both_spellings_of_experts_give_megatrons_names(
    tmp_path: Path, spelling: dict[str, Any]
) -> None:
    write_config(tmp_path, **(MOE | spelling))
    assert read_model_config(tmp_path, setting=SETTING).experts == ExpertsConfig(
        num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=24, norm_topk_prob=True
    )


def test_weights_of_experts_are_not_scaled_to_one_unless_it_says_so(tmp_path: Path) -> None:
    write_config(tmp_path, **(MOE | {"norm_topk_prob": MISSING}))
    experts = read_model_config(tmp_path, setting=SETTING).experts
    assert experts is not None
    assert experts.norm_topk_prob is False


def test_the_bundled_models_are_read(student_folder: Path, teacher_folder: Path) -> None:
    student = read_model_config(student_folder, setting=SETTING)
    assert student == read_model_config(teacher_folder, setting="teacher.path")
    assert (student.num_layers, student.hidden_size, student.kv_channels) == (4, 64, 32)
    assert student.tie_word_embeddings


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "gpt2"}, "has model_type 'gpt2'; supported are 'llama', 'qwen3'"),
        ({"model_type": "qwen2_moe"}, "has model_type 'qwen2_moe'"),
        ({"model_type": MISSING}, "has model_type None"),
        ({"model_type": ["qwen3"]}, r"has model_type \['qwen3'\]"),
        (
            {"tie_word_embeddings": "false"},
            "tie_word_embeddings is 'false', expected true or false",
        ),
        (MOE | {"norm_topk_prob": 1}, "norm_topk_prob is 1, expected true or false"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types has 'sliding_attention', which is not supported",
        ),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention', expected a list"),
        ({"compression_config": {"format": "int"}}, "compression_config = .* is not supported"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "full_attention": {"rope_type": "yarn"}}},
            "rope_parameters.full_attention, rotary angles by kind, are not supported",
        ),
        ({"dtype": "bfloat16"}, "torch_dtype is 'float32', but dtype 'bfloat16': remove one"),
        (MOE | {"num_local_experts": 8}, "num_experts is 4, but num_local_experts 8: remove one"),
        (
            {"rope_parameters": {"rope_theta": 1e6}},
            "rope_theta is 5000.0, but elsewhere 1000000.0: remove one",
        ),
        (
            {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_type": "yarn"}},
            "rope_type = 'yarn' is not supported",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type = 'yarn' is not supported"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_type = 'linear' is not supported",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "rope_type = 'yarn' is not supported",
        ),
        ({"rope_scaling": ["x"]}, r"rope_scaling is \['x'\], expected an object"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected an object"),
        (
            {"rope_theta": MISSING, "rope_parameters": ["x"]},
            r"rope_parameters is \['x'\], expected an object",
        ),
        ({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .* is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"rope_theta": MISSING}, "has neither rope_theta nor rope_parameters.rope_theta"),
        ({"rope_theta": "10000"}, "rope_theta is '10000', expected a finite number above 0"),
        ({"rope_theta": -1}, "rope_theta is -1, expected a finite number above 0"),
        ({"rope_theta": 0}, "rope_theta is 0, expected a finite number above 0"),
        ({"rope_theta": math.inf}, "rope_theta is inf, expected a finite number above 0"),
        (
            {"rope_theta": MISSING, "rope_parameters": {"rope_theta": -5.0}},
            "rope_theta is -5.0, expected a finite number above 0",
        ),
        ({"num_hidden_layers": MISSING}, "num_hidden_layers is None, expected an integer above 0"),
        ({"hidden_size": "48"}, "hidden_size is '48', expected an integer above 0"),
        ({"vocab_size": True}, "vocab_size is True, expected an integer above 0"),
        ({"num_attention_heads": 4.0}, "num_attention_heads is 4.0, expected an integer above 0"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, expected an integer above 0"),
        ({"head_dim": MISSING}, "head_dim is None, expected an integer above 0"),
        ({"head_dim": "16"}, "head_dim is '16', expected an integer above 0"),
        ({"head_dim": -16}, "head_dim is -16, expected an integer above 0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0, expected a finite number above 0"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan, expected a finite number above 0"),
        ({"rms_norm_eps": MISSING}, "rms_norm_eps is None, expected a finite number above 0"),
        (MOE | {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\] is not supported"),
        (MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported"),
        (MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step = 0 is not supported"),
        (MOE | {"num_experts": MISSING}, "num_experts is None, expected an integer above 0"),
        (MOE | {"num_experts": 0}, "num_experts is 0, expected an integer above 0"),
        (MOE | {"num_experts_per_tok": 5}, "num_experts_per_tok is 5, more than the 4 experts"),
        (MOE | {"num_experts_per_tok": 1}, "num_experts_per_tok is 1 and norm_topk_prob is true"),
        (MOE | {"moe_intermediate_size": MISSING}, "moe_intermediate_size is None, expected an"),
    ],
    ids=str,
)
def test_what_is_no_known_qwen3_is_refused_with_the_setting_the_file_and_the_field(
    tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    file = write_config(tmp_path, **changes)
    with pytest.raises(InputError, match=rf"^{SETTING}: {file}:? {problem}"):
        read_model_config(tmp_path, setting=SETTING)


def test_a_missing_folder_or_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"^{SETTING}: {tmp_path}/none is not a folder$"):
        read_model_config(tmp_path / "none", setting=SETTING)
    with pytest.raises(InputError, match=rf"^{SETTING}: {tmp_path}/config.json is missing"):
        read_model_config(tmp_path, setting=SETTING)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "can't be read as JSON"),
        (b"\xff\xfe{}", "can't be read as JSON"),
        (b"[]", "holds a list, expected an object"),
    ],
)
def test_a_config_that_is_no_json_object_is_named(
    tmp_path: Path, content: bytes, problem: str
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"^{SETTING}: {tmp_path}/config.json {problem}"):
        read_model_config(tmp_path, setting=SETTING)
