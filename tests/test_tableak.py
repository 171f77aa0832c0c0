"""TabLeak, the imputer, and the accuracy of columns."""

from collections.abc import Mapping, Sequence
from typing import cast

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedmi.attacks.base import Attack, Case, Reconstruction
from fedmi.attacks.engine.adaptive import adapted
from fedmi.attacks.engine.ensemble import aligned, entropies, pooled
from fedmi.attacks.engine.evidence import AttackError, read
from fedmi.attacks.engine.tables import RelaxedRows, as_rows, as_shares
from fedmi.attacks.engine.whitened import whitening
from fedmi.attacks.gradient.imputer import Imputer
from fedmi.attacks.gradient.tableak import TabLeak
from fedmi.exposure.knowledge import Knowledge, Target
from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.schema import PIXELS, Column, Table
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.metrics.base import Matched
from fedmi.metrics.feature_accuracy import CategoricalAccuracy, FeatureAccuracy, NumericAccuracy
from fedmi.metrics.judge import Judge
from fedmi.models.classifiers import MLP
from fedmi.training.local import batches, fit, mean_gradient

SERVER = Position.CURIOUS_SERVER
SCHEMA = Table(
    columns=(
        Column(name="colour", levels=("red", "green", "blue")),
        Column(name="size", low=0, high=10, deviation=2),
        Column(name="likes it", levels=("no", "yes")),
        Column(name="share"),
        Column(name="place", levels=("a", "b", "c", "d")),
    )
)
SHAPE = (1, 1, SCHEMA.entries)
MODEL = MLP(hidden=(48,))
Batch = tuple[Tensor, Tensor]
NO_JUDGE = cast(Judge, None)
"""These metrics ask it nothing."""
SMALL = {"position": SERVER, "channel": Channel.GRADIENT}


def rows(count: int, seed: int) -> Batch:
    """Rows whose colour goes with the label (two of three times) and whose rest is even."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=rng)
    logits = torch.rand(count, 1, 1, SCHEMA.entries, generator=rng)
    logits[:, 0, 0, 0] += labels * (torch.rand(count, generator=rng) < 2 / 3)
    return as_rows(SCHEMA, logits.clamp(0, 2)), labels


def case_of(
    payloads: Sequence[Mapping[str, Tensor]],
    counts: Sequence[int],
    channel: Channel = Channel.GRADIENT,
    work: LocalWork | None = None,
    public: Batch | None = None,
    labels: Mapping[str, Tensor] | None = None,
) -> Case:
    facts = {Fact.ARCHITECTURE, Fact.NUM_EXAMPLES, Fact.LOCAL_TRAINING}
    facts |= ({Fact.PUBLIC_DATA} if public else set()) | ({Fact.LABELS} if labels else set())
    start = dict(MODEL.build(SHAPE, 2, Seed.root(3)).state_dict())
    seen = [Observation(SERVER, Channel.GLOBAL_MODEL, 1, (), start, wire_bytes=0)]
    for client, (payload, count) in enumerate(zip(payloads, counts, strict=True)):
        clear = {"num_examples": float(count)}
        seen.append(Observation(SERVER, channel, 1, (client,), payload, 0, clear))
    knowledge = Knowledge(
        input_shape=SHAPE,
        classes=2,
        schema=SCHEMA,
        facts=frozenset(facts),
        build=lambda: MODEL.module(SHAPE, 2),
        work=work or LocalWork(),
        public=public,
        labels=labels or {},
    )
    targets = tuple(Target(f"client{c}", round=1, clients=(c,)) for c in range(len(payloads)))
    return Case(Transcript(SERVER, tuple(seen)), knowledge, targets, Seed.root(5))


def gradient(batch: Batch) -> Mapping[str, Tensor]:
    return mean_gradient(MODEL.build(SHAPE, 2, Seed.root(3)), *batch)


def right(found: Sequence[Reconstruction], truth: Sequence[Batch]) -> Tensor:
    """Share of the columns that are right, [records], row by row after the best assignment."""
    scores = []
    for answer, (inputs, _) in zip(found, truth, strict=True):
        assert answer.samples is not None
        cost = torch.tensor([[1 - naive(s, r) for r in inputs] for s in answer.samples])
        ours, theirs = linear_sum_assignment(cost.numpy())
        scores += [1 - float(cost[a, b]) for a, b in zip(ours, theirs, strict=True)]
    return torch.tensor(scores)


def naive(sample: Tensor, reference: Tensor) -> float:
    """Share of the columns of one row that are right, column by column."""
    ours, theirs = sample.flatten().tolist(), reference.flatten().tolist()
    hits = 0
    for column, place in zip(SCHEMA.columns, SCHEMA.places, strict=True):
        first, second = ours[place], theirs[place]
        if column.levels:
            hits += first.index(max(first)) == second.index(max(second))
        else:
            deviation = 0.2 if column.deviation else 1 / 12**0.5
            hits += abs(first[0] - second[0]) <= 0.319 * deviation
    return hits / len(SCHEMA.columns)


def valid(samples: Tensor | None) -> bool:
    assert samples is not None
    return bool(samples.equal(as_rows(SCHEMA, samples)))


class TestMetrics:
    def matched(self, samples: Tensor, references: Tensor) -> Matched:
        labels = torch.zeros(len(references), dtype=torch.long)
        return Matched(samples, references, labels, labels, None, schema=SCHEMA)

    def test_all_columns_against_a_naive_oracle(self) -> None:
        samples, references = rows(40, 1)[0], rows(40, 2)[0]
        samples[::4] = references[::4]
        expected = sum(map(naive, samples, references)) / 40
        found = FeatureAccuracy().score(self.matched(samples, references), NO_JUDGE)
        assert found == pytest.approx(expected)

    def test_categories_and_numbers_apart(self) -> None:
        references = rows(1, 1)[0]
        references[..., 6] = 0.5
        wrong_level = references.clone()
        wrong_level[..., :3] = references[..., [1, 2, 0]]
        matched = self.matched(wrong_level, references)
        assert CategoricalAccuracy().score(matched, NO_JUDGE) == pytest.approx(2 / 3)
        assert NumericAccuracy().score(matched, NO_JUDGE) == 1
        deviation = 12**-0.5
        for offset, expected in ((0.318 * deviation, 1.0), (0.32 * deviation, 0.5)):
            shifted = references.clone()
            shifted[..., 6] += offset
            assert NumericAccuracy().score(self.matched(shifted, references), NO_JUDGE) == expected

    def test_what_is_no_table_has_no_accuracy(self) -> None:
        images = torch.rand(2, 1, 8, 8)
        labels = torch.zeros(2, dtype=torch.long)
        matched = Matched(images, images, labels, labels, None, schema=PIXELS)
        assert FeatureAccuracy().score(matched, NO_JUDGE) != FeatureAccuracy().score(
            matched, NO_JUDGE
        )


class TestParts:
    def test_logits_become_rows(self) -> None:
        found = RelaxedRows(SCHEMA).shares(torch.randn(3, 2, *SHAPE))
        assert ((found >= 0) & (found <= 1)).all()
        for column, place in zip(SCHEMA.columns, SCHEMA.places, strict=True):
            if column.levels:
                torch.testing.assert_close(found[..., place].sum(-1), torch.ones(3, 2, 1, 1))

    def test_shares_of_entries_sum_to_one_even_of_nothing(self) -> None:
        found = as_shares(SCHEMA, torch.zeros(1, *SHAPE))
        assert found[0, 0, 0, SCHEMA.places[0]].tolist() == pytest.approx([1 / 3] * 3)

    def test_members_are_put_in_the_order_of_the_first_within_labels(self) -> None:
        inputs, _ = rows(6, 3)
        labels = torch.tensor([0, 0, 0, 1, 1, 1])
        order = torch.tensor([2, 0, 1, 4, 5, 3])
        members, told = torch.stack([inputs, inputs[order]]), torch.stack([labels, labels[order]])
        found = aligned(SCHEMA, members, told)
        assert found[1].equal(inputs)
        crossed = torch.stack([inputs, inputs.flip(0)])
        kept = aligned(SCHEMA, crossed, torch.stack([labels, labels]))
        assert all(any(row.equal(r) for r in inputs[3:]) for row in kept[1][:3])

    def test_the_median_leaves_out_one_liar_and_entropy_tells_where_it_lied(self) -> None:
        inputs, _ = rows(3, 4)
        members = inputs.repeat(5, 1, 1, 1, 1)
        members[4, :, 0, 0, :3] = members[4, :, 0, 0, [1, 2, 0]]
        assert pooled(members).equal(inputs)
        doubt = entropies(SCHEMA, members)
        assert (doubt[:, 0] > 0.3).all()
        assert (doubt[:, 1:] < 1e-3).all()

    def test_entropy_of_even_guesses_is_one(self) -> None:
        drawn = torch.rand(4000, 1, *SHAPE, generator=torch.Generator().manual_seed(1))
        doubt = entropies(SCHEMA, as_shares(SCHEMA, drawn))
        assert (doubt > 0.9).all()


class TestTabLeak:
    @pytest.fixture(scope="class")
    def singles(self) -> tuple[Case, list[Batch]]:
        truth = [rows(1, seed) for seed in range(4)]
        return case_of([gradient(b) for b in truth], [1] * 4), truth

    def test_one_record_is_recovered_without_labels(
        self, singles: tuple[Case, list[Batch]]
    ) -> None:
        case, truth = singles
        found = TabLeak(**SMALL, steps=200, restarts=3).reconstruct(case)
        assert right(found, truth).mean() > 0.95
        assert all(valid(answer.samples) for answer in found)

    def test_an_answer_does_not_depend_on_the_other_targets(
        self, singles: tuple[Case, list[Batch]]
    ) -> None:
        case, _ = singles
        attack = TabLeak(**SMALL, steps=20, restarts=4)
        alone = Case(case.transcript, case.knowledge, case.targets[3:4], case.seed)
        together, single = attack.reconstruct(case)[3], attack.reconstruct(alone)[0]
        assert together.samples is not None
        assert single.samples is not None
        torch.testing.assert_close(together.samples, single.samples, atol=1e-2, rtol=0)

    def test_pooling_beats_a_single_search_and_the_imputer_on_a_batch(self) -> None:
        truth = [rows(12, seed) for seed in range(3)]
        labels = {f"client{c}": batch[1] for c, batch in enumerate(truth)}
        case = case_of([gradient(b) for b in truth], [12] * 3, public=rows(500, 9), labels=labels)
        many = TabLeak(**SMALL, steps=150, restarts=8).reconstruct(case)
        one = TabLeak(**SMALL, steps=150, restarts=1).reconstruct(case)
        blind = Imputer(**SMALL, knowledge={"public_data"}).reconstruct(case)
        assert right(many, truth).mean() > right(one, truth).mean()
        assert right(many, truth).mean() > right(blind, truth).mean() + 0.2

    @pytest.mark.slow
    def test_two_local_steps_are_simulated(self) -> None:
        work = LocalWork(recipe=Recipe(learning_rate=0.1, batch_size=1), steps=2)
        truth, payloads = [rows(2, seed) for seed in range(2)], []
        for number, batch in enumerate(truth):
            model = MODEL.build(SHAPE, 2, Seed.root(3))
            fit(model, *batch, batches(2, work, Seed.root(number)), work)
            payloads.append({n: t.clone() for n, t in model.state_dict().items()})
        case = case_of(payloads, [2] * 2, Channel.CLIENT_UPDATE, work)
        attack = TabLeak(position=SERVER, channel=Channel.CLIENT_UPDATE, steps=150, restarts=4)
        found = attack.reconstruct(case)
        assert right(found, truth).mean() > 0.75

    def test_standardised_columns_are_the_same_update_of_the_same_model(self) -> None:
        """A network that is fed them, and its gradient, are what the turned evidence says."""
        inputs, labels = rows(5, 1)
        case = case_of([gradient((inputs, labels))], [5], public=rows(300, 9))
        (seen,) = read(case, Channel.GRADIENT)
        turn = whitening(case, SCHEMA)
        assert turn is not None
        turned, network = turn.evidence(seen), MODEL.module(SHAPE, 2)
        network.load_state_dict(dict(turned.base))
        expected = mean_gradient(network, turn.inputs(inputs), labels)
        for name, part in turned.gradient.items():
            torch.testing.assert_close(part, expected[name], atol=1e-5, rtol=1e-4)
        assert not turned.gradient["1.weight"].equal(seen.gradient["1.weight"])

    def test_of_a_pruned_update_only_what_both_entries_are_left_of_is_matched(self) -> None:
        inputs, labels = rows(5, 1)
        whole = gradient((inputs, labels))
        line = torch.cat([part.abs().flatten() for part in whole.values()]).quantile(0.5)
        left = {name: part * (part.abs() >= line) for name, part in whole.items()}
        cases = [case_of([part], [5], public=rows(300, 9)) for part in (whole, left)]
        object.__setattr__(cases[1].knowledge, "protections", ("gradient_pruning(0.5)",))
        turn = whitening(cases[0], SCHEMA)
        assert turn is not None
        (seen,), (cut,) = (read(case, Channel.GRADIENT) for case in cases)
        expected, turned = turn.evidence(seen), turn.evidence(adapted(cases[1], cut))
        assert turned.support is not None
        kept = turned.support["1.weight"]
        assert 0 < kept.sum() < (cut.gradient["1.weight"] != 0).sum()
        torch.testing.assert_close(
            turned.gradient["1.weight"][kept], expected.gradient["1.weight"][kept]
        )

    def test_a_uniformly_masked_update_tells_no_more_than_that_of_others(self) -> None:
        truth, others = ([rows(2, seed + shift) for seed in range(8)] for shift in (0, 100))
        rng = torch.Generator().manual_seed(7)
        masked = [
            {name: 2 * torch.rand(t.shape, generator=rng) - 1 for name, t in gradient(b).items()}
            for b in truth
        ]
        attack = TabLeak(**SMALL, steps=100, restarts=4)
        real = attack.reconstruct(case_of(masked, [2] * 8))
        prior = attack.reconstruct(case_of([gradient(b) for b in others], [2] * 8))
        clear = attack.reconstruct(case_of([gradient(b) for b in truth], [2] * 8))
        baseline = right(prior, truth)
        spread = float(baseline.std()) / len(baseline) ** 0.5
        assert right(real, truth).mean() < baseline.mean() + 3 * spread
        assert right(clear, truth).mean() > baseline.mean() + 3 * spread

    def test_an_update_that_says_nothing_is_answered_and_flagged(self) -> None:
        zero = {name: torch.zeros_like(part) for name, part in gradient(rows(2, 1)).items()}
        (found,) = TabLeak(**SMALL, steps=5, restarts=2).reconstruct(case_of([zero], [2]))
        assert "zero_gradients" in found.flags
        assert found.confidence.tolist() == [-torch.inf] * 2

    @pytest.mark.parametrize("attack", [TabLeak(**SMALL), Imputer(**SMALL)])
    def test_records_that_are_no_table_are_refused(self, attack: Attack) -> None:
        case = case_of([gradient(rows(1, 1))], [1], public=rows(9, 1))
        object.__setattr__(case.knowledge, "schema", PIXELS)
        with pytest.raises(AttackError, match="not rows of a table"):
            attack.reconstruct(case)


class TestImputer:
    def test_it_answers_what_is_commonest_of_the_label(self) -> None:
        public, known = rows(500, 9)
        labels = {"client0": torch.tensor([1, 0, 1])}
        case = case_of([gradient(rows(3, 1))], [3], public=(public, known), labels=labels)
        (found,) = Imputer(**SMALL).reconstruct(case)
        assert found.samples is not None
        assert valid(found.samples)
        for sample, label in zip(found.samples.flatten(1), (1, 0, 1), strict=True):
            same = public[known == label].flatten(1)
            assert sample[:3].argmax() == same[:, :3].sum(0).argmax()
            assert sample[3] == pytest.approx(float(same[:, 3].quantile(0.5)))

    def test_marginals_are_those_of_the_public_rows(self) -> None:
        case = case_of([gradient(rows(400, 1))], [400], public=rows(500, 9))
        (found,) = Imputer(**SMALL, guess="marginal").reconstruct(case)
        assert found.samples is not None
        assert valid(found.samples)
        difference = found.samples.mean(0) - rows(500, 9)[0].mean(0)
        assert difference.abs().max() < 0.08

    def test_it_reads_nothing_of_the_update_but_labels(self) -> None:
        labels = {"client0": torch.tensor([0, 1])}
        first, second = (
            Imputer(**SMALL).reconstruct(
                case_of([gradient(rows(2, s))], [2], public=rows(50, 9), labels=labels)
            )[0]
            for s in (1, 2)
        )
        assert first.samples is not None
        assert second.samples is not None
        assert first.samples.equal(second.samples)

    def test_without_public_rows_it_says_so(self) -> None:
        with pytest.raises(AttackError, match="grant the fact 'public_data'"):
            Imputer(**SMALL).reconstruct(case_of([gradient(rows(1, 1))], [1]))
