"""Attacks on shares: exact from the threshold on, nothing below it, and weak sharing found out."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from fedmi.attacks.base import Case
from fedmi.attacks.engine.evidence import AttackError, read
from fedmi.attacks.engine.ring import plainest
from fedmi.attacks.engine.shared import model_state
from fedmi.attacks.gradient.inverting_gradients import InvertingGradients
from fedmi.attacks.gradient.linear_inversion import LinearInversion
from fedmi.attacks.model.mi_face import MIFace
from fedmi.attacks.share.share_reconstruction import ShareReconstruction
from fedmi.exposure.knowledge import Knowledge, Target
from fedmi.exposure.observation import Observation, Transcript
from fedmi.exposure.opening import Confided, Opened
from fedmi.exposure.recipe import LocalWork, Recipe
from fedmi.exposure.seeding import Seed
from fedmi.exposure.words import Channel, Fact, Position
from fedmi.models.classifiers import MLP
from fedmi.mpc.opening import Opening
from fedmi.mpc.scheme import Scheme
from fedmi.mpc.shares import Ring, decode, encode
from tests.gradient_cases import (
    CLASSES,
    SHAPE,
    Batch,
    base_model,
    make_case,
    psnr,
    sets,
    trained,
)
from tests.share_cases import (
    ABY3,
    PARTY,
    SCHEMES,
    SEMI2K,
    constant_mask,
    nearly_plain,
    reused_mask,
    ring,
    split,
    tensors,
)

SPEC = MLP(hidden=(16,))
BITS = ABY3.fraction_bits
WORK = LocalWork(recipe=Recipe(learning_rate=0.1, batch_size=8), steps=1)
Splitter = Callable[[Ring, Scheme, int], Sequence[Ring]]


def item(
    scheme: Scheme,
    payload: dict[str, Tensor],
    clients: tuple[int, ...],
    round: int,
    seed: int,
    way: Splitter = split,
) -> tuple[Observation, list[Confided]]:
    """As party 0 has it, and as the others do."""
    named = enumerate(payload.items())
    by_name = {n: way(encode(v.numpy(), BITS), scheme, seed + 10 * i) for i, (n, v) in named}
    held = [tensors({n: parts[r] for n, parts in by_name.items()}) for r in range(scheme.size)]
    others = [Confided(r, round, held[r], PARTY, clients) for r in range(1, scheme.size)]
    return Observation(PARTY, Channel.SHARE, round, clients, held[0], 0), others


def case_of(
    scheme: Scheme,
    seen: Sequence[Observation],
    told: Sequence[Confided],
    targets: Sequence[Target],
    position: Position = PARTY,
) -> Case:
    knowledge = Knowledge(
        input_shape=SHAPE,
        classes=CLASSES,
        facts=frozenset({Fact.ARCHITECTURE, Fact.NUM_EXAMPLES, Fact.LOCAL_TRAINING}),
        build=lambda: SPEC.module(SHAPE, CLASSES),
        work=WORK,
        num_examples={target.id: 3 for target in targets},
        colluders={target.id: tuple(told) for target in targets} if told else {},
        opener=Opening(scheme),
    )
    return Case(Transcript(position, tuple(seen)), knowledge, tuple(targets), Seed.root(0))


def owners_case(
    scheme: Scheme, truth: Sequence[Batch], colluders: int, way: Splitter = split, seed: int = 0
) -> Case:
    """Each owner's records in shares, and so many parties beside party 0."""
    found = []
    for owner, (inputs, labels) in enumerate(truth):
        one_hot = torch.nn.functional.one_hot(labels, CLASSES).double()
        payload = {"inputs": inputs.double(), "labels": one_hot}
        found.append(item(scheme, payload, (owner,), 1, 1000 * seed + 100 * owner, way))
    told = [c for _, others in found for c in others if c.client <= colluders]
    targets = [Target(f"owner {o}", round=1, clients=(o,)) for o in range(len(truth))]
    return case_of(scheme, [seen for seen, _ in found], told, targets)


def attack(position: Position = PARTY, colluders: int = 0) -> ShareReconstruction:
    return ShareReconstruction(position=position, channel=Channel.SHARE, colluders=colluders)


@pytest.mark.parametrize("scheme", [*SCHEMES, Scheme(protocol="semi2k", parties=3)], ids=str)
def test_from_the_threshold_on_every_record_is_exact(scheme: Scheme) -> None:
    truth = sets([2, 3], seed=0)
    answers = attack().reconstruct(owners_case(scheme, truth, scheme.threshold - 1))
    for answer, (inputs, labels) in zip(answers, truth, strict=True):
        assert answer.samples is not None
        assert answer.labels is not None
        assert (answer.samples - inputs).abs().max() <= 2.0 ** -(BITS + 1) + 1e-7
        assert torch.equal(answer.labels, labels)
        assert not answer.flags
        assert answer.confidence.tolist() == [0.0] * len(labels)


def gain(scheme: Scheme, colluders: int, way: Splitter) -> Tensor:
    """dB over prior-only: the same attack on true shares of other records, by owner."""
    truth = sets([4] * 12, seed=0)
    ours = attack().reconstruct(owners_case(scheme, truth, colluders, way))
    prior = attack().reconstruct(owners_case(scheme, sets([4] * 12, seed=5), colluders, split, 7))
    assert all("sealed_read_raw" in answer.flags for answer in ours)
    assert all(answer.confidence.isneginf().all() for answer in ours)
    return psnr(ours, truth) - psnr(prior, truth)


@pytest.mark.parametrize(
    ("scheme", "colluders"), [(ABY3, 0), (SEMI2K, 0), (Scheme(protocol="semi2k", parties=3), 1)]
)
def test_below_the_threshold_shares_give_nothing(scheme: Scheme, colluders: int) -> None:
    found = gain(scheme, colluders, split)
    assert found.mean().abs() < 2.5 * found.std() / len(found) ** 0.5 + 0.02


@pytest.mark.parametrize("weak", [nearly_plain, constant_mask, reused_mask])
@pytest.mark.parametrize("scheme", [ABY3, SEMI2K], ids=str)
def test_weak_sharing_is_read_below_the_threshold(scheme: Scheme, weak: Splitter) -> None:
    found = gain(scheme, 0, weak)
    assert found.mean() > 2.5 * found.std() / len(found) ** 0.5 + 1


def test_labels_of_weak_shares_are_read() -> None:
    truth = sets([8], seed=0)
    (answer,) = attack().reconstruct(owners_case(ABY3, truth, 0, constant_mask))
    assert answer.labels is not None
    assert torch.equal(answer.labels, truth[0][1])


def test_the_plainest_reading_cuts_the_circle_at_its_gap() -> None:
    numbers = np.array([[0, 10, 40, 20]], np.uint64)
    for offset in (np.uint64(5), np.uint64(2**64 - 15)):
        held = np.stack([numbers + offset, ring((1, 4), 1)], axis=-1)
        assert np.allclose(plainest(held), numbers / 40)
    mask = ring((1, 6), 2)
    rows = np.array([[0, 9, 1, 5, 3, 8], [4, 0, 2, 8, 1, 1], [2, 3, 6, 2, 2, 6]], np.uint64)
    found = plainest((rows + mask)[..., None])
    centred = rows - np.rint(rows.mean(0))
    for row, wanted in zip(found, centred, strict=True):
        assert np.corrcoef(row, wanted)[0, 1] > 0.95


def test_uniform_shares_are_read_as_uniform() -> None:
    found = plainest(ring((50, 200, 2), 0))
    assert abs(found.mean() - 0.5) < 0.02
    assert abs(found.std() - 12**-0.5) < 0.02


def test_a_dealer_reads_the_bytes_it_has() -> None:
    seeds = {"request/000000": torch.arange(7, dtype=torch.uint8) * 36}
    seen = Observation(Position.DEALER, Channel.SHARE, 1, (), seeds, 7)
    target = Target("owner 0", round=1, clients=(0,))
    case = case_of(SEMI2K, [seen], [], [target], Position.DEALER)
    (answer,) = attack(Position.DEALER).reconstruct(case)
    assert answer.samples is not None
    assert answer.samples.shape == (3, *SHAPE)
    first = round(6 * float(answer.samples.flatten()[0]))
    wanted = np.resize(np.roll(np.arange(7), -first) / 6, (3, *SHAPE))
    assert np.allclose(answer.samples.numpy(), wanted)
    assert answer.flags == {"sealed_read_raw"}
    (again,) = attack(Position.DEALER).reconstruct(case)
    assert answer.labels is not None
    assert again.labels is not None
    assert torch.equal(answer.labels, again.labels)
    blank = replace(case, knowledge=replace(case.knowledge, num_examples={}))
    with pytest.raises(AttackError, match="must be granted 'num_examples'"):
        attack(Position.DEALER).reconstruct(blank)
    with pytest.raises(AttackError, match="no bytes"):
        attack(Position.DEALER).reconstruct(
            replace(case, transcript=Transcript(Position.DEALER, ()))
        )


def test_what_an_attack_on_shares_cannot_be_asked_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"curious_server.*computes on no shares"):
        attack(Position.CURIOUS_SERVER)
    assert attack().required_facts == {Fact.ARCHITECTURE}
    assert attack(Position.DEALER).required_facts == {Fact.NUM_EXAMPLES}
    case = owners_case(ABY3, sets([2], seed=0), 0)
    (seen,) = case.transcript.observations
    update = replace(seen, payload={"share": torch.zeros(5, dtype=torch.int64)})
    with pytest.raises(AttackError, match="'inputs' is missing"):
        attack().reconstruct(replace(case, transcript=Transcript(PARTY, (update,))))
    other = replace(case.knowledge, input_shape=(1, 8, 32))
    with pytest.raises(AttackError, match=r"expected \[n, 1, 8, 32, k\]"):
        attack().reconstruct(replace(case, knowledge=other))
    with pytest.raises(AttackError, match="no share of clients"):
        attack().reconstruct(replace(case, transcript=Transcript(PARTY, ())))


def model_case(scheme: Scheme, colluders: int, seed: int = 0) -> tuple[Case, dict[str, Tensor]]:
    """A model in shares, round 2, behind an owner's item and messages of round 1."""
    state = trained(SPEC, sets([40], seed=1)[0], LocalWork(epochs=20), Seed.root(1))
    payload = {f"model/{name}": tensor.double() for name, tensor in state.items()}
    seen, told = item(scheme, payload, (), 2, seed)
    messages = replace(seen, round=1, payload={"message/0": torch.zeros(3, dtype=torch.uint8)})
    targets = [Target(f"class {label}", label=label) for label in range(3)]
    members = [c for c in told if c.client <= colluders]
    return case_of(scheme, [messages, seen], members, targets), state


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_model_in_shares_is_inverted_like_the_model_itself(scheme: Scheme) -> None:
    case, state = model_case(scheme, scheme.threshold - 1)
    found, flags = model_state(case, Channel.SHARE)
    assert not flags
    for name, tensor in state.items():
        assert (found[name] - tensor).abs().max() <= 2.0**-BITS
    clear = Observation(Position.MODEL_HOLDER, Channel.GLOBAL_MODEL, 2, (), state, 0)
    plain = replace(case, transcript=Transcript(Position.MODEL_HOLDER, (clear,)))
    options = {"alpha": 50}
    shared = MIFace.model_validate({"position": PARTY, "channel": "share", **options})
    white = MIFace.model_validate(
        {"position": Position.MODEL_HOLDER, "channel": "global_model", **options}
    )
    assert shared.inverts_classes
    assert shared.required_facts == {Fact.ARCHITECTURE}
    for ours, theirs in zip(shared.reconstruct(case), white.reconstruct(plain), strict=True):
        assert ours.samples is not None
        assert theirs.samples is not None
        assert (ours.samples - theirs.samples).abs().max() < 1e-2
        assert ours.flags == theirs.flags


def test_a_model_below_the_threshold_is_read_raw_and_still_attacked() -> None:
    case, state = model_case(ABY3, 0)
    found, flags = model_state(case, Channel.SHARE)
    assert flags == {"sealed_read_raw"}
    for name, tensor in state.items():
        if tensor.dim() > 1:
            assert abs(found[name].std() - (2 / tensor.shape[1]) ** 0.5) < 0.02
            together = torch.stack([found[name].flatten(), tensor.flatten()])
            assert abs(torch.corrcoef(together)[0, 1]) < 5 / tensor.numel() ** 0.5
    shared = MIFace(position=PARTY, channel=Channel.SHARE, alpha=20)
    answers = shared.reconstruct(case)
    assert all("sealed_read_raw" in answer.flags for answer in answers)
    assert all(answer.samples is not None and answer.samples.std() > 0 for answer in answers)


def test_where_there_is_no_model_in_shares_it_is_said() -> None:
    case, _ = model_case(ABY3, 1)
    messages, seen = case.transcript.observations
    shared = MIFace(position=PARTY, channel=Channel.SHARE, alpha=5)
    with pytest.raises(LookupError, match="holds no share of a model"):
        shared.reconstruct(replace(case, transcript=Transcript(PARTY, (messages,))))
    with pytest.raises(LookupError, match='fact "architecture"'):
        shared.reconstruct(replace(case, knowledge=replace(case.knowledge, build=None)))
    lacking = {n: t for n, t in seen.payload.items() if n != "model/1.bias"}
    part = Transcript(PARTY, (replace(seen, payload=lacking),))
    with pytest.raises(LookupError, match=r"'1\.bias' is nothing, expected \[16\]"):
        shared.reconstruct(replace(case, transcript=part))
    dealer = replace(messages, position=Position.DEALER, payload={"seeds": torch.arange(99)})
    transcript = Transcript(Position.DEALER, (dealer,))
    _, flags = model_state(replace(case, transcript=transcript), Channel.SHARE)
    assert flags == {"sealed_read_raw"}


def aggregator_case(told: bool) -> tuple[Case, list[Batch]]:
    """A client's update among aggregators, party 0's part a uniform vector."""
    batches = sets([1], seed=0)
    state = trained(SPEC, batches[0], WORK, Seed.root(0))
    base = base_model(SPEC).state_dict()
    change = torch.cat([(state[n] - base[n]).flatten() for n in base]).double()
    masked, mask = (p[..., 0] for p in split(encode(change.numpy(), BITS), SEMI2K, 3))
    case = make_case(SPEC, [tensors({"share": masked})], [1], Channel.SHARE, WORK)

    def opener(
        seen: Observation, transcript: Transcript, others: Sequence[Confided]
    ) -> Opened | None:
        if not others:
            return None
        parts = [seen.payload["share"], *(one.tensors["share"] for one in others)]
        flat = torch.from_numpy(decode(sum(part.numpy() for part in parts), BITS))
        pieces = flat.split([t.numel() for t in base.values()])
        return Opened({n: p.view_as(base[n]) for n, p in zip(base, pieces, strict=True)})

    seen = [
        replace(one, position=PARTY, averages=Channel.CLIENT_UPDATE)
        for one in case.transcript.observations
    ]
    other = Confided(1, 1, tensors({"share": mask}), PARTY, (0,))
    knowledge = replace(
        case.knowledge, opener=opener, colluders={"client0": (other,)} if told else {}
    )
    return replace(case, transcript=Transcript(PARTY, tuple(seen)), knowledge=knowledge), batches


def test_an_update_among_aggregators_is_inverted_by_all_of_them_alone() -> None:
    case, batches = aggregator_case(told=True)
    linear = LinearInversion(position=PARTY, channel=Channel.SHARE)
    (answer,) = linear.reconstruct(case)
    assert not answer.flags
    assert psnr([answer], batches).min() > 30
    case, _ = aggregator_case(told=False)
    (answer,) = linear.reconstruct(case)
    assert answer.flags == {"sealed_read_raw"}
    assert psnr([answer], batches).max() < 20


def test_shares_of_keys_and_of_records_are_no_updates() -> None:
    case, _ = aggregator_case(told=False)
    server = tuple(
        replace(one, position=Position.CURIOUS_SERVER) for one in case.transcript.observations
    )
    with pytest.raises(AttackError, match="are shares of keys"):
        read(replace(case, transcript=Transcript(Position.CURIOUS_SERVER, server)), Channel.SHARE)
    owners = owners_case(ABY3, sets([1], seed=0), 0)
    with pytest.raises(AttackError, match="shared their records"):
        InvertingGradients(position=PARTY, channel=Channel.SHARE).reconstruct(owners)
