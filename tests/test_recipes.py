"""Recipes: each composes, validates and follows the naming grammar; no file repeats a default.

Recipes are composed with Hydra's compose API, as megatron_q3n/recipe.py does. Not covered: that a recipe's data exists,
and that its hyperparameters are good.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from transformers import Qwen3NextConfig
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig

from megatron_q3n.config import ModelConfig, RunConfig, UserError, validate
from megatron_q3n.config.sizes import parameters
from megatron_q3n.planner import plan

RECIPES = Path(__file__).parent.parent / "recipes"
# pipelines and ablations are not recipes: tests/slurm/test_pipeline.py, tests/tools/test_ablation.py
OTHERS = ("pipeline-", "ablation-")
PRIMARY = sorted(path.stem for path in RECIPES.glob("*.yaml") if not path.stem.startswith(OTHERS))
PARTS = sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.glob("*/*.yaml"))
GROUPS = ("model", "data", "precision", "parallel", "stage")
# the model comes from the checkpoint, so the recipe's name has none
OF_ANY_MODEL = {"generate", "serve", "evaluate"}
# stages that begin from a checkpoint
FROM_CHECKPOINT = ("longcontext", "generate", "serve", "mtp", "evaluate")
REQUIRED = {"pretrain-tiny", "pretrain-small", "pretrain-80b_a3b", "longcontext-tiny"}
GLOBAL_PACKAGE = "# @package _global_"
DEFAULTS = RunConfig().model_dump(mode="json")


@pytest.fixture(scope="module", autouse=True)
def _hydra() -> Iterator[None]:
    ConfigStore.instance().store(name="base", node=DEFAULTS)
    with initialize_config_dir(str(RECIPES), version_base="1.3"):
        yield


def composed(recipe: str, *overrides: str) -> dict[str, Any]:
    return _plain(compose(recipe, overrides=list(overrides)))


def run_config(recipe: str, *overrides: str) -> RunConfig:
    """Validate a recipe, with the setting that it leaves to the user: the checkpoint to start from."""
    words = " ".join((recipe, *overrides))
    continues = any(stage in words for stage in FROM_CHECKPOINT)
    start = ["checkpoint.load=runs/latest"] if continues else []
    for stage, setting in (("sft", "sft.train"), ("rl", "rl.prompts")):
        # a stage part alone names no conversations
        if f"stage={stage}" in overrides:
            start.append(f"{setting}=[{{task: {{name: chain_sum}}}}]")
    return validate(composed(recipe, *start, *overrides))


def part_names(group: str) -> list[str]:
    return [part.split("/")[1] for part in PARTS if part.startswith(f"{group}/")]


def test_the_required_recipes_exist() -> None:
    assert set(PRIMARY) >= REQUIRED
    assert {part.split("/")[0] for part in PARTS} == set(GROUPS)


@pytest.mark.parametrize("recipe", PRIMARY)
def test_recipe_composes_and_validates_under_its_own_name(recipe: str) -> None:
    config = run_config(recipe)
    assert config.recipe == recipe
    assert plan(config).stages


def test_longer_context_requires_a_checkpoint() -> None:
    with pytest.raises(UserError, match=r"checkpoint\.load=RUN_DIR"):
        validate(composed("longcontext-tiny"))


@pytest.mark.parametrize("part", PARTS)
def test_every_part_can_be_chosen_on_the_command_line(part: str) -> None:
    group, name = part.split("/")
    run_config("pretrain-tiny", f"{group}={name}", "training.global_batch_size=64")


@pytest.mark.parametrize("recipe", PRIMARY)
def test_recipe_names_every_group_so_that_each_can_be_overridden(recipe: str) -> None:
    chosen = chosen_parts(_load(recipe))
    assert set(chosen) == set(GROUPS)
    assert all(f"{group}/{name}" in PARTS for group, name in chosen.items())


@pytest.mark.parametrize("recipe", [name for name in PRIMARY if name not in OF_ANY_MODEL])
def test_recipe_name_follows_the_grammar(recipe: str) -> None:
    assert grammar_complaint(recipe) is None
    stage, model, *_ = recipe.split("-")
    chosen = chosen_parts(_load(recipe))
    assert (chosen["stage"], chosen["model"]) == (stage, model)


@pytest.mark.parametrize(
    "name",
    ["tiny", "pretrain", "pretrain-huge", "dream-tiny", "pretrain-tiny-", "pretrain-tiny-Fast", "pretrain-tiny-a-b-c"],
)
def test_grammar_refuses(name: str) -> None:
    assert grammar_complaint(name)


def test_grammar_accepts_layout_and_modifier() -> None:
    for name in ("pretrain-80b_a3b-h100x32", "pretrain-80b_a3b-fp8", "pretrain-80b_a3b-h100x32-fp8"):
        assert grammar_complaint(name) is None


def grammar_complaint(name: str) -> str | None:
    """Check <stage>-<model>[-<layout>][-<modifier>]: the first two are recipe parts, with four words the third too."""
    words = name.split("-")
    if not 2 <= len(words) <= 4 or not all(re.fullmatch(r"[a-z0-9_]+", word) for word in words):
        return "two to four words of a-z, 0-9 and _, joined by -"
    if words[0] not in part_names("stage") or words[1] not in part_names("model"):
        return "begins with a stage and a model"
    if len(words) == 4 and words[2] not in part_names("parallel"):
        return "a layout comes before a modifier"
    return None


@pytest.mark.parametrize("part", PARTS)
def test_part_has_only_settings_that_differ_from_the_defaults(part: str) -> None:
    assert redundant(_placed(part), DEFAULTS) == []


@pytest.mark.parametrize("recipe", PRIMARY)
def test_recipe_has_only_settings_that_differ_from_its_parts(recipe: str) -> None:
    own = _load(recipe)
    parts = [f"{group}/{name}" for group, name in chosen_parts(own).items()]
    del own["defaults"]
    assert redundant(own, defaults_with_parts(parts)) == []


def test_a_redundant_line_is_found() -> None:
    below = {"training": {"steps": 1000, "seed": 1}, "recipe": "custom"}
    assert redundant({"training": {"steps": 1000, "seed": 2}}, below) == ["training.steps"]
    assert redundant({"recipe": "custom"}, below) == ["recipe"]
    assert redundant({"training": {"steps": 7, "unknown": 1}}, below) == []


def defaults_with_parts(parts: list[str]) -> dict[str, Any]:
    """Return the defaults merged with a recipe's parts: the settings that its own lines override."""
    return _plain(OmegaConf.merge(DEFAULTS, *(_placed(part) for part in parts)))


def redundant(own: dict[str, Any], below: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the settings of `own` that `below` already has with the same value."""
    found = []
    for name, value in own.items():
        if isinstance(value, dict) and isinstance(below.get(name), dict):
            found += redundant(value, below[name], f"{prefix}{name}.")
        elif name in below and below[name] == value:
            found.append(prefix + name)
    return found


def chosen_parts(recipe: dict[str, Any]) -> dict[str, str]:
    """Return {group: part} of a recipe's defaults list."""
    entries = [entry for entry in recipe["defaults"] if isinstance(entry, dict)]
    return {group: name for entry in entries for group, name in entry.items()}


def _placed(part: str) -> dict[str, Any]:
    """Return a part's settings under its folder's name, or at the top level if it declares `@package _global_`."""
    is_global = (RECIPES / f"{part}.yaml").read_text().startswith(GLOBAL_PACKAGE)
    return _load(part) if is_global else {part.split("/")[0]: _load(part)}


def _load(name: str) -> dict[str, Any]:
    return _plain(OmegaConf.load(RECIPES / f"{name}.yaml"))


def _plain(tree: Any) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(tree, resolve=True))


@pytest.mark.parametrize(
    ("part", "published"),
    [("80b_a3b", Qwen3NextConfig(max_position_embeddings=262144)), ("qwen3_5_35b_a3b", Qwen3_5MoeTextConfig())],
)
def test_published_models_have_their_published_dimensions(part: str, published: Any) -> None:
    """RoPE's base is not covered: transformers' classes default to 1e4, the released checkpoints have 1e7."""
    model = run_config("pretrain-tiny", f"model={part}").model
    mixers = {"linear_attention": "G", "full_attention": "*"}
    assert model.mixers == "".join(mixers[kind] for kind in published.layer_types)
    assert model.rotary_percent == published.rope_parameters["partial_rotary_factor"]
    ours = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.layernorm_epsilon,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "linear_num_key_heads": model.linear_num_key_heads,
        "linear_num_value_heads": model.linear_num_value_heads,
        "linear_key_head_dim": model.linear_key_head_dim,
        "linear_value_head_dim": model.linear_value_head_dim,
        "linear_conv_kernel_dim": model.linear_conv_kernel_dim,
        "num_experts": model.num_moe_experts,
        "num_experts_per_tok": model.moe_router_topk,
        "moe_intermediate_size": model.moe_ffn_hidden_size,
        "shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        "router_aux_loss_coef": model.moe_aux_loss_coeff,
    }
    assert ours == {name: getattr(published, name) for name in ours}


@pytest.mark.parametrize(
    ("part", "total", "active"),
    [("80b_a3b", 79.67e9, 3.87e9), ("qwen3_5_35b_a3b", 34.66e9, 3.5e9), ("small", 0.23e9, 41e6)],
)
def test_models_have_the_sizes_of_their_names(part: str, total: float, active: float) -> None:
    count = parameters(_model(part))
    assert count.total == pytest.approx(total, rel=0.01)
    assert count.active_with_embeddings == pytest.approx(active, rel=0.02)


def _model(part: str) -> ModelConfig:
    return run_config("pretrain-tiny", f"model={part}").model


def test_small_model_can_use_the_gpu_kernels() -> None:
    """The fused delta rule requires bf16 and heads of 128."""
    config = run_config("pretrain-small")
    assert config.model.linear_key_head_dim == config.model.linear_value_head_dim == 128
    assert config.precision.compute == "bf16"
    assert plan(config).fits


def test_80b_recipe_fits_32_h100() -> None:
    result = plan(run_config("pretrain-80b_a3b"))
    assert result.config.world_size == 32
    assert result.fits
    assert not plan(
        run_config("pretrain-80b_a3b", "training.recompute_granularity=null", "training.recompute_modules=[]")
    ).fits


def test_long_context_recipe_has_longer_sequences_a_smaller_rate_and_another_rope_base() -> None:
    short, long = (run_config("pretrain-tiny"), run_config("longcontext-tiny", "checkpoint.load=runs/latest"))
    assert long.training.sequence_length == 4 * short.training.sequence_length
    assert long.schedule.lr <= short.schedule.min_lr
    assert long.model.rotary_base > short.model.rotary_base
    assert long.model.model_copy(update={"rotary_base": short.model.rotary_base}) == short.model
    assert long.checkpoint.load == str(Path("runs/latest").absolute())
