"""Router: rows of equal norm at initialization, and balance over the global batch, the same for every split of it."""

from typing import Any

import torch

from megatron_q3n.config import validate


def test_rows_start_with_one_norm(alone: Any) -> None:
    from megatron_q3n.model.build import build_model
    from megatron_q3n.model.moe.router import routers_of

    for normalized in (True, False):
        config = validate({"model": {"moe_router_normalized_init": normalized}})
        (model,) = build_model(config, "torch", alone[1].groups)
        for router in routers_of([model]).values():
            norms = router.weight.norm(dim=1)
            same = torch.allclose(norms, torch.full_like(norms, 0.02 * 128**0.5), rtol=1e-5)
            assert same == normalized


def test_balance_does_not_depend_on_micro_batches(alone: Any) -> None:
    """Three steps with 1, 2 and 4 micro-batches: the same losses, loads and gradient norms."""
    from megatron_q3n.data.batch import causal_batch
    from megatron_q3n.training.state import build_state
    from megatron_q3n.training.step import train_step

    tokens = torch.randint(0, 512, (3, 4, 65), generator=torch.Generator().manual_seed(5))
    results = []
    for size in (4, 2, 1):
        training = {"micro_batch_size": size, "global_batch_size": 4, "sequence_length": 64}
        state = build_state(validate({"training": training, "model": {"moe_aux_loss_coeff": 0.1}}), *alone)
        weights = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in state.models[0].parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=weights) * 0.05)
        steps = []
        for rows in tokens:
            batches = [
                causal_batch(part[:, :-1], part[:, 1:].contiguous(), torch.ones(size, 64)) for part in rows.split(size)
            ]
            report = train_step(state, batches)
            steps.append([report.loss, report.grad_norm, *report.balance_losses.values(), *report.mtp_losses])
        results.append(torch.tensor(steps))
    for split in results[1:]:
        torch.testing.assert_close(split, results[0], rtol=1e-5, atol=0)


def test_rows_of_one_norm_spread_text_more_evenly(alone: Any) -> None:
    """Real text, 64 experts, three seeds: the load is nearer to 1 and the routing nearer to uniform.

    tools/studies/router_balance.py prints the statistics for any model. With few experts, or wide rows, whose norms
    hardly differ, the effect is smaller than that of frequent tokens.
    """
    from megatron_q3n.data.pretrain import build_pretrain_data
    from tools.studies.router_balance import FIGURES, initial_loads

    size = {"num_moe_experts": 64, "moe_router_topk": 4, "hidden_size": 64, "embedding_init_method_std": 1.0}
    config = validate({"model": size, "training": {"sequence_length": 256}})
    text = torch.stack([torch.as_tensor(row[:-1]) for row in build_pretrain_data(config).train_sample_tokens(8)])
    figures = {}
    for normalized in (False, True):
        config = validate({"model": size | {"moe_router_normalized_init": normalized}})
        loads = [load for seed in range(3) for load in initial_loads(config, seed, text, alone)]
        assert len(loads) == 3 * 4
        for name, figure in FIGURES.items():
            figures[name, normalized] = sum(map(figure, loads)) / len(loads)
    print({f"{name}, {'one norm' if one else 'plain'}": f"{x:.4f}" for (name, one), x in figures.items()})
    assert 1 < figures["fullest / mean", True] < figures["fullest / mean", False]
    assert 1 > figures["emptiest / mean", True] > figures["emptiest / mean", False]
    entropy = "entropy / log(experts)"
    assert 0.98 < figures[entropy, True] < 1
    assert figures[entropy, True] > figures[entropy, False]


def gradients_over(state: Any, tokens: torch.Tensor, size: int) -> dict[str, torch.Tensor]:
    """Run a step that changes no weight, in micro-batches of `size` rows; return every gradient."""
    from megatron_q3n.data.batch import causal_batch
    from tests.model.test_packing import gradients_of

    batches = [
        causal_batch(rows[:, :-1], rows[:, 1:].contiguous(), torch.ones(size, rows.shape[1] - 1))
        for rows in tokens.split(size)
    ]
    return gradients_of(state, batches)[1]


def test_balance_in_a_micro_batch_is_that_of_its_own_tokens(alone: Any) -> None:
    """aux_loss: the mean of the reference's loss over micro-batches, which differs from that of the whole batch."""
    from megatron_q3n import hf
    from megatron_q3n.training.state import build_state
    from tests.model.reference.test_model import reference

    size = {"mixer_pattern": "*", "num_layers": 2, "mtp_num_layers": 0, "moe_aux_loss_coeff": 1.0}
    model = size | {"moe_router_load_balancing_type": "aux_loss"}
    training = {"micro_batch_size": 2, "global_batch_size": 4, "sequence_length": 40}
    config = validate({"model": model, "training": training})
    state, exact = build_state(config, *alone), reference(config.model)
    state.models[0].load_state_dict(hf.to_megatron(exact.state_dict(), config.model), strict=False)
    tokens = torch.randint(0, 512, (4, 41), generator=torch.Generator().manual_seed(5))
    gradients = gradients_over(state, tokens, 2)

    def reference_gradients(rows: int) -> dict[str, torch.Tensor]:
        exact.zero_grad()
        for part in tokens.split(rows):
            (exact(part[:, :-1], part[:, 1:]).loss * rows / 4).backward()
        published = {name: p.grad for name, p in exact.named_parameters()}
        return hf.to_megatron(published, config.model, gradients=True)

    by_micro_batch, by_batch = reference_gradients(2), reference_gradients(4)
    for name, gradient in gradients.items():
        largest = by_micro_batch[name].abs().max()
        assert (gradient - by_micro_batch[name]).abs().max() < 1e-3 * largest, name
        if name.endswith("router.weight"):
            assert (gradient - by_batch[name]).abs().max() > 0.01 * largest, name


def test_bias_selects_experts_and_does_not_change_gates(alone: Any) -> None:
    """Logits and gradients are the reference's, which uses the bias in the top-k selection only."""
    from megatron_q3n import hf
    from megatron_q3n.model.build import build_model
    from megatron_q3n.model.moe.router import routers_of
    from tests.model.reference.test_model import reference

    size = {"mixer_pattern": "*", "num_layers": 2, "mtp_num_layers": 0, "moe_aux_loss_coeff": 0}
    config = validate({"model": size | {"moe_router_enable_expert_bias": True}})
    exact = reference(config.model)
    (model,) = build_model(config, "torch", alone[1].groups)
    model.load_state_dict(hf.to_megatron(exact.state_dict(), config.model), strict=False)
    tokens = torch.randint(0, 512, (1, 41), generator=torch.Generator().manual_seed(5))
    plain = exact(tokens[:, :-1]).logits_BTV
    for layer, router in zip(exact.model.layers, routers_of([model]).values()):
        assert not router.expert_bias.any()
        router.expert_bias.copy_(torch.randn(8, generator=torch.Generator().manual_seed(7)) * 3)
        layer.mlp.expert_bias_E.copy_(router.expert_bias)
    expected = exact(tokens[:, :-1], tokens[:, 1:])
    assert (expected.logits_BTV - plain).abs().max() > 0.1
    expected.loss.backward()
    positions = torch.arange(40)[None]
    losses = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous())
    losses.mean().backward()
    published = {name: p.grad for name, p in exact.named_parameters()}
    gradients = hf.to_megatron(published, config.model, gradients=True)
    for name, parameter in model.named_parameters():
        error = (parameter.grad - gradients[name]).abs().max()
        assert error < 1e-3 * gradients[name].abs().max(), name
    with torch.no_grad():
        logits = model.eval()(tokens[:, :-1], positions, None)
    torch.testing.assert_close(logits, expected.logits_BTV.float().detach(), rtol=0, atol=1e-4)


def test_bias_balances_without_a_loss(alone: Any) -> None:
    """The bias moves by the rate towards the mean of the global batch's counts, is saved, and balances the load."""
    from megatron_q3n.data.batch import causal_batch
    from megatron_q3n.model.moe.router import routers_of
    from megatron_q3n.training.state import build_state
    from megatron_q3n.training.step import train_step

    model = {
        "mixer_pattern": "*",
        "num_layers": 1,
        "mtp_num_layers": 0,
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.01,
        "moe_aux_loss_coeff": 0,
        "moe_router_load_balancing_type": "none",
    }
    training = {"micro_batch_size": 2, "global_batch_size": 4, "sequence_length": 64}
    state = build_state(validate({"model": model, "training": training}), *alone)
    state.optimizer.step = lambda: (True, None, None)
    (router,) = routers_of(state.models).values()
    tokens = torch.randint(0, 512, (4, 65), generator=torch.Generator().manual_seed(5))
    batches = [causal_batch(rows[:, :-1], rows[:, 1:].contiguous(), torch.ones(2, 64)) for rows in tokens.split(2)]
    max_loads = []
    for _ in range(40):
        before = router.expert_bias.clone()
        (load,) = map(torch.tensor, train_step(state, batches).expert_load.values())
        torch.testing.assert_close(router.expert_bias - before, 0.01 * (1 / 8 - load).sign())
        max_loads.append(load.max().item() * 8)
    print(f"fullest / mean: {max_loads[0]:.3f} at first, {max_loads[-1]:.3f} after 40 steps")
    assert max_loads[-1] < 1.1 < max_loads[0]
    saved = state.models[0].sharded_state_dict()
    key = next(key for key in saved if key.endswith("expert_bias"))
    assert saved[key].data is router.expert_bias
    assert router.expert_bias.dtype == torch.float32
