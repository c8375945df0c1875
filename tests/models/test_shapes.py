"""The built-in shapes are those of the published models."""

import json
import pathlib

import pytest

from mezo_scale.errors import ModelError, RecipeError
from mezo_scale.models.shapes import SHAPES, config_of, skeleton

PARAMETERS = {  # tied tables once, as the models' cards and checkpoints count them
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "opt-2.7b": 2_651_596_800,
    "opt-6.7b": 6_658_473_984,
    "opt-13b": 12_853_473_280,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "roberta-base": 124_697_433,
    "roberta-large": 355_412_057,
    "smollm2-135m": 134_515_008,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_parameters_of_the_published_model(name: str) -> None:
    assert sum(parameter.numel() for parameter in skeleton(config_of(name)).parameters()) == PARAMETERS[name]


def test_a_model_may_be_called_as_on_the_hub() -> None:
    assert config_of("facebook/opt-66b").to_dict() == config_of("OPT-66B").to_dict()
    assert config_of("random:opt-66b").to_dict() == config_of("opt-66b").to_dict()


def test_a_folder_or_its_configuration_will_do(tmp_path: pathlib.Path) -> None:
    config_of("qwen3-4b").save_pretrained(tmp_path)
    for name in (tmp_path, tmp_path / "config.json"):
        assert config_of(str(name)).num_hidden_layers == 36


def test_a_slip_is_answered_without_a_network() -> None:
    with pytest.raises(
        RecipeError, match=r"no model opt-60b; did you mean opt-66b\? Expected one of opt-125m, .*qwen3"
    ):
        config_of("opt-60b")


def test_an_unknown_name_is_answered_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match=r"nobody/nothing is no model.*expected one of opt-125m, .*qwen3-32b"):
        config_of("nobody/nothing")


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (None, RecipeError, "there is no .*config.json"),
        ("{", RecipeError, "no configuration of a model"),
        ("{}", RecipeError, "no configuration of a model .*model_type"),
        ('{"model_type": "opt-x"}', ModelError, "model_type 'opt-x', which"),
        ('{"model_type": "bert"}', None, ""),
        ('{"model_type": "clip"}', ModelError, "is a clip model, expected a causal or a masked language model"),
        ('{"model_type": "opt", "quantization_config": {"quant_method": "gptq", "bits": 4}}', ModelError, "quantised"),
    ],
)
def test_a_bad_configuration_is_named(
    tmp_path: pathlib.Path, text: str | None, error: type[Exception] | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    if error is None:
        assert config_of(str(tmp_path)).model_type == json.loads(text or "")["model_type"]
        return
    with pytest.raises(error, match=message):
        config_of(str(tmp_path))
