"""Rounds over silos that answer at once: whom they ask, what they average, and what the server keeps."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from treadle.errors import BudgetError, FormatError, InputError, MismatchError
from treadle.family.factors import Factors
from treadle.family.family import AdapterFamily
from treadle.family.plan import LayerShape, RankPlan
from treadle.models.identity import BaseIdentity
from treadle.privacy.noise import SeededRandomness
from treadle.train.federated.checkpoint import ROUNDS, STATE, RunFolder, facts_of, read_reports
from treadle.train.federated.client import LocalResult, Silo
from treadle.train.federated.client_privacy import ClientPrivacySettings
from treadle.train.federated.federation import Federation
from treadle.train.federated.messages import Order
from treadle.train.federated.monitors import cosines, mean_norm, noise_to_signal
from treadle.train.federated.result import federated_adapter
from treadle.train.federated.run import federate, in_process_grid
from treadle.train.federated.settings import LocalWork, RoundRules
from treadle.train.federated.standing import ClientTotals, RoundReport, totals
from treadle.train.federated.variants import VariantSettings

NAMES = ("north", "south", "east")
RECORDS = {"north": 100, "south": 300, "east": 600}


@pytest.fixture
def family() -> AdapterFamily:
    plan = RankPlan.uniform({"one": LayerShape(6, 5), "two": LayerShape(4, 3)}, rank=2, scaling=2.0)
    return AdapterFamily.create(base=BaseIdentity("tiny", "0" * 64), plan=plan, seed=0)


def change_of(client: str, server_round: int, shape: torch.Size) -> Tensor:
    """What the client adds to every tensor in this round: a function of its arguments."""
    generator = torch.Generator().manual_seed(1000 * NAMES.index(client) + server_round)
    return torch.randn(shape, generator=generator)


def silo_of(client: str, root: Path, seen: list[str] | None = None, *, share: bool = False) -> Silo:
    def train(family: AdapterFamily, order: Order, factors: Factors) -> LocalResult:
        if seen is not None:
            seen.append(f"{client}/{order.server_round}")
        moved = {n: B + change_of(client, order.server_round, B.shape) for n, B in factors.lora_B.items()}
        return LocalResult(moved, "CAUSAL_LM", transposed=False, epsilon=0.5 * order.server_round, delta=1e-5)

    return Silo(client, root / client, train, records=RECORDS[client] if share else None)


def federation_of(family: AdapterFamily, *, rounds: int = 2, **rules: object) -> Federation:
    work = LocalWork(rounds=rounds, expected_batch=4, learning_rate=0.1)
    variant = VariantSettings().variant(list(family.plan.modules), rounds=rounds)
    return Federation(family, variant, work, RoundRules(NAMES, pause=0.0, **rules))  # type: ignore[arg-type]


def run(
    federation: Federation, root: Path, silos: list[Silo] | None = None
) -> tuple[Mapping[str, Tensor], list[RoundReport]]:
    reports: list[RoundReport] = []
    grid = in_process_grid(silos or [silo_of(name, root) for name in NAMES])
    finished = federate(federation, grid, RunFolder(root / "run", facts_of(federation)), reports.append)
    return finished.progressed.state.lora_B, reports


def by_hand(family: AdapterFamily, weights: Mapping[str, float], rounds: int = 2) -> dict[str, Tensor]:
    """The weighted mean of the clients' B after every round, one client and one tensor at a time."""
    B = {name: torch.zeros(row.out_features, row.rank) for name, row in family.plan.modules.items()}
    for number in range(1, rounds + 1):
        for name in B:
            total = sum(weights[client] * (B[name] + change_of(client, number, B[name].shape)) for client in weights)
            B[name] = torch.as_tensor(total) / sum(weights.values())
    return B


def test_the_mean_is_that_of_a_computation_by_hand(family: AdapterFamily, tmp_path: Path) -> None:
    found, _ = run(federation_of(family), tmp_path)
    for name, expected in by_hand(family, dict.fromkeys(NAMES, 1.0)).items():
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=0)  # float32, summed in float64


def test_declared_records_weigh(family: AdapterFamily, tmp_path: Path) -> None:
    silos = [silo_of(name, tmp_path, share=True) for name in NAMES]
    found, _ = run(federation_of(family, weighting="records"), tmp_path, silos)
    for name, expected in by_hand(family, RECORDS).items():
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=0)


def test_undeclared_records_cannot_weigh(family: AdapterFamily, tmp_path: Path) -> None:
    seen = list[str]()
    silos = [silo_of(name, tmp_path, seen, share=name != "east") for name in NAMES]
    with pytest.raises(InputError, match="'east' does not declare how many records it has"):
        run(federation_of(family, weighting="records"), tmp_path, silos)
    assert seen == []  # nobody has trained, and so nobody has paid


def test_a_sample_is_drawn_anew_each_round_and_repeats_with_its_seed(family: AdapterFamily, tmp_path: Path) -> None:
    def asked(seed: int, folder: str) -> list[str]:
        seen: list[str] = []
        silos = [silo_of(name, tmp_path / folder, seen) for name in NAMES]
        run(federation_of(family, rounds=12, sample=2, seed=seed), tmp_path / folder, silos)
        return sorted(seen)

    first = asked(1, "a")
    assert len(first) == 24
    assert first == asked(1, "b")
    assert first != asked(2, "c")
    assert {name.split("/")[0] for name in first} == set(NAMES)


def spent_after(silo: Silo, rounds: int) -> Silo:
    """The silo with a budget for so many rounds."""

    def train(family: AdapterFamily, order: Order, factors: Factors) -> LocalResult:
        if order.server_round > rounds:
            raise BudgetError("it would be too much", where="data set", remedy="none")
        return silo.train(family, order, factors)

    return replace(silo, train=train)


def test_a_run_ends_where_too_few_have_a_budget_left_for_the_minimum(family: AdapterFamily, tmp_path: Path) -> None:
    federation = federation_of(family, rounds=4, minimum=2, patience=10)
    federation = replace(federation, rules=replace(federation.rules, pause=3600.0))  # waiting for nobody would be seen
    silos = [spent_after(silo_of(name, tmp_path), 9 if name == "east" else 2) for name in NAMES]
    reports: list[RoundReport] = []
    folder = RunFolder(tmp_path / "run", facts_of(federation))
    finished = federate(federation, in_process_grid(silos), folder, reports.append)
    assert finished.progressed.server_round == len(reports) == 2
    assert "round 3: 1 of 2 updates, and nobody else has a budget left" in finished.why
    for name, B in by_hand(family, dict.fromkeys(NAMES, 1.0)).items():
        torch.testing.assert_close(finished.progressed.state.lora_B[name], B, atol=1e-6, rtol=0)


def test_who_was_not_drawn_steps_in_for_a_spent_client(family: AdapterFamily, tmp_path: Path) -> None:
    federation = federation_of(family, rounds=6, sample=2, minimum=2)
    seen = list[str]()
    silos = [spent_after(silo_of(name, tmp_path, seen), 0 if name == "north" else 9) for name in NAMES]
    _, reports = run(federation, tmp_path, silos)
    assert len(reports) == 6
    for report in reports:
        accepted = {row.client for row in report.clients if row.outcome == "accepted"}
        assert accepted == {"south", "east"}
    drawn = [{row.client for row in report.clients} for report in reports]
    assert sum("north" in clients for clients in drawn) == 1  # once is enough to know that it has nothing left


def test_whom_a_round_asks_hangs_on_no_client_where_clients_are_private(family: AdapterFamily, tmp_path: Path) -> None:
    """The cohorts of a run in which north has nothing to spend are those of a run in which it has, less north."""
    federation = federation_of(family, rounds=8, sample=2, minimum=1)
    settings = ClientPrivacySettings(epsilon=8.0, delta=1e-2, clients=3, cohort=2, rounds=8)
    federation = replace(federation, client_privacy=settings.plan(SeededRandomness(0)))

    def cohorts(budget: int, folder: str) -> list[set[str]]:
        silos = [silo_of(name, tmp_path / folder) for name in NAMES]
        _, reports = run(federation, tmp_path / folder, [spent_after(silos[0], budget), *silos[1:]])
        return [{row.client for row in report.clients if row.outcome == "accepted"} for report in reports]

    whole, without = cohorts(9, "a"), cohorts(0, "b")
    assert len(whole) == 8
    assert any("north" in clients for clients in whole)
    assert without == [clients - {"north"} for clients in whole]


def test_who_was_spent_is_asked_again_when_a_run_is_resumed(family: AdapterFamily, tmp_path: Path) -> None:
    federation = federation_of(family, rounds=4)
    poor = [spent_after(silo_of(name, tmp_path), 2 if name == "north" else 9) for name in NAMES]
    folder = RunFolder(tmp_path / "run", facts_of(federation))

    def dies(report: RoundReport) -> None:
        if report.server_round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        federate(federation, in_process_grid(poor), folder, dies)
    assert folder.load(federation).member("north").exhausted
    _, reports = run(federation, tmp_path)  # north has been allowed more
    assert [row.outcome for row in reports[-1].clients] == ["accepted"] * 3


def test_what_a_client_says_it_has_spent_stands_though_its_update_is_refused(
    family: AdapterFamily, tmp_path: Path
) -> None:
    federation = federation_of(family, minimum=2, max_update_norm=50.0)

    def outsized(family: AdapterFamily, order: Order, factors: Factors) -> LocalResult:
        made = silo_of("south", tmp_path).train(family, order, factors)
        return replace(made, tensors={name: 1e3 * tensor for name, tensor in made.tensors.items()}, epsilon=7.5)

    silos = [silo_of("north", tmp_path), replace(silo_of("south", tmp_path), train=outsized), silo_of("east", tmp_path)]
    reports: list[RoundReport] = []
    finished = federate(
        federation, in_process_grid(silos), RunFolder(tmp_path / "run", facts_of(federation)), reports.append
    )
    south = totals(reports)[1]
    assert (south.client, south.accepted, south.epsilon, south.delta) == ("south", 0, 7.5, 1e-5)
    settings = federated_adapter(federation, finished.progressed, "signs", data="rows").provenance
    assert (settings.settings["rounds of south"], settings.settings["epsilon of south"]) == (0, 7.5)
    assert settings.epsilon == 7.5  # what south released, it released, averaged or not


def test_nothing_said_is_told_from_no_bound() -> None:
    assert [
        row.stated_epsilon for row in (ClientTotals("a"), ClientTotals("a", 1), ClientTotals("a", 1, epsilon=2.0))
    ] == [
        "–",
        "none",
        2.0,
    ]


def test_a_client_that_takes_longer_than_the_time_out_is_left_out(family: AdapterFamily, tmp_path: Path) -> None:
    def slow(family: AdapterFamily, order: Order, factors: Factors) -> LocalResult:
        time.sleep(1.5)
        return silo_of("east", tmp_path).train(family, order, factors)

    silos = [silo_of("north", tmp_path), silo_of("south", tmp_path), replace(silo_of("east", tmp_path), train=slow)]
    _, reports = run(federation_of(family, rounds=1, minimum=2, timeout=1.0), tmp_path, silos)
    assert {row.client: row.outcome for row in reports[0].clients} == {
        "north": "accepted",
        "south": "accepted",
        "east": "silent",
    }


def test_a_lower_rank_sends_fewer_columns(family: AdapterFamily, tmp_path: Path) -> None:
    found, reports = run(federation_of(family, rounds=1, rank_share={"east": 0.5}), tmp_path)
    rows = {row.client: row for row in reports[0].clients}
    assert rows["east"].up < rows["north"].up
    shape = family.plan.modules["one"]
    expected = sum(change_of(name, 1, torch.Size((shape.out_features, 2))) for name in ("north", "south"))
    narrow = change_of("east", 1, torch.Size((shape.out_features, 1)))
    expected = torch.as_tensor(expected) + torch.nn.functional.pad(narrow, (0, 1))
    torch.testing.assert_close(found["one"], expected / 3, atol=1e-6, rtol=0)


def test_two_silos_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two silos are called 'north'"):
        in_process_grid([silo_of("north", tmp_path), silo_of("north", tmp_path)])


def test_a_report_says_what_crossed_and_nothing_that_costs(family: AdapterFamily, tmp_path: Path) -> None:
    _, reports = run(federation_of(family), tmp_path)
    parameters = sum(row.out_features * row.rank for row in family.plan.modules.values())
    for row in reports[1].clients:
        assert 4 * parameters < row.up < 4 * parameters + 2000  # float32, and heads of messages
        assert row.epsilon == 1.0
    change = {n: change_of("north", 2, torch.Size(B.shape)) for n, B in by_hand(family, {"north": 1.0}).items()}
    expected = math.sqrt(sum(float(tensor.square().sum()) for tensor in change.values()))
    norms = {row.client: row.update_norm for row in reports[1].clients}
    assert norms["north"] == pytest.approx(expected, rel=1e-5)
    assert reports[0].family_bytes > 3 * len(family.weights)
    assert [RoundReport.of_json(json.loads(json.dumps(report.to_json()))) for report in reports] == reports
    assert [(row.client, row.accepted, row.missing, row.epsilon) for row in totals(reports)] == [
        (name, 2, 0, 1.0) for name in NAMES
    ]


def test_the_state_is_of_one_run_and_whole_or_an_error(family: AdapterFamily, tmp_path: Path) -> None:
    federation = federation_of(family)
    run(federation, tmp_path)
    other = replace(federation, work=replace(federation.work, learning_rate=0.2))
    with pytest.raises(MismatchError, match=r"the state's learning_rate is 0\.1, this run's 0\.2"):
        RunFolder(tmp_path / "run", facts_of(other)).load(other)
    path = tmp_path / "run" / STATE
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(FormatError, match="not a federation's state"):
        RunFolder(tmp_path / "run", facts_of(federation)).load(federation)


def test_waiting_longer_does_not_make_it_another_run(family: AdapterFamily) -> None:
    assert facts_of(federation_of(family)) == facts_of(federation_of(family, timeout=1.0, patience=2))
    assert facts_of(federation_of(family)) != facts_of(federation_of(family, max_update_norm=2.0))


def test_a_torn_line_is_no_round_and_a_repeated_one_counts_once(family: AdapterFamily, tmp_path: Path) -> None:
    _, reports = run(federation_of(family), tmp_path)
    path = tmp_path / "run" / ROUNDS
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1] + lines[1] + lines[0][:20])
    assert read_reports(tmp_path / "run") == reports
    path.write_bytes(lines[0] + lines[1][:20] + b"\n" + lines[1])  # space ran out within a line, and was made
    assert read_reports(tmp_path / "run") == reports
    path.write_bytes(b"{}\n" + lines[1])
    with pytest.raises(FormatError):
        read_reports(tmp_path / "run")


def test_noise_to_signal_tells_a_known_ratio() -> None:
    generator = torch.Generator().manual_seed(0)
    signal, size = torch.ones(40_000), 40_000
    changes = [{"B": signal + 3 * torch.randn(size, generator=generator)} for _ in range(10)]
    found = noise_to_signal(changes)
    assert found == pytest.approx(3.0, rel=0.05)  # 40,000 draws: the estimate's own error is about 1%
    assert noise_to_signal(changes[:1]) is None
    assert noise_to_signal([{"B": torch.ones(3)}, {"B": -torch.ones(3)}]) is None  # nothing is shared


def test_cosines_and_the_norm_of_the_mean() -> None:
    changes = [{"B": torch.tensor([[1.0, 0.0]])}, {"B": torch.tensor([[1.0, 1.0]])}, {"B": torch.zeros(1, 2)}]
    found = cosines(changes)
    assert found[0][1] == pytest.approx(math.sqrt(0.5))
    assert (found[0][0], found[0][2], found[2][2]) == (pytest.approx(1.0), 0.0, 0.0)
    assert mean_norm(changes) == pytest.approx(math.sqrt((2 / 3) ** 2 + (1 / 3) ** 2))
