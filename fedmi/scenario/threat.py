"""Whether every attack can be run as asked: who sees what, what they know, what there is."""

from collections.abc import Iterable, Iterator

from fedmi.attacks.base import Attack
from fedmi.data.dataset import Card
from fedmi.deployments.base import Deployment
from fedmi.deployments.federated.schedule import sample_size
from fedmi.exposure.knowledge import View
from fedmi.exposure.words import PER_ROUND, Channel, Fact, Position
from fedmi.scenario.errors import choice, listed
from fedmi.scenario.schema import Scenario

COALITIONS = frozenset(
    {
        Position.CURIOUS_SERVER,
        Position.MALICIOUS_SERVER,
        Position.CLIENT,
        Position.MALICIOUS_CLIENT,
        Position.COMPUTE_PARTY,
        Position.DEALER,
    }
)


def view(attack: Attack, deployment: Deployment) -> View | None:
    """What the attack's position sees there on its channel, if it does."""
    return next((v for v in deployment.views() if attack.can_read(v)), None)


def applies(attack: Attack, deployment: Deployment) -> bool:
    named = not attack.deployments or deployment.name in attack.deployments
    planted = attack.recovers != "membership" or attack.kind in deployment.audits
    exposed = not attack.exploits or bool(deployment.malice_kinds & attack.exploits)
    return named and planted and exposed and view(attack, deployment) is not None


def inside(attack: Attack) -> bool:
    """Whether it reads averages that its own update is part of: it takes that off by nature.

    A `client` is the first of those in the average; the `malicious_client` is itself.
    """
    member = attack.position in (Position.CLIENT, Position.MALICIOUS_CLIENT)
    return member and attack.channel == Channel.AGGREGATE and attack.recovers != "membership"


def reads_model(attack: Attack, scenario: Scenario) -> bool:
    """Whether it is to attack models of this kind."""
    return not attack.models or scenario.model.kind in attack.models


def problems(scenario: Scenario, card: Card) -> list[str]:
    """Everything that would keep the scenario from running, in words."""
    found = [text for deployment in scenario.deployment for text in _crowd(deployment, card)]
    found += (
        [*_misfits(scenario, card)]
        or _architecture(scenario, card)
        or list(_untrainable(scenario, card))
    )
    if scenario.pretraining.epochs and card.identities:
        found.append(
            "[pretraining] a class is one person here, so that public records are of other classes "
            "than the private ones: no classifier of these can be trained on them"
        )
    for attack in scenario.attack:
        place = f'[[attack]] "{attack.title}"'
        checks = (
            *(_channel, _exploits, _unaltered, _replays, _shares, _targets, _grants),
            *(_facts, _rounds, _scores, _coalition, _planted),
        )
        found += [f"{place} {text}" for check in checks for text in check(attack, scenario)]
    return found


def _misfits(scenario: Scenario, card: Card) -> Iterator[str]:
    """Models and attacks that are for other kinds of records."""
    for place, model in (("model", scenario.model), ("evaluator", scenario.evaluator)):
        if why := model.misfit(card.schema):
            yield f'[{place}] kind = "{model.kind}": {why}'
    kind = card.schema.kind
    for metric in scenario.metrics:
        if kind not in metric.schemas:
            yield (
                f'metrics names "{metric.kind}", which is for {_words(metric.schemas)}, but the '
                f"records are {kind}"
            )
    for attack in scenario.attack:
        if card.schema.kind not in attack.reads_schemas:
            yield (
                f'[[attack]] "{attack.title}" recovers {_words(attack.reads_schemas)}, but the '
                f"records are {card.schema.kind}"
            )


def _architecture(scenario: Scenario, card: Card) -> list[str]:
    """A model that does not take the data, and attacks that cannot read it."""
    model = scenario.model
    try:
        model.blueprint(card.shape, card.classes)
        networks = {
            deployment.name: deployment.builds(model).blueprint(card.shape, card.classes)
            for deployment in scenario.deployment
        }
    except ValueError as error:
        return [f'[model] kind = "{model.kind}": {error}']
    reasons = (
        f'[[attack]] "{attack.title}" {reason}'
        for attack in scenario.attack
        for deployment in scenario.deployment
        if reads_model(attack, scenario) and applies(attack, deployment)
        if (reason := attack.unsuited(networks[deployment.name]))
    )
    return list(dict.fromkeys(reasons))


def _untrainable(scenario: Scenario, card: Card) -> Iterator[str]:
    """What the deployments themselves, and their protections, find wrong."""
    for deployment in scenario.deployment:
        recipe = deployment.recipe or scenario.training
        for why in deployment.problems(card, scenario.model, recipe):
            yield f'[[deployment]] "{deployment.name}" {why}'


def _crowd(deployment: Deployment, card: Card) -> Iterator[str]:
    clients = getattr(deployment, "clients", None)
    if isinstance(clients, int) and clients > card.private_records:
        yield (
            f'[[deployment]] "{deployment.name}" clients = {clients}, but [data] has '
            f"{card.private_records} private records; give at most {card.private_records}"
        )


def _channel(attack: Attack, _scenario: Scenario) -> Iterator[str]:
    if attack.channel not in attack.channels:
        yield (
            f'channel = "{attack.channel}" cannot be read by {attack.kind}; it reads: '
            f"{_words(attack.channels)}"
        )


def _targets(attack: Attack, scenario: Scenario) -> Iterator[str]:
    """Deployments that are not there, and those where nobody in the position sees the channel."""
    names = [deployment.name for deployment in scenario.deployment]
    for name in attack.deployments:
        if name not in names:
            yield (f'deployments names "{name}", which is not there{choice(name, names)}')
    asked = [
        d for d in scenario.deployment if not attack.deployments or d.name in attack.deployments
    ]
    blind = [d for d in asked if view(attack, d) is None]
    if blind and (attack.deployments or len(blind) == len(asked)):
        seen = "; ".join(f"{d.name}: {_sight(d)}" for d in blind)
        yield (
            f'position = "{attack.position}" does not see channel = "{attack.channel}". '
            f"Who sees what: {seen}"
        )


def _sight(deployment: Deployment) -> str:
    return listed([f"{seen.position} sees {seen.channel}" for seen in deployment.views()])


def _exploits(attack: Attack, scenario: Scenario) -> Iterator[str]:
    """An attack on what nobody here does to the models."""
    asked = [
        d for d in scenario.deployment if not attack.deployments or d.name in attack.deployments
    ]
    honest = [d for d in asked if attack.exploits and not d.malice_kinds & attack.exploits]
    if honest and (attack.deployments or len(honest) == len(asked)):
        what = "an intruder" if attack.position == Position.MALICIOUS_CLIENT else "a malice"
        yield (
            f"needs {what} of kind {_words(attack.exploits)} in "
            f"{listed([deployment.name for deployment in honest])}"
        )


def _unaltered(attack: Attack, scenario: Scenario) -> Iterator[str]:
    """Rounds in which the server that the attack exploits sends the honest model."""
    for deployment in scenario.deployment:
        if not (attack.exploits & deployment.malice_kinds and applies(attack, deployment)):
            continue
        altered = getattr(getattr(deployment, "malice", None), "rounds", None)
        honest = [r for r in attack.rounds if altered is not None and r not in altered]
        if honest and attack.channel in PER_ROUND:
            yield (
                f'rounds names {honest[0]}, in which the server of "{deployment.name}" sends the '
                f"honest model; its malice has rounds = {list(altered or ())}"
            )


def _replays(attack: Attack, scenario: Scenario) -> Iterator[str]:
    """What the attack has to do as the malicious party did, and is told to do otherwise."""
    for deployment in scenario.deployment:
        intruder = getattr(deployment, "intruder", None)
        if intruder is None or intruder.kind not in attack.exploits:
            continue
        for name in attack.replays if applies(attack, deployment) else ():
            if getattr(attack, name) not in (None, getattr(intruder, name)):
                yield (
                    f'{name} is another one than that of the intruder of "{deployment.name}", '
                    "which the attack replays; leave it out"
                )


def _shares(attack: Attack, _scenario: Scenario) -> Iterator[str]:
    """What a server passes on in SecAgg+ are shares of keys."""
    holders = frozenset({Position.COMPUTE_PARTY, Position.DEALER})
    if attack.channel == Channel.SHARE and attack.position not in holders:
        yield (
            f'position = "{attack.position}" holds no shares of records, updates or models on '
            f'channel "share", at most of keys; those who do: {_words(holders)}'
        )


def _grants(attack: Attack, _scenario: Scenario) -> Iterator[str]:
    useful = attack.needs | attack.uses | attack.required_facts
    if idle := attack.knowledge - useful:
        yield (
            f"knowledge grants {_words(idle)}, which {attack.kind} does not use; it can use: "
            f"{_words(useful)}"
        )


def _facts(attack: Attack, scenario: Scenario) -> Iterator[str]:
    for deployment in scenario.deployment:
        seen = view(attack, deployment)
        if seen is None or not applies(attack, deployment):
            continue
        lacking = attack.required_facts - seen.facts - attack.knowledge
        if lacking:
            yield (
                f"needs {_words(lacking)}, which {attack.position} does not know by nature in "
                f'"{deployment.name}"; grant it: knowledge = {_toml(attack.knowledge | lacking)}'
            )


def _rounds(attack: Attack, scenario: Scenario) -> Iterator[str]:
    if attack.channel not in PER_ROUND:
        return
    if min(attack.rounds) < 1:
        yield f"rounds = {list(attack.rounds)}: rounds count from 1"
    for deployment in scenario.deployment:
        rounds = getattr(deployment, "rounds", None)
        late = [r for r in attack.rounds if isinstance(rounds, int) and r > rounds]
        if late and applies(attack, deployment):
            yield f'rounds names {late[0]}, but "{deployment.name}" has {rounds} rounds'


def _scores(attack: Attack, scenario: Scenario) -> Iterator[str]:
    if not any(metric.measures == attack.recovers for metric in scenario.scored):
        yield (
            f"recovers {attack.recovers}, but none of the metrics measures {attack.recovers}: "
            f"{listed([metric.kind for metric in scenario.scored])}"
        )


def _coalition(attack: Attack, scenario: Scenario) -> Iterator[str]:
    """Colluders where nobody can collude, or more of them than there are others."""
    if inside(attack):
        yield from _company(attack, scenario)
    if not attack.colluders:
        return
    if attack.position in (Position.COMPUTE_PARTY, Position.DEALER):
        yield from _parties(attack, scenario)
        return
    if attack.position not in COALITIONS:
        yield (
            f"colluders = {attack.colluders}, but {attack.position} forms no coalition with "
            f"clients; those who can: {_words(COALITIONS)}"
        )
    for deployment in scenario.deployment:
        clients = getattr(deployment, "clients", None)
        others = clients - 1 if isinstance(clients, int) else 0
        if applies(attack, deployment) and attack.colluders > others:
            yield f'colluders = {attack.colluders}, but "{deployment.name}" has {others} others'


def _company(attack: Attack, scenario: Scenario) -> Iterator[str]:
    """A client in an average of nobody but itself and its colluders."""
    for deployment in scenario.deployment:
        clients, fraction = (getattr(deployment, name, 0) for name in ("clients", "fraction"))
        asked = sample_size(clients, fraction)
        if applies(attack, deployment) and asked < attack.colluders + 2:
            with_them = f" and its {attack.colluders} colluders" if attack.colluders else ""
            yield (
                f'position = "{attack.position}" is itself one of the {asked} clients that '
                f'"{deployment.name}" asks a round: its own update{with_them} taken off, the '
                "aggregate holds nobody else; ask more clients"
            )


def _parties(attack: Attack, scenario: Scenario) -> Iterator[str]:
    """More colluding compute parties than there are others, or nothing they could do together."""
    if attack.position == Position.DEALER:
        yield from _dealt_to(attack, scenario)
        return
    for deployment in scenario.deployment:
        parties = deployment.compute_parties
        if attack.inverts_classes:  # a model is among those who serve it, or who trained it
            parties = deployment.serving.compute_parties or parties
        if applies(attack, deployment) and attack.colluders > parties - 1:
            yield (
                f'colluders = {attack.colluders}, but "{deployment.name}" has {parties} compute '
                f"parties; at most {parties - 1} can join the one that attacks"
            )


def _dealt_to(attack: Attack, scenario: Scenario) -> Iterator[str]:
    """A dealer with more compute parties than it deals to, or an attack that needs none."""
    if not attack.with_dealer:
        yield (
            f"colluders = {attack.colluders}, but {attack.kind} makes nothing of what a dealer and "
            'compute parties know together; "share_reconstruction" does'
        )
    for deployment in scenario.deployment:
        parties = deployment.compute_parties
        if applies(attack, deployment) and attack.colluders > parties:
            yield (
                f'colluders = {attack.colluders}, but in "{deployment.name}" the dealer deals to '
                f"{parties} compute parties"
            )


def _planted(attack: Attack, scenario: Scenario) -> Iterator[str]:
    """An audit of a training in which nothing was planted."""
    if attack.recovers != "membership":
        return
    asked = [d for d in scenario.deployment if d.name in attack.deployments]
    bare = [d.name for d in asked or scenario.deployment if attack.kind not in d.audits]
    if bare and (asked or len(bare) == len(scenario.deployment)):
        yield (
            f"finds no canaries in {listed(bare)}: give a protection audit_canaries (canary_audit) "
            "or the deployment audit_records (one_run_audit)"
        )


def _words(items: Iterable[object]) -> str:
    return listed(sorted(str(item) for item in items))


def _toml(facts: Iterable[Fact]) -> str:
    return "[" + ", ".join(sorted(f'"{fact}"' for fact in facts)) + "]"
