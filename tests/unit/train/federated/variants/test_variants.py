"""One suite for every way of federating, and the equation of each.

Clients are random: each moves the factors that it is asked to train by as much as they are large, so that nothing is
nearly equal by luck.
"""

import itertools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from treadle.errors import ConfigError, FormatError, InputError, MismatchError
from treadle.family.factors import Factors
from treadle.family.family import AdapterFamily
from treadle.family.plan import LayerShape, RankPlan
from treadle.models.identity import BaseIdentity
from treadle.train.federated.aggregation import Update, shares
from treadle.train.federated.factors import GlobalState, key_of_A, nested_rank, received
from treadle.train.federated.variants import VARIANTS, Aggregate, Variant, VariantSettings

SHAPES = {"a.q": LayerShape(12, 10), "b.k": LayerShape(9, 14), "c.v": LayerShape(20, 6), "d.o": LayerShape(8, 8)}
PLAN = RankPlan.of_ranks(SHAPES, {"a.q": 3, "b.k": 4, "c.v": 1, "d.o": 2}, scaling=2.0)
FAMILY = AdapterFamily.create(base=BaseIdentity("tiny", "a" * 64), plan=PLAN, seed=5)
MODULES = list(PLAN.modules)
ROUNDS = 4
HALF = {"frozen_share": 0.5}
SETTINGS = [VariantSettings(name) for name in VARIANTS] + [
    VariantSettings("fedit", **HALF),
    VariantSettings("flora", **HALF),
    VariantSettings("rolora", **HALF),
    VariantSettings("fedsvd", **HALF),
    VariantSettings("central", **HALF),
    VariantSettings("fedit", frozen_share=1.0, frozen_share_last=0.0),
    VariantSettings("rolora", frozen_share=0.25, frozen_share_last=1.0),
]
every_variant = pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.name}-{s.frozen[0]}-{s.frozen[1]}")


def variant_of(settings: VariantSettings) -> Variant:
    return settings.variant(MODULES, rounds=ROUNDS)


def trained(variant: Variant, state: GlobalState, client: str, server_round: int, *, rank_share: float = 1.0) -> Update:
    """What a client sends after training that nobody but its name and the round decide."""
    generator = torch.Generator().manual_seed(sum(map(ord, client)) * 1000 + server_round)
    work, before = variant.work(server_round), received(FAMILY.lora_A, state.message(client, rank_share=rank_share))

    def moved(factors: Mapping[str, Tensor], names: frozenset[str]) -> dict[str, Tensor]:
        return {
            name: tensor + torch.randn(tensor.shape, generator=generator) if name in names else tensor
            for name, tensor in factors.items()
        }

    after = Factors(moved(before.lora_A, work.lora_A), moved(before.lora_B, work.lora_B))
    return Update(client, work.reply(after), 1.0 + len(client))


def updates_of(variant: Variant, state: GlobalState, server_round: int) -> list[Update]:
    clients = ["north"] if variant.name == "central" else ["north", "east", "southwest"]
    return [trained(variant, state, client, server_round) for client in clients]


def run(
    variant: Variant, rounds: int = ROUNDS
) -> tuple[GlobalState, list[tuple[GlobalState, list[Update], Aggregate]]]:
    """The last state, and before, updates and aggregate of every round."""
    state, history = GlobalState.start(FAMILY), []
    for server_round in range(1, rounds + 1):
        updates = updates_of(variant, state, server_round)
        aggregate = variant.aggregate(state, updates, server_round=server_round)
        history.append((state, updates, aggregate))
        state = aggregate.state
    return state, history


def mean_product(state: GlobalState, updates: list[Update], module: str) -> Tensor:
    """Σ w_i B_i·A_i, formed whole, in float64: the oracle."""
    total = torch.zeros(PLAN.modules[module].out_features, PLAN.modules[module].in_features, dtype=torch.float64)
    for update, share in zip(updates, shares(updates), strict=True):
        B = update.tensors.get(module, state.lora_B[module]).double()
        A = update.tensors.get(key_of_A(module), state.lora_A[module]).double()[: B.shape[1]]
        total += share * B @ A
    return total


def product(state: GlobalState, module: str) -> Tensor:
    return state.lora_B[module].double() @ state.lora_A[module].double()


def error(ours: Tensor, oracle: Tensor) -> float:
    return float((ours - oracle).norm() / oracle.norm())


@every_variant
def test_shapes_and_numbers_stay_the_plans(settings: VariantSettings) -> None:
    state, _ = run(variant_of(settings))
    for name, row in PLAN.modules.items():
        assert tuple(state.lora_A[name].shape) == (row.rank, row.in_features)
        assert tuple(state.lora_B[name].shape) == (row.out_features, row.rank)
        assert state.lora_A[name].dtype == state.lora_B[name].dtype == torch.float32
        assert state.lora_A[name].isfinite().all()


@every_variant
def test_the_order_of_arrival_changes_no_bit(settings: VariantSettings) -> None:
    variant = variant_of(settings)
    state, _ = run(variant, 2)
    updates = updates_of(variant, state, 3)
    first, *others = [
        variant.aggregate(state, list(order), server_round=3) for order in itertools.permutations(updates)
    ]
    for other in others:
        assert other.deviations == first.deviations
        assert other.state.tensors().keys() == first.state.tensors().keys()
        assert all(torch.equal(other.state.tensors()[key], tensor) for key, tensor in first.state.tensors().items())


@every_variant
def test_what_is_called_exact_is_the_mean_of_the_products(settings: VariantSettings) -> None:
    variant = variant_of(settings)
    if variant.name == "local":
        return  # has no mean; see below
    for server_round, (before, updates, aggregate) in enumerate(run(variant)[1], start=1):
        work = variant.work(server_round)
        for module in MODULES:
            found = error(product(aggregate.state, module), mean_product(before, updates, module))
            if variant.exact or module not in work.both:
                assert found < 1e-6  # float32 storage of two factors: about 1e-7
        assert variant.is_exact(server_round) == (variant.exact or not work.both)


@every_variant
def test_what_is_inexact_reports_its_error(settings: VariantSettings) -> None:
    variant = variant_of(settings)
    for server_round, (before, updates, aggregate) in enumerate(run(variant)[1], start=1):
        if variant.is_exact(server_round):
            assert aggregate.deviation.relative < 1e-6
            continue
        assert aggregate.deviations.keys() == variant.work(server_round).both
        for module, deviation in aggregate.deviations.items():
            oracle = mean_product(before, updates, module)
            assert deviation.whole == pytest.approx(float(oracle.norm()), rel=1e-12)
            # The stored factors are float32: their product is known to 1e-7 of the whole only, and that is measured.
            missed = float((product(aggregate.state, module) - oracle).norm())
            assert deviation.missed == pytest.approx(missed, rel=1e-6)
        squares = [(one.missed**2, one.whole**2) for one in aggregate.deviations.values()]
        total = (sum(missed for missed, _ in squares) / sum(whole for _, whole in squares)) ** 0.5
        assert aggregate.deviation.relative == pytest.approx(total)
        assert aggregate.deviation.relative > 1e-3  # generic clients: no luck makes an inexact mean right


@every_variant
def test_it_moves_what_it_says_and_nothing_else(settings: VariantSettings) -> None:
    variant = variant_of(settings)
    for server_round, (before, _, aggregate) in enumerate(run(variant)[1], start=1):
        work, after = variant.work(server_round), aggregate.state
        assert work.lora_B <= set(MODULES)
        assert work.lora_A <= set(MODULES)
        for module in MODULES:
            moved = not torch.equal(before.lora_A[module], after.lora_A[module])
            assert moved <= (module in after.moved)
            if module in work.lora_A:
                assert moved
            if not variant.leaves_family:
                assert torch.equal(after.lora_A[module], FAMILY.lora_A[module])
        assert before.moved <= after.moved
    last = run(variant)[0]
    assert bool(last.moved) == variant.leaves_family


@every_variant
def test_a_state_survives_its_checkpoint(settings: VariantSettings) -> None:
    state, _ = run(variant_of(settings))
    again = GlobalState.of_tensors(FAMILY, state.tensors())
    assert again.moved == state.moved
    assert again.own.keys() == state.own.keys()
    for client in ("north", "nobody"):
        ours, theirs = state.of_client(client), again.of_client(client)
        for name in MODULES:
            assert torch.equal(ours.lora_A[name], theirs.lora_A[name])
            assert torch.equal(ours.lora_B[name], theirs.lora_B[name])


@every_variant
def test_an_A_that_moved_founds_another_family(settings: VariantSettings) -> None:
    variant = variant_of(settings)
    _, history = run(variant)
    families = [aggregate.state.left_family(FAMILY, variant=variant.name) for _, _, aggregate in history]
    for family, (_, _, aggregate) in zip(families, history, strict=True):
        assert (family.fingerprint == FAMILY.fingerprint) == (not aggregate.state.moved)
        if aggregate.state.moved:
            assert (family.init, family.origin) == (variant.name, {"family": FAMILY.fingerprint})
            assert all(torch.equal(family.lora_A[name], aggregate.state.lora_A[name]) for name in MODULES)
    if variant.name == "fedsvd":
        assert len({family.fingerprint for family in families}) == ROUNDS


@every_variant
def test_a_variant_is_written_alike_in_every_process(settings: VariantSettings) -> None:
    """Checkpoints compare it; a set's order would change with Python's hash seed."""
    assert "frozenset" not in repr(variant_of(settings))


@every_variant
def test_a_client_goes_on_from_what_the_server_holds(settings: VariantSettings) -> None:
    """Of a message and the family alone: a client needs no memory of earlier rounds."""
    state, _ = run(variant_of(settings))
    factors, held = received(FAMILY.lora_A, state.message("east")), state.of_client("east")
    for name in MODULES:
        assert torch.equal(factors.lora_A[name], held.lora_A[name])
        assert torch.equal(factors.lora_B[name], held.lora_B[name])


@every_variant
def test_a_wrong_update_is_refused_by_name(settings: VariantSettings) -> None:
    variant, state = variant_of(settings), GlobalState.start(FAMILY)
    good = trained(variant, state, "north", 1)

    def send(**changes: Tensor) -> None:
        variant.aggregate(state, [Update("north", {**good.tensors, **changes})], server_round=1)

    with pytest.raises(MismatchError, match="north: 'z' is missing or was not asked for"):
        send(z=torch.zeros(1, 1))
    with pytest.raises(MismatchError, match="north: 'a.q' is"):
        send(**{"a.q": torch.zeros(11, 3)})
    with pytest.raises(MismatchError, match="north: 'a.q' is"):
        send(**{"a.q": torch.zeros(10, 4)})
    with pytest.raises(FormatError, match="north: 'a.q' holds NaN or Inf"):
        send(**{"a.q": torch.full((10, 3), torch.nan)})
    with pytest.raises(MismatchError, match="north: 'a.q' is missing"):
        variant.aggregate(
            state, [Update("north", {k: v for k, v in good.tensors.items() if k != "a.q"})], server_round=1
        )
    with pytest.raises(MismatchError, match="north: sent two updates in one round"):
        variant.aggregate(state, [good, good], server_round=1)
    with pytest.raises(InputError, match="no client has sent an update"):
        variant.aggregate(state, [], server_round=1)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="north: weight .* is not positive"):
            variant.aggregate(state, [Update("north", good.tensors, weight)], server_round=1)


@pytest.mark.parametrize("name", ["ffa", "fedsvd"])
@pytest.mark.parametrize("ranks", [(1.0, 0.5, 0.25), (0.3, 0.3, 0.3), (0.01, 1.0, 0.6)])
def test_nested_ranks_have_the_mean_of_their_own_products(name: str, ranks: tuple[float, ...]) -> None:
    variant, state = variant_of(VariantSettings(name)), GlobalState.start(FAMILY)
    clients = dict(zip(("north", "east", "southwest"), ranks, strict=True))
    for server_round in range(1, ROUNDS + 1):
        updates = [trained(variant, state, c, server_round, rank_share=share) for c, share in clients.items()]
        for update in updates:
            for module, row in PLAN.modules.items():
                assert update.tensors[module].shape[1] == nested_rank(row.rank, clients[update.client])
        aggregate = variant.aggregate(state, updates, server_round=server_round)
        for module in MODULES:
            assert error(product(aggregate.state, module), mean_product(state, updates, module)) < 1e-6
        state = aggregate.state


def test_a_narrow_client_cannot_widen_what_it_does_not_train() -> None:
    variant, state = variant_of(VariantSettings("ffa")), GlobalState.start(FAMILY)
    updates = [trained(variant, state, client, 1, rank_share=0.5) for client in ("north", "east")]
    after = variant.aggregate(state, updates, server_round=1).state
    for module, row in PLAN.modules.items():
        kept = nested_rank(row.rank, 0.5)
        assert after.lora_B[module][:, :kept].any()
        assert not after.lora_B[module][:, kept:].any()


@pytest.mark.parametrize("name", ["fedit", "flora"])
def test_ranks_must_be_equal_where_A_moves(name: str) -> None:
    variant, state = variant_of(VariantSettings(name)), GlobalState.start(FAMILY)
    narrow = trained(variant, state, "north", 1, rank_share=0.5)
    with pytest.raises(MismatchError, match="north"):
        variant.aggregate(state, [narrow], server_round=1)


def test_fedit_misses_the_covariance_of_the_factors() -> None:
    """mean(B_i A_i) − B̄ Ā = Σ w_i (B_i − B̄)(A_i − Ā): what the docstring says is what is missing."""
    variant = variant_of(VariantSettings("fedit"))
    before, updates, aggregate = run(variant, 1)[1][0]
    after, weights = aggregate.state, shares(updates)
    for module in MODULES:
        spread = sum(
            w
            * (u.tensors[module].double() - after.lora_B[module].double())
            @ (u.tensors[key_of_A(module)].double() - after.lora_A[module].double())
            for u, w in zip(updates, weights, strict=True)
        )
        missing = mean_product(before, updates, module) - product(after, module)
        # 1e-6 of the whole, as the means are stored in float32.
        torch.testing.assert_close(missing, spread, rtol=0, atol=1e-6 * float(missing.norm()))


def test_one_client_loses_nothing_under_fedit() -> None:
    variant, state = variant_of(VariantSettings("fedit")), GlobalState.start(FAMILY)
    aggregate = variant.aggregate(state, [trained(variant, state, "north", 1)], server_round=1)
    assert aggregate.deviation.relative < 1e-6


def test_flora_cuts_as_little_as_can_be_cut() -> None:
    """Eckart and Young: the error is what the singular values beyond the rank hold."""
    variant = variant_of(VariantSettings("flora"))
    before, updates, aggregate = run(variant, 1)[1][0]
    for module, row in PLAN.modules.items():
        values = torch.linalg.svdvals(mean_product(before, updates, module))
        expected = float(values[row.rank :].norm())
        assert aggregate.deviations[module].missed == pytest.approx(expected, rel=1e-5)  # float32 storage


def test_flora_is_exact_while_the_stack_fits_the_rank() -> None:
    """Clients that share an A and move B alone stack to the plan's rank."""
    variant, state = variant_of(VariantSettings("flora")), GlobalState.start(FAMILY)
    alone = variant_of(VariantSettings("ffa"))
    updates = [
        Update(u.client, {**u.tensors, **{key_of_A(m): FAMILY.lora_A[m] for m in MODULES}}, u.weight)
        for u in updates_of(alone, state, 1)
    ]
    assert variant.aggregate(state, updates, server_round=1).deviation.relative < 1e-6


def test_rolora_takes_turns() -> None:
    variant = variant_of(VariantSettings("rolora"))
    assert [(bool(w.lora_A), bool(w.lora_B)) for w in map(variant.work, (1, 2, 3, 4))] == [
        (False, True),
        (True, False),
        (False, True),
        (True, False),
    ]
    assert not any(variant.work(server_round).both for server_round in range(1, 9))


def test_fedsvd_has_an_orthonormal_A_and_the_singular_values_in_B() -> None:
    variant = variant_of(VariantSettings("fedsvd"))
    before, updates, aggregate = run(variant, 2)[1][1]
    for module, row in PLAN.modules.items():
        A, B = aggregate.state.lora_A[module].double(), aggregate.state.lora_B[module].double()
        eye = torch.eye(row.rank, dtype=torch.float64)
        torch.testing.assert_close(A @ A.T, eye, rtol=0, atol=1e-6)
        values = torch.linalg.svdvals(mean_product(before, updates, module))[: row.rank]
        torch.testing.assert_close(B.T @ B, torch.diag(values**2), rtol=0, atol=1e-5 * float(values[0] ** 2))


def test_fedsvd_never_leaves_the_span_of_the_first_A() -> None:
    state, _ = run(variant_of(VariantSettings("fedsvd")))
    for module in MODULES:
        basis = torch.linalg.qr(FAMILY.lora_A[module].double().T).Q
        A = state.lora_A[module].double()
        torch.testing.assert_close(A @ basis @ basis.T, A, rtol=0, atol=1e-5)
        assert not torch.allclose(state.lora_A[module], FAMILY.lora_A[module], atol=1e-2)


def test_fedsvd_under_sgd_is_ffa_over_an_orthonormal_A() -> None:
    """A turn of A turns gradients and B with it: plain steps of least squares end at the same B·A."""
    family = AdapterFamily.create(base=FAMILY.base, plan=PLAN, seed=1, init="orthonormal")
    data = {
        client: {
            m: (torch.randn(30, row.in_features), torch.randn(30, row.out_features)) for m, row in PLAN.modules.items()
        }
        for client in ("north", "east")
    }

    def descended(A: Tensor, B: Tensor, x: Tensor, y: Tensor) -> Tensor:
        for _ in range(3):
            B = B - 0.1 * ((x @ A.T @ B.T - y).T @ (x @ A.T)) / len(x)
        return B

    def end(name: str) -> GlobalState:
        variant, state = variant_of(VariantSettings(name)), GlobalState.start(family)
        for server_round in range(1, ROUNDS + 1):
            updates = []
            for client, rows in data.items():
                start = received(family.lora_A, state.message(client))
                B = {m: descended(start.lora_A[m], start.lora_B[m], *rows[m]) for m in MODULES}
                updates.append(Update(client, B))
            state = variant.aggregate(state, updates, server_round=server_round).state
        return state

    ffa, fedsvd = end("ffa"), end("fedsvd")
    for module in MODULES:
        assert error(product(fedsvd, module), product(ffa, module)) < 1e-5  # float32 steps in other coordinates
        if PLAN.modules[module].rank > 1:
            assert not torch.allclose(fedsvd.lora_A[module], ffa.lora_A[module], atol=1e-2)


def test_fedsvd_turns_even_what_nobody_has_trained() -> None:
    """B = 0 has no singular vectors; the new A is an orthonormal basis of the old one's rows all the same."""
    variant, state = variant_of(VariantSettings("fedsvd")), GlobalState.start(FAMILY)
    still = Update("north", {m: torch.zeros(r.out_features, r.rank) for m, r in PLAN.modules.items()})
    aggregate = variant.aggregate(state, [still], server_round=1)
    assert aggregate.deviation.relative == 0.0
    for module, row in PLAN.modules.items():
        A = aggregate.state.lora_A[module]
        torch.testing.assert_close(A @ A.T, torch.eye(row.rank), rtol=0, atol=1e-6)
        assert not aggregate.state.lora_B[module].any()


def test_local_keeps_every_clients_B_to_itself() -> None:
    variant = variant_of(VariantSettings("local"))
    state, history = run(variant)
    for update in history[-1][1]:
        for module in MODULES:
            assert torch.equal(state.of_client(update.client).lora_B[module], update.tensors[module])
    assert not any(B.any() for B in state.lora_B.values())
    absent = variant.aggregate(state, [trained(variant, state, "east", 5)], server_round=5).state
    assert all(absent.own["north"][m] is state.own["north"][m] for m in MODULES)
    before = dict(run(variant, 1)[0].own["north"])
    alone = variant.aggregate(
        GlobalState.start(FAMILY), [trained(variant, GlobalState.start(FAMILY), "north", 1)], server_round=1
    )
    assert all(torch.equal(before[m], alone.state.own["north"][m]) for m in MODULES)


def test_central_has_one_silo() -> None:
    variant, state = variant_of(VariantSettings("central")), GlobalState.start(FAMILY)
    update = trained(variant, state, "north", 1)
    after = variant.aggregate(state, [update], server_round=1).state
    assert all(torch.equal(after.lora_B[m], update.tensors[m]) for m in MODULES)
    with pytest.raises(MismatchError, match="one silo with all rows"):
        variant.aggregate(state, [update, trained(variant, state, "east", 1)], server_round=1)


def test_frozen_share_one_is_ffa_and_zero_is_lora() -> None:
    ffa = run(variant_of(VariantSettings("ffa")))[0]
    for name in ("fedit", "flora", "rolora", "fedsvd"):
        variant = variant_of(VariantSettings(name, frozen_share=1.0))
        state = run(variant)[0]
        assert not variant.leaves_family
        assert all(torch.equal(state.lora_B[m], ffa.lora_B[m]) for m in MODULES)
    assert variant_of(VariantSettings("fedit")).work(1).both == set(MODULES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "fedavg"}, "no such variant 'fedavg'; choose among ffa, fedit"),
        ({"name": "fedit", "frozen_share": 1.5}, "frozen_share 1.5 is outside 0..1"),
        ({"name": "fedit", "frozen_share": float("nan")}, "frozen_share nan is outside 0..1"),
        ({"name": "fedit", "frozen_share_last": -0.1}, "frozen_share -0.1 is outside 0..1"),
        ({"name": "ffa", "frozen_share": 0.5}, "ffa freezes every A, frozen_share 0.5 does not; choose among fedit"),
        ({"name": "local", "frozen_share_last": 0.0}, "local freezes every A"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VariantSettings(**settings)
