"""Samplers, counts and the module, by hand; and the reference vectors."""

import json

import pytest
import torch
from safetensors import safe_open
from support.models import build_model, random_images
from support.paths import VECTORS
from timm.models.beit import Beit

from pss_composer import PatchSampler, apply_patch_sampling
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
        (lambda: PatchSampler(lambda tokens, k: torch.zeros(1, k), keep_rate=0.5)(torch.zeros(2, 9, 4)),
         r"sampler must return keep_indices of shape \(2, 3\), got \(1, 3\)"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()
