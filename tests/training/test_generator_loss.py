"""The generator's losses: against torch, by hand, and what must get no gradient."""

import math

import pytest
import torch
from torch.nn import functional

from ragkit.errors import SettingsError
from ragkit.training.generator_loss import LOSSES, Smoothing, kl_to_base, soft_targets
from ragkit.training.token_loss import IGNORED

ROWS, PLACES, WORDS = 3, 5, 40
LABELS = torch.tensor([[IGNORED, 3, 9, 0, 4], [IGNORED] * 3 + [7, 7], [1, 2, 39, IGNORED, 5]])


def logits(seed=0, scale=3.0):
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(ROWS, PLACES, WORDS, generator=random) * scale).requires_grad_()


def confident():
    """Logits of which some labels are the likeliest word, nearly or very surely."""
    values = logits().detach()
    for row, place, more in ((0, 1, 0.1), (0, 3, 9.0), (2, 0, 0.5), (2, 2, 30.0)):
        values[row, place, LABELS[row, place]] = values[row, place].max() + more
    return values.requires_grad_()


def value_and_gradient(name, given, count=11, labels=LABELS, **smoothing):
    loss = LOSSES[name](given, labels, count, Smoothing(**smoothing))
    (gradient,) = torch.autograd.grad(loss, given)
    return loss.detach(), gradient


def by_torch(given, count=11, **options):
    loss = functional.cross_entropy(
        given.flatten(0, 1), LABELS.flatten(), ignore_index=IGNORED, reduction="sum", **options
    )
    (gradient,) = torch.autograd.grad(loss / count, given)
    return loss.detach() / count, gradient


def same(ours, expected):
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "smoothing"),
    [
        ("cross-entropy", {}),
        ("label-smoothing", {"own": 1.0}),
        ("overtone", {"own": 1.0, "least": 0.0}),
        ("overtone", {"own": 1.0, "least": 0.0, "deviations": 0.3}),
    ],
)
def test_without_smoothing_every_loss_is_cross_entropy(name, smoothing):
    for given in (logits(), confident()):
        same(value_and_gradient(name, given, **smoothing), by_torch(given))


@pytest.mark.parametrize("own", [0.9, 0.5])
def test_label_smoothing_is_torchs(own):
    given = confident()
    ours = value_and_gradient("label-smoothing", given, own=own)
    same(ours, by_torch(given, label_smoothing=1 - own))


def overtone_by_hand(given, labels, count, smoothing):
    """The definition, token by token and word by word, in double precision."""
    total, below = 0.0, []
    for row in range(ROWS):
        for place in range(PLACES):
            label = int(labels[row, place])
            if label == IGNORED:
                continue
            z = given[row, place].double().tolist()
            mean = sum(z) / len(z)
            std = math.sqrt(sum((each - mean) ** 2 for each in z) / (len(z) - 1))
            kept = [each if each >= max(z) - smoothing.deviations * std else None for each in z]
            whole = sum(math.exp(each) for each in kept if each is not None)
            target = [0.0 if each is None else math.exp(each) / whole for each in kept]
            own = smoothing.own
            mixed = [own * (word == label) + (1 - own) * p for word, p in enumerate(target)]
            certain = [float(word == label) for word in range(len(z))]
            target = mixed if mixed[label] == max(mixed) else certain
            log_all = math.log(sum(map(math.exp, z)))
            divergence = sum(
                p * (math.log(p) - each + log_all) for p, each in zip(target, z, strict=True) if p
            )
            if divergence < smoothing.least:
                below.append((row, place))
            total += max(divergence, smoothing.least)
    return total / count, below


@pytest.mark.parametrize("deviations", [0.0, 0.5, 1.0, 2.5])
@pytest.mark.parametrize("own", [0.2, 0.9])
def test_overtone_is_its_definition(own, deviations):
    smoothing = Smoothing(own=own, deviations=deviations, least=0.05)
    given = confident()
    loss = LOSSES["overtone"](given, LABELS, 11, smoothing)
    expected, below = overtone_by_hand(given.detach(), LABELS, 11, smoothing)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, given)
    # d KL(target ‖ softmax(z)) / dz = softmax(z) - target, for a target that is held still.
    kept = LABELS != IGNORED
    targets = soft_targets(given.detach()[kept], LABELS[kept], smoothing)
    wanted = torch.zeros_like(gradient)
    wanted[kept] = (given.detach()[kept].softmax(-1) - targets) / 11
    for row, place in below:
        wanted[row, place] = 0
    torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-5)


def test_overtone_on_four_words():
    # Mean 1.5, deviations 1.5, .5, -.5, -1.5: std = sqrt(5 / 3) = 1.29. So 3 and 2 are kept by one
    # std, and π = (e/(1+e), 1/(1+e)) = (.7311, .2689).
    given = torch.tensor([[[3.0, 2.0, 1.0, 0.0]]])
    smoothing = Smoothing(own=0.5, deviations=1.0, least=0.0)
    target = torch.tensor([[0.5 + 0.5 * 0.731059, 0.5 * 0.268941, 0.0, 0.0]])
    torch.testing.assert_close(
        soft_targets(given[0], torch.tensor([0]), smoothing), target, atol=1e-6, rtol=0
    )
    # log(1 + e^-1 + e^-2 + e^-3) = 0.440190: log p = (-.440190, -1.440190); Σ t log t = -.394525.
    expected = 0.865529 * math.log(0.865529) + 0.134471 * math.log(0.134471)
    expected += 0.865529 * 0.440190 + 0.134471 * 1.440190
    loss = LOSSES["overtone"](given, torch.tensor([[0]]), 1, smoothing)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    # The label 1: .5 + .5 · .2689 > .5 · .7311, but .2 + .8 · .2689 < .8 · .7311.
    mixed = torch.tensor([[0.5 * 0.731059, 0.5 + 0.5 * 0.268941, 0.0, 0.0]])
    torch.testing.assert_close(
        soft_targets(given[0], torch.tensor([1]), smoothing), mixed, atol=1e-6, rtol=0
    )
    loss = LOSSES["overtone"](given, torch.tensor([[1]]), 1, Smoothing(own=0.2, least=0.0))
    assert loss.item() == pytest.approx(1.440190, abs=1e-5)  # the target is certain


def test_divergences_are_exact_under_autocast():
    random = torch.Generator().manual_seed(0)
    base = torch.randn(1, 8, 4096, generator=random)
    near = base + 0.02 * torch.randn(1, 8, 4096, generator=random)
    every = torch.ones(1, 8, dtype=torch.bool)
    exact = kl_to_base(near, base, every, None)
    with torch.autocast("cpu", torch.bfloat16):
        found = kl_to_base(near, base, every, None)
        none = kl_to_base(base, base, every, None)
    assert 0 < exact < 1e-3
    torch.testing.assert_close(found, exact, atol=1e-6, rtol=0)
    assert abs(none) < 1e-6


@pytest.mark.parametrize("own", [0.05, 0.7, 1.0])
@pytest.mark.parametrize("deviations", [0.0, 1.0, 100.0])
def test_targets_are_distributions(own, deviations):
    kept = LABELS != IGNORED
    given, labels = confident().detach()[kept], LABELS[kept]
    targets = soft_targets(given, labels, Smoothing(own=own, deviations=deviations))
    torch.testing.assert_close(targets.sum(-1), torch.ones(len(labels)), atol=1e-6, rtol=0)
    assert (targets >= 0).all() and not targets.requires_grad
    assert (targets.gather(-1, labels[:, None])[:, 0] >= targets.amax(-1) - 1e-6).all()
    certain = (targets == functional.one_hot(labels, WORDS)).all(-1)
    if own == 0.05 and deviations:
        assert certain.any() and not certain.all()


def test_a_token_near_its_target_has_exactly_no_gradient():
    given = confident()
    loss, gradient = value_and_gradient("overtone", given, own=0.9, least=0.3)
    alone = [value_and_gradient("overtone", given, labels=one, least=0.0)[0] * 11 for one in each()]
    near = torch.tensor([float(value) for value in alone]) < 0.3
    assert 0 < near.sum() < len(near)
    gradients = gradient[LABELS != IGNORED]
    assert torch.equal(gradients[near], torch.zeros_like(gradients[near]))
    assert (gradients[~near].abs().sum(-1) > 0).all()
    assert loss * 11 == pytest.approx(sum(max(0.3, float(value)) for value in alone), rel=1e-5)


def each():
    """The labels one by one, all others ignored."""
    for row, place in (LABELS != IGNORED).nonzero().tolist():
        one = torch.full_like(LABELS, IGNORED)
        one[row, place] = LABELS[row, place]
        yield one


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_ignored_counts_for_nothing(name):
    given = confident()
    loss, gradient = value_and_gradient(name, given)
    ignored = LABELS == IGNORED
    assert torch.equal(gradient[ignored], torch.zeros_like(gradient[ignored]))
    other = given.detach().clone()
    other[ignored] = torch.nan
    same(value_and_gradient(name, other.requires_grad_()), (loss, gradient))
    by_number = value_and_gradient(name, given, count=None)[0]
    assert by_number == pytest.approx(float(loss) * 11 / int((~ignored).sum()), rel=1e-6)
    assert value_and_gradient(name, given, count=torch.tensor(11))[0] == loss
    none = value_and_gradient(name, given, count=None, labels=torch.full_like(LABELS, IGNORED))
    same(none, (torch.tensor(0.0), torch.zeros_like(gradient)))


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_is_the_sum_of_its_parts(name):
    given = confident()
    whole = value_and_gradient(name, given)
    parts = [value_and_gradient(name, given, labels=one) for one in each()]
    same(whole, [sum(values) for values in zip(*parts, strict=True)])


@pytest.mark.parametrize("name", LOSSES)
def test_words_that_cannot_be_said_take_no_part(name):
    given = confident().detach()
    more = torch.full((ROWS, PLACES, WORDS + 8), -torch.inf)
    more[..., :WORDS] = given
    loss, gradient = value_and_gradient(name, more.requires_grad_())
    expected, of_said = value_and_gradient(name, given.requires_grad_())
    same((loss, gradient[..., :WORDS]), (expected, of_said))
    assert torch.equal(gradient[..., WORDS:], torch.zeros(ROWS, PLACES, 8))
    # One word alone can be said: it is certain. A label that cannot be said is infinitely far.
    single = torch.full((1, 1, 4), -torch.inf)
    single[..., 2] = 1.5
    for label, far in ((2, 0.0), (1, math.inf)):
        loss = LOSSES[name](single, torch.tensor([[label]]), 1, Smoothing(least=0.0))
        assert loss.item() == far


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name):
    given = confident().detach().bfloat16().requires_grad_()
    loss, gradient = value_and_gradient(name, given)
    expected, of_float = value_and_gradient(name, given.detach().float().requires_grad_())
    assert loss.dtype == torch.float32 and loss == expected
    assert torch.equal(gradient, of_float.bfloat16())


def test_kl_to_base_is_torchs():
    given, base, mask = logits(1), logits(2), LABELS > 3
    loss = kl_to_base(given, base, mask, 7)
    expected = functional.kl_div(
        given.log_softmax(-1)[mask], base.detach().softmax(-1)[mask], reduction="sum"
    )
    gradients = torch.autograd.grad(loss, [given, base], allow_unused=True)
    assert gradients[1] is None
    same((loss, gradients[0]), (expected / 7, torch.autograd.grad(expected / 7, given)[0]))
    by_number = kl_to_base(given, base, mask, None)
    torch.testing.assert_close(by_number, expected / mask.sum(), atol=1e-6, rtol=1e-6)
    assert kl_to_base(base, base, mask, 1).item() == pytest.approx(0, abs=1e-5)
    shut = torch.zeros_like(mask)
    assert kl_to_base(given, base, shut, None) == 0


def test_kl_to_base_of_words_that_cannot_be_said():
    given, base, mask = logits(1).detach(), logits(2).detach(), torch.ones(ROWS, PLACES).bool()
    given[..., :5] = base[..., :5] = -torch.inf
    given.requires_grad_()
    loss = kl_to_base(given, base, mask, 1)
    (gradient,) = torch.autograd.grad(loss, given)
    assert loss.isfinite() and gradient.isfinite().all()
    assert loss.item() == pytest.approx(
        kl_to_base(given[..., 5:], base[..., 5:], mask, 1).item(), rel=1e-5
    )
    base[..., 0] = 1.0  # the base says what the model cannot
    assert kl_to_base(given, base, mask, 1) == math.inf


def test_no_more_than_the_scored_places_are_computed():
    given = confident()
    scored, sizes = int((LABELS != IGNORED).sum()), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.is_floating_point():
                sizes.append(made.numel())
            return made

    for name in LOSSES:
        sizes.clear()
        with Watch():
            LOSSES[name](given, LABELS, 11, Smoothing())
        assert max(sizes) == scored * WORDS < given.numel()


@pytest.mark.parametrize(
    "wrong",
    [
        {"own": 0.0},
        {"own": 1.1},
        {"own": math.nan},
        {"deviations": -1.0},
        {"deviations": math.inf},
        {"least": -0.1},
        {"least": math.nan},
    ],
)
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(SettingsError, match=f"{next(iter(wrong))} must"):
        Smoothing(**wrong)
