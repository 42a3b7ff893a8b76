"""Predicts how likely an edit is to do what its prompt says, before the edit is measured."""

from cfclip.domain import Domain


def predicted_success(domain: Domain, prompt: str) -> float | None:
    """The share of faces, in [0, 1], on which ``domain.mapper`` is expected to do what ``prompt`` says.

    If the prompt itself was measured, this is its share; otherwise the smallest share measured for any of its
    claims, in whatever wording. None if the domain has no mapper or no ``confidence``, if the prompt makes no
    claim that can be measured, or if one of its claims was not measured. ``domain.confidence`` has
    "measured": prompt -> share, and "claims": name as in :meth:`.GroundTruth.claims` -> share.
    """
    known = domain.confidence
    if domain.mapper is None or known is None:
        return None
    if prompt in known["measured"]:
        return known["measured"][prompt]
    claims = domain.truth.claims(prompt) if domain.truth else ()
    shares = [known["claims"].get(claim) for claim in claims]
    return min(shares, default=None) if None not in shares else None
