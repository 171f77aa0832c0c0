"""Evidence flags: what a reader must know before believing a row, and the words for it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from fedmi.exposure.words import Channel
from fedmi.leakage.intervals import SEEDS_FOR_TWO_LEVELS
from fedmi.leakage.row import LeakageRow, join, split
from fedmi.leakage.trial import Trial

SMALL_SAMPLE = 8
CHANCE_MARGIN = 1e-6
"""Accuracies are float32: 1 of 20 comes out a little above 0.05."""

EXPLANATIONS: Mapping[str, str] = MappingProxyType(
    {
        "failed": "The attack or the training it needs failed, so the row has no figures. "
        "Its reason stands after the flag.",
        "failed_seeds": "Some of the seeds failed. The row is left without figures, because a mean "
        "over the seeds that survived would be biased.",
        "positive_control_failed": "The same attack shows no advantage clear of zero on the "
        "unprotected deployment either, so a low figure here is no evidence that a protection "
        "works: the attack may simply be too weak.",
        "control_differs": "The unprotected deployment that this row is held against differs from "
        "it in more than the protections: in the settings named, whose value there stands before "
        "the value here. Part of the difference in leakage or accuracy may be theirs.",
        "control_without_interval": "The same attack has an advantage on the unprotected "
        "deployment, but on one target only, so nothing says that it is clear of zero.",
        "architecture_refused": "The clients pin the architecture and refused the model that the "
        "malicious server wanted trained. It went on with the honest one, so what it would have "
        "planted is not there; the defence worked, and training is as with an honest server.",
        "fewer_bins_than_records": "Fewer bins of the imprint held something than the target has "
        "records: some records share a bin.",
        "noisy_bins": "Most bins of the imprint hold nothing like a record: noise or rounding is "
        "above the signal.",
        "several_local_steps": "The theory behind the attack is of one local step; clients took "
        "several.",
        "nothing_planted": "The server sent the honest model in this round.",
        "several_fished": "More than one record of the class was in the batch: what is inverted is "
        "the mean of their gradients.",
        "other_classes": "Records of other classes passed the cut-off of feature fishing too.",
        "rank_too_high": "More tokens, or distinct prefixes, than the model is wide: the gradient "
        "has full rank and exact recovery is impossible. Tokens are given in no order.",
        "no_candidates": "No token at any place explains the gradient's rows: tokens are given in "
        "no order.",
        "sentences_not_found": "Fewer whole sentences were found than the batch has.",
        "signal_below_rounding": "What tells sentences apart is smaller than the rounding of the "
        "gradient to float32.",
        "tokens_not_placed": "The tokens are known, but not all of their places.",
        "place_rows_not_visible": "The rows of the embedding tables' gradients are lost in "
        "noise, or places have none, so that no token could be placed by them.",
        "started_from_place_rows": "The search began with the sentences that the closed form "
        "place_rows finds; what it adds to them is the difference to that attack's row.",
        "rows_pruned": "Pruning left too few whole rows of the layers that the attack reads for "
        "their span to be known; the answer is what the rows of the embeddings tell by themselves.",
        "start_kept": "The search found no sentences that explain the update clearly better than "
        "those that it began with, and these were returned.",
        "no_token_read": "No token could be read from what was planted, as under noise or pruning: "
        "the answer is a blind guess.",
        "no_single_record": "No trapped neuron held a single record alone.",
        "clients_sent_different_models": "The server sent clients of one target different altered "
        "models, so that their mean is no update of any one model.",
        "sentences_not_separated": "Which token belongs to which sentence could not be told.",
        "no_positive_control": "No unprotected deployment of the same training regime was attacked "
        "in the same way in this run, so nothing shows that the attack works at all.",
        "interval_crosses_zero": "The 95 % interval of the advantage contains zero: on these "
        "targets the attack cannot be told from guessing with the prior alone. Where nothing "
        "protects the deployment that says something of the attack or of the data (public records "
        "may show the same classes), and is no evidence of safety.",
        "no_interval": "There is one target only, so there is no interval and no claim.",
        "zero_width_interval": "Every target scored the same, so resampling them gives an interval "
        "of no width. That is not certainty; more targets are needed.",
        "small_sample": f"Fewer than {SMALL_SAMPLE} scores stand behind the row; bootstrap "
        "intervals of so few are too short.",
        "zero_gradients": "The gradient the attack read was zero everywhere, so there was nothing "
        "to invert.",
        "non_finite": "A score or an observation is infinite or not a number. The affected figures "
        "are left out, not averaged over the rest.",
        "black_box_beat_white_box": "The attack did better with answers alone than with the model "
        "itself, and the intervals do not overlap. White-box access includes the answers, so the "
        "white-box attack is not at its best.",
        "clipping_saturated": "Nearly every update was clipped, so the clipping, not only the "
        "noise, shapes what the attack sees and what the model learns.",
        "eval_mode_client": "Clients trained in evaluation mode (fixed batch statistics, no "
        "dropout), which makes gradients easier to invert than in ordinary training.",
        "untrained_model": "The attacked model (of that round, or the finished one) is no better "
        "than guessing on held-out records. A model that has learned nothing has nothing to leak, "
        "and its gradients are the easiest to invert.",
        "blind_prior": "The adversary has public records, and their mean guesses better, by the "
        "metrics named, than the attack on the twin, which is sure of other people's pictures: it "
        "is prior-only there.",
        "service_guesses": "What is served is no better than guessing, though the model behind it "
        "is: nobody can use it, and how much it leaks says nothing of a protection.",
        "queries_refused": "How many of the attack's queries got no answer.",
        "weak_calibration": "Too few benign records stand behind a guard's threshold for the false-"
        "alarm rate it was asked for.",
        "fewer_targets_than_asked": "Fewer targets were scored than the scenario asked for.",
        "prior_only_blind": "The same attack on the twin training found nothing it could read (no "
        "gradient, or one that is not finite), so prior-only is a blind guess and the advantage is "
        "too large.",
        "prior_only_untrained": "The twin's model learned nothing while the deployment's did, so "
        "prior-only is weaker than it should be.",
        "aggregate_wrong": "The mean that the transport gave is further from the mean of the true "
        "updates than its quantisation allows: it computed something else than was asked.",
        "aggregation_error": "How far the mean that the transport gave lies from that of the true "
        "updates, and the bound that its quantisation promises.",
        "weak_mask_generator": "The masks come from a generator of 32 bits of seed (Flower's "
        "own): who can try four thousand million seeds takes them off. See the attack "
        "mask_recovery.",
        "sealed_read_raw": "Nothing in the hands of this adversary opens the item, so the attack "
        "read masked numbers or ciphertext as if they were an update.",
        "partly_opened": "This adversary opens only those records that were in a batch while the "
        "messages of the compute parties were recorded (recorded_steps); the others count as grey "
        "images, so the mean lies below what it has of those it opens.",
        "stale_global_model": "The adversary did not see the global model of that round, so the "
        "attack started from an earlier one that it knew.",
        "dead_layer": "A client that looked would have found a whole layer of the model it was "
        "sent to be zero on all its records: this active attack can be noticed.",
        "zero_gradients_in_first_layer": "The gradient of the first layer was zero, as behind dead "
        "ReLU units or a frozen layer. Most of what an update says of its records is in that "
        "layer.",
        "zero_gradients_in_read_layer": "The gradient of the layer that the closed form reads was "
        "zero, so there was nothing to solve. A grey image stands for the answer.",
        "zero_gradients_in_last_layer": "The gradient of the last layer was zero, as of a frozen "
        "head. Labels cannot be read from it and were guessed.",
        "not_converged": "No start of the search explained the update, so what was returned is "
        "where it stopped. A low figure here speaks of the search, not of the deployment.",
        "search_diverged": "The loss of the search was never a finite number. A grey image stands "
        "for the answer.",
        "lengths_guessed": "How many tokens each sentence has did not follow from the update, and "
        "was taken from what fits best, or to be as many as the longest has.",
        "token_table_held": "Local steps were simulated with the vectors of tokens held still, "
        "where clients train them too.",
        "token_set_not_visible": "No row of the embedding table's gradient stands out, so the "
        "tokens of the batch could not be told from the rest of the vocabulary.",
        "more_tokens_than_places": "More rows of the embedding table's gradient stand out than the "
        "sentences have places for; the longest were kept.",
        "dropout_masks_unknown": "Clients trained with dropout, whose masks only they know. The "
        "attack simulates training without them, and so is weaker than one that guesses them.",
        "false_knowledge": "The attack was made to believe something of the local training that is "
        "not so: what it believed, and what is true. The figures are those of a mistaken "
        "adversary.",
        "belief_without_effect": "The attack was made to believe something that it does not use "
        "here; nothing is learned of what such a mistake costs.",
        "records_do_not_fit": "The attack, or the labels granted to it, takes another number of "
        "records than the update holds. A blind guess stands for the answer.",
        "more_classes_than_records": "The gradient shows more classes than the records it was said "
        "to hold, so the number told is wrong.",
        "batch_order_without_labels": "The order of the batches was granted without the labels, "
        "which were dealt over it and searched for.",
        "bn_statistics_absent": "Batch statistics were granted, but the update carries none, or "
        "clients do not normalise by the batch. They made no difference.",
        "steps_read_as_one": "The update of several local steps was read as a single gradient, so "
        "that the rule for labels holds only approximately.",
        "negative_features": "The inputs of the last layer take either sign. This rule needs them "
        "to be non-negative: the sign of an entry proves nothing here.",
        "labels_not_distinct": "The rule takes every label of a batch to be different, and the "
        "gradient does not bear that out. The labels left over are guesses.",
        "rounds_left_out": "Some of the rounds were not used: not heard of, empty, or of another "
        "number of records than the last.",
        "several_records": "The closed form holds for one record and the update is of more. The "
        "answer is one mixture of them, returned for each.",
        "several_steps": "The closed form holds for one step and the update is of several, so that "
        "it is an approximation.",
        "rank_deficient": "The equations do not determine the whole image (at the layer named, if "
        "one is). What they leave open was filled in with the smallest solution or with grey.",
        "rank_unknown": "The layer has too many unknowns for its rank to be computed. Whether its "
        "input is determined is not known.",
        "not_one_record": "The gradient of the last layer is not that of a single record, so the "
        "recursion starts from a mixture.",
        "twin_data": "Two scalings of the image give the very same gradient. The smaller one was "
        "taken, which need not be the right one.",
        "scale_not_found": "No scale of the features explains the gradient of the last layer, as "
        "where rounding has taken the gradient of a very sure model. All that follows rests on a "
        "guess.",
        "saturated_activation": "A value to be inverted lay outside the range of its activation "
        "and was moved inside, where the inverse is at its steepest.",
        "gradient_mismatch": "The image that was found does not give the gradient that was seen, "
        "so it is not the record, or not the only one.",
        "recursion_diverged": "Going back through the layers ended in numbers that are not finite. "
        "A grey image stands for the answer.",
        "rank_below_records": "The gradient has a lower rank than there are records: some are "
        "alike, or left no trace. Only as many as the rank were looked for.",
        "rank_above_records": "The gradient has a higher rank than the records told of: there are "
        "more of them, or it holds noise.",
        "too_narrow": "The layer has fewer live neurons than twice the records, too few zeros to "
        "tell records apart. No draws were made, and what could not be read directly is a guess.",
        "samples_exhausted": "The budget of draws ended before every record was found. Those "
        "missing are guesses, or the mixture of all with confidence -1.",
        "not_unique": "The answer fits everything that was seen, and so does another: too few "
        "zeros tell one record from the others.",
        "partial_gradient": "Some neurons of the layer were not seen whole, as after pruning or "
        "under masks. They were left out.",
        "participation_not_recovered": "The integer program did not tell which clients took part "
        "in which round, so single updates could not be separated with certainty.",
        "no_epochs_under_poisson_sampling": "Poisson sampling has no epochs, so the attack went "
        "without the prior that its records are the same in every epoch.",
        "poor_generator": "The generator trained on public data draws even its own held-out public "
        "records poorly (PSNR given). A low figure may be due to it and not to the deployment.",
        "prior_only_weaker": "The attack on the twin noticed a weakness, named here, that it did "
        "not notice on the deployment. Part of the advantage may come from that.",
        "masks_not_recovered": "No seed of the mask generator fits what was seen.",
        "underdetermined": "Fewer different groups of clients than clients took part in the rounds "
        "seen, so that single updates cannot be told apart; the least-norm ones were attacked.",
        "noise_below_claim": "Fewer clients than planned were in a round, so that the noise they "
        "added up to is below what the claim needs.",
        "claim_violated": "The audit's lower bound on epsilon, right with 95 % confidence, lies "
        "above the claim: the mechanism does not keep what it promises.",
        "audit_cannot_refute": "Even if it guessed every canary right this audit could not show an "
        "epsilon above the claim; more canaries are needed.",
        "audit_at_other_delta": "The audit's bound is for another delta than the claim, so that "
        "the two cannot be compared.",
        "fewer_colluders_than_asked": "Not as many clients took part in the round, beside the "
        "target, as the scenario wants to collude.",
        "not_adaptive": "The attack has no form adapted to this protection; a stronger one may do "
        "better.",
        "audit_weak": "How much a sound mechanism with exactly the claimed epsilon would be "
        "expected to show: an audit that shows as much is no proof that the claim is tight.",
        "rounds_skipped": "Some rounds failed and left the model as it was.",
        "clients_lost": "Some clients dropped out of training; the figures are for those that "
        "stayed.",
        "shares_not_uniform": "What compute parties hold and receive failed the test that each "
        "tensor of it, and each pair that was tested, is uniform: shares that hide what they stand "
        "for pass it. Do not trust the sharing.",
        "fixed_point_gap": "In fixed point under MPC the model's accuracy on held-out records came "
        "out further from that of the same training in floating point than one per cent, or one "
        "and a half held-out records where that is more; more fraction_bits may help.",
        "fixed_point_error": "An answer under MPC was further from that of the same model in "
        "floating point than fixed-point rounding should put it.",
        "access_denied": "The service stopped answering the attack before it was done, and it went "
        "on with what it had. More accounts, or more patience, would have given it more.",
        "alarm_raised": "A monitor at the door noticed at least one of the attack's accounts. What "
        "the attack found it found all the same; whether somebody would have acted is not told.",
        "answers_in_clear": "Encrypted inference is slow, so only the first queries of a door go "
        "through ciphertexts; the rest are answered by the same circuit in the clear. The answers "
        "are those that decryption gives, up to the scheme's error.",
        "no_start": "For some targets no starting point was found that the model answers with the "
        "wanted class; where there is none the attack returns a guess of its prior.",
        "no_bit_flipped": "The memory made no error in this run, so that the service is the exact "
        "one and nothing is learned of the protection.",
        "uncorrectable_words": "Some words of the memory had more errors than the error-correcting "
        "code repairs.",
        "weights_not_stored": "Some weights of the trained model were not finite or too large for "
        "the encoding of the memory, and were replaced before any error.",
        "weights_not_finite": "Errors made some weights infinite or not a number, and the memory's "
        "policy lets them pass.",
        "unusable_answers": "Errors in memory made some answers not a number; such an answer is "
        "given as the uniform distribution.",
        "ckks_error": "An answer under encryption was further from that of the same circuit in the "
        "clear than the scheme's rounding should put it.",
        "no_answers": "The service answered too few of the attack's queries for it to learn "
        "anything from them; it returned a guess of its prior.",
        "target_unanswered": "The query that the attack wanted to read was among those that got no "
        "answer, so what it returned for it is a guess of its prior.",
        "constant_answers": "Every query got the same answer, so that the attack had nothing to "
        "climb.",
        "noticed": "Careful clients would have noticed what the malicious server sent: each "
        "detector named detects it in more than half of the cases (client, altered round, seed), "
        "at a threshold that honest rounds cross as rarely as is said. Clients here only measure; "
        "none of them refused to train.",
        "unnoticed": "No detector of this deployment detects what the malicious server sent in "
        "more than half of the cases. The best one is named. That is no proof that it cannot be "
        "noticed: another check might.",
        "few_honest_measurements": "Fewer than 100 distinct honest measurements to set a "
        "threshold of a detector by (their number is given), too few for a rate of false alarms of "
        "1 %. The threshold is the largest of them. More rounds, clients or seeds of an honest "
        "deployment with the same detectors would help.",
        "false_alarms_above_aim": "Honest rounds cross the threshold of the detector named clearly "
        "more often (the rate given) than the 1 % that it was set for: honest trainings differ "
        "more from seed to seed than the calibrating ones show. More seeds would help.",
        "few_seeds": "Fewer than three seeds. The interval covers the choice of targets, not "
        "another training run, nor another device with faults of its own.",
    }
)
"""Flag -> what it means, in plain words. A flag may carry its own reason: `failed: reason`."""

_UNKNOWN = "Reported by a component of this scenario; its own documentation says what it means."


def name_of(flag: str) -> str:
    """`failed: out of memory` -> `failed`."""
    return flag.partition(":")[0]


def explain(flag: str) -> str:
    return EXPLANATIONS.get(name_of(flag), _UNKNOWN)


def trial_flags(trials: Sequence[Trial], round: int | None, metric: str) -> tuple[str, ...]:
    """Flags of one row that its own trials (one a seed) tell, in a fixed order."""
    found = {flag for trial in trials for flag in trial.flags}
    found |= {flag for trial in trials for at, flag in trial.target_flags if at == round}
    if len(trials) < SEEDS_FOR_TWO_LEVELS:
        found.add("few_seeds")
    guessing = [trial for trial in trials if trial.utility <= trial.chance + CHANCE_MARGIN]
    if any(trial.trained_utility <= trial.chance + CHANCE_MARGIN for trial in guessing):
        found.add("untrained_model")
    elif guessing:
        found.add("service_guesses")
    if any(_scored(trial, metric) < trial.targets_asked for trial in trials if not trial.failure):
        found.add("fewer_targets_than_asked")
    return (*_failures(trials), *ordered(found))


def figure_flags(row: LeakageRow) -> tuple[str, ...]:
    """Flags that the figures of a row that did not fail tell."""
    found = set()
    figures = (row.value, row.prior_only, row.advantage)
    if not all(math.isfinite(figure) for figure in figures):
        found.add("non_finite")
    elif not row.has_interval:
        found.add("no_interval")
    elif row.advantage_ci_low <= 0 <= row.advantage_ci_high:
        found.add("interval_crosses_zero")
    if row.has_interval and row.advantage_ci_low == row.advantage_ci_high:
        found.add("zero_width_interval")
    if row.n < SMALL_SAMPLE:
        found.add("small_sample")
    return ordered(found)


def control_flags(row: LeakageRow, control: LeakageRow | None) -> tuple[str, ...]:
    """Whether the positive control exists and shows a leak clear of zero.

    An unprotected row is its own control; that its interval holds zero is said by another flag.
    """
    if control is None:
        return ("no_positive_control",)
    if not row.protections:
        return ()
    if control.clear_of_zero:
        return ()
    lone = not math.isfinite(control.advantage_ci_low) and control.advantage > 0
    return ("control_without_interval",) if lone else ("positive_control_failed",)


def compare_boxes(rows: Sequence[LeakageRow]) -> list[LeakageRow]:
    """Flag both rows where an attack on answers beats itself on the model, intervals disjoint."""
    flagged = list(rows)
    for i, black in enumerate(rows):
        for j, white in enumerate(rows):
            if _beats(black, white):
                flagged[i] = add(flagged[i], "black_box_beat_white_box")
                flagged[j] = add(flagged[j], "black_box_beat_white_box")
    return flagged


def add(row: LeakageRow, *flags: str) -> LeakageRow:
    """The row with the flags; none twice."""
    fresh = [flag for flag in dict.fromkeys(flags) if flag not in split(row.flags)]
    return replace(row, flags=join((*split(row.flags), *fresh)))


def ordered(flags: Iterable[str]) -> tuple[str, ...]:
    """Known flags in the order of EXPLANATIONS, then the others by name."""
    known = list(EXPLANATIONS)
    return tuple(
        sorted(
            _once(flags),
            key=lambda flag: (
                known.index(name_of(flag)) if name_of(flag) in known else len(known),
                flag,
            ),
        )
    )


def _once(flags: Iterable[str]) -> list[str]:
    """One flag a name: of several reasons, of targets or seeds, one stands for all."""
    reasons: dict[str, list[str]] = {}
    for flag in sorted(set(flags)):
        reasons.setdefault(name_of(flag), []).append(flag)
    return [
        found[-1] if len(found) == 1 else f"{found[-1]} (and {len(found) - 1} more)"
        for found in reasons.values()
    ]


def _failures(trials: Sequence[Trial]) -> tuple[str, ...]:
    reasons = [" ".join(trial.failure.split()) for trial in trials if trial.failure is not None]
    if not reasons:
        return ()
    if len(reasons) == len(trials):
        return (f"failed: {reasons[0]}",)
    return (f"failed_seeds: {len(reasons)} of {len(trials)}: {reasons[0]}",)


def _scored(trial: Trial, metric: str) -> int:
    return len({(s.target, s.round) for s in trial.scores if s.metric == metric})


def _beats(black: LeakageRow, white: LeakageRow) -> bool:
    same = all(
        getattr(black, name) == getattr(white, name)
        for name in ("scenario", "deployment", "attack", "metric")
    )
    return (
        same
        and black.channel in (Channel.PREDICTIONS, Channel.LABELS)
        and white.channel == Channel.GLOBAL_MODEL
        and black.advantage_ci_low > white.advantage_ci_high
    )
