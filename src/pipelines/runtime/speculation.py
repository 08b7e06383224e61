"""Whose proposals each row verifies in a step, how many, and how many the draft makes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

from max.pipelines.context import TextContext

from unispec.pipelines.lookup.automaton import SuffixAutomaton
from unispec.pipelines.lookup.options import LookupOptions
from unispec.pipelines.lookup.store import AnswerStore
from unispec.pipelines.policy.choosing import Choice, GoingRate, RowOutlook, best_choice
from unispec.pipelines.policy.costs import StepCost, StepCosts
from unispec.pipelines.policy.estimates import DraftEstimate, MatchEstimate

from .proposals import Outlook, RowSpeculation
from .rows import Row, in_prefill

__all__ = ["Speculation"]

# MAX's server shows what its own loggers say, and no others.
logger = logging.getLogger("max.pipelines.unispec")

# Steps after which one more token is proposed than pays, to see whether it comes true by now; the
# second number where it would have to fail less than half as often. Where it could not pay if it
# always came true, it is not looked at.
_PROBE_EVERY: Final = 32
_PROBE_SELDOM: Final = 512
# A draft is called useless after so many first proposals of which less than this share came true.
# Until it is judged it is looked at more often.
_JUDGED_AFTER: Final = 60
_PROBE_UNJUDGED: Final = 4
_USELESS: Final = 0.02
# Tokens that agree with a stored answer before what followed there is proposed.
_STORED_MATCH: Final = 4
# Lengths of sequences that share an entry of the costs.
_CONTEXT_STEP: Final = 128
# Costs of so many kinds of steps are kept.
_KEPT_COSTS: Final = 256


class Speculation:
    """Decides before each step, and learns after it.

    What is chosen depends on verified tokens, on estimates made of them and on measured times,
    never on which tokens are proposed: so it cannot change what is answered.

    Args:
        most_verified: W, drafts of a row that a step can verify.
        most_proposed: K, tokens of a row that the draft can propose; 0 without a draft.
        pinned: K for a number of rows; None: what pays, by `costs`.
        lookup: what is looked up; None: nothing.
        costs: of steps on this machine; needed where nothing is pinned.

    Attributes:
        pinned: may be set between two steps.
        choice: what the last step chose; None where K is pinned.
    """

    def __init__(
        self,
        *,
        most_verified: int,
        most_proposed: int,
        pinned: Callable[[int], int] | None,
        lookup: LookupOptions | None = None,
        costs: StepCosts | None = None,
    ) -> None:
        self.pinned = pinned
        self.choice: Choice | None = None
        self._most_verified = most_verified
        self._most_proposed = most_proposed
        self._lookup = lookup
        self._store: AnswerStore | None = None
        self._stored_match = 0
        if lookup is not None and lookup.stored:
            self._stored_match = max(lookup.shortest, min(lookup.longest, _STORED_MATCH))
            self._store = AnswerStore(lookup.stored, self._stored_match)
        self._costs = costs
        self._costs_at: dict[tuple[int, int], StepCost] = {}
        self._draft = DraftEstimate()
        self._match = MatchEstimate()
        self._going = GoingRate()
        # The last step: its rows, tokens that it brought, and what it was expected to take.
        self._rows, self._brought, self._seconds = 0, 0, 0.0
        # Of its rows, those that had a draft's proposals, and whose first one came true.
        self._tried, self._true = 0, 0
        self._since_probe = 0
        self._judged = False
        # Whether something that was looked up was found for a row of the last step.
        self._found = False
        # What the last choice was made of, and whether that step taught something.
        self._decided: tuple[StepCost, Sequence[RowSpeculation]] | None = None
        self._learned = False

    def plan(self, contexts: Sequence[TextContext], rows: Sequence[Row]) -> int:
        """Chooses what each row verifies: leaves it in `drafts` of the rows.

        Args:
            contexts: of the batch, one at least.
            rows: likewise, each with what the draft proposed for it in `drafts`.

        Returns:
            How many tokens a row the draft is to propose in this step.
        """
        states = [self._state(row) for row in rows]
        for context, row, state in zip(contexts, rows, states, strict=True):
            state.outlook = self._outlook(context, row, state)
        self._found = any(state.outlook.match for state in states)
        # Of an answer's last step, and of a prompt's chunk before the last, nobody takes proposals.
        proposes = any(map(_goes_on, contexts))
        if self.pinned is not None:
            self.choice = None
            width = min(self.pinned(len(rows)), self._most_verified)
            proposals = min(width, self._most_proposed) if proposes else 0
        else:
            width, proposals = self._choose(contexts, states, proposes)
        for row, state in zip(rows, states, strict=True):
            state.source, chosen = state.outlook.best(width)
            if state.source == "ngram":
                row.draft_probs = None
            row.drafts = chosen
        self._brought = self._tried = self._true = 0
        self._seconds = 0.0
        if self.pinned is None and not any(map(in_prefill, contexts, rows)):
            used = max(len(row.drafts) for row in rows)
            self._seconds = self._cost(contexts).both[proposals][used]
        return proposals

    def foreseen(self, num_rows: int) -> int | None:
        """What `plan` will most likely return for the next step, if it is like the last one.

        Returns:
            None where that has to be seen first: something that was looked up was found for the
            last step, or a probe is due.
        """
        if self._found:
            return None
        if self.pinned is not None:
            return min(self.pinned(num_rows), self._most_verified, self._most_proposed)
        if self.choice is None or self.choice.width != self.choice.proposals:
            return None
        after = self._probe_after(self.choice)
        is_due = after is not None and self._since_probe + 1 >= after
        return None if is_due else self.choice.proposals

    def learn(self, row: Row, emitted: Sequence[int]) -> None:
        """Compares all that was at hand for a row with what the step brought for it."""
        state = self._state(row)
        outlook = state.outlook
        self._brought += len(emitted)
        if row.drafts:
            state.acceptance[state.source].verified(len(row.drafts), len(emitted) - 1)
        if outlook.draft:
            state.draft.observe(outlook.draft, emitted)
            self._tried += 1
            self._true += outlook.draft[0] == emitted[0]
            self._judge()
        if outlook.match:
            state.match.observe(outlook.match_length, outlook.match, emitted)

    def finished(self, context: TextContext, row: Row) -> None:
        """Keeps the answer of a request that is complete, where answers are kept."""
        if self._store is not None and row.generated:
            self._store.add(context.tokens.all[-row.generated :].tolist())

    def _state(self, row: Row) -> RowSpeculation:
        if row.speculation is None:
            row.speculation = RowSpeculation(self._draft, self._match)
        return row.speculation

    def _outlook(self, context: TextContext, row: Row, state: RowSpeculation) -> Outlook:
        outlook = Outlook()
        # What is behind the end of the answer is not worth verifying.
        room = 0 if (reading := in_prefill(context, row)) else _room(context)
        if reading or self.pinned is None:
            row.drafts = row.drafts[:room]
        if row.drafts:
            outlook.draft = row.drafts
            outlook.draft_expected = state.draft.expected(len(row.drafts))
        if self._lookup is None:
            return outlook
        known = state.automaton
        tokens = context.tokens
        # A prompt is taken in chunk by chunk, as the steps take it.
        known.extend(tokens.all[len(known.tokens) : tokens.current_position].tolist())
        if room:
            match, proposed = self._look_up(known, self._lookup)
            proposed = proposed[:room]
            if proposed:
                outlook.match, outlook.match_length = proposed, match
                outlook.match_expected = state.match.expected(match, len(proposed))
        return outlook

    def _look_up(self, known: SuffixAutomaton, options: LookupOptions) -> tuple[int, list[int]]:
        """How many tokens agree, and what followed them."""
        match = known.longest_match(options.longest)
        if self._store is not None and match.length < self._stored_match:
            stored = self._store.continuation(known.tokens, self._most_verified)
            if stored:
                return self._stored_match, stored
        if match.length < options.shortest:
            return 0, []
        return match.length, known.continuation(match.end, self._most_verified)

    def _choose(
        self, contexts: Sequence[TextContext], states: Sequence[RowSpeculation], proposes: bool
    ) -> tuple[int, int]:
        """The width and the number of proposals that pay, or a probe.

        Args:
            proposes: whether a proposal is of any use.
        """
        if self._seconds and self._brought:
            self._going.after(self._rows, self._brought, self._seconds)
        self._rows = len(contexts)
        choice = self._best(states, self._cost(contexts))
        if not proposes:
            return choice.width, 0
        self._since_probe += 1
        # What a probe proposed came true: it may have become right, so the next one follows.
        again = not choice.proposals and 0 < self._tried == self._true
        after = self._probe_after(choice)
        if after is None or (self._since_probe < after and not again):
            return choice.width, choice.proposals
        self._since_probe = 0
        return choice.width, min(choice.proposals + 1, self._most_proposed)

    def _probe_after(self, choice: Choice) -> int | None:
        """After how many steps a probe is made; None: never."""
        if not self._judged:
            return _PROBE_UNJUDGED
        if choice.one_more_could_pay:
            return _PROBE_EVERY
        return _PROBE_SELDOM if choice.one_more_right_would_pay else None

    def _best(self, states: Sequence[RowSpeculation], cost: StepCost) -> Choice:
        """The best choice; the last one where nothing has changed since."""
        idle = not any(state.outlook.draft or state.outlook.match for state in states)
        decided = cost, states
        if self.choice is None or not idle or self._learned or decided != self._decided:
            rows = [self._expected(state) for state in states]
            self.choice = best_choice(rows, cost, self._going)
        self._decided, self._learned = decided, not idle
        return self.choice

    def _expected(self, state: RowSpeculation) -> RowOutlook:
        outlook, width = state.outlook, self._most_verified
        proposed = state.draft.expected(self._most_proposed)
        draft = _filled(outlook.draft_expected, width)
        if not outlook.match:
            return RowOutlook(draft, proposed)
        match = _filled(outlook.match_expected, width)
        at_hand = [max(pair) for pair in zip(draft, match, strict=True)]
        # The next step has a match again if the first tokens of this one come true.
        seen = min(3, len(outlook.match))
        share = outlook.match_expected[seen] - outlook.match_expected[seen - 1]
        return RowOutlook(at_hand, proposed, match, share)

    def _cost(self, contexts: Sequence[TextContext]) -> StepCost:
        assert self._costs is not None
        rows = len(contexts)
        total = sum(context.tokens.processed_length for context in contexts)
        key = rows, total // (rows * _CONTEXT_STEP)
        if key not in self._costs_at:
            if len(self._costs_at) >= _KEPT_COSTS:
                self._costs_at.clear()
            self._costs_at[key] = self._costs.at(rows, (key[1] + 0.5) * _CONTEXT_STEP)
        return self._costs_at[key]

    def _judge(self) -> None:
        """Warns of a draft whose first proposals do not come true; judged once, at the start."""
        hits, trials = self._draft.first
        if self._judged or trials < _JUDGED_AFTER:
            return
        self._judged = True
        if hits >= _USELESS * trials:
            return
        logger.warning(
            "Of the last %d tokens that the draft proposed first, %.1f%% came true: it does not"
            " help. Check that it was trained for this target (its tapped layers, its tokenizer),"
            " and that its weights were not quantised too coarsely.",
            round(trials),
            100 * hits / trials,
        )


def _room(context: TextContext) -> int:
    """How many tokens a step can bring beside the one that it brings anyhow."""
    return max(context.max_length - len(context.tokens) - 1, 0)


def _goes_on(context: TextContext) -> bool:
    """Whether the next step can verify what this one proposes."""
    return not context.tokens.actively_chunked and _room(context) > 0


def _filled(expected: Sequence[float], width: int) -> list[float]:
    """As many entries as a width has; beyond what is at hand nothing more comes true."""
    cut = list(expected[: width + 1])
    return cut + [cut[-1]] * (width + 1 - len(cut))
