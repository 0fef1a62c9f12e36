"""Samplers, counts and the module, by hand; and the reference vectors."""

import copy
import json
import pickle
from functools import partial

import pytest
import torch
from safetensors import safe_open
from support.models import build_model, random_images
from support.paths import VECTORS
from timm.models.beit import Beit
from torch import nn

from pss_composer import PatchSampler, apply_patch_sampling
from pss_composer.pretraining.stratified import StratifiedSampler
from pss_composer.sampling import gather_tokens, num_keep, resolve_sampler

REFERENCE = safe_open(VECTORS / "pss_vit_vectors.safetensors", framework="pt")
CASES = sorted(key.removesuffix("/logits") for key in REFERENCE.keys() if key.endswith("/logits"))  # noqa: SIM118


def load_reference_model(name):
    config = json.loads(REFERENCE.metadata()[name])
    model = Beit(
        **{key: config[key] for key in ("img_size", "patch_size", "num_classes", "embed_dim", "depth", "num_heads",
                                        "qkv_bias", "init_values", "use_rel_pos_bias")},
        use_abs_pos_emb=config["use_abs_pos_emb"],
        global_pool="avg" if config["use_mean_pooling"] else "token",
    )
    prefix = f"{name}/weights/"
    weights = {k.removeprefix(prefix): REFERENCE.get_tensor(k) for k in REFERENCE.keys() if k.startswith(prefix)}  # noqa: SIM118
    model.load_state_dict(weights, strict=True)
    return model


@pytest.mark.parametrize("case", CASES)
def test_reference_vectors(case):
    name, sampler, keep_rate = case.split("/")
    model = load_reference_model(name)
    patch_sampler = apply_patch_sampling(model, sampler=sampler, keep_rate=float(keep_rate))
    logits = model(REFERENCE.get_tensor(f"{name}/input"))
    loss = torch.nn.functional.cross_entropy(logits, REFERENCE.get_tensor(f"{name}/target"))
    loss.backward()
    torch.testing.assert_close(logits, REFERENCE.get_tensor(f"{case}/logits"), atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, REFERENCE.get_tensor(f"{case}/loss"), atol=1e-5, rtol=0)
    if keep_rate == "1.0":
        assert patch_sampler.keep_indices is None
    else:
        kept = patch_sampler.kept_positions().sort(dim=1).values
        assert torch.equal(kept, REFERENCE.get_tensor(f"{case}/kept"))
    parameters = dict(model.named_parameters())
    gradients = [k for k in REFERENCE.keys() if k.startswith(f"{case}/grad/")]  # noqa: SIM118
    assert len(gradients) >= 4
    for key in gradients:
        gradient = parameters[key.removeprefix(f"{case}/grad/")].grad
        torch.testing.assert_close(gradient, REFERENCE.get_tensor(key), atol=1e-5, rtol=0)


def test_all_reference_cases_are_there():
    assert len(CASES) == 24


@pytest.mark.parametrize(("keep_rate", "expected"), [(0.2, 38), (0.4, 78), (0.6, 117), (0.8, 157), (1.0, 196)])
def test_num_keep_of_196_patches(keep_rate, expected):
    assert num_keep(keep_rate, 196, 1) == expected


def test_num_keep_counts_the_prefix_and_keeps_one():
    assert num_keep(0.5, 64, 0) == 32
    assert num_keep(0.5, 64, 2) == 31  # half of 66 tokens, less 2
    assert num_keep(0.01, 64, 5) == 1
    assert num_keep(1.0, 64, 5) == 64


def tokens_with_norms(l1, l2):
    """One image, tokens of two channels (a, b) with a + b = l1 and a² + b² = l2²."""
    l1, l2 = torch.tensor(l1), torch.tensor(l2)
    root = (2 * l2**2 - l1**2).sqrt()
    return torch.stack(((l1 + root) / 2, (root - l1) / 2), dim=-1).unsqueeze(0)


def test_magnitude_samplers_rank_by_their_norms():
    tokens = tokens_with_norms([3.0, 4.0, 2.0], [2.9, 2.83, 1.9])
    assert resolve_sampler("magnitude")(tokens, 1).tolist() == [[1]]
    assert resolve_sampler("l2_magnitude")(tokens, 1).tolist() == [[0]]
    assert sorted(resolve_sampler("magnitude")(tokens, 2)[0].tolist()) == [0, 1]


def test_magnitude_ranks_half_precision_tokens_in_full_precision():
    tokens = torch.ones(1, 3, 4096, dtype=torch.bfloat16)
    tokens[0, 1, 0] = 1.5  # 4096 and 4096.5 are the same bfloat16
    assert resolve_sampler("magnitude")(tokens, 1).tolist() == [[1]]


def test_random_draws_anew_for_every_image_and_pass_and_evenly():
    torch.manual_seed(0)
    tokens = torch.zeros(400, 10, 1)
    first, second = (resolve_sampler("random")(tokens, 3) for _ in range(2))
    assert not torch.equal(first, second)
    assert all(len(set(row)) == 3 for row in first.tolist())
    counts = torch.bincount(torch.cat((first, second)).flatten(), minlength=10)
    assert counts.sum() == 2400 and counts.min() > 180 and counts.max() < 300  # 240 ± 4 standard deviations


def test_gather_tokens():
    tokens = torch.arange(2 * 4 * 3.0).view(2, 4, 3)
    indices = torch.tensor([[3, 0], [1, 2]])
    expected = torch.stack((tokens[0, [3, 0]], tokens[1, [1, 2]]))
    assert torch.equal(gather_tokens(tokens, indices), expected)


def test_a_function_of_the_tokens_is_a_sampler():
    model = build_model("registers")
    seen = []

    def first_tokens(tokens, k):
        seen.append(tokens.shape)
        return torch.arange(k).expand(len(tokens), k)

    sampler = apply_patch_sampling(model, sampler=first_tokens, keep_rate=0.5)
    model(random_images())
    assert seen == [(3, 64, 32)]  # without the prefix
    assert sampler.keep_indices[0].tolist() == list(range(29))  # half of 69 tokens is 34, less 5


def test_the_whole_batch_is_returned_itself_at_one():
    tokens = torch.randn(2, 5, 3)
    sampler = PatchSampler(keep_rate=1.0)
    assert sampler(tokens) is tokens
    assert sampler.keep_indices is None and sampler.num_tokens == 5


def test_evaluating_at_holds_for_the_block_alone():
    sampler, tokens = PatchSampler(keep_rate=0.4, eval_keep_rate=0.7).eval(), torch.randn(1, 10, 4)
    with pytest.raises(ZeroDivisionError), sampler.evaluating_at(0.5):
        assert sampler(tokens).shape == (1, 5, 4)  # half of ten tokens, prefix included
        raise ZeroDivisionError
    assert (sampler.keep_rate, sampler.eval_keep_rate) == (0.4, 0.7)
    with pytest.raises(ValueError, match=r"eval_keep_rate must be a number in \(0, 1\], got 1.2"), \
            sampler.evaluating_at(1.2):
        pass
    assert sampler.eval_keep_rate == 0.7


def test_extra_repr_has_no_address():
    assert repr(PatchSampler("random", keep_rate=0.4)) == (
        "PatchSampler(sampler='random', num_prefix_tokens=1, keep_rate=0.4, eval_keep_rate=1.0)"
    )
    assert "0x" not in repr(PatchSampler(lambda tokens, k: None))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PatchSampler("magnitud"), "sampler must be one of magnitude, l2_magnitude, random or a function"),
        (lambda: PatchSampler(3), "sampler must be one of .*, got 3"),
        (lambda: PatchSampler(keep_rate=0.0), r"keep_rate must be a number in \(0, 1\], got 0.0"),
        (lambda: PatchSampler(eval_keep_rate=1.2), r"eval_keep_rate must be a number in \(0, 1\], got 1.2"),
        (lambda: setattr(PatchSampler(), "keep_rate", -1), r"keep_rate must be a number in \(0, 1\], got -1"),
        (lambda: PatchSampler(None), "sampler must be one of .*, got None"),
        (lambda: PatchSampler(StratifiedSampler), "sampler must be one of .* or a function .*, got <class "),
        (lambda: PatchSampler(lambda tokens: tokens), r"sampler must be .* function \(tokens, k\) -> keep_ind.*, got"),
        (lambda: PatchSampler(keep_rate=torch.tensor(2.0)), r"keep_rate must be a number in \(0, 1\], got tensor"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_keep_rates_are_stored_as_floats():
    sampler = PatchSampler(keep_rate=torch.tensor(0.5), eval_keep_rate=1)
    assert [type(rate) for rate in (sampler.keep_rate, sampler.eval_keep_rate)] == [float, float]
    assert sampler(torch.randn(1, 9, 4)).shape == (1, 4, 4)  # half of 9 tokens, ties to even


def first(tokens, k, is_patch=None):
    return torch.arange(k).expand(len(tokens), k)


class Counting(nn.Module):
    def forward(self, tokens, k):
        return first(tokens, k)


@pytest.mark.parametrize("sampler", [first, partial(first, is_patch=None), Counting(), lambda *inputs: first(*inputs)])
def test_what_may_be_a_sampler(sampler):
    patch_sampler = PatchSampler(sampler, keep_rate=0.5)
    assert patch_sampler(torch.randn(2, 9, 4)).shape == (2, 4, 4)
    assert patch_sampler.keep_indices.tolist() == [[0, 1, 2]] * 2


def test_a_sampler_that_is_a_module_can_be_replaced():
    module = nn.Linear(4, 1)
    module.forward = lambda tokens, k: first(tokens, k)
    patch_sampler = PatchSampler(module, keep_rate=0.5)
    assert list(patch_sampler.state_dict()) == ["sampler.weight", "sampler.bias"]
    for sampler in ("random", module, first):
        patch_sampler.configure(sampler, keep_rate=0.5, eval_keep_rate=1.0)
        assert patch_sampler(torch.randn(2, 9, 4)).shape == (2, 4, 4)
    assert not patch_sampler.state_dict()


def test_what_takes_the_place_of_a_module_is_called():
    """As wrappers of torch do, and the copies of `DataParallel`."""
    class Last(nn.Module):
        def forward(self, tokens, k):
            return first(tokens, k) + tokens.shape[1] - k

    patch_sampler = PatchSampler(Counting(), keep_rate=0.5)
    patch_sampler.sampler = Last()
    patch_sampler(torch.randn(2, 9, 4))
    assert patch_sampler.keep_indices.tolist() == [[5, 6, 7]] * 2


def returning(value):
    def sample(tokens, k):
        return value

    return sample


RIGHT = torch.tensor([[0, 1, 7], [2, 4, 3]])


@pytest.mark.parametrize(
    ("result", "fault"),
    [
        (None, "a tensor, got NoneType"),
        ((RIGHT, RIGHT), "a tensor, got tuple"),
        (RIGHT.tolist(), "a tensor, got list"),
        (RIGHT.numpy(), "a tensor, got ndarray"),
        (RIGHT[:1], r"keep_indices of shape \(2, 3\), got \(1, 3\)"),
        (RIGHT[:, :2], r"keep_indices of shape \(2, 3\), got \(2, 2\)"),
        (RIGHT.flatten(), r"keep_indices of shape \(2, 3\), got \(6,\)"),
        (RIGHT.float(), "int64 indices, got torch.float32"),
        (RIGHT.int(), "int64 indices, got torch.int32"),
        (RIGHT > 1, "int64 indices, got torch.bool"),
        (RIGHT.to("meta"), "indices on cpu, got meta"),
        (RIGHT - 1, "indices from 0 to 7, got -1 to 6"),
        (RIGHT + 1, "indices from 0 to 7, got 1 to 8"),
        (torch.tensor([[0, 1, 7], [2, 4, 2]]), "each index at most once per image, got 1 again"),
    ],
)
def test_what_a_sampler_must_return(result, fault):
    tokens = torch.randn(2, 9, 4)
    PatchSampler(returning(RIGHT), keep_rate=0.5)(tokens)
    with pytest.raises(ValueError, match=rf"^sampler must return {fault} from .*\.returning\.<locals>\.sample$"):
        PatchSampler(returning(result), keep_rate=0.5)(tokens)


def test_values_are_read_in_the_first_pass_with_each_k():
    """Later passes do not wait for them on a GPU; a configured sampler is a new one."""
    result = RIGHT.clone()
    sampler = PatchSampler(lambda tokens, k: result[:, :k], keep_rate=0.5)
    tokens = torch.randn(2, 9, 4)
    sampler(tokens)
    result[1, 1] = 2
    sampler(tokens)
    sampler.keep_rate = 0.3  # 3 of 9 tokens, so 2 patches
    with pytest.raises(ValueError, match="each index at most once per image"):
        sampler(tokens)
    sampler.configure(sampler.sampler, keep_rate=0.5, eval_keep_rate=1.0)
    with pytest.raises(ValueError, match="each index at most once per image"):
        sampler(tokens)


def test_the_form_is_checked_in_every_pass():
    result = [RIGHT]
    sampler = PatchSampler(lambda tokens, k: result[0], keep_rate=0.5)
    sampler(torch.randn(2, 9, 4))
    result[0] = RIGHT.float()
    with pytest.raises(ValueError, match="int64 indices, got torch.float32"):
        sampler(torch.randn(2, 9, 4))


def test_tensors_without_values_pass():
    def last(tokens, k):
        return tokens.new_ones(len(tokens), k, dtype=torch.int64).cumsum(dim=1)

    sampler = PatchSampler(last, keep_rate=0.5)
    assert sampler(torch.zeros(2, 9, 4, device="meta")).shape == (2, 4, 4)
    with torch._subclasses.FakeTensorMode():
        assert sampler(torch.zeros(2, 9, 4)).shape == (2, 4, 4)


def test_padding():
    """Of eight patches the first image has two, the second six; three stay."""
    is_patch = torch.arange(8) < torch.tensor([[2], [6]])
    tokens = torch.randn(2, 9, 4)
    for name in ("magnitude", "l2_magnitude", "random"):
        sampler = PatchSampler(name, keep_rate=0.5)
        sampler(tokens, is_patch)
        kept = is_patch.gather(1, sampler.keep_indices)
        assert kept.sum(dim=1).tolist() == [2, 3]
    assert PatchSampler(first, keep_rate=0.5)(tokens, is_patch).shape == (2, 4, 4)
    rule = "sampler must return padding only where an image has no more patches, got padding in place of patches from "
    with pytest.raises(ValueError, match=rule):
        PatchSampler(lambda tokens, k, is_patch=None: RIGHT + (RIGHT == 1), keep_rate=0.5)(tokens, is_patch)
    for unaware in (lambda tokens, k: RIGHT, lambda tokens, k, temperature=1.0: RIGHT, Counting()):
        with pytest.raises(ValueError, match=r"^sampler must take is_patch \(B, N\) for images with padding, .*, got "):
            PatchSampler(unaware, keep_rate=0.5)(tokens, is_patch)


def test_a_copy_has_seen_no_tokens():
    sampler = PatchSampler(keep_rate=0.5)
    sampler(torch.randn(2, 9, 4))
    for twin in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert (twin.keep_indices, twin.num_tokens, twin.keep_rate) == (None, None, 0.5)
    assert sampler.keep_indices is not None and sampler.num_tokens == 4
