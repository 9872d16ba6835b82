"""Drafts for speculative decoding from the sequence's own text (prompt lookup, Saxena 2023).

The last few tokens are looked for further up; what followed them there is proposed.  Verification is the choice of
tokens itself: each position's token is chosen as always, and a draft counts where it agrees.  For a draft without
probabilities this is the rejection scheme of Leviathan et al. 2023: token d is kept with probability p(d), and another
one comes with its share of the rest.  Ids are those of decoding without drafts, sampled ones too.
"""

from __future__ import annotations

from collections.abc import Sequence

# Longest first.  Saxena's rule goes down to one token, whose drafts are mostly wrong.
_NGRAM_SIZES = (4, 3, 2)
_FIRST_LEN = 3


class PromptLookup:
    """The drafts of one sequence.  Their length follows how many of the last ones were right."""

    def __init__(self, max_len: int):
        self._max_len = max_len
        self._len = min(max_len, _FIRST_LEN)
        self._followers: dict[tuple[int, ...], int] = {}  # n-gram -> where its latest occurrence goes on
        self._num_indexed = 0

    def propose(self, tokens: Sequence[int], room: int) -> tuple[int, ...]:
        """At most `room` tokens that may follow; none where the end of `tokens` did not occur before."""
        self._index(tokens)
        for size in _NGRAM_SIZES:
            start = self._followers.get(tuple(tokens[-size:]))
            if start is not None and len(tokens) > size:
                return tuple(tokens[start : start + min(self._len, room)])
        return ()

    def learn(self, num_proposed: int, num_right: int) -> None:
        """Twice as many after a draft that was right throughout, else one more than were right."""
        self._len = min(self._max_len, 2 * num_proposed if num_right == num_proposed else num_right + 1)

    def _index(self, tokens: Sequence[int]) -> None:
        """Takes in all n-grams but those at the very end, whose followers are not known yet."""
        for end in range(self._num_indexed, len(tokens) - 1):
            for size in _NGRAM_SIZES:
                if end + 1 >= size:
                    self._followers[tuple(tokens[end + 1 - size : end + 1])] = end + 1
        self._num_indexed = max(self._num_indexed, len(tokens) - 1)
