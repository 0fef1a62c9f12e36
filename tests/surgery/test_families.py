"""Every family of the table, against the oracle: the full-length model with dropped tokens hidden from attention."""

import copy
import pickle

import pytest
import torch
from support.models import FAMILIES, build_model
from support.oracle import masked_logits
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from pss_composer import PatchSampler, apply_patch_sampling, remove_patch_sampling
from pss_composer.sampling import num_keep

every_family = pytest.mark.parametrize("name", FAMILIES)


def run(name, model, seed=1):
    return FAMILIES[name].run(model, FAMILIES[name].inputs(seed))


def silence_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def compare_gradients(model, expected):
    expected = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = expected[name].grad
        if gradient is None:
            assert parameter.grad is None
            continue
        scale = gradient.abs().max().clamp(min=1.0)
        torch.testing.assert_close(parameter.grad / scale, gradient / scale, atol=1e-5, rtol=1e-4, msg=name)


@every_family
@pytest.mark.parametrize("keep_rate", [0.2, 0.6, 0.8])
@pytest.mark.parametrize("sampler", ["magnitude", "l2_magnitude", "random"])
def test_equals_the_masked_full_model(name, sampler, keep_rate):
    model = build_model(name).eval()
    sampled = copy.deepcopy(model)
    patch_sampler = apply_patch_sampling(sampled, sampler=sampler, eval_keep_rate=keep_rate)
    logits = run(name, sampled)
    keep_indices = patch_sampler.keep_indices
    assert keep_indices.shape == (3, num_keep(keep_rate, 64, FAMILIES[name].num_prefix_tokens))
    expected = masked_logits(name, model, FAMILIES[name].inputs(1), keep_indices)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, run(name, model), atol=1e-3), "dropping tokens must change the logits"


@every_family
def test_gradients_equal_those_of_the_masked_full_model(name):
    model = silence_dropout(build_model(name))  # it would draw other numbers for the oracle
    sampled = copy.deepcopy(model)
    patch_sampler = apply_patch_sampling(sampled, keep_rate=0.5)
    run(name, sampled).square().sum().backward()
    masked_logits(name, model, FAMILIES[name].inputs(1), patch_sampler.keep_indices).square().sum().backward()
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert unused == {name for name, parameter in sampled.named_parameters() if parameter.grad is None}
    assert unused <= FAMILIES[name].unused
    for each in (model, sampled):
        for parameter_name, parameter in each.named_parameters():
            parameter.requires_grad_(parameter_name not in unused)
    compare_gradients(sampled, model)


@every_family
def test_at_keep_rate_one_outputs_and_gradients_are_bitwise_those_of_the_untouched_model(name):
    model = build_model(name)
    sampled = copy.deepcopy(model)
    apply_patch_sampling(sampled, keep_rate=1.0)
    outputs = []
    for each in (model, sampled):
        torch.manual_seed(0)
        logits = run(name, each)
        logits.square().sum().backward()
        outputs.append((logits, [p.grad for p in each.parameters() if p.grad is not None]))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(outputs[0][1], outputs[1][1], strict=True))


@every_family
def test_checkpoints_load_with_and_without(name):
    plain, sampled = build_model(name, seed=0), build_model(name, seed=1)
    apply_patch_sampling(sampled)
    assert list(sampled.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(sampled.state_dict(), strict=True)
    assert torch.equal(run(name, plain.eval()), run(name, sampled.eval()))
    sampled.load_state_dict(build_model(name, seed=2).state_dict(), strict=True)


@every_family
def test_applied_twice_equals_once(name):
    model = build_model(name).eval()
    once = apply_patch_sampling(model, eval_keep_rate=0.6)
    logits = run(name, model)
    twice = apply_patch_sampling(model, eval_keep_rate=0.6)
    assert twice is once
    assert torch.equal(run(name, model), logits)
    apply_patch_sampling(model, sampler="l2_magnitude", keep_rate=0.3, eval_keep_rate=0.4)
    assert (once.sampler, once.keep_rate, once.eval_keep_rate) == ("l2_magnitude", 0.3, 0.4)


def describe(model):
    """All that a module is, but for its weights."""
    return [(name, type(module), list(module._modules), sorted(module.__dict__)) for name, module in
            model.named_modules(remove_duplicate=False)]


@every_family
def test_removed_it_leaves_the_model_as_it_was(name):
    model, untouched = build_model(name).eval(), build_model(name).eval()
    apply_patch_sampling(model, eval_keep_rate=0.4)
    sampled = run(name, model)
    twin = copy.deepcopy(model)
    remove_patch_sampling(model)
    assert describe(model) == describe(untouched)
    assert repr(model) == repr(untouched)
    assert torch.equal(run(name, model), run(name, untouched))
    assert torch.equal(run(name, twin), sampled), "a copy keeps its sampler"
    remove_patch_sampling(twin)
    assert torch.equal(run(name, twin), run(name, untouched))
    apply_patch_sampling(model, eval_keep_rate=0.4)
    assert torch.equal(run(name, model), sampled)


@every_family
def test_copies_and_pickles_stand_alone(name):
    model = build_model(name).eval()
    apply_patch_sampling(model, eval_keep_rate=0.5)
    logits = run(name, model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(name, twin), logits)
        (sampler,) = {module for module in twin.modules() if isinstance(module, PatchSampler)}
        sampler.eval_keep_rate = 0.2
        assert not torch.equal(run(name, twin), logits)
        assert torch.equal(run(name, model), logits)


@every_family
@pytest.mark.parametrize("way", ["composer", "library"])
def test_checkpointing_recomputes_with_the_tokens_of_its_own_pass(name, way):
    """Passes with other tokens before the first backward: what recomputing must not see."""
    gradients = []
    for is_checkpointed in (False, True):
        model = silence_dropout(build_model(name))
        apply_patch_sampling(model, keep_rate=0.4)
        if is_checkpointed and way == "library":
            if FAMILIES[name].checkpoint is None:
                pytest.skip("the library has no activation checkpointing for it")
            FAMILIES[name].checkpoint(model)
        elif is_checkpointed:
            blocks = model.get_submodule(FAMILIES[name].blocks)
            for key, block in list(blocks.named_children()):
                setattr(blocks, key, checkpoint_wrapper(block, checkpoint_impl=CheckpointImpl.NO_REENTRANT))
        losses = [run(name, model, seed).square().sum() for seed in (1, 2, 3)]
        for loss in losses:
            loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-5)


def count_graph_breaks(name, model):
    inputs = FAMILIES[name].inputs(1)
    torch.compiler.reset()
    return torch._dynamo.explain(lambda: FAMILIES[name].run(model, inputs))().graph_break_count


def has_graph_break(name, model):
    try:
        run(name, torch.compile(model, backend="eager", fullgraph=True))
    except torch._dynamo.exc.Unsupported:
        return True
    finally:
        torch.compiler.reset()
    return False


@every_family
def test_compiles_without_a_graph_break(name):
    model = build_model(name).eval()
    torch.compiler.reset()
    if FAMILIES[name].breaks and has_graph_break(name, model):  # under newer versions it may not
        breaks_of_the_library = count_graph_breaks(name, model)
        apply_patch_sampling(model, eval_keep_rate=0.4)
        assert count_graph_breaks(name, model) == breaks_of_the_library
        return
    sampler = apply_patch_sampling(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for keep_rate in (0.4, 1.0):  # each another graph; more of them in test_surgery.py
        sampler.eval_keep_rate = keep_rate
        torch.testing.assert_close(run(name, compiled), run(name, model), atol=1e-5, rtol=1e-5)
